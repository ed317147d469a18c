"""Runs a Redis of our own where none is given.

It listens on a free loopback port (never 6379, which a Ray head takes) behind a password that only
the owner of the home folder can read. It dies with its owner, and comes back on its old port with its data.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import redis

from esper_ray.errors import EnvironmentFault
from esper_ray.oona.address import (
    ENVIRONMENT_URL,
    RedisChoice,
    answers,
    find_binary,
    find_url_of,
    resolve_redis,
    url_file,
)
from esper_ray.oona.redis_transport import connect
from esper_ray.reliability import atomic

_RAY_HEAD_PORT = 6379
_START_SECONDS = 15.0
_STOP_SECONDS = 5.0
_ATTEMPTS = 5
# Asks the kernel to end us with our parent, then becomes the server. A preexec_fn would do the same, but is not safe
# in a process with threads.
_TRAMPOLINE = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux':\n"
    "    ctypes.CDLL(None).prctl(1, 15)\n"
    "if os.getppid() != int(sys.argv[1]):\n"
    "    sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class ManagedRedis:
    """Our own Redis below ``home``; its data outlives it.

    Its address is kept in ``home/redis/url`` (readable by the owner only), where senders and readers in other
    processes find it again after a restart.
    """

    def __init__(self, home: Path, *, binary: Path | None = None) -> None:
        self.folder = (home / "redis").absolute()
        self._home, self._binary = home, binary
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> str:
        """Start it if it does not run, and return its address.

        Raises:
            EnvironmentFault: it cannot be started, or another process runs the one of this home.
        """
        if self.alive():
            return self.url
        binary = self._binary or find_binary()
        atomic.make_folder(self.folder)
        self._hold_lock()
        self._await_predecessor()
        why = ""
        for attempt in range(_ATTEMPTS):
            port = self._choose_port(keep=attempt == 0)
            url = f"redis://:{self._password()}@127.0.0.1:{port}/0"
            self._write_settings(port)
            self._process = self._spawn(binary)
            why = self._await_ready(url)
            if not why:
                self.url = url
                atomic.write_text(url_file(self._home), url + "\n", mode=0o600)
                return url
        self._release_lock()
        raise EnvironmentFault(
            "The managed Redis does not start.",
            why=why,
            remedy=f"See {self.folder / 'redis.log'}, or set {ENVIRONMENT_URL} to a Redis of your own.",
        )

    def stop(self) -> None:
        """End it in order, its data on disk. Stopping twice is no mistake."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_SECONDS)
        self._release_lock()

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        """Start the server from a thread that lives as long: a child ends with the *thread* that made it."""
        made: list[subprocess.Popen[bytes] | OSError] = []
        ready = threading.Event()

        def keep() -> None:
            command = [sys.executable, "-S", "-E", "-c", _TRAMPOLINE, str(os.getpid()), str(binary)]
            try:
                process = subprocess.Popen(
                    [*command, str(self.folder / "redis.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                made.append(error)
                ready.set()
                return
            made.append(process)
            ready.set()
            process.wait()

        threading.Thread(target=keep, name="oona-redis", daemon=True).start()
        ready.wait()
        if isinstance(made[0], OSError):
            raise EnvironmentFault(f"{binary} cannot be run.", why=f"{made[0].strerror}.") from made[0]
        return made[0]

    def _await_ready(self, url: str) -> str:
        """Empty when it answers, else why it does not."""
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return self._last_words()
            if answers(url):
                return ""
            time.sleep(0.02)
        self._process.kill()
        self._process.wait(_STOP_SECONDS)
        return f"It did not answer within {_START_SECONDS:.0f} s."

    def _last_words(self) -> str:
        try:
            lines = (self.folder / "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return f"Its last words: {lines[-1]}" if lines else "It ended at once and left no log."

    def _await_predecessor(self) -> None:
        """A server whose owner was killed takes a moment to end; two must never write the same files."""
        url = find_url_of(self._home)
        deadline = time.monotonic() + _STOP_SECONDS
        while url is not None and answers(url):
            if time.monotonic() > deadline:
                with contextlib.suppress(redis.RedisError), contextlib.closing(connect(url)) as client:
                    client.shutdown()
                return
            time.sleep(0.05)

    def _choose_port(self, *, keep: bool) -> int:
        previous = find_url_of(self._home)
        if keep and previous is not None:
            port = urlsplit(previous).port or 0
            if port and _is_free(port):
                return port
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port != _RAY_HEAD_PORT:
                return port

    def _password(self) -> str:
        path = self.folder / "password"
        if not path.exists():
            atomic.write_text(path, secrets.token_urlsafe(24), mode=0o600)
        return path.read_text().strip()

    def _write_settings(self, port: int) -> None:
        lines = (
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {self._password()}",
            f'dir "{self.folder}"',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "daemonize no",
            f'logfile "{self.folder / "redis.log"}"',
        )
        atomic.write_text(self.folder / "redis.conf", "\n".join(lines) + "\n", mode=0o600)

    def _hold_lock(self) -> None:
        if self._lock is not None:
            return
        lock = (self.folder / "owner.lock").open("a")
        deadline = time.monotonic() + _STOP_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    lock.close()
                    raise EnvironmentFault(
                        f"The Redis of {self._home} is run by another process.",
                        why="A system is already up in this home folder.",
                        remedy="Use that one, stop it with `esper down`, or set ESPER_HOME to another folder.",
                    ) from None
                time.sleep(0.05)
            else:
                self._lock = lock
                return

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


__all__ = ("ManagedRedis", "RedisChoice", "resolve_redis")
