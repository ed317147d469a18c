"""Blocks that do one bad thing each, for drills: they prove that a gate or guard catches it. Never grown in a run.

Each is an honest pointwise map otherwise, with an activation of its own, so that only its one fault can stop it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import LINEAR, Branch, Parameters, norm, pointwise

FUSE_CALLS = 40
LEAK_BYTES = 2**30


class Faulty(Branch):
    """``map(activation(norm(h)))``: what each of them would be without its fault."""

    activation: Callable[[Tensor], Tensor] = staticmethod(torch.relu)

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.norm = norm(signature, c)
        self.map = pointwise(signature, c, c, gain=LINEAR)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.map(self.activation(self.norm(h)))
        return out


class Exploding(Faulty):
    """A million times too large."""

    def body(self, h: Tensor) -> Tensor:
        return 1e6 * super().body(h)


class Vanishing(Faulty):
    """So small that hardly any gradient is left."""

    activation = staticmethod(torch.tanh)

    def body(self, h: Tensor) -> Tensor:
        return 1e-15 * super().body(h)


class Severed(Faulty):
    """Cut off from its gradient: it computes, and cannot learn."""

    activation = staticmethod(torch.sin)

    def body(self, h: Tensor) -> Tensor:
        return super().body(h).detach()


class TimeBomb(Faulty):
    """Clean until it has been called some forty times; from then on not a number."""

    activation = staticmethod(F.silu)

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.calls = 0

    def body(self, h: Tensor) -> Tensor:
        self.calls += 1
        out = super().body(h)
        return out if self.calls <= FUSE_CALLS else out * float("nan")


class Hanging(Faulty):
    """Never returns."""

    activation = staticmethod(torch.sigmoid)

    def body(self, h: Tensor) -> Tensor:  # noqa: ARG002
        while True:
            time.sleep(0)


class Leaking(Faulty):
    """Keeps one GiB of address space more with each call."""

    activation = staticmethod(F.softplus)

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.kept: list[Tensor] = []

    def body(self, h: Tensor) -> Tensor:
        self.kept.append(torch.empty(LEAK_BYTES, dtype=torch.uint8))
        return super().body(h)


class Intruding(Faulty):
    """Writes into its own input, behind the back of autograd: the host computes with what the block left there."""

    activation = staticmethod(F.gelu)

    def body(self, h: Tensor) -> Tensor:
        h.data.mul_(1.5)
        return super().body(h)


class Overbearing(Faulty):
    """Turns the slot's output into its opposite, plus what it learns."""

    activation = staticmethod(F.elu)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) - 2.0 * h
