"""What the page shows of the school, kept in memory: trainings of policies, and what became of the policies.

Folded from records in the order in which they arrive; nothing here is stored. So it reaches back as far as the event
store does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esper_ray.contracts.messages import PolicyUpdate, TelemetryEvent, TelemetryPacket

SOURCE = "simic"
"""Who tells of trainings; what it calls a run is a training, not a run of a model."""

_TRAININGS_KEPT = 8
_UPDATES_KEPT = 300
_LISTED = 50
_STEPS, _RETURN, _EVALUATION = "steps", "return", "evaluation"
_MEASURES = {
    "ss": _STEPS,
    "sr": _RETURN,
    "sv": _EVALUATION,
    "sq": "steps_per_second",
    "se": "entropy",
    "sg": "lag",
    "sd": "dropped",
}
_FLOAT32 = 1.0 + 1e-6


@dataclass(slots=True)
class Training:
    """One training of a policy. ``updates`` maps the number of an update to what was measured at it."""

    run: str
    started_ns: int
    updated_ns: int
    algo: str = ""
    env: str = ""
    state: str = "running"
    reason: str = ""
    steps: int = 0
    planned: int = 0
    updates: dict[int, dict[str, float]] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)

    def measure(self, update: int, name: str, value: float) -> None:
        """Take note of one figure."""
        self.latest[name] = value
        self.updates.setdefault(update, {})[name] = value
        if name == _STEPS:
            self.steps = round(value)
        if len(self.updates) > _UPDATES_KEPT:
            self._thin()

    def tell(self, event: TelemetryEvent) -> None:
        """Where it stands, in its own words. One that goes on from fewer steps does the later ones again."""
        given = event.attributes
        self.algo, self.env = given.get("algo", self.algo), given.get("env", self.env)
        self.state, self.reason = given.get("state", self.state), event.message
        self.planned = _whole(given.get("of"), self.planned)
        self.steps = _whole(given.get("steps"), self.steps)
        if self.state == "running":
            limit = self.steps * _FLOAT32
            self.updates = {key: at for key, at in self.updates.items() if at.get(_STEPS, 0.0) <= limit}

    def details(self) -> dict[str, Any]:
        """All there is to draw. Curves are pairs of steps and return."""
        return {
            "run": self.run,
            "algo": self.algo,
            "env": self.env,
            "state": self.state,
            "reason": self.reason,
            "steps": self.steps,
            "of": self.planned,
            "update": max(self.updates, default=0),
            "started_ns": self.started_ns,
            "updated_ns": self.updated_ns,
            "returns": self._curve(_RETURN),
            "evaluations": self._curve(_EVALUATION),
            "latest": {name: _short(value) for name, value in self.latest.items() if name != _STEPS},
        }

    def _curve(self, name: str) -> list[tuple[int, float]]:
        points = (self.updates[update] for update in sorted(self.updates))
        return [(round(at[_STEPS]), _short(at[name])) for at in points if name in at and _STEPS in at]

    def _thin(self) -> None:
        """Half of the updates is enough to draw; evaluations are few, and go last."""
        before = sorted(self.updates)[:-1]
        plain = [update for update in before if _EVALUATION not in self.updates[update]]
        for update in (plain if len(plain) > len(before) // 2 else before)[::2]:
            del self.updates[update]


class School:
    """All trainings and policies that are remembered; not safe for threads, its owner locks."""

    def __init__(self) -> None:
        self.trainings: dict[str, Training] = {}
        self._promotions: deque[dict[str, Any]] = deque(maxlen=_LISTED)
        self._validations: deque[dict[str, Any]] = deque(maxlen=_LISTED)
        self._refusals: deque[dict[str, Any]] = deque(maxlen=_LISTED)
        self._records: dict[str, int] = {}

    def apply_telemetry(self, packet: TelemetryPacket) -> None:
        """Fold in what concerns the school."""
        for point in packet.metrics:
            if point.key == "sx":
                kind = point.labels.get("type", "")
                self._records[kind] = self._records.get(kind, 0) + round(point.value)
            elif packet.run and (name := _MEASURES.get(point.key)):
                self._training(packet.run, packet.timestamp_ns).measure(packet.epoch, name, point.value)
        for event in packet.events:
            if event.kind == "school":
                name = packet.run or event.attributes.get("run", "")
                self._training(name, packet.timestamp_ns).tell(event)
            elif event.kind == "policy.validated":
                self._validations.append(_validation(event.attributes, packet.timestamp_ns))
            elif event.kind == "policy.refused":
                self._refusals.append(_refusal(event, packet.timestamp_ns))

    def apply_promotion(self, update: PolicyUpdate) -> None:
        """A policy is to decide from now on, or the heuristic again."""
        self._promotions.append(
            {
                "policy": update.policy_id,
                "parent": update.parent_policy_id,
                "digest": update.artifact_digest,
                "at_ns": update.issued_at_ns,
                "figures": {name: _short(value) for name, value in update.validation.items()},
            }
        )

    def details(self) -> dict[str, Any]:
        """All there is to draw, each list with the newest first.

        ``promoted`` is the last promotion that Tamiyo did not refuse, or None where none is remembered.
        """
        promotions = [{**each, "refused": self._why_refused(each)} for each in reversed(self._promotions)]
        return {
            "trainings": [
                training.details() for training in sorted(self.trainings.values(), key=lambda one: -one.started_ns)
            ],
            "promoted": next((each for each in promotions if not each["refused"]), None),
            "promotions": promotions,
            "validations": list(self._validations)[::-1],
            "refusals": list(self._refusals)[::-1],
            "records": dict(self._records),
        }

    def _why_refused(self, promotion: Mapping[str, Any]) -> str:
        """By the times in the messages: the two come on different streams, in either order."""
        for refusal in self._refusals:
            if refusal["policy"] == promotion["policy"] and refusal["at_ns"] >= promotion["at_ns"]:
                return str(refusal["reason"])
        return ""

    def _training(self, name: str, at_ns: int) -> Training:
        training = self.trainings.get(name)
        if training is None:
            training = self.trainings[name] = Training(name, at_ns, at_ns)
            if len(self.trainings) > _TRAININGS_KEPT:
                del self.trainings[min(self.trainings, key=lambda known: self.trainings[known].updated_ns)]
        training.updated_ns = max(training.updated_ns, at_ns)
        return training


def _validation(given: Mapping[str, str], at_ns: int) -> dict[str, Any]:
    """A validation that ended before the comparison has no figures."""
    figures = {name: _number(given.get(name)) for name in ("difference", "low", "high")}
    return {"policy": given.get("policy", ""), "passed": given.get("verdict") == "passed", **figures, "at_ns": at_ns}


def _refusal(event: TelemetryEvent, at_ns: int) -> dict[str, Any]:
    given = event.attributes
    reason = given.get("reason") or event.message or "refused"
    return {"policy": given.get("policy", ""), "reason": reason, "message": event.message, "at_ns": at_ns}


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(text: str | None, default: int) -> int:
    value = _number(text)
    return default if value is None else round(value)


def _short(value: float) -> float:
    """Six digits, which is what the wire's float32 holds."""
    return float(f"{value:.6g}")
