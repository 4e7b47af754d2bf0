"""Benchmarks: the speed of worlds, of updates and of whole training, next to other libraries.

    python experiments/bench.py meltingpot                    worlds, training, memory of a rollout
    python experiments/bench.py scenarios --episodes 10       evaluation with scripted bots
    python experiments/bench.py particle                      worlds next to mpe2, VMAS and JaxMARL
    python experiments/bench.py combat                        battles next to SMAX and SMAClite
    python experiments/bench.py peers                         all worlds next to all other libraries
    python experiments/bench.py mra                           an update cycle, and returns over time
    python experiments/bench.py refil                         one update, next to plain learners
    python experiments/bench.py mipi                          one update, next to REFIL
    python experiments/bench.py collaq                        one update, next to REFIL and AQMIX
    python experiments/bench.py ranks                         one process and two, under torchrun
    python experiments/bench.py trainings --device cuda       every script's training on a device
    python experiments/bench.py scale --device cuda           BiDist with more worlds; all-reduces
    python experiments/bench.py kernels --device cuda         what a minibatch of BiDist runs there
    python experiments/bench.py all --device cuda             everything a device affects, briefly
    python experiments/bench.py zoo                           evaluates the zoo's policies again
    pip install -r requirements-bench.txt                     the other libraries, if you want them

All commands print Markdown. The two sides of a ratio are measured in the same run. Run nothing else
on the machine meanwhile. `SUBCOMMAND --help` has the options and explains each table.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import Above, Count, Positive, Seed, UsageError

import numpy as np
import torch
import tyro
from annotated_types import Interval, MinLen

from envs.meltingpot import tile_kernels
from envs.meltingpot.scenarios import (
    PAPER,
    RANDOM,
    Scenarios,
    choose_bots,
    choose_scenarios,
    get_plan,
    play_scenarios,
    short,
)
from envs.meltingpot.tile_tensors import TileTables
from envs.meltingpot.tiles import Observation, Palette, WorldError
from envs.meltingpot.worlds import Engine, get_spec, import_meltingpot, quiet
from envs.particle import episodes as particle_episodes
from envs.particle.worlds import (
    TASKS,
    Bodies,
    Game,
    Outcome,
    ParticleWorld,
    Task,
    agent_distances,
    landmark_distances,
)
from envs.particle.worlds import Observation as ParticleObservation
from envs.smac.combat import Combat
from experiments import zoo
from experiments.runs import (
    ROOT,
    is_signal,
    load_script,
    run_child,
    run_subcommand,
    script_args,
    script_file,
)

CPU = torch.device("cpu")


def table_head(*titles: str) -> None:
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)


def table_line(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@contextlib.contextmanager
def held_to(cores: int) -> Iterator[None]:
    """Context in which this process uses only so many cores (no effect on macOS)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_of_them)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


# --- Melting Pot ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeltingPot:
    """The speed of Melting Pot's worlds and of training in them.

    Worlds: environment steps per second of one process. Our engine reader (tile ids) and the
    official wrapper (pixels) take turns with the same actions; "bare" is the ratio for a reader
    that only advances the engine and draws the images; resets: ours, then official. Training: a
    script in one process with tile ids and with --plain (pixels), in seconds for worlds, acting and
    learning; PP and RPM begin with the past actors of one rollout. Profile: where the
    time of an iteration with tile ids goes; of it nothing is measured on a GPU. Memory: the images
    of a rollout as tile ids and as pixels.
    """

    # substrates to measure
    substrates: Annotated[tuple[str, ...], tyro.conf.Positional] = PAPER
    # tables to print
    parts: tuple[Literal["worlds", "training", "profile", "memory"], ...] = (
        "worlds",
        "training",
        "memory",
    )
    # script of training and profile
    script: Literal["mappo", "bidist", "randnet", "opre", "pp", "rpm"] = "mappo"
    rounds: Positive = 7  # timed turns of each world; in training, iterations with tile ids
    steps: Positive = 300  # environment steps per turn
    num_envs: Positive = 16  # parallel worlds in training; 16 x 200 steps are the paper's batch
    num_workers: Count = 0  # processes that step worlds in training; 0: one per core
    num_threads: Positive = 1  # torch's threads in training
    device: Literal["cpu", "cuda"] = "cpu"  # device of acting and learning
    amp: bool = False  # train the critic in bf16, with tile ids and with --plain
    plain_rounds: Count = 3  # iterations with --plain, which are slow; 0 leaves them out
    flags: str = ""  # more flags of the script, as --flags="--k-d 1"


def steps_per_second(world: Any, actions: np.ndarray) -> float:
    """Speed of the steps of a world. Where an episode ends the next begins; resets do not count."""
    seconds = 0.0
    for action in actions:
        began = time.perf_counter()
        world.step(action)
        seconds += time.perf_counter() - began
        if world.over:
            world.reset()
    return len(actions) / seconds


class Ours:
    """One world whose engine is read directly in this process; images are tile ids."""

    def __init__(self, spec: Any, seed: int):
        self.spec, self.seed, self.palette = spec, seed, Palette.private()
        players = spec.num_agents
        tile_ids = np.zeros((players, *spec.grid), np.uint16)
        features = np.zeros((players, spec.num_features), np.float32)
        self.out = Observation(tile_ids, np.zeros(spec.world_grid, np.uint16), features)
        self.reward, self.pick_ups = np.zeros(players), np.zeros(players, np.int64)
        self.reset()

    def reset(self) -> None:
        self.seed += 1
        self.engine = Engine(self.spec, (self.seed,))

    def step(self, actions: np.ndarray) -> None:
        self.over = not self.engine.step(actions)
        self.engine.read_rewards(self.reward, self.pick_ups)
        self.engine.observe(self.palette, self.out)


class Bare(Ours):
    """A world that only advances the engine and lets it draw all images, without reading them."""

    def step(self, actions: np.ndarray) -> None:
        self.over = not self.engine.step(actions)
        for name in (*self.engine.rgb, "WORLD.RGB"):
            self.engine.lab.observation(name)


class Official:
    """One world behind Melting Pot's official wrappers; images are pixels."""

    def __init__(self, spec: Any):
        import_meltingpot()
        from meltingpot import substrate

        with quiet():
            self.env = substrate.build(spec.substrate, roles=spec.roles)
        self.reset()

    def reset(self) -> None:
        with quiet():
            self.env.reset()

    def step(self, actions: np.ndarray) -> None:
        self.over = self.env.step(actions).last()


def bench_worlds(bench: MeltingPot) -> None:
    table_head(
        "substrate", "players", "ours, with ids", "official, without", "ratio", "bare", "resets"
    )
    for name in bench.substrates:
        spec, rng = get_spec(name), np.random.default_rng(0)
        worlds = Ours(spec, 0), Official(spec), Bare(spec, 0)
        speeds, resets = ([], [], []), ([], [], [])
        for number in range(bench.rounds + 1):
            actions = rng.integers(0, spec.num_actions, (bench.steps, spec.num_agents))
            turn = []
            for world, reset in zip(worlds, resets):
                began = time.perf_counter()
                world.reset()  # a new episode for each turn
                reset.append(time.perf_counter() - began)
                turn.append(steps_per_second(world, actions))
            if number:  # the first turn warms up
                for speed, measured in zip(speeds, turn):
                    speed.append(measured)
        ratios = [a / b for a, b, _ in zip(*speeds)]
        limits = [a / b for _, b, a in zip(*speeds)]
        ours, official, _ = (statistics.median(speed) for speed in speeds)
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        bare = f"{statistics.median(limits):.2f}"
        waits = ", ".join(f"{1000 * statistics.median(x):.0f} ms" for x in resets[:2])
        table_line(name, spec.num_agents, f"{ours:,.0f}", f"{official:,.0f}", ratio, bare, waits)


def bench_training(bench: MeltingPot) -> None:
    table_head("substrate", "kind", "steps/s", "worlds", "acting", "learning", "ids over pixels")
    for name in bench.substrates:
        speed = {}
        for kind, rounds in (("ids", bench.rounds), ("plain", bench.plain_rounds)):
            if rounds:
                script, args = training_args(bench, name, kind)
                seconds = training_seconds(script, args, bench, rounds)
                steps = args.rollout_steps * args.num_envs
                speed[kind] = steps / sum(seconds.values())
                cells = [f"{x:.2f} s" for x in seconds.values()]
                ratio = f"{speed['ids'] / speed['plain']:.1f}" if "plain" in speed else ""
                table_line(name, kind, f"{speed[kind]:,.0f}", *cells, ratio)


class Timed:
    """Worlds whose step() is timed; wait() first blocks until the device has done pending work."""

    def __init__(self, envs: Any, wait: Callable[[], None]):
        self.envs, self.wait, self.seconds = envs, wait, 0.0

    def step(self, actions: np.ndarray) -> Any:
        self.wait()
        began = time.perf_counter()
        result = self.envs.step(actions)
        self.seconds += time.perf_counter() - began
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.envs, name)


