"""The report of a run: one page that needs nothing else, and one picture, made from the files in its folder.

Everything shown was written by the run itself; what it did not measure is not there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from esper_ray.contracts.budgets import BOUNDARY_MS, BOUNDARY_PARTS, GRAFT_MS, Budget
from esper_ray.nissa import report_charts as charts
from esper_ray.nissa.report_data import ArmRun, Life, lives, read_run
from esper_ray.reliability import atomic

_WEB = Path(__file__).parent / "web"
_STAGES = ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "CULLED", "EMBARGOED")


def write_report(run_folder: Path, others: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` and ``report.png`` into the run's folder; returns the page's path.

    Args:
        others: folders of the arms to compare with.

    Raises:
        RunError: one of the folders has no finished epoch.
    """
    run, rest = read_run(run_folder), [read_run(folder) for folder in others]
    seeds = lives(run)
    page = run_folder / "report.html"
    picture = run_folder / "report.png"
    scratch = io.BytesIO()
    charts.png(run, rest, seeds, f"{run_folder.name}: {_verdict(run, rest)}", scratch)
    atomic.write_bytes(picture, scratch.getvalue())
    atomic.write_text(page, _page(run, rest, seeds))
    return page


def _page(run: ArmRun, rest: Sequence[ArmRun], seeds: Sequence[Life]) -> str:
    arms = [run, *rest]
    return Template((_WEB / "report.html").read_text()).substitute(
        style=(_WEB / "page.css").read_text(),
        run=escape(run.folder.name),
        about=escape(_about(run)),
        verdict=escape(_verdict(run, rest)),
        tiles=_tiles(run, rest, seeds),
        arms=_arms(arms),
        accuracy=charts.svg(charts.accuracy(arms, seeds), width=7.2, height=3.4, name="accuracy"),
        by_compute=charts.svg(charts.by_compute(arms), width=7.2, height=3.4, name="by-compute"),
        timeline=charts.svg(
            charts.timeline(seeds, run), width=14.6, height=0.8 + 0.34 * max(len(seeds), 1), name="timeline"
        ),
        key=" ".join(f'<span><i style="background:var(--{s.lower()})"></i>{s.lower()}</span>' for s in _STAGES),
        seeds="".join(map(_seed, seeds)) or '<p class="empty">No seed was born in this run.</p>',
        decisions=_decisions(run),
        incidents=_incidents(run),
        losses=charts.svg(charts.losses(arms), width=7.2, height=2.8, name="losses"),
        boundary=charts.svg(charts.boundary(run), width=7.2, height=2.8, name="boundary"),
        budgets=_budgets(run),
        parameters=charts.svg(charts.parameters(arms), width=7.2, height=2.6, name="parameters"),
        compute=charts.svg(charts.compute(arms), width=7.2, height=2.6, name="compute"),
        backends=_definitions(_surroundings(run)),
        settings=escape(json.dumps(run.manifest.get("config", {}), indent=1)),
    )


def _about(run: ArmRun) -> str:
    settings = run.manifest.get("config", {}).get("run", {})
    parts = [f"{settings.get('task', '')} on {settings.get('dataset', '')}", f"seed {settings.get('seed', '')}"]
    parts += [f"{len(run.rows)} epochs", f"{settings.get('mode', '')}", f"started {run.manifest.get('started_at', '')}"]
    fork = run.manifest.get("fork")
    if fork:
        parts.append(f"goes on from epoch {fork['epoch']} of {fork['parent']}")
    return " · ".join(parts)


def _verdict(run: ArmRun, rest: Sequence[ArmRun]) -> str:
    """One sentence on the outcome, from the test split alone."""
    own = run.result.get("test_accuracy")
    if own is None:
        last = run.rows[-1]
        accuracy = 100 * last["validation_accuracy"]
        return f"not finished; {accuracy:.1f} % on the validation split after epoch {last['epoch']}"
    text = f"the {run.name} model ends at {100 * own:.1f} % on the test split"
    gaps = [
        f"{abs(100 * (own - other.result['test_accuracy'])):.1f} points "
        f"{'above' if own >= other.result['test_accuracy'] else 'below'} {_NOUNS.get(other.arm, other.name)}"
        for other in rest
        if "test_accuracy" in other.result
    ]
    return ", ".join([text, " and ".join(gaps)]) if gaps else text


