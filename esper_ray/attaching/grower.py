"""`Grower`: Kasmina's seeds and Tamiyo's decisions in a loop that is not ours.

What it costs, beside what the seeds themselves compute: each seed's shadow pass on half of the batches while it is
isolated; at each epoch's end one pass over the validation data, and one more for each seed that can be left out; one
microsecond a step for each slot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from esper_ray import inprocess
from esper_ray.attaching.companion import Companion
from esper_ray.attaching.sockets import Sockets
from esper_ray.config import Config
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import SystemState
from esper_ray.contracts.ports import RunOpening
from esper_ray.contracts.signing import Signer, Verifier
from esper_ray.errors import ConfigError, HostError
from esper_ray.kasmina.export import export_model
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.limits import Limits
from esper_ray.kasmina.slot import Seed
from esper_ray.reliability.ids import new_run_id
from esper_ray.tasks import hostgraph
from esper_ray.tasks import slots as places
from esper_ray.tasks.data import Split
from esper_ray.tasks.objective import Objective
from esper_ray.tasks.propose import Proposal, propose
from esper_ray.tolaria import rows, statistics
from esper_ray.tolaria.boundary import Boundary
from esper_ray.tolaria.costs import CostMeter, forward_flops
from esper_ray.tolaria.measure import Quality, evaluate, measure_seeds

if TYPE_CHECKING:
    from esper_ray.runtime import Session
    from esper_ray.tolaria.trainer import Surroundings

STATISTICS_EVERY = 16


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What an epoch brought.

    Attributes:
        loss, score: on the validation data; for classes the score is the accuracy.
        why: the reason of the decision.
        seeds: one line for each seed that is in the model.
        events: what happened since the last epoch: stages, gates with their figures, grafts, refusals.
    """

    epoch: int
    training_loss: float
    loss: float
    score: float
    parameters: int
    why: str
    seeds: tuple[str, ...]
    events: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        figures = f"loss {self.loss:.3f}  score {self.score:.3f}  {self.parameters:,} parameters"
        seeds = f"  [{', '.join(self.seeds)}]" if self.seeds else ""
        return f"epoch {self.epoch}: training {self.training_loss:.3f}  {figures}  {self.why}{seeds}"


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
        self.model, self.config, self.epochs = model, config, epochs
        self.name = new_run_id("own")
        self.proposals: tuple[Proposal, ...] = ()
        self.meter = CostMeter()
        self._wanted, self._objective, self._scale = slots, objective, 1.0 / accumulate
        self._companion = Companion(optimizer, config.optimizer)
        self._around = _over_ray(system) if system is not None else inprocess.surroundings(config)
        self._sockets = Sockets(model, slots) if slots != "auto" else None
        self._garden: Garden | None = None
        self._validation: Split | None = None
        self._sample = torch.empty(0)
        self._step = self._epoch = self._since = 0
        self._loss_sum, self._host_flops, self._own_flops = 0.0, 0.0, 0.0
        self._samples = 0

    def prepare(self, sample: Tensor) -> None:
        """Find the slots and their shapes by a dry forward of ``sample`` [N, ...]; `step` does it where nobody did.

        Raises:
            HostError: a slot does not do; the text says which and why.
        """
        model, run = self.model, self.config.run
        if self._wanted == "auto":
            self.proposals = propose(model, sample)
            self._wanted = [proposal.name for proposal in self.proposals]
        names = list(dict.fromkeys(self._wanted))
        self.slots = places.find(model, sample, self._wanted)
        self._sample = sample[:3].detach().clone()
        with places.undisturbed(model):
            self._graph = hostgraph.trace(model, self._sample[:2], names)
            self._host_flops = self._cost_of_host()
        self._sockets = self._sockets or Sockets(model, names)
        self._garden = Garden(
            model, self.slots, self.config.seeds, self._around.kernels, self,
            run_seed=run.seed, max_parameters=run.max_parameters, lockstep=run.mode == "lockstep",
        )  # fmt: skip
        self._garden.limits = Limits(flops=run.max_flops)
        if run.max_flops:
            with places.undisturbed(model):
                self._garden.limits.host_flops = forward_flops(model, self._sample[:2])
        for slot in self._garden.slots:
            slot.wrap = torch.compiler.disable
        self._statistics = statistics.layer_statistics(self._graph, model)
        self._sockets.forget()
        self._open_run()

    @property
    def garden(self) -> Garden:
        """The seeds of the model.

        Raises:
            HostError: no sample was given, and no step done yet.
        """
        if self._garden is None:
            raise HostError("The slots are not known yet.", remedy="Give attach a sample, or do a step first.")
        return self._garden

    # The two lines

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Call this between ``loss.backward()`` and ``optimizer.step()``, before gradients are clipped.

        It gives isolated seeds their gradients on this batch; the host's gradients are not touched.

        Args:
            inputs, targets: the batch, the last one where gradients are accumulated.
            loss: what ``backward`` was called on.

        Raises:
            HostError: the slots were not reached by the model's pass, so that seeds would do nothing.
        """
        if self._garden is None:
            self.prepare(inputs)
            self._loss_sum += float(loss.detach()) / self._scale
            self._step, self._since = self._step + 1, self._since + 1
            return
        garden = self.garden
        self._look_at_the_pass()
        due = garden.shadow_due(self._step)
        if due:
            key = (due, garden.isolated.way(inputs), garden.structure())
            with self._precision(), self.meter.charge(key, len(targets), later=due == "shadow"):
                garden.train_isolated(self._step, inputs, targets, self._loss, loss, watch=due == "watched")
        if self._since % STATISTICS_EVERY == 0:
            self._statistics = statistics.layer_statistics(self._graph, self.model)
        self._loss_sum += float(loss.detach()) / self._scale
        self._samples += len(targets)
        blocks = sum(seed.flops_forward + seed.flops_backward for seed in garden.seeds if seed.alpha > 0.0)
        self._own_flops += len(targets) * (self._host_flops + blocks)
        self._step, self._since = self._step + 1, self._since + 1
        garden.before_step(self._step)

    def epoch(self, validation: Iterable[tuple[Tensor, Tensor]]) -> EpochReport:
        """Call this at each epoch's end: measure, let the gates judge, ask Tamiyo, carry out what she says.

        Args:
            validation: batches of (inputs, targets) that the model is not trained on. They are read at the first call,
                up to ``run.validation_samples``, and kept: seeds are measured on and off on the same samples.
        """
        garden = self.garden
        if self._since == 0:
            raise HostError("No step was done since the last epoch.", remedy="Call step() in each step of the loop.")
        self._validation = self._validation or self._read(validation)
        structure = garden.structure()
        with places.undisturbed(self.model), self._precision():
            quality = evaluate(self.model, self._validation, self.meter, structure)
            measured, _ = measure_seeds(garden, self._validation, quality, self.meter, structure)
        training_loss, steps = self._loss_sum / self._since, self._since
        self._epoch, self._since, self._loss_sum = self._epoch + 1, 0, 0.0
        # The next step's ramps are set already: a ramp that begins here begins with the step after it.
        garden.close_epoch(
            self._epoch, step=self._step + 1, steps_per_epoch=steps, loss=quality.loss, measured=measured
        )
        exchange = self._boundary.exchange(
            lambda: (self._state(training_loss, quality), self._statistics), record=lambda *_: None
        )
        return EpochReport(
            epoch=self._epoch,
            training_loss=training_loss,
            loss=quality.loss,
            score=quality.accuracy,
            parameters=garden.parameters_in_path(),
            why=str(rows.decision(exchange)["why"]),
            seeds=tuple(self._describe(seed) for seed in garden.seeds),
            events=tuple(garden.drain_events()),
        )

    # Afterwards

    def export(self, folder: Path | str) -> dict[str, Any]:
        """Write the model as it predicts now, for plain PyTorch; see `kasmina.export`."""
        with places.undisturbed(self.model):
            return export_model(self.garden, self._sample, Path(folder))

    def close(self) -> None:
        """The loop is over. What is a part of the model stays in it; hooks and decisions end."""
        if self._garden is not None:
            self._around.decider.close_run(self.name)
        if self._sockets is not None:
            self._sockets.remove()
        self._companion.close()

    # What the garden asks for

    def adopt(self, seed: Seed) -> None:
        assert seed.branch is not None
        seed.branch.to(places.device_of(self.model))
        self._companion.adopt(seed)

    def release(self, seed: Seed) -> None:
        self._companion.release(seed)

    def fossilise(self, seed: Seed) -> None:
        self._companion.fossilise(seed)

    def leftovers(self, seed: int) -> int:
        return self._companion.holds(seed)

    def foreign_groups(self, seed: Seed) -> list[int]:
        return self._companion.foreign_groups(seed)

    def keep_checkpoint(self) -> None:
        """Checkpoints are the loop's own affair."""

    def planned_graft(self, seed: int) -> int | None:  # noqa: ARG002
        """Nothing is repeated here."""
        return None

    def record_graft(self, seed: int, step: int) -> None:
        """Nothing is written down here."""

    # Parts

    def _look_at_the_pass(self) -> None:
        sockets = self._sockets
        assert sockets is not None
        missed = sockets.missed(slot.name for slot in self.slots)
        if missed:
            raise HostError(
                f"The model's pass did not reach {', '.join(missed)}.",
                why="It, or another one of its class, was compiled before it was attached; or a copy of it is trained.",
                remedy="Attach the plain model, call torch.compiler.reset(), compile it, and run it before others.",
            )
        if sockets.autocast is not None and sockets.autocast.enabled and sockets.autocast.dtype is torch.float16:
            raise HostError(
                "Seeds cannot be trained under float16.",
                why="Its gradients are scaled by a factor that is not known here.",
                remedy="Use bfloat16 in torch.autocast; it needs no scaling.",
            )
        if sockets.compiled:
            self.garden.isolated.blind = True

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        autocast = self._sockets.autocast if self._sockets else None
        return autocast.again() if autocast is not None else contextlib.nullcontext()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            self._objective.loss(outputs, targets) * self._scale
            if self._scale != 1.0
            else self._objective.loss(outputs, targets)
        )

    def _cost_of_host(self) -> float:
        """FLOPs of one sample's forward and backward pass."""
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            outputs = self.model(self._sample)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
        return float(counter.get_total_flops()) / len(self._sample)

    def _read(self, validation: Iterable[tuple[Tensor, Tensor]]) -> Split:
        device, most = places.device_of(self.model), self.config.run.validation_samples
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        for batch, wanted in validation:
            inputs.append(batch.to(device))
            targets.append(wanted.to(device))
            if sum(map(len, targets)) >= most:
                break
        if sum(map(len, targets)) < 2:
            raise HostError("The validation data are empty.", remedy="Give batches of (inputs, targets), held out.")
        return Split(torch.cat(inputs)[:most], torch.cat(targets)[:most], self._objective)

    def _open_run(self) -> None:
        around = self._around
        self._boundary = Boundary(
            around.decider, Signer(around.keys, "tolaria", clock=around.clock),
            Verifier(around.keys, clock=around.clock), apply=self.garden.apply,
            lockstep=self.config.run.mode == "lockstep",
        )  # fmt: skip
        around.decider.open_run(
            RunOpening(
                run=self.name,
                seed=self.config.run.seed,
                slots=self.slots,
                candidates=tuple(candidate for slot in self.slots for candidate in around.candidates(slot)),
                controller=self.config.tamiyo.controller,
                epochs=self.epochs,
                host_parameters=self.garden.parameter_count(),
                max_parameters=self.config.run.max_parameters,
                max_flops=self.config.run.max_flops,
                host_flops=self.garden.limits.host_flops,
                settings=self.config.tamiyo.model_dump(mode="json"),
                graph=self._graph,
            )
        )

    def _state(self, training_loss: float, quality: Quality) -> SystemState:
        alone = self._host_flops * self._samples + self.meter.per_sample(("evaluate", ())) * (
            len(quality.losses) * self._epoch
        )
        return SystemState(
            run=self.name,
            epoch=self._epoch,
            branch=0,
            global_step=self._step,
            timestamp_ns=self._around.clock.now_ns(),
            training_loss=training_loss,
            validation_loss=quality.loss,
            validation_accuracy=quality.accuracy,
            metrics={
                "pc": float(self.garden.parameter_count()),
                "lr": self._companion.host_rate,
                "cr": (self._own_flops + self.meter.total) / alone if alone else 1.0,
            },
            hardware=rows.hardware(places.device_of(self.model)),
            seeds=self.garden.states(),
        )

    def _describe(self, seed: Seed) -> str:
        gain = None if seed.stage is Stage.FOSSILIZED else seed.evidence.get("gain")
        worth = f" gain {gain:.4f}" if gain is not None else ""
        return f"{self.slots[seed.slot].name} {seed.spec.blueprint} {seed.stage.name.lower()}{worth}"


def _over_ray(system: Session) -> Surroundings:
    from esper_ray.actors.surroundings import surroundings

    return surroundings(system.config)
