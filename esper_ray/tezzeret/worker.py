"""The parent's end of a job process: starts it, reads its answers, kills it at its time limit.

The limit counts the processor time of the job and its compilers: a job in the background that waits for a busy machine
is not at fault. Ten times the limit in wall time ends a job that hangs without computing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

from esper_ray.contracts.ports import KernelSpec
from esper_ray.errors import EnvironmentFault
from esper_ray.tezzeret.job import spec_to_json
from esper_ray.tezzeret.toolchain import JOB_COMMAND, Phase, environment

POLL_SECONDS = 0.1
WALL_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to the ``index``-th kernel of a job; ``index`` is -1 for a job that ended before its first."""

    kind: Literal["started", "done", "failed", "ended", "stopped"]
    index: int = -1
    content: Mapping[str, Any] | None = None
    why: str = ""


class Job:
    """One job process over a list of kernels; a context manager that leaves no process behind.

    Raises:
        EnvironmentFault: the process cannot be started.
    """

    def __init__(
        self,
        phase: Phase,
        specs: Sequence[KernelSpec],
        folder: Path,
        *,
        limit_seconds: float,
        memory_mb: int,
        command: Sequence[str] = JOB_COMMAND,
    ) -> None:
        self._limit = limit_seconds
        self._log = folder / f"job-{phase}.log"
        self._buffer = b""
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(folder),
                    start_new_session=True,
                )
        except OSError as error:
            raise EnvironmentFault("The forge cannot start a job.", why=f"{error}.") from error
        request = {"phase": phase, "memory_mb": memory_mb, "kernels": [spec_to_json(spec) for spec in specs]}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a job that died at once is told by `events`
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End the job and its compilers, if they still run."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def events(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """The answers as they come; the last event is "ended" (with the reason, if it was not in order) or "stopped".

        A job that is over its limit, or asked to stop, is killed first.
        """
        current = -1
        busy, began = self._busy_seconds(), time.monotonic()
        while True:
            line = self._next_line()
            if line == b"":
                yield Event("ended", current, why=self._epitaph())
                return
            if line is not None:
                event = _event(line)
                current = event.index if event.kind == "started" else -1
                busy, began = self._busy_seconds(), time.monotonic()
                yield event
            if stop():
                self.kill()
                yield Event("stopped", current)
                return
            if self._busy_seconds() - busy > self._limit or time.monotonic() - began > WALL_FACTOR * self._limit:
                self.kill()
                yield Event("ended", current, why=f"Killed at its time limit of {self._limit:g} s.")
                return

    def _next_line(self) -> bytes | None:
        """A line, None when none came within the poll interval, empty at the end."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        if b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], POLL_SECONDS)
            if not ready:
                return None
            read = os.read(descriptor, 1 << 16)
            if not read:
                return b""
            self._buffer += read
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        return line

    def _busy_seconds(self) -> float:
        """Processor time of the job, its living children, and those it has waited for."""
        try:
            process = psutil.Process(self._process.pid)
            times = process.cpu_times()
            total = times.user + times.system + times.children_user + times.children_system
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    own = child.cpu_times()
                    total += own.user + own.system
        except psutil.NoSuchProcess:
            return 0.0
        return float(total)

    def _epitaph(self) -> str:
        code = self._process.wait()
        if code == 0:
            return ""
        name = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        tail = " ".join(self._log.read_text(errors="replace").split())[-400:]
        return f"The job ended {name}. {tail}".strip()


def _event(line: bytes) -> Event:
    message = json.loads(line)
    if "started" in message:
        return Event("started", message["started"])
    if "done" in message:
        return Event("done", message["done"], message)
    return Event("failed", message["failed"], why=message["why"])
