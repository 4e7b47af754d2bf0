"""Speed of REFIL's learner beside two plain ones, and of whole training.

    python experiments/bench_refil.py
    python experiments/bench_refil.py --limits 50 150 --team-sizes 8
    python experiments/bench_refil.py --limits --iterations 10            whole training only

First table: one update on 32 episodes of random play, CPU seconds on one thread. "steps" is the
plain learner of tests/test_refil.py (a time, a mask and a hypernetwork at once, all slots, padded
time); "folded" is arranged as the authors' code is (times folded into the batch, three masks as
three batches, only the GRU step by step). Both in fp32, with gradients, clipping and RMSprop. The
ratio is "folded" / ours. Second table: environment steps per CPU second of training, collecting and
updating, without evaluations. With --device cuda seconds are the clock's, in both tables.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from figures import Positive, Seed, UsageError, check_bounds, load_script, one_line_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_refil import Plain, all_slots, episodes_of


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to time."""

    limits: tuple[Positive, ...] = (50, 150)  # steps of an episode, at most
    team_sizes: tuple[Positive, ...] = (3, 4, 5)
    widths: tuple[Positive, ...] = (128, 64)  # H: the paper's, and --preset cpu's
    repeats: Positive = 3  # of each measurement; the smallest counts
    plain: bool = True  # whether the plain learners are timed, too; on a CPU only
    presets: tuple[str, ...] = ("cpu", "paper")  # of the second table; none: not at all
    iterations: Positive = 3  # that it times
    seed: Seed = 1
    device: Literal["cpu", "cuda"] = "cpu"  # of learning


class Folded(Plain):
    """The same loss with times folded into the batch, as in the authors' code."""

    def utilities(self, net: Any, e: Any, mask: torch.Tensor) -> torch.Tensor:
        """(T + 1, V B, 8, actions) for mask (T + 1, V B, 8, 16)."""
        views = mask.shape[1] // len(e.empty)
        entities, empty = e.entities.repeat(1, views, 1, 1), e.empty.repeat(views, 1)
        (T, B), agents = mask.shape[:2], empty[:, :8, None]
        x = F.relu(net.first(entities)).flatten(0, 1)
        query, pair = net.attention.query[0], net.attention.pair[0]
        x = net.out(self.attention(x, query, pair, mask.flatten(0, 1))).unflatten(0, (T, B))
        x = F.relu(net.second(x.masked_fill(agents, 0.0))).flatten(1, 2)
        hidden, found = torch.zeros_like(x[0]), []
        cell = (net.gru.weight_ih_l0, net.gru.weight_hh_l0, net.gru.bias_ih_l0, net.gru.bias_hh_l0)
        for now in x:
            hidden = torch.gru_cell(now, hidden, *cell)
            found.append(hidden)
        q = net.last(torch.stack(found)).view(T, B, 8, -1)
        return q.masked_fill(agents, 0.0)

    def loss(self, e: Any, groups: torch.Tensor) -> torch.Tensor:
        """groups (B, 16)."""
        agent, args, (T, B) = self.agent, self.args, e.rewards.shape
        apart = groups[:, :8, None] != groups[:, None]
        masks = torch.cat((e.unseen, e.unseen | apart, e.unseen | ~apart), 1)
        qs = self.utilities(agent.utility, e, masks)
        with torch.no_grad():
            target_q = self.utilities(agent.target_utility, e, e.unseen)
            best = qs[:, :B].masked_fill(~e.avail, -1e9).argmax(-1, keepdim=True)
            next_q = target_q[1:].gather(-1, best[1:])[..., 0].flatten(0, 1)
            later = self.mix(agent.target_mixer, next_q, fold(e, 1, T + 1), 0).view(T, B)
            over = e.terminated | (torch.arange(1, T + 1)[:, None] == e.length)
            y = e.rewards + args.gamma * later * ~over
        actions = e.actions.repeat(1, 3, 1)[..., None]
        own, within, across = qs[:-1].gather(-1, actions)[..., 0].chunk(3, 1)
        now, both = fold(e, 0, T), torch.cat((within, across), -1).flatten(0, 1)
        totals = (
            self.mix(agent.mixer, own.flatten(0, 1), now, 0),
            self.mix(agent.mixer, both, now, 0, groups.repeat(T, 1)),
        )
        td, imagined = (
            ((x.view(T, B) - y).square() * e.filled).sum() / e.filled.sum() for x in totals
        )
        return (1 - args.imagine_weight) * td + args.imagine_weight * imagined


