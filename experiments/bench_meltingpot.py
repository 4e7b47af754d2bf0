"""Speed of the worlds and of whole training; ratios measured in one run.

    python experiments/bench_meltingpot.py                      this machine, the paper's batch
    python experiments/bench_meltingpot.py --device cuda --num-envs 512 --num-workers 14

Prints three Markdown tables. Worlds: steps per second of one process, our direct reading with tile
ids against the official wrapper without, both stepping the same actions by turns; "bare" is the
ratio that a reader would reach which only advances the engine and draws the images; resets are ours
and the official wrapper's. Training: one process of MAPPO or BiDist with tile ids and with
--pixels, split into worlds, acting and learning. Memory: a rollout's images as ids and as pixels.
Run nothing else meanwhile.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bidist_mappo_meltingpot as bidist
from baselines import mappo_meltingpot as mappo
from envs.meltingpot.tiles import Observation, Palette
from envs.meltingpot.worlds import Engine, get_spec, import_meltingpot, quiet

PAPER = (
    "chicken_in_the_matrix__repeated",
    "pure_coordination_in_the_matrix__repeated",
    "coins",
    "coop_mining",
    "prisoners_dilemma_in_the_matrix__arena",
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure."""

    substrates: Annotated[tuple[str, ...], tyro.conf.Positional] = PAPER
    parts: tuple[Literal["worlds", "training", "memory"], ...] = ("worlds", "training", "memory")
    script: Literal["mappo", "bidist"] = "mappo"  # of the training table
    rounds: int = 7  # ours and official by turns, or iterations with ids and with pixels
    steps: int = 300  # per turn
    num_envs: int = 16  # worlds in training; 16 times 200 steps are the paper's batch
    num_workers: int = 0  # 0: one per core
    num_threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    amp: bool = False  # critic in bf16, for both kinds
    pixel_rounds: int = 3  # iterations with --pixels, which are slow; 0 leaves them out


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


def bench_worlds(bench: Bench) -> None:
    print("| substrate | players | ours, with ids | official, without | ratio | bare | resets |")
    print("|---|---|---|---|---|---|---|")
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
        print(
            f"| {name} | {spec.num_agents} | {ours:,.0f} | {official:,.0f} | "
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] | "
            f"{statistics.median(limits):.2f} | "
            f"{', '.join(f'{1000 * statistics.median(x):.0f} ms' for x in resets[:2])} |",
            flush=True,
        )


def bench_training(bench: Bench) -> None:
    script = {"mappo": mappo, "bidist": bidist}[bench.script]
    print("| substrate | kind | steps/s | worlds | acting | learning | ids over pixels |")
    print("|---|---|---|---|---|---|---|")
    for name in bench.substrates:
        speed = {}
        for kind, rounds in (("ids", bench.rounds), ("pixels", bench.pixel_rounds)):
            if rounds:
                seconds = training_seconds(script, bench, name, kind, rounds)
                total = sum(seconds.values())
                speed[kind] = 200 * bench.num_envs / total
                cells = " | ".join(f"{x:.2f} s" for x in seconds.values())
                ratio = f"{speed['ids'] / speed['pixels']:.1f}" if "pixels" in speed else ""
                print(f"| {name} | {kind} | {speed[kind]:,.0f} | {cells} | {ratio} |", flush=True)


def training_seconds(script: Any, bench: Bench, name: str, kind: str, rounds: int) -> dict:
    """Medians of one iteration's parts: worlds, acting, learning."""
    flags = ["--substrate", name, "--num-envs", str(bench.num_envs), "--device", bench.device]
    flags += ["--num-workers", str(bench.num_workers), "--worker-timeout", "120"]
    flags += ["--num-threads", str(bench.num_threads)]
    flags += ["--pixels"] * (kind == "pixels") + ["--amp"] * bench.amp
    args = script.parse(flags)
    _, _, device = script.start_processes(args)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    parts: dict[str, list[float]] = {"worlds": [], "acting": [], "learning": []}
    with script.make_envs(args, args.num_envs, 1) as envs:
        agent, sprites = script.Agent(args, envs.spec, device), script.Sprites(envs, device)
        carry = script.new_carry(agent, args.num_envs)
        rngs = [torch.Generator().manual_seed(k) for k in range(2 if script is bidist else 1)]
        envs.reset()
        stepping, step = [0.0], envs.step

        def timed(actions: np.ndarray) -> Any:
            wait()
            began = time.perf_counter()
            result = step(actions)
            stepping[0] += time.perf_counter() - began
            return result

        envs.step = timed
        if script is bidist:
            rounds = max(rounds, 2 * args.k_d)  # one distillation of each kind
        for number in range(rounds + 1):
            stepping[0], began = 0.0, time.perf_counter()
            batch = script.collect(args, envs, agent, carry, sprites, *rngs)
            wait()
            collected = time.perf_counter()
            script.update(args, agent, batch, carry, sprites, rngs[0], envs.check)
            if script is bidist and script.distillation_phase(args, number):
                rest = (agent, batch, carry, sprites, rngs[1], envs.check)
                script.distill(args, script.distillation_phase(args, number), *rest)
            wait()
            if number:  # the first iteration warms up
                parts["worlds"].append(stepping[0])
                parts["acting"].append(collected - began - stepping[0])
                parts["learning"].append(time.perf_counter() - collected)
    centre = statistics.mean if script is bidist else statistics.median  # 2 in 10 distill
    return {part: centre(values) for part, values in parts.items()}


def bench_memory(bench: Bench) -> None:
    print("| substrate | views: ids | pixels | ratio | all images: ids | pixels | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in bench.substrates:
        spec, states = get_spec(name), 200 * bench.num_envs
        views = states * spec.num_agents * np.prod(spec.grid)
        every = views + states * np.prod(spec.world_grid)
        cells = []
        for tiles in (views, every):
            ids, pixels = 2 * tiles, 192 * tiles  # uint16, against 8 x 8 x 3 bytes
            cells += [f"{ids / 1e6:.1f} MB", f"{pixels / 1e6:,.0f} MB", f"{pixels / ids:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    bench = tyro.cli(Bench)
    gpu = f", {torch.cuda.get_device_name()}" if bench.device == "cuda" else ""
    cpu = next(
        (
            x.split(": ")[1]
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        platform.processor(),
    )
    print(f"{cpu}{gpu}, torch {torch.__version__}, {bench}\n")
    for part in bench.parts:
        {"worlds": bench_worlds, "training": bench_training, "memory": bench_memory}[part](bench)
        print()


if __name__ == "__main__":
    main()
