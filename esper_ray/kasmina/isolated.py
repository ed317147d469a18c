"""The isolated stage: when a shadow pass is due, what it teaches the seeds, and what the monitor makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina import isolation
from esper_ray.kasmina.isolation import LossFunction
from esper_ray.kasmina.slot import Seed
from esper_ray.reliability.ids import derive_seed

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden


class IsolatedTraining:
    """Trains a garden's isolated seeds; what it counts is the garden's, which a checkpoint carries."""

    def __init__(self, garden: Garden, run_seed: int) -> None:
        self._garden, self._run_seed = garden, run_seed

    def due(self, step: int) -> str:
        """Which extra work this step has: "" for none, "shadow", or "watched" where the monitor looks on as well."""
        garden = self._garden
        share = garden.config.shadow_share
        if not garden.in_stage(Stage.TRAINING) or int((step + 1) * share) == int(step * share):
            return ""
        every = garden.config.monitor_every
        # Not on the first one: that step has the graft to bear already.
        return "watched" if garden.isolated_steps % every == min(1, every - 1) else "shadow"

    def train(
        self, step: int, inputs: Tensor, targets: Tensor, loss_function: LossFunction, host_loss: Tensor, *, watch: bool
    ) -> None:
        """Give the isolated seeds their gradients on this batch; see `Garden.train_isolated`."""
        garden = self._garden
        isolated = garden.in_stage(Stage.TRAINING)
        garden.isolated_steps += 1
        expected = None
        if watch:
            expected = isolation.host_gradients(garden.model, garden.switch, inputs, targets, loss_function)
        seed = derive_seed(self._run_seed, "shadow", step)
        loss = isolation.shadow_loss(garden.model, garden.switch, inputs, targets, loss_function, seed=seed)
        if loss.requires_grad:  # a block without parameters has nothing to learn; G1 will see that
            loss.backward()  # type: ignore[no-untyped-call]
        if expected is not None:
            self._judge(isolation.compare(expected, garden.model), isolated, step)
        advantage = float(host_loss.detach() - loss.detach())
        for each in isolated:
            assert each.branch is not None
            norms = [p.grad.norm() for p in each.branch.parameters() if p.grad is not None]
            each.gradient_norm = float(torch.stack(norms).norm()) if norms else 0.0
            each.evidence["norms"].append(each.gradient_norm)
            each.evidence["advantages"].append(advantage)
            each.evidence["together"] = len(isolated)

    def _judge(self, reading: isolation.IsolationReading, isolated: Sequence[Seed], step: int) -> None:
        garden = self._garden
        garden.checks += 1
        if reading.clean(garden.config.isolation_tolerance):
            return
        for seed in isolated:
            garden.violations += 1
            seed.violations += 1
            seed.evidence["violations"] = seed.violations
            garden.note("isolation", seed=seed.number, step=step, cosine=reading.cosine, difference=reading.difference)
            if seed.violations >= garden.config.isolation_violations:
                garden.cull(garden.slots[seed.slot], f"{seed.violations} isolation violations")
