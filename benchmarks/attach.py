"""What `attach` costs a loop of one's own: python -m benchmarks.attach [--quick] --json F

Steps with and without slots that sleep, in turns, so that a busy machine slows both; then the same for a host that is
compiled, and how long the first step takes after seeds have come, have begun to blend, have become a part of the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper_ray
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina.garden import Garden
from esper_ray.tasks.resnet import ResNetLite

SLOTS = ("stage1", "stage2", "stage3")


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 1, 24, 24), torch.randint(45, (64,))


class Plain(ResNetLite):
    """The host that is not attached: another class, for the compiler shares its code among models of one."""


class Arm:
    """One model in a loop; ``wrap`` is what the model is called through."""

    def __init__(self, *, attached: bool, wrap: Callable[[nn.Module], Any] = lambda model: model, settings: Any = ()):
        torch.manual_seed(0)
        self.model = (ResNetLite if attached else Plain)(channels=1, classes=45, width=16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.inputs, self.targets = data()
        self.grower = None
        if attached:
            self.grower = esper_ray.attach(
                self.model, SLOTS, loss=F.cross_entropy, optimizer=self.optimizer, epochs=30, sample=self.inputs,
                config=["run.mode=lockstep", *settings],
            )  # fmt: skip
        self.run = wrap(self.model)

    def step(self) -> float:
        """Milliseconds of one step."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.run(self.inputs), self.targets)
        loss.backward()
        if self.grower is not None:
            self.grower.step(self.inputs, self.targets, loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (time.perf_counter() - start) * 1e3


def in_turns(first: Arm, second: Arm, rounds: int) -> dict[str, float]:
    """Medians of both arms, and of the ratio of neighbouring steps."""
    for _ in range(5):
        first.step()
        second.step()
    pairs = [(first.step(), second.step()) for _ in range(rounds)]
    return {
        "without_ms": statistics.median(a for a, _ in pairs),
        "with_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


GROWING = (
    "tamiyo.plateau_rate=100",
    "tamiyo.onset=0",
    "tamiyo.warmup_epochs=1",
    "seeds.gain_errors=0",
    "seeds.shadow_share=1",
)


def life(steps: int, wrap: Callable[[nn.Module], Any]) -> dict[str, float]:
    """First steps after seeds came, after they began to blend, and after they became a part, each to the median step
    of the state that it begins. Kernels are there when they are asked for, as a forge has them.
    """
    arm = Arm(attached=True, wrap=wrap, settings=GROWING)
    assert arm.grower is not None
    garden: Garden = arm.grower.garden
    found: dict[str, float] = {"first_step_ms": arm.step(), "second_step_ms": arm.step()}
    told: dict[str, list[float]] = {}
    states: list[tuple[str, float]] = []
    for _ in range(20):
        for _ in range(steps):
            state = _state(garden)
            states.append((state, arm.step()))
        arm.grower.epoch([data()])
        for pending in garden.births.pending:
            pending.answer.wait(None)
        if _state(garden) == "part":
            break
    for _ in range(steps):
        states.append(("part", arm.step()))
    for state, took in states:
        told.setdefault(state, []).append(took)
    for state, times in told.items():
        found[f"{state}_ms"] = statistics.median(times)
        if state != "dormant":
            found[f"first_{state}"] = times[0] / statistics.median(times)
    return found


def _state(garden: Garden) -> str:
    """What the next step will have: the seeds that come furthest decide."""
    if any(seed.stage is Stage.FOSSILIZED for seed in garden.seeds):
        return "part"
    if any(seed.alpha > 0.0 for seed in garden.seeds):
        return "live"
    return "isolated" if any(seed.branch is not None for seed in garden.seeds) else "dormant"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 60 if given.quick else 300
    figures: dict[str, Any] = {"eager": in_turns(Arm(attached=False), Arm(attached=True), rounds)}
    dormant, opened = Arm(attached=True, wrap=torch.compile), Arm(attached=True, wrap=torch.compile)
    figures["compiled"] = in_turns(Arm(attached=False, wrap=torch.compile), dormant, rounds)
    assert opened.grower is not None
    assert opened.grower._sockets is not None
    opened.grower._sockets.settle = lambda: None  # type: ignore[method-assign]  # as if a seed hung there
    figures["compiled, sockets open"] = in_turns(dormant, opened, rounds)
    steps = 8 if given.quick else 20
    figures["compiled life"] = [life(steps, torch.compile) for _ in range(2 if given.quick else 5)]
    figures["plain life"] = [life(steps, lambda model: model) for _ in range(2 if given.quick else 5)]
    figures["torch"] = torch.__version__
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
