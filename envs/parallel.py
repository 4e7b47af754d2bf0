"""PettingZoo interfaces of all worlds: one world on the CPU, its agents by name.

    world = parallel_env("meltingpot", "coins")               # or "battles", "sz", (3, 4, 5)
    world = parallel_env("particle", "pacman", (4, 2))        # or "collection", (3, 4, 5)
    observations, infos = world.reset(seed=1)

`env(...)` has the same arguments as `parallel_env(...)` and returns an AECEnv, in which agents act
one at a time. All worlds have the options render_mode ("human", "rgb_array" or None) and max_cycles
(steps of an episode); the classes below say what other options there are, what agents observe and
what their actions mean. step() needs an action for every agent in `agents`, and for no other agent.
These interfaces are for trying things out; they are not fast.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils import parallel_to_aec


class Outcome(NamedTuple):
    """Results of a step for each of the N possible agents, in the order of possible_agents."""

    reward: list[float]
    terminated: list[bool]
    truncated: list[bool]
    infos: list[dict[str, Any]]


class View(ParallelEnv):
    """Base class of all worlds.

    A subclass makes its world and then calls `describe`. It implements `_begin`, `_advance`,
    `_see`, `_draw` and `state`: first state, step, observation, picture and global state.
    """

    metadata: dict[str, Any]

    def describe(
        self,
        agents: list[str],
        observation: spaces.Space,
        num_actions: int,
        state_shape: tuple[int, ...],
        render_mode: str | None,
    ) -> None:
        """Set the possible agents, their spaces of observations and actions and the state space."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is human or rgb_array, not {render_mode!r}.")
        self.render_mode = render_mode
        self.possible_agents = agents
        self.agents: list[str] = []  # those that act in the next step
        self.num_actions = num_actions
        self.observation_spaces = dict.fromkeys(agents, observation)
        # Each agent has its own action space, as a space has its own random generator.
        self.action_spaces = {agent: spaces.Discrete(num_actions) for agent in agents}
        self.state_space = spaces.Box(-np.inf, np.inf, state_shape, np.float32)
        self._window = None

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin an episode; a seed restarts the random numbers. Returns observations and infos."""
        self.agents = self._begin(seed)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """Play one step with {agent: action}. Returns dictionaries of the agents that acted:
        observations, rewards, terminations, truncations and infos.

        ValueError if no episode is under way, and for actions that are missing, that do not exist
        or that belong to agents that do not act now."""
        outcome = self._advance(self._read(actions))
        acted = self.agents
        each = [dict(zip(self.possible_agents, values)) for values in outcome]
        reward, terminated, truncated, infos = (
            {agent: values[agent] for agent in acted} for values in each
        )
        observations = self._observe()
        self.agents = [a for a in acted if not (terminated[a] or truncated[a])]
        if self.render_mode == "human":
            self.render()
        return observations, reward, terminated, truncated, infos

    def _read(self, actions: dict[str, int]) -> np.ndarray:
        """Check actions; return those of all possible agents (N,) int64, 0 for who does not act."""
        if not self.agents:
            raise ValueError("No episode is under way: call reset() before step().")
        for agent in actions:
            if agent not in self.agents:
                raise ValueError(f"{agent} does not act now: {', '.join(self.agents)} do.")
        chosen = np.zeros(len(self.possible_agents), np.int64)
        allowed = f"0 to {self.num_actions - 1}"
        for agent in self.agents:
            if agent not in actions:
                raise ValueError(f"The action of {agent} is missing: {allowed} are allowed.")
            try:
                action = operator.index(actions[agent])
            except TypeError:
                action = -1
            if not 0 <= action < self.num_actions:
                wrong = actions[agent]
                raise ValueError(f"{agent} has no action {wrong}: {allowed} are allowed.")
            chosen[self.possible_agents.index(agent)] = action
        return chosen

    def _observe(self) -> dict[str, Any]:
        return {agent: self._see(self.possible_agents.index(agent)) for agent in self.agents}

    def render(self) -> np.ndarray | None:
        """A picture (height, width, 3) uint8 with "rgb_array"; None, but a window with "human"."""
        if self.render_mode is None:
            return None
        image = self._draw()
        if self.render_mode == "rgb_array":
            return image
        import matplotlib.pyplot as plt  # of requirements-experiments.txt

        if self._window is None:
            self._window = plt.figure(figsize=(5, 5)).add_axes((0, 0, 1, 1)).imshow(image)
        self._window.set_data(image)
        plt.pause(1 / self.metadata["render_fps"])
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            import matplotlib.pyplot as plt

            plt.close(self._window.figure)
            self._window = None

    def _begin(self, seed: int | None) -> list[str]:
        """Begin an episode; returns the names of the agents that act in it."""
        raise NotImplementedError

    def _advance(self, chosen: np.ndarray) -> Outcome:
        """Play one step with the actions (N,) int64 of all possible agents."""
        raise NotImplementedError

    def _see(self, i: int) -> Any:
        """The observation of possible agent number i."""
        raise NotImplementedError

    def _draw(self) -> np.ndarray:
        """A picture (height, width, 3) uint8."""
        raise NotImplementedError


def new_seed() -> int:
    """A random seed from the operating system, for worlds that were given none."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def new_metadata(name: str, fps: int) -> dict[str, Any]:
    """The `metadata` that PettingZoo requires of a class; fps: frames per second of render()."""
    modes = ["human", "rgb_array"]
    return {"name": name, "render_modes": modes, "render_fps": fps, "is_parallelizable": True}


