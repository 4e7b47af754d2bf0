"""Runs, as every command here reads, starts and packs them; and the files that commands write.

    python experiments/runs.py pack docs/data/study_sz.csv runs/sz-*

A run is a directory that a script wrote, or a part of a study: one CSV with what tables need of
many runs (arguments, the final evaluation, every episode beside scenarios, curves of at most 100
points), which is small enough for a repository. `pack` makes a study; --curves names the scalars to
keep, as shell patterns. Commands that read no checkpoint take both: compare.py, scenario_table.py,
claims.py, `mipi.py tables`, `bidist.py fig6`.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import functools
import importlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import FINISHED, STOPPED, RunError, UsageError, as_flag, call

import matplotlib
import numpy as np
import pydantic
import tyro
from PIL import Image

from envs.statistics import markdown_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories, studies
POINTS = 100  # of a packed curve, at most


# --- Command lines --------------------------------------------------------------------------------


def options_of(function: Callable) -> type:
    """The dataclass that a command takes."""
    (kind,) = (x for name, x in typing.get_type_hints(function).items() if name != "return")
    return kind


def run_command(function: Callable, argv: list[str] | None, text: str) -> int:
    """The exit code of one command, whose only parameter is a dataclass of its options."""

    def run() -> int:
        study = tyro.cli(options_of(function), args=argv, description=text)
        check_bounds(study)
        function(study)
        return FINISHED

    return call(run)


def run_subcommand(
    functions: dict[str, Callable], argv: list[str] | None, text: str, **more: Any
) -> int:
    """The exit code of the command that argv names; every function has options of its own kind, of
    which `more` are set where a kind has them."""
    kinds = {name: options_of(function) for name, function in functions.items()}

    def run() -> int:
        study = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, description=text)
        (function,) = (f for name, f in functions.items() if kinds[name] is type(study))
        for name, value in more.items():
            if hasattr(study, name):
                study = dataclasses.replace(study, **{name: value})
            elif value:
                raise UsageError(f"{as_flag(name)} is not for this command.")
        check_bounds(study)
        function(study)
        return FINISHED

    return call(run)


def check_bounds(study: Any) -> None:
    """UsageError for the first option outside the bounds in its annotation."""
    try:
        pydantic.TypeAdapter(type(study)).validate_python(dataclasses.asdict(study))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        flag = as_flag(str(wrong["loc"][0]))
        raise UsageError(f"{flag} {wrong['input']}: {wrong['msg'].lower()}.") from None


# --- Scripts --------------------------------------------------------------------------------------


def script_file(script: str) -> str:
    """Where a script lies, seen from the repository."""
    for path in (f"{script}.py", f"baselines/{script}.py"):
        if (ROOT / path).exists():
            return path
    raise UsageError(f"{script}.py is not in this repository: use --group-by name.")


@functools.cache
def load_script(script: str) -> Any:
    """The script as a module."""
    return importlib.import_module(script_file(script).removesuffix(".py").replace("/", "."))


def script_args(script: Any, flags: list[str]) -> Any:
    """What flags mean to a script."""
    presets = getattr(script, "PRESETS", None)
    return harness.read_args(
        script.Args, flags, script.validate, resumable=resumable(script), presets=presets
    )


def resumable(script: Any) -> tuple[str, ...]:
    """Flags of the script's own that may change when a run goes on."""
    return getattr(script, "RESUMABLE", ())


def free_flags(script: Any) -> set[str]:
    """Flags that may differ between runs that are the same training."""
    every_script = {field.name for field in dataclasses.fields(harness.RunArgs)}
    return every_script - set(harness.FIXED) | set(resumable(script))


