"""The `tabular` data set: rows of numbers and categories whose class depends on interactions of several columns.

Nothing is downloaded. The rule is a fixed random function with two hidden layers; a row is a pure function of (split,
block of rows, place in it), whatever the number of rows that is asked for. Drawn in double precision, so that
rounding decides no label.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_ray.reliability.ids import derive_seed

NUMBERS, CATEGORIES, LEVELS = 12, 4, 4
COLUMNS = NUMBERS + CATEGORIES * LEVELS
CLASSES = 8
_INNER = 24
_FREQUENCY = 1.6
_BLOCK = 2000

Matrix = npt.NDArray[np.float64]


def load_split(split: str, samples: int) -> tuple[Tensor, Tensor]:
    """Rows [samples, COLUMNS] in float32 and labels [samples].

    The first NUMBERS columns have mean 0 and deviation 1; then comes a column for each level of each category, 1 where
    the row has that level.
    """
    rows = np.concatenate([_draw(split, start) for start in range(0, samples, _BLOCK)])[:samples]
    labels = (_scores(rows) - _CENTRE).argmax(1)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def _draw(split: str, start: int) -> Matrix:
    draw = np.random.default_rng(derive_seed("tabular", split, start))
    numbers = draw.standard_normal((_BLOCK, NUMBERS))
    levels = draw.integers(LEVELS, size=(_BLOCK, CATEGORIES))
    return np.concatenate([numbers, np.eye(LEVELS)[levels].reshape(_BLOCK, -1)], axis=1)


def _scores(rows: Matrix) -> Matrix:
    """What each class's rule says of each row, [N, CLASSES]: waves in sums of waves in sums of columns."""
    first, second, last = _RULE
    return np.sin(np.sin(rows @ first) @ second) @ last


def _rule() -> tuple[Matrix, Matrix, Matrix]:
    draw = np.random.default_rng(derive_seed("tabular", "rule"))
    first = draw.standard_normal((COLUMNS, _INNER)) * _FREQUENCY / np.sqrt(NUMBERS + CATEGORIES)
    second = draw.standard_normal((_INNER, _INNER)) * 2 * _FREQUENCY / np.sqrt(_INNER)
    return first, second, draw.standard_normal((_INNER, CLASSES))


_RULE = _rule()
# Each class's usual score, so that all classes are about equally frequent.
_CENTRE = _scores(np.concatenate([_draw("centre", start) for start in range(0, 10_000, _BLOCK)])).mean(0)
