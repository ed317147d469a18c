"""One circuit breaker for each blueprint whose seeds broke isolation: while it is open, no more of them are sown.

Their clock counts epochs, so that a resumed run opens and closes them where it did before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.kasmina.lifecycle import GROWING, LIVE
from esper_ray.reliability.breaker import Breaker

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden


class EpochClock:
    """Time in epochs of one garden, for what must not depend on how fast the machine is."""

    def __init__(self, garden: Garden) -> None:
        self._garden = garden

    def now_ns(self) -> int:
        return self._garden.epoch * 1_000_000_000

    def monotonic(self) -> float:
        return float(self._garden.epoch)


class Breakers:
    """By blueprint; one that never opened is not there."""

    def __init__(self, garden: Garden) -> None:
        self._garden = garden
        self._by_blueprint: dict[str, Breaker] = {}

    def open(self, blueprint: str) -> None:
        """A seed of that blueprint broke isolation."""
        self._made(blueprint).failure()

    def refusal(self, blueprint: str) -> str:
        """Why no seed of that blueprint may be sown now; empty where one may. Half open, it lets one through."""
        breaker = self._by_blueprint.get(blueprint)
        if breaker is None or breaker.allow():
            return ""
        return f"its breaker is {breaker.state.name.lower().replace('_', ' ')}: its seeds broke isolation"

    def settle(self) -> None:
        """At an epoch's end: the one that was let through is out of isolation, or gone."""
        for blueprint, breaker in self._by_blueprint.items():
            if breaker.state is not CircuitBreakerState.HALF_OPEN:
                continue
            stages = {seed.stage for seed in self._garden.seeds if seed.spec.blueprint == blueprint}
            if stages & LIVE:
                breaker.success()
            elif not stages & GROWING:
                breaker.failure()

    def save(self) -> dict[str, Any]:
        return {blueprint: breaker.save() for blueprint, breaker in self._by_blueprint.items()}

    def load(self, data: Mapping[str, Any]) -> None:
        self._by_blueprint.clear()
        for blueprint, saved in data.items():
            self._made(blueprint).load(saved)

    def _made(self, blueprint: str) -> Breaker:
        if blueprint not in self._by_blueprint:
            self._by_blueprint[blueprint] = Breaker(
                f"isolation {blueprint}",
                failures=1,
                open_seconds=self._garden.config.embargo_epochs,
                clock=EpochClock(self._garden),
                on_change=self._changed,
            )
        return self._by_blueprint[blueprint]

    def _changed(self, name: str, state: CircuitBreakerState) -> None:
        self._garden.note("breaker", breaker=name, state=state.name, value=int(state))
