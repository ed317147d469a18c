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
from esper_ray.karn import blueprints
from esper_ray.karn.blueprints import quarantined, reset
from esper_ray.karn.catalog import BLUEPRINTS, CATALOG, Blueprint

SIGNATURES = [
    SlotSignature("conv", (16, 24, 24)),
    SlotSignature("conv", (32, 12, 12)),
    SlotSignature("conv", (64, 6, 6)),
    SlotSignature("conv", (13, 5, 7)),
    SlotSignature("sequence", (9, 24)),
    SlotSignature("sequence", (64, 32)),
    SlotSignature("vector", (24,)),
]
USABLE = [blueprint for blueprint in BLUEPRINTS if blueprint.tier is not BlueprintTier.HIGH_RISK]
PAIRS = [
    pytest.param(blueprint, signature, id=f"{blueprint.id}-{signature}")
    for signature in SIGNATURES
    for blueprint in USABLE
    if not blueprint.misfit(signature)
]
CORNERS = ("default", "minimum", "maximum")


def build(identifier: str, *arguments: Any, **named: Any) -> nn.Module:
    return blueprints.build(identifier, *arguments, **{"tier_ceiling": BlueprintTier.EXPERIMENTAL, **named})


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(signature: SlotSignature, samples: int = 8) -> torch.Tensor:
    return torch.empty(samples, *signature.shape).normal_(generator=generator(7))


def at(blueprint: Blueprint, corner: str) -> dict[str, float]:
    return {name: getattr(bound, corner) for name, bound in blueprint.bounds.items()}


def home(blueprint: Blueprint) -> SlotSignature:
    """A small slot that the blueprint is made for."""
    return next(s for s in (SIGNATURES[1], SIGNATURES[4]) if not blueprint.misfit(s))


def test_there_are_fifty_blueprints_and_each_has_a_module() -> None:
    assert [blueprint.id for blueprint in BLUEPRINTS] == [f"BP{number:03d}" for number in range(1, 51)]
    assert {blueprint.id for blueprint in BLUEPRINTS} == set(blueprints.MODULES)
    assert len(set(blueprints.MODULES.values())) == 50
    for kind, least in (("conv", 30), ("sequence", 12), ("vector", 8)):
        assert sum(kind in blueprint.kinds for blueprint in USABLE) >= least


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_grafting_changes_nothing_and_the_newborn_learns_from_its_first_step(blueprint, signature) -> None:
    for corner in CORNERS:
        branch = build(blueprint.id, signature, at(blueprint, corner), generator=generator())
        h = activations(signature)
        assert torch.equal(h + torch.zeros(()) * branch(h), h)
        if blueprint.id != "BP001":
            (h + 0.01 * branch(h)).pow(3).mean().backward()
        for name, parameter in branch.named_parameters():
            assert parameter.grad is not None, (name, corner)
            assert torch.isfinite(parameter.grad).all(), (name, corner)
            assert parameter.grad.abs().max() > 0, (name, corner)


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_a_branch_is_born_at_a_usual_scale(blueprint, signature) -> None:
    delta = build(blueprint.id, signature, generator=generator())(activations(signature, 64))
    if blueprint.id == "BP001":
        assert not delta.any()
    else:
        assert 0.3 <= delta.std() <= 0.75


@pytest.mark.parametrize(("blueprint", "signature"), PAIRS)
def test_the_described_costs_are_the_measured_ones(blueprint, signature) -> None:
    for corner in CORNERS:
        parameters = at(blueprint, corner)
        branch = build(blueprint.id, signature, parameters)
        with FlopCounterMode(display=False) as counter:
            out = branch(activations(signature, 2))
        assert out.shape == (2, *signature.shape)
        assert counter.get_total_flops() == 2 * blueprint.flops(signature, parameters), corner
        assert sum(p.numel() for p in branch.parameters()) == blueprint.parameters(signature, parameters), corner
        assert not list(branch.buffers())


