"""Who said it: HMAC-SHA-256 over the canonical envelope, two keys valid at a time, nonces accepted once.

Keys come from ``ESPER_KEYS`` (``id:hex,id:hex``, the first signs) or from a file of mode 0600 that is made on
first use. They appear in no log and no error.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from esper_ray.contracts import codec
from esper_ray.contracts.budgets import COMMAND_FRESH_SECONDS, NONCE_MEMORY_SECONDS
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.errors import AuthenticityError, ConfigError
from esper_ray.reliability import atomic
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import new_event_id, new_nonce

ENVIRONMENT_KEYS = "ESPER_KEYS"


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of one installation; ``keys[0]`` signs, all of them verify."""

    keys: tuple[tuple[str, bytes], ...]

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(key_id for key_id, _ in self.keys)})"

    def find(self, key_id: str) -> bytes | None:
        return next((secret for known, secret in self.keys if known == key_id), None)


def load_keys(path: Path) -> KeyRing:
    """The installation's keys: from the environment, else from ``path``, else new ones written there.

    Raises:
        ConfigError: the environment variable or the file is malformed.
    """
    text = os.environ.get(ENVIRONMENT_KEYS)
    if text is None:
        if not path.exists():
            atomic.create_bytes(path, f"k{secrets.token_hex(2)}:{secrets.token_hex(32)}\n".encode(), mode=0o600)
        text = path.read_text().strip().replace("\n", ",")
    try:
        pairs = [item.split(":") for item in text.split(",") if item]
        keys = tuple((key_id, bytes.fromhex(secret)) for key_id, secret in pairs)
    except ValueError:
        keys = ()
    if not keys or any(len(secret) < 16 for _, secret in keys):
        raise ConfigError(
            "The signing keys cannot be read.",
            why=f"{ENVIRONMENT_KEYS} or {path} is not of the form id:hex,id:hex with at least 16 bytes each.",
            remedy="Correct it, or remove the file to have a new key made.",
        )
    return KeyRing(keys)


class Signer:
    """Wraps payloads into signed envelopes."""

    def __init__(self, keys: KeyRing, source: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._key_id, self._secret = keys.keys[0]
        self._source, self._clock = source, clock

    def seal(
        self,
        payload: bytes,
        type: BusMessageType,
        *,
        payload_type: str,
        priority: MessagePriority = MessagePriority.NORMAL,
        event_id: bytes | None = None,
        ttl_ms: int = 0,
    ) -> bytes:
        """A signed envelope around ``payload``, as bytes."""
        envelope = EventEnvelope(
            event_id=event_id or new_event_id(),
            type=type,
            source=self._source,
            created_at_ns=self._clock.now_ns(),
            payload=payload,
            payload_type=payload_type,
            priority=priority,
            ttl_ms=ttl_ms,
            key_id=self._key_id,
            nonce=new_nonce(),
        )
        return codec.seal_envelope(envelope, lambda data: _sign(self._secret, data))


class Verifier:
    """Opens envelopes. `open_direct` also demands freshness and a nonce that was never seen."""

    def __init__(self, keys: KeyRing, *, clock: Clock = SYSTEM_CLOCK, seen: Iterable[tuple[bytes, int]] = ()) -> None:
        self._keys, self._clock = keys, clock
        self._nonces: dict[bytes, int] = dict(seen)

    def open(self, data: bytes) -> EventEnvelope:
        """Check version, schema, key and signature.

        Raises:
            ContractError: with its ``reason``; an `AuthenticityError` where the signature is at fault.
        """
        envelope, signed = codec.open_envelope(data)
        if not envelope.signature:
            raise AuthenticityError("An unsigned message was refused.", reason="missing_signature")
        secret = self._keys.find(envelope.key_id)
        if secret is None:
            raise AuthenticityError(
                f"A message signed with the unknown key {envelope.key_id!r} was refused.",
                remedy="Give all processes the same keys.",
                reason="unknown_key",
            )
        if not hmac.compare_digest(_sign(secret, signed), envelope.signature):
            raise AuthenticityError("A message with a wrong signature was refused.", reason="invalid_signature")
        return envelope

    def open_direct(self, data: bytes) -> EventEnvelope:
        """As `open`, for commands that travel directly: fresh within 60 s, each nonce once in 5 minutes."""
        envelope = self.open(data)
        now = self._clock.now_ns()
        age = (now - envelope.created_at_ns) / 1e9
        if age > COMMAND_FRESH_SECONDS:
            raise AuthenticityError(f"A command {age:.0f} s old was refused.", reason="stale")
        if age < -COMMAND_FRESH_SECONDS:
            raise AuthenticityError(f"A command {-age:.0f} s in the future was refused.", reason="from_the_future")
        horizon = now - round(NONCE_MEMORY_SECONDS * 1e9)
        if len(self._nonces) > 4096:
            self._nonces = {nonce: at for nonce, at in self._nonces.items() if at >= horizon}
        if self._nonces.get(envelope.nonce, horizon - 1) >= horizon:
            raise AuthenticityError("A command was refused because its nonce was used before.", reason="nonce_replayed")
        self._nonces[envelope.nonce] = now
        return envelope


def _sign(secret: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, data, "sha256")
