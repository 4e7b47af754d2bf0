"""Criteria of the papers' claims, as experiments/claims.toml has them, and what runs show of them.

claims.py makes verdicts of both. The head of claims.toml says what its entries mean.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import UsageError, as_flag

import numpy as np
import pydantic
from pydantic import Field

from experiments.runs import ROOT, Run, free_flags, load_script, script_args, without_seed
from experiments.scenario_table import mean, read_cells

CRITERIA = ROOT / "experiments/claims.toml"
SLACK = 0.05  # by which a run may be longer or shorter than its claim says
GONE = {"prior_floor": 0.0}  # flags that scripts once had, and their defaults
PAPERS = {"B": "bidist", "M": "mra", "I": "mipi"}  # by a claim's first letter


# --- Criteria -------------------------------------------------------------------------------------


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Final(Strict):
    """Figures of the final evaluation's rows."""

    kind: Literal["final"]
    rows: str
    figure: str  # or a signed sum: "a + b", "- a"
    zero: str = ""  # the player in whose rows random play stands


class Curve(Strict):
    """Scalars of the log: the mean of the last points, or of those in a part of training."""

    kind: Literal["curve"]
    scalar: str  # or a signed sum; {row}: each of rows
    rows: str = ""
    last: int | None = Field(default=None, ge=1)
    part: tuple[float, float] = (0.0, 1.0)
    minus: tuple[float, float] | None = None  # a part whose mean is taken off
    figure: str = ""  # of zero's rows in the final evaluation
    zero: str = ""


class Scenarios(Strict):
    """Focal return beside bots."""

    kind: Literal["scenarios"]
    rows: str
    figure: Literal["return", "return_per_1000"]
    bots: Literal["scripted", "official"]
    zero: Literal[""] = ""


class Table(Strict):
    """A column of a table that a command has written."""

    kind: Literal["table"]
    files: tuple[str, ...] = Field(min_length=1)  # the first is the claim's, others have pilots
    value: str
    key: str  # the column that says which arm a line is of,
    labels: dict[str, str]  # and its cells, by arm
    seed: str  # the column with the seed, or a run's name
    where: dict[str, str] = {}  # other cells that a line must have
    last: str = ""  # the lines with the largest cell in this column
    command: str
    zero: Literal[""] = ""


Measure = Annotated[Final | Curve | Scenarios | Table, Field(discriminator="kind")]


class Bar(Strict):
    """What arms must have learned, by the mean over all seeds."""

    arms: tuple[str, ...] = Field(min_length=1)
    measure: Measure
    at_least: float


class Claim(Strict):
    """A claim's criterion in one world, all names filled in."""

    id: str
    says: str = Field(min_length=10, max_length=150)
    where: str = Field(min_length=5, max_length=150)
    quantity: str = Field(min_length=10, max_length=180)
    compare: Literal["difference", "rank", "level"] = "difference"
    measure: Measure
    worlds: tuple[str, ...] = Field(min_length=1)
    arms: dict[str, str]  # command lines
    first: tuple[str, ...] = Field(min_length=1)
    others: tuple[str, ...] = ()
    margin: float
    margin_of: Literal["unit", "mean", "gain"] = "unit"
    least_seeds: int = Field(ge=2)
    seeds: tuple[Annotated[int, Field(ge=10, le=99)], ...] = Field(min_length=2)
    bar: Bar | None = None
    rule: str = Field(min_length=10, max_length=150)
    pilots_seen: str = Field(min_length=4, max_length=150)
    # the world
    world: str
    run: str  # the world whose runs these are
    timesteps: int = Field(ge=1)
    paper_steps: int = Field(ge=0)  # 0: not stated
    paper_seeds: int = Field(ge=1)
    hours: float = Field(gt=0)

    @pydantic.model_validator(mode="after")
    def fits(self) -> Claim:
        twice = any(len(set(x)) < len(x) for x in (self.seeds, self.worlds))
        wrong = [
            (
                (self.compare == "level") != (not self.others),
                "level has no others, and all else has some",
            ),
            (self.compare == "rank" and len(self.first) > 1, "rank has one arm that is first"),
            (self.least_seeds > len(self.seeds), "least_seeds exceeds the number of seeds"),
            (twice, "a seed or a world is there twice"),
            (
                self.bar is not None and not set(self.bar.arms) <= set(self.arms),
                "bar names an arm that is not compared",
            ),
            (self.margin_of == "gain" and not self.measure.zero, "margin_of gain needs a zero"),
        ]
        for is_wrong, sentence in wrong:
            if is_wrong:
                raise ValueError(sentence)
        return self

    def counts(self, seed: int, steps: int) -> bool:
        """Whether a run is of the claim's seeds and length."""
        return seed in self.seeds and abs(steps / self.timesteps - 1) <= SLACK