def training_args(bench: MeltingPot, name: str, kind: str) -> tuple[Any, Any]:
    """The script's module and its Args; kind: "ids" (tile ids) or "plain" (pixels)."""
    method = "bidist_mappo" if bench.script == "bidist" else bench.script
    script = load_script(f"{method}_meltingpot")
    flags = ["--substrate", name, "--num-envs", str(bench.num_envs), "--device", bench.device]
    flags += ["--num-workers", str(bench.num_workers), "--worker-timeout", "120"]
    flags += ["--plain"] * (kind == "plain") + ["--amp"] * bench.amp
    return script, script_args(script, [*flags, *bench.flags.split()])


def full_memory(script: Any, args: Any, agent: Any) -> list[Any]:
    """[memory] of PP and RPM with the past actors of a rollout, else []."""
    if not hasattr(script, "new_memory"):
        return []
    memory = script.new_memory(args)
    has_ranks = hasattr(script, "remember")  # RPM's
    for _ in range(args.policies_per_rollout):
        memory.append(agent.actor, *[0.0] * has_ranks)
    return [memory]


def training_seconds(script: Any, args: Any, bench: MeltingPot, rounds: int) -> dict[str, float]:
    """Seconds per iteration of training for "worlds", "acting" and "learning"."""
    distils = hasattr(script, "distill")
    torch.set_num_threads(bench.num_threads)
    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    parts: dict[str, list[float]] = {"worlds": [], "acting": [], "learning": []}
    rngs = [torch.Generator().manual_seed(k) for k in range(2)]  # the second is the method's
    if distils:
        rounds = max(rounds, 2 * args.k_d)  # one distillation of each kind
    with script.make_envs(args, args.num_envs, 1) as worlds:
        agent = script.Agent(args, worlds, torch.device(bench.device))
        memory = full_memory(script, args, agent)
        drawn = rngs if distils or memory else rngs[:1]
        state, envs = script.new_state(agent, args.num_envs), Timed(worlds, wait)
        worlds.reset()
        for number in range(rounds + 1):
            envs.seconds, began = 0.0, time.perf_counter()
            if hasattr(script, "draw_psi"):  # RandNet
                agent.psi = script.draw_psi(args, rngs[1])
            batch, state = script.collect(args, envs, agent, *memory, state, *drawn)
            wait()
            collected = time.perf_counter()
            batch, state = script.prepare(args, agent, batch, state)
            script.update(args, agent, batch, rngs[0])
            phase = script.distillation_phase(args, number) if distils else None
            if phase:
                _, state = script.distill(args, agent, batch, state, phase=phase, rng=rngs[1])
            wait()
            if number:  # the first iteration warms up
                parts["worlds"].append(envs.seconds)
                parts["acting"].append(collected - began - envs.seconds)
                parts["learning"].append(time.perf_counter() - collected)
    centre = statistics.mean if distils else statistics.median  # a median would miss distillation
    return {part: centre(values) for part, values in parts.items()}


class Stopwatch:
    """Seconds inside wrapped functions, by the path of wrapped functions that are running."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.running: list[str] = []

    def wrap(self, owner: Any, attribute: str, name: str) -> Any:
        """A context in which calls of owner.attribute are timed; "{net}" in name: of argument 2."""
        function = getattr(owner, attribute)

        def timed(*given: Any, **named: Any) -> Any:
            own = name.format(net=type(given[1]).__name__ if len(given) > 1 else "")
            self.running.append(own)
            path, began = " > ".join(self.running), time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self.seconds[path] += time.perf_counter() - began
                self.calls[path] += 1
                self.running.pop()

        return mock.patch.object(owner, attribute, timed)


def bench_profile(bench: MeltingPot) -> None:
    """Print the share of each part of an iteration above .5 %; "a > b" is b within a."""
    table_head("substrate", "part", "seconds per iteration", "share")
    for name in bench.substrates:
        script, args = training_args(bench, name, "ids")
        training_seconds(script, args, bench, 1)  # warms up
        watch = Stopwatch()
        places = [(script, part, part) for part in ("collect", "prepare", "update", "distill")]
        places += [(Timed, "step", "worlds"), (script, "act", "acting")]
        places += [(script, "descend", "backward and Adam, {net}")]
        places += [(script.Actor, "forward", "Actor"), (script.Critic, "forward", "Critic")]
        places += [(TileTables, "from_tables", "tables")]
        places += [(tile_kernels, "find_pairs", "different windows")]
        places += [(tile_kernels, f"_sum_tiles{x}", "conv2") for x in ("", "_backward")]
        places += [(tile_kernels, f"_multiply{x}", "linear") for x in ("", "_backward")]
        with contextlib.ExitStack() as patches:
            for place in places:
                if hasattr(*place[:2]):
                    patches.enter_context(watch.wrap(*place))
            training_seconds(script, args, bench, bench.rounds)
        whole = sum(x for path, x in watch.seconds.items() if ">" not in path)
        for path, seconds in sorted(watch.seconds.items()):
            if seconds > 0.005 * whole:
                cells = f"{seconds / watch.calls['collect']:.3f}", f"{seconds / whole:.1%}"
                table_line(name, path, *cells)


def bench_memory(bench: MeltingPot) -> None:
    table_head("substrate", "views: ids", "pixels", "ratio", "all images: ids", "pixels", "ratio")
    for name in bench.substrates:
        spec, states = get_spec(name), 200 * bench.num_envs
        views = states * spec.num_agents * np.prod(spec.grid)
        every = views + states * np.prod(spec.world_grid)
        cells = []
        for tiles in (views, every):
            ids, pixels = 2 * tiles, 192 * tiles  # uint16, against 8 x 8 x 3 bytes
            cells += [f"{ids / 1e6:.1f} MB", f"{pixels / 1e6:,.0f} MB", f"{pixels / ids:.0f}"]
        table_line(name, *cells)


def processor() -> str:
    """The model name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def check_substrates(substrates: Iterable[str]) -> None:
    """UsageError for an unknown substrate, before anything is measured."""
    for name in substrates:
        try:
            get_spec(name)
        except ValueError as error:
            raise UsageError(str(error)) from None


def meltingpot(bench: MeltingPot) -> None:
    """Print the tables that MeltingPot describes."""
    check_device(bench)
    if {"worlds", "memory"} & {*bench.parts}:  # training also knows the toy and your own worlds
        check_substrates(bench.substrates)
    gpu = f", {torch.cuda.get_device_name()}" if bench.device == "cuda" else ""
    print(f"{processor()}{gpu}, torch {torch.__version__}, {bench}\n")
    tables = {
        "worlds": bench_worlds,
        "training": bench_training,
        "profile": bench_profile,
        "memory": bench_memory,
    }
    for name in bench.parts:
        tables[name](bench)
        print()


# --- Scenarios ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bots:
    """The speed of evaluation in Melting Pot's scenarios with scripted bots.

    First table, a line per substrate: whole episodes of all its scenarios with a network in the
    focal seats, as in an evaluation; the time includes the first builds of the engines. Second
    table, a line per scenario: environment steps per second, with the bots and with random players
    in their seats; the ratio shows the cost of the bots.
    """

    substrates: tuple[str, ...] = PAPER  # substrates to measure
    scenarios: str = "all"  # scenarios to play, written as in the scripts' --eval-scenarios
    episodes: Count = 10  # episodes per scenario in the first table; 0 leaves the table out
    steps: Count = 200  # steps per world in the second table; 0 leaves the table out
    num_envs: Positive = 16  # parallel worlds
    num_workers: Count = 0  # processes that step worlds; 0: one per core
    seed: Seed = 1  # seed of worlds and players


def time_whole(bench: Bots, substrate: str) -> None:
    """Time whole episodes of a substrate's scenarios and print a line of the first table."""
    script, rng = load_script("mappo_meltingpot"), np.random.default_rng(bench.seed)
    names = choose_scenarios(substrate, bench.scenarios, "scripted")
    args = script.Args(substrate=substrate, num_envs=1, num_workers=1)
    with script.make_envs(args, 1, bench.seed) as envs:
        agent = script.Agent(args, envs, CPU)

    def new_player(envs: Any) -> Any:
        return script.NetPlayer(agent.actor, script.Sprites(envs, agent.device), bench.seed)

    began = time.perf_counter()
    played = play_scenarios(
        names,
        "scripted",
        new_player,
        episodes=bench.episodes,
        num_envs=bench.num_envs,
        rng=rng,
        id_roles=agent.spec.roles,
        num_workers=bench.num_workers,
    )
    seconds = time.perf_counter() - began
    steps = sum(result.length for results in played.values() for result in results)
    table_line(substrate, len(names), steps, f"{seconds:.0f}", f"{steps / seconds:.0f}")


