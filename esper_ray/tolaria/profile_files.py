"""Where profiles are in a run's folder, and how one is asked for. No torch: commands use this."""

from __future__ import annotations

from pathlib import Path


def wanted_file(run: Path, epoch: int) -> Path:
    """The file that asks for a profile of that epoch; it is gone when the profile is there."""
    return run / "profile" / f"epoch-{epoch:06d}.wanted"


def table_file(run: Path, epoch: int) -> Path:
    return run / "profile" / f"epoch-{epoch:06d}.txt"


def trace_file(run: Path, epoch: int) -> Path:
    return run / "profile" / f"epoch-{epoch:06d}.json.gz"
