"""What a power cut leaves: the writes of a program, recorded by strace and replayed without those not yet synced.

A kill never shows this, for the kernel keeps what it has cached. The disk modelled here keeps only what POSIX promises:
the content of a file as of its last fsync, and the names in a folder as of the folder's last fsync. What was not synced
may be there or not, in any mixture, and of a write each sector of 512 bytes by itself.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

How = Literal["nothing unsynced", "names only", "content only", "some", "everything"]
"""What of the unsynced is left: the last is what a kill leaves."""
HOWS: tuple[How, ...] = ("nothing unsynced", "names only", "content only", "some", "everything")
_SECTOR = 512
_CONTENT = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "ftruncate", "fallocate", "fsync", "fdatasync")
_RENAMES, _REMOVALS = ("rename", "renameat", "renameat2"), ("unlink", "unlinkat", "rmdir")
_NAMING = ("mkdir", "mkdirat", *_RENAMES, *_REMOVALS, "link", "linkat", "symlink")
_CALLS = ",".join(("openat", *_CONTENT, *_NAMING))
_LINE = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_HEX = re.compile(r"(?:\\x[0-9a-f]{2})+")
_FD = re.compile(r"^(\d+)<")


@dataclass(slots=True)
class _File:
    """A file's content as written and as synced, and the writes between."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Callable[[bytearray], None]] = field(default_factory=list)

    def do(self, change: Callable[[bytearray], None]) -> None:
        change(self.now)
        self.pending.append(change)

    def sync(self) -> None:
        self.synced = bytearray(self.now)
        self.pending.clear()


FOLDER = _File()
_Names = dict[Path, _File]
_Change = tuple[tuple[Path, _File | None], ...]


