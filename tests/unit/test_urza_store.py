"""Urza keeps what it was given, refuses what was altered, and says which of its three failures happened."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray.contracts import codec
from esper_ray.contracts.enums import BlueprintTier, BusMessageType, CircuitBreakerState
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.errors import CorruptArtifact, KernelError, KernelMissing, StoreUnavailable
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import ManualClock
from esper_ray.urza import artifacts
from esper_ray.urza.cache import KernelCache
from esper_ray.urza.store import Store

SPEC = KernelSpec("BP009", SlotSignature("conv", (16, 24, 24)))
OTHER = KernelSpec("BP002", SlotSignature("conv", (32, 12, 12)), {"scale": 0.25})
METADATA = {"parameters_count": 2, "strategy": "eager", "eager_ms": 1.5, "compiled_ms": None, "tier": 1}


def weights(*values: float) -> bytes:
    """One float32 tensor as a safetensors file, by the format's own rules."""
    data = struct.pack(f"<{len(values)}f", *values)
    header = {"w": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "urza")
    yield store
    store.close()


def reopened(store: Store) -> Store:
    """The same folder with an empty cache."""
    store.close()
    return Store(store.folder)


def file_of(store: Store, digest: str) -> Path:
    return artifacts.path_of(store.folder / "artifacts", digest)


def test_what_was_put_is_served_from_memory_and_from_disk(store: Store) -> None:
    kernel = store.put(OTHER, weights(1, 2), METADATA)
    assert store.get(OTHER) == kernel
    again = reopened(store)
    assert again.get(OTHER) == kernel == again.get_digest(kernel.digest)
    assert kernel.metadata == METADATA
    assert kernel.spec == OTHER
    stats = again.stats()
    assert (stats["disk_hits"], stats["memory_hits"], stats["memory_misses"]) == (1, 1, 1)
    again.close()


def test_any_safetensors_reader_opens_an_artifact(store: Store) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    kernel = store.put(SPEC, weights(1, 2), METADATA)
    assert numpy.load(kernel.weights)["w"].tolist() == [1, 2]
    assert numpy.load_file(file_of(store, kernel.digest))["w"].tolist() == [1, 2]
    empty = numpy.save({})
    assert numpy.load(store.put(OTHER, empty, {}).weights) == {}


def test_putting_the_same_again_changes_nothing_and_other_content_is_a_new_version(store: Store) -> None:
    first = store.put(SPEC, weights(1), METADATA)
    assert store.put(SPEC, weights(1), dict(reversed(METADATA.items()))) == first
    assert store.put(SPEC, first.weights, METADATA) == first
    second = store.put(SPEC, weights(2), METADATA)
    assert [row.version for row in store.list()] == [1, 2]
    assert store.get(SPEC) == second
    assert store.get(SPEC, digest=first.digest) == first
    assert store.put(SPEC, weights(1), METADATA) == first
    assert store.get(SPEC) == second


def test_the_list_is_filtered_by_blueprint_signature_and_tier(store: Store) -> None:
    store.put(SPEC, weights(1), METADATA)
    store.put(OTHER, weights(1), {**METADATA, "tier": 2})
    assert [row.key for row in store.list(blueprint="BP009")] == [SPEC.key]
    assert [row.key for row in store.list(signature=OTHER.signature)] == [OTHER.key]
    assert [row.key for row in store.list(tier=BlueprintTier.EXPERIMENTAL)] == [OTHER.key]
    assert store.list(blueprint="BP009", tier=BlueprintTier.EXPERIMENTAL) == []
    assert store.list(blueprint="BP009")[0].metadata == METADATA
    assert len(store.list()) == 2


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_an_altered_file_is_refused_by_name_and_mended_by_putting_it_again(store: Store, damage) -> None:
    kernel = store.put(SPEC, weights(1, 2), METADATA)
    sound = store.put(OTHER, weights(1), METADATA)
    damage(file_of(store, kernel.digest))
    again = reopened(store)
    with pytest.raises(CorruptArtifact, match=kernel.digest):
        again.get(SPEC)
    report = again.verify()
    assert not report.holds
    assert report.rows_without_files + report.damaged == (kernel.digest,)
    assert report.sound == 1
    assert again.get(OTHER) == sound
    assert again.breaker.state is CircuitBreakerState.CLOSED
    assert again.put(SPEC, weights(1, 2), METADATA) == kernel
    assert again.verify().holds
    again.close()


