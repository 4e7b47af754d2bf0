"""Figures 6, 8, C.1 and C.2 of the BiDist paper: variants of bidist_mappo_meltingpot.py, compared.

    python experiments/variants.py fig6 --total-timesteps 1000000 --extra --num-workers 1
    python experiments/variants.py fig8 --runs runs/fig8/*
    python experiments/variants.py c1 | c2                         likewise

Without --runs the variants are trained first, one after another, in RUNS_DIR/{variant}-s{seed}
(output beside it in .log): what is finished is skipped, what was stopped goes on, and flags after
--extra are the script's. Writes OUT.png (a bar per variant and a dot per run, for each scenario or
else for self-play), OUT.csv and OUT.md; runs that met official and scripted bots make a set of
files for each kind. `SUBCOMMAND --help` has the options.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scenario_table as tables
import tyro
from figures import (
    ROOT,
    SCRIPT,
    Positive,
    Seed,
    UsageError,
    beside,
    check_bounds,
    check_out,
    finish,
    load_script,
    markdown_table,
    method_of,
    one_line_errors,
    read_args,
    read_log,
    script_file,
    training_flags,
)

SELF_PLAY = "self-play"  # the row that stands in where there are no scenarios


@dataclasses.dataclass(frozen=True)
class Study:
    """What the figures have in common."""

    runs: tuple[Path, ...] = ()  # runs to compare; default: train what the figure needs
    substrate: str = "pure_coordination_in_the_matrix__repeated"  # of the runs to train
    total_timesteps: Positive = 10_000_000  # of each
    seeds: tuple[Seed, ...] = (1, 2, 3)  # of each variant
    only: tuple[str, ...] = ()  # variants to train, by their names; default: all
    runs_dir: Path | None = None  # where they go; default: runs/{figure}
    jobs: Positive = 1  # trained at the same time
    dry_run: bool = False  # print the commands and do nothing
    extra: tyro.conf.Suppress[tuple[str, ...]] = ()  # flags after --extra
    quantity: Literal["return_per_1000", "return"] = "return_per_1000"  # to draw
    out: Path | None = None  # writes OUT.png, OUT.csv and OUT.md; default: the figure's name


@dataclasses.dataclass(frozen=True)
class Fig6(Study):
    """Fig. 6: the reverse phase maximises KL or entropy, draws phi anew, or adds noise."""


@dataclasses.dataclass(frozen=True)
class Fig8(Study):
    """Fig. 8: BiDist, v = 0, without reverse distillation, without any; RPM has no script yet."""


@dataclasses.dataclass(frozen=True)
class C1(Study):
    """Fig. C.1: distilled networks of smaller width."""


@dataclasses.dataclass(frozen=True)
class C2(Study):
    """Fig. C.2: distillation intervals."""


FIGURES: dict[type, dict[str, dict[str, Any] | None]] = {  # variants and their flags; None: no run
    Fig6: {
        mode: {"reverse_mode": mode, "no_forward": False, "no_reverse": False}
        for mode in ("kl", "entropy", "random", "noise")
    },
    Fig8: {
        "full": {"all_fictitious": False, "no_forward": False, "no_reverse": False},
        "v0": {"all_fictitious": True, "no_forward": False, "no_reverse": False},
        "no-reverse": {"all_fictitious": False, "no_forward": False, "no_reverse": True},
        "no-distillation": {"all_fictitious": False, "no_forward": True, "no_reverse": True},
        "RPM": None,
    },
    C1: {f"width-{x:g}": {"distilled_width": x} for x in (1.0, 0.7, 0.5, 0.3, 0.1)},
    C2: {f"kd-{x}": {"k_d": x} for x in (1, 3, 5, 10, 20, 40)},
}
LABELS = {  # the paper's names, where they are not ours
    "full": "BiDist",
    "v0": "v = 0",
    "no-reverse": "+F, -R",
    "no-distillation": "-F, -R",
    **{key: key.replace("-", " ") for key in FIGURES[C1]},
    **{key: key.replace("kd-", "k_d = ") for key in FIGURES[C2]},
}


def name_of(study: Study) -> str:
    """The subcommand: fig6, fig8, c1, c2."""
    return type(study).__name__.lower()


def trainable(study: Study) -> dict[str, dict[str, Any]]:
    """The figure's variants that have a script, and their flags."""
    return {key: flags for key, flags in FIGURES[type(study)].items() if flags is not None}


# --- Training -------------------------------------------------------------------------------------


def flags_of(variant: dict[str, Any]) -> list[str]:
    """A variant on the command line."""
    words = []
    for name, x in variant.items():
        flag = f"--{name.replace('_', '-')}"
        words += [] if x is False else [flag] if x is True else [flag, str(x)]
    return words


