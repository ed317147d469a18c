"""What a run costs in floating-point operations: measured once per kind of work, then counted.

A multiply-add is 2. Convolutions and matrix products count, as `torch.utils.flop_counter` sees them: forward,
backward, shadow passes, isolation checks and every measurement on the validation split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class CostMeter:
    """Adds up FLOPs. Work with the same ``key`` costs the same per sample; the first of its kind is measured."""

    def __init__(self) -> None:
        self.total = 0.0
        self._per_sample: dict[Hashable, float] = {}

    @contextlib.contextmanager
    def charge(self, key: Hashable, samples: int) -> Iterator[None]:
        """Charge the work inside for ``samples`` samples."""
        known = self._per_sample.get(key)
        if known is None:
            with FlopCounterMode(display=False) as counter:
                yield
            known = self._per_sample[key] = counter.get_total_flops() / samples
        else:
            yield
        self.total += known * samples

    def per_sample(self, key: Hashable) -> float:
        """What one sample of that work costs; 0 where it was never done."""
        return self._per_sample.get(key, 0.0)

    def save(self) -> dict[str, Any]:
        return {"total": self.total}

    def load(self, data: dict[str, Any]) -> None:
        self.total = float(data["total"])
