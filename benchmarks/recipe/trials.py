"""The trials: which runs each table of docs/method.md is made of.

All runs of a task share data, batch order, boundaries and the shape of the schedule, and are paired by random seed. A
name begins with "scratch" where the final size is trained from its first step, one run for each length, each decayed
to its own end: these are the frontier that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Never used by the study itself, whose seeds count from 0.
SEEDS = (100, 101, 102)


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind of run.

    Attributes:
        arm: as in `RunRequest`.
        epochs: how many the run has, and so how long its schedule is.
        variant: a patch of `variants`.
        blueprint: fills the slots of the final size, where it is another one than the task's.
    """

    name: str
    settings: tuple[str, ...] = ()
    arm: str = "grown"
    epochs: int = 16
    variant: str = ""
    blueprint: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A task: its settings, the length of F, the lengths of the frontier, and the blueprint that fills its slots."""

    settings: tuple[str, ...]
    epochs: int
    frontier: tuple[int, ...]
    blueprint: str
    slots: int


TASKS: Mapping[str, Setting] = {
    "glyphs": Setting(("run.dataset=glyphs",), 16, (5, 6, 8, 10, 13, 16), "BP009", 3),
    "digits": Setting(("run.dataset=digits",), 16, (5, 6, 8, 10, 13, 16), "BP009", 3),
    "pycode": Setting(
        ("run.task=transformer-lite", "run.dataset=pycode", "optimizer.learning_rate=0.003"),
        16, (6, 8, 10, 13, 16), "BP027", 2,
    ),
}  # fmt: skip


def grow_at(epoch: int, epochs: int = 16) -> tuple[str, ...]:
    """All slots at once at the end of that epoch, whatever the losses say."""
    share = f"tamiyo.grow_by={(epoch - 0.5) / epochs:.4f}"
    return ("tamiyo.underfit_gap=0.999", "tamiyo.plateau_rate=1e-9", "tamiyo.latest_growth=0.95", share)


def _early(name: str, *settings: str, variant: str = "") -> Trial:
    """A run that grows at the end of epoch 7 of 16, with one thing changed."""
    return Trial(name, (*grow_at(7), *settings), variant=variant)


WHEN = tuple(Trial(f"at epoch {epoch}", grow_at(epoch)) for epoch in (3, 5, 7, 9))
REFERENCE = WHEN[2]

TABLES_OF_RUNS: Mapping[str, tuple[Trial, ...]] = {
    "when": (Trial("default"), *WHEN),
    "birth": (
        REFERENCE,
        _early("gain 0.1", variant="birth gain 0.1"),
        _early("gain 1", variant="birth gain 1"),
        _early("last map zero", variant="birth zero"),
    ),
}


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the document."""

    rows: tuple[Trial, ...]

    def trials(self, task: str) -> tuple[Trial, ...]:
        """What it needs: its rows, and the task's frontier."""
        return (*frontier(task), *self.rows)


def frontier(task: str) -> tuple[Trial, ...]:
    """The final size from scratch, by length."""
    return tuple(Trial(f"scratch, {epochs} epochs", arm="final", epochs=epochs) for epochs in TASKS[task].frontier)


TABLES: Mapping[str, Table] = {name: Table(rows) for name, rows in TABLES_OF_RUNS.items()}
