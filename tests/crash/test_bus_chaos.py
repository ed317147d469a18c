"""Whatever is killed or frozen around the bus: what was promised has its effect once. `make chaos` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import chaos
from esper_ray.reliability.journal import Journal

MUST_BE_NOTHING = ("lost", "repeated", "dead_missing", "dead_wrong", "overtaken")


@pytest.mark.timeout(400)
def test_thirty_rounds_of_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    found = chaos.survey(30, 20, 2000, home=tmp_path, progress=lambda: None)
    assert {key: found[key] for key in MUST_BE_NOTHING} == dict.fromkeys(MUST_BE_NOTHING, 0)
    assert found["promised"] >= 2000
    assert found["dead_letters"] > 0, "some messages fail whatever reads them"
    assert all(found[f"killed.{role}"] for role in ("redis", "sender", "reader", "keeper"))


def test_the_count_finds_what_was_lost_repeated_and_wrongly_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in chaos.SENDERS:
        (tmp_path / f"{name}.promised").write_text("1\n51\n")
    for group in chaos.GROUPS:
        journal = Journal(chaos.effects_of(tmp_path, group), sync=False)
        had = [f"{name}:{number}".encode() for name in chaos.SENDERS for number in range(1, 100)]
        # One message of the first sender has no effect, another two under different event ids.
        had.remove(b"sender-a:5")
        journal.append_many("effects", [(str(place), payload) for place, payload in enumerate([*had, b"sender-a:6"])])
        journal.close()
    letters = [("oona.normal", "1-0", "first", b"sender-a:100"), ("oona.normal", "2-0", "first", b"sender-a:7")]
    monkeypatch.setattr(chaos, "dead", lambda _: letters)
    found = chaos.judge(chaos.build({"home": str(tmp_path)}))
    # The failing messages are lost too where no dead letter tells of them: one for the first group, two for the second.
    assert found["lost"] == 2 + 1 + 2
    assert found["repeated"] == 2
    assert found["dead_missing"] == 1 + 2
    assert found["dead_wrong"] == 1
