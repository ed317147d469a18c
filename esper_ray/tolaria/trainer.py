"""One training run, from its manifest to its result.

The loop is: train an epoch, measure it on the validation split, let the gates judge, do the boundary, write it all
down, checkpoint. A run is resumed from its newest checkpoint and repeats what its journal says it did. An epoch that
was damaged is undone before anything is written down of it: `recovery` goes back, and the loop goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from esper_ray.config import Config
from esper_ray.contracts.enums import EmergencyLevel
from esper_ray.contracts.messages import SystemState
from esper_ray.contracts.ports import Candidate, Decider, KernelSource, Publisher, RunOpening, SlotInfo
from esper_ray.contracts.signing import KeyRing, Signer, Verifier
from esper_ray.errors import CheckpointError, RunError, StorageFault
from esper_ray.kasmina.blending import MODES
from esper_ray.kasmina.export import export_model
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.failpoints import passing
from esper_ray.tolaria import forking, profiling, recovery, resume, rows
from esper_ray.tolaria.boundary import Boundary, Exchange
from esper_ray.tolaria.checkpoint import Checkpoint, CheckpointWriter
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.emergency import Emergency, LossWatch
from esper_ray.tolaria.forks import Fork
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.measure import Quality, evaluate
from esper_ray.tolaria.orders import Orders
from esper_ray.tolaria.recorder import Recorder
from esper_ray.tolaria.rollback import Memory, Undo, as_event, find_start, open_branch

LOOK_EVERY = 10


class Stopped(Exception):
    """The run was asked to stop; it can be resumed."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block that is part of the model from its first step."""

    slot: int
    blueprint: str
    parameters: Mapping[str, float]
    blend_mode: str = "residual"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Block:
        """One of a result's ``blocks``."""
        return cls(row["slot"], row["blueprint"], row["parameters"], row.get("blend_mode", "residual"))


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to train.

    Attributes:
        arm: what the run is for: "grown", "host" (never grows) or "final" (born with ``blocks``).
        flops: a budget that replaces ``run.epochs``: the run has as many steps as it pays for.
        fork: where it goes on from, of another run whose files are in its folder.
    """

    run: str
    config: Config
    arm: str = "grown"
    resume: bool = False
    blocks: tuple[Block, ...] = ()
    flops: float | None = None
    fork: Fork | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Whom a run talks to.

    ``should_stop`` and ``orders`` are asked between steps; the latter gives the signed commands of persons that came
    since it was last asked. ``on_progress`` is told now and then.
    """

    decider: Decider
    kernels: KernelSource
    candidates: Callable[[SlotInfo], list[Candidate]]
    keys: KeyRing
    publisher: Publisher | None = None
    backends: Mapping[str, str] = field(default_factory=dict)
    should_stop: Callable[[], bool] = lambda: False
    orders: Callable[[], Sequence[bytes]] = tuple
    on_progress: Callable[[dict[str, Any]], None] = lambda _: None
    clock: Clock = SYSTEM_CLOCK


