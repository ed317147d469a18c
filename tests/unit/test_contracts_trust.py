"""Who may speak: signatures, keys, nonces, freshness, and the approved schema."""

from __future__ import annotations

import hmac
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from esper_ray.cli.app import app
from esper_ray.contracts import codec, keys, leyline_pb2, refusals, schema, signing
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.envelope import PAYLOADS
from esper_ray.contracts.nonces import NonceMemory
from esper_ray.contracts.signing import KeyRing, Signer, Verifier, load_keys, rotate_keys
from esper_ray.contracts.telemetry import split_telemetry
from esper_ray.errors import AuthenticityError, ConfigError, ContractError, WrongSchema, WrongType
from esper_ray.nissa.metrics import Metrics
from esper_ray.oona.streams import KINDS
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

    assert refusal(verifier, codec.encode_envelope(envelope._replace(signature=b""))) == "missing_signature"
    assert refusal(verifier, codec.encode_envelope(envelope._replace(payload=b"other"))) == "invalid_signature"
    assert refusal(Verifier(KeyRing((NEW,)), clock=clock), data) == "unknown_key"
    verifier.open_direct(data)
    assert refusal(verifier, data) == "nonce_replayed"
    late = sealed(clock)
    clock.advance(61)
    assert refusal(verifier, late) == "stale"
    ahead = ManualClock(clock.now_ns() + 61_000_000_000)
    assert refusal(verifier, sealed(ahead)) == "from_the_future"


@pytest.mark.parametrize("size", [0, 1, 16, 64, 65, 200])
def test_a_signature_is_the_hmac_of_the_standard_library(size: int) -> None:
    secret = bytes(range(256))[: max(1, size)]
    data = Signer(KeyRing((("k1", secret),)), "s").seal(
        b"p" * size, BusMessageType.ALERT, payload_type="TelemetryPacket"
    )
    signed = codec.encode_envelope(codec.decode_envelope(data)._replace(signature=b""))

    assert codec.decode_envelope(data).signature == hmac.digest(secret, signed, "sha256")
    assert codec.encode_envelope(codec.decode_envelope(data)) == data, "canonical bytes"


def test_a_message_that_carries_another_payload_than_its_type_says_is_refused_and_counted() -> None:
    clock = ManualClock()
    signer, verifier = Signer(KeyRing((OLD,)), "s", clock=clock), Verifier(KeyRing((OLD,)), clock=clock)
    for type in BusMessageType:
        if type is not BusMessageType.ADAPTATION_COMMAND:
            for opener in (verifier.open, verifier.open_direct):
                with pytest.raises(WrongType, match="AdaptationCommand"):
                    opener(signer.seal(b"p", type, payload_type="AdaptationCommand"))

    (counted,) = [each for each in refusals.take() if each.labels["reason"] == "wrong_type"]
    assert counted.value == 2 * (len(BusMessageType) - 1)


def test_a_receiver_is_handed_no_type_but_those_that_it_takes() -> None:
    clock = ManualClock()
    data, verifier = sealed(clock), Verifier(KeyRing((OLD,)), clock=clock)

    with pytest.raises(WrongType, match="SYSTEM_STATE or FIELD_REPORT"):
        verifier.open_direct(data, BusMessageType.SYSTEM_STATE, BusMessageType.FIELD_REPORT)
    taken = verifier.open_direct(data, BusMessageType.SYSTEM_STATE, BusMessageType.ADAPTATION_COMMAND)

    assert taken.payload == b"payload", "what was refused for its type has not used up its nonce"


def test_the_bus_names_payloads_as_the_contracts_do() -> None:
    assert {type: kind.payload_type for type, kind in KINDS.items()} == {
        type: payloads[0] for type, payloads in PAYLOADS.items()
    }


def test_a_nonce_is_known_again_after_a_restart() -> None:
    clock = ManualClock()
    data = sealed(clock)
    nonce = codec.decode_envelope(data).nonce

    assert refusal(Verifier(KeyRing((OLD,)), clock=clock, seen=[(nonce, clock.now_ns())]), data) == "nonce_replayed"


