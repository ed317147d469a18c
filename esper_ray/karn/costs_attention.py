"""What blocks of attention and recurrence cost: products between positions come on top of those with weights."""

from __future__ import annotations

from collections.abc import Mapping

from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import shapes
from esper_ray.karn.costs import Cost, weighted
from esper_ray.karn.shapes import conv_weights, norm_weights


def _with(cost: Cost, products: int) -> Cost:
    """The cost and so many multiply-adds more that have no weights of their own."""
    return Cost(cost.parameters, cost.flops + 2 * products)


def neighbour_gate(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, kernel = shapes.channels(signature), shapes.odd(parameters["kernel"])
    return Cost(kernel + 1 + c, 2 * kernel * c)


def coordinate_gate(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, height, width = signature.shape
    inner = shapes.hidden(c, parameters["ratio"])
    weights = conv_weights(c, inner)
    return Cost(3 * weights + inner + c + c, 2 * 2 * weights * (height + width))


def global_context(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    inner = shapes.hidden(c, parameters["ratio"])
    own = weighted(signature, conv_weights(c, 1), inner + c + c, once=2 * conv_weights(c, inner))
    return _with(own, c * shapes.positions(signature))


def style_gate(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, 0, c + c, once=2 * c)


def large_kernel_gate(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    products = 2 * conv_weights(c, c, shapes.odd(parameters["kernel"]), c) + conv_weights(c, c)
    return weighted(signature, products, norm_weights(c) + c + c)


def self_attention(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c, p = shapes.channels(signature), shapes.positions(signature)
    return _with(weighted(signature, 4 * conv_weights(c, c), 2 * norm_weights(c) + c), 2 * p * p * c)


def linear_attention(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, p = shapes.channels(signature), shapes.positions(signature)
    per_position = c // shapes.conv_groups(c, parameters["heads"]) if signature.kind == "conv" else p
    return _with(weighted(signature, 4 * conv_weights(c, c), 2 * norm_weights(c) + c), 2 * p * c * per_position)


def axial_attention(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c, height, width = signature.shape
    own = weighted(signature, 4 * conv_weights(c, c), 2 * norm_weights(c) + c)
    return _with(own, 2 * c * height * width * (height + width))


def neighbour_graph(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, 2 * conv_weights(c, c) + conv_weights(c, 2), 2 * norm_weights(c) + c)


def causal_mlp(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, kernel = shapes.channels(signature), shapes.odd(parameters["kernel"])
    inner = shapes.hidden(c, parameters["expansion"])
    return weighted(signature, kernel * c + 2 * conv_weights(c, inner), norm_weights(c) + inner + c)


def dynamic_convolution(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c = shapes.channels(signature)
    weights = shapes.conv_groups(c, parameters["heads"]) * shapes.odd(parameters["kernel"])
    return weighted(signature, 2 * conv_weights(c, c) + conv_weights(c, weights), 2 * norm_weights(c) + c)


def state_space(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, p = shapes.channels(signature), shapes.positions(signature)
    tables = 2 * c * round(parameters["states"])
    return _with(weighted(signature, conv_weights(c, c), norm_weights(c) + c + tables), p * p * c)


def gated_recurrence(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    del parameters
    c = shapes.channels(signature)
    return weighted(signature, 3 * conv_weights(c, c), 2 * norm_weights(c) + c + c)


def selective_state_space(signature: SlotSignature, parameters: Mapping[str, float]) -> Cost:
    c, p, states = shapes.channels(signature), shapes.positions(signature), round(parameters["states"])
    heads = shapes.conv_groups(c, parameters["heads"])
    own = weighted(signature, 2 * c * c + 2 * c * states + c * heads, 2 * norm_weights(c) + heads + c)
    return _with(own, p * p * (states + c))
