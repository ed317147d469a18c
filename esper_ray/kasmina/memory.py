"""How much memory a piece of work needs at its peak, measured by doing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made inside, for as long as somebody holds them.

    Attributes:
        peak: the most that was held at once. Scratch space within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # A view or an operation in place gives memory that was there before.
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return

        def gone(_: Any) -> None:
            self.held -= size
            self._known.pop(place, None)

        self._known[place] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``work`` needs beyond what is there already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with Allocations() as counted:
        work()
    return int(counted.peak)


def free_bytes(device: torch.device) -> int:
    """What is free on ``device``; for the processor what the system can give without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
