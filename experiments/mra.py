"""MRA's figures and tables: train the runs that they need, and draw or compute them from runs.

    python experiments/mra.py train fig2 fig3 --tasks resource --seeds 1 2 3
    python experiments/mra.py figures runs/resource-mra-s1 runs/resource-single-s1 --population 12
    python experiments/mra.py cross-play runs/pacman-single-s* runs/pacman-mra-s* --population 8,4
    python experiments/mra.py ladder runs/rooms-*-s1[1-5] --against rooms-algorithm_4 rooms-uni_mra
    python experiments/mra.py attention runs/rooms-algorithm_4-s11
    python experiments/mra.py critics runs/rooms-algorithm_4-s11

`train` trains every run that Figs. 2, 3, 4, 5, 7 and 8 need, and compare.py draws them. `figures`
makes Figs. 9, 10 and 11, `cross-play` makes Tables 1 and 2, `ladder` compares forms of MRA in a
world where the population matters, `attention` shows whom each z attends to, `critics` what a graph
hides from the critic. `SUBCOMMAND --help` has the options.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import Count, Positive, Seed, Share, UsageError, as_flag, check

import numpy as np
import torch
import tyro
from annotated_types import Interval
from torch import Tensor

from envs.particle.episodes import Player, play, read_population
from envs.particle.worlds import TASKS, ParticleWorld, unpack
from envs.particle.worlds import wanted as paying_leader
from envs.statistics import Difference, markdown_table, mean_or_iqm, seed_difference
from experiments.criteria import flags_text
from experiments.plots import plt, save_figure
from experiments.runs import (
    Job,
    Run,
    Runs,
    beside,
    check_all,
    check_groups,
    check_kind,
    check_out,
    finish,
    grouped,
    kind_of,
    load_script,
    read_runs,
    run_subcommand,
    split_words,
    train_all,
    without_seed,
    write_rows,
)

MRA, MADDPG = "mra_maddpg_particle.py", "baselines/maddpg_particle.py"
MAAC = "baselines/maac_particle.py"
RL2, EPC = "baselines/rl2_particle.py", "baselines/epc_particle.py"

# --- Training -------------------------------------------------------------------------------------

TRAINED = {
    "treasure": ("3", "6", "12", "24"),
    "resource": ("6", "9", "12", "15"),
    "pacman": ("4,2", "6,3", "8,4"),
}
GAME = {"treasure": "6", "resource": "12", "pacman": "8,4"}  # the populations of Fig. 2
UNSEEN = {"resource": "3 7 10 13 18 24", "treasure": "48", "pacman": "2,8"}
TARGETS = {  # what Fig. 4 adapts to: (population, flags)
    "treasure": (("6", "--no-shaping"), ("48", "")),
    "pacman": (("2,8", ""),),
    "resource": (),
}
REPTILE = "--latent-size 1 --phi-gradient actor"
ALGORITHM_4 = "--phi-gradient mi --no-psi-information"
Figure = Literal["fig2", "fig3", "fig4", "fig5", "fig7", "fig8"]
Task = Literal["treasure", "resource", "pacman"]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train all runs that some of MRA's figures need.

    All runs of a figure have the same number of environment steps in total, whatever their number
    of populations (the paper's "equal episodes"; an episode has 20 steps). Runs are written to
    DIR/{task}-{method}-s{seed}. Finished runs are kept and stopped ones are resumed. Figures:

    fig2: MRA, Reptile (alpha 1 as in MRA, and .1: "proper"), the single-game baseline, and MADDPG
    with weights per agent and shared ones, in one game of each world;
    fig3: MRA, uni-MRA, EPC, RL2 and MRA by Algorithm 4 as printed, in all training games;
    fig4: fig3's MRA, EPC and RL2 adapted to treasure 6 without shaping, treasure 48 and pacman 2,8;
    and MADDPG and MAAC trained there from scratch;
    fig5: fig3's MRA, EPC and RL2 in resource, evaluated in populations that they never met;
    fig7: option, concat and bilinear representations in resource 6, 9, 12;
    fig8: MRA trained in 2, 3 and 4 games of resource.
    """

    figures: Annotated[tuple[Figure, ...], tyro.conf.Positional]  # figures to train for
    tasks: tuple[Task, ...] = ("treasure", "resource", "pacman")  # worlds of figs. 2, 3 and 4
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of each method
    total_timesteps: Positive = 240_000  # environment steps of a run, over all its populations
    adapt_timesteps: Positive = 120_000  # steps of fig. 4's adaptations and of their MADDPG
    preset: Literal["cpu", "paper"] = "cpu"  # the scripts' --preset
    jobs: Positive = 1  # runs to train at the same time
    dir: Path = Path("runs")  # parent directory of the runs
    flags: str = ""  # more flags for every run, as --flags="--save-every 40000"
    dry_run: bool = False  # print the commands and train nothing


class Command(NamedTuple):
    """One method of a figure in one world, to be trained with several seeds."""

    name: str  # name of the runs, without the seed
    script: str  # path of the script
    flags: str
    adapts: str = ""  # name of the run whose weights it starts from; "": from new weights


def several(
    task: str, method: str, flags: str = "", names: tuple[str, ...] = (), script: str = MRA
) -> Command:
    """The command that trains a script in several populations, by default all of TRAINED."""
    populations = " ".join(names or TRAINED[task])
    worlds = f"--task {task} --populations {populations} --eval-populations {UNSEEN[task]}"
    return Command(f"{task}-{method}", script, f"{worlds} {flags}")


