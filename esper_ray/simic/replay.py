"""Prioritised replay (Schaul et al. 2016) of whole trajectory segments, in numpy. No torch.

Items are dictionaries of arrays. They lie in columns, one array per key and slot count, so that a sample is one
indexing operation for each key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
_FIRST_SLOTS = 64
_FILE = "replay.npz"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an item comes from: the run or worker, and the version of the policy that acted."""

    source: str
    version: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Drawn items.

    Attributes:
        ids: to give new priorities by.
        items: their arrays.
        weights: float32 [N], importance weights, the largest 1.
        provenance: where each comes from.
        ages: seconds since each was added.
    """

    ids: tuple[int, ...]
    items: tuple[dict[str, Array], ...]
    weights: npt.NDArray[np.float32]
    provenance: tuple[Provenance, ...]
    ages: npt.NDArray[np.float64]


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
        self._columns: dict[str, Array] = {}
        self._capacity = 0
        self._tree = SumTree(1)
        self._times = np.zeros(0)
        self._origins: list[Provenance | None] = []
        self._first, self._next = 0, 0
        self._largest = 1.0

    def __len__(self) -> int:
        return self._next - self._first

    @property
    def bytes(self) -> int:
        """Of all items that are kept."""
        return len(self) * sum(int(column[0].nbytes) for column in self._columns.values())

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
        self._expire()
        if len(self) == self._capacity:
            self._drop(1)
        number, place = self._next, self._next % self._capacity
        for key, column in self._columns.items():
            column[place] = item[key]
        self._times[place] = self._now()
        self._origins[place] = provenance
        self._next += 1
        self.update([number], [self._largest if priority is None else priority])
        return number

    def sample(self, count: int) -> Sample:
        """Draw ``count`` items by their priorities, with replacement, one from each of ``count`` equal shares.

        Raises:
            ReplayError: there are fewer items than that.
        """
        self._expire()
        if count > len(self):
            raise ReplayError(
                f"A batch of {count} items was asked for, and the replay holds {len(self)}.",
                remedy="Ask for a smaller batch, fill the replay first, or raise simic.replay_mb.",
            )
        total = self._tree.total
        points = (np.arange(count) + self._random.random(count)) * (total / max(1, count))
        places = self._tree.find(points)
        probabilities = self._tree.get(places) / total
        weights = (len(self) * probabilities) ** -self._beta
        lowest = self._first + (places - self._first) % self._capacity
        drawn = {key: column[places] for key, column in self._columns.items()}
        return Sample(
            ids=tuple(lowest.tolist()),
            items=tuple({key: array[row] for key, array in drawn.items()} for row in range(count)),
            weights=(weights / weights.max(initial=1e-12)).astype(np.float32),
            provenance=tuple(self._origin(place) for place in places.tolist()),
            ages=self._now() - self._times[places],
        )

    def update(self, ids: npt.ArrayLike, priorities: npt.ArrayLike) -> None:
        """Give items new priorities, finite and not negative; ids of items that are gone are skipped."""
        numbers, values = np.asarray(ids, np.int64), np.abs(np.asarray(priorities, np.float64)) + _FLOOR
        if not np.isfinite(values).all():
            raise ReplayError("A priority is no finite number.", why="What was learned from has diverged.")
        here = (numbers >= self._first) & (numbers < self._next)
        if here.any():
            self._largest = max(self._largest, float(values[here].max()))
            self._tree.set(numbers[here] % self._capacity, values[here] ** self._alpha)

    def save(self, folder: Path) -> None:
        """Write everything to a folder, old or new and never half."""
        order = np.arange(self._first, self._next) % max(1, self._capacity)
        state = {
            "first": self._first,
            "next": self._next,
            "largest": self._largest,
            "random": self._random.bit_generator.state,
            "origins": [asdict(self._origin(place)) for place in order.tolist()],
        }
        arrays = {f"item/{key}": column[order] for key, column in self._columns.items()}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            state=np.asarray(json.dumps(state)),
            times=self._times[order],
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
        if not len(arrays["times"]):
            return True
        self._open({key: column[0] for key, column in columns.items()})
        kept = min(len(arrays["times"]), self._capacity)
        self._first = self._next - kept
        places = np.arange(self._first, self._next) % self._capacity
        for key, column in columns.items():
            self._columns[key][places] = column[-kept:]
        self._times[places] = arrays["times"][-kept:]
        self._tree.set(places, arrays["priorities"][-kept:])
        for place, told in zip(places.tolist(), state["origins"][-kept:], strict=True):
            self._origins[place] = Provenance(**told)
        return True

    def _open(self, item: Mapping[str, Array]) -> None:
        """Make the columns, for items like this one. The system gives their memory only when they are filled."""
        size = sum(np.asarray(array).nbytes for array in item.values())
        if size > self._max_bytes or size == 0:
            raise ReplayError(
                f"An item of {size} bytes does not fit a replay of {self._max_bytes}.", remedy="Raise simic.replay_mb."
            )
        self._capacity = self._max_bytes // size
        self._columns = {
            key: np.empty((self._capacity, *np.shape(array)), np.asarray(array).dtype) for key, array in item.items()
        }
        self._tree = SumTree(self._capacity)
        self._times = np.zeros(self._capacity)
        self._origins = [None] * self._capacity

    def _check(self, item: Mapping[str, Array]) -> None:
        told = {key: np.shape(array) for key, array in item.items()}
        known = {key: column.shape[1:] for key, column in self._columns.items()}
        if told != known:
            raise ReplayError(
                f"An item with the arrays {told} came to a replay of {known}.", why="All items have the same shapes."
            )

    def _origin(self, place: int) -> Provenance:
        found = self._origins[place]
        assert found is not None
        return found

    def _expire(self) -> None:
        before = self._now() - self._max_seconds
        count = 0
        while count < len(self) and self._times[(self._first + count) % self._capacity] < before:
            count += 1
        self._drop(count)

    def _drop(self, count: int) -> None:
        """The oldest ones."""
        if count:
            self._tree.set(np.arange(self._first, self._first + count) % self._capacity, 0.0)
            self._first += count

    def _now(self) -> float:
        return self._clock.now_ns() / 1e9
