"""Intervals and Markdown tables, for evaluations in envs/ and for experiments/.

Intervals are of 95 %. Episodes are the units that bootstraps resample; where there are several
runs, runs are drawn first and episodes within each; where methods are compared, their seeds. Every
bootstrap has a generator of its own, so the same figures give the same interval wherever they are
computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BOUNDS = (2.5, 97.5)  # percentiles
Centre = Callable[..., np.ndarray]  # of figures along an axis: np.mean, mean_or_iqm


# --- Intervals ------------------------------------------------------------------------------------


def draw_rows(count: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Which of `count` units each resample has: (resamples, count), with replacement."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, count, (resamples, count))


def percentiles(figures: np.ndarray) -> tuple[float, float]:
    """The interval that figures of resamples span."""
    low, high = np.percentile(figures, BOUNDS)
    return float(low), float(high)


def mean_interval(x: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Of the mean of x (E,); rows from draw_rows(E)."""
    means = x[rows].mean(1)
    return percentiles(means)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, rows: np.ndarray
) -> tuple[float, float]:
    """Of the ratio of two sums over units (E,); resamples whose denominator is 0 are left out."""
    above = numerator[rows].sum(1)
    below = denominator[rows].sum(1)
    kept = below > 0
    return percentiles(above[kept] / below[kept])


