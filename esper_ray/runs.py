"""The run folders on disk: list them, write their reports, hand out their models. No Ray, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.errors import ConfigError, RunError
from esper_ray.reliability import atomic
from esper_ray.tolaria import forks, profile_files
from esper_ray.tolaria.forks import Fork

FORKED_SETTINGS = ("tamiyo.", "emergency.", "seeds.approved=")
CONTROLS = ("host", "final")
MODEL_CARD = "model.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run as its folder tells it; ``result`` is empty while it is not over."""

    path: Path
    manifest: dict[str, Any]
    result: dict[str, Any]

    @property
    def run_id(self) -> str:
        return self.path.name


def find(runs: Path, run_id: str) -> RunFolder:
    """A run's folder.

    Raises:
        RunError: there is none of that name.
    """
    manifest = read_json(runs / run_id / "manifest.json") if "/" not in run_id else {}
    if not manifest:
        raise RunError(f"There is no run {run_id} in {runs}.", remedy="`esper runs` lists them.")
    return RunFolder(runs / run_id, manifest, read_json(runs / run_id / "result.json"))


def every(runs: Path) -> list[RunFolder]:
    """All runs, the newest first."""
    found = [find(runs, path.parent.name) for path in runs.glob("*/manifest.json")]
    return sorted(found, key=lambda run: str(run.manifest.get("started_at", "")), reverse=True)


def arms_of(runs: Path, run_id: str) -> list[Path]:
    """The folders of the controls that were trained beside a run."""
    folders = [runs / f"{run_id}-{arm}" for arm in CONTROLS]
    return [folder for folder in folders if (folder / "manifest.json").exists()]


def report(runs: Path, run_id: str) -> Path:
    """Write the report of a run, beside its controls where there are any; returns the page's path.

    Raises:
        RunError: there is no such run, or it has no epoch yet.
    """
    from esper_ray.nissa.report import write_report

    return write_report(find(runs, run_id).path, arms_of(runs, run_id))


def fork_at(runs: Path, place: str, decide: Sequence[str], author: str) -> Fork:
    """The fork that ``RUN@EPOCH`` names; without an epoch it is the last that is kept.

    Raises:
        RunError: there is no such run, or none of its checkpoints is kept.
    """
    run, epoch = forks.parse_place(place)
    parent = find(runs, run)
    there = forks.kept(parent.path)
    if not there:
        raise RunError(f"{run} has no checkpoint to go on from.", why="It has not finished an epoch.")
    return Fork(run, there[-1] if epoch is None else epoch, tuple(decide), author)


def check_fork(runs: Path, fork: Fork, settings: Sequence[str]) -> Config:
    """The configuration of a fork: its parent's, with the settings that belong to who decides.

    Raises:
        EsperError: there is no such run or checkpoint, or a decision or a setting is not possible there.
    """
    for setting in settings:
        if not setting.startswith(FORKED_SETTINGS):
            raise ConfigError(
                f"{setting} cannot be set with --fork.",
                why="The new run keeps its parent's configuration, so that only decisions differ.",
                remedy=f"Set what begins with {', '.join(FORKED_SETTINGS)}.",
            )
    parent = find(runs, fork.parent)
    config = configuration.changed(parent.manifest["config"], settings)
    forks.check(parent.path, parent.manifest, fork, config.seeds.approved)
    return config


def export(runs: Path, run_id: str, out: Path | None) -> Path:
    """The folder with the run's model for plain PyTorch; with ``out`` a copy of it there.

    Raises:
        RunError: there is no such run, it is not finished, or ``out`` holds another model.
    """
    model = find(runs, run_id).path / "model"
    about = model / MODEL_CARD
    if not about.exists():
        raise RunError(
            f"{run_id} has no model yet.",
            why="It is written at the end of a run.",
            remedy=f"Finish it with `esper run --resume {run_id}`.",
        )
    if out is None:
        return model
    there = out / MODEL_CARD
    if there.exists() and there.read_bytes() != about.read_bytes():
        raise RunError(f"{out} holds another model already.", remedy="Choose another folder with --out.")
    # The card last: a folder that has one is complete.
    for file in sorted(model.iterdir(), key=lambda file: file.name == MODEL_CARD):
        atomic.write_bytes(out / file.name, file.read_bytes())
    return out


def ask_for_profile(runs: Path, run_id: str, epoch: int = 0) -> int:
    """Ask a run that trains for a profile of an epoch, by default of the next one; returns which.

    Raises:
        RunError: there is no such run, it is over, or that epoch is.
    """
    run = find(runs, run_id)
    file = run.path / "metrics.jsonl"
    done = len(file.read_text().splitlines()) if file.exists() else 0
    wanted = epoch or done + 2
    if profile_files.table_file(run.path, wanted).exists():
        return wanted
    last = -(-int(run.manifest["total_steps"]) // int(run.manifest["steps_per_epoch"]))
    if run.result or not done < wanted <= last:
        raise RunError(
            f"Epoch {wanted} of {run_id} cannot be profiled.",
            why="The run is over." if run.result else f"It has done {done} of its {last} epochs.",
            remedy=f"Ask for one to come, or train with --set 'run.profile_epochs=[{wanted}]'.",
        )
    atomic.write_text(profile_files.wanted_file(run.path, wanted), "")
    return wanted


def profile_of(runs: Path, run_id: str, epoch: int) -> tuple[str, Path] | None:
    """The table of that epoch's profile and the path of its trace; None while there is none."""
    run = find(runs, run_id)
    table = profile_files.table_file(run.path, epoch)
    return (table.read_text(), profile_files.trace_file(run.path, epoch)) if table.exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """The file's content, empty where there is none (yet)."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return content
