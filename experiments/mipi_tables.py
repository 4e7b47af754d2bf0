"""MIPI's Tables 1 to 3 and its curves, from runs of mipi_refil_smac.py and baselines/refil_smac.py.

    python experiments/mipi_tables.py runs/sz-* runs/csz-* runs/mmm-* --out docs/data/mipi
    python experiments/mipi_tables.py runs/resource-* --out docs/data/mipi_resource

A run's final figure is the mean of its last five evaluations on the way (greedy episodes), the
training column the mean over the sizes that it was trained with. Runs with the same arguments but
for the seed make one row: the mean over seeds and, in brackets, each seed's. Beside win rates stand
the paper's (mean and deviation of five seeds, in StarCraft II); rows of the paper without a run
here are printed as not run. Scripted policies: from the runs' final evaluations. Then what training
logged in the time of those evaluations: how much policies depend on their team (mi: in imagined
teams, kl: in the real one). Rows of unequal length are named. With --until longer runs are read as
if they had ended there, with --every those that were evaluated more often as if they had not.
Writes OUT.md, OUT.csv (every evaluation) and OUT.png (their curves).
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from figures import (
    Positive,
    Runs,
    UsageError,
    check_bounds,
    check_out,
    finish,
    load_script,
    markdown_table,
    one_line_errors,
    read_args,
    read_log,
)

# win rates of the paper: 3-5, 6, 7, 8
TABLE_1 = {
    "sz": {
        "MIPI": ".659±.020 .453±.080 .404±.062 .276±.076",
        "REFIL": ".674±.038 .441±.103 .352±.078 .236±.103",
        "AQMIX": ".528±.044 .343±.105 .291±.084 .182±.058",
        "CollaQ": ".588±.030 .366±.086 .314±.076 .198±.097",
        "MAPPO": ".256±.010 .129±.019 .148±.031 .036±.015",
    },
    "csz": {
        "MIPI": ".548±.032 .420±.102 .297±.112 .261±.090",
        "REFIL": ".568±.027 .348±.057 .229±.053 .164±.060",
        "AQMIX": ".509±.054 .323±.096 .216±.101 .152±.071",
        "CollaQ": ".459±.061 .362±.130 .267±.099 .231±.095",
        "MAPPO": ".248±.037 .120±.029 .060±.028 .054±.013",
    },
    "mmm": {
        "MIPI": ".548±.023 .495±.054 .447±.041 .467±.067",
        "REFIL": ".605±.057 .437±.118 .329±.171 .224±.163",
        "AQMIX": ".501±.036 .447±.043 .344±.071 .251±.089",
        "CollaQ": ".589±.027 .513±.070 .423±.026 .286±.083",
        "MAPPO": ".289±.097 .320±.102 .250±.063 .275±.098",
    },
}
TABLE_2 = {
    "sz": {
        "MIPI": TABLE_1["sz"]["MIPI"],
        "Value": ".621±.042 .336±.075 .275±.114 .154±.052",
        "Entropy": ".105±.035 .024±.011 .015±.011 .010±.010",
    },
    "csz": {
        "MIPI": TABLE_1["csz"]["MIPI"],
        "Value": ".542±.059 .368±.083 .207±.076 .172±.112",
        "Entropy": ".316±.040 .237±.051 .076±.041 .066±.041",
    },
    "mmm": {
        "MIPI": TABLE_1["mmm"]["MIPI"],
        "Value": ".545±.048 .505±.058 .391±.083 .319±.105",
        "Entropy": ".265±.034 .200±.085 .160±.064 .075±.044",
    },
}
TABLE_3 = {  # and the alphas of appendix D.3, for which the paper has curves only
    "sz": {
        "Value": TABLE_2["sz"]["Value"],
        "alpha 0.01": ".672±.020 .394±.065 .365±.068 .261±.092",
        "MIPI": TABLE_1["sz"]["MIPI"],
        "alpha 0.05": ".643±.020 .447±.062 .408±.054 .313±.069",
        "alpha 0.1": ".475±.073 .277±.125 .260±.093 .146±.075",
        "alpha 0.5": ".175±.053 .056±.015 .129±.026 .043±.021",
        "alpha inf": ".546±.069 .429±.036 .389±.038 .221±.004",
    },
    "csz": {
        "Value": TABLE_2["csz"]["Value"],
        "alpha 0.01": ".592±.020 .378±.033 .364±.073 .304±.056",
        "alpha 0.015": "- - - -",
        "MIPI": TABLE_1["csz"]["MIPI"],
        "alpha 0.05": ".506±.046 .417±.092 .223±.094 .192±.091",
        "alpha 0.1": ".344±.050 .218±.160 .113±.079 .098±.086",
        "alpha inf": ".506±.076 .368±.064 .309±.056 .270±.070",
    },
    "mmm": {
        "Value": TABLE_2["mmm"]["Value"],
        "alpha 0.05": ".590±.008 .590±.053 .526±.055 .426±.152",
        "MIPI": TABLE_1["mmm"]["MIPI"],
        "alpha 0.5": ".277±.042 .158±.094 .180±.105 .139±.056",
        "alpha inf": ".396±.070 .432±.018 .383±.041 .315±.061",
    },
}
TABLES = {"Table 1": TABLE_1, "Table 2": TABLE_2, "Table 3": TABLE_3}
DEFAULT_ALPHA = {"sz": 0.03, "csz": 0.03, "mmm": 0.1, "resource": 0.05}
NAMED = ("seed", "regularizer", "alpha", "imagine")  # flags that a row's name tells or does not


@dataclasses.dataclass(frozen=True)
class Tables:
    """What to read and to write."""

    runs: Runs  # run directories
    out: Path = Path("mipi")  # writes OUT.md, OUT.csv and OUT.png
    last: Positive = 5  # evaluations that make the final figure
    until: Positive | None = None  # environment steps; evaluations after them do not count
    every: Positive = 1  # environment steps; of evaluations between multiples the first counts


@dataclasses.dataclass(frozen=True)
class Run:
    """One run and its evaluations."""

    path: Path
    task: str
    method: str  # the row of the paper's tables
    flags: dict[str, Any]  # which that does not tell
    known: frozenset[str]  # flags of its script
    seed: int
    steps: int  # environment steps of the last evaluation
    columns: dict[str, tuple[int, ...]]  # "3-5": the sizes that it was trained with, then others
    evaluations: list[dict[str, float]]  # of metrics.jsonl
    learning: list[dict[str, float]]  # its lines of training
    scripts: dict[str, dict[str, float]]  # {"6 focus": figures}, if the run has ended

    def figure(self, measure: str, column: str, evaluation: dict[str, float]) -> float:
        """The mean over a column's sizes in one evaluation; NaN if it is not there."""
        names = [f"eval/{size}/{measure}" for size in self.columns[column]]
        return float(np.mean([evaluation.get(name, np.nan) for name in names]))

    def final(self, measure: str, column: str, last: int) -> float:
        each = [self.figure(measure, column, x) for x in self.evaluations[-last:]]
        return float(np.mean(each))

    def logged(self, name: str, last: int) -> float:
        """The mean of what training logged in the time of those evaluations; NaN for nothing."""
        first, end = (self.evaluations[k]["timesteps"] for k in (-last, -1))
        lines = [x for x in self.learning if first <= x["timesteps"] <= end]
        return float(np.mean([x[name] for x in lines if name in x] or [np.nan]))