def training_flags(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run that training depends on, but for world, seed and length, where they
    are not the script's defaults."""
    module = load_script(args["script"])
    default = {field.name: field.default for field in dataclasses.fields(module.Args)}
    for name in {"seed", "substrate", *free_flags(module)}:
        default.pop(name, None)
    default = {name: list(x) if isinstance(x, tuple) else x for name, x in default.items()}
    return {name: args[name] for name in default if name in args and args[name] != default[name]}


def method_of(args: dict[str, Any]) -> str:
    """A run's script and the flags that make it a method of its own: "bidist_mappo --k-d 10"."""
    return " ".join([args["script"].removesuffix("_meltingpot"), *as_words(training_flags(args))])


def as_words(flags: dict[str, Any]) -> list[str]:
    """Arguments as one types them, a string for each: "--k-d 10", "--no-imagine"."""
    words = []
    for name, x in flags.items():
        if isinstance(x, bool):
            words.append(as_flag(name if x else f"no_{name}"))
        else:
            words.append(f"{as_flag(name)} {x}")
    return words


# --- Runs -----------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """A run's episodes in one scenario, after so much training."""

    timesteps: int
    scenario: str  # SC0, ...
    bots: str  # official, scripted
    returns: np.ndarray  # (E,) focal, per capita, undiscounted
    lengths: np.ndarray  # (E,) steps


class Run:
    """A run directory; what is asked for is read."""

    def __init__(self, path: Path):
        self.path, self.name, self.where = path, path.resolve().name, str(path)
        if not any((path / name).is_file() for name in ("args.json", "metrics.jsonl")):
            raise UsageError(f"{path} is no run directory.")

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        """args.json, which names the script, too."""
        try:
            args = json.loads((self.path / "args.json").read_text())
            args["script"]
        except (OSError, ValueError, KeyError, TypeError):
            sentence = "is no run directory: it has no args.json with a script."
            raise UsageError(f"{self.where} {sentence}") from None
        return args

    @functools.cached_property
    def log(self) -> list[dict[str, float]]:
        """metrics.jsonl, without a last line that is being written; empty if there is none yet."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(True) if path.exists() else []
        try:
            log = [json.loads(line) for line in lines if line.endswith(b"\n")]
            for scalars in log:
                scalars["timesteps"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is damaged.") from None
        return log

    @functools.cached_property
    def steps(self) -> int:
        """Environment steps until the last line of the log."""
        return self.log[-1]["timesteps"] if self.log else 0

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """{"timesteps": n, "eval": {row: {figure: x}}}; both empty while the run goes on."""
        path = self.path / "summary.json"
        if not path.exists():
            return {"timesteps": 0, "eval": {}}
        try:
            return json.loads(path.read_text())
        except ValueError:
            raise UsageError(f"{path} is damaged.") from None

    @functools.cached_property
    def evaluations(self) -> list[Evaluation]:
        """All of its evaluations beside scenarios, but for those on the way."""
        found = []
        for path in sorted((self.path / "evaluation").glob("final-*.csv")):
            name = re.fullmatch(r"final-(\d+)-(SC\d+)-(official|scripted)\.csv", path.name)
            if name:
                returns, lengths = read_episodes(path, self.args["substrate"], name[2], name[3])
                found.append(Evaluation(int(name[1]), name[2], name[3], returns, lengths))
        return found


def read_episodes(
    path: Path, substrate: str, scenario: str, bots: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E,) and lengths (E,) from one file, held against what its name says."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UsageError(f"{path} holds no episodes.")
    columns = ("scenario", "bots", "focal_return", "length")
    if missing := [name for name in columns if name not in rows[0]]:
        raise UsageError(f"{path} has no column {missing[0]}.")
    expected = (f"{substrate}_{scenario.removeprefix('SC')}", bots)
    for row in rows:
        if (row["scenario"], row["bots"]) != expected:
            found = f"{row['scenario']} with {row['bots']} bots"
            raise UsageError(f"{path} holds {found}, not {' with '.join(expected)} bots.")
    try:
        returns, lengths = (np.array([float(row[name]) for row in rows]) for name in columns[2:])
    except (TypeError, ValueError):
        raise UsageError(f"{path} holds something that is no number.") from None
    if not np.isfinite([returns, lengths]).all() or (lengths <= 0).any():
        raise UsageError(f"{path} holds a return or a length that cannot be.")
    return returns, lengths


def read_runs(paths: Iterable[Path], only: tuple[str, ...] = ()) -> list[Run]:
    """The runs in directories and studies; with `only` those whose names match one of these
    patterns, in the order of the patterns."""
    runs: list[Run] = []
    for path in paths:
        if path.suffix == ".log" and path.with_suffix("").is_dir():
            continue  # what a launcher has put beside a run, and RUNS/*-s* names, too
        runs += read_study(path) if path.suffix == ".csv" else [Run(path)]
    if not runs:
        raise UsageError("Name at least one run directory or study.")
    if len({(run.path.resolve(), run.name) for run in runs}) < len(runs):
        raise UsageError("A run directory is named twice.")
    chosen: list[Run] = []
    for pattern in only:
        found = [run for run in runs if fnmatch.fnmatchcase(run.name, pattern)]
        if not found:
            raise UsageError(f"--only {pattern}: no run has such a name.")
        chosen += [run for run in found if run not in chosen]
    return chosen if only else runs


def without_seed(name: str) -> str:
    """The name of a run's directory without -s1, -s2, ...: seeds of one group share it."""
    return re.sub(r"-s\d+$", "", name)


# --- Studies --------------------------------------------------------------------------------------

COLUMNS = ("run", "kind", "timesteps", "row", "figure", "value")
# A line of a study, by its kind:
#   argument  figure: its name, value: JSON
#   log       value: the environment steps of the log's last line
#   curve     figure: a scalar's name
#   final     row and figure of the last evaluation
#   episode   row: "SC0 scripted"; figure: return, length
FORGOTTEN = """run_dir resume eval_only track wandb_project wandb_mode wandb_timeout capture_video
device num_threads num_workers worker_timeout log_every save_every packages resolved"""
CURVES = """return return/* episode/return episode/pick_ups_per_1000 entropy kl mi mi/*
information/* xi_loss/* xi_accuracy/* xi_accuracy_uniform_g/* reverse/phi_* eval/*/win
eval/*/return eval/*/return_agent eval/*/return_pac_man eval/*/return_ghost collect_s learn_s"""


def read_study(path: Path) -> list[Run]:
    """The runs of a study, in its order."""
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise UsageError(f"{path} is no study: runs.py pack makes one.")
    by_run: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        by_run[line["run"]].append(line)
    try:
        return [unpack(path, name, own) for name, own in by_run.items()]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged.") from None


def unpack(path: Path, name: str, lines: list[dict[str, str]]) -> Run:
    """One run of a study."""
    run = Run.__new__(Run)
    run.path, run.name, run.where = path, name, f"{name} in {path}"
    run.args, run.log, run.steps = {}, [], 0
    results: dict[str, dict[str, float]] = {}
    ended, episodes = 0, defaultdict(list)
    for line in lines:
        kind, row, figure, value = (line[x] for x in ("kind", "row", "figure", "value"))
        if kind == "argument":
            run.args[figure] = json.loads(value)
        elif kind == "log":
            run.steps = int(value)
        elif kind == "curve":
            add_to_log(run.log, int(line["timesteps"]), figure, float(value))
        elif kind == "final":
            ended = int(line["timesteps"])
            results.setdefault(row, {})[figure] = float(value)
        elif kind == "episode":
            episodes[int(line["timesteps"]), *row.split(), figure].append(float(value))
    run.log.sort(key=lambda scalars: scalars["timesteps"])
    for row in results.values():
        row["episodes"] = int(row["episodes"])
    run.summary = {"timesteps": ended, "eval": results}
    run.evaluations = [
        Evaluation(
            steps, scenario, bots, np.array(x), np.array(episodes[steps, scenario, bots, "length"])
        )
        for (steps, scenario, bots, figure), x in episodes.items()
        if figure == "return"
    ]
    return run


def add_to_log(log: list[dict[str, float]], timesteps: int, name: str, value: float) -> None:
    """A scalar of a line of the log; a line of its own where that step has none yet."""
    for scalars in reversed(log):
        if scalars["timesteps"] == timesteps and name not in scalars:
            scalars[name] = value
            return
    log.append({"timesteps": timesteps, name: value})


def pack_lines(run: Run, curves: tuple[str, ...]) -> list[tuple]:
    """A run's lines of a study."""
    lines: list[tuple] = []
    for name, value in run.args.items():
        if name not in FORGOTTEN.split():
            lines.append((run.name, "argument", "", "", name, json.dumps(value)))
    if run.log:
        lines.append((run.name, "log", "", "", "timesteps", run.steps))
    names = dict.fromkeys(name for scalars in run.log for name in scalars)
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in curves):
            for at, value in thinned(run.log, name):
                lines.append((run.name, "curve", at, "", name, as_text(value)))
    for row, figures in run.summary["eval"].items():
        for figure, value in figures.items():
            at = run.summary["timesteps"]
            lines.append((run.name, "final", at, row, figure, as_text(value)))
    for timesteps, scenario, bots, returns, lengths in run.evaluations:
        row = f"{scenario} {bots}"
        for x, length in zip(returns, lengths, strict=True):
            lines.append((run.name, "episode", timesteps, row, "return", as_text(x)))
            lines.append((run.name, "episode", timesteps, row, "length", as_text(length)))
    return lines


