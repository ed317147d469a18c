"""How sure the model is of its own prediction: what the blend mode CONFIDENCE goes by.

The margin is that of the whole model without the seeds in question, never of some layer's activations: a layer inside
has no classes to be sure of. So the model runs once more, without gradients, before each of its passes. That costs a
forward pass, and only while such a seed is on its ramp: at alpha 1 every sample has the weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper_ray.errors import ConfigError

if TYPE_CHECKING:
    from esper_ray.kasmina.slot import Seed


def margins(output: Any) -> Tensor:
    """Probability of the likeliest class less that of the next, in 0..1: [N], or [N, T] for sequences.

    Args:
        output: logits [N, V], [N, T, V] or [N, V, H, W], alone, under the name ``logits``, or first in a tuple. One
            logit is that of a yes. A map's margin is its mean.

    Raises:
        ConfigError: that is no prediction of classes.
    """
    logits = _logits(output)
    if logits is None:
        raise ConfigError(
            "The blend mode confidence needs a model that predicts classes.",
            why=f"This one answers with {type(output).__name__}, in which no logits were found.",
            remedy="Set seeds.blend_mode=residual.",
        )
    classes = 1 if logits.dim() > 3 else -1
    if logits.shape[classes] == 1:
        found = (2.0 * torch.sigmoid(logits.float()) - 1.0).abs().squeeze(classes)
    else:
        first, second = logits.float().softmax(classes).topk(2, dim=classes).values.unbind(classes)
        found = first - second
    return found.flatten(1).mean(1) if found.dim() > 2 else found


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    fits = isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2
    return output if fits else None


class Gauge:
    """Measures the margin before each pass of the model, while a seed needs it.

    Attributes:
        margin: of the pass that runs now or ran last; None before the first.
        looking: the pass that measures it is under way; seeds on their ramp stay out of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seeds: list[Seed] = []
        self._handle: RemovableHandle | None = None
        self.margin: Tensor | None = None
        self.looking = False

    def add(self, seed: Seed) -> None:
        """This seed joins its slot by confidence; the model gets its hook with the first one."""
        self._seeds.append(seed)
        if self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self, seed: Seed) -> None:
        """That seed is gone, or a part of the host."""
        self._seeds = [each for each in self._seeds if each is not seed]
        if self._handle is not None and not self._seeds:
            self._handle.remove()
            self._handle, self.margin = None, None

    def _look(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.looking or not any(0.0 < seed.alpha < 1.0 for seed in self._seeds):
            return
        # Evaluation mode draws no dropout and moves no statistics: the host cannot notice that it ran twice.
        training = [module for module in model.modules() if module.training]
        self.looking = True
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                self.margin = margins(model(*arguments, **named))
        finally:
            self.looking = False
            for module in training:
                module.training = True
