"""Promises of the whole system on Ray: a run ends in order, whoever else is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
import ray

from esper_ray.actors import crew
from esper_ray.actors.resources import NAMES
from esper_ray.config import Config
from esper_ray.contracts.enums import CommandType
from esper_ray.contracts.messages import AdaptationCommand, RollbackDirective
from esper_ray.errors import ConfigError, EnvironmentFault, EsperError, RunError
from esper_ray.runs import find
from esper_ray.runtime import Session
from esper_ray.tolaria import by_hand
from esper_ray.tolaria.forks import Fork
from tests.ray.conftest import progress, until, variant

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def in_the_middle(session: Session, run_id: str) -> None:
    """Wait until the run has finished an epoch and is still far from its end."""
    until(lambda: progress(session, run_id).get("epoch", 0) >= 1, what="the run trains")


def process_of(session: Session, name: str) -> int:
    return int(session.ask(name, "ping")["pid"])


def comes_back(session: Session, name: str, before: int) -> int:
    """Wait until another process answers for the actor; returns its id."""

    def other() -> int:
        try:
            pid = process_of(session, name)
        except (EsperError, ray.exceptions.RayError):
            return 0
        return pid if pid != before else 0

    return int(until(other, what=f"{name} is back"))


def ended_in_order(session: Session, run_id: str) -> dict[str, Any]:
    """Wait for the end; the folder must hold one row per epoch, in order, and the result."""
    final = session.wait(run_id)
    assert final["state"] == "finished"
    folder = session.config.runs / run_id
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == len(epochs) == session.config.run.epochs
    assert final["arms"][0]["result"]["test_accuracy"] == result["test_accuracy"]
    return final


def test_every_actor_is_there_by_its_name(system: Session) -> None:
    status = system.status()

    assert set(status["actors"]) == set(NAMES)
    assert {actor["state"] for actor in status["actors"].values()} == {"up"}
    assert status["redis"]["alive"]
    assert sorted(crew.present(system.config.ray.namespace)) == sorted(NAMES)


def test_starting_what_is_up_changes_nothing(system: Session) -> None:
    before = {name: process_of(system, name) for name in NAMES}

    system.up()

    assert {name: process_of(system, name) for name in NAMES} == before


@pytest.mark.parametrize("name", ["tamiyo", "nissa", "oona", "urza"])
def test_killing_an_actor_in_the_middle_does_not_stop_training(system: Session, name: str) -> None:
    run_id = system.submit(system.config)
    in_the_middle(system, run_id)
    trainer, victim = process_of(system, "tolaria"), process_of(system, name)

    os.kill(victim, signal.SIGKILL)

    comes_back(system, name, victim)
    final = ended_in_order(system, run_id)
    assert process_of(system, "tolaria") == trainer
    assert final["arms"][0]["attempts"] == 1


def test_an_actor_that_ray_gave_up_is_created_anew_and_counted(system: Session) -> None:
    before = process_of(system, "karn")

    crew.end(["karn"], system.config.ray.namespace)

    comes_back(system, "karn", before)
    karn = until(
        lambda: (found := system.status()["actors"]["karn"])["restarts"] >= 1 and found, what="the restart is counted"
    )
    assert karn["state"] == "up"
    alert = until(
        lambda: next((each for each in system.ask("nissa", "alerts") if each["id"] == "actor_restarted:karn"), None),
        what="the alert of it fires",
    )
    assert alert["condition"].startswith("karn ")


def test_a_run_goes_on_from_its_checkpoint_when_its_own_process_is_killed(system: Session) -> None:
    run_id = system.submit(system.config)
    in_the_middle(system, run_id)

    os.kill(process_of(system, "tolaria"), signal.SIGKILL)

    final = ended_in_order(system, run_id)
    assert final["arms"][0]["attempts"] == 2


def test_a_run_outlives_the_supervisor(system: Session) -> None:
    run_id = system.submit(system.config)
    in_the_middle(system, run_id)
    before = process_of(system, "supervisor")

    os.kill(before, signal.SIGKILL)

    comes_back(system, "supervisor", before)
    final = ended_in_order(system, run_id)
    assert final["arms"][0]["attempts"] == 1


def test_a_second_run_waits_in_the_queue_and_says_so_and_may_be_taken_back(system: Session) -> None:
    first = system.submit(variant(system.config, epochs=500))
    second = system.submit(system.config)
    status = system.run_status(second)
    assert (status["state"], status["position"]) == ("queued", 1)
    assert status["message"] == "waits in the queue at position 1"

    assert system.stop(second)["state"] == "stopped"
    in_the_middle(system, first)
    system.stop(first)

    assert system.wait(first)["state"] == "stopped"


def test_a_stopped_run_goes_on_where_it_stopped(system: Session) -> None:
    run_id = system.submit(system.config)
    in_the_middle(system, run_id)
    system.stop(run_id)
    assert system.wait(run_id)["state"] == "stopped"
    metrics = system.config.runs / run_id / "metrics.jsonl"
    done = metrics.read_text()

    assert system.submit(resume=run_id) == run_id

    ended_in_order(system, run_id)
    assert metrics.read_text().startswith(done)
    with pytest.raises(RunError, match="is finished"):
        system.submit(resume=run_id)


def test_a_users_mistake_inside_the_training_process_arrives_as_one(system: Session) -> None:
    with pytest.raises(EsperError, match="cuda"):
        system.wait(system.submit(variant(system.config, device="cuda")))


def test_actors_of_another_version_are_refused_with_the_remedy(
    system: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper_ray.runtime.build", lambda: "9.9.9+000000000000")

    with pytest.raises(EnvironmentFault, match="esper down"):
        system.up()


def test_another_configuration_of_the_system_is_refused_by_its_key(system: Session, small: Config) -> None:
    other = small.model_copy(update={"urza": small.urza.model_copy(update={"cache_mb": 3})})

    with pytest.raises(ConfigError, match=r"urza\.cache_mb"):
        Session(other, system.address, "", started=False).up()


def test_what_the_cluster_lacks_is_reported_and_not_waited_for(system: Session, small: Config) -> None:
    wish = small.ray.model_copy(update={"namespace": "other", "resources": {"tolaria": {"num_cpus": 64}}})

    with pytest.raises(EnvironmentFault, match=r"need 64\.9 CPU"):
        Session(small.model_copy(update={"ray": wish}), system.address, "", started=False).up()


def test_a_run_in_training_follows_a_persons_order_to_go_back_and_another_is_refused(system: Session) -> None:
    run_id = system.submit(system.config)
    in_the_middle(system, run_id)
    order = AdaptationCommand(
        5, CommandType.ROLLBACK, run_id, 0, time.time_ns(), "somebody", rollback=RollbackDirective(1)
    )

    system.order(run_id, order)

    ended_in_order(system, run_id)
    folder = system.config.runs / run_id
    (turn,) = [
        json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines() if "rollback/" in line
    ]
    assert (turn["to"], turn["branch"], turn["origin"], turn["how"]) == (1, 1, "somebody", "fast")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["branch"] for row in rows] == [0, *[1] * (len(rows) - 1)]
    with pytest.raises(RunError, match="not being trained"):
        system.order(run_id, order)


def test_a_person_lets_a_block_grow_and_a_fork_of_that_run_goes_on_otherwise(system: Session) -> None:
    tamiyo = system.config.tamiyo.model_copy(update={"controller": "never"})
    config = variant(system.config, keep_checkpoints=20).model_copy(update={"tamiyo": tamiyo})
    run_id = system.submit(config)
    in_the_middle(system, run_id)
    slots = by_hand.slots_of(find(config.runs, run_id).manifest)
    order = by_hand.command(
        by_hand.parse("grow 1 BP004"), slots, run=run_id, author="anna", now_ns=time.time_ns(), approved=(), why="so"
    )

    system.order(run_id, order)

    told = until(lambda: _told(system, run_id, order), what="the boundary carries it out")
    assert told["state"] == "done"
    ended_in_order(system, run_id)
    assert _decided(config, run_id) == [(told["epoch"], "anna", "GERMINATE", "BP004")]

    before = (config.runs / run_id / "result.json").read_bytes()
    fork_id = system.fork(Fork(run_id, told["epoch"], ("grow 0 BP002",), "bert"))
    ended_in_order(system, fork_id)
    assert _decided(config, fork_id) == [(told["epoch"], "bert", "GERMINATE", "BP002")]
    assert find(config.runs, fork_id).manifest["fork"]["parent"] == run_id
    assert (config.runs / run_id / "result.json").read_bytes() == before


def _told(session: Session, run_id: str, order: AdaptationCommand) -> dict[str, Any] | None:
    found: dict[str, Any] = progress(session, run_id).get("orders", {}).get(str(order.command_id), {})
    return found if found.get("state", "waiting") != "waiting" else None


def _decided(config: Config, run_id: str) -> list[tuple[int, str, str, str]]:
    """Epoch, author, operation and block of everything that was decided in a run."""
    rows = [json.loads(line) for line in (config.runs / run_id / "events.jsonl").read_text().splitlines()]
    return [
        (row["epoch"], row["controller"], command["operation"], command["blueprint"])
        for row in rows
        if row["kind"] == "decision"
        for command in row["commands"]
        if command["operation"] != "NO_OP"
    ]
