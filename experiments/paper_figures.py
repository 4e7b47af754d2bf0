"""Figures 5, 6, 7, 8, C.1 and C.2 of the BiDist paper, and what distillation does over training.

    python experiments/paper_figures.py fig6 --total-timesteps 1000000 --extra --num-workers 1
    python experiments/paper_figures.py fig8 --runs runs/fig8/*
    python experiments/paper_figures.py c1 | c2                     likewise
    python experiments/paper_figures.py fig7 runs/RUN
    python experiments/paper_figures.py fig5 runs/BIDIST runs/MAPPO
    python experiments/paper_figures.py shift runs/RUN runs/RUN

fig6, fig8, c1 and c2 compare variants of bidist_mappo_meltingpot.py. Without --runs they train
them, one after another, in RUNS_DIR/{variant}-s{seed} (output beside it in .log): what is finished
is skipped, what was stopped goes on, and flags after --extra are the script's. All subcommands
write OUT.png, OUT.csv and OUT.md; `SUBCOMMAND --help` says more.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import fcntl
import functools
import itertools
import json
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib
import numpy as np
import scenario_table as tables
import torch
import tyro
from figures import (
    ROOT,
    SCRIPT,
    Runs,
    UsageError,
    beside,
    finish,
    load_script,
    markdown_table,
    method_of,
    one_line_errors,
    read_args,
    read_log,
    script_file,
    training_flags,
    without_seed,
)

from envs.tiles import WorldError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SELF_PLAY = "self-play"  # the row that stands in where there are no scenarios


# --- Options --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variants:
    """What the figures that compare variants have in common."""

    runs: tuple[Path, ...] = ()  # runs to compare; default: train what the figure needs
    substrate: str = "pure_coordination_in_the_matrix__repeated"  # of the runs to train
    total_timesteps: int = 10_000_000  # of each
    seeds: tuple[int, ...] = (1, 2, 3)  # of each variant
    only: tuple[str, ...] = ()  # variants to train, by their names; default: all
    runs_dir: Path | None = None  # where they go; default: runs/{figure}
    jobs: int = 1  # trained at the same time
    dry_run: bool = False  # print the commands and do nothing
    extra: tyro.conf.Suppress[tuple[str, ...]] = ()  # flags after --extra
    quantity: Literal["return_per_1000", "return"] = "return_per_1000"  # to draw
    out: Path | None = None  # writes OUT.png, OUT.csv and OUT.md; default: the figure's name


@dataclasses.dataclass(frozen=True)
class Fig6(Variants):
    """Fig. 6: the reverse phase maximises KL or entropy, draws phi anew, or adds noise."""


@dataclasses.dataclass(frozen=True)
class Fig8(Variants):
    """Fig. 8: BiDist, v = 0, without reverse distillation, without any; RPM has no script yet."""


@dataclasses.dataclass(frozen=True)
class C1(Variants):
    """Fig. C.1: distilled networks of smaller width."""


@dataclasses.dataclass(frozen=True)
class C2(Variants):
    """Fig. C.2: distillation intervals."""


@dataclasses.dataclass(frozen=True)
class Fig7:
    """Fig. 7: the joint probabilities pi_phi x pi_theta after one reverse phase of each kind."""

    run: Annotated[Path, tyro.conf.Positional]  # of bidist_mappo_meltingpot.py
    observation: int | None = None  # of the rollout's T B N; default: where theta is surest
    start: Literal["lagged", "near"] = "lagged"  # phi as saved, or after a forward phase
    reverse_lr: float | None = None  # default: the run's own
    reverse_epochs: int | None = None  # default: the run's own
    noise_std: float | None = None  # default: the run's own
    num_envs: int = 16  # worlds of the rollout
    warm_up: int = 1  # rollouts before it, so that worlds are not at their starts
    seed: int = 1  # of worlds, actions, shuffling, noise and new weights
    out: Path = Path("fig7")  # writes OUT.png, OUT.csv and OUT.md


@dataclasses.dataclass(frozen=True)
class Fig5:
    """Fig. 5: t-SNE of the joint action distributions that a training population plays."""

    runs: Runs  # of any script, all on one substrate
    samples: int = 500  # of each run
    rollouts: int = 4  # that they are drawn from; BiDist draws v anew for each
    num_envs: int = 16  # worlds of a rollout
    warm_up: int = 1  # rollouts before them, so that worlds are not at their starts
    perplexity: float = 30.0  # of t-SNE
    seed: int = 1  # of worlds, actions, samples and t-SNE
    group_by: Literal["method", "name"] = "method"  # name: of the directory, without -s1, -s2, ...
    out: Path = Path("fig5")  # writes OUT.png, OUT.csv and OUT.md


@dataclasses.dataclass(frozen=True)
class Shift:
    """KL, preference shift and preferred actions over training, before and after each phase."""

    runs: Runs  # of bidist_mappo_meltingpot.py
    out: Path = Path("shift")  # writes OUT.png, OUT.csv and OUT.md


def positive(**numbers: float) -> None:
    """UsageError for the first that is not positive."""
    for name, x in numbers.items():
        if not x > 0:
            raise UsageError(f"--{name.replace('_', '-')} {x} is not positive.")


# --- Variants: Figures 6, 8, C.1, C.2 -------------------------------------------------------------

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
    flags: dict[str, Any]
    seed: int
    run: Path


def jobs_of(study: Variants) -> list[Job]:
    """All runs that the figure needs, seed by seed, so that whole comparisons come first."""
    variants, name = FIGURES[type(study)], type(study).__name__.lower()
    if unknown := set(study.only) - {key for key, flags in variants.items() if flags is not None}:
        have = ", ".join(key for key, flags in variants.items() if flags is not None)
        raise UsageError(f"{name} trains no variant {min(unknown)}: there are {have}.")
    if not study.seeds:
        raise UsageError("--seeds names none.")
    root = study.runs_dir or Path("runs") / name
    chosen = {k: x for k, x in variants.items() if x is not None and k in (study.only or variants)}
    pairs = itertools.product(dict.fromkeys(study.seeds), chosen.items())
    return [Job(key, flags, seed, root / f"{key}-s{seed}") for seed, (key, flags) in pairs]


def wanted_args(job: Job, study: Variants) -> dict[str, Any]:
    """What must stand in the run's args.json."""
    return {"script": SCRIPT, "substrate": study.substrate, "seed": job.seed} | job.flags


