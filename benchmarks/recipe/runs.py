"""One run of a trial, and the file of results: a JSON line for each task, name and random seed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.recipe.trials import TASKS, Trial
from benchmarks.recipe.variants import applied
from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.tolaria.trainer import Block, RunRequest, Trainer

FOLDER = Path(__file__).parents[1] / "results" / "recipe"
DATA = Path("build/recipe/data")
Row = Mapping[str, Any]
# Runs of these names keep what became of each seed at each boundary: epoch, seed, stage, alpha, gain, gradient ratio.
LIVES = ("default", "recipe")


def done(task: str) -> dict[tuple[str, int], Row]:
    """The results of a task by (name, random seed)."""
    file = FOLDER / f"{task}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(row["name"], row["seed"]): row for row in rows}


def keep(task: str, row: Row) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{task}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def run(task: str, trial: Trial, seed: int) -> Row:
    """Train it in this process, with one thread and in lockstep; the test split's figures are thrown away."""
    import torch

    torch.set_num_threads(1)
    setting = TASKS[task]
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="esper-recipe-") as folder:
        home = Path(folder)
        (home / "data").symlink_to(DATA.resolve())
        fixed = ("run.mode=lockstep", "run.keep_checkpoints=1", "tamiyo.record=false", "tamiyo.controller=heuristic")
        own = (f"home={home}", f"run.seed={seed}", f"run.epochs={trial.epochs}")
        config = configuration.load(None, [*own, *fixed, *setting.settings, *trial.settings])
        final = range(setting.slots) if trial.arm == "final" else ()
        blocks = tuple(Block(slot, trial.blueprint or setting.blueprint, {}) for slot in final)
        with applied(trial.variant):
            result = Trainer(RunRequest("run", config, trial.arm, blocks=blocks), inprocess.surroundings(config)).run()
        rows = [json.loads(line) for line in (config.runs / "run" / "metrics.jsonl").read_text().splitlines()]
    return compact(trial.name, seed, result, rows)


def compact(name: str, seed: int, result: Row, rows: list[dict[str, Any]]) -> Row:
    """What is kept of a run; ``curve`` has FLOPs, validation loss and accuracy at each boundary."""
    row = {
        "name": name,
        "seed": seed,
        "flops": result["flops"],
        "loss": round(result["validation_loss"], 5),
        "accuracy": result["validation_accuracy"],
        "parameters": result["parameters"],
        "fossils": result["fossilized"],
        "culled": result["culled"],
        "curve": [[row["flops"], round(row["validation_loss"], 4), row["validation_accuracy"]] for row in rows],
        "commit": common.commit(),
    }
    if name in LIVES:
        row["seeds"] = [[_moment(row["epoch"], seed) for seed in row["seeds"]] for row in rows]
    return row


def _moment(epoch: int, seed: Row) -> list[Any]:
    return [epoch, seed["seed"], seed["stage"], seed["alpha"], seed["gain"], seed.get("gradient_ratio")]
