"""Whether isolated training teaches a seed something: the same validation split with the seed on and with it off.

For each random seed a host learns `glyphs` alone for three epochs, gets one seed, and trains it in isolation for three
more; after each of them the model is measured with the seed at full strength and without it. The slot is another one
each time. The short form takes a host of half the width and fewer seeds.

- ``better_share``: share of the runs in which the validation loss is lower with the seed on, after three epochs;
  ``better_after_1`` and ``_2`` are the numbers of such runs after fewer.
- ``gain_nats_mean``: mean loss off less mean loss on; ``accuracy_points_mean``: the same for accuracy, in points.
- ``violations``: false alarms of the monitor, which looked on at each 5th isolated step.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks import common
from benchmarks.common import Bar
from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.kasmina.slot import Pass
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.measure import Quality, evaluate

RUNS, QUICK_RUNS, SHARE = 10, 3, 0.8
ALONE_EPOCHS, ISOLATED_EPOCHS = 3, 3
QUICK = ("run.host_width=8", "run.validation_samples=1000")
BLUEPRINT = 9


def outcome(seed: int, home: Path, *, slot: int, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run to the end of isolation; losses in nats, accuracies in 0..1."""
    config = configuration.load(
        None,
        [f"home={home}", f"run.seed={seed}", "run.mode=lockstep", "seeds.monitor_every=5",
         f"seeds.training_epochs={ISOLATED_EPOCHS}", *settings],
    )  # fmt: skip
    loop = Loop(config, inprocess.LocalKernels(), name=f"isolation-{seed}", data=home / "data")
    loop.begin(config.run.epochs * loop.steps_per_epoch)
    for _ in range(ALONE_EPOCHS):
        loop.train_epoch()
        loop.close_stages(loop.measure())
    directive = SeedDirective(SeedOperation.GERMINATE, blueprint=BLUEPRINT)
    command = AdaptationCommand(1, CommandType.SEED, "r", 1, 0, "benchmark", slot=slot, seed_directive=directive)
    refusal = loop.garden.apply(command)
    assert not refusal, refusal
    after = []
    for _ in range(ISOLATED_EPOCHS):
        loop.train_epoch()
        assert loop.garden.slots[slot].stage is Stage.TRAINING, "nothing but this stage is measured here"
        off, on = loop.measure(), with_the_seed(loop)
        after.append({"loss_off": off.loss, "gain": off.loss - on.loss, "points": 100 * (on.accuracy - off.accuracy)})
        loop.close_stages(off)
    return {
        "seed": seed,
        "slot": slot,
        "after": after,
        **after[-1],
        "checks": loop.garden.checks,
        "violations": loop.garden.violations,
    }


def with_the_seed(loop: Loop) -> Quality:
    """Validation with the isolated seed in the path, as in its shadow pass."""
    loop.garden.switch.current = Pass.SHADOW
    try:
        return evaluate(loop.model, loop.validation, CostMeter(), "on")
    finally:
        loop.garden.switch.current = Pass.MODEL


def measure(*, runs: int, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        for seed in track(range(runs), description="random seeds", console=common.console):
            rows.append(outcome(seed, Path(home), slot=seed % 3, settings=settings))
    return {
        "runs": runs,
        **{
            f"better_after_{epochs + 1}": sum(row["after"][epochs]["gain"] > 0 for row in rows)
            for epochs in range(ISOLATED_EPOCHS)
        },
        "better_share": sum(row["gain"] > 0 for row in rows) / runs,
        "gain_nats_mean": sum(row["gain"] for row in rows) / runs,
        "accuracy_points_mean": sum(row["points"] for row in rows) / runs,
        "checks": sum(row["checks"] for row in rows),
        "violations": sum(row["violations"] for row in rows),
        "tables": {"runs": rows},
    }


BARS = (Bar("better_share", SHARE, above=True, reach=True), Bar("violations", 0))


def main() -> None:
    options: argparse.ArgumentParser = common.parser(__doc__)
    options.add_argument("--seeds", type=int, metavar="N", help=f"how many random seeds; {RUNS}, or {QUICK_RUNS}")
    given = options.parse_args()
    runs = given.seeds or (QUICK_RUNS if given.quick else RUNS)
    settings = QUICK if given.quick else ()
    common.run("isolation", BARS, lambda: measure(runs=runs, settings=settings), given.json)


if __name__ == "__main__":
    main()
