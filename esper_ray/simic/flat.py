"""A module's parameters in one vector, so that clipping and an optimiser's step are a few operations, not dozens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatParameters:
    """Parameters and their gradients as views of two vectors.

    The parameters stay where they are in the module; only their storage moves. Load new values in place
    (`load_state_dict` does), and clear gradients with `zero_grad` here, never to None.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        with torch.no_grad():
            self.vector = nn.Parameter(torch.cat([each.detach().flatten() for each in parameters]))
        self.gradient = torch.zeros_like(self.vector)
        self.vector.grad = self.gradient
        start = 0
        for each in parameters:
            part = slice(start, start + each.numel())
            each.data = self.vector.data[part].view_as(each)
            each.grad = self.gradient[part].view_as(each)
            start = part.stop

    def zero_grad(self) -> None:
        self.gradient.zero_()

    def clip(self, norm: float) -> Tensor:
        """Scale the gradient down to a Euclidean norm of at most ``norm``; returns the norm that it had."""
        found: Tensor = torch.linalg.vector_norm(self.gradient)
        self.gradient.mul_((norm / (found + 1e-6)).clamp_(max=1.0))
        return found


class Adam:
    """Kingma and Ba 2015, algorithm 1, on one vector of parameters; PyTorch's own costs more than such small networks.

    Args:
        flat: what it optimises.
        epsilon: added to the root of the second moment.
    """

    def __init__(
        self, flat: FlatParameters, *, rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-5
    ) -> None:
        self._flat, self.rate, self._betas, self._epsilon = flat, rate, betas, epsilon
        self._first, self._second = torch.zeros_like(flat.vector.data), torch.zeros_like(flat.vector.data)
        self._count = 0

    def step(self) -> None:
        """Change the parameters by their present gradient."""
        self._count += 1
        gradient, (one, two) = self._flat.gradient, self._betas
        self._first.lerp_(gradient, 1.0 - one)
        self._second.mul_(two).addcmul_(gradient, gradient, value=1.0 - two)
        scale = math.sqrt(1.0 - two**self._count)
        rate = self.rate * scale / (1.0 - one**self._count)
        # Epsilon is scaled instead of the second moment: the same step in one operation less.
        self._flat.vector.data.addcdiv_(self._first, self._second.sqrt().add_(self._epsilon * scale), value=-rate)

    def state(self) -> dict[str, Tensor]:
        return {"first": self._first, "second": self._second, "count": torch.tensor(self._count)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up a state of `state`; the vectors must have the length of the parameters."""
        self._first.copy_(state["first"])
        self._second.copy_(state["second"])
        self._count = int(state["count"])
