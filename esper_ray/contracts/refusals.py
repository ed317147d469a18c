"""How many incoming messages this process refused, by reason, until its sender or Nissa takes the figures on."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TypeVar

from esper_ray.contracts.messages import MetricPoint
from esper_ray.errors import ContractError

E = TypeVar("E", bound=ContractError)
REFUSED = "rf"

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def refused(fault: E) -> E:
    """Count a refusal; to be raised by the caller."""
    with _lock:
        _counts[fault.reason] += 1
    return fault


def take() -> list[MetricPoint]:
    """The refusals since the last call, as increments; whoever calls tells Nissa."""
    with _lock:
        found = dict(_counts)
        _counts.clear()
    return [MetricPoint(REFUSED, float(count), {"reason": reason}) for reason, count in sorted(found.items())]
