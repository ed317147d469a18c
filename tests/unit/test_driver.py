"""The driver makes the long call once the process that takes it answers; nothing before that counts as an attempt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper_ray.actors import driver
from esper_ray.config import Config
from esper_ray.reliability.journal import Journal
from esper_ray.reliability.runqueue import RunQueue


class Tolaria:
    """An actor's handle: what is called is kept, what is asked is answered when it is up."""

    def __init__(self) -> None:
        self.up, self.orders = False, []
        self.progress = SimpleNamespace(remote=lambda: self)
        self.train = SimpleNamespace(remote=self.orders.append)

    def asked(self, reference: Any) -> dict[str, Any] | None:
        assert reference is self
        return {"state": "idle"} if self.up else None


def test_a_process_that_is_being_restarted_costs_a_run_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, tolaria = RunQueue(Journal(tmp_path / "s.db")), Tolaria()
    queue.submit("q", "r", {}, arms=("grown",))
    monkeypatch.setattr(driver, "_ask", tolaria.asked)
    drives = driver.Driver(queue, Config())

    for _ in range(5):
        drives.step(tolaria, None)
    assert (tolaria.orders, drives.busy) == ([], False)
    waiting = queue.current()
    assert waiting is not None
    assert (waiting.state, waiting.attempts) == ("waiting", 0)

    tolaria.up = True
    drives.step(tolaria, None)
    running = queue.current()
    assert running is not None
    assert (running.state, running.attempts) == ("running", 1)
    assert [order["run_id"] for order in tolaria.orders] == ["r"]
