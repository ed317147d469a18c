"""Several deciders on the same held-out tasks: who ends with the better model, with intervals, paired by task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from esper_ray.config import Config, TamiyoConfig
from esper_ray.errors import ConfigError, PolicyRefused
from esper_ray.reliability.intervals import Interval, interval
from esper_ray.simic import registry
from esper_ray.simic.episode import EpisodeResult
from esper_ray.simic.episode import play as play_episode
from esper_ray.simic.tasks import sample_task
from esper_ray.tamiyo.brains import Brain, LearnedBrain, ScriptedBrain
from esper_ray.tamiyo.heuristic import CONTROLLERS

FIRST_SEED = 1_000_000
"""Of the tasks that are compared on: apart from those that tasks and rewards were chosen by."""


@dataclass(frozen=True, slots=True)
class Row:
    """One decider: means over the episodes, and the first decider's return minus this one's."""

    name: str
    reward: Interval
    accuracy: float
    parameter_ratio: float
    compute_ratio: float
    germinated: float
    fossilized: float
    culled: float
    first_minus_this: Interval | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All deciders on the same held-out tasks."""

    episodes: int
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(config: Config, who: Sequence[str], episodes: int, *, on_episode: Callable[[], None]) -> Comparison:
    """Let each of ``who`` play the same held-out tasks.

    Raises:
        ConfigError: somebody is neither a policy nor a controller.
    """
    brains = [brain_of(config.home, name) for name in who]
    played: list[list[EpisodeResult]] = [[] for _ in brains]
    for number in range(episodes):
        for brain, results in zip(brains, played, strict=True):
            results.append(play(config, brain, number))
            on_episode()
    first = [result.reward for result in played[0]]
    rows = [_row(brain.version, results, None if results is played[0] else first)
            for brain, results in zip(brains, played, strict=True)]  # fmt: skip
    return Comparison(episodes, tuple(rows))


def _row(name: str, results: Sequence[EpisodeResult], first: Sequence[float] | None) -> Row:
    def mean(field: str) -> float:
        return statistics.fmean(getattr(result, field) for result in results)

    rewards = [result.reward for result in results]
    return Row(
        name,
        interval(rewards),
        accuracy=mean("accuracy"),
        parameter_ratio=mean("parameter_ratio"),
        compute_ratio=mean("compute_ratio"),
        germinated=mean("germinated"),
        fossilized=mean("fossilized"),
        culled=mean("culled"),
        first_minus_this=interval([a - b for a, b in zip(first, rewards, strict=True)]) if first else None,
    )


def play(config: Config, brain: Brain, number: int) -> EpisodeResult:
    """Held-out episode ``number``: the same task and seed for everybody who plays it."""
    settings = TamiyoConfig(**{**config.tamiyo.model_dump(), "exploration": 0.0, "greedy": True})
    task = sample_task(FIRST_SEED + number, split="held_out")
    return play_episode(task, brain, folder=config.home / "data", settings=settings)


def brain_of(home: Path, name: str) -> Brain:
    """A controller or a policy, by its name or the beginning of its id.

    Raises:
        ConfigError: it is neither.
    """
    if name in CONTROLLERS:
        return ScriptedBrain(name, CONTROLLERS[name])
    from esper_ray.tamiyo import policy_store

    try:
        policy_id = registry.find(home, name).policy_id
    except PolicyRefused as fault:
        raise ConfigError(
            f"{name!r} is neither a policy nor a controller.", why=f"The controllers are {', '.join(CONTROLLERS)}."
        ) from fault
    policy, _ = policy_store.load(home, policy_id)
    return LearnedBrain(policy, policy_id)


def as_table(found: Comparison) -> Table:
    """For a terminal."""
    table = Table(title=f"{found.episodes} held-out tasks", box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    columns = (
        "decider",
        "return (95 %)",
        "accuracy",
        "parameters",
        "compute",
        "grown",
        "kept",
        "first minus this (95 %)",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "decider" else "right")
    for row in found.rows:
        table.add_row(
            row.name,
            f"{row.reward.mean:.4f} ({row.reward.low:.4f} to {row.reward.high:.4f})",
            f"{100 * row.accuracy:.2f} %",
            f"{row.parameter_ratio:.2f} x",
            f"{row.compute_ratio:.2f} x",
            f"{row.germinated:.2f}",
            f"{row.fossilized:.2f}",
            _signed(row.first_minus_this),
        )
    return table


def _signed(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