def read_tables(path: Path = CRITERIA) -> dict[str, Any]:
    """The file's tables; UsageError for what is no TOML."""
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {str(error).lower()}.") from None
    return {
        "papers": {},
        "worlds": {},
        "arms": {},
        "measures": {},
        "claims": {},
        "slower": {},
        **tables,
    }


def look_up(tables: dict[str, Any], table: str, name: str, where: str) -> Any:
    if name not in tables[table]:
        raise UsageError(f"claims.toml: {where}: [{table}] has no {name}.")
    return tables[table][name]


def names_of(tables: dict[str, Any], world: str, where: str) -> dict[str, Any]:
    """What a world fills in, and its run's world, where it has one."""
    own = look_up(tables, "worlds", world, where)
    run = own.get("run", world)
    names = {**look_up(tables, "worlds", run, where), **own, "run": run}
    return {**names, "every": names.get("timesteps", 0) // 10}  # of evaluations on the way


def fill(x: Any, names: dict[str, Any], where: str) -> Any:
    """x with each {name} of its strings replaced; {row}, {seed} and what a shell expands stay."""
    if isinstance(x, dict):
        return {fill(k, names, where): fill(y, names, where) for k, y in x.items()}
    if isinstance(x, list):
        return [fill(y, names, where) for y in x]
    if not isinstance(x, str):
        return x
    for name in re.findall(r"\{([a-z_]+)\}", x):
        if name in names:
            x = x.replace(f"{{{name}}}", str(names[name]))
        elif name not in ("row", "seed"):
            raise UsageError(f"claims.toml: {where}: the world has no {name}.")
    return " ".join(x.split())


def read_case(tables: dict[str, Any], name: str, world: str) -> Claim:
    """One claim in one world."""
    where = f"{name} in {world}"
    names = names_of(tables, world, where)
    raw = dict(tables["claims"][name])
    arms = (*raw.get("first", ()), *raw.get("others", ()))
    raw["arms"] = {arm: look_up(tables, "arms", arm, where) for arm in arms}
    raw["measure"] = look_up(tables, "measures", raw.get("measure", ""), where)
    if "bar" in raw:
        measure = look_up(tables, "measures", raw["bar"].get("measure", ""), where)
        raw["bar"] = {**raw["bar"], "measure": measure}
    paper = look_up(tables, "papers", PAPERS.get(name[0], name[0]), where)
    own = {"id": name, "world": world}
    own |= {"paper_steps": paper["steps"], "paper_seeds": paper["seeds"]}
    for key in ("run", "timesteps", "paper_steps", "hours"):
        if key in names:
            own[key] = names[key]
    try:
        return Claim.model_validate({**fill(raw, names, where), **own})
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "the entry"
        text = wrong["msg"].removeprefix("Value error, ").lower()
        raise UsageError(f"claims.toml: {where}: {place}: {text}.") from None


def read_claims(tables: dict[str, Any]) -> dict[str, tuple[Claim, ...]]:
    """Every claim, a case for each of its worlds."""
    claims = {}
    for name, claim in tables["claims"].items():
        worlds = claim.get("worlds")
        if not isinstance(worlds, list) or not worlds:
            raise UsageError(f"claims.toml: {name}: worlds is missing.")
        claims[name] = tuple(read_case(tables, name, world) for world in worlds)
    return claims


# --- Runs of an arm -------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What an arm's command line means."""

    script: str  # its file
    wanted: dict[str, Any] | None  # arguments that its runs have; None: it has no runs of scripts


@functools.cache
def read_arm(command: str) -> Arm:
    """UsageError or code 2 for what its script does not take. Of who adapts a run, only flags that
    are typed count: the others are that run's."""
    file, *flags = shlex.split(command)
    if file.startswith("experiments/") or not (ROOT / file).exists():
        return Arm(file, None)
    module = load_script(Path(file).stem)
    adapts = "--adapt" in flags
    args = harness.read_flags(module.Args, flags) if adapts else script_args(module, flags)
    wanted = json.loads(json.dumps(dataclasses.asdict(args)))
    for name in ("seed", "preset", *free_flags(module)):
        wanted.pop(name, None)
    if adapts:
        wanted = {k: x for k, x in wanted.items() if {as_flag(k), as_flag(f"no_{k}")} & {*flags}}
        wanted["adapt"] = source_of(wanted["adapt"])
    return Arm(file, wanted)


def source_of(adapt: str) -> str:
    """The name of a run to adapt, without its seed."""
    return without_seed(Path(adapt).name.replace("{seed}", "0"))


def is_of(run: Run, command: str) -> bool:
    """Whether a finished run is one of an arm's; flags that older runs lack are at defaults, and
    those that have gone since must be."""
    script, wanted = read_arm(command)
    if wanted is None or run.args["script"] != Path(script).stem or not run.summary["timesteps"]:
        return False
    defaults = load_script(run.args["script"]).Args
    if any(run.args.get(name, x) != x for name, x in GONE.items()):
        return False
    for name, x in wanted.items():
        found = run.args.get(name, getattr(defaults, name, None))
        found = list(found) if isinstance(found, tuple) else found
        if (source_of(found) if name == "adapt" else found) != x:
            return False
    return True


# --- What a run shows -----------------------------------------------------------------------------


class Point(NamedTuple):
    """What a run has shown."""

    run: str
    seed: int
    steps: int
    cells: dict[str, float]
    zero: float  # of random play in the same rows; NaN if that is not asked for

    @property
    def value(self) -> float:
        return float(np.mean([*self.cells.values()]))


def signed_sum(figures: dict[str, float], text: str) -> float:
    """ "a + b - c"; KeyError for what is not there."""
    total, sign = 0.0, 1.0
    for word in text.split():
        if word in ("+", "-"):
            sign = 1.0 if word == "+" else -1.0
        else:
            total += sign * figures[word]
    return total


def mean_in_part(run: Run, text: str, part: tuple[float, float], last: int | None) -> float:
    """Of a signed sum of scalars, where the log has them all, the last points or all; KeyError if
    they are fewer."""
    begin, end = (share * run.steps for share in part)
    names = {*text.split()} - {"+", "-"}
    lines = [x for x in run.log if begin <= x["timesteps"] <= end and names <= x.keys()]
    if len(lines) < (last or 1):
        raise KeyError(text)
    return float(np.mean([signed_sum(x, text) for x in lines[-(last or 0) :]]))


def measure_run(run: Run, measure: Final | Curve | Scenarios) -> dict[str, float]:
    """{cell: figure}; KeyError for what the run lacks. Empty if it never met these bots."""
    results = run.summary["eval"]
    rows = measure.rows.split() or [""]
    if isinstance(measure, Final):
        return {row: signed_sum(results[row], measure.figure) for row in rows}
    if isinstance(measure, Scenarios):
        found = {x.scenario: x for x in read_cells(run, "") if x.bots == measure.bots}
        return {row: mean([found[row]], measure.figure) for row in rows} if found else {}
    cells = {}
    for row in rows:
        text = measure.scalar.replace("{row}", row)
        cells[row] = mean_in_part(run, text, measure.part, measure.last)
        if measure.minus:
            cells[row] -= mean_in_part(run, text, measure.minus, None)
    return cells


def measure_zero(run: Run, measure: Final | Curve | Scenarios) -> float:
    """What random play earned in the run's final evaluation; KeyError if it did not play."""
    if not measure.zero:
        return math.nan
    rows = [f"{row} {measure.zero}" for row in measure.rows.split()]
    return float(np.mean([signed_sum(run.summary["eval"][x], measure.figure) for x in rows]))


def read_points(
    case: Claim, arm: str, measure: Measure, runs: list[Run], data: Path
) -> list[Point]:
    """All that has run of an arm, or stands in tables. Pilots without what is measured are passed
    over; for a run that counts that is a UsageError."""
    if isinstance(measure, Table):
        return table_points(case, arm, measure, data)
    points = []
    for run in runs:
        if not is_of(run, case.arms[arm]):
            continue
        seed, steps = run.args["seed"], run.summary["timesteps"]
        try:
            cells, zero = measure_run(run, measure), measure_zero(run, measure)
        except KeyError as error:
            if case.counts(seed, steps):
                sentence = f"has no {error.args[0]}, which {case.id} measures"
                raise UsageError(f"{run.where} {sentence}.") from None
            continue
        if cells:
            points.append(Point(run.name, seed, steps, cells, zero))
    return points


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV, or of a page's first table."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def table_points(case: Claim, arm: str, measure: Table, data: Path) -> list[Point]:
    """A point a seed, the mean of its lines. Only those of the claim's own file have a length."""
    points = []
    for name in measure.files:
        if not (data / name).exists():
            continue
        steps = case.timesteps if name == measure.files[0] else 0
        try:
            by_seed = read_column(data / name, measure, measure.labels[arm])
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{data / name} is no table of `{measure.command}`.") from None
        for seed, x in by_seed.items():
            points.append(Point(f"{name} s{seed}", seed, steps, {"": float(np.mean(x))}, math.nan))
    return points


def read_column(path: Path, measure: Table, label: str) -> dict[int, list[float]]:
    """What is measured, by seed, in the lines of an arm."""
    wanted = {**measure.where, measure.key: label}
    lines = read_table(path)
    lines = [x for x in lines if all(without_seed(x[k]) == y for k, y in wanted.items())]
    if measure.last:
        end = max((float(x[measure.last]) for x in lines), default=0)
        lines = [x for x in lines if float(x[measure.last]) == end]
    by_seed: dict[int, list[float]] = {}
    for line in lines:
        seed = int(re.search(r"\d+$", line[measure.seed])[0])
        by_seed.setdefault(seed, []).append(float(line[measure.value]))
    return by_seed
