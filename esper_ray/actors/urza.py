"""Urza's shell: the store of kernels as an actor.

Contract: what `put` has returned is on disk; a call that failed may have happened and may be repeated, for the same
content is stored once. All state is in the home folder, so a restarted actor serves what the one before it stored.
What turns out to be damaged is withdrawn, and ordered from Tezzeret anew. Kernels that are there come over a line
as well as through Ray (`actors.line`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import esper_ray
from esper_ray.actors import crew, kernel_parts
from esper_ray.actors.line import Address, LineServer
from esper_ray.actors.resources import take_priority
from esper_ray.actors.shared import SharedKernel, SharedTier
from esper_ray.config import build
from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.contracts.ports import Kernel, KernelSpec
from esper_ray.errors import EsperError, StoreUnavailable
from esper_ray.oona.bus import connect_publisher
from esper_ray.urza.catalog import Row, Withdrawal
from esper_ray.urza.checks import Finding, Verification
from esper_ray.urza.store import Store

_MIB = 2**20
_log = logging.getLogger(__name__)


class UrzaActor:
    """Stores kernels and serves them."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("urza")
        config = build(config_tree)
        self._namespace = config.ray.namespace
        self._shared = SharedTier(config.urza.shared_mb * _MIB)
        self._store = Store(
            config.home / "urza",
            cache_bytes=config.urza.cache_mb * _MIB,
            publisher=connect_publisher(config, source="urza"),
            on_loss=self._order,
        )
        self._line = LineServer("urza", self._serve)
        self._warmed = 0
        threading.Thread(target=self._warm, name="warm", daemon=True).start()

    def put(self, spec: KernelSpec, weights: bytes | memoryview, metadata: Mapping[str, Any]) -> Kernel:
        """See `Store.put`."""
        return self._store.put(spec, weights, metadata)

    def get(self, spec: KernelSpec, *, digest: str = "") -> Kernel:
        """See `Store.get`: the kernel by value."""
        return self._store.get(spec, digest=digest)

    def fetch(self, spec: KernelSpec, *, digest: str = "") -> Kernel | SharedKernel:
        """As `get`; the weights of a large kernel lie in the object store. Errors as for `Store.get`."""
        found = self._store.find(spec, digest=digest)
        shared = self._shared.get(found)
        if shared is not None:
            self._store.figures.count("shared")
            return shared
        kernel = self._store.get_digest(found)
        return self._shared.put(kernel) or kernel

    def line(self) -> Address | None:
        """Where kernels are given without Ray in between; None where this machine has no such thing."""
        return self._line.address

    def _serve(self, parts: Sequence[bytes]) -> Sequence[bytes]:
        """A kernel that is small enough to send; nothing where `fetch` has to be asked, for its reasons too."""
        try:
            kernel = self._store.get(kernel_parts.spec_in(parts))
        except EsperError:
            return []
        return kernel_parts.answered(kernel) if len(kernel.weights) <= kernel_parts.MOST_BYTES else []

    def get_digest(self, digest: str) -> Kernel:
        """See `Store.get_digest`."""
        return self._store.get_digest(digest)

    def list(
        self,
        blueprint: str = "",
        signature: str = "",
        tier: int = 0,
        family: str = "",
        stage: str = "",
        digest: str = "",
    ) -> list[Row]:
        """See `Store.list`."""
        return self._store.list(blueprint, signature, tier, family, stage, digest)

    def verify(self) -> Verification:
        """See `Store.verify`."""
        return self._store.verify()

    def heal(self, findings: Sequence[Finding]) -> Sequence[Finding]:
        """See `Store.heal`; Tezzeret has the order for what was withdrawn when this returns, if he is up."""
        return self._store.heal(findings)

    def recovered_findings(self) -> Sequence[Finding]:
        """See `Store.recovered_findings`."""
        return self._store.recovered_findings()

    def withdrawals(self) -> Sequence[Withdrawal]:
        """See `Store.withdrawals`."""
        return self._store.withdrawals()

    def stats(self) -> dict[str, float | str]:
        """See `Store.stats`, and what is shared."""
        return {
            **self._store.stats(),
            "warmed": self._warmed,
            "shared_kernels": len(self._shared),
            "shared_bytes": self._shared.size,
        }

    def ping(self) -> dict[str, Any]:
        return {"name": "urza", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        self._store.figures.flush()
        breakers = (self._store.breaker, self._store.write_breaker)
        healthy = all(breaker.state is CircuitBreakerState.CLOSED for breaker in breakers)
        return {**self.ping(), "healthy": healthy, **self.stats()}

    def _warm(self) -> None:
        try:
            self._warmed = self._store.warm()
        except StoreUnavailable as error:
            _log.error("not warmed up: %s", error)

    def _order(self, lost: Sequence[Finding]) -> None:
        """Have the forge make again what was withdrawn. Without a forge, the next run orders it."""
        tezzeret = crew.find("tezzeret", self._namespace)
        if tezzeret is not None:
            tezzeret.start_forge.remote(sorted({f"{each.blueprint}@{each.signature}" for each in lost}))
