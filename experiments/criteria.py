"""Read the criteria of the papers' claims (experiments/claims.toml), and measure runs by them.

claims.py reaches verdicts from both. The head of claims.toml explains its entries.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import UsageError, as_flag

import numpy as np
import pydantic
from pydantic import Field

from experiments.runs import (
    ROOT,
    SLACK,
    Run,
    adapts,
    as_words,
    first_fault,
    free_flags,
    load_script,
    load_training_script,
    read_toml,
    script_args,
    source_of,
    split_words,
    training_flags,
    without_seed,
)
from experiments.scenario_table import mean, read_cells

CRITERIA = ROOT / "experiments/claims.toml"
GONE = {"prior_floor": 0.0}  # flags that scripts no longer have, and what their defaults were
PAPERS = {"B": "bidist", "M": "mra", "I": "mipi"}  # {first letter of a claim's name: paper}


# --- Criteria -------------------------------------------------------------------------------------


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Final(Strict):
    """Measure figures of rows of the final evaluation."""

    kind: Literal["final"]
    rows: str = Field(min_length=1)  # names of the rows, separated by spaces
    figure: str = Field(min_length=1)  # a figure of the rows, or a sum: "a + b", "- a", "0.2*a + b"
    zero: str = ""  # player whose rows hold random play, the zero of margin_of = "gain"


class Curve(Strict):
    """Measure scalars of the log: the mean of the last points, or of a part of training."""

    kind: Literal["curve"]
    scalar: str = Field(min_length=1)  # a scalar or a sum of them; {row} stands for each of rows
    rows: str = ""
    last: int | None = Field(default=None, ge=1)  # number of last points; None: all in `part`
    part: tuple[float, float] = (0.0, 1.0)  # begin and end, as shares of the run's steps
    minus: tuple[float, float] | None = None  # part whose mean is subtracted
    figure: str = ""  # figure of zero's rows in the final evaluation
    zero: str = ""  # player whose rows hold random play


class Scenarios(Strict):
    """Measure the focal return in Melting Pot's scenarios with bots."""

    kind: Literal["scenarios"]
    rows: str = Field(min_length=1)  # names of the scenarios, separated by spaces
    figure: Literal["return", "return_per_1000"]
    bots: Literal["scripted", "official"]
    zero: Literal[""] = ""


class Table(Strict):
    """Read a column of a table that another command wrote."""

    kind: Literal["table"]
    files: tuple[str, ...] = Field(min_length=1)  # parts of the table, each with other seeds
    pilots: tuple[str, ...] = ()  # tables of runs that do not count
    value: str  # column to read
    key: str  # column that names the arm of a line
    labels: dict[str, str]  # {arm: its cell in the column `key`}
    seed: str  # column with the seed, or with a name that ends in the seed
    where: dict[str, str] = {}  # {column: cell} that a line must have
    last: str = ""  # use only lines with the largest cell in this column
    apart: tuple[str, ...] = ()  # columns of runs: lines in which all of them are one do not count
    length: tuple[str, ...] = ()  # columns with the steps of a line's runs
    flags: dict[str, str] = {}  # {column of flags_text(): whose they must be; "": the line's arm}
    of_pilots: str = ""  # in what the runs of `pilots` differ from the arms
    command: str  # command that writes the table
    zero: Literal[""] = ""


Measure = Annotated[Final | Curve | Scenarios | Table, Field(discriminator="kind")]


Seeds = Annotated[tuple[Annotated[int, Field(ge=10, le=99)], ...], Field(min_length=2)]


class Bar(Strict):
    """A level that arms must have reached before a claim is judged."""

    arms: tuple[str, ...] = Field(min_length=1)
    measure: Measure
    at_least: float  # least mean over all seeds


