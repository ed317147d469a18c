"""The optimizer and its groups: the host's parameters, and a fresh group for each newborn.

Nothing here ever touches another parameter's moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from esper_ray.config import OptimizerConfig
from esper_ray.kasmina.slot import Seed
from esper_ray.tolaria import multiseed
from esper_ray.tolaria.multiseed import Shared


class Groups:
    """AdamW over the host and the seeds, clipped apart.

    The host's group is number 0; a seed's group carries its number, also after it became a fossil.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._model, self._config = model, config
        self.optimizer = AdamW(
            [{"params": list(model.parameters()), "seed": 0}],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.shared = Shared()
        self._seeds: dict[int, Seed] = {}
        self._host = _in_order(model)

    def adopt(self, seed: Seed) -> None:
        """A group of its own for a newborn; its moments start at zero with a step count of its own.

        What another seed trains already stays in that one's group, and what the host trains in the host's.
        """
        assert seed.branch is not None
        known = {number: other.branch for number, other in self._seeds.items() if other.branch is not None}
        own = self.shared.adopt(seed.number, seed.branch, known)
        trained = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        self._train(seed.number, (parameter for parameter in own if id(parameter) not in trained))
        self._seeds[seed.number] = seed

    def _train(self, number: int, parameters: Iterable[nn.Parameter]) -> None:
        added = list(parameters)
        group = next((group for group in self.optimizer.param_groups if group["seed"] == number), None)
        if group is not None:
            group["params"].extend(added)
        elif added:
            self.optimizer.add_param_group({"params": added, "seed": number})

    def plant(self, seed: Seed) -> None:
        """The parameters of a block that was there before training began belong to the host's own group."""
        assert seed.branch is not None
        self.optimizer.param_groups[0]["params"].extend(seed.branch.parameters())
        self._host = _in_order(self._model)

    def release(self, seed: Seed) -> None:
        """Take a seed's parameters and moments out; what another seed shares with it goes on with that one."""
        assert seed.branch is not None
        for parameter, heir, same in self.shared.release(seed.number):
            self._train(heir, [same])
            if parameter in self.optimizer.state:
                self.optimizer.state[same] = self.optimizer.state.pop(parameter)
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["seed"] != seed.number]
        for parameter in seed.branch.parameters():
            self.optimizer.state.pop(parameter, None)
            parameter.grad = None
        self._seeds.pop(seed.number, None)

    def leftovers(self, seed: int) -> int:
        """Groups of that seed, and moments of parameters that are in no group at all."""
        groups = sum(int(group["seed"]) == seed for group in self.optimizer.param_groups)
        trained = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        orphans = sum(id(parameter) not in trained for parameter in self.optimizer.state)
        return groups + orphans + int(seed in self._seeds)

    def foreign(self, seed: Seed) -> list[int]:
        """Numbers of the groups, other than the seed's own, that hold one of its parameters."""
        assert seed.branch is not None
        own = {id(parameter) for parameter in seed.branch.parameters()}
        groups = (group for group in self.optimizer.param_groups if group["seed"] != seed.number)
        return [int(group["seed"]) for group in groups if any(id(p) in own for p in group["params"])]

    def fossilise(self, seed: Seed) -> None:
        """From now on the seed's gradients are clipped together with the host's."""
        self._seeds.pop(seed.number, None)
        seed.gradient_norm = 0.0
        self._host = _in_order(self._model)

    def weigh(self, weights: Mapping[int, float]) -> None:
        """Scale the gradients of seeds by the weights of their losses; those that are not named keep theirs."""
        multiseed.weigh({n: seed.branch for n, seed in self._seeds.items() if seed.branch is not None}, weights)

    def clip(self) -> Tensor:
        """Clip the host and each live seed to the same norm, each apart; returns the host's norm before."""
        for seed in self._seeds.values():
            assert seed.branch is not None
            norm = _clip(list(seed.branch.parameters()), self._config.clip_norm)
            if norm is not None:
                seed.gradient_norm = float(norm)
        host = _clip(self._host, self._config.clip_norm)
        assert host is not None, "the host has gradients after its backward pass"
        return host

    @property
    def seeds(self) -> dict[int, Seed]:
        """Seeds that have a group and are not fossils."""
        return self._seeds


def _in_order(model: nn.Module) -> list[Tensor]:
    """The parameters by name: an order that does not depend on which block became a fossil first."""
    return [parameter for _, parameter in sorted(model.named_parameters())]


def _clip(parameters: Sequence[Tensor], limit: float) -> Tensor | None:
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(with_gradient, limit) if with_gradient else None
