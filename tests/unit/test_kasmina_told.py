"""What a gate or a slot refuses is told: in the run's journal, in its report, and over the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.nissa.report import write_report
from esper_ray.nissa.report_data import ArmRun, lives
from esper_ray.nissa.view import View
from esper_ray.tolaria.recorder import Recorder
from tests.unit.kasmina_world import WORTHLESS, Life, walk

ROW = {
    "epoch": 1, "step": 6, "branch": 0, "training_loss": 1.0, "validation_loss": 1.0, "validation_accuracy": 0.5,
    "learning_rate": 0.1, "parameters": 10, "flops": 1.0, "seconds": 1.0, "step_ms": 1.0, "missed": False, "seeds": [],
    "boundary": {"total": 1.0, "assembly": 0.2, "decide": 0.5, "apply": 0.2, "guard": 0.1},
}  # fmt: skip


class Bus:
    """Hands what is published to Nissa's view."""

    def __init__(self) -> None:
        self.view = View()

    def publish(self, kind, payload, **_):
        if kind is BusMessageType.TELEMETRY:
            self.view.apply_telemetry(codec.decode_telemetry(payload))


def decision(operation: SeedOperation, reason: str) -> dict[str, object]:
    command = {"operation": operation.name, "slot": 0, "blueprint": "BP004"}
    return {
        "kind": "decision", "commands": [command], "why": "it looked worth it", "controller": "test", "missed": False,
        "refused": [reason],
    }  # fmt: skip


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def told(tmp_path):
    """A seed whose G3 refuses, and an order that is refused: the view, the recorder and the folder."""
    life, bus = walk(Life(), Stage.SHADOWING), Bus()
    folder = tmp_path / "r"
    recorder = Recorder(folder, "r", bus)
    recorder.manifest({"run_id": "r", "arm": "grown", "slots": [{"index": 0, "name": "body"}]})
    life.spend(2)
    life.end_epoch(WORTHLESS)
    reason = life.order(SeedOperation.FOSSILIZE)
    born = {"kind": "stage", "seed": 1, "slot": 0, "from": "DORMANT", "to": "GERMINATED", "blueprint": "BP004"}
    events = [{**born, "reason": "ordered"}, *life.garden.drain_events(), decision(SeedOperation.FOSSILIZE, reason)]
    recorder.epoch(ROW, events, [])
    yield bus.view, recorder, folder, events
    recorder.close()


def test_each_verdict_is_a_gate_event_in_the_journal_with_its_figures(told):
    _, recorder, _, events = told
    (verdict,) = recorder.gates()
    assert (verdict.gate, verdict.passed, verdict.seed, verdict.slot) == (Gate.G3_INTERFACE, False, 1, 0)
    assert (verdict.from_stage, verdict.to_stage, verdict.epoch) == (Stage.SHADOWING, Stage.PROBATIONARY, 1)
    assert verdict.evidence["scale"] == pytest.approx(90.0)
    assert "turned away" in verdict.reason
    recorder.epoch(ROW, events, [])
    assert len(recorder.gates()) == 1, "a resumed run writes the same epoch again"


def test_a_refused_gate_is_with_its_seed_and_a_refused_order_with_its_decision(told):
    view, *_ = told
    run = view.newest().details()
    (seed,) = run["seeds"]
    (refused,) = seed["refused"]
    assert refused["gate"] == "G3_INTERFACE"
    assert float(refused["evidence"]["cosine"]) == pytest.approx(-0.9)
    (made,) = run["decisions"]
    assert "not possible while the slot is SHADOWING" in made["refused"]
    assert json.dumps(run)


def test_the_report_shows_both(told):
    *_, folder, _ = told
    page = write_report(folder).read_text()
    assert "turned away" in page
    assert "not possible while the slot is SHADOWING" in page


def test_what_rests_after_a_cull_is_told_with_the_seed_that_was_culled(tmp_path):
    life, bus = walk(Life(), Stage.TRAINING), Bus()
    recorder = Recorder(tmp_path / "r", "r", bus)
    life.order(SeedOperation.CULL)
    while life.stage is not Stage.DORMANT:
        life.end_epoch()
    recorder.epoch(ROW, life.garden.drain_events(), [])
    recorder.close()
    (seed,) = bus.view.newest().details()["seeds"]
    assert [step["stage"] for step in seed["stages"]] == ["CULLED", "EMBARGOED", "RESETTING", "DORMANT"]
    assert seed["stage"] == "CULLED"
    (shown,) = lives(ArmRun(tmp_path, {}, [ROW], events(tmp_path / "r" / "events.jsonl"), {}))
    assert [stay.stage for stay in shown.stays] == ["CULLED", "EMBARGOED", "RESETTING"]
    assert shown.fate == "CULLED"