def method_of(args: dict[str, Any]) -> str:
    """The row of the paper's tables."""
    if args["script"] == "refil_smac":
        return "REFIL" if args["imagine"] else "AQMIX"
    alpha, task = args["alpha"], args["scenario"]
    name = {"none": "Value", "entropy": "Entropy", "mi": "MIPI"}[args["regularizer"]]
    if alpha is None or float(alpha) == DEFAULT_ALPHA[task]:
        return name
    return f"alpha {float(alpha):g}" if name == "MIPI" else f"{name}, alpha {float(alpha):g}"


def other_flags(args: dict[str, Any]) -> dict[str, Any]:
    """What a run has otherwise than its preset and its row's name say."""
    module = load_script(args["script"])
    preset = f"--preset {args['preset']} --scenario {args['scenario']}".split()
    usual = json.loads(json.dumps(dataclasses.asdict(module.parse(module.with_preset(preset)))))
    names = [k for k in usual if k in args and k not in {*module.RESUMABLE, *NAMED}]
    return {k: args[k] for k in names if args[k] != usual[k]}


def read_run(path: Path, study: Tables) -> Run:
    """UsageError for what is no run of these scripts, or has too few evaluations."""
    args = read_args(path)
    if args["script"] not in ("mipi_refil_smac", "refil_smac"):
        raise UsageError(f"{path} is a run of {args['script']}.py.")
    log = read_log(path)
    evaluations = [x for x in log if any(k.startswith("eval/") for k in x)]
    periods = [0, *(x["timesteps"] // study.every for x in evaluations)]
    evaluations = [x for x, a, b in zip(evaluations, periods, periods[1:]) if a < b]
    evaluations = [x for x in evaluations if not study.until or x["timesteps"] <= study.until]
    if len(evaluations) < study.last:
        found = f"{len(evaluations)} evaluations"
        found += f" until {study.until:,} steps" if study.until else ""
        raise UsageError(f"{path} has {found}, fewer than --last {study.last}.")
    sizes = tuple(args["team_sizes"])
    columns = {f"{min(sizes)}-{max(sizes)}": sizes}
    columns |= {str(x): (x,) for x in args["eval_team_sizes"] if x not in sizes}
    summary = path / "summary.json"
    results = json.loads(summary.read_text())["eval"] if summary.exists() else {}
    return Run(
        path,
        args["scenario"],
        method_of(args),
        other_flags(args),
        frozenset(args),
        args["seed"],
        evaluations[-1]["timesteps"],
        columns,
        evaluations,
        [x for x in log if "td_loss" in x],
        {name: row for name, row in results.items() if " " in name},
    )


def short(x: float, measure: str) -> str:
    return f"{x:.3f}".lstrip("0") if measure == "win" and 0 <= x < 1 else f"{x:.2f}"


def row_of(task: str, method: str, runs: list[Run], measure: str, last: int) -> dict[str, str]:
    """A line of a table: means over seeds and each seed's."""
    row = {"": task.upper(), "method": method}
    for column in runs[0].columns:
        each = [run.final(measure, column, last) for run in runs]
        cell = short(float(np.mean(each)), measure)
        if len(each) > 1:
            cell += f" ({', '.join(short(x, measure) for x in each)})"
        row[column] = cell
    return row | {"seeds": str(len(runs)), "steps": f"{min(run.steps for run in runs):,}"}


def script_rows(task: str, runs: list[Run], measure: str) -> list[dict[str, str]]:
    """Scripted policies in the final evaluations' battles, over all runs."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for name, row in run.scripts.items():
            size, script = name.split(" ", 1)
            found[script][int(size)].append(row[measure])
    rows = []
    for script, sizes in found.items():
        row = {"": task.upper(), "method": f"{script} (script)"}
        for column, members in runs[0].columns.items():
            row[column] = short(float(np.mean([np.mean(sizes[x]) for x in members])), measure)
        rows.append(row | {"seeds": "", "steps": ""})
    return rows


def words(flags: dict[str, Any]) -> list[str]:
    """As on a command line."""
    dashed = {name.replace("_", "-"): x for name, x in flags.items()}
    return [
        f"--{'no-' * (not x)}{k}" if isinstance(x, bool) else f"--{k} {x}"
        for k, x in dashed.items()
    ]


def group(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """{task: {method, with flags in which the runs differ: runs, one per seed}}; UsageError for a
    seed that is there twice."""
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.seed):
        others = {k: [x.flags.get(k) for x in runs if k in x.known] for k in run.flags}
        own = {k: x for k, x in run.flags.items() if any(x != other for other in others[k])}
        members = found[run.task][" ".join([run.method, *words(own)])]
        if any(run.seed == other.seed for other in members):
            raise UsageError(f"{run.path} and {members[-1].path} are the same run: one seed.")
        if members and members[0].columns != run.columns:
            raise UsageError(f"{run.path} and {members[-1].path} have other team sizes.")
        members.append(run)
    return found


def win_tables(found: dict[str, dict[str, list[Run]]], last: int) -> str:
    """The paper's tables, with its figures beside ours."""
    text = ""
    for title, table in TABLES.items():
        rows = []
        for task in (x for x in table if x in found):
            for method, theirs in table[task].items():
                runs = found[task].get(method)
                columns = next(iter(found[task].values()))[0].columns
                row = {"": task.upper(), "method": method} | dict.fromkeys(columns, "not run")
                row |= {"seeds": "", "steps": ""}
                if runs:
                    row = row_of(task, method, runs, "win", last)
                if method == "MIPI":
                    row["method"] = f"MIPI, alpha {DEFAULT_ALPHA[task]:g}"
                names = ("paper 3-5", "paper 6", "paper 7", "paper 8")
                rows.append(row | dict(zip(names, theirs.split(), strict=True)))
        if rows:
            text += f"{title}: share of battles won\n\n{markdown_table(rows)}\n"
    return text


def all_rows(found: dict[str, dict[str, list[Run]]], measure: str, last: int) -> str:
    """Every method that was run, whether the paper has it or not, and the scripts."""
    text = ""
    for task, methods in found.items():
        rows = [row_of(task, method, runs, measure, last) for method, runs in methods.items()]
        rows += script_rows(task, [run for runs in methods.values() for run in runs], measure)
        title = "share of battles won" if measure == "win" else "return per episode"
        text += f"{task.upper()}: {title}\n\n{markdown_table(rows)}\n"
        steps = [run.steps for runs in methods.values() for run in runs]
        if max(steps) > 1.1 * min(steps):
            text += f"Not equally long: {min(steps):,} to {max(steps):,} steps.\n\n"
        for method, runs in methods.items():
            if untold := [x for x in words(runs[0].flags) if x not in method]:
                text += f"{method}: {', '.join(untold)}, not as its preset has it.\n\n"
    return text


def dependence(found: dict[str, dict[str, list[Run]]], last: int) -> str:
    """What training logged of policies: how much they depend on their team, in nats."""
    text = ""
    for task, methods in found.items():
        rows = []
        for method, runs in methods.items():
            names = {k for run in runs for x in run.learning for k in x}
            names = sorted(names & {"mi", "kl", "entropy"} | {k for k in names if "mi/" in k})
            if names:
                cells = {k: f"{np.mean([run.logged(k, last) for run in runs]):.3f}" for k in names}
                rows.append({"": task.upper(), "method": method} | cells)
        if rows:
            rows = [dict.fromkeys(max(rows, key=len), "") | row for row in rows]
            text += f"{task.upper()}: policies, in training, nats\n\n{markdown_table(rows)}\n"
    return text


def draw(found: dict[str, dict[str, list[Run]]], measures: tuple[str, ...]) -> Any:
    """Curves of the evaluations: a row per task and measure, a panel per column."""
    lines = [(task, measure) for task in found for measure in measures]
    columns = next(iter(next(iter(found.values())).values()))[0].columns
    size = 3.2 * len(columns) + 1.2, 2.6 * len(lines)
    every = list(dict.fromkeys(method for methods in found.values() for method in methods))
    colours = plt.get_cmap("tab20")([*range(0, 20, 2), *range(1, 20, 2)])
    figure, axes = plt.subplots(len(lines), len(columns), figsize=size, squeeze=False)
    for panels, (task, measure) in zip(axes, lines, strict=True):
        for axis, column in zip(panels, columns, strict=True):
            for method, runs in found[task].items():
                colour = colours[every.index(method) % 20]  # the same in all tasks
                times = [[x["timesteps"] / 1000 for x in run.evaluations] for run in runs]
                values = [[run.figure(measure, column, x) for x in run.evaluations] for run in runs]
                for xs, ys in zip(times, values):
                    axis.plot(xs, ys, color=colour, alpha=0.35, linewidth=0.8)
                end = 1.02 * min(xs[-1] for xs in times)  # runs end with their last battles
                grid = [x for x in min(times, key=len) if x <= end]
                ys = np.mean([np.interp(grid, *each) for each in zip(times, values)], 0)
                axis.plot(grid, ys, color=colour, label=f"{method} ({len(runs)})")
            axis.set_title(f"{task.upper()} {column}: {measure}", fontsize=9)
            axis.grid(alpha=0.3)
        panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.02))  # beside it
    for axis in axes[-1]:
        axis.set_xlabel("thousand environment steps", fontsize=8)
    figure.tight_layout()
    return figure


def main(study: Tables) -> None:
    """Read all runs, then write the three files."""
    check_bounds(study)
    check_out(study.out)
    runs = [read_run(path, study) for path in study.runs]
    measures = {("return",) if run.task == "resource" else ("win", "return") for run in runs}
    if len(measures) != 1:
        raise UsageError("Battles and Resource Collection do not go into one table.")
    (measures,) = measures
    found = group(runs)
    text = win_tables(found, study.last) if "win" in measures else ""
    text += "".join(all_rows(found, measure, study.last) for measure in measures)
    text += dependence(found, study.last)
    rows = [
        {"run": run.path.name, "timesteps": x["timesteps"], "size": column, "measure": measure}
        | {"mean": run.figure(measure, column, x)}
        for run in runs
        for x in run.evaluations
        for column in run.columns
        for measure in measures
    ]
    finish(study.out, text, rows, draw(found, measures))


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Tables))))
