"""Intervals and Markdown tables, for evaluations in envs/ and for experiments/.

All intervals are 95 % intervals (low, high). Of one run they are bootstraps over its episodes, of
shares of battles won Wilson's. Over seeds, intervals of means are Student's, those of interquartile
means bootstraps of five seeds or more. Every bootstrap has its own generator with a fixed seed, so
the same figures in the same order give the same interval everywhere.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BOUNDS = (2.5, 97.5)  # percentiles at the ends of an interval
FEW = 5  # with fewer seeds than this, centres over seeds are means, their intervals Student's
DEALT = 200_000  # an exact test of a difference tries at most this many deals; of more, so many
Centre = Callable[..., np.ndarray]  # (figures, axis) -> their centre: np.mean or mean_or_iqm


# --- Intervals ------------------------------------------------------------------------------------


def draw_rows(count: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Indices (resamples, count) of the units in each bootstrap resample of `count` units."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, count, (resamples, count))


def percentiles(figures: np.ndarray) -> tuple[float, float]:
    """The bootstrap interval of a statistic from its values (resamples,) in all resamples."""
    low, high = np.percentile(figures, BOUNDS)
    return float(low), float(high)


def mean_interval(x: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of x (E,); rows: draw_rows(len(x))."""
    means = x[rows].mean(1)
    return percentiles(means)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, rows: np.ndarray
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerator) / sum(denominator), both (E,); rows:
    draw_rows(E). Resamples whose denominator is 0 are left out."""
    above = numerator[rows].sum(1)
    below = denominator[rows].sum(1)
    kept = below > 0
    return percentiles(above[kept] / below[kept])


def accelerated_interval(
    x: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean of x (E,), corrected for bias and skewness (BCa); (mean, mean)
    if x has fewer than two values or no spread."""
    if len(x) < 2 or x.std() == 0:
        mean = float(x.mean())
        return mean, mean
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    found = bootstrap((x,), np.mean, n_resamples=resamples, rng=rng)
    low, high = found.confidence_interval
    return float(low), float(high)


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson interval of the share hits / count."""
    from scipy.stats import binomtest

    test = binomtest(hits, count)
    low, high = test.proportion_ci(method="wilson")
    return float(low), float(high)


class Difference(NamedTuple):
    """The difference of two methods' centres over seeds, with its interval and a test."""

    mean: float  # centre of the first method less that of the second
    low: float  # of the interval; low, high and p are NaN if a method has one seed or a NaN
    high: float
    p: float  # two-sided p-value of a permutation test: seeds dealt to the methods at random


def mean_or_iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean along `axis` (seeds), from five seeds on the interquartile mean: without the highest
    and the lowest quarter of the seeds, each rounded down (of five seeds one each)."""
    if x.shape[axis] < FEW:
        return x.mean(axis)
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(x, 0.25, axis))


def student_interval(x: np.ndarray, y: np.ndarray | None = None) -> tuple[float, float]:
    """Interval of the mean of x (S,), or of how much it exceeds that of y (R,): Student's, for two
    Welch's. NaN if x or y has one value only; of no width if neither has any spread."""
    samples = [x] if y is None else [x, y]
    if min(map(len, samples)) < 2:
        return math.nan, math.nan
    if not any(np.ptp(sample) for sample in samples):
        middle = float(x[0] - (0.0 if y is None else y[0]))
        return middle, middle
    from scipy.stats import ttest_1samp, ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a sample that is all alike
        test = ttest_1samp(x, 0.0) if y is None else ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval()
    return float(low), float(high)


def resampled_centres(
    x: np.ndarray, resamples: int, rng: np.random.Generator, centre: Centre = np.mean
) -> np.ndarray:
    """Centres (resamples, ...) of bootstrap resamples of the seeds in x (S, ...)."""
    rows = rng.integers(0, len(x), (resamples, len(x)))
    return centre(x[rows], 1)


