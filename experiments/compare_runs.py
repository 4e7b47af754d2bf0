"""Learning curves and final figures of several runs, side by side.

    python experiments/compare_runs.py runs/coins-* --out docs/data/coins

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
    groups = list(dict.fromkeys(map(group_of, curves)))
    for axis, name in zip(axes[0], names, strict=True):
        for number, group in enumerate(groups):
            members = [curves[run][name] for run in curves if group_of(run) == group]
            members = [points for points in members if points]
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
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("thousand environment steps")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def final_table(runs: tuple[Path, ...], rows: tuple[str, ...]) -> str:
    """Markdown, a line per run and co-player."""

    def cell(row: dict[str, float], name: str) -> str:
        return f"{row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"

    lines = [
        "| run | co-player | return per 1,000 steps | per episode | pick-ups per 1,000 steps |"
        " episodes |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        if not (run / "summary.json").exists():
            continue  # not finished
        results = json.loads((run / "summary.json").read_text())["eval"]
        for name in rows or results:
            if row := results.get(name):
                cells = (cell(row, x) for x in ("return_per_1000", "return", "pick_ups_per_1000"))
                lines.append(f"| {run.name} | {name} | {' | '.join(cells)} | {row['episodes']} |")
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
    table = final_table(study.runs, study.rows)
    if study.means:
        table += "\n" + means_table(study.runs, study.means)
    study.out.with_name(f"{study.out.name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Comparison))
