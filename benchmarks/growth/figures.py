"""Means, intervals and paired differences of a task's results; the decayed frontier and what it says of equal quality.

A quality is higher where a model is better: points of accuracy, or minus the bits of the test loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.growth.store import Row
from benchmarks.growth.tasks import StudyTask
from esper_ray.reliability.intervals import Interval, interval

BySeed = Mapping[int, Row]
ByArm = Mapping[str, BySeed]
TOLERATED = {"points": 0.3, "bits": 0.003}
"""How far below the final-size model's quality still counts as having reached it."""
FRONTIERS = {"host": "host", "final": "final", "grown": "grown"}


def quality(task: StudyTask, row: Row) -> float:
    return 100.0 * float(row["test_accuracy"]) if task.metric == "points" else -float(row["test_loss"]) / math.log(2)


@dataclass(frozen=True, slots=True)
class Summary:
    """An arm's mean quality with its interval, and the means of what it cost and held.

    Attributes:
        cost: FLOPs as a share of F of the same random seed.
    """

    arm: str
    quality: Interval
    cost: float
    largest_cost: float
    parameters: float
    born: float
    kept: float
    culled: float
    graft_ms: float
    processor_seconds: float
    peak_mb: float | None
    trials: float


def summary(task: StudyTask, arms: ByArm, arm: str) -> Summary:
    rows = list(arms[arm].values())
    costs = [share(arms, arm, seed) for seed in arms[arm] if seed in arms["final"]]
    peaks = [float(row["peak_mb"]) for row in rows if row.get("peak_mb")]

    def mean(key: str) -> float:
        return statistics.fmean(float(row.get(key) or 0.0) for row in rows)

    return Summary(
        arm=arm,
        quality=interval([quality(task, row) for row in rows]),
        cost=statistics.fmean(costs),
        largest_cost=max(costs),
        parameters=mean("parameters"),
        born=mean("born"),
        kept=mean("fossilized") if arm not in ("final",) else 0.0,
        culled=mean("culled"),
        graft_ms=mean("graft_ms"),
        processor_seconds=mean("processor_seconds"),
        peak_mb=statistics.fmean(peaks) if peaks else None,
        trials=mean("trials"),
    )


def share(arms: ByArm, arm: str, seed: int) -> float:
    """FLOPs of that run over F of the same random seed."""
    return float(arms[arm][seed]["flops"]) / float(arms["final"][seed]["flops"])


def paired(task: StudyTask, arms: ByArm, one: str, other: str) -> Interval | None:
    """Quality of ``one`` less that of ``other``, over the seeds that have both; None where there are none."""
    if one not in arms or other not in arms:
        return None
    seeds = sorted(arms[one].keys() & arms[other].keys())
    gains = [quality(task, arms[one][seed]) - quality(task, arms[other][seed]) for seed in seeds]
    return interval(gains) if gains else None


def frontier(task: StudyTask, arms: ByArm, family: str) -> list[tuple[float, float]]:
    """(share of F, mean quality) of the family's runs, each decayed to its own budget, by cost."""
    names = [name for name in arms if name == family or name.startswith(f"{family}@")]
    found = [(item.cost, item.quality.mean) for item in (summary(task, arms, name) for name in names)]
    return sorted(found)


def cost_of(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The least cost at which a line through the frontier's points reaches that quality; None outside of them."""
    for (before, low), (after, high) in itertools.pairwise(points):
        if low <= wanted <= high:
            return before if high == low else before + (after - before) * (wanted - low) / (high - low)
    return None


def flops_to_match(task: StudyTask, arms: ByArm) -> float | None:
    """Share of F at which growing reaches the final-size model's quality, less what is tolerated.

    Interpolated between grown runs that were each decayed to their budget; 1 or more is out of reach: None.
    """
    points = frontier(task, arms, "grown")
    wanted = summary(task, arms, "final").quality.mean - TOLERATED[task.metric]
    if points and points[0][1] >= wanted:
        return points[0][0]
    return cost_of(points, wanted)


def equal_quality_ratio(task: StudyTask, arms: ByArm, arm: str = "grown") -> float | None:
    """What that arm cost, over what the final-size model from scratch costs for the same quality."""
    if arm not in arms:
        return None
    found = summary(task, arms, arm)
    cost = cost_of(frontier(task, arms, "final"), found.quality.mean)
    return found.cost / cost if cost else None
