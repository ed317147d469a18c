"""Episodes are real runs that a seed repeats bit for bit, and no way of playing them earns what it does not deserve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.ports import KernelSpec
from esper_ray.errors import EnvironmentRefused
from esper_ray.simic import tasks, trajectories
from esper_ray.simic.env import LAYOUT, Morphogenesis
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.episode import Episode, EpisodeResult, Kernels, play
from esper_ray.simic.policies import policy_for
from esper_ray.simic.registration import MORPHOGENESIS
from esper_ray.simic.reward import RewardConfig
from esper_ray.simic.rollout import RolloutWorker
from esper_ray.simic.tasks import ShortTask, sample_task
from esper_ray.tamiyo import graph
from esper_ray.tamiyo.actions import CULL, FOSSILIZE, GERMINATE, NO_OP
from esper_ray.tamiyo.brains import ScriptedBrain
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.view import Proposal, RunView

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ShortTask("digits", 0.0, 10, 4, 192, 9, 4, 0.02, seed=3)
BP009 = 9
WAIT = np.zeros(4, np.int64)
Script = Callable[[RunView], list[Proposal]]


def follow(script: Script, folder: Path, task: ShortTask = TINY) -> tuple[list[float], EpisodeResult]:
    """The rewards and the result of an episode whose boundaries ``script`` decides."""
    episode = Episode(task, folder=folder)
    episode.open()
    rewards = []
    while not episode.over:
        rewards.append(episode.advance(script(episode.view)))
    return rewards, episode.result()


def grow(view: RunView, *slots: int, blueprint: int = BP009) -> list[Proposal]:
    free = {slot.index for slot in view.dormant_slots()}
    return [Proposal(SeedOperation.GERMINATE, each, "", blueprint=blueprint) for each in slots if each in free]


def every(view: RunView, operation: SeedOperation, *stages: Stage, alpha: float = -1.0) -> list[Proposal]:
    chosen = [each for each in view.seeds() if each.stage in stages and each.alpha > alpha]
    return [Proposal(operation, each.slot, "", each.seed, each.blueprint) for each in chosen]


def rest(view: RunView) -> list[Proposal]:
    return []


def small_env(folder: Path, **options: object) -> Morphogenesis:
    return Morphogenesis(task=TINY, folder=folder, **options)  # type: ignore[arg-type]


# Tasks


def test_no_task_of_training_lies_in_a_region_that_is_held_out_and_every_other_does():
    assert not any(sample_task(seed).held_out for seed in range(500))
    assert all(sample_task(seed, split="held_out").held_out for seed in range(500))
    assert len({replace(sample_task(seed), seed=0) for seed in range(500)}) > 100


def test_a_task_has_its_own_classes_and_samples_and_the_same_each_time(tmp_path):
    one, again, other = (replace(TINY, classes=4, seed=seed).data(tmp_path) for seed in (1, 1, 2))
    assert torch.equal(one.train.inputs, again.train.inputs)
    assert set(one.train.targets.tolist()) == set(one.validation.targets.tolist()) == {0, 1, 2, 3}
    assert not torch.equal(one.train.targets, other.train.targets)
    assert len(one.test) == 0


def test_each_host_of_the_distribution_fits_the_layout_of_the_observation(tmp_path):
    for width in tasks.TRAIN_WIDTHS + tasks.HELD_OUT_WIDTHS:
        task = replace(TINY, width=width, epochs=2)
        opening = Episode(task, folder=tmp_path).view.opening
        assert graph.Layout.of(opening) == LAYOUT


# Episodes


def test_the_same_task_and_decisions_give_the_same_bits_whatever_else_happens_in_the_process(tmp_path):
    def play_out(disturb: bool) -> tuple[list[float], list[object], bytes]:
        episode = Episode(TINY, folder=tmp_path)
        episode.open()
        rewards = []
        while not episode.over:
            if disturb:
                torch.rand(7)
                if episode.view.now.epoch == 3:
                    follow(rest, tmp_path, replace(TINY, epochs=2, seed=9))
            rewards.append(episode.advance(grow(episode.view, 0, 2)))
        weights = b"".join(value.numpy().tobytes() for value in episode.loop.model.state_dict().values())
        return rewards, list(episode.view.states), weights

    assert play_out(False) == play_out(True)


def test_an_episode_leaves_the_generator_of_its_process_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    follow(rest, tmp_path, replace(TINY, epochs=2))
    assert torch.equal(torch.rand(3), expected)


def test_whoever_collects_episodes_without_gradients_gets_the_same_ones(tmp_path):
    def script(view: RunView) -> list[Proposal]:
        return grow(view, 1)

    short = replace(TINY, epochs=4, seed=11)
    with torch.inference_mode():
        collected = follow(script, tmp_path, short)
    assert collected == follow(script, tmp_path, short)


def test_a_run_that_never_grows_costs_what_its_host_costs(tmp_path):
    result = play(TINY, ScriptedBrain("never", CONTROLLERS["never"]), folder=tmp_path)
    assert result.compute_ratio == pytest.approx(1.0, abs=1e-12)
    assert result.parameter_ratio == 1.0
    assert result.reward == pytest.approx(result.accuracy)


def test_a_block_that_stays_is_paid_for_in_whatever_stage_it_is(tmp_path):
    last = TINY.epochs - 1
    rewards, result = follow(lambda view: grow(view, 2) if view.now.epoch == last else [], tmp_path)
    _, alone = follow(rest, tmp_path)
    assert result.accuracy == alone.accuracy
    assert result.parameter_ratio > 1.5
    assert sum(rewards) < result.accuracy - result.accuracies[0]


def test_kernels_are_the_same_in_each_process(tmp_path):
    wanted = KernelSpec("BP009", Episode(TINY, folder=tmp_path).loop.task.slots[0].signature)
    assert Kernels().fetch(wanted).wait(None).digest == Kernels().fetch(wanted).wait(0.0).digest


def test_an_episode_that_is_over_takes_no_more_decisions(tmp_path):
    episode = Episode(replace(TINY, epochs=2), folder=tmp_path)
    episode.open()
    episode.advance([])
    with pytest.raises(ValueError, match="over"):
        episode.advance([])


# The environment


def test_gymnasium_finds_it_by_its_id_and_its_checker_has_nothing_to_say(tmp_path):
    short = replace(TINY, epochs=3, steps=3)
    env = gymnasium.make(f"esper_ray.simic:{MORPHOGENESIS}", task=short.describe(), folder=str(tmp_path))
    check_env(env.unwrapped)


def test_the_environment_plays_the_same_episode_as_the_brain(tmp_path):
    brain = ScriptedBrain("periodic", CONTROLLERS["periodic"])
    expected = play(TINY, brain, folder=tmp_path)
    env = small_env(tmp_path)
    seen = [env.reset(seed=0)[0]]
    rewards: list[float] = []
    terminated, info = False, {}
    while not terminated:
        for step in brain.steps(env._episode.view):
            observation, given, terminated, truncated, info = env.step(np.asarray(step.choice.indices))
            assert not truncated
            seen.append(observation)
            rewards.append(given)
    assert expected.germinated > 0
    assert info["result"] == expected.describe()
    assert sum(rewards) == pytest.approx(expected.reward - expected.accuracies[0])
    # What learning from recorded runs makes of the same observations.
    np.testing.assert_allclose(trajectories.rewards_of(seen, RewardConfig()), rewards, atol=1e-5)


def test_a_command_is_queued_and_seen_and_trains_nothing_until_the_boundary_closes(tmp_path):
    env = small_env(tmp_path)
    _, before = env.reset(seed=0)
    place = LAYOUT.blueprints - 1
    observation, given, terminated, _, info = env.step(np.asarray((GERMINATE, 1, place, 2)))
    assert (given, terminated, info["epoch"], info["illegal"]) == (0.0, False, before["epoch"], False)
    assert observation["slots"][1, graph.SLOT_FEATURES.index("pending_germination")] == 1.0
    assert info["masks"]["slot"][GERMINATE].tolist() == [1, 0, 1]
    observation, _, _, _, info = env.step(WAIT)
    assert info["epoch"] == before["epoch"] + 1
    assert observation["mask_slot"][CULL].tolist() == [0, 1, 0]


def test_heads_that_do_not_apply_may_say_anything(tmp_path):
    env = small_env(tmp_path)
    env.reset(seed=0)
    assert not env.step(np.asarray((NO_OP, 2, 5, 1)))[4]["illegal"]


def test_an_illegal_action_is_an_error_or_counts_as_waiting_and_says_so(tmp_path):
    strict, lenient = small_env(tmp_path), small_env(tmp_path, illegal="no_op")
    strict.reset(seed=0)
    lenient.reset(seed=0)
    with pytest.raises(InvalidAction, match="masks"):
        strict.step(np.asarray((FOSSILIZE, 0, 0, 0)))
    wait, wrong = strict.step(WAIT), lenient.step(np.asarray((FOSSILIZE, 0, 0, 0)))
    assert wrong[4]["illegal"]
    assert wrong[1] == wait[1]
    assert all((wrong[0][name] == array).all() for name, array in wait[0].items())


def test_random_legal_play_is_never_refused_and_ends_at_the_last_boundary(tmp_path):
    env, draw = small_env(tmp_path), np.random.default_rng(1)
    _, info = env.reset(seed=0)
    terminated = False
    while not terminated:
        masks = info["masks"]
        operation = draw.choice(np.flatnonzero(masks["operation"]))
        slot = draw.choice(np.flatnonzero(masks["slot"][operation])) if operation != NO_OP else 0
        blueprint = draw.choice(np.flatnonzero(masks["blueprint"][slot])) if operation == GERMINATE else 0
        action = np.asarray((operation, slot, blueprint, draw.integers(3)))
        _, _, terminated, _, info = env.step(action)
        assert not info["illegal"]
    # A gate may still say no to a fossil; nothing else is refused.
    assert all("G4" in reason for reason in info["result"]["refused"])
    assert info["epoch"] == TINY.epochs
    with pytest.raises(ResetNeeded):
        env.step(WAIT)


def test_its_policy_chooses_what_is_legal_here(tmp_path):
    torch.manual_seed(0)
    env = small_env(tmp_path)
    observation, _ = env.reset(seed=0)
    policy = env.make_policy()
    tensors = {name: torch.from_numpy(array).unsqueeze(0) for name, array in observation.items()}
    acted = policy.act(tensors, generator=torch.Generator().manual_seed(1))
    assert not env.step(acted.actions[0].numpy())[4]["illegal"]


def test_a_seed_names_the_task_that_is_drawn_from_the_part_that_was_asked_for(tmp_path, monkeypatch):
    drawn: list[ShortTask] = []

    def remember(task: ShortTask, **given: object) -> Episode:
        drawn.append(task)
        return Episode(TINY, **given)

    monkeypatch.setattr("esper_ray.simic.env.Episode", remember)
    env = Morphogenesis(folder=tmp_path, split="held_out")
    for seed in (1, 1, 2, None):
        env.reset(seed=seed)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    assert all(task.held_out for task in drawn)


@pytest.mark.parametrize(
    "options",
    [{"split": "test"}, {"illegal": "maybe"}, {"task": {"dataset": "digits"}}, {"rewards": {"compute_rent": -1.0}}],
)
def test_an_option_that_makes_no_sense_is_refused_in_one_sentence(tmp_path, options):
    with pytest.raises(EnvironmentRefused, match=r"Morphogenesis"):
        Morphogenesis(folder=tmp_path, **options)


# Exploits


def test_waiting_earns_what_the_host_learns_and_nothing_else(tmp_path):
    rewards, result = follow(rest, tmp_path)
    steps = np.diff([*result.accuracies[:-1]])
    assert rewards[:-1] == pytest.approx(list(steps))
    assert sum(rewards) == pytest.approx(result.accuracy - result.accuracies[0])


def test_growing_and_culling_in_turns_earns_less_than_leaving_it_alone(tmp_path):
    def cycle(view: RunView) -> list[Proposal]:
        culls = every(view, SeedOperation.CULL, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING)
        return culls or grow(view, view.now.epoch % 3)

    rewards, result = follow(cycle, tmp_path)
    waiting, alone = follow(rest, tmp_path)
    assert result.culled >= 3
    # Isolation is exact: the host never noticed, and only the bill differs.
    assert result.accuracies == alone.accuracies
    assert result.compute_ratio > 1.0
    assert sum(rewards) < sum(waiting)


def test_growing_early_earns_nothing_of_the_hosts_own_progress(tmp_path):
    def early(view: RunView) -> list[Proposal]:
        return grow(view, 0, 1, 2) if view.now.epoch == 1 else every(view, SeedOperation.CULL, Stage.BLENDING)

    rewards, result = follow(early, tmp_path)
    waiting, alone = follow(rest, tmp_path)
    assert rewards[:-1] == waiting[:-1]
    assert result.accuracy == alone.accuracy
    assert rewards[-1] < waiting[-1]


def test_a_fossil_made_at_the_peak_is_worth_what_the_model_is_at_the_end(tmp_path):
    def keep(view: RunView) -> list[Proposal]:
        return grow(view, 2) if view.now.epoch == 1 else []

    def fossilise(view: RunView) -> list[Proposal]:
        return keep(view) + every(view, SeedOperation.FOSSILIZE, Stage.PROBATIONARY)

    steady, episode = Episode(TINY, folder=tmp_path), Episode(TINY, folder=tmp_path)
    rewards: dict[Episode, list[float]] = {steady: [], episode: []}
    for each in (steady, episode):
        each.open()
        while not each.over:
            if each is episode and each.view.now.epoch == TINY.epochs - 1:
                with torch.no_grad():
                    each.loop.model.head.weight.neg_()  # after the peak the model falls apart
            rewards[each].append(each.advance(fossilise(each.view)))
    peak, fallen = steady.result(), episode.result()
    assert peak.fossilized == fallen.fossilized == 1
    assert max(fallen.accuracies) - fallen.accuracy > 0.2
    assert rewards[steady][:-1] == rewards[episode][:-1], "the same up to the peak, the fossil included"
    assert sum(rewards[episode]) == pytest.approx(fallen.reward - fallen.accuracies[0])
    assert fallen.reward < fallen.accuracy
    # Making the seed a fossil paid nothing by itself.
    gains = np.diff(fallen.accuracies[:-1])
    assert rewards[episode][:-1] == pytest.approx(list(gains))


def test_letting_alpha_go_up_and_down_earns_no_more_than_leaving_it_alone(tmp_path):
    def turntable(view: RunView) -> list[Proposal]:
        culls = every(view, SeedOperation.CULL, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY, alpha=0.0)
        return culls or grow(view, view.now.epoch % 3)

    rewards, result = follow(turntable, tmp_path)
    waiting, alone = follow(rest, tmp_path)
    assert result.culled >= 2
    assert result.accuracies != alone.accuracies, "alpha was to move"
    assert sum(rewards) == pytest.approx(result.reward - result.accuracies[0])
    assert result.accuracy - result.reward > alone.accuracy - alone.reward
    assert sum(rewards) < sum(waiting)


def test_open_episodes_are_brought_back_by_their_actions_bit_for_bit(tmp_path):
    choice = EnvChoice(MORPHOGENESIS, {"folder": tmp_path, "task": replace(TINY, epochs=3)})
    interface = choice.interface()

    def made() -> RolloutWorker:
        policy = policy_for(choice, interface, hidden=(), seed=1)
        return RolloutWorker(choice.vector(2, taped=True), interface, policy, seed=2)

    straight, again = made(), made()
    straight.collect(5)
    again.restore(straight.state())
    one, two = straight.collect(5), again.collect(5)
    assert one.returns == two.returns
    assert one.valid.any()
    for name in ("actions", "rewards", "log_probs", "terminated"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert all(np.array_equal(array, two.obs[key]) for key, array in one.obs.items())


def test_against_the_host_waiting_earns_nothing_and_every_episode_keeps_its_rank(tmp_path):
    flat = {"potential_weight": 0.0}
    plain, relative = (small_env(tmp_path, rewards=flat, against_host=each) for each in (False, True))
    returns = {}
    for env in (plain, relative):
        for name, first in (("wait", WAIT), ("grow", np.array([GERMINATE, 0, 5, 0]))):
            env.reset(seed=1)
            _, total, over, _, _ = env.step(first)
            while not over:
                _, given, over, _, _ = env.step(WAIT)
                total += given
            returns[env is relative, name] = total
    assert returns[True, "wait"] == 0.0
    alone = returns[False, "wait"]
    assert returns[True, "grow"] == pytest.approx(returns[False, "grow"] - alone)


def test_a_pool_of_tasks_is_always_the_same_and_a_negative_one_is_refused(tmp_path):
    env = Morphogenesis(folder=tmp_path, tasks=2)
    drawn = {env.reset(seed=seed)[1]["task"]["seed"] for seed in range(8)}
    assert len(drawn) == 2
    with pytest.raises(EnvironmentRefused, match="-1 tasks"):
        Morphogenesis(folder=tmp_path, tasks=-1)
