"""Kernels on their way: asked for without waiting, built and checked between two steps."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper_ray.contracts.ports import Answer, Kernel, KernelSource, SlotInfo
from esper_ray.errors import EsperError
from esper_ray.karn import blueprints
from esper_ray.kasmina.slot import Seed
from esper_ray.reliability.ids import derive_seed


@dataclass(slots=True)
class Pending:
    """A kernel that was asked for. ``error`` says why it will never come."""

    seed: Seed
    answer: Answer[Kernel]
    kernel: Kernel | None = None
    error: str = ""

    def ready(self, timeout: float | None) -> bool:
        """Whether the kernel is there, or will never be, within ``timeout`` seconds (0 polls, None waits)."""
        if self.kernel is None and not self.error:
            try:
                self.kernel = self.answer.wait(timeout)
            except EsperError as fault:
                self.error = str(fault)
        return self.kernel is not None or bool(self.error)


def ask(source: KernelSource, seed: Seed) -> Pending:
    """Ask for the kernel of ``seed``; returns at once."""
    return Pending(seed, source.fetch(seed.spec))


def bear(
    kernel: Kernel, seed: Seed, *, run_seed: int, branch: int, approved: Collection[str] = frozenset()
) -> nn.Module:
    """Build the newborn block: its weights are drawn by (run seed, branch, number), not taken from the artifact.

    It runs eagerly, whatever strategy the forge found faster: warming up compiled code stops the training for longer
    than a graft may take.
    """
    generator = torch.Generator().manual_seed(derive_seed(run_seed, "birth", branch, seed.number))
    spec = kernel.spec
    return blueprints.build(spec.blueprint, spec.signature, spec.parameters, generator=generator, approved=approved)


def birth_evidence(kernel: Kernel, module: nn.Module, info: SlotInfo, *, run_seed: int) -> dict[str, float | bool]:
    """What G0 asks of a newborn, measured on a small random input: unchanged output, live gradients."""
    generator = torch.Generator().manual_seed(derive_seed(run_seed, "birth check", info.index))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    h: Tensor = torch.randn((4, *info.signature.shape), generator=generator).to(device)
    with torch.no_grad():
        before = h.clone()
        delta = module(h)
        kept = delta.shape == h.shape
        change = float((h + 0.0 * delta - before).abs().max()) if kept else float("inf")
    parameters = list(module.parameters())
    dead = 0
    if parameters and kept:
        gradients = torch.autograd.grad((h + module(h)).square().mean(), parameters, allow_unused=True)
        dead = sum(g is None or not bool(torch.isfinite(g).all()) or not bool(g.any()) for g in gradients)
    return {
        "digest_known": bool(kernel.digest),
        "shape_kept": kept,
        "birth_change": change,
        "dead_parameters": dead,
    }


class Stopwatch:
    """Milliseconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def ms(self) -> float:
        return (time.perf_counter() - self._start) * 1e3