def scenario_speed(bench: Bots, plan: Any) -> float:
    """Environment steps per second of one scenario plan, with random focal players."""
    options = {"num_workers": bench.num_workers, "timeout": 60.0}
    with Scenarios([plan], bench.num_envs, bench.seed, "scripted", **options) as envs:
        rng, shape = np.random.default_rng(bench.seed), (bench.num_envs, envs.spec.num_agents)
        envs.reset()
        for _ in range(20):
            envs.step(rng.integers(0, envs.spec.num_actions, shape))
        began = time.perf_counter()
        for _ in range(bench.steps):
            envs.step(rng.integers(0, envs.spec.num_actions, shape))
        return bench.num_envs * bench.steps / (time.perf_counter() - began)


def check_scenarios(bench: Bots) -> None:
    """Raise UsageError, ValueError or WorldError if some scenario cannot be played here."""
    for substrate in bench.substrates:
        get_spec(substrate)
        names = choose_scenarios(substrate, bench.scenarios, "scripted")
        if not names:
            raise UsageError(f"{substrate} has no scenarios with scripted bots.")
        choose_bots([get_plan(name) for name in names], "scripted")


def scenarios(bench: Bots) -> None:
    """Print the tables that Bots describes."""
    try:
        check_scenarios(bench)
    except (ValueError, WorldError) as error:
        raise UsageError(str(error)) from None
    if bench.episodes:
        print(f"All scenarios, {bench.episodes} whole episodes each:\n")
        table_head("substrate", "scenarios", "counted steps", "seconds", "steps/s")
        for substrate in bench.substrates:
            time_whole(bench, substrate)
    if not bench.steps:
        return
    print(f"\nOne scenario, {bench.num_envs} worlds, random focal players:\n")
    table_head("scenario", "focal / bots", "steps/s", "with random bots", "ratio")
    for substrate in bench.substrates:
        for name in choose_scenarios(substrate, bench.scenarios, "scripted"):
            plan = get_plan(name)
            bare_plan = plan._replace(bots=tuple(names and (RANDOM,) for names in plan.bots))
            ours, bare = scenario_speed(bench, plan), scenario_speed(bench, bare_plan)
            bots = sum(bool(names) for names in plan.bots)
            seats = f"{len(plan.bots) - bots} / {bots}"
            cells = (f"{ours:.0f}", f"{bare:.0f}", f"{ours / bare:.2f}")
            table_line(f"{substrate} {short(name)}", seats, *cells)


# --- Particle worlds ------------------------------------------------------------------------------


OURS = (  # tasks and populations of the second table
    ("treasure", (3, 6, 12, 24, 48)),
    ("resource", (6, 9, 12, 15)),
    ("pacman", ((4, 2), (6, 3), (8, 4), (2, 8))),
)


@dataclasses.dataclass(frozen=True)
class Particle:
    """The speed of the particle worlds next to mpe2, VMAS and JaxMARL.

    First table: simple_spread, the task that all libraries have (defined in this file for our
    engine): N agents of radius .15 and N landmarks. The reward counts the distance of each landmark
    to its nearest agent, and collisions. An agent observes itself, all landmarks and all others.
    Actions are random and drawn in advance. The fastest of several numbers of parallel worlds
    counts (mpe2 has one world). Second table: our three tasks. Figures are millions of agent-steps
    per second. Episodes have 20 steps (ours) or 25 (JaxMARL, mpe2); in VMAS they do not end.
    """

    numbers: tuple[Positive, ...] = (3, 6, 12, 24, 48)  # numbers of agents, N, in the first table
    worlds: tuple[Positive, ...] = (64, 512, 4096)  # parallel worlds to try; the fastest counts
    seconds: Above = 2.0  # least duration of each measurement, in seconds
    cores: Positive = 1  # CPU cores that the process may use
    device: Literal["cpu", "cuda"] = "cpu"  # device of our worlds and of VMAS's
    peers: bool = True  # measure the other libraries as well
    own: bool = True  # print the second table


def spread_outcome(game: Game, bodies: Bodies) -> Outcome:
    """simple_spread's reward: -0.5 (sum over landmarks of the nearest agent's distance + hits)."""
    far = landmark_distances(game, bodies)
    near = agent_distances(bodies) < 2 * game.radius[0]
    hits = near.to(far.dtype).sum(1) - 1  # -1: an agent is always near itself
    reward = -0.5 * far.amin(0).sum(0) - 0.5 * hits
    return Outcome(reward, bodies.alive, torch.zeros_like(far[0], dtype=torch.bool))


def spread_observation(game: Game, bodies: Bodies) -> ParticleObservation:
    """simple_spread's observation: own velocity, position; landmarks, agents relative to it."""
    p, v = bodies.position, bodies.velocity
    landmarks = (bodies.landmarks[:, None] - p[:, :, None]).transpose(1, 2)  # (2, L, N, B)
    agents = (p[:, None] - p[:, :, None]).transpose(1, 2)
    own = torch.cat((v, p, landmarks.flatten(0, 1), agents.flatten(0, 1)))
    return ParticleObservation(
        own.permute(2, 1, 0), p.clone().permute(2, 1, 0), *2 * (bodies.alive.T,)
    )


SPREAD = Task(
    ("agent",),
    lambda N: dict(
        radius=(0.15,),
        force=(5.0,),
        top_speed=(math.inf,),
        landmark_radius=(0.05,) * N,
        nearest=N,
    ),
    spread_outcome,
    spread_observation,
)


def agent_rate(
    step: Callable[[], object], per_step: int, seconds: float, wait=lambda: None
) -> float:
    """Million agent-steps per second of step(), `per_step` a call. The warm-up includes a reset."""
    for _ in range(30):
        step()
    wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            step()
        wait()
        count += 10
    return count * per_step / (time.perf_counter() - began) / 1e6


def our_particles(task: str, population, worlds: int, compiled: bool, bench: Particle) -> float:
    """Million agent-steps per second of our worlds; NaN if they cannot be compiled here."""
    TASKS["spread"] = SPREAD
    world = ParticleWorld(task, population, worlds, bench.device, compiled=compiled)
    world.reset()
    shape = (worlds, world.num_agents)
    actions = torch.randint(0, 5, (100, *shape), device=bench.device)
    turn = itertools.cycle(actions)
    wait = torch.cuda.synchronize if bench.device != "cpu" else lambda: None
    world.step(next(turn))
    if compiled and world._advance.call is world._advance.plain:
        return math.nan
    return agent_rate(lambda: world.step(next(turn)), math.prod(shape), bench.seconds, wait)


def mpe2(N: int, worlds: int, bench: Particle) -> float:
    """Million agent-steps per second of simple_spread in mpe2 (Farama's MPE), with one world."""
    from mpe2 import simple_spread_v3

    env = simple_spread_v3.parallel_env(N=N, max_cycles=25)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    agents = list(env.possible_agents)
    draws = [dict(zip(agents, map(int, rng.integers(0, 5, N)))) for _ in range(100)]
    turn = itertools.cycle(draws)

    def step() -> None:
        _, _, _, truncated, _ = env.step(next(turn))
        if all(truncated.values()):
            env.reset()

    return agent_rate(step, N, bench.seconds)


def vmas(N: int, worlds: int, bench: Particle) -> float:
    """Million agent-steps per second of simple_spread in VMAS."""
    import vmas as library

    how = dict(continuous_actions=False, n_agents=N, device=bench.device)
    env = library.make_env("simple_spread", num_envs=worlds, **how)
    env.reset()
    actions = torch.randint(0, 5, (100, N, worlds, 1), device=bench.device)
    turn = itertools.cycle(actions)
    wait = torch.cuda.synchronize if bench.device != "cpu" else lambda: None
    return agent_rate(lambda: env.step(list(next(turn))), worlds * N, bench.seconds, wait)


def jaxmarl(N: int, worlds: int, bench: Particle) -> float:
    """Million agent-steps per second of simple_spread in JaxMARL, compiled over all worlds."""
    import jax
    from jaxmarl import make

    env = make("MPE_simple_spread_v3", num_agents=N, num_landmarks=N, action_type="Discrete")
    key = jax.random.PRNGKey(0)
    _, state = jax.vmap(env.reset)(jax.random.split(key, worlds))
    draws = jax.random.randint(key, (100, N, worlds), 0, 5)
    turn = itertools.cycle([dict(zip(env.agents, draw)) for draw in draws])
    one = jax.jit(jax.vmap(env.step))
    keys, last = jax.random.split(key, worlds), [state]

    def step() -> None:
        out = one(keys, last[0], next(turn))
        last[0] = out[1]

    return agent_rate(step, worlds * N, bench.seconds, lambda: jax.block_until_ready(last[0]))


def fastest(measure: Callable[[int], float], worlds: tuple[int, ...]) -> float:
    """The largest measure(number) over these numbers of worlds; NaN if a library is missing."""
    found = [math.nan]
    for number in worlds:
        try:
            found.append(measure(number))
        except ImportError:
            return math.nan
        except (RuntimeError, MemoryError) as error:  # probably too many worlds for the memory
            print(f"({number} worlds: {str(error)[:60]})", file=sys.stderr)
    return float(np.nanmax(found))