class Claim(Strict):
    """A claim's criterion in one world, with the names in braces replaced by the world's values."""

    id: str
    says: str = Field(min_length=10, max_length=150)
    where: str = Field(min_length=5, max_length=150)
    quantity: str = Field(min_length=10, max_length=180)
    compare: Literal["difference", "rank", "level"] = "difference"
    measure: Measure
    worlds: tuple[str, ...] = Field(min_length=1)
    arms: dict[str, str]  # {arm: its command line}
    first: tuple[str, ...] = Field(min_length=1)
    others: tuple[str, ...] = ()
    margin: float
    margin_of: Literal["unit", "mean", "gain"] = "unit"
    least_seeds: int = Field(ge=2)
    seeds: Seeds
    own_seeds: dict[str, Seeds] = {}  # {arm: its seeds}, where an arm changed after runs of others
    bar: Bar | None = None
    unfit: str = Field(default="", max_length=150)  # why its measure cannot tell: no verdict
    rule: str = Field(min_length=10, max_length=150)
    pilots_seen: str = Field(min_length=4, max_length=150)
    # from the world and the paper
    world: str
    run: str  # world in whose name the runs are made (a world may reuse another's runs)
    timesteps: int = Field(ge=1)  # environment steps of a run
    paper_steps: int = Field(ge=0)  # 0: not stated
    of_a_game: bool = False  # whether paper_steps are of each game that an arm trains
    paper_seeds: int = Field(ge=1)
    hours: float = Field(gt=0)  # core hours per million environment steps

    @pydantic.model_validator(mode="after")
    def fits(self) -> Claim:
        seeds = (self.seeds, *self.own_seeds.values())
        twice = any(len(set(x)) < len(x) for x in (*seeds, self.worlds))
        wrong = [
            (
                (self.compare == "level") != (not self.others),
                "level has no others, and all else has some",
            ),
            (self.compare == "rank" and len(self.first) > 1, "rank has one arm that is first"),
            (self.least_seeds > min(map(len, seeds)), "least_seeds exceeds the number of seeds"),
            (twice, "a seed or a world is there twice"),
            (
                self.bar is not None and not set(self.bar.arms) <= set(self.arms),
                "bar names an arm that is not compared",
            ),
            (not {*self.own_seeds} <= {*self.arms}, "own_seeds names an arm that is not compared"),
            (self.margin_of == "gain" and not self.measure.zero, "margin_of gain needs a zero"),
            (
                isinstance(self.measure, Table)
                and not {*self.measure.flags.values()} <= {"", *self.arms},
                "the measure's flags name an arm that is not compared",
            ),
        ]
        for is_wrong, sentence in wrong:
            if is_wrong:
                raise ValueError(sentence)
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        return self.own_seeds.get(arm, self.seeds)

    def share_of(self, arm: str) -> float:
        """An arm's steps as a share of the paper's; NaN if those are not stated."""
        if not self.paper_steps:
            return math.nan
        games = read_arm(self.arms[arm]).wanted["populations"] if self.of_a_game else ("all",)
        return self.timesteps / (self.paper_steps * len(games))

    def counts(self, arm: str, seed: int, steps: int) -> bool:
        """Whether a run of an arm has one of its seeds and the claim's length (within SLACK)."""
        return seed in self.seeds_of(arm) and abs(steps / self.timesteps - 1) <= SLACK


# --- The file of criteria -------------------------------------------------------------------------

Name = Annotated[str, Field(pattern=r"^\w+$")]  # runs are called WORLD-ARM-sSEED


class Paper(Strict):
    """A paper's own runs."""

    seeds: int = Field(ge=1)
    steps: int = Field(ge=0)  # environment steps of a run; 0: not stated
    of_a_game: bool = False  # whether a run has so many in each of its games


class World(pydantic.BaseModel, extra="allow"):
    """The values of names in braces."""

    __pydantic_extra__: dict[str, str | int | float]
    run: str | None = None  # the world whose runs these are, and whose names hold here, too
    timesteps: int | None = Field(default=None, ge=1)


class Measured(pydantic.BaseModel):
    """An entry that names a measure."""

    measure: str


class Entry(Measured):
    """What a claim's entry names of other tables; Claim checks the entry as a whole."""

    worlds: list[str] = Field(min_length=1)
    first: list[str]
    others: list[str] = []
    bar: Measured | None = None


