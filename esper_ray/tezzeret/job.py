"""A job process: ``python -m esper_ray.tezzeret.job PARENT_PID`` makes the kernels that its parent hands it on stdin.

It may be killed at any moment, and dies with its parent. The first line says how it works; after ``{"ready": pid}`` it
takes one kernel per line and answers each with ``{"done": ...}`` or ``{"failed": text}``. The end of stdin ends it.
Whatever else prints goes to stderr.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from esper_ray.contracts.ports import KernelSpec, SlotSignature

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read how to work, set the limits, make the kernels."""
    die_with(int(sys.argv[1]))
    answers = _claim_stdout()
    settings = json.loads(sys.stdin.readline())
    if settings["background"]:
        yield_processor()
    import torch

    torch.set_num_threads(1)
    if settings["on_cpu"]:
        # A GPU's driver maps far more address space than it uses.
        limit_memory(int(settings["memory_mb"]))
    work = _work(settings["phase"])
    _say(answers, {"ready": os.getpid()})
    for line in sys.stdin:
        order = json.loads(line)
        try:
            _say(answers, {"done": work(spec_from_json(order["kernel"]), order["strategy"])})
        except Exception as error:  # whatever a compiler raises is this kernel's failure, not the job's
            _say(answers, {"failed": f"{type(error).__name__}: {error}"[:2000]})


def _work(phase: str) -> Callable[[KernelSpec, Any], dict[str, Any]]:
    from esper_ray.tezzeret import compiler

    def make(spec: KernelSpec, _: Any) -> dict[str, Any]:
        weights, metadata = compiler.make(spec)
        return {"weights": base64.b64encode(weights).decode(), "metadata": metadata}

    def compare(spec: KernelSpec, strategy: Any) -> dict[str, Any]:
        return {"metadata": compiler.compare(spec, strategy)}

    return make if phase == "eager" else compare


def spec_to_json(spec: KernelSpec) -> dict[str, Any]:
    """What an order carries for a kernel."""
    return {"blueprint": spec.blueprint, "signature": str(spec.signature), "parameters": dict(spec.parameters)}


def spec_from_json(value: Mapping[str, Any]) -> KernelSpec:
    """The inverse of `spec_to_json`."""
    return KernelSpec(value["blueprint"], SlotSignature.parse(value["signature"]), value["parameters"])


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone; leave at once if it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("The parent of this job is gone.")


def yield_processor() -> None:
    """Run only when nobody else wants the processor: compiling must not slow the training down."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def limit_memory(megabytes: int) -> None:
    """Bound the address space to what is mapped now and ``megabytes`` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _claim_stdout() -> TextIO:
    """The real stdout for answers alone; file descriptor 1 becomes stderr for everybody else."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
