"""What the blocks are made of: layers that know the scale at which they are born, and the branch around them.

Modules are constructed on the meta device, so that torch's own initialisation draws nothing; `reset` then gives
every tensor its birth value from one generator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.shapes import channels, norm_groups

Parameters = Mapping[str, float]

# Gains that keep the second moment of a normalised input: 1 / E[f(x)^2] for x ~ N(0, 1), square-rooted.
LINEAR, RELU, GELU, SWIGLU = 1.0, math.sqrt(2.0), 1.533, 1.677


class Convolution(nn.Conv2d):
    """A shape-preserving convolution without bias unless asked, born with deviation ``gain / sqrt(fan_in)``.

    He et al. 2015, arXiv:1502.01852, eq. 10.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int] = 1,
        *,
        gain: float,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (dilation * (sides[0] // 2), dilation * (sides[1] // 2))
        super().__init__(
            c_in, c_out, sides, padding=padding, dilation=dilation, groups=groups, bias=bias, device="meta"
        )
        self.gain = gain


class Projection(nn.Linear):
    """A linear map over the last dimension, born as `Convolution` is."""

    def __init__(self, c_in: int, c_out: int, *, gain: float, bias: bool = False) -> None:
        super().__init__(c_in, c_out, bias=bias, device="meta")
        self.gain = gain


class CausalConvolution(Convolution):
    """A depthwise convolution along a sequence, [N, T, C] -> [N, T, C]: position t sees t - kernel + 1 to t."""

    def __init__(self, c: int, kernel: int, *, gain: float) -> None:
        super().__init__(c, c, (1, kernel), gain=gain, groups=c)
        self.padding = (0, 0)

    def forward(self, h: Tensor) -> Tensor:
        past = F.pad(h.transpose(1, 2).unsqueeze(2), (self.kernel_size[1] - 1, 0))
        return super().forward(past).squeeze(2).transpose(1, 2)


class Table(nn.Module):
    """Free values that belong to no map: born evenly spaced from ``low`` to ``high``, with noise of ``deviation``."""

    def __init__(self, *shape: int, low: float = 0.0, high: float = 0.0, deviation: float = 0.0) -> None:
        super().__init__()
        self.low, self.high, self.deviation = low, high, deviation
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))

    def forward(self) -> Tensor:
        return self.weight


def pointwise(
    signature: SlotSignature, c_in: int, c_out: int, *, gain: float, bias: bool = False
) -> Convolution | Projection:
    """The same map of channels at each position of a sample."""
    if signature.kind == "conv":
        return Convolution(c_in, c_out, gain=gain, bias=bias)
    return Projection(c_in, c_out, gain=gain, bias=bias)


def norm(signature: SlotSignature, c: int, *, groups: int | None = None) -> nn.GroupNorm | nn.LayerNorm:
    """GroupNorm over a map, LayerNorm over the features of a position. No batch statistics anywhere."""
    if signature.kind == "conv":
        return nn.GroupNorm(groups or norm_groups(c), c, device="meta")
    return nn.LayerNorm(c, device="meta")


class Branch(nn.Module):
    """``delta(h) = scale * body(h)``: what a seed adds to its slot, ``y = h + alpha * delta(h)``.

    ``body`` keeps the shape of h, (N, C, H, W), (N, T, D) or (N, D), and has about unit deviation at birth;
    ``scale`` is a learnable gain per channel (LayerScale, arXiv:2103.17239), born at a usual size, not at zero.
    """

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__()
        self.signature = str(signature)
        self.initial_scale = parameters["scale"]
        c = channels(signature)
        self.scale = nn.Parameter(torch.empty((c, 1, 1) if signature.kind == "conv" else (c,), device="meta"))

    def body(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * self.body(h)


def reset(module: nn.Module, generator: torch.Generator) -> None:
    """Give every tensor of a block its birth value; the draws come from ``generator`` alone, in a fixed order.

    The values are drawn on the generator's device and copied, so that a seed is born alike on every device.
    """
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Convolution | Projection):
                deviation = part.gain / math.sqrt(part.weight[0].numel())
                drawn = torch.empty(part.weight.shape, device=generator.device)
                part.weight.copy_(drawn.normal_(0.0, deviation, generator=generator))
                if part.bias is not None:
                    part.bias.zero_()
            elif isinstance(part, Table):
                drawn = torch.empty(part.weight.shape, device=generator.device)
                drawn.normal_(0.0, part.deviation, generator=generator)
                part.weight.copy_(drawn + torch.linspace(part.low, part.high, drawn.shape[-1], device=drawn.device))
            elif isinstance(part, nn.GroupNorm | nn.LayerNorm):
                part.weight.fill_(1.0)
                part.bias.zero_()
            elif isinstance(part, Branch):
                part.scale.fill_(part.initial_scale)
                for name, parameter in part.named_parameters(recurse=False):
                    if name != "scale":
                        parameter.zero_()
