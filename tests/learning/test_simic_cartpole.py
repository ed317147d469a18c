"""Learning itself, one seed and few steps: right losses alone have let collapsed learning through elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from esper_ray.config import SimicConfig
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.plan import TrainingPlan, settings_for
from esper_ray.simic.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("algo", "steps"), [("ppo", 40_000), ("impala", 100_000)])
def test_cartpole_is_learned_well_within_its_budget(algo: Any, steps: int) -> None:
    config = settings_for(SimicConfig(evaluate_episodes=30), algo, "CartPole-v1")
    plan = TrainingPlan(EnvChoice("CartPole-v1"), algo, steps, seed=1, config=config, stop_at=300.0)
    assert train(plan).state == "reached"


def test_it_is_learned_from_replayed_segments_as_well() -> None:
    """V-trace on a mixture of fresh and old trajectories still learns."""
    config = settings_for(SimicConfig(evaluate_episodes=30, replay_share=0.5, max_lag=64), "impala", "CartPole-v1")
    plan = TrainingPlan(EnvChoice("CartPole-v1"), "impala", 100_000, seed=1, config=config, stop_at=300.0)
    assert train(plan).state == "reached"
