"""What acts and is learned: the protocol of a policy, and a multilayer perceptron for environments that bring none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from esper_ray.errors import EnvironmentRefused
from esper_ray.simic.distributions import Categoricals
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.spaces import MASK, Interface


class Acted(NamedTuple):
    """actions int64 [N, H], their log_probs [N], values [N]."""

    actions: Tensor
    log_probs: Tensor
    values: Tensor


class Evaluated(NamedTuple):
    """log_probs [N] of given actions, entropy [N] in nats, values [N]."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


class ActedLike(Protocol):
    """`Acted`, or a larger result with the same fields."""

    @property
    def actions(self) -> Tensor: ...
    @property
    def log_probs(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...


class EvaluatedLike(Protocol):
    """`Evaluated`, or a larger result with the same fields."""

    @property
    def log_probs(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...


@runtime_checkable
class Policy(Protocol):
    """A `torch.nn.Module` that acts. ``obs`` is the flat dictionary of `spaces`, as tensors [N, ...]."""

    def act(self, obs: dict[str, Tensor], *, generator: torch.Generator, greedy: bool = False) -> ActedLike:
        """Draw actions, or take the likeliest."""
        ...

    def evaluate(self, obs: dict[str, Tensor], actions: Tensor) -> EvaluatedLike:
        """How likely actions [N, H] are, with gradients."""
        ...

    def auxiliary_loss(self, obs: dict[str, Tensor], done: Tensor) -> Tensor | None:
        """A loss of the policy's own on a sequence: obs [T, B, ...], done bool [T, B]; None if it has none."""
        ...


class ActorCritic(nn.Module):
    """Two perceptrons of one shape with tanh, one for the policy and one for the value, each layer one batched product.

    Args:
        features: numbers in one observation, all entries flattened side by side.
        heads: choices of each action head.
        hidden: widths of the hidden layers.
        keys: the entries of the observation, in their order; the mask is not one of them.
    """

    def __init__(self, features: int, heads: tuple[int, ...], hidden: tuple[int, ...], keys: tuple[str, ...]) -> None:
        super().__init__()
        self._heads, self._keys = heads, keys
        widths = (features, *hidden)
        self.weights = nn.ParameterList(
            torch.stack([_orthogonal(i, o, math.sqrt(2.0)) for _ in range(2)]) for i, o in itertools.pairwise(widths)
        )
        self.biases = nn.ParameterList(torch.zeros(2, 1, width) for width in hidden)
        self.policy_weight = nn.Parameter(_orthogonal(widths[-1], sum(heads), 0.01))
        self.policy_bias = nn.Parameter(torch.zeros(sum(heads)))
        self.value_weight = nn.Parameter(_orthogonal(widths[-1], 1, 1.0))
        self.value_bias = nn.Parameter(torch.zeros(1))

    def forward(self, obs: Mapping[str, Tensor]) -> tuple[Categoricals, Tensor]:
        """The distribution of actions, and values [N]."""
        parts = [obs[key].flatten(1).float() for key in self._keys]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        towers = flat.expand(2, *flat.shape)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            towers = torch.tanh(torch.baddbmm(bias, towers, weight))
        actor, critic = towers.unbind(0)
        logits = torch.addmm(self.policy_bias, actor, self.policy_weight)
        mask = obs[MASK].flatten(1).bool() if MASK in obs else None
        values = torch.addmm(self.value_bias, critic, self.value_weight).squeeze(-1)
        return Categoricals(logits, self._heads, mask), values

    def act(self, obs: dict[str, Tensor], *, generator: torch.Generator, greedy: bool = False) -> Acted:
        distribution, values = self(obs)
        actions = distribution.mode() if greedy else distribution.sample(generator)
        return Acted(actions, distribution.log_prob(actions), values)

    def evaluate(self, obs: dict[str, Tensor], actions: Tensor) -> Evaluated:
        distribution, values = self(obs)
        return Evaluated(distribution.log_prob(actions), distribution.entropy(), values)

    def auxiliary_loss(self, obs: dict[str, Tensor], done: Tensor) -> Tensor | None:  # noqa: ARG002
        return None


def policy_for(choice: EnvChoice, interface: Interface, *, hidden: tuple[int, ...], seed: int) -> Policy:
    """The environment's own policy, if it has a method ``make_policy``, else a perceptron; weights drawn from ``seed``.

    Raises:
        EnvironmentRefused: the environment's ``make_policy`` gives no policy.
    """
    env = choice.make()
    try:
        make: Any = getattr(env.unwrapped, "make_policy", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if make is None:
                shapes = {key: shape for key, shape, _ in interface.observation}
                features = sum(int(np.prod(shapes[key])) for key in interface.features)
                return ActorCritic(features, interface.heads, hidden, interface.features)
            own = make()
    finally:
        env.close()
    if not (isinstance(own, nn.Module) and isinstance(own, Policy)):
        raise EnvironmentRefused(
            f"make_policy of {choice.id} gives a {type(own).__name__}.",
            why="A policy is a torch module with the methods act, evaluate and auxiliary_loss.",
        )
    return cast("Policy", own)


def module_of(policy: Policy) -> nn.Module:
    """The same object, as the module that it is."""
    assert isinstance(policy, nn.Module)
    return policy


def _orthogonal(inputs: int, outputs: int, gain: float) -> Tensor:
    return nn.init.orthogonal_(torch.empty(outputs, inputs), gain).t().contiguous()
