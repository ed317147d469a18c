"""Which learned policy decides. A promoted one is checked here and waits; it takes over between two boundaries.

The file ``policies/promoted.json`` in the home folder says which one is promoted, so that a restarted Tamiyo goes on
with it. One that cannot be used decides nothing: the one before it, or the heuristic, stays.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from esper_ray.contracts.messages import PolicyUpdate
from esper_ray.errors import PolicyRefused
from esper_ray.reliability import atomic
from esper_ray.tamiyo.brains import LearnedBrain
from esper_ray.tamiyo.view import RunView

log = logging.getLogger(__name__)
POLICIES = "policies"
HEURISTIC = "heuristic"
_PROMOTED = "promoted.json"


def promotions(home: Path) -> list[PolicyUpdate]:
    """Every promotion and rollback so far, the newest last."""
    file = home / POLICIES / _PROMOTED
    if not file.exists():
        return []
    return [PolicyUpdate(**row) for row in json.loads(file.read_text())]


def note_promotion(home: Path, update: PolicyUpdate) -> None:
    """Make it the newest; durable when this returns."""
    rows = [{name: getattr(each, name) for name in PolicyUpdate.__slots__} for each in (*promotions(home), update)]
    atomic.write_text(atomic.make_folder(home / POLICIES) / _PROMOTED, json.dumps(rows, indent=1))


class PolicySeat:
    """Holds the policy that decides, the one before it, and one that was offered. Safe for threads.

    Attributes:
        fault: why the promoted policy could not be taken at the start, None where it could.
    """

    def __init__(self, home: Path | None) -> None:
        self._home, self._lock = home, threading.Lock()
        self.current: LearnedBrain | None = None
        self.previous: LearnedBrain | None = None
        self.refused, self.promoted = "", HEURISTIC
        self.fault: PolicyRefused | None = None
        self._offered: tuple[LearnedBrain | None] | None = None
        self._newest_ns = 0
        self._pinned: dict[str, LearnedBrain] = {}
        past = promotions(home) if home is not None else []
        if past:
            self.promoted = past[-1].policy_id
            try:
                self.offer(past[-1], ())
                self.take_over()
            except PolicyRefused as fault:
                self.refused, self.fault = str(fault), fault
                log.warning("the promoted policy cannot be used, the heuristic decides: %s", fault)

    def offer(self, update: PolicyUpdate, views: Sequence[RunView]) -> None:
        """Load and check a policy and let it wait for the next boundary.

        One issued before the newest that was offered changes nothing: the bus may bring a message late, and again.

        Args:
            views: runs at whose last boundary it must decide legally, without effect: the shadow run.

        Raises:
            PolicyRefused: it is missing, damaged, foreign, or decides what is not legal.
        """
        if update.issued_at_ns < self._newest_ns:
            log.info("the promotion of %s came after a later one and changes nothing", update.policy_id)
            return
        self._newest_ns = update.issued_at_ns
        brain = None
        if update.artifact_digest:
            brain = self._load(update.policy_id, update.artifact_digest)
            for view in views:
                # A copy, for the run goes on meanwhile. An illegal decision raises.
                brain.steps(replace(view, states=list(view.states), memo={}))
        with self._lock:
            self._offered = (brain,)

    def take_over(self) -> bool:
        """Let the policy that was offered decide from now on; whether there was one."""
        with self._lock:
            if self._offered is None:
                return False
            self.previous, self.current = self.current, self._offered[0]
            self._offered, self.refused = None, ""
            return True

    def describe(self) -> dict[str, str]:
        """Who decides where a run leaves it open, who before, who waits, and why one was refused."""
        with self._lock:
            waits = "" if self._offered is None else _name(self._offered[0])
            return {
                "decides": _name(self.current),
                "before": _name(self.previous),
                "waits": waits,
                "refused": self.refused,
            }

    def dismiss(self, why: str) -> None:
        """The policy that decides turned out to be unfit: the heuristic decides until another one is promoted."""
        with self._lock:
            self.current, self.refused = None, why
        log.warning("the promoted policy was dismissed, the heuristic decides: %s", why)

    def brain(self, policy_id: str) -> LearnedBrain:
        """The policy of that id, or the promoted one where it is empty.

        Raises:
            PolicyRefused: there is none, or it cannot be used.
        """
        if policy_id:
            if policy_id not in self._pinned:
                self._pinned[policy_id] = self._load(policy_id, "")
            return self._pinned[policy_id]
        if self.current is None:
            raise PolicyRefused(
                "No policy is promoted that could decide.",
                why=self.refused,
                remedy="Promote one with `esper policy promote ID`, name one with tamiyo.policy, or use "
                "tamiyo.controller=heuristic.",
                reason="missing",
            )
        return self.current

    def _load(self, policy_id: str, digest: str) -> LearnedBrain:
        if self._home is None:
            raise PolicyRefused("There is no home folder to load a policy from.", reason="missing")
        # torch is loaded with the first policy: until then this process stays small.
        from esper_ray.tamiyo import policy_store

        policy, metadata = policy_store.load(self._home, policy_id)
        if digest and metadata.digest != digest:
            raise PolicyRefused(
                f"The policy {policy_id} was refused.",
                why="It is not the one that was promoted: its digest differs.",
                remedy="Validate and promote it again.",
                reason="damaged",
            )
        brain = LearnedBrain(policy, policy_id)
        brain.warm_up()
        return brain


def _name(brain: LearnedBrain | None) -> str:
    return HEURISTIC if brain is None else brain.version
