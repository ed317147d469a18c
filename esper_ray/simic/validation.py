"""What a policy must show before a person may promote it: a row of gates, each with the figures it rested on.

The last gate plays held-out tasks twice, with the policy and with whoever decides now, paired by task and seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper_ray.config import Config
from esper_ray.contracts.budgets import DECIDE_MS, MAX_COMMANDS_PER_BOUNDARY
from esper_ray.errors import PolicyRefused
from esper_ray.reliability.ids import derive_seed
from esper_ray.reliability.intervals import interval
from esper_ray.simic import comparison, registry
from esper_ray.simic.env import LAYOUT
from esper_ray.tamiyo import graph, policy_store
from esper_ray.tamiyo.actions import Choice, Masks
from esper_ray.tamiyo.graph import Layout, Observation
from esper_ray.tamiyo.policy import GraphPolicy
from esper_ray.tamiyo.seat import HEURISTIC, promotions

REST_MS = 3.5
"""What an answer takes besides the network's passes: the line, signatures, the observation, the journal. As
`benchmarks.decide` has it between its median and its p99."""
LATENCY_MS = DECIDE_MS.limit - REST_MS
STEPS = MAX_COMMANDS_PER_BOUNDARY
"""Micro-steps that one boundary may take: the last command ends it."""
OFFERED = 42
"""Blueprints that a full catalogue offers."""
_ANSWERS = 200


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate's verdict."""

    name: str
    passed: bool
    figures: dict[str, float]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What validating a policy found. ``digest`` ties it to the artifact as it was."""

    policy_id: str
    digest: str
    incumbent: str
    passed: bool
    gates: tuple[Gate, ...]
    figures: dict[str, float]
    episodes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def validate(
    config: Config,
    policy_id: str,
    *,
    count: int,
    margin: float,
    latency_ms: float = LATENCY_MS,
    on_gate: Callable[[Gate], None] = lambda _: None,
    on_episode: Callable[[int, int], None] = lambda _done, _of: None,
) -> Verdict:
    """Try the policy at each gate, stop at the first that it fails, and keep the verdict beside it.

    Args:
        count: paired episodes on held-out tasks.
        margin: how much less than the incumbent's its mean return may be, at the low end of the 95 % interval.
        latency_ms: what the longest boundary may take.

    Raises:
        PolicyRefused: there is no such policy.
    """
    row = registry.find(config.home, policy_id)
    gates: list[Gate] = []
    for gate in _gates(config, row.policy_id, count, margin, latency_ms, on_episode):
        gates.append(gate)
        on_gate(gate)
        if not gate.passed:
            break
    verdict = Verdict(
        policy_id=row.policy_id,
        digest=row.digest,
        incumbent=incumbent_of(config.home),
        passed=all(gate.passed for gate in gates),
        gates=tuple(gates),
        figures={name: value for gate in gates for name, value in gate.figures.items()},
        episodes=count,
    )
    registry.note_validation(config.home, row.policy_id, verdict.as_dict())
    return verdict


def incumbent_of(home: Path) -> str:
    """Who decides now: the promoted policy's id, or "heuristic"."""
    past = promotions(home)
    return past[-1].policy_id if past else HEURISTIC


def _gates(
    config: Config,
    policy_id: str,
    count: int,
    margin: float,
    latency_ms: float,
    on_episode: Callable[[int, int], None],
) -> Iterator[Gate]:
    try:
        policy, _ = policy_store.load(config.home, policy_id)
    except PolicyRefused as fault:
        yield Gate("loads", False, {}, str(fault))
        return
    yield Gate("loads", True, {"parameters": float(sum(p.numel() for p in policy.parameters()))})
    policy.eval()
    yield legal_gate("masks", policy, ordinary(seed=1, count=200))
    yield legal_gate("chaos", policy, chaos(seed=2, count=60))
    yield latency_gate(policy, latency_ms)
    yield paired_gate(config, policy_id, count, margin, on_episode)


