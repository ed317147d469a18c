"""The supervisor's shell: starts the others, watches them, and hands Tolaria the runs that are wanted.

Contract: what `submit_run` and `stop_run` have returned is in the journal and survives this process; a call that
failed may have happened, so both may be repeated. Ray restarts what crashes; this actor creates anew what is dead for
good, and continues the active run from its last checkpoint when Tolaria was lost. It owns the managed Redis, which
ends with it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import esper_ray
from esper_ray.actors import crew
from esper_ray.actors.driver import Driver, as_record
from esper_ray.actors.resources import ACTORS, table, take_priority
from esper_ray.config import build
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.schema import speak
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.errors import EsperError
from esper_ray.oona.address import resolve_redis
from esper_ray.oona.bus import connect_publisher
from esper_ray.oona.publisher import BusPublisher
from esper_ray.oona.server import ManagedRedis
from esper_ray.reliability.clock import SYSTEM_CLOCK
from esper_ray.reliability.ids import new_run_id
from esper_ray.reliability.journal import Journal
from esper_ray.reliability.restarts import Restarts
from esper_ray.reliability.runqueue import RunQueue
from esper_ray.tolaria import forks

_TICK_SECONDS = 0.4
_PING_EVERY_SECONDS = 2.0
_PING_SECONDS = 3.0
_START_SECONDS = 90.0
_STOP_SECONDS = 30.0
_log = logging.getLogger(__name__)


class SupervisorActor:
    """Owns the desired state: which actors there are and which run is trained."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("supervisor")
        speak()
        self._tree, self._config = config_tree, build(config_tree)
        specs = table(self._config)
        self._specs = {spec.name: specs[spec.name] for spec in ACTORS}
        self._handles: dict[str, Any] = {}
        self._seen: dict[str, dict[str, Any]] = {}
        self._away: dict[str, str] = {}
        self._restarts, self._tick_ms, self._fault = Restarts(), 0.0, ""
        self._publisher: BusPublisher | None = None
        self._queue = RunQueue(Journal(self._config.home / "journals" / "supervisor.db"))
        self._driver = Driver(self._queue, self._config)
        self._redis_choice = resolve_redis(self._config)
        self._redis = ManagedRedis(self._config.home) if self._redis_choice.kind == "managed" else None
        if self._redis is not None:
            self._redis.start()
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="control-loop", daemon=True)
        others = [name for name in crew.present(self._config.ray.namespace) if name != "supervisor"]
        if others:
            # They outlived an earlier life of this actor, so somebody wants the system up: watch again.
            self._thread.start()
        else:
            self._queue.interrupt()

    def start_all(self) -> dict[str, Any]:
        """Bring up whatever is not there and wait until all answer. Repeating it changes nothing.

        Raises:
            EsperError: an actor could not be constructed, or the cluster has no room; the text says which.
        """
        with self._lock:
            self._handles = crew.create(self._specs, self._config, self._tree)
            for name, answer in crew.ping(self._handles, _START_SECONDS).items():
                if isinstance(answer, Exception):
                    error = as_record(answer)
                    raise EsperError(f"The actor {name} did not start.", why=f"{error['what']} {error['why']}".strip())
                self._note(name, answer)
            if not self._thread.is_alive():
                self._thread.start()
        return self.status()

    def submit_run(self, spec: dict[str, Any]) -> str:
        """Ask for a run, or for one to be resumed; returns its id once that is on disk.

        ``spec`` has ``request_id``, ``config`` (a tree), ``compare`` (train the controls too), and optionally
        ``arm``, ``resume`` (the id of a run) and ``fork`` (a `tolaria.forks.Fork` as a row).

        Raises:
            RunError: the run to resume is unknown, active or finished.
            CheckpointError: what the fork goes on from is not there any more.
        """
        request, resume = spec["request_id"], spec.get("resume")
        if resume and self._queue.knows(resume):
            run_id = self._queue.resume(request, resume)
        elif resume:
            run_id = self._queue.adopt(request, resume, spec["config"], arm=spec.get("arm") or "grown")
        elif spec.get("fork"):
            run_id = self._queue.known(request) or self._fork(request, spec)
        else:
            arms = ("grown", "host", "final") if spec.get("compare") else (spec.get("arm") or "grown",)
            run_id = new_run_id(build(spec["config"]).run.label)
            run_id = self._queue.submit(request, run_id, spec["config"], arms=arms)
        self._wake.set()
        return run_id

    def _fork(self, request: str, spec: dict[str, Any]) -> str:
        """Copy what the new run goes on from, then ask for it: its parent may lose that checkpoint meanwhile."""
        config = build(spec["config"])
        run_id = new_run_id(config.run.label)
        forks.bring(config.runs, forks.Fork.of(spec["fork"]), run_id)
        return self._queue.submit(request, run_id, spec["config"], arms=("grown",), fork=spec["fork"])

    def run_status(self, run_id: str) -> dict[str, Any]:
        """State, place in the queue, arms with their progress, result or error."""
        return self._driver.describe(self._queue.find(run_id))

    def stop_run(self, run_id: str) -> dict[str, Any]:
        """Ask the run to end at its next safe point, with a checkpoint; returns its status now."""
        run = self._queue.stop(run_id)
        self._wake.set()
        return self._driver.describe(run)

    def status(self) -> dict[str, Any]:
        """Actors, Redis, and the runs that are not over."""
        return {
            "build": esper_ray.build(),
            "home": str(self._config.home),
            "actors": {name: self._describe(name) for name in ("supervisor", *self._specs)},
            "redis": {"how": self._redis_choice.how, "alive": self._redis is None or self._redis.alive()},
            "runs": [self._driver.describe(run) for run in self._queue.runs() if not run.over],
            "tick_ms": self._tick_ms,
            "fault": self._fault,
        }

    def ping(self) -> dict[str, Any]:
        return {"name": "supervisor", "pid": os.getpid(), "version": esper_ray.build(), "config": self._tree}

    def health(self) -> dict[str, Any]:
        return {"tick_ms": self._tick_ms, "fault": self._fault, "watching": self._thread.is_alive()}

    def shutdown(self) -> list[str]:
        """Stop the runs (with a checkpoint), the control loop and the managed Redis; returns the stopped runs."""
        stopped = [self._queue.stop(run.run_id).run_id for run in self._queue.runs() if not run.over]
        self._wake.set()
        deadline = SYSTEM_CLOCK.monotonic() + _STOP_SECONDS
        while self._driver.busy and self._thread.is_alive() and SYSTEM_CLOCK.monotonic() < deadline:
            time.sleep(0.05)
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_PING_SECONDS + _TICK_SECONDS)
        if self._publisher is not None:
            self._publisher.close()
        if self._redis is not None:
            self._redis.stop()
        return stopped

    def _loop(self) -> None:
        next_ping = 0.0
        while not self._closing.is_set():
            began = SYSTEM_CLOCK.monotonic()
            try:
                if self._redis is not None and not self._redis.alive():
                    self._redis.start()
                if began >= next_ping:
                    with self._lock:
                        self._watch()
                    next_ping = began + _PING_EVERY_SECONDS
                self._driver.step(self._reachable("tolaria"), self._reachable("tezzeret"))
                self._fault = ""
            except Exception as error:
                # The loop is what brings everything else back, so nothing may end it.
                self._fault = f"{type(error).__name__}: {error}"
                _log.exception("the control loop goes on after a fault")
            self._tick_ms = (SYSTEM_CLOCK.monotonic() - began) * 1e3
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()

    def _watch(self) -> None:
        namespace = self._config.ray.namespace
        for name in self._specs.keys() - self._handles.keys():
            found = crew.find(name, namespace)
            if found is not None:
                self._handles[name] = found
        for name, answer in crew.ping(self._handles, _PING_SECONDS).items():
            if not isinstance(answer, Exception):
                self._note(name, answer)
                continue
            self._away[name] = "restarting" if crew.is_late(answer) else "dead"
            if crew.is_dead(answer):
                self._restarts.died(name, as_record(answer)["why"])
                del self._handles[name]
        for name in self._specs.keys() - self._handles.keys():
            if self._restarts.may_start(name):
                _log.warning("%s is dead and is created anew", name)
                self._handles |= crew.create({name: self._specs[name]}, self._config, self._tree)

    def _note(self, name: str, answer: dict[str, Any]) -> None:
        self._away.pop(name, None)
        self._seen[name] = answer
        if self._restarts.seen(name, int(answer["pid"])):
            _log.warning("%s was restarted and answers from process %s", name, answer["pid"])
            self._tell_restart(name)

    def _tell_restart(self, name: str) -> None:
        if self._publisher is None:
            self._publisher = connect_publisher(self._config, source="supervisor")
        publish_telemetry(self._publisher, "supervisor", "", 0, [MetricPoint("ar", 1.0, {"actor": name})])

    def _reachable(self, name: str) -> Any:
        return None if name in self._away else self._handles.get(name)

    def _describe(self, name: str) -> dict[str, Any]:
        if name == "supervisor":
            return {"state": "up", "pid": os.getpid(), "restarts": 0, "error": ""}
        state = self._away.get(name, "up" if name in self._seen else "starting")
        return {
            "state": state,
            "pid": self._seen.get(name, {}).get("pid"),
            "restarts": self._restarts.count(name),
            "error": self._restarts.error(name),
        }
