"""What the learned policy sees: the host's graph with its slots, the blueprints on offer, and the run as a whole.

The structure comes once, with the run's opening; what a graft changes in it (which blueprint sits in which slot)
follows from each state's seeds. Everything here is numpy; `tamiyo.policy` makes tensors of it.

An observation is a flat dictionary of arrays of fixed shape, padded to a `Layout`. Column 0 of each node table is 1
where the node exists, 0 where it is padding; the sizes of things enter as logarithms, and all features are of order 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import SeedState
from esper_ray.contracts.ports import LAYER_STATISTICS, RunOpening
from esper_ray.reliability.ids import digest
from esper_ray.tamiyo import actions
from esper_ray.tamiyo.heuristic import trend
from esper_ray.tamiyo.view import Proposal, RunView

Observation = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]

LAYER_KINDS = ("conv", "norm", "linear", "activation", "pooling", "embedding", "attention", "other")
SLOT_KINDS = ("conv", "sequence", "vector")
STAGES = tuple(stage for stage in Stage if stage is not Stage.UNKNOWN)

LAYER_FEATURES = (
    "there",
    *(f"is_{kind}" for kind in LAYER_KINDS),
    *("parameters", "inputs", "outputs", "place"),
    *LAYER_STATISTICS,
)
SLOT_FEATURES = (
    "there",
    *(f"is_{kind}" for kind in SLOT_KINDS),
    *("channels", "positions", "place"),
    *(f"stage_{stage.name.lower()}" for stage in STAGES),
    *("pending_germination", "pending_other", "alpha", "age", "gradient_norm"),
    *("measured", "gain", "gain_error", "gain_in_errors", "seed_parameters", "seed_flops"),
)
BLUEPRINT_FEATURES = ("there", "slots_it_fits", "planted", "pending", "parameters", "flops")
CANDIDATE_FEATURES = ("there", "parameters", "parameters_to_host", "flops", "flops_rank", "fits")
GLOBAL_FEATURES = (
    *("epoch", "epochs", "epochs_left", "accuracy", "validation_loss", "training_loss", "gap"),
    *("loss_rise", "fall", "fall_bound", "accuracy_gain", "learning_rate"),
    *("host_parameters", "parameter_ratio", "compute_ratio", "room", "seeds_under_way", "fossils", "pending"),
)

PENDING: Mapping[str, tuple[int, ...]] = {
    "slots": (SLOT_FEATURES.index("pending_germination"), SLOT_FEATURES.index("pending_other")),
    "blueprints": (BLUEPRINT_FEATURES.index("pending"),),
    "global": (GLOBAL_FEATURES.index("pending"),),
}
"""Columns that tell what this boundary decided already: beside the masks and "fits" all that its micro-steps change."""

FEATURES_DIGEST = digest(
    repr((2, LAYER_FEATURES, SLOT_FEATURES, BLUEPRINT_FEATURES, CANDIDATE_FEATURES, GLOBAL_FEATURES)).encode()
)[:16]
"""A policy learned on other features than these is foreign."""

_TREND_STATES = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """How many nodes and edges an observation has room for."""

    layers: int
    slots: int
    blueprints: int
    edges: int

    @classmethod
    def of(cls, opening: RunOpening) -> Layout:
        """Just as large as a run needs."""
        graph = opening.graph
        blueprints = len({candidate.blueprint for candidate in opening.candidates})
        layers, edges = (len(graph.layers), len(graph.edges)) if graph else (0, 0)
        return cls(max(1, layers), max(1, len(opening.slots)), max(1, blueprints), max(1, edges))


def shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], type, float, float]]:
    """Shape, type, least and largest value of each array of an observation."""
    layers, slots, blueprints = layout.layers, layout.slots, layout.blueprints
    operations, least, most = len(actions.OPERATIONS), -50.0, 50.0
    return {
        "layers": ((layers, len(LAYER_FEATURES)), np.float32, least, most),
        "slots": ((slots, len(SLOT_FEATURES)), np.float32, least, most),
        "blueprints": ((blueprints, len(BLUEPRINT_FEATURES)), np.float32, least, most),
        "candidates": ((slots, blueprints, len(CANDIDATE_FEATURES)), np.float32, least, most),
        "global": ((len(GLOBAL_FEATURES),), np.float32, least, most),
        "blueprint_ids": ((blueprints,), np.int64, 0, 2**31),
        "layer_edges": ((2, layout.edges), np.int64, -1, layers - 1),
        "slot_layer": ((slots,), np.int64, -1, layers - 1),
        "mask_operation": ((operations,), np.int8, 0, 1),
        "mask_slot": ((operations, slots), np.int8, 0, 1),
        "mask_blueprint": ((slots, blueprints), np.int8, 0, 1),
    }


def observe(view: RunView, pending: Sequence[Proposal] = (), layout: Layout | None = None) -> Observation:
    """The observation of the boundary that ``view.now`` describes, after ``pending`` of its decisions.

    Args:
        layout: room for padding; by default the run's own size.

    Raises:
        ValueError: the run is larger than the layout.
    """
    if layout is None:
        layout = view.memo.setdefault("layout", Layout.of(view.opening))
    fixed = view.memo.get(layout)
    if fixed is None:
        fixed = view.memo[layout] = _fixed(view, layout)
    legal = actions.masks(view, pending, slots=layout.slots, blueprints=layout.blueprints)
    found: Observation = {
        "layers": _layers(view, fixed["layers"]),
        "slots": _slots(view, pending, fixed),
        "blueprints": _blueprints(view, pending, fixed["blueprints"]),
        "candidates": _candidates(view, pending, fixed, layout),
        "global": _global(view, pending),
        **{name: fixed[name] for name in ("blueprint_ids", "layer_edges", "slot_layer")},
        "mask_operation": legal.operation,
        "mask_slot": legal.slot,
        "mask_blueprint": legal.blueprint,
    }
    for name in ("layers", "slots", "blueprints", "candidates", "global"):
        if not math.isfinite(float(found[name].sum())):
            np.nan_to_num(found[name], copy=False, nan=0.0, posinf=50.0, neginf=-50.0)
        found[name].clip(-50.0, 50.0, out=found[name])
    return found


def observation_digest(observation: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of all arrays, by name."""
    parts = [name.encode() + np.ascontiguousarray(observation[name]).tobytes() for name in sorted(observation)]
    return digest(b"".join(parts))


