"""Brings the actors up on Ray, attaches to them, gives them runs, takes them down. The `esper` command is made of it.

    with connect(config) as session:
        session.up()
        run = session.submit(config, compare=True)
        final = session.wait(run, on_status=print)

A cluster that `connect` had to start ends with the session, unless `Session.leave` was called.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from esper_ray import build, cluster, runs
from esper_ray.actors.resources import table
from esper_ray.config import Config, of_old
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import AdaptationCommand
from esper_ray.contracts.signing import Signer, load_keys
from esper_ray.errors import ConfigError, EnvironmentFault, EsperError, RunError
from esper_ray.oona.address import ENVIRONMENT_URL, resolve_redis
from esper_ray.reliability import atomic
from esper_ray.tolaria.forks import Fork

PRESETS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "fast": (
        "run.epochs=14",
        "run.boundary_every=32",
        "run.train_samples=2000",
        "run.validation_samples=400",
        "run.test_samples=1000",
        "run.host_width=8",
        "run.difficulty=0.3",
        "forge.compile=never",
    ),
}
"""Named settings, applied before the user's own: ``fast`` shows the whole path in about a minute."""

_FIXED_WHEN_UP = ("urza", "bus", "nissa")
_CALL_SECONDS = 40.0
_START_SECONDS = 120.0
Status = dict[str, Any]


def connect(config: Config, *, start: bool = True, say: Callable[[str], None] = lambda _: None) -> Session:
    """Attach to a running cluster, or start a local one.

    Args:
        start: whether one may be started.
        say: gets one line about each thing worth knowing.

    Raises:
        EnvironmentFault: none runs and ``start`` is False, its versions differ from ours, or it does not answer.
    """
    preflight(config)
    address = cluster.locate(config)
    started = address is None
    if address is None:
        if not start:
            raise EnvironmentFault("No Ray cluster is running.", remedy="Start the system with `esper up`.")
        say("starting Ray on this machine, for local connections only")
        address = cluster.start(config).address
    cluster.prepare(address)
    try:
        from esper_ray.actors import crew

        dashboard = crew.join(config, address)
    except BaseException:
        if started:
            cluster.stop(config)
        raise
    if cluster.exposed(address):
        say(
            "warning: this Ray cluster listens on every network interface; the safer start is "
            f"`{cluster.LOOPBACK_SWITCH}=0 ray start --head --port=6385`"
        )
    return Session(config, address, dashboard, started=started)


def preflight(config: Config) -> None:
    """Find what would fail before anything is started or written.

    Raises:
        EsperError: the home folder cannot be written, Redis cannot be reached or found, a resource is unknown.
    """
    table(config)
    atomic.make_folder(config.home)
    if not os.access(config.home, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"Cannot write {config.home}.",
            why="The system says: Permission denied.",
            remedy="Point ESPER_HOME at a folder you can write.",
        )
    resolve_redis(config)


def actor_tree(config: Config) -> dict[str, Any]:
    """The configuration as the actors get it: with what this process's environment says, for they have another one."""
    tree = config.model_dump(mode="json")
    tree["home"] = str(config.home.resolve())
    if config.run.is_own_task:
        tree["run"]["code_folder"] = str(Path(config.run.code_folder or ".").resolve())
    if config.run.data_folder:
        tree["run"]["data_folder"] = str(Path(config.run.data_folder).expanduser().resolve())
    bus, nissa = tree["bus"], tree["nissa"]
    bus["redis_url"] = bus["redis_url"] or os.environ.get(ENVIRONMENT_URL, "")
    nissa["elasticsearch_url"] = nissa["elasticsearch_url"] or os.environ.get("ESPER_ELASTICSEARCH_URL", "")
    return tree


