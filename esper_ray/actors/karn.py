"""Karn's shell: the catalogue of blueprints as an actor. It has no state: every answer follows from the table."""

from __future__ import annotations

import os
from typing import Any

import esper_ray
from esper_ray.config import build
from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.catalog import CATALOG, Blueprint, QueryAnswer


class KarnActor:
    """Answers which blueprints there are and which of them fit a slot."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        build(config_tree)

    def query(
        self,
        signature: str,
        *,
        tier_ceiling: int = BlueprintTier.SAFE,
        parameter_budget: int | None = None,
    ) -> QueryAnswer:
        """What may grow in that slot; see `Catalog.query`."""
        return CATALOG.query(
            SlotSignature.parse(signature),
            tier_ceiling=BlueprintTier(tier_ceiling),
            parameter_budget=parameter_budget,
        )

    def get(self, identifier: str, *, tier_ceiling: int = BlueprintTier.SAFE) -> Blueprint:
        """One blueprint, if its tier is approved."""
        return CATALOG.get(identifier, tier_ceiling=BlueprintTier(tier_ceiling))

    def ping(self) -> dict[str, Any]:
        return {"name": "karn", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        return {**self.ping(), "healthy": True, "blueprints": len(list(CATALOG))}
