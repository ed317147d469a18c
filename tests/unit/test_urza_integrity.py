"""Urza's artifacts are what they were, or it is said by name what became of them, and they are made again."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper_ray.contracts import codec
from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.contracts.ports import Kernel
from esper_ray.contracts.telemetry import EVENT_KINDS
from esper_ray.errors import CorruptArtifact, EnvironmentFault, KernelMissing, StoreUnavailable
from esper_ray.reliability import atomic
from esper_ray.urza import artifacts
from esper_ray.urza.checks import Finding
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, OTHER, SPEC, file_of, fill, reopened, spec, weights


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "urza")
    yield store
    store.close()


def flip_a_byte(store: Store, kernel: Kernel) -> None:
    path = file_of(store, kernel.digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(store: Store, kernel: Kernel) -> None:
    path = file_of(store, kernel.digest)
    path.write_bytes(path.read_bytes()[:-1])


def remove(store: Store, kernel: Kernel) -> None:
    file_of(store, kernel.digest).unlink()


def swap(store: Store, kernel: Kernel) -> None:
    """Another whole artifact of the same size in its place."""
    other = store.put(OTHER, weights(3, 4), METADATA)
    shutil.copyfile(file_of(store, other.digest), file_of(store, kernel.digest))


def give_to_another(store: Store, kernel: Kernel) -> None:
    """The file is whole and under its own name, but the catalogue says that it is another kernel."""
    with sqlite3.connect(store.folder / "catalog.db") as db:
        db.execute("UPDATE kernels SET key = ? WHERE digest = ?", (spec(7).key, kernel.digest))
    db.close()


DAMAGES = [
    (flip_a_byte, "damaged", "Its digest is"),
    (truncate, "damaged", "bytes where"),
    (remove, "row without file", "The catalogue names it"),
    (swap, "swapped", f"It holds the artifact of {OTHER.key} v1"),
    (give_to_another, "swapped", f"it is {SPEC.key}"),
]


@pytest.mark.parametrize(("damage", "kind", "why"), DAMAGES)
def test_damage_is_named_by_verify_and_healed_by_making_the_kernel_again(
    store: Store, damage: Callable[[Store, Kernel], None], kind: str, why: str
) -> None:
    kernel = store.put(SPEC, weights(1, 2), METADATA)
    sound = store.put(spec(1), weights(1), METADATA)
    damage(store, kernel)
    report = store.verify()
    (found,) = report.findings
    assert not report.holds
    assert (found.kind, found.digest) == (kind, kernel.digest)
    assert why in found.why
    assert found.path == str(file_of(store, kernel.digest))
    assert (found.blueprint, found.signature) == (SPEC.blueprint, str(SPEC.signature))
    assert [each.digest for each in store.heal(report.findings)] == [kernel.digest]
    assert store.verify().findings == ()
    with pytest.raises(KernelMissing, match="version 1 was withdrawn"):
        store.get(SPEC if damage is not give_to_another else spec(7))
    assert [(each.version, each.why) for each in store.withdrawals()] == [(1, found.why)]
    assert store.put(SPEC, weights(1, 2), METADATA) == kernel
    assert store.list(blueprint=SPEC.blueprint)[0].version == (2 if damage is not give_to_another else 1)
    assert store.get_digest(sound.digest) == sound
    assert store.verify().holds


@pytest.mark.parametrize(("damage", "kind", "why"), DAMAGES)
def test_damage_is_refused_on_admission_once_and_is_missing_from_then_on(
    tmp_path: Path, damage: Callable[[Store, Kernel], None], kind: str, why: str
) -> None:
    lost: list[Finding] = []
    store = Store(tmp_path, cache_bytes=0, on_loss=lost.extend)
    kernel = store.put(SPEC, weights(1, 2), METADATA)
    older = store.put(spec(1), weights(1), METADATA)
    damage(store, kernel)
    with pytest.raises(CorruptArtifact, match=kernel.digest) as told:
        store.get_digest(kernel.digest)
    assert why in str(told.value)
    assert "esper urza verify --heal" in str(told.value)
    assert [(each.kind, each.digest) for each in lost] == [(kind, kernel.digest)]
    with pytest.raises(KernelMissing):
        store.get_digest(kernel.digest)
    assert store.get_digest(older.digest) == older
    assert store.breaker.state is CircuitBreakerState.CLOSED
    stats = store.stats()
    assert (stats["corrupt"], stats["missing"], stats["unavailable"]) == (1, 1, 0)
    assert store.verify().findings == ()
    store.close()


def test_what_was_withdrawn_is_told_on_the_bus_by_name(tmp_path: Path) -> None:
    sent: list[bytes] = []

    class Outbox:
        def publish(self, type, payload, **_) -> None:
            sent.append(payload)

    store = Store(tmp_path, publisher=Outbox())
    kernel = store.put(SPEC, weights(1, 2), METADATA)
    flip_a_byte(store, kernel)
    store.heal(store.verify().findings)
    (told,) = [item for payload in sent for item in codec.decode_telemetry(payload).events]
    assert told.kind == "artifact.withdrawn"
    assert told.kind in EVENT_KINDS
    assert (told.attributes["kernel"], told.attributes["kind"]) == (f"{SPEC.key} v1", "damaged")
    assert told.attributes["reason"].startswith("Its digest is")
    store.close()


def test_an_older_version_is_served_when_the_newest_was_withdrawn(store: Store) -> None:
    first = store.put(SPEC, weights(1), METADATA)
    second = store.put(SPEC, weights(2), METADATA)
    truncate(store, second)
    again = reopened(store)
    assert [each.digest for each in again.recovered] == [second.digest]
    assert again.get(SPEC) == first
    assert again.put(SPEC, weights(3), METADATA) == again.get(SPEC)
    assert [row.version for row in again.list()] == [1, 3]
    again.close()


def test_a_put_that_mends_a_file_is_not_undone_by_what_was_found_before(store: Store) -> None:
    kernel = store.put(SPEC, weights(1, 2), METADATA)
    flip_a_byte(store, kernel)
    findings = store.verify().findings
    assert store.put(SPEC, weights(1, 2), METADATA) == kernel
    assert store.heal(findings) == []
    assert store.verify().holds
    assert [row.version for row in store.list()] == [1]


def test_opening_withdraws_rows_whose_file_is_gone_or_cut_off_and_removes_drafts(store: Store) -> None:
    gone, cut, sound = (store.put(spec(n), weights(n), METADATA) for n in range(3))
    remove(store, gone)
    truncate(store, cut)
    draft = file_of(store, sound.digest).with_name(f".{sound.digest}.1234.tmp")
    draft.write_bytes(b"half")
    again = reopened(store)
    assert {(each.kind, each.digest) for each in again.recovered} == {
        ("row without file", gone.digest),
        ("damaged", cut.digest),
    }
    assert not draft.exists()
    assert again.get_digest(sound.digest) == sound
    assert again.verify().findings == ()
    last = reopened(again)
    assert last.recovered == []
    last.close()


def test_a_file_that_no_row_names_is_harmless_reported_and_removed_by_healing(store: Store) -> None:
    stray = artifacts.pack(SPEC, weights(5), METADATA)
    path = file_of(store, stray.digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(stray.weights)
    again = reopened(store)
    report = again.verify()
    assert report.of("file without row") == (stray.digest,)
    assert report.holds
    with pytest.raises(KernelMissing):
        again.get_digest(stray.digest)
    assert len(again.heal(report.findings)) == 1
    assert not path.exists()
    assert again.withdrawals() == []
    again.close()


def test_a_stray_file_that_was_put_meanwhile_is_kept(store: Store) -> None:
    stray = artifacts.pack(SPEC, weights(5), METADATA)
    path = file_of(store, stray.digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(stray.weights)
    findings = store.verify().findings
    store.put(SPEC, weights(5), METADATA)
    assert store.heal(findings) == []
    assert store.get(SPEC).digest == stray.digest
    assert path.exists()


def test_a_damaged_catalogue_is_said_and_starts_anew_when_it_is_moved_away(store: Store) -> None:
    fill(store, 50)
    store.close()
    path = store.folder / "catalog.db"
    path.write_bytes(os.urandom(4096) + path.read_bytes()[4096:])
    with pytest.raises(EnvironmentFault, match="move a damaged catalogue away"):
        Store(store.folder)
    path.unlink()
    again = Store(store.folder)
    assert len(again.verify().of("file without row")) == 50
    assert len(again.heal(again.verify().findings)) == 50
    fill(again, 3)
    assert again.verify().sound == 3
    again.close()


def test_a_catalogue_whose_inner_pages_are_damaged_fails_verification(store: Store) -> None:
    fill(store, 200)
    store.close()
    path = store.folder / "catalog.db"
    data = bytearray(path.read_bytes())
    data[-4096 * 8 :] = os.urandom(4096 * 8)
    path.write_bytes(data)
    try:
        again = Store(store.folder)
    except EnvironmentFault:
        return
    with pytest.raises(StoreUnavailable):
        again.verify()
    again.close()


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_refuses_what_is_new_and_goes_on_serving(store: Store, step: str, monkeypatch) -> None:
    kernel = store.put(SPEC, weights(1), METADATA)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, step, full)
        for _ in range(4):
            with pytest.raises(StoreUnavailable):
                store.put(OTHER, weights(2), METADATA)
    assert store.write_breaker.state is CircuitBreakerState.OPEN
    with pytest.raises(KernelMissing):
        store.get(OTHER)
    store.cache.put(kernel)
    again = reopened(store)
    assert again.get(SPEC) == kernel
    assert again.verify().findings == ()
    assert again.put(OTHER, weights(2), METADATA) == again.get(OTHER)
    again.close()


def test_two_processes_with_the_same_folder_keep_each_others_artifacts(tmp_path: Path) -> None:
    one, two = Store(tmp_path), Store(tmp_path)
    kernels = [store.put(SPEC, weights(number), METADATA) for number in range(10) for store in (one, two)]
    assert {kernel.digest for kernel in kernels} == {row.digest for row in two.list()}
    assert [row.version for row in one.list()] == list(range(1, 11))
    damaged = kernels[0]
    flip_a_byte(one, damaged)
    findings = one.verify().findings
    assert two.put(SPEC, weights(0), METADATA) == damaged
    assert one.heal(findings) == []
    one.close()
    two.close()


def test_a_thousand_fetches_at_once_lose_nothing_while_kernels_are_stored_and_healed(tmp_path: Path) -> None:
    store = Store(tmp_path, cache_bytes=5_000)
    fill(store, 40)
    expected = {number: store.get(spec(number)) for number in range(40)}
    doomed = store.put(spec(99), weights(9), METADATA)
    stop = threading.Event()

    def disturb() -> None:
        number = 100
        while not stop.is_set():
            store.put(spec(number), weights(number), METADATA)
            store.put(spec(99), weights(9), METADATA)
            flip_a_byte(store, doomed)
            store.heal(store.verify().findings)
            number += 1

    disturber = threading.Thread(target=disturb)
    disturber.start()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda number: (number % 40, store.get(spec(number % 40))), range(1000)))
    stop.set()
    disturber.join()
    assert all(kernel == expected[number] for number, kernel in found)
    stats = store.stats()
    assert stats["memory_hits"] + stats["disk_hits"] == 1040
    assert stats["cache_evictions"] > 0
    store.close()


def test_warming_up_fills_the_cache_with_the_newest_versions_and_checks_them(store: Store) -> None:
    fill(store, 5)
    newest = store.put(spec(0), weights(7), METADATA)
    damaged = store.get(spec(1))
    flip_a_byte(store, damaged)
    again = reopened(store)
    assert again.warm() == 4
    assert again.stats()["disk_hits"] == 0
    assert again.get(spec(0)) == newest
    assert again.stats()["memory_hits"] == 1
    with pytest.raises(KernelMissing, match="withdrawn"):
        again.get(spec(1))
    again.close()
    small = Store(store.folder, cache_bytes=5 * len(newest.weights) // 2)
    assert small.warm() == 2
    small.close()


def test_a_catalogue_of_an_earlier_version_is_read_with_its_stages(tmp_path: Path) -> None:
    folder = tmp_path / "urza"
    folder.mkdir()
    with sqlite3.connect(folder / "catalog.db") as db:
        db.executescript(
            "CREATE TABLE kernels (digest TEXT PRIMARY KEY, key TEXT NOT NULL, version INTEGER NOT NULL,"
            "blueprint TEXT NOT NULL, signature TEXT NOT NULL, tier INTEGER NOT NULL, strategy TEXT NOT NULL,"
            "size INTEGER NOT NULL, created_ns INTEGER NOT NULL, metadata TEXT NOT NULL, UNIQUE (key, version))"
            "WITHOUT ROWID"
        )
        for number, metadata in enumerate(({}, {"compile_key": "k"})):
            kernel = artifacts.pack(SPEC, weights(number), metadata)
            text = '{"compile_key": "k"}' if metadata else "{}"
            row = (kernel.digest, SPEC.key, number + 1, "BP009", str(SPEC.signature), 1, "eager")
            db.execute("INSERT INTO kernels VALUES (?,?,?,?,?,?,?,?,?,?)", (*row, len(kernel.weights), number, text))
            path = artifacts.path_of(folder / "artifacts", kernel.digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kernel.weights)
    db.close()
    store = Store(folder)
    assert [row.stage for row in store.list()] == ["built", "measured"]
    assert store.get(SPEC).metadata == {"compile_key": "k"}
    assert store.verify().holds
    store.close()
