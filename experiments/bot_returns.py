"""What scripted bots achieve: returns beside each other, and how often they do what they intend.

    python experiments/bot_returns.py coins --episodes 20 --steps 1000 --out docs/data/bots_coins

One visitor meets residents of one kind on all other seats. Rows are visitors, columns residents;
a cell has the visitor's return and the residents', per capita and 1,000 steps, with 95 % bootstrap
intervals over episodes (resampled as wholes; rates are ratios of totals). "random" plays every
action with equal probability. Without --visitors and --residents the table has the substrate's
bots with one fixed goal, random play, and one bot of every kind of puppeteer; or, where all bots
change their goals, a puppet for each goal ("goal:CLEAN") as visitor, and random play and bots of
every kind of puppeteer as residents.

The second table (where acts are judged) pools all of a bot's episodes: the share of its acts that
fit the goal that its puppeteer had set at that moment, and how many such acts it managed in 100
steps. An act is:

    *_in_the_matrix   an interaction; it fits if the intended resource leads in the own inventory
    coins             a coin; it fits if its colour is the goal's (cooperate: own, defect: any,
                      spite: the other's)
    coop_mining       an ore extracted; it fits if it is the goal's (all: either)

The third table counts, for each bot, the engine's events that name a player (what was eaten,
zapped, cleaned, claimed, ...) per 1,000 steps and seat.

Writes OUT.csv, a line per episode, and OUT.md. Episodes are cut at --steps.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.meltingpot.bots import puppet_kind
from envs.meltingpot.scenarios import GOAL, RANDOM, Plan, ScenarioEngine, goal_names, unscripted
from envs.meltingpot.tiles import Palette, Spec
from envs.meltingpot.worlds import get_spec, import_meltingpot


@dataclasses.dataclass(frozen=True)
class Study:
    """Visitors among residents."""

    substrate: Annotated[str, tyro.conf.Positional]
    visitors: tuple[str, ...] = ()  # bots, without the substrate's name, and random
    residents: tuple[str, ...] = ()  # the same
    episodes: int = 20  # per cell
    steps: int = 1000  # of an episode at most
    jobs: int = 0  # processes; 0: one per core
    seed: int = 1
    out: Path = Path("bot_returns")  # writes OUT.csv and OUT.md


def default_bots(substrate: str) -> tuple[list[str], list[str]]:
    """Visitors (fixed goals and random) and residents (these, then one of each other kind)."""
    import_meltingpot()
    from meltingpot.configs import bots

    fixed, others = {}, {}
    for name, config in bots.BOT_CONFIGS.items():
        if config.substrate != substrate or config.puppeteer_builder is None:
            continue
        puppeteer = config.puppeteer_builder()
        kind = type(puppeteer).__name__
        about = {k: v for k, v in vars(puppeteer).items() if "margin" not in k}
        about = {k: v.tolist() if isinstance(v, np.ndarray) else str(v) for k, v in about.items()}
        short = name.removeprefix(f"{substrate}__")
        chosen = fixed if kind in ("Specialist", "FixedGoal") else others
        chosen.setdefault((kind, *map(str, about.values())), short)
    if not fixed and not substrate.endswith(("__arena", "__repeated")):
        visitors, residents = [*(GOAL + goal for goal in goal_names(substrate)), RANDOM], [RANDOM]
    else:
        visitors = residents = [*fixed.values(), RANDOM]
    kinds: dict[str, list[str]] = defaultdict(list)
    for (kind, *_), short in others.items():
        kinds[kind].append(short)
    return visitors, [*residents, *itertools.chain.from_iterable(x[:4] for x in kinds.values())]


def text(x) -> str:
    """A value of an event."""
    return x.decode() if isinstance(x, bytes) else f"{float(x):g}"


def full(substrate: str, name: str) -> str:
    """A bot's whole name."""
    return name if name == RANDOM or name.startswith(GOAL) else f"{substrate}__{name}"


# Keys of events that name the player who acts (1-based), and those that say on what.
ACTORS = (b"player_index", b"source", b"gifter_index", b"player")
OBJECTS = (b"mushroom_type", b"berry_color", b"target_berry", b"ore_type")


def interaction_fits(event: dict, goals: np.ndarray) -> Iterator[tuple[int, bool]]:
    """*_in_the_matrix: both sides; fits if the intended resource alone leads in the inventory."""
    for side in (b"row", b"col"):
        seat = int(event[side + b"_player_idx"]) - 1
        inventory = np.asarray(event[side + b"_inventory"])
        best = np.flatnonzero(inventory == inventory.max())
        yield seat, goals[seat] >= 0 and best.tolist() == [goals[seat] % len(inventory)]


