"""The figures and tables of the BiDist paper, made from runs.

    python experiments/bidist.py curves runs/*-s1       a scalar over steps and over theta's samples
    python experiments/bidist.py fig5 runs/BIDIST-s1 runs/MAPPO-s1   what training populations play
    python experiments/bidist.py fig6 --total-timesteps 1000000 --extra --num-workers 1
    python experiments/bidist.py fig7 runs/RUN                       one reverse phase of each kind
    python experiments/bidist.py fig8 --runs runs/fig8/*             ablations
    python experiments/bidist.py c1 | c2                             widths, distillation intervals
    python experiments/bidist.py table1 --substrates coins --total-timesteps 1000000 --seeds 1 2 3
    python experiments/bidist.py cross-play runs/table1/coins-*      play with each other's actors
    python experiments/bidist.py shift runs/RUN runs/RUN             distillation over training
    python experiments/bidist.py reverse runs/RUN runs/RUN           when do preferences shift?

table1 compares six methods; fig6, fig8, c1 and c2 compare variants of bidist_mappo_meltingpot.py.
These train their runs first (the figures only without --runs), in RUNS_DIR/{name}-s{seed} with the
output in a .log beside it; finished runs are kept, stopped ones are resumed, and flags after
--extra go to the scripts. Other subcommands read runs' newest checkpoints, or logs (curves, shift).
All write OUT.csv and OUT.md, most OUT.png; official and scripted bots have separate files.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import Above, Amount, Count, Positive, Seed, UsageError, as_flag

import numpy as np
import torch
import tyro
from annotated_types import Interval, MinLen

import experiments.compare as compare
import experiments.scenario_table as tables
from envs.meltingpot.episodes import play_pairs
from envs.meltingpot.scenarios import PAPER, find_scenarios
from envs.meltingpot.tiles import WorldError
from envs.statistics import markdown_table, student_interval
from experiments.plots import plt
from experiments.runs import (
    Job,
    Run,
    Runs,
    as_words,
    beside,
    check_kind,
    check_out,
    difference,
    finish,
    kind_of,
    load_script,
    method_of,
    read_runs,
    run_subcommand,
    script_args,
    script_file,
    train_all,
    training_flags,
    without_seed,
)

SCRIPT = "bidist_mappo_meltingpot"
Several = Annotated[int, Interval(ge=2)]


# --- What is read ---------------------------------------------------------------------------------


def read_in_substrates(paths: Iterable[Path], only: tuple[str, ...] = ()) -> list[Run]:
    """The runs in directories and packed studies, chosen as by read_runs(). UsageError for runs in
    other worlds."""
    runs = read_runs(paths, only)
    for run in runs:
        if "substrate" not in run.args:
            raise UsageError(f"{run.where} is of {run.args['script']}.py, which has no substrate.")
    return runs


def seats_in(substrate: str) -> int:
    """The number of agents in a substrate of Melting Pot or in the toy; UsageError for others."""
    from envs.meltingpot.worlds import get_spec

    try:
        return 2 if substrate == "toy" else get_spec(substrate).num_agents
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from None


# --- Variants: Figs. 6, 8, C.1 and C.2 ------------------------------------------------------------

SELF_PLAY = "self-play"  # row of the evaluation that is used if there are no scenarios


@dataclasses.dataclass(frozen=True)
class Variants:
    """Options that Figs. 6, 8, C.1 and C.2 have in common."""

    runs: tuple[Path, ...] | None = None  # runs to compare; default: train what the figure needs
    substrate: str = "pure_coordination_in_the_matrix__repeated"  # substrate to train in
    total_timesteps: Positive = 10_000_000  # environment steps of each run
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of each variant
    only: tuple[str, ...] = ()  # variants to train, default: all; with --runs patterns of names
    runs_dir: Path | None = None  # parent directory of the runs; default: runs/{figure}
    jobs: Positive = 1  # runs to train at the same time
    dry_run: bool = False  # print the commands and train nothing
    extra: tyro.conf.Suppress[tuple[str, ...]] = ()  # the script's flags, after --extra
    quantity: Literal["return_per_1000", "return"] = "return_per_1000"  # quantity to compare
    out: Path | None = None  # common beginning of the files' names; default: the figure's name


@dataclasses.dataclass(frozen=True)
class Fig6(Variants):
    """Fig. 6: the reverse phase maximises KL or entropy, draws phi anew, or adds noise."""


@dataclasses.dataclass(frozen=True)
class Fig8(Variants):
    """Fig. 8: BiDist, v = 0, without reverse distillation, without any, and RPM."""


@dataclasses.dataclass(frozen=True)
class C1(Variants):
    """Fig. C.1: distilled networks of smaller width."""


@dataclasses.dataclass(frozen=True)
class C2(Variants):
    """Fig. C.2: distillation intervals."""


FIGURES: dict[type, dict[str, dict[str, Any]]] = {  # {figure: {variant: its flags}}
    Fig6: {
        mode: {"reverse_mode": mode, "forward": True, "reverse": True}
        for mode in ("kl", "entropy", "random", "noise")
    },
    Fig8: {
        "full": {"all_fictitious": False, "forward": True, "reverse": True},
        "v0": {"all_fictitious": True, "forward": True, "reverse": True},
        "no-reverse": {"all_fictitious": False, "forward": True, "reverse": False},
        "no-distillation": {"all_fictitious": False, "forward": False, "reverse": False},
        "RPM": {},
    },
    C1: {f"width-{x:g}": {"distilled_width": x} for x in (1.0, 0.7, 0.5, 0.3, 0.1)},
    C2: {f"kd-{x}": {"k_d": x} for x in (1, 3, 5, 10, 20, 40)},
}
LABELS = {  # the paper's names of variants, where they differ from ours
    "full": "BiDist",
    "v0": "v = 0",
    "no-reverse": "+F, -R",
    "no-distillation": "-F, -R",
    **{key: key.replace("-", " ") for key in FIGURES[C1]},
    **{key: key.replace("kd-", "k_d = ") for key in FIGURES[C2]},
}


def name_of(study: Variants) -> str:
    """The name of the subcommand: "fig6", "fig8", "c1" or "c2"."""
    return type(study).__name__.lower()


def script_of(variant: str) -> str:
    """The script that trains a variant."""
    return "rpm_meltingpot" if variant == "RPM" else SCRIPT


def flags_of(script: str, given: dict[str, Any]) -> list[str]:
    """Flags of a script as words of a command line, without those that are the defaults."""
    defaults = load_script(script).Args
    flags = {name: x for name, x in given.items() if x != getattr(defaults, name)}
    return [word for pair in as_words(flags) for word in pair.split()]


def jobs_of(study: Variants) -> list[Job]:
    """All runs to train, seed by seed; UsageError for unknown variants, no seeds or wrong flags."""
    variants = FIGURES[type(study)]
    if unknown := set(study.only) - set(variants):
        have = ", ".join(variants)
        raise UsageError(f"{name_of(study)} trains no variant {min(unknown)}: there are {have}.")
    if not study.seeds:
        raise UsageError("--seeds names none.")
    if ":" not in study.substrate:
        seats_in(study.substrate)  # raises if there is no such substrate
    root = (study.runs_dir or Path("runs") / name_of(study)).resolve()
    chosen = [key for key in variants if key in (study.only or variants)]
    jobs = []
    for seed, key in itertools.product(dict.fromkeys(study.seeds), chosen):
        own, script = {"substrate": study.substrate} | variants[key], script_of(key)
        job = Job(
            run=root / f"{key}-s{seed}",
            script=script_file(script),
            flags=(*flags_of(script, own), *study.extra),
            seed=seed,
            timesteps=study.total_timesteps,
        )
        check_extra(job, study.extra, own, "the figure's")
        jobs.append(job)
    return jobs


RESERVED = ("seed", "total_timesteps", "run_dir", "resume", "eval_only")  # each job has its own


def check_extra(job: Job, extra: tuple[str, ...], own: Iterable[str], whose: str) -> Any:
    """The job's Args. UsageError for flags after --extra that its script refuses, and for those
    that the study itself sets (own) or every job has, whatever their values."""
    given = {word.partition("=")[0].replace("_", "-") for word in extra}
    for name in (*own, *RESERVED):
        if {as_flag(name), as_flag(f"no_{name}")} & given:
            raise UsageError(f"{as_flag(name)} is {whose} own: not after --extra.")
    return script_args(load_script(Path(job.script).stem), job.argv())


class Score(NamedTuple):
    """The return of one run in one scenario, or in self-play."""

    variant: str
    run: str
    seed: int
    row: str  # SC0, ... or "self-play"
    bots: str  # official or scripted; "" in self-play
    timesteps: int  # environment steps of training
    mean: float
    low: float  # 95 % interval over episodes
    high: float


def variant_of(args: dict[str, Any], study: Variants, where: str) -> str:
    """The figure's variant that a run's arguments make; UsageError if there is none."""
    for key, flags in FIGURES[type(study)].items():
        if args["script"] == script_of(key) and all(
            args.get(name) == x for name, x in flags.items()
        ):
            return key
    raise UsageError(f"{where} is {method_of(args)}, no variant of {name_of(study)}.")


def check_seeds(variant: str, others: list[Run], run: Run) -> None:
    """Raise UsageError if a run is no further seed of a variant's others; lengths may differ."""
    for other in others:
        if reason := difference(other, run, lengths=False):
            both = f"{other.where} and {run.where} would count as two seeds of {variant}"
            raise UsageError(f"{both}, but {reason}: choose with --only.")


