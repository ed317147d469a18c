"""Jobs side by side: each has a process of its own and one kernel at a time."""

from __future__ import annotations

import select
from collections.abc import Callable
from types import TracebackType

from esper_ray.contracts.ports import KernelSpec
from esper_ray.tezzeret.strategies import StrategyName
from esper_ray.tezzeret.worker import Event, Job

POLL_SECONDS = 0.1


class Crew:
    """A context manager that leaves no process behind.

    Args:
        hire: starts the job of a lane; called again after that job has ended.
    """

    def __init__(self, hire: Callable[[int], Job]) -> None:
        self._hire = hire
        self._jobs: dict[int, Job] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self._jobs.values():
            job.kill()

    @property
    def busy(self) -> int:
        """How many kernels are being made."""
        return sum(job.working for job in self._jobs.values())

    def give(self, spec: KernelSpec, strategy: StrategyName) -> None:
        """Hand a kernel to a job that has none, started for it if need be."""
        self._part_with_the_dead()
        lane = next((lane for lane, job in self._jobs.items() if job.idle), None)
        if lane is None:
            lane = next(lane for lane in range(len(self._jobs) + 1) if lane not in self._jobs)
            self._jobs[lane] = self._hire(lane)
        self._jobs[lane].give(spec, strategy)

    def send_home(self, lanes: int) -> None:
        """End the jobs without a kernel that are more than ``lanes``."""
        for lane in [lane for lane, job in self._jobs.items() if job.idle and lane >= lanes]:
            self._jobs.pop(lane).kill()

    def wait(self) -> list[Event]:
        """What became of kernels, at most `POLL_SECONDS` from now; empty when nothing did."""
        working = [job for job in self._jobs.values() if job.working]
        select.select(working, [], [], POLL_SECONDS)
        events = [event for job in working if (event := job.poll()) is not None]
        self._part_with_the_dead()
        return events

    def _part_with_the_dead(self) -> None:
        for lane, job in list(self._jobs.items()):
            if not job.idle and not job.working:
                job.kill()
                del self._jobs[lane]
