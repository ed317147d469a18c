"""What one training is to do, and good settings for known environments. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from esper_ray.config import SimicConfig
from esper_ray.errors import ConfigError
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.registration import MORPHOGENESIS

Algo = Literal["ppo", "impala"]
ALGOS: tuple[str, ...] = get_args(Algo)

PRESETS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("impala", ""): {
        "rollout_steps": 64,
        "minibatches": 4,
        "learning_rate": 1e-3,
        "entropy_weight": 0.01,
        "clip_norm": 40.0,
        # Values of order 1 are learned in tens of updates; those of a reward of 1 a step, up to 1 / (1 - gamma), take
        # hundreds, and the policy learns little meanwhile.
        "reward_scale": 0.02,
    },
    # An episode is a training run of some seconds: few environments, short rollouts, no discount, many passes.
    ("ppo", MORPHOGENESIS): {
        "rollout_steps": 64,
        "epochs": 6,
        "minibatches": 4,
        "gae_lambda": 0.98,
        "target_kl": 0.04,
        "envs": 4,
        "learning_rate": 1e-3,
        "gamma": 1.0,
        "entropy_weight": 0.003,
        "evaluate_every": 4000,
        "evaluate_episodes": 12,
        "checkpoint_every": 500,
        "request_seconds": 600.0,
    },
    ("impala", MORPHOGENESIS): {
        "reward_scale": 1.0,
        "rollout_steps": 32,
        "minibatches": 1,
        "envs": 4,
        "learning_rate": 1e-3,
        "gamma": 1.0,
        "entropy_weight": 0.003,
        "evaluate_every": 4000,
        "evaluate_episodes": 12,
        "checkpoint_every": 500,
        "request_seconds": 600.0,
    },
}
"""Settings by algorithm and environment; those without an environment hold for all. The user's own come before them."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """One training.

    Args:
        steps: environment steps in all; reset steps between episodes do not count.
        folder: where checkpoints go; None for none.
        stop_at: mean return of a greedy evaluation at which the training has reached its aim and ends.
        initial: a training's folder whose policy this one starts from.
    """

    env: EnvChoice
    algo: Algo
    steps: int
    seed: int = 0
    config: SimicConfig = field(default_factory=SimicConfig)
    folder: Path | None = None
    stop_at: float | None = None
    initial: Path | None = None

    def __post_init__(self) -> None:
        if self.algo not in ALGOS:
            raise ConfigError(f"There is no algorithm {self.algo!r}.", remedy=f"Take one of {', '.join(ALGOS)}.")
        if self.steps < 1:
            raise ConfigError(f"A training of {self.steps} steps is none.", remedy="Ask for at least one.")
        if self.config.replay_share > 0 and self.algo == "ppo":
            raise ConfigError(
                "simic.replay_share is above 0 for PPO.",
                why="PPO learns from what its own last policies did.",
                remedy="Set it to 0, or take impala.",
            )

    @property
    def replayed(self) -> int:
        """Segments that are replayed with each rollout of one worker."""
        share = self.config.replay_share
        return round(self.config.envs * share / (1.0 - share))

    @property
    def lockstep(self) -> bool:
        return self.config.mode == "lockstep" or self.config.workers == 0

    @property
    def keeps_workers(self) -> bool:
        """Whether checkpoints hold the open episodes: otherwise workers are ahead of them."""
        return self.lockstep and self.folder is not None

    @property
    def max_lag(self) -> int:
        """How many versions old the weights that acted may be."""
        return min(1, self.config.max_lag) if self.algo == "ppo" else self.config.max_lag


def settings_for(config: SimicConfig, algo: str, env_id: str) -> SimicConfig:
    """The settings with this algorithm's and environment's presets in all fields that the user did not set."""
    presets = {**PRESETS.get((algo, ""), {}), **PRESETS.get((algo, env_id), {})}
    return config.model_copy(update={k: v for k, v in presets.items() if k not in config.model_fields_set})
