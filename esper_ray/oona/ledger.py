"""What is on the bus and not yet acknowledged by all its readers, on disk at its sender.

Redis may lose the last second of what it has accepted (``appendfsync everysec``). What must not be lost is therefore
kept here until its readers have had its effect, and sent again when a new life of the server does not have it. The
ledger shares the spool's file. A thread of its own writes it, because a commit waits for the disk and sending must not.
"""

from __future__ import annotations

import itertools
import logging
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from esper_ray.errors import EnvironmentFault
from esper_ray.oona.spool import Owed, Sealed, Spool
from esper_ray.oona.transport import order

log = logging.getLogger(__name__)

_PAGE = 512
_MOST_UNWRITTEN = 8192
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Sent:
    """A message on the bus: the id it has there, and the life of the server in which it was sent."""

    id: str
    run: str
    message: Sealed
    number: int = 0


class Ledger:
    """``note`` returns at once, and waits only where the disk is thousands of messages behind.

    Args:
        on_written: called after each commit, by the ledger's thread.
    """

    def __init__(self, spool: Spool, on_written: Callable[[], None]) -> None:
        self._spool, self._on_written = spool, on_written
        self._changed = threading.Condition()
        self._noted: deque[Sent] = deque()
        self._done: deque[int] = deque()
        self._writing = self._stop = False
        self._thread: threading.Thread | None = None
        self._settled: Counter[str] = Counter()  # by stream, the number of the last entry that is done with
        self.count = spool.count_stored()

    def note(self, sent: Sequence[Sent]) -> None:
        """These are on the bus now."""
        with self._changed:
            self._begin()
            self._changed.wait_for(lambda: len(self._noted) < _MOST_UNWRITTEN, _RETRY_SECONDS)
            self._noted.extend(sent)
            self.count += len(sent)
            self._changed.notify_all()

    def move(self, sent: Sequence[Sent], owed: Sequence[Owed]) -> None:
        """These were owed and are on the bus now. Waits for the disk.

        Raises:
            StorageFault: they are owed still.
        """
        self._spool.store([_pack(entry) for entry in sent], [item.number for item in owed])
        self._spool.recount()
        with self._changed:
            self.count += len(sent)

    def forget(self, sent: Sequence[Sent]) -> None:
        """These are done with."""
        with self._changed:
            self._begin()
            self._done.extend(entry.number for entry in sent)
            self.count -= len(sent)
            self._changed.notify_all()

    def written(self, timeout: float = 0.0) -> bool:
        """Whether all that was noted is on disk."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._noted or self._done or self._writing), timeout)

    def pages(self, stream: str) -> Iterator[list[Sent]]:
        """What is on disk of a stream and not settled, oldest first."""
        after = self._settled[stream]
        while page := self._spool.stored(stream, after=after, limit=_PAGE):
            after = page[-1].seq
            yield [_unpack(stream, entry.key or "", entry.payload, entry.seq) for entry in page]

    def settle(self, stream: str, floor: str) -> int:
        """Forget what is older than ``floor``; returns how many."""
        settled = 0
        for page in self.pages(stream):
            old = list(itertools.takewhile(lambda entry: order(entry.id) < order(floor), page))
            if old:
                self.forget(old)
                self._settled[stream] = old[-1].number
                settled += len(old)
            if len(old) < len(page):
                break
        return settled

    def close(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="oona-ledger", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._noted or self._done or self._stop)
                if not (self._noted or self._done):
                    return
                noted, done = list(self._noted), list(self._done)
                self._writing = True
            failed = not self._write(noted, done)
            with self._changed:
                self._writing = False
                if not failed:
                    for _ in noted:
                        self._noted.popleft()
                    for _ in done:
                        self._done.popleft()
                    self._changed.notify_all()
                elif self._stop:
                    return
                else:
                    self._changed.wait_for(lambda: self._stop, _RETRY_SECONDS)
            self._on_written()

    def _write(self, noted: Sequence[Sent], done: Sequence[int]) -> bool:
        try:
            self._spool.store([_pack(entry) for entry in noted], done)
        except (EnvironmentFault, sqlite3.Error) as error:
            log.error("%d sent messages could not be written down, this is tried again: %s", len(noted), error)
            return False
        return True


def _pack(entry: Sent) -> tuple[str, str, bytes]:
    key = f"{entry.message.event_id.hex()} {entry.id}"
    return entry.message.stream, key, f"{entry.run}\0".encode() + entry.message.data


def _unpack(stream: str, key: str, packed: bytes, number: int) -> Sent:
    event_id, _, id = key.partition(" ")
    run, _, data = packed.partition(b"\0")
    return Sent(id, run.decode(), Sealed(stream, bytes.fromhex(event_id), data), number)
