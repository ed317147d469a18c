"""A task of the user's own: a function, named by its import path, that returns a model with its data and loss.

It is called without arguments and returns a dictionary:

| key | what |
|---|---|
| ``model`` | an `nn.Module` that takes one tensor [N, ...] |
| ``data`` | ``{"train": ..., "validation": ..., "test": ...}``, each (inputs, targets), or a data set of such pairs |
| ``loss`` | loss(outputs, targets) -> scalar, the mean over the batch |
| ``slots`` | names of modules, or names with kinds; ``"auto"`` where it is left out |
| ``score`` | score(outputs, targets) -> [N], 1 at best; left out, the accuracy where targets are classes |
| ``optimizer`` | settings of the section ``optimizer``; what the run's configuration says itself wins |
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.config import OptimizerConfig, RunConfig
from esper_ray.errors import ConfigError, HostError
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks.data import DataSet, Split
from esper_ray.tasks.objective import from_loss

_KEYS = {"model", "data", "loss", "slots", "score", "optimizer"}
_SPLITS = ("train", "validation", "test")
_HINT = "It returns a dictionary with model, data and loss, and if you like slots, score and optimizer."


@dataclass(frozen=True, slots=True)
class OwnTask:
    """What the function returned, checked."""

    model: nn.Module
    data: DataSet
    slots: Any
    optimizer: Mapping[str, Any]


def make(config: RunConfig) -> OwnTask:
    """Import the function of ``config.task`` and call it; torch's draws inside are a function of the run's seed.

    Raises:
        HostError: the path does not resolve, the function fails, or what it returns is not what a task is made of.
    """
    function = resolve(config.task, config.code_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "host"))
        try:
            made = function()
        except Exception as error:
            raise HostError(
                f"{config.task} failed.",
                why=f"It raised {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                remedy="Call it by itself in Python first.",
            ) from error
    return _check(config.task, made)


def resolve(path: str, folder: str) -> Callable[[], Any]:
    """The function of ``package.module:function``, imported anew from ``folder``.

    Raises:
        HostError: there is no such module or function, or the module cannot be imported.
    """
    name, _, attribute = path.partition(":")
    place = str(Path(folder or ".").resolve())
    _forget(name.partition(".")[0], place)
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        raise HostError(
            f"There is no module {absent} for {path}."
            if absent and name.startswith(absent)
            else f"{path} cannot be imported.",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}, looking in {place}.",
            remedy="Call from the folder that holds it, or set run.code_folder.",
        ) from error
    finally:
        sys.path.remove(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        has = sorted(
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == name and not key.startswith("_")
        )
        raise HostError(f"{name} has no function {attribute}.", remedy=f"It has: {', '.join(has[:10]) or 'none'}.")
    return function  # type: ignore[no-any-return]


def _forget(package: str, folder: str) -> None:
    """That package, and all that came from the folder, is imported anew: a training process outlives many edits."""
    for name, module in list(sys.modules.items()):
        file, top = getattr(module, "__file__", None) or "", name.partition(".")[0]
        ours = top in ("esper_ray", "__main__") or "site-packages" in file
        if not ours and (top == package or file.startswith(folder)):
            del sys.modules[name]


def optimizer_settings(own: Mapping[str, Any], given: OptimizerConfig) -> OptimizerConfig:
    """The function's settings, under those of the run's configuration that differ from their defaults.

    Raises:
        ConfigError: a setting is unknown or out of bounds.
    """
    defaults = OptimizerConfig().model_dump()
    chosen = {name: value for name, value in given.model_dump().items() if value != defaults[name]}
    try:
        return OptimizerConfig.model_validate({**own, **chosen})
    except ValueError as error:
        raise ConfigError(
            "The optimizer settings of the task are not valid.",
            why=" ".join(str(error).split())[:300],
            remedy="See `esper config show` for the keys of optimizer.",
        ) from None


def _check(path: str, made: Any) -> OwnTask:
    if not isinstance(made, Mapping):
        raise HostError(f"{path} returned a {type(made).__name__}.", why="That is no task.", remedy=_HINT)
    unknown, missing = sorted(map(str, set(made) - _KEYS)), sorted({"model", "data", "loss"} - set(made))
    if unknown or missing:
        why = f"It lacks {', '.join(missing)}." if missing else f"It has unknown keys: {', '.join(unknown)}."
        raise HostError(f"{path} returned no complete task.", why=why, remedy=_HINT)
    if not isinstance(made["model"], nn.Module):
        raise HostError(f"The model of {path} is a {type(made['model']).__name__}.", remedy="Return an nn.Module.")
    for key in ("loss", "score"):
        if made.get(key) is not None and not callable(made[key]):
            raise HostError(f"The {key} of {path} cannot be called.", remedy=f"Return {key}(outputs, targets).")
    objective = from_loss(made["loss"], made.get("score"))
    data = made["data"]
    if not isinstance(data, Mapping) or set(data) != set(_SPLITS):
        raise HostError(
            f"The data of {path} are not three splits.",
            why="Decisions see the validation split, and the test split is read once.",
            remedy='Return {"train": (inputs, targets), "validation": ..., "test": ...}.',
        )
    train, validation, test = (Split(*_tensors(path, name, data[name]), objective) for name in _SPLITS)
    return OwnTask(
        model=made["model"],
        data=DataSet(train, validation, test, classes=_classes(train.targets)),
        slots=made.get("slots", "auto"),
        optimizer=dict(made.get("optimizer") or {}),
    )


def _tensors(path: str, name: str, split: Any) -> tuple[Tensor, Tensor]:
    """A split as two tensors of equal length; a data set of pairs is read through once."""
    pair = split if isinstance(split, tuple | list) and len(split) == 2 else None
    if pair is None and hasattr(split, "__len__") and hasattr(split, "__getitem__"):
        rows = [split[index] for index in range(len(split))]
        pair = [torch.stack([torch.as_tensor(row[column]) for row in rows]) for column in (0, 1)] if rows else None
    if pair is None or not all(isinstance(part, Tensor) for part in pair) or len(pair[0]) != len(pair[1]):
        raise HostError(
            f"The {name} data of {path} are no inputs and targets of equal length.",
            remedy="Return two tensors, or a data set of pairs that can be stacked.",
        )
    if len(pair[0]) < 2:
        raise HostError(f"The {name} data of {path} have {len(pair[0])} samples.", remedy="Return at least two.")
    return pair[0], pair[1]


def _classes(targets: Tensor) -> int:
    return 0 if targets.is_floating_point() else int(targets.max()) + 1
