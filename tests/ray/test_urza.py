"""Urza among the actors: large kernels lie in shared memory, nothing asked for is lost, and damage heals by itself."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import ray

from esper_ray.actors import crew
from esper_ray.actors.clients import RemoteKernels
from esper_ray.actors.shared import INLINE_BYTES, SharedKernel
from esper_ray.contracts.ports import Kernel, KernelSpec, SlotSignature
from esper_ray.contracts.signing import load_keys
from esper_ray.errors import KernelMissing
from esper_ray.runtime import Session
from esper_ray.tezzeret import seal
from esper_ray.urza import artifacts
from esper_ray.urza.catalog import Row
from tests.ray.conftest import until
from tests.urza_world import METADATA, weights

pytestmark = pytest.mark.ray


def spec(number: int) -> KernelSpec:
    """A kernel that no run asks for."""
    return KernelSpec("BP005", SlotSignature("vector", (5000 + number,)))


@pytest.fixture(scope="module")
def stored(system: Session) -> list[Kernel]:
    """Twenty sealed kernels; the weights of every fourth are too large for a reply."""
    keys = load_keys(system.config.home / "keys" / "signing")
    kernels = []
    for number in range(20):
        data = weights(*np.full(40_000 if number % 4 == 0 else 100, number))
        sealed = seal.sealed(spec(number).key, data, METADATA, keys)
        kernels.append(system.ask("urza", "put", spec(number), data, sealed))
    return kernels


def urza(system: Session) -> Any:
    handle = crew.find("urza", system.config.ray.namespace)
    assert handle is not None
    return handle


def damage(system: Session, digest: str) -> None:
    path = artifacts.path_of(system.config.home / "urza" / "artifacts", digest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def opened(found: Kernel | SharedKernel) -> Kernel:
    return found.open() if isinstance(found, SharedKernel) else found


def address(kernel: Kernel) -> int:
    place: int = np.frombuffer(kernel.weights, dtype=np.uint8).__array_interface__["data"][0]
    return place


def test_large_kernels_are_read_where_they_lie_and_small_ones_are_sent(system: Session, stored: list[Kernel]) -> None:
    before = system.ask("urza", "stats")
    found = [ray.get(urza(system).fetch.remote(stored[0].spec)) for _ in range(3)]
    assert all(isinstance(each, SharedKernel) for each in found)
    kernels = [each.open() for each in found]
    assert kernels[0] == stored[0]
    assert len(kernels[0].weights) > INLINE_BYTES
    assert len({address(kernel) for kernel in kernels}) == 1
    assert memoryview(kernels[0].weights).readonly
    assert ray.get(urza(system).fetch.remote(stored[1].spec)) == stored[1]
    after = system.ask("urza", "stats")
    assert after["shared_hits"] - before["shared_hits"] >= 2
    assert after["memory_hits"] - before["memory_hits"] >= 1


def test_a_thousand_fetches_at_once_lose_nothing(system: Session, stored: list[Kernel]) -> None:
    calls = [urza(system).fetch.remote(stored[number % 20].spec) for number in range(1000)]
    for number, found in enumerate(ray.get(calls, timeout=120)):
        assert opened(found) == stored[number % 20]


def test_fetches_outlive_urzas_process(system: Session, stored: list[Kernel]) -> None:
    source = RemoteKernels(system.config.ray.namespace, load_keys(system.config.home / "keys" / "signing"))
    pid = system.ask("urza", "ping")["pid"]
    answers = [source.fetch(kernel.spec) for kernel in stored * 5]
    for answer in answers:
        answer.wait(0)
    os.kill(pid, 9)
    for answer, kernel in zip(answers, stored * 5, strict=True):
        assert answer.wait(60) == kernel
    assert system.ask("urza", "ping")["pid"] != pid


def test_a_miss_is_told_from_what_was_withdrawn(system: Session) -> None:
    with pytest.raises(KernelMissing) as told:
        system.ask("urza", "fetch", spec(99))
    assert "withdrawn" not in str(told.value)
    kernel = system.ask("urza", "put", spec(98), weights(1, 2, 3), METADATA)
    damage(system, kernel.digest)
    (finding,) = system.ask("urza", "verify").findings
    assert (finding.kind, finding.digest) == ("damaged", kernel.digest)
    assert system.ask("urza", "heal", [finding]) == [finding]
    with pytest.raises(KernelMissing, match="withdrawn"):
        system.ask("urza", "fetch", spec(98))


def test_a_damaged_kernel_is_withdrawn_and_made_again_by_the_forge(system: Session) -> None:
    wanted = KernelSpec("BP002", SlotSignature("vector", (24,)))
    system.ask("tezzeret", "start_forge", [f"{wanted.blueprint}@{wanted.signature}"])

    def newest() -> Row | None:
        rows = system.ask("urza", "list", wanted.blueprint, str(wanted.signature))
        return rows[-1] if rows else None

    first = until(newest, seconds=120, what="the kernel is made")
    damage(system, first.digest)
    os.kill(system.ask("urza", "ping")["pid"], 9)
    until(lambda: (row := newest()) and row.version > first.version, seconds=120, what="it is made again")
    assert first.digest in [gone.digest for gone in system.ask("urza", "withdrawals")]
    assert system.ask("urza", "verify").findings == ()