def fold(e: Any, first: int, last: int) -> SimpleNamespace:
    """Some times of a minibatch as the battles of one."""
    T = last - first
    entities, avail = (x[first:last].flatten(0, 1)[None] for x in (e.entities, e.avail))
    return SimpleNamespace(entities=entities, avail=avail, empty=e.empty.repeat(T, 1))


def clock(bench: Bench) -> float:
    """CPU time on a CPU; on a GPU the clock, when all that was asked of it is done."""
    if bench.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], Any], bench: Bench, repeats: int) -> float:
    """The smallest time of several calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = clock(bench)
        function()
        times.append(clock(bench) - start)
    return min(times[1:])


def begin(script: Any, flags: str, bench: Bench, rounds: int) -> SimpleNamespace:
    """An agent and a replay of random play; UsageError for flags that the script refuses."""
    sizes = " ".join(map(str, bench.team_sizes))
    device = torch.device(bench.device)
    try:
        args = script.parse(script.with_preset(f"{flags} --team-sizes {sizes}".split()))
        battles = script.make_envs(args, args.team_sizes, args.num_envs, bench.seed)
    except script.RunError as error:
        raise UsageError(str(error)) from None
    agent, replay = script.Agent(args, battles.family, device), script.Replay(args, battles, device)
    rng = torch.Generator().manual_seed(bench.seed)
    for _ in range(rounds):
        script.collect(agent, replay, 1.0, rng)
    return SimpleNamespace(args=args, battles=battles, agent=agent, replay=replay, rng=rng)


def step(script: Any, s: SimpleNamespace, loss: torch.Tensor) -> None:
    script.descend(loss, s.agent.learning(), s.agent.optimiser, s.args.max_grad_norm)


def time_update(script: Any, limit: int, width: int, mixer: str, bench: Bench) -> None:
    """Lines of the first table: fp32 and bf16."""
    flags = f"--mixer {mixer} --hidden-size {width} --max-episode-steps {limit} --amp "
    s = begin(script, flags + "--updates-per-iteration 1", bench, 8)
    e = episodes_of(s, bench.seed, 32)
    batch = s.replay.sample(torch.Generator().manual_seed(bench.seed), 32)
    groups = script.draw_groups(batch.view, s.rng)
    cells = ["", ""]
    folded = 0.0
    if bench.plain and bench.device == "cpu":
        full = all_slots(groups, batch.view, 32)
        plain, other = Plain(s.args, s.agent), Folded(s.args, s.agent)
        a, b = plain.loss(e, full).item(), other.loss(e, full).item()
        assert abs(a - b) < 1e-4 * abs(a), "the two plain learners differ"
        steps = seconds(lambda: step(script, s, plain.loss(e, full)), bench, 1)
        folded = seconds(lambda: step(script, s, other.loss(e, full)), bench, bench.repeats)
        cells = [f"{steps:.2f}", f"{folded:.2f}"]

    def ours() -> None:
        batch = s.replay.sample(torch.Generator().manual_seed(bench.seed), 32)
        step(script, s, script.losses(s.args, s.agent, batch, groups)[0])

    fast = s.agent.amp
    for amp in (False, True) if fast else (False,):
        s.agent.amp = amp
        mine = seconds(ours, bench, bench.repeats)
        name = f"{limit} ({len(batch.step)} of {32 * len(e.rewards)})"
        row = [name, str(width), mixer, "bf16" if amp else "fp32", *cells, f"{mine:.2f}"]
        print("| " + " | ".join([*row, f"{folded / mine:.1f}"]) + " |", flush=True)


def time_training(script: Any, preset: str, bench: Bench) -> None:
    """A line of the second table."""
    s = begin(script, f"--preset {preset}", bench, 4)
    steps, start = 0, clock(bench)
    for _ in range(bench.iterations):
        episodes = script.collect(s.agent, s.replay, 1.0, s.rng)
        script.update(s.args, s.agent, s.replay, s.rng)
        steps += sum(episode.length for episode in episodes)
    speed = steps / (clock(bench) - start)
    print(f"| {preset} | {s.args.updates_per_iteration} | {speed:.0f} |", flush=True)


def main(bench: Bench) -> None:
    """Print the tables."""
    check_bounds(bench)
    torch.set_num_threads(1)
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here.")
    script = load_script("refil_smac")
    if bench.limits:
        print("| limit (steps of padded) | H | mixer | ours in | steps | folded | ours | ratio |")
        print("|" + "---|" * 8)
    for limit, width in itertools.product(bench.limits, bench.widths):
        for mixer in ("flex", "linear"):
            time_update(script, limit, width, mixer, bench)
    if bench.presets:
        print("\n| preset | updates an iteration | environment steps per second |")
        print("|---|---|---|")
    for preset in bench.presets:
        time_training(script, preset, bench)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Bench))))
