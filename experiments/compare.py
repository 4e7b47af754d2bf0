"""Learning curves and final figures of several runs, side by side.

    python experiments/compare.py runs/coins-* --out docs/data/coins
    python experiments/compare.py runs/resource-* --curves return/6 return/12 --by-seed
    python experiments/compare.py docs/data/study_treasure.csv --only "*-mra-*" --by-seed
    python experiments/compare.py runs/mine-s* runs/parent-s* --against parent

Reads run directories and studies (runs.py). A run is named after its directory; names that differ
only in their ending -s1, -s2, ... are seeds of one group; runs of other scripts, worlds, flags or
lengths, or of one seed, are refused there. Writes OUT.png (learning curves, a colour per group: a
thin line per seed, a thick one for their mean), OUT.csv (the curves' points), OUT.md (final
evaluations with 95 % intervals over episodes, as envs/statistics.py makes them; --means, --last,
--against: more tables). A group's figure is the mean over its seeds, however many (claims.py:
interquartile from five on).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

from harness import Count, UsageError, as_flag

import numpy as np

from envs.particle.episodes import scripted_players
from envs.particle.worlds import TASKS
from envs.smac.worlds import playing
from envs.statistics import aligned_table, seed_difference, with_interval
from experiments.plots import plt
from experiments.runs import (
    POINTS,
    Run,
    Runs,
    as_words,
    check_groups,
    check_out,
    differ,
    finish,
    free_flags,
    grouped,
    load_script,
    name_in_world,
    paths_of,
    read_runs,
    rules_of,
    run_command,
    without_seed,
)
from experiments.scenario_table import span


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Options of this command."""

    runs: Runs  # run directories and packed studies to read
    only: tuple[str, ...] = ()  # keep runs whose names match these shell patterns, in this order
    out: Path = Path("comparison")  # common beginning of the three files' names
    curves: tuple[str, ...] = ()  # names of logged scalars to draw; default: those of USUAL
    every: Count = 0  # environment steps per point of a curve; 0: 20,000, in short runs a tenth
    means: tuple[str, ...] = ()  # add a table: these scalars' means over all iterations of a run
    last: Count = 0  # add a table: means of --curves over so many steps at the end of training
    rows: tuple[str, ...] = ()  # rows of the final evaluation to show in OUT.md; default: all
    against: str = ""  # add a table: other groups minus this one, with intervals over seeds
    by_seed: bool = False  # final evaluations: a column per group instead of a line per run


USUAL = ("episode/return", "episode/pick_ups_per_1000", "return", "win", "entropy")
Curve = list[tuple[int, float]]  # (environment steps at a window's end, mean in the window)


