"""Results as JSON lines, one file a task: what `benchmarks/results/growth` in the repository holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent.parent / "results" / "growth"

Row = Mapping[str, Any]


class Store:
    """The rows of a folder, by task. Rows are added and never changed; of equal arm and seed the last one counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, task: str) -> Iterator[Row]:
        file = self.folder / f"{task}.jsonl"
        if file.exists():
            yield from (json.loads(line) for line in file.read_text().splitlines() if line.strip())

    def find(self, task: str, identity: str) -> Row | None:
        return next((row for row in self.rows(task) if row["identity"] == identity), None)

    def add(self, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{row['task']}.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")

    def latest(self, task: str) -> dict[str, dict[int, Row]]:
        """By arm and random seed."""
        found: dict[str, dict[int, Row]] = {}
        for row in self.rows(task):
            found.setdefault(row["arm"], {})[row["seed"]] = row
        return found

    def tasks(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.jsonl"))
