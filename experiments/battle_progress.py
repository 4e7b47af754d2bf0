"""What a trained team does as its battles go on: how many still last, and where its units are.

    python experiments/battle_progress.py runs/sz-refil-s1 --team-sizes 4

Greedy agents of a run of refil_smac.py or mipi_refil_smac.py play; a script's rows stand beside
theirs (`--policies agents focus`). Per moment, over the battles that still last:

    lasting   share of all battles
    own, enemies   units alive per battle
    sees      share of living own units with an enemy within the sight of 9
    able      share of them with an enemy they may attack
    attacks   share of the able that do
    nearest   median distance to the nearest enemy, map units
    edge      median distance to the nearest edge of the map

Prints Markdown. It shows, for one, whether battles are long because both sides fight on, or because
nobody is there to fight.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from figures import Positive, Seed, check_bounds, markdown_table, one_line_errors
from replace_orders import open_run
from torch import Tensor

from envs.smac.combat import FIRST_TARGET, MAP, SIDE, SIGHT
from envs.smac.episodes import Policy, play, scripted_policies

Name = Literal["agents", "random", "nearest", "focus", "retreat"]


@dataclasses.dataclass(frozen=True)
class Study:
    """Whose battles, and which moments."""

    run: Annotated[Path, tyro.conf.Positional]
    team_sizes: tuple[Positive, ...] = (4,)
    policies: tuple[Name, ...] = ("agents", "focus")
    episodes: Positive = 256  # of each policy
    every: Positive = 15  # steps between rows
    seed: Seed = 1


def moment(battles: Any, actions: Tensor) -> dict[str, float]:
    """One row: what units do in the battles that last; NaN where there is nobody to ask."""
    snap, chosen = battles.snapshot, np.asarray(actions)  # (B, A)
    alive, x, y = (np.asarray(v) for v in (snap.alive, snap.x, snap.y))  # (B, A+E)
    own, enemies = alive[:, :SIDE], alive[:, SIDE:]
    lasting = own.any(1) & enemies.any(1)
    mine = own & lasting[:, None]
    gap = np.hypot(x[:, :SIDE, None] - x[:, None, SIDE:], y[:, :SIDE, None] - y[:, None, SIDE:])
    nearest = np.where(enemies[:, None], gap, np.inf).min(2)[mine]
    edge = np.min([x, y, MAP - x, MAP - y], axis=0)[:, :SIDE][mine]
    able = np.asarray(battles.obs.avail)[:, :, FIRST_TARGET:].any(-1)[mine]
    attacks = (chosen >= FIRST_TARGET)[mine]
    return {
        "lasting": lasting.mean(),
        "own": mean(own[lasting].sum(1)),
        "enemies": mean(enemies[lasting].sum(1)),
        "sees": mean(nearest <= SIGHT),
        "able": mean(able),
        "attacks": mean(attacks[able]),
        "nearest": float(np.median(nearest)) if len(nearest) else np.nan,
        "edge": float(np.median(edge)) if len(edge) else np.nan,
    }


def mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")


def progress(battles: Any, policy: Policy, every: int) -> dict[int, dict[str, float]]:
    """{step: row} of one episode of every battle."""
    rows: dict[int, dict[str, float]] = {}
    step = 0

    def act(battles: Any) -> Tensor:
        nonlocal step
        actions = policy(battles)
        if step % every == 0:
            rows[step] = moment(battles, actions)
        step += 1
        return actions

    play(battles, act)
    return rows


def main(study: Study) -> None:
    """Print a table per team size."""
    check_bounds(study)
    torch.set_num_threads(1)
    for size in study.team_sizes:
        battles, agents = open_run(study.run, size, study.episodes, study.seed)
        policies = {"agents": agents(), **scripted_policies(study.seed)}
        table = []
        for who in study.policies:
            battles.seed(study.seed)  # all meet the same teams and places
            for step, row in progress(battles, policies[who], study.every).items():
                name = {"who": f"{size} {who}", "step": step}
                table.append(name | {k: "" if np.isnan(v) else f"{v:.2f}" for k, v in row.items()})
        print(markdown_table(table), flush=True)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
