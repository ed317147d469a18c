"""The only writer of learning rates: a schedule for the host, and a policy for the seeds.

| ``seeds.rate_policy`` | a seed's rate |
|---|---|
| ``warmup`` | the host's times ``seed_rate``, rising from a tenth of it after birth |
| ``host`` | the host's times ``seed_rate`` from the first step on |
| ``adaptive`` | as ``warmup``, times the ratio of weights to update that LAMB uses, until the seed is a fossil |
| ``frozen`` | as ``warmup`` in isolation, then 0 until the seed is a fossil |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from esper_ray.config import OptimizerConfig, RatePolicy
from esper_ray.kasmina.lifecycle import LIVE
from esper_ray.kasmina.slot import Seed

SEED_START = 0.1
# Bounds of LAMB's ratio: a seed may be slowed down ten times, and never learns faster than the host.
SLOWEST, FASTEST = 0.1, 1.0


def _wsd(progress: float, decay: float) -> float:
    """Constant, then linear to zero over the last ``decay`` of the run (warm-up-stable-decay)."""
    return 1.0 if progress < 1.0 - decay else (1.0 - progress) / max(decay, 1e-9)


# Shape after the warm-up: (progress in 0..1, decay share) -> factor of the peak rate.
SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "wsd": _wsd,
    "cosine": lambda progress, _: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress, _: 1.0 - progress,
    "constant": lambda _progress, _decay: 1.0,
}


class LearningRates:
    """Writes every group's rate before each step, so that what somebody else wrote is undone before it has an effect.

    Groups are told apart by their ``seed`` entry: 0 is the host. What was found and undone is in `drain_events`.
    """

    def __init__(self, config: OptimizerConfig, total_steps: int, policy: RatePolicy = "warmup") -> None:
        self._config, self._total, self._policy = config, max(1, total_steps), policy
        self.outside_writes = 0
        self._outside: dict[int, dict[str, Any]] = {}
        # Below 1 while the run is conservative after damage.
        self.factor = 1.0
        self._births: dict[int, int] = {}
        self._written: dict[int, float] = {}

    def host_rate(self, step: int) -> float:
        """The host's rate at ``step``, counted from 0."""
        progress = min(1.0, step / self._total)
        warmup = self._config.warmup * self._total
        rising = min(1.0, (step + 1) / warmup) if warmup >= 1.0 else 1.0
        shape = SCHEDULES[self._config.schedule](progress, self._config.decay)
        return self._config.learning_rate * min(rising, shape) * self.factor

    def seed_rate(self, seed: int, step: int) -> float:
        """A seed's rate at ``step``, before what `adaptive` and `frozen` make of it."""
        warmup = 0 if self._policy == "host" else self._config.seed_warmup_steps
        age = step - self._births.get(seed, step)
        rising = 1.0 if age >= warmup else SEED_START + (1.0 - SEED_START) * age / warmup
        return self.host_rate(step) * self._config.seed_rate * rising

    def born(self, seed: int, step: int) -> None:
        """A seed's warm-up starts at ``step``."""
        self._births[seed] = step

    def gone(self, seed: int) -> None:
        self._births.pop(seed, None)
        self._written.pop(seed, None)

    def write(self, optimizer: Optimizer, step: int, seeds: Mapping[int, Seed] | None = None) -> None:
        """Set the rate of every group for ``step``; ``seeds`` are those that are no fossils, by number."""
        for group in optimizer.param_groups:
            number = int(group["seed"])
            before = self._written.get(number)
            if before is not None and group["lr"] != before:
                self._undo(number, float(group["lr"]), before, step)
            rate = self.seed_rate(number, step) if number else self.host_rate(step)
            seed = (seeds or {}).get(number)
            if seed is not None and self._policy == "adaptive":
                rate *= trust_ratio(optimizer, group)
            elif seed is not None and self._policy == "frozen" and seed.stage in LIVE:
                rate = 0.0
            group["lr"] = self._written[number] = rate

    def current(self, seed: int, step: int) -> float:
        """What the seed's group was last trained with; before its first step, what it would be at ``step``."""
        return self._written.get(seed, self.seed_rate(seed, step))

    def _undo(self, seed: int, found: float, expected: float, step: int) -> None:
        self.outside_writes += 1
        known = self._outside.setdefault(seed, {"seed": seed, "step": step, "found": found, "expected": expected})
        known["times"] = known.get("times", 0) + 1

    def drain_events(self) -> list[dict[str, Any]]:
        """Rates that somebody else wrote since the last call: the first one of each group, and how often."""
        found, self._outside = [{"kind": "rate", **row} for row in self._outside.values()], {}
        return found

    def save(self) -> dict[str, Any]:
        births = {str(seed): step for seed, step in self._births.items()}
        return {"births": births, "outside": self.outside_writes, "factor": self.factor}

    def load(self, data: Mapping[str, Any]) -> None:
        self._births = {int(seed): int(step) for seed, step in data["births"].items()}
        self.outside_writes = int(data["outside"])
        self.factor = float(data.get("factor", 1.0))
        self._written = {}


def trust_ratio(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Norm of the group's weights over that of Adam's last update, within bounds; 1 before the first update.

    LAMB: You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", algorithm 2, with
    one ratio for the whole group and without the weight decay in the update.
    """
    weights = updates = 0.0
    epsilon, (beta1, beta2) = group["eps"], group["betas"]
    for parameter in group["params"]:
        state = optimizer.state.get(parameter)
        if not state:
            continue
        step = float(state["step"])
        mean = state["exp_avg"] / (1.0 - beta1**step)
        deviation = (state["exp_avg_sq"] / (1.0 - beta2**step)).sqrt() + epsilon
        updates += float((mean / deviation).square().sum())
        weights += float(parameter.detach().square().sum())
    if weights == 0.0 or updates == 0.0:
        return FASTEST
    return min(FASTEST, max(SLOWEST, math.sqrt(weights / updates)))
