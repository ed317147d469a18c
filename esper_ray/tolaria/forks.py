"""A run that goes on from another one's boundary: what it takes from there, and what is checked before. No torch here.

Everything that the new run needs is copied into its own folder when it is asked for, below `origin/`: the parent goes
on and may lose that checkpoint meanwhile. `forking.py` makes a run of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import CheckpointError, RunError
from esper_ray.kasmina.lifecycle import LIFE
from esper_ray.reliability import atomic
from esper_ray.tolaria import by_hand

ORIGIN = "origin"
ROWS = ("metrics.jsonl", "events.jsonl")


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a run begins: after the boundary of ``epoch`` of ``parent``.

    Attributes:
        decide: decisions in words, in the place of the germinations that were decided at that boundary.
        author: whose decisions they are.
    """

    parent: str
    epoch: int
    decide: tuple[str, ...] = ()
    author: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Fork:
        """The inverse of `as_row`."""
        return cls(str(row["parent"]), int(row["epoch"]), tuple(row["decide"]), str(row["author"]))

    def as_row(self) -> dict[str, Any]:
        """For manifests and journals."""
        return {**asdict(self), "decide": list(self.decide)}


def parse_place(text: str) -> tuple[str, int | None]:
    """``"glyphs-3fa9c2@7"`` as run and epoch; without an epoch it is the last one that is kept.

    Raises:
        RunError: the epoch is no number.
    """
    run, at, epoch = text.partition("@")
    if at and not epoch.isdigit():
        raise RunError(f"{text!r} is no place to fork at.", remedy="Write it as RUN@EPOCH, such as glyphs-3fa9c2@7.")
    return run, int(epoch) if at else None


def kept(run_folder: Path) -> list[int]:
    """The epochs whose checkpoints are there, ascending."""
    return sorted(int(file.stem.removeprefix("epoch-")) for file in run_folder.glob("checkpoints/epoch-*.json"))


def check(run_folder: Path, manifest: Mapping[str, Any], fork: Fork, approved: tuple[str, ...]) -> None:
    """Find what would fail, before anything is written.

    Args:
        manifest: the parent's.
        approved: blueprints that may grow in the new run.

    Raises:
        EsperError: that checkpoint is not kept, the parent does not grow, or a decision is not possible there.
    """
    if manifest.get("arm") != "grown":
        raise RunError(f"{fork.parent} never grows: there is nothing to decide otherwise.", remedy="Fork a grown run.")
    found = _manifest_of(run_folder, fork)
    slots, taken = by_hand.slots_of(manifest), set[int]()
    garden = found["data"]["garden"]
    for text in fork.decide:
        wish = by_hand.parse(text)
        command = by_hand.command(wish, slots, run=fork.parent, author="", now_ns=0, approved=approved, why="")
        row = garden["slots"][command.slot]
        stage = Stage(row["stage"])
        if command.slot in taken:
            raise RunError(f"{text!r} cannot be decided.", why="Another decision is about the same slot.")
        taken.add(command.slot)
        if stage is Stage.GERMINATED and int(row["seed"]["born_epoch"]) == int(garden["epoch"]):
            stage = Stage.DORMANT
        if wish.operation not in LIFE[stage].orders:
            raise RunError(
                f"{text!r} cannot be decided after epoch {fork.epoch} of {fork.parent}.",
                why=f"The slot is {stage.name} there.",
                remedy=f"Kept are the epochs {', '.join(map(str, kept(run_folder)))}.",
            )


def bring(runs: Path, fork: Fork, run: str) -> None:
    """Copy what the new run needs into its folder.

    Raises:
        EsperError: the checkpoint is not there any more, or there is no room for it.
    """
    source = runs / fork.parent
    found = _manifest_of(source, fork)
    origin = atomic.make_folder(runs / run / ORIGIN)
    with atomic.explained(origin):
        for name in (_stem(fork.epoch), Path(str(found["file"])).name):
            try:
                shutil.copyfile(source / "checkpoints" / name, origin / name)
            except FileNotFoundError:
                raise _gone(source, fork) from None
        for name in ROWS:
            rows = rows_until(source / name, fork.epoch)
            atomic.write_text(origin / name, "".join(f"{json.dumps(row)}\n" for row in rows))


def rows_until(file: Path, epoch: int) -> list[dict[str, Any]]:
    """The whole rows of a file of lines that belong to epochs up to ``epoch``."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            # The parent is writing it.
            continue
        if int(row["epoch"]) <= epoch:
            rows.append(row)
    return rows


def _manifest_of(source: Path, fork: Fork) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((source / "checkpoints" / _stem(fork.epoch)).read_text())
    except FileNotFoundError:
        raise _gone(source, fork) from None
    except ValueError as fault:
        what = f"The checkpoint of epoch {fork.epoch} of {fork.parent} is damaged."
        raise CheckpointError(what, why=f"{fault}.") from None
    return found


def _gone(source: Path, fork: Fork) -> CheckpointError:
    there = ", ".join(map(str, kept(source))) or "none"
    return CheckpointError(
        f"There is no checkpoint of epoch {fork.epoch} of {fork.parent}.",
        why=f"Kept are: {there}.",
        remedy="Choose one of them; run.keep_checkpoints says how many are kept.",
    )


def _stem(epoch: int) -> str:
    return f"epoch-{epoch:06d}.json"
