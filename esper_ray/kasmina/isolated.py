"""The isolated stage, step by step: when a shadow pass is due, what it teaches the seeds, and what the monitor finds.

`arm` comes before the model's own pass and `train` after its backward pass; `finish` ends the watch over live seeds.
What is counted here is the garden's, which a checkpoint carries.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper_ray.contracts.enums import BlendMode
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina import isolation
from esper_ray.kasmina.breakers import Breakers
from esper_ray.kasmina.distillation import Teacher
from esper_ray.kasmina.isolation import LossFunction
from esper_ray.kasmina.leaks import Finding
from esper_ray.kasmina.monitor import Monitor, Probe, Reading, Watch
from esper_ray.kasmina.slot import Pass, Seed
from esper_ray.kasmina.witness import Diverged, Seen, Trace, Witness
from esper_ray.reliability.ids import derive_seed

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden


class IsolatedTraining:
    """Trains a garden's isolated seeds and watches over them, and over the live ones."""

    def __init__(self, garden: Garden, run_seed: int) -> None:
        self._garden, self._run_seed = garden, run_seed
        self._witness = Witness(garden.model, garden.switch)
        self._monitor = Monitor(garden, self._witness.randomness)
        self.breakers = Breakers(garden)
        self.teacher = Teacher(garden, self._witness.randomness)
        self._probe: Probe | None = None
        self._probed: list[Seed] = []
        # Compiled code passes the hooks by that look on at the model's own pass: shadow passes are whole ones then, and
        # the host's gradients, which other kernels computed, are compared with nothing.
        self.blind = False
        # The host's gradients pass through a user's hands before they are looked at.
        self.users_loop = False

    # When

    def due(self, step: int) -> str:
        """Which extra work this step has: "" for none, "shadow", or "watched" where the monitor looks on as well."""
        garden = self._garden
        share = garden.config.shadow_share
        isolated = garden.in_stage(Stage.TRAINING)
        if not isolated or int((step + 1) * share) == int(step * share):
            return ""
        if any(seed.violations for seed in isolated):
            return "watched"
        every = garden.config.monitor_every
        # Not on the first one: that step has the graft to bear already.
        return "watched" if garden.isolated_steps % every == min(1, every - 1) else "shadow"

    def way(self, inputs: Any) -> str:
        """How the shadow pass on this batch will run, for they cost differently.

        "from the slot", "whole", or "measured" where it is done beforehand to measure its memory.
        """
        if self.teacher.undecided:
            return "measured"
        return "from the slot" if self._witness.matches(inputs) else "whole"

    def newcomer(self) -> None:
        """Called before a block is built: hooks that come from now on are not the user's."""
        self._monitor.note_hooks()

    def arm(self, step: int) -> None:
        """Before the model's own pass: keep of it what this step's shadow pass and the monitor will need."""
        self._watch_live(step)
        due = self.due(step)
        if not due or self.blind:
            self._witness.disarm()
            return
        live = [seed.branch for seed in self._garden.live if seed.branch is not None]
        self._witness.arm(self._upstream(), live, watch=due == "watched")

    def _upstream(self) -> Mapping[str, bool]:
        """What ends before the first isolated slot does; nothing where that is not known, or the model looks ahead."""
        garden = self._garden
        if any(seed.mode is BlendMode.CONFIDENCE and seed.alpha < 1.0 for seed in garden.live):
            return {}
        plans = [seed.evidence.get("upstream") for seed in garden.in_stage(Stage.TRAINING)]
        if not plans or any(plan is None for plan in plans):
            return {}
        first: Mapping[str, Any] = min((plan for plan in plans if plan is not None), key=lambda plan: plan["order"])
        modules: Mapping[str, bool] = first["modules"]
        return modules

    # Training

    def train(
        self, step: int, inputs: Tensor, targets: Tensor, loss_function: LossFunction, host_loss: Tensor, *, watch: bool
    ) -> None:
        """Give the isolated seeds their gradients on this batch; see `Garden.train_isolated`."""
        garden = self._garden
        isolated = garden.in_stage(Stage.TRAINING)
        garden.isolated_steps += 1
        overwritten = self._witness.overwritten()
        seen = self._witness.take(inputs)
        watching = Watch(self._monitor, garden, isolated, seen, host_loss, targets, loss_function) if watch else None
        lesson = self.teacher.lesson(isolated, inputs, targets, loss_function, seen)
        trace = self._trace(isolated)
        with trace.looking() if trace else contextlib.nullcontext():
            loss = self._shadow(step, isolated, inputs, targets, lesson or loss_function, seen)
        if lesson is not None:
            loss = lesson.task  # what the seed is worth is asked of the task alone
        self._plan(isolated, trace, overwritten)
        advantage = float(host_loss.detach() - loss)
        for each in isolated:
            assert each.branch is not None
            norms = [p.grad.norm() for p in each.branch.parameters() if p.grad is not None]
            each.gradient_norm = float(torch.stack(norms).norm()) if norms else 0.0
            each.evidence["norms"].append(each.gradient_norm)
            each.evidence["advantages"].append(advantage)
            each.evidence["together"] = len(isolated)
        if watching is not None:
            self._judge(*watching.judge(), isolated, step)

    def host_loss(self, step: int, inputs: Tensor, targets: Tensor, loss_function: LossFunction) -> Tensor:
        """The host's loss as it is now, with what the shadow pass of ``step`` draws: for who has stepped already."""
        garden, seed = self._garden, derive_seed(self._run_seed, "shadow", step)
        return isolation.host_loss(
            garden.model, garden.switch, inputs, targets, loss_function, seed=seed, randomness=self._witness.randomness
        )

    def _shadow(
        self, step: int, isolated: Sequence[Seed], inputs: Tensor, targets: Tensor, loss_function: LossFunction,
        seen: Seen | None,
    ) -> Tensor:  # fmt: skip
        garden = self._garden
        run = functools.partial(
            isolation.shadow_step, garden.model, garden.switch, isolated, inputs, targets, loss_function,
            seed=derive_seed(self._run_seed, "shadow", step), randomness=self._witness.randomness,
        )  # fmt: skip
        try:
            return run(seen=seen)
        except Diverged:
            # This host does not repeat itself: from now on its shadow passes are whole ones.
            for seed in isolated:
                seed.evidence["upstream"]["modules"] = {}
            return run(seen=None if seen is None else replace(seen, kept=None))

    def _trace(self, isolated: Sequence[Seed]) -> Trace | None:
        """A seed's first shadow pass is a whole one, and shows what the later ones need not run."""
        if all("upstream" in seed.evidence for seed in isolated):
            return None
        return Trace(self._garden.model, [slot.info.name for slot in self._garden.slots])

    def _plan(self, isolated: Sequence[Seed], trace: Trace | None, overwritten: set[str]) -> None:
        if trace is not None:
            found = trace.upstream()
            order = list(found)
            for seed in isolated:
                slot = self._garden.slots[seed.slot].info.name
                modules = dict.fromkeys(found.get(slot, []), False)
                seed.evidence["upstream"] = {
                    "order": order.index(slot) if slot in order else len(order), "modules": modules
                }  # fmt: skip
        for seed in isolated:
            modules = seed.evidence["upstream"]["modules"]
            modules.update(dict.fromkeys(overwritten & modules.keys(), True))

    # Watching

    def _watch_live(self, step: int) -> None:
        garden = self._garden
        live, every = garden.live, garden.config.monitor_every
        if live and (step % every == min(1, every - 1) or any(seed.violations for seed in live)):
            self._probe = Probe(garden, live, Pass.MODEL, self._witness.randomness)
            self._probed = live

    def finish(self, step: int) -> None:
        """After a step: judge what the watch over the live seeds saw in it."""
        probe, self._probe = self._probe, None
        if probe is None:
            return
        found = probe.close()
        there = self._garden.seeds
        seeds = [seed for seed in self._probed if any(seed is each for each in there)]
        if probe.looked:
            found += [finding for seed in seeds for finding in self._monitor.standing(seed)]
            self._judge(found, None, seeds, step)

    def _judge(self, found: Sequence[Finding], reading: Reading | None, seeds: Sequence[Seed], step: int) -> None:
        """Count a check and what it found; a finding that names no seed counts against all that were looked at."""
        garden = self._garden
        garden.checks += 1
        for seed in seeds:
            own = [finding for finding in found if finding.seed in (0, seed.number)]
            if own:
                self._violated(seed, own, reading, step)

    def _violated(self, seed: Seed, found: Sequence[Finding], reading: Reading | None, step: int) -> None:
        garden = self._garden
        garden.violations += 1
        seed.violations += 1
        seed.evidence["violations"] = seed.violations
        measured = {}
        if reading is not None:
            measured = {"cosine": reading.cosine, "difference": reading.difference, "ratio": reading.ratio}
        diagnosis = "; ".join(dict.fromkeys(str(finding) for finding in found))
        garden.note("isolation", seed=seed.number, slot=seed.slot, step=step, diagnosis=diagnosis, **measured)
        if seed.violations >= garden.config.isolation_violations:
            self.breakers.open(seed.spec.blueprint)
            epoch = garden.trainer.keep_checkpoint()
            way_back = "" if epoch is None else f"; epoch {epoch} is kept on disk"
            garden.cull(garden.slots[seed.slot], f"{seed.violations} isolation violations, {diagnosis}{way_back}")
