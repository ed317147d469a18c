"""Blocks that weigh what is there by what they see. Their gates are centred: a newborn turns up as much as down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import LINEAR, RELU, Branch, Convolution, Parameters


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
