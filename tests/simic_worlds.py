"""Environments made for Simic's tests, and short ways to act and to plan in them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from esper_ray.config import SimicConfig
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.policies import ActorCritic, policy_for
from esper_ray.simic.rollout import Rollout, RolloutWorker

COUNTING, MASKED, MANY, BROKEN, OWN = (
    f"simic-tests/{name}-v0" for name in ("Counting", "Masked", "Many", "Broken", "Own")
)


class Counting(gymnasium.Env[Any, Any]):
    """Observes its episode's number and step; ends after ``length`` steps, by termination or by truncation."""

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, length: int = 3, cut: bool = False) -> None:
        self._length, self._cut, self._episode, self._step = length, cut, -1, 0

    def _seen(self) -> Any:
        return np.asarray([self._episode, self._step], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        over = self._step >= self._length
        return self._seen(), float(self._step), over and not self._cut, over and self._cut, {}


class Masked(Counting):
    """Action k is legal only where the mask says so, else the episode fails loudly; the mask comes with the infos."""

    action_space = spaces.Discrete(5, start=10)

    def _info(self) -> dict[str, Any]:
        mask = np.zeros(5, np.int8)
        mask[[self._step % 5, (self._step + 2) % 5]] = 1
        return {"action_mask": mask}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=seed)[0], self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self._info()["action_mask"][action - 10] == 1, "an illegal action came"
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, truncated, self._info()


class Many(gymnasium.Env[Any, Any]):
    """A dictionary of floats, integers and flags, a mask in it, two action heads; pays for matching a shown pair."""

    observation_space = spaces.Dict(
        {
            "action_mask": spaces.MultiBinary(5),
            "pair": spaces.Box(0, 1, (2, 3), np.float32),
            "count": spaces.Box(0, 100, (1,), np.int64),
            "flag": spaces.Box(0, 1, (1,), np.bool_),
        }
    )
    action_space = spaces.MultiDiscrete([2, 3])

    def _seen(self) -> dict[str, Any]:
        self._wanted = (int(self.np_random.integers(2)), int(self.np_random.integers(3)))
        pair = np.zeros((2, 3), np.float32)
        pair[0, self._wanted[0]], pair[1, self._wanted[1]] = 1.0, 1.0
        mask = np.ones(5, np.int8)
        mask[2 + (self._wanted[1] + 1) % 3] = 0
        return {"action_mask": mask, "pair": pair, "count": np.asarray([self._step]), "flag": np.asarray([True])}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action[1] != (self._wanted[1] + 1) % 3, "an illegal action came"
        self._step += 1
        reward = float(action[0] == self._wanted[0]) + float(action[1] == self._wanted[1])
        return self._seen(), reward, False, self._step >= 5, {}


class Broken(Counting):
    """Gives a value that is no number in its second step, as observation or as reward."""

    def __init__(self, where: str = "observation") -> None:
        super().__init__(10)
        self._where = where

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self._step == 2:
            observation = observation * np.nan if self._where == "observation" else observation
            reward = float("nan") if self._where == "reward" else reward
        return observation, reward, *rest  # type: ignore[return-value]


class Own(Counting):
    """Brings its own policy."""

    def make_policy(self) -> Any:
        return ActorCritic(2, (2,), (7,), ("obs",))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Known to gymnasium, and torch on one thread, while it lasts."""
    made: dict[str, Callable[..., Any]] = dict(
        zip((COUNTING, MASKED, MANY, BROKEN, OWN), (Counting, Masked, Many, Broken, Own), strict=True)
    )
    for name, entry in made.items():
        gymnasium.register(name, entry_point=entry)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in made:
        del gymnasium.registry[name]


def worker(
    choice: EnvChoice, envs: int = 2, mode: AutoresetMode = AutoresetMode.NEXT_STEP, **options: Any
) -> RolloutWorker:
    interface = choice.interface()
    policy = policy_for(choice, interface, hidden=(8,), seed=0)
    vector = SyncVectorEnv([choice.make] * envs, autoreset_mode=mode)
    return RolloutWorker(vector, interface, policy, **options)


def plan(env: str = "CartPole-v1", algo: Any = "ppo", steps: int = 512, **settings: Any) -> TrainingPlan:
    top = {key: settings.pop(key) for key in ("folder", "seed", "stop_at", "initial") if key in settings}
    small = {
        "envs": 4,
        "rollout_steps": 32,
        "minibatches": 2,
        "epochs": 2,
        "evaluate_every": 256,
        "evaluate_episodes": 3,
    }
    return TrainingPlan(EnvChoice(env), algo, steps, config=SimicConfig(**{**small, "hidden": (8,), **settings}), **top)


def replaced(rollout: Rollout, **columns: Any) -> Rollout:
    """The rollout with other columns."""
    return dataclasses.replace(rollout, **columns)
