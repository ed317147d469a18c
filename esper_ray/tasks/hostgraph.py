"""The host as a graph of its layers, found by running it once.

Nodes are the leaf modules in the order of their first call. Edges come from the autograd graph: from the output of each
layer back to the outputs of others, through whatever functions, additions and skip connections lie between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.contracts.ports import HostGraph, LayerInfo

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("conv", ("Conv",)),
    ("norm", ("Norm",)),
    ("attention", ("Attention",)),
    ("embedding", ("Embedding",)),
    ("linear", ("Linear",)),
    ("pooling", ("Pool",)),
    ("activation", ("ReLU", "GELU", "SiLU", "ELU", "Tanh", "Sigmoid", "Softmax", "Softplus", "Hardswish", "Mish")),
)
_INPUTS = ("in_channels", "in_features", "num_embeddings", "num_channels", "num_features", "embed_dim")
_OUTPUTS = ("out_channels", "out_features", "embedding_dim", "num_channels", "num_features", "embed_dim")


def trace(model: nn.Module, inputs: Tensor, slots: Sequence[str] = ()) -> HostGraph:
    """Run ``model`` on ``inputs`` and tell how its layers feed one another.

    Args:
        inputs: a small batch.
        slots: names of modules; for each the graph says after which layer it ends.

    Raises:
        ValueError: a slot's module has no layer that was called.
    """
    nodes: dict[int, Any] = {}
    names = {module: name for name, module in model.named_modules() if not any(module.children())}
    order: list[nn.Module] = []
    outputs: list[tuple[int, Any]] = []

    def seen(module: nn.Module, _: Any, output: Any) -> None:
        if module not in order:
            order.append(module)
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                outputs.append((order.index(module), tensor.grad_fn))

    handles = [module.register_forward_hook(seen) for module in names]
    try:
        with torch.enable_grad():
            # Gradients of floating inputs make layers without parameters visible to the walk too.
            model(inputs.detach().requires_grad_() if inputs.is_floating_point() else inputs)
    finally:
        for handle in handles:
            handle.remove()
    for index, node in outputs:
        nodes[id(node)] = (index, node)
    edges = {(source, index) for index, node in outputs for source in _sources(node, nodes) if source != index}
    layers = tuple(_describe(names[module], module) for module in order)
    return HostGraph(layers, tuple(sorted(edges)), tuple(_last_inside(slot, layers) for slot in slots))


def _sources(node: Any, nodes: Mapping[int, tuple[int, Any]]) -> set[int]:
    """The layers whose outputs are met first on the way back from ``node``."""
    found: set[int] = set()
    visited: dict[int, Any] = {}  # holds the nodes, for the id of one that is gone may come again
    waiting = [before for before, _ in node.next_functions if before is not None]
    while waiting:
        current = waiting.pop()
        if id(current) in visited:
            continue
        visited[id(current)] = current
        if id(current) in nodes:
            found.add(nodes[id(current)][0])
        else:
            waiting += [before for before, _ in current.next_functions if before is not None]
    return found


def _describe(name: str, module: nn.Module) -> LayerInfo:
    title = type(module).__name__
    kind = next((kind for kind, parts in _KINDS if any(part in title for part in parts)), "other")
    return LayerInfo(
        name=name,
        kind=kind,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        inputs=next((int(getattr(module, key)) for key in _INPUTS if hasattr(module, key)), 0),
        outputs=next((int(getattr(module, key)) for key in _OUTPUTS if hasattr(module, key)), 0),
    )


def _last_inside(slot: str, layers: Sequence[LayerInfo]) -> int:
    inside = [i for i, layer in enumerate(layers) if layer.name == slot or layer.name.startswith(f"{slot}.")]
    if not inside:
        raise ValueError(f"no layer of {slot} was called")
    return max(inside)
