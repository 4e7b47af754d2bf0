"""Tables of returns in Melting Pot's scenarios, in the form of BiDist's Table 1.

    python experiments/scenario_table.py runs/A-s1 runs/A-s2 runs/B-s1 --out docs/data/scenarios
    python experiments/scenario_table.py docs/data/study_chicken.csv

Reads run directories (RUN/evaluation/final-*.csv, a row per episode) or packed studies (runs.py).
Writes OUT.md, OUT.csv and OUT.png: for every substrate, scenario and method the focal players'
per-capita return per episode (Eq. 2) and per 1,000 steps. Official and scripted bots are different
co-players and have separate tables: runs that met both give OUT-official.* and OUT-scripted.*.

Methods. Runs are seeds of one method if they have the same script and the same flags, except seed,
length and flags that do not affect training. A method's name is its script and its flags that
differ from the defaults. With --group-by name it is the directory's name without -s1, -s2, ...;
runs of one name must then be seeds of one method, and without --timesteps equally long.

Figures. A run's figure is the mean over its episodes; per 1,000 steps it is the ratio of the sums,
so a long episode weighs more. A method's figure is the mean of its runs' figures. Intervals are
95 %. With fewer than five runs of a method, each run has a line with its interval over episodes, a
percentile bootstrap, and the method has no interval. With five or more, the method's is Student's
over runs: a bootstrap of five runs that are alike leaves out the truth in one of six cases.

Normalised (Table 1). In each scenario the methods' means are scaled so that the worst method of the
table has 0 and the best 1. These figures change with the set of methods: read the raw ones as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import Count, Positive, Seed, UsageError

import numpy as np

from envs.meltingpot.scenarios import PAPER
from envs.statistics import draw_rows, ratio_interval, student_interval
from experiments.plots import plt
from experiments.runs import (
    Run,
    Runs,
    beside,
    check_groups,
    check_out,
    finish,
    method_of,
    read_runs,
    run_command,
    script_file,
    without_seed,
)

SEEDS = 5  # from so many runs on, a method has an interval, over runs
QUANTITIES = {
    "return": "focal return per capita and episode",
    "return_per_1000": "focal return per capita and 1,000 steps",
}
RELATIVE = (
    "Normalised figures are relative to this set of methods: within a scenario the worst of them "
    "is 0 and the best is 1, whatever the distance between them, and another set gives other "
    "figures; who was not run there takes no part."
)


@dataclasses.dataclass(frozen=True)
class Study:
    """Options of this command."""

    runs: Runs  # run directories and packed studies to read
    only: tuple[str, ...] = ()  # keep runs whose names match these shell patterns, in this order
    out: Path = Path("scenarios")  # common beginning of the names of the .md, .csv and .png files
    group_by: Literal["method", "name"] = "method"  # group by flags, or by name without -s1, ...
    timesteps: Count | None = None  # use evaluations after so many env steps; default: the last
    draw: Literal["return", "return_per_1000"] = "return"  # quantity to draw in OUT.png
    resamples: Positive = 5000  # bootstrap resamples of each interval
    seed: Seed = 1  # seed of the bootstrap resampling


# --- Evaluations ----------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The E episodes of one run in one scenario."""

    run: str  # name of the run
    method: str
    seed: int
    substrate: str
    scenario: str  # SC0, ...
    bots: str  # official or scripted
    timesteps: int  # environment steps of training before the evaluation
    returns: np.ndarray  # (E,) focal per-capita returns, undiscounted
    lengths: np.ndarray  # (E,) environment steps


def read_cells(run: Run, method: str, timesteps: int | None = None) -> list[Cell]:
    """A cell per scenario and kind of bots of a run: from its last evaluation with these bots, or
    the one after `timesteps` steps (UsageError if there is none). Empty without an evaluation."""
    cells = []
    for bots in ("official", "scripted"):
        found = [x for x in run.evaluations if x.bots == bots]
        steps = {x.timesteps for x in found}
        if timesteps is not None:
            chosen = timesteps
        elif run.summary["timesteps"] in steps:  # files of an abandoned future may be newer
            chosen = run.summary["timesteps"]
        else:
            chosen = max(steps, default=0)
        for x in found:
            if x.timesteps == chosen:
                cell = Cell(
                    run=run.name,
                    method=method,
                    seed=run.args["seed"],
                    substrate=run.args["substrate"],
                    scenario=x.scenario,
                    bots=bots,
                    timesteps=chosen,
                    returns=x.returns,
                    lengths=x.lengths,
                )
                cells.append(cell)
    if run.evaluations and not cells:
        have = sorted({x.timesteps for x in run.evaluations})
        have = " and ".join(f"{when:,}" for when in have)
        raise UsageError(
            f"{run.where} has no evaluation after {timesteps:,} steps, but after {have}."
        )
    return cells


