"""What all rooms lean on: the journal, atomic files, the breaker, restarts, names that become numbers."""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray import errors
from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.reliability import atomic
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import ManualClock
from esper_ray.reliability.ids import derive_seed, new_run_id
from esper_ray.reliability.journal import Journal
from esper_ray.reliability.restarts import Restarts

# The journal


def test_a_journal_keeps_its_streams_apart_and_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    journal.append("a", b"1")
    journal.append("b", b"2")
    journal.append("a", b"3")

    assert [entry.payload for entry in journal.read("a")] == [b"1", b"3"]
    assert journal.count("b") == 1


def test_the_same_key_keeps_the_first_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")

    assert journal.append("a", b"1", key="k") == journal.append("a", b"2", key="k")
    entry = journal.get("a", "k")
    assert entry is not None
    assert entry.payload == b"1"
    assert journal.get("a", "other") is None


def test_what_append_returned_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from esper_ray.reliability.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "[journal.append('a', str(n).encode()) for n in range(50)]\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "j.db"

    subprocess.run([sys.executable, "-c", script, str(path)], check=False)

    assert [entry.payload for entry in Journal(path).read("a")] == [str(n).encode() for n in range(50)]


def test_several_entries_are_all_there_or_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")

    with pytest.raises(sqlite3.Error):
        journal.append_many("a", [(None, b"1"), (None, None)])  # type: ignore[list-item]

    assert journal.count("a") == 0


def test_entries_no_longer_owed_are_dropped(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal(tmp_path / "j.db", clock=clock)
    first = journal.append("a", b"1")
    journal.append("a", b"2")
    clock.advance(10)
    journal.append("a", b"3")

    journal.remove([first])
    assert journal.remove_before("a", clock.now_ns()) == 1
    assert [entry.payload for entry in journal.read("a")] == [b"3"]


def test_a_damaged_journal_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    path.write_bytes(b"no database" * 1000)

    with pytest.raises(errors.EnvironmentFault, match="Cannot open the journal"):
        Journal(path)


# Atomic files


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    atomic.write_text(path, "old")
    atomic.write_text(path, "new", mode=0o600)

    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(errors.EnvironmentFault, match="No space left"):
        atomic.write_text(path, "new")

    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_folder_that_cannot_be_made_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(errors.EnvironmentFault, match="ESPER_HOME"):
        atomic.make_folder(tmp_path / "file" / "folder")


# The breaker


def test_a_breaker_opens_after_failures_and_lets_one_probe_through() -> None:
    clock = ManualClock()
    changes: list[str] = []
    breaker = Breaker("b", failures=2, open_seconds=10, clock=clock, on_change=lambda _, s: changes.append(s.name))

    breaker.failure()
    assert breaker.allow()
    breaker.failure()
    assert not breaker.allow()
    clock.advance(10)
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.failure()
    assert not breaker.allow()
    clock.advance(10)
    assert breaker.allow()
    breaker.success()

    assert breaker.state is CircuitBreakerState.CLOSED
    assert changes == ["OPEN", "HALF_OPEN", "OPEN", "HALF_OPEN", "CLOSED"]


# Restarts


def test_a_restart_is_seen_by_the_process_that_answers() -> None:
    restarts = Restarts()

    assert [restarts.seen("nissa", pid) for pid in (10, 10, 11, 12)] == [False, False, True, True]
    assert restarts.count("nissa") == 2


def test_what_keeps_dying_is_started_ever_more_slowly_but_for_ever() -> None:
    clock = ManualClock()
    restarts = Restarts(first_seconds=1, longest_seconds=4, clock=clock)
    pauses = []
    for _ in range(5):
        restarts.died("oona", "no room")
        waited = 0
        while not restarts.may_start("oona"):
            clock.advance(1)
            waited += 1
        pauses.append(waited)

    assert pauses == [0, 1, 2, 4, 4]
    assert restarts.error("oona") == "no room"
    restarts.seen("oona", 5)
    assert restarts.error("oona") == ""


# Names and errors


def test_a_named_seed_is_the_same_everywhere_and_differs_by_name() -> None:
    assert derive_seed(0, "data") == derive_seed(0, "data")
    assert len({derive_seed(0, "data"), derive_seed(1, "data"), derive_seed(0, "model"), derive_seed("0data")}) == 4
    assert 0 <= derive_seed(0, "data") < 2**63


def test_run_ids_are_short_and_unlike() -> None:
    assert len({new_run_id("glyphs") for _ in range(100)}) == 100
    assert len(new_run_id("a-very-long-name")) <= 15


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.RunError, errors.CorruptArtifact])
def test_an_error_survives_the_way_between_processes(kind: type[errors.EsperError]) -> None:
    error = pickle.loads(pickle.dumps(kind("What.", why="Why.", remedy="Do.")))

    assert type(error) is kind
    assert (error.what, error.why, error.remedy, str(error)) == ("What.", "Why.", "Do.", "What. Why. Do.")


def test_a_refusal_keeps_its_reason_between_processes() -> None:
    error = pickle.loads(pickle.dumps(errors.AuthenticityError("No.", reason="stale")))

    assert error.reason == "stale"