def test_a_file_that_no_row_names_is_reported_and_harmless(store: Store) -> None:
    stray = artifacts.pack(SPEC, weights(5), METADATA)
    path = file_of(store, stray.digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(stray.weights)
    report = store.verify()
    assert report.files_without_rows == (stray.digest,)
    assert report.holds
    with pytest.raises(KernelMissing):
        store.get_digest(stray.digest)


def test_a_miss_says_what_is_missing(store: Store) -> None:
    with pytest.raises(KernelMissing, match="BP009"):
        store.get(SPEC)
    kernel = store.put(SPEC, weights(1), METADATA)
    with pytest.raises(KernelMissing, match="with the digest 000"):
        store.get(SPEC, digest="000")
    with pytest.raises(KernelMissing):
        store.get(OTHER, digest=kernel.digest)
    assert store.stats()["missing"] == 2 + 1


def test_a_failing_disk_opens_the_breaker_which_probes_again_later(tmp_path: Path, monkeypatch) -> None:
    clock = ManualClock()
    store = Store(tmp_path, clock=clock, breaker=Breaker("urza-disk", failures=2, open_seconds=30, clock=clock))
    kernel = store.put(SPEC, weights(1), METADATA)
    store.cache = KernelCache(0)
    broken = monkeypatch.context()
    with broken as patch:
        patch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="Input/output error"):
                store.get_digest(kernel.digest)
    with pytest.raises(StoreUnavailable, match="breaker is open"):
        store.get_digest(kernel.digest)
    clock.advance(31)
    assert store.get_digest(kernel.digest) == kernel
    store.close()


@pytest.mark.parametrize("wrong", [b"", b"\xff" * 40, struct.pack("<Q", 2) + b"[]", weights(1) + b"tail"])
def test_weights_that_are_no_safetensors_are_refused(store: Store, wrong: bytes) -> None:
    with pytest.raises(KernelError, match="no safetensors"):
        store.put(SPEC, wrong, METADATA)
    with pytest.raises(KernelError, match="JSON"):
        store.put(SPEC, weights(1), {"loss": float("nan")})
    assert store.list() == []
    assert store.verify().files_without_rows == ()


def test_the_cache_is_bounded_in_bytes_and_forgets_what_was_unused_for_longest() -> None:
    kernels = [artifacts.pack(SPEC, weights(*range(n, n + 10)), {}) for n in range(3)]
    size = len(kernels[0].weights)
    cache = KernelCache(2 * size + 1)
    for kernel in kernels[:2]:
        cache.put(kernel)
        cache.put(kernel)
    assert cache.get(kernels[0].digest) == kernels[0]
    cache.put(kernels[2])
    assert cache.get(kernels[1].digest) is None
    assert cache.get(kernels[0].digest) == kernels[0]
    assert (cache.size, len(cache), cache.evictions) == (2 * size, 2, 1)
    assert (cache.hits, cache.misses) == (2, 1)
    cache.put(artifacts.pack(SPEC, weights(*range(1000)), {}))
    assert cache.size == 2 * size


class Outbox:
    def __init__(self) -> None:
        self.sent: list[tuple[BusMessageType, bytes]] = []

    def publish(self, type, payload, **_) -> None:
        self.sent.append((type, payload))


def test_hits_misses_and_sizes_are_published_at_most_once_a_second(tmp_path: Path) -> None:
    clock, outbox = ManualClock(), Outbox()
    store = Store(tmp_path, clock=clock, publisher=outbox)
    kernel = store.put(SPEC, weights(1), METADATA)
    store.get(SPEC)
    assert outbox.sent == []
    clock.advance(1)
    with pytest.raises(KernelMissing):
        store.get(OTHER)
    points = [p for _, payload in outbox.sent for p in codec.decode_telemetry(payload).metrics]
    values = {(p.key, p.labels.get("tier", "")): p.value for p in points}
    assert values[("uh", "memory")] == 1
    assert values[("um", "")] == 1
    assert values[("uk", "")] == 1
    assert values[("ub", "")] == len(kernel.weights)
    assert {kind for kind, _ in outbox.sent} == {BusMessageType.TELEMETRY}
    store.flush()
    points = [p for p in codec.decode_telemetry(outbox.sent[-1][1]).metrics if p.key == "um"]
    assert [p.value for p in points] == [0]
    store.close()


def test_the_store_loads_without_torch() -> None:
    code = "import sys, esper_ray.urza.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