def coin_fits(event: dict, goals: np.ndarray) -> Iterator[tuple[int, bool]]:
    """coins: cooperate takes its own colour, defect any, spite the other's."""
    seat = int(event[b"player_index"]) - 1
    own = event[b"player_coin_type"] == event[b"coin_type"]
    yield seat, {0: own, 1: True, 2: not own}.get(goals[seat], False)


def extraction_fits(event: dict, goals: np.ndarray) -> Iterator[tuple[int, bool]]:
    """coop_mining: iron (1), gold (2), gold, either."""
    seat, ore = int(event[b"player"]) - 1, int(event[b"ore_type"])
    yield seat, {0: ore == 1, 1: ore == 2, 2: ore == 2}.get(goals[seat], True)


# By the engine's names of events: whose act it is, and whether it fits that seat's goal, whose
# number stands in goals (N,), -1 without.
FITS = {
    "interaction": interaction_fits,
    "coin_consumed": coin_fits,
    "extraction": extraction_fits,
}


class Acts:
    """Counts each seat's acts, those that fit its goal, and all events of each seat."""

    def __init__(self, engine: ScenarioEngine, spec: Spec):
        self.engine, self.substrate = engine, spec.substrate
        self.done, self.fit = np.zeros(spec.num_agents, int), np.zeros(spec.num_agents, int)
        self.events = [Counter() for _ in range(spec.num_agents)]
        self.goals = np.full(spec.num_agents, -1)
        for bot in engine.bots:
            if bot.policy is not None:
                self.watch(bot)

    def watch(self, bot) -> None:
        """Note the goal whenever the bot's puppet gets one."""
        puppet = bot.policy._puppet
        act = puppet.act

        def noting(goal, seen, memory):
            self.goals[bot.seat] = goal
            return act(goal, seen, memory)

        puppet.act = noting

    def count(self) -> None:
        """Read the last step's events."""
        for name, items in self.engine.lab.events():
            event = dict(zip(items[1::2], items[2::2]))
            seats = [int(event[key]) - 1 for key in ACTORS if key in event][:1]
            for seat in seats:
                about = [text(event[key]) for key in OBJECTS if key in event]
                self.events[seat][" ".join([name, *about])] += 1
            for seat, fits in FITS[name](event, self.goals) if name in FITS else ():
                self.done[seat] += 1
                self.fit[seat] += bool(fits)


def play(job: tuple) -> dict:
    """One episode: figures of the visitor on seat 0 and, per capita, of the residents."""
    substrate, visitor, resident, seed, episode, steps = job
    spec = get_spec(substrate)
    names = [visitor] + [resident] * (spec.num_agents - 1)
    plan = Plan("", spec, tuple((full(substrate, name),) for name in names))
    engine = ScenarioEngine(plan, "scripted", (seed, episode), Palette.private())
    acts, returns = Acts(engine, spec), np.zeros(spec.num_agents)
    reward, pick_ups = np.zeros(spec.num_agents), np.zeros(spec.num_agents, np.int64)
    for length in range(1, steps + 1):  # noqa: B007
        goes_on = engine.step(np.zeros(0, np.int64))
        engine.read_rewards(reward, pick_ups)
        returns += reward
        acts.count()
        if not goes_on:
            break
    row = {"substrate": substrate, "visitor": visitor, "resident": resident, "episode": episode}
    row |= {"length": length}
    for who, seats in (("visitor", slice(0, 1)), ("resident", slice(1, None))):
        row[f"{who}_return"] = round(float(returns[seats].mean()), 4)
        row[f"{who}_acts"] = float(acts.done[seats].mean())
        row[f"{who}_fitting"] = float(acts.fit[seats].mean())
        total = sum(acts.events[seats], Counter())
        row[f"{who}_events"] = json.dumps({k: v / len(returns[seats]) for k, v in total.items()})
    return row


