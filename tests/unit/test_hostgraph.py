"""The host's graph is what it computes: skips, functions and repeated calls included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_ray import config as configuration
from esper_ray.contracts.ports import LAYER_STATISTICS
from esper_ray.tasks import build_task
from esper_ray.tasks.hostgraph import trace
from esper_ray.tolaria.statistics import FLOOR, layer_statistics


class Skipping(nn.Module):
    """a -> relu -> b, with a skip from a to the head, and b called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.relu, self.unused = nn.ReLU(inplace=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y: Tensor = self.head(h.clone() + self.b(self.b(self.relu(h.sin()))) * 2)
        return y


def test_edges_follow_functions_additions_and_repeated_calls_and_unused_layers_are_left_out():
    graph = trace(Skipping(), torch.randn(2, 4))
    names = [layer.name for layer in graph.layers]
    assert names == ["a", "relu", "b", "head"]
    found = {(names[source], names[target]) for source, target in graph.edges}
    assert found == {("a", "relu"), ("relu", "b"), ("a", "head"), ("b", "head")}
    assert [layer.kind for layer in graph.layers] == ["linear", "activation", "linear", "linear"]
    assert (graph.layers[0].inputs, graph.layers[0].outputs, graph.layers[0].parameters) == (4, 8, 40)


def test_the_task_s_host_is_a_chain_with_its_slots_behind_its_stages(tmp_path: Path):
    config = configuration.load(None, [f"home={tmp_path}", "run.dataset=digits"])
    task = build_task(config.run, tmp_path, torch.device("cpu"))
    graph = task.graph
    assert [layer.kind for layer in graph.layers] == ["conv", "norm", "activation"] * 3 + ["linear"]
    assert graph.edges == tuple((i, i + 1) for i in range(9))
    assert [graph.layers[index].name for index in graph.slot_layers] == ["stage1.2", "stage2.2", "stage3.2"]
    with pytest.raises(ValueError, match="nowhere"):
        trace(task.model, task.data.train.inputs[:2], ["nowhere"])


def test_statistics_are_the_logarithms_of_root_mean_squares_and_the_floor_where_there_is_nothing():
    model = Skipping()
    graph = trace(model, torch.randn(2, 4))
    assert (layer_statistics(graph, model) == FLOOR).all()
    model(torch.randn(5, 4)).square().mean().backward()
    found = layer_statistics(graph, model)
    assert found.shape == (4, len(LAYER_STATISTICS))
    weights = torch.cat([p.detach().flatten() for p in model.a.parameters()])
    gradients = torch.cat([p.grad.flatten() for p in model.a.parameters() if p.grad is not None])
    expected = [float(each.square().mean().sqrt().log10()) for each in (weights, gradients)]
    np.testing.assert_allclose(found[0], [*expected, expected[1] - expected[0]], rtol=1e-4)
    assert (found[1] == FLOOR).all()


def test_a_gradient_that_is_not_finite_stays_a_finite_statistic():
    model = Skipping()
    graph = trace(model, torch.randn(2, 4))
    model(torch.full((5, 4), float("nan"))).sum().backward()
    assert np.isfinite(layer_statistics(graph, model)).all()
