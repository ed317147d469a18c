"""Kills a small run at a chosen point or moment, resumes it, and compares its end with that of an undisturbed one.

The whole system runs in one process, in lockstep; that process is the one that is killed, with SIGKILL. Every life of a
run is forked from one process that has loaded everything and computed nothing, so that a case takes about a second.
What must be equal is in `ending`; what may differ are times, and telemetry that is told twice.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import resource
import selectors
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.contracts.ports import Kernel, KernelSpec
from esper_ray.kasmina import export
from esper_ray.kasmina.garden import Garden
from esper_ray.reliability import atomic, failpoints
from esper_ray.reliability.ids import digest
from esper_ray.reliability.journal import Journal
from esper_ray.tolaria import checkpoint, trainer
from esper_ray.tolaria.trainer import RunRequest, Trainer
from esper_ray.urza.store import Store

RUN = "killed"
SETTINGS = (
    "run.dataset=digits",
    "run.mode=lockstep",
    "run.epochs=9",
    "run.boundary_every=6",
    "run.host_width=4",
    "run.device=cpu",
    "run.keep_checkpoints=2",
    "seeds.shadow_share=1.0",
    "seeds.embargo_epochs=1",
    "seeds.gain_errors=0",
    "tamiyo.plateau_rate=10",
    "tamiyo.onset=0",
    "tamiyo.warmup_epochs=1",
    "tamiyo.report_window=2",
    # Decisions at random besides the heuristic's: seeds are removed as well as kept.
    "tamiyo.exploration=0.3",
)
DAMAGED_STEP = 27
BACK = frozenset({"how", "told", "prepare", "commit", "confirm"})
# Fields that hold a time, or that tell from where a run went back: a killed one has no memory to go back from.
TIMES = frozenset(
    {"seconds", "wall_seconds", "step_ms", "checkpoint_ms", "boundary", "ms", "at", "issued_at_ns"} | BACK
)
# Killed here, a run really exports its model; elsewhere its weights alone are written.
EXPORTS = frozenset({"end.tested", "end.exported", "end.written"})
DURABLE = frozenset({BusMessageType.FIELD_REPORT, BusMessageType.DECISION_RECORD})


@dataclass(frozen=True, slots=True)
class Case:
    """One kill: at the ``nth`` passing of ``point``, or where that is empty after ``after`` seconds of processor time.

    ``again`` is after how many such seconds the resumed run is killed too; 0 spares it.
    """

    point: str = ""
    nth: int = 1
    after: float = 0.0
    again: float = 0.0

    @property
    def name(self) -> str:
        first = f"{self.point}:{self.nth}" if self.point else f"after {self.after:.2f} s"
        return f"{first} and again after {self.again:.2f} s" if self.again else first


@dataclass(frozen=True, slots=True)
class Outcome:
    """``differs`` names what was not as in the undisturbed run; ``killed`` is whether the kill came before the end."""

    case: Case
    killed: bool
    differs: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not self.differs


class Mailbox:
    """A bus of one file: what is published is there also when its sender is killed right after."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.NORMAL,  # noqa: ARG002
        event_id: bytes | None = None,
    ) -> None:
        if type in DURABLE:
            assert event_id is not None, "what must come once needs a name"
            os.write(self._descriptor, f"{int(type)} {event_id.hex()} {payload.hex()}\n".encode())


class Stored:
    """Kernels out of a store; without one they are made, and put there."""

    def __init__(self, store: Store, make: inprocess.LocalKernels | None = None) -> None:
        self._store, self._make = store, make

    def fetch(self, spec: KernelSpec) -> inprocess.Immediate[Kernel]:
        if self._make is None:
            return inprocess.Immediate(lambda: self._store.get(spec))
        made = self._make.fetch(spec).wait(None)
        return inprocess.Immediate(lambda: self._store.put(spec, made.weights, made.metadata))


