"""Simic's shells for one training: a rollout worker, a replay, a learner. The crew in `simic.py` drives them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from esper_ray.actors.resources import take_priority
from esper_ray.simic import checkpoints
from esper_ray.simic.checkpoints import Counters
from esper_ray.simic.learner import Learned, Learner
from esper_ray.simic.localcrew import drawn, keep, replay_for, save_worker, worker_again, worker_for
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.replay import Sample
from esper_ray.simic.rollout import Rollout, RolloutSummary, Weights
from esper_ray.simic.spaces import Interface


class Member:
    """What all of a crew answer."""

    def pid(self) -> int:
        return os.getpid()


class RolloutActor(Member):
    """Acts. Its state is its environments: on disk as of the last checkpoint in lockstep, else a new one begins new
    episodes."""

    def __init__(self, plan: TrainingPlan, interface: Interface, worker: int, version: int, resume: bool) -> None:
        take_priority("school")
        torch.set_num_threads(1)
        self._steps, self._number, self._note = plan.config.rollout_steps, worker, ""
        if resume:
            self._worker, self._note = worker_again(plan, interface, worker, version)
        else:
            self._worker = worker_for(plan, interface, worker, version)

    def note(self) -> str:
        """What it did not go on with; empty if nothing."""
        return self._note

    def save(self, folder: Path) -> None:
        save_worker(self._worker, self._number, folder)

    def collect(self, weights: Weights) -> tuple[RolloutSummary, Rollout]:
        self._worker.set_weights(weights)
        rollout = self._worker.collect(self._steps)
        return rollout.summary(), rollout


class ReplayActor(Member):
    """Keeps segments. Its state is on disk as of the last checkpoint; what came after that fills again."""

    def __init__(self, plan: TrainingPlan, resume: bool) -> None:
        take_priority("school")
        self._replay = replay_for(plan)
        if resume and plan.folder is not None:
            self._replay.load(checkpoints.members(plan.folder))

    def sample(self, count: int) -> tuple[tuple[int, ...], Sample | None]:
        found = drawn(self._replay, count)
        return (() if found is None else tuple(found.ids.tolist())), found

    def add(self, *rollouts: Rollout) -> int:
        for rollout in rollouts:
            keep(self._replay, rollout)
        return len(self._replay)

    def update(self, ids: Sequence[int], priorities: Sequence[float]) -> None:
        self._replay.update(ids, priorities)

    def save(self, folder: Path) -> None:
        self._replay.save(folder)


class LearnerActor(Member):
    """Learns. Its state is in the training's folder as of the last checkpoint."""

    def __init__(self, plan: TrainingPlan, interface: Interface) -> None:
        take_priority("school")
        torch.set_num_threads(1)
        self._plan, self._learner = plan, Learner(plan, interface)

    def open(self, resume: bool) -> tuple[Counters, int, Weights]:
        assert not resume or self._plan.folder is not None
        counters = self._learner.load(self._plan.folder) if resume and self._plan.folder else Counters()
        weights = self._learner.weights()
        return counters, weights.version, weights

    def adopt(self, weights: Weights, version: int, steps: int) -> Weights:
        self._learner.adopt(weights, version=version, steps=steps)
        return self._learner.weights()

    def learn(self, replayed: Sample | None, *rollouts: Rollout) -> tuple[Learned, Weights]:
        return self._learner.learn(rollouts, replayed), self._learner.weights()

    def save(self, folder: Path, counters: Counters) -> None:
        self._learner.save(folder, counters)
