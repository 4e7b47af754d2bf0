"""What MIPI costs beside its parent: one update each, and whole training.

    python experiments/bench_mipi.py
    python experiments/bench_mipi.py --widths 64 --limits 50
    python experiments/bench_mipi.py --limits --iterations 10                 whole training only

First table: seconds of one update on 32 episodes of random play, on one thread: REFIL with the
linear mixer, and MIPI with M alternations, cached (heads only but in the last) and literal
(networks run in each). They take turns in one process; the smallest time counts, CPU time on a CPU.
Second table: environment steps per second of training, collecting and updating, no evaluations.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import tyro
from annotated_types import MinLen
from bench_refil import begin, clock
from figures import Positive, Seed, UsageError, check_bounds, load_script, one_line_errors


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to time."""

    limits: tuple[Positive, ...] = (50, 150)  # steps of an episode, at most
    team_sizes: tuple[Positive, ...] = (3, 4, 5)
    widths: tuple[Positive, ...] = (128, 64)  # H: the paper's, and --preset cpu's
    alternations: Annotated[tuple[Positive, ...], MinLen(1)] = (1, 4)  # M
    repeats: Positive = 3  # of each update
    presets: tuple[str, ...] = ("cpu", "paper")  # of the second table; none: not at all
    iterations: Positive = 3  # that it times
    seed: Seed = 1
    device: Literal["cpu", "cuda"] = "cpu"  # of learning; on cuda seconds are the clock's


def one_update(script: Any, s: SimpleNamespace) -> None:
    s.rng.manual_seed(s.args.seed)  # the same episodes each time
    script.update(s.args, s.agent, s.replay, s.rng)


def time_updates(limit: int, width: int, amp: bool, bench: Bench) -> None:
    """Lines of the first table."""
    refil, mipi = load_script("refil_smac"), load_script("mipi_refil_smac")
    flags = f"--hidden-size {width} --max-episode-steps {limit} --updates-per-iteration 1"
    flags += " --amp" if amp else ""
    kinds = {"REFIL, linear": (refil, "--mixer linear")}
    for m in bench.alternations:
        kinds[f"MIPI, M = {m}"] = mipi, f"--ba-iterations {m}"
    last = f"--ba-iterations {bench.alternations[-1]} --literal-blahut-arimoto"
    kinds[f"MIPI, M = {bench.alternations[-1]}, literal"] = mipi, last
    made = {
        name: (script, begin(script, f"{flags} {more}", bench, 8))
        for name, (script, more) in kinds.items()
    }
    times = {name: [] for name in made}
    for repeat in range(bench.repeats + 1):  # the first does not count
        for name, (script, s) in made.items():
            start = clock(bench)
            one_update(script, s)
            if repeat:
                times[name].append(clock(bench) - start)
    base = min(times["REFIL, linear"])
    for name, found in times.items():
        digits = "bf16" if made[name][1].agent.amp else "fp32"
        row = [
            str(limit),
            str(width),
            digits,
            name,
            f"{min(found):.2f}",
            f"{min(found) / base:.2f}",
        ]
        print("| " + " | ".join(row) + " |", flush=True)


def time_training(preset: str, bench: Bench) -> None:
    """Lines of the second table."""
    for name, mixer in (("refil_smac", " --mixer linear"), ("mipi_refil_smac", "")):
        script = load_script(name)
        s = begin(script, f"--preset {preset}{mixer}", bench, 4)
        steps, start = 0, clock(bench)
        for _ in range(bench.iterations):
            episodes = script.collect(s.agent, s.replay, 1.0, s.rng)
            script.update(s.args, s.agent, s.replay, s.rng)
            steps += sum(episode.length for episode in episodes)
        print(f"| {preset} | {name} | {steps / (clock(bench) - start):.0f} |", flush=True)


def main(bench: Bench) -> None:
    """Print the tables."""
    check_bounds(bench)
    torch.set_num_threads(1)
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here.")
    fast = load_script("refil_smac").has_bf16(torch.device(bench.device))
    if bench.limits:
        print("| limit | H | in | update | seconds | to REFIL's |\n|---|---|---|---|---|---|")
    for limit in bench.limits:
        for width in bench.widths:
            for amp in (False, True) if fast else (False,):
                time_updates(limit, width, amp, bench)
    if bench.presets:
        print("\n| preset | script | environment steps per second |\n|---|---|---|")
    for preset in bench.presets:
        time_training(preset, bench)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Bench))))