def seed_difference(
    x: np.ndarray, y: np.ndarray, resamples: int = 5000, seed: int = 1, centre: Centre = np.mean
) -> Difference:
    """Difference of two methods with figures x (S,) and y (R,), one per seed. Equal seeds share no
    training, though in particle worlds they share the worlds of the final evaluation, which makes
    intervals too wide there. With fewer than FEW in one of them the centre is the mean. The
    interval of means is Student's (Welch's): with five seeds an arm a bootstrap of means leaves 0
    out in one of eight comparisons of equal arms. Else it is a bootstrap that draws seeds for each
    method by itself. The test, of means for any centre, tries all ways to deal the seeds (200,000
    if there are more): p is at least .1 for 3 + 3 seeds."""
    if min(len(x), len(y)) < FEW:
        centre = np.mean
    mean = float(centre(x, 0) - centre(y, 0))
    if min(len(x), len(y)) < 2 or math.isnan(mean):
        return Difference(mean, math.nan, math.nan, math.nan)
    from scipy.stats import permutation_test

    rng = np.random.default_rng(seed)
    if centre is np.mean:
        low, high = student_interval(x, y)
    else:
        ours = resampled_centres(x, resamples, rng, centre)
        theirs = resampled_centres(y, resamples, rng, centre)
        low, high = percentiles(ours - theirs)

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    test = permutation_test(
        (x, y),
        statistic,
        vectorized=True,
        n_resamples=DEALT,
        rng=rng,
    )
    # Not scipy's own p: it misses deals that equal what was found but for rounding, if that is 0.
    drawn = math.comb(len(x) + len(y), len(x)) > DEALT
    p = two_sided(test.null_distribution, test.statistic, drawn)
    return Difference(mean, low, high, p)


