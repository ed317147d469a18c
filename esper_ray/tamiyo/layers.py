"""The layers of Tamiyo's graph network: GraphSAGE and GAT over typed nodes, by dense products and `index_add`.

Nodes of a batch of N graphs lie type after type: all layers, all slots, all blueprints, all globals. A node type has
*ports*, one for each kind of neighbour; an edge leaves its source by a port and enters its target by one. Port 0 is
the node itself. One matrix product per node type gives every node a row of outputs for each of its ports, and these
rows, stacked, are what edges index: so all edge types share one gather and one `index_add`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NODE_TYPES = ("layer", "slot", "blueprint", "global")
PORTS: dict[str, tuple[str, ...]] = {
    "layer": ("self", "flow", "back", "slot", "global"),
    "slot": ("self", "layer", "blueprint", "global"),
    "blueprint": ("self", "slot", "global"),
    "global": ("self", "layer", "slot", "blueprint"),
}
EDGE_TYPES: tuple[tuple[str, str, str, str], ...] = (
    ("layer", "flow", "layer", "flow"),
    ("layer", "back", "layer", "back"),
    ("layer", "slot", "slot", "layer"),
    ("slot", "layer", "layer", "slot"),
    ("slot", "blueprint", "blueprint", "slot"),
    ("blueprint", "slot", "slot", "blueprint"),
    ("layer", "global", "global", "layer"),
    ("global", "layer", "layer", "global"),
    ("slot", "global", "global", "slot"),
    ("global", "slot", "slot", "global"),
    ("blueprint", "global", "global", "blueprint"),
    ("global", "blueprint", "blueprint", "global"),
)
"""(source's type, the port it leaves by, target's type, the port it enters by)."""

PORT_COUNTS = tuple(len(PORTS[name]) for name in NODE_TYPES)
LEAK = 0.2
"""Slope of the attention's leaky ReLU below 0."""


@dataclass(frozen=True, slots=True)
class Structure:
    """Who hears whom: index tensors that all layers of one forward pass share. M nodes, R rows of ports, E edges.

    Attributes:
        counts: nodes of each type, in the order of `NODE_TYPES`; they sum to M.
        own: int64 [M], each node's row of port 0.
        source: int64 [E], the row that an edge reads.
        target: int64 [E], the node that it feeds.
        port: int64 [E], the row of the port it enters by: edges of one type into one node share it.
        share: float [E, 1], one over the number of edges that enter by that port.
        rows: R.
    """

    counts: tuple[int, ...]
    own: Tensor
    source: Tensor
    target: Tensor
    port: Tensor
    share: Tensor
    rows: int


def structure(counts: tuple[int, ...], edges: dict[tuple[str, str, str, str], Tensor]) -> Structure:
    """Build the index tensors.

    Args:
        counts: nodes of each type.
        edges: for some of `EDGE_TYPES` int64 [2, E]: source and target, numbered within their types.
    """
    first_node = dict(zip(NODE_TYPES, itertools.accumulate((0, *counts)), strict=False))
    sizes = [count * ports for count, ports in zip(counts, PORT_COUNTS, strict=True)]
    first_row = dict(zip(NODE_TYPES, itertools.accumulate((0, *sizes)), strict=False))
    device = next((pair.device for pair in edges.values()), None)
    own = [
        torch.arange(first_row[name], first_row[name] + size, ports, device=device)
        for name, size, ports in zip(NODE_TYPES, sizes, PORT_COUNTS, strict=True)
    ]
    source, target, port = [], [], []
    for (from_type, leaves, to_type, enters), pair in edges.items():
        source.append(first_row[from_type] + pair[0] * len(PORTS[from_type]) + PORTS[from_type].index(leaves))
        target.append(first_node[to_type] + pair[1])
        port.append(first_row[to_type] + pair[1] * len(PORTS[to_type]) + PORTS[to_type].index(enters))
    empty = [torch.zeros(0, dtype=torch.int64, device=device)]
    ports = torch.cat(port or empty)
    share = 1.0 / torch.bincount(ports, minlength=sum(sizes))[ports].to(torch.get_default_dtype())
    return Structure(
        counts=tuple(counts),
        own=torch.cat(own),
        source=torch.cat(source or empty),
        target=torch.cat(target or empty),
        port=ports,
        share=share.unsqueeze(1),
        rows=sum(sizes),
    )


