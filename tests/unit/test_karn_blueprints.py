"""Each block keeps its promises in each slot: shape, neutrality at alpha 0, life from the first step, its costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.blueprints import build, reset
from esper_ray.karn.catalog import BLUEPRINTS, CATALOG

SIGNATURES = [
    SlotSignature("conv", (16, 24, 24)),
    SlotSignature("conv", (32, 12, 12)),
    SlotSignature("conv", (64, 6, 6)),
    SlotSignature("conv", (13, 5, 7)),
    SlotSignature("sequence", (9, 24)),
    SlotSignature("vector", (24,)),
]
PAIRS = [
    pytest.param(blueprint, signature, id=f"{blueprint.id}-{signature}")
    for signature in SIGNATURES
    for blueprint in CATALOG.query(signature).candidates
]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(signature: SlotSignature, samples: int = 8) -> torch.Tensor:
    return torch.empty(samples, *signature.shape).normal_(generator=generator(7))


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_grafting_changes_nothing_and_the_newborn_learns_from_its_first_step(blueprint, signature) -> None:
    branch = build(blueprint.id, signature, generator=generator())
    h = activations(signature)
    alpha = torch.zeros(())
    assert torch.equal(h + alpha * branch(h), h)
    y = h + 0.01 * branch(h)
    if blueprint.id != "BP001":
        y.pow(3).mean().backward()
    for name, parameter in branch.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_a_branch_is_born_at_a_usual_scale(blueprint, signature) -> None:
    delta = build(blueprint.id, signature, generator=generator())(activations(signature, 64))
    if blueprint.id == "BP001":
        assert not delta.any()
    else:
        assert 0.3 <= delta.std() <= 0.7


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
@pytest.mark.parametrize("corner", ["default", "minimum", "maximum"])
def test_the_described_costs_are_the_measured_ones(blueprint, signature, corner) -> None:
    parameters = {name: getattr(bound, corner) for name, bound in blueprint.bounds.items()}
    branch = build(blueprint.id, signature, parameters)
    with FlopCounterMode(display=False) as counter:
        out = branch(activations(signature, 2))
    assert out.shape == (2, *signature.shape)
    assert counter.get_total_flops() == 2 * blueprint.flops(signature, parameters)
    assert sum(p.numel() for p in branch.parameters()) == blueprint.parameters(signature, parameters)
    assert not list(branch.buffers())


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.id)
def test_birth_is_a_function_of_the_generator_and_touches_no_other(blueprint) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(blueprint.id, SIGNATURES[0], generator=generator(n)) for n in (3, 3, 4))
    unnamed, unnamed_again = (build(blueprint.id, SIGNATURES[0]) for _ in range(2))
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


def test_the_blueprints_are_pairwise_different_computations() -> None:
    programs = {}
    for blueprint in BLUEPRINTS:
        with torch.no_grad(), Recorder() as recorder:
            build(blueprint.id, SIGNATURES[1], generator=generator())(activations(SIGNATURES[1]))
        programs[blueprint.id] = [
            op for op in recorder.operations if "convolution" in op or "norm" in op or "mul" in op
        ]
    for one, two in itertools.combinations(programs, 2):
        assert programs[one] != programs[two], (one, two)


def test_a_block_that_does_not_fit_or_is_not_approved_is_refused_before_anything_is_built() -> None:
    with pytest.raises(BlueprintError, match="made for conv slots, not for vector"):
        build("BP009", SlotSignature("vector", (8,)))
    with pytest.raises(BlueprintError, match="from 1 to 64"):
        build("BP005", SIGNATURES[0], {"rank": 0})
    with pytest.raises(BlueprintError, match="SAFE and not approved"):
        build("BP009", SIGNATURES[0], tier_ceiling=BlueprintTier.UNSPECIFIED)
    with pytest.raises(BlueprintError, match="'float99' is no type"):
        build("BP009", SlotSignature("conv", (8, 4, 4), "float99"))


def test_a_block_takes_the_type_of_its_slot() -> None:
    signature = SlotSignature("conv", (8, 4, 4), "bfloat16")
    branch = build("BP009", signature)
    assert branch(activations(signature).bfloat16()).dtype is torch.bfloat16