def of_all_games(task: str) -> list[Command]:
    """MRA and the two baselines that learn several populations with one network or by stages."""
    epc, rl2 = several(task, "epc", script=EPC), several(task, "rl2", script=RL2)
    return [several(task, "mra"), epc, rl2]


def of_task(figure: str, task: str) -> list[Command]:
    """The commands of one of figs. 2, 3 and 4 in a world, without adaptations."""
    one = f"--task {task} --population {GAME[task]}"
    if figure == "fig2":
        return [
            several(task, "mra"),
            several(task, "reptile", REPTILE),
            several(task, "reptile-proper", f"{REPTILE} --reptile-step 0.1"),
            Command(f"{task}-single", MRA, f"--task {task} --populations {GAME[task]}"),
            Command(f"{task}-maddpg", MADDPG, one),
            Command(f"{task}-maddpg-shared", MADDPG, f"{one} --share-parameters"),
        ]
    if figure == "fig3":
        uni = several(task, "uni", "--latent-prior uniform")
        return [*of_all_games(task), uni, several(task, "algorithm-4", ALGORITHM_4)]
    return of_all_games(task) if figure == "fig4" and TARGETS[task] else []


def of_resource(figure: str) -> list[Command]:
    """The commands of one of figs. 5, 7 and 8, which are all in resource occupation."""
    three = ("6", "9", "12")
    option = several("resource", "3-option", "--representation option", three)
    if figure == "fig5":
        return of_all_games("resource")
    if figure == "fig7":
        others = ("concat", "bilinear")
        ways = [several("resource", f"3-{x}", f"--representation {x}", three) for x in others]
        return [option, *ways]
    if figure == "fig8":  # shares runs: three games with fig. 7, four with figs. 2, 3 and 5
        two = several("resource", "of-2", "", ("6", "12"))
        return [two, option, several("resource", "mra")]
    return []


def adaptations(task: str) -> list[Command]:
    """The second stage of fig. 4: MRA, EPC, RL2 are adapted to a population, MADDPG and MAAC are
    trained in it."""
    commands = []
    for population, flags in TARGETS[task]:
        place = f"{task}-{population.replace(',', '-')}{'-sparse' if flags else ''}"
        own = f"--population {population} {flags}"
        one_set = f"--populations {population} --sets 1 --parents 1 {flags}"
        commands.append(Command(f"{place}-adapt", MRA, own, adapts=f"{task}-mra"))
        commands.append(Command(f"{place}-epc", EPC, one_set, adapts=f"{task}-epc"))
        commands.append(Command(f"{place}-rl2", RL2, own, adapts=f"{task}-rl2"))
        commands.append(Command(f"{place}-maddpg", MADDPG, f"--task {task} {own}"))
        commands.append(Command(f"{place}-maac", MAAC, f"--task {task} {own}"))
    return commands


def jobs_of(commands: list[Command], study: Train, timesteps: int) -> list[Job]:
    """The runs of all commands, seed by seed. A command that several figures share, or a seed that
    is named twice, is run once."""
    jobs = []
    root = study.dir.resolve()
    more = split_words(study.flags, "--flags")
    for seed, command in itertools.product(dict.fromkeys(study.seeds), dict.fromkeys(commands)):
        flags = [*shlex.split(command.flags), *more]
        if command.adapts:
            flags = ["--adapt", str(root / f"{command.adapts}-s{seed}"), *flags]
        if not command.adapts or command.script == EPC:  # others take the adapted run's preset
            flags = [*flags, "--preset", study.preset]
        jobs.append(
            Job(
                run=root / f"{command.name}-s{seed}",
                script=command.script,
                flags=tuple(flags),
                seed=seed,
                timesteps=timesteps,
            )
        )
    return jobs


def train(study: Train) -> None:
    """Train all runs of the figures, seed by seed, then the adaptations of those runs. UsageError
    if there are none."""
    check(
        [
            (not study.figures, "Name at least one figure, as fig2"),
            (not study.tasks, "--tasks is empty"),
            (not study.seeds, "--seeds is empty"),
        ]
    )
    first: list[Command] = []
    then: list[Command] = []
    for figure in study.figures:
        for task in study.tasks:
            first += of_task(figure, task)
            then += adaptations(task) if figure == "fig4" else []
        first += of_resource(figure)
    names, tasks = " ".join(study.figures), " ".join(study.tasks)
    check([(not first, f"{names} has no runs in --tasks {tasks}")])
    later = jobs_of(then, study, study.adapt_timesteps)
    check_all(later)  # before hours of training
    train_all(jobs_of(first, study, study.total_timesteps), study.jobs, study.dry_run)
    train_all(later, study.jobs, study.dry_run)


# --- Trained agents -------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A run's newest checkpoint."""

    name: str  # name of the run
    run: Run
    script: Any  # the script as a module
    args: Any
    agent: Any
    populations: tuple[str, ...]  # populations that it was trained in
    timesteps: int  # environment steps of the checkpoint