class TypedLinear(nn.Module):
    """One matrix for each node type and port, without bias, as blocks of one parameter in the order of `PORTS`.

    Args:
        width: D, of the input.
        outputs: O, for each port.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(sum(PORT_COUNTS) * outputs, width))
        nn.init.normal_(self.weight, std=(1.0 / (2.0 * width)) ** 0.5)

    def block(self, node_type: str, port: str) -> Tensor:
        """[O, D], the matrix of one port."""
        place = NODE_TYPES.index(node_type)
        start = (sum(PORT_COUNTS[:place]) + PORTS[node_type].index(port)) * self.outputs
        return self.weight[start : start + self.outputs]

    def by_type(self) -> tuple[Tensor, ...]:
        """For each node type the matrices of its ports, [ports * O, D]."""
        return torch.split(self.weight, [count * self.outputs for count in PORT_COUNTS])

    def forward(self, nodes: Tensor, counts: tuple[int, ...]) -> Tensor:
        """[M, D] to the rows of all ports, [R, O]."""
        parts = zip(torch.split(nodes, list(counts)), self.by_type(), strict=True)
        return torch.cat([functional.linear(part, weight).view(-1, self.outputs) for part, weight in parts])


class SageLayer(nn.Module):
    """GraphSAGE (Hamilton, Ying and Leskovec 2017, algorithm 1) with the mean, one matrix for each type of edge.

    ``y_i = W_self x_i + sum over edge types t of W_t mean over j in N_t(i) of x_j``
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = TypedLinear(width, width)

    def forward(self, nodes: Tensor, edges: Structure) -> Tensor:
        """[M, D] to [M, D]; the mean over no neighbours is 0."""
        rows: Tensor = self.linear(nodes, edges.counts)
        heard = rows.index_select(0, edges.source) * edges.share
        return rows.index_select(0, edges.own).index_add(0, edges.target, heard)


class GatLayer(nn.Module):
    """Graph attention (Velickovic et al. 2018, equations 1 to 5), one set of weights for each type of edge.

    ``y_i = W_self x_i + sum over t, j in N_t(i) of alpha_ij W_t x_j``, with alpha the softmax over N_t(i) of
    ``leaky_relu(s_t . x_j + d_t . x_i)`` for each head. The paper's attention vectors act on the transformed features;
    here they are folded with that matrix, ``s = W^T a``, and so are outputs of the same product.

    Args:
        width: D; a head has D / heads of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.linear = TypedLinear(width, width + 2 * heads)

    def forward(self, nodes: Tensor, edges: Structure) -> Tensor:
        """[M, D] to [M, D]; a node without neighbours hears nothing."""
        width, heads = self.width, self.heads
        rows: Tensor = self.linear(nodes, edges.counts)
        read = rows.index_select(0, edges.source)
        asked = rows[:, width + heads :].index_select(0, edges.port)
        scores = functional.leaky_relu(read[:, width : width + heads] + asked, LEAK)
        weights = segment_softmax(scores, edges.port, edges.rows)
        heard = (read[:, :width].view(-1, heads, width // heads) * weights.unsqueeze(2)).view(-1, width)
        return rows[:, :width].index_select(0, edges.own).index_add(0, edges.target, heard)


def segment_softmax(scores: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Softmax over the entries of each segment.

    Args:
        scores: [E, H].
        segment: int64 [E], less than ``segments``.
    """
    shape = (segments, scores.shape[1])
    with torch.no_grad():
        # Subtracting the largest changes no value, so that it needs no gradient.
        index = segment.unsqueeze(1).expand_as(scores)
        largest = scores.new_zeros(shape).scatter_reduce(0, index, scores, "amax", include_self=False)
    exponents = (scores - largest.index_select(0, segment)).exp()
    total = scores.new_zeros(shape).index_add(0, segment, exponents)
    return exponents / total.index_select(0, segment)
