"""A block of your own that can grow: registered, checked, and used in a run.

    esper blueprints check own_blueprint --folder examples
    esper run --fast --set run.code_folder=examples --set seeds.modules=[own_blueprint] --set seeds.approved=[BP051]

It competes with the others from then on: Tamiyo sees its size and its FLOPs as measured in each slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.blueprints.layers import LINEAR, Branch, Convolution, Parameters, norm
from esper_ray.karn.catalog import Bound
from esper_ray.karn.own import register_blueprint
from esper_ray.karn.shapes import channels, odd


@register_blueprint(
    "BP051",
    name="max-and-blur",
    description="What stands out against its surroundings: a map less a blurred version of itself, mixed pointwise.",
    kinds=("conv",),
    bounds={"kernel": Bound(3, 7, 3, "side of the (odd) blur")},
    smallest_side=3,
)
class MaxAndBlur(Branch):
    """``mix(tanh(norm(h) - blur(norm(h))))``, (N, C, H, W)."""

    def __init__(self, signature: SlotSignature, parameters: Parameters) -> None:
        super().__init__(signature, parameters)
        c = channels(signature)
        self.norm = norm(signature, c)
        self.blur = Convolution(c, c, odd(parameters["kernel"]), gain=LINEAR, groups=c)
        self.mix = Convolution(c, c, gain=1.3 * LINEAR)

    def body(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        out: Tensor = self.mix(torch.tanh(x - self.blur(x)))
        return out
