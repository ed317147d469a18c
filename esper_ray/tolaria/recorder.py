"""What a run leaves behind: its folder of plain files, its journal, and the same as telemetry on the bus.

`manifest.json` says what was run, `metrics.jsonl` has one row per epoch, `events.jsonl` one per thing that happened,
`incidents.jsonl` has emergencies, rollbacks and lost checkpoints: it is never rewound. `undone.jsonl` keeps the rows
that a rollback took back, `result.json` the end. The journal holds what a resumed run must repeat: decisions, the step
of each graft, rollbacks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_ray.contracts import codec
from esper_ray.contracts.enums import (
    BusMessageType,
    EmergencyLevel,
    MessagePriority,
    SeedLifecycleGate,
    SeedLifecycleStage,
    TelemetryLevel,
)
from esper_ray.contracts.messages import EmergencySignal, GateEvent, MetricPoint, TelemetryEvent
from esper_ray.contracts.ports import Publisher
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.errors import StorageFault
from esper_ray.reliability import atomic
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.ids import digest
from esper_ray.reliability.journal import Journal

# Our events by the kinds that Nissa knows.
_TELEMETRY_KIND = {
    "stage": "seed.stage",
    "gate": "gate",
    "decision": "decision",
    "graft": "graft",
    "refusal": "refusal",
    "isolation": "isolation.violation",
    "rate": "rate.outside",
    "rollback": "rollback",
    "checkpoint": "checkpoint.lost",
}
_WARNINGS = {
    "rate": TelemetryLevel.WARNING,
    "isolation": TelemetryLevel.ERROR,
    "refusal": TelemetryLevel.WARNING,
    "rollback": TelemetryLevel.WARNING,
    "checkpoint": TelemetryLevel.ERROR,
}

# The epoch of a line that cannot be read.
_CUT = 2**31
log = logging.getLogger(__name__)


class Recorder:
    """Writes one run's folder and sends the same to the bus; nothing here is called between two steps but `graft`."""

    def __init__(self, folder: Path, run: str, publisher: Publisher | None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.folder, self._run, self._publisher, self._clock = atomic.make_folder(folder), run, publisher, clock
        for place in (folder, folder / "model"):
            atomic.remove_drafts(place)
        # Each decision is on disk in Tamiyo's own journal before it arrives here, and is asked for again after a loss:
        # waiting for the disk a second time would only stretch the boundary.
        self._journal = Journal(folder / "journal.db", clock=clock, sync=False)
        self._incidents = {str(row["id"]) for row in _whole(folder / "incidents.jsonl")}

    # The journal

    def record_decision(self, branch: int, epoch: int, envelopes: Sequence[bytes], missed: str) -> None:
        """Write a boundary's decision down; it takes effect after this."""
        passing("recorder.decision")
        record = {"envelopes": [data.hex() for data in envelopes], "missed": missed}
        self._journal.append("decisions", json.dumps(record).encode(), key=f"{branch}/{epoch}")

    def planned_decision(self, branch: int, epoch: int) -> tuple[list[bytes], str] | None:
        """The accepted envelopes of that boundary and why it was missed, when the run was there before."""
        entry = self._journal.get("decisions", f"{branch}/{epoch}")
        if entry is None:
            return None
        record = json.loads(entry.payload)
        return [bytes.fromhex(text) for text in record["envelopes"]], record["missed"]

    def step_time(self, branch: int, epoch: int, step_ms: float) -> float:
        """The mean step of that epoch as it was first measured: a limit on it decides the same when it is repeated."""
        key = f"{branch}/{epoch}"
        self._journal.append("step_times", repr(step_ms).encode(), key=key)
        entry = self._journal.get("step_times", key)
        assert entry is not None
        return float(entry.payload)

    def record_graft(self, branch: int, seed: int, step: int) -> None:
        passing("recorder.graft")
        self._journal.append("grafts", str(step).encode(), key=f"{branch}/{seed}")

    def planned_graft(self, branch: int, seed: int) -> int | None:
        entry = self._journal.get("grafts", f"{branch}/{seed}")
        return None if entry is None else int(entry.payload)

    def record_rollback(self, branch: int, turn: Mapping[str, Any]) -> None:
        """Write a rollback down; it takes effect after this. The same branch a second time changes nothing."""
        self._journal.append("rollbacks", json.dumps(turn).encode(), key=str(branch))

    def void_rollback(self, branch: int) -> None:
        """That rollback no longer tells where the run is."""
        self._journal.append("void", b"", key=str(branch))

    def rollbacks(self) -> list[dict[str, Any]]:
        """Those that count, in the order of their branches."""
        opened = self.opened_branches()
        return [opened[branch] for branch in sorted(opened) if self._journal.get("void", str(branch)) is None]

    def opened_branches(self) -> dict[int, dict[str, Any]]:
        """Every rollback that was ever written down, by the branch that it opened."""
        return {int(str(entry.key)): json.loads(entry.payload) for entry in self._journal.read("rollbacks")}

    # What persons decided

    def record_order(self, command_id: int, branch: int, epoch: int, data: bytes) -> None:
        """Keep an order that waits for its boundary, from when on it may be carried out; once for each command."""
        self._journal.append("orders", json.dumps([branch, epoch, data.hex()]).encode(), key=str(command_id))

    def orders(self) -> dict[int, tuple[int, int, bytes]]:
        """Every order ever taken up, by its command: branch and epoch of its first possible boundary, and the data."""
        found = {}
        for entry in self._journal.read("orders"):
            branch, epoch, data = json.loads(entry.payload)
            found[int(str(entry.key))] = (int(branch), int(epoch), bytes.fromhex(data))
        return found

    def record_carried_out(self, branch: int, epoch: int, commands: Sequence[int]) -> None:
        """Write down which orders a boundary carries out; they take effect after this."""
        self._journal.append("ordered", json.dumps(list(commands)).encode(), key=f"{branch}/{epoch}")

    def carried_out(self) -> dict[tuple[int, int], list[int]]:
        """The commands that each boundary carried out, by branch and epoch."""
        found = {}
        for entry in self._journal.read("ordered"):
            branch, _, epoch = str(entry.key).partition("/")
            found[int(branch), int(epoch)] = [int(each) for each in json.loads(entry.payload)]
        return found

    def _record_gates(self, epoch: int, branch: int, events: Iterable[Mapping[str, Any]]) -> None:
        verdicts = [_gate_event(self._run, item) for item in events if item["kind"] == "gate"]
        keyed = ((f"{branch}/{epoch}/{place}", codec.encode_gate(verdict)) for place, verdict in enumerate(verdicts))
        self._journal.append_many("gates", keyed)

    def gates(self) -> list[GateEvent]:
        """Every gate's verdict of this run, in the order in which they were asked."""
        return [codec.decode_gate(entry.payload) for entry in self._journal.read("gates")]

    def record_nonce(self, nonce: bytes) -> None:
        """Write down that a person's order was accepted; it takes effect after this."""
        self._journal.append("nonces", nonce, key=nonce.hex())

    def nonces(self) -> list[tuple[bytes, int]]:
        """Nonces of the commands accepted so far, with the time of their acceptance."""
        found = [(entry.payload, entry.at_ns) for entry in self._journal.read("nonces")]
        for entry in self._journal.read("decisions"):
            for text in json.loads(entry.payload)["envelopes"]:
                found.append((codec.decode_envelope(bytes.fromhex(text)).nonce, entry.at_ns))
        return found

    # The folder

    def manifest(self, data: Mapping[str, Any]) -> None:
        atomic.write_text(self.folder / "manifest.json", json.dumps(data, indent=1, default=str))
        passing("recorder.manifest")

    def result(self, data: Mapping[str, Any]) -> None:
        atomic.write_text(self.folder / "result.json", json.dumps(data, indent=1))

    def rewind(self, epoch: int, *, undone_by: int = 0) -> None:
        """Take back the rows of epochs after ``epoch``.

        A resumed run writes them again; after the rollback that opened branch ``undone_by`` they are kept apart.
        """
        for name in ("metrics.jsonl", "events.jsonl"):
            file = self.folder / name
            if not file.exists():
                continue
            lines = file.read_text().splitlines()
            if undone_by:
                gone = [row for row in _rows(file) if int(row["epoch"]) > epoch]
                _append(self.folder / "undone.jsonl", [{"undone_by": undone_by, "of": name, **row} for row in gone])
            kept = [line for line in lines if _epoch_of(line) <= epoch]
            atomic.write_text(file, "".join(f"{line}\n" for line in kept))
        (self.folder / "result.json").unlink(missing_ok=True)

    def incident(self, row: Mapping[str, Any], points: Iterable[MetricPoint] = ()) -> None:
        """Something that went wrong or was undone, to the file and to the bus; the same ``id`` is written once."""
        if row["id"] in self._incidents:
            return
        self._incidents.add(str(row["id"]))
        self.telemetry(int(row["epoch"]), points, _telemetry_of(row))
        try:
            _append(self.folder / "incidents.jsonl", [row])
        except StorageFault as fault:
            log.error("%s of %s could not be written down: %s", row["kind"], self._run, fault)

    def epoch(self, row: Mapping[str, Any], events: Iterable[Mapping[str, Any]], points: Iterable[MetricPoint]) -> None:
        """One epoch's row and events, to the files and to the bus."""
        number, step = int(row["epoch"]), int(row["step"])
        full = [{"epoch": number, "step": step, **item} for item in events]
        _append(self.folder / "metrics.jsonl", [row])
        passing("recorder.row")
        _append(self.folder / "events.jsonl", full)
        passing("recorder.events")
        self._record_gates(number, int(row.get("branch", 0)), full)
        self.telemetry(number, points, [item for each in full for item in _telemetry_of(each)])
        passing("recorder.told")

    def tell(self, epoch: int, events: Iterable[Mapping[str, Any]]) -> None:
        """Events to the bus alone."""
        self.telemetry(epoch, [], [item for each in events for item in _telemetry_of(each)])

    def telemetry(self, epoch: int, points: Iterable[MetricPoint], events: Iterable[TelemetryEvent]) -> None:
        if self._publisher is not None:
            publish_telemetry(self._publisher, "tolaria", self._run, epoch, points, events, clock=self._clock)

    def mirror(self, packets: Iterable[bytes], envelopes: Iterable[bytes]) -> None:
        """The boundary's state and commands, for whoever listens on the bus."""
        if self._publisher is None:
            return
        for packet in packets:
            self._publisher.publish(BusMessageType.SYSTEM_STATE, packet)
        for data in envelopes:
            envelope = codec.decode_envelope(data)
            self._publisher.publish(BusMessageType.ADAPTATION_COMMAND, envelope.payload, event_id=envelope.event_id)
        passing("recorder.mirrored")

    def emergency(self, level: EmergencyLevel, reason: str, *, branch: int, epoch: int, step: int) -> None:
        """Send an emergency at once, and keep it."""
        if self._publisher is not None:
            signal = EmergencySignal(
                level, reason, "tolaria", self._clock.now_ns(), self._clock.monotonic() * 1e3, self._run
            )
            self._publisher.publish(
                BusMessageType.EMERGENCY_SIGNAL, codec.encode_emergency(signal), priority=MessagePriority.CRITICAL
            )
        row = {
            "kind": "emergency",
            "id": f"emergency/{branch}/{step}/{level.name}/{digest(reason.encode())[:8]}",
            "level": level.name,
            "epoch": epoch,
            "step": step,
            "branch": branch,
            "reason": reason,
        }
        self.incident(row, [MetricPoint("em", float(level))])

    def close(self) -> None:
        self._journal.close()


def _gate_event(run: str, item: Mapping[str, Any]) -> GateEvent:
    return GateEvent(
        run=run,
        seed=item["seed"],
        slot=item["slot"],
        epoch=item["epoch"],
        gate=SeedLifecycleGate[item["gate"]],
        passed=item["passed"],
        from_stage=SeedLifecycleStage[item["from"]],
        to_stage=SeedLifecycleStage[item["to"]],
        evidence=item["evidence"],
        reason=item["reason"],
    )


def _telemetry_of(item: Mapping[str, Any]) -> Iterable[TelemetryEvent]:
    kind = _TELEMETRY_KIND.get(item["kind"])
    if kind is None:
        return
    level = _WARNINGS.get(item["kind"], TelemetryLevel.INFO)
    if kind == "decision":
        for command in item["commands"]:
            rest = {"why": item["why"], "controller": item["controller"], "missed": item["missed"]}
            yield event(kind, {"epoch": item["epoch"], **command, **rest}, level=level)
        return
    fields = {name: value for name, value in item.items() if name not in ("kind", "id", "epoch", "evidence")}
    yield event(kind, {**fields, **item.get("evidence", {})}, level=level)


def _append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic.explained(file), file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def _rows(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a line that was cut by a kill or a full disk is none."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if _epoch_of(line) < _CUT]


def _whole(file: Path) -> list[dict[str, Any]]:
    """The same, and the file without the line that was cut: the next one begins on a line of its own."""
    found = _rows(file)
    if file.exists() and len(file.read_text().splitlines()) > len(found):
        atomic.write_text(file, "".join(json.dumps(row) + "\n" for row in found))
    return found


def _epoch_of(line: str) -> int:
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError):
        # The last line of a run that was killed while writing it; the epoch is done again.
        return _CUT
