"""Every alert of the table fires from the metric it names and clears; every metric of the table is shown."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from esper_ray.cli.app import app
from esper_ray.config import NissaConfig
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.metrics import BY_KEY, METRICS
from esper_ray.errors import KernelMissing
from esper_ray.nissa.alerts import Alert, AlertRule, Alerts, alert_rules, prometheus_rules
from esper_ray.nissa.conditions import Above, Consecutive, CountWithin, Lasting, LastWas, ShareBelow
from esper_ray.nissa.metrics import Metrics
from esper_ray.reliability.clock import ManualClock
from esper_ray.urza.store import Store
from tests import urza_world

RULES = alert_rules(NissaConfig())
SECOND = 1_000_000_000


def provoke(rule: AlertRule) -> tuple[list[MetricPoint], MetricPoint]:
    """Points that make the rule fire with the last of them, and one that does not."""
    condition, metric = rule.condition, rule.metric
    if isinstance(condition, Consecutive):
        return [MetricPoint(metric, condition.limit + 0.1)] * condition.count, MetricPoint(metric, condition.limit)
    if isinstance(condition, Above):
        return [MetricPoint(metric, condition.limit + 0.1)], MetricPoint(metric, condition.limit)
    if isinstance(condition, ShareBelow):
        asked = [
            MetricPoint(metric, condition.least - 2.0, {"tier": "disk"}),
            *(MetricPoint(key, 1.0) for key in condition.bad),
        ]
        return asked, MetricPoint(metric, 20.0)
    if isinstance(condition, LastWas):
        fine = {condition.label: "not " + condition.bad}
        return [MetricPoint(metric, 1.0, {condition.label: condition.bad})], MetricPoint(metric, 1.0, fine)
    return [MetricPoint(metric, 1.0)] * round(condition.count), MetricPoint(metric, 0.0)


AT_ONCE = [rule for rule in RULES if not isinstance(rule.condition, Lasting)]


@pytest.mark.parametrize("rule", AT_ONCE, ids=lambda rule: rule.name)
def test_it_fires_from_its_metric_and_clears(rule: AlertRule) -> None:
    alerts = Alerts(RULES)
    points, harmless = provoke(rule)
    changes = []
    for number, point in enumerate(points):
        changes.append(alerts.observe(point, run="r", at_ns=(number + 1) * SECOND))
    assert changes[:-1] == [None] * (len(points) - 1)
    fired = changes[-1]
    assert fired is not None
    assert (fired.name, fired.firing, fired.since_ns) == (rule.name, True, len(points) * SECOND)
    assert fired.run == ("r" if rule.per_run else "")
    assert fired.value > 0
    assert fired.description
    assert fired.action
    assert fired.runbook.startswith("docs/runbook.md#")
    assert alerts.observe(points[0], run="r", at_ns=10 * SECOND) is None, "told once"
    alerts.observe(harmless, run="r", at_ns=11 * SECOND)
    alerts.tick(600 * SECOND)
    (ended,) = alerts.all()
    assert not ended.firing
    assert ended.cleared_ns > ended.since_ns


def test_latency_in_between_breaks_the_row_and_runs_do_not_add_up() -> None:
    alerts = Alerts(RULES)
    for at, (run, value) in enumerate([("a", 19.0), ("a", 25.0), ("b", 30.0), ("a", 18.0), ("a", 19.0), ("a", 19.0)]):
        assert alerts.observe(MetricPoint("bd", value), run=run, at_ns=at) is None
    assert alerts.observe(MetricPoint("bd", 18.01), run="a", at_ns=9) is not None


def test_violations_count_within_five_minutes_and_leave_the_window() -> None:
    alerts = Alerts(RULES)
    assert alerts.observe(MetricPoint("iv", 2.0), run="r", at_ns=0) is None
    assert alerts.observe(MetricPoint("iv", 1.0), run="r", at_ns=301 * SECOND) is None, "the first two are too old"
    fired = alerts.observe(MetricPoint("iv", 2.0), run="r", at_ns=302 * SECOND)
    assert fired is not None
    assert fired.value == 3.0
    assert alerts.tick(600 * SECOND) == []
    (cleared,) = alerts.tick(602 * SECOND)
    assert not cleared.firing


def test_a_mode_that_lasts_fires_after_its_time_and_a_break_begins_it_anew() -> None:
    alerts = Alerts(RULES)
    for at, value in ((0, 1.0), (600, 1.0), (700, 0.0), (800, 1.0), (1600, 1.0)):
        assert alerts.observe(MetricPoint("zm", value), run="", at_ns=at * SECOND) is None
    (fired,) = alerts.tick(1700 * SECOND)
    assert (fired.name, fired.firing) == ("tezzeret_conservative_mode", True)
    cleared = alerts.observe(MetricPoint("zm", 0.0), run="", at_ns=1701 * SECOND)
    assert cleared is not None
    assert not cleared.firing


def test_each_stream_has_an_alert_of_its_own_and_says_which_it_is() -> None:
    alerts, long, short = Alerts(RULES), {"stream": "telemetry"}, {"stream": "decisions"}
    for at in (0, 60, 119):
        alerts.observe(MetricPoint("od", 5000.0, long), run="", at_ns=at * SECOND)
        alerts.observe(MetricPoint("od", 3.0, short), run="", at_ns=at * SECOND)
    fired = alerts.observe(MetricPoint("od", 4500.0, long), run="", at_ns=120 * SECOND)
    assert fired is not None
    assert (fired.id, fired.value, fired.run) == ("oona_queue_depth:telemetry", 4500.0, "")
    assert fired.condition == "telemetry over 4000 for 2 min"
    assert alerts.observe(MetricPoint("od", 3.0, short), run="", at_ns=121 * SECOND) is None
    cleared = alerts.observe(MetricPoint("od", 900.0, long), run="", at_ns=122 * SECOND)
    assert cleared is not None
    assert not cleared.firing


def test_a_breaker_that_nobody_tells_of_any_more_does_not_stay_open_for_ever() -> None:
    alerts = Alerts(RULES)
    fired = alerts.observe(MetricPoint("ob", 2.0, {"breaker": "publish.karn"}), run="", at_ns=SECOND)
    assert fired is not None
    assert fired.condition.startswith("publish.karn ")
    assert alerts.observe(MetricPoint("ob", 1.0, {"breaker": "publish.urza"}), run="", at_ns=2 * SECOND) is None
    assert alerts.tick(3600 * SECOND) == []
    (cleared,) = alerts.tick(3602 * SECOND)
    assert not cleared.firing


def test_a_store_that_lacks_what_it_is_asked_for_causes_its_alert_and_hits_clear_it(tmp_path: Path) -> None:
    alerts, clock, changes = Alerts(RULES), ManualClock(), list[Alert | None]()

    class Told:
        def publish(self, type: BusMessageType, payload: bytes, **_: object) -> None:
            assert type is BusMessageType.TELEMETRY
            changes.extend(
                alerts.observe(point, run="", at_ns=clock.now_ns()) for point in codec.decode_telemetry(payload).metrics
            )

    store = Store(tmp_path, clock=clock, publisher=Told())
    store.put(urza_world.spec(0), urza_world.weights(1.0), urza_world.METADATA)
    for number in range(20):
        clock.advance(2)
        if number % 2:
            store.get(urza_world.spec(0))
        else:
            with pytest.raises(KernelMissing):
                store.get(urza_world.spec(1))
    (fired,) = filter(None, changes)
    for _ in range(200):
        clock.advance(1)
        store.get(urza_world.spec(0))
    store.close()
    _, cleared = filter(None, changes)

    assert (fired.name, fired.firing, fired.value) == ("urza_hit_rate_low", True, 0.5)
    assert (cleared.name, cleared.firing) == ("urza_hit_rate_low", False)


def test_the_end_of_a_run_ends_its_alerts() -> None:
    alerts = Alerts(RULES)
    for at in range(3):
        alerts.observe(MetricPoint("bd", 20.0), run="r", at_ns=at)
    assert alerts.finish("other", 5) == []
    (ended,) = alerts.finish("r", 5)
    assert (ended.firing, ended.cleared_ns) == (False, 5)


def test_the_prometheus_rules_are_the_same_table() -> None:
    written = yaml.safe_load(prometheus_rules(RULES))["groups"][0]["rules"]
    assert [rule["alert"] for rule in written] == [rule.name for rule in RULES]
    for rule, text in zip(RULES, written, strict=True):
        assert all(BY_KEY[key].name in text["expr"] for key in rule.watched)
        assert text["labels"]["severity"] == rule.severity
        assert set(text["annotations"]) == {"summary", "value", "action", "runbook"}
    for rule in RULES:
        if isinstance(rule.condition, Consecutive):
            assert rule.condition.limit in BY_KEY[rule.metric].buckets, "the rule reads this bucket"
        else:
            assert isinstance(rule.condition, CountWithin | LastWas | Above | Lasting | ShareBelow)
            kind = "gauge" if isinstance(rule.condition, Above | Lasting) else "counter"
            assert BY_KEY[rule.metric].kind == kind
        if isinstance(rule.condition, LastWas):
            assert rule.condition.label in BY_KEY[rule.metric].labels


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_of_the_table_is_shown_once_it_was_sent(metric: object) -> None:
    row = BY_KEY[metric.key]  # type: ignore[attr-defined]
    metrics = Metrics()
    labels = {name: f"a-{name}" for name in row.labels}
    for value in (2.0, 3.0):
        assert metrics.apply(MetricPoint(row.key, value, labels), run="r") is None
    shown = dict(line.rsplit(" ", 1) for line in metrics.exposition().decode().splitlines() if line[0] != "#")
    own = ",".join(f'{name}="{value}"' for name, value in sorted({**labels, "run": "r"}.items()))
    if row.kind == "histogram":
        assert shown[f"{row.name}_count{{{own}}}"] == "2.0"
        assert shown[f"{row.name}_sum{{{own}}}"] == "5.0"
    else:
        assert shown[f"{row.name}{{{own}}}"] == ("5.0" if row.kind == "counter" else "3.0")
    assert f"# HELP {row.name.removesuffix('_total')}" in metrics.exposition().decode()


def test_what_is_not_in_the_table_is_refused_and_old_runs_are_forgotten() -> None:
    metrics = Metrics()
    assert metrics.apply(MetricPoint("zz", 1.0)) == "unknown_metric"
    assert metrics.apply(MetricPoint("md", -1.0)) == "negative_increment"
    for number in range(40):
        metrics.apply(MetricPoint("va", 0.5), run=f"run-{number}")
    text = metrics.exposition().decode()
    assert 'run="run-39"' in text
    assert 'run="run-0"' not in text


PROMTOOL = shutil.which("promtool")


def test_the_command_writes_the_rules_and_what_is_checked_in_is_them(tmp_path: Path) -> None:
    written = tmp_path / "rules.yml"
    done = CliRunner().invoke(app, ["alerts", "export", str(written)])

    assert done.exit_code == 0, done.output
    assert written.read_text() == prometheus_rules(RULES)
    assert (Path(__file__).parents[2] / "deploy" / "alerts.yml").read_text() == written.read_text()


def test_the_command_takes_the_thresholds_of_the_settings(tmp_path: Path) -> None:
    written = tmp_path / "rules.yml"
    CliRunner().invoke(app, ["alerts", "export", str(written), "--set", "nissa.latency_epochs=7"])

    assert ">= 7" in yaml.safe_load(written.read_text())["groups"][0]["rules"][0]["expr"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(prometheus_rules(RULES))
    done = subprocess.run([str(PROMTOOL), "check", "rules", str(file)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
