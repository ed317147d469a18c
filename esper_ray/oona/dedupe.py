"""Once per event id: for handlers whose effect is a SQLite transaction of their own."""

from __future__ import annotations

import sqlite3

from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock

_SCHEMA = """
CREATE TABLE IF NOT EXISTS handled_events (event_id BLOB PRIMARY KEY, at_ns INTEGER NOT NULL) WITHOUT ROWID;
"""


class Deduplicator:
    """Remembers handled event ids in the effect's own database, so that both are committed or neither."""

    def __init__(self, database: sqlite3.Connection, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        database.execute(_SCHEMA)

    def first(self, transaction: sqlite3.Connection, event_id: bytes) -> bool:
        """Within the effect's transaction: note the id; False when the effect has been had before."""
        cursor = transaction.execute(
            "INSERT OR IGNORE INTO handled_events VALUES (?, ?)", (event_id, self._clock.now_ns())
        )
        return cursor.rowcount == 1

    def forget_before(self, transaction: sqlite3.Connection, at_ns: int) -> int:
        """Drop ids so old that nothing can bring them again; returns how many."""
        return transaction.execute("DELETE FROM handled_events WHERE at_ns < ?", (at_ns,)).rowcount
