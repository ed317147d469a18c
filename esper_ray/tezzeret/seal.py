"""Who made a kernel: HMAC-SHA-256 by a key of this installation over all that its artifact says and holds.

A digest tells that an artifact is what was stored; the seal, that a forge with our keys has built and checked it. It is
an entry of the metadata, so that it travels with the kernel and is covered by the digest.
"""

from __future__ import annotations

import hmac
import json
import struct
from collections.abc import Mapping
from typing import Any

from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.ports import Kernel
from esper_ray.errors import AuthenticityError
from esper_ray.reliability.clock import SYSTEM_CLOCK
from esper_ray.reliability.ids import digest

FIELD, TENSORS = "seal", "tensors"
_LENGTH = struct.Struct("<Q")


def sealed(key: str, weights: bytes | memoryview, metadata: Mapping[str, Any], keys: KeyRing) -> dict[str, Any]:
    """The metadata with the digest of the tensors and the seal.

    Args:
        key: the kernel's name, `KernelSpec.key`.
        weights: a safetensors file's bytes.
    """
    open_part = {**{name: value for name, value in metadata.items() if name != FIELD}, TENSORS: tensors(weights)}
    key_id, secret = keys.signing(SYSTEM_CLOCK.monotonic())
    return {**open_part, FIELD: {"key": key_id, "mac": _mac(key, open_part, secret)}}


def check(kernel: Kernel, keys: KeyRing) -> None:
    """That a forge of this installation made the kernel.

    Raises:
        AuthenticityError: with its ``reason``.
    """
    reason = fault(kernel.spec.key, kernel.metadata, keys)
    if not reason and kernel.metadata[TENSORS] != tensors(kernel.weights):
        reason = "invalid_signature"
    if reason:
        raise AuthenticityError(
            f"The kernel {kernel.spec.key} was refused: {reason.replace('_', ' ')}.",
            why="It does not come from a forge with this installation's keys.",
            remedy="Let the forge make it again at the start of the next run.",
            reason=reason,
        )


def fault(key: str, metadata: Mapping[str, Any], keys: KeyRing) -> str:
    """Why the description of a kernel is not ours, or an empty text. The tensors themselves are not looked at."""
    seal = metadata.get(FIELD)
    if not isinstance(seal, Mapping):
        return "missing_signature"
    secret = keys.find(str(seal.get("key")))
    if secret is None:
        return "unknown_key"
    open_part = {name: value for name, value in metadata.items() if name != FIELD}
    same = hmac.compare_digest(_mac(key, open_part, secret), str(seal.get("mac")))
    return "" if same and TENSORS in metadata else "invalid_signature"


def tensors(data: bytes | memoryview) -> str:
    """A digest of names, types, shapes and values in a safetensors file, whatever else its header says.

    Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, tensor bytes).
    """
    view = memoryview(data)
    (length,) = _LENGTH.unpack_from(view)
    start = _LENGTH.size + length
    header = json.loads(bytes(view[_LENGTH.size : start]))
    header.pop("__metadata__", None)
    return digest(_canonical(header) + bytes(view[start:]))


def _mac(key: str, open_part: Mapping[str, Any], secret: bytes) -> str:
    return hmac.digest(secret, _canonical({"kernel": key, "metadata": open_part}), "sha256").hex()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
