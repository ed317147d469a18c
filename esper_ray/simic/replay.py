"""Prioritised replay (Schaul et al. 2016) of whole trajectory segments, in numpy. No torch.

Items are dictionaries of arrays of one shape. The arrays of an item lie in one row of memory, so that a sample is one
copy of rows, and its columns are views of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esper_ray.errors import CheckpointError, ReplayError
from esper_ray.reliability import atomic
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic.spaces import Array
from esper_ray.simic.sumtree import SumTree

_FLOOR = 1e-6
_FILE = "replay.npz"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an item comes from: the run or worker, and the version of the policy that acted."""

    source: str
    version: int


_MARKS = np.dtype([("id", np.int64), ("version", np.int64), ("time", np.float64), ("source", np.int64)])


@dataclass(frozen=True, slots=True)
class Sample:
    """N drawn items.

    Attributes:
        ids: int64 [N], to give new priorities by.
        columns: the items' arrays, each [N, ...].
        weights: float32 [N], importance weights, the largest 1.
        marks: [N], where and when each comes from; `provenance` and `ages` read them.
        sources: the names that ``marks`` has numbers of.
        now: seconds, when it was drawn.
    """

    ids: npt.NDArray[np.int64]
    columns: dict[str, Array]
    weights: npt.NDArray[np.float32]
    marks: npt.NDArray[np.void]
    sources: Sequence[str]
    now: float

    def item(self, number: int) -> dict[str, Array]:
        """The arrays of one of them."""
        return {key: column[number] for key, column in self.columns.items()}

    def provenance(self, number: int) -> Provenance:
        mark = self.marks[number]
        return Provenance(self.sources[mark["source"]], int(mark["version"]))

    @property
    def ages(self) -> npt.NDArray[np.float64]:
        """Seconds [N] since each was added."""
        found: npt.NDArray[np.float64] = self.now - self.marks["time"]
        return found


