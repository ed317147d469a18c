"""What an event store promises: the same tests on the embedded one and on Elasticsearch's wire.

The server at the other end of the wire is a strict fake: it answers only the requests that the store should make,
and evaluates only the queries that it should send. Set ESPER_TEST_ELASTICSEARCH_URL to run against a real one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from esper_ray.config import build
from esper_ray.contracts.enums import BusMessageType, TelemetryLevel
from esper_ray.errors import EnvironmentFault
from esper_ray.nissa.elastic import ElasticStore
from esper_ray.nissa.events import ENVIRONMENT_URL, EventStore, SqliteStore, open_store
from esper_ray.nissa.records import Record

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")
REAL = os.environ.get("ESPER_TEST_ELASTICSEARCH_URL", "")


class FakeElasticsearch:
    """As much of Elasticsearch 8 as the store may use; anything else is answered with 400 and remembered."""

    def __init__(self, *, credentials: str = "") -> None:
        self.documents: dict[str, dict[str, Any]] = {}
        self.templates: dict[str, dict[str, Any]] = {}
        self.lifecycles: dict[str, dict[str, Any]] = {}
        self.streams: set[str] = set()
        self.strange: list[str] = []
        self.bulks: list[int] = []
        self.refuse_bulks = 0
        self.busy_items = 0
        self.credentials = credentials
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, reply = fake.handle(self.command, self.path, dict(self.headers), body)
                data = b"" if reply is None else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("X-Elastic-Product", "Elasticsearch")
                self.send_header("Content-Type", "application/vnd.elasticsearch+json;compatible-with=8")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = answer

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        if self.credentials and headers.get("Authorization") != self.credentials:
            return 401, {"error": {"type": "security_exception", "reason": "missing credentials"}, "status": 401}
        route, _, _ = path.partition("?")
        if (method, route) == ("PUT", "/_ilm/policy/esper-events"):
            self.lifecycles["esper-events"] = json.loads(body)["policy"]
            return 200, {"acknowledged": True}
        if (method, route) == ("PUT", "/_index_template/esper-events"):
            self.templates["esper-events"] = json.loads(body)
            return 200, {"acknowledged": True}
        if (method, route) == ("HEAD", "/esper-events"):
            return (200 if "esper-events" in self.streams else 404), None
        if (method, route) == ("PUT", "/_data_stream/esper-events") and "esper-events" in self.templates:
            self.streams.add("esper-events")
            return 200, {"acknowledged": True}
        if "esper-events" in self.streams and (method, route) == ("PUT", "/esper-events/_bulk"):
            return self._bulk(body)
        if "esper-events" in self.streams and (method, route) == ("POST", "/esper-events/_search"):
            return 200, {"hits": {"hits": self._search(json.loads(body))}}
        if (method, route) == ("POST", "/esper-events/_refresh"):
            return 200, {"_shards": {"failed": 0}}
        self.strange.append(f"{method} {path}")
        return 400, {"error": {"type": "illegal_argument_exception", "reason": f"not expected: {method} {path}"}}

    def _bulk(self, body: bytes) -> tuple[int, Any]:
        if self.refuse_bulks:
            self.refuse_bulks -= 1
            return 503, {"error": {"type": "unavailable", "reason": "no master"}, "status": 503}
        lines = [json.loads(line) for line in body.splitlines()]
        assert body.endswith(b"\n")
        assert len(lines) % 2 == 0
        self.bulks.append(len(lines) // 2)
        items = [self._create(action, document) for action, document in zip(lines[::2], lines[1::2], strict=True)]
        return 200, {"errors": any(item["create"]["status"] > 299 for item in items), "items": items}

    def _create(self, action: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
        assert set(action) == {"create"}, "a data stream takes creations only"
        id = action["create"]["_id"]
        mapping = self.templates["esper-events"]["template"]["mappings"]
        assert mapping["dynamic"] == "strict"
        status = 201
        if self.busy_items:
            self.busy_items -= 1
            status = 429
        elif set(document) != set(mapping["properties"]) or not _STAMP.fullmatch(document["@timestamp"]):
            status = 400
        elif id in self.documents:
            status = 409
        else:
            self.documents[id] = document
        return {"create": {"_id": id, "status": status}}

    def _search(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        found = [document for document in self.documents.values() if _matches(request["query"], document)]
        names = [name for entry in request["sort"] for name in entry]
        down = request["sort"][0][names[0]] == "desc"
        found.sort(key=lambda document: [document[name] for name in names], reverse=down)
        if after := request.get("search_after"):
            found = [document for document in found if [document[name] for name in names] > after]
        page = found[: request["size"]]
        return [{"_source": document, "sort": [document[name] for name in names]} for document in page]


def _matches(query: dict[str, Any], document: dict[str, Any]) -> bool:
    ((kind, body),) = query.items()
    if kind == "bool":
        assert set(body) == {"filter", "must"}
        return all(_matches(part, document) for part in [*body["filter"], *body["must"]])
    ((name, value),) = body.items()
    if kind == "range":
        return bool(document[name] >= value["gte"])
    if kind == "term":
        held = document[name]
        return value in held if isinstance(held, list) else value == held
    assert kind == "match_bool_prefix"
    words = re.findall(r"\w+", document[name].lower())
    return any(word.startswith(value["query"].lower()) for word in words)


@pytest.fixture
def fake() -> Iterator[FakeElasticsearch]:
    made = FakeElasticsearch()
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "elasticsearch", *(["real"] if REAL else [])])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], EventStore]]:
    opened: list[EventStore] = []
    fake: FakeElasticsearch | None = request.getfixturevalue("fake") if request.param == "elasticsearch" else None
    namespace = f"test-{secrets.token_hex(4)}"

    def open_one() -> EventStore:
        if request.param == "sqlite":
            opened.append(SqliteStore(tmp_path / "events.db"))
        elif fake is not None:
            opened.append(ElasticStore(fake.url, bulk=7))
        else:
            opened.append(ElasticStore(REAL, namespace=namespace))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()
    assert fake is None or fake.strange == []


def record(number: int, text: str = "", *, run: str = "a", kinds: tuple[str, ...] = ("gate",)) -> Record:
    return Record(
        event_id=number.to_bytes(8, "big"),
        at_ns=1_700_000_000_000_000_000 + number,
        type=BusMessageType.TELEMETRY,
        source="kasmina",
        run=run,
        epoch=number,
        level=TelemetryLevel.WARNING,
        kinds=kinds,
        text=text or f"event number {number}",
        payload=bytes([number % 256, 0, 255]),
    )


def test_what_was_put_is_found_unchanged_newest_first(open_again: Callable[[], EventStore]) -> None:
    store = open_again()
    records = [record(number) for number in range(1, 31)]
    assert all(store.put(item) for item in records)
    assert store.flush(10)
    assert store.search(limit=100) == records[::-1]
    assert store.search(limit=3) == records[:-4:-1]
    assert list(store.replay()) == records
    assert list(store.replay(since_ns=records[20].at_ns)) == records[20:]


def test_an_event_id_is_kept_once(open_again: Callable[[], EventStore]) -> None:
    store = open_again()
    assert store.put(record(1, "first"))
    assert not store.put(record(1, "again"))
    assert store.flush(10)
    assert [item.text for item in store.search()] == ["first"]


def test_after_a_restart_ids_are_still_known(open_again: Callable[[], EventStore]) -> None:
    first = open_again()
    first.put(record(1, "first"))
    assert first.flush(10)
    second = open_again()
    assert [item.text for item in second.replay()] == ["first"]
    assert not second.put(record(1, "again"))
    assert second.flush(10)
    assert [item.text for item in second.search()] == ["first"]


def test_words_runs_kinds_and_time_narrow_the_search(open_again: Callable[[], EventStore]) -> None:
    store = open_again()
    store.put(record(1, "gate G2_STABILITY refused, loss rose", kinds=("gate",)))
    store.put(record(2, "gate G4_SYSTEM_IMPACT passed", run="b", kinds=("gate", "seed.stage")))
    store.put(record(3, "decision GERMINATE plateau", kinds=("decision",)))
    assert store.flush(10)
    epochs = lambda **given: [item.epoch for item in store.search(**given)]  # noqa: E731
    assert epochs(text="GATE") == [2, 1]
    assert epochs(text="refused ros") == [1], "all words, as prefixes"
    assert epochs(run="b") == [2]
    assert epochs(kind="seed.stage") == [2]
    assert epochs(kind="seed") == []
    assert epochs(text="gate", since_ns=record(2).at_ns) == [2]
    assert epochs(text='plateau AND ("NEAR') == [], "no query language, only words"
    assert epochs(text='"plateau" *') == [3]


def test_the_embedded_store_forgets_what_is_old_with_its_words(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "events.db")
    for number in (1, 2, 3):
        store.put(record(number))
    assert store.prune(record(3).at_ns) == 2
    assert [item.epoch for item in store.search("event")] == [3]
    store.close()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "events.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(EnvironmentFault, match="Cannot open the event store"):
        SqliteStore(tmp_path / "events.db")


def test_the_data_stream_has_a_template_and_a_life_of_seven_days(fake: FakeElasticsearch) -> None:
    ElasticStore(fake.url).close()
    template = fake.templates["esper-events"]
    assert template["data_stream"] == {}
    assert template["index_patterns"] == ["esper-events*"]
    assert template["template"]["settings"]["index.lifecycle.name"] == "esper-events"
    assert fake.lifecycles["esper-events"]["phases"]["delete"]["min_age"] == "7d"
    ElasticStore(fake.url).close()
    assert fake.strange == []


def test_events_travel_in_bulks_and_a_refused_one_is_sent_again(fake: FakeElasticsearch) -> None:
    store = ElasticStore(fake.url, bulk=10)
    fake.refuse_bulks, fake.busy_items = 1, 3
    for number in range(25):
        assert store.put(record(number))
    assert store.flush(20)
    assert len(fake.documents) == 25
    assert max(fake.bulks) <= 10
    assert store.state().dropped == 0
    store.close()


def test_what_does_not_fit_while_the_server_is_away_is_dropped_and_counted(fake: FakeElasticsearch) -> None:
    store = ElasticStore(fake.url, bulk=5, queue=10)
    fake.refuse_bulks = 10**9
    for number in range(40):
        store.put(record(number))
    dropped = store.state().dropped
    assert 25 <= dropped <= 30, "ten wait, up to five are on their way"
    fake.refuse_bulks = 0
    assert store.flush(20)
    assert len(fake.documents) == 40 - dropped
    store.close()


def test_a_server_that_is_away_or_refuses_us_is_told_without_the_password(fake: FakeElasticsearch) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be used") as away:
        ElasticStore("http://elastic:secret-word@127.0.0.1:1")
    assert ENVIRONMENT_URL in away.value.remedy
    fake.credentials = "Basic somebody-else"
    with pytest.raises(EnvironmentFault, match="refused our login") as refused:
        ElasticStore(fake.url.replace("//", "//elastic:secret-word@"))
    with pytest.raises(EnvironmentFault, match="no Elasticsearch address"):
        ElasticStore("somewhere")
    assert "secret-word" not in str(away.value) + str(refused.value)


def test_the_address_decides_which_store_is_used(
    fake: FakeElasticsearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_URL, raising=False)
    embedded = open_store(build({"home": str(tmp_path)}))
    assert embedded.state().how.startswith("embedded")
    monkeypatch.setenv(ENVIRONMENT_URL, fake.url)
    remote = open_store(build({"home": str(tmp_path)}))
    assert remote.state().how == f"Elasticsearch at {fake.url.removeprefix('http://')}"
    for store in (embedded, remote):
        store.close()
