"""From a run's decisions over the bus to a policy that learned from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import Config
from esper_ray.contracts import learning
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.errors import RunError
from esper_ray.simic import offline, reward, trajectories
from esper_ray.simic.experience import Experience
from esper_ray.simic.reward import RewardConfig
from esper_ray.tamiyo.actions import GERMINATE, Choice, Masks
from esper_ray.tolaria.trainer import RunRequest, Trainer


@dataclass
class Ear:
    """A publisher whose messages go to Simic, each twice, as a bus may deliver them."""

    experience: Experience
    sent: list[EventEnvelope] = field(default_factory=list)

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.NORMAL,
        event_id: bytes | None = None,
    ) -> None:
        del priority
        envelope = EventEnvelope(event_id or len(self.sent).to_bytes(8, "big"), type, "test", 0, payload, type.name)
        self.sent.append(envelope)
        for _ in range(2):
            self.experience.handle(envelope)


def config_at(home: Path, *settings: str) -> Config:
    common = ["run.dataset=digits", "run.mode=lockstep", "run.epochs=8", "run.boundary_every=6", "run.host_width=4"]
    common += ["run.batch_size=32", "run.threads=1", "tamiyo.warmup_epochs=1", "forge.compile=never"]
    common += ["tamiyo.grow_by=0.25"]
    return configuration.load(None, [f"home={home}", *common, *settings])


def record(config: Config, name: str) -> Ear:
    """One recorded run."""
    experience = Experience.of(config.home)
    ear = Ear(experience)
    Trainer(RunRequest(name, config), inprocess.surroundings(config, publisher=ear)).run()
    experience.close()
    return ear


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with three runs: two that explored, and one that did not."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("home")
    for number in (1, 2):
        record(config_at(folder, f"run.seed={number}", "tamiyo.exploration=0.5"), f"explored-{number}")
    record(config_at(folder, "run.seed=3"), "certain")
    return folder


def test_every_decision_of_a_run_is_kept_once_and_its_end_is_known(home):
    experience = Experience.of(home)
    assert experience.runs() == ["explored-1", "explored-2", "certain"]
    for run in experience.runs():
        decisions = experience.decisions(run)
        assert [record.terminal for record in decisions] == [False] * (len(decisions) - 1) + [True]
        places = [(record.epoch, record.place) for record in decisions[:-1]]
        assert len(set(places)) == len(places)
        assert {epoch for epoch, _ in places} == set(range(1, 9))
        summary = experience.summary(run)
        assert summary.complete
        assert summary.exploration == (0.0 if run == "certain" else 0.5)
        germinations = [r for r in decisions if r.heads and r.heads[0].choice == GERMINATE]
        assert summary.reports <= len(germinations)
    experience.close()


def test_a_trajectory_has_only_legal_actions_and_the_reward_that_its_observations_tell(home):
    rewards = RewardConfig()
    gathered = trajectories.gather(home, rewards)
    assert len(gathered.trajectories) == 3
    for each in gathered.trajectories:
        assert len(each.observations) == len(each) + 1
        for action, seen in zip(each.actions, each.observations, strict=False):
            legal = Masks(seen["mask_operation"], seen["mask_slot"], seen["mask_blueprint"])
            assert legal.allows(Choice(*action.tolist()))
        accuracy, parameters, compute = trajectories.figures_of(each.observations[-1])
        worth = reward.terminal(accuracy, parameters, compute, rewards)
        first = reward.potential(trajectories.figures_of(each.observations[0])[0], rewards)
        assert float(each.rewards.sum()) == pytest.approx(worth - first, abs=1e-5)
        assert (each.log_probs <= 0).all()
        assert parameters >= 1.0
        assert compute >= 1.0


def test_trajectories_of_unequal_length_share_a_batch_and_padding_is_not_valid(home):
    known = trajectories.gather(home, RewardConfig()).trajectories
    steps, room = max(map(len, known)) + 3, trajectories.room_for(known)
    batch = trajectories.side_by_side([trajectories.item(each, steps, room) for each in known])
    assert batch.valid.sum() == sum(map(len, known))
    assert batch.obs["slots"].shape[:2] == (steps + 1, len(known))
    for place, each in enumerate(known):
        assert batch.terminated[len(each) - 1 :, place].all()
        assert not batch.terminated[: len(each) - 1, place].any()


def test_a_run_that_is_not_over_or_lost_an_observation_is_left_out_with_its_reason(home, tmp_path):
    config = config_at(tmp_path, "run.seed=4")
    ear = record(config, "whole")
    other = Experience.of(tmp_path / "unfinished")
    for envelope in ear.sent:
        if envelope.type is BusMessageType.DECISION_RECORD and not learning.decode_decision(envelope.payload).terminal:
            other.handle(envelope)
    other.close()
    assert trajectories.gather(tmp_path / "unfinished", RewardConfig()).left_out == {"not finished": 1}
    next((tmp_path / "observations").rglob("*.safetensors")).unlink()
    assert trajectories.gather(tmp_path, RewardConfig()).left_out == {"an observation is lost or damaged": 1}
    with pytest.raises(RunError, match="nowhere"):
        trajectories.gather(home, RewardConfig(), ["nowhere"])
    with pytest.raises(RunError, match="nothing to learn from"):
        offline.learn(configuration.load(None, [f"home={tmp_path}"]))


def test_offline_learning_imitates_then_improves_within_its_bound_and_says_where_it_comes_from(home):
    config = configuration.load(None, [f"home={home}"])
    found = offline.learn(config, passes=12, seed=1)
    assert found.trajectories == 3
    assert found.explored == 2
    # Uniform over what is legal would cost more than this; the loss of an untrained policy is above 2.
    assert found.imitation_loss < 1.5
    assert 0.0 < found.divergence < 4 * offline.KL_BOUND
    assert 1.0 <= found.effective_sample_size <= 2.0
    from esper_ray.simic import registry
    from esper_ray.tamiyo import policy_store

    row = registry.find(home, found.policy_id)
    assert row.summary["runs"] == ["explored-1", "explored-2", "certain"]
    policy, _ = policy_store.load(home, found.policy_id)
    assert all(bool(torch.isfinite(each).all()) for each in policy.parameters())
    again = offline.learn(config, start_from=found.policy_id, passes=2)
    assert registry.find(home, again.policy_id).parent_id == found.policy_id
    assert math.isnan(again.imitation_loss)
    assert np.isfinite(again.divergence)
