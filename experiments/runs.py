"""Read, start and pack runs, and write result files: what all commands in experiments/ share.

    python experiments/runs.py pack docs/data/study_sz.csv runs/sz-*

A run is a directory that a script wrote. A packed study is a CSV file, small enough for a
repository, with what tables need of many runs: arguments, final evaluations, scenario episodes and
curves of at most 100 points. `pack` makes one, or adds runs to one that is there: runs in it that
are not named stay, as their directories may be gone. compare.py, scenario_table.py, claims.py,
`mipi.py tables` and `bidist.py fig6` read no checkpoints: they accept run directories and studies.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import fnmatch
import functools
import importlib
import io
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import FINISHED, STOPPED, RunError, UsageError, as_flag, call

import numpy as np
import pydantic
import tyro

from envs.statistics import markdown_table

ROOT = Path(__file__).resolve().parents[1]
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories, packed studies
WORLD = ("substrate", "task", "scenario")  # flags of which each script has one: its world
# Flags by which evaluations, too, are of another world. (Melting Pot's play whole episodes.)
RULES = ("shaping", "collision_penalty", "max_episode_steps", "enemy_ai", "clip_regeneration")
LAPS = ("collect_s", "learn_s")  # seconds, since the last line of the log
MORE_FLAGS = ("--extra", "--flags")  # options that pass flags on
POINTS = 100  # a packed curve has at most so many points
SLACK = 0.05  # relative difference allowed between lengths of runs that are seeds of one arm
# By script: values of flags that older runs lack, where they did not do what is the default now.
FORMER = {
    "bidist_mappo_meltingpot": {"clip_centre": "printed"},
    "mra_maddpg_particle": {"phi_gradient": "mi", "psi_information": False},
    "mipi_refil_smac": {"mixer": "linear"},
}


# --- Command lines --------------------------------------------------------------------------------


def options_of(function: Callable) -> type:
    """The dataclass of options that a command's only parameter is annotated with."""
    (kind,) = (x for name, x in typing.get_type_hints(function).items() if name != "return")
    return kind


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what runs in this context by an exception, as Ctrl-C does, so that
    it stops its children and removes its temporary files; the exit code is 128 + signal."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    restore_signals = catch_signals(end, (signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        restore_signals()


def is_signal(error: BaseException) -> bool:
    """Whether this is the exception by which ending_by_signals() ends a program."""
    return isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128


def run_child(argv: list[str]) -> subprocess.CompletedProcess:
    """Run a command and return its code and output. If an exception ends the wait, the command is
    asked to end, as torchrun then ends its processes, too; after a minute it is killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, **pipes) as child:
        try:
            output = child.communicate()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=60)
            child.kill()
            raise
    return subprocess.CompletedProcess(argv, child.returncode, *output)


def run_command(function: Callable, argv: list[str] | None, text: str) -> int:
    """Call the function with options read from argv; return the exit code. text: for --help."""

    def run() -> int:
        study = tyro.cli(options_of(function), args=argv, description=text)
        check_typed(study, argv)
        with ending_by_signals():
            function(study)
        sys.stdout.flush()  # at exit Python would print a traceback where this fails
        return FINISHED

    return call(run)


def run_subcommand(
    functions: dict[str, Callable], argv: list[str] | None, text: str, **more: Any
) -> int:
    """Call the function that the subcommand in argv names; return the exit code. Each has its own
    dataclass of options. `more` sets its fields; a true value for a missing one is a UsageError."""
    kinds = {name: options_of(function) for name, function in functions.items()}

    def run() -> int:
        study = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, description=text)
        (function,) = (f for name, f in functions.items() if kinds[name] is type(study))
        check_typed(study, argv)
        for name, value in more.items():
            if hasattr(study, name):
                study = dataclasses.replace(study, **{name: value})
            elif value:
                raise UsageError(f"{as_flag(name)} is not for this command.")
        with ending_by_signals():
            function(study)
        sys.stdout.flush()  # at exit Python would print a traceback where this fails
        return FINISHED

    return call(run)


def check_typed(study: Any, argv: list[str] | None) -> None:
    """Raise UsageError for the first option outside the bounds in its annotation, and for what an
    unset variable leaves: an empty word (more flags may be none), or no name after an option that
    stands for all of them where it is not typed."""
    words = sys.argv[1:] if argv is None else argv
    flags = [word.partition("=")[0].replace("_", "-") for word in words]
    for before, word in itertools.pairwise(["", *words]):
        flag, equals, value = word.partition("=")
        if not word:
            flag = before if before.startswith("--") else "An argument"
        empty = not word or (flag.startswith("--") and equals and not value)
        if empty and flag not in MORE_FLAGS:
            raise UsageError(f"{flag} has an empty value (an unset variable?).")
    for field in dataclasses.fields(study):
        flag = as_flag(field.name)
        if field.default == () and getattr(study, field.name) == () and flag in flags:
            raise UsageError(f"{flag} names nothing (an unset variable?).")
    try:
        pydantic.TypeAdapter(type(study)).validate_python(dataclasses.asdict(study))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        flag = as_flag(str(wrong["loc"][0]))
        raise UsageError(f"{flag} {wrong['input']}: {wrong['msg'].lower()}.") from None


def split_words(text: str, where: str) -> list[str]:
    """The words of a command line. UsageError, which begins with `where`, for an open quotation."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{where}: {text}: {str(error).lower()}.") from None