# --- Melting Pot ----------------------------------------------------------------------------------


class MeltingPotView(View):
    """One world of a Melting Pot substrate; agents player_0, player_1, ...

    Observations are {"RGB": (H, W, 3) uint8, feature: (length,) float64, ...} with the substrate's
    other features. Each player has its own reward. Infos have `pick_ups`, the number in this step.
    state() and pictures are WORLD.RGB, which players do not see. reset(seed) sets the engine's
    seeds, yet the engine is not reproducible (docs/meltingpot.md). max_cycles 0: no limit. Bots of
    scenarios do not play here (envs/meltingpot/scenarios.py), so ValueError for a scenario's name.
    """

    metadata = new_metadata("meltingpot_v2", 10)

    def __init__(self, substrate: str, render_mode: str | None = None, max_cycles: int = 0):
        from envs.meltingpot.worlds import SPRITE, get_spec

        self.spec, self.max_cycles = get_spec(substrate, others=()), max_cycles
        if not all(self.spec.is_focal):
            home = self.spec.substrate
            raise ValueError(f"{substrate} is a scenario, whose bots do not play here: try {home}.")
        size = [SPRITE * tiles for tiles in self.spec.grid]
        seen = {"RGB": spaces.Box(0, 255, (*size, 3), np.uint8)}
        for name, length in self.spec.features:
            seen[name] = spaces.Box(-np.inf, np.inf, (length,), np.float64)
        world_size = [SPRITE * tiles for tiles in self.spec.world_grid]
        self.describe(
            agents=[f"player_{i}" for i in range(self.spec.num_agents)],
            observation=spaces.Dict(seen),
            num_actions=self.spec.num_actions,
            state_shape=(*world_size, 3),
            render_mode=render_mode,
        )
        self.state_space = spaces.Box(0, 255, (*world_size, 3), np.uint8)
        self.seed, self.episode, self.steps = new_seed(), 0, 0
        self.engine: Any = None  # an envs.meltingpot.worlds.Engine

    def _begin(self, seed: int | None) -> list[str]:
        from envs.meltingpot.worlds import Engine

        if seed is not None:
            self.seed, self.episode = seed, 0
        self.engine = Engine(self.spec, (self.seed, 0, self.episode))
        self.episode += 1
        self.steps = 0
        return list(self.possible_agents)

    def _advance(self, chosen: np.ndarray) -> Outcome:
        N = self.spec.num_agents
        terminated = not self.engine.step(chosen)
        self.steps += 1
        truncated = not terminated and 0 < self.max_cycles <= self.steps
        reward, pick_ups = np.zeros(N), np.zeros(N, np.int64)
        self.engine.read_rewards(reward, pick_ups)
        infos = [{"pick_ups": count} for count in pick_ups.tolist()]
        return Outcome(reward.tolist(), [terminated] * N, [truncated] * N, infos)

    def _see(self, i: int) -> dict[str, np.ndarray]:
        observe = self.engine.lab.observation
        seen = {"RGB": observe(f"{i + 1}.RGB").copy()}
        for name, length in self.spec.features:
            seen[name] = np.asarray(observe(f"{i + 1}.{name}"), np.float64).reshape(length)
        return seen

    def _draw(self) -> np.ndarray:
        return self.state()

    def state(self) -> np.ndarray:
        """The picture of the whole world, WORLD.RGB (H, W, 3) uint8. ValueError before reset()."""
        if self.engine is None:
            raise ValueError("No episode is under way: call reset() before state() or render().")
        return self.engine.lab.observation("WORLD.RGB").copy()

    def close(self) -> None:
        super().close()
        self.engine = None


