"""The training of one model with its seeds, in memory: steps, measuring, the stages. No file, no bus, no decision.

`trainer.Trainer` makes a run of it, with a journal, checkpoints and boundaries; Simic's episodes use it as it is.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_ray.config import Config
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import SystemState
from esper_ray.contracts.ports import KernelSource
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.limits import Limits
from esper_ray.kasmina.slot import Seed
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import Task, build_task
from esper_ray.tasks.data import Split
from esper_ray.tasks.own import optimizer_settings
from esper_ray.tolaria import multiseed, rows, statistics, strength
from esper_ray.tolaria.costs import CostMeter, forward_flops
from esper_ray.tolaria.groups import Groups
from esper_ray.tolaria.learning_rate import LearningRates
from esper_ray.tolaria.measure import Quality, evaluate, measure_seeds


class Loop:
    """One model in training. Kasmina's garden drives its optimizer through the methods at the top.

    Args:
        name: of the run, in the states that it tells.
        data: folder in which data sets are kept.
        task: what is trained, where it is not to be built from the configuration.
    """

    def __init__(
        self, config: Config, kernels: KernelSource, *, name: str, data: Path, task: Task | None = None
    ) -> None:
        self.name = name
        run = config.run
        self.device = rows.pick_device(run.device)
        self.lockstep = run.mode == "lockstep"
        self.task: Task = task or build_task(run, data, self.device)
        self.config = config.model_copy(update={"optimizer": optimizer_settings(self.task.optimizer, config.optimizer)})
        self.train, self.validation = self.task.data.train.to(self.device), self.task.data.validation.to(self.device)
        self.model = self.task.model
        self.meter = CostMeter()
        self.garden = Garden(
            self.model,
            self.task.slots,
            config.seeds,
            kernels,
            self,
            run_seed=run.seed,
            max_parameters=run.max_parameters,
            lockstep=self.lockstep,
        )
        self.host_parameters = self.garden.parameter_count()
        self.garden.limits = limits = Limits(flops=run.max_flops, step_ms=run.max_step_ms)
        if limits.wanted:
            limits.host_flops = forward_flops(self.model, self.train.inputs[:2])
        self.steps_per_pass = len(self.train) // run.batch_size
        self.steps_per_epoch = run.boundary_every or self.steps_per_pass
        self.step = self.epoch = 0
        self.statistics: npt.NDArray[np.float32] | None = None
        self._order: tuple[str, Tensor] = ("", torch.empty(0))
        self.credit: multiseed.Credit | None = None
        self._loss_sum = torch.zeros((), device=self.device)
        self._gradient_norm = torch.zeros(())

    # What the garden asks for

    def adopt(self, seed: Seed) -> None:
        self.rates.born(seed.number, self.step)
        self.groups.adopt(seed)

    def release(self, seed: Seed) -> None:
        self.rates.gone(seed.number)
        self.groups.release(seed)

    def fossilise(self, seed: Seed) -> None:
        self.groups.fossilise(seed)

    def leftovers(self, seed: int) -> int:
        return self.groups.leftovers(seed)

    def foreign_groups(self, seed: Seed) -> list[int]:
        return self.groups.foreign(seed)

    def keep_checkpoint(self) -> int | None:
        """There are no checkpoints here."""
        return None

    def planned_graft(self, seed: int) -> int | None:  # noqa: ARG002
        """Nothing is repeated here: a graft happens when its kernel is there."""
        return None

    def record_graft(self, seed: int, step: int) -> None:
        """Nothing is written down here."""

    # Training

    def begin(self, total_steps: int) -> None:
        """Make the optimizer and the schedule; blocks that are there from the start are planted before."""
        self.groups = Groups(self.model, self.config.optimizer)
        self.total_steps = total_steps
        self.epochs = math.ceil(total_steps / self.steps_per_epoch)
        self.rates = LearningRates(self.config.optimizer, total_steps, self.config.seeds.rate_policy)

    def train_epoch(self) -> float:
        """Train to the next boundary, or to the end; returns the mean training loss."""
        self._loss_sum.zero_()
        steps = min(self.steps_per_epoch, self.total_steps - self.step)
        for _ in range(steps):
            self.between_steps()
            self.train_step()
        if self.config.seeds.cut_back and self.garden.in_stage(Stage.TRAINING):
            strength.cut_back(self.garden, self._recent(min(steps, strength.BATCHES)), self.meter)
        self.epoch += 1
        return float(self._loss_sum) / steps

    def between_steps(self) -> None:
        """For who has to look up from time to time."""

    def train_step(self) -> None:
        """One optimizer step of the host and of whatever seeds are in it."""
        garden, step = self.garden, self.step
        garden.before_step(step)
        passing("step.begun")
        inputs, targets = self._batch(step)
        structure, count = garden.structure(), len(targets)
        with self.meter.charge(("step", structure), count, later=True):
            loss = self.task.loss(self.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        passing("step.backward")
        extra = garden.shadow_due(step)
        if extra:
            with self.meter.charge((extra, garden.isolated.way(inputs), structure), count, later=extra == "shadow"):
                garden.train_isolated(step, inputs, targets, self.task.loss, loss, watch=extra == "watched")
            passing("step.shadow")
        if (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.total_steps:
            self.statistics = statistics.layer_statistics(self.task.graph, self.model)
        self._balance(step)
        self._gradient_norm = self.groups.clip()
        self.rates.write(self.groups.optimizer, step, self.groups.seeds)
        self.groups.optimizer.step()
        self.groups.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss.detach()
        self.step += 1
        passing("step.done")

    def _balance(self, step: int) -> None:
        """Weigh the seeds' gradients, and settle what parameters that they share are to do."""
        seeds, config = self.groups.seeds, self.config.seeds
        if config.loss_weights == "gain":
            self.groups.weigh(multiseed.weights_by_gain({n: s.evidence.get("gain") for n, s in seeds.items()}))
        if self.groups.shared:
            generator = torch.Generator().manual_seed(derive_seed(self.config.run.seed, "surgery", step))
            self.groups.shared.combine(generator=generator, project=config.pcgrad)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of ``step``: each pass over the data has an order of its own, named by the run's seed.

        After a rollback the order is another one, so that the run does not meet the same batches again.
        """
        number, place = divmod(step, self.steps_per_pass)
        purpose = f"order {self.garden.branch}" if self.garden.branch else "order"
        if self._order[0] != f"{purpose}/{number}":
            generator = torch.Generator().manual_seed(derive_seed(self.config.run.seed, purpose, number))
            self._order = (f"{purpose}/{number}", torch.randperm(len(self.train), generator=generator).to(self.device))
        size = self.config.run.batch_size
        chosen = self._order[1][place * size : (place + 1) * size]
        return self.train.inputs[chosen], self.train.targets[chosen]

    def _recent(self, batches: int) -> Split:
        """The samples of the last steps."""
        found = [self._batch(self.step - 1 - back) for back in range(batches)]
        inputs, targets = (torch.cat(each) for each in zip(*found, strict=True))
        return Split(inputs, targets, self.train.objective)

    # Measuring

    def measure(self) -> Quality:
        """Loss and accuracy on the validation split."""
        return evaluate(self.model, self.validation, self.meter, self.garden.structure())

    def close_stages(self, quality: Quality) -> None:
        """Measure each live seed, let the gates judge, and move the seeds on."""
        structure = self.garden.structure()
        measured, self.credit = measure_seeds(self.garden, self.validation, quality, self.meter, structure)
        for seed in self.garden.seeds:
            seed.learning_rate = self.rates.current(seed.number, self.step)
        self.garden.close_epoch(
            self.epoch,
            step=self.step,
            steps_per_epoch=self.steps_per_epoch,
            loss=quality.loss,
            measured=measured,
        )

    def compute_ratio(self) -> float:
        """FLOPs so far over those of the host alone at this place; 1 where the host alone was never measured."""
        step, look = (self.meter.per_sample((kind, ())) for kind in ("step", "evaluate"))
        alone = step * self.config.run.batch_size * self.step + look * len(self.validation) * self.epoch
        return self.meter.total / alone if alone > 0.0 else 1.0

    def state(self, training_loss: float, quality: Quality, timestamp_ns: int) -> SystemState:
        """What a decider gets at this boundary."""
        return SystemState(
            run=self.name,
            epoch=self.epoch,
            branch=self.garden.branch,
            global_step=self.step,
            timestamp_ns=timestamp_ns,
            training_loss=training_loss,
            validation_loss=quality.loss,
            validation_accuracy=quality.accuracy,
            metrics={
                "pc": float(self.garden.parameter_count()),
                "lr": self.rates.host_rate(self.step),
                "cr": self.compute_ratio(),
                **rows.room(self.garden),
            },
            hardware=rows.hardware(self.device),
            seeds=self.garden.states(),
        )