class Replay:
    """Keeps the newest items within a budget of bytes and of age.

    Args:
        max_bytes: of all items' arrays.
        max_seconds: items older than this are dropped.
        alpha: exponent of priorities; 0 draws evenly.
        beta: exponent of the importance weights.
        seed: names the draws; equal seeds and equal calls give equal samples.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_seconds: float = float("inf"),
        alpha: float = 0.6,
        beta: float = 0.4,
        seed: int = 0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._max_bytes, self._max_seconds, self._alpha, self._beta = max_bytes, max_seconds, alpha, beta
        self._clock = clock
        self._random = np.random.Generator(np.random.PCG64(derive_seed(seed, "replay")))
        self._rows: npt.NDArray[np.void] = np.empty(0, np.dtype([]))
        self._columns: dict[str, Array] = {}
        self._capacity = 0
        self._times, self._strata = np.zeros(0), np.zeros(0)
        self._tree, self._weights = SumTree(1), np.zeros(1, np.float32)
        self._marks = np.zeros(0, _MARKS)
        self._sources: tuple[str, ...] = ()
        self._first, self._next = 0, 0
        self._largest = 1.0

    def __len__(self) -> int:
        return self._next - self._first

    @property
    def bytes(self) -> int:
        """Of all items that are kept."""
        return len(self) * self._rows.itemsize

    def add(self, item: Mapping[str, Array], provenance: Provenance, *, priority: float | None = None) -> int:
        """Keep an item, dropping the oldest where the budget asks for it; its arrays are copied.

        Args:
            priority: how much there is to learn from it; by default that of the most urgent item so far.

        Returns:
            The item's id; ids grow.

        Raises:
            ReplayError: it has other keys or shapes than the items before it, or is larger than the whole budget.
        """
        if not self._columns:
            self._open(item)
        self._check(item)
        now = self._expire()
        if len(self) == self._capacity:
            self._drop(1)
        number, place = self._next, self._next % self._capacity
        for key, column in self._columns.items():
            column[place] = item[key]
        self._marks[place] = (number, provenance.version, now, self._source(provenance.source))
        self._next += 1
        self.update([number], [self._largest if priority is None else priority])
        return number

    def sample(self, count: int) -> Sample:
        """Draw ``count`` items, at least one, by their priorities: with replacement, one from each of ``count`` equal
        shares.

        Raises:
            ReplayError: there are fewer items than that.
        """
        now = self._expire()
        if not 0 < count <= len(self):
            raise ReplayError(
                f"A batch of {count} items was asked for, and the replay holds {len(self)}.",
                remedy="Ask for a smaller batch, fill the replay first, or raise simic.replay_mb.",
            )
        if count != len(self._strata):
            self._strata = np.arange(count, dtype=np.float64)
        points = self._random.random(count)
        points += self._strata
        points *= self._tree.total / count
        places = self._tree.find(points)
        # ``take`` is the quickest of numpy's ways to gather.
        weights, marks = self._weights.take(places), self._marks.take(places)
        weights /= weights[weights.argmax()]
        columns = self._split(self._rows.take(places))
        return Sample(marks["id"], columns, weights, marks, self._sources, now)

    def update(self, ids: npt.ArrayLike, priorities: npt.ArrayLike) -> None:
        """Give items new priorities, finite and not negative; ids of items that are gone are skipped."""
        numbers, values = np.asarray(ids, np.int64), np.abs(np.asarray(priorities, np.float64)) + _FLOOR
        if not np.isfinite(values).all():
            raise ReplayError("A priority is no finite number.", why="What was learned from has diverged.")
        here = (numbers >= self._first) & (numbers < self._next)
        if here.any():
            self._largest = max(self._largest, float(values[here].max()))
            self._set(numbers[here] % self._capacity, values[here] ** self._alpha)

    def save(self, folder: Path) -> None:
        """Write everything to a folder, old or new and never half."""
        order = np.arange(self._first, self._next) % max(1, self._capacity)
        state = {
            "first": self._first,
            "next": self._next,
            "largest": self._largest,
            "random": self._random.bit_generator.state,
            "sources": self._sources,
        }
        arrays = {f"item/{key}": column[order] for key, column in self._columns.items()}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            state=np.asarray(json.dumps(state)),
            marks=self._marks[order],
            priorities=self._tree.get(order),
            **arrays,
        )
        atomic.write_bytes(folder / _FILE, buffer.getvalue())

    def load(self, folder: Path) -> bool:
        """Go on from a folder; False if it holds no replay. Of more items than fit, the newest are kept.

        Raises:
            CheckpointError: the file is damaged.
        """
        assert not self._columns, "a replay is loaded before anything is added"
        try:
            with np.load(folder / _FILE, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            state = json.loads(str(arrays["state"]))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise CheckpointError(
                f"The replay in {folder} is damaged.", why=f"{error}.", remedy=f"Remove {_FILE}; it fills again."
            ) from None
        self._random.bit_generator.state = state["random"]
        self._largest = state["largest"]
        columns = {name.removeprefix("item/"): each for name, each in arrays.items() if name.startswith("item/")}
        self._first = self._next = state["next"]
        self._sources = tuple(state["sources"])
        if not len(arrays["marks"]):
            return True
        self._open({key: column[0] for key, column in columns.items()})
        kept = min(len(arrays["marks"]), self._capacity)
        self._first = self._next - kept
        places = np.arange(self._first, self._next) % self._capacity
        for key, column in columns.items():
            self._columns[key][places] = column[-kept:]
        self._marks[places] = arrays["marks"][-kept:]
        self._set(places, arrays["priorities"][-kept:])
        return True

    def _open(self, item: Mapping[str, Array]) -> None:
        """Make the columns, for items like this one. The system gives their memory only when they are filled."""
        kind = np.dtype([(key, np.asarray(array).dtype, np.shape(array)) for key, array in item.items()], align=True)
        size = kind.itemsize
        if size > self._max_bytes or size == 0:
            raise ReplayError(
                f"An item of {size} bytes does not fit a replay of {self._max_bytes}.", remedy="Raise simic.replay_mb."
            )
        self._capacity = self._max_bytes // size
        self._rows = np.empty(self._capacity, kind)
        self._columns = self._split(self._rows)
        self._tree = SumTree(self._capacity)
        self._weights = np.zeros(self._capacity, np.float32)
        self._marks = np.zeros(self._capacity, _MARKS)
        self._times = self._marks["time"]

    def _source(self, name: str) -> int:
        """The number of a source's name."""
        if name not in self._sources:
            self._sources = (*self._sources, name)
        return self._sources.index(name)

    def _set(self, places: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> None:
        """Let items be drawn in proportion to ``shares``; their importance weights but for the scale."""
        self._tree.set(places, shares)
        self._weights[places] = shares**-self._beta

    @staticmethod
    def _split(rows: npt.NDArray[np.void]) -> dict[str, Array]:
        """The columns [N, ...] that rows are made of, as views."""
        return {key: rows[key] for key in rows.dtype.names or ()}

    def _check(self, item: Mapping[str, Array]) -> None:
        told = {key: np.shape(array) for key, array in item.items()}
        known = {key: column.shape[1:] for key, column in self._columns.items()}
        if told != known:
            raise ReplayError(
                f"An item with the arrays {told} came to a replay of {known}.", why="All items have the same shapes."
            )

    def _expire(self) -> float:
        """Drop what is too old; the present time in seconds."""
        now, count = self._now(), 0
        while count < len(self) and self._times.item((self._first + count) % self._capacity) < now - self._max_seconds:
            count += 1
        self._drop(count)
        return now

    def _drop(self, count: int) -> None:
        """The oldest ones."""
        if count:
            self._tree.set(np.arange(self._first, self._first + count) % self._capacity, 0.0)
            self._first += count

    def _now(self) -> float:
        return self._clock.now_ns() / 1e9
