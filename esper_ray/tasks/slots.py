"""Where seeds may grow in a model that we do not know: its modules seen in one dry forward, and slots made of them.

A slot is the output of a module, named as `torch.nn.Module.named_modules` does. Its shape decides what fits: [C, H, W]
is a conv slot, [T, D] a sequence slot, [D] a vector slot, each behind the batch's own dimension.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.contracts.ports import SlotInfo, SlotKind, SlotSignature
from esper_ray.errors import HostError
from esper_ray.karn.catalog import CATALOG

Slots = Sequence[str] | Mapping[str, str]
"""Names of modules, or names with the kind of slot that each is meant to be."""

_KIND_OF: Mapping[int, SlotKind] = {3: "conv", 2: "sequence", 1: "vector"}
_SAMPLES = 3
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Place:
    """A module's output in the dry forward.

    Attributes:
        shape: of one sample.
        order: in which the modules ended; a module ends after those inside it.
        calls: how often it was called.
        trouble: why it cannot be a slot; empty where it can.
        final: it is the model's own output.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    order: int
    calls: int
    parameters: int
    trouble: str
    final: bool


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside; each module's mode and torch's generators outside are as they were."""
    modes = {module: module.training for module in model.modules()}
    place = device_of(model)
    devices = [place.index or 0] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def check_host(model: nn.Module, limit: int) -> int:
    """How many parameters the host has.

    Raises:
        HostError: it has none that train, or more than ``limit``.
    """
    if not isinstance(model, nn.Module):
        raise HostError(f"{type(model).__name__} is no model.", remedy="Give a torch.nn.Module.")
    count = sum(parameter.numel() for parameter in model.parameters())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise HostError(
            f"{type(model).__name__} has no parameters that train.",
            why="A model that does not learn shows nothing that growing could help.",
            remedy="Give a model with parameters, and leave requires_grad on for some.",
        )
    if count > limit:
        raise HostError(
            f"{type(model).__name__} has {count:,} parameters, more than {limit:,}.",
            why="Growing is measured up to that size.",
            remedy="Take a smaller host, or raise the limit: run.host_limit, or host_limit= of attach.",
        )
    return count


def survey(model: nn.Module, sample: Tensor) -> dict[str, Place]:
    """Every module that one forward of ``sample`` [N, ...] calls, by name, in the order in which they end.

    The model is as it was afterwards: evaluation mode is undone, buffers and generators are not touched.

    Raises:
        HostError: the model cannot be run on the sample.
    """
    names = {module: name for name, module in model.named_modules() if name}
    seen: dict[str, list[Any]] = {}
    outputs: dict[str, Any] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        name = names[module]
        outputs.pop(name, None)
        outputs[name] = output
        seen.setdefault(name, []).append(None)

    inputs = torch.cat([sample[:_SAMPLES]] * _SAMPLES)[:_SAMPLES]
    handles = [module.register_forward_hook(note) for module in names]
    try:
        with undisturbed(model), torch.no_grad():
            result = model(inputs)
    except Exception as error:
        raise HostError(
            f"{type(model).__name__} cannot be run on a sample of shape {list(inputs.shape)} in {inputs.dtype}.",
            why=f"It says: {' '.join(str(error).split())[:300]}",
            remedy="Give inputs as the model takes them: one tensor whose first dimension is the batch.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: sum(p.numel() for p in module.parameters()) for module, name in names.items()}
    return {
        name: Place(
            name=name,
            title=type(model.get_submodule(name)).__name__,
            shape=tuple(output.shape[1:]) if isinstance(output, Tensor) else (),
            order=order,
            calls=len(seen[name]),
            parameters=sizes[name],
            trouble=_trouble(output, len(seen[name]), len(inputs)),
            final=output is result,
        )
        for order, (name, output) in enumerate(outputs.items())
    }


def _trouble(output: Any, calls: int, samples: int) -> str:
    if not isinstance(output, Tensor):
        return f"its output is a {type(output).__name__}, not a tensor"
    if calls > 1:
        return f"it is called {calls} times in one forward, and a seed has one place"
    if output.dtype not in _DTYPES:
        return f"its output is {str(output.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    if output.dim() == 0 or output.shape[0] != samples:
        return f"its output {list(output.shape)} does not begin with the batch of {samples}"
    if output.dim() - 1 not in _KIND_OF:
        return f"no blueprint fits {list(output.shape[1:])}: slots are [C, H, W], [T, D] or [D]"
    return ""


def signature_of(place: Place, dtype: torch.dtype, device: torch.device) -> SlotSignature:
    """What a block must fit at that place."""
    return SlotSignature(
        _KIND_OF[len(place.shape)], place.shape, dtype=str(dtype).removeprefix("torch."), device=device.type
    )


def find(model: nn.Module, sample: Tensor, slots: Slots) -> tuple[SlotInfo, ...]:
    """The slots of those names, with their shapes from one dry forward of ``sample``.

    Raises:
        HostError: a name does not exist, was not called, or no blueprint fits its shape or the kind it is said to be.
    """
    if not slots:
        raise HostError("No slot was named.", remedy='Name modules, or say slots="auto".')
    check_names(model, slots)
    places = survey(model, sample)
    kinds = slots if isinstance(slots, Mapping) else {}
    found = []
    for index, name in enumerate(dict.fromkeys(slots)):
        place = places.get(name)
        trouble = place.trouble if place else "a forward of the sample does not call it"
        if place is None or trouble:
            raise HostError(
                f"{name} cannot be a slot.",
                why=f"{trouble[:1].upper()}{trouble[1:]}.",
                remedy=f"Take another module, such as {_usable(places)}.",
            )
        signature = signature_of(place, dtype_of(model), device_of(model))
        _check_fit(name, signature, kinds.get(name))
        found.append(SlotInfo(index, name, signature))
    return tuple(found)


def check_names(model: nn.Module, slots: Slots) -> None:
    """Raises:
    HostError: the model has no module of one of the names; the text has the nearest one.
    """
    known = [name for name, _ in model.named_modules() if name]
    for name in slots:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            raise HostError(f"The model has no module {name!r}.", remedy=f"{hint}It has: {some}.")


def _check_fit(name: str, signature: SlotSignature, kind: str | None) -> None:
    if kind is not None and kind != signature.kind:
        raise HostError(
            f"{name} is no {kind} slot.",
            why=f"Its output is {list(signature.shape)}, and that is a {signature.kind} slot.",
            remedy="Correct the kind, or give the names alone.",
        )
    answer = CATALOG.query(signature)
    if all(blueprint.parameters(signature) == 0 for blueprint in answer.candidates):
        reasons = "; ".join(sorted(set(answer.left_out.values())))
        raise HostError(f"No blueprint fits {name}, {signature}.", why=f"{reasons}.", remedy="Take another module.")


def _usable(places: Mapping[str, Place]) -> str:
    names = [place.name for place in places.values() if not place.trouble and not place.final and place.parameters]
    return ", ".join(names[:5]) or "none of this model's"


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of the weights: under autocast activations have another one, and blocks are born as the host is."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
