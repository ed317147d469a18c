"""The meter's promises: every piece of work is charged once, whether it was measured early, late or never."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests.tiny_runs import SETTINGS

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


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_charged_for_all_that_it_computed_and_for_seeds_that_failed_too(tmp_path):
    settings = (*SETTINGS, "run.mode=lockstep", "run.epochs=9", "seeds.gain_errors=1000", "seeds.max_stage_epochs=1")
    config = configuration.load(None, [f"home={tmp_path}", *settings])
    around = inprocess.surroundings(config)
    # Once before, so that the forge's own work, which is no part of a run, is done.
    Trainer(RunRequest("before", config), around).run()
    trainer = Trainer(RunRequest("counted", config), around)
    with FlopCounterMode(display=False) as computed:
        trainer.open()
        while trainer.step < trainer.total_steps:
            trainer.one_epoch()
    trainer.meter.settle()
    trainer.close()
    assert trainer.garden.culled >= 2
    # G0 looks at a newborn with four samples, which is not charged; what was done too seldom is charged as the dearest.
    assert 0.995 < computed.get_total_flops() / trainer.meter.total < 1.005