def or_not_run(x: float) -> str:
    return "not run" if math.isnan(x) else f"{x:.3g}"


def particle(bench: Particle) -> None:
    """Print the tables that Particle describes."""
    check_device(bench)
    torch.set_num_threads(bench.cores)
    with held_to(bench.cores):
        time_spread(bench)
        if bench.own:
            time_our_particles(bench)


def time_spread(bench: Particle) -> None:
    """Print the first table, simple_spread in all libraries."""
    print(f"simple_spread, M agent-steps/s, {bench.cores} core(s), {bench.device}\n")
    ours = ("ours, eager", "ours, compiled", "compiled / fastest peer")
    table_head("N", "mpe2", "VMAS", "JaxMARL", *ours)
    for N in bench.numbers:
        peers = [math.nan] * 3
        if bench.peers:
            peers = [
                fastest(lambda b, f=f, N=N: f(N, b, bench), b)
                for f, b in ((mpe2, (1,)), (vmas, bench.worlds), (jaxmarl, bench.worlds))
            ]
        eager, fast = (
            fastest(lambda b, c=c, N=N: our_particles("spread", N, b, c, bench), bench.worlds)
            for c in (False, True)
        )
        ratio = fast / np.nanmax(peers) if not np.isnan(peers).all() else math.nan
        table_line(N, *map(or_not_run, (*peers, eager, fast, ratio)))


def time_our_particles(bench: Particle) -> None:
    """Print the second table, our own tasks."""
    print()
    table_head("world", "population", "eager", "compiled")
    for task, populations in OURS:
        for population in populations:
            both = [
                fastest(
                    lambda b, c=c, p=population, t=task: our_particles(t, p, b, c, bench),
                    bench.worlds,
                )
                for c in (False, True)
            ]
            table_line(task, population, *map(or_not_run, both))


# --- Battles --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Battles:
    """The speed of our battles next to SMAX (JaxMARL) and SMAClite, 8 against 8.

    Actions are random available ones. Drawing them is not timed; observations, masks and new
    episodes are. Teams of SZ (ours) or 3s5z (the others) fight scripted enemies. Figures are
    environment steps per second (battles x steps / seconds). A step is 8 frames of the game in ours
    and in SMAX. SMAClite can only be installed from its repository.
    """

    battles: tuple[Positive, ...] = (1, 64, 1024)  # numbers of parallel battles, a line each
    scenario: str = "sz"  # scenario of our battles
    seconds: Above = 3.0  # least duration of each measurement, in seconds
    cores: Positive = 1  # CPU cores that the process may use
    threads: Positive = 1  # threads of our simulator
    peers: bool = True  # measure the other libraries as well


def battle_rate(choose: Callable, step: Callable, battles: int, seconds: float) -> float:
    """Environment steps per second of step(actions); the time of choose() is not counted."""
    for _ in range(5):
        step(choose())
    spent, count = 0.0, 0
    while spent < seconds:
        actions = choose()
        began = time.perf_counter()
        step(actions)
        spent += time.perf_counter() - began
        count += 1
    return battles * count / spent


def our_battles(bench: Battles, number: int) -> float:
    battles = Combat(bench.scenario, (8,), number, threads=bench.threads)
    battles.reset()
    rng, avail = np.random.default_rng(0), battles.obs.avail.numpy()
    choose = lambda: (rng.random(avail.shape, np.float32) * avail).argmax(-1)  # noqa: E731
    return battle_rate(choose, battles.step, number, bench.seconds)


def smax(bench: Battles, number: int) -> float | None:
    try:
        import jax
        from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario
    except ImportError:
        return None
    env = HeuristicEnemySMAX(scenario=map_name_to_scenario("3s5z"), attack_mode="closest")
    split = lambda key: jax.random.split(key, number)  # noqa: E731
    _, state = jax.jit(jax.vmap(env.reset))(split(jax.random.PRNGKey(0)))
    step = jax.jit(jax.vmap(env.step))
    available = jax.jit(jax.vmap(env.get_avail_actions))
    world: dict[str, Any] = {"state": state, "key": jax.random.PRNGKey(1)}

    @jax.jit
    def draw(key, avail):
        keys = jax.random.split(key, len(avail))
        pick = lambda k, a: jax.random.categorical(k, jax.numpy.log(a + 1e-9))  # noqa: E731
        return {name: pick(k, a) for k, (name, a) in zip(keys, avail.items())}

    def choose():
        world["key"], key = jax.random.split(world["key"])
        avail = available(world["state"])
        return jax.block_until_ready((split(world["key"]), draw(key, avail)))

    def act(chosen):
        keys, actions = chosen
        _, world["state"], *rest = jax.block_until_ready(step(keys, world["state"], actions))

    return battle_rate(choose, act, number, bench.seconds)


def smaclite(bench: Battles) -> float | None:
    """Steps per second of a single SMAClite battle (it has no batches); None if not installed."""
    try:
        import gymnasium
        import smaclite  # noqa: F401
    except ImportError:
        return None
    env = gymnasium.make("smaclite/3s5z-v0")
    env.reset()
    rng = np.random.default_rng(0)

    def choose():
        avail = np.asarray(env.unwrapped.get_avail_actions())
        return (rng.random(avail.shape) * avail).argmax(-1).tolist()

    def act(actions):
        _, _, over, late, _ = env.step(actions)
        if over or late:
            env.reset()

    return battle_rate(choose, act, 1, bench.seconds)


def combat(bench: Battles) -> None:
    """Print the table that Battles describes."""
    with held_to(bench.cores):
        print(f"{bench.cores} core(s), {bench.threads} thread(s) of ours, {bench.scenario}\n")
        table_head("battles", "ours", "SMAX", "SMAClite", "ours / SMAX", "ours / SMAClite")
        lite = smaclite(bench) if bench.peers else None
        for number in bench.battles:
            mine = our_battles(bench, number)
            peers = (smax(bench, number) if bench.peers else None, lite)
            cells = ["not installed" if x is None else f"{x:,.0f}" for x in peers]
            cells += ["-" if x is None else f"{mine / x:,.1f}" for x in peers]
            table_line(number, f"{mine:,.0f}", *cells)


# --- All worlds and all other libraries -----------------------------------------------------------

PEERS = ("dm-meltingpot", "mpe2", "vmas", "jaxmarl", "smaclite", "jax", "torch", "numba", "numpy")


@dataclasses.dataclass(frozen=True)
class Peers:
    """The speed of our three kinds of worlds next to other libraries, in one run.

    Tables of other subcommands: Melting Pot's official wrapper (`meltingpot`); mpe2, VMAS, JaxMARL
    (`particle`); SMAX, SMAClite (`combat`). A missing library is left out; without Melting Pot
    so is our reader of its engine. Takes some minutes.
    """

    # substrates of Melting Pot
    substrates: tuple[str, ...] = ("coins", "chicken_in_the_matrix__repeated")
    numbers: tuple[Positive, ...] = (3, 12, 48)  # numbers of agents in particle worlds
    worlds: tuple[Positive, ...] = (64, 512, 4096)  # particle worlds to try; the fastest counts
    battles: tuple[Positive, ...] = (1, 64, 1024)  # numbers of parallel battles
    seconds: Above = 2.0  # least duration of each measurement, in seconds
    rounds: Positive = 5  # timed turns of our reader and of Melting Pot's wrapper
    steps: Positive = 300  # environment steps per turn in Melting Pot
    cores: Positive = 1  # CPU cores that the process may use