def read_all(study: Study) -> list[Cell]:
    """The cells of all runs that the options select. UsageError if a run has no evaluation."""
    cells, by_name = [], study.group_by == "name"
    runs = read_runs(study.runs, study.only)
    if by_name:
        check_groups(runs, lengths=study.timesteps is None)
    for run in runs:
        method = without_seed(run.name) if by_name else method_of(run.args)
        own = read_cells(run, method, study.timesteps)
        if not own:
            sentence = "has no evaluation beside scenarios yet"
            raise UsageError(f"{run.where} {sentence}: {advice(run)}.")
        cells += own
    check_seeds(cells)
    return cells


def check_seeds(cells: list[Cell]) -> None:
    """UsageError if two runs are one method and seed: one of them would count twice."""
    known: dict[tuple, str] = {}
    for x in cells:
        what = (x.method, x.substrate, x.scenario, x.bots, x.seed)
        if (other := known.setdefault(what, x.run)) != x.run:
            both = f"{other} and {x.run} would count as two seeds of {x.method}"
            raise UsageError(f"{both}, but both have seed {x.seed}: choose with --only.")


def advice(run: Run) -> str:
    """How a run without an evaluation beside scenarios gets one, as part of a sentence."""
    if run.path.is_file():
        return "pack it again from runs that have one"
    if "substrate" not in run.args:
        return "only runs on Melting Pot can have one"
    if run.args["substrate"] == "toy" or ":" in run.args["substrate"]:
        return f"{run.args['substrate']} has no scenarios"
    words = ["python", script_file(run.args["script"]), "--eval-only", str(run.path)]
    words += ["--eval-scenarios", "all"]
    if has_weights_only(run.path):
        words += ["--run-dir", f"runs/{run.name}"]  # an entry of the zoo stays as it is
        return f"{shlex.join(words)} makes one there"
    return f"{shlex.join(words)} makes it"


def has_weights_only(run_dir: Path) -> bool:
    """Whether the run's newest checkpoint cannot be trained on, as in zoo/."""
    if not (run_dir / "checkpoints.json").exists():
        return False
    saved, _ = harness.load_checkpoint(str(run_dir), quiet=True)
    return bool(saved.get("weights_only"))


# --- Figures --------------------------------------------------------------------------------------


