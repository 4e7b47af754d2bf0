"""Pac-Men of one run against ghosts of another: Tables 1 and 2 of MRA.

    python experiments/cross_play_particle.py runs/pacman-single-s* runs/pacman-mra-s* \\
        --population 8,4 --out docs/data/cross_play_pacman

Runs whose names differ by -s1, -s2, ... only are seeds of one method. For each pair of methods all
runs' Pac-Men play against all runs' ghosts, --episodes episodes a pair, the same for all pairs;
latents are drawn from p(z|m). Writes OUT.csv (a row per pair of runs) and OUT.md: mean returns per
agent over pairs of runs, with the lowest and highest pair, and as in the paper divided by the
largest of the table (where all are positive).
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from annotated_types import Interval
from figures import (
    Runs,
    Seed,
    UsageError,
    beside,
    check_bounds,
    check_out,
    markdown_table,
    one_line_errors,
    without_seed,
    write_rows,
)
from particle_agents import Trained, load, make_world
from torch import Tensor

from envs.particle.episodes import Player, play
from envs.particle.worlds import ParticleWorld


@dataclasses.dataclass(frozen=True)
class Study:
    """Who plays, and where."""

    runs: Runs  # of mra_maddpg_particle.py or baselines/maddpg_particle.py, in pacman
    population: str = "8,4"  # Pac-Men, ghosts
    episodes: Annotated[int, Interval(ge=2)] = 200  # of each pair of runs
    seed: Seed = 1
    out: Path = Path("cross_play")  # writes OUT.csv and OUT.md


def together(pac_men: Player, ghosts: Player) -> Player:
    """Agents of the first type from one player, the others from another."""

    def act(world: ParticleWorld) -> Tensor:
        first = world.game.population[0]
        return torch.cat((pac_men(world)[:, :first], ghosts(world)[:, first:]), 1)

    return act


def play_pair(a: Trained, b: Trained, study: Study) -> np.ndarray:
    """(2,): returns per Pac-Man of a and per ghost of b."""
    world = make_world(a, study.population, study.episodes, study.seed)
    players = (x.player(world.game, study.episodes, study.seed + k) for k, x in enumerate((a, b)))
    return play(world, together(*players)).mean(0)


def tables(rows: list[dict]) -> str:
    """A table for Pac-Men and one for ghosts, raw and divided by the largest."""
    text = ""
    methods = list(dict.fromkeys(row["pac_men"] for row in rows))
    for role in ("pac_man", "ghost"):
        found = {}
        for pair in itertools.product(methods, methods):
            x = [r[role] for r in rows if (r["pac_men"], r["ghosts"]) == pair]
            found[pair] = (float(np.mean(x)), min(x), max(x), len(x))
        largest, lines = max(mean for mean, *_ in found.values()), []
        for (pac_men, ghosts), (mean, low, high, pairs) in found.items():
            line = {"Pac-Men of": pac_men, "ghosts of": ghosts, "return": f"{mean:.2f}"}
            line |= {"lowest and highest pair": f"{low:.2f}, {high:.2f}", "pairs": pairs}
            share = f"{mean / largest:.2f}" if min(m for m, *_ in found.values()) > 0 else "-"
            lines.append(line | {"divided by the largest": share})
        text += f"Return per {role.replace('_', '-')} and episode\n\n{markdown_table(lines)}\n"
    return text


def main(study: Study) -> None:
    """Play all pairs, then write both files."""
    check_bounds(study)
    check_out(study.out)
    torch.set_num_threads(1)
    trained = [load(run) for run in study.runs]
    for x in trained:
        if x.args.task != "pacman":
            raise UsageError(f"{x.run} is a run of {x.args.task}, not of pacman.")
        if not x.args.share_parameters and x.populations != (study.population,):
            raise UsageError(f"{x.run} has parameters per agent, for {x.populations[0]} only.")
    rows = []
    for a, b in itertools.product(trained, trained):
        pac_man, ghost = play_pair(a, b, study)
        names = {"pac_men": without_seed(a.run), "ghosts": without_seed(b.run)}
        runs = {"pac_men_run": a.run.name, "ghosts_run": b.run.name}
        rows.append(names | runs | {"pac_man": float(pac_man), "ghost": float(ghost)})
    text = f"{study.episodes} episodes per pair of runs, population {study.population}\n\n"
    text += tables(rows)
    write_rows(beside(study.out, ".csv"), rows)
    beside(study.out, ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
