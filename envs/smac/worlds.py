"""The world that a script's flags ask for: battles in the simulator or in StarCraft II, or Resource
Collection. All have the interface of envs.smac.combat.Combat.

    wrong_flags(args)                      which of --scenario, --backend, ... exclude each other
    battles = make_worlds("sim", "sz", (3, 4, 5), num_battles=8, seed=1)
    playing("sz").play(battles, policy)    one episode in each world
    play_all(args, evaluation, policies, make, seed)       what a script's evaluation plays
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from envs.smac import combat, episodes, game, resource_collection
from envs.smac.combat import FAMILIES, Family
from envs.smac.episodes import Policy

LONGEST = 1_000  # most steps of --max-episode-steps: a battle with an agent that flees need not end


def family_of(scenario: str, egocentric: bool = False) -> Family | resource_collection.Family:
    """Sizes of a scenario's observations and actions, and its teams; egocentric: resource only.
    ValueError if there is no such scenario."""
    if scenario == "resource":
        return resource_collection.new_family(egocentric)
    if scenario not in FAMILIES:
        known = ", ".join((*FAMILIES, "resource"))
        raise ValueError(f"There is no --scenario {scenario}: there are {known}.")
    return FAMILIES[scenario]


def playing(scenario: str) -> Any:
    """The module with a scenario's scripted_policies(), play(), summarise(), table(), film()."""
    return resource_collection if scenario == "resource" else episodes


def make_worlds(
    backend: str,
    scenario: str,
    team_sizes: tuple[int, ...],
    num_battles: int,
    seed: int,
    first_battle: int = 0,
    episode_limit: int = combat.EPISODE_LIMIT,
    clip_regeneration: bool = False,
    enemy_ai: str = "sticky",
    threads: int = 1,
    game_version: str = "",
    once: bool = True,
    rescale: bool = False,
    egocentric: bool = False,
) -> Any:
    """num_battles worlds of a scenario, with the numbers first_battle, first_battle + 1, ... A seed
    and a number determine a world's draws. once: a world that has ended stands still until reset().
    An argument that a world does not have is ignored: enemy_ai and threads are for `sim`,
    game_version for `sc2`; rescale and egocentric for Resource Collection, which has at most 145
    steps. ValueError for impossible team sizes, BattleError without the game."""
    options = {"team_sizes": team_sizes, "num_battles": num_battles, "seed": seed, "once": once}
    options |= {"first_battle": first_battle}
    if scenario == "resource":
        limit = min(episode_limit, resource_collection.EPISODE_LIMIT)
        options |= {"episode_limit": limit}
        options |= {"rescale": rescale, "egocentric": egocentric}
        return resource_collection.ResourceCollection(**options)
    options |= {"scenario": scenario, "episode_limit": episode_limit}
    options |= {"clip_regeneration": clip_regeneration}
    if backend == "sc2":
        return game.make_battles(**options, game_version=game_version or None)
    return combat.Combat(**options, enemy_ai=enemy_ai, threads=threads)


def wrong_flags(args: Any) -> list[tuple[Any, str]]:
    """[(whether it is wrong, sentence)] for a script's `args`: team sizes that no team has, flags
    that the chosen world would ignore, episodes that might never end."""
    collects = args.scenario == "resource"
    in_game = args.backend == "sc2"
    other_rules = args.clip_regeneration or args.enemy_ai != "sticky"
    longest = resource_collection.EPISODE_LIMIT
    begins = not args.resume and not args.eval_only  # a saved run may have what is now refused
    try:
        family_of(args.scenario).teams((*args.team_sizes, *args.eval_team_sizes))
        no_team = "--team-sizes is empty" if not args.team_sizes else ""
    except ValueError as error:
        no_team = str(error).rstrip(".")
    return [
        (no_team, no_team),
        (args.max_episode_steps > LONGEST, f"--max-episode-steps exceeds {LONGEST}"),
        (
            begins and collects and longest < args.max_episode_steps != combat.EPISODE_LIMIT,
            f"--scenario resource has at most {longest} steps",
        ),
        (
            (getattr(args, "rescale", 0) or getattr(args, "egocentric", 0)) and not collects,
            "--rescale and --egocentric are for --scenario resource",
        ),
        (collects and in_game, "--scenario resource is no game of --backend sc2"),
        (
            collects and other_rules,
            "--enemy-ai and --clip-regeneration are for battles, not for --scenario resource",
        ),
        (
            in_game and args.enemy_ai != "sticky" and not args.eval_only,
            "--enemy-ai is for --backend sim, the game has its own",
        ),
        (
            args.game_version and not in_game and not args.eval_only,
            "--game-version is for --backend sc2",
        ),
        (
            begins and args.env_threads > 1 and (collects or in_game),
            "--env-threads is for battles of --backend sim",
        ),
    ]