def installed(name: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peers(bench: Peers) -> None:
    """Print versions, then a table for each kind of world."""
    print(f"{processor()}, {bench.cores} core(s), Python {platform.python_version()}\n")
    table_head("library", "version")
    for name in PEERS:
        table_line(name, installed(name))
    print("\nMelting Pot, steps/s of one process\n")
    try:
        import_meltingpot()
    except ModuleNotFoundError as error:
        print(f"Not run, nor is our reader of its engine: {error}")
    else:
        check_substrates(bench.substrates)
        with held_to(bench.cores):
            pot = MeltingPot(substrates=bench.substrates, rounds=bench.rounds, steps=bench.steps)
            bench_worlds(pot)
    print()
    common = {"seconds": bench.seconds, "cores": bench.cores}
    particle(Particle(numbers=bench.numbers, worlds=bench.worlds, own=False, **common))
    print("\nBattles of 8 against 8, steps/s")
    combat(Battles(battles=bench.battles, **common))


# --- MRA ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mra:
    """The speed of MRA's updates, the memory of its replay, and returns over training time.

    First table: CPU milliseconds of one update cycle of the paper's size in resource occupation (K
    = 10 minibatches of 1024 for critic and actor, then phi, psi and xi), on one thread, with the
    plain and the fast form of the networks of pairs; "round" is one minibatch for critic and actor.
    Second table: bytes of a transition in the replay. Third table: returns in new episodes, with z
    drawn from p(z|m), over CPU seconds of training (without compilation and evaluation).
    """

    numbers: tuple[Positive, ...] = (6, 12, 24)  # numbers of agents, N, in the first table
    repeats: Positive = 3  # timed calls per measurement; the fastest counts
    cycles: bool = True  # print the first and the second table
    presets: tuple[str, ...] = ("cpu",)  # presets to train in the third table; none: no table
    populations: tuple[str, ...] = ("6", "9", "12")  # populations to train in the third table
    cpu_seconds: Above = 120.0  # CPU seconds of training in the third table
    every: Above = 15.0  # CPU seconds of training between two lines of the third table
    episodes: Annotated[int, Interval(ge=2)] = 500  # episodes per line and population
    seed: Seed = 1  # seed of training and of the new episodes


KINDS = {"plain": "--plain", "fast": ""}  # forms of the networks of pairs in the first table


def begin_mra(script: Any, flags: str) -> SimpleNamespace:
    """Args, collectors (worlds and replays), agent and generators, made as in train()."""
    args = script_args(script, [*flags.split(), "--device", "cpu"])
    collectors = [script.Collector(args, name, CPU) for name in args.populations]
    agent = script.Agent(args, collectors[0].game, CPU)
    rng = torch.Generator().manual_seed(args.seed)
    latent_rng = script.own_generator(args.seed, stream=1)
    script.begin(args, agent, collectors, latent_rng)
    return SimpleNamespace(
        args=args, collectors=collectors, agent=agent, rng=rng, latent_rng=latent_rng
    )


def cpu_ms(function: Callable[[], Any], repeats: int) -> float:
    """The smallest CPU time of `repeats` calls in milliseconds, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start))
    return min(times[1:])


def time_cycle(script: Any, number: int, kind: str, repeats: int) -> dict[str, float]:
    """CPU milliseconds of a round, of the phi update, of psi and xi, and of a whole cycle."""
    other = 9 if number != 9 else 6
    flags = f"--task resource --populations {number} {other} --buffer-size 20000 {KINDS[kind]}"
    s = begin_mra(script, flags)
    for collector in s.collectors:
        for _ in range(120):
            script.collect(s.agent, collector, s.rng, s.latent_rng)
    first = s.collectors[0]
    view = first.buffer.sample(s.agent, s.rng, s.args.batch_size).view
    once = dataclasses.replace(s.args, inner_steps=1, adapt="no phi, psi and xi")

    def cycle(args: Any) -> None:
        script.update(args, s.agent, first, s.collectors, s.rng, s.latent_rng)

    return {
        "round": cpu_ms(lambda: cycle(once), repeats),
        "phi": cpu_ms(lambda: script.information_update(s.agent, first.game, view, 0), repeats),
        "psi, xi": cpu_ms(
            lambda: script.latent_update(s.args, s.agent, s.collectors, s.latent_rng), repeats
        ),
        "cycle": cpu_ms(lambda: cycle(s.args), repeats),
    }


def cycle_table(script: Any, bench: Mra) -> None:
    table_head("N", "networks of pairs", "round", "phi", "psi, xi", "cycle (K = 10), CPU ms")
    for number in bench.numbers:
        found = {kind: time_cycle(script, number, kind, bench.repeats) for kind in KINDS}
        for kind, times in found.items():
            table_line(number, kind, *(f"{x:.0f}" for x in times.values()))
        whole = {kind: times["cycle"] for kind, times in found.items()}
        print(f"N = {number}: plain / fast {whole['plain'] / whole['fast']:.1f}")


def replay_table(script: Any) -> None:
    print()
    table_head("world", "N", "bytes of a transition")
    for task, names in (("treasure", "3 6 12 24 48"), ("resource", "6 9 12 15 24")):
        s = begin_mra(script, f"--task {task} --populations {names} --buffer-size 1024")
        for collector in s.collectors:
            rows = collector.buffer.rows.values()
            size = sum(x[0].numel() * x.element_size() for x in rows)
            table_line(task, collector.name, size)


def fresh_returns(script: Any, s: SimpleNamespace, bench: Mra) -> list[float]:
    """The mean return of new episodes for each population."""
    found = []
    for collector in s.collectors:
        world = script.make_envs(s.args, collector.name, bench.episodes, bench.seed + 12345)
        rng = torch.Generator().manual_seed(bench.seed)
        z = script.draw_latents(s.agent, world.game, bench.episodes, rng)
        player = script.net_player(s.agent, z, bench.seed)
        found.append(float(particle_episodes.play(world, player).mean()))
    return found


def learn_mra(script: Any, preset: str, bench: Mra, compiled: bool = True) -> None:
    """Train with a preset and print lines of the third table meanwhile."""
    flags = f"--task resource --populations {' '.join(bench.populations)} --preset {preset}"
    flags += f" --seed {bench.seed} {'--compile' if compiled else '--no-compile'}"
    for warm in (True, False):  # the first training compiles and ends after one update
        s = begin_mra(script, flags)
        clock, printed, iteration, updates = 0.0, 0.0, 0, 0
        while clock < bench.cpu_seconds:
            start = time.process_time()
            turn = iteration // s.args.max_episode_steps % len(s.collectors)
            collector, iteration = s.collectors[turn], iteration + 1
            before = collector.buffer.steps // s.args.update_every
            script.collect(s.agent, collector, s.rng, s.latent_rng)
            due = collector.buffer.steps // s.args.update_every > before
            if due and collector.buffer.size >= s.args.batch_size:
                script.update(s.args, s.agent, collector, s.collectors, s.rng, s.latent_rng)
                updates += 1
            clock += time.process_time() - start
            if warm and updates:
                break
            if clock >= printed + bench.every or clock >= bench.cpu_seconds:
                printed = clock
                found = [f"{x:.1f}" for x in fresh_returns(script, s, bench)]
                steps, rounds = iteration * s.args.num_envs, updates * s.args.inner_steps
                table_line(preset, f"{clock:.0f}", steps, rounds, *found)


def mra(bench: Mra) -> None:
    """Print the tables that Mra describes."""
    script = load_script("mra_maddpg_particle")
    script.keep_freed_memory()
    if bench.cycles:
        cycle_table(script, bench)
        replay_table(script)
    if bench.presets:
        print()
        names = (f"return {name}" for name in bench.populations)
        table_head("preset", "CPU s", "environment steps", "minibatches", *names)
    for preset in bench.presets:
        learn_mra(script, preset, bench)


# --- REFIL ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Refil:
    """The speed of REFIL's update next to two plain ones, and of whole training.

    First table: CPU seconds of one update on 32 episodes of random play, on one thread. "steps" is
    class Plain of plain_refil.py (one time step, mask and hypernetwork after another; all slots and
    padding). "folded" is laid out like the authors' code (time folded into the batch, three masks
    as three batches, only the GRU step by step). Both compute in fp32; times include gradients,
    clipping and RMSprop. The ratio is "folded" / ours. Second table: environment steps per CPU
    second of collecting and updating. With --device cuda, both tables use wall-clock seconds.
    """

    limits: tuple[Positive, ...] = (50, 150)  # most steps of an episode, in the first table
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # team sizes of the battles
    widths: tuple[Positive, ...] = (128, 64)  # hidden size H: the paper's, then --preset cpu's
    repeats: Positive = 3  # timed calls per measurement; the fastest counts
    plain: bool = True  # time the two plain learners as well (on a CPU only)
    presets: tuple[str, ...] = ("cpu", "paper")  # presets of the second table; none: no table
    iterations: Positive = 3  # iterations to time in the second table
    seed: Seed = 1  # seed of battles and of drawn minibatches
    device: Literal["cpu", "cuda"] = "cpu"  # device of the learner


def clock(bench: Any) -> float:
    """CPU time in seconds; with --device cuda, wall time after the GPU has done its work."""
    if bench.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable[[], Any], bench: Any, repeats: int) -> float:
    """The smallest time of `repeats` calls by clock(), after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        start = clock(bench)
        function()
        times.append(clock(bench) - start)
    return min(times[1:])


def begin_battles(script: Any, flags: str, bench: Any, rounds: int) -> SimpleNamespace:
    """Args, battles, agent, generator, and a replay with `rounds` collections of random play."""
    sizes = [str(size) for size in bench.team_sizes]
    device = torch.device(bench.device)
    args = script_args(script, [*flags.split(), "--team-sizes", *sizes, "--device", bench.device])
    battles = script.make_envs(args, args.team_sizes, args.num_envs, bench.seed)
    s = SimpleNamespace(args=args, battles=battles)
    s.agent = script.Agent(args, battles.family, device)
    s.buffer = script.ReplayBuffer(args, battles, device)
    s.rng = torch.Generator().manual_seed(bench.seed)
    for _ in range(rounds):
        script.collect(battles, script.Player(s.agent, 1.0, s.rng), s.buffer)
    return s


