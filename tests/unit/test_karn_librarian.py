"""A query always has an answer; what became of blueprints is counted and changes none of them."""

from __future__ import annotations

import pytest

from esper_ray.contracts.enums import CircuitBreakerState, FieldReportOutcome
from esper_ray.contracts.messages import FieldReport
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.catalog import CATALOG, Catalog
from esper_ray.karn.librarian import FAILURES, OPEN_SECONDS, Librarian
from esper_ray.reliability.clock import ManualClock

CONV = SlotSignature("conv", (32, 12, 12))
POOL = [f"BP{number:03d}" for number in range(1, 11)]


class Broken(Catalog):
    """A catalogue whose queries fail while it is broken."""

    broken = True
    asked = 0

    def query(self, signature, **wanted):
        self.asked += 1
        if self.broken:
            raise RuntimeError("a cost function fails")
        return super().query(signature, **wanted)


def ids(answer) -> list[str]:
    return sorted(blueprint.id for blueprint in answer.candidates)


def test_a_failing_catalogue_is_answered_for_by_the_safe_pool_and_left_alone_after_three_failures() -> None:
    clock, changes = ManualClock(), []
    catalog = Broken()
    librarian = Librarian(catalog, clock=clock, on_breaker=lambda name, state: changes.append(state))
    for _ in range(FAILURES):
        answer = librarian.query(CONV)
        assert ids(answer) == POOL
        assert answer.note == "the safe pool: the catalogue failed: RuntimeError: a cost function fails"
    answer = librarian.query(CONV)
    assert ids(answer) == POOL
    assert "being left alone" in answer.note
    assert set(answer.left_out) == {each.id for each in CATALOG} - set(POOL)
    assert catalog.asked == FAILURES
    assert librarian.health()["breaker"] == "open"
    catalog.broken = False
    clock.advance(OPEN_SECONDS)
    assert librarian.query(CONV).note == ""
    assert changes == [CircuitBreakerState.OPEN, CircuitBreakerState.HALF_OPEN, CircuitBreakerState.CLOSED]
    health = librarian.health()
    assert (health["answered"], health["safe_pool"], health["breaker"]) == (1, 4, "closed")


def test_a_users_mistake_is_told_and_is_no_failure_of_the_catalogue() -> None:
    librarian = Librarian()
    for _ in range(FAILURES + 1):
        with pytest.raises(BlueprintError, match="no blueprint"):
            librarian.get("BP999")
    assert librarian.health()["breaker"] == "closed"


def test_in_conservative_mode_only_the_safe_pool_is_given_out_until_it_ends() -> None:
    librarian = Librarian()
    librarian.be_conservative("the run was damaged")
    answer = librarian.query(CONV, offer="wide")
    assert ids(answer) == POOL
    assert answer.note == "the safe pool: conservative mode, the run was damaged"
    assert ids(librarian.query(SlotSignature("vector", (24,)))) == [
        "BP001",
        "BP002",
        "BP003",
        "BP004",
        "BP005",
        "BP010",
    ]
    librarian.be_ordinary()
    assert librarian.query(CONV) == CATALOG.query(CONV)


def report(number: int, blueprint: int, outcome: FieldReportOutcome, **metrics: float) -> FieldReport:
    return FieldReport(number, number, "run-1", 1, 0, blueprint, outcome, metrics, 3, 0, "heuristic")


def test_outcomes_are_counted_once_survive_a_restart_and_change_no_answer(tmp_path) -> None:
    first = Librarian(folder=tmp_path)
    before = first.query(CONV)
    assert first.note(report(1, 9, FieldReportOutcome.SUCCESS, g=0.25))
    assert not first.note(report(1, 9, FieldReportOutcome.SUCCESS, g=0.25))
    assert first.note(report(2, 9, FieldReportOutcome.REGRESSION, g=-0.05))
    assert first.note(report(3, 4, FieldReportOutcome.ABORTED))
    assert not first.note(report(4, 0, FieldReportOutcome.NEUTRAL))
    first.close()
    again = Librarian(folder=tmp_path)
    usage = again.usage()
    assert sorted(usage) == ["BP004", "BP009"]
    assert usage["BP009"]["reports"] == 2
    assert (usage["BP009"]["success"], usage["BP009"]["regression"]) == (1, 1)
    assert usage["BP009"]["gain"] == pytest.approx(0.1)
    assert usage["BP004"] == {
        "reports": 1, "success": 0, "neutral": 0, "regression": 0, "aborted": 1, "gain": None,
    }  # fmt: skip
    assert again.query(CONV) == before
    again.close()


def test_a_latency_budget_leaves_out_what_is_estimated_to_be_slower() -> None:
    limit = CATALOG.get("BP009").latency_ms(CONV) * 0.99
    answer = Librarian().query(CONV, latency_budget_ms=limit)
    assert answer.candidates
    assert all(blueprint.latency_ms(CONV) <= limit for blueprint in answer.candidates)
    assert "ms a step are more than" in answer.left_out["BP009"]
