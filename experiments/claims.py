"""Verdicts on the papers' claims, by criteria that were written before the runs.

    python experiments/claims.py                        prints verdicts on all studies in docs/data
    python experiments/claims.py --out docs             also writes docs/CLAIMS.md and its data
    python experiments/claims.py docs/data/study_sz.csv runs/sz-mipi-s11
    python experiments/claims.py --commands B3 M1       prints the runs that these claims still need
    python experiments/claims.py --studies experiments/studies    writes studies for launch.py

The criteria are in experiments/claims.toml, whose head explains how a verdict is reached. A run
counts for an arm of a claim if it has the arm's script, the arm's values of all flags that affect
training, and one of the claim's seeds and its length. With another seed or length it is a pilot: it
is shown, but does not count. Some claims read tables that other commands wrote into --data. With
--out this writes OUT/CLAIMS.md, OUT/data/claims.png and, for claims with data,
OUT/data/claims/CLAIM.csv, a row per run and cell (a row of an evaluation, or a scenario).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

from harness import UsageError
from harness import write as write_file

import numpy as np
import tyro
from tqdm import tqdm

from envs.statistics import (
    FEW,
    Centre,
    Difference,
    markdown_table,
    mean_or_iqm,
    mean_ranks,
    rank_difference,
    ranks,
    seed_difference,
    seed_level,
)
from experiments.criteria import (
    CRITERIA,
    SLACK,
    Claim,
    Measure,
    Point,
    Table,
    fill,
    is_of,
    look_up,
    names_of,
    read_arm,
    read_claims,
    read_points,
    read_tables,
)
from experiments.plots import plt, save_figure
from experiments.runs import (
    ROOT,
    Run,
    name_in_world,
    read_runs,
    run_command,
    write_rows,
)

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan)
ADAPTED = re.compile(r"--adapt runs/(\w+)-(\w+)-s")  # the world and the arm that are adapted
MOST_SEEDS = 30  # per arm; an effect that needs more seeds is too near its margin to decide


class Paper(NamedTuple):
    """What tables say of a paper."""

    method: str
    what: str  # what the method generalises to
    steps_of: str = ""  # whose environment steps are taken, where the text states none


PAPERS = {
    "B": Paper("BiDist, AAMAS 2025", "unseen co-players", "our default"),
    "M": Paper("MRA, TMLR", "unseen population sizes", "the authors' code"),
    "I": Paper("MIPI, NeurIPS 2023", "unseen team compositions"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Options of this command."""

    # run directories and packed studies to read; default: all studies in --data
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None  # directory for CLAIMS.md, data/claims.png and data/claims/*.csv
    commands: tuple[str, ...] | None = None  # only print what these claims need; none: all open
    studies: Path | None = None  # only write a study of all runs for each world into this directory
    data: Path = ROOT / "docs/data"  # directory of packed studies and of other commands' tables
    criteria: Path = CRITERIA  # the file of criteria


# --- What counts ----------------------------------------------------------------------------------


def counted(case: Claim, arm: str, points: list[Point]) -> list[Point]:
    """The points that count, in the order of the arm's seeds; UsageError if a seed has two."""
    own = [x for x in points if case.counts(arm, x.seed, x.steps)]
    own.sort(key=lambda x: case.seeds_of(arm).index(x.seed))
    for x, y in itertools.pairwise(own):
        if x.seed == y.seed:
            raise UsageError(f"{case.id}: {x.run} and {y.run} are the same arm and seed.")
    return own


