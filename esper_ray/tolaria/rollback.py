"""Going back: a run is put where it was at an earlier epoch, and goes on from there on a branch of its own.

Fast from a copy in memory, full from a checkpoint on disk. The order is Tamiyo, Kasmina, Tolaria, the rest; each part
is timed and told. What a seed has become since does not matter: everything that was grafted, culled or fossilised after
that epoch is undone, for the seeds are rebuilt from what was saved.

A rollback opens a new branch number. It is in the names of the draws that follow, in ids and in the journal, so that
the run does not repeat itself. Compute and time that were spent stay spent: FLOPs and seconds do not go back.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from esper_ray.contracts.budgets import ROLLBACK_FAST_MS, ROLLBACK_FULL_MS, ROLLBACK_PARTS
from esper_ray.errors import CheckpointError, EsperError
from esper_ray.kasmina.lifecycle import LIVE
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.ids import derive_seed
from esper_ray.tolaria import checkpoint as checkpoints
from esper_ray.tolaria import resume
from esper_ray.tolaria.checkpoint import Checkpoint

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Trainer

PREPARE_MS, COMMIT_MS, CONFIRM_MS = ROLLBACK_PARTS
_PROBE_SAMPLES = 8


class Undo(Exception):
    """The run shall go back: raised between two steps, carried out by the trainer.

    Args:
        origin: who wants it.
        to_epoch: where to; None is the newest state in memory, or an older one after repeated damage.
        full: from disk, whatever memory has.
        damage: the epoch failed; live seeds are taken out, or the learning rates lowered.

    Attributes:
        last: the run halts after it: only to the newest state.
    """

    def __init__(
        self, reason: str, *, origin: str = "tolaria", to_epoch: int | None = None, full: bool = False, damage: bool
    ) -> None:
        super().__init__(reason)
        self.last = False
        self.reason, self.origin, self.to_epoch, self.full, self.damage = reason, origin, to_epoch, full, damage


@dataclass(frozen=True, slots=True)
class Turn:
    """What the journal knows of one rollback: enough to do it again.

    Attributes:
        branch: the one that it opens; ``parent`` is the one in which the state was saved.
        failed: failed epochs without a calm time, this one counted.
        emergency: the level and its counts after it.
    """

    branch: int
    parent: int
    from_epoch: int
    from_step: int
    to_epoch: int
    reason: str
    origin: str
    full: bool
    damage: bool
    failed: int
    flops: float
    seconds: float
    missed: int
    emergency: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each part; ``told`` says whether Tamiyo answered in time."""

    prepare: float
    commit: float
    confirm: float
    told: bool = True

    @property
    def total(self) -> float:
        return self.prepare + self.commit + self.confirm

    def overdue(self, *, full: bool) -> str:
        """What took too long, or an empty text."""
        whole = ROLLBACK_FULL_MS if full else ROLLBACK_FAST_MS
        parts = [] if full else [(budget, getattr(self, budget.key)) for budget in ROLLBACK_PARTS]
        late = [f"{b.key} {ms:.0f} > {b.limit:.0f} ms" for b, ms in [*parts, (whole, self.total)] if ms > b.limit]
        return ", ".join(late)


class Memory:
    """The newest states of a run, copied, for a fast rollback."""

    def __init__(self, size: int) -> None:
        self._kept: deque[Checkpoint] = deque(maxlen=size)

    def keep(self, state: Checkpoint) -> None:
        self._kept.append(state)

    def back(self, count: int) -> Checkpoint | None:
        """The ``count``-th newest, from 1, or the oldest there is."""
        return self._kept[-min(count, len(self._kept))] if self._kept else None

    def find(self, epoch: int) -> Checkpoint | None:
        return next((state for state in self._kept if state.epoch == epoch), None)

    def forget_after(self, epoch: int) -> None:
        kept = [state for state in self._kept if state.epoch <= epoch]
        self._kept.clear()
        self._kept.extend(kept)


