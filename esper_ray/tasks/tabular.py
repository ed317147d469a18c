"""The `tabular` data set: rows of numbers and categories whose class depends on interactions of several columns.

Nothing is downloaded. A class is three bits; each is the sign of the product of two weighted sums of the numbers, and
which sums these are depends on a category of its own. So no column by itself says anything of the class. A row is a
pure function of (split, block of rows, place in it), whatever the number of rows that is asked for, and drawn in double
precision, so that rounding decides no label.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_ray.reliability.ids import derive_seed

NUMBERS, CATEGORIES, LEVELS = 12, 4, 4
COLUMNS = NUMBERS + CATEGORIES * LEVELS
BITS, RULES = 3, 2
CLASSES = 2**BITS
_BLOCK = 2000

Matrix = npt.NDArray[np.float64]


def load_split(split: str, samples: int) -> tuple[Tensor, Tensor]:
    """Rows [samples, COLUMNS] in float32 and labels [samples].

    The first NUMBERS columns have mean 0 and deviation 1; then comes a column for each level of each category, 1 where
    the row has that level.
    """
    rows = np.concatenate([_draw(split, start) for start in range(0, samples, _BLOCK)])[:samples]
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(_labels(rows))


def _draw(split: str, start: int) -> Matrix:
    draw = np.random.default_rng(derive_seed("tabular", split, start))
    numbers = draw.standard_normal((_BLOCK, NUMBERS))
    levels = draw.integers(LEVELS, size=(_BLOCK, CATEGORIES))
    return np.concatenate([numbers, np.eye(LEVELS)[levels].reshape(_BLOCK, -1)], axis=1)


def _labels(rows: Matrix) -> npt.NDArray[np.int64]:
    """The class of each row, [N]; the last category has no part in it."""
    numbers, levels = rows[:, :NUMBERS], rows[:, NUMBERS:].reshape(len(rows), CATEGORIES, LEVELS).argmax(2)
    labels = np.zeros(len(rows), np.int64)
    for bit in range(BITS):
        one, other = (numbers * sums[bit, levels[:, bit] % RULES] for sums in _SUMS)
        labels = 2 * labels + (one.sum(1) * other.sum(1) > 0)
    return labels


_SUMS = np.random.default_rng(derive_seed("tabular", "rule")).standard_normal((2, BITS, RULES, NUMBERS))
"""Weights of the numbers in the two sums of each bit, for each of its rules."""
