"""The forge finishes what it began: failures are counted, limits hold, a kill loses and repeats nothing."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from esper_ray.config import ForgeConfig
from esper_ray.contracts import catalogue, codec
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.messages import KernelCatalogUpdate, KernelPrefetchError
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.errors import AuthenticityError, BlueprintError, EnvironmentFault
from esper_ray.karn.catalog import CATALOG
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock, ManualClock
from esper_ray.tezzeret import forge as forge_module
from esper_ray.tezzeret import seal, toolchain
from esper_ray.tezzeret.caution import Caution
from esper_ray.tezzeret.crew import Crew
from esper_ray.tezzeret.forge import Forge, Outcome
from esper_ray.tezzeret.ledger import Ledger
from esper_ray.tezzeret.shift import Shift
from esper_ray.urza.store import Store

SIGNATURE = SlotSignature("conv", (8, 6, 6))
KEYS = KeyRing((("k1", bytes(32)),))
# A job that obeys a plan, one word per blueprint, and writes down each kernel that it starts.
FAKE_JOB = """
import base64, json, os, signal, struct, sys
from pathlib import Path
from esper_ray.tezzeret.job import die_with

plan, folder, parent = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
die_with(parent)
say = lambda **message: print(json.dumps(message), flush=True)
settings = json.loads(sys.stdin.readline())
if plan.get("at start") == "die":
    sys.exit("cannot even begin")
say(ready=os.getpid())
for line in sys.stdin:
    order = json.loads(line)
    blueprint = order["kernel"]["blueprint"]
    with (folder / "started").open("a") as file:
        print(settings["phase"], blueprint, os.getpid(), order["strategy"], file=file)
    word = plan.get(order["strategy"], plan.get(blueprint, "work"))
    if word == "spin":
        while True:
            pass
    if word == "hang":
        signal.pause()
    if word == "die":
        sys.exit("the disk is on fire")
    if word == "gorge":
        hoard = b"x" * (700 * 2**20)
        signal.pause()
    if word == "fail":
        say(failed="it does not converge")
    elif settings["phase"] == "compile":
        compiled_ms = float(word.removeprefix("work") or 1.9)
        say(done={"metadata": {"eager_ms": 2.0, "compiled_ms": compiled_ms, "compile_seconds": 0.5}})
    else:
        weights = base64.b64encode(struct.pack("<Q", 2) + b"{}").decode()
        say(done={"weights": weights, "metadata": {"parameters_count": 5, "strategy": "eager", "compiled_ms": None}})
"""


class Outbox:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.modes: list[float] = []
        self.updates: list[KernelCatalogUpdate] = []
        self.errors: list[KernelPrefetchError] = []

    def publish(self, type, payload, **_) -> None:
        if type is BusMessageType.KERNEL_CATALOG_UPDATE:
            self.updates.append(codec.decode_catalog_update(payload))
            return
        if type is BusMessageType.KERNEL_PREFETCH_ERROR:
            self.errors.append(catalogue.decode_prefetch_error(payload))
            return
        for point in codec.decode_telemetry(payload).metrics:
            before = self.values.get(point.key, 0.0) if point.key in ("zr", "zg", "zc") else 0.0
            self.values[point.key] = before + point.value
            self.modes += [point.value] if point.key == "zm" else []


class Smithy:
    """Forges on one folder and one store, each with a plan of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "urza")
        self.outbox = Outbox()
        (folder / "job.py").write_text(FAKE_JOB)
        self.forges: list[Forge] = []

    def command(self, plan: dict[str, str]) -> tuple[str, ...]:
        return (sys.executable, str(self.folder / "job.py"), json.dumps(plan), str(self.folder))

    def forge(
        self, plan: dict[str, str], *, clock: Clock = SYSTEM_CLOCK, keys: KeyRing = KEYS, **settings: Any
    ) -> Forge:
        config = ForgeConfig(**{"job_seconds": 30.0, "reserve_mb": 0, **settings})
        forge = Forge(
            self.store,
            self.folder / "forge",
            config,
            keys=keys,
            publisher=self.outbox,
            clock=clock,
            command=self.command(plan),
        )
        self.forges.append(forge)
        return forge

    def started(self) -> list[str]:
        """Phase and blueprint of each kernel that any job began, in order."""
        return [" ".join(line.split()[:2]) for line in self._lines()]

    def pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self._lines()]

    def strategies(self, blueprint: str) -> list[str]:
        """With which strategies the kernel was compiled, or tried, in order."""
        begun = [line.split() for line in self._lines()]
        return [words[3] for words in begun if words[:2] == ["compile", blueprint]]

    def _lines(self) -> list[str]:
        path = self.folder / "started"
        return path.read_text().splitlines() if path.exists() else []

    def close(self) -> None:
        for forge in self.forges:
            forge.close()
        self.store.close()


