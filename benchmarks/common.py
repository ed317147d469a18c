"""What every benchmark shares: its command line, its table, its JSON, and the machine it ran on."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

console = Console()


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure's limit. ``above``: the figure must exceed it, or with ``reach`` at least reach it; else stay within."""

    key: str
    limit: float
    above: bool = False
    reach: bool = False

    def holds(self, value: float) -> bool:
        if self.reach:
            return value >= self.limit
        return value > self.limit if self.above else value <= self.limit


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` percent of the sample do not exceed."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), share))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit of the working tree, with ``+`` where it has changes."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="the short form")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return made


def write_section(file: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two lines of a page, at its end where they are not in it yet; a new page is begun."""
    before, part = file.read_text() if file.exists() else "# Results\n", f"{begin}\n\n{text}\n\n{end}"
    if begin in before:
        head, _, rest = before.partition(begin)
        file.write_text(head + part + rest.partition(end)[2])
    else:
        file.write_text(f"{before.rstrip()}\n\n{part}\n")


def run(name: str, bars: Sequence[Bar], measure: Callable[[], Mapping[str, Any]], json_file: Path | None) -> None:
    """Measure, print the table, write the JSON; leaves with status 1 when a bar does not hold."""
    about = machine()
    figures = dict(measure())
    tables = figures.pop("tables", None)
    judged = {
        bar.key: {"value": figures[bar.key], "limit": bar.limit, "holds": bar.holds(figures[bar.key])}
        for bar in bars
        if bar.key in figures
    }
    _show(name, figures, judged, about)
    if json_file is not None:
        content = {"benchmark": name, "commit": commit(), "machine": about, "figures": figures, "bars": judged}
        if tables is not None:
            content["tables"] = tables
        json_file.write_text(json.dumps(_finite(content), indent=1, allow_nan=False))
    sys.exit(0 if all(row["holds"] for row in judged.values()) else 1)


def _finite(content: Any) -> Any:
    """The same with null for infinite numbers, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _show(name: str, figures: Mapping[str, Any], judged: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    table = Table(title=f"{name} at {commit()} on {about['cores']} x {about['processor']}, torch {about['torch']}")
    for column in ("figure", "value", "bar", "holds"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for key, value in figures.items():
        bar = judged.get(key)
        limit, holds = (f"{bar['limit']:g}", "yes" if bar["holds"] else "[red]no[/red]") if bar else ("", "")
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value), limit, holds)
    console.print(table)
