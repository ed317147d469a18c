"""Blocks that treat every position alike: scaling, normalisation, pointwise maps. For slots of every kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import GELU, LINEAR, SWIGLU, Branch, Parameters, norm, pointwise


class Identity(nn.Module):
    """``delta(h) = 0``, whatever h holds."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__()
        del signature, parameters

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


class ChannelAffine(Branch):
    """``scale * h + shift``."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.shift = nn.Parameter(torch.empty_like(self.scale))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * h + self.shift


class NormalisedActivation(Branch):
    """``relu(norm(h))``."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.norm = norm(signature, shapes.channels(signature))

    def body(self, h: Tensor) -> Tensor:
        return F.relu(self.norm(h))


class PointwiseMLP(Branch):
    """norm, map to ``expansion * C``, GELU, map back."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["expansion"])
        self.norm = norm(signature, c)
        self.widen = pointwise(signature, c, inner, gain=LINEAR, bias=True)
        self.narrow = pointwise(signature, inner, c, gain=GELU)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.narrow(F.gelu(self.widen(self.norm(h))))
        return out


class LowRankAdapter(Branch):
    """A linear map of C channels through ``rank``. Both factors are drawn: a zero factor would starve the other."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        rank = shapes.rank(c, parameters["rank"])
        self.down = pointwise(signature, c, rank, gain=LINEAR)
        self.up = pointwise(signature, rank, c, gain=LINEAR)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(h))
        return out


class GatedMLP(Branch):
    """norm, value and gate of ``expansion * C`` each, ``value * silu(gate)``, map back (SwiGLU)."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["expansion"])
        self.channel_dim = 1 if signature.kind == "conv" else -1
        self.norm = norm(signature, c)
        self.widen = pointwise(signature, c, 2 * inner, gain=LINEAR, bias=True)
        self.narrow = pointwise(signature, inner, c, gain=SWIGLU)

    def body(self, h: Tensor) -> Tensor:
        value, gate = self.widen(self.norm(h)).chunk(2, dim=self.channel_dim)
        out: Tensor = self.narrow(value * F.silu(gate))
        return out
