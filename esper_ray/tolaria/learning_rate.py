"""The only writer of learning rates: a schedule for the host, a warm-up of its own for each seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from esper_ray.config import OptimizerConfig

SEED_START = 0.1


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
    """Writes every group's rate before each step, and undoes what somebody else wrote.

    Groups are told apart by their ``seed`` entry: 0 is the host. A seed's rate is the host's times
    ``seed_rate``, rising from a tenth of it over ``seed_warmup_steps`` from its birth on.
    """

    def __init__(self, config: OptimizerConfig, total_steps: int) -> None:
        self._config, self._total = config, max(1, total_steps)
        self.outside_writes = 0
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
        warmup = self._config.seed_warmup_steps
        age = step - self._births.get(seed, step)
        rising = 1.0 if age >= warmup else SEED_START + (1.0 - SEED_START) * age / warmup
        return self.host_rate(step) * self._config.seed_rate * rising

    def born(self, seed: int, step: int) -> None:
        """A seed's warm-up starts at ``step``."""
        self._births[seed] = step

    def gone(self, seed: int) -> None:
        self._births.pop(seed, None)
        self._written.pop(seed, None)

    def write(self, optimizer: Optimizer, step: int) -> None:
        """Set the rate of every group for ``step``."""
        for group in optimizer.param_groups:
            seed = int(group["seed"])
            before = self._written.get(seed)
            if before is not None and group["lr"] != before:
                self.outside_writes += 1
            rate = self.seed_rate(seed, step) if seed else self.host_rate(step)
            group["lr"] = self._written[seed] = rate

    def save(self) -> dict[str, Any]:
        births = {str(seed): step for seed, step in self._births.items()}
        return {"births": births, "outside": self.outside_writes, "factor": self.factor}

    def load(self, data: Mapping[str, Any]) -> None:
        self._births = {int(seed): int(step) for seed, step in data["births"].items()}
        self.outside_writes = int(data["outside"])
        self.factor = float(data.get("factor", 1.0))
        self._written = {}
