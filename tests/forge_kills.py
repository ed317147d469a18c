"""Kills the forge and its jobs at random points and looks what is left.

``python -m tests.forge_kills FOLDER KILLS SEED`` is a process of its own, with one thread and without torch, so that it
can fork a forge in milliseconds. The jobs here make nothing, but speak the real protocol; everything else is the real
forge, ledger and store. Prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from esper_ray.config import ForgeConfig
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.catalog import CATALOG
from esper_ray.reliability import failpoints
from esper_ray.tezzeret import forge as forge_module
from esper_ray.tezzeret import seal
from esper_ray.tezzeret.forge import Forge
from esper_ray.tezzeret.toolchain import cache_key
from esper_ray.urza.store import Store

SIGNATURE = SlotSignature("conv", (8, 6, 6))
KEYS = KeyRing((("k1", bytes(32)),))
SPECS = [CATALOG.get(name).spec(SIGNATURE) for name in ("BP002", "BP003", "BP004", "BP005", "BP006", "BP007", "BP009")]
JOBS = 2 * len(SPECS)
KILLED_JOBS = 2  # a kernel is given up after its third failure, and that is not what is asked here
POINTS = ("journal.inserted", "journal.committed", "atomic.written", "atomic.renamed")
_PATIENCE_SECONDS = 60.0
JOB = """
import base64, ctypes, json, os, signal, struct, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
folder, parent = sys.argv[1], int(sys.argv[2])
if os.getppid() != parent:
    sys.exit("too late")
say = lambda **message: print(json.dumps(message), flush=True)
phase = json.loads(sys.stdin.readline())["phase"]
say(ready=os.getpid())
for line in sys.stdin:
    blueprint = json.loads(line)["kernel"]["blueprint"]
    with open(folder + "/started", "a") as file:
        print(phase, blueprint, os.getpid(), file=file, flush=True)
    end = time.perf_counter() + 0.01
    while time.perf_counter() < end:
        pass
    if phase == "compile":
        say(done={"metadata": {"eager_ms": 2.0, "compiled_ms": 1.0 + int(blueprint[-1]) / 6, "compile_seconds": 0.5}})
        continue
    text = json.dumps({"w": {"dtype": "F32", "shape": [5000], "data_offsets": [0, 20000]}}).encode()
    weights = base64.b64encode(struct.pack("<Q", len(text)) + text + bytes(20000)).decode()
    say(done={"weights": weights, "metadata": {"parameters_count": 5, "strategy": "eager", "compiled_ms": None}})
