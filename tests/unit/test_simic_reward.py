"""Only the end of an episode earns: whatever happens in between, the return is what the end is worth."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.simic import reward
from esper_ray.simic.reward import RewardConfig

ACCURACY = st.floats(0.0, 1.0)
PATH = st.lists(st.tuples(ACCURACY, st.integers(0, 3)), min_size=2, max_size=30)
RATIO = st.floats(1.0, 100.0)
CONFIG = RewardConfig()


def rewards(path: list[tuple[float, int]], worth: float, config: RewardConfig) -> list[float]:
    """The rewards of an episode: at each boundary an accuracy, and how many commands are queued before it closes."""
    potentials = [reward.potential(accuracy, config) for accuracy, queued in path[:-1] for _ in range(queued + 1)]
    between = [reward.shaping(before, after, config) for before, after in itertools.pairwise(potentials)]
    return [*between, reward.shaping(potentials[-1], 0.0, config) + worth]


@given(PATH, RATIO, RATIO)
def test_the_return_is_what_the_end_is_worth_less_the_first_potential_whatever_the_path(path, parameters, compute):
    worth = reward.terminal(path[-1][0], parameters, compute, CONFIG)
    total = sum(rewards(path, worth, CONFIG))
    assert total == pytest.approx(worth - reward.potential(path[0][0], CONFIG), abs=1e-9)


@given(PATH, st.floats(0.5, 1.0))
def test_a_discounted_return_telescopes_as_well(path, gamma):
    config = RewardConfig(gamma=gamma)
    given_ = rewards(path, 0.7, config)
    total = sum(gamma**step * each for step, each in enumerate(given_))
    expected = gamma ** (len(given_) - 1) * 0.7 - reward.potential(path[0][0], config)
    assert total == pytest.approx(expected, abs=1e-9)


@given(PATH)
def test_queued_commands_and_waiting_earn_nothing(path):
    busy, idle = path, [(accuracy, 0) for accuracy, _ in path]
    assert sum(rewards(busy, 0.5, CONFIG)) == pytest.approx(sum(rewards(idle, 0.5, CONFIG)), abs=1e-9)


@given(PATH, ACCURACY)
def test_a_peak_on_the_way_is_worth_nothing(path, peak):
    flat = [(path[0][0], 0), *((min(accuracy, path[-1][0]), 0) for accuracy, _ in path[1:-1]), path[-1]]
    peaked = [flat[0], *((max(accuracy, peak), 0) for accuracy, _ in flat[1:-1]), flat[-1]]
    worth = reward.terminal(path[-1][0], 1.0, 1.0, CONFIG)
    assert sum(rewards(peaked, worth, CONFIG)) == pytest.approx(sum(rewards(flat, worth, CONFIG)), abs=1e-9)


@given(ACCURACY, RATIO, RATIO, st.floats(1.001, 3.0))
def test_more_parameters_or_more_compute_for_the_same_quality_are_worth_less(quality, parameters, compute, factor):
    worth = reward.terminal(quality, parameters, compute, CONFIG)
    assert reward.terminal(quality, parameters * factor, compute, CONFIG) < worth
    assert reward.terminal(quality, parameters, compute * factor, CONFIG) < worth


def test_a_doubling_costs_its_rent_and_nothing_is_paid_for_being_cheaper_than_the_host():
    assert reward.terminal(0.5, 2.0, 1.0, CONFIG) == pytest.approx(0.5 - CONFIG.parameter_rent)
    assert reward.terminal(0.5, 1.0, 4.0, CONFIG) == pytest.approx(0.5 - 2 * CONFIG.compute_rent)
    assert reward.terminal(0.5, 0.5, 0.9, CONFIG) == 0.5


@pytest.mark.parametrize("bad", [{"compute_rent": -0.1}, {"gamma": 0.0}, {"gamma": 1.1}, {"parameter_rent": math.nan}])
def test_impossible_prices_are_refused(bad):
    with pytest.raises(ValueError, match="rents"):
        RewardConfig(**bad)
