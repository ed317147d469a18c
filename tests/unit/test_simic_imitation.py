"""A policy can begin as the heuristic, and a training can begin with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from esper_ray import config as configuration
from esper_ray.errors import ConfigError
from esper_ray.simic import imitation, registry
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.episode import Episode
from esper_ray.simic.learner import Learner
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.registration import MORPHOGENESIS
from esper_ray.simic.tasks import ShortTask
from esper_ray.tamiyo import policy_store
from esper_ray.tamiyo.brains import LearnedBrain, ScriptedBrain
from esper_ray.tamiyo.heuristic import CONTROLLERS

TINY = ShortTask("digits", 0.0, 10, 4, 192, 9, 4, 0.02, seed=3)


def test_an_imitation_decides_as_the_heuristic_does_on_what_it_saw_and_a_training_starts_from_it(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(imitation, "pool_task", lambda number: TINY)
    monkeypatch.setattr(imitation, "_PASSES", 60)
    config = configuration.load(None, [f"home={tmp_path}"])
    policy_id, loss = imitation.imitate(config, ["heuristic"], episodes=2)
    assert loss < 0.5
    assert registry.find(tmp_path, policy_id).summary["algo"] == "imitation of heuristic"
    policy, _ = policy_store.load(tmp_path, policy_id)

    learned, teacher = LearnedBrain(policy, policy_id), ScriptedBrain("heuristic", CONTROLLERS["heuristic"])
    episode = Episode(TINY, folder=tmp_path / "data")
    episode.open()
    grown = 0
    while not episode.over:
        wanted = [step.choice for step in teacher.steps(episode.view)]
        assert [step.choice for step in learned.steps(episode.view)] == wanted
        grown += len(wanted) - 1
        episode.advance([step.proposal for step in teacher.steps(episode.view) if step.proposal is not None])
    assert grown > 0

    choice = EnvChoice(MORPHOGENESIS, {"folder": str(tmp_path / "data")})
    plan = TrainingPlan(choice, "ppo", 100, initial=tmp_path / "policies" / policy_id)
    began = Learner(plan, choice.interface()).weights().arrays
    assert all((began[name] == tensor.numpy()).all() for name, tensor in policy.state_dict().items())


def test_of_several_teachers_the_better_one_on_a_task_is_imitated_more_on_it(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(imitation, "pool_task", lambda number: replace(TINY, seed=number))
    worth = {(0, False): 0.1, (0, True): 0.2, (1, False): 0.2, (1, True): 0.1}
    seen: dict[str, np.ndarray] = {}

    def play(config, who, number):
        steps, _ = real(config, who, number)
        return steps, worth[number, who.settings.parameter_budget == 300]

    real = imitation._play
    monkeypatch.setattr(imitation, "_play", play)
    monkeypatch.setattr(imitation, "fit", lambda policy, steps, seed, weights: seen.update(w=weights) or 0.0)
    config = configuration.load(None, [f"home={tmp_path}"])
    imitation.imitate(config, ["never", "heuristic:parameter_budget=300"], episodes=2)
    quiet = TINY.epochs - 1  # decisions of one who never grows
    weights = seen["w"]
    assert weights[0] == pytest.approx(0.0, abs=1e-3)
    assert weights[quiet] == pytest.approx(2.0, abs=1e-3)
    assert weights[-1] == pytest.approx(0.0, abs=1e-3)


def test_a_teacher_that_there_is_not_is_refused_in_one_sentence():
    assert imitation.teacher("heuristic:seeds_at_once=1,latest_growth=0.4").settings.seeds_at_once == 1
    for told, why in (("nobody", "no controller"), ("heuristic:sense=1", "tamiyo"), ("heuristic:window=x", "tamiyo")):
        with pytest.raises(ConfigError, match=why):
            imitation.teacher(told)
