"""The event store: every record, searchable by text, and replayed when Nissa starts.

One interface, two implementations: SQLite with full-text search inside the process, and Elasticsearch 8
(`elastic`). An event id is kept once, however often it arrives.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esper_ray.config import Config
from esper_ray.contracts.enums import BusMessageType, TelemetryLevel
from esper_ray.errors import EnvironmentFault
from esper_ray.nissa.records import Record
from esper_ray.reliability.atomic import make_folder

ENVIRONMENT_URL = "ESPER_ELASTICSEARCH_URL"
RETENTION_DAYS = 7
_REPLAY_PAGE = 1000


@dataclass(frozen=True, slots=True)
class StoreState:
    """``dropped`` counts records that never reached the store; ``waiting`` those on their way."""

    how: str
    reachable: bool
    waiting: int
    dropped: int


class EventStore(Protocol):
    def put(self, record: Record) -> bool:
        """Keep a record; False when its event id is known already."""
        ...

    def search(
        self, text: str = "", *, run: str = "", kind: str = "", since_ns: int = 0, limit: int = 100
    ) -> list[Record]:
        """The newest records that contain all the words (as prefixes) and match the filters, newest first."""
        ...

    def replay(self, *, since_ns: int = 0) -> Iterator[Record]:
        """All records since then, oldest first."""
        ...

    def prune(self, before_ns: int) -> int:
        """Remove what is older; returns how many (0 where the store does that by itself)."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until all that was put can be found."""
        ...

    def state(self) -> StoreState: ...

    def close(self) -> None: ...


def open_store(config: Config) -> EventStore:
    """The store of this configuration: Elasticsearch where one is given, else the embedded one.

    Raises:
        EnvironmentFault: it cannot be used.
    """
    url = config.nissa.elasticsearch_url or os.environ.get(ENVIRONMENT_URL, "")
    if not url:
        return SqliteStore(config.home / "nissa" / "events.db")
    from esper_ray.nissa.elastic import ElasticStore  # only where it is used: importing the client costs 0.3 s

    return ElasticStore(url, namespace=config.ray.namespace)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    event_id BLOB NOT NULL UNIQUE,
    at_ns INTEGER NOT NULL,
    type INTEGER NOT NULL,
    source TEXT NOT NULL,
    run TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    level INTEGER NOT NULL,
    kinds TEXT NOT NULL,
    text TEXT NOT NULL,
    payload BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_time ON events (at_ns);
CREATE INDEX IF NOT EXISTS events_by_run ON events (run, at_ns);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, content='events', content_rowid='id', prefix='2 3');
CREATE TRIGGER IF NOT EXISTS events_added AFTER INSERT ON events BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER IF NOT EXISTS events_removed AFTER DELETE ON events BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
END;
"""
_COLUMNS = "event_id, at_ns, type, source, run, epoch, level, kinds, text, payload"


class SqliteStore:
    """The embedded store.

    ``synchronous=NORMAL``: what is acknowledged survives the death of the process; a power cut may take the last
    records, and these are observations, not commands.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path, self._lock = path, threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise EnvironmentFault(
                f"Cannot open the event store {path}.",
                why=f"SQLite says: {error}.",
                remedy="Check the folder's permissions and free space; move a damaged file away to start a new one.",
            ) from error

    def put(self, record: Record) -> bool:
        row = (
            record.event_id,
            record.at_ns,
            int(record.type),
            record.source,
            record.run,
            record.epoch,
            int(record.level),
            f" {' '.join(record.kinds)} ",
            record.text,
            record.payload,
        )
        with self._lock:
            cursor = self._db.execute(
                f"INSERT INTO events ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT (event_id) DO NOTHING", row
            )
            return cursor.rowcount == 1

    def search(
        self, text: str = "", *, run: str = "", kind: str = "", since_ns: int = 0, limit: int = 100
    ) -> list[Record]:
        conditions, values = ["at_ns >= ?"], [since_ns]  # type: tuple[list[str], list[object]]
        if run:
            conditions.append("run = ?")
            values.append(run)
        if kind:
            conditions.append("kinds LIKE ?")
            values.append(f"% {kind} %")
        if words := search_words(text):
            conditions.append("id IN (SELECT rowid FROM words WHERE words MATCH ?)")
            values.append(" ".join(f'"{word}"*' for word in words))
        query = f"SELECT {_COLUMNS} FROM events WHERE {' AND '.join(conditions)} ORDER BY at_ns DESC, id DESC LIMIT ?"
        with self._lock:
            return [_from_row(row) for row in self._db.execute(query, (*values, limit))]

    def replay(self, *, since_ns: int = 0) -> Iterator[Record]:
        after = 0
        while True:
            with self._lock:
                rows = self._db.execute(
                    f"SELECT {_COLUMNS}, id FROM events WHERE id > ? AND at_ns >= ? ORDER BY id LIMIT ?",
                    (after, since_ns, _REPLAY_PAGE),
                ).fetchall()
            if not rows:
                return
            after = rows[-1][-1]
            yield from (_from_row(row[:-1]) for row in rows)

    def prune(self, before_ns: int) -> int:
        with self._lock:
            return self._db.execute("DELETE FROM events WHERE at_ns < ?", (before_ns,)).rowcount

    def flush(self, timeout: float) -> bool:
        del timeout
        return True

    def state(self) -> StoreState:
        return StoreState(f"embedded full-text store ({self._path})", reachable=True, waiting=0, dropped=0)

    def close(self) -> None:
        with self._lock:
            self._db.close()


def search_words(text: str) -> list[str]:
    """The words of a query, without anything that a query language could mistake."""
    return re.findall(r"[\w]+", text)


def _from_row(row: tuple[object, ...]) -> Record:
    event_id, at_ns, type, source, run, epoch, level, kinds, text, payload = row
    assert isinstance(event_id, bytes)
    assert isinstance(payload, bytes)
    return Record(
        event_id=event_id,
        at_ns=int(str(at_ns)),
        type=BusMessageType(int(str(type))),
        source=str(source),
        run=str(run),
        epoch=int(str(epoch)),
        level=TelemetryLevel(int(str(level))),
        kinds=tuple(str(kinds).split()),
        text=str(text),
        payload=payload,
    )