def fractions(cell: Cell, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """(E,) numerators and (E,) denominators; the quantity is the ratio of their sums."""
    if quantity == "return":
        return cell.returns, np.ones(len(cell.returns))
    return 1000 * cell.returns, cell.lengths


def mean(cells: Iterable[Cell], quantity: str) -> float:
    """The mean of the runs' figures: each run (cell) has the same weight."""
    parts = (fractions(cell, quantity) for cell in cells)
    return float(np.mean([above.sum() / below.sum() for above, below in parts]))


def interval(
    cells: list[Cell], quantity: str, resamples: int = 5000, seed: int = 1
) -> tuple[float, float]:
    """95 % interval of mean(): of one run a percentile bootstrap over its episodes, of several
    Student's over the runs' figures."""
    if len(cells) == 1:
        above, below = fractions(cells[0], quantity)
        return ratio_interval(above, below, draw_rows(len(above), resamples, seed))
    figures = [mean([cell], quantity) for cell in cells]
    return student_interval(np.array(figures))


def normalise(means: dict[str, float]) -> dict[str, float]:
    """Min-max normalisation over methods; {} for fewer than two methods or equal means."""
    low, high = min(means.values(), default=0), max(means.values(), default=0)
    if high == low:
        return {}
    return {method: (x - low) / (high - low) for method, x in means.items()}


class Figure(NamedTuple):
    """One figure of a table, for a method or for one of its runs."""

    substrate: str
    scenario: str
    method: str
    run: str  # name of the run; "" if the figure is the method's
    seed: int | str
    timesteps: str  # environment steps of training; a range if the method's runs differ
    runs: int
    episodes: int
    quantity: str
    mean: float
    low: float  # NaN: no interval
    high: float
    over: str  # what the interval is over: "episodes", "runs" or "" (no interval)
    normalised: float  # NaN for runs, and where normalise() gives none


def span(numbers: Iterable[int]) -> str:
    """The range of numbers as text: "50", or "48 to 50" if they differ."""
    low, high = min(numbers := list(numbers)), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def figures_of(cells: list[Cell], study: Study) -> list[Figure]:
    """The figures of every method and run per substrate, scenario and quantity, for one `bots`."""
    figures = []
    places = dict.fromkeys((cell.substrate, cell.scenario) for cell in cells)
    for (substrate, scenario), quantity in itertools.product(places, QUANTITIES):
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if (cell.substrate, cell.scenario) == (substrate, scenario):
                groups.setdefault(cell.method, []).append(cell)
        scores = normalise({method: mean(own, quantity) for method, own in groups.items()})
        for method, own in groups.items():
            figure = figure_of(own, quantity, study)
            figures.append(figure._replace(normalised=scores.get(method, np.nan)))
            for cell in sorted(own, key=lambda cell: cell.seed):
                figure = figure_of([cell], quantity, study, over="episodes")
                figures.append(figure._replace(run=cell.run, seed=cell.seed))
    return figures


def figure_of(cells: list[Cell], quantity: str, study: Study, over: str = "") -> Figure:
    """The figure of a method's runs in one scenario, with an interval from SEEDS runs on. For a
    single run, over="episodes" gives the interval over its episodes."""
    low, high = np.nan, np.nan
    if not over and len(cells) >= SEEDS:
        over = "runs"
    if over:
        low, high = interval(cells, quantity, study.resamples, study.seed)
    return Figure(
        substrate=cells[0].substrate,
        scenario=cells[0].scenario,
        method=cells[0].method,
        run="",
        seed="",
        timesteps=span(cell.timesteps for cell in cells),
        runs=len(cells),
        episodes=sum(len(cell.returns) for cell in cells),
        quantity=quantity,
        mean=mean(cells, quantity),
        low=low,
        high=high,
        over=over,
        normalised=np.nan,
    )


def scenarios_of(figures: list[Figure], substrate: str) -> list[str]:
    """The columns of a substrate: all scenarios that were run, and SC0 to SC4 if it is one of the
    paper's substrates."""
    found = {figure.scenario for figure in figures if figure.substrate == substrate}
    found |= {f"SC{number}" for number in range(5)} if substrate in PAPER else set()
    return sorted(found, key=lambda name: int(name[2:]))


# --- Output ---------------------------------------------------------------------------------------


def text_of(figure: Figure) -> str:
    """The text of a table cell: mean, interval if there is one, and normalised figure in bold."""
    text = f"{figure.mean:.1f}"
    if not np.isnan(figure.low):
        text += f" [{figure.low:.1f}, {figure.high:.1f}]"
    return text if np.isnan(figure.normalised) else f"{text} **{figure.normalised:.2f}**"


def markdown_table(figures: list[Figure], substrate: str, quantity: str) -> str:
    """A table: a line per method, and per run of methods with under SEEDS; columns: scenarios."""
    chosen = [f for f in figures if (f.substrate, f.quantity) == (substrate, quantity)]
    names = scenarios_of(figures, substrate)
    lines = [
        f"| {QUANTITIES[quantity]} | steps of training | episodes | {' | '.join(names)} |",
        "|---" * (len(names) + 3) + "|",
    ]
    runs = {}  # {method: {name of the run: its seed}}
    for f in chosen:
        runs.setdefault(f.method, {}).update({f.run: f.seed} if f.run else {})
    for method, seeds in runs.items():
        shown = {"": f"**{method}**, {len(seeds)} run{'s' if len(seeds) > 1 else ''}"}
        if len(seeds) < SEEDS:
            shown |= {run: f"seed {seed} ({run})" for run, seed in seeds.items()}
        for run, label in shown.items():
            line = {f.scenario: f for f in chosen if (f.method, f.run) == (method, run)}
            cells = [text_of(line[name]) if name in line else "not run" for name in names]
            steps = ", ".join(dict.fromkeys(f.timesteps for f in line.values()))
            episodes = span(f.episodes for f in line.values())
            lines.append(f"| {label} | {steps} | {episodes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def markdown(figures: list[Figure], cells: list[Cell], bots: str) -> str:
    """The text of OUT.md."""
    parts = [f"# Returns beside the scenarios' co-players: {bots} bots\n"]
    parts.append(
        "Intervals are 95 %: of a run percentile bootstraps over its episodes; of a method, from "
        "five runs on, Student's over its runs. Bold figures are normalised. "
        f"{RELATIVE}\n"
    )
    steps: dict[str, set[int]] = {}
    for cell in cells:
        steps.setdefault(cell.method, set()).add(cell.timesteps)
    if len(set().union(*steps.values())) > 1:
        each = "; ".join(f"{method}: {span(found)}" for method, found in steps.items())
        parts.append(f"Note: not all runs were trained for the same number of steps: {each}.\n")
    for substrate in dict.fromkeys(f.substrate for f in figures):
        parts.append(f"## {substrate}\n")
        parts += [markdown_table(figures, substrate, quantity) for quantity in QUANTITIES]
    return "\n".join(parts)


def draw_returns(axis: Any, figures: list[Figure], names: list[str], colours: dict) -> None:
    """Draw raw returns: a horizontal bar per method, a dot per run, vertical lines: intervals."""
    methods = list(dict.fromkeys(f.method for f in figures))
    for i, method in enumerate(colours):
        if method not in methods:
            continue
        own = [f for f in figures if f.method == method]
        width = 0.8 / len(colours)
        centre = {name: x - 0.4 + width * (i + 0.5) for x, name in enumerate(names)}
        runs = list(dict.fromkeys(f.run for f in own if f.run))
        for f in own:
            x = centre[f.scenario]
            if not f.run:
                style = {"color": colours[method], "lw": 2}
                axis.plot([x - 0.42 * width, x + 0.42 * width], [f.mean] * 2, **style)
            elif len(runs) > 1:
                x += width * 0.7 * (runs.index(f.run) / (len(runs) - 1) - 0.5)
            if not np.isnan(f.low) and (len(runs) < SEEDS or not f.run):
                axis.plot([x, x], [f.low, f.high], color=colours[method], lw=1, alpha=0.8)
            if f.run:
                axis.plot(x, f.mean, "o", color=colours[method], ms=3)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(axis="y", alpha=0.3)


def draw_normalised(axis: Any, figures: list[Figure], names: list[str], methods: list[str]) -> None:
    """Draw Table 1 (normalised returns) as a heat map with a row per method."""
    table = np.full((len(methods), len(names)), np.nan)
    for f in figures:
        if not f.run and f.method in methods:
            table[methods.index(f.method), names.index(f.scenario)] = f.normalised
    axis.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), x in np.ndenumerate(table):
        ran = any((f.method, f.scenario) == (methods[row], names[column]) for f in figures)
        text = f"{x:.2f}" if not np.isnan(x) else "–" if ran else "not\nrun"
        colour = "white" if x < 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(methods)), [str(row + 1) for row in range(len(methods))])


