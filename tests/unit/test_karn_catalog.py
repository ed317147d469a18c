"""The catalogue answers from its table, and tiers hold on every path."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.catalog import BLUEPRINTS, CATALOG, Catalog, tier_of

CONV = SlotSignature("conv", (16, 24, 24))
RISKY = replace(BLUEPRINTS[0], id="BP043", name="exploding")
TRIAL = replace(BLUEPRINTS[0], id="BP036", name="trial")


def test_there_are_at_least_ten_different_blueprints_for_convolutional_slots() -> None:
    candidates = CATALOG.query(CONV).candidates
    assert len(candidates) >= 10
    assert len({blueprint.cost for blueprint in candidates}) == len(candidates)
    assert len({blueprint.name for blueprint in candidates}) == len(candidates)


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.id)
def test_each_row_is_complete_and_its_defaults_are_within_their_bounds(blueprint) -> None:
    assert re.fullmatch(r"BP0(0[1-9]|[1-4]\d|50)", blueprint.id)
    assert blueprint.description.endswith(".")
    assert "arXiv" in blueprint.source
    assert blueprint.kinds
    assert all(bound.minimum < bound.maximum and bound.meaning for bound in blueprint.bounds.values())
    assert blueprint.resolve() == blueprint.resolve(blueprint.resolve())


def test_the_safe_pool_is_full() -> None:
    assert [blueprint.id for blueprint in BLUEPRINTS[:10]] == [f"BP{n:03d}" for n in range(1, 11)]


def test_the_tier_follows_from_the_number() -> None:
    tiers = [tier_of(f"BP{number:03d}") for number in (1, 35, 36, 42, 43, 50)]
    safe, trial, risky = BlueprintTier.SAFE, BlueprintTier.EXPERIMENTAL, BlueprintTier.HIGH_RISK
    assert tiers == [safe, safe, trial, trial, risky, risky]


@pytest.mark.parametrize("blueprint", [RISKY, TRIAL], ids=lambda blueprint: blueprint.id)
def test_a_blueprint_above_the_approved_tier_is_refused_by_lookup_and_left_out_of_answers(blueprint) -> None:
    catalog = Catalog((*BLUEPRINTS, blueprint))
    with pytest.raises(BlueprintError, match=f"{blueprint.tier.name} and not approved"):
        catalog.get(blueprint.id)
    answer = catalog.query(CONV)
    assert blueprint not in answer.candidates
    assert answer.left_out[blueprint.id] == f"{blueprint.tier.name} is not approved"
    assert catalog.get(blueprint.id, tier_ceiling=blueprint.tier) is blueprint
    assert blueprint in catalog.query(CONV, tier_ceiling=blueprint.tier).candidates


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
