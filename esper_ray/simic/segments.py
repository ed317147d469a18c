"""Rollouts as single trajectories of one environment, the items of the replay, and back. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from esper_ray.simic.rollout import Rollout
from esper_ray.simic.spaces import Array

_COLUMNS = ("actions", "log_probs", "values", "rewards", "terminated", "truncated", "valid")
_OBS = "obs/"


def segments(rollout: Rollout) -> list[dict[str, Array]]:
    """One dictionary of arrays, time first, for each environment of the rollout."""
    columns = {name: getattr(rollout, name) for name in _COLUMNS}
    columns |= {_OBS + key: array for key, array in rollout.obs.items()}
    if rollout.final_values is not None:
        columns["final_values"] = rollout.final_values
    return [
        {name: np.ascontiguousarray(array[:, place]) for name, array in columns.items()}
        for place in range(rollout.rewards.shape[1])
    ]


def rollout_of(drawn: Mapping[str, Array]) -> Rollout:
    """N segments of equal length side by side, as a rollout of nobody's; each array is [N, T, ...]."""
    columns: dict[str, Any] = {name: np.swapaxes(array, 0, 1) for name, array in drawn.items()}
    obs = {name.removeprefix(_OBS): columns.pop(name) for name in list(columns) if name.startswith(_OBS)}
    return Rollout(worker=-1, version=-1, obs=obs, **columns)
