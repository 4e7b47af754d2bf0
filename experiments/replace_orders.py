"""Which of its orders cost a trained team its battles: some replaced by a script's.

    python experiments/replace_orders.py runs/sz-refil-s1 --team-sizes 4

Greedy agents of a run of refil_smac.py or mipi_refil_smac.py play the same battles several times:
as they are, with stops, with stops and moves, and with the choice of targets taken over by the
script that attacks the nearest enemy; then that script and focus alone. Prints Markdown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from figures import (
    Positive,
    Seed,
    UsageError,
    check_bounds,
    load_script,
    one_line_errors,
    read_args,
)
from torch import Tensor

from envs.smac.combat import FIRST_TARGET, STOP
from envs.smac.episodes import Policy, focus, nearest, play, summarise, table

SCRIPTS = ("refil_smac", "mipi_refil_smac")


@dataclasses.dataclass(frozen=True)
class Study:
    """Whose orders, and where."""

    run: Annotated[Path, tyro.conf.Positional]
    team_sizes: tuple[Positive, ...] = (4,)
    episodes: Positive = 256  # of each line
    seed: Seed = 1


def is_stop(own: Tensor, other: Tensor) -> Tensor:
    return own == STOP


def is_stop_or_move(own: Tensor, other: Tensor) -> Tensor:
    return (own >= STOP) & (own < FIRST_TARGET)


def is_target(own: Tensor, other: Tensor) -> Tensor:
    """Both attack, or heal."""
    return (own >= FIRST_TARGET) & (other >= FIRST_TARGET)


def replaced(policy: Policy, where: Callable[[Tensor, Tensor], Tensor]) -> Policy:
    """The policy, but for the orders `where` says, which are those of `nearest`."""

    def act(battles: Any) -> Tensor:
        own, other = policy(battles).clone(), nearest(battles)
        return torch.where(where(own, other), other, own)

    return act


def open_run(run: Path, size: int, episodes: int, seed: int) -> tuple[Any, Callable[[], Policy]]:
    """Battles of teams of one size, an episode each, and what makes the greedy agents of a run's
    last checkpoint (anew for every episode: they have a memory); UsageError for what is no run of
    these scripts."""
    name = read_args(run)["script"]
    if name not in SCRIPTS:
        raise UsageError(f"{run} is a run of {name}.py, not of {' or '.join(SCRIPTS)}.")
    script = load_script(name)
    try:
        saved, _ = script.load_checkpoint(str(run))
        args = script.read_args(["--eval-only", str(run), "--final-episodes", "1"])
        battles = script.make_envs(args, (size,), episodes, seed)
        agent = script.Agent(args, battles.family, torch.device("cpu"))
        script.restore(agent.parts(), saved["agent"], str(run))
    except script.RunError as error:
        raise UsageError(str(error)) from None
    return battles, lambda: script.player(agent)


def main(study: Study) -> None:
    """Print a table per team size."""
    check_bounds(study)
    torch.set_num_threads(1)
    for size in study.team_sizes:
        battles, own = open_run(study.run, size, study.episodes, study.seed)
        policies = {
            "as it is": own(),
            "stops replaced": replaced(own(), is_stop),
            "stops and moves replaced": replaced(own(), is_stop_or_move),
            "targets replaced": replaced(own(), is_target),
            "nearest": nearest,
            "focus": focus,
        }
        rows = {}
        for who, policy in policies.items():
            battles.seed(study.seed)
            rows[f"{size} {who}"] = summarise(play(battles, policy))
        print(table(rows), flush=True)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