def as_text(x: float) -> str:
    """A figure with as many digits as tables could show of it."""
    return f"{x:.9g}" if np.float32(x) == x else f"{x:.12g}"


def thinned(log: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    """A scalar's points; where they are more than POINTS, means (of seconds sums) over as many
    equal windows of training, each at its last point's step."""
    points = [(scalars["timesteps"], scalars[name]) for scalars in log if name in scalars]
    points = [(at, x) for at, x in points if math.isfinite(x)]
    if len(points) <= POINTS:
        return points
    windows: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for at, x in points:
        windows[-(-at * POINTS // points[-1][0])].append((at, x))
    together = np.sum if name.endswith("_s") else np.mean
    return [(own[-1][0], float(together([x for _, x in own]))) for own in windows.values()]


@dataclasses.dataclass(frozen=True)
class Pack:
    """What to pack."""

    out: Annotated[Path, tyro.conf.Positional]  # a .csv
    runs: Runs  # run directories, studies
    only: tuple[str, ...] = ()  # those whose names match one of these shell patterns
    curves: tuple[str, ...] = tuple(CURVES.split())  # scalars of the log to keep, as shell patterns


def pack(study: Pack) -> None:
    """Make a study of run directories."""
    if study.out.suffix != ".csv":
        raise UsageError(f"{study.out} is no .csv.")
    runs = read_runs(study.runs, study.only)
    lines = [line for run in runs for line in pack_lines(run, study.curves)]
    check_out(study.out)
    with study.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)
    print(f"{study.out}: {len(runs)} runs, {study.out.stat().st_size / 1000:,.0f} kB")


@dataclasses.dataclass(frozen=True)
class Show:
    """What to list."""

    runs: Runs  # run directories, studies
    only: tuple[str, ...] = ()  # those whose names match one of these shell patterns


def show(study: Show) -> None:
    """List runs: what was trained, how long, and what it left."""
    rows = []
    for run in read_runs(study.runs, study.only):
        episodes = sum(len(x.returns) for x in run.evaluations)
        row = {"run": run.name, "script": run.args["script"], "seed": run.args["seed"]}
        row |= {"steps": f"{run.summary['timesteps'] or run.steps:,}"}
        row |= {"final rows": len(run.summary["eval"]), "episodes beside bots": episodes}
        rows.append(row | {"commit": run.args.get("commit", "")})
    print(markdown_table(rows))


# --- Training -------------------------------------------------------------------------------------


class StoppedError(RunError):
    """Training was stopped and can go on."""

    code = STOPPED


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to train."""

    run: Path
    script: str  # its file, seen from the repository
    flags: tuple[str, ...]  # but for --seed, --total-timesteps and the run's directory
    seed: int
    timesteps: int
    processes: int = 1  # under torchrun

    def argv(self) -> list[str]:
        """The script's flags, but for the run's directory."""
        return [*self.flags, "--seed", str(self.seed), "--total-timesteps", str(self.timesteps)]

    def command(self) -> list[str]:
        """What begins the run or goes on with it, without Python."""
        begun = (self.run / "checkpoints.json").exists()
        return [self.script, "--resume" if begun else "--run-dir", str(self.run), *self.argv()]

    def text(self) -> str:
        """The same for a reader, from the repository."""
        torchrun = ["torchrun", "--nproc-per-node", str(self.processes)]
        return shlex.join([*(torchrun if self.processes > 1 else ["python"]), *self.command()])

    def is_finished(self) -> bool:
        """Whether the run has ended and is long enough; UsageError if it is another run."""
        if not any((self.run / name).exists() for name in ("checkpoints.json", "summary.json")):
            return False
        found = Run(self.run)
        self.check_same(found.args)
        return (self.run / "summary.json").exists() and found.summary["timesteps"] >= self.timesteps

    def check_same(self, found: dict[str, Any]) -> None:
        """UsageError if a run has other arguments. What may differ are those that the script lets
        change with --resume: length, evaluation, logging, machine."""
        script = load_script(Path(self.script).stem)
        wanted = {"script": Path(self.script).stem}
        if "--adapt" not in self.flags:  # those take their arguments from a run that may not exist
            wanted |= json.loads(json.dumps(dataclasses.asdict(script_args(script, self.argv()))))
        for name, x in wanted.items():
            theirs = found.get(name, getattr(script.Args, name, None))  # older runs lack some
            if name not in free_flags(script) and theirs != x:
                raise UsageError(f"{self.run} holds another run: its {name} is {theirs}, not {x}.")


class Trainer:
    """Trains jobs, some at a time. A signal is handed on to what is being trained, which saves and
    ends, and nothing new is started."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # that runs start in; None: this process's
        self.tell: Callable[[str], None] = functools.partial(print, flush=True)
        self.children: list[subprocess.Popen] = []
        self.lock, self.stopped = threading.RLock(), False

    def stop(self, number: int, frame: Any) -> None:
        """The handler of signals; a second one ends what is being trained at once."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)

    def start(
        self, job: Job, log: Any, environment: dict[str, str] | None = None
    ) -> subprocess.Popen | None:
        """The job's process, in a session of its own: Ctrl-C reaches it through stop() alone. With
        these variables beside its parent's."""
        script, *argv = job.command()
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(job.processes)]
        torchrun = [*torchrun, "--standalone"] if job.processes > 1 else []
        command = [sys.executable, *torchrun, str(ROOT / script), *argv]
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        options |= {"cwd": self.folder, "env": os.environ | (environment or {})}
        with self.lock:
            if self.stopped:
                return None
            self.tell(job.text())
            child = subprocess.Popen(command, start_new_session=True, **options)
            self.children.append(child)
            return child

    def train(self, job: Job) -> int:
        """The exit code of one run, which is trained to its end; a finished one is kept."""
        if job.is_finished():
            self.tell(f"{job.run}: finished already")
            return FINISHED
        return self.try_once(job)

    def try_once(self, job: Job, environment: dict[str, str] | None = None) -> int:
        """The exit code of one start."""
        try:
            job.run.parent.mkdir(parents=True, exist_ok=True)
            log = beside(job.run, ".log").open("a")
        except OSError as error:
            raise UsageError(f"{job.run} cannot be made: {error.strerror}.") from None
        with log:
            child = self.start(job, log, environment)
            code = child.wait() if child else STOPPED
        if job.processes > 1 and code and job.is_finished():
            code = FINISHED  # torchrun's code is 1 whatever happened
        return STOPPED if self.stopped and code != FINISHED else code


def train_all(
    jobs: list[Job], at_once: int = 1, dry_run: bool = False, trainer: Trainer | None = None
) -> None:
    """Train what is missing, so many at a time, or only print the commands. UsageError if runs
    failed, after all have had their turn; StoppedError if some were stopped."""
    finished = [job.is_finished() for job in jobs]  # all of them, before the first trains
    if dry_run:
        for job, done in zip(jobs, finished, strict=True):
            print(f"{job.run}: finished already" if done else job.text())
        return
    trainer = trainer or Trainer()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, trainer.stop) for number in numbers]
    try:
        with ThreadPoolExecutor(at_once) as pool:
            codes = list(pool.map(trainer.train, jobs))
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    check_codes(jobs, codes)


