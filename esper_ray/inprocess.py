"""A whole run in this one process: no Ray, no bus. For scripts, tests and benchmarks.

The parts are the real ones; only the hops between processes are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from esper_ray.config import Config, SeedConfig
from esper_ray.contracts.ports import Candidate, Kernel, KernelSpec, Publisher, RunOpening, SlotInfo
from esper_ray.contracts.signing import load_keys
from esper_ray.karn import catalog as karn
from esper_ray.karn import own
from esper_ray.tamiyo.controller import Tamiyo
from esper_ray.tezzeret import compiler
from esper_ray.tolaria.trainer import Surroundings
from esper_ray.urza.artifacts import pack

T = TypeVar("T")


class Immediate(Generic[T]):
    """An answer that is there already, or the fault that came instead."""

    def __init__(self, produce: Callable[[], T]) -> None:
        self._produce = produce

    def wait(self, timeout: float | None) -> T:  # noqa: ARG002
        return self._produce()


class LocalDecider:
    """Tamiyo in this process."""

    def __init__(self, tamiyo: Tamiyo) -> None:
        self.tamiyo = tamiyo

    def open_run(self, opening: RunOpening) -> None:
        self.tamiyo.open_run(opening)

    def reopen(self, opening: RunOpening) -> Immediate[bool]:
        def told() -> bool:
            self.tamiyo.open_run(opening)
            return True

        return Immediate(told)

    def decide(self, run: str, state: Sequence[bytes]) -> Immediate[list[bytes]]:
        return Immediate(lambda: self.tamiyo.decide(run, state))

    def close_run(self, run: str) -> None:
        self.tamiyo.close_run(run)


class LocalKernels:
    """Builds and checks each kernel when it is first asked for, as the forge does."""

    def __init__(self) -> None:
        self._made: dict[str, Kernel] = {}

    def fetch(self, spec: KernelSpec) -> Immediate[Kernel]:
        return Immediate(lambda: self._make(spec))

    def _make(self, spec: KernelSpec) -> Kernel:
        if spec.key not in self._made:
            self._made[spec.key] = pack(spec, *compiler.make(spec))
        return self._made[spec.key]


def candidates(slot: SlotInfo, seeds: SeedConfig | None = None) -> list[Candidate]:
    """What Karn offers for a slot, in a run with these settings or in an ordinary one."""
    seeds = seeds or SeedConfig()
    answer = karn.CATALOG.query(slot.signature, approved=seeds.approved, offer=seeds.offer)
    return karn.candidates(slot, answer.candidates)


def surroundings(config: Config, *, kernels: Any = None, publisher: Publisher | None = None) -> Surroundings:
    """Everything a `Trainer` talks to, in this process."""
    own.load(config.seeds.modules, config.run.code_folder)
    keys = load_keys(config.home / "keys" / "signing")
    tamiyo = Tamiyo(keys, journal=config.home / "journals" / "tamiyo.db", publisher=publisher, home=config.home)
    return Surroundings(
        decider=LocalDecider(tamiyo),
        kernels=kernels or LocalKernels(),
        candidates=lambda slot: candidates(slot, config.seeds),
        keys=keys,
        publisher=publisher,
        backends={"processes": "one, without Ray", "bus": "none"},
    )
