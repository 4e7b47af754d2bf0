"""What scripted agents earn in Resource Collection, per team size: reference points.

python experiments/collection_scripts.py
python experiments/collection_scripts.py --team-sizes 3 8 --episodes 64
"""

from __future__ import annotations

import dataclasses

import torch
import tyro
from figures import Positive, Seed, UsageError, check_bounds, one_line_errors

from envs.smac.resource_collection import (
    NOOP,
    STAY,
    ResourceCollection,
    play,
    scripted_policies,
    summarise,
    table,
)


@dataclasses.dataclass(frozen=True)
class Scripts:
    """Which worlds."""

    team_sizes: tuple[Positive, ...] = (3, 4, 5, 6, 7, 8)
    episodes: Positive = 512  # of each cell
    seed: Seed = 1


def still(world: ResourceCollection) -> torch.Tensor:
    """Agents stay where they begin, around home, and touch the invaders that come by."""
    return torch.where(world.snapshot.present, STAY, NOOP)


def main(args: Scripts) -> None:
    """Print the table."""
    check_bounds(args)
    torch.set_num_threads(1)
    rows = {}
    for size in args.team_sizes:
        try:
            worlds = ResourceCollection((size,), args.episodes, args.seed, once=True)
        except ValueError as error:
            raise UsageError(str(error)) from None
        for name, policy in ({"still": still} | scripted_policies(args.seed)).items():
            worlds.seed(args.seed)  # all meet the same teams and places
            rows[f"{size} {name}"] = summarise(play(worlds, policy))
    print(table(rows))


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Scripts))))
