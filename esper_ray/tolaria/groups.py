"""The optimizer and its groups: the host's parameters, and a fresh group for each newborn.

Nothing here ever touches another parameter's moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from esper_ray.config import OptimizerConfig
from esper_ray.kasmina.slot import Seed


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
        self._seeds: dict[int, Seed] = {}
        self._host = _in_order(model)

    def adopt(self, seed: Seed) -> None:
        """A group of its own for a newborn; its moments start at zero with a step count of its own."""
        assert seed.branch is not None
        parameters = list(seed.branch.parameters())
        if parameters:
            self.optimizer.add_param_group({"params": parameters, "seed": seed.number})
        self._seeds[seed.number] = seed

    def plant(self, seed: Seed) -> None:
        """The parameters of a block that was there before training began belong to the host's own group."""
        assert seed.branch is not None
        self.optimizer.param_groups[0]["params"].extend(seed.branch.parameters())
        self._host = _in_order(self._model)

    def release(self, seed: Seed) -> None:
        """Take a seed's parameters and moments out."""
        assert seed.branch is not None
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["seed"] != seed.number]
        for parameter in seed.branch.parameters():
            self.optimizer.state.pop(parameter, None)
            parameter.grad = None
        self._seeds.pop(seed.number, None)

    def leftovers(self, seed: int) -> int:
        groups = sum(int(group["seed"]) == seed for group in self.optimizer.param_groups)
        return groups + int(seed in self._seeds)

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
