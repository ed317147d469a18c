"""Where a sender keeps what it owes while the bus is away: a journal on disk, replayed in order.

Each sender has a spool of its own, locked while it lives. A new sender of the same source takes over what a dead
one left behind. The same file holds the ledger of what is on the bus and not yet acknowledged (`ledger`).
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from esper_ray.errors import EnvironmentFault
from esper_ray.oona.streams import EMERGENCY, STREAMS
from esper_ray.reliability.atomic import make_folder
from esper_ray.reliability.journal import Entry, Journal

_URGENT, _OTHER = "urgent", "other"
SENT = {stream: f"sent.{stream}" for stream in STREAMS}


@dataclass(frozen=True, slots=True)
class Sealed:
    """A signed envelope on its way: its stream, its event id, its bytes."""

    stream: str
    event_id: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Owed:
    """A spooled envelope and its number in the journal."""

    number: int
    message: Sealed


class Spool:
    """One sender's durable backlog; the file is made when it is first needed.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self._folder, self._source = make_folder(folder), source
        self._lock, self.path = self._own_name()
        self._opening = threading.Lock()
        self._journal: Journal | None = None
        self.count = self.urgent = 0
        if self.path.exists():
            self.recount()

    def add(self, messages: Sequence[Sealed]) -> None:
        """Make the messages durable, in order; one that is there already is not added twice."""
        journal = self._open()
        for name in (_URGENT, _OTHER):
            chosen = [message for message in messages if (message.stream == EMERGENCY) == (name == _URGENT)]
            if chosen:
                journal.append_many(name, [(message.event_id.hex(), _pack(message)) for message in chosen])
        self.recount()

    def head(self, limit: int) -> list[Owed]:
        """The oldest messages, emergencies before all others."""
        if self._journal is None:
            return []
        urgent = self._journal.read(_URGENT, limit=limit)
        entries = urgent or self._journal.read(_OTHER, limit=limit)
        return [Owed(entry.seq, _unpack(bytes.fromhex(entry.key or ""), entry.payload)) for entry in entries]

    def recount(self) -> None:
        """Count anew what is owed."""
        journal = self._open()
        self.urgent = journal.count(_URGENT)
        self.count = self.urgent + journal.count(_OTHER)

    def store(self, entries: Sequence[tuple[str, str, bytes]], removing: Sequence[int]) -> None:
        """Write entries (stream, key, bytes) of the ledger, and drop what has these numbers; any thread may.

        Raises:
            StorageFault: nothing of it is written.
        """
        self._open().write(((SENT[stream], key, data) for stream, key, data in entries), removing=removing)

    def stored(self, stream: str, *, after: int, limit: int) -> list[Entry]:
        """Entries of the ledger, oldest first."""
        return [] if self._journal is None else self._journal.read(SENT[stream], after=after, limit=limit)

    def count_stored(self) -> int:
        """How many entries the ledger has on disk."""
        return 0 if self._journal is None else sum(self._journal.count(name) for name in SENT.values())

    def adopt(self) -> int:
        """Take over what dead senders of this source left, ledgers included; returns how many messages they owed."""
        taken = 0
        for path in sorted(self._folder.glob(f"{self._source}-*.db")):
            if path == self.path:
                continue
            lock = _try_lock(path)
            if lock is not None:
                with lock:
                    taken += self._take_over(path)
        return taken

    def close(self) -> None:
        """Release the spool; an empty one leaves no file behind."""
        empty = not self.count and not self.count_stored()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
            if empty:
                _remove(self.path)
        if empty:
            _lock_path(self.path).unlink(missing_ok=True)
        self._lock.close()

    def _take_over(self, path: Path) -> int:
        left = Journal(path)
        messages = [
            _unpack(bytes.fromhex(entry.key or ""), entry.payload)
            for name in (_URGENT, _OTHER)
            for entry in left.read(name)
        ]
        if messages:
            self.add(messages)
        sent = [(stream, entry.key or "", entry.payload) for stream, name in SENT.items() for entry in left.read(name)]
        if sent:
            self.store(sent, ())
        left.close()
        _remove(path)
        _lock_path(path).unlink(missing_ok=True)
        return len(messages)

    def _own_name(self) -> tuple[IO[str], Path]:
        for number in range(1, 100):
            path = self._folder / f"{self._source}-{os.getpid()}{'' if number == 1 else f'.{number}'}.db"
            lock = _try_lock(path)
            if lock is not None:
                return lock, path
        raise EnvironmentFault(
            f"No spool can be made for {self._source} in {self._folder}.",
            why="All its names are locked by this process.",
            remedy="Close publishers that are no longer used.",
        )

    def _open(self) -> Journal:
        with self._opening:
            if self._journal is None:
                self._journal = Journal(self.path)
            return self._journal


def _pack(message: Sealed) -> bytes:
    return message.stream.encode() + b"\0" + message.data


def _unpack(event_id: bytes, packed: bytes) -> Sealed:
    stream, _, data = packed.partition(b"\0")
    return Sealed(stream.decode(), event_id, data)


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _try_lock(path: Path) -> IO[str] | None:
    file = _lock_path(path).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
