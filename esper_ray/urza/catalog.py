"""The catalogue of what is stored: SQLite, WAL mode, ``synchronous=FULL``.

A row is never changed. It is added, and it may be withdrawn, whole, when its artifact turned out to be damaged: then
its version's number stays taken, so that a version once seen never means other bytes.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import Kernel
from esper_ray.errors import EnvironmentFault

STAGES = ("built", "measured")
"""How far the forge has brought a kernel: built and checked, or measured against its compiled form as well."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS kernels (
    digest TEXT PRIMARY KEY,
    key TEXT NOT NULL,
    version INTEGER NOT NULL,
    blueprint TEXT NOT NULL,
    signature TEXT NOT NULL,
    tier INTEGER NOT NULL,
    strategy TEXT NOT NULL,
    size INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    UNIQUE (key, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS withdrawn (
    key TEXT NOT NULL,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    withdrawn_ns INTEGER NOT NULL,
    why TEXT NOT NULL,
    PRIMARY KEY (key, version)
) WITHOUT ROWID;
"""
# Not in the table above, so that new catalogues and those of earlier versions get them on the same way.
_LATER = ("family", "stage")
_COLUMNS = "digest, key, version, blueprint, signature, tier, strategy, size, created_ns, metadata, family, stage"
_NEXT_VERSION = (
    "1 + max((SELECT coalesce(max(version), 0) FROM kernels WHERE key = :key), "
    "(SELECT coalesce(max(version), 0) FROM withdrawn WHERE key = :key))"
)


@dataclass(frozen=True, slots=True)
class Row:
    """What the catalogue knows of one artifact; ``size`` in bytes, ``stage`` one of `STAGES`."""

    digest: str
    key: str
    version: int
    blueprint: str
    signature: str
    tier: BlueprintTier
    strategy: str
    size: int
    created_ns: int
    metadata: Mapping[str, Any]
    family: str = ""
    stage: str = ""

    @property
    def name(self) -> str:
        """The kernel with its version, for people."""
        return f"{self.key} v{self.version}"


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A version that is served no more, and why."""

    key: str
    version: int
    digest: str
    withdrawn_ns: int
    why: str


class Catalog:
    """The rows, safe for the threads of one process. Every method may raise ``sqlite3.Error``.

    Raises:
        EnvironmentFault: the file cannot be opened, or is no catalogue.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=10.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._widen()
        except sqlite3.Error as error:
            raise EnvironmentFault(
                f"Cannot open the catalogue {path}.",
                why=f"SQLite says: {error}.",
                remedy="Check the folder's permissions and free space; move a damaged catalogue away to start anew.",
            ) from error

    def _widen(self) -> None:
        """Give a catalogue of an earlier version the columns it lacks."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            present = {row[1] for row in self._db.execute("PRAGMA table_info(kernels)")}
            missing = [column for column in _LATER if column not in present]
            for column in missing:
                self._db.execute(f"ALTER TABLE kernels ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")
            if "stage" in missing:
                measured = "json_extract(metadata, '$.compile_key') IS NOT NULL"
                self._db.execute(f"UPDATE kernels SET stage = CASE WHEN {measured} THEN ? ELSE ? END", STAGES[::-1])

    def add(self, kernel: Kernel, created_ns: int) -> None:
        """Add a kernel as the next version of its name; a digest that is known already changes nothing."""
        spec, metadata = kernel.spec, kernel.metadata
        values = {
            "digest": kernel.digest,
            "key": spec.key,
            "blueprint": spec.blueprint,
            "signature": str(spec.signature),
            "tier": int(metadata.get("tier", BlueprintTier.SAFE)),
            "strategy": str(metadata.get("strategy", "eager")),
            "size": len(kernel.weights),
            "created_ns": created_ns,
            "metadata": json.dumps(metadata),
            "family": str(metadata.get("family", "")),
            "stage": STAGES["compile_key" in metadata],
        }
        with self._lock, self._db:
            self._db.execute(
                f"INSERT INTO kernels ({_COLUMNS}) VALUES (:digest, :key, {_NEXT_VERSION}, "
                ":blueprint, :signature, :tier, :strategy, :size, :created_ns, :metadata, :family, :stage) "
                "ON CONFLICT (digest) DO NOTHING",
                values,
            )

    def withdraw(self, digest: str, why: str, withdrawn_ns: int) -> bool:
        """Take an artifact's row out and keep why; whether there was one."""
        with self._lock, self._db:
            moved = self._db.execute(
                "INSERT INTO withdrawn SELECT key, version, digest, ?, ? FROM kernels WHERE digest = ?",
                (withdrawn_ns, why, digest),
            ).rowcount
            self._db.execute("DELETE FROM kernels WHERE digest = ?", (digest,))
        return moved > 0

    def newest(self, key: str, digest: str = "") -> str | None:
        """The digest of the highest version of a name, or ``digest`` itself where that is one of its versions."""
        with self._lock:
            row = self._db.execute(
                "SELECT digest FROM kernels WHERE key = ? AND (? = '' OR digest = ?) ORDER BY version DESC LIMIT 1",
                (key, digest, digest),
            ).fetchone()
        return str(row[0]) if row else None

    def find(self, digest: str) -> Row | None:
        """The row of an artifact."""
        with self._lock:
            values = self._db.execute(f"SELECT {_COLUMNS} FROM kernels WHERE digest = ?", (digest,)).fetchone()
        return _row(values) if values else None

    def rows(self, **filters: str | int) -> list[Row]:
        """Rows whose columns have the values given, by name and version; an empty value does not filter."""
        given = {name: value for name, value in filters.items() if value}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "1"
        with self._lock:
            found = self._db.execute(
                f"SELECT {_COLUMNS} FROM kernels WHERE {where} ORDER BY key, version", given
            ).fetchall()
        return [_row(values) for values in found]

    def sizes(self) -> dict[str, int]:
        """The bytes of every artifact by its digest."""
        with self._lock:
            return dict(self._db.execute("SELECT digest, size FROM kernels").fetchall())

    def latest(self) -> list[str]:
        """The digest of each name's highest version, what was added last first."""
        with self._lock:
            found = self._db.execute(
                "SELECT digest, max(version) FROM kernels GROUP BY key ORDER BY created_ns DESC"
            ).fetchall()
        return [digest for digest, _ in found]

    def withdrawals(self, key: str = "") -> list[Withdrawal]:
        """What was withdrawn, of one name or of all, the newest first."""
        with self._lock:
            found = self._db.execute(
                "SELECT key, version, digest, withdrawn_ns, why FROM withdrawn WHERE ? IN ('', key) "
                "ORDER BY withdrawn_ns DESC, key, version",
                (key,),
            ).fetchall()
        return [Withdrawal(*values) for values in found]

    def totals(self) -> tuple[int, int]:
        """How many artifacts there are, and their bytes."""
        with self._lock:
            count, size = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM kernels").fetchone()
        return int(count), int(size)

    def faults(self) -> list[str]:
        """What SQLite finds wrong with its own file; nothing where it is whole."""
        with self._lock:
            found = self._db.execute("PRAGMA quick_check").fetchall()
        return [str(text) for (text,) in found if text != "ok"]

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _row(values: tuple[Any, ...]) -> Row:
    columns = dict(zip(_COLUMNS.split(", "), values, strict=True))
    return Row(**{**columns, "tier": BlueprintTier(columns["tier"]), "metadata": json.loads(columns["metadata"])})
