"""Simic on environments made for the purpose: spaces, masks, episodes' ends, learning, checkpoints, lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from esper_ray.config import SimicConfig
from esper_ray.errors import CheckpointError, ConfigError, EnvironmentFault, EnvironmentRefused, RunError
from esper_ray.simic import checkpoints
from esper_ray.simic.distributions import Categoricals
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.evaluation import evaluate
from esper_ray.simic.learner import Learner
from esper_ray.simic.localcrew import LocalCrew
from esper_ray.simic.plan import TrainingPlan, settings_for
from esper_ray.simic.policies import ActorCritic, policy_for
from esper_ray.simic.rollout import Rollout, RolloutWorker, joined
from esper_ray.simic.segments import rollout_of, segments
from esper_ray.simic.training import Lost, TrainingResult, train

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


@pytest.fixture(autouse=True, scope="module")
def _environments() -> Iterator[None]:
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


# Spaces and what is refused


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ("No-Such-Environment-v0", "There is no environment 'No-Such-Environment-v0'"),
        ("nosuchpackage_x:Env-v0", "There is no environment"),
        ("Pendulum-v1", "action space Box"),
        ("FrozenLake-v1", "observation space Discrete"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_clear_sentence(env: str, why: str) -> None:
    with pytest.raises(EnvironmentRefused, match=why):
        EnvChoice(env).interface()


def test_options_that_an_environment_does_not_take_are_named() -> None:
    with pytest.raises(EnvironmentRefused, match="cannot be made with the options"):
        EnvChoice("CartPole-v1", {"wheels": 3}).interface()


def test_a_mask_of_another_size_than_the_actions_is_refused() -> None:
    choice = EnvChoice(COUNTING)
    env = choice.make()
    from esper_ray.simic.spaces import interface_of

    with pytest.raises(EnvironmentRefused, match="action mask of shape"):
        interface_of("x", env.observation_space, env.action_space, {"action_mask": np.ones(3)})


def test_the_signature_tells_environments_and_spaces_apart() -> None:
    names = (COUNTING, MASKED, MANY, "CartPole-v1", "Acrobot-v1")
    assert len({EnvChoice(name).interface().signature for name in names}) == len(names)
    assert EnvChoice(MANY).interface() == EnvChoice(MANY).interface()


def test_masked_actions_never_come_sampled_or_greedy_however_large_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e3, 1e30):
        logits = torch.randn(4000, 7, generator=generator) * scale
        mask = torch.rand(4000, 7, generator=generator) < 0.4
        mask[:, 0] |= ~mask[:, :3].any(1)
        mask[:, 3] |= ~mask[:, 3:].any(1)
        distribution = Categoricals(logits, (3, 4), mask)
        for actions in (distribution.sample(generator), distribution.mode()):
            assert mask.gather(1, actions + torch.tensor([0, 3])).all()
            assert torch.isfinite(distribution.log_prob(actions)).all()
        assert torch.isfinite(distribution.entropy()).all()


def test_samples_log_probs_and_entropy_are_those_of_the_distribution() -> None:
    logits = torch.tensor([[0.3, -1.0, 1.2, 2.0, 0.0]])
    ours = Categoricals(logits, (3, 2))
    peers = [torch.distributions.Categorical(logits=part) for part in logits.split([3, 2], dim=1)]
    actions = Categoricals(logits.expand(40_000, 5), (3, 2)).sample(torch.Generator().manual_seed(0))
    for head, peer in enumerate(peers):
        shares = torch.bincount(actions[:, head]) / len(actions)
        assert torch.allclose(shares, peer.probs[0], atol=0.01)
    some = torch.tensor([[2, 1]])
    assert ours.log_prob(some).item() == pytest.approx(sum(p.log_prob(some[:, h]).item() for h, p in enumerate(peers)))
    assert ours.entropy().item() == pytest.approx(sum(p.entropy().item() for p in peers))


def test_an_environment_that_brings_a_policy_gets_it_and_weights_follow_the_seed() -> None:
    choice = EnvChoice(OWN)
    own = policy_for(choice, choice.interface(), hidden=(8,), seed=3)
    again = policy_for(choice, choice.interface(), hidden=(8,), seed=3)
    assert own.biases[0].shape == (2, 1, 7)  # type: ignore[attr-defined]
    assert torch.equal(own.policy_weight, again.policy_weight)  # type: ignore[attr-defined]


# Rollouts


@pytest.mark.parametrize("cut", [False, True])
def test_next_step_reset_rows_are_no_transitions_and_the_final_observation_follows_each_end(cut: bool) -> None:
    rollout = worker(EnvChoice(COUNTING, {"length": 3, "cut": cut})).collect(10)
    column = rollout.obs["obs"][:, 0]
    assert column[:9].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0]]
    assert rollout.valid[:, 0].tolist() == [True, True, True, False] * 2 + [True, True]
    ends = rollout.truncated if cut else rollout.terminated
    assert np.flatnonzero(ends[:, 0]).tolist() == [2, 6]
    assert not (rollout.terminated if cut else rollout.truncated).any()
    assert rollout.rewards[:, 0].tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert rollout.steps == 16
    assert rollout.returns == (6.0,) * 4
    assert rollout.lengths == (3,) * 4


def test_same_step_reset_bootstraps_from_the_final_observation_that_the_reset_replaced() -> None:
    choice = EnvChoice(COUNTING, {"length": 3, "cut": True})
    actor = worker(choice, mode=AutoresetMode.SAME_STEP)
    rollout = actor.collect(6)
    assert rollout.valid.all()
    assert rollout.obs["obs"][:, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
    policy = policy_for(choice, choice.interface(), hidden=(8,), seed=0)
    final = torch.tensor([[0.0, 3.0], [1.0, 3.0]])
    expected = policy.act({"obs": final}, generator=torch.Generator(), greedy=True).values.tolist()
    assert rollout.final_values is not None
    assert rollout.final_values[[2, 5], 0].tolist() == pytest.approx(expected)
    assert not rollout.final_values[[0, 1, 3, 4]].any()
    assert rollout.returns == (6.0,) * 4


def test_same_step_final_observations_of_dictionaries_are_found() -> None:
    rollout = worker(EnvChoice(MANY), mode=AutoresetMode.SAME_STEP).collect(11)
    assert rollout.final_values is not None
    assert np.flatnonzero(rollout.final_values[:, 1]).tolist() == [4, 9]


def test_episodes_go_on_over_the_ends_of_rollouts() -> None:
    actor = worker(EnvChoice(COUNTING, {"length": 5}), envs=1)
    first, second = actor.collect(3), actor.collect(3)
    assert first.returns == ()
    assert second.returns == (15.0,)
    assert second.lengths == (5,)
    assert np.array_equal(second.obs["obs"][0], first.obs["obs"][3])


def test_recorded_values_and_log_probs_are_those_of_the_policy_that_acted() -> None:
    choice = EnvChoice("CartPole-v1")
    rollout = worker(choice, envs=3).collect(20)
    policy = policy_for(choice, choice.interface(), hidden=(8,), seed=0)
    for step in range(20):
        found = policy.evaluate(
            {"obs": torch.from_numpy(rollout.obs["obs"][step])}, torch.from_numpy(rollout.actions[step])
        )
        assert found.log_probs.tolist() == pytest.approx(rollout.log_probs[step].tolist(), abs=1e-6)
        assert found.values.tolist() == pytest.approx(rollout.values[step].tolist(), abs=1e-6)


@pytest.mark.parametrize("env", [MASKED, MANY])
def test_masks_from_infos_and_from_observations_are_obeyed(env: str) -> None:
    rollout = worker(EnvChoice(env), envs=3).collect(60)
    assert rollout.actions.min() >= 0
    assert evaluate_once(env) > 0


def evaluate_once(env: str) -> float:
    choice = EnvChoice(env)
    policy = policy_for(choice, choice.interface(), hidden=(8,), seed=0)
    return evaluate(policy, choice, choice.interface(), episodes=4, seed=0).mean


@pytest.mark.parametrize("where", ["observation", "reward"])
def test_a_value_that_is_no_number_is_refused_by_name(where: str) -> None:
    with pytest.raises(EnvironmentRefused, match=rf"value of the {where}.* no finite number"):
        worker(EnvChoice(BROKEN, {"where": where})).collect(4)


def test_equal_seeds_give_equal_rollouts_and_workers_differ() -> None:
    choice = EnvChoice("CartPole-v1")
    one, two, other = (worker(choice, seed=1, worker=number).collect(16) for number in (0, 0, 1))
    assert np.array_equal(one.obs["obs"], two.obs["obs"])
    assert np.array_equal(one.actions, two.actions)
    assert not np.array_equal(one.obs["obs"], other.obs["obs"])


def test_segments_put_together_are_the_rollout() -> None:
    rollout = worker(EnvChoice(MANY), envs=3).collect(9)
    parts = segments(rollout)
    again = rollout_of({name: np.stack([part[name] for part in parts]) for name in parts[0]})
    for name in ("actions", "log_probs", "values", "rewards", "terminated", "truncated", "valid"):
        assert np.array_equal(getattr(again, name), getattr(rollout, name))
    assert all(np.array_equal(again.obs[key], array) for key, array in rollout.obs.items())
    assert joined([rollout, again]).actions.shape == (9, 6, 2)


def test_an_evaluation_plays_as_many_episodes_as_asked_and_does_not_prefer_short_ones() -> None:
    choice = EnvChoice(COUNTING, {"length": 4})
    policy = policy_for(choice, choice.interface(), hidden=(8,), seed=0)
    found = evaluate(policy, choice, choice.interface(), episodes=7, seed=0, envs=3)
    assert found.returns == (10.0,) * 7
    assert found.lengths == (4,) * 7
    native = EnvChoice("CartPole-v1")
    player = policy_for(native, native.interface(), hidden=(8,), seed=0)
    lengths = evaluate(player, native, native.interface(), episodes=40, seed=5, envs=40).lengths
    by_few = evaluate(player, native, native.interface(), episodes=40, seed=5, envs=4).lengths
    assert np.mean(lengths) == pytest.approx(np.mean(by_few), rel=0.4)


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


def replaced(rollout: Rollout, **columns: Any) -> Rollout:
    from dataclasses import replace

    return replace(rollout, **columns)


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
    return [(row.steps, row.mean_return, tuple(sorted(row.metrics.items()))) for row in result.curve]


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
