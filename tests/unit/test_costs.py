"""The meter's promises: every piece of work is charged once, whether it was measured early, late or never."""

from __future__ import annotations

import torch

from esper_ray.tolaria.costs import CostMeter

WEIGHT = torch.ones(10, 20)
PER_SAMPLE = 2 * 10 * 20


def work(meter: CostMeter, key: str, times: int, *, later: bool = False) -> None:
    for _ in range(times):
        with meter.charge(key, 4, later=later):
            torch.ones(4, 10) @ WEIGHT


def test_measured_at_once_or_later_the_sum_is_the_same():
    early, late = CostMeter(), CostMeter()
    work(early, "a", 5)
    work(late, "a", 5, later=True)
    assert early.total == late.total == 5 * 4 * PER_SAMPLE


def test_what_was_done_too_seldom_to_be_measured_is_charged_as_the_dearest_known():
    meter = CostMeter()
    work(meter, "a", 1)
    work(meter, "rare", 1, later=True)
    assert meter.total == 4 * PER_SAMPLE
    meter.settle()
    meter.settle()
    assert meter.total == 2 * 4 * PER_SAMPLE


def test_a_resumed_meter_goes_on_without_measuring_again():
    meter, resumed = CostMeter(), CostMeter()
    work(meter, "a", 3)
    resumed.load(meter.save())
    with resumed.charge("a", 4, later=True):
        pass
    assert resumed.total == 4 * 4 * PER_SAMPLE
