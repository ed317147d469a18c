"""What Urza withdraws the forge makes again, whatever it was doing at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from esper_ray.tezzeret.shift import Shift
from esper_ray.urza.checks import Finding
from esper_ray.urza.store import Store
from tests.unit.test_tezzeret_forge import SIGNATURE, Smithy, _compiler, smithy, specs, waited
from tests.urza_world import file_of

__all__ = ["_compiler", "smithy"]
(SPEC,) = specs("BP009")
ORDER = f"BP009@{SIGNATURE}"


@pytest.fixture
def shift(smithy: Smithy) -> Shift:
    """A forge that gets the order for what its store has lost, as Tezzeret does from Urza."""
    orders: list[Shift] = []

    def again(lost: Sequence[Finding]) -> None:
        orders[0].start([f"{each.blueprint}@{each.signature}" for each in lost])

    smithy.store.close()
    smithy.store = Store(smithy.folder / "urza", cache_bytes=0, on_loss=again)
    orders.append(Shift(smithy.forge({})))
    return orders[0]


def damage(store: Store, digest: str) -> None:
    path = file_of(store, digest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("version", [1, 2])
def test_each_version_that_is_healed_is_made_again(smithy: Smithy, shift: Shift, version: int) -> None:
    shift.start([ORDER])
    assert waited(shift)["phase"] == "done"
    row = next(row for row in smithy.store.list() if row.version == version)
    damage(smithy.store, row.digest)
    smithy.store.heal(smithy.store.verify().findings)
    assert waited(shift)["phase"] == "done"
    assert [gone.version for gone in smithy.store.withdrawals()] == [version]
    assert "compile_key" in smithy.store.get(SPEC).metadata
    assert smithy.store.verify().findings == ()
    assert smithy.started().count("compile BP009") == version


def test_a_kernel_that_is_damaged_before_it_is_measured_is_built_anew(
    smithy: Smithy, shift: Shift, monkeypatch
) -> None:
    forge = smithy.forges[-1]
    compile, damaged = forge.compile, []

    def compile_what_is_damaged(*arguments: Any) -> Any:
        if not damaged:
            damaged.append(smithy.store.find(SPEC))
            damage(smithy.store, damaged[0])
        return compile(*arguments)

    monkeypatch.setattr(forge, "compile", compile_what_is_damaged)
    shift.start([ORDER])
    assert waited(shift)["phase"] == "done"
    assert [gone.digest for gone in smithy.store.withdrawals()] == damaged
    assert smithy.started().count("eager BP009") == 2
    assert "compile_key" in smithy.store.get(SPEC).metadata
    assert smithy.store.verify().findings == ()
