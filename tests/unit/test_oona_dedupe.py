"""An effect and the note that it was had are committed together, or neither is."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from esper_ray.oona.dedupe import Deduplicator
from esper_ray.reliability.clock import ManualClock


def test_an_event_has_its_effect_once_and_a_failed_effect_is_not_noted(tmp_path: Path) -> None:
    clock = ManualClock()
    database = sqlite3.connect(tmp_path / "effects.db")
    database.execute("CREATE TABLE effects (what TEXT)")
    once = Deduplicator(database, clock=clock)

    def handle(event_id: bytes, *, fails: bool = False) -> None:
        with database:
            if once.first(database, event_id):
                database.execute("INSERT INTO effects VALUES ('done')")
                if fails:
                    raise RuntimeError("after the effect, before the commit")

    with pytest.raises(RuntimeError):
        handle(b"1", fails=True)
    for _ in range(3):
        handle(b"1")
    handle(b"2")
    assert database.execute("SELECT count(*) FROM effects").fetchone() == (2,)
    clock.advance(60)
    with database:
        assert once.forget_before(database, clock.now_ns()) == 2
    handle(b"1")
    assert database.execute("SELECT count(*) FROM effects").fetchone() == (3,)
    database.close()