def pilots(case: Claim, found: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """The points that do not count, of the greatest length that first arms share with others."""
    left = {
        arm: [x for x in points if not case.counts(arm, x.seed, x.steps)]
        for arm, points in found.items()
    }
    for steps in sorted({x.steps for arm in case.first for x in left[arm]}, reverse=True):
        same = {
            arm: [x for x in points if abs(x.steps - steps) <= SLACK * steps]
            for arm, points in left.items()
        }
        if not case.others or any(same[arm] for arm in case.others):
            return same
    return {arm: [] for arm in found}


def too_few(case: Claim, arm: str, points: list[Point]) -> str:
    """Why an arm has too few seeds in a world for a verdict; "" if it has enough."""
    if not points:
        return f"{arm} has not run in {case.run}"
    if missing := {*case.seeds_of(arm)[: len(points)]} - {x.seed for x in points}:
        return f"{arm}: seed {min(missing)} is left out in {case.run}"
    if np.isnan(values(points)).any():
        return f"{arm}: a figure in {case.run} is not a number"
    if len(points) < case.least_seeds:
        return f"{arm}: {len(points)} of {case.least_seeds} seeds in {case.run}"
    return ""


def below_bar(case: Claim, arm: str, points: list[Point]) -> str:
    """The reason if an arm's mean over all seeds is below the claim's bar, else ""."""
    if not points:
        return f"{arm}: whether it has learned in {case.run} is not known"
    level, bar = float(np.mean(values(points))), case.bar.at_least
    if not level >= bar:
        gap = f"{bar - level:.1g} below the bar of {bar:.3g}"
        return f"{arm} has not learned in {case.run}: {level:.3g}, {gap}"
    return ""


def bar_text(case: Claim, arm: str, points: list[Point]) -> str:
    """Text: by how much an arm misses the claim's bar, and what its other seeds would have to be on
    average to pass it (as "2 left need .4"); "" if it passes."""
    if not below_bar(case, arm, points) or not points:
        return ""
    bar, every, have = case.bar.at_least, len(case.seeds_of(arm)), len(points)
    text = f"{arm} in {case.run} ({np.mean(values(points)):.3g} of {bar:.3g}"
    if have == every:
        return f"{text}: all its seeds have run)"
    needed = (bar * every - values(points).sum()) / (every - have)
    return f"{text}, {every - have} left need {needed:.2g})"


def values(points: list[Point]) -> np.ndarray:
    return np.array([x.value for x in points])


# --- Comparisons ----------------------------------------------------------------------------------


class Part(NamedTuple):
    """One comparison of a claim: of two arms, or of one arm with 0."""

    case: Claim  # the claim in this world; for ranks, which use all worlds, in the first one
    first: str  # name of the arm that the claim is about
    other: str  # name of the other arm; "": the comparison is with 0
    found: Difference  # the effect, first minus other, that the verdict uses
    plain: Difference  # the same effect by means over seeds instead of interquartile means
    margin: float  # in the effect's unit
    plain_margin: float  # the margin of `plain`
    mine: list[list[Point]]  # points of the first arm, a list per world
    theirs: list[list[Point]]  # points of the other arm, a list per world
    why: str  # why nothing can be decided yet; "": the interval decides
    note: str = ""  # remark to show with the effect
    pilot: bool = False  # the points are pilots, which do not count

    @property
    def verdict(self) -> str:
        if self.why or self.pilot:
            return OPEN
        return verdict_of(self.found, self.margin)

    @property
    def by_means(self) -> str:
        """The verdict by means over seeds, as text, if it differs from `verdict`; else ""."""
        other = verdict_of(self.plain, self.plain_margin)
        if self.why or self.pilot or other == self.verdict:
            return ""
        return f"by means {other}: {effect_text(self.plain)}"

    @property
    def beside_bar(self) -> str:
        """Text: what the interval would say of arms of which one has not learned; "" if nothing."""
        alone = verdict_of(self.found, self.margin)
        if "has not learned" not in self.why or alone == OPEN:
            return ""
        return f"by its interval alone {self.case.world} {alone}"

    @property
    def title(self) -> str:
        world = ", ".join(self.case.worlds) if self.case.compare == "rank" else self.case.world
        return f"{world}: {self.first}{' - ' if self.other else ''}{self.other}"


def verdict_of(found: Difference, margin: float) -> str:
    """HOLDS if the interval lies above the margin, FAILS if below, else OPEN."""
    if found.low > margin:
        return HOLDS
    return FAILS if found.high < margin else OPEN


def verdict_of_claim(verdicts: list[str]) -> str:
    """A claim's verdict: FAILS if one of its comparisons fails, HOLDS if all hold, else OPEN."""
    if FAILS in verdicts:
        return FAILS
    return OPEN if OPEN in verdicts else HOLDS


def margin_of(case: Claim, theirs: list[Point], centre: Centre) -> float:
    """The margin in the unit of the quantity; NaN if it depends on points that are missing."""
    if case.margin_of == "unit":
        return case.margin
    if not theirs:
        return math.nan
    level = float(centre(values(theirs), 0))
    if case.margin_of == "mean":
        return case.margin * abs(level)
    gain = level - float(np.mean([x.zero for x in theirs]))
    return case.margin * max(gain, 0.0)  # who gains nothing over random play sets no margin


def centre_of(mine: list[Point], theirs: list[Point] | None) -> Centre:
    """The same for both arms: the interquartile mean if both have FEW seeds or more."""
    fewest = min(len(mine), len(mine) if theirs is None else len(theirs))
    return np.mean if fewest < FEW else mean_or_iqm


def compare_seeds(mine: list[Point], theirs: list[Point] | None, centre: Centre) -> Difference:
    """The effect between two arms' seeds; if theirs is None, of one arm's seeds from 0."""
    if not mine or theirs == []:
        return UNKNOWN
    if theirs is None:
        return seed_level(values(mine), centre=centre)
    return seed_difference(values(mine), values(theirs), centre=centre)


def compare_in(
    case: Claim, points: dict[str, list[Point]], why: dict[str, str], pilot: bool
) -> list[Part]:
    """All comparisons of a claim in one world, of each first arm with each other arm or 0."""
    parts = []
    for first, other in itertools.product(case.first, case.others or ("",)):
        theirs = points.get(other)
        centre = centre_of(points[first], theirs)
        part = Part(
            case=case,
            first=first,
            other=other,
            found=compare_seeds(points[first], theirs, centre),
            plain=compare_seeds(points[first], theirs, np.mean),
            margin=margin_of(case, theirs or [], centre),
            plain_margin=margin_of(case, theirs or [], np.mean),
            mine=[points[first]],
            theirs=[theirs or []],
            why="; ".join(filter(None, (why[first], why.get(other)))),
            pilot=pilot,
        )
        parts.append(part)
    return parts


def compare_ranks(
    cases: tuple[Claim, ...], points: list[dict[str, list[Point]]], why: dict[str, str], pilot: bool
) -> list[Part]:
    """Comparisons of the first arm's mean rank with each other arm's, over all worlds. A rank
    depends on who is ranked, so there is none before all arms have points in all worlds and
    nothing in `why`."""
    case, (first,) = cases[0], cases[0].first
    ran = [arm for arm in case.arms if all(own[arm] for own in points) and not why[arm]]
    worlds = [{arm: cells_of(own[arm]) for arm in ran} for own in points]
    missing = next((x for x in why.values() if x), "")
    fewest = min((len(x) for world in worlds for x in world.values()), default=0)
    centre = np.mean if fewest < FEW else mean_or_iqm
    parts = []
    for other in case.others:
        both = {first, other} <= {*ran} and not missing
        part = Part(
            case=case,
            first=first,
            other=other,
            found=rank_difference(worlds, first, other, centre=centre) if both else UNKNOWN,
            plain=rank_difference(worlds, first, other, centre=np.mean) if both else UNKNOWN,
            margin=case.margin,
            plain_margin=case.margin,
            mine=[own[first] for own in points],
            theirs=[own[other] for own in points],
            why="; ".join(filter(None, (why[first], why[other])))
            or (missing and f"ranks need all arms; {missing}"),
            note=count_first(worlds, first, centre) if both else "",
            pilot=pilot,
        )
        parts.append(part)
    return parts


def cells_of(points: list[Point]) -> np.ndarray:
    """The values of all cells for each of S seeds: (S, cells)."""
    return np.array([[*x.cells.values()] for x in points])


def count_first(worlds: list[dict[str, np.ndarray]], first: str, centre: Centre) -> str:
    """Text: in how many cells an arm is first, and its mean rank."""
    found = []
    for world in worlds:
        means = np.stack([centre(x, 0) for x in world.values()])
        found += (ranks(means)[[*world].index(first)] == 1).tolist()
    rank = mean_ranks(worlds, centre)[first]
    return f"first in {sum(found)} of {len(found)}, mean rank {rank:.2f} of {len(worlds[0])}"


class Outcome(NamedTuple):
    """A claim's comparisons and its verdict."""

    cases: tuple[Claim, ...]  # the claim in each of its worlds
    parts: list[Part]  # comparisons that count
    pilots: list[Part]  # comparisons of pilots
    verdict: str
    bars: tuple[tuple[Claim, str, list[Point]], ...] = ()  # arms with a bar, and what it is for

    @property
    def deciding(self) -> list[Part]:
        """The comparisons that the verdict rests on: those that fail, or else all."""
        return [x for x in self.parts if x.verdict == FAILS] or self.parts

    @property
    def worlds(self) -> tuple[Claim, ...]:
        """The claim in the worlds of `deciding`; where ranks decide, in all of its worlds."""
        own = [x.case for x in self.deciding]
        return tuple(x for x in self.cases if x in own or x.compare == "rank")

    @property
    def shares(self) -> list[float]:
        """Steps as shares of the paper's, of the first arms in `worlds`; NaN: not stated."""
        firsts = dict.fromkeys(part.first for part in self.deciding)
        return [case.share_of(arm) for case in self.worlds for arm in firsts]

    @property
    def verdict_by_means(self) -> str:
        """The verdict by means over seeds instead of interquartile means."""
        found = [OPEN if x.why else verdict_of(x.plain, x.plain_margin) for x in self.parts]
        return verdict_of_claim(found)


def judge(cases: tuple[Claim, ...], runs: list[Run], data: Path) -> Outcome:
    """Compare the arms of a claim by counted points and by pilots, and reach its verdict."""

    def points_of(case: Claim, arm: str, measure: Measure) -> list[Point]:
        return read_points(case, arm, measure, runs, data)

    own, left, why, bars = [], [], [], []
    for case in cases:
        found = {arm: points_of(case, arm, case.measure) for arm in case.arms}
        own.append({arm: counted(case, arm, points) for arm, points in found.items()})
        left.append(pilots(case, found))
        why.append({arm: too_few(case, arm, points) for arm, points in own[-1].items()})
        why[-1] |= {arm: case.unfit for arm in case.first if case.unfit}
        for arm in case.bar.arms if case.bar else ():
            judged = counted(case, arm, points_of(case, arm, case.bar.measure))
            why[-1][arm] = why[-1][arm] or below_bar(case, arm, judged)
            bars.append((case, arm, judged))
    free = dict.fromkeys(cases[0].arms, "")
    if cases[0].compare == "rank":
        blocked = {arm: next((x[arm] for x in why if x[arm]), "") for arm in free}
        parts = compare_ranks(cases, own, blocked, pilot=False)
        seen = compare_ranks(cases, left, free, pilot=True)
    else:
        parts = [x for y in zip(cases, own, why) for x in compare_in(*y, pilot=False)]
        seen = [x for y in zip(cases, left) for x in compare_in(*y, free, pilot=True)]
    seen = [part for part in seen if not math.isnan(part.found.mean)]
    verdict = verdict_of_claim([part.verdict for part in parts])
    return Outcome(cases, parts, seen, verdict, (*bars,))


# --- What would decide ----------------------------------------------------------------------------


class Missing(NamedTuple):
    """The runs that an arm still needs to have its claim's least number of seeds."""

    name: str  # name of their directories, without the seed
    command: str  # script and flags
    seeds: tuple[int, ...]
    timesteps: int  # environment steps of each run
    hours: float  # core hours of each run

    @property
    def own_bots(self) -> bool:
        """Whether Melting Pot's own bots play, which need tensorflow and a download."""
        return "--bots official" in self.command


def hours_of(command: str, timesteps: int, hours: float, slower: dict[str, float]) -> float:
    """Core hours of a run. hours: of its world, per million steps; slower: {script: factor}."""
    return timesteps / 1e6 * hours * slower.get(read_arm(command).script, 1.0)


def missing_runs(outcome: Outcome, runs: list[Run], slower: dict[str, float]) -> list[Missing]:
    """The runs that a claim still needs, each once, without those that they adapt."""
    found = {}
    for case, arm in itertools.product(outcome.cases, outcome.cases[0].arms):
        command = case.arms[arm]
        have = {
            run.args["seed"]
            for run in runs
            if is_of(run, command) and case.counts(arm, run.args["seed"], run.summary["timesteps"])
        }
        seeds = tuple(x for x in case.seeds_of(arm)[: case.least_seeds] if x not in have)
        if seeds and not command.startswith("experiments/"):
            name, steps = f"{case.run}-{arm}", case.timesteps
            hours = hours_of(command, steps, case.hours, slower)
            found[name] = Missing(name, command, seeds, steps, hours)
    return [*found.values()]


def sources_of(missing: list[Missing], tables: dict[str, Any]) -> list[Missing]:
    """The runs that these adapt, each once: also those that are in studies, which hold no weights
    that could be adapted."""
    found = []
    for x in missing:
        if source := ADAPTED.search(x.command):
            world, arm = source.groups()
            names = names_of(tables, world, x.name)
            command, steps = command_of(tables, world, arm, x.name), names["timesteps"]
            hours = hours_of(command, steps, names["hours"], tables["slower"])
            found.append(Missing(f"{world}-{arm}", command, x.seeds, steps, hours))
    return each_once(found)


def each_once(missing: Iterable[Missing]) -> list[Missing]:
    """These runs, those of one name together."""
    found: dict[str, Missing] = {}
    for x in missing:
        seeds = {*x.seeds, *(found[x.name].seeds if x.name in found else ())}
        found[x.name] = x._replace(seeds=tuple(sorted(seeds)))
    return [*found.values()]


def total_of(missing: Iterable[Missing]) -> tuple[int, float]:
    """Number of runs and core hours of all these."""
    own = [*missing]
    return sum(len(x.seeds) for x in own), sum(x.hours * len(x.seeds) for x in own)


def missing_tables(outcome: Outcome) -> list[str]:
    """The commands that make tables which the claim reads and which lack something it needs."""
    found = [part.case.measure for part in outcome.parts if part.why]
    return [*dict.fromkeys(x.command for x in found if isinstance(x, Table))]


def seeds_to_decide(part: Part) -> float:
    """How many seeds an arm would decide a comparison, if the effect stays the same and the width
    of its interval falls as 1 / sqrt(seeds); infinity if more than MOST_SEEDS."""
    have = max(len(x) for x in (*part.mine, *part.theirs))
    half = (part.found.high - part.found.low) / 2
    distance = abs(part.found.mean - part.margin)
    most = have * (half / distance) ** 2 if distance else math.inf
    return max(have + 1, math.ceil(most)) if most <= MOST_SEEDS else math.inf


def more_seeds(part: Part) -> str:
    """Text: seeds_to_decide()."""
    seeds, listed = seeds_to_decide(part), len(part.case.seeds)
    if math.isinf(seeds):
        return f"{part.title}: too near the margin (> {MOST_SEEDS} seeds)"
    return f"{part.title}: about {seeds}{' fresh' * (seeds > listed)} seeds an arm"


def fresh_runs(outcome: Outcome, slower: dict[str, float]) -> list[Missing]:
    """The runs of a new criterion that would decide what more seeds than the claim's list decide:
    each arm of such comparisons once, with the most seeds that one of them needs."""
    found: dict[str, Missing] = {}
    for part in outcome.parts if outcome.verdict == OPEN else ():
        if part.why or part.verdict != OPEN:
            continue
        seeds = seeds_to_decide(part)
        if math.isinf(seeds) or seeds <= len(part.case.seeds):
            continue
        for arm in filter(None, (part.first, part.other)):  # a level has no other
            case, command = part.case, part.case.arms[arm]
            if command.startswith("experiments/"):  # a table of seconds
                continue
            name, steps = f"{case.run}-{arm}", case.timesteps
            every = max(seeds, len(found[name].seeds) if name in found else 0)
            hours = hours_of(command, steps, case.hours, slower)
            found[name] = Missing(name, command, (*range(every),), steps, hours)
    return [*found.values()]


def what_decides(outcome: Outcome, missing: list[Missing]) -> str:
    """Text: what would decide a claim (at most three items); "" if it is decided."""
    if outcome.verdict != OPEN:
        return ""
    if unfit := outcome.cases[0].unfit:
        return unfit
    texts = []
    scripts = {shlex.split(x.command)[0] for x in missing}
    missed = [text for text in (bar_text(*x) for x in outcome.bars) if text]
    if missing:
        adapts = any("--adapt" in x.command for x in missing)
        own = "these runs, the adapted ones among them" if adapts else "these runs"
        texts.append(f"{own}, where bars are met" if missed else own)
    if to_come := sorted(Path(x).name for x in scripts if not (ROOT / x).exists()):
        texts.append(f"{', '.join(to_come)} (to come)")
    texts += [f"`python {x.split(' --')[0]}`" for x in missing_tables(outcome)]
    parts = [part for part in outcome.parts if part.verdict == OPEN]
    if missed:
        texts.append(f"bars: {', '.join(missed)}")
    texts += [part.why for part in parts if "is not known" in part.why or "left out" in part.why]
    texts += [more_seeds(part) for part in parts if not part.why]
    return "; ".join([*dict.fromkeys(texts)][:3])


def loop(command: str, name: str, seeds: tuple[int, ...], timesteps: int) -> str:
    """A shell loop that trains one run per seed."""
    words = command.replace("{seed}", "$s")
    length = f"--total-timesteps {timesteps} --run-dir runs/{name}-s$s"
    return f"for s in {' '.join(map(str, seeds))}; do python {words} --seed $s {length}; done"


def commands_of(outcome: Outcome, missing: list[Missing], tables: dict[str, Any]) -> list[str]:
    """Shell lines for what a claim needs: runs to adapt, then runs, packed studies, tables."""
    lines = [f"# {outcome.cases[0].id}: {outcome.cases[0].says}"]
    if outcome.verdict != OPEN:
        lines.append(f"# Decided{' without these' if missing else ''}: it {outcome.verdict}.")
    elif not missing:
        lines.append(f"# No run of its list is missing. Undecided: {what_decides(outcome, [])}")
    every = [*sources_of(missing, tables), *missing]
    lines += [loop(x.command, x.name, x.seeds, x.timesteps) for x in every]
    by_world: dict[str, list[Missing]] = {}
    for x in missing:
        by_world.setdefault(x.name.split("-")[0], []).append(x)
    for world, own in by_world.items():
        # Only these: a run that another study of this world holds would be there twice.
        words = " ".join(f"runs/{x.name}-s{seeds_in_shell(x.seeds)}" for x in own)
        lines.append(f"python experiments/runs.py pack docs/data/study_{world}_claims.csv {words}")
    return [*lines, *(f"python {x}" for x in missing_tables(outcome))]


def seeds_in_shell(seeds: tuple[int, ...]) -> str:
    """Seeds as a shell expands them: "21", "{21,23}" or "{21..25}"."""
    if len(seeds) == 1:
        return str(seeds[0])
    if len(seeds) > 2 and seeds == (*range(seeds[0], seeds[-1] + 1),):
        return f"{{{seeds[0]}..{seeds[-1]}}}"
    return f"{{{','.join(map(str, seeds))}}}"


def command_of(tables: dict[str, Any], world: str, arm: str, where: str) -> str:
    """The command of an arm in a world."""
    return fill(look_up(tables, "arms", arm, where), names_of(tables, world, where), where)


def studies_of(cases: list[Claim], tables: dict[str, Any]) -> dict[str, str]:
    """{file name: text of a study for launch.py with all runs that claims need in a world, and
    those there that runs in other worlds adapt}. Arms with seeds of their own have their file."""
    worlds: dict[str, list[Claim]] = {}
    adapted: dict[str, dict[str, str]] = {}  # {world: {run's name: command}}
    for case in cases:
        worlds.setdefault(case.run, []).append(case)
        for command in case.arms.values():
            for world, arm in ADAPTED.findall(command):
                own = adapted.setdefault(world, {})
                own[f"{world}-{arm}"] = command_of(tables, world, arm, case.id)
    files = {}
    for world, its in worlds.items():
        by_first: dict[int, list[tuple[Claim, str]]] = {}  # {first seed: claims and arms}
        for case in its:
            for arm in case.arms:
                by_first.setdefault(case.seeds_of(arm)[0], []).append((case, arm))
        usual = min(by_first)
        for first, group in by_first.items():
            name = f"claims_{world}.toml" if first == usual else f"claims_{world}_s{first}.toml"
            more = adapted.get(world, {}) if first == usual else {}
            if text := study_text(world, group, more):
                files[name] = text
    return files


def study_text(world: str, group: list[tuple[Claim, str]], adapted: dict[str, str]) -> str:
    """The text of a study: these claims' arms in a world, and runs there that others adapt; "" if
    none of them is a run."""
    runs = {f"{world}-{arm}": case.arms[arm] for case, arm in group} | adapted
    if all(command.startswith("experiments/") for command in runs.values()):
        return ""
    seeds = max((case.seeds_of(arm)[: case.least_seeds] for case, arm in group), key=len)
    claims = ", ".join(dict.fromkeys(case.id for case, _ in group))
    sources = sorted({x for command in runs.values() for x, _ in ADAPTED.findall(command)})
    after = f" After claims_{', claims_'.join(sources)}, whose runs some adapt." * bool(sources)
    lines = [
        "# Written by `python experiments/claims.py --studies experiments/studies`.",
        f"about = {json.dumps(f'What claims {claims} need in {world}.{after}')}",
        'dir = "runs"',
        f"seeds = {list(seeds)}",
        f"timesteps = {group[0][0].timesteps:_}",
        "",
        "[runs]",
        *(f"{name} = {json.dumps(command)}" for name, command in runs.items()),
    ]
    return "\n".join(lines) + "\n"


def write_studies(folder: Path, cases: list[Claim], tables: dict[str, Any]) -> None:
    """Write studies_of() into a folder; UsageError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in studies_of(cases, tables).items():
            write_file(folder / name, text.encode())
    except OSError as error:
        raise UsageError(f"--studies {folder} cannot be written: {error.strerror}.") from None


# --- The page -------------------------------------------------------------------------------------

LACKING = """One comparison that fails is enough: what else these claims name changes no verdict.
"""
HOURS = "those of runs on two shared cores (where from: `experiments/claims.toml`)."
CORES = "two shared cores"
OWN_BOTS = f"{CORES}, with Melting Pot's own bots, which are not here ([why](scenarios.md))"
HEAD = """# The papers' claims

    python experiments/claims.py --out docs                # writes this page, and its data
    python experiments/claims.py --commands B3 M1          # prints what these claims need
    python experiments/launch.py experiments/studies/claims_chicken.toml   # runs it

Does what the three papers claim hold in this implementation? The criteria were written before the
runs that decide them, but for the lemma claims, which also count older runs of others (their rows).

**Methods are judged in our forms.** B's arm `bidist` has the clip of Eq. (9) centred at the old
policy, not its letter ([bidist.md](bidist.md)). M's arm `mra`, and with it `uni` and `single`, has
the form that [the ladder](mra_ladder.md) chose: phi learns by Eqs. (10), (11), (13), psi by (11),
(13), not by Algorithm 4 as printed. M's arms have `--preset cpu`: 2.5 to 3.3 % of the steps of the
authors' code, but [.5 % of its minibatches](results_mra.md), of half their size. I's arms have that
preset, too: no memory, windows of 8 steps, lambda-returns, Adam, a pointer ([mipi.md](mipi.md)); in
Resource Collection MIPI plays the policy of Eq. (13) itself, not the head of Eq. (18), by tags.

![effects with intervals and margins, by claim](data/claims.png)

Each row has a scale of its own. A comparison holds if its interval lies right of its margin, does
not if left, else is undecided, as with too few seeds or an arm that has not learned.
"""
RULES = """## How verdicts are reached

- **Criteria** are in `experiments/claims.toml`: dates, what had been seen by then, what changed.
- **Runs that count** have the claim's flags, seeds and length; pilots are in the figure and data.
  Of other commands' tables flags and length (M5), seeds and length (I4), seeds (B2) are checked.
- **An effect** is the first arm's centre less the other's, over seeds. The centre is the
  interquartile mean if both arms have five seeds, else the mean. Where rows or scenarios are
  counted, the effect is the difference of mean ranks, once all arms have run.
- **Intervals** are 95 %. Those of means are Student's (Welch's). Those of interquartile means and
  ranks are bootstraps over seeds, which are drawn as clusters and for each arm by itself.