def load(run: Run) -> Trained:
    """Load a run's agent on the CPU. UsageError if it is a run of another script."""
    check_kind(run, *(Path(path).stem for path in (MRA, MADDPG, RL2, EPC, MAAC)))
    script = load_script(run.args["script"])
    args, agent = script.load_agent(str(run.path))
    saved, _ = harness.load_checkpoint(str(run.path), quiet=True)
    populations = getattr(args, "populations", ())
    if own := getattr(args, "population", ""):  # MADDPG's only one, or the one MRA is adapted to
        populations = (own,)
    return Trained(run.name, run, script, args, agent, populations, saved["timesteps"])


def make_world(trained: Trained, population: str, episodes: int, seed: int) -> ParticleWorld:
    """`episodes` worlds like the run's own, with this population; UsageError if there are none."""
    return trained.script.make_envs(trained.args, population, episodes, seed)


# --- Figs. 9, 10 and 11 ---------------------------------------------------------------------------

MOVES = {1: (-1, 0), 2: (1, 0), 3: (0, -1), 4: (0, 1)}  # {action: direction}; 0 does nothing


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figs. 9, 10 and 11 of MRA, from run directories.

    Fig. 9 has a column per run of several populations: the bound on I(g; a|o); xi's loss, and the
    loss log |M| of a uniform guess; xi's accuracy, and its accuracy if g is uniform; and return per
    z in the evaluations during training (--eval-every). Fig. 10 shows the path of one agent from
    the same start: for each z (all agents have it) in runs of several populations, and in runs of
    one population. Fig. 11 shows, for each z, the edges by which that agent attends to others and
    the probabilities of its actions. Agents are blue, ghosts green, dead ones hollow.
    """

    runs: Runs  # runs of mra_maddpg_particle.py, all of one task
    population: str = ""  # population to draw; default: last of the first run with several
    seed: Seed = 1  # seed of the world and the actions
    agent: Count = 0  # number of the agent whose path and graphs are drawn
    step: Count = 8  # step of the episode that Fig. 11 shows
    edge: Share = 0.1  # least attention weight of an edge that Fig. 11 draws
    out: Path = Path("mra_figures")  # writes OUT-9.png, OUT-9.csv, OUT-10.png and OUT-11.png


def read_points(trained: Trained) -> list[dict[str, Any]]:
    """The rows of OUT-9.csv: one per logged figure that Fig. 9 shows."""
    rows, returns = [], returns_of(trained)
    for scalars in trained.run.log:
        for name, value in scalars.items():
            kind, _, rest = name.partition("/")
            wanted = ("information", "xi_loss", "xi_accuracy", "xi_accuracy_uniform_g")
            player, _, figure = rest.partition("/")
            if kind == "eval" and " z=" in player and figure in returns:
                kind, rest = figure, player
            elif kind not in wanted:
                continue
            row = {"run": trained.name, "timesteps": scalars["timesteps"]}
            rows.append(row | {"figure": kind, "of": rest, "value": value})
    return rows


def returns_of(trained: Trained) -> list[str]:
    """The names of returns in the run's evaluations: one, or one for each role of its task."""
    roles = TASKS[trained.args.task].roles
    return ["return"] if len(roles) == 1 else [f"return_{role}" for role in roles]


def draw_curves(runs: list[Trained], rows: list[dict[str, Any]]) -> Any:
    """Fig. 9: a column per run, a row per quantity, a colour per population."""
    panels = {
        "information": "bound on I(g; a|o), nats",
        "xi_loss": "loss of xi, nats",
        "xi_accuracy": "xi is right; dashed: uniform g",
    }
    for name in returns_of(runs[0]):
        panels[name] = f"{name.replace('_', ' of ', 1)} with z, less mean"
    size = (4.4 * len(runs), 2.4 * len(panels))
    figure, axes = plt.subplots(
        len(panels),
        len(runs),
        figsize=size,
        squeeze=False,
        sharex="col",
    )
    for column, trained in enumerate(runs):
        name = trained.name
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
                nothing = math.log(len(trained.populations))  # the loss of a uniform guess
                axis.axhline(nothing, color="0.5", lw=0.8, ls=":")
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
    """Draw a line per z: its return minus the mean over z, at each evaluation. Draws nothing if the
    lines have different numbers of points."""
    names = {row["of"] for row in rows if row["figure"] == kind}
    own = [name for name in sorted(names) if name.split(" ")[0] == population]
    lines = [points(rows, kind, name) for name in own]
    if not lines or len({len(steps) for steps, _ in lines}) > 1:
        return
    mean = np.mean([values for _, values in lines], 0)
    for steps, values in lines:
        rest = np.array(values) - mean
        axis.plot(steps, rest, color=colour, lw=0.8, marker=".", ms=3)


def latents(world: ParticleWorld, z: int) -> torch.Tensor:
    return torch.full((world.num_worlds, world.num_agents), z)


def positions(world: ParticleWorld, state: Tensor) -> np.ndarray:
    """The positions (N, 2) of the agents in the first world of a state (B, S)."""
    bodies = unpack(world.game, state.T)
    return bodies.position[..., 0].T.numpy()


@torch.no_grad()
def walk(trained: Trained, study: Figures, population: str, z: int) -> np.ndarray:
    """The positions (steps + 1, N, 2) of the agents in one episode in which all have latent z."""
    world = make_world(trained, population, 1, study.seed)
    world.reset()
    player = trained.script.net_player(trained.agent, latents(world, z), study.seed)
    way = [positions(world, world.state)]
    for _ in range(world.horizon):
        step = world.step(player(world))
        way.append(positions(world, step.final_state))
        if step.terminated[0]:
            break
    return np.stack(way)