def wrong_to_continue(args: Any, own: dict[str, Any]) -> list[tuple[Any, str]]:
    """[(whether it is wrong, sentence)]: a run with the saved arguments `own` can be resumed only
    with its --backend, --game-version and --num-envs. It may be evaluated with others, if they do
    something there."""
    in_simulator = args.backend == "sim" and args.scenario != "resource"
    version, backend, number = own["game_version"], own["backend"], own["num_envs"]
    other_version = args.game_version != version
    return [
        (other_version and args.backend == "sim", "--game-version is for --backend sc2"),
        (
            args.resume and args.backend != backend,
            f"{args.resume} is a run with --backend {backend}",
        ),
        (
            args.resume and other_version,
            f"{args.resume} is a run with --game-version {version or 'unset'}",
        ),
        (
            args.resume and args.num_envs != number,
            f"{args.resume} is a run with --num-envs {number}",
        ),
        (
            args.env_threads not in (1, own["env_threads"]) and not in_simulator,
            "--env-threads is for battles of --backend sim",
        ),
    ]


def score(
    scenario: str, battles: Any, policy: Policy, number: int, progress: Callable[[int], None]
) -> dict[str, float]:
    """summarise() of a policy's first `number` episodes, one per battle and round; of StarCraft II
    also "lost_to_failures", episodes cut short and counted as not won. progress: as for play()."""
    world, played = playing(scenario), []
    while len(played) < number:
        played += world.play(battles, policy, progress)
    row = world.summarise(played[:number])
    if isinstance(battles, game.RealBattles):
        row["lost_to_failures"] = sum(battles.lost)
        tqdm.write(f"{battles.game_version}: {sum(battles.lost)} episodes lost")
    return row


def play_all(
    args: Any,
    evaluation: Any,
    policies: dict[str, Policy],
    make: Callable[[tuple[int, ...], int, int], Any],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Play evaluation.episodes of every team size with all policies, which meet the same battles.
    Returns {"SIZE" or "SIZE POLICY": the row of score()}. Of a script's args it reads --scenario,
    --backend, --num-envs, --team-sizes and --eval-team-sizes; evaluation: harness.Evaluation, which
    has the folder of films, of the policy "", and the progress bar; make(sizes, number, seed):
    worlds that are closed afterwards; seed: of the battles."""
    number = together = evaluation.episodes
    if args.backend == "sc2":
        together = min(number, args.num_envs)
    sizes = dict.fromkeys((*args.team_sizes, *args.eval_team_sizes))
    rounds = math.ceil(number / together)
    films = len(sizes) if evaluation.videos else 0
    evaluation.expect(len(sizes) * len(policies) * rounds * together + films)
    results = {}
    for size in sizes:
        own = seed + size  # with one seed, all sizes would have nearly the same mixes
        for name, policy in policies.items():
            with contextlib.closing(make((size,), together, own)) as battles:
                row = score(args.scenario, battles, policy, number, evaluation.progress)
            results[f"{size} {name}".rstrip()] = row
        if evaluation.videos:
            path = evaluation.videos / f"{evaluation.stem}-{size}.mp4"
            with contextlib.closing(make((size,), 1, own)) as battles:
                playing(args.scenario).film(battles, policies[""], path)
            evaluation.progress(1)
    return results