def reached(job: Job, study: Variants) -> int | None:
    """Steps after which the run was finished; None while it is not, or too short."""
    if not (job.run / "summary.json").exists():
        return None
    args = read_args(job.run)
    for name, x in wanted_args(job, study).items():
        if args.get(name) != x:
            raise UsageError(f"{job.run} holds another run: its {name} is {args.get(name)}.")
    steps = json.loads((job.run / "summary.json").read_text())["timesteps"]
    return steps if steps >= study.total_timesteps else None


def command_of(job: Job, study: Variants) -> list[str]:
    """The command that begins the run or goes on with it; a resumed run's own arguments must be
    these, which the script holds against them."""
    begun = (job.run / "checkpoints.json").exists()
    argv = [sys.executable, str(ROOT / script_file(SCRIPT))]
    argv += ["--resume" if begun else "--run-dir", str(job.run)]
    argv += ["--substrate", study.substrate, "--seed", str(job.seed), *flags_of(job.flags)]
    argv += ["--total-timesteps", str(study.total_timesteps)]
    return [*argv, *study.extra]


@contextlib.contextmanager
def alone(run: Path) -> Iterator[int]:
    """Hold run.lock. A child that inherits the descriptor holds it, too: if this process is killed
    and its child goes on training, nobody else resumes the same run meanwhile."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with beside(run, ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{run} is being trained by another process.") from None
        yield file.fileno()


def train(job: Job, study: Variants, children: list[subprocess.Popen]) -> str:
    """Train one run to its end; returns what went wrong, or nothing."""
    with alone(job.run) as lock:
        if reached(job, study):
            print(f"{job.run}: finished already", flush=True)
            return ""
        command = command_of(job, study)
        print(f"{job.run}: {shlex.join(command[1:])}", flush=True)
        with beside(job.run, ".log").open("a") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(command, pass_fds=[lock], cwd=ROOT, **options)
            children.append(child)
            code = child.wait()
    return f"{job.run} ended with code {code}: see {beside(job.run, '.log')}" if code else ""


def train_all(study: Variants) -> list[Path]:
    """Train what is missing; UsageError, after all have had their turn, if a run failed."""
    positive(total_timesteps=study.total_timesteps, jobs=study.jobs)
    jobs = [job._replace(run=job.run.resolve()) for job in jobs_of(study)]
    if study.dry_run:
        for job in jobs:
            done = reached(job, study)
            print(f"{job.run}: finished already" if done else shlex.join(command_of(job, study)))
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


def variant_of(args: dict[str, Any], study: Variants, run: Path) -> str:
    """Which of the figure's variants a run is."""
    known = {key: flags for key, flags in FIGURES[type(study)].items() if flags is not None}
    for key, flags in known.items():
        if args["script"] == SCRIPT and all(args.get(name) == x for name, x in flags.items()):
            return key
    name = type(study).__name__.lower()
    raise UsageError(f"{run} is {method_of(args)}, no variant of {name}.")


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


