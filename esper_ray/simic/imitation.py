"""A policy that decides as controllers do: the start from which acting can improve.

Random decisions alone seldom show that growing pays: a seed must be grown early, kept through all its stages and not be
culled by the next random draw. A policy that already does what the heuristic does begins where its rewards are.

Of several teachers the one that does better on a task is imitated more on it. What they see is the same until their
first decisions differ, so the policy learns on which tasks whose decisions pay: no teacher knows that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_ray.config import Config, TamiyoConfig, build
from esper_ray.errors import ConfigError
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic.env import LAYOUT, pool_task
from esper_ray.simic.episode import Episode
from esper_ray.tamiyo import graph, policy_store
from esper_ray.tamiyo.brains import ScriptedBrain, Step
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.policy import GraphPolicy

_BATCH, _RATE, _PASSES = 64, 1e-3, 12
_TEMPERATURE = 0.01
"""A teacher whose return is better by so much than another's counts e times as much on that task."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A controller, and Tamiyo's settings that it decides by."""

    brain: ScriptedBrain
    settings: TamiyoConfig


def teacher(told: str) -> Teacher:
    """From ``NAME`` or ``NAME:setting=value,...`` with settings of the section tamiyo.

    Raises:
        ConfigError: there is no such controller or setting.
    """
    name, _, settings = told.partition(":")
    if name not in CONTROLLERS:
        raise ConfigError(f"There is no controller {name!r}.", remedy=f"The controllers are {', '.join(CONTROLLERS)}.")
    pairs = dict(each.partition("=")[::2] for each in settings.split(",") if each)
    return Teacher(ScriptedBrain(name, CONTROLLERS[name]), build({"tamiyo": pairs}).tamiyo)


def imitate(
    config: Config,
    teachers: Sequence[str],
    *,
    episodes: int,
    seed: int = 0,
    on_episode: Callable[[], None] = lambda: None,
) -> tuple[str, float]:
    """Let each teacher play the same training tasks, learn their decisions by maximum likelihood, and keep the policy.

    Of several, each counts on a task by the softmax of its return there, over a temperature of 0.01: the regression of
    Peters and Schaal 2007, "Reinforcement learning by reward-weighted regression", with returns compared task by task.

    Returns:
        The policy's id, and its mean loss over the last pass in nats per decision.

    Raises:
        ConfigError: as `teacher`.
    """
    everyone = [teacher(told) for told in teachers]
    steps: list[Step] = []
    weights: list[npt.NDArray[np.float64]] = []
    for number in range(episodes):
        played = []
        for each in everyone:
            played.append(_play(config, each, number))
            on_episode()
        shares = _shares([worth for _, worth in played])
        for (taken, _), share in zip(played, shares, strict=True):
            steps += taken
            weights.append(np.full(len(taken), share))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "imitation"))
        policy = GraphPolicy()
    loss = fit(policy, steps, seed, np.concatenate(weights))
    summary = {
        "algo": f"imitation of {' '.join(teachers)}",
        "decisions": len(steps),
        "episodes": episodes,
        "loss": loss,
        "seed": seed,
    }
    return policy_store.save(config.home, policy, training=summary), loss


def _shares(returns: Sequence[float]) -> npt.NDArray[np.float64]:
    """Of one task's plays, with a mean of 1."""
    powers = np.exp((np.asarray(returns) - max(returns)) / _TEMPERATURE)
    found: npt.NDArray[np.float64] = powers / powers.mean()
    return found


def _play(config: Config, who: Teacher, number: int) -> tuple[list[Step], float]:
    """The micro-steps of one episode, and its return."""
    episode = Episode(pool_task(number), folder=config.home / "data", settings=who.settings)
    episode.open()
    found: list[Step] = []
    while not episode.over:
        steps = who.brain.steps(episode.view)
        found += steps
        episode.advance([step.proposal for step in steps if step.proposal is not None])
    return found, episode.result().reward


def fit(policy: GraphPolicy, steps: list[Step], seed: int, weights: npt.NDArray[np.float64] | None = None) -> float:
    """Maximum likelihood of the steps' choices, in passes over them; the mean loss over the last one.

    Args:
        weights: [N], how much each step counts; 1 by default.
    """
    padded = [graph.pad(step.observation, LAYOUT) for step in steps]
    obs = {name: torch.from_numpy(np.stack([each[name] for each in padded])) for name in padded[0]}
    actions = torch.tensor([step.choice.indices for step in steps])
    counts = torch.ones(len(steps)) if weights is None else torch.from_numpy(weights.astype(np.float32))
    optimizer = torch.optim.Adam(policy.parameters(), lr=_RATE)
    generator = torch.Generator().manual_seed(derive_seed(seed, "imitation order"))
    losses: list[Tensor] = []
    for _ in range(_PASSES):
        losses.clear()
        order = torch.randperm(len(steps), generator=generator)
        for part in order.tensor_split(max(1, len(steps) // _BATCH)):
            result = policy.evaluate({name: array[part] for name, array in obs.items()}, actions[part])
            loss = -(counts[part] * result.log_probs).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
    return float(torch.stack(losses).mean())
