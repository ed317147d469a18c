"""A compiled host: nothing is compiled for a seed, the code has no break, and seeds live as in plain code."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper_ray.attaching import passage
from esper_ray.attaching.sockets import Sockets
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import HostError
from tests.unit.attaching import EAGER, Loop, PlainCNN, SmallViT, digits, mlp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch's compiler looks at it itself
]


@pytest.fixture(autouse=True)
def no_code_of_other_tests():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


class Counting:
    """A backend that runs what it gets as it is, and counts how often it got something."""

    def __init__(self):
        self.made = 0

    def __call__(self, graph, inputs):
        self.made += 1
        return graph.forward


def weights(loop):
    return [value.clone() for value in loop.model.state_dict().values()]


@pytest.mark.parametrize(("make", "slots"), [(PlainCNN, ["conv1", "conv2"]), (SmallViT, ["encoder.layers.0"])])
def test_a_seeds_whole_life_needs_no_compiler_beyond_the_first_two_steps(make, slots):
    backend = Counting()
    loop = Loop(
        make(), digits(), slots, wrap=functools.partial(torch.compile, backend=backend, fullgraph=True), rate=5e-3
    )
    made = []
    while "FOSSILIZED" not in loop.stages() and len(made) < loop.epochs:
        loop.epoch()
        made.append(backend.made)
    assert "FOSSILIZED" in loop.stages()
    assert set(made) == {2}, "one with the slots' operators, one without"


def test_a_seed_of_a_compiled_host_lives_bit_for_bit_as_one_of_a_plain_host():
    ends = []
    for wrap in (lambda model: model, functools.partial(torch.compile, backend="eager", fullgraph=True)):
        torch.manual_seed(0)
        # Shadow passes are whole ones in a compiled host, and its first one is in every host.
        loop = Loop(mlp(), digits(), ["2", "4"], wrap=wrap)
        loop.until("FOSSILIZED")
        loop.epoch()
        ends.append(weights(loop))
    assert all(map(torch.equal, *ends))


def test_while_nothing_grows_compiled_code_has_nothing_of_ours_in_it():
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    loop = Loop(mlp(), digits(), ["2", "4"], settings=[*EAGER, "tamiyo.controller=never"],
                wrap=functools.partial(torch.compile, backend=backend))  # fmt: skip
    loop.epoch()
    ours = [{name for name in graph if "esper_ray" in name} for graph in graphs]
    assert [bool(names) for names in ours] == [True, False]
    assert not loop.grower._sockets.open


def test_a_host_that_is_compiled_in_place_grows_too(tmp_path):
    loop = Loop(mlp(), digits(), ["2", "4"])
    loop.model.compile(backend="eager")
    reports = loop.until("FOSSILIZED")
    assert "FOSSILIZED" in loop.stages(), [str(report) for report in reports]
    assert loop.grower.garden.violations == 0
    gates = {event["gate"]: event for event in loop.events if event["kind"] == "gate" and event["passed"]}
    assert gates["G4_SYSTEM_IMPACT"]["evidence"]["gain"] != 0.0
    loop.grower.export(tmp_path)
    assert (tmp_path / "model.pt2").exists()


def test_a_seed_learns_also_where_nothing_before_it_trains():
    model = PlainCNN()
    model.conv1.requires_grad_(False)
    loop = Loop(model, digits(), ["conv1"], wrap=functools.partial(torch.compile, backend="aot_eager"))
    loop.until("BLENDING")
    (seed,) = loop.grower.garden.in_stage(Stage.BLENDING)
    before = [p.detach().clone() for p in seed.branch.parameters()]
    loop.epoch()
    assert not any(map(torch.equal, before, seed.branch.parameters()))


def test_the_blend_mode_that_asks_the_model_first_is_refused_in_a_compiled_host():
    settings = [*EAGER, "seeds.blend_mode=confidence"]
    loop = Loop(mlp(), digits(), ["2"], settings=settings, wrap=functools.partial(torch.compile, backend="eager"))
    for _ in range(4):
        loop.epoch()
    refused = [event["reason"] for event in loop.events if event["kind"] == "refusal"]
    assert refused
    assert all("compiled code cannot be asked" in reason for reason in refused)


def test_under_autocast_a_compiled_hosts_seed_computes_in_the_loops_precision():
    precision = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    loop = Loop(mlp(), digits(), ["2", "4"], precision=precision,
                wrap=functools.partial(torch.compile, backend="aot_eager"))  # fmt: skip
    loop.until("BLENDING")
    seen = set()
    seed = loop.grower.garden.in_stage(Stage.BLENDING)[0]
    seed.branch.register_forward_hook(lambda _m, _i, _o: seen.add(torch.is_autocast_enabled("cpu")))
    loop.epoch()
    assert seen == {True}
    assert loop.grower.garden.violations == 0


def test_float16_is_refused_in_a_compiled_host_too():
    loop = Loop(mlp(), digits(), ["2"], precision=functools.partial(torch.autocast, "cpu", torch.float16),
                wrap=functools.partial(torch.compile, backend="eager"))  # fmt: skip
    with pytest.raises(HostError, match="float16"):
        loop.epoch()


# The operator


class Joined:
    """A socket at which ``block`` is added."""

    def __init__(self, block):
        self.block = block

    def passing(self, h, dtype, *, training):
        return self.block is not None

    def join(self, h, dtype):
        return h + self.block(h)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operator_gives_the_values_and_gradients_of_the_plain_code(layout):
    block = nn.Conv2d(3, 3, 1)
    joined = Joined(block)
    end = passage.End(joined)
    anchor = torch.zeros((), requires_grad=True)
    given = torch.randn(2, 3, 5, 5).to(memory_format=layout)

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def compiled(h):
        return passage.through(h * 2.0, anchor, end.number, None).square().sum()

    def plain(h):
        h = h * 2.0
        return (h + block(h)).square().sum()

    found = []
    for function in (compiled, plain):
        leaf = given.clone().requires_grad_()
        block.zero_grad()
        loss = function(leaf)
        loss.backward()
        found.append([loss.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(given), plain(given))
    assert not end._open, "each pass is forgotten after its backward pass"


def test_passes_that_have_no_backward_pass_are_forgotten():
    end = passage.End(joined := Joined(nn.Linear(3, 3)))
    for _ in range(200):
        end.forward(torch.randn(2, 3), None)
    assert len(end._open) <= 64
    assert joined.block is not None


@pytest.mark.filterwarnings("ignore")
def test_the_operator_keeps_the_rules_that_the_compiler_relies_on():
    end = passage.End(joined := Joined(None))
    anchor, h = torch.zeros((), requires_grad=True), torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(passage.pass_slot, (h, anchor, end.number, None))
    torch.library.opcheck(passage.pass_slot_constant, (h.detach(), end.number, None))
    assert joined.block is None


def test_sockets_close_when_nothing_hangs_on_them_any_more():
    sockets = Sockets(mlp(), ["2", "4"])
    assert sockets.open
    sockets.settle()
    assert not sockets.open
    handle = sockets._sockets["2"].hang(lambda _module, _inputs, h: h)
    assert sockets.open
    handle.remove()
    assert not sockets.open


def test_a_compiled_loss_of_the_host_alone_is_the_plain_one():
    """Whatever is compiled, the figures of an epoch come from plain code, with the seeds on and off."""
    loop = Loop(mlp(), digits(), ["2", "4"], wrap=functools.partial(torch.compile, backend="eager"))
    report = loop.until("BLENDING")[-1]
    inputs, targets = loop.data
    loop.model.eval()
    with torch.no_grad():
        plain = F.cross_entropy(loop.model(inputs[900:]), targets[900:])
    assert report.loss == pytest.approx(float(plain), abs=1e-5)