@pytest.fixture
def smithy(tmp_path: Path):
    smithy = Smithy(tmp_path)
    yield smithy
    smithy.close()


@pytest.fixture(autouse=True)
def _compiler(monkeypatch) -> None:
    monkeypatch.setattr(forge_module, "compiler_available", lambda: (True, "the tests say so"))


def specs(*blueprints: str) -> list[KernelSpec]:
    return [CATALOG.get(blueprint).spec(SIGNATURE) for blueprint in blueprints]


def results(outcome: Outcome) -> dict[str, str]:
    return {key[:5]: item.result for key, item in outcome.finished.items()}


def test_every_blueprint_that_fits_is_wanted_once_with_its_defaults(smithy: Smithy) -> None:
    wanted = smithy.forge({}).wanted([SIGNATURE, SIGNATURE])
    assert {spec.key for spec in wanted} == {
        KernelSpec(blueprint.id, SIGNATURE).key for blueprint in CATALOG.query(SIGNATURE).candidates
    }
    assert len(wanted) >= 10


def test_the_strongest_block_of_each_slot_is_made_first(smithy: Smithy) -> None:
    other = SlotSignature("conv", (16, 24, 24))
    order = smithy.forge({}).ordered([str(SIGNATURE), str(other), f"BP039@{other}", f"BP002@{SIGNATURE}"])
    strengths = {each: [] for each in (SIGNATURE, other)}
    for spec in order:
        strengths[spec.signature].append(CATALOG.get(spec.blueprint, approved={"BP039"}).flops(spec.signature))
    assert {spec.signature for spec in order[:2]} == {SIGNATURE, other}
    assert all(found == sorted(found, reverse=True) for found in strengths.values())
    assert [spec.key[:5] for spec in order].count("BP039") == 1
    assert (
        len(order)
        == len({spec.key for spec in order})
        == 1 + sum(len(CATALOG.query(each).candidates) for each in (SIGNATURE, other))
    )


def test_a_build_is_stored_counted_and_not_repeated(smithy: Smithy) -> None:
    seen: list[tuple[int, int, str]] = []
    wanted = specs("BP002", "BP009")
    outcome = smithy.forge({}).build(wanted, lambda *progress: seen.append(progress))
    assert results(outcome) == {"BP002": "eager", "BP009": "eager"}
    assert [smithy.store.get(spec).digest for spec in wanted] == [item.digest for item in outcome.finished.values()]
    assert seen[0] == (0, 2, "")
    assert seen[-1] == (2, 2, wanted[1].key)
    assert (smithy.outbox.values["zd"], smithy.outbox.values["zw"], smithy.outbox.values["zr"]) == (2, 2, 0)
    assert [(update.blueprint, update.artifact_digest) for update in smithy.outbox.updates] == [
        (int(item.kernel[2:5]), item.digest) for item in outcome.finished.values()
    ]
    again = smithy.forge({}).build(wanted)
    assert again == outcome
    assert smithy.started() == ["eager BP002", "eager BP009"]


def test_a_failing_job_is_tried_three_times_and_given_up_with_its_reason(smithy: Smithy) -> None:
    outcome = smithy.forge({"BP002": "fail"}).build(specs("BP002", "BP003"))
    assert results(outcome) == {"BP002": "given up", "BP003": "eager"}
    assert list(outcome.given_up.values()) == ["it does not converge"]
    assert smithy.started().count("eager BP002") == 3
    assert smithy.started().count("eager BP003") == 1
    assert (smithy.outbox.values["zr"], smithy.outbox.values["zg"]) == (2, 1)
    (told,) = smithy.outbox.errors
    assert (told.blueprint, told.reason.rpartition(": ")[2]) == (2, "it does not converge")
    assert results(smithy.forge({}).build(specs("BP002"))) == {"BP002": "given up"}
    assert smithy.started().count("eager BP002") == 3


