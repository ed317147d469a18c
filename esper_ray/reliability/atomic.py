"""Files that are old or new, never half: temporary name, flush, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from esper_ray.errors import StorageFault
from esper_ray.reliability.failpoints import passing


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` so that a crash leaves the old content or the new one.

    Raises:
        StorageFault: the folder cannot be written (no permission, disk full).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained(path):
        _make_durable(path.parent)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            passing("atomic.written")
            os.replace(temporary, path)
            passing("atomic.renamed")
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def create_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> bool:
    """Write ``path`` if nobody did yet: of several processes exactly one gets True, and all find its content.

    Raises:
        StorageFault: the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    write_bytes(draft, data, mode=mode)
    with explained(path):
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        sync_folder(path.parent)
    return True


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """As `write_bytes`, for UTF-8 text."""
    write_bytes(path, text.encode(), mode=mode)


def remove_drafts(folder: Path) -> None:
    """Remove what a writer that was killed left under temporary names; nobody else may be writing there."""
    for pattern in (".*.tmp", ".*.draft"):
        for draft in folder.glob(pattern):
            draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents, durably, or say why that is impossible."""
    with explained(path):
        _make_durable(path)
    return path


def _make_durable(folder: Path) -> None:
    """Create a folder with its parents. Each new one is synced in the one that holds it, or its files could be lost."""
    if folder.is_dir():
        return
    _make_durable(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system says of writing ``path``, as a `StorageFault`."""
    try:
        yield
    except OSError as error:
        raise StorageFault(
            f"Cannot write {path}.",
            why=f"The system says: {error.strerror or error}.",
            remedy="Free some space or permissions there, or point ESPER_HOME at a folder you can write.",
        ) from error
