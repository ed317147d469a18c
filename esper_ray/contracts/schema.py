"""The schema's identity: one digest that every process checks before it talks to another.

``schema.lock`` holds what was approved: the digest, the tags of earlier schemas whose messages still mean the same,
and the form of the schema (`changes.form_of`). `contracts.check` compares with it and writes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.internal import api_implementation

from esper_ray.contracts import leyline_pb2
from esper_ray.errors import EnvironmentFault, WrongSchema

LOCK = Path(__file__).with_name("schema.lock")
BACKEND = "upb"
_TAG_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Lock:
    """What was approved.

    Attributes:
        accepts: digests of earlier schemas, from which only additions led here.
        form: the schema's lines.
    """

    digest: str
    accepts: tuple[str, ...] = ()
    form: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Lock:
        first, *lines = text.splitlines() or [""]
        accepts = tuple(line.removeprefix("accepts ") for line in lines if line.startswith("accepts "))
        return cls(first.strip(), accepts, tuple(line for line in lines if line and not line.startswith("accepts ")))

    def text(self) -> str:
        return "\n".join([self.digest, *(f"accepts {digest}" for digest in self.accepts), *self.form]) + "\n"


@cache
def schema_digest() -> str:
    """SHA-256 of the canonical descriptor of leyline.proto."""
    descriptor = descriptor_pb2.FileDescriptorProto()
    leyline_pb2.DESCRIPTOR.CopyToProto(descriptor)
    return digest_of(descriptor)


def digest_of(descriptor: descriptor_pb2.FileDescriptorProto) -> str:
    """SHA-256 of a canonical descriptor, hexadecimal."""
    return hashlib.sha256(descriptor.SerializeToString(deterministic=True)).hexdigest()


def tag_of(digest: str) -> int:
    """The first 8 bytes of a digest: what each envelope carries."""
    return int(digest[:_TAG_DIGITS], 16)


@cache
def schema_tag() -> int:
    """The tag of the schema that this process speaks."""
    return tag_of(schema_digest())


@cache
def readable_tags() -> frozenset[int]:
    """Tags of the schemas whose messages this process understands: its own and those that it only added to.

    What waited in a spool, on the bus or in a journal while the system was renewed is still good.
    """
    return frozenset({schema_tag(), *map(tag_of, Lock.parse(LOCK.read_text()).accepts)})


def check_schema() -> None:
    """Refuse to start with generated code that nobody approved, or with protobuf's slow backend.

    Raises:
        WrongSchema: the generated code and ``schema.lock`` differ.
        EnvironmentFault: protobuf runs without upb, which is 40 times slower.
    """
    if Lock.parse(LOCK.read_text()).digest != schema_digest():
        raise WrongSchema(
            "The message schema differs from the approved one.",
            why="leyline_pb2.py and schema.lock do not belong together.",
            remedy="Reinstall esper_ray; after a wanted change run `esper contracts check`, then `approve`.",
        )
    backend = api_implementation.Type()
    if backend != BACKEND:
        raise EnvironmentFault(
            f"protobuf uses its {backend} backend.",
            why="Messages would take 40 times their budget.",
            remedy="Unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION and reinstall protobuf from a binary wheel.",
        )


@cache
def speak() -> None:
    """`check_schema` once in a process: whoever makes a signer or a verifier passes here, and nobody talks without."""
    check_schema()
