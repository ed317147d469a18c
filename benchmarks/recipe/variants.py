"""What an ablation changes that is no setting: each a patch around one run.

| variant | what is different |
|---|---|
| ``birth zero`` | the newborn's last convolution is zero, so that it begins as no change at full strength |
| ``birth gain 0.1``, ``birth gain 1`` | the gain per channel of a newborn, 0.5 in the catalogue |
| ``birth gradmax`` | its last convolution begins along the directions in which the loss falls fastest |
| ``host learns`` | what lies before a slot learns through a live branch as well |
| ``host warm-up`` | the host's rate drops to a tenth when a seed is born, and rises again over 32 steps |
| ``ramp 8`` | alpha is 1 after so many steps; the rest of the epoch it stays there |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.recipe.gradmax import start_along_the_gradient
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina import advance
from esper_ray.kasmina.births import Births
from esper_ray.kasmina.slot import Pass, Seed, Slot
from esper_ray.tolaria.learning_rate import LearningRates
from esper_ray.tolaria.loop import Loop

Patch = Callable[[contextlib.ExitStack], None]


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, made: Callable[[Any], Any]) -> None:
    stack.enter_context(mock.patch.object(owner, name, made(getattr(owner, name))))


def _newborn(change: Callable[[nn.Module], None]) -> Patch:
    def made(bear: Any) -> Any:
        def changed(self: Births, *args: Any) -> nn.Module:
            module: nn.Module = bear(self, *args)
            with torch.no_grad():
                change(module)
            return module

        return changed

    return lambda stack: _replace(stack, Births, "_bear", made)


def _zero(module: nn.Module) -> None:
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    convolutions[-1].weight.zero_()


def _gain(value: float) -> Patch:
    return _newborn(lambda module: getattr(module, "scale").fill_(value))  # noqa: B009


def _host_learns(stack: contextlib.ExitStack) -> None:
    def made(delta: Any) -> Any:
        def changed(self: Slot, seed: Seed, h: Tensor) -> Tensor:
            shadow = self._switch.current is Pass.SHADOW
            assert seed.branch is not None
            through: Tensor = delta(self, seed, h) if shadow else seed.branch(h)
            return through

        return changed

    _replace(stack, Slot, "_delta", made)


def _host_warms_up(stack: contextlib.ExitStack) -> None:
    def made(host_rate: Any) -> Any:
        def changed(self: LearningRates, step: int) -> float:
            born = max(self._births.values(), default=None)
            age = 32 if born is None else step - born
            return float(host_rate(self, step)) * (0.1 + 0.9 * age / 32 if 0 <= age < 32 else 1.0)

        return changed

    _replace(stack, LearningRates, "host_rate", made)


def _ramp(steps: int) -> Patch:
    def made(try_stage: Any) -> Any:
        def changed(garden: Any, slot: Slot, to: Stage, **rest: Any) -> Any:
            verdict = try_stage(garden, slot, to, **rest)
            if verdict.passed and to is Stage.BLENDING and slot.seed is not None:
                slot.seed.ramp_steps = steps
            return verdict

        return changed

    return lambda stack: _replace(stack, advance, "try_stage", made)


def _gradmax(stack: contextlib.ExitStack) -> None:
    def made(adopt: Any) -> Any:
        def changed(self: Loop, seed: Seed) -> None:
            start_along_the_gradient(self, seed)
            adopt(self, seed)

        return changed

    _replace(stack, Loop, "adopt", made)


VARIANTS: Mapping[str, Patch] = {
    "birth zero": _newborn(_zero),
    "birth gain 0.1": _gain(0.1),
    "birth gain 1": _gain(1.0),
    "birth gradmax": _gradmax,
    "host learns": _host_learns,
    "host warm-up": _host_warms_up,
    "ramp 8": _ramp(8),
}


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """The variant of that name; nothing for an empty one."""
    with contextlib.ExitStack() as stack:
        if name:
            VARIANTS[name](stack)
        yield
