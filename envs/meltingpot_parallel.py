"""A PettingZoo ParallelEnv of one Melting Pot world, with pixels, in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

from envs.meltingpot.worlds import SPRITE, Engine, get_spec


def parallel_env(
    substrate: str, render_mode: str | None = None, max_cycles: int = 0
) -> ParallelEnv:
    """One world of `substrate`; max_cycles truncates episodes there (0: they end naturally)."""
    return MeltingPotParallelEnv(substrate, render_mode, max_cycles)


class MeltingPotParallelEnv(ParallelEnv):
    """Observations are dictionaries of RGB and what else a player may see; rewards are each
    player's own.

    `state()` and, with render_mode="rgb_array", `render()` give WORLD.RGB, which players do not
    see. Resets with a seed fix the engine's seeds, yet the engine is not reproducible
    (docs/meltingpot.md).
    """

    metadata = {"name": "meltingpot_v2", "render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, substrate: str, render_mode: str | None = None, max_cycles: int = 0):
        self.spec = get_spec(substrate)
        self.render_mode, self.max_cycles = render_mode, max_cycles
        self.possible_agents = [f"player_{i}" for i in range(self.spec.num_agents)]
        self.agents: list[str] = []
        image = spaces.Box(0, 255, (*(SPRITE * size for size in self.spec.grid), 3), np.uint8)
        others = {
            name: spaces.Box(-np.inf, np.inf, (length,), np.float64)
            for name, length in self.spec.features
        }
        self._space = {
            agent: spaces.Dict({"RGB": image, **others}) for agent in self.possible_agents
        }
        self._actions = {
            agent: spaces.Discrete(self.spec.num_actions) for agent in self.possible_agents
        }
        self.state_space = spaces.Box(
            0, 255, (*(SPRITE * size for size in self.spec.world_grid), 3), np.uint8
        )
        self._seed, self._episode, self._steps = (
            int(np.random.SeedSequence().generate_state(1)[0]),
            0,
            0,
        )
        self.engine: Engine | None = None

    def observation_space(self, agent: str) -> spaces.Space:
        return self._space[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self._actions[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._seed, self._episode = seed, 0
        self.engine = Engine(self.spec, (self._seed, 0, self._episode))
        self._episode += 1
        self._steps = 0
        self.agents = list(self.possible_agents)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        terminated = not self.engine.step(np.array([actions[agent] for agent in self.agents]))
        self._steps += 1
        truncated = not terminated and 0 < self.max_cycles <= self._steps
        reward, pick_ups = np.zeros(len(self.agents)), np.zeros(len(self.agents), np.int64)
        self.engine.read_rewards(reward, pick_ups)
        result = (
            self._observe(),
            dict(zip(self.agents, reward.tolist(), strict=True)),
            dict.fromkeys(self.agents, terminated),
            dict.fromkeys(self.agents, truncated),
            {agent: {"pick_ups": int(n)} for agent, n in zip(self.agents, pick_ups, strict=True)},
        )
        if terminated or truncated:
            self.agents = []
        return result

    def state(self) -> np.ndarray:
        return self.engine.lab.observation("WORLD.RGB").copy()

    def render(self) -> np.ndarray | None:
        return self.state() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.engine = None

    def _observe(self) -> dict[str, dict[str, Any]]:
        observations = {}
        for i, agent in enumerate(self.agents):
            observe = self.engine.lab.observation
            seen = {"RGB": observe(f"{i + 1}.RGB").copy()}
            for name, length in self.spec.features:
                seen[name] = np.asarray(observe(f"{i + 1}.{name}"), np.float64).reshape(length)
            observations[agent] = seen
        return observations
