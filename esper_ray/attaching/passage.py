"""How a compiled model passes through a slot: one operator, which PyTorch's compiler calls and does not look into.

What is hung on a slot changes as seeds come and go, and compiled code does not. So the code has an operator at the slot
that runs, in Python, whatever hangs there now. Nothing is compiled anew when a seed comes, and there is no graph break.

The compiler may write over what it gave an operator, and over what it got, as soon as it needs neither. So both ends of
the operator are copies; the block in between has tensors of its own, and its part of the backward pass is its own too.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# Passes of which the backward pass did not come are forgotten when so many others came since.
_MOST_OPEN = 64
_NOTHING = -1


class Socketed(Protocol):
    """What an operator passes through."""

    def passing(self, h: Tensor, dtype: torch.dtype | None, *, training: bool) -> bool:
        """A pass is here, in that mixed precision or in none; whether anything joins it."""

    def join(self, h: Tensor, dtype: torch.dtype | None) -> Tensor:
        """What leaves the slot for ``h``."""


class End:
    """One slot's end of the operator.

    Attributes:
        number: what compiled code knows it by.
    """

    def __init__(self, socket: Socketed) -> None:
        self.number, self._socket = next(_NUMBERS), socket
        self._tokens = itertools.count()
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        _ENDS[self.number] = self

    def forward(self, h: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, int]:
        """What leaves the slot, in memory of its own, and a token by which the backward pass finds this pass."""
        if not self._socket.passing(h, dtype, training=True):
            return _like(h, h), _NOTHING
        with _recording():
            leaf = h.detach().clone().requires_grad_()
            y = self._socket.join(leaf, dtype)
        token = next(self._tokens)
        self._open[token] = (leaf, y)
        while len(self._open) > _MOST_OPEN:
            del self._open[next(iter(self._open))]
        return _like(h, y), token

    def backward(self, gradient: Tensor, token: int) -> Tensor:
        """The gradient of ``h``; parameters of the block get theirs added."""
        if token == _NOTHING:
            return _like(gradient, gradient)
        leaf, y = self._open.pop(token)
        if y.requires_grad:
            with _recording():
                torch.autograd.backward(y, gradient.clone())
        return torch.zeros_like(gradient) if leaf.grad is None else _like(gradient, leaf.grad)

    def constant(self, h: Tensor, dtype: torch.dtype | None) -> Tensor:
        """What leaves the slot in a pass without gradients."""
        joined = self._socket.passing(h, dtype, training=False)
        return _like(h, self._socket.join(h.detach().clone(), dtype) if joined else h)


_NUMBERS = itertools.count()
_ENDS: weakref.WeakValueDictionary[int, End] = weakref.WeakValueDictionary()


def _like(pattern: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` laid out as ``pattern``: compiled code has settled the layout beforehand."""
    return torch.empty_like(pattern).copy_(value.detach())


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Inside, autograd records again: compiled code runs below it, and PyTorch has no public way up again."""
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


# A CUDA graph would repeat what the operator did once, and not ask again what hangs at the slot.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("esper_ray::pass_slot", mutates_args=(), tags=_TAGS)
def pass_slot(h: Tensor, anchor: Tensor, number: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """``h`` [N, ...] through the slot, with gradients to come; the second output names the pass.

    Args:
        anchor: wants a gradient, so that there is a backward pass also where nothing before the slot trains.
    """
    y, token = _ENDS[number].forward(h, dtype)
    return y, torch.tensor(token)


@torch.library.custom_op("esper_ray::pass_slot_back", mutates_args=(), tags=_TAGS)
def pass_slot_back(gradient: Tensor, token: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The gradient of ``h``, and one of zero for the anchor."""
    return _ENDS[number].backward(gradient, int(token)), torch.zeros(())


@torch.library.custom_op("esper_ray::pass_slot_constant", mutates_args=(), tags=_TAGS)
def pass_slot_constant(h: Tensor, number: int, dtype: torch.dtype | None) -> Tensor:
    """``h`` [N, ...] through the slot, without gradients."""
    return _ENDS[number].constant(h, dtype)


@pass_slot.register_fake
def _(h: Tensor, anchor: Tensor, number: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(h), torch.empty((), dtype=torch.int64, device="cpu")


@pass_slot_back.register_fake
def _(gradient: Tensor, token: Tensor, number: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(gradient), torch.empty((), device="cpu")


@pass_slot_constant.register_fake
def _(h: Tensor, number: int, dtype: torch.dtype | None) -> Tensor:  # noqa: ARG001
    return torch.empty_like(h)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.number = inputs[2]
    ctx.save_for_backward(output[1])


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (token,) = ctx.saved_tensors
    found, nothing = pass_slot_back(gradient, token, ctx.number)
    return found, nothing, None, None


pass_slot.register_autograd(_back, setup_context=_keep)


def through(h: Tensor, anchor: Tensor, number: int, dtype: torch.dtype | None) -> Tensor:
    """What compiled code calls at a slot."""
    if torch.is_grad_enabled():
        y: Tensor = torch.ops.esper_ray.pass_slot(h, anchor, number, dtype)[0]
        return y
    found: Tensor = torch.ops.esper_ray.pass_slot_constant(h, number, dtype)
    return found
