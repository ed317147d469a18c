"""What was promised beforehand, each as a function of the results. None: the results do not say yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.growth import figures
from benchmarks.growth.figures import ByArm
from benchmarks.growth.tasks import TASKS
from esper_ray.reliability.intervals import Interval

GAIN_POINTS = 5.0
"""Bar (a): points of accuracy over the host alone, on glyphs."""
CLOSED = 0.5
"""Bar (a): share of the gap between host and final size, on the other tasks."""
BUDGET = 0.6
"""Bar (b): share of F."""
ENOUGH = 3
"""Runs below which nothing is judged."""
DATA = ("glyphs", "digits", "pycode", "tabular")
"""A task counts once; of its two host sizes the first one in the table is judged."""

Results = Mapping[str, ByArm]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one bar on one task."""

    holds: bool | None
    says: str


def gains(name: str, arms: ByArm) -> Verdict:
    """(a) Grown beats the host alone."""
    task = TASKS[name]
    gain = figures.paired(task, arms, "grown", "host")
    gap = figures.paired(task, arms, "final", "host")
    if gain is None or gap is None or gain.count < ENOUGH:
        return Verdict(None, "not run")
    if name.startswith("glyphs"):
        return Verdict(gain.mean >= GAIN_POINTS, f"{gain.mean:+.2f} points")
    closed = gain.mean / gap.mean if gap.mean > 0 else float("nan")
    return Verdict(closed >= CLOSED, f"{100 * closed:.0f} % of the gap closed")


def saturated(name: str, arms: ByArm) -> bool | None:
    """Whether F brings the final-size model no more than 0.6 F does: then bar (b) says nothing. Three errors decide."""
    gap = figures.paired(TASKS[name], arms, "final", "final@0.6")
    if gap is None or gap.count < ENOUGH:
        return None
    from scipy import stats

    error = (gap.high - gap.mean) / float(stats.t.ppf(0.975, gap.count - 1))
    return gap.mean < 3 * error


def not_worse(name: str, arms: ByArm) -> Verdict:
    """(b) Grown within 0.6 F is not worse than the final-size model at F, the whole interval inside the margin."""
    task = TASKS[name]
    found = figures.paired(task, arms, "grown@0.6", "final")
    gap = figures.paired(task, arms, "final", "final@0.6")
    if found is None or gap is None or min(found.count, gap.count) < ENOUGH:
        return Verdict(None, "not run")
    margin = min(task.margin, max(0.0, gap.mean / 4))
    cost = figures.summary(task, arms, "grown@0.6").largest_cost
    holds = found.low >= -margin and cost <= BUDGET
    empty = ", saturated" if saturated(name, arms) else ""
    return Verdict(holds and not empty, f"{_signed(found)}, margin {margin:.3g}, at most {cost:.3f} F{empty}")


def beats_scratch(name: str, arms: ByArm) -> Verdict:
    """(c) At equal FLOPs grown beats the final-size model from scratch, the interval excluding zero."""
    found = figures.paired(TASKS[name], arms, "grown", "final=grown")
    return _positive(found)


def beats_controls(name: str, arms: ByArm) -> Verdict:
    """(d) The heuristic beats random and periodic growth at equal FLOPs."""
    found = [figures.paired(TASKS[name], arms, "grown", f"{control}=grown") for control in ("random", "periodic")]
    if any(each is None or each.count < ENOUGH for each in found):
        return Verdict(None, "not run")
    texts = ", ".join(_signed(each) for each in found if each is not None)
    return Verdict(all(each is not None and each.low > 0.0 for each in found), f"random, periodic: {texts}")


def beats_search(name: str, arms: ByArm) -> Verdict:
    """(e) At equal total FLOPs one growing run beats the ASHA search."""
    found = figures.paired(TASKS[name], arms, "grown", "asha=grown")
    return _positive(found)


BARS: Mapping[str, tuple[str, Callable[[str, ByArm], Verdict], int]] = {
    "a": ("grown beats the host: 5 points on glyphs, half of the gap elsewhere", gains, 4),
    "b": ("grown within 0.6 F is not worse than the final size at F", not_worse, 3),
    "c": ("at equal FLOPs grown beats the final size from scratch", beats_scratch, 2),
    "d": ("the heuristic beats random and periodic growth at equal FLOPs", beats_controls, 4),
    "e": ("one growing run beats ASHA over the same choices at equal FLOPs", beats_search, 3),
}
"""Each with the number of tasks that it must hold on."""


def judged(results: Results) -> list[str]:
    """The tasks that bars are judged on: the first of each data set that there are results of."""
    found: dict[str, str] = {}
    for name in TASKS:
        if name in results and "final" in results[name]:
            found.setdefault(name.partition("-")[0], name)
    return list(found.values())


def table(results: Results) -> dict[str, dict[str, Verdict]]:
    """By bar, then by task."""
    names: Sequence[str] = judged(results)
    return {bar: {name: judge(name, results[name]) for name in names} for bar, (_, judge, _) in BARS.items()}


def _positive(found: Interval | None) -> Verdict:
    if found is None or found.count < ENOUGH:
        return Verdict(None, "not run")
    return Verdict(found.low > 0.0, _signed(found))


def _signed(found: Interval) -> str:
    return f"{found.mean:+.3g} ({found.low:+.3g} to {found.high:+.3g}, {found.count} runs)"
