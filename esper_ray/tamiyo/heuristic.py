"""The heuristic and the controls: pure functions from a run's view to proposals.

The heuristic grows when the validation loss has surely stopped falling fast, or when the host still underfits at the
end of the time in which growing is cheap; it puts the strongest block that the budget allows into every free slot,
keeps what measurably helps and removes what does not.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from esper_ray.config import TamiyoConfig
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import SeedState
from esper_ray.contracts.ports import Candidate
from esper_ray.reliability.ids import derive_seed
from esper_ray.tamiyo.view import Proposal, RunView

# One-sided 95 % quantiles of Student's t by degrees of freedom (1 to 10; beyond, the normal's).
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)


_REMOVED = (Stage.CULLED, Stage.EMBARGOED)


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through the logarithm of losses: ``rate`` is the share lost per epoch, ``highest`` its bound."""

    rate: float
    highest: float


def trend(losses: Sequence[float]) -> Trend:
    """Least squares over at least 3 losses, with the one-sided 95 % upper bound of the rate of fall."""
    n = len(losses)
    logs = [math.log(max(loss, 1e-12)) for loss in losses]
    middle, mean = (n - 1) / 2, sum(logs) / n
    spread = sum((x - middle) ** 2 for x in range(n))
    slope = sum((x - middle) * (y - mean) for x, y in enumerate(logs)) / spread
    residual = sum((y - mean - slope * (x - middle)) ** 2 for x, y in enumerate(logs))
    error = math.sqrt(residual / (n - 2) / spread)
    quantile = _T95[n - 3] if n - 3 < len(_T95) else 1.645
    return Trend(-slope, -slope + quantile * error)


def strongest(candidates: Sequence[Candidate], budget: int) -> Candidate | None:
    """The block with the most computation within the budget of parameters.

    No cheap proxy is known to beat size consistently (ZiCo: Li et al. 2023), so size it is.
    """
    fitting = [candidate for candidate in candidates if candidate.parameters <= budget and candidate.flops > 0]
    return max(fitting, key=lambda each: (each.flops, each.parameters, -each.blueprint), default=None)


def heuristic(view: RunView, config: TamiyoConfig) -> list[Proposal]:
    """Cull what harms, fossilise what helps, grow where the host has flattened out."""
    proposals = [proposal for seed in view.seeds() if (proposal := _keep_or_cull(view, config, seed))]
    return proposals + _grow(view, config, config.seeds_at_once - len(proposals))


def _keep_or_cull(view: RunView, config: TamiyoConfig, seed: SeedState) -> Proposal | None:
    gain, error = seed.metrics.get("g"), seed.metrics.get("ge")
    if seed.stage is not Stage.PROBATIONARY or gain is None or error is None or not view.watched(seed):
        return None
    if gain > error:
        why = f"gain {gain:.4f} > its error {error:.4f}"
        return Proposal(SeedOperation.FOSSILIZE, seed.slot, why, seed.seed, seed.blueprint)
    if gain < -config.cull_errors * error:
        why = f"gain {gain:.4f} < minus {config.cull_errors:g} times its error {error:.4f}"
        return Proposal(SeedOperation.CULL, seed.slot, why, seed.seed, seed.blueprint)
    return None


def _grow(view: RunView, config: TamiyoConfig, places: int) -> list[Proposal]:
    if view.now.epoch < config.warmup_epochs or len(view.states) < config.window or _too_late(view, config):
        return []
    if config.give_up_after and in_vain(view) >= config.give_up_after:
        return []
    why = _flattened(view, config) or _underfitting(view, config)
    return _germinate(view, config, why, view.dormant_slots()[: max(0, places)]) if why else []


def in_vain(view: RunView) -> int:
    """How many seeds were removed since the last one that stayed: growing no longer pays when it is many."""
    removed = 0
    for before, after in itertools.pairwise(view.states):
        earlier = {seed.slot: seed.stage for seed in before.seeds}
        for seed in after.seeds:
            was = earlier.get(seed.slot, Stage.DORMANT)
            if seed.stage is Stage.FOSSILIZED and was is not Stage.FOSSILIZED:
                removed = 0
            elif seed.stage in _REMOVED and was not in _REMOVED:
                removed += 1
    return removed


