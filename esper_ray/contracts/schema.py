"""The schema's identity: one digest that every process checks before it talks to another.

``schema.lock`` holds the approved digest. Run this module to check it, with ``--approve`` to write a new one
after an entry was made in CHANGES.md.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.internal import api_implementation

from esper_ray.contracts import leyline_pb2
from esper_ray.errors import EnvironmentFault, WrongSchema

LOCK = Path(__file__).with_name("schema.lock")
CHANGES = Path(__file__).with_name("CHANGES.md")


@cache
def schema_digest() -> str:
    """SHA-256 of the canonical descriptor of leyline.proto."""
    descriptor = descriptor_pb2.FileDescriptorProto()
    leyline_pb2.DESCRIPTOR.CopyToProto(descriptor)
    return hashlib.sha256(descriptor.SerializeToString(deterministic=True)).hexdigest()


@cache
def schema_tag() -> int:
    """The first 8 bytes of the digest: what each envelope carries."""
    return int(schema_digest()[:16], 16)


def check_schema() -> None:
    """Refuse to start with generated code that nobody approved, or with protobuf's slow backend.

    Raises:
        WrongSchema: the generated code and ``schema.lock`` differ.
        EnvironmentFault: protobuf runs without upb, which is 40 times slower.
    """
    if LOCK.read_text().strip() != schema_digest():
        raise WrongSchema(
            "The message schema differs from the approved one.",
            why="leyline_pb2.py and schema.lock do not belong together.",
            remedy="Reinstall esper_ray; after a wanted change run `python -m esper_ray.contracts.schema --approve`.",
        )
    backend = api_implementation.Type()
    if backend != "upb":
        raise EnvironmentFault(
            f"protobuf uses its {backend} backend.",
            why="Messages would take 40 times their budget.",
            remedy="Unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION and reinstall protobuf from a binary wheel.",
        )


def check_changes() -> None:
    """Demand that the schema as it is has its entry in CHANGES.md.

    Raises:
        WrongSchema: it has none.
    """
    if schema_digest()[:12] not in CHANGES.read_text():
        raise WrongSchema(
            f"The schema {schema_digest()[:12]} has no entry in CHANGES.md.",
            why="Each change of the schema says what it is, why, who approved it and what it costs.",
            remedy="Add the row, then approve again.",
        )


if __name__ == "__main__":
    check_changes()
    if "--approve" in sys.argv:
        LOCK.write_text(schema_digest() + "\n")
    check_schema()
    print(schema_digest())
