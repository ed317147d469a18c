"""What the bus needs from whatever carries it; `RedisTransport` and `MemoryTransport` provide it.

Stream names are those of `streams`; a transport adds the namespace. Every method may raise `BusAway`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from esper_ray.errors import BusError


class BusAway(BusError):
    """The carrier cannot be reached, does not answer in time, or refuses to take messages."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message handed to a reader; ``count`` is how often it was handed out, this time included."""

    stream: str
    id: str
    data: bytes
    count: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that nobody could use: the envelope's bytes and why."""

    id: str
    data: bytes
    reason: str
    group: str
    deliveries: int


@dataclass(frozen=True, slots=True)
class GroupState:
    """One consumer group: handed out but not acknowledged, and how long the oldest of these waits."""

    pending: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class StreamState:
    """``depth`` is what some group has still to acknowledge; 0 where no group exists."""

    depth: int
    length: int
    dead: int
    groups: Mapping[str, GroupState]


@dataclass(frozen=True, slots=True)
class Appended:
    """The ids of what was added, in order, and the depths that the keeper last announced."""

    ids: Sequence[str]
    depths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Settlement:
    """How far the readers are.

    ``run`` names this life of the server: another one may have lost what the one before had accepted. ``floors`` has
    for each stream an id; whatever is older is done with, acknowledged by all groups or kept for none.
    """

    run: str
    floors: Mapping[str, str]


def order(id: str) -> tuple[int, ...]:
    """Ids compare in the order in which they were given."""
    return tuple(int(part) for part in id.split("-"))


class Transport(Protocol):
    def append(self, batch: Sequence[tuple[str, bytes]]) -> Appended:
        """Add (stream, envelope) pairs in order."""
        ...

    def settled(self, streams: Sequence[str]) -> Settlement:
        """Which messages of these streams nobody needs any more."""
        ...

    def missing(self, stream: str, ids: Sequence[str]) -> set[str]:
        """Those of the ids that the stream does not hold (any more)."""
        ...

    def ensure_group(self, group: str, streams: Sequence[str]) -> None:
        """Create the group where it is missing; it starts with the oldest message that is still there."""
        ...

    def read(
        self, group: str, consumer: str, streams: Sequence[str], *, count: int, block_ms: int = 0
    ) -> list[Delivery]:
        """Messages that the group has not seen, in the order of ``streams``; 0 does not wait."""
        ...

    def claim(self, group: str, consumer: str, stream: str, *, idle_ms: int, count: int) -> list[Delivery]:
        """Take over what was handed out at least ``idle_ms`` ago and never acknowledged."""
        ...

    def ack(self, group: str, stream: str, ids: Sequence[str]) -> None: ...

    def bury(self, group: str, delivery: Delivery, reason: str) -> None:
        """Move a message to the stream's dead letters and acknowledge it, both or neither."""
        ...

    def dead_letters(self, stream: str, *, count: int = 100, after: str = "") -> list[DeadLetter]:
        """The oldest dead letters of a stream, or the oldest behind the one of that id."""
        ...

    def revive(self, stream: str, id: str) -> bool:
        """Move a dead letter back to its stream, once; False when there is none of that id."""
        ...

    def drop_dead(self, stream: str, id: str) -> bool:
        """Remove a dead letter for good; False when there is none of that id."""
        ...

    def trim_dead(self, stream: str, *, keep: int) -> int:
        """Remove all dead letters of a stream but the newest ``keep``; returns how many."""
        ...

    def trim(self, stream: str, *, keep: int) -> int:
        """Remove what all groups have acknowledged; with no group, all but the newest ``keep``."""
        ...

    def state(self, stream: str) -> StreamState: ...

    def announce(self, depths: Mapping[str, int], *, seconds: int) -> None:
        """Tell all senders how deep the streams are; forgotten after ``seconds``."""
        ...

    def ping(self) -> None: ...

    def close(self) -> None: ...
