"""The policies of a home folder: which there are, which were validated, which one decides. No torch here.

Training and validating make a policy ready; promoting it is a person's command, and so is going back.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_ray.contracts import learning
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import PolicyUpdate
from esper_ray.errors import PolicyRefused
from esper_ray.reliability import atomic
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.tamiyo.seat import HEURISTIC, POLICIES, note_promotion, promotions

_CARD, _VALIDATION = "policy.json", "validation.json"
Publish = Callable[[BusMessageType, bytes], None]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy as `esper policy list` shows it."""

    policy_id: str
    parent_id: str
    created_at: str
    digest: str
    summary: dict[str, Any]
    validation: dict[str, Any]
    promoted: bool


def rows(home: Path) -> list[PolicyRow]:
    """All policies, the newest first."""
    past = promotions(home)
    now = past[-1].policy_id if past else HEURISTIC
    found = [_row(folder, now) for folder in (home / POLICIES).glob("*/") if (folder / _CARD).exists()]
    return sorted(found, key=lambda row: row.created_at, reverse=True)


def _row(folder: Path, now: str) -> PolicyRow:
    card = json.loads((folder / _CARD).read_text())
    return PolicyRow(
        policy_id=folder.name,
        parent_id=str(card.get("parent_id") or ""),
        created_at=str(card.get("created_at", "")),
        digest=str(card.get("digest", "")),
        summary=dict(card.get("training") or {}),
        validation=validation_of(folder),
        promoted=folder.name == now,
    )


def find(home: Path, policy_id: str) -> PolicyRow:
    """The policy of that id, or of the only id that begins so.

    Raises:
        PolicyRefused: there is none, or there are several.
    """
    known = rows(home)
    exact = [row for row in known if row.policy_id == policy_id]
    matching = exact or [row for row in known if policy_id and row.policy_id.startswith(policy_id)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise PolicyRefused(
            f"{policy_id!r} may mean {', '.join(row.policy_id for row in matching)}.",
            remedy="Give more of the id.",
            reason="missing",
        )
    near = difflib.get_close_matches(policy_id, [row.policy_id for row in known], n=1)
    raise PolicyRefused(
        f"There is no policy {policy_id!r}.",
        remedy=f"Did you mean {near[0]}?" if near else "See `esper policy list`.",
        reason="missing",
    )


def validation_of(folder: Path) -> dict[str, Any]:
    """What validating the policy of a folder found; empty where it was not done."""
    file = folder / _VALIDATION
    return dict(json.loads(file.read_text())) if file.exists() else {}


def note_validation(home: Path, policy_id: str, verdict: dict[str, Any]) -> None:
    """Keep what validating found, beside the policy."""
    atomic.write_text(home / POLICIES / policy_id / _VALIDATION, json.dumps(verdict, indent=1))


def promote(home: Path, policy_id: str, publish: Publish | None, *, clock: Clock = SYSTEM_CLOCK) -> PolicyUpdate:
    """Let a validated policy decide where a run's controller is auto.

    Args:
        publish: tells a running Tamiyo; without one it is found when Tamiyo starts.

    Raises:
        PolicyRefused: it does not exist, was not validated as it is now, did not pass, or decides already.
    """
    row = find(home, policy_id)
    verdict = row.validation
    if not verdict or verdict.get("digest") != row.digest:
        raise PolicyRefused(
            f"{row.policy_id} was not validated.",
            why="It was changed since." if verdict else "",
            remedy=f"Run `esper policy validate {row.policy_id}` first.",
            reason="not_validated",
        )
    if not verdict.get("passed"):
        failed = ", ".join(gate["name"] for gate in verdict.get("gates", ()) if not gate["passed"])
        raise PolicyRefused(
            f"{row.policy_id} did not pass its validation.",
            why=f"Gates that it failed: {failed}.",
            reason="not_validated",
        )
    if row.promoted:
        raise PolicyRefused(f"{row.policy_id} is the promoted policy already.", reason="missing")
    past = promotions(home)
    update = PolicyUpdate(
        policy_id=row.policy_id,
        parent_policy_id=past[-1].policy_id if past else HEURISTIC,
        artifact_digest=row.digest,
        issued_at_ns=clock.now_ns(),
        validation={key: float(value) for key, value in verdict.get("figures", {}).items()},
    )
    return _make_it_so(home, update, publish)


def rollback(home: Path, publish: Publish | None, *, clock: Clock = SYSTEM_CLOCK) -> PolicyUpdate:
    """Go back to what decided before the promoted policy did: another policy, or the heuristic.

    Raises:
        PolicyRefused: nothing is promoted.
    """
    past = promotions(home)
    if not past or past[-1].policy_id == HEURISTIC:
        raise PolicyRefused("No policy is promoted: the heuristic decides.", reason="missing")
    now = past[-1]
    before = next((each for each in reversed(past) if each.policy_id == now.parent_policy_id), None)
    update = PolicyUpdate(
        policy_id=now.parent_policy_id,
        parent_policy_id=before.parent_policy_id if before else HEURISTIC,
        artifact_digest=before.artifact_digest if before else "",
        issued_at_ns=clock.now_ns(),
        validation=before.validation if before else {},
    )
    return _make_it_so(home, update, publish)


def _make_it_so(home: Path, update: PolicyUpdate, publish: Publish | None) -> PolicyUpdate:
    note_promotion(home, update)
    if publish is not None:
        publish(BusMessageType.POLICY_UPDATE, learning.encode_policy_update(update))
    return update
