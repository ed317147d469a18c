"""How far a model may grow by its user's wish: parameters, forward computation, the time of a training step.

A germination that would go beyond a limit is refused by G0, which names the limit and the figures.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    def refusal(self, seeds: Iterable[Seed], added: int) -> str:
        """Why a block of ``added`` forward FLOPs per sample may not join ``seeds``; empty where it may.

        The time of a step with the block is today's, grown in proportion to the forward pass.
        """
        if not self.wanted:
            return ""
        now = self.host_flops + sum(flops_of(seed) for seed in seeds)
        if 0.0 < self.flops < now + added:
            return (
                f"the model would need {now + added:.0f} FLOPs for a sample, more than the {self.flops:.0f} of "
                "run.max_flops"
            )
        then = self.measured_step_ms * (now + added) / max(now, 1.0)
        if 0.0 < self.step_ms < then:
            return (
                f"a step takes {self.measured_step_ms:.1f} ms and would take about {then:.1f}, more than the "
                f"{self.step_ms:g} of run.max_step_ms"
            )
        return ""


def flops_of(seed: Seed) -> int:
    """What the seed's block adds to one sample's forward pass, by its description."""
    blueprint = CATALOG.get(seed.spec.blueprint, tier_ceiling=BlueprintTier.HIGH_RISK)
    return blueprint.flops(seed.spec.signature, seed.spec.parameters)
