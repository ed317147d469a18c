"""What a graft costs, and what the machinery costs while nothing grows. In one process, on the demo's own model.

- ``graft_*``: the swap of a ready kernel into its slot: the hook and the optimizer's group (1,000 grafts).
- ``journal_p99_ms``: making the graft's step durable, beside it.
- ``graft_stall_ms``: all the time that training stands still for a graft: build, check, journal, swap (median).
- ``first_step_ratio``: the first step after a graft to the median of those that follow it in the same state.
- ``machinery_overhead_percent``: our step without a live seed against a plain PyTorch loop, interleaved.
- ``dormant_overhead_percent``: forward and backward of a model with dormant slots against one without, interleaved.
- ``shadow_percent``: a shadow pass from the slot in percent of the host's own step, interleaved; mean of the slots.
  ``shadow_whole_percent``: as a whole pass. ``shadow_plain_percent``: as a second ordinary pass, gradients of the host
  and all, which isolation rules out. ``shadow_SLOT_...``: for each slot. ``..._flops_percent``: counted, not timed.
- ``watched_percent``: a watched isolated step's extra work in percent of the host's own step, the shadow pass included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import Bar, percentile
from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.kasmina.slot import Pass
from esper_ray.tasks import build_task
from esper_ray.tolaria.groups import Groups
from esper_ray.tolaria.learning_rate import LearningRates
from esper_ray.tolaria.trainer import RunRequest, Trainer

BARS = (
    Bar("graft_p99_ms", 0.5),
    Bar("first_step_ratio", 1.5),
    Bar("graft_stall_ms", 50.0),
    Bar("dormant_overhead_percent", 0.5),
    Bar("machinery_overhead_percent", 2.0),
)


def make_trainer(home: str, run: str = "graft") -> Trainer:
    """A trainer ready to step, on the demo's model and data."""
    settings = [f"home={home}", "run.mode=lockstep", "run.train_samples=4000", "seeds.shadow_share=1.0"]
    config = configuration.load(None, settings)
    trainer = Trainer(RunRequest(run, config), inprocess.surroundings(config))
    trainer.groups = Groups(trainer.model, config.optimizer)
    trainer.total_steps, trainer.epochs = 100_000, 1
    trainer.rates = LearningRates(config.optimizer, trainer.total_steps)
    return trainer


def command(operation: SeedOperation, slot: int) -> AdaptationCommand:
    directive = SeedDirective(operation, blueprint=9)
    return AdaptationCommand(1, CommandType.SEED, "graft", 1, 0, "benchmark", slot=slot, seed_directive=directive)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def uproot(trainer: Trainer, slot: int) -> None:
    """Cull the seed and put the slot to sleep without its embargo."""
    trainer.garden.apply(command(SeedOperation.CULL, slot))
    trainer.garden.slots[slot].stage = Stage.DORMANT


def grafts(trainer: Trainer, count: int) -> dict[str, Any]:
    """Many grafts into the three slots in turn, without training between them."""
    stalls, journal = [], []
    record = trainer.recorder.record_graft
    trainer.recorder.record_graft = lambda *what: journal.append(timed(lambda: record(*what)))  # type: ignore[method-assign]
    swaps = []
    for number in range(count + 3):
        slot = number % 3
        trainer.garden.apply(command(SeedOperation.GERMINATE, slot))
        stall = timed(lambda: trainer.garden.before_step(trainer.step))
        uproot(trainer, slot)
        found = [event["ms"] for event in trainer.garden.drain_events() if event["kind"] == "graft"]
        if number >= 3:  # the first of each slot builds and checks its kernel as the forge would
            stalls.append(stall)
            swaps += found
    trainer.recorder.record_graft = record  # type: ignore[method-assign]
    return {
        "grafts": len(swaps),
        "graft_p50_ms": percentile(swaps, 50),
        "graft_p99_ms": percentile(swaps, 99),
        "journal_p99_ms": percentile(journal, 99),
        "graft_stall_ms": percentile(stalls, 50),
        "graft_stall_p99_ms": percentile(stalls, 99),
    }


def first_steps(trainer: Trainer, rounds: int) -> float:
    """The first step after a graft (the graft itself included) to the median of the next ones in the same state."""
    ratios = []
    for number in range(rounds + 3):
        slot = number % 3
        trainer.garden.apply(command(SeedOperation.GERMINATE, slot))
        first = timed(trainer.train_step)
        after = [timed(trainer.train_step) for _ in range(9)]
        uproot(trainer, slot)
        if number >= 3:
            ratios.append(first / statistics.median(after))
    return statistics.median(ratios)