def test_a_job_that_dies_takes_only_its_own_kernel_with_it(smithy: Smithy) -> None:
    outcome = smithy.forge({"BP003": "die"}).build(specs("BP002", "BP003", "BP004"))
    assert results(outcome) == {"BP002": "eager", "BP003": "given up", "BP004": "eager"}
    assert "exit code 1. the disk is on fire" in outcome.given_up[specs("BP003")[0].key]
    assert smithy.started().count("eager BP002") == 1


def test_a_job_over_its_time_limit_is_killed_and_counted(smithy: Smithy) -> None:
    outcome = smithy.forge({"BP002": "spin"}, job_seconds=0.2).build(specs("BP002", "BP003"))
    assert results(outcome) == {"BP002": "given up", "BP003": "eager"}
    assert "Killed at its time limit of 0.2 s" in outcome.given_up[specs("BP002")[0].key]
    assert smithy.started().count("eager BP002") == 3
    assert not any(psutil.pid_exists(pid) for pid in smithy.pids())


def test_a_job_that_hangs_without_computing_is_killed_too(smithy: Smithy) -> None:
    outcome = smithy.forge({"BP002": "hang"}, job_seconds=0.1).build(specs("BP002"))
    assert results(outcome) == {"BP002": "given up"}
    assert list(outcome.given_up.values()) == ["Killed: it slept for 1 s."]


def test_a_job_over_its_memory_limit_is_killed_and_counted(smithy: Smithy) -> None:
    outcome = smithy.forge({"BP002": "gorge"}, memory_mb=512).build(specs("BP002", "BP003"))
    assert results(outcome) == {"BP002": "given up", "BP003": "eager"}
    assert "Killed at its memory limit of 512 MiB" in outcome.given_up[specs("BP002")[0].key]
    assert not any(psutil.pid_exists(pid) for pid in smithy.pids())


def test_two_jobs_share_the_work_and_each_kernel_is_made_once(smithy: Smithy, monkeypatch) -> None:
    at_work, give = [], Crew.give

    def counted(crew: Crew, *order: Any) -> None:
        give(crew, *order)
        at_work.append(crew.busy)

    monkeypatch.setattr(Crew, "give", counted)
    wanted = specs("BP002", "BP003", "BP004", "BP005", "BP006", "BP009")
    outcome = smithy.forge({"BP002": "hang"}, jobs=2, job_seconds=0.1).build(wanted)
    assert results(outcome) == {**dict.fromkeys(results(outcome), "eager"), "BP002": "given up"}
    assert max(at_work) == 2
    assert [smithy.started().count(f"eager {spec.blueprint}") for spec in wanted[1:]] == [1] * 5


def test_each_failure_makes_the_next_try_calmer_and_it_is_remembered_what_worked(smithy: Smithy) -> None:
    wanted = specs("BP002")
    forge = smithy.forge({"aggressive": "fail", "standard": "fail"}, strategy="aggressive")
    built = forge.build(wanted)
    assert built.given_up == {}
    outcome = forge.compile(wanted)
    assert smithy.strategies("BP002") == ["aggressive", "standard", "fast"]
    assert results(outcome) == {"BP002": "eager"}
    assert smithy.store.get(wanted[0]).metadata["compile_strategy"] == "fast"
    again = smithy.forge({}, strategy="aggressive").compile(wanted)
    assert again.finished == outcome.finished
    assert len(smithy.strategies("BP002")) == 3
    smithy.forge({}, strategy="standard").compile(wanted)
    assert smithy.strategies("BP002")[3:] == ["standard"]


def test_what_cannot_be_compiled_keeps_its_eager_kernel(smithy: Smithy) -> None:
    wanted = specs("BP002")
    forge = smithy.forge({"BP002": "work"})
    built = forge.build(wanted)
    outcome = smithy.forge({"BP002": "die"}).compile(wanted)
    assert results(outcome) == {"BP002": "given up"}
    assert smithy.store.get(wanted[0]).digest == built.finished[wanted[0].key].digest
    assert smithy.forge({}).compile(wanted).finished == outcome.finished
    assert smithy.strategies("BP002") == ["standard", "fast", "fast"]
    note = smithy.forge({}, strategy="emergency").compile(wanted).note
    assert "forge.strategy is emergency" in note


