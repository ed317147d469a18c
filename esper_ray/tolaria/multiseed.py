"""Several live seeds at once: what each is worth, alone and together, and what they do to parameters that they share.

Credit comes from losses on the same samples with the seeds on and off in combinations. Gradients of shared parameters
are kept apart by seed, by an alias for each: a parameter of its own over the same memory; `combine` makes one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

CreditRule = Literal["leave_one_out", "shapley"]
Off = frozenset[int]
NOBODY: Off = frozenset()


@dataclass(frozen=True, slots=True)
class Worth:
    """A mean over the samples, in nats, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Credit:
    """What live seeds are worth.

    Attributes:
        single: by seed, by the rule that was asked for.
        joint: loss with all of them off less the loss with all on.
        interaction: the sum of each one's worth with the others on, less the joint one. Above 0 they need one another;
            below 0 they do the same thing, and each could go without much harm as long as the others stay.
    """

    single: Mapping[int, Worth]
    joint: Worth
    interaction: Worth


def combinations(seeds: Sequence[int], rule: CreditRule) -> list[Off]:
    """Which seeds to leave out, time and again, besides nobody: each by itself and all, or every combination."""
    if rule == "shapley":
        return [frozenset(c) for size in range(1, len(seeds) + 1) for c in itertools.combinations(seeds, size)]
    alone = [frozenset({seed}) for seed in seeds]
    return alone + ([frozenset(seeds)] if len(seeds) > 1 else [])


def credit(losses: Mapping[Off, Tensor], seeds: Sequence[int], rule: CreditRule) -> Credit:
    """What the losses say.

    Args:
        losses: by who is left out, [N] each, on the same samples; nobody, and all of `combinations`.
    """
    on, everyone = losses[NOBODY], frozenset(seeds)
    alone = {seed: losses[frozenset({seed})] - on for seed in seeds}
    joint = losses[everyone] - on
    single = {seed: _shapley(losses, seed, everyone) for seed in seeds} if rule == "shapley" else alone
    together = torch.stack(list(alone.values())).sum(0) - joint
    return Credit({seed: _worth(each) for seed, each in single.items()}, _worth(joint), _worth(together))


def _shapley(losses: Mapping[Off, Tensor], seed: int, everyone: Off) -> Tensor:
    """A seed's mean contribution over all orders in which the seeds could have come: [N].

    Shapley 1953, "A value for n-person games", equation 13; the game's value is the loss taken off.
    """
    others, n = everyone - {seed}, len(everyone)
    total = torch.zeros_like(losses[NOBODY])
    for size in range(n):
        weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
        for present in itertools.combinations(sorted(others), size):
            off = others - set(present)
            total += weight * (losses[off | {seed}] - losses[off])
    return total


def _worth(each: Tensor) -> Worth:
    return Worth(float(each.mean()), float(each.std()) / math.sqrt(len(each)))


# Gradients


@dataclass(slots=True)
class Conflicts:
    """Pairs of gradients of shared parameters that were looked at, and how many of them pointed apart."""

    pairs: int = 0
    conflicting: int = 0

    def drain(self) -> float | None:
        """The share since the last call; None where nothing is shared."""
        found = self.conflicting / self.pairs if self.pairs else None
        self.pairs = self.conflicting = 0
        return found


def combine(
    gradients: Sequence[Tensor], conflicts: Conflicts, *, generator: torch.Generator, project: bool = True
) -> Tensor:
    """One gradient of several for the same parameter: their sum, where no two of them point apart.

    Gradient surgery (PCGrad): Yu et al. 2020, "Gradient surgery for multi-task learning", algorithm 1. Each gradient
    loses its component against every other one that it conflicts with, in random order.

    Args:
        gradients: of equal shape, at least one.
        project: without it conflicts are counted, and the gradients added up as they are.
    """
    count = len(gradients)
    for a, b in itertools.combinations(gradients, 2):
        conflicts.pairs += 1
        conflicts.conflicting += float((a * b).sum()) < 0.0
    kept = []
    for i, own in enumerate(gradients):
        projected = own
        for j in torch.randperm(count, generator=generator).tolist() if project else ():
            other = gradients[j]
            product = float((projected * other).sum())
            if j != i and product < 0.0:
                projected = projected - product / float(other.square().sum()) * other
        kept.append(projected)
    total = kept[0]
    for projected in kept[1:]:
        total = total + projected
    return total