# --- TOML files -----------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file. UsageError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {str(error).lower()}.") from None


def first_fault(error: pydantic.ValidationError) -> str:
    """Text: where the first fault is and what it is, as "seeds.0: field required"."""
    wrong = error.errors()[0]
    place = ".".join(map(str, wrong["loc"])) or "the entry"
    return f"{place}: {wrong['msg'].removeprefix('Value error, ').lower()}"


# --- Scripts --------------------------------------------------------------------------------------


def paths_of(script: str) -> list[str]:
    """The path of a script in the repository; none if it is not there."""
    return [x for x in (f"{script}.py", f"baselines/{script}.py") if (ROOT / x).exists()]


def script_file(script: str) -> str:
    """A script's path relative to the repository; UsageError if there is no such script."""
    for path in paths_of(script):
        return path
    raise UsageError(f"{script}.py is not in this repository: use --group-by name.")


@functools.cache
def load_script(script: str) -> Any:
    """Import a script by its name without ".py"."""
    return importlib.import_module(script_file(script).removesuffix(".py").replace("/", "."))


def kind_of(script: str) -> str:
    """The script itself or, for a fork with a line FORK_OF = "mra_maddpg_particle", this one."""
    if not paths_of(script):
        return script
    return getattr(load_script(script), "FORK_OF", script)


def check_kind(run: Run, *known: str) -> str:
    """kind_of() a run's script; UsageError unless it is among the `known` ones."""
    script = run.args["script"]
    if (kind := kind_of(script)) not in known:
        wanted = f"{' or '.join(known)}, nor of a fork with FORK_OF"
        raise UsageError(f"{run.where} is a run of {script}.py, not of {wanted}.")
    return kind


def load_training_script(file: str) -> Any:
    """Import a script by its path in the repository. UsageError unless it is one that trains."""
    name = Path(file).stem
    known = Path(file) in (Path(f"{name}.py"), Path(f"baselines/{name}.py"))
    script = load_script(name) if known else None
    if not hasattr(script, "Args"):
        raise UsageError(f"{file} is no script that trains.")
    return script


# Flags of battles that --eval-only may change but --resume may not, though RESUMABLE has them.
FOR_EVALUATION = {"backend", "game_version", "num_envs"}


def script_args(script: Any, flags: list[str]) -> Any:
    """The Args that a script makes of flags, with its presets and its validate()."""
    presets = getattr(script, "PRESETS", None)
    return harness.read_args(
        script.Args, flags, script.validate, resumable=resumable(script), presets=presets
    )


def resumable(script: Any) -> tuple[str, ...]:
    """The script's own flags that may change when a run is resumed."""
    return getattr(script, "RESUMABLE", ())


def free_flags(script: Any) -> set[str]:
    """Flags that do not affect training: RunArgs' but for FIXED ones, and the resumable ones."""
    every_script = {field.name for field in dataclasses.fields(harness.RunArgs)}
    return every_script - set(harness.FIXED) | set(resumable(script)) - FOR_EVALUATION


def training_flags(args: dict[str, Any]) -> dict[str, Any]:
    """A run's arguments that affect training and differ from the script's defaults, without world,
    seed and length."""
    module = load_script(args["script"])
    default = {field.name: field.default for field in dataclasses.fields(module.Args)}
    for name in {"seed", "substrate", *free_flags(module)}:
        default.pop(name, None)
    default = {name: list(x) if isinstance(x, tuple) else x for name, x in default.items()}
    return {name: args[name] for name in default if name in args and args[name] != default[name]}


def method_of(args: dict[str, Any]) -> str:
    """The name of a run's method: its script and training_flags(), as "bidist_mappo --k-d 10"."""
    return " ".join([args["script"].removesuffix("_meltingpot"), *as_words(training_flags(args))])


def as_words(flags: dict[str, Any]) -> list[str]:
    """Arguments as on a command line, one string each: "--k-d 10", "--no-imagine"."""
    words = []
    for name, x in flags.items():
        if isinstance(x, bool):
            words.append(as_flag(name if x else f"no_{name}"))
        elif isinstance(x, (list, tuple)):
            words.append(" ".join([as_flag(name), *map(str, x)]))
        else:
            words.append(f"{as_flag(name)} {x}")
    return words


# --- Runs -----------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """The E episodes of one evaluation of a run in one scenario."""

    timesteps: int  # environment steps of training before it
    scenario: str  # SC0, ...
    bots: str  # official or scripted
    returns: np.ndarray  # (E,) focal per-capita returns, undiscounted
    lengths: np.ndarray  # (E,) environment steps


