"""What the forge works with: the machine's compiler, the versions that a kernel depends on, and the job's settings.

No torch here: the forge's own process stays light.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import esper_ray.karn
from esper_ray.contracts.ports import KernelSpec
from esper_ray.reliability.ids import digest
from esper_ray.tezzeret.strategies import STRATEGIES, StrategyName

Phase = Literal["eager", "compile"]
BATCH = 64
THREADS = 1
JOB_COMMAND = (sys.executable, "-m", "esper_ray.tezzeret.job")
_PROBE = "#include <cmath>\n#include <vector>\nint main() { return 0; }\n"


def compiler_available() -> tuple[bool, str]:
    """Whether torch can compile for the processor here, and why or why not. Tries the compiler once per process."""
    return _probe(os.environ.get("CXX", ""))


@functools.cache
def _probe(wanted: str) -> tuple[bool, str]:
    compiler = next(filter(None, map(shutil.which, filter(None, (wanted, "g++", "clang++", "c++")))), None)
    if compiler is None:
        return False, "there is no C++ compiler on this machine (g++ or clang++, or CXX)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return False, "Python's own headers (Python.h) are not installed"
    try:
        run = subprocess.run(
            [compiler, "-x", "c++", "-fsyntax-only", "-"],
            input=_PROBE,
            text=True,
            capture_output=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{compiler} does not run: {error}"
    if run.returncode:
        return False, f"{compiler} cannot compile a small program: {run.stderr.strip()[-200:]}"
    return True, f"{compiler} works"


def cache_folder(folder: Path) -> Path:
    """Where compiled code is kept; whoever runs a compiled kernel sets TORCHINDUCTOR_CACHE_DIR to it."""
    return folder / "inductor"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a job: one thread, no compile workers of its own, compiled code kept in ``folder``."""
    settings = {
        "OMP_NUM_THREADS": str(THREADS),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder(folder)),
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **settings}


def cache_key(spec: KernelSpec, phase: Phase, strategy: StrategyName = "standard") -> str:
    """Names a job by everything its result depends on: the same key never has to be done again."""
    return digest(json.dumps(_ingredients(spec, phase, strategy), sort_keys=True).encode())


def _ingredients(spec: KernelSpec, phase: Phase, strategy: StrategyName) -> Mapping[str, object]:
    """The spec's key names blueprint, parameters, slot, dtype and kind of device."""
    options = {"batch": BATCH, "threads": THREADS, "dynamic": False, "fullgraph": True}
    return {
        "kernel": spec.key,
        "phase": phase,
        "torch": _torch(),
        "machine": platform.machine(),
        "options": {**options, **STRATEGIES[strategy].options} if phase == "compile" else options,
        "recipes": _recipes(),
    }


@functools.cache
def _torch() -> str:
    """The installed version. To look it up takes milliseconds, and each job's name asks for it."""
    return metadata.version("torch")


@functools.cache
def _recipes() -> str:
    """A digest of the blocks' own source: another recipe is another kernel."""
    folder = Path(esper_ray.karn.__file__).parent
    sources = sorted([*folder.glob("blueprints/*.py"), folder / "shapes.py"])
    return digest(b"".join(path.read_bytes() for path in sources))
