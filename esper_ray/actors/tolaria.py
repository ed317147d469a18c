"""Tolaria's shell: the training loop, with Kasmina in the same process.

Contract: `train` returns when the run has ended or was stopped; a run that was lost with its process goes on from its
last checkpoint when it is asked for again with ``resume``. The control methods answer while it trains.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import ray

import esper_ray
from esper_ray.actors.clients import ByName, RemoteDecider, until_done
from esper_ray.actors.resources import take_priority, training_threads
from esper_ray.actors.surroundings import forge_order, kernels, offered
from esper_ray.config import Config, build, of_old
from esper_ray.contracts.signing import load_keys
from esper_ray.errors import RunError
from esper_ray.oona.bus import connect_publisher

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import RunRequest, Surroundings

_IDLE: dict[str, Any] = {"run_id": "", "arm": "", "state": "idle", "epoch": 0, "epochs": 0, "seeds": []}


class TolariaActor:
    """Trains one run at a time."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("tolaria")
        # torch is loaded here and not with the module: the supervisor imports this file and stays light.
        import esper_ray.tolaria.trainer  # noqa: F401

        self._config = build(config_tree)
        self._publisher = connect_publisher(self._config, source="tolaria")
        self._progress = dict(_IDLE)
        self._stop = threading.Event()
        self._orders: deque[bytes] = deque()

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do a run, or go on with it; see `runtime` for the fields of ``request``.

        Raises:
            EsperError: the user's mistake, or damage; the text says which.
        """
        import torch

        from esper_ray.tolaria.trainer import Stopped, Trainer

        self._stop.clear()
        self._orders.clear()
        named = {"run_id": request["run_id"], "arm": request["arm"]}
        self._progress = {**_IDLE, **named, "state": "preparing"}
        state = "failed"
        try:
            config = build(of_old(request["config"]))
            torch.set_num_threads(training_threads(config))
            trainer = Trainer(_plan(request, config), self._surroundings(config))
            wanted = forge_order(config, trainer.task.slots)
            until_done(lambda: ByName("tezzeret", config.ray.namespace).call("start_forge", wanted))
            result = trainer.run()
            state = "finished"
        except Stopped:
            state = "stopped"
            result = {**named, "status": "stopped", "epoch": self._progress.get("epoch", 0)}
        finally:
            self._progress = {**self._progress, "state": state}
        return result

    @ray.method(concurrency_group="control")
    def progress(self) -> dict[str, Any]:
        return self._progress

    @ray.method(concurrency_group="control")
    def stop(self, run_id: str) -> bool:
        """Ask the run to end after its present step; whether it is the one being trained."""
        current = self._progress.get("run_id") == run_id
        if current:
            self._stop.set()
        return current

    @ray.method(concurrency_group="control")
    def order(self, run_id: str, command: bytes) -> bool:
        """Hand a person's signed command to the run, which looks for it before its next step; False: it is not trained.

        The run checks the signature and tells of what it refuses.
        """
        current = self._progress.get("run_id") == run_id and self._progress.get("state") in ("training", "paused")
        if current:
            self._orders.append(command)
        return current

    def _take_orders(self) -> list[bytes]:
        return [self._orders.popleft() for _ in range(len(self._orders))]

    @ray.method(concurrency_group="control")
    def ping(self) -> dict[str, Any]:
        return {"name": "tolaria", "pid": os.getpid(), "version": esper_ray.build()}

    @ray.method(concurrency_group="control")
    def health(self) -> dict[str, Any]:
        return {"name": "tolaria", "healthy": True, "state": self._progress["state"]}

    def _surroundings(self, config: Config) -> Surroundings:
        from esper_ray.tolaria.trainer import Surroundings

        namespace = config.ray.namespace
        return Surroundings(
            decider=RemoteDecider(namespace),
            kernels=kernels(config),
            candidates=lambda slot: offered(config, slot),
            keys=load_keys(config.home / "keys" / "signing"),
            publisher=self._publisher,
            backends=_backends(config),
            should_stop=self._stop.is_set,
            orders=self._take_orders,
            on_progress=self._note,
        )

    def _note(self, progress: dict[str, Any]) -> None:
        self._progress = {**self._progress, **progress}


def _plan(request: dict[str, Any], config: Config) -> RunRequest:
    """The request; for the arm "final" with the blocks and the FLOPs of the run it is compared with."""
    from esper_ray.tolaria.forks import Fork
    from esper_ray.tolaria.trainer import Block, RunRequest

    common = {"run": request["run_id"], "config": config, "arm": request["arm"], "resume": bool(request.get("resume"))}
    if request.get("fork"):
        common["fork"] = Fork.of(request["fork"])
    if request["arm"] != "final":
        return RunRequest(**common)
    file = config.runs / str(request["reference"]) / "result.json"
    if not file.exists():
        raise RunError(f"The run {request['reference']} has no result to compare with.", remedy="Let it finish first.")
    grown = json.loads(file.read_text())
    blocks = tuple(map(Block.of, grown["blocks"]))
    return RunRequest(**common, blocks=blocks, flops=grown["flops"])


def _backends(config: Config) -> dict[str, str]:
    from esper_ray.oona.address import resolve_redis
    from esper_ray.tezzeret.toolchain import compiler_available

    compiles, why = compiler_available() if config.forge.compile == "auto" else (False, "forge.compile is never")
    return {
        "ray": f"{ray.__version__}, namespace {config.ray.namespace}",
        "bus": resolve_redis(config).how,
        "kernels": "compiled where that is measured to pay" if compiles else f"eager: {why}",
    }
