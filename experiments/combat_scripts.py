"""What scripted agents win in battles, per family and team size: reference points.

python experiments/combat_scripts.py
python experiments/combat_scripts.py --scenarios sz --team-sizes 3 8 --episodes 512
python experiments/combat_scripts.py --backend sc2 --num-envs 4 --episodes 32     in StarCraft II
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro
from figures import Positive, Seed, UsageError, check_bounds, one_line_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.smac.combat import Combat, EnemyAI, Scenario
from envs.smac.episodes import play, scripted_policies, summarise, table
from envs.smac.game import BattleError, make_battles


@dataclasses.dataclass(frozen=True)
class Scripts:
    """Which battles."""

    scenarios: tuple[Scenario, ...] = ("sz", "csz", "mmm")
    team_sizes: tuple[Positive, ...] = (3, 4, 5, 6, 7, 8)
    episodes: Positive = 2048  # of each cell
    seed: Seed = 1
    enemy_ai: EnemyAI = "sticky"  # of the simulator
    backend: Literal["sim", "sc2"] = "sim"  # docs/smac.md
    num_envs: Positive = 4  # sc2: games at a time
    game_version: str = ""  # sc2: as 4.10.0; default: the newest that is installed


def new_battles(args: Scripts, scenario: str, size: int) -> Combat:
    """All episodes at once; in StarCraft II so many games."""
    number, options = args.episodes, {"enemy_ai": args.enemy_ai}
    if args.backend == "sc2":
        number, options = args.num_envs, {"game_version": args.game_version or None}
    return make_battles(args.backend, scenario, (size,), number, args.seed, once=True, **options)


def play_all(args: Scripts, scenario: str, size: int) -> dict[str, dict[str, float]]:
    """{"sz 3 focus": figures}. Episodes that a failing StarCraft II cut short count as not won, as
    in the scripts' evaluations; how many they were is told on standard error."""
    rows, battles = {}, new_battles(args, scenario, size)
    try:
        for name, policy in scripted_policies(args.seed).items():
            battles.seed(args.seed)  # all meet the same teams and places
            episodes, before = [], sum(getattr(battles, "lost", ()))
            while len(episodes) < args.episodes:
                episodes += play(battles, policy)
            rows[who := f"{scenario} {size} {name}"] = summarise(episodes[: args.episodes])
            if lost := sum(getattr(battles, "lost", ())) - before:
                print(f"{who}: {lost} episodes lost to a failing game", file=sys.stderr)
    finally:
        getattr(battles, "close", lambda: None)()
    return rows


def main(args: Scripts) -> None:
    """Print a table per family."""
    check_bounds(args)
    if args.backend == "sc2" and args.enemy_ai != "sticky":
        raise UsageError("--enemy-ai is the simulator's: StarCraft II has its own.")
    if args.backend == "sim" and args.game_version:
        raise UsageError("--game-version is StarCraft II's: it needs --backend sc2.")
    for scenario in args.scenarios:
        rows = {}
        for size in args.team_sizes:
            try:
                rows |= play_all(args, scenario, size)
            except (ValueError, BattleError) as error:
                raise UsageError(str(error)) from None
        print(table(rows), flush=True)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Scripts))))
