"""How long it takes to evaluate beside the scenarios' scripted bots.

    python experiments/bench_scenarios.py --episodes 10

For each substrate: all its scenarios, whole natural episodes, with a network in the focal seats as
in an evaluation, timed as one (the engines' first builds included); then each scenario alone,
environment steps per second over --steps steps, and the same with random play on the bots' seats;
the ratio says what the bots cost. Run nothing else meanwhile.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines import mappo_meltingpot as mappo
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
from envs.meltingpot.worlds import get_spec


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to time."""

    substrates: tuple[str, ...] = PAPER
    scenarios: str = "all"  # as in --eval-scenarios
    episodes: int = 10  # per scenario, in the first table; 0 leaves it out
    steps: int = 200  # per world, in the second; 0 leaves it out
    num_envs: int = 16
    num_workers: int = 0  # 0: one per core
    seed: int = 1


def whole(bench: Bench, substrate: str) -> str:
    """A line of the first table."""
    names, rng = (
        choose_scenarios(substrate, bench.scenarios, "scripted"),
        np.random.default_rng(bench.seed),
    )
    args = mappo.Args(substrate=substrate, num_envs=1, num_workers=1)
    with mappo.make_envs(args, 1, bench.seed) as envs:
        agent = mappo.Agent(args, envs.spec, torch.device("cpu"))

    def new_player(envs):
        sprites = mappo.Sprites(envs, agent.device)
        return mappo.net_player(agent.actor, sprites, agent.spec.num_agents, bench.seed)

    began = time.perf_counter()
    how = (bench.episodes, bench.num_envs, rng, agent.spec.num_agents)
    options = {"num_workers": bench.num_workers}
    played = play_scenarios(names, "scripted", new_player, *how, **options)
    seconds = time.perf_counter() - began
    steps = sum(result.length for results in played.values() for result in results)
    return f"| {substrate} | {len(names)} | {steps} | {seconds:.0f} | {steps / seconds:.0f} |"


def speed(bench: Bench, plan) -> float:
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


def check(bench: Bench) -> None:
    """ValueError, one sentence, for what cannot be timed."""
    if bench.num_envs < 1:
        raise ValueError(f"--num-envs {bench.num_envs} is not positive.")
    for name in ("episodes", "steps", "num_workers", "seed"):
        if getattr(bench, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(bench, name)} is negative.")
    for substrate in bench.substrates:
        get_spec(substrate)
        names = choose_scenarios(substrate, bench.scenarios, "scripted")
        if not names:
            raise ValueError(f"{substrate} has no scenarios with scripted bots.")
        choose_bots([get_plan(name) for name in names], "scripted")


def main(bench: Bench) -> None:
    """Print both tables."""
    try:
        check(bench)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(1)
    if bench.episodes:
        print(f"All scenarios, {bench.episodes} whole episodes each:\n")
        print(
            "| substrate | scenarios | counted steps | seconds | steps/s |\n|---|---|---|---|---|"
        )
        for substrate in bench.substrates:
            print(whole(bench, substrate), flush=True)
    if not bench.steps:
        return
    print(f"\nOne scenario, {bench.num_envs} worlds, random focal players:\n")
    print("| scenario | focal / bots | steps/s | with random bots | ratio |\n|---|---|---|---|---|")
    for substrate in bench.substrates:
        for name in choose_scenarios(substrate, bench.scenarios, "scripted"):
            plan = get_plan(name)
            bare_plan = plan._replace(bots=tuple(names and (RANDOM,) for names in plan.bots))
            ours, bare = speed(bench, plan), speed(bench, bare_plan)
            bots = sum(bool(names) for names in plan.bots)
            seats = f"{len(plan.bots) - bots} / {bots}"
            label = f"{substrate} {short(name)}"
            print(
                f"| {label} | {seats} | {ours:.0f} | {bare:.0f} | {ours / bare:.2f} |", flush=True
            )


if __name__ == "__main__":
    main(tyro.cli(Bench))