_NOUNS = {"host": "the host alone", "final": "the final size trained from scratch"}


def _tiles(run: ArmRun, rest: Sequence[ArmRun], seeds: Sequence[Life]) -> str:
    first, last = run.rows[0], run.rows[-1]
    fates = [life.fate for life in seeds]
    totals = sorted(float(row["boundary"]["total"]) for row in run.rows)
    tiles = [(_percent(run.result.get("test_accuracy")), "test accuracy, grown")] if run.result else []
    tiles += [
        (_percent(other.result["test_accuracy"]), f"test accuracy, {other.name}") for other in rest if other.result
    ]
    tiles += [
        (f"{fates.count('FOSSILIZED')} of {len(fates)}", "seeds became part of the host"),
        (f"{first['parameters']:,} → {last['parameters']:,}", "parameters"),
        (f"{totals[len(totals) // 2]:.1f} ms", f"boundary, median (budget {BOUNDARY_MS.limit:g})"),
        (str(sum(bool(row.get("missed")) for row in run.rows)), "decisions that came too late"),
    ]
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )


def _arms(arms: Sequence[ArmRun]) -> str:
    rows = []
    for arm in arms:
        result, last = arm.result, arm.rows[-1]
        rows.append(
            (
                arm.name,
                str(result.get("status", "not finished")),
                _percent(result.get("test_accuracy")),
                _percent(last["validation_accuracy"]),
                f"{last['parameters']:,}",
                f"{last['flops'] / 1e12:.2f}",
                f"{last['seconds']:.0f}",
                str(len(arm.rows)),
            )
        )
    head = ("arm", "state", "test accuracy", "validation accuracy", "parameters", "TFLOP", "seconds", "epochs")
    return _table(head, rows, numbers=range(2, 8))


def _seed(life: Life) -> str:
    rows = []
    for gate in life.gates:
        passed = '<b class="good">passed</b>' if gate["passed"] else '<b class="bad">refused</b>'
        evidence = " ".join(
            f'<span class="fact">{escape(name.replace("_", " "))} <b>{_figure(value)}</b></span>'
            for name, value in gate.get("evidence", {}).items()
        )
        way = f"{gate['from'].lower()} → {gate['to'].lower()}"
        rows.append(
            f"<tr><td>{gate['epoch']}</td><td>{escape(_spoken(gate['gate']))}</td><td>{escape(way)}</td><td>{passed}</td>"
            f'<td class="facts">{evidence}<div class="quiet">{escape(str(gate.get("reason", "")))}</div></td></tr>'
        )
    head = "<tr><th>epoch</th><th>gate</th><th>from → to</th><th></th><th>evidence</th></tr>"
    return (
        f"<details{' open' if life.seed == 1 else ''}><summary><b>seed {life.seed}</b> {escape(life.blueprint)} in "
        f'{escape(life.slot_name)} <span class="pill">{escape(life.fate.lower())}</span></summary>'
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div></details>'
    )


