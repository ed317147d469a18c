"""The `pycode` data set: bytes of the running Python's standard library, to predict the next byte from those before.

Nothing is downloaded. Whole files belong to one split, named by a hash of their path, so that no split has seen the
inside of a file of another one. What a sample holds depends on the Python version, which a run's manifest names.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_ray.errors import DataError
from esper_ray.reliability.ids import derive_seed

CLASSES = 256
# Of ten files eight are for training. Folders that not every installation has are left out.
_SPLIT_OF = ("train",) * 8 + ("validation", "test")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}


def source_files(folder: Path | None = None) -> dict[str, list[Path]]:
    """The library's source files by split, each list in the order of the paths."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Path]] = {name: [] for name in ("train", "validation", "test")}
    for file in sorted(_walk(root)):
        path = file.relative_to(root).as_posix()
        found[_SPLIT_OF[derive_seed("pycode", path) % len(_SPLIT_OF)]].append(file)
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def load_split(split: str, samples: int, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both [samples, context] numbers 0..255; a target is the byte after its input.

    Samples are windows that begin ``context`` bytes apart, none across two files; which of them are taken is a draw
    that depends on the split and the context alone.

    Raises:
        DataError: the library has fewer windows than ``samples``, or no source files at all.
    """
    windows = _windows(split, context)
    if len(windows) < samples:
        raise DataError(
            f"pycode has {len(windows):,} {split} samples of {context} bytes, fewer than {samples:,}.",
            why="It is made of this Python's standard library.",
            remedy=f"Lower run.{split}_samples or run.context, or install the library's sources.",
        )
    generator = torch.Generator().manual_seed(derive_seed("pycode", split, context))
    chosen = torch.randperm(len(windows), generator=generator)[:samples]
    taken = torch.from_numpy(windows)[chosen].long()
    return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()


@lru_cache(maxsize=6)
def _windows(split: str, context: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Every window of a split: [windows, context + 1] in uint8."""
    rows = [np.empty((0, context + 1), np.uint8)]
    for file in source_files()[split]:
        data = np.frombuffer(file.read_bytes(), np.uint8)
        if len(data) > context:
            rows.append(np.lib.stride_tricks.sliding_window_view(data, context + 1)[::context])
    return np.concatenate(rows)
