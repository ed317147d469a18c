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


class Memory(Branch):
    """Attention to learned key and value vectors in the place of other positions: ``values(softmax(keys(norm(h))))``.

    Keys are born three times as long as usual: at unit scale the attention would hardly differ between positions.
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c, places = shapes.channels(signature), round(parameters["places"])
        self.channel_dim = 1 if signature.kind == "conv" else -1
        self.norm = norm(signature, c)
        self.keys = pointwise(signature, c, places, gain=3.0 * LINEAR)
        self.values = pointwise(signature, places, c, gain=LINEAR)
        self.settle = norm(signature, c)

    def body(self, h: Tensor) -> Tensor:
        attention = self.keys(self.norm(h)).softmax(dim=self.channel_dim)
        out: Tensor = self.settle(self.values(attention))
        return out


class Mixture(Branch):
    """Several small MLPs; a softmax over them at each position says how much each contributes."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.experts, self.inner = round(parameters["experts"]), shapes.hidden(c, parameters["expansion"])
        self.channel_dim = 1 if signature.kind == "conv" else -1
        self.norm = norm(signature, c)
        self.route = pointwise(signature, c, self.experts, gain=LINEAR)
        self.widen = pointwise(signature, c, self.experts * self.inner, gain=LINEAR, bias=True)
        self.narrow = pointwise(signature, self.experts * self.inner, c, gain=0.85 * GELU)

    def body(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        shares = self.route(x).softmax(dim=self.channel_dim) * self.experts
        weights = shares.repeat_interleave(self.inner, dim=self.channel_dim)
        out: Tensor = self.narrow(F.gelu(self.widen(x)) * weights)
        return out


class ConditionalLowRank(Branch):
    """A linear map of low rank whose middle is scaled by the sample itself: a different matrix for each input.

    The scales come from the mean over a map, or from the position's own features in sequences and vectors.
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        rank = shapes.rank(c, parameters["rank"])
        self.on_map = signature.kind == "conv"
        self.norm = norm(signature, c)
        self.down = pointwise(signature, c, rank, gain=LINEAR)
        self.scales = pointwise(signature, c, rank, gain=LINEAR, bias=True)
        self.up = pointwise(signature, rank, c, gain=0.75 * LINEAR)

    def body(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        given = F.group_norm(h.mean(dim=(2, 3), keepdim=True), 1) if self.on_map else x
        out: Tensor = self.up(self.down(x) * (1.0 + self.scales(given)))
        return out
