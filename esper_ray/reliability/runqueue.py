"""The runs that are wanted: one active, the rest waiting; a state machine over journal entries.

A run is a sequence of *arms* trained one after the other: the grown model, and with a comparison the host alone
and the final-size model too. Each change is an entry in the journal before it takes effect, so that a supervisor that
is killed anywhere knows after its restart what was asked for, what runs and what came of it.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from esper_ray.errors import RunError
from esper_ray.reliability.journal import Journal

ArmState = Literal["waiting", "running", "finished", "stopped", "failed"]
RunState = Literal["queued", "running", "finished", "stopped", "failed"]
ARMS = ("grown", "host", "final")
_STREAM = "runs"
_LOSSES_WITHOUT_PROGRESS = 3


@dataclass(slots=True)
class Arm:
    """One training run; ``losses`` counts deaths of its process since the epoch last moved, ``fork`` is its origin."""

    run_id: str
    arm: str
    reference: str | None = None
    state: ArmState = "waiting"
    resume: bool = False
    attempts: int = 0
    losses: int = 0
    epoch: int = -1
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    fork: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")


@dataclass(slots=True)
class Run:
    """What one submission asked for."""

    run_id: str
    config: dict[str, Any]
    arms: list[Arm] = field(default_factory=list)
    stopping: bool = False

    @property
    def over(self) -> bool:
        """Nothing of it is left to do: an arm that did not finish ends the run, for the next ones refer to it."""
        if self.stopping and not self._running:
            return True
        return any(arm.state in ("stopped", "failed") for arm in self.arms) or all(arm.over for arm in self.arms)

    @property
    def _running(self) -> bool:
        return any(arm.state == "running" for arm in self.arms)

    @property
    def state(self) -> RunState:
        states = [arm.state for arm in self.arms]
        if "failed" in states:
            return "failed"
        if "stopped" in states or (self.stopping and not self._running):
            return "stopped"
        if all(state == "finished" for state in states):
            return "finished"
        return "running" if any(state != "waiting" for state in states) else "queued"


class RunQueue:
    """Wanted runs in order of submission, kept in ``journal``; safe for several threads."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._lock = journal, threading.RLock()
        self._runs: dict[str, Run] = {}
        self._requests: dict[str, str] = {}
        for entry in journal.read(_STREAM):
            self._apply(json.loads(entry.payload))

    def submit(
        self,
        request_id: str,
        run_id: str,
        config: dict[str, Any],
        *,
        arms: tuple[str, ...],
        fork: dict[str, Any] | None = None,
    ) -> str:
        """Ask for a run. The same request twice gives the first one's run id.

        Raises:
            RunError: an unknown arm.
        """
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown or not arms:
            raise RunError(
                f"There is no arm {unknown[0] if unknown else ''!r}.", remedy=f"It is one of {', '.join(ARMS)}."
            )
        with self._lock:
            if request_id in self._requests:
                return self._requests[request_id]
            planned = []
            for arm in arms:
                own = run_id if arm == arms[0] else f"{run_id}-{arm}"
                reference = run_id if arm == "final" else None
                planned.append({"run_id": own, "arm": arm, "reference": reference, "fork": fork})
            self._record({"kind": "submit", "request": request_id, "run": run_id, "config": config, "arms": planned})
            return run_id

    def known(self, request_id: str) -> str | None:
        """The run that was asked for by this request, if it was."""
        with self._lock:
            return self._requests.get(request_id)

    def adopt(self, request_id: str, run_id: str, config: dict[str, Any], *, arm: str) -> str:
        """Resume a run that this journal does not know, from its folder."""
        with self._lock:
            if request_id in self._requests:
                return self._requests[request_id]
            planned = [{"run_id": run_id, "arm": arm, "reference": None, "resume": True}]
            self._record({"kind": "submit", "request": request_id, "run": run_id, "config": config, "arms": planned})
            return run_id

    def resume(self, request_id: str, run_id: str) -> str:
        """Take up a stopped or failed run where it ended; finished arms stay as they are.

        Raises:
            RunError: it is unknown, active or finished.
        """
        with self._lock:
            if request_id in self._requests:
                return self._requests[request_id]
            run = self.find(run_id)
            if run.state == "finished":
                raise RunError(f"{run_id} is finished.", remedy=f"See it with `esper report {run_id}`.")
            if not run.over:
                raise RunError(f"{run_id} is {run.state} already.", remedy="Watch it with `esper status`.")
            self._record({"kind": "resume", "request": request_id, "run": run.run_id})
            return run.run_id

    def knows(self, run_id: str) -> bool:
        with self._lock:
            return any(run_id in (run.run_id, *(arm.run_id for arm in run.arms)) for run in self._runs.values())

    def find(self, run_id: str) -> Run:
        """The run that has this id, or an arm of this id.

        Raises:
            RunError: there is none.
        """
        with self._lock:
            for run in self._runs.values():
                if run_id == run.run_id or any(arm.run_id == run_id for arm in run.arms):
                    return run
        raise RunError(f"There is no run {run_id}.", remedy="`esper runs` lists them.")

    def runs(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())

    def active(self) -> Run | None:
        """The first run that is not over."""
        with self._lock:
            return next((run for run in self._runs.values() if not run.over), None)

    def current(self) -> Arm | None:
        """The arm to train now: the running one, else the next of the active run."""
        with self._lock:
            run = self.active()
            return next((arm for arm in run.arms if not arm.over), None) if run else None

    def position(self, run_id: str) -> int:
        """0 for the active run, 1 for the next, -1 for one that is over."""
        with self._lock:
            waiting = [run.run_id for run in self._runs.values() if not run.over]
            wanted = self.find(run_id).run_id
            return waiting.index(wanted) if wanted in waiting else -1

    def started(self, arm_id: str) -> None:
        self._record({"kind": "start", "arm": arm_id})

    def ended(
        self,
        arm_id: str,
        state: Literal["finished", "stopped", "failed"],
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, str] | None = None,
    ) -> None:
        """An arm is over; its result is durable when this returns."""
        self._record({"kind": "end", "arm": arm_id, "state": state, "result": result, "error": error})

    def lost(self, arm_id: str, *, epoch: int, why: str) -> ArmState:
        """Its process died under it at ``epoch``: it waits to be resumed, or failed when it dies without progress."""
        self._record({"kind": "lost", "arm": arm_id, "epoch": epoch, "why": why})
        return self._arm(arm_id).state

    def stop(self, run_id: str) -> Run:
        """Ask for an end. A run that waits is over at once; a running one when its arm has said so."""
        run = self.find(run_id)
        if not run.over and not run.stopping:
            self._record({"kind": "stop", "run": run.run_id})
        return run

    def interrupt(self) -> list[str]:
        """The system starts afresh: whatever was wanted before counts as stopped. Returns those runs."""
        with self._lock:
            open_runs = [run for run in self._runs.values() if not run.over]
            for run in open_runs:
                self._record({"kind": "stop", "run": run.run_id})
                for arm in run.arms:
                    if arm.state == "running":
                        self.ended(arm.run_id, "stopped")
        return [run.run_id for run in open_runs]

    def _record(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._journal.append(_STREAM, json.dumps(event).encode())
            self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        _APPLY[event["kind"]](self, event)

    def _on_submit(self, event: dict[str, Any]) -> None:
        self._requests[event["request"]] = event["run"]
        self._runs[event["run"]] = Run(event["run"], event["config"], [Arm(**arm) for arm in event["arms"]])

    def _on_resume(self, event: dict[str, Any]) -> None:
        self._requests[event["request"]] = event["run"]
        run = self._runs.pop(event["run"])
        self._runs[run.run_id] = run
        run.stopping = False
        for arm in run.arms:
            if arm.state != "finished":
                arm.resume = arm.resume or arm.attempts > 0
                arm.state, arm.error, arm.result, arm.losses = "waiting", None, None, 0

    def _on_start(self, event: dict[str, Any]) -> None:
        arm = self._arm(event["arm"])
        arm.state, arm.attempts = "running", arm.attempts + 1

    def _on_end(self, event: dict[str, Any]) -> None:
        arm = self._arm(event["arm"])
        arm.state, arm.result, arm.error = event["state"], event["result"], event["error"]

    def _on_lost(self, event: dict[str, Any]) -> None:
        arm = self._arm(event["arm"])
        arm.losses = 1 if event["epoch"] > arm.epoch else arm.losses + 1
        arm.epoch = max(arm.epoch, event["epoch"])
        if arm.losses >= _LOSSES_WITHOUT_PROGRESS:
            arm.state = "failed"
            arm.error = {
                "what": f"The process that trains {arm.run_id} died {arm.losses} times at epoch {arm.epoch}.",
                "why": event["why"],
                "remedy": f"Look into the Ray logs, then `esper run --resume {arm.run_id}`.",
            }
        else:
            arm.state, arm.resume = "waiting", True

    def _on_stop(self, event: dict[str, Any]) -> None:
        self._runs[event["run"]].stopping = True

    def _arm(self, arm_id: str) -> Arm:
        return next(arm for run in self._runs.values() for arm in run.arms if arm.run_id == arm_id)


_APPLY = {
    "submit": RunQueue._on_submit,
    "resume": RunQueue._on_resume,
    "start": RunQueue._on_start,
    "end": RunQueue._on_end,
    "lost": RunQueue._on_lost,
    "stop": RunQueue._on_stop,
}
