"""The event store on Elasticsearch 8: a data stream with a template, a life of seven days, and bounded bulks.

Records wait in a bounded queue; one thread sends them. While the server is away the queue fills, and what does not
fit is dropped and counted. A record's id is its event id, so a repetition is refused by the server itself.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from elasticsearch import ApiError, AuthenticationException, AuthorizationException, Elasticsearch, TransportError

from esper_ray.contracts.enums import BusMessageType, TelemetryLevel
from esper_ray.errors import EnvironmentFault
from esper_ray.nissa.events import ENVIRONMENT_URL, RETENTION_DAYS, StoreState, search_words
from esper_ray.nissa.records import Record

log = logging.getLogger(__name__)

_QUEUE = 10_000
_BULK = 500
_PAGE = 1000
_RETRY_SECONDS = 0.5
_TIMEOUT_SECONDS = 10.0
_BUSY = 429
_CONFLICT = 409
_REMEMBERED = 50_000

_MAPPINGS: dict[str, Any] = {
    "dynamic": "strict",
    "properties": {
        "@timestamp": {"type": "date_nanos"},
        "at_ns": {"type": "long"},
        "event_id": {"type": "keyword"},
        "type": {"type": "keyword"},
        "source": {"type": "keyword"},
        "run": {"type": "keyword"},
        "epoch": {"type": "integer"},
        "level": {"type": "byte"},
        "kinds": {"type": "keyword"},
        "text": {"type": "text"},
        "payload": {"type": "binary"},
    },
}


class ElasticStore:
    """See `events.EventStore`.

    Raises:
        EnvironmentFault: the server cannot be reached or refuses us; the password is not in the text.
    """

    def __init__(self, url: str, *, namespace: str = "esper", bulk: int = _BULK, queue: int = _QUEUE) -> None:
        self._stream, self._where = f"{namespace}-events", _without_password(url)
        self._bulk_size, self._queue_size = bulk, queue
        try:
            self._client = Elasticsearch(url, request_timeout=_TIMEOUT_SECONDS, retry_on_timeout=False, max_retries=0)
        except ValueError as error:
            raise EnvironmentFault(
                f"{ENVIRONMENT_URL} is no Elasticsearch address.",
                why=f"{error}.",
                remedy="Write it as http://user:password@host:9200.",
            ) from None
        self._prepare()
        self._queue: deque[Record] = deque()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._changed = threading.Condition()
        self._sending = 0
        self._dropped = 0
        self._reachable = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nissa-elastic", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> bool:
        with self._changed:
            if record.event_id in self._seen:
                return False
            self._seen[record.event_id] = None
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            if len(self._queue) >= self._queue_size:
                self._dropped += 1
            else:
                self._queue.append(record)
                self._changed.notify_all()
            return True

    def search(
        self, text: str = "", *, run: str = "", kind: str = "", since_ns: int = 0, limit: int = 100
    ) -> list[Record]:
        filters: list[dict[str, Any]] = [{"range": {"at_ns": {"gte": since_ns}}}]
        filters += [{"term": {"run": run}}] if run else []
        filters += [{"term": {"kinds": kind}}] if kind else []
        words = [{"match_bool_prefix": {"text": {"query": word}}} for word in search_words(text)]
        answer = self._client.search(
            index=self._stream,
            query={"bool": {"filter": filters, "must": words}},
            sort=[{"at_ns": "desc"}, {"event_id": "desc"}],
            size=limit,
        )
        return [_from_document(hit["_source"]) for hit in answer["hits"]["hits"]]

    def replay(self, *, since_ns: int = 0) -> Iterator[Record]:
        after: list[Any] | None = None
        while True:
            answer = self._client.search(
                index=self._stream,
                query={"range": {"at_ns": {"gte": since_ns}}},
                sort=[{"at_ns": "asc"}, {"event_id": "asc"}],
                size=_PAGE,
                search_after=after,
            )
            hits = answer["hits"]["hits"]
            for hit in hits:
                record = _from_document(hit["_source"])
                with self._changed:
                    self._seen[record.event_id] = None
                yield record
            if len(hits) < _PAGE:
                return
            after = hits[-1]["sort"]

    def prune(self, before_ns: int) -> int:
        del before_ns  # the data stream's lifecycle does it
        return 0

    def flush(self, timeout: float) -> bool:
        with self._changed:
            sent = self._changed.wait_for(lambda: not self._queue and not self._sending, timeout)
        if sent:
            self._client.indices.refresh(index=self._stream)
        return sent

    def state(self) -> StoreState:
        with self._changed:
            waiting = len(self._queue) + self._sending
        return StoreState(f"Elasticsearch at {self._where}", self._reachable, waiting, self._dropped)

    def close(self) -> None:
        self.flush_quietly(2.0)
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_TIMEOUT_SECONDS)
        self._client.close()

    def flush_quietly(self, timeout: float) -> None:
        """As `flush`, for the end: nobody is left to hear of a failure."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._sending, timeout)

    def _prepare(self) -> None:
        try:
            self._client.ilm.put_lifecycle(
                name=self._stream,
                policy={
                    "phases": {
                        "hot": {"actions": {"rollover": {"max_age": "1d", "max_primary_shard_size": "5gb"}}},
                        "delete": {"min_age": f"{RETENTION_DAYS}d", "actions": {"delete": {}}},
                    }
                },
            )
            self._client.indices.put_index_template(
                name=self._stream,
                index_patterns=[f"{self._stream}*"],
                data_stream={},
                priority=200,
                template={"settings": {"index.lifecycle.name": self._stream}, "mappings": _MAPPINGS},
            )
            if not self._client.indices.exists(index=self._stream):
                self._client.indices.create_data_stream(name=self._stream)
        except (AuthenticationException, AuthorizationException):
            raise EnvironmentFault(
                f"Elasticsearch at {self._where} refused our login.",
                why="The user name or password is wrong, or lacks the right to make templates.",
                remedy=f"Write {ENVIRONMENT_URL} as http://user:password@host:9200.",
            ) from None
        except (TransportError, ApiError) as error:
            raise EnvironmentFault(
                f"Elasticsearch at {self._where} cannot be used.",
                why=f"{str(error).splitlines()[0]}.",
                remedy=f"Start that server, or unset {ENVIRONMENT_URL} to use the embedded store.",
            ) from None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing.is_set())
                if self._closing.is_set():
                    self._dropped += len(self._queue)
                    return
                batch = [self._queue.popleft() for _ in range(min(self._bulk_size, len(self._queue)))]
                self._sending = len(batch)
            left = self._send(batch)
            with self._changed:
                self._queue.extendleft(reversed(left))
                self._sending = 0
                self._changed.notify_all()
            if left:
                self._closing.wait(_RETRY_SECONDS)

    def _send(self, batch: list[Record]) -> list[Record]:
        """One bulk request; returns what is to be sent again."""
        operations: list[dict[str, Any]] = []
        for record in batch:
            operations += [{"create": {"_id": record.event_id.hex()}}, _to_document(record)]
        try:
            answer = self._client.bulk(operations=operations, index=self._stream)
        except (TransportError, ApiError) as error:
            self._reachable = False
            log.warning("Elasticsearch at %s took no events: %s", self._where, str(error).splitlines()[0])
            return batch
        self._reachable = True
        again = []
        for record, item in zip(batch, answer["items"], strict=True):
            status = item["create"]["status"]
            if status == _BUSY:
                again.append(record)
            elif status >= 400 and status != _CONFLICT:
                self._dropped += 1
                log.error("Elasticsearch refused an event: %s", item["create"].get("error"))
        return again


def _to_document(record: Record) -> dict[str, Any]:
    stamp = datetime.fromtimestamp(record.at_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return {
        "@timestamp": f"{stamp}.{record.at_ns % 1_000_000_000:09d}Z",
        "at_ns": record.at_ns,
        "event_id": record.event_id.hex(),
        "type": record.type.name,
        "source": record.source,
        "run": record.run,
        "epoch": record.epoch,
        "level": int(record.level),
        "kinds": list(record.kinds),
        "text": record.text,
        "payload": base64.b64encode(record.payload).decode(),
    }


def _from_document(document: dict[str, Any]) -> Record:
    return Record(
        event_id=bytes.fromhex(document["event_id"]),
        at_ns=document["at_ns"],
        type=BusMessageType[document["type"]],
        source=document["source"],
        run=document["run"],
        epoch=document["epoch"],
        level=TelemetryLevel(document["level"]),
        kinds=tuple(document["kinds"]),
        text=document["text"],
        payload=base64.b64decode(document["payload"]),
    )


def _without_password(url: str) -> str:
    try:
        parts = urlsplit(url)
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or "the given address"
    except ValueError:
        return "the given address"
