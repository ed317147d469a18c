"""A plausible training, told in packets, is what the interface and the page show of the school."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets.sync.client

from esper_ray.config import Config, build
from esper_ray.contracts import learning
from esper_ray.contracts.enums import BusMessageType, MessagePriority, TelemetryLevel
from esper_ray.contracts.messages import EventEnvelope, MetricPoint, PolicyUpdate, TelemetryEvent
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.nissa.api import create_app
from esper_ray.nissa.core import Nissa
from esper_ray.nissa.serve import Server
from esper_ray.nissa.token import load_token
from esper_ray.reliability.clock import ManualClock
from esper_ray.reliability.ids import new_event_id

TRAINING = "ppo-morphogenesis-3fa9c2"
ENV = "esper_ray/Morphogenesis-v0"
POLICY = "ppo-3fa9c2"
STEPS, PLANNED = 512, 20_480


class Direct:
    """A publisher that hands over at once what the bus would bring."""

    def __init__(self, nissa: Nissa, clock: ManualClock) -> None:
        self._nissa, self._clock = nissa, clock

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
        self._nissa.ingest.handle(envelope)


def school(
    publisher: Direct, clock: ManualClock, update: int, state: str, *, run: str = TRAINING, why: str = ""
) -> None:
    """Where a training stands."""
    attributes = {"run": run, "algo": "ppo", "env": ENV, "steps": update * STEPS, "of": PLANNED, "state": state}
    level = TelemetryLevel.ERROR if state == "failed" else TelemetryLevel.INFO
    publish_telemetry(
        publisher, "simic", run, update, (), [event("school", attributes, message=why, level=level)], clock=clock
    )


def train(
    publisher: Direct, clock: ManualClock, *, run: str = TRAINING, first: int = 1, last: int = 40, end: str = "finished"
) -> None:
    """A return that climbs from 0.02 to 0.12; every tenth update evaluates."""
    draw = random.Random(3)
    school(publisher, clock, first - 1, "running", run=run)
    for update in range(first, last + 1):
        clock.advance(12.0)
        mean = 0.12 - 0.1 * math.exp(-update / 12)
        points = [
            MetricPoint("ss", float(update * STEPS)),
            MetricPoint("sr", mean + draw.gauss(0, 0.004)),
            MetricPoint("sq", draw.gauss(42, 1)),
            MetricPoint("se", 3.2 * math.exp(-update / 30)),
            MetricPoint("sg", 1.0),
            MetricPoint("sd", 2.0 * update),
        ]
        if update % 10 == 0:
            points.append(MetricPoint("sv", mean + 0.01))
        publish_telemetry(publisher, "simic", run, update, points, clock=clock)
    if end:
        school(publisher, clock, last, end, run=run)


def validate(publisher: Direct, clock: ManualClock, policy: str, passed: bool, *figures: float) -> None:
    """What a validation tells; one that ended before the comparison has no figures."""
    verdict = "passed" if passed else "failed"
    attributes = {
        "policy": policy,
        "verdict": verdict,
        **dict(zip(("difference", "low", "high"), figures, strict=False)),
    }
    points = [MetricPoint("pv", 1.0, {"verdict": verdict})]
    publish_telemetry(publisher, "simic", "", 0, points, [event("policy.validated", attributes)], clock=clock)


def promote(
    publisher: Direct, clock: ManualClock, policy: str, parent: str = "heuristic", digest: str = "ab" * 32
) -> None:
    update = PolicyUpdate(policy, parent, digest, clock.now_ns(), {"difference": 0.0125})
    publisher.publish(BusMessageType.POLICY_UPDATE, learning.encode_policy_update(update))


def refuse(publisher: Direct, clock: ManualClock, policy: str, reason: str) -> None:
    told = event("policy.refused", {"policy": policy, "reason": reason}, message=f"{policy} is not what it was.")
    publish_telemetry(publisher, "tamiyo", "", 0, [MetricPoint("pr", 1.0, {"reason": reason})], [told], clock=clock)


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


def only(nissa: Nissa) -> dict[str, Any]:
    (training,) = nissa.school()["trainings"]
    return dict(training)


def test_a_training_is_shown_as_it_was_told(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    train(publisher, clock)
    training = only(nissa)
    assert (training["run"], training["algo"], training["env"]) == (TRAINING, "ppo", ENV)
    assert (training["state"], training["steps"], training["of"], training["update"]) == (
        "finished",
        PLANNED,
        PLANNED,
        40,
    )
    assert [steps for steps, _ in training["returns"]] == [STEPS * update for update in range(1, 41)]
    assert training["returns"][-1][1] == pytest.approx(0.12, abs=0.02)
    assert training["evaluations"] == [
        (STEPS * update, pytest.approx(0.13 - 0.1 * math.exp(-update / 12), rel=1e-5)) for update in (10, 20, 30, 40)
    ]
    assert (training["latest"]["lag"], training["latest"]["dropped"]) == (1.0, 80.0)
    assert training["latest"]["steps_per_second"] == pytest.approx(42, abs=5)


def test_a_training_is_no_run_of_a_model(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    publish_telemetry(publisher, "tolaria", "glyphs-1", 1, [MetricPoint("va", 0.5)], clock=clock)
    train(publisher, clock)
    status = nissa.status()
    assert [run["run"] for run in status["runs"]] == ["glyphs-1"]
    assert status["current"] == "glyphs-1"
    assert nissa.run(TRAINING) is None
    assert nissa.events("", run=TRAINING, kind="school"), "it is found among the events all the same"


def test_a_resumed_training_forgets_what_it_does_again(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    train(publisher, clock, last=25, end="")
    assert only(nissa)["state"] == "running"
    school(publisher, clock, 20, "running")
    training = only(nissa)
    assert (training["steps"], training["returns"][-1][0], len(training["returns"])) == (20 * STEPS, 20 * STEPS, 20)
    assert [steps for steps, _ in training["evaluations"]] == [10 * STEPS, 20 * STEPS]


def test_a_training_that_failed_says_why(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    train(publisher, clock, last=3, end="")
    school(publisher, clock, 3, "failed", why="The loss is not finite.")
    assert (only(nissa)["state"], only(nissa)["reason"]) == ("failed", "The loss is not finite.")


def test_a_long_training_is_thinned_out_but_keeps_its_evaluations_and_ends(
    nissa: Nissa, publisher: Direct, clock: ManualClock
) -> None:
    train(publisher, clock, last=1500)
    training = only(nissa)
    assert 100 < len(training["returns"]) <= 300
    assert len(training["evaluations"]) == 150
    assert (training["returns"][0][0] < 20 * STEPS, training["returns"][-1][0]) == (True, 1500 * STEPS)


def test_only_the_trainings_heard_of_last_are_kept(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    for number in range(12):
        train(publisher, clock, run=f"ppo-{number}", last=2)
    assert [training["run"] for training in nissa.school()["trainings"]] == [
        f"ppo-{number}" for number in range(11, 3, -1)
    ]


def test_who_was_promoted_and_what_validation_found(nissa: Nissa, publisher: Direct, clock: ManualClock) -> None:
    assert nissa.school()["promoted"] is None
    validate(publisher, clock, POLICY, True, 0.0125, 0.004, 0.021)
    validate(publisher, clock, "ppo-2", False)
    promote(publisher, clock, POLICY)
    shown = nissa.school()
    assert shown["promoted"]["policy"] == POLICY
    assert shown["promoted"]["figures"] == {"difference": 0.0125}
    assert [(each["policy"], each["passed"]) for each in shown["validations"]] == [("ppo-2", False), (POLICY, True)]
    assert shown["validations"][0]["difference"] is None
    assert (shown["validations"][1]["low"], shown["validations"][1]["high"]) == (0.004, 0.021)
    clock.advance(5)
    promote(publisher, clock, "heuristic", POLICY, "")
    assert [each["policy"] for each in nissa.school()["promotions"]] == ["heuristic", POLICY]
    assert nissa.school()["promoted"]["policy"] == "heuristic"


@pytest.mark.parametrize("first", ["promotion", "refusal"])
def test_a_refused_policy_does_not_decide_whatever_is_heard_first(
    nissa: Nissa, publisher: Direct, clock: ManualClock, first: str
) -> None:
    promote(publisher, clock, "ppo-1")
    clock.advance(60)
    acts = [lambda: promote(publisher, clock, POLICY, "ppo-1"), lambda: refuse(publisher, clock, POLICY, "damaged")]
    for act in acts if first == "promotion" else reversed(acts):
        act()
    shown = nissa.school()
    assert shown["promoted"]["policy"] == "ppo-1"
    assert [each["refused"] for each in shown["promotions"]] == ["damaged", ""]
    assert (shown["refusals"][0]["policy"], shown["refusals"][0]["message"]) == (
        POLICY,
        f"{POLICY} is not what it was.",
    )
    clock.advance(60)
    promote(publisher, clock, POLICY, "ppo-1")
    assert nissa.school()["promoted"]["policy"] == POLICY, "promoted again, it was not refused again"


def test_records_kept_are_counted_by_their_type(nissa: Nissa, publisher: Direct) -> None:
    for kind in ("decision_record", "decision_record", "field_report"):
        publish_telemetry(publisher, "simic", "", 0, [MetricPoint("sx", 1.0, {"type": kind})])
    assert nissa.school()["records"] == {"decision_record": 2, "field_report": 1}
    assert nissa.school()["trainings"] == []


def test_figures_that_are_none_are_left_out(nissa: Nissa, publisher: Direct) -> None:
    given = {"policy": POLICY, "verdict": "failed", "difference": "nan", "low": "0.0…", "high": "inf"}
    told: list[TelemetryEvent] = [event("policy.validated", given), event("school", {"steps": "?", "of": "many"})]
    publish_telemetry(publisher, "simic", TRAINING, 0, (), told)
    (validation,) = nissa.school()["validations"]
    assert (validation["difference"], validation["low"], validation["high"]) == (None, None, None)
    assert (only(nissa)["steps"], only(nissa)["of"]) == (0, 0)


def test_a_failed_validation_fires_until_one_passes_or_a_day_is_over(
    nissa: Nissa, publisher: Direct, clock: ManualClock
) -> None:
    validate(publisher, clock, POLICY, True, 0.01, 0.0, 0.02)
    assert nissa.alert_list() == []
    validate(publisher, clock, "ppo-2", False)
    (alert,) = nissa.alert_list()
    assert (alert["id"], alert["firing"], alert["value"]) == ("simic_validation_failed:", True, 1.0)
    assert nissa.acknowledge(alert["id"]) is not None
    validate(publisher, clock, "ppo-3", True, 0.01, 0.0, 0.02)
    assert not nissa.alert_list()[0]["firing"]
    validate(publisher, clock, "ppo-4", False, -0.02, -0.03, -0.01)
    assert nissa.alert_list()[0]["firing"]
    clock.advance(86_401)
    nissa.ingest.tick(clock.now_ns())
    assert not nissa.alert_list()[0]["firing"]
    shown = nissa.metrics.exposition().decode()
    assert 'esper_policy_validations_total{run="",verdict="failed"} 2.0' in shown
    assert 'esper_alert_firing{alert="simic_validation_failed",run=""} 0.0' in shown


def test_failures_are_counted_from_zero_so_that_prometheus_sees_the_first(nissa: Nissa) -> None:
    assert 'esper_policy_validations_total{run="",verdict="failed"} 0.0' in nissa.metrics.exposition().decode()


def test_a_new_nissa_recovers_the_school_from_its_store(config: Config, clock: ManualClock) -> None:
    first = Nissa(config, clock=clock)
    publisher = Direct(first, clock)
    train(publisher, clock)
    validate(publisher, clock, "ppo-2", False)
    promote(publisher, clock, POLICY)
    refuse(publisher, clock, "ppo-2", "not_validated")
    publish_telemetry(publisher, "simic", "", 0, [MetricPoint("sx", 1.0, {"type": "field_report"})], clock=clock)
    before = (first.school(), first.alert_list(), first.status()["runs"])
    first.close()
    second = Nissa(config, clock=clock)
    assert (second.school(), second.alert_list(), second.status()["runs"]) == before
    assert second.school()["trainings"]
    assert second.alert_list()[0]["firing"]
    second.close()


@pytest.fixture
def client(nissa: Nissa, config: Config, clock: ManualClock) -> Iterator[httpx.Client]:
    server = Server(create_app(nissa, load_token(config.home), clock=clock), "127.0.0.1", 0)
    server.start()
    with httpx.Client(base_url=server.address, timeout=20) as made:
        yield made
    server.stop()


def test_the_interface_and_the_stream_bring_the_school(
    client: httpx.Client, nissa: Nissa, publisher: Direct, clock: ManualClock
) -> None:
    assert client.get("/api/school").json()["trainings"] == []
    train(publisher, clock, last=12)
    validate(publisher, clock, POLICY, False)
    shown = client.get("/api/school").json()
    assert shown == json.loads(json.dumps(nissa.school()))
    assert len(shown["trainings"][0]["returns"]) == 12
    with websockets.sync.client.connect(f"ws://127.0.0.1:{client.base_url.port}/ws/stream") as socket:
        message = json.loads(socket.recv(10))
        assert message["school"] == shown
        assert message["run"] is None


def test_the_page_has_the_school_and_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    script = client.get("/school.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert "http" not in script.text
    page = client.get("/").text
    assert page.index("school.js") < page.index("page.js"), "the first message may come as soon as page.js ran"
    for place in ("school", "learning", "trainings", "standing", "validation", "policies"):
        assert f'id="{place}"' in page
