"""The optimizer of seeds in the user's own loop: the user's kind of optimizer, beside the user's own one.

A group for each seed in the user's optimizer would break schedulers, which count the groups that were there when they
were made. So young seeds are trained by a companion of the same class and settings, which steps when the user's
optimizer does. When a seed becomes a part of the model, its parameters and moments move into the user's first group.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper_ray.config import OptimizerConfig
from esper_ray.errors import HostError
from esper_ray.kasmina.slot import Seed
from esper_ray.tolaria.learning_rate import SEED_START


class Companion:
    """Trains the seeds that are not yet fossils, each in a group of its own, at its own rate, clipped apart."""

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig) -> None:
        self._user, self._config = optimizer, config
        self._own: Optimizer | None = None
        self._seeds: dict[int, Seed] = {}
        self._ages: dict[int, int] = {}
        self._handle = optimizer.register_step_post_hook(lambda *_: self._step())
        self._make([nn.Parameter(torch.zeros(1))])  # finds out now whether that kind can be made

    def _make(self, parameters: list[nn.Parameter]) -> Optimizer:
        """An optimizer of the user's kind, with the settings of the first group."""
        kind, group = type(self._user), self._user.param_groups[0]
        names = set(inspect.signature(kind).parameters) & set(group) - {"params"}
        try:
            return kind(parameters, **{name: group[name] for name in names})
        except (TypeError, ValueError) as error:
            raise HostError(
                f"Seeds cannot be trained by {kind.__name__}.",
                why=f"Another one with its settings cannot be made: {error}",
                remedy="Use an optimizer of torch.optim, such as AdamW or SGD.",
            ) from None

    @property
    def host_rate(self) -> float:
        return float(self._user.param_groups[0]["lr"])

    def rate(self, seed: int) -> float:
        """The host's rate times ``optimizer.seed_rate``, rising from a tenth over the seed's first steps."""
        warmup, age = self._config.seed_warmup_steps, self._ages.get(seed, 0)
        rising = 1.0 if age >= warmup else SEED_START + (1.0 - SEED_START) * age / warmup
        return self.host_rate * self._config.seed_rate * rising

    def adopt(self, seed: Seed) -> None:
        assert seed.branch is not None
        self._seeds[seed.number], self._ages[seed.number] = seed, 0
        parameters = list(seed.branch.parameters())
        if not parameters:
            return
        if self._own is None:
            self._own = self._make(parameters)
            self._own.param_groups[0]["seed"] = seed.number
        else:
            settings = {k: v for k, v in self._own.param_groups[0].items() if k not in ("params", "seed")}
            self._own.add_param_group({"params": parameters, "seed": seed.number, **settings})

    def release(self, seed: Seed) -> None:
        """Take a seed's parameters and moments out."""
        self._seeds.pop(seed.number, None)
        self._ages.pop(seed.number, None)
        self._take_out(seed)

    def fossilise(self, seed: Seed) -> None:
        """The seed's parameters, with their moments, go to the user's first group."""
        assert seed.branch is not None
        self._seeds.pop(seed.number, None)
        self._ages.pop(seed.number, None)
        moments = self._take_out(seed)
        known = {id(p) for group in self._user.param_groups for p in group["params"]}
        joining = [p for p in seed.branch.parameters() if id(p) not in known]
        self._user.param_groups[0]["params"].extend(joining)
        self._user.state.update({p: moments[p] for p in joining if p in moments})
        seed.gradient_norm = 0.0

    def _take_out(self, seed: Seed) -> dict[Any, Any]:
        """The moments of the seed's parameters, which are in the companion no more."""
        own = self._own
        if own is None or seed.branch is None:
            return {}
        own.param_groups[:] = [group for group in own.param_groups if group["seed"] != seed.number]
        moments = {p: own.state.pop(p) for p in seed.branch.parameters() if p in own.state}
        if not own.param_groups:
            self._own = None
        return moments

    def holds(self, seed: int) -> int:
        """How many entries of that seed are left."""
        groups = self._own.param_groups if self._own is not None else []
        return sum(int(group["seed"] == seed) for group in groups) + int(seed in self._seeds)

    def foreign_groups(self, seed: Seed) -> list[int]:
        """Groups, other than its own, that hold a parameter of that seed; 0 is the user's optimizer."""
        if seed.branch is None:
            return []
        own = {id(parameter) for parameter in seed.branch.parameters()}
        groups = [(0, group) for group in self._user.param_groups]
        groups += [(int(group["seed"]), group) for group in (self._own.param_groups if self._own else ())]
        return [number for number, g in groups if number != seed.number and own & {id(p) for p in g["params"]}]

    def _step(self) -> None:
        """One step of the seeds, right after the host's."""
        if self._own is None:
            return
        for group in self._own.param_groups:
            seed = self._seeds[group["seed"]]
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient:
                seed.gradient_norm = float(nn.utils.clip_grad_norm_(with_gradient, self._config.clip_norm))
            group["lr"] = seed.learning_rate = self.rate(seed.number)
            self._ages[seed.number] += 1
        self._own.step()
        self._own.zero_grad(set_to_none=True)

    def close(self) -> None:
        self._handle.remove()
