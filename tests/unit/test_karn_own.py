"""A block of the user's own is in the catalogue as soon as its module is loaded, and grows once it is approved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from esper_ray import inprocess
from esper_ray.cli.blueprints import app
from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn import blueprints, own
from esper_ray.karn.catalog import CATALOG
from tests.seed_worlds import World

EXAMPLES = str(Path(__file__).parents[2] / "examples")
CONV = SlotSignature("conv", (8, 6, 6))
BAD = """
import torch
from torch import nn
from esper_ray.karn.own import register_blueprint

@register_blueprint("BP052", name="deaf", kinds=("vector",), description="A torch layer that is never asked.")
class Deaf(nn.Module):
    def __init__(self, signature, parameters):
        super().__init__()
        self.used = nn.Linear(signature.shape[-1], signature.shape[-1])
        self.deaf = nn.Linear(2, 2)

    def forward(self, h):
        return 0.5 * self.used(h)
"""


@pytest.fixture(autouse=True)
def _catalogue_as_it_was():
    yield
    for blueprint in own.own():
        del blueprints.MODULES[blueprint.id]
        CATALOG.discard(blueprint.id)


def test_the_example_is_the_fifty_first_blueprint_and_waits_for_approval() -> None:
    assert [blueprint.id for blueprint in own.load(["own_blueprint"], EXAMPLES)] == ["BP051"]
    with pytest.raises(BlueprintError, match="EXPERIMENTAL and not approved"):
        CATALOG.get("BP051")
    assert CATALOG.query(CONV).left_out["BP051"] == "EXPERIMENTAL is not approved"
    slot = SlotInfo(0, "body", CONV)
    approved = inprocess.candidates(slot, SeedConfig(approved=("BP051",)))
    mine = next(candidate for candidate in approved if candidate.blueprint == 51)
    branch = blueprints.build("BP051", CONV, approved=["BP051"])
    assert mine.parameters == sum(parameter.numel() for parameter in branch.parameters())
    assert mine.flops == 2 * 36 * (9 * 8 + 8 * 8)
    assert 51 not in [candidate.blueprint for candidate in inprocess.candidates(slot)]


def test_it_grows_in_a_run_that_approves_it_and_in_no_other() -> None:
    own.load(["own_blueprint"], EXAMPLES)
    directive = SeedDirective(SeedOperation.GERMINATE, blueprint=51)
    order = AdaptationCommand(1, CommandType.SEED, "r", 1, 0, "t", slot=0, seed_directive=directive)
    assert "BP051 (max-and-blur) is EXPERIMENTAL and not approved" in World(sow=()).garden.apply(order)
    world = World(sow=(), approved=("BP051",))
    assert world.garden.apply(order) == ""
    world.step()
    assert type(world.branch).__name__ == "MaxAndBlur"


def test_a_block_made_of_torchs_own_layers_is_born_by_name_and_touches_no_other_generator(tmp_path) -> None:
    (tmp_path / "deaf_block.py").write_text(BAD)
    own.load(["deaf_block"], str(tmp_path))
    vector = SlotSignature("vector", (6,))
    before = torch.get_rng_state()
    one, two, other = (
        blueprints.build("BP052", vector, approved=["BP052"], generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.used.weight, two.used.weight)
    assert not torch.equal(one.used.weight, other.used.weight)


def test_the_check_names_the_promise_that_is_broken(tmp_path) -> None:
    (tmp_path / "deaf_block.py").write_text(BAD)
    said = CliRunner().invoke(app, ["check", "deaf_block", "--folder", str(tmp_path)])
    assert isinstance(said.exception, BlueprintError)
    assert "broken  learns from the first step: deaf.weight gets no gradient" in said.output
    assert "kept    unchanged at birth" in said.output


def test_numbers_and_modules_that_do_not_do_are_refused_by_name(tmp_path) -> None:
    own.load(["own_blueprint"], EXAMPLES)
    for wrong in ("BP009", "BP064", "BP51", "mine"):
        with pytest.raises(BlueprintError, match=rf"{wrong} cannot be a block of your own.*BP051 to BP063"):
            own.register_blueprint(wrong, name="x", description="x", kinds=("conv",))
    with pytest.raises(BlueprintError, match=r"BP051 is own_blueprint\.MaxAndBlur already"):
        own.register_blueprint("BP051", name="x", description="x", kinds=("conv",))(torch.nn.Identity)
    with pytest.raises(BlueprintError, match=r"no_such_module cannot be imported"):
        own.load(["no_such_module"], str(tmp_path))


def test_the_commands_list_and_show() -> None:
    runner = CliRunner()
    assert "BP050" in runner.invoke(app, ["list"]).output
    for_sequences = runner.invoke(app, ["list", "--task", "transformer-lite"]).output
    assert "made for conv slots" in " ".join(for_sequences.split())
    assert for_sequences.index("BP034") < for_sequences.index("BP009")
    refused = runner.invoke(app, ["list", "--task", "transformer-like"])
    assert isinstance(refused.exception, BlueprintError)
    listed = runner.invoke(app, ["list", "--slot", "64x32"]).output
    assert "BP035" in listed
    shown = runner.invoke(app, ["show", "BP009", "--slot", "32x12x12"]).output
    assert "18,592 parameters" in shown
    assert "first.conv" in shown
    assert "does not fit" in runner.invoke(app, ["show", "BP009", "--slot", "24"]).output
    assert "no blueprint BP999" in str(runner.invoke(app, ["show", "BP999"]).exception)
