"""How a run's state is told: to Tamiyo, to the files, to the bus, to whoever watches. It only reads the trainer."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from esper_ray.contracts.enums import EmergencyLevel
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import (
    AdaptationCommand,
    HardwareContext,
    MetricPoint,
    TelemetryEvent,
    blueprint_name,
)
from esper_ray.contracts.schema import schema_digest
from esper_ray.contracts.telemetry import event
from esper_ray.errors import ConfigError
from esper_ray.kasmina.lifecycle import GROWING, SETTLED
from esper_ray.kasmina.slot import Seed
from esper_ray.tolaria.boundary import Exchange
from esper_ray.tolaria.measure import Quality
from esper_ray.tolaria.multiseed import Credit

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden
    from esper_ray.tolaria.trainer import Trainer

_MB = 2**20


def pick_device(wanted: str) -> torch.device:
    """The device of ``run.device``.

    Raises:
        ConfigError: CUDA is wanted and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device is cuda, but torch sees no CUDA device.",
            remedy="Install a CUDA build of torch, or set run.device=auto.",
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def hardware(device: torch.device) -> HardwareContext:
    """The device as it is now; the machine's memory on a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        return HardwareContext(
            "cuda", device.index or 0, total / _MB, free / _MB, compute_capability=f"{major}.{minor}"
        )
    memory = psutil.virtual_memory()
    return HardwareContext("cpu", 0, memory.total / _MB, memory.available / _MB)


def room(garden: Garden) -> dict[str, float]:
    """How much computation may still be added, where the user limits it, as a decider gets it: never too much."""
    if not garden.limits.wanted:
        return {}
    left = np.float32(garden.limits.room(garden.seeds))
    # On its way it becomes a number of 32 bits, which must not be above the limit.
    return {"fr": float(np.nextafter(left, np.float32(-np.inf)))} if np.isfinite(left) else {}


def manifest(trainer: Trainer) -> dict[str, Any]:
    """What was run, on what, and everything that was chosen by measurement."""
    run = trainer.request
    return {
        "run_id": run.run,
        "arm": run.arm,
        "config": run.config.model_dump(mode="json"),
        "blocks": [asdict(block) for block in run.blocks],
        "flops": run.flops,
        "fork": run.fork.as_row() if run.fork is not None else None,
        "total_steps": trainer.total_steps,
        "steps_per_epoch": trainer.steps_per_epoch,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "host_parameters": trainer.host_parameters,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "schema": schema_digest()[:16],
        },
        "backends": dict(trainer.around.backends),
        "slots": [{"index": s.index, "name": s.name, "signature": str(s.signature)} for s in trainer.task.slots],
    }


def epoch_row(
    trainer: Trainer, training_loss: float, quality: Quality, exchange: Exchange, step_ms: float, gradient_norm: float
) -> dict[str, Any]:
    """One row of metrics.jsonl; times of the boundary in ms."""
    times = exchange.times
    return {
        "epoch": trainer.epoch,
        "step": trainer.step,
        "training_loss": training_loss,
        "validation_loss": quality.loss,
        "validation_accuracy": quality.accuracy,
        "learning_rate": trainer.rates.host_rate(trainer.step),
        "gradient_norm": gradient_norm,
        "parameters": trainer.garden.parameter_count(),
        "flops": trainer.meter.total,
        "seconds": trainer.seconds,
        "step_ms": step_ms,
        "boundary": {name: getattr(times, name) for name in ("total", "assembly", "decide", "apply", "guard")},
        "missed": bool(exchange.missed),
        "branch": trainer.garden.branch,
        "emergency": trainer.emergency.level.name if trainer.emergency.level else "",
        "checkpoint_ms": trainer.checkpoint_ms,
        "isolation_checks": trainer.garden.checks,
        "isolation_violations": trainer.garden.violations,
        "outside_rate_writes": trainer.rates.outside_writes,
        "conflict_ratio": trainer.groups.shared.conflicts.drain(),
        "credit": together(trainer.credit),
        "seeds": [
            {
                "seed": seed.number,
                "slot": seed.slot,
                "blueprint": seed.spec.blueprint,
                "stage": seed.stage.name,
                "alpha": seed.alpha,
                "gain": None if seed.stage in SETTLED else seed.evidence.get("gain"),
                "gain_error": None if seed.stage in SETTLED else seed.evidence.get("gain_error"),
                "gradient_norm": seed.gradient_norm,
                "gradient_ratio": gradient_ratio(trainer, seed, gradient_norm),
            }
            for seed in trainer.garden.seeds
        ],
    }


def gradient_ratio(trainer: Trainer, seed: Seed, model_norm: float) -> float | None:
    """Root mean square gradient of a seed's parameters over that of the model's; None for a fossil, or without any.

    Below 1 a newborn gets less to learn from than what is around it ("backward-starved"; Lillo and Cheney 2026,
    arXiv:2605.15435). The seed's is that of the last step that taught it, the model's that of the epoch's last step.
    """
    count = seed.parameter_count
    if seed.stage in SETTLED or not count or not seed.gradient_norm or not model_norm:
        return None
    whole = sum(parameter.numel() for parameter in trainer.model.parameters())
    return seed.gradient_norm / math.sqrt(count) / (model_norm / math.sqrt(whole))


def together(credit: Credit | None) -> dict[str, Any] | None:
    """What the live seeds gain together, and how far that is from what each gains by itself."""
    if credit is None:
        return None
    return {
        "joint": credit.joint.mean,
        "joint_error": credit.joint.error,
        "interaction": credit.interaction.mean if len(credit.single) > 1 else None,
        "interaction_error": credit.interaction.error if len(credit.single) > 1 else None,
    }


def decision(exchange: Exchange) -> dict[str, Any]:
    """The decision of a boundary as an event, with the reasons of each command."""
    given = (each.annotations.get(name, "") for each in exchange.commands for name in ("why", "risk"))
    why = "; ".join(filter(None, dict.fromkeys(given))) or exchange.missed or "nothing calls for a change"
    return decided(exchange.commands, why=why, refused=exchange.refused, missed=bool(exchange.missed))


def decided(
    commands: Sequence[AdaptationCommand], *, why: str, refused: Sequence[str], missed: bool = False
) -> dict[str, Any]:
    """Commands of one author as an event."""
    return {
        "kind": "decision",
        "commands": [
            {
                "operation": command.seed_directive.operation.name if command.seed_directive else command.type.name,
                "slot": command.slot if command.seed_directive else "",
                "blueprint": _block(command),
            }
            for command in commands
        ],
        "why": why,
        "controller": commands[0].issued_by if commands else "",
        "missed": missed,
        "refused": list(refused),
    }


def _block(command: AdaptationCommand) -> str:
    directive = command.seed_directive
    return blueprint_name(directive.blueprint) if directive is not None and directive.blueprint else ""


def points(row: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Iterable[MetricPoint]:
    """The epoch's row and events as metric points; counters are what came since the last epoch."""
    values = {
        "tl": row["training_loss"], "vl": row["validation_loss"], "va": row["validation_accuracy"],
        "lr": row["learning_rate"], "gn": row["gradient_norm"], "st": row["step_ms"], "ep": row["epoch"],
        "pc": row["parameters"], "fl": row["flops"], "bd": row["boundary"]["total"],
        "as": row["boundary"]["assembly"], "de": row["boundary"]["decide"], "ap": row["boundary"]["apply"],
        "gu": row["boundary"]["guard"], "cp": row["checkpoint_ms"], "md": float(row["missed"]),
    }  # fmt: skip
    stages = Counter(seed["stage"] for seed in row["seeds"])
    values["sl"] = sum(stages[stage.name] for stage in GROWING)
    values["sf"] = sum(stages[stage.name] for stage in SETTLED)
    values["sc"] = sum(item["kind"] == "stage" and item["to"] == Stage.CULLED.name for item in events)
    values["em"] = EmergencyLevel[row["emergency"]] if row["emergency"] else 0
    values["rw"] = sum(item["times"] for item in events if item["kind"] == "rate")
    values["ic"] = row["isolation_checks"]
    values["iv"] = sum(item["kind"] == "isolation" for item in events)
    yield from (MetricPoint(key, float(value)) for key, value in values.items())
    together = row["credit"] or {}
    measured = {"jg": together.get("joint"), "ix": together.get("interaction"), "cf": row["conflict_ratio"]}
    yield from (MetricPoint(key, float(value)) for key, value in measured.items() if value is not None)
    ratios = [seed["gradient_ratio"] for seed in row["seeds"] if seed["gradient_ratio"] is not None]
    if ratios:
        yield MetricPoint("ng", sum(ratios) / len(ratios))
    breakers = (item for item in events if item["kind"] == "breaker")
    yield from (MetricPoint("ob", float(item["value"]), {"breaker": item["breaker"]}) for item in breakers)
    yield from (MetricPoint("gr", item["ms"]) for item in events if item["kind"] == "graft")
    verdicts = Counter((item["passed"], item["gate"]) for item in events if item["kind"] == "gate")
    for (passed, gate), count in verdicts.items():
        yield MetricPoint("gp" if passed else "gd", float(count), {"gate": gate})


