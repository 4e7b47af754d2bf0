"""Figs. 9, 10 and 11 of MRA, from run directories.

    python experiments/mra_figures.py runs/resource-mra-s1 runs/resource-single-s1 \\
        runs/resource-single-s2 --population 12 --out docs/data/mra_figures

Fig. 9, a column per run of several populations: the bound on I(g; a|o), xi's loss (and log |M|,
what knowing nothing costs), how often xi is right beside how often it is when it is shown a uniform
g, and return per z in the evaluations on the way (--eval-every). Fig. 10: where one agent goes from
one and the same beginning, by z in a run of several populations (and everybody has that z), and in
runs of one population beside it. Fig. 11: whom that agent attends to, edges above --edge, by z, and
with which probability it takes each action. Writes OUT-9.png, OUT-10.png, OUT-11.png, and OUT-9.csv
with the curves' points. (Agents are blue, ghosts green, the dead hollow.)
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from annotated_types import Interval
from figures import (
    Count,
    Runs,
    Seed,
    UsageError,
    beside,
    check_bounds,
    check_out,
    one_line_errors,
    read_log,
    save_figure,
    write_rows,
)
from particle_agents import Trained, load, make_world

from envs.particle.worlds import TASKS, ParticleWorld, unpack

MOVES = {1: (-1, 0), 2: (1, 0), 3: (0, -1), 4: (0, 1)}  # of actions


@dataclasses.dataclass(frozen=True)
class Study:
    """Which runs, and which moment of which world Figs. 10 and 11 show."""

    runs: Runs  # of mra_maddpg_particle.py
    population: str = ""  # default: the largest of the first run
    seed: Seed = 1  # of the world
    agent: Count = 0  # the one whose way and graphs are drawn
    step: Count = 8  # of the episode in Fig. 11
    edge: Annotated[float, Interval(ge=0, le=1)] = 0.1  # weaker edges are not drawn
    out: Path = Path("mra_figures")  # writes OUT-9.png, OUT-9.csv, OUT-10.png, OUT-11.png


# --- Fig. 9 ---------------------------------------------------------------------------------------


def read_points(trained: Trained) -> list[dict[str, Any]]:
    """A row per logged figure of Fig. 9."""
    rows, returns = [], returns_of(trained)
    for scalars in read_log(trained.run):
        for name, value in scalars.items():
            kind, _, rest = name.partition("/")
            wanted = ("information", "xi_loss", "xi_accuracy", "xi_accuracy_uniform_g")
            player, _, figure = rest.partition("/")
            if kind == "eval" and " z=" in player and figure in returns:
                kind, rest = figure, player
            elif kind not in wanted:
                continue
            row = {"run": trained.run.resolve().name, "timesteps": scalars["timesteps"]}
            rows.append(row | {"figure": kind, "of": rest, "value": value})
    return rows


def returns_of(trained: Trained) -> list[str]:
    """What evaluations call returns: of all agents or of each role."""
    roles = TASKS[trained.args.task].roles
    return ["return"] if len(roles) == 1 else [f"return_{role}" for role in roles]


def draw_curves(runs: list[Trained], rows: list[dict[str, Any]]) -> Any:
    """Fig. 9: a column per run."""
    panels = {
        "information": "bound on I(g; a|o), nats",
        "xi_loss": "loss of xi, nats",
        "xi_accuracy": "xi is right; dashed: uniform g",
    }
    for name in returns_of(runs[0]):
        panels[name] = f"{name.replace('_', ' of ', 1)} with z, less mean"
    size = (4.4 * len(runs), 2.4 * len(panels))
    figure, axes = plt.subplots(len(panels), len(runs), figsize=size, squeeze=False, sharex="col")
    for column, trained in enumerate(runs):
        name = trained.run.resolve().name
        own = [row for row in rows if row["run"] == name]
        for axis, (kind, label) in zip(axes[:, column], panels.items()):
            for number, population in enumerate(trained.populations):
                colour = f"C{number}"
                if kind.startswith("return"):
                    draw_returns(axis, own, kind, population, colour)
                    continue
                axis.plot(*points(own, kind, population), color=colour, label=population)
                if kind == "xi_accuracy":
                    dashed = points(own, "xi_accuracy_uniform_g", population)
                    axis.plot(*dashed, "--", color=colour, lw=0.8)
            if kind == "xi_loss":
                axis.axhline(math.log(len(trained.populations)), color="0.5", lw=0.8, ls=":")
            axis.set_ylabel(label, fontsize=8)
            axis.grid(alpha=0.3)
        axes[0][column].set_title(name, fontsize=10)
        axes[0][column].legend(fontsize=8, title="population", title_fontsize=8)
        axes[-1][column].set_xlabel("thousand environment steps", fontsize=9)
    figure.tight_layout()
    return figure


def points(rows: list[dict[str, Any]], kind: str, of: str) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if row["figure"] == kind and row["of"] == of]
    return [row["timesteps"] / 1000 for row in chosen], [row["value"] for row in chosen]


def draw_returns(axis: Any, rows: list[dict], kind: str, population: str, colour: str) -> None:
    """A line per z: its return less the mean over z, at each evaluation."""
    names = {row["of"] for row in rows if row["figure"] == kind}
    lines = [points(rows, kind, name) for name in sorted(names)]
    lines = [line for name, line in zip(sorted(names), lines) if name.split(" ")[0] == population]
    if not lines or len({len(steps) for steps, _ in lines}) > 1:
        return
    mean = np.mean([values for _, values in lines], 0)
    for steps, values in lines:
        axis.plot(steps, np.array(values) - mean, color=colour, lw=0.8, marker=".", ms=3)


# --- Figs. 10 and 11 ------------------------------------------------------------------------------


def latents(trained: Trained, world: ParticleWorld, z: int) -> torch.Tensor:
    return torch.full((world.num_worlds, world.num_agents), z)


@torch.no_grad()
def walk(trained: Trained, study: Study, population: str, z: int) -> np.ndarray:
    """Positions (steps + 1, N, 2) in one episode where everybody has z."""
    world = make_world(trained, population, 1, study.seed)
    world.reset()
    player = trained.player(world.game, 1, study.seed, latents(trained, world, z))
    way = [unpack(world.game, world.state.T).position[..., 0].T.numpy()]
    for _ in range(world.horizon):
        step = world.step(player(world))
        way.append(unpack(world.game, step.final_state.T).position[..., 0].T.numpy())
        if step.terminated[0]:
            break
    return np.stack(way)


def draw_ground(axis: Any, world: ParticleWorld) -> None:
    """Landmarks, and the square where things begin."""
    bodies = unpack(world.game, world.state.T)
    for radius, (x, y) in zip(world.game.landmark_radius, bodies.landmarks[..., 0].T.tolist()):
        axis.add_patch(plt.Circle((x, y), radius, fc="#fad778", ec="#be8c1e", lw=0.8))
    axis.add_patch(plt.Rectangle((-1, -1), 2, 2, fill=False, ec="0.8", lw=0.8))
    axis.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])


def draw_ways(runs: list[Trained], study: Study, population: str) -> Any:
    """Fig. 10: on the left runs of this population alone, then each run of several, by z."""
    single = [x for x in runs if x.populations == (population,)]
    several = [x for x in runs if len(x.populations) > 1]
    count = bool(single) + len(several)
    figure, axes = plt.subplots(1, count, figsize=(4.0 * count, 4.4), squeeze=False)
    panels = [("trained in this game alone", [(x, 0, x.run.resolve().name) for x in single])]
    panels = panels if single else []
    for x in several:
        ways = [(x, z, f"z = {z}") for z in range(x.args.latent_size)]
        panels.append((x.run.resolve().name, ways))
    for axis, (title, ways) in zip(axes[0], panels):
        world = make_world(ways[0][0], population, 1, study.seed)
        world.reset()
        draw_ground(axis, world)
        for number, (trained, z, label) in enumerate(ways):
            way, colour = walk(trained, study, population, z), f"C{number}"
            axis.plot(*way[:, study.agent].T, "-", color=colour, label=label, lw=1.4)
            axis.plot(*way[-1, study.agent], "o", color=colour, ms=6)
            axis.plot(*way[-1].T, ".", color=colour, ms=3, alpha=0.5)
            axis.plot(*way[0].T, ".", color="0.6", ms=4)
        axis.plot(*way[0, study.agent], "ks", ms=5)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7, loc="lower center", ncols=3)
    figure.tight_layout()
    return figure


@torch.no_grad()
def draw_graphs(trained: Trained, study: Study, population: str) -> Any:
    """Fig. 11: one moment, a panel per z."""
    Z = trained.args.latent_size
    world = make_world(trained, population, 1, study.seed)
    world.reset()
    player = trained.player(world.game, 1, study.seed)
    for _ in range(min(study.step, world.horizon - 1)):
        world.step(player(world))
    columns = min(3, Z)
    lines = -(-Z // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.3 * columns, 3.5 * lines), squeeze=False)
    places = unpack(world.game, world.state.T).position[..., 0].T
    for z, axis in enumerate(axes.flat[:Z]):
        view = trained.agent.look(world.game, world.obs, latents(trained, world, z))
        g = trained.agent.phi(view)
        chances = trained.agent.theta(view, g).softmax(-1)[0, study.agent]
        draw_ground(axis, world)
        for kind, alive, place in zip(world.game.types, view.alive[0], places):
            colour = ("tab:blue", "tab:green")[kind]
            axis.plot(*place, "o", color=colour, mfc=colour if alive else "none", ms=5)
        me = places[study.agent]
        for other, weight in zip(places, g[0, study.agent]):
            if weight > study.edge:
                axis.plot(*zip(me, other), color="tab:red", lw=4 * float(weight), alpha=0.7)
        axis.plot(*me, "ko", ms=7)
        for action, (x, y) in MOVES.items():
            length = 0.5 * float(chances[action])
            axis.arrow(*me, x * length, y * length, color="k", width=0.012, zorder=4)
        axis.set_title(f"z = {z}, p(z|m) = {prior(trained, world, study.agent)[z]:.2f}", fontsize=9)
    for axis in axes.flat[Z:]:
        axis.axis("off")
    figure.suptitle(f"{trained.run.resolve().name}, edges above {study.edge}", fontsize=9)
    figure.tight_layout(h_pad=2)
    return figure


def prior(trained: Trained, world: ParticleWorld, agent: int) -> list[float]:
    return trained.agent.log_prior(world.game)[agent].exp().tolist()


def main(study: Study) -> None:
    """Read the runs, then write the files."""
    check_bounds(study)
    check_out(study.out)
    torch.set_num_threads(1)
    runs = [load(run) for run in study.runs]
    for trained in runs:
        if not trained.latent:
            raise UsageError(f"{trained.run} is a run without latents.")
        if trained.args.task != runs[0].args.task:
            raise UsageError(f"{trained.run} is a run of {trained.args.task}, the first is not.")
    several = [x for x in runs if len(x.populations) > 1]
    if not several:
        raise UsageError("None of these runs has several populations.")
    trained_in = several[0].populations
    population = study.population or trained_in[-1]
    if study.agent >= make_world(runs[0], population, 1, 1).num_agents:
        raise UsageError(f"--agent {study.agent}: a population of {population} has fewer.")
    rows = [row for trained in several for row in read_points(trained)]
    if not rows:
        raise UsageError("These runs have logged nothing yet.")
    write_rows(beside(study.out, "-9.csv"), rows)
    figures = {
        "9": draw_curves(several, rows),
        "10": draw_ways(runs, study, population),
        "11": draw_graphs(several[0], study, population),
    }
    for number, figure in figures.items():
        save_figure(figure, beside(study.out, f"-{number}.png"))
        print(f"wrote {study.out}-{number}.png")


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
