"""The bus inside one process: the same promises without a server, for tests and single-process tools."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from esper_ray.oona.transport import Appended, BusAway, DeadLetter, Delivery, GroupState, Settlement, StreamState
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock


@dataclass(slots=True)
class _Pending:
    since: float
    count: int


@dataclass(slots=True)
class _Group:
    last: int = 0
    pending: dict[int, _Pending] = field(default_factory=dict)


@dataclass(slots=True)
class _Stream:
    next: int = 1
    entries: dict[int, bytes] = field(default_factory=dict)
    groups: dict[str, _Group] = field(default_factory=dict)
    dead: list[DeadLetter] = field(default_factory=list)
    died: int = 0

    def add(self, data: bytes) -> int:
        id, self.next = self.next, self.next + 1
        self.entries[id] = data
        return id


class MemoryTransport:
    """Streams in dictionaries; ``away`` set to True makes every call fail as a lost server would."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.away = False
        self.run = uuid.uuid4().hex
        self._clock = clock
        self._changed = threading.Condition()
        self._streams: dict[str, _Stream] = {}
        self._depths: dict[str, int] = {}

    def append(self, batch: Sequence[tuple[str, bytes]]) -> Appended:
        with self._changed:
            ids = [self._stream(name).add(data) for name, data in batch]
            self._changed.notify_all()
            return Appended([str(id) for id in ids], dict(self._depths))

    def settled(self, streams: Sequence[str]) -> Settlement:
        with self._changed:
            self._check()
            return Settlement(self.run, {name: str(_floor(self._stream(name))) for name in streams})

    def missing(self, stream: str, ids: Sequence[str]) -> set[str]:
        with self._changed:
            held = self._stream(stream).entries
            return {id for id in ids if int(id) not in held}

    def ensure_group(self, group: str, streams: Sequence[str]) -> None:
        with self._changed:
            for name in streams:
                self._stream(name).groups.setdefault(group, _Group())

    def read(
        self, group: str, consumer: str, streams: Sequence[str], *, count: int, block_ms: int = 0
    ) -> list[Delivery]:
        assert consumer, "a reader has a name"
        with self._changed:
            found = self._unseen(group, streams, count)
            if not found and block_ms:
                self._changed.wait(block_ms / 1000)
                found = self._unseen(group, streams, count)
            return found

    def claim(self, group: str, consumer: str, stream: str, *, idle_ms: int, count: int) -> list[Delivery]:
        assert consumer, "a reader has a name"
        with self._changed:
            source, now = self._stream(stream), self._clock.monotonic()
            pending = self._group(source, group).pending
            due = [id for id, entry in sorted(pending.items()) if (now - entry.since) * 1000 >= idle_ms][:count]
            for id in due:
                pending[id] = _Pending(now, pending[id].count + 1)
            return [Delivery(stream, str(id), source.entries[id], pending[id].count) for id in due]

    def ack(self, group: str, stream: str, ids: Sequence[str]) -> None:
        with self._changed:
            pending = self._group(self._stream(stream), group).pending
            for id in ids:
                pending.pop(int(id), None)

    def bury(self, group: str, delivery: Delivery, reason: str) -> None:
        with self._changed:
            stream = self._stream(delivery.stream)
            stream.died += 1
            stream.dead.append(DeadLetter(str(stream.died), delivery.data, reason, group, delivery.count))
            self._group(stream, group).pending.pop(int(delivery.id), None)

    def dead_letters(self, stream: str, *, count: int = 100, after: str = "") -> list[DeadLetter]:
        with self._changed:
            return [letter for letter in self._stream(stream).dead if int(letter.id) > int(after or 0)][:count]

    def revive(self, stream: str, id: str) -> bool:
        with self._changed:
            letter = self._take_dead(stream, id)
            if letter is not None:
                self._stream(stream).add(letter.data)
                self._changed.notify_all()
            return letter is not None

    def drop_dead(self, stream: str, id: str) -> bool:
        with self._changed:
            return self._take_dead(stream, id) is not None

    def _take_dead(self, stream: str, id: str) -> DeadLetter | None:
        dead = self._stream(stream).dead
        letter = next((letter for letter in dead if letter.id == id), None)
        if letter is not None:
            dead.remove(letter)
        return letter

    def trim_dead(self, stream: str, *, keep: int) -> int:
        with self._changed:
            dead = self._stream(stream).dead
            beyond = max(0, len(dead) - keep)
            del dead[:beyond]
            return beyond

    def trim(self, stream: str, *, keep: int) -> int:
        with self._changed:
            source = self._stream(stream)
            owed = _floor(source) if source.groups else source.next - keep
            done = [id for id in source.entries if id < owed]
            for id in done:
                del source.entries[id]
            return len(done)

    def state(self, stream: str) -> StreamState:
        with self._changed:
            source, now = self._stream(stream), self._clock.monotonic()
            groups = {
                name: GroupState(
                    len(group.pending), max((now - entry.since for entry in group.pending.values()), default=0.0)
                )
                for name, group in source.groups.items()
            }
            length = len(source.entries)
            return StreamState(length if groups else 0, length, len(source.dead), groups)

    def announce(self, depths: Mapping[str, int], *, seconds: int) -> None:
        assert seconds > 0, "an announcement lasts"
        with self._changed:
            self._check()
            self._depths = dict(depths)

    def ping(self) -> None:
        self._check()

    def close(self) -> None:
        """Nothing to give back."""

    def _check(self) -> None:
        if self.away:
            raise BusAway("The bus cannot be used.", why="It was switched away.")

    def _stream(self, name: str) -> _Stream:
        self._check()
        return self._streams.setdefault(name, _Stream())

    @staticmethod
    def _group(stream: _Stream, name: str) -> _Group:
        return stream.groups.setdefault(name, _Group())

    def _unseen(self, group: str, streams: Sequence[str], count: int) -> list[Delivery]:
        found: list[Delivery] = []
        now = self._clock.monotonic()
        for name in streams:
            stream = self._stream(name)
            state = self._group(stream, group)
            for id in [id for id in stream.entries if id > state.last][:count]:
                state.last = id
                state.pending[id] = _Pending(now, 1)
                found.append(Delivery(name, str(id), stream.entries[id], 1))
        return found


def _floor(stream: _Stream) -> int:
    """With no group, what is gone is kept for nobody."""
    first = min(stream.entries, default=stream.next)
    return min((_first_owed(group) for group in stream.groups.values()), default=first)


def _first_owed(group: _Group) -> int:
    return min(group.pending, default=group.last + 1)
