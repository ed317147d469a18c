"""A forge that is killed at any point makes nothing finished again, and nothing half-done is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def killed(folder: Path, kills: int, seed: int) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.forge_kills", str(folder), str(kills), str(seed)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, float] = json.loads(run.stdout)
    return found


def test_ten_kills_of_the_forge_and_its_jobs_lose_and_repeat_nothing(tmp_path: Path) -> None:
    assert killed(tmp_path, 10, seed=1)["kills"] >= 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_kills_of_the_forge_and_its_jobs_lose_and_repeat_nothing(tmp_path: Path) -> None:
    found = killed(tmp_path, 200, seed=2)
    assert found["kills"] >= 200
    assert found["job"] >= 20
    assert found["forge at a moment"] >= 50
