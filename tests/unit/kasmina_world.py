"""A garden with one slot, and a seed led through its life by what really moves it: a helper of Kasmina's tests."""

from __future__ import annotations

import torch
from torch import nn

from esper_ray import inprocess
from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import CommandType
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation as Operation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.errors import KernelError
from esper_ray.kasmina.advance import SeedMeasurement
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.lifecycle import least_stay

BLUEPRINT = 4
STEPS = 6
SIGNATURES = {
    "conv": SlotSignature("conv", (8, 5, 5)),
    "sequence": SlotSignature("sequence", (6, 8)),
    "vector": SlotSignature("vector", (8,)),
}
STAGES = [stage for stage in Stage if stage is not Stage.UNKNOWN]
WORTHY = SeedMeasurement(gain=0.1, gain_error=0.01, cosine=0.9, scale=1.1, shift=0.0)
WORTHLESS = SeedMeasurement(gain=-1.0, gain_error=0.01, cosine=-0.9, scale=90.0, shift=9.0)
HEALTHY = {"norms": [1.0] * 9, "advantages": [-1.0] * 3 + [0.0] * 3 + [1.0] * 3, "violations": 0}


class Host(nn.Module):
    """A classifier with one slot behind ``body``; the input has the slot's own shape."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Conv2d(8, 8, 3, padding=1) if kind == "conv" else nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).relu()
        h = h.mean((2, 3)) if self.kind == "conv" else h
        return self.head(h)


class Loop:
    """The least a garden asks of its trainer; ``dirty`` things of a culled seed remain."""

    dirty = 0

    def adopt(self, seed):
        pass

    def release(self, seed):
        pass

    def fossilise(self, seed):
        pass

    def leftovers(self, seed):
        return self.dirty

    def foreign_groups(self, seed):
        return []

    def keep_checkpoint(self):
        return None

    def planned_graft(self, seed):
        return None

    def record_graft(self, seed, step):
        pass


MADE = inprocess.LocalKernels()


class Source:
    """Kernels that come, fail, or are still on their way, as the test says."""

    def __init__(self) -> None:
        self.state = "coming"

    def fetch(self, spec):
        self.spec = spec
        return self

    def wait(self, timeout):
        if self.state == "failed":
            raise KernelError("The forge could not build it.")
        return MADE.fetch(self.spec).wait(None) if self.state == "there" else None


CONFIG = SeedConfig(
    training_epochs=2,
    blending_epochs=2,
    shadowing_epochs=2,
    probation_epochs=2,
    max_stage_epochs=4,
    embargo_epochs=2,
    output_move=1000.0,
)


class Life:
    """One garden with one slot, moved on by what really moves it."""

    def __init__(self, kind: str = "conv", mode: str = "residual", schedule: str = "linear") -> None:
        torch.manual_seed(0)
        self.source, self.loop = Source(), Loop()
        config = CONFIG.model_copy(update={"blend_mode": mode, "blend_schedule": schedule})
        self.garden = Garden(
            Host(kind), (SlotInfo(0, "body", SIGNATURES[kind]),), config, self.source, self.loop,
            run_seed=3, max_parameters=10**6, lockstep=False,
        )  # fmt: skip
        self.garden.model.eval()
        self.inputs = torch.randn(6, *SIGNATURES[kind].shape, generator=torch.Generator().manual_seed(5))
        self.slot, self.step, self.epoch = self.garden.slots[0], 0, 0
        self.end_epoch()

    @property
    def stage(self) -> Stage:
        assert self.slot.seed is None or self.slot.seed.stage is self.slot.stage
        return self.slot.stage

    @property
    def alpha(self) -> float:
        return self.slot.seed.alpha if self.slot.seed else 0.0

    def output(self) -> torch.Tensor:
        with torch.no_grad():
            return self.garden.model(self.inputs)

    def order(self, operation: Operation) -> str:
        directive = SeedDirective(operation, blueprint=BLUEPRINT)
        return self.garden.apply(
            AdaptationCommand(1, CommandType.SEED, "r", self.epoch, 0, "test", seed_directive=directive)
        )

    def steps(self, count: int = STEPS) -> None:
        for _ in range(count):
            self.garden.before_step(self.step)
            self.output()
            self.step += 1

    def end_epoch(self, measurement: SeedMeasurement | None = None, loss: float = 1.0) -> None:
        self.epoch += 1
        measured = {self.slot.seed.number: measurement} if self.slot.seed and measurement else {}
        self.garden.close_epoch(self.epoch, step=self.step, steps_per_epoch=STEPS, loss=loss, measured=measured)

    def prove(self, evidence: str = "good") -> None:
        """Lay before the gate of this stage what the word says."""
        seed = self.slot.seed
        self.loop.dirty = int(evidence != "good")
        if seed is None:
            return
        if evidence == "none":
            seed.evidence = {}
        elif self.stage is Stage.TRAINING:
            seed.evidence = {**HEALTHY, "violations": int(evidence == "bad")}
        elif evidence == "bad" and self.stage is Stage.BLENDING:
            seed.alpha = 0.5

    def spend(self, epochs: int) -> None:
        """Let the stage look as if ``epochs`` of it had passed when the next one ends."""
        if self.slot.seed is not None:
            self.slot.seed.stage_epoch = self.garden.epoch - epochs + 1
        else:
            self.slot.embargo_until = self.epoch + 1 + least_stay(self.stage, CONFIG) - epochs


ROAD = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED)


def walk(life: Life, to: Stage) -> Life:
    """Lead a seed from DORMANT to a stage, by orders, kernels, steps and epochs."""
    while life.stage is not to:
        advance(life, to)
    life.garden.drain_events()
    return life


def advance(life: Life, to: Stage) -> None:
    stage = life.stage
    if stage is Stage.DORMANT:
        assert life.order(Operation.CANCEL if to is Stage.TERMINATED else Operation.GERMINATE) == ""
    elif stage is Stage.GERMINATED:
        life.source.state = "there"
        life.garden.before_step(life.step)
    elif stage is Stage.TRAINING and to in (Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING):
        assert life.order(Operation.CULL) == ""
    elif stage in (Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING):
        life.steps()
        life.prove()
        life.end_epoch(WORTHY)
    elif stage is Stage.PROBATIONARY:
        for _ in range(CONFIG.probation_epochs):
            life.end_epoch(WORTHY)
        assert life.order(Operation.FOSSILIZE) == ""
    else:
        life.loop.dirty = 1
        life.end_epoch()
