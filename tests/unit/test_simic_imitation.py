"""A policy can begin as the heuristic, and a training can begin with it."""

from __future__ import annotations

import torch

from esper_ray import config as configuration
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
    policy_id, loss = imitation.imitate(config, "heuristic", episodes=2)
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
