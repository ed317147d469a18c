"""The parent's end of a job process: starts it, hands it kernels, reads its answers, kills it at its limits.

The limit on time counts the processor time of the job and its compilers: a job in the background that waits for a busy
machine is not at fault. One that sleeps for ten times the limit, and neither computes nor waits for a processor, hangs.
The limit on memory counts what the job and its compilers hold together; each alone is bound by its own address space,
see `job`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

from esper_ray.contracts.ports import KernelSpec
from esper_ray.errors import EnvironmentFault
from esper_ray.tezzeret.job import spec_to_json
from esper_ray.tezzeret.strategies import StrategyName
from esper_ray.tezzeret.toolchain import JOB_COMMAND, Phase, environment

SLEEP_FACTOR = 10.0
_CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """When a job is killed: processor seconds of one kernel, MiB of the job and its compilers."""

    seconds: float
    memory_mb: int


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a kernel that was handed to a job: "done" with its answer, "failed", or "lost" with the job.

    "absent" is a job that ended before it was ready: whatever it was given is not at fault.
    """

    kind: Literal["done", "failed", "lost", "absent"]
    spec: KernelSpec
    strategy: StrategyName
    content: Any = None
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Use:
    """Processor seconds of a job, its living children and those it has waited for; MiB that they hold; whether one of
    them computes or would, if it got a processor."""

    seconds: float
    memory_mb: float
    awake: bool


class Job:
    """One job process; a context manager that leaves no process behind. It has one kernel at a time.

    Args:
        lane: tells jobs that run side by side apart, in the names of their logs.
        on_cpu: its address space may be bound.
        background: it runs only when nobody else wants the processor.

    Raises:
        EnvironmentFault: the process cannot be started.
    """

    def __init__(
        self,
        phase: Phase,
        folder: Path,
        limits: Limits,
        *,
        lane: int = 0,
        on_cpu: bool = True,
        background: bool = False,
        command: Sequence[str] = JOB_COMMAND,
    ) -> None:
        self._limits = limits
        self._log = folder / f"job-{phase}-{lane}.log"
        self._order: tuple[KernelSpec, StrategyName] | None = None
        self._ready, self.over = False, False
        self._buffer = b""
        self._busy = self._began = self._checked = 0.0
        self._last = _Use(0.0, 0.0, True)
        self._stirred = 0.0
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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._answers.fileno(), False)
        self._send({"phase": phase, "memory_mb": limits.memory_mb, "on_cpu": on_cpu, "background": background})

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def idle(self) -> bool:
        """Whether it can be given a kernel."""
        return self._order is None and not self.over and self._process.poll() is None

    @property
    def working(self) -> bool:
        """Whether a kernel is with it."""
        return self._order is not None

    def fileno(self) -> int:
        """For ``select``: readable when `poll` has something to read."""
        return self._answers.fileno()

    def give(self, spec: KernelSpec, strategy: StrategyName = "standard") -> None:
        """Hand it a kernel; what becomes of it comes out of `poll`."""
        assert self.idle, "one kernel at a time"
        self._order = (spec, strategy)
        self._restart_clock()
        self._send({"kernel": spec_to_json(spec), "strategy": strategy})

    def poll(self) -> Event | None:
        """What became of its kernel, if that is known now. A job over its limits is killed first."""
        with contextlib.suppress(BlockingIOError):
            while self._order is not None and not self.over:
                read = os.read(self._answers.fileno(), 1 << 20)
                if not read:
                    return self._end(self._epitaph())
                self._buffer += read
                event = self._answered()
                if event is not None:
                    return event
        if self._order is not None and time.monotonic() - self._checked > _CHECK_SECONDS:
            return self._check_limits()
        return None

    def kill(self) -> None:
        """End the job and its compilers, if they still run."""
        self.over = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._orders, self._answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _send(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # a job that died is told by `poll`
            self._orders.write(json.dumps(message).encode() + b"\n")
            self._orders.flush()

    def _answered(self) -> Event | None:
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            message = json.loads(line)
            if "ready" in message:
                self._ready = True
                self._restart_clock()
            elif "done" in message:
                return self._event("done", content=message["done"])
            else:
                return self._event("failed", why=message["failed"])
        return None

    def _event(self, kind: Literal["done", "failed", "lost", "absent"], content: Any = None, why: str = "") -> Event:
        assert self._order is not None
        (spec, strategy), self._order = self._order, None
        return Event(kind, spec, strategy, content, why, time.monotonic() - self._began)

    def _end(self, why: str) -> Event:
        self.kill()
        return self._event("lost" if self._ready else "absent", why=why)

    def _restart_clock(self) -> None:
        self._last, self._began = self._use(), time.monotonic()
        self._busy = self._last.seconds
        self._checked = self._stirred = self._began

    def _check_limits(self) -> Event | None:
        self._checked = time.monotonic()
        now, seconds = self._use(), self._limits.seconds
        if now.awake or now.seconds > self._last.seconds:
            self._stirred = self._checked
        self._last = now
        if now.seconds - self._busy > seconds:
            return self._end(f"Killed at its time limit of {seconds:g} s.")
        if self._checked - self._stirred > SLEEP_FACTOR * seconds:
            return self._end(f"Killed: it slept for {SLEEP_FACTOR * seconds:g} s.")
        if now.memory_mb > self._limits.memory_mb:
            return self._end(f"Killed at its memory limit of {self._limits.memory_mb} MiB.")
        return None

    def _use(self) -> _Use:
        seconds, held, awake = 0.0, 0.0, False
        try:
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess), each.oneshot():
                    times = each.cpu_times()
                    seconds += times.user + times.system
                    if each is process:
                        seconds += times.children_user + times.children_system
                    held += each.memory_info().rss
                    awake |= each.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        except psutil.NoSuchProcess:
            return self._last
        return _Use(seconds, held / 2**20, awake)

    def _epitaph(self) -> str:
        code = self._process.wait()
        name = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        tail = " ".join(self._log.read_text(errors="replace").split())[-400:]
        return f"The job ended {name}. {tail}".strip()
