"""From proposals to commands, and what the run is asked for where its risk is RED."""

from __future__ import annotations

from typing import Any

from esper_ray.contracts.budgets import DECIDE_MS
from esper_ray.contracts.enums import CommandType, EmergencyLevel, RiskLevel
from esper_ray.contracts.messages import (
    AdaptationCommand,
    EmergencyDirective,
    PauseDirective,
    RollbackDirective,
    SeedDirective,
)
from esper_ray.reliability.ids import derive_seed
from esper_ray.tamiyo.risk import WINDOWS
from esper_ray.tamiyo.view import Proposal, RunView

RISK = "risk"
_LONGEST_REASON, _SHORT_REASON = 60, 32


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
        annotations=_reasons(view, proposal),
    )


def orders(view: RunView, *, issued_at_ns: int) -> list[AdaptationCommand]:
    """What is asked of the whole run at this boundary: nothing, but where this boundary shows damage.

    It is asked to go back to its last calm epoch, or to wait for a person (``tamiyo.on_red``), and where the risk is
    CRITICAL to be conservative. It is not sent back a second time within three epochs.
    """
    risk, now = view.risk, view.now
    if risk.fresh < RiskLevel.RED:
        return []
    wanted: list[dict[str, Any]] = []
    if risk.fresh is RiskLevel.CRITICAL:
        directive = EmergencyDirective(EmergencyLevel.CONSERVATIVE, risk.why[:_LONGEST_REASON])
        wanted.append({"type": CommandType.EMERGENCY, "emergency": directive})
    to = view.watch.calm_before(now.epoch)
    if view.config.on_red == "pause":
        wanted.append({"type": CommandType.PAUSE, "pause": PauseDirective(True)})
    elif to > 0 and (view.turned is None or now.epoch - view.turned > WINDOWS):
        wanted.append({"type": CommandType.ROLLBACK, "rollback": RollbackDirective(to)})
    return [
        AdaptationCommand(
            command_id=derive_seed(now.run, "risk", now.branch, now.epoch, place),
            run=now.run,
            epoch=now.epoch,
            branch=now.branch,
            issued_at_ns=issued_at_ns,
            issued_by=RISK,
            deadline_ms=DECIDE_MS.limit,
            annotations={"why": risk.why[:_LONGEST_REASON]},
            **each,
        )
        for place, each in enumerate(wanted)
    ]


def _reasons(view: RunView, proposal: Proposal | None) -> dict[str, str]:
    """Why this is done, and what the risk allows; where nothing is, why not. Both fit into one message."""
    room = _SHORT_REASON if proposal else _LONGEST_REASON
    risk = {} if view.risk.level is RiskLevel.GREEN else {"risk": view.risk.why[:room]}
    return ({"why": proposal.why[:_LONGEST_REASON]} if proposal else {}) | risk
