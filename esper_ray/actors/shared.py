"""Kernels in Ray's object store: put there once, and read in place by every process of the node."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from esper_ray.contracts.ports import Kernel, KernelSpec

INLINE_BYTES = 100_000
"""Ray carries a result below about this size inside its reply; sharing that would cost a second request."""


@dataclass(frozen=True, slots=True)
class SharedKernel:
    """A kernel whose weights lie in the object store."""

    spec: KernelSpec
    digest: str
    metadata: Mapping[str, Any]
    reference: Any

    def open(self, timeout: float | None = None) -> Kernel:
        """The kernel with its weights where they lie, not copied.

        Raises:
            ray.exceptions.RayError: they are not there in time, or their owner is gone and they with it.
        """
        data = ray.get(self.reference, timeout=timeout)
        return Kernel(self.spec, self.digest, self.metadata, memoryview(data))


class SharedTier:
    """The kernels that this process keeps in the object store; least recently used ones are let go of first.

    Args:
        limit: bound of their weights in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._kernels: OrderedDict[str, tuple[SharedKernel, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kernels)

    def get(self, digest: str) -> SharedKernel | None:
        with self._lock:
            if digest not in self._kernels:
                return None
            self._kernels.move_to_end(digest)
            return self._kernels[digest][0]

    def put(self, kernel: Kernel) -> SharedKernel | None:
        """Share a kernel; None for one that is better sent by value."""
        size = len(kernel.weights)
        if not INLINE_BYTES <= size <= self.limit:
            return None
        # Ray shares the buffers of arrays; bytes it would copy at each reading.
        reference = ray.put(np.frombuffer(kernel.weights, dtype=np.uint8))
        shared = SharedKernel(kernel.spec, kernel.digest, kernel.metadata, reference)
        with self._lock:
            if kernel.digest in self._kernels:
                return self._kernels[kernel.digest][0]
            self._kernels[kernel.digest] = shared, size
            self.size += size
            while self.size > self.limit:
                _, (_, freed) = self._kernels.popitem(last=False)
                self.size -= freed
        return shared
