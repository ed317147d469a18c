"""PPO's loss: a pure function of the tensors of one minibatch of N steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PPOLoss(NamedTuple):
    """The loss to minimise, and what it is made of; all scalars, only ``total`` carries a gradient."""

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss(
    log_probs: Tensor,
    values: Tensor,
    entropy: Tensor,
    *,
    behaviour_log_probs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    clip: float,
    value_weight: float,
    entropy_weight: float,
) -> PPOLoss:
    """Schulman et al. 2017, "Proximal policy optimization algorithms", equations 7 and 9; the value loss is unclipped.

    Args:
        log_probs: [N], of the taken actions under the policy that learns.
        values: [N], its V.
        entropy: [N], its entropy.
        behaviour_log_probs: [N], of the same actions under the policy that acted.
        advantages: [N], already normalised if they are to be.
        returns: [N], targets of V.
        clip: epsilon of equation 7.

    ``approx_kl`` is Schulman's estimator k3, mean of (ratio - 1) - log ratio: never negative, of low variance.
    """
    log_ratio = log_probs - behaviour_log_probs
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    policy = -surrogate.mean()
    value = 0.5 * (values - returns).square().mean()
    bonus = entropy.mean()
    with torch.no_grad():
        approx_kl = (ratio - 1.0 - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > clip).to(ratio.dtype).mean()
    total = policy + value_weight * value - entropy_weight * bonus
    return PPOLoss(total, policy.detach(), value.detach(), bonus.detach(), approx_kl, clip_fraction)


def normalised(advantages: Tensor) -> Tensor:
    """Advantages [N] of mean 0 and deviation 1; a single one, or equal ones, become 0."""
    deviation, mean = torch.std_mean(advantages, correction=0)
    return (advantages - mean) / (deviation + 1e-8)
