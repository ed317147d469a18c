"""The monitor of isolation: looks on at sampled steps, names each leak, and says whom it blames.

In the isolated stage it repeats the model's own pass without the seeds, from the same generators and buffers, and
compares the host's gradients; and it looks at all that a seed could share with the host or write in it. While a seed
is live it looks whether a gradient could reach the host through the seed's path. It never writes in the host itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from esper_ray.kasmina import leaks
from esper_ray.kasmina.isolation import LossFunction
from esper_ray.kasmina.leaks import Finding, Leak, Values
from esper_ray.kasmina.randomness import Randomness, differing
from esper_ray.kasmina.slot import Pass, Seed, Switch
from esper_ray.kasmina.witness import Seen

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden

# A difference counts as one where it is as many times the noise of the pass itself.
_NOISE = 8.0
# Gradients whose cosine lacks no more than this of 1 point the same way.
_PARALLEL = 1e-9


@dataclass(frozen=True, slots=True)
class Reading:
    """Host gradients with the seeds against without: 1, 0 and 1 where isolation is exact.

    Attributes:
        cosine: between the two.
        difference: norm of the difference over the norm without.
        ratio: norm with over norm without.
    """

    cosine: float = 1.0
    difference: float = 0.0
    ratio: float = 1.0

    def clean(self, tolerance: float) -> bool:
        return math.isfinite(self.difference) and self.difference <= tolerance


def compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Reading:
    """Two lists of gradients against each other, summed in double precision."""
    difference = product = without = with_seeds = 0.0
    for a, b in zip(expected, found, strict=True):
        a, b = a.double(), b.double()
        difference += float((a - b).square().sum())
        product += float((a * b).sum())
        without += float(a.square().sum())
        with_seeds += float(b.square().sum())
    scale = math.sqrt(without) or 1.0
    norms = math.sqrt(without) * math.sqrt(with_seeds)
    ratio = math.sqrt(with_seeds) / scale if without else 1.0
    return Reading(product / norms if norms else 1.0, math.sqrt(difference) / scale, ratio)


class Rescaled(Exception):
    """The host's gradients are those of its loss, and somebody has changed all of them; the text says how."""


