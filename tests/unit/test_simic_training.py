"""Simic learns: both algorithms, lockstep, lag, divergence, checkpoints, settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from esper_ray.config import SimicConfig
from esper_ray.errors import CheckpointError, ConfigError, EnvironmentFault, RunError
from esper_ray.simic import checkpoints
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.job import app
from esper_ray.simic.learner import Learner
from esper_ray.simic.localcrew import LocalCrew
from esper_ray.simic.plan import settings_for
from esper_ray.simic.training import Lost, Progress, TrainingResult, train
from tests.simic_worlds import COUNTING, MANY, plan, registered, replaced, worker


@pytest.fixture(autouse=True, scope="module")
def _worlds() -> Iterator[None]:
    with registered():
        yield


# Learning


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_what_the_reset_steps_hold_changes_nothing_that_is_learned(algo: str) -> None:
    intended = plan(COUNTING, algo, envs=2, rollout_steps=12)
    interface = intended.env.interface()
    rollout = worker(intended.env, envs=2).collect(12)
    assert not rollout.valid.all()
    learned = []
    for junk in (0.0, 1000.0):
        learner = Learner(intended, interface)
        rewards = np.where(rollout.valid, rollout.rewards, junk).astype(np.float32)
        learner.learn([replaced(rollout, rewards=rewards)])
        learned.append(learner.weights().arrays)
    assert all(np.array_equal(learned[0][name], learned[1][name]) for name in learned[0])


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_the_reward_scale_is_as_if_the_rewards_were_other_ones(algo: str) -> None:
    interface = plan(algo=algo).env.interface()
    rollout = worker(EnvChoice("CartPole-v1"), envs=4).collect(32)
    learned = []
    for scale, rewards in ((0.125, rollout.rewards), (1.0, rollout.rewards * np.float32(0.125))):
        learner = Learner(plan(algo=algo, reward_scale=scale), interface)
        learner.learn([replaced(rollout, rewards=rewards)])
        learned.append(learner.weights().arrays)
    assert all(np.array_equal(learned[0][name], learned[1][name]) for name in learned[0])


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_both_algorithms_learn_two_heads_from_a_dictionary_with_a_mask(algo: str) -> None:
    options = {"envs": 16, "rollout_steps": 20, "hidden": (32,), "learning_rate": 0.01, "evaluate_every": 10_000}
    result = train(plan(MANY, algo, steps=10_000, epochs=4, **options))
    # Five steps, two points each; drawing legal actions at random gives 1/2 + 1/2 a step.
    assert result.evaluations[-1][1] > 9.0


def test_target_kl_ends_the_passes_over_a_batch() -> None:
    rollout = worker(EnvChoice("CartPole-v1"), envs=4).collect(32)
    counts = []
    for target in (0.0, 1e-4):
        learner = Learner(plan(target_kl=target, epochs=5, learning_rate=0.05), EnvChoice("CartPole-v1").interface())
        counts.append(learner.learn([rollout]).metrics["optimizer_steps"])
    assert counts[0] == 10
    assert counts[1] < 10


def test_a_training_that_diverges_says_so_and_ends() -> None:
    learner = Learner(plan(algo="impala", anneal=False), EnvChoice("CartPole-v1").interface())
    rollout = worker(EnvChoice("CartPole-v1"), envs=4).collect(32)
    with pytest.raises(RunError, match="has diverged at update 1"):
        learner.learn([replaced(rollout, log_probs=rollout.log_probs - np.inf)])


class Unlucky(LocalCrew):
    """Loses its learner at every update."""

    def learn(self, rollouts: Any) -> None:
        self._queue.append(lambda: Lost("learner", weights=self._learner.weights(), why="It was out of memory."))


def test_a_crew_that_loses_somebody_again_and_again_ends_the_training_with_the_cause() -> None:
    intended = plan()
    crew = Unlucky(intended)
    with pytest.raises(EnvironmentFault, match=r"lost its learner, for the 9th time.*out of memory"):
        train(intended, crew)
    crew.close()


def curve(result: TrainingResult) -> list[tuple[Any, ...]]:
    return curve_of(result.curve)


def curve_of(rows: Sequence[Progress]) -> list[tuple[Any, ...]]:
    return [(row.steps, repr(row.mean_return), tuple(sorted(row.metrics.items()))) for row in rows]


@pytest.mark.parametrize(
    "settings", [{"algo": "ppo"}, {"algo": "impala"}, {"algo": "impala", "replay_share": 0.5, "workers": 2}]
)
def test_two_trainings_in_lockstep_are_equal_bit_for_bit(settings: dict[str, Any]) -> None:
    one, two, other = (train(plan(seed=seed, mode="lockstep", **settings)) for seed in (7, 7, 8))
    assert curve(one) == curve(two)
    assert one.evaluations == two.evaluations
    assert all(np.array_equal(one.weights.arrays[name], array) for name, array in two.weights.arrays.items())
    assert curve(one) != curve(other)


def test_asynchronous_ppo_learns_from_weights_one_version_old_at_most() -> None:
    result = train(plan(steps=2000, workers=2, mode="async"))
    assert max(row.lag_max for row in result.curve) == 1


def test_rollouts_of_weights_that_are_too_old_are_dropped_and_counted() -> None:
    result = train(plan(algo="impala", steps=2000, workers=3, mode="async", max_lag=0))
    assert result.curve[-1].dropped_steps > 0
    assert max(row.lag_max for row in result.curve) == 0


def test_a_training_ends_when_it_has_reached_its_aim_or_is_told_to_stop(tmp_path: Path) -> None:
    assert train(plan(steps=100_000, stop_at=1.0)).state == "reached"
    calls: list[int] = []
    result = train(
        plan(steps=100_000, folder=tmp_path),
        should_stop=lambda: len(calls) > 2,
        on_progress=lambda p: calls.append(p.steps),
    )
    assert result.state == "stopped"
    assert checkpoints.exists(tmp_path)


# Checkpoints


def test_a_resumed_training_goes_on_with_its_weights_counters_and_episodes(tmp_path: Path) -> None:
    first = train(plan(folder=tmp_path, steps=512))
    again = train(plan(folder=tmp_path, steps=1024), resume=True)
    assert again.curve[0].steps > first.steps
    assert again.version > first.version
    assert again.evaluations[: len(first.evaluations)] == first.evaluations
    assert again.curve[0].episodes >= first.curve[-1].episodes


ENVIRONMENTS = [
    ("CartPole-v1", {"algo": "ppo"}),  # a vector of its own
    ("Acrobot-v1", {"algo": "impala", "replay_share": 0.5}),  # stepped one by one, longer than a rollout
    (MANY, {"algo": "ppo", "workers": 2, "mode": "lockstep"}),  # a dictionary, a mask, two heads
]


@pytest.mark.parametrize(("env", "settings"), ENVIRONMENTS)
def test_a_training_in_lockstep_that_was_stopped_is_in_the_end_the_undisturbed_one_bit_for_bit(
    env: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = train(plan(env, steps=1024, **settings))
    rows: list[tuple[Any, ...]] = []
    notes: list[str] = []
    intended = plan(env, steps=1024, folder=tmp_path, **settings)
    # Whoever asks it to stop does so at any time, in the middle of a rollout as well.
    for number, times in enumerate((5, 4, 10_000)):
        asked = iter([False] * times)
        result = train(
            intended, resume=number > 0, should_stop=lambda: next(asked, True), on_note=notes.append,  # noqa: B023
            on_progress=lambda p: rows.extend(curve_of([p])),
        )  # fmt: skip
        assert result.state == ("finished" if times == 10_000 else "stopped")
    assert notes == []
    assert rows == curve(undisturbed)
    assert result.evaluations == undisturbed.evaluations
    assert all(np.array_equal(undisturbed.weights.arrays[name], each) for name, each in result.weights.arrays.items())


def test_a_training_in_lockstep_that_was_killed_repeats_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    undisturbed = train(plan(steps=1024))
    intended = plan(steps=1024, folder=tmp_path, checkpoint_every=300)

    def die(progress: Progress) -> None:
        if progress.steps > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(intended, on_progress=die)
    result = train(intended, resume=True)
    assert curve(result) == curve(undisturbed)[-len(result.curve) :]
    assert len(result.curve) < len(undisturbed.curve)


def test_what_a_resumed_training_does_not_go_on_with_is_said(tmp_path: Path) -> None:
    cases = (
        (plan(COUNTING, folder=tmp_path / "one"), "showed another 'obs'"),  # its episodes are numbered over all
        (plan(folder=tmp_path / "two", workers=2, mode="async"), "only in lockstep"),
    )
    for intended, why in cases:
        seen: list[Progress] = []
        train(intended, should_stop=lambda: len(seen) > 1, on_progress=seen.append)  # noqa: B023
        notes: list[str] = []
        result = train(intended, resume=True, on_note=notes.append)
        assert result.state == "finished"
        assert len(notes) == 1
        assert "new episodes" in notes[0].lower()
        assert why in notes[0]


def test_a_checkpoint_holds_all_that_the_next_update_depends_on(tmp_path: Path) -> None:
    intended = plan(algo="ppo")
    interface = intended.env.interface()
    rollouts = [worker(intended.env, envs=4, seed=seed).collect(32) for seed in range(3)]
    straight, before, after = (Learner(intended, interface) for _ in range(3))
    for learner in (straight, before):
        learner.learn([rollouts[0]])
        learner.learn([rollouts[1]])
    before.save(tmp_path, checkpoints.Counters(steps=5, evaluations=((1, 2.0, 3.0),)))
    assert after.load(tmp_path) == checkpoints.Counters(steps=5, evaluations=((1, 2.0, 3.0),))
    assert straight.learn([rollouts[2]]) == after.learn([rollouts[2]])
    assert all(np.array_equal(after.weights().arrays[name], array) for name, array in straight.weights().arrays.items())


def test_a_foreign_or_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path) -> None:
    train(plan(folder=tmp_path))
    cases = (
        (plan("Acrobot-v1", folder=tmp_path), "belongs to CartPole-v1"),
        (plan(algo="impala", folder=tmp_path), "a training with ppo, not impala"),
        (plan(folder=tmp_path, hidden=(9,)), "another network"),
        (plan(folder=tmp_path / "none"), "nothing to resume"),
    )
    for intended, why in cases:
        with pytest.raises(CheckpointError, match=why):
            train(intended, resume=True)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        train(plan(folder=tmp_path), resume=True)


def test_a_training_can_start_from_the_policy_of_another(tmp_path: Path) -> None:
    first = train(plan(folder=tmp_path))
    learner = Learner(plan(initial=tmp_path), EnvChoice("CartPole-v1").interface())
    assert all(np.array_equal(first.weights.arrays[name], array) for name, array in learner.weights().arrays.items())


def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    train(plan(folder=tmp_path / "school" / "first"))
    order = ["train", "--env", "Acrobot-v1", "--from", "first", "--steps", "10", "--set", f"home={tmp_path}"]
    refused = CliRunner().invoke(app, order)
    assert isinstance(refused.exception, CheckpointError)
    assert "belongs to CartPole-v1" in str(refused.exception)
    assert [folder.name for folder in (tmp_path / "school").iterdir()] == ["first"]


# Settings


def test_presets_fill_what_the_user_did_not_set() -> None:
    mine = SimicConfig(rollout_steps=7)
    filled = settings_for(mine, "impala", "CartPole-v1")
    assert filled.rollout_steps == 7
    assert filled.entropy_weight == settings_for(SimicConfig(), "impala", "CartPole-v1").entropy_weight != 0.0
    SimicConfig.model_validate(filled.model_dump())


def test_a_plan_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"algo": "dqn"}, {"steps": 0}, {"algo": "ppo", "replay_share": 0.5}):
        with pytest.raises(ConfigError):
            plan(**wrong)