def test_after_failures_of_three_kernels_in_a_row_the_forge_is_conservative_for_its_dwell(smithy: Smithy) -> None:
    clock = ManualClock()
    names = ("BP002", "BP003", "BP004", "BP005", "BP006", "BP009")
    wanted = specs(*names)
    smithy.forge({}).build(wanted)
    forge = smithy.forge(dict.fromkeys(names[:3], "fail"), dwell_seconds=60.0, clock=clock)
    outcome = forge.compile(wanted, lambda done, _total, _current: clock.advance(61.0) if done == 2 else None)
    assert results(outcome) == {**dict.fromkeys(names, "eager"), **dict.fromkeys(names[:3], "given up")}
    first_tries = [smithy.strategies(name)[0] for name in names]
    assert first_tries == ["standard", "standard", "standard", "fast", "fast", "standard"]
    modes = smithy.outbox.modes
    assert 0.0 in modes[modes.index(1.0) :]


def test_the_conservative_mode_ends_with_a_success_after_its_dwell_and_not_within_it() -> None:
    clock, told = ManualClock(), []
    caution = Caution(60.0, clock, told.append)
    for _ in range(5):
        caution.failed("one")
    assert not caution.conservative
    caution.failed("two")
    caution.failed("three")
    caution.succeeded()
    assert caution.conservative
    clock.advance(59.0)
    assert not caution.may_work_normally()
    clock.advance(1.0)
    assert [caution.may_work_normally(), caution.may_work_normally()] == [True, False]
    caution.abandoned()
    assert caution.conservative
    clock.advance(60.0)
    assert caution.may_work_normally()
    caution.succeeded()
    assert not caution.conservative
    assert told == [True, False]


def test_while_memory_is_short_the_forge_is_conservative(smithy: Smithy) -> None:
    smithy.forge({}).build(specs("BP002", "BP003"))
    forge = smithy.forge({}, jobs=2, reserve_mb=10**9)
    forge.compile(specs("BP002", "BP003"))
    assert smithy.strategies("BP002") == smithy.strategies("BP003") == ["fast"]
    assert max(smithy.outbox.modes) == 1.0
    assert smithy.outbox.modes[-1] == 0.0, "an idle forge is not said to be conservative"
    smithy.forge({}).compile(specs("BP002", "BP003"))
    assert smithy.strategies("BP002") == ["fast", "standard"]


def test_jobs_that_never_begin_are_an_error_with_the_reason(smithy: Smithy) -> None:
    with pytest.raises(EnvironmentFault, match=r"end before they begin.*cannot even begin"):
        smithy.forge({"at start": "die"}).build(specs("BP002"))


def test_a_stop_ends_the_job_and_counts_nothing(smithy: Smithy) -> None:
    seen: list[str] = []
    wanted = specs("BP002", "BP003")
    outcome = smithy.forge({"BP003": "hang"}).build(
        wanted, lambda _done, _total, current: seen.append(current), lambda: wanted[1].key in seen
    )
    assert outcome.stopped
    assert results(outcome) == {"BP002": "eager"}
    assert not any(psutil.pid_exists(pid) for pid in smithy.pids())
    assert results(smithy.forge({}).build(specs("BP002", "BP003"))) == {"BP002": "eager", "BP003": "eager"}
    assert smithy.outbox.values["zr"] == 0


_PARENT = """
import json, sys
from pathlib import Path
from esper_ray.config import ForgeConfig
from esper_ray.contracts.keys import KeyRing
from esper_ray.tezzeret.forge import Forge
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.catalog import CATALOG
from esper_ray.urza.store import Store

folder = Path(sys.argv[1])
store, keys, command = Store(folder / "urza"), KeyRing((("k1", bytes(32)),)), json.loads(sys.argv[2])
forge = Forge(store, folder / "forge", ForgeConfig(), keys=keys, command=command)
specs = [CATALOG.get(name).spec(SlotSignature("conv", (8, 6, 6))) for name in ("BP002", "BP003", "BP004")]
forge.build(specs, lambda done, total, current: print(done, current, flush=True))
"""


