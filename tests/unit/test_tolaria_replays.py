"""A command is followed once: also by a run that was killed after it had followed it, and was resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CommandType, EmergencyLevel
from esper_ray.contracts.messages import AdaptationCommand, EmergencyDirective
from esper_ray.contracts.signing import Signer
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests.tiny_runs import SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_order_that_is_sent_again_after_a_restart_is_refused_by_its_nonce(tmp_path) -> None:
    config = configuration.load(None, [f"home={tmp_path}", "run.epochs=4", "run.mode=lockstep", *SETTINGS])
    waiting = list[bytes]()

    def orders():
        given, waiting[:] = list(waiting), []
        return given

    def start(*, resume: bool) -> Trainer:
        around = replace(inprocess.surroundings(config), orders=orders)
        trainer = Trainer(RunRequest("r", config, resume=resume), around)
        trainer.open()
        return trainer

    def lines(name: str) -> list[str]:
        file = tmp_path / "runs" / "r" / name
        return file.read_text().splitlines() if file.exists() else []

    trainer = start(resume=False)
    emergency = EmergencyDirective(EmergencyLevel.ELEVATED, "smoke")
    now = trainer.around.clock.now_ns()
    command = AdaptationCommand(1, CommandType.EMERGENCY, "r", 0, now, "operator", emergency=emergency)
    signer = Signer(trainer.around.keys, "operator")
    order = signer.seal(
        codec.encode_command(command), BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand"
    )
    waiting.append(order)
    trainer.one_epoch()
    told = [line for line in lines("incidents.jsonl") if "smoke" in line]
    assert len(told) == 1
    # What a kill leaves: the journals' files, and nothing that was only in memory.
    del trainer

    again = start(resume=True)
    waiting.append(order)
    again.one_epoch()

    assert [line for line in lines("incidents.jsonl") if "smoke" in line] == told
    reasons = [json.loads(line)["reason"] for line in lines("events.jsonl") if "refusal" in line]
    assert any(reason.startswith("nonce_replayed") for reason in reasons)
    again.close()


def test_an_order_of_another_type_is_refused_and_not_followed(tmp_path) -> None:
    config = configuration.load(None, [f"home={tmp_path}", "run.epochs=4", "run.mode=lockstep", *SETTINGS])
    waiting = list[bytes]()
    trainer = Trainer(
        RunRequest("r", config),
        replace(inprocess.surroundings(config), orders=lambda: [waiting.pop()] if waiting else []),
    )
    trainer.open()
    emergency = EmergencyDirective(EmergencyLevel.ELEVATED, "smoke")
    now = trainer.around.clock.now_ns()
    command = AdaptationCommand(1, CommandType.EMERGENCY, "r", 0, now, "operator", emergency=emergency)
    signer = Signer(trainer.around.keys, "operator")
    waiting.append(signer.seal(codec.encode_command(command), BusMessageType.ALERT, payload_type="TelemetryPacket"))
    trainer.one_epoch()

    folder = tmp_path / "runs" / "r"
    reasons = [
        json.loads(line)["reason"] for line in (folder / "events.jsonl").read_text().splitlines() if "refusal" in line
    ]
    assert any(reason.startswith("wrong_type") for reason in reasons)
    assert not (folder / "incidents.jsonl").exists()
    trainer.close()
