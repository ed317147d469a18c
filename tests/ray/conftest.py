"""One local cluster for all tests in here, with a home and a temporary folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.runtime import Session, connect

SMALL = (
    "run.epochs=8",
    "run.train_samples=640",
    "run.validation_samples=200",
    "run.test_samples=200",
    "run.host_width=8",
    "run.threads=1",
    "run.mode=lockstep",
    "tamiyo.grow_by=0.25",
    "forge.compile=never",
)
"""A run of some seconds in which seeds are born."""


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Short, for Ray's sockets have long names already."""
    path = Path(tempfile.mkdtemp(prefix="er", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def small(folder: Path) -> Config:
    """The configuration of the shared system; runs add their own settings with `variant`."""
    return configuration.load(settings=[f"home={folder}/home", "nissa.port=0", "ray.dashboard=false", *SMALL])


@pytest.fixture(scope="session")
def system(folder: Path, small: Config) -> Iterator[Session]:
    """All actors, up."""
    before = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "ESPER_REDIS_URL")}
    os.environ["RAY_TMPDIR"] = str(folder)
    with connect(small) as session:
        session.up()
        yield session
    os.environ.pop("RAY_TMPDIR")
    os.environ.update({name: value for name, value in before.items() if value is not None})


def variant(config: Config, **changes: Any) -> Config:
    """The same configuration with other values in its ``run`` section."""
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


def until(condition: Callable[[], Any], *, seconds: float = 60.0, what: str) -> Any:
    """Wait for a condition and return what it gave; fail by its name."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def progress(session: Session, run_id: str) -> dict[str, Any]:
    """The progress of the run's first arm, empty while there is none."""
    found: dict[str, Any] = session.run_status(run_id)["arms"][0]["progress"] or {}
    return found
