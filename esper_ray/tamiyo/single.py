"""The network for one observation, on the very weights of the torch modules, with numpy for all that is small.

A boundary asks about one small graph, where torch spends several times longer on starting its some 300 operations than
on the arithmetic. What is heavy, or would use threads of numpy's own, is torch's here too: products, sums over edges,
layer norms. It is the same function as `tamiyo.encoder` and `tamiyo.policy` compute for a batch; the tests hold the
two together.
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
from esper_ray.tamiyo.layers import LEAK, PORT_COUNTS, GatLayer, Structure

if TYPE_CHECKING:
    from esper_ray.tamiyo.policy import GraphPolicy

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]
Affine = tuple[Tensor, Tensor | None]
HUGE = 1e30
LARGEST = 1000
"""Nodes up to which numpy's quick start of an operation counts."""

_KEPT = 64


@dataclass(frozen=True, slots=True)
class Wiring:
    """A `Structure` for numpy, its edges ordered by the port they enter. M nodes, E edges, P ports in use.

    Attributes:
        starts: int [P], the first edge of each port; ``group`` [E] says which of these ports an edge enters.
    """

    counts: tuple[int, ...]
    own: Indices
    source: Indices
    port: Indices
    target: Tensor
    share: Floats
    starts: Indices
    group: Indices


def wiring(edges: Structure) -> Wiring:
    """Order the edges."""
    order = torch.argsort(edges.port, stable=True)
    port = edges.port[order].numpy()
    first = np.ones(len(port), bool)
    first[1:] = port[1:] != port[:-1]
    return Wiring(
        counts=edges.counts,
        own=edges.own.numpy(),
        source=edges.source[order].numpy(),
        port=port,
        target=edges.target[order],
        share=edges.share[order].numpy(),
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
                [weight.detach().t() for weight in layer.linear.by_type()],
                _Norm(norm),
            )
            for layer, norm in encoder.stack()
        ]
        self._heads = {name: _affine(each) for name, each in policy.named_children() if isinstance(each, nn.Linear)}
        self._slot_operation = _array(policy.slot_operation.weight)
        self._wirings: dict[tuple[object, ...], Wiring] = {}

    def _wiring(self, obs: Mapping[str, Tensor], seen: Arrays) -> Wiring:
        """The observation's structure; it is worked out once for each that comes."""
        key = (
            *(seen[name].shape for name in ("layers", "slots", "candidates", "layer_edges")),
            *(seen[name].tobytes() for name in ("layer_edges", "slot_layer")),
            *((seen[name][..., 0] > 0).tobytes() for name in ("layers", "slots", "blueprints", "candidates")),
        )
        found = self._wirings.get(key)
        if found is None:
            if len(self._wirings) >= _KEPT:
                self._wirings.clear()
            found = self._wirings[key] = wiring(structure_of(obs))
        return found

    def decide(self, obs: Mapping[str, Tensor], noise: Floats | None) -> Decided:
        """Choose for one observation.

        Args:
            obs: its arrays, with a first axis of length 1.
            noise: Gumbel noise for all choices of the four heads, one after the other; None is greedy.
        """
        seen = {name: array.numpy() for name, array in obs.items()}
        edges = self._wiring(obs, seen)
        # What is not finite is the caller's to judge, and shows in what is returned.
        with np.errstate(all="ignore"):
            slots, blueprints, whole = self._read(seen, edges)
            trunk = np.maximum(self._linear("trunk", whole), 0.0)
            half = trunk.shape[1] // 2
            deciding, judging = trunk[:, :half], trunk[:, half:]
            outlook = self._linear("outlook", judging)[0]
            actions, log_probs = self._choose(seen, slots, blueprints, deciding, noise)
        return Decided(actions, log_probs, float(outlook[0]), outlook[1:])

    def _read(self, seen: Arrays, edges: Wiring) -> tuple[Floats, Floats, Floats]:
        parts = [
            _product(_float32(seen[name]).reshape(-1, seen[name].shape[-1]), *affine)
            for name, affine in zip(("layers", "slots", "blueprints", "global"), self._inputs, strict=True)
        ]
        parts[2] += self._identities[seen["blueprint_ids"][0].astype(np.int64, copy=False) % IDENTITIES]
        nodes = self._norm(np.concatenate(parts))
        for heads, weights, norm in self._graph_layers:
            rows = _rows(nodes, weights, edges.counts)
            heard = _attend(rows, edges, heads, nodes.shape[1]) if heads else _mean(rows, edges)
            nodes = norm(nodes + np.maximum(heard, 0.0))
        layers, slot_count, _, _ = edges.counts
        slots, blueprints, run = nodes[layers : layers + slot_count], nodes[layers + slot_count : -1], nodes[-1]
        there = (seen["slots"][0, :, :1] > 0).astype(np.float32)
        mean = (slots * there).sum(0) / max(1.0, float(there.sum()))
        return slots, blueprints, np.concatenate([run, mean, (np.maximum(slots, 0.0) * there).max(0)])[None]

    def _choose(
        self, seen: Arrays, slots: Floats, blueprints: Floats, deciding: Floats, noise: Floats | None
    ) -> tuple[list[int], list[float]]:
        offered = seen["mask_blueprint"][0] != 0
        legal = seen["mask_slot"][0] != 0
        legal[GERMINATE] &= offered.any(1)
        operations = (seen["mask_operation"][0] != 0) & legal.any(1)
        operations[NO_OP] = True
        ends = np.cumsum([len(operations), len(slots), len(blueprints), len(SCHEDULES)])
        parts = [None] * 4 if noise is None else np.split(noise, ends[:-1])

        actions, log_probs = [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]
        operation, log_probs[0] = _pick(self._linear("operation", deciding)[0], operations, parts[0])
        actions[0] = operation
        if operation == NO_OP:
            return actions, log_probs
        query = self._linear("slot_query", deciding) + self._slot_operation[operation]
        scores = self._linear("slot_score", np.maximum(self._linear("slot_key", slots) + query, 0.0))[:, 0]
        actions[1], log_probs[1] = _pick(scores, legal[operation], parts[1])
        if operation != GERMINATE:
            return actions, log_probs
        slot = actions[1]
        context = np.concatenate([deciding[0], slots[slot]])[None]
        costs = _float32(seen["candidates"][0, slot])
        keys = self._linear("blueprint_key", blueprints) + self._linear("blueprint_cost", costs)
        scores = self._linear("blueprint_score", np.maximum(keys + self._linear("blueprint_query", context), 0.0))
        actions[2], log_probs[2] = _pick(scores[:, 0], offered[slot], parts[2])
        actions[3], log_probs[3] = _pick(self._linear("schedule", context)[0], np.ones(len(SCHEDULES), bool), parts[3])
        return actions, log_probs

    def _linear(self, name: str, given: Floats) -> Floats:
        return _product(given, *self._heads[name])


