"""One run of the study in this process, and what it cost.

A run's folder is named by its identity: the code that decides what comes out and everything that was set. So a result
is never taken for that of other code or settings, and a run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import esper_ray
from esper_ray import inprocess
from esper_ray.config import Config
from esper_ray.reliability.ids import digest
from esper_ray.tolaria.trainer import Block, RunRequest, Trainer

_PACKAGE = Path(esper_ray.__file__).parent
_STUDY = Path(__file__).parent
SCRATCH_CODE = ("tolaria", "kasmina", "karn", "tasks", "inprocess.py")
GROWN_CODE = (*SCRATCH_CODE, "tamiyo", "urza/artifacts.py", "tezzeret/compiler.py")
STUDY_CODE = ("runs.py", "study.py")
KERNELS = inprocess.LocalKernels()
"""Built and checked once in this process, as the forge's are once on a machine. That work is in no run's cost."""


@lru_cache(maxsize=16)
def code(parts: Sequence[str], study: Sequence[str]) -> str:
    """Digest of those files and folders of the package and of the study."""
    places = [*(_PACKAGE / part for part in parts), *(_STUDY / part for part in study)]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return digest(b"".join(file.read_bytes() for file in files))[:16]


def settings_of(config: Config, *, grows: bool) -> dict[str, Any]:
    """What decides a run: what does not grow does not depend on the settings of growing."""
    sections = ("run", "optimizer", *(("seeds", "tamiyo") if grows else ()))
    found: dict[str, Any] = config.model_dump(mode="json", include=set(sections))
    return found


def identity(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True, default=str).encode())[:16]


def train(
    home: Path, config: Config, arm: str, *, blocks: Sequence[Block] = (), flops: float | None = None
) -> dict[str, Any]:
    """Train in this process, or take up a run that was interrupted; from its folder where it was done before.

    Args:
        home: where the folders of runs are, and the data sets.
        arm: "grown", "host" or "final", as `RunRequest` has it.
        blocks: what is there from the first step on.
        flops: what it may spend, in place of its number of epochs.
    """
    config = config.model_copy(update={"home": home})
    grows = arm == "grown"
    parts = {
        "code": code(GROWN_CODE if grows else SCRATCH_CODE, ()),
        "settings": settings_of(config, grows=grows),
        "arm": arm,
        "blocks": [asdict(block) for block in blocks],
        "flops": flops,
    }
    name = identity(parts)
    folder = config.runs / name
    done = folder / "study.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    request = RunRequest(name, config, arm=arm, resume=True, blocks=tuple(blocks), flops=flops)
    fresh = _forget_peak()
    processor, start = time.process_time(), time.perf_counter()
    result = Trainer(request, inprocess.surroundings(config, kernels=KERNELS)).run()
    row = {
        **result,
        **_events(folder),
        "processor_seconds": time.process_time() - processor,
        "wall_seconds": time.perf_counter() - start,
        "peak_mb": _peak_mb() if fresh else None,
        "boundary_every": config.run.boundary_every,
    }
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    done.write_text(json.dumps(row))
    return row


def _events(folder: Path) -> dict[str, Any]:
    """Seeds born, when, and what their grafts took, from the run's events."""
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    grafts = [row for row in rows if row["kind"] == "graft"]
    culls = [row["reason"] for row in rows if row["kind"] == "stage" and row["to"] == "CULLED"]
    return {
        "born": len(grafts),
        "graft_steps": [row["step"] for row in grafts],
        "graft_slots": [row["slot"] for row in grafts],
        "graft_ms": max((row["ms"] for row in grafts), default=0.0),
        "cull_reasons": culls,
    }


def _forget_peak() -> bool:
    """Let the kernel forget this process's largest resident size; false where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_mb() -> float | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) / 1024
    return None
