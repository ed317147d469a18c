"""Identifiers and named randomness.

Every random draw in a run comes from a generator named by the run's seed and a purpose; `derive_seed` is the
one place where names become numbers.
"""

from __future__ import annotations

import hashlib
import os
import secrets


def new_event_id() -> bytes:
    """8 random bytes, unique for the life of an installation."""
    return secrets.token_bytes(8)


def new_event_id_and_nonce() -> tuple[bytes, bytes]:
    """An event id, and 12 random bytes that are used once; drawn together, for speed."""
    drawn = os.urandom(20)
    return drawn[:8], drawn[8:]


def new_run_id(task: str) -> str:
    """A short, readable run id such as ``glyphs-3fa9c2``."""
    return f"{task[:8]}-{secrets.token_hex(3)}"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a run seed and the names of a purpose, stable across machines and versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def digest(data: bytes) -> str:
    """SHA-256 as hexadecimal text: the name of a stored thing."""
    return hashlib.sha256(data).hexdigest()
