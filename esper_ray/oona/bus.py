"""The front door of the bus: a sender, a reader or the keeper for a configuration."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from esper_ray.config import Config
from esper_ray.contracts.signing import KeyRing, Signer, Verifier, load_keys
from esper_ray.oona.address import answers, find_url
from esper_ray.oona.consumer import Consumer, Handler, Tell
from esper_ray.oona.keeper import Keeper
from esper_ray.oona.publisher import BusPublisher
from esper_ray.oona.redis_transport import RedisTransport
from esper_ray.oona.spool import Spool
from esper_ray.oona.transport import Transport
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock


def connect_publisher(
    config: Config, source: str, *, transport: Transport | None = None, clock: Clock = SYSTEM_CLOCK
) -> BusPublisher:
    """A sender named ``source``. Returns at once; whether the bus is there is its own affair.

    Raises:
        EnvironmentFault: the spool's folder cannot be written.
        ConfigError: the signing keys cannot be read.
    """
    return BusPublisher(
        transport or connect_transport(config),
        Signer(_keys(config), source, clock=clock),
        Spool(config.home / "spool", source),
        source=source,
        settings=config.bus,
        clock=clock,
    )


@contextlib.contextmanager
def publisher_where_up(config: Config, source: str) -> Iterator[BusPublisher | None]:
    """A sender to the bus of the system that is up in this home; None where none is. At the end all of it is sent."""
    url = find_url(config)
    if url is None or not answers(url):
        yield None
        return
    publisher = connect_publisher(config, source)
    try:
        yield publisher
    finally:
        publisher.close()


def connect_consumer(
    config: Config,
    group: str,
    streams: Sequence[str],
    handler: Handler,
    *,
    name: str = "",
    tell: Tell = lambda _: None,
    transport: Transport | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Consumer:
    """A reader of ``group``, not started yet; its name is made unique by the process unless given."""
    return Consumer(
        config,
        group,
        name or f"{group}-{os.getpid()}",
        streams,
        handler,
        transport=transport or connect_transport(config),
        verifier=Verifier(_keys(config), clock=clock),
        tell=tell,
        clock=clock,
    )


def connect_keeper(config: Config, *, transport: Transport | None = None) -> Keeper:
    """Who trims and measures."""
    return Keeper(transport or connect_transport(config), config.bus)


def connect_transport(config: Config) -> RedisTransport:
    """The Redis of this configuration; looked up anew after each interruption."""
    return RedisTransport(lambda: find_url(config), config.ray.namespace)


def _keys(config: Config) -> KeyRing:
    return load_keys(config.home / "keys" / "signing")
