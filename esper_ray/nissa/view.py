"""What the page shows, kept in memory: the runs with their curves, seeds, decisions, gates and timing; the school.

Folded from records in the order in which they arrive; nothing here is stored.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esper_ray.contracts.budgets import BOUNDARY_MS, BOUNDARY_PARTS
from esper_ray.contracts.enums import EmergencyLevel, TelemetryLevel
from esper_ray.contracts.messages import EmergencySignal, FieldReport, MetricPoint, TelemetryEvent, TelemetryPacket
from esper_ray.nissa.school import SOURCE, School

_RUNS_KEPT = 24
_LISTED = 400
_CURVES = {
    "tl": "training_loss",
    "vl": "validation_loss",
    "va": "validation_accuracy",
    "lr": "learning_rate",
    "pc": "parameters",
    "st": "step_ms",
    "fl": "flops",
    "bd": BOUNDARY_MS.key,
    **{part.key[:2]: part.key for part in BOUNDARY_PARTS},
}
# What comes after a cull is the slot's rest, and no longer the life of the seed that was in it.
_SLOT_RESTS = frozenset({"EMBARGOED", "RESETTING", "DORMANT"})
_TOTALS = {"md": "missed_deadlines", "iv": "isolation_violations", "sc": "seeds_culled"}
_LATEST = {
    "sl": "seeds_live",
    "sf": "seeds_fossilized",
    "ic": "isolation_checks",
    "em": "emergency_level",
    "rk": "risk_level",
}


@dataclass(slots=True)
class RunView:
    """One run. ``epochs`` maps an epoch to what was measured in it; times are in nanoseconds."""

    run: str
    started_ns: int
    updated_ns: int
    status: str = "running"
    facts: dict[str, str] = field(default_factory=dict)
    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    seeds: dict[int, dict[str, Any]] = field(default_factory=dict)
    decisions: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LISTED))
    gates: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LISTED))
    refusals: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LISTED))
    grafts: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LISTED))
    incidents: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LISTED))
    rollbacks: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LISTED))

    @property
    def epoch(self) -> int:
        return max(self.epochs, default=0)

    def forget_after(self, epoch: int) -> None:
        """A resumed run does its later epochs again."""
        self.epochs = {known: values for known, values in self.epochs.items() if known <= epoch}
        for listed in (self.decisions, self.gates, self.refusals, self.grafts):
            kept = [item for item in listed if item["epoch"] <= epoch]
            listed.clear()
            listed.extend(kept)
        for number, seed in list(self.seeds.items()):
            seed["stages"] = [step for step in seed["stages"] if step["epoch"] <= epoch]
            if seed["stages"]:
                own = [step["stage"] for step in seed["stages"] if step["stage"] not in _SLOT_RESTS]
                seed["stage"] = own[-1] if own else seed["stages"][-1]["stage"]
            else:
                del self.seeds[number]

    def summary(self) -> dict[str, Any]:
        """The run in one row."""
        last = self.epochs.get(self.epoch, {})
        return {
            "run": self.run,
            "status": self.status,
            "started_ns": self.started_ns,
            "updated_ns": self.updated_ns,
            "epoch": self.epoch,
            "facts": self.facts,
            "totals": self.totals,
            "latest": last,
            "accuracy": [
                (epoch, values["validation_accuracy"])
                for epoch, values in sorted(self.epochs.items())
                if "validation_accuracy" in values
            ],
        }

    def details(self) -> dict[str, Any]:
        """All there is to draw."""
        return {
            **self.summary(),
            "epochs": [{"epoch": epoch, **values} for epoch, values in sorted(self.epochs.items())],
            "seeds": [{**self.seeds[number], "refused": self._refused_gates(number)} for number in sorted(self.seeds)],
            "decisions": self._decisions_with_refusals()[::-1],
            "gates": list(self.gates)[::-1],
            "grafts": list(self.grafts),
            "incidents": list(self.incidents)[::-1],
            "rollbacks": list(self.rollbacks),
        }

    def _refused_gates(self, seed: int) -> list[dict[str, Any]]:
        return [gate for gate in self.gates if gate["seed"] == seed and not gate["passed"]]

    def _decisions_with_refusals(self) -> list[dict[str, Any]]:
        """Each decision, with ``refused``: why its command was not carried out; empty where it was."""
        why = {_matter(refusal): refusal.get("reason", "") for refusal in self.refusals}
        return [{**decision, "refused": why.get(_matter(decision), "")} for decision in self.decisions]


class View:
    """All runs that are remembered; not safe for threads, its owner locks."""

    def __init__(self) -> None:
        self.school = School()
        self.runs: OrderedDict[str, RunView] = OrderedDict()
        self.backends: dict[str, str] = {}
        self.streams: dict[str, dict[str, float]] = {}
        self._handlers = {
            "run.started": self._run_started,
            "run.finished": self._run_finished,
            "seed.stage": self._seed_stage,
            "gate": self._gate,
            "decision": self._decision,
            "graft": self._graft,
            "refusal": self._refusal,
            "isolation.violation": self._incident,
            "rollback": self._rollback,
        }

    def apply_telemetry(self, packet: TelemetryPacket) -> None:
        """Fold a packet in."""
        self.school.apply_telemetry(packet)
        of_a_model = packet.run and packet.source != SOURCE
        run = self._run(packet.run, packet.timestamp_ns) if of_a_model else None
        for point in packet.metrics:
            self._point(run, packet.epoch, point)
        for event in packet.events:
            if event.kind == "backend":
                self.backends[event.attributes.get("name", "")] = event.attributes.get("value", "")
            elif run is not None and (handler := self._handlers.get(event.kind)):
                handler(run, packet, event)
            elif run is not None and event.level >= TelemetryLevel.WARNING:
                self._incident(run, packet, event)

    def apply_report(self, report: FieldReport) -> None:
        """What a decision led to belongs to its seed."""
        seed = self._run(report.run, report.issued_at_ns).seeds.get(report.seed)
        if seed is not None:
            seed["outcome"] = report.outcome.name
            seed["effect"] = dict(report.metrics)

    def apply_emergency(self, signal: EmergencySignal) -> None:
        """Shown among the incidents of its run, which a halt ends."""
        if signal.run:
            run = self._run(signal.run, signal.triggered_at_ns)
            if signal.level is EmergencyLevel.HALT:
                run.status = "halted"
            run.incidents.append(
                {
                    "kind": "emergency",
                    "at_ns": signal.triggered_at_ns,
                    "epoch": run.epoch,
                    "message": f"{signal.level.name} from {signal.origin}: {signal.reason}",
                }
            )

    def newest(self) -> RunView | None:
        """The run that was heard of last."""
        return max(self.runs.values(), key=lambda run: run.updated_ns, default=None)

    def _run(self, name: str, at_ns: int) -> RunView:
        run = self.runs.get(name)
        if run is None:
            run = self.runs[name] = RunView(name, at_ns, at_ns)
            if len(self.runs) > _RUNS_KEPT:
                self.runs.popitem(last=False)
        run.updated_ns = max(run.updated_ns, at_ns)
        return run

    def _point(self, run: RunView | None, epoch: int, point: MetricPoint) -> None:
        if point.key in ("od", "oq"):
            name = "depth" if point.key == "od" else "dead_letters"
            self.streams.setdefault(point.labels.get("stream", ""), {})[name] = point.value
        if run is None:
            return
        if curve := _CURVES.get(point.key):
            run.epochs.setdefault(epoch, {})[curve] = point.value
        elif total := _TOTALS.get(point.key):
            run.totals[total] = run.totals.get(total, 0.0) + point.value
        elif latest := _LATEST.get(point.key):
            run.totals[latest] = point.value

    @staticmethod
    def _run_started(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        run.forget_after(packet.epoch)
        run.status = "running"
        run.facts.update(event.attributes)

    @staticmethod
    def _run_finished(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        del packet
        run.status = event.attributes.get("status", "finished")
        run.facts.update({key: value for key, value in event.attributes.items() if key != "status"})

    @staticmethod
    def _seed_stage(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        given = event.attributes
        number = _whole(given.get("seed"))
        if not number:
            return
        seed = run.seeds.setdefault(number, {"seed": number, "slot": "", "blueprint": "", "stages": []})
        seed.update({key: given[key] for key in ("slot", "blueprint") if given.get(key)})
        if given.get("to") not in _SLOT_RESTS:
            seed["stage"] = given.get("to", "")
        step = {
            "stage": given.get("to", ""),
            "epoch": packet.epoch,
            "at_ns": packet.timestamp_ns,
            "reason": given.get("reason", ""),
        }
        seed["stages"].append(step)

    @staticmethod
    def _gate(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        named = ("seed", "gate", "passed", "from", "to", "reason")
        given = event.attributes
        run.gates.append(
            {
                **{key: given.get(key, "") for key in named},
                "seed": _whole(given.get("seed")),
                "passed": given.get("passed") == "true",
                "epoch": packet.epoch,
                "evidence": {key: value for key, value in given.items() if key not in named},
            }
        )

    @staticmethod
    def _decision(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        run.decisions.append(_with_time(packet, event.attributes))

    @staticmethod
    def _graft(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        run.grafts.append(_with_time(packet, event.attributes))

    @staticmethod
    def _refusal(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        run.refusals.append(_with_time(packet, event.attributes))

    @staticmethod
    def _rollback(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        """What came after is undone; the rollback itself stays to be seen."""
        to = _whole(event.attributes.get("to"), packet.epoch)
        run.forget_after(to)
        done = {**event.attributes, "to": to, "from_epoch": _whole(event.attributes.get("from_epoch"), to)}
        run.rollbacks.append({**done, "at_ns": packet.timestamp_ns})
        View._incident(run, packet, event)

    @staticmethod
    def _incident(run: RunView, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        details = ", ".join(f"{key} {value}" for key, value in sorted(event.attributes.items()))
        message = ": ".join(part for part in (event.message, details) if part)
        run.incidents.append(
            {"kind": event.kind, "at_ns": packet.timestamp_ns, "epoch": packet.epoch, "message": message}
        )


def _matter(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a decision and its refusal have in common."""
    return row["epoch"], row.get("slot", ""), row.get("operation", "")


def _with_time(packet: TelemetryPacket, attributes: Mapping[str, str]) -> dict[str, Any]:
    return {**attributes, "epoch": _whole(attributes.get("epoch"), packet.epoch), "at_ns": packet.timestamp_ns}


def _whole(text: str | None, default: int = 0) -> int:
    try:
        return int(text) if text is not None else default
    except ValueError:
        return default
