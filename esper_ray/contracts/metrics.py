"""Every metric there is: one table. Prometheus names, documents, the page and the tests are derived from it.

``key`` is the short name on the wire. Nothing is shown that is not in this table, and a test demands that each
row is emitted on the real path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from esper_ray.contracts.budgets import BOUNDARY_PARTS

Kind = Literal["gauge", "counter", "histogram"]

_MS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 3.5, 5.0, 8.0, 12.0, 18.0, 30.0, 60.0, 120.0, 500.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``emitter`` is the room that sends it; ``buckets`` are for histograms, in the metric's unit."""

    key: str
    name: str
    kind: Kind
    unit: str
    meaning: str
    emitter: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    # Tolaria: the loop
    Metric("tl", "esper_training_loss", "gauge", "nats", "mean training loss of the epoch", "tolaria"),
    Metric("vl", "esper_validation_loss", "gauge", "nats", "loss on the validation split", "tolaria"),
    Metric("va", "esper_validation_accuracy", "gauge", "ratio", "accuracy on the validation split", "tolaria"),
    Metric("lr", "esper_learning_rate", "gauge", "1", "the host's learning rate", "tolaria"),
    Metric("gn", "esper_host_gradient_norm", "gauge", "1", "the host's gradient norm before clipping", "tolaria"),
    Metric(
        "st",
        "esper_step_ms",
        "histogram",
        "ms",
        "mean time of a training step in the epoch",
        "tolaria",
        (),
        _MS,
    ),
    Metric("ep", "esper_epoch", "gauge", "1", "epochs finished in the active run", "tolaria"),
    Metric("pc", "esper_parameters", "gauge", "1", "parameters of host and live seeds", "tolaria"),
    Metric("fl", "esper_flops_total", "gauge", "flop", "floating-point operations charged to the run", "tolaria"),
    Metric("bd", "esper_boundary_ms", "histogram", "ms", "the whole boundary", "tolaria", (), _MS),
    *(
        Metric(budget.key[:2], f"esper_{budget.key}_ms", "histogram", "ms", budget.meaning, "tolaria", (), _MS)
        for budget in BOUNDARY_PARTS
    ),
    Metric(
        "md",
        "esper_missed_deadlines_total",
        "counter",
        "1",
        "decisions that came too late: no change",
        "tolaria",
    ),
    # Kasmina: the seeds
    Metric("sl", "esper_seeds_live", "gauge", "1", "seeds between germination and fossil", "kasmina"),
    Metric("sf", "esper_seeds_fossilized", "gauge", "1", "seeds that became part of the host", "kasmina"),
    Metric("sc", "esper_seeds_culled_total", "counter", "1", "seeds removed again", "kasmina"),
    Metric("gr", "esper_graft_ms", "histogram", "ms", "a ready kernel swapped into its slot", "kasmina", (), _MS),
    Metric(
        "iv",
        "esper_isolation_violations_total",
        "counter",
        "1",
        "host gradients changed by a seed",
        "kasmina",
    ),
    Metric("ic", "esper_isolation_checks_total", "counter", "1", "isolation checks made", "kasmina"),
    Metric("gp", "esper_gates_passed_total", "counter", "1", "gates passed", "kasmina", ("gate",)),
    Metric("gd", "esper_gates_denied_total", "counter", "1", "gates refused", "kasmina", ("gate",)),
    # Nissa: observability itself
    Metric("tt", "esper_telemetry_truncated_total", "counter", "1", "texts cut to fit a packet", "contracts"),
    Metric("tn", "esper_telemetry_not_finite_total", "counter", "1", "points left out: not finite", "contracts"),
)

BY_KEY = {metric.key: metric for metric in METRICS}
assert len(BY_KEY) == len(METRICS), "two metrics share a short key"
