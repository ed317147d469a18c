"""The network for one observation, in numpy on the very weights of the torch modules.

A boundary asks about one small graph, where torch spends several times longer on starting its some 300 operations than
on the arithmetic. Sums over edges are products with small dense matrices here. It is the same function as
`tamiyo.encoder` and `tamiyo.policy` compute for a batch; the tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper_ray.tamiyo.actions import GERMINATE, NO_OP, SCHEDULES
from esper_ray.tamiyo.encoder import IDENTITIES, structure_of
from esper_ray.tamiyo.graph import PENDING
from esper_ray.tamiyo.layers import LEAK, PORT_COUNTS, GatLayer, Structure

if TYPE_CHECKING:
    from esper_ray.tamiyo.policy import GraphPolicy

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]
Affine = tuple[Floats, Floats | None]
HUGE = 1e30
LARGEST = 300
"""Nodes up to which the dense matrices are the quicker way."""

_STEEPEST = 300.0
"""Scores of the attention beyond +-300 count as that: their exponentials stay finite in float64 without a shift."""
_KEPT = 64
_STRUCTURE = ("layers", "slots", "blueprints", "candidates", "layer_edges", "slot_layer")


@dataclass(frozen=True, slots=True)
class Wiring:
    """A `Structure` for numpy, its edges ordered by the port they enter. M nodes, R rows of ports, E edges.

    Attributes:
        mean: float32 [M, R], which rows a node of a `SageLayer` sums, with which weight; its own row is among them.
        own: float32 [1, M, R], the nodes' own rows alone.
        times: float64 [E, 1], how often the same edge is there.
        starts: int, the first edge of each port that edges enter by; ``group`` [E] says which of these an edge enters.
    """

    counts: tuple[int, ...]
    source: Indices
    port: Indices
    target: Indices
    mean: Floats
    own: Floats
    times: npt.NDArray[np.float64]
    starts: Indices
    group: Indices


def wiring(edges: Structure) -> Wiring:
    """Order the edges, and lay them out as matrices."""
    order = torch.argsort(edges.port, stable=True)
    source, target, port = (part[order].numpy() for part in (edges.source, edges.target, edges.port))
    nodes = len(edges.own)
    own, times = np.zeros((nodes, edges.rows), np.float32), np.zeros((nodes, edges.rows))
    own[np.arange(nodes), edges.own.numpy()] = 1.0
    np.add.at(times, (target, source), 1.0)
    mean = own.copy()
    np.add.at(mean, (target, source), edges.share[order].numpy()[:, 0])
    first = np.ones(len(port), bool)
    first[1:] = port[1:] != port[:-1]
    return Wiring(
        counts=edges.counts,
        source=source,
        port=port,
        target=target,
        mean=mean,
        own=own[None],
        times=times[target, source][:, None],
        starts=np.flatnonzero(first),
        group=np.cumsum(first) - 1,
    )


@dataclass(frozen=True, slots=True)
class Decided:
    """What was chosen: four choices and their log-probabilities, the value, logits of the risk [5]."""

    actions: list[int]
    log_probs: list[float]
    value: float
    risk: Floats


class Single:
    """One policy's weights as numpy sees them: views, so that what an optimiser changes is changed here too."""

    def __init__(self, policy: GraphPolicy) -> None:
        encoder = policy.encoder
        self._inputs = tuple(_affine(each) for each in (encoder.layers, encoder.slots, encoder.blueprints, encoder.run))
        self._identities = _array(encoder.identities.weight)
        self._norm = _Norm(encoder.norm)
        self._graph_layers = [
            (
                layer.heads if isinstance(layer, GatLayer) else 0,
                [_array(weight).T for weight in layer.linear.by_type()],
                _Norm(norm),
            )
            for layer, norm in encoder.stack()
        ]
        self._heads = {name: _affine(each) for name, each in policy.named_children() if isinstance(each, nn.Linear)}
        self._pending = {name: _array(encoder.get_parameter(f"pending.{name}.weight")).T for name in PENDING}
        self._slot_operation = _array(policy.slot_operation.weight)
        self._wirings: dict[tuple[bytes, ...], Wiring] = {}

    def _wiring(self, seen: Arrays) -> Wiring:
        """The observation's structure; it is worked out once for each that comes."""
        key = tuple([_structure_bytes(name, seen[name]) for name in _STRUCTURE])
        found = self._wirings.get(key)
        if found is None:
            if len(self._wirings) >= _KEPT:
                self._wirings.clear()
            batch = {name: torch.from_numpy(seen[name]).unsqueeze(0) for name in _STRUCTURE}
            found = self._wirings[key] = wiring(structure_of(batch))
        return found

    def decide(self, seen: Arrays, noise: Floats | None, memo: dict[str, Floats]) -> Decided:
        """Choose for one observation.

        Args:
            seen: its arrays, as `graph.observe` gives them.
            noise: Gumbel noise for all choices of the four heads, one after the other; None is greedy.
            memo: empty for a boundary's first micro-step; the same again for its others, which then take a tenth.
        """
        # What is not finite is the caller's to judge, and shows in what is returned.
        with np.errstate(all="ignore"):
            if not memo:
                memo["nodes"] = self._read(seen)
            slots, blueprints, whole = self._add_pending(seen, memo["nodes"])
            trunk = np.maximum(self._linear("trunk", whole), 0.0)
            half = len(trunk) // 2
            deciding, judging = trunk[:half], trunk[half:]
            outlook = self._linear("outlook", judging)
            actions, log_probs = self._choose(seen, slots, blueprints, deciding, noise)
        return Decided(actions, log_probs, float(outlook[0]), outlook[1:])

    def _read(self, seen: Arrays) -> Floats:
        """The vectors of all nodes [M, D], without what is pending."""
        edges = self._wiring(seen)
        width = self._identities.shape[1]
        nodes = np.empty((sum(edges.counts), width), np.float32)
        ends = np.cumsum(edges.counts)
        for name, affine, end, count in zip(
            ("layers", "slots", "blueprints", "global"), self._inputs, ends, edges.counts, strict=True
        ):
            table = seen[name].astype(np.float32)
            table[..., PENDING.get(name, ())] = 0.0
            nodes[end - count : end] = _product(table, affine)
        nodes[ends[1] : ends[2]] += self._identities[seen["blueprint_ids"] % IDENTITIES]
        nodes = self._norm(nodes)
        for heads, weights, norm in self._graph_layers:
            rows = _rows(nodes, weights, edges.counts)
            heard = _attend(rows, edges, heads, width) if heads else edges.mean @ rows
            nodes = norm(nodes + np.maximum(heard, 0.0))
        return nodes

    def _add_pending(self, seen: Arrays, nodes: Floats) -> tuple[Floats, Floats, Floats]:
        """The vectors of the slots [S, D], of the blueprints [B, D], and of the whole run [3 D]."""
        layers, count = len(seen["layers"]), len(seen["slots"])
        slots, blueprints, run = (
            part + _float32(seen[name])[..., PENDING[name]] @ self._pending[name]
            for name, part in (
                ("slots", nodes[layers : layers + count]),
                ("blueprints", nodes[layers + count : -1]),
                ("global", nodes[-1]),
            )
        )
        there = (seen["slots"][:, :1] > 0).astype(np.float32)
        mean = (slots * there).sum(0) / max(1.0, float(there.sum()))
        return slots, blueprints, np.concatenate([run, mean, (np.maximum(slots, 0.0) * there).max(0)])

    def _choose(
        self, seen: Arrays, slots: Floats, blueprints: Floats, deciding: Floats, noise: Floats | None
    ) -> tuple[list[int], list[float]]:
        offered = seen["mask_blueprint"] != 0
        legal = seen["mask_slot"] != 0
        legal[GERMINATE] &= offered.any(1)
        operations = (seen["mask_operation"] != 0) & legal.any(1)
        operations[NO_OP] = True
        sizes = (len(operations), len(slots), len(blueprints), len(SCHEDULES))

        actions, log_probs = [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]

        def pick(place: int, logits: Floats, allowed: npt.NDArray[np.bool_]) -> int:
            start = sum(sizes[:place])
            drawn = None if noise is None else noise[start : start + sizes[place]]
            actions[place], log_probs[place] = _pick(logits, allowed, drawn)
            return actions[place]

        operation = pick(0, self._linear("operation", deciding), operations)
        if operation == NO_OP:
            return actions, log_probs
        query = self._linear("slot_query", deciding) + self._slot_operation[operation]
        scores = self._linear("slot_score", np.maximum(self._linear("slot_key", slots) + query, 0.0))[:, 0]
        slot = pick(1, scores, legal[operation])
        if operation != GERMINATE:
            return actions, log_probs
        context = np.concatenate([deciding, slots[slot]])
        keys = self._linear("blueprint_key", blueprints)
        keys += self._linear("blueprint_cost", _float32(seen["candidates"][slot]))
        keys += self._linear("blueprint_query", context)
        pick(2, self._linear("blueprint_score", np.maximum(keys, 0.0))[:, 0], offered[slot])
        pick(3, self._linear("schedule", context), np.ones(len(SCHEDULES), bool))
        return actions, log_probs

    def _linear(self, name: str, given: Floats) -> Floats:
        return _product(given, self._heads[name])


