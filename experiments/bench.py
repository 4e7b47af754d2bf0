"""Speed of worlds, learners and whole training, beside others where there are any.

    python experiments/bench.py meltingpot                    worlds, training, memory of a rollout
    python experiments/bench.py scenarios --episodes 10       evaluating beside scripted bots
    python experiments/bench.py particle                      beside mpe2, VMAS and JaxMARL
    python experiments/bench.py combat                        beside SMAX and SMAClite
    python experiments/bench.py peers                         all three worlds beside all others
    python experiments/bench.py mra                           an update cycle, and returns over time
    python experiments/bench.py refil                         one update, beside two plain learners
    python experiments/bench.py mipi                          one update, beside its parent
    python experiments/bench.py collaq                        the same
    python experiments/bench.py ranks                         one process and two, under torchrun
    python experiments/bench.py trainings --device cuda       every script's training on a device
    python experiments/bench.py scale --device cuda           BiDist with more worlds; all-reduces
    python experiments/bench.py all --device cuda             all that a device can change, briefly
    python experiments/bench.py zoo                           no speed: the zoo's figures again
    pip install -r requirements-bench.txt                     others' worlds, else they are left out

All print Markdown; ratios are measured in one run. Run nothing else meanwhile. `SUBCOMMAND --help`
has the options, and what each table's figures mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import Above, Count, Positive, Seed, UsageError

import numpy as np
import torch
import tyro
from annotated_types import Interval, MinLen

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
from envs.smac.combat import Combat, Scenario
from experiments import zoo
from experiments.runs import ROOT, load_script, run_subcommand, script_args, script_file

CPU = torch.device("cpu")


def table_head(*titles: str) -> None:
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)


def table_line(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@contextlib.contextmanager
def held_to(cores: int) -> Iterator[None]:
    """This process runs on so many cores (not on macOS, which has no such call)."""
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
    """Melting Pot's worlds and whole training.

    Worlds: steps per second of one process, our direct reading with tile ids against the official
    wrapper without, both stepping the same actions by turns; "bare" is the ratio that a reader
    would reach which only advances the engine and draws the images; resets are ours and the
    official wrapper's. Training: one process of MAPPO or BiDist with tile ids and with --plain,
    split into worlds, acting and learning. Memory: a rollout's images as ids and as pixels.
    """

    substrates: Annotated[tuple[str, ...], tyro.conf.Positional] = PAPER
    parts: tuple[Literal["worlds", "training", "memory"], ...] = ("worlds", "training", "memory")
    script: Literal["mappo", "bidist"] = "mappo"  # of the training table
    rounds: Positive = 7  # ours and official by turns, or iterations with ids and with pixels
    steps: Positive = 300  # per turn
    num_envs: Positive = 16  # worlds in training; 16 times 200 steps are the paper's batch
    num_workers: Count = 0  # 0: one per core
    num_threads: Positive = 1
    device: Literal["cpu", "cuda"] = "cpu"
    amp: bool = False  # critic in bf16, for both kinds
    plain_rounds: Count = 3  # iterations with --plain, which are slow; 0 leaves them out
    flags: str = ""  # of the script, as --flags="--k-d 1"


def steps_per_second(step: Any, actions: np.ndarray) -> float:
    began = time.perf_counter()
    for action in actions:
        step(action)
    return len(actions) / (time.perf_counter() - began)


class Ours:
    """One world in this process, read directly, with tile ids."""

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
    """The engine's own work: it advances and draws all images, and nothing is made of them."""

    def step(self, actions: np.ndarray) -> None:
        self.over = not self.engine.step(actions)
        for name in (*self.engine.rgb, "WORLD.RGB"):
            self.engine.lab.observation(name)


