"""Builds one kernel, checks that it may be grafted, and measures it, eager and compiled. Runs in the job process.

Times are milliseconds of one forward and backward pass over a batch of 64. On the processor they are processor
time, not wall time, so that a job in the background measures the kernel and not its neighbours.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import KernelSpec
from esper_ray.errors import KernelError
from esper_ray.karn.blueprints import build
from esper_ray.karn.catalog import CATALOG
from esper_ray.reliability.ids import derive_seed
from esper_ray.tezzeret.strategies import STRATEGIES, StrategyName
from esper_ray.tezzeret.toolchain import BATCH, THREADS

# Making a block grows nothing: whether an experimental one may grow is asked where it would.
_USABLE = BlueprintTier.EXPERIMENTAL
_CHECKED = 4
_EAGER_ROUNDS, _EAGER_MS = 3, 40.0
_CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def make(spec: KernelSpec) -> tuple[bytes, dict[str, Any]]:
    """A checked and measured eager kernel: its weights as safetensors bytes, and what was found out.

    Raises:
        BlueprintError: the spec names no block that fits.
        KernelError: the block breaks a promise of `check`.
    """
    blueprint = CATALOG.get(spec.blueprint, tier_ceiling=_USABLE)
    branch = build(spec.blueprint, spec.signature, spec.parameters, tier_ceiling=_USABLE)
    ratio = check(spec, branch)
    forward, backward = flops(spec, branch)
    eager_ms = measure(
        [_step(branch, _activations(spec, BATCH), branch.parameters())], _EAGER_ROUNDS, _EAGER_MS, clock_of(spec)
    )[0]
    metadata = {
        "name": blueprint.name,
        "family": blueprint.family,
        "tier": int(blueprint.tier),
        "block_parameters": blueprint.resolve(spec.parameters),
        "parameters_count": sum(parameter.numel() for parameter in branch.parameters()),
        "flops_forward": forward,
        "flops_backward": backward,
        "scale_ratio": ratio,
        "strategy": "eager",
        "eager_ms": eager_ms,
        "compiled_ms": None,
        "batch": BATCH,
        "threads": THREADS,
        "torch": torch.__version__,
    }
    return safetensors.torch.save(branch.state_dict()), metadata


def check(spec: KernelSpec, branch: nn.Module) -> float:
    """Whether the newborn branch keeps what a graft relies on; returns its deviation relative to its input's.

    Raises:
        KernelError: it changes the shape or, at alpha 0, the output; it is not finite; a parameter does not learn.
    """
    h = _activations(spec, _CHECKED)
    before = h.detach().clone()
    delta = branch(h)
    if not torch.equal(h, before):
        raise KernelError(f"{spec.key} writes into its own input.")
    if delta.shape != h.shape:
        raise KernelError(f"{spec.key} turns {tuple(h.shape)} into {tuple(delta.shape)}.")
    if not torch.isfinite(delta).all():
        raise KernelError(f"{spec.key} gives values that are not finite.")
    if not torch.equal(h + 0.0 * delta, h):
        raise KernelError(f"{spec.key} changes the output at alpha 0.")
    if delta.requires_grad:
        (0.5 * (h + delta).pow(2)).mean().backward()
    for name, parameter in branch.named_parameters():
        gradient = parameter.grad
        if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
            raise KernelError(f"{spec.key} cannot learn: the gradient of {name} is zero or not finite.")
    branch.zero_grad(set_to_none=True)
    return float(delta.detach().std() / h.detach().std())


def flops(spec: KernelSpec, branch: nn.Module) -> tuple[int, int]:
    """FLOPs per sample of the forward and of the backward pass, counted while they run."""
    h = _activations(spec, _CHECKED)
    with FlopCounterMode(display=False) as forward:
        delta = branch(h)
    with FlopCounterMode(display=False) as backward:
        if delta.requires_grad:
            torch.autograd.grad(delta, [h, *branch.parameters()], torch.ones_like(delta))
    return forward.get_total_flops() // _CHECKED, backward.get_total_flops() // _CHECKED


def compare(spec: KernelSpec, strategy: StrategyName = "standard") -> dict[str, float]:
    """Compile the block, forward and backward, and measure it against eager, in turns.

    Returns:
        ``eager_ms``, ``compiled_ms``, and until the first compiled step was through ``compile_seconds`` of wall time
        and ``compile_busy_seconds`` of processor time, the compilers' included.

    Raises:
        KernelError: the compiled block computes something else.
    """
    branch = build(spec.blueprint, spec.signature, spec.parameters, tier_ceiling=_USABLE)
    h = _activations(spec, BATCH)
    eager = _step(branch, h, branch.parameters())
    # All branches share one forward(); without the reset torch's recompile limit would quietly leave later ones eager.
    torch.compiler.reset()
    started, busy = time.perf_counter(), _busy_seconds()
    how = STRATEGIES[strategy]
    fast = torch.compile(branch, dynamic=False, fullgraph=True, options=dict(how.options) or None)
    compiled = _step(fast, h, branch.parameters())
    found = compiled()
    spent = {
        "compile_seconds": time.perf_counter() - started,
        "compile_busy_seconds": _busy_seconds() - busy,
    }
    for ours, theirs in zip(eager(), found, strict=True):
        size = float(ours.abs().max())
        if not torch.allclose(ours, theirs, rtol=_CLOSE["rtol"], atol=_CLOSE["atol"] * max(1.0, size)):
            raise KernelError(f"{spec.key} computes something else when compiled.", why=f"Off by {ours - theirs}.")
    eager_ms, compiled_ms = measure([eager, compiled], how.rounds, 0.0, clock_of(spec))
    return {"eager_ms": eager_ms, "compiled_ms": compiled_ms, **spent}


def _busy_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def measure(
    steps: Sequence[Callable[[], object]], rounds: int, least_ms: float, now: Callable[[], float]
) -> list[float]:
    """Median milliseconds of each step, taken in turns after one warm-up, for ``rounds`` and at least ``least_ms``.

    Args:
        now: a clock in seconds.
    """
    for step in steps:
        step()
    taken: list[list[float]] = [[] for _ in steps]
    while len(taken[0]) < rounds or (sum(map(sum, taken)) < least_ms and len(taken[0]) < 100):
        for times, step in zip(taken, steps, strict=True):
            started = now()
            step()
            times.append((now() - started) * 1e3)
    return [sorted(times)[len(times) // 2] for times in taken]


def clock_of(spec: KernelSpec) -> Callable[[], float]:
    """Processor time on the CPU; wall time after all work is through on a device that works by itself."""
    if spec.signature.device == "cpu":
        return time.process_time

    def now() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return now


def _step(
    branch: Callable[[Tensor], Tensor], h: Tensor, parameters: Iterable[nn.Parameter]
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; gives the output and the gradients of input and parameters."""
    wanted = [h, *parameters]

    def run() -> tuple[Tensor, ...]:
        delta = branch(h)
        if not delta.requires_grad:
            return (delta,)
        return (delta.detach(), *torch.autograd.grad(delta, wanted, torch.ones_like(delta)))

    return run


def _activations(spec: KernelSpec, samples: int) -> Tensor:
    """Unit-deviation input, the same at each call."""
    signature = spec.signature
    generator = torch.Generator().manual_seed(derive_seed("forge", spec.key))
    h = torch.empty(samples, *signature.shape).normal_(generator=generator)
    return h.to(device=signature.device, dtype=getattr(torch, signature.dtype)).requires_grad_()
