"""Confidence intervals of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f}, n={self.count})"


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean; without bounds for a single value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf, count)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)