def _structure_bytes(name: str, array: npt.NDArray[Any]) -> bytes:
    """What of an array the structure depends on: all of the edges, of other tables their size and what is there."""
    return array.tobytes() if name in ("layer_edges", "slot_layer") else (array[..., 0] > 0).tobytes()


def _rows(nodes: Floats, weights: list[Floats], counts: tuple[int, ...]) -> Floats:
    """`TypedLinear`: [M, D] to [R, O]."""
    outputs = weights[0].shape[1] // PORT_COUNTS[0]
    rows = np.empty((sum(map(int.__mul__, counts, PORT_COUNTS)), outputs), np.float32)
    node = row = 0
    for count, weight, ports in zip(counts, weights, PORT_COUNTS, strict=True):
        out = rows[row : row + count * ports].reshape(count, ports * outputs)
        np.matmul(nodes[node : node + count], weight, out=out)
        node, row = node + count, row + count * ports
    return rows


def _attend(rows: Floats, edges: Wiring, heads: int, width: int) -> Floats:
    """`GatLayer`: [R, D + 2 H] to [M, D]."""
    asked = rows[:, width:]
    scores = asked[:, :heads].take(edges.source, 0) + asked[:, heads:].take(edges.port, 0)
    scores = np.maximum(scores, LEAK * scores).astype(np.float64)
    weights = np.repeat(edges.own, heads, 0)
    if len(scores):
        exponents = np.exp(np.clip(scores, -_STEEPEST, _STEEPEST, out=scores), out=scores)
        exponents *= edges.times / np.add.reduceat(exponents, edges.starts, 0).take(edges.group, 0)
        weights[:, edges.target, edges.source] = exponents.T
    values = rows[:, :width].reshape(-1, heads, width // heads).transpose(1, 0, 2)
    heard: Floats = np.matmul(weights, values).transpose(1, 0, 2).reshape(-1, width)
    return heard


def small(obs: Mapping[str, Tensor]) -> bool:
    """Whether there is one observation only, and its graph is small enough."""
    return len(obs["global"]) == 1 and fits(*(obs[name].shape[1] for name in ("layers", "slots", "blueprints")))


def fits(layers: int, slots: int, blueprints: int) -> bool:
    """Whether a graph is small enough."""
    return layers + slots + blueprints < LARGEST


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().numpy()
    return found


def _float32(array: npt.NDArray[Any]) -> Floats:
    return array.astype(np.float32, copy=False)


def _affine(linear: nn.Linear) -> Affine:
    return _array(linear.weight).T, None if linear.bias is None else _array(linear.bias)


def _product(given: Floats, affine: Affine) -> Floats:
    """[..., K] times [K, O], plus [O]."""
    found: Floats = given @ affine[0]
    if affine[1] is not None:
        found += affine[1]
    return found


class _Norm:
    """A layer norm on [M, D]; torch's own is one operation, numpy would need eight."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._arguments = tuple(norm.normalized_shape), norm.weight.detach(), norm.bias.detach(), norm.eps

    def __call__(self, nodes: Floats) -> Floats:
        found: Floats = torch.layer_norm(torch.from_numpy(nodes), *self._arguments).numpy()
        return found


def _pick(logits: Floats, legal: npt.NDArray[np.bool_], noise: Floats | None) -> tuple[int, float]:
    """A choice and its log-probability, as `masked_log_probs` has it."""
    bounded = np.where(legal, np.clip(logits, -HUGE, HUGE), -np.inf)
    bounded = bounded - bounded.max()
    log_probs = bounded - np.log(np.exp(bounded).sum())
    scores = log_probs if noise is None else log_probs + noise
    choice = int(np.where(legal, scores, -np.inf).argmax())
    return choice, float(log_probs[choice])