@pytest.mark.parametrize("blueprint", USABLE, ids=lambda blueprint: blueprint.id)
def test_under_autocast_outputs_and_gradients_are_finite(blueprint) -> None:
    for corner in CORNERS:
        branch = build(blueprint.id, home(blueprint), at(blueprint, corner), generator=generator())
        h = (4.0 * activations(home(blueprint))).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = h + branch(h)
            loss = y.float().square().mean()
        loss.backward()
        gradients = [h.grad, *(parameter.grad for parameter in branch.parameters())]
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(each).all() for each in gradients), corner


@pytest.mark.parametrize("blueprint", USABLE[1:], ids=lambda blueprint: blueprint.id)
def test_it_learns_a_small_regression_better_than_the_identity(blueprint) -> None:
    """Asked for are a gain, an offset and a rectified part of the neighbouring channel: each block can do a piece."""
    signature = home(blueprint)
    branch = build(blueprint.id, signature, generator=generator())
    h, held_out = activations(signature, 64), torch.empty(64, *signature.shape).normal_(generator=generator(8))
    channel = 1 if signature.kind == "conv" else -1

    def target(x: torch.Tensor) -> torch.Tensor:
        return 1.5 * x + torch.relu(x.roll(1, channel))

    optimizer = torch.optim.Adam(branch.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        (h + branch(h) - target(h)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        loss = (held_out + branch(held_out) - target(held_out)).square().mean()
        identity = (held_out - target(held_out)).square().mean()
    assert loss < 0.95 * identity


@pytest.mark.parametrize("blueprint", USABLE, ids=lambda blueprint: blueprint.id)
def test_a_state_dict_goes_through_safetensors_and_back(blueprint, tmp_path) -> None:
    from safetensors.torch import load, save

    signature = home(blueprint)
    branch, other = (build(blueprint.id, signature, generator=generator(n)) for n in (3, 4))
    other.load_state_dict(load(save(branch.state_dict())))
    h = activations(signature)
    assert torch.equal(other(h), branch(h))


@pytest.mark.parametrize("blueprint", USABLE, ids=lambda blueprint: blueprint.id)
def test_it_exports_for_any_batch_size(blueprint) -> None:
    signature = home(blueprint)
    branch = build(blueprint.id, signature, generator=generator()).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(branch, (activations(signature, 4),), dynamic_shapes=({0: batch},)).module()
    h = activations(signature, 7)
    with torch.no_grad():
        assert torch.equal(program(h), branch(h))


@pytest.mark.parametrize("blueprint", [b for b in USABLE if "sequence" in b.kinds], ids=lambda blueprint: blueprint.id)
def test_in_a_sequence_nothing_depends_on_what_comes_later(blueprint) -> None:
    for signature in SIGNATURES[4:6]:
        branch = build(blueprint.id, signature, generator=generator())
        h = activations(signature)
        changed, middle = h.clone(), signature.shape[0] // 2
        changed[:, middle:] += 1.0
        with torch.no_grad():
            assert torch.allclose(branch(h)[:, :middle], branch(changed)[:, :middle], atol=1e-5)


@pytest.mark.parametrize("blueprint", USABLE, ids=lambda blueprint: blueprint.id)
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


@pytest.mark.parametrize("signature", [SIGNATURES[1], SIGNATURES[5], SIGNATURES[6]], ids=str)
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
        build("BP005", SIGNATURES[0], {"rank": 0})
    with pytest.raises(BlueprintError, match="SAFE and not approved"):
        build("BP009", SIGNATURES[0], tier_ceiling=BlueprintTier.UNSPECIFIED)
    with pytest.raises(BlueprintError, match="'float99' is no type"):
        build("BP009", SlotSignature("conv", (8, 4, 4), "float99"))


@pytest.mark.parametrize("blueprint", USABLE, ids=lambda blueprint: blueprint.id)
def test_a_block_takes_the_type_of_its_slot(blueprint) -> None:
    shape = home(blueprint)
    signature = SlotSignature(shape.kind, shape.shape, "bfloat16")
    out = build(blueprint.id, signature)(activations(signature).bfloat16())
    assert out.dtype is torch.bfloat16
    assert torch.isfinite(out).all()


def test_what_the_catalogue_gives_out_can_be_built() -> None:
    for signature in SIGNATURES:
        for blueprint in CATALOG.query(signature).candidates:
            assert blueprints.build(blueprint.id, signature)(activations(signature, 2)).shape == (2, *signature.shape)
