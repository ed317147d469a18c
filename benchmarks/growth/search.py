"""What a user would pick instead of growing: a search over the same slots and blueprints for the same FLOPs in all.

| family | what |
|---|---|
| asha | random choices of a block, or none, for each slot; Ray Tune's ASHA stops the worse half at each rung |
| grid | the host with its last 0, 1, ... slots filled with the final-size model's blocks; the FLOPs in equal parts |

The best on the validation split is taken, and the test split is read for it alone. ASHA's trials run in this process,
four side by side by turns, one boundary at a time: Ray Tune only decides. So what its actors would cost in time does
not count against it; cost is FLOPs here. Its trials are decayed to the longest rung, which is as long as four trials,
halved twice, can pay for; and when only the best one's way to the end can still be paid, the others stop.

Li et al. 2020, "A system for massively parallel hyperparameter tuning", arXiv:1810.05934.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.growth import runs
from benchmarks.growth.tasks import StudyTask
from esper_ray import inprocess
from esper_ray.contracts.messages import blueprint_name
from esper_ray.reliability.ids import derive_seed
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.measure import Quality, evaluate
from esper_ray.tolaria.trainer import Block

TRIALS, HALVING, RUNGS = 4, 2, 3
NONE_SHARE = 0.25


def run(home: Path, task: StudyTask, seed: int, family: str, budget: float) -> dict[str, Any]:
    """The best model that ``budget`` FLOPs find, with the cost of all trials."""
    return asha(home, task, seed, budget) if family == "asha" else grid(home, task, seed, budget)


def grid(home: Path, task: StudyTask, seed: int, budget: float) -> dict[str, Any]:
    """One run for each number of blocks, filled from the last slot."""
    sizes = [task.blocks[len(task.blocks) - count :] for count in range(len(task.blocks) + 1)]
    config = task.config(seed, "final")
    found = [
        runs.train(home, config, "final" if blocks else "host", blocks=blocks, flops=budget / len(sizes))
        for blocks in sizes
    ]
    best = min(found, key=lambda row: float(row["validation_loss"]))
    together = ("flops", "processor_seconds", "wall_seconds")
    spent = {name: sum(float(row[name]) for row in found) for name in together}
    return {**best, **spent, "searched": [len(row["blocks"]) for row in found]}


@dataclass(slots=True)
class Trial:
    """One choice of blocks in training. ASHA knows it by ``trial_id``."""

    trial_id: str
    blocks: tuple[Block, ...]
    loop: Loop
    per_epoch: float
    quality: Quality | None = None
    stopped: bool = False
    left: int = 0

    @property
    def over(self) -> bool:
        return self.stopped or self.left == 0

    @property
    def loss(self) -> float:
        return self.quality.loss if self.quality is not None else math.inf


def asha(home: Path, task: StudyTask, seed: int, budget: float) -> dict[str, Any]:
    """Four random choices, the worse half stopped at a quarter and at a half of the way.

    Raises:
        ImportError: Ray Tune is not installed; the extra `benchmarks` brings it.
    """
    from ray.tune.schedulers import ASHAScheduler

    processor, start = time.process_time(), time.perf_counter()
    epochs = task.config(seed, "final").run.epochs
    draw = random.Random(derive_seed(seed, "asha", task.name))
    trials = [_trial(home, task, seed, str(number), draw) for number in range(TRIALS)]
    probed = sum(trial.loop.meter.total for trial in trials)
    # Synchronous halving of four: 4 + 2 + 2 quarters of the longest rung.
    costs = sum(trial.per_epoch for trial in trials) / len(trials)
    scale = (budget - probed) / (HALVING * epochs * costs)
    for trial in trials:
        trial.loop.steps_per_epoch = max(1, int(trial.loop.steps_per_epoch * scale))
        trial.per_epoch *= trial.loop.steps_per_epoch / trial.loop.config.run.boundary_every
        trial.loop.begin(epochs * trial.loop.steps_per_epoch)
        trial.left = epochs
    scheduler = ASHAScheduler(
        metric="loss", mode="min", max_t=epochs, grace_period=max(1, epochs // HALVING ** (RUNGS - 1)),
        reduction_factor=HALVING, stop_last_trials=False,
    )  # fmt: skip
    told = {trial.trial_id: SimpleNamespace(trial_id=trial.trial_id) for trial in trials}
    for each in told.values():
        scheduler.on_trial_add(None, each)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "asha training"))
        while running := [trial for trial in trials if not trial.over]:
            for trial in running:
                if not _affordable(trial, trials, budget):
                    trial.stopped = True
                    continue
                _advance(trial)
                answer = scheduler.on_trial_result(
                    None, told[trial.trial_id], {"training_iteration": epochs - trial.left, "loss": trial.loss}
                )
                trial.stopped = answer == scheduler.STOP
    best = min(trials, key=lambda trial: (trial.left > 0, trial.loss))
    test = evaluate(best.loop.model, best.loop.task.data.test, CostMeter(), "test")
    assert best.quality is not None
    return {
        "validation_accuracy": best.quality.accuracy, "validation_loss": best.quality.loss,
        "test_accuracy": test.accuracy, "test_loss": test.loss,
        "flops": sum(trial.loop.meter.total for trial in trials), "steps": best.loop.step,
        "parameters": best.loop.garden.parameter_count(), "host_parameters": best.loop.host_parameters,
        "searched": [[*map(str, (block.blueprint for block in trial.blocks)), trial.loop.epoch] for trial in trials],
        "processor_seconds": time.process_time() - processor, "wall_seconds": time.perf_counter() - start,
    }  # fmt: skip


def _trial(home: Path, task: StudyTask, seed: int, name: str, draw: random.Random) -> Trial:
    loop = Loop(task.config(seed, "final"), runs.KERNELS, name=name, data=home / "data")
    blocks = _choice(loop, draw)
    for block in blocks:
        loop.garden.plant_fossil(block.slot, block.blueprint, block.parameters)
    batch = loop.config.run.batch_size
    with loop.meter.charge("probe", batch):
        loss = loop.task.loss(loop.model(loop.train.inputs[:batch]), loop.train.targets[:batch])
        torch.autograd.grad(loss, list(loop.model.parameters()))
    step = loop.meter.per_sample("probe") * batch
    look = step / batch / 3 * len(loop.validation)
    return Trial(name, blocks, loop, step * loop.steps_per_epoch + look)


def _choice(loop: Loop, draw: random.Random) -> tuple[Block, ...]:
    """For each slot one of the blocks that Karn offers there, or none."""
    chosen = []
    for slot in loop.task.slots:
        offered = inprocess.candidates(slot)
        if offered and draw.random() >= NONE_SHARE:
            chosen.append(Block(slot.index, blueprint_name(draw.choice(offered).blueprint), {}))
    return tuple(chosen)


def _affordable(trial: Trial, trials: Sequence[Trial], budget: float) -> bool:
    """Whether this one's next epoch leaves enough for the best of those that still run to reach its end."""
    spent = sum(each.loop.meter.total for each in trials)
    running = [each for each in trials if not each.over]
    best = min(running, key=lambda each: each.loss)
    reserved = 0.0 if trial is best else best.left * best.per_epoch
    return spent + trial.per_epoch + reserved <= budget


def _advance(trial: Trial) -> None:
    trial.loop.train_epoch()
    trial.quality = trial.loop.measure()
    trial.left -= 1
