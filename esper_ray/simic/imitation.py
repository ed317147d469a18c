"""A policy that decides as a controller does: the start from which acting can improve.

Random decisions alone seldom show that growing pays: a seed must be grown early, kept through all its stages and not be
culled by the next random draw. A policy that already does what the heuristic does begins where its rewards are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from esper_ray.config import Config
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic.env import LAYOUT, pool_task
from esper_ray.simic.episode import Episode
from esper_ray.tamiyo import graph, policy_store
from esper_ray.tamiyo.brains import Brain, ScriptedBrain, Step
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.policy import GraphPolicy

_BATCH, _RATE, _PASSES = 64, 1e-3, 12


def imitate(
    config: Config, who: str, *, episodes: int, seed: int = 0, on_episode: Callable[[], None] = lambda: None
) -> tuple[str, float]:
    """Play training tasks with a controller, learn its decisions by maximum likelihood, and keep the policy.

    Returns:
        The policy's id, and its mean loss over the last pass in nats per decision.
    """
    brain = ScriptedBrain(who, CONTROLLERS[who])
    steps: list[Step] = []
    for number in range(episodes):
        steps += _decisions(config, brain, number)
        on_episode()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "imitation"))
        policy = GraphPolicy()
    loss = fit(policy, steps, seed)
    summary = {"algo": f"imitation of {who}", "decisions": len(steps), "episodes": episodes, "loss": loss, "seed": seed}
    return policy_store.save(config.home, policy, training=summary), loss


def _decisions(config: Config, brain: Brain, number: int) -> list[Step]:
    """The micro-steps of one episode."""
    episode = Episode(pool_task(number), folder=config.home / "data")
    episode.open()
    found: list[Step] = []
    while not episode.over:
        steps = brain.steps(episode.view)
        found += steps
        episode.advance([step.proposal for step in steps if step.proposal is not None])
    return found


def fit(policy: GraphPolicy, steps: list[Step], seed: int) -> float:
    """Maximum likelihood of the steps' choices, in passes over them; the mean loss over the last one."""
    padded = [graph.pad(step.observation, LAYOUT) for step in steps]
    obs = {name: torch.from_numpy(np.stack([each[name] for each in padded])) for name in padded[0]}
    actions = torch.tensor([step.choice.indices for step in steps])
    optimizer = torch.optim.Adam(policy.parameters(), lr=_RATE)
    generator = torch.Generator().manual_seed(derive_seed(seed, "imitation order"))
    losses: list[Tensor] = []
    for _ in range(_PASSES):
        losses.clear()
        order = torch.randperm(len(steps), generator=generator)
        for part in order.tensor_split(max(1, len(steps) // _BATCH)):
            result = policy.evaluate({name: array[part] for name, array in obs.items()}, actions[part])
            loss = -result.log_probs.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
    return float(torch.stack(losses).mean())
