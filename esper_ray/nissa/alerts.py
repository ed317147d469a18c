"""The alerts: one table, evaluated here and written out as Prometheus rules.

An alert fires per run, or for the system as a whole. Time is the time of the messages, so that a replay of the
records comes to the same end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml

from esper_ray.config import NissaConfig
from esper_ray.contracts.budgets import BOUNDARY_MS, HIT_RATE
from esper_ray.contracts.enums import EmergencyLevel
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.metrics import BY_KEY
from esper_ray.nissa.conditions import Above, Condition, Consecutive, CountWithin, Lasting, LastWas, ShareBelow

Severity = Literal["warning", "critical"]
_RUNBOOK = "docs/runbook.md"


@dataclass(frozen=True, slots=True)
class AlertRule:
    """One row: the metric watched, when it is too much, and what to do then.

    It is watched run by run, unless what it says is not about one run: then as a whole, or apart for each value of the
    label ``by``.
    """

    name: str
    metric: str
    condition: Condition
    severity: Severity
    description: str
    action: str
    receivers: tuple[str, ...]
    per_run: bool = True
    by: str = ""

    @property
    def watched(self) -> tuple[str, ...]:
        """The keys of all metrics that decide about it."""
        return (self.metric, *self.condition.bad) if isinstance(self.condition, ShareBelow) else (self.metric,)

    @property
    def runbook(self) -> str:
        return f"{_RUNBOOK}#{self.name.replace('_', '-')}"


def alert_rules(settings: NissaConfig) -> tuple[AlertRule, ...]:
    """The table, with the configured thresholds filled in."""
    return (
        AlertRule(
            "training_latency_high",
            "bd",
            Consecutive(BOUNDARY_MS.limit, settings.latency_epochs),
            "critical",
            "Epoch boundaries take longer than their budget.",
            "See which part is over budget. If it is Tamiyo's answer, give its actor a processor of its own or "
            "take load off the machine; training goes on with no change meanwhile.",
            ("pagerduty", "slack"),
        ),
        AlertRule(
            "kasmina_isolation_violation",
            "iv",
            CountWithin(3, 300.0),
            "critical",
            "A seed in isolation changed the host's gradients.",
            "Look up the seed in the events, cull it if it still lives, and report its blueprint: a seed must not "
            "reach the host before it is blended.",
            ("pagerduty",),
        ),
        AlertRule(
            "run_emergency",
            "em",
            Above(float(EmergencyLevel.ELEVATED)),
            "critical",
            "Training was damaged: the run went back and grows nothing for a time, or it has halted.",
            "See the reason among the run's incidents. A conservative run goes on by itself; a halted one goes on with "
            "`esper run --resume`, once the cause is gone.",
            ("pagerduty", "slack"),
        ),
        AlertRule(
            "checkpoint_lost",
            "ck",
            CountWithin(1, 300.0),
            "warning",
            "A checkpoint could not be written, or is damaged.",
            "Look for free space under ESPER_HOME; older checkpoints are untouched, and the next epoch tries again.",
            ("slack",),
        ),
        AlertRule(
            "tezzeret_compile_retry_high",
            "zr",
            CountWithin(5, 300.0),
            "warning",
            "The forge has to make kernels again after failures.",
            "Training goes on with the eager kernels. See in the forge's logs under ESPER_HOME/forge what its jobs die "
            "of: the limits on time and memory say so by name.",
            ("slack",),
            per_run=False,
        ),
        AlertRule(
            "tezzeret_conservative_mode",
            "zm",
            Lasting(0.0, 900.0),
            "warning",
            "The forge has worked in conservative mode for a quarter of an hour: one job, and the fast strategy.",
            "Give the machine memory back, or see in the forge's logs under ESPER_HOME/forge why its jobs fail. It "
            "ends by itself, a dwell after the last failure.",
            ("email",),
            per_run=False,
        ),
        AlertRule(
            "urza_hit_rate_low",
            "uh",
            ShareBelow(HIT_RATE, ("um", "ux"), 20.0, 300.0),
            "warning",
            "Kernels are asked for that the store does not have; a seed whose kernel comes late is culled.",
            "In a new home it passes when the forge has made the run's kernels: `esper forge` makes them before. Else "
            "see in `esper urza verify` what was withdrawn, and in ESPER_HOME/forge why it is not made again.",
            ("slack",),
            per_run=False,
        ),
        AlertRule(
            "oona_queue_depth",
            "od",
            Lasting(4000.0, 120.0),
            "warning",
            "Messages have waited in a stream of the bus for two minutes, more than its readers take.",
            "See in `esper bus status` which group is behind, and in `esper status` whether its actor is up. Telemetry "
            "of low priority is left out meanwhile; what must not be lost waits.",
            ("slack",),
            per_run=False,
            by="stream",
        ),
        AlertRule(
            "breaker_open",
            "ob",
            Above(1.0, 3600.0),
            "warning",
            "A breaker is open after failures in a row: what it guards is left alone for a time.",
            "Its name says what it guards. It tries again by itself; see in the log of the actor that it belongs to "
            "what fails.",
            ("slack",),
            per_run=False,
            by="breaker",
        ),
        AlertRule(
            "actor_restarted",
            "ar",
            CountWithin(1.0, 300.0),
            "warning",
            "An actor of the system died and was started again.",
            "Work goes on: nothing that was acknowledged is lost. See its last lines in the Ray dashboard; if it comes "
            "again, look for memory that ran out (`dmesg`).",
            ("slack",),
            per_run=False,
            by="actor",
        ),
        AlertRule(
            "simic_validation_failed",
            "pv",
            LastWas("verdict", "failed", 86_400.0),
            "warning",
            "A policy did not pass its validation.",
            "Nothing changes: it cannot be promoted, and who decided before decides on. See in the verdict which gate "
            "it failed, and train on or give it up.",
            ("slack",),
            per_run=False,
        ),
    )


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert of one run, or of the system where ``run`` is empty: firing, or cleared."""

    id: str
    name: str
    run: str
    severity: Severity
    firing: bool
    since_ns: int
    value: float
    unit: str
    condition: str
    description: str
    action: str
    runbook: str
    cleared_ns: int = 0
    acknowledged_ns: int = 0


