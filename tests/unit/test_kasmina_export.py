"""A grown model as a product: every block there is, in every mode, as a fossil and on its ramp, bit for bit."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from esper_ray import inprocess
from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, blueprint_number
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.karn.catalog import CATALOG
from esper_ray.kasmina.blending import MODES
from esper_ray.kasmina.export import export_model
from esper_ray.kasmina.garden import Garden
from esper_ray.tasks.transformer import TransformerLite
from tests.unit.kasmina_world import MADE, Loop

# How a block can be part of what is exported.
WAYS = list(itertools.product(MODES, ("fossil", "live")))
SHAPES = {"conv": (8, 6, 6), "sequence": (12, 32), "vector": (16,)}


TOGETHER = 12


def usable(kind: str) -> list[str]:
    return [blueprint.id for blueprint in CATALOG.query(SlotSignature(kind, SHAPES[kind])).candidates]


# Each kind of slot, and its blocks by the dozen: one model for each.
GROUPS = [
    (kind, usable(kind)[start : start + TOGETHER]) for kind in SHAPES for start in range(0, len(usable(kind)), TOGETHER)
]


class Deep(nn.Module):
    """One slot for each block of a kind, one behind the other; BatchNorm, so that buffers are at stake as well."""

    def __init__(self, kind: str, count: int) -> None:
        super().__init__()
        c = SHAPES[kind][0]
        self.layers = nn.ModuleList(nn.Conv2d(c, c, 1) if kind == "conv" else nn.Linear(c, c) for _ in range(count))
        self.norm = nn.BatchNorm2d(c) if kind == "conv" else nn.BatchNorm1d(c)
        self.head, self.kind = nn.Linear(c, 7), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x)
        return self.head(x.mean((2, 3)) if self.kind == "conv" else x)


def host_of(kind: str, count: int) -> tuple[nn.Module, list[str], torch.Tensor]:
    """A model with ``count`` slots, their names, and inputs."""
    torch.manual_seed(0)
    if kind != "sequence":
        model = Deep(kind, count)
        return model, [f"layers.{index}" for index in range(count)], torch.randn(4, *SHAPES[kind])
    model = TransformerLite(classes=11, context=12, width=32)
    parts = ("norm1", "attention", "norm2", "widen", "narrow", "attention.out")
    places = ["block1", "block2", *(f"block{n}.{part}" for part in parts for n in (1, 2)), "norm", "tokens"]
    assert len(places) >= count
    return model, places[:count], torch.randint(11, (4, 12))


def grown(kind: str, blocks: list[str], shift: int = 0) -> tuple[Garden, torch.Tensor]:
    """Each block in a slot of its own, in ways that go round with ``shift``."""
    model, places, inputs = host_of(kind, len(blocks))
    slots = tuple(SlotInfo(i, name, SlotSignature(kind, SHAPES[kind])) for i, name in enumerate(places))
    garden = Garden(
        model, slots, SeedConfig(), MADE, Loop(), run_seed=1, max_parameters=10**7, lockstep=True
    )  # fmt: skip
    for slot, blueprint in zip(garden.slots, blocks, strict=True):
        mode, way = WAYS[(slot.info.index + shift) % len(WAYS)]
        if way == "fossil":
            garden.plant_fossil(slot.info.index, blueprint, {}, MODES[mode])
            continue
        directive = SeedDirective(SeedOperation.GERMINATE, blueprint_number(blueprint), blend_mode=MODES[mode])
        order = AdaptationCommand(1, CommandType.SEED, "r", 0, 0, "test", slot.info.index, seed_directive=directive)
        assert garden.apply(order) == ""
    garden.before_step(0)
    for seed in garden.in_stage(Stage.TRAINING, Stage.DORMANT):
        garden.slots[seed.slot].stage = seed.stage = Stage.BLENDING
        seed.alpha = 0.37
    return garden, inputs


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("kind", "blocks"), GROUPS, ids=lambda given: given if isinstance(given, str) else given[0])
def test_every_block_in_every_mode_predicts_bit_for_bit_after_export(kind, blocks, shift, tmp_path):
    garden, inputs = grown(kind, blocks, shift)
    about = export_model(garden, inputs, tmp_path)
    assert {block["blueprint"] for block in about["blocks"]} == set(blocks)
    program = torch.export.load(tmp_path / "model.pt2").module()
    garden.model.eval()
    with torch.no_grad():
        for size in (2, 3, 4):
            assert torch.equal(program(inputs[:size]), garden.model(inputs[:size])), size
    assert json.loads((tmp_path / "model.json").read_text()) == about
    assert about["parameters"] == sum(value.numel() for value in load_file(tmp_path / "model.safetensors").values())


def test_an_export_leaves_the_model_as_it_was(tmp_path):
    garden, inputs = grown("vector", usable("vector")[:8])
    garden.model.train()
    garden.model.norm.eval()
    before = {name: value.clone() for name, value in garden.model.state_dict().items()}
    modes = [module.training for module in garden.model.modules()]
    state = torch.get_rng_state()
    export_model(garden, inputs, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in garden.model.modules()] == modes
    assert before.keys() == garden.model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in garden.model.state_dict().items())


def test_an_isolated_seed_is_no_part_of_the_product(tmp_path):
    garden, inputs = grown("vector", usable("vector")[:8])
    seed = garden.in_stage(Stage.BLENDING)[0]
    garden.slots[seed.slot].stage = seed.stage = Stage.TRAINING
    seed.alpha = 0.0
    about = export_model(garden, inputs, tmp_path)
    assert garden.slots[seed.slot].info.name not in {block["slot"] for block in about["blocks"]}


def test_two_slots_whose_names_differ_by_a_dot_keep_their_blocks_apart():
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(16, 16)})
            self.a_b = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a_b(self.a["b"](x))

    signature = SlotSignature("vector", (16,))
    slots = (SlotInfo(0, "a.b", signature), SlotInfo(1, "a_b", signature))
    garden = Garden(
        Names(), slots, SeedConfig(), inprocess.LocalKernels(), Loop(), run_seed=1, max_parameters=10**7, lockstep=True
    )
    for index in (0, 1):
        garden.plant_fossil(index, "BP004", {})
    assert len(garden.model.esper_grown) == 2
