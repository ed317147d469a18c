"""What an environment shows and takes, in the few forms that policies here understand. No torch.

Observations are a flat dictionary of arrays: a plain box has the key "obs", a dictionary keeps its keys. Actions are
H integers, one for each head. A mask of legal choices, all heads side by side, has the key "action_mask".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from esper_ray.errors import EnvironmentRefused
from esper_ray.reliability.ids import digest

PLAIN, MASK = "obs", "action_mask"
Array = npt.NDArray[Any]
_REMEDY = "Simic takes Box observations or flat dictionaries of them, and Discrete or MultiDiscrete actions."


@dataclass(frozen=True, slots=True)
class Interface:
    """The spaces of one environment.

    Attributes:
        observation: (key, shape, dtype) of each entry, the mask included.
        heads: number of choices of each of the H heads.
        starts: the environment's number for choice 0 of each head.
        plain: the observation is one box, not a dictionary.
        scalar: the action is one integer, not an array of H.
        mask_from: "observation", "info", or "" where every choice is always legal.
        signature: digest of the environment's id and of all the above.
    """

    env_id: str
    observation: tuple[tuple[str, tuple[int, ...], str], ...]
    heads: tuple[int, ...]
    starts: tuple[int, ...]
    plain: bool
    scalar: bool
    mask_from: str

    @property
    def signature(self) -> str:
        told = [self.env_id, self.observation, self.heads, self.starts, self.plain, self.scalar, self.mask_from]
        return digest(json.dumps(told).encode())[:16]

    @property
    def features(self) -> tuple[str, ...]:
        """The keys a policy looks at: all but the mask."""
        return tuple(key for key, _, _ in self.observation if key != MASK)

    def observed(self, observation: Any, info: Mapping[str, Any]) -> dict[str, Array]:
        """The flat dictionary of arrays [B, ...] of what a vector environment returned."""
        found = {PLAIN: observation} if self.plain else dict(observation)
        if self.mask_from == "info":
            if MASK not in info:
                raise EnvironmentRefused(
                    f"{self.env_id} gave no action mask.",
                    why="Its first info had one, and without it nobody knows what is legal.",
                    remedy='Put "action_mask" into the info of each reset and step.',
                )
            found[MASK] = np.stack([np.asarray(row) for row in info[MASK]])
        return found

    def actions(self, choices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What the vector environment takes, from choices [B, H] counted from 0."""
        shifted = choices if not any(self.starts) else choices + np.asarray(self.starts)
        return shifted[:, 0] if self.scalar else shifted


def interface_of(
    env_id: str, observation: spaces.Space[Any], action: spaces.Space[Any], info: Mapping[str, Any]
) -> Interface:
    """The interface of an environment with these spaces whose first info this was.

    Raises:
        EnvironmentRefused: a space that policies here do not understand, or a mask of another size than the actions.
    """
    heads, starts, scalar = _heads(env_id, action)
    plain = isinstance(observation, spaces.Box)
    entries = {PLAIN: observation} if plain else dict(getattr(observation, "spaces", {}))
    if not entries or not isinstance(observation, (spaces.Box, spaces.Dict)):
        raise EnvironmentRefused(f"{env_id} has the observation space {observation}.", why=_REMEDY)
    columns = [_entry(env_id, key, space) for key, space in entries.items()]
    mask_from = "observation" if MASK in entries else "info" if MASK in info else ""
    if mask_from == "info":
        columns.append((MASK, tuple(np.asarray(info[MASK]).shape), str(np.asarray(info[MASK]).dtype)))
    for key, shape, _ in columns:
        if key == MASK and int(np.prod(shape)) != sum(heads):
            raise EnvironmentRefused(
                f"{env_id} has an action mask of shape {shape} for {sum(heads)} choices.",
                why="A mask has one entry for each choice, the heads of MultiDiscrete side by side.",
            )
    return Interface(env_id, tuple(columns), heads, starts, plain, scalar, mask_from)


def _heads(env_id: str, action: spaces.Space[Any]) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    if isinstance(action, spaces.Discrete):
        return (int(action.n),), (int(action.start),), True
    if isinstance(action, spaces.MultiDiscrete) and action.nvec.ndim == 1:
        return tuple(map(int, action.nvec)), tuple(map(int, action.start)), False
    raise EnvironmentRefused(f"{env_id} has the action space {action}.", why=_REMEDY)


def _entry(env_id: str, key: str, space: spaces.Space[Any]) -> tuple[str, tuple[int, ...], str]:
    binary = isinstance(space, spaces.MultiBinary)
    if not binary and not (isinstance(space, spaces.Box) and space.dtype is not None and space.dtype.kind in "fiub"):
        raise EnvironmentRefused(f"{env_id} observes {key!r} in the space {space}.", why=_REMEDY)
    return key, tuple(space.shape or ()), str(space.dtype)
