"""What isolation teaches and what it never disturbs: one random seed of the benchmark, and a thousand clean steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import isolation
from tests.seed_worlds import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.timeout(600)
def test_at_the_end_of_isolation_the_model_is_better_with_the_seed_on(tmp_path: Path) -> None:
    found = isolation.outcome(2, tmp_path, slot=2, settings=isolation.QUICK)
    assert found["gain"] > 0.0
    assert found["checks"] > 0
    assert found["violations"] == 0


def test_no_false_alarm_in_a_thousand_clean_steps() -> None:
    """Each one watched, over a host with dropout, batch normalisation and a generator of its own; then live."""
    world = World()
    for _ in range(700):
        world.step()
    assert world.garden.checks == 700
    world.go_live(alpha=0.6)
    for _ in range(301):
        world.step()
    assert world.garden.checks == 1000
    assert world.garden.violations == 0