def training_speed(script: Any, flags: str, bench: Any) -> float:
    """Environment steps per second (by clock()) of collecting and updating."""
    s = begin_battles(script, flags, bench, rounds=4)
    steps, start = 0, clock(bench)
    for _ in range(bench.iterations):
        player = script.Player(s.agent, 1.0, s.rng)
        episodes = script.collect(s.battles, player, s.buffer)
        script.update(s.args, s.agent, s.buffer, s.rng)
        steps += sum(episode.length for episode in episodes)
    return steps / (clock(bench) - start)


def check_device(bench: Any) -> None:
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here.")


def time_plain(script: Any, s: SimpleNamespace, groups: Any, bench: Refil) -> tuple[float, float]:
    """Seconds of one update by Plain and by Folded, after a check that their losses agree."""
    from experiments import plain_refil

    e = plain_refil.episodes_of(s, bench.seed, 32)
    full = plain_refil.all_slots(groups, s.batch.features, 32)
    learners = plain_refil.Plain(s.args, s.agent), plain_refil.Folded(s.args, s.agent)
    losses = [learner.loss(e, full).item() for learner in learners]
    assert math.isclose(*losses, rel_tol=1e-4), "the two plain learners differ"
    times = []
    for learner, repeats in zip(learners, (1, bench.repeats), strict=True):

        def step(learner: Any = learner) -> None:
            step_on(s, learner.loss(e, full))

        times.append(seconds_of(step, bench, repeats))
    return times[0], times[1]


def step_on(s: SimpleNamespace, loss: torch.Tensor) -> None:
    harness.descend(loss, s.agent.critic(), s.agent.optimiser, s.args.max_grad_norm)


def time_refil(script: Any, limit: int, width: int, mixer: str, bench: Refil) -> None:
    """Print lines of the first table: our update in fp32 and, if the device has it, in bf16."""
    flags = f"--mixer {mixer} --hidden-size {width} --max-episode-steps {limit} --amp"
    s = begin_battles(script, f"{flags} --updates-per-iteration 1", bench, rounds=8)
    s.batch = s.buffer.sample(torch.Generator().manual_seed(bench.seed), 32)
    groups = script.draw_groups(s.batch.features, s.rng)
    cells, folded = ["", ""], 0.0
    if bench.plain and bench.device == "cpu":
        steps, folded = time_plain(script, s, groups, bench)
        cells = [f"{steps:.2f}", f"{folded:.2f}"]

    def ours() -> None:
        batch = s.buffer.sample(torch.Generator().manual_seed(bench.seed), 32)
        step_on(s, script.critic_loss(s.args, s.agent, batch, groups)[0])

    longest = len(s.batch.features.played) - 1
    name = f"{limit} ({len(s.batch.now)} of {32 * longest})"
    for amp in (False, True) if s.agent.amp else (False,):
        s.agent.amp = amp
        mine = seconds_of(ours, bench, bench.repeats)
        digits = "bf16" if amp else "fp32"
        ratio = f"{folded / mine:.1f}" if folded else ""
        table_line(name, width, mixer, digits, *cells, f"{mine:.3f}", ratio)


def refil(bench: Refil) -> None:
    """Print the tables that Refil describes."""
    check_device(bench)
    script = load_script("refil_smac")
    if bench.limits:
        ratio = ("steps", "folded", "ours", "ratio")
        table_head("limit (steps of padded)", "H", "mixer", "ours in", *ratio)
    for limit, width in itertools.product(bench.limits, bench.widths):
        for mixer in ("flex", "linear"):
            time_refil(script, limit, width, mixer, bench)
    if bench.presets:
        print()
        table_head("preset", "updates an iteration", "environment steps per second")
    for preset in bench.presets:
        flags = f"--preset {preset}"
        updates = script_args(script, flags.split()).updates_per_iteration
        table_line(preset, updates, f"{training_speed(script, flags, bench):.0f}")


# --- MIPI -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mipi:
    """The speed of MIPI's update and of its training next to REFIL's.

    First table: seconds of one update on 32 episodes of random play, on one thread, of REFIL and of
    MIPI with M alternations, both with the linear mixer. They take turns in one process and the
    smallest time counts. Second table: environment steps per second of collecting and updating. All
    times are CPU times, with --device cuda wall-clock times. With --flags="--preset cpu" an update
    is on 64 windows of 8 steps, and each script has its own mixer.
    """

    limits: tuple[Positive, ...] = (50, 150)  # most steps of an episode, in the first table
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # team sizes of the battles
    widths: tuple[Positive, ...] = (128, 64)  # hidden size H: the paper's, then --preset cpu's
    alternations: Annotated[tuple[Positive, ...], MinLen(1)] = (1, 4)  # MIPI's --ba-iterations, M
    flags: str = "--mixer linear"  # flags of both scripts
    repeats: Positive = 3  # timed calls of each update; the fastest counts
    presets: tuple[str, ...] = ("cpu", "paper")  # presets of the second table; none: no table
    iterations: Positive = 3  # iterations to time in the second table
    seed: Seed = 1  # seed of battles and of drawn minibatches
    device: Literal["cpu", "cuda"] = "cpu"  # device of the learner


def mipi_kinds(bench: Mipi) -> dict[str, tuple[str, str]]:
    """{name: (script, flags)} of the updates that the first table compares."""
    kinds = {"REFIL": ("refil_smac", bench.flags)}
    for m in bench.alternations:
        kinds[f"MIPI, M = {m}"] = ("mipi_refil_smac", f"{bench.flags} --ba-iterations {m}")
    return kinds


