"""What the commands of the paper's tables and figures share: reading runs, writing, errors.

Each of scenario_table.py, variants.py, policies.py and preference_shift.py reads run directories,
writes OUT.png, OUT.csv and OUT.md and ends with one sentence and exit code 2 if that cannot be.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import io
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import pydantic
import tyro
from annotated_types import Interval
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts and envs/

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "bidist_mappo_meltingpot"
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Count = Annotated[int, Interval(ge=0)]
Positive = Annotated[int, Interval(ge=1)]
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
Above = Annotated[float, Interval(gt=0, lt=math.inf)]


class UsageError(Exception):
    """What was asked for cannot be done; the message is one sentence."""


def one_line_errors(function: Callable[[], None]) -> int:
    """The exit code of function(): 2 and one sentence for a UsageError."""
    try:
        function()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def check_bounds(study: Any) -> None:
    """UsageError for the first option outside the bounds in its annotation."""
    try:
        pydantic.TypeAdapter(type(study)).validate_python(dataclasses.asdict(study))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        flag = str(wrong["loc"][0]).replace("_", "-")
        raise UsageError(f"--{flag} {wrong['input']}: {wrong['msg'].lower()}.") from None


# --- Runs -----------------------------------------------------------------------------------------


def read_args(run: Path) -> dict[str, Any]:
    """args.json with the key "script", which older runs keep in their checkpoints only."""
    if not run.is_dir():
        raise UsageError(f"{run} is no run directory.")
    try:
        args = json.loads((run / "args.json").read_text())
        if "script" not in args:
            import torch

            newest = json.loads((run / "checkpoints.json").read_text())[0]["name"]
            args["script"] = torch.load(run / newest, "cpu", weights_only=True)["script"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise UsageError(f"{run} is no run directory: it has no args.json with a script.") from None
    return args


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


def training_flags(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run that training depends on, but for world, seed and length, where they
    are not the script's defaults."""
    module = load_script(args["script"])
    default = {field.name: field.default for field in dataclasses.fields(module.Args)}
    for name in {"seed", "total_timesteps", "substrate", *module.RESUMABLE}:
        default.pop(name, None)
    default = {name: list(x) if isinstance(x, tuple) else x for name, x in default.items()}
    return {name: args[name] for name in default if name in args and args[name] != default[name]}


def method_of(args: dict[str, Any]) -> str:
    """A run's script and the flags that make it a method of its own: "bidist_mappo --k-d 10"."""
    words = [args["script"].removesuffix("_meltingpot")]
    for name, x in training_flags(args).items():
        words.append(f"--{name.replace('_', '-')}" + ("" if x is True else f" {x}"))
    return " ".join(words)


def without_seed(run: Path) -> str:
    """The name of a run's directory without -s1, -s2, ..."""
    return re.sub(r"-s\d+$", "", run.resolve().name)


def read_log(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, without a last line that is being written; empty if there is none yet."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError:
        raise UsageError(f"{path} is damaged.") from None


# --- Training -------------------------------------------------------------------------------------


def train(run: Path, command: str, timesteps: int, dry_run: bool) -> None:
    """Start a run, or go on with one that was stopped; a finished one is kept. UsageError if it
    fails. Its output goes to RUN.log."""
    if (run / "summary.json").exists():
        return
    if (run / "checkpoints.json").exists():
        command = f"{command.split()[0]} --resume {run} --total-timesteps {timesteps}"
    print(f"python {command}", flush=True)
    if dry_run:
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    with beside(run, ".log").open("a") as log:
        words = [sys.executable, *shlex.split(command)]
        code = subprocess.run(words, stdout=log, stderr=log).returncode
    if code:
        raise UsageError(f"{run} ended with exit code {code}; see {beside(run, '.log')}.")


def train_all(commands: dict[str, str], study: Any, timesteps: int) -> None:
    """Runs {name: command, with SEED where the seed is meant} for all study.seeds, seed by seed,
    study.jobs at a time, each in study.dir/{name}-s{seed}; with study.dry_run print them only."""
    with ThreadPoolExecutor(study.jobs) as pool:
        jobs = []
        for seed in study.seeds:
            for name, command in commands.items():
                run = study.dir / f"{name}-s{seed}"
                own = f"--seed {seed} --total-timesteps {timesteps} --run-dir {run}"
                words = f"{command.replace('SEED', str(seed))} {own}".split()
                jobs.append(pool.submit(train, run, " ".join(words), timesteps, study.dry_run))
        for job in jobs:
            job.result()


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


def finish(out: Path, text: str, rows: list[dict[str, Any]], figure: Any) -> None:
    """Write the three files of a figure and print the text."""
    try:
        beside(out, ".md").write_text(text)
        write_rows(beside(out, ".csv"), rows)
        save_figure(figure, beside(out, ".png"))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None
    print(text)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, columns by their keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV; empty cells for NaN."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            plain = {k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()}
            writer.writerow({k: "" if x == "nan" else x for k, x in plain.items()})


def save_figure(figure: Any, path: Path) -> None:
    """A PNG of at most 256 colours, which is a third as large as one of all."""
    box = io.BytesIO()
    figure.savefig(box, dpi=90)
    plt.close(figure)
    image = Image.open(box).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
