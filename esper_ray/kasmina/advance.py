"""How seeds move on: at each epoch's end the gates judge what the epoch showed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina import gates
from esper_ray.kasmina.gates import Verdict
from esper_ray.kasmina.lifecycle import GROWING, LIFE, LIVE, gate_of, least_stay, longest_stay
from esper_ray.kasmina.slot import Seed, Slot
from esper_ray.reliability.failpoints import passing

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden


@dataclass(frozen=True, slots=True)
class SeedMeasurement:
    """What validation found for one live seed, on against off, on the same samples.

    Attributes:
        gain: mean loss with the seed off minus mean loss with it on; positive is good.
        gain_error: standard error of that mean over the samples.
        cosine: mean cosine of the slot's output, on against off.
        scale: ratio of the standard deviations of the slot's output, on over off.
        shift: how far the mean of the slot's output moved, in standard deviations of it without the seed.
    """

    gain: float
    gain_error: float
    cosine: float
    scale: float
    shift: float


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """Where the last epoch ended: steps done so far, steps of an epoch, validation loss."""

    step: int = 0
    steps_per_epoch: int = 1
    loss: float = math.nan


def try_stage(garden: Garden, slot: Slot, to: Stage, *, first_epoch: int, reason: str = "gate passed") -> Verdict:
    """Enter ``to`` if its gate passes.

    Args:
        first_epoch: the first one that counts as spent there.
    """
    verdict = ask(garden, slot, to)
    if not verdict.passed:
        return verdict
    garden.enter(slot, to, reason)
    seed = slot.seed
    if seed is None:
        return verdict
    seed.stage_epoch = first_epoch
    if to is Stage.BLENDING:
        last = garden.last
        seed.ramp_start = last.step
        seed.ramp_steps = max(1, garden.config.blending_epochs * last.steps_per_epoch)
        seed.evidence = {"loss_before": last.loss, "losses": [], "moves": []}
    elif to is Stage.FOSSILIZED:
        garden.become_fossil(slot)
        garden.trainer.fossilise(seed)
        passing("garden.fossilised")
    return verdict


def ask(garden: Garden, slot: Slot, to: Stage) -> Verdict:
    """Ask the gate between the slot's stage and ``to``; the verdict is noted either way.

    Raises:
        LifecycleError: the table has no such transition.
    """
    gate = gate_of(slot.stage, to)
    if gate is None:
        return Verdict(True, "no evidence is asked for", {})
    seed = slot.seed
    evidence: Mapping[str, Any] = seed.evidence if seed is not None else {"leftovers": leftovers(garden, slot)}
    verdict = gates.GATES[gate](evidence, garden.config)
    number = seed.number if seed is not None else slot.last_seed
    garden.note_gate(gate, verdict, number, slot.info.index, slot.stage, to)
    return verdict


def leftovers(garden: Garden, slot: Slot) -> int:
    """What is left of the seed that a slot had last: its hook, kernels on their way, optimizer entries."""
    return garden.trainer.leftovers(slot.last_seed) + int(slot.hooked) + garden.expected(slot)


def close_epoch(garden: Garden, measured: Mapping[int, SeedMeasurement]) -> None:
    """Judge every slot after the epoch that `Garden.last` tells of."""
    for slot in garden.slots:
        seed = slot.seed
        if seed is None:
            _rest(garden, slot)
            continue
        _collect(seed, garden.last.loss, measured.get(seed.number))
        if slot.stage in GROWING:
            _judge(garden, slot, seed)


def _collect(seed: Seed, loss: float, measurement: SeedMeasurement | None) -> None:
    if seed.stage is Stage.BLENDING:
        seed.evidence.setdefault("losses", []).append(loss)
        seed.evidence["alpha"] = seed.alpha
    if seed.stage in LIVE:
        seed.evidence["loss"] = loss
    if measurement is not None:
        seed.evidence.update(asdict(measurement))


def _judge(garden: Garden, slot: Slot, seed: Seed) -> None:
    stay, stage = garden.stay(slot) + 1, slot.stage
    held = garden.epoch < seed.held_until
    to = LIFE[stage].follows
    due = not held and stay >= least_stay(stage, garden.config)
    if to is not None and due and try_stage(garden, slot, to, first_epoch=garden.epoch + 1).passed:
        return
    longest = longest_stay(stage, garden.config)
    if longest is not None and stay >= longest:
        garden.cull(slot, f"{stay} epochs in {stage.name} without passing on")


def _rest(garden: Garden, slot: Slot) -> None:
    """A slot without a seed: rest out the embargo, then clean up, then sleep."""
    if slot.stage is Stage.CULLED:
        slot.embargo_until = garden.epoch + least_stay(Stage.EMBARGOED, garden.config) * 2**slot.offences
        slot.offences += 1
        garden.enter(slot, Stage.EMBARGOED, f"until epoch {slot.embargo_until}")
        return
    if slot.stage is Stage.EMBARGOED and garden.epoch >= slot.embargo_until:
        garden.enter(slot, Stage.RESETTING, "embargo over")
    if slot.stage is Stage.RESETTING:
        # Until it is clean it is asked again after each epoch, and each refusal is told.
        try_stage(garden, slot, Stage.DORMANT, first_epoch=garden.epoch, reason="nothing of the seed remains")