@dataclass(slots=True)
class _Write:
    """One write; applied whole, or by sectors as ``keep`` says."""

    at: int
    data: bytes
    keep: Callable[[], bool] | None = None

    def __call__(self, content: bytearray) -> None:
        position = self.at
        while position < self.at + len(self.data):
            end = min((position // _SECTOR + 1) * _SECTOR, self.at + len(self.data))
            if self.keep is None or self.keep():
                if len(content) < end:
                    content.extend(bytes(end - len(content)))
                content[position:end] = self.data[position - self.at : end - self.at]
            position = end


@dataclass(slots=True)
class _Truncate:
    size: int

    def __call__(self, content: bytearray) -> None:
        if len(content) < self.size:
            content.extend(bytes(self.size - len(content)))
        del content[self.size :]


class Disk:
    """A folder on a disk that forgets what was not synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: _Names = {root: FOLDER}
        self._synced: _Names = {root: FOLDER}
        self._pending: list[_Change] = []
        self._open: dict[int, tuple[_File, Path]] = {}
        self._position: dict[int, int] = {}

    def apply(self, call: str, arguments: str, result: int) -> None:
        """Take one line of the record.

        Raises:
            NotImplementedError: a call on this folder that is not modelled.
        """
        texts = [_bytes(text) for text in _TEXT.findall(arguments)]
        if call == "openat":
            self._opened(Path(texts[0].decode()), arguments, result)
        elif call in _CONTENT:
            match = _FD.match(arguments)
            assert match is not None, arguments
            self._on_file(call, int(match[1]), texts, arguments, result)
        else:
            paths = [Path(text.decode()) for text in texts]
            if any(self._mine(path) for path in paths):
                self._on_names(call, paths)

    def _mine(self, path: Path) -> bool:
        return path.is_relative_to(self.root)

    def _opened(self, path: Path, arguments: str, fd: int) -> None:
        self._open.pop(fd, None)
        if not self._mine(path):
            return
        if path not in self._names:
            assert "O_CREAT" in arguments, arguments
            self._change((path, _File()))
        elif "O_TRUNC" in arguments:
            self._names[path].do(_Truncate(0))
        self._open[fd], self._position[fd] = (self._names[path], path), 0

    def _on_file(self, call: str, fd: int, texts: Sequence[bytes], arguments: str, result: int) -> None:
        if fd not in self._open:
            return
        file, path = self._open[fd]
        last = int(arguments.rsplit(", ", 1)[-1]) if ", " in arguments else 0
        if call == "pwrite64":
            file.do(_Write(last, texts[0][:result]))
        elif call == "write":
            file.do(_Write(self._position[fd], texts[0][:result]))
            self._position[fd] += result
        elif call == "ftruncate":
            file.do(_Truncate(last))
        elif call not in ("fsync", "fdatasync"):
            raise NotImplementedError(f"{call} {path}")
        elif file is FOLDER:
            self._sync_names(path)
        else:
            file.sync()

    def _on_names(self, call: str, paths: Sequence[Path]) -> None:
        if call in ("mkdir", "mkdirat"):
            self._change((paths[0], FOLDER))
        elif call in _RENAMES and paths[0].parent == paths[1].parent:
            self._change((paths[0], None), (paths[1], self._names[paths[0]]))
        elif call in _REMOVALS:
            self._change((paths[0], None))
        else:
            raise NotImplementedError(f"{call} {paths}")

    def _change(self, *change: tuple[Path, _File | None]) -> None:
        _rename(self._names, change)
        self._pending.append(change)

    def _sync_names(self, folder: Path) -> None:
        for change in [change for change in self._pending if change[0][0].parent == folder]:
            _rename(self._synced, change)
            self._pending.remove(change)

    def left(self, how: How, chance: random.Random) -> dict[Path, bytes | None]:
        """The files by their path below the folder, folders as None, after a power cut now.

        SQLite's index of its log is left out: it is written through shared memory, which no record shows, and made
        anew by whoever opens the database first.
        """
        names = dict(self._synced)
        for change in self._pending:
            if how in ("names only", "everything") or (how == "some" and chance.random() < 0.5):
                _rename(names, change)
        found: dict[Path, bytes | None] = {}
        for path, file in names.items():
            inner = path.relative_to(self.root)
            if inner.name.endswith("-shm"):
                continue
            if all(self.root / parent in names for parent in inner.parents):
                found[inner] = None if file is FOLDER else _content(file, how, chance)
        return found


def _rename(names: _Names, change: _Change) -> None:
    for path, file in change:
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def _content(file: _File, how: How, chance: random.Random) -> bytes:
    content = bytearray(file.synced)
    for change in file.pending:
        if how in ("content only", "everything"):
            change(content)
        elif how == "some" and isinstance(change, _Write):
            _Write(change.at, change.data, lambda: chance.random() < 0.5)(content)
        elif how == "some" and chance.random() < 0.5:
            change(content)
    return bytes(content)


@dataclass(frozen=True, slots=True)
class Cut:
    """The disk after a power cut behind the call ``after``; ``said`` is what the program had printed before it."""

    after: str
    how: How
    said: tuple[str, ...]
    files: dict[Path, bytes | None]

    def restore(self, folder: Path) -> None:
        """Make ``folder`` what the disk holds."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in sorted(self.files):
            content = self.files[path]
            if content is None:
                (folder / path).mkdir(exist_ok=True)
            else:
                (folder / path).write_bytes(content)


def possible() -> bool:
    """Whether programs can be recorded here."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


def record(program: str, folder: Path, trace: Path) -> None:
    """Run a Python program with ``folder``, which must be empty, as its argument, and write down its system calls."""
    assert not list(folder.iterdir())
    strace = ["strace", "-y", "-xx", "-s", "10000000", "-e", f"trace={_CALLS}", "-o", str(trace)]
    subprocess.run([*strace, sys.executable, "-c", program, str(folder)], check=True, stdout=subprocess.PIPE)


def cuts(trace: Path, folder: Path, *, seed: int, some: int = 1) -> Iterator[Cut]:
    """Every different disk that a power cut could leave, at each call and in each way.

    Args:
        some: mixtures drawn at each call.
    """
    disk, said, printed = Disk(folder), "", 0
    chance = random.Random(seed)
    seen: set[int] = set()
    for line in trace.read_text().splitlines():
        match = _LINE.match(line)
        if match is None or match[3].startswith("-"):
            continue
        call, arguments, result = match[1], match[2], int(match[3])
        if call == "write" and arguments.startswith("1<"):
            said += _bytes(_TEXT.findall(arguments)[0]).decode()
            printed += 1
        disk.apply(call, arguments, result)
        for how in (*HOWS, *["some"] * (some - 1)):
            files = disk.left(how, chance)
            key = hash((printed, tuple(sorted((str(path), content) for path, content in files.items()))))
            if key not in seen:
                seen.add(key)
                yield Cut(f"{call}({_readable(arguments)})", how, tuple(said.split("\n")[:-1]), files)


def _readable(arguments: str) -> str:
    return _HEX.sub(lambda found: _bytes(found[0]).decode("latin1")[-60:], arguments)[:200]


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