def target(trainer: Trainer, undo: Undo) -> tuple[Checkpoint, bool]:
    """The state to go back to, and whether it came from disk.

    Raises:
        CheckpointError: there is none of that epoch, or it is damaged or foreign.
    """
    folder = trainer.folder / "checkpoints"
    if undo.to_epoch is not None and undo.to_epoch > trainer.epoch:
        raise CheckpointError(
            f"The run cannot go back to epoch {undo.to_epoch}.", why=f"It has finished {trainer.epoch} epochs."
        )
    found = None
    if not undo.full:
        wanted, failed = undo.to_epoch, 1 if undo.last else max(1, trainer.emergency.failed)
        found = trainer.memory.back(failed) if wanted is None else trainer.memory.find(wanted)
    if found is not None:
        return found, False
    trainer.writer.finish()
    if undo.to_epoch is not None:
        return checkpoints.read(folder, undo.to_epoch), True
    newest = checkpoints.read_latest(folder)
    if newest is None:
        raise CheckpointError(f"There is nothing to go back to in {folder}.", why="No epoch was finished yet.")
    return newest, True


def roll_back(trainer: Trainer, undo: Undo) -> tuple[Turn, Times]:
    """Put the run back and open its new branch.

    Raises:
        CheckpointError: the state cannot be used, or what is there afterwards is not what was saved.
        StorageFault: the rollback could not be written down; nothing was changed.
    """
    start = time.perf_counter()
    state, full = target(trainer, undo)
    resume.demand_own(trainer, state)
    resume.demand_fit(trainer, state)
    turn = _turn(trainer, undo, state, full=full)
    prepared = time.perf_counter()
    trainer.recorder.record_rollback(turn.branch, asdict(turn))
    passing("rollback.recorded")
    told = _tell_decider(trainer, turn)
    put_back(trainer, state, turn)
    committed = time.perf_counter()
    _confirm(trainer, state)
    confirmed = time.perf_counter()
    times = Times(
        prepare=(prepared - start) * 1e3,
        commit=(committed - prepared) * 1e3,
        confirm=(confirmed - committed) * 1e3,
        told=told,
    )
    return turn, times


