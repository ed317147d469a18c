"""Plays whole episodes with the likeliest actions and says how they went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from esper_ray.reliability.ids import derive_seed
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.policies import Policy
from esper_ray.simic.spaces import Interface

_SEEDS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Returns and lengths of the episodes played; ``deviation`` is that of one episode's return."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def deviation(self) -> float:
        return float(np.std(self.returns, ddof=1)) if len(self.returns) > 1 else 0.0


def evaluate(
    policy: Policy,
    choice: EnvChoice,
    interface: Interface,
    *,
    episodes: int,
    seed: int,
    envs: int = 100,
    greedy: bool = True,
) -> Evaluation:
    """Play ``episodes`` episodes, ``envs`` at a time at most; equal seeds give equal episodes.

    Each environment plays a fixed number of them: taking the first to finish would prefer short ones.
    """
    envs = min(envs, episodes)
    quota = np.full(envs, episodes // envs) + (np.arange(envs) < episodes % envs)
    vector = choice.vector(envs)
    generator = torch.Generator().manual_seed(derive_seed(seed, "evaluation"))
    returns: list[float] = []
    lengths: list[int] = []
    sums, counts = np.zeros(envs), np.zeros(envs, np.int64)
    resetting = np.zeros(envs, np.bool_)
    next_step = vector.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP
    try:
        seen, info = vector.reset(seed=derive_seed(seed, "evaluation") % _SEEDS)
        with torch.inference_mode():
            while quota.any():
                obs = {key: torch.from_numpy(np.asarray(a)) for key, a in interface.observed(seen, info).items()}
                choices = policy.act(obs, generator=generator, greedy=greedy).actions.numpy()
                seen, rewards, terminated, truncated, info = vector.step(interface.actions(choices))
                done = terminated | truncated
                sums += np.where(resetting, 0.0, rewards)
                counts += ~resetting
                counted = done & (quota > 0)
                if counted.any():
                    returns += sums[counted].tolist()
                    lengths += counts[counted].tolist()
                    quota[counted] -= 1
                if done.any():
                    sums[done], counts[done] = 0.0, 0
                resetting = done & next_step
    finally:
        vector.close()
    return Evaluation(tuple(returns), tuple(lengths))
