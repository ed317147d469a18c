"""Kills and freezes everything around the bus at random while numbered messages flow, and then counts.

Two senders, two readers that share a group, the reader of a second group, the bus's keeper and Redis are processes of
their own. A round picks one to three of them; each is killed (SIGKILL) and started again, or frozen (SIGSTOP) for a
while. A sender notes a number as promised only when `flush` has returned True. Every hundredth message fails whatever
reads it. What must hold at the end, for each group of readers:

- ``lost``: promised messages with neither an effect nor a dead letter, 0.
- ``repeated``: messages with more than one effect, promised or not, 0.
- ``dead_missing``: failing messages that are promised and no dead letters, 0. ``dead_wrong``: dead letters of messages
  that had an effect in every group or never failed, 0; what was put aside because its readers died is replayed first.
- ``overtaken``: ordinary messages that a reader took before emergencies that waited beside them, and emergencies out
  of their order, 0; looked at in a calm moment after each third of the rounds.

An effect is an entry of the reader's journal under the message's event id, as on the real path. The seed decides who
is hit, how and for how long, not how the machine runs the processes: a second run hits other moments.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks import common
from benchmarks.common import Bar
from esper_ray.config import Config, build
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.oona.bus import connect_consumer, connect_keeper, connect_publisher, connect_transport
from esper_ray.oona.server import ManagedRedis
from esper_ray.oona.streams import EMERGENCY, NORMAL, TELEMETRY
from esper_ray.oona.transport import BusAway
from esper_ray.reliability.journal import Journal

BARS = tuple(Bar(key, 0) for key in ("lost", "repeated", "dead_missing", "dead_wrong", "overtaken"))
SENDERS = ("sender-a", "sender-b")
READERS = {"reader-a": "first", "reader-b": "first", "reader-c": "second"}
GROUPS = tuple(dict.fromkeys(READERS.values()))
STREAMS = (EMERGENCY, NORMAL, TELEMETRY)
CALM = "calm"
REPORT, SIGNAL = BusMessageType.FIELD_REPORT, BusMessageType.EMERGENCY_SIGNAL
_FAILS_EACH, _URGENT_EACH = 100, 20
_BATCH, _PACE_SECONDS = 50, 0.1
_DRAIN_SECONDS = 120.0
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["benchmarks.common", "esper_ray.oona.bus"])


def fails(payload: bytes) -> bool:
    """Whether this message is one that nobody can use."""
    name, _, number = payload.partition(b":")
    return name != CALM.encode() and int(number) % _FAILS_EACH == 0


def _begin(tree: dict[str, Any]) -> Config:
    # Lost connections and failing messages are what is asked for here: nobody needs to be told of each.
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return build(tree)


def _abandoned() -> bool:
    """Whether the process that strikes has died."""
    parent = multiprocessing.parent_process()
    return parent is None or not parent.is_alive()


def send(tree: dict[str, Any], name: str) -> None:
    """A sender: numbers go on where its predecessor began its last batch, none is used twice."""
    config = _begin(tree)
    folder, stop = config.home, config.home / "stop"
    begun, promised = folder / f"{name}.begun", folder / f"{name}.promised"
    number = int(begun.read_text().split()[-1]) if begun.exists() else 1
    sender, pause = connect_publisher(config, name), threading.Event()
    while not stop.exists() and not _abandoned():
        _note(begun, number + _BATCH)
        for each in range(number, number + _BATCH):
            urgent = each % _URGENT_EACH == 7
            priority = MessagePriority.CRITICAL if urgent else MessagePriority.NORMAL
            sender.publish(SIGNAL if urgent else REPORT, f"{name}:{each}".encode(), priority=priority)
        if not sender.flush(_DRAIN_SECONDS):
            raise RuntimeError(f"{name} could neither send nor keep its messages")
        _note(promised, number)
        number += _BATCH
        pause.wait(_PACE_SECONDS)
    # A message is its sender's care until all readers have acknowledged it: a Redis that was killed may not have it.
    while (not sender.flush(1.0) or sender.unsettled) and not _abandoned():
        pause.wait(_PACE_SECONDS)
    sender.close()


def _note(path: Path, number: int) -> None:
    with path.open("a") as file:
        file.write(f"{number}\n")


def read(tree: dict[str, Any], name: str) -> None:
    """A reader, until it is killed."""
    config, group = _begin(tree), READERS[name]
    journal = Journal(effects_of(config.home, group), sync=False)

    def handle(envelope: EventEnvelope) -> None:
        if envelope.type not in (REPORT, SIGNAL):
            return
        if fails(envelope.payload):
            raise RuntimeError("nobody can use this message")
        journal.append("effects", envelope.payload, key=envelope.event_id.hex())

    connect_consumer(config, group, STREAMS, handle).start()
    pause = threading.Event()
    while not _abandoned():
        pause.wait(1.0)


def keep(tree: dict[str, Any], _: str) -> None:
    """The bus's keeper, until it is killed."""
    keeper, pause = connect_keeper(_begin(tree)), threading.Event()
    while not pause.wait(0.1) and not _abandoned():
        with contextlib.suppress(BusAway):
            keeper.round()


