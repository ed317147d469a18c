"""What sits at each slot of a model in the user's own loop from the start, so that a seed can come later.

PyTorch's compiler does not see hooks that are added after it compiled a model: it would silently leave seeds out. So a
hook is there before, and seeds are hung on it, not on the model. In plain code it calls what hangs there. Compiled code
is made of it in two variants: with the sockets open it passes through an operator (`passage`), closed it has nothing of
ours in it. Closed is how a model trains in which nothing grows. Both are made in the first two steps, so that no seed
has to wait for a compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from esper_ray.attaching import passage
from esper_ray.errors import HostError
from esper_ray.kasmina.slot import Hook, Slot
from esper_ray.kasmina.witness import Autocast


def refuse_compiled(model: nn.Module) -> None:
    """Raises:
    HostError: the model, or a part of it, is compiled already, or copies of it are made elsewhere.
    """
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise HostError(
            f"A {type(model).__name__} cannot grow.",
            why="Its replicas would not get the new blocks.",
            remedy="Attach the module inside, on one device.",
        )
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    if hasattr(model, "_orig_mod") or compiled:
        what = compiled[0] if compiled and compiled[0] else type(model).__name__
        raise HostError(
            f"{what} is compiled already.",
            why="Hooks that are added after torch.compile are silently ignored, so a seed would do nothing.",
            remedy="Attach the plain model first, and compile it afterwards.",
        )


class Sockets:
    """The hooks of one model's slots.

    Attributes:
        open: compiled code passes through the slots' operators.
        compiled: the model was once run by PyTorch's compiler.
        autocast: the mixed precision of the last training pass that was seen; None before the first one.
        passes: grows with each training pass that is seen.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.open, self.compiled = True, False
        self.autocast: Autocast | None = None
        self.passes = 0
        self._device = next(model.parameters()).device.type
        self._settled = False
        self._sockets = {name: Socket(self) for name in names}
        self._handles = {
            name: model.get_submodule(name).register_forward_hook(_hook_of(self, socket, self._device))
            for name, socket in self._sockets.items()
        }

    def take(self, slots: Iterable[Slot]) -> None:
        """From now on seeds of these slots are hung here."""
        for slot in slots:
            socket = self._sockets[slot.info.name]
            socket.slot = slot
            slot.hang = socket.hang

    def demand_reached(self) -> None:
        """Refuse a training pass that seeds would have no part in, or in which they cannot be trained.

        Raises:
            HostError: it missed a slot, or ran under float16.
        """
        missed = [name for name, socket in self._sockets.items() if not socket.reached]
        if missed:
            raise HostError(
                f"The model's pass did not reach {', '.join(missed)}.",
                why="It, or another one of its class, was compiled before it was attached; or a copy of it is trained.",
                remedy="Attach the plain model, call torch.compiler.reset(), compile it, and run it before others.",
            )
        if self.autocast is not None and self.autocast.enabled and self.autocast.dtype is torch.float16:
            raise HostError(
                "Seeds cannot be trained under float16.",
                why="Its gradients are scaled by a factor that is not known here.",
                remedy="Use bfloat16 in torch.autocast; it needs no scaling.",
            )

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Inside, the model runs in the precision that it is trained in, and by its plain code."""
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(self.autocast.again())
            stack.enter_context(self.plainly())
            yield

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """Inside, the model runs by its plain code: compiled in place, it knows nothing of hooks that came later."""
        # The compiler takes seconds to load, so it is not asked where it was never used.
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            yield

    def forget(self) -> None:
        """Passes that were no training do not count."""
        self.autocast = None
        for socket in self._sockets.values():
            socket.reached = False

    def settle(self) -> None:
        """The first step is done: from now on the sockets are open only while something hangs on one of them."""
        self._settled = True
        self.refresh()

    def refresh(self) -> None:
        self.open = not self._settled or any(socket.hook is not None for socket in self._sockets.values())

    def note(self, autocast: Autocast) -> None:
        """A training pass was here."""
        self.passes += 1
        self.autocast = autocast

    def remove(self) -> None:
        """Take away the hooks on which nothing hangs. What has grown stays: the model predicts as before."""
        for name, socket in self._sockets.items():
            if socket.hook is None and name in self._handles:
                self._handles.pop(name).remove()


class Socket:
    """One slot's end: what hangs there now, and the operator of compiled code.

    Attributes:
        reached: a training pass was here.
    """

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self.hook: Hook | None = None
        self.slot: Slot | None = None
        self.reached = False
        self.end = passage.End(self)
        # An operator's backward pass comes only if one of its inputs trains.
        self.anchor = torch.zeros((), requires_grad=True)

    def hang(self, hook: Hook) -> Socket:
        self.hook = hook
        self._sockets.refresh()
        return self

    def remove(self) -> None:
        """Nothing hangs here any more."""
        self.hook = None
        self._sockets.refresh()

    def meet(self, module: nn.Module, inputs: tuple[Any, ...], h: Tensor) -> Tensor | None:
        """A pass of the plain code is here."""
        if torch.is_grad_enabled():
            self.reached = True
            self._sockets.note(Autocast.now(h.device.type))
        return None if self.hook is None else self.hook(module, inputs, h)

    def passing(self, h: Tensor, dtype: torch.dtype | None, *, training: bool) -> bool:
        self._sockets.compiled = True
        if training:
            self.reached = True
            self._sockets.note(Autocast(h.device.type, dtype is not None, dtype or torch.get_default_dtype()))
        return self.slot is not None and not self.slot.idle

    def join(self, h: Tensor, dtype: torch.dtype | None) -> Tensor:
        assert self.hook is not None
        assert self.slot is not None
        with torch.autocast(h.device.type, dtype=dtype, enabled=dtype is not None):
            return self.hook(self.slot.module, (), h)


def _hook_of(sockets: Sockets, socket: Socket, device: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    anchor, number = socket.anchor, socket.end.number

    def hook(module: nn.Module, inputs: Any, h: Tensor) -> Tensor | None:
        if not torch.compiler.is_dynamo_compiling():
            return socket.meet(module, inputs, h)
        # Traced by the compiler: what follows is what it makes its code of.
        if not sockets.open:
            return None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return passage.through(h, anchor, number, dtype)

    return hook
