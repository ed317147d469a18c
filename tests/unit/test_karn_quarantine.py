"""Each quarantined block is stopped: which gate or guard does it, and in which step. All through the real paths."""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, blueprint_number
from esper_ray.contracts.ports import Kernel, KernelSpec
from esper_ray.errors import BlueprintError, KernelError
from esper_ray.karn.blueprints import build
from esper_ray.karn.blueprints.quarantined import FUSE_CALLS
from esper_ray.karn.catalog import BLUEPRINTS
from esper_ray.karn.sandbox import sandbox
from esper_ray.kasmina import gates, kernels
from esper_ray.kasmina.gates import birth
from esper_ray.tezzeret import compiler
from esper_ray.tezzeret.forge import wanted_of
from esper_ray.tezzeret.worker import Event, Job, Limits
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs
from tests.seed_worlds import SIGNATURE, World

SANDBOXED = (
    sys.executable,
    "-c",
    "from esper_ray.karn.sandbox import sandbox\nfrom esper_ray.tezzeret import job\nwith sandbox(): job.main()",
)
EPOCHS = 8
RUN = (*tiny_runs.SETTINGS, f"run.epochs={EPOCHS}", "run.mode=lockstep", "run.threads=1", "tamiyo.controller=never")
KERNELS = inprocess.LocalKernels()
QUARANTINED = [f"BP{number:03d}" for number in range(43, 51)]


def spec(identifier: str) -> KernelSpec:
    return KernelSpec(identifier, SIGNATURE)


class Unchecked:
    """A forge whose checks are all asleep: what Kasmina's own gates must then stop."""

    def fetch(self, wanted: KernelSpec) -> Unchecked:
        self.wanted = wanted
        return self

    def wait(self, timeout: float | None) -> Kernel:
        return Kernel(self.wanted, "0" * 64, {"flops_forward": 1, "flops_backward": 1}, b"")


