"""The Prometheus metrics, derived from the one table of metrics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.metrics import METRICS, Metric

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_RUNS_KEPT = 32

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """A registry of its own; every metric of the table is there, labelled with its run besides its own labels.

    Points arrive as increments for counters, observations for histograms and values for gauges. The series of the
    oldest runs are forgotten, so that a long-lived Nissa stays small.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, tuple[Metric, Gauge | Counter | Histogram]] = {
            metric.key: (metric, self._create(metric)) for metric in METRICS
        }
        self._runs: OrderedDict[str, None] = OrderedDict()

    def apply(self, point: MetricPoint, *, run: str = "") -> str | None:
        """Count a point in; returns why it was refused, or None."""
        known = self._metrics.get(point.key)
        if known is None:
            return "unknown_metric"
        metric, target = known
        labels = {name: point.labels.get(name, "") for name in metric.labels}
        self._remember(run)
        series = target.labels(run=run, **labels)
        if isinstance(series, Counter):
            if point.value < 0:
                return "negative_increment"
            series.inc(point.value)
        elif isinstance(series, Histogram):
            series.observe(point.value)
        else:
            series.set(point.value)
        return None

    def count(self, key: str, labels: Mapping[str, str] | None = None, value: float = 1.0) -> None:
        """For what Nissa says about itself."""
        refused = self.apply(MetricPoint(key, value, labels or {}))
        assert refused is None, f"{key}: {refused}"

    def exposition(self) -> bytes:
        """What ``/metrics`` answers."""
        return generate_latest(self.registry)

    def _create(self, metric: Metric) -> Gauge | Counter | Histogram:
        text = f"{metric.meaning} [{metric.unit}], from {metric.emitter}"
        labels = ("run", *metric.labels)
        if metric.kind == "counter":
            return Counter(metric.name, text, labels, registry=self.registry)
        if metric.kind == "gauge":
            return Gauge(metric.name, text, labels, registry=self.registry)
        return Histogram(metric.name, text, labels, registry=self.registry, buckets=metric.buckets)

    def _remember(self, run: str) -> None:
        if not run or run in self._runs:
            return
        self._runs[run] = None
        if len(self._runs) > _RUNS_KEPT:
            oldest, _ = self._runs.popitem(last=False)
            for _, target in self._metrics.values():
                target.remove_by_labels({"run": oldest})
