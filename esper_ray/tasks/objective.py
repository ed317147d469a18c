"""What a model's outputs are held against: a loss to train on, and loss and score of each sample to measure with.

Outputs are [N, ...] and targets [N, ...]; classes are the outputs' last dimension, or their second one where the
targets' other dimensions follow it, as `torch.nn.functional.cross_entropy` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """Three functions of (outputs, targets).

    Attributes:
        loss: the mean over the batch, a scalar: what is trained on.
        losses: that of each sample, [N]; their mean is the batch's loss.
        score: how good each sample's prediction is, [N], 1 at best. For classes it is the accuracy.
    """

    loss: LossFunction
    losses: LossFunction
    score: LossFunction


def _classes_second(outputs: Tensor, targets: Tensor) -> Tensor:
    """The outputs as [N, classes, ...]."""
    sequence = outputs.dim() > 2 and outputs.shape[:-1] == targets.shape
    return outputs.movedim(-1, 1) if sequence else outputs


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, over all positions."""
    return F.cross_entropy(_classes_second(outputs, targets), targets)


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same for each sample, [N]: the mean over its positions."""
    each = F.cross_entropy(_classes_second(outputs, targets), targets, reduction="none")
    return each.flatten(1).mean(1) if each.dim() > 1 else each


def accuracies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of each sample's positions whose likeliest class is the right one, [N]."""
    hits = (_classes_second(outputs, targets).argmax(1) == targets).float()
    return hits.flatten(1).mean(1) if hits.dim() > 1 else hits


CLASSIFICATION = Objective(cross_entropy, cross_entropies, accuracies)


def from_loss(loss: LossFunction, score: LossFunction | None = None) -> Objective:
    """An objective from a loss alone.

    A sample's loss is the loss of a batch of one, so ``loss`` must be a mean over samples; that of
    `torch.nn.functional.cross_entropy` is computed for all samples at once. Without ``score`` it is the accuracy where
    targets are classes; else 1 / (1 + loss), which only orders models.
    """

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        if loss is F.cross_entropy and outputs.dim() == 2:
            return cross_entropies(outputs, targets)
        return torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]).float() for i in range(len(targets))])

    def guessed(outputs: Tensor, targets: Tensor) -> Tensor:
        if are_classes(outputs, targets):
            return accuracies(outputs, targets)
        return 1.0 / (1.0 + losses(outputs, targets).clamp_min(0.0))

    return Objective(loss, losses, score or guessed)


def are_classes(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets are whole numbers and outputs have one dimension more, over their classes."""
    if targets.is_floating_point() or outputs.dim() != targets.dim() + 1:
        return False
    return outputs.shape[:-1] == targets.shape or outputs.shape[:1] + outputs.shape[2:] == targets.shape