def _log(value: float, scale: float) -> float:
    return math.log10(1.0 + max(0.0, value)) / scale


def _fixed(view: RunView, layout: Layout) -> Observation:
    """What the opening alone says: structure and sizes."""
    opening, numbers = view.opening, actions.blueprints_of(view)
    needed = Layout.of(opening)
    if any(getattr(needed, name) > getattr(layout, name) for name in ("layers", "slots", "blueprints", "edges")):
        raise ValueError(f"{needed} does not fit into {layout}")
    found: Observation = {
        "layers": np.zeros((layout.layers, len(LAYER_FEATURES)), np.float32),
        "slots": np.zeros((layout.slots, len(SLOT_FEATURES)), np.float32),
        "blueprints": np.zeros((layout.blueprints, len(BLUEPRINT_FEATURES)), np.float32),
        "candidates": np.zeros((layout.slots, layout.blueprints, len(CANDIDATE_FEATURES)), np.float32),
        "blueprint_ids": np.zeros(layout.blueprints, np.int64),
        "layer_edges": np.full((2, layout.edges), -1, np.int64),
        "slot_layer": np.full(layout.slots, -1, np.int64),
    }
    _fix_layers(opening, found)
    _fix_slots(opening, found)
    found["blueprint_ids"][: len(numbers)] = numbers
    place = {number: index for index, number in enumerate(numbers)}
    ranks = _flops_ranks(opening)
    for each in view.offers():
        found["candidates"][each.slot, place[each.blueprint], :5] = (
            1.0,
            _log(each.parameters, 6.0),
            each.parameters / max(1, opening.host_parameters),
            _log(each.flops, 8.0),
            ranks[each.slot, each.blueprint],
        )
    offered = found["candidates"][..., 0]
    counts = offered.sum(axis=0)
    table = found["blueprints"]
    table[:, 0] = counts > 0
    table[:, 1] = counts / max(1, len(opening.slots))
    for column, source in ((4, 1), (5, 3)):
        table[:, column] = (found["candidates"][..., source] * offered).sum(axis=0) / np.maximum(counts, 1)
    return found