def time_updates(
    kinds: dict[str, tuple[str, str]], limit: int, width: int, amp: bool, bench: Mipi | Collaq
) -> None:
    """Print the lines of a first table for {name: (script, flags)}, relative to the first one."""
    shared = f"--hidden-size {width} --max-episode-steps {limit} --updates-per-iteration 1"
    shared += " --amp" if amp else " --no-amp"
    made = {
        name: begin_battles(load_script(script), f"{shared} {flags}", bench, rounds=8)
        for name, (script, flags) in kinds.items()
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(bench.repeats + 1):  # the first one warms up
        for name, s in made.items():
            s.rng.manual_seed(bench.seed)  # so that every update draws the same episodes
            start = clock(bench)
            load_script(kinds[name][0]).update(s.args, s.agent, s.buffer, s.rng)
            if repeat:
                times[name].append(clock(bench) - start)
    base = min(next(iter(times.values())))
    for name, found in times.items():
        digits = "bf16" if made[name].agent.amp else "fp32"
        least = min(found)
        table_line(limit, width, digits, name, f"{least:.3f}", f"{least / base:.2f}")


def compare_updates(kinds: dict[str, tuple[str, str]], bench: Mipi | Collaq) -> None:
    """Print a table of update times for {name: (script, flags)}, also in bf16 if supported."""
    check_device(bench)
    fast = load_script("refil_smac").has_bf16(torch.device(bench.device))
    if bench.limits:
        table_head("limit", "H", "in", "update", "seconds", "to REFIL's")
    for limit, width in itertools.product(bench.limits, bench.widths):
        for amp in (False, True) if fast else (False,):
            time_updates(kinds, limit, width, amp, bench)


def mipi(bench: Mipi) -> None:
    """Print the tables that Mipi describes."""
    compare_updates(mipi_kinds(bench), bench)
    if bench.presets:
        print()
        table_head("preset", "script", "environment steps per second")
    for preset in bench.presets:
        for name in ("refil_smac", "mipi_refil_smac"):
            flags = f"--preset {preset} {bench.flags}"
            speed = training_speed(load_script(name), flags, bench)
            table_line(preset, name, f"{speed:.0f}")


# --- CollaQ ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collaq:
    """The speed of CollaQ's update next to REFIL's and AQMIX's.

    Seconds of one update on 32 episodes of random play, on one thread: REFIL, AQMIX (REFIL without
    imagined groups) and CollaQ, all with the flexible mixer. They take turns in one process and the
    smallest time counts: CPU time, with --device cuda wall-clock time.
    """

    limits: tuple[Positive, ...] = (50, 150)  # most steps of an episode
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # team sizes of the battles
    widths: tuple[Positive, ...] = (128, 64)  # hidden size H: the paper's, then --preset cpu's
    repeats: Positive = 3  # timed calls of each update; the fastest counts
    seed: Seed = 1  # seed of battles and of drawn minibatches
    device: Literal["cpu", "cuda"] = "cpu"  # device of the learner


def collaq(bench: Collaq) -> None:
    """Print the table that Collaq describes."""
    kinds = {
        "REFIL": ("refil_smac", ""),
        "AQMIX": ("refil_smac", "--no-imagine"),
        "CollaQ": ("collaq_smac", ""),
    }
    compare_updates(kinds, bench)


# --- Ranks ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The speed of training with two processes, for one script of each kind of world.

    Each script trains in three ways with as many worlds and the same batches: one process with two
    threads, one process with one thread, and two processes under torchrun with one thread and half
    the worlds each. Figures are environment steps per second of collecting and learning after the
    first tenth of a run, medians over rounds in which the ways take turns. Each run is also told as
    it ends, on standard error.
    """

    # scripts to train
    scripts: tuple[Literal["mappo_meltingpot", "mra_maddpg_particle", "mappo_smac"], ...] = (
        "mappo_meltingpot",
        "mra_maddpg_particle",
        "mappo_smac",
    )
    rounds: Positive = 3  # runs of each way
    length: Above = 1.0  # length of each run, as a multiple of the steps in TRAININGS
    substrate: str = "coins"  # substrate of Melting Pot


class Training(NamedTuple):
    """The flags and the size of one script's training."""

    flags: str
    worlds: int  # parallel worlds of all processes together
    steps: int  # environment steps


TRAININGS = {
    "mappo_meltingpot": Training("--substrate {substrate}", worlds=16, steps=64_000),
    "mra_maddpg_particle": Training("--preset cpu --populations 3 6 12", worlds=64, steps=60_000),
    "mappo_smac": Training("--preset cpu", worlds=256, steps=160_000),
}
WAYS = {  # processes, threads of each
    "one process, two threads": (1, 2),
    "one process": (1, 1),
    "two processes": (2, 1),
}


def training_rate(bench: Ranks, script: str, processes: int, threads: int) -> float:
    """Environment steps per second of one training in subprocesses; RunError if it fails."""
    training = TRAININGS[script]
    flags = training.flags.format(substrate=bench.substrate)
    steps = max(math.ceil(training.steps * bench.length), 2 * iteration_steps(script, flags))
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [*(torchrun if processes > 1 else []), str(ROOT / script_file(script))]
    flags += f" --num-envs {training.worlds // processes} --num-threads {threads}"
    flags += f" --total-timesteps {steps} --log-every {math.ceil(steps / 10)}"
    flags += " --eval-every 0 --save-every 0 --final-episodes 0 --device cpu"
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, *command, *flags.split(), "--run-dir", folder]
        done = run_child(argv)
        if done.returncode:
            raise harness.RunError(f"{script} ended with code {done.returncode}: {done.stderr}")
        text = (Path(folder) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    seconds = [
        (line["timesteps"] - before["timesteps"]) / line["sps"]
        for before, line in itertools.pairwise(lines)
    ]
    return (lines[-1]["timesteps"] - lines[0]["timesteps"]) / sum(seconds)


def ranks(bench: Ranks) -> None:
    """Print the table that Ranks describes."""
    print(f"{processor()}, torch {torch.__version__}, {bench}\n")
    table_head("script", "worlds", *WAYS, "two processes over the faster one")
    for script in bench.scripts:
        rates = {way: [] for way in WAYS}
        for number in range(1, bench.rounds + 1):
            for way, (processes, threads) in WAYS.items():
                began = time.perf_counter()
                rates[way].append(training_rate(bench, script, processes, threads))
                what = f"{script}, {way}, round {number} of {bench.rounds}"
                speed, seconds = rates[way][-1], time.perf_counter() - began
                told = f"{what}: {speed:,.0f} steps/s ({seconds:.0f} s with its start)"
                print(told, file=sys.stderr, flush=True)
        two_threads, one_thread, two = map(statistics.median, rates.values())
        cells = [f"{x:,.0f}" for x in (two_threads, one_thread, two)]
        ratio = two / max(two_threads, one_thread)
        table_line(script, TRAININGS[script].worlds, *cells, f"{ratio:.2f}")


# --- Devices --------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """One line with the names of CPU and GPU, and versions of libraries."""
    parts = [processor(), f"{os.cpu_count()} cores"]
    if device != "cpu":
        parts += [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}"]
        parts += [f"cuDNN {torch.backends.cudnn.version()}"]
    parts += [f"torch {torch.__version__}", f"numpy {np.__version__}"]
    return ", ".join([*parts, f"Python {platform.python_version()}", f"on {device}"])


@dataclasses.dataclass(frozen=True)
class Trainings:
    """The speed of every script's training on a device.

    Environment steps per second of collecting and learning (no evaluations, no checkpoints) after
    the first tenth of a run, and the share of time for collecting. One process and one thread. A
    run has at least two iterations, of which the first is not timed.
    """

    scripts: tuple[str, ...] = ()  # names of scripts to train, without .py; none: all
    length: Above = 1.0  # length of each run, as a multiple of the steps in SPEEDS
    flags: str = ""  # more flags for all scripts, as --flags="--tf32"
    device: Literal["cpu", "cuda"] = "cpu"  # device of acting and learning


ON_TOY = "--substrate toy --num-envs 64 --rollout-steps 50"
IN_BATTLES = "--scenario sz --preset cpu"
SPEEDS = {  # {script: (flags, environment steps)}
    "bidist_mappo_meltingpot": (f"{ON_TOY} --k-d 1", 64_000),
    "mappo_meltingpot": (ON_TOY, 64_000),
    "randnet_meltingpot": (ON_TOY, 64_000),
    "opre_meltingpot": (ON_TOY, 64_000),
    "pp_meltingpot": (ON_TOY, 64_000),
    "rpm_meltingpot": (ON_TOY, 64_000),
    "mra_maddpg_particle": ("--task resource --preset cpu --no-compile", 40_000),
    "maddpg_particle": ("--task resource --population 6 --preset cpu --no-compile", 40_000),
    "maac_particle": ("--task resource --population 6", 40_000),
    "rl2_particle": ("--task resource", 40_000),
    "epc_particle": ("--task resource", 20_000),
    "mappo_smac": (IN_BATTLES, 80_000),
    "mipi_mappo_smac": (IN_BATTLES, 80_000),
    "refil_smac": (IN_BATTLES, 60_000),
    "collaq_smac": (IN_BATTLES, 60_000),
    "mipi_refil_smac": (IN_BATTLES, 60_000),
}


def iteration_steps(script: str, flags: str) -> int:
    """The most environment steps that an iteration of a script takes."""
    args = script_args(load_script(script), flags.split())
    lengths = ("rollout_steps", "window_steps", "max_episode_steps")
    steps = args.num_envs * next(getattr(args, x) for x in lengths if hasattr(args, x))
    if hasattr(args, "trial_games"):  # RL2: as many orders of games as populations
        orders = len(args.populations)
        return steps * (args.trial_games or orders) * orders
    return steps


def logged_training(script: str, flags: str, steps: int) -> list[dict[str, float]]:
    """Train in a subprocess; return the log, a line per tenth of the run. RunError if it fails."""
    flags += f" --total-timesteps {steps} --log-every {math.ceil(steps / 10)}"
    flags += " --eval-every 0 --save-every 0 --final-episodes 0"
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / script_file(script)), *flags.split()]
        argv += ["--run-dir", folder]
        done = run_child(argv)
        if done.returncode:
            raise harness.RunError(f"{script}: code {done.returncode}: {done.stderr[-500:]}.")
        text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def trainings(bench: Trainings) -> None:
    """Print the table that Trainings describes."""
    check_device(bench)
    for script in bench.scripts:
        if script not in SPEEDS:
            raise UsageError(f"--scripts {script}: there are {', '.join(SPEEDS)}.")
    print(f"{machine(bench.device)}\n")
    table_head("script", "flags", "steps/s", "collecting")
    for script in bench.scripts or SPEEDS:
        flags, steps = SPEEDS[script]
        given = f"{flags} {bench.flags}".strip()
        every = f"{given} --device {bench.device}"
        steps = max(math.ceil(steps * bench.length), 2 * iteration_steps(script, every))
        lines = logged_training(script, every, steps)[1:]
        collecting = sum(line.get("collect_s", math.nan) for line in lines)
        learning = sum(line.get("learn_s", math.nan) for line in lines)
        rate = statistics.median(line["sps"] for line in lines)
        share = collecting / (collecting + learning)
        table_line(script, given, f"{rate:,.0f}", "-" if math.isnan(share) else f"{share:.0%}")


@dataclasses.dataclass(frozen=True)
class Scale:
    """The speed of a BiDist iteration by number of worlds, and of an all-reduce.

    First table: seconds of one iteration of T steps for stepping worlds, acting (the actor and the
    distilled policy) and learning, in the toy world or substrates of Melting Pot. Second table:
    milliseconds to all-reduce gradients over two processes, by gloo or, on two GPUs, by NCCL.
    """

    substrates: tuple[str, ...] = ("toy",)  # substrates to measure; toy needs no Melting Pot
    worlds: tuple[Positive, ...] = (4, 16, 64)  # numbers of parallel worlds
    rollout_steps: Positive = 50  # T, steps per world and iteration
    rounds: Positive = 2  # iterations to time, after one that warms up
    num_workers: Count = 0  # processes that step worlds of Melting Pot; 0: one per core
    numbers: tuple[Positive, ...] = (50_000, 250_000, 1_000_000)  # sizes of the averaged gradients
    flags: str = ""  # more flags of the BiDist script
    device: Literal["cpu", "cuda"] = "cpu"  # device of acting, learning and all-reduce


