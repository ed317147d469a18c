"""How strongly an isolated seed speaks: its gain is cut back where the batches it has just learned from want less.

A seed learns from a host that moves on meanwhile, and its last steps may have gone too far. The direction is mostly
right then, and a part of it helps where all of it harms. Only training batches are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.slot import Pass
from esper_ray.tasks.data import Split
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.measure import evaluate

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Of a seed's gain; the first one is what it has learned."""
BATCHES = 8


def cut_back(garden: Garden, recent: Split, meter: CostMeter) -> dict[int, float]:
    """Scale the gain of each isolated seed by the share with the least loss on ``recent``; the shares by seed number.

    Blocks without a gain per channel (`karn.blueprints.layers.Branch`) are left as they are.
    """
    chosen = {}
    for seed in garden.in_stage(Stage.TRAINING):
        gain = getattr(seed.branch, "scale", None)
        if not isinstance(gain, Tensor):
            continue
        learned = gain.detach().clone()
        losses = {}
        for share in SHARES:
            _set(gain, share * learned)
            losses[share] = _shadow_loss(garden, recent, meter)
        # A loss that is no number is left for G1 to find.
        chosen[seed.number] = share = min(SHARES, key=lambda each: losses[each])
        _set(gain, share * learned)
    return chosen


def _set(gain: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        gain.copy_(value)


def _shadow_loss(garden: Garden, recent: Split, meter: CostMeter) -> float:
    garden.switch.current = Pass.SHADOW
    try:
        return evaluate(garden.model, recent, meter, ("isolated", garden.structure())).loss
    finally:
        garden.switch.current = Pass.MODEL