def _fix_layers(opening: RunOpening, found: Observation) -> None:
    graph = opening.graph
    if graph is None:
        return
    for index, layer in enumerate(graph.layers):
        kind = layer.kind if layer.kind in LAYER_KINDS else "other"
        row = found["layers"][index]
        row[0] = row[1 + LAYER_KINDS.index(kind)] = 1.0
        row[1 + len(LAYER_KINDS) :][:4] = (
            _log(layer.parameters, 6.0),
            _log(layer.inputs, 3.0),
            _log(layer.outputs, 3.0),
            (index + 1) / len(graph.layers),
        )
    if graph.edges:
        found["layer_edges"][:, : len(graph.edges)] = np.asarray(graph.edges, np.int64).T
    found["slot_layer"][: len(graph.slot_layers)] = graph.slot_layers


def _fix_slots(opening: RunOpening, found: Observation) -> None:
    for slot in opening.slots:
        row, shape = found["slots"][slot.index], slot.signature.shape
        channels = shape[0] if slot.signature.kind == "conv" else shape[-1]
        row[0] = row[1 + SLOT_KINDS.index(slot.signature.kind)] = 1.0
        row[4:7] = (
            _log(channels, 3.0),
            _log(math.prod(shape) / channels, 3.0),
            (slot.index + 1) / len(opening.slots),
        )


def _flops_ranks(opening: RunOpening) -> dict[tuple[int, int], float]:
    """Each candidate's place in its slot by computation: 0 the cheapest, 1 the dearest."""
    ranks = {}
    for slot in opening.slots:
        ordered = sorted((each for each in opening.candidates if each.slot == slot.index), key=lambda each: each.flops)
        for place, each in enumerate(ordered):
            ranks[each.slot, each.blueprint] = place / max(1, len(ordered) - 1)
    return ranks


def _layers(view: RunView, fixed: Floats) -> Floats:
    table = fixed.copy()
    statistics = view.statistics
    if statistics is not None and view.opening.graph is not None:
        table[: len(statistics), -len(LAYER_STATISTICS) :] = statistics / 6.0
    return table


def _slots(view: RunView, pending: Sequence[Proposal], fixed: Observation) -> Floats:
    table = fixed["slots"].copy()
    stages = 1 + len(SLOT_KINDS) + 3
    rest = stages + len(STAGES)
    dormant = np.ones(len(table), bool)
    for seed in view.seeds():
        dormant[seed.slot] = False
        table[seed.slot, stages + STAGES.index(seed.stage)] = 1.0
        table[seed.slot, rest + 2 :] = _seed(view, seed, fixed)
    table[:, stages + STAGES.index(Stage.DORMANT)] = dormant & (table[:, 0] > 0)
    for proposal in pending:
        table[proposal.slot, rest + (0 if proposal.operation is SeedOperation.GERMINATE else 1)] = 1.0
    return table


