"""One kernel, one file: safetensors weights with the kernel's description in the header, named by its SHA-256.

Any safetensors reader opens such a file; the description is canonical JSON under the header's ``__metadata__``.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_ray.contracts.ports import Kernel, KernelSpec, SlotSignature
from esper_ray.errors import CorruptArtifact, EsperError, KernelError
from esper_ray.reliability.ids import digest as digest_of

SUFFIX = ".safetensors"
REMEDY = "The forge makes it again at the start of the next run, or now with `esper urza verify --heal`."
_ENTRY = "esper_ray"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000


def pack(spec: KernelSpec, weights: bytes, metadata: Mapping[str, Any]) -> Kernel:
    """A kernel from its parts; the same parts always give the same bytes and so the same digest.

    Args:
        weights: a safetensors file's bytes.
        metadata: what JSON can hold, with finite numbers.

    Raises:
        KernelError: the weights are no safetensors, or the metadata is no JSON.
    """
    try:
        header, tensors = _split(weights)
    except ValueError as error:
        raise KernelError(f"The weights of {spec.key} are no safetensors file.", why=f"{error}.") from None
    header.pop("__metadata__", None)
    try:
        description = _canonical({"spec": _spec_to_json(spec), "metadata": dict(metadata)})
    except (TypeError, ValueError) as error:
        raise KernelError(f"The metadata of {spec.key} cannot be stored as JSON.", why=f"{error}.") from None
    text = _canonical({"__metadata__": {_ENTRY: description}, **header}).encode()
    text += b" " * (-len(text) % 8)
    data = _LENGTH.pack(len(text)) + text + tensors
    return Kernel(spec, digest_of(data), json.loads(description)["metadata"], data)


def unpack(data: bytes, expected: str, *, where: str = "these bytes") -> Kernel:
    """The kernel in ``data``, admitted only if its digest is ``expected``.

    Raises:
        CorruptArtifact: the digest is another one, or the bytes are no artifact of ours.
    """
    kernel = read(data, where=where)
    if kernel.digest != expected:
        raise _corrupt(where, f"Its digest is {kernel.digest[:12]} where {expected[:12]} is expected.")
    return kernel


def read(data: bytes, *, where: str = "these bytes") -> Kernel:
    """The kernel in ``data``, whatever its digest: what it says of itself, not yet whether it is the one wanted.

    Raises:
        CorruptArtifact: the bytes are no artifact of ours.
    """
    try:
        header, _ = _split(data)
        description = json.loads(header["__metadata__"][_ENTRY])
        spec = _spec_from_json(description["spec"])
        metadata = dict(description["metadata"])
    except (ValueError, KeyError, TypeError, EsperError) as error:
        raise _corrupt(where, f"It has no description of a kernel: {error!r}.") from None
    return Kernel(spec, digest_of(data), metadata, data)


def inventory(folder: Path) -> tuple[dict[str, int], list[Path]]:
    """The bytes of each artifact below ``folder`` by the digest in its name, and what interrupted writers left."""
    sizes: dict[str, int] = {}
    drafts: list[Path] = []
    for part in os.scandir(folder):
        if not part.is_dir():
            continue
        for entry in os.scandir(part):
            if entry.name.startswith("."):
                drafts.append(Path(entry.path))
            elif entry.name.endswith(SUFFIX):
                sizes[entry.name.removesuffix(SUFFIX)] = entry.stat().st_size
    return sizes, drafts


def path_of(folder: Path, digest: str) -> Path:
    """Where the artifact of that digest lies; 256 subfolders keep each of them small."""
    return folder / digest[:2] / f"{digest}{SUFFIX}"


def _corrupt(where: str, why: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"The artifact {where} is damaged.",
        why=why,
        remedy=REMEDY,
    )


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < _LENGTH.size:
        raise ValueError(f"{len(data)} bytes are too few")
    (length,) = _LENGTH.unpack_from(data)
    if length > min(_MAX_HEADER, len(data) - _LENGTH.size):
        raise ValueError(f"the header claims {length} bytes of {len(data)}")
    header = json.loads(data[_LENGTH.size : _LENGTH.size + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    tensors = data[_LENGTH.size + length :]
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if len(tensors) != max(ends, default=0):
        raise ValueError(f"{len(tensors)} bytes of tensors where the header claims {max(ends, default=0)}")
    return header, tensors


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _spec_to_json(spec: KernelSpec) -> dict[str, Any]:
    return {
        "blueprint": spec.blueprint,
        "signature": str(spec.signature),
        "parameters": {name: float(value) for name, value in spec.parameters.items()},
    }


def _spec_from_json(value: Mapping[str, Any]) -> KernelSpec:
    return KernelSpec(str(value["blueprint"]), SlotSignature.parse(value["signature"]), dict(value["parameters"]))
