"""Four ways to join a slot: what each leaves open to the host, what a vector and a margin do, and what they cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import BlendMode, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.errors import ConfigError
from esper_ray.kasmina.blending import MODES, blend, channel_alphas, sample_weights
from esper_ray.kasmina.confidence import margins
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.slot import Pass
from esper_ray.tasks.transformer import TransformerLite
from tests.unit.kasmina_world import MADE, SIGNATURES, Life, Loop, walk

ALPHAS = (0.0, 0.3, 0.7, 1.0)


def gradients_around_the_slot(mode: str, alpha: float, to: Stage = Stage.BLENDING) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a loss, with respect to what comes into the slot and what leaves it."""
    life, seen = Life("conv", mode), []

    def keep(_module, _inputs, tensor):
        if tensor.requires_grad:  # the gauge's pass is one without
            tensor.retain_grad()
            seen.append(tensor)

    body = life.garden.model.body
    before = body.register_forward_hook(keep)
    walk(life, to)
    life.slot.seed.alpha = alpha
    after = body.register_forward_hook(keep)
    seen.clear()
    life.garden.model(life.inputs).square().sum().backward()
    before.remove()
    after.remove()
    h, y = seen[-2:]
    return torch.zeros_like(h) if h.grad is None else h.grad, y.grad


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "convex"])
def test_the_host_path_stays_open_at_every_alpha(mode, alpha):
    """The host's gradient passes the slot unchanged: the branch is a constant to it."""
    into, out = gradients_around_the_slot(mode, alpha)
    assert torch.equal(into, out)
    assert out.abs().max() > 0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_convex_closes_the_host_path_while_the_seed_is_live(alpha):
    into, out = gradients_around_the_slot("convex", alpha)
    torch.testing.assert_close(into, (1 - alpha) * out)


@pytest.mark.parametrize("mode", list(MODES))
def test_the_host_learns_through_a_fossil_in_every_mode(mode):
    into, out = gradients_around_the_slot(mode, 1.0, Stage.FOSSILIZED)
    assert into.abs().max() > 0
    assert not torch.allclose(into, out)


@pytest.mark.parametrize("mode", list(MODES))
def test_an_isolated_seed_learns_in_the_way_it_will_be_joined(mode):
    life = walk(Life("vector", mode), Stage.TRAINING)
    garden, targets = life.garden, torch.arange(6) % 5
    garden.switch.current = Pass.SHADOW
    shadow = F.cross_entropy(garden.model(life.inputs), targets)
    garden.switch.current = Pass.MODEL
    with torch.no_grad():
        host = nn.functional.linear(life.inputs, garden.model.body.weight, garden.model.body.bias)
        delta = life.slot.seed.branch(host)
        y = delta if mode == "convex" else host + delta
        expected = F.cross_entropy(garden.model.head(y.relu()), targets)
    torch.testing.assert_close(shadow, expected)


