"""Each block keeps its promises in each slot: shape, neutrality at alpha 0, life from the first step, its costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn import blueprints, properties
from esper_ray.karn.blueprints import copy_birth, quarantined, reset
from esper_ray.karn.catalog import BLUEPRINTS, CATALOG, Blueprint
from esper_ray.karn.properties import QUICK, SLOTS, activations, corners

USABLE = [blueprint for blueprint in BLUEPRINTS if blueprint.tier is not BlueprintTier.HIGH_RISK]


def pairs(signatures: Iterable[SlotSignature]) -> list[Any]:
    """Each usable blueprint in each of these slots that it fits."""
    return [
        pytest.param(blueprint, signature, id=f"{blueprint.id}-{signature}")
        for signature in signatures
        for blueprint in USABLE
        if not blueprint.misfit(signature)
    ]


# Small slots of every kind in each test run; all sizes in the slow one.
PAIRS, ALL_PAIRS = pairs((*SLOTS[2:5], SLOTS[6])), pairs(SLOTS)
CONV, SEQUENCE, VECTOR = SLOTS[1], SLOTS[5], SLOTS[6]
SAMPLE = list({blueprint.family: blueprint for blueprint in USABLE}.values())
by_id = pytest.mark.parametrize("blueprint", USABLE, ids=lambda blueprint: blueprint.id)


def build(identifier: str, *arguments: Any, **named: Any) -> nn.Module:
    return blueprints.build(identifier, *arguments, **{"tier_ceiling": BlueprintTier.EXPERIMENTAL, **named})


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def home(blueprint: Blueprint) -> SlotSignature:
    """A small slot that the blueprint is made for."""
    return CONV if "conv" in blueprint.kinds else SLOTS[4]


def test_there_are_fifty_blueprints_and_each_has_a_module() -> None:
    assert [blueprint.id for blueprint in BLUEPRINTS] == [f"BP{number:03d}" for number in range(1, 51)]
    assert {blueprint.id for blueprint in BLUEPRINTS} == set(blueprints.MODULES)
    assert len(set(blueprints.MODULES.values())) == 50
    for kind, least in (("conv", 30), ("sequence", 12), ("vector", 8)):
        assert sum(kind in blueprint.kinds for blueprint in USABLE) >= least


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_grafting_changes_nothing_and_the_newborn_learns_from_its_first_step(blueprint, signature) -> None:
    for values in corners(blueprint).values():
        properties.unchanged_at_birth(blueprint, signature, values)
        properties.learns_from_the_first_step(blueprint, signature, values)


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_a_branch_is_born_at_a_usual_scale(blueprint, signature) -> None:
    properties.born_at_a_usual_scale(blueprint, signature, {})


@by_id
@pytest.mark.parametrize("check", QUICK[3:], ids=lambda check: check.__name__)
def test_at_the_bounds_of_its_parameters_a_block_keeps_its_promises(blueprint, check) -> None:
    for values in corners(blueprint).values():
        check(blueprint, home(blueprint), values)


@by_id
def test_it_learns_a_small_regression_better_than_the_identity(blueprint) -> None:
    properties.beats_the_identity(blueprint, home(blueprint), {})


@pytest.mark.parametrize("blueprint", SAMPLE, ids=lambda blueprint: blueprint.id)
def test_one_of_each_family_exports_for_any_batch_size(blueprint) -> None:
    properties.exports(blueprint, home(blueprint), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
@by_id
def test_all_export_and_compile(blueprint) -> None:
    for signature in SLOTS:
        if not blueprint.misfit(signature):
            properties.exports(blueprint, signature, {})
    properties.compiles(blueprint, home(blueprint), {})


@pytest.mark.slow
@pytest.mark.parametrize(("blueprint", "signature"), ALL_PAIRS)
def test_in_each_slot_and_at_its_bounds_a_block_keeps_every_promise(blueprint, signature) -> None:
    for values in corners(blueprint).values():
        for check in (*QUICK, properties.beats_the_identity):
            check(blueprint, signature, values)


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_the_described_costs_are_the_measured_ones(blueprint, signature) -> None:
    for corner, parameters in corners(blueprint).items():
        branch = build(blueprint.id, signature, parameters)
        with FlopCounterMode(display=False) as counter:
            out = branch(activations(signature, 2))
        assert out.shape == (2, *signature.shape)
        assert counter.get_total_flops() == 2 * blueprint.flops(signature, parameters), corner
        assert sum(p.numel() for p in branch.parameters()) == blueprint.parameters(signature, parameters), corner
        assert not list(branch.buffers())


@by_id
def test_birth_is_a_function_of_the_generator_and_touches_no_other(blueprint) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(blueprint.id, home(blueprint), generator=generator(n)) for n in (3, 3, 4))
    unnamed, unnamed_again = (build(blueprint.id, home(blueprint)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert same(unnamed, unnamed_again)
    if blueprint.id not in ("BP001", "BP002", "BP003"):
        assert not same(first, other)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(9.0)
    reset(first, generator(3))
    assert same(first, again)


def same(one: nn.Module, two: nn.Module) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Recorder(TorchDispatchMode):
    """Writes down each operation with the shapes and constants it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tuple(a.shape) if isinstance(a, torch.Tensor) else repr(a) for a in args]
        self.operations.append(f"{func}{given}")
        return func(*args, **(kwargs or {}))


