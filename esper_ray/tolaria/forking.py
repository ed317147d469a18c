"""How a fork begins: as its parent stood after a boundary, and then as somebody else would have decided there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from esper_ray.contracts import codec
from esper_ray.contracts.messages import AdaptationCommand
from esper_ray.errors import CheckpointError, RunError
from esper_ray.kasmina import orders as kasmina
from esper_ray.reliability import atomic
from esper_ray.tolaria import by_hand, forks, resume, rows
from esper_ray.tolaria import checkpoint as checkpoints
from esper_ray.tolaria.checkpoint import Checkpoint
from esper_ray.tolaria.forks import ORIGIN, ROWS, Fork

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Trainer


def origin(trainer: Trainer, fork: Fork) -> Checkpoint:
    """The parent's checkpoint under the new run's name.

    Raises:
        CheckpointError: it is damaged, or is another run's.
    """
    saved = checkpoints.read(trainer.folder / ORIGIN, fork.epoch)
    if saved.data["run"] != fork.parent:
        raise CheckpointError(
            f"The checkpoint of epoch {fork.epoch} belongs to {saved.data['run']}, not to {fork.parent}."
        )
    return Checkpoint(saved.epoch, {**saved.data, "run": trainer.request.run}, saved.tensors)


def decide(trainer: Trainer, fork: Fork) -> list[AdaptationCommand]:
    """Begin otherwise than the parent, where that is wanted, and be a run of one's own on disk; returns the commands.

    The germinations of that boundary are taken back; a cull or a fossil of it stays, for what it was is gone.

    Raises:
        RunError: a decision is refused; the text says why.
    """
    config, now = trainer.config, trainer.around.clock.now_ns()
    taken_back = kasmina.take_back(trainer.garden) if fork.decide else []
    commands = []
    for text in fork.decide:
        command = by_hand.command(
            by_hand.parse(text), trainer.task.slots, run=trainer.request.run, author=fork.author, now_ns=now,
            approved=config.seeds.approved, why=f"in the place of what {fork.parent} decided",
        )  # fmt: skip
        reason = trainer.orders.apply(command)
        if reason:
            raise RunError(f"The fork cannot begin with {text!r}.", why=f"{reason[:1].upper()}{reason[1:]}.")
        commands.append(command)
    _write_rows(trainer, fork, set(taken_back), commands)
    checkpoints.write(trainer.folder / "checkpoints", resume.checkpoint(trainer).copied())
    return commands


def told(commands: Iterable[AdaptationCommand]) -> tuple[str, ...]:
    """The commands as an opening has them."""
    return tuple(codec.encode_command(command).hex() for command in commands)


def _write_rows(trainer: Trainer, fork: Fork, taken_back: set[int], commands: list[AdaptationCommand]) -> None:
    """The parent's rows up to the fork, without what was taken back, and what was decided instead."""
    for name in ROWS:
        found = forks.rows_until(trainer.folder / ORIGIN / name, fork.epoch)
        if name == "events.jsonl":
            found = [kept for row in found if (kept := _without(row, fork.epoch, taken_back))]
            made = trainer.garden.drain_events()
            made += [rows.decided([each], why=each.annotations["why"], refused=[]) for each in commands]
            own = [{"epoch": fork.epoch, "step": trainer.step, **row} for row in made]
            trainer.recorder.tell(fork.epoch, own)
            found += own
        atomic.write_text(trainer.folder / name, "".join(f"{json.dumps(row)}\n" for row in found))


def _without(row: dict[str, Any], epoch: int, slots: set[int]) -> dict[str, Any] | None:
    """An event of the parent, or what is left of it when the germinations of that boundary are taken back."""
    if int(row["epoch"]) != epoch or not slots:
        return row
    if row.get("kind") in ("stage", "gate") and row.get("to") == "GERMINATED" and row.get("slot") in slots:
        return None
    if row.get("kind") != "decision":
        return row
    left = [each for each in row["commands"] if each["operation"] != "GERMINATE" or each["slot"] not in slots]
    return {**row, "commands": left} if left else None
