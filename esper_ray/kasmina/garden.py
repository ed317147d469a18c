"""All the seeds of one model: their stages and slots, and the ramp of each alpha.

The trainer drives it: `before_step` and `train_isolated` in each step, `close_epoch` with the measured figures,
`apply` for each command. What happened is in `drain_events`, each event once. Commands are judged in `orders.py`,
kernels grafted in `births.py`, isolated seeds trained in `isolated.py`, and the gates run in `advance.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import BlendMode
from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedState
from esper_ray.contracts.ports import KernelSource, SlotInfo
from esper_ray.kasmina import advance, kernels, orders
from esper_ray.kasmina.advance import EpochEnd, SeedMeasurement
from esper_ray.kasmina.births import Births
from esper_ray.kasmina.blending import alpha_at
from esper_ray.kasmina.gates import Verdict
from esper_ray.kasmina.isolated import IsolatedTraining
from esper_ray.kasmina.isolation import LossFunction
from esper_ray.kasmina.lifecycle import LIVE, SETTLED, gate_of
from esper_ray.kasmina.limits import Limits
from esper_ray.kasmina.slot import Seed, Slot, Switch
from esper_ray.reliability.failpoints import passing

GROWN = "esper_grown"
# How often a ramp looks at how far the slot's output has moved, whatever its length.
SAMPLES_PER_RAMP = 16


class Trainer(Protocol):
    """What the garden asks of the loop that trains its model."""

    def adopt(self, seed: Seed) -> None:
        """Give the newborn's parameters an optimizer group of their own."""

    def release(self, seed: Seed) -> None:
        """Take a culled seed's parameters out of the optimizer; count in ``leftovers`` what remains."""

    def fossilise(self, seed: Seed) -> None:
        """The seed's parameters are the host's from now on."""

    def leftovers(self, seed: int) -> int:
        """How many optimizer entries of that seed remain."""

    def foreign_groups(self, seed: Seed) -> list[int]:
        """Numbers of the optimizer groups, other than its own, that hold a parameter of that seed; 0 is the host's."""

    def keep_checkpoint(self) -> int | None:
        """See to it that the run can go back to before this; returns the epoch that is on disk, or None."""

    def planned_graft(self, seed: int) -> int | None:
        """The step at which a resumed run grafted that seed before, or None."""

    def record_graft(self, seed: int, step: int) -> None:
        """Make the step durable before the graft takes effect."""


class Grown(nn.ModuleDict):
    """What has become a part of the host. Called, it gives back what it gets: a host may be a chain of its children."""

    def forward(self, h: Tensor) -> Tensor:
        return h