def compute(blueprint: Blueprint, signature: SlotSignature) -> tuple[list[str], torch.Tensor]:
    """The operations of a newborn and what it makes of a random input; of the one that hangs, what it would make."""
    module = blueprints.MODULES[blueprint.id](signature, blueprint.resolve()).to_empty(device="cpu")
    reset(module, generator())
    run = super(quarantined.Hanging, module).body if blueprint.id == "BP047" else module
    with torch.no_grad(), Recorder() as recorder:
        out = run(activations(signature).clone())
    return recorder.operations, out


@pytest.mark.parametrize("signature", [CONV, SEQUENCE, VECTOR], ids=str)
def test_the_blueprints_are_pairwise_different_computations(signature) -> None:
    computed = {each.id: compute(each, signature) for each in BLUEPRINTS if not each.misfit(signature)}
    for one, two in itertools.combinations(computed, 2):
        (program, out), (other_program, other_out) = computed[one], computed[two]
        assert program != other_program, (one, two)
        apart = (out - other_out).norm() / (out.norm() + other_out.norm())
        assert apart > 0.05, (one, two)


def test_a_block_that_does_not_fit_or_is_not_approved_is_refused_before_anything_is_built() -> None:
    with pytest.raises(BlueprintError, match="made for conv slots, not for vector"):
        build("BP009", SlotSignature("vector", (8,)))
    with pytest.raises(BlueprintError, match="at most 1024 positions, and these are 4096"):
        build("BP027", SlotSignature("conv", (8, 64, 64)))
    with pytest.raises(BlueprintError, match="from 1 to 64"):
        build("BP005", CONV, {"rank": 0})
    with pytest.raises(BlueprintError, match="SAFE and not approved"):
        build("BP009", CONV, tier_ceiling=BlueprintTier.UNSPECIFIED)
    with pytest.raises(BlueprintError, match="'float99' is no type"):
        build("BP009", SlotSignature("conv", (8, 4, 4), "float99"))


@by_id
def test_a_block_takes_the_type_of_its_slot(blueprint) -> None:
    shape = home(blueprint)
    signature = SlotSignature(shape.kind, shape.shape, "bfloat16")
    out = build(blueprint.id, signature)(activations(signature).bfloat16())
    assert out.dtype is torch.bfloat16
    assert torch.isfinite(out).all()


def test_what_the_catalogue_gives_out_can_be_built() -> None:
    for signature in SLOTS:
        for blueprint in CATALOG.query(signature).candidates:
            assert blueprints.build(blueprint.id, signature)(activations(signature, 2)).shape == (2, *signature.shape)


def test_a_copy_birth_takes_a_neighbours_weights_where_shapes_allow() -> None:
    wide, narrow = SlotSignature("conv", (32, 12, 12)), SlotSignature("conv", (16, 24, 24))
    donor = build("BP006", wide, generator=generator(1))
    twin, other = (build("BP006", signature, generator=generator(2)) for signature in (wide, narrow))
    assert copy_birth(twin, donor) == len(list(donor.parameters())) - 1
    ours, theirs = dict(twin.named_parameters()), dict(donor.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert copy_birth(other, donor) == 0
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
