"""What a run costs in floating-point operations: measured once per kind of work, then counted.

A multiply-add is 2. Convolutions and matrix products count, as `torch.utils.flop_counter` sees them: forward,
backward, shadow passes, isolation checks and every measurement on the validation split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LATER = 2


def forward_flops(model: nn.Module, sample: Tensor) -> float:
    """FLOPs of a forward pass of one sample; ``sample`` is a batch [N, ...]. No randomness and no buffer is touched."""
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample)
    model.train(training)
    return float(counter.get_total_flops()) / len(sample)


class CostMeter:
    """Adds up FLOPs. Work with the same ``key`` costs the same per sample, and is measured once.

    Counting slows the measured work down by half. So that this does not fall on the first step after a graft, work
    charged with ``later`` is measured the third time it is done, and charged for the first two then.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._per_sample: dict[str, float] = {}
        self._owed: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def charge(self, key: Hashable, samples: int, *, later: bool = False) -> Iterator[None]:
        """Charge the work inside for ``samples`` samples."""
        name = repr(key)
        known = self._per_sample.get(name)
        if known is None and later and len(self._owed.setdefault(name, [])) < LATER:
            yield
            self._owed[name].append(samples)
            return
        if known is None:
            with FlopCounterMode(display=False) as counter:
                yield
            known = self._per_sample[name] = counter.get_total_flops() / samples
            self.total += known * sum(self._owed.pop(name, ()))
        else:
            yield
        self.total += known * samples

    def settle(self) -> None:
        """At a run's end: charge what was done too seldom to be measured, as the dearest work that is known."""
        dearest = max(self._per_sample.values(), default=0.0)
        self.total += dearest * sum(sum(samples) for samples in self._owed.values())
        self._owed.clear()

    def per_sample(self, key: Hashable) -> float:
        """What one sample of that work costs; 0 where it was never measured."""
        return self._per_sample.get(repr(key), 0.0)

    def save(self) -> dict[str, Any]:
        owed = {name: list(samples) for name, samples in self._owed.items()}
        return {"total": self.total, "per_sample": dict(self._per_sample), "owed": owed}

    def load(self, data: Mapping[str, Any]) -> None:
        self.total = float(data["total"])
        self._per_sample, self._owed = dict(data["per_sample"]), dict(data["owed"])
