"""A training's checkpoint: tensors as safetensors, everything else as JSON beside them, the JSON last. No pickle.

The JSON names the tensors' file by its digest, so that the pair is always one state, old or new.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from esper_ray.errors import CheckpointError
from esper_ray.reliability import atomic
from esper_ray.reliability.ids import digest
from esper_ray.simic.spaces import Interface
from esper_ray.tamiyo import policy_store

FORMAT = 1
_CARD, _MEMBERS = "checkpoint.json", "members-"


@dataclass(frozen=True, slots=True)
class Counters:
    """What the driver of a training must remember."""

    steps: int = 0
    episodes: int = 0
    updates: int = 0
    dropped_steps: int = 0
    last_evaluation: int = 0
    recent_returns: tuple[float, ...] = ()
    recent_lengths: tuple[int, ...] = ()
    evaluations: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Restored:
    version: int
    learned_steps: int
    counters: Counters
    optimizer: Mapping[str, Tensor]


def exists(folder: Path) -> bool:
    return (folder / _CARD).exists()


def members(folder: Path, version: int | None = None) -> Path:
    """Where workers and replay keep their part of the checkpoint of that version; by default of the newest.

    Their part is written first, and becomes that of the newest checkpoint with its JSON.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return folder / f"{_MEMBERS}{_card(folder)['version'] if version is None else version}"


def save(
    folder: Path,
    *,
    interface: Interface,
    algo: str,
    module: nn.Module,
    optimizer: Mapping[str, Tensor],
    generator: torch.Generator,
    counters: Counters,
    version: int,
    learned_steps: int,
) -> None:
    """Replace the folder's checkpoint."""
    tensors = {f"policy/{name}": tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    tensors["generator"] = generator.get_state()
    data = safetensors.torch.save(tensors)
    name = f"checkpoint-{digest(data)[:16]}.safetensors"
    card = {
        "format": FORMAT,
        "env": interface.env_id,
        "signature": interface.signature,
        "algo": algo,
        "tensors": name,
        "digest": digest(data),
        "version": version,
        "learned_steps": learned_steps,
        "counters": asdict(counters),
    }
    atomic.write_bytes(folder / name, data)
    atomic.write_text(folder / _CARD, json.dumps(card, indent=1))
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != name:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    for old in folder.glob(f"{_MEMBERS}*"):
        if old != members(folder, version):
            shutil.rmtree(old, ignore_errors=True)


def load(
    folder: Path,
    *,
    interface: Interface,
    algo: str,
    module: nn.Module,
    generator: torch.Generator,
) -> Restored:
    """Put the folder's checkpoint into module and generator; the rest is returned.

    Raises:
        CheckpointError: there is none, or it is damaged, or of another environment, algorithm or network.
    """
    card, tensors = _read(folder, interface)
    if card["algo"] != algo:
        raise CheckpointError(
            f"The checkpoint in {folder} is of a training with {card['algo']}, not {algo}.",
            remedy=f"Resume it with {card['algo']}, or train in another folder.",
        )
    _fill(folder, module, tensors)
    generator.set_state(tensors["generator"])
    told = card["counters"]
    told["evaluations"] = tuple((int(at), float(mean), float(dev)) for at, mean, dev in told["evaluations"])
    for name in ("recent_returns", "recent_lengths"):
        told[name] = tuple(told[name])
    return Restored(card["version"], card["learned_steps"], Counters(**told), _part(tensors, "optimizer/"))


def load_policy(folder: Path, interface: Interface, module: nn.Module) -> None:
    """Only the policy's weights, from a training's folder or from a policy that was kept.

    Raises:
        CheckpointError: as `load`.
        PolicyRefused: the policy that was kept cannot be used.
    """
    if (folder / "policy.json").exists() and not exists(folder):
        kept, _ = policy_store.load(folder.parent.parent, folder.name)
        tensors = {f"policy/{name}": tensor for name, tensor in kept.state_dict().items()}
    else:
        _, tensors = _read(folder, interface)
    _fill(folder, module, tensors)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no checkpoint of a training.", remedy="Check the folder, or start without resuming."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The checkpoint in {folder} is damaged.", why=f"{_CARD}: {error}.") from None


def _card(folder: Path) -> dict[str, Any]:
    with _explained(folder):
        card = json.loads((folder / _CARD).read_text())
        int(card["version"])
        return dict(card)


def _read(folder: Path, interface: Interface) -> tuple[dict[str, Any], dict[str, Tensor]]:
    card = _card(folder)
    with _explained(folder):
        data = (folder / card["tensors"]).read_bytes()
        whole = digest(data) == card["digest"] and card["format"] == FORMAT
    if not whole:
        raise CheckpointError(
            f"The checkpoint in {folder} is damaged.",
            why="Its digest or its format is not the expected one.",
            remedy="Start the training anew.",
        )
    if card["signature"] != interface.signature:
        raise CheckpointError(
            f"The checkpoint in {folder} belongs to {card['env']}, not to this {interface.env_id}.",
            why="Environment or spaces differ.",
            remedy="Resume it with its own environment, or train in another folder.",
        )
    return card, safetensors.torch.load(data)


def _fill(folder: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    policy = _part(tensors, "policy/")
    own = module.state_dict()
    if {k: v.shape for k, v in policy.items()} != {k: v.shape for k, v in own.items()}:
        raise CheckpointError(
            f"The checkpoint in {folder} is of another network.",
            why="The shapes of its weights differ.",
            remedy="Resume with the settings that it was made with, such as simic.hidden.",
        )
    module.load_state_dict(policy)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
