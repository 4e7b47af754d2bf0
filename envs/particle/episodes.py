"""Episodes in particle worlds: what players earn in evaluations, in tables and films, and what is
earned while an agent learns.

A player is a function of a world, between reset() and step(): player(world) -> actions (B, N). It
reads world.obs; scripted ones read the bodies. Every world plays one episode, all at once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.particle.worlds import (
    TASKS,
    Game,
    ParticleWorld,
    Step,
    blind,
    constant,
    deliver,
    draw,
    flee,
    knows_population,
    nearest_first,
    wrong_population,
)
from envs.statistics import aligned_table, draw_rows, mean_interval, with_interval

Player = Callable[[ParticleWorld], Tensor]


def read_population(text: str) -> tuple[int, ...]:
    """ "6" -> (6,), "8,4" -> (8, 4); ValueError, one sentence, for anything else."""
    if not re.fullmatch(r"(0|[1-9]\d*)(,(0|[1-9]\d*))*", text):
        raise ValueError(f"A population is a number or, of two types, 8,4: {text} is not.")
    return tuple(map(int, text.split(",")))


def population_name(game: Game) -> str:
    """What read_population() reads: "6", "8,4"."""
    return ",".join(map(str, game.population))


# --- Evaluation -----------------------------------------------------------------------------------


def number_of(game: Game, populations: Sequence[str]) -> int:
    """Which of these populations a game is of; for another one the next larger, or the largest."""
    sizes = [sum(read_population(name)) for name in populations]
    larger = [size for size in sizes if size >= game.num_agents]
    return sizes.index(min(larger, default=max(sizes)))


def random_player(seed: int) -> Player:
    """Plays every action with the same probability."""
    rng = torch.Generator().manual_seed(seed)

    def play(world: ParticleWorld) -> Tensor:
        shape = (world.num_worlds, world.num_agents)
        return torch.randint(0, 5, shape, generator=rng).to(world.device)

    return play


def scripted_players(task: str, seed: int) -> dict[str, Player]:
    """The reference points of every table of a task."""
    players: dict[str, Player] = {"random": random_player(seed)}
    if task in ("signpost", "rooms"):
        knowing = {"knows population": knows_population, "blind": blind}
        return players | knowing | {"wrong population": wrong_population}
    if task == "delivery":
        apart = functools.partial(deliver, fear=0.15)
        return players | {"deliver": deliver, "deliver apart": apart}
    return players | {"nearest-first": nearest_first, "flee": flee}


def tell_nobody(episodes: int) -> None:
    """What play() calls if nobody wants to know how far it is."""


@torch.no_grad()
def play(
    world: ParticleWorld,
    player: Player,
    film: Path | None = None,
    progress: Callable[[int], None] = tell_nobody,
) -> np.ndarray:
    """Returns (B, types) of one episode in each world: undiscounted sums, per agent of a type. The
    film, an MP4, is of the first world. progress(n): n more episodes are played, B in all; as they
    run side by side, a step counts as its share of them."""
    world.reset()
    B = world.num_worlds
    shape = (world.num_worlds, world.num_agents)
    total = torch.zeros(shape, device=world.device)
    goes_on = torch.ones(world.num_worlds, 1, dtype=torch.bool, device=world.device)
    frames = [draw(world.game, world.state[0].cpu().numpy())] if film else []
    for t in range(world.horizon):
        step = world.step(player(world))
        total += step.reward * goes_on
        if film and goes_on[0]:
            frames.append(draw(world.game, step.final_state[0].cpu().numpy()))
        goes_on &= ~step.terminated[:, None]
        progress(B * (t + 1) // world.horizon - B * t // world.horizon)
    if film:
        save_film(film, frames)
    parts = total.split(world.game.population, 1)
    return torch.stack([part.mean(1) for part in parts], 1).cpu().numpy()


def play_all(
    evaluation: Any,
    worlds: ParticleWorld,
    players: dict[str, Player],
    seed: int,
    filmed: Container[str] = ("",),
) -> dict[str, dict[str, float]]:
    """Summaries of all players in the same episodes, one in each world: {"population player":
    summarise(...)}. evaluation: harness.Evaluation, with where films go and who is told how far it
    is; seed: of the worlds; filmed: players of whom there is a film, if there are any."""
    population = population_name(worlds.game)
    results = {}
    evaluation.expect(len(players) * worlds.num_worlds)
    for name, player in players.items():
        worlds.seed(seed)
        film = None
        if evaluation.videos and name in filmed:
            stem = f"{evaluation.stem}-{population}-{name}".rstrip("-")
            film = evaluation.videos / f"{stem}.mp4"
        returns = play(worlds, player, film, evaluation.progress)
        row = f"{population} {name}".rstrip()
        results[row] = summarise(worlds.game.task, returns)
    return results


def save_film(path: Path, frames: list[np.ndarray], fps: int = 5) -> None:
    """Frames (H, W, 3) uint8 with even sides as an MP4 (H.264)."""
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=6) as writer:
        for frame in frames:
            writer.append_data(frame)


def summarise(task: str, returns: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Of returns (episodes, types): mean per type with 95 % interval (percentile bootstrap of
    episodes) as "return", with several types as "return_pac_man" and so on."""
    rows = draw_rows(len(returns), seed=seed)
    summary: dict[str, float] = {"episodes": len(returns)}
    for role, x in zip(TASKS[task].roles, returns.T, strict=True):
        name = "return" if returns.shape[1] == 1 else f"return_{role}"
        summary[name] = float(x.mean())
        summary[f"{name}_low"], summary[f"{name}_high"] = mean_interval(x, rows)
    return summary


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: one line per row name ("population player"), with intervals."""
    if not rows:
        return ""
    first = next(iter(rows.values()))
    names = [name for name in first if f"{name}_low" in first]
    lines = [["population, player", *(name.replace("_", " of ", 1) for name in names), "episodes"]]
    for name, row in rows.items():
        cells = [with_interval(row, key, digits=2) for key in names]
        lines.append([name, *cells, str(int(row["episodes"]))])
    return aligned_table(lines)


# --- Learning -------------------------------------------------------------------------------------


def alone(x: Tensor) -> Tensor:
    """The sum over all processes, if there is but one."""
    return x


def sum_by_type(x: Tensor, game: Game) -> Tensor:
    """Numbers of agents (..., N), added up for each type (types,)."""
    parts = x.split(game.population, -1)
    return torch.stack([part.sum() for part in parts])


class EpisodeReturns:
    """Returns in the worlds of one population, in which episode follows episode."""

    def __init__(self, worlds: ParticleWorld, total: Callable[[Tensor], Tensor] = alone):
        """total: the sum over processes, all of which report together."""
        self.total, self.game, self.device = total, worlds.game, worlds.device
        B, N, types = worlds.num_worlds, worlds.num_agents, len(worlds.game.population)
        self.running = torch.zeros(B, N, device=self.device)  # of episodes that go on
        self.ended = torch.zeros(1 + types, device=self.device)  # episodes, their returns by type

    def add(self, step: Step) -> None:
        """What all worlds gave in a step."""
        ended = step.terminated | step.truncated
        returns = self.running + step.reward
        self.ended[0] += ended.sum()
        self.ended[1:] += sum_by_type(returns * ended[:, None], self.game)
        self.running = returns * ~ended[:, None]

    def report(self) -> dict[str, float]:
        """Scalars of the episodes that ended in all processes since the last report: return per
        agent, with several types of each and their mean. Nothing where there were none."""
        episodes, *sums = self.total(self.ended).tolist()
        self.ended.zero_()
        if not episodes:
            return {}
        means = [x / episodes / n for x, n in zip(sums, self.game.population)]
        name = f"return/{population_name(self.game)}"
        scalars = {"episodes": episodes, name: sum(means) / len(means)}
        if len(means) > 1:
            scalars |= {f"{name}/{kind}": x for kind, x in enumerate(means)}
        return scalars

    def state_dict(self) -> dict[str, Tensor]:
        return {"returns": self.running, "ended": self.ended}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Go on where state_dict() was taken, which may be part of a larger one."""
        self.running = saved["returns"].to(self.device)
        self.ended = saved["ended"].to(self.device)