class Row(pydantic.BaseModel, extra="allow"):
    """A row of a final evaluation: its figures by name."""

    __pydantic_extra__: dict[str, float]
    episodes: int


class Summary(pydantic.BaseModel):
    """What is read of a run's summary.json."""

    timesteps: int  # environment steps of training
    eval: dict[str, Row]  # the final evaluation


def as_today(args: dict[str, Any]) -> dict[str, Any]:
    """A run's arguments with FORMER ones where it lacks them. Once --no-forward and --no-reverse
    were flags of their own, and --observe-self-only was --alpha inf."""
    args = FORMER.get(args.get("script"), {}) | args
    if args.get("alpha") == math.inf:
        args |= {"alpha": None, "observe_self_only": True}
    for name in ("forward", "reverse"):
        if f"no_{name}" in args:
            args[name] = not args.pop(f"no_{name}")
    return args


class Run:
    """A run directory. Each file is read on first use. UsageError if it is no run directory."""

    def __init__(self, path: Path):
        # A link has its own name, by which seeds can be grouped; "." has that of its directory.
        name = path.name if path.name not in ("", "..") else path.resolve().name
        self.path, self.name, self.where = path, name, str(path)
        if not any((path / name).is_file() for name in ("args.json", "metrics.jsonl")):
            raise UsageError(f"{path} is no run directory.")

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        """The run's arguments and, as "script", its script. UsageError if there are none."""
        try:
            args = json.loads((self.path / "args.json").read_text())
            if not isinstance(args["script"], str):
                raise TypeError(args["script"])
        except (OSError, ValueError, KeyError, TypeError):
            sentence = "is no run directory: it has no args.json with a script."
            raise UsageError(f"{self.where} {sentence}") from None
        return as_today(args)

    @functools.cached_property
    def log(self) -> list[dict[str, float]]:
        """The scalars of each complete line of metrics.jsonl; empty if there is no log yet."""
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_bytes().splitlines(True) if path.exists() else []
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
        try:
            log = [json.loads(line) for line in lines if line.endswith(b"\n")]
            for scalars in log:
                scalars["timesteps"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is damaged.") from None
        return log

    @functools.cached_property
    def steps(self) -> int:
        """Environment steps in the last line of the log; 0 without a log."""
        return self.log[-1]["timesteps"] if self.log else 0

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """{"timesteps": n, "eval": {row: {figure: x}}}; 0 and {} if the run has not finished."""
        path = self.path / "summary.json"
        if not path.exists():
            return {"timesteps": 0, "eval": {}}
        try:
            summary = json.loads(path.read_text())
            Summary.model_validate(summary, strict=True)
        except (OSError, ValueError):
            raise UsageError(f"{path} is damaged.") from None
        return summary

    @functools.cached_property
    def evaluations(self) -> list[Evaluation]:
        """The run's final evaluations in scenarios; evaluations during training are not read."""
        found = []
        for path in sorted((self.path / "evaluation").glob("final-*.csv")):
            name = re.fullmatch(r"final-(\d+)-(SC\d+)-(official|scripted)\.csv", path.name)
            if name:
                returns, lengths = read_episodes(path, self.args["substrate"], name[2], name[3])
                found.append(Evaluation(int(name[1]), name[2], name[3], returns, lengths))
        return found


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV below its header. UsageError if it cannot be read or is no text."""
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(f"{path} is damaged.") from None


def read_episodes(
    path: Path, substrate: str, scenario: str, bots: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E,) and lengths (E,) of the episodes in a CSV. UsageError if the file is damaged or
    its rows have another scenario or other bots than its name says."""
    rows = read_lines(path)
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


def name_of(run: Run) -> Any:
    return run.name


def name_in_world(run: Run) -> Any:
    """A run's name and world: studies of several worlds may use the same names."""
    return run.name, *(run.args.get(flag) for flag in WORLD)


def rules_of(run: Run) -> dict[str, Any]:
    """{flag of RULES: its value}; flags that are newer than the run have their defaults."""
    if "substrate" in run.args:
        return {}
    known = paths_of(run.args["script"])
    defaults = vars(load_script(run.args["script"]).Args()) if known else {}
    both = defaults | run.args
    return {name: both[name] for name in RULES if name in both}


def trained_by(run: Run) -> dict[str, Any]:
    """A run's script, world and training_flags(), which all seeds of an arm share. Flags of a
    script that is not in this repository are left out."""
    _, *world = name_in_world(run)
    found = {"script": run.args["script"]} | dict(zip(WORLD, world, strict=True))
    if paths_of(run.args["script"]):
        found |= training_flags(run.args)
        found.pop("preset", None)  # its values are among the others
    return found


def source_of(adapt: str) -> str:
    """The name of an adapted run without its seed, from its path."""
    return without_seed(Path(adapt).name.replace("{seed}", "0"))


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """{group: its runs}."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[without_seed(run.name)].append(run)
    return groups


def check_groups(runs: list[Run], lengths: bool = True) -> None:
    """Raise UsageError if two runs of one group are no seeds of one arm; lengths: also if they are
    not equally long."""
    for members in grouped(runs).values():
        for one, other in itertools.combinations(members, 2):
            if reason := difference(one, other, lengths):
                both = f"{one.where} and {other.where} would count as two seeds of one group"
                raise UsageError(f"{both}, but {reason}: choose with --only, or rename.")


def difference(one: Run, other: Run, lengths: bool) -> str:
    """What keeps two runs from being seeds of one arm, as part of a sentence; "" if nothing does.
    Lengths may differ by SLACK (a battle is played to its end); unfinished runs have none."""
    here, there = arm_of(one), arm_of(other)
    for name in here | there:
        x, y = here.get(name, "its default"), there.get(name, "its default")
        if x != y:
            return f"their {name} differs ({x}, {y})"
    seed = one.args.get("seed")
    if seed is not None and seed == other.args.get("seed"):
        return f"both have seed {seed}"
    steps = [run.summary["timesteps"] for run in (one, other)]
    if lengths and differ(steps):
        return f"their steps differ ({steps[0]:,}, {steps[1]:,})"
    return ""


def arm_of(run: Run) -> dict[str, Any]:
    """Script, world and flags of a run; an adapted run is named without its seed."""
    arm = trained_by(run)
    if arm.get("adapt"):
        arm["adapt"] = source_of(arm["adapt"])
    return arm


def differ(steps: list[int]) -> bool:
    """Whether lengths of finished runs differ by more than SLACK; 0: not finished."""
    found = [x for x in steps if x]
    return bool(found) and max(found) > (1 + SLACK) * min(found)


def read_runs(
    paths: Iterable[Path], only: tuple[str, ...] = (), same: Callable[[Run], Any] = name_of
) -> list[Run]:
    """The runs in directories, of one run or of many, and packed studies. With `only`, those whose
    names match one of these shell patterns, in the order of the patterns. UsageError if a pattern
    matches none, or if `same` gives the same for two runs, as for one that two sources hold."""
    runs: list[Run] = []
    for path in paths:
        if path.suffix == ".log" and path.with_suffix("").is_dir():
            continue  # a launcher's log beside a run, which the pattern RUNS/*-s* also matches
        if path.suffix == ".csv":
            runs += read_study(path)
            continue
        own = sorted(x.parent for x in path.glob("*/args.json"))  # of a directory of runs
        runs += [Run(x) for x in own] if own and not (path / "args.json").exists() else [Run(path)]
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
    runs = chosen if only else runs
    known: dict[Any, Run] = {}
    for run in runs:
        if (other := known.setdefault(same(run), run)) is not run:
            raise UsageError(f"Two runs have one name: {other.where} and {run.where}.")
    return runs


def without_seed(name: str) -> str:
    """A run's name without its ending -s1, -s2, ...: the name of its group of seeds."""
    return re.sub(r"-s\d+$", "", name)


# --- Studies --------------------------------------------------------------------------------------

COLUMNS = ("run", "kind", "timesteps", "row", "figure", "value")
# What a line of a packed study holds, by its `kind`:
#   argument  figure: name of the argument; value: JSON
#   log       value: environment steps in the last line of the log
#   curve     figure: name of the scalar; timesteps: of the point
#   final     row and figure of the final evaluation
#   episode   row: scenario and bots, as "SC0 scripted"; figure: return or length
# Not packed are the arguments FORGOTTEN; packed by default are the scalars CURVES, of intervals
# (_low, _high) none.
FORGOTTEN = """run_dir resume eval_only track wandb_project wandb_mode wandb_timeout capture_video
device num_threads num_workers worker_timeout log_every save_every packages resolved"""
CURVES = """return return/* episode/return episode/pick_ups_per_1000 entropy kl mi mi/*
information/* xi_loss/* xi_accuracy/* xi_accuracy_uniform_g/* reverse/phi_* eval/*/win
eval/*/return eval/*/return_*[!wh] collect_s learn_s"""


def read_study(path: Path) -> list[Run]:
    """The runs of a packed study, in its order. UsageError if the file is no study or damaged."""
    lines = read_lines(path)
    if not lines or tuple(lines[0]) != COLUMNS:
        raise UsageError(f"{path} is no study: runs.py pack makes one.")
    if not path.read_bytes().endswith(b"\n"):
        raise UsageError(f"{path} is damaged.")
    by_run: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        by_run[line["run"]].append(line)
    try:
        return [unpack(path, name, own) for name, own in by_run.items()]
    except (ValueError, KeyError, TypeError, AttributeError):  # the last: a line without all cells
        raise UsageError(f"{path} is damaged.") from None


def unpack(path: Path, name: str, lines: list[dict[str, str]]) -> Run:
    """The run that lines of a study hold, as an object with the attributes of a Run. ValueError,
    KeyError or TypeError if they cannot be of one."""
    run = Run.__new__(Run)
    run.path, run.name, run.where = path, name, f"{name} in {path}"
    run.args, run.log, run.steps = {}, [], 0
    results: dict[str, dict[str, float]] = {}
    ended, episodes = 0, defaultdict(list)
    for line in lines:
        kind, row, figure, value = (line[x] for x in ("kind", "row", "figure", "value"))
        if kind == "argument":
            run.args[figure] = json.loads(value)
        elif kind == "lines":
            if int(value) != len(lines):
                raise ValueError(f"{len(lines)} lines of {value}")
        elif kind == "log":
            run.steps = int(value)
        elif kind == "curve":
            add_to_log(run.log, int(line["timesteps"]), figure, float(value))
        elif kind == "final":
            ended = int(line["timesteps"])
            results.setdefault(row, {})[figure] = float(value)
        elif kind == "episode":
            episodes[int(line["timesteps"]), *row.split(), figure].append(float(value))
        else:
            raise ValueError(kind)
    run.args = as_today(run.args)
    run.log.sort(key=lambda scalars: scalars["timesteps"])
    for row in results.values():
        row["episodes"] = int(row["episodes"])
    run.summary = {"timesteps": ended, "eval": results}
    run.evaluations = [
        Evaluation(
            steps, scenario, bots, np.array(x), np.array(episodes[steps, scenario, bots, "length"])
        )
        for (steps, scenario, bots, figure), x in list(episodes.items())
        if figure == "return"
    ]
    check_whole(run)
    return run


def check_whole(run: Run) -> None:
    """KeyError or ValueError if lines of a packed run are missing, as of a file that is cut off.
    Runs packed before 2026-11-29 have no line with their number of lines."""
    run.args["script"]
    for x in run.evaluations:
        told = run.summary["eval"].get(f"{x.scenario} {x.bots}", {}).get("episodes")
        at_end = x.timesteps == run.summary["timesteps"] and told is not None
        if len(x.returns) != len(x.lengths) or (at_end and len(x.returns) != told):
            raise ValueError(f"{x.scenario} {x.bots}")


def add_to_log(log: list[dict[str, float]], timesteps: int, name: str, value: float) -> None:
    """Put a scalar into the log's line of that step, or into a new line if that has it already."""
    for scalars in reversed(log):
        if scalars["timesteps"] == timesteps and name not in scalars:
            scalars[name] = value
            return
    log.append({"timesteps": timesteps, name: value})


def pack_lines(run: Run, curves: tuple[str, ...]) -> list[tuple]:
    """The lines (see COLUMNS) that a packed study has of a run."""
    lines: list[tuple] = []
    for name, value in run.args.items():
        if name not in FORGOTTEN.split():
            lines.append((run.name, "argument", "", "", name, json.dumps(value)))
    if run.log:
        lines.append((run.name, "log", "", "", "timesteps", run.steps))
    for name in names_in(run.log):
        if is_kept(name, curves):
            for at, value in thinned(run.log, name):
                lines.append((run.name, "curve", at, "", name, f"{value:.9g}"))
    for row, figures in run.summary["eval"].items():
        for figure, value in figures.items():
            at = run.summary["timesteps"]
            lines.append((run.name, "final", at, row, figure, as_text(value)))
    for timesteps, scenario, bots, returns, lengths in run.evaluations:
        row = f"{scenario} {bots}"
        for x, length in zip(returns, lengths, strict=True):
            lines.append((run.name, "episode", timesteps, row, "return", as_text(x)))
            lines.append((run.name, "episode", timesteps, row, "length", as_text(length)))
    return [(run.name, "lines", "", "", "", len(lines) + 1), *lines]


def names_in(log: list[dict[str, float]]) -> list[str]:
    """The scalars in a log, in the order in which they appear."""
    return list(dict.fromkeys(name for scalars in log for name in scalars))


def is_kept(name: str, curves: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in curves)


def as_text(x: float) -> str:
    """A figure with 9 digits, enough to restore a float32, or with 12 if it is no float32."""
    return f"{x:.9g}" if float(np.float32(x)) == x else f"{x:.12g}"


def thinned(log: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    """A scalar's finite points (step, value). More than POINTS are averaged in POINTS equal windows
    of training (seconds, whose names end in _s, are summed); a point has its window's last step."""
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
    """Write run directories into one file, a study, which other commands read instead of them: what
    they were asked to do, curves, final evaluations and, of Melting Pot's scenarios, episodes."""

    out: Annotated[Path, tyro.conf.Positional]  # a .csv
    runs: Runs  # run directories, studies
    only: tuple[str, ...] = ()  # those whose names match one of these shell patterns
    curves: tuple[str, ...] = tuple(CURVES.split())  # scalars of the log to keep, as shell patterns


def pack(study: Pack) -> None:
    """Make a study of run directories, or add them to a study that is there: its runs stay, in
    their order, but for those of the same names. If OUT itself is among the runs, --only chooses
    those of its runs that stay."""
    if study.out.suffix != ".csv":
        raise UsageError(f"{study.out} is no .csv.")
    check_out(study.out)
    with alone(study.out):
        add_to_study(study)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """In this context no other process is in one for the same file; it waits until then. What is
    locked is a file beside it, which stays: NFS locks what is open for writing, no directories."""
    place = path.with_name(f".{path.name}.lock")
    with harness.writing(place):
        file = place.open("a")
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_to_study(study: Pack) -> None:
    """Read the study and the runs, and write them together."""
    runs = read_runs(study.runs, study.only)
    is_read = any(path.resolve() == study.out.resolve() for path in study.runs)
    before = [] if is_read or not study.out.exists() else read_study(study.out)
    check_replaced(study.out, before, runs)
    packed = packed_lines(study.out) if before else {}
    packed |= {run.name: pack_lines(run, study.curves) for run in runs}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, lines in packed.items():
        writer.writerows(lines)
        try:  # what could not be read would take all other runs of the study with it
            unpack(study.out, name, [dict(zip(COLUMNS, map(str, x), strict=True)) for x in lines])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{name} cannot be packed: {error} does not fit the rest.") from None
    harness.write(study.out, text.getvalue().encode())  # at once: it may be one of those read
    others = f", {len(packed) - len(runs)} of them from before" if len(packed) > len(runs) else ""
    size = study.out.stat().st_size / 1000
    print(f"{study.out}: {len(packed)} runs{others}, {size:,.0f} kB")
    dropped = [name for run in runs for name in names_in(run.log)]
    dropped = [x for x in dict.fromkeys(dropped) if not is_kept(x, study.curves)]
    dropped = [x for x in dropped if x != "timesteps" and not x.endswith(("_low", "_high"))]
    if dropped:
        names = ", ".join(dropped[:12]) + (", ..." if len(dropped) > 12 else "")
        print(f"Not packed, as --curves does not name them: {len(dropped)} scalars ({names}).")


def packed_lines(path: Path) -> dict[str, list[tuple]]:
    """{run: its lines} of a study, as they are."""
    found: dict[str, list[tuple]] = defaultdict(list)
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            found[line["run"]].append(tuple(line[name] for name in COLUMNS))
    return dict(found)


def check_replaced(out: Path, before: list[Run], runs: list[Run]) -> None:
    """UsageError if a run would replace one of its name that the study OUT had before, and that has
    another script, world, seed or flag that affects training, or more steps."""

    def identity(run: Run) -> tuple:
        return run.args.get("seed"), trained_by(run)

    known = {run.name: run for run in before}
    for run in runs:
        if (old := known.get(run.name)) is None:
            continue
        if identity(run) != identity(old):
            raise UsageError(f"{out} has another run called {run.name}: name another file.")
        steps, had = run.summary["timesteps"], old.summary["timesteps"]
        if steps < had:
            lost = f"{run.where} has finished {steps:,} steps, and {had:,} in {out}"
            raise UsageError(f"{lost}: leave it out, or name another file.")


@dataclasses.dataclass(frozen=True)
class Show:
    """List runs: script, seed, environment steps, minutes, evaluations and commit."""

    runs: Runs  # run directories and packed studies to list
    only: tuple[str, ...] = ()  # list only runs whose names match one of these shell patterns


def minutes_of(run: Run) -> dict[str, str]:
    """Minutes of a run without its evaluations, and how much of them it collected; "" if its log
    has neither."""
    collect, learn = (sum(scalars.get(name, 0.0) for scalars in run.log) for name in LAPS)
    if not collect + learn:
        return {"minutes": "", "collecting": ""}
    share = collect / (collect + learn)
    return {"minutes": f"{(collect + learn) / 60:.0f}", "collecting": f"{100 * share:.0f} %"}


def show(study: Show) -> None:
    """Print a table of runs: script, seed, environment steps, minutes (without evaluations) and
    which share of them was collecting, evaluations, commit."""
    rows = []
    for run in read_runs(study.runs, study.only, same=lambda run: run.where):
        episodes = sum(len(x.returns) for x in run.evaluations)
        row = {"run": run.name, "script": run.args["script"], "seed": run.args.get("seed", "")}
        row |= {"steps": f"{run.summary['timesteps'] or run.steps:,}"}
        row |= minutes_of(run)
        row |= {"final rows": len(run.summary["eval"]), "episodes beside bots": episodes}
        rows.append(row | {"commit": run.args.get("commit", "")})
    print(markdown_table(rows))


# --- Training -------------------------------------------------------------------------------------


class StoppedError(RunError):
    """Training was stopped by a signal and can be resumed."""

    code = STOPPED


def adapts(flags: Iterable[str]) -> bool:
    """Whether these flags have --adapt, which takes others from the run that it names."""
    return any(word.partition("=")[0] == "--adapt" for word in flags)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to train."""

    run: Path
    script: str  # its path relative to the repository
    flags: tuple[str, ...]  # without --seed, --total-timesteps and the run's directory
    seed: int
    timesteps: int  # environment steps to train for
    processes: int = 1  # more than one are started by torchrun

    def argv(self) -> list[str]:
        """All of the script's flags but --run-dir or --resume."""
        return [*self.flags, "--seed", str(self.seed), "--total-timesteps", str(self.timesteps)]

    def command(self) -> list[str]:
        """The script and its flags; they resume the run if it has a checkpoint."""
        begun = (self.run / "checkpoints.json").exists()
        return [self.script, "--resume" if begun else "--run-dir", str(self.run), *self.argv()]

    def text(self) -> str:
        """The whole command line, to be typed in the repository."""
        torchrun = ["torchrun", "--nproc-per-node", str(self.processes)]
        return shlex.join([*(torchrun if self.processes > 1 else ["python"]), *self.command()])

    def check_flags(self) -> None:
        """Raise UsageError unless this is a script that trains and takes these flags. With --adapt
        they are read alone: the run that is adapted may not exist yet."""
        try:
            script = load_training_script(self.script)
            if adapts(self.flags):
                harness.read_flags(script.Args, self.argv())
            else:
                script_args(script, self.argv())
        except UsageError as error:
            raise UsageError(f"{self.run.name}: {error}") from None
        except SystemExit as error:  # tyro, which has said why
            if is_signal(error):
                raise
            raise UsageError(f"{self.run.name}: {self.script} refuses its flags.") from None

    def is_finished(self) -> bool:
        """Whether the run has ended and has enough steps. UsageError as from check_same()."""
        if not any((self.run / name).exists() for name in ("checkpoints.json", "summary.json")):
            return False
        found = Run(self.run)
        if other := found.args.get("eval_only"):
            raise UsageError(f"{self.run} holds an evaluation of {other}, no run.")
        self.check_same(found.args)
        return (self.run / "summary.json").exists() and found.summary["timesteps"] >= self.timesteps

    def has_changed(self) -> bool:
        """Whether the script is no longer as it was when the run was last trained, as far as its
        args.json tells."""
        if not (self.run / "checkpoints.json").exists():  # it has not begun
            return False
        then = harness.latest_args(Run(self.run).args).get("script_sha256")
        return then not in (None, harness.sha256_of(ROOT / self.script))

    def check_same(self, found: dict[str, Any]) -> None:
        """Raise UsageError if the arguments `found` differ from this job's. Those that may change
        with --resume (length, evaluation, logging, machine) are not compared."""
        script = load_script(Path(self.script).stem)
        wanted = {"script": Path(self.script).stem}
        if adapts(self.flags):  # the other arguments come from a run that may not exist yet
            args = dataclasses.asdict(harness.read_flags(script.Args, self.argv()))
            given = harness.typed_flags(self.argv())
            args = {k: x for k, x in args.items() if {as_flag(k), as_flag(f"no_{k}")} & given}
            args["adapt"] = Path(args["adapt"]).name
            found = found | {"adapt": Path(found.get("adapt") or "").name}
        else:
            args = dataclasses.asdict(script_args(script, self.argv()))
        wanted |= json.loads(json.dumps(args))
        for name, x in wanted.items():
            theirs = found.get(name, getattr(script.Args, name, None))  # older runs lack new flags
            theirs = list(theirs) if isinstance(theirs, tuple) else theirs
            if name not in free_flags(script) and theirs != x:
                raise UsageError(f"{self.run} holds another run: its {name} is {theirs}, not {x}.")


# torchrun kills processes that are still saving so many seconds after SIGTERM; its default is 30.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}


class Trainer:
    """Trains jobs. A signal makes the scripts in training save and end; no others are started."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # working directory of the scripts; None: the current one
        self.tell: Callable[[str], None] = harness.tell  # nobody may read it any more
        self.children: list[subprocess.Popen] = []
        self.lock, self.stopped = threading.RLock(), False

    def stop(self, number: int, frame: Any) -> None:
        """Signal handler: pass SIGTERM on to all scripts; a second one, some seconds later,
        makes those of one process end at once."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)

    def start(
        self, job: Job, log: Any, environment: dict[str, str] | None = None
    ) -> subprocess.Popen | None:
        """Start a job's process, with additional environment variables; None after stop(). The
        process has its own session, so that Ctrl-C reaches it through stop() alone."""
        script, *argv = job.command()
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(job.processes)]
        torchrun = [*torchrun, "--standalone"] if job.processes > 1 else []
        command = [sys.executable, *torchrun, str(ROOT / script), *argv]
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        options |= {"cwd": self.folder, "env": os.environ | PATIENCE | (environment or {})}
        with self.lock:
            if self.stopped:
                return None
            self.tell(job.text())
            child = subprocess.Popen(command, start_new_session=True, **options)
            self.children.append(child)
            return child

    def train(self, job: Job) -> int | None:
        """Train one run unless it has finished, and return its exit code; None puts it off."""
        if job.is_finished():
            self.tell(f"{job.run}: finished already")
            return FINISHED
        return self.try_once(job)

    def try_once(self, job: Job, environment: dict[str, str] | None = None) -> int:
        """Start one run, wait for its end and return its exit code. Its output goes to RUN.log."""
        make_folder(job)
        try:
            log = beside(job.run, ".log").open("a")
        except OSError as error:
            raise UsageError(f"{job.run} cannot be made: {error.strerror}.") from None
        with log:
            child = self.start(job, log, environment)
            code = child.wait() if child else STOPPED
        # torchrun's code is 1 whatever happened; a script that has finished may be stopped leaving.
        if code and (job.processes > 1 or self.stopped) and job.is_finished():
            code = FINISHED
        return STOPPED if self.stopped and code != FINISHED else code


def make_folder(job: Job) -> None:
    """Make the directory that a run's directory and log are in; UsageError if that fails."""
    try:
        job.run.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{job.run} cannot be made: {error.strerror}.") from None


def check_all(jobs: list[Job]) -> list[bool]:
    """Which jobs have finished. UsageError, before training starts, for flags that a script refuses
    and for run directories that hold another run."""
    for job in jobs:
        job.check_flags()
    return [job.is_finished() for job in jobs]


def train_all(
    jobs: list[Job], at_once: int = 1, dry_run: bool = False, trainer: Trainer | None = None
) -> None:
    """Train the jobs that have not finished, `at_once` at a time; dry_run only prints commands. A
    job that the trainer puts off has its next turn when all others have had theirs. After all have
    run: UsageError if some failed, StoppedError if some were stopped."""
    finished = check_all(jobs)
    if dry_run:
        for job, done in zip(jobs, finished, strict=True):
            print(f"{job.run}: finished already" if done else job.text())
        return
    for job in jobs:  # one sentence if this can be said of all
        make_folder(job)
    trainer = trainer or Trainer()
    codes: dict[Path, int] = {}
    left: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        left.put(job)

    def work() -> None:
        while True:
            try:
                job = left.get_nowait()
            except queue.Empty:
                return
            try:
                code = trainer.train(job)
            except RunError as error:  # of this run alone, as from a full disk
                trainer.tell(f"{job.run.name}: {error}")
                code = error.code
            if code is None:
                left.put(job)
            else:
                codes[job.run] = code

    restore_signals = catch_signals(trainer.stop)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            workers = [pool.submit(work) for _ in range(at_once)]
        for worker in workers:
            worker.result()
    finally:
        restore_signals()
    check_codes(jobs, [codes[job.run] for job in jobs])


def catch_signals(
    handler: Callable[[int, Any], None],
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT),
) -> Callable[[], None]:
    """Let SIGTERM, SIGHUP and Ctrl-C call a handler, but those that are ignored, as under nohup.
    Returns a function that undoes it."""
    before = {}
    for number in numbers:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, handler)

    def undo() -> None:
        for number, former in before.items():
            signal.signal(number, former)

    return undo


