"""Knowledge distillation in isolation: a seed's loss also asks that the model with it answers as the host alone does.

The teacher is the host itself: its logits on the same batch, from the model's own pass. It is off unless
`seeds.distill` is set, and is then used only where its memory need, measured on the run's own batch, fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_ray.config import SeedConfig
from esper_ray.kasmina import isolation
from esper_ray.kasmina.isolation import LossFunction
from esper_ray.kasmina.memory import free_bytes, peak_bytes
from esper_ray.kasmina.randomness import Randomness
from esper_ray.kasmina.slot import Seed
from esper_ray.kasmina.witness import Seen

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden

LIMIT_BYTES = 7_000_000_000
# The first look is at this part of a batch, so that looking itself cannot run out of memory.
PART = 8


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of the softened predictions, a mean over samples and positions.

    Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2. The factor keeps the
    gradient's scale the same at each temperature.

    Args:
        student, teacher: logits [N, V], [N, T, V] or [N, V, H, W].
    """
    classes = 1 if student.dim() > 3 else -1
    known = F.log_softmax(teacher.float() / temperature, classes)
    answer = F.log_softmax(student.float() / temperature, classes)
    return temperature**2 * (known.exp() * (known - answer)).sum(classes).mean()


class DistilledLoss:
    """``(1 - weight) * task + weight * divergence`` from the host's logits; ``task`` is the last call's own loss."""

    def __init__(self, loss_function: LossFunction, teacher: Tensor, config: SeedConfig) -> None:
        self._loss_function, self._teacher = loss_function, teacher
        self._weight, self._temperature = config.distill_weight, config.distill_temperature
        self.task = torch.zeros(())

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss_function(output, targets)
        self.task = loss.detach()
        return (1.0 - self._weight) * loss + self._weight * divergence(output, self._teacher, self._temperature)


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a distillation step fits; sizes in bytes, ``measured`` on ``samples`` samples."""

    fits: bool
    reason: str
    need: int
    free: int
    samples: int

    def as_event(self) -> dict[str, Any]:
        return {
            "on": self.fits,
            "reason": self.reason,
            "need_mb": self.need / 2**20,
            "free_mb": self.free / 2**20,
            "limit_mb": LIMIT_BYTES / 2**20,
            "samples": self.samples,
        }


def teachable(output: Any) -> bool:
    """Whether the model's answer is logits that a seed can learn from."""
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2 and output.shape[-1] > 1


def fit(step: Callable[[int], object], samples: int, device: torch.device) -> Fit:
    """Do one distillation step on a part of the batch, and if that promises to fit on all of it, and judge its need.

    Args:
        step: does it on so many samples, and leaves nothing behind.
    """
    part = max(2, samples // PART)
    if part < samples:
        need = peak_bytes(lambda: step(part), device) * samples // part
        judged = judge(need, free_bytes(device), samples=part)
        if not judged.fits:
            return judged
    return judge(peak_bytes(lambda: step(samples), device), free_bytes(device), samples=samples)


def judge(need: int, free: int, *, samples: int) -> Fit:
    """Whether ``need`` bytes fit into what is free and into the limit."""
    figures = f"one step needs {need / 2**20:.1f} MiB, measured on {samples} samples"
    if need > LIMIT_BYTES:
        return Fit(False, f"{figures}, more than the limit of {LIMIT_BYTES / 2**20:.0f} MiB", need, free, samples)
    if need > free:
        return Fit(False, f"{figures}, and {free / 2**20:.1f} MiB are free", need, free, samples)
    return Fit(True, f"{figures}, of {free / 2**20:.1f} MiB free", need, free, samples)


class Teacher:
    """Gives isolated seeds their lessons, once it is known that they fit.

    Attributes:
        on: whether they do; None while that was not measured. A checkpoint carries it: a resumed run does not measure
            again.
    """

    def __init__(self, garden: Garden, randomness: Randomness) -> None:
        self._garden, self._randomness = garden, randomness
        self.on: bool | None = None

    @property
    def undecided(self) -> bool:
        return self._garden.config.distill and self.on is None

    def lesson(
        self, seeds: Sequence[Seed], inputs: Tensor, targets: Tensor, loss_function: LossFunction, seen: Seen | None
    ) -> DistilledLoss | None:
        """The loss for this batch; None where distillation is off, or the host's answer on this batch was not seen."""
        config = self._garden.config
        if not config.distill or self.on is False or seen is None:
            return None
        if self.on is None:
            found = self._measured(seeds, inputs, targets, loss_function, seen)
            self.on = found.fits
            self._garden.note("distillation", **found.as_event())
        return DistilledLoss(loss_function, seen.output, config) if self.on else None

    def _measured(
        self, seeds: Sequence[Seed], inputs: Tensor, targets: Tensor, loss_function: LossFunction, seen: Seen
    ) -> Fit:
        if not teachable(seen.output):
            return Fit(False, "the model's answer is no tensor of logits", 0, 0, 0)
        garden = self._garden

        def step(samples: int) -> None:
            lesson = DistilledLoss(loss_function, seen.output[:samples], garden.config)
            with _leaving_no_trace(seeds):
                isolation.shadow_step(
                    garden.model, garden.switch, seeds, inputs[:samples], targets[:samples], lesson,
                    seed=0, seen=replace(seen, kept=None), randomness=self._randomness,
                )  # fmt: skip

        return fit(step, len(targets), isolation.device_of(garden.model))


@contextlib.contextmanager
def _leaving_no_trace(seeds: Sequence[Seed]) -> Iterator[None]:
    """Gradients and buffers of ``seeds`` are afterwards what they were."""
    branches = [seed.branch for seed in seeds if seed.branch is not None]
    gradients = [(p, p.grad) for branch in branches for p in branch.parameters()]
    buffers = [(b, b.detach().clone()) for branch in branches for b in branch.buffers()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