def average_often(rank: int, meeting: str, numbers: tuple[int, ...], device: str) -> None:
    """Time all-reduces in one of two processes that meet in a file; rank 0 prints a line a size."""
    torch.set_num_threads(1)
    there = torch.device(device, rank) if device == "cuda" else CPU
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
    )
    for number in numbers:
        x, times = torch.ones(number, device=there), []
        for _ in range(30):
            began = time.perf_counter()
            torch.distributed.all_reduce(x)
            float(x[0])  # waits for the device
            times.append(time.perf_counter() - began)
            x.fill_(1.0)
        if rank == 0:
            table_line(f"{number:,}", f"{1000 * statistics.median(times[10:]):.2f}")
    torch.distributed.destroy_process_group()


def scale(bench: Scale) -> None:
    """Print the tables that Scale describes."""
    check_device(bench)
    print(f"{machine(bench.device)}\n")
    table_head("substrate", "worlds", "worlds, s", "acting, s", "learning, s", "steps/s")
    flags = f"--rollout-steps {bench.rollout_steps} {bench.flags}"
    for substrate in bench.substrates:
        for number in bench.worlds:
            pot = MeltingPot(
                script="bidist",
                num_envs=number,
                num_workers=bench.num_workers,
                device=bench.device,
                flags=f"--k-d 1 {flags}",
            )
            script, args = training_args(pot, substrate, "ids")
            seconds = training_seconds(script, args, pot, bench.rounds)
            rate = bench.rollout_steps * number / sum(seconds.values())
            cells = [f"{x:.3f}" for x in seconds.values()]
            table_line(substrate, number, *cells, f"{rate:,.0f}")
    of_two = bench.device == "cuda" and torch.cuda.device_count() > 1
    where = "cuda" if of_two else "cpu"
    print(f"\nTwo processes, {'NCCL' if of_two else 'gloo'}\n")
    table_head("gradients", "ms")
    with tempfile.TemporaryDirectory() as folder:
        given = (f"{folder}/meeting", bench.numbers, where)
        torch.multiprocessing.spawn(average_often, given, nprocs=2)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a minibatch of BiDist's update in the toy world runs on a device, and for how long.

    First table, per number of worlds: milliseconds of a minibatch without the profiler; under it,
    per minibatch: kernels that the device ran and their milliseconds, copies, and how often the CPU
    waited. The second table has the operations that took most of the device's time (of the CPU's
    with --device cpu) with the largest number of worlds, per minibatch.
    """

    worlds: tuple[Positive, ...] = (16, 64)  # numbers of parallel worlds
    rollout_steps: Positive = 50  # T, steps per world and iteration
    rounds: Positive = 2  # updates to time, after one that warms up; one more is profiled
    rows: Positive = 12  # rows of the second table
    flags: str = ""  # more flags of the BiDist script
    device: Literal["cpu", "cuda"] = "cuda"  # device of the update


def kernels(bench: Kernels) -> None:
    """Print the tables that Kernels describes."""
    check_device(bench)
    if not bench.worlds:
        raise UsageError("--worlds names none.")
    on_gpu = bench.device == "cuda"
    print(f"{machine(bench.device)}\n")
    table_head("worlds", "minibatch, ms", "kernels", "copies", "kernels, ms", "waits")
    for number in bench.worlds:
        flags = f"--rollout-steps {bench.rollout_steps} {bench.flags}"
        pot = MeltingPot(script="bidist", num_envs=number, device=bench.device, flags=flags)
        script, args = training_args(pot, "toy", "ids")
        parts = args.epochs * args.minibatches
        seconds, events = profiled_update(script, args, bench)
        on_device = [
            event
            for event in events
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
        copies = [event for event in on_device if event.key.startswith("Mem")]
        mine = [event for event in on_device if event not in copies]
        waits = [event for event in events if "StreamSynchronize" in event.key]
        table_line(
            number,
            f"{1000 * seconds / parts:.1f}",
            *[f"{sum(event.count for event in group) / parts:.1f}" for group in (mine, copies)],
            f"{sum(event.self_device_time_total for event in mine) / 1000 / parts:.2f}",
            f"{sum(event.count for event in waits) / parts:.1f}",
        )
    print(f"\n{bench.worlds[-1]} worlds\n")
    table_head("operation", "calls", "ms")
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ours = [event for event in events if not on_gpu or event in mine]
    for event in sorted(ours, key=lambda event: -getattr(event, time_of))[: bench.rows]:
        took = getattr(event, time_of) / 1000 / parts
        table_line(event.key[:60].replace("|", " "), f"{event.count / parts:.1f}", f"{took:.3f}")


def profiled_update(script: Any, args: Any, bench: Kernels) -> tuple[float, list[Any]]:
    """Median seconds of an update, and the profiler's averages over one more by operation."""
    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    rngs = [torch.Generator().manual_seed(k) for k in range(2)]
    times = []
    with script.make_envs(args, args.num_envs, 1) as worlds:
        agent = script.Agent(args, worlds, torch.device(bench.device))
        state = script.new_state(agent, args.num_envs)
        worlds.reset()
        for _ in range(bench.rounds + 1):
            batch, state = script.collect(args, worlds, agent, state, *rngs)
            batch, state = script.prepare(args, agent, batch, state)
            wait()
            began = time.perf_counter()
            script.update(args, agent, batch, rngs[0])
            wait()
            times.append(time.perf_counter() - began)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            script.update(args, agent, batch, rngs[0])
            wait()
    return statistics.median(times[1:]), list(profiler.key_averages())


@dataclasses.dataclass(frozen=True)
class All:
    """All benchmarks that depend on the device, with settings that take some minutes.

    Runs `trainings`, `scale`, the training part of `meltingpot` in the toy world, `particle`
    without other libraries, `refil`, `mipi` and `collaq`. If one fails, the others still run, and
    the failure is reported at the end.
    """

    device: Literal["cpu", "cuda"] = "cuda"  # device of all benchmarks
    size: Above = 1.0  # factor on lengths of runs and on numbers of worlds
    skip: tuple[str, ...] = ()  # benchmarks to leave out, by name


def smaller(numbers: tuple[int, ...], size: float) -> tuple[int, ...]:
    return tuple(max(1, math.ceil(number * size)) for number in numbers)


def everything(bench: All) -> None:
    """Run all benchmarks that All names; RunError at the end if some failed."""
    check_device(bench)
    size, device = bench.size, {"device": bench.device}
    limits, widths = smaller((50,), size), (64,) if size < 1 else (128, 64)
    battles = {"limits": limits, "widths": widths, "repeats": 1, **device}
    few = {"presets": ("cpu",), "iterations": 1}
    worlds = smaller((64, 512, 4096), size)
    pot = {"substrates": ("toy",), "parts": ("training",), "rounds": 2, "plain_rounds": 1}
    parts = {
        "trainings": Trainings(length=size, **device),
        "scale": Scale(worlds=smaller((16, 64, 256), size), **device),
        "meltingpot": MeltingPot(**pot, num_envs=smaller((64,), size)[0], **device),
        "particle": Particle(
            numbers=(3, 12), worlds=worlds, seconds=size, peers=False, own=False, **device
        ),
        "refil": Refil(**battles, **few, plain=False),
        "mipi": Mipi(**battles, **few),
        "collaq": Collaq(**battles),
    }
    if unknown := [name for name in bench.skip if name not in parts]:
        raise harness.UsageError(f"--skip {unknown[0]}: there are {', '.join(parts)}.")
    failed = []
    print(f"# {machine(bench.device)}")
    for name, part in parts.items():
        if name in bench.skip:
            continue
        print(f"\n## {name}\n\n{part}\n", flush=True)
        began = time.perf_counter()
        try:
            COMMANDS[name](part)
        except (Exception, SystemExit) as error:  # one failure must not stop the other benchmarks
            if is_signal(error):
                raise
            print(f"\n{name} failed: {type(error).__name__}: {error}")
            failed.append(name)
        print(f"\n({time.perf_counter() - began:.0f} s)")
    if failed:
        raise harness.RunError(f"Not measured: {', '.join(failed)}.")


# --- Main -----------------------------------------------------------------------------------------


COMMANDS = {
    "meltingpot": meltingpot,
    "scenarios": scenarios,
    "particle": particle,
    "combat": combat,
    "mra": mra,
    "refil": refil,
    "mipi": mipi,
    "collaq": collaq,
    "peers": peers,
    "ranks": ranks,
    "trainings": trainings,
    "scale": scale,
    "kernels": kernels,
    "all": everything,
    "zoo": zoo.again,
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    torch.set_num_threads(1)
    harness.choose_products(onednn=True)  # as in training
    return run_subcommand(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
