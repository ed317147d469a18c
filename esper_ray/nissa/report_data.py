"""Reads run folders for the report: what each arm measured, and the seeds' lives put together from the events."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper_ray.errors import RunError

ARM_NAMES = {"grown": "grown", "host": "host alone", "final": "final size"}


@dataclass(frozen=True, slots=True)
class Stay:
    """One stage of a seed, from ``start`` to ``end`` in epochs."""

    stage: str
    start: float
    end: float
    reason: str


@dataclass(slots=True)
class Life:
    """A seed: where it grew, its stages, the gates it met, what it was worth."""

    seed: int
    slot: int
    slot_name: str
    blueprint: str
    stays: list[Stay] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    grafted_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self.seed} · {self.blueprint} · {self.slot_name}"

    @property
    def fate(self) -> str:
        """The stage that tells its end, or the one it is in."""
        stages = [stay.stage for stay in self.stays]
        return next((stage for stage in ("FOSSILIZED", "CULLED") if stage in stages), stages[-1])


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One run folder."""

    folder: Path
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    result: dict[str, Any]
    incidents: list[dict[str, Any]] = field(default_factory=list)

    @property
    def arm(self) -> str:
        return str(self.manifest.get("arm", "grown"))

    @property
    def name(self) -> str:
        return ARM_NAMES.get(self.arm, self.arm)

    def series(self, key: str) -> list[float]:
        """One value of each epoch."""
        return [float(row[key]) for row in self.rows]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("kind") == kind]


def read_run(folder: Path) -> ArmRun:
    """Everything of one run.

    Raises:
        RunError: the folder is no run, or has no epoch yet.
    """
    manifest = _object(folder / "manifest.json")
    rows = _lines(folder / "metrics.jsonl")
    if not manifest or not rows:
        raise RunError(
            f"{folder.name} has nothing to report yet.",
            why=f"{folder} holds no finished epoch.",
            remedy="Let it train for an epoch, or choose another run with `esper runs`.",
        )
    return ArmRun(
        folder,
        manifest,
        rows,
        _lines(folder / "events.jsonl"),
        _object(folder / "result.json"),
        _lines(folder / "incidents.jsonl"),
    )


def lives(run: ArmRun) -> list[Life]:
    """The seeds in the order of their birth."""
    per_epoch = float(run.rows[0]["step"]) / max(float(run.rows[0]["epoch"]), 1.0)
    end = float(run.rows[-1]["epoch"])
    names = {slot["index"]: slot["name"] for slot in run.manifest.get("slots", [])}
    grafts = {event["seed"]: float(event["step"]) / per_epoch for event in run.of_kind("graft")}
    found: dict[int, Life] = {}
    for event in run.of_kind("stage"):
        seed = int(event["seed"])
        if not seed:
            continue
        slot = int(event.get("slot", 0))
        life = found.setdefault(seed, Life(seed, slot, names.get(slot, f"slot {slot}"), str(event["blueprint"])))
        life.grafted_at = grafts.get(seed)
        start = life.grafted_at if event["to"] == "TRAINING" and life.grafted_at is not None else float(event["epoch"])
        if life.stays:
            last = life.stays[-1]
            life.stays[-1] = Stay(last.stage, last.start, start, last.reason)
        if event["to"] != "DORMANT":  # there the slot waits for another seed
            life.stays.append(Stay(str(event["to"]), start, end, str(event.get("reason", ""))))
    for life in found.values():
        life.gates = [event for event in run.of_kind("gate") if _belongs(event, life)]
    return sorted(found.values(), key=lambda life: life.seed)


def _belongs(gate: dict[str, Any], life: Life) -> bool:
    """The first gate is met before the seed has its number: it is known by slot and epoch."""
    if gate["seed"]:
        return bool(gate["seed"] == life.seed)
    return bool(gate["slot"] == life.slot and life.stays and float(gate["epoch"]) == life.stays[0].start)


def _object(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            # The last line of a run that was killed while it was written.
            break
    return rows