class Plain(nn.Module):
    """A host without normalisation, which would hide how large a block's output is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Drill(World):
    """The small world with one quarantined seed, made by a forge that checks nothing."""

    def __init__(self, identifier: str, host: nn.Module | None = None, **settings) -> None:
        super().__init__(host, sow=(), **settings)
        self.garden.source = Unchecked()
        directive = SeedDirective(SeedOperation.GERMINATE, blueprint=blueprint_number(identifier))
        order = AdaptationCommand(1, CommandType.SEED, "r", 1, 0, "t", slot=0, seed_directive=directive)
        self.refusal = self.garden.apply(order)
        self.events: list[dict] = []

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.events += self.garden.drain_events()

    def gate(self, name: str) -> dict:
        return next(e for e in self.events if e["kind"] == "gate" and name in str(e["gate"]) and not e["passed"])

    @property
    def stage(self) -> Stage:
        return self.garden.slots[0].stage


def judge_training(drill: Drill) -> str:
    """What G1 says of the evidence that the seed has gathered."""
    from esper_ray.kasmina.gates import gradient_health

    seed = drill.garden.slots[0].seed
    assert seed is not None
    verdict = gradient_health(seed.evidence, drill.config)
    assert not verdict.passed
    return verdict.reason


def test_the_drills_are_about_all_that_is_quarantined() -> None:
    assert [each.id for each in BLUEPRINTS if each.family == "quarantined"] == QUARANTINED


@pytest.mark.parametrize("identifier", QUARANTINED)
def test_outside_of_a_drill_no_path_gives_it_out(identifier) -> None:
    with pytest.raises(BlueprintError, match="quarantined"):
        compiler.make(spec(identifier))
    with pytest.raises(BlueprintError, match="quarantined"):
        wanted_of(f"{identifier}@{SIGNATURE}")
    assert "quarantined" in Drill(identifier, approved=(identifier,)).refusal


def test_exploding_is_stopped_by_g1_within_six_isolated_steps() -> None:
    with sandbox():
        drill = Drill("BP043", Plain())
        drill.train(6)
    assert "gradient exploded" in judge_training(drill)


def test_vanishing_is_stopped_by_g1_within_six_isolated_steps() -> None:
    with sandbox():
        drill = Drill("BP044")
        drill.train(6)
    assert "gradient vanished" in judge_training(drill)


def test_severed_is_stopped_by_the_forges_check_and_by_g0_before_its_first_step() -> None:
    with sandbox():
        with pytest.raises(KernelError, match="cannot learn"):
            compiler.make(spec("BP045"))
        drill = Drill("BP045")
        drill.train(1)
    assert drill.stage not in (Stage.TRAINING, Stage.BLENDING)
    assert "tensors get no gradient" in drill.gate("G0")["reason"]


def drilled(identifier: str, home: Path, *settings: str) -> Trainer:
    """A whole run in which a person orders that block into the middle slot after the first epoch."""
    config = configuration.load(None, [f"home={home}", *RUN, *settings])
    run = Trainer(RunRequest("r", config, resume=False), inprocess.surroundings(config, kernels=KERNELS))
    run.open()
    run.one_epoch()
    if identifier:
        directive = SeedDirective(SeedOperation.GERMINATE, blueprint=blueprint_number(identifier))
        order = AdaptationCommand(1, CommandType.SEED, "r", 1, 0, "t", slot=1, seed_directive=directive)
        assert run.orders.apply(order) == ""
    while run.step < run.total_steps:
        run.one_epoch()
    run.close()
    return run


def told(run: Trainer, kind: str, file: str = "events.jsonl") -> list[dict]:
    lines = (run.folder / file).read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def put_to_sleep(monkeypatch: pytest.MonkeyPatch, *asleep: Gate) -> None:
    """These gates let everything pass: what stands behind them is what the drill is about."""
    for gate in asleep:
        monkeypatch.setitem(gates.GATES, gate, lambda *_: gates.Verdict(True, "asleep", {}))  # type: ignore[misc]


def test_a_time_bomb_that_goes_off_in_isolation_is_stopped_by_g1_and_its_host_never_notices(tmp_path: Path) -> None:
    with sandbox():
        run = drilled("BP046", tmp_path / "drill")
    verdicts = {row["epoch"]: row["reason"] for row in told(run, "gate") if row["gate"] == "G1_GRADIENT_HEALTH"}
    unsound = [epoch for epoch, reason in verdicts.items() if "a gradient is not finite" in reason]
    # Called twice at its birth and 8 times in each epoch from the second on, it goes off in the sixth.
    assert unsound == [6, 7]
    assert [row["reason"] for row in told(run, "stage") if row["to"] == "CULLED"] == [
        "6 epochs in TRAINING without passing on"
    ]
    alone = drilled("", tmp_path / "alone").model.state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in run.model.state_dict().items())


def test_a_time_bomb_that_goes_off_in_the_path_costs_an_epoch_and_is_removed(tmp_path: Path, monkeypatch) -> None:
    put_to_sleep(monkeypatch, Gate.G1_GRADIENT_HEALTH)
    with sandbox():
        run = drilled("BP046", tmp_path)
    back = told(run, "rollback", "incidents.jsonl")
    culled = [row for row in told(run, "stage") if row["to"] == "CULLED"]
    assert len(back) == 1
    assert "training loss is not finite" in culled[0]["reason"]
    assert run.epoch == EPOCHS
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def made_by_a_job(identifier: str, folder: Path, limits: Limits) -> Event:
    """What becomes of a quarantined block in a real job that is allowed to make it."""
    with Job("eager", folder, limits, command=SANDBOXED) as job:
        job.give(spec(identifier))
        while (event := job.poll()) is None:
            select.select([job], [], [], 0.1)
    return event


def test_hanging_is_killed_at_the_forges_time_limit(tmp_path: Path) -> None:
    # More than a job needs to begin: what is killed is the block's work.
    event = made_by_a_job("BP047", tmp_path, Limits(8.0, 4096))
    assert event.kind == "lost"
    assert "Killed at its time limit of 8 s" in event.why


def test_leaking_is_stopped_at_the_forges_memory_limit(tmp_path: Path) -> None:
    event = made_by_a_job("BP048", tmp_path, Limits(60.0, configuration.ForgeConfig().memory_mb))
    assert event.kind in ("failed", "lost")
    assert "memory" in event.why.lower() or "alloc" in event.why.lower(), event.why


def test_intruding_is_stopped_by_the_forges_check_and_by_g0_before_its_first_step() -> None:
    with sandbox():
        with pytest.raises(KernelError, match="writes into its own input"):
            compiler.make(spec("BP049"))
        drill = Drill("BP049")
        drill.train(1)
    assert drill.stage not in (Stage.TRAINING, Stage.BLENDING)
    assert "output changes" in drill.gate("G0")["reason"]


def test_overbearing_is_stopped_by_g1_for_its_host_cannot_use_what_it_makes(tmp_path: Path) -> None:
    with sandbox():
        run = drilled("BP050", tmp_path)
    refused = [row for row in told(run, "gate") if not row["passed"]]
    assert refused[0]["epoch"] == 2
    assert {row["gate"] for row in refused} == {"G1_GRADIENT_HEALTH"}
    assert all("its loss does not fall" in row["reason"] for row in refused)


@pytest.mark.parametrize(
    ("asleep", "awake", "reason"),
    [
        ((), Gate.G2_STABILITY, "the validation loss rose"),
        ((Gate.G2_STABILITY,), Gate.G3_INTERFACE, "the output turned away"),
    ],
    ids=["g2", "g3"],
)
def test_overbearing_is_stopped_by_the_gates_behind_g1_as_well(
    tmp_path: Path, monkeypatch, asleep, awake, reason
) -> None:
    put_to_sleep(monkeypatch, Gate.G1_GRADIENT_HEALTH, *asleep)
    with sandbox():
        run = drilled("BP050", tmp_path)
    refused = [row for row in told(run, "gate") if not row["passed"]]
    assert refused[0]["gate"] == awake.name
    assert reason in refused[0]["reason"]
    assert Stage.FOSSILIZED not in {slot.stage for slot in run.garden.slots}


def test_an_honest_block_passes_where_the_quarantined_ones_are_stopped() -> None:
    branch = build("BP009", SIGNATURE)
    kernel = Kernel(KernelSpec("BP009", SIGNATURE), "0" * 64, {}, b"")
    evidence = kernels.birth_evidence(kernel, branch, World(sow=()).garden.slots[0].info, run_seed=1)
    assert birth(evidence, configuration.SeedConfig()).passed
    drill = World()
    for _ in range(FUSE_CALLS + 5):
        drill.step()
    assert "gradient" not in judge_reason(drill)


def judge_reason(world: World) -> str:
    from esper_ray.kasmina.gates import gradient_health

    return gradient_health(world.garden.slots[0].seed.evidence, world.config).reason