class Official:
    """The same world behind Melting Pot's own wrappers, with pixels."""

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
                world.reset()  # every turn from an episode's start, as none ends within 300 steps
                reset.append(time.perf_counter() - began)
                turn.append(steps_per_second(world.step, actions))
            if number and not any(world.over for world in worlds):  # the first turn warms up
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
    """Worlds whose steps are timed; `wait` returns when a device has done what was asked of it."""

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
    """The script, and its arguments."""
    distils = bench.script == "bidist"
    script = load_script("bidist_mappo_meltingpot" if distils else "mappo_meltingpot")
    flags = ["--substrate", name, "--num-envs", str(bench.num_envs), "--device", bench.device]
    flags += ["--num-workers", str(bench.num_workers), "--worker-timeout", "120"]
    flags += ["--plain"] * (kind == "plain") + ["--amp"] * bench.amp
    return script, script_args(script, [*flags, *bench.flags.split()])


def training_seconds(script: Any, args: Any, bench: MeltingPot, rounds: int) -> dict[str, float]:
    """Of one iteration's parts: worlds, acting, learning."""
    distils = hasattr(script, "distill")
    torch.set_num_threads(bench.num_threads)
    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    parts: dict[str, list[float]] = {"worlds": [], "acting": [], "learning": []}
    rngs = [torch.Generator().manual_seed(k) for k in range(1 + distils)]
    if distils:
        rounds = max(rounds, 2 * args.k_d)  # one distillation of each kind
    with script.make_envs(args, args.num_envs, 1) as worlds:
        agent = script.Agent(args, worlds, torch.device(bench.device))
        state, envs = script.new_state(agent, args.num_envs), Timed(worlds, wait)
        worlds.reset()
        for number in range(rounds + 1):
            envs.seconds, began = 0.0, time.perf_counter()
            batch, state = script.collect(args, envs, agent, state, *rngs)
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
    centre = statistics.mean if distils else statistics.median  # 2 in 10 distill
    return {part: centre(values) for part, values in parts.items()}


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
    """The CPU's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def meltingpot(bench: MeltingPot) -> None:
    """Print the tables."""
    gpu = f", {torch.cuda.get_device_name()}" if bench.device == "cuda" else ""
    print(f"{processor()}{gpu}, torch {torch.__version__}, {bench}\n")
    tables = {"worlds": bench_worlds, "training": bench_training, "memory": bench_memory}
    for name in bench.parts:
        tables[name](bench)
        print()


# --- Scenarios ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bots:
    """How long it takes to evaluate beside the scenarios' scripted bots.

    For each substrate: all its scenarios, whole natural episodes, with a network in the focal seats
    as in an evaluation, timed as one (the engines' first builds included); then each scenario
    alone, environment steps per second over --steps steps, and the same with random play on the
    bots' seats; the ratio says what the bots cost.
    """

    substrates: tuple[str, ...] = PAPER
    scenarios: str = "all"  # as in --eval-scenarios
    episodes: Count = 10  # per scenario, in the first table; 0 leaves it out
    steps: Count = 200  # per world, in the second; 0 leaves it out
    num_envs: Positive = 16
    num_workers: Count = 0  # 0: one per core
    seed: Seed = 1


def time_whole(bench: Bots, substrate: str) -> None:
    """A line of the first table."""
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
        num_ids=agent.spec.num_agents,
        num_workers=bench.num_workers,
    )
    seconds = time.perf_counter() - began
    steps = sum(result.length for results in played.values() for result in results)
    table_line(substrate, len(names), steps, f"{seconds:.0f}", f"{steps / seconds:.0f}")


def scenario_speed(bench: Bots, plan: Any) -> float:
    """Environment steps per second of one plan."""
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
    """UsageError for what cannot be timed."""
    for substrate in bench.substrates:
        get_spec(substrate)
        names = choose_scenarios(substrate, bench.scenarios, "scripted")
        if not names:
            raise UsageError(f"{substrate} has no scenarios with scripted bots.")
        choose_bots([get_plan(name) for name in names], "scripted")


def scenarios(bench: Bots) -> None:
    """Print both tables."""
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


OURS = (  # the worlds of the second table
    ("treasure", (3, 6, 12, 24, 48)),
    ("resource", (6, 9, 12, 15)),
    ("pacman", ((4, 2), (6, 3), (8, 4), (2, 8))),
)


@dataclasses.dataclass(frozen=True)
class Particle:
    """The particle worlds beside mpe2, VMAS and JaxMARL.

    First table: the task that all of them have, simple_spread, which is defined here for ours: N
    agents of radius .15, N landmarks; reward from the distance of each landmark to its nearest
    agent and from collisions; everybody observes itself, all landmarks and all others. Random
    actions, drawn before. Each library plays it for some numbers of parallel worlds (mpe2 has one),
    and the fastest counts. Second table: our own three worlds. Figures are millions of agent-steps
    per second: worlds x agents x steps / seconds, with episodes of 20 (ours), 25 (JaxMARL, mpe2)
    steps begun anew, VMAS without. All are held to the same cores.
    """

    numbers: tuple[Positive, ...] = (3, 6, 12, 24, 48)  # N
    worlds: tuple[Positive, ...] = (64, 512, 4096)  # of which the fastest counts
    seconds: Above = 2.0  # of each measurement, at least
    cores: Positive = 1  # that the process may use
    device: str = "cpu"  # of ours and VMAS's
    peers: bool = True  # whether others are timed, too
    own: bool = True  # whether there is a second table


def spread_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Half: -sum over landmarks of the distance to the nearest agent; half: -1 per collision."""
    far = landmark_distances(game, bodies)
    near = agent_distances(bodies) < 2 * game.radius[0]
    hits = near.to(far.dtype).sum(1) - 1  # everyone is near itself
    reward = -0.5 * far.amin(0).sum(0) - 0.5 * hits
    return Outcome(reward, bodies.alive, torch.zeros_like(far[0], dtype=torch.bool))


def spread_observation(game: Game, bodies: Bodies) -> ParticleObservation:
    """Own velocity and position, landmarks and all agents relative to oneself."""
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
    """Million agent-steps per second of step(), after a warm-up that includes a new episode."""
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
    """One of our worlds; NaN if it cannot be compiled here."""
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
    """PettingZoo's, one world at a time."""
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
    """VMAS's scenario of the same name."""
    import vmas as library

    how = dict(continuous_actions=False, n_agents=N, device=bench.device)
    env = library.make_env("simple_spread", num_envs=worlds, **how)
    env.reset()
    actions = torch.randint(0, 5, (100, N, worlds, 1), device=bench.device)
    turn = itertools.cycle(actions)
    wait = torch.cuda.synchronize if bench.device != "cpu" else lambda: None
    return agent_rate(lambda: env.step(list(next(turn))), worlds * N, bench.seconds, wait)


def jaxmarl(N: int, worlds: int, bench: Particle) -> float:
    """JaxMARL's, compiled over all worlds."""
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
    """Over numbers of worlds; NaN for a library that is not installed."""
    found = [math.nan]
    for number in worlds:
        try:
            found.append(measure(number))
        except ModuleNotFoundError:
            return math.nan
        except (RuntimeError, MemoryError) as error:  # mostly too large for this machine
            print(f"({number} worlds: {str(error)[:60]})", file=sys.stderr)
    return float(np.nanmax(found))


def or_not_run(x: float) -> str:
    return "not run" if math.isnan(x) else f"{x:.3g}"


def particle(bench: Particle) -> None:
    """Print both tables."""
    torch.set_num_threads(bench.cores)
    with held_to(bench.cores):
        time_spread(bench)
        if bench.own:
            time_our_particles(bench)


def time_spread(bench: Particle) -> None:
    """The first table."""
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
    """The second table."""
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
    """Our battles beside SMAX (JaxMARL) and SMAClite, 8 against 8.

    Random available actions, chosen outside the clock; observations, masks and new episodes inside
    it. Teams of SZ (ours) and 3s5z (both others) against their scripted enemies. Figures are
    environment steps per second, battles x steps / seconds; a step is 8 frames of the game in ours
    and in SMAX. SMAClite installs from its repository only.
    """

    battles: tuple[Positive, ...] = (1, 64, 1024)
    scenario: Scenario = "sz"  # ours
    seconds: Above = 3.0  # of each measurement, at least
    cores: Positive = 1  # that the process may use
    threads: Positive = 1  # of ours
    peers: bool = True


def battle_rate(choose: Callable, step: Callable, battles: int, seconds: float) -> float:
    """Steps per second of step(actions), without the time that choose() takes."""
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
    """One battle: there is no batch of them."""
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
    """Print the table."""
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


# --- All worlds beside others' --------------------------------------------------------------------

PEERS = ("dm-meltingpot", "mpe2", "vmas", "jaxmarl", "smaclite", "jax", "torch", "numba", "numpy")


@dataclasses.dataclass(frozen=True)
class Peers:
    """Our three kinds of worlds beside what else there is, on this machine and in one run.

    Versions; Melting Pot's own wrapper (as `meltingpot`, the paper's substrates); mpe2, VMAS and
    JaxMARL (as `particle`); SMAX and SMAClite (as `combat`). What is not installed is left out and
    named. Each measurement takes --seconds, some minutes in all.
    """

    substrates: tuple[str, ...] = ("coins", "chicken_in_the_matrix__repeated")
    numbers: tuple[Positive, ...] = (3, 12, 48)  # agents in particle worlds
    worlds: tuple[Positive, ...] = (64, 512, 4096)  # particle worlds, of which the fastest counts
    battles: tuple[Positive, ...] = (1, 64, 1024)
    seconds: Above = 2.0  # of each measurement, at least
    rounds: Positive = 5  # of Melting Pot, ours and its own by turns
    steps: Positive = 300  # per turn
    cores: Positive = 1  # that the process may use


def installed(name: str) -> str:
    """A distribution's version."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peers(bench: Peers) -> None:
    """Print a table for each kind of world."""
    print(f"{processor()}, {bench.cores} core(s), Python {platform.python_version()}\n")
    table_head("library", "version")
    for name in PEERS:
        table_line(name, installed(name))
    print("\nMelting Pot, steps/s of one process\n")
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
    """MRA's learner: an update cycle, memory of a replay, and how fast returns rise.

    First table: one cycle of the paper's size (K = 10 minibatches of 1024 for critic and actor,
    phi, psi and xi) in resource occupation, CPU milliseconds on one thread, with plain networks of
    pairs and with their fast form; "round" is one minibatch, critic and actor. Second: bytes of a
    transition in the replay. Third: returns of fresh episodes (z drawn from p(z|m)) after so many
    CPU seconds of training (after compilation, evaluations left out).
    """

    numbers: tuple[Positive, ...] = (6, 12, 24)  # N of the first table
    repeats: Positive = 3  # of each measurement; the smallest counts
    cycles: bool = True  # first table
    presets: tuple[str, ...] = ("cpu",)  # of the third; none: not at all
    populations: tuple[str, ...] = ("6", "9", "12")  # of resource, in the third
    cpu_seconds: Above = 120.0  # of training
    every: Above = 15.0  # CPU seconds between lines
    episodes: Annotated[int, Interval(ge=2)] = 500  # of each line and population
    seed: Seed = 1


KINDS = {"plain": "--plain", "fast": ""}  # of the first table


def begin_mra(script: Any, flags: str) -> SimpleNamespace:
    """Arguments, worlds with their replays, agent and generators as train() makes them."""
    args = script_args(script, [*flags.split(), "--device", "cpu"])
    collectors = [script.Collector(args, name, CPU) for name in args.populations]
    agent = script.Agent(args, collectors[0].game, CPU)
    rng = torch.Generator().manual_seed(args.seed)
    latent_rng = script.latent_generator(args.seed)
    script.begin(args, agent, collectors, latent_rng)
    return SimpleNamespace(
        args=args, collectors=collectors, agent=agent, rng=rng, latent_rng=latent_rng
    )


def cpu_ms(function: Callable[[], Any], repeats: int) -> float:
    """The smallest CPU time of several calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start))
    return min(times[1:])


