"""The crew of one training on Ray: hires rollout workers, a replay and a learner, and drives them.

Contract: nobody here is restarted by Ray. The crew replaces who died or was silent for too long, because a newcomer
needs what only the crew knows: the newest weights. Lost are the rollout or the batch that was in work, no more. All
end with the process that made the crew.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from esper_ray.actors.simic_members import LearnerActor, ReplayActor, RolloutActor
from esper_ray.errors import EnvironmentFault, EsperError
from esper_ray.simic import checkpoints
from esper_ray.simic.checkpoints import Counters
from esper_ray.simic.evaluation import Evaluation, evaluate
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.policies import policy_for
from esper_ray.simic.rollout import Weights
from esper_ray.simic.training import Collected, Event, Lost, Updated

_POLL_SECONDS = 1.0
_LEAST_SHARE = 0.01
_RELEASE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Call:
    """One request that is out: to whom, what else it gives, and when it is overdue."""

    who: str
    actor: Any
    deadline: float
    data: Any = None
    worker: int | None = None
    ids: tuple[int, ...] = ()


class RayCrew:
    """The crew of one training on the connected cluster; a context manager. It is for one call of `train`."""

    def __init__(self, plan: TrainingPlan) -> None:
        if not ray.is_initialized():
            raise EnvironmentFault("No Ray cluster is connected.", remedy="Start the system with `esper up`.")
        self._plan, self._interface = plan, plan.env.interface()
        self._evaluated = policy_for(plan.env, self._interface, hidden=plan.config.hidden, seed=plan.seed)
        self._name = secrets.token_hex(3)
        self._share = share_of(plan, _free_processors)
        self._calls: dict[Any, _Call] = {}
        self._actors: dict[str, Any] = {}
        self._lost: list[Event] = []
        self.notes: tuple[str, ...] = ()
        self._version, self._steps = 0, 0
        self._weights: Any = None

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def workers(self) -> int:
        return max(1, self._plan.config.workers)

    @property
    def actors(self) -> dict[str, Any]:
        """The handles of everyone by name: "worker 0", "learner", "replay"."""
        return dict(self._actors)

    @property
    def weights(self) -> Any:
        """A reference to the newest ones."""
        return self._weights

    def open(self, *, resume: bool) -> tuple[Counters, int, Any]:
        if resume:
            assert self._plan.folder is not None
        self._hire("learner", LearnerActor, self._plan, self._interface)
        if self._plan.replayed:
            self._hire("replay", ReplayActor, self._plan, resume)
        counters, version, weights = self._ask("learner", "open", resume)
        self._version, self._weights, self._steps = version, ray.put(weights), counters.steps
        names = [f"worker {worker}" for worker in range(self.workers)]
        for worker, name in enumerate(names):
            self._hire(name, RolloutActor, self._plan, self._interface, worker, version, resume)
        if resume:
            self.notes = tuple(dict.fromkeys(filter(None, (self._insist(name, "note") for name in names))))
        return counters, version, self._weights

    def collect(self, worker: int, version: int, weights: Any) -> None:  # noqa: ARG002
        actor = self._actors[f"worker {worker}"]
        summary, rollout = actor.collect.options(num_returns=2).remote(weights)
        self._note(summary, f"worker {worker}", data=rollout, worker=worker)

    def learn(self, rollouts: Sequence[Any]) -> None:
        ids, replayed = self._replayed(rollouts)
        learned, weights = self._actors["learner"].learn.options(num_returns=2).remote(replayed, *rollouts)
        self._note(learned, "learner", data=weights, ids=ids)

    def wait(self) -> list[Event]:
        if not self._lost:
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=_POLL_SECONDS, fetch_local=False)
            for reference in done:
                self._finish(reference)
            now = time.monotonic()
            for reference in [each for each, call in self._calls.items() if call.deadline < now]:
                call = self._calls.pop(reference)
                self._replace(call, f"It did not answer within {self._plan.config.request_seconds:g} s.")
        events, self._lost = self._lost, []
        return events

    def fetch(self, weights: Any) -> Weights:
        found: Weights = ray.get(weights, timeout=self._plan.config.request_seconds)
        return found

    def evaluate(self, weights: Any, seed: int) -> Evaluation:
        self.fetch(weights).put_into(self._evaluated)
        episodes = self._plan.config.evaluate_episodes
        return evaluate(self._evaluated, self._plan.env, self._interface, episodes=episodes, seed=seed)

    def save(self, counters: Counters) -> None:
        assert self._plan.folder is not None
        self._steps = counters.steps
        members = checkpoints.members(self._plan.folder, self._version)
        if self._plan.keeps_workers:
            for worker in range(self.workers):
                self._insist(f"worker {worker}", "save", members)
        if "replay" in self._actors:
            self._insist("replay", "save", members)
        self._insist("learner", "save", self._plan.folder, counters)

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._calls = {}, {}

    def _hire(self, who: str, shell: type, *arguments: Any) -> None:
        cpus = _LEAST_SHARE if who == "replay" else self._share
        actor: Any = ray.remote(shell).options(
            name=f"simic-{who.replace(' ', '-')}-{self._name}-{secrets.token_hex(2)}",
            num_cpus=cpus,
            max_restarts=0,
            max_task_retries=0,
        )
        self._actors[who] = actor.remote(*arguments)

    def _note(self, reference: Any, who: str, **more: Any) -> None:
        deadline = time.monotonic() + self._plan.config.request_seconds
        self._calls[reference] = _Call(who, self._actors[who], deadline, **more)

    def _finish(self, reference: Any) -> None:
        """Turn an answer into an event."""
        call = self._calls.pop(reference)
        try:
            answer = _answer(reference, self._plan.config.request_seconds)
        except _GoneError as gone:
            self._replace(call, str(gone))
            return
        if call.worker is not None:
            self._lost.append(Collected(answer, call.data))
        elif call.who == "learner":
            self._version, self._weights = answer.version, call.data
            if call.ids and "replay" in self._actors:
                self._note(self._actors["replay"].update.remote(call.ids, answer.priorities), "replay")
            self._lost.append(Updated(answer, call.data))

    def _replayed(self, rollouts: Sequence[Any]) -> tuple[tuple[int, ...], Any]:
        """Ids of the segments to learn from once more, and a reference to them; the fresh ones go to the replay."""
        replay = self._actors.get("replay")
        if replay is None:
            return (), None
        sample: Any
        ids, sample = replay.sample.options(num_returns=2).remote(self._plan.replayed * len(rollouts))
        try:
            drawn_ids: tuple[int, ...] = _answer(ids, self._plan.config.request_seconds)
        except _GoneError as gone:
            self._renew("replay")
            self._lost.append(Lost("replay", why=str(gone)))
            drawn_ids, sample = (), None
        self._note(self._actors["replay"].add.remote(*rollouts), "replay")
        return drawn_ids, sample

    def _replace(self, call: _Call, why: str) -> None:
        """Hire somebody new, unless another failed call of the same actor has done so already."""
        if call.actor is self._actors.get(call.who):
            self._renew(call.who)
        if call.who == "learner":
            self._lost.append(Lost(call.who, weights=self._weights, version=self._version, why=why))
        else:
            self._lost.append(Lost(call.who, worker=call.worker, why=why))

    def _renew(self, who: str) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._actors[who])
        kept = self._plan.folder is not None and checkpoints.exists(self._plan.folder)
        if who == "learner":
            self._hire(who, LearnerActor, self._plan, self._interface)
            self._ask(who, "open", kept)
            # Versions never go back, and nothing that was learned is lost but the optimiser's last moments.
            self._version += 1
            self._weights = ray.put(self._ask(who, "adopt", self._weights, self._version, self._steps))
        elif who == "replay":
            self._hire(who, ReplayActor, self._plan, kept)
        else:
            self._hire(who, RolloutActor, self._plan, self._interface, int(who.split()[1]), self._version, False)

    def _ask(self, who: str, method: str, *arguments: Any) -> Any:
        """Call and wait.

        Raises:
            _GoneError: it died, or did not answer in time.
            EsperError: its own.
        """
        reference = getattr(self._actors[who], method).remote(*arguments)
        return _answer(reference, self._plan.config.request_seconds)

    def _insist(self, who: str, method: str, *arguments: Any) -> Any:
        """As `_ask`, a second time with somebody new if the first one is lost."""
        try:
            return self._ask(who, method, *arguments)
        except _GoneError:
            self._renew(who)
            return self._ask(who, method, *arguments)


class _GoneError(Exception):
    """An actor that was asked is dead or silent, or an object has gone with a node."""


def _answer(reference: Any, seconds: float) -> Any:
    """What a call gave.

    Raises:
        _GoneError: there will be no answer.
        EsperError: the actor's own.
    """
    try:
        return ray.get(reference, timeout=seconds)
    except RayTaskError as error:
        if isinstance(error.cause, EsperError):
            raise error.cause from None
        raise
    except GetTimeoutError:
        raise _GoneError(f"It did not answer within {seconds:g} s.") from None
    except RayError as error:
        raise _GoneError(str(error).strip().splitlines()[0]) from None


def share_of(plan: TrainingPlan, free: Callable[[], float]) -> float:
    """Processors that each worker and the learner ask for: as configured, else 1, or hardly any where that is not free.

    Args:
        free: how many processors the cluster has free now; asked again, for what has just ended is not free at once.

    Raises:
        EnvironmentFault: the cluster has not as many free.
    """
    members = max(1, plan.config.workers) + 1
    replay = _LEAST_SHARE if plan.replayed else 0.0
    if not plan.config.worker_cpus and free() >= members + replay:
        return 1.0
    share = plan.config.worker_cpus or _LEAST_SHARE
    needed, there = share * members + replay, free()
    give_up = time.monotonic() + _RELEASE_SECONDS
    while needed > there + 1e-6 and time.monotonic() < give_up:
        time.sleep(_RELEASE_SECONDS / 20)
        there = free()
    if needed > there + 1e-6:
        raise EnvironmentFault(
            f"The training needs {needed:g} CPU, and {there:g} of the cluster are free.",
            why=f"It has {members - 1} workers and a learner.",
            remedy="Stop other work on the cluster, or ask for less with simic.workers or simic.worker_cpus.",
        )
    return share


def _free_processors() -> float:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free.get("CPU", 0.0)