class Job(NamedTuple):
    """One run to train."""

    variant: str
    run: Path
    argv: list[str]  # the script's, but for the run's directory
    args: dict[str, Any]  # what these mean to the script, as in args.json


def jobs_of(study: Study) -> list[Job]:
    """All runs that the figure needs, seed by seed, so that whole comparisons come first."""
    variants = trainable(study)
    if unknown := set(study.only) - set(variants):
        have = ", ".join(variants)
        raise UsageError(f"{name_of(study)} trains no variant {min(unknown)}: there are {have}.")
    if not study.seeds:
        raise UsageError("--seeds names none.")
    root = (study.runs_dir or Path("runs") / name_of(study)).resolve()
    chosen = [key for key in variants if key in (study.only or variants)]
    jobs = []
    for seed, key in itertools.product(dict.fromkeys(study.seeds), chosen):
        own = {"substrate": study.substrate, "seed": seed} | variants[key]
        own["total_timesteps"] = study.total_timesteps
        argv = [*flags_of(own), *study.extra]
        jobs.append(Job(key, root / f"{key}-s{seed}", argv, parsed(argv, own)))
    return jobs


def parsed(argv: list[str], own: dict[str, Any]) -> dict[str, Any]:
    """The script's arguments, as in args.json; UsageError for what it refuses, and for flags after
    --extra that contradict the figure's own."""
    script = load_script(SCRIPT)
    try:
        args = dataclasses.asdict(script.parse(argv))
    except script.UsageError as error:
        raise UsageError(str(error)) from None
    for name, x in (own | {"run_dir": "", "resume": "", "eval_only": ""}).items():
        if args[name] != x:
            raise UsageError(f"--{name.replace('_', '-')} is the figure's own: not after --extra.")
    return json.loads(json.dumps(args))


def check_same(job: Job) -> None:
    """UsageError if a run that was begun in this place has other arguments. What may differ are
    those that the script lets change with --resume: length, evaluation, logging, machine."""
    script = load_script(SCRIPT)
    if not any((job.run / name).exists() for name in ("checkpoints.json", "summary.json")):
        return
    found = read_args(job.run)
    for name, x in ({"script": SCRIPT} | job.args).items():
        theirs = found.get(name, getattr(script.Args, name, None))  # older runs lack newer flags
        if name not in script.RESUMABLE and theirs != x:
            raise UsageError(f"{job.run} holds another run: its {name} is {theirs}, not {x}.")


def reached(job: Job, study: Study) -> bool:
    """Whether the run was finished and is long enough."""
    check_same(job)
    if not (job.run / "summary.json").exists():
        return False
    steps = json.loads((job.run / "summary.json").read_text())["timesteps"]
    return steps >= study.total_timesteps


def command_of(job: Job) -> list[str]:
    """The command that begins the run or goes on with it."""
    begun = (job.run / "checkpoints.json").exists()
    place = ["--resume" if begun else "--run-dir", str(job.run)]
    return [sys.executable, str(ROOT / script_file(SCRIPT)), *place, *job.argv]


@contextlib.contextmanager
def alone(run: Path) -> Iterator[int]:
    """Hold run.lock. A child that inherits the descriptor holds it, too: if this process is killed
    and its child goes on training, nobody else resumes the same run meanwhile."""
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        file = beside(run, ".lock").open("w")
    except OSError as error:
        raise UsageError(f"{run} cannot be made: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{run} is being trained by another process.") from None
        yield file.fileno()


def train(job: Job, study: Study, children: list[subprocess.Popen]) -> str:
    """Train one run to its end; returns what went wrong, or nothing."""
    with alone(job.run) as lock:
        if reached(job, study):
            print(f"{job.run}: finished already", flush=True)
            return ""
        command = command_of(job)
        print(f"{job.run}: {shlex.join(command[1:])}", flush=True)
        with beside(job.run, ".log").open("a") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(command, pass_fds=[lock], cwd=ROOT, **options)
            children.append(child)
            code = child.wait()
    return f"{job.run} ended with code {code}: see {beside(job.run, '.log')}" if code else ""


def train_all(study: Study) -> list[Path]:
    """Train what is missing; UsageError, after all have had their turn, if a run failed."""
    jobs = jobs_of(study)
    done = {job.run: reached(job, study) for job in jobs}  # all of them, before the first trains
    if study.dry_run:
        for job in jobs:
            say = f"{job.run}: finished already" if done[job.run] else shlex.join(command_of(job))
            print(say)
        return []
    children: list[subprocess.Popen] = []

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    pool = concurrent.futures.ThreadPoolExecutor(study.jobs)
    try:
        futures = [pool.submit(train, job, study, children) for job in jobs]
        failures = [text for future in futures if (text := future.result())]
    except BaseException:
        # What waits is dropped; what trains saves and ends (on a terminal Ctrl-C told it, too).
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        raise
    finally:
        pool.shutdown()
        signal.signal(signal.SIGTERM, old)
    if failures:
        raise UsageError(f"{'; '.join(failures)}.")
    return [job.run for job in jobs]