def time_cycle(script: Any, number: int, kind: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a round, phi, psi and xi, and a whole cycle."""
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
        "phi": cpu_ms(
            lambda: script.information_update(s.args, s.agent, first.buffer, view, 0), repeats
        ),
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
    """Of fresh episodes, per population."""
    found = []
    for collector in s.collectors:
        world = script.make_envs(s.args, collector.name, bench.episodes, bench.seed + 12345)
        rng = torch.Generator().manual_seed(bench.seed)
        z = script.draw_latents(s.agent, world.game, bench.episodes, rng)
        player = script.net_player(s.agent, z, bench.seed)
        found.append(float(particle_episodes.play(world, player).mean()))
    return found


def learn_mra(script: Any, preset: str, bench: Mra, compiled: bool = True) -> None:
    """Train with a preset and print returns on the way."""
    flags = f"--task resource --populations {' '.join(bench.populations)} --preset {preset}"
    flags += f" --seed {bench.seed} {'--compile' if compiled else '--no-compile'}"
    for warm in (True, False):  # the first compiles
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
    """Print the tables."""
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
    """REFIL's learner beside two plain ones, and whole training.

    First table: one update on 32 episodes of random play, CPU seconds on one thread. "steps" is the
    learner of plain_refil.py (a time, a mask and a hypernetwork at once, all slots, padded time);
    "folded" is arranged as the authors' code is (times folded into the batch, three masks as three
    batches, only the GRU step by step). Both in fp32, with gradients, clipping and RMSprop. The
    ratio is "folded" / ours. Second table: environment steps per CPU second of training, collecting
    and updating, without evaluations. With --device cuda seconds are the clock's, in both tables.
    """

    limits: tuple[Positive, ...] = (50, 150)  # steps of an episode, at most
    team_sizes: tuple[Positive, ...] = (3, 4, 5)
    widths: tuple[Positive, ...] = (128, 64)  # H: the paper's, and --preset cpu's
    repeats: Positive = 3  # of each measurement; the smallest counts
    plain: bool = True  # whether the plain learners are timed, too; on a CPU only
    presets: tuple[str, ...] = ("cpu", "paper")  # of the second table; none: not at all
    iterations: Positive = 3  # that it times
    seed: Seed = 1
    device: Literal["cpu", "cuda"] = "cpu"  # of learning


def clock(bench: Any) -> float:
    """CPU time on a CPU; on a GPU the clock, when all that was asked of it is done."""
    if bench.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable[[], Any], bench: Any, repeats: int) -> float:
    """The smallest time of several calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = clock(bench)
        function()
        times.append(clock(bench) - start)
    return min(times[1:])


