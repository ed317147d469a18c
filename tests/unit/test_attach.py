"""The promises of `attach`: it works where users' loops are special, changes nothing of theirs, and refuses clearly."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper_ray
from esper_ray.attaching import as_table, propose
from esper_ray.attaching.sockets import Sockets
from esper_ray.errors import ConfigError, HostError
from tests.unit.attaching import Loop, PlainCNN, SmallGPT, SmallViT, UNet, digits, mlp, pixels, sequence_loss, text

NEVER = ("run.mode=lockstep", "tamiyo.controller=never")


@pytest.fixture(autouse=True)
def same_draws(one_thread):
    torch.manual_seed(0)


def attach(model, slots="auto", **changes):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if any(True for _ in model.parameters()) else None
    given = {"loss": F.cross_entropy, "optimizer": optimizer, "epochs": 4, "sample": digits()[0][:4], **changes}
    return esper_ray.attach(model, slots, **given)


# Special loops


def test_under_autocast_the_seeds_train_in_the_precision_of_the_loop():
    loop = Loop(mlp(), digits(), ["2", "4"], precision=functools.partial(torch.autocast, "cpu", torch.bfloat16))
    seen = set()
    reports = loop.until("BLENDING")
    branch = loop.grower.garden.in_stage(*{seed.stage for seed in loop.grower.garden.seeds})[0].branch
    branch.register_forward_hook(
        lambda module, inputs, output: seen.add((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
    )
    loop.until("FOSSILIZED")
    assert "FOSSILIZED" in loop.stages(), [str(report) for report in reports]
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert all(autocast for _, autocast in seen)
    assert loop.grower.garden.checks > 0
    assert loop.grower.garden.violations == 0
    assert all(parameter.dtype is torch.float32 for parameter in loop.model.parameters())


def test_float16_which_needs_scaled_gradients_is_refused():
    model = mlp()
    grower = attach(model, ["2"])
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(digits()[0][:4]), digits()[1][:4])
    loss.backward()
    with pytest.raises(HostError, match="float16"):
        grower.step(digits()[0][:4], digits()[1][:4], loss)


def test_gradients_may_be_summed_over_batches():
    loop = Loop(mlp(), digits(), ["2", "4"], accumulate=3)
    loop.until("FOSSILIZED")
    assert "FOSSILIZED" in loop.stages()
    assert loop.grower.garden.checks > 0
    assert loop.grower.garden.violations == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at it itself
def test_a_host_that_is_compiled_after_it_was_attached_grows():
    torch.compiler.reset()
    loop = Loop(mlp(), digits(), ["2", "4"], wrap=functools.partial(torch.compile, backend="eager"))
    loop.until("FOSSILIZED")
    assert "FOSSILIZED" in loop.stages()
    assert loop.grower.garden.violations == 0
    inputs = digits()[0][:5]
    loop.model.eval()
    torch.testing.assert_close(loop.run(inputs), loop.model(inputs))
    with torch.no_grad():
        for parameter in loop.model.esper_grown.parameters():
            parameter.zero_()
    without = loop.model(inputs)
    torch.testing.assert_close(loop.run(inputs), without)


@pytest.mark.parametrize("part", ["whole", "in place", "a block"])
def test_a_host_that_was_compiled_before_is_refused(part):
    model = PlainCNN()
    if part == "whole":
        given = torch.compile(model, backend="eager")
    else:
        given = model
        (model if part == "in place" else model.conv2).compile(backend="eager")
    with pytest.raises(HostError, match=r"compiled already.*silently ignored.*compile it afterwards"):
        attach(given, ["conv1"] if part != "whole" else "auto")


def test_a_host_whose_compiled_code_was_there_before_the_slots_is_found_out_at_the_first_step():
    torch.compiler.reset()  # what other models of this class left
    model, (inputs, targets) = mlp(), digits()
    compiled = torch.compile(model, backend="eager")
    compiled(inputs[:4])
    grower = attach(model, ["2"])
    loss = F.cross_entropy(compiled(inputs[:4]), targets[:4])
    loss.backward()
    with pytest.raises(HostError, match=r"did not reach 2.*was compiled before"):
        grower.step(inputs[:4], targets[:4], loss)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=20),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    ],
    ids=["LambdaLR", "OneCycleLR", "CosineAnnealingLR"],
)
def test_the_users_schedulers_go_on_working_and_the_seeds_follow_them(make):
    loop = Loop(mlp(), digits(), ["2", "4"])
    scheduler = make(loop.optimizer)
    while "FOSSILIZED" not in loop.stages() and loop.grower.place.epoch < loop.epochs:
        loop.epoch()
        for seed in loop.grower.garden.live:
            assert seed.learning_rate == pytest.approx(loop.grower.companion.host_rate)
        scheduler.step()
    assert "FOSSILIZED" in loop.stages()
    trained = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert len(loop.optimizer.param_groups) == 1
    assert trained == {id(p) for p in loop.model.parameters()}
    moments = [loop.optimizer.state[p] for p in loop.model.esper_grown.parameters()]
    assert all(float(each["step"]) > 0 for each in moments)


def test_another_optimizer_trains_seeds_as_it_trains_the_host():
    loop = Loop(mlp(), digits(), ["2", "4"])
    loop.grower.close()
    model, (inputs, targets) = mlp(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    grower = attach(model, ["2", "4"], optimizer=optimizer, config=list(loop.settings), epochs=12)
    stages = set()
    for _ in range(12):
        for start in range(0, 320, 32):
            batch, wanted = inputs[start : start + 32], targets[start : start + 32]
            loss = F.cross_entropy(model(batch), wanted)
            loss.backward()
            grower.step(batch, wanted, loss)
            optimizer.step()
            optimizer.zero_grad()
        report = grower.epoch([(inputs[900:], targets[900:])])
        stages |= {event["to"] for event in report.events if event["kind"] == "stage"}
    assert "BLENDING" in stages


# What is the user's stays the user's


def test_until_something_grows_the_host_trains_bit_for_bit_as_without_us():
    finals = []
    for ours in (False, True):
        torch.manual_seed(3)
        model = SmallViT()  # with dropout, so that a draw of ours would show
        inputs, targets = digits()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        grower = attach(model, optimizer=optimizer, config=NEVER) if ours else None
        for start in range(0, 160, 32):
            batch, wanted = inputs[start : start + 32], targets[start : start + 32]
            loss = F.cross_entropy(model(batch), wanted)
            loss.backward()
            if grower:
                grower.step(batch, wanted, loss)
            optimizer.step()
            optimizer.zero_grad()
        if grower:
            grower.epoch([(inputs[900:], targets[900:])])
            assert model.training
        finals.append([p.detach().clone() for p in model.parameters()] + [torch.rand(1)])
    assert all(map(torch.equal, *finals))


def test_an_isolated_seed_leaves_the_host_bit_for_bit_alone():
    finals = []
    for controller in ("never", "heuristic"):
        torch.manual_seed(0)
        model = UNet()  # with batch statistics
        settings = [*Loop.settings, f"tamiyo.controller={controller}", "seeds.training_epochs=6"]
        loop = Loop(model, pixels(), ["down1", "down2"], settings=settings, epochs=5)
        loop.all()
        assert ("TRAINING" in loop.stages()) == (controller == "heuristic")
        assert "BLENDING" not in loop.stages()
        finals.append([value.clone() for value in model.state_dict().values()])
    assert all(map(torch.equal, *finals))


def test_modes_buffers_and_hooks_are_as_before():
    model = UNet()
    model.down1[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    grower = attach(model, ["down2"], sample=pixels()[0][:4])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    grower.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_a_sample_the_first_batch_shows_the_shapes():
    loop = Loop(mlp(), digits(), "auto", attach={"sample": None})
    with pytest.raises(HostError, match="not known yet"):
        _ = loop.grower.garden
    loop.until("FOSSILIZED")
    assert "FOSSILIZED" in loop.stages()
    assert loop.grower.proposals


# Proposals


@pytest.mark.parametrize(
    ("model", "sample", "expected"),
    [
        (PlainCNN(), digits()[0], {"conv1": (8, 8, 8), "conv2": (8, 4, 4), "pool": None}),
        (mlp(), digits()[0], {"2": (8,), "4": (8,)}),
        (SmallViT(), digits()[0], {"encoder.layers.0": (17, 16), "encoder.layers.1": (17, 16)}),
        (UNet(), pixels()[0], {"down1": (6, 8, 8), "down2": (8, 4, 4), "up1": (6, 8, 8)}),
        (SmallGPT(), text()[0], {"h.0": (16, 16), "h.1": (16, 16)}),
    ],
    ids=["CNN", "MLP", "ViT", "U-Net", "GPT"],
)
def test_proposals_are_the_ends_of_blocks_with_their_reasons(model, sample, expected):
    found = propose(model, sample)
    assert {p.name: p.shape for p in found} == {name: shape for name, shape in expected.items() if shape}
    assert [p.depth for p in found] == sorted(p.depth for p in found)
    assert all(p.blueprints > 0 and "parameters" in p.why for p in found)
    table = as_table(found)
    assert all(p.name in table and p.why in table for p in found)


def test_many_blocks_are_spread_over_the_depth():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(9)), nn.Linear(8, 2))
    names = [p.name for p in propose(model, torch.randn(3, 8), most=3)]
    assert names == ["2", "5", "8"]


# Refusals


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(HostError, match=r"no module 'conv3'. Did you mean conv[12]\? It has: conv1, conv2, pool, fc"):
        attach(PlainCNN(), ["conv3"])


def test_a_model_without_parameters_is_refused():
    with pytest.raises(HostError, match="no parameters that train"):
        attach(nn.Sequential(nn.Flatten(), nn.ReLU()))
    frozen = mlp().requires_grad_(False)
    with pytest.raises(HostError, match="no parameters that train"):
        attach(frozen)


def test_a_large_host_is_refused_with_its_count_unless_told_otherwise():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1_200_000, bias=False))
    with pytest.raises(HostError, match=r"9,600,520 parameters, more than 9,000,000.*host_limit"):
        attach(model, ["2"], host_limit=9_000_000)
    attach(model, ["2"])


class Odd(nn.Module):
    """Modules whose outputs make no slots."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.same = nn.Linear(8, 8), nn.Identity()
        self.lstm, self.unused = nn.LSTM(8, 8, batch_first=True), nn.Linear(2, 2)
        self.cube, self.flip, self.count = nn.Unflatten(1, (2, 2, 2, 1)), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.same(self.fc(x))
        self.lstm(h[:, None])
        self.cube(h), self.flip(h.t()), self.count(h.argmax(1))
        return self.same(h)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lstm", "Its output is a tuple, not a tensor"),
        ("same", "called 2 times"),
        ("cube", r"No blueprint fits \[2, 2, 2, 1\]"),
        ("flip", "does not begin with the batch"),
        ("count", "int64, not float32"),
        ("unused", "does not call it"),
    ],
)
def test_a_module_that_makes_no_slot_is_refused_with_the_reason(name, reason):
    with pytest.raises(HostError, match=f"{name} cannot be a slot. {reason}|{reason}"):
        attach(Odd(), [name], sample=torch.randn(4, 8))


