"""IMPALA's loss: a pure function of the [T, B] tensors of one batch of trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper_ray.simic.vtrace import vtrace


class ImpalaLoss(NamedTuple):
    """The loss to minimise, and what it is made of; scalars, but for ``errors`` [B].

    ``errors`` is the mean absolute V-trace error of each trajectory: the priority of a replayed segment.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    errors: Tensor


def impala_loss(
    log_probs: Tensor,
    values: Tensor,
    next_values: Tensor,
    entropy: Tensor,
    *,
    behaviour_log_probs: Tensor,
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    gamma: float,
    rho_bar: float,
    c_bar: float,
    lambda_: float,
    value_weight: float,
    entropy_weight: float,
    normalise: bool = False,
    weights: Tensor | None = None,
) -> ImpalaLoss:
    """Espeholt et al. 2018, section 4.2: V-trace policy gradient, value loss, entropy bonus; means over valid steps.

    Args:
        log_probs, values, entropy: [T, B], of the policy that learns.
        next_values: [T, B], as in `vtrace`; no gradient goes through it.
        behaviour_log_probs, rewards, terminated, truncated: [T, B], what was recorded.
        valid: bool [T, B]; False for what is no transition, such as the reset between two episodes.
        normalise: give the advantages of the valid steps mean 0 and deviation 1. The paper does not; but while V is far
            from the returns, as in the first hundreds of updates, all advantages have one sign and little else.
        weights: [B], importance weights of the trajectories (Schaul et al. 2016); 1 by default.
    """
    with torch.no_grad():
        log_rhos = log_probs - behaviour_log_probs
        targets = vtrace(
            log_rhos,
            rewards,
            values,
            next_values,
            terminated,
            truncated,
            gamma=gamma,
            rho_bar=rho_bar,
            c_bar=c_bar,
            lambda_=lambda_,
        )
        share = valid.to(values.dtype)
        steps = share.sum().clamp(min=1.0)
        errors = ((targets.vs - values).abs() * share).sum(0) / share.sum(0).clamp(min=1.0)
        advantages = _normalised(targets.advantages, valid) if normalise else targets.advantages
        approx_kl = ((log_rhos.exp() - 1.0 - log_rhos) * share).sum() / steps
        weighted = share / steps if weights is None else share * weights / steps
    policy = -(weighted * log_probs * advantages).sum()
    value = 0.5 * (weighted * (targets.vs - values).square()).sum()
    bonus = (weighted * entropy).sum()
    total = policy + value_weight * value - entropy_weight * bonus
    return ImpalaLoss(total, policy.detach(), value.detach(), bonus.detach(), approx_kl, errors)


def _normalised(advantages: Tensor, valid: Tensor) -> Tensor:
    """[T, B], of mean 0 and deviation 1 over the valid steps."""
    if not valid.any():
        return advantages
    deviation, mean = torch.std_mean(advantages[valid], correction=0)
    return (advantages - mean) / (deviation + 1e-8)