def _seed(view: RunView, seed: SeedState, fixed: Observation) -> tuple[float, ...]:
    gain, error = seed.metrics.get("g"), seed.metrics.get("ge")
    measured = gain is not None and error is not None
    scale = max(view.now.validation_loss, 1e-6)
    numbers = actions.blueprints_of(view)
    costs = fixed["candidates"][seed.slot, numbers.index(seed.blueprint)] if seed.blueprint in numbers else None
    return (
        seed.alpha,
        seed.age_epochs / max(1, view.opening.epochs),
        _log(1e3 * seed.gradient_norm, 3.0),
        float(measured),
        gain / scale if gain is not None else 0.0,
        error / scale if error is not None else 0.0,
        math.tanh(gain / max(error, 1e-9) / 3.0) if gain is not None and error is not None else 0.0,
        0.0 if costs is None else float(costs[1]),
        0.0 if costs is None else float(costs[3]),
    )


def _blueprints(view: RunView, pending: Sequence[Proposal], fixed: Floats) -> Floats:
    table = fixed.copy()
    place = {number: index for index, number in enumerate(actions.blueprints_of(view))}
    for seed in view.seeds():
        if seed.blueprint in place:
            table[place[seed.blueprint], 2] += 1.0
    for proposal in pending:
        if proposal.operation is SeedOperation.GERMINATE:
            table[place[proposal.blueprint], 3] += 1.0
    return table


def _candidates(view: RunView, pending: Sequence[Proposal], fixed: Observation, layout: Layout) -> Floats:
    table: Floats = fixed["candidates"].copy()
    table[..., -1] = actions.fitting(view, pending, layout.slots, layout.blueprints)
    return table


def _global(view: RunView, pending: Sequence[Proposal]) -> Floats:
    now, opening = view.now, view.opening
    before = view.states[-2] if len(view.states) > 1 else now
    losses = [state.validation_loss for state in view.states[-_TREND_STATES:]]
    fall = trend(losses) if len(losses) == _TREND_STATES else None
    under_way = sum(seed.seed > 0 and seed.stage is not Stage.FOSSILIZED for seed in view.seeds())
    fossils = sum(seed.stage is Stage.FOSSILIZED for seed in view.seeds())
    slots = max(1, len(opening.slots))
    parameters = view.parameters()
    values = (
        now.epoch / max(1, opening.epochs),
        _log(opening.epochs, 3.0),
        1.0 - now.epoch / max(1, opening.epochs),
        now.validation_accuracy,
        now.validation_loss,
        now.training_loss,
        1.0 - now.training_loss / max(now.validation_loss, 1e-9),
        now.validation_loss / max(before.validation_loss, 1e-9) - 1.0,
        fall.rate if fall else 0.0,
        fall.highest if fall else 1.0,
        now.validation_accuracy - before.validation_accuracy,
        math.log10(max(now.metrics.get("lr", 0.0), 1e-9)) / 6.0,
        _log(opening.host_parameters, 6.0),
        parameters / max(1, opening.host_parameters) - 1.0,
        now.metrics.get("cr", 1.0) - 1.0,
        _log(opening.max_parameters - parameters, 6.0),
        under_way / slots,
        fossils / slots,
        len(pending) / slots,
    )
    return np.asarray(values, np.float32)


def pad(observation: Mapping[str, npt.NDArray[Any]], layout: Layout) -> Observation:
    """The same observation with room for more: runs of different hosts in one batch.

    Raises:
        ValueError: it is larger than the layout.
    """
    found: Observation = {}
    for name, (shape, kind, _, _) in shapes(layout).items():
        array = observation[name]
        if any(have > room for have, room in zip(array.shape, shape, strict=True)):
            raise ValueError(f"{name} of shape {array.shape} does not fit into {shape}")
        found[name] = np.full(shape, -1 if name in ("layer_edges", "slot_layer") else 0, kind)
        found[name][tuple(slice(size) for size in array.shape)] = array
    return found


def layout_of(observation: Mapping[str, npt.NDArray[Any]]) -> Layout:
    """How much room an observation has."""
    return Layout(
        layers=observation["layers"].shape[-2],
        slots=observation["slots"].shape[-2],
        blueprints=observation["blueprints"].shape[-2],
        edges=observation["layer_edges"].shape[-1],
    )
