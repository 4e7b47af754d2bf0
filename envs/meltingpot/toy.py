"""A two-player matrix game on tiles (--substrate toy), with envs/meltingpot/worlds.py's interface.

It is for tests and for machines without Melting Pot's engine: it is reproducible bit for bit, its
state can be saved, and its optimum is known.

An episode lasts 6 to 10 steps and has a colour. Views show the colour only on every second step, so
a policy has to remember it. In each step both players choose one of three colours. A player that
chooses the episode's colour earns 1/2, and another 1/2 if the other player chooses it as well; any
other choice earns 0. The best policy earns 1 per step and player, a random policy 2/9.

A player's view has 3 x 5 tiles (fewer than the second convolution's kernel, as in some of Melting
Pot's worlds), the global view 4 x 6. The only feature, TIME, is the number of steps so far over 10.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch

from envs.meltingpot.tiles import EpisodeCounter, Observation, Palette, Spec, Step, ids_to_images

BLACK, WALL, ME, OTHER = 0, 4, 5, 6  # tile ids; 1, 2, 3 are the colours to choose
COLOURS = (
    (0, 0, 0),
    (200, 60, 60),
    (60, 200, 60),
    (60, 60, 200),
    (120, 120, 120),
    (240, 240, 240),
    (240, 200, 80),
)
MIN_LENGTH, MAX_LENGTH = 6, 10  # steps per episode
OPTIMUM = 1.0  # largest mean reward per step and player

SPEC = Spec(
    substrate="toy",
    roles=("default",) * 2,
    is_focal=(True,) * 2,
    actions=tuple({"choose": colour} for colour in range(3)),
    grid=(3, 5),
    world_grid=(4, 6),
    features=(("TIME", 1),),
)


class TileGame:
    """num_envs games with MeltingPot's interface, all stepped in this process. The seed of episode
    e of game b is (seed, first_world + b, e); max_episode_steps truncates (0: no limit)."""

    reproducible = True

    def __init__(
        self, num_envs: int, seed: int = 1, first_world: int = 0, max_episode_steps: int = 0
    ):
        self.spec, self.num_envs, self.seed = SPEC, num_envs, seed
        self.first_world, self.max_episode_steps = first_world, max_episode_steps
        self.palette = Palette.private()
        pixels = np.array(COLOURS, np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
        pixels[1:, :, 0] = pixels[1:, 0] = 20  # a dark edge, so that no sprite has only one colour
        self.palette.load(pixels)
        self.counter = EpisodeCounter(num_envs, 2)
        self.obs: Observation | None = None  # the latest observation
        self.colour = np.zeros(num_envs, np.int64)  # (B,) the running episode's colour, 1 to 3
        self.length = np.zeros(num_envs, np.int64)  # its number of steps
        self.time = np.zeros(num_envs, np.int64)  # steps since its start
        self.last = np.zeros((num_envs, 2), np.int64)  # tile id of each player's last choice
        self.episode = np.zeros(num_envs, np.int64)  # number of each world's next episode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the games, as tensors by name."""
        names = ("colour", "length", "time", "last", "episode")
        state = {name: torch.tensor(getattr(self, name)) for name in names}
        counted = {k: x for k, x in vars(self.counter).items() if isinstance(x, np.ndarray)}
        return state | {f"counter_{k}": torch.tensor(x) for k, x in counted.items()}

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        """Continue exactly where state_dict() was taken; return the observation of that step."""
        for name, array in state.items():
            owner = self.counter if name.startswith("counter_") else self
            getattr(owner, name.removeprefix("counter_"))[:] = np.asarray(array)
        self.obs = self._observe()
        return self.obs

    def images(self, ids: np.ndarray) -> np.ndarray:
        """The images (..., 8H, 8W, 3) uint8 of tile ids (..., H, W)."""
        return ids_to_images(ids, self.palette.pixels())

    def reset(self) -> Observation:
        """Begin a new episode in every game and return the first observations."""
        self.counter.clear()
        self._begin(np.arange(self.num_envs))
        self.obs = self._observe()
        return self.obs

    def step(self, actions: np.ndarray) -> Step:
        """Step every game with actions (B, 2) int, 0..2; where an episode ends, the next begins."""
        right = actions == self.colour[:, None] - 1  # (B, 2)
        reward = 0.5 * right + 0.5 * (right & right[:, ::-1])
        self.last[:] = actions + 1
        self.time += 1
        terminated = self.time >= self.length
        truncated = ~terminated & (0 < self.max_episode_steps <= self.time)
        done = terminated | truncated
        final = self._observe() if done.any() else None
        self._begin(np.flatnonzero(done))
        episodes = self.counter.add(reward, right.astype(np.int64), done)
        self.obs = self._observe()
        return Step(self.obs, reward, terminated, truncated, final, episodes)

    def rest(self, world: int) -> None:
        """Do nothing: the world continues; play_all() ignores the episodes of resting worlds."""

    def check(self) -> None:
        """Do nothing: there are no worker processes that could have died."""

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _begin(self, worlds: np.ndarray) -> None:
        for b in worlds:
            rng = np.random.default_rng(
                (self.seed, self.first_world + int(b), int(self.episode[b]))
            )
            self.colour[b] = rng.integers(1, 4)
            self.length[b] = rng.integers(MIN_LENGTH, MAX_LENGTH + 1)
        self.time[worlds] = 0
        self.last[worlds] = BLACK
        self.episode[worlds] += 1

    def _observe(self) -> Observation:
        shown = np.where(self.time % 2 == 0, self.colour, BLACK)
        views = np.full((self.num_envs, 2, *SPEC.grid), WALL, np.uint16)
        views[:, :, 0, 0] = shown[:, None]
        views[:, :, 1, 1], views[:, :, 1, 3] = ME, OTHER
        views[:, :, 2, 1], views[:, :, 2, 3] = self.last, self.last[:, ::-1]
        world = np.full((self.num_envs, *SPEC.world_grid), WALL, np.uint16)
        world[:, 0, 0] = self.colour  # the global view (for critics) always shows the colour
        world[:, 2, 1], world[:, 2, 4] = ME, OTHER
        world[:, 3, 1], world[:, 3, 4] = self.last.T
        share = np.broadcast_to(self.time[:, None, None] / MAX_LENGTH, (self.num_envs, 2, 1))
        return Observation(views, world, share.astype(np.float32))
