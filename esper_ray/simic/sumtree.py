"""A sum tree over priorities: draws leaves in proportion to them, many at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FAN = 32
"""Children of a node: with 32 a draw passes two or three levels, each a few numpy operations for the whole batch."""

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class SumTree:
    """``size`` leaves of priority 0 at first. Sums are recomputed from children, so no rounding error builds up."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self._levels: list[Floats] = []
        width = size
        while True:
            width = -(-width // _FAN)
            self._levels.append(np.zeros((width, _FAN)))
            if width == 1:
                break

    @property
    def total(self) -> float:
        return float(self._levels[-1].sum())

    def get(self, places: Places) -> Floats:
        found: Floats = self._levels[0].reshape(-1)[places]
        return found

    def set(self, places: Places, priorities: Floats | float) -> None:
        """Give the leaves at ``places`` new priorities, none below 0."""
        self._levels[0].reshape(-1)[places] = priorities
        nodes = places
        for below, level in zip(self._levels[:-1], self._levels[1:], strict=True):
            nodes = nodes // _FAN
            level.reshape(-1)[nodes] = below[nodes].sum(axis=1)

    def find(self, points: Floats) -> Places:
        """The leaves at which the running sum of priorities passes ``points``, each in [0, total).

        A leaf of priority 0 is never found while the total is above 0.
        """
        nodes: Places = np.zeros(len(points), np.int64)
        rows = np.arange(len(points))
        for level in reversed(self._levels):
            sums = level[nodes].cumsum(axis=1)
            # Rounding can leave a point at or behind the sum of its node.
            points = np.minimum(points, np.nextafter(sums[:, -1], 0.0))
            child = (sums <= points[:, None]).sum(axis=1)
            points = points - np.where(child > 0, sums[rows, child - 1], 0.0)
            nodes = nodes * _FAN + child
        return nodes
