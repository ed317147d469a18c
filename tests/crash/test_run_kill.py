"""A run that is killed anywhere and resumed ends, in lockstep, with what it would have ended with undisturbed.

The kills are done by `benchmarks.kills`, in a process of its own: torch can be forked only while it has computed no
gradient. The points run always; a hundred random moments do with ``pytest -m slow tests/crash/test_run_kill.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esper_ray.errors import ConfigError
from esper_ray.reliability import failpoints

ROOT = Path(__file__).parents[2]

_EXAMINE = """
import json, sys
from pathlib import Path
from benchmarks import kills
from esper_ray.reliability import failpoints

moments = int(sys.argv[2])
outcomes = kills.survey(Path(sys.argv[1]) / "runs", () if moments else tuple(failpoints.POINTS), moments)
rows = [{"point": o.case.point, "name": o.case.name, "killed": o.killed, "differs": o.differs} for o in outcomes]
print(json.dumps(rows))
"""


def examine(folder: Path, moments: int = 0) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _EXAMINE, str(folder), str(moments)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {row["point"]: row for row in examine(tmp_path_factory.mktemp("kills"))}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", tuple(failpoints.POINTS))
def test_a_run_killed_at_this_point_and_resumed_ends_as_one_never_killed(
    outcomes: dict[str, dict[str, Any]], point: str
) -> None:
    assert outcomes[point]["killed"], "the point was never passed"
    assert outcomes[point]["differs"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_any_of_a_hundred_moments_and_resumed_ends_as_one_never_killed(tmp_path: Path) -> None:
    rows = examine(tmp_path, 100)
    assert sum(row["killed"] for row in rows) >= 90
    assert [(row["name"], row["differs"]) for row in rows if row["differs"]] == []


def test_every_named_point_is_passed_somewhere_and_every_passing_is_named() -> None:
    sources = [file.read_text() for file in (ROOT / "esper_ray").rglob("*.py") if file.stem != "failpoints"]
    passed = {name for text in sources for name in re.findall(r'passing\("([a-z.]+)"\)', text)}
    assert passed == set(failpoints.POINTS)
    assert len(passed) >= 30


_DIES = """
from esper_ray.reliability import failpoints
for _ in range(5):
    failpoints.passing("step.done")
    print("passed", flush=True)
"""


@pytest.mark.parametrize(("given", "passings"), [("step.done", 0), ("step.done:3", 2), ("step.begun", 5), ("", 5)])
def test_the_environment_arms_a_point_and_nothing_happens_without_it(given: str, passings: int) -> None:
    environment = {**os.environ, failpoints.ENVIRONMENT: given}
    done = subprocess.run([sys.executable, "-c", _DIES], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.count("passed") == passings
    assert done.returncode == (-9 if passings < 5 else 0)


@pytest.mark.parametrize("wrong", ["step.dome", "step.done:0", "step.done:x"])
def test_a_point_that_does_not_exist_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no failpoint"):
        failpoints.arm_from(wrong)