def find_start(trainer: Trainer, told: Callable[[CheckpointError], None]) -> tuple[Checkpoint | None, Turn | None]:
    """Where a resumed run begins: its newest whole checkpoint, and a rollback that was under way when it was lost.

    A checkpoint of an abandoned stretch does not count. A rollback whose state is not on disk is void: the run is
    further back already, and will turn again if it has to.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    recorded = trainer.recorder.rollbacks()
    turns = [Turn(**row) for row in recorded]

    def in_history(state: Checkpoint) -> bool:
        return all(state.epoch <= turn.to_epoch for turn in turns if turn.branch > _branch_of(state))

    folder = trainer.folder / "checkpoints"
    saved = checkpoints.read_latest(folder, told, in_history)
    epoch, branch = (saved.epoch, _branch_of(saved)) if saved is not None else (0, 0)
    later = [turn for turn in turns if turn.branch > branch]
    if turns:
        checkpoints.forget_after(folder, epoch)
    if not later:
        return saved, None
    if (later[-1].parent, later[-1].to_epoch) == (branch, epoch):
        return saved, later[-1]
    for turn in later:
        trainer.recorder.void_rollback(turn.branch)
    return saved, None


def _branch_of(state: Checkpoint) -> int:
    return int(state.data["garden"]["branch"])


def put_back(trainer: Trainer, state: Checkpoint, turn: Turn) -> None:
    """The seeds, the model, its optimizer and all that decides the next step; compute and time go on counting."""
    trainer.meter.settle()
    own = Checkpoint(state.epoch, copy.deepcopy(dict(state.data)), state.tensors)
    resume.clear(trainer)
    resume.restore(trainer, own)
    trainer.meter.total, trainer.seconds, trainer.missed = turn.flops, turn.seconds, turn.missed


def open_branch(trainer: Trainer, turn: Turn) -> None:
    """From here on the run is another one: its number, its draws, and after damage what is thought to have done it."""
    trainer.garden.branch = turn.branch
    trainer.emergency.load(turn.emergency)
    torch.manual_seed(derive_seed(trainer.config.run.seed, "branch", turn.branch))
    if not turn.damage:
        return
    suspects = [slot for slot in trainer.garden.slots if slot.stage in LIVE]
    for slot in suspects:
        trainer.garden.cull(slot, f"in the path when {turn.reason}"[:120])
    if not suspects:
        trainer.rates.factor = trainer.config.emergency.rate_factor**turn.failed


def _turn(trainer: Trainer, undo: Undo, state: Checkpoint, *, full: bool) -> Turn:
    turn = Turn(
        branch=trainer.garden.branch + 1,
        parent=_branch_of(state),
        from_epoch=trainer.epoch,
        from_step=trainer.step,
        to_epoch=state.epoch,
        reason=undo.reason,
        origin=undo.origin,
        full=full,
        damage=undo.damage,
        failed=trainer.emergency.failed,
        flops=trainer.meter.total,
        seconds=trainer.seconds,
        missed=trainer.missed,
        emergency=trainer.emergency.save(),
    )
    taken = trainer.recorder.opened_branches()
    before = taken.get(turn.branch)
    same = ("parent", "from_step", "to_epoch", "reason")
    if before is not None and any(before[name] != getattr(turn, name) for name in same):
        # An earlier life of the run turned back elsewhere: its number is taken.
        turn = replace(turn, branch=max(taken) + 1)
    return turn


def _tell_decider(trainer: Trainer, turn: Turn) -> bool:
    """Tamiyo first. Where she is away or slow she learns it from the branch of the next state."""
    opening = replace(trainer.opening, epoch=turn.to_epoch, branch=turn.branch)
    try:
        return bool(trainer.around.decider.reopen(opening).wait(COMMIT_MS.limit / 2e3))
    except EsperError:
        return False


def _confirm(trainer: Trainer, state: Checkpoint) -> None:
    """Everything that was saved is there again, bit for bit, and the model computes.

    Raises:
        CheckpointError: it is not, or does not.
    """
    there = resume.checkpoint(trainer).tensors
    wrong = [name for name, value in state.tensors.items() if not _same(there.get(name), value)]
    wrong += [name for name in there if name not in state.tensors]
    if wrong:
        raise CheckpointError(
            f"After the rollback to epoch {state.epoch} {wrong[0]} is not what was saved.",
            why=f"{len(wrong)} tensors differ.",
            remedy="The checkpoints on disk stand: go on with `esper run --resume`.",
        )
    trainer.model.eval()
    with torch.no_grad():
        output = trainer.model(trainer.validation.inputs[:_PROBE_SAMPLES])
    trainer.model.train()
    if not bool(torch.isfinite(output).all()):
        raise CheckpointError(
            f"The state of epoch {state.epoch} gives no finite output.",
            why="The damage is older than it was noticed.",
            remedy="Go back further, with `esper rollback RUN --to EPOCH`, or start anew.",
        )


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a.detach().cpu(), b)


def as_event(turn: Turn, times: Times | None) -> dict[str, Any]:
    """The rollback as the run's files have it; milliseconds, where it was not finished by a later life of the run."""
    measured: dict[str, Any] = {}
    if times is not None:
        measured = {**{budget.key: getattr(times, budget.key) for budget in ROLLBACK_PARTS}, "told": times.told}
    return {
        "kind": "rollback",
        "id": f"rollback/{turn.branch}",
        "epoch": turn.to_epoch,
        "branch": turn.branch,
        "from_epoch": turn.from_epoch,
        "from_step": turn.from_step,
        "to": turn.to_epoch,
        "how": "full" if turn.full else "fast",
        "origin": turn.origin,
        "reason": turn.reason,
        **measured,
    }
