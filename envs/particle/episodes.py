"""Playing episodes in particle worlds for evaluation: what players earn, in tables and films.

A player is a function of a world, between reset() and step(): player(world) -> actions (B, N). It
reads world.obs; scripted ones read the bodies. Every world plays one episode, all at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs.particle.worlds import TASKS, ParticleWorld, draw, flee, nearest_first
from envs.statistics import aligned_table, draw_rows, mean_interval, with_interval

Player = Callable[[ParticleWorld], Tensor]


def read_population(text: str) -> tuple[int, ...]:
    """ "6" -> (6,), "8,4" -> (8, 4); ValueError, one sentence, for anything else."""
    if not re.fullmatch(r"(0|[1-9]\d*)(,(0|[1-9]\d*))*", text):
        raise ValueError(f"A population is a number or, of two types, 8,4: {text} is not.")
    return tuple(map(int, text.split(",")))


def random_player(seed: int) -> Player:
    """Plays every action with the same probability."""
    rng = torch.Generator().manual_seed(seed)

    def play(world: ParticleWorld) -> Tensor:
        shape = (world.num_worlds, world.num_agents)
        return torch.randint(0, 5, shape, generator=rng).to(world.device)

    return play


def scripted_players(seed: int) -> dict[str, Player]:
    """The reference points of every table."""
    return {"random": random_player(seed), "nearest-first": nearest_first, "flee": flee}


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
