"""Isolation: the shadow pass in which a seed learns over a constant host.

The host's weights are detached, its buffers are copies, randomness is forked, and the gradient is asked for with
respect to the seeds' parameters alone: what isolation promises holds by construction, and `monitor` looks whether it
does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_ray.kasmina.randomness import Randomness
from esper_ray.kasmina.slot import Pass, Seed, Switch, constants
from esper_ray.kasmina.witness import Seen, resumed

LossFunction = Callable[[Tensor, Tensor], Tensor]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the processor for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def shadow_step(
    model: nn.Module,
    switch: Switch,
    seeds: Sequence[Seed],
    inputs: Tensor,
    targets: Tensor,
    loss_function: LossFunction,
    *,
    seed: int,
    seen: Seen | None = None,
    randomness: Randomness | None = None,
) -> Tensor:
    """Give ``seeds`` their gradients of a pass through a constant host with the isolated seeds in the path.

    With ``seen`` the pass goes on from the first isolated slot, and takes what comes before it from the model's own
    pass on this batch. It runs in the precision of the model's own pass.

    Args:
        seed: of what is drawn in the pass.

    Returns:
        The loss, a constant.

    Raises:
        Diverged: what was seen does not fit this pass, and no gradient was given.
    """
    own = _learning(seeds, model)
    whole = _Whole(model, loss_function, own, seen)
    weights = {f"model.{name}": tensor for name, tensor in constants(model).items()}
    upstream = resumed(seen.kept) if seen is not None and seen.kept else contextlib.nullcontext()
    switch.current = Pass.SHADOW
    try:
        with (randomness or Randomness(model)).forked(seed), upstream:
            # The backward pass belongs inside: with activation checkpointing it runs parts of the model again.
            loss, gradients = functional_call(whole, weights, (inputs, targets))
    finally:
        switch.current = Pass.MODEL
    for parameter, gradient in zip(own, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return cast(Tensor, loss)


def host_loss(
    model: nn.Module, switch: Switch, inputs: Tensor, targets: Tensor, loss_function: LossFunction,
    *, seed: int, randomness: Randomness,
) -> Tensor:  # fmt: skip
    """The loss of a pass as `shadow_step` makes it, with the same draws, but without the isolated seeds."""
    switch.current, switch.suspended = Pass.SHADOW, True
    try:
        with randomness.forked(seed), torch.no_grad():
            return loss_function(functional_call(model, constants(model), (inputs,)), targets)
    finally:
        switch.current, switch.suspended = Pass.MODEL, False


class _Whole(nn.Module):
    """A pass forward and back as one module, so that all of it runs on the constants that it is called with."""

    def __init__(self, model: nn.Module, loss_function: LossFunction, own: Sequence[Tensor], seen: Seen | None) -> None:
        super().__init__()
        self.model = model
        self._loss_function, self._own, self._seen = loss_function, own, seen

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        with self._seen.autocast.again() if self._seen is not None else contextlib.nullcontext():
            loss = self._loss_function(self.model(inputs), targets)
        if not self._own or not loss.requires_grad:  # a block without parameters has nothing to learn; G1 sees that
            return loss.detach(), [None] * len(self._own)
        return loss.detach(), torch.autograd.grad(loss, list(self._own), allow_unused=True)


def _learning(seeds: Sequence[Seed], model: nn.Module) -> list[Tensor]:
    """The parameters of ``seeds`` that learn in isolation; one that is the host's as well does not."""
    hosts = set(model.parameters())
    found = {
        parameter: None
        for seed in seeds
        if seed.branch is not None
        for parameter in seed.branch.parameters()
        if parameter.requires_grad and parameter not in hosts
    }
    return list(found)
