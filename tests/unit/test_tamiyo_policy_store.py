"""A stored policy comes back as it was, or is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from esper_ray.contracts.messages import PolicyUpdate
from esper_ray.errors import PolicyRefused
from esper_ray.tamiyo import graph, policy_store
from esper_ray.tamiyo.graph import Layout
from esper_ray.tamiyo.policy import GraphPolicy, GraphPolicyConfig
from esper_ray.tamiyo.seat import PolicySeat

CONFIG = GraphPolicyConfig(width=8, heads=2)


def policy(seed: int = 0) -> GraphPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GraphPolicy(CONFIG)


def folder_of(home: Path, policy_id: str) -> Path:
    return home / "policies" / policy_id


def card_of(home: Path, policy_id: str) -> dict[str, object]:
    return json.loads((folder_of(home, policy_id) / "policy.json").read_text())


def rewrite(home: Path, policy_id: str, **changes: object) -> None:
    card = {**card_of(home, policy_id), **changes}
    (folder_of(home, policy_id) / "policy.json").write_text(json.dumps(card))


def reason_of(home: Path, policy_id: str) -> str:
    with pytest.raises(PolicyRefused) as refusal:
        policy_store.load(home, policy_id)
    assert policy_id in str(refusal.value)
    return refusal.value.reason


def test_a_policy_comes_back_with_its_weights_its_network_and_its_lineage(tmp_path):
    made = policy()
    policy_id = policy_store.save(tmp_path, made, parent_id="policy-before", training={"algo": "ppo", "steps": 100})
    found, metadata = policy_store.load(tmp_path, policy_id)
    assert found.config == CONFIG
    assert not found.training
    assert {name: tensor.tolist() for name, tensor in found.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in made.state_dict().items()
    }
    assert metadata.policy_id == policy_id
    assert metadata.parent_id == "policy-before"
    assert metadata.training == {"algo": "ppo", "steps": 100}
    assert metadata.features == graph.FEATURES_DIGEST
    assert policy_id.endswith(metadata.digest[:12])


def test_it_decides_as_before(tmp_path):
    made = policy()
    found, _ = policy_store.load(tmp_path, policy_store.save(tmp_path, made))
    random = np.random.default_rng(0)
    batch = {
        name: torch.from_numpy(
            np.zeros((1, *shape), kind) if kind is not np.float32 else random.random((1, *shape), kind)
        )
        for name, (shape, kind, _, _) in graph.shapes(Layout(3, 2, 4, 2)).items()
    }
    first, second = (each.act(batch, generator=torch.Generator().manual_seed(1)) for each in (made, found))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.log_probs, second.log_probs)


def test_the_id_names_the_content(tmp_path):
    first = policy_store.save(tmp_path, policy(0), training={"steps": 1})
    assert policy_store.save(tmp_path / "elsewhere", policy(0), training={"steps": 2}) == first
    assert policy_store.save(tmp_path, policy(1)) != first


def test_nothing_in_the_folder_is_a_pickle(tmp_path):
    folder = folder_of(tmp_path, policy_store.save(tmp_path, policy()))
    assert {file.name for file in folder.iterdir()} == {"policy.json", "policy.safetensors"}
    assert safetensors.torch.load((folder / "policy.safetensors").read_bytes()).keys() == policy().state_dict().keys()


@pytest.mark.parametrize("place", [9, 5000, -1])
def test_altered_weights_are_refused_as_damaged(tmp_path, place):
    policy_id = policy_store.save(tmp_path, policy())
    file = folder_of(tmp_path, policy_id) / "policy.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))
    assert reason_of(tmp_path, policy_id) == "damaged"


@pytest.mark.parametrize("kept", [0, 100])
def test_cut_off_weights_are_refused_as_damaged(tmp_path, kept):
    policy_id = policy_store.save(tmp_path, policy())
    file = folder_of(tmp_path, policy_id) / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert reason_of(tmp_path, policy_id) == "damaged"


def test_lost_weights_are_refused_as_damaged(tmp_path):
    policy_id = policy_store.save(tmp_path, policy())
    (folder_of(tmp_path, policy_id) / "policy.safetensors").unlink()
    assert reason_of(tmp_path, policy_id) == "damaged"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', "\x00\x01"])
def test_a_card_that_cannot_be_read_is_refused_as_damaged(tmp_path, text):
    policy_id = policy_store.save(tmp_path, policy())
    (folder_of(tmp_path, policy_id) / "policy.json").write_text(text)
    assert reason_of(tmp_path, policy_id) == "damaged"


@pytest.mark.parametrize("changes", [{"network": {"width": 16, "heads": 2}}, {"digest": "0" * 64}, {"digest": 7}])
def test_an_altered_card_is_refused_as_damaged(tmp_path, changes):
    policy_id = policy_store.save(tmp_path, policy())
    rewrite(tmp_path, policy_id, **changes)
    assert reason_of(tmp_path, policy_id) == "damaged"


def test_another_policys_files_under_this_id_are_refused_as_damaged(tmp_path):
    ours, other = (policy_store.save(tmp_path, policy(seed)) for seed in (0, 1))
    for file in folder_of(tmp_path, other).iterdir():
        (folder_of(tmp_path, ours) / file.name).write_bytes(file.read_bytes())
    assert reason_of(tmp_path, ours) == "damaged"


@pytest.mark.parametrize("changes", [{"format": 99}, {"features": "0" * 16}])
def test_another_format_or_other_features_are_refused_as_foreign(tmp_path, changes):
    policy_id = policy_store.save(tmp_path, policy())
    rewrite(tmp_path, policy_id, **changes)
    assert reason_of(tmp_path, policy_id) == "foreign"


def test_a_policy_of_another_version_of_the_features_is_refused_as_foreign(tmp_path, monkeypatch):
    monkeypatch.setattr(policy_store, "FEATURES_DIGEST", "before")
    policy_id = policy_store.save(tmp_path, policy())
    monkeypatch.undo()
    assert reason_of(tmp_path, policy_id) == "foreign"


def test_weights_of_another_network_are_refused_as_foreign(tmp_path):
    made = policy()
    made.config = GraphPolicyConfig(width=16, heads=2)
    assert reason_of(tmp_path, policy_store.save(tmp_path, made)) == "foreign"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_when_saved_and_when_loaded(tmp_path, monkeypatch, value):
    made = policy()
    with torch.no_grad():
        made.outlook.bias[0] = value
    with pytest.raises(PolicyRefused) as refusal:
        policy_store.save(tmp_path, made)
    assert refusal.value.reason == "not_finite"
    monkeypatch.setattr(policy_store, "_demand_finite", lambda *_: None)
    policy_id = policy_store.save(tmp_path, made)
    monkeypatch.undo()
    assert reason_of(tmp_path, policy_id) == "not_finite"


@pytest.mark.parametrize("name", ["policy-000000000000", "../policies", "a/b"])
def test_a_policy_that_is_not_there_is_refused_as_missing(tmp_path, name):
    policy_store.save(tmp_path, policy())
    assert reason_of(tmp_path, name) == "missing"


def test_a_promotion_that_comes_after_a_later_one_changes_nothing(tmp_path):
    old, new = (policy_store.save(tmp_path, policy(seed), training={"algo": "ppo"}) for seed in (0, 1))
    seat = PolicySeat(tmp_path)
    for policy_id, issued in ((new, 200), (old, 100), (new, 200)):
        seat.offer(PolicyUpdate(policy_id, "", policy_store.load(tmp_path, policy_id)[1].digest, issued), ())
        seat.take_over()
        assert seat.describe()["decides"] == new
    seat.offer(PolicyUpdate("heuristic", "", "", 150), ())
    seat.take_over()
    assert seat.describe()["decides"] == new
