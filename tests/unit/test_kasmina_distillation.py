"""Distillation's promises: off unless asked for, on only where its measured need fits, and nothing to the host."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from esper_ray.kasmina import distillation, snapshot
from esper_ray.kasmina.distillation import divergence, judge
from esper_ray.kasmina.memory import peak_bytes
from tests.seed_worlds import World, assert_same, weights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def told(world: World) -> list[dict]:
    return [event for event in world.garden.drain_events() if event["kind"] == "distillation"]


def trained(steps: int, **settings) -> World:
    """One that draws the same as every other."""
    world = World(**settings)
    for _ in range(steps):
        world.step()
    return world


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 7, 3, 3)])
def test_the_divergence_is_that_of_the_softened_predictions(shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    classes = 1 if len(shape) > 3 else -1
    rows = [logits.movedim(classes, -1).reshape(-1, 7) / 3.0 for logits in (student, teacher)]
    expected = 9.0 * F.kl_div(rows[0].log_softmax(1), rows[1].softmax(1), reduction="batchmean")
    torch.testing.assert_close(divergence(student, teacher, 3.0), expected)
    assert abs(float(divergence(teacher, teacher, 3.0))) < 1e-6


def test_the_peak_is_the_most_that_was_held_at_once():
    def work():
        a = torch.ones(1000, 1000)
        b = a * 2
        del a
        c = b.view(-1) + 1
        b.add_(1)
        return c

    assert peak_bytes(work, CPU) == 8_000_000


def test_nothing_is_distilled_or_measured_unless_asked_for():
    world = World()
    for _ in range(3):
        world.step()
    assert told(world) == []
    assert world.garden.isolated.teacher.on is None


def test_where_it_fits_the_seed_learns_otherwise_and_the_host_does_not_notice():
    plain, taught = trained(6), trained(6, distill=True)
    event = told(taught)[0]
    assert event["on"]
    assert 0 < event["need_mb"] < event["free_mb"]
    assert_same(weights(plain.model), weights(taught.model))
    assert taught.garden.violations == 0
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.branch.parameters(), taught.branch.parameters(), strict=True)
    )


def test_the_need_is_measured_and_grows_with_the_batch():
    needs = []
    for size in (8, 32):
        world = World(distill=True)
        world.batch_size = size
        world.step()
        needs.append(told(world)[0]["need_mb"])
    assert needs[1] > 2 * needs[0]


@pytest.mark.parametrize(("name", "value"), [("free_bytes", lambda _: 10_000), ("LIMIT_BYTES", 10_000)])
def test_where_it_does_not_fit_it_is_refused_with_the_figures_and_training_goes_on(name, value, monkeypatch):
    monkeypatch.setattr(distillation, name, value)
    plain, refused = trained(4), trained(4, distill=True)
    events = told(refused)
    assert len(events) == 1
    assert not events[0]["on"]
    assert "MiB" in events[0]["reason"]
    assert events[0]["samples"] < 8  # a part of the batch was enough to see it
    assert_same(weights(plain.branch), weights(refused.branch))


def test_seven_gigabytes_are_the_most():
    assert judge(6_900_000_000, 80_000_000_000, samples=64).fits
    assert not judge(7_100_000_000, 80_000_000_000, samples=64).fits
    assert not judge(2_000_000_000, 1_000_000_000, samples=64).fits


def test_a_resumed_garden_does_not_measure_again():
    world = World(distill=True)
    world.step()
    later = World(distill=True, sow=())
    snapshot.restore(later.garden, *snapshot.save(world.garden))
    assert later.garden.isolated.teacher.on is True
    later.number = 1
    later.step()
    assert told(later) == []