def read_progress(run: Path, row: str, quantity: str) -> list[tuple[int, float]]:
    """Evaluations on the way: (environment steps, mean)."""
    name = f"eval/{row}/{quantity}"
    return [(x["timesteps"], x[name]) for x in read_log(run) if name in x]


def draw_bars(axis: Any, scores: list[Score], variants: list[str], quantity: str) -> list[dict]:
    """A bar per variant, a dot per run with its interval over episodes; returns rows of the CSV."""
    rows = []
    for x, variant in enumerate(variants):
        own = [score for score in scores if score.variant == variant]
        if not own:
            text = "no script yet" if variant == "RPM" else "not run"
            where = {"transform": axis.get_xaxis_transform(), "rotation": 90, "fontsize": 8}
            axis.text(x, 0.05, text, ha="center", va="bottom", color="grey", **where)
            continue
        mean, low, high = pooled(own, quantity)
        axis.bar(x, mean, 0.75, color=f"C{x}", alpha=0.45)
        if not np.isnan(low):
            axis.plot([x, x], [low, high], color="black", lw=2)
        place = dict(row=own[0].row, bots=own[0].bots, variant=variant)
        figures = dict(mean=mean, low=low, high=high, runs=len(own))
        steps = tables.span(score.timesteps for score in own)
        rows.append(place | dict(run="", seed="", timesteps=steps) | figures)
        for i, score in enumerate(own):
            at = x + 0.5 * ((i + 0.5) / len(own) - 0.5)
            if np.isnan(low):
                axis.plot([at, at], [score.low, score.high], color=f"C{x}", lw=1)
            axis.plot(at, score.mean, "o", color=f"C{x}", ms=4, mec="black", mew=0.4)
            run = dict(run=score.run.name, seed=score.seed, timesteps=f"{score.timesteps:,}")
            figures = dict(mean=score.mean, low=score.low, high=score.high, runs=1)
            rows.append(place | run | figures)
    axis.set_xticks(range(len(variants)), [LABELS.get(v, v) for v in variants], rotation=30)
    axis.set_xlim(-0.6, len(variants) - 0.4)
    axis.grid(axis="y", alpha=0.3)
    axis.tick_params(labelsize=8)
    return rows


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


def variant_text(rows: list[dict], variants: list[str], study: Variants, notes: list[str]) -> str:
    """OUT.md: a table per row, a line per variant and, with fewer than five, per run."""
    what = tables.QUANTITIES[study.quantity]
    places = dict.fromkeys((row["row"], row["bots"]) for row in rows)
    parts = [f"# {type(study).__doc__.rstrip('.')}\n", f"{what.capitalize()}.\n"]
    parts += [f"Note: {note}\n" for note in notes]
    for row, bots in places:
        parts.append(f"## {row}{f', {bots} bots' if bots else ''}\n")
        lines = []
        for variant in variants:
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
                runs = r["run"] or f"mean of {r['runs']}"
                cells = (label, runs, r["timesteps"], text)
                lines.append(dict(zip(("variant", "run", "steps", what), cells)))
        parts.append(markdown_table(lines))
    return "\n".join(parts)


def notes_on(runs: dict[Path, dict], scores: list[Score], study: Variants) -> list[str]:
    """What a reader must know about these runs, as sentences."""
    notes = []
    steps = {run: max((s.timesteps for s in scores if s.run == run), default=0) for run in runs}
    if len(set(steps.values())) > 1:
        each = "; ".join(f"{run.name}: {n:,}" for run, n in steps.items())
        notes.append(f"the runs were not trained for the same number of steps ({each}).")
    compared = {k for flags in FIGURES[type(study)].values() if flags for k in flags}
    others = {
        tuple(sorted((k, str(x)) for k, x in training_flags(args).items()))
        for args in ({k: x for k, x in a.items() if k not in compared} for a in runs.values())
    }
    if len(others) > 1:
        differ = sorted({k for k, _ in set.symmetric_difference(*map(set, list(others)[:2]))})
        flags = ", ".join(f"--{k.replace('_', '-')}" for k in differ)
        notes.append(f"the runs differ in more than what is compared here: {flags}.")
    return notes