- **p** is of a permutation test of no difference, not of the margin, for means two-sided, exact up
  to 200,000 ways to deal the seeds (ranks: 2,000,000), then by draws. Three against three: p >= .1.
- **A claim** holds if all of its comparisons do, and does not hold if one of them does not. Where
  means would say something else than interquartile means, the table tells.
- **The budget** beside a verdict is that of the comparisons which decide it, in environment steps.
  BiDist and MRA state none: shares are of our default, 10,000,000, and of MRA's authors' code,
  80,000 episodes of 20 steps a game.
- **A margin** in per cent is of the other arm's figure in the same few seeds. Its own error is not
  in the interval: it matters most in B3, B5 to B7, whose seeds differ most. Of an arm that earns as
  random play does it is 0, and being ahead says little (M3's MADDPG and MAAC in Pacman).

**Few seeds decide too easily.** Of two equal arms with normal figures
(`tests/experiments/test_statistics.py`) a bootstrap of means leaves 0 out one time in five with
three seeds an arm, one in eight with five, where one in twenty is meant: hence Student's. One of
interquartile means leaves it out one time in sixteen with five seeds (of a single arm, M8, one in
nine), one of ranks with three seeds one time in nine (six arms in two worlds, as B1-proxy) or
thirteen (four in three, as I1). Verdicts are looked at again as seeds come in. Of several
comparisons at their margin one fails more easily than of one. In particle worlds runs of equal
seeds are judged in the same worlds (not RL2's), so M's intervals are too wide.
"""
BARS = """The bars of I1 to I3 and I6 are what the script focus won with 3 to 5 agents in a sample
of battles. Another sample ([battles.md](battles.md), 6,144 a family, +-.012) has .430 in SZ, .370
in CSZ and .243 in MMM. A miss within that tells little of whether an arm has learned.
"""


def number(x: float) -> str:
    return f"{x:.4g}"


def seeds_text(worlds: list[list[Point]]) -> str:
    """The figure of every seed, worlds separated by semicolons."""
    return "; ".join(", ".join(number(x.value) for x in points) or "-" for points in worlds)


def effect_text(found: Difference) -> str:
    if math.isnan(found.mean):
        return ""
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3g}, {found.high:+.3g}]"
    return f"{found.mean:+.3g}{interval}"


def margin_text(case: Claim) -> str:
    if case.margin_of == "unit":
        return f"{case.margin:g}{' ranks' if case.compare == 'rank' else ''}"
    whose = {"mean": "mean", "gain": "gain over random"}[case.margin_of]
    return f"{100 * case.margin:g} % of the other's {whose}"


def budget_text(shares: list[float], paper: Paper) -> str:
    """Shares of the paper's steps in per cent (of whose, if the paper states none), a range if they
    differ, or "not stated"."""
    known = sorted(100 * x for x in shares if not math.isnan(x))
    ends = dict.fromkeys(f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in known[:1] + known[-1:])
    whose = f" of {paper.steps_of}" if paper.steps_of else ""
    return f"{' to '.join(ends)} %{whose}" if known else "not stated"


def summary_row(outcome: Outcome) -> dict[str, str]:
    case, verdicts = outcome.cases[0], [part.verdict for part in outcome.parts]
    names = {HOLDS: "hold", FAILS: "do not", OPEN: "undecided"}
    found = [f"{name}: {verdicts.count(x)}" for x, name in names.items() if x in verdicts]
    text = ", ".join(found)
    reasons = [part.why.split("; ")[0] or part.by_means for part in outcome.parts]
    alone = [part.beside_bar for part in outcome.parts]
    first_ones = [next(filter(None, some), "") for some in (reasons, alone)]
    if said := "; ".join(filter(None, first_ones)):
        text += f" ({said})"
    groups = [(*x.mine, *(x.theirs if x.other else ())) for x in outcome.deciding]
    seeds = min(len(points) for worlds in groups for points in worlds)
    return {
        "": case.id,
        "the paper says": case.says,
        "verdict": outcome.verdict,
        "comparisons": text,
        "seeds an arm": f"{seeds} of {case.least_seeds} (paper: {case.paper_seeds})",
        "steps, of the paper's": budget_text(outcome.shares, PAPERS[case.id[0]]),
    }


def criterion_row(outcome: Outcome) -> dict[str, str]:
    case, bar = outcome.cases[0], ""
    if case.bar:
        levels = dict.fromkeys(number(x.bar.at_least) for x in outcome.cases)
        bar = f"; bar for {', '.join(case.bar.arms)}: {', '.join(levels)}"
    return {
        "": case.id,
        "where": case.where,
        "quantity": case.quantity,
        "first; others": f"{', '.join(case.first)}; {', '.join(case.others) or '0'}",
        "margin": ", ".join(dict.fromkeys(margin_text(x) for x in outcome.cases)),
        "holds if": case.rule + bar,
        "seeds; pilots seen": f"{seeds_in_words(case)}; {case.pilots_seen}",
    }


def seeds_in_words(case: Claim) -> str:
    """The claim's seeds and, where arms have others, theirs: "11 to 15, mipi 14 to 18"."""
    ends = {"": case.seeds} | case.own_seeds
    return ", ".join(f"{arm} {x[0]} to {x[-1]}".strip() for arm, x in ends.items())


def effect_row(part: Part) -> dict[str, str]:
    texts = [part.note, part.why or part.verdict, part.by_means, part.beside_bar]
    return {
        "": part.case.id,
        "compared": part.title,
        "effect": effect_text(part.found),
        "margin": "" if math.isnan(part.margin) else f"{part.margin:.3g}",
        "p": "" if math.isnan(part.found.p) else f"{part.found.p:.2g}",
        "first, by seed": seeds_text(part.mine),
        "other, by seed": seeds_text(part.theirs) if part.other else "",
        "what": "; ".join(filter(None, texts)),
    }


def name_in_figure(part: Part) -> str:
    """The claim and what is compared; of pilots also in what their runs differ, or their steps."""
    name = f"{part.case.id}  {part.title}"
    if not part.pilot:
        return name
    steps, measure = max(x.steps for own in part.mine for x in own), part.case.measure
    form = measure.of_pilots if isinstance(measure, Table) else ""
    words = ["pilot", *filter(None, (form, f"{steps / 1e6:g}M steps" if steps else ""))]
    return f"{name} ({', '.join(words)})"


def needed_row(outcome: Outcome, missing: list[Missing], text: str) -> dict[str, str]:
    runs, hours = total_of(missing)
    return {
        "": outcome.cases[0].id,
        "runs": f"{runs:,}" if runs else "",
        "core hours": hours_text(hours) if runs else "",
        "on": OWN_BOTS if any(x.own_bots for x in missing) else CORES,
        "what would decide it": text,
    }


def lacking_row(outcome: Outcome, missing: list[Missing]) -> dict[str, str]:
    runs, hours = total_of(missing)
    worlds = {}
    for x in missing:
        world, arm = x.name.split("-")
        worlds.setdefault(world, []).append(f"{arm} {len(x.seeds)}")
    return {
        "": outcome.cases[0].id,
        "runs": f"{runs:,}",
        "core hours": hours_text(hours),
        "seeds of arms": "; ".join(f"{world}: {', '.join(own)}" for world, own in worlds.items()),
    }


def hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table; a "|" in the text is escaped, so that it ends no cell."""
    return markdown_table([{k: x.replace("|", "&#124;") for k, x in row.items()} for row in rows])


def in_short(names: list[str], notes: dict[str, str] | None = None) -> str:
    """Names of claims with ranges: B1, B2, B3, B5 -> "B1 to B3, B5"; a name in `notes` stands by
    itself, with its note in brackets."""
    notes = notes or {}
    # Within a range, number minus place in the list is constant.
    keys = [(int(name[1:]) - place, notes.get(name)) for place, name in enumerate(names)]
    found = []
    for (_, note), run in itertools.groupby(enumerate(names), key=lambda x: keys[x[0]]):
        some = [name for _, name in run]
        if note:
            found += [f"{name} ({note})" for name in some]
        else:
            found += [f"{some[0]} to {some[-1]}"] if len(some) > 2 else some
    return ", ".join(found)


def papers_table(outcomes: list[Outcome]) -> str:
    """A table, also in README.md: each paper's verdicts on its claims, without proxies, and what
    means over seeds would say where that is something else."""
    rows = []
    for letter, paper in PAPERS.items():
        own = {x.cases[0].id: x for x in outcomes if x.cases[0].id[0] == letter}
        own = {name: x for name, x in own.items() if "-" not in name}
        other = {name: x for name, x in own.items() if x.verdict_by_means != x.verdict}
        notes = {name: f"{x.verdict_by_means} by means" for name, x in other.items()}
        row = {"method": paper.method, "generalises to": paper.what}
        for verdict in (HOLDS, FAILS, OPEN):
            row[verdict] = in_short([x for x in own if own[x].verdict == verdict], notes)
        decided = {name: x.shares for name, x in own.items() if x.verdict != OPEN}
        unknown = [name for name, shares in decided.items() if all(map(math.isnan, shares))]
        texts = [budget_text([*itertools.chain(*decided.values())], paper)] if decided else []
        if unknown and len(unknown) < len(decided):
            texts.append(f"{in_short(unknown)} not stated")
        if decided and paper.steps_of:
            texts[0] += " (the paper states none)"
        row["steps of the decided claims, of the paper's"] = "; ".join(texts)
        rows.append(row)
    return markdown_table(rows)


def page(outcomes: list[Outcome], missing: list[list[Missing]], tables: dict[str, Any]) -> str:
    """The text of docs/CLAIMS.md. missing: what each claim still needs; tables: the criteria."""
    text = [HEAD, "## Verdicts\n", papers_table(outcomes)]
    text += [table([summary_row(x) for x in outcomes])]
    text += [RULES, "## Criteria\n"]
    if any("focus" in case.rule for x in outcomes for case in x.cases):
        text += [BARS]
    text += [table([criterion_row(x) for x in outcomes])]
    parts = [x for outcome in outcomes for x in outcome.parts]
    shown = [x for x in parts if not math.isnan(x.found.low) and " seeds in " not in x.why]
    effects = [effect_row(x) for x in shown]
    if effects:
        text += ["## Effects\n", files_text(outcomes), table(effects)]
    needed, lacking, runs, fresh = [], [], [], []
    for outcome, own in zip(outcomes, missing, strict=True):
        own = each_once([*own, *sources_of(own, tables)])
        more = fresh_runs(outcome, tables["slower"])
        if what := what_decides(outcome, own):
            needed.append((total_of([*own, *more]), needed_row(outcome, [*own, *more], what)))
            runs, fresh = runs + own, fresh + more
        elif own:
            lacking.append((total_of(own), lacking_row(outcome, own)))
    if needed:
        text += ["## What would decide\n", what_all_needs(each_once(runs), each_once(fresh))]
        text += [cheapest_first(needed)]
    if lacking:
        text += ["## Decided without these\n", LACKING, cheapest_first(lacking)]
    return "\n".join(text)


def cheapest_first(needed: list[tuple[tuple[int, float], dict[str, str]]]) -> str:
    """A table of rows with their runs and hours; rows without runs stand last."""
    rows = sorted(needed, key=lambda x: x[0][1] if x[0][0] else math.inf)
    return table([row for _, row in rows])


def files_text(outcomes: list[Outcome]) -> str:
    """A paragraph that links the claims' data."""
    names = [x.cases[0].id for x in outcomes if rows_of(x)]
    links = " ".join(f"[{name}](data/claims/{name}.csv)" for name in names)
    text = "Seeds of several worlds: world by world. Runs' figures, also of arms with too few seeds"
    return f"{text} and\nof pilots, random play beside them, and what bars are for: {links}\n"


def what_all_needs(missing: list[Missing], fresh: list[Missing]) -> str:
    """A paragraph: number and hours of all runs that undecided claims need."""
    runs, hours = total_of(missing)
    bots, long = total_of(x for x in missing if x.own_bots)
    text = f"Undecided claims need {runs:,} different runs, those that are adapted among them, and "
    text += f"{hours_text(hours)} core hours."
    if bots:
        text += f" {bots:,} of them, {hours_text(long)} hours, are with Melting Pot's own bots."
    if fresh:
        more, own = total_of(fresh)
        text += " Fresh seeds, by criteria of their own where a claim's list is too short, are"
        text += f" {more:,} more runs, {hours_text(own)} hours, if effects stay what they are."
    text += " Bars: who has not learned, and what the seeds that are left would need."
    return textwrap.fill(f"{text} Hours are {HOURS}", 100) + "\n"


def draw(outcomes: list[Outcome]) -> Any:
    """A row per comparison, claim by claim: the effect (pilots: hollow), its interval, and the
    margin as a dash, on a scale of its own from 0; beside it the figures. None without effects."""
    shown = {x.cases[0].id: [*x.parts, *x.pilots] for x in outcomes}
    shown = {
        name: [part for part in parts if not math.isnan(part.found.low)]
        for name, parts in shown.items()
    }
    rows = [(name, part) for name, parts in shown.items() for part in parts]
    if not rows:
        return None
    # Narrow: legible on a telephone, too. A row of text is .17 inches high.
    figure, axis = plt.subplots(figsize=(6, 0.17 * (len(rows) + 3)), layout="constrained")
    for y, (name, part) in enumerate(rows):
        margin = 0.0 if math.isnan(part.margin) else part.margin
        scale = max(abs(part.found.low), abs(part.found.high), abs(margin)) or 1.0
        colour = {HOLDS: "tab:green", FAILS: "tab:red", OPEN: "0.35"}[part.verdict]
        ends = [part.found.low / scale, part.found.high / scale]
        axis.plot(ends, [y, y], color=colour, lw=1.2)
        fill = "white" if part.pilot else colour
        axis.plot(part.found.mean / scale, y, "o", color=colour, mfc=fill, ms=4)
        axis.plot([margin / scale] * 2, [y - 0.35, y + 0.35], "k--", lw=0.9)
        if y and name != rows[y - 1][0]:
            axis.axhline(y - 0.5, color="0.85", lw=0.6)
    axis.set_yticks(range(len(rows)), [name_in_figure(part) for _, part in rows], fontsize=6.5)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-1.1, 1.1)
    axis.set_xticks([])
    axis.axvline(0, color="0.8", lw=0.8, zorder=0)
    figures = axis.twinx()
    texts = [f"{effect_text(part.found)}, margin {part.margin:.2g}" for _, part in rows]
    figures.set_yticks(range(len(rows)), texts, fontsize=6.5)
    figures.set_ylim(axis.get_ylim())
    for own in (axis, figures):
        own.tick_params(axis="y", length=0)
        own.spines[:].set_visible(False)
    kinds = [("tab:green", HOLDS), ("tab:red", FAILS), ("0.35", OPEN)]
    handles = [plt.Line2D([], [], color=x, marker="o", ms=4, lw=1.2, label=y) for x, y in kinds]
    pilot = plt.Line2D([], [], color="0.35", marker="o", mfc="white", ms=4, lw=1.2, label="pilot")
    dash = plt.Line2D([], [], color="k", ls="--", lw=0.9, label="margin")
    figure.legend(handles=[*handles, pilot, dash], loc="outside upper center", ncols=5, fontsize=7)
    return figure


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """The rows of a claim's CSV, one per run and cell. counts: yes, pilot, or bar: what a bar is
    for. random: random play's figure, mean over cells, of which a gain counts."""
    rows = {}
    for part in (*outcome.parts, *outcome.pilots):
        cases = outcome.cases if part.case.compare == "rank" else (part.case,)
        for arm, worlds in ((part.first, part.mine), (part.other, part.theirs)):
            for case, x in [(y, x) for y, own in zip(cases, worlds, strict=True) for x in own]:
                about = {"counts": "pilot" if part.pilot else "yes", "world": case.world}
                for row in rows_of_run(about | {"arm": arm}, x):
                    rows[tuple(row.values())] = row
    for case, arm, points in outcome.bars:
        about = {"counts": "bar", "world": case.world, "arm": arm}
        for row in itertools.chain(*(rows_of_run(about, x) for x in points)):
            rows[tuple(row.values())] = row
    return [*rows.values()]


def rows_of_run(about: dict[str, Any], x: Point) -> list[dict[str, Any]]:
    """A run's rows, one per cell; random play's figure is the same in all of them."""
    run = about | {"run": x.run, "seed": x.seed, "timesteps": x.steps or ""}
    zero = "" if math.isnan(x.zero) else x.zero
    return [run | {"cell": cell, "value": y, "random": zero} for cell, y in x.cells.items()]


def write(out: Path, text: str, outcomes: list[Outcome]) -> None:
    """Write the page, the figure and a CSV per claim with data; UsageError if that fails."""
    folder = out / "data/claims"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(out / "CLAIMS.md", text.encode())
        for outcome in outcomes:
            if rows := rows_of(outcome):
                write_rows(folder / f"{outcome.cases[0].id}.csv", rows)
        if (figure := draw(outcomes)) is not None:
            save_figure(figure, out / "data/claims.png")
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None


def claims(study: Study) -> None:
    """Judge all claims and print or write the page; or print commands, or write studies."""
    tables = read_tables(study.criteria)
    cases = read_claims(tables)
    if unknown := [x for x in study.commands or () if x not in cases]:
        raise UsageError(f"--commands {unknown[0]}: there are {', '.join(cases)}.")
    given = {"--out": study.out, "--commands": study.commands, "--studies": study.studies}
    if len(typed := [name for name, x in given.items() if x is not None]) > 1:
        raise UsageError(f"{typed[0]} and {typed[1]} exclude each other.")
    if study.studies:
        write_studies(study.studies, [*itertools.chain(*cases.values())], tables)
        return
    if not study.data.is_dir():
        raise UsageError(f"--data {study.data} is no directory.")
    paths = study.runs or sorted(study.data.glob("study_*.csv"))
    if not paths:
        raise UsageError(f"--data {study.data} has no study_*.csv.")
    runs = read_runs(paths, same=name_in_world)
    names = study.commands or [*cases]
    names = tqdm(names, unit=" claims", disable=None)
    outcomes = [judge(cases[name], runs, study.data) for name in names]
    missing = [missing_runs(x, runs, tables["slower"]) for x in outcomes]
    if study.commands is not None:
        for outcome, own in zip(outcomes, missing, strict=True):
            if study.commands or outcome.verdict == OPEN:
                print("\n".join(commands_of(outcome, own, tables)))
        return
    text = page(outcomes, missing, tables)
    if study.out:
        write(study.out, text, outcomes)
    print(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(claims, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