def begin_battles(script: Any, flags: str, bench: Any, rounds: int) -> SimpleNamespace:
    """Battles, an agent and a replay of random play."""
    sizes = [str(size) for size in bench.team_sizes]
    device = torch.device(bench.device)
    args = script_args(script, [*flags.split(), "--team-sizes", *sizes, "--device", bench.device])
    battles = script.make_envs(args, args.team_sizes, args.num_envs, bench.seed, device=device)
    s = SimpleNamespace(args=args, battles=battles)
    s.agent = script.Agent(args, battles.family, device)
    s.buffer = script.ReplayBuffer(args, battles, device)
    s.rng = torch.Generator().manual_seed(bench.seed)
    for _ in range(rounds):
        script.collect(battles, script.Player(s.agent, 1.0, s.rng), s.buffer)
    return s


def training_speed(script: Any, flags: str, bench: Any) -> float:
    """Environment steps per second of collecting and updating."""
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
    """Seconds of an update of both plain learners."""
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
    """Lines of the first table: fp32 and bf16."""
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
        table_line(name, width, mixer, digits, *cells, f"{mine:.2f}", f"{folded / mine:.1f}")


def refil(bench: Refil) -> None:
    """Print the tables."""
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
    """What MIPI costs beside its parent: one update each, and whole training.

    First table: seconds of one update on 32 episodes of random play, on one thread: REFIL with the
    linear mixer, and MIPI with M alternations. They take turns in one process; the smallest time
    counts, CPU time on a CPU. Second table: environment steps per second of training, collecting
    and updating, no evaluations.
    """

    limits: tuple[Positive, ...] = (50, 150)  # steps of an episode, at most
    team_sizes: tuple[Positive, ...] = (3, 4, 5)
    widths: tuple[Positive, ...] = (128, 64)  # H: the paper's, and --preset cpu's
    alternations: Annotated[tuple[Positive, ...], MinLen(1)] = (1, 4)  # M
    repeats: Positive = 3  # of each update
    presets: tuple[str, ...] = ("cpu", "paper")  # of the second table; none: not at all
    iterations: Positive = 3  # that it times
    seed: Seed = 1
    device: Literal["cpu", "cuda"] = "cpu"  # of learning; on cuda seconds are the clock's


