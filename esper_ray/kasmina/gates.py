"""The gates: each looks at evidence and answers with a verdict and the figures it rested on.

Missing evidence denies. A gate is a pure function of what was measured; the table at the end is what the garden uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import SeedLifecycleGate as Gate


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` says in words what decided; ``evidence`` holds the figures, finite ones only."""

    passed: bool
    reason: str
    evidence: Mapping[str, float]


def _verdict(checks: Sequence[tuple[bool, str]], evidence: Mapping[str, float]) -> Verdict:
    failed = [text for holds, text in checks if not holds]
    finite = {name: float(value) for name, value in evidence.items() if math.isfinite(value)}
    return Verdict(not failed, "; ".join(failed) if failed else "all checks hold", finite)


def _missing(*names: str) -> Verdict:
    return Verdict(False, f"no evidence yet: {', '.join(names)}", {})


def birth(evidence: Mapping[str, Any], config: SeedConfig) -> Verdict:  # noqa: ARG001
    """G0 on the graft: the kernel's digest is known, the output unchanged at birth, every parameter's gradient alive.

    Expects ``digest_known``, ``shape_kept``, ``birth_change`` (largest absolute change of the output at alpha 0) and
    ``dead_parameters`` (tensors whose gradient is zero or not finite).
    """
    if "birth_change" not in evidence:
        return _missing("birth_change", "dead_parameters")
    change, dead = float(evidence["birth_change"]), int(evidence["dead_parameters"])
    known, kept = bool(evidence.get("digest_known", False)), bool(evidence.get("shape_kept", False))
    return _verdict(
        [
            (known, "the kernel has no digest"),
            (kept, "it changes the shape of what passes"),
            (change == 0.0, f"the output changes by {change:.3g} at birth"),
            (dead == 0, f"{dead} of its tensors get no gradient"),
        ],
        {"birth_change": change, "dead_parameters": dead, "digest_known": float(known), "shape_kept": float(kept)},
    )


def gradient_health(evidence: Mapping[str, Any], config: SeedConfig) -> Verdict:
    """G1: gradients finite, neither vanished nor exploded; the seed's loss, host taken off, falls; isolation intact.

    Expects ``norms`` (gradient norm per isolated step) and ``advantages`` (host loss minus shadow loss per such step).
    The host's own progress is in both losses and cancels out. Seeds that are isolated at the same time share one
    shadow pass, and so this evidence, which the reason then says; each one's own worth is judged by G4.
    """
    norms, advantages = evidence.get("norms", ()), evidence.get("advantages", ())
    if len(norms) < 6:
        return _missing("at least 6 isolated steps")
    third = len(advantages) // 3
    first, last = _mean(advantages[:third]), _mean(advantages[-third:])
    smallest, largest = min(norms), max(norms)
    violations, together = int(evidence.get("violations", 0)), int(evidence.get("together", 1))
    verdict = _verdict(
        [
            (all(math.isfinite(norm) for norm in norms), "a gradient is not finite"),
            (smallest > config.gradient_floor, f"the gradient vanished ({smallest:.3g})"),
            (largest < config.gradient_ceiling, f"the gradient exploded ({largest:.3g})"),
            (last > first, f"its loss does not fall (advantage {first:.3g} -> {last:.3g})"),
            (violations == 0, f"{violations} isolation violations"),
        ],
        {
            "gradient_min": smallest,
            "gradient_max": largest,
            "advantage_first": first,
            "advantage_last": last,
            "isolated_steps": len(norms),
            "isolated_together": together,
            "violations": violations,
        },
    )
    shared = f"; its loss is shared by the {together} seeds isolated together" if together > 1 else ""
    return replace(verdict, reason=verdict.reason + shared)


