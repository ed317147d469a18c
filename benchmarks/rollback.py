"""What it takes to go back: from memory and from disk, over a seed that was grafted, culled or fossilised since.

One run on the demo's own model, in one process, with Tamiyo and her journal. It trains until a seed has become a
fossil; its states before any seed, with one in the path, and with the fossil are kept. Then the same cases are set up
from these states again and again, with two steps of training on top, and undone:

- ``grafted since``: the seed leaves the model and its optimizer;
- ``culled since``: it comes back into its slot, with its moments;
- ``fossilised since``: it leaves the host, of which it had become a part, and is a seed again;
- ``all since``: from the fossil to before the seed.

Each rollback is the real one: written down, Tamiyo told, seeds, model and optimizer rebuilt, compared bit for bit with
what was saved, and tried. ``fast`` reads from memory, ``full`` from disk with its digest checked. ``whole`` has all
that training waits for: the files and the checkpoint of the new branch as well, which follow the three parts.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track

from benchmarks import common
from benchmarks.common import Bar, percentile
from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts.budgets import ROLLBACK_FAST_MS, ROLLBACK_FULL_MS, ROLLBACK_PARTS
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina.lifecycle import LIVE
from esper_ray.tolaria import checkpoint, recovery, resume, rollback
from esper_ray.tolaria.checkpoint import Checkpoint
from esper_ray.tolaria.rollback import Times, Undo
from esper_ray.tolaria.trainer import RunRequest, Trainer

BARS = (
    Bar("fast_p99_ms", ROLLBACK_FAST_MS.limit),
    *(Bar(f"fast_{part.key}_p99_ms", part.limit) for part in ROLLBACK_PARTS),
    Bar("full_p99_s", ROLLBACK_FULL_MS.limit / 1e3),
)
MOST_EPOCHS = 60
SETTINGS = (
    "run.mode=lockstep",
    "run.epochs=1000",
    "run.boundary_every=32",
    "run.train_samples=4000",
    "run.validation_samples=500",
    "run.keep_checkpoints=1000",
    "optimizer.schedule=constant",
    "emergency.snapshots=1000",
    "seeds.gain_errors=0",
    "tamiyo.plateau_rate=10",
    "tamiyo.onset=0",
    "tamiyo.warmup_epochs=1",
    "tamiyo.latest_growth=0.99",
    "tamiyo.grow_by=0.9",
)
# What is undone: from which state, to which, and whether the seed is culled before.
CASES: Mapping[str, tuple[str, str, bool]] = {
    "grafted since": ("live", "bare", False),
    "culled since": ("live", "live", True),
    "fossilised since": ("grown", "live", False),
    "all since": ("grown", "bare", False),
}


@dataclass(slots=True)
class Log:
    """Of each rollback, by how and by case."""

    times: dict[str, list[Times]] = field(default_factory=lambda: {"fast": [], "full": []})
    whole: dict[str, list[float]] = field(default_factory=lambda: {"fast": [], "full": []})
    cases: dict[str, list[float]] = field(default_factory=dict)
    untold: int = 0


def states(trainer: Trainer) -> Mapping[str, Checkpoint]:
    """Train until a fossil is there; the newest state before any seed, with one in the path, and with the fossil."""
    found: dict[str, Checkpoint] = {}
    while "grown" not in found:
        trainer.one_epoch()
        stages = {slot.stage for slot in trainer.garden.slots}
        state = trainer.memory.back(1)
        assert state is not None
        if Stage.FOSSILIZED in stages:
            found["grown"] = state
        elif stages & LIVE:
            found["live"] = state
        elif not trainer.garden.seeds:
            found["bare"] = state
        if trainer.epoch > MOST_EPOCHS:
            raise RuntimeError(f"No seed became a fossil within {MOST_EPOCHS} epochs.")
    return found


def set_up(trainer: Trainer, places: Mapping[str, Checkpoint], case: str) -> Checkpoint:
    """Bring the run to where the case begins; returns the state that it goes back to."""
    begin, end, culled = CASES[case]
    branch = trainer.garden.branch
    state = places[begin]
    resume.clear(trainer)
    resume.restore(trainer, Checkpoint(state.epoch, copy.deepcopy(dict(state.data)), state.tensors))
    trainer.garden.branch = branch
    if culled:
        for slot in trainer.garden.slots:
            if slot.stage in LIVE:
                trainer.garden.cull(slot, "the benchmark")
    for _ in range(2):
        trainer.train_step()
    trainer.epoch += 1
    trainer.memory.forget_after(0)
    trainer.memory.keep(places[end])
    trainer.writer.finish()
    checkpoint.write(trainer.folder / "checkpoints", places[end])
    return places[end]


def go(trainer: Trainer, state: Checkpoint, how: str, case: str, log: Log) -> None:
    start = time.perf_counter()
    undo = Undo("benchmark", to_epoch=state.epoch, full=how == "full", damage=False)
    turn, times = rollback.roll_back(trainer, undo)
    rollback.open_branch(trainer, turn)
    recovery.finish_turn(trainer, turn, times)
    log.whole[how].append((time.perf_counter() - start) * 1e3)
    log.times[how].append(times)
    log.cases.setdefault(f"{how}, {case}", []).append(times.total)
    log.untold += not times.told


def measure(*, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rounds = 6 if quick else 50
    plan = [(how, case) for _ in range(rounds) for how in ("fast", "full") for case in CASES]
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        config = configuration.load(None, [f"home={home}", *SETTINGS])
        trainer = Trainer(RunRequest("rollback", config), inprocess.surroundings(config))
        trainer.open()
        places, log = states(trainer), Log()
        for how, case in track(plan, description="rollbacks", console=common.console):
            go(trainer, set_up(trainer, places, case), how, case, log)
        size = sum(value.nbytes for value in places["grown"].tensors.values()) / 2**20
        trainer.close()
    return figures(log, size)


def figures(log: Log, size_mb: float) -> dict[str, Any]:
    found: dict[str, Any] = {"rollbacks": sum(map(len, log.whole.values())), "state_mb": size_mb, "untold": log.untold}
    for how, times in log.times.items():
        totals = [each.total for each in times]
        found |= {f"{how}_p50_ms": percentile(totals, 50), f"{how}_p99_ms": percentile(totals, 99)}
        for part in ROLLBACK_PARTS:
            values = [getattr(each, part.key) for each in times]
            found |= {f"{how}_{part.key}_p50_ms": percentile(values, 50)}
            found |= {f"{how}_{part.key}_p99_ms": percentile(values, 99)}
        found[f"{how}_whole_p99_ms"] = percentile(log.whole[how], 99)
    found["full_p99_s"] = found["full_p99_ms"] / 1e3
    found["tables"] = {
        "cases": {name: {"p50_ms": percentile(v, 50), "p99_ms": percentile(v, 99)} for name, v in log.cases.items()}
    }
    return found


def main() -> None:
    given = common.parser(__doc__).parse_args()
    common.run("rollback", BARS, lambda: measure(quick=given.quick), given.json)


if __name__ == "__main__":
    main()