def progress(trainer: Trainer, row: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a watcher sees; with ``row`` at an epoch's end, else in its middle."""
    data: dict[str, Any] = {
        "run_id": trainer.request.run,
        "arm": trainer.request.arm,
        "state": "training",
        "epoch": trainer.epoch,
        "epochs": trainer.epochs,
        "branch": trainer.garden.branch,
        "step": trainer.step,
        "steps": trainer.total_steps,
        "parameters": trainer.garden.parameter_count(),
        "seeds": [
            {"seed": s.number, "slot": s.slot, "blueprint": s.spec.blueprint, "stage": s.stage.name, "alpha": s.alpha}
            for s in trainer.garden.seeds
        ],
    }
    if row is not None:
        data |= {"loss": row["validation_loss"], "validation_accuracy": row["validation_accuracy"]}
    return data


def result(trainer: Trainer, quality: Quality, test: Quality) -> dict[str, Any]:
    """The row of result.json."""
    return {
        "run_id": trainer.request.run,
        "status": "finished",
        "arm": trainer.request.arm,
        "seed": trainer.config.run.seed,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "validation_accuracy": quality.accuracy,
        "validation_loss": quality.loss,
        "parameters": trainer.garden.parameters_in_path(),
        "host_parameters": trainer.host_parameters,
        "flops": trainer.meter.total,
        "wall_seconds": trainer.seconds,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "fossilized": len(trainer.garden.in_stage(*SETTLED)),
        "culled": trainer.garden.culled,
        "missed_deadlines": trainer.missed,
        "isolation_checks": trainer.garden.checks,
        "isolation_violations": trainer.garden.violations,
        "blocks": [
            {
                "slot": s.slot,
                "blueprint": s.spec.blueprint,
                "parameters": dict(s.spec.parameters),
                "blend_mode": s.mode.name.lower(),
            }
            for s in trainer.garden.seeds
            if s.alpha > 0.0
        ],
    }


def started(trainer: Trainer) -> list[TelemetryEvent]:
    """The events that open a run."""
    run = trainer.config.run
    opened = {
        "task": run.task,
        "dataset": run.dataset,
        "arm": trainer.request.arm,
        "epochs": trainer.epochs,
        "parameters": trainer.host_parameters,
        "mode": run.mode,
    }
    backends = [event("backend", {"name": name, "value": value}) for name, value in trainer.around.backends.items()]
    return [event("run.started", opened), *backends]


def finished(result: Mapping[str, Any]) -> list[TelemetryEvent]:
    """The event that closes a run."""
    return [event("run.finished", {"test_accuracy": result["test_accuracy"], "status": result["status"]})]
