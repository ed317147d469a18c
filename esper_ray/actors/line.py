"""A direct line between two processes of one node: a Unix socket that an actor answers on, beside its Ray methods.

A call through Ray takes 2 to 4 ms on a machine with two busy processors; the same bytes over a socket take 0.2. The
answer at a boundary has 12 ms in all, so Tamiyo has a line; Urza has one for the kernels that seeds wait for. Who
cannot reach it, from another node or another network namespace say, calls them through Ray as everybody else. The
socket's name is abstract (Linux), so that nothing is left behind; who connects must know the key, which only a Ray
call tells.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from esper_ray.errors import EnvironmentFault, EsperError

log = logging.getLogger(__name__)
Serve = Callable[[list[bytes]], Sequence[bytes]]
_GIVEN, _FAULT = b"given", b"fault"
_MOST_UNCALLED_FOR = 32


@dataclass(frozen=True, slots=True)
class Address:
    """Where a line is answered: on which machine, under which name, and the key to it."""

    host: str
    name: str
    key: bytes


class LineServer:
    """Answers on a line until the process ends. Each connection has a thread of its own.

    Args:
        serve: from the parts of a request to the parts of its answer; an `EsperError` becomes the caller's.
    """

    def __init__(self, purpose: str, serve: Serve) -> None:
        self._serve = serve
        self.address: Address | None = None
        if sys.platform.startswith("linux"):
            name, key = f"\0esper-{purpose}-{secrets.token_hex(8)}", secrets.token_bytes(32)
            self._listener = Listener(name, "AF_UNIX", authkey=key)
            self.address = Address(socket.gethostname(), name, key)
            threading.Thread(target=self._accept, name=f"line-{purpose}", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, OSError) as fault:
                log.warning("somebody could not be let in on the line: %s", fault)
                continue
            threading.Thread(target=self._answer, args=(connection,), name="line-answer", daemon=True).start()

    def _answer(self, connection: Connection[Any, Any]) -> None:
        try:
            while True:
                number, *parts = unpack(connection.recv_bytes())
                try:
                    answer = [number, _GIVEN, *self._serve(parts)]
                except EsperError as fault:
                    answer = [number, _FAULT, str(fault).encode()]
                except Exception as fault:
                    # The caller must not wait for an answer that will never come.
                    log.exception("a call on the line met a fault")
                    answer = [number, _FAULT, f"It met a fault of its own: {fault!r}".encode()]
                connection.send_bytes(pack(answer))
        except (EOFError, OSError):
            log.debug("a caller hung up")
        except (struct.error, ValueError) as fault:
            log.warning("a request on the line could not be read: %s", fault)
        finally:
            connection.close()


class Line:
    """The caller's end, for one thread. Answers may be waited for in any order; of those that nobody waits for any more
    the oldest are thrown away.

    Raises:
        OSError: nobody answers there, or not with this key.
    """

    def __init__(self, address: Address) -> None:
        if address.host != socket.gethostname():
            raise OSError(f"the line ends on {address.host}")
        try:
            self._connection = Client(address.name, "AF_UNIX", authkey=address.key)
        except (AuthenticationError, EOFError) as fault:
            raise OSError(str(fault)) from None
        self._numbers = itertools.count(1)
        self._came: dict[bytes, list[bytes]] = {}

    def call(self, parts: Sequence[bytes]) -> LineAnswer:
        """Send a request; returns at once.

        Raises:
            OSError: the line is broken.
        """
        number = str(next(self._numbers)).encode()
        self._connection.send_bytes(pack([number, *parts]))
        return LineAnswer(self, number)

    def close(self) -> None:
        self._connection.close()

    def take(self, number: bytes, timeout: float | None) -> list[bytes] | None:
        """The answer to that call, its kind first; None when it is not there in time.

        Raises:
            EOFError, OSError: the line is broken.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        # An answer to another call must not buy this one more time.
        while number not in self._came and self._connection.poll(
            None if give_up is None else max(0.0, give_up - time.monotonic())
        ):
            came, *answer = unpack(self._connection.recv_bytes())
            self._came[came] = answer
            while len(self._came) > _MOST_UNCALLED_FOR:
                del self._came[next(iter(self._came))]
        return self._came.pop(number, None)


class LineAnswer:
    """One call that is out."""

    def __init__(self, line: Line, number: bytes) -> None:
        self._line, self._number = line, number

    def wait(self, timeout: float | None) -> list[bytes] | None:
        """The answer's parts, or None when it is not there in time.

        Raises:
            EsperError: the other end's, or that the line broke.
        """
        try:
            answer = self._line.take(self._number, timeout)
        except (EOFError, OSError) as fault:
            raise EnvironmentFault("The line broke.", why=str(fault) or "The other end is gone.") from None
        if answer is None:
            return None
        kind, *parts = answer
        if kind == _FAULT:
            raise EsperError(parts[0].decode())
        return parts


def pack(parts: Sequence[bytes]) -> bytes:
    """Several byte strings as one: their number, their lengths, themselves; little-endian 32-bit."""
    return struct.pack(f"<{len(parts) + 1}I", len(parts), *map(len, parts)) + b"".join(parts)


def unpack(data: bytes) -> list[bytes]:
    """The inverse of `pack`."""
    (count,) = struct.unpack_from("<I", data)
    sizes = struct.unpack_from(f"<{count}I", data, 4)
    ends = list(itertools.accumulate(sizes, initial=4 + 4 * count))
    return [data[start:end] for start, end in itertools.pairwise(ends)]
