"""The in-process tier: the most recently used kernels, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from esper_ray.contracts.ports import Kernel


class KernelCache:
    """Least recently used kernels leave first; one that is larger than the whole cache is not kept at all.

    Args:
        limit: bound of the kept weights in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kernels)

    def get(self, digest: str) -> Kernel | None:
        """The kernel of that digest if it is here; counted as a hit or a miss."""
        with self._lock:
            kernel = self._kernels.get(digest)
            if kernel is None:
                self.misses += 1
            else:
                self.hits += 1
                self._kernels.move_to_end(digest)
            return kernel

    def put(self, kernel: Kernel) -> None:
        """Keep a kernel, at the expense of those unused for longest."""
        with self._lock:
            if len(kernel.weights) > self.limit:
                return
            old = self._kernels.pop(kernel.digest, None)
            self.size += len(kernel.weights) - (len(old.weights) if old else 0)
            self._kernels[kernel.digest] = kernel
            while self.size > self.limit:
                _, evicted = self._kernels.popitem(last=False)
                self.size -= len(evicted.weights)
                self.evictions += 1