# --- Particle worlds ------------------------------------------------------------------------------


class ParticleView(View):
    """One particle world; "pacman", (4, 2) has agents pac_man_0 ... pac_man_3, ghost_0, ghost_1.

    An observation is a float32 vector (Ds + (N - 1) De,): the agent's own features (Ds,), then the
    features (De,) of each other agent in order, zeros if it is not seen; they are explained in
    envs.particle.worlds.Observation. Actions are 0 none, 1 left, 2 right, 3 down, 4 up. Dead
    Pac-Men leave `agents`. Further options are fields of envs.particle.worlds.Game.
    """

    metadata = new_metadata("particle_v0", 10)

    def __init__(
        self,
        task: str = "treasure",
        population: int | tuple[int, ...] = 3,
        render_mode: str | None = None,
        max_cycles: int | None = None,
        **options: Any,
    ):
        from envs.particle.worlds import ACTIONS, HORIZON, TASKS, ParticleWorld

        horizon = HORIZON if max_cycles is None else max_cycles
        self.world = ParticleWorld(task, population, 1, seed=new_seed(), horizon=horizon, **options)
        game, self._seen = self.world.game, self.world.reset()
        roles = zip(TASKS[task].roles, game.population, strict=True)
        own, others = self._seen.own.shape[2], self._seen.others.shape[2]
        length = own + (game.num_agents - 1) * others
        self.describe(
            agents=[f"{role}_{k}" for role, count in roles for k in range(count)],
            observation=spaces.Box(-np.inf, np.inf, (length,), np.float32),
            num_actions=len(ACTIONS),
            state_shape=(game.state_size,),
            render_mode=render_mode,
        )
        self._state = self.world.state[0].numpy()

    def _begin(self, seed: int | None) -> list[str]:
        if seed is not None:
            self.world.seed(seed)
        self._seen = self.world.reset()
        self._state = self.world.state[0].numpy()
        return list(self.possible_agents)

    def _advance(self, chosen: np.ndarray) -> Outcome:
        import torch

        step = self.world.step(torch.from_numpy(chosen)[None])
        self._seen, self._state = step.final, step.final_state[0].numpy()
        alive = step.alive[0].tolist()
        over, late = bool(step.terminated), bool(step.truncated)
        return Outcome(
            reward=step.reward[0].tolist(),
            terminated=[over or not lives for lives in alive],
            truncated=[late and lives for lives in alive],
            infos=[{} for _ in alive],
        )

    def _see(self, i: int) -> np.ndarray:
        own = self._seen.own[0, i].numpy()
        entities, mask = self._seen.entities()[0, i].numpy(), self._seen.mask()[0, i].numpy()
        others = np.delete(entities * mask[:, None], i, axis=0)
        return np.concatenate((own, others.flatten()))

    def _draw(self) -> np.ndarray:
        from envs.particle.worlds import draw

        return draw(self.world.game, self._state)

    def state(self) -> np.ndarray:
        """The world's whole state (S,) float32, from which all else can be computed."""
        return self._state.copy()


