"""Orders to a run: go back, pause, be careful, halt; grow, cull. From Tamiyo at a boundary, or from a person.

A person's orders come as signed commands, like Tamiyo's, and are checked like hers. What concerns the whole run is
followed between two steps; what concerns a seed waits for the boundary (`waiting`). Seed commands are handed to
Kasmina, but for a germination while the run is conservative.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CommandType, EmergencyLevel
from esper_ray.contracts.messages import AdaptationCommand
from esper_ray.errors import ContractError
from esper_ray.tolaria import recovery
from esper_ray.tolaria.rollback import Undo
from esper_ray.tolaria.waiting import WaitingOrders, too_careful

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Trainer

_PAUSED_SECONDS = 0.05


class Orders:
    """One run's orders. `look` is called between two steps, `apply` at a boundary, `settle` after it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.waiting = WaitingOrders(trainer)
        self.paused = False
        self._undo: Undo | None = None
        self._halt = ""

    def look(self) -> None:
        """Follow what persons ordered since the last step; returns when the run is not paused.

        Raises:
            Undo: the run shall go back.
            RunError: it shall halt.
        """
        while True:
            for data in self._trainer.around.orders():
                self._follow(data)
            self.settle(at_once=True)
            if not self.paused or self._trainer.around.should_stop():
                return
            time.sleep(_PAUSED_SECONDS)

    def apply(self, command: AdaptationCommand) -> str:
        """Carry out one command of a boundary; returns why it was refused, or an empty text."""
        trainer = self._trainer
        if command.type is CommandType.SEED:
            reason = too_careful(trainer, command)
            return self.refuse(command, reason) if reason else trainer.garden.apply(command)
        return self._whole_run(command)

    def settle(self, *, at_once: bool = False) -> None:
        """Do what was ordered for after the boundary, or between two steps with ``at_once``.

        Raises:
            Undo: with ``at_once``, the run shall go back.
            RunError: it shall halt.
        """
        if self._halt:
            raise recovery.halted(self._trainer, self._halt)
        if self._undo is not None:
            undo, self._undo = self._undo, None
            if at_once:
                raise undo
            recovery.go_back(self._trainer, undo)

    def refused(self, undo: Undo, why: str) -> None:
        """A rollback could not be done; training goes on."""
        self._trainer.garden.note("refusal", slot=0, seed=0, operation="ROLLBACK", reason=f"{undo.origin}: {why}")

    def _follow(self, data: bytes) -> None:
        trainer = self._trainer
        try:
            envelope = trainer.verifier.open_direct(data, BusMessageType.ADAPTATION_COMMAND)
            trainer.recorder.record_nonce(envelope.nonce)
            command = codec.decode_command(envelope.payload)
        except ContractError as fault:
            trainer.garden.note("refusal", slot=0, seed=0, operation="", reason=f"{fault.reason}: {fault}")
            return
        if command.run != trainer.request.run:
            self.refuse(command, f"it is for the run {command.run}")
        elif command.type is CommandType.SEED:
            self.waiting.take_up(command, data)
        else:
            self._whole_run(command)

    def _whole_run(self, command: AdaptationCommand) -> str:
        why = command.annotations.get("why", "")
        if command.type is CommandType.ROLLBACK and command.rollback is not None:
            full = command.annotations.get("how") == "full"
            to = None if command.annotations.get("to") == "last" else command.rollback.epoch
            self._undo = Undo(why or "ordered", origin=command.issued_by, to_epoch=to, full=full, damage=False)
        elif command.type is CommandType.PAUSE and command.pause is not None:
            self.paused = command.pause.paused
            self._trainer.around.on_progress({"state": "paused" if self.paused else "training"})
        elif command.type is CommandType.EMERGENCY and command.emergency is not None:
            self._emergency(command.emergency.level, command.emergency.reason or why, command.issued_by)
        else:
            return self.refuse(command, f"{command.type.name} is nothing that a run can follow")
        return ""

    def _emergency(self, level: EmergencyLevel, reason: str, author: str) -> None:
        if level is EmergencyLevel.HALT:
            self._halt = f"{author}: {reason}"
        else:
            self._trainer.emergency.raise_to(level, f"{author}: {reason}")

    def refuse(self, command: AdaptationCommand, reason: str) -> str:
        """Tell that a command was not followed, and why; returns the reason."""
        operation = command.seed_directive.operation.name if command.seed_directive else command.type.name
        self._trainer.garden.note("refusal", slot=command.slot, seed=command.seed, operation=operation, reason=reason)
        return reason
