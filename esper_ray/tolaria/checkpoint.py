"""Checkpoints: safetensors plus JSON, content-addressed, the manifest last; never a pickle.

A checkpoint is there when its manifest is there and the digest in it matches; anything else never happened.
Tensors are copied at once and written by a thread of their own that only does input and output.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_ray.errors import CheckpointError
from esper_ray.reliability import atomic
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.ids import digest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a run needs to go on: named tensors and JSON-ready data."""

    epoch: int
    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, without it."""
        start = f"{prefix}/"
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


class CheckpointWriter:
    """Writes checkpoints off the hot path and keeps the newest ``keep``."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = atomic.make_folder(folder), keep
        self._queue: queue.Queue[Checkpoint | None] = queue.Queue(maxsize=2)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Copy and queue; waits only while two are being written.

        Raises:
            EnvironmentFault: an earlier write failed.
        """
        self._raise_failure()
        copied = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in checkpoint.tensors.items()}
        self._queue.put(Checkpoint(checkpoint.epoch, checkpoint.data, copied))

    def finish(self) -> None:
        """Wait until everything is on disk."""
        self._queue.join()
        self._raise_failure()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                write(self._folder, item)
                self._prune()
            except Exception as fault:
                # Whatever it is, the trainer must hear of it; a dead thread would let it wait for ever.
                self._failure = fault
            finally:
                self._queue.task_done()

    def _prune(self) -> None:
        manifests = sorted(self._folder.glob("epoch-*.json"))
        for manifest in manifests[: -self._keep]:
            manifest.unlink(missing_ok=True)
            passing("checkpoint.pruning")
            manifest.with_suffix(".safetensors").unlink(missing_ok=True)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write one checkpoint: the tensors, then the manifest that names their digest."""
    stem = f"epoch-{checkpoint.epoch:06d}"
    passing("checkpoint.begun")
    blob = save(dict(checkpoint.tensors))
    atomic.write_bytes(folder / f"{stem}.safetensors", blob)
    passing("checkpoint.tensors")
    manifest = {"epoch": checkpoint.epoch, "digest": digest(blob), "data": checkpoint.data}
    atomic.write_text(folder / f"{stem}.json", json.dumps(manifest))
    passing("checkpoint.manifest")


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    manifests = sorted(folder.glob("epoch-*.json"), reverse=True)
    for manifest in manifests:
        found = _read(manifest)
        if found is not None:
            return found
    if manifests:
        raise CheckpointError(
            f"No checkpoint in {folder} can be read.",
            why="Each one's digest or form is wrong.",
            remedy="Restore the folder from a copy, or start the run anew.",
        )
    return None


def _read(manifest: Path) -> Checkpoint | None:
    try:
        data = json.loads(manifest.read_text())
        blob = manifest.with_suffix(".safetensors").read_bytes()
        if digest(blob) != data["digest"]:
            return None
        return Checkpoint(int(data["epoch"]), data["data"], load(blob))
    except (OSError, ValueError, KeyError):
        return None


def pack_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Moments and step counts by parameter name; ``names`` maps each parameter to its name."""
    return {
        f"{names[parameter]}::{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Put saved moments back; parameters without saved ones start fresh."""
    by_name = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        name, key = full.split("::")
        parameter = by_name[name]
        state = optimizer.state[parameter]
        state[key] = value.to(parameter.device) if value.dim() else value.clone()


def names_of(model: nn.Module, seeds: Mapping[int, nn.Module]) -> dict[Tensor, str]:
    """A name for each trained parameter: the host's own, and ``seed/N/...`` for branches outside the host."""
    names: dict[Tensor, str] = {parameter: f"host/{name}" for name, parameter in model.named_parameters()}
    for number, branch in seeds.items():
        names.update({parameter: f"seed/{number}/{name}" for name, parameter in branch.named_parameters()})
    return names
