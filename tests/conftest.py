"""What all tests share: no test touches the home folder of whoever runs it; some train on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_ray.contracts import refusals


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers a file's tests stay together, and so do all that share the one Ray cluster."""
    for item in items:
        group = "ray" if item.path.parent.name == "ray" else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


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
