"""How seeds move on: at each epoch's end the gates judge what the epoch showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina import gates
from esper_ray.kasmina.lifecycle import GROWING, gate_of
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
    """

    gain: float
    gain_error: float
    cosine: float
    scale: float


# The stage that follows by itself, and the least stay (a field of SeedConfig; one epoch where there is none).
_NEXT: Mapping[Stage, tuple[Stage, str]] = {
    Stage.TRAINING: (Stage.BLENDING, "training_epochs"),
    Stage.BLENDING: (Stage.SHADOWING, "blending_epochs"),
    Stage.SHADOWING: (Stage.PROBATIONARY, ""),
}


def passes(garden: Garden, slot: Slot, to: Stage) -> bool:
    """Ask the gate between the slot's stage and ``to``; the verdict is noted either way."""
    seed = slot.seed
    gate = gate_of(slot.stage, to)
    if gate is None:
        return True
    verdict = gates.GATES[gate](seed.evidence if seed else {}, garden.config)
    garden.note_gate(gate, verdict, seed.number if seed else 0, slot.info.index, slot.stage, to)
    return verdict.passed


def try_stage(garden: Garden, slot: Slot, to: Stage) -> bool:
    """Enter ``to`` if its gate passes."""
    if not passes(garden, slot, to):
        return False
    garden.enter(slot, to, "gate passed")
    if to is Stage.FOSSILIZED:
        seed = slot.seed
        assert seed is not None
        garden.become_fossil(slot)
        garden.trainer.fossilise(seed)
        passing("garden.fossilised")
    return True


def close_epoch(
    garden: Garden, *, step: int, steps_per_epoch: int, loss: float, measured: Mapping[int, SeedMeasurement]
) -> None:
    """Judge every slot after an epoch; ``step`` is the number of steps done so far."""
    for slot in garden.slots:
        if slot.seed is None:
            _rest(garden, slot)
            continue
        _collect(slot.seed, loss, measured.get(slot.seed.number))
        if slot.stage in GROWING:
            _judge(garden, slot, step=step, steps_per_epoch=steps_per_epoch, loss=loss)


def _collect(seed: Seed, loss: float, measurement: SeedMeasurement | None) -> None:
    if seed.stage is Stage.BLENDING:
        seed.evidence.setdefault("losses", []).append(loss)
        seed.evidence["alpha"] = seed.alpha
    if measurement is not None:
        seed.evidence.update(
            gain=measurement.gain,
            gain_error=measurement.gain_error,
            cosine=measurement.cosine,
            scale=measurement.scale,
        )


def _judge(garden: Garden, slot: Slot, *, step: int, steps_per_epoch: int, loss: float) -> None:
    seed = slot.seed
    assert seed is not None
    stay = garden.epoch - seed.stage_epoch + 1
    if slot.stage in _NEXT:
        to, minimum = _NEXT[slot.stage]
        if stay >= (getattr(garden.config, minimum) if minimum else 1) and try_stage(garden, slot, to):
            seed.stage_epoch = garden.epoch + 1
            if to is Stage.BLENDING:
                seed.ramp_start = step
                seed.ramp_steps = max(1, garden.config.blending_epochs * steps_per_epoch)
                seed.evidence = {"loss_before": loss, "losses": []}
            return
    if stay >= garden.config.max_stage_epochs:
        garden.cull(slot, f"{stay} epochs in {slot.stage.name} without passing on")


def _rest(garden: Garden, slot: Slot) -> None:
    """A slot without a seed: rest out the embargo, then clean up, then sleep."""
    if slot.stage is Stage.CULLED:
        slot.embargo_until = garden.epoch + garden.config.embargo_epochs * 2**slot.offences
        slot.offences += 1
        garden.enter(slot, Stage.EMBARGOED, f"until epoch {slot.embargo_until}")
    elif slot.stage is Stage.EMBARGOED and garden.epoch >= slot.embargo_until:
        garden.enter(slot, Stage.RESETTING, "embargo over")
        leftovers = garden.trainer.leftovers(slot.last_seed) + int(slot.hooked)
        verdict = gates.reset({"leftovers": leftovers}, garden.config)
        garden.note_gate(Gate.G5_RESET, verdict, 0, slot.info.index, Stage.RESETTING, Stage.DORMANT)
        if verdict.passed:
            garden.enter(slot, Stage.DORMANT, "nothing of the seed remains")