def check_codes(jobs: list[Job], codes: list[int]) -> None:
    """UsageError if runs failed; StoppedError if some were stopped."""
    failed = [
        f"{job.run} ended with code {code}: see {beside(job.run, '.log')}"
        for job, code in zip(jobs, codes, strict=True)
        if code not in (FINISHED, STOPPED)
    ]
    if failed:
        raise UsageError(f"{'; '.join(failed)}.")
    if left := sum(code == STOPPED for code in codes):
        raise StoppedError(f"{left} of {len(jobs)} runs were stopped; the same command goes on.")


# --- Output ---------------------------------------------------------------------------------------


def beside(out: Path, ending: str) -> Path:
    """OUT with an ending behind its name, whatever dots that has."""
    return out.with_name(out.name + ending)


def check_out(out: Path) -> None:
    """UsageError, before anything is computed, if finish() could not write there."""
    if out.name in ("", ".."):
        raise UsageError(f"--out {out} names a directory, not the files' common beginning.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None


def finish(out: Path, text: str, rows: list[dict[str, Any]], figure: Any = None) -> None:
    """Write OUT.md, OUT.csv and, of a figure, OUT.png; print the text."""
    try:
        beside(out, ".md").write_text(text)
        write_rows(beside(out, ".csv"), rows)
        if figure is not None:
            save_figure(figure, beside(out, ".png"))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None
    print(text)


def write_rows(path: Path, rows: list[dict[str, Any]], digits: int = 6) -> None:
    """A CSV; empty cells for NaN."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ())
        writer.writeheader()
        for row in rows:
            plain = {k: f"{x:.{digits}g}" if isinstance(x, float) else x for k, x in row.items()}
            writer.writerow({k: "" if x == "nan" else x for k, x in plain.items()})


def save_figure(figure: Any, path: Path) -> None:
    """A PNG of at most 256 colours, which is a third as large as one of all."""
    box = io.BytesIO()
    figure.savefig(box, dpi=90)
    plt.close(figure)
    image = Image.open(box).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_subcommand({"pack": pack, "show": show}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
