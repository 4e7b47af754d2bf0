"""A user's own PettingZoo parallel environment, with the interface of envs/meltingpot/worlds.py.

    python bidist_mappo_meltingpot.py --substrate my_world:MyWorld     a class in my_world.py

docs/own_world.md lists what the class must have; its observations are grids of tile ids (integers).
This process steps all B worlds. N players, H W tiles of a view (H' W': global), P kinds of tiles.
"""

from __future__ import annotations

import colorsys
import importlib
import re
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np

from envs.meltingpot.tiles import (
    CAPACITY,
    SPRITE,
    EpisodeCounter,
    Observation,
    Palette,
    Spec,
    Step,
    WorldError,
    ids_to_images,
)


def find_world(name: str) -> Any:
    """Import `name`, "module:attribute", also from the working directory; ValueError: not found, or
    nothing that makes a world."""
    module, _, attribute = name.partition(":")
    if not module or module.startswith("."):
        raise ValueError(f"--substrate {name}: '{module}' is no name of a module.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"--substrate {name}: there is no module {error.name}.") from None
    finally:
        sys.path.remove(here)
    if found is None:
        raise ValueError(f"--substrate {name}: {module} has no {attribute}.")
    if not callable(found):
        raise ValueError(f"--substrate {name}: {attribute} is no class and no function.")
    return found


def new_world(name: str, make: Any) -> Any:
    """make(); ValueError if it cannot be called without arguments."""
    try:
        return make()
    except TypeError as error:
        if error.__traceback__.tb_next is not None:  # raised within the user's code
            raise
        raise ValueError(f"--substrate {name}: {error}.") from None


def grid_of(name: str, space: Any) -> tuple[tuple[int, int], int]:
    """(H, W) and number of kinds P of a Box or MultiDiscrete; ValueError: no grid of integers."""
    shape, dtype = getattr(space, "shape", None), getattr(space, "dtype", None)
    shown = " ".join(str(space).split())  # a MultiDiscrete prints a line for each row
    is_grid = shape is not None and len(shape) == 2 and 0 not in shape
    if not is_grid or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"--substrate {name}: {shown} is no grid of integers (H, W).")
    if hasattr(space, "nvec"):
        lowest = np.broadcast_to(getattr(space, "start", 0), shape)
        highest = lowest + space.nvec - 1
    else:
        lowest, highest = space.low, space.high
    if lowest.min() < 0:
        raise ValueError(f"--substrate {name}: {shown} has kinds below 0.")
    kinds = int(highest.max()) + 1
    if kinds > CAPACITY:
        raise ValueError(f"--substrate {name}: {kinds:,} kinds are more than {CAPACITY:,}.")
    return (int(shape[0]), int(shape[1])), kinds


def actions_of(name: str, space: Any) -> range:
    """The actions of a Discrete, also of one that does not start at 0; ValueError: no Discrete."""
    count, start = getattr(space, "n", None), getattr(space, "start", None)
    if count is None or start is None:
        raise ValueError(f"--substrate {name}: the action space {space} is no Discrete.")
    return range(int(start), int(start) + int(count))


def role_of(agent: Any) -> str:
    """The name of a player without its number: "adversary_0" -> "adversary"."""
    return re.sub(r"_?\d+$", "", str(agent))


PLAIN = 22  # kinds that colours alone keep apart; the hue of kind 22 is almost that of kind 1


