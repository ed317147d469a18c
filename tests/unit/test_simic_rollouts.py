"""Simic on environments made for the purpose: spaces, masks, ends of episodes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from esper_ray.errors import EnvironmentRefused
from esper_ray.simic.distributions import Categoricals
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.evaluation import evaluate
from esper_ray.simic.policies import policy_for
from esper_ray.simic.rollout import joined
from esper_ray.simic.segments import rollout_of, segments
from tests.simic_worlds import BROKEN, COUNTING, MANY, MASKED, OWN, registered, worker


@pytest.fixture(autouse=True, scope="module")
def _worlds() -> Iterator[None]:
    with registered():
        yield


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