class RewardScale:
    """How large the rewards of one population are: sums over all steps, of living agents."""

    def __init__(self, worlds: ParticleWorld, total: Callable[[Tensor], Tensor] = alone):
        """total: the sum over processes, all of which add together."""
        self.total, self.game = total, worlds.game
        types = len(worlds.game.population)
        # 1, r, r^2 (3, types)
        self.sums = torch.zeros(3, types, dtype=torch.float64, device=worlds.device)

    def add(self, rewards: Tensor, alive: Tensor) -> None:
        """Of all worlds in a step, (B, N)."""
        rewards = (rewards * alive).double()
        powers = (alive.double(), rewards, rewards * rewards)
        self.sums += self.total(torch.stack([sum_by_type(x, self.game) for x in powers]))

    def deviation(self) -> Tensor:
        """(N,): the standard deviation for each agent's type, at least .01."""
        count, total, square = self.sums
        variance = square / count - (total / count) ** 2
        deviation = variance.clamp(min=0).sqrt().float().clamp(min=0.01)
        counts = constant(self.game.population, torch.int64, deviation.device)
        return deviation.repeat_interleave(counts, output_size=self.game.num_agents)


def report_returns(populations: list[EpisodeReturns]) -> dict[str, float]:
    """What each population reports, and "return", the mean of their returns."""
    scalars, returns = {}, []
    for population in populations:
        report = population.report()
        scalars |= report
        if report:
            returns.append(report[f"return/{population_name(population.game)}"])
    if returns:
        scalars["return"] = sum(returns) / len(returns)
    return scalars
