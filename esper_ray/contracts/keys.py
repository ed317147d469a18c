"""The keys of an installation: two valid at a time, so that a rotation drops nothing.

They come from ``ESPER_KEYS`` (``id:hex,id:hex``, the first signs) or from a file of mode 0600 that is made on first
use. They appear in no log and no error.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from esper_ray.errors import ConfigError
from esper_ray.reliability import atomic
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock

ENVIRONMENT_KEYS = "ESPER_KEYS"
VALID_KEYS = 2
LOOK_SECONDS = 1.0
ROTATION_SECONDS = 24 * 3600.0
_LEAST_BYTES = 16

log = logging.getLogger(__name__)
Key = tuple[str, bytes]


class KeyRing:
    """``keys[0]`` signs, all of them verify. With a ``file`` it follows what is written there."""

    def __init__(self, keys: tuple[Key, ...], *, file: Path | None = None) -> None:
        self.keys, self._file = keys, file
        self._stamp = _stamp(file)
        self._looked_at = float("-inf")

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(key_id for key_id, _ in self.keys)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyRing) and self.keys == other.keys

    def __hash__(self) -> int:
        return hash(self.keys)

    def signing(self, now: float) -> Key:
        """The key to sign with; looks for a new one once a second. ``now`` is in monotonic seconds."""
        if self._file is not None and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._follow()
        return self.keys[0]

    def find(self, key_id: str) -> bytes | None:
        """The secret of that key, or None. An unknown one may have been made a moment ago: the file is looked at."""
        found = self._known(key_id)
        if found is None and self._file is not None:
            self._follow()
            found = self._known(key_id)
        return found

    def _known(self, key_id: str) -> bytes | None:
        for known, secret in self.keys:
            if known == key_id:
                return secret
        return None

    def _follow(self) -> None:
        stamp = _stamp(self._file)
        if stamp is None or stamp == self._stamp:
            return
        assert self._file is not None
        try:
            self.keys = _parse(self._file.read_text(), self._file)
        except (ConfigError, OSError) as fault:
            log.error("the keys stay as they were: %s", fault)
        self._stamp = stamp


def load_keys(path: Path) -> KeyRing:
    """The installation's keys: from the environment, else from ``path``, else new ones written there.

    Raises:
        ConfigError: the environment variable or the file is malformed.
    """
    text = os.environ.get(ENVIRONMENT_KEYS)
    if text is not None:
        return KeyRing(_parse(text, path))
    if not path.exists():
        atomic.create_bytes(path, _line(_new_key()), mode=0o600)
    return KeyRing(_parse(path.read_text(), path), file=path)


def rotate_keys(path: Path, *, force: bool = False, clock: Clock = SYSTEM_CLOCK) -> KeyRing:
    """Put a new key in front of the present one, and drop the one before. Running processes follow within a second.

    Raises:
        ConfigError: the keys are in the environment, or the last rotation was within a day, so that messages signed
            before it may still be on their way (``force`` drops them).
    """
    if ENVIRONMENT_KEYS in os.environ:
        raise ConfigError(
            "The keys cannot be rotated here.",
            why=f"They come from {ENVIRONMENT_KEYS}.",
            remedy="Set it to NEW:hex,PRESENT:hex everywhere, and start the system anew.",
        )
    present = load_keys(path)
    age = clock.now_ns() / 1e9 - path.stat().st_mtime
    if len(present.keys) == VALID_KEYS and age < ROTATION_SECONDS and not force:
        raise ConfigError(
            f"The keys were rotated {age / 3600:.0f} hours ago.",
            why=f"What was signed before that may still be on its way, and only {VALID_KEYS} keys are valid at a time.",
            remedy="Wait until a day has passed, or drop those messages with --force.",
        )
    pair = (_new_key(), present.keys[0])
    atomic.write_bytes(path, b"".join(map(_line, pair)), mode=0o600)
    return load_keys(path)


def _new_key() -> Key:
    return f"k{secrets.token_hex(2)}", secrets.token_bytes(32)


def _line(key: Key) -> bytes:
    return f"{key[0]}:{key[1].hex()}\n".encode()


def _stamp(file: Path | None) -> tuple[int, int] | None:
    """Changes with each rotation; None where there is no file."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns)


def _parse(text: str, path: Path) -> tuple[Key, ...]:
    try:
        pairs = [item.split(":") for item in text.strip().replace("\n", ",").split(",") if item]
        keys = tuple((key_id, bytes.fromhex(secret)) for key_id, secret in pairs)
    except ValueError:
        keys = ()
    if not 1 <= len(keys) <= VALID_KEYS or any(not key_id or len(secret) < _LEAST_BYTES for key_id, secret in keys):
        # The fault of the conversion would show the secret.
        raise ConfigError(
            "The signing keys cannot be read.",
            why=f"{ENVIRONMENT_KEYS} or {path} is not one key or two of the form id:hex,id:hex, of 16 bytes or more.",
            remedy="Correct it, or remove the file to have a new key made.",
        ) from None
    return keys
