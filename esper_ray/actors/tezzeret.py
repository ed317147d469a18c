"""Tezzeret's shell: the forge as an actor. It loads no torch; its jobs do, in processes of their own.

Contract: an order that `start_forge` has returned for is in the forge's ledger. A restarted actor takes open orders up
again by itself and makes nothing twice. Jobs die with the actor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

import esper_ray
from esper_ray.actors import crew
from esper_ray.actors.resources import take_priority
from esper_ray.config import build
from esper_ray.contracts.ports import Kernel, KernelSpec
from esper_ray.contracts.signing import load_keys
from esper_ray.errors import StoreUnavailable
from esper_ray.oona.bus import connect_publisher
from esper_ray.tezzeret.forge import Forge
from esper_ray.tezzeret.shift import Shift
from esper_ray.urza.catalog import Row

_URZA_SECONDS = 60.0
_ANSWER_SECONDS = 15.0
_PAUSE_SECONDS = 0.2


class TezzeretActor:
    """Makes kernels in the background."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("tezzeret")
        config = build(config_tree)
        publisher = connect_publisher(config, source="tezzeret")
        store = UrzaByName(config.ray.namespace)
        keys = load_keys(config.home / "keys" / "signing")
        self._shift = Shift(Forge(store, config.home / "forge", config.forge, keys=keys, publisher=publisher))

    def start_forge(self, signatures: list[str]) -> dict[str, Any]:
        """Order kernels for these slots; returns at once with `progress`."""
        return self._shift.start(signatures)

    def progress(self) -> dict[str, Any]:
        """``phase, done, total, current, note, ready``; see `tezzeret.shift.Progress`."""
        return self._shift.progress()

    def stop(self) -> None:
        """Drop all orders; what is finished stays."""
        self._shift.stop()

    def ping(self) -> dict[str, Any]:
        return {"name": "tezzeret", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        progress = self._shift.progress()
        return {**self.ping(), "healthy": progress["phase"] != "failed", **progress}


class UrzaByName:
    """`tezzeret.forge.KernelStore` over Urza's actor, looked up at each call so that a new Urza is found.

    A call that finds no Urza, or loses it, is repeated for a minute; every one of these calls may be repeated.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def put(self, spec: KernelSpec, weights: bytes, metadata: Mapping[str, Any]) -> Kernel:
        kernel: Kernel = self._ask("put", spec, weights, metadata)
        return kernel

    def get_digest(self, digest: str) -> Kernel:
        kernel: Kernel = self._ask("get_digest", digest)
        return kernel

    def list(self) -> list[Row]:
        rows: list[Row] = self._ask("list")
        return rows

    def _ask(self, method: str, *arguments: Any) -> Any:
        deadline = time.monotonic() + _URZA_SECONDS
        while True:
            urza = crew.find("urza", self._namespace)
            if urza is not None:
                try:
                    return ray.get(getattr(urza, method).remote(*arguments), timeout=_ANSWER_SECONDS)
                except (RayActorError, GetTimeoutError) as error:
                    why = f"{type(error).__name__}."
            else:
                why = "There is no actor of that name."
            if time.monotonic() > deadline:
                raise StoreUnavailable("Urza does not answer.", why=why, remedy="Look at it in the Ray dashboard.")
            time.sleep(_PAUSE_SECONDS)
