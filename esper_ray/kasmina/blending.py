"""How a branch joins its slot: ``y = h + alpha * delta(h)``, with alpha on a ramp from 0 to 1.

The host path ``h`` is never scaled, so it stays open at every alpha. While a seed is live and not a fossil, the
branch reads ``h`` as a constant: the host's gradient comes through the host path alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

_STEEPNESS = 10.0


def _sigmoid(progress: float) -> float:
    """A logistic ramp, stretched so that it is exactly 0 at 0 and 1 at 1."""
    low = 1.0 / (1.0 + math.exp(_STEEPNESS / 2))
    value = 1.0 / (1.0 + math.exp(-_STEEPNESS * (progress - 0.5)))
    return (value - low) / (1.0 - 2.0 * low)


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
    "sigmoid": _sigmoid,
}


def alpha_at(schedule: str, progress: float) -> float:
    """Alpha in 0..1 at ``progress`` through the ramp; values outside 0..1 are held at the ends."""
    if not 0.0 < progress < 1.0:
        return float(progress >= 1.0)
    return SCHEDULES[schedule](progress)


def residual(h: Tensor, branch: nn.Module, alpha: float, *, detach: bool) -> Tensor:
    """``h + alpha * branch(h)``; with ``detach`` the branch sees ``h`` as a constant."""
    delta: Tensor = branch(h.detach() if detach else h)
    return h + delta if alpha == 1.0 else h + alpha * delta