# --- Scores ---------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What one run earned in one row: a scenario, or self-play."""

    variant: str
    run: Path
    seed: int
    row: str
    bots: str  # official, scripted; "" in self-play
    timesteps: int
    mean: float
    low: float  # 95 %, over episodes
    high: float
    cell: tables.Cell | None  # its episodes, where they were kept


def variant_of(args: dict[str, Any], study: Study, run: Path) -> str:
    """Which of the figure's variants a run is."""
    for key, flags in trainable(study).items():
        if args["script"] == SCRIPT and all(args.get(name) == x for name, x in flags.items()):
            return key
    raise UsageError(f"{run} is {method_of(args)}, no variant of {name_of(study)}.")


def read_scores(run: Path, variant: str, args: dict[str, Any], quantity: str) -> list[Score]:
    """A run's last evaluation beside scenarios and, from summary.json, in self-play."""
    scores = []
    for cell in tables.read_cells(run, variant, args):
        figures = (tables.mean([cell], quantity), *tables.interval([cell], quantity))
        where = (variant, run, args["seed"], cell.scenario, cell.bots, cell.timesteps)
        scores.append(Score(*where, *figures, cell))
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        row = summary["eval"][SELF_PLAY]
        figures = (row[quantity], row[f"{quantity}_low"], row[f"{quantity}_high"])
        where = (variant, run, args["seed"], SELF_PLAY, "", summary["timesteps"])
        scores.append(Score(*where, *figures, None))
    return scores


def read_progress(run: Path, row: str, quantity: str) -> list[tuple[int, float]]:
    """Evaluations on the way: (environment steps, mean)."""
    name = f"eval/{row}/{quantity}"
    return [(x["timesteps"], x[name]) for x in read_log(run) if name in x]


def pooled(scores: list[Score], quantity: str) -> tuple[float, float, float]:
    """A variant's mean over runs and, from five runs on, its 95 % interval: over runs and episodes,
    or over runs alone where episodes were not kept."""
    mean = float(np.mean([score.mean for score in scores]))
    if len(scores) < tables.SEEDS:
        return mean, np.nan, np.nan
    if all(score.cell for score in scores):
        return mean, *tables.interval([score.cell for score in scores], quantity)
    rows = np.random.default_rng(1).integers(0, len(scores), (5000, len(scores)))
    low, high = np.percentile(np.array([s.mean for s in scores])[rows].mean(1), [2.5, 97.5])
    return mean, float(low), float(high)


def rows_of(scores: list[Score], study: Study) -> list[dict[str, Any]]:
    """The CSV: for every scenario and variant a row with its mean, run: "", then one per run."""
    rows = []
    places = sorted({score.row for score in scores}, key=lambda row: (len(row), row))
    for place, variant in itertools.product(places, FIGURES[type(study)]):
        own = [score for score in scores if (score.row, score.variant) == (place, variant)]
        if not own:
            continue
        where = dict(row=place, bots=own[0].bots, variant=variant)
        steps = tables.span(score.timesteps for score in own)
        figures = dict(zip(("mean", "low", "high"), pooled(own, study.quantity)))
        rows.append(where | dict(run="", seed="", timesteps=steps) | figures | {"runs": len(own)})
        for score in own:
            run = dict(run=score.run.name, seed=score.seed, timesteps=f"{score.timesteps:,}")
            figures = dict(mean=score.mean, low=score.low, high=score.high, runs=1)
            rows.append(where | run | figures)
    return rows


def notes_on(runs: dict[Path, dict], scores: list[Score], study: Study) -> list[str]:
    """What a reader must know about these runs, as sentences."""
    notes = []
    steps = {run: max((s.timesteps for s in scores if s.run == run), default=0) for run in runs}
    if len(set(steps.values())) > 1:
        each = "; ".join(f"{run.name}: {n:,}" for run, n in steps.items())
        notes.append(f"the runs were not trained for the same number of steps ({each}).")
    compared = {name for flags in trainable(study).values() for name in flags}
    others = {
        tuple(sorted((k, str(x)) for k, x in training_flags(args).items()))
        for args in ({k: x for k, x in a.items() if k not in compared} for a in runs.values())
    }
    if len(others) > 1:
        differ = sorted({k for k, _ in set.symmetric_difference(*map(set, list(others)[:2]))})
        flags = ", ".join(f"--{k.replace('_', '-')}" for k in differ)
        notes.append(f"the runs differ in more than what is compared here: {flags}.")
    if not any(score.bots for score in scores):
        notes.append(
            "none of these runs was evaluated beside scenarios"
            f" ({next(iter(runs.values()))['substrate']}), so this is {SELF_PLAY}, which says"
            " little about unseen co-players."
        )
    return notes


