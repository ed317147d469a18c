"""What comes from Urza is grafted only with a seal of this installation's forge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper_ray.actors import clients, kernel_parts
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.ports import Kernel, KernelSpec, SlotSignature
from esper_ray.errors import AuthenticityError, EnvironmentFault
from esper_ray.tezzeret.seal import sealed
from esper_ray.urza.artifacts import pack

KEYS = KeyRing((("k1", bytes(32)),))
SPEC = KernelSpec("BP002", SlotSignature("conv", (8, 6, 6)))
WEIGHTS = (2).to_bytes(8, "little") + b"{}"


def made_with(keys: KeyRing) -> Kernel:
    return pack(SPEC, WEIGHTS, sealed(SPEC.key, WEIGHTS, {"eager_ms": 1.0}, keys))


class Urza:
    """Answers with these kernels, one after the other."""

    def __init__(self, *kernels: Kernel) -> None:
        self._left = iter(kernels)

    def call(self, method: str, *arguments: object) -> str:
        assert arguments[0] == SPEC, method
        return "reference"

    def result(self, reference: str, timeout: float | None) -> Kernel:
        return next(self._left)


def answer(*kernels: Kernel) -> clients.KernelAnswer:
    return clients.KernelAnswer(Urza(*kernels), SPEC, KEYS)  # type: ignore[arg-type]


def test_a_kernel_without_our_seal_is_waited_for_until_the_forge_has_made_it_anew(monkeypatch) -> None:
    monkeypatch.setattr(clients, "_PAUSE_SECONDS", 0.0)
    ours, plain = made_with(KEYS), pack(SPEC, WEIGHTS, {"eager_ms": 1.0})
    strange = made_with(KeyRing((("k9", b"9" * 32),)))
    asked = answer(plain, strange, ours)
    assert asked.wait(0.0) is None
    assert asked.wait(0.0) is None
    assert asked.wait(0.0) is ours


def test_a_false_seal_is_refused() -> None:
    false = replace(made_with(KEYS), metadata={**made_with(KEYS).metadata, "eager_ms": 0.1})
    with pytest.raises(AuthenticityError, match="was refused: invalid signature"):
        answer(false).wait(None)


class OnLine:
    """What comes over the line, one answer after the other; an error is raised."""

    def __init__(self, *answers: object) -> None:
        self._left = iter(answers)

    def wait(self, timeout: float | None) -> object:
        found = next(self._left)
        if isinstance(found, Exception):
            raise found
        return found


def by_line(*answers: object) -> clients.KernelAnswer:
    return clients.KernelAnswer(Urza(made_with(KEYS)), SPEC, KEYS, OnLine(*answers))  # type: ignore[arg-type]


def test_a_kernel_that_is_there_comes_over_the_line_and_has_to_bear_the_seal_too() -> None:
    ours = made_with(KEYS)
    assert by_line(None, kernel_parts.answered(ours)).wait(None) == ours
    false = replace(ours, metadata={**ours.metadata, "eager_ms": 0.1})
    with pytest.raises(AuthenticityError, match="was refused: invalid signature"):
        by_line(kernel_parts.answered(false)).wait(None)


@pytest.mark.parametrize("said", [[], EnvironmentFault("The line broke.")], ids=["not there", "broken"])
def test_what_the_line_does_not_give_is_asked_through_ray(said: object) -> None:
    assert by_line(said).wait(None) == made_with(KEYS)


def test_a_line_that_stays_silent_is_not_waited_for_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(clients, "_LINE_SECONDS", 0.0)
    assert by_line(None).wait(None) == made_with(KEYS)


def test_what_is_asked_on_the_line_is_what_was_wanted() -> None:
    spec = KernelSpec("BP005", SlotSignature("conv", (8, 6, 6)), {"ratio": 0.5})
    assert kernel_parts.spec_in(kernel_parts.asked(spec)) == spec
