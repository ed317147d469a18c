"""Generalised advantage estimation: a pure function of [T, B] tensors. T is time, B the batch of environments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """What a policy and a value function learn from, both [T, B]."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> Advantages:
    """Advantages by Schulman et al. 2016, "High-dimensional continuous control using GAE", equations 11, 12 and 16.

    Args:
        rewards: [T, B].
        values: [T, B], V of the observation that each step acted on.
        next_values: [T, B], V of the true next observation: at truncation that of the final observation of the
            episode, not of the one after the reset. Ignored at termination, so it may be anything finite there.
        terminated: bool [T, B], the episode ended in a terminal state: there is no value after it.
        truncated: bool [T, B], the episode was cut off: its value goes on, the recursion does not.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    carry = gamma * lambda_ * (~(terminated | truncated)).to(deltas.dtype)
    advantages = backward_sums(deltas, carry)
    return Advantages(advantages, advantages + values)


def backward_sums(terms: Tensor, carry: Tensor) -> Tensor:
    """``y[t] = terms[t] + carry[t] * y[t + 1]`` with ``y[T] = 0``, for [T, B] tensors."""
    sums = torch.empty_like(terms)
    running = torch.zeros_like(terms[0])
    for term, factor, place in zip(
        reversed(terms.unbind(0)), reversed(carry.unbind(0)), reversed(sums.unbind(0)), strict=True
    ):
        running = torch.addcmul(term, factor, running, out=place)
    return sums
