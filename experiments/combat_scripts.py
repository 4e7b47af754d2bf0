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

from envs.combat import Combat, EnemyAI, Scenario
from envs.combat_episodes import play, scripted_policies, summarise, table
from envs.smac import BattleError, make_battles


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


def new_battles(args: Scripts, scenario: str, size: int) -> Combat:
    """All episodes at once; in StarCraft II so many games. UsageError where it cannot be played."""
    number, options = args.episodes, {"enemy_ai": args.enemy_ai}
    if args.backend == "sc2":
        number, options = args.num_envs, {}
    try:
        one = scenario, (size,), number, args.seed
        return make_battles(args.backend, *one, once=True, **options)
    except BattleError as error:
        raise UsageError(str(error)) from None


def main(args: Scripts) -> None:
    check_bounds(args)
    for scenario in args.scenarios:
        rows = {}
        for size in args.team_sizes:
            battles = new_battles(args, scenario, size)
            for name, policy in scripted_policies(args.seed).items():
                battles.seed(args.seed)  # all meet the same teams and places
                episodes = []
                while len(episodes) < args.episodes:
                    episodes += play(battles, policy)
                rows[f"{scenario} {size} {name}"] = summarise(episodes[: args.episodes])
            getattr(battles, "close", lambda: None)()
        print(table(rows), flush=True)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Scripts))))