def draw_ground(axis: Any, world: ParticleWorld) -> None:
    """Draw landmarks, and the square in which all start."""
    bodies = unpack(world.game, world.state.T)
    landmarks = bodies.landmarks[..., 0].T.tolist()
    for radius, place in zip(world.game.landmark_radius, landmarks):
        axis.add_patch(plt.Circle(place, radius, fc="#fad778", ec="#be8c1e", lw=0.8))
    square = plt.Rectangle((-1, -1), 2, 2, fill=False, ec="0.8", lw=0.8)
    axis.add_patch(square)
    shown = (-1.4, 1.4)
    axis.set(xlim=shown, ylim=shown, aspect="equal", xticks=[], yticks=[])


def draw_ways(runs: list[Trained], study: Figures, population: str) -> Any:
    """Fig. 10: a panel for all runs of this population alone, then one per run of several, by z."""
    single = [x for x in runs if x.populations == (population,)]
    several = [x for x in runs if len(x.populations) > 1]
    count = bool(single) + len(several)
    figure, axes = plt.subplots(1, count, figsize=(4.0 * count, 4.4), squeeze=False)
    panels = [("trained in this game alone", [(x, 0, x.name) for x in single])]
    panels = panels if single else []
    for x in several:
        ways = [(x, z, f"z = {z}") for z in range(x.args.latent_size)]
        panels.append((x.name, ways))
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
def draw_graphs(trained: Trained, study: Figures, population: str) -> Any:
    """Fig. 11: the edges and action probabilities of one agent at one step, a panel per z."""
    Z = trained.args.latent_size
    world = make_world(trained, population, 1, study.seed)
    world.reset()
    player = trained.script.load_player(str(trained.run.path), study.seed)
    for _ in range(min(study.step, world.horizon - 1)):
        world.step(player(world))
    columns = min(3, Z)
    lines = -(-Z // columns)
    size = (3.3 * columns, 3.5 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    places = positions(world, world.state)
    for z, axis in enumerate(axes.flat[:Z]):
        view = trained.agent.view(world.game, world.obs, latents(world, z))
        g = trained.agent.attention(view)
        chances = trained.agent.actor(view, g).softmax(-1)[0, study.agent]
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
    figure.suptitle(f"{trained.name}, edges above {study.edge}", fontsize=9)
    figure.tight_layout(h_pad=2)
    return figure


def prior(trained: Trained, world: ParticleWorld, agent: int) -> list[float]:
    return trained.agent.log_prior(world.game)[agent].exp().tolist()


def figures(study: Figures) -> None:
    """Read the runs, then write Figs. 9, 10 and 11. UsageError if the runs do not fit them."""
    check_out(study.out)
    runs = [load(run) for run in read_runs(study.runs)]
    for trained in runs:
        if not hasattr(trained.args, "latent_size"):
            raise UsageError(f"{trained.run.where} is a run without latents.")
        if trained.args.adapt:
            raise UsageError(f"{trained.run.where} is an adapted run: it was not trained anew.")
        if trained.args.task != runs[0].args.task:
            sentence = f"is a run of {trained.args.task}, the first is not"
            raise UsageError(f"{trained.run.where} {sentence}.")
    several = [x for x in runs if len(x.populations) > 1]
    if not several:
        raise UsageError("None of these runs has several populations.")
    population = study.population or several[0].populations[-1]
    if study.agent >= make_world(runs[0], population, 1, 1).num_agents:
        raise UsageError(f"--agent {study.agent}: a population of {population} has fewer.")
    rows = [row for trained in several for row in read_points(trained)]
    if not rows:
        raise UsageError("These runs have logged nothing yet.")
    write_rows(beside(study.out, "-9.csv"), rows)
    pictures = {
        "9": draw_curves(several, rows),
        "10": draw_ways(runs, study, population),
        "11": draw_graphs(several[0], study, population),
    }
    for number, figure in pictures.items():
        save_figure(figure, beside(study.out, f"-{number}.png"))
        print(f"wrote {study.out}-{number}.png")


# --- The ladder of forms --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Forms of MRA in a world where the population matters (docs/mra_ladder.md), as tables.

    Runs whose names differ only in -s1, -s2, ... are seeds of one form. Returns are per agent of
    the first type (or of all agents), with z from p(z|m), means over populations of final
    evaluations. gap closed: 0 is the script that does not know the population, 1 the one that does.
    best z: chosen for each population in other episodes. information: the bound on I(g; a|o) in
    nats. xi right: share of agents whose population xi finds. priors apart: mean total variation
    between a type's p(z|m) in two populations; 1 if they share no z (less in logs until 2026-11-26
    with two types, which averaged p(z|m) over agents first). heads used: exp of the entropy of
    p(z|m). These last ones are means of the last fifth of training, over populations.
    Writes OUT.csv (a row per run), OUT.png (every seed's returns) and OUT.md: means over seeds, and
    differences between forms with 95 % intervals over seeds (Student's; with --interquartile
    bootstraps) and the p of an exact permutation test.
    """

    runs: Runs  # runs of mra_maddpg_particle.py in one task and the same populations, or studies
    only: tuple[str, ...] = ()  # keep runs whose names match these shell patterns, in this order
    against: tuple[str, ...] = ()  # forms to subtract from the others, as rooms-algorithm_4
    all_agents: bool = False  # mean return of all agents (pacman: what roles take cancels)
    interquartile: bool = False  # differences of interquartile means from five seeds on
    out: Path = Path("mra_ladder")  # common beginning of the names of the .csv, .md, .png files


def last_fifth(run: Run, name: str) -> float:
    """Mean of the scalars NAME/* in the last fifth of a run's log; NaN if it has none."""
    late = [scalars for scalars in run.log if scalars["timesteps"] > 0.8 * run.steps]
    found = [x for scalars in late for key, x in scalars.items() if key.partition("/")[0] == name]
    return float(np.mean(found)) if found else math.nan


def heads_used(run: Run) -> float:
    """Number of heads that a run uses: exp of the entropy of p(z|m) for agents of the first type,
    mean over training populations in the last fifth of the log; NaN if that has no p(z|m)."""
    late = [scalars for scalars in run.log if scalars["timesteps"] > 0.8 * run.steps]
    found = []
    for scalars, population in itertools.product(late, run.args["populations"]):
        begin = f"prior/{population}/0/"
        p = np.array([x for name, x in scalars.items() if name.startswith(begin) and x > 0])
        if len(p):
            found.append(math.exp(-float(p @ np.log(p))))
    return float(np.mean(found)) if found else math.nan


def ladder_returns(run: Run, all_agents: bool) -> Callable[..., float]:
    """A function (populations, player) of mean returns in the final evaluation; NaN: none."""
    results, roles = run.summary["eval"], TASKS[run.args["task"]].roles
    figures = ["return"] if len(roles) == 1 else [f"return_{role}" for role in roles]

    def figure(name: str, row: dict[str, float]) -> float:
        if not all_agents:
            return row[figures[0]]
        numbers = read_population(name.split()[0])
        return float(np.average([row[x] for x in figures], weights=numbers))

    # A row is called "9,3", "9,3 uniform g" or "9,3 best z=2,0".
    named = {name.partition("=")[0]: figure(name, row) for name, row in results.items()}

    def returns(populations: list[str], player: str = "") -> float:
        found = [named.get(f"{p} {player}".strip(), math.nan) for p in populations]
        return float(np.mean(found)) if found else math.nan

    return returns


def ladder_row(run: Run, all_agents: bool) -> dict[str, Any]:
    """The row of OUT.csv of a run; a figure that the run does not have is NaN."""
    returns = ladder_returns(run, all_agents)
    trained, unseen = run.args["populations"], run.args["eval_populations"]
    blind, knows = returns(trained, "blind"), returns(trained, "knows population")
    drawn = returns(trained)
    row = {"form": without_seed(run.name), "run": run.name, "return": drawn}
    row |= {population: returns([population]) for population in trained}
    row |= {
        "gap closed": (drawn - blind) / (knows - blind),
        "unseen": returns(unseen),
        "random": returns(trained, "random"),
        "random, unseen": returns(unseen, "random"),
        "best z": returns(trained, "best z"),
        "best z, unseen": returns(unseen, "best z"),
        "uniform g": returns(trained, "uniform g"),
        "information": last_fifth(run, "information"),
        "xi right": last_fifth(run, "xi_accuracy"),
        "xi, uniform g": last_fifth(run, "xi_accuracy_uniform_g"),
        "priors apart": last_fifth(run, "prior_distance"),
        "heads used": heads_used(run),
    }
    return row


def by_form(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{form: its rows, one per seed}, in the order of the first seeds."""
    forms = dict.fromkeys(row["form"] for row in rows)
    return {form: [row for row in rows if row["form"] == form] for form in forms}


def ladder_table(rows: list[dict[str, Any]]) -> str:
    """A line per form: number of seeds, then means over them; "return" shows each seed, too.
    Columns that no run has are left out."""
    lines = []
    names = [name for name in rows[0] if name not in ("form", "run")]
    names = [name for name in names if not all(math.isnan(row[name]) for row in rows)]
    for form, seeds in by_form(rows).items():
        line = {"": form, "seeds": len(seeds)}
        for name in names:
            x = np.array([row[name] for row in seeds])
            small = name.startswith(("inf", "xi", "priors", "gap"))
            line[name] = "" if np.isnan(x.mean()) else f"{x.mean():.{3 if small else 2}f}"
        each = ", ".join(f"{row['return']:.2f}" for row in seeds)
        lines.append(line | {"return": f"{line['return']} ({each})"})
    return markdown_table(lines)


def ladder_differences(
    rows: list[dict[str, Any]], against: tuple[str, ...], interquartile: bool
) -> str:
    """A line per form and form of `against`: differences of returns, trained and unseen."""
    forms, lines = by_form(rows), []
    centre = mean_or_iqm if interquartile else np.mean
    for other, form in itertools.product(against, forms):
        if form == other:
            continue
        line = {"": f"{form} - {other}"}
        for name, title in ("return", "trained"), ("unseen", "unseen"):
            ours, theirs = (np.array([row[name] for row in forms[x]]) for x in (form, other))
            found = seed_difference(ours, theirs, centre=centre)
            line[title] = difference_text(found)
            line[f"p, {title}"] = "–" if math.isnan(found.p) else f"{found.p:.2g}"
        lines.append(line)
    return markdown_table(lines)


def difference_text(found: Difference) -> str:
    """A difference with its interval if there are seeds enough for one; "–" if it is unknown."""
    interval = "" if math.isnan(found.low) else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return "–" if math.isnan(found.mean) else f"{found.mean:+.2f}{interval}"


def draw_ladder(rows: list[dict[str, Any]], bounds: dict[str, float]) -> Any:
    """A figure with a line per form, best first, and two dots per seed: trained and unseen
    populations. Dashes: `bounds`, what scripts earn in trained populations."""
    forms = by_form(rows)
    means = {form: np.mean([row["return"] for row in seeds]) for form, seeds in forms.items()}
    forms = {form: forms[form] for form in sorted(forms, key=lambda form: -means[form])}
    figure, axis = plt.subplots(figsize=(8, 1.1 + 0.32 * len(forms)), layout="constrained")
    styles = {
        "return": ("trained", "#1f4e9c", "o", -0.12),
        "unseen": ("unseen", "#d8781b", "^", 0.12),
    }
    for name, (label, colour, marker, shift) in styles.items():
        for height, seeds in enumerate(forms.values()):
            x = [row[name] for row in seeds]
            places = np.full(len(x), height + shift)
            look = {"c": colour, "marker": marker, "label": label if not height else None}
            axis.scatter(x, places, s=22, alpha=0.7, **look)
            axis.plot([np.mean(x)] * 2, [height + shift - 0.2, height + shift + 0.2], color=colour)
    for name, x in bounds.items():
        if not math.isnan(x):
            axis.axvline(x, color="0.5", ls="--", lw=1)
            axis.annotate(
                name.split()[0], (x, -0.8), ha="center", va="bottom", fontsize=8, color="0.3"
            )
    axis.set_yticks(range(len(forms)), list(forms), fontsize=8)
    axis.set_ylim(len(forms) - 0.4, -0.8)
    axis.set_xlabel("return; a dot is a seed, a line their mean")
    axis.grid(axis="x", color="0.9")
    axis.legend(fontsize=8, loc="best")
    return figure


def ladder(study: Ladder) -> None:
    """Read runs, write OUT.csv, OUT.md and OUT.png. UsageError if they are not comparable."""
    check_out(study.out)
    runs = read_runs(study.runs, study.only)
    for run in runs:
        check_kind(run, Path(MRA).stem)
        if not run.summary["eval"]:
            raise UsageError(f"{run.where} has no final evaluation.")
        if run.args.get("adapt"):
            raise UsageError(f"{run.where} is an adapted run: it was not trained anew.")
        if missing := [p for p in run.args["populations"] if p not in run.summary["eval"]]:
            raise UsageError(f"{run.where} has no final evaluation in {missing[0]}.")
        for name in ("task", "populations", "eval_populations", *WORLD):
            if run.args.get(name) != runs[0].args.get(name):
                raise UsageError(f"{run.where} and {runs[0].where} differ in {as_flag(name)}.")
    check_groups(runs)
    forms = [*grouped(runs)]
    # A bootstrap depends on the order of seeds.
    runs.sort(key=lambda run: (forms.index(without_seed(run.name)), run.args["seed"]))
    rows = [ladder_row(run, study.all_agents) for run in runs]
    for form in study.against:
        if form not in by_form(rows):
            raise UsageError(f"--against {form}: no run is called so, -s1, -s2, ... aside.")
    if study.against and len(by_form(rows)) == 1:
        raise UsageError(f"--against {study.against[0]}: these runs have no other form.")
    text = ladder_table(rows)
    if study.against:
        text += "\n" + ladder_differences(rows, study.against, study.interquartile)
    earned = [ladder_returns(run, study.all_agents) for run in runs]
    bounds = {
        player: float(np.mean([x(run.args["populations"], player) for x, run in zip(earned, runs)]))
        for player in ("blind", "knows population")
    }
    finish(study.out, text, rows, draw_ladder(rows, bounds))


# --- Whom heads attend to -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attention:
    """Whom a follower attends to in rooms with each z, where colours tell the leaders apart.

    A row per run, training population and z with p(z|m) of at least --least: the attention that a
    follower gives to the red, green and blue leader, means over followers and the episodes' first
    observations, and which of them pays. Writes OUT.csv and OUT.md.
    """

    runs: Runs  # runs of mra_maddpg_particle.py in rooms
    episodes: Positive = 200  # episodes whose first observation is looked at
    seed: Seed = 1  # seed of the worlds
    least: Share = 0.01  # least p(z|m) of a z that is shown
    out: Path = Path("mra_attention")  # common beginning of the names of the .csv and .md files


@torch.no_grad()
def attention_rows(trained: Trained, study: Attention, population: str) -> list[dict[str, Any]]:
    """A row of OUT.csv for each z that a run uses in a population."""
    world = make_world(trained, population, study.episodes, study.seed)
    world.reset()
    view = trained.agent.view(world.game, world.obs, latents(world, 0))
    g = trained.agent.attention.all(view)  # (Z, M, N, N)
    followers = world.game.population[0]
    weights = g[:, :, :followers, followers:].mean((1, 2))  # (Z, 3)
    colours, rows = ("red", "green", "blue"), []
    for z, chance in enumerate(prior(trained, world, 0)):
        if chance < study.least:
            continue
        row = {"run": trained.name, "population": population, "z": z, "p(z)": chance}
        row |= dict(zip(colours, weights[z].tolist()))
        rows.append(row | {"pays": colours[paying_leader(world.game)]})
    return rows


def attention(study: Attention) -> None:
    """Write OUT.csv and OUT.md. UsageError if a run is not of MRA in rooms or no z is shown."""
    check_out(study.out)
    rows = []
    for run in read_runs(study.runs):
        check_kind(run, Path(MRA).stem)
        if run.args["task"] != "rooms":
            raise UsageError(f"{run.where} is no run in rooms.")
        trained = load(run)
        for population in trained.populations:
            rows += attention_rows(trained, study, population)
    if not rows:
        raise UsageError(f"--least {study.least}: no z has so large a p(z|m).")
    shown = [{k: f"{x:.2f}" if isinstance(x, float) else x for k, x in r.items()} for r in rows]
    finish(study.out, markdown_table(shown), rows)


# --- What a graph hides from the critic -----------------------------------------------------------


GRAPHS = ("policy", "uniform")  # by which a critic attends


@dataclasses.dataclass(frozen=True)
class Critics:
    """How well a critic fits a policy that stands still, by its graph and by a uniform one.

    Plays with a run's networks, which do not change, and trains its critic on by Eq. (8), from the
    run's weights: once with the policy's graph, as in the paper, once attending to all alike
    (--critic-graph uniform). A row per graph and part of the minibatches: the mean loss in each
    training population. Writes OUT.csv and OUT.md, which has the last parts.
    """

    runs: Runs  # runs of mra_maddpg_particle.py, not adapted ones
    timesteps: Positive = 20_000  # environment steps in each population
    minibatches: Positive = 2000  # of the run's --batch-size, shared by its populations
    every: Positive = 200  # minibatches whose losses a row is the mean of
    seed: Seed = 1  # seed of actions and minibatches
    out: Path = Path("mra_critics")  # common beginning of the names of the .csv and .md files


def refilled(trained: Trained, study: Critics, rng: torch.Generator) -> list[Any]:
    """A collector for each population, whose replay has only what the run's policy does now."""
    saved, _ = harness.load_checkpoint(str(trained.run.path), quiet=True)
    saved = saved["ranks"][0]["collectors"]
    args = dataclasses.replace(trained.args, buffer_size=study.timesteps)
    collectors = []
    for name in trained.populations:
        collector = trained.script.Collector(args, name, trained.agent.device)
        collector.load_state_dict(saved[name])  # the scale of its rewards, its episodes
        collector.buffer.steps = 0
        while collector.buffer.size < study.timesteps:
            trained.script.collect(trained.agent, collector, rng, rng)
        collectors.append(collector)
    return collectors


def critic_rows(trained: Trained, study: Critics, graph: str) -> list[dict[str, Any]]:
    """Rows of OUT.csv of a run's critic with this graph. Moves the critic's weights."""
    script, args, agent = trained.script, trained.args, trained.agent
    rng = torch.Generator().manual_seed(study.seed)
    collectors = refilled(trained, study, rng)
    critics = (agent.critic, agent.target_critic)
    for critic in critics:
        del critic.graph  # its own one, if it has one
        critic.graph = script.uniform_graph if graph == "uniform" else None
    optimiser = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate)
    size = math.ceil(args.batch_size / len(collectors))
    rows, part = [], []
    for step in range(1, study.minibatches + 1):
        losses = []
        for batch in (collector.buffer.sample(agent, rng, size) for collector in collectors):
            with torch.no_grad():
                g, next_g = agent.attention(batch.view), agent.attention(batch.next_view)
            losses.append(script.critic_loss(args, agent, batch, g, next_g, rng))
        losses = torch.stack(losses)
        script.descend(losses.mean(), agent.critic, optimiser, args.max_grad_norm)
        if step % args.inner_steps == 0:  # as often as in training
            agent.follow()
        part.append(losses.detach())
        if len(part) == study.every:
            means = torch.stack(part).mean(0).tolist()
            row = {"run": trained.name, "critic's graph": graph, "minibatches": step}
            rows.append(row | dict(zip(trained.populations, means)))
            part = []
    return rows


def critics(study: Critics) -> None:
    """Write OUT.csv and OUT.md. UsageError if a run is not of MRA, or was adapted."""
    check_out(study.out)
    check([(study.every > study.minibatches, "--every exceeds --minibatches")])
    runs = read_runs(study.runs)
    for run in runs:
        check_kind(run, Path(MRA).stem)
        if run.args["adapt"]:
            raise UsageError(f"{run.where} was adapted: it has not trained by itself.")
    rows, last = [], []
    for run, graph in itertools.product(runs, GRAPHS):
        rows += critic_rows(load(run), study, graph)
        last.append(rows[-1])
        harness.tell(f"{run.name}: the critic with the {graph} graph is trained")
    shown = [{k: f"{x:.2f}" if isinstance(x, float) else x for k, x in r.items()} for r in last]
    finish(study.out, markdown_table(shown), rows)


# --- Tables 1 and 2 -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CrossPlay:
    """Tables 1 and 2 of MRA: Pac-Men of one run against ghosts of another.

    Runs whose names differ only in -s1, -s2, ... are seeds of one method. Pac-Men of every run play
    against ghosts of every run. All pairs play the same --episodes episodes. Latents are drawn from
    p(z|m), but adapted agents keep theirs; EPC's agents are copied or left out to fit the
    population. Writes OUT.csv (a row per pair of runs, with the steps and flags of both) and
    OUT.md: mean returns per agent over pairs of runs, the lowest and highest pair, and, as in the
    paper, returns divided by the table's largest (if all are positive).
    """

    runs: Runs  # pacman runs of mra_maddpg_particle.py, or of maddpg, maac, rl2, epc in baselines/
    population: str = "8,4"  # numbers of Pac-Men and ghosts
    episodes: Annotated[int, Interval(ge=2)] = 200  # episodes of each pair of runs
    seed: Seed = 1  # seed of worlds, latents and actions
    out: Path = Path("cross_play")  # common beginning of the names of the .csv and .md files


WORLD = ("shaping", "max_episode_steps", "collision_penalty")  # flags that make another world


def together(pac_men: Player, ghosts: Player) -> Player:
    """A player in which agents of the first type (Pac-Men) act as one player, ghosts as another."""

    def act(world: ParticleWorld) -> Tensor:
        first = world.game.population[0]
        own, others = pac_men(world), ghosts(world)
        return torch.cat((own[:, :first], others[:, first:]), 1)

    return act


def play_pair(a: Trained, b: Trained, study: CrossPlay) -> np.ndarray:
    """Play a's Pac-Men against b's ghosts: mean returns per agent (2,), of Pac-Men and ghosts."""
    world = make_world(a, study.population, study.episodes, study.seed)
    pac_men = a.script.load_player(str(a.run.path), study.seed)
    ghosts = b.script.load_player(str(b.run.path), study.seed + 1)
    return play(world, together(pac_men, ghosts)).mean(0)


def tables(rows: list[dict]) -> str:
    """Markdown tables for Pac-Men and for ghosts: returns, raw and divided by the largest."""
    text = ""
    methods = list(dict.fromkeys(row["pac_men"] for row in rows))
    for role in ("pac_man", "ghost"):
        found = {}
        for pair in itertools.product(methods, methods):
            played = [row for row in rows if (row["pac_men"], row["ghosts"]) == pair]
            x = [row[role] for row in played]
            found[pair] = (float(np.mean(x)), min(x), max(x), len(x))
        largest, lines = max(mean for mean, *_ in found.values()), []
        for (pac_men, ghosts), (mean, low, high, pairs) in found.items():
            line = {"Pac-Men of": pac_men, "ghosts of": ghosts, "return": f"{mean:.2f}"}
            line |= {"lowest and highest pair": f"{low:.2f}, {high:.2f}", "pairs": pairs}
            share = f"{mean / largest:.2f}" if min(m for m, *_ in found.values()) > 0 else "-"
            lines.append(line | {"divided by the largest": share})
        text += f"Return per {role.replace('_', '-')} and episode\n\n{markdown_table(lines)}\n"
    return text


def cross_play(study: CrossPlay) -> None:
    """Play all pairs of runs, then write OUT.csv and OUT.md. UsageError if a run cannot play."""
    check_out(study.out)
    trained = [load(run) for run in read_runs(study.runs)]
    for x in trained:
        if x.args.task != "pacman":
            raise UsageError(f"{x.run.where} is a run of {x.args.task}, not of pacman.")
        for name in WORLD:
            if getattr(x.args, name) != getattr(trained[0].args, name):
                other = f"and {trained[0].run.where} differ in {as_flag(name)}"
                raise UsageError(f"{x.run.where} {other}: these are two worlds.")
        why = ""
        if not getattr(x.args, "share_parameters", True):  # scripts without the flag fit all
            why = "has parameters per agent"
        elif kind_of(x.run.args["script"]) == Path(MAAC).stem:
            why = "reads a vector with a place for each other agent"
        if why and x.populations != (study.population,):
            raise UsageError(f"{x.run.where} {why}: it plays {x.populations[0]} only.")
    rows = []
    for a, b in itertools.product(trained, trained):
        pac_man, ghost = play_pair(a, b, study)
        text = f"Pac-Men of {a.name} beside ghosts of {b.name}"
        harness.tell(f"{text}: {pac_man:.2f}, {ghost:.2f}", file=sys.stderr)
        names = {"pac_men": without_seed(a.name), "ghosts": without_seed(b.name)}
        runs = {"pac_men_run": a.name, "ghosts_run": b.name}
        returns = {"pac_man": float(pac_man), "ghost": float(ghost)}
        about: dict[str, Any] = {}
        for side, x in (("pac_men", a), ("ghosts", b)):
            about[f"{side}_steps"] = x.timesteps
            about[f"{side}_flags"] = flags_text(x.run.args)
        rows.append(names | runs | returns | about)
    text = f"{study.episodes} episodes per pair of runs, population {study.population}\n\n"
    finish(study.out, text + tables(rows), rows)


# --- Main -----------------------------------------------------------------------------------------


COMMANDS = {
    "train": train,
    "figures": figures,
    "ladder": ladder,
    "attention": attention,
    "critics": critics,
    "cross-play": cross_play,
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    torch.set_num_threads(1)
    return run_subcommand(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
