"""Tamiyo's shell: decides for Tolaria.

Contract: a decision that `decide` has returned is in Tamiyo's journal; the same state asked again gets the same
commands. A restarted actor knows every open run from its journal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import esper_ray
from esper_ray.config import build
from esper_ray.contracts.messages import FieldReport
from esper_ray.contracts.ports import RunOpening
from esper_ray.contracts.signing import load_keys
from esper_ray.oona.bus import connect_publisher
from esper_ray.tamiyo.controller import Tamiyo


class TamiyoActor:
    """Answers at the boundary."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        config = build(config_tree)
        self._tamiyo = Tamiyo(
            load_keys(config.home / "keys" / "signing"),
            journal=config.home / "journals" / "tamiyo.db",
            publisher=connect_publisher(config, source="tamiyo"),
        )

    def open_run(self, opening: RunOpening) -> bool:
        """See `Tamiyo.open_run`."""
        self._tamiyo.open_run(opening)
        return True

    def decide(self, run: str, state: Sequence[bytes]) -> list[bytes]:
        """See `Tamiyo.decide`."""
        return self._tamiyo.decide(run, state)

    def close_run(self, run: str) -> bool:
        """See `Tamiyo.close_run`."""
        self._tamiyo.close_run(run)
        return True

    def reports(self, run: str) -> list[FieldReport]:
        """See `Tamiyo.reports`."""
        return self._tamiyo.reports(run)

    def ping(self) -> dict[str, Any]:
        return {"name": "tamiyo", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        return {**self.ping(), "healthy": True}
