"""A sum tree over priorities: draws leaves in proportion to them, many at a time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class SumTree:
    """``size`` leaves of priority 0 at first, in nodes of about the root of that.

    A change is only noted. The next draw sums the changed nodes anew, and then all nodes, so that no rounding error
    builds up; a draw itself is one search. In numpy that is faster than to descend, up to millions of leaves.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        fan = math.isqrt(size - 1) + 1
        nodes = -(-size // fan)
        self._fan = fan
        self._priorities, self._running, self._bounds = (np.zeros((nodes, fan)) for _ in range(3))
        self._leaves, self._ends = self._priorities.reshape(-1), self._bounds.reshape(-1)
        self._changed = np.zeros(nodes, np.bool_)
        self._fresh, self._total = True, 0.0

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        self._refresh()
        return self._total

    def get(self, places: Places) -> Floats:
        return self._leaves.take(places)

    def set(self, places: Places, priorities: Floats | float) -> None:
        """Give the leaves at ``places`` new priorities, none below 0."""
        self._leaves[places] = priorities
        self._changed[places // self._fan] = True
        self._fresh = False

    def find(self, points: Floats) -> Places:
        """The leaves at which the running sum of priorities passes ``points``, each in [0, total].

        A point that was rounded to the total, or beyond it, finds the last leaf. A leaf of priority 0 is never found
        while the total is above 0.
        """
        self._refresh()
        return self._ends.searchsorted(points, side="right")

    def _refresh(self) -> None:
        if self._fresh:
            return
        nodes = np.flatnonzero(self._changed)
        self._running[nodes] = self._priorities[nodes].cumsum(axis=1)
        before = self._running[:, -1].cumsum()
        self._bounds[0] = self._running[0]
        # The last bound of a node and the sum before the next one are the same number: bounds never descend.
        np.add(self._running[1:], before[:-1, None], out=self._bounds[1:])
        self._total = self._ends.item(-1)
        # The last leaf that has a priority takes in every point that rounding put at the total or beyond it.
        self._ends[self._ends.searchsorted(self._total) :] = np.inf
        self._changed[nodes] = False
        self._fresh = True
