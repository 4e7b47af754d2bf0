"""envs/statistics.py against SciPy's bootstrap and formulas for large samples."""

import itertools
import warnings

import numpy as np
import pytest
import scipy.stats

from envs.statistics import (
    accelerated_interval,
    aligned_table,
    draw_rows,
    markdown_table,
    mean_interval,
    mean_or_iqm,
    mean_ranks,
    percentiles,
    rank_difference,
    rank_sums,
    ranks,
    ratio_interval,
    resampled_centres,
    seed_difference,
    seed_level,
    share_interval,
    student_interval,
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


def test_tables():
    rows = [{"run": "a", "x": 1}, {"run": "b", "x": 2.5}]
    assert markdown_table(rows) == "| run | x |\n| --- | --- |\n| a | 1 |\n| b | 2.5 |\n"
    assert aligned_table([["who", "x"], ["a", "1.25"]]) == (
        "| who | x    |\n|-----|------|\n| a   | 1.25 |"
    )
    row = {"win": 0.5, "win_low": 0.25, "win_high": 0.75}
    assert with_interval(row, "win", digits=2) == "0.50 [0.25, 0.75]"


def test_difference_of_seeds():
    """Of interquartile means the interval is that of all resamples, of which there are 5^5 5^5; of
    means it is Welch's. The test, of means, counts deals."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, 5), rng.normal(0, 1, 5)
    found = seed_difference(x, y, centre=mean_or_iqm)
    assert found.mean == pytest.approx(mean_or_iqm(x) - mean_or_iqm(y))
    ours = mean_or_iqm(np.array(list(itertools.product(x, repeat=5))))
    theirs = mean_or_iqm(np.array(list(itertools.product(y, repeat=5))))
    low, high = np.percentile(np.subtract.outer(ours, theirs), (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1)
    means = seed_difference(x, y)
    assert means.mean == pytest.approx(x.mean() - y.mean()) and means.p == found.p
    assert (means.low, means.high) == student_interval(x, y)
    both = np.concatenate([x, y])
    deals = [set(deal) for deal in itertools.combinations(range(10), 5)]
    gaps = [both[list(deal)].mean() - both[list({*range(10)} - deal)].mean() for deal in deals]
    above, below = np.mean(np.array(gaps) >= gaps[0] - 1e-9), np.mean(np.array(gaps) <= gaps[0])
    assert found.p == pytest.approx(min(1, 2 * min(above, below)))
    assert seed_difference(x[:3] + 10, y[:3]).p == pytest.approx(0.1)


@pytest.mark.parametrize("seeds", [3, 4, 5, 8])
def test_equal_figures_are_no_evidence(seeds):
    """Arms with the same figures in another order: half of the deals lie above what was found or
    equal it, so p is 1. Their means differ by rounding, which must not count as a difference."""
    rng = np.random.default_rng(seeds)
    for _ in range(20 if seeds < 8 else 2):
        x = rng.normal(size=seeds)
        y = rng.permutation(x)
        assert seed_difference(x, y).p == 1.0
        assert seed_difference(x, y + 1e-3).p < 1.0


OF_TWO_ARMS = [(3, np.mean, 5), (5, np.mean, 8), (5, mean_or_iqm, 16)]


@pytest.mark.parametrize(("seeds", "centre", "errs"), OF_TWO_ARMS)
def test_few_seeds_decide_too_easily(seeds, centre, errs):
    """What docs/CLAIMS.md says: of two equal arms a bootstrap leaves 0 out one time in `errs`."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(600):
        x, y = rng.normal(size=(2, seeds))
        ours, theirs = (resampled_centres(z, 1000, rng, centre) for z in (x, y))
        low, high = percentiles(ours - theirs)
        hits += not low <= 0 <= high
    deviation = np.sqrt(600 * (1 - 1 / errs) / errs)
    assert abs(hits - 600 / errs) < 4 * deviation


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_students_intervals_leave_out_one_in_twenty(seeds):
    """Of two equal arms, and of one whose level is 0."""
    rng, apart, off = np.random.default_rng(0), 0, 0
    for _ in range(600):
        x, y = rng.normal(size=(2, seeds))
        low, high = student_interval(x, y)
        apart += not low <= 0 <= high
        low, high = student_interval(x)
        off += not low <= 0 <= high
    deviation = np.sqrt(600 * 0.05 * 0.95)
    assert apart < 30 + 3 * deviation  # Welch's is a little wide with few seeds
    assert abs(off - 30) < 4 * deviation


def test_the_middle_half_of_five_levels_decides_too_easily():
    """One time in nine: what docs/CLAIMS.md says of a single arm's level (M8)."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(600):
        found = percentiles(resampled_centres(rng.normal(size=5), 1000, rng, mean_or_iqm))
        hits += not found[0] <= 0 <= found[1]
    assert abs(hits - 600 / 9) < 4 * np.sqrt(600 * 8 / 81)


@pytest.mark.parametrize(("arms", "worlds", "rows", "errs"), [(6, 2, 5, 9), (4, 3, 3, 13)])
def test_ranks_of_three_seeds_decide_too_easily(arms, worlds, rows, errs):
    """What docs/CLAIMS.md says of B1-proxy and I1: of equal arms, rows of a seed alike by half."""
    rng, hits, names = np.random.default_rng(0), 0, [*map(str, range(arms))]
    for _ in range(300):
        total = 0
        for _ in range(worlds):
            figures = rng.normal(size=(arms, 3, 1)) + rng.normal(size=(arms, 3, rows))
            drawn = [resampled_centres(x, 500, rng, np.mean) for x in figures]
            total = total + rank_sums(np.stack(drawn, 1), names, "0", "1")
        low, high = percentiles(total / (worlds * rows))
        hits += not low <= 0 <= high
    deviation = np.sqrt(300 * (1 - 1 / errs) / errs)
    assert abs(hits - 300 / errs) < 3 * deviation


def test_students_interval():
    """Student's and Welch's by their formulas."""
    x, y = np.array([1.0, 4.0, 2.0]), np.array([7.0, 7.5, 9.0, 8.0, 6.5, 7.2])
    a, b = x.var(ddof=1) / 3, y.var(ddof=1) / 6
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 5)
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(a + b)
    middle = x.mean() - y.mean()
    assert student_interval(x, y) == pytest.approx((middle - half, middle + half))
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(a)
    assert student_interval(x) == pytest.approx((x.mean() - half, x.mean() + half))
    assert student_interval(x[:1] + np.zeros(3), y[:1] + np.zeros(2)) == (-6, -6)
    assert all(map(np.isnan, student_interval(x[:1], y)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = student_interval(np.full(3, 0.8), x)
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(a)  # the other one has no variance
    assert found == pytest.approx((0.8 - x.mean() - half, 0.8 - x.mean() + half))


def test_few_seeds_have_students_interval():
    """With three seeds or four, and where only one side has so few; centres are means then."""
    x, y = np.array([1.0, 4.0, 2.0]), np.array([7.0, 7.5, 9.0, 8.0, 6.5, 70.0])
    for a, b in (x, y[:4]), (x, y), (y, x):
        found = seed_difference(a, b, centre=mean_or_iqm)
        assert found.mean == pytest.approx(a.mean() - b.mean())
        assert (found.low, found.high) == student_interval(a, b)
    found = seed_level(x, centre=mean_or_iqm)
    assert (found.low, found.high) == student_interval(x)


def test_one_seed_has_no_spread():
    found = seed_difference(np.array([3.0]), np.array([1.0, 2.0]))
    assert found.mean == 1.5 and np.isnan([found.low, found.high, found.p]).all()


def test_the_middle_half_from_five_seeds_on():
    """As SciPy's trimmed mean; with fewer the mean."""
    x = np.random.default_rng(3).gamma(2.0, 3.0, (4, 9, 2))
    assert np.allclose(mean_or_iqm(x, 1), np.sort(x, 1)[:, 2:7].mean(1))
    assert np.allclose(mean_or_iqm(x, 0), x.mean(0))
    assert mean_or_iqm(np.array([9.0, -50.0, 1.0, 2.0, 3.0])) == 2.0
    five = seed_difference(np.array([0.0, 1.0, 2.0, 3.0, 90.0]), np.zeros(5), centre=mean_or_iqm)
    assert five.mean == 2.0 and five.high > 3
    assert five.p == seed_difference(np.array([0.0, 1.0, 2.0, 3.0, 90.0]), np.zeros(5)).p


def test_level_of_seeds():
    """Of the interquartile mean the interval is that of all 5^5 resamples, of the mean Student's;
    the test counts all signs."""
    x = np.array([0.5, 1.0, 1.5, -0.25, 0.75])
    found = seed_level(x, resamples=40_000, centre=mean_or_iqm)
    centres = mean_or_iqm(np.array(list(itertools.product(x, repeat=5))))
    assert (found.low, found.high) == pytest.approx(np.percentile(centres, (2.5, 97.5)), abs=0.03)
    assert seed_level(x)[:3] == (x.mean(), *student_interval(x))
    signed = np.array([np.dot(s, x) / 5 for s in itertools.product((1, -1), repeat=5)])
    assert found.p == pytest.approx(2 * np.mean(signed >= x.mean() - 1e-12))
    assert np.isnan(seed_level(x[:1]).p)
    unknown = np.append(x, np.nan)  # a seed of which nothing is known
    assert np.isnan(seed_level(unknown)).all() and np.isnan(seed_difference(unknown, x)).all()
    many = np.linspace(-0.5, 0.9, 25)  # 2^25 signs are too many; a t-test is near their test
    assert seed_level(many).p == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, rel=0.2)
    assert 0 < seed_level(many + 100).p < 1e-4


