"""The end-of-epoch hook: state out, decision in, commands applied, inside 18 ms, each part timed.

A decision that does not come in time is "no change", counted, never an error. In lockstep the boundary waits for
its decision instead, and asks again while Tamiyo is being restarted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper_ray.contracts import codec
from esper_ray.contracts.budgets import DECIDE_MS, MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.enums import BusMessageType, CommandType
from esper_ray.contracts.messages import AdaptationCommand, SystemState
from esper_ray.contracts.ports import Decider
from esper_ray.contracts.signing import Signer, Verifier
from esper_ray.errors import ContractError, EsperError, RunError
from esper_ray.reliability.failpoints import passing

LOCKSTEP_PATIENCE_SECONDS = 90.0
RETRY_SECONDS = 0.25
_TYPES = {
    "SystemStatePacket": BusMessageType.SYSTEM_STATE,
    "GraphStatistics": BusMessageType.SYSTEM_STATE,
    "AdaptationCommand": BusMessageType.ADAPTATION_COMMAND,
}


@dataclass(frozen=True, slots=True)
class BoundaryTimes:
    """Milliseconds. ``guard`` is the bookkeeping: the decision written down before it takes effect."""

    total: float
    assembly: float
    decide: float
    apply: float
    guard: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one boundary brought. ``missed`` says why there was no decision; empty where there was one."""

    commands: tuple[AdaptationCommand, ...]
    envelopes: tuple[bytes, ...]
    packets: tuple[bytes, ...]
    refused: tuple[str, ...]
    times: BoundaryTimes
    missed: str


class Boundary:
    """One run's boundaries.

    Args:
        decider: who is asked.
        apply: carries out one command and answers why it was refused, or with an empty text.
        lockstep: wait for the decision; else the deadline decides.
    """

    def __init__(
        self,
        decider: Decider,
        signer: Signer,
        verifier: Verifier,
        *,
        apply: Callable[[AdaptationCommand], str],
        lockstep: bool,
    ) -> None:
        self._decider, self._signer, self._verifier = decider, signer, verifier
        self._apply, self._lockstep = apply, lockstep

    def exchange(
        self,
        look: Callable[[], tuple[SystemState, npt.NDArray[np.float32] | None]],
        record: Callable[[Sequence[bytes], str], None],
        planned: tuple[Sequence[bytes], str] | None = None,
        ordered: Sequence[bytes] = (),
    ) -> Exchange:
        """Do one boundary.

        Args:
            look: gathers the state and the layers' statistics.
            record: writes the decision down; called with the accepted envelopes and the reason for a missed one.
            planned: the same from the journal, when a resumed run repeats this boundary.
            ordered: the commands of persons that were carried out at this boundary; the decider is told of them.
        """
        start = time.perf_counter()
        state, statistics = look()
        packets = codec.encode_state(state)
        told = [("SystemStatePacket", packet) for packet in packets]
        if statistics is not None:
            told.append(("GraphStatistics", statistics.tobytes()))
        told += [("AdaptationCommand", data) for data in ordered]
        sealed = self._seal(told)
        passing("boundary.assembled")
        assembled = time.perf_counter()
        answer, missed = self._ask(state.run, told, sealed)
        passing("boundary.answered")
        decided = time.perf_counter()
        given, missed = (answer, missed) if planned is None else planned
        accepted, refused = self._open(given, state, repeated=planned is not None)
        opened = time.perf_counter()
        if planned is None:
            record(list(accepted), missed)
        passing("boundary.recorded")
        recorded = time.perf_counter()
        refused += [reason for reason in map(self._apply_one, accepted.values()) if reason]
        passing("boundary.applied")
        applied = time.perf_counter()
        times = BoundaryTimes(
            total=(applied - start) * 1e3,
            assembly=(assembled - start) * 1e3,
            decide=(decided - assembled) * 1e3,
            apply=(applied - recorded + opened - decided) * 1e3,
            guard=(recorded - opened) * 1e3,
        )
        return Exchange(tuple(accepted.values()), tuple(accepted), tuple(packets), tuple(refused), times, missed)

    def _seal(self, told: Sequence[tuple[str, bytes]]) -> list[bytes]:
        return [self._signer.seal(data, _TYPES[payload_type], payload_type=payload_type) for payload_type, data in told]

    def _ask(self, run: str, told: Sequence[tuple[str, bytes]], sealed: list[bytes]) -> tuple[list[bytes], str]:
        """The answer, or why there is none.

        Raises:
            RunError: in lockstep, where no deadline decides anything, Tamiyo stays away for too long.
        """
        patience = LOCKSTEP_PATIENCE_SECONDS if self._lockstep else DECIDE_MS.limit / 1e3
        give_up = time.perf_counter() + patience
        why = f"no answer within {patience * 1e3:.0f} ms"
        while True:
            try:
                answer = self._decider.decide(run, sealed).wait(max(0.0, give_up - time.perf_counter()))
            except EsperError as fault:
                answer, why = None, f"Tamiyo failed: {fault}"
            if answer is not None:
                return answer, ""
            if not self._lockstep:
                return [], why
            if time.perf_counter() + RETRY_SECONDS > give_up:
                raise RunError(
                    f"Tamiyo gave {run} no decision for {patience:.0f} s.",
                    why=why,
                    remedy="Look at the actor tamiyo, then go on with `esper run --resume`.",
                )
            time.sleep(RETRY_SECONDS)
            # A nonce is good for one delivery, and this one may have been made.
            sealed = self._seal(told)

    def _open(
        self, envelopes: Sequence[bytes], state: SystemState, *, repeated: bool
    ) -> tuple[dict[bytes, AdaptationCommand], list[str]]:
        """The commands that are genuine and meant for this boundary, by their envelopes, and why others are not."""
        accepted: dict[bytes, AdaptationCommand] = {}
        refused: list[str] = []
        opener = self._verifier.open if repeated else self._verifier.open_direct
        for data in envelopes[:MAX_COMMANDS_PER_BOUNDARY]:
            try:
                command = codec.decode_command(opener(data, BusMessageType.ADAPTATION_COMMAND).payload)
            except ContractError as fault:
                refused.append(f"{fault.reason}: {fault}")
                continue
            if (command.run, command.epoch, command.branch) != (state.run, state.epoch, state.branch):
                refused.append(f"a command for {command.run} epoch {command.epoch} was refused")
                continue
            accepted[data] = command
        return accepted, refused

    def _apply_one(self, command: AdaptationCommand) -> str:
        return "" if command.type is CommandType.NO_OP else self._apply(command)
