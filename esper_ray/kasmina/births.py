"""How blocks come into slots: kernels that were asked for are built, judged by G0 and grafted between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from esper_ray.contracts.enums import BlendMode
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import Kernel
from esper_ray.errors import KernelError
from esper_ray.karn import blueprints
from esper_ray.karn.catalog import CATALOG
from esper_ray.kasmina import advance, kernels
from esper_ray.kasmina.slot import Seed, Slot
from esper_ray.reliability.failpoints import passing

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden

KERNEL_PATIENCE_SECONDS = 120.0


class Births:
    """The kernels that a garden waits for.

    Args:
        lockstep: a kernel is waited for and grafted at the first step of the next epoch; else when it is there.
    """

    def __init__(self, garden: Garden, run_seed: int, *, lockstep: bool) -> None:
        self._garden, self._run_seed, self._lockstep = garden, run_seed, lockstep
        self.pending: list[kernels.Pending] = []

    def forget(self, seed: Seed) -> None:
        """That seed is gone: its kernel is not wanted any more."""
        self.pending = [each for each in self.pending if each.seed is not seed]

    def graft_ready(self, step: int) -> None:
        """Graft every kernel that is there, or cull its seed where it will never be."""
        for pending in list(self.pending):
            planned = self._garden.trainer.planned_graft(pending.seed.number)
            if planned is not None and step < planned:
                continue
            wait = KERNEL_PATIENCE_SECONDS if self._lockstep or planned is not None else 0.0
            if not pending.ready(wait):
                if not wait:
                    continue
                pending.error = f"no kernel arrived within {wait:.0f} s"
            self.forget(pending.seed)
            self._graft(pending, step)

    def _graft(self, pending: kernels.Pending, step: int) -> None:
        garden, seed, kernel = self._garden, pending.seed, pending.kernel
        slot = garden.slots[seed.slot]
        if kernel is None:
            garden.cull(slot, f"its kernel did not come: {pending.error}")
            return
        garden.isolated.newcomer()
        module = self._bear(kernel, seed, garden.branch)
        told = self._copy(module, slot)
        evidence = kernels.birth_evidence(kernel, module, slot.info, run_seed=self._run_seed)
        _take(seed, kernel)
        seed.evidence = dict(evidence)
        if not advance.ask(garden, slot, Stage.TRAINING).passed:
            garden.cull(slot, "the newborn did not pass G0")
            return
        passing("garden.born")
        garden.trainer.record_graft(seed.number, step)
        watch = kernels.Stopwatch()
        slot.graft(module)
        garden.trainer.adopt(seed)
        passing("garden.grafted")
        garden.note("graft", seed=seed.number, slot=slot.info.index, step=step, ms=watch.ms())
        garden.enter(slot, Stage.TRAINING, f"kernel {kernel.digest[:12]} grafted{told}")
        seed.evidence = {"norms": [], "advantages": [], "violations": 0}

    def _bear(self, kernel: Kernel, seed: Seed, branch: int) -> nn.Module:
        approved = self._garden.config.approved
        return kernels.bear(kernel, seed, run_seed=self._run_seed, branch=branch, approved=approved)

    def _copy(self, newborn: nn.Module, slot: Slot) -> str:
        """With ``seeds.birth=copy`` begin with the weights of the nearest block of that blueprint; says so."""
        if self._garden.config.birth != "copy" or slot.seed is None:
            return ""
        others = [each for each in self._garden.seeds if each.branch is not None and each is not slot.seed]
        alike = [each for each in others if each.spec.blueprint == slot.seed.spec.blueprint]
        donor = min(alike, key=lambda each: (abs(each.slot - slot.info.index), each.slot), default=None)
        copied = blueprints.copy_birth(newborn, donor.branch) if donor is not None and donor.branch is not None else 0
        return f", {copied} tensors copied from seed {donor.number}" if donor is not None and copied else ""

    def plant(self, slot: Slot, blueprint: str, parameters: Mapping[str, float], mode: BlendMode) -> None:
        """Put a block into a slot as a part of the host, before training begins.

        Raises:
            KernelError: the forge did not deliver.
        """
        garden = self._garden
        spec = CATALOG.get(blueprint, approved=garden.config.approved).spec(slot.info.signature, parameters)
        kernel = garden.source.fetch(spec).wait(KERNEL_PATIENCE_SECONDS)
        if kernel is None:
            raise KernelError(
                f"No kernel of {spec.key} arrived within {KERNEL_PATIENCE_SECONDS:.0f} s.",
                remedy="Look at the forge with `esper status`, then resume the run.",
            )
        seed = Seed(garden.next_number, slot.info.index, spec, Stage.FOSSILIZED, 0, 0, 0, mode, alpha=1.0)
        slot.seed, slot.stage = seed, Stage.FOSSILIZED
        garden.next_number += 1
        _take(seed, kernel)
        slot.graft(self._bear(kernel, seed, 0))
        garden.become_fossil(slot)


def _take(seed: Seed, kernel: Kernel) -> None:
    seed.digest = kernel.digest
    seed.flops_forward = int(kernel.metadata["flops_forward"])
    seed.flops_backward = int(kernel.metadata["flops_backward"])
