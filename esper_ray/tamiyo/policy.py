"""The learned policy: a graph network that decides one micro-step, head by head.

``pi(step) = pi(operation) pi(slot | operation) pi(blueprint | slot) pi(schedule | slot)``, the last two for a
germination only. The slot and blueprint heads are pointers (Vinyals, Fortunato and Jaitly 2015): they score nodes, so
that one policy serves hosts and catalogues of any size. A head that does not apply has the one choice 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_ray.tamiyo import graph
from esper_ray.tamiyo.actions import GERMINATE, HEADS, NO_OP, OPERATIONS, SCHEDULES
from esper_ray.tamiyo.encoder import GraphEncoder, Reading, Tensors
from esper_ray.tamiyo.single import HUGE, Decided, Single, fits, small

RISK_THRESHOLDS = (0.02, 0.05, 0.15, 0.5)
"""Relative rise of the validation loss from boundary to boundary that makes it YELLOW, ORANGE, RED, CRITICAL."""

_EPOCH, _LOSS_RISE = graph.GLOBAL_FEATURES.index("epoch"), graph.GLOBAL_FEATURES.index("loss_rise")

Pick = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GraphPolicyConfig:
    """What the network is built by.

    Attributes:
        width: of all vectors inside.
        heads: of the attention.
        rest: logit of NO_OP at birth, the other operations having 0: a policy that drew its operations evenly would
            cull nearly every seed before it could be judged.
    """

    width: int = 48
    heads: int = 4
    rest: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= self.width <= 1024 or self.width % self.heads:
            raise ValueError(f"a width of {self.width} is not that of {self.heads} heads")


@dataclass(frozen=True, slots=True)
class Acted:
    """What was chosen: actions int64 [N, 4] as `HEADS` orders them, log_probs [N], values [N], head_log_probs [N, 4]
    (0 where a head does not apply), risk [N, 5], the probability of each level at the next boundary."""

    actions: Tensor
    log_probs: Tensor
    values: Tensor
    head_log_probs: Tensor
    risk: Tensor


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the policy makes of given actions: log_probs [N], entropy [N], values [N], head_log_probs [N, 4].

    The entropy is that of the heads along the given actions, each given the choices before it. Over actions drawn
    from the policy its mean is the entropy of the joint distribution.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor
    head_log_probs: Tensor


class GraphPolicy(nn.Module):
    """Decides micro-steps; see the module's text. Initial weights come from torch's global generator."""

    def __init__(self, config: GraphPolicyConfig | None = None) -> None:
        super().__init__()
        self.config = config or GraphPolicyConfig()
        width = self.config.width
        self.encoder = GraphEncoder(width, self.config.heads)
        self.trunk = nn.Linear(3 * width, 2 * width)
        self.operation = nn.Linear(width, len(OPERATIONS))
        self.slot_query = nn.Linear(width, width)
        self.slot_operation = nn.Embedding(len(OPERATIONS), width)
        self.slot_key = nn.Linear(width, width, bias=False)
        self.slot_score = nn.Linear(width, 1, bias=False)
        self.blueprint_query = nn.Linear(2 * width, width)
        self.blueprint_key = nn.Linear(width, width, bias=False)
        self.blueprint_cost = nn.Linear(len(graph.CANDIDATE_FEATURES), width, bias=False)
        self.blueprint_score = nn.Linear(width, 1, bias=False)
        self.schedule = nn.Linear(2 * width, len(SCHEDULES))
        self.outlook = nn.Linear(width, 1 + 1 + len(RISK_THRESHOLDS))
        with torch.no_grad():
            # A policy that has learned nothing has no preferences but to rest.
            for head in (self.operation, self.slot_score, self.blueprint_score, self.schedule, self.outlook):
                head.weight.mul_(0.1)
            for head in (self.operation, self.schedule, self.outlook):
                head.bias.zero_()
            self.operation.bias[NO_OP] = self.config.rest
        self._tables = [part._parameters for part in self.modules() if part._parameters]
        self._single: tuple[tuple[int, ...], Single | None] | None = None

    def act(self, obs: Tensors, *, generator: torch.Generator, greedy: bool = False) -> Acted:
        """Choose for N observations.

        Args:
            generator: all that is drawn comes from it, the same number of draws whatever is chosen.
            greedy: each head's most probable choice; nothing is drawn.
        """
        sizes = (len(OPERATIONS), obs["slots"].shape[1], obs["blueprints"].shape[1], len(SCHEDULES))
        noise = None if greedy else _gumbel((len(obs["global"]), sum(sizes)), generator)
        if small(obs) and not torch.is_grad_enabled():
            single = self.in_numpy()
            if single is not None:
                seen = {name: array[0].numpy() for name, array in obs.items()}
                return _of_one(single.decide(seen, None if noise is None else noise.numpy()[0], {}))
        return self._act(obs, None if noise is None else torch.split(noise, list(sizes), dim=1))

    def decide(
        self,
        seen: Mapping[str, npt.NDArray[Any]],
        *,
        generator: torch.Generator,
        greedy: bool,
        memo: dict[str, npt.NDArray[np.float32]] | None = None,
    ) -> Decided:
        """`act` for one observation as `graph.observe` gives it, with the same draws and without tensors.

        Args:
            memo: one empty dictionary for all micro-steps of one boundary, whose graph is then read once.
        """
        single = self.in_numpy()
        if single is None or not fits(len(seen["layers"]), len(seen["slots"]), len(seen["blueprints"])):
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(array).unsqueeze(0) for name, array in seen.items()}
                return _one_of(self.act(tensors, generator=generator, greedy=greedy))
        size = len(OPERATIONS) + len(seen["slots"]) + len(seen["blueprints"]) + len(SCHEDULES)
        noise = None if greedy else _gumbel((1, size), generator).numpy()[0]
        return single.decide(seen, noise, {} if memo is None else memo)

    def _act(self, obs: Tensors, noise: Sequence[Tensor] | None) -> Acted:
        def pick(place: int, log_probs: Tensor) -> Tensor:
            return _largest(log_probs if noise is None else log_probs + noise[place].to(log_probs), log_probs)

        actions, heads, outlook, _ = self._walk(self.encoder(obs), obs, pick)
        chosen = torch.stack(actions, dim=1)
        of_heads = _of_choices(heads, actions)
        return Acted(chosen, of_heads.sum(1), outlook[:, 0], of_heads, outlook[:, 1:].softmax(1))

    def evaluate(self, obs: Tensors, actions: Tensor) -> Evaluated:
        """Of actions int64 [N, 4]; one that is illegal has the log-probability minus infinity."""
        given = actions.long().unbind(1)
        _, heads, outlook, entropy = self._walk(self.encoder(obs), obs, lambda place, _: given[place])
        of_heads = _of_choices(heads, given)
        return Evaluated(of_heads.sum(1), entropy, outlook[:, 0], of_heads)

    def auxiliary_loss(self, obs: Tensors, done: Tensor) -> Tensor:
        """The risk head's cross-entropy: what the validation loss will have done by the next boundary.

        A step counts where the next observation is of a later boundary of the same episode: its "epoch" is greater.
        Its "loss_rise" is then put into the five levels by `RISK_THRESHOLDS`.

        Args:
            obs: arrays [T, B, ...].
            done: bool [T, B], whether the episode ended with that step.
        """
        run = obs["global"]
        counts = (run[1:, :, _EPOCH] > run[:-1, :, _EPOCH]) & ~done[:-1].bool()
        if not bool(counts.any()):
            return run.new_zeros(())
        now = {name: array[:-1][counts] for name, array in obs.items()}
        edges = torch.tensor(RISK_THRESHOLDS, dtype=run.dtype, device=run.device)
        level = torch.bucketize(run[1:][counts][:, _LOSS_RISE].contiguous(), edges, right=True)
        _, outlook = self._trunk(self.encoder(now))
        return functional.cross_entropy(outlook[:, 1:], level)

    def in_numpy(self) -> Single | None:
        """The weights for numpy, made anew when a tensor was replaced; None where they are not in main memory."""
        places = tuple([each.data_ptr() for table in self._tables for each in table.values() if each is not None])
        if self._single is None or self._single[0] != places:
            weight = self.trunk.weight
            fits = weight.device.type == "cpu" and weight.dtype == torch.float32
            self._single = places, Single(self) if fits else None
        return self._single[1]

    def __getstate__(self) -> dict[str, object]:
        # A copy has other tensors.
        return {**self.__dict__, "_single": None}

    def _trunk(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """The vector that the heads decide by [N, D], and the outlook [N, 6]: value, and logits of the risk."""
        deciding, judging = functional.relu(self.trunk(reading.whole)).chunk(2, dim=1)
        return deciding, self.outlook(judging)

    def _walk(self, reading: Reading, obs: Tensors, pick: Pick) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Go through the heads in their order: the choices, all log-probabilities, the outlook, the entropy [N]."""
        deciding, outlook = self._trunk(reading)
        each = torch.arange(len(deciding), device=deciding.device)
        legal = obs["mask_blueprint"] != 0
        slots = obs["mask_slot"] != 0
        slots = torch.cat([slots[:, :GERMINATE], (slots[:, GERMINATE] & legal.any(2)).unsqueeze(1), slots[:, 2:]], 1)
        operations = (obs["mask_operation"] != 0) & slots.any(2)
        operations = torch.cat([torch.ones_like(operations[:, :1]), operations[:, 1:]], 1)

        heads = [masked_log_probs(self.operation(deciding), operations)]
        actions = [pick(0, heads[0])]
        operation = actions[0]
        heads.append(masked_log_probs(*self._slots(reading, deciding, operation, slots[each, operation])))
        actions.append(pick(1, heads[1]))
        slot, germinates = actions[1], (operation == GERMINATE).unsqueeze(1)
        # What was decided so far, and where: blueprint and schedule depend on it.
        context = torch.cat([deciding, reading.slots[each, slot]], dim=1)
        costs = obs["candidates"][each, slot].to(deciding.dtype)
        keys = self.blueprint_key(reading.blueprints) + self.blueprint_cost(costs)
        scores = self.blueprint_score(functional.relu(keys + self.blueprint_query(context).unsqueeze(1))).squeeze(2)
        heads.append(masked_log_probs(scores, _only_if(germinates, legal[each, slot])))
        actions.append(pick(2, heads[2]))
        schedules = self.schedule(context)
        heads.append(masked_log_probs(schedules, _only_if(germinates, torch.ones_like(schedules, dtype=torch.bool))))
        actions.append(pick(3, heads[3]))
        return actions, heads, outlook, sum((_entropy(each) for each in heads), outlook.new_zeros(()))

    def _slots(self, reading: Reading, deciding: Tensor, operation: Tensor, legal: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and mask of the slot head [N, S], given the operation."""
        query = self.slot_query(deciding) + self.slot_operation(operation)
        scores = self.slot_score(functional.relu(self.slot_key(reading.slots) + query.unsqueeze(1))).squeeze(2)
        return scores, _only_if((operation != NO_OP).unsqueeze(1), legal)


def masked_log_probs(logits: Tensor, legal: Tensor) -> Tensor:
    """Log-softmax over what is legal; minus infinity, so a probability of exactly 0, elsewhere.

    Args:
        logits: [N, K]; beyond +-1e30 they count as that, so that differences stay finite.
        legal: bool [N, K], with something legal in each row.
    """
    bounded = logits.clamp(-HUGE, HUGE)
    return functional.log_softmax(bounded.masked_fill(~legal, -torch.inf), dim=1)


def _only_if(applies: Tensor, legal: Tensor) -> Tensor:
    """``legal`` where the head applies [N, 1], else only choice 0: its log-probability is then exactly 0.

    Nothing at all is legal only after a choice that was not, whose log-probability says so already.
    """
    first = torch.zeros_like(legal[:1])
    first[:, 0] = True
    return torch.where(applies & legal.any(1, keepdim=True), legal, first)


def _largest(scores: Tensor, log_probs: Tensor) -> Tensor:
    """[N], the legal choice of the largest score, also where scores are not finite."""
    return scores.masked_fill(log_probs == -torch.inf, -torch.inf).argmax(1)


def _gumbel(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: the largest of log-probabilities plus it is a draw from them."""
    drawn = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    # A draw of 0 would make the noise infinite.
    return drawn.clamp_min_(1e-30).log_().neg_()


def _of_one(decided: Decided) -> Acted:
    heads = torch.from_numpy(np.array([decided.log_probs], np.float32))
    return Acted(
        actions=torch.from_numpy(np.array([decided.actions])),
        log_probs=heads.sum(1),
        values=torch.from_numpy(np.array([decided.value], np.float32)),
        head_log_probs=heads,
        risk=torch.from_numpy(decided.risk[None]).softmax(1),
    )


def _one_of(acted: Acted) -> Decided:
    return Decided(
        actions=acted.actions[0].tolist(),
        log_probs=acted.head_log_probs[0].tolist(),
        value=float(acted.values[0]),
        risk=acted.risk[0].log().numpy(),
    )


def _of_choices(heads: list[Tensor], actions: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """[N, 4], the log-probability of what each head chose."""
    assert len(heads) == len(HEADS)
    return torch.cat([head.gather(1, one.unsqueeze(1)) for head, one in zip(heads, actions, strict=True)], dim=1)


def _entropy(log_probs: Tensor) -> Tensor:
    """[N]; what is illegal adds nothing."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(1)
