"""envs/statistics.py against SciPy's bootstrap and formulas for large samples."""

import itertools

import numpy as np
import pytest
import scipy.stats

from envs.statistics import (
    accelerated_interval,
    aligned_table,
    clustered_interval,
    draw_rows,
    markdown_table,
    mean_interval,
    ratio_interval,
    seed_difference,
    share_interval,
    with_interval,
)

pytestmark = pytest.mark.numeric

X = np.random.default_rng(7).gamma(2.0, 3.0, 60)  # skewed


def scipy_interval(data, statistic, **options):
    options = {"n_resamples": 20_000, "paired": True, "vectorized": True, **options}
    rng = np.random.default_rng(5)
    found = scipy.stats.bootstrap(data, statistic, rng=rng, **options)
    return tuple(found.confidence_interval)


def test_intervals_of_means_and_ratios():
    """As SciPy's percentile bootstrap, but for the draws."""
    rows = draw_rows(len(X), resamples=20_000, seed=3)
    theirs = scipy_interval((X,), np.mean, method="percentile")
    assert mean_interval(X, rows) == pytest.approx(theirs, rel=0.01)
    below = np.random.default_rng(8).integers(100, 900, len(X))

    def ratio(above, below, axis):
        return above.sum(axis) / below.sum(axis)

    theirs = scipy_interval((X, below), ratio, method="percentile")
    assert ratio_interval(X, below, rows) == pytest.approx(theirs, rel=0.01)
    low, high = ratio_interval(X[:2], np.array([0, 1]), draw_rows(2))
    assert np.isfinite([low, high]).all()  # resamples without a denominator are left out


def test_accelerated_intervals_are_scipys():
    rng = np.random.default_rng(0)
    theirs = scipy.stats.bootstrap((X,), np.mean, n_resamples=2000, rng=rng).confidence_interval
    assert accelerated_interval(X) == tuple(map(float, theirs))
    assert accelerated_interval(np.ones(5)) == accelerated_interval(np.ones(1)) == (1.0, 1.0)


def test_intervals_of_shares():
    """Wilson's, from its formula."""
    hits, n, z = 7, 40, scipy.stats.norm.ppf(0.975)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert share_interval(hits, n) == pytest.approx((centre - half, centre + half))


def test_clustered_intervals_count_runs():
    """As wide as the deviation between runs says, however many episodes they have."""
    rng = np.random.default_rng(1)
    levels = rng.normal(size=30)
    runs = [(x + 0.01 * rng.normal(size=200), np.ones(200)) for x in levels]
    low, high = clustered_interval(runs)
    half = 1.96 * levels.std() / np.sqrt(30)
    assert (low, high) == pytest.approx((levels.mean() - half, levels.mean() + half), abs=0.1)
    assert clustered_interval(runs) == (low, high)  # a generator of its own


def test_tables():
    rows = [{"run": "a", "x": 1}, {"run": "b", "x": 2.5}]
    assert markdown_table(rows) == "| run | x |\n| --- | --- |\n| a | 1 |\n| b | 2.5 |\n"
    assert aligned_table([["who", "x"], ["a", "1.25"]]) == (
        "| who | x    |\n|-----|------|\n| a   | 1.25 |"
    )
    row = {"win": 0.5, "win_low": 0.25, "win_high": 0.75}
    assert with_interval(row, "win", digits=2) == "0.50 [0.25, 0.75]"


def test_difference_of_seeds():
    """The interval is that of all resamples, of which there are 3^3 4^4; the test counts deals."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, 3), rng.normal(0, 1, 4)
    found = seed_difference(x, y)
    assert found.mean == pytest.approx(x.mean() - y.mean())
    ours = [np.mean(draw) for draw in itertools.product(x, repeat=3)]
    theirs = [np.mean(draw) for draw in itertools.product(y, repeat=4)]
    low, high = np.percentile(np.subtract.outer(ours, theirs), (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1)
    both = np.concatenate([x, y])
    deals = [set(deal) for deal in itertools.combinations(range(7), 3)]
    gaps = [both[list(deal)].mean() - both[list({*range(7)} - deal)].mean() for deal in deals]
    above, below = np.mean(np.array(gaps) >= gaps[0] - 1e-9), np.mean(np.array(gaps) <= gaps[0])
    assert found.p == pytest.approx(min(1, 2 * min(above, below)))
    assert seed_difference(x + 10, y[:3]).p == pytest.approx(0.1)


def test_one_seed_has_no_spread():
    found = seed_difference(np.array([3.0]), np.array([1.0, 2.0]))
    assert found.mean == 1.5 and np.isnan([found.low, found.high, found.p]).all()
