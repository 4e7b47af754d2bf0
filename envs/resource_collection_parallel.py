"""A PettingZoo ParallelEnv of one world of Resource Collection.

    env = parallel_env((3, 4, 5))             # agents collector_0, collector_1, ... of this team
    observations, infos = env.reset(seed=1)

Observations are {"observation": (A+E, D) float32, "action_mask": (actions,) int8}: all entities as
in envs.smac.resource_collection.Observation, those that the agent does not see as zeros, its own
first. Actions are 1 stay, 2 left, 3 right, 4 down, 5 up; 0 is for empty slots and means stay.
Everybody earns the team's reward. For trying things out, not for speed.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.utils import parallel_to_aec

from envs.smac.resource_collection import (
    EPISODE_LIMIT,
    MOVES,
    SLOTS,
    STAY,
    ResourceCollection,
    draw,
)


def parallel_env(
    team_sizes: tuple[int, ...] = (3, 4, 5),
    render_mode: str | None = None,
    max_cycles: int = EPISODE_LIMIT,
) -> ParallelEnv:
    """One world; max_cycles is the length of an episode."""
    return ResourceCollectionParallelEnv(team_sizes, render_mode, max_cycles)


def env(*args, **kwargs):
    """The same, one agent at a time (PettingZoo's AECEnv)."""
    return parallel_to_aec(parallel_env(*args, **kwargs))


class ResourceCollectionParallelEnv(ParallelEnv):
    """See the module. state() is the snapshot as one vector."""

    metadata = {  # noqa: RUF012
        "name": "resource_collection_v0",
        "render_modes": ["human", "rgb_array"],
        "render_fps": 12,
        "is_parallelizable": True,
    }

    def __init__(self, team_sizes, render_mode=None, max_cycles=EPISODE_LIMIT):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is human or rgb_array, not {render_mode!r}.")
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        self.world = ResourceCollection(team_sizes, 1, seed, episode_limit=max_cycles, once=True)
        self.render_mode, family = render_mode, self.world.family
        largest = max(size for (size,) in self.world.teams)
        self.possible_agents = [f"collector_{k}" for k in range(largest)]
        self.agents: list[str] = []
        seen = spaces.Dict(
            {
                "observation": spaces.Box(-np.inf, np.inf, (SLOTS, family.features), np.float32),
                "action_mask": spaces.Box(0, 1, (len(MOVES),), np.int8),
            }
        )
        self.observation_spaces = {agent: seen for agent in self.possible_agents}
        actions = spaces.Discrete(len(MOVES))
        self.action_spaces = {agent: actions for agent in self.possible_agents}
        self.world.reset()
        shape = self.state().shape
        self.state_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
        self._window = None

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.world.seed(seed)
        self.world.reset()
        present = self.world.snapshot.present[0].tolist()
        self.agents = [agent for agent, here in zip(self.possible_agents, present) if here]
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        chosen = torch.where(self.world.snapshot.present, STAY, 0)
        for agent, action in actions.items():
            if agent in self.agents and action:
                chosen[0, self.possible_agents.index(agent)] = int(action)
        step, acted = self.world.step(chosen), self.agents
        reward, late = float(step.reward[0]), bool(step.truncated[0])
        result = (
            self._observe(),
            {agent: reward for agent in acted},
            {agent: False for agent in acted},
            {agent: late for agent in acted},
            {agent: {} for agent in acted},
        )
        self.agents = [] if late else acted
        if self.render_mode == "human":
            self.render()
        return result

    def state(self) -> np.ndarray:
        fields = [x[0].float().flatten() for x in self.world.snapshot]
        return torch.cat(fields).numpy()

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        image = draw(self.world.snapshot, 0)
        if self.render_mode == "rgb_array":
            return image
        import matplotlib.pyplot as plt

        if self._window is None:
            self._window = plt.figure(figsize=(5, 5)).add_axes((0, 0, 1, 1)).imshow(image)
        self._window.set_data(image)
        plt.pause(1 / self.metadata["render_fps"])
        return None

    def close(self) -> None:
        if self._window is not None:
            import matplotlib.pyplot as plt

            plt.close(self._window.figure)
            self._window = None

    def _observe(self) -> dict[str, dict[str, np.ndarray]]:
        obs, seen = self.world.obs, {}
        entities, mask = obs.entities[0].numpy(), obs.obs_mask[0].numpy()
        for agent in self.agents:
            i = self.possible_agents.index(agent)
            order = [i, *(j for j in range(SLOTS) if j != i)]
            rows = np.where(mask[i, :, None], np.float32(0), entities)[order]
            avail = obs.avail[0, i].numpy().astype(np.int8)
            seen[agent] = {"observation": rows, "action_mask": avail}
        return seen
