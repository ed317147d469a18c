"""Who decides a boundary, micro-step by micro-step: a scripted controller, one that also explores, or a policy.

Each gives the steps it took, the closing NO_OP included, with the probabilities it had: that is what Simic learns
from. Every draw is named by (run seed, branch, epoch, place).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from esper_ray.config import TamiyoConfig
from esper_ray.contracts.budgets import MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.enums import RiskLevel
from esper_ray.contracts.messages import DecisionRecord, HeadDecision
from esper_ray.errors import PolicyRefused
from esper_ray.reliability.ids import derive_seed
from esper_ray.tamiyo import actions, graph
from esper_ray.tamiyo.actions import CULL, FOSSILIZE, GERMINATE, HEADS, NO_OP, SCHEDULES, Choice, Masks
from esper_ray.tamiyo.graph import Observation
from esper_ray.tamiyo.view import Proposal, RunView

if TYPE_CHECKING:
    from esper_ray.tamiyo.policy import GraphPolicy

_APPLYING = {NO_OP: 1, CULL: 2, FOSSILIZE: 2, GERMINATE: 4}


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-step: what was chosen, with which probability for each head that applied, and on what grounds."""

    choice: Choice
    proposal: Proposal | None
    log_probs: tuple[float, ...]
    masks: Masks
    observation: Observation
    value: float = 0.0
    exploration: float = 0.0

    def record(self, *, command_id: int, version: str, view: RunView, digest: str, place: int) -> DecisionRecord:
        """The step as Simic gets it."""
        legal = (
            self.masks.operation,
            self.masks.slot[self.choice.operation],
            self.masks.blueprint[self.choice.slot],
            np.ones(len(SCHEDULES), np.int8),
        )
        heads = tuple(
            HeadDecision(name, index, log_prob, tuple(mask.astype(bool).tolist()))
            for name, index, log_prob, mask in zip(HEADS, self.choice.indices, self.log_probs, legal, strict=False)
        )
        return DecisionRecord(
            command_id=command_id,
            policy_version=version,
            run=view.opening.run,
            epoch=view.now.epoch,
            branch=view.now.branch,
            observation_digest=digest,
            heads=heads,
            value=self.value,
            exploration=self.exploration,
            place=place,
        )


class Brain(Protocol):
    """Who decides. ``version`` is a policy's id or a controller's name."""

    version: str

    def steps(self, view: RunView) -> list[Step]:
        """Decide the boundary of ``view.now``."""
        ...


def heads_that_apply(operation: int) -> int:
    """How many heads, from the first, an operation uses."""
    return _APPLYING[operation]


class ScriptedBrain:
    """A controller of `tamiyo.heuristic`, which with probability ``config.exploration`` is replaced by a uniform draw.

    The draw is uniform over the legal operations, then slots, then blueprints, then schedules, and the recorded
    probabilities are those of the mixture of both: exact behaviour probabilities, as off-policy learning needs them.
    """

    def __init__(self, name: str, controller: Callable[[RunView, TamiyoConfig], list[Proposal]]) -> None:
        self.version, self._controller = name, controller

    def steps(self, view: RunView) -> list[Step]:
        share = view.config.exploration
        wanted = self._controller(view, view.config)
        taken: list[Proposal] = []
        steps: list[Step] = []
        while len(taken) < MAX_COMMANDS_PER_BOUNDARY:
            step = self._step(view, wanted, taken, share)
            steps.append(step)
            if step.proposal is None:
                break
            taken.append(step.proposal)
        return steps

    def _step(self, view: RunView, wanted: Sequence[Proposal], taken: Sequence[Proposal], share: float) -> Step:
        observation = graph.observe(view, taken)
        legal = _masks_of(observation)
        busy = {proposal.slot for proposal in taken}
        options = (proposal for proposal in wanted if proposal.slot not in busy)
        scripted = next((each for each in options if legal.allows(actions.to_choice(each, view))), None)
        own = actions.to_choice(scripted, view)
        choice, proposal = own, scripted
        draw = random.Random(_seed(view, "exploration", len(taken)))
        if share > 0.0 and draw.random() < share:
            choice = _uniform(legal, draw)
            if choice != own:
                proposal = actions.to_proposal(choice, view, f"explores, probability {share:g}")
        return Step(choice, proposal, mixture_log_probs(choice, own, legal, share), legal, observation, 0.0, share)


