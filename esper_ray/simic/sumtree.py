"""A sum tree over priorities: draws leaves in proportion to them, many at a time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_FANS = (32, 512)
"""Least and most children of a node. Wide nodes make few levels: up to a quarter of a million leaves there are two."""

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class SumTree:
    """``size`` leaves of priority 0 at first.

    Each node keeps its children's priorities and their running sums. Sums are recomputed from the children, so that no
    rounding error builds up.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self._fan = min(max(_FANS[0], math.isqrt(size - 1) + 1), _FANS[1])
        self._levels: list[tuple[Floats, Floats]] = []
        width = size
        while True:
            width = -(-width // self._fan)
            self._levels.append((np.zeros((width, self._fan)), np.zeros((width, self._fan))))
            if width == 1:
                break

    @property
    def total(self) -> float:
        return float(self._levels[-1][1][0, -1])

    def get(self, places: Places) -> Floats:
        found: Floats = self._levels[0][0].reshape(-1)[places]
        return found

    def set(self, places: Places, priorities: Floats | float) -> None:
        """Give the leaves at ``places`` new priorities, none below 0."""
        nodes, values = places, priorities
        for children, sums in self._levels:
            children.reshape(-1)[nodes] = values
            nodes = nodes // self._fan
            running = children[nodes].cumsum(axis=1)
            sums[nodes], values = running, running[:, -1]

    def find(self, points: Floats) -> tuple[Places, Floats]:
        """The leaves at which the running sum of priorities passes ``points``, each in [0, total); their priorities.

        A leaf of priority 0 is never found while the total is above 0.
        """
        children, sums = self._levels[-1][0][0], self._levels[-1][1][0]
        # Rounding can leave a point at or behind the sum of its node.
        points = np.minimum(points, np.nextafter(sums[-1], 0.0))
        nodes: Places = sums.searchsorted(points, side="right")
        found: Floats = children[nodes]
        points = points - (sums[nodes] - found)
        for level, running in reversed(self._levels[:-1]):
            below = running.take(nodes, axis=0)
            points = np.minimum(points, np.nextafter(below[:, -1], 0.0))
            nodes = nodes * self._fan + (below > points[:, None]).argmax(axis=1)
            found = level.take(nodes)
            points = points - (running.take(nodes) - found)
        return nodes, found
