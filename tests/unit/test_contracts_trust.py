"""Who may speak: signatures, keys, nonces, freshness, and the approved schema."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from esper_ray.contracts import codec, schema, signing
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.signing import KeyRing, Signer, Verifier, load_keys
from esper_ray.errors import AuthenticityError, ConfigError, WrongSchema
from esper_ray.reliability.clock import ManualClock

OLD, NEW = ("k1", b"1" * 32), ("k2", b"2" * 32)


def sealed(clock: ManualClock, *, keys: KeyRing | None = None) -> bytes:
    signer = Signer(keys or KeyRing((OLD,)), "tamiyo", clock=clock)
    return signer.seal(b"payload", BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand")


def refusal(verifier: Verifier, data: bytes) -> str:
    with pytest.raises(AuthenticityError) as refused:
        verifier.open_direct(data)
    return refused.value.reason


def test_a_signed_message_is_opened() -> None:
    clock = ManualClock()

    assert Verifier(KeyRing((OLD,)), clock=clock).open_direct(sealed(clock)).payload == b"payload"


def test_each_refusal_has_its_own_reason() -> None:
    clock = ManualClock()
    data = sealed(clock)
    envelope = codec.decode_envelope(data)
    verifier = Verifier(KeyRing((OLD,)), clock=clock)

    assert refusal(verifier, codec.encode_envelope(replace(envelope, signature=b""))) == "missing_signature"
    assert refusal(verifier, codec.encode_envelope(replace(envelope, payload=b"other"))) == "invalid_signature"
    assert refusal(Verifier(KeyRing((NEW,)), clock=clock), data) == "unknown_key"
    verifier.open_direct(data)
    assert refusal(verifier, data) == "nonce_replayed"
    late = sealed(clock)
    clock.advance(61)
    assert refusal(verifier, late) == "stale"
    ahead = ManualClock(clock.now_ns() + 61_000_000_000)
    assert refusal(verifier, sealed(ahead)) == "from_the_future"


def test_a_nonce_is_known_again_after_a_restart() -> None:
    clock = ManualClock()
    data = sealed(clock)
    nonce = codec.decode_envelope(data).nonce

    assert refusal(Verifier(KeyRing((OLD,)), clock=clock, seen=[(nonce, clock.now_ns())]), data) == "nonce_replayed"


def test_what_came_over_the_bus_may_be_late_and_twice() -> None:
    clock = ManualClock()
    data = sealed(clock)
    verifier = Verifier(KeyRing((OLD,)), clock=clock)
    clock.advance(3600)

    assert verifier.open(data) == verifier.open(data)


def test_a_rotation_of_keys_drops_nothing() -> None:
    clock = ManualClock()
    verifier = Verifier(KeyRing((NEW, OLD)), clock=clock)

    assert verifier.open_direct(sealed(clock, keys=KeyRing((OLD,)))).payload == b"payload"
    assert verifier.open_direct(sealed(clock, keys=KeyRing((NEW, OLD)))).payload == b"payload"


def test_a_new_key_is_readable_by_its_owner_only_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing"

    made = load_keys(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keys(path) == made


def test_no_secret_is_ever_printed(tmp_path: Path) -> None:
    ring = load_keys(tmp_path / "signing")

    assert ring.keys[0][1].hex() not in repr(ring)
    assert ring.keys[0][0] in repr(ring)


@pytest.mark.parametrize("text", ["", "k1", "k1:zz", "k1:00ff"])
def test_malformed_keys_are_refused_without_being_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.ENVIRONMENT_KEYS, text)

    with pytest.raises(ConfigError, match="id:hex"):
        load_keys(Path("/nowhere"))


def test_the_generated_code_is_the_approved_one() -> None:
    schema.check_schema()


def test_unapproved_generated_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "schema.lock"
    lock.write_text("0" * 64)
    monkeypatch.setattr(schema, "LOCK", lock)

    with pytest.raises(WrongSchema, match="approved"):
        schema.check_schema()


def test_the_schema_has_its_entry_in_the_list_of_changes_and_another_one_would_not(monkeypatch):
    schema.check_changes()
    monkeypatch.setattr(schema, "schema_digest", lambda: "f" * 64)
    with pytest.raises(WrongSchema, match="no entry"):
        schema.check_changes()
