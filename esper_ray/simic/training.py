"""Drives one training: who acts with which weights, what is learned from, what is measured and kept. No Ray.

The same loop runs in one process and on a cluster: a `Crew` does the work and tells when something is done.
In lockstep everyone acts, then the learner learns; two such trainings are equal bit for bit. Otherwise workers go on
acting with the weights they have while the learner learns, one rollout ahead at most.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from esper_ray.errors import CheckpointError, EnvironmentFault
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import checkpoints
from esper_ray.simic.checkpoints import Counters
from esper_ray.simic.evaluation import Evaluation
from esper_ray.simic.learner import Learned
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.rollout import RolloutSummary, Weights

_RECENT = 100
_MOST_RESTARTS = 8


@dataclass(frozen=True, slots=True)
class Collected:
    """A rollout is there. ``data`` is the rollout, or a reference to it that only the crew can follow."""

    summary: RolloutSummary
    data: Any


@dataclass(frozen=True, slots=True)
class Updated:
    """The learner is done. ``weights`` are the new ones, or a reference to them."""

    learned: Learned
    weights: Any


@dataclass(frozen=True, slots=True)
class Lost:
    """Somebody died or was silent for too long, and was replaced.

    Args:
        who: "worker 1", "learner", or "replay".
        worker: its number, if it is a worker: its rollout will not come.
        weights: the learner's, if it is the learner: its batch was not learned from.
        version: of those weights.
        why: what is known of the cause.
    """

    who: str
    worker: int | None = None
    weights: Any = None
    version: int = 0
    why: str = ""


Event = Collected | Updated | Lost


class Crew(Protocol):
    """Those who act and learn. No method waits, but `open`, `wait`, `fetch`, `save` and `close`."""

    @property
    def workers(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a resumed training does not go on with, one sentence each; known once it is open."""
        ...

    def open(self, *, resume: bool) -> tuple[Counters, int, Any]:
        """Make everyone ready; (counters of the checkpoint, version, weights)."""
        ...

    def collect(self, worker: int, version: int, weights: Any) -> None:
        """Ask a worker for a rollout with these weights."""
        ...

    def learn(self, rollouts: Sequence[Any]) -> None:
        """Ask the learner to learn from what `Collected` brought."""
        ...

    def wait(self) -> list[Event]:
        """What has happened; nothing, if that is so after about a second."""
        ...

    def fetch(self, weights: Any) -> Weights:
        """The weights themselves."""
        ...

    def evaluate(self, weights: Any, seed: int) -> Evaluation: ...

    def save(self, counters: Counters) -> None:
        """Write a checkpoint."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """A training after an update.

    Attributes:
        mean_return, mean_length: of the last 100 episodes; NaN before the first ended.
        steps_per_s: since the training began, evaluations left out.
        lag_mean, lag_max: how many versions behind the learner the weights were that acted, for what was learned from.
        dropped_steps: too stale to be learned from.
        restarts: how often somebody had to be replaced.
        metrics: of the last update.
        evaluation: the greedy evaluation after this update, if there was one.
    """

    steps: int
    of: int
    version: int
    episodes: int
    mean_return: float
    mean_length: float
    steps_per_s: float
    lag_mean: float
    lag_max: int
    dropped_steps: int
    restarts: int
    metrics: dict[str, float]
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        state: "finished", "reached" (its aim, before its steps were done), or "stopped".
        evaluations: (steps, mean, deviation) of each greedy evaluation.
        seconds: acting and learning, without evaluations.
    """

    state: str
    steps: int
    version: int
    curve: tuple[Progress, ...]
    evaluations: tuple[tuple[int, float, float], ...]
    seconds: float
    evaluation_seconds: float
    restarts: int
    weights: Weights


