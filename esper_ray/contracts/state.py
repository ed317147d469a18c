"""The codec of the state that Tolaria sends at each boundary: one packet, or several where its seeds need them."""

from __future__ import annotations

from collections.abc import Iterable

from esper_ray.contracts import leyline_pb2 as pb
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.enums import SeedLifecycleStage
from esper_ray.contracts.messages import HardwareContext, SeedState, SystemState
from esper_ray.contracts.wire import VERSION, finite, finite_value, parse, to_enum, within_limit
from esper_ray.errors import ContractError

# The tag and the length of a seed within its packet, and what the number of packets may take more than one byte.
_NESTED_BYTES = 3
_PARTS_BYTES = 4


def encode_state(state: SystemState) -> list[bytes]:
    """One packet, or several where the seeds do not fit into one (``part`` of ``parts``)."""
    seeds = [_seed_to_wire(seed) for seed in state.seeds]
    whole = _head(state, 1, seeds)
    data = whole.SerializeToString()
    return [data] if len(data) <= CONTROL_MESSAGE_BYTES else _split(state, seeds)


def _split(state: SystemState, seeds: Iterable[pb.SeedState]) -> list[bytes]:
    groups: list[list[pb.SeedState]] = [[]]
    room = CONTROL_MESSAGE_BYTES - _head(state, 1, ()).ByteSize() - _PARTS_BYTES
    for seed in seeds:
        size = seed.ByteSize() + _NESTED_BYTES
        if size > room:
            groups.append([])
            room = CONTROL_MESSAGE_BYTES - _continuation(state, 1, 1, ()).ByteSize() - _PARTS_BYTES
        groups[-1].append(seed)
        room -= size
    first, *rest = groups
    packets = [_head(state, len(groups), first)]
    packets += [_continuation(state, part, len(groups), group) for part, group in enumerate(rest, start=1)]
    return [within_limit(packet) for packet in packets]


def _head(state: SystemState, parts: int, seeds: Iterable[pb.SeedState]) -> pb.SystemStatePacket:
    """The first packet, which has what is of the whole run."""
    hardware = state.hardware
    return pb.SystemStatePacket(
        version=VERSION,
        run=state.run,
        epoch=state.epoch,
        parts=parts,
        branch=state.branch,
        timestamp_ns=state.timestamp_ns,
        global_step=state.global_step,
        training_loss=finite_value("training_loss", state.training_loss),
        validation_loss=finite_value("validation_loss", state.validation_loss),
        validation_accuracy=finite_value("validation_accuracy", state.validation_accuracy),
        metrics=finite(state.metrics),
        hardware=pb.HardwareContext(
            device_kind=hardware.device_kind,
            device_id=hardware.device_id,
            memory_total_mb=hardware.memory_total_mb,
            memory_free_mb=hardware.memory_free_mb,
            temperature_c=hardware.temperature_c,
            utilization=hardware.utilization,
            compute_capability=hardware.compute_capability,
        ),
        seeds=seeds,
    )


def _continuation(state: SystemState, part: int, parts: int, seeds: Iterable[pb.SeedState]) -> pb.SystemStatePacket:
    return pb.SystemStatePacket(
        version=VERSION,
        run=state.run,
        epoch=state.epoch,
        part=part,
        parts=parts,
        branch=state.branch,
        timestamp_ns=state.timestamp_ns,
        seeds=seeds,
    )


def _seed_to_wire(seed: SeedState) -> pb.SeedState:
    return pb.SeedState(
        seed=seed.seed,
        slot=seed.slot,
        blueprint=seed.blueprint,
        stage=int(seed.stage),  # type: ignore[arg-type]
        alpha=seed.alpha,
        gradient_norm=seed.gradient_norm,
        learning_rate=seed.learning_rate,
        depth=seed.depth,
        age_epochs=seed.age_epochs,
        risk=seed.risk,
        metrics=finite(seed.metrics),
    )


def decode_state(packets: Iterable[bytes]) -> SystemState:
    """The state from all the packets of one boundary, in any order."""
    wires = sorted((parse(pb.SystemStatePacket, data) for data in packets), key=lambda wire: wire.part)
    if not wires or [wire.part for wire in wires] != list(range(wires[0].parts)):
        raise ContractError("A system state arrived incomplete.", why="Some of its packets are missing.")
    head, hardware = wires[0], wires[0].hardware
    return SystemState(
        run=head.run,
        epoch=head.epoch,
        global_step=head.global_step,
        timestamp_ns=head.timestamp_ns,
        training_loss=finite_value("training_loss", head.training_loss),
        validation_loss=finite_value("validation_loss", head.validation_loss),
        validation_accuracy=finite_value("validation_accuracy", head.validation_accuracy),
        metrics=finite(head.metrics),
        hardware=HardwareContext(
            device_kind=hardware.device_kind,
            device_id=hardware.device_id,
            memory_total_mb=hardware.memory_total_mb,
            memory_free_mb=hardware.memory_free_mb,
            temperature_c=hardware.temperature_c,
            utilization=hardware.utilization,
            compute_capability=hardware.compute_capability,
        ),
        seeds=tuple(
            SeedState(
                seed=seed.seed,
                slot=seed.slot,
                blueprint=seed.blueprint,
                stage=to_enum(SeedLifecycleStage, seed.stage),
                alpha=seed.alpha,
                gradient_norm=seed.gradient_norm,
                learning_rate=seed.learning_rate,
                depth=seed.depth,
                age_epochs=seed.age_epochs,
                risk=seed.risk,
                metrics=finite(seed.metrics),
            )
            for wire in wires
            for seed in wire.seeds
        ),
        branch=head.branch,
    )
