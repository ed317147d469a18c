"""Moves what lies in a write-ahead log into its database, beside the work instead of within a commit.

SQLite does it by itself inside the commit that makes the log too long: some 20 ms for whoever happens to write then.
Here one thread of the process does it, by a connection of its own. It is no part of any promise: what was committed is
in the log, and a log that nobody empties is emptied by SQLite after all, later (`LATEST_PAGES`).
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from pathlib import Path
from queue import SimpleQueue

PAGE_BYTES = 4096
USUAL_PAGES, LATEST_PAGES = 1000, 8000
_log = logging.getLogger(__name__)


class Log:
    """How much one database's log may hold by now; calls come under its owner's lock."""

    def __init__(self, path: Path) -> None:
        self._path, self._pages = path.absolute(), 0

    def committed(self, size: int) -> None:
        """A commit of ``size`` bytes of content; the pages of tables and indices around it are reckoned."""
        self._pages += 4 + size // PAGE_BYTES
        if self._pages >= USUAL_PAGES:
            self._pages = 0
            _worker.ask(self._path)


class _Worker:
    """The thread, started when it is first needed."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Path] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, path: Path) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="journal-wal", daemon=True)
            self._thread.start()
        self._asked.put(path)

    def _run(self) -> None:
        while True:
            path = self._asked.get()
            try:
                _empty(path)
            except sqlite3.Error as error:
                _log.debug("the log of %s was not emptied: %s", path, error)


def _empty(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1.0)) as database:
        database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


_worker = _Worker()
