"""`esper urza`: what is stored is listed, what is damaged is named, and healing says who makes it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper_ray.cli import urza as cli
from esper_ray.cli.app import app
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, OTHER, SPEC, file_of, weights

runner = CliRunner()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESPER_HOME", str(tmp_path))
    # A folder of its own, so that no cluster of somebody else is asked.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cli.console, "width", 200)
    store = Store(tmp_path / "urza")
    store.put(SPEC, weights(1, 2), METADATA)
    store.put(OTHER, weights(1), {**METADATA, "tier": 2, "family": "scaling", "compile_key": "k"})
    store.close()
    return tmp_path


def urza(*arguments: str, status: int = 0) -> str:
    result = runner.invoke(app, ["urza", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.parametrize(
    ("filters", "keys"),
    [
        ((), [OTHER.key, SPEC.key]),
        (("--blueprint", "BP009"), [SPEC.key]),
        (("--slot", "32x12x12"), [OTHER.key]),
        (("--tier", "experimental"), [OTHER.key]),
        (("--family", "scaling"), [OTHER.key]),
        (("--stage", "built"), [SPEC.key]),
        (("--stage", "measured", "--blueprint", "BP009"), []),
    ],
)
def test_what_is_stored_is_listed_by_what_is_asked_for(home: Path, filters: tuple[str, ...], keys: list[str]) -> None:
    assert [json.loads(line)["key"] for line in urza("list", "--json", *filters).splitlines()] == keys
    text = urza("list", *filters)
    assert all(key in text for key in keys)
    assert keys or "Nothing is stored" in text


def test_a_whole_store_is_said_to_be_whole(home: Path) -> None:
    assert urza("verify") == "2 artifacts are whole, 0 findings.\n"
    assert "Nothing was withdrawn" in urza("withdrawn")


def test_figures_are_shown(home: Path) -> None:
    found = json.loads(urza("stats", "--json"))
    assert (found["kernels"], found["breaker"], found["write_breaker"]) == (2, "CLOSED", "CLOSED")
    assert "kernels" in urza("stats")


def test_damage_is_named_and_removed_only_when_healing_is_asked_for(home: Path) -> None:
    store = Store(home / "urza")
    kernel = store.get(SPEC)
    path = file_of(store, kernel.digest)
    store.close()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for _ in range(2):
        told = urza("verify", status=1)
        assert f"damaged, {SPEC.key} v1" in told
        assert str(path) in told
    healed = urza("verify", "--heal")
    assert "1 removed" in healed
    assert "esper forge" in healed
    assert not path.exists()
    assert urza("verify") == "1 artifacts are whole, 0 findings.\n"
    (line,) = urza("withdrawn", "--json").splitlines()
    assert (json.loads(line)["key"], json.loads(line)["version"]) == (SPEC.key, 1)


def test_what_opening_the_store_withdrew_is_named_too(home: Path) -> None:
    store = Store(home / "urza")
    path = file_of(store, store.get(SPEC).digest)
    store.close()
    path.unlink()
    first, last = map(json.loads, urza("verify", "--json").splitlines())
    assert (first["kind"], first["path"]) == ("row without file", str(path))
    assert first["how"] == "withdrawn when the store was opened"
    assert last == {"sound": 1, "findings": 0, "removed": 0}
