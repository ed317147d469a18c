"""A person's decision about a seed, in words: `grow SLOT BLUEPRINT` and `cull SLOT`. No torch here.

The words become the same command that Tamiyo gives, and what is wrong with them is said before anything is sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, blueprint_number
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.errors import BlueprintError, RunError
from esper_ray.karn.catalog import CATALOG
from esper_ray.karn.recipe import LAST_OF_OURS
from esper_ray.reliability.ids import derive_seed

WORDS: Mapping[str, SeedOperation] = {"grow": SeedOperation.GERMINATE, "cull": SeedOperation.CULL}
_FORMS = "`grow SLOT BLUEPRINT` or `cull SLOT`"
_LONGEST_REASON = 60


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person wants done with one slot; ``blueprint`` is a number or a name, empty but for growing."""

    operation: SeedOperation
    slot: str
    blueprint: str = ""


def parse(text: str) -> Wish:
    """``"grow stage1 BP009"`` or ``"cull stage1"``.

    Raises:
        RunError: it is neither.
    """
    word, *rest = text.split() or [""]
    operation = WORDS.get(word)
    if operation is None or len(rest) != (2 if operation is SeedOperation.GERMINATE else 1):
        raise RunError(f"{text!r} is no decision.", remedy=f"Write {_FORMS}.")
    return Wish(operation, *rest)


def slots_of(manifest: Mapping[str, Any]) -> list[SlotInfo]:
    """The slots of a run, as its manifest has them."""
    rows = manifest.get("slots", ())
    return [SlotInfo(int(row["index"]), row["name"], SlotSignature.parse(row["signature"])) for row in rows]


def find_slot(name: str, slots: Sequence[SlotInfo]) -> SlotInfo:
    """The slot of that name, or of that index.

    Raises:
        RunError: there is none; the text has the nearest one.
    """
    for slot in slots:
        if name in (slot.name, str(slot.index)):
            return slot
    names = [slot.name for slot in slots]
    raise RunError(
        f"The model has no slot {name}.",
        why=f"Its slots are {', '.join(names) or 'none'}.",
        remedy=_nearest(name, names),
    )


def find_blueprint(wanted: str, approved: Collection[str]) -> str:
    """The number of a blueprint that is given by number (BP009, 9) or by name, and may grow in this run.

    Raises:
        BlueprintError: there is none, or its tier is not approved; the text has the nearest one, or the way to approve.
    """
    text = wanted.upper()
    digits = text.removeprefix("BP")
    if digits.isdigit():
        text = f"BP{int(digits):03d}"
        if int(digits) > LAST_OF_OURS and text in approved:
            # A block of the user's own is known where the run trains.
            return text
    found = next((each.id for each in CATALOG if text == each.id or wanted == each.name), None)
    if found is None:
        known = [name for each in CATALOG for name in (each.id, each.name)]
        near = _nearest(wanted, known) or "`esper blueprints` lists them."
        raise BlueprintError(f"There is no blueprint {wanted}.", remedy=near)
    return CATALOG.get(found, approved=approved).id


def command(
    wish: Wish, slots: Sequence[SlotInfo], *, run: str, author: str, now_ns: int, approved: Collection[str], why: str
) -> AdaptationCommand:
    """The command that carries the wish out; the run judges it by its own state.

    Raises:
        RunError: there is no such slot.
        BlueprintError: there is no such blueprint, it does not fit the slot, or is not approved.
    """
    slot, number = find_slot(wish.slot, slots), 0
    if wish.operation is SeedOperation.GERMINATE:
        found = find_blueprint(wish.blueprint, approved)
        number = blueprint_number(found)
        if number <= LAST_OF_OURS:
            CATALOG.get(found, approved=approved).check_fit(slot.signature)
    return AdaptationCommand(
        command_id=derive_seed(run, "by hand", author, now_ns, slot.index, number),
        type=CommandType.SEED,
        run=run,
        epoch=0,
        issued_at_ns=now_ns,
        issued_by=author,
        slot=slot.index,
        seed_directive=SeedDirective(wish.operation, blueprint=number),
        annotations={"why": why[:_LONGEST_REASON]} if why else {},
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"Did you mean {near[0]}?" if near else ""
