"""Who said it: HMAC-SHA-256 over the canonical envelope, two keys valid at a time, nonces accepted once.

Whoever makes a `Signer` or a `Verifier` has had the schema and protobuf's backend checked: no process talks without.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from esper_ray.contracts import envelope as wire
from esper_ray.contracts.budgets import COMMAND_FRESH_SECONDS
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.contracts.keys import ENVIRONMENT_KEYS, KeyRing, load_keys, rotate_keys
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.contracts.nonces import NONCE_LIMIT, NonceMemory
from esper_ray.contracts.refusals import refused
from esper_ray.contracts.schema import speak
from esper_ray.errors import AuthenticityError
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import new_event_id, new_nonce

__all__ = ["ENVIRONMENT_KEYS", "KeyRing", "Signer", "Verifier", "load_keys", "rotate_keys"]


class Signer:
    """Wraps payloads into signed envelopes.

    Raises:
        WrongSchema, EnvironmentFault: this process may not talk; see `schema.check_schema`.
    """

    def __init__(self, keys: KeyRing, source: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        speak()
        self._keys, self._source, self._clock = keys, source, clock

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
        key_id, secret = self._keys.signing(self._clock.monotonic())
        return wire.seal(
            lambda data: _sign(secret, data),
            event_id=event_id or new_event_id(),
            type=type,
            source=self._source,
            created_at_ns=self._clock.now_ns(),
            payload=payload,
            payload_type=payload_type,
            priority=priority,
            ttl_ms=ttl_ms,
            key_id=key_id,
            nonce=new_nonce(),
        )


class Verifier:
    """Opens envelopes. `open_direct` also demands freshness and a nonce that was never seen.

    Args:
        seen: nonces that were accepted before this process started, with the time of it in ns.

    Raises:
        WrongSchema, EnvironmentFault: this process may not talk; see `schema.check_schema`.
    """

    def __init__(
        self,
        keys: KeyRing,
        *,
        clock: Clock = SYSTEM_CLOCK,
        seen: Iterable[tuple[bytes, int]] = (),
        nonce_limit: int = NONCE_LIMIT,
    ) -> None:
        speak()
        self._keys, self._clock = keys, clock
        self._nonces = NonceMemory(seen, limit=nonce_limit)

    def open(self, data: bytes) -> EventEnvelope:
        """Check version, schema, key and signature: for what came over the bus or lay in a journal.

        Raises:
            ContractError: with its ``reason``; an `AuthenticityError` where the signature is at fault.
        """
        return self._open(data, same_schema=False)

    def open_direct(self, data: bytes) -> EventEnvelope:
        """As `open`, for what travels directly: of our very schema, fresh within 60 s, each nonce once in 5 minutes."""
        envelope = self._open(data, same_schema=True)
        now = self._clock.now_ns()
        age = (now - envelope.created_at_ns) / 1e9
        if age > COMMAND_FRESH_SECONDS:
            raise _refused("stale", f"A command {age:.0f} s old was refused.")
        if age < -COMMAND_FRESH_SECONDS:
            raise _refused(
                "from_the_future",
                f"A command {-age:.0f} s in the future was refused.",
                remedy="Set the clocks of these machines.",
            )
        reason = self._nonces.admit(envelope.nonce, made_ns=envelope.created_at_ns, now_ns=now)
        if reason == "stale":
            raise _refused(reason, "A command was refused because too many newer ones came before it.")
        if reason:
            raise _refused(reason, "A command was refused because its nonce was used before.")
        return envelope

    def _open(self, data: bytes, *, same_schema: bool) -> EventEnvelope:
        envelope, signed = wire.open_envelope(data, same_schema=same_schema)
        if not envelope.signature:
            raise _refused("missing_signature", "An unsigned message was refused.")
        secret = self._keys.find(envelope.key_id)
        if secret is None:
            raise _refused(
                "unknown_key",
                f"A message signed with the unknown key {envelope.key_id!r} was refused.",
                remedy="Give all processes the same keys.",
            )
        if not hmac.compare_digest(_sign(secret, signed), envelope.signature):
            raise _refused("invalid_signature", "A message with a wrong signature was refused.")
        return envelope


def _sign(secret: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, data, "sha256")


def _refused(reason: str, what: str, *, remedy: str = "") -> AuthenticityError:
    return refused(AuthenticityError(what, remedy=remedy, reason=reason))