# --- Teams of at most eight: battles and Resource Collection --------------------------------------


class TeamView(View):
    """Base class of worlds with a team whose size changes from episode to episode.

    Observations are {"observation": (A+E, D) float32, "action_mask": (actions,) int8}: the rows of
    all entities as in the world's Observation, the agent's own row first; rows that the agent does
    not see are 0. Every agent has the team's reward.
    """

    def team_space(self, slots: int, num_features: int, num_actions: int) -> spaces.Space:
        """The observation space of an agent, for `slots` entities."""
        return spaces.Dict(
            {
                "observation": spaces.Box(-np.inf, np.inf, (slots, num_features), np.float32),
                "action_mask": spaces.Box(0, 1, (num_actions,), np.int8),
            }
        )

    def present(self) -> list[bool]:
        """(A,): which agents' slots are taken in this episode."""
        raise NotImplementedError

    def _begin(self, seed: int | None) -> list[str]:
        if seed is not None:
            self.world.seed(seed)
        self.world.reset()
        return [agent for agent, here in zip(self.possible_agents, self.present()) if here]

    def _see(self, i: int) -> dict[str, np.ndarray]:
        obs = self.world.obs
        hidden = obs.obs_mask[0, i].numpy()
        seen = np.where(hidden[:, None], np.float32(0), obs.entities[0].numpy())
        first = np.concatenate((seen[i : i + 1], np.delete(seen, i, axis=0)))
        return {"observation": first, "action_mask": obs.avail[0, i].numpy().astype(np.int8)}


class BattleView(TeamView):
    """One simulated StarCraft battle; agents ally_0, ally_1, ... fight a scripted enemy.

    Actions are those of envs.smac.combat; an unavailable one becomes stop, or no-op of the dead.
    Dead agents stay in `agents` until the battle ends, and can only take no-op. The last infos have
    `won`. state() has the fields of a Snapshot for all units, (A+E, 9) float32. Further options are
    those of envs.smac.combat.Combat.
    """

    metadata = new_metadata("combat_v0", 6)

    def __init__(
        self,
        scenario: str = "sz",
        team_sizes: tuple[int, ...] = (3, 4, 5),
        render_mode: str | None = None,
        max_cycles: int | None = None,
        **options: Any,
    ):
        from envs.smac.combat import EPISODE_LIMIT, SLOTS, Combat

        limit = EPISODE_LIMIT if max_cycles is None else max_cycles
        self.world = Combat(
            scenario, team_sizes, 1, new_seed(), episode_limit=limit, once=True, **options
        )
        family = self.world.family
        largest = max(sum(team) for team in self.world.teams)
        self.describe(
            agents=[f"ally_{k}" for k in range(largest)],
            observation=self.team_space(SLOTS, family.features, family.n_actions),
            num_actions=family.n_actions,
            state_shape=(SLOTS, 9),
            render_mode=render_mode,
        )
        self._actions: np.ndarray | None = None  # (A,) of the last step, which pictures show
        self.world.reset()

    def present(self) -> list[bool]:
        from envs.smac.combat import NOBODY, SIDE

        return (self.world.snapshot.type[0, :SIDE] != NOBODY).tolist()

    def _begin(self, seed: int | None) -> list[str]:
        self._actions = None
        return super()._begin(seed)

    def _advance(self, chosen: np.ndarray) -> Outcome:
        from envs.smac.combat import SIDE, STOP

        avail = self.world.obs.avail[0].numpy()  # (A, actions)
        wanted = np.zeros(SIDE, np.int64)
        wanted[: len(chosen)] = chosen
        instead = np.where(avail[:, 0], 0, STOP)
        self._actions = np.where(avail[np.arange(SIDE), wanted], wanted, instead)
        step = self.world.step(self._actions[None])
        N = len(self.possible_agents)
        won = {"won": step.episodes[0].won} if step.episodes else {}
        return Outcome(
            reward=[float(step.reward[0])] * N,
            terminated=[bool(step.terminated[0])] * N,
            truncated=[bool(step.truncated[0])] * N,
            infos=[dict(won) for _ in range(N)],
        )

    def _draw(self) -> np.ndarray:
        from envs.smac.views import draw

        return draw(self.world.snapshot, 0, self.world.units[0], self._actions)

    def state(self) -> np.ndarray:
        """The fields of the battle's Snapshot for all units, (A+E, 9) float32."""
        fields = [x[0].numpy().astype(np.float32) for x in self.world.snapshot]
        return np.stack(fields, -1)


