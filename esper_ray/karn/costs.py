"""What each blueprint costs, from its description alone: ``weights`` and ``flops`` of one sample's forward pass.

Each function answers with a `Cost`; a test holds them equal to what is measured on the built module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.shapes import conv_weights, norm_weights


@dataclass(frozen=True, slots=True)
class Cost:
    """Trainable parameters, and FLOPs of one sample's forward pass."""

    parameters: int
    flops: int


@dataclass(frozen=True, slots=True)
class Machine:
    """How fast a machine is, for estimates: a roofline (Williams et al. 2009, doi:10.1145/1498765.1498785).

    Attributes:
        start_us: what each operation costs, however small.
        gflops: multiply-adds of blocks, in 10^9 FLOPs a second.
        gigabytes: what elementwise operations read and write, in 10^9 bytes a second.
    """

    start_us: float
    gflops: float
    gigabytes: float

    def step_ms(self, flops: int, operations: int, elements: int, batch: int) -> float:
        """Forward and backward over ``batch`` samples; the backward pass is twice the forward pass.

        Each of ``operations`` is taken to read and write a map of ``elements`` values of 4 bytes once.
        """
        computing = batch * flops / (self.gflops * 1e9)
        moving = operations * batch * elements * 8 / (self.gigabytes * 1e9)
        return 3e3 * (operations * self.start_us * 1e-6 + computing + moving)


REFERENCE = Machine(start_us=6.0, gflops=26.0, gigabytes=4.5)
"""One thread of a busy AMD EPYC (Zen 5); `python -m benchmarks.catalog` tells how far estimates are off."""

CostFunction = Callable[[SlotSignature, Mapping[str, float]], Cost]


def weighted(signature: SlotSignature, products: int, rest: int, once: int = 0) -> Cost:
    """``products`` weights used at every position, ``once`` used once a sample, ``rest`` outside matrix products."""
    return Cost(products + once + rest, 2 * (products * shapes.positions(signature) + once))


def identity(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del signature, parameters
    return Cost(0, 0)


def affine(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    return Cost(2 * shapes.channels(signature), 0)


def normalised_activation(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return Cost(norm_weights(c) + c, 0)


def pointwise_mlp(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    return weighted(signature, 2 * conv_weights(c, inner), norm_weights(c) + inner + c)


def low_rank(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    return weighted(signature, 2 * conv_weights(c, shapes.rank(c, parameters["rank"])), c)


def depthwise_mlp(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    products = conv_weights(c, c, shapes.odd(parameters["kernel"]), c) + 2 * conv_weights(c, inner)
    return weighted(signature, products, norm_weights(c) + inner + c)


def squeeze_excitation(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["ratio"])
    return weighted(signature, 0, inner + c + c, once=2 * conv_weights(c, inner))


def bottleneck(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["ratio"])
    products = 2 * conv_weights(c, inner) + conv_weights(inner, inner, 3)
    return weighted(signature, products, norm_weights(c) + 2 * norm_weights(inner) + c)


def basic(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["width"])
    products = conv_weights(c, inner, 3) + conv_weights(inner, c, 3)
    return weighted(signature, products, norm_weights(c) + norm_weights(inner) + c)


def gated_mlp(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    return weighted(signature, 3 * conv_weights(c, inner), norm_weights(c) + 2 * inner + c)


def grouped(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    groups = shapes.conv_groups(c, parameters["groups"])
    return weighted(signature, 2 * conv_weights(c, c, 3, groups), 2 * norm_weights(c) + c)


def dilated(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, conv_weights(c, c, 3) + conv_weights(c, c), 2 * norm_weights(c) + c)


def single(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    return weighted(signature, conv_weights(c, c, shapes.odd(parameters["kernel"])), norm_weights(c) + c)


def inverted(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    products = 2 * conv_weights(c, inner) + conv_weights(inner, inner, 3, inner)
    return weighted(signature, products, norm_weights(c) + 2 * norm_weights(inner) + c)


def factorised(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    kernel = shapes.odd(parameters["kernel"])
    return weighted(signature, 2 * kernel * conv_weights(c, c), 2 * norm_weights(c) + c)


def spatial_gate(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    kernel = shapes.odd(parameters["kernel"])
    return weighted(signature, conv_weights(2, 1, kernel), 1 + c)


def dilated_pyramid(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, 3 * conv_weights(c, c, 3, c) + conv_weights(3 * c, c), norm_weights(c) + c)


def half_resolution(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    weights = conv_weights(c, c, 3)
    _, height, width = signature.shape
    return Cost(weights + norm_weights(c) + c, 2 * weights * shapes.half(height) * shapes.half(width))


def ghost(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    half = shapes.half(c)
    products = conv_weights(c, half) + conv_weights(half, half, 3, half)
    return weighted(signature, products, norm_weights(c) + norm_weights(half) + c)


def hierarchical(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    scales = shapes.conv_groups(c, parameters["scales"])
    products = scales * conv_weights(c // scales, c // scales, 3) + conv_weights(c, c)
    return weighted(signature, products, 2 * norm_weights(c) + c)


def shift(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    return pointwise_mlp(signature, parameters)


def dynamic_depthwise(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, kernels = shapes.channels(signature), round(parameters["kernels"])
    products = kernels * conv_weights(c, c, 3, c) + conv_weights(c, c)
    return weighted(signature, products, norm_weights(c) + kernels + c, once=conv_weights(c, kernels))


def weight_tied(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    weights = conv_weights(c, c, 3)
    flops = 2 * weights * shapes.positions(signature) * round(parameters["steps"])
    return Cost(weights + norm_weights(c) + c, flops)


def deformable(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, conv_weights(c, 18, 3) + conv_weights(9 * c, c), norm_weights(c) + c)


def spectral_filter(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c, height, width = signature.shape
    transforms = 2 * c * height * width * (height + width)
    mixed = weighted(signature, conv_weights(c, c), norm_weights(c) + c)
    return Cost(mixed.parameters + c * height * width, mixed.flops + 2 * transforms)


def memory(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    return weighted(signature, 2 * conv_weights(c, round(parameters["places"])), 2 * norm_weights(c) + c)


def mixture(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, experts = shapes.channels(signature), round(parameters["experts"])
    inner = experts * shapes.hidden(c, parameters["expansion"])
    return weighted(signature, conv_weights(c, experts) + 2 * conv_weights(c, inner), norm_weights(c) + inner + c)


def conditional_low_rank(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    rank = shapes.rank(c, parameters["rank"])
    weights = conv_weights(c, rank)
    on_map = signature.kind == "conv"
    return weighted(
        signature, (2 if on_map else 3) * weights, norm_weights(c) + rank + c, once=weights if on_map else 0
    )


def faulty(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, conv_weights(c, c), norm_weights(c) + c)
