"""What an episode is worth: the quality of the model at its end, less rent for what it holds and what it cost.

Nothing on the way is paid for. The steps between carry potential-based shaping only (Ng, Harada and Russell 1999:
F = gamma * Phi(s') - Phi(s), Phi = 0 at the end), which moves reward to where it was earned and leaves every
policy's rank as it was: with gamma 1 the return is ``terminal - Phi(first state)``, whatever the path.

The rents are per doubling, for blocks come in powers rather than in steps: a model of twice the parameters pays
``parameter_rent`` of accuracy, a run of twice the FLOPs pays ``compute_rent``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Rents in accuracy (0..1) per doubling over the host alone.

    Attributes:
        potential_weight: Phi of a boundary is this times its validation accuracy.
        gamma: discount of a micro-step; the learner's must be the same.
    """

    parameter_rent: float = 0.004
    compute_rent: float = 0.008
    potential_weight: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        priced = all(each >= 0.0 for each in (self.parameter_rent, self.compute_rent, self.potential_weight))
        if not (priced and 0.0 < self.gamma <= 1.0):
            raise ValueError(f"rents and weight are not below 0, and gamma is above 0 and at most 1: {self}")


def potential(accuracy: float, config: RewardConfig) -> float:
    """Phi of a boundary that is not the last: its validation accuracy (0..1), weighted."""
    return config.potential_weight * accuracy


def shaping(before: float, after: float, config: RewardConfig) -> float:
    """The reward of a step between two potentials; ``after`` is 0 when the step ends the episode."""
    return config.gamma * after - before


def terminal(quality: float, parameter_ratio: float, compute_ratio: float, config: RewardConfig) -> float:
    """What the finished run is worth.

    Args:
        quality: validation accuracy (0..1) of the final model, in the path that its predictions use.
        parameter_ratio: parameters held at the end, seeds of every stage included, over the host's.
        compute_ratio: FLOPs of the run over those of the host alone.
    """
    rent = config.parameter_rent * _doublings(parameter_ratio) + config.compute_rent * _doublings(compute_ratio)
    return quality - rent


def _doublings(ratio: float) -> float:
    """At least 0: a run is never paid for being cheaper than its host."""
    return math.log2(max(1.0, ratio))
