"""Convolutional blocks that look at more than one scale, or make maps cheaply. Input and output are (N, C, H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.convolution import Rectified
from esper_ray.karn.blueprints.layers import GELU, LINEAR, RELU, Branch, Convolution, Parameters, Table, norm

DILATIONS = (1, 2, 3)


class DilatedPyramid(Branch):
    """Depthwise 3x3 convolutions at three dilations side by side, then a pointwise map over all of them."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.norm = norm(signature, c)
        self.views = nn.ModuleList(Convolution(c, c, 3, gain=RELU, groups=c, dilation=d) for d in DILATIONS)
        self.mix = Convolution(len(DILATIONS) * c, c, gain=LINEAR)

    def body(self, h: Tensor) -> Tensor:
        r = F.relu(self.norm(h))
        out: Tensor = self.mix(torch.cat([view(r) for view in self.views], dim=1))
        return out


class HalfResolution(Branch):
    """A 3x3 convolution of the map averaged over 2x2 positions, spread out again: twice the view for a quarter."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.norm = norm(signature, c)
        # Averaging four positions of a rectified map halves its second moment.
        self.conv = Convolution(c, c, 3, gain=RELU * 1.41)

    def body(self, h: Tensor) -> Tensor:
        height, width = h.shape[2:]
        half = shapes.half(height), shapes.half(width)
        low: Tensor = self.conv(F.adaptive_avg_pool2d(F.relu(self.norm(h)), half))
        return low.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]


class Ghost(Branch):
    """Half of the channels by a pointwise map; the others by a depthwise 3x3 convolution of those."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        self.c = shapes.channels(signature)
        half = shapes.half(self.c)
        self.primary = Rectified(signature, self.c, half)
        self.cheap = Rectified(signature, half, half, 3, groups=half)

    def body(self, h: Tensor) -> Tensor:
        first = self.primary(h)
        return torch.cat((first, self.cheap(first)), dim=1)[:, : self.c]


class Hierarchical(Branch):
    """Channels in ``scales`` parts; each part is convolved with what came out of the one before, then all are mixed."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        scales = shapes.conv_groups(c, parameters["scales"])
        self.norm = norm(signature, c)
        self.steps = nn.ModuleList(Convolution(c // scales, c // scales, 3, gain=RELU) for _ in range(scales))
        self.mix = Rectified(signature, c, c)

    def body(self, h: Tensor) -> Tensor:
        parts = F.relu(self.norm(h)).chunk(len(self.steps), dim=1)
        made: list[Tensor] = []
        for step, part in zip(self.steps, parts, strict=True):
            made.append(step(part + made[-1] if made else part))
        out: Tensor = self.mix(torch.cat(made, dim=1))
        return out


class Shift(Branch):
    """A fifth of the channels moves by one position to each side, then a pointwise MLP: a 3x3 view without weights."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["expansion"])
        self.norm = norm(signature, c)
        self.widen = Convolution(c, inner, gain=LINEAR, bias=True)
        self.narrow = Convolution(inner, c, gain=GELU)

    def body(self, h: Tensor) -> Tensor:
        height, width = h.shape[2:]
        parts = F.pad(self.norm(h), (1, 1, 1, 1)).tensor_split(5, dim=1)
        corners = ((1, 1), (1, 0), (1, 2), (0, 1), (2, 1))
        moved = [p[:, :, y : y + height, x : x + width] for p, (y, x) in zip(parts, corners, strict=True)]
        out: Tensor = self.narrow(F.gelu(self.widen(torch.cat(moved, dim=1))))
        return out


class DynamicDepthwise(Branch):
    """Several depthwise kernels, mixed for each sample by what its map holds, then GELU and a pointwise map."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.kernels = round(parameters["kernels"])
        self.norm = norm(signature, c)
        self.route = Convolution(c, self.kernels, gain=LINEAR, bias=True)
        self.depthwise = Convolution(c, self.kernels * c, 3, gain=LINEAR, groups=c)
        self.mix = Convolution(c, c, gain=GELU)

    def body(self, h: Tensor) -> Tensor:
        weights = self.route(F.group_norm(h.mean(dim=(2, 3), keepdim=True), 1)).softmax(dim=1)
        views = torch.unflatten(self.depthwise(self.norm(h)), 1, (-1, self.kernels))
        mixed = (views * weights.unsqueeze(1)).sum(dim=2) * self.kernels**0.5
        out: Tensor = self.mix(F.gelu(mixed))
        return out


class WeightTied(Branch):
    """``x <- conv(relu(norm(x + h)))``, several times with the same weights: depth without parameters."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.steps = round(parameters["steps"])
        self.again = Rectified(signature, c, c, 3)

    def body(self, h: Tensor) -> Tensor:
        x: Tensor = self.again(h)
        for _ in range(self.steps - 1):
            x = self.again(x + h)
        return x


class Deformable(Branch):
    """A 3x3 convolution whose nine positions are moved by offsets that the map itself gives, read bilinearly."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.norm = norm(signature, c)
        self.offsets = Convolution(c, 18, 3, gain=0.5)
        self.mix = Convolution(9 * c, c, gain=LINEAR * 1.2)

    def body(self, h: Tensor) -> Tensor:
        r = self.norm(h)
        n, c, height, width = r.shape
        # The nine points of each position, [N, 3 H, 3 W, 2] in positions of the map, x before y.
        moved = self.offsets(r).view(n, 3, 3, 2, height, width).permute(0, 4, 1, 5, 2, 3).float()
        stencil = torch.arange(-1, 2, device=h.device)
        rows = torch.arange(height, device=h.device).view(-1, 1, 1, 1) + stencil.view(3, 1, 1)
        columns = torch.arange(width, device=h.device).view(-1, 1) + stencil
        # [N, H, 3, W, 3]: row of the map, row of the stencil, and the same for columns.
        x = (2 * (moved[..., 0] + columns) + 1) / width - 1
        y = (2 * (moved[..., 1] + rows) + 1) / height - 1
        grid = torch.stack((x, y), dim=-1).view(n, 3 * height, 3 * width, 2)
        read = F.grid_sample(r.float(), grid, align_corners=False).to(r.dtype)
        patches = read.view(n, c, height, 3, width, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, 9 * c, height, width)
        out: Tensor = self.mix(patches)
        return out


class SpectralFilter(Branch):
    """A weight for each frequency of each channel (cosine transform), then GELU and a pointwise map: a global view."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.norm = norm(signature, c)
        self.filter = Table(*signature.shape, deviation=1.0)
        self.mix = Convolution(c, c, gain=GELU)

    def body(self, h: Tensor) -> Tensor:
        down, across = (_cosines(size, h) for size in h.shape[2:])
        spectrum = down @ self.norm(h) @ across.T
        filtered = down.T @ (spectrum * self.filter()) @ across
        out: Tensor = self.mix(F.gelu(filtered))
        return out


def _cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of ``size`` positions, [frequencies, positions]."""
    steps = torch.arange(size, device=like.device, dtype=torch.float32)
    basis = torch.cos(torch.outer(steps, steps + 0.5) * (torch.pi / size)) * (2 / size) ** 0.5
    return torch.cat((basis[:1] * 0.5**0.5, basis[1:])).to(like.dtype)