def mipi_kinds(bench: Mipi) -> dict[str, tuple[str, str]]:
    """{name: (script, flags)} of the first table."""
    kinds = {"REFIL, linear": ("refil_smac", "--mixer linear")}
    for m in bench.alternations:
        kinds[f"MIPI, M = {m}"] = ("mipi_refil_smac", f"--ba-iterations {m}")
    return kinds


def time_updates(
    kinds: dict[str, tuple[str, str]], limit: int, width: int, amp: bool, bench: Mipi | Collaq
) -> None:
    """Lines of the first table; the first of {name: (script, flags)} is 1."""
    shared = f"--hidden-size {width} --max-episode-steps {limit} --updates-per-iteration 1"
    shared += " --amp" if amp else ""
    made = {
        name: begin_battles(load_script(script), f"{shared} {flags}", bench, rounds=8)
        for name, (script, flags) in kinds.items()
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(bench.repeats + 1):  # the first does not count
        for name, s in made.items():
            s.rng.manual_seed(bench.seed)  # the same episodes each time
            start = clock(bench)
            load_script(kinds[name][0]).update(s.args, s.agent, s.buffer, s.rng)
            if repeat:
                times[name].append(clock(bench) - start)
    base = min(next(iter(times.values())))
    for name, found in times.items():
        digits = "bf16" if made[name].agent.amp else "fp32"
        least = min(found)
        table_line(limit, width, digits, name, f"{least:.2f}", f"{least / base:.2f}")


def compare_updates(kinds: dict[str, tuple[str, str]], bench: Mipi | Collaq) -> None:
    """Print the first table."""
    check_device(bench)
    fast = load_script("refil_smac").has_bf16(torch.device(bench.device))
    if bench.limits:
        table_head("limit", "H", "in", "update", "seconds", "to REFIL's")
    for limit, width in itertools.product(bench.limits, bench.widths):
        for amp in (False, True) if fast else (False,):
            time_updates(kinds, limit, width, amp, bench)


def mipi(bench: Mipi) -> None:
    """Print the tables."""
    compare_updates(mipi_kinds(bench), bench)
    if bench.presets:
        print()
        table_head("preset", "script", "environment steps per second")
    for preset in bench.presets:
        for name, mixer in (("refil_smac", "--mixer linear"), ("mipi_refil_smac", "")):
            speed = training_speed(load_script(name), f"--preset {preset} {mixer}", bench)
            table_line(preset, name, f"{speed:.0f}")


# --- CollaQ ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collaq:
    """What CollaQ costs beside its parent: one update of each.

    Seconds of one update on 32 episodes of random play, on one thread: REFIL, AQMIX (REFIL without
    imagined groups) and CollaQ, all with the flexible mixer. They take turns in one process; the
    smallest time counts, CPU time on a CPU.
    """

    limits: tuple[Positive, ...] = (50, 150)  # steps of an episode, at most
    team_sizes: tuple[Positive, ...] = (3, 4, 5)
    widths: tuple[Positive, ...] = (128, 64)  # H: the paper's, and --preset cpu's
    repeats: Positive = 3  # of each update
    seed: Seed = 1
    device: Literal["cpu", "cuda"] = "cpu"  # of learning; on cuda seconds are the clock's


def collaq(bench: Collaq) -> None:
    """Print the table."""
    kinds = {
        "REFIL": ("refil_smac", ""),
        "AQMIX": ("refil_smac", "--no-imagine"),
        "CollaQ": ("collaq_smac", ""),
    }
    compare_updates(kinds, bench)


# --- Ranks ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """What two processes bring: environment steps per second of whole training, a script of each
    world.

    Three ways to train with the same worlds and the same batches: one process with two threads, one
    with one, and two under torchrun, with one thread and half the worlds each. They take turns;
    steps per second of collecting and learning, behind the first tenth of a run, medians over
    rounds.
    """

    scripts: tuple[Literal["mappo_meltingpot", "mra_maddpg_particle", "mappo_smac"], ...] = (
        "mappo_meltingpot",
        "mra_maddpg_particle",
        "mappo_smac",
    )
    rounds: Positive = 3  # of all ways by turns
    length: Above = 1.0  # of each run, in units of what TRAININGS says
    substrate: str = "coins"  # of Melting Pot


class Training(NamedTuple):
    """What is trained."""

    flags: str
    worlds: int  # of all processes
    steps: int


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
    """Environment steps per second."""
    training = TRAININGS[script]
    steps = math.ceil(training.steps * bench.length)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [*(torchrun if processes > 1 else []), str(ROOT / script_file(script))]
    flags = training.flags.format(substrate=bench.substrate)
    flags += f" --num-envs {training.worlds // processes} --num-threads {threads}"
    flags += f" --total-timesteps {steps} --log-every {math.ceil(steps / 10)}"
    flags += " --eval-every 0 --save-every 0 --final-episodes 0 --device cpu"
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, *command, *flags.split(), "--run-dir", folder]
        done = subprocess.run(argv, capture_output=True, text=True)
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
    """Print the table."""
    print(f"{processor()}, torch {torch.__version__}, {bench}\n")
    table_head("script", "worlds", *WAYS, "two processes over the faster one")
    for script in bench.scripts:
        rates = {way: [] for way in WAYS}
        for _ in range(bench.rounds):
            for way, (processes, threads) in WAYS.items():
                rates[way].append(training_rate(bench, script, processes, threads))
        two_threads, one_thread, two = map(statistics.median, rates.values())
        cells = [f"{x:,.0f}" for x in (two_threads, one_thread, two)]
        ratio = two / max(two_threads, one_thread)
        table_line(script, TRAININGS[script].worlds, *cells, f"{ratio:.2f}")


# --- Devices --------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """Its processor, GPU and versions, in one line."""
    parts = [processor(), f"{os.cpu_count()} cores"]
    if device != "cpu":
        parts += [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}"]
        parts += [f"cuDNN {torch.backends.cudnn.version()}"]
    parts += [f"torch {torch.__version__}", f"numpy {np.__version__}"]
    return ", ".join([*parts, f"Python {platform.python_version()}", f"on {device}"])


@dataclasses.dataclass(frozen=True)
class Trainings:
    """Environment steps per second of every script's training on a device.

    Collecting and learning, evaluations and checkpoints left out, behind the first tenth of a run;
    the share of time that collecting takes. With the flags of the table, one process, one thread.
    """

    scripts: tuple[str, ...] = ()  # none: all
    length: Above = 1.0  # of each run, in units of what SPEEDS says
    flags: str = ""  # of all scripts, as --flags="--tf32"
    device: Literal["cpu", "cuda"] = "cpu"


ON_TOY = "--substrate toy --num-envs 64 --rollout-steps 50"
IN_BATTLES = "--scenario sz --preset cpu"
SPEEDS = {  # flags, steps
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
    "refil_smac": (IN_BATTLES, 20_000),
    "collaq_smac": (IN_BATTLES, 20_000),
    "mipi_refil_smac": (IN_BATTLES, 20_000),
}


def logged_training(script: str, flags: str, steps: int) -> list[dict[str, float]]:
    """The log of a run in a process of its own, a line for each tenth; RunError if it fails."""
    flags += f" --total-timesteps {steps} --log-every {math.ceil(steps / 10)}"
    flags += " --eval-every 0 --save-every 0 --final-episodes 0"
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / script_file(script)), *flags.split()]
        argv += ["--run-dir", folder]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise harness.RunError(f"{script}: code {done.returncode}: {done.stderr[-500:]}.")
        text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def trainings(bench: Trainings) -> None:
    """Print the table."""
    check_device(bench)
    print(f"{machine(bench.device)}\n")
    table_head("script", "flags", "steps/s", "collecting")
    for script in bench.scripts or SPEEDS:
        flags, steps = SPEEDS[script]
        given = f"{flags} {bench.flags}".strip()
        every = f"{given} --device {bench.device}"
        lines = logged_training(script, every, math.ceil(steps * bench.length))[1:]
        collecting = sum(line.get("collect_s", math.nan) for line in lines)
        learning = sum(line.get("learn_s", math.nan) for line in lines)
        rate = statistics.median(line["sps"] for line in lines)
        share = collecting / (collecting + learning)
        table_line(script, given, f"{rate:,.0f}", "-" if math.isnan(share) else f"{share:.0%}")


@dataclasses.dataclass(frozen=True)
class Scale:
    """What of a BiDist iteration grows with its worlds, and what it costs to share one.

    First table: seconds of one iteration of T steps, in BiDist's toy world and, where it is
    installed, in a substrate of Melting Pot: worlds, acting (both networks), learning. Second: the
    gradients of an actor and a critic, averaged over two processes, milliseconds over gloo on this
    machine or, with two GPUs, over NCCL.
    """

    substrates: tuple[str, ...] = ("toy",)
    worlds: tuple[Positive, ...] = (4, 16, 64)
    rollout_steps: Positive = 50  # T
    rounds: Positive = 2  # iterations of each, behind one that warms up
    num_workers: Count = 0  # processes that step worlds of Melting Pot; 0: one per core
    numbers: tuple[Positive, ...] = (50_000, 250_000, 1_000_000)  # gradients that are averaged
    flags: str = ""  # of the script
    device: Literal["cpu", "cuda"] = "cpu"


def average_often(rank: int, meeting: str, numbers: tuple[int, ...], device: str) -> None:
    """One of two processes; the first prints a line for each number of gradients."""
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
            float(x[0])  # waits
            times.append(time.perf_counter() - began)
            x.fill_(1.0)
        if rank == 0:
            table_line(f"{number:,}", f"{1000 * statistics.median(times[10:]):.2f}")
    torch.distributed.destroy_process_group()


def scale(bench: Scale) -> None:
    """Print both tables."""
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
class All:
    """Everything here that a device can change, with settings that take some minutes on one.

    `trainings`, `scale`, the training part of `meltingpot` in the toy world, with tables and with
    --plain, `particle` without others' worlds, `refil`, `mipi`, `collaq`. What fails is named, and
    the rest goes on.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    size: Above = 1.0  # of lengths, numbers of worlds and battles
    skip: tuple[str, ...] = ()  # of those


def smaller(numbers: tuple[int, ...], size: float) -> tuple[int, ...]:
    return tuple(max(1, math.ceil(number * size)) for number in numbers)


def everything(bench: All) -> None:
    """Print all tables; RunError at the end if one could not be had."""
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
    failed = []
    print(f"# {machine(bench.device)}")
    for name, part in parts.items():
        if name in bench.skip:
            continue
        print(f"\n## {name}\n\n{part}\n", flush=True)
        began = time.perf_counter()
        try:
            COMMANDS[name](part)
        except (Exception, SystemExit) as error:  # whatever it is, the others are wanted
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
    "all": everything,
    "zoo": zoo.again,
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    torch.set_num_threads(1)
    return run_subcommand(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
