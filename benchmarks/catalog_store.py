"""Urza's part of `benchmarks.catalog`: how long a fetch takes from each tier, and an opening with 10,000 entries.

Kernels have the sizes that the forge makes, 20 to 300 KB. A cold fetch reads a file that the kernel of the operating
system was told to forget, and compares its digest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import safetensors.numpy

from benchmarks.common import percentile
from esper_ray.actors import crew
from esper_ray.actors.clients import RemoteKernels
from esper_ray.actors.shared import SharedKernel
from esper_ray.config import Config
from esper_ray.contracts.ports import Kernel, KernelSpec, SlotSignature
from esper_ray.contracts.signing import load_keys
from esper_ray.runtime import Session
from esper_ray.tezzeret import seal
from esper_ray.urza import artifacts
from esper_ray.urza.store import Store

KERNELS = 60
ENTRIES = 10_000
_FLOATS = (5_000, 19_000, 75_000)
_METADATA: dict[str, Any] = {"parameters_count": 1, "strategy": "eager", "eager_ms": 1.0, "compiled_ms": None}
_KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.catalog_store import fill
fill(Path(sys.argv[1]), int(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def spec(number: int) -> KernelSpec:
    """One of many kernels that no run asks for."""
    return KernelSpec(f"BP{number % 42 + 1:03}", SlotSignature("vector", (90_000 + number,)))


def weights(number: int, floats: int) -> bytes:
    """Float32 values as safetensors."""
    return safetensors.numpy.save({"w": np.random.default_rng(number).random(floats, dtype=np.float32)})


def in_process(count: int) -> dict[str, float]:
    """Fetches from memory and cold from disk, and puts."""
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        store, stored = Store(Path(home)), []
        puts = []
        for number in range(KERNELS):
            data = weights(number, _FLOATS[number % len(_FLOATS)])
            start = time.perf_counter()
            stored.append(store.put(spec(number), data, _METADATA))
            puts.append(time.perf_counter() - start)
        hot = _timed(store, count, [])
        store.close()
        store = Store(Path(home), cache_bytes=0)
        files = [artifacts.path_of(store.folder / "artifacts", kernel.digest) for kernel in stored]
        cold = _timed(store, max(1000, count // 10), files)
        assert store.stats()["disk_hits"] == len(cold)
        store.close()
    return {
        "fetch_hot_p50_ms": percentile(hot, 50),
        "fetch_hot_p99_ms": percentile(hot, 99),
        "fetch_cold_p50_ms": percentile(cold, 50),
        "fetch_cold_p99_ms": percentile(cold, 99),
        "put_p50_ms": percentile(puts, 50) * 1e3,
    }


def _timed(store: Store, count: int, forgotten: Sequence[Path]) -> list[float]:
    """Milliseconds of so many fetches in turns; files given are forgotten by the page cache before each."""
    specs = [spec(number) for number in range(KERNELS)]
    taken = []
    for number in range(count):
        if forgotten:
            _forget(forgotten[number % KERNELS])
        start = time.perf_counter()
        store.get(specs[number % KERNELS])
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def in_the_actor(session: Session, count: int) -> dict[str, float]:
    """Fetches through Urza's actor, one after the other: as Tolaria does it, and by a call through Ray."""
    urza = crew.find("urza", session.config.ray.namespace)
    assert urza is not None
    keys = load_keys(session.config.home / "keys" / "signing")
    for number in range(KERNELS):
        data = weights(number, _FLOATS[number % len(_FLOATS)])
        session.ask("urza", "put", spec(number), data, seal.sealed(spec(number).key, data, _METADATA, keys))
    source = RemoteKernels(session.config.ray.namespace, keys)

    def as_tolaria(wanted: KernelSpec) -> Kernel:
        kernel = source.fetch(wanted).wait(60.0)
        assert kernel is not None
        return kernel

    def through_ray(wanted: KernelSpec) -> Kernel:
        found: Kernel | SharedKernel = ray.get(urza.fetch.remote(wanted))
        return found.open() if isinstance(found, SharedKernel) else found

    figures = {}
    for name, fetch in (("actor", as_tolaria), ("ray", through_ray)):
        taken = []
        for number in range(count + KERNELS):
            start = time.perf_counter()
            kernel = fetch(spec(number % KERNELS))
            taken.append((time.perf_counter() - start) * 1e3)
            assert len(kernel.weights) > 4 * _FLOATS[0]
        first, later = taken[:KERNELS], taken[KERNELS:]
        figures[f"fetch_{name}_first_p50_ms"] = percentile(first, 50)
        figures |= {f"fetch_{name}_p{share}_ms": percentile(later, share) for share in (50, 99)}
    return figures


def hit_rate(session: Session, config: Config, runs: int) -> dict[str, float]:
    """Of what short runs fetch after one that warmed everything up: how much is in memory when it is asked for."""
    session.wait(session.submit(_run(config, 0)))
    while session.ask("tezzeret", "progress")["phase"] in ("eager", "compile"):
        time.sleep(0.5)
    before = session.ask("urza", "stats")
    for number in range(runs):
        session.wait(session.submit(_run(config, number + 1)))
    after = session.ask("urza", "stats")
    names = ("memory_hits", "shared_hits", "disk_hits", "missing", "corrupt", "unavailable")
    made = {name: after[name] - before[name] for name in names}
    fetches = sum(made.values())
    hits = made["memory_hits"] + made["shared_hits"]
    return {"hit_rate": hits / fetches if fetches else 0.0, "hit_rate_fetches": float(fetches)}


def _run(config: Config, seed: int) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": 100 + seed})})


def fill(folder: Path, count: int) -> None:
    """So many small artifacts, quickly: nothing is synced."""
    store = Store(folder, cache_bytes=0)
    store._catalog._db.execute("PRAGMA synchronous=OFF")
    synced: Any = os.fsync
    setattr(os, "fsync", lambda _: None)  # noqa: B010
    try:
        for number in range(count):
            store.put(spec(number), weights(number, 500), _METADATA)
    finally:
        os.fsync = synced


def recovery() -> dict[str, float]:
    """Opening a store of 10,000 entries whose writer was killed, up to the first kernel served; then verifying it."""
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        folder = Path(home)
        done = subprocess.run([sys.executable, "-c", _KILLED, home, str(ENTRIES)], check=False)
        assert done.returncode == -9
        lost = next((folder / "artifacts").glob("??/*.safetensors"))
        lost.unlink()
        draft = lost.with_name(f".{lost.name}.0000.tmp")
        draft.write_bytes(b"half")
        start = time.perf_counter()
        store = Store(folder)
        served = next(row for row in store._catalog.latest()[:1])
        store.get_digest(served)
        opened = time.perf_counter() - start
        assert [found.digest for found in store.recovered] == [lost.stem]
        assert not draft.exists()
        start = time.perf_counter()
        report = store.verify()
        verified = time.perf_counter() - start
        assert (report.sound, report.findings) == (ENTRIES - 1, ())
        store.close()
    return {"recovery_10k_s": opened, "verify_10k_s": verified}
