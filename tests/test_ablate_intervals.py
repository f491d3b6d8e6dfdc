"""Intervals of paired differences hold what they promise at a handful of seeds; p, Holm and Student's t agree with other ways to them."""

import math

import numpy as np
import pytest
from scipy import stats

from mvwan.ablation.intervals import bootstrap_interval, effect_size, holm, paired, t_quantile


def test_students_t_is_two_sided_as_in_printed_tables() -> None:
    found = [t_quantile(*asked) for asked in ((0.05, 1), (0.05, 2), (0.05, 4), (0.01, 9))]
    assert found == pytest.approx([12.7062, 4.30265, 2.77645, 3.24984], rel=1e-5)


def test_with_one_episode_it_is_the_paired_t_test() -> None:
    seeds = np.array([0.3, 1.1, 0.7, -0.2, 0.9])
    found, other = paired(seeds[:, None]), stats.ttest_1samp(seeds, 0)
    assert found.p == pytest.approx(other.pvalue, rel=1e-5)
    assert found.interval(0.95) == pytest.approx(other.confidence_interval(0.95))
    assert (found.num_seeds, found.num_episodes, found.num_pairs) == (5, 1, 5)


def test_seeds_and_episodes_by_hand() -> None:
    found = paired(np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 8.0]]))
    # Seeds' means 2, 3, 5.5 and episodes' 2, 5; t of 2 and of 1 degrees of freedom as in any printed table.
    over_seeds, over_episodes = (1.5**2 + 0.5**2 + 2**2) / 2 / 3, 4.5 / 2
    half = math.sqrt(over_seeds * 4.302653**2 + over_episodes * 12.706205**2)
    assert found.mean == 3.5
    assert found.interval() == pytest.approx((3.5 - half, 3.5 + half), rel=1e-6)


def test_p_is_where_the_interval_ends_at_zero() -> None:
    found = paired(np.random.default_rng(0).normal(0.8, 1, (5, 7)))
    assert 0.001 < found.p < 0.5
    assert found.interval(1 - found.p)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("num_seeds", "num_episodes"), [(3, 4), (3, 20), (5, 7), (10, 4)])
@pytest.mark.parametrize("spreads", [(1, 1, 1), (1, 0.3, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_seeds: int, num_episodes: int, spreads: tuple[float, ...]) -> None:
    """Each of seeds, episodes and their own noise in turn may be all there is; `spreads` are their deviations."""
    draw, trials = np.random.default_rng(0), 1000
    held = 0
    for _ in range(trials):
        parts = (draw.normal(size=shape) for shape in ((num_seeds, 1), (1, num_episodes), (num_seeds, num_episodes)))
        low, high = paired(2 + sum(spread * part for spread, part in zip(spreads, parts, strict=True))).interval(0.95)
        held += low <= 2 <= high
    assert held / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


def test_the_bootstrap_is_too_short_at_three_seeds() -> None:
    """Why it decides nothing alone."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = bootstrap_interval(draw.normal(size=(3, 1)) + 0.1 * draw.normal(size=(3, 6)), 300, draw)
        held += low <= 0 <= high
    assert held / 400 < 0.88


def test_the_bootstrap_finds_the_spread_of_many() -> None:
    differences = np.random.default_rng(0).normal(1, 1, (200, 1))
    low, high = bootstrap_interval(differences, 4000, np.random.default_rng(1))
    assert (low + high) / 2 == pytest.approx(differences.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(200), rel=0.05)


def test_the_bootstrap_draws_one_episode_for_all_seeds() -> None:
    """Episodes that differ by much, the same in every seed: drawn apart within each of many seeds, that would average away."""
    differences = np.array([[0.0, 1.0]] * 50)
    assert bootstrap_interval(differences, 2000, np.random.default_rng(0)) == (0, 1)


def test_missing_pairs_weigh_nothing() -> None:
    whole = np.array([[1.0, 2.0], [2.0, 3.5], [3.0, 5.0]])
    wide = np.full((4, 3), np.nan)
    wide[:3, 1:] = whole
    assert paired(wide) == paired(whole)
    assert bootstrap_interval(wide, 500, np.random.default_rng(0)) == bootstrap_interval(whole, 500, np.random.default_rng(0))
    whole[0, 0] = np.nan
    found = paired(whole)
    assert (found.num_pairs, found.mean) == (5, pytest.approx((2 + 2.75 + 4) / 3))
    low, high = bootstrap_interval(whole, 500, np.random.default_rng(0))
    assert 2 <= low < found.mean < high <= 5


def test_too_little_to_say_is_said_as_nan() -> None:
    nothing = paired(np.zeros((0, 0)))
    assert nothing.num_pairs == 0 and math.isnan(nothing.mean) and math.isnan(nothing.p) and math.isnan(nothing.interval()[0])
    assert all(map(math.isnan, bootstrap_interval(np.full((2, 2), np.nan), 200, np.random.default_rng(0))))
    one_seed = paired(np.array([[1.0, 2.0, 4.0]]))
    assert math.isnan(one_seed.p) and math.isnan(one_seed.effect_size) and one_seed.interval()[0] < 1
    single = paired(np.array([[1.0]]))
    assert single.mean == 1 and math.isnan(single.interval()[0]) and not single.same_everywhere


def test_equal_differences_are_no_proof() -> None:
    found = paired(np.full((3, 4), 0.1))
    assert found.same_everywhere and found.p == 0.25, "two of the eight ways to sign three seeds"
    assert math.isnan(found.effect_size)
    assert paired(np.zeros((5, 4))).p == 1 == paired(np.array([[1.0, -1.0], [1.0, -1.0]])).p


def test_effect_size_by_hand() -> None:
    # Mean 2, deviation 1, four degrees of freedom fewer by one: 1 - 3 / (4 * 2 - 1).
    assert effect_size(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 * (1 - 3 / 7))
    assert effect_size(-np.array([1.0, 2.0, 3.0])) == pytest.approx(-2 * (1 - 3 / 7))


def test_holm_by_a_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1; the last may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []
