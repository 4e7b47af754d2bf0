"""A PettingZoo ParallelEnv of one particle world, on the CPU.

    env = parallel_env("pacman", (4, 2))          # agents pac_man_0 ... pac_man_3, ghost_0, ghost_1
    observations, infos = env.reset(seed=1)

Observations are flat float32 vectors: what the agent sees of itself, (Ds,), then what it sees of
each other agent in order, (De,) each: envs.particle.worlds.Observation says what is in them. An
agent that is dead is zeros. Actions are 0 none, 1 left, 2 right, 3 down, 4 up. Dead Pac-Men leave
`agents`. This is for trying things out, not for speed.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.utils import parallel_to_aec

from envs.particle.worlds import ACTIONS, HORIZON, TASKS, ParticleWorld, draw


def parallel_env(
    task: str = "treasure",
    population: int | tuple[int, ...] = 3,
    render_mode: str | None = None,
    max_cycles: int = HORIZON,
    **options,
) -> ParallelEnv:
    """One world; max_cycles is the length of an episode, options are fields of Game."""
    return ParticleParallelEnv(task, population, render_mode, max_cycles, **options)


def env(*args, **kwargs):
    """The same, one agent at a time (PettingZoo's AECEnv)."""
    return parallel_to_aec(parallel_env(*args, **kwargs))


class ParticleParallelEnv(ParallelEnv):
    """See the module. state() is the world's state (S,), from which all can be computed."""

    metadata = {  # noqa: RUF012
        "name": "particle_v0",
        "render_modes": ["human", "rgb_array"],
        "render_fps": 10,
        "is_parallelizable": True,
    }

    def __init__(self, task, population, render_mode=None, max_cycles=HORIZON, **options):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is human or rgb_array, not {render_mode!r}.")
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        self.world = ParticleWorld(task, population, 1, seed=seed, horizon=max_cycles, **options)
        self.render_mode, game = render_mode, self.world.game
        roles = zip(TASKS[task].roles, game.population, strict=True)
        self.possible_agents = [f"{role}_{k}" for role, n in roles for k in range(n)]
        self.agents: list[str] = []
        obs = self.world.reset()
        length = obs.own.shape[2] + (game.num_agents - 1) * obs.others.shape[2]
        box = spaces.Box(-np.inf, np.inf, (length,), np.float32)
        self.observation_spaces = {agent: box for agent in self.possible_agents}
        self.action_spaces = {
            agent: spaces.Discrete(len(ACTIONS)) for agent in self.possible_agents
        }
        self.state_space = spaces.Box(-np.inf, np.inf, (game.state_size,), np.float32)
        self._state, self._window = self.world.state[0].numpy(), None

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.world.seed(seed)
        obs = self.world.reset()
        self._state = self.world.state[0].numpy()
        self.agents = list(self.possible_agents)
        return self._observe(obs), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        chosen = [int(actions.get(agent, 0)) for agent in self.possible_agents]
        step = self.world.step(torch.tensor([chosen]))
        self._state = step.final_state[0].numpy()
        alive = dict(zip(self.possible_agents, step.alive[0].tolist()))
        reward = dict(zip(self.possible_agents, step.reward[0].tolist()))
        over, late = bool(step.terminated), bool(step.truncated)
        acted = self.agents
        result = (
            self._observe(step.final),
            {agent: reward[agent] for agent in acted},
            {agent: over or not alive[agent] for agent in acted},
            {agent: late and alive[agent] for agent in acted},
            {agent: {} for agent in acted},
        )
        self.agents = [agent for agent in acted if alive[agent] and not (over or late)]
        if self.render_mode == "human":
            self.render()
        return result

    def state(self) -> np.ndarray:
        return self._state.copy()

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        image = draw(self.world.game, self._state)
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

    def _observe(self, obs) -> dict[str, np.ndarray]:
        seen = {}
        entities, mask = obs.entities()[0], obs.mask()[0]
        for i, agent in enumerate(self.possible_agents):
            if agent in self.agents:
                others = entities[i] * mask[i, :, None]
                others = torch.cat((others[:i], others[i + 1 :]))
                seen[agent] = torch.cat((obs.own[0, i], others.flatten())).numpy()
        return seen