def test_a_killed_forge_takes_its_job_with_it_and_goes_on_where_it_was(smithy: Smithy) -> None:
    command = json.dumps(smithy.command({"BP004": "hang"}))
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(smithy.folder), command], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.startswith("2 BP004"):
            break
    job = psutil.Process(psutil.Process(parent.pid).children()[0].pid)
    while "eager BP004" not in smithy.started():
        with contextlib.suppress(psutil.TimeoutExpired):
            job.wait(timeout=0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    job.wait(timeout=20)
    outcome = smithy.forge({}).build(specs("BP002", "BP003", "BP004"))
    assert results(outcome) == {"BP002": "eager", "BP003": "eager", "BP004": "eager"}
    assert sorted(smithy.started()) == ["eager BP002", "eager BP003", "eager BP004", "eager BP004"]


def test_what_was_stored_just_before_a_kill_is_taken_up_and_what_the_store_lost_is_made_again(smithy: Smithy) -> None:
    wanted = specs("BP002")
    forge = smithy.forge({})
    first = forge.build(wanted)
    forge.ledger.reopen("eager", toolchain.cache_key(wanted[0], "eager"))
    assert forge.build(wanted) == first
    assert smithy.started() == ["eager BP002"]
    smithy.store.close()
    smithy.store = Store(smithy.folder / "another")
    assert results(smithy.forge({}).build(wanted)) == {"BP002": "eager"}
    assert smithy.started() == ["eager BP002"] * 2


def test_a_kernel_is_sealed_over_all_that_its_artifact_says_and_holds(smithy: Smithy) -> None:
    wanted = specs("BP002")
    forge = smithy.forge({"BP002": "work1.0"})
    forge.build(wanted)
    forge.compile(wanted)
    kernel = smithy.store.get(wanted[0])
    seal.check(kernel, KEYS)
    (length,) = struct.unpack_from("<Q", kernel.weights)
    header = json.loads(kernel.weights[8 : 8 + length]) | {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    other = struct.pack("<Q", len(text)) + text + b"x"
    forged = [
        (replace(kernel, metadata={**kernel.metadata, "eager_ms": 1.0}), KEYS, "invalid_signature"),
        (replace(kernel, metadata={**kernel.metadata, "more": 1}), KEYS, "invalid_signature"),
        (replace(kernel, spec=specs("BP003")[0]), KEYS, "invalid_signature"),
        (replace(kernel, weights=other), KEYS, "invalid_signature"),
        (replace(kernel, metadata={"eager_ms": 1.0}), KEYS, "missing_signature"),
        (kernel, KeyRing((("k2", bytes(32)),)), "unknown_key"),
        (kernel, KeyRing((("k1", b"1" * 32),)), "invalid_signature"),
    ]
    for changed, keys, reason in forged:
        with pytest.raises(AuthenticityError) as refusal:
            seal.check(changed, keys)
        assert refusal.value.reason == reason


def test_what_other_keys_sealed_is_made_again(smithy: Smithy) -> None:
    wanted = specs("BP002")
    smithy.forge({}).build(wanted)
    new = KeyRing((("k2", b"2" * 32), *KEYS.keys))
    assert results(smithy.forge({}, keys=new).build(wanted)) == {"BP002": "eager"}
    assert smithy.started() == ["eager BP002"], "both keys are valid"
    smithy.forge({}, keys=KeyRing(new.keys[:1])).build(wanted)
    assert smithy.started() == ["eager BP002"] * 2
    seal.check(smithy.store.get(wanted[0]), new)


def test_compiled_code_is_used_only_where_it_was_measured_to_pay(smithy: Smithy) -> None:
    wanted = specs("BP002", "BP009")
    forge = smithy.forge({"BP002": "work1.0", "BP009": "work1.9"}, speedup=1.15)
    built = forge.build(wanted)
    outcome = forge.compile(wanted)
    assert results(outcome) == {"BP002": "compiled", "BP009": "eager"}
    fast, plain = (smithy.store.get(spec) for spec in wanted)
    assert (fast.metadata["strategy"], fast.metadata["compiled_ms"]) == ("compiled", 1.0)
    assert [row.version for row in smithy.store.list(blueprint="BP002")] == [1, 2]
    assert smithy.store.get(wanted[0], digest=built.finished[wanted[0].key].digest).metadata["strategy"] == "eager"
    assert plain.metadata["strategy"] == "eager"
    assert (plain.metadata["compiled_ms"], plain.metadata["compile_strategy"]) == (1.9, "standard")
    assert outcome.finished[wanted[1].key].figures == {"eager_ms": 2.0, "compiled_ms": 1.9, "compile_seconds": 0.5}
    assert smithy.outbox.values["zc"] == 1
    assert smithy.forge({}).compile(wanted).finished == outcome.finished
    assert smithy.started().count("compile BP002") == 1
    assert smithy.forge({}).build(wanted).finished == built.finished


def test_without_a_compiler_the_kernels_stay_eager_and_the_forge_says_why(smithy: Smithy, monkeypatch) -> None:
    never = smithy.forge({})
    never._config = ForgeConfig(compile="never")
    assert "forge.compile is never" in never.compile(specs("BP002")).note
    monkeypatch.setenv("PATH", str(smithy.folder))
    monkeypatch.setattr(forge_module, "compiler_available", toolchain.compiler_available)
    toolchain._probe.cache_clear()
    try:
        assert "stay eager: there is no C++ compiler" in smithy.forge({}).compile(specs("BP002")).note
    finally:
        toolchain._probe.cache_clear()


def test_two_forges_do_not_work_in_one_folder(smithy: Smithy) -> None:
    one, two = smithy.forge({}), smithy.forge({})
    with one._alone(), pytest.raises(EnvironmentFault, match="Another forge"):
        two.build(specs("BP002"))


def waited(shift: Shift) -> dict[str, object]:
    assert shift.wait(30)
    return shift.progress()


def test_a_shift_builds_then_compiles_and_says_when_training_may_start(smithy: Smithy) -> None:
    shift = Shift(smithy.forge({"BP009": "work1.0"}))
    assert shift.progress()["phase"] == "idle"
    shift.start([str(SIGNATURE)])
    progress = waited(shift)
    assert (progress["phase"], progress["ready"]) == ("done", True)
    assert progress["done"] == progress["total"] > 10
    assert "1 of " in str(progress["note"])
    with pytest.raises(BlueprintError, match="no slot signature"):
        shift.start(["conv"])
    assert waited(shift)["phase"] == "done"
    shift.start([str(SIGNATURE)])
    assert waited(shift)["phase"] == "done"
    assert len(smithy.started()) == len(set(smithy.started()))


def test_a_stopped_shift_drops_its_orders_and_a_lost_one_is_taken_up_again(smithy: Smithy) -> None:
    forge = smithy.forge({"BP009": "hang"})
    forge.ledger.order([str(SIGNATURE)])
    shift = Shift(forge)
    while "eager BP009" not in smithy.started():
        assert not shift.wait(0.05)
    assert not shift.progress()["ready"]
    shift.stop()
    assert waited(shift)["phase"] == "stopped"
    assert forge.ledger.orders() == []


@pytest.mark.parametrize("fault", [EnvironmentFault("The roof leaks."), ZeroDivisionError("oops")])
def test_a_shift_that_fails_says_why_and_keeps_its_order(smithy: Smithy, monkeypatch, fault: Exception, caplog) -> None:
    def broken(*_: object, **__: object) -> Callable[[], None]:
        raise fault

    forge = smithy.forge({})
    monkeypatch.setattr(forge, "build", broken)
    shift = Shift(forge)
    shift.start([str(SIGNATURE)])
    progress = waited(shift)
    assert progress["phase"] == "failed"
    assert str(fault) in str(progress["note"])
    assert len(forge.ledger.orders()) == 1
    assert ("the forge failed" in caplog.text) == isinstance(fault, ZeroDivisionError)


def test_a_job_cannot_take_more_memory_than_it_may() -> None:
    code = "from esper_ray.tezzeret.job import limit_memory; limit_memory(64); bytearray(256 * 2**20)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in run.stderr


def test_a_job_whose_parent_is_gone_leaves_at_once() -> None:
    code = "import os; from esper_ray.tezzeret.job import die_with; die_with(os.getpid())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "The parent of this job is gone" in run.stderr


def test_the_forge_loads_without_torch() -> None:
    code = "import sys, esper_ray.tezzeret.shift; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Anvil:
    """A forge that builds when it is told to."""

    conservative = False

    def __init__(self, folder: Path) -> None:
        self.ledger, self.built = Ledger(folder / "jobs.db", clock=SYSTEM_CLOCK), 0
        self.begun, self.go = threading.Event(), threading.Event()

    def ordered(self, names: list[str]) -> list[str]:
        return list(names)

    def build(self, *_: object) -> Outcome:
        self.begun.set()
        assert self.go.wait(30.0)
        self.built += 1
        return Outcome({})

    def compile(self, *_: object) -> Outcome:
        return Outcome({})


def test_an_order_for_what_is_just_being_made_is_worked_off_after_it(tmp_path: Path) -> None:
    anvil = Anvil(tmp_path)
    shift = Shift(anvil)  # type: ignore[arg-type]
    shift.start(["vector-24"])
    assert anvil.begun.wait(30.0)
    for _ in range(3):
        shift.start(["vector-24"])
    anvil.go.set()
    assert shift.wait(30.0)
    assert anvil.built == 2
    assert anvil.ledger.orders() == []
