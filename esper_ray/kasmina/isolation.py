"""Isolation: the shadow pass in which a seed learns over a constant host.

The host's weights are detached, its buffers are copies, randomness is forked, and the gradient is asked for with
respect to the seeds' parameters alone: what isolation promises holds by construction, and `monitor` looks whether it
does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_ray.kasmina.randomness import Randomness
from esper_ray.kasmina.slot import Pass, Seed, Switch, constants
from esper_ray.kasmina.witness import Diverged, Seen, resumed

LossFunction = Callable[[Tensor, Tensor], Tensor]


def shadow_loss(
    model: nn.Module,
    switch: Switch,
    inputs: Tensor,
    targets: Tensor,
    loss_function: LossFunction,
    *,
    seed: int,
    seen: Seen | None = None,
    randomness: Randomness | None = None,
) -> Tensor:
    """The loss of a pass through a constant host with the isolated seeds in the path.

    With ``seen`` the pass goes on from the first isolated slot, and takes what comes before it from the model's own
    pass on this batch; where it cannot, and without ``seen``, it is a whole pass. It runs in the precision of the
    model's own pass.
    """

    generators = randomness or Randomness(model)

    def run() -> Tensor:
        with generators.forked(seed), seen.autocast.again() if seen else contextlib.nullcontext():
            return loss_function(functional_call(model, constants(model), (inputs,)), targets)

    switch.current = Pass.SHADOW
    try:
        if seen is not None and seen.kept:
            with contextlib.suppress(Diverged), resumed(seen.kept):
                return run()
        return run()
    finally:
        switch.current = Pass.MODEL


def give_gradients(loss: Tensor, seeds: Sequence[Seed], model: nn.Module) -> None:
    """Add the gradient of ``loss`` to the seeds' parameters; one that is shared with the host gets none."""
    hosts = set(model.parameters())
    own = {
        parameter: None
        for seed in seeds
        if seed.branch is not None
        for parameter in seed.branch.parameters()
        if parameter.requires_grad and parameter not in hosts
    }
    if not own or not loss.requires_grad:  # a block without parameters has nothing to learn; G1 will see that
        return
    for parameter, gradient in zip(own, torch.autograd.grad(loss, list(own), allow_unused=True), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