class CriteriaFile(Strict):
    """The tables of claims.toml. Measures and the rest of a claim are checked by Claim."""

    papers: dict[str, Paper] = {}
    worlds: dict[Name, World] = {}
    arms: dict[Name, Annotated[str, Field(min_length=1)]] = {}
    measures: dict[str, dict[str, Any]] = {}
    claims: dict[Annotated[str, Field(pattern=r"^[BMI]\d+(-\w+)?$")], Entry]
    slower: dict[str, Annotated[float, Field(gt=0)]] = {}  # {script: factor on a world's hours}
    defaults: dict[str, Any] = {}  # criteria that chose defaults of flags; not read here


def read_tables(path: Path = CRITERIA) -> dict[str, Any]:
    """The tables of claims.toml, missing ones as {}. UsageError if the file is damaged."""
    tables = read_toml(path)
    try:
        CriteriaFile.model_validate(tables, strict=True)
    except pydantic.ValidationError as error:
        raise UsageError(f"{path}: {first_fault(error)}.") from None
    return {name: {} for name in CriteriaFile.model_fields} | tables


def look_up(tables: dict[str, Any], table: str, name: str, where: str) -> Any:
    if name not in tables[table]:
        raise UsageError(f"claims.toml: {where}: [{table}] has no {name}.")
    return tables[table][name]


