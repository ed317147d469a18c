"""Brings environments back to where they stood, without a pickle: by what they were given, given once more.

An environment of its own is begun again with the random generator that its episode began with, and gets the episode's
actions. A vector that steps all its environments by itself shares one generator among them: it is begun again with its
seed, and gets all its actions. Both work for environments that draw from gymnasium's generator only and carry nothing
from one episode to the next; `restore` checks what can be checked and says when it did not work. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper

from esper_ray.simic.spaces import Array

Result = tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]
Vector = VectorEnv[Any, Any, Any]
_EPISODES, _SEED, _ACTIONS = "episodes", "seed", "actions"


class NotRepeatedError(Exception):
    """The environments did not come to where they stood; the text says why."""


class Tape(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment, with what its present episode was given."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._begin: dict[str, Any] = {}
        self._actions: list[Any] = []
        self._asked: Mapping[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._begin = {"random": self._random()} if seed is None else {"seed": seed}
        self._actions = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Result:
        """As always; but right after `ask` the whole of the other episode, whatever ``action`` is."""
        if self._asked is None:
            self._actions.append(np.asarray(action).tolist())
            return self.env.step(action)
        asked, self._asked = self._asked, None
        return self._repeat(asked)

    def state(self) -> dict[str, Any]:
        """Plain values from which another one comes to the same place."""
        return {"begin": self._begin, "actions": self._actions, "random": self._random()}

    def ask(self, state: Mapping[str, Any]) -> None:
        """Go to where the one of this `state` stood, with the next step."""
        self._asked = state

    def _repeat(self, asked: Mapping[str, Any]) -> Result:
        begin, kind = asked["begin"], self.action_space.dtype
        assert kind is not None
        if "random" in begin:
            self.unwrapped.np_random.bit_generator.state = begin["random"]
        seen, info = self.reset(seed=begin.get("seed"))
        result: Result = (seen, 0.0, False, False, info)
        for number, given in enumerate(asked["actions"]):
            if result[2] or result[3]:
                raise NotRepeatedError(f"an episode ended after {number} steps that had {len(asked['actions'])}")
            result = self.step(kind.type(given) if np.isscalar(given) else np.asarray(given, kind))
        if self._random() != asked["random"]:
            raise NotRepeatedError("its random generator drew other numbers")
        return result

    def _random(self) -> dict[str, Any]:
        return dict(self.unwrapped.np_random.bit_generator.state)


class VectorTape(VectorWrapper):
    """A vector that steps all its environments by itself, with all that it was given."""

    def __init__(self, env: Vector) -> None:
        super().__init__(env)
        self._seed: Any = None
        self._actions: list[Array] = []
        most = int(np.max(getattr(env.single_action_space, "nvec", getattr(env.single_action_space, "n", 2**31))))
        self._kind = np.min_scalar_type(most + int(np.max(getattr(env.single_action_space, "start", 0))))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._seed, self._actions = seed, []
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        self._actions.append(np.asarray(actions, self._kind)[None])
        return self.env.step(actions)

    def state(self) -> dict[str, Array]:
        if self._actions:
            self._actions = [np.concatenate(self._actions)]
        actions = self._actions[0] if self._actions else np.zeros(0, self._kind)
        return {_SEED: np.asarray(json.dumps(self._seed)), _ACTIONS: actions}

    def repeat(self, state: Mapping[str, Array]) -> tuple[Any, dict[str, Any]]:
        seen, info = self.reset(seed=json.loads(str(state[_SEED])))
        for actions in state[_ACTIONS].astype(np.int64):
            seen, _, _, _, info = self.step(actions)
        return seen, info


def state_of(vector: Vector) -> dict[str, Array]:
    """Where the environments of a taped vector stand, as arrays.

    Raises:
        NotRepeatedError: they draw from a generator that is not gymnasium's own.
    """
    if isinstance(vector, VectorTape):
        return vector.state()
    try:
        return {_EPISODES: np.asarray(json.dumps([tape.state() for tape in _tapes(vector)]))}
    except TypeError as error:
        raise NotRepeatedError(f"what they were given is no plain value ({error})") from None


def restore(vector: Vector, state: Mapping[str, Array]) -> tuple[Any, dict[str, Any]]:
    """Bring a new vector of the same environments to where another stood; what it shows there, and the infos.

    Raises:
        NotRepeatedError: it came somewhere else; the vector is of no more use.
    """
    if isinstance(vector, VectorTape) and _ACTIONS in state:
        return vector.repeat(state)
    if isinstance(vector, VectorTape) or _EPISODES not in state:
        raise NotRepeatedError("they are stepped in another way than before")
    tapes, episodes = _tapes(vector), json.loads(str(state[_EPISODES]))
    if len(tapes) != len(episodes):
        raise NotRepeatedError(f"there were {len(episodes)} and are {len(tapes)}")
    for tape, episode in zip(tapes, episodes, strict=True):
        tape.ask(episode)
    # One step of the vector, so that it sees an episode that has ended and begins the next one in time.
    seen, _, _, _, info = vector.step(vector.action_space.sample())
    return seen, info


def _tapes(vector: Vector) -> list[Tape]:
    assert isinstance(vector, SyncVectorEnv)
    tapes = [env for env in vector.envs if isinstance(env, Tape)]
    assert len(tapes) == len(vector.envs), "the vector was not made to be repeated"
    return tapes
