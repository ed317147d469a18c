"""V-trace: a pure function of [T, B] tensors. T is time, B the batch of environments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper_ray.simic.gae import backward_sums


class VTrace(NamedTuple):
    """Both [T, B]: the targets ``vs`` of the value function, and the advantages of the policy gradient."""

    vs: Tensor
    advantages: Tensor


def vtrace(
    log_rhos: Tensor,
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: float = 1.0,
) -> VTrace:
    """Espeholt et al. 2018, "IMPALA", equations 1 and 2; ``lambda_`` scales c as in their remark 2.

    Args:
        log_rhos: [T, B], log pi(a|x) - log mu(a|x) of the taken actions, unclipped.
        rewards: [T, B].
        values: [T, B], V of the observation that each step acted on.
        next_values: [T, B], V of the true next observation: at truncation that of the final observation of the
            episode. Ignored at termination.
        terminated: bool [T, B], the episode ended in a terminal state: there is no value after it.
        truncated: bool [T, B], the episode was cut off: its value goes on, the recursion does not.

    Returns:
        ``vs`` of equation 1, and the advantages rho_t (r_t + gamma vs_{t+1} - V(x_t)) of the policy gradient, where
        vs_{t+1} is V of the true next observation where no next step of the episode is in the batch.
    """
    rhos = log_rhos.exp()
    clipped = rhos.clamp(max=rho_bar)
    discounts = gamma * (~terminated).to(values.dtype)
    flows = ~(terminated | truncated)
    deltas = clipped * (rewards + discounts * next_values - values)
    carry = discounts * flows * (lambda_ * rhos.clamp(max=c_bar))
    vs = values + backward_sums(deltas, carry)
    following = torch.cat([torch.where(flows[:-1], vs[1:], next_values[:-1]), next_values[-1:]])
    return VTrace(vs, clipped * (rewards + discounts * following - values))