def accelerated_interval(
    x: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Of the mean of x (E,), corrected for bias and skewness (BCa); the mean itself, twice, where
    there is no spread."""
    if len(x) < 2 or x.std() == 0:
        mean = float(x.mean())
        return mean, mean
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    found = bootstrap((x,), np.mean, n_resamples=resamples, rng=rng)
    low, high = found.confidence_interval
    return float(low), float(high)


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Of the share hits / count (Wilson)."""
    from scipy.stats import binomtest

    test = binomtest(hits, count)
    low, high = test.proportion_ci(method="wilson")
    return float(low), float(high)


def clustered_interval(
    runs: Sequence[tuple[np.ndarray, np.ndarray]],
    resamples: int = 5000,
    seed: int = 1,
) -> tuple[float, float]:
    """Of the mean over runs of a ratio of sums, for numerators and denominators (E,) of each: runs
    are drawn, then episodes within each run that was drawn. Of one run: over its episodes."""
    rng = np.random.default_rng(seed)
    shape = (resamples, len(runs))
    drawn = rng.integers(0, len(runs), shape)
    ratios = np.empty(shape)
    for number, (numerator, denominator) in enumerate(runs):
        places = drawn == number  # where this run was drawn, each time with other episodes
        episodes = len(numerator)
        rows = rng.integers(0, episodes, (places.sum(), episodes))
        above = numerator[rows].sum(-1)
        below = denominator[rows].sum(-1)
        ratios[places] = above / below
    means = ratios.mean(1)
    return percentiles(means)


class Difference(NamedTuple):
    """Of two methods' centres over seeds."""

    mean: float  # of the first less that of the second
    low: float  # NaN, as high and p: a method has one seed, which has no spread
    high: float
    p: float  # two-sided: how often chance alone, seeds dealt anew, differs as much


def mean_or_iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The centre of seeds along an axis: from five seeds on the interquartile mean, a quarter of
    them left out at either end (of five one each), with fewer the mean."""
    if x.shape[axis] < 5:
        return x.mean(axis)
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(x, 0.25, axis))


def resampled_centres(
    x: np.ndarray, resamples: int, rng: np.random.Generator, centre: Centre = np.mean
) -> np.ndarray:
    """Of seeds x (S, ...), drawn anew from themselves: (resamples, ...)."""
    rows = rng.integers(0, len(x), (resamples, len(x)))
    return centre(x[rows], 1)


def seed_difference(
    x: np.ndarray, y: np.ndarray, resamples: int = 5000, seed: int = 1, centre: Centre = np.mean
) -> Difference:
    """Between figures x (S,) and y (R,) of runs with other seeds, which are drawn for each method
    by itself: equal seeds of two methods share nothing. The test, of means whatever the centre, is
    exact: all ways to deal the seeds are tried, so that three against three cannot get below .1."""
    mean = float(centre(x, 0) - centre(y, 0))
    if min(len(x), len(y)) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    from scipy.stats import permutation_test

    rng = np.random.default_rng(seed)
    ours = resampled_centres(x, resamples, rng, centre)
    theirs = resampled_centres(y, resamples, rng, centre)
    low, high = percentiles(ours - theirs)

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    test = permutation_test(
        (x, y),
        statistic,
        vectorized=True,
        n_resamples=200_000,
        rng=rng,
    )
    p = float(test.pvalue)
    return Difference(mean, low, high, p)


def seed_level(
    x: np.ndarray, resamples: int = 5000, seed: int = 1, centre: Centre = np.mean
) -> Difference:
    """Of figures x (S,) from 0; the test, of the mean, is exact: all signs are tried."""
    mean = float(centre(x, 0))
    if len(x) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    low, high = percentiles(resampled_centres(x, resamples, rng, centre))
    signs = np.array(list(itertools.product((1, -1), repeat=len(x))))  # (2^S, S)
    return Difference(mean, low, high, two_sided((signs * x).mean(1), x.mean()))


def two_sided(chances: np.ndarray, found: float) -> float:
    """How often one of all chances is at least as far out as what was found, either tail counted
    twice."""
    slack = 1e-9 * max(1.0, abs(found))
    above = np.mean(chances >= found - slack)
    below = np.mean(chances <= found + slack)
    return float(min(1.0, 2 * min(above, below)))


# --- Ranks ----------------------------------------------------------------------------------------

# {method: a world's figures (S, cells), all cells of one seed from one policy}
World = Mapping[str, np.ndarray]
DEALS = 2_000_000  # that an exact test of ranks tries; beyond, as many are drawn


def ranks(figures: np.ndarray) -> np.ndarray:
    """Of methods along the last axis but one, cell by cell: the largest is 1, equals share."""
    from scipy.stats import rankdata

    return rankdata(-figures, axis=-2)


def mean_ranks(worlds: Sequence[World], centre: Centre = mean_or_iqm) -> dict[str, float]:
    """Of every method, over the cells of all worlds."""
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
    """By how much the mean rank of `first` is ahead of that of `other`, among all methods. Seeds of
    each method in each world are drawn as clusters, with all their cells; the test, of ranks of
    means, deals the two methods' seeds anew, world by world, and leaves the others as they are."""
    means = mean_ranks(worlds, centre)
    mean = means[other] - means[first]
    if min(len(world[x]) for world in worlds for x in (first, other)) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    methods = list(worlds[0])
    ahead, cells = [], 0
    chances = np.zeros(1)
    for world in worlds:
        drawn = [resampled_centres(world[x], resamples, rng, centre) for x in methods]
        ahead.append(rank_sums(np.stack(drawn, 1), methods, first, other))
        cells += world[first].shape[1]
        dealt = rank_sums(deal(world, first, other), methods, first, other)
        chances = sums_of_both(chances, dealt, rng)
    low, high = percentiles(sum(ahead) / cells)
    plain = mean_ranks(worlds, np.mean)
    p = two_sided(chances / cells, plain[other] - plain[first])
    return Difference(mean, low, high, p)


def rank_sums(figures: np.ndarray, methods: list[str], first: str, other: str) -> np.ndarray:
    """Ranks of `other` less those of `first`, summed over cells: (D, methods, cells) -> (D,)."""
    found = ranks(figures)
    return (found[:, methods.index(other)] - found[:, methods.index(first)]).sum(1)


def deal(world: World, first: str, other: str) -> np.ndarray:
    """Every method's means (deals, methods, cells) for all ways to deal two methods' seeds."""
    both = np.concatenate([world[first], world[other]])
    count = len(world[first])
    chosen = np.array(list(itertools.combinations(range(len(both)), count)))
    rest = np.array([sorted({*range(len(both))} - {*row}) for row in chosen.tolist()])
    means = []
    for method, x in world.items():
        dealt = {first: both[chosen], other: both[rest]}.get(method, x[None])  # (deals or 1, S, C)
        means.append(np.broadcast_to(dealt.mean(1), (len(chosen), x.shape[1])))
    return np.stack(means, 1)


def sums_of_both(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of each of x with each of y; of DEALS pairs that are drawn where that would be more."""
    if len(x) * len(y) <= DEALS:
        return np.add.outer(x, y).ravel()
    return rng.choice(x, DEALS) + rng.choice(y, DEALS)


# --- Tables ---------------------------------------------------------------------------------------


def with_interval(row: Mapping[str, float], name: str, digits: int) -> str:
    """A cell, "1.23 [1.10, 1.36]", of a row with name, name_low and name_high."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_line(cells: Iterable[Any]) -> str:
    texts = map(str, cells)
    return f"| {' | '.join(texts)} |"


def aligned_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown that lines up in a terminal, too; the first line has the titles."""
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
    """Rows as Markdown, columns by their keys."""
    titles = list(rows[0])
    rules = ["---"] * len(titles)
    text = [table_line(titles), table_line(rules)]
    for row in rows:
        text.append(table_line(row.values()))
    return "\n".join(text) + "\n"
