"""Drives Tolaria through the arms of the wanted runs; the part of the supervisor that makes the long call.

One call of ``train`` is out at a time. Its end, its error or the death of the process that ran it goes into the
queue's journal; nothing else decides what is trained next.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from esper_ray.actors import crew
from esper_ray.config import Config
from esper_ray.errors import EsperError
from esper_ray.reliability.runqueue import Arm, Run, RunQueue

_ASK_SECONDS = 1.0
_AT_WORK = ("preparing", "training", "paused")
_log = logging.getLogger(__name__)


class Driver:
    """Not safe for several threads: the control loop alone calls `step`."""

    def __init__(self, queue: RunQueue, config: Config) -> None:
        self._queue, self._config = queue, config
        self._arm: Arm | None = None
        self._call: Any = None
        self._progress: dict[str, Any] = {}
        self._forge: dict[str, Any] = {}

    @property
    def busy(self) -> bool:
        return self._arm is not None

    def step(self, tolaria: Any, tezzeret: Any) -> None:
        """Look at the call that is out, or make the next one. ``tolaria`` is None while it is away."""
        if self._arm is None:
            arm = self._queue.current()
            if arm is not None and tolaria is not None:
                self._begin(arm, tolaria)
            return
        if tezzeret is not None:
            self._forge = _ask(tezzeret.progress.remote()) or self._forge
        if tolaria is not None:
            self._observe(self._arm, tolaria)
        if self._call is None:
            self._settle_adopted(self._arm)
        elif ray.wait([self._call], timeout=0)[0]:
            self._settle(self._arm, self._call)

    def _begin(self, arm: Arm, tolaria: Any) -> None:
        run = self._queue.find(arm.run_id)
        self._arm, self._call, self._progress = arm, None, {}
        if arm.state == "running":
            # Started by an earlier life of the supervisor, whose call is lost: watch its progress instead.
            self._observe(arm, tolaria)
            return
        if _ask(tolaria.progress.remote()) is None:
            # Ray fails every call to a process that it is restarting: that is no attempt, and no loss.
            self._arm = None
            return
        self._queue.started(arm.run_id)
        self._call = tolaria.train.remote(
            {
                "run_id": arm.run_id,
                "config": run.config,
                "arm": arm.arm,
                "resume": arm.resume,
                "reference": arm.reference,
                "fork": arm.fork,
            }
        )

    def _observe(self, arm: Arm, tolaria: Any) -> None:
        progress = _ask(tolaria.progress.remote())
        if progress is not None and progress.get("run_id") == arm.run_id:
            self._progress = progress
        elif progress is not None and self._call is None:
            self._progress = {"state": "away"}
        if self._queue.find(arm.run_id).stopping:
            tolaria.stop.remote(arm.run_id)

    def _settle(self, arm: Arm, call: Any) -> None:
        try:
            result = ray.get(call)
        except RayActorError as error:
            self._lost(arm, str(error).strip().splitlines()[0])
        except (RayError, EsperError) as error:
            self._queue.ended(arm.run_id, "failed", error=as_record(error))
        else:
            self._queue.ended(arm.run_id, _outcome(result), result=result)
        self._arm = self._call = None

    def _settle_adopted(self, arm: Arm) -> None:
        if not self._progress or self._progress.get("state") in _AT_WORK:
            return
        result = read_result(self._config, arm.run_id)
        if result is None:
            self._lost(arm, "The supervisor and the training process were both restarted.")
        else:
            self._queue.ended(arm.run_id, _outcome(result), result=result)
        self._arm = None

    def _lost(self, arm: Arm, why: str) -> None:
        if self._queue.find(arm.run_id).stopping:
            self._queue.ended(arm.run_id, "stopped")
            return
        _log.warning("%s was lost at epoch %s: %s", arm.run_id, self._progress.get("epoch", 0), why)
        self._queue.lost(arm.run_id, epoch=int(self._progress.get("epoch", 0)), why=why)

    def describe(self, run: Run) -> dict[str, Any]:
        """A run as the outside sees it."""
        position = self._queue.position(run.run_id)
        arms = [
            {
                "run_id": arm.run_id,
                "arm": arm.arm,
                "state": arm.state,
                "attempts": arm.attempts,
                "result": arm.result,
                "error": arm.error,
                "progress": dict(self._progress) if arm is self._arm else None,
            }
            for arm in run.arms
        ]
        return {
            "run_id": run.run_id,
            "state": run.state,
            "over": run.over,
            "position": position,
            "stopping": run.stopping,
            "message": _message(run, position),
            "arms": arms,
            "forge": dict(self._forge) if position == 0 else None,
        }


def read_result(config: Config, run_id: str) -> dict[str, Any] | None:
    """What Tolaria wrote at the end of a run, or None."""
    try:
        result: dict[str, Any] = json.loads((config.runs / run_id / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result


def as_record(error: BaseException) -> dict[str, str]:
    """An error as the journal keeps it: the user's own in its three parts, one of ours by its last line."""
    known = crew.explain(error)
    if known is not None:
        return {"kind": type(known).__name__, "what": known.what, "why": known.why, "remedy": known.remedy}
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return {
        "kind": type(error).__name__,
        "what": "The training process met a fault of its own.",
        "why": lines[-1],
        "remedy": "The Ray dashboard has the log of the actor tolaria.",
    }


def _outcome(result: dict[str, Any]) -> Any:
    return "stopped" if result.get("status") == "stopped" else "finished"


def _message(run: Run, position: int) -> str:
    if position > 0:
        return f"waits in the queue at position {position}"
    if run.stopping and not run.over:
        return "stopping at the next safe point"
    lost = [arm for arm in run.arms if arm.losses and arm.state in ("waiting", "running")]
    return f"resumed {lost[0].attempts - 1} times after its process died" if lost else ""


def _ask(reference: Any) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = ray.get(reference, timeout=_ASK_SECONDS)
    except RayError:
        return None
    return answer
