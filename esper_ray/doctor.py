"""Looks at this machine: what the system needs, whether it is there, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from esper_ray import cluster
from esper_ray.config import Config
from esper_ray.contracts.schema import check_schema
from esper_ray.errors import EsperError
from esper_ray.oona.address import resolve_redis

_GIB = 1024**3
_LEAST_DISK_GIB = 2.0
_LEAST_MEMORY_GIB = 3.0
_REDIS_PORT = 6379
_LEAST = {"torch": (2, 8), "ray": (2, 50), "protobuf": (7, 35)}


@dataclass(frozen=True, slots=True)
class Finding:
    """``note``: it works without, with less; ``missing``: a run would fail."""

    what: str
    verdict: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def examine(config: Config) -> list[Finding]:
    """All checks, in the order of the table that `esper doctor` prints. Nothing is started and nothing is changed."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _messages,
        _compiler,
        _redis,
        _cuda,
        _processors,
        _disk,
        _home,
        _ports,
    )
    return [finding for check in checks for finding in check(config)]


def _python(_: Config) -> Iterator[Finding]:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("Python", "ok" if good else "missing", version, "" if good else "Use Python 3.11 or 3.12.")
    supported = sys.platform == "linux"
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("system", "ok" if supported else "note", system, "" if supported else "Tested on Linux x86-64 only.")


def _packages(_: Config) -> Iterator[Finding]:
    for name, least in _LEAST.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", "pip install -e .")
            continue
        good = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= least
        remedy = "" if good else f"pip install '{name}>={'.'.join(map(str, least))}'"
        yield Finding(name, "ok" if good else "missing", version, remedy)


def _messages(_: Config) -> Iterator[Finding]:
    try:
        check_schema()
    except EsperError as error:
        yield Finding("message schema", "missing", f"{error.what} {error.why}", error.remedy)
    else:
        yield Finding("message schema", "ok", "approved, protobuf runs on upb")


def _compiler(_: Config) -> Iterator[Finding]:
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
            yield Finding("C++ compiler", "ok", said[0] if said else path)
            return
    yield Finding("C++ compiler", "note", "none; kernels stay eager", "Install one, such as: apt-get install g++")


def _redis(config: Config) -> Iterator[Finding]:
    try:
        yield Finding("Redis", "ok", resolve_redis(config).how)
    except EsperError as error:
        yield Finding("Redis", "missing", f"{error.what} {error.why}".strip(), error.remedy)
    if cluster.answers(f"127.0.0.1:{_REDIS_PORT}"):
        yield Finding(
            f"port {_REDIS_PORT}",
            "note",
            "in use; a plain `ray start --head` wants it",
            "Start Ray with --port=6385, or let `esper up` do it.",
        )
    else:
        yield Finding(f"port {_REDIS_PORT}", "ok", "free for a plain `ray start --head`")


def _cuda(config: Config) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield Finding("CUDA", "ok", torch.cuda.get_device_name(0))
    elif config.run.device == "cuda":
        yield Finding(
            "CUDA", "missing", "torch sees no device", "Install a CUDA build of torch, or set run.device=cpu."
        )
    else:
        yield Finding("CUDA", "note", f"none seen by torch {torch.__version__}; training runs on the processor")


def _processors(_: Config) -> Iterator[Finding]:
    count = os.cpu_count() or 1
    yield Finding("processors", "ok" if count > 1 else "note", str(count), "" if count > 1 else "Two train smoothly.")
    free = psutil.virtual_memory().available / _GIB
    good = free >= _LEAST_MEMORY_GIB
    remedy = "" if good else f"Close something: {_LEAST_MEMORY_GIB:.0f} GiB are needed."
    yield Finding("free memory", "ok" if good else "note", f"{free:.1f} GiB", remedy)


def _disk(config: Config) -> Iterator[Finding]:
    folder = _nearest(config.home)
    free = shutil.disk_usage(folder).free / _GIB
    good = free >= _LEAST_DISK_GIB
    remedy = "" if good else f"Make {_LEAST_DISK_GIB:.0f} GiB free, or point ESPER_HOME elsewhere."
    yield Finding("free disk", "ok" if good else "note", f"{free:.1f} GiB in {folder}", remedy)


def _home(config: Config) -> Iterator[Finding]:
    folder = _nearest(config.home)
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        yield Finding("home folder", "ok", str(config.home))
    else:
        yield Finding("home folder", "missing", f"cannot write {folder}", "Point ESPER_HOME at a folder you can write.")


def _ports(config: Config) -> Iterator[Finding]:
    ours = cluster.owned(config) is not None
    for what, host, port, key in (
        ("mission control", config.nissa.host, config.nissa.port, "nissa.port"),
        ("Ray dashboard", "127.0.0.1", config.ray.dashboard_port, "ray.dashboard_port"),
    ):
        if port == 0 or cluster.is_free(host, port):
            yield Finding(what, "ok", f"port {port} is free" if port else "takes a free port")
        elif ours:
            yield Finding(what, "ok", f"port {port} is in use; this home's system is up")
        else:
            yield Finding(what, "note", f"port {port} is in use", f"Choose another with --set {key}=PORT")


def _nearest(path: Path) -> Path:
    """The first folder on the way up that exists."""
    return path if path.exists() else _nearest(path.parent)
