"""Blocks of the user's own: registered by a decorator, EXPERIMENTAL until approved, measured instead of described.

    @register_blueprint("BP051", name="my-block", kinds=("conv",), description="What it does.")
    class MyBlock(Branch):
        def __init__(self, signature, parameters):
            super().__init__(signature, parameters)
            ...
        def body(self, h):
            return ...  # the shape of h

The class is an `nn.Module` over (signature, parameters) whose output is what is added to the slot. A `Branch` scales it
per channel; layers from `karn.blueprints.layers` are born at the right size, and those of torch as torch does it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper_ray.contracts.messages import blueprint_number
from esper_ray.contracts.ports import SlotKind, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn import blueprints
from esper_ray.karn.catalog import CATALOG, Blueprint, Bound
from esper_ray.karn.costs import Cost, CostFunction
from esper_ray.karn.recipe import ALL_KINDS, LAST_NUMBER, LAST_OF_OURS

Block = type[nn.Module]
_GAIN = {"scale": Bound(0.05, 1.0, 0.5, "initial gain per channel of the branch's output")}


def register_blueprint(
    identifier: str,
    *,
    name: str,
    description: str,
    kinds: tuple[SlotKind, ...],
    family: str = "own",
    bounds: Mapping[str, Bound] | None = None,
    source: str = "the user's own",
    smallest_side: int = 1,
    positions: tuple[int, int] = (1, 0),
) -> Callable[[Block], Block]:
    """Add a class to the catalogue of this process as ``identifier``, BP051 to BP063.

    Args:
        bounds: its parameters; ``scale``, which a `Branch` needs, is there anyhow.
        smallest_side: least side of the map in a conv slot.
        positions: least and greatest number of positions; 0 is no bound.

    Raises:
        BlueprintError: the number is none of the user's own, or another class has it.
    """
    number = blueprint_number(identifier) if identifier[2:].isdigit() and identifier.startswith("BP") else 0
    if not LAST_OF_OURS < number <= LAST_NUMBER or identifier != f"BP{number:03d}":
        raise BlueprintError(
            f"{identifier} cannot be a block of your own.",
            remedy=f"Number it from BP{LAST_OF_OURS + 1:03d} to BP{LAST_NUMBER:03d}.",
        )
    unknown = set(kinds) - set(ALL_KINDS)
    if unknown or not kinds:
        raise BlueprintError(f"{identifier} is for no kind of slot.", remedy=f"Name some of: {', '.join(ALL_KINDS)}.")

    def add(block: Block) -> Block:
        taken = blueprints.MODULES.get(identifier)
        if taken is not None and _path(taken) != _path(block):
            raise BlueprintError(f"{identifier} is {_path(taken)} already.", remedy="Give your block another number.")
        blueprints.MODULES[identifier] = block
        CATALOG.add(
            Blueprint(
                identifier,
                name,
                family,
                tuple(kinds),
                _measured(block),
                description,
                source,
                {**_GAIN, **(bounds or {})},
                smallest_side,
                positions,
            )
        )
        return block

    return add


def own() -> list[Blueprint]:
    """The blocks that were registered in this process."""
    return [blueprint for blueprint in CATALOG if blueprint_number(blueprint.id) > LAST_OF_OURS]


def load(modules: Iterable[str], folder: str = "") -> list[Blueprint]:
    """Import the modules that register blocks, anew where they were imported before; the blocks that there are then.

    Raises:
        BlueprintError: one cannot be imported, or registers nothing.
    """
    place = str(Path(folder or ".").resolve())
    for name in modules:
        before = len(own())
        sys.path.insert(0, place)
        importlib.invalidate_caches()
        try:
            known = sys.modules.get(name)
            importlib.reload(known) if known else importlib.import_module(name)
        except BlueprintError:
            raise
        except Exception as error:
            raise BlueprintError(
                f"{name} cannot be imported.",
                why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}, looking in {place}.",
                remedy="Call from the folder that holds it, or set run.code_folder.",
            ) from error
        finally:
            sys.path.remove(place)
        if known is None and len(own()) == before:
            raise BlueprintError(f"{name} registers no block.", remedy="Decorate a class with @register_blueprint.")
    return own()


def _path(block: object) -> str:
    return f"{getattr(block, '__module__', '?')}.{getattr(block, '__qualname__', '?')}"


def _measured(block: Block) -> CostFunction:
    """What a block costs in a slot, found out by building it there and running it once."""

    @lru_cache(maxsize=256)
    def measure(signature: SlotSignature, values: tuple[tuple[str, float], ...]) -> Cost:
        with torch.random.fork_rng(devices=[]):
            # Of the processor's alone: torch.manual_seed would put back those of every other device.
            torch.default_generator.manual_seed(0)
            module = block(signature, dict(values))
        blueprints.materialise(module, torch.device("cpu"))
        blueprints.reset(module, torch.Generator().manual_seed(0))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.randn(2, *signature.shape, generator=torch.Generator().manual_seed(0)))
        return Cost(sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2)

    return lambda signature, parameters: measure(signature, tuple(sorted(parameters.items())))
