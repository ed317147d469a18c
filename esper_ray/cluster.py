"""Finds the Ray cluster to use, or starts one of our own: on the loopback interface only, with its dashboard.

It works before ``ray`` is imported, because Ray reads at its import whether it may leave the loopback interface.

A cluster of ours lets nobody in from outside the machine, so it asks for no token unless ``RAY_AUTH_MODE`` says so;
on a machine that you share with others, set ``RAY_AUTH_MODE=token``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from esper_ray.config import Config
from esper_ray.errors import EnvironmentFault
from esper_ray.reliability import atomic

NICENESS_SWITCH = "RAY_worker_niceness"
"""Ray's own switch: the niceness that its workers start with, 15 without it."""
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch: 0 keeps every one of its sockets on 127.0.0.1."""

_HEAD_PORT = 6385
_CLIENT_PORT = 10001
_TRIES = 30
_ATTEMPTS = 3
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_PROBE_SECONDS = 1.0
_SOCKET_PATH_LIMIT = 107
_SOCKET_PATH = "/ray/session_2026-01-01_00-00-00_000000_1000000/sockets/plasma_store"
_OBJECT_STORE_BYTES = 512 * 1024 * 1024

_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster of ours, as ``home/cluster.json`` keeps it; ``created`` tells its process from a later one's."""

    address: str
    dashboard: str
    pid: int
    created: float

    @property
    def alive(self) -> bool:
        with contextlib.suppress(psutil.Error):
            return abs(psutil.Process(self.pid).create_time() - self.created) < 1.0
        return False