def read_scores(run: Run, variant: str, quantity: str) -> list[Score]:
    """A run's last evaluation in scenarios and, if the run has finished, in self-play."""
    scores = []
    about = {"variant": variant, "run": run.name, "seed": run.args["seed"]}
    for cell in tables.read_cells(run, variant):
        low, high = tables.interval([cell], quantity)
        scores.append(
            Score(
                **about,
                row=cell.scenario,
                bots=cell.bots,
                timesteps=cell.timesteps,
                mean=tables.mean([cell], quantity),
                low=low,
                high=high,
            )
        )
    if row := run.summary["eval"].get(SELF_PLAY):
        scores.append(
            Score(
                **about,
                row=SELF_PLAY,
                bots="",
                timesteps=run.summary["timesteps"],
                mean=row[quantity],
                low=row[f"{quantity}_low"],
                high=row[f"{quantity}_high"],
            )
        )
    return scores


def read_progress(run: Run, row: str, quantity: str) -> list[tuple[int, float]]:
    """Evaluations during training in one row: (environment steps, mean) of each."""
    name = f"eval/{row}/{quantity}"
    return [(x["timesteps"], x[name]) for x in run.log if name in x]


def pooled(scores: list[Score]) -> tuple[float, float, float]:
    """The mean over a variant's runs and its 95 % interval over runs (Student's), NaN with fewer
    than five runs."""
    mean = float(np.mean([score.mean for score in scores]))
    if len(scores) < tables.SEEDS:
        return mean, np.nan, np.nan
    return mean, *student_interval(np.array([score.mean for score in scores]))


def rows_of(scores: list[Score], study: Variants) -> list[dict[str, Any]]:
    """The rows of the CSV: per scenario and variant one with its mean (run: ""), then its runs."""
    rows = []
    places = sorted({score.row for score in scores}, key=lambda row: (len(row), row))
    for place, variant in itertools.product(places, FIGURES[type(study)]):
        own = [score for score in scores if (score.row, score.variant) == (place, variant)]
        if not own:
            continue
        where = dict(row=place, bots=own[0].bots, variant=variant)
        steps = tables.span(score.timesteps for score in own)
        figures = dict(zip(("mean", "low", "high"), pooled(own)))
        rows.append(where | dict(run="", seed="", timesteps=steps) | figures | {"runs": len(own)})
        for score in own:
            run = dict(run=score.run, seed=score.seed, timesteps=f"{score.timesteps:,}")
            figures = dict(mean=score.mean, low=score.low, high=score.high, runs=1)
            rows.append(where | run | figures)
    return rows


def notes_on(runs: list[Run], scores: list[Score], study: Variants) -> list[str]:
    """Warnings for the reader: runs differ in steps or other flags, or met no scenarios."""
    notes = []
    steps = {s.run: max(x.timesteps for x in scores if x.run == s.run) for s in scores}
    if len(set(steps.values())) > 1:
        each = "; ".join(f"{run}: {n:,}" for run, n in steps.items())
        notes.append(f"the runs were not trained for the same number of steps ({each}).")
    compared = {name for flags in FIGURES[type(study)].values() for name in flags}
    known = set.intersection(*({*run.args} for run in runs)) - compared  # flags of all scripts
    others = set()
    for run in runs:
        flags = training_flags({k: x for k, x in run.args.items() if k in known})
        others.add(tuple(sorted((k, str(x)) for k, x in flags.items())))
    if len(others) > 1:
        shared = set.intersection(*map(set, others))
        differ = {as_flag(k) for k, _ in set().union(*others) - shared}
        flags = ", ".join(sorted(differ))
        notes.append(f"the runs differ in more than what is compared here: {flags}.")
    if not any(score.bots for score in scores):
        notes.append(
            "none of these runs was evaluated beside scenarios"
            f" ({runs[0].args['substrate']}), so this is {SELF_PLAY}, which says"
            " little about unseen co-players."
        )
    return notes


def draw_bars(axis: Any, rows: list[dict], variants: list[str]) -> None:
    """Draw a bar per variant and a dot per run. Lines are intervals, of the bar or of the dots."""
    for x, variant in enumerate(variants):
        own = [row for row in rows if row["variant"] == variant]
        if not own:
            where = {"transform": axis.get_xaxis_transform(), "rotation": 90, "fontsize": 8}
            axis.text(x, 0.05, "not run", ha="center", va="bottom", color="grey", **where)
            continue
        bar, *dots = own
        axis.bar(x, bar["mean"], 0.75, color=f"C{x}", alpha=0.45)
        if not np.isnan(bar["low"]):
            axis.plot([x, x], [bar["low"], bar["high"]], color="black", lw=2)
        for i, dot in enumerate(dots):
            at = x + 0.5 * ((i + 0.5) / len(dots) - 0.5)
            if np.isnan(bar["low"]):
                axis.plot([at, at], [dot["low"], dot["high"]], color=f"C{x}", lw=1)
            axis.plot(at, dot["mean"], "o", color=f"C{x}", ms=4, mec="black", mew=0.4)
    axis.set_xticks(range(len(variants)), [LABELS.get(v, v) for v in variants], rotation=30)
    axis.set_xlim(-0.6, len(variants) - 0.4)
    axis.grid(axis="y", alpha=0.3)
    axis.tick_params(labelsize=8)


def draw_progress(axis: Any, curves: dict[str, list[list[tuple]]], variants: list[str]) -> None:
    """Draw a thin line per run, and for each variant the mean where all its runs have a point."""
    for x, variant in enumerate(variants):
        members = [points for points in curves.get(variant, []) if points]
        for points in members:
            style = {"alpha": 0.35, "lw": 0.8, "marker": ".", "ms": 3}
            axis.plot([t / 1000 for t, _ in points], [y for _, y in points], color=f"C{x}", **style)
        if members:
            shared = sorted(set.intersection(*({t for t, _ in points} for points in members)))
            means = [np.mean([dict(points)[t] for points in members]) for t in shared]
            axis.plot(np.array(shared) / 1000, means, color=f"C{x}")
    axis.set_xlabel("thousand environment steps", fontsize=8)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)


def read_curves(
    runs: list[Run], place: str, bots: str, study: Variants
) -> dict[str, list[list[tuple]]]:
    """{variant: read_progress() of each of its runs} in one scenario or in self-play."""
    curves: dict[str, list[list[tuple]]] = defaultdict(list)
    for run in runs:
        row = f"{place} {bots}" if bots else place
        points = read_progress(run, row, study.quantity)
        curves[variant_of(run.args, study, run.where)].append(points)
    return curves


