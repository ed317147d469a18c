"""The configuration: defaults, a file, settings; a wrong key or value is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_ray.actors.resources import ACTORS, EVERYONE, check_capacity, gpu_share, options, table
from esper_ray.config import Config, build, changed, describe, load, of_old
from esper_ray.errors import ConfigError, EnvironmentFault


def test_a_setting_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {epochs: 7, seed: 3}\n")

    config = load(file, ["run.epochs=9"])

    assert (config.run.epochs, config.run.seed) == (9, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["run.epoch=3"], ["no key run.epoch", "Did you mean run.epochs"]),
        (["run.epochs=many"], ["run.epochs", "'many'"]),
        (["run.epochs=1"], ["run.epochs", "1"]),
        (["run.task=resnet-50"], ["run.task", "resnet-50", "resnet-lite"]),
        (["run.dataset=mnist"], ["run.dataset", "mnist", "glyphs"]),
        (["epochs"], ["key=value"]),
        (["run.epochs.x=3"], ["run.epochs"]),
        (["nissa.port=70000"], ["nissa.port", "65535"]),
    ],
)
def test_a_wrong_setting_is_named(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(settings=settings)

    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("text", ["run: [", "- 1\n- 2\n", "just words"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml")


def test_the_tree_is_frozen_and_survives_the_way_to_an_actor() -> None:
    config = load(settings=["run.seed=4", "ray.resources={tolaria: {num_cpus: 0.5}}"])

    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 5  # type: ignore[misc]
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_every_key_has_a_meaning() -> None:
    assert [key for key, _, meaning in describe(Config()) if not meaning] == []


def test_the_home_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_HOME", "/somewhere/else")

    assert Config().home == Path("/somewhere/else")


# The actors' table


def test_the_shares_of_all_actors_fit_a_machine_with_two_processors() -> None:
    assert sum(spec.num_cpus for spec in EVERYONE) < 2
    assert sum(spec.num_gpus for spec in EVERYONE) <= 1


def test_gpus_are_asked_for_only_where_there_are_some_and_they_are_wanted() -> None:
    tolaria = table(Config())["tolaria"]

    assert gpu_share(tolaria, Config(), {"CPU": 2}) == 0
    assert gpu_share(tolaria, Config(), {"CPU": 8, "GPU": 1}) == 0.5
    assert gpu_share(tolaria, load(settings=["run.device=cpu"]), {"CPU": 8, "GPU": 1}) == 0


def test_every_actor_is_named_detached_and_comes_back() -> None:
    config = Config()

    for spec in ACTORS:
        chosen = options(spec, config, {"CPU": 2})
        assert (chosen["name"], chosen["namespace"]) == (spec.name, "esper")
        assert (chosen["lifetime"], chosen["max_restarts"], chosen["max_task_retries"]) == ("detached", -1, 0)
        assert chosen["resources"] == {}


def test_actors_stay_on_the_node_with_the_home_folder_where_the_cluster_names_one() -> None:
    chosen = options(ACTORS[0], Config(), {"CPU": 2, "esper_home": 1})

    assert chosen["resources"] == {"esper_home": 0.01}


def test_the_configuration_overrides_the_table() -> None:
    config = load(settings=["ray.resources={tolaria: {num_cpus: 4, threads: 3}}"])

    tolaria = table(config)["tolaria"]

    assert (tolaria.num_cpus, tolaria.threads) == (4, 3)
    assert options(tolaria, config, {})["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "3"}}


@pytest.mark.parametrize(
    ("value", "word"),
    [("{tolarian: {num_cpus: 1}}", "tolarian"), ("{nissa: {cpus: 1}}", "cpus"), ("{nissa: {num_cpus: -1}}", "-1")],
)
def test_an_override_that_means_nothing_is_refused(value: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        table(load(settings=[f"ray.resources={value}"]))


def test_too_little_room_is_told_as_needed_against_available() -> None:
    specs = table(Config())

    with pytest.raises(EnvironmentFault, match=r"need 1\.9 CPU, and 0\.5 of the cluster's 2 are free"):
        check_capacity(specs, Config(), cluster={"CPU": 2}, available={"CPU": 0.5})
    check_capacity(specs, Config(), cluster={"CPU": 2}, available={"CPU": 2})


def test_a_key_that_became_another_is_named_with_the_new_one_and_read_in_stored_files() -> None:
    with pytest.raises(ConfigError, match=r"It is called seeds\.probation_epochs"):
        load(None, ["tamiyo.probation_epochs=3"])
    stored: dict[str, dict[str, int]] = {
        "tamiyo": {"probation_epochs": 3, "window": 4},
        "seeds": {"probation_epochs": 2},
    }
    config = build(of_old(stored))
    assert (config.seeds.probation_epochs, config.tamiyo.window) == (3, 4)
    assert stored["tamiyo"]["probation_epochs"] == 3, "what is stored stays"
    assert changed(stored, ["tamiyo.window=5"]).tamiyo.window == 5
