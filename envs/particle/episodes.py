"""Episodes in particle worlds: evaluation of players, with tables and films, and the returns and
scales of rewards in training.

A player is a function player(world) -> actions (B, N) int64, called after reset() or step(). It
reads world.obs; scripted players read the state. play() plays one episode in each world, all at
once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs import films
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
    """A population from its name: "6" -> (6,), "8,4" -> (8, 4); ValueError for other texts."""
    if not re.fullmatch(r"(0|[1-9]\d*)(,(0|[1-9]\d*))*", text):
        raise ValueError(f"A population is a number or, of two types, 8,4: {text} is not.")
    return tuple(map(int, text.split(",")))


def population_name(game: Game) -> str:
    """The name of a game's population, "6" or "8,4", as read_population() reads it."""
    return ",".join(map(str, game.population))


# --- Evaluation -----------------------------------------------------------------------------------


def number_of(game: Game, populations: Sequence[str]) -> int:
    """Index of the game's own population; of an unseen one that of the smallest population with at
    least as many agents, or of the largest. Of several of that size it is the first."""
    known = [read_population(name) for name in populations]
    if game.population in known:
        return known.index(game.population)
    sizes = [sum(population) for population in known]
    return sizes.index(next_size(game.num_agents, sizes))


def next_size(size: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that are not below size, else the largest of all (of none: 0)."""
    return min((x for x in sizes if x >= size), default=max(sizes, default=0))


def first_unclear(unseen: Sequence[str], populations: Sequence[str]) -> str:
    """The first unseen population whose number_of() is the first of several of the same size; "" if
    there is none, or if a name is no population, which make_envs() refuses. unseen may have ""."""
    try:
        known = [read_population(name) for name in populations]
        others = {name: read_population(name) for name in unseen if name}
    except ValueError:
        return ""
    sizes = [sum(population) for population in known]
    for name, population in others.items():
        if population not in known and sizes.count(next_size(sum(population), sizes)) > 1:
            return name
    return ""


def random_player(seed: int) -> Player:
    """A player that draws each action with the same probability; own generator."""
    rng = torch.Generator().manual_seed(seed)

    def play(world: ParticleWorld) -> Tensor:
        shape = (world.num_worlds, world.num_agents)
        return torch.randint(0, 5, shape, generator=rng).to(world.device)

    return play


def scripted_players(task: str, seed: int) -> dict[str, Player]:
    """{name: player} with which tables of a task compare learned players, those of a task of your
    own among them; seed: of the random one."""
    players: dict[str, Player] = {"random": random_player(seed)}
    if task in ("signpost", "rooms"):
        knowing = {"knows population": knows_population, "blind": blind}
        return players | knowing | {"wrong population": wrong_population}
    if task == "delivery":
        apart = functools.partial(deliver, fear=0.15)
        return players | {"deliver": deliver, "deliver apart": apart}
    if task in ("treasure", "resource", "pacman"):
        return players | {"nearest-first": nearest_first, "flee": flee}
    return players | TASKS[task].players


def tell_nobody(episodes: int) -> None:
    """The default of play()'s `progress`: does nothing."""


@torch.no_grad()
def play(
    world: ParticleWorld,
    player: Player,
    film: Path | None = None,
    progress: Callable[[int], None] = tell_nobody,
) -> np.ndarray:
    """Play an episode in each world. Returns (B, types) float32: undiscounted returns, means of the
    agents of a type. film: path of an MP4 of the first world. progress(n) is called after each step
    with its share n of the B episodes; all n add up to B."""
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


def best_of(evaluation: Any, worlds: ParticleWorld, players: dict[Any, Player], seed: int) -> Any:
    """Return the name of the player with the largest return, mean over agents, in which what types
    take from each other cancels, and episodes. All play in the same worlds, those of `seed`."""
    evaluation.expect(worlds.num_worlds * len(players))
    returns = {}
    for name, player in players.items():
        worlds.seed(seed)
        mean = play(worlds, player, progress=evaluation.progress).mean(0)  # of each type
        returns[name] = np.average(mean, weights=worlds.game.population)
    return max(returns, key=returns.get)


def play_all(
    evaluation: Any,
    worlds: ParticleWorld,
    players: dict[str, Player],
    seed: int,
    filmed: Container[str] = ("",),
) -> dict[str, dict[str, float]]:
    """Play the same episodes, one in each world, with all players. Returns {"population player":
    summarise(...)}. evaluation: harness.Evaluation, which has the folder of films and the progress
    bar; seed: of the worlds; filmed: names of players that are filmed if films are asked for."""
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
    """Write frames (H, W, 3) uint8, H and W even, to an MP4 (H.264); fps: frames per second."""
    with films.writing(path, fps) as writer:
        for frame in frames:
            writer.append_data(frame)


def summarise(task: str, returns: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of returns (episodes, types) per type, with its 95 % percentile bootstrap interval over
    episodes: "return", "return_low", "return_high"; with several types "return_pac_man", ..."""
    rows = draw_rows(len(returns), seed=seed)
    summary: dict[str, float] = {"episodes": len(returns)}
    for role, x in zip(TASKS[task].roles, returns.T, strict=True):
        name = "return" if returns.shape[1] == 1 else f"return_{role}"
        summary[name] = float(x.mean())
        summary[f"{name}_low"], summary[f"{name}_high"] = mean_interval(x, rows)
    return summary


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of play_all()'s results, one line for each {"population player": result}."""
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
    """The default of `total`, the sum over all processes: with one process x itself."""
    return x


def sum_by_type(x: Tensor, game: Game) -> Tensor:
    """(types,): x (..., N) summed over the agents of each type and all leading axes."""
    parts = x.split(game.population, -1)
    return torch.stack([part.sum() for part in parts])


class EpisodeReturns:
    """Returns of the training episodes in the worlds of one population."""

    def __init__(self, worlds: ParticleWorld, total: Callable[[Tensor], Tensor] = alone):
        """total: the sum over processes; all processes have to call report() together."""
        self.total, self.game, self.device = total, worlds.game, worlds.device
        B, N, types = worlds.num_worlds, worlds.num_agents, len(worlds.game.population)
        self.running = torch.zeros(B, N, device=self.device)  # returns so far of present episodes
        self.ended = torch.zeros(1 + types, device=self.device)  # episodes; sum of returns by type

    def add(self, step: Step) -> None:
        """Add the rewards of one step of all worlds."""
        ended = step.terminated | step.truncated
        returns = self.running + step.reward
        self.ended[0] += ended.sum()
        self.ended[1:] += sum_by_type(returns * ended[:, None], self.game)
        self.running = returns * ~ended[:, None]

    def report(self) -> dict[str, float]:
        """Scalars of episodes that ended in all processes since the last report; {} if none:
        "episodes", "return/8,4" (return per agent, mean of types), "return/8,4/0" (of type 0)..."""
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
        return {"returns": self.running.clone(), "ended": self.ended.clone()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore a state_dict(), which may be part of a larger dictionary."""
        self.running = saved["returns"].clone().to(self.device)
        self.ended = saved["ended"].clone().to(self.device)


class RewardScale:
    """Standard deviation of one population's rewards, over all steps of living agents so far."""

    def __init__(self, worlds: ParticleWorld, total: Callable[[Tensor], Tensor] = alone):
        """total: the sum over processes; all processes have to call add() together."""
        self.total, self.game = total, worlds.game
        types = len(worlds.game.population)
        # sums of 1, r and r^2 by type, (3, types)
        self.sums = torch.zeros(3, types, dtype=torch.float64, device=worlds.device)

    def add(self, rewards: Tensor, alive: Tensor) -> None:
        """Add the rewards (B, N) of a step; alive (B, N) bool: agents that count."""
        rewards = (rewards * alive).double()
        powers = (alive.double(), rewards, rewards * rewards)
        self.sums += self.total(torch.stack([sum_by_type(x, self.game) for x in powers]))

    def deviation(self) -> Tensor:
        """(N,) float32: the standard deviation of each agent's type, at least .01."""
        count, total, square = self.sums
        count = count.clamp(min=1)  # none before the first add()
        variance = square / count - (total / count) ** 2
        deviation = variance.clamp(min=0).sqrt().float().clamp(min=0.01)
        counts = constant(self.game.population, torch.int64, deviation.device)
        return deviation.repeat_interleave(counts, output_size=self.game.num_agents)


def report_returns(populations: list[EpisodeReturns]) -> dict[str, float]:
    """All populations' report() in one dictionary, "episodes" of all of them, and "return", the
    mean of their returns."""
    scalars, returns, episodes = {}, [], 0
    for population in populations:
        report = population.report()
        scalars |= report
        if report:
            returns.append(report[f"return/{population_name(population.game)}"])
            episodes += report["episodes"]
    if returns:
        scalars |= {"return": sum(returns) / len(returns), "episodes": episodes}
    return scalars
