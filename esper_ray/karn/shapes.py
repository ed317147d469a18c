"""The sizes that a block's description and its module must agree on, and what layers cost. No torch here.

``c`` is the number of channels: C of a conv slot (C, H, W), D of a sequence slot (T, D) or a vector slot (D,).
Parameters are counted one by one; a multiply-add is 2 FLOPs, and only convolutions and matrix products count,
as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import math

from esper_ray.contracts.ports import SlotSignature

GROUP_CHANNELS = 8


def channels(signature: SlotSignature) -> int:
    """How many channels (or features) a sample has."""
    return signature.shape[0] if signature.kind == "conv" else signature.shape[-1]


def positions(signature: SlotSignature) -> int:
    """At how many places the same layer is applied to one sample: H*W, T or 1."""
    return math.prod(signature.shape) // channels(signature)


def norm_groups(c: int) -> int:
    """Groups of a GroupNorm over ``c`` channels: the largest groups of 2 to 8 channels that divide ``c``, else one.

    Single-channel groups are avoided: on a 1x1 map they would turn every value into zero.
    """
    for size in range(min(GROUP_CHANNELS, c), 1, -1):
        if c % size == 0:
            return c // size
    return 1


def hidden(c: int, ratio: float) -> int:
    """Inner width of a block: ``c * ratio`` to the nearest multiple of 4, and at least 4."""
    return max(4, 4 * round(c * ratio / 4))


def conv_groups(c: int, wanted: float) -> int:
    """The largest divisor of ``c`` that is not above ``wanted``."""
    return next(groups for groups in range(max(1, min(c, round(wanted))), 0, -1) if c % groups == 0)


def odd(size: float) -> int:
    """A kernel size: ``size`` rounded to an odd number, the larger one on a tie."""
    return 2 * round((size - 1) / 2) + 1


def rank(c: int, wanted: float) -> int:
    """Rank of a low-rank map of ``c`` channels."""
    return max(1, min(c, round(wanted)))


def half(c: int) -> int:
    """Half of the channels, rounded up."""
    return (c + 1) // 2


def conv_weights(c_in: int, c_out: int, kernel: int = 1, groups: int = 1) -> int:
    """Weights of a convolution without bias; its FLOPs are twice that at each output position."""
    return c_in // groups * c_out * kernel * kernel


def norm_weights(c: int) -> int:
    """Gain and shift of a normalisation."""
    return 2 * c