def overhead(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> float:
    """Percent by which ours is slower: the median of the ratios of neighbours, in alternating order."""
    ratios = []
    for number in range(rounds):
        if number % 2:
            a, b = timed(ours), timed(plain)
        else:
            b, a = timed(plain), timed(ours)
        ratios.append(a / b)
    return 100 * (statistics.median(ratios[rounds // 10 :]) - 1)


def plain_step(trainer: Trainer) -> Callable[[], object]:
    """The same model, data, optimizer and clipping in the shortest loop that does the same work."""
    run = trainer.config.run
    task = build_task(run, trainer.config.home / "data", trainer.device)
    model, data = task.model, task.data.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    order, total, number = torch.randperm(len(data)), torch.zeros(()), 0

    def step() -> None:
        nonlocal number
        place = number % (len(data) // run.batch_size)
        chosen = order[place * run.batch_size : (place + 1) * run.batch_size]
        loss = cross_entropy(model(data.inputs[chosen]), data.targets[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total.add_(loss.detach())
        number += 1

    return step


def dormant(trainer: Trainer, rounds: int) -> float:
    """Forward and backward alone, with slots attached and without."""
    task = build_task(trainer.config.run, trainer.config.home / "data", trainer.device)
    inputs, targets = trainer.train.inputs[:64], trainer.train.targets[:64]

    def pass_of(model: torch.nn.Module) -> Callable[[], object]:
        return lambda: cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]

    return overhead(pass_of(trainer.model), pass_of(task.model), rounds)


WAYS = ("plain", "whole", "from the slot", "watched")


def shadows(trainer: Trainer, rounds: int) -> dict[str, float]:
    """What the extra work of an isolated step takes, by the way it is done, on a seed in each slot in turn."""
    figures: dict[str, list[float]] = {}
    for slot in range(3):
        trainer.garden.apply(command(SeedOperation.GERMINATE, slot))
        for _ in range(2):  # the first pass finds out what lies before the slot
            trainer.train_step()
        seed = trainer.garden.seeds[0]
        known = dict(seed.evidence["upstream"]["modules"])
        times: dict[str, list[float]] = {way: [] for way in ("own", *WAYS)}
        for number in range(rounds * len(WAYS)):
            way = WAYS[number % len(WAYS)]
            seed.evidence["upstream"]["modules"] = dict(known) if way in ("from the slot", "watched") else {}
            seed.violations = int(way == "watched")  # after a violation each isolated step is watched
            own, extra = isolated_step(trainer, way)
            times["own"].append(own)
            times[way].append(extra)
        flops = {way: counted(trainer, way, known) for way in ("own", *WAYS[:-1])}
        seed.violations = 0
        uproot(trainer, slot)
        step = statistics.median(times["own"])
        for way, key in (("from the slot", ""), ("whole", "whole_"), ("plain", "plain_")):
            figures.setdefault(f"shadow_{key}percent", []).append(100 * statistics.median(times[way]) / step)
            figures.setdefault(f"shadow_{key}flops_percent", []).append(100 * flops[way] / flops["own"])
        figures.setdefault("watched_percent", []).append(100 * statistics.median(times["watched"]) / step)
    by_slot = {
        key.replace("shadow_", f"shadow_slot{slot}_"): values[slot]
        for key, values in figures.items()
        for slot in range(3)
        if key.startswith("shadow_")
    }
    return {key: statistics.mean(values) for key, values in figures.items()} | by_slot


def isolated_step(trainer: Trainer, way: str) -> tuple[float, float]:
    """One step; milliseconds of the host's own work and of the seed's."""
    garden, groups, step = trainer.garden, trainer.groups, trainer.step
    garden.before_step(step)
    inputs, targets = trainer._batch(step)
    start = time.perf_counter()
    loss = trainer.task.loss(trainer.model(inputs), targets)
    loss.backward()
    own = time.perf_counter() - start
    extra = timed(lambda: shadow(trainer, way, inputs, targets, loss))
    start = time.perf_counter()
    groups.clip()
    trainer.rates.write(groups.optimizer, step, groups.seeds)
    groups.optimizer.step()
    groups.optimizer.zero_grad(set_to_none=True)
    trainer.step += 1
    return (own + time.perf_counter() - start) * 1e3, extra


def shadow(trainer: Trainer, way: str, inputs: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> None:
    if way != "plain":
        trainer.garden.train_isolated(trainer.step, inputs, targets, trainer.task.loss, loss, watch=way == "watched")
        return
    kept = [(parameter, parameter.grad) for parameter in trainer.model.parameters()]
    trainer.garden.switch.current = Pass.SHADOW
    trainer.task.loss(trainer.model(inputs), targets).backward()
    trainer.garden.switch.current = Pass.MODEL
    for parameter, gradient in kept:
        parameter.grad = gradient


def counted(trainer: Trainer, way: str, known: dict[str, bool]) -> float:
    """FLOPs of the seed's extra work on one batch; of the host's own pass for "own"."""
    garden = trainer.garden
    seed = garden.seeds[0]
    seed.violations, seed.evidence["upstream"]["modules"] = 0, dict(known) if way == "from the slot" else {}
    garden.before_step(trainer.step)
    inputs, targets = trainer._batch(trainer.step)
    with FlopCounterMode(display=False) as counter:
        loss = trainer.task.loss(trainer.model(inputs), targets)
        loss.backward()
    if way != "own":
        with FlopCounterMode(display=False) as counter:
            shadow(trainer, way, inputs, targets, loss)
    trainer.groups.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def measure(*, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rounds = 200 if quick else 600
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        trainer = make_trainer(home)
        figures = {"machinery_overhead_percent": overhead(trainer.train_step, plain_step(trainer), rounds)}
        figures["dormant_overhead_percent"] = dormant(trainer, rounds)
        figures["first_step_ratio"] = first_steps(trainer, 12 if quick else 60)
        figures |= shadows(trainer, 20 if quick else 100)
        figures |= grafts(trainer, 1000)
        trainer.recorder.close()
    return figures


def main() -> None:
    given = common.parser(__doc__).parse_args()
    common.run("graft", BARS, lambda: measure(quick=given.quick), given.json)


if __name__ == "__main__":
    main()
