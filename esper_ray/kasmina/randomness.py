"""The random generators that a pass of the host may draw from, kept and given back as one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def generators_of(model: nn.Module) -> Iterator[tuple[str, Generator]]:
    """Random generators that the model's modules hold as attributes, with their names."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Generator):
                yield f"{prefix}.{name}".lstrip("."), value


class Randomness:
    """All that a model may draw from: torch's, numpy's and Python's default generators, and those that it holds."""

    def __init__(self, model: nn.Module) -> None:
        self._device = device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._accessors: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
            "torch's default generator": (torch.get_rng_state, torch.set_rng_state),
            "numpy's default generator": (np.random.get_state, np.random.set_state),
            "Python's default generator": (random.getstate, random.setstate),
        }
        if device.type == "cuda":
            self._accessors["torch's default generator of the device"] = (
                lambda: torch.cuda.get_rng_state(device),
                lambda state: torch.cuda.set_rng_state(state, device),
            )
        self._accessors |= {name: _accessors(generator) for name, generator in generators_of(model)}

    def save(self) -> dict[str, Any]:
        return {name: read() for name, (read, _) in self._accessors.items()}

    def load(self, states: dict[str, Any]) -> None:
        for name, state in states.items():
            self._accessors[name][1](state)

    def moved(self, states: dict[str, Any]) -> list[str]:
        """Names of the generators, torch's default ones aside, that are no longer where they were."""
        return [name for name in differing(states, self.save()) if not name.startswith("torch's")]

    @contextlib.contextmanager
    def forked(self, seed: int) -> Iterator[None]:
        """torch draws from ``seed`` inside; outside everything goes on as if nothing had been drawn."""
        states = self.save()
        # Those that are given back, and no others: torch.manual_seed would write those of every device.
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)
        try:
            yield
        finally:
            self.load(states)


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the generators whose states differ."""
    return [name for name in before if not _equal(before[name], after[name])]


def _accessors(generator: Generator) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    if isinstance(generator, torch.Generator):
        return generator.get_state, generator.set_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, np.random.RandomState):
        return generator.get_state, generator.set_state
    bits = generator.bit_generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)


def _equal(a: Any, b: Any) -> bool:
    """Two states of one generator, as torch, numpy or Python gives them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple) and any(isinstance(part, np.ndarray) for part in a):
        return all(_equal(part, other) for part, other in zip(a, b, strict=True))
    return bool(a == b)