def _rows(nodes: Floats, weights: list[Tensor], counts: tuple[int, ...]) -> Floats:
    """`TypedLinear`: [M, D] to [R, O]."""
    parts, start = [], 0
    for count, weight, each in zip(counts, weights, PORT_COUNTS, strict=True):
        parts.append(_product(nodes[start : start + count], weight).reshape(count * each, -1))
        start += count
    return np.concatenate(parts)


def _mean(rows: Floats, edges: Wiring) -> Floats:
    """`SageLayer`: [R, D] to [M, D]."""
    return _hear(rows.take(edges.own, 0), edges, rows.take(edges.source, 0) * edges.share)


def _attend(rows: Floats, edges: Wiring, heads: int, width: int) -> Floats:
    """`GatLayer`: [R, D + 2 H] to [M, D]."""
    values, asked = rows[:, :width].copy(), rows[:, width:].copy()
    scores = asked.take(edges.source, 0)[:, :heads] + asked.take(edges.port, 0)[:, heads:]
    scores = np.maximum(scores, LEAK * scores)
    if len(scores):
        exponents = np.exp(scores - np.maximum.reduceat(scores, edges.starts).take(edges.group, 0))
        scores = exponents / np.add.reduceat(exponents, edges.starts).take(edges.group, 0)
    read = values.take(edges.source, 0).reshape(-1, heads, width // heads) * scores[:, :, None]
    return _hear(values.take(edges.own, 0), edges, read.reshape(-1, width))


def _hear(nodes: Floats, edges: Wiring, read: Floats) -> Floats:
    """Add to each node [M, D] what its edges read [E, D]."""
    torch.from_numpy(nodes).index_add_(0, edges.target, torch.from_numpy(read))
    return nodes


def small(obs: Mapping[str, Tensor]) -> bool:
    """Whether there is one observation only, and its graph is small enough."""
    nodes = obs["layers"].shape[1] + obs["slots"].shape[1] + obs["blueprints"].shape[1] + 1
    return len(obs["global"]) == 1 and nodes <= LARGEST


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().numpy()
    return found


def _float32(array: npt.NDArray[Any]) -> Floats:
    return array.astype(np.float32, copy=False)


def _affine(linear: nn.Linear) -> Affine:
    return linear.weight.detach().t(), None if linear.bias is None else linear.bias.detach()


def _product(left: Floats, weight: Tensor, bias: Tensor | None = None) -> Floats:
    """[N, K] times [K, O], plus [O]."""
    given = torch.from_numpy(left)
    found: Floats = (torch.mm(given, weight) if bias is None else torch.addmm(bias, given, weight)).numpy()
    return found


class _Norm:
    """A layer norm on [M, D]."""

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
