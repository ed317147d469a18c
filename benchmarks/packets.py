"""Records what a demo run sends: what the contracts are tested and measured on.

    python -m benchmarks.packets tests/golden/demo.jsonl.gz             # a system of its own on Ray, with the controls
    python -m benchmarks.packets --here tests/golden/demo.jsonl.gz      # one process, without Ray and the bus

Does the demo in its fast form: some minutes. With Ray it reads the bus beside the others while the demo trains;
without, it takes what the training and Tamiyo hand to their sender. The gates' verdicts come from the runs' journals. A
person's warning is sent in the middle, so that an emergency is among the messages. Envelopes are left out, with the key
names, nonces and signatures that they hold. Beside the recording it writes what some of its messages say, in words that
a person can check.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.recording import MEANING, Packet, describe, save
from esper_ray import inprocess, runs
from esper_ray.cli.app import with_flags
from esper_ray.config import Config
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CommandType, EmergencyLevel, MessagePriority
from esper_ray.contracts.messages import AdaptationCommand, EmergencyDirective, EventEnvelope
from esper_ray.contracts.signing import Signer
from esper_ray.oona.bus import connect_consumer
from esper_ray.oona.streams import KINDS, STREAMS
from esper_ray.reliability.ids import new_event_id
from esper_ray.reliability.journal import Journal
from esper_ray.runtime import Session, connect
from esper_ray.tolaria.trainer import RunRequest, Trainer

GATE = "GateEvent"
_DRAIN_SECONDS = 5.0
_WARNED_AFTER = 2


class Tape:
    """Takes down every message once: as a reader of the bus, or as the sender of a run without one."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []
        self.newest = time.monotonic()
        self._seen: set[bytes] = set()
        self._lock = threading.Lock()

    def handle(self, envelope: EventEnvelope) -> None:
        self._take(envelope.event_id, envelope.type, envelope.priority, envelope.payload)

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.NORMAL,
        event_id: bytes | None = None,
    ) -> None:
        self._take(event_id or new_event_id(), type, priority, payload)

    def _take(self, event_id: bytes, type: BusMessageType, priority: MessagePriority, payload: bytes) -> None:
        with self._lock:
            if event_id not in self._seen:
                self._seen.add(event_id)
                self.newest = time.monotonic()
                self.packets.append(Packet(KINDS[type].payload_type, type, priority, payload))


def record(config: Config) -> list[Packet]:
    """Do the demo on Ray, alone and then with its controls, and return what it sent."""
    tape = Tape()
    with connect(config, say=common.console.print) as session:
        session.up()
        consumer = connect_consumer(config, "recording", STREAMS, tape.handle)
        consumer.start()
        # In a new home the first run has no blocks yet; the second grows.
        session.wait(session.submit(config))
        while (forge := session.ask("tezzeret", "progress"))["done"] < forge["total"]:
            time.sleep(0.5)
        run, warned = session.submit(config, compare=True), False
        for status in session.watch(run):
            warned = warned or _warn(session, status)
        while time.monotonic() - tape.newest < _DRAIN_SECONDS:
            time.sleep(0.2)
        consumer.stop()
    return [*tape.packets, *gates(config)]


def record_here(config: Config) -> list[Packet]:
    """Do the demo's grown run in this process, and return what it sent."""
    tape, run, epoch, warned = Tape(), "glyphs-0demo1", 0, False

    def note(progress: dict[str, Any]) -> None:
        nonlocal epoch
        epoch = progress.get("epoch", epoch)

    def orders() -> Sequence[bytes]:
        nonlocal warned
        if warned or epoch < _WARNED_AFTER:
            return ()
        warned = True
        signer = Signer(around.keys, "operator")
        data = codec.encode_command(warning(run))
        return (signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand"),)

    around = replace(inprocess.surroundings(config, publisher=tape), orders=orders, on_progress=note)
    Trainer(RunRequest(run, config), around).run()
    return [*tape.packets, *gates(config)]


def _warn(session: Session, status: dict[str, Any]) -> bool:
    """A person warns the run that has trained for some epochs; whether that was done."""
    for arm in status["arms"]:
        progress = arm["progress"] or {}
        if progress.get("state") == "training" and progress.get("epoch", 0) >= _WARNED_AFTER:
            session.order(arm["run_id"], warning(arm["run_id"]))
            return True
    return False


def warning(run: str) -> AdaptationCommand:
    return AdaptationCommand(
        command_id=1,
        type=CommandType.EMERGENCY,
        run=run,
        epoch=0,
        issued_at_ns=time.time_ns(),
        issued_by="operator",
        emergency=EmergencyDirective(EmergencyLevel.NOTICE, "a drill while packets are recorded"),
    )


def gates(config: Config) -> list[Packet]:
    """The gates' verdicts, from the journals of this home's runs."""
    found = []
    for run in runs.every(config.runs):
        journal = Journal(run.path / "journal.db", sync=False)
        found += [
            Packet(GATE, BusMessageType.UNSPECIFIED, MessagePriority.NORMAL, entry.payload)
            for entry in journal.read("gates")
        ]
        journal.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--here", action="store_true", help="in this process, without Ray and the bus")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        config = with_flags(None, [f"home={home}", "ray.namespace=recording", "nissa.port=0"], fast=True, live=None)
        packets = record_here(config) if given.here else record(config)
    save(packets, given.file)
    given.file.with_name(MEANING.name).write_text(json.dumps(describe(packets), indent=1) + "\n")
    for kind, count in sorted(Counter(each.kind for each in packets).items()):
        common.console.print(f"{kind}  {count}")


if __name__ == "__main__":
    main()
