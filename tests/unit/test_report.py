"""The report: it shows what a run wrote, in any state of the run, and nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from esper_ray import runs
from esper_ray.errors import RunError
from esper_ray.nissa.report import write_report
from esper_ray.nissa.report_data import lives, read_run

STAGES = ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED")


def run_folder(
    home: Path, name: str, arm: str, *, epochs: int = 10, finished: bool = True, accuracy: float = 0.9
) -> Path:
    """A run of 10 steps per epoch; the grown arm has one seed, born after epoch 2."""
    folder = home / name
    folder.mkdir(parents=True)
    manifest = {
        "run_id": name,
        "arm": arm,
        "started_at": "2026-01-01T10:00:00+0000",
        "config": {"run": {"task": "resnet-lite", "dataset": "glyphs", "seed": 0, "mode": "lockstep"}},
        "versions": {"python": "3.11", "torch": "2.13"},
        "backends": {"bus": "our <own> Redis"},
        "slots": [{"index": 0, "name": "stage1", "signature": "conv-16x24x24-float32-cpu"}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = [row(epoch, arm) for epoch in range(1, 11)]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "events.jsonl", events() if arm == "grown" else [])
    if finished:
        result = {"arm": arm, "status": "finished", "test_accuracy": accuracy, "parameters": 5, "flops": 1e12}
        (folder / "result.json").write_text(json.dumps(result | {"wall_seconds": 9.0, "epochs": 10}))
    return folder


def row(epoch: int, arm: str) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "training_loss": 3 / epoch,
        "validation_loss": 3.2 / epoch,
        "validation_accuracy": 1 - 1 / (epoch + 1),
        "learning_rate": 0.003,
        "parameters": 30_000 if arm == "grown" and epoch > 2 else 20_000,
        "flops": 1e11 * epoch,
        "seconds": 1.5 * epoch,
        "step_ms": 9.0,
        "boundary": {"total": 2.0, "assembly": 0.5, "decide": 1.0, "apply": 0.3, "guard": 0.2},
        "missed": epoch == 4,
        "seeds": [],
    }


def events() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "epoch": 2,
            "step": 20,
            "kind": "decision",
            "commands": [{"operation": "GERMINATE", "slot": 0, "blueprint": "BP009"}],
            "why": "the loss <stands> still",
            "controller": "heuristic",
            "missed": False,
        },
        {"epoch": 3, "step": 20, "kind": "graft", "seed": 1, "slot": 0, "ms": 0.2},
    ]
    before = "DORMANT"
    for epoch, stage in enumerate(STAGES, start=2):
        base = {"epoch": epoch, "step": 10 * epoch, "seed": 1, "slot": 0, "from": before, "to": stage}
        gate = "G0_SANITY" if epoch == 2 else "G1_GRADIENT_HEALTH"
        gate_event = {"kind": "gate", "gate": gate, "passed": epoch != 4, "reason": "because"}
        found.append({**base, **gate_event, "seed": 0 if epoch == 2 else 1, "evidence": {"gradient_min": 0.25}})
        found.append({**base, "kind": "stage", "blueprint": "BP009", "reason": "gate passed"})
        before = stage
    return found


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))


class Balance(HTMLParser):
    """Fails on a tag that is closed and was not open."""

    VOID = ("meta", "br", "line", "path", "rect", "circle", "use", "image")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_is_well_formed(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path, "r1", "grown"), [run_folder(tmp_path, "r1-host", "host", accuracy=0.8)])
    text = page.read_text()
    balance = Balance()
    balance.feed(text)

    assert balance.open in ([], ["html"])
    assert balance.outside == []
    assert "$" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert (page.parent / "report.png").read_bytes().startswith(b"\x89PNG")


def test_it_tells_the_outcome_the_reasons_and_the_evidence(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "r1", "grown")
    host = run_folder(tmp_path, "r1-host", "host", accuracy=0.8)
    final = run_folder(tmp_path, "r1-final", "final", accuracy=0.95)

    text = write_report(folder, [host, final]).read_text()

    assert "90.0 % on the test split" in text
    assert "10.0 points above the host alone" in text
    assert "5.0 points below the final size" in text
    assert "germinate BP009 in stage1" in text
    assert "the loss &lt;stands&gt; still" in text
    assert "our &lt;own&gt; Redis" in text
    assert "gradient min" in text
    assert "refused" in text


def test_emergencies_and_rollbacks_are_listed_and_marked(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "r1", "grown")
    place = {"epoch": 4, "step": 40, "branch": 1}
    reason = "the training loss is <not> finite"
    turn = {"kind": "rollback", "id": "rollback/1", "from_epoch": 6, "from_step": 57, "to": 4, "how": "fast"}
    emergency = {"kind": "emergency", "id": "e", "level": "CONSERVATIVE", "reason": reason}
    write_lines(folder / "incidents.jsonl", [{**emergency, **place}, {**turn, **place, "reason": reason}])

    text = write_report(folder).read_text()

    assert "conservative" in text
    assert "back from epoch 6 to 4 (fast, branch 1)" in text
    assert "back from 6" in text.split("<svg", 1)[1]
    assert "the training loss is &lt;not&gt; finite" in text


def test_charts_follow_the_pages_colours(tmp_path: Path) -> None:
    text = write_report(run_folder(tmp_path, "r1", "grown")).read_text()

    assert "var(--accent)" in text.split("<svg", 1)[1]
    assert "#0f00" not in text


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    text = write_report(run_folder(tmp_path, "r1", "grown", finished=False)).read_text()

    assert "Not finished" in text or "not finished" in text
    assert "test accuracy, grown" not in text


def test_a_run_without_seeds_is_shown_too(tmp_path: Path) -> None:
    text = write_report(run_folder(tmp_path, "r1", "host")).read_text()

    assert "No seed was born" in text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "r1", "grown")

    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_a_seeds_life_starts_with_its_graft_and_has_no_holes(tmp_path: Path) -> None:
    (life,) = lives(read_run(run_folder(tmp_path, "r1", "grown")))

    assert [stay.stage for stay in life.stays] == list(STAGES)
    assert life.grafted_at == 2.0
    assert life.stays[1].start == 2.0
    assert all(one.end == next_.start for one, next_ in zip(life.stays, life.stays[1:], strict=False))
    assert life.stays[-1].end == 10
    assert len(life.gates) == len(STAGES)
    assert life.fate == "FOSSILIZED"


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "r1", "grown")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 11, "st')

    assert len(read_run(folder).rows) == 10


def test_a_folder_without_an_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to report"):
        write_report(tmp_path)


def test_the_newest_run_is_listed_first_with_its_controls_found(tmp_path: Path) -> None:
    run_folder(tmp_path, "r1", "grown")
    run_folder(tmp_path, "r1-host", "host")

    assert {run.run_id for run in runs.every(tmp_path)} == {"r1", "r1-host"}
    assert [path.name for path in runs.arms_of(tmp_path, "r1")] == ["r1-host"]
    assert runs.report(tmp_path, "r1").exists()
    with pytest.raises(RunError, match="no run r2"):
        runs.report(tmp_path, "r2")
    with pytest.raises(RunError, match="no run"):
        runs.report(tmp_path, "../r1")


def test_a_finished_runs_model_is_handed_out_whole_and_never_over_another(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "r1", "grown")
    with pytest.raises(RunError, match="no model yet"):
        runs.export(tmp_path, "r1", None)
    (folder / "model").mkdir()
    (folder / "model" / "model.json").write_text("{}")
    (folder / "model" / "model.pt2").write_bytes(b"program")

    out = runs.export(tmp_path, "r1", tmp_path / "out")

    assert sorted(file.name for file in out.iterdir()) == ["model.json", "model.pt2"]
    assert (out / "model.pt2").read_bytes() == b"program"
    (out / "model.json").write_text("another")
    with pytest.raises(RunError, match="another model"):
        runs.export(tmp_path, "r1", out)
