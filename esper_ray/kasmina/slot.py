"""A slot of the host and the seed in it: the whole idea of this package in one screen.

A slot is a forward hook on a module of the host. It is there only while a seed needs it, so a dormant slot runs
nothing. What the hook does with the module's output ``h`` [N, ...] depends on the pass and on the seed's stage:

| pass | TRAINING (isolated) | live, alpha in 0..1 | FOSSILIZED |
|---|---|---|---|
| the model's own | ``h`` | ``h + alpha * delta(stop(h))`` | ``h + delta(h)`` |
| shadow (host constant) | ``h + delta(h)`` | as above, delta constant | as above, delta constant |
| with this seed off | ``h`` | ``h`` | ``h + delta(h)`` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import KernelSpec, SlotInfo
from esper_ray.kasmina.blending import residual
from esper_ray.kasmina.lifecycle import LIVE


class Pass(Enum):
    """Which computation the model is running."""

    MODEL = "model"
    SHADOW = "shadow"


@dataclass(slots=True)
class Seed:
    """One blueprint's life in one slot. ``evidence`` holds what its next gate will look at."""

    number: int
    slot: int
    spec: KernelSpec
    stage: Stage
    born_epoch: int
    stage_epoch: int
    command_id: int
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
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def blueprint(self) -> int:
        return int(self.spec.blueprint.removeprefix("BP"))

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.branch.parameters()) if self.branch is not None else 0


class Slot:
    """A named place in the host. Identity until a seed takes it."""

    def __init__(self, info: SlotInfo, module: nn.Module, switch: Switch) -> None:
        self.info, self._module, self._switch = info, module, switch
        self.seed: Seed | None = None
        self.embargo_until = 0
        self.offences = 0
        self.last_seed = 0
        self.stage = Stage.DORMANT
        self._handle: RemovableHandle | None = None

    @property
    def hooked(self) -> bool:
        """Whether anything of ours sits in the host's path here."""
        return self._handle is not None

    def graft(self, branch: nn.Module) -> None:
        """Put a ready branch into the path. Its alpha is 0 and its stage TRAINING: the output does not change."""
        assert self.seed is not None
        self.seed.branch = branch
        self._handle = self._module.register_forward_hook(self._join)

    def clear(self) -> None:
        """Identity again, at once."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.seed = None, None

    def _join(self, module: nn.Module, inputs: tuple[Any, ...], h: Tensor) -> Tensor:  # noqa: ARG002
        seed = self.seed
        assert seed is not None
        assert seed.branch is not None
        if seed.stage is Stage.FOSSILIZED:
            # The branch is registered in the host by now: in a shadow pass its weights are swapped with the host's.
            return residual(h, seed.branch, 1.0, detach=False)
        if seed.number in self._switch.off or (self._switch.suspended and seed.stage is Stage.TRAINING):
            return h
        if self._switch.observer is not None and seed.stage in LIVE:
            self._switch.observer(seed, h)
        if self._switch.current is Pass.SHADOW:
            if seed.stage is Stage.TRAINING:
                return residual(h, seed.branch, 1.0, detach=False)
            if seed.alpha > 0.0:
                delta: Tensor = functional_call(seed.branch, constants(seed.branch), (h,))
                return h + seed.alpha * delta
            return h
        if seed.alpha == 0.0:
            return h
        return residual(h, seed.branch, seed.alpha, detach=True)


class Switch:
    """What the slots of one model have in common during a pass.

    Attributes:
        off: numbers of the live seeds that are left out.
        suspended: isolated seeds are taken out of every kind of pass.
        observer: called with (seed, h) at each live seed's slot.
    """

    def __init__(self) -> None:
        self.current = Pass.MODEL
        self.off: frozenset[int] = frozenset()
        self.suspended = False
        self.observer: Callable[[Seed, Tensor], None] | None = None


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers as constants: gradients stop, and writes to buffers go to copies."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors.update((name, buffer.detach().clone()) for name, buffer in module.named_buffers())
    return tensors