def read_curves(run: Run, names: tuple[str, ...], every: int) -> dict[str, Curve]:
    """{scalar: curve} of one run. A last window that the run has not completed is left out."""
    curves: dict[str, Curve] = {}
    for name in names:
        windows: dict[int, list[float]] = defaultdict(list)
        for scalars in run.log:
            if name in scalars:
                windows[-(-scalars["timesteps"] // every) * every].append(scalars[name])
        ends = [end for end in sorted(windows) if end <= run.steps]
        curves[name] = [(end, float(np.mean(windows[end]))) for end in ends]
    return curves


def mean_curve(curves: list[Curve]) -> Curve:
    """The mean of several runs' curves, at the steps where every run has a point."""
    found: dict[int, list[float]] = defaultdict(list)
    for end, value in (point for curve in curves for point in curve):
        found[end].append(value)
    ends = sorted(end for end, values in found.items() if len(values) == len(curves))
    return [(end, float(np.mean(found[end]))) for end in ends]


def draw_curve(axis: Any, curve: Curve, **style: Any) -> None:
    ends = np.array([end for end, _ in curve])
    axis.plot(ends / 1000, [value for _, value in curve], **style)


def draw(curves: dict[str, dict[str, Curve]], names: tuple[str, ...]) -> Any:
    """A figure with a panel per scalar; `curves` is {run: {scalar: curve}}."""
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False)
    groups: dict[str, list[str]] = defaultdict(list)
    for run in curves:
        groups[without_seed(run)].append(run)
    shown: set[str] = set()
    for axis, name in zip(axes[0], names, strict=True):
        for number, (group, runs) in enumerate(groups.items()):
            members = [curves[run][name] for run in runs if curves[run][name]]
            if not members:
                continue
            for curve in members:
                draw_curve(axis, curve, color=f"C{number}", alpha=0.35, linewidth=0.8)
            label = f"{group} ({len(members)})"
            draw_curve(axis, mean_curve(members), color=f"C{number}", label=label)
        handles, labels = axis.get_legend_handles_labels()
        if not shown.issuperset(labels):  # a panel repeats no legend that others have shown
            axis.legend(handles, labels, fontsize=8)
        shown |= {*labels}
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("thousand environment steps")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


MELTINGPOT = {
    "return_per_1000": "return per 1,000 steps",
    "return": "per episode",
    "pick_ups_per_1000": "pick-ups per 1,000 steps",
}


def results_of(run: Run, rows: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The final evaluation as {row: {figure: value}}, empty before the end; `rows` selects some."""
    results = run.summary["eval"]
    return {name: results[name] for name in rows or results if name in results}


def row_in_all(name: str) -> str:
    """The name of a row for all seeds: in MRA's "best z=1" each seed has a best z of its own."""
    return re.sub(r"best z=.*", "best z", name)


def columns_of(row: dict[str, float]) -> dict[str, str]:
    """{figure: column title} for the figures of an evaluation row that have an interval."""
    if "return_per_1000" in row:
        return MELTINGPOT
    return {name: name.replace("_", " of ", 1) for name in row if f"{name}_low" in row}


def final_table(runs: list[Run], rows: tuple[str, ...]) -> str:
    """Final evaluations as Markdown tables, one for each kind of world, a line per run and
    co-player (particle worlds: per run, population and player)."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        for name, row in results_of(run, rows).items():
            titles = columns_of(row)
            lines = tables.setdefault(tuple(titles.values()), [])
            if not lines:
                first = "co-player" if titles is MELTINGPOT else "population, player"
                lines.append(f"| run | {first} | {' | '.join(titles.values())} | episodes |")
                lines.append("|---" * (len(titles) + 3) + "|")
            digits = 1 if titles is MELTINGPOT else 2
            cells = (with_interval(row, figure, digits) for figure in titles)
            lines.append(f"| {run.name} | {name} | {' | '.join(cells)} | {row['episodes']} |")
    return "\n\n".join("\n".join(lines) for lines in tables.values()) + "\n"


def in_order(runs: list[Run]) -> list[Run]:
    """The runs, group by group, in the order of their seeds."""
    by_seed = (sorted(x, key=lambda run: run.args.get("seed", 0)) for x in grouped(runs).values())
    return list(itertools.chain(*by_seed))


def mean_and_seeds(values: list[float], form: str = ".2f") -> str:
    """A cell: the mean over seeds, then each seed's value in brackets; empty without values."""
    each = ", ".join(f"{value:{form}}" for value in values)
    return f"{np.mean(values):{form}} ({each})" if values else ""


def seeds_table(runs: list[Run], rows: tuple[str, ...]) -> str:
    """Final evaluations as a Markdown table with a line per row of the evaluations and a column
    per group and figure."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in in_order(runs):
        for name, row in results_of(run, rows).items():
            for figure, title in columns_of(row).items():
                column = f"{without_seed(run.name)}, {title}"
                found[row_in_all(name)][column].append(row[figure])
    columns = list(dict.fromkeys(c for row in found.values() for c in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = (mean_and_seeds(row[column]) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def last_means(run: Run, names: tuple[str, ...], steps: int) -> dict[str, float]:
    """{scalar: mean over the last `steps` environment steps of training}. A line of the log, or a
    window of a packed study, counts if it begins there: it has means since the line before it."""
    means = {}
    for name in names:
        lines = [(scalars["timesteps"], scalars[name]) for scalars in run.log if name in scalars]
        begins = [0, *(at for at, _ in lines[:-1])]
        late = [x for (_, x), begin in zip(lines, begins) if begin >= run.steps - steps]
        if late:
            means[name] = float(np.mean(late))
    return means


def last_table(runs: list[Run], names: tuple[str, ...], steps: int) -> str:
    """Means over the last steps of training: a Markdown table, a line per scalar and a column per
    group."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in in_order(runs):
        for name, mean in last_means(run, names, steps).items():
            found[name][without_seed(run.name)].append(mean)
    if not found:
        raise UsageError(f"--last {steps}: no line of the logs has --curves of so few steps alone.")
    groups = list(grouped(runs))
    lines = [f"| last {steps:,} steps | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for name, means in found.items():
        cells = (mean_and_seeds(means[group], ".4g") for group in groups)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scripted_rows(run: Run) -> set[str]:
    """Rows of a run's final evaluation in which no network plays: none of it shows there."""
    if not (rows := run.summary["eval"]):
        return set()
    args, names = run.args, []
    if args.get("task") in TASKS:
        names = scripted_players(args["task"], seed=1)
    if args.get("scenario"):
        names = playing(args["scenario"]).scripted_policies(seed=1)
    ends = tuple(f" {name}" for name in names)
    return {row for row in rows if row.endswith(ends) or row.startswith("random v random")}


def difference_table(runs: list[Run], study: Comparison) -> str:
    """A Markdown table with a line per group, evaluation row (or end of training, --last) and
    figure: the group's mean over seeds minus that of the group --against. Rows of scripts alone are
    left out, unless --rows names them. UsageError if nothing can be compared."""
    against = study.against
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        scripted = set() if study.rows else scripted_rows(run)
        for name, row in results_of(run, study.rows).items():
            for figure, title in columns_of(row).items() if name not in scripted else ():
                found[row_in_all(name), title][without_seed(run.name)].append(row[figure])
        for name, mean in last_means(run, study.curves, study.last).items():
            found[f"last {study.last:,} steps", name][without_seed(run.name)].append(mean)
    lines = [["run", "row", "figure", f"difference from {against}", "p", "seeds"]]
    for (name, title), groups in found.items():
        parent = np.array(groups.pop(against, []))
        for group, values in groups.items() if len(parent) else ():
            mean, low, high, p = seed_difference(np.array(values), parent)
            cell, chance = f"{mean:+.2f}", ""
            if not np.isnan(low):
                cell, chance = f"{cell} [{low:+.2f}, {high:+.2f}]", f"{p:.2g}"
            lines.append([group, name, title, cell, chance, f"{len(values)} v {len(parent)}"])
    if len(lines) == 1:
        raise UsageError(f"--against {against}: no finished run of another group has rows of its.")
    return aligned_table(lines) + "\n"


def means_table(runs: list[Run], names: tuple[str, ...]) -> str:
    """Scalars' means over the iterations that logged them: a Markdown table, a line per run.
    UsageError for what a packed study may have thinned to means, or sums, over windows."""
    for run, name in itertools.product(runs, names):
        points = sum(name in scalars for scalars in run.log)
        if run.path.is_file() and points > POINTS // 2:
            raise UsageError(f"--means {name}: {run.where} has it thinned; name run directories.")
    lines = [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run in runs:
        values = [[scalars[name] for scalars in run.log if name in scalars] for name in names]
        cells = (f"{np.mean(x):.3g}" if x else "" for x in values)
        lines.append(f"| {run.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def check_names(study: Comparison, runs: list[Run]) -> None:
    """Raise UsageError for a scalar in --curves or --means that no run has, and for a row in --rows
    that no finished run has."""
    logged = {name for run in runs for scalars in run.log for name in scalars}
    rows = {name for run in runs for name in run.summary["eval"]}
    for flag, names, known, kind in (
        ("--curves", study.curves, logged, "scalar"),
        ("--means", study.means, logged, "scalar"),
        ("--rows", study.rows, rows, "row"),
    ):
        for name in names:
            if name not in known:
                raise UsageError(f"{flag} {name}: no run has a {kind} of that name.")


def check_against(runs: list[Run], against: str) -> None:
    """Raise UsageError if no run is of the group `against`, or finished runs are of two worlds."""
    if against not in grouped(runs):
        raise UsageError(f"--against {against}: no run is called so, -s1, -s2, ... aside.")
    known: dict[tuple, Run] = {}
    for run in runs:
        if run.summary["timesteps"]:
            _, *world = name_in_world(run)
            known.setdefault(tuple(world), run)
    if len(known) > 1:
        one, other, *_ = (
            f"{run.where} ({' '.join(filter(None, world))})" for world, run in known.items()
        )
        raise UsageError(f"--against {against}: {one} and {other} are of different worlds.")
    finished = [run for run in runs if run.summary["timesteps"]]
    for one, other in itertools.pairwise(finished):
        here, there = rules_of(one), rules_of(other)
        for name in here.keys() & there.keys():
            if here[name] != there[name]:
                both = f"{one.where} and {other.where} differ in {as_flag(name)}"
                raise UsageError(f"--against {against}: {both}, so they are of different worlds.")


def with_defaults(study: Comparison, runs: list[Run]) -> Comparison:
    """The options with --curves and --every as the runs need them, where they are not given."""
    logged = {name for run in runs for scalars in run.log for name in scalars}
    usual = tuple(name for name in USUAL if name in logged) or USUAL[:1]
    longest = max(run.steps for run in runs)
    every = 20_000 if longest >= 100_000 else max(1, longest // 10)
    return dataclasses.replace(study, curves=study.curves or usual, every=study.every or every)


def note_on_flags(runs: list[Run]) -> str:
    """A line with the flags that affect training, which all groups' scripts have, and in which they
    differ; "" if there are none. Worlds and lengths are told elsewhere."""
    finished = [run for run in runs if run.summary["timesteps"]]
    groups = [members[0].args for members in grouped(finished).values()]
    if not groups or not all(paths_of(args["script"]) for args in groups):  # a script is gone
        return ""
    free = set().union(*(free_flags(load_script(args["script"])) for args in groups))
    known = set.intersection(*({*vars(load_script(args["script"]).Args())} for args in groups))
    differing = []
    for name in sorted(known - free - {"seed", "substrate", "task", "scenario"}):
        values = dict.fromkeys(as_words({name: args[name]})[0] for args in groups if name in args)
        if len(values) > 1:
            differing.append(" or ".join(values))
    return f"Note: groups differ in flags: {'; '.join(differing)}.\n" if differing else ""


def note_on_steps(runs: list[Run]) -> str:
    """A line that tells each group's steps if finished runs differ in them; "" if they do not."""
    if not differ([run.summary["timesteps"] for run in runs]):
        return ""
    each = []
    for group, members in grouped(runs).items():
        if steps := [x for run in members if (x := run.summary["timesteps"])]:
            each.append(f"{group}: {span(steps)}")
    return f"Note: not all runs were trained for the same number of steps: {'; '.join(each)}.\n"


def note_on_unfinished(runs: list[Run]) -> str:
    """A line that names runs without a final evaluation, if others have one; "" if there are none
    of the one kind or the other."""
    missing = [run.name for run in runs if not run.summary["eval"]]
    if len(missing) in (0, len(runs)):
        return ""
    return f"Note: no final evaluation yet of {', '.join(missing)}.\n"


def compare(study: Comparison) -> None:
    """Read all runs, then write OUT.png, OUT.csv and OUT.md."""
    check_out(study.out)
    runs = read_runs(study.runs, study.only)
    check_names(study, runs)
    check_groups(runs)
    study = with_defaults(study, runs)
    if study.against:
        check_against(runs, study.against)
    curves = {run.name: read_curves(run, study.curves, study.every) for run in runs}
    points = [
        {"run": run, "scalar": name, "timesteps": end, "mean": f"{value:.5g}"}
        for run, named in curves.items()
        for name in study.curves
        for end, value in named[name]
    ]
    table = seeds_table if study.by_seed else final_table
    text = table(runs, study.rows)
    if study.means:
        text += "\n" + means_table(runs, study.means)
    if study.last:
        text += "\n" + last_table(runs, study.curves, study.last)
    if study.against:
        text += "\n" + difference_table(runs, study)
    notes = [note_on_flags(runs), note_on_steps(runs), note_on_unfinished(runs)]
    logged = {name for run in runs for scalars in run.log for name in scalars}
    if not points and logged.intersection(study.curves):
        notes.append(
            f"Note: no curves: --every {study.every:,} is longer than each run's log of them.\n"
        )
    text += "".join(f"\n{note}" for note in notes if note)
    finish(study.out, text, points, draw(curves, study.curves))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(compare, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