def new_sprites(count: int) -> np.ndarray:
    """Default sprites of `count` kinds, (P, 8, 8, 3) uint8: black, then well separated hues. From
    kind PLAIN on, a random half of the pixels is dark: a pattern that no other kind has."""
    hues = [(0.618 * k % 1, 0.65, 0.9 - 0.3 * (k % 3) / 2) for k in range(count - 1)]
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(*hue) for hue in hues)]
    sprites = patches(np.array(np.array(colours) * 255, np.uint8))
    rng = np.random.default_rng(0)
    dark = rng.random((count, SPRITE, SPRITE, 1)) < 0.5
    dark[:PLAIN] = False
    return np.where(dark, sprites // 4, sprites)


def patches(colours: np.ndarray) -> np.ndarray:
    """Colours (P, 3) uint8 -> sprites (P, 8, 8, 3) uint8 of one colour each."""
    return colours[:, None, None].repeat(SPRITE, 1).repeat(SPRITE, 2)


def own_sprites(name: str, colours: Any, kinds: int) -> np.ndarray:
    """The sprites (P, 8, 8, 3) uint8 of a world's own colours; ValueError: unsuitable colours."""
    colours = np.asarray(colours)
    right = colours.shape == (kinds, 3) and not colours[0].any()
    if not right or colours.min() < 0 or colours.max() > 255:
        text = f"colours must be {kinds} rows of red, green, blue, the first one black"
        raise ValueError(f"--substrate {name}: {text}.")
    colours, first = colours.astype(np.uint8), {}
    for kind, colour in enumerate(colours.tolist()):
        other = first.setdefault(tuple(colour), kind)
        if other != kind:  # networks see no more of a kind than its colour
            text = f"kinds {other} and {kind} have one colour, {tuple(colour)}"
            raise ValueError(f"--substrate {name}: {text}.")
    return patches(colours)


class OwnWorlds:
    """num_envs worlds of the class `name`, "module:attribute", stepped together. The seed of
    episode e of world b depends on (seed, first_world + b, e). ValueError: unsuitable class."""

    reproducible = False  # the state of a user's class cannot be saved

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int = 1,
        first_world: int = 0,
        max_episode_steps: int = 0,
    ):
        make = find_world(name)
        self.name, self.num_envs, self.seed = name, num_envs, seed
        self.first_world, self.max_episode_steps = first_world, max_episode_steps
        self.worlds = [new_world(name, make) for _ in range(num_envs)]
        self.agents = list(getattr(self.worlds[0], "possible_agents", ()))
        if not self.agents:
            raise ValueError(f"--substrate {name}: its possible_agents name no player.")
        for method in ("observation_space", "action_space", "reset", "step"):
            if not callable(getattr(self.worlds[0], method, None)):
                raise ValueError(f"--substrate {name}: it has no method {method}().")
        if len({id(world) for world in self.worlds}) < num_envs:
            raise ValueError(f"--substrate {name}: it returns one world several times.")
        self.spec, self.kinds = self.plan()
        self.palette = Palette.private()
        kinds = max(self.kinds)
        if hasattr(self.worlds[0], "colours"):
            sprites = own_sprites(name, self.worlds[0].colours, kinds)
        else:
            sprites = new_sprites(kinds)
        self.palette.load(sprites)
        players = len(self.agents)
        self.counter = EpisodeCounter(num_envs, players)
        self.time = np.zeros(num_envs, np.int64)  # steps since each episode's start
        self.episode = np.zeros(num_envs, np.int64)  # number of each world's next episode
        self.views = np.zeros((num_envs, players, *self.spec.grid), np.uint16)
        self.global_views = np.zeros((num_envs, *self.spec.world_grid), np.uint16)
        self.obs: Observation | None = None  # the latest observation

    def plan(self) -> tuple[Spec, list[int]]:
        """The Spec, from the first world, and the number of kinds in each player's view and, last,
        in the state, if there is one. ValueError: unsuitable spaces."""
        world, name = self.worlds[0], self.name
        spaces = [grid_of(name, world.observation_space(agent)) for agent in self.agents]
        choices = {actions_of(name, world.action_space(agent)) for agent in self.agents}
        if len({grid for grid, _ in spaces}) > 1 or len(choices) > 1:
            text = "all players must have views of one size and the same actions"
            raise ValueError(f"--substrate {name}: {text}.")
        grid, kinds = spaces[0][0], [kinds for _, kinds in spaces]
        world_grid = (len(self.agents) * grid[0], grid[1])  # the players' views, one below another
        if hasattr(world, "state_space"):
            world_grid, more = grid_of(name, world.state_space)
            kinds.append(more)
        spec = Spec(
            substrate=name,
            roles=tuple(role_of(agent) for agent in self.agents),
            is_focal=(True,) * len(self.agents),
            actions=tuple({"action": action} for action in choices.pop()),
            grid=grid,
            world_grid=world_grid,
            features=(),
        )
        return spec, kinds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """{"episode": (B,) int64 tensor, the number of each world's next episode}."""
        import torch

        return {"episode": torch.tensor(self.episode)}

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        """Begin the next episodes, as running ones are not saved; return the first observations."""
        self.episode[:] = np.asarray(state["episode"])
        return self.reset()

    def images(self, ids: np.ndarray) -> np.ndarray:
        """The images (..., 8H, 8W, 3) uint8 of tile ids (..., H, W)."""
        return ids_to_images(ids, self.palette.pixels())

    def reset(self) -> Observation:
        """Begin a new episode in every world and return the first observations."""
        self.counter.clear()
        for b in range(self.num_envs):
            self._begin(b)
        self.obs = self._observation()
        return self.obs

    def step(self, actions: np.ndarray) -> Step:
        """Step every world with actions (B, N) int; where an episode ends, the next begins.
        WorldError if an episode ends for some players only, or if a world breaks its spaces."""
        shape = actions.shape
        reward, pick_ups = np.zeros(shape), np.zeros(shape, np.int64)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for b, world in enumerate(self.worlds):
            chosen = [self.spec.actions[k]["action"] for k in actions[b]]
            views, rewards, ends, cuts, infos = world.step(dict(zip(self.agents, chosen)))
            self._complete(rewards=rewards, terminations=ends, truncations=cuts, infos=infos)
            self.time[b] += 1
            ended = [bool(ends[agent] or cuts[agent]) for agent in self.agents]
            if any(ended) and not all(ended):
                raise WorldError(f"{self.name}: an episode must end for all players at once.")
            terminated[b] = all(ends[agent] for agent in self.agents)
            limit = 0 < self.max_episode_steps <= self.time[b]
            truncated[b] = (ended[0] or limit) and not terminated[b]
            reward[b] = [rewards[agent] for agent in self.agents]
            pick_ups[b] = [infos[agent].get("pick_ups", 0) for agent in self.agents]
            self._look(b, views)
        done = terminated | truncated
        final = self._observation() if done.any() else None
        for b in np.flatnonzero(done):
            self._begin(b)
        episodes = self.counter.add(reward, pick_ups, done)
        self.obs = self._observation()
        return Step(self.obs, reward, terminated, truncated, final, episodes)

    def rest(self, world: int) -> None:
        """Do nothing: the world continues; play_all() ignores the episodes of resting worlds."""

    def check(self) -> None:
        """Do nothing: there are no worker processes that could have died."""

    def close(self) -> None:
        """Call close() of all worlds that have it."""
        for world in self.worlds:
            getattr(world, "close", lambda: None)()

    def _begin(self, b: int) -> None:
        key = (self.seed, self.first_world + int(b), int(self.episode[b]))
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        views, _ = self.worlds[b].reset(seed=seed)
        self.time[b] = 0
        self.episode[b] += 1
        self._look(b, views)

    def _complete(self, **answers: dict[str, Any]) -> None:
        """WorldError if one of the named answers of a world has no entry for a player."""
        for what, of_players in answers.items():
            for agent in self.agents:
                if agent not in of_players:
                    raise WorldError(f"{self.name}: there is nothing for {agent} in its {what}.")

    def _checked(self, what: str, view: Any, grid: tuple[int, int], kinds: int) -> np.ndarray:
        """The view; WorldError if it is not in its space: the networks' tables check no id."""
        view = np.asarray(view)
        if view.dtype.kind not in "iu":
            raise WorldError(f"{self.name}: {what} has {view.dtype}, where kinds are integers.")
        if view.shape != grid:
            text = f"{what} has shape {view.shape}, and its space {grid}"
            raise WorldError(f"{self.name}: {text}.")
        for kind in (view.min(), view.max()):
            if not 0 <= kind < kinds:
                text = f"{what} holds kind {kind}, and its space has 0 to {kinds - 1}"
                raise WorldError(f"{self.name}: {text}.")
        return view

    def _look(self, b: int, views: dict[str, np.ndarray]) -> None:
        self._complete(observations=views)
        for player, agent in enumerate(self.agents):
            view, kinds = views[agent], self.kinds[player]
            self.views[b, player] = self._checked("a view", view, self.spec.grid, kinds)
        if hasattr(self.worlds[b], "state_space"):
            state, grid = self.worlds[b].state(), self.spec.world_grid
            self.global_views[b] = self._checked("a state", state, grid, self.kinds[-1])
        else:
            self.global_views[b] = self.views[b].reshape(self.spec.world_grid)

    def _observation(self) -> Observation:
        features = np.zeros((self.num_envs, len(self.agents), 0), np.float32)
        return Observation(self.views.copy(), self.global_views.copy(), features)
