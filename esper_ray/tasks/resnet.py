"""`resnet-lite`: a small convolutional host that becomes a residual network by growing: a slot behind each stage.

Shapes: images [N, C, H, W]; stage k = 0, 1, 2 works on [N, width * 2**k, H / 2**k, W / 2**k].
"""

from __future__ import annotations

from torch import Tensor, nn


class Stage(nn.Sequential):
    """3x3 convolution, group normalisation, ReLU: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(max(1, outputs // 8), outputs),
            nn.ReLU(),
        )


class ResNetLite(nn.Module):
    """Three stages, global average pooling, a linear head. Slots: the outputs of ``stage1`` to ``stage3``."""

    slots = ("stage1", "stage2", "stage3")

    def __init__(self, *, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.stage1 = Stage(channels, width, stride=1)
        self.stage2 = Stage(width, 2 * width, stride=2)
        self.stage3 = Stage(2 * width, 4 * width, stride=2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        features: Tensor = self.stage3(self.stage2(self.stage1(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
