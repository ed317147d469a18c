"""What a loop of the user's own gets back at each epoch's end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What an epoch brought.

    Attributes:
        loss, score: on the validation data; for classes the score is the accuracy.
        why: the reason of the decision.
        seeds: one line for each seed that is in the model.
        events: what happened since the last epoch: stages, gates with their figures, grafts, refusals.
    """

    epoch: int
    training_loss: float
    loss: float
    score: float
    parameters: int
    why: str
    seeds: tuple[str, ...]
    events: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        figures = f"loss {self.loss:.3f}  score {self.score:.3f}  {self.parameters:,} parameters"
        seeds = f"  [{', '.join(self.seeds)}]" if self.seeds else ""
        return f"epoch {self.epoch}: training {self.training_loss:.3f}  {figures}  {self.why}{seeds}"