class CollectionView(TeamView):
    """One world of Resource Collection; agents collector_0, collector_1, ...

    Actions are 1 stay, 2 left, 3 right, 4 down, 5 up; 0, which is for empty slots, means stay, too.
    state() is the world's Snapshot as one float32 vector.
    """

    metadata = new_metadata("resource_collection_v0", 12)

    def __init__(
        self,
        team_sizes: tuple[int, ...] = (3, 4, 5),
        render_mode: str | None = None,
        max_cycles: int | None = None,
    ):
        from envs.smac.resource_collection import EPISODE_LIMIT, MOVES, SLOTS, ResourceCollection

        limit = EPISODE_LIMIT if max_cycles is None else max_cycles
        self.world = ResourceCollection(team_sizes, 1, new_seed(), episode_limit=limit, once=True)
        self.world.reset()
        largest = max(size for (size,) in self.world.teams)
        self.describe(
            agents=[f"collector_{k}" for k in range(largest)],
            observation=self.team_space(SLOTS, self.world.family.features, len(MOVES)),
            num_actions=len(MOVES),
            state_shape=self.state().shape,
            render_mode=render_mode,
        )

    def present(self) -> list[bool]:
        return self.world.snapshot.present[0].tolist()

    def _advance(self, chosen: np.ndarray) -> Outcome:
        import torch

        from envs.smac.resource_collection import STAY

        present = self.world.snapshot.present  # (1, A)
        wanted = torch.zeros(present.shape, dtype=torch.int64)
        wanted[0, : len(chosen)] = torch.from_numpy(chosen)
        step = self.world.step(torch.where(present & (wanted == 0), STAY, wanted))
        N = len(self.possible_agents)
        return Outcome(
            reward=[float(step.reward[0])] * N,
            terminated=[False] * N,
            truncated=[bool(step.truncated[0])] * N,
            infos=[{} for _ in range(N)],
        )

    def _draw(self) -> np.ndarray:
        from envs.smac.resource_collection import draw

        return draw(self.world.snapshot, 0)

    def state(self) -> np.ndarray:
        """The fields of the world's Snapshot, flattened and one after the other, (S,) float32."""
        fields = [x[0].float().flatten() for x in self.world.snapshot]
        return np.concatenate([x.numpy() for x in fields])


# --- By name --------------------------------------------------------------------------------------

VIEWS: dict[str, type[View]] = {
    "meltingpot": MeltingPotView,
    "particle": ParticleView,
    "battles": BattleView,
    "collection": CollectionView,
}


def parallel_env(family: str, *world: Any, **options: Any) -> ParallelEnv:
    """One world of a family; VIEWS[family] explains the arguments. ValueError if unknown."""
    if family not in VIEWS:
        raise ValueError(f"There is no family of worlds {family!r}: {', '.join(VIEWS)}.")
    return VIEWS[family](*world, **options)


def env(family: str, *world: Any, **options: Any) -> AECEnv:
    """parallel_env(...) as an AECEnv, in which agents act one at a time."""
    return parallel_to_aec(parallel_env(family, *world, **options))
