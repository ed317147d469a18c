"""What the forge finds out about a kernel is measured, and a block that must not be grafted is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch._inductor
from torch import Tensor, nn

from esper_ray.config import ForgeConfig
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.errors import KernelError
from esper_ray.karn.blueprints import build
from esper_ray.karn.catalog import CATALOG
from esper_ray.tezzeret import compiler
from esper_ray.tezzeret.forge import Forge
from esper_ray.tezzeret.strategies import STRATEGIES
from esper_ray.tezzeret.toolchain import compiler_available
from esper_ray.urza.store import Store

SPEC = KernelSpec("BP009", SlotSignature("conv", (8, 6, 6)))


class Bad(nn.Module):
    """A branch with one weight and one fault."""

    def __init__(self, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.fault = fault

    def forward(self, h: Tensor) -> Tensor:
        return self.fault(h, self.weight)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda h, w: w * h[:, :2], "turns .* into"),
        (lambda h, w: w * h / 0.0, "not finite"),
        (lambda h, w: h + 0.0 * w, "cannot learn: the gradient of weight"),
        (lambda h, _: h.clone(), "cannot learn: the gradient of weight"),
        (lambda h, w: w * h + torch.sqrt(w - 1.0), "cannot learn: the gradient of weight"),
    ],
)
def test_a_block_that_breaks_a_promise_is_refused(fault, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        compiler.check(SPEC, Bad(fault))


def test_a_kernel_carries_its_weights_and_what_was_measured() -> None:
    weights, found = compiler.make(SPEC)
    branch = build(SPEC.blueprint, SPEC.signature)
    branch.load_state_dict(safetensors.torch.load(weights))
    blueprint = CATALOG.get(SPEC.blueprint)
    assert found["parameters_count"] == blueprint.parameters(SPEC.signature)
    assert found["flops_forward"] == blueprint.flops(SPEC.signature)
    assert found["flops_backward"] == 2 * found["flops_forward"]
    assert found["eager_ms"] > 0
    assert found["compiled_ms"] is None
    assert 0.3 < found["scale_ratio"] < 0.7
    assert found["torch"] == torch.__version__


def test_steps_are_measured_in_turns_by_their_median() -> None:
    order: list[str] = []
    ticks = iter([0, 1, 0, 5, 0, 3, 0, 5, 0, 2, 0, 5])
    steps = [lambda: order.append("a"), lambda: order.append("b")]
    assert compiler.measure(steps, 3, 0.0, lambda: next(ticks)) == [2000.0, 5000.0]
    assert order == ["a", "b"] * 4


def test_the_real_job_builds_and_compiles(tmp_path: Path) -> None:
    store = Store(tmp_path / "urza")
    forge = Forge(store, tmp_path / "forge", ForgeConfig(job_seconds=300), keys=KeyRing((("k1", bytes(32)),)))
    specs = [CATALOG.get(name).spec(SPEC.signature) for name in ("BP001", "BP002")]
    built = forge.build(specs)
    assert built.given_up == {}
    assert {row.key for row in store.list()} == {spec.key for spec in specs}
    able, reason = compiler_available()
    if able:
        outcome = forge.compile(specs)
        (item,) = outcome.finished.values()
        assert item.result in ("eager", "compiled"), item.why
        assert item.figures["compiled_ms"] > 0
    else:
        assert reason in forge.compile(specs).note
    forge.close()
    store.close()


def test_every_strategy_says_only_what_inductor_knows() -> None:
    known = set(torch._inductor.list_options())
    for strategy in STRATEGIES.values():
        assert set(strategy.options) <= known, strategy.name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fast", "standard", "aggressive"])
def test_with_each_strategy_the_compiled_block_computes_the_same(strategy) -> None:
    found = compiler.compare(SPEC, strategy)
    assert found["compiled_ms"] > 0
    assert found["compile_busy_seconds"] > 0
