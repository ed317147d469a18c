"""A sum tree over priorities: draws leaves in proportion to them, many at a time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_FANS = (32, 512)
"""Least and most children of a node. Wide nodes make few levels: up to a quarter of a million leaves there are two."""

_INSIDE = 1.0 - 1e-9
"""Keeps a share of a node inside the node when it is rounded."""

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class SumTree:
    """``size`` leaves of priority 0 at first.

    Each node keeps its children's priorities and their *bounds*: n for node number n of its level, then n plus the
    running sums of its children as shares of its own sum. So the bounds of a level ascend over all its nodes, and one
    search finds the children of many points in many nodes. Both come anew from the children at each change, so that
    no rounding error builds up.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self._fan = min(max(_FANS[0], math.isqrt(size - 1) + 1), _FANS[1])
        self._levels: list[tuple[Floats, Floats]] = []
        self._total = 0.0
        width = size
        while True:
            width = -(-width // self._fan)
            bounds = np.arange(width, dtype=np.float64)[:, None].repeat(self._fan + 1, axis=1)
            self._levels.append((np.zeros((width, self._fan)), bounds))
            if width == 1:
                break

    @property
    def total(self) -> float:
        return self._total

    def get(self, places: Places) -> Floats:
        found: Floats = self._levels[0][0].reshape(-1)[places]
        return found

    def set(self, places: Places, priorities: Floats | float) -> None:
        """Give the leaves at ``places`` new priorities, none below 0."""
        nodes, values = places, priorities
        for children, bounds in self._levels:
            children.reshape(-1)[nodes] = values
            nodes = nodes // self._fan
            running = children[nodes].cumsum(axis=1)
            values = running[:, -1]
            bounds[nodes, 1:] = running / np.where(values > 0.0, values, 1.0)[:, None] + nodes[:, None]
        self._total = float(self._levels[-1][0].sum())

    def find(self, shares: Floats) -> Places:
        """The leaves at which the running sum of priorities passes ``shares`` of the total, each in [0, 1).

        A leaf of priority 0 is never found while the total is above 0.
        """
        *inner, (_, ends) = reversed(self._levels)
        nodes: Places | int = 0
        sought = shares * _INSIDE
        for _, bounds in inner:
            above = bounds.reshape(-1).searchsorted(sought, side="right")
            below = above - 1
            least = bounds.take(below)
            sought -= least
            sought /= bounds.take(above) - least
            sought *= _INSIDE
            nodes = below - nodes
            sought += nodes
        found: Places = ends.reshape(-1).searchsorted(sought, side="right")
        found -= 1
        found -= nodes
        return found
