"""What a shadow pass can take over from the model's own pass, so that it begins at the slot instead of the input.

The host is constant in a shadow pass, so everything that the model computed before the first isolated slot would come
out the same again. It is taken from the model's own pass on the same batch: the outermost modules that ended before
the slot did give back what they gave then, and only what comes after the slot runs. This asks nothing of the host but
that it is made of modules; where a host cannot be resumed in this way, the shadow pass is a whole pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from esper_ray.kasmina.randomness import Randomness
from esper_ray.kasmina.slot import Pass, Switch


class Diverged(Exception):
    """The shadow pass called other modules than the model's own pass did."""


@dataclass(frozen=True, slots=True)
class Autocast:
    """The mixed precision that a pass ran under."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Autocast:
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def again(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled)


@dataclass(slots=True)
class Moment:
    """What the model's own pass began from; the monitor repeats the pass from here without the seeds.

    Attributes:
        gradients: those that were there already, where they are accumulated over several passes.
        randomness: states of the generators.
        statistics: buffers of live branches, which are no part of the model.
    """

    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]
    randomness: dict[str, Any]
    statistics: list[tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Seen:
    """The model's own pass on one batch.

    Attributes:
        output: what the model answered, as a constant.
        kept: what the modules before the slot gave, in the order of their calls; None where it is of no use.
        moment: what the pass began from; only where the monitor looks on.
        drawn: states of the generators at its end; likewise.
    """

    inputs: Any
    autocast: Autocast
    output: Any = None
    kept: dict[nn.Module, list[Any]] | None = field(default_factory=dict)
    moment: Moment | None = None
    drawn: dict[str, Any] | None = None


class Witness:
    """Keeps what the model's own pass gives, in steps that have a shadow pass."""

    def __init__(self, model: nn.Module, switch: Switch) -> None:
        self._model, self._switch = model, switch
        self.randomness = Randomness(model)
        self._handles: list[RemovableHandle] = []
        self._upstream: dict[nn.Module, bool] = {}
        self._live: list[nn.Module] = []
        self._watch = self._open = False
        self._versions: list[tuple[nn.Module, Tensor, int]] = []
        self._seen: Seen | None = None

    def arm(self, upstream: Mapping[str, bool], live: Sequence[nn.Module], *, watch: bool) -> None:
        """Look on at the model's next pass; if there are several before `take`, the last one counts.

        Args:
            upstream: names of the modules whose outputs are to be kept, and whether as a copy.
            live: branches in the path that are no part of the model.
            watch: keep what the pass begins from as well.
        """
        self.disarm()
        self._watch, self._live = watch, list(live)
        self._upstream = {self._model.get_submodule(name): copied for name, copied in upstream.items()}
        self._handles = [
            self._model.register_forward_pre_hook(self._begin, prepend=True),
            self._model.register_forward_hook(self._end),
            # Before the slots' own hooks: what is kept is what the host's module gave.
            *(module.register_forward_hook(self._keep, prepend=True) for module in self._upstream),
        ]

    def disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._versions, self._open = [], None, [], False

    def matches(self, inputs: Any) -> bool:
        """Whether the pass that was seen is the one on this batch, and all that came before the slot was kept."""
        seen = self._seen
        return seen is not None and _same(seen.inputs, inputs) and bool(self._upstream) and seen.kept is not None

    def take(self, inputs: Any) -> Seen | None:
        """What was seen of the pass on this very batch, once; None where none was."""
        seen = self._seen
        if seen is not None and seen.kept is not None and self.overwritten():
            seen.kept = None
        self.disarm()
        return seen if seen is not None and _same(seen.inputs, inputs) else None

    def overwritten(self) -> set[str]:
        """Names of the modules whose outputs the host has changed in place since: of these a copy must be kept."""
        changed = {module for module, output, version in self._versions if output._version != version}
        return {name for name, module in self._model.named_modules() if module in changed} if changed else set()

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._switch.current is not Pass.MODEL or self._switch.gauge.looking:
            return
        parameter = next(model.parameters())
        self._seen = Seen(arguments[0] if len(arguments) == 1 else None, Autocast.now(parameter.device.type))
        self._versions, self._open = [], True
        if self._watch:
            self._seen.moment = Moment(
                {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
                self.randomness.save(),
                [(b, b.detach().clone()) for branch in self._live for b in branch.buffers()],
            )

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        seen = self._seen
        if not self._open or seen is None or seen.kept is None or self._switch.gauge.looking:
            return
        constant = as_constant(output)
        if constant is _UNKNOWN:
            seen.kept = None
            return
        if self._upstream[module]:
            constant = _copy(constant)
        seen.kept.setdefault(module, []).append(constant)
        self._versions += [(module, tensor, tensor._version) for tensor in _tensors(constant)]

    def _end(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        # Modules that activation checkpointing runs again in the backward pass come after this.
        if self._open and self._seen is not None and not self._switch.gauge.looking:
            self._open = False
            constant = as_constant(output)
            self._seen.output = None if constant is _UNKNOWN else constant
            self._seen.drawn = self.randomness.save() if self._watch else None


def _same(seen: Any, given: Any) -> bool:
    """Whether two batches are one: a loop may have indexed its data twice."""
    if seen is given:
        return True
    both = isinstance(seen, Tensor) and isinstance(given, Tensor)
    return both and (seen.dtype, seen.device) == (given.dtype, given.device) and torch.equal(seen, given)


_UNKNOWN = object()


def as_constant(value: Any) -> Any:
    """The same with its tensors detached; a marker where it holds something that may hide tensors."""
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, int | float | str):
        return value
    if type(value) in (tuple, list):
        parts = [as_constant(part) for part in value]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else type(value)(parts)
    if type(value) is dict:
        named = {key: as_constant(part) for key, part in value.items()}
        return _UNKNOWN if any(part is _UNKNOWN for part in named.values()) else named
    return _UNKNOWN


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copy(part) for part in value)
    return {key: _copy(part) for key, part in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextlib.contextmanager
def resumed(kept: Mapping[nn.Module, Sequence[Any]]) -> Iterator[None]:
    """Inside, these modules give back what was kept, call by call, instead of running.

    Raises:
        Diverged: a module was called more or less often than then.
    """
    used = dict.fromkeys(kept, 0)
    before = {module: module.__dict__.get("forward") for module in kept}

    def giver(module: nn.Module) -> Any:
        def forward(*_: Any, **__: Any) -> Any:
            if used[module] == len(kept[module]):
                raise Diverged
            used[module] += 1
            return kept[module][used[module] - 1]

        return forward

    try:
        for module in kept:
            module.__dict__["forward"] = giver(module)
        yield
        if any(used[module] != len(outputs) for module, outputs in kept.items()):
            raise Diverged
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


class Trace:
    """Which modules a pass calls before each slot: found by looking on at one pass.

    Args:
        slots: names of the slots' modules.
    """

    def __init__(self, model: nn.Module, slots: Sequence[str]) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._slots = {model.get_submodule(name): name for name in slots}
        self._starts: list[int] = []
        self._done: list[nn.Module] = []
        self._calls: dict[nn.Module, int] = {}
        self._found: dict[str, tuple[list[nn.Module], dict[nn.Module, int]]] = {}

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        handles = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def upstream(self) -> dict[str, list[str]]:
        """For each slot that was reached, in the order of the pass: the outermost modules that ended before or with it.

        A module that is called again behind the slot depends on the seed there, and is left out.
        """
        return {
            slot: [self._names[module] for module in done if self._calls[module] == calls[module]]
            for slot, (done, calls) in self._found.items()
        }

    def _enter(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        if module in self._names:
            self._starts.append(len(self._done))
            self._calls[module] = self._calls.get(module, 0) + 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        if module not in self._names:
            return
        del self._done[self._starts.pop() :]
        self._done.append(module)
        slot = self._slots.get(module)
        if slot is not None and slot not in self._found:
            self._found[slot] = (list(dict.fromkeys(self._done)), dict(self._calls))
