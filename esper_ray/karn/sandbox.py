"""The one place where quarantined blueprints exist: inside ``with sandbox():``, which only drills open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OPEN: ContextVar[bool] = ContextVar("sandbox", default=False)


def is_open() -> bool:
    """Whether this is a drill."""
    return _OPEN.get()


@contextmanager
def sandbox() -> Iterator[None]:
    """Within it the catalogue gives out every blueprint, on all the real paths, in this thread alone."""
    token = _OPEN.set(True)
    try:
        yield
    finally:
        _OPEN.reset(token)
