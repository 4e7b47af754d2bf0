"""Trained agents of the particle scripts, for the commands that show or pit them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import UsageError, load_script, read_args
from torch import Tensor

from envs.particle.episodes import Player, read_population
from envs.particle.worlds import Game, ParticleWorld, make_game

SCRIPTS = ("mra_maddpg_particle", "maddpg_particle")


class Trained(NamedTuple):
    """A run's newest checkpoint."""

    run: Path
    script: Any  # the module
    args: Any
    agent: Any
    populations: tuple[str, ...]  # that it was trained in

    def player(self, game: Game, episodes: int, seed: int, z: Tensor | None = None) -> Player:
        """Its agents in `episodes` worlds; z (episodes, N), by default drawn from p(z|m)."""
        if self.script.__name__.endswith("maddpg_particle") and not self.latent:
            return self.script.net_player(self.agent, seed)
        if z is None:
            rng = torch.Generator().manual_seed(seed)
            z = self.script.draw_latents(self.agent, game, (episodes,), rng)
        return self.script.net_player(self.agent, z, seed)

    @property
    def latent(self) -> bool:
        return hasattr(self.args, "latent_size")


def load(run: Path) -> Trained:
    """The agents of a run directory, on the CPU; UsageError if it is not of a particle script."""
    about = read_args(run)
    if about["script"] not in SCRIPTS:
        raise UsageError(f"{run} is a run of {about['script']}.py, not of {' or '.join(SCRIPTS)}.")
    script = load_script(about["script"])
    try:
        saved, _ = script.load_checkpoint(str(run))
    except script.RunError as error:
        raise UsageError(str(error)) from None
    own = {k: tuple(x) if isinstance(x, list) else x for k, x in saved["args"].items()}
    known = {field.name for field in dataclasses.fields(script.Args)}
    if own.keys() != known:
        raise UsageError(f"{run} is of a version that differs in {', '.join(own.keys() ^ known)}.")
    args = dataclasses.replace(script.Args(**own), device="cpu", compile=False)
    several = "populations" in own and not own["adapt"]
    populations = args.populations if several else (args.population,)
    game = make_game(args.task, read_population(populations[0]))
    agent = script.Agent(args, game, torch.device("cpu"))
    nets = {k: x for k, x in agent.parts().items() if isinstance(x, torch.nn.Module)}
    script.restore(nets, saved["agent"], str(run))
    return Trained(run, script, args, agent, populations)


def make_world(trained: Trained, population: str, episodes: int, seed: int) -> ParticleWorld:
    """Worlds as the run's own, at a population; UsageError if there is none of that."""
    try:
        return trained.script.make_envs(trained.args, population, episodes, seed)
    except trained.script.RunError as error:
        raise UsageError(str(error)) from None
