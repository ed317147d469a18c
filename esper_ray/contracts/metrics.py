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
    Metric("em", "esper_emergency_level", "gauge", "1", "0 normal, 1 notice to 4 halt", "tolaria"),
    Metric("ro", "esper_rollbacks_total", "counter", "1", "rollbacks done", "tolaria", ("how",)),
    Metric("rt", "esper_rollback_ms", "histogram", "ms", "the parts of a rollback", "tolaria", ("part",), _MS),
    Metric("ck", "esper_checkpoints_lost_total", "counter", "1", "checkpoints not written, or damaged", "tolaria"),
    Metric("cp", "esper_checkpoint_ms", "histogram", "ms", "training held up by a checkpoint", "tolaria", (), _MS),
    Metric(
        "rw",
        "esper_outside_rate_writes_total",
        "counter",
        "1",
        "learning rates that something else wrote: undone",
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
    Metric("ic", "esper_isolation_checks", "gauge", "1", "isolation checks made in the run so far", "kasmina"),
    Metric(
        "ng",
        "esper_newborn_gradient_ratio",
        "gauge",
        "ratio",
        "root mean square gradient of the seeds that are no fossils, over the model's",
        "kasmina",
    ),
    Metric("jg", "esper_joint_gain", "gauge", "nats", "what all live seeds gain together", "kasmina"),
    Metric(
        "ix",
        "esper_seed_interaction",
        "gauge",
        "nats",
        "gain of each with the others on, summed, less the joint one; of two live seeds or more",
        "kasmina",
    ),
    Metric(
        "cf",
        "esper_gradient_conflict_ratio",
        "gauge",
        "ratio",
        "pairs of gradients of shared parameters that point apart, of all such pairs in the epoch",
        "kasmina",
    ),
    Metric("gp", "esper_gates_passed_total", "counter", "1", "gates passed", "kasmina", ("gate",)),
    Metric("gd", "esper_gates_denied_total", "counter", "1", "gates refused", "kasmina", ("gate",)),
    # Simic: the school
    Metric("sx", "esper_simic_records_total", "counter", "1", "decisions and reports kept", "simic", ("type",)),
    Metric("ss", "esper_simic_steps", "gauge", "1", "environment steps of the training", "simic"),
    Metric("sr", "esper_simic_return", "gauge", "1", "mean return of the last 100 episodes", "simic"),
    Metric("sv", "esper_simic_evaluation_return", "gauge", "1", "mean return of the last greedy evaluation", "simic"),
    Metric("sq", "esper_simic_steps_per_second", "gauge", "1/s", "steps acted and learned, per second", "simic"),
    Metric("se", "esper_simic_entropy", "gauge", "nats", "mean entropy of the policy", "simic"),
    Metric("sg", "esper_simic_policy_lag", "gauge", "1", "how many versions behind the acting weights were", "simic"),
    Metric("sd", "esper_simic_dropped_steps", "gauge", "1", "steps too stale to learn from", "simic"),
    Metric("rk", "esper_risk_level", "gauge", "1", "1 green, 2 yellow, 3 orange, 4 red, 5 critical", "tamiyo"),
    Metric("pr", "esper_policy_refused_total", "counter", "1", "policies refused", "tamiyo", ("reason",)),
    Metric("pv", "esper_policy_validations_total", "counter", "1", "validations done", "simic", ("verdict",)),
    # Oona: the bus
    Metric("od", "esper_bus_depth", "gauge", "1", "messages somebody has still to take", "oona", ("stream",)),
    Metric("oq", "esper_bus_dead_letters", "gauge", "1", "messages nobody could use", "oona", ("stream",)),
    Metric("ol", "esper_bus_oldest_seconds", "gauge", "s", "age of the oldest message in work", "oona", ("group",)),
    Metric(
        "oz", "esper_bus_dead_letters_lost_total", "counter", "1", "the oldest, over the limit", "oona", ("stream",)
    ),
    Metric("or", "esper_bus_reader_total", "counter", "1", "what readers met", "oona", ("group", "outcome")),
    Metric("op", "esper_bus_spooled_total", "counter", "1", "messages kept on disk for a bus that was away", "oona"),
    Metric("oy", "esper_bus_replayed_total", "counter", "1", "of these, sent later", "oona"),
    Metric("ox", "esper_bus_dropped_total", "counter", "1", "messages lost at their sender", "oona", ("reason",)),
    Metric("os", "esper_bus_shed_total", "counter", "1", "messages left out under load", "oona", ("reason",)),
    Metric("ob", "esper_breaker_state", "gauge", "1", "1 closed, 2 open, 3 trying again", "oona", ("breaker",)),
    # The supervisor
    Metric(
        "ar", "esper_actor_restarts_total", "counter", "1", "actors that died and came back", "supervisor", ("actor",)
    ),
    # Leyline: the contracts
    Metric("rf", "esper_refused_total", "counter", "1", "messages refused on arrival", "contracts", ("reason",)),
    # Nissa: observability itself
    Metric("tt", "esper_telemetry_truncated_total", "counter", "1", "texts cut to fit a packet", "contracts"),
    Metric("tn", "esper_telemetry_not_finite_total", "counter", "1", "points left out: not finite", "contracts"),
    Metric("nt", "esper_nissa_records_total", "counter", "1", "messages taken in", "nissa", ("type",)),
    Metric("nu", "esper_nissa_duplicates_total", "counter", "1", "messages that came again, without effect", "nissa"),
    Metric("nx", "esper_nissa_refused_total", "counter", "1", "messages or points of no use", "nissa", ("reason",)),
    Metric("na", "esper_alert_firing", "gauge", "1", "1 while the alert fires", "nissa", ("alert",)),
    Metric("nd", "esper_events_dropped", "gauge", "1", "records that never reached the event store", "nissa"),
    # Urza: the store
    Metric(
        "uh", "esper_urza_hits_total", "counter", "1", "kernels served, by where they were found", "urza", ("tier",)
    ),
    Metric("um", "esper_urza_missing_total", "counter", "1", "kernels asked for that were not there", "urza"),
    Metric("ux", "esper_urza_corrupt_total", "counter", "1", "artifacts refused: damaged or gone", "urza"),
    Metric("ub", "esper_urza_cache_bytes", "gauge", "bytes", "artifacts held in memory", "urza"),
    Metric("uk", "esper_urza_kernels", "gauge", "1", "artifacts in the catalogue", "urza"),
    Metric("us", "esper_urza_slowest_fetch_ms", "gauge", "ms", "slowest fetch since the last report", "urza"),
    # Tezzeret: the forge
    Metric(
        "zd", "esper_forge_done", "gauge", "1", "kernels made or given up in the current phase", "tezzeret", ("phase",)
    ),
    Metric("zw", "esper_forge_wanted", "gauge", "1", "kernels wanted in the current phase", "tezzeret", ("phase",)),
    Metric("zt", "esper_forge_job_ms", "gauge", "ms", "time the last kernel took to make", "tezzeret", ("phase",)),
    Metric(
        "zr", "esper_forge_retries_total", "counter", "1", "jobs tried again after a failure", "tezzeret", ("phase",)
    ),
    Metric(
        "zg", "esper_forge_given_up_total", "counter", "1", "kernels given up after retries", "tezzeret", ("phase",)
    ),
    Metric("zc", "esper_forge_compiled_total", "counter", "1", "kernels for which compiled code pays", "tezzeret"),
    Metric("zm", "esper_forge_conservative", "gauge", "1", "1 while the forge works in conservative mode", "tezzeret"),
)

BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class WireKey:
    """A key in a message's own map of metrics; Prometheus does not see it."""

    key: str
    unit: str
    meaning: str


STATE_METRICS = (
    WireKey("pc", "1", "parameters of host and seeds"),
    WireKey("lr", "1", "the host's learning rate"),
    WireKey("cr", "ratio", "FLOPs charged so far, to what the host alone would have taken"),
    WireKey("em", "1", "emergency level of the run: 0 normal, 1 notice to 4 halt"),
)
SEED_METRICS = (
    WireKey("g", "nats", "counterfactual gain: loss without the seed less loss with it, on the same held-out batches"),
    WireKey("ge", "nats", "standard error of the gain"),
)
REPORT_METRICS = SEED_METRICS

assert len(BY_KEY) == len(METRICS), "two metrics share a short key"
