"""From what the bus brought to what can be learned from: one trajectory of micro-steps for each finished run.

Rewards are those of the environment (`reward.py`), computed from the stored observations: they carry the validation
accuracy, the parameters and the cost of each boundary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_ray.contracts.messages import DecisionRecord
from esper_ray.errors import CorruptArtifact, RunError
from esper_ray.simic import reward
from esper_ray.simic.experience import Experience
from esper_ray.simic.reward import RewardConfig
from esper_ray.simic.rollout import Rollout
from esper_ray.simic.segments import rollout_of
from esper_ray.tamiyo import graph, observations
from esper_ray.tamiyo.actions import GERMINATE, HEADS, NO_OP
from esper_ray.tamiyo.graph import GLOBAL_FEATURES, SLOT_FEATURES, Layout, Observation

_DORMANT = SLOT_FEATURES.index("stage_dormant")


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One run's decisions: T micro-steps and the observation after the last.

    Attributes:
        observations: T + 1 of them, as stored.
        actions: int64 [T, 4].
        log_probs: float32 [T], of the behaviour.
        rewards: float32 [T].
        gains: float32 [T], the counterfactual gain that the field report of that command tells, NaN without one.
        exploration: least probability of a random draw in the run; 0 means that only imitation can learn from it.
    """

    run: str
    policies: tuple[str, ...]
    observations: tuple[Observation, ...]
    actions: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    gains: npt.NDArray[np.float32]
    exploration: float

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The trajectories, and how many runs were left out for which reason."""

    trajectories: tuple[Trajectory, ...]
    left_out: Mapping[str, int]


def gather(home: Path, config: RewardConfig, runs: Sequence[str] = ()) -> Gathered:
    """Everything in a home folder that can be learned from.

    Args:
        runs: only these; all by default.

    Raises:
        RunError: a run that was named sent no decisions.
    """
    experience = Experience.of(home)
    try:
        known = experience.runs()
        for run in runs:
            if run not in known:
                raise RunError(
                    f"Simic has no decisions of {run}.",
                    why="Runs send them with tamiyo.record=true, over the bus.",
                    remedy=f"It has {', '.join(known[-5:]) or 'none so far'}.",
                )
        kept, left_out = [], Counter[str]()
        for run in runs or known:
            found = _trajectory(home, experience, run, config)
            if isinstance(found, str):
                left_out[found] += 1
            else:
                kept.append(found)
        return Gathered(tuple(kept), dict(left_out))
    finally:
        experience.close()


def _trajectory(home: Path, experience: Experience, run: str, config: RewardConfig) -> Trajectory | str:
    """The run's trajectory, or why there is none."""
    records = experience.decisions(run)
    if not records or not records[-1].terminal:
        return "not finished"
    if len(records) < 2:
        return "no decision"
    try:
        seen = tuple(observations.read(home / "observations", record.observation_digest) for record in records)
    except CorruptArtifact:
        return "an observation is lost or damaged"
    taken = records[:-1]
    actions = np.asarray([_action(record) for record in taken], np.int64)
    if not _took_effect(actions, seen, records):
        return "a command came too late and had no effect"
    gains = {report.command_id: report.metrics.get("g", np.nan) for report in experience.reports(run)}
    return Trajectory(
        run=run,
        policies=tuple(dict.fromkeys(record.policy_version for record in taken)),
        observations=seen,
        actions=actions,
        log_probs=np.asarray([sum(h.log_probability for h in each.heads) for each in taken], np.float32),
        values=np.asarray([record.value for record in taken], np.float32),
        rewards=rewards_of(seen, config),
        gains=np.asarray([gains.get(record.command_id, np.nan) for record in taken], np.float32),
        exploration=min(record.exploration for record in taken),
    )


def _action(record: DecisionRecord) -> tuple[int, ...]:
    chosen = {head.head: head.choice for head in record.heads}
    return tuple(chosen.get(name, 0) for name in HEADS)


def _took_effect(
    actions: npt.NDArray[np.int64], seen: Sequence[Observation], records: Sequence[DecisionRecord]
) -> bool:
    """Whether each germination left its slot taken at the next boundary: a late one is "no change" to the run.

    What was decided at the last boundary has no next one to be seen at.
    """
    for place, (operation, slot, _, _) in enumerate(actions):
        if operation != GERMINATE:
            continue
        later = next((i for i, each in enumerate(records) if each.epoch > records[place].epoch), None)
        if later is not None and seen[later]["slots"][slot, _DORMANT] > 0:
            return False
    return True


def figures_of(observation: Observation) -> tuple[float, float, float]:
    """Validation accuracy, parameters over the host's, cost over the host's: what rewards are made of."""
    values = observation["global"]
    accuracy, parameters, compute = (
        float(values[GLOBAL_FEATURES.index(name)]) for name in ("accuracy", "parameter_ratio", "compute_ratio")
    )
    return accuracy, 1.0 + parameters, 1.0 + compute


def rewards_of(seen: Sequence[Observation], config: RewardConfig) -> npt.NDArray[np.float32]:
    """The rewards of T steps from T + 1 observations: shaping, and at the end the final quality less the rent."""
    potentials = [reward.potential(figures_of(each)[0], config) for each in seen]
    given = [reward.shaping(before, after, config) for before, after in itertools.pairwise(potentials)]
    given[-1] = reward.shaping(potentials[-2], 0.0, config) + reward.terminal(*figures_of(seen[-1]), config)
    return np.asarray(given, np.float32)


def room_for(trajectories: Sequence[Trajectory]) -> Layout:
    """The layout that holds the observations of all of them."""
    layouts = [graph.layout_of(each.observations[0]) for each in trajectories]
    return Layout(*(max(getattr(layout, name) for layout in layouts) for name in Layout.__slots__))


def item(trajectory: Trajectory, steps: int, room: Layout) -> dict[str, npt.NDArray[np.generic]]:
    """The trajectory as an item of the replay: columns of ``steps`` rows, observations and values of one more.

    What is padded is not ``valid``: NO_OP, ended, in a repetition of the last observation.
    """
    count = len(trajectory)
    padded = [graph.pad(seen, room) for seen in trajectory.observations]
    padded += [padded[-1]] * (steps - count)
    found: dict[str, npt.NDArray[np.generic]] = {
        f"obs/{name}": np.stack([seen[name] for seen in padded]) for name in padded[0]
    }
    for name in ("log_probs", "rewards"):
        found[name] = np.zeros(steps, np.float32)
        found[name][:count] = getattr(trajectory, name)
    found["values"] = np.zeros(steps + 1, np.float32)
    found["values"][:count] = trajectory.values
    found["actions"] = np.full((steps, len(HEADS)), NO_OP, np.int64)
    found["actions"][:count] = trajectory.actions
    found["valid"] = np.arange(steps) < count
    found["terminated"] = np.arange(steps) >= count - 1
    found["truncated"] = np.zeros(steps, np.bool_)
    return found


def side_by_side(items: Sequence[Mapping[str, npt.NDArray[Any]]]) -> Rollout:
    """Items of equal length as one batch [T, B, ...]."""
    return rollout_of({name: np.stack([each[name] for each in items]) for name in items[0]})
