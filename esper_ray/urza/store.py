"""The store: a SQLite catalogue over content-addressed artifacts, with an in-process cache in front.

Contract: what `Store.put` has returned is on disk, file and row; a put that was interrupted may have left a file
that no row names, which is harmless and reported by `Store.verify`. A kernel is never replaced: new content under
the same name becomes a higher version, and a pinned digest always means the same bytes. A damaged artifact is
withdrawn when it is met: whoever asked is told, and from then on it is missing, so that the forge makes it again.
"""

from __future__ import annotations

import builtins
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.ports import Kernel, KernelSpec, Publisher, SlotSignature
from esper_ray.errors import CorruptArtifact, EnvironmentFault, KernelMissing, StoreUnavailable
from esper_ray.reliability.atomic import make_folder, write_bytes
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import digest as digest_of
from esper_ray.urza import artifacts, checks
from esper_ray.urza.cache import KernelCache
from esper_ray.urza.catalog import Catalog, Row, Withdrawal
from esper_ray.urza.checks import Finding, Verification
from esper_ray.urza.figures import Figures, Outcome

DEFAULT_CACHE_BYTES = 64 * 1024 * 1024
_log = logging.getLogger(__name__)


class Store:
    """Kernels on disk and in memory, safe for threads; several processes may have the same folder open.

    Opening it recovers: what a killed writer left half-written is removed, and rows whose file is gone or has another
    size are withdrawn; ``recovered`` has them. Bytes are compared when an artifact is read, and by `verify`.

    Args:
        folder: holds ``catalog.db`` and ``artifacts/``; made if it is not there.
        cache_bytes: bound of the in-process cache.
        breaker: of reading; writing has one of its own, so that a full disk does not stop serving.
        publisher: where hits, misses and sizes are sent, at most once a second.
        on_loss: told what was withdrawn, so that it is made again.

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
        on_loss: Callable[[Sequence[Finding]], None] = lambda _: None,
    ) -> None:
        self.folder = make_folder(folder)
        self._artifacts = make_folder(folder / "artifacts")
        self.cache = KernelCache(cache_bytes)
        self.breaker = breaker or Breaker("urza-read", clock=clock)
        self.write_breaker = Breaker("urza-write", clock=clock)
        self.figures = Figures(publisher, clock, self._gauges)
        self._clock, self._on_loss = clock, on_loss
        self._changing = threading.Lock()
        self._catalog = Catalog(folder / "catalog.db")
        self._turn = os.open(folder / "urza.lock", os.O_RDWR | os.O_CREAT, 0o644)
        self.recovered: Sequence[Finding] = ()
        # On a full disk nothing can be withdrawn; what is sound is served all the same.
        with suppress(StoreUnavailable):
            self.recovered = self.heal(self._recover())

    def put(self, spec: KernelSpec, weights: bytes | memoryview, metadata: Mapping[str, Any]) -> Kernel:
        """Store a kernel durably. The same content again changes nothing; other content becomes a new version.

        Raises:
            KernelError: the weights or the metadata cannot be stored.
            StoreUnavailable: the disk refuses; nothing of this kernel is stored.
        """
        kernel = artifacts.pack(spec, bytes(weights), metadata)
        path = artifacts.path_of(self._artifacts, kernel.digest)
        with self._disk(self.write_breaker), self._alone():
            if not (path.exists() and digest_of(path.read_bytes()) == kernel.digest):
                write_bytes(path, bytes(kernel.weights))
            self._catalog.add(kernel, self._clock.now_ns())
        self.cache.put(kernel)
        return kernel

    def find(self, spec: KernelSpec, *, digest: str = "") -> str:
        """The digest of the newest version of a kernel, or ``digest`` itself where that is one of its versions.

        Raises:
            KernelMissing: there is none.
            StoreUnavailable: the disk cannot be read, or the breaker is open.
        """
        with self._disk(self.breaker):
            found = self._catalog.newest(spec.key, digest)
            lost = [] if found else self._catalog.withdrawals(spec.key)
        if found is None:
            self.figures.count("missing")
            pinned = f" with the digest {digest[:12]}" if digest else ""
            raise KernelMissing(
                f"Urza has no kernel {spec.key}{pinned}.",
                why=f"Its version {lost[0].version} was withdrawn: {lost[0].why}" if lost else "",
                remedy="Let the forge make it at the start of the next run, or wait for it.",
            )
        return found

    def get(self, spec: KernelSpec, *, digest: str = "") -> Kernel:
        """The newest version of a kernel, or the one of that digest.

        Raises:
            KernelMissing: there is none.
            CorruptArtifact: its file is damaged or gone; it is withdrawn, so that it is missing from now on.
            StoreUnavailable: the disk cannot be read, or the breaker is open.
        """
        return self.get_digest(self.find(spec, digest=digest))

    def get_digest(self, digest: str) -> Kernel:
        """The kernel of that digest; errors as for `get`."""
        started = self._clock.monotonic()
        kernel = self.cache.get(digest)
        tier: Outcome = "memory"
        if kernel is None:
            kernel, tier = self._load(digest), "disk"
        self.figures.count(tier, (self._clock.monotonic() - started) * 1e3)
        return kernel

    def warm(self) -> int:
        """Read and check the newest version of each kernel, last added first, until the cache is full; how many."""
        count, free = 0, self.cache.limit - self.cache.size
        with self._disk(self.breaker):
            digests, sizes = self._catalog.latest(), self._catalog.sizes()
        for digest in digests:
            free -= sizes.get(digest, 0)
            if free < 0:
                break
            with suppress(KernelMissing, CorruptArtifact):
                self._load(digest)
                count += 1
        return count

    def list(
        self,
        blueprint: str = "",
        signature: SlotSignature | str = "",
        tier: int = BlueprintTier.UNSPECIFIED,
        family: str = "",
        stage: str = "",
        digest: str = "",
    ) -> builtins.list[Row]:
        """The rows that match every filter given, by name and version."""
        with self._disk(self.breaker):
            return self._catalog.rows(
                blueprint=blueprint,
                signature=str(signature),
                tier=int(tier),
                family=family,
                stage=stage,
                digest=digest,
            )

    def recovered_findings(self) -> Sequence[Finding]:
        """What was withdrawn when the store was opened."""
        return self.recovered

    def withdrawals(self) -> builtins.list[Withdrawal]:
        """What was withdrawn, the newest first."""
        with self._disk(self.breaker):
            return self._catalog.withdrawals()

    def verify(self) -> Verification:
        """Read every artifact and compare it with the catalogue.

        Raises:
            StoreUnavailable: the disk cannot be read, or the catalogue's own file is damaged.
        """
        with self._disk(self.breaker):
            faults = self._catalog.faults()
            if faults:
                raise sqlite3.DatabaseError("; ".join(faults[:3]))
            rows = {row.digest: row for row in self._catalog.rows()}
            files, _ = artifacts.inventory(self._artifacts)
            findings = [found for row in rows.values() if isinstance(found := self._examine(row), Finding)]
        strays = [checks.stray(self._path(digest), digest) for digest in sorted(files.keys() - rows.keys())]
        return Verification(len(rows) - len(findings), tuple(findings + strays))

    def heal(self, findings: Iterable[Finding]) -> builtins.list[Finding]:
        """Withdraw what is still as found, and remove its file; returns what was withdrawn or removed.

        Raises:
            StoreUnavailable: the disk refuses.
        """
        with self._disk(self.write_breaker):
            gone = [found for found in findings if self._withdraw(found)]
        lost = [found for found in gone if found.blueprint]
        if lost:
            self.figures.withdrew(lost)
            self._on_loss(lost)
        return gone

    def stats(self) -> dict[str, float | str]:
        """Fetches since the start by where they were served from or how they failed, sizes, and the breakers' state."""
        kernels, size = self._catalog.totals()
        counts = self.figures.read()
        return {
            "kernels": kernels,
            "bytes": size,
            "cache_kernels": len(self.cache),
            "cache_bytes": self.cache.size,
            "cache_evictions": self.cache.evictions,
            "memory_hits": counts.get("memory", 0),
            "shared_hits": counts.get("shared", 0),
            "disk_hits": counts.get("disk", 0),
            "missing": counts.get("missing", 0),
            "corrupt": counts.get("corrupt", 0),
            "unavailable": counts.get("unavailable", 0),
            "breaker": self.breaker.state.name,
            "write_breaker": self.write_breaker.state.name,
        }

    def close(self) -> None:
        """Send the last figures and let go of the catalogue; once is enough."""
        if self._turn < 0:
            return
        self.figures.flush()
        self._catalog.close()
        os.close(self._turn)
        self._turn = -1

    def _load(self, digest: str) -> Kernel:
        """From disk into the cache, checked."""
        with self._disk(self.breaker):
            row = self._catalog.find(digest)
            found = self._examine(row) if row else None
        if found is None:
            self.figures.count("missing")
            raise KernelMissing(
                f"Urza has no artifact {digest[:12]}.",
                remedy="Let the forge make its kernel at the start of the next run.",
            )
        if isinstance(found, Finding):
            self.figures.count("corrupt")
            _log.error("%s: %s", found.error().what, found.why)
            with suppress(StoreUnavailable):
                self.heal([found])
            raise found.error()
        self.cache.put(found)
        return found

    def _examine(self, row: Row) -> Kernel | Finding:
        return checks.examine(self._path(row.digest), row, self._name_of)

    def _name_of(self, digest: str) -> str | None:
        row = self._catalog.find(digest)
        return row.name if row else None

    def _path(self, digest: str) -> Path:
        return artifacts.path_of(self._artifacts, digest)

    def _withdraw(self, found: Finding) -> bool:
        """Look again, for a put may have mended it, then take out row and file; the row first."""
        with self._alone():
            row = self._catalog.find(found.digest)
            if row is not None and not isinstance(self._examine(row), Finding):
                return False
            withdrawn = row is not None and self._catalog.withdraw(found.digest, found.why, self._clock.now_ns())
            stray = self._path(found.digest).exists()
            self._path(found.digest).unlink(missing_ok=True)
        return withdrawn or stray

    def _recover(self) -> builtins.list[Finding]:
        """Remove drafts; the rows whose file is gone or has another size."""
        with self._disk(self.write_breaker), self._alone():
            files, drafts = artifacts.inventory(self._artifacts)
            for draft in drafts:
                draft.unlink(missing_ok=True)
            wrong = [digest for digest, size in self._catalog.sizes().items() if files.get(digest) != size]
            rows = [row for digest in wrong if (row := self._catalog.find(digest))]
            found = [found for row in rows if isinstance(found := self._examine(row), Finding)]
        for each in found:
            _log.error("%s: %s", each.error().what, each.why)
        return found

    def _gauges(self) -> Iterator[MetricPoint]:
        yield MetricPoint("ub", float(self.cache.size))
        yield MetricPoint("uk", float(self._catalog.totals()[0]))
        for breaker in (self.breaker, self.write_breaker):
            yield MetricPoint("ob", float(breaker.state), {"breaker": breaker.name})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One change at a time, over all threads and processes: a file and its row belong together."""
        with self._changing:
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._turn, fcntl.LOCK_UN)

    @contextmanager
    def _disk(self, breaker: Breaker) -> Iterator[None]:
        """Counts the disk's failures, and stops asking it while the breaker is open."""
        if not breaker.allow():
            self.figures.count("unavailable")
            raise StoreUnavailable(
                "Urza's disk is not asked at the moment.",
                why="Its breaker is open after repeated failures.",
                remedy=f"Check {self.folder}; it is tried again by itself.",
            )
        try:
            yield
        except (OSError, sqlite3.Error, EnvironmentFault) as error:
            breaker.failure()
            self.figures.count("unavailable")
            raise StoreUnavailable(
                "Urza cannot reach its disk.", why=f"{error}.", remedy=f"Check {self.folder}."
            ) from error
        except BaseException:
            breaker.success()
            raise
        breaker.success()
