"""Worlds by the name of their substrate, whichever kind they are of."""

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
    """num_envs worlds stepped together; ValueError or ModuleNotFoundError if they cannot be had.

    substrate            one of Melting Pot's, "toy" (envs/meltingpot/toy.py) or "module:Class", a
                         PettingZoo class of one's own (docs/own_world.md)
    first_world          the number of the first one: processes of one run have different worlds
    max_episode_steps    episodes are truncated there; 0: they end naturally
    num_workers          processes that step Melting Pot's worlds; 0: one per core
    timeout              seconds until one of those that gives no sign ends the run
    """
    # Imported where they are used: Melting Pot's takes a second.
    options = {"first_world": first_world, "max_episode_steps": max_episode_steps}
    if substrate == "toy":
        from envs.meltingpot.toy import TileGame

        return TileGame(num_envs, seed, **options)
    if ":" in substrate:
        from envs.meltingpot.own import OwnWorlds

        return OwnWorlds(substrate, num_envs, seed, **options)
    from envs.meltingpot.worlds import MeltingPot

    return MeltingPot(
        substrate, num_envs, seed, num_workers=num_workers, timeout=timeout, **options
    )
