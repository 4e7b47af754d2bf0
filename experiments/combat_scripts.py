"""What scripted agents win in battles, per family and team size: reference points.

python experiments/combat_scripts.py
python experiments/combat_scripts.py --scenarios sz --team-sizes 3 8 --episodes 512
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro
from figures import Positive, Seed, check_bounds, one_line_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.combat import Combat, EnemyAI, Scenario
from envs.combat_episodes import play, scripted_policies, summarise, table


@dataclasses.dataclass(frozen=True)
class Scripts:
    """Which battles."""

    scenarios: tuple[Scenario, ...] = ("sz", "csz", "mmm")
    team_sizes: tuple[Positive, ...] = (3, 4, 5, 6, 7, 8)
    episodes: Positive = 2048  # of each cell
    seed: Seed = 1
    enemy_ai: EnemyAI = "sticky"


def main(args: Scripts) -> None:
    check_bounds(args)
    for scenario in args.scenarios:
        rows = {}
        for size in args.team_sizes:
            battles = Combat(
                scenario, (size,), args.episodes, args.seed, enemy_ai=args.enemy_ai, once=True
            )
            for name, policy in scripted_policies(args.seed).items():
                battles.seed(args.seed)  # all meet the same teams and places
                rows[f"{scenario} {size} {name}"] = summarise(play(battles, policy))
        print(table(rows), flush=True)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Scripts))))