def locate(config: Config) -> str | None:
    """The address of a cluster that runs: configured, ``RAY_ADDRESS``, our own, or the last one that was started.

    Raises:
        EnvironmentFault: an address was given, and nothing answers there.
    """
    for setting, address in (("ray.address", config.ray.address), ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS", ""))):
        if address and address not in ("auto", "local"):
            if not answers(address):
                raise EnvironmentFault(
                    f"No Ray cluster answers at {address}.",
                    why=f"That is what {setting} says.",
                    remedy=f"Start one there, correct {setting}, or leave it empty to have one started.",
                )
            return address
    ours = owned(config)
    if ours is not None and answers(ours.address):
        return ours.address
    with contextlib.suppress(OSError):
        latest = (_ray_folder() / "ray_current_cluster").read_text().strip()
        if latest and answers(latest):
            return latest
    return None


def owned(config: Config) -> Cluster | None:
    """The cluster that was started for this home, while it lives."""
    try:
        cluster = Cluster(**json.loads(_record(config).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return cluster if cluster.alive else None


def start(config: Config) -> Cluster:
    """Start a cluster for this home and wait until it is there.

    Raises:
        EnvironmentFault: no port is free, the temporary folder's path is too long, or Ray does not come up.
    """
    if len(str(_ray_folder().parent) + _SOCKET_PATH) > _SOCKET_PATH_LIMIT:
        raise EnvironmentFault(
            f"The path {_ray_folder().parent} is too long for Ray's sockets.", remedy="Set RAY_TMPDIR to a shorter one."
        )
    log = atomic.make_folder(config.home / "logs") / "ray.log"
    why = ""
    for attempt in range(_ATTEMPTS):
        # Another cluster may take a port between our look and Ray's: look again a little further on.
        port = free_port(_HEAD_PORT + attempt)
        dashboard = free_port(config.ray.dashboard_port + attempt) if config.ray.dashboard else 0
        process = _spawn(_command(port, dashboard), log)
        why = _await_start(process, log)
        if not why:
            break
    else:
        raise EnvironmentFault("Ray did not start.", why=why, remedy=f"All it said is in {log}.")
    cluster = Cluster(
        address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard}" if dashboard else "",
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
    )
    atomic.write_text(_record(config), json.dumps(asdict(cluster)))
    return cluster


def stop(config: Config) -> bool:
    """End the cluster of this home with all its processes; False when there is none."""
    cluster = owned(config)
    _record(config).unlink(missing_ok=True)
    if cluster is None:
        return False
    family = list(_session_of(cluster.pid))
    with contextlib.suppress(psutil.Error):
        psutil.Process(cluster.pid).send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_SECONDS)
    if cluster.pid in _children:
        _children.pop(cluster.pid).wait(_STOP_SECONDS)
    return True


def prepare(address: str) -> None:
    """Tell Ray, before it is imported where possible, to reach a loopback address as such.

    Without this Ray turns 127.0.0.1 into the machine's outer address, where nobody listens, and waits for minutes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not is_loopback(address):
        return
    os.environ[LOOPBACK_SWITCH] = "0"
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:
        setattr(constants, "ENABLE_RAY_CLUSTER", False)  # noqa: B010


def is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0]
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def exposed(address: str) -> bool:
    """Whether the cluster's head on this machine takes connections from every network interface."""
    port = int(address.rpartition(":")[2])
    try:
        listening = [item.laddr for item in psutil.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return False
    return any(place and place.port == port and place.ip in ("0.0.0.0", "::") for place in listening)


def answers(address: str) -> bool:
    """Whether something accepts connections at ``host:port``.

    Raises:
        EnvironmentFault: the address has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise EnvironmentFault(
            f"{address!r} is no address of a Ray cluster.",
            why="It should look like 127.0.0.1:6385; Ray Client addresses (ray://) are not supported.",
        )
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS):
        return True
    return False


def free_port(wanted: int, *, host: str = "127.0.0.1") -> int:
    """``wanted``, or the first free port after it.

    Raises:
        EnvironmentFault: none of the next ones is free.
    """
    for port in range(wanted, min(wanted + _TRIES, 65536)):
        if is_free(host, port):
            return port
    raise EnvironmentFault(
        f"No port from {wanted} to {wanted + _TRIES - 1} is free on {host}.",
        remedy="End what uses them, or choose another with --set ray.dashboard_port=PORT.",
    )


def is_free(host: str, port: int) -> bool:
    """Whether we could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _command(port: int, dashboard: int) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", f"--ray-client-server-port={free_port(_CLIENT_PORT)}"]
    # Ports from the system instead of 10002 to 19999, so that two clusters do not meet.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    command += ["--resources", json.dumps({"esper_home": 1})]
    if dashboard:
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    else:
        command += ["--include-dashboard=false"]
    if (os.cpu_count() or 1) < 2:
        # Logical processors: the actors' shares need two, however many there are.
        command += ["--num-cpus=2"]
    return command


def _environment() -> dict[str, str]:
    here = str(Path(sys.executable).parent)
    values = {
        **os.environ,
        LOOPBACK_SWITCH: "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([here, os.environ.get("PATH", "")]),
    }
    values.setdefault("RAY_AUTH_MODE", "disabled")
    # Our actors rank themselves (`actors.resources.take_priority`), and a process may only become nicer.
    values.setdefault(NICENESS_SWITCH, "0")
    # Whatever cluster the caller is in must not decide what the new one attaches to.
    values.pop("RAY_ADDRESS", None)
    # Else every worker would inherit it, and many threads in many processes stand in each other's way.
    values.pop("OMP_NUM_THREADS", None)
    return values


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    _children[process.pid] = process
    return process


def _await_start(process: subprocess.Popen[bytes], log: Path) -> str:
    """Empty when Ray is there, else why it is not, with nothing of it left."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return ""
        time.sleep(0.05)
    for child in _session_of(process.pid):
        with contextlib.suppress(psutil.Error):
            child.kill()
    _children.pop(process.pid).wait(_STOP_SECONDS)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    faults = [line for line in lines if "Error" in line]
    return (faults or lines or [f"It was silent for {_START_SECONDS:.0f} s."])[-1]


def _session_of(pid: int) -> Iterator[psutil.Process]:
    """The process and its descendants, orphans included: Ray's processes keep the session they were started in."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == pid:
                yield process


def _ray_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"


def _record(config: Config) -> Path:
    return config.home / "cluster.json"
