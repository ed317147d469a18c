"""A slot of the host and the seed in it: the whole idea of this package in one screen.

A slot is a forward hook on a module of the host. It is there only while a seed needs it, so a dormant slot runs
nothing. What the hook does with the module's output ``h`` [N, ...] depends on the pass and on the seed's stage. With
``d`` the branch and ``B(h, d, alpha)`` the blend of its mode, ``h + alpha * d`` in RESIDUAL:

| pass | TRAINING (isolated) | live, alpha in 0..1 | FOSSILIZED, and after it |
|---|---|---|---|
| the model's own | ``h`` | ``B(h, d(stop(h)), alpha)`` | ``B(h, d(h), 1)`` |
| shadow (host constant) | ``B(h, d(h), 1)`` | as above, d's weights constant | as above, d's weights constant |
| with this seed off | ``h`` | ``h`` | ``B(h, d(h), 1)`` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_ray.contracts.enums import BlendMode
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import KernelSpec, SlotInfo
from esper_ray.kasmina.blending import blend
from esper_ray.kasmina.confidence import Gauge
from esper_ray.kasmina.lifecycle import LIVE, SETTLED

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


class Handle(Protocol):
    """What takes a hook away again."""

    def remove(self) -> None: ...


class Pass(Enum):
    """Which computation the model is running."""

    MODEL = "model"
    SHADOW = "shadow"


@dataclass(slots=True)
class Seed:
    """One blueprint's life in one slot.

    Attributes:
        evidence: what its next gate will look at.
        held_until: the gates leave it alone in epochs before this one.
        sample: its next pass writes down how far it moves the slot's output.
    """

    number: int
    slot: int
    spec: KernelSpec
    stage: Stage
    born_epoch: int
    stage_epoch: int
    command_id: int
    mode: BlendMode = BlendMode.RESIDUAL
    schedule: str = "linear"
    alpha: float = 0.0
    ramp_start: int = 0
    ramp_steps: int = 1
    branch: nn.Module | None = None
    digest: str = ""
    flops_forward: int = 0
    flops_backward: int = 0
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    violations: int = 0
    held_until: int = 0
    evidence: dict[str, Any] = field(default_factory=dict)
    sample: bool = False

    @property
    def blueprint(self) -> int:
        return int(self.spec.blueprint.removeprefix("BP"))

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.branch.parameters()) if self.branch is not None else 0


class Slot:
    """A named place in the host. Identity until a seed takes it."""

    def __init__(self, info: SlotInfo, module: nn.Module, switch: Switch) -> None:
        self.info, self.module, self._switch = info, module, switch
        self.seed: Seed | None = None
        self.embargo_until = 0
        self.offences = 0
        self.last_seed = 0
        self.stage = Stage.DORMANT
        self._handle: Handle | None = None
        # Where the hook goes: a loop whose model may be compiled has a place of its own for it.
        self.hang: Callable[[Hook], Handle] = module.register_forward_hook

    @property
    def hooked(self) -> bool:
        """Whether anything of ours sits in the host's path here."""
        return self._handle is not None

    @property
    def idle(self) -> bool:
        """Whether the model's own pass leaves here what came, whatever else is set."""
        return self.seed is None or self.seed.branch is None or self.seed.stage is Stage.TRAINING

    def graft(self, branch: nn.Module) -> None:
        """Put a ready branch into the path. Its alpha is 0 and its stage TRAINING: the output does not change."""
        assert self.seed is not None
        self.seed.branch = branch
        self._handle = self.hang(self._join)
        if self.seed.mode is BlendMode.CONFIDENCE:
            self._switch.gauge.add(self.seed)

    def settle(self) -> None:
        """The seed is a part of the host from now on: its alpha is 1 for good."""
        assert self.seed is not None
        self.seed.alpha = 1.0
        self._switch.gauge.remove(self.seed)

    def clear(self) -> None:
        """Identity again, at once."""
        if self._handle is not None:
            self._handle.remove()
        if self.seed is not None:
            self._switch.gauge.remove(self.seed)
        self._handle, self.seed = None, None

    def _join(self, module: nn.Module, inputs: tuple[Any, ...], h: Tensor) -> Tensor:  # noqa: ARG002
        seed, switch = self.seed, self._switch
        assert seed is not None
        assert seed.branch is not None
        if seed.stage in SETTLED:
            # The branch is registered in the host by now: in a shadow pass its weights are swapped with the host's.
            return self._blend(seed, h, seed.branch(h), 1.0)
        if seed.number in switch.off:
            return h
        if seed.stage is Stage.TRAINING:
            alone = switch.current is not Pass.SHADOW or switch.suspended or switch.gauge.looking
            return h if alone else self._blend(seed, h, seed.branch(h), 1.0)
        ramping = 0.0 < seed.alpha < 1.0
        if seed.mode is BlendMode.CONFIDENCE and ramping and switch.gauge.looking:
            return h
        y = h if seed.alpha == 0.0 else self._blend(seed, h, self._delta(seed, h), seed.alpha)
        if switch.observer is not None and seed.stage in LIVE:
            switch.observer(seed, h, y)
        if seed.sample and not switch.gauge.looking:
            seed.sample = False
            seed.evidence.setdefault("moves", []).append(relative_move(h, y))
        return y

    def _delta(self, seed: Seed, h: Tensor) -> Tensor:
        """What a live branch makes of ``h``; the host learns nothing through it."""
        assert seed.branch is not None
        if self._switch.current is Pass.SHADOW:
            constant: Tensor = functional_call(seed.branch, constants(seed.branch), (h,))
            return constant
        delta: Tensor = seed.branch(h.detach())
        return delta

    def _blend(self, seed: Seed, h: Tensor, delta: Tensor, alpha: float) -> Tensor:
        margin = self._switch.gauge.margin
        return blend(seed.mode, h, delta, alpha, kind=self.info.signature.kind, margin=margin)


class Switch:
    """What the slots of one model have in common during a pass.

    Attributes:
        off: numbers of the live seeds that are left out.
        suspended: isolated seeds are taken out of every kind of pass.
        observer: called with (seed, h, y) at each live seed's slot: what comes in and what leaves.
        gauge: knows how sure the model is, for seeds that blend by it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gauge = Gauge(model)
        self.current = Pass.MODEL
        self.off: frozenset[int] = frozenset()
        self.suspended = False
        self.observer: Callable[[Seed, Tensor, Tensor], None] | None = None


def relative_move(h: Tensor, y: Tensor) -> float:
    """How far the slot's output moved, as a share of its own size: ``|y - h| / |h|``."""
    with torch.no_grad():
        return float((y - h).norm() / h.norm().clamp_min(1e-12))


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers as constants: gradients stop, and writes to buffers go to copies."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors.update((name, buffer.detach().clone()) for name, buffer in module.named_buffers())
    return tensors
