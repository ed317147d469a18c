"""Tamiyo's core: keeps the view of each run, asks a brain, signs its commands.

What it answered is in its journal before it answers, under (run, branch, epoch): the same question gets the same
commands, also from a Tamiyo that was killed and came back. A new policy takes its seat between two boundaries.
`history.py` has the views, `telling.py` what goes out, `risk.py` how much a brain may do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, RiskLevel
from esper_ray.contracts.messages import AdaptationCommand, FieldReport, PolicyUpdate
from esper_ray.contracts.ports import Publisher, RunOpening
from esper_ray.contracts.signing import KeyRing, Signer, Verifier
from esper_ray.errors import PolicyRefused, RunError
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.journal import Journal
from esper_ray.tamiyo import openings
from esper_ray.tamiyo.brains import Brain, ScriptedBrain, Step
from esper_ray.tamiyo.commands import command, orders
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.history import History
from esper_ray.tamiyo.seat import PolicySeat
from esper_ray.tamiyo.telling import Telling
from esper_ray.tamiyo.view import RunView

REPORT_RETENTION_NS = 24 * 3600 * 10**9
STATE_TYPE = "SystemStatePacket"
STATISTICS_TYPE = "GraphStatistics"
ORDER_TYPE = "AdaptationCommand"
_TAKEN = (BusMessageType.SYSTEM_STATE, BusMessageType.ADAPTATION_COMMAND)


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
        self._clock = clock
        self._signer = Signer(keys, "tamiyo", clock=clock)
        self._verifier = Verifier(keys, clock=clock)
        self._journal = Journal(journal, clock=clock)
        # The boundary does not wait for the disk: a decision survives a kill, and what a power cut takes is asked again
        # by a run that then stands at its last checkpoint, and decided with the same draws.
        self._decisions = Journal(journal, clock=clock, sync=False)
        self._telling = Telling(self._journal, publisher, home, clock)
        self._history = History(self._journal, self._telling)
        self.seat = PolicySeat(home)
        if self.seat.fault is not None:
            self._telling.refused_policy(self.seat.promoted, self.seat.fault)
        self._history.recover()
        self._telling.send_reports_again()

    def open_run(self, opening: RunOpening) -> None:
        """Begin, or begin again from ``opening.epoch``: later states are forgotten, later decisions are not.

        A new branch is a rollback: decisions after that epoch are undone, each with its report, and remembered as such.

        Raises:
            EsperError: the run wants a learned policy, and there is none that can decide.
        """
        if opening.controller == "learned":
            self.seat.brain(openings.settings_of(opening).policy)
        if opening.parent:
            self._history.inherit(opening)
        key = f"{opening.run}/{opening.branch}/{opening.epoch}/{self._clock.now_ns()}"
        seq = self._journal.append("openings", openings.to_bytes(opening), key=key)
        passing("tamiyo.opened")
        self._history.enter(opening, since=seq, resend=opening.run not in self._history.views)

    def decide(self, run: str, envelopes: Sequence[bytes]) -> list[bytes]:
        """Signed commands for the boundary that the signed packets describe.

        Raises:
            RunError: the run was never opened here.
            ContractError: a packet is damaged, foreign or too old.
        """
        began = self._clock.monotonic()
        view = self._history.views.get(run)
        if view is None:
            raise RunError(f"Tamiyo does not know the run {run!r}.", remedy="Open it before its first boundary.")
        opened = [self._verifier.open_direct(data, *_TAKEN) for data in envelopes]
        packets = [each.payload for each in opened if each.payload_type == STATE_TYPE]
        told = b"".join(each.payload for each in opened if each.payload_type == STATISTICS_TYPE)
        ordered = [each.payload for each in opened if each.payload_type == ORDER_TYPE]
        state = codec.decode_state(packets)
        if state.branch > view.opening.branch:
            # The run was rolled back while nobody could tell.
            self.open_run(replace(view.opening, epoch=state.epoch - 1, branch=state.branch))
            view = self._history.views[run]
        stored = self._decisions.get(f"states/{run}", f"{state.branch}/{state.epoch}")
        new = self._history.take_in(view, state, openings.statistics(told))
        by_hand = [codec.decode_command(data) for data in ordered]
        if stored is not None:
            commands = [bytes.fromhex(text) for text in json.loads(stored.payload)["commands"]]
            if new:
                self._history.follow(view, [codec.decode_command(data) for data in commands], by_hand)
        else:
            if new:
                self._history.follow(view, (), by_hand)
            commands = self._decide_anew(view, packets, told, ordered)
        sealed = [
            self._signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand")
            for data in commands
        ]
        view.watch.answered((self._clock.monotonic() - began) * 1e3)
        return sealed

    def _decide_anew(
        self, view: RunView, packets: Sequence[bytes], statistics: bytes, ordered: Sequence[bytes]
    ) -> list[bytes]:
        brain, steps = self._think(view)
        issued = [
            command(view, step.proposal, place=place, issued_by=brain.version, issued_at_ns=self._clock.now_ns())
            for place, step in enumerate(steps)
        ]
        # The closing "no change" is a command of its own only where nothing else was decided.
        sent: list[AdaptationCommand] = [each for each in issued if each.seed_directive is not None] or issued[:1]
        sent += orders(view, issued_at_ns=self._clock.now_ns())
        commands = [codec.encode_command(each) for each in sent]
        records = self._telling.records(view, brain.version, steps, issued)
        passing("tamiyo.thought")
        stored = {
            "packets": [data.hex() for data in packets],
            "statistics": statistics.hex(),
            "ordered": [data.hex() for data in ordered],
            "commands": [data.hex() for data in commands],
            "records": [data.hex() for data in records],
        }
        self._decisions.append(
            f"states/{view.opening.run}", json.dumps(stored).encode(), key=f"{view.now.branch}/{view.now.epoch}"
        )
        passing("tamiyo.decided")
        self._history.follow(view, sent)
        self._telling.decision(view, steps, records)
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
            self._telling.refused_policy(brain.version, fault)
            brain = self._brain(view)
            return brain, brain.steps(view)

    def _brain(self, view: RunView) -> Brain:
        """Who decides now: a boundary is where a new policy takes over. A risk of ORANGE leaves it to the heuristic."""
        name = view.opening.controller
        self.seat.take_over()
        if name in ("auto", "learned"):
            trusted = view.risk.level < RiskLevel.ORANGE
            if name == "learned" and trusted:
                return self.seat.brain(view.config.policy)
            if self.seat.current is not None and trusted:
                return self.seat.current
            name = "heuristic"
        return ScriptedBrain(name, CONTROLLERS[name])

    def offer(self, update: PolicyUpdate) -> None:
        """Check a promoted policy on states of the runs that are open; it decides from the next boundary on.

        Raises:
            PolicyRefused: it is damaged, foreign or illegal; the text says which, and the present one stays.
        """
        views = [view for view in list(self._history.views.values()) if view.states and view.opening.candidates]
        try:
            self.seat.offer(update, views)
        except PolicyRefused as fault:
            self.seat.refused = str(fault)
            self._telling.refused_policy(update.policy_id, fault)
            raise

    def close_run(self, run: str) -> None:
        """Report on what is still under observation, record the end; the run and old reports are forgotten."""
        self._history.close(run)
        self._telling.flush()
        ours = [entry.seq for entry in self._journal.read("openings") if json.loads(entry.payload)["run"] == run]
        self._journal.remove(ours)
        passing("tamiyo.closed")
        old = self._clock.now_ns() - REPORT_RETENTION_NS
        self._journal.remove_before("reports", old)
        open_runs = {json.loads(entry.payload)["run"] for entry in self._journal.read("openings")}
        for stream in self._journal.streams("states/"):
            if stream.removeprefix("states/") not in open_runs:
                self._journal.remove_before(stream, old)

    def reports(self, run: str) -> list[FieldReport]:
        """The field reports of a run that are still in the journal."""
        return [report for report in self._telling.reports() if report.run == run]

    def close(self) -> None:
        self._telling.flush()
        self._decisions.close()
        self._journal.close()
