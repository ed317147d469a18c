"""What every peer is told, and what it answers: one JSON line of a measured stretch of acting and learning together."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, fields

_BORN = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Setting:
    """One measurement. A batch is ``workers * envs * rollout`` steps and is cut into ``minibatches``.

    IMPALA learns from each worker's rollout by itself: there a batch is ``envs * rollout`` steps.
    """

    env: str = "CartPole-v1"
    hidden: str = "64,64"
    """Widths of the tanh layers; actor and critic have such a trunk each."""
    workers: int = 1
    """Rollout processes; a peer that acts in its one process multiplies its environments by them."""
    envs: int = 4
    rollout: int = 128
    minibatches: int = 4
    epochs: int = 4
    learning_rate: float = 2.5e-4
    warm_up: int = 2_500
    """Environment steps before the clock starts."""
    steps: int = 40_000
    """Environment steps on the clock, at least, unless ``seconds`` come first."""
    seconds: float = 60.0
    """On the clock, at least; so that a slow peer does not take all day."""
    seed: int = 0

    @property
    def widths(self) -> list[int]:
        return [int(width) for width in self.hidden.split(",")]

    @property
    def batch(self) -> int:
        return self.workers * self.envs * self.rollout

    @property
    def minibatch(self) -> int:
        return self.batch // self.minibatches

    def arguments(self) -> list[str]:
        """The command line that `parse` reads back."""
        return [part for key, value in asdict(self).items() for part in (f"--{key.replace('_', '-')}", str(value))]


def parse(description: str | None) -> Setting:
    """The setting on this process's command line."""
    parser = argparse.ArgumentParser(description=description)
    for field in fields(Setting):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return Setting(**vars(parser.parse_args()))


class Clock:
    """Starts at the first look past the warm-up, and ends at the first that has seen enough."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._start: tuple[int, float] | None = None
        self._end: tuple[int, float] | None = None

    def running(self, steps: int) -> bool:
        """Whether to go on, ``steps`` environment steps after the very first; to be asked after each update."""
        now = steps, time.perf_counter()
        if self._start is None:
            self._start = now if steps >= self._setting.warm_up else None
        elif steps - self._start[0] >= self._setting.steps or now[1] - self._start[1] >= self._setting.seconds:
            self._end = self._end or now
        return self._end is None

    def report(self, version: str, **more: float) -> None:
        """Print the answer; ``start_seconds`` is all that came before the clock, imports and warm-up included."""
        assert self._start is not None, "the warm-up was longer than all"
        assert self._end is not None, "the clock still runs"
        measured, seconds = self._end[0] - self._start[0], self._end[1] - self._start[1]
        answer = {
            "steps": measured,
            "seconds": seconds,
            "steps_per_s": measured / seconds,
            "start_seconds": self._start[1] - _BORN,
            "version": version,
            **more,
        }
        print(json.dumps(answer), flush=True)
