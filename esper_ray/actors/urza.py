"""Urza's shell: the store of kernels as an actor.

Contract: what `put` has returned is on disk; a call that failed may have happened and may be repeated, for the same
content is stored once. All state is in the home folder, so a restarted actor serves what the one before it stored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import esper_ray
from esper_ray.actors.resources import take_priority
from esper_ray.config import build
from esper_ray.contracts.enums import BlueprintTier, CircuitBreakerState
from esper_ray.contracts.ports import Kernel, KernelSpec
from esper_ray.oona.bus import connect_publisher
from esper_ray.urza.catalog import Row
from esper_ray.urza.store import Store, Verification

_MIB = 2**20


class UrzaActor:
    """Stores kernels and serves them."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("urza")
        config = build(config_tree)
        self._store = Store(
            config.home / "urza",
            cache_bytes=config.urza.cache_mb * _MIB,
            publisher=connect_publisher(config, source="urza"),
        )

    def put(self, spec: KernelSpec, weights: bytes, metadata: Mapping[str, Any]) -> Kernel:
        """See `Store.put`."""
        return self._store.put(spec, weights, metadata)

    def get(self, spec: KernelSpec, *, digest: str = "") -> Kernel:
        """See `Store.get`."""
        return self._store.get(spec, digest=digest)

    def get_digest(self, digest: str) -> Kernel:
        """See `Store.get_digest`."""
        return self._store.get_digest(digest)

    def list(self, *, blueprint: str = "", signature: str = "", tier: int = 0) -> list[Row]:
        """See `Store.list`."""
        return self._store.list(blueprint=blueprint, signature=signature, tier=BlueprintTier(tier))

    def verify(self) -> Verification:
        """See `Store.verify`."""
        return self._store.verify()

    def stats(self) -> dict[str, float | str]:
        """See `Store.stats`."""
        return self._store.stats()

    def ping(self) -> dict[str, Any]:
        return {"name": "urza", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        self._store.flush()
        healthy = self._store.breaker.state is CircuitBreakerState.CLOSED
        return {**self.ping(), "healthy": healthy, **self._store.stats()}
