"""Whether an artifact is what the catalogue says: asked when it is admitted from disk, and by `esper urza verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esper_ray.contracts.ports import Kernel
from esper_ray.errors import CorruptArtifact
from esper_ray.reliability.ids import digest as digest_of
from esper_ray.urza import artifacts
from esper_ray.urza.catalog import Row

Kind = Literal["damaged", "swapped", "row without file", "file without row"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        digest: of the artifact that should be there; for a file without a row, the one in its name.
        kernel: its kernel with the version, or what is known of it.
        blueprint: for the order that makes it again, with ``signature``; both empty for a file without a row.
    """

    kind: Kind
    digest: str
    kernel: str
    path: str
    why: str
    blueprint: str = ""
    signature: str = ""

    def error(self) -> CorruptArtifact:
        """The same as what a fetch answers."""
        what = "is gone" if self.kind == "row without file" else "is damaged"
        return CorruptArtifact(
            f"The artifact {self.path} of {self.kernel} {what}.", why=self.why, remedy=artifacts.REMEDY
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What a walk over catalogue and folder found: how many artifacts are sound, and everything else by name."""

    sound: int
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether every row can be served. A file without a row is waste, not damage."""
        return all(finding.kind == "file without row" for finding in self.findings)

    def of(self, *kinds: Kind) -> tuple[str, ...]:
        """The digests of what was found of these kinds."""
        return tuple(finding.digest for finding in self.findings if finding.kind in kinds)


def examine(path: Path, row: Row, name_of: Callable[[str], str | None]) -> Kernel | Finding:
    """Read the file of a row and compare it with the row: its kernel, or what is wrong with it.

    Args:
        name_of: the kernel of another artifact by its digest, to say what a swapped file holds instead.

    Raises:
        OSError: the disk cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return finding("row without file", path, row, "The catalogue names it.")
    found = digest_of(data)
    if found != row.digest:
        other = name_of(found)
        if other is not None:
            return finding("swapped", path, row, f"It holds the artifact of {other}.")
        if len(data) != row.size:
            return finding("damaged", path, row, f"It has {len(data)} bytes where {row.size} were stored.")
        return finding("damaged", path, row, f"Its digest is {found[:12]} where {row.digest[:12]} is expected.")
    try:
        kernel = artifacts.read(data, where=str(path))
    except CorruptArtifact as error:
        return finding("damaged", path, row, error.why)
    if kernel.spec.key != row.key:
        return finding("swapped", path, row, f"The catalogue gives it to {row.key}, and it is {kernel.spec.key}.")
    if kernel.metadata != row.metadata:
        return finding("swapped", path, row, "The catalogue describes it otherwise than it does itself.")
    return kernel


def finding(kind: Kind, path: Path, row: Row, why: str) -> Finding:
    """A finding about the artifact of a row."""
    return Finding(kind, row.digest, row.name, str(path), why, row.blueprint, row.signature)


def stray(path: Path, digest: str) -> Finding:
    """A file that no row names: of a put that was interrupted, or left by a catalogue that is gone."""
    return Finding("file without row", digest, "no kernel of the catalogue", str(path), "No row names it.")