@pytest.mark.parametrize("kind", list(SIGNATURES))
def test_channels_have_an_alpha_each_and_open_one_after_another(kind):
    h = torch.zeros(2, *SIGNATURES[kind].shape)
    vectors = [channel_alphas(alpha, h, kind).flatten() for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(vector.shape == (8,) for vector in vectors)
    assert torch.equal(vectors[0], torch.zeros(8))
    assert torch.equal(vectors[-1], torch.ones(8))
    assert vectors[2][0] == 1.0
    assert vectors[2][-1] == 0.0
    assert all((b >= a).all() for a, b in itertools.pairwise(vectors))
    delta = torch.ones_like(h)
    y = blend(BlendMode.CHANNEL, h, delta, 0.25, kind=kind)
    channel = y[0, :, 0, 0] if kind == "conv" else y[0, 0] if kind == "sequence" else y[0]
    torch.testing.assert_close(channel, vectors[1])


@pytest.mark.parametrize("kind", list(SIGNATURES))
def test_unsure_samples_come_first_and_all_arrive_together(kind):
    h, margin = torch.zeros(3, *SIGNATURES[kind].shape), torch.tensor([0.0, 0.5, 1.0])
    for alpha in (0.2, 0.6):
        weights = sample_weights(alpha, margin, h, kind).flatten()
        torch.testing.assert_close(weights, torch.tensor([alpha, alpha**2.5, alpha**4]))
    assert torch.equal(sample_weights(1.0, margin, h, kind).flatten(), torch.ones(3))


def test_the_margin_is_that_of_the_models_prediction_without_the_seed():
    life = Life("vector", "confidence")
    with torch.no_grad():
        likeliest = life.garden.model(life.inputs).softmax(1).topk(2).values
    walk(life, Stage.BLENDING)
    life.slot.seed.alpha = 0.4
    life.output()
    torch.testing.assert_close(life.garden.switch.gauge.margin, likeliest[:, 0] - likeliest[:, 1])


def test_the_gauge_costs_one_more_pass_on_the_ramp_and_nothing_before_and_after():
    life, calls = Life("vector", "confidence"), []
    life.garden.model.body.register_forward_hook(lambda *_: calls.append(1))
    for stage, passes in ((Stage.TRAINING, 1), (Stage.BLENDING, 2), (Stage.SHADOWING, 1), (Stage.FOSSILIZED, 1)):
        walk(life, stage)
        life.steps(1)
        calls.clear()
        life.output()
        assert len(calls) == passes, stage
    assert not life.garden.model._forward_pre_hooks


def test_looking_at_the_margin_moves_no_statistics_and_draws_nothing():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    torch.manual_seed(0)
    garden = Garden(
        Noisy(), (SlotInfo(0, "body", SIGNATURES["vector"]),), SeedConfig(), MADE, Loop(),
        run_seed=1, max_parameters=10**6, lockstep=True,
    )  # fmt: skip
    inputs, ends = torch.randn(32, 8), []
    for mode in (BlendMode.RESIDUAL, BlendMode.CONFIDENCE):
        twin = Life("vector")
        twin.garden = garden
        if garden.slots[0].seed is None:
            twin.slot = garden.slots[0]
            assert twin.order(SeedOperation.GERMINATE) == ""
            garden.before_step(0)
        seed = garden.slots[0].seed
        garden.slots[0].stage = seed.stage = Stage.BLENDING
        seed.mode, seed.alpha = mode, 0.5
        if mode is BlendMode.CONFIDENCE:
            garden.switch.gauge.add(seed)
        norm = garden.model.body[1]
        norm.reset_running_stats()
        torch.manual_seed(3)
        garden.model.train()
        garden.model(inputs)
        ends.append((norm.running_mean.clone(), norm.num_batches_tracked.clone(), torch.get_rng_state()))
    assert garden.switch.gauge.margin is not None
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(module.training for module in garden.model.modules())


def test_a_causal_model_stays_causal_under_confidence():
    torch.manual_seed(0)
    model = TransformerLite(classes=11, context=12, width=32).eval()
    garden = Garden(
        model, (SlotInfo(0, "block1", SlotSignature("sequence", (12, 32))),), SeedConfig(blend_mode="confidence"),
        MADE, Loop(), run_seed=1, max_parameters=10**6, lockstep=True,
    )  # fmt: skip
    life = Life("vector")
    life.garden = garden
    assert life.order(SeedOperation.GERMINATE) == ""
    garden.before_step(0)
    slot = garden.slots[0]
    slot.stage = slot.seed.stage = Stage.BLENDING
    slot.seed.alpha = 0.5
    tokens = torch.randint(11, (2, 12))
    later = tokens.clone()
    later[:, 8:] = (later[:, 8:] + 1) % 11
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :8], model(later)[:, :8])
    assert garden.switch.gauge.margin.shape == (2, 12)


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.randn(3, 4), (3,)),
        (torch.randn(3, 1), (3,)),
        (torch.randn(3, 7, 4), (3, 7)),
        (torch.randn(3, 4, 5, 5), (3,)),
        ({"logits": torch.randn(3, 4)}, (3,)),
        ((torch.randn(3, 4), None), (3,)),
    ],
)
def test_margins_are_between_0_and_1_for_every_kind_of_prediction(output, shape):
    found = margins(output)
    assert found.shape == shape
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("output", [torch.randn(3), torch.arange(6).reshape(2, 3), {"loss": torch.randn(())}, "text"])
def test_a_model_without_classes_is_told_that_confidence_is_not_for_it(output):
    with pytest.raises(ConfigError, match="classes"):
        margins(output)


@pytest.mark.parametrize(
    ("host", "branch"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("mode", list(MODES))
def test_what_leaves_the_slot_has_the_type_of_what_the_host_gives(mode, host, branch):
    h, delta = torch.randn(2, 8, dtype=host), torch.randn(2, 8, dtype=branch)
    for alpha in ALPHAS:
        y = blend(MODES[mode], h, delta, alpha, kind="vector", margin=torch.rand(2))
        assert y.dtype is h.dtype
        assert y.shape == h.shape
