"""The study of a trained host and new data: its arms do what they say, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.growth.store import Store
from benchmarks.newdata import arms, report
from benchmarks.newdata.arms import ARMS
from benchmarks.newdata.study import Study
from benchmarks.newdata.tasks import TASKS


@pytest.mark.parametrize(("name", "sample"), [("fonts", torch.randn(2, 1, 24, 24)), ("text", torch.ones(2, 64).long())])
def test_adapters_change_nothing_at_birth_and_have_the_size_that_was_asked_for(name: str, sample: torch.Tensor) -> None:
    task = TASKS[name]
    model = task.host().eval()
    before, size = model(sample), sum(parameter.numel() for parameter in model.parameters())
    added = arms.add_adapters(model, task.adapted, 5000)
    assert torch.equal(model(sample), before)
    assert sum(parameter.numel() for parameter in model.parameters()) - size == added
    assert abs(added - 5000) < 2500


def test_each_arm_trains_what_it_says() -> None:
    task = TASKS["fonts"]

    def trained(name: str) -> int:
        model = task.host()
        if ARMS[name].adapters:
            arms.add_adapters(model, task.adapted, 5000)
        return sum(p.numel() for group in arms.groups(model, ARMS[name], 1e-2) for p in group["params"])

    whole, head = (
        sum(p.numel() for p in part.parameters()) for part in (task.host(), task.host().get_submodule("head"))
    )
    assert trained("fine-tune everything") == whole
    assert trained("last layer") == head
    assert head < trained("adapters (LoRA)") < whole + 5000


def test_a_frozen_part_stays_bit_for_bit() -> None:
    task, arm = TASKS["fonts"], ARMS["adapters (LoRA)"]
    model = task.host()
    arms.add_adapters(model, task.adapted, 2000)
    before = model.get_submodule("stage2.0.layer").weight.clone()  # type: ignore[operator,union-attr]
    data = torch.randn(128, 1, 24, 24), torch.randint(45, (128,))
    optimizer = arms.optimizer_for(model, arm, 1e-2)
    up = model.get_submodule("stage2.0.up").weight.clone()  # type: ignore[operator,union-attr]
    arms.train(model, optimizer, data, 3, seed=0)
    assert torch.equal(model.get_submodule("stage2.0.layer").weight, before)  # type: ignore[arg-type]
    assert not torch.equal(model.get_submodule("stage2.0.up").weight, up)  # type: ignore[arg-type]


def test_the_rate_rises_holds_and_goes_to_nothing() -> None:
    rates = [arms.factor(step, 100) for step in range(100)]
    assert rates[0] < 1.0
    assert rates[50] == 1.0
    assert 0.0 < rates[-1] < 0.1


def test_the_worlds_differ_and_their_splits_share_no_sample(tmp_path: Path) -> None:
    small = {world: dict.fromkeys(("train", "validation", "test"), 64) for world in ("old", "new")}
    for name in ("classes", "text"):
        task = arms.Task(**{**_fields(TASKS[name]), "sizes": small})
        worlds = task.data(tmp_path)
        if name == "classes":
            assert not set(worlds["old"]["train"][1].tolist()) & set(worlds["new"]["train"][1].tolist())
        seen = [row.numpy().tobytes() for split in worlds["new"].values() for row in split[0]]
        assert len(set(seen)) == len(seen)


def _fields(task: arms.Task) -> dict[str, object]:
    return {name: getattr(task, name) for name in task.__dataclass_fields__}


def test_a_run_is_done_once_by_the_same_code_with_the_same_settings(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(arms.Task, "data", lambda self, folder: {})
    done: list[tuple[str, float]] = []

    def fake(self: Study, arm: arms.Arm, seed: int, rate: float, spend: float, adapters: int) -> dict[str, Any]:
        done.append((arm.name, rate))
        return {"task": "fonts", "arm": arm.name, "seed": seed, "rate": rate, "flops": 7.0, "added": 3}

    monkeypatch.setattr(Study, "_do", fake)

    def run(rate: float) -> tuple[Mapping[str, Any], ...]:
        made = Study(TASKS["fonts"], tmp_path, Store(tmp_path / "results"))
        return made.run("grow", 3, 0.01), made.run("last layer", 3, rate)

    first = run(0.01)
    assert run(0.01) == first
    assert len(done) == 2
    assert run(0.003)[1]["identity"] != first[1]["identity"]
    monkeypatch.setattr("benchmarks.newdata.study.code", lambda: "another")
    assert run(0.01) != first
    assert done == [("grow", 0.01), ("last layer", 0.01), ("last layer", 0.003), ("grow", 0.01), ("last layer", 0.01)]


def test_bits_saved_count_as_better() -> None:
    def row(seed: int, loss: float) -> dict[str, object]:
        return {"seed": seed, "new_test": {"loss": loss, "accuracy": 0.5}}

    mine, other = {s: row(s, 1.0 + s / 10) for s in range(3)}, {s: row(s, 1.5 + s / 10) for s in range(3)}
    assert report.gains("text", mine, other, "new").low > 0.0


def test_a_host_that_is_frozen_is_the_same_after_growing(tmp_path: Path) -> None:
    """Growing in place of adapters: what was learned before is still there, bit for bit, below what grew."""
    task = TASKS["fonts"]
    model = task.host()
    body = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("stage")}
    worlds = {"new": {s: (torch.randn(128, 1, 24, 24), torch.randint(45, (128,))) for s in ("train", "validation")}}
    grown = arms.grow(task, model, ARMS["grow, host frozen"], worlds, rate=1e-3, epochs=4, seed=0)
    assert grown.flops > 0.0
    assert isinstance(model.get_submodule("stage1"), nn.Module)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in body.items())
