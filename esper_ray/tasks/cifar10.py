"""The CIFAR-10 reader: the published binary version, from a local folder. Nothing is downloaded.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; https://www.cs.toronto.edu/~kriz/cifar.html.
Six files of 10,000 records; a record is one byte with the label 0..9, then 3,072 bytes: the red, the green and the
blue 32 x 32 plane, row by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_ray.errors import DataError
from esper_ray.reliability.ids import derive_seed

Pair = tuple[Tensor, Tensor]

CLASSES = 10
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
FOLDER = "cifar-10-batches-bin"
RECORDS = 10_000
VALIDATION_SHARE = 0.1
_PIXELS = 3 * 32 * 32
# Mean and deviation of the training images by channel, on the scale 0..1.
_MEAN = (0.4914, 0.4822, 0.4465)
_DEVIATION = (0.2470, 0.2435, 0.2616)
_SOURCE = "Unpack the binary version (cifar-10-binary.tar.gz) and set run.data_folder to its folder."


def load(folder: Path, sizes: tuple[int, int, int]) -> tuple[Pair, Pair, Pair]:
    """Training, validation and test split: images [N, 3, 32, 32] in float32, normalised, and labels [N].

    A tenth of the training files is for validation. Each split has at most as many samples as ``sizes`` says, chosen
    by a draw that is the same everywhere.

    Raises:
        DataError: a file is missing, cut off, or holds something else.
    """
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    # Every file is looked at before one is used, so that the first run finds all that is wrong with the folder.
    parts = [_read(place / name) for name in (*TRAIN_FILES, TEST_FILE)]
    records = np.concatenate(parts[:-1])
    generator = torch.Generator().manual_seed(derive_seed("cifar10", "split"))
    order = torch.randperm(len(records), generator=generator).numpy()
    held_out = round(len(records) * VALIDATION_SHARE)
    chosen = torch.randperm(len(parts[-1]), generator=generator).numpy()
    train, validation, test = sizes
    return (
        _tensors(records[order[held_out:][:train]]),
        _tensors(records[order[:held_out][:validation]]),
        _tensors(parts[-1][chosen[:test]]),
    )


def _read(file: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The records of one file: [RECORDS, 1 + 3072] in uint8."""
    try:
        raw = np.fromfile(file, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(f"{file} is not there.", why="CIFAR-10 has six files.", remedy=_SOURCE) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read.", why=f"{error.strerror}.", remedy=_SOURCE) from None
    expected = RECORDS * (1 + _PIXELS)
    if raw.size != expected:
        raise DataError(
            f"{file} has {raw.size:,} bytes instead of {expected:,}.",
            why="It is cut off, or no file of CIFAR-10's binary version.",
            remedy=_SOURCE,
        )
    records = raw.reshape(RECORDS, 1 + _PIXELS)
    if records[:, 0].max() >= CLASSES:
        raise DataError(f"{file} has labels above 9.", why="It is damaged, or CIFAR-100.", remedy=_SOURCE)
    return records


def _tensors(records: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> Pair:
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)).float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (images - mean) / deviation, torch.from_numpy(records[:, 0].astype(np.int64))
