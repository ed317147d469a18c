"""What Tamiyo knows of the runs that are open, made from her journal and kept up with each state.

Under ``states/RUN`` the journal has each state with its decision, by branch and epoch. A rollback opens a new branch:
the way to it is what is left of the run, and the germinations beside it are undone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_ray.contracts import codec
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import AdaptationCommand, SystemState
from esper_ray.contracts.ports import RunOpening
from esper_ray.reliability.journal import Journal
from esper_ray.tamiyo import openings
from esper_ray.tamiyo.reports import Observation
from esper_ray.tamiyo.telling import Telling
from esper_ray.tamiyo.view import RunView, in_history


class History:
    """The views of the runs that are open, and what is under observation in each."""

    def __init__(self, journal: Journal, telling: Telling) -> None:
        self._journal, self._telling = journal, telling
        self.views: dict[str, RunView] = {}
        self._observed: dict[str, dict[int, Observation]] = {}

    def recover(self) -> None:
        """Every run that was open when the last life ended."""
        last = {str(json.loads(entry.payload)["run"]): entry for entry in self._journal.read("openings")}
        for entry in last.values():
            self.enter(openings.from_bytes(entry.payload), since=entry.seq, resend=True)

    def enter(self, opening: RunOpening, *, since: int, resend: bool) -> None:
        """Build the view: what was decided up to the opening's epoch, and whatever was asked since the opening.

        Args:
            since: the opening's place in the journal.
            resend: send its decision records again: whether the last one got out before a kill is not known, and Simic
                takes each once.
        """
        view = RunView(opening, openings.settings_of(opening))
        self.views[opening.run], self._observed[opening.run] = view, {}
        asked = self._asked(opening.run)
        turns = self._turns(opening.run, [state for _, _, state in asked])
        view.turned = turns.get(opening.branch)
        for seq, stored, state in asked:
            commands, ordered = _commands(stored, "commands"), _commands(stored, "ordered")
            if not in_history(state, opening.branch, turns):
                self._undo(view, state, [*commands, *ordered])
            elif state.epoch <= opening.epoch or seq > since:
                self.take_in(view, state, openings.statistics(bytes.fromhex(stored.get("statistics", ""))))
                self.follow(view, commands, ordered)
                if resend:
                    self._telling.send_records(bytes.fromhex(data) for data in stored.get("records", ()))

    def _asked(self, run: str) -> list[tuple[int, Mapping[str, Any], SystemState]]:
        """Each state that was ever asked about, with its place in the journal and what is stored with it."""
        found = []
        for entry in self._journal.read(f"states/{run}"):
            stored = json.loads(entry.payload)
            state = codec.decode_state([bytes.fromhex(packet) for packet in stored["packets"]])
            found.append((entry.seq, stored, state))
        return found

    def _turns(self, run: str, states: Sequence[SystemState]) -> dict[int, int]:
        """By branch the epoch after which it was opened: the least of its openings, or what its first state says."""
        found: dict[int, int] = {}
        known = [json.loads(entry.payload) for entry in self._journal.read("openings")]
        places = [(int(each["branch"]), int(each["epoch"])) for each in known if each["run"] == run]
        for branch, epoch in [*places, *((state.branch, state.epoch - 1) for state in states)]:
            if branch:
                found[branch] = min(found.get(branch, epoch), epoch)
        return found

    def inherit(self, opening: RunOpening) -> None:
        """Give a fork the states and decisions of its parent that lie on the way to where it begins.

        Those of the last boundary are replaced by what a person decided there, but for what cannot be taken back. What
        is no longer in the journal is not inherited: then the fork knows of no trend for some epochs.
        """
        if self._journal.count(f"states/{opening.run}"):
            return
        asked = self._asked(opening.parent)
        turns = self._turns(opening.parent, [state for *_, state in asked])
        for _, stored, state in asked:
            if state.epoch > opening.epoch or not in_history(state, opening.branch, turns):
                continue
            commands, ordered = _commands(stored, "commands"), list(stored.get("ordered", ()))
            if state.epoch == opening.epoch and opening.ordered:
                commands = [each for each in commands if not _germinates(each)]
                ordered = [*(data for data in ordered if not _germinates(_command(data))), *opening.ordered]
            own = {
                "packets": [data.hex() for data in codec.encode_state(replace(state, run=opening.run))],
                "statistics": stored.get("statistics", ""),
                "ordered": ordered,
                "commands": [codec.encode_command(each).hex() for each in commands],
                "records": [],
            }
            key = f"{state.branch}/{state.epoch}"
            self._journal.append(f"states/{opening.run}", json.dumps(own).encode(), key=key)

    def _undo(self, view: RunView, state: SystemState, commands: Sequence[AdaptationCommand]) -> None:
        """Remember what a rollback took back, and report on it."""
        for each in commands:
            directive = each.seed_directive
            if directive is None or not _germinates(each):
                continue
            view.undone.add((each.slot, directive.blueprint))
            observation = Observation(each.command_id, each.slot, directive.blueprint, state.epoch, each.issued_by)
            self._telling.report(view.opening.run, observation, *observation.undo())

    def take_in(self, view: RunView, state: SystemState, statistics: npt.NDArray[np.float32] | None) -> bool:
        """Add a state to the view, and close the observation windows that end with it; False if it is there already."""
        if view.states and view.now.epoch >= state.epoch:
            return False
        view.states.append(state)
        view.statistics = statistics
        if view.config.risk:
            view.risk = view.watch.look(view.states, statistics, view.opening, turned=view.turned)
        observed = self._observed[state.run]
        for command_id, observation in list(observed.items()):
            closed = observation.watch(state, view.config.report_window)
            if observation.void:
                del observed[command_id]
            elif closed is not None:
                self._telling.report(state.run, observed.pop(command_id), *closed)
        return True

    def follow(
        self, view: RunView, commands: Iterable[AdaptationCommand], ordered: Sequence[AdaptationCommand] = ()
    ) -> None:
        """Open an observation window for each germination.

        Args:
            ordered: what persons decided, and was carried out, at this boundary.
        """
        view.by_hand = view.by_hand or bool(ordered)
        for each in [*commands, *ordered]:
            directive = each.seed_directive
            if directive is not None and _germinates(each):
                self._observed[view.opening.run][each.command_id] = Observation(
                    each.command_id, each.slot, directive.blueprint, view.now.epoch, each.issued_by
                )

    def close(self, run: str) -> None:
        """Report on what is still under observation."""
        view = self.views.get(run)
        if view is not None:
            self._telling.end(view)
        for observation in self._observed.get(run, {}).values():
            self._telling.report(run, observation, *observation.close())
        self._observed[run] = {}


def _commands(stored: Mapping[str, Any], which: str) -> list[AdaptationCommand]:
    return [_command(data) for data in stored.get(which, ())]


def _command(data: str) -> AdaptationCommand:
    return codec.decode_command(bytes.fromhex(data))


def _germinates(command: AdaptationCommand) -> bool:
    directive = command.seed_directive
    return directive is not None and directive.operation is SeedOperation.GERMINATE
