"""The blocks themselves. `build` makes one for a slot; only Kasmina and Tezzeret load this, for it loads torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import blueprint_number
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.blueprints import attention, convolution, multiscale, pointwise, positions, quarantined, sequence
from esper_ray.karn.blueprints.layers import reset
from esper_ray.karn.catalog import CATALOG
from esper_ray.karn.recipe import LAST_OF_OURS
from esper_ray.reliability.ids import derive_seed

__all__ = ["MODULES", "build", "copy_birth", "materialise", "reset"]

Make = Callable[[SlotSignature, Mapping[str, float]], nn.Module]
MODULES: dict[str, Make] = {
    "BP001": pointwise.Identity,
    "BP002": pointwise.ChannelAffine,
    "BP003": pointwise.NormalisedActivation,
    "BP004": pointwise.PointwiseMLP,
    "BP005": pointwise.LowRankAdapter,
    "BP006": convolution.DepthwiseMLP,
    "BP007": attention.SqueezeExcitation,
    "BP008": convolution.Bottleneck,
    "BP009": convolution.ResidualBasic,
    "BP010": pointwise.GatedMLP,
    "BP011": convolution.GroupedShuffle,
    "BP012": convolution.Dilated,
    "BP013": convolution.SingleConvolution,
    "BP014": convolution.InvertedBottleneck,
    "BP015": convolution.Factorised,
    "BP016": multiscale.DilatedPyramid,
    "BP017": multiscale.HalfResolution,
    "BP018": multiscale.Ghost,
    "BP019": multiscale.Hierarchical,
    "BP020": multiscale.Shift,
    "BP021": attention.SpatialGate,
    "BP022": attention.NeighbourGate,
    "BP023": attention.CoordinateGate,
    "BP024": attention.GlobalContext,
    "BP025": attention.StyleGate,
    "BP026": attention.LargeKernelGate,
    "BP027": positions.SelfAttention,
    "BP028": positions.LinearAttention,
    "BP029": sequence.CausalMLP,
    "BP030": positions.AxialAttention,
    "BP031": pointwise.Memory,
    "BP032": pointwise.Mixture,
    "BP033": multiscale.DynamicDepthwise,
    "BP034": sequence.DynamicConvolution,
    "BP035": sequence.StateSpace,
    "BP036": sequence.GatedRecurrence,
    "BP037": sequence.SelectiveStateSpace,
    "BP038": positions.NeighbourGraph,
    "BP039": pointwise.ConditionalLowRank,
    "BP040": multiscale.Deformable,
    "BP041": multiscale.SpectralFilter,
    "BP042": multiscale.WeightTied,
    "BP043": quarantined.Exploding,
    "BP044": quarantined.Vanishing,
    "BP045": quarantined.Severed,
    "BP046": quarantined.TimeBomb,
    "BP047": quarantined.Hanging,
    "BP048": quarantined.Leaking,
    "BP049": quarantined.Intruding,
    "BP050": quarantined.Overbearing,
}


def build(
    blueprint_id: str,
    signature: SlotSignature,
    parameters: Mapping[str, float] | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
    approved: Collection[str] = frozenset(),
) -> nn.Module:
    """The branch ``delta`` of ``y = h + alpha * delta(h)``, newborn: shape-preserving, at its usual scale.

    Args:
        generator: where the birth weights come from; without one they are a function of the kernel's name. torch's
            global generators are never touched.
        device: where the block lives; the signature's device by default.
        tier_ceiling: the highest tier that is approved here as a whole.
        approved: blueprints above it that are approved one by one.

    Raises:
        BlueprintError: unknown, not approved, out of bounds, or no fit for the slot.
    """
    blueprint = CATALOG.get(blueprint_id, tier_ceiling=tier_ceiling, approved=approved)
    blueprint.check_fit(signature)
    values = blueprint.resolve(parameters)
    dtype = getattr(torch, signature.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise BlueprintError(f"{signature.dtype!r} is no type of a tensor.", remedy="Use float32 or bfloat16.")
    if generator is None:
        generator = torch.Generator().manual_seed(derive_seed(KernelSpec(blueprint_id, signature, values).key))
    make, place = MODULES[blueprint_id], torch.device(device or signature.device)
    if blueprint_number(blueprint_id) <= LAST_OF_OURS:
        module = make(signature, values).to(dtype).to_empty(device=place)
    else:
        module = _own(make, signature, values, generator).to(dtype)
        materialise(module, place)
    reset(module, generator)
    return module


def _own(make: Make, signature: SlotSignature, values: Mapping[str, float], generator: torch.Generator) -> nn.Module:
    """A block of the user's own: torch's layers in it draw their weights as they are made."""
    with torch.random.fork_rng(devices=[]):
        # Of the processor's alone: torch.manual_seed would put back those of every other device.
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        return make(signature, values)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give memory to what is on the meta device, and move the rest."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            value = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.detach().to(device)
            setattr(part, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def copy_birth(newborn: nn.Module, donor: nn.Module) -> int:
    """Give ``newborn`` the weights of ``donor`` where a parameter of that name has the same shape; returns how many.

    Its gain per channel stays that of a newborn: the donor's may have grown, or shrunk to nothing.
    """
    theirs = dict(donor.named_parameters())
    copied = 0
    with torch.no_grad():
        for name, parameter in newborn.named_parameters():
            source = theirs.get(name)
            if name != "scale" and source is not None and source.shape == parameter.shape:
                parameter.copy_(source)
                copied += 1
    return copied