class Session:
    """A connection to one system of actors. Made by `connect`."""

    def __init__(self, config: Config, address: str, dashboard: str, *, started: bool) -> None:
        self.config, self.address, self.started = config, address, started
        self._leave = False
        self.dashboard = dashboard

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; a cluster that this session started ends with it."""
        import ray

        if self.started and not self._leave:
            with contextlib.suppress(EsperError):
                self._end_actors()
            ray.shutdown()
            cluster.stop(self.config)
        else:
            ray.shutdown()

    def leave(self) -> None:
        """Let the cluster and its actors go on when this session closes."""
        self._leave = True

    def up(self) -> Status:
        """Bring all actors up, or find them there; returns the system's status.

        Raises:
            EsperError: other code or another configuration is up, a port is taken, or there is too little room.
        """
        from esper_ray.actors import crew

        tree = actor_tree(self.config)
        found = crew.find("supervisor", self.config.ray.namespace)
        if found is not None:
            self._check_running(self._call("ping"), tree)
            return self._report("start_all", timeout=_START_SECONDS)
        strangers = crew.present(self.config.ray.namespace)
        if strangers:
            raise RunError(
                f"The namespace {self.config.ray.namespace} holds actors without a supervisor: {', '.join(strangers)}.",
                remedy="Take them down with `esper down`.",
            )
        self._check_page_port()
        specs = table(self.config)
        crew.start(specs["supervisor"], self.config, tree, crew.check_room(specs, self.config))
        try:
            return self._report("start_all", timeout=_START_SECONDS)
        except BaseException:
            self._end_actors()
            raise

    def down(self) -> Status:
        """Stop the runs, end all actors of the namespace, and Ray too where it was started for this home."""
        import ray

        stopped = self._end_actors()
        ours = cluster.owned(self.config)
        if ours is not None and ours.address == self.address:
            ray.shutdown()
            cluster.stop(self.config)
            stopped["ray"] = True
        return stopped

    def status(self) -> Status:
        """Actors, Redis, runs, as the supervisor sees them."""
        return self._report("status")

    def places(self, status: Status) -> dict[str, str]:
        """Where to look, and which backends this system uses: name and text."""
        nissa = self.ask("nissa", "status")
        return {
            "Ray dashboard": self.dashboard or "none",
            "mission control": self.ask("nissa", "address"),
            "bus": status["redis"]["how"],
            "events": nissa["store"]["how"],
            "decides": self.ask("tamiyo", "policy")["decides"],
            "home": status["home"],
        }

    def ask(self, actor: str, method: str, *arguments: Any, timeout: float = _CALL_SECONDS) -> Any:
        """Call a method of one of the actors and wait.

        Raises:
            EsperError: the actor's own, or that it is not there or does not answer.
        """
        from esper_ray.actors import crew

        return crew.ask(self.config.ray.namespace, actor, method, *arguments, timeout=timeout)

    def submit(
        self, config: Config | None = None, *, compare: bool = False, arm: str = "grown", resume: str | None = None
    ) -> str:
        """Ask for a run; returns its id. ``resume`` continues an earlier one, with its own configuration.

        Raises:
            RunError: the run to resume is unknown, active or finished.
        """
        spec = {
            "request_id": secrets.token_hex(8),
            "config": actor_tree(config or self.config),
            "compare": compare,
            "arm": arm,
            "resume": resume,
        }
        if resume is not None:
            manifest = runs.find(self.config.runs, resume).manifest
            spec |= {"config": of_old(manifest["config"]), "arm": manifest["arm"]}
        run_id: str = self._call("submit_run", spec)
        return run_id

    def fork(self, fork: Fork, settings: Sequence[str] = ()) -> str:
        """Ask for a run that goes on from another one's boundary, with its configuration; returns its id.

        Args:
            settings: what is to be otherwise: of ``tamiyo`` and ``emergency``, and ``seeds.approved``.

        Raises:
            EsperError: there is no such run or checkpoint, or a decision or a setting is not possible there.
        """
        config = runs.check_fork(self.config.runs, fork, settings)
        spec = {"request_id": secrets.token_hex(8), "config": actor_tree(config), "fork": fork.as_row()}
        run_id: str = self._call("submit_run", spec)
        return run_id

    def report(self, run_id: str) -> Path:
        """Write the run's report beside its controls'; returns the page's path."""
        return runs.report(self.config.runs, run_id)

    def run_status(self, run_id: str) -> Status:
        return self._report("run_status", run_id)

    def stop(self, run_id: str) -> Status:
        """Ask a run to end with a checkpoint; it may go on for a moment."""
        return self._report("stop_run", run_id)

    def order(self, run_id: str, command: AdaptationCommand) -> None:
        """Give a run that is being trained an order, signed with this installation's key.

        Raises:
            RunError: it is not being trained now.
        """
        signer = Signer(load_keys(self.config.home / "keys" / "signing"), command.issued_by)
        data = codec.encode_command(command)
        sealed = signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand")
        if not self.ask("tolaria", "order", run_id, sealed):
            raise RunError(
                f"{run_id} is not being trained now.",
                why="Only a run in training follows orders.",
                remedy="See `esper status`; a run that was stopped goes on with `esper run --resume`.",
            )

    def watch(self, run_id: str, *, poll_seconds: float = 0.3) -> Iterator[Status]:
        """The run's status again and again, the last one when it is over."""
        while True:
            status = self.run_status(run_id)
            yield status
            if status["over"]:
                return
            time.sleep(poll_seconds)

    def wait(self, run_id: str, *, on_status: Callable[[Status], None] = lambda _: None) -> Status:
        """Wait for the end of a run.

        Raises:
            EsperError: it failed; the text says why.
        """
        status: Status = {}
        for status in self.watch(run_id):
            on_status(status)
        raise_failure(status)
        return status

    def _call(self, method: str, *arguments: Any, timeout: float = _CALL_SECONDS) -> Any:
        return self.ask("supervisor", method, *arguments, timeout=timeout)

    def _report(self, method: str, *arguments: Any, timeout: float = _CALL_SECONDS) -> Status:
        status: Status = self._call(method, *arguments, timeout=timeout)
        return status

    def _check_running(self, answer: Status, tree: dict[str, Any]) -> None:
        if answer["version"] != build():
            raise EnvironmentFault(
                f"The actors that are up run esper_ray {answer['version']}, and this is {build()}.",
                remedy="Take them down with `esper down`, then start again.",
            )
        there = answer["config"]
        pairs = [("home", there["home"], tree["home"])]
        pairs += [(f"{part}.{key}", there[part][key], tree[part][key]) for part in _FIXED_WHEN_UP for key in tree[part]]
        for key, has, wanted in pairs:
            if has != wanted:
                raise ConfigError(
                    f"The system that is up has another {key}.",
                    why=f"It has {has!r}, and {wanted!r} was asked for.",
                    remedy="Take it down with `esper down`, or leave that setting as it is.",
                )

    def _check_page_port(self) -> None:
        host, port = self.config.nissa.host, self.config.nissa.port
        if port and not cluster.is_free(host, port):
            raise EnvironmentFault(
                f"Port {port} on {host} is in use.",
                why="Nissa's page and metrics want it.",
                remedy="End what uses it, or choose another with --set nissa.port=PORT (0 takes a free one).",
            )

    def _end_actors(self) -> Status:
        from esper_ray.actors import crew

        namespace = self.config.ray.namespace
        stopped: list[str] = []
        if crew.find("supervisor", namespace) is not None:
            # An older or a stuck supervisor must not keep its actors alive.
            with contextlib.suppress(EsperError):
                stopped = self._call("shutdown")
        ended = crew.end(crew.present(namespace), namespace)
        return {"runs": stopped, "actors": ended, "ray": False}


def raise_failure(status: Status) -> None:
    """Raise what ended a failed run, as the error that it was."""
    for arm in status["arms"]:
        if arm["state"] == "failed":
            error = arm["error"] or {}
            raise RunError(
                error.get("what", "The run failed."), why=error.get("why", ""), remedy=error.get("remedy", "")
            )
