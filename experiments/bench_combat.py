"""Speed of our battles beside SMAX (JaxMARL) and SMAClite, 8 against 8, in one run.

    python experiments/bench_combat.py
    python experiments/bench_combat.py --cores 2 --threads 2 --battles 1024 --seconds 5
    pip install -r requirements-bench.txt          SMAX; SMAClite installs from its repository only

Random available actions, chosen outside the clock; observations, masks and new episodes inside it.
Teams of SZ (ours) and 3s5z (both others) against their scripted enemies. Figures are environment
steps per second, battles x steps / seconds; a step is 8 frames of the game in ours and in SMAX.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from figures import Above, Positive, check_bounds, one_line_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.smac.combat import Combat, Scenario


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to time."""

    battles: tuple[Positive, ...] = (1, 64, 1024)
    scenario: Scenario = "sz"  # ours
    seconds: Above = 3.0  # of each measurement, at least
    cores: Positive = 1  # that the process may use
    threads: Positive = 1  # of ours
    peers: bool = True


def rate(choose: Callable, step: Callable, battles: int, seconds: float) -> float:
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


def ours(bench: Bench, number: int) -> float:
    battles = Combat(bench.scenario, (8,), number, threads=bench.threads)
    battles.reset()
    rng, avail = np.random.default_rng(0), battles.obs.avail.numpy()
    choose = lambda: (rng.random(avail.shape, np.float32) * avail).argmax(-1)  # noqa: E731
    return rate(choose, battles.step, number, bench.seconds)


def smax(bench: Bench, number: int) -> float | None:
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

    return rate(choose, act, number, bench.seconds)


def smaclite(bench: Bench) -> float | None:
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

    return rate(choose, act, 1, bench.seconds)


def main(bench: Bench) -> None:
    check_bounds(bench)
    allowed = sorted(os.sched_getaffinity(0))[: bench.cores]
    os.sched_setaffinity(0, allowed)
    print(f"{len(allowed)} core(s), {bench.threads} thread(s) of ours, {bench.scenario}\n")
    print("| battles | ours | SMAX | SMAClite | ours / SMAX | ours / SMAClite |\n|" + "---|" * 6)
    lite = smaclite(bench) if bench.peers else None
    for number in bench.battles:
        mine = ours(bench, number)
        peers = smax(bench, number) if bench.peers else None, lite
        cells = [f"{mine:,.0f}", *("not installed" if x is None else f"{x:,.0f}" for x in peers)]
        cells += ["-" if x is None else f"{mine / x:,.1f}" for x in peers]
        print(f"| {number} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Bench))))
