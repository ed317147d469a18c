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


class Transport(Protocol):
    def append(self, batch: Sequence[tuple[str, bytes]]) -> Mapping[str, int]:
        """Add (stream, envelope) pairs in order; returns the depths that the keeper last announced."""
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

    def dead_letters(self, stream: str, *, count: int = 100) -> list[DeadLetter]: ...

    def trim(self, stream: str, *, keep: int) -> int:
        """Remove what all groups have acknowledged; with no group, all but the newest ``keep``."""
        ...

    def state(self, stream: str) -> StreamState: ...

    def announce(self, depths: Mapping[str, int], *, seconds: int) -> None:
        """Tell all senders how deep the streams are; forgotten after ``seconds``."""
        ...

    def ping(self) -> None: ...

    def close(self) -> None: ...
