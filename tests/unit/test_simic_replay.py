"""The replay: what it draws, what it drops, what survives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper_ray.errors import CheckpointError, ReplayError
from esper_ray.reliability.clock import ManualClock
from esper_ray.simic.replay import Provenance, Replay
from esper_ray.simic.sumtree import SumTree

HERE = Provenance("worker-0", 3)


def item(number: int, steps: int = 4) -> dict[str, np.ndarray]:
    return {"rewards": np.full(steps, number, np.float32), "obs/x": np.full((steps + 1, 2), number, np.float64)}


SIZE = sum(array.nbytes for array in item(0).values())


def filled(count: int, **options: object) -> Replay:
    replay = Replay(max_bytes=SIZE * 100, **options)  # type: ignore[arg-type]
    for number in range(count):
        replay.add(item(number), HERE)
    return replay


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
@example([2.225073858507e-311], 0)
def test_the_tree_finds_the_leaf_at_which_the_running_sum_passes(priorities: list[float], seed: int) -> None:
    tree = SumTree(len(priorities))
    tree.set(np.arange(len(priorities)), np.asarray(priorities))
    assert tree.total == pytest.approx(sum(priorities), rel=1e-9)
    if tree.total == 0.0:
        return
    points = np.append(np.random.default_rng(seed).random(20), 1.0) * tree.total
    bounds = np.cumsum(priorities)
    for point, place in zip(points, tree.find(points), strict=True):
        assert priorities[place] > 0
        slack = 1e-9 * tree.total
        assert bounds[place] >= point - slack
        assert bounds[place] - priorities[place] <= point + slack


def test_the_tree_is_right_over_several_levels_after_many_changes() -> None:
    rng = np.random.default_rng(0)
    truth, tree = np.zeros(5000), SumTree(5000)
    for _ in range(50):
        places = rng.integers(0, 5000, 64)
        values = rng.random(64)
        truth[places], _ = values, tree.set(places, values)
    places = np.arange(5000)
    assert np.array_equal(tree.get(places), truth)
    assert tree.total == pytest.approx(truth.sum(), rel=1e-12)
    assert (truth[tree.find(rng.random(1000) * tree.total)] > 0).all()


def test_items_are_drawn_in_proportion_to_priority_to_the_alpha() -> None:
    replay = filled(4, alpha=0.6)
    replay.update([0, 1, 2, 3], [1.0, 2.0, 4.0, 8.0])
    counts = np.zeros(4)
    for _ in range(5000):
        for number in replay.sample(4).ids:
            counts[number] += 1
    expected = np.asarray([1.0, 2.0, 4.0, 8.0]) ** 0.6
    assert counts / counts.sum() == pytest.approx(expected / expected.sum(), abs=0.01)


def test_importance_weights_undo_the_preference() -> None:
    replay = filled(3, alpha=1.0, beta=0.4)
    replay.update([0, 1, 2], [1.0, 1.0, 8.0])
    sample = replay.sample(3)
    probabilities = np.asarray([0.1, 0.1, 0.8])[list(sample.ids)]
    expected = (3 * probabilities) ** -0.4
    assert sample.weights == pytest.approx(expected / expected.max(), rel=1e-4)


def test_a_sample_is_what_was_added_and_says_where_it_comes_from() -> None:
    replay = filled(10)
    sample = replay.sample(10)
    for place, number in enumerate(sample.ids):
        assert all(np.array_equal(sample.item(place)[key], array) for key, array in item(number).items())
        assert sample.provenance(place) == HERE


def test_equal_seeds_draw_equal_samples() -> None:
    one, two, other = filled(50, seed=1), filled(50, seed=1), filled(50, seed=2)
    assert one.sample(20).ids.tolist() == two.sample(20).ids.tolist()
    assert one.sample(20).ids.tolist() != other.sample(20).ids.tolist()


def test_a_batch_larger_than_the_replay_is_refused_with_both_numbers() -> None:
    with pytest.raises(ReplayError, match="8 items was asked for, and the replay holds 3"):
        filled(3).sample(8)
    with pytest.raises(ReplayError, match="holds 0"):
        Replay(max_bytes=100).sample(1)


def test_the_oldest_go_when_the_budget_is_full() -> None:
    replay = Replay(max_bytes=SIZE * 3 + 1)
    for number in range(5):
        replay.add(item(number), HERE)
    assert len(replay) == 3
    assert replay.bytes == SIZE * 3
    assert {number for _ in range(50) for number in replay.sample(3).ids} == {2, 3, 4}
    assert set(replay.sample(3).columns["rewards"][:, 0]) <= {2, 3, 4}


def test_what_is_too_old_is_never_drawn() -> None:
    clock = ManualClock()
    replay = Replay(max_bytes=SIZE * 10, max_seconds=60, clock=clock)
    replay.add(item(0), HERE)
    clock.advance(50)
    replay.add(item(1), HERE)
    clock.advance(20)
    sample = replay.sample(1)
    assert sample.ids.tolist() == [1]
    assert sample.ages[0] == pytest.approx(20)
    assert len(replay) == 1
    replay.update([0], [5.0])
    assert replay.sample(1).ids.tolist() == [1]


def test_items_of_other_shapes_or_too_large_are_refused() -> None:
    replay = filled(1)
    with pytest.raises(ReplayError, match="same shapes"):
        replay.add(item(0, steps=5), HERE)
    with pytest.raises(ReplayError, match="does not fit"):
        Replay(max_bytes=SIZE - 1).add(item(0), HERE)
    with pytest.raises(ReplayError, match="no finite number"):
        replay.update([0], [float("nan")])


def test_a_saved_replay_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    replay = Replay(max_bytes=SIZE * 8, seed=4)
    for number in range(13):
        replay.add(item(number), Provenance(f"worker-{number}", number))
    replay.update([8, 9], [3.0, 0.5])
    replay.save(tmp_path)
    other = Replay(max_bytes=SIZE * 8, seed=99)
    assert other.load(tmp_path)
    for _ in range(3):
        one, two = replay.sample(8), other.sample(8)
        for name in ("ids", "weights"):
            assert np.array_equal(getattr(one, name), getattr(two, name))
        assert [one.provenance(n) for n in range(8)] == [two.provenance(n) for n in range(8)]
        assert np.array_equal(one.columns["obs/x"], two.columns["obs/x"])
    assert other.add(item(13), HERE) == 13


def test_a_smaller_replay_takes_the_newest_of_a_larger_one(tmp_path: Path) -> None:
    filled(20).save(tmp_path)
    small = Replay(max_bytes=SIZE * 5)
    assert small.load(tmp_path)
    assert {number for _ in range(40) for number in small.sample(5).ids} == {15, 16, 17, 18, 19}


def test_no_file_is_an_empty_replay_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert not Replay(max_bytes=100).load(tmp_path)
    (tmp_path / "replay.npz").write_bytes(b"not a replay")
    with pytest.raises(CheckpointError, match="damaged"):
        Replay(max_bytes=100).load(tmp_path)
