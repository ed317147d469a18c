"""The study's part of docs/results.md, between markers of its own, and its plots."""

from __future__ import annotations

from pathlib import Path

from benchmarks import common
from benchmarks.growth import arms, bars, figures, plots
from benchmarks.growth.figures import ByArm
from benchmarks.growth.store import Store
from benchmarks.growth.tasks import TASKS, TUNING, StudyTask
from esper_ray.reliability.intervals import Interval

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = (
    "<!-- growth study: written by python -m benchmarks.growth --report -->",
    "<!-- end of the growth study -->",
)
COMPARED = (
    ("grown", "host", "the host alone, same epochs"),
    ("grown", "host=grown", "the host alone, same FLOPs"),
    ("grown", "final=grown", "the final size from scratch, same FLOPs"),
    ("grown", "final", "the final size from scratch, F"),
    ("grown@0.6", "final", "within 0.6 F: the final size, F"),
    ("grown@0.6", "final@0.6", "within 0.6 F: the final size, 0.6 F"),
    ("grown", "random=grown", "random growth, same FLOPs"),
    ("grown", "periodic=grown", "periodic growth, same FLOPs"),
    ("grown", "learned=grown", "the learned policy, same FLOPs"),
    ("grown", "gradmax=grown", "GradMax, same FLOPs"),
    ("grown", "net2net=grown", "identity morph, same FLOPs"),
    ("grown", "gromo=grown", "GroMo, same FLOPs"),
    ("grown", "asha=grown", "ASHA over the same blocks, same FLOPs in all"),
    ("grown", "grid=grown", "a grid of sizes, same FLOPs in all"),
)


OPENING = """\
## Does growing pay, at equal cost?

F is what the final-size model costs for the task's number of steps, in FLOPs. All runs of a random seed share data,
batches, host weights and the kind of schedule; each is decayed to its own budget. Charged are forward and backward
passes, shadow passes, isolation checks, every measurement (those with seeds left out one by one, too) and seeds that
failed. Not charged: the controller's own arithmetic, G0's check of a newborn on four samples, and the forging of a
kernel, once on a machine. `x=grown` may spend what the grown run of the same random seed cost; `x@0.6` may spend
0.6 F. The test split is read once for each run.

![quality over cost, each run decayed to its own budget](growth-frontier.png)

![paired differences](growth-differences.png)"""
CLOSING = """\
Rates and schedules: {tuning} What was found is in `benchmarks/growth/tasks.py`, with the margins of bar (b), which
were fixed before the first run. Trials of the tuning are in no arm's cost. On glyphs the tuning had one random seed at
first, and took a rate for the final size that looked too low once two of the study's seeds had been run; three seeds
chose a higher one, on the validation split, and all runs of that size were done anew. Growing runs are moved
until they fit their budget, by up to four trials; a user knows no such budget beforehand, so these are not charged, and
`trials` in the results says how many there were. Processor seconds are those of one thread
on a busy machine of two cores.

    python -m benchmarks.growth            # goes on where it was; results in benchmarks/results/growth, of {commits}
    python -m benchmarks.growth --report"""


def write(store: Store, docs: Path = DOCS) -> None:
    """Put tables and plots of what is in ``store`` into ``docs``."""
    results = {name: store.latest(name) for name in TASKS if "final" in store.latest(name)}
    parts = [OPENING, _bars(results)]
    for name, by_arm in results.items():
        parts.append(_task(TASKS[name], by_arm))
    plots.frontiers(results, docs / "growth-frontier.png")
    plots.differences(results, COMPARED, docs / "growth-differences.png")
    parts.append(_closing(results))
    common.write_section(docs / "results.md", BEGIN, END, "\n\n".join(parts))


def _bars(results: bars.Results) -> str:
    names = bars.judged(results)
    lines = ["### What was promised beforehand", "", f"| bar | {' | '.join(names)} | holds on | wanted |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for bar, row in bars.table(results).items():
        says, _, least = bars.BARS[bar]
        cells = " | ".join(f"{_word(each.holds)}: {each.says}" for each in row.values())
        held = sum(bool(each.holds) for each in row.values())
        lines.append(f"| ({bar}) {says} | {cells} | {held} of {len(names)} | {least} |")
    return "\n".join(lines)


def _word(holds: bool | None) -> str:
    return "-" if holds is None else "yes" if holds else "**no**"


def _task(task: StudyTask, by_arm: ByArm) -> str:
    unit = "test accuracy, %" if task.metric == "points" else "test loss, bits"
    head = (
        f"### {task.name}\n\n| arm | runs | {unit} | FLOPs / F | parameters | seeds born, kept, culled | s | peak MB |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for name in arms.ARMS:
        if name not in by_arm:
            continue
        item = figures.summary(task, by_arm, name)
        seeds = f"{item.born:.1f}, {item.kept:.1f}, {item.culled:.1f}" if item.born else ""
        peak = f"{item.peak_mb:.0f}" if item.peak_mb else ""
        lines.append(
            f"| {name} | {item.quality.count} | {_value(task, item.quality)} | {item.cost:.2f} "
            f"| {item.parameters:,.0f} | {seeds} | {item.processor_seconds:.1f} | {peak} |"
        )
    missing = [name for name in arms.ARMS if name not in by_arm]
    absent = f"Not run yet: {', '.join(missing)}." if missing else ""
    return "\n".join([*lines, "", _differences(task, by_arm), "", _ratios(task, by_arm), "", absent]).rstrip()


def _differences(task: StudyTask, by_arm: ByArm) -> str:
    unit = "points" if task.metric == "points" else "bits, positive is better"
    lines = [f"| grown less | {unit} (95 %) | runs |", "|---|---|---|"]
    for one, other, words in COMPARED:
        found = figures.paired(task, by_arm, one, other)
        if found is not None:
            lines.append(f"| {words} | {_interval(task, found, signed=True)} | {found.count} |")
    return "\n".join(lines)


def _ratios(task: StudyTask, by_arm: ByArm) -> str:
    match = figures.flops_to_match(task, by_arm)
    equal = figures.equal_quality_ratio(task, by_arm)
    tolerated = figures.TOLERATED[task.metric]
    unit = "points" if task.metric == "points" else "bits"
    grown = figures.summary(task, by_arm, "grown") if "grown" in by_arm else None
    parts = [
        f"Growing reaches the final size's quality, less {tolerated:g} {unit}, "
        + ("at no budget that was run." if match is None else f"at {match:.2f} F."),
        "At equal quality it costs "
        + (
            "what the frontier from scratch does not tell: its quality lies outside of it."
            if equal is None
            else f"{equal:.2f} times what the final size from scratch does."
        ),
    ]
    if grown is not None and grown.born:
        parts.append(f"A graft stopped the training for {grown.graft_ms:.1f} ms at most, on a busy machine.")
    return " ".join(parts)


def _value(task: StudyTask, found: Interval) -> str:
    return _interval(task, found, signed=False)


def _interval(task: StudyTask, found: Interval, *, signed: bool) -> str:
    points = task.metric == "points"
    sign = 1.0 if points or signed else -1.0
    digits = 2 if points else 4
    mean, ends = sign * found.mean, sorted((sign * found.low, sign * found.high))
    text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return text if found.count < 2 else f"{text} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


def _closing(results: bars.Results) -> str:
    commits = sorted(
        {row["commit"] for by_arm in results.values() for rows in by_arm.values() for row in rows.values()}
    )
    return CLOSING.format(tuning=TUNING, commits=", ".join(commits))
