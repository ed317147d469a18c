"""A training on Ray: the same as without where it must be, and going on whoever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from esper_ray.actors.simic import RayCrew, share_of
from esper_ray.config import SimicConfig
from esper_ray.errors import EnvironmentFault, EnvironmentRefused
from esper_ray.runtime import Session
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.training import Progress, TrainingResult, train

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _one_thread(system: Session) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan(
    algo: Any = "ppo", steps: int = 1024, env: str = "CartPole-v1", folder: Path | None = None, **settings: Any
) -> TrainingPlan:
    small = {
        "envs": 4,
        "rollout_steps": 32,
        "minibatches": 2,
        "epochs": 2,
        "evaluate_every": 500,
        "evaluate_episodes": 3,
    }
    config = SimicConfig(**{**small, "workers": 2, "hidden": (8,), "request_seconds": 60.0, **settings})
    return TrainingPlan(EnvChoice(env), algo, steps, seed=3, config=config, folder=folder)


def on_ray(intended: TrainingPlan, **how: Any) -> TrainingResult:
    with RayCrew(intended) as crew:
        return train(intended, crew, **how)


@pytest.mark.parametrize("settings", [{"algo": "ppo"}, {"algo": "impala", "replay_share": 0.5}])
def test_in_lockstep_two_workers_give_the_curve_of_one_process_bit_for_bit(settings: dict[str, Any]) -> None:
    intended = plan(mode="lockstep", **settings)
    results = [on_ray(intended), on_ray(intended), train(intended)]
    curves = [[(row.steps, row.mean_return, sorted(row.metrics.items())) for row in each.curve] for each in results]
    assert curves[0] == curves[1] == curves[2]
    assert results[0].evaluations == results[2].evaluations
    for name, array in results[0].weights.arrays.items():
        assert np.array_equal(array, results[1].weights.arrays[name])
        assert np.array_equal(array, results[2].weights.arrays[name])


def test_acting_and_learning_overlap_and_ppo_stays_within_one_version() -> None:
    result = on_ray(plan(steps=4096))
    assert result.state == "finished"
    assert result.restarts == 0
    assert max(row.lag_max for row in result.curve) == 1


@pytest.mark.parametrize("how", ["kill", "sigkill"])
def test_whoever_dies_in_the_middle_the_training_goes_on_and_ends(how: str, tmp_path: Path) -> None:
    intended = plan("impala", 12_000, folder=tmp_path, replay_share=0.5, checkpoint_every=1000)
    deaths = {2000: "worker 1", 5000: "learner", 8000: "replay"}
    with RayCrew(intended) as crew:
        seen: list[Progress] = []

        def note(progress: Progress) -> None:
            seen.append(progress)
            due = [steps for steps in deaths if steps <= progress.steps]
            for steps in due:
                _end(crew.actors[deaths.pop(steps)], how)

        result = train(intended, crew, on_progress=note)
    assert not deaths
    assert result.state == "finished"
    assert result.steps >= 12_000
    assert result.restarts >= 3
    versions = [row.version for row in seen]
    assert versions == sorted(set(versions))
    assert all(np.isfinite(array).all() for array in result.weights.arrays.values())


def test_a_lost_learner_keeps_what_was_learned() -> None:
    """Without a folder there is no checkpoint: it takes up the newest weights."""
    intended = plan(steps=4096, mode="lockstep")
    with RayCrew(intended) as crew:
        before: list[Any] = []

        def end() -> None:
            before.append(crew.fetch(crew.weights))
            _end(crew.actors["learner"], "kill")

        seen: list[Progress] = []
        result = train(intended, crew, on_progress=_once(seen, 2000, end))
    assert result.restarts == 1
    first = train(plan(steps=1, mode="lockstep")).weights.arrays
    last = result.weights.arrays
    drift = {name: float(np.abs(last[name] - before[0].arrays[name]).max()) for name in last}
    start = {name: float(np.abs(first[name] - before[0].arrays[name]).max()) for name in last}
    assert sum(drift.values()) < 3 * sum(start.values())
    assert result.version > before[0].version


def test_a_silent_worker_is_replaced_after_its_time() -> None:
    intended = plan(steps=2048, request_seconds=15.0)
    with RayCrew(intended) as crew:
        seen: list[Progress] = []
        result = train(
            intended, crew, on_progress=_once(seen, 500, lambda: os.kill(_pid(crew.actors["worker 0"]), signal.SIGSTOP))
        )
    assert result.state == "finished"
    assert result.restarts >= 1


def test_a_stopped_training_is_resumed_on_ray(tmp_path: Path) -> None:
    intended = plan(steps=100_000, folder=tmp_path, workers=1)
    seen: list[Progress] = []
    first = on_ray(intended, on_progress=seen.append, should_stop=lambda: len(seen) >= 3)
    assert first.state == "stopped"
    again = on_ray(plan(steps=first.steps + 500, folder=tmp_path, workers=1), resume=True)
    assert again.curve[0].steps > first.steps
    assert again.version > first.version


def test_in_lockstep_the_resumed_training_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = on_ray(plan(mode="lockstep"))
    intended = plan(mode="lockstep", folder=tmp_path)
    seen: list[Progress] = []
    notes: list[str] = []
    on_ray(intended, on_progress=seen.append, should_stop=lambda: len(seen) >= 2)
    result = on_ray(intended, resume=True, on_progress=seen.append, on_note=notes.append)
    assert notes == []
    curves = [[(row.steps, row.mean_return, row.metrics) for row in rows] for rows in (seen, undisturbed.curve)]
    assert curves[0] == curves[1]
    for name, array in undisturbed.weights.arrays.items():
        assert np.array_equal(result.weights.arrays[name], array)


def test_a_workers_own_error_ends_the_training_with_its_sentence() -> None:
    with pytest.raises(EnvironmentRefused, match="There is no environment"):
        RayCrew(plan(env="No-Such-Env-v0"))


def test_processors_that_are_not_there_are_reported_and_not_waited_for() -> None:
    with pytest.raises(EnvironmentFault, match=r"needs 1500 CPU, and [0-9.]+ of the cluster are free"):
        RayCrew(plan(worker_cpus=500.0))
    assert share_of(plan(workers=1), lambda: 8.0) == 1.0
    assert share_of(plan(workers=3), lambda: 0.1) == 0.01
    assert share_of(plan(workers=3, worker_cpus=0.5), lambda: 2.0) == 0.5


def _once(seen: list[Progress], steps: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Acts at the first progress that has so many steps."""
    done: list[bool] = []

    def note(progress: Progress) -> None:
        seen.append(progress)
        if progress.steps >= steps and not done:
            done.append(True)
            act()

    return note


def _pid(actor: Any) -> int:
    pid: int = ray.get(actor.pid.remote(), timeout=60)
    return pid


def _end(actor: Any, how: str) -> None:
    if how == "kill":
        ray.kill(actor)
    else:
        os.kill(_pid(actor), signal.SIGKILL)
