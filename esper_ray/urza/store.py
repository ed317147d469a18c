"""The store: a SQLite catalogue over content-addressed artifacts, with an in-process cache in front.

Contract: what `Store.put` has returned is on disk, file and row; a put that was interrupted may have left a file
that no row names, which is harmless and reported by `Store.verify`. A kernel is never replaced: new content under
the same name becomes a higher version, and a pinned digest always means the same bytes.
"""

from __future__ import annotations

import builtins
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.ports import Kernel, KernelSpec, Publisher, SlotSignature
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.errors import CorruptArtifact, EnvironmentFault, KernelMissing, StoreUnavailable
from esper_ray.reliability.atomic import make_folder, write_bytes
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import digest as digest_of
from esper_ray.urza import artifacts
from esper_ray.urza.cache import KernelCache
from esper_ray.urza.catalog import Catalog, Row

DEFAULT_CACHE_BYTES = 64 * 1024 * 1024
_TELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Verification:
    """What a walk over catalogue and folder found; everything but ``sound`` should be empty."""

    sound: int
    rows_without_files: tuple[str, ...]
    files_without_rows: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every row can be served. A file without a row is waste, not damage."""
        return not self.rows_without_files and not self.damaged


class Store:
    """Kernels on disk and in memory, safe for the threads of one process.

    Args:
        folder: holds ``catalog.db`` and ``artifacts/``; made if it is not there.
        cache_bytes: bound of the in-process cache.
        publisher: where hits, misses and sizes are sent, at most once a second.

    Raises:
        EnvironmentFault: the folder cannot be written, or the catalogue is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        clock: Clock = SYSTEM_CLOCK,
        breaker: Breaker | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        self.folder = make_folder(folder)
        self._artifacts = make_folder(folder / "artifacts")
        self.cache = KernelCache(cache_bytes)
        self.breaker = breaker or Breaker("urza-disk", clock=clock)
        self._clock, self._publisher = clock, publisher
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._told_at = clock.monotonic()
        self._slowest_ms = 0.0
        self._catalog = Catalog(folder / "catalog.db")

    def put(self, spec: KernelSpec, weights: bytes, metadata: Mapping[str, Any]) -> Kernel:
        """Store a kernel durably. The same content again changes nothing; other content becomes a new version.

        Raises:
            KernelError: the weights or the metadata cannot be stored.
            StoreUnavailable: the disk refuses.
        """
        kernel = artifacts.pack(spec, weights, metadata)
        path = artifacts.path_of(self._artifacts, kernel.digest)
        with self._disk():
            if not (path.exists() and digest_of(path.read_bytes()) == kernel.digest):
                write_bytes(path, kernel.weights)
            self._catalog.add(kernel, self._clock.now_ns())
        self.cache.put(kernel)
        self._tell()
        return kernel

    def get(self, spec: KernelSpec, *, digest: str = "") -> Kernel:
        """The newest version of a kernel, or the one of that digest.

        Raises:
            KernelMissing: there is none.
            CorruptArtifact: its file is damaged or gone.
            StoreUnavailable: the disk cannot be read, or the breaker is open.
        """
        with self._disk():
            found = self._catalog.newest(spec.key, digest)
        if found is None:
            self._count("missing")
            self._tell()
            pinned = f" with the digest {digest[:12]}" if digest else ""
            raise KernelMissing(
                f"Urza has no kernel {spec.key}{pinned}.",
                remedy="Let the forge make it at the start of the next run, or wait for it.",
            )
        return self.get_digest(found)

    def get_digest(self, digest: str) -> Kernel:
        """The kernel of that digest; errors as for `get`."""
        started = self._clock.monotonic()
        kernel = self.cache.get(digest)
        if kernel is None:
            kernel = self._load(digest)
            self.cache.put(kernel)
        self._slowest_ms = max(self._slowest_ms, (self._clock.monotonic() - started) * 1e3)
        self._tell()
        return kernel

    def list(
        self,
        *,
        blueprint: str = "",
        signature: SlotSignature | str = "",
        tier: BlueprintTier = BlueprintTier.UNSPECIFIED,
    ) -> builtins.list[Row]:
        """The rows that match every filter given, by name and version."""
        with self._disk():
            return self._catalog.rows(blueprint=blueprint, signature=str(signature), tier=int(tier))

    def verify(self) -> Verification:
        """Read every artifact and compare it with the catalogue."""
        rows = {row.digest for row in self.list()}
        with self._disk():
            files = {path.stem: path for path in self._artifacts.glob(f"??/*{artifacts.SUFFIX}")}
            damaged = [name for name, path in sorted(files.items()) if digest_of(path.read_bytes()) != name]
        return Verification(
            sound=len(rows & (files.keys() - set(damaged))),
            rows_without_files=tuple(sorted(rows - files.keys())),
            files_without_rows=tuple(sorted(files.keys() - rows)),
            damaged=tuple(damaged),
        )

    def stats(self) -> dict[str, float | str]:
        """Hits and misses of each tier since the start, sizes, and the breaker's state."""
        kernels, size = self._catalog.totals()
        return {
            "kernels": kernels,
            "bytes": size,
            "cache_kernels": len(self.cache),
            "cache_bytes": self.cache.size,
            "cache_evictions": self.cache.evictions,
            "memory_hits": self.cache.hits,
            "memory_misses": self.cache.misses,
            "disk_hits": self._counts["disk"],
            "missing": self._counts["missing"],
            "corrupt": self._counts["corrupt"],
            "breaker": self.breaker.state.name,
        }

    def close(self) -> None:
        """Send the last figures and let go of the catalogue."""
        self.flush()
        self._catalog.close()

    def flush(self) -> None:
        """Send the figures that were not sent yet."""
        if self._publisher is None:
            return
        with self._lock:
            now = Counter({"memory": self.cache.hits, **self._counts})
            news = {name: float(now[name] - self._told[name]) for name in ("memory", "disk", "missing", "corrupt")}
            slowest, self._slowest_ms = self._slowest_ms, 0.0
            self._told, self._told_at = now, self._clock.monotonic()
        points = [
            MetricPoint("uh", news["memory"], {"tier": "memory"}),
            MetricPoint("uh", news["disk"], {"tier": "disk"}),
            MetricPoint("um", news["missing"]),
            MetricPoint("ux", news["corrupt"]),
            MetricPoint("ub", float(self.cache.size)),
            MetricPoint("uk", float(self._catalog.totals()[0])),
            MetricPoint("us", slowest),
        ]
        publish_telemetry(self._publisher, "urza", "", 0, points)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _tell(self) -> None:
        if self._clock.monotonic() - self._told_at >= _TELL_SECONDS:
            self.flush()

    def _load(self, digest: str) -> Kernel:
        path = artifacts.path_of(self._artifacts, digest)
        try:
            with self._disk():
                if not self._catalog.has(digest):
                    raise KernelMissing(
                        f"Urza has no artifact {digest[:12]}.",
                        remedy="Let the forge make its kernel at the start of the next run.",
                    )
                kernel = artifacts.unpack(path.read_bytes(), digest, where=str(path))
        except FileNotFoundError:
            self._count("corrupt")
            raise CorruptArtifact(
                f"The artifact {path} is gone.",
                why="The catalogue names it.",
                remedy="Let the forge make it again at the start of the next run.",
            ) from None
        except (CorruptArtifact, KernelMissing) as error:
            self._count("corrupt" if isinstance(error, CorruptArtifact) else "missing")
            raise
        self._count("disk")
        return kernel

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Counts the disk's failures, and stops asking it while the breaker is open."""
        if not self.breaker.allow():
            raise StoreUnavailable(
                "Urza's disk is not asked at the moment.",
                why="Its breaker is open after repeated failures.",
                remedy=f"Check {self.folder}; it is tried again by itself.",
            )
        try:
            yield
        except FileNotFoundError:
            self.breaker.success()
            raise
        except (OSError, sqlite3.Error, EnvironmentFault) as error:
            self.breaker.failure()
            raise StoreUnavailable(
                "Urza cannot reach its disk.", why=f"{error}.", remedy=f"Check {self.folder}."
            ) from error
        except BaseException:
            self.breaker.success()
            raise
        self.breaker.success()
