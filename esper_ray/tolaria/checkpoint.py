"""Checkpoints: safetensors plus JSON, content-addressed, the manifest last; never a pickle.

A checkpoint is there when its manifest is there and the digests in it match; anything else never happened. The
tensors' file is named by its content, so that an epoch written a second time, after a rollback, is old or new and never
a mixture. Tensors are copied at once and written by a thread of their own that only does input and output.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
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

log = logging.getLogger(__name__)
_DIGITS = 16


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

    def copied(self) -> Checkpoint:
        """The same with tensors of its own in main memory: training goes on without touching them."""
        own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self.tensors.items()}
        return Checkpoint(self.epoch, self.data, own)


class CheckpointWriter:
    """Writes checkpoints off the hot path and keeps the newest ``keep``.

    A write that fails leaves every older checkpoint as it was; `failures` tells of it.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = atomic.make_folder(folder), keep
        # What a life that was killed did not get to.
        atomic.remove_drafts(self._folder)
        self._prune()
        # None ends the thread, a number forgets what is newer than that epoch.
        self._queue: queue.Queue[Checkpoint | int | None] = queue.Queue(maxsize=2)
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Queue a checkpoint whose tensors nobody writes to (`Checkpoint.copied`); waits only while two are in work."""
        self._queue.put(checkpoint)

    def forget_after(self, epoch: int) -> None:
        """Remove, in its turn, what is newer than ``epoch``: the run has been rolled back to there."""
        self._queue.put(epoch)

    def finish(self) -> None:
        """Wait until all that was submitted is on disk, or has failed."""
        self._queue.join()

    def failures(self) -> list[Exception]:
        """What went wrong since the last call; each once."""
        found = []
        while not self._failures.empty():
            found.append(self._failures.get())
        return found

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                if isinstance(item, Checkpoint):
                    write(self._folder, item)
                    self._prune()
                else:
                    forget_after(self._folder, item)
            except Exception as fault:
                # Whatever it is, the trainer must hear of it; a dead thread would let it wait for ever.
                self._failures.put(fault)
            finally:
                self._queue.task_done()

    def _prune(self) -> None:
        for manifest in _manifests(self._folder)[: -self._keep]:
            _remove(manifest)
        wanted = {_tensors_of(manifest).name for manifest in _manifests(self._folder)}
        for file in self._folder.glob("epoch-*.safetensors"):
            if file.name not in wanted:
                file.unlink(missing_ok=True)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write one checkpoint: the tensors, then the manifest that names their digest and its own data's.

    Raises:
        StorageFault: the disk is full, say; what was there before is untouched.
    """
    passing("checkpoint.begun")
    blob = save(dict(checkpoint.tensors))
    name = digest(blob)
    tensors = folder / f"{_stem(checkpoint.epoch)}-{name[:_DIGITS]}.safetensors"
    atomic.write_bytes(tensors, blob)
    passing("checkpoint.tensors")
    manifest = {
        "epoch": checkpoint.epoch,
        "file": tensors.name,
        "digest": name,
        "data": checkpoint.data,
        "data_digest": _data_digest(checkpoint.data),
    }
    atomic.write_text(folder / f"{_stem(checkpoint.epoch)}.json", json.dumps(manifest))
    passing("checkpoint.manifest")


