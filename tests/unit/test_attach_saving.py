"""A loop of one's own can be saved anywhere and goes on bit for bit; what does not fit is refused."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn

from esper_ray.errors import CheckpointError, HostError
from tests.unit.attaching import Loop, SmallViT, digits, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def loop_of(model, home, **given):
    settings = [*Loop.settings, f"home={home}", *given.pop("more", ())]
    return Loop(model, digits(), settings=settings, epochs=12, batches=6, **given)


def make(kind, home, **given):
    torch.manual_seed(4)
    if kind == "an MLP":
        return loop_of(mlp(), home, slots=["2", "4"], **given)
    return loop_of(SmallViT(), home, slots=["encoder.layers.0", "encoder.layers.1"], rate=5e-3, **given)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # which takes plain types and tensors only


def gone_on(kind, home, loop, state, **given):
    """A loop that was made anew and goes on from there; its data too, which are its own affair."""
    later = make(kind, home, **given)
    later.generator.set_state(loop.generator.get_state())
    later.grower.load_state_dict(through_a_file(state))
    return later


def seeds(loop):
    """All of the seeds but what is named by the loop, and the forge's digest, which has times in it."""
    rows = [slot.get("seed", {}) for slot in loop.grower.state_dict()["garden"]["slots"]]
    return [{key: value for key, value in row.items() if key not in ("command_id", "digest")} for row in rows]


def ends_as(a, b):
    assert seeds(a) == seeds(b)
    assert a.grower.state_dict()["place"] == b.grower.state_dict()["place"]
    for one, other in ((a.model, b.model), *zip(branches(a), branches(b), strict=True)):
        values = other.state_dict()
        assert [name for name, value in one.state_dict().items() if not torch.equal(value, values[name])] == []
    moments = [{**loop.optimizer.state_dict()["state"]} for loop in (a, b)]
    assert moments[0].keys() == moments[1].keys()
    for key in moments[0]:
        assert all(torch.equal(moments[0][key][name], moments[1][key][name]) for name in moments[0][key])


def happened(reports):
    """All events, without times, and without the forge's digests, which have times in them."""
    rows = [{k: v for k, v in event.items() if k != "ms"} for report in reports for event in report.events]
    return [{**row, "reason": re.sub("kernel [0-9a-f]+", "kernel", row.get("reason", ""))} for row in rows]


def branches(loop):
    return [seed.branch for seed in loop.grower.garden.seeds if seed.branch is not None]


@pytest.mark.parametrize("kind", ["an MLP", "a ViT with dropout"])
def test_a_loop_that_is_saved_at_any_epochs_end_goes_on_bit_for_bit(kind, tmp_path):
    whole = make(kind, tmp_path / "whole")
    reports = whole.all()
    assert {"BLENDING", "PROBATIONARY", "FOSSILIZED"} <= whole.stages()
    loop, told = make(kind, tmp_path / "parts"), []
    for _ in range(whole.epochs):
        told.append(loop.epoch())
        loop = gone_on(kind, tmp_path / "parts", loop, loop.grower.state_dict())
    ends_as(whole, loop)
    assert [(r.loss, r.training_loss, r.seeds) for r in told] == [(r.loss, r.training_loss, r.seeds) for r in reports]
    assert happened(told) == happened(reports)


def test_a_loop_that_is_saved_after_any_step_goes_on_bit_for_bit(tmp_path):
    """In the middle of epochs, in each stage, with what an epoch has summed up and told so far."""
    ends, told = [], []
    for parts in (False, True):
        home, states = tmp_path / f"{parts}", 0
        loop = make("an MLP", home)
        for epoch in range(9):
            generator = torch.Generator().manual_seed(epoch)
            for step in range(6):
                chosen = torch.randint(900, (32,), generator=generator)
                batch, wanted = loop.data[0][chosen], loop.data[1][chosen]
                found = loop.loss(loop.model(batch), wanted)
                found.backward()
                loop.grower.step(batch, wanted, found)
                loop.optimizer.step()
                loop.optimizer.zero_grad()
                if parts and (epoch + step) % 3 == 0:
                    loop, states = gone_on("an MLP", home, loop, loop.grower.state_dict()), states + 1
            told.append(loop.grower.epoch([(loop.data[0][900:], loop.data[1][900:])]))
        ends.append(loop)
    assert states == 18
    assert happened(told[:9]) == happened(told[9:])
    assert {"BLENDING", "SHADOWING"} <= {event["to"] for event in happened(told) if event["kind"] == "stage"}
    ends_as(*ends)


def test_an_earlier_state_is_not_changed_by_what_trains_on(tmp_path):
    loop = make("an MLP", tmp_path)
    loop.until("BLENDING")
    state = loop.grower.state_dict()
    before = through_a_file(state)
    loop.epoch()
    assert torch.equal(state["model"]["1.weight"], before["model"]["1.weight"])
    assert not torch.equal(state["model"]["1.weight"], loop.model[1].weight)
    assert all(torch.equal(value, before["branches"][name]) for name, value in state["branches"].items())


def test_a_state_is_refused_in_the_middle_of_a_step(tmp_path):
    loop = make("an MLP", tmp_path)
    loop.until("BLENDING")
    loop.epoch()
    assert loop.grower.garden.live
    loop.loss(loop.model(loop.data[0][:8]), loop.data[1][:8]).backward()
    with pytest.raises(HostError, match="step is not over yet"):
        loop.grower.state_dict()


def wider():
    return nn.Sequential(*mlp()[:5], nn.Linear(8, 9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": ["2"]}, "its list of slots is"),
        ({"more": ["run.seed=5"]}, "its run.seed is 0, and 5 here"),
        ({"model": wider()}, r"5.weight is \(10, 8\), and \(9, 8\) in the model"),
    ],
)  # fmt: skip
def test_what_belongs_to_another_loop_is_refused_and_nothing_is_touched(change, words, tmp_path):
    loop = make("an MLP", tmp_path)
    loop.until("TRAINING")
    state = loop.grower.state_dict()
    given = {"model": mlp(), "slots": ["2", "4"], **change}
    other = loop_of(given.pop("model"), tmp_path, **given)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        other.grower.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert other.grower.garden.seeds == []


def test_what_is_no_state_and_a_loop_that_has_trained_are_refused(tmp_path):
    loop = make("an MLP", tmp_path)
    with pytest.raises(CheckpointError, match="no state of a loop"):
        loop.grower.load_state_dict({"model": {}})
    loop.epoch()
    with pytest.raises(CheckpointError, match="trained already"):
        loop.grower.load_state_dict(loop.grower.state_dict())