def ordinary(seed: int, count: int, layout: Layout = LAYOUT) -> Iterator[Observation]:
    """Observations with features of order 1 and random masks, NO_OP always legal."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield _observation(random, layout, lambda shape: random.normal(0.0, 1.0, shape))


def chaos(seed: int, count: int) -> Iterator[Observation]:
    """Observations no run would send: all features at their least or greatest value, or all zero."""
    random = np.random.default_rng(seed)
    fills: Sequence[Callable[[tuple[int, ...]], Any]] = (
        lambda shape: np.full(shape, 50.0),
        lambda shape: np.full(shape, -50.0),
        lambda shape: random.choice([-50.0, 50.0], shape),
        np.zeros,
    )
    for number in range(count):
        yield _observation(random, LAYOUT, fills[number % len(fills)])


def _observation(random: np.random.Generator, layout: Layout, fill: Callable[[tuple[int, ...]], Any]) -> Observation:
    found: Observation = {}
    for name, (shape, kind, least, most) in graph.shapes(layout).items():
        if kind is np.float32:
            found[name] = np.clip(fill(shape), least, most).astype(np.float32)
        elif kind is np.int64:
            found[name] = random.integers(int(least), min(int(most), 50) + 1, shape)
    blueprint = random.integers(0, 2, (layout.slots, layout.blueprints)).astype(np.int8)
    slot = random.integers(0, 2, (4, layout.slots)).astype(np.int8)
    slot[0], slot[1] = 0, slot[1] & blueprint.any(axis=1)
    operation: npt.NDArray[np.int8] = np.asarray(slot.any(axis=1), np.int8)
    operation[0] = 1
    return {**found, "mask_blueprint": blueprint, "mask_slot": slot, "mask_operation": operation}


def legal_gate(name: str, policy: GraphPolicy, seen: Iterator[Observation]) -> Gate:
    """Whether all that it does, drawn and greedy, is legal, and all that it says is finite."""
    tried = 0
    for observation in seen:
        legal = Masks(observation["mask_operation"], observation["mask_slot"], observation["mask_blueprint"])
        tensors = {key: torch.from_numpy(array).unsqueeze(0) for key, array in observation.items()}
        for greedy in (False, True):
            generator = torch.Generator().manual_seed(derive_seed("validation", name, tried))
            with torch.inference_mode():
                acted = policy.act(tensors, generator=generator, greedy=greedy)
            choice = Choice(*(int(index) for index in acted.actions[0]))
            if not legal.allows(choice):
                return Gate(name, False, {f"{name}_tried": tried}, f"it chose {choice.indices}, which was not legal")
            if not bool(torch.isfinite(acted.values).all() and torch.isfinite(acted.log_probs).all()):
                return Gate(name, False, {f"{name}_tried": tried}, "a value or a probability is not finite")
            tried += 1
    return Gate(name, True, {f"{name}_tried": tried})


def latency_gate(policy: GraphPolicy, limit: float) -> Gate:
    """Whether the longest boundary fits into the budget: `STEPS` micro-steps, as Tamiyo makes them, over a graph of the
    demo's size with all blueprints that a full catalogue offers.

    The median of many, in time on the processor: a policy is judged while a training runs beside it, and what
    others do then is not its fault. So this stops a network that is too large. Whether answers come in time is measured
    in every run, and by `benchmarks.decide`.
    """
    observation = next(ordinary(seed=3, count=1, layout=replace(LAYOUT, blueprints=OFFERED)))
    generator, taken = torch.Generator().manual_seed(0), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_ANSWERS):
            start = time.thread_time()
            memo: dict[str, graph.Floats] = {}
            for _ in range(STEPS):
                policy.decide(observation, generator=generator, greedy=False, memo=memo)
            taken.append((time.thread_time() - start) * 1e3)
    finally:
        torch.set_num_threads(threads)
    median = float(np.median(taken))
    reason = "" if median <= limit else f"{median:.1f} ms for {STEPS} micro-steps are more than {limit:g}"
    return Gate("latency", median <= limit, {"latency_ms": median}, reason)


def paired_gate(
    config: Config, policy_id: str, count: int, margin: float, on_episode: Callable[[int, int], None]
) -> Gate:
    """Whether it is surely not worse than who decides now, by more than the margin, on tasks it never saw."""
    incumbent = comparison.brain_of(config.home, incumbent_of(config.home))
    policy = comparison.brain_of(config.home, policy_id)
    differences = []
    for number in range(count):
        ours, theirs = (comparison.play(config, brain, number).reward for brain in (policy, incumbent))
        differences.append(ours - theirs)
        on_episode(number + 1, count)
    found = interval(differences)
    reason = "" if found.low > -margin else f"against {incumbent.version}: {found}, the margin is {margin:g}"
    figures = {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
    return Gate("paired", found.low > -margin, figures, reason)