def draw(figures: list[Figure], bots: str, quantity: str) -> Any:
    """Per substrate, a panel of raw returns above a heat map of normalised ones; three a row."""
    figures = [f for f in figures if f.quantity == quantity]
    substrates = list(dict.fromkeys(f.substrate for f in figures))
    methods = list(dict.fromkeys(f.method for f in figures))
    colours = {method: f"C{i % 10}" for i, method in enumerate(methods)}
    columns, lines = min(3, len(substrates)), -(-len(substrates) // 3)
    heat = 0.28 * len(methods) + 0.2
    size = (0.6 + 3.9 * columns, lines * (3.4 + heat) + 0.3 + 0.2 * len(methods))
    figure, axes = plt.subplots(
        2 * lines, columns, figsize=size, squeeze=False, height_ratios=[2.4, heat] * lines
    )
    for number in range(columns * lines):
        above, below = axes[2 * (number // 3)][number % 3], axes[2 * (number // 3) + 1][number % 3]
        if number >= len(substrates):
            above.axis("off"), below.axis("off")
            continue
        names = scenarios_of(figures, substrates[number])
        own = [f for f in figures if f.substrate == substrates[number]]
        draw_returns(above, own, names, colours)
        draw_normalised(below, own, names, methods)
        above.set_title(substrates[number], fontsize=10)
        below.set_title("normalised within this set of methods", fontsize=8)
        if number % 3 == 0:
            above.set_ylabel(QUANTITIES[quantity].replace(" per", "\nper", 1), fontsize=9)
            below.set_ylabel("method", fontsize=9)
        for axis in (above, below):
            axis.tick_params(labelsize=8)
    marks = [plt.Line2D([], [], color=colours[m], lw=2) for m in methods]
    labels = [f"{i}  {method}" for i, method in enumerate(methods, 1)]
    title = f"{bots} bots; bars: methods, dots: runs, thin lines: 95 % intervals"
    figure.legend(marks, labels, title=title, loc="lower center", fontsize=9, title_fontsize=8)
    figure.tight_layout(rect=(0, (0.35 + 0.2 * len(methods)) / size[1], 1, 1))
    return figure


def tabulate(study: Study) -> None:
    """Read all runs, then write OUT.md, OUT.csv and OUT.png for each kind of bots."""
    check_out(study.out)
    cells = read_all(study)
    kinds = [bots for bots in ("official", "scripted") if any(c.bots == bots for c in cells)]
    for bots in kinds:
        out = study.out if len(kinds) == 1 else beside(study.out, f"-{bots}")
        own = [cell for cell in cells if cell.bots == bots]
        figures = figures_of(own, study)
        rows = [{"bots": bots} | figure._asdict() for figure in figures]
        finish(out, markdown(figures, own, bots), rows, draw(figures, bots, study.draw))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(tabulate, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
