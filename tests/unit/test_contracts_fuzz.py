"""No bytes whatever break a decoder: each is a message, or refused with a typed error, in bounded memory."""

from __future__ import annotations

import random
import resource
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recording import load
from esper_ray.contracts import leyline_pb2
from esper_ray.contracts.budgets import ENVELOPE_BYTES
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.refusals import take
from esper_ray.contracts.signing import Verifier
from esper_ray.errors import ContractError
from tests.unit.contract_samples import CODECS

LONG_RUN = 100_000
_GROWTH_KIB = 16 * 1024
VERIFIER = Verifier(KeyRing((("k1", b"1" * 32),)))
DECODERS: dict[str, Callable[[bytes], Any]] = {
    **{name: each.decode for name, each in CODECS.items()},
    "verifier": VERIFIER.open_direct,
}


def outcome(decode: Callable[[bytes], Any], data: bytes) -> str:
    """The reason of a refusal, or "valid"; anything else than a typed error is raised."""
    try:
        decode(data)
    except ContractError as refusal:
        return refusal.reason
    return "valid"


def seeds_of(name: str) -> list[bytes]:
    """Valid messages to start from: our samples, and what the demo sent."""
    if name == "verifier":
        return seeds_of("envelope")
    wire = CODECS[name].wire
    recorded = [each.payload for each in load() if each.kind == wire]
    return [*(CODECS[name].encode(each) for each in CODECS[name].samples), *recorded[::7]]


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to four of: a byte changed, a bit flipped, a piece cut out, repeated, or taken from another message."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        kind, at = draw.randrange(7), draw.randrange(len(made) + 1)
        if kind == 0 and at < len(made):
            made[at] = draw.randrange(256)
        elif kind == 1 and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del made[at : at + draw.randint(1, 16)]
        elif kind == 3:
            made[at:at] = made[at : at + draw.randint(1, 32)]
        elif kind == 4:
            made[at:at] = draw.randbytes(draw.randint(1, 16))
        elif kind == 5:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            made[at:at] = other[start : start + draw.randint(1, 64)]
        else:
            # A length that promises far more than there is.
            made[at:at] = bytes([draw.randrange(256), 0xFF, 0xFF, 0xFF, draw.randrange(128)])
    return bytes(made)


@given(data=st.binary(max_size=600), name=st.sampled_from(sorted(DECODERS)))
@settings(max_examples=400, deadline=None)
def test_random_bytes_never_crash_a_decoder(data: bytes, name: str) -> None:
    assert outcome(DECODERS[name], data)


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(DECODERS)))
@settings(max_examples=400, deadline=None)
def test_damaged_messages_are_refused_or_still_valid_but_never_crash(seed: int, name: str) -> None:
    starts, draw = SEEDS[name], random.Random(seed)
    data = mutated(draw.choice(starts), starts, draw)

    assert outcome(DECODERS[name], data)
    assert outcome(DECODERS[name], data[: draw.randrange(len(data) + 1)])


@pytest.mark.parametrize("name", ["state", "telemetry", "envelope"])
def test_a_message_that_promises_a_gigabyte_takes_no_more_memory_than_its_bytes(name: str) -> None:
    bomb = CODECS[name].encode(CODECS[name].samples[0]) + b"\x42\xff\xff\xff\xff\x03" + b"\0" * 1000
    tracemalloc.start()
    assert outcome(DECODERS[name], bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1024 * 1024


def test_a_state_that_promises_all_the_parts_there_can_be_takes_no_memory_for_them() -> None:
    head = leyline_pb2.SystemStatePacket(version=1, run="r", epoch=1, parts=2**32 - 1).SerializeToString()
    tracemalloc.start()
    with pytest.raises(ContractError, match="incomplete"):
        DECODERS["state"](head)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1024 * 1024


def test_an_envelope_over_the_cap_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ContractError) as refused:
        VERIFIER.open(bytes(ENVELOPE_BYTES + 1))
    assert refused.value.reason == "too_large"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_hundred_thousand_bad_inputs_break_no_decoder_and_fill_no_memory(name: str) -> None:
    starts, draw, decode = SEEDS[name], random.Random(f"fuzz {name}"), DECODERS[name]
    found = Counter[str]()
    # The whole process, because upb's memory is not Python's.
    before = 0
    for number in range(LONG_RUN):
        if number == LONG_RUN // 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data = draw.randbytes(draw.randrange(400)) if number % 5 == 0 else mutated(draw.choice(starts), starts, draw)
        found[outcome(decode, data)] += 1
    take()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert found["valid"] < LONG_RUN / 2, found
    assert found[""] == 0, "each refusal has its reason"
    assert grown < _GROWTH_KIB, "no input takes much memory, and nothing is kept of what was refused"


SEEDS = {name: seeds_of(name) for name in DECODERS}
