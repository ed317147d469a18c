"""How far a model may grow by its user's wish: parameters, forward computation, the time of a training step.

A germination that would go beyond a limit is refused by G0, which names the limit and the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.karn.catalog import CATALOG
from esper_ray.kasmina.slot import Seed


@dataclass(slots=True)
class Limits:
    """What a run may cost beyond its parameters, and what it costs now; 0 is no limit.

    Attributes:
        flops: most floating-point operations of one sample's forward pass.
        step_ms: longest mean training step.
        host_flops: of the host's forward pass; measured where one of the limits needs it.
        measured_step_ms: mean training step of the last epoch, 0 before the first.
    """

    flops: float = 0.0
    step_ms: float = 0.0
    host_flops: float = 0.0
    measured_step_ms: float = 0.0

    @property
    def wanted(self) -> bool:
        return self.flops > 0.0 or self.step_ms > 0.0

    def room(self, seeds: Iterable[Seed]) -> float:
        """Forward FLOPs of a sample that may still be added, by whichever limit is nearer; infinite without one.

        The time of a step with a block is today's, grown in proportion to the forward pass.
        """
        now = self.host_flops + sum(flops_of(seed) for seed in seeds)
        by_flops = self.flops - now if self.flops > 0.0 else math.inf
        timed = self.step_ms > 0.0 and self.measured_step_ms > 0.0
        by_time = max(now, 1.0) * self.step_ms / self.measured_step_ms - now if timed else math.inf
        return min(by_flops, by_time)

    def refusal(self, seeds: Sequence[Seed], added: int) -> str:
        """Why a block of ``added`` forward FLOPs per sample may not join ``seeds``; empty where it may."""
        if not self.wanted or added <= self.room(seeds):
            return ""
        now = self.host_flops + sum(flops_of(seed) for seed in seeds)
        if 0.0 < self.flops < now + added:
            return (
                f"the model would need {now + added:.0f} FLOPs for a sample, more than the {self.flops:.0f} of "
                "run.max_flops"
            )
        then = self.measured_step_ms * (now + added) / max(now, 1.0)
        return (
            f"a step takes {self.measured_step_ms:.1f} ms and would take about {then:.1f}, more than the "
            f"{self.step_ms:g} of run.max_step_ms"
        )


def flops_of(seed: Seed) -> int:
    """What the seed's block adds to one sample's forward pass, by its description."""
    blueprint = CATALOG.get(seed.spec.blueprint, tier_ceiling=BlueprintTier.HIGH_RISK)
    return blueprint.flops(seed.spec.signature, seed.spec.parameters)