# --- Output ---------------------------------------------------------------------------------------


def draw_bars(axis: Any, rows: list[dict], variants: list[str]) -> None:
    """A bar per variant and a dot per run. Lines are intervals: the bar's own, or the dots'."""
    for x, variant in enumerate(variants):
        own = [row for row in rows if row["variant"] == variant]
        if not own:
            text = "no script yet" if variant == "RPM" else "not run"
            where = {"transform": axis.get_xaxis_transform(), "rotation": 90, "fontsize": 8}
            axis.text(x, 0.05, text, ha="center", va="bottom", color="grey", **where)
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
    """A thin line per run, and one for the mean of a variant's where all have a point."""
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
    runs: dict[Path, dict], place: str, bots: str, study: Study
) -> dict[str, list[list[tuple]]]:
    """What was logged on the way in one scenario: a variant's runs."""
    curves: dict[str, list[list[tuple]]] = {}
    for run, args in runs.items():
        points = read_progress(run, f"{place} {bots}" if bots else place, study.quantity)
        curves.setdefault(variant_of(args, study, run), []).append(points)
    return curves


def draw(rows: list[dict], runs: dict[Path, dict], bots: str, study: Study) -> Any:
    """Bars of every scenario and, where evaluations on the way were logged, curves below them."""
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
    substrate = next(iter(runs.values()))["substrate"]
    beside_whom = f"{bots} bots" if bots else SELF_PLAY
    title = f"{substrate}, {beside_whom}\ndots: runs; lines: 95 % intervals"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def text_of(rows: list[dict], notes: list[str], study: Study) -> str:
    """OUT.md: a table per scenario, a line per variant and, with fewer than five, per run."""
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
                reason = "not run: no script yet" if variant == "RPM" else "not run"
                lines.append(dict(zip(("variant", "run", "steps", what), (label, "", "", reason))))
                continue
            shown = [r for r in own if not r["run"] or len(own) - 1 < tables.SEEDS]
            for r in shown:
                text = f"{r['mean']:.1f}"
                text += "" if np.isnan(r["low"]) else f" [{r['low']:.1f}, {r['high']:.1f}]"
                cells = (label, r["run"] or f"mean of {r['runs']}", r["timesteps"], text)
                lines.append(dict(zip(("variant", "run", "steps", what), cells)))
        parts.append(markdown_table(lines))
    return "\n".join(parts)


# --- Main -----------------------------------------------------------------------------------------


def make(study: Study) -> None:
    """Train where no runs were given, then draw; one set of files for each kind of bots."""
    if study.runs and study.extra:
        raise UsageError("--extra is for runs to train, and --runs names finished ones.")
    check_bounds(study)
    out = study.out or Path(name_of(study))
    if not study.dry_run:
        check_out(out)
    paths = list(study.runs) or train_all(study)
    if study.dry_run:
        return
    runs, scores = {run: read_args(run) for run in paths}, []
    if len({args["substrate"] for args in runs.values()}) > 1:
        name = name_of(study)
        raise UsageError(f"{name} compares runs on one substrate, and these are on several.")
    for run, args in runs.items():
        own = read_scores(run, variant_of(args, study, run), args, study.quantity)
        if not own:
            raise UsageError(f"{run} has no final evaluation yet.")
        scores += own
    notes = notes_on(runs, scores, study)
    kinds = sorted({score.bots for score in scores} - {""}) or [""]
    for bots in kinds:
        rows = rows_of([score for score in scores if score.bots == bots], study)
        place = out if len(kinds) == 1 else beside(out, f"-{bots}")
        finish(place, text_of(rows, notes, study), rows, draw(rows, runs, bots, study))


def split_extra(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before --extra, and those after it."""
    if "--extra" not in argv:
        return argv, []
    place = argv.index("--extra")
    return argv[:place], argv[place + 1 :]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    argv, extra = split_extra(sys.argv[1:] if argv is None else argv)
    kinds = {kind.__name__.lower(): kind for kind in FIGURES}
    study = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, description=__doc__)
    return one_line_errors(lambda: make(dataclasses.replace(study, extra=tuple(extra))))


if __name__ == "__main__":
    sys.exit(main())
