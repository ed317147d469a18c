"""What may not decide is stopped at a gate that says why, and nothing is promoted without a passed validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.learning import decode_policy_update
from esper_ray.contracts.ports import RunOpening
from esper_ray.contracts.signing import load_keys
from esper_ray.errors import PolicyRefused
from esper_ray.simic import registry, validation
from esper_ray.tamiyo import policy_store
from esper_ray.tamiyo.controller import Tamiyo
from esper_ray.tamiyo.policy import GraphPolicy
from esper_ray.tamiyo.seat import HEURISTIC, PolicySeat, promotions


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.load(None, [f"home={tmp_path}"])


def policy(seed: int = 0) -> GraphPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GraphPolicy()


def passed(config: Config, policy_id: str) -> None:
    """As if it had been validated."""
    row = registry.find(config.home, policy_id)
    figures = {"difference": 0.1, "difference_low": 0.05, "difference_high": 0.15}
    verdict = {"digest": row.digest, "passed": True, "gates": [], "figures": figures, "incumbent": HEURISTIC}
    registry.note_validation(config.home, policy_id, verdict)


class Illegal(GraphPolicy):
    """Fossilises in slot 0, whatever the masks say."""

    def act(self, obs, *, generator, greedy=False):
        acted = super().act(obs, generator=generator, greedy=greedy)
        acted.actions[:] = torch.tensor([3, 0, 0, 0])
        return acted


class NotFinite(GraphPolicy):
    """Says NaN where a feature is at its limit."""

    def act(self, obs, *, generator, greedy=False):
        acted = super().act(obs, generator=generator, greedy=greedy)
        if (obs["global"].abs() >= 50).any():
            acted.values[:] = torch.nan
        return acted


def test_a_policy_that_ignores_the_masks_and_one_that_is_not_finite_on_absurd_inputs_fail_their_gates():
    assert validation.legal_gate("masks", policy().eval(), validation.ordinary(seed=1, count=20)).passed
    illegal = validation.legal_gate("masks", Illegal().eval(), validation.ordinary(seed=1, count=20))
    assert not illegal.passed
    assert "not legal" in illegal.reason
    assert validation.legal_gate("chaos", NotFinite().eval(), validation.ordinary(seed=1, count=5)).passed
    absurd = validation.legal_gate("chaos", NotFinite().eval(), validation.chaos(seed=2, count=5))
    assert not absurd.passed
    assert "finite" in absurd.reason


def test_a_policy_that_takes_too_long_fails_with_its_time():
    gate = validation.latency_gate(policy().eval(), limit=0.0)
    assert not gate.passed
    assert gate.figures["latency_ms"] > 0.0


def test_a_damaged_policy_stops_at_the_first_gate_and_the_verdict_is_kept(config):
    policy_id = policy_store.save(config.home, policy())
    file = config.home / "policies" / policy_id / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    verdict = validation.validate(config, policy_id, count=5, margin=0.01)
    assert [(gate.name, gate.passed) for gate in verdict.gates] == [("loads", False)]
    assert not registry.find(config.home, policy_id).validation["passed"]
    with pytest.raises(PolicyRefused, match="loads"):
        registry.promote(config.home, policy_id, None)


def test_a_policy_much_worse_than_the_heuristic_does_not_pass_the_paired_gate(config, monkeypatch):
    from esper_ray.simic import comparison

    class Result:
        def __init__(self, reward: float) -> None:
            self.reward = reward

    def play(_config, brain, number):
        return Result(0.5 + 0.01 * (number % 3) - (0.2 if brain.version.startswith("policy") else 0.0))

    monkeypatch.setattr(comparison, "play", play)
    policy_id = policy_store.save(config.home, policy())
    gate = validation.paired_gate(config, policy_id, 6, 0.01, lambda _done, _of: None)
    assert not gate.passed
    assert gate.figures["difference"] == pytest.approx(-0.2)
    assert validation.paired_gate(config, policy_id, 6, 0.3, lambda _done, _of: None).passed


def test_promotion_wants_a_passed_validation_of_the_artifact_as_it_is_and_rollback_goes_back_step_by_step(config):
    first, second = (policy_store.save(config.home, policy(seed)) for seed in (1, 2))
    told: list[bytes] = []

    def publish(kind: BusMessageType, data: bytes) -> None:
        assert kind is BusMessageType.POLICY_UPDATE
        told.append(data)

    with pytest.raises(PolicyRefused, match="not validated"):
        registry.promote(config.home, first, publish)
    with pytest.raises(PolicyRefused, match="the heuristic decides"):
        registry.rollback(config.home, publish)
    for each in (first, second):
        passed(config, each)
        registry.promote(config.home, each, publish)
    with pytest.raises(PolicyRefused, match="already"):
        registry.promote(config.home, second, publish)
    card = config.home / "policies" / first / "policy.json"
    assert registry.rollback(config.home, publish).policy_id == first
    assert registry.rollback(config.home, publish).policy_id == HEURISTIC
    assert [decode_policy_update(data).policy_id for data in told] == [first, second, first, HEURISTIC]
    changed = json.loads(card.read_text()) | {"digest": "0" * 64}
    card.write_text(json.dumps(changed))
    with pytest.raises(PolicyRefused, match="changed since"):
        registry.promote(config.home, first, publish)
    with pytest.raises(PolicyRefused, match="Did you mean"):
        registry.find(config.home, first[:-1] + "?")


def test_a_restarted_tamiyo_goes_on_with_the_promoted_policy_and_with_the_heuristic_where_it_is_damaged(config):
    policy_id = policy_store.save(config.home, policy(3))
    passed(config, policy_id)
    registry.promote(config.home, policy_id, None)
    seat = PolicySeat(config.home)
    assert seat.describe()["decides"] == policy_id
    assert promotions(config.home)[-1].policy_id == policy_id
    (config.home / "policies" / policy_id / "policy.safetensors").write_bytes(b"")
    seat = PolicySeat(config.home)
    assert seat.describe()["decides"] == HEURISTIC
    assert "digest" in seat.refused


def test_a_run_that_wants_a_learned_policy_is_refused_where_there_is_none(config):
    tamiyo = Tamiyo(load_keys(config.home / "k"), journal=config.home / "t.db", home=config.home)
    opening = RunOpening("r", 1, (), (), "learned", 5, host_parameters=1, max_parameters=10)
    with pytest.raises(PolicyRefused, match="esper policy promote"):
        tamiyo.open_run(opening)
    with pytest.raises(PolicyRefused, match="no policy's id"):
        policy_store.load(config.home, "../escape")
