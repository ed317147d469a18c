"""A newborn that begins along the gradient: GradMax (Evci et al. 2022, arXiv:2201.05125), for a block behind a slot.

GradMax leaves the function unchanged by zeroing one side of the new neurons, and sets the other so that the gradient of
the zeroed side is as large as it can be. Here the block's output joins the slot through its last map ``W``. The
gradient of ``W`` is that of the loss at the slot times the features before ``W``: its right singular vectors say which
features are worth having, its left ones which way the loss falls. ``W`` begins as minus the best part of that
gradient, of rank a quarter of the channels, at the size it was born with: alive, and moving the loss the right way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina.slot import Pass, Seed
from esper_ray.tolaria.loop import Loop

SHARE = 0.25


def start_along_the_gradient(loop: Loop, seed: Seed) -> None:
    """Set the last map of a newborn by one batch, which is charged as a shadow step; other weights stay."""
    assert seed.branch is not None
    maps = [part for part in seed.branch.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    weight = maps[-1].weight
    inputs, targets = loop._batch(loop.step)
    switch, stage = loop.garden.switch, seed.stage
    born = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    # In a shadow pass an isolated seed is in the path; this one is about to be.
    switch.current, seed.stage = Pass.SHADOW, Stage.TRAINING
    try:
        with loop.meter.charge(("gradmax", loop.garden.structure()), len(targets)):
            loss = loop.task.loss(loop.model(inputs), targets)
            (gradient,) = torch.autograd.grad(loss, [weight])
    finally:
        switch.current, seed.stage = Pass.MODEL, stage
    with torch.no_grad():
        best = _best_part(gradient.flatten(1))
        weight.copy_((-best * born.norm() / best.norm().clamp_min(1e-12)).view_as(born))


def _best_part(gradient: Tensor) -> Tensor:
    """The part of [outputs, inputs] that its largest singular values carry."""
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    rank = max(1, int(SHARE * len(values)))
    best: Tensor = left[:, :rank] * values[:rank] @ right[:rank]
    return best