def rescaled(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """How gradients were changed as clipping changes them: "multiplied by F", "cut off at C"; or an empty text."""
    factors, pairs = [], [(a.double().flatten(), b.double().flatten()) for a, b in zip(expected, found, strict=True)]
    for a, b in pairs:
        norms = float(a.norm()), float(b.norm())
        if norms[0] and float(a @ b) < (1.0 - _PARALLEL) * norms[0] * norms[1]:
            break
        factors.append(norms[1] / norms[0] if norms[0] else 1.0)
    else:
        if factors and (max(factors) - min(factors) <= 1e-4 * max(factors) or max(factors) <= 1.0 + 1e-4):
            return f"multiplied by {min(factors):.3g}" + (" and more" if max(factors) > 1.01 * min(factors) else "")
    limit = max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    cut = limit > 0.0 and all(torch.allclose(a.clamp(-limit, limit), b, rtol=1e-5, atol=0.0) for a, b in pairs)
    return f"cut off at {limit:.3g}" if cut else ""


class Monitor:
    """Looks on at one garden; `IsolatedTraining` says when."""

    def __init__(self, garden: Garden, randomness: Randomness) -> None:
        self._garden, self.randomness = garden, randomness
        # Kept with the hooks themselves, so that no id is used again.
        self._known_hooks: dict[int, Any] = {}
        self.note_hooks()

    def note_hooks(self) -> None:
        """The hooks that the host has now belong to its user; those that come while a seed is isolated do not."""
        hooks = (hook for _, found in leaks.hooks_of(self._garden.model) for hook in found.values())
        self._known_hooks = {id(hook): hook for hook in hooks}

    def standing(self, seed: Seed) -> list[Finding]:
        """Leaks that are there without any pass: what the seed shares with the host, and the optimizer's groups."""
        model = self._garden.model
        found = [*leaks.shared_tensors(seed, model), *leaks.shared_generators(seed, model)]
        found += [
            Finding(Leak.OPTIMIZER_GROUP, "the host's group" if group == 0 else f"group {group}", seed.number)
            for group in self._garden.trainer.foreign_groups(seed)
        ]
        return found

    @contextlib.contextmanager
    def without_foreign_hooks(self) -> Iterator[list[str]]:
        """Inside, hooks that came since the seeds did are away; gives the names of what they hang on."""
        foreign = leaks.foreign_hooks(self._garden.model, self._known_hooks)
        kept = {id(hooks): (hooks, dict(hooks)) for _, hooks, _ in foreign}
        for _, hooks, key in foreign:
            del hooks[key]
        try:
            yield list(dict.fromkeys(name for name, _, _ in foreign))
        finally:
            for hooks, before in kept.values():
                hooks.clear()
                hooks.update(before)


class Probe:
    """Sits on both sides of each branch during a pass, and sees what goes in, what comes out, and what is written.

    Args:
        shared: parameters through which gradients may flow in this pass, beside each seed's own.
        host: nodes of the graph of the host's own pass, where they are known already.
    """

    def __init__(
        self, garden: Garden, seeds: Sequence[Seed], kind: Pass, randomness: Randomness,
        *, shared: Sequence[Tensor] = (), host: set[Any] | None = None,
    ) -> None:  # fmt: skip
        self._garden, self._seeds, self._kind, self._randomness = garden, seeds, kind, randomness
        self._shared, self._host = list(shared), host
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in garden.model.named_parameters()}
        self._values = Values(garden.model, randomness)
        self._handles: list[RemovableHandle] = []
        self._at: dict[int, Tensor] = {}
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        self._found: dict[Finding, None] = {}
        self.looked = False
        for seed in seeds:
            assert seed.branch is not None
            self._watch(seed, seed.branch, garden.model.get_submodule(garden.slots[seed.slot].info.name))

    def _watch(self, seed: Seed, branch: nn.Module, module: nn.Module) -> None:
        def arrive(_: nn.Module, __: Any, h: Tensor) -> None:
            self._at[seed.number] = h

        def enter(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self._looking():
                self._enter(seed, arguments[0])

        def leave(_: nn.Module, __: Any, output: Tensor) -> None:
            if self._looking():
                self._leave(seed, output)

        self._handles += [
            branch.register_forward_pre_hook(enter, prepend=True),
            branch.register_forward_hook(leave),
        ]
        if not self._garden.isolated.blind:
            self._handles.append(module.register_forward_hook(arrive, prepend=True))

    def _looking(self) -> bool:
        switch: Switch = self._garden.switch
        return switch.current is self._kind and torch.is_grad_enabled() and not switch.gauge.looking

    def _enter(self, seed: Seed, h: Tensor) -> None:
        self.looked = True
        self._values.renew()
        self._entered[seed.number] = (h, h.detach().clone())
        allowed = {*self._shared, *self._own(seed)}
        entering = leaks.reached(h, allowed, set(), self._names, seed.number)
        if entering:
            where = f"the host's {entering[0].where.rpartition(' ')[2]} would learn through the seed's input"
            self._found[Finding(Leak.MISSING_DETACH, where, seed.number)] = None

    def _leave(self, seed: Seed, output: Tensor) -> None:
        h, before = self._entered.pop(seed.number)
        if not leaks.same(before, h.detach()):
            self._found[Finding(Leak.WRITING_HOOK, "the slot's own output was written", seed.number)] = None
        self._found.update(dict.fromkeys(self._values.changes(seed.number)))
        if h.requires_grad and any(finding.kind is Leak.MISSING_DETACH for finding in self._found):
            return  # what leaves carries what entered: told already
        host = leaks.graph_of(self._at.get(seed.number)) if self._host is None else self._host
        allowed = {*self._shared, *self._own(seed)}
        self._found.update(dict.fromkeys(leaks.reached(output, allowed, host, self._names, seed.number)))

    @staticmethod
    def _own(seed: Seed) -> list[Tensor]:
        assert seed.branch is not None
        return list(seed.branch.parameters())

    def close(self) -> list[Finding]:
        """Stop looking; returns what was found."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return list(self._found)


def reference(
    garden: Garden, seen: Seen, targets: Tensor, loss_function: LossFunction, randomness: Randomness
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The host's gradients on this batch without the isolated seeds, and where the generators end then.

    The pass is the model's own over again: the same generators, buffers and precision.
    """
    model, moment = garden.model, seen.moment
    assert moment is not None
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states, statistics = randomness.save(), [(buffer, buffer.detach().clone()) for buffer, _ in moment.statistics]
    garden.switch.suspended = True
    try:
        randomness.load(moment.randomness)
        _write(moment.statistics)
        buffers = {name: buffer.clone() for name, buffer in moment.buffers.items()}
        with seen.autocast.again():
            output = functional_call(model, buffers, (seen.inputs,))
            drawn = randomness.save()
            loss = loss_function(output, targets)
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    finally:
        garden.switch.suspended = False
        randomness.load(states)
        _write(statistics)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}, drawn