def compare_variants(study: Variants) -> None:
    """Train where no runs were given, then draw; one set of files for each kind of bots."""
    name = type(study).__name__.lower()
    if study.runs and study.extra:
        raise UsageError("--extra is for runs to train, and --runs names finished ones.")
    paths = list(study.runs) or train_all(study)
    if study.dry_run:
        return
    runs = {run: read_args(run) for run in paths}
    if len({args["substrate"] for args in runs.values()}) > 1:
        raise UsageError(f"{name} compares runs on one substrate, and these are on several.")
    variants, scores = list(FIGURES[type(study)]), []
    for run, args in runs.items():
        own = read_scores(run, variant_of(args, study, run), args, study.quantity)
        if not own:
            raise UsageError(f"{run} has no final evaluation yet.")
        scores += own
    kinds = sorted({score.bots for score in scores} - {""})
    notes = notes_on(runs, scores, study)
    for bots in kinds or [""]:
        out = study.out or Path(name)
        out = out if len(kinds) < 2 else beside(out, f"-{bots}")
        chosen = [score for score in scores if score.bots == bots]
        if not bots:
            notes.append(
                "none of these runs was evaluated beside scenarios"
                f" ({next(iter(runs.values()))['substrate']}), so this is {SELF_PLAY}, which says"
                " little about unseen co-players."
            )
        draw_variants(study, chosen, runs, variants, bots, out, notes)