def seed_level(
    x: np.ndarray, resamples: int = 5000, seed: int = 1, centre: Centre = np.mean
) -> Difference:
    """Difference of figures x (S,), one per seed, from 0; the interval as in seed_difference(). The
    test of the mean tries all signs, of more than 16 seeds 65,536 draws of them."""
    mean = float(centre(x, 0))
    if len(x) < 2 or math.isnan(mean):
        return Difference(mean, math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    if len(x) < FEW or centre is np.mean:
        low, high = student_interval(x)
    else:
        low, high = percentiles(resampled_centres(x, resamples, rng, centre))
    drawn = len(x) > 16
    if drawn:
        signs = rng.choice((1, -1), (2**16, len(x)))
    else:
        signs = np.array(list(itertools.product((1, -1), repeat=len(x))))  # (2^S, S)
    return Difference(mean, low, high, two_sided((signs * x).mean(1), x.mean(), drawn))


def two_sided(chances: np.ndarray, found: float, drawn: bool) -> float:
    """Two-sided p-value of `found` among `chances` (n,): twice the smaller tail, at most 1. If they
    are drawn and not all there are, `found` counts as one more of them, so that p is never 0."""
    slack = 1e-9 * max(abs(found), np.abs(chances).max())  # equal but for rounding
    above = np.sum(chances >= found - slack)
    below = np.sum(chances <= found + slack)
    tail = (min(above, below) + drawn) / (len(chances) + drawn)
    return float(min(1.0, 2 * tail))


# --- Ranks ----------------------------------------------------------------------------------------

# {method: figures (S, cells) of one world}; a row has all cells of one seed's policy
World = Mapping[str, np.ndarray]
DEALS = 2_000_000  # an exact test of ranks tries at most this many; of more, so many are drawn
DEALS_OF_A_WORLD = 200_000  # the same in one world: up to ten seeds against ten are tried


def ranks(figures: np.ndarray) -> np.ndarray:
    """Ranks, cell by cell, of figures (..., methods, cells): 1 is the largest, ties share one."""
    from scipy.stats import rankdata

    # Means of the same numbers in another order are equal but for rounding: a tie.
    largest = np.abs(figures).max(-2, keepdims=True)
    shares = figures / np.where(largest > 0, largest, 1.0)
    return rankdata(-shares.round(10), axis=-2)


def mean_ranks(worlds: Sequence[World], centre: Centre = mean_or_iqm) -> dict[str, float]:
    """{method: mean of its ranks over the cells of all worlds}; the methods are worlds[0]'s."""
    methods = list(worlds[0])
    found = [ranks(np.stack([centre(world[x], 0) for x in methods])) for world in worlds]
    means = np.concatenate(found, 1).mean(1)
    return dict(zip(methods, means.tolist(), strict=True))


def rank_difference(
    worlds: Sequence[World],
    first: str,
    other: str,
    resamples: int = 5000,
    seed: int = 1,
    centre: Centre = mean_or_iqm,
) -> Difference:
    """Mean rank of `other` less that of `first`, among all methods: positive if `first` is better.
    The bootstrap draws each method's seeds in each world, a seed with all its cells. The test is of
    ranks of means; in each world it deals the two methods' seeds anew and leaves other methods."""
    means = mean_ranks(worlds, centre)
    mean = means[other] - means[first]
    if min(len(world[x]) for world in worlds for x in (first, other)) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    methods = list(worlds[0])
    ahead, cells = [], 0
    chances, drawn_deals = np.zeros(1), False
    for world in worlds:
        drawn = [resampled_centres(world[x], resamples, rng, centre) for x in methods]
        ahead.append(rank_sums(np.stack(drawn, 1), methods, first, other))
        cells += world[first].shape[1]
        dealt = rank_sums(deal(world, first, other, rng), methods, first, other)
        drawn_deals |= len(chances) * len(dealt) > DEALS or len(dealt) == DEALS_OF_A_WORLD
        chances = sums_of_both(chances, dealt, rng)
    low, high = percentiles(sum(ahead) / cells)
    plain = mean_ranks(worlds, np.mean)
    p = two_sided(chances / cells, plain[other] - plain[first], drawn_deals)
    return Difference(mean, low, high, p)


def rank_sums(figures: np.ndarray, methods: list[str], first: str, other: str) -> np.ndarray:
    """Ranks of `other` less those of `first`, summed over cells: (D, methods, cells) -> (D,)."""
    found = ranks(figures)
    return (found[:, methods.index(other)] - found[:, methods.index(first)]).sum(1)


def deal(world: World, first: str, other: str, rng: np.random.Generator) -> np.ndarray:
    """Means over seeds (deals, methods, cells) for all ways to deal the seeds of two methods, or
    for DEALS_OF_A_WORLD that are drawn, where there are more."""
    both = np.concatenate([world[first], world[other]])
    count = len(world[first])
    if math.comb(len(both), count) <= DEALS_OF_A_WORLD:
        chosen = np.array(list(itertools.combinations(range(len(both)), count)))
    else:
        chosen = rng.random((DEALS_OF_A_WORLD, len(both))).argsort(1)[:, :count]
    others = np.ones((len(chosen), len(both)), dtype=bool)
    np.put_along_axis(others, chosen, False, axis=1)
    rest = np.nonzero(others)[1].reshape(len(chosen), -1)
    means = []
    for method, x in world.items():
        dealt = {first: both[chosen], other: both[rest]}.get(method, x[None])  # (deals or 1, S, C)
        means.append(np.broadcast_to(dealt.mean(1), (len(chosen), x.shape[1])))
    return np.stack(means, 1)


def sums_of_both(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sums of all pairs of x (n,) and y (m,): (n m,); of DEALS random pairs if n m is larger."""
    if len(x) * len(y) <= DEALS:
        return np.add.outer(x, y).ravel()
    return rng.choice(x, DEALS) + rng.choice(y, DEALS)


# --- Tables ---------------------------------------------------------------------------------------


def with_interval(row: Mapping[str, float], name: str, digits: int) -> str:
    """A cell, "1.23 [1.10, 1.36]", from row[name], row[f"{name}_low"] and row[f"{name}_high"]."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_line(cells: Iterable[Any]) -> str:
    texts = map(str, cells)
    return f"| {' | '.join(texts)} |"


def aligned_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal, too; lines[0] has the titles."""
    columns = zip(*lines, strict=True)
    widths = [max(map(len, column)) for column in columns]
    text = []
    for line in lines:
        cells = zip(line, widths)
        padded = [cell.ljust(width) for cell, width in cells]
        text.append(table_line(padded))
    rules = ["-" * (width + 2) for width in widths]
    text.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join(text)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows; the keys of the first row are the titles."""
    titles = list(rows[0])
    rules = ["---"] * len(titles)
    text = [table_line(titles), table_line(rules)]
    for row in rows:
        text.append(table_line(row.values()))
    return "\n".join(text) + "\n"
