"""Attention between positions. A map's positions all see each other; in a sequence none sees what comes after it.

``x`` is (N, P, C): the positions of a map one after the other, or a sequence as it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import LINEAR, Branch, Convolution, Parameters, Projection, norm


class OverPositions(Branch):
    """A branch that is written over (N, P, C): norm, `mix`, norm, output map.

    The second normalisation brings averages over many positions back to a usual scale (sub-LN: Wang et al. 2022,
    arXiv:2210.06423).
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.on_map = signature.kind == "conv"
        self.norm = nn.LayerNorm(c, device="meta")
        self.settle = nn.LayerNorm(c, device="meta")
        self.out = Projection(c, c, gain=LINEAR)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def body(self, h: Tensor) -> Tensor:
        x = h.flatten(2).transpose(1, 2) if self.on_map else h
        out: Tensor = self.out(self.settle(self.mix(self.norm(x))))
        return out.transpose(1, 2).reshape(h.shape) if self.on_map else out


class SelfAttention(OverPositions):
    """``softmax(q k / sqrt(d)) v`` in several heads."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.heads = shapes.conv_groups(c, parameters["heads"])
        self.project = Projection(c, 3 * c, gain=LINEAR)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = in_heads(self.project(x), 3, self.heads)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if not self.on_map:
            scores = scores.masked_fill(later(x), -math.inf)
        return together(scores.softmax(dim=-1) @ v)


class LinearAttention(OverPositions):
    """Attention with the kernel ``(elu(q) + 1)(elu(k) + 1)``: on a map its cost grows with P, not with P squared.

    In a sequence the sums over the past are taken as one masked product.
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.heads = shapes.conv_groups(c, parameters["heads"])
        self.project = Projection(c, 3 * c, gain=LINEAR)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = in_heads(self.project(x), 3, self.heads)
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        if self.on_map:
            total = k.sum(dim=2, keepdim=True)
            return together((q @ (k.transpose(-2, -1) @ v)) / (q * total).sum(dim=-1, keepdim=True))
        scores = (q @ k.transpose(-2, -1)).masked_fill(later(x), 0.0)
        return together((scores @ v) / scores.sum(dim=-1, keepdim=True))


class AxialAttention(Branch):
    """Each position attends to its row and to its column, (N, C, H, W); the two readings are added."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.heads = shapes.conv_groups(c, parameters["heads"])
        self.norm = norm(signature, c)
        self.project = Convolution(c, 3 * c, gain=LINEAR)
        self.settle = norm(signature, c)
        self.out = Convolution(c, c, gain=LINEAR)

    def body(self, h: Tensor) -> Tensor:
        mixed = self.project(self.norm(h))
        rows = self._along(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        columns = self._along(mixed.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        out: Tensor = self.out(self.settle(rows + columns))
        return out

    def _along(self, mixed: Tensor) -> Tensor:
        """Attention within the third dimension of [N, lines, positions, 3 C]; gives [N, lines, positions, C]."""
        q, k, v = in_heads(mixed.flatten(0, 1), 3, self.heads)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return torch.unflatten(together(scores.softmax(dim=-1) @ v), 0, mixed.shape[:2])


class NeighbourGraph(Branch):
    """Each position attends to the eight around it and to itself by additive scores, (N, C, H, W)."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.norm = norm(signature, c)
        self.value = Convolution(c, c, gain=LINEAR)
        self.scores = Convolution(c, 2, gain=1.5 * LINEAR)
        self.settle = norm(signature, c)
        self.out = Convolution(c, c, gain=LINEAR)

    def body(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        value = self.value(x)
        asked, offered = self.scores(x).split(1, dim=1)
        scores = F.leaky_relu(asked.flatten(2) + F.unfold(offered, 3, padding=1), 0.2)
        outside = F.unfold(torch.ones_like(h[:1, :1]), 3, padding=1) == 0
        weights = scores.masked_fill(outside, -math.inf).softmax(dim=1)
        around = torch.unflatten(F.unfold(value, 3, padding=1), 1, (-1, 9))
        mixed = (around * weights.unsqueeze(1)).sum(dim=2).reshape(h.shape)
        out: Tensor = self.out(F.elu(self.settle(mixed)))
        return out


def in_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[N, P, parts C] -> ``parts`` tensors [N, heads, P, C / heads]."""
    return torch.unflatten(x, 2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def together(x: Tensor) -> Tensor:
    """[N, heads, P, C / heads] -> [N, P, C]."""
    return x.transpose(1, 2).flatten(2)


def later(x: Tensor) -> Tensor:
    """Which positions come after which, [P, P], for x [N, P, C]."""
    p = x.shape[1]
    return torch.ones(p, p, dtype=torch.bool, device=x.device).triu(1)
