"""A PettingZoo ParallelEnv of one battle; agents are the allies, the enemy plays by itself.

    env = parallel_env("sz", (3, 4, 5))           # agents ally_0, ally_1, ... of this battle
    observations, infos = env.reset(seed=1)

Observations are {"observation": (A+E, D) float32, "action_mask": (actions,) int8}: all units as in
envs.smac.combat.Observation.entities, those hidden from the agent as zeros, its own row first. An
action that is not available becomes stop (no-op of the dead). The dead stay until the battle ends
and can do nothing else. Everybody earns the team's reward. For trying things out, not for speed.
"""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.utils import parallel_to_aec

from envs.smac.combat import EPISODE_LIMIT, NOBODY, SIDE, SLOTS, STOP, Combat, Scenario
from envs.smac.views import draw


def parallel_env(
    scenario: Scenario = "sz",
    team_sizes: tuple[int, ...] = (3, 4, 5),
    render_mode: str | None = None,
    max_cycles: int = EPISODE_LIMIT,
    **options,
) -> ParallelEnv:
    """One battle; max_cycles is the step limit, options are those of Combat."""
    return CombatParallelEnv(scenario, team_sizes, render_mode, max_cycles, **options)


def env(*args, **kwargs):
    """The same, one agent at a time (PettingZoo's AECEnv)."""
    return parallel_to_aec(parallel_env(*args, **kwargs))


class CombatParallelEnv(ParallelEnv):
    """See the module. state() is what all units are, (A+E, 9): the fields of a Snapshot."""

    metadata = {  # noqa: RUF012
        "name": "combat_v0",
        "render_modes": ["human", "rgb_array"],
        "render_fps": 6,
        "is_parallelizable": True,
    }

    def __init__(self, scenario, team_sizes, render_mode=None, max_cycles=EPISODE_LIMIT, **options):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is human or rgb_array, not {render_mode!r}.")
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        self.battle = Combat(
            scenario, team_sizes, 1, seed, episode_limit=max_cycles, once=True, **options
        )
        self.render_mode, family = render_mode, self.battle.family
        self.possible_agents = [f"ally_{k}" for k in range(max(map(sum, self.battle.teams)))]
        self.agents: list[str] = []
        seen = spaces.Dict(
            {
                "observation": spaces.Box(-np.inf, np.inf, (SLOTS, family.features), np.float32),
                "action_mask": spaces.Box(0, 1, (family.n_actions,), np.int8),
            }
        )
        self.observation_spaces = {agent: seen for agent in self.possible_agents}
        actions = spaces.Discrete(family.n_actions)
        self.action_spaces = {agent: actions for agent in self.possible_agents}
        self.state_space = spaces.Box(-np.inf, np.inf, (SLOTS, 9), np.float32)
        self._actions, self._window = None, None
        self.battle.reset()

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.battle.seed(seed)
        self.battle.reset()
        self._actions = None
        present = (self.battle.snapshot.type[0, :SIDE] != NOBODY).tolist()
        self.agents = [agent for agent, here in zip(self.possible_agents, present) if here]
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        chosen = np.zeros(SIDE, int)
        for agent, action in actions.items():
            if agent not in self.action_spaces or not self.action_spaces[agent].contains(action):
                raise ValueError(f"{agent} has no action {action}.")
            chosen[self.possible_agents.index(agent)] = action
        avail = self.battle.obs.avail[0].numpy()
        instead = np.where(avail[:, 0], 0, STOP)
        chosen = np.where(avail[np.arange(SIDE), chosen], chosen, instead)
        step = self.battle.step(chosen[None])
        self._actions, acted = chosen, self.agents
        reward = float(step.reward[0])
        over, late = bool(step.terminated[0]), bool(step.truncated[0])
        won = {"won": step.episodes[0].won} if step.episodes else {}
        result = (
            self._observe(),
            {agent: reward for agent in acted},
            {agent: over for agent in acted},
            {agent: late for agent in acted},
            {agent: dict(won) for agent in acted},
        )
        self.agents = [] if over or late else acted
        if self.render_mode == "human":
            self.render()
        return result

    def state(self) -> np.ndarray:
        fields = [x[0].numpy().astype(np.float32) for x in self.battle.snapshot]
        return np.stack(fields, -1)

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        image = draw(self.battle.snapshot, 0, self.battle.units[0], self._actions)
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
        obs, seen = self.battle.obs, {}
        entities, mask = obs.entities[0].numpy(), obs.obs_mask[0].numpy()
        for agent in self.agents:
            i = self.possible_agents.index(agent)
            order = [i, *(j for j in range(SLOTS) if j != i)]
            rows = np.where(mask[i, :, None], np.float32(0), entities)[order]
            seen[agent] = {
                "observation": rows,
                "action_mask": obs.avail[0, i].numpy().astype(np.int8),
            }
        return seen
