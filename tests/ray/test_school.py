"""The whole circle: a run tells its decisions, a policy learns from them, is promoted by a person, and decides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_ray.config import Config
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.learning import encode_policy_update
from esper_ray.errors import PolicyRefused
from esper_ray.oona.bus import publisher_where_up
from esper_ray.runtime import Session
from esper_ray.simic import offline, registry, validation
from esper_ray.simic.job import SENDER
from esper_ray.tamiyo import policy_store
from esper_ray.tamiyo.seat import HEURISTIC, POLICIES, promotions
from tests.ray.conftest import progress, until, variant

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def tuned(config: Config, run: dict[str, Any], **tamiyo: Any) -> Config:
    changed = variant(config, dataset="digits", host_width=4, boundary_every=6, batch_size=32, **run)
    return changed.model_copy(update={"tamiyo": config.tamiyo.model_copy(update={"warmup_epochs": 1, **tamiyo})})


def deciders(config: Config, run_id: str) -> list[str]:
    """Who decided, boundary by boundary, as the run's folder tells it."""
    lines = (config.runs / run_id / "events.jsonl").read_text().splitlines()
    return [row["controller"] for row in map(json.loads, lines) if row["kind"] == "decision"]


def published(config: Config, act: Callable[[registry.Publish], Any]) -> Any:
    """Do something that is told on the bus."""
    with publisher_where_up(config, SENDER) as publisher:
        assert publisher is not None
        return act(lambda kind, data: publisher.publish(kind, data))


def test_decisions_become_a_policy_and_the_policy_decides_once_it_is_promoted(system: Session) -> None:
    torch.set_num_threads(1)
    config = system.config
    explored = system.submit(tuned(config, {"epochs": 8}, exploration=0.5))
    system.wait(explored)
    found = until(
        lambda: next((row for row in system.ask("simic", "runs") if row["run"] == explored and row["complete"]), None),
        what="Simic has the whole run",
    )
    assert found["exploration"] == 0.5

    learned = offline.learn(config, runs=[explored], passes=5)
    assert learned.explored == 1
    with pytest.raises(PolicyRefused, match="not validated"):
        registry.promote(config.home, learned.policy_id, None)
    verdict = validation.validate(config, learned.policy_id, count=5, margin=1.0)
    assert verdict.passed, verdict.gates
    assert [gate.name for gate in verdict.gates] == ["loads", "masks", "chaos", "latency", "paired"]

    run_id = system.submit(tuned(config, {"epochs": 3000}))
    until(lambda: progress(system, run_id).get("epoch", 0) >= 3, what="the second run decides")
    published(config, lambda publish: registry.promote(config.home, learned.policy_id, publish))
    until(lambda: system.ask("tamiyo", "policy")["decides"] == learned.policy_id, what="Tamiyo takes the new policy")
    reached = progress(system, run_id)["epoch"]
    until(lambda: progress(system, run_id)["epoch"] >= reached + 3, what="the run goes on")
    system.stop(run_id)
    system.wait(run_id)
    who = deciders(config, run_id)
    assert who[0] == HEURISTIC
    assert who[-1] == learned.policy_id
    assert sorted(set(who), key=who.index) == [HEURISTIC, learned.policy_id]

    _a_damaged_policy_decides_nothing(system, learned.policy_id)

    # A process of its own: a command ends its connection to Ray, and this process needs its.
    command = [str(Path(sys.executable).parent / "esper"), "policy", "rollback", "--set", f"home={config.home}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert promotions(config.home)[-1].policy_id == HEURISTIC
    last = system.submit(tuned(config, {"epochs": 3}))
    system.wait(last)
    assert set(deciders(config, last)) == {HEURISTIC}


def _a_damaged_policy_decides_nothing(system: Session, good: str) -> None:
    """Promoted by hand past all checks, it is refused by Tamiyo with its reason, and the good one stays."""
    config = system.config
    policy, _ = policy_store.load(config.home, good)
    with torch.no_grad():
        policy.operation.bias.add_(1.0)
    bad = policy_store.save(config.home, policy, parent_id=good)
    file = config.home / POLICIES / bad / "policy.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    row = registry.find(config.home, bad)
    update = replace(promotions(config.home)[-1], policy_id=bad, parent_policy_id=good, artifact_digest=row.digest)
    published(config, lambda publish: publish(BusMessageType.POLICY_UPDATE, encode_policy_update(update)))
    until(lambda: system.ask("tamiyo", "policy")["refused"], what="Tamiyo refuses it")
    seat = system.ask("tamiyo", "policy")
    assert "digest" in seat["refused"]
    assert seat["decides"] == good
    heard = until(lambda: system.ask("nissa", "events", "", "", "policy.refused"), what="Nissa hears of the refusal")
    assert "damaged" in heard[0]["text"]
