"""Runs the application in a thread, on an address that it owns before it says so."""

from __future__ import annotations

import errno
import socket
import threading

import uvicorn
from fastapi import FastAPI

from esper_ray.errors import EnvironmentFault


class Server:
    """Listens from construction on; port 0 takes a free one.

    Raises:
        EnvironmentFault: the port is in use or the address is not ours.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        self._socket = _listen(host, port)
        self._host, self.port = host, int(self._socket.getsockname()[1])
        settings = uvicorn.Config(app, log_level="warning", access_log=False, ws="websockets-sansio", lifespan="off")
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="nissa-http", daemon=True
        )

    @property
    def address(self) -> str:
        """What to type into a browser."""
        host = "127.0.0.1" if self._host in ("0.0.0.0", "::") else self._host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout: float = 5.0) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._server.force_exit = True
        self._socket.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise EnvironmentFault(
                f"Port {port} on {host} is in use.",
                why="Another program, or another run of this one, listens there.",
                remedy="Set nissa.port to another port, or to 0 for any free one.",
            ) from None
        raise EnvironmentFault(
            f"Mission control cannot listen on {host}:{port}.",
            why=f"The system says: {error.strerror or error}.",
            remedy="Set nissa.host to an address of this machine and nissa.port to a port above 1023.",
        ) from None
    return listener
