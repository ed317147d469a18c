"""The catalogue answers from its table, and tiers hold on every path."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.blueprints import build
from esper_ray.karn.catalog import BLUEPRINTS, CATALOG, tier_of
from esper_ray.karn.page import page
from esper_ray.karn.sandbox import sandbox

CONV = SlotSignature("conv", (16, 24, 24))
SEQUENCE = SlotSignature("sequence", (64, 32))
STANDARD = [*(f"BP{number:03d}" for number in range(1, 16)), "BP021"]
RISKY = [blueprint for blueprint in BLUEPRINTS if blueprint.tier is BlueprintTier.HIGH_RISK]
TRIAL = [blueprint for blueprint in BLUEPRINTS if blueprint.tier is BlueprintTier.EXPERIMENTAL]


def test_what_conv_slots_are_offered_by_default_is_what_learned_policies_and_stored_runs_know() -> None:
    assert sorted(blueprint.id for blueprint in CATALOG.query(CONV).candidates) == STANDARD
    wide = {blueprint.id for blueprint in CATALOG.query(CONV, offer="wide").candidates}
    assert len(wide) == 32
    assert wide > set(STANDARD)
    assert CATALOG.query(CONV).left_out["BP027"] == "not offered by default; seeds.offer=wide does"


def test_sequences_are_offered_all_that_fits_them() -> None:
    assert CATALOG.query(SEQUENCE).candidates == CATALOG.query(SEQUENCE, offer="wide").candidates
    assert {"BP027", "BP028", "BP029", "BP034", "BP035"} < {b.id for b in CATALOG.query(SEQUENCE).candidates}


def test_there_are_at_least_ten_different_blueprints_for_convolutional_slots() -> None:
    candidates = CATALOG.query(CONV).candidates
    assert len(candidates) >= 10
    assert len({blueprint.cost for blueprint in candidates}) == len(candidates)
    assert len({blueprint.name for blueprint in candidates}) == len(candidates)


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.id)
def test_each_row_is_complete_and_its_defaults_are_within_their_bounds(blueprint) -> None:
    assert re.fullmatch(r"BP0(0[1-9]|[1-4]\d|50)", blueprint.id)
    assert blueprint.description.endswith(".")
    assert "arXiv" in blueprint.source or (blueprint in RISKY and blueprint.source == "none: made for a drill")
    assert blueprint.kinds
    assert all(bound.minimum < bound.maximum and bound.meaning for bound in blueprint.bounds.values())
    assert blueprint.resolve() == blueprint.resolve(blueprint.resolve())


def test_the_safe_pool_is_full() -> None:
    assert [blueprint.id for blueprint in BLUEPRINTS[:10]] == [f"BP{n:03d}" for n in range(1, 11)]


def test_the_tier_follows_from_the_number() -> None:
    tiers = [tier_of(f"BP{number:03d}") for number in (1, 35, 36, 42, 43, 50)]
    safe, trial, risky = BlueprintTier.SAFE, BlueprintTier.EXPERIMENTAL, BlueprintTier.HIGH_RISK
    assert tiers == [safe, safe, trial, trial, risky, risky]


@pytest.mark.parametrize("blueprint", TRIAL, ids=lambda blueprint: blueprint.id)
def test_an_experimental_blueprint_is_given_out_only_where_it_or_its_tier_is_approved(blueprint) -> None:
    slot = CONV if "conv" in blueprint.kinds else SEQUENCE
    with pytest.raises(BlueprintError, match=f"EXPERIMENTAL and not approved.*Add {blueprint.id} to seeds.approved"):
        CATALOG.get(blueprint.id)
    with pytest.raises(BlueprintError, match="EXPERIMENTAL and not approved"):
        build(blueprint.id, slot)
    assert CATALOG.query(slot).left_out[blueprint.id] == "EXPERIMENTAL is not approved"
    for approval in ({"approved": [blueprint.id]}, {"tier_ceiling": BlueprintTier.EXPERIMENTAL}):
        assert CATALOG.get(blueprint.id, **approval) is blueprint
        assert blueprint in CATALOG.query(slot, **approval).candidates
        build(blueprint.id, slot, **approval)
    others = CATALOG.query(slot, approved=["BP999", *(b.id for b in TRIAL if b is not blueprint)])
    assert blueprint not in others.candidates


@pytest.mark.parametrize("blueprint", RISKY, ids=lambda blueprint: blueprint.id)
def test_no_approval_gives_out_what_is_quarantined_and_a_drill_does(blueprint) -> None:
    everything = {"tier_ceiling": BlueprintTier.HIGH_RISK, "approved": [blueprint.id]}
    with pytest.raises(BlueprintError, match="HIGH_RISK and quarantined"):
        CATALOG.get(blueprint.id, **everything)
    with pytest.raises(BlueprintError, match="HIGH_RISK and quarantined"):
        build(blueprint.id, CONV, **everything)
    assert CATALOG.query(CONV, **everything).left_out[blueprint.id] == "HIGH_RISK is quarantined"
    assert blueprint not in CATALOG.of_task("resnet-lite", **everything).candidates
    with sandbox():
        assert CATALOG.get(blueprint.id) is blueprint
        assert blueprint in CATALOG.query(CONV).candidates
    assert blueprint not in CATALOG.query(CONV, **everything).candidates


def test_a_sandbox_is_open_in_its_own_thread_only() -> None:
    with sandbox(), ThreadPoolExecutor(1) as pool, pytest.raises(BlueprintError, match="quarantined"):
        pool.submit(CATALOG.get, "BP043").result()


def test_a_task_is_answered_by_the_kind_of_its_slots() -> None:
    found = CATALOG.of_task("transformer-lite", tier_ceiling=BlueprintTier.EXPERIMENTAL)
    assert all("sequence" in blueprint.kinds for blueprint in found.candidates)
    assert found.left_out["BP009"] == "made for conv slots, and those of transformer-lite are sequence"
    assert len(CATALOG.of_task("mine:task").candidates) == 35


def test_a_family_can_be_asked_for() -> None:
    answer = CATALOG.query(CONV, family="residual")
    assert [blueprint.id for blueprint in answer.candidates] == ["BP008", "BP009"]
    assert answer.left_out["BP006"] == "of the family depthwise, not residual"


def test_an_answer_is_sorted_by_cost_and_says_why_the_others_were_left_out() -> None:
    answer = CATALOG.query(SlotSignature("conv", (16, 1, 1)), parameter_budget=2000)
    sizes = [blueprint.parameters(SlotSignature("conv", (16, 1, 1))) for blueprint in answer.candidates]
    assert sizes == sorted(sizes)
    assert max(sizes) <= 2000
    assert answer.left_out["BP021"] == "needs a map of at least 2x2"
    assert "budget of 2000" in answer.left_out["BP009"]
    assert set(answer.left_out) | {blueprint.id for blueprint in answer.candidates} == {b.id for b in CATALOG}
    vector = CATALOG.query(SlotSignature("vector", (16,)))
    assert vector.left_out["BP009"] == "made for conv slots, not for vector"


def test_unknown_numbers_and_parameters_out_of_bounds_are_refused_by_name() -> None:
    with pytest.raises(BlueprintError, match="no blueprint 'BP999'"):
        CATALOG.get("BP999")
    basic = CATALOG.get("BP009")
    with pytest.raises(BlueprintError, match=r"no parameter depth.*width, scale"):
        basic.resolve({"depth": 2})
    for wrong in (2.5, 0.0, float("nan")):
        with pytest.raises(BlueprintError, match=r"from 0\.25 to 2"):
            basic.resolve({"width": wrong})


def test_descriptions_travel_between_processes() -> None:
    assert pickle.loads(pickle.dumps(CATALOG.query(CONV))) == CATALOG.query(CONV)


def test_the_catalogue_loads_without_torch() -> None:
    code = "import sys, esper_ray.karn.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_of_the_blueprints_is_the_one_that_the_table_makes() -> None:
    assert (Path(__file__).parents[2] / "docs" / "blueprints.md").read_text() == page()
