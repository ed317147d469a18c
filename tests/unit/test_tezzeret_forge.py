"""The forge finishes what it began: failures are counted, limits hold, a kill loses and repeats nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from esper_ray.config import ForgeConfig
from esper_ray.contracts import codec
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.errors import BlueprintError, EnvironmentFault
from esper_ray.karn.catalog import CATALOG
from esper_ray.tezzeret import forge as forge_module
from esper_ray.tezzeret import toolchain
from esper_ray.tezzeret.forge import Forge, Outcome
from esper_ray.tezzeret.shift import Shift
from esper_ray.urza.store import Store

SIGNATURE = SlotSignature("conv", (8, 6, 6))
# A job that obeys a plan, one word per blueprint, and writes down each kernel that it starts.
FAKE_JOB = """
import base64, json, os, signal, struct, sys
from pathlib import Path
from esper_ray.tezzeret.job import die_with

plan, folder, parent = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
die_with(parent)
say = lambda **message: print(json.dumps(message), flush=True)
if plan.get("at start") == "die":
    sys.exit("cannot even begin")
request = json.loads(sys.stdin.readline())
for index, kernel in enumerate(request["kernels"]):
    say(started=index)
    with (folder / "started").open("a") as file:
        print(request["phase"], kernel["blueprint"], os.getpid(), file=file)
    word = plan.get(kernel["blueprint"], "work")
    if word == "spin":
        while True:
            pass
    if word == "hang":
        signal.pause()
    if word == "die":
        sys.exit("the disk is on fire")
    if word == "fail":
        say(failed=index, why="it does not converge")
        continue
    if request["phase"] == "compile":
        say(done=index, metadata={"eager_ms": 2.0, "compiled_ms": float(word.removeprefix("work") or 1.9)})
        continue
    weights = base64.b64encode(struct.pack("<Q", 2) + b"{}").decode()
    say(done=index, weights=weights, metadata={"parameters_count": 5, "strategy": "eager"})
"""


class Outbox:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def publish(self, type, payload, **_) -> None:
        del type
        for point in codec.decode_telemetry(payload).metrics:
            before = self.values.get(point.key, 0.0) if point.key in ("zr", "zg", "zc") else 0.0
            self.values[point.key] = before + point.value


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

    def forge(self, plan: dict[str, str], **settings: float) -> Forge:
        config = ForgeConfig(**{"job_seconds": 30.0, **settings})
        forge = Forge(self.store, self.folder / "forge", config, publisher=self.outbox, command=self.command(plan))
        self.forges.append(forge)
        return forge

    def started(self) -> list[str]:
        """Phase and blueprint of each kernel that any job began, in order."""
        return [" ".join(line.split()[:2]) for line in self._lines()]

    def pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self._lines()]

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


def test_a_build_is_stored_counted_and_not_repeated(smithy: Smithy) -> None:
    seen: list[tuple[int, int, str]] = []
    wanted = specs("BP002", "BP009")
    outcome = smithy.forge({}).build(wanted, lambda *progress: seen.append(progress))
    assert results(outcome) == {"BP002": "eager", "BP009": "eager"}
    assert [smithy.store.get(spec).digest for spec in wanted] == [item.digest for item in outcome.finished.values()]
    assert seen[0] == (0, 2, "")
    assert seen[-1] == (2, 2, wanted[1].key)
    assert (smithy.outbox.values["zd"], smithy.outbox.values["zw"], smithy.outbox.values["zr"]) == (2, 2, 0)
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
    outcome = smithy.forge({"BP002": "hang"}, job_seconds=0.4).build(specs("BP002"))
    assert results(outcome) == {"BP002": "given up"}


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
from esper_ray.tezzeret.forge import Forge
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.catalog import CATALOG
from esper_ray.urza.store import Store

folder = Path(sys.argv[1])
forge = Forge(Store(folder / "urza"), folder / "forge", ForgeConfig(), command=json.loads(sys.argv[2]))
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
    assert outcome.finished[wanted[1].key].figures == {"eager_ms": 2.0, "compiled_ms": 1.9}
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
