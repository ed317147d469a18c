"""The forge's memory: which jobs are finished, and how often each failed. Durable, so that a kill forgets nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from esper_ray.reliability.clock import Clock
from esper_ray.reliability.journal import Entry, Journal
from esper_ray.tezzeret.toolchain import Phase

Result = Literal["eager", "compiled", "given up"]


@dataclass(frozen=True, slots=True)
class Finished:
    """How a job ended: what the kernel runs as now, its artifact, the measured figures, or why it was given up."""

    kernel: str
    result: Result
    digest: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


class Ledger:
    """Jobs by their cache key, in a journal."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self._journal = Journal(path, clock=clock)
        self._failures: dict[Phase, Counter[str]] = {}

    def finished(self, phase: Phase, key: str) -> Finished | None:
        """How that job ended, or None while it is open."""
        entry = self._journal.get(f"finished-{phase}", key)
        return _read(entry) if entry else None

    def finish(self, phase: Phase, key: str, finished: Finished) -> None:
        """Write down how a job ended; its first ending counts."""
        text = {
            "kernel": finished.kernel,
            "result": finished.result,
            "digest": finished.digest,
            "figures": dict(finished.figures),
            "why": finished.why,
        }
        self._journal.append(f"finished-{phase}", json.dumps(text).encode(), key=key)

    def fail(self, phase: Phase, key: str, why: str) -> int:
        """Write down a failure and return how many the job has had."""
        self._journal.append(f"failures-{phase}", json.dumps({"key": key, "why": why}).encode())
        self._failures = {}
        return self.failures(phase, key)

    def failures(self, phase: Phase, key: str) -> int:
        """How often a job has failed so far."""
        if phase not in self._failures:
            entries = self._journal.read(f"failures-{phase}")
            self._failures[phase] = Counter(json.loads(entry.payload)["key"] for entry in entries)
        return self._failures[phase][key]

    def reopen(self, phase: Phase, key: str) -> None:
        """Forget how a job ended and that it failed, so that it is done again."""
        entry = self._journal.get(f"finished-{phase}", key)
        failures = [e for e in self._journal.read(f"failures-{phase}") if json.loads(e.payload)["key"] == key]
        self._journal.remove([e.seq for e in (*failures, *([entry] if entry else []))])
        self._failures = {}

    def order(self, signatures: Sequence[str]) -> int:
        """Write down which slots kernels are wanted for, until `fulfil`; returns the order's number."""
        return self._journal.append("orders", json.dumps(list(signatures)).encode())

    def orders(self) -> list[tuple[int, list[str]]]:
        """The open orders, oldest first."""
        return [(entry.seq, json.loads(entry.payload)) for entry in self._journal.read("orders")]

    def fulfil(self, number: int) -> None:
        """Close an order."""
        self._journal.remove([number])

    def close(self) -> None:
        self._journal.close()


def _read(entry: Entry) -> Finished:
    return Finished(**json.loads(entry.payload))
