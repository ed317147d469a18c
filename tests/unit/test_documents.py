"""The documents say what the tables say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from esper_ray.actors.resources import EVERYONE, HOME_RESOURCE
from esper_ray.config import Config
from esper_ray.nissa.alerts import alert_rules

ROOT = Path(__file__).parents[2]


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
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"(?<!!)\[[^]]+\]\(([^)#]+)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"
