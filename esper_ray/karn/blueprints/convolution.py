"""Convolutional blocks, all pre-activation: normalise, rectify, convolve. Input and output are (N, C, H, W)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.blueprints.layers import GELU, LINEAR, RELU, Branch, Convolution, Parameters, norm


class Rectified(nn.Module):
    """norm, ReLU, convolution: the step that the residual blocks repeat."""

    def __init__(
        self,
        signature: SlotSignature,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int] = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.norm = norm(signature, c_in)
        self.conv = Convolution(c_in, c_out, kernel, gain=RELU, groups=groups, dilation=dilation)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv(F.relu(self.norm(h)))
        return out


class ResidualBasic(Branch):
    """Two 3x3 convolutions through ``width * C`` channels."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["width"])
        self.first = Rectified(signature, c, inner, 3)
        self.second = Rectified(signature, inner, c, 3)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(h))
        return out


class Bottleneck(Branch):
    """1x1 down to ``ratio * C``, 3x3, 1x1 up."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["ratio"])
        self.narrow = Rectified(signature, c, inner)
        self.mix = Rectified(signature, inner, inner, 3)
        self.widen = Rectified(signature, inner, c)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.widen(self.mix(self.narrow(h)))
        return out


class DepthwiseMLP(Branch):
    """Depthwise convolution, one normalisation over the sample, 1x1 up, GELU, 1x1 down (ConvNeXt)."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["expansion"])
        self.depthwise = Convolution(c, c, shapes.odd(parameters["kernel"]), gain=LINEAR, groups=c)
        self.norm = norm(signature, c, groups=1)
        self.widen = Convolution(c, inner, gain=LINEAR, bias=True)
        self.narrow = Convolution(inner, c, gain=GELU)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.narrow(F.gelu(self.widen(self.norm(self.depthwise(h)))))
        return out


class InvertedBottleneck(Branch):
    """1x1 up to ``expansion * C``, depthwise 3x3, 1x1 down; the input is normalised but not rectified."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        inner = shapes.hidden(c, parameters["expansion"])
        self.norm = norm(signature, c)
        self.widen = Convolution(c, inner, gain=LINEAR)
        self.depthwise = Rectified(signature, inner, inner, 3, groups=inner)
        self.narrow = Rectified(signature, inner, c)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.depthwise(self.widen(self.norm(h))))
        return out


class GroupedShuffle(Branch):
    """Two grouped 3x3 convolutions; between them the channels of all groups are interleaved."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        groups = shapes.conv_groups(c, parameters["groups"])
        self.first = Rectified(signature, c, c, 3, groups=groups)
        self.shuffle = nn.ChannelShuffle(groups)
        self.second = Rectified(signature, c, c, 3, groups=groups)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.second(self.shuffle(self.first(h)))
        return out


class Dilated(Branch):
    """3x3 convolution over every second position, then 1x1."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.wide = Rectified(signature, c, c, 3, dilation=2)
        self.mix = Rectified(signature, c, c)

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.mix(self.wide(h))
        return out


class SingleConvolution(Branch):
    """One convolution with a square kernel."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        self.only = Rectified(signature, c, c, shapes.odd(parameters["kernel"]))

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.only(h)
        return out


class Factorised(Branch):
    """A 1xK, then a Kx1 convolution."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = shapes.channels(signature)
        kernel = shapes.odd(parameters["kernel"])
        self.across = Rectified(signature, c, c, (1, kernel))
        self.along = Rectified(signature, c, c, (kernel, 1))

    def body(self, h: Tensor) -> Tensor:
        out: Tensor = self.along(self.across(h))
        return out
