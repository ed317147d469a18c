"""What a run does about trouble: goes back after damage, takes its checkpoints, halts when nothing helps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from esper_ray.contracts.enums import EmergencyLevel as Level
from esper_ray.contracts.messages import MetricPoint
from esper_ray.errors import CheckpointError, EsperError, RunError
from esper_ray.reliability.failpoints import passing
from esper_ray.tolaria import resume, rows
from esper_ray.tolaria.rollback import Times, Turn, Undo, as_event, open_branch, roll_back

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Trainer


def go_back(trainer: Trainer, undo: Undo) -> None:
    """Undo what came after an earlier epoch, or halt.

    A person's order that cannot be followed is refused, told, and training goes on.

    Raises:
        RunError: that was one failed epoch too many, or there is nothing to go back to.
        StorageFault: the rollback could not be written down.
    """
    over = undo.last = undo.damage and trainer.emergency.epoch_failed(Level.CONSERVATIVE, undo.reason)
    try:
        turn, times = roll_back(trainer, undo)
    except CheckpointError as fault:
        if undo.damage:
            raise halted(trainer, f"{undo.reason}, and the way back is closed: {fault}") from fault
        trainer.orders.refused(undo, str(fault))
        return
    open_branch(trainer, turn)
    finish_turn(trainer, turn, times)
    if not undo.damage:
        trainer.emergency.raise_to(Level.ELEVATED, f"back to epoch {turn.to_epoch} by order of {turn.origin}")
    late = times.overdue(full=turn.full)
    if late:
        trainer.emergency.raise_to(Level.ELEVATED, f"the rollback took longer than its deadline: {late}")
    if over:
        raise halted(trainer, undo.reason, told=True)


def finish_turn(trainer: Trainer, turn: Turn, times: Times) -> None:
    """The rest, after Tamiyo, Kasmina and Tolaria: files, checkpoints, whoever watches."""
    passing("rollback.opened")
    trainer.recorder.rewind(turn.to_epoch, undone_by=turn.branch)
    passing("rollback.rewound")
    trainer.memory.forget_after(turn.to_epoch - 1)
    trainer.writer.forget_after(turn.to_epoch)
    _keep(trainer)
    points = [MetricPoint("rt", getattr(times, part), {"part": part}) for part in ("prepare", "commit", "confirm")]
    tell_turn(trainer, as_event(turn, times), points)
    trainer.around.on_progress(rows.progress(trainer))


def tell_turn(trainer: Trainer, row: Mapping[str, Any], points: Iterable[MetricPoint] = ()) -> None:
    """A rollback is done: to the files and to the bus, once."""
    trainer.recorder.incident(
        {**row, "step": trainer.step}, [MetricPoint("ro", 1.0, {"how": str(row["how"])}), *points]
    )


def _keep(trainer: Trainer) -> None:
    """The run as it stands, in memory and on its way to disk."""
    start = time.perf_counter()
    state = resume.checkpoint(trainer).copied()
    trainer.memory.keep(state)
    trainer.writer.submit(state)
    trainer.checkpoint_ms = (time.perf_counter() - start) * 1e3


def epoch_over(trainer: Trainer, *, missed: bool) -> None:
    """Checkpoint the epoch, and count it as passed, or as failed where an earlier one could not be kept.

    Raises:
        RunError: so many could not be kept that going on is no longer safe.
    """
    trainer.emergency.decision(missed)
    lost = tell_failures(trainer)
    if lost:
        if trainer.emergency.epoch_failed(Level.ELEVATED, lost):
            _keep(trainer)
            raise halted(trainer, lost, told=True)
    elif trainer.emergency.epoch_passed():
        trainer.rates.factor = 1.0
    _keep(trainer)


def tell_failures(trainer: Trainer) -> str:
    """Tell of checkpoints that could not be written; the last reason, or an empty text."""
    reason = ""
    for fault in trainer.writer.failures():
        why = fault.why if isinstance(fault, EsperError) else f"{type(fault).__name__}: {fault}"
        reason = f"a checkpoint could not be written: {why}"
        checkpoint_lost(trainer, reason)
    return reason


def checkpoint_lost(trainer: Trainer, reason: str) -> None:
    """One checkpoint less than there should be."""
    place: dict[str, Any] = {"branch": trainer.garden.branch, "epoch": trainer.epoch, "step": trainer.step}
    row = {"kind": "checkpoint", "id": f"checkpoint/{place['branch']}/{place['step']}", **place, "reason": reason}
    trainer.recorder.incident(row, [MetricPoint("ck", 1.0)])


def halted(trainer: Trainer, reason: str, *, told: bool = False) -> RunError:
    """End the run: whatever is on its way to disk is written first. Returns the error to raise."""
    trainer.writer.finish()
    if not told:
        trainer.emergency.raise_to(Level.HALT, reason)
    return RunError(
        f"{trainer.request.run} was halted after epoch {trainer.epoch}.",
        why=f"{reason[:1].upper()}{reason[1:]}.",
        remedy="Look at the data and at optimizer.learning_rate; the last checkpoint stands, and "
        "`esper run --resume` goes on from it.",
    )
