"""Tamiyo's network: its layers are the published ones, nothing illegal comes out, and one seed gives one answer."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.tamiyo import graph
from esper_ray.tamiyo.actions import CULL, GERMINATE, NO_OP, Choice, Masks
from esper_ray.tamiyo.encoder import structure_of
from esper_ray.tamiyo.graph import Layout, Observation
from esper_ray.tamiyo.layers import EDGE_TYPES, NODE_TYPES, GatLayer, SageLayer, structure
from esper_ray.tamiyo.policy import GraphPolicy, GraphPolicyConfig, masked_log_probs

LAYOUT = Layout(layers=6, slots=3, blueprints=7, edges=8)
SMALL = GraphPolicyConfig(width=16, heads=4)


def observation(seed: int, layout: Layout = LAYOUT) -> Observation:
    """Random features, edges and masks, with some nodes and edges missing."""
    random = np.random.default_rng(seed)
    found: Observation = {}
    for name, (shape, kind, _, _) in graph.shapes(layout).items():
        if kind is np.float32:
            found[name] = random.normal(0.0, 1.0, shape).astype(np.float32)
    for name in ("layers", "slots", "blueprints", "candidates"):
        found[name][..., 0] = random.random(found[name].shape[:-1]) < 0.8
    found["blueprint_ids"] = random.integers(1, 200, layout.blueprints)
    found["layer_edges"] = random.integers(-1, layout.layers, (2, layout.edges))
    found["slot_layer"] = random.integers(-1, layout.layers, layout.slots)
    return {**found, **masks(random, layout)}


def masks(random: np.random.Generator, layout: Layout) -> Observation:
    blueprint = (random.random((layout.slots, layout.blueprints)) < 0.3).astype(np.int8)
    slot = (random.random((4, layout.slots)) < 0.5).astype(np.int8)
    slot[NO_OP] = 0
    slot[GERMINATE] &= blueprint.any(1)
    operation = slot.any(1).astype(np.int8)
    operation[NO_OP] = 1
    return {"mask_operation": operation, "mask_slot": slot, "mask_blueprint": blueprint}


def stacked(*seen: Observation) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([each[name] for each in seen])) for name in seen[0]}


def policy(seed: int = 0, scale: float = 1.0, config: GraphPolicyConfig = SMALL) -> GraphPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = GraphPolicy(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_edges(random: np.random.Generator, counts: tuple[int, ...]) -> dict[tuple[str, ...], torch.Tensor]:
    """About one edge for two nodes, so that many have none; some edge types are missing altogether."""
    size = dict(zip(NODE_TYPES, counts, strict=True))
    return {
        kind: torch.from_numpy(
            np.stack([random.integers(0, size[kind[0]], number), random.integers(0, size[kind[2]], number)])
        )
        for kind in EDGE_TYPES
        if (number := int(random.integers(0, size[kind[2]] + 2)))
    }


def oracles() -> tuple[type[torch.nn.Module], type[torch.nn.Module]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn = pytest.importorskip("torch_geometric.nn", reason="the development extra brings torch_geometric")
    return nn.SAGEConv, nn.GATConv


def own(layer: SageLayer | GatLayer, parts: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    return {name: part @ layer.linear.block(name, "self")[:width].T for name, part in parts.items()}


@pytest.mark.parametrize("seed", range(20))
def test_the_sage_layer_is_the_sum_of_the_librarys_layers_over_edge_types(seed):
    sage, _ = oracles()
    random, counts, width = np.random.default_rng(seed), (7, 3, 9, 2), 12
    edges = random_edges(random, counts)
    parts = {name: torch.randn(count, width) for name, count in zip(NODE_TYPES, counts, strict=True)}
    layer = SageLayer(width)
    expected = own(layer, parts, width)
    for (from_type, leaves, to_type, _), pair in edges.items():
        oracle = sage((width, width), width, aggr="mean", root_weight=False, bias=False)
        with torch.no_grad():
            oracle.lin_l.weight.copy_(layer.linear.block(from_type, leaves))
        expected[to_type] = expected[to_type] + oracle((parts[from_type], parts[to_type]), pair)
    found = layer(torch.cat(list(parts.values())), structure(counts, edges))
    torch.testing.assert_close(found, torch.cat(list(expected.values())), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_the_attention_layer_is_the_sum_of_the_librarys_layers_over_edge_types(seed):
    _, gat = oracles()
    random, counts, width, heads = np.random.default_rng(seed), (7, 3, 9, 2), 12, 4
    edges = random_edges(random, counts)
    parts = {name: torch.randn(count, width) for name, count in zip(NODE_TYPES, counts, strict=True)}
    layer = GatLayer(width, heads)
    expected = own(layer, parts, width)
    for (from_type, leaves, to_type, enters), pair in edges.items():
        oracle = gat((width, width), width // heads, heads=heads, add_self_loops=False, bias=False)
        with torch.no_grad():
            # The library multiplies the attention vectors with transformed features; ours are folded with the matrix.
            layer.linear.block(from_type, leaves)[:width].copy_(oracle.lin_src.weight)
            for module, vector, block, place in (
                (oracle.lin_src, oracle.att_src, layer.linear.block(from_type, leaves), width),
                (oracle.lin_dst, oracle.att_dst, layer.linear.block(to_type, enters), width + heads),
            ):
                folded = torch.einsum("hc,hcd->hd", vector[0], module.weight.view(heads, -1, width))
                block[place : place + heads].copy_(folded)
        expected[to_type] = expected[to_type] + oracle((parts[from_type], parts[to_type]), pair)
    found = layer(torch.cat(list(parts.values())), structure(counts, edges))
    torch.testing.assert_close(found, torch.cat(list(expected.values())), atol=1e-5, rtol=1e-5)


def test_every_kind_of_edge_of_an_observation_joins_the_nodes_it_names():
    seen = observation(1, Layout(3, 2, 2, 2))
    for name in ("layers", "slots", "blueprints", "candidates"):
        seen[name][..., 0] = 1
    seen["candidates"][0, 1, 0] = seen["blueprints"][0, 0] = 0
    seen["layer_edges"] = np.array([[0, -1], [2, -1]])
    seen["slot_layer"] = np.array([2, -1])
    found = structure_of(stacked(observation(2, Layout(3, 2, 2, 2)), seen))
    assert found.counts == (6, 4, 4, 2)
    ours = [(int(s), int(t)) for s, t in zip(found.source, found.target, strict=True) if _graph_of(int(t)) == 1]
    rows = dict(zip(NODE_TYPES, (0, 30, 46, 58), strict=True))
    nodes = dict(zip(NODE_TYPES, (0, 6, 10, 14), strict=True))
    expected = [
        (rows["layer"] + 5 * 3 + 1, nodes["layer"] + 5),  # the flow, layer 0 of the second graph to its layer 2
        (rows["layer"] + 5 * 5 + 2, nodes["layer"] + 3),  # and back
        (rows["layer"] + 5 * 5 + 3, nodes["slot"] + 2),  # slot 0 sits behind layer 2
        (rows["slot"] + 4 * 2 + 1, nodes["layer"] + 5),
        (rows["slot"] + 4 * 3 + 2, nodes["blueprint"] + 3),  # blueprint 1 is offered in slot 1 only
        (rows["blueprint"] + 3 * 3 + 1, nodes["slot"] + 3),
        *((rows["layer"] + 5 * place + 4, nodes["global"] + 1) for place in (3, 4, 5)),
        *((rows["slot"] + 4 * place + 3, nodes["global"] + 1) for place in (2, 3)),
        (rows["blueprint"] + 3 * 3 + 2, nodes["global"] + 1),
        *((rows["global"] + 4 + 1, nodes["layer"] + place) for place in (3, 4, 5)),
        *((rows["global"] + 4 + 2, nodes["slot"] + place) for place in (2, 3)),
        (rows["global"] + 4 + 3, nodes["blueprint"] + 3),
    ]
    assert sorted(ours) == sorted(expected)


def _graph_of(node: int) -> int:
    for start, size in ((0, 3), (6, 2), (10, 2), (14, 1)):
        if start <= node < start + 2 * size:
            return (node - start) // size
    raise AssertionError(node)


def test_padding_changes_nothing():
    made, wide = policy(scale=2.0), Layout(11, 5, 13, 20)
    for seed in range(10):
        tight = observation(seed)
        padded = graph.pad(tight, wide)
        acted = made.act(stacked(tight), generator=drawn(seed))
        for found in (made.evaluate(stacked(tight), acted.actions), made.evaluate(stacked(padded), acted.actions)):
            torch.testing.assert_close(found.log_probs, acted.log_probs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.values, acted.values, atol=1e-5, rtol=1e-5)


def test_who_stands_beside_an_observation_in_a_batch_changes_nothing():
    made, seen = policy(scale=2.0), [observation(seed) for seed in range(6)]
    together = made.act(stacked(*seen), generator=drawn(0), greedy=True)
    for place, each in enumerate(seen):
        alone = made.act(stacked(each), generator=drawn(0), greedy=True)
        assert alone.actions.tolist() == together.actions[place : place + 1].tolist()
        torch.testing.assert_close(alone.log_probs, together.log_probs[place : place + 1], atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1.0, 10.0, 1e3, 1e6]),
    greedy=st.booleans(),
)
def test_an_illegal_action_never_comes_out(seed, batch, scale, greedy):
    seen = [observation(seed + place) for place in range(batch)]
    with torch.inference_mode():
        acted = policy(seed % 5, scale).act(stacked(*seen), generator=drawn(seed), greedy=greedy)
    for place, each in enumerate(seen):
        choice = Choice(*acted.actions[place].tolist())
        assert Masks(each["mask_operation"], each["mask_slot"], each["mask_blueprint"]).allows(choice)
        heads = {NO_OP: 1, GERMINATE: 4}.get(choice.operation, 2)
        assert acted.head_log_probs[place, heads:].tolist() == [0.0] * (4 - heads)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 12))
def test_what_is_illegal_has_probability_zero_whatever_the_logits(data, size):
    number = st.floats(width=32, allow_nan=False, allow_infinity=True)
    logits = torch.tensor([data.draw(st.lists(number, min_size=size, max_size=size))])
    legal = torch.tensor([data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))])
    found = masked_log_probs(logits, legal)
    assert (found.exp()[~legal] == 0.0).all()
    assert torch.isfinite(found[legal]).all()
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_an_operation_with_nothing_to_choose_is_illegal():
    seen = observation(0)
    seen["mask_operation"][:] = 1
    seen["mask_slot"][GERMINATE], seen["mask_slot"][CULL] = 1, 0
    seen["mask_blueprint"][:] = 0
    batch = stacked(*[seen] * 50)
    assert {GERMINATE, CULL}.isdisjoint(
        policy(config=GraphPolicyConfig(16, 4, -50.0)).act(batch, generator=drawn(0)).actions[:, 0].tolist()
    )


def test_one_seed_gives_the_same_actions_bit_for_bit():
    made, batch = policy(), stacked(*map(observation, range(8)))
    first, again, other = (made.act(batch, generator=drawn(seed)) for seed in (3, 3, 4))
    for name in ("actions", "log_probs", "values", "head_log_probs", "risk"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.actions, other.actions)


def test_what_is_drawn_has_the_probabilities_that_are_said():
    made, seen, draws = policy(2, 1.5, GraphPolicyConfig(16, 4, 0.0)), observation(3), 6_000
    seen["mask_slot"][GERMINATE] = seen["mask_operation"][GERMINATE] = 1
    seen["mask_blueprint"][:, :4] = 1
    with torch.no_grad():
        acted = made.act(stacked(*[seen] * draws), generator=drawn(0))
    choices, places, counts = torch.unique(acted.actions, dim=0, return_inverse=True, return_counts=True)
    assert len(choices) > 10
    chances = torch.zeros(len(choices)).scatter(0, places, acted.log_probs.exp())
    assert float(chances.sum()) == pytest.approx(1.0, abs=0.02)
    error = (chances * (1 - chances) / draws).sqrt()
    assert ((counts / draws - chances).abs() < 5 * error + 1e-3).all()


def test_evaluating_an_action_tells_what_acting_told():
    made, batch = policy(scale=1.5), stacked(*map(observation, range(12)))
    acted = made.act(batch, generator=drawn(1))
    found = made.evaluate(batch, acted.actions)
    torch.testing.assert_close(found.head_log_probs, acted.head_log_probs)
    torch.testing.assert_close(found.log_probs, acted.log_probs)
    torch.testing.assert_close(found.values, acted.values)


def test_an_illegal_action_evaluates_to_no_chance_at_all():
    seen = observation(0)
    seen["mask_operation"][CULL] = 0
    assert policy().evaluate(stacked(seen), torch.tensor([[CULL, 0, 0, 0]])).log_probs.tolist() == [-np.inf]


def test_no_gradient_is_spoiled_by_an_action_that_nothing_made_legal():
    seen = observation(0)
    for name in ("mask_slot", "mask_blueprint"):
        seen[name][:] = 0
    made = policy()
    found = made.evaluate(stacked(seen, observation(1)), torch.tensor([[GERMINATE, 0, 1, 1], [NO_OP, 0, 0, 0]]))
    assert found.log_probs.tolist()[0] == -np.inf
    found.log_probs[1].backward()
    assert all(torch.isfinite(each.grad).all() for each in made.parameters() if each.grad is not None)


def test_it_learns_to_choose_the_slot_by_its_stage_and_the_blueprint_by_its_cost():
    seen = [observation(seed) for seed in range(48)]
    wanted = np.zeros((48, 4), np.int64)
    for place, each in enumerate(seen):
        each["slots"][..., 0] = each["candidates"][..., 0] = each["blueprints"][..., 0] = 1
        for name in ("mask_operation", "mask_slot", "mask_blueprint"):
            each[name][GERMINATE if name == "mask_slot" else slice(None)] = 1
        slot = int(each["slots"][:, graph.SLOT_FEATURES.index("gain")].argmax())
        cost = each["candidates"][slot, :, graph.CANDIDATE_FEATURES.index("flops")]
        wanted[place] = GERMINATE, slot, int(cost.argmin()), 2
    made, batch, targets = policy(), stacked(*seen), torch.from_numpy(wanted)
    optimiser = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        (-made.evaluate(batch, targets).log_probs.mean()).backward()
        optimiser.step()
    learned = made.act(batch, generator=drawn(0), greedy=True).actions
    assert (learned == targets).all(dim=1).float().mean() > 0.9


def test_the_entropy_is_that_of_the_heads_along_the_path():
    made, seen = policy(1, 1.5), observation(3)
    path = made.act(stacked(seen), generator=drawn(0)).actions
    for operation in range(4):
        if not seen["mask_operation"][operation]:
            continue
        slot = int(np.flatnonzero(seen["mask_slot"][operation])[0]) if operation else 0
        blueprint = int(np.flatnonzero(seen["mask_blueprint"][slot])[0]) if operation == GERMINATE else 0
        path = torch.tensor([[operation, slot, blueprint, 0]])
        expected = 0.0
        for head, limit in ((0, 4), (1, 3), (2, 7), (3, 3)):
            if head >= {NO_OP: 1, GERMINATE: 4}.get(operation, 2):
                continue
            tried = path.repeat(limit, 1)
            tried[:, head] = torch.arange(limit)
            chance = made.evaluate(stacked(*[seen] * limit), tried).head_log_probs[:, head].detach().double()
            expected -= float((chance.exp() * chance)[chance > -np.inf].sum())
        assert made.evaluate(stacked(seen), path).entropy.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e4])
def test_gradients_are_finite_even_where_nothing_but_no_op_is_legal(scale):
    seen = [observation(seed) for seed in range(4)]
    for name in ("mask_slot", "mask_blueprint"):
        seen[0][name][:] = 0
    seen[0]["mask_operation"][1:] = 0
    made, batch = policy(scale=scale), stacked(*seen)
    found = made.evaluate(batch, made.act(batch, generator=drawn(0)).actions)
    (found.log_probs + found.entropy + found.values).sum().backward()
    gradients = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("config", [SMALL, GraphPolicyConfig()])
def test_one_observation_is_decided_as_a_batch_of_it_is(config):
    made = policy(scale=1.5, config=config)
    for seed in range(40):
        batch = stacked(observation(seed, LAYOUT if seed % 2 else Layout(10, 3, 45, 9)))
        with torch.inference_mode():
            quick = made.act(batch, generator=drawn(seed))
        plain = made.act(batch, generator=drawn(seed))
        assert quick.actions.tolist() == plain.actions.tolist()
        for name in ("log_probs", "values", "head_log_probs", "risk"):
            torch.testing.assert_close(getattr(quick, name), getattr(plain, name), atol=1e-5, rtol=1e-5)


def test_one_observation_is_decided_by_the_weights_as_they_are_now():
    made, batch = policy(), stacked(observation(5))

    def value() -> tuple[float, float]:
        with torch.inference_mode():
            quick = made.act(batch, generator=drawn(0), greedy=True)
        return float(quick.values), made.act(batch, generator=drawn(0), greedy=True).values.item()

    before = value()
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05)
    changed = value()
    made.load_state_dict(twin.state_dict(), assign=True)
    back = value()
    assert before[0] == pytest.approx(before[1], abs=1e-5)
    assert changed[0] == pytest.approx(changed[1], abs=1e-5)
    assert abs(changed[0] - before[0]) > 1e-3
    assert back[0] == pytest.approx(before[0], abs=1e-6)


def test_weights_that_are_no_numbers_choose_something_legal_and_show_it():
    seen = observation(4)
    made = policy()
    with torch.no_grad():
        made.trunk.weight.fill_(float("nan"))
    for context in (torch.inference_mode(), torch.enable_grad()):
        with context:
            acted = made.act(stacked(seen), generator=drawn(0))
        legal = Masks(seen["mask_operation"], seen["mask_slot"], seen["mask_blueprint"])
        assert legal.allows(Choice(*acted.actions[0].tolist()))
        assert not torch.isfinite(acted.values).any()


def test_the_risk_head_learns_from_later_boundaries_of_the_same_episode_only():
    epoch, rise = (graph.GLOBAL_FEATURES.index(name) for name in ("epoch", "loss_rise"))
    steps = [observation(seed) for seed in range(5)]
    for each, when, risen in zip(steps, (0.1, 0.1, 0.2, 0.3, 0.1), (0.0, 0.0, 0.06, 0.9, 0.0), strict=True):
        each["global"][epoch], each["global"][rise] = when, risen
    batch = {name: array.unsqueeze(1) for name, array in stacked(*steps).items()}
    made = policy()
    done = torch.tensor([False, False, False, True, False]).unsqueeze(1)
    # Step 1 is followed by a rise of 6 %, ORANGE, and step 2 by one of 90 %, CRITICAL.
    risk = made.act(stacked(*steps[1:3]), generator=drawn(0), greedy=True).risk
    expected = -(risk[0, 2].log() + risk[1, 4].log()) / 2
    assert made.auxiliary_loss(batch, done).item() == pytest.approx(expected.item(), rel=1e-4)
    assert made.auxiliary_loss(batch, torch.ones_like(done)).item() == 0.0


def test_the_risk_head_can_learn():
    rise, sign = graph.GLOBAL_FEATURES.index("loss_rise"), graph.GLOBAL_FEATURES.index("fall")
    steps = [observation(seed) for seed in range(33)]
    for place, each in enumerate(steps):
        each["global"][graph.GLOBAL_FEATURES.index("epoch")] = place / 33
        each["global"][sign] = place % 2
    for before, after in itertools.pairwise(steps):
        after["global"][rise] = 0.2 * before["global"][sign]
    batch = {name: array.unsqueeze(1) for name, array in stacked(*steps).items()}
    made, done = policy(), torch.zeros(33, 1, dtype=torch.bool)
    optimiser = torch.optim.Adam(made.parameters(), 1e-2)
    first = made.auxiliary_loss(batch, done).item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = made.auxiliary_loss(batch, done)
        loss.backward()
        optimiser.step()
    assert first > 1.0
    assert loss.item() < 0.2


def test_the_network_is_small():
    assert sum(parameter.numel() for parameter in GraphPolicy().parameters()) <= 300_000


def test_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="heads"):
        GraphPolicyConfig(width=10, heads=4)


def test_a_boundarys_micro_steps_read_the_graph_once_and_decide_as_if_they_had_not():
    made = policy(scale=1.5)
    first, memo = observation(3), {}
    later = {name: array.copy() for name, array in first.items()}
    for name, columns in graph.PENDING.items():
        later[name][..., list(columns)] = 1.0
    before = made.decide(first, generator=drawn(0), greedy=True, memo=memo)
    for seen in (first, later):
        known = made.decide(seen, generator=drawn(1), greedy=False, memo=memo)
        anew = made.decide(seen, generator=drawn(1), greedy=False)
        assert known.actions == anew.actions
        assert known.value == anew.value
    assert known.value != before.value
