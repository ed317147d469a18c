"""The queue of wanted runs: one active, the rest wait; what it answered survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_ray.errors import RunError
from esper_ray.reliability.journal import Journal
from esper_ray.reliability.runqueue import RunQueue

ALL = ("grown", "host", "final")


@pytest.fixture
def queue(tmp_path: Path) -> RunQueue:
    return RunQueue(Journal(tmp_path / "s.db"))


def reopened(tmp_path: Path) -> RunQueue:
    return RunQueue(Journal(tmp_path / "s.db"))


def current(queue: RunQueue) -> str:
    arm = queue.current()
    assert arm is not None
    return arm.run_id


def finish(queue: RunQueue) -> None:
    arm = current(queue)
    queue.started(arm)
    queue.ended(arm, "finished", result={"test_accuracy": 0.5})


def test_the_same_request_gives_the_same_run_even_after_a_restart(queue: RunQueue, tmp_path: Path) -> None:
    queue.submit("q1", "r1", {}, arms=("grown",))

    assert queue.submit("q1", "r2", {}, arms=("grown",)) == "r1"
    assert reopened(tmp_path).submit("q1", "r3", {}, arms=("grown",)) == "r1"


def test_a_comparison_trains_its_arms_one_after_the_other(queue: RunQueue) -> None:
    queue.submit("q1", "r1", {}, arms=ALL)
    order = []
    while (arm := queue.current()) is not None:
        order.append((arm.run_id, arm.arm, arm.reference))
        finish(queue)

    assert order == [("r1", "grown", None), ("r1-host", "host", None), ("r1-final", "final", "r1")]
    assert queue.find("r1-host").state == "finished"


def test_a_further_run_waits_and_knows_its_place(queue: RunQueue) -> None:
    for number in (1, 2, 3):
        queue.submit(f"q{number}", f"r{number}", {}, arms=("grown",))
    assert [queue.position(run) for run in ("r1", "r2", "r3")] == [0, 1, 2]

    queue.stop("r2")
    finish(queue)

    assert queue.find("r2").state == "stopped"
    assert [queue.position(run) for run in ("r1", "r2", "r3")] == [-1, -1, 0]
    assert current(queue) == "r3"


def test_results_and_running_arms_survive_a_restart(queue: RunQueue, tmp_path: Path) -> None:
    queue.submit("q1", "r1", {"run": {"seed": 4}}, arms=ALL)
    finish(queue)
    queue.started("r1-host")

    again = reopened(tmp_path)

    run = again.find("r1")
    assert [arm.state for arm in run.arms] == ["finished", "running", "waiting"]
    assert run.arms[0].result == {"test_accuracy": 0.5}
    assert run.config == {"run": {"seed": 4}}
    assert current(again) == "r1-host"


def test_an_arm_whose_process_died_is_resumed(queue: RunQueue) -> None:
    queue.submit("q1", "r1", {}, arms=("grown",))
    queue.started("r1")

    assert queue.lost("r1", epoch=4, why="killed") == "waiting"

    arm = queue.current()
    assert arm is not None
    assert arm.resume


def test_an_arm_that_dies_again_and_again_without_progress_fails(queue: RunQueue) -> None:
    queue.submit("q1", "r1", {}, arms=("grown",))
    states = []
    for epoch in (1, 2, 2, 2):
        queue.started("r1")
        states.append(queue.lost("r1", epoch=epoch, why="out of memory"))

    assert states == ["waiting", "waiting", "waiting", "failed"]
    error = queue.find("r1").arms[0].error
    assert error is not None
    assert error["why"] == "out of memory"


def test_a_failed_arm_ends_its_run_for_the_others_refer_to_it(queue: RunQueue) -> None:
    queue.submit("q1", "r1", {}, arms=ALL)
    queue.started("r1")
    queue.ended("r1", "failed", error={"what": "x", "why": "", "remedy": ""})

    assert queue.find("r1").state == "failed"
    assert queue.current() is None


def test_a_stopped_run_is_resumed_where_it_was(queue: RunQueue, tmp_path: Path) -> None:
    queue.submit("q1", "r1", {}, arms=ALL)
    finish(queue)
    queue.started("r1-host")
    queue.stop("r1")
    assert queue.find("r1").state == "running"
    queue.ended("r1-host", "stopped")
    assert queue.find("r1").state == "stopped"

    queue.resume("q2", "r1-host")

    for view in (queue, reopened(tmp_path)):
        run = view.find("r1")
        assert [(arm.state, arm.resume) for arm in run.arms] == [
            ("finished", False),
            ("waiting", True),
            ("waiting", False),
        ]


def test_what_cannot_be_resumed_is_refused_with_the_reason(queue: RunQueue) -> None:
    queue.submit("q1", "r1", {}, arms=("grown",))
    with pytest.raises(RunError, match="queued already"):
        queue.resume("q2", "r1")
    finish(queue)
    with pytest.raises(RunError, match="is finished"):
        queue.resume("q2", "r1")
    with pytest.raises(RunError, match="no run r9"):
        queue.resume("q2", "r9")


def test_an_unknown_arm_is_refused(queue: RunQueue) -> None:
    with pytest.raises(RunError, match="grown, host, final"):
        queue.submit("q1", "r1", {}, arms=("giant",))


def test_a_system_that_starts_afresh_does_not_train_yesterdays_runs(queue: RunQueue, tmp_path: Path) -> None:
    queue.submit("q1", "r1", {}, arms=ALL)
    queue.started("r1")
    queue.submit("q2", "r2", {}, arms=("grown",))

    again = reopened(tmp_path)
    assert again.interrupt() == ["r1", "r2"]

    assert again.current() is None
    assert [run.state for run in again.runs()] == ["stopped", "stopped"]
    again.resume("q3", "r1")
    assert current(again) == "r1"


def test_a_run_folder_from_elsewhere_is_taken_up(queue: RunQueue) -> None:
    assert not queue.knows("r7")
    queue.adopt("q1", "r7", {}, arm="host")

    arm = queue.current()
    assert arm is not None
    assert (arm.run_id, arm.arm, arm.resume) == ("r7", "host", True)