def test_drawn_deals_give_no_p_of_0():
    """Three worlds of 252 deals each are drawn; the deal that happened counts as one of them. It
    alone puts a before c and b behind d in all worlds."""
    rng = np.random.default_rng(2)
    levels = {"a": 10, "c": 9, "d": 1, "b": 0}
    worlds = [{x: y + 0.1 * rng.random((5, 2)) for x, y in levels.items()} for _ in range(3)]
    assert 0 < rank_difference(worlds, "a", "b", resamples=10).p < 1e-4


def test_deals_of_many_seeds_are_drawn(monkeypatch):
    """With so few deals that five seeds have too many, p is near that of all of them."""
    rng = np.random.default_rng(3)
    levels = {"a": 0.6, "b": 0.0, "c": 0.3}
    world = {x: y + rng.normal(0, 1, (5, 3)) for x, y in levels.items()}
    every = rank_difference([world], "a", "b", resamples=10)
    monkeypatch.setattr("envs.statistics.DEALS_OF_A_WORLD", 251)  # there are 252
    some = rank_difference([world], "a", "b", resamples=10)
    assert some.mean == every.mean and some.p != every.p
    assert some.p == pytest.approx(every.p, abs=0.15)  # 251 draws: a deviation of .06 at most


def by_enumeration(worlds, first, other):
    """Mean ranks' difference of figures {method: (cells,)}, by counting who is ahead."""
    total, cells = 0.0, 0
    for world in worlds:
        for cell in range(len(world[first])):
            place = {
                x: sum(y[cell] > own[cell] for y in world.values())
                + sum(y[cell] == own[cell] for y in world.values()) / 2
                for x, own in world.items()
            }
            total += place[other] - place[first]
            cells += 1
    return total / cells


