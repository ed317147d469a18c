"""One run of a trial, and the file of results: a JSON line for each task, name and random seed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.recipe.trials import TASKS, Trial
from esper_ray import config as configuration

FOLDER = Path(__file__).parents[1] / "results" / "recipe"
DATA = Path("build/recipe/data")
Row = Mapping[str, Any]
# Runs of this random seed keep what became of each seed at each boundary: epoch, number, stage, alpha, gain, gradient
# ratio.
TOLD = 100


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
    """Train it in this process, with one thread and in lockstep; the test split's figures are thrown away.

    What is kept of the end comes from `small.SELECTION` more samples where the task has them, which nobody decides by.
    """
    import torch

    from benchmarks.recipe import small
    from benchmarks.recipe.variants import applied
    from esper_ray import inprocess
    from esper_ray.tasks.data import Split
    from esper_ray.tolaria.costs import CostMeter
    from esper_ray.tolaria.measure import evaluate
    from esper_ray.tolaria.trainer import Block, RunRequest, Trainer

    torch.set_num_threads(1)
    setting = TASKS[task]
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="esper-recipe-") as folder:
        home = Path(folder)
        (home / "data").symlink_to(DATA.resolve())
        fixed = ("run.mode=lockstep", "run.keep_checkpoints=1", "tamiyo.record=false", "tamiyo.controller=heuristic")
        own = (f"home={home}", f"run.seed={seed}", f"run.epochs={trial.epochs}")
        config = configuration.load(None, [*own, *fixed, *setting.settings, *trial.settings])
        slots = range(setting.slots) if trial.arm == "final" else ()
        blocks = tuple(Block(slot, setting.blueprint, {}) for slot in slots)
        with applied(trial.variant):
            trainer = Trainer(RunRequest("run", config, trial.arm, blocks=blocks), inprocess.surroundings(config))
            result = trainer.run()
        if task == "small":
            more = Split(*small.split("selection", small.SELECTION, seed=1))
            quality = evaluate(trainer.model, more, CostMeter(), "selection")
            result |= {"validation_loss": quality.loss, "validation_accuracy": quality.accuracy}
        rows = [json.loads(line) for line in (config.runs / "run" / "metrics.jsonl").read_text().splitlines()]
    return compact(trial.name, seed, result, rows)


def compact(name: str, seed: int, result: Row, rows: list[dict[str, Any]]) -> Row:
    """What is kept of a run; ``curve`` has FLOPs, validation loss and accuracy at each boundary."""
    row: dict[str, Any] = {
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
    if seed == TOLD:
        row["seeds"] = [[_moment(each["epoch"], one) for one in each["seeds"]] for each in rows]
    return row


def _moment(epoch: int, seed: Row) -> list[Any]:
    return [epoch, seed["seed"], seed["stage"], seed["alpha"], seed["gain"], seed.get("gradient_ratio")]
