"""The end-of-epoch hook: state out, decision in, commands applied, inside 18 ms, each part timed.

A decision that does not come in time is "no change", counted, never an error. In lockstep the boundary waits for
its decision instead, and asks again while Tamiyo is being restarted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper_ray.contracts import codec
from esper_ray.contracts.budgets import DECIDE_MS, MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.enums import BusMessageType, CommandType
from esper_ray.contracts.messages import AdaptationCommand, SystemState
from esper_ray.contracts.ports import Decider
from esper_ray.contracts.signing import Signer, Verifier
from esper_ray.errors import ContractError, EsperError

LOCKSTEP_PATIENCE_SECONDS = 90.0
RETRY_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class BoundaryTimes:
    """Milliseconds. ``guard`` is the bookkeeping: the decision made durable before it takes effect."""

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
        look: Callable[[], SystemState],
        record: Callable[[Sequence[bytes], str], None],
        planned: Sequence[bytes] | None = None,
    ) -> Exchange:
        """Do one boundary.

        Args:
            look: gathers the state.
            record: makes the decision durable; called with the envelopes and the reason for a missed one.
            planned: the envelopes of the journal, when a resumed run repeats this boundary.
        """
        start = time.perf_counter()
        state = look()
        packets = codec.encode_state(state)
        sealed = [
            self._signer.seal(packet, BusMessageType.SYSTEM_STATE, payload_type="SystemStatePacket")
            for packet in packets
        ]
        assembled = time.perf_counter()
        answer, missed = self._ask(state.run, sealed)
        decided = time.perf_counter()
        envelopes, repeated = (answer, False) if planned is None else (list(planned), True)
        if repeated:
            missed = ""
        else:
            record(envelopes, missed)
        recorded = time.perf_counter()
        commands, refused = self._open(envelopes, state, repeated=repeated)
        refused += [reason for reason in map(self._apply_one, commands) if reason]
        applied = time.perf_counter()
        times = BoundaryTimes(
            total=(applied - start) * 1e3,
            assembly=(assembled - start) * 1e3,
            decide=(decided - assembled) * 1e3,
            apply=(applied - recorded) * 1e3,
            guard=(recorded - decided) * 1e3,
        )
        return Exchange(tuple(commands), tuple(envelopes), tuple(packets), tuple(refused), times, missed)

    def _ask(self, run: str, sealed: list[bytes]) -> tuple[list[bytes], str]:
        patience = LOCKSTEP_PATIENCE_SECONDS if self._lockstep else DECIDE_MS.limit / 1e3
        give_up = time.perf_counter() + patience
        while True:
            try:
                answer = self._decider.decide(run, sealed).wait(max(0.0, give_up - time.perf_counter()))
            except EsperError as fault:
                if not self._lockstep or time.perf_counter() + RETRY_SECONDS > give_up:
                    return [], f"Tamiyo failed: {fault}"
                time.sleep(RETRY_SECONDS)
                continue
            if answer is None:
                return [], f"no answer within {patience * 1e3:.0f} ms"
            return answer, ""

    def _open(
        self, envelopes: Sequence[bytes], state: SystemState, *, repeated: bool
    ) -> tuple[list[AdaptationCommand], list[str]]:
        commands: list[AdaptationCommand] = []
        refused: list[str] = []
        opener = self._verifier.open if repeated else self._verifier.open_direct
        for data in envelopes[:MAX_COMMANDS_PER_BOUNDARY]:
            try:
                command = codec.decode_command(opener(data).payload)
            except ContractError as fault:
                refused.append(f"{fault.reason}: {fault}")
                continue
            if (command.run, command.epoch, command.branch) != (state.run, state.epoch, state.branch):
                refused.append(f"a command for {command.run} epoch {command.epoch} was refused")
                continue
            commands.append(command)
        return commands, refused

    def _apply_one(self, command: AdaptationCommand) -> str:
        return "" if command.type is CommandType.NO_OP else self._apply(command)