def draw_variants(rows: list[dict], runs: list[Run], bots: str, study: Variants) -> Any:
    """A panel of bars per scenario; below it curves, if evaluations in training were logged."""
    variants, places = list(FIGURES[type(study)]), list(dict.fromkeys(row["row"] for row in rows))
    curves = {place: read_curves(runs, place, bots, study) for place in places}
    logged = any(points for row in curves.values() for own in row.values() for points in own)
    lines, columns = 1 + logged, len(places)
    width = max(2.6, 0.42 * len(variants) + 0.5)
    size = (max(5.0, width * columns + 0.6), 2.9 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for column, place in enumerate(places):
        draw_bars(axes[0][column], [row for row in rows if row["row"] == place], variants)
        axes[0][column].set_title(place, fontsize=10)
        if logged:
            draw_progress(axes[1][column], curves[place], variants)
    for line in axes:
        label = tables.QUANTITIES[study.quantity].replace(" per", "\nper", 1)
        line[0].set_ylabel(label, fontsize=9)
    substrate = runs[0].args["substrate"]
    beside_whom = f"{bots} bots" if bots else SELF_PLAY
    title = f"{substrate}, {beside_whom}\ndots: runs; lines: 95 % intervals"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def text_of_variants(rows: list[dict], notes: list[str], study: Variants) -> str:
    """OUT.md: a table per scenario with a line per variant and, below five runs, per run."""
    what = tables.QUANTITIES[study.quantity]
    places = dict.fromkeys((row["row"], row["bots"]) for row in rows)
    parts = [f"# {type(study).__doc__.rstrip('.')}\n", f"{what.capitalize()}.\n"]
    parts += [f"Note: {note}\n" for note in notes]
    for row, bots in places:
        parts.append(f"## {row}{f', {bots} bots' if bots else ''}\n")
        lines = []
        for variant in FIGURES[type(study)]:
            label = LABELS.get(variant, variant)
            own = [r for r in rows if (r["row"], r["bots"], r["variant"]) == (row, bots, variant)]
            if not own:
                cells = (label, "", "", "not run")
                lines.append(dict(zip(("variant", "run", "steps", what), cells)))
                continue
            shown = [r for r in own if not r["run"] or len(own) - 1 < tables.SEEDS]
            for r in shown:
                text = f"{r['mean']:.1f}"
                text += "" if np.isnan(r["low"]) else f" [{r['low']:.1f}, {r['high']:.1f}]"
                cells = (label, r["run"] or f"mean of {r['runs']}", r["timesteps"], text)
                lines.append(dict(zip(("variant", "run", "steps", what), cells)))
        parts.append(markdown_table(lines))
    return "\n".join(parts)


def compare_variants(study: Variants) -> None:
    """Train the runs if none are given, then write a set of files for each kind of bots."""
    if study.runs == ():  # as of a pattern that matches nothing: no reason to train for days
        raise UsageError("--runs names none.")
    if study.runs and study.extra:
        raise UsageError("--extra is for runs to train, and --runs names finished ones.")
    out = study.out or Path(name_of(study))
    paths = list(study.runs or ())
    if not study.dry_run:
        check_out(out)
    if study.runs is None:
        jobs = jobs_of(study)
        train_all(jobs, study.jobs, study.dry_run)
        paths = [job.run for job in jobs]
    if study.dry_run:
        return
    runs, scores = read_in_substrates(paths, study.only if study.runs else ()), []
    if len({run.args["substrate"] for run in runs}) > 1:
        name = name_of(study)
        raise UsageError(f"{name} compares runs on one substrate, and these are on several.")
    members: dict[str, list[Run]] = defaultdict(list)  # of each variant
    for run in runs:
        variant = variant_of(run.args, study, run.where)
        check_seeds(variant, members[variant], run)
        members[variant].append(run)
        own = read_scores(run, variant, study.quantity)
        if not own:
            raise UsageError(f"{run.where} has no final evaluation yet.")
        scores += own
    notes = notes_on(runs, scores, study)
    kinds = sorted({score.bots for score in scores} - {""}) or [""]
    for bots in kinds:
        rows = rows_of([score for score in scores if score.bots == bots], study)
        place = out if len(kinds) == 1 else beside(out, f"-{bots}")
        figure = draw_variants(rows, runs, bots, study)
        finish(place, text_of_variants(rows, notes, study), rows, figure)


def fig6(study: Fig6) -> None:
    """Make Fig. 6."""
    compare_variants(study)


def fig8(study: Fig8) -> None:
    """Make Fig. 8."""
    compare_variants(study)


def c1(study: C1) -> None:
    """Make Fig. C.1."""
    compare_variants(study)


def c2(study: C2) -> None:
    """Make Fig. C.2."""
    compare_variants(study)


# --- Table 1 and cross-play -----------------------------------------------------------------------

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> script, flags
    "bidist": (SCRIPT, {"clip_centre": "old"}),
    "bidist-printed": (SCRIPT, {"clip_centre": "printed"}),  # the letter of Eq. (9)
    **{name: (f"{name}_meltingpot", {}) for name in ("mappo", "randnet", "opre", "pp", "rpm")},
}


@dataclasses.dataclass(frozen=True)
class Table1:
    """Table 1: all six methods, BiDist with either centre of its clip, at equal steps."""

    substrates: tuple[str, ...] = PAPER  # of the runs to train
    total_timesteps: Positive = 10_000_000  # of each
    seeds: tuple[Seed, ...] = (1, 2, 3)  # of each method on each substrate
    only: tuple[str, ...] = ()  # methods to train, by their names; default: all
    runs_dir: Path = Path("runs/table1")  # they go to RUNS_DIR/{substrate}-{method}-s{seed}
    jobs: Positive = 1  # trained at the same time
    dry_run: bool = False  # print the commands and do nothing
    extra: tyro.conf.Suppress[tuple[str, ...]] = ()  # flags of all scripts after --extra
    out: Path = Path("table1")  # writes OUT.md, OUT.csv and OUT.png


def jobs_of_table(study: Table1) -> list[Job]:
    """All runs of the table, by seed, then by substrate: a stopped study has whole comparisons.
    UsageError for unknown methods, or flags that a script refuses."""
    if unknown := set(study.only) - set(METHODS):
        raise UsageError(f"--only {min(unknown)}: there are {', '.join(METHODS)}.")
    if not study.seeds or not study.substrates:
        raise UsageError("--seeds and --substrates must name one or more.")
    seeds, substrates = dict.fromkeys(study.seeds), dict.fromkeys(study.substrates)
    for substrate in substrates:
        seats_in(substrate)  # raises if there is no such substrate
    jobs = []
    for seed, substrate in itertools.product(seeds, substrates):
        for method, (script, flags) in METHODS.items():
            if study.only and method not in study.only:
                continue
            words = [word for pair in as_words(flags) for word in pair.split()]
            job = Job(
                run=study.runs_dir.resolve() / f"{substrate}-{method}-s{seed}",
                script=script_file(script),
                flags=("--substrate", substrate, *words, *study.extra),
                seed=seed,
                timesteps=study.total_timesteps,
            )
            args = check_extra(job, study.extra, {"substrate": substrate} | flags, "the table's")
            check_evaluated(job, args)
            jobs.append(job)
    return jobs


def check_evaluated(job: Job, args: Any) -> None:
    """UsageError if the run would end without what the table is made of, found before training."""
    if not args.final_episodes:
        raise UsageError(f"{job.run.name}: --final-episodes 0 leaves nothing for the table.")
    try:
        names, _ = find_scenarios(args)
    except WorldError as error:
        raise UsageError(f"{job.run.name}: {error}") from None
    if not names:
        raise UsageError(
            f"{job.run.name} would be evaluated in no scenario, and the table is of those."
        )


def table1(study: Table1) -> None:
    """Train the runs that are missing, then write their table as scenario_table.py does."""
    if not study.dry_run:
        check_out(study.out)
    jobs = jobs_of_table(study)
    train_all(jobs, study.jobs, study.dry_run)
    if not study.dry_run:
        tables.tabulate(tables.Study(runs=tuple(job.run for job in jobs), out=study.out))


@dataclasses.dataclass(frozen=True)
class CrossPlay:
    """Cross-play: each run's actors play with every other run's, the simplest unseen co-players."""

    runs: Runs  # two or more runs of the six methods, all in one substrate
    episodes: Positive = 20  # episodes of each pair of runs
    num_focal: Count = 0  # seats of the focal run; 0: all but one
    num_envs: Positive = 16  # parallel worlds
    num_workers: Count = 0  # processes that step worlds; 0: one per core
    seed: Seed = 1  # seed of worlds, seats and actions
    out: Path = Path("cross_play")  # common beginning of the names of the .csv and .md files