def effects_of(home: Path, group: str) -> Path:
    return home / f"{group}.db"


ROLES: dict[str, Callable[[dict[str, Any], str], None]] = {
    **dict.fromkeys(SENDERS, send),
    **dict.fromkeys(READERS, read),
    "keeper": keep,
}


@dataclass(slots=True)
class World:
    """All processes of one bus."""

    config: Config
    server: ManagedRedis
    processes: dict[str, Any] = field(default_factory=dict)

    def start(self, name: str) -> None:
        process = _PROCESSES.Process(
            target=ROLES[name], args=(self.config.model_dump(mode="json"), name), name=name, daemon=True
        )
        process.start()
        self.processes[name] = process

    def pid(self, name: str) -> int:
        pid = self.server.pid if name == "redis" else self.processes[name].pid
        assert pid is not None, f"{name} was started"
        return int(pid)

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)
        if name != "redis":
            self.processes[name].join()

    def revive(self, name: str) -> None:
        if name == "redis":
            self.server.stop()
            self.server.start()
        else:
            self.start(name)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self.server.stop()


@contextlib.contextmanager
def world(home: Path) -> Iterator[World]:
    """Redis and all processes, up; at the end none of them is left."""
    bus = {"breaker_seconds": 0.2, "claim_seconds": 0.5}
    server = ManagedRedis(home)
    made = World(build({"home": str(home), "bus": {**bus, "redis_url": ""}}), server)
    server.start()
    try:
        with contextlib.closing(connect_transport(made.config)) as transport:
            for group in GROUPS:  # a group is owed what is sent once it is there
                transport.ensure_group(group, STREAMS)
        for name in ROLES:
            made.start(name)
        yield made
    finally:
        made.end()


def strike(made: World, dice: random.Random) -> Counter[str]:
    """One round: hit, wait, mend. Returns what was done."""
    done: Counter[str] = Counter()
    victims = dice.sample(("redis", *ROLES), dice.randint(1, 3))
    deeds = {name: dice.choice(("killed", "frozen")) for name in victims}
    pause = threading.Event()
    pause.wait(dice.uniform(0.0, 0.2))
    for name, deed in deeds.items():
        if deed == "killed":
            made.kill(name)
        else:
            os.kill(made.pid(name), signal.SIGSTOP)
        done[f"{deed}.{name.partition('-')[0]}"] += 1
    pause.wait(dice.uniform(0.0, 0.6))
    for name, deed in deeds.items():
        if deed == "killed":
            made.revive(name)
        else:
            os.kill(made.pid(name), signal.SIGCONT)
    return done


def effects(home: Path, group: str, source: str = "") -> list[bytes]:
    """The payloads that had an effect, in its order."""
    journal = Journal(effects_of(home, group), sync=False)
    try:
        found = [entry.payload for entry in journal.read("effects")]
    finally:
        journal.close()
    return [payload for payload in found if payload.startswith(source.encode())]


def promised(home: Path) -> set[bytes]:
    """The messages whose senders were told that they are safe."""
    found = set()
    for name in SENDERS:
        file = home / f"{name}.promised"
        for first in map(int, file.read_text().split() if file.exists() else ()):
            found |= {f"{name}:{number}".encode() for number in range(first, first + _BATCH)}
    return found


def dead(config: Config) -> list[tuple[str, str, str, bytes]]:
    """The dead letters of numbered messages: stream, id, group, payload."""
    transport, found = connect_transport(config), []
    for stream in STREAMS:
        after = ""
        while page := transport.dead_letters(stream, count=500, after=after):
            after = page[-1].id
            opened = [(one, codec.decode_envelope(one.data)) for one in page]
            # What a sender says about itself is telemetry, which nothing is promised for.
            found += [(stream, one.id, one.group, it.payload) for one, it in opened if it.type in (REPORT, SIGNAL)]
    transport.close()
    return found


def replay(config: Config) -> int:
    """Send what was put aside only because its readers died; returns how many."""
    transport = connect_transport(config)
    innocent = [(stream, id) for stream, id, _, payload in dead(config) if not fails(payload)]
    for stream, id in innocent:
        transport.revive(stream, id)
    transport.close()
    return len(innocent)


