"""What a sender leaves out when readers do not keep up: what matters least goes first."""

from __future__ import annotations

from collections.abc import Mapping

from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.oona.streams import is_durable

_SECOND_STEP = 1.5


class Shedder:
    """Over ``max_depth`` a stream sheds low priorities, over one and a half times that all ordinary telemetry.

    Both end under ``resume_depth``. What is durable is never shed.
    """

    def __init__(self, max_depth: int, resume_depth: int) -> None:
        self._max, self._resume = max_depth, resume_depth
        self._steps: dict[str, int] = {}

    def update(self, depths: Mapping[str, int]) -> None:
        """Take note of the depths as last announced; a stream without one is not shed."""
        self._steps = {stream: step for stream, depth in depths.items() if (step := self._step(stream, depth))}

    def reason(self, stream: str, type: BusMessageType, priority: MessagePriority) -> str | None:
        """Why this message is to be left out, or None."""
        step = self._steps.get(stream, 0)
        if not step or is_durable(type, priority):
            return None
        if priority is MessagePriority.LOW:
            return "low_priority"
        if step > 1 and type is BusMessageType.TELEMETRY and priority < MessagePriority.HIGH:
            return "telemetry"
        return None

    def _step(self, stream: str, depth: int) -> int:
        if depth < self._resume:
            return 0
        reached = 2 if depth > self._max * _SECOND_STEP else 1 if depth > self._max else 0
        return max(reached, self._steps.get(stream, 0))
