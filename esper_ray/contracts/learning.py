"""The codec of what Tamiyo and Simic tell one another: decision records and policy updates."""

from __future__ import annotations

from esper_ray.contracts import leyline_pb2 as pb
from esper_ray.contracts.messages import DecisionRecord, HeadDecision, PolicyUpdate
from esper_ray.contracts.wire import VERSION, finite, finite_value, parse
from esper_ray.errors import ContractError


def encode_decision(record: DecisionRecord) -> bytes:
    """Masks travel as one bit per choice."""
    wire = pb.DecisionRecord(
        version=VERSION,
        command_id=record.command_id,
        policy_version=record.policy_version,
        value=finite_value("value", record.value),
        observation_digest=record.observation_digest,
        run=record.run,
        epoch=record.epoch,
        exploration=finite_value("exploration", record.exploration),
        place=record.place,
        branch=record.branch,
        terminal=record.terminal,
    )
    for head in record.heads:
        each = wire.heads.add()
        each.head = head.head
        each.choice = head.choice
        each.log_probability = finite_value(head.head, head.log_probability)
        each.mask = _pack(head.mask)
    return wire.SerializeToString()


def decode_decision(data: bytes) -> DecisionRecord:
    """The inverse; masks come back as long as whole bytes make them.

    Raises:
        ContractError: no valid record, or a choice that its own mask forbids.
    """
    wire = parse(pb.DecisionRecord, data)
    heads = tuple(
        HeadDecision(head.head, head.choice, finite_value(head.head, head.log_probability), _unpack(head.mask))
        for head in wire.heads
    )
    for head in heads:
        if head.choice >= len(head.mask) or not head.mask[head.choice] or head.log_probability > 1e-6:
            raise ContractError(f"The head {head.head} chose {head.choice}, which was not legal or not a probability.")
    return DecisionRecord(
        command_id=wire.command_id,
        policy_version=wire.policy_version,
        run=wire.run,
        epoch=wire.epoch,
        observation_digest=wire.observation_digest,
        heads=heads,
        value=finite_value("value", wire.value),
        exploration=finite_value("exploration", wire.exploration),
        place=wire.place,
        branch=wire.branch,
        terminal=wire.terminal,
    )


def encode_policy_update(update: PolicyUpdate) -> bytes:
    return pb.PolicyUpdate(
        version=VERSION,
        policy_id=update.policy_id,
        parent_policy_id=update.parent_policy_id,
        artifact_digest=update.artifact_digest,
        validation=finite(update.validation),
        issued_at_ns=update.issued_at_ns,
    ).SerializeToString()


def decode_policy_update(data: bytes) -> PolicyUpdate:
    wire = parse(pb.PolicyUpdate, data)
    return PolicyUpdate(
        policy_id=wire.policy_id,
        parent_policy_id=wire.parent_policy_id,
        artifact_digest=wire.artifact_digest,
        issued_at_ns=wire.issued_at_ns,
        validation=finite(wire.validation),
    )


def _pack(mask: tuple[bool, ...]) -> bytes:
    bits = sum(1 << index for index, legal in enumerate(mask) if legal)
    return bits.to_bytes((len(mask) + 7) // 8, "little")


def _unpack(data: bytes) -> tuple[bool, ...]:
    bits = int.from_bytes(data, "little")
    return tuple(bool(bits >> index & 1) for index in range(8 * len(data)))