def cross_play(study: CrossPlay) -> None:
    """Play each pair of runs, one in the focal seats and one in the background; write the files."""
    check_out(study.out)
    runs = read_in_substrates(study.runs)
    substrates = {run.args["substrate"] for run in runs}
    if len(substrates) > 1 or len(runs) < 2:
        raise UsageError("cross-play needs two runs or more, all on one substrate.")
    args = script_args(load_script(SCRIPT), ["--substrate", *substrates])
    args = dataclasses.replace(args, num_workers=study.num_workers)
    limits = {run.args.get("max_episode_steps", 0) for run in runs}
    if ":" in args.substrate and 0 not in limits:  # worlds of your own may have no other end
        args = dataclasses.replace(args, max_episode_steps=max(limits))
    rng = np.random.default_rng(study.seed)
    rows = []
    worlds = min(study.num_envs, study.episodes)
    try:
        with load_script(SCRIPT).make_envs(args, worlds, study.seed) as envs:
            if study.num_focal >= (seats := envs.spec.num_agents) > 1:
                sentence = f"--num-focal {study.num_focal} of {seats} seats leaves none"
                raise UsageError(f"{sentence} to a co-player.")
            for run in runs:  # all of them before the first pair plays
                harness.load_checkpoint(str(run.path), quiet=True)
            for focal, background in itertools.product(runs, runs):
                rows.append(play_pair(focal, background, envs, study, rng))
                row = rows[-1]
                text = f"{row['focal']} beside {row['background']}"
                harness.tell(f"{text}: {row['return_per_1000']:.1f} per 1,000 steps")
    except WorldError as error:
        raise UsageError(str(error)) from None
    finish(study.out, text_of_cross_play(rows), rows)


def play_pair(
    focal: Run, background: Run, envs: Any, study: CrossPlay, rng: np.random.Generator
) -> dict[str, Any]:
    """Play one pair and return a row of OUT.csv. A run paired with itself is in self-play."""
    players = []
    for run in (focal, background):
        script = load_script(run.args["script"])
        seed = int(rng.integers(2**31))
        players.append(script.load_player(str(run.path), envs, seed=seed))
    alone = focal is background
    (summary,) = play_pairs(
        envs,
        {"": (players[0], None if alone else players[1])},
        num_focal=study.num_focal or max(1, envs.spec.num_agents - 1),
        episodes=study.episodes,
        rng=rng,
    ).values()
    about = {
        "focal": focal.name,
        "focal_method": method_of(focal.args),
        "background": background.name,
        "background_method": method_of(background.args),
    }
    for name in ("background_return", "background_return_low", "background_return_high"):
        summary.setdefault(name, np.nan)  # self-play has no background players
    return about | summary


def text_of_cross_play(rows: list[dict[str, Any]]) -> str:
    """OUT.md: a table with a line per focal run and a column per background run; then each method's
    mean over pairs of different runs, with its interval over seeds or, below five, each run's."""
    names = list(dict.fromkeys(row["background"] for row in rows))
    found = {(row["focal"], row["background"]): row for row in rows}
    lines = []
    for focal in names:
        line = {"return per 1,000 steps of": focal}
        for name in names:
            mean = f"{found[focal, name]['return_per_1000']:.1f}"
            line[f"beside {name}"] = f"({mean})" if name == focal else mean
        lines.append(line)
    means = []
    for method in dict.fromkeys(row["focal_method"] for row in rows):
        of_runs: dict[str, list[float]] = defaultdict(list)  # {focal run: its returns with others}
        for row in rows:
            if row["focal_method"] == method and row["focal"] != row["background"]:
                of_runs[row["focal"]].append(row["return_per_1000"])
        x = np.array([np.mean(values) for values in of_runs.values()])
        text, each = f"{x.mean():.1f}", ""
        if len(x) >= tables.SEEDS:
            low, high = student_interval(x)
            text += f" [{low:.1f}, {high:.1f}]"
        else:
            each = "; ".join(f"{run}: {y:.1f}" for run, y in zip(of_runs, x))
        line = {"method": method, "beside all other runs": text, "seeds": len(x)}
        means.append(line | {"each run": each})
    note = f"In brackets: self-play. Intervals are over seeds, from {tables.SEEDS} on.\n"
    return "\n".join([markdown_table(lines), markdown_table(means), note])


# --- Curves over theta's own samples --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curves:
    """A scalar over environment steps, over theta's samples, and over the samples of worlds where
    all agents play theta: does a method learn less because theta has fewer samples?"""

    runs: Runs  # run directories and packed studies to read
    scalar: str = "eval/self-play/return"  # name of the logged scalar to draw
    every: Positive = 20_000  # environment steps per window; each window is one point
    out: Path = Path("curves")  # common beginning of the names of the .png, .csv and .md files


def theta_shares(args: dict[str, Any]) -> tuple[float, float]:
    """The expected share of agents that play theta, and of worlds in which all agents do."""
    agents = seats_in(args["substrate"])
    q = args.get("history_share", 0.0)  # PP, RPM
    if kind_of(args["script"]) == SCRIPT:
        script = load_script(args["script"])
        fields = {field.name for field in dataclasses.fields(script.Args)}
        own = script.Args(**{name: x for name, x in args.items() if name in fields})
        if own.all_fictitious:
            return 0.0, 0.0
        q = script.fictitious_probability(own, agents)
    return 1 - (q - q**agents / agents), (1 - q) ** agents


def curves(study: Curves) -> None:
    """Read the curves of all runs, then write OUT.png, OUT.csv and OUT.md."""
    check_out(study.out)
    runs = read_in_substrates(study.runs)
    rows = []
    for run in runs:
        if ":" in run.args["substrate"]:
            raise UsageError(f"{run.where} is in a world of your own, whose seats are not known.")
        theta, everybody = theta_shares(run.args)
        points = compare.read_curves(run, (study.scalar,), study.every)[study.scalar]
        if not any(study.scalar in scalars for scalars in run.log):
            raise UsageError(f"--scalar {study.scalar}: {run.where} has none of that name.")
        if not points:
            raise UsageError(f"--every {study.every} is more than {run.where} has trained.")
        for end, value in points:
            row = {"run": run.name, "timesteps": end, "theta_samples": round(theta * end)}
            row |= {"all_theta_samples": round(everybody * end), "value": value}
            rows.append(row)
    lines = []
    for run in runs:
        own = [row for row in rows if row["run"] == run.name]
        lines.append(own[-1] | {"value": f"{own[-1]['value']:.1f}"})
    text = f"The last point of {study.scalar}:\n\n{markdown_table(lines)}"
    finish(study.out, text, rows, draw_samples_axes(rows, study.scalar))


