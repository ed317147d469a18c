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


CostFunction = Callable[[SlotSignature, Mapping[str, float]], Cost]


def _of(signature: SlotSignature, products: int, rest: int, once: int = 0) -> Cost:
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
    return _of(signature, 2 * conv_weights(c, inner), norm_weights(c) + inner + c)


def low_rank(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    return _of(signature, 2 * conv_weights(c, shapes.rank(c, parameters["rank"])), c)


def depthwise_mlp(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    products = conv_weights(c, c, shapes.odd(parameters["kernel"]), c) + 2 * conv_weights(c, inner)
    return _of(signature, products, norm_weights(c) + inner + c)


def squeeze_excitation(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["ratio"])
    return _of(signature, 0, inner + c + c, once=2 * conv_weights(c, inner))


def bottleneck(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["ratio"])
    products = 2 * conv_weights(c, inner) + conv_weights(inner, inner, 3)
    return _of(signature, products, norm_weights(c) + 2 * norm_weights(inner) + c)


def basic(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["width"])
    products = conv_weights(c, inner, 3) + conv_weights(inner, c, 3)
    return _of(signature, products, norm_weights(c) + norm_weights(inner) + c)


def gated_mlp(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    return _of(signature, 3 * conv_weights(c, inner), norm_weights(c) + 2 * inner + c)


def grouped(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    groups = shapes.conv_groups(c, parameters["groups"])
    return _of(signature, 2 * conv_weights(c, c, 3, groups), 2 * norm_weights(c) + c)


def dilated(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return _of(signature, conv_weights(c, c, 3) + conv_weights(c, c), 2 * norm_weights(c) + c)


def single(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    return _of(signature, conv_weights(c, c, shapes.odd(parameters["kernel"])), norm_weights(c) + c)


def inverted(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["expansion"])
    products = 2 * conv_weights(c, inner) + conv_weights(inner, inner, 3, inner)
    return _of(signature, products, norm_weights(c) + 2 * norm_weights(inner) + c)


def factorised(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    kernel = shapes.odd(parameters["kernel"])
    return _of(signature, 2 * kernel * conv_weights(c, c), 2 * norm_weights(c) + c)


def spatial_gate(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    kernel = shapes.odd(parameters["kernel"])
    return _of(signature, conv_weights(2, 1, kernel), 1 + c)
