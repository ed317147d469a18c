"""What `attach` costs a loop of one's own: python -m benchmarks.attach [--quick] --json F

Steps with and without slots that sleep, in turns, so that a busy machine slows both; then the same for a host that is
compiled, and how long its first step takes after a seed has come and after one has become a part of the host.
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


def life_of_a_compiled_host(steps: int) -> dict[str, float]:
    """First steps of a compiled host after its seeds came, and after they became a part of it, to its median step."""
    growing = ("tamiyo.plateau_rate=100", "tamiyo.warmup_epochs=1", "seeds.gain_errors=0", "seeds.shadow_share=1")
    arm = Arm(attached=True, wrap=torch.compile, settings=growing)
    assert arm.grower is not None
    garden: Garden = arm.grower.garden
    found: dict[str, float] = {"first_step_ms": arm.step()}
    before, usual = (0, 0), 0.0
    for _ in range(20):
        times = []
        for _ in range(steps):
            grafted = sum(seed.branch is not None for seed in garden.seeds)
            fossils = sum(seed.stage.name == "FOSSILIZED" for seed in garden.seeds)
            took = arm.step()
            if usual and fossils > before[1]:
                found.setdefault("first_step_as_part_ms", took)
            elif usual and grafted > before[0]:
                found.setdefault("first_step_with_seeds_ms", took)
            before = (grafted, fossils)
            times.append(took)
        usual = statistics.median(times)
        found.setdefault("median_step_ms", usual)
        arm.grower.epoch([data()])
        if "first_step_as_part_ms" in found:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 60 if given.quick else 300
    figures: dict[str, Any] = {"eager": in_turns(Arm(attached=False), Arm(attached=True), rounds)}
    figures["compiled"] = in_turns(
        Arm(attached=False, wrap=torch.compile), Arm(attached=True, wrap=torch.compile), rounds
    )
    figures["compiled life"] = life_of_a_compiled_host(8 if given.quick else 20)
    figures["torch"] = torch.__version__
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
