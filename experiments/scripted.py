"""Returns of scripted players in every kind of world: reference points for all tables.

    python experiments/scripted.py meltingpot coins --episodes 20 --out docs/data/bots_coins
    python experiments/scripted.py particle --out docs/data/particle_players
    python experiments/scripted.py combat --scenarios sz --team-sizes 3 8 --episodes 512
    python experiments/scripted.py combat --backend sc2 --num-envs 4 --episodes 32    StarCraft II
    python experiments/scripted.py collection --team-sizes 3 8 --episodes 64

`SUBCOMMAND --help` has the options and explains each table.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

from harness import Count, Positive, Seed, UsageError

import numpy as np
import torch
import tyro
from annotated_types import Interval, MinLen
from tqdm import tqdm

from envs.meltingpot.bots import puppet_kind
from envs.meltingpot.scenarios import GOAL, RANDOM, Plan, ScenarioEngine, goal_names, unscripted
from envs.meltingpot.tiles import Palette, Spec
from envs.meltingpot.worlds import get_spec, import_meltingpot
from envs.particle import episodes as particle_episodes
from envs.particle.worlds import TASKS, ParticleWorld
from envs.smac import episodes as combat_episodes
from envs.smac import resource_collection
from envs.smac.combat import EnemyAI
from envs.smac.game import BattleError, make_battles
from envs.smac.resource_collection import NOOP, STAY, ResourceCollection
from envs.statistics import draw_rows, markdown_table, mean_interval, ratio_interval
from experiments.runs import check_out, finish, run_subcommand

# --- Melting Pot ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bots:
    """What scripted bots of Melting Pot earn together, and how often they act as they intend.

    One visitor plays with residents of one kind in all other seats. Rows are visitors, columns are
    residents. A cell has the per-capita returns per 1,000 steps of visitor and residents, with 95 %
    bootstrap intervals over whole episodes (rates are ratios of totals). "random" plays all actions
    with equal probability. Default visitors are the substrate's bots with one fixed goal, or a
    puppet per goal ("goal:CLEAN") if all bots change their goals, and random play. Default
    residents: bots with one fixed goal, random play, up to four bots of each kind of puppeteer.

    The second table (only for some substrates) pools all episodes of a bot: the share of its acts
    that fit the goal that its puppeteer had set at that moment, and the number of fitting acts per
    100 steps. In *_in_the_matrix an act is an interaction; it fits if the intended resource leads
    in the bot's inventory. In coins an act is a coin taken; it fits if it has the goal's colour
    (cooperate: own, defect: any, spite: the other's). In coop_mining it is an ore extracted, and
    fits if it is the goal's ore (all: either). The third table has the events of the engine that
    name a player (what was eaten, zapped, cleaned, ...), per 1,000 steps and seat.

    Writes OUT.csv, a line per episode, and OUT.md. Episodes end at --steps at the latest.
    """

    substrate: Annotated[str, tyro.conf.Positional]  # substrate to play in
    visitors: tuple[str, ...] = ()  # visiting bots, without the substrate's name, or random
    residents: tuple[str, ...] = ()  # resident bots, named in the same way
    episodes: Positive = 20  # episodes per pair of visitor and resident
    steps: Positive = 1000  # most steps of an episode
    jobs: Count = 0  # parallel processes; 0: one per core
    seed: Seed = 1  # seed of worlds and bots
    out: Path = Path("bot_returns")  # common beginning of the names of the .csv and .md files


def default_bots(substrate: str) -> tuple[list[str], list[str]]:
    """Default visitors and residents, as Bots describes them."""
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
    """The value of an engine event as text."""
    return x.decode() if isinstance(x, bytes) else f"{float(x):g}"


def full(substrate: str, name: str) -> str:
    """A bot's name in Melting Pot; "random" and "goal:..." stay as they are."""
    return name if name == RANDOM or name.startswith(GOAL) else f"{substrate}__{name}"


# Keys of events that name the player who acts (counted from 1), and keys that name the object.
ACTORS = (b"player_index", b"source", b"gifter_index", b"player")
OBJECTS = (b"mushroom_type", b"berry_color", b"target_berry", b"ore_type")


def interaction_fits(event: dict, goals: np.ndarray) -> Iterator[tuple[int, bool]]:
    """*_in_the_matrix: (seat, fits) of both players. An interaction fits if the goal's resource
    alone leads in the player's inventory."""
    for side in (b"row", b"col"):
        seat = int(event[side + b"_player_idx"]) - 1
        inventory = np.asarray(event[side + b"_inventory"])
        best = np.flatnonzero(inventory == inventory.max())
        yield seat, goals[seat] >= 0 and best.tolist() == [goals[seat] % len(inventory)]


def coin_fits(event: dict, goals: np.ndarray) -> Iterator[tuple[int, bool]]:
    """coins: (seat, fits) of a coin. Goals: 0 cooperate (own colour), 1 defect (any), 2 spite."""
    seat = int(event[b"player_index"]) - 1
    own = event[b"player_coin_type"] == event[b"coin_type"]
    yield seat, {0: own, 1: True, 2: not own}.get(goals[seat], False)


def extraction_fits(event: dict, goals: np.ndarray) -> Iterator[tuple[int, bool]]:
    """coop_mining: (seat, fits) of an ore. Goal 0: iron (ore 1); 1, 2: gold (ore 2); else any."""
    seat, ore = int(event[b"player"]) - 1, int(event[b"ore_type"])
    yield seat, {0: ore == 1, 1: ore == 2, 2: ore == 2}.get(goals[seat], True)


# {engine's event: function of the event and of each seat's goal number (N,), -1 without a goal,
# that yields (seat, whether the act fits that seat's goal)}
FITS = {
    "interaction": interaction_fits,
    "coin_consumed": coin_fits,
    "extraction": extraction_fits,
}


class Acts:
    """Counts, for each seat, its acts, the acts that fit its goal, and all events."""

    def __init__(self, engine: ScenarioEngine, spec: Spec):
        self.engine, self.substrate = engine, spec.substrate
        self.done, self.fit = np.zeros(spec.num_agents, int), np.zeros(spec.num_agents, int)
        self.events = [Counter() for _ in range(spec.num_agents)]
        self.goals = np.full(spec.num_agents, -1)
        for bot in engine.bots:
            if bot.policy is not None:
                self.watch(bot)

    def watch(self, bot) -> None:
        """Wrap the bot's puppet so that self.goals has its latest goal."""
        puppet = bot.policy._puppet
        act = puppet.act

        def noting(goal, seen, memory):
            self.goals[bot.seat] = goal
            return act(goal, seen, memory)

        puppet.act = noting

    def count(self) -> None:
        """Add the events of the last step."""
        for name, items in self.engine.lab.events():
            event = dict(zip(items[1::2], items[2::2]))
            seats = [int(event[key]) - 1 for key in ACTORS if key in event][:1]
            for seat in seats:
                about = [text(event[key]) for key in OBJECTS if key in event]
                self.events[seat][" ".join([name, *about])] += 1
            for seat, fits in FITS[name](event, self.goals) if name in FITS else ():
                self.done[seat] += 1
                self.fit[seat] += bool(fits)


class Job(NamedTuple):
    """One episode that a process plays."""

    substrate: str
    visitor: str
    resident: str
    seed: int
    episode: int
    steps: int


def play_bots(job: Job) -> dict[str, Any]:
    """Play one episode with the visitor in seat 0: a row of OUT.csv, per capita for residents."""
    substrate, visitor, resident = job.substrate, job.visitor, job.resident
    spec = get_spec(substrate)
    names = [visitor] + [resident] * (spec.num_agents - 1)
    plan = Plan("", spec, tuple((full(substrate, name),) for name in names))
    engine = ScenarioEngine(plan, "scripted", (job.seed, job.episode), Palette.private())
    acts, returns = Acts(engine, spec), np.zeros(spec.num_agents)
    reward, pick_ups = np.zeros(spec.num_agents), np.zeros(spec.num_agents, np.int64)
    for length in range(1, job.steps + 1):  # noqa: B007
        goes_on = engine.step(np.zeros(0, np.int64))
        engine.read_rewards(reward, pick_ups)
        returns += reward
        acts.count()
        if not goes_on:
            break
    row = {"substrate": substrate, "visitor": visitor, "resident": resident, "episode": job.episode}
    row |= {"length": length}
    for who, seats in (("visitor", slice(0, 1)), ("resident", slice(1, None))):
        row[f"{who}_return"] = round(float(returns[seats].mean()), 4)
        row[f"{who}_acts"] = float(acts.done[seats].mean())
        row[f"{who}_fitting"] = float(acts.fit[seats].mean())
        total = sum(acts.events[seats], Counter())
        row[f"{who}_events"] = json.dumps({k: v / len(returns[seats]) for k, v in total.items()})
    return row


def end_with_parent() -> None:
    """End this process as soon as the one that started it has gone, by SIGKILL too: the pool's
    queue would wait for it forever."""
    parent = parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def rate(numerator: np.ndarray, denominator: np.ndarray, scale: float, digits: int = 1) -> str:
    """scale * sum / sum as text, with its 95 % interval over episodes; "" if 0 is the divisor."""
    if not denominator.sum():
        return ""
    rows = draw_rows(len(numerator))
    low, high = ratio_interval(scale * numerator, denominator, rows)
    mean = scale * numerator.sum() / denominator.sum()
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def bot_tables(rows: list[dict], study: Bots, visitors: list[str], residents: list[str]) -> str:
    """The three Markdown tables that Bots describes."""
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
    """A bot's (acts, fitting acts, steps) in one episode, None if it did not play. A bot that is
    visitor and resident counts once, with sums of both, as they share the episode."""
    own = [who for who in ("visitor", "resident") if row[who] == bot]
    sums = (sum(row[f"{who}_{x}"] for who in own) for x in ("acts", "fitting"))
    return (*sums, len(own) * row["length"]) if own else None


def event_table(rows: list[dict], bots: list[str]) -> list[str]:
    """Lines of a table of events per 1,000 steps and seat, a line per bot."""
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


def choose_bots(study: Bots) -> tuple[list[str], list[str]]:
    """Visitors and residents; UsageError or ValueError for what cannot be played."""
    spec = get_spec(study.substrate)
    if puppet_kind(study.substrate) is None:
        raise UsageError(f"{study.substrate} has no scripted bots: see docs/scenarios.md.")
    visitors, residents = default_bots(study.substrate)
    visitors, residents = list(study.visitors) or visitors, list(study.residents) or residents
    goals = goal_names(study.substrate)
    for bot in (*visitors, *residents):
        if bot.startswith(GOAL) and bot.removeprefix(GOAL) not in goals:
            raise UsageError(f"{study.substrate} has no goal {bot}: it has {', '.join(goals)}.")
        plan = Plan("", spec, ((full(study.substrate, bot),),))
        if not bot.startswith(GOAL) and unscripted(plan):
            raise UsageError(f"{study.substrate} has no puppet {bot}: see docs/scenarios.md.")
    return visitors, residents


def meltingpot(study: Bots) -> None:
    """Play all pairs of visitor and residents, then write OUT.csv and OUT.md."""
    try:
        visitors, residents = choose_bots(study)
    except ValueError as error:
        raise UsageError(str(error)) from None
    check_out(study.out)
    jobs = [
        Job(study.substrate, visitor, resident, study.seed, episode, study.steps)
        for visitor in visitors
        for resident in residents
        for episode in range(study.episodes)
    ]
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = study.jobs or (len(affinity(0)) if affinity else os.cpu_count() or 1)
    with ProcessPoolExecutor(cores, get_context("spawn"), end_with_parent) as pool:
        played = pool.map(play_bots, jobs, chunksize=2)
        try:
            rows = list(tqdm(played, total=len(jobs), unit=" episodes"))
        finally:
            pool.shutdown(cancel_futures=True)  # where a signal ends this: plays no others
    finish(study.out, bot_tables(rows, study, visitors, residents), rows)


# --- Particle worlds ------------------------------------------------------------------------------


POPULATIONS = {
    "treasure": ("3", "6", "12", "24", "48"),
    "resource": ("3", "6", "7", "9", "10", "12", "13", "15", "18", "24"),
    "pacman": ("4,2", "6,3", "8,4", "2,8"),
    "signpost": ("3", "4", "5", "6", "7", "8", "9", "10"),
    "rooms": ("2,3", "3,3", "4,3", "5,3", "6,3", "7,3", "8,3", "9,3"),
    "delivery": ("3,2", "6,2", "12,2", "24,2"),
}


@dataclasses.dataclass(frozen=True)
class Particle:
    """Returns of scripted players in the particle worlds.

    Figures are returns per agent and episode for each type of agent, with 95 % bootstrap intervals
    over episodes. Random play draws all actions with equal probability; the other players are those
    of envs/particle/worlds.py. Writes OUT.csv and OUT.md.
    """

    tasks: tuple[str, ...] = tuple(POPULATIONS)  # tasks to play, also your own in TASKS
    populations: tuple[str, ...] = ()  # populations to play; default: those of our tables
    episodes: Annotated[int, Interval(ge=2)] = 1024  # episodes per player and population
    seed: Seed = 1  # seed of worlds and players
    out: Path = Path("particle_players")  # common beginning of the names of the .csv and .md files


def particle_rows(task: str, population: str, study: Particle) -> list[dict[str, Any]]:
    """The rows of OUT.csv for one population: one per role and player; ValueError if the task has
    no such population."""
    numbers = particle_episodes.read_population(population)
    drawn = draw_rows(study.episodes, resamples=1000, seed=study.seed)
    rows = []
    for player, policy in particle_episodes.scripted_players(task, study.seed).items():
        world = ParticleWorld(task, numbers, study.episodes, seed=study.seed)
        returns = particle_episodes.play(world, policy)  # (episodes, types)
        for role, x in zip(TASKS[task].roles, returns.T, strict=True):
            low, high = mean_interval(x, drawn)
            row = {"task": task, "population": population, "role": role, "player": player}
            rows.append(row | {"mean": x.mean(), "low": low, "high": high, "episodes": len(x)})
    return rows


def particle(study: Particle) -> None:
    """Play all tasks and populations, then write OUT.csv and OUT.md."""
    if not study.tasks:
        raise UsageError("--tasks names none.")
    check_out(study.out)
    rows = []
    for task in study.tasks:
        known = task in TASKS and (study.populations or POPULATIONS.get(task))
        if not known:
            todo = "name --populations, too" if task in TASKS else f"there are {', '.join(TASKS)}"
            raise UsageError(f"--tasks {task}: {todo}.")
        for population in known:
            try:
                rows += particle_rows(task, population, study)
            except ValueError as error:
                raise UsageError(str(error)) from None
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        place = (row["task"], row["population"], row["role"])
        line = lines.setdefault(place, dict(zip(("world", "population", "who"), place)))
        line[row["player"]] = f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    by_players: dict[tuple, list[dict]] = {}  # tasks with the same players share a table
    for line in lines.values():
        by_players.setdefault(tuple(line), []).append(line)
    text = "\n".join(markdown_table(own) for own in by_players.values())
    finish(study.out, text, rows)


# --- Battles --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Battles:
    """Win rates and returns of scripted agents in battles, per scenario and team size."""

    scenarios: Annotated[tuple[str, ...], MinLen(1)] = ("sz", "csz", "mmm")  # to play
    team_sizes: Annotated[tuple[Positive, ...], MinLen(1)] = (3, 4, 5, 6, 7, 8)  # to play with
    episodes: Positive = 2048  # episodes per script, scenario and team size
    seed: Seed = 1  # seed of battles and scripts
    enemy_ai: EnemyAI = "sticky"  # script of the simulator's enemies
    backend: Literal["sim", "sc2"] = "sim"  # our simulator, or StarCraft II (docs/starcraft.md)
    num_envs: Positive = 4  # with --backend sc2: parallel games
    game_version: str = ""  # with --backend sc2: e.g. 4.10.0; default: newest installed


def new_battles(study: Battles, scenario: str, size: int) -> Any:
    """Battles for all episodes at once in the simulator, for --num-envs games in StarCraft II."""
    number, options = study.episodes, {"enemy_ai": study.enemy_ai}
    if study.backend == "sc2":
        number, options = study.num_envs, {"game_version": study.game_version or None}
    return make_battles(study.backend, scenario, (size,), number, study.seed, once=True, **options)


def play_all(study: Battles, scenario: str, size: int) -> dict[str, dict[str, float]]:
    """{"sz 3 focus": figures} of all scripts. Episodes in which StarCraft II failed count as not
    won, as in the scripts' evaluations; their number is printed to standard error."""
    rows, battles = {}, new_battles(study, scenario, size)
    try:
        for name, policy in combat_episodes.scripted_policies(study.seed).items():
            battles.seed(study.seed)  # all scripts get the same teams and places
            episodes, before = [], sum(getattr(battles, "lost", ()))
            while len(episodes) < study.episodes:
                episodes += combat_episodes.play(battles, policy)
            rows[who := f"{scenario} {size} {name}"] = combat_episodes.summarise(
                episodes[: study.episodes]
            )
            if lost := sum(getattr(battles, "lost", ())) - before:
                print(f"{who}: {lost} episodes lost to a failing game", file=sys.stderr)
    finally:
        getattr(battles, "close", lambda: None)()
    return rows


def combat(study: Battles) -> None:
    """Print a table per scenario. UsageError for options that do not fit the backend."""
    if study.backend == "sc2" and study.enemy_ai != "sticky":
        raise UsageError("--enemy-ai is the simulator's: StarCraft II has its own.")
    if study.backend == "sim" and study.game_version:
        raise UsageError("--game-version is StarCraft II's: it needs --backend sc2.")
    for scenario in study.scenarios:
        rows = {}
        for size in study.team_sizes:
            try:
                rows |= play_all(study, scenario, size)
            except (ValueError, BattleError) as error:
                raise UsageError(str(error)) from None
        print(combat_episodes.table(rows), flush=True)


# --- Resource Collection --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collection:
    """Returns of scripted agents in Resource Collection, per team size."""

    team_sizes: Annotated[tuple[Positive, ...], MinLen(1)] = (3, 4, 5, 6, 7, 8)  # to play with
    episodes: Positive = 512  # episodes per script and team size
    seed: Seed = 1  # seed of worlds and scripts


def still(world: ResourceCollection) -> torch.Tensor:
    """A script whose agents stay where they start, around home, and touch invaders that pass."""
    return torch.where(world.snapshot.present, STAY, NOOP)


def collection(study: Collection) -> None:
    """Print a table with a line per team size and script."""
    rows = {}
    for size in study.team_sizes:
        try:
            worlds = ResourceCollection((size,), study.episodes, study.seed, once=True)
        except ValueError as error:
            raise UsageError(str(error)) from None
        scripts = {"still": still} | resource_collection.scripted_policies(study.seed)
        for name, policy in scripts.items():
            worlds.seed(study.seed)  # all scripts get the same teams and places
            played = resource_collection.play(worlds, policy)
            rows[f"{size} {name}"] = resource_collection.summarise(played)
    print(resource_collection.table(rows))


# --- Main -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    torch.set_num_threads(1)
    commands = {
        "meltingpot": meltingpot,
        "particle": particle,
        "combat": combat,
        "collection": collection,
    }
    return run_subcommand(commands, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
