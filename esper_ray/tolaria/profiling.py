"""A profile of a whole epoch with its boundary, for whoever asks: what takes the time, by operation and by part.

It is asked for in the configuration, or by a file in the run's folder while it trains; otherwise nothing is measured.
In ``profile/`` are then a table (``epoch-N.txt``) and a trace for Perfetto or Chrome (``epoch-N.json.gz``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from esper_ray.errors import EnvironmentFault
from esper_ray.reliability import atomic
from esper_ray.tolaria.profile_files import table_file, trace_file, wanted_file

log = logging.getLogger(__name__)
_ROWS = 40
# The trainer's methods that are marked while it is profiled.
PARTS: Mapping[str, str] = {
    "train_step": "esper: training step",
    "measure": "esper: validation",
    "close_stages": "esper: seeds measured and judged",
    "_do_boundary": "esper: boundary",
    "_write_down": "esper: written down",
}


@contextlib.contextmanager
def epoch(trainer: Any, run: Path, number: int, epochs: Collection[int] = ()) -> Iterator[None]:
    """Profile what is done inside, if epoch ``number`` is one of ``epochs`` or a file asks for it."""
    asked = wanted_file(run, number)
    if number not in epochs and not asked.exists():
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler, _marked(trainer):
        yield
    try:
        _write(profiler, run, number)
    except (EnvironmentFault, OSError) as fault:
        # A disk without room for a profile is no reason to end a training.
        log.warning("the profile of epoch %d could not be written: %s", number, fault)
    asked.unlink(missing_ok=True)


def _write(profiler: Any, run: Path, number: int) -> None:
    averages = profiler.key_averages()
    marked = set(PARTS.values())
    parts = sorted((row for row in averages if row.key in marked), key=lambda row: -row.cpu_time_total)
    lines = [f"epoch {number}: {row.key}: {row.count} x, {row.cpu_time_total / 1e3:.1f} ms in all" for row in parts]
    by_operation = averages.table(sort_by="self_cpu_time_total", row_limit=_ROWS, max_name_column_width=60)
    trace = trace_file(run, number)
    draft = atomic.make_folder(trace.parent) / f".{trace.name}.tmp.gz"
    profiler.export_chrome_trace(str(draft))
    os.replace(draft, trace)
    atomic.write_text(table_file(run, number), "\n".join([*lines, "", by_operation]))


@contextlib.contextmanager
def _marked(trainer: Any) -> Iterator[None]:
    """Inside, the calls of `PARTS` bear their names in the profile."""
    from torch.profiler import record_function

    own = {name: vars(trainer)[name] for name in PARTS if name in vars(trainer)}
    for name, label in PARTS.items():
        setattr(trainer, name, _labelled(getattr(trainer, name), record_function, label))
    try:
        yield
    finally:
        for name in PARTS:
            delattr(trainer, name)
        vars(trainer).update(own)


def _labelled(method: Any, record: Any, label: str) -> Any:
    @functools.wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        with record(label):
            return method(*given, **named)

    return call
