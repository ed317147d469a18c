"""How a branch joins its slot: four modes, with alpha on a ramp from 0 to 1.

``h`` is what the host's module gives, ``d`` what the branch makes of it. At alpha 0 each mode gives ``h``; at alpha 1
each gives what a fossil gives, so that nothing jumps on either side.

| mode | on the ramp | at alpha 1, and as a fossil |
|---|---|---|
| RESIDUAL | ``h + alpha * d`` | ``h + d`` |
| CHANNEL | ``h + a * d``, a vector ``a`` with one alpha per channel; the channels open one after another | ``h + d`` |
| CONFIDENCE | ``h + w * d``, one ``w`` per sample; where the model is unsure, it opens first | ``h + d`` |
| CONVEX | ``(1 - alpha) * h + alpha * d`` | ``d`` |

The first three never scale ``h``: the host path stays open at every alpha. CONVEX closes it by its nature: at alpha 1
the branch has taken the host's place, and while the seed is live nothing upstream of the slot learns through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from esper_ray.contracts.enums import BlendMode
from esper_ray.contracts.ports import SlotKind

_STEEPNESS = 10.0
# How far apart the first and the last channel start, as a share of one channel's ramp.
_SPREAD = 1.0
# At full margin a sample's weight is alpha to the power of 1 + this.
_RESERVE = 3.0

MODES: Mapping[str, BlendMode] = {mode.name.lower(): mode for mode in BlendMode if mode is not BlendMode.UNKNOWN}


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


def blend(
    mode: BlendMode, h: Tensor, delta: Tensor, alpha: float, *, kind: SlotKind, margin: Tensor | None = None
) -> Tensor:
    """What leaves the slot: as the table above, in the type of ``h``.

    Args:
        h, delta: [N, C, H, W], [N, T, C] or [N, C], as ``kind`` says.
        margin: of the model's own prediction, [N] or [N, T] in 0..1; CONFIDENCE needs it between alpha 0 and 1.
    """
    if alpha == 0.0:
        return h
    if mode is BlendMode.CONVEX:
        y = delta if alpha == 1.0 else (1.0 - alpha) * h + alpha * delta
    elif alpha == 1.0:
        y = h + delta
    elif mode is BlendMode.CHANNEL:
        y = h + channel_alphas(alpha, h, kind) * delta
    elif mode is BlendMode.CONFIDENCE:
        assert margin is not None, "the gauge runs before the model does"
        y = h + sample_weights(alpha, margin, h, kind) * delta
    else:
        y = h + alpha * delta
    # Under autocast the two may differ in type, and what follows the slot expects the host's.
    return y.to(h.dtype)


def channel_alphas(alpha: float, h: Tensor, kind: SlotKind) -> Tensor:
    """One alpha per channel, [C, 1, 1] for a map and [C] else: all 0 at alpha 0, all 1 at alpha 1, each linear between.

    The first channel is open when the last one begins.
    """
    axis = 1 if kind == "conv" else -1
    count = h.shape[axis]
    start = torch.linspace(0.0, _SPREAD, count, dtype=h.dtype, device=h.device) if count > 1 else h.new_zeros(1)
    alphas = ((1.0 + _SPREAD) * alpha - start).clamp(0.0, 1.0)
    return alphas[:, None, None] if kind == "conv" else alphas


def sample_weights(alpha: float, margin: Tensor, h: Tensor, kind: SlotKind) -> Tensor:
    """``alpha ** (1 + 3 * margin)``, shaped to scale ``h``: for each sample, and in a sequence for each position.

    A position's weight depends on the margin at that position alone, so that a causal model stays causal. Where the
    prediction has other positions than the slot, the sample's mean decides.
    """
    if margin.dim() == 2 and kind == "sequence" and margin.shape[1] == h.shape[1]:
        margin = margin[:, :, None]
    else:
        margin = margin.flatten(1).mean(1) if margin.dim() > 1 else margin
        margin = margin.reshape(-1, *[1] * (h.dim() - 1))
    return torch.pow(alpha, 1.0 + _RESERVE * margin).to(h.dtype)
