"""What a boundary tells of each layer: how large its weights are, its last gradient, and the two in proportion."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from esper_ray.contracts.ports import LAYER_STATISTICS, HostGraph

FLOOR = -12.0


def layer_statistics(graph: HostGraph, model: nn.Module) -> npt.NDArray[np.float32]:
    """float32 [layers, LAYER_STATISTICS]: log10 of root mean squares, -12 where a layer has nothing to measure.

    Called while the gradients of a step are in place; one transfer from the device for all layers.
    """
    found = np.full((len(graph.layers), len(LAYER_STATISTICS)), FLOOR, np.float32)
    parameters = [list(model.get_submodule(layer.name).parameters()) for layer in graph.layers]
    measured = [index for index, own in enumerate(parameters) if any(p.grad is not None for p in own)]
    if not measured:
        return found
    sums = torch.stack([_sums(parameters[index]) for index in measured]).cpu().numpy()
    counts = np.asarray([sum(p.numel() for p in parameters[index]) for index in measured])
    weight, gradient = (np.sqrt(sums[:, column] / counts) for column in (0, 1))
    table = np.stack([weight, gradient, gradient / np.maximum(weight, 1e-12)], axis=1)
    with np.errstate(invalid="ignore"):
        found[measured] = np.maximum(np.log10(np.maximum(table, 10.0**FLOOR)), FLOOR)
    return np.nan_to_num(found, nan=FLOOR, posinf=-FLOOR, neginf=FLOOR)


def _sums(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Sums of squares of weights and gradients: [2]."""
    with torch.no_grad():
        weights = torch.stack([p.square().sum() for p in parameters]).sum()
        gradients = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum()
        return torch.stack([weights, gradients])