def wait(condition: Callable[[], bool], what: str, seconds: float = _DRAIN_SECONDS) -> bool:
    tick, until = threading.Event(), time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            common.console.print(f"after {seconds:.0f} s still not: {what}", style="red")
            return False
        tick.wait(0.25)
    return True


def calm(made: World, nth: int) -> int:
    """With nothing failing: emergencies that wait beside earlier messages are taken first, and in their order."""
    home, reader = made.config.home, "reader-c"
    group = READERS[reader]
    sender = connect_publisher(made.config, CALM)
    numbers = range(nth * 1000, nth * 1000 + 200)
    urgent = numbers[-20:]
    os.kill(made.pid(reader), signal.SIGSTOP)
    for number in numbers:
        critical = number in urgent
        priority = MessagePriority.CRITICAL if critical else MessagePriority.NORMAL
        sender.publish(SIGNAL if critical else REPORT, f"{CALM}:{number}".encode(), priority=priority)
    sender.flush(_DRAIN_SECONDS)
    os.kill(made.pid(reader), signal.SIGCONT)
    wanted = {f"{CALM}:{number}".encode() for number in numbers}
    if not wait(lambda: wanted <= set(effects(home, group, CALM)), "all that was sent in a calm moment"):
        return len(numbers)
    sender.close()
    order = [int(payload.partition(b":")[2]) for payload in effects(home, group, CALM) if payload in wanted]
    first = order[: len(urgent)]
    return sum(got != expected for got, expected in zip(first, urgent, strict=True))


def survey(rounds: int, seed: int, messages: int, *, home: Path, progress: Callable[[], object]) -> dict[str, Any]:
    """So many rounds, then the count. ``messages`` is how many have to be promised at least."""
    dice, done, overtaken = random.Random(seed), Counter[str](), 0
    with world(home) as made:
        for number in range(rounds):
            done += strike(made, dice)
            if (number + 1) % max(1, rounds // 3) == 0:
                overtaken += calm(made, number + 1)
            progress()
        wait(lambda: len(promised(home)) >= messages, f"{messages} messages promised", messages / 100 + 60)
        (home / "stop").touch()
        replayed = drain(made.config)
        for name in SENDERS:
            made.processes[name].join(_DRAIN_SECONDS)
        return {**judge(made.config), "overtaken": overtaken, "replayed": replayed, "rounds": rounds, **done}


def drain(config: Config) -> int:
    """Until every promised message has its effect or is a dead letter in each group; how many were replayed."""
    home, replayed = config.home, 0

    def settled() -> bool:
        nonlocal replayed
        replayed += replay(config)
        letters = dead(config)
        return all(not missing(home, group, letters) for group in GROUPS)

    wait(settled, "every promised message has its effect")
    return replayed


def missing(home: Path, group: str, letters: Iterable[tuple[str, str, str, bytes]]) -> set[bytes]:
    """Promised messages with neither an effect in the group nor a dead letter of it."""
    return promised(home) - set(effects(home, group)) - {payload for *_, of, payload in letters if of == group}


def judge(config: Config) -> dict[str, int]:
    """What the docstring says must hold."""
    home, letters = config.home, dead(config)
    found = dict.fromkeys(("lost", "repeated", "dead_missing", "dead_wrong"), 0)
    owed = promised(home)
    for group in GROUPS:
        counts = Counter(effects(home, group))
        put_aside = {payload for *_, of, payload in letters if of == group}
        found["lost"] += len(owed - set(counts) - put_aside)
        found["repeated"] += sum(count > 1 for count in counts.values())
        found["dead_missing"] += sum(fails(payload) for payload in owed - put_aside)
        found["dead_wrong"] += sum(not fails(payload) for payload in put_aside)
    return {"promised": len(owed), "dead_letters": len(letters), **found}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--rounds", type=int, default=1000, help="how often to strike (--quick: 30)")
    options.add_argument("--messages", type=int, default=200_000, help="promised at least (--quick: 2,000)")
    options.add_argument("--seed", type=int, default=0, help="of who is hit, and how")
    chosen = options.parse_args()
    rounds, messages = (30, 2000) if chosen.quick else (chosen.rounds, chosen.messages)

    def measure() -> dict[str, Any]:
        begun = time.monotonic()
        with Progress(console=common.console) as bar, tempfile.TemporaryDirectory() as folder:
            task = bar.add_task("rounds", total=rounds)
            figures = survey(rounds, chosen.seed, messages, home=Path(folder), progress=lambda: bar.advance(task))
        return {"seed": chosen.seed, **figures, "seconds": time.monotonic() - begun}

    common.run("chaos", BARS, measure, chosen.json)


if __name__ == "__main__":
    main()
