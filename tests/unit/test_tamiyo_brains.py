"""What is recorded of a decision is what was decided, with the probabilities it really had."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from esper_ray.config import TamiyoConfig
from esper_ray.contracts import learning
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import SeedState, SystemState
from esper_ray.contracts.ports import Candidate, HostGraph, LayerInfo, RunOpening, SlotInfo, SlotSignature
from esper_ray.errors import CorruptArtifact
from esper_ray.tamiyo import actions, graph, observations
from esper_ray.tamiyo.actions import Choice
from esper_ray.tamiyo.brains import ScriptedBrain, heads_that_apply, mixture_log_probs
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.view import Proposal, RunView

SLOTS = tuple(SlotInfo(i, f"stage{i}", SlotSignature("conv", (16, 8, 8))) for i in range(3))
CANDIDATES = tuple(
    Candidate(slot, number, "family", size, size * 10) for slot in range(3) for number, size in ((2, 32), (9, 4000))
)
GRAPH = HostGraph((LayerInfo("a", "conv", 10, 1, 4), LayerInfo("b", "linear", 8, 4, 2)), ((0, 1),), (0, 0, 1))


def view(*seeds: SeedState, epochs: int = 4, max_parameters: int = 10**6, **settings: object) -> RunView:
    opening = RunOpening(
        "r", 1, SLOTS, CANDIDATES, "heuristic", 20, host_parameters=1000, max_parameters=max_parameters, graph=GRAPH
    )
    states = [
        SystemState("r", epoch, epoch * 10, 1, 1.0, 1.0 - 0.001 * epoch, 0.5, seeds=seeds if epoch == epochs else ())
        for epoch in range(1, epochs + 1)
    ]
    return RunView(opening, TamiyoConfig(**settings), states)  # type: ignore[arg-type]


def all_choices(legal: actions.Masks) -> list[Choice]:
    sizes = (len(actions.OPERATIONS), legal.slot.shape[1], legal.blueprint.shape[1], len(actions.SCHEDULES))
    every = (Choice(*indices) for indices in itertools.product(*map(range, sizes)))
    return [choice for choice in every if legal.allows(choice)]


def test_an_observation_has_the_shapes_that_the_layout_says_and_padding_changes_no_feature():
    seen = view(SeedState(1, 1, 9, Stage.PROBATIONARY, alpha=1.0, metrics={"g": 0.2, "ge": 0.01}))
    seen.statistics = np.full((2, 3), -2.0, np.float32)
    tight, wide = graph.observe(seen), graph.observe(seen, (), graph.Layout(16, 4, 48, 48))
    for layout, found in ((graph.Layout.of(seen.opening), tight), (graph.Layout(16, 4, 48, 48), wide)):
        for name, (shape, kind, least, most) in graph.shapes(layout).items():
            assert found[name].shape == shape
            assert found[name].dtype == kind
            assert (found[name] >= least).all()
            assert (found[name] <= most).all()
    np.testing.assert_array_equal(wide["layers"][:2], tight["layers"])
    np.testing.assert_array_equal(wide["slots"][:3], tight["slots"])
    assert not wide["slots"][3:].any()
    assert not wide["layers"][2:].any()


def test_what_is_pending_is_seen_and_its_slot_is_closed():
    seen = view()
    taken = Proposal(SeedOperation.GERMINATE, 1, "", blueprint=9)
    before, after = graph.observe(seen), graph.observe(seen, [taken])
    assert before["mask_slot"][actions.GERMINATE].tolist() == [1, 1, 1]
    assert after["mask_slot"][actions.GERMINATE].tolist() == [1, 0, 1]
    column = graph.SLOT_FEATURES.index("pending_germination")
    assert (after["slots"] - before["slots"])[:, column].tolist() == [0, 1, 0]


def test_nothing_is_legal_that_would_exceed_the_parameter_limit():
    legal = actions.masks(view(max_parameters=4500), [], slots=3, blueprints=2)
    assert legal.blueprint.tolist() == [[1, 0]] * 3
    none = actions.masks(view(max_parameters=1010), [], slots=3, blueprints=2)
    assert none.operation.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_recorded_probabilities_of_all_legal_choices_sum_to_one(share):
    seen = view(SeedState(1, 1, 9, Stage.PROBATIONARY, alpha=1.0), SeedState(2, 2, 2, Stage.TRAINING))
    legal = actions.masks(seen, [], slots=3, blueprints=2)
    own = Choice(actions.GERMINATE, 0, 1, 2)
    with np.errstate(divide="ignore"):
        total = 0.0
        for choice in all_choices(legal):
            if share > 0.0 or choice == own:
                total += math.exp(sum(mixture_log_probs(choice, own, legal, share)))
    assert total == pytest.approx(1.0)


def test_what_is_drawn_has_the_frequencies_that_are_recorded():
    seen = view(exploration=0.5, warmup_epochs=3)
    brain, counts, chance = ScriptedBrain("heuristic", CONTROLLERS["heuristic"]), Counter[Choice](), {}
    draws = 3000
    for number in range(draws):
        seen.opening = replace(seen.opening, seed=number)
        step = brain.steps(seen)[0]
        counts[step.choice] += 1
        chance[step.choice] = math.exp(sum(step.log_probs))
    for choice, count in counts.items():
        error = math.sqrt(chance[choice] * (1 - chance[choice]) / draws)
        assert abs(count / draws - chance[choice]) < 5 * error + 1e-9


def test_without_exploration_the_scripted_decision_is_unchanged_and_certain():
    seen = view(warmup_epochs=3)
    steps = ScriptedBrain("heuristic", CONTROLLERS["heuristic"]).steps(seen)
    assert [step.proposal for step in steps if step.proposal] == CONTROLLERS["heuristic"](seen, seen.config)
    assert all(sum(step.log_probs) == 0.0 for step in steps)
    assert steps[-1].choice == Choice()


def test_a_record_names_the_heads_that_applied_and_survives_the_wire(tmp_path):
    seen = view(exploration=0.4, warmup_epochs=3)
    for place, step in enumerate(ScriptedBrain("heuristic", CONTROLLERS["heuristic"]).steps(seen)):
        digest = observations.write(tmp_path, step.observation)
        record = step.record(command_id=1, version="heuristic", view=seen, digest=digest, place=place)
        found = learning.decode_decision(learning.encode_decision(record))
        assert len(found.heads) == heads_that_apply(step.choice.operation)
        assert tuple(head.choice for head in found.heads) == step.choice.indices[: len(found.heads)]
        assert found.exploration == pytest.approx(0.4)
        back = observations.read(tmp_path, found.observation_digest)
        assert all((back[name] == array).all() for name, array in step.observation.items())


def test_a_damaged_or_lost_observation_is_refused(tmp_path):
    name = observations.write(tmp_path, graph.observe(view()))
    file = observations.path_of(tmp_path, name)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match="damaged"):
        observations.read(tmp_path, name)
    file.unlink()
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        observations.read(tmp_path, name)