"""


class Campaign:
    """One folder whose forge is killed again and again until it has made everything."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder, self.dice = folder, dice
        self.kills: Counter[str] = Counter()
        self.finished: set[tuple[str, str]] = set()
        self._checked = 0
        folder.mkdir(parents=True)
        (folder / "job.py").write_text(JOB)

    def run(self, horizon: float) -> None:
        """Kill at moments spread over ``horizon`` seconds; ends when the forge came through."""
        while not self._round(horizon):
            self.look()
        self.look()
        assert len(self.finished) == JOBS, f"{JOBS - len(self.finished)} jobs are not finished"
        store = Store(self.folder / "urza")
        for spec in SPECS:
            assert "compile_key" in store.get(spec).metadata, f"{spec.key} is served as it was before it was measured"
            assert [row.version for row in store.list(blueprint=spec.blueprint)] == [1, 2], "a kernel was stored again"
        store.close()

    def undisturbed(self) -> float:
        """Seconds that the forge takes when nobody kills it."""
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _live(self.folder, 1, "", 0)
        _, status = os.waitpid(child, 0)
        assert status == 0, (self.folder / "error").read_text()
        return time.monotonic() - started

    def look(self) -> None:
        """Whether what is finished stays so and is not made again, and all that is served is whole."""
        self._wait_for_the_dead()
        begun = self._begun()
        again = [job for job in begun[self._checked :] if job in self.finished]
        assert not again, f"finished, and begun again: {again}"
        self._checked = len(begun)
        store = Store(self.folder / "urza")
        report = store.verify()
        assert report.holds, report
        forge = _forge(self.folder, store, 1)
        rows = store.list()
        for row in rows:
            kernel = store.get_digest(row.digest)
            assert kernel.spec.key == row.key
            assert kernel.metadata == row.metadata
            seal.check(kernel, KEYS)
        kept = {row.metadata.get(field) for row in rows for field in ("cache_key", "compile_key")}
        now = {job for job in _jobs() if _is_finished(forge, kept, *job)}
        assert self.finished <= now, f"forgotten: {self.finished - now}"
        self.finished = now
        forge.close()
        store.close()

    def _round(self, horizon: float) -> bool:
        """One life of the forge; whether it came to its end."""
        point = self.dice.choice((*POINTS, *[""] * len(POINTS)))
        nth, lanes = self.dice.randint(1, 16), self.dice.choice((1, 1, 2))
        child = os.fork()
        if child == 0:
            _live(self.folder, lanes, point, nth)
        if not point and self.dice.random() < 0.5 and self.kills["job"] < KILLED_JOBS:
            self._kill_a_job(child, self.dice.uniform(0.0, horizon))
        delay = _PATIENCE_SECONDS if point else self.dice.uniform(0.0, horizon)
        if not _ended(child, delay):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            self.kills["forge at " + point if point else "forge at a moment"] += 1
            return False
        assert os.WEXITSTATUS(status) == 0, (self.folder / "error").read_text()
        return True

    def _kill_a_job(self, child: int, delay: float) -> None:
        if _ended(child, delay):
            return
        for job in psutil.Process(child).children():
            job.kill()
            self.kills["job"] += 1
            return

    def _begun(self) -> list[tuple[str, str]]:
        return [(line.split()[0], line.split()[1]) for line in self._lines()]

    def _lines(self) -> list[str]:
        path = self.folder / "started"
        return path.read_text().splitlines() if path.exists() else []

    def _wait_for_the_dead(self) -> None:
        """The jobs of a killed forge are killed by the kernel: that is a promise, and takes a moment."""
        for pid in {int(line.split()[2]) for line in self._lines()[self._checked :]}:
            if psutil.pid_exists(pid):
                psutil.Process(pid).wait(timeout=_PATIENCE_SECONDS)


def _jobs() -> list[tuple[str, str]]:
    return [(phase, spec.blueprint) for phase in ("eager", "compile") for spec in SPECS]


def _is_finished(forge: Forge, kept: set[object], phase: str, blueprint: str) -> bool:
    spec = next(spec for spec in SPECS if spec.blueprint == blueprint)
    keys = [cache_key(spec, phase, strategy) for strategy in ("standard", "fast")]  # type: ignore[arg-type]
    return any(key in kept or forge.ledger.finished(phase, key) is not None for key in keys)  # type: ignore[arg-type]


def _forge(folder: Path, store: Store, lanes: int) -> Forge:
    config = ForgeConfig(jobs=lanes, reserve_mb=0)
    command = (sys.executable, "-S", "-E", str(folder / "job.py"), str(folder))
    return Forge(store, folder / "forge", config, keys=KEYS, command=command)


def _live(folder: Path, lanes: int, point: str, nth: int) -> None:
    """A forge's whole life, in the forked process; never returns."""
    try:
        if point:
            failpoints.arm(point, nth)
        store = Store(folder / "urza")
        forge = _forge(folder, store, lanes)
        outcomes = forge.build(SPECS), forge.compile(SPECS)
        lost = [outcome.given_up for outcome in outcomes if outcome.given_up]
        assert not lost, lost
    except BaseException as error:
        (folder / "error").write_text(repr(error))
        os._exit(1)
    os._exit(0)


def _ended(child: int, seconds: float) -> bool:
    handle = os.pidfd_open(child)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def survey(folder: Path, kills: int, seed: int) -> dict[str, float]:
    """Campaigns until at least ``kills`` processes were killed; counts by kind of kill."""
    forge_module.compiler_available = lambda: (True, "the jobs here compile nothing")
    dice = random.Random(seed)
    horizon = Campaign(folder / "calm", dice).undisturbed()
    counted: Counter[str] = Counter()
    campaigns = 0
    while sum(counted.values()) < kills:
        campaigns += 1
        campaign = Campaign(folder / str(campaigns), dice)
        campaign.run(horizon)
        counted += campaign.kills
    return {"kills": sum(counted.values()), "campaigns": campaigns, "horizon_s": horizon, **counted}


if __name__ == "__main__":
    print(json.dumps(survey(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
