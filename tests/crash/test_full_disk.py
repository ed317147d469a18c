"""A run whose disk is really full: it halts, keeps what it has, and goes on when there is room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_FULL = """
import json, subprocess, sys
from pathlib import Path
from esper_ray import inprocess
from esper_ray.errors import EsperError
from esper_ray.tolaria import checkpoint
from tests.unit.test_tolaria_emergency import make
import torch

torch.set_num_threads(1)
disk = Path(sys.argv[1])
# In lockstep Tamiyo, whose journal is on the same disk, would be waited for.
SETTINGS = ("run.mode=live", "run.epochs=4", "run.keep_checkpoints=20")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True)
kernels = inprocess.LocalKernels()
trainer, bus = make(disk, kernels, *SETTINGS)
one_epoch = trainer.one_epoch

def then_fill_the_disk():
    one_epoch()
    if trainer.epoch != 2:
        return
    trainer.writer.finish()
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass

trainer.one_epoch = then_fill_the_disk
error = ""
try:
    trainer.run()
except EsperError as fault:
    error = type(fault).__name__
levels, kept = [level.name for level in bus.levels], checkpoint.read_latest(trainer.folder / "checkpoints").epoch
(disk / "filler").unlink()
resumed, _ = make(disk, kernels, *SETTINGS, resume=True)
print(json.dumps({"error": error, "levels": levels, "kept": kept, "epochs": resumed.run()["epochs"]}))
"""


def answer(command: list[str]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.timeout(420)
@pytest.mark.skipif(not _may_mount(), reason="no small disk can be mounted here")
def test_a_run_whose_disk_is_full_halts_with_its_checkpoints_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    python = [sys.executable, "-W", "ignore", "-c", _FULL, str(tmp_path)]
    found = answer(["unshare", "-rm", *python])
    assert found["error"] in ("StorageFault", "RunError")
    assert found["levels"][-1] == "HALT"
    assert found["kept"] >= 2
    assert found["epochs"] == 4
