"""Validation, and what each live seed is worth: the same samples with the seed on and with it off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_ray.kasmina.advance import SeedMeasurement
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.slot import Seed
from esper_ray.tasks.data import Split
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.multiseed import NOBODY, Credit, CreditRule, combinations, credit

MOST_COMBINED = 4


@dataclass(frozen=True, slots=True)
class Quality:
    """Mean loss, and mean score (for classes the accuracy), with the loss of each sample [N]."""

    loss: float
    accuracy: float
    losses: Tensor


def evaluate(model: nn.Module, split: Split, meter: CostMeter, key: object) -> Quality:
    """Loss and score on ``split``, in evaluation mode and without gradients."""
    model.eval()
    losses, scores, size = [], [], split.chunk
    with torch.no_grad():
        for start in range(0, len(split), size):
            inputs, targets = split.inputs[start : start + size], split.targets[start : start + size]
            with meter.charge(("evaluate", key), len(targets)):
                outputs = model(inputs)
            losses.append(split.objective.losses(outputs, targets))
            scores.append(split.objective.score(outputs, targets))
    model.train()
    each = torch.cat(losses)
    return Quality(float(each.mean()), float(torch.cat(scores).double().mean()), each)


def measure_seeds(
    garden: Garden, split: Split, on: Quality, meter: CostMeter, structure: object
) -> tuple[Mapping[int, SeedMeasurement], Credit | None]:
    """For each live seed its counterfactual gain and how far it moves what leaves its slot, and the credit of all.

    It is asked of ``seeds.measure_samples`` samples, evenly picked: with three seeds live, all of them would cost more
    than half an epoch's training. The credit is None where no seed is live. Shapley's value needs every combination: it
    is for `MOST_COMBINED` seeds at most, and of more each is left out by itself.
    """
    live = garden.live
    if not live:
        return {}, None
    numbers = [seed.number for seed in live]
    rule: CreditRule = garden.config.credit if len(live) <= MOST_COMBINED else "leave_one_out"
    picked = _evenly(len(split), garden.config.measure_samples)
    split = Split(split.inputs[picked], split.targets[picked], split.objective)
    losses = {NOBODY: on.losses[picked]}
    for off in combinations(numbers, rule):
        garden.switch.off = off
        try:
            losses[off] = evaluate(garden.model, split, meter, (structure, "without", *sorted(off))).losses
        finally:
            garden.switch.off = NOBODY
    found, drifts = credit(losses, numbers, rule), _drifts(garden, split, meter, structure)
    measured = {
        number: SeedMeasurement(found.single[number].mean, found.single[number].error, **drifts[number])
        for number in numbers
    }
    return measured, found


def _evenly(count: int, wanted: int) -> slice:
    """Every n-th of ``count`` samples, so that at least ``wanted`` are among them; all where 0 are."""
    return slice(None, None, max(1, count // wanted) if wanted else 1)


def _drifts(garden: Garden, split: Split, meter: CostMeter, structure: object) -> dict[int, dict[str, float]]:
    """How what leaves each live seed's slot differs with the seed on and off, on one chunk; names of `SeedMeasurement`.

    One pass shows all of them; where a model is passed more than once, as for its own margin, the last pass counts.
    """
    seen: dict[int, dict[str, float]] = {}

    def observe(seed: Seed, h: Tensor, y: Tensor) -> None:
        seen[seed.number] = _drift(h, y)

    model = garden.model
    model.eval()
    garden.switch.observer = observe
    try:
        with torch.no_grad(), meter.charge(("drift", structure), len(split.targets[: split.chunk])):
            model(split.inputs[: split.chunk])
    finally:
        garden.switch.observer = None
        model.train()
    return seen


def _drift(h: Tensor, y: Tensor) -> dict[str, float]:
    deviation = h.std().clamp_min(1e-12)
    return {
        "cosine": float(F.cosine_similarity(h.flatten(1), y.flatten(1), dim=1).mean()),
        "scale": float(y.std() / deviation),
        "shift": float((y.mean() - h.mean()).abs() / deviation),
    }