class Laboratory:
    """Runs cases in ``folder``. Nothing may have computed a gradient in this process: torch could not be forked.

    Args:
        damaged: the runs meet damage at a step, and are rolled back.
    """

    def __init__(self, folder: Path, *, damaged: bool = False) -> None:
        torch.set_num_threads(1)
        self._folder, self._damaged = folder, damaged
        _warm_up()
        whole, ordinary = folder / "whole", folder / "ordinary"
        (folder / "kernels").mkdir(parents=True)
        self._must_end(whole, lambda: self._live(whole, first=True))
        before = _processor_time_of_children()
        self._must_end(ordinary, lambda: self._live(ordinary))
        # The first life made the kernels and an export as well; no other does.
        self.seconds = _processor_time_of_children() - before
        self.passings: Mapping[str, int] = json.loads((whole / "passings.json").read_text())
        self.expected = ending(whole)

    def cases(self, points: Iterable[str]) -> list[Case]:
        """For each point a passing in the middle of the run, drawn by the point's name."""
        return [
            Case(point, random.Random(point).randint(1, self.passings[point]))
            for point in points
            if self.passings.get(point)
        ]

    def random_cases(self, count: int, *, seed: int = 0) -> list[Case]:
        """Kills at random moments of a run's life, whatever else the machine does; every other one is killed twice."""
        draw = random.Random(seed)
        moments = [(draw.uniform(0.05, self.seconds), draw.uniform(0.05, self.seconds)) for _ in range(count)]
        return [Case(after=first, again=again * (place % 2)) for place, (first, again) in enumerate(moments)]

    def examine(self, case: Case) -> Outcome:
        """Kill a run, resume it, compare."""
        home = self._folder / case.name.replace(" ", "-")
        killed = self._kill(case, home)
        if case.again:
            self._kill(Case(after=case.again), home)
        self._must_end(home, lambda: self._live(home, exports=case.point in EXPORTS))
        found = ending(home)
        differs = tuple(name for name, value in self.expected.items() if found.get(name) != value)
        if not differs:
            shutil.rmtree(home)
        return Outcome(case, killed, differs)

    def examine_all(self, cases: Sequence[Case], seen: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
        """All cases, half of them in a process beside where there are two processors; ``seen`` hears of each."""
        lanes = [cases[::2], cases[1::2]] if (os.cpu_count() or 1) > 1 and len(cases) > 1 else [cases]
        pipes = [os.pipe() for _ in lanes]
        workers = [
            _fork(self._folder / f"lane-{number}", partial(self._examine_into, lane, pipe[1]))
            for number, (lane, pipe) in enumerate(zip(lanes, pipes, strict=True))
        ]
        for _, written in pipes:
            os.close(written)
        outcomes = []
        with selectors.DefaultSelector() as selector:
            for read, _ in pipes:
                file = os.fdopen(read)
                selector.register(file, selectors.EVENT_READ, file)
            while selector.get_map():
                for key, _ in selector.select():
                    line = key.data.readline()
                    if not line:
                        selector.unregister(key.fileobj)
                        key.data.close()
                        continue
                    row = json.loads(line)
                    outcomes.append(Outcome(Case(**row["case"]), row["killed"], tuple(row["differs"])))
                    seen(outcomes[-1])
        for number, worker in enumerate(workers):
            if os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]):
                raise RuntimeError((self._folder / f"lane-{number}" / "fault.txt").read_text())
        return outcomes

    def _examine_into(self, cases: Sequence[Case], descriptor: int) -> None:
        for case in cases:
            os.write(descriptor, (json.dumps(asdict(self.examine(case))) + "\n").encode())

    def _kill(self, case: Case, home: Path) -> bool:
        def life() -> None:
            if case.point:
                failpoints.arm(case.point, case.nth)
            self._live(home, exports=case.point in EXPORTS)

        child = _fork(home, life)
        if not case.point:
            _kill_after(child, case.after)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{case.name}: {(home / 'fault.txt').read_text()}")
        return status != 0

    def _must_end(self, home: Path, life: Callable[[], None]) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(_fork(home, life), 0)[1])
        if status:
            raise RuntimeError(f"a life of {home.name} ended with {status}: {(home / 'fault.txt').read_text()}")

    def _live(self, home: Path, *, first: bool = False, exports: bool = False) -> None:
        passed = failpoints.watch() if first else None
        config = configuration.load(None, [f"home={home}", *SETTINGS])
        kernels = Stored(Store(self._folder / "kernels"), inprocess.LocalKernels() if first else None)
        if not (first or exports):
            setattr(trainer, "export_model", _weights_only)  # noqa: B010  it is no export of that module
        around = inprocess.surroundings(config, kernels=kernels, publisher=Mailbox(home / "mail"))
        assert isinstance(around.decider, inprocess.LocalDecider)
        resumes = (config.runs / RUN).exists()
        run = Trainer(RunRequest(RUN, config, resume=resumes), around)
        if self._damaged:
            _damage(run)
        run.run()
        around.decider.tamiyo.close()
        if passed is not None:
            (home / "passings.json").write_text(json.dumps(passed))


def survey(
    folder: Path, points: Sequence[str], moments: int = 0, *, progress: Callable[[int, int], None] = lambda *_: None
) -> list[Outcome]:
    """Kill runs at all of ``points``, and at random moments; those of a rollback in runs that are rolled back.

    Args:
        progress: hears how many cases are done, and of how many.
    """
    turning = [point for point in points if point.startswith("rollback.")]
    plain = Laboratory(folder / "plain")
    plans = [(plain, [*plain.cases([p for p in points if p not in turning]), *plain.random_cases(moments)])]
    if turning:
        damaged = Laboratory(folder / "damaged", damaged=True)
        plans.append((damaged, damaged.cases(turning)))
    total, done = sum(len(cases) for _, cases in plans), itertools.count(1)
    progress(0, total)
    return [
        outcome
        for laboratory, cases in plans
        for outcome in laboratory.examine_all(cases, lambda _: progress(next(done), total))
    ]


