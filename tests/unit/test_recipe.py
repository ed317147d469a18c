"""How ablations of growing are compared, and what a newborn's gradient is told against."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from torch import nn

from benchmarks.recipe import report
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.kasmina.slot import Seed
from esper_ray.tolaria.rows import gradient_ratio

FRONTIER = ("short", "long")


def row(name, seed, flops, loss, accuracy=0.9):
    return (name, seed), {"seed": seed, "flops": flops, "loss": loss, "accuracy": accuracy}


def test_the_frontier_is_read_between_two_lengths_and_never_beyond_them():
    rows = dict([row("short", 0, 1e12, 0.4), row("long", 0, 4e12, 0.2)])
    assert report.frontier(rows, FRONTIER, 0, 2e12, "loss") == pytest.approx(0.3)
    assert math.isnan(report.frontier(rows, FRONTIER, 0, 0.9e12, "loss"))
    assert math.isnan(report.frontier(rows, FRONTIER, 0, 4.1e12, "loss"))
    assert math.isnan(report.frontier(rows, FRONTIER, 1, 2e12, "loss")), "another random seed is no pair"


def test_a_difference_is_paired_by_random_seed_and_stands_out_where_its_interval_excludes_zero():
    rows = dict(
        row(name, seed, flops, loss + seed)
        for seed in range(3)
        for name, flops, loss in (("short", 1e12, 0.4), ("long", 4e12, 0.2), ("better", 2e12, 0.25 + seed / 1000))
    )
    found = report.against(rows, FRONTIER, "better", "loss")
    assert found is not None
    assert found.mean == pytest.approx(-0.049)
    assert found.high < 0.0
    lines = report.table(rows, FRONTIER, ["short", "better"], "long").splitlines()
    assert "**-0.049" in lines[3]
    assert "**" not in lines[2]
    assert "0.50 F" in lines[3]


def newborn(stage):
    spec = KernelSpec("BP009", SlotSignature.parse("vector-4-float32-cpu"), {})
    seed = Seed(1, 0, spec, stage, 0, 0, 0, branch=nn.Linear(3, 3, bias=False), gradient_norm=3.0)
    return gradient_ratio(SimpleNamespace(model=nn.Linear(2, 2, bias=False)), seed, 2.0)


def test_a_newborns_gradient_is_told_per_parameter_against_the_models():
    assert newborn(Stage.BLENDING) == pytest.approx(1.0), "3 over nine parameters, 2 over four"
    assert newborn(Stage.FOSSILIZED) is None