def draw_variants(
    study: Variants, scores: list[Score], runs: dict, variants: list[str], bots: str, out, notes
) -> None:
    """Bars of every scenario and, where evaluations on the way were logged, curves below them."""
    places = sorted({score.row for score in scores}, key=lambda row: (len(row), row))
    curves = {}
    for place in places:
        row = f"{place} {bots}" if bots else place
        for run, args in runs.items():
            points = read_progress(run, row, study.quantity)
            variant = variant_of(args, study, run)
            curves.setdefault(place, {}).setdefault(variant, []).append(points)
    logged = any(points for row in curves.values() for own in row.values() for points in own)
    lines, columns = 1 + logged, len(places)
    width = max(2.6, 0.42 * len(variants) + 0.5)
    size = (max(5.0, width * columns + 0.6), 2.9 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    rows = []
    for column, place in enumerate(places):
        own = [score for score in scores if score.row == place]
        rows += draw_bars(axes[0][column], own, variants, study.quantity)
        axes[0][column].set_title(place, fontsize=10)
        if logged:
            draw_progress(axes[1][column], curves[place], variants)
    label = tables.QUANTITIES[study.quantity].replace(" per", "\nper", 1)
    for line in axes:
        line[0].set_ylabel(label, fontsize=9)
    substrate = next(iter(runs.values()))["substrate"]
    beside_whom = f"{bots} bots" if bots else "self-play"
    title = f"{substrate}, {beside_whom}\ndots: runs; lines: 95 % intervals"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    finish(out, variant_text(rows, variants, study, notes), rows, figure)


# --- Networks on a rollout: Figures 5 and 7 -------------------------------------------------------


@contextlib.contextmanager
def loaded(run: Path, num_envs: int, seed: int) -> Iterator[tuple]:
    """A run's script, arguments and agent, fresh worlds, and what collect() needs."""
    args = read_args(run)
    script = load_script(args["script"])
    try:
        saved, _ = script.load_checkpoint(str(run))
        known = {field.name for field in dataclasses.fields(script.Args)}
        own = {k: tuple(x) if isinstance(x, list) else x for k, x in saved["args"].items()}
        own = {k: x for k, x in own.items() if k in known}  # an older run may have others
        args = dataclasses.replace(script.Args(**own), num_envs=num_envs, device="cpu")
        with script.make_envs(args, num_envs, seed + 10**6) as envs:
            agent = script.Agent(args, envs.spec, torch.device("cpu"))
            script.restore(agent.parts(), saved["agent"], str(run))
            rngs = [torch.Generator().manual_seed(seed + k) for k in (0, 1)]
            carry = script.new_carry(agent, num_envs)
            envs.reset()
            yield script, args, envs, agent, carry, script.Sprites(envs, agent.device), rngs
    except (script.RunError, WorldError) as error:
        raise UsageError(str(error)) from None


def play(script: Any, args: Any, envs, agent, carry, sprites, rngs) -> Any:
    """One rollout of the training population; a parent's script has one generator."""
    own = [name for name in script.new_generators(0, 0)]
    return script.collect(args, envs, agent, carry, sprites, *rngs[: len(own)])


@torch.no_grad()
def policy(script: Any, net: Any, batch: Any, hidden: torch.Tensor, length: int, sprites: Any):
    """Probabilities (T, B, N, A) of a network that lives through a rollout from its stored state
    (C, B, N, S)."""
    views = (batch.tile_ids, batch.actor_features, batch.starts[:-1])
    return script.replay(net, views, hidden[0], length, sprites)[0].softmax(-1)


def joint(theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Mean over observations of pi_theta x pi_phi, both (S, A) -> (A, A), theta's actions down."""
    return np.einsum("sa,sb->ab", theta, phi) / len(theta)


def min_max(x: np.ndarray) -> np.ndarray:
    """Into [0, 1]; zeros where all are alike."""
    return (x - x.min()) / (np.ptp(x) or 1)


MODES = ("before", "kl", "entropy", "random", "noise")


def reverse_phases(study: Fig7) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray], dict]:
    """About the run; theta's probabilities (S, A) on the rollout's observations, phi's before and
    after one phase of each kind, and each phase's scalars (KL, shift, ... before and after)."""
    if read_args(study.run)["script"] != SCRIPT:
        raise UsageError(f"{study.run} is not a run of {SCRIPT}.py, and has no phi.")
    with loaded(study.run, study.num_envs, study.seed) as (script, args, envs, agent, *rest):
        carry, sprites, rngs = rest
        for _ in range(study.warm_up + 1):
            batch = play(script, args, envs, agent, carry, sprites, rngs)
        options = {"no_forward": False, "no_reverse": False}
        for name in ("reverse_lr", "reverse_epochs", "noise_std"):
            if getattr(study, name) is not None:
                options[name] = getattr(study, name)
        args = dataclasses.replace(args, **options)
        what = (batch, carry, sprites)
        if study.start == "near":
            rng = torch.Generator().manual_seed(study.seed)
            script.distill(args, "forward", agent, *what, rng, lambda: None)
        look = functools.partial(policy, script, batch=batch, length=args.chunk_length)
        look = functools.partial(look, sprites=sprites)
        theta = look(agent.actor, hidden=batch.actor_hidden)
        start, phis, scalars = agent.distilled, {}, {}
        phis["before"] = look(start, hidden=batch.distilled_hidden)
        for mode in MODES[1:]:
            agent.distilled = copy.deepcopy(start)
            agent.args = phase = dataclasses.replace(args, reverse_mode=mode)
            rng = torch.Generator().manual_seed(study.seed)
            found = script.distill(phase, "reverse", agent, *what, rng, lambda: None)
            scalars[mode] = {k.removeprefix("reverse/"): float(x) for k, x in found.items()}
            phis[mode] = look(agent.distilled, hidden=batch.distilled_hidden)
        about = {"actions": envs.spec.actions, "timesteps": trained_steps(study.run)}
        about |= {name: getattr(args, name) for name in ("reverse_lr", "reverse_epochs")}
        about |= {"noise_std": args.noise_std, "substrate": args.substrate}
    flat = {mode: x.flatten(0, -2).double().numpy() for mode, x in phis.items()}
    return about, theta.flatten(0, -2).double().numpy(), flat, scalars


def trained_steps(run: Path) -> int:
    """Environment steps of a run's newest checkpoint."""
    return json.loads((run / "checkpoints.json").read_text())[0]["timesteps"]


