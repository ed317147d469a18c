"""The actors as a group: create, find, ping and end them by name. Used by the supervisor and by `runtime`."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from esper_ray.actors.resources import NAMES, ActorSpec, check_capacity, options
from esper_ray.config import Config
from esper_ray.errors import EnvironmentFault, EsperError

_RETRY_SECONDS = 20.0
_RETRY_PAUSE_SECONDS = 0.2
_CREATION_FAULT = re.compile(r"^esper_ray\.errors\.\w+: (.+)$", re.MULTILINE)


def join(config: Config, address: str) -> str:
    """Connect this process to the cluster; returns the address of its dashboard, empty without one.

    Raises:
        EnvironmentFault: its versions differ from ours, or it does not answer.
    """
    try:
        context = ray.init(
            address=address,
            namespace=config.ray.namespace,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise EnvironmentFault(
            f"The Ray cluster at {address} runs other versions.",
            why=" ".join(str(error).split()),
            remedy="Start it from this Python environment, or point RAY_ADDRESS at another one.",
        ) from None
    except ConnectionError as error:
        raise EnvironmentFault(
            f"The Ray cluster at {address} does not answer.",
            why=str(error).strip().splitlines()[-1],
            remedy="Stop it with `ray stop` and start again.",
        ) from None
    url = context.dashboard_url
    return f"http://{url}" if url else ""


def ask(namespace: str, actor: str, method: str, *arguments: Any, timeout: float) -> Any:
    """Call a method of a named actor and wait; again where the actor is just being restarted.

    Raises:
        EsperError: the actor's own, or that it is not there or does not answer.
    """
    give_up = time.monotonic() + _RETRY_SECONDS
    while True:
        handle = find(actor, namespace)
        if handle is None:
            raise EnvironmentFault(
                f"No actor {actor} is up in the namespace {namespace}.", remedy="Start the system with `esper up`."
            )
        try:
            return ray.get(getattr(handle, method).remote(*arguments), timeout=timeout)
        except ActorUnavailableError as error:
            if time.monotonic() > give_up:
                raise EnvironmentFault(f"The actor {actor} does not come back.", why=str(error)) from None
            time.sleep(_RETRY_PAUSE_SECONDS)
        except GetTimeoutError:
            raise EnvironmentFault(
                f"The actor {actor} did not answer within {timeout:.0f} s.",
                remedy="Look at it in the Ray dashboard, or start anew with `esper down`.",
            ) from None
        except RayError as error:
            known = explain(error)
            if known is None:
                raise
            raise known from None


def find(name: str, namespace: str) -> Any | None:
    """The running actor of that name, or None."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(name, namespace=namespace)
    return None


def create(specs: Mapping[str, ActorSpec], config: Config, tree: dict[str, Any]) -> dict[str, Any]:
    """Create those of ``specs`` that are not there, all at once, without waiting for them.

    Raises:
        EnvironmentFault: the cluster has too little left for them.
    """
    missing = {name: spec for name, spec in specs.items() if find(name, config.ray.namespace) is None}
    cluster = check_room(missing, config)
    return {name: start(spec, config, tree, cluster) for name, spec in specs.items()}


def start(spec: ActorSpec, config: Config, tree: dict[str, Any], cluster: Mapping[str, float]) -> Any:
    """Create one actor, or find it; returns its handle at once."""
    remote: Any = ray.remote
    shell = remote(concurrency_groups=dict(spec.groups))(spec.load())
    return shell.options(**options(spec, config, cluster)).remote(tree)


def check_room(specs: Mapping[str, ActorSpec], config: Config) -> dict[str, float]:
    """Refuse what the cluster has no room for; returns all that it has.

    Raises:
        EnvironmentFault: needed against available.
    """
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    check_capacity(specs, config, cluster=cluster, available=available)
    return cluster


def ping(handles: Mapping[str, Any], timeout: float) -> dict[str, dict[str, Any] | Exception]:
    """Each actor's ``ping``, asked of all at once; what went wrong where there is no answer within ``timeout`` s."""
    deadline = time.monotonic() + timeout
    asked: dict[str, Any] = {name: handle.ping.remote() for name, handle in handles.items()}
    answers: dict[str, dict[str, Any] | Exception] = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except (RayError, EsperError) as error:
            answers[name] = error
    return answers


def is_dead(error: object) -> bool:
    """Dead for good: Ray will not restart it."""
    return isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)


def is_late(error: object) -> bool:
    """No answer in time, or being restarted by Ray right now."""
    return isinstance(error, GetTimeoutError | ActorUnavailableError)


def explain(error: BaseException) -> EsperError | None:
    """The user's error inside what Ray made of it, a task's or a constructor's; None for our own bugs."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, EsperError) else None
    if isinstance(error, EsperError):
        return error
    found = _CREATION_FAULT.findall(str(error)) if isinstance(error, RayActorError) else []
    return EnvironmentFault(found[-1]) if found else None


def end(names: Iterable[str], namespace: str) -> list[str]:
    """Kill the named actors of the namespace for good; returns those that were there."""
    there = []
    for name in names:
        handle = find(name, namespace)
        if handle is not None:
            ray.kill(handle, no_restart=True)
            there.append(name)
    return there


def present(namespace: str) -> list[str]:
    """Our actors that live in the namespace, whatever version of our code made them."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    return [item["name"] for item in listed if item["namespace"] == namespace and item["name"] in NAMES]