class Garden:
    """The seeds of one model.

    Args:
        model: the host; slots are hooks on its submodules, by name.
        slots: where seeds may grow, in the order of their index.
        source: where ready kernels come from.
        run_seed: names all random draws of the seeds.
        max_parameters: G0 refuses a seed that would grow the model beyond this.
        lockstep: a kernel is waited for and grafted at the first step of the next epoch; else when it is there.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[SlotInfo],
        config: SeedConfig,
        source: KernelSource,
        trainer: Trainer,
        *,
        run_seed: int,
        max_parameters: int,
        lockstep: bool,
    ) -> None:
        self.model, self.config, self.trainer = model, config, trainer
        self.source, self.max_parameters, self.limits = source, max_parameters, Limits()
        self.switch = Switch(model)
        self.slots = [Slot(info, model.get_submodule(info.name), self.switch) for info in slots]
        self.branch, self.next_number, self.epoch = 0, 1, 0
        self.culled = self.checks = self.violations = self.isolated_steps = 0
        self.last = EpochEnd()
        self.births = Births(self, run_seed, lockstep=lockstep)
        self.isolated = IsolatedTraining(self, run_seed)
        self._events: list[dict[str, Any]] = []

    # What there is

    @property
    def seeds(self) -> list[Seed]:
        """Every seed that is in a slot now, fossils included."""
        return [slot.seed for slot in self.slots if slot.seed is not None]

    def in_stage(self, *stages: Stage) -> list[Seed]:
        return [seed for seed in self.seeds if seed.stage in stages]

    @property
    def live(self) -> list[Seed]:
        """Seeds that move the output now and can be turned off: these are measured counterfactually."""
        return [seed for seed in self.in_stage(*LIVE) if seed.alpha > 0.0]

    def parameter_count(self) -> int:
        """Parameters of the host and of every seed in a slot."""
        own = sum(parameter.numel() for parameter in self.model.parameters())
        return own + sum(seed.parameter_count for seed in self.seeds if seed.stage not in SETTLED)

    def parameters_in_path(self) -> int:
        """Parameters that the model's predictions depend on."""
        own = sum(parameter.numel() for parameter in self.model.parameters())
        return own + sum(seed.parameter_count for seed in self.live)

    def states(self) -> tuple[SeedState, ...]:
        """One `SeedState` for each slot that is not dormant, as Tamiyo gets them."""
        return tuple(self._state(slot) for slot in self.slots if slot.stage is not Stage.DORMANT)

    def _state(self, slot: Slot) -> SeedState:
        seed = slot.seed
        if seed is None:
            return SeedState(0, slot.info.index, 0, slot.stage)
        # What a fossil is worth is not measured any more: it can no longer be told from its host.
        known = () if seed.stage in SETTLED else (("g", "gain"), ("ge", "gain_error"))
        return SeedState(
            seed=seed.number,
            slot=slot.info.index,
            blueprint=seed.blueprint,
            stage=seed.stage,
            alpha=seed.alpha,
            gradient_norm=seed.gradient_norm,
            learning_rate=seed.learning_rate,
            age_epochs=max(0, self.epoch - seed.born_epoch),
            metrics={key: seed.evidence[name] for key, name in known if name in seed.evidence},
        )

    def drain_events(self) -> list[dict[str, Any]]:
        """What happened since the last call: stages, gates, grafts, isolation violations, refusals."""
        events, self._events = self._events, []
        return events

    def told(self) -> list[dict[str, Any]]:
        """What `drain_events` would give, which stays."""
        return list(self._events)

    def note(self, kind: str, **fields: Any) -> None:
        self._events.append({"kind": kind, **fields})

    # Commands

    def apply(self, command: AdaptationCommand) -> str:
        """Carry out one seed command; returns why it was refused, or an empty text.

        A GERMINATE only asks for its kernel: the graft happens later, between two steps.
        """
        return orders.carry_out(self, command)

    def expect(self, pending: kernels.Pending) -> None:
        """Graft that kernel when it is there."""
        self.births.pending.append(pending)

    def drop_pending(self) -> None:
        """Graft nothing of what was asked for."""
        self.births.pending.clear()

    def expected(self, slot: Slot) -> int:
        """How many kernels are on their way to that slot."""
        return sum(pending.seed.slot == slot.info.index for pending in self.births.pending)

    # Stages

    def stay(self, slot: Slot) -> int:
        """Epochs that the seed of a slot has spent in its stage, those that have ended."""
        return self.epoch - slot.seed.stage_epoch if slot.seed is not None else 0

    def enter(self, slot: Slot, stage: Stage, reason: str) -> None:
        """Move a slot and its seed to ``stage``, which the table must allow, and note it."""
        gate_of(slot.stage, stage)
        seed, before = slot.seed, slot.stage
        slot.stage = stage
        if seed is not None:
            seed.stage, seed.stage_epoch = stage, self.epoch
        self.note(
            "stage",
            # The embargo of a slot belongs to the seed that brought it about.
            seed=seed.number if seed else slot.last_seed * (before is not Stage.DORMANT),
            slot=slot.info.index,
            **{"from": before.name, "to": stage.name},
            blueprint=seed.spec.blueprint if seed else "",
            reason=reason,
        )
        passing("garden.entered")

    def note_gate(self, gate: Gate, verdict: Verdict, seed: int, slot: int, before: Stage, to: Stage) -> None:
        self.note(
            "gate",
            **{"seed": seed, "slot": slot, "gate": gate.name, "from": before.name, "to": to.name},
            passed=verdict.passed,
            evidence=dict(verdict.evidence),
            reason=verdict.reason,
        )

    def cull(self, slot: Slot, reason: str) -> None:
        """The slot is identity again at once; its parameters leave the optimizer."""
        seed = slot.seed
        assert seed is not None
        self.enter(slot, Stage.CULLED, reason)
        self.births.forget(seed)
        if seed.branch is not None:
            self.trainer.release(seed)
        slot.last_seed = seed.number
        slot.clear()
        self.culled += 1
        passing("garden.culled")

    def become_fossil(self, slot: Slot) -> None:
        """Register the branch as a part of the host: from now on the two train as one."""
        seed = slot.seed
        assert seed is not None
        assert seed.branch is not None
        grown = getattr(self.model, GROWN, None)
        if grown is None:
            grown = Grown()
            self.model.add_module(GROWN, grown)
        grown[self.grown_name(slot)] = seed.branch
        slot.settle()

    def grown_name(self, slot: Slot) -> str:
        """The name of a slot's block among the model's modules: no other slot has it."""
        plain = [each.info.name.replace(".", "_") for each in self.slots]
        name = plain[slot.info.index]
        return name if plain.count(name) == 1 else f"{name}__{slot.info.index}"

    def plant_fossil(
        self, slot_index: int, blueprint: str, parameters: Mapping[str, float], mode: BlendMode = BlendMode.RESIDUAL
    ) -> None:
        """Put a block into a slot before training begins: the final-size model from scratch is made of these."""
        self.births.plant(self.slots[slot_index], blueprint, parameters, mode)

    # Steps

    def before_step(self, step: int) -> None:
        """Graft what is ready and move every ramp. Costs nothing while no seed is under way."""
        self.isolated.finish(step - 1)
        self.births.graft_ready(step)
        for seed in self.in_stage(Stage.BLENDING):
            if self.epoch < seed.held_until:
                # A held ramp stands still, and goes on from where it stood.
                seed.ramp_start += 1
                continue
            done = step + 1 - seed.ramp_start
            seed.alpha = alpha_at(seed.schedule, done / seed.ramp_steps)
            seed.sample = done % max(1, seed.ramp_steps // SAMPLES_PER_RAMP) == 0
        self.isolated.arm(step)

    def structure(self) -> tuple[tuple[int, int, bool], ...]:
        """(seed, stage, in the path) of each taken slot: models of equal structure cost the same."""
        return tuple((seed.number, int(seed.stage), seed.alpha > 0.0) for seed in self.seeds)

    def shadow_due(self, step: int) -> str:
        """Which extra work this step has: "" for none, "shadow", or "watched" where the monitor looks on as well."""
        return self.isolated.due(step)

    def train_isolated(
        self, step: int, inputs: Tensor, targets: Tensor, loss_function: LossFunction, host_loss: Tensor, *, watch: bool
    ) -> None:
        """Give the isolated seeds their gradients on this batch.

        The host's gradients are in place when this is called; with ``watch`` the monitor checks that they are those
        of a model without the seeds, and stay so.
        """
        self.isolated.train(step, inputs, targets, loss_function, host_loss, watch=watch)

    # Epochs

    def close_epoch(
        self, epoch: int, *, step: int, steps_per_epoch: int, loss: float, measured: Mapping[int, SeedMeasurement]
    ) -> None:
        """Run the gates on what the epoch showed and move each seed on, or out."""
        self.isolated.finish(step - 1)
        self.epoch, self.last = epoch, EpochEnd(step, steps_per_epoch, loss)
        advance.close_epoch(self, measured)
        self.isolated.breakers.settle()
        self.epoch = epoch + 1
