"""One training with what a person wants of it: its folder, its curve, its picture, its policy, and what Nissa hears.

    school/<name>/   plan.json, checkpoint.*, curve.jsonl, learning-curve.png, result.json, policy.*
    policies/<id>/   the policy that came out, where the environment is Tamiyo's own

No Ray: who acts and learns is given.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from esper_ray.config import Config, SimicConfig
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.ports import Publisher
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.errors import CheckpointError, ConfigError
from esper_ray.reliability import atomic
from esper_ray.reliability.ids import digest
from esper_ray.simic import checkpoints, plots
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.policies import Policy, policy_for
from esper_ray.simic.training import Crew, Progress, TrainingResult, train
from esper_ray.tamiyo import policy_store
from esper_ray.tamiyo.policy import GraphPolicy

POLICY = "policy.safetensors"
_PLAN, _CURVE, _RESULT, _PICTURE = "plan.json", "curve.jsonl", "result.json", "learning-curve.png"


def folder_of(home: Path, name: str) -> Path:
    """Where a training of that name lives.

    Raises:
        ConfigError: the name would be no plain folder name.
    """
    if not re.fullmatch(r"[\w.-]{1,80}", name) or name.startswith("."):
        raise ConfigError(f"{name!r} is no name for a training.", remedy="Use letters, digits, dots, - and _.")
    return home / "school" / name


def trainings(home: Path) -> list[dict[str, Any]]:
    """Plan and result of every training, the newest first."""
    found = []
    for file in (home / "school").glob(f"*/{_PLAN}"):
        result = file.with_name(_RESULT)
        row = {"name": file.parent.name, "at": file.stat().st_mtime, **json.loads(file.read_text())}
        found.append({**row, "result": json.loads(result.read_text()) if result.exists() else {}})
    return sorted(found, key=lambda row: -row["at"])


def plan_of(home: Path, name: str) -> TrainingPlan:
    """The plan of a training that was begun.

    Raises:
        CheckpointError: there is none of that name.
    """
    file = folder_of(home, name) / _PLAN
    if not file.exists():
        known = ", ".join(row["name"] for row in trainings(home)[:5]) or "none"
        raise CheckpointError(f"There is no training {name!r}.", remedy=f"There are: {known}.")
    data = json.loads(file.read_text())
    return TrainingPlan(
        env=EnvChoice(data["env"], data["options"]),
        algo=data["algo"],
        steps=data["steps"],
        seed=data["seed"],
        config=SimicConfig(**data["config"]),
        folder=file.parent,
        stop_at=data["stop_at"],
        initial=Path(data["initial"]) if data["initial"] else None,
    )


@dataclass(frozen=True, slots=True)
class Schooled:
    """How it ended, and what came out. ``policy_id`` is empty where the policy is not Tamiyo's."""

    result: TrainingResult
    policy_id: str
    picture: Path


