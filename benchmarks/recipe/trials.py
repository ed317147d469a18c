"""The trials: which runs each table of docs/method.md is made of.

All runs of a task share data, batch order and the shape of the schedule, and are paired by random seed. A name begins
with "scratch" where the final size is trained from its first step, one run for each length, each decayed to its own
end: these are the frontier that the others are compared with.
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
    """

    name: str
    settings: tuple[str, ...] = ()
    arm: str = "grown"
    epochs: int = 16
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A task: its settings, the lengths of the frontier (the last costs F), and the block that fills its slots."""

    settings: tuple[str, ...]
    frontier: tuple[int, ...]
    blueprint: str
    slots: int


TASKS: Mapping[str, Setting] = {
    "small": Setting(
        ("run.task=benchmarks.recipe.small:build", "run.boundary_every=32", "seeds.measure_samples=250"),
        (8, 10, 13, 16), "BP009", 3,
    ),
    "glyphs": Setting(("run.dataset=glyphs",), (6, 8, 10, 13, 16), "BP009", 3),
    "digits": Setting(("run.dataset=digits", "run.boundary_every=32"), (6, 8, 10, 13, 16), "BP009", 3),
    "pycode": Setting(
        ("run.task=transformer-lite", "run.dataset=pycode", "run.boundary_every=32"), (6, 8, 10, 13, 16), "BP027", 2
    ),
}  # fmt: skip


def grow_at(epoch: int, epochs: int = 16) -> tuple[str, ...]:
    """All slots at once at the end of that epoch, whatever the losses say."""
    share = f"tamiyo.grow_by={(epoch - 0.5) / epochs:.4f}"
    return ("tamiyo.underfit_gap=0.999", "tamiyo.plateau_rate=1e-9", share)


def _at_five(name: str, *settings: str, variant: str = "") -> Trial:
    """A run that grows at the end of epoch 5 of 16, with one thing changed."""
    return Trial(name, (*grow_at(5), *settings), variant=variant)


WHEN = tuple(Trial(f"at epoch {epoch}", grow_at(epoch)) for epoch in (3, 5, 7, 9))
REFERENCE = WHEN[1]
LONGER = (Trial("at epoch 9 of 20", grow_at(9, 20), epochs=20), Trial("at epoch 13 of 24", grow_at(13, 24), epochs=24))
# That a live branch is seen to leak is the point of this one.
UNWATCHED = ("seeds.isolation_violations=1000000", "seeds.monitor_every=1000000")
ON_ALL = "seeds.measure_samples=0"
HALF = (*grow_at(10, 32), "run.boundary_every=16", ON_ALL)
ROWS: Mapping[str, tuple[Trial, ...]] = {
    "when": (*WHEN, *LONGER),
    "measuring": (
        *(Trial(f"at epoch {epoch}, measured on all samples", (*grow_at(epoch), ON_ALL)) for epoch in (3, 5, 7)),
        Trial("the same, stages of half the length", HALF, epochs=32),
        REFERENCE,
    ),
    "birth": (
        REFERENCE,
        _at_five("gain 0.1 instead of 0.5", variant="birth gain 0.1"),
        _at_five("gain 1", variant="birth gain 1"),
        _at_five("last map at zero", variant="birth zero"),
        _at_five("last map along the gradient", variant="birth gradmax"),
    ),
    "rates": (
        REFERENCE,
        _at_five("no warm-up of the seeds", "optimizer.seed_warmup_steps=0"),
        _at_five("twice the rate for seeds", "optimizer.seed_rate=2"),
        _at_five("the host warms up again for an epoch", variant="host warm-up"),
    ),
    "stages": (
        REFERENCE,
        _at_five("one slot after the other", "tamiyo.seeds_at_once=1"),
        _at_five("alpha rises within 8 steps, not 32", variant="ramp 8"),
        _at_five("a shadow pass on a quarter of the steps, not on half", "seeds.shadow_share=0.25"),
        _at_five("isolated for two epochs", "seeds.training_epochs=2"),
        _at_five("the host learns through live branches", *UNWATCHED, variant="host learns"),
    ),
}


def frontier(task: str) -> tuple[Trial, ...]:
    """The final size from scratch, by length."""
    return tuple(Trial(f"scratch, {epochs} epochs", arm="final", epochs=epochs) for epochs in TASKS[task].frontier)


def trials(table: str, task: str) -> tuple[Trial, ...]:
    """What a table needs: the task's frontier, and its own rows."""
    return (*frontier(task), *ROWS.get(table, ()))


TABLES = ("frontier", *ROWS)
