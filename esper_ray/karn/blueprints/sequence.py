"""Blocks for sequences, (N, T, D). All are causal: what comes out at a position depends on it and on earlier ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import (
    GELU,
    LINEAR,
    Branch,
    CausalConvolution,
    Parameters,
    Projection,
    Table,
    norm,
)
from esper_ray.karn.blueprints.positions import OverPositions, later


class CausalMLP(Branch):
    """A depthwise convolution over the last positions, then a pointwise MLP."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["expansion"])
        self.norm = norm(signature, c)
        self.past = CausalConvolution(c, shapes.odd(parameters["kernel"]), gain=LINEAR)
        self.widen = Projection(c, inner, gain=LINEAR, bias=True)
        self.narrow = Projection(inner, c, gain=GELU)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.narrow(F.gelu(self.widen(self.past(self.norm(h)))))
        return out


class DynamicConvolution(OverPositions):
    """A convolution over the last positions whose kernel each position makes for itself, by a softmax, in heads."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.heads, self.kernel = shapes.conv_groups(c, parameters["heads"]), shapes.odd(parameters["kernel"])
        self.value = Projection(c, c, gain=LINEAR)
        self.weights = Projection(c, self.heads * self.kernel, gain=LINEAR)

    def mix(self, x: Tensor) -> Tensor:
        weights = torch.unflatten(self.weights(x), 2, (self.heads, self.kernel)).softmax(dim=-1)
        past = F.pad(self.value(x), (0, 0, self.kernel - 1, 0)).unfold(1, self.kernel, 1)
        return (torch.unflatten(past, 2, (self.heads, -1)) * weights.unsqueeze(3)).sum(dim=-1).flatten(2)


class StateSpace(Branch):
    """A convolution with the whole past whose kernel is a sum of decaying exponentials per channel, then a map.

    ``K[c, t] = sum_n B[c, n] sqrt(1 - a^2) a[c, n]^t``: the impulse response of a diagonal linear state space model.
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c, states = shapes.channels(signature), round(parameters["states"])
        self.norm = norm(signature, c)
        # Memories from one position to some two hundred.
        self.decays = Table(c, states, low=0.0, high=-5.0)
        self.readout = Table(c, states, deviation=1.0 / math.sqrt(states))
        self.out = Projection(c, c, gain=1.35 * GELU)

    def body(self, h: Tensor) -> Tensor:
        steps = torch.arange(h.shape[1], device=h.device)
        rate = F.softplus(self.decays()).unsqueeze(2)
        energy = (1.0 - torch.exp(-2.0 * rate)).sqrt()
        kernel = (self.readout().unsqueeze(2) * energy * torch.exp(-rate * steps)).sum(dim=1)
        past = F.pad(self.norm(h).transpose(1, 2), (h.shape[1] - 1, 0))
        state = F.conv1d(past, kernel.flip(1).unsqueeze(1).to(past.dtype), groups=h.shape[2]).transpose(1, 2)
        out: Tensor = self.out(F.gelu(state))
        return out


class GatedRecurrence(OverPositions):
    """``s[t] = (1 - z[t]) s[t-1] + z[t] v[t]`` with gate z and value v > 0 from the input alone, all positions at once.

    Computed as a cumulative sum of logarithms (Feng et al. 2024, arXiv:2410.01201, appendix B).
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.gate = Projection(c, c, gain=LINEAR, bias=True)
        self.value = Projection(c, c, gain=LINEAR)

    def mix(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).float(), self.value(x).float()
        positive = torch.where(value >= 0, torch.log(value.relu() + 0.5), -F.softplus(-value))
        kept = torch.cumsum(-F.softplus(gate), dim=1)
        states = kept + torch.logcumsumexp(positive - F.softplus(-gate) - kept, dim=1)
        return states.exp().to(x.dtype)


class SelectiveStateSpace(OverPositions):
    """A linear recurrence whose decay, input and readout are functions of the input, as one masked product.

    ``y = (L * (C B^T)) x`` with ``L[t, s] = prod_{s < r <= t} a[r]`` in each head (Dao and Gu 2024, arXiv:2405.21060).
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.heads, self.states = shapes.conv_groups(c, parameters["heads"]), round(parameters["states"])
        self.value = Projection(c, c, gain=LINEAR)
        self.write_and_read = Projection(c, 2 * self.states, gain=LINEAR)
        self.decay = Projection(c, self.heads, gain=LINEAR, bias=True)

    def mix(self, x: Tensor) -> Tensor:
        write, read = self.write_and_read(x).chunk(2, dim=-1)
        scores = (read @ write.transpose(1, 2)).unsqueeze(1)
        age = torch.cumsum(-F.softplus(self.decay(x).float()), dim=1).transpose(1, 2)
        fades = (age.unsqueeze(3) - age.unsqueeze(2)).masked_fill(later(x), -math.inf).exp()
        value: Tensor = torch.unflatten(self.value(x), 2, (self.heads, -1)).transpose(1, 2)
        mixed: Tensor = (scores * fades).to(value.dtype) @ value
        return mixed.transpose(1, 2).flatten(2)
