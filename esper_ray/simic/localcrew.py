"""A crew in one process: each request is done when its turn comes, one after another."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import numpy as np

from esper_ray.reliability import atomic
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import checkpoints
from esper_ray.simic.checkpoints import Counters
from esper_ray.simic.evaluation import Evaluation, evaluate
from esper_ray.simic.learner import Learner
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.policies import policy_for
from esper_ray.simic.replay import Provenance, Replay, Sample
from esper_ray.simic.rollout import Rollout, RolloutWorker, Weights
from esper_ray.simic.segments import segments
from esper_ray.simic.spaces import Interface
from esper_ray.simic.tapes import NotRepeatedError
from esper_ray.simic.training import Collected, Event, Updated


def worker_for(plan: TrainingPlan, interface: Interface, worker: int, version: int) -> RolloutWorker:
    """A rollout worker that begins at a version of the weights: one that is made anew draws other episodes."""
    policy = policy_for(plan.env, interface, hidden=plan.config.hidden, seed=plan.seed)
    vector = plan.env.vector(plan.config.envs, taped=plan.keeps_workers)
    return RolloutWorker(vector, interface, policy, worker=worker, seed=derive_seed(plan.seed, "worker", version))


def save_worker(worker: RolloutWorker, number: int, folder: Path) -> None:
    """Write down where a worker stands, if its environments can be told."""
    with contextlib.suppress(NotRepeatedError):
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **worker.state())
        atomic.write_bytes(folder / f"worker-{number}.npz", buffer.getvalue())


def worker_again(plan: TrainingPlan, interface: Interface, number: int, version: int) -> tuple[RolloutWorker, str]:
    """A worker as it stood at the newest checkpoint; or a new one, and a sentence that says why."""
    assert plan.folder is not None
    worker = worker_for(plan, interface, number, version)
    if not plan.keeps_workers:
        return worker, "New episodes begin: only in lockstep do checkpoints hold the open ones."
    try:
        with np.load(checkpoints.members(plan.folder) / f"worker-{number}.npz", allow_pickle=False) as file:
            worker.restore({name: file[name] for name in file.files})
    except FileNotFoundError:
        why = "the checkpoint does not hold its open ones"
    except NotRepeatedError as error:
        why = str(error)
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile, gymnasium.error.Error) as error:
        why = f"{type(error).__name__}: {error}"
    else:
        return worker, ""
    worker.close()
    return worker_for(plan, interface, number, version), f"Worker {number} begins new episodes: {why}."


def replay_for(plan: TrainingPlan) -> Replay:
    """An empty replay within the plan's bounds."""
    config = plan.config
    return Replay(max_bytes=config.replay_mb * 2**20, max_seconds=config.replay_seconds, seed=plan.seed)


def keep(replay: Replay, rollout: Rollout) -> None:
    """Put a rollout's segments into the replay."""
    for segment in segments(rollout):
        replay.add(segment, Provenance(f"worker-{rollout.worker}", rollout.version))


def drawn(replay: Replay, count: int) -> Sample | None:
    """Segments to learn from once more, if there are enough."""
    return replay.sample(count) if len(replay) >= count else None


class LocalCrew:
    """Workers, replay and learner of one training, without Ray."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._interface = plan.env.interface()
        self._learner = Learner(plan, self._interface)
        self._evaluated = policy_for(plan.env, self._interface, hidden=plan.config.hidden, seed=plan.seed)
        self._replay = replay_for(plan) if plan.replayed else None
        self._workers: list[RolloutWorker] = []
        self.notes: tuple[str, ...] = ()
        self._queue: deque[Callable[[], Event]] = deque()

    @property
    def workers(self) -> int:
        return max(1, self._plan.config.workers)

    def open(self, *, resume: bool) -> tuple[Counters, int, Weights]:
        counters, plan = Counters(), self._plan
        if resume:
            assert plan.folder is not None
            counters = self._learner.load(plan.folder)
            if self._replay is not None:
                self._replay.load(checkpoints.members(plan.folder))
        weights = self._learner.weights()
        for number in range(self.workers):
            if resume:
                worker, note = worker_again(plan, self._interface, number, weights.version)
                self.notes += (note,) * bool(note and note not in self.notes)
            else:
                worker = worker_for(plan, self._interface, number, weights.version)
            self._workers.append(worker)
        return counters, weights.version, weights

    def collect(self, worker: int, version: int, weights: Weights) -> None:  # noqa: ARG002
        self._queue.append(lambda: self._collect(worker, weights))

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        self._queue.append(lambda: self._learn(rollouts))

    def wait(self) -> list[Event]:
        return [self._queue.popleft()()]

    def fetch(self, weights: Weights) -> Weights:
        return weights

    def evaluate(self, weights: Weights, seed: int) -> Evaluation:
        weights.put_into(self._evaluated)
        episodes = self._plan.config.evaluate_episodes
        return evaluate(self._evaluated, self._plan.env, self._interface, episodes=episodes, seed=seed)

    def save(self, counters: Counters) -> None:
        assert self._plan.folder is not None
        members = checkpoints.members(self._plan.folder, self._learner.version)
        if self._plan.keeps_workers:
            for number, worker in enumerate(self._workers):
                save_worker(worker, number, members)
        if self._replay is not None:
            self._replay.save(members)
        self._learner.save(self._plan.folder, counters)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _collect(self, worker: int, weights: Weights) -> Collected:
        actor = self._workers[worker]
        actor.set_weights(weights)
        rollout = actor.collect(self._plan.config.rollout_steps)
        return Collected(rollout.summary(), rollout)

    def _learn(self, rollouts: Sequence[Rollout]) -> Updated:
        replayed = self._replayed(len(rollouts))
        if self._replay is not None:
            for rollout in rollouts:
                keep(self._replay, rollout)
        learned = self._learner.learn(rollouts, replayed)
        if self._replay is not None and replayed is not None:
            self._replay.update(replayed.ids, learned.priorities)
        return Updated(learned, self._learner.weights())

    def _replayed(self, rollouts: int) -> Sample | None:
        return None if self._replay is None else drawn(self._replay, self._plan.replayed * rollouts)
