"""`Grower`: Kasmina's seeds and Tamiyo's decisions in a loop that is not ours.

What it costs, beside what the seeds themselves compute: each seed's shadow pass on half of the batches while it is
isolated; at each epoch's end one pass over the validation data, and one more for each seed that can be left out; one
microsecond a step for each slot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_ray import inprocess
from esper_ray.attaching import ground, saving
from esper_ray.attaching.companion import Companion
from esper_ray.attaching.report import EpochReport
from esper_ray.attaching.sockets import Sockets
from esper_ray.config import Config
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import SystemState
from esper_ray.contracts.signing import Signer, Verifier
from esper_ray.errors import ConfigError, HostError
from esper_ray.kasmina.export import export_model
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.limits import Limits
from esper_ray.kasmina.monitor import Rescaled
from esper_ray.kasmina.slot import Seed
from esper_ray.reliability.ids import new_run_id
from esper_ray.tasks import slots as places
from esper_ray.tasks.data import Split
from esper_ray.tasks.objective import Objective
from esper_ray.tasks.propose import Proposal
from esper_ray.tolaria import rows, statistics
from esper_ray.tolaria.boundary import Boundary
from esper_ray.tolaria.costs import CostMeter, forward_flops
from esper_ray.tolaria.measure import Quality, evaluate, measure_seeds

if TYPE_CHECKING:
    from esper_ray.runtime import Session
    from esper_ray.tolaria.trainer import Surroundings

STATISTICS_EVERY = 16


class Grower:
    """Made by `attach`. `step` and `epoch` are the two lines in the loop."""

    def __init__(
        self,
        model: nn.Module,
        slots: places.Slots | Literal["auto"],
        objective: Objective,
        optimizer: Optimizer,
        config: Config,
        *,
        epochs: int,
        accumulate: int,
        system: Session | None,
    ) -> None:
        if config.run.max_step_ms:
            raise ConfigError(
                "run.max_step_ms does not work in a loop of your own.",
                why="Your steps are not timed here.",
                remedy="Use run.max_flops or run.max_parameters.",
            )
        self.model, self.optimizer, self.config, self.epochs = model, optimizer, config, epochs
        self.name = new_run_id("own")
        self.meter = CostMeter()
        self._wanted, self._objective, self._scale = slots, objective, 1.0 / accumulate
        self._around = _over_ray(system) if system is not None else inprocess.surroundings(config)
        self._sockets = Sockets(model, slots) if slots != "auto" else None
        self.companion = Companion(optimizer, config.optimizer, config.seeds, self._stepped)
        self._ground: ground.Ground | None = None
        self._garden: Garden | None = None
        self._validation: Split | None = None
        self.place = saving.Place(torch.zeros((), dtype=torch.float64, device=places.device_of(model)))
        self._steps_seen = -1

    def prepare(self, sample: Tensor) -> None:
        """Find the slots and their shapes by a dry forward of ``sample`` [N, ...]; `step` does it where nobody did.

        Raises:
            HostError: a slot does not do; the text says which and why.
        """
        model, run = self.model, self.config.run
        with self._plainly():
            self._ground = found = ground.explore(model, self._wanted, sample)
        self._sockets = self._sockets or Sockets(model, [slot.name for slot in found.slots])
        self._garden = garden = Garden(
            model, found.slots, self.config.seeds, self._around.kernels, self,
            run_seed=run.seed, max_parameters=run.max_parameters, lockstep=run.mode == "lockstep",
        )  # fmt: skip
        garden.isolated.users_loop = True
        garden.limits = Limits(flops=run.max_flops)
        if run.max_flops:
            with places.undisturbed(model):
                garden.limits.host_flops = forward_flops(model, found.sample[:2])
        self._sockets.take(garden.slots)
        self._sockets.forget()
        self.place.statistics = statistics.layer_statistics(found.graph, model)
        self._boundary = Boundary(
            self._around.decider, Signer(self._around.keys, "tolaria", clock=self._around.clock),
            Verifier(self._around.keys, clock=self._around.clock), apply=garden.apply,
            lockstep=run.mode == "lockstep",
        )  # fmt: skip
        self._open()

    def _open(self) -> None:
        found, garden, epoch = self.ground, self.garden, self.place.epoch
        told = ground.opening(self.name, found, garden, self.config, self._around, epochs=self.epochs, epoch=epoch)
        self._around.decider.open_run(told)

    def rename(self, name: str) -> None:
        """Go on under that name where that one stands: Tamiyo remembers it."""
        self._around.decider.close_run(self.name)
        self.name = name
        self._open()

    @property
    def ground(self) -> ground.Ground:
        """What is known of the model.

        Raises:
            HostError: no sample was given, and no step done yet.
        """
        if self._ground is None:
            raise _unknown()
        return self._ground

    @property
    def garden(self) -> Garden:
        """The seeds of the model.

        Raises:
            HostError: no sample was given, and no step done yet.
        """
        if self._garden is None:
            raise _unknown()
        return self._garden

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """With slots="auto", where the model can grow and why there."""
        return self._ground.proposals if self._ground is not None else ()

    # The two lines

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Call this once in each step: before ``optimizer.step()`` and before gradients are clipped; or after it.

        It gives isolated seeds their gradients on this batch; the host's gradients are not touched. Before the step
        they are compared with those of a model without seeds, and a shadow pass takes over what the model's own pass
        has computed. After it both have to do without, and the host's loss is computed again for each shadow pass.

        Args:
            inputs, targets: the batch, the last one where gradients are accumulated.
            loss: what ``backward`` was called on.

        Raises:
            HostError: the slots were not reached by the model's pass, so that seeds would do nothing; or gradients
                were clipped before.
        """
        place = self.place
        if place.after is None:
            place.after = self.companion.isolated_later = self._has_stepped()
        if self._garden is None:
            self.prepare(inputs)
        else:
            self._learn(inputs, targets, loss)
            blocks = sum(seed.flops_forward + seed.flops_backward for seed in self.garden.seeds if seed.alpha > 0.0)
            place.samples += len(targets)
            place.flops += len(targets) * (self.ground.flops + blocks)
        place.loss_sum += loss.detach().double() / self._scale
        place.step, place.since = place.step + 1, place.since + 1
        self.garden.before_step(place.step)

    def _learn(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """What the step teaches the isolated seeds."""
        garden, step = self.garden, self.place.step
        self._look_at_the_pass()
        due = garden.shadow_due(step)
        if due:
            key = (due, garden.isolated.way(inputs), garden.structure())
            with self._as_trained(), self.meter.charge(key, len(targets), later=due == "shadow"):
                if self.place.after:
                    loss = garden.isolated.host_loss(step, inputs, targets, self._loss)
                try:
                    garden.train_isolated(step, inputs, targets, self._loss, loss, watch=due == "watched")
                except Rescaled as change:
                    raise _clipped(str(change)) from None
        if self.place.after:
            self.companion.step_isolated()
        elif self.place.since % STATISTICS_EVERY == 0:
            self.place.statistics = statistics.layer_statistics(self.ground.graph, self.model)

    def epoch(self, validation: Iterable[tuple[Tensor, Tensor]]) -> EpochReport:
        """Call this at each epoch's end: measure, let the gates judge, ask Tamiyo, carry out what she says.

        Args:
            validation: batches of (inputs, targets) that the model is not trained on. They are read at the first call,
                up to ``run.validation_samples``, and kept: seeds are measured on and off on the same samples.
        """
        garden, place = self.garden, self.place
        if place.since == 0:
            raise HostError("No step was done since the last epoch.", remedy="Call step() in each step of the loop.")
        most = self.config.run.validation_samples
        self._validation = self._validation or ground.held_out(validation, self._objective, self.model, most)
        structure = garden.structure()
        with places.undisturbed(self.model), self._as_trained():
            quality = evaluate(self.model, self._validation, self.meter, structure)
            measured, _ = measure_seeds(garden, self._validation, quality, self.meter, structure)
        training_loss, steps = float(place.loss_sum) / place.since, place.since
        place.epoch, place.since = place.epoch + 1, 0
        place.loss_sum.zero_()
        # The next step's ramps are set already: a ramp that begins here begins with the step after it.
        garden.close_epoch(
            place.epoch, step=place.step + 1, steps_per_epoch=steps, loss=quality.loss, measured=measured
        )
        exchange = self._boundary.exchange(
            lambda: (self._state(training_loss, quality), self.place.statistics), record=lambda *_: None
        )
        # What the stages are now decides what has to be looked at in the next step.
        garden.isolated.arm(place.step)
        return EpochReport(
            epoch=place.epoch,
            training_loss=training_loss,
            loss=quality.loss,
            score=quality.accuracy,
            parameters=garden.parameters_in_path(),
            why=str(rows.decision(exchange)["why"]),
            seeds=tuple(self._describe(seed) for seed in garden.seeds),
            events=tuple(garden.drain_events()),
        )

    # Afterwards

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the loop goes on: model, optimizer, seeds, torch's generators. See `saving`.

        Call it after `step` and ``optimizer.step()``, before the next pass; or after `epoch`.
        """
        return saving.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: for a model that was just attached, in the same way as then.

        Raises:
            CheckpointError: it belongs to another model, or to other settings; or this one has trained already.
        """
        saving.restore(self, state)

    def export(self, folder: Path | str) -> dict[str, Any]:
        """Write the model as it predicts now, for plain PyTorch; see `kasmina.export`."""
        with places.undisturbed(self.model), self._plainly():
            return export_model(self.garden, self.ground.sample, Path(folder))

    def close(self) -> None:
        """The loop is over. What is a part of the model stays in it; hooks and decisions end."""
        if self._garden is not None:
            self._around.decider.close_run(self.name)
        if self._sockets is not None:
            self._sockets.remove()
        self.companion.close()

    # What the garden asks for

    def adopt(self, seed: Seed) -> None:
        assert seed.branch is not None
        seed.branch.to(places.device_of(self.model))
        self.companion.adopt(seed)

    def release(self, seed: Seed) -> None:
        self.companion.release(seed)

    def fossilise(self, seed: Seed) -> None:
        self.companion.fossilise(seed)

    def leftovers(self, seed: int) -> int:
        return self.companion.holds(seed)

    def foreign_groups(self, seed: Seed) -> list[int]:
        return self.companion.foreign_groups(seed)

    def keep_checkpoint(self) -> None:
        """Checkpoints are the loop's own affair."""

    def planned_graft(self, seed: int) -> int | None:  # noqa: ARG002
        """Nothing is repeated here."""
        return None

    def record_graft(self, seed: int, step: int) -> None:
        """Nothing is written down here."""

    # Parts

    def _stepped(self) -> None:
        """The user's optimizer has stepped, and the gradients are still there."""
        self._steps_seen = self._sockets.passes if self._sockets is not None else 0
        if self.place.after and self.place.since % STATISTICS_EVERY == 0:
            self.place.statistics = statistics.layer_statistics(self.ground.graph, self.model)

    def _has_stepped(self) -> bool:
        """Whether the optimizer has stepped since the model's last pass."""
        return self._steps_seen == (self._sockets.passes if self._sockets is not None else 0)

    def _look_at_the_pass(self) -> None:
        sockets, isolated = self._sockets, self.garden.isolated
        assert sockets is not None
        sockets.demand_reached()
        sockets.settle()
        isolated.blind = isolated.blind or sockets.compiled or bool(self.place.after)
        if isolated.blind and self.config.seeds.distill:
            raise HostError(
                "seeds.distill does not work here.",
                why="A seed would learn from the answers of the model's own pass, and those are not seen in a compiled "
                "model, or when grower.step() comes after optimizer.step().",
                remedy="Leave the model uncompiled and call grower.step() first; or set seeds.distill=false.",
            )

    def _plainly(self) -> AbstractContextManager[None]:
        return self._sockets.plainly() if self._sockets is not None else contextlib.nullcontext()

    def _as_trained(self) -> AbstractContextManager[None]:
        return self._sockets.as_trained() if self._sockets is not None else contextlib.nullcontext()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._objective.loss(outputs, targets)
        return loss * self._scale if self._scale != 1.0 else loss

    def _state(self, training_loss: float, quality: Quality) -> SystemState:
        place, looks = self.place, self.meter.per_sample(("evaluate", ())) * len(quality.losses)
        alone = self.ground.flops * place.samples + looks * place.epoch
        return SystemState(
            run=self.name,
            epoch=place.epoch,
            branch=0,
            global_step=place.step,
            timestamp_ns=self._around.clock.now_ns(),
            training_loss=training_loss,
            validation_loss=quality.loss,
            validation_accuracy=quality.accuracy,
            metrics={
                "pc": float(self.garden.parameter_count()),
                "lr": self.companion.host_rate,
                "cr": (place.flops + self.meter.total) / alone if alone else 1.0,
                **rows.room(self.garden),
            },
            hardware=rows.hardware(places.device_of(self.model)),
            seeds=self.garden.states(),
        )

    def _describe(self, seed: Seed) -> str:
        gain = None if seed.stage is Stage.FOSSILIZED else seed.evidence.get("gain")
        worth = f" gain {gain:.4f}" if gain is not None else ""
        return f"{self.ground.slots[seed.slot].name} {seed.spec.blueprint} {seed.stage.name.lower()}{worth}"


def _unknown() -> HostError:
    return HostError("The slots are not known yet.", remedy="Give attach a sample, or do a step first.")


def _clipped(how: str) -> HostError:
    return HostError(
        f"The gradients are not those of the loss any more: they were {how}.",
        why="They were clipped before grower.step(), or the loss is another one than attach was given.",
        remedy="Call grower.step() right after backward(), and clip then; or call it after optimizer.step().",
    )


def _over_ray(system: Session) -> Surroundings:
    from esper_ray.actors.surroundings import surroundings

    return surroundings(system.config)