def check_codes(jobs: list[Job], codes: list[int]) -> None:
    """Raise UsageError if an exit code is a failure, StoppedError if some jobs were stopped."""
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
    """OUT with an ending appended to its name; dots in the name are kept."""
    return out.with_name(out.name + ending)


def check_out(out: Path) -> None:
    """Raise UsageError if finish() could not write there; called before long computations."""
    if out.name in ("", ".."):
        raise UsageError(f"--out {out} names a directory, not the files' common beginning.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None


def finish(out: Path, text: str, rows: list[dict[str, Any]], figure: Any = None) -> None:
    """Write OUT.md (text), OUT.csv (rows) and, with a figure, OUT.png; print the text."""
    try:
        harness.write(beside(out, ".md"), text.encode())
        write_rows(beside(out, ".csv"), rows)
        if figure is not None:
            from experiments.plots import save_figure  # a launcher's machine may lack matplotlib

            save_figure(figure, beside(out, ".png"))
    except RunError as error:
        _, _, reason = str(error).partition("cannot be written: ")
        raise UsageError(f"--out {out} cannot be written: {reason}") from None
    print(text)


def write_rows(path: Path, rows: list[dict[str, Any]], digits: int = 6) -> None:
    """Write a CSV with so many digits of each float; NaN becomes an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys() if rows else ())
    writer.writeheader()
    for row in rows:
        plain = {k: f"{x:.{digits}g}" if isinstance(x, float) else x for k, x in row.items()}
        writer.writerow({k: "" if x == "nan" else x for k, x in plain.items()})
    harness.write(path, text.getvalue().encode())


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_subcommand({"pack": pack, "show": show}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