class LearnedBrain:
    """A graph policy. Greedy, or drawing with its own probabilities.

    Raises:
        PolicyRefused: on deciding, when what comes out is not legal or not finite.
    """

    def __init__(self, policy: GraphPolicy, version: str) -> None:
        self._policy, self.version = policy, version

    def warm_up(self) -> None:
        """Pass over an empty graph once: the first pass of a new network takes several times longer than the others."""
        import torch

        shapes = graph.shapes(graph.Layout(layers=1, slots=1, blueprints=1, edges=1))
        empty: Observation = {name: np.zeros(shape, kind) for name, (shape, kind, _, _) in shapes.items()}
        self._policy.decide(empty, generator=torch.Generator(), greedy=False)

    def steps(self, view: RunView) -> list[Step]:
        taken: list[Proposal] = []
        steps: list[Step] = []
        memo: dict[str, graph.Floats] = {}
        while len(taken) < MAX_COMMANDS_PER_BOUNDARY:
            step = self._step(view, taken, memo)
            steps.append(step)
            if step.proposal is None:
                break
            taken.append(step.proposal)
        return steps

    def _step(self, view: RunView, taken: Sequence[Proposal], memo: dict[str, graph.Floats]) -> Step:
        import torch

        observation = graph.observe(view, taken)
        generator = torch.Generator().manual_seed(_seed(view, "policy", len(taken)))
        greedy = view.config.greedy
        decided = self._policy.decide(observation, generator=generator, greedy=greedy, memo=memo)
        choice, legal = Choice(*decided.actions), _masks_of(observation)
        log_probs = tuple(decided.log_probs[: _APPLYING[choice.operation]])
        risk = RiskLevel(1 + int(decided.risk.argmax())).name
        value, chance = decided.value, 100.0 * math.exp(sum(log_probs))
        if not legal.allows(choice) or not math.isfinite(value + chance):
            raise PolicyRefused(
                f"The policy {self.version} was refused.",
                why=f"In epoch {view.now.epoch} of {view.opening.run} its decision was {choice.indices}, with the "
                f"value {value:g}: not legal, or not finite.",
                remedy="Go back with `esper policy rollback`, and train it again.",
                reason="illegal",
            )
        proposal = actions.to_proposal(choice, view, f"policy: {chance:.0f} %, value {value:.3f}, {risk}")
        return Step(choice, proposal, log_probs, legal, observation, value, 0.0 if greedy else 1.0)


def mixture_log_probs(choice: Choice, own: Choice, legal: Masks, share: float) -> tuple[float, ...]:
    """Log-probability of each head that applies, under ``(1 - share) * [own] + share * uniform``.

    Head k's is that of agreeing with ``choice`` up to head k, given agreement up to k - 1.
    """
    found, before, uniform, same = [], 1.0, 1.0, True
    for place in range(_APPLYING[choice.operation]):
        same = same and choice.indices[place] == own.indices[place]
        uniform /= _count(legal, choice, place)
        now = (1.0 - share) * same + share * uniform
        found.append(math.log(now / before))
        before = now
    return tuple(found)


def _count(legal: Masks, choice: Choice, place: int) -> int:
    tables = (legal.operation, legal.slot[choice.operation], legal.blueprint[choice.slot])
    return int(tables[place].sum()) if place < len(tables) else len(SCHEDULES)


def _uniform(legal: Masks, draw: random.Random) -> Choice:
    operation = draw.choice(np.flatnonzero(legal.operation).tolist())
    if operation == NO_OP:
        return Choice()
    slot = draw.choice(np.flatnonzero(legal.slot[operation]).tolist())
    if operation != GERMINATE:
        return Choice(operation, slot)
    return Choice(
        operation, slot, draw.choice(np.flatnonzero(legal.blueprint[slot]).tolist()), draw.randrange(len(SCHEDULES))
    )


def _masks_of(observation: Observation) -> Masks:
    return Masks(observation["mask_operation"], observation["mask_slot"], observation["mask_blueprint"])


def _seed(view: RunView, purpose: str, place: int) -> int:
    return derive_seed(view.opening.seed, purpose, view.now.branch, view.now.epoch, place)
