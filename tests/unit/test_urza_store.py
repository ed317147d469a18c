"""Urza keeps what it was given, refuses what was altered, and says which of its three failures happened."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray.contracts import codec
from esper_ray.contracts.enums import BlueprintTier, BusMessageType
from esper_ray.errors import KernelError, KernelMissing, StoreUnavailable
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import ManualClock
from esper_ray.urza import artifacts
from esper_ray.urza.cache import KernelCache
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, OTHER, SPEC, file_of, reopened, weights


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "urza")
    yield store
    store.close()


def test_what_was_put_is_served_from_memory_and_from_disk(store: Store) -> None:
    kernel = store.put(OTHER, weights(1, 2), METADATA)
    assert store.get(OTHER) == kernel
    again = reopened(store)
    assert again.get(OTHER) == kernel == again.get_digest(kernel.digest)
    assert kernel.metadata == METADATA
    assert kernel.spec == OTHER
    stats = again.stats()
    assert (stats["disk_hits"], stats["memory_hits"], stats["missing"]) == (1, 1, 0)
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


def test_the_list_is_filtered_by_id_blueprint_signature_tier_family_and_stage(store: Store) -> None:
    kernel = store.put(SPEC, weights(1), METADATA)
    store.put(OTHER, weights(1), {**METADATA, "tier": 2, "family": "scaling", "compile_key": "k"})
    assert [row.key for row in store.list(digest=kernel.digest)] == [SPEC.key]
    assert [row.key for row in store.list(family="scaling")] == [OTHER.key]
    assert [row.key for row in store.list(stage="measured")] == [OTHER.key]
    assert [row.key for row in store.list(stage="built")] == [SPEC.key]
    assert store.list(stage="built", family="scaling") == []
    assert [row.key for row in store.list(blueprint="BP009")] == [SPEC.key]
    assert [row.key for row in store.list(signature=OTHER.signature)] == [OTHER.key]
    assert [row.key for row in store.list(tier=BlueprintTier.EXPERIMENTAL)] == [OTHER.key]
    assert store.list(blueprint="BP009", tier=BlueprintTier.EXPERIMENTAL) == []
    assert store.list(blueprint="BP009")[0].metadata == METADATA
    assert len(store.list()) == 2


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
    assert store.verify().findings == ()


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
    store.figures.flush()
    points = [p for p in codec.decode_telemetry(outbox.sent[-1][1]).metrics if p.key == "um"]
    assert [p.value for p in points] == [0]
    store.close()


def test_the_store_loads_without_torch() -> None:
    code = "import sys, esper_ray.urza.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
