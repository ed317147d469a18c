"""The catalogue of what is stored: one SQLite table, WAL mode, ``synchronous=FULL``. Rows are only ever added."""

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
"""
_COLUMNS = "digest, key, version, blueprint, signature, tier, strategy, size, created_ns, metadata"


@dataclass(frozen=True, slots=True)
class Row:
    """What the catalogue knows of one artifact; ``size`` in bytes."""

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
        except sqlite3.Error as error:
            raise EnvironmentFault(
                f"Cannot open the catalogue {path}.",
                why=f"SQLite says: {error}.",
                remedy="Check the folder's permissions and free space; move a damaged catalogue away to start anew.",
            ) from error

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
        }
        with self._lock, self._db:
            self._db.execute(
                f"INSERT INTO kernels ({_COLUMNS}) VALUES (:digest, :key, "
                "(SELECT coalesce(max(version), 0) + 1 FROM kernels WHERE key = :key), "
                ":blueprint, :signature, :tier, :strategy, :size, :created_ns, :metadata) "
                "ON CONFLICT (digest) DO NOTHING",
                values,
            )

    def newest(self, key: str, digest: str = "") -> str | None:
        """The digest of the highest version of a name, or ``digest`` itself where that is one of its versions."""
        with self._lock:
            row = self._db.execute(
                "SELECT digest FROM kernels WHERE key = ? AND (? = '' OR digest = ?) ORDER BY version DESC LIMIT 1",
                (key, digest, digest),
            ).fetchone()
        return str(row[0]) if row else None

    def has(self, digest: str) -> bool:
        """Whether any row names that artifact."""
        with self._lock:
            return self._db.execute("SELECT 1 FROM kernels WHERE digest = ?", (digest,)).fetchone() is not None

    def rows(self, **filters: str | int) -> list[Row]:
        """Rows whose columns have the values given, by name and version; an empty value does not filter."""
        given = {name: value for name, value in filters.items() if value}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "1"
        with self._lock:
            found = self._db.execute(
                f"SELECT {_COLUMNS} FROM kernels WHERE {where} ORDER BY key, version", given
            ).fetchall()
        return [_row(values) for values in found]

    def totals(self) -> tuple[int, int]:
        """How many artifacts there are, and their bytes."""
        with self._lock:
            count, size = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM kernels").fetchone()
        return int(count), int(size)

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _row(values: tuple[Any, ...]) -> Row:
    columns = dict(zip(_COLUMNS.split(", "), values, strict=True))
    return Row(**{**columns, "tier": BlueprintTier(columns["tier"]), "metadata": json.loads(columns["metadata"])})
