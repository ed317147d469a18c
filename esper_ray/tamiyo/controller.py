"""Tamiyo's core: keeps the view of each run, asks a brain, signs its commands, closes its reports.

What it answered is in its journal before it answers, under (run, branch, epoch): the same question gets the same
commands, also from a Tamiyo that was killed and came back. A new policy takes its seat between two boundaries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_ray.config import TamiyoConfig
from esper_ray.contracts import codec, learning
from esper_ray.contracts.enums import BusMessageType, SeedOperation
from esper_ray.contracts.messages import (
    AdaptationCommand,
    DecisionRecord,
    FieldReport,
    MetricPoint,
    PolicyUpdate,
    SystemState,
)
from esper_ray.contracts.ports import (
    LAYER_STATISTICS,
    Candidate,
    HostGraph,
    LayerInfo,
    Publisher,
    RunOpening,
    SlotInfo,
    SlotSignature,
)
from esper_ray.contracts.signing import KeyRing, Signer, Verifier
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.errors import PolicyRefused, RunError
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.ids import derive_seed
from esper_ray.reliability.journal import Journal
from esper_ray.tamiyo import graph, observations
from esper_ray.tamiyo.brains import Brain, ScriptedBrain, Step
from esper_ray.tamiyo.commands import command
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.reports import Observation
from esper_ray.tamiyo.seat import PolicySeat
from esper_ray.tamiyo.view import RunView, in_history

REPORT_RETENTION_NS = 24 * 3600 * 10**9
STATISTICS_TYPE = "GraphStatistics"


class Tamiyo:
    """Decides for the runs that were opened with it.

    Args:
        journal: where openings, decisions and reports are kept.
        publisher: where field reports and decision records go; None keeps them in the journal only.
        home: where policies are and observations go; None leaves the decisions to the heuristic and the controls.
    """

    def __init__(
        self,
        keys: KeyRing,
        *,
        journal: Path,
        publisher: Publisher | None = None,
        home: Path | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock, self._publisher = clock, publisher
        self._after = observations.Aftermath(home / "observations") if home is not None else None
        self.seat = PolicySeat(home)
        if self.seat.fault is not None:
            self._tell_refusal(self.seat.promoted, self.seat.fault)
        self._signer = Signer(keys, "tamiyo", clock=clock)
        self._verifier = Verifier(keys, clock=clock)
        self._journal = Journal(journal, clock=clock)
        # The boundary does not wait for the disk: a decision survives a kill, and what a power cut takes is asked again
        # by a run that then stands at its last checkpoint, and decided with the same draws.
        self._decisions = Journal(journal, clock=clock, sync=False)
        self._views: dict[str, RunView] = {}
        self._observed: dict[str, dict[int, Observation]] = {}
        last = {str(json.loads(entry.payload)["run"]): entry for entry in self._journal.read("openings")}
        for entry in last.values():
            self._enter(_opening_from(json.loads(entry.payload)), since=entry.seq, resend=True)
        # Whether the last ones got out before a kill is not known; whoever takes them in takes each event id once.
        for entry in self._journal.read("reports"):
            self._send_report(codec.decode_report(entry.payload), entry.payload)

    def open_run(self, opening: RunOpening) -> None:
        """Begin, or begin again from ``opening.epoch``: later states are forgotten, later decisions are not.

        A new branch is a rollback: decisions after that epoch are undone, each with its report, and remembered as such.

        Raises:
            EsperError: the run wants a learned policy, and there is none that can decide.
        """
        if opening.controller == "learned":
            self.seat.brain(TamiyoConfig(**opening.settings).policy)
        key = f"{opening.run}/{opening.branch}/{opening.epoch}/{self._clock.now_ns()}"
        seq = self._journal.append("openings", json.dumps(asdict(opening)).encode(), key=key)
        passing("tamiyo.opened")
        self._enter(opening, since=seq, resend=opening.run not in self._views)

    def _enter(self, opening: RunOpening, *, since: int, resend: bool) -> None:
        """Build the view: what was decided up to the opening's epoch, and whatever was asked since the opening.

        Args:
            resend: send its decision records again: whether the last one got out before a kill is not known, and Simic
                takes each once.
        """
        view = RunView(opening, TamiyoConfig(**opening.settings))
        self._views[opening.run], self._observed[opening.run] = view, {}
        asked = [(entry.seq, json.loads(entry.payload)) for entry in self._journal.read(f"states/{opening.run}")]
        states = [codec.decode_state([bytes.fromhex(packet) for packet in stored["packets"]]) for _, stored in asked]
        turns = self._turns(opening, states)
        for (seq, stored), state in zip(asked, states, strict=True):
            commands = [codec.decode_command(bytes.fromhex(data)) for data in stored["commands"]]
            if not in_history(state, opening.branch, turns):
                self._undo(view, state, commands, opening)
            elif state.epoch <= opening.epoch or seq > since:
                self._take_in(view, state, _statistics(bytes.fromhex(stored.get("statistics", ""))))
                self._follow(view, commands)
                if resend:
                    self._send_records(bytes.fromhex(data) for data in stored.get("records", ()))

    def _turns(self, opening: RunOpening, states: Sequence[SystemState]) -> dict[int, int]:
        """By branch the epoch after which it was opened: the least of its openings, or what its first state says."""
        found: dict[int, int] = {}
        known = [json.loads(entry.payload) for entry in self._journal.read("openings")]
        places = [(int(each["branch"]), int(each["epoch"])) for each in known if each["run"] == opening.run]
        for branch, epoch in [*places, *((state.branch, state.epoch - 1) for state in states)]:
            if branch:
                found[branch] = min(found.get(branch, epoch), epoch)
        return found

    def _undo(
        self, view: RunView, state: SystemState, commands: Sequence[AdaptationCommand], opening: RunOpening
    ) -> None:
        """Remember what a rollback took back, and report on it."""
        for each in commands:
            directive = each.seed_directive
            if directive is None or directive.operation is not SeedOperation.GERMINATE:
                continue
            view.undone.add((each.slot, directive.blueprint))
            observation = Observation(each.command_id, each.slot, directive.blueprint, state.epoch, each.issued_by)
            self._report(opening.run, observation, *observation.undo())

    def decide(self, run: str, envelopes: Sequence[bytes]) -> list[bytes]:
        """Signed commands for the boundary that the signed packets describe.

        Raises:
            RunError: the run was never opened here.
            ContractError: a packet is damaged, foreign or too old.
        """
        view = self._views.get(run)
        if view is None:
            raise RunError(f"Tamiyo does not know the run {run!r}.", remedy="Open it before its first boundary.")
        opened = [self._verifier.open_direct(data) for data in envelopes]
        packets = [each.payload for each in opened if each.payload_type != STATISTICS_TYPE]
        statistics = b"".join(each.payload for each in opened if each.payload_type == STATISTICS_TYPE)
        state = codec.decode_state(packets)
        if state.branch > view.opening.branch:
            # The run was rolled back while nobody could tell.
            self.open_run(replace(view.opening, epoch=state.epoch - 1, branch=state.branch))
            view = self._views[run]
        stored = self._decisions.get(f"states/{run}", f"{state.branch}/{state.epoch}")
        if stored is not None:
            commands = [bytes.fromhex(text) for text in json.loads(stored.payload)["commands"]]
            if self._take_in(view, state, _statistics(statistics)):
                self._follow(view, [codec.decode_command(data) for data in commands])
        else:
            self._take_in(view, state, _statistics(statistics))
            commands = self._decide_anew(view, packets, statistics)
        return [
            self._signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand")
            for data in commands
        ]

    def _decide_anew(self, view: RunView, packets: Sequence[bytes], statistics: bytes) -> list[bytes]:
        brain, steps = self._think(view)
        issued = [
            command(view, step.proposal, place=place, issued_by=brain.version, issued_at_ns=self._clock.now_ns())
            for place, step in enumerate(steps)
        ]
        # The closing "no change" is a command of its own only where nothing else was decided.
        sent = [each for each in issued if each.seed_directive is not None] or issued[:1]
        commands = [codec.encode_command(each) for each in sent]
        records = self._records(view, brain.version, steps, issued)
        passing("tamiyo.thought")
        stored = {
            "packets": [data.hex() for data in packets],
            "statistics": statistics.hex(),
            "commands": [data.hex() for data in commands],
            "records": [data.hex() for data in records],
        }
        self._decisions.append(
            f"states/{view.opening.run}", json.dumps(stored).encode(), key=f"{view.now.branch}/{view.now.epoch}"
        )
        passing("tamiyo.decided")
        self._follow(view, sent)
        if self._after is not None and records:
            self._after.put([step.observation for step in steps], lambda: self._send_records(records))
        return commands

    def _think(self, view: RunView) -> tuple[Brain, list[Step]]:
        """The decision, and whose it is. A promoted policy that decides nonsense loses its seat to the heuristic."""
        brain = self._brain(view)
        try:
            return brain, brain.steps(view)
        except PolicyRefused as fault:
            if view.opening.controller != "auto":
                raise
            self.seat.dismiss(str(fault))
            self._tell_refusal(brain.version, fault)
            brain = self._brain(view)
            return brain, brain.steps(view)

    def _brain(self, view: RunView) -> Brain:
        """Who decides now: a boundary is where a new policy takes over."""
        name = view.opening.controller
        self.seat.take_over()
        if name == "learned":
            return self.seat.brain(view.config.policy)
        if name == "auto":
            name = "heuristic"
            if self.seat.current is not None:
                return self.seat.current
        return ScriptedBrain(name, CONTROLLERS[name])

    def _records(
        self, view: RunView, version: str, steps: Sequence[Step], issued: Sequence[AdaptationCommand]
    ) -> list[bytes]:
        if self._after is None or not view.config.record or not view.opening.candidates:
            return []
        return [
            learning.encode_decision(
                step.record(
                    command_id=each.command_id,
                    version=version,
                    view=view,
                    digest=graph.observation_digest(step.observation),
                    place=place,
                )
            )
            for place, (step, each) in enumerate(zip(steps, issued, strict=True))
        ]

    def _send_records(self, records: Iterable[bytes]) -> None:
        if self._publisher is None:
            return
        for data in records:
            record = learning.decode_decision(data)
            event_id = derive_seed(record.run, "record", record.command_id, record.terminal).to_bytes(8, "big")
            self._publisher.publish(BusMessageType.DECISION_RECORD, data, event_id=event_id)
            passing("tamiyo.told")

    def offer(self, update: PolicyUpdate) -> None:
        """Check a promoted policy on states of the runs that are open; it decides from the next boundary on.

        Raises:
            PolicyRefused: it is damaged, foreign or illegal; the text says which, and the present one stays.
        """
        views = [view for view in list(self._views.values()) if view.states and view.opening.candidates]
        try:
            self.seat.offer(update, views)
        except PolicyRefused as fault:
            self.seat.refused = str(fault)
            self._tell_refusal(update.policy_id, fault)
            raise

    def _tell_refusal(self, policy_id: str, fault: PolicyRefused) -> None:
        if self._publisher is not None:
            point = MetricPoint("pr", 1.0, {"reason": fault.reason})
            told = event("policy.refused", {"policy": policy_id, "reason": fault.reason}, message=str(fault))
            publish_telemetry(self._publisher, "tamiyo", "", 0, [point], [told], clock=self._clock)

    def _take_in(self, view: RunView, state: SystemState, statistics: npt.NDArray[np.float32] | None) -> bool:
        """Add a state to the view, and close the observation windows that end with it; False if it is there already."""
        if view.states and view.now.epoch >= state.epoch:
            return False
        view.states.append(state)
        view.statistics = statistics
        observed = self._observed[state.run]
        for command_id, observation in list(observed.items()):
            closed = observation.watch(state, view.config.report_window)
            if observation.void:
                del observed[command_id]
            elif closed is not None:
                self._report(state.run, observed.pop(command_id), *closed)
        return True

    def _follow(self, view: RunView, commands: Sequence[AdaptationCommand]) -> None:
        """Open an observation window for each germination."""
        for each in commands:
            directive = each.seed_directive
            if directive is not None and directive.operation is SeedOperation.GERMINATE:
                self._observed[view.opening.run][each.command_id] = Observation(
                    each.command_id, each.slot, directive.blueprint, view.now.epoch, each.issued_by
                )

    def _report(self, run: str, observation: Observation, outcome: Any, notes: str) -> None:
        report = observation.report(run, outcome, notes, self._clock.now_ns())
        if self._after is None:
            self._file(report)
        else:
            self._after.put((), lambda: self._file(report))

    def _file(self, report: FieldReport) -> None:
        """Make a report durable, then tell it."""
        key = str(report.report_id)
        if self._journal.get("reports", key) is not None:
            return
        payload = codec.encode_report(report)
        self._journal.append("reports", payload, key=key)
        passing("tamiyo.report")
        self._send_report(report, payload)
        passing("tamiyo.reported")

    def _send_report(self, report: FieldReport, payload: bytes) -> None:
        if self._publisher is not None:
            event_id = report.report_id.to_bytes(8, "big")
            self._publisher.publish(BusMessageType.FIELD_REPORT, payload, event_id=event_id)

    def close_run(self, run: str) -> None:
        """Report on what is still under observation, record the end; the run and old reports are forgotten."""
        self._record_end(run)
        for observation in self._observed.get(run, {}).values():
            self._report(run, observation, *observation.close())
        self._observed[run] = {}
        if self._after is not None:
            self._after.flush()
        ours = [entry.seq for entry in self._journal.read("openings") if json.loads(entry.payload)["run"] == run]
        self._journal.remove(ours)
        passing("tamiyo.closed")
        old = self._clock.now_ns() - REPORT_RETENTION_NS
        self._journal.remove_before("reports", old)
        open_runs = {json.loads(entry.payload)["run"] for entry in self._journal.read("openings")}
        for stream in self._journal.streams("states/"):
            if stream.removeprefix("states/") not in open_runs:
                self._journal.remove_before(stream, old)

    def _record_end(self, run: str) -> None:
        view = self._views.get(run)
        if view is None or not view.states or self._after is None or not view.config.record:
            return
        if view.opening.candidates:
            last = graph.observe(view)
            record = DecisionRecord(
                command_id=derive_seed(run, "end", view.now.branch, view.now.epoch),
                policy_version=view.opening.controller,
                run=run,
                epoch=view.now.epoch,
                branch=view.now.branch,
                observation_digest=graph.observation_digest(last),
                terminal=True,
            )
            self._after.put([last], lambda: self._send_records([learning.encode_decision(record)]))

    def reports(self, run: str) -> list[FieldReport]:
        """The field reports of a run that are still in the journal."""
        if self._after is not None:
            self._after.flush()
        found = [codec.decode_report(entry.payload) for entry in self._journal.read("reports")]
        return [report for report in found if report.run == run]

    def close(self) -> None:
        if self._after is not None:
            self._after.flush()
        self._decisions.close()
        self._journal.close()


def _opening_from(data: dict[str, Any]) -> RunOpening:
    slots = tuple(
        SlotInfo(
            row["index"], row["name"], SlotSignature(**{**row["signature"], "shape": tuple(row["signature"]["shape"])})
        )
        for row in data["slots"]
    )
    candidates = tuple(Candidate(**row) for row in data["candidates"])
    return RunOpening(**{**data, "slots": slots, "candidates": candidates, "graph": _graph_from(data.get("graph"))})


def _graph_from(data: dict[str, Any] | None) -> HostGraph | None:
    if data is None:
        return None
    return HostGraph(
        layers=tuple(LayerInfo(**row) for row in data["layers"]),
        edges=tuple((int(source), int(target)) for source, target in data["edges"]),
        slot_layers=tuple(data["slot_layers"]),
    )


def _statistics(data: bytes) -> npt.NDArray[np.float32] | None:
    """float32 [layers, LAYER_STATISTICS]; None where none came, or what came has another shape."""
    row = 4 * len(LAYER_STATISTICS)
    if not data or len(data) % row:
        return None
    return np.frombuffer(data, np.float32).reshape(-1, len(LAYER_STATISTICS))
