"""Which nonces were used: bounded, and never wrong on the unsafe side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from esper_ray.contracts.budgets import COMMAND_FRESH_SECONDS, NONCE_MEMORY_SECONDS

NONCE_LIMIT = 20_000
_MEMORY_NS = round(NONCE_MEMORY_SECONDS * 1e9)
_AHEAD_NS = round(COMMAND_FRESH_SECONDS * 1e9)


class NonceMemory:
    """Remembers nonces for five minutes, at most ``limit`` of them.

    Where more come in that time, the oldest are forgotten, and from then on everything that was made no later than
    they were is refused as stale: what is forgotten cannot be used again.

    Args:
        seen: nonces from before, with the time of their acceptance, wall clock in ns.
    """

    def __init__(self, seen: Iterable[tuple[bytes, int]] = (), *, limit: int = NONCE_LIMIT) -> None:
        known = sorted(seen, key=lambda each: each[1])
        # When those were made is not known any more: at the latest as far ahead of its acceptance as a clock may be.
        self._seen: OrderedDict[bytes, tuple[int, int]] = OrderedDict(
            (nonce, (at, at + _AHEAD_NS)) for nonce, at in known[-limit:]
        )
        self._limit, self._floor_ns = limit, known[-limit - 1][1] + _AHEAD_NS if len(known) > limit else 0

    def __len__(self) -> int:
        return len(self._seen)

    def admit(self, nonce: bytes, *, made_ns: int, now_ns: int) -> str:
        """Remember ``nonce``; returns the reason why it is refused, or an empty text."""
        while self._seen and next(iter(self._seen.values()))[0] < now_ns - _MEMORY_NS:
            self._seen.popitem(last=False)
        if nonce in self._seen:
            return "nonce_replayed"
        if made_ns <= self._floor_ns:
            return "stale"
        if len(self._seen) >= self._limit:
            _, (_, made) = self._seen.popitem(last=False)
            self._floor_ns = max(self._floor_ns, made)
        self._seen[nonce] = (now_ns, made_ns)
        return ""