def draw_samples_axes(rows: list[dict[str, Any]], scalar: str) -> Any:
    """A figure of the scalar over each of three counts of samples, a colour per group of seeds."""
    titles = {
        "timesteps": "environment steps",
        "theta_samples": "steps of agents that play theta, per seat",
        "all_theta_samples": "steps of worlds where all play theta",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), sharey=True)
    groups = list(dict.fromkeys(without_seed(row["run"]) for row in rows))
    for axis, (count, title) in zip(axes, titles.items(), strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            own = [row for row in rows if row["run"] == run]
            group = without_seed(run)
            first = next(row for row in rows if without_seed(row["run"]) == group)
            label = group if own[0] is first else None
            x = np.array([row[count] for row in own]) / 1000
            y = [row["value"] for row in own]
            axis.plot(x, y, color=f"C{groups.index(group)}", lw=1.2, label=label)
        axis.set_xlabel(f"thousand {title}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(scalar, fontsize=8)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


# --- Networks on a rollout ------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A run's newest checkpoint and new worlds to play it in."""

    script: Any
    args: Any
    envs: Any
    agent: Any
    rngs: dict[str, torch.Generator]  # by name: "rng" of the script, "method_rng" of its method
    memory: Any  # of PP and RPM: past actors; else None
    timesteps: int  # environment steps of the checkpoint

    def check(self) -> None:
        """UsageError if the script refuses these arguments: with few worlds, a rollout may have
        fewer chunks than minibatches. Nothing is trained, so any number of steps will do."""
        harness.check(self.script.validate(dataclasses.replace(self.args, eval_only="this run")))

    def play(self, state: Any) -> tuple[Any, Any]:
        """One rollout of the training population, and the state after it."""
        wanted = inspect.signature(self.script.collect).parameters
        past = [] if self.memory is None else [self.memory]
        if hasattr(self.script, "draw_psi"):  # RandNet: it is drawn for each rollout in train()
            self.agent.psi = self.script.draw_psi(self.args, self.rngs["method_rng"])
        rngs = {name: rng for name, rng in self.rngs.items() if name in wanted}
        return self.script.collect(self.args, self.envs, self.agent, *past, state, **rngs)

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[torch.Tensor]]:
        """Context with a list that gets, for each step of PP and RPM, the log-probabilities
        (B, N, A) of the policies that act, theta's or a past actor's."""
        steps, act_past = [], getattr(self.script, "act_past", None)

        def noted(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            acting, hidden = act_past(*args)
            steps.append(acting)
            return acting, hidden

        with contextlib.ExitStack() as stack:
            if act_past:
                stack.callback(setattr, self.script, "act_past", act_past)
                self.script.act_past = noted
            yield steps

    def last_of(self, rollouts: int) -> tuple[Any, Any]:
        """Play several rollouts from a new state; return the last one and the state after it."""
        state = self.script.new_state(self.agent, self.args.num_envs)
        for _ in range(rollouts):
            batch, state = self.play(state)
        return batch, state

    @torch.no_grad()
    def policy(self, net: Any, batch: Any, hidden: torch.Tensor) -> torch.Tensor:
        """A network's action probabilities (T, B, N, A) in a rollout that it replays from the first
        of its hidden states (C, B, N, S), which are stored at the beginning of each chunk."""
        views = batch.actor_views()
        logits, _, _ = self.script.replay(self.args, net, views, hidden[0], self.agent.sprites)
        return logits.softmax(-1)


@contextlib.contextmanager
def loaded(run: Run, num_envs: int, seed: int, checkpoint: Path | None = None) -> Iterator[Loaded]:
    """Context with a run's script, arguments and agent of `checkpoint`, or else of the newest, and
    with new worlds."""
    script = load_script(run.args["script"])
    source = str(checkpoint or run.path)
    try:
        args = harness.saved_args(source, script.Args)
        args = dataclasses.replace(args, num_envs=num_envs, device="cpu")
        saved, _ = harness.load_checkpoint(source)
        harness.refuse_weights_only(saved, source)
        with script.make_envs(args, num_envs, seed + 10**6) as envs:
            agent = script.Agent(args, envs, torch.device("cpu"))
            harness.restore(agent, saved["agent"], source)
            seeds = {"rng": seed, "method_rng": seed + 1}
            rngs = {name: torch.Generator().manual_seed(x) for name, x in seeds.items()}
            memory = None
            if hasattr(script, "new_memory"):
                memory = script.new_memory(args)
                if "memory" not in saved:  # weights only
                    raise UsageError(f"{source} holds no past actors.")
                harness.restore(memory, saved["memory"], source)
            envs.reset()
            yield Loaded(script, args, envs, agent, rngs, memory, saved["timesteps"])
    except WorldError as error:
        raise UsageError(str(error)) from None


# --- Fig. 7 ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fig7:
    """Fig. 7: the joint probabilities pi_phi x pi_theta after one reverse phase of each kind."""

    run: Annotated[Path, tyro.conf.Positional]  # a run of bidist_mappo_meltingpot.py
    observation: int | None = None  # index into the T B N observations; default: theta surest
    start: Literal["lagged", "near"] = "lagged"  # phi as saved, or after one more forward phase
    reverse_lr: Above | None = None  # learning rate of the reverse phase; default: the run's
    reverse_epochs: Count | None = None  # epochs of the reverse phase; default: the run's
    noise_std: Amount | None = None  # standard deviation of the noise; default: the run's
    num_envs: Positive = 16  # parallel worlds of the rollout
    warm_up: Count = 1  # rollouts to play before it, so that episodes are under way
    seed: Seed = 1  # seed of worlds, actions, shuffling, noise and new weights
    out: Path = Path("fig7")  # common beginning of the names of the .png, .csv and .md files


MODES = ("before", "kl", "entropy", "random", "noise")


class Phases(NamedTuple):
    """One reverse phase of each kind, each applied to the same phi."""

    about: dict[str, Any]  # facts about the run, and the options of the phases
    theta: np.ndarray  # (S, A) theta's probabilities in the rollout's S = T B N observations
    phis: dict[str, np.ndarray]  # {mode of MODES: phi's probabilities (S, A)}
    scalars: dict[str, dict[str, float]]  # {mode: what the phase logs, as KL before and after}


def reverse_phases(study: Fig7) -> Phases:
    """Play a rollout, then apply one reverse phase of each kind to a copy of phi."""
    run = Run(study.run)
    check_kind(run, SCRIPT)  # others have no phi
    with loaded(run, study.num_envs, study.seed) as found:
        found.check()
        batch, state = found.last_of(study.warm_up + 1)
        script, agent = found.script, found.agent
        options = {"forward": True, "reverse": True}
        for name in ("reverse_lr", "reverse_epochs", "noise_std"):
            if getattr(study, name) is not None:
                options[name] = getattr(study, name)
        args = dataclasses.replace(found.args, **options)

        def distill(phase_args: Any, phase: str) -> dict[str, Any]:
            rng = torch.Generator().manual_seed(study.seed)
            scalars, _ = script.distill(phase_args, agent, batch, state, phase=phase, rng=rng)
            return {k.removeprefix(f"{phase}/"): float(x) for k, x in scalars.items()}

        if study.start == "near":
            distill(args, "forward")
        theta = found.policy(agent.actor, batch, batch.actor_hidden)
        start, scalars = agent.distilled, {}
        phis = {"before": found.policy(start, batch, batch.distilled_hidden)}
        for mode in MODES[1:]:
            agent.distilled = copy.deepcopy(start)
            agent.args = phase_args = dataclasses.replace(args, reverse_mode=mode)
            scalars[mode] = distill(phase_args, "reverse")
            phis[mode] = found.policy(agent.distilled, batch, batch.distilled_hidden)
        about = {"actions": found.envs.spec.actions, "timesteps": found.timesteps}
        for name in ("reverse_lr", "reverse_epochs", "noise_std", "substrate"):
            about[name] = getattr(args, name)
    flat = {mode: x.flatten(0, -2).double().numpy() for mode, x in phis.items()}
    return Phases(about, theta.flatten(0, -2).double().numpy(), flat, scalars)


def logged(phases: Phases, mode: str) -> dict[str, float]:
    """Means over the rollout after a phase of this mode; "before": before it (same for all)."""
    found, when = (phases.scalars["kl"], "before")
    if mode != "before":
        found, when = phases.scalars[mode], "after"
    return {name: found[f"{name}_{when}"] for name in ("kl", "shift", "phi_prefers", "phi_peak")}


def joint(theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """The mean over S observations of pi_theta x pi_phi, from two (S, A): (A, A), rows theta."""
    return np.einsum("sa,sb->ab", theta, phi) / len(theta)


def min_max(x: np.ndarray) -> np.ndarray:
    """x scaled to [0, 1]; zeros if all entries are equal."""
    return (x - x.min()) / (np.ptp(x) or 1)


class HeatMap(NamedTuple):
    """One panel of Fig. 7."""

    mode: str  # one of MODES
    of: str  # "mean", or e.g. "observation 7"
    title: str
    joint: np.ndarray  # (A, A) joint probabilities, rows: theta's actions


def heat_maps(phases: Phases, chosen: int) -> list[HeatMap]:
    """Two heat maps per mode: for the chosen observation, and the mean over all observations."""
    maps, theta = [], phases.theta
    for mode, phi in phases.phis.items():
        best, means = phi[chosen].argmax(), logged(phases, mode)
        kl = float((theta[chosen] * np.log(theta[chosen] / phi[chosen])).sum())
        title = f"{mode}\nφ prefers {best + 1} ({phi[chosen, best]:.2f}), KL {kl:.3g}"
        one = joint(theta[[chosen]], phi[[chosen]])
        maps.append(HeatMap(mode, f"observation {chosen}", title, one))
        title = f"shift {means['shift']:.2f}, KL {means['kl']:.3g}"
        maps.append(HeatMap(mode, "mean", title, joint(theta, phi)))
    return maps


def rows_of_maps(maps: list[HeatMap]) -> list[dict[str, Any]]:
    """The rows of the CSV, one per cell of a heat map."""
    rows = []
    for x in maps:
        scaled = min_max(x.joint)
        for (a, b), p in np.ndenumerate(x.joint):
            row = dict(phi=x.mode, of=x.of, theta_action=a + 1, phi_action=b + 1)
            rows.append(row | dict(probability=float(p), normalised=float(scaled[a, b])))
    return rows


def preference(probs: np.ndarray) -> str:
    """Theta's preferred action and its probability, as "θ prefers 3 (0.91)"."""
    return f"θ prefers {probs.argmax() + 1} ({probs.max():.2f})"


def options_of(study: Fig7, phases: Phases) -> str:
    """The options of the phases, as text."""
    text = "rate {reverse_lr:g}, {reverse_epochs} epochs, noise {noise_std:g}"
    return f"{text.format(**phases.about)}, φ {study.start}"


def draw_heat_maps(study: Fig7, phases: Phases, maps: list[HeatMap], chosen: int) -> Any:
    """A figure with a column per mode: above the chosen observation, below the mean over all."""
    count, actions = phases.theta.shape
    figure, axes = plt.subplots(2, len(MODES), figsize=(2.5 * len(MODES) + 0.6, 6.3))
    for x in maps:
        axis = axes[int(x.of == "mean"), MODES.index(x.mode)]
        image = axis.imshow(min_max(x.joint), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(x.title, fontsize=9)
        ticks = range(0, actions, 1 if actions <= 10 else 4)
        axis.set_xticks(ticks, [t + 1 for t in ticks], fontsize=8)
        axis.set_yticks(ticks, [t + 1 for t in ticks], fontsize=8)
    label = f"observation {chosen}: {preference(phases.theta[chosen])}"
    axes[0, 0].set_ylabel(f"{label}\nactions of π_θ", fontsize=9)
    axes[1, 0].set_ylabel(f"mean of {count:,} observations\nactions of π_θ", fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("actions of π_φ", fontsize=9)
    how, steps = options_of(study, phases), phases.about["timesteps"]
    title = f"π_φ x π_θ after one reverse phase, min-max normalised ({how})"
    figure.suptitle(f"{title}\n{study.run.resolve().name}, {steps:,} steps", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.94, 1))
    bar = figure.add_axes((0.95, 0.15, 0.012, 0.65))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    return figure


def describe(action: dict[str, int]) -> str:
    """The non-zero parts of an action as the engine gets them, as text: "turn -1"."""
    return ", ".join(f"{name} {x}" for name, x in action.items() if x) or "nothing"


def text_of_phases(study: Fig7, phases: Phases, chosen: int) -> str:
    """OUT.md of Fig. 7: a table with a line per mode."""
    about, theta, lines = phases.about, phases.theta, []
    for mode, phi in phases.phis.items():
        means = logged(phases, mode)
        names = ("KL(θ‖φ)", "shift", "π_φ(a*_θ)", "π_φ(a*_φ)")
        cells = {name: f"{x:.4g}" for name, x in zip(names, means.values())}
        here = f"{phi[chosen].argmax() + 1} ({phi[chosen].max():.3f})"
        lines.append({"φ": mode} | cells | {f"φ prefers in observation {chosen}": here})
    surest = ", surest of all" if chosen == theta.max(1).argmax() else ""
    key = "; ".join(f"{i}: {describe(action)}" for i, action in enumerate(about["actions"], 1))
    text = (
        f"# Fig. 7: π_φ x π_θ after one reverse phase, {study.run.resolve().name}\n\n"
        f"{about['substrate']}, {about['timesteps']:,} steps; {options_of(study, phases)}. The "
        f"first four figures are means over the rollout's {len(theta):,} observations; in "
        f"observation {chosen} {preference(theta[chosen])}{surest}. Actions: {key}.\n\n"
    )
    return text + markdown_table(lines)


def fig7(study: Fig7) -> None:
    """Apply the phases, then write Fig. 7. UsageError if there is no such observation."""
    check_out(study.out)
    phases = reverse_phases(study)
    surest, count = int(phases.theta.max(1).argmax()), len(phases.theta)
    chosen = surest if study.observation is None else study.observation
    if not 0 <= chosen < count:
        raise UsageError(f"--observation {chosen}: the rollout has 0 to {count - 1}.")
    maps = heat_maps(phases, chosen)
    figure = draw_heat_maps(study, phases, maps, chosen)
    finish(study.out, text_of_phases(study, phases, chosen), rows_of_maps(maps), figure)


# --- Fig. 5 ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fig5:
    """Fig. 5: t-SNE of the joint action distributions that a training population plays."""

    runs: Runs  # runs of any method, all in one substrate
    samples: Several = 500  # samples to draw from each run
    checkpoints: Positive = 1  # newest checkpoints to play; BiDist's may end different phases
    rollouts: Positive = 4  # rollouts of each checkpoint; BiDist draws new agents v for each
    num_envs: Positive = 16  # parallel worlds of a rollout
    warm_up: Count = 1  # rollouts to play before them, so that episodes are under way
    perplexity: Above = 30.0  # perplexity of t-SNE
    seed: Seed = 1  # seed of worlds, actions, samples and t-SNE
    group_by: Literal["method", "name"] = "method"  # group by flags, or by name without -s1, ...
    out: Path = Path("fig5")  # common beginning of the names of the .png, .csv and .md files


class Sample(NamedTuple):
    """S samples of the joint action distribution of a run's training population."""

    run: str
    method: str
    seed: int
    timesteps: int  # environment steps of training, of the newest checkpoint
    points: np.ndarray  # (S, N A) action probabilities of all agents, concatenated
    fictitious: np.ndarray  # (S,) number of agents that act with phi or a past actor
    shift: float  # mean total variation between who acts and theta, on the same views
    agents: int  # N


class Acted(NamedTuple):
    """The policies that acted in P steps of worlds, theta or others."""

    probs: torch.Tensor  # (P, N, A) action probabilities
    fictitious: torch.Tensor  # (P,) number of agents that acted with phi or a past actor
    shift: torch.Tensor  # () mean total variation between them and theta, on the same views


def last_checkpoints(run: Run, number: int) -> list[Path]:
    """Paths of a run's newest checkpoints, newest first; of one the run itself, which stands for
    its newest intact one."""
    if number == 1:
        return [run.path]
    names = [entry["name"] for entry in harness.read_index(run.path)]
    if len(names) < number:
        raise UsageError(f"--checkpoints {number}: {run.path} holds {len(names)}.")
    return [run.path / name for name in names[:number]]


def act_in_population(found: Loaded, study: Fig5) -> Acted:
    """Play rollouts as in training."""
    acting, fictitious, shifts = [], [], []
    state = found.script.new_state(found.agent, study.num_envs)
    for number in range(study.warm_up + study.rollouts):
        with found.listening() as acted:
            batch, state = found.play(state)
        if number < study.warm_up:
            continue
        if hasattr(batch, "trained"):  # BiDist: theta or phi, as drawn
            probs = torch.where(batch.trained[..., None], batch.theta, batch.phi).exp()
            theta = batch.theta.exp()
            fictitious.append((~batch.trained).sum(-1).flatten())
        elif acted:  # PP, RPM: theta or a past actor
            probs = torch.stack(acted).exp()
            theta = found.policy(found.agent.actor, batch, batch.actor_hidden)
            fictitious.append((~batch.current).sum(-1).flatten())
        else:
            actor = found.agent.actor
            if hasattr(found.agent, "psi"):  # RandNet acts on views that psi has changed
                actor = functools.partial(actor, psi=found.agent.psi)
            probs = theta = found.policy(actor, batch, batch.actor_hidden)
            fictitious.append(torch.zeros(probs.shape[:2], dtype=torch.int64).flatten())
        acting.append(probs.flatten(0, 1))
        shifts.append((probs - theta).abs().sum(-1).mean() / 2)
    return Acted(torch.cat(acting), torch.cat(fictitious), torch.stack(shifts).mean())


def sample_population(run: Run, study: Fig5) -> Sample:
    """Play rollouts of each checkpoint and sample the action distributions of who acted."""
    by_name = study.group_by == "name"
    parts, timesteps = [], []
    for checkpoint in last_checkpoints(run, study.checkpoints):
        with loaded(run, study.num_envs, study.seed, checkpoint) as found:
            parts.append(act_in_population(found, study))
            timesteps.append(found.timesteps)
    points = torch.cat([part.probs for part in parts]).flatten(1).double().numpy()
    count = torch.cat([part.fictitious for part in parts]).numpy()
    if len(points) < study.samples:
        raise UsageError(
            f"--samples {study.samples}: the rollouts of {run.path} have {len(points)}."
        )
    rows = np.random.default_rng(study.seed).permutation(len(points))[: study.samples]
    return Sample(
        run=run.name,
        method=without_seed(run.name) if by_name else method_of(run.args),
        seed=run.args["seed"],
        timesteps=timesteps[0],
        points=points[rows],
        fictitious=count[rows],
        shift=float(torch.stack([part.shift for part in parts]).mean()),
        agents=parts[0].probs.shape[1],
    )


def spread(points: np.ndarray, agents: int) -> dict[str, float]:
    """How far apart samples (S, N A) are, as means over all pairs: "distance" is Euclidean,
    "total_variation" is between the policies of the same agent, from 0 to 1."""
    from scipy.spatial.distance import pdist

    total = pdist(points, "cityblock") / (2 * agents)
    return {"distance": float(pdist(points).mean()), "total_variation": float(total.mean())}


def embed(samples: list[Sample], perplexity: float, seed: int) -> list[np.ndarray]:
    """t-SNE by scikit-learn of all runs together: positions (S, 2) of each run's samples."""
    from sklearn.manifold import TSNE

    points = np.concatenate([s.points for s in samples]).astype(np.float32)
    flat = TSNE(perplexity=perplexity, random_state=seed).fit_transform(points)
    return np.split(flat, np.cumsum([len(s.points) for s in samples])[:-1])


def rows_of_samples(samples: list[Sample], places: list[np.ndarray]) -> list[dict[str, Any]]:
    """The rows of the CSV, one per sample."""
    rows = []
    for s, xy in zip(samples, places):
        about = dict(run=s.run, method=s.method, seed=s.seed)
        for at, count in zip(xy.tolist(), s.fictitious.tolist()):
            rows.append(about | dict(x=at[0], y=at[1], fictitious=count))
    return rows


def draw_samples(samples: list[Sample], places: list[np.ndarray], title: str) -> Any:
    """A figure with a panel for all methods, and one per method with the others in grey."""
    methods = list(dict.fromkeys(s.method for s in samples))
    figure, axes = plt.subplots(1, 1 + len(methods), figsize=(3.4 * (1 + len(methods)), 4.1))
    for axis, shown in zip(axes, [methods, *([m] for m in methods)]):
        for s, xy in zip(samples, places):
            colour = f"C{methods.index(s.method)}" if s.method in shown else "0.85"
            mixed, order = s.fictitious > 0, 2 if s.method in shown else 1
            style = {"color": colour, "lw": 0, "zorder": order}
            axis.plot(*xy[~mixed].T, "o", ms=2, **style)
            axis.plot(*xy[mixed].T, "x", ms=2.5, mew=0.6, **style)
        axis.set(xticks=[], yticks=[])
        axis.set_title("all" if shown is methods else textwrap.fill(shown[0], 40), fontsize=9)
    marks = [plt.Line2D([], [], color=f"C{i}", marker="o", lw=0) for i in range(len(methods))]
    if any(s.fictitious.any() for s in samples):
        marks.append(plt.Line2D([], [], color="grey", marker="x", lw=0))
    labels = [*methods, "with fictitious agents or past actors"]
    figure.legend(marks, labels, loc="lower center", ncols=min(3, len(marks)), fontsize=8)
    figure.suptitle(f"{title}\nareas and distances mean nothing; spread: see the table", fontsize=9)
    figure.tight_layout(rect=(0, 0.04 + 0.05 * -(-len(marks) // 3), 1, 1))
    return figure


def text_of_samples(samples: list[Sample], world: str) -> str:
    """OUT.md of Fig. 5: a table with a line per run."""
    lines = []
    for s in samples:
        spreads = spread(s.points, s.agents)
        trained = s.points[s.fictitious == 0]
        alone = f"{spread(trained, s.agents)['distance']:.4f}" if len(trained) > 1 else ""
        lines.append(
            {"run": s.run, "method": s.method, "seed": s.seed}
            | {"steps": f"{s.timesteps:,}", "samples": len(s.points)}
            | {"mean distance": f"{spreads['distance']:.4f}"}
            | {"mean total variation": f"{spreads['total_variation']:.4f}"}
            | {"from theta": f"{s.shift:.4f}"}
            | {"fictitious": f"{s.fictitious.mean() / s.agents:.0%}"}
            | {"mean distance, all trained": alone}
        )
    text = (
        f"# Fig. 5: joint action distributions, {world}\n\n"
        "A sample is what the policies that acted in one step of one world give to every action, "
        "for all agents side by side. Mean distance: Euclidean, over all pairs of a run's samples; "
        "mean total variation: between the same agent's policies in two samples, from 0 to 1. Both "
        "are in probability space, and both grow with how much a policy depends on what it sees, "
        "not with the number of policies: where co-players' policies are flatter than theta's they "
        "fall. From theta: total variation between the policy that acts and theta on the same "
        "views, mean over agents and the whole rollouts; 0 where theta acts. Samples of "
        "several checkpoints (--checkpoints) are taken together; steps are those of the newest. "
        "Distances in the t-SNE itself mean nothing. "
        "Fictitious: agents that phi or, in PP and RPM, a past actor plays.\n\n"
    )
    return text + markdown_table(lines)


def fig5(study: Fig5) -> None:
    """Sample all runs, then write their t-SNE and a table of their spread."""
    check_out(study.out)
    runs = read_in_substrates(study.runs)
    worlds = {run.args["substrate"] for run in runs}
    if len(worlds) > 1:
        raise UsageError("fig5 compares runs on one substrate, and these are on several.")
    if study.perplexity >= (count := study.samples * len(runs)):
        raise UsageError(f"--perplexity {study.perplexity:g} is not less than {count} samples.")
    (world,) = worlds
    samples = [sample_population(run, study) for run in runs]
    places = embed(samples, study.perplexity, study.seed)
    title = f"t-SNE of joint action distributions, {world}, {study.samples} samples of each run"
    figure = draw_samples(samples, places, title)
    finish(study.out, text_of_samples(samples, world), rows_of_samples(samples, places), figure)


# --- Distillation over training -------------------------------------------------------------------

SCALARS = {  # {scalar: label}; logged for every rollout, and before and after every phase
    "kl": "KL(π_θ ‖ π_φ)",
    "shift": "preference shift",
    "theta_prefers": "π_θ(a*_θ)",
    "phi_prefers": "π_φ(a*_θ)",
}
PHASES = {"forward": "tab:green", "reverse": "tab:red"}


@dataclasses.dataclass(frozen=True)
class Shift:
    """KL, preference shift and preferred actions over training, before and after each phase."""

    runs: Runs  # runs of bidist_mappo_meltingpot.py
    out: Path = Path("preference_shift")  # common beginning of the .png, .csv and .md files' names


def read_rows(run: Run) -> list[dict[str, Any]]:
    """The CSV's rows, one per logged figure; phase and when ("before", "after") are "" outside
    phases. UsageError if the run is of another script (OPRE's `kl` is of other policies) or lacks
    one of SCALARS."""
    check_kind(run, SCRIPT)  # others have no phi
    for name in SCALARS:
        if not any(name in scalars for scalars in run.log):
            without = "it has not begun, or pack left it out (--curves)"
            raise UsageError(f"{run.where} has no scalar {name}: {without}.")
    rows = []
    for scalars in run.log:
        place = dict(run=run.name, timesteps=scalars["timesteps"])
        for name in SCALARS:
            if name in scalars:
                row = dict(scalar=name, phase="", when="", value=scalars[name])
                rows.append(place | row)
            for phase, when in itertools.product(PHASES, ("before", "after")):
                if (value := scalars.get(f"{phase}/{name}_{when}")) is not None:
                    rows.append(place | dict(scalar=name, phase=phase, when=when, value=value))
    return rows


def draw_scalar(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw one scalar of one run: a curve over rollouts, and for each phase a vertical line from
    its value before to its value after."""
    steps, values = zip(*((r["timesteps"] / 1000, r["value"]) for r in rows if not r["phase"]))
    axis.plot(steps, values, color="0.45", lw=0.8, label="every rollout")
    for phase, colour in PHASES.items():
        ends = {"before": {}, "after": {}}
        for r in rows:
            if r["phase"] == phase:
                ends[r["when"]][r["timesteps"] / 1000] = r["value"]
        for when, fill in (("before", "white"), ("after", colour)):
            style = {"ms": 4, "lw": 0, "mec": colour, "mfc": fill, "mew": 0.8, "zorder": 3}
            label = f"{when} a {phase} phase"
            axis.plot(ends[when].keys(), ends[when].values(), "o", label=label, **style)
        low, high = ([*ends[when].values()] for when in ("before", "after"))
        axis.vlines([*ends["before"]], low, high, color=colour, lw=0.8)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)


def draw_shift(rows_of: dict[str, list[dict[str, Any]]]) -> Any:
    """A figure with a column per run and a row per scalar; all runs share a row's scale."""
    size = (max(6.0, 4.4 * len(rows_of) + 0.6), 8.2)
    figure, axes = plt.subplots(4, len(rows_of), figsize=size, squeeze=False, sharex="col")
    for column, (run, rows) in enumerate(rows_of.items()):
        for axis, name in zip(axes[:, column], SCALARS):
            draw_scalar(axis, [r for r in rows if r["scalar"] == name])
        axes[0][column].set_title(run, fontsize=10)
        axes[-1][column].set_xlabel("thousand environment steps", fontsize=9)
    for line, label in zip(axes, SCALARS.values()):
        line[0].set_ylabel(label, fontsize=9)
    rows = list(itertools.chain.from_iterable(rows_of.values()))
    marks = [r["value"] for r in rows if r["scalar"] == "kl" and r["phase"]]
    low, high = min(marks, default=0), max(r["value"] for r in rows if r["scalar"] == "kl")
    largest = max(r["value"] for r in rows if r["scalar"].endswith("prefers"))
    for kl, shift, *preferences in axes.T:
        if low > 0:  # phases set the range: KL near 0, as at the very start, would squeeze them
            kl.set(yscale="log", ylim=(low / 1.5, high * 1.5))
        shift.set_ylim(-0.03, 1.03)
        for axis in preferences:
            axis.set_ylim(0, min(1.03, 1.15 * largest))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def text_of_shift(rows: list[dict[str, Any]]) -> str:
    """OUT.md: means over all phases of a kind, and over those in the last third of training."""
    lines = []
    runs = dict.fromkeys(row["run"] for row in rows)
    for run, phase, part in itertools.product(runs, PHASES, ("all", "last third")):
        own = [r for r in rows if (r["run"], r["phase"]) == (run, phase)]
        begin = max(r["timesteps"] for r in rows if r["run"] == run) * 2 / 3
        own = [r for r in own if part == "all" or r["timesteps"] > begin]
        if not own:
            continue
        cells = {}
        for name, label in SCALARS.items():
            pair = (
                np.mean([r["value"] for r in own if (r["scalar"], r["when"]) == (name, when)])
                for when in ("before", "after")
            )
            cells[label] = " -> ".join(f"{x:.3g}" for x in pair)
        count = len({r["timesteps"] for r in own})
        lines.append({"run": run, "phases": f"{phase}, {part}", "count": count} | cells)
    text = "# Distillation over training\n\n"
    text += "Means over phases, before -> after; a*_θ is what θ prefers.\n\n"
    return text + (markdown_table(lines) if lines else "No phase was logged.\n")


def shift(study: Shift) -> None:
    """Read all runs, then write OUT.png, OUT.csv and OUT.md."""
    check_out(study.out)
    rows_of = {run.name: read_rows(run) for run in read_runs(study.runs)}
    rows = list(itertools.chain.from_iterable(rows_of.values()))
    finish(study.out, text_of_shift(rows), rows, draw_shift(rows_of))


# --- When reverse distillation shifts preferences -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reverse:
    """When reverse distillation shifts preferences: reverse phases on copies of phi.

    Each run gives theta and a rollout in new worlds. A reverse phase (Eq. 8) with each rate and
    number of epochs is applied to a phi at each of three distances from theta:

    initial: a new phi, close to uniform, where Prop. 4.1 begins;
    lagged: the run's own phi, as training left it;
    near: that phi after a forward phase (Eq. 7) on this rollout, where Alg. 1 begins.

    If KL(theta || phi) and phi's largest probability grow while the preference shift (the share of
    observations where phi prefers another action) stays, phi only became sharper on one action.
    """

    runs: Runs  # runs of bidist_mappo_meltingpot.py
    # learning rates of the phase, eta_r
    rates: Annotated[tuple[Above, ...], MinLen(1)] = (1e-5, 1e-4, 3e-4, 1e-3)
    epochs: Annotated[tuple[Positive, ...], MinLen(1)] = (5, 25)  # epochs of the phase
    num_envs: Positive = 16  # parallel worlds of the rollout
    warm_up: Count = 1  # rollouts to play before the one that is used: episodes are under way
    seed: Seed = 1  # seed of worlds, actions and shuffling
    out: Path = Path("reverse_distillation")  # common beginning of the names of the files


def reverse_run(run: Run, study: Reverse) -> list[dict[str, Any]]:
    """Apply all phases to one run: a row of the CSV per distance, rate and number of epochs."""
    check_kind(run, SCRIPT)  # others have no phi
    rows = []
    with loaded(run, study.num_envs, study.seed) as found:
        found.check()
        batch, state = found.last_of(study.warm_up + 1)
    script, args, agent = found.script, found.args, found.agent
    lagged = agent.distilled
    near = copy.deepcopy(lagged)
    starts = {"initial": agent.new_distilled(study.seed + 2**31), "lagged": lagged, "near": near}
    agent.distilled = near
    script.distill(args, agent, batch, state, phase="forward", rng=found.rngs["method_rng"])
    # Every phi replays the rollout from a zero hidden state: stored ones are of the run's own phi.
    fresh = dataclasses.replace(batch, distilled_hidden=torch.zeros_like(batch.distilled_hidden))
    for start, rate, epochs in itertools.product(starts, study.rates, study.epochs):
        agent.distilled = copy.deepcopy(starts[start])
        phase = {"reverse_lr": rate, "reverse_epochs": epochs, "reverse_mode": "kl"}
        scalars, _ = script.distill(
            dataclasses.replace(args, **phase),
            agent,
            fresh,
            state,
            phase="reverse",
            rng=torch.Generator().manual_seed(study.seed),
        )
        row = {"run": run.name, "step": found.timesteps, "phi": start}
        row |= {"rate": rate, "epochs": epochs}
        rows.append(row | {k.removeprefix("reverse/"): float(v) for k, v in scalars.items()})
    return rows


def draw_reverse(rows: list[dict[str, Any]], study: Reverse) -> Any:
    """A figure of shift and KL over the rate: a column per distance, a line per run and epochs."""
    starts = list(dict.fromkeys(row["phi"] for row in rows))
    figure, axes = plt.subplots(2, len(starts), figsize=(3.6 * len(starts), 5.2), sharex=True)
    for column, start in enumerate(starts):
        for run in dict.fromkeys(row["run"] for row in rows):
            for epochs in study.epochs:
                chosen = [
                    row
                    for row in rows
                    if (row["run"], row["phi"], row["epochs"]) == (run, start, epochs)
                ]
                label = f"{run}, {epochs} epochs"
                rates = [row["rate"] for row in chosen]
                for line, name in enumerate(("shift", "kl")):
                    axis = axes[line, column]
                    axis.plot(rates, [row[f"{name}_after"] for row in chosen], "o-", label=label)
                    axis.axhline(chosen[0][f"{name}_before"], color="grey", lw=0.6)
        axes[0, column].set(title=f"phi {start}", ylim=(-0.02, 1.02), xscale="log")
        axes[1, column].set(xlabel="reverse rate", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("preference shift after")
    axes[1, 0].set_ylabel("KL(theta || phi) after")
    axes[0, -1].legend(fontsize=6)
    figure.tight_layout()
    return figure


def reverse(study: Reverse) -> None:
    """Apply the phases to all runs, then write the figure, the rows and means over runs."""
    check_out(study.out)
    rows = [row for run in read_runs(study.runs) for row in reverse_run(run, study)]
    groups = defaultdict(list)
    for row in rows:
        groups[row["phi"], row["rate"], row["epochs"]].append(row)
    lines = []
    for (start, rate, epochs), own in groups.items():
        line = {"phi": start, "rate": f"{rate:g}", "epochs": epochs}
        for name in ("kl", "shift", "phi_prefers", "phi_peak"):
            ends = [np.mean([row[f"{name}_{when}"] for row in own]) for when in ("before", "after")]
            line[f"{name} before -> after"] = " -> ".join(f"{x:.3f}" for x in ends)
        lines.append(line)
    finish(study.out, markdown_table(lines), rows, draw_reverse(rows, study))


# --- Main -----------------------------------------------------------------------------------------


def split_extra(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line before --extra, and those after it."""
    if "--extra" not in argv:
        return argv, []
    place = argv.index("--extra")
    return argv[:place], argv[place + 1 :]


COMMANDS = {
    "fig5": fig5,
    "fig6": fig6,
    "fig7": fig7,
    "fig8": fig8,
    "c1": c1,
    "c2": c2,
    "table1": table1,
    "cross-play": cross_play,
    "curves": curves,
    "shift": shift,
    "reverse": reverse,
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    torch.set_num_threads(1)
    argv, extra = split_extra(sys.argv[1:] if argv is None else argv)
    return run_subcommand(COMMANDS, argv, __doc__, extra=tuple(extra))


if __name__ == "__main__":
    sys.exit(main())
