"""Speed of the particle worlds beside mpe2, VMAS and JaxMARL, in one run.

    python experiments/bench_particle.py
    python experiments/bench_particle.py --cores 2 --numbers 3 48 --seconds 5
    pip install -r requirements-bench.txt                  VMAS and JaxMARL; else they are left out

First table: the task that all of them have, simple_spread, which is defined here for ours: N agents
of radius .15, N landmarks; reward from the distance of each landmark to its nearest agent and from
collisions; everybody observes itself, all landmarks and all others. Random actions, drawn before.
Each library plays it for some numbers of parallel worlds (mpe2 has one), and the fastest counts.
Second table: our own three worlds.

Figures are millions of agent-steps per second: worlds x agents x steps / seconds, with episodes of
20 (ours), 25 (JaxMARL, mpe2) steps begun anew, VMAS without. All are held to the same cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from annotated_types import Interval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.particle.worlds import (
    TASKS,
    Bodies,
    Game,
    Observation,
    Outcome,
    ParticleWorld,
    Task,
    agent_distances,
    landmark_distances,
)

Positive = Annotated[int, Interval(ge=1)]


OURS = (  # the worlds of the second table
    ("treasure", (3, 6, 12, 24, 48)),
    ("resource", (6, 9, 12, 15)),
    ("pacman", ((4, 2), (6, 3), (8, 4), (2, 8))),
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to time."""

    numbers: tuple[Positive, ...] = (3, 6, 12, 24, 48)  # N
    worlds: tuple[Positive, ...] = (64, 512, 4096)  # of which the fastest counts
    seconds: Annotated[float, Interval(gt=0)] = 2.0  # of each measurement, at least
    cores: Positive = 1  # that the process may use
    device: str = "cpu"  # of ours and VMAS's
    peers: bool = True  # whether others are timed, too
    own: bool = True  # whether there is a second table


# --- simple_spread for our worlds -----------------------------------------------------------------


def spread_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Half: -sum over landmarks of the distance to the nearest agent; half: -1 per collision."""
    far = landmark_distances(game, bodies)
    near = agent_distances(bodies) < 2 * game.radius[0]
    hits = near.to(far.dtype).sum(1) - 1  # everyone is near itself
    reward = -0.5 * far.amin(0).sum(0) - 0.5 * hits
    return Outcome(reward, bodies.alive, torch.zeros_like(far[0], dtype=torch.bool))


def spread_observation(game: Game, bodies: Bodies) -> Observation:
    """Own velocity and position, landmarks and all agents relative to oneself."""
    p, v = bodies.position, bodies.velocity
    landmarks = (bodies.landmarks[:, None] - p[:, :, None]).transpose(1, 2)  # (2, L, N, B)
    agents = (p[:, None] - p[:, :, None]).transpose(1, 2)
    own = torch.cat((v, p, landmarks.flatten(0, 1), agents.flatten(0, 1)))
    return Observation(own.permute(2, 1, 0), p.clone().permute(2, 1, 0), bodies.alive.T)


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


# --- Timing ---------------------------------------------------------------------------------------


def rate(step: Callable[[], object], per_step: int, seconds: float, wait=lambda: None) -> float:
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


def ours(task: str, population, worlds: int, compiled: bool, bench: Bench) -> float:
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
    return rate(lambda: world.step(next(turn)), math.prod(shape), bench.seconds, wait)


def mpe2(N: int, worlds: int, bench: Bench) -> float:
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

    return rate(step, N, bench.seconds)


def vmas(N: int, worlds: int, bench: Bench) -> float:
    """VMAS's scenario of the same name."""
    import vmas as library

    how = dict(continuous_actions=False, n_agents=N, device=bench.device)
    env = library.make_env("simple_spread", num_envs=worlds, **how)
    env.reset()
    actions = torch.randint(0, 5, (100, N, worlds, 1), device=bench.device)
    turn = itertools.cycle(actions)
    wait = torch.cuda.synchronize if bench.device != "cpu" else lambda: None
    return rate(lambda: env.step(list(next(turn))), worlds * N, bench.seconds, wait)


def jaxmarl(N: int, worlds: int, bench: Bench) -> float:
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

    return rate(step, worlds * N, bench.seconds, lambda: jax.block_until_ready(last[0]))


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


def cell(x: float) -> str:
    return "not run" if math.isnan(x) else f"{x:.3g}"


@contextlib.contextmanager
def held_to(cores: int) -> Iterator[None]:
    """This process runs on so many cores (not on macOS, which has no such call)."""
    torch.set_num_threads(cores)
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_of_them)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def main(bench: Bench) -> None:
    """Print both tables."""
    print(f"simple_spread, M agent-steps/s, {bench.cores} core(s), {bench.device}\n")
    print("| N | mpe2 | VMAS | JaxMARL | ours, eager | ours, compiled | compiled / fastest peer |")
    print("|---|---|---|---|---|---|---|")
    for N in bench.numbers:
        peers = [math.nan] * 3
        if bench.peers:
            peers = [
                fastest(lambda b, f=f, N=N: f(N, b, bench), b)
                for f, b in ((mpe2, (1,)), (vmas, bench.worlds), (jaxmarl, bench.worlds))
            ]
        eager, fast = (
            fastest(lambda b, c=c, N=N: ours("spread", N, b, c, bench), bench.worlds)
            for c in (False, True)
        )
        ratio = fast / np.nanmax(peers) if not np.isnan(peers).all() else math.nan
        print(f"| {N} | " + " | ".join(map(cell, (*peers, eager, fast, ratio))) + " |", flush=True)
    if not bench.own:
        return
    print("\n| world | population | eager | compiled |\n|---|---|---|---|")
    for task, populations in OURS:
        for population in populations:
            both = (
                fastest(lambda b, c=c: ours(task, population, b, c, bench), bench.worlds)  # noqa: B023
                for c in (False, True)
            )
            print(f"| {task} | {population} | " + " | ".join(map(cell, both)) + " |", flush=True)


if __name__ == "__main__":
    asked = tyro.cli(Bench)
    with held_to(asked.cores):
        main(asked)
