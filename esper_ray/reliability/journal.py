"""The one durable log: what `append` has returned is on disk and survives a kill or a power cut.

SQLite in WAL mode with ``synchronous=FULL``. A journal holds several named streams; an entry may carry a key,
and the same key appended twice keeps the first entry, which makes every writer that uses request ids idempotent.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper_ray.errors import StorageFault
from esper_ray.reliability.atomic import make_folder
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.wal import LATEST_PAGES, PAGE_BYTES, Log

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    stream TEXT NOT NULL,
    key TEXT,
    at_ns INTEGER NOT NULL,
    payload BLOB NOT NULL,
    UNIQUE (stream, key)
);
CREATE INDEX IF NOT EXISTS entries_by_stream ON entries (stream, seq);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One journal entry; ``seq`` grows over all streams of the journal."""

    seq: int
    key: str | None
    at_ns: int
    payload: bytes


class Journal:
    """A durable append-only log in one SQLite file, safe for the threads of one process.

    Args:
        sync: each entry survives a power cut. Without it an entry survives a kill of the process, and after a power cut
            the last ones may be missing, never one in the middle: for a log that can be made again from its source.

    Raises:
        StorageFault: the file cannot be opened, or is damaged beyond SQLite's own recovery.
    """

    def __init__(self, path: Path, *, clock: Clock = SYSTEM_CLOCK, sync: bool = True) -> None:
        make_folder(path.parent)
        self.path, self._clock, self._lock = path, clock, threading.Lock()
        self._log = Log(path)
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
            self._db.execute(f"PRAGMA wal_autocheckpoint={LATEST_PAGES}")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StorageFault(
                f"Cannot open the journal {path}.",
                why=f"SQLite says: {error}.",
                remedy="Check the folder's permissions and free space; move a damaged file away to start a new one.",
            ) from error

    def append(self, stream: str, payload: bytes, *, key: str | None = None) -> int:
        """Make ``payload`` durable and return its sequence number (the first one's, for a repeated key)."""
        return self.append_many(stream, [(key, payload)])[0]

    def append_many(self, stream: str, items: Iterable[tuple[str | None, bytes]]) -> list[int]:
        """Append several entries in one commit.

        Raises:
            StorageFault: nothing of it is in the journal: the disk is full, or the file is locked or damaged.
        """
        return self.write((stream, key, payload) for key, payload in items)

    def write(self, items: Iterable[tuple[str, str | None, bytes]], *, removing: Sequence[int] = ()) -> list[int]:
        """Append entries (stream, key, payload) and drop those numbered ``removing``, all in one commit.

        Raises:
            StorageFault: as `append_many`; nothing was dropped either.
        """
        now, items = self._clock.now_ns(), list(items)
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                numbers = [self._insert(stream, key, now, payload) for stream, key, payload in items]
                self._db.executemany("DELETE FROM entries WHERE seq = ?", [(number,) for number in removing])
                passing("journal.inserted")
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                self._undo()
                raise StorageFault(
                    f"Cannot write the journal {self.path}.",
                    why=f"SQLite says: {error}.",
                    remedy="Free some space there; what was written before is whole.",
                ) from error
            except BaseException:
                self._undo()
                raise
            self._log.committed(sum(len(payload) for _, _, payload in items) + PAGE_BYTES * len(removing) // 8)
        passing("journal.committed")
        return numbers

    def _undo(self) -> None:
        # On a full disk SQLite has rolled back by itself.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _insert(self, stream: str, key: str | None, now: int, payload: bytes) -> int:
        cursor = self._db.execute(
            "INSERT INTO entries (stream, key, at_ns, payload) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (stream, key) DO NOTHING RETURNING seq",
            (stream, key, now, payload),
        )
        row = cursor.fetchone()
        if row is None:
            row = self._db.execute("SELECT seq FROM entries WHERE stream = ? AND key = ?", (stream, key)).fetchone()
        return int(row[0])

    def read(self, stream: str, *, after: int = 0, limit: int = -1) -> list[Entry]:
        """Entries of ``stream`` with ``seq > after``, oldest first; all of them unless ``limit`` is given."""
        with self._lock:
            rows = self._db.execute(
                "SELECT seq, key, at_ns, payload FROM entries WHERE stream = ? AND seq > ? ORDER BY seq LIMIT ?",
                (stream, after, limit),
            ).fetchall()
        return [Entry(*row) for row in rows]

    def get(self, stream: str, key: str) -> Entry | None:
        """The entry of that key, or None."""
        with self._lock:
            row = self._db.execute(
                "SELECT seq, key, at_ns, payload FROM entries WHERE stream = ? AND key = ?", (stream, key)
            ).fetchone()
        return Entry(*row) if row else None

    def streams(self, prefix: str) -> list[str]:
        """The names of the streams that begin with ``prefix``, in the order of their first entries."""
        query = "SELECT stream FROM entries WHERE substr(stream, 1, ?) = ? GROUP BY stream ORDER BY min(seq)"
        with self._lock:
            return [str(row[0]) for row in self._db.execute(query, (len(prefix), prefix))]

    def count(self, stream: str) -> int:
        """How many entries ``stream`` holds."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM entries WHERE stream = ?", (stream,)).fetchone()[0])

    def remove(self, numbers: Sequence[int]) -> None:
        """Drop entries that are no longer owed to anyone.

        Raises:
            StorageFault: all of them are still there.
        """
        self.write((), removing=numbers)

    def remove_before(self, stream: str, at_ns: int) -> int:
        """Drop the entries of ``stream`` older than ``at_ns``; returns how many."""
        with self._lock:
            return self._db.execute("DELETE FROM entries WHERE stream = ? AND at_ns < ?", (stream, at_ns)).rowcount

    def close(self) -> None:
        with self._lock:
            self._db.close()
