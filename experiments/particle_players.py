"""What scripted players earn in the particle worlds: the reference points of every table.

    python experiments/particle_players.py --out docs/data/particle_players

Return per agent of each type and episode, with 95 % bootstrap intervals over episodes. Random play
draws each action with the same probability; nearest-first and flee are envs/particle/worlds.py's.
Writes OUT.csv and OUT.md.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from annotated_types import Interval
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.particle.worlds import TASKS, ParticleWorld, flee, nearest_first

POPULATIONS = {
    "treasure": (3, 6, 12, 24, 48),
    "resource": (3, 6, 7, 9, 10, 12, 13, 15, 18, 24),
    "pacman": ((4, 2), (6, 3), (8, 4), (2, 8)),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What to play."""

    tasks: tuple[str, ...] = ("treasure", "resource", "pacman")
    episodes: Annotated[int, Interval(ge=2)] = 1024  # of each player and population
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 1
    out: Path = Path("particle_players")  # writes OUT.csv and OUT.md


def play(task: str, population, player, study: Study) -> list[np.ndarray]:
    """Returns of one episode in each of study.episodes worlds: per type (episodes,), per capita."""
    world = ParticleWorld(task, population, study.episodes, seed=study.seed)
    world.reset()
    rng = torch.Generator().manual_seed(study.seed)
    shape = (study.episodes, world.num_agents)
    total, goes_on = torch.zeros(shape), torch.ones(study.episodes, 1, dtype=torch.bool)
    for _ in range(world.horizon):
        actions = player(world) if player else torch.randint(0, 5, shape, generator=rng)
        step = world.step(actions)
        total += step.reward * goes_on
        goes_on &= ~step.terminated[:, None]
    return [part.mean(1).numpy() for part in total.split(world.game.population, 1)]


def main(study: Study) -> None:
    """Play everything, then write both files."""
    torch.set_num_threads(1)
    if unknown := set(study.tasks or ("none",)) - set(POPULATIONS):
        print(f"error: There is no task {min(unknown)}: {', '.join(POPULATIONS)}.", file=sys.stderr)
        sys.exit(2)
    players = {"random": None, "nearest-first": nearest_first, "flee": flee}
    rows, lines = (
        [],
        ["| world | population | who | " + " | ".join(players) + " |", "|---" * 6 + "|"],
    )
    for task in study.tasks:
        for population in POPULATIONS[task]:
            name = ",".join(map(str, np.atleast_1d(population)))
            found = {who: play(task, population, player, study) for who, player in players.items()}
            for kind, role in enumerate(TASKS[task].roles):
                cells = []
                for who, returns in found.items():
                    x = returns[kind]
                    rng = np.random.default_rng(study.seed)
                    how = dict(method="percentile", n_resamples=1000, rng=rng)
                    low, high = bootstrap((x,), np.mean, **how).confidence_interval
                    cells.append(f"{x.mean():.2f} [{low:.2f}, {high:.2f}]")
                    about = dict(task=task, population=name, role=role, player=who)
                    rows.append(about | dict(mean=x.mean(), low=low, high=high, episodes=len(x)))
                lines.append(f"| {task} | {name} | {role} | " + " | ".join(cells) + " |")
    study.out.parent.mkdir(parents=True, exist_ok=True)
    with study.out.with_name(f"{study.out.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = "\n".join(lines) + "\n"
    study.out.with_name(f"{study.out.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Study))
