"""The ways in which a seed can reach its host, and how each is found.

Everything here looks and changes nothing. `monitor` says when to look.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.kasmina.randomness import Randomness, generators_of
from esper_ray.kasmina.slot import Seed


class Leak(Enum):
    """What a seed shares with its host, or does to it. The value is the diagnosis in the event."""

    SHARED_PARAMETER = "shared parameter"
    MISSING_DETACH = "missing detach"
    SHARED_BUFFER = "shared buffer"
    SHARED_GENERATOR = "shared random generator"
    OPTIMIZER_GROUP = "seed in the host's optimizer group"
    WRITING_HOOK = "hook that writes"
    UNEXPLAINED = "host gradients differ, cause unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One leak: what kind, where it shows, and the number of the seed, 0 where it cannot be told which."""

    kind: Leak
    where: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.where}" if self.where else self.kind.value


# What is shared


def shared_tensors(seed: Seed, model: nn.Module) -> Iterator[Finding]:
    """Parameters and buffers of the seed that lie in the memory of one of the host's."""
    assert seed.branch is not None
    hosts = {_memory(tensor): name for name, tensor in tensors_of(model).items() if tensor.numel()}
    for kind, tensors in (
        (Leak.SHARED_PARAMETER, seed.branch.named_parameters()),
        (Leak.SHARED_BUFFER, seed.branch.named_buffers()),
    ):
        for name, tensor in tensors:
            if tensor.numel() and (host := hosts.get(_memory(tensor))) is not None:
                yield Finding(kind, f"{name} is the host's {host}", seed.number)


def shared_generators(seed: Seed, model: nn.Module) -> Iterator[Finding]:
    """Generators that a module of the seed and a module of the host both hold."""
    assert seed.branch is not None
    hosts = {id(generator): name for name, generator in generators_of(model)}
    for name, generator in generators_of(seed.branch):
        if id(generator) in hosts:
            yield Finding(Leak.SHARED_GENERATOR, f"{name} is the host's {hosts[id(generator)]}", seed.number)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# What is written


class Values:
    """The host's parameters, buffers and generators at one moment."""

    def __init__(self, model: nn.Module, randomness: Randomness) -> None:
        self._tensors, self._randomness = tensors_of(model), randomness
        self._buffers = {name for name, _ in model.named_buffers()}
        self._before: dict[str, Tensor] = {}
        self.renew()

    def renew(self) -> None:
        """From now on this is the moment."""
        self._before = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._states = self._randomness.save()

    def changes(self, seed: int = 0) -> list[Finding]:
        """What changed since, blamed on ``seed``. torch's default generators are forked, or shared on purpose."""
        found = []
        for name, before in self._before.items():
            if not same(before, self._tensors[name]):
                kind = Leak.SHARED_BUFFER if name in self._buffers else Leak.WRITING_HOOK
                found.append(Finding(kind, f"the host's {name} was written", seed))
        for name in self._randomness.moved(self._states):
            found.append(Finding(Leak.SHARED_GENERATOR, f"the seed draws from {name}", seed))
        return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, where a NaN equals itself."""
    return torch.equal(a, b) or bool(torch.isclose(a, b, rtol=0.0, atol=0.0, equal_nan=True).all())


# Where gradients would go


def graph_of(tensor: Tensor | None) -> set[Any]:
    """All nodes of the autograd graph that ``tensor`` came from."""
    start = tensor.grad_fn if tensor is not None else None
    return {node for node, _ in _walk(start, frozenset())} if start is not None else set()


def reached(
    output: Tensor, own: Iterable[Tensor], host: set[Any], names: Mapping[Tensor, str], seed: int
) -> list[Finding]:
    """Leaks that the graph of a branch's output shows.

    Args:
        own: parameters through which gradients may flow.
        host: nodes of the host's own graph; behind one of them lies an activation that was not detached.
        names: of the host's parameters.
    """
    if output.grad_fn is None:
        return []
    allowed = set(own)
    found: dict[Finding, None] = {}
    for node, through_host in _walk(output.grad_fn, host):
        leaf = getattr(node, "variable", None)
        if leaf is None or leaf in allowed or leaf not in names:
            continue
        if through_host:
            finding = Finding(Leak.MISSING_DETACH, "an activation of the host enters with its graph", seed)
        else:
            finding = Finding(Leak.SHARED_PARAMETER, f"it computes with the host's {names[leaf]}", seed)
        found[finding] = None
    return list(found)


def _walk(start: Any, host: set[Any] | frozenset[Any]) -> Iterator[tuple[Any, bool]]:
    """Every node from ``start`` down, with whether it was first reached through a node of ``host``."""
    waiting: list[tuple[Any, bool]] = [(start, False)]
    known: set[Any] = set()
    while waiting:
        node, through = waiting.pop()
        if node in known:
            continue
        known.add(node)
        yield node, through
        # A leaf's own node is in the host's graph too, and says nothing about how it was reached.
        inside = through or (node in host and not hasattr(node, "variable"))
        waiting.extend((following, inside) for following, _ in node.next_functions if following is not None)


# Hooks

_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def hooks_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, dictionary of hooks) wherever the host's modules and parameters have some."""
    # PyTorch offers no public way to list hooks.
    for name, module in model.named_modules():
        for kind in _MODULE_HOOKS:
            if getattr(module, kind):
                yield name or "the model", getattr(module, kind)
    for name, parameter in model.named_parameters():
        for kind in _TENSOR_HOOKS:
            if getattr(parameter, kind, None):
                yield name, getattr(parameter, kind)


def foreign_hooks(model: nn.Module, known: Collection[int]) -> list[tuple[str, Any, int]]:
    """(name, dictionary, key) of hooks that are neither among ``known`` ids nor ours."""
    found = []
    for name, hooks in hooks_of(model):
        for key, hook in hooks.items():
            ours = str(getattr(hook, "__module__", "")).startswith("esper_ray.")
            if id(hook) not in known and not ours:
                found.append((name, hooks, key))
    return found
