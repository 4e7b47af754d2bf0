"""Create worlds from the name of a substrate: Melting Pot, the toy, or a user's own class."""

from __future__ import annotations

from typing import Any


def make_worlds(
    substrate: str,
    num_envs: int,
    seed: int,
    first_world: int = 0,
    max_episode_steps: int = 0,
    num_workers: int = 0,
    timeout: float = 8.0,
) -> Any:
    """num_envs worlds, stepped together: a MeltingPot, a TileGame or an OwnWorlds object.

    substrate            one of Melting Pot's, "toy" (envs/meltingpot/toy.py) or "module:Class", a
                         PettingZoo class of the user (docs/own_world.md); else, and for a
                         scenario, which is for evaluations, ValueError
    first_world          number of the first world; seeds depend on it, so processes of a run differ
    max_episode_steps    truncate episodes after so many steps; 0: play to their natural end
    num_workers          processes that step Melting Pot's worlds; 0: one per core
    timeout              seconds without a sign of life after which a worker ends the run
    ModuleNotFoundError if Melting Pot is needed but not installed."""
    # Imported where they are used, because Melting Pot's module takes a second.
    options = {"first_world": first_world, "max_episode_steps": max_episode_steps}
    if substrate == "toy":
        from envs.meltingpot.toy import TileGame

        return TileGame(num_envs, seed, **options)
    if ":" in substrate:
        from envs.meltingpot.own import OwnWorlds

        return OwnWorlds(substrate, num_envs, seed, **options)
    from envs.meltingpot.scenarios import scenario_names
    from envs.meltingpot.worlds import MeltingPot

    home, _, number = substrate.rpartition("_")
    if substrate in scenario_names(home):  # MeltingPot would play it without its bots
        text = f"--substrate {home} --eval-scenarios SC{number} evaluates in it"
        raise ValueError(f"{substrate} is a scenario: {text}.")
    return MeltingPot(
        substrate, num_envs, seed, num_workers=num_workers, timeout=timeout, **options
    )
