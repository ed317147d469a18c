"""Who is measured beside whom, under which setting; each measurement in a process of its own, one at a time.

Ours and the peer take turns, so that what else happens on the machine meets both.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.setting import Setting

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS_FOLDER = ROOT / "build" / "peers"
INSTALL = "python3 -m venv build/peers && build/peers/bin/pip install -e '.[benchmarks]'"
"""In a folder of its own, for RLlib wants another gymnasium than ours."""

_GIVE_UP_SECONDS = 300.0
_GRACE_SECONDS = 20.0
_MANY = 10**6


@dataclass(frozen=True, slots=True)
class Pairing:
    """One row of the comparison.

    Attributes:
        algo: what ours runs.
        module: the peer's script; None to measure ours alone.
        needs: what must be installed for it, if anything.
    """

    name: str
    algo: str
    module: str | None
    needs: str | None
    setting: Setting

    @property
    def alone(self) -> Pairing:
        """The same without its peer."""
        return replace(self, module=None, needs=None)

    def lasting(self, seconds: float) -> Pairing:
        """The same with so many seconds on the clock."""
        return replace(self, setting=replace(self.setting, steps=_MANY, seconds=seconds))


_PPO = Setting(envs=16, rollout=64, minibatches=4, epochs=4)
_IMPALA = Setting(envs=16, rollout=32, minibatches=1, epochs=1, learning_rate=5e-4)
PAIRINGS = (
    Pairing("rllib_ppo_1", "ppo", "rllib_ppo", "ray.rllib", _PPO),
    Pairing("rllib_impala_1", "impala", "rllib_impala", "ray.rllib", _IMPALA),
    Pairing("rllib_ppo_2", "ppo", "rllib_ppo", "ray.rllib", replace(_PPO, workers=2)),
    Pairing("rllib_impala_2", "impala", "rllib_impala", "ray.rllib", replace(_IMPALA, workers=2)),
    Pairing("single_process", "ppo", "single_process_ppo", None, Setting(envs=4, rollout=128, minibatches=4, epochs=4)),
    Pairing("sb3", "ppo", "sb3_ppo", "stable_baselines3", Setting(envs=8, rollout=128, minibatches=4, epochs=4)),
)


def peers_python() -> str:
    """The interpreter that has the peers: that of `INSTALL` where it was run, else this one."""
    own = PEERS_FOLDER / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def installed(python: str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    code = f"import {module}"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def peer(pairing: Pairing, python: str) -> dict[str, Any]:
    """Measure the peer."""
    interpreter = python if pairing.needs else sys.executable
    command = [interpreter, "-m", f"benchmarks.peers.{pairing.module}", *pairing.setting.arguments()]
    return answer(command, give_up=_GIVE_UP_SECONDS)


def ours(pairing: Pairing) -> dict[str, Any]:
    """Measure Simic under the same setting, its workers on a Ray of its own."""
    command = [sys.executable, "-m", "benchmarks.simic_throughput", pairing.algo, *pairing.setting.arguments()]
    return answer(command, give_up=_GIVE_UP_SECONDS)


def answer(command: Sequence[str], *, give_up: float) -> dict[str, Any]:
    """The JSON line that a command prints last, within ``give_up`` seconds; nothing of it is left running.

    Raises:
        SystemExit: it failed or took too long.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for inherited in ("RAY_ADDRESS", "PYTHONWARNINGS"):
        environment.pop(inherited, None)
    with _family(command, environment) as process:
        try:
            output, errors = process.communicate(timeout=give_up)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"no answer in {give_up:.0f} s: {' '.join(command)}") from None
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{errors[-2000:]}")
    return dict(json.loads(output.splitlines()[-1]))


@contextlib.contextmanager
def _family(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; whoever of that session is still there afterwards is ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        left = list(_session(process.pid))
        for member in left:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(left, timeout=_GRACE_SECONDS)
        process.wait(_GRACE_SECONDS)


def _session(leader: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader:
                yield process


@dataclass(frozen=True, slots=True)
class Row:
    """One repeat of a pairing; ``theirs`` is None where ours ran alone."""

    ours: dict[str, Any]
    theirs: dict[str, Any] | None

    @property
    def ratio(self) -> float | None:
        """Ours to theirs, in steps a second."""
        return None if self.theirs is None else self.ours["steps_per_s"] / self.theirs["steps_per_s"]


def compare(
    pairings: Sequence[Pairing], python: str, *, repeats: int, done: Callable[[], None]
) -> dict[str, list[Row]]:
    """Measure each pairing ``repeats`` times; who begins alternates.

    Args:
        python: the interpreter that has the peers.
        done: told of each row.
    """
    rows: dict[str, list[Row]] = {pairing.name: [] for pairing in pairings}
    for repeat in range(repeats):
        for pairing in pairings:
            first = peer(pairing, python) if pairing.module and repeat % 2 else None
            own = ours(pairing)
            theirs = peer(pairing, python) if pairing.module and first is None else first
            rows[pairing.name].append(Row(own, theirs))
            done()
    return rows
