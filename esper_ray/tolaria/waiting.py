"""What persons decided about seeds: taken up between two steps, carried out at the next boundary.

They are carried out before Tamiyo is asked, so that she decides on what is left; she is told of them, and reports on
what they led to as on her own. An order that was taken up is in the run's journal: a run that is killed and resumed
carries it out at the same boundary, once. What a rollback took back is not carried out again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from esper_ray.contracts import codec
from esper_ray.contracts.budgets import MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import AdaptationCommand
from esper_ray.kasmina import orders as kasmina
from esper_ray.tolaria import rows

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Trainer

_REMEMBERED = 16


class WaitingOrders:
    """One run's."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # Command -> branch and epoch of its first possible boundary, and the command.
        self._known: dict[int, tuple[int, int, AdaptationCommand]] = {}
        self._planned: dict[tuple[int, int], list[int]] = {}
        self._told: dict[str, dict[str, Any]] = {}

    def load(self) -> None:
        """What an earlier life of the run took up and carried out."""
        recorder = self._trainer.recorder
        self._planned = recorder.carried_out()
        self._known = {
            number: (branch, epoch, codec.decode_command(codec.decode_envelope(data).payload))
            for number, (branch, epoch, data) in recorder.orders().items()
        }

    def take_up(self, command: AdaptationCommand, data: bytes) -> None:
        """Let an order wait for the next boundary, or refuse it by what is known now; the same one twice is one."""
        trainer = self._trainer
        if command.command_id in self._known:
            return
        reason = self._objection(command)
        if reason:
            trainer.orders.refuse(command, reason)
            self._tell(command, "refused", reason)
            return
        place = (trainer.garden.branch, trainer.epoch + 1)
        trainer.recorder.record_order(command.command_id, *place, data)
        self._known[command.command_id] = (*place, command)
        self._tell(command, "waiting", "")

    def carry_out(self) -> list[bytes]:
        """Carry out what waits for this boundary; returns the commands that took effect, as Tamiyo gets them."""
        trainer = self._trainer
        place = (trainer.garden.branch, trainer.epoch)
        due = self._planned.get(place)
        if due is None:
            done = {number for numbers in self._planned.values() for number in numbers}
            due = [
                number for number, (*first, _) in self._known.items() if number not in done and tuple(first) <= place
            ]
            if not due:
                return []
            trainer.recorder.record_carried_out(*place, due)
            self._planned[place] = due
        effective = []
        for command in (self._known[number][2] for number in due):
            named = self._named(command)
            reason = trainer.orders.apply(command)
            self._note(named, reason)
            if not reason:
                effective.append(codec.encode_command(command))
        return effective

    def _open(self) -> list[tuple[int, tuple[int, int, AdaptationCommand]]]:
        """What no boundary has carried out yet."""
        done = {number for numbers in self._planned.values() for number in numbers}
        return [(number, each) for number, each in self._known.items() if number not in done]

    def _objection(self, command: AdaptationCommand) -> str:
        trainer = self._trainer
        waiting = [each for _, (*_, each) in self._open()]
        if len(waiting) >= MAX_COMMANDS_PER_BOUNDARY:
            return f"{len(waiting)} orders wait for this boundary already"
        if any(each.slot == command.slot for each in waiting):
            return "another order for that slot waits for this boundary already"
        return too_careful(trainer, command) or kasmina.refusal(trainer.garden, command)

    def _named(self, command: AdaptationCommand) -> AdaptationCommand:
        """The command with the block that it concerns, for the telling: a cull names its slot alone."""
        directive, slots = command.seed_directive, self._trainer.garden.slots
        seed = slots[command.slot].seed if command.slot < len(slots) else None
        if directive is None or directive.blueprint or seed is None:
            return command
        return replace(command, seed_directive=replace(directive, blueprint=seed.blueprint))

    def _note(self, command: AdaptationCommand, reason: str) -> None:
        why = command.annotations.get("why", "") or f"decided by {command.issued_by}"
        row = rows.decided([command], why=why, refused=[reason] if reason else [])
        self._trainer.garden.note(**row)
        self._tell(command, "refused" if reason else "done", reason)

    def _tell(self, command: AdaptationCommand, state: str, why: str) -> None:
        """Let whoever gave the order see what became of it."""
        trainer = self._trainer
        self._told[str(command.command_id)] = {"state": state, "why": why, "epoch": trainer.epoch}
        for oldest in list(self._told)[:-_REMEMBERED]:
            del self._told[oldest]
        trainer.around.on_progress({"orders": dict(self._told)})


def too_careful(trainer: Trainer, command: AdaptationCommand) -> str:
    """Why nothing may grow now, for a germination; else an empty text."""
    directive = command.seed_directive
    if trainer.emergency.conservative and directive and directive.operation is SeedOperation.GERMINATE:
        return "the run is conservative after damage: nothing may grow for a time"
    return ""
