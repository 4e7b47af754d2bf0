"""Our worlds as PettingZoo has them: one world on the CPU, its agents by name.

    world = parallel_env("meltingpot", "coins")               # or "battles", "sz", (3, 4, 5)
    world = parallel_env("particle", "pacman", (4, 2))        # or "collection", (3, 4, 5)
    observations, infos = world.reset(seed=1)

`env(...)` takes what `parallel_env(...)` takes and gives agents one at a time (an AECEnv). All
worlds have the options render_mode ("human", "rgb_array" or None) and max_cycles (the length of an
episode in steps); the classes below say what else there is to choose, what agents see and what
their actions mean. step() wants an action of every agent in `agents`, and of nobody else. This is
for trying things out, not for speed.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils import parallel_to_aec


class Outcome(NamedTuple):
    """What a step did to each of the N possible agents, in their order."""

    reward: list[float]
    terminated: list[bool]
    truncated: list[bool]
    infos: list[dict[str, Any]]


class View(ParallelEnv):
    """What all worlds have in common.

    A subclass sets its world up and then calls `describe`; it says in `_begin`, `_advance`, `_see`,
    `_draw` and `state` how the world begins, goes on and looks.
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
        """Say who may ever act, what each agent sees and does, and what state() looks like."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is human or rgb_array, not {render_mode!r}.")
        self.render_mode = render_mode
        self.possible_agents = agents
        self.agents: list[str] = []  # those that act now
        self.num_actions = num_actions
        self.observation_spaces = dict.fromkeys(agents, observation)
        # One each: a space has its own random numbers.
        self.action_spaces = {agent: spaces.Discrete(num_actions) for agent in agents}
        self.state_space = spaces.Box(-np.inf, np.inf, state_shape, np.float32)
        self._window = None

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin an episode; with a seed, the one that belongs to it."""
        self.agents = self._begin(seed)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """Observations, rewards, terminations, truncations and infos of those who acted.

        Raises ValueError with one sentence for actions that are missing, unknown or nobody's.
        """
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
        """Actions (N,) of all possible agents, 0 for those that do not act."""
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
        """A picture (height, width, 3) uint8, or, with render_mode="human", a window."""
        if self.render_mode is None:
            return None
        image = self._draw()
        if self.render_mode == "rgb_array":
            return image
        import matplotlib.pyplot as plt

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
        """Begin an episode; returns who acts in it."""
        raise NotImplementedError

    def _advance(self, chosen: np.ndarray) -> Outcome:
        """One step with the actions (N,) of all possible agents."""
        raise NotImplementedError

    def _see(self, i: int) -> Any:
        """What possible agent i observes."""
        raise NotImplementedError

    def _draw(self) -> np.ndarray:
        """A picture (height, width, 3) uint8."""
        raise NotImplementedError


def new_seed() -> int:
    """A seed that nobody has chosen."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def new_metadata(name: str, fps: int) -> dict[str, Any]:
    """What PettingZoo wants to know of a class."""
    modes = ["human", "rgb_array"]
    return {"name": name, "render_modes": modes, "render_fps": fps, "is_parallelizable": True}


# --- Melting Pot ----------------------------------------------------------------------------------


class MeltingPotView(View):
    """One world of a substrate, with pixels.

    Observations are dictionaries of RGB and what else a player may see; rewards are each player's
    own. Infos count `pick_ups`. state() and pictures are WORLD.RGB, which players do not see.
    Resets with a seed fix the engine's seeds, yet the engine is not reproducible
    (docs/meltingpot.md). max_cycles 0 plays episodes to their natural end.
    """

    metadata = new_metadata("meltingpot_v2", 10)

    def __init__(self, substrate: str, render_mode: str | None = None, max_cycles: int = 0):
        from envs.meltingpot.worlds import SPRITE, get_spec

        self.spec, self.max_cycles = get_spec(substrate), max_cycles
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
        """The global view (H, W, 3) uint8."""
        return self.engine.lab.observation("WORLD.RGB").copy()

    def close(self) -> None:
        super().close()
        self.engine = None


# --- Particle worlds ------------------------------------------------------------------------------


class ParticleView(View):
    """One particle world: agents pac_man_0 ... pac_man_3, ghost_0, ghost_1 of "pacman", (4, 2).

    Observations are flat float32 vectors: what the agent sees of itself, (Ds,), then what it sees
    of each other agent in order, (De,) each: envs.particle.worlds.Observation says what is in them.
    An agent that is dead is zeros. Actions are 0 none, 1 left, 2 right, 3 down, 4 up. Dead Pac-Men
    leave `agents`. state() is the world's state (S,), from which all can be computed. Further
    options are fields of envs.particle.worlds.Game.
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
        """All positions, velocities and who is alive, (S,) float32."""
        return self._state.copy()


# --- Teams of at most eight: battles and Resource Collection --------------------------------------


class TeamView(View):
    """A world with a team whose size changes from episode to episode.

    Observations are {"observation": (A+E, D) float32, "action_mask": (actions,) int8}: all
    entities as in the world's Observation, those that the agent does not see as zeros, its own row
    first. Everybody earns the team's reward.
    """

    def team_space(self, slots: int, num_features: int, num_actions: int) -> spaces.Space:
        """What an agent sees of `slots` entities."""
        return spaces.Dict(
            {
                "observation": spaces.Box(-np.inf, np.inf, (slots, num_features), np.float32),
                "action_mask": spaces.Box(0, 1, (num_actions,), np.int8),
            }
        )

    def present(self) -> list[bool]:
        """Whose slots are taken in this episode."""
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
    """One simulated StarCraft battle; agents ally_0, ally_1, ... fight an enemy that plays itself.

    An action that is not available becomes stop (no-op of the dead). The dead stay until the battle
    ends and can do nothing else. Infos say at the end whether it was `won`. state() is what all
    units are, (A+E, 9): the fields of a Snapshot. Further options are those of
    envs.smac.combat.Combat.
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
        self._actions: np.ndarray | None = None  # of all slots, for pictures
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
        """What all units are, (A+E, 9) float32."""
        fields = [x[0].numpy().astype(np.float32) for x in self.world.snapshot]
        return np.stack(fields, -1)


class CollectionView(TeamView):
    """One world of Resource Collection, with agents collector_0, collector_1, ...

    Actions are 1 stay, 2 left, 3 right, 4 down, 5 up; 0 is for empty slots and means stay. state()
    is the snapshot as one vector.
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
        """The snapshot's fields one after the other, float32."""
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
    """One world of a family: its class in VIEWS says what `world` and `options` may be."""
    if family not in VIEWS:
        raise ValueError(f"There is no family of worlds {family!r}: {', '.join(VIEWS)}.")
    return VIEWS[family](*world, **options)


def env(family: str, *world: Any, **options: Any) -> AECEnv:
    """One world of a family, whose agents act one at a time."""
    return parallel_to_aec(parallel_env(family, *world, **options))