def train(
    plan: TrainingPlan,
    crew: Crew | None = None,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> TrainingResult:
    """Do a training, or go on with it.

    Args:
        crew: who does it; this process alone by default. Who gives one closes it.
        resume: go on from the checkpoint in the plan's folder. In lockstep the training is then, bit for bit, the one
            that would have been without the stop, unless a note says otherwise.
        should_stop: when it says so, a checkpoint is written and the training returns: in lockstep after the present
            update, else at once.
        on_note: told at once what a resumed training does not go on with.

    Raises:
        EsperError: the environment, the checkpoint or the machine is at fault; the text says which.
    """
    if resume and (plan.folder is None or not checkpoints.exists(plan.folder)):
        raise CheckpointError(
            f"There is nothing to resume in {plan.folder}.", remedy="Start the training without resuming."
        )
    if crew is not None:
        return _Training(plan, crew, should_stop, on_progress, on_note).run(resume=resume)
    from esper_ray.simic.localcrew import LocalCrew

    own = LocalCrew(plan)
    try:
        return _Training(plan, own, should_stop, on_progress, on_note).run(resume=resume)
    finally:
        own.close()


class _Training:
    """The state of one training, as its driver sees it."""

    def __init__(
        self,
        plan: TrainingPlan,
        crew: Crew,
        should_stop: Callable[[], bool],
        on_progress: Callable[[Progress], None],
        on_note: Callable[[str], None],
    ) -> None:
        self._plan, self._crew, self._should_stop = plan, crew, should_stop
        self._on_progress, self._on_note = on_progress, on_note
        self._counters = Counters()
        self._version, self._weights = 0, None
        self._idle = list(range(crew.workers))
        self._ready: list[Collected] = []
        self._batch: list[RolloutSummary] = []
        self._returns: deque[float] = deque(maxlen=_RECENT)
        self._lengths: deque[int] = deque(maxlen=_RECENT)
        self._curve: list[Progress] = []
        self._lags: list[int] = []
        self._restarts, self._restarts_in_a_row = 0, 0
        self._reached = False
        self._began, self._evaluation_seconds, self._first_step, self._saved_at = 0.0, 0.0, 0, 0

    def run(self, *, resume: bool) -> TrainingResult:
        self._counters, self._version, self._weights = self._crew.open(resume=resume)
        for note in self._crew.notes:
            self._on_note(note)
        self._returns.extend(self._counters.recent_returns)
        self._lengths.extend(self._counters.recent_lengths)
        self._first_step = self._saved_at = self._counters.steps
        self._began = time.monotonic()
        state = ""
        while not state:
            state = self._state()
            if not state:
                self._ask()
                for event in self._crew.wait():
                    self._note(event)
        seconds = self._seconds()
        self._save()
        return TrainingResult(
            state=state,
            steps=self._counters.steps,
            version=self._version,
            curve=tuple(self._curve),
            evaluations=self._counters.evaluations,
            seconds=seconds,
            evaluation_seconds=self._evaluation_seconds,
            restarts=self._restarts,
            weights=self._crew.fetch(self._weights),
        )

    def _state(self) -> str:
        """How the training has ended, or nothing while it goes on."""
        if self._reached:
            return "reached"
        if self._counters.steps >= self._plan.steps:
            return "finished"
        return "stopped" if self._should_stop() and self._settled() else ""

    def _settled(self) -> bool:
        """Whether a checkpoint can be made now: in lockstep none may hold workers that are ahead of the learner."""
        waiting = len(self._idle) == self._crew.workers
        return not self._plan.lockstep or (waiting and not self._batch and not self._ready)

    def _ask(self) -> None:
        """Give work to those who have none."""
        needed = self._crew.workers if self._plan.algo == "ppo" or self._plan.lockstep else 1
        if not self._batch:
            self._drop_stale()
            if len(self._ready) >= needed:
                taken = sorted(self._ready[:needed], key=lambda each: each.summary.worker)
                self._ready = self._ready[needed:]
                self._batch = [each.summary for each in taken]
                self._lags = [self._version - each.version for each in self._batch]
                self._crew.learn([each.data for each in taken])
        if self._plan.lockstep and (self._batch or self._ready):
            return
        ahead = {each.summary.worker for each in self._ready}
        for worker in [each for each in self._idle if each not in ahead]:
            self._idle.remove(worker)
            self._crew.collect(worker, self._version, self._weights)

    def _drop_stale(self) -> None:
        fresh = [each for each in self._ready if self._version - each.summary.version <= self._plan.max_lag]
        dropped = sum(each.summary.steps for each in self._ready) - sum(each.summary.steps for each in fresh)
        if dropped:
            self._ready = fresh
            self._count(dropped_steps=dropped)

    def _note(self, event: Event) -> None:
        if isinstance(event, Collected):
            self._idle.append(event.summary.worker)
            self._ready.append(event)
            self._returns.extend(event.summary.returns)
            self._lengths.extend(event.summary.lengths)
            self._count(episodes=len(event.summary.returns))
        elif isinstance(event, Updated):
            self._restarts_in_a_row = 0
            self._take_update(event)
        else:
            self._replace(event)

    def _take_update(self, event: Updated) -> None:
        self._version, self._weights = event.learned.version, event.weights
        self._count(steps=sum(each.steps for each in self._batch), updates=1)
        self._batch = []
        evaluation = self._evaluate()
        every = self._plan.config.checkpoint_every
        if self._counters.steps // every > self._saved_at // every:
            self._save()
        progress = self._progress(event.learned, evaluation)
        self._curve.append(progress)
        self._on_progress(progress)

    def _replace(self, event: Lost) -> None:
        """Go on after a loss: a lost rollout is asked for again, a lost batch is counted as dropped.

        Raises:
            EnvironmentFault: nothing was learned between many losses.
        """
        self._restarts += 1
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > _MOST_RESTARTS:
            raise EnvironmentFault(
                f"The training lost its {event.who}, for the {self._restarts_in_a_row}th time since its last update.",
                why=event.why or "Its process ended or did not answer.",
                remedy="Look at the log of the Ray worker, at memory, and at simic.request_seconds.",
            )
        if event.worker is not None and event.worker not in self._idle:
            self._idle.append(event.worker)
        if event.weights is not None:
            self._version, self._weights = event.version, event.weights
            self._count(dropped_steps=sum(each.steps for each in self._batch))
            self._batch = []

    def _evaluate(self) -> Evaluation | None:
        """The greedy evaluation, when it is time for one."""
        every, steps = self._plan.config.evaluate_every, self._counters.steps
        due = every and (steps // every > self._counters.last_evaluation // every or steps >= self._plan.steps)
        if not due:
            return None
        began = time.monotonic()
        evaluation = self._crew.evaluate(self._weights, derive_seed(self._plan.seed, "evaluation", steps))
        self._evaluation_seconds += time.monotonic() - began
        row = (steps, evaluation.mean, evaluation.deviation)
        self._counters = replace(self._counters, last_evaluation=steps, evaluations=(*self._counters.evaluations, row))
        self._reached = self._plan.stop_at is not None and evaluation.mean >= self._plan.stop_at
        return evaluation

    def _progress(self, learned: Learned, evaluation: Evaluation | None) -> Progress:
        counters = self._counters
        return Progress(
            steps=counters.steps,
            of=self._plan.steps,
            version=self._version,
            episodes=counters.episodes,
            mean_return=statistics.fmean(self._returns) if self._returns else math.nan,
            mean_length=statistics.fmean(self._lengths) if self._lengths else math.nan,
            steps_per_s=(counters.steps - self._first_step) / max(1e-9, self._seconds()),
            lag_mean=statistics.fmean(self._lags),
            lag_max=max(self._lags),
            dropped_steps=counters.dropped_steps,
            restarts=self._restarts,
            metrics=learned.metrics,
            evaluation=evaluation,
        )

    def _save(self) -> None:
        if self._plan.folder is not None:
            self._saved_at = self._counters.steps
            self._crew.save(
                replace(self._counters, recent_returns=tuple(self._returns), recent_lengths=tuple(self._lengths))
            )

    def _count(self, **more: int) -> None:
        self._counters = replace(self._counters, **{k: getattr(self._counters, k) + n for k, n in more.items()})

    def _seconds(self) -> float:
        """Since this process took up the training, evaluations left out."""
        return time.monotonic() - self._began - self._evaluation_seconds
