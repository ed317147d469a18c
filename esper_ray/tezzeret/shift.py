"""The forge at work in the background: one thread takes orders, builds what is wanted, then compiles it.

Contract: an order that `start` has returned for is in the ledger; a shift that begins on the same folder takes open
orders up again by itself. `start` and `stop` may be repeated.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from esper_ray.errors import EsperError
from esper_ray.tezzeret.forge import Forge, Outcome, wanted_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the forge stands. ``ready``: every order so far has its eager kernels."""

    phase: Literal["idle", "eager", "compile", "done", "stopped", "failed"] = "idle"
    done: int = 0
    total: int = 0
    current: str = ""
    note: str = ""
    ready: bool = False
    conservative: bool = False


class Shift:
    """Works off orders until there are none."""

    def __init__(self, forge: Forge) -> None:
        self._forge = forge
        self._lock = threading.Lock()
        self._stopped, self._ordered = threading.Event(), threading.Event()
        self._asked = False
        self._taken: frozenset[int] = frozenset()
        self._progress = Progress()
        self._thread: threading.Thread | None = None
        with self._lock:
            if forge.ledger.orders():
                self._begin()

    def start(self, signatures: Sequence[str]) -> dict[str, Any]:
        """Order kernels for these slots, or single ones as BP036@SIGNATURE, and return at once.

        Raises:
            BlueprintError: one of them is neither.
        """
        for text in signatures:
            wanted_of(text)
        with self._lock:
            # One that is being worked on does not count: what it made may be lost again by now.
            waiting = [wanted for number, wanted in self._forge.ledger.orders() if number not in self._taken]
            if list(signatures) not in waiting:
                self._forge.ledger.order(signatures)
                self._progress = Progress("eager")
                self._ordered.set()
            self._stopped.clear()
            self._asked = True
            self._begin()
        return self.progress()

    def progress(self) -> dict[str, Any]:
        """The fields of `Progress`."""
        return asdict(self._progress)

    def stop(self) -> None:
        """Drop all orders and end the running job; what is finished stays."""
        with self._lock:
            self._fulfilled(self._forge.ledger.orders())
            self._stopped.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the work ended within ``timeout`` seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return self._thread is None

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="forge", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Leaves only under the lock, so that no order is taken by a thread that is about to end."""
        while orders := self._next_orders():
            try:
                self._make(orders)
            except EsperError as error:
                if self._fail(str(error)):
                    return
            except Exception as error:
                _log.exception("the forge failed")
                if self._fail(f"{type(error).__name__}: {error}"):
                    return

    def _next_orders(self) -> list[tuple[int, list[str]]]:
        with self._lock:
            self._ordered.clear()
            self._asked = False
            orders = self._forge.ledger.orders()
            self._taken = frozenset(number for number, _ in orders)
            if not orders:
                self._thread = None
                if self._stopped.is_set():
                    self._progress = replace(self._progress, phase="stopped", current="")
            return orders

    def _fail(self, note: str) -> bool:
        """Give up until `start` is called; not where it was meanwhile, for what the store has just lost say."""
        with self._lock:
            self._taken = frozenset()
            if self._asked:
                return False
            self._thread = None
            self._progress = replace(self._progress, phase="failed", current="", note=note)
            return True

    def _make(self, orders: Sequence[tuple[int, Sequence[str]]]) -> None:
        """All open orders in one go: first what training waits for, then what makes it faster."""
        names = dict.fromkeys(name for _, signatures in orders for name in signatures)
        specs = self._forge.ordered(names)
        self._progress = Progress("eager")
        built = self._forge.build(specs, self._note, self._stopped.is_set)
        if built.stopped:
            return
        with self._lock:
            ready = not self._ordered.is_set()
            self._progress = replace(self._progress, phase="compile", note=_said(built), ready=ready)
        compiled = self._forge.compile(specs, self._note, lambda: self._stopped.is_set() or self._ordered.is_set())
        if compiled.stopped:
            return
        said = " ".join(filter(None, (_said(built), _said(compiled), compiled.note)))
        with self._lock:
            self._fulfilled(orders)
            self._progress = replace(self._progress, phase="done", current="", note=said)

    def _fulfilled(self, orders: Sequence[tuple[int, Sequence[str]]]) -> None:
        for number, _ in orders:
            self._forge.ledger.fulfil(number)

    def _note(self, done: int, total: int, current: str) -> None:
        self._progress = replace(
            self._progress, done=done, total=total, current=current, conservative=self._forge.conservative
        )


def _said(outcome: Outcome) -> str:
    compiled = sum(item.result == "compiled" for item in outcome.finished.values())
    parts = [f"{compiled} of {len(outcome.finished)} kernels run compiled." if compiled else ""]
    parts += [f"{key} was given up: {why}" for key, why in outcome.given_up.items()]
    return " ".join(filter(None, parts))
