"""One episode: a short training run with Kasmina's real garden and blocks, seen as Tamiyo sees runs.

It is a function of the task and of what is decided: no clock, no other process, and random draws of its own only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from esper_ray.config import TamiyoConfig
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import HardwareContext
from esper_ray.contracts.ports import Candidate, Kernel, KernelSpec, RunOpening, SlotInfo
from esper_ray.karn import catalog as karn
from esper_ray.karn.blueprints import build
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import reward
from esper_ray.simic.reward import RewardConfig
from esper_ray.simic.tasks import ShortTask
from esper_ray.tamiyo.brains import Brain
from esper_ray.tamiyo.commands import command
from esper_ray.tamiyo.view import Proposal, RunView
from esper_ray.tasks import assemble
from esper_ray.tezzeret import compiler
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.measure import Quality
from esper_ray.urza.artifacts import pack


class Kernels:
    """Builds and checks each kernel when it is first asked for, as the forge does, but takes no times."""

    def __init__(self) -> None:
        self._made: dict[str, Kernel] = {}

    def fetch(self, spec: KernelSpec) -> Made:
        return Made(lambda: self._make(spec))

    def _make(self, spec: KernelSpec) -> Kernel:
        if spec.key not in self._made:
            branch = build(spec.blueprint, spec.signature, spec.parameters)
            compiler.check(spec, branch)
            forward, backward = compiler.flops(spec, branch)
            found = {
                "parameters_count": sum(parameter.numel() for parameter in branch.parameters()),
                "flops_forward": forward,
                "flops_backward": backward,
                "strategy": "eager",
                "eager_ms": None,
                "compiled_ms": None,
                "torch": torch.__version__,
            }
            self._made[spec.key] = pack(spec, safetensors.torch.save(branch.state_dict()), found)
        return self._made[spec.key]


class Made:
    """A kernel that is there as soon as it is waited for."""

    def __init__(self, make: Callable[[], Kernel]) -> None:
        self._make = make

    def wait(self, timeout: float | None) -> Kernel:  # noqa: ARG002
        return self._make()


KERNELS = Kernels()
"""Shared by all episodes of this process: a block is built for them once."""


@lru_cache(maxsize=256)
def candidates(slot: SlotInfo) -> tuple[Candidate, ...]:
    """What Karn offers for a slot."""
    return tuple(karn.candidates(slot, karn.CATALOG.query(slot.signature).candidates))


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """One finished episode.

    Attributes:
        reward: the final quality less the rent; with gamma 1 the rewards sum up to this less the first potential.
        accuracy: of the final model on the validation split, 0..1.
        parameter_ratio: parameters held at the end, seeds of every stage included, over the host's.
        compute_ratio: FLOPs of the run over those of the host alone.
        accuracies: at each boundary and at the end.
        refused: why Kasmina refused a command, for each that she did.
    """

    task: ShortTask
    reward: float
    accuracy: float
    parameters: int
    parameter_ratio: float
    flops: float
    compute_ratio: float
    germinated: int
    fossilized: int
    culled: int
    accuracies: tuple[float, ...]
    refused: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Plain values, for logs and `info`."""
        return asdict(self)


