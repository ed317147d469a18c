"""A kernel on Urza's line: what is asked and what is answered, as parts of bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from esper_ray.contracts.ports import Kernel, KernelSpec, SlotSignature

MOST_BYTES = 1_000_000
"""Weights of this size take 2 ms on a line, as long as a call through Ray; larger ones are better shared than sent."""


def asked(spec: KernelSpec) -> list[bytes]:
    return [spec.blueprint.encode(), str(spec.signature).encode(), json.dumps(dict(spec.parameters)).encode()]


def spec_in(parts: Sequence[bytes]) -> KernelSpec:
    """The inverse of `asked`.

    Raises:
        BlueprintError: the signature is none.
    """
    blueprint, signature, parameters = (part.decode() for part in parts)
    return KernelSpec(blueprint, SlotSignature.parse(signature), json.loads(parameters))


def answered(kernel: Kernel) -> list[bytes]:
    return [kernel.digest.encode(), json.dumps(dict(kernel.metadata)).encode(), bytes(kernel.weights)]


def given(spec: KernelSpec, parts: Sequence[bytes]) -> Kernel:
    """The inverse of `answered`."""
    digest, metadata, weights = parts
    return Kernel(spec, digest.decode(), json.loads(metadata), weights)
