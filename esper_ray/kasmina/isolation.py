"""Isolation: the shadow pass in which a seed learns, and the monitor that would notice if the host felt it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_ray.kasmina.slot import Pass, Switch, constants

LossFunction = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def forked_randomness(seed: int) -> Iterator[None]:
    """torch's CPU generator runs from ``seed`` inside and goes on outside as if nothing had been drawn."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def shadow_loss(
    model: nn.Module, switch: Switch, inputs: Tensor, targets: Tensor, loss_function: LossFunction, *, seed: int
) -> Tensor:
    """The loss of a pass through a constant host with the isolated seeds in the path.

    Weights are detached, buffers are copies and randomness is forked, so that nothing of the host can notice.
    Its gradient reaches isolated seeds alone.
    """
    switch.current = Pass.SHADOW
    try:
        with forked_randomness(seed):
            return loss_function(functional_call(model, constants(model), (inputs,)), targets)
    finally:
        switch.current = Pass.MODEL


@dataclass(frozen=True, slots=True)
class IsolationReading:
    """Host gradients with the seeds against without: 1 and 0 where isolation is exact."""

    cosine: float
    difference: float

    def clean(self, tolerance: float) -> bool:
        return math.isfinite(self.difference) and self.difference <= tolerance


def host_gradients(
    model: nn.Module, switch: Switch, inputs: Tensor, targets: Tensor, loss_function: LossFunction
) -> list[Tensor]:
    """The host's gradients on this batch with every isolated seed taken out of the path."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    switch.suspended = True
    try:
        loss = loss_function(model(inputs), targets)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        switch.suspended = False
        torch.set_rng_state(state)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def compare(expected: Iterable[Tensor], model: nn.Module) -> IsolationReading:
    """The gradients that the host has now against those it should have."""
    difference = product = norm_expected = norm_found = 0.0
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    for a, b in zip(expected, found, strict=True):
        difference += float((a - b).double().square().sum())
        product += float((a.double() * b.double()).sum())
        norm_expected += float(a.double().square().sum())
        norm_found += float(b.double().square().sum())
    scale = math.sqrt(norm_expected) or 1.0
    norms = math.sqrt(norm_expected * norm_found)
    return IsolationReading(product / norms if norms else 1.0, math.sqrt(difference) / scale)