def test_the_memory_of_nonces_is_bounded_and_what_it_forgot_is_refused_all_the_same() -> None:
    clock = ManualClock()
    verifier = Verifier(KeyRing((OLD,)), clock=clock, nonce_limit=100)
    sent = []
    for _ in range(300):
        clock.advance(0.01)
        sent.append(sealed(clock))
        verifier.open_direct(sent[-1])

    reasons = [refusal(verifier, data) for data in sent]

    assert set(reasons[:200]) == {"stale"}
    assert set(reasons[200:]) == {"nonce_replayed"}
    assert verifier.open_direct(sealed(clock)).payload == b"payload", "a new one is taken"


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 200), st.integers(-60, 60), st.booleans()), max_size=60),
    st.integers(1, 8),
)
def test_no_nonce_is_admitted_twice_within_five_minutes_however_small_the_memory_and_whenever_it_restarts(
    asked: list[tuple[int, int, int, bool]], limit: int
) -> None:
    memory, now, made = NonceMemory(limit=limit), 10**18, dict[int, int]()
    admitted = list[tuple[bytes, int]]()
    for number, seconds, ahead, restart in asked:
        now += seconds * 10**9
        if restart:
            memory = NonceMemory(admitted, limit=limit)
        nonce, last = bytes([number]), max((at for known, at in admitted if known == bytes([number])), default=0)
        if not memory.admit(nonce, made_ns=made.setdefault(number, now + ahead * 10**9), now_ns=now):
            assert now - last > 300 * 10**9
            admitted.append((nonce, now))
        assert len(memory) <= limit


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


def test_a_rotation_under_traffic_loses_no_message(tmp_path: Path) -> None:
    """Two senders and a reader, each with its own view of the file, while the keys are rotated again and again."""
    path, clock = tmp_path / "signing", ManualClock()
    senders = [Signer(load_keys(path), name, clock=clock) for name in ("tolaria", "tamiyo")]
    reader, late = Verifier(load_keys(path), clock=clock), Verifier(load_keys(path), clock=clock)
    used, waiting = set[str](), list[bytes]()
    for number in range(1200):
        clock.advance(0.1)
        if number % 300 == 150:
            rotate_keys(path, force=True)
        data = senders[number % 2].seal(b"%d" % number, BusMessageType.FIELD_REPORT, payload_type="FieldReport")
        found = reader.open(data)
        assert found.payload == b"%d" % number
        used.add(found.key_id)
        waiting.append(data)
        if number % 300 == 299:
            # What lay on the bus during a rotation is read after it.
            assert len([late.open(each) for each in waiting[-300:]]) == 300

    assert len(used) == 5, "the senders followed each rotation without being told"
    assert refusal(reader, waiting[0]) == "unknown_key"


def test_a_second_rotation_within_a_day_is_refused_unless_it_is_forced(tmp_path: Path) -> None:
    path = tmp_path / "signing"
    first = load_keys(path)
    second = rotate_keys(path)

    with pytest.raises(ConfigError, match="hours ago"):
        rotate_keys(path)
    tomorrow = ManualClock(int(path.stat().st_mtime * 1e9) + 25 * 3600 * 10**9)
    third = rotate_keys(path, clock=tomorrow)

    assert second.keys[1] == first.keys[0]
    assert third.keys[1] == second.keys[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert rotate_keys(path, force=True).keys[1] == third.keys[0]


def test_the_command_rotates_and_lists_the_keys_and_shows_no_secret(tmp_path: Path) -> None:
    path, runner = tmp_path / "keys" / "signing", CliRunner()
    first = load_keys(path)

    rotated = runner.invoke(app, ["keys", "rotate", "--set", f"home={tmp_path}"])
    listed = runner.invoke(app, ["keys", "list", "--set", f"home={tmp_path}"])

    there = load_keys(path)
    assert there.keys[1] == first.keys[0]
    assert rotated.stdout == listed.stdout
    assert listed.stdout.split() == [there.keys[0][0], "signs", "and", "verifies", there.keys[1][0], "verifies"]
    assert not any(secret.hex() in listed.stdout for _, secret in there.keys)


def test_keys_of_the_environment_are_not_rotated_behind_its_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.ENVIRONMENT_KEYS, f"k1:{'00' * 32}")

    with pytest.raises(ConfigError, match=keys.ENVIRONMENT_KEYS):
        rotate_keys(tmp_path / "signing")


