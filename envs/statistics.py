"""Intervals and Markdown tables, for evaluations in envs/ and for experiments/.

Intervals are of 95 %. Episodes are the units that bootstraps resample; where there are several
runs, runs are drawn first and episodes within each; where methods are compared, their seeds. Every
bootstrap has a generator of its own, so the same figures give the same interval wherever they are
computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BOUNDS = (2.5, 97.5)  # percentiles


# --- Intervals ------------------------------------------------------------------------------------


def draw_rows(count: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Which of `count` units each resample has: (resamples, count), with replacement."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def percentiles(figures: np.ndarray) -> tuple[float, float]:
    """The interval that figures of resamples span."""
    low, high = np.percentile(figures, BOUNDS)
    return float(low), float(high)


def mean_interval(x: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Of the mean of x (E,); rows from draw_rows(E)."""
    return percentiles(x[rows].mean(1))


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, rows: np.ndarray
) -> tuple[float, float]:
    """Of the ratio of two sums over units (E,); resamples whose denominator is 0 are left out."""
    above, below = numerator[rows].sum(1), denominator[rows].sum(1)
    return percentiles(above[below > 0] / below[below > 0])


def accelerated_interval(
    x: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Of the mean of x (E,), corrected for bias and skewness (BCa); the mean itself, twice, where
    there is no spread."""
    if len(x) < 2 or x.std() == 0:
        return float(x.mean()), float(x.mean())
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    found = bootstrap((x,), np.mean, n_resamples=resamples, rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Of the share hits / count (Wilson)."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, count).proportion_ci(method="wilson")
    return float(low), float(high)


def clustered_interval(
    runs: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 5000, seed: int = 1
) -> tuple[float, float]:
    """Of the mean over runs of a ratio of sums, for numerators and denominators (E,) of each: runs
    are drawn, then episodes within each run that was drawn. Of one run: over its episodes."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(runs), (resamples, len(runs)))
    figures = np.empty(drawn.shape)
    for number, (above, below) in enumerate(runs):
        places = drawn == number  # where this run was drawn, each time with other episodes
        rows = rng.integers(0, len(above), (places.sum(), len(above)))
        figures[places] = above[rows].sum(-1) / below[rows].sum(-1)
    return percentiles(figures.mean(1))


class Difference(NamedTuple):
    """Of two methods' means over seeds."""

    mean: float  # of the first less that of the second
    low: float  # NaN, as high and p: a method has one seed, which has no spread
    high: float
    p: float  # two-sided: how often chance alone, seeds dealt anew, differs as much


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
    ours = x[rng.integers(0, len(x), (resamples, len(x)))].mean(1)
    theirs = y[rng.integers(0, len(y), (resamples, len(y)))].mean(1)
    low, high = percentiles(ours - theirs)

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    test = permutation_test((x, y), statistic, vectorized=True, n_resamples=200_000, rng=rng)
    return Difference(mean, low, high, float(test.pvalue))


# --- Tables ---------------------------------------------------------------------------------------


def with_interval(row: Mapping[str, float], name: str, digits: int) -> str:
    """A cell, "1.23 [1.10, 1.36]", of a row with name, name_low and name_high."""
    value, low, high = (f"{row[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def aligned_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown that lines up in a terminal, too; the first line has the titles."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    text = [f"| {' | '.join(cells)} |" for cells in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown, columns by their keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