class Episode:
    """A short run in the making: `open` it, then `advance` boundary by boundary until it is `over`.

    Args:
        folder: where data sets are kept.
        settings: Tamiyo's, for those who decide by them.
    """

    def __init__(
        self,
        task: ShortTask,
        *,
        folder: Path,
        rewards: RewardConfig | None = None,
        settings: TamiyoConfig | None = None,
    ) -> None:
        self.task, self.rewards = task, rewards or RewardConfig()
        config = task.config()
        with _training_mode():
            built = assemble(config.run, task.data(folder), torch.device("cpu"))
            self.loop = Loop(config, KERNELS, name=f"episode-{task.seed}", data=folder, task=built)
        self.view = RunView(self._opening(), settings or TamiyoConfig())
        self._germinated = 0
        self._refused: list[str] = []

    def _opening(self) -> RunOpening:
        loop, run = self.loop, self.loop.config.run
        return RunOpening(
            run=loop.name,
            seed=run.seed,
            slots=loop.task.slots,
            candidates=tuple(each for slot in loop.task.slots for each in candidates(slot)),
            controller="learned",
            epochs=run.epochs,
            host_parameters=loop.host_parameters,
            max_parameters=run.max_parameters,
            probation_epochs=loop.config.seeds.probation_epochs,
            lockstep=True,
            graph=loop.task.graph,
        )

    def open(self) -> None:
        """Train the first epoch: what follows it is the first boundary."""
        with _training_mode():
            self.loop.begin(self.task.epochs * self.task.steps)
            self._train()

    @property
    def over(self) -> bool:
        return self.loop.step >= self.loop.total_steps

    def advance(self, proposals: Sequence[Proposal], *, issued_by: str = "school") -> float:
        """Carry out what was decided at this boundary, train to the next one, and give the reward of that step.

        Raises:
            ValueError: the episode is over.
        """
        if self.over:
            raise ValueError("the episode is over")
        before = self.potential()
        with _training_mode():
            for place, proposal in enumerate(proposals):
                order = command(self.view, proposal, place=place, issued_by=issued_by, issued_at_ns=0)
                refusal = self.loop.garden.apply(order)
                self._refused += [refusal] if refusal else []
                self._germinated += proposal.operation is SeedOperation.GERMINATE and not refusal
            self._train()
        if self.over:
            return reward.shaping(before, 0.0, self.rewards) + self.result().reward
        return reward.shaping(before, self.potential(), self.rewards)

    def potential(self) -> float:
        """Phi of the boundary that is being decided."""
        return reward.potential(self.view.now.validation_accuracy, self.rewards)

    def result(self) -> EpisodeResult:
        """What the model as it is now is worth, what it holds and what it cost."""
        loop, garden, now = self.loop, self.loop.garden, self.view.now
        parameters, compute = garden.parameter_count(), loop.compute_ratio()
        ratio = parameters / loop.host_parameters
        return EpisodeResult(
            task=self.task,
            reward=reward.terminal(now.validation_accuracy, ratio, compute, self.rewards),
            accuracy=now.validation_accuracy,
            parameters=parameters,
            parameter_ratio=ratio,
            flops=loop.meter.total,
            compute_ratio=compute,
            germinated=self._germinated,
            fossilized=len(garden.in_stage(Stage.FOSSILIZED)),
            culled=garden.culled,
            accuracies=tuple(state.validation_accuracy for state in self.view.states),
            refused=tuple(self._refused),
        )

    def _train(self) -> None:
        loop = self.loop
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.task.seed, "episode", loop.epoch))
            training_loss = loop.train_epoch()
            quality = self._measure()
        if self.over:
            loop.meter.settle()
        state = loop.state(training_loss, quality, timestamp_ns=0)
        self.view.states.append(replace(state, hardware=HardwareContext()))
        self.view.statistics = loop.statistics
        loop.garden.drain_events()

    def _measure(self) -> Quality:
        """Measure and let the gates judge. What they change at the very end is measured again: the last state tells
        of the model that stays."""
        loop = self.loop
        before = self._in_path()
        quality = loop.measure()
        loop.close_stages(quality)
        return loop.measure() if self.over and self._in_path() != before else quality

    def _in_path(self) -> set[int]:
        return {seed.number for seed in self.loop.garden.seeds if seed.alpha > 0.0}


@contextlib.contextmanager
def _training_mode() -> Iterator[None]:
    """Gradients on: who collects episodes for a learner may have turned them off around this."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def play(
    task: ShortTask,
    brain: Brain,
    *,
    folder: Path,
    rewards: RewardConfig | None = None,
    settings: TamiyoConfig | None = None,
) -> EpisodeResult:
    """Let ``brain`` decide a whole episode."""
    episode = Episode(task, folder=folder, rewards=rewards, settings=settings)
    episode.open()
    while not episode.over:
        steps = brain.steps(episode.view)
        episode.advance([step.proposal for step in steps if step.proposal is not None], issued_by=brain.version)
    return episode.result()