def test_a_file_of_keys_that_is_damaged_while_processes_run_leaves_them_what_they_had(tmp_path: Path) -> None:
    path, clock = tmp_path / "signing", ManualClock()
    ring = load_keys(path)
    path.write_text("nonsense")
    clock.advance(10)

    data = Signer(ring, "tamiyo", clock=clock).seal(b"p", BusMessageType.ALERT, payload_type="TelemetryPacket")

    assert Verifier(ring, clock=clock).open(data).payload == b"p"


def test_each_of_the_eight_reasons_is_counted_by_nissa() -> None:
    clock = ManualClock()
    verifier = Verifier(KeyRing((OLD,)), clock=clock)
    data = sealed(clock)
    envelope = codec.decode_envelope(data)
    verifier.open_direct(data)
    wire = leyline_pb2.EventEnvelope.FromString(data)
    other_version, other_schema = leyline_pb2.EventEnvelope(), leyline_pb2.EventEnvelope()
    other_version.CopyFrom(wire)
    other_version.version = 2
    other_schema.CopyFrom(wire)
    other_schema.schema ^= 1
    late = sealed(ManualClock(clock.now_ns() - 61_000_000_000))
    early = sealed(ManualClock(clock.now_ns() + 61_000_000_000))
    bad = {
        "missing_signature": codec.encode_envelope(envelope._replace(signature=b"")),
        "invalid_signature": codec.encode_envelope(envelope._replace(source="x")),
        "unknown_key": sealed(clock, keys=KeyRing((NEW,))),
        "nonce_replayed": data,
        "stale": late,
        "from_the_future": early,
        "wrong_version": other_version.SerializeToString(),
        "wrong_schema": other_schema.SerializeToString(),
    }
    for reason, refused in bad.items():
        with pytest.raises(ContractError) as fault:
            verifier.open_direct(refused)
        assert fault.value.reason == reason
    metrics = Metrics()
    # As a sender tells Nissa: points in a telemetry packet.
    for packet in split_telemetry("tolaria", "", 0, refusals.take()):
        for point in codec.decode_telemetry(codec.encode_telemetry(packet)).metrics:
            assert metrics.apply(point) is None

    text = metrics.exposition().decode()

    for reason in bad:
        assert f'esper_refused_total{{reason="{reason}",run=""}} 1.0' in text
    assert refusals.take() == [], "each is told once"


@pytest.mark.parametrize("type", sorted(KINDS))
def test_whatever_the_bus_carries_is_refused_without_its_signature(type: BusMessageType) -> None:
    clock = ManualClock()
    data = Signer(KeyRing((OLD,)), "s", clock=clock).seal(b"p", type, payload_type=KINDS[type].payload_type)
    bare = codec.encode_envelope(codec.decode_envelope(data)._replace(signature=b""))
    verifier = Verifier(KeyRing((OLD,)), clock=clock)

    assert verifier.open(data).type is type
    with pytest.raises(AuthenticityError) as refused:
        verifier.open(bare)
    assert refused.value.reason == "missing_signature"


def test_a_new_key_is_readable_by_its_owner_only_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing"

    made = load_keys(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keys(path) == made


def test_no_secret_is_ever_printed(tmp_path: Path) -> None:
    ring = load_keys(tmp_path / "signing")

    assert ring.keys[0][1].hex() not in repr(ring)
    assert ring.keys[0][0] in repr(ring)


@pytest.mark.parametrize("text", ["", "k1", "k1:zz", "k1:00ff", ",".join(f"k{n}:{'00' * 32}" for n in range(3))])
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