def test_differences_of_mean_ranks():
    """Two worlds, three methods of two or three seeds: the effect, the interval of all resamples of
    seeds (with all their cells), the test of all deals, in loops."""
    rng = np.random.default_rng(4)
    sizes = ({"a": 2, "b": 2, "c": 2}, {"a": 3, "b": 2, "c": 2})
    worlds = [
        {x: rng.normal(0.7 * (x == "a"), 1, (count, cells)) for x, count in size.items()}
        for size, cells in zip(sizes, (2, 3))
    ]
    found = rank_difference(worlds, "a", "b", resamples=40_000)
    centres = [{x: y.mean(0) for x, y in world.items()} for world in worlds]
    assert found.mean == pytest.approx(by_enumeration(centres, "a", "b"))
    places = mean_ranks(worlds)
    assert sum(places.values()) == pytest.approx(6)
    assert places["b"] - places["a"] == pytest.approx(found.mean)

    def resamples(world):
        draws = [itertools.product(range(len(y)), repeat=len(y)) for y in world.values()]
        for rows in itertools.product(*draws):
            yield {x: y[list(r)].mean(0) for (x, y), r in zip(world.items(), rows)}

    each = [[(by_enumeration([y], "a", "b"), len(y["a"])) for y in resamples(x)] for x in worlds]
    sums = [(p * m + q * n) / (m + n) for (p, m), (q, n) in itertools.product(*each)]
    low, high = np.percentile(sums, (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.11)  # steps of .2

    def deals(world):
        both, count = np.concatenate([world["a"], world["b"]]), len(world["a"])
        for chosen in itertools.combinations(range(len(both)), count):
            rest = [k for k in range(len(both)) if k not in chosen]
            dealt = {"a": both[list(chosen)].mean(0), "b": both[rest].mean(0)}
            yield dealt | {"c": world["c"].mean(0)}

    chances = np.array(
        [by_enumeration(x, "a", "b") for x in itertools.product(*map(deals, worlds))]
    )
    tails = np.mean(chances >= found.mean - 1e-9), np.mean(chances <= found.mean + 1e-9)
    assert found.p == pytest.approx(min(1, 2 * min(tails)))


def test_equal_figures_share_a_rank():
    figures = np.array([[1.0, 2.0], [1.0, 3.0], [0.0, 1.0]])
    assert ranks(figures).tolist() == [[1.5, 2.0], [1.5, 1.0], [3.0, 3.0]]
    means = np.array([np.mean(x) for x in ([0.3, 0.1, 0.2], [0.2, 0.3, 0.1])])[:, None]
    assert means[0] != means[1] and ranks(means).tolist() == [[1.5], [1.5]]
    assert ranks(1e-9 * figures).tolist() == ranks(figures).tolist()


def test_ranks_tie_as_fractions_do():
    """Shares of 50 battles of three seeds: p by enumeration in exact arithmetic."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        won = {name: rng.integers(20, 26, (3, 2)) for name in "abc"}
        found = rank_difference([{name: x / 50 for name, x in won.items()}], "a", "b").p
        joint, third = np.concatenate([won["a"], won["b"]]), won["c"].sum(0)

        def behind(one, other, third):
            """Ranks of b less those of a, in twelfths."""
            totals = np.stack([one.sum(0), other.sum(0), third])
            place = scipy.stats.rankdata(-totals, axis=0)
            return round(12 * (place[1] - place[0]).mean())

        deals = []
        for chosen in itertools.combinations(range(6), 3):
            left = [k for k in range(6) if k not in chosen]
            deals.append(behind(joint[list(chosen)], joint[left], third))
        seen = behind(won["a"], won["b"], third)
        tail = min(np.mean(np.array(deals) >= seen), np.mean(np.array(deals) <= seen))
        assert found == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("unit", [1.0, 1e-11, 1e11])
def test_p_has_no_unit(unit):
    one, other = np.arange(5) + 10.0, np.arange(5) + 1.0
    assert seed_difference(unit * one, unit * other).p == pytest.approx(2 / 252)
