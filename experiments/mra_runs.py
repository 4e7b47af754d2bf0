"""The training runs behind MRA's figures: one command per figure starts what it needs.

    python experiments/mra_runs.py fig2 fig3 --tasks resource --seeds 1 2 3
    python experiments/mra_runs.py fig4 fig5 fig7 fig8 --dry-run

Every run of a figure has the same number of environment steps in total, whatever its number of
populations (the paper's "equal episodes": divide by 20). Runs go to DIR/{task}-{method}-s{seed}; a
finished one is kept, one that was stopped is resumed. What each figure compares:

    fig2   MRA, Reptile, the single-game baseline and MADDPG in one game of each world
    fig3   MRA and uni-MRA in all training games
    fig4   adaptation of fig3's MRA to treasure 6 without shaping, treasure 48, pacman 2,8, and
           MADDPG there from scratch
    fig5   fig3's MRA in resource, evaluated in populations it never met
    fig7   option, concat and bilinear representations in resource 6, 9, 12
    fig8   resource trained in 2, 3 and 4 games
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from figures import Positive, Seed, check_bounds, one_line_errors, train_all

MRA, MADDPG = "mra_maddpg_particle.py", "baselines/maddpg_particle.py"
TRAINED = {
    "treasure": ("3", "6", "12", "24"),
    "resource": ("6", "9", "12", "15"),
    "pacman": ("4,2", "6,3", "8,4"),
}
GAME = {"treasure": "6", "resource": "12", "pacman": "8,4"}  # of Fig. 2
UNSEEN = {"resource": "3 7 10 13 18 24", "treasure": "48", "pacman": "2,8"}
REPTILE = "--latent-size 1 --phi-gradient actor"
Figure = Literal["fig2", "fig3", "fig4", "fig5", "fig7", "fig8"]
Task = Literal["treasure", "resource", "pacman"]


@dataclasses.dataclass(frozen=True)
class Study:
    """Which runs, and how long."""

    figures: Annotated[tuple[Figure, ...], tyro.conf.Positional]
    tasks: tuple[Task, ...] = ("treasure", "resource", "pacman")  # of figs. 2, 3 and 4
    seeds: tuple[Seed, ...] = (1, 2, 3)
    total_timesteps: Positive = 240_000  # of every training, in all its populations together
    adapt_timesteps: Positive = 120_000  # of every adaptation, and of MADDPG beside it
    preset: Literal["fast", "paper"] = "fast"
    jobs: Positive = 1  # runs at a time
    dir: Path = Path("runs")
    flags: str = ""  # for every run, as --flags="--save-every 40000"
    dry_run: bool = False  # print the commands only


def several(task: str, method: str, flags: str = "", names: tuple[str, ...] = ()) -> dict[str, str]:
    """{name: command} of a training in several populations."""
    names = names or TRAINED[task]
    unseen = f"--eval-populations {UNSEEN[task]}"
    command = f"{MRA} --task {task} --populations {' '.join(names)} {unseen} {flags}"
    return {f"{task}-{method}": command}


def commands(figure: str, study: Study) -> list[dict[str, str]]:
    """Stages, each of which needs those before: {name: command}."""
    first: dict[str, str] = {}
    then: dict[str, str] = {}
    for task in study.tasks:
        game = GAME[task]
        if figure in ("fig2", "fig3", "fig4"):
            first |= several(task, "mra")
        if figure == "fig2":
            first |= several(task, "reptile", REPTILE)
            first[f"{task}-single"] = f"{MRA} --task {task} --populations {game}"
            first[f"{task}-maddpg"] = f"{MADDPG} --task {task} --population {game}"
        if figure == "fig3":
            first |= several(task, "uni", "--latent-prior uniform")
        targets = {"treasure": (("6", "--no-shaping"), ("48", "")), "pacman": (("2,8", ""),)}
        for population, flags in targets.get(task, ()) if figure == "fig4" else ():
            place = f"{task}-{population.replace(',', '-')}{'-sparse' if flags else ''}"
            source = f"{study.dir}/{task}-mra-sSEED"
            then[f"{place}-adapt"] = f"{MRA} --adapt {source} --population {population} {flags}"
            scratch = f"{MADDPG} --task {task} --population {population} {flags}"
            then[f"{place}-maddpg"] = scratch
    if figure == "fig5":
        first |= several("resource", "mra")
    if figure == "fig7":
        for how in ("option", "concat", "bilinear"):
            first |= several("resource", f"3-{how}", f"--representation {how}", ("6", "9", "12"))
    if figure == "fig8":  # three games are fig. 7's with options, four those of figs. 2, 3 and 5
        first |= several("resource", "of-2", "", ("6", "12"))
        first |= several("resource", "3-option", "--representation option", ("6", "9", "12"))
        first |= several("resource", "mra")
    return [first, then]


def with_flags(command: str, study: Study) -> str:
    """The preset, which an adaptation takes from its source, and what --flags says."""
    preset = "" if "--adapt" in command else f"--preset {study.preset}"
    return f"{command} {preset} {study.flags}"


def main(study: Study) -> None:
    """All runs of the figures, seed by seed."""
    check_bounds(study)
    stages = [{}, {}]
    for figure in study.figures:
        for stage, more in zip(stages, commands(figure, study)):
            stage |= {name: with_flags(command, study) for name, command in more.items()}
    for stage, timesteps in zip(stages, (study.total_timesteps, study.adapt_timesteps)):
        train_all(stage, study, timesteps)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
