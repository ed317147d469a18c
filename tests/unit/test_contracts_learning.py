"""What Tamiyo and Simic tell one another survives the wire, and nonsense is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.contracts import learning
from esper_ray.contracts.messages import DecisionRecord, HeadDecision, PolicyUpdate
from esper_ray.errors import ContractError

HEADS = (
    HeadDecision("operation", 1, -0.5, (True, True, False, False)),
    HeadDecision("slot", 2, -1.5, (False, False, True)),
    HeadDecision("blueprint", 30, -3.0, tuple(index % 2 == 0 for index in range(45))),
    HeadDecision("schedule", 0, -1.0, (True, True, True)),
)
RECORD = DecisionRecord(7, "policy-0011", "glyphs-1", 3, "ab" * 32, HEADS, 0.25, 0.125, 1, 2)
UPDATE = PolicyUpdate("policy-0011", "policy-0000", "cd" * 32, 5, {"g": 0.5})


def test_a_decision_record_survives_the_wire_with_its_masks():
    found = learning.decode_decision(learning.encode_decision(RECORD))
    for sent, came in zip(RECORD.heads, found.heads, strict=True):
        assert came.mask[: len(sent.mask)] == sent.mask
        assert not any(came.mask[len(sent.mask) :])
        assert (came.head, came.choice, came.log_probability) == (sent.head, sent.choice, sent.log_probability)
    assert replace(found, heads=()) == replace(RECORD, heads=())


def test_a_terminal_record_and_a_policy_update_survive_the_wire():
    last = DecisionRecord(1, "heuristic", "r", 9, "ef" * 32, terminal=True)
    assert learning.decode_decision(learning.encode_decision(last)) == last
    assert learning.decode_policy_update(learning.encode_policy_update(UPDATE)) == UPDATE


@pytest.mark.parametrize(
    "head",
    [
        HeadDecision("operation", 2, -0.5, (True, True, False)),
        HeadDecision("operation", 9, -0.5, (True, True)),
        HeadDecision("operation", 0, 0.5, (True, True)),
    ],
)
def test_a_choice_that_was_not_legal_or_has_no_probability_is_refused(head):
    data = learning.encode_decision(replace(RECORD, heads=(head,)))
    with pytest.raises(ContractError, match="operation"):
        learning.decode_decision(data)


@pytest.mark.parametrize("changes", [{"value": math.nan}, {"exploration": math.inf}])
def test_a_number_that_is_not_finite_is_refused_where_it_is_sent(changes):
    with pytest.raises(ContractError, match=next(iter(changes))):
        learning.encode_decision(replace(RECORD, **changes))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_with_a_typed_error_or_are_a_message_that_survives_the_wire(data):
    pairs = (
        (learning.decode_decision, learning.encode_decision),
        (learning.decode_policy_update, learning.encode_policy_update),
    )
    for decode, encode in pairs:
        try:
            found = decode(data)
        except ContractError:
            continue
        assert decode(encode(found)) == found
