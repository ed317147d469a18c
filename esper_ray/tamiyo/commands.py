"""From proposals to commands."""

from __future__ import annotations

from esper_ray.contracts.budgets import DECIDE_MS
from esper_ray.contracts.enums import CommandType
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.reliability.ids import derive_seed
from esper_ray.tamiyo.view import Proposal, RunView

_LONGEST_REASON = 60


def command(
    view: RunView, proposal: Proposal | None, *, place: int, issued_by: str, issued_at_ns: int
) -> AdaptationCommand:
    """The command for one proposal of the boundary ``view.now``; without one, a NO_OP.

    Args:
        place: which micro-step of the boundary it is, from 0; names the command.
    """
    now = view.now
    directive = None
    if proposal is not None:
        directive = SeedDirective(
            proposal.operation,
            blueprint=proposal.blueprint,
            blend_mode=proposal.blend_mode,
            blend_schedule=proposal.schedule,
        )
    return AdaptationCommand(
        command_id=derive_seed(now.run, "command", now.branch, now.epoch, place),
        type=CommandType.SEED if proposal else CommandType.NO_OP,
        run=now.run,
        epoch=now.epoch,
        branch=now.branch,
        issued_at_ns=issued_at_ns,
        issued_by=issued_by,
        slot=proposal.slot if proposal else 0,
        seed=proposal.seed if proposal else 0,
        deadline_ms=DECIDE_MS.limit,
        seed_directive=directive,
        annotations={"why": proposal.why[:_LONGEST_REASON]} if proposal else {},
    )
