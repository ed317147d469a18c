"""What all tests share: no test touches the home folder of whoever runs it; some train on one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from esper_ray.contracts import refusals


class _ByFile(LoadScopeScheduling):
    """A file's tests stay together, and so do all that share the one Ray cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/ray/") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _own_refusals() -> None:
    refusals.take()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: on a few busy processors two are many times slower, and the bits differ."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def modules_come_back():
    """A task of one's own makes Python forget the modules of its folder, which may be those of other tests."""
    before = {name: module for name, module in sys.modules.items() if name.startswith(("benchmarks", "tests"))}
    yield
    sys.modules.update(before)