def stability(evidence: Mapping[str, Any], config: SeedConfig) -> Verdict:
    """G2: the ramp is over; along it the slot's output moved by a bounded amount, and the validation loss too.

    Expects ``alpha``, ``loss_before`` and ``losses`` (validation losses of the epochs in BLENDING), and ``moves``:
    the distance of the slot's output from what it is without the seed, over its size, at steps along the ramp.
    """
    losses, before, moves = evidence.get("losses", ()), evidence.get("loss_before"), evidence.get("moves", ())
    if not losses or before is None or not moves:
        return _missing("validation losses and the slot's outputs along the ramp")
    worst, farthest = _worst(losses), _worst(moves)
    rise = worst / before - 1.0
    alpha = float(evidence.get("alpha", 0.0))
    return _verdict(
        [
            (alpha == 1.0, f"alpha is at {alpha:.2f}"),
            (math.isfinite(worst), "the loss is not finite"),
            (rise <= config.loss_jump, f"the validation loss rose by {100 * rise:.0f} %"),
            (math.isfinite(farthest), "the slot's output is not finite"),
            (farthest <= config.output_move, f"the slot's output moved by {farthest:.2f} times its size"),
        ],
        {
            "loss_before": before,
            "loss_worst": worst,
            "alpha": alpha,
            "move_farthest": farthest,
            "move_last": moves[-1],
            "looks": len(moves),
        },
    )


def interface(evidence: Mapping[str, Any], config: SeedConfig) -> Verdict:
    """G3: what leaves the slot stays close to what the rest of the host knows.

    Expects ``cosine`` (mean cosine of the slot's output on against off), ``scale`` (ratio of their deviations) and
    ``shift`` (difference of their means, in deviations) on the validation split, and ``gain``: the counterfactual gain
    was measured.
    """
    if any(name not in evidence for name in ("cosine", "scale", "shift", "gain")):
        return _missing("output of the slot with the seed on and off")
    cosine, scale, shift = (float(evidence[name]) for name in ("cosine", "scale", "shift"))
    return _verdict(
        [
            (cosine >= config.drift_cosine, f"the output turned away (cosine {cosine:.2f})"),
            (1 / config.drift_scale <= scale <= config.drift_scale, f"the output's scale changed {scale:.2f} times"),
            (shift <= config.drift_shift, f"the output's mean moved by {shift:.2f} deviations"),
        ],
        {"cosine": cosine, "scale": scale, "shift": shift, "gain": float(evidence["gain"])},
    )


def system_impact(evidence: Mapping[str, Any], config: SeedConfig) -> Verdict:
    """G4: the counterfactual gain stands above its own noise, and the model is not worse than before the ramp.

    Expects ``gain`` (mean loss with the seed off minus on, same held-out samples), ``gain_error`` (its standard error
    over the samples), ``loss`` (the newest validation loss) and ``loss_before`` (that before the ramp). The gain alone
    is the seed's credit; the two losses only tell damage.
    """
    if any(name not in evidence for name in ("gain", "gain_error", "loss", "loss_before")):
        return _missing("counterfactual gain", "validation loss now and before the ramp")
    gain, error = float(evidence["gain"]), float(evidence["gain_error"])
    loss, before = float(evidence["loss"]), float(evidence["loss_before"])
    rise = loss / before - 1.0
    return _verdict(
        [
            (
                gain > config.gain_errors * error,
                f"gain {gain:.4f} is within {config.gain_errors:g} x its error {error:.4f}",
            ),
            (rise <= config.loss_jump, f"the validation loss has risen by {100 * rise:.0f} % since before the ramp"),
        ],
        {"gain": gain, "gain_error": error, "loss": loss, "loss_before": before},
    )


def reset(evidence: Mapping[str, Any], config: SeedConfig) -> Verdict:  # noqa: ARG001
    """G5: nothing is left of the seed. Expects ``leftovers``: hooks, branches and optimizer entries that remain."""
    if "leftovers" not in evidence:
        return _missing("leftovers")
    left = int(evidence["leftovers"])
    return _verdict([(left == 0, f"{left} things of the seed remain")], {"leftovers": left})


def _worst(values: Sequence[float]) -> float:
    """The largest, or NaN where one is none: ``max`` may pass over it."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


GATES: Mapping[Gate, Callable[[Mapping[str, Any], SeedConfig], Verdict]] = {
    Gate.G0_SANITY: birth,
    Gate.G1_GRADIENT_HEALTH: gradient_health,
    Gate.G2_STABILITY: stability,
    Gate.G3_INTERFACE: interface,
    Gate.G4_SYSTEM_IMPACT: system_impact,
    Gate.G5_RESET: reset,
}
