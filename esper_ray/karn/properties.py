"""What every usable blueprint promises, each promise as a function that finds out: for the tests, and for blocks of
the user's own (`esper blueprints check`).

A check takes the blueprint, a slot that it fits and parameters; it raises `AssertionError` with what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import safetensors.torch
import torch
from torch import Tensor, nn

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn import blueprints, shapes
from esper_ray.karn.recipe import Blueprint

Values = Mapping[str, float]
Check = Callable[[Blueprint, SlotSignature, Values], None]
PLACEBO = "BP001"
LEAST_SCALE, LARGEST_SCALE = 0.3, 0.75
SLOTS = (
    SlotSignature("conv", (16, 24, 24)),
    SlotSignature("conv", (32, 12, 12)),
    SlotSignature("conv", (64, 6, 6)),
    SlotSignature("conv", (13, 5, 7)),
    SlotSignature("sequence", (9, 24)),
    SlotSignature("sequence", (64, 32)),
    SlotSignature("vector", (24,)),
)


def demand(holds: bool | Tensor, otherwise: str) -> None:
    """An assertion that also holds under ``python -O``, for it judges blocks of the user's."""
    if not holds:
        raise AssertionError(otherwise)


def corners(blueprint: Blueprint) -> dict[str, dict[str, float]]:
    """Its parameters at their defaults and at both bounds."""
    return {
        place: {name: getattr(bound, place) for name, bound in blueprint.bounds.items()}
        for place in ("default", "minimum", "maximum")
    }


def newborn(blueprint: Blueprint, signature: SlotSignature, values: Values, seed: int = 3) -> nn.Module:
    return blueprints.build(
        blueprint.id,
        signature,
        values,
        generator=torch.Generator().manual_seed(seed),
        tier_ceiling=BlueprintTier.EXPERIMENTAL,
    )


def activations(signature: SlotSignature, samples: int = 8, seed: int = 7) -> Tensor:
    return torch.empty(samples, *signature.shape).normal_(generator=torch.Generator().manual_seed(seed))


def unchanged_at_birth(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """The slot's output is the same before and after the graft, and the block leaves its input alone."""
    h = activations(signature)
    kept = h.clone()
    with torch.no_grad():
        delta = newborn(blueprint, signature, values)(h)
    demand(delta.shape == h.shape, f"it turns {tuple(h.shape)} into {tuple(delta.shape)}")
    demand(torch.equal(h, kept), "it writes into its input")
    demand(torch.equal(h + 0.0 * delta, h), "it changes the output at alpha 0")


def learns_from_the_first_step(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """Every parameter of a newborn has a finite gradient that is not zero."""
    branch, h = newborn(blueprint, signature, values), activations(signature)
    if blueprint.id != PLACEBO:
        (h + 0.01 * branch(h)).pow(3).mean().backward()
    for name, parameter in branch.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            raise AssertionError(f"{name} gets no gradient")
        demand(torch.isfinite(gradient).all(), f"the gradient of {name} is not finite")
        demand(gradient.abs().max() > 0, f"the gradient of {name} is zero")


def born_at_a_usual_scale(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """With default parameters the output's deviation is a third to three quarters of the input's."""
    del values
    with torch.no_grad():
        deviation = float(newborn(blueprint, signature, {})(activations(signature, 64)).std())
    demand(blueprint.id == PLACEBO or LEAST_SCALE <= deviation <= LARGEST_SCALE, f"its deviation is {deviation:.2f}")


def finite_under_autocast(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """With large inputs and bfloat16 where torch chooses it, outputs and gradients are finite."""
    branch, h = newborn(blueprint, signature, values), (4.0 * activations(signature)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = h + branch(h)
    y.float().square().mean().backward()
    gradients = [each for each in (h.grad, *(p.grad for p in branch.parameters())) if each is not None]
    demand(torch.isfinite(y).all(), "its output is not finite")
    demand(all(torch.isfinite(each).all() for each in gradients), "a gradient is not finite")


def beats_the_identity(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """Within 60 steps it learns a part of a regression, seen on samples that were held out.

    Asked for are a gain, an offset and a rectified part of the neighbouring channel: each block can do a piece.
    """
    if blueprint.id == PLACEBO:
        return
    channel = 1 if signature.kind == "conv" else -1

    def target(x: Tensor) -> Tensor:
        return 1.5 * x + torch.relu(x.roll(1, channel))

    branch = newborn(blueprint, signature, values)
    # As many places to learn from in a small map as in a large one: with a quarter of them the block with most weights
    # (BP040 at 64x6x6) learns them by heart. A vector is one position, and takes more samples.
    samples = 1024 if signature.kind == "vector" else max(8, min(128, 4608 // shapes.positions(signature)))
    h, held_out = activations(signature, samples), activations(signature, samples, seed=8)
    optimizer = torch.optim.Adam(branch.parameters(), lr=0.02)
    with torch.no_grad():
        identity = float((held_out - target(held_out)).square().mean())
    for _ in range(6):
        for _ in range(10):
            optimizer.zero_grad()
            (h + branch(h) - target(h)).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            loss = float((held_out + branch(held_out) - target(held_out)).square().mean())
        if loss < 0.99 * identity:
            return
    raise AssertionError(f"its loss is {loss:.3f}, and that of the identity {identity:.3f}")


def goes_through_safetensors(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """Another newborn that takes its saved weights computes the same."""
    one, other, h = (
        newborn(blueprint, signature, values),
        newborn(blueprint, signature, values, seed=4),
        activations(signature),
    )
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(one.state_dict())))
    with torch.no_grad():
        demand(torch.equal(one(h), other(h)), "with its own weights loaded it computes something else")


def exports(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """`torch.export` for any batch size predicts bit for bit what the block predicts."""
    branch, h = newborn(blueprint, signature, values).eval(), activations(signature, 7)
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(branch, (activations(signature, 4),), dynamic_shapes=sizes).module()
    with torch.no_grad():
        demand(torch.equal(program(h), branch(h)), "the exported program computes something else")


def is_causal(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """In a sequence nothing depends on what comes later."""
    if signature.kind != "sequence":
        return
    branch, h = newborn(blueprint, signature, values), activations(signature)
    changed, middle = h.clone(), signature.shape[0] // 2
    changed[:, middle:] += 1.0
    with torch.no_grad():
        same = torch.allclose(branch(h)[:, :middle], branch(changed)[:, :middle], atol=1e-5)
    demand(same, "earlier positions see later ones")


def compiles(blueprint: Blueprint, signature: SlotSignature, values: Values) -> None:
    """`torch.compile` without graph breaks computes the same, forward and backward."""
    h = activations(signature).requires_grad_()
    found = []
    for compiled in (False, True):
        branch = newborn(blueprint, signature, values)
        torch.compiler.reset()
        run = torch.compile(branch, dynamic=False, fullgraph=True) if compiled else branch
        delta = run(h)
        wanted = [h, *branch.parameters()]
        gradients = torch.autograd.grad(delta, wanted, torch.ones_like(delta)) if delta.requires_grad else ()
        found.append((delta.detach(), *gradients))
    for eager, made in zip(*found, strict=True):
        size = max(1.0, float(eager.abs().max()))
        demand(torch.allclose(eager, made, rtol=1e-3, atol=1e-4 * size), "compiled it computes something else")


QUICK: tuple[Check, ...] = (
    unchanged_at_birth,
    learns_from_the_first_step,
    born_at_a_usual_scale,
    finite_under_autocast,
    goes_through_safetensors,
    is_causal,
)
THOROUGH: tuple[Check, ...] = (beats_the_identity, exports)