def test_a_slot_of_another_kind_than_it_is_said_to_be_is_refused():
    with pytest.raises(HostError, match=r"conv1 is no sequence slot. Its output is \[8, 8, 8\], and that is a conv"):
        attach(PlainCNN(), {"conv1": "sequence"})


def test_a_sample_that_the_model_does_not_take_is_refused():
    with pytest.raises(HostError, match=r"cannot be run on a sample of shape \[3, 7\].*first dimension is the batch"):
        attach(mlp(), ["2"], sample=torch.randn(3, 7))


def test_slots_without_names_and_wrong_settings_are_refused():
    with pytest.raises(HostError, match="names no slots"):
        attach(mlp(), "2")
    with pytest.raises(HostError, match="No slot was named"):
        attach(mlp(), [])
    with pytest.raises(ConfigError, match=r"tamiyo\.grow"):
        attach(mlp(), ["2"], config=["tamiyo.grow=1"])


def test_a_refusal_leaves_the_model_untouched():
    model = PlainCNN()
    for slots, changes in ((["conv3"], {}), (["conv1"], {"sample": torch.randn(2, 3)}), ({"conv1": "vector"}, {})):
        with pytest.raises(HostError):
            attach(model, slots, **changes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_optimizer_that_cannot_be_made_again_is_refused():
    class Own(torch.optim.SGD):
        def __init__(self, model: nn.Module, needed: int) -> None:
            super().__init__(model.parameters(), lr=0.1)

    model = mlp()
    with pytest.raises(HostError, match="Seeds cannot be trained by Own"):
        attach(model, ["2"], optimizer=Own(model, 1))


def test_dormant_sockets_only_pass_through():
    model, inputs = mlp(), digits()[0][:4]
    before = model(inputs)
    sockets = Sockets(model, ["2", "4"])
    assert torch.equal(model(inputs), before)
    sockets.demand_reached()
    sockets.remove()


def test_a_sequence_host_keeps_its_loss_and_score_by_position():
    loop = Loop(SmallGPT(), text(), ["h.0"], loss=sequence_loss, settings=NEVER, epochs=1, batches=1)
    report = loop.epoch()
    inputs, targets = loop.data
    with torch.no_grad():
        outputs = loop.model.eval()(inputs[900:])
    assert report.loss == pytest.approx(
        float(F.cross_entropy(outputs.flatten(0, 1), targets[900:].flatten())), abs=1e-4
    )
    assert report.score == pytest.approx(float((outputs.argmax(-1) == targets[900:]).float().mean()), abs=1e-3)