class Trainer(Loop):
    """One run in the making. `run` does it."""

    def __init__(self, request: RunRequest, around: Surroundings) -> None:
        self.request, self.around = request, around
        self.folder: Path = request.config.runs / request.run
        self.recorder = Recorder(self.folder, request.run, around.publisher, clock=around.clock)
        super().__init__(request.config, around.kernels, name=request.run, data=request.config.home / "data")
        self.missed = 0
        self.seconds = 0.0
        guard = request.config.emergency
        self.emergency = Emergency(guard, self._tell)
        self.watches = {
            "training": LossWatch("training", guard.loss_factor, 0.1),
            "validation": LossWatch("validation", guard.loss_factor, 0.5),
        }
        self.memory = Memory(guard.snapshots)
        self.writer = CheckpointWriter(self.folder / "checkpoints", keep=request.config.run.keep_checkpoints)
        self.orders = Orders(self)
        self.checkpoint_ms = 0.0
        self._watched = (0, 0.0)

    def keep_checkpoint(self) -> int | None:
        """Each boundary is a checkpoint already: wait until the last one is on disk."""
        self.writer.finish()
        return self.epoch or None

    def planned_graft(self, seed: int) -> int | None:
        return self.recorder.planned_graft(self.garden.branch, seed)

    def record_graft(self, seed: int, step: int) -> None:
        self.recorder.record_graft(self.garden.branch, seed, step)

    def between_steps(self) -> None:
        self.orders.look()
        if self.around.should_stop():
            raise Stopped
        if self.step % LOOK_EVERY == 0:
            self.around.on_progress(rows.progress(self))
            self._watch_training()
        elif self.step == 1:
            self._watch_training()

    def _watch_training(self) -> None:
        """Judge the mean training loss since the last look.

        Raises:
            Undo: it means damage.
        """
        step, total = self._watched
        if self.step > step:
            self._watched = (self.step, float(self._loss_sum))
            self.demand_sound("training", (self._watched[1] - total) / (self.step - step))

    def demand_sound(self, which: str, loss: float) -> None:
        """Go back where this loss means damage.

        Raises:
            Undo: it does.
        """
        reason = self.watches[which].judge(loss)
        if reason:
            raise Undo(reason, damage=True)

    def state(self, training_loss: float, quality: Quality, timestamp_ns: int) -> SystemState:
        state = super().state(training_loss, quality, timestamp_ns)
        if not self.emergency.conservative:
            return state
        return replace(state, metrics={**state.metrics, "em": float(self.emergency.level)})

    def _tell(self, level: EmergencyLevel, reason: str) -> None:
        self.recorder.emergency(level, reason, branch=self.garden.branch, epoch=self.epoch, step=self.step)

    # The run

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the row of ``result.json``.

        Raises:
            Stopped: ``should_stop`` said so; the run can be resumed.
            RunError: it was damaged again and again, or ordered to halt; the last checkpoint stands.
            StorageFault: what it does can no longer be written down; the last checkpoint stands.
        """
        try:
            self.open()
            while self.step < self.total_steps:
                with profiling.epoch(self, self.folder, self.epoch + 1, self.config.run.profile_epochs):
                    self.one_epoch()
            return self._finish()
        except StorageFault as fault:
            self.emergency.raise_to(EmergencyLevel.HALT, f"the run cannot write down what it does: {fault.why}")
            raise
        except RunError as fault:
            if self.emergency.level is not EmergencyLevel.HALT:
                self.emergency.raise_to(EmergencyLevel.HALT, f"{fault.what} {fault.why}")
            raise
        finally:
            self.close()

    def open(self) -> None:
        """Bring the run to where it begins or goes on; `one_epoch` may follow."""
        saved, turn = find_start(self, self._damaged_checkpoint) if self.request.resume else (None, None)
        fork = self.request.fork if saved is None else None
        if fork is not None:
            saved = forking.origin(self, fork)
        if saved is None:
            for block in self.request.blocks:
                mode = MODES[block.blend_mode]
                self.garden.plant_fossil(block.slot, block.blueprint, block.parameters, mode)
        self.begin(self._plan_steps(saved))
        if saved is not None:
            resume.restore(self, saved)
        decided = forking.decide(self, fork) if fork is not None else []
        if turn is not None:
            self.meter.total, self.seconds, self.missed = turn.flops, turn.seconds, turn.missed
            open_branch(self, turn)
        passing("run.restored")
        self.recorder.rewind(self.epoch, undone_by=turn.branch if turn else 0)
        passing("run.rewound")
        self.recorder.manifest(rows.manifest(self))
        self.opening = replace(self._opening(), ordered=forking.told(decided))
        self.around.decider.open_run(self.opening)
        passing("run.opened")
        self.verifier = Verifier(self.around.keys, clock=self.around.clock, seen=self.recorder.nonces())
        self.boundary = self._make_boundary()
        self.orders.waiting.load()
        self.recorder.telemetry(self.epoch, [], rows.started(self))
        self.memory.keep(resume.checkpoint(self).copied())
        if turn is not None:
            recovery.tell_turn(self, as_event(turn, None))

    def close(self) -> None:
        """Write what is on its way to disk, and let go of the files."""
        self.writer.finish()
        recovery.tell_failures(self)
        self.writer.close()
        self.recorder.close()

    def _damaged_checkpoint(self, fault: CheckpointError) -> None:
        recovery.checkpoint_lost(self, f"{fault.what} {fault.why}")

    def _plan_steps(self, saved: Checkpoint | None) -> int:
        if saved is not None:
            return int(saved.data["total_steps"])
        if self.request.flops is None:
            return self.config.run.epochs * self.steps_per_epoch
        batch = self.config.run.batch_size
        with torch.random.fork_rng(devices=[]), self.meter.charge(("step", self.garden.structure()), batch):
            loss = self.task.loss(self.model(self.train.inputs[:batch]), self.train.targets[:batch])
            torch.autograd.grad(loss, list(self.model.parameters()))
        evaluate(self.model, self.validation, self.meter, self.garden.structure())
        per_step = self.meter.per_sample(("step", self.garden.structure())) * batch
        per_epoch = self.meter.per_sample(("evaluate", self.garden.structure())) * len(self.validation)
        # The last epoch may be a short one, and is measured all the same; so is the end.
        left = self.request.flops - self.meter.total - per_epoch
        epochs = math.ceil(left / (per_step * self.steps_per_epoch + per_epoch))
        return max(2 * self.steps_per_epoch, round((left - epochs * per_epoch) / per_step))

    def _make_boundary(self) -> Boundary:
        keys, clock = self.around.keys, self.around.clock
        return Boundary(
            self.around.decider,
            Signer(keys, "tolaria", clock=clock),
            self.verifier,
            apply=self.orders.apply,
            lockstep=self.lockstep,
        )

    def _opening(self) -> RunOpening:
        grows = self.request.arm == "grown"
        return RunOpening(
            run=self.request.run,
            seed=self.config.run.seed,
            slots=self.task.slots,
            candidates=tuple(c for slot in self.task.slots for c in self.around.candidates(slot)) if grows else (),
            controller=self.config.tamiyo.controller if grows else "never",
            epochs=self.epochs,
            host_parameters=self.host_parameters,
            max_parameters=self.config.run.max_parameters,
            max_flops=self.config.run.max_flops,
            host_flops=self.garden.limits.host_flops,
            probation_epochs=self.config.seeds.probation_epochs,
            lockstep=self.lockstep,
            parent=self.request.fork.parent if self.request.fork is not None else "",
            epoch=self.epoch,
            branch=self.garden.branch,
            settings=self.config.tamiyo.model_dump(mode="json"),
            graph=self.task.graph,
        )

    # An epoch

    def one_epoch(self) -> None:
        """Train to the next boundary and do it; or find the epoch damaged, and be back at an earlier one.

        Raises:
            EsperError: the run ends; see `run`.
        """
        start, before = time.perf_counter(), self.step
        self._watched = (self.step, 0.0)
        try:
            training_loss = self.train_epoch()
            passing("epoch.trained")
            step_ms = (time.perf_counter() - start) * 1e3 / (self.step - before)
            self._watch_training()
            quality = self.measure()
            passing("epoch.measured")
            self.demand_sound("validation", quality.loss)
        except Undo as undo:
            self.seconds += time.perf_counter() - start
            recovery.go_back(self, undo)
            return
        self.close_stages(quality)
        passing("epoch.judged")
        if self.garden.limits.step_ms:
            self.garden.limits.measured_step_ms = self.recorder.step_time(self.garden.branch, self.epoch, step_ms)
        ordered = self.orders.waiting.carry_out()
        exchange = self._do_boundary(training_loss, quality, ordered)
        passing("epoch.decided")
        self.seconds += time.perf_counter() - start
        self._write_down(training_loss, quality, exchange, step_ms)
        passing("epoch.written")
        recovery.epoch_over(self, missed=bool(exchange.missed))
        passing("epoch.done")
        self.orders.settle()

    def _do_boundary(self, training_loss: float, quality: Quality, ordered: Sequence[bytes]) -> Exchange:
        place = (self.garden.branch, self.epoch)
        exchange = self.boundary.exchange(
            lambda: (self.state(training_loss, quality, self.around.clock.now_ns()), self.statistics),
            lambda envelopes, missed: self.recorder.record_decision(*place, envelopes, missed),
            self.recorder.planned_decision(*place),
            ordered,
        )
        self.missed += bool(exchange.missed)
        return exchange

    def _write_down(self, training_loss: float, quality: Quality, exchange: Exchange, step_ms: float) -> None:
        row = rows.epoch_row(self, training_loss, quality, exchange, step_ms, float(self._gradient_norm))
        events = [*self.garden.drain_events(), *self.rates.drain_events(), rows.decision(exchange)]
        self.recorder.epoch(row, events, rows.points(row, events))
        self.recorder.mirror(exchange.packets, exchange.envelopes)
        self.around.on_progress(rows.progress(self, row))

    def _finish(self) -> dict[str, Any]:
        self.around.decider.close_run(self.request.run)
        passing("end.closed")
        quality = evaluate(self.model, self.validation, self.meter, ("final", self.garden.structure()))
        test = evaluate(self.model, self.task.data.test.to(self.device), CostMeter(), "test")
        passing("end.tested")
        self.meter.settle()
        sample = self.task.data.test.inputs[:8].to(self.device)
        export_model(self.garden, sample, self.folder / "model")
        passing("end.exported")
        result = rows.result(self, quality, test)
        self.recorder.result(result)
        passing("end.written")
        self.recorder.telemetry(self.epoch, [], rows.finished(result))
        return result
