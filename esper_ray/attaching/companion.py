"""The optimizer of seeds in the user's own loop: the user's kind of optimizer, beside the user's own one.

A group for each seed in the user's optimizer would break schedulers, which count the groups that were there when they
were made. So young seeds are trained by a companion of the same class and settings, which steps when the user's
optimizer does. When a seed becomes a part of the model, its parameters and moments move into the user's first group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from esper_ray.config import OptimizerConfig, SeedConfig
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import ConfigError, HostError
from esper_ray.kasmina.lifecycle import LIVE
from esper_ray.kasmina.slot import Seed
from esper_ray.tolaria import multiseed
from esper_ray.tolaria.learning_rate import SEED_START, trust_ratio


class Companion:
    """Trains the seeds that are not yet fossils, each in a group of its own, at its own rate, clipped apart.

    Args:
        stepped: called after each step of the user's optimizer, while its gradients are there.

    Attributes:
        isolated_later: isolated seeds get their gradients only after the user's step, and `step_isolated` takes theirs.
    """

    def __init__(
        self, optimizer: Optimizer, config: OptimizerConfig, seeds: SeedConfig, stepped: Callable[[], None]
    ) -> None:
        if seeds.rate_policy == "adaptive" and not isinstance(optimizer, Adam | AdamW):
            raise ConfigError(
                f"seeds.rate_policy=adaptive does not work with {type(optimizer).__name__}.",
                why="It compares a seed's weights with Adam's update of them.",
                remedy="Use Adam or AdamW, or another policy.",
            )
        self._user, self._config, self._policy = optimizer, config, seeds
        self._own: Optimizer | None = None
        self._seeds: dict[int, Seed] = {}
        self._ages: dict[int, int] = {}
        self._fossils: list[int] = []
        self._stepped = stepped
        self.isolated_later = False
        self._handle = optimizer.register_step_post_hook(lambda *_: self._follow())
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

    def rate(self, seed: Seed, group: Mapping[str, Any]) -> float:
        """The host's rate times ``optimizer.seed_rate``, and what ``seeds.rate_policy`` makes of it."""
        policy = self._policy.rate_policy
        if policy == "frozen" and seed.stage in LIVE:
            return 0.0
        warmup, age = (0 if policy == "host" else self._config.seed_warmup_steps), self._ages.get(seed.number, 0)
        rising = 1.0 if age >= warmup else SEED_START + (1.0 - SEED_START) * age / warmup
        if policy == "adaptive" and self._own is not None:
            rising *= trust_ratio(self._own, group)
        return self.host_rate * self._config.seed_rate * rising

    def adopt(self, seed: Seed) -> None:
        """A group of its own for a newborn.

        Raises:
            HostError: another seed trains one of its parameters.
        """
        assert seed.branch is not None
        parameters = list(seed.branch.parameters())
        there = {id(p) for other in self._seeds.values() if other.branch is not None for p in other.branch.parameters()}
        if any(id(parameter) in there for parameter in parameters):
            raise HostError(
                f"A block of {seed.spec.blueprint} shares parameters with another seed.",
                why="Gradient surgery, which that needs, is not done in a loop of your own.",
                remedy="Let Tolaria train the model (`esper run --task`), or use another blueprint.",
            )
        self._seeds[seed.number], self._ages[seed.number] = seed, 0
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
        self._fossils.append(seed.number)
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

    def trained(self, seed: Seed) -> list[nn.Parameter]:
        """Parameters of a seed that are trained here."""
        return list(seed.branch.parameters()) if seed.number in self._seeds and seed.branch is not None else []

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

    def _follow(self) -> None:
        """The user's optimizer has stepped."""
        self._stepped()
        self._step({n: seed for n, seed in self._seeds.items() if not (self.isolated_later and _isolated(seed))})

    def step_isolated(self) -> None:
        """One step of the isolated seeds, whose gradients came after the user's step."""
        self._step({number: seed for number, seed in self._seeds.items() if _isolated(seed)})

    def _step(self, seeds: Mapping[int, Seed]) -> None:
        if self._own is None or not seeds:
            return
        if self._policy.loss_weights == "gain":
            weights = multiseed.weights_by_gain({n: seed.evidence.get("gain") for n, seed in seeds.items()})
            multiseed.weigh({n: seed.branch for n, seed in seeds.items() if seed.branch is not None}, weights)
        for group in self._own.param_groups:
            seed = seeds.get(group["seed"])
            if seed is None:
                continue
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient:
                seed.gradient_norm = float(nn.utils.clip_grad_norm_(with_gradient, self._config.clip_norm))
            group["lr"] = seed.learning_rate = self.rate(seed, group)
            self._ages[seed.number] += 1
        self._own.step()
        self._own.zero_grad(set_to_none=True)

    def close(self) -> None:
        self._handle.remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, of plain types and tensors."""
        groups = self._own.param_groups if self._own is not None else []
        return {
            "groups": [int(group["seed"]) for group in groups],
            "ages": dict(self._ages),
            "fossils": list(self._fossils),
            "optimizer": self._own.state_dict() if self._own is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], seeds: Mapping[int, Seed]) -> None:
        """Take the seeds of a restored model, each where it was.

        The user's optimizer gets the fossils' parameters, in their old order, and not their moments: those are in its
        own state.
        """
        assert self._own is None, "nothing was trained yet"
        for number in state["fossils"]:
            self.fossilise(seeds[number])
        young = [number for number in state["ages"] if number not in state["groups"]]
        for number in [*state["groups"], *young]:
            self.adopt(seeds[number])
        self._ages = dict(state["ages"])
        if state["optimizer"] is not None:
            assert self._own is not None
            self._own.load_state_dict(state["optimizer"])


def _isolated(seed: Seed) -> bool:
    return seed.stage is Stage.TRAINING
