"""`mlp-lite`: a small network for rows of a table that deepens by growing; a slot behind each hidden layer.

Shapes: rows [N, columns]; hidden vectors [N, width]; logits [N, classes].
"""

from __future__ import annotations

from torch import Tensor, nn


class Layer(nn.Sequential):
    """Linear map, layer normalisation, ReLU: [N, inputs] -> [N, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.LayerNorm(outputs), nn.ReLU())


class MLPLite(nn.Module):
    """Two hidden layers and a linear head. Slots: the outputs of ``layer1`` and ``layer2``."""

    slots = ("layer1", "layer2")

    def __init__(self, *, columns: int, classes: int, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = Layer(columns, width), Layer(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.head(self.layer2(self.layer1(rows)))
        return logits
