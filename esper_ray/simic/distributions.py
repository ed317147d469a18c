"""Distributions over actions. Continuous ones can stand beside this with the same four methods."""

from __future__ import annotations

import torch
from torch import Tensor


class Categoricals:
    """H independent choices, one for each head.

    Args:
        logits: [N, sum of heads], the heads side by side.
        heads: number of choices of each.
        mask: [N, sum of heads], true where legal. An illegal choice has probability 0 in float32; a head without any
            legal choice is uniform.
    """

    def __init__(self, logits: Tensor, heads: tuple[int, ...], mask: Tensor | None = None) -> None:
        if mask is not None:
            # Finite, so that an illegal action's log-probability has a gradient of 0 and not of NaN.
            logits = torch.where(mask, logits, torch.finfo(logits.dtype).min / 4)
        parts = (logits,) if len(heads) == 1 else torch.split(logits, list(heads), dim=-1)
        self._log_probs = [part.log_softmax(-1) for part in parts]

    def sample(self, generator: torch.Generator) -> Tensor:
        """Actions [N, H], by the exponential race: the argmax of p / e for e drawn from Exp(1) has distribution p."""
        return self._pick(
            [each.exp() / torch.empty_like(each).exponential_(generator=generator) for each in self._log_probs]
        )

    def mode(self) -> Tensor:
        """The likeliest actions [N, H]."""
        return self._pick(self._log_probs)

    def log_prob(self, actions: Tensor) -> Tensor:
        """[N] of actions [N, H]: the sum over heads."""
        if len(self._log_probs) == 1:
            return self._log_probs[0].gather(-1, actions).squeeze(-1)
        chosen = [each.gather(-1, actions[:, h : h + 1]) for h, each in enumerate(self._log_probs)]
        return torch.cat(chosen, dim=-1).sum(-1)

    def entropy(self) -> Tensor:
        """[N], in nats: the sum over heads."""
        first, *others = [-(each.exp() * each).sum(-1) for each in self._log_probs]
        for other in others:
            first = first + other
        return first

    @staticmethod
    def _pick(scores: list[Tensor]) -> Tensor:
        if len(scores) == 1:
            return scores[0].argmax(-1, keepdim=True)
        return torch.stack([each.argmax(-1) for each in scores], dim=-1)
