"""What a user can get wrong: exit code 2, one sentence with the remedy, no traceback, nothing half-written."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_ray import cluster
from esper_ray.config import load
from esper_ray.runtime import Session


def esper(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "ESPER_REDIS_URL")}
    # A folder of its own, so that no cluster of somebody else is found.
    values |= {"ESPER_HOME": str(home), "RAY_TMPDIR": str(home.parent), "COLUMNS": "80", **environment}
    command = [sys.executable, "-c", "from esper_ray.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=values, timeout=60, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["run", "--set", "run.epoch=3"], {}, ["no key run.epoch", "run.epochs", "esper config show"]),
        (["run", "--set", "run.epochs=x"], {}, ["run.epochs", "'x'"]),
        (["run", "--set", "run.task=resnet-50"], {}, ["run.task", "resnet-50"]),
        (["run", "--config", "/no/such.yaml"], {}, ["/no/such.yaml", "Check the path"]),
        (["run", "--set", "ray.resources={x: {num_cpus: 1}}"], {}, ["unknown actor 'x'", "tolaria"]),
        (["run"], {"ESPER_REDIS_URL": "redis://127.0.0.1:1/0"}, ["127.0.0.1:1", "cannot be reached"]),
        (["run"], {"ESPER_HOME": "/proc/none"}, ["Cannot write", "ESPER_HOME"]),
        (["run"], {"RAY_ADDRESS": "127.0.0.1:1"}, ["No Ray cluster answers at 127.0.0.1:1", "RAY_ADDRESS"]),
        (["run"], {"RAY_ADDRESS": "ray://host:10001"}, ["ray://host:10001", "127.0.0.1:6385"]),
        (["run"], {"RAY_TMPDIR": "/tmp/" + "x" * 80}, ["too long", "RAY_TMPDIR"]),
        (["run", "--resume", "nothing-1"], {}, ["no run nothing-1", "esper runs"]),
        (["run", "--fork", "nothing-1@3"], {}, ["no run nothing-1", "esper runs"]),
        (["run", "--fork", "nothing-1@x"], {}, ["no place to fork at", "RUN@EPOCH"]),
        (["run", "--decide", "grow stage1 BP009"], {}, ["--decide needs --fork", "esper grow"]),
        (["run", "--fork", "nothing-1@3", "--fast"], {}, ["--fork goes with --decide and --set alone"]),
        (["compare", "nothing-1"], {}, ["two runs to compare", "esper runs"]),
        (["compare", "nothing-1", "nothing-2"], {}, ["no run nothing-1", "esper runs"]),
        (["grow", "stage1", "BP009"], {}, ["No Ray cluster is running", "esper up"]),
        (["report", "nothing-1"], {}, ["no run nothing-1", "esper runs"]),
        (["status"], {}, ["No Ray cluster is running", "esper up"]),
        (["config", "check", "/no/such.yaml"], {}, ["/no/such.yaml"]),
    ],
)
def test_a_users_mistake_is_one_sentence(
    home: Path, arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    done = esper(*arguments, home=home, **environment)

    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in said[0]
    assert not (home / "runs").exists()
    assert not (home / "cluster.json").exists()


def test_a_page_port_in_use_is_named_with_the_setting(home: Path, taken: int) -> None:
    config = load(settings=[f"home={home}", f"nissa.port={taken}"])

    with pytest.raises(Exception, match=rf"Port {taken} .*nissa\.port"):
        Session(config, "", "", started=False)._check_page_port()


def test_a_dashboard_port_in_use_gives_the_next_free_one(taken: int) -> None:
    assert cluster.free_port(taken) > taken


@pytest.mark.parametrize(
    ("address", "loopback"), [("127.0.0.1:6385", True), ("localhost:1", True), ("10.0.0.5:6379", False)]
)
def test_a_loopback_address_is_known_as_such(address: str, loopback: bool) -> None:
    assert cluster.is_loopback(address) is loopback


def test_the_version_and_the_settings_are_shown(home: Path) -> None:
    assert esper("--version", home=home).stdout.strip().count(".") == 2
    shown = esper("config", "show", home=home).stdout
    assert "run.epochs" in shown
    assert "how many boundaries the run has" in " ".join(shown.split())


def test_a_valid_file_is_said_to_be_valid(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text("run: {epochs: 5}\n")

    done = esper("config", "check", str(file), home=home)

    assert (done.returncode, done.stdout.strip().replace("\n", "")) == (0, f"{file} is valid.")


def test_an_empty_home_has_no_runs(home: Path) -> None:
    done = esper("runs", home=home)

    assert done.returncode == 0
    assert "no runs" in done.stdout


@pytest.mark.parametrize("room", ["esper_ray", "esper_ray.runtime", "esper_ray.cli", "esper_ray.actors.supervisor"])
def test_light_rooms_load_no_torch(room: str) -> None:
    # The supervisor loads the shells of all actors, so they must be light as well.
    check = (
        f"import sys, importlib, {room}\n"
        "from esper_ray.actors.resources import ACTORS\n"
        f"if {room!r}.endswith('supervisor'): [spec.load() for spec in ACTORS]\n"
        "heavy = {'torch'} | ({'ray', 'matplotlib'} if not 'actors' in sys.argv[1] else set())\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check, room], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