def rate(numerator: np.ndarray, denominator: np.ndarray, scale: float, digits: int = 1) -> str:
    """scale * sum / sum with its 95 % bootstrap interval over episodes."""
    if not denominator.sum():
        return ""
    rows = np.random.default_rng(0).integers(0, len(numerator), (2000, len(numerator)))
    below = denominator[rows].sum(1)
    resampled = numerator[rows].sum(1)[below > 0] / below[below > 0]
    low, high = np.percentile(scale * resampled, [2.5, 97.5])
    mean = scale * numerator.sum() / denominator.sum()
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(rows: list[dict], study: Study, visitors: list[str], residents: list[str]) -> str:
    """Both tables in Markdown."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["visitor"], row["resident"]].append(row)

    def column(chosen: list[dict], name: str) -> np.ndarray:
        return np.array([row[name] for row in chosen], float)

    lines = [
        f"Return per 1,000 steps, visitor / residents per capita, {study.episodes} episodes:",
        "",
    ]
    lines += ["| visitor \\ residents | " + " | ".join(residents) + " |"]
    lines += ["|---" * (len(residents) + 1) + "|"]
    for visitor in visitors:
        line = []
        for resident in residents:
            chosen = cells[visitor, resident]
            length = column(chosen, "length")
            parts = (
                rate(column(chosen, f"{who}_return"), length, 1000)
                for who in ("visitor", "resident")
            )
            line.append(" / ".join(parts))
        lines.append(f"| {visitor} | " + " | ".join(line) + " |")
    judged = any(row["visitor_acts"] or row["resident_acts"] for row in rows)
    if judged:
        lines += ["", "| bot | acts that fit its goal, % | such acts per 100 steps | episodes |"]
        lines += ["|---|---|---|---|"]
    for bot in dict.fromkeys([*visitors, *residents]):
        if bot == RANDOM or not judged:
            continue
        own = [figures for row in rows if (figures := of_bot(row, bot))]
        done, fit, steps = np.array(own, float).T
        share, speed = rate(fit, done, 100), rate(fit, steps, 100, 2)
        lines.append(f"| {bot} | {share} | {speed} | {len(own)} |")
    return "\n".join(lines + [""] + event_table(rows, [*visitors, *residents])) + "\n"


def of_bot(row: dict, bot: str) -> tuple[float, float, float] | None:
    """A bot's acts, fitting ones and steps in one episode; as visitor and as resident it sits
    beside itself: one episode still, of two shares that depend on each other."""
    own = [who for who in ("visitor", "resident") if row[who] == bot]
    sums = (sum(row[f"{who}_{x}"] for who in own) for x in ("acts", "fitting"))
    return (*sums, len(own) * row["length"]) if own else None


def event_table(rows: list[dict], bots: list[str]) -> list[str]:
    """Events per 1,000 steps and seat, by bot."""
    counts, steps = {bot: Counter() for bot in bots}, Counter()
    for row, who in itertools.product(rows, ("visitor", "resident")):
        counts[row[who]].update(json.loads(row[f"{who}_events"]))
        steps[row[who]] += row["length"]
    names = sorted({name for found in counts.values() for name in found})
    lines = [f"| events per 1,000 steps | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for bot in counts:
        cells = (f"{1000 * counts[bot][name] / steps[bot]:.1f}" for name in names)
        lines.append(f"| {bot} | {' | '.join(cells)} |")
    return lines


def check(study: Study) -> tuple[list[str], list[str]]:
    """Visitors and residents; ValueError, one sentence, for what cannot be played."""
    for name in ("episodes", "steps"):
        if getattr(study, name) < 1:
            raise ValueError(f"--{name} {getattr(study, name)} is not positive.")
    for name in ("jobs", "seed"):
        if getattr(study, name) < 0:
            raise ValueError(f"--{name} {getattr(study, name)} is negative.")
    spec = get_spec(study.substrate)
    if puppet_kind(study.substrate) is None:
        raise ValueError(f"{study.substrate} has no scripted bots: see docs/scenarios.md.")
    visitors, residents = default_bots(study.substrate)
    visitors, residents = list(study.visitors) or visitors, list(study.residents) or residents
    goals = goal_names(study.substrate)
    for bot in (*visitors, *residents):
        if bot.startswith(GOAL) and bot.removeprefix(GOAL) not in goals:
            raise ValueError(f"{study.substrate} has no goal {bot}: it has {', '.join(goals)}.")
        plan = Plan("", spec, ((full(study.substrate, bot),),))
        if not bot.startswith(GOAL) and unscripted(plan):
            raise ValueError(f"{study.substrate} has no puppet {bot}: see docs/scenarios.md.")
    return visitors, residents


def main(study: Study) -> None:
    """Play everything, then write both files."""
    try:
        visitors, residents = check(study)
        study.out.parent.mkdir(parents=True, exist_ok=True)
        study.out.with_name(f"{study.out.name}.md").touch()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    jobs = [
        (study.substrate, visitor, resident, study.seed, episode, study.steps)
        for visitor in visitors
        for resident in residents
        for episode in range(study.episodes)
    ]
    cores = study.jobs or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(play, jobs, chunksize=2), total=len(jobs), unit=" episodes"))
    with study.out.with_name(f"{study.out.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = tables(rows, study, visitors, residents)
    study.out.with_name(f"{study.out.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Study))
