"""How hard a kernel is compiled: four strategies, and which of them comes next when one fails. One table, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

StrategyName = Literal["emergency", "fast", "standard", "aggressive"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to compile.

    Attributes:
        options: what Inductor is told, beside its defaults.
        rounds: how often compiled and eager are measured, in turns.
        calmer: what is tried after a failure; None where there is none. A kernel that is given up stays as "emergency"
            leaves it.
    """

    name: StrategyName
    meaning: str
    calmer: StrategyName | None
    options: Mapping[str, str | bool | int] = field(default_factory=dict)
    rounds: int = 15


STRATEGIES: Mapping[StrategyName, Strategy] = {
    each.name: each
    for each in (
        Strategy("emergency", "nothing is compiled: the checked eager kernel is what there is", None),
        Strategy(
            "fast",
            "no autotuning, no search for patterns, and no loops fused side by side; few measurements",
            None,
            {"pattern_matcher": False, "cpp.max_horizontal_fusion_size": 1},
            7,
        ),
        Strategy("standard", "Inductor as it comes", "fast"),
        Strategy(
            "aggressive",
            "every candidate for a loop or a matrix product is tried, and multiply-adds are contracted",
            "standard",
            {
                "max_autotune": True,
                "coordinate_descent_tuning": True,
                "cpp.enable_floating_point_contract_flag": "fast",
            },
            25,
        ),
    )
}


def calmer(name: StrategyName, failures: int) -> StrategyName:
    """The strategy that is left after so many failures of one kernel."""
    for _ in range(failures):
        name = STRATEGIES[name].calmer or name
    return name
