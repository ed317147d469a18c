"""Reads observations into one vector for each slot, for each blueprint and for the run as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_ray.tamiyo import graph
from esper_ray.tamiyo.layers import GatLayer, SageLayer, Structure, structure

Tensors = Mapping[str, Tensor]
IDENTITIES = 64
"""Blueprints that have an embedding of their own; larger numbers share them."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the network makes of N observations: slots [N, S, D], blueprints [N, B, D], the whole run [N, 3 D]."""

    slots: Tensor
    blueprints: Tensor
    whole: Tensor


class GraphEncoder(nn.Module):
    """Four layers over the typed graph: GraphSAGE, GraphSAGE, GAT, GAT, each with a residual and a layer norm.

    What the boundary decided already is added behind them, so that the graph is read once for a boundary's micro-steps.

    Args:
        width: D.
        heads: of the attention; divides ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Linear(len(graph.LAYER_FEATURES), width)
        self.slots = nn.Linear(len(graph.SLOT_FEATURES), width)
        self.blueprints = nn.Linear(len(graph.BLUEPRINT_FEATURES), width)
        self.identities = nn.Embedding(IDENTITIES, width)
        self.run = nn.Linear(len(graph.GLOBAL_FEATURES), width)
        nn.init.normal_(self.identities.weight, std=0.3)
        self.graph_layers = nn.ModuleList(
            [SageLayer(width), SageLayer(width), GatLayer(width, heads), GatLayer(width, heads)]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.graph_layers)
        self.norm = nn.LayerNorm(width)
        self.pending = nn.ModuleDict(
            {name: nn.Linear(len(columns), width, bias=False) for name, columns in graph.PENDING.items()}
        )

    def stack(self) -> list[tuple[SageLayer | GatLayer, nn.LayerNorm]]:
        """The layers, each with its norm."""
        pairs = zip(self.graph_layers, self.norms, strict=True)
        return [cast(tuple[SageLayer | GatLayer, nn.LayerNorm], pair) for pair in pairs]

    def forward(self, observations: Tensors) -> Reading:
        """A batch of N observations of one layout, as `tamiyo.graph.shapes` has them."""
        edges = structure_of(observations)
        kind = self.run.weight.dtype
        tables = {name: observations[name].to(kind) for name in ("layers", "slots", "blueprints", "global")}
        pending = {name: tables[name][..., list(columns)] for name, columns in graph.PENDING.items()}
        before = {name: _without(tables[name], columns) for name, columns in graph.PENDING.items()}
        nodes = torch.cat(
            [
                self.layers(tables["layers"].flatten(0, 1)),
                self.slots(before["slots"].flatten(0, 1)),
                self.blueprints(before["blueprints"].flatten(0, 1))
                + self.identities(observations["blueprint_ids"].flatten().long() % IDENTITIES),
                self.run(before["global"]),
            ]
        )
        nodes = self.norm(nodes)
        for layer, norm in self.stack():
            nodes = norm(nodes + functional.relu(layer(nodes, edges)))
        _, slots, blueprints, run = nodes.split(edges.counts)
        slots = slots.view(len(run), -1, slots.shape[1]) + self.pending["slots"](pending["slots"])
        blueprints = blueprints.view(len(run), -1, slots.shape[2]) + self.pending["blueprints"](pending["blueprints"])
        run = run + self.pending["global"](pending["global"])
        there = (tables["slots"][..., :1] > 0).to(kind)
        # Of what is no slot nothing is heard: 0 changes neither the mean's sum nor the largest of what is positive.
        mean = (slots * there).sum(1) / there.sum(1).clamp_min(1.0)
        most = (slots.relu() * there).amax(1)
        return Reading(slots, blueprints, torch.cat([run, mean, most], dim=1))


def _without(table: Tensor, columns: Sequence[int]) -> Tensor:
    """The table with 0 in these columns."""
    return table.index_fill(-1, torch.tensor(columns, device=table.device), 0.0)


def structure_of(observations: Tensors) -> Structure:
    """The edges of a batch of N observations: host edges, slots at their layers, candidates, and all to the whole."""
    there = {
        "layer": observations["layers"][..., 0] > 0,
        "slot": observations["slots"][..., 0] > 0,
        "blueprint": observations["blueprints"][..., 0] > 0,
    }
    (count, layers), slots, blueprints = there["layer"].shape, there["slot"].shape[1], there["blueprint"].shape[1]
    each = torch.arange(count, device=there["layer"].device).unsqueeze(1)
    edges: dict[tuple[str, str, str, str], Tensor] = {}

    def connect(first: tuple[str, str], second: tuple[str, str], pair: Tensor) -> None:
        """Both ways: the port of one end is the port of the other end's edge back."""
        edges[(*first, *second)] = pair
        edges[(*second, *first)] = pair.flip(0)

    source, target = observations["layer_edges"].long().unbind(1)
    real = _points(source, there["layer"]) & _points(target, there["layer"])
    flow = torch.stack([(each * layers + source)[real], (each * layers + target)[real]])
    edges["layer", "flow", "layer", "flow"] = flow
    edges["layer", "back", "layer", "back"] = flow.flip(0)
    at = observations["slot_layer"].long()
    real = _points(at, there["layer"]) & there["slot"]
    numbers = each * slots + torch.arange(slots, device=at.device)
    connect(("layer", "slot"), ("slot", "layer"), torch.stack([(each * layers + at)[real], numbers[real]]))
    offered = (observations["candidates"][..., 0] > 0) & there["slot"].unsqueeze(2) & there["blueprint"].unsqueeze(1)
    one, slot, blueprint = offered.nonzero(as_tuple=True)
    pair = torch.stack([one * slots + slot, one * blueprints + blueprint])
    connect(("slot", "blueprint"), ("blueprint", "slot"), pair)
    for name, exists in there.items():
        place = exists.flatten().nonzero().squeeze(1)
        pair = torch.stack([place, torch.div(place, exists.shape[1], rounding_mode="floor")])
        connect((name, "global"), ("global", name), pair)
    return structure((count * layers, count * slots, count * blueprints, count), edges)


def _points(place: Tensor, there: Tensor) -> Tensor:
    """Whether each index is not padding and what it points at exists."""
    return (place >= 0) & there.gather(1, place.clamp_min(0))
