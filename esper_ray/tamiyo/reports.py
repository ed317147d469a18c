"""Field reports: what each germination led to, measured over an observation window.

The window opens when the seed is fully in the path and closes after the configured number of boundaries, or when
the seed's fate is decided. The outcome comes from the counterfactual gain, never from before against after.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from esper_ray.contracts.enums import FieldReportOutcome as Outcome
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import FieldReport, SystemState
from esper_ray.reliability.ids import derive_seed

_OBSERVED = (Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED)


@dataclass(slots=True)
class Observation:
    """One germination under observation."""

    command_id: int
    slot: int
    blueprint: int
    epoch: int
    policy_version: str
    seed: int = 0
    void: bool = False
    gains: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def watch(self, state: SystemState, window: int) -> tuple[Outcome, str] | None:
        """Take in one state; the outcome when the window closes with it."""
        found = next((seed for seed in state.seeds if seed.slot == self.slot), None)
        if found is None and self.seed == 0:
            # The slot sleeps: the command came too late or was refused, and there is nothing to report on.
            self.void = state.epoch > self.epoch
            return None
        if found is None or found.seed == 0:
            return self._outcome("removed from its slot")
        self.seed = found.seed
        if "g" in found.metrics and found.stage in _OBSERVED:
            self.gains.append(found.metrics["g"])
            self.errors.append(found.metrics["ge"])
        if found.stage is Stage.FOSSILIZED or len(self.gains) >= window:
            return self._outcome(f"stage {found.stage.name}")
        return None

    def close(self) -> tuple[Outcome, str]:
        """The run is over."""
        return self._outcome("the run ended")

    def undo(self) -> tuple[Outcome, str]:
        """A rollback took the decision back."""
        return Outcome.ABORTED, "undone by a rollback"

    def _outcome(self, notes: str) -> tuple[Outcome, str]:
        if not self.gains:
            return Outcome.ABORTED, notes
        gain, error = self.gains[-1], self.errors[-1]
        if gain > error:
            return Outcome.SUCCESS, notes
        return (Outcome.REGRESSION if gain < -error else Outcome.NEUTRAL), notes

    def report(self, run: str, outcome: Outcome, notes: str, now_ns: int) -> FieldReport:
        metrics = {"g": self.gains[-1], "ge": self.errors[-1]} if self.gains else {}
        return FieldReport(
            report_id=derive_seed(run, "report", self.command_id),
            command_id=self.command_id,
            run=run,
            seed=self.seed,
            slot=self.slot,
            blueprint=self.blueprint,
            outcome=outcome,
            metrics=metrics,
            window_epochs=len(self.gains),
            issued_at_ns=now_ns,
            policy_version=self.policy_version,
            notes=notes,
        )
