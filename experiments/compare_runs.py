"""Learning curves and final figures of several runs, side by side.

    python experiments/compare_runs.py runs/coins-* --out docs/data/coins
    python experiments/compare_runs.py runs/resource-* --curves return/6 return/12 --by-seed

A run's name is its directory's; names that end in -s1, -s2, ... are seeds of one group, which gets
one colour: a thin line per seed and a thick one for their mean. Writes OUT.png (curves), OUT.csv
(the curves' points) and OUT.md (each run's final evaluation, one line per run and co-player, with
95 % bootstrap intervals over episodes; with --means a second table, of scalars averaged over all
iterations that logged them). Curves are means over windows of --every environment steps.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What to read and to write."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories
    out: Path = Path("comparison")  # writes OUT.png, OUT.csv and OUT.md
    curves: tuple[str, ...] = (
        "episode/return",
        "episode/pick_ups_per_1000",
        "entropy",
    )  # scalars to draw
    every: int = 20_000  # environment steps that make one point
    means: tuple[str, ...] = ()  # scalars for the second table
    rows: tuple[str, ...] = ()  # co-players in OUT.md, as in a run's table; default: all
    by_seed: bool = False  # in OUT.md a column per group, with its seeds, instead of a line per run


def read_curves(run: Path, names: tuple[str, ...], every: int) -> dict[str, list[tuple]]:
    """{scalar: [(environment steps at the window's end, mean in the window), ...]}."""
    windows, last = defaultdict(lambda: defaultdict(list)), 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        last = scalars["timesteps"]
        for name in names:
            if name in scalars:
                windows[name][-(-scalars["timesteps"] // every) * every].append(scalars[name])
    return {  # a window that the run has not filled makes no point
        name: [(end, float(np.mean(x))) for end, x in sorted(points.items()) if end <= last]
        for name, points in windows.items()
    }


def group_of(run: Path) -> str:
    """The run's name without its seed."""
    return re.sub(r"-s\d+$", "", run.name)


def draw(curves: dict[Path, dict[str, list[tuple]]], names: tuple[str, ...], path: Path) -> None:
    """A panel per scalar."""
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False)
    groups, shown = list(dict.fromkeys(map(group_of, curves))), set()
    for axis, name in zip(axes[0], names, strict=True):
        for number, group in enumerate(groups):
            members = [curves[run][name] for run in curves if group_of(run) == group]
            members = [points for points in members if points]
            if not members:
                continue
            colour = f"C{number}"
            for points in members:
                ends, values = np.array(points).T
                axis.plot(ends / 1000, values, color=colour, alpha=0.35, linewidth=0.8)
            means = defaultdict(list)
            for points in members:
                for end, value in points:
                    means[end].append(value)
            ends = sorted(end for end, values in means.items() if len(values) == len(members))
            label = f"{group} ({len(members)})"
            mean = [np.mean(means[end]) for end in ends]
            axis.plot(np.array(ends) / 1000, mean, color=colour, label=label)
        handles, labels = axis.get_legend_handles_labels()
        if not shown.issuperset(labels):  # where a curve first comes up
            axis.legend(handles, labels, fontsize=8)
        shown |= {*labels}
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("thousand environment steps")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


MELTINGPOT = {
    "return_per_1000": "return per 1,000 steps",
    "return": "per episode",
    "pick_ups_per_1000": "pick-ups per 1,000 steps",
}


def read_results(run: Path, rows: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The final evaluation's rows; empty if the run has not finished."""
    path = run / "summary.json"
    results = json.loads(path.read_text())["eval"] if path.exists() else {}
    return {name: results[name] for name in rows or results if name in results}


def columns_of(row: dict[str, float]) -> dict[str, str]:
    """The figures of a row that have an interval, with their titles."""
    if "return_per_1000" in row:
        return MELTINGPOT
    return {name: name.replace("_", " of ", 1) for name in row if f"{name}_low" in row}


def final_table(runs: tuple[Path, ...], rows: tuple[str, ...]) -> str:
    """Markdown, a line per run and co-player (particle worlds: population and player)."""

    def cell(row: dict[str, float], name: str) -> str:
        digits = 1 if "return_per_1000" in row else 2
        numbers = (f"{row[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
        return "{} [{}, {}]".format(*numbers)

    lines = []
    for run in runs:
        for name, row in read_results(run, rows).items():
            titles = columns_of(row)
            if not lines:
                first = "co-player" if titles is MELTINGPOT else "population, player"
                lines.append(f"| run | {first} | {' | '.join(titles.values())} | episodes |")
                lines.append("|---" * (len(titles) + 3) + "|")
            cells = (cell(row, x) for x in titles)
            lines.append(f"| {run.name} | {name} | {' | '.join(cells)} | {row['episodes']} |")
    return "\n".join(lines) + "\n"


def seeds_table(runs: tuple[Path, ...], rows: tuple[str, ...]) -> str:
    """Markdown, a line per row of the evaluations, a column per group and figure: the mean over
    seeds and, in brackets, each seed's."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for name, row in read_results(run, rows).items():
            name = re.sub(r"best z=.*", "best z", name)  # seeds may have chosen others
            for figure, title in columns_of(row).items():
                column = f"{group_of(run)}, {title}"
                found[name][column].append(row[figure])
    columns = list(dict.fromkeys(c for row in found.values() for c in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = []
        for column in columns:
            x = row[column]
            each = ", ".join(f"{value:.2f}" for value in x)
            cells.append(f"{np.mean(x):.2f} ({each})" if x else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def means_table(runs: tuple[Path, ...], names: tuple[str, ...]) -> str:
    """Markdown, a line per run."""
    lines = [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run in runs:
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        values = [[scalars[name] for scalars in log if name in scalars] for name in names]
        cells = (f"{np.mean(x):.3g}" if x else "" for x in values)
        lines.append(f"| {run.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(study: Comparison) -> None:
    """Read all runs, then write the three files."""
    study.out.parent.mkdir(parents=True, exist_ok=True)
    curves = {
        run: defaultdict(list, read_curves(run, study.curves, study.every)) for run in study.runs
    }
    draw(curves, study.curves, study.out.with_name(f"{study.out.name}.png"))
    with study.out.with_name(f"{study.out.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "scalar", "timesteps", "mean"])
        for run, named in curves.items():
            for name in study.curves:
                writer.writerows([run.name, name, end, f"{x:.5g}"] for end, x in named[name])
    table = (seeds_table if study.by_seed else final_table)(study.runs, study.rows)
    if study.means:
        table += "\n" + means_table(study.runs, study.means)
    study.out.with_name(f"{study.out.name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Comparison))