def _processor_time_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kill_after(child: int, seconds: float) -> None:
    """SIGKILL for a child of ours as soon as it has used so much processor time, if it lives so long."""
    # Linux's number of another process's processor clock: the complement of its id, and the kind in the last 3 bits.
    clock = ~child << 3 | 2
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.001)


def _fork(home: Path, life: Callable[[], None]) -> int:
    """A child that lives ``life`` and ends; what went wrong is in ``fault.txt``."""
    home.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        life()
    except BaseException:
        (home / "fault.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _damage(run: Trainer) -> None:
    """Once, in the middle of its first branch, a weight of the host is no number any more."""
    step = run.train_step

    def train_step() -> None:
        if run.garden.branch == 0 and run.step == DAMAGED_STEP:
            with torch.no_grad():
                next(run.model.parameters()).fill_(math.nan)
        step()

    run.train_step = train_step  # type: ignore[method-assign]


def _weights_only(garden: Garden, sample: torch.Tensor, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    """In the place of an export that takes longer than all the rest: the same weights, without the program."""
    with export._registered(garden):
        weights = {name: value.detach().clone().contiguous() for name, value in garden.model.state_dict().items()}
    atomic.write_bytes(folder / "model.safetensors", save(weights))
    return {}


def _warm_up() -> None:
    """Load what is loaded at first use only, so that no child has to."""
    from sklearn.datasets import load_digits

    load_digits()
    torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 2),))


def ending(home: Path) -> dict[str, Any]:
    """What of a finished run must not depend on whether it was killed in between."""
    folder = home / "runs" / RUN
    last = checkpoint.read_latest(folder / "checkpoints")
    assert last is not None
    tensors = {name: digest(value.contiguous().numpy().tobytes()) for name, value in sorted(last.tensors.items())}
    mail = _mail(home)
    return {
        "weights": {name: value for name, value in tensors.items() if name.startswith("model/")},
        "moments": {name: value for name, value in tensors.items() if name.startswith("optimizer/")},
        "generator": tensors["generator/cpu"],
        "exported": digest((folder / "model" / "model.safetensors").read_bytes()),
        "checkpoint": _timeless(last.data),
        # The exported program is not everywhere; what must not be there is a draft.
        "files": sorted(
            str(file.relative_to(folder))
            for file in folder.rglob("*")
            if file.is_file() and (file.parent.name != "model" or file.name.startswith("."))
        ),
        "result": _timeless(json.loads((folder / "result.json").read_text())),
        "epochs": _rows(folder / "metrics.jsonl"),
        "events": _rows(folder / "events.jsonl"),
        "incidents": _rows(folder / "incidents.jsonl"),
        "decisions": _decisions(folder),
        "reports": _reports(home),
        "reports sent": sorted(mail.get(int(BusMessageType.FIELD_REPORT), {})),
        "records sent": sorted(mail.get(int(BusMessageType.DECISION_RECORD), {})),
        "one message per id": max((len(each) for kind in mail.values() for each in kind.values()), default=0),
    }


def _mail(home: Path) -> dict[int, dict[str, set[str]]]:
    """By type and event id the different payloads that came: a receiver takes each id once."""
    found: dict[int, dict[str, set[str]]] = {}
    for line in (home / "mail").read_text().splitlines():
        kind, event_id, payload = line.split()
        found.setdefault(int(kind), {}).setdefault(event_id, set()).add(payload)
    return found


def _rows(file: Path) -> list[Any]:
    return [_timeless(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(each) for key, each in value.items() if key not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list | tuple) else value


def _decisions(folder: Path) -> list[Any]:
    journal = Journal(folder / "journal.db")
    try:
        found = []
        for entry in journal.read("decisions"):
            envelopes = [bytes.fromhex(text) for text in json.loads(entry.payload)["envelopes"]]
            commands = [codec.decode_command(codec.decode_envelope(data).payload) for data in envelopes]
            found.append((entry.key, [repr(replace(command, issued_at_ns=0)) for command in commands]))
        return [*sorted(found), *sorted((entry.key, entry.payload.decode()) for entry in journal.read("grafts"))]
    finally:
        journal.close()


def _reports(home: Path) -> list[str]:
    journal = Journal(home / "journals" / "tamiyo.db")
    try:
        reports = [codec.decode_report(entry.payload) for entry in journal.read("reports")]
        return sorted(repr(replace(report, issued_at_ns=0)) for report in reports)
    finally:
        journal.close()


def summary(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """The figures of `benchmarks.resume`, and each case in ``tables``."""
    done = list(outcomes)
    killed = [each for each in done if each.killed]
    reasons = Counter(name for each in killed for name in each.differs)
    return {
        "kill_points": len({each.case.point for each in killed if each.case.point}),
        "kills": len(killed),
        "ended_before_the_kill": len(done) - len(killed),
        "identical": sum(each.identical for each in killed) / max(1, len(killed)),
        "tables": {
            "cases": [{"case": each.case.name, "killed": each.killed, "differs": each.differs} for each in done],
            "what_differed": dict(reasons),
        },
    }