def read_latest(
    folder: Path,
    told: Callable[[CheckpointError], None] = lambda _: None,
    accept: Callable[[Checkpoint], bool] = lambda _: True,
) -> Checkpoint | None:
    """The newest whole checkpoint that ``accept`` takes, or None where there is none at all.

    Args:
        told: hears of each damaged one that was passed over; all are logged as warnings.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    faults: list[CheckpointError] = []
    for manifest in reversed(_manifests(folder)):
        try:
            found = _read(manifest)
        except CheckpointError as fault:
            log.warning("%s", fault)
            told(fault)
            faults.append(fault)
            continue
        if accept(found):
            return found
    if faults:
        raise CheckpointError(
            f"No checkpoint in {folder} can be read.",
            why=f"The newest: {faults[0].what} {faults[0].why}",
            remedy="Restore the folder from a copy, or start the run anew.",
        )
    return None


def read(folder: Path, epoch: int) -> Checkpoint:
    """The checkpoint of ``epoch``.

    Raises:
        CheckpointError: it is not there, or damaged; the text names the file.
    """
    manifest = folder / f"{_stem(epoch)}.json"
    if not manifest.exists():
        kept = ", ".join(map(str, epochs(folder))) or "none"
        raise CheckpointError(
            f"There is no checkpoint of epoch {epoch} in {folder}.",
            why=f"Kept are: {kept}.",
            remedy="Choose one of them; run.keep_checkpoints says how many are kept.",
        )
    return _read(manifest)


def epochs(folder: Path) -> list[int]:
    """The epochs of which there is a manifest, ascending."""
    return [int(manifest.stem.removeprefix("epoch-")) for manifest in _manifests(folder)]


def forget_after(folder: Path, epoch: int) -> None:
    """Remove the checkpoints of later epochs, the newest first."""
    for manifest in reversed(_manifests(folder)):
        if int(manifest.stem.removeprefix("epoch-")) > epoch:
            _remove(manifest)


def _read(manifest: Path) -> Checkpoint:
    try:
        found = json.loads(manifest.read_text())
        epoch, data, tensors = int(found["epoch"]), found["data"], manifest.with_name(_file_of(found, manifest))
        blob = tensors.read_bytes()
        if digest(blob) != found["digest"]:
            raise _damaged(tensors, "Its digest is not the one in its manifest.")
        if _data_digest(data) != found.get("data_digest", _data_digest(data)):
            raise _damaged(manifest, "Its data's digest is not the one it states.")
        return Checkpoint(epoch, data, load(blob))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise _damaged(manifest, f"It cannot be read: {type(fault).__name__}: {fault}.") from fault


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {file} is damaged.", why=why, remedy="An older one is used where there is one."
    )


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.json"))


def _stem(epoch: int) -> str:
    return f"epoch-{epoch:06d}"


def _file_of(found: Mapping[str, Any], manifest: Path) -> str:
    """The tensors' file; one that is not named lies beside its manifest. Never a path."""
    return Path(str(found.get("file", manifest.with_suffix(".safetensors").name))).name


def _tensors_of(manifest: Path) -> Path:
    try:
        return manifest.with_name(_file_of(json.loads(manifest.read_text()), manifest))
    except (OSError, ValueError, AttributeError):
        # A damaged manifest keeps whatever has its plain name; nothing else is known to be its.
        return manifest.with_suffix(".safetensors")


def _remove(manifest: Path) -> None:
    tensors = _tensors_of(manifest)
    manifest.unlink(missing_ok=True)
    passing("checkpoint.pruning")
    tensors.unlink(missing_ok=True)


def _data_digest(data: Any) -> str:
    # As it comes back from the file, where every key is a text.
    return digest(json.dumps(json.loads(json.dumps(data)), sort_keys=True).encode())


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
    # A fused or captured step counts on the device; the others count on the processor.
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for full, value in tensors.items():
        name, key = full.split("::")
        parameter = by_name[name]
        place = parameter.device if value.dim() or on_device else value.device
        optimizer.state[parameter][key] = value.to(place, copy=True)


def names_of(model: nn.Module, seeds: Mapping[int, nn.Module]) -> dict[Tensor, str]:
    """A name for each trained parameter: the host's own, and ``seed/N/...`` for branches outside the host."""
    names: dict[Tensor, str] = {parameter: f"host/{name}" for name, parameter in model.named_parameters()}
    for number, branch in seeds.items():
        names.update({parameter: f"seed/{number}/{name}" for name, parameter in branch.named_parameters()})
    return names
