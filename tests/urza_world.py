"""Small kernels, and what can happen to the folder they lie in."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.urza import artifacts
from esper_ray.urza.store import Store

SPEC = KernelSpec("BP009", SlotSignature("conv", (16, 24, 24)))
OTHER = KernelSpec("BP002", SlotSignature("conv", (32, 12, 12)), {"scale": 0.25})
METADATA = {"parameters_count": 2, "strategy": "eager", "eager_ms": 1.5, "compiled_ms": None, "tier": 1}


def weights(*values: float) -> bytes:
    """One float32 tensor as a safetensors file, by the format's own rules."""
    data = struct.pack(f"<{len(values)}f", *values)
    header = {"w": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def spec(number: int) -> KernelSpec:
    """One of many kernels."""
    return KernelSpec(f"BP{number % 42 + 1:03}", SlotSignature("vector", (number + 1,)))


def fill(store: Store, count: int, *, floats: int = 4) -> None:
    """So many kernels, each with its own weights."""
    for number in range(count):
        store.put(spec(number), weights(*([float(number)] * floats)), METADATA)


def file_of(store: Store, digest: str) -> Path:
    return artifacts.path_of(store.folder / "artifacts", digest)


def reopened(store: Store) -> Store:
    """The same folder with an empty cache."""
    store.close()
    return Store(store.folder)
