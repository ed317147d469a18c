"""The documents say what the tables say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from esper_ray.actors.resources import EVERYONE, HOME_RESOURCE
from esper_ray.cli.app import app
from esper_ray.config import Config
from esper_ray.contracts.metrics import METRICS
from esper_ray.nissa.alerts import alert_rules

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def test_every_alert_has_its_section_in_the_runbook() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    anchors = {anchor(heading) for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)}

    for rule in alert_rules(Config().nissa):
        document, _, place = rule.runbook.partition("#")
        assert document == "docs/runbook.md"
        assert place in anchors
        assert f'<a id="{rule.name}"></a>' in text


def test_the_launchers_file_names_what_the_actors_ask_for() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    head = next(line for line in yaml.safe_load(text)["head_start_ray_commands"] if "--head" in line)
    resources = json.loads(head.split("--resources=")[1].strip("'"))

    assert set(resources) == {HOME_RESOURCE}
    assert all(set(spec.custom) <= set(resources) for spec in EVERYONE)
    assert f"{sum(spec.num_cpus for spec in EVERYONE):g} in all" in text
    assert f"{sum(spec.num_gpus for spec in EVERYONE):g} in all" in text


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"(?<!!)\[[^]]+\]\(([^)#]+)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"


def commands(found: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Each command of the tool with its options."""
    for name, each in getattr(found, "commands", {}).items():
        yield from commands(each, (*before, name))
    if not hasattr(found, "commands"):
        yield before, {"--help", *(option for each in found.params for option in (*each.opts, *each.secondary_opts))}


def test_the_commands_in_the_documents_exist_with_their_options() -> None:
    known = dict(commands(typer.main.get_command(app)))
    for document in DOCUMENTS:
        for line in re.findall(r"\besper ([a-z][^`\n#;]*)", document.read_text()):
            words = tuple(line.split())
            command = next((words[:count] for count in (3, 2, 1) if words[:count] in known), None)
            if command is None:
                assert any(each[: len(words[:1])] == words[:1] for each in known), f"{document.name}: esper {line}"
                continue
            unknown = {word for word in words if word.startswith("--")} - known[command]
            assert not unknown, f"{document.name}: esper {line}"


def test_the_metrics_in_the_documents_exist() -> None:
    known = {metric.name for metric in METRICS}
    for document in DOCUMENTS:
        for name in re.findall(r"\besper_[a-z_]+_(?:total|ms|level|seconds|bytes|depth)\b", document.read_text()):
            assert name in known, f"{document.name}: {name}"