class School:
    """One training in its folder.

    Args:
        publisher: the bus, where there is one.
        on_progress: told after each update.
        on_note: told what a resumed training does not go on with.
    """

    def __init__(
        self,
        config: Config,
        plan: TrainingPlan,
        *,
        publisher: Publisher | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_note: Callable[[str], None] = lambda _: None,
    ) -> None:
        assert plan.folder is not None
        self._config, self._plan, self._publisher = config, plan, publisher
        self._told, self._noted = on_progress, on_note
        self.folder: Path = plan.folder
        self.name = plan.folder.name

    def begin(self, *, resume: bool) -> None:
        """Make the folder, or find that there is something to go on with.

        Raises:
            CheckpointError: nothing to resume, or the name is taken.
        """
        if resume:
            return
        if checkpoints.exists(self.folder) or (self.folder / _RESULT).exists():
            raise CheckpointError(
                f"There is a training {self.name!r} already.",
                remedy="Go on with it by --resume, or give this one another --name.",
            )
        atomic.make_folder(self.folder)
        plan = self._plan
        data = {
            "env": plan.env.id,
            "options": dict(plan.env.options),
            "algo": plan.algo,
            "steps": plan.steps,
            "seed": plan.seed,
            "stop_at": plan.stop_at,
            "initial": str(plan.initial) if plan.initial else None,
            "config": plan.config.model_dump(mode="json"),
        }
        atomic.write_text(self.folder / _PLAN, json.dumps(data, indent=1))
        (self.folder / _CURVE).unlink(missing_ok=True)

    def run(self, crew: Crew | None, *, resume: bool, should_stop: Callable[[], bool]) -> Schooled:
        """Train to the end, or until ``should_stop``; draws the curve and hands out the policy either way.

        Raises:
            EsperError: environment, checkpoint or machine are at fault.
        """
        self._say("running", 0)
        try:
            result = train(
                self._plan,
                crew,
                resume=resume,
                should_stop=should_stop,
                on_progress=self._progress,
                on_note=self._noted,
            )
        except BaseException as fault:
            self._say("failed", 0, str(fault))
            raise
        picture = self.draw()
        policy_id = "" if result.state == "stopped" else self._hand_out(result)
        self._say(result.state, result.steps)
        last = result.evaluations[-1] if result.evaluations else None
        told = {
            "state": result.state,
            "steps": result.steps,
            "updates": result.version,
            "seconds": result.seconds,
            "evaluation_seconds": result.evaluation_seconds,
            "restarts": result.restarts,
            "evaluation": {"steps": last[0], "mean": last[1], "deviation": last[2]} if last else None,
            "policy_id": policy_id,
        }
        atomic.write_text(self.folder / _RESULT, json.dumps(told, indent=1))
        return Schooled(result, policy_id, picture)

    def draw(self) -> Path:
        """The picture of the curve so far."""
        plan = self._plan
        title = f"{plan.algo} on {plan.env.id}, seed {plan.seed}, {plan.config.workers or 'no'} workers"
        return plots.learning_curve(self.folder / _PICTURE, title, list(self.curve()))

    def curve(self) -> list[dict[str, Any]]:
        """One row for each update; of what was done twice after a resume, the later."""
        file = self.folder / _CURVE
        rows: list[dict[str, Any]] = []
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
            while rows and rows[-1]["steps"] >= row["steps"]:
                rows.pop()
            rows.append(row)
        return rows

    def _progress(self, progress: Progress) -> None:
        evaluation = progress.evaluation
        row = {
            "steps": progress.steps,
            "update": progress.version,
            "episodes": progress.episodes,
            "mean_return": _finite(progress.mean_return),
            "steps_per_s": progress.steps_per_s,
            "lag_mean": progress.lag_mean,
            "lag_max": progress.lag_max,
            "dropped_steps": progress.dropped_steps,
            "restarts": progress.restarts,
            "metrics": progress.metrics,
            "evaluation": {"mean": evaluation.mean, "deviation": evaluation.deviation} if evaluation else None,
            "at": time.time(),
        }
        with (self.folder / _CURVE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._tell_nissa(progress)
        self._told(progress)

    def _tell_nissa(self, progress: Progress) -> None:
        if self._publisher is None:
            return
        values: Mapping[str, float | None] = {
            "ss": float(progress.steps),
            "sr": _finite(progress.mean_return),
            "sv": progress.evaluation.mean if progress.evaluation else None,
            "sq": progress.steps_per_s,
            "se": progress.metrics.get("entropy"),
            "sg": progress.lag_mean,
            "sd": float(progress.dropped_steps),
        }
        points = [MetricPoint(key, value) for key, value in values.items() if value is not None]
        publish_telemetry(self._publisher, "simic", self.name, progress.version, points)

    def _say(self, state: str, steps: int, message: str = "") -> None:
        if self._publisher is None:
            return
        plan = self._plan
        told = {
            "run": self.name,
            "algo": plan.algo,
            "env": plan.env.id,
            "steps": steps,
            "of": plan.steps,
            "state": state,
        }
        publish_telemetry(self._publisher, "simic", self.name, 0, (), [event("school", told, message=message)])

    def _hand_out(self, result: TrainingResult) -> str:
        """Keep the policy with its lineage; the id under which Tamiyo now knows it, empty where it is not hers."""
        plan, policy = self._plan, self.policy(result)
        summary = {
            "training": self.name,
            "algo": plan.algo,
            "env": plan.env.id,
            "steps": result.steps,
            "seed": plan.seed,
            "settings": plan.config.model_dump(mode="json"),
            "evaluations": result.evaluations[-3:],
        }
        if isinstance(policy, GraphPolicy):
            return policy_store.save(self._config.home, policy, parent_id=parent_of(plan.initial), training=summary)
        weights = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in result.weights.arrays.items()})
        card = {**summary, "parent": str(plan.initial or ""), "digest": digest(weights)}
        atomic.write_bytes(self.folder / POLICY, weights)
        atomic.write_text(self.folder / "policy.json", json.dumps(card, indent=1))
        return ""

    def policy(self, result: TrainingResult) -> Policy:
        """The policy with the weights that the training ended with."""
        plan = self._plan
        policy = policy_for(plan.env, plan.env.interface(), hidden=plan.config.hidden, seed=plan.seed)
        result.weights.put_into(policy)
        return policy


def parent_of(initial: Path | None) -> str:
    """The id of the policy that a training started from; empty if it started from random weights."""
    if initial is None:
        return ""
    file = initial / _RESULT
    if file.exists():
        return str(json.loads(file.read_text())["policy_id"])
    return initial.name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
