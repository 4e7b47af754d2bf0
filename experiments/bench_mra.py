"""Speed of MRA's learner: an update cycle, memory of a replay, and how fast returns rise.

    python experiments/bench_mra.py
    python experiments/bench_mra.py --presets fast paper --cpu-seconds 120 --no-cycles

First table: one cycle of the paper's size (K = 10 minibatches of 1024 for critic and actor, phi,
psi and xi) in resource occupation, CPU milliseconds on one thread, with plain and with compiled
pair kernels; "round" is one minibatch, critic and actor. Second: bytes of a transition in the
replay. Third: returns of fresh episodes (z drawn from p(z|m)) after so many CPU seconds of training
(after compilation, evaluations left out).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from annotated_types import Interval
from figures import Above, Positive, Seed, check_bounds, load_script, one_line_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.particle.episodes import play

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to time."""

    numbers: tuple[Positive, ...] = (6, 12, 24)  # N of the first table
    repeats: Positive = 3  # of each measurement; the smallest counts
    cycles: bool = True  # first table
    presets: tuple[str, ...] = ("fast",)  # of the third; none: not at all
    populations: tuple[str, ...] = ("6", "9", "12")  # of resource, in the third
    cpu_seconds: Above = 120.0  # of training
    every: Above = 15.0  # CPU seconds between lines
    episodes: Annotated[int, Interval(ge=2)] = 500  # of each line and population
    seed: Seed = 1


def begin(script: Any, flags: str) -> tuple[Any, list, Any, dict]:
    """Arguments, arenas, agent and generators as train() makes them."""
    args = script.parse(script.with_preset(flags.split()))
    arenas = [script.Arena(args, name, CPU) for name in args.populations]
    agent = script.Agent(args, arenas[0].game, CPU)
    rngs = {"rng": torch.Generator().manual_seed(args.seed)}
    rngs["latent_rng"] = torch.Generator().manual_seed(args.seed + 2**32)
    script.begin(args, agent, arenas, rngs["latent_rng"])
    return args, arenas, agent, rngs


def cpu_ms(function: Callable[[], Any], repeats: int) -> float:
    """The smallest CPU time of several calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start))
    return min(times[1:])


def time_cycle(script: Any, number: int, compiled: bool, repeats: int) -> list[float]:
    """Round, phi, psi and xi, whole cycle; milliseconds."""
    other = 9 if number != 9 else 6
    flags = f"--task resource --populations {number} {other} --buffer-size 20000"
    args, arenas, agent, rngs = begin(script, flags + (" --compile" if compiled else ""))
    for arena in arenas:
        for _ in range(120):
            script.collect(agent, arena, **rngs)
    first = arenas[0]
    view = first.sample(agent, rngs["rng"], args.batch_size).view
    once = dataclasses.replace(args, inner_steps=1, adapt="no phi, psi and xi")
    only_phi = dataclasses.replace(args)
    learn = lambda a, names: script.latent_update(  # noqa: E731
        a, agent, names, arenas, rngs["latent_rng"]
    )
    no_phi = dataclasses.replace(args, phi_gradient="actor")
    both = cpu_ms(lambda: learn(only_phi, {first.name: view}), repeats)
    latent = cpu_ms(lambda: learn(no_phi, {}), repeats)
    one = cpu_ms(lambda: script.update(once, agent, [first], arenas, **rngs), repeats)
    whole = cpu_ms(lambda: script.update(args, agent, [first], arenas, **rngs), repeats)
    return [one, both - latent, latent, whole]


def cycle_table(script: Any, bench: Bench) -> None:
    print("| N | pair kernels | round | phi | psi, xi | cycle (K = 10), CPU ms |\n|" + "---|" * 6)
    for number in bench.numbers:
        found = {}
        for compiled in (False, True):
            found[compiled] = time_cycle(script, number, compiled, bench.repeats)
            cells = " | ".join(f"{x:.0f}" for x in found[compiled])
            print(f"| {number} | {'compiled' if compiled else 'plain'} | {cells} |", flush=True)
        print(f"N = {number}: plain / compiled {found[False][3] / found[True][3]:.1f}", flush=True)


def replay_table(script: Any) -> None:
    print("\n| world | N | bytes of a transition |\n|---|---|---|")
    for task, names in (("treasure", "3 6 12 24 48"), ("resource", "6 9 12 15 24")):
        _, arenas, _, _ = begin(script, f"--task {task} --populations {names} --buffer-size 1024")
        for arena in arenas:
            size = sum(x[0].numel() * x.element_size() for x in arena.replay.values())
            print(f"| {task} | {arena.name} | {size} |")


def returns(script: Any, args: Any, agent: Any, arenas: list, bench: Bench) -> list[float]:
    """Of fresh episodes, per population."""
    found = []
    for arena in arenas:
        world = script.make_envs(args, arena.name, bench.episodes, bench.seed + 12345)
        rng = torch.Generator().manual_seed(bench.seed)
        z = script.draw_latents(agent, world.game, (bench.episodes,), rng)
        found.append(float(play(world, script.net_player(agent, z, bench.seed)).mean()))
    return found


def learn(script: Any, preset: str, bench: Bench) -> None:
    """Train with a preset and print returns on the way."""
    names = " ".join(bench.populations)
    flags = f"--task resource --populations {names} --preset {preset} --seed {bench.seed} --compile"
    for warm in (True, False):  # the first compiles
        args, arenas, agent, rngs = begin(script, flags)
        clock, printed, iteration, updates, total = 0.0, 0.0, 0, 0, 0
        while clock < bench.cpu_seconds:
            start = time.process_time()
            arena = arenas[iteration // args.max_episode_steps % len(arenas)]
            before, iteration = arena.steps, iteration + 1
            script.collect(agent, arena, **rngs)
            total += args.num_envs
            due = script.is_due(args.update_every, before, arena.steps)
            if due and arena.size >= args.batch_size:
                script.update(args, agent, [arena], arenas, **rngs)
                updates += 1
            clock += time.process_time() - start
            if warm and updates:
                break
            if clock >= printed + bench.every or clock >= bench.cpu_seconds:
                printed = clock
                cells = [f"{x:.1f}" for x in returns(script, args, agent, arenas, bench)]
                line = [preset, f"{clock:.0f}", str(total), str(updates * args.inner_steps), *cells]
                print("| " + " | ".join(line) + " |", flush=True)


def main(bench: Bench) -> None:
    """Print the tables."""
    check_bounds(bench)
    torch.set_num_threads(1)
    script = load_script("mra_maddpg_particle")
    script.keep_freed_memory()
    if bench.cycles:
        cycle_table(script, bench)
        replay_table(script)
    if bench.presets:
        names = " | ".join(f"return {name}" for name in bench.populations)
        print(f"\n| preset | CPU s | environment steps | minibatches | {names} |")
        print("|" + "---|" * (4 + len(bench.populations)))
    for preset in bench.presets:
        learn(script, preset, bench)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Bench))))
