"""The growth study's promises: equal cost is equal, nothing is extrapolated, and peers do what their papers say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.growth import arms, bars, figures, peers, report, runs, study
from benchmarks.growth.store import Store
from benchmarks.growth.tasks import TASKS, StudyTask, Tuned
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.karn.catalog import CATALOG
from esper_ray.tasks import build_task
from esper_ray.tolaria.trainer import Block

pytestmark = pytest.mark.usefixtures("one_thread")

SLOTS = {
    "conv": SlotInfo(0, "a", SlotSignature("conv", (6, 5, 5))),
    "sequence": SlotInfo(0, "b", SlotSignature("sequence", (7, 8))),
    "vector": SlotInfo(0, "c", SlotSignature("vector", (12,))),
}
TINY = StudyTask(
    "digits-4",
    (
        "run.dataset=digits",
        "run.host_width=4",
        "run.epochs=8",
        "run.boundary_every=6",
        "tamiyo.plateau_rate=10",
        "tamiyo.onset=0",
    ),
    tuple(Block(slot, "BP009", {}) for slot in range(3)),
    "points",
    margin=0.5,
)


def activations(slot: SlotInfo, samples: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.empty(samples, *slot.signature.shape).normal_(generator=generator)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def row(arm: str, seed: int, accuracy: float, flops: float, **more: object) -> dict[str, object]:
    return {
        "task": "glyphs-8", "arm": arm, "seed": seed, "identity": f"{arm}{seed}", "commit": "c", "trials": 1,
        "test_accuracy": accuracy, "test_loss": 1 - accuracy, "flops": flops, "parameters": 10, "born": 3,
        "fossilized": 3, "culled": 0, "graft_ms": 1.0, "processor_seconds": 2.0, "peak_mb": None, **more,
    }  # fmt: skip


# The table


@pytest.mark.parametrize("name", TASKS)
def test_a_final_size_model_is_made_of_blocks_that_are_offered_in_its_slots(name, tmp_path):
    task = TASKS[name]
    few = [f"run.{split}_samples=200" for split in ("train", "validation", "test")]
    built = build_task(task.config(0, "final", *few).run, tmp_path, torch.device("cpu"))
    assert [block.slot for block in task.blocks] == [slot.index for slot in built.slots]
    for block, slot in zip(task.blocks, built.slots, strict=True):
        offered = CATALOG.query(slot.signature).candidates
        assert block.blueprint in {each.id for each in offered}


def test_each_arm_depends_on_arms_that_are_there_and_on_no_circle():
    def depth(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above
        return 1 + max((depth(each, (*above, name)) for each in arms.needs(arms.ARMS[name])), default=0)

    assert max(depth(name) for name in arms.ARMS) <= 4


# Identity


def test_what_does_not_grow_does_not_depend_on_the_settings_of_growing():
    plain, other = TINY, dataclasses.replace(TINY, settings=(*TINY.settings, "tamiyo.grow_by=0.3"))
    configs = [each.config(0, "host") for each in (plain, other)]
    assert runs.settings_of(configs[0], grows=False) == runs.settings_of(configs[1], grows=False)
    assert runs.settings_of(configs[0], grows=True) != runs.settings_of(configs[1], grows=True)


def test_a_result_is_another_one_with_another_rate_seed_or_budget(tmp_path):
    bench = study.Bench(TINY, tmp_path, Store(tmp_path))
    faster = study.Bench(dataclasses.replace(TINY, tuned={"host": Tuned(0.02)}), tmp_path, Store(tmp_path))
    found = [bench.identity(arms.ARMS[name], seed) for name in ("host", "host@0.6", "host=grown") for seed in (0, 1)]
    found.append(faster.identity(arms.ARMS["host"], 0))
    assert len(set(found)) == len(found)


# Equal cost


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    store = Store(place / "results")
    study.work(TINY, place, store, ("final@0.6", "gradmax=grown"), 0, print)
    return store.latest(TINY.name), store, place


def test_nobody_spends_more_than_the_budget_and_hardly_less(done):
    found = done[0]
    whole, grown = (float(found[arm][0]["flops"]) for arm in ("final", "grown"))
    assert 0.97 <= float(found["final@0.6"][0]["flops"]) / (0.6 * whole) <= 1.02
    assert 0.85 * grown <= float(found["gradmax=grown"][0]["flops"]) <= grown
    assert found["gradmax=grown"][0]["born"] == len(set(found["grown"][0]["graft_slots"])) > 0


@pytest.mark.slow
def test_growing_runs_and_searches_stay_within_their_budgets(tmp_path):
    store = Store(tmp_path / "results")
    study.work(TINY, tmp_path, store, ("random=grown", "grown@0.8", "grid=grown"), 0, print)
    found = {arm: float(rows[0]["flops"]) for arm, rows in store.latest(TINY.name).items()}
    assert found["random=grown"] <= found["grown"]
    assert 0.6 * found["final"] <= found["grown@0.8"] <= 0.8 * found["final"]
    assert 0.9 <= found["grid=grown"] / found["grown"] <= 1.05


def test_what_is_there_is_not_done_again(done, monkeypatch):
    found, store, place = done
    monkeypatch.setattr(runs, "train", None)
    again = study.Bench(TINY, place / "elsewhere", store).result("final", 0)
    assert again == found["final"][0]


def test_a_straight_line_leads_to_the_budget():
    def cost(every: int) -> float:
        return 1000.0 + 37.0 * every

    tried = {50: {"flops": cost(50)}}
    for _ in range(2):
        every = study._guess(tried, 0.985 * cost(30))
        tried[every] = {"flops": cost(every)}
    assert any(0.97 * cost(30) <= each["flops"] <= cost(30) for each in tried.values())


# Figures


def test_the_frontier_is_never_extrapolated():
    points = [(0.4, 80.0), (0.6, 84.0), (1.0, 86.0)]
    assert figures.cost_of(points, 82.0) == pytest.approx(0.5)
    assert figures.cost_of(points, 86.0) == pytest.approx(1.0)
    assert figures.cost_of(points, 79.9) is None
    assert figures.cost_of(points, 86.1) is None


def test_differences_are_paired_by_seed_and_bars_judge_the_interval(tmp_path):
    store = Store(tmp_path)
    for seed, shift in enumerate((0.0, 0.05, 0.10)):
        store.add(row("final", seed, 0.80 + shift, 100.0))
        store.add(row("final@0.6", seed, 0.76 + shift, 60.0))
        store.add(row("host", seed, 0.70 + shift, 40.0))
        store.add(row("grown", seed, 0.81 + shift + 0.001 * seed, 70.0))
        store.add(row("grown@0.6", seed, 0.802 + shift, 59.0))
        store.add(row("final=grown", seed, 0.805 + shift, 70.0))
    by_arm = store.latest("glyphs-8")
    gain = figures.paired(TASKS["glyphs-8"], by_arm, "grown", "host")
    assert gain is not None
    assert (gain.mean, gain.count) == (pytest.approx(11.1), 3)
    assert gain.high - gain.low < 1.0
    verdicts = {bar: found["glyphs-8"] for bar, found in bars.table({"glyphs-8": by_arm}).items()}
    assert (verdicts["a"].holds, verdicts["b"].holds, verdicts["c"].holds) == (True, True, True)
    assert verdicts["e"].holds is None
    report.write(store, tmp_path)
    text = (tmp_path / "results.md").read_text()
    report.write(store, tmp_path)
    assert (tmp_path / "results.md").read_text() == text
    assert "+11.10" in text


def test_a_task_that_0_6_F_saturates_proves_nothing(tmp_path):
    store = Store(tmp_path)
    for seed, noise in enumerate((0.001, -0.002, 0.001)):
        store.add(row("final", seed, 0.80, 100.0))
        store.add(row("final@0.6", seed, 0.80 + noise, 60.0))
        store.add(row("grown@0.6", seed, 0.81, 59.0))
    verdict = bars.not_worse("glyphs-8", store.latest("glyphs-8"))
    assert verdict.holds is False
    assert "saturated" in verdict.says


# Peers


@pytest.mark.parametrize("kind", SLOTS)
def test_a_gradmax_newborn_changes_nothing_and_has_a_larger_gradient_than_a_random_one(kind):
    slot = SLOTS[kind]
    h = activations(slot).requires_grad_()
    target = activations(slot).roll(1, 0)

    def first_gradient(block: peers.GradMax) -> torch.Tensor:
        (block(h) - target).square().mean().backward()
        gradient = block.first.weight.grad
        assert gradient is not None
        return gradient.norm()

    best, usual = (peers.GradMax(slot, 5, generator()) for _ in range(2))
    before = usual.second.weight.detach().norm()
    gradient = 2 * (h.detach() - target) / h.numel()
    assert best.maximise(h.detach(), gradient) > 0
    torch.nn.init.zeros_(usual.first.weight)
    assert torch.equal(best(h), h)
    assert best.second.weight.detach().norm() == pytest.approx(float(before), rel=1e-4)
    assert first_gradient(best) > first_gradient(usual)


@pytest.mark.parametrize("kind", SLOTS)
def test_an_identity_morph_hardly_changes_what_passes(kind):
    slot = SLOTS[kind]
    h = activations(slot)
    h = h if kind == "sequence" else h.relu()
    y = peers.Net2Net(slot, 5, generator())(h)
    assert not torch.equal(y, h)
    assert (y - h).norm() < 0.05 * h.norm()