@dataclass(slots=True)
class _Series:
    rule: AlertRule
    run: str
    about: str
    history: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=2048))
    alert: Alert | None = None


class Alerts:
    """Evaluates the table; not safe for threads, its owner locks."""

    def __init__(self, rules: Iterable[AlertRule]) -> None:
        self.rules = tuple(rules)
        watched = [(key, rule) for rule in self.rules for key in rule.watched]
        self._by_metric = dict(watched)
        assert len(self._by_metric) == len(watched), "one alert per metric; widen this when it no longer holds"
        self._series: dict[str, _Series] = {}

    def observe(self, point: MetricPoint, *, run: str, at_ns: int) -> Alert | None:
        """Take note of a point; returns the alert that fired or cleared through it."""
        rule = self._by_metric.get(point.key)
        if rule is None:
            return None
        scope, about = run if rule.per_run else "", point.labels.get(rule.by, "")
        series = self._series.setdefault(f"{rule.name}:{about or scope}", _Series(rule, scope, about))
        series.history.append((at_ns, rule.condition.counted(point)))
        return self._evaluate(series, at_ns)

    def tick(self, now_ns: int) -> list[Alert]:
        """Let time pass: returns the alerts that cleared because nothing more came."""
        changed = (self._evaluate(series, now_ns) for series in self._series.values())
        return [alert for alert in changed if alert is not None]

    def finish(self, run: str, at_ns: int) -> list[Alert]:
        """The run is over: nothing of it fires any longer."""
        changed = []
        for series in self._series.values():
            if series.run == run and series.alert is not None and series.alert.firing:
                series.history.clear()
                series.alert = replace(series.alert, firing=False, cleared_ns=at_ns)
                changed.append(series.alert)
        return changed

    def acknowledge(self, id: str, at_ns: int) -> Alert | None:
        """Somebody has seen it; None when there is no such alert."""
        series = self._series.get(id)
        if series is None or series.alert is None:
            return None
        series.alert = replace(series.alert, acknowledged_ns=at_ns)
        return series.alert

    def all(self) -> list[Alert]:
        """Firing ones first, then the newest."""
        known = [series.alert for series in self._series.values() if series.alert is not None]
        return sorted(known, key=lambda alert: (not alert.firing, -alert.since_ns))

    def _evaluate(self, series: _Series, now_ns: int) -> Alert | None:
        rule, alert = series.rule, series.alert
        holds, value = rule.condition.holds(series.history, now_ns)
        firing = alert is not None and alert.firing
        if holds and not firing:
            series.alert = _fired(series, value, now_ns)
        elif alert is not None and firing:
            cleared_ns = 0 if holds else now_ns
            series.alert = replace(alert, firing=holds, value=value if holds else alert.value, cleared_ns=cleared_ns)
        return series.alert if holds != firing else None


def _fired(series: _Series, value: float, at_ns: int) -> Alert:
    rule, unit = series.rule, BY_KEY[series.rule.metric].unit
    return Alert(
        id=f"{rule.name}:{series.about or series.run}",
        name=rule.name,
        run=series.run,
        severity=rule.severity,
        firing=True,
        since_ns=at_ns,
        value=value,
        unit=unit,
        condition=" ".join(filter(None, (series.about, rule.condition.text(unit)))),
        description=rule.description,
        action=rule.action,
        runbook=rule.runbook,
    )


def prometheus_rules(rules: Iterable[AlertRule]) -> str:
    """The same table as a Prometheus rule file (YAML)."""
    entries: list[dict[str, Any]] = [
        {
            "alert": rule.name,
            "expr": rule.condition.expression(BY_KEY[rule.metric].name),
            "labels": {"severity": rule.severity, "receivers": ",".join(rule.receivers)},
            "annotations": {
                "summary": rule.description,
                "value": "{{ $value }}",
                "action": rule.action,
                "runbook": rule.runbook,
            },
        }
        for rule in rules
    ]
    return yaml.safe_dump({"groups": [{"name": "esper_ray", "rules": entries}]}, sort_keys=False, width=120)
