"""Intervals and Markdown tables, for evaluations in envs/ and for experiments/.

Intervals are of 95 %. Episodes are the units that bootstraps resample; where there are several
runs, runs are drawn first and episodes within each; where methods are compared, their seeds. Every
bootstrap has a generator of its own, so the same figures give the same interval wherever they are
computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BOUNDS = (2.5, 97.5)  # percentiles


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
    """Of two methods' means over seeds."""

    mean: float  # of the first less that of the second
    low: float  # NaN, as high and p: a method has one seed, which has no spread
    high: float
    p: float  # two-sided: how often chance alone, seeds dealt anew, differs as much


def resampled_means(x: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Of x (S,), drawn anew from itself: (resamples,)."""
    rows = rng.integers(0, len(x), (resamples, len(x)))
    return x[rows].mean(1)


def seed_difference(
    x: np.ndarray, y: np.ndarray, resamples: int = 5000, seed: int = 1
) -> Difference:
    """Between figures x (S,) and y (R,) of runs with other seeds, which are drawn for each method
    by itself: equal seeds of two methods share nothing. The test is exact: all ways to deal the
    seeds are tried, so that three against three cannot get below .1."""
    mean = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    from scipy.stats import permutation_test

    rng = np.random.default_rng(seed)
    ours = resampled_means(x, resamples, rng)
    theirs = resampled_means(y, resamples, rng)
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