def weights_by_gain(gains: Mapping[int, float | None]) -> dict[int, float]:
    """Weights of seeds' losses in proportion to what each gains, of mean 1 before they are held within 0.1 and 10.

    A seed whose gain is not known has none, and so has every seed where none of them gains anything.
    """
    known = {seed: max(0.0, gain) for seed, gain in gains.items() if gain is not None and math.isfinite(gain)}
    total = sum(known.values())
    if total == 0.0:
        return {}
    return {seed: min(10.0, max(0.1, gain * len(known) / total)) for seed, gain in known.items()}


def weigh(branches: Mapping[int, nn.Module], weights: Mapping[int, float]) -> None:
    """Scale the gradients of blocks by the weights of their seeds' losses; those that are not named keep theirs."""
    for number, weight in weights.items():
        for parameter in branches[number].parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(weight)


class Shared:
    """The parameters that several seeds of one model share, and each seed's alias of them.

    A seed's block holds its alias where another seed holds the parameter itself, the owner's; the optimizer knows the
    owner's alone. Blocks of the catalogue share nothing, so for these nothing here ever does anything.
    """

    def __init__(self) -> None:
        self.conflicts = Conflicts()
        self._sharers: list[dict[int, nn.Parameter]] = []  # by seed, the owner first

    def __bool__(self) -> bool:
        return bool(self._sharers)

    def adopt(self, number: int, branch: nn.Module, known: Mapping[int, nn.Module]) -> list[nn.Parameter]:
        """The newborn's parameters that no block in ``known`` holds; for the others it gets aliases."""
        holders = {id(p): (seed, p) for seed, other in known.items() for p in other.parameters()}
        tied = [sharers for sharers in self._sharers if number in sharers and next(iter(sharers)) != number]
        aliases = {id(sharers[number]) for sharers in tied}
        own = []
        for parameter in list(branch.parameters()):
            if id(parameter) in aliases:
                continue
            if id(parameter) not in holders:
                own.append(parameter)
                continue
            seed, original = holders[id(parameter)]
            alias = nn.Parameter(original.detach(), requires_grad=original.requires_grad)
            _replace(branch, original, alias)
            self._group_of(seed, original)[number] = alias
        return own

    def _group_of(self, seed: int, parameter: nn.Parameter) -> dict[int, nn.Parameter]:
        for sharers in self._sharers:
            if sharers.get(seed) is parameter:
                return sharers
        self._sharers.append({seed: parameter})
        return self._sharers[-1]

    def save(self, branches: Mapping[int, nn.Module]) -> list[list[tuple[int, str]]]:
        """For each shared parameter who shares it, the owner first, and what each calls it; for `load`."""
        names = {id(p): name for branch in branches.values() for name, p in branch.named_parameters()}
        return [[(seed, names[id(p)]) for seed, p in sharers.items()] for sharers in self._sharers]

    def load(self, rows: Sequence[Sequence[Sequence[Any]]], branches: Mapping[int, nn.Module]) -> None:
        """Tie blocks that were built anew as they were tied; call it before they are adopted."""
        for row in rows:
            (owner, name), *others = ((int(seed), str(called)) for seed, called in row)
            original = branches[owner].get_parameter(name)
            sharers = {owner: original}
            for seed, called in others:
                own = branches[seed].get_parameter(called)
                sharers[seed] = nn.Parameter(original.detach(), requires_grad=original.requires_grad)
                _replace(branches[seed], own, sharers[seed])
            self._sharers.append(sharers)

    def release(self, number: int) -> list[tuple[nn.Parameter, int, nn.Parameter]]:
        """Forget a seed; for each parameter that it owned and others use: that one, the heir, and the heir's own."""
        handed = []
        for sharers in self._sharers:
            owner, gone = next(iter(sharers)), sharers.pop(number, None)
            if gone is not None and owner == number and sharers:
                heir, parameter = next(iter(sharers.items()))
                handed.append((gone, heir, parameter))
        self._sharers = [sharers for sharers in self._sharers if len(sharers) > 1]
        return handed

    def combine(self, *, generator: torch.Generator, project: bool) -> None:
        """Give each owner's parameter the gradient of all its sharers; the aliases lose theirs."""
        for sharers in self._sharers:
            found = [parameter.grad for parameter in sharers.values() if parameter.grad is not None]
            if not found:
                continue
            owner, *aliases = sharers.values()
            owner.grad = combine(found, self.conflicts, generator=generator, project=project)
            for alias in aliases:
                alias.grad = None


def _replace(branch: nn.Module, original: nn.Parameter, alias: nn.Parameter) -> None:
    for module in branch.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is original:
                setattr(module, name, alias)
