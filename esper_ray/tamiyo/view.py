"""What Tamiyo knows of a run: how it was opened, and every state since, in order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_ray.config import TamiyoConfig
from esper_ray.contracts.enums import BlendMode, EmergencyLevel, RiskLevel, SeedLifecycleStage, SeedOperation
from esper_ray.contracts.messages import SeedState, SystemState
from esper_ray.contracts.ports import Candidate, RunOpening, SlotInfo
from esper_ray.tamiyo.risk import Risk, RiskWatch


@dataclass(slots=True)
class RunView:
    """One run as seen through its states; ``states[-1]`` is the boundary being decided.

    Attributes:
        statistics: float32 [layers, LAYER_STATISTICS] of the newest state, None where the run sends none.
        memo: what can be derived from the opening alone, derived once.
        undone: (slot, blueprint) of the germinations that a rollback took back.
        turned: the epoch to which the run was put back last, None where it never was.
        by_hand: whether a person decided something in this run.
        risk: of the newest state; ``told`` is the level that was last made known.
    """

    opening: RunOpening
    config: TamiyoConfig
    states: list[SystemState] = field(default_factory=list)
    statistics: npt.NDArray[np.float32] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    undone: set[tuple[int, int]] = field(default_factory=set)
    turned: int | None = None
    by_hand: bool = False
    risk: Risk = field(default_factory=Risk)
    told: RiskLevel = RiskLevel.GREEN
    watch: RiskWatch = field(default_factory=RiskWatch)

    @property
    def now(self) -> SystemState:
        return self.states[-1]

    def seeds(self) -> Iterable[SeedState]:
        """The slots that are not dormant."""
        return self.now.seeds

    @property
    def conservative(self) -> bool:
        """Whether the run wants nothing to grow, after damage."""
        return self.now.metrics.get("em", 0.0) >= EmergencyLevel.CONSERVATIVE

    def dormant_slots(self) -> list[SlotInfo]:
        taken = {seed.slot for seed in self.now.seeds}
        return [slot for slot in self.opening.slots if slot.index not in taken]

    def candidates(self, slot: int) -> list[Candidate]:
        return [candidate for candidate in self.opening.candidates if candidate.slot == slot]

    def offers(self) -> list[Candidate]:
        """All candidates for slots that there are."""
        known = {slot.index for slot in self.opening.slots}
        return [candidate for candidate in self.opening.candidates if candidate.slot in known]

    def parameters(self) -> int:
        """Parameters of host and seeds now."""
        return int(self.now.metrics.get("pc", self.opening.host_parameters))

    def work_left(self) -> float:
        """Forward FLOPs of a sample that may still be added by the user's limits; infinite without any."""
        told = self.now.metrics.get("fr")
        if told is not None or not self.opening.max_flops:
            return math.inf if told is None else told
        known = {(each.slot, each.blueprint): each.flops for each in self.opening.candidates}
        grown = sum(known.get((seed.slot, seed.blueprint), 0) for seed in self.seeds() if seed.seed)
        return self.opening.max_flops - self.opening.host_flops - grown

    def watched(self, seed: SeedState) -> bool:
        """Whether a seed on probation has been there for its least stay."""
        recent = self.states[-self.opening.probation_epochs - 1 :]
        return len(recent) == self.opening.probation_epochs + 1 and all(
            any(each.seed == seed.seed and each.stage is SeedLifecycleStage.PROBATIONARY for each in state.seeds)
            for state in recent
        )


def in_history(state: SystemState, branch: int, turns: Mapping[int, int]) -> bool:
    """Whether a state lies on the way to ``branch``; ``turns`` has the epoch after which each branch was opened."""
    later = (at for opened, at in turns.items() if state.branch < opened <= branch)
    return state.branch <= branch and all(state.epoch <= at for at in later)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One thing a controller wants done, and why: which signal, which threshold.

    An empty ``schedule`` and an UNKNOWN mode leave the ramp to the run's configuration.
    """

    operation: SeedOperation
    slot: int
    why: str
    seed: int = 0
    blueprint: int = 0
    blend_mode: BlendMode = BlendMode.UNKNOWN
    schedule: str = ""
