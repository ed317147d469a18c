"""What a run costs in floating-point operations: measured once per kind of work, then counted.

A multiply-add is 2. Convolutions and matrix products count, as `torch.utils.flop_counter` sees them: forward,
backward, shadow passes, isolation checks and every measurement on the validation split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

LATER = 2


class CostMeter:
    """Adds up FLOPs. Work with the same ``key`` costs the same per sample, and is measured once.

    Counting slows the measured work down by half. So that this does not fall on the first step after a graft, work
    charged with ``later`` is measured the third time it is done, and charged for the first two then.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._per_sample: dict[Hashable, float] = {}
        self._saved: dict[str, float] = {}
        self._owed: dict[Hashable, list[int]] = {}

    @contextlib.contextmanager
    def charge(self, key: Hashable, samples: int, *, later: bool = False) -> Iterator[None]:
        """Charge the work inside for ``samples`` samples."""
        known = self._per_sample.get(key)
        if known is None and self._saved:
            known = self._saved.get(repr(key))
        if known is None and later and len(self._owed.setdefault(key, [])) < LATER:
            yield
            self._owed[key].append(samples)
            return
        if known is None:
            with FlopCounterMode(display=False) as counter:
                yield
            known = counter.get_total_flops() / samples
            self.total += known * sum(self._owed.pop(key, ()))
        else:
            yield
        self._per_sample[key] = known
        self.total += known * samples

    def settle(self) -> None:
        """Charge what was done too seldom to be measured, as the dearest work that is known."""
        dearest = max(self._per_sample.values(), default=0.0)
        self.total += dearest * sum(sum(samples) for samples in self._owed.values())
        self._owed.clear()

    def per_sample(self, key: Hashable) -> float:
        """What one sample of that work costs; 0 where it was never measured."""
        return self._per_sample.get(key, 0.0)

    def save(self) -> dict[str, Any]:
        return {"total": self.total, "per_sample": {repr(key): value for key, value in self._per_sample.items()}}

    def load(self, data: Mapping[str, Any]) -> None:
        self.total = float(data["total"])
        self._saved = dict(data["per_sample"])
