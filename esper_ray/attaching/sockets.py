"""What sits at each slot of a model in the user's own loop from the start, so that a seed can come later.

PyTorch's compiler does not see hooks that are added after it compiled a model: it would silently leave seeds out. So a
hook is there before: one that the compiler must leave to Python. It breaks the compiled graph at the slot, and what is
hung on the slot later runs there too. It costs one microsecond, and a compiled host one break for each slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from esper_ray.errors import HostError
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
        compiled: the model was once run by PyTorch's compiler.
        autocast: the mixed precision of the last training pass; None before the first one.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.compiled = False
        self.autocast: Autocast | None = None
        self._reached: set[str] = set()
        self._device = next(model.parameters()).device.type
        # Traced by the compiler, which then writes True; Python writes nothing.
        self._handles = [model.register_forward_pre_hook(self._note_compiler)]
        for name in names:
            hook = torch.compiler.disable(self._pass_through(name))  # type: ignore[no-untyped-call]
            self._handles.append(model.get_submodule(name).register_forward_hook(hook))

    def _note_compiler(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling():
            self.compiled = True

    def _pass_through(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
            if torch.is_grad_enabled():
                self._reached.add(name)
                self.autocast = Autocast.now(self._device)

        return hook

    def missed(self, names: Iterable[str]) -> list[str]:
        """Slots that no training pass has reached yet."""
        return [name for name in names if name not in self._reached]

    def forget(self) -> None:
        """Passes that were no training do not count."""
        self._reached.clear()
        self.autocast = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