def _flattened(view: RunView, config: TamiyoConfig) -> str:
    """The validation loss has surely stopped falling fast: the host has learned most of what it can.

    Who has hardly begun falls slowly, too, and that is no plateau.
    """
    losses = [state.validation_loss for state in view.states]
    if config.onset and losses[-1] > (1.0 - config.onset) * losses[0]:
        return ""
    fall = trend(losses[-config.window :])
    if fall.highest >= config.plateau_rate:
        return ""
    return (
        f"loss falls {100 * fall.rate:.0f}%/epoch, at most {100 * fall.highest:.0f} < {100 * config.plateau_rate:.0f}"
    )


def _underfitting(view: RunView, config: TamiyoConfig) -> str:
    """The share of the run in which growing is still cheap runs out, and the host does not even fit its own data."""
    now = view.now
    gap = 1.0 - now.training_loss / max(now.validation_loss, 1e-12)
    if now.epoch < config.grow_by * view.opening.epochs or gap >= config.underfit_gap:
        return ""
    return (
        f"underfits at {100 * now.epoch / view.opening.epochs:.0f}% of the run: gap {gap:.2f} < {config.underfit_gap:g}"
    )


def _germinate(view: RunView, config: TamiyoConfig, why: str, slots: Sequence[object]) -> list[Proposal]:
    if view.conservative:
        return []
    room = view.opening.max_parameters - int(view.now.metrics.get("pc", view.opening.host_parameters))
    work = view.work_left()
    proposals = []
    for slot in view.dormant_slots():
        if slot not in slots:
            continue
        # What a rollback took back is not tried there again.
        fresh = [each for each in view.candidates(slot.index) if (slot.index, each.blueprint) not in view.undone]
        choice = strongest([each for each in fresh if each.flops <= work], min(config.parameter_budget, room))
        if choice is not None:
            room, work = room - choice.parameters, work - choice.flops
            proposals.append(Proposal(SeedOperation.GERMINATE, slot.index, why, blueprint=choice.blueprint))
    return proposals


def _too_late(view: RunView, config: TamiyoConfig) -> bool:
    return view.now.epoch > config.latest_growth * view.opening.epochs


def never(view: RunView, config: TamiyoConfig) -> list[Proposal]:  # noqa: ARG001
    """The control that leaves the host alone."""
    return []


def _tend(view: RunView, config: TamiyoConfig) -> list[Proposal]:
    return [proposal for seed in view.seeds() if (proposal := _keep_or_cull(view, config, seed))]


def at_random(view: RunView, config: TamiyoConfig) -> list[Proposal]:
    """The control that grows a random block in a random slot at random times."""
    proposals = _tend(view, config)
    draw = random.Random(derive_seed(view.opening.seed, "random control", view.now.branch, view.now.epoch))
    slots = view.dormant_slots()
    if not slots or view.conservative or _too_late(view, config) or draw.random() >= config.probability:
        return proposals
    slot = draw.choice(slots)
    fitting = [each for each in view.candidates(slot.index) if each.parameters <= config.parameter_budget]
    if not fitting:
        return proposals
    why = f"a draw below {config.probability:g}"
    return [
        *proposals,
        Proposal(SeedOperation.GERMINATE, slot.index, why, blueprint=draw.choice(fitting).blueprint),
    ]


def periodic(view: RunView, config: TamiyoConfig) -> list[Proposal]:
    """The control that grows the strongest block in the next free slot at fixed intervals."""
    proposals = _tend(view, config)
    if _too_late(view, config) or view.now.epoch % config.period:
        return proposals
    why = f"epoch {view.now.epoch} is a multiple of {config.period}"
    return proposals + _germinate(view, config, why, view.dormant_slots()[:1])


CONTROLLERS: Mapping[str, Callable[[RunView, TamiyoConfig], list[Proposal]]] = {
    "heuristic": heuristic,
    "never": never,
    "random": at_random,
    "periodic": periodic,
}
