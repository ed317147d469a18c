"""The Redis of a system is found, or run, and its faults are told in one sentence."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from esper_ray.config import build
from esper_ray.errors import EnvironmentFault
from esper_ray.oona.address import ENVIRONMENT_URL, answers, find_binary, find_url, without_password
from esper_ray.oona.redis_transport import connect
from esper_ray.oona.server import ManagedRedis, resolve_redis
from tests.contract.carriers import SERVERS

SHIPPED = Path(__file__).parents[2] / "deploy" / "redis.conf"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedRedis]:
    managed = ManagedRedis(tmp_path_factory.mktemp("home"))
    managed.start()
    yield managed
    managed.stop()


def test_with_nothing_given_we_run_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_URL, raising=False)
    choice = resolve_redis(build({"home": str(tmp_path)}))
    assert (choice.url, choice.kind) == ("", "managed")
    assert str(find_binary()) in choice.how
    assert find_url(build({"home": str(tmp_path)})) is None


def test_the_configuration_goes_before_the_environment(server: ManagedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_URL, server.url)
    assert resolve_redis(build({})).kind == "environment"
    monkeypatch.setenv(ENVIRONMENT_URL, "redis://127.0.0.1:1/0")
    choice = resolve_redis(build({"bus": {"redis_url": server.url}}))
    assert (choice.kind, choice.url) == ("configured", server.url)
    password = server.url.split(":")[2].split("@")[0]
    assert password not in choice.how


def test_an_unreachable_redis_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv(ENVIRONMENT_URL, f"redis://:secret-word@127.0.0.1:{held.getsockname()[1]}/0")
        with pytest.raises(EnvironmentFault, match="cannot be reached") as caught:
            resolve_redis(build({}))
    assert ENVIRONMENT_URL in caught.value.remedy
    assert "refused" in caught.value.why
    assert "secret-word" not in str(caught.value)


def test_a_wrong_password_is_told_without_showing_it(server: ManagedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    password = server.url.split(":")[2].split("@")[0]
    for wrong in (server.url.replace(password, "guess-word"), server.url.replace(f":{password}@", "")):
        monkeypatch.setenv(ENVIRONMENT_URL, wrong)
        with pytest.raises(EnvironmentFault, match="refused our login") as caught:
            resolve_redis(build({}))
        assert "guess-word" not in str(caught.value)


@pytest.mark.parametrize("text", ["nonsense", "http://somewhere:1", "redis://host:port/0"])
def test_an_address_that_is_none_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_URL, text)
    with pytest.raises(EnvironmentFault, match="is no Redis address"):
        resolve_redis(build({}))


def test_the_managed_server_is_durable_local_and_locked(server: ManagedRedis) -> None:
    client = connect(server.url)
    settings = {key: client.config_get(key)[key] for key in ("appendonly", "appendfsync", "bind")}
    client.close()
    assert settings == {"appendonly": "yes", "appendfsync": "everysec", "bind": "127.0.0.1"}
    assert ":6379/" not in server.url
    for name in ("url", "redis.conf", "password"):
        assert stat.S_IMODE((server.folder / name).stat().st_mode) == 0o600
    assert without_password(server.url).startswith("127.0.0.1:")


@pytest.mark.parametrize("binary", SERVERS)
def test_the_settings_that_we_ship_are_read_by_a_server_and_keep_what_is_owed(binary: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [str(binary), str(SHIPPED), "--port", str(port), "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with connect(f"redis://127.0.0.1:{port}/0") as client:
            deadline = time.monotonic() + 20
            while not answers(f"redis://127.0.0.1:{port}/0"):
                assert time.monotonic() < deadline, "it does not start"
            for key, value in {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
            }.items():
                assert client.config_get(key) == {key: value}
            assert client.config_get("save") == {"save": ""}
    finally:
        process.kill()
        process.wait()


def test_starting_twice_is_one_server_and_stopping_twice_no_mistake(tmp_path: Path) -> None:
    managed = ManagedRedis(tmp_path)
    url = managed.start()
    pid = managed.pid
    assert managed.start() == url
    assert managed.pid == pid
    client = connect(url)
    client.set("k", "v")
    client.close()
    managed.stop()
    managed.stop()
    assert not managed.alive()
    assert managed.start() == url, "the same port"
    client = connect(url)
    assert client.get("k") == b"v", "the same data"
    client.close()
    managed.stop()


def test_a_port_that_was_taken_meanwhile_is_replaced_and_the_new_one_written_down(tmp_path: Path) -> None:
    managed = ManagedRedis(tmp_path)
    first = managed.start()
    managed.stop()
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(without_password(first).split(":")[1])))
        thief.listen()
        second = managed.start()
    assert second != first
    assert find_url(build({"home": str(tmp_path)})) == second
    managed.stop()


def test_a_second_system_in_the_same_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper_ray.oona import server as module

    managed = ManagedRedis(tmp_path)
    managed.start()
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.1)
    with pytest.raises(EnvironmentFault, match="run by another process"):
        ManagedRedis(tmp_path).start()
    managed.stop()


def test_a_program_that_is_no_redis_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="does not start"):
        ManagedRedis(tmp_path, binary=Path("/bin/false")).start()


def test_the_server_dies_with_its_owner_and_the_successor_finds_the_data(tmp_path: Path) -> None:
    script = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from esper_ray.oona.redis_transport import connect\n"
        "from esper_ray.oona.server import ManagedRedis\n"
        "managed = ManagedRedis(Path(sys.argv[1]))\n"
        "started = threading.Thread(target=managed.start)\n"
        "started.start(); started.join()\n"
        "client = connect(managed.url); client.set('k', 'v'); client.close()\n"
        "print(managed.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    child = psutil.Process(int(owner.stdout.readline()))
    assert child.is_running(), "it outlives the thread that asked for it"
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(10)
    owner.stdout.close()
    owner.stdin.close()
    successor = ManagedRedis(tmp_path)
    url = successor.start()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    client = connect(url)
    assert client.get("k") == b"v"
    client.close()
    successor.stop()


def test_a_client_never_waits_long(server: ManagedRedis) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        client = connect(server.url, answer_seconds=0.1)
        with pytest.raises(redis.TimeoutError):
            client.ping()
        client.close()
    finally:
        os.kill(server.pid, signal.SIGCONT)
