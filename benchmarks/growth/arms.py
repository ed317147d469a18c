"""What is compared. An arm is a family of models, and the FLOPs that it may spend.

F is what the final-size model costs at the task's own number of steps. Every run is decayed to its own budget. What
spends a budget that is known beforehand has as many steps as it pays for; what grows costs what it turns out to, so
its boundaries are moved until its cost is within the budget, by as many trials as that takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm.

    Attributes:
        family: "host", "final", a controller that grows, a peer, or a search.
        share: of F that it may spend.
        like: the arm whose FLOPs, with the same random seed, it may spend. Without both: the task's own steps.
    """

    name: str
    family: str
    share: float | None = None
    like: str = ""


GROWING = ("grown", "random", "periodic", "learned")
PEERS = ("gradmax", "net2net", "gromo")
SEARCHES = ("asha", "grid")
CONTROLLER_OF: Mapping[str, str] = {
    "grown": "heuristic",
    "random": "random",
    "periodic": "periodic",
    "learned": "learned",
}


def _at(family: str, *shares: float) -> tuple[Arm, ...]:
    return tuple(Arm(f"{family}@{share:g}", family, share=share) for share in shares)


def _like_grown(*families: str) -> tuple[Arm, ...]:
    return tuple(Arm(f"{family}=grown", family, like="grown") for family in families)


HEADLINE = (
    Arm("final", "final"),
    Arm("host", "host"),
    Arm("grown", "grown"),
    *_at("final", 0.4, 0.6, 0.8),
    *_at("grown", 0.6),
    *_like_grown("final", "host", "random", "periodic"),
)
"""Run with as many random seeds as the task says."""
CURVES = (*_at("host", 0.1, 0.2, 0.4, 0.6), *_at("final", 0.1, 0.2), *_at("grown", 0.1, 0.2, 0.4, 0.8, 1.0))
OTHERS = (*_like_grown("gradmax", "net2net"), *_like_grown(*SEARCHES))
LEARNED = (Arm("learned=grown", "learned", like="grown"),)
"""Only where a policy was promoted."""
TABLES_ONLY = _like_grown("gromo")
"""Only where the task is a table and GroMo is installed."""
QUICK = ("final", "host", "grown", "final@0.6", "grown@0.6", "final=grown")
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*HEADLINE, *CURVES, *OTHERS, *LEARNED, *TABLES_ONLY)}


def needs(arm: Arm) -> tuple[str, ...]:
    """The arms of the same random seed whose cost says what this one may spend, or where its trials begin."""
    found = [] if arm.name == "final" or (arm.share is None and not arm.like) else ["final"]
    if arm.like:
        found.append(arm.like)
    if arm.family in GROWING and arm.share is not None:
        found.append(arm.family)
    if arm.family in PEERS:
        found.append("grown")
    return tuple(dict.fromkeys(each for each in found if each != arm.name))
