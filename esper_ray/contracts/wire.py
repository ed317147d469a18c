"""What every codec needs: the version, checked parsing, finite metrics, known enum values, the size limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from enum import IntEnum
from typing import TypeVar, cast

from google.protobuf.message import DecodeError, Message

from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.refusals import refused
from esper_ray.errors import ContractError, MessageTooLarge, WrongVersion

VERSION = 1
M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=IntEnum)


def parse(kind: type[M], data: bytes) -> M:
    message = kind()
    try:
        message.ParseFromString(data)
    except (DecodeError, TypeError) as error:
        raise refused(ContractError(f"{len(data)} bytes are no {kind.DESCRIPTOR.name}.", why=str(error))) from error
    version = getattr(message, "version", 0)
    if version != VERSION:
        raise refused(
            WrongVersion(
                f"A {kind.DESCRIPTOR.name} of version {version} was refused.",
                why=f"This process speaks version {VERSION}.",
            )
        )
    return message


def within_limit(message: Message) -> bytes:
    data = message.SerializeToString()
    if len(data) > CONTROL_MESSAGE_BYTES:
        sizes = {field.name: _field_size(message, field.name) for field, _ in message.ListFields()}
        raise MessageTooLarge(
            f"A {message.DESCRIPTOR.name} of {len(data)} bytes was refused.",
            why=f"The limit is {CONTROL_MESSAGE_BYTES}; its fields take {sizes}.",
            remedy="Send less in one message, or large data by digest.",
        )
    return data


def _field_size(message: Message, name: str) -> int:
    rest = type(message)()
    rest.CopyFrom(message)
    rest.ClearField(name)
    return message.ByteSize() - rest.ByteSize()


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same as a dict of its own, also from a message's map."""
    # A message's map gives its items one at a time, and slowly.
    found = {key: metrics[key] for key in metrics}
    if not all(map(math.isfinite, found.values())):
        for key, value in found.items():
            finite_value(key, value)
    return found


def texts(wire: Mapping[str, str]) -> dict[str, str]:
    """A message's map of texts as a dict of its own."""
    return {key: wire[key] for key in wire} if wire else {}


def put_metrics(wire: MutableMapping[str, float], metrics: Mapping[str, float]) -> None:
    """Into a message's map, one by one: twice as fast as its constructor takes a dict."""
    for key, value in metrics.items():
        wire[key] = finite_value(key, value)


def finite_value(key: str, value: float) -> float:
    if not math.isfinite(value):
        raise ContractError(f"The metric {key} is {value}.", why="Metrics on the wire are finite numbers.")
    return value


def to_enum(kind: type[N], value: int) -> N:
    # The members' table takes a fifth of the time that a call of the class takes.
    found = kind._value2member_map_.get(value)
    if found is None:
        raise ContractError(f"{value} is no {kind.__name__}.")
    return cast(N, found)