def heat_maps(study: Fig7) -> None:
    """Fig. 7, for one observation and for the mean over all."""
    positive(
        num_envs=study.num_envs, reverse_lr=1 if study.reverse_lr is None else study.reverse_lr
    )
    about, theta, phis, scalars = reverse_phases(study)
    surest = int(theta.max(1).argmax())
    chosen = surest if study.observation is None else study.observation
    if not 0 <= chosen < len(theta):
        raise UsageError(f"--observation {chosen}: the rollout has 0 to {len(theta) - 1}.")
    actions = theta.shape[1]
    figure, axes = plt.subplots(2, len(MODES), figsize=(2.5 * len(MODES) + 0.6, 6.3))
    rows, lines = [], []
    for column, mode in enumerate(MODES):
        phi = phis[mode]
        first = scalars["kl"] if mode == "before" else scalars[mode]
        when = "before" if mode == "before" else "after"
        kl, shift, peak = (first[f"{name}_{when}"] for name in ("kl", "shift", "phi_peak"))
        one, all_of_them = joint(theta[[chosen]], phi[[chosen]]), joint(theta, phi)
        best = phi[chosen].argmax()
        own_kl = float((theta[chosen] * np.log(theta[chosen] / phi[chosen])).sum())
        titles = (
            f"{mode}\nφ prefers {best + 1} ({phi[chosen, best]:.2f}), KL {own_kl:.3g}",
            f"shift {shift:.2f}, KL {kl:.3g}",
        )
        for line, (x, title) in enumerate(zip((one, all_of_them), titles)):
            axis = axes[line, column]
            image = axis.imshow(min_max(x), cmap="viridis", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            ticks = range(0, actions, 1 if actions <= 10 else 4)
            axis.set_xticks(ticks, [t + 1 for t in ticks], fontsize=8)
            axis.set_yticks(ticks, [t + 1 for t in ticks], fontsize=8)
            for (a, b), p in np.ndenumerate(x):
                what = f"observation {chosen}" if line == 0 else "mean"
                row = dict(phi=mode, of=what, theta_action=a + 1, phi_action=b + 1)
                rows.append(row | dict(probability=float(p), normalised=float(min_max(x)[a, b])))
        cells = (kl, shift, first[f"phi_prefers_{when}"], peak)
        names = ("KL(θ‖φ)", "shift", "π_φ(a*_θ)", "π_φ(a*_φ)")
        cells = {name: f"{x:.4g}" for name, x in zip(names, cells)}
        here = f"{best + 1} ({phi[chosen, best]:.3f})"
        lines.append({"φ": mode} | cells | {f"φ prefers in observation {chosen}": here})
    prefers = f"θ prefers {theta[chosen].argmax() + 1} ({theta[chosen].max():.2f})"
    axes[0, 0].set_ylabel(f"observation {chosen}: {prefers}\nactions of π_θ", fontsize=9)
    axes[1, 0].set_ylabel(f"mean of {len(theta):,} observations\nactions of π_θ", fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("actions of π_φ", fontsize=9)
    how = f"rate {about['reverse_lr']:g}, {about['reverse_epochs']} epochs, noise "
    how += f"{about['noise_std']:g}, φ {study.start}"
    title = f"π_φ x π_θ after one reverse phase, min-max normalised ({how})"
    figure.suptitle(
        f"{title}\n{study.run.resolve().name}, {about['timesteps']:,} steps", fontsize=10
    )
    figure.tight_layout(rect=(0, 0, 0.94, 1))
    bar = figure.add_axes((0.95, 0.15, 0.012, 0.65))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    key = "; ".join(f"{i}: {what}" for i, what in enumerate(map(describe, about["actions"]), 1))
    text = f"# Fig. 7: π_φ x π_θ after one reverse phase, {study.run.resolve().name}\n\n"
    text += (
        f"{about['substrate']}, {about['timesteps']:,} steps; {how}. The first four figures are "
    )
    text += f"means over the rollout's {len(theta):,} observations; in observation {chosen} "
    text += f"{prefers}{', surest of all' if chosen == surest else ''}. Actions: {key}.\n\n"
    finish(study.out, text + markdown_table(lines), rows, figure)


def describe(action: dict[str, int]) -> str:
    """What an action sends to the engine, without zeros: "turn -1"."""
    return ", ".join(f"{name} {x}" for name, x in action.items() if x) or "nothing"


class Sample(NamedTuple):
    """What a run's training population does."""

    run: Path
    method: str
    seed: int
    timesteps: int
    points: np.ndarray  # (S, N A) the agents' probabilities side by side
    fictitious: np.ndarray  # (S,) how many agents act with phi
    agents: int  # N


def sample_population(run: Path, study: Fig5) -> Sample:
    """Roll out a run as in training and keep the policies that acted."""
    args = read_args(run)
    method = method_of(args) if study.group_by == "method" else without_seed(run)
    acting, fictitious = [], []
    with loaded(run, study.num_envs, study.seed) as (script, own, envs, agent, *rest):
        for number in range(study.warm_up + study.rollouts):
            batch = play(script, own, envs, agent, *rest)
            if number < study.warm_up:
                continue
            if hasattr(batch, "trained"):  # BiDist: theta or phi, as drawn
                probs = torch.where(batch.trained[..., None], batch.theta, batch.phi).exp()
                fictitious.append((~batch.trained).sum(-1).flatten())
            else:
                hidden, sprites = batch.actor_hidden, rest[1]
                probs = policy(script, agent.actor, batch, hidden, own.chunk_length, sprites)
                fictitious.append(torch.zeros(probs.shape[:2], dtype=torch.int64).flatten())
            acting.append(probs.flatten(2).flatten(0, 1))
    points, count = torch.cat(acting).double().numpy(), torch.cat(fictitious).numpy()
    if len(points) < study.samples:
        raise UsageError(f"--samples {study.samples}: the rollouts of {run} have {len(points)}.")
    rows = np.random.default_rng(study.seed).permutation(len(points))[: study.samples]
    about = (run, method, args["seed"], trained_steps(run))
    return Sample(*about, points[rows], count[rows], probs.shape[2])


def spread(points: np.ndarray, agents: int) -> dict[str, float]:
    """How far apart samples (S, N A) are, over all pairs: the mean Euclidean distance and, between
    two agents' policies, the mean total variation, from 0 to 1."""
    from scipy.spatial.distance import pdist

    total = pdist(points, "cityblock") / (2 * agents)
    return {"distance": float(pdist(points).mean()), "total_variation": float(total.mean())}


def embed(points: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE of scikit-learn, standard but for the seed: (S, D) -> (S, 2)."""
    from sklearn.manifold import TSNE

    return TSNE(perplexity=perplexity, random_state=seed).fit_transform(points.astype(np.float32))


def distributions(study: Fig5) -> None:
    """Fig. 5, and the spread in figures."""
    positive(samples=study.samples, rollouts=study.rollouts, num_envs=study.num_envs)
    if not study.runs:
        raise UsageError("fig5 needs at least one run directory.")
    worlds = {run: read_args(run)["substrate"] for run in study.runs}
    if len(set(worlds.values())) > 1:
        raise UsageError("fig5 compares runs on one substrate, and these are on several.")
    if not 0 < study.perplexity < study.samples * len(study.runs):
        raise UsageError(f"--perplexity {study.perplexity:g} must lie between 0 and all samples.")
    samples = [sample_population(run, study) for run in study.runs]
    flat = embed(np.concatenate([s.points for s in samples]), study.perplexity, study.seed)
    places = np.split(flat, np.cumsum([len(s.points) for s in samples])[:-1])
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
    marks += [plt.Line2D([], [], color="grey", marker="x", lw=0)] * any(
        s.fictitious.any() for s in samples
    )
    labels = [*methods, "with fictitious agents"]
    figure.legend(marks, labels, loc="lower center", ncols=min(3, len(marks)), fontsize=8)
    world = worlds[study.runs[0]]
    title = f"t-SNE of joint action distributions, {world}, {study.samples} samples of each run"
    figure.suptitle(f"{title}\nareas and distances mean nothing; spread: see the table", fontsize=9)
    figure.tight_layout(rect=(0, 0.04 + 0.05 * -(-len(marks) // 3), 1, 1))
    rows, lines = [], []
    for s, xy in zip(samples, places):
        about = dict(run=s.run.resolve().name, method=s.method, seed=s.seed)
        for at, count in zip(xy.tolist(), s.fictitious.tolist()):
            rows.append(about | dict(x=at[0], y=at[1], fictitious=count))
        spreads = spread(s.points, s.agents)
        trained = s.points[s.fictitious == 0]
        only = spread(trained, s.agents)["distance"] if len(trained) > 1 else np.nan
        lines.append(
            about
            | {"steps": f"{s.timesteps:,}", "samples": len(s.points)}
            | {"mean distance": f"{spreads['distance']:.4f}"}
            | {"mean total variation": f"{spreads['total_variation']:.4f}"}
            | {"fictitious": f"{s.fictitious.mean() / s.agents:.0%}"}
            | {"mean distance, all trained": "" if np.isnan(only) else f"{only:.4f}"}
        )
    text = f"# Fig. 5: joint action distributions, {world}\n\n"
    text += (
        "A sample is what the policies that acted in one step of one world give to every action, "
        "for all agents side by side. Mean distance: Euclidean, over all pairs of a run's samples; "
        "mean total variation: between the same agent's policies in two samples, from 0 to 1. Both "
        "are in probability space, and both grow with how much a policy depends on what it sees, "
        "not only with the number of policies. Distances in the t-SNE itself mean nothing.\n\n"
    )
    finish(study.out, text + markdown_table(lines), rows, figure)


# --- Over training --------------------------------------------------------------------------------

SCALARS = {  # of every iteration, and before and after every phase
    "kl": "KL(π_θ ‖ π_φ)",
    "shift": "preference shift",
    "theta_prefers": "π_θ(a*_θ)",
    "phi_prefers": "π_φ(a*_θ)",
}
PHASES = {"forward": "tab:green", "reverse": "tab:red"}


def read_shift(run: Path) -> list[dict[str, Any]]:
    """A row per logged figure; phase and when (before, after) are empty for the rollout's own."""
    read_args(run)
    log = read_log(run)
    if not any("kl" in scalars for scalars in log):
        raise UsageError(f"{run} logs no KL: it is not a run of {SCRIPT}.py, or has not begun.")
    rows = []
    for scalars in log:
        place = dict(run=run.resolve().name, timesteps=scalars["timesteps"])
        for name in SCALARS:
            if name in scalars:
                row = dict(scalar=name, phase="", when="", value=scalars[name])
                rows.append(place | row)
            for phase, when in itertools.product(PHASES, ("before", "after")):
                if (value := scalars.get(f"{phase}/{name}_{when}")) is not None:
                    rows.append(place | dict(scalar=name, phase=phase, when=when, value=value))
    return rows


def draw_shift(study: Shift) -> None:
    """A column per run: curves of the rollouts, a stroke from before to after for each phase."""
    if not study.runs:
        raise UsageError("shift needs at least one run directory.")
    logs = {run: read_shift(run) for run in study.runs}
    size = (max(6.0, 4.4 * len(logs) + 0.6), 8.2)
    figure, axes = plt.subplots(4, len(logs), figsize=size, squeeze=False, sharex="col")
    for column, (run, rows) in enumerate(logs.items()):
        for line, (name, label) in enumerate(SCALARS.items()):
            axis = axes[line][column]
            own = [r for r in rows if r["scalar"] == name]
            steps, values = zip(
                *((r["timesteps"] / 1000, r["value"]) for r in own if not r["phase"])
            )
            axis.plot(steps, values, color="0.45", lw=0.8, label="every rollout")
            for phase, colour in PHASES.items():
                ends = {"before": {}, "after": {}}
                for r in own:
                    if r["phase"] == phase:
                        ends[r["when"]][r["timesteps"] / 1000] = r["value"]
                for when, fill in (("before", "white"), ("after", colour)):
                    style = {"ms": 4, "lw": 0, "mec": colour, "mfc": fill, "mew": 0.8, "zorder": 3}
                    label_ = f"{when} a {phase} phase"
                    axis.plot(ends[when].keys(), ends[when].values(), "o", label=label_, **style)
                low, high = ([*ends[when].values()] for when in ("before", "after"))
                axis.vlines([*ends["before"]], low, high, color=colour, lw=0.8)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
            if line == 0:
                axis.set_title(run.resolve().name, fontsize=10)
            if column == 0:
                axis.set_ylabel(label, fontsize=9)
        axes[-1][column].set_xlabel("thousand environment steps", fontsize=9)
    rows = [row for own in logs.values() for row in own]
    marks = [r["value"] for r in rows if r["scalar"] == "kl" and r["phase"]]
    low, high = min(marks, default=0), max(r["value"] for r in rows if r["scalar"] == "kl")
    largest = max(r["value"] for r in rows if r["scalar"].endswith("prefers"))
    for column in range(len(logs)):  # one scale for all runs
        if low > 0:  # at the very start theta and phi are alike: that would squeeze the rest
            axes[0][column].set(yscale="log", ylim=(low / 1.5, high * 1.5))
        axes[1][column].set_ylim(-0.03, 1.03)
        for line in (2, 3):
            axes[line][column].set_ylim(0, min(1.03, 1.15 * largest))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    finish(study.out, shift_text(rows), rows, figure)


def shift_text(rows: list[dict[str, Any]]) -> str:
    """OUT.md: means over all phases of a kind, and over the last third of training's."""
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


# --- Main -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 and one sentence for what cannot be done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, extra = (
        (argv[: (i := argv.index("--extra"))], argv[i + 1 :]) if "--extra" in argv else (argv, [])
    )
    kinds = (*FIGURES, Fig7, Fig5, Shift)
    study = tyro.extras.subcommand_cli_from_dict(
        {kind.__name__.lower(): kind for kind in kinds}, args=argv, description=__doc__
    )
    torch.set_num_threads(1)

    def run() -> None:
        if extra and not isinstance(study, Variants):
            raise UsageError("--extra is for the figures that train runs.")
        if isinstance(study, Variants):
            compare_variants(dataclasses.replace(study, extra=tuple(extra)))
        else:
            {Fig7: heat_maps, Fig5: distributions, Shift: draw_shift}[type(study)](study)

    try:
        return one_line_errors(run)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