def added_up(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of two sets of gradients, where one may lack what the other has."""
    both = {name: a[name] + b[name] for name in a.keys() & b.keys()}
    return {**a, **b, **both}


def _write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in values:
            buffer.copy_(value)


def gradients_of(model: nn.Module, expected: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists in one order: what is expected and what is there; zeros where one of them has none.

    A parameter whose gradient a hook of the user's takes away as soon as it is there has nothing to compare.
    """
    wanted, found = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or getattr(parameter, "_post_accumulate_grad_hooks", None):
            continue
        if name in expected or parameter.grad is not None:
            wanted.append(expected.get(name, torch.zeros_like(parameter)))
            found.append(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    return wanted, found


class Watch:
    """One watched isolated step: begun before the shadow pass, judged after it."""

    def __init__(
        self, monitor: Monitor, garden: Garden, seeds: Sequence[Seed], seen: Seen | None, host_loss: Tensor,
        targets: Tensor, loss_function: LossFunction,
    ) -> None:  # fmt: skip
        self._monitor, self._garden, self._seeds, self._seen = monitor, garden, seeds, seen
        self._targets, self._loss_function = targets, loss_function
        self._expected: dict[str, Tensor] | None = None
        self._foreign: list[str] = []
        self._drew: list[str] = []
        if seen is not None and seen.moment is not None:
            self._expected = self._repeat()
        own = [p for seed in seeds if seed.branch is not None for p in seed.branch.parameters()]
        self._values = Values(garden.model, monitor.randomness)
        self._probe = Probe(garden, seeds, Pass.SHADOW, monitor.randomness, shared=own, host=leaks.graph_of(host_loss))

    def _repeat(self) -> dict[str, Tensor]:
        seen = self._seen
        assert seen is not None
        with self._monitor.without_foreign_hooks() as self._foreign:
            expected, drawn = reference(
                self._garden, seen, self._targets, self._loss_function, self._monitor.randomness
            )
        if seen.drawn is not None:
            self._drew = differing(drawn, seen.drawn)
        return expected

    def judge(self) -> tuple[list[Finding], Reading | None]:
        """What was found, and how the host's gradients compare; no reading where its own pass was not seen.

        Raises:
            Rescaled: in a loop of the user's own, gradients were clipped, say, before anybody could look at them.
        """
        found = dict.fromkeys(self._probe.close())
        found.update(dict.fromkeys(f for seed in self._seeds for f in self._monitor.standing(seed)))
        # What a branch wrote is told above, with its name; a hook on the way back shows only here.
        known = {finding.where for finding in found}
        found.update(dict.fromkeys(f for f in self._values.changes() if f.where not in known))
        reading = None
        if self._expected is not None:
            reading = self._compared(self._expected)
            if self._drew:
                where = f"with the seed the model draws otherwise from {self._drew[0]}"
                found[Finding(Leak.SHARED_GENERATOR, where)] = None
            elif not found and not reading.clean(self._tolerance()):
                found.update(dict.fromkeys(self._unexplained(reading)))
        return list(found), reading

    def _compared(self, expected: dict[str, Tensor]) -> Reading:
        """Gradients that were there before the pass have been added to, or cleared after it: either is the user's."""
        model = self._garden.model
        reading = compare(*gradients_of(model, expected))
        earlier = self._seen.moment.gradients if self._seen is not None and self._seen.moment is not None else {}
        if not earlier or reading.clean(self._tolerance()):
            return reading
        added = compare(*gradients_of(model, added_up(earlier, expected)))
        return added if added.clean(reading.difference) else reading

    def _tolerance(self) -> float:
        return self._garden.config.isolation_tolerance

    def _unexplained(self, reading: Reading) -> list[Finding]:
        if self._foreign:
            return [Finding(Leak.WRITING_HOOK, f"on the host's {self._foreign[0]}")]
        assert self._expected is not None
        if self._garden.isolated.users_loop:
            changed = rescaled(*gradients_of(self._garden.model, self._expected))
            if changed:
                raise Rescaled(changed)
        # Some kernels add in another order each time: what the pass itself differs by is no leak.
        again = self._repeat()
        names = list(self._expected)
        noise = compare([self._expected[name] for name in names], [again[name] for name in names]).difference
        return [] if reading.clean(self._tolerance() + _NOISE * noise) else [Finding(Leak.UNEXPLAINED, "")]
