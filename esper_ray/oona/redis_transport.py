"""The bus on Redis Streams, 6.2 or newer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from esper_ray.oona.streams import dead_letters_of
from esper_ray.oona.transport import (
    Appended,
    BusAway,
    DeadLetter,
    Delivery,
    GroupState,
    Settlement,
    StreamState,
)

_FIELD = b"e"
_XADD = b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$1\r\n*\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
_ANSWER_SECONDS = 2.0
_MOST_SCANS = 16


class RedisTransport:
    """One connection pool; after a failure the address is looked up again, for a server may return elsewhere.

    Args:
        find_url: where the server is now; None while nobody knows.
        namespace: prefix of all keys, so that several systems share one Redis.
    """

    def __init__(self, find_url: Callable[[], str | None], namespace: str) -> None:
        self._find_url, self._prefix = find_url, f"{namespace}:"
        self._client: redis.Redis | None = None

    def append(self, batch: Sequence[tuple[str, bytes]]) -> Appended:
        with self._connected() as client:
            connection: Any = client.connection_pool.get_connection()
            try:
                connection.send_packed_command([self._packed(batch), *connection.pack_command("HGETALL", self._depths)])
                ids: list[bytes] = [connection.read_response() for _ in batch]
                found: list[bytes] = connection.read_response()
            except BaseException:
                # Answers that were not read must not be taken for those of the next command.
                connection.disconnect()
                raise
            finally:
                client.connection_pool.release(connection)
        depths = {key.decode(): int(value) for key, value in zip(found[::2], found[1::2], strict=True)}
        return Appended([id.decode() for id in ids], depths)

    def _packed(self, batch: Sequence[tuple[str, bytes]]) -> bytes:
        """The XADD commands as Redis reads them; a pipeline would take longer over them than over all the rest."""
        keys = {stream: (self._prefix + stream).encode() for stream, _ in batch}
        return b"".join(
            _XADD % (len(keys[stream]), keys[stream], len(_FIELD), _FIELD, len(data), data) for stream, data in batch
        )

    def settled(self, streams: Sequence[str]) -> Settlement:
        with self._connected() as client:
            # Asked often and by the thread that sends: in two round trips, whatever there is.
            pipeline = client.pipeline(transaction=False)
            pipeline.info("server")
            for stream in streams:
                pipeline.xinfo_groups(self._prefix + stream)
            server, *found = pipeline.execute(raise_on_error=False)
            if isinstance(server, Exception):
                raise server
            return Settlement(
                str(server["run_id"]), self._floors(client, dict(zip(streams, map(_groups_in, found), strict=True)))
            )

    def missing(self, stream: str, ids: Sequence[str]) -> set[str]:
        with self._connected() as client:
            pipeline = client.pipeline(transaction=False)
            for id in ids:
                pipeline.xrange(self._prefix + stream, id, id, 1)
            found = pipeline.execute()
        return {id for id, entries in zip(ids, found, strict=True) if not entries}

    def ensure_group(self, group: str, streams: Sequence[str]) -> None:
        with self._connected() as client:
            for stream in streams:
                try:
                    client.xgroup_create(self._prefix + stream, group, id="0", mkstream=True)
                except redis.ResponseError as error:
                    if "BUSYGROUP" not in str(error):
                        raise

    def read(
        self, group: str, consumer: str, streams: Sequence[str], *, count: int, block_ms: int = 0
    ) -> list[Delivery]:
        wanted = {self._prefix + stream: ">" for stream in streams}
        with self._connected() as client:
            try:
                found: Any = client.xreadgroup(group, consumer, wanted, count=count, block=block_ms or None)  # type: ignore[arg-type]
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                self.ensure_group(group, streams)
                return []
        by_stream = {key.decode().removeprefix(self._prefix): entries for key, entries in found or ()}
        return [
            Delivery(stream, id.decode(), fields.get(_FIELD, b""), 1)
            for stream in streams
            for id, fields in by_stream.get(stream, ())
        ]

    def claim(self, group: str, consumer: str, stream: str, *, idle_ms: int, count: int) -> list[Delivery]:
        key, start = self._prefix + stream, "0-0"
        taken: list[tuple[bytes, dict[bytes, bytes]]] = []
        with self._connected() as client:
            for _ in range(_MOST_SCANS):
                answer: Any = client.xautoclaim(key, group, consumer, idle_ms, start_id=start, count=count - len(taken))
                taken += [(id, fields) for id, fields in answer[1] if id is not None]
                if any(id is None for id, _ in answer[1]):
                    self._forget_removed(client, key, group, consumer)
                start = answer[0].decode()
                if start == "0-0" or len(taken) >= count:
                    break
            pipeline = client.pipeline(transaction=False)
            for id, _ in taken:
                pipeline.xpending_range(key, group, id, id, 1)
            pending = pipeline.execute()
        counts = {row["message_id"]: row["times_delivered"] for rows in pending for row in rows}
        return [Delivery(stream, id.decode(), fields.get(_FIELD, b""), counts.get(id, 1)) for id, fields in taken]

    def ack(self, group: str, stream: str, ids: Sequence[str]) -> None:
        with self._connected() as client:
            client.xack(self._prefix + stream, group, *ids)

    def bury(self, group: str, delivery: Delivery, reason: str) -> None:
        key = self._prefix + delivery.stream
        fields: dict[Any, Any] = {_FIELD: delivery.data, "why": reason, "group": group, "n": delivery.count}
        with self._connected() as client:
            pipeline = client.pipeline(transaction=True)
            pipeline.xadd(self._prefix + dead_letters_of(delivery.stream), fields)
            pipeline.xack(key, group, delivery.id)
            pipeline.execute()

    def dead_letters(self, stream: str, *, count: int = 100, after: str = "") -> list[DeadLetter]:
        with self._connected() as client:
            least = f"({after}" if after else "-"
            entries: Any = client.xrange(self._prefix + dead_letters_of(stream), min=least, count=count)
        return [
            DeadLetter(
                id.decode(), fields[_FIELD], fields[b"why"].decode(), fields[b"group"].decode(), int(fields[b"n"])
            )
            for id, fields in entries
        ]

    def revive(self, stream: str, id: str) -> bool:
        dead = self._prefix + dead_letters_of(stream)
        with self._connected() as client, client.pipeline(transaction=True) as pipeline:
            while True:
                try:
                    pipeline.watch(dead)  # type: ignore[no-untyped-call]
                    found: Any = pipeline.xrange(dead, id, id, 1)
                    if not found:
                        return False
                    pipeline.multi()
                    pipeline.xadd(self._prefix + stream, {_FIELD: found[0][1][_FIELD]})
                    pipeline.xdel(dead, id)
                    pipeline.execute()
                except redis.WatchError:
                    continue
                return True

    def drop_dead(self, stream: str, id: str) -> bool:
        with self._connected() as client:
            return bool(client.xdel(self._prefix + dead_letters_of(stream), id))

    def trim_dead(self, stream: str, *, keep: int) -> int:
        with self._connected() as client:
            return int(client.xtrim(self._prefix + dead_letters_of(stream), maxlen=keep, approximate=False))

    def trim(self, stream: str, *, keep: int) -> int:
        key = self._prefix + stream
        with self._connected() as client:
            groups = self._groups(client, key)
            if not groups:
                return int(client.xtrim(key, maxlen=keep, approximate=False))
            return int(client.xtrim(key, minid=self._floors(client, {stream: groups})[stream], approximate=False))

    def state(self, stream: str) -> StreamState:
        key = self._prefix + stream
        with self._connected() as client:
            found = self._groups(client, key)
            length: Any = client.xlen(key)
            dead: Any = client.xlen(self._prefix + dead_letters_of(stream))
            groups = {group["name"].decode(): self._group_state(client, key, group) for group in found}
        return StreamState(length if groups else 0, length, dead, groups)

    def announce(self, depths: Mapping[str, int], *, seconds: int) -> None:
        mapping: dict[Any, Any] = dict(depths)
        with self._connected() as client:
            pipeline = client.pipeline(transaction=True)
            pipeline.hset(self._depths, mapping=mapping)
            pipeline.expire(self._depths, seconds)
            pipeline.execute()

    def ping(self) -> None:
        with self._connected() as client:
            client.ping()

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @property
    def _depths(self) -> str:
        return f"{self._prefix}oona.depths"

    @contextlib.contextmanager
    def _connected(self) -> Iterator[redis.Redis]:
        try:
            if self._client is None:
                url = self._find_url()
                if url is None:
                    raise BusAway(
                        "The bus has no address yet.",
                        why="No Redis has been started for this system.",
                        remedy="Start it with `esper up`.",
                    )
                self._client = connect(url)
            yield self._client
        except (redis.RedisError, OSError, ValueError) as error:
            # A ValueError: the address is none, or the answer is not what this command answers.
            self.close()
            raise BusAway("The bus cannot be used.", why=f"{type(error).__name__}: {error}.") from error

    @staticmethod
    def _forget_removed(client: redis.Redis, key: str, group: str, consumer: str) -> None:
        """Somebody removed entries that were in work. Redis 6.2 hands their ids around for ever, newer ones do not."""
        pending: Any = client.xpending_range(key, group, "-", "+", 1000, consumer)
        for row in pending:
            id = row["message_id"]
            if not client.xrange(key, id, id, 1):
                client.xack(key, group, id)

    def _floors(self, client: redis.Redis, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
        """For each stream with its groups: the oldest id that a group has still to acknowledge or to be given.

        With no group it is the oldest that there still is.
        """
        pipeline = client.pipeline(transaction=False)
        for stream, groups in found.items():
            key = self._prefix + stream
            if not groups:
                pipeline.xrange(key, count=1)
            for group in groups:
                if group["pending"]:
                    pipeline.xpending(key, group["name"])
        answers = iter(pipeline.execute())
        floors = {}
        for stream, groups in found.items():
            if groups:
                owed = min(_first_owed(group, next(answers) if group["pending"] else None) for group in groups)
                floors[stream] = f"{owed[0]}-{owed[1]}"
            else:
                first = next(answers)
                floors[stream] = first[0][0].decode() if first else "0-0"
        return floors

    @staticmethod
    def _groups(client: redis.Redis, key: str) -> list[dict[str, Any]]:
        pipeline = client.pipeline(transaction=False)
        pipeline.xinfo_groups(key)
        return _groups_in(pipeline.execute(raise_on_error=False)[0])

    @staticmethod
    def _group_state(client: redis.Redis, key: str, group: dict[str, Any]) -> GroupState:
        if not group["pending"]:
            return GroupState(0, 0.0)
        first: Any = client.xpending_range(key, group["name"], "-", "+", 1)
        milliseconds = int(first[0]["message_id"].split(b"-")[0]) if first else None
        now: Any = client.time()
        waited = 0.0 if milliseconds is None else now[0] + now[1] / 1e6 - milliseconds / 1e3
        return GroupState(group["pending"], max(0.0, waited))


def _groups_in(answer: Any) -> list[dict[str, Any]]:
    """What XINFO GROUPS answers; none where the stream does not exist yet."""
    if isinstance(answer, redis.ResponseError) and "no such key" in str(answer):
        return []
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


def _first_owed(group: Mapping[str, Any], pending: Mapping[str, Any] | None) -> tuple[int, int]:
    """The id of the oldest entry that the group has not acknowledged, be it there already or not."""
    oldest = (pending["min"] if pending else None) or group["last-delivered-id"]
    milliseconds, number = (int(part) for part in oldest.split(b"-"))
    return (milliseconds, number) if pending else (milliseconds, number + 1)


def connect(url: str, *, answer_seconds: float = _ANSWER_SECONDS) -> redis.Redis:
    """A client that fails fast and never retries by itself: the breaker decides about that."""
    client: redis.Redis = redis.Redis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=answer_seconds,
        socket_timeout=answer_seconds,
        retry=Retry(NoBackoff(), 0),
    )
    return client