def _decisions(run: ArmRun) -> str:
    """Every decision that changed something or came too late; the quiet epochs between them as one line."""
    slots = {slot["index"]: slot["name"] for slot in run.manifest.get("slots", [])}
    items: list[str] = []
    quiet: list[int] = []

    def flush() -> None:
        if quiet:
            span = str(quiet[0]) if len(quiet) == 1 else f"{quiet[0]} to {quiet[-1]}"
            items.append(_item(f"epoch {span}", "no change", quiet_why))
            quiet.clear()

    quiet_why = ""
    for event in run.of_kind("decision"):
        acts = [command for command in event["commands"] if command["operation"] != "NO_OP"]
        why = str(event.get("why", ""))
        refused = "; ".join(map(str, event.get("refused", ())))
        if not acts and not refused and not event.get("missed"):
            if why != quiet_why:
                flush()
            quiet_why = why
            quiet.append(int(event["epoch"]))
            continue
        flush()
        deeds = ", ".join(_deed(command, slots) for command in acts)
        deeds += f" ({event['controller']})" if deeds and event.get("controller") else ""
        what = deeds or ("too late: no change" if event.get("missed") else "no change")
        items.append(_item(f"epoch {event['epoch']}", what, why, refused, strong=True))
    flush()
    return f'<ul class="list tall">{"".join(items)}</ul>' if items else '<p class="empty">No decision was made.</p>'


def _deed(command: Mapping[str, Any], slots: Mapping[int, str]) -> str:
    """``germinate BP009 in stage1``; what concerns the whole run names no slot."""
    place = f"in {slots.get(command['slot'], command['slot'])}" if command["slot"] != "" else ""
    return " ".join(filter(None, (command["operation"].lower().replace("_", " "), command["blueprint"], place)))


def _incidents(run: ArmRun) -> str:
    """Emergencies, rollbacks and lost checkpoints, in the order in which they happened."""
    items = []
    for row in run.incidents:
        what = {"emergency": str(row.get("level", "")).lower(), "checkpoint": "a checkpoint was lost"}.get(row["kind"])
        if row["kind"] == "rollback":
            what = f"back from epoch {row['from_epoch']} to {row['to']} ({row['how']}, branch {row['branch']})"
        items.append(_item(f"epoch {row['epoch']}", what or str(row["kind"]), str(row.get("reason", "")), strong=True))
    return f'<ul class="list tall">{"".join(items)}</ul>' if items else '<p class="empty">None.</p>'


def _item(when: str, what: str, why: str, refused: str = "", *, strong: bool = False) -> str:
    kind = "deed" if strong else "quiet"
    refusal = f'<p><b class="bad">refused</b> {escape(refused)}</p>' if refused else ""
    return (
        f'<li><span class="when">{escape(when)}</span><div><b class="{kind}">{escape(what)}</b>'
        f"<p>{escape(why)}</p>{refusal}</div></li>"
    )


def _budgets(run: ArmRun) -> str:
    rows = [
        _budget_row(budget, [float(row["boundary"][key]) for row in run.rows])
        for budget, key in [(BOUNDARY_MS, "total"), *((part, part.key) for part in BOUNDARY_PARTS)]
    ]
    grafts = [float(event["ms"]) for event in run.of_kind("graft")]
    if grafts:
        rows.append(_budget_row(GRAFT_MS, grafts))
    return _table(("part", "what", "median ms", "worst ms", "budget ms"), rows, numbers=range(2, 5), wrap=True)


def _budget_row(budget: Budget, values: Iterable[float]) -> tuple[str, ...]:
    ordered = sorted(values)
    median, worst = ordered[len(ordered) // 2], ordered[-1]
    return budget.key, budget.meaning, f"{median:.2f}", f"{worst:.2f}", f"{budget.limit:g}"


def _surroundings(run: ArmRun) -> dict[str, str]:
    found = {name: str(value) for name, value in run.manifest.get("backends", {}).items()}
    found |= {name: str(value) for name, value in run.manifest.get("versions", {}).items()}
    found |= {name: str(run.manifest[name]) for name in ("device", "threads") if name in run.manifest}
    return found


def _definitions(values: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items()) + "</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: range, wrap: bool = False) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column in numbers else ''}>{escape(value)}</{tag}>"
            for column, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll{" wrap" if wrap else ""}"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _spoken(gate: str) -> str:
    """``G1_GRADIENT_HEALTH`` as ``G1 gradient health``."""
    head, _, rest = gate.partition("_")
    return f"{head} {rest.lower().replace('_', ' ')}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{100 * float(value):.2f} %"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else escape(str(value))
