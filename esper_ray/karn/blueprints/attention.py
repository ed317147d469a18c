"""Blocks that weigh what is there by what they see. Their gates are centred: a newborn turns up as much as down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import LINEAR, RELU, Branch, Convolution, Parameters, norm


class SqueezeExcitation(Branch):
    """``h * tanh(mlp(mean over positions))``, (N, C, H, W); the means are normalised over the channels."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["ratio"])
        self.squeeze = Convolution(c, inner, gain=LINEAR, bias=True)
        self.excite = Convolution(inner, c, gain=RELU, bias=True)

    def body(self, h: Tensor) -> Tensor:
        means = F.group_norm(h.mean(dim=(2, 3), keepdim=True), 1)
        return h * torch.tanh(self.excite(F.relu(self.squeeze(means))))


class SpatialGate(Branch):
    """``h * tanh(conv(mean and maximum over channels))``, (N, C, H, W); both maps are normalised over positions."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.gate = Convolution(2, 1, shapes.odd(parameters["kernel"]), gain=LINEAR, bias=True)

    def body(self, h: Tensor) -> Tensor:
        maps = torch.cat((h.mean(dim=1, keepdim=True), h.amax(dim=1, keepdim=True)), dim=1)
        return h * torch.tanh(self.gate(F.group_norm(maps, 2)))


class NeighbourGate(Branch):
    """``h * tanh(conv1d(mean over positions))``: a channel's gate looks at its neighbours among the channels only."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.gate = Convolution(1, 1, (1, shapes.odd(parameters["kernel"])), gain=1.5 * LINEAR, bias=True)

    def body(self, h: Tensor) -> Tensor:
        means = F.group_norm(h.mean(dim=(2, 3), keepdim=True), 1)
        gate = self.gate(means.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return h * torch.tanh(gate)


class CoordinateGate(Branch):
    """``h * tanh(a(row) + b(column))``: gates from the means along each row and along each column."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["ratio"])
        self.squeeze = Convolution(c, inner, gain=LINEAR, bias=True)
        self.rows = Convolution(inner, c, gain=LINEAR)
        self.columns = Convolution(inner, c, gain=LINEAR, bias=True)

    def body(self, h: Tensor) -> Tensor:
        along = h.mean(dim=3, keepdim=True), h.mean(dim=2, keepdim=True).transpose(2, 3)
        means = F.group_norm(torch.cat(along, dim=2), 1)
        squeezed = F.relu(self.squeeze(means))
        rows, columns = torch.split(squeezed, [h.shape[2], h.shape[3]], dim=2)
        return h * torch.tanh(self.rows(rows) + self.columns(columns).transpose(2, 3))


class GlobalContext(Branch):
    """One vector for the whole map, pooled by a learned attention over positions, then an MLP; added everywhere."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["ratio"])
        self.key = Convolution(c, 1, gain=LINEAR)
        self.squeeze = Convolution(c, inner, gain=LINEAR, bias=True)
        self.excite = Convolution(inner, c, gain=RELU, bias=True)

    def body(self, h: Tensor) -> Tensor:
        weights = self.key(h).flatten(2).softmax(dim=2)
        context = F.group_norm((h.flatten(2) @ weights.transpose(1, 2)).unsqueeze(3), 1)
        out: Tensor = self.excite(F.relu(F.group_norm(self.squeeze(context), 1)))
        return out.expand_as(h)


class StyleGate(Branch):
    """``h * tanh(w1 * mean + w2 * deviation)``, channel by channel; both are normalised over the channels."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.gate = Convolution(2 * c, c, gain=LINEAR, groups=c, bias=True)

    def body(self, h: Tensor) -> Tensor:
        variance, mean = torch.var_mean(h, dim=(2, 3), correction=0, keepdim=True)
        deviation = (variance + 1e-5).sqrt()
        style = torch.stack((F.group_norm(mean, 1), F.group_norm(deviation, 1)), dim=2).flatten(1, 2)
        return h * torch.tanh(self.gate(style))


class LargeKernelGate(Branch):
    """``r * mix(dilated(depthwise(r)))`` with ``r = norm(h)``: each value gated by a wide view of its surroundings."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c, kernel = shapes.channels(signature), shapes.odd(parameters["kernel"])
        self.norm = norm(signature, c)
        self.near = Convolution(c, c, kernel, gain=LINEAR, groups=c)
        self.far = Convolution(c, c, kernel, gain=LINEAR, groups=c, dilation=2)
        self.mix = Convolution(c, c, gain=LINEAR, bias=True)

    def body(self, h: Tensor) -> Tensor:
        r = self.norm(h)
        out: Tensor = r * self.mix(self.far(self.near(r)))
        return out
