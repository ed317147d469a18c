"""A fork goes on from its parent's boundary, alike until somebody decides otherwise; the parent stays as it is."""

from __future__ import annotations

import hashlib
import json

import pytest

from esper_ray import config as configuration
from esper_ray import inprocess, runs
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import CheckpointError, ConfigError, EsperError, RunError
from esper_ray.nissa import side_by_side
from esper_ray.tolaria import forks
from esper_ray.tolaria.forks import Fork
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    *tiny_runs.SETTINGS,
    "run.epochs=8",
    "run.mode=lockstep",
    "run.keep_checkpoints=20",
    "seeds.gain_errors=0",
    "tamiyo.warmup_epochs=3",
    "tamiyo.seeds_at_once=1",
    "tamiyo.latest_growth=0.9",
)


@pytest.fixture(scope="module")
def kernels():
    return inprocess.LocalKernels()


def trainer_at(home, kernels, name="parent", *settings, config=None, **request):
    config = config or configuration.load(None, [f"home={home}", *TINY, *settings])
    return Trainer(RunRequest(name, config, **request), inprocess.surroundings(config, kernels=kernels))


@pytest.fixture(scope="module")
def home(tmp_path_factory, kernels):
    """A home with a whole run, which grows at epoch 3."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    trainer_at(home, kernels).run()
    torch.set_num_threads(before)
    return home


def forked(home, kernels, name, fork, *settings):
    config = runs.check_fork(home / "runs", fork, settings)
    forks.bring(home / "runs", fork, name)
    return trainer_at(home, kernels, name, config=config, fork=fork)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def decided(folder):
    """Epoch, author and operations of each decision that was one."""
    return [
        (row["epoch"], row["controller"], [command["operation"] for command in row["commands"]])
        for row in lines(folder, "events.jsonl")
        if row["kind"] == "decision" and row["commands"][0]["operation"] != "NO_OP"
    ]


def fingerprint(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("journal.db"))
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_fork_that_decides_nothing_otherwise_ends_with_its_parents_weights(home, kernels):
    parent = home / "runs" / "parent"
    before = fingerprint(parent)
    fork = forked(home, kernels, "same", Fork("parent", 4))
    result = fork.run()
    expected = json.loads((parent / "result.json").read_text())
    for name in ("test_loss", "test_accuracy", "parameters", "flops", "epochs", "steps"):
        assert result[name] == expected[name], name
    assert decided(fork.folder) == decided(parent)
    theirs, ours = lines(parent, "metrics.jsonl"), lines(fork.folder, "metrics.jsonl")
    assert [row["validation_loss"] for row in ours] == [row["validation_loss"] for row in theirs]
    manifest = json.loads((fork.folder / "manifest.json").read_text())
    assert manifest["fork"] == {"parent": "parent", "epoch": 4, "decide": [], "author": ""}
    assert fingerprint(parent) == before


def test_another_decision_takes_the_place_of_the_germination_of_that_boundary(home, kernels):
    parent = home / "runs" / "parent"
    ((epoch, _, operations), *_) = decided(parent)
    assert operations == ["GERMINATE"]
    (taken,) = [row for row in lines(parent, "events.jsonl") if row["kind"] == "stage" and row["epoch"] == epoch]
    slot = taken["slot"]
    name = json.loads((parent / "manifest.json").read_text())["slots"][slot]["name"]
    fork = forked(home, kernels, "other", Fork("parent", epoch, (f"grow {name} BP002",), "anna"))
    fork.open()
    assert [(seed.number, seed.spec.blueprint) for seed in fork.garden.seeds] == [(1, "BP002")]
    for _ in range(2):
        fork.one_epoch()
    fork.close()
    (first, *_) = decided(fork.folder)
    assert first == (epoch, "anna", ["GERMINATE"])
    rows = [row for row in lines(fork.folder, "events.jsonl") if row["kind"] == "stage" and row["slot"] == slot]
    assert [row["blueprint"] for row in rows if row["to"] == "GERMINATED"] == ["BP002"]
    assert [row["epoch"] for row in lines(fork.folder, "metrics.jsonl")] == list(range(1, epoch + 3))
    different = side_by_side.differences(side_by_side.read([parent, fork.folder]))
    assert different[0].epoch == epoch
    theirs, hers = different[0].acts
    assert "BP002" in hers
    assert hers.endswith("anna")
    assert theirs
    assert "BP002" not in theirs


def test_a_fork_inherits_what_tamiyo_knew_and_her_reports_name_who_decided(home, kernels):
    epoch = decided(home / "runs" / "parent")[0][0]
    fork = forked(home, kernels, "heir", Fork("parent", epoch, ("grow 2 BP002",), "anna"))
    fork.open()
    fork.one_epoch()
    tamiyo = fork.around.decider.tamiyo
    assert [state.epoch for state in tamiyo._history.views["heir"].states] == list(range(1, epoch + 2))
    tamiyo.close_run("heir")
    reports = [(report.slot, report.blueprint, report.policy_version) for report in tamiyo.reports("heir")]
    assert reports[0] == (2, 2, "anna")
    assert len({slot for slot, *_ in reports}) == len(reports), "what her decision took the place of is not reported on"
    fork.close()


def test_a_fork_that_is_lost_goes_on_with_its_own_decision(home, kernels):
    epoch = decided(home / "runs" / "parent")[0][0]
    given = Fork("parent", epoch, ("grow 2 BP002",), "anna")
    whole = forked(home, kernels, "whole", given)
    expected = whole.run()
    lost = forked(home, kernels, "lost", given)
    lost.open()
    lost.one_epoch()
    lost.close()
    config = lost.config
    again = trainer_at(home, kernels, "lost", config=config, resume=True, fork=given)
    result = again.run()
    assert result["test_loss"] == expected["test_loss"]
    assert decided(again.folder) == decided(whole.folder)


def test_a_fork_may_have_another_decider_and_nothing_else(home, kernels):
    fork = forked(home, kernels, "never", Fork("parent", 2), "tamiyo.controller=never")
    result = fork.run()
    assert result["parameters"] == result["host_parameters"]
    assert decided(fork.folder) == []
    with pytest.raises(ConfigError, match=r"run\.seed=3 cannot be set with --fork"):
        runs.check_fork(home / "runs", Fork("parent", 2), ["run.seed=3"])


@pytest.mark.parametrize(
    ("fork", "words"),
    [
        (Fork("nobody", 2), "no run nobody"),
        (Fork("parent", 99), "Kept are: 1, 2"),
        (Fork("parent", 2, ("grow stage9 BP002",)), "no slot stage9"),
        (Fork("parent", 2, ("grow 0 BP043",)), "quarantined"),
        (Fork("parent", 2, ("cull 0",)), "The slot is DORMANT there"),
        (Fork("parent", 2, ("grow 0 BP002", "grow 0 BP004")), "about the same slot"),
        (Fork("parent", 2, ("grow 0",)), "no decision"),
    ],
)
def test_what_cannot_be_forked_is_said_before_anything_is_written(home, fork, words):
    before = sorted((home / "runs").iterdir())
    with pytest.raises(EsperError) as fault:
        runs.check_fork(home / "runs", fork, [])
    assert words in str(fault.value)
    assert sorted((home / "runs").iterdir()) == before


def test_a_damaged_checkpoint_of_the_parent_ends_the_fork_by_name(home, kernels):
    fork = Fork("parent", 5)
    forks.bring(home / "runs", fork, "broken")
    (file,) = (home / "runs" / "broken" / "origin").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    config = runs.check_fork(home / "runs", fork, [])
    trainer = trainer_at(home, kernels, "broken", config=config, fork=fork)
    with pytest.raises(CheckpointError, match="epoch-000005"):
        trainer.open()
    trainer.close()


def test_a_place_is_a_run_and_an_epoch_or_its_last_one(home):
    assert forks.parse_place("r@7") == ("r", 7)
    assert forks.parse_place("r") == ("r", None)
    with pytest.raises(RunError, match="no place to fork at"):
        forks.parse_place("r@x")
    assert runs.fork_at(home / "runs", "parent", [], "anna") == Fork("parent", 8, (), "anna")


def test_runs_side_by_side_become_figures_and_a_picture(home, kernels, tmp_path):
    fork = forked(home, kernels, "pictured", Fork("parent", 3), "tamiyo.controller=never")
    fork.run()
    found = side_by_side.read([home / "runs" / "parent", fork.folder])
    figures = [side_by_side.figures(run) for run in found]
    assert [row["status"] for row in figures] == ["finished", "finished"]
    assert figures[0]["test_accuracy"] == json.loads((home / "runs/parent/result.json").read_text())["test_accuracy"]
    file = tmp_path / "c.png"
    side_by_side.write_picture(found, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert len(file.read_bytes()) > 20_000


def test_a_persons_fork_names_stages_as_they_are(home, kernels):
    epoch = decided(home / "runs" / "parent")[0][0]
    fork = forked(home, kernels, "later", Fork("parent", epoch + 1, ("cull 0",), "anna"))
    fork.open()
    assert Stage.CULLED in [slot.stage for slot in fork.garden.slots]
    fork.close()
