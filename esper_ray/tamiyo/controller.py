"""Tamiyo's core: keeps the view of each run, asks a controller, signs its commands, closes its reports.

What it answered is in its journal before it answers, under (run, branch, epoch): the same question gets the same
commands, also from a Tamiyo that was killed and came back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esper_ray.config import TamiyoConfig
from esper_ray.contracts import codec
from esper_ray.contracts.budgets import DECIDE_MS, MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.enums import BusMessageType, CommandType, SeedOperation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, SystemState
from esper_ray.contracts.ports import Candidate, Publisher, RunOpening, SlotInfo, SlotSignature
from esper_ray.contracts.signing import KeyRing, Signer, Verifier
from esper_ray.errors import RunError
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import derive_seed
from esper_ray.reliability.journal import Journal
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.reports import Observation
from esper_ray.tamiyo.view import Proposal, RunView

REPORT_RETENTION_NS = 24 * 3600 * 10**9
_LONGEST_REASON = 60


class Tamiyo:
    """Decides for the runs that were opened with it.

    Args:
        journal: where openings, decisions and reports are kept.
        publisher: where field reports go; None keeps them in the journal only.
    """

    def __init__(
        self,
        keys: KeyRing,
        *,
        journal: Path,
        publisher: Publisher | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock, self._publisher = clock, publisher
        self._signer = Signer(keys, "tamiyo", clock=clock)
        self._verifier = Verifier(keys, clock=clock)
        self._journal = Journal(journal, clock=clock)
        self._views: dict[str, RunView] = {}
        self._observed: dict[str, dict[int, Observation]] = {}
        for entry in self._journal.read("openings"):
            self._enter(_opening_from(json.loads(entry.payload)), since=entry.seq)

    def open_run(self, opening: RunOpening) -> None:
        """Begin, or begin again from ``opening.epoch``: later states are forgotten, later decisions are not."""
        key = f"{opening.run}/{opening.branch}/{opening.epoch}/{self._clock.now_ns()}"
        seq = self._journal.append("openings", json.dumps(asdict(opening)).encode(), key=key)
        self._enter(opening, since=seq)

    def _enter(self, opening: RunOpening, *, since: int) -> None:
        """Build the view: what was decided up to the opening's epoch, and whatever was asked since the opening."""
        view = RunView(opening, TamiyoConfig(**opening.settings))
        self._views[opening.run], self._observed[opening.run] = view, {}
        for entry in self._journal.read(f"states/{opening.run}"):
            record = json.loads(entry.payload)
            state = codec.decode_state([bytes.fromhex(packet) for packet in record["packets"]])
            if state.epoch <= opening.epoch or entry.seq > since:
                self._observe(view, state, [codec.decode_command(bytes.fromhex(c)) for c in record["commands"]])

    def decide(self, run: str, envelopes: Sequence[bytes]) -> list[bytes]:
        """Signed commands for the boundary that the signed packets describe.

        Raises:
            RunError: the run was never opened here.
            ContractError: a packet is damaged, foreign or too old.
        """
        view = self._views.get(run)
        if view is None:
            raise RunError(f"Tamiyo does not know the run {run!r}.", remedy="Open it before its first boundary.")
        packets = [self._verifier.open_direct(data).payload for data in envelopes]
        state = codec.decode_state(packets)
        key = f"{state.branch}/{state.epoch}"
        stored = self._journal.get(f"states/{run}", key)
        if stored is not None:
            commands = [bytes.fromhex(text) for text in json.loads(stored.payload)["commands"]]
            if not view.states or view.now.epoch < state.epoch:
                self._observe(view, state, [codec.decode_command(data) for data in commands])
        else:
            commands = self._decide_anew(view, state, packets, key)
        return [
            self._signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand")
            for data in commands
        ]

    def _decide_anew(self, view: RunView, state: SystemState, packets: Sequence[bytes], key: str) -> list[bytes]:
        view.states.append(state)
        proposals = CONTROLLERS[view.opening.controller](view, view.config)[:MAX_COMMANDS_PER_BOUNDARY]
        view.states.pop()
        issued = [self._command(view, state, number, proposal) for number, proposal in enumerate(proposals)]
        issued = issued or [self._no_change(view, state)]
        commands = [codec.encode_command(command) for command in issued]
        record = {"packets": [packet.hex() for packet in packets], "commands": [data.hex() for data in commands]}
        self._journal.append(f"states/{state.run}", json.dumps(record).encode(), key=key)
        self._observe(view, state, issued)
        return commands

    def _command(self, view: RunView, state: SystemState, number: int, proposal: Proposal) -> AdaptationCommand:
        return AdaptationCommand(
            command_id=derive_seed(state.run, "command", state.branch, state.epoch, number),
            type=CommandType.SEED,
            run=state.run,
            epoch=state.epoch,
            branch=state.branch,
            issued_at_ns=self._clock.now_ns(),
            issued_by=view.opening.controller,
            slot=proposal.slot,
            seed=proposal.seed,
            deadline_ms=DECIDE_MS.limit,
            seed_directive=SeedDirective(
                proposal.operation,
                blueprint=proposal.blueprint,
                blend_mode=proposal.blend_mode,
                blend_schedule=proposal.schedule,
            ),
            annotations={"why": proposal.why[:_LONGEST_REASON]},
        )

    def _no_change(self, view: RunView, state: SystemState) -> AdaptationCommand:
        return AdaptationCommand(
            command_id=derive_seed(state.run, "command", state.branch, state.epoch, 0),
            type=CommandType.NO_OP,
            run=state.run,
            epoch=state.epoch,
            branch=state.branch,
            issued_at_ns=self._clock.now_ns(),
            issued_by=view.opening.controller,
            deadline_ms=DECIDE_MS.limit,
        )

    def _observe(self, view: RunView, state: SystemState, commands: Sequence[AdaptationCommand]) -> None:
        """Take a decided state into the view, and close the observation windows that end with it."""
        view.states.append(state)
        observed = self._observed[state.run]
        for command_id, observation in list(observed.items()):
            closed = observation.watch(state, view.config.report_window)
            if observation.void:
                del observed[command_id]
            elif closed is not None:
                self._report(state.run, observed.pop(command_id), *closed)
        for command in commands:
            directive = command.seed_directive
            if directive is not None and directive.operation is SeedOperation.GERMINATE:
                observed[command.command_id] = Observation(
                    command.command_id, command.slot, directive.blueprint, state.epoch, command.issued_by
                )

    def _report(self, run: str, observation: Observation, outcome: Any, notes: str) -> None:
        report = observation.report(run, outcome, notes, self._clock.now_ns())
        key = str(report.report_id)
        if self._journal.get("reports", key) is not None:
            return
        payload = codec.encode_report(report)
        self._journal.append("reports", payload, key=key)
        if self._publisher is not None:
            event_id = report.report_id.to_bytes(8, "big")
            self._publisher.publish(BusMessageType.FIELD_REPORT, payload, event_id=event_id)

    def close_run(self, run: str) -> None:
        """Report on what is still under observation; the run and old reports are forgotten."""
        for observation in self._observed.get(run, {}).values():
            self._report(run, observation, *observation.close())
        self._observed[run] = {}
        ours = [entry.seq for entry in self._journal.read("openings") if json.loads(entry.payload)["run"] == run]
        self._journal.remove(ours)
        self._journal.remove_before("reports", self._clock.now_ns() - REPORT_RETENTION_NS)

    def reports(self, run: str) -> list[Any]:
        """The field reports of a run that are still in the journal."""
        found = [codec.decode_report(entry.payload) for entry in self._journal.read("reports")]
        return [report for report in found if report.run == run]

    def close(self) -> None:
        self._journal.close()


def _opening_from(data: dict[str, Any]) -> RunOpening:
    slots = tuple(
        SlotInfo(
            row["index"], row["name"], SlotSignature(**{**row["signature"], "shape": tuple(row["signature"]["shape"])})
        )
        for row in data["slots"]
    )
    candidates = tuple(Candidate(**row) for row in data["candidates"])
    return RunOpening(**{**data, "slots": slots, "candidates": candidates})