def names_of(tables: dict[str, Any], world: str, where: str) -> dict[str, Any]:
    """{name: value} for names in braces: a world's, and those of the world whose runs it uses."""
    own = look_up(tables, "worlds", world, where)
    run = own.get("run", world)
    shared = look_up(tables, "worlds", run, where)
    if "run" in own and "run" in shared:
        sentence = f"{world} has the runs of {run}, which has those of {shared['run']}"
        raise UsageError(f"claims.toml: {where}: {sentence}.")
    names = {**shared, **own, "run": run}
    if "timesteps" not in names:
        raise UsageError(f"claims.toml: {where}: the world has no timesteps.")
    return {**names, "every": names["timesteps"] // 10}  # for --eval-every


def in_braces(text: str) -> list[str]:
    """The names in braces, except {row} and {seed}, which are filled in later."""
    return [name for name in re.findall(r"\{(\w+)\}", text) if name not in ("row", "seed")]


def fill(x: Any, names: dict[str, Any], where: str) -> Any:
    """x with each name in braces (see in_braces) replaced by its value. UsageError if there is no
    such name, or if its value has names in braces, too."""
    if isinstance(x, dict):
        return {fill(k, names, where): fill(y, names, where) for k, y in x.items()}
    if isinstance(x, list):
        return [fill(y, names, where) for y in x]
    if not isinstance(x, str):
        return x
    for name in in_braces(x):
        if name not in names:
            raise UsageError(f"claims.toml: {where}: the world has no {name}.")
        value = str(names[name])
        if in_braces(value):
            raise UsageError(f"claims.toml: {where}: {name} = {value}, which names another value.")
        x = x.replace(f"{{{name}}}", value)
    return " ".join(x.split())


def read_case(tables: dict[str, Any], name: str, world: str) -> Claim:
    """The criterion of one claim in one world. UsageError if claims.toml is wrong."""
    where = f"{name} in {world}"
    names = names_of(tables, world, where)
    raw = dict(tables["claims"][name])
    arms = (*raw["first"], *raw.get("others", ()))
    raw["arms"] = {arm: look_up(tables, "arms", arm, where) for arm in arms}
    raw["measure"] = look_up(tables, "measures", raw["measure"], where)
    if "bar" in raw:
        measure = look_up(tables, "measures", raw["bar"]["measure"], where)
        raw["bar"] = {**raw["bar"], "measure": measure}
    paper = look_up(tables, "papers", PAPERS[name[0]], where)
    own = {"id": name, "world": world}
    own |= {"paper_steps": paper["steps"], "paper_seeds": paper["seeds"]}
    own |= {"of_a_game": paper.get("of_a_game", False)}
    for key in ("run", "timesteps", "paper_steps", "hours"):
        if key in names:
            own[key] = names[key]
    try:
        return Claim.model_validate({**fill(raw, names, where), **own})
    except pydantic.ValidationError as error:
        raise UsageError(f"claims.toml: {where}: {first_fault(error)}.") from None


def read_claims(tables: dict[str, Any]) -> dict[str, tuple[Claim, ...]]:
    """{name: its criteria, one for each of its worlds} for all claims in claims.toml."""
    claims = {}
    for name, claim in tables["claims"].items():
        claims[name] = tuple(read_case(tables, name, world) for world in claim["worlds"])
    return claims


# --- Runs of an arm -------------------------------------------------------------------------------


class Arm(NamedTuple):
    """The script and the arguments in an arm's command line."""

    script: str  # path of the script, relative to the repository
    wanted: dict[str, Any] | None  # arguments that a run must have; None: the arm has no runs
    evaluated: dict[str, Any]  # those of its evaluations that the command names
    episodes: int  # in each row of the final evaluation


# Flags that do not affect training, but what a measure reads
EVALUATION = {"eval_every", "eval_episodes", "final_episodes"}


@functools.cache
def read_arm(command: str) -> Arm:
    """Parse an arm's command line; UsageError or SystemExit for flags that its script refuses. With
    --adapt only the flags in the command count: the others come from the adapted run."""
    file, *flags = split_words(command, "claims.toml") or [""]
    if file.startswith("experiments/") or not (ROOT / file).exists():
        return Arm(file, None, {}, 0)
    module = load_training_script(file)
    adapted = adapts(flags)
    args = harness.read_flags(module.Args, flags) if adapted else script_args(module, flags)
    wanted = json.loads(json.dumps(dataclasses.asdict(args)))
    given = harness.typed_flags(flags)
    named = {k for k in wanted if {as_flag(k), as_flag(f"no_{k}")} & given}
    evaluated = {k: wanted[k] for k in sorted(named & EVALUATION)}
    episodes = wanted["final_episodes"]
    for name in ("seed", "preset", *free_flags(module)):
        wanted.pop(name, None)
    if adapted:
        wanted = {k: x for k, x in wanted.items() if k in named}
        wanted["adapt"] = source_of(wanted["adapt"])
    return Arm(file, wanted, evaluated, episodes)


def flags_text(args: dict[str, Any]) -> str:
    """A run's script and flags, for tables: those that affect training and are not the script's
    defaults. args: the run's arguments and, as "script", its script."""
    flags = training_flags(args)
    flags.pop("preset", None)  # its values are among the others
    return " ".join([args["script"], *as_words(flags)])


def is_of(run: Run, command: str) -> bool:
    """Whether a run has finished and belongs to an arm. A flag that an older run lacks has its
    default; a flag that scripts no longer have (GONE) must have had its default."""
    script, wanted, *_ = read_arm(command)
    if wanted is None or run.args["script"] != Path(script).stem or not run.summary["timesteps"]:
        return False
    defaults = load_script(run.args["script"]).Args
    if any(run.args.get(name, x) != x for name, x in GONE.items()):
        return False
    if not isinstance(run.args.get("seed"), int):
        raise UsageError(f"{run.where} is damaged: it has no seed.")
    for name, x in wanted.items():
        found = run.args.get(name, getattr(defaults, name, None))
        found = list(found) if isinstance(found, tuple) else found
        if (source_of(found) if name == "adapt" else found) != x:
            return False
    return True


# --- What a run shows -----------------------------------------------------------------------------


class Point(NamedTuple):
    """What a measure gives for one run."""

    run: str  # name of the run
    seed: int
    steps: int  # environment steps of training
    cells: dict[str, float]  # {row or scenario: figure}
    zero: float  # random play's figure in the same rows; NaN if the measure has no zero

    @property
    def value(self) -> float:
        return float(np.mean([*self.cells.values()]))


def read_sum(text: str) -> list[tuple[str, float]]:
    """The names and factors in a sum like "a - b + 0.2*c"; ValueError for a factor that is none."""
    terms, sign = [], 1.0
    for word in text.split():
        if word in ("+", "-"):
            sign = 1.0 if word == "+" else -1.0
        else:
            factor, _, name = word.rpartition("*")
            terms.append((name, sign * float(factor or 1)))
    return terms


def sum_of(figures: dict[str, float], text: str) -> float:
    """The value of a sum (read_sum) of figures; KeyError for a missing one."""
    return sum(factor * figures[name] for name, factor in read_sum(text))


def mean_in_part(run: Run, text: str, part: tuple[float, float], last: int | None) -> float:
    """The mean of a sum of scalars over the log's lines in a part of training that have all of
    them, or over the last of these lines; KeyError if there are too few."""
    begin, end = (share * run.steps for share in part)
    names = {name for name, _ in read_sum(text)}
    lines = [x for x in run.log if begin <= x["timesteps"] <= end and names <= x.keys()]
    if len(lines) < (last or 1):
        raise KeyError(text)
    return float(np.mean([sum_of(x, text) for x in lines[-(last or 0) :]]))


def measure_run(run: Run, measure: Final | Curve | Scenarios) -> dict[str, float]:
    """A run's {row or scenario: figure}, {} if it met no bots at its end; KeyError if it lacks a
    figure."""
    results = run.summary["eval"]
    rows = measure.rows.split() or [""]
    if isinstance(measure, Final):
        return {row: sum_of(results[row], measure.figure) for row in rows}
    if isinstance(measure, Scenarios):
        end = run.summary["timesteps"]
        last = [x for x in read_cells(run, "") if x.timesteps == end]
        found = {x.scenario: x for x in last if x.bots == measure.bots}
        return {row: mean([found[row]], measure.figure) for row in rows} if found else {}
    cells = {}
    for row in rows:
        text = measure.scalar.replace("{row}", row)
        cells[row] = mean_in_part(run, text, measure.part, measure.last)
        if measure.minus:
            cells[row] -= mean_in_part(run, text, measure.minus, None)
    return cells


def measure_zero(run: Run, measure: Final | Curve | Scenarios) -> float:
    """Random play's mean figure in the final evaluation; KeyError if missing. NaN without zero."""
    if not measure.zero:
        return math.nan
    rows = [f"{row} {measure.zero}" for row in measure.rows.split()]
    return float(np.mean([sum_of(run.summary["eval"][x], measure.figure) for x in rows]))


def check_counting(run: Run, case: Claim, arm: str) -> None:
    """UsageError if a run was evaluated otherwise than its arm's command says, or was begun for
    another length, which schedules of learning rates and exploration follow, and then resumed."""
    wanted = read_arm(case.arms[arm])
    latest = harness.latest_args(run.args)
    for name, x in wanted.evaluated.items():
        if latest.get(name) != x:
            sentence = f"has {as_flag(name)} {latest.get(name)}, {case.id} asks for {x}"
            raise UsageError(f"{run.where} {sentence}.")
    for row, figures in run.summary["eval"].items():
        if figures.get("episodes", wanted.episodes) != wanted.episodes:
            found = f"has {figures['episodes']} episodes of {row!r} in its final evaluation"
            raise UsageError(f"{run.where} {found}, {case.id} asks for {wanted.episodes}.")
    begun = run.args.get("total_timesteps", case.timesteps)
    if abs(begun / case.timesteps - 1) > SLACK:
        sentence = f"was begun for {begun:,} steps and resumed for {case.timesteps:,}"
        raise UsageError(f"{run.where} {sentence}: {case.id} asks for runs begun for their length.")


def read_points(
    case: Claim, arm: str, measure: Measure, runs: list[Run], data: Path
) -> list[Point]:
    """The points of an arm from its runs, or from tables. A pilot that lacks what is measured is
    left out; UsageError if a run that counts lacks it."""
    if isinstance(measure, Table):
        return table_points(case, arm, measure, data)
    points = []
    for run in runs:
        if not is_of(run, case.arms[arm]):
            continue
        seed, steps = run.args["seed"], run.summary["timesteps"]
        if case.counts(arm, seed, steps):
            check_counting(run, case, arm)
        try:
            cells, zero = measure_run(run, measure), measure_zero(run, measure)
        except KeyError as error:
            if case.counts(arm, seed, steps):
                sentence = f"has no {error.args[0]}, which {case.id} measures"
                raise UsageError(f"{run.where} {sentence}.") from None
            continue
        if cells:
            points.append(Point(run.name, seed, steps, cells, zero))
    return points


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV, or of the only table of a Markdown file, as {column: cell}. ValueError if
    there are none."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
    else:
        lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        table = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    if not table:
        raise ValueError(f"{path} has no lines.")
    return table


def table_points(case: Claim, arm: str, measure: Table, data: Path) -> list[Point]:
    """A point per seed and file, the mean of its lines; steps are 0 in those of pilots. UsageError
    if two of measure.files have the same seed, or if one has a run with other flags."""
    if arm not in measure.labels:
        raise UsageError(f"claims.toml: {case.id}: the measure's labels have no {arm}.")
    points: list[Point] = []
    for name in (*measure.files, *measure.pilots):
        if not (data / name).exists():
            continue
        may_count = name in measure.files
        try:
            by_seed = lines_by_seed(data / name, measure, measure.labels[arm])
            found = {seed: mean_of(lines, measure.value) for seed, lines in by_seed.items()}
            steps = {seed: steps_of(case, measure, lines) for seed, lines in by_seed.items()}
            other = other_flags(case, arm, measure, by_seed) if may_count else ""
        except (OSError, KeyError, TypeError, ValueError, csv.Error):
            raise UsageError(f"{data / name} is no table of `{measure.command}`.") from None
        if other:
            raise UsageError(f"{data / name} has a run with other flags than {case.id}'s: {other}.")
        for seed, x in found.items():
            if may_count and seed in {point.seed for point in points}:
                raise UsageError(f"{data / name} has {arm}'s seed {seed} again.")
            length = steps[seed] if may_count else 0
            points.append(Point(f"{name} s{seed}", seed, length, {"": x}, math.nan))
    return points


def lines_by_seed(path: Path, measure: Table, label: str) -> dict[int, list[dict[str, str]]]:
    """{seed: an arm's lines of a table}."""
    wanted = {**measure.where, measure.key: label}
    lines = read_table(path)
    lines = [x for x in lines if all(without_seed(x[k]) == y for k, y in wanted.items())]
    if measure.last:
        end = max((float(x[measure.last]) for x in lines), default=0)
        lines = [x for x in lines if float(x[measure.last]) == end]
    if measure.apart:
        lines = [x for x in lines if len({x[name] for name in measure.apart}) > 1]
    by_seed: dict[int, list[dict[str, str]]] = {}
    for line in lines:
        seed = int(re.search(r"\d+$", line[measure.seed])[0])
        by_seed.setdefault(seed, []).append(line)
    return dict(sorted(by_seed.items()))


def mean_of(lines: list[dict[str, str]], column: str) -> float:
    """The mean of a column; ValueError unless all of it is finite."""
    found = [float(line[column]) for line in lines]
    if not np.isfinite(found).all():
        raise ValueError(f"{column} is not finite.")
    return float(np.mean(found))


def steps_of(case: Claim, measure: Table, lines: list[dict[str, str]]) -> int:
    """The steps of these lines' runs: those of the first run without the claim's length, else the
    claim's, as where the table does not say."""
    found = [int(line[name]) for line in lines for name in measure.length if name in line]
    return next((x for x in found if abs(x / case.timesteps - 1) > SLACK), case.timesteps)


def other_flags(
    case: Claim, arm: str, measure: Table, by_seed: dict[int, list[dict[str, str]]]
) -> str:
    """The first flags in these lines that are not those of the arm whose they must be; "" if there
    are none."""
    for column, whose in measure.flags.items():
        script, wanted, *_ = read_arm(case.arms[whose or arm])
        text = flags_text(wanted | {"script": Path(script).stem})
        for line in itertools.chain(*by_seed.values()):
            if line[column] != text:
                return line[column]
    return ""
