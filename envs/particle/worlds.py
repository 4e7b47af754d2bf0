"""Particle worlds of MRA (TMLR) and MAAC, and two of ours, for up to 1,000 agents, batched.

    treasure    N agents collect 20 treasures, which reappear elsewhere when touched
    resource    N agents share 6 resources of different size
    pacman      P Pac-Men eat 20 dots, G ghosts catch Pac-Men; a touched Pac-Man dies
    signpost    ours: N agents go to one of three posts; N decides which one pays (unobserved)
    rooms       ours: F followers go to one of three leaders; F decides which one pays (unobserved)
    delivery    C collectors bring treasures of two kinds to the deposit of each, as in MAAC's code

    world = ParticleWorld("treasure", 6, num_worlds=64, device="cpu", seed=1)
    obs = world.reset()              # obs.own (B, N, Ds), obs.entities() (B, N, N, De), obs.mask()
    step = world.step(actions)       # actions (B, N): 0 none, 1 left, 2 right, 3 down, 4 up

B worlds, N agents, Ds own features, De features of another agent. A world that ends begins a new
episode at once; step.final has the observation at its end. A row (S,) of world.state is the whole
state of a world; observe() makes observations from it, so a replay buffer stores states. Each world
has its own random stream: with the same seed and actions it is the same for any number of worlds.

The physics are those of OpenAI's multi-agent particle environment (mpe2 is its maintained version).
The paper leaves most numbers of its tasks open; docs/particle.md has ours with their sources.

Inside, worlds are the last axis: (..., N, B). Each operation then runs over adjacent memory for any
N, and one compiled kernel does physics, reward and observation.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import numbers
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from envs.particle import kernels

ACTIONS = ("none", "left", "right", "down", "up")  # PettingZoo's order
DT, DAMPING, CONTACT_FORCE, CONTACT_MARGIN = 0.1, 0.25, 100.0, 1e-3
HORIZON = 20  # steps of an episode
LONGEST = 2**20  # more steps than an episode can have
MOST_AGENTS = 1000  # in a world; twenty times as many as in the paper's largest
LANES = 32  # worlds are padded to a multiple of this, so a world's bits do not depend on how many
VISIBLE = 7  # delivery: most treasures that an agent sees; collectors in a deposit's shaping
AWAY = -999.0  # delivery: x and y of a treasure that has just been taken
Integration = Literal["velocity-first", "mpe2"]


@dataclasses.dataclass(frozen=True)
class Game:
    """A task at one population: everything that is fixed before a world begins."""

    task: str
    population: tuple[int, ...]  # number of agents of each type
    radius: tuple[float, ...]  # of each type's agents
    force: tuple[float, ...]  # of an action, for each type
    top_speed: tuple[float, ...]  # of each type; inf: no limit
    landmark_radius: tuple[float, ...]  # of each landmark
    nearest: int  # how many landmarks are among an agent's features
    sizes: bool = False  # whether landmarks' features have their diameters
    in_order: bool = False  # whether landmarks are in a fixed order, not the nearest first
    coloured: bool = False  # whether each agent of the last type has its own colour (one-hot)
    contact: bool = True  # whether agents push each other
    mass: tuple[float, ...] = ()  # of each type, used in pushes only; empty: 1
    only_last_seen: bool = False  # whether agents see only other agents of the last type
    walls: bool = False  # whether positions are clipped to [-1, 1]^2
    mortal: bool = False  # whether agents may die
    carrying: bool = False  # whether the first type carries landmarks to the last (K agents)
    shaping: bool = True  # treasure, pacman, delivery: reward -.1 x distance to the target
    collision_penalty: float = 0.0  # treasure: subtracted for each agent touched
    integration: Integration = "velocity-first"  # mpe2: positions move by the old velocity

    def __post_init__(self) -> None:
        """ValueError for options that are out of range or that the task does not allow."""
        kinds, landmarks = get_args(Integration), self.num_landmarks
        if self.integration not in kinds:
            raise ValueError(f"integration is {' or '.join(kinds)}, not {self.integration!r}.")
        fewest, most = min(1, landmarks), VISIBLE if self.carrying else landmarks
        if not fewest <= self.nearest <= most:
            raise ValueError(f"nearest is from {fewest} to {most}, not {self.nearest}.")
        if self.in_order and (self.nearest != landmarks or self.sizes):
            raise ValueError("in_order shows all landmarks, and not their sizes.")
        if not 0 <= self.collision_penalty < math.inf:
            raise ValueError(f"collision_penalty is not negative: not {self.collision_penalty}.")
        if self.carrying and self.collision_penalty:
            raise ValueError(f"{self.task} has its own collision_penalty, 5: it takes no other.")
        if self.collision_penalty and self.task != "treasure":
            raise ValueError(f"{self.task} has no collision_penalty: treasure alone has.")
        if not self.shaping and not TASKS[self.task].shaped:
            raise ValueError(f"{self.task} has no shaping that it could do without.")

    @property
    def num_agents(self) -> int:
        return sum(self.population)

    @property
    def num_landmarks(self) -> int:
        return len(self.landmark_radius)

    @property
    def types(self) -> tuple[int, ...]:
        """(N,): the type of each agent; agents are ordered by type."""
        return tuple(kind for kind, n in enumerate(self.population) for _ in range(n))

    @property
    def num_kinds(self) -> int:
        """K: number of kinds of landmarks, and of deposits; 0 where agents do not carry them."""
        return self.population[-1] if self.carrying else 0

    @property
    def landmark_features(self) -> int:
        """How many of an agent's features describe landmarks."""
        return self.nearest * (3 if self.sizes else 2 + self.num_kinds)

    @property
    def own_features(self) -> int:
        """Ds: velocity, position, kinds that the agent takes in and carries, landmarks; or as many
        as a task of your own shows."""
        if own := self.shown_by_own_task():
            return own.own.shape[-1]
        return 4 + 2 * self.num_kinds + self.landmark_features

    @property
    def entity_features(self) -> int:
        """De: relative position, velocity; then type (one-hot, if there are several), colour
        (one-hot) and landmarks or, in delivery, the kinds that the agent takes in and carries; or
        as many as a task of your own shows."""
        if own := self.shown_by_own_task():
            return own.others.shape[-1]
        if self.carrying:
            return 4 + 2 * self.num_kinds
        types = len(self.population) if len(self.population) > 1 else 0
        colours = self.population[-1] if self.coloured else 0
        return 4 + types + colours + self.landmark_features

    def shown_by_own_task(self) -> Observation | None:
        """The observation of empty worlds, if the task has an observe() of its own."""
        observe = TASKS[self.task].observe
        if observe in (observation, delivery_observation):
            return None
        return observe(self, unpack(self, torch.zeros(self.state_size, LANES)))

    @property
    def state_size(self) -> int:
        """S: positions, velocities, alive, landmarks; in delivery also carried and kinds."""
        own = self.population[0] + self.num_landmarks if self.carrying else 0
        return 5 * self.num_agents + 2 * self.num_landmarks + own


def make_game(task: str, population: int | tuple[int, ...], **options: Any) -> Game:
    """The Game of a task in TASKS at a population; options are fields of Game (shaping,
    collision_penalty, nearest, integration). ValueError, one sentence, if one does not exist."""
    one = isinstance(population, numbers.Integral)
    population = (int(population),) if one else tuple(map(int, population))
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}: there are {', '.join(TASKS)}.")
    roles = TASKS[task].roles
    if len(population) != len(roles):
        wanted = (
            f"{len(roles)} numbers with commas ({','.join(roles)})"
            if len(roles) > 1
            else "one number"
        )
        raise ValueError(f"A population of {task} is {wanted}: {_name(population)} is not.")
    if min(population) < 1:
        few = _name(population)
        raise ValueError(f"A population has at least one agent of each type: not {few}.")
    if sum(population) > MOST_AGENTS:
        many = _name(population)
        raise ValueError(f"A population has at most {MOST_AGENTS} agents: not {many}.")
    leaders = TASKS[task].num_last
    if leaders and population[-1] != leaders:
        given = _name(population)
        raise ValueError(f"A population of {task} has {leaders} of type {roles[-1]}, not {given}.")
    fixed = TASKS[task].fixed(sum(population))
    if unknown := options.keys() - {field.name for field in dataclasses.fields(Game)}:
        raise ValueError(f"A world has no option {min(unknown)}.")
    return Game(**{"task": task, "population": population, **fixed, **options})


def _name(population: tuple[int, ...]) -> str:
    return ",".join(map(str, population))


class Bodies(NamedTuple):
    """The state of B worlds: agents and landmarks."""

    position: Tensor  # (2, N, B)
    velocity: Tensor  # (2, N, B)
    alive: Tensor  # (N, B) bool
    landmarks: Tensor  # (2, L, B)
    carried: Tensor | None = None  # (C, B): kind that each collector carries, 1 ... K; 0: nothing
    kinds: Tensor | None = None  # (L, B): kind of each landmark, 1 ... K


def pack(bodies: Bodies) -> Tensor:
    """Bodies -> states (S, B)."""
    rows = [bodies.position, bodies.velocity, bodies.alive[None], bodies.landmarks]
    if bodies.carried is not None:
        rows += [bodies.carried[None], bodies.kinds[None]]
    return torch.cat([x.flatten(0, 1).to(bodies.position.dtype) for x in rows])


def unpack(game: Game, state: Tensor) -> Bodies:
    """States (S, B) -> Bodies."""
    N, L = game.num_agents, game.num_landmarks
    rows = [2 * N, 2 * N, N, 2 * L]
    if game.carrying:
        rows += [game.population[0], L]
    position, velocity, alive, landmarks, *carrying = state.split(rows)
    return Bodies(
        position.unflatten(0, (2, N)),
        velocity.unflatten(0, (2, N)),
        alive > 0.5,
        landmarks.unflatten(0, (2, L)),
        *carrying,
    )


# --- Constants ------------------------------------------------------------------------------------


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, cached per device: making one on a GPU waits for the GPU. Do not
    write into it."""
    if torch.compiler.is_compiling():  # it becomes a part of the compiled code
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


@functools.cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


# --- Physics --------------------------------------------------------------------------------------


def per_agent(game: Game, values: tuple[float, ...], like: Tensor) -> Tensor:
    """(N, 1): of values, one for each type, the value of each agent's type."""
    numbers = tuple(values[kind] for kind in game.types)
    return constant(numbers, like.dtype, like.device)[:, None]


def pushes(game: Game, bodies: Bodies) -> tuple[Tensor, Tensor, Tensor]:
    """Contact forces: x and y of d = p_i - p_j, and the factor of d that gives the force of j on i,
    f = 100 (d / |d|) k log(1 + exp(-(|d| - r_i - r_j) / k)), k = CONTACT_MARGIN; (N, N, B) each.

    Bodies at the same point do not push (the original divides by zero there), nor do the dead.
    f_ij = -f_ji to the bit.
    """
    x, y = (p[:, None] - p for p in bodies.position)
    distance = (x * x + y * y).sqrt()
    radius = per_agent(game, game.radius, distance)
    touching = radius[:, None] + radius[None]  # (N, N, 1)
    overlap = (touching - distance) / CONTACT_MARGIN
    # log(1 + exp(x)) without overflow, and without denormal numbers, which are slow.
    depth = overlap.clamp_min(0) + torch.log(1 + torch.exp(-overlap.abs().clamp_max(80.0)))
    push = CONTACT_FORCE * CONTACT_MARGIN * depth / distance.clamp_min(1e-30)
    if game.mortal:
        push = push * (bodies.alive[:, None] & bodies.alive)
    return x, y, push


def move(game: Game, bodies: Bodies, actions: Tensor) -> Bodies:
    """Bodies after one step of physics with actions (N, B), ints in [0, 5)."""
    p, v = bodies.position, bodies.velocity
    right = (actions == 2).to(p.dtype) - (actions == 1).to(p.dtype)
    up = (actions == 4).to(p.dtype) - (actions == 3).to(p.dtype)
    force = torch.stack((right, up)) * per_agent(game, game.force, p)
    if game.contact:
        x, y, push = pushes(game, bodies)
        if game.mass:  # as in Iqbal's fork: m_j / m_i times the force, then divided by m_i
            mass = per_agent(game, game.mass, p)
            push = push * (mass / mass[:, None].square())
        force = force + torch.stack(((x * push).sum(1), (y * push).sum(1)))
    moved = v * (1 - DAMPING) + force * DT  # `force` is already divided by the mass
    if min(game.top_speed) < math.inf:
        speed = moved.square().sum(0).sqrt()
        top = per_agent(game, game.top_speed, p)
        moved = torch.where(speed > top, moved / speed.clamp_min(1e-30) * top, moved)
    if game.mortal:
        moved = moved * bodies.alive  # the dead stop
    p = p + (v if game.integration == "mpe2" else moved) * DT
    if game.walls:
        p = p.clamp(-1.0, 1.0)
    return bodies._replace(position=p, velocity=moved)


# --- Rewards --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What the positions at the end of a step lead to."""

    reward: Tensor  # (N, B)
    alive: Tensor  # (N, B) bool, after the step
    taken: Tensor  # (L, B) bool: landmarks that reappear elsewhere


def landmark_distances(game: Game, bodies: Bodies) -> Tensor:
    """(N, L, B): distances between the centres of agents and landmarks."""
    x, y = (l - p[:, None] for l, p in zip(bodies.landmarks, bodies.position))
    return (x * x + y * y).sqrt()


def agent_distances(bodies: Bodies) -> Tensor:
    """(N, N, B): distances between the centres of agents."""
    x, y = (p[:, None] - p for p in bodies.position)
    return (x * x + y * y).sqrt()


def treasure_outcome(game: Game, bodies: Bodies) -> Outcome:
    """5 for each treasure that an agent touches, whoever else does. Shaping: -.1 x distance to the
    nearest one. -collision_penalty for each other agent that it touches."""
    distance = landmark_distances(game, bodies)
    touched = distance < game.radius[0] + game.landmark_radius[0]
    reward = 5.0 * touched.sum(1).to(distance.dtype)
    if game.shaping:
        reward = reward - 0.1 * distance.amin(1)
    if game.collision_penalty:
        others = ~torch.eye(game.num_agents, dtype=torch.bool, device=distance.device)[..., None]
        hits = ((agent_distances(bodies) < 2 * game.radius[0]) & others).sum(1)
        reward = reward - game.collision_penalty * hits.to(reward.dtype)
    return Outcome(reward, bodies.alive, touched.any(0))


def resource_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Each agent: for each resource that it touches 10 x its radius / number of agents on it."""
    distance = landmark_distances(game, bodies)
    radius = constant(game.landmark_radius, distance.dtype, distance.device)
    touched = distance < (radius + game.radius[0])[:, None]
    share = 10.0 * radius[:, None] / touched.sum(0).clamp_min(1)  # (L, B)
    reward = (touched * share).sum(1)
    return Outcome(reward, bodies.alive, torch.zeros_like(touched[0]))


def pacman_outcome(game: Game, bodies: Bodies) -> Outcome:
    """A Pac-Man: 2 per dot that it touches; -5 per ghost that touches it (the ghost: 5), and death.
    Shaping: -.1 x distance to the nearest dot (ghosts: Pac-Man). Already dead ones do not count."""
    P = game.population[0]
    living = bodies.alive[:P]  # (P, B); ghosts never die
    to_dots = landmark_distances(game, bodies)[:P]
    to_ghosts = agent_distances(bodies)[:P, P:]  # (P, G, B)
    eaten = (to_dots < game.radius[0] + game.landmark_radius[0]) & living[:, None]
    caught = (to_ghosts < sum(game.radius)) & living[:, None]
    pac_men = 2.0 * eaten.sum(1) - 5.0 * caught.sum(1)
    ghosts = 5.0 * caught.sum(0).to(pac_men.dtype)
    if game.shaping:
        pac_men = pac_men - 0.1 * to_dots.amin(1) * living
        prey = to_ghosts.masked_fill(~living[:, None], math.inf).amin(0)
        ghosts = ghosts - 0.1 * torch.where(prey < math.inf, prey, 0.0)
    alive = torch.cat((living & ~caught.any(1), bodies.alive[P:]))
    return Outcome(torch.cat((pac_men, ghosts)), alive, eaten.any(0))


def wanted(game: Game) -> int:
    """signpost, rooms: which place pays: 0 with up to 3 agents or followers, 1 up to 6, else 2."""
    return sum(game.population[0] > bound for bound in (3, 6))


def signpost_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Each agent: minus its distance to the post that pays in this population."""
    distance = landmark_distances(game, bodies)  # (N, L, B)
    nothing = torch.zeros_like(distance[0], dtype=torch.bool)
    return Outcome(-distance[:, wanted(game)], bodies.alive, nothing)


def rooms_outcome(game: Game, bodies: Bodies) -> Outcome:
    """A follower: minus its distance to the leader that pays in this population. Leaders: 0."""
    F = game.population[0]
    to_leader = agent_distances(bodies)[:, F + wanted(game)]  # (N, B)
    is_follower = torch.arange(game.num_agents, device=to_leader.device)[:, None] < F
    nothing = torch.zeros_like(landmark_distances(game, bodies)[0], dtype=torch.bool)
    return Outcome(-to_leader * is_follower, bodies.alive, nothing)


def delivery_outcome(game: Game, bodies: Bodies) -> Outcome:
    """All agents: 5 for each empty-handed collector and treasure that touch, 5 for each collector
    that touches the deposit of what it carries. Collectors: -5 for each collector that they touch.
    Shaping, -.1 x distance: of collectors to the nearest treasure or, with one, to its deposit; of
    deposits to the nearest collector that brings them one, else to the mean of the nearest 7."""
    C, K = game.population
    to_treasures = landmark_distances(game, bodies)[:C]  # (C, L, B)
    between = agent_distances(bodies)
    to_deposits = between[:C, C:]  # (C, K, B)
    free, brings = bodies.carried == 0, bodies.carried[:, None] == kind_numbers(game, bodies)
    found = (to_treasures < game.radius[0] + game.landmark_radius[0]) & free[:, None]
    brought = (to_deposits < sum(game.radius)) & brings
    shared = 5.0 * (found.sum((0, 1)) + brought.sum((0, 1))).to(between.dtype)  # (B,)
    others = ~torch.eye(C, dtype=torch.bool, device=between.device)[..., None]
    hits = ((between[:C, :C] < 2 * game.radius[0]) & others).sum(1)
    collectors, deposits = shared - 5.0 * hits.to(shared.dtype), shared.expand(K, -1)
    if game.shaping:
        far = to_deposits.masked_fill(~brings, math.inf)
        collectors = collectors - 0.1 * torch.where(free, to_treasures.amin(1), far.amin(1))
        middle = nearest_collectors(game, bodies, to_deposits).square().sum(0).sqrt()
        deposits = deposits - 0.1 * torch.where(brings.any(0), far.amin(0), middle)
    nothing = torch.zeros_like(to_treasures[0], dtype=torch.bool)  # hand_over() moves treasures
    return Outcome(torch.cat((collectors, deposits)), bodies.alive, nothing)


def nearest_collectors(game: Game, bodies: Bodies, to_deposits: Tensor) -> Tensor:
    """(2, K, B): mean offset from each deposit to its VISIBLE nearest collectors (to all, if there
    are fewer). to_deposits (C, K, B): distances."""
    C = game.population[0]
    offset = bodies.position[:, None, :C] - bodies.position[:, C:, None]  # (2, K, C, B)
    if C > VISIBLE:
        offset = torch.stack(nearest(to_deposits.transpose(0, 1), [*offset], VISIBLE))
    return offset.mean(2)


def kind_numbers(game: Game, bodies: Bodies) -> Tensor:
    """(K, 1): the numbers of the kinds, 1 ... K."""
    numbers = torch.arange(1, game.num_kinds + 1, device=bodies.kinds.device)
    return numbers[:, None].to(bodies.kinds.dtype)


# --- Observations ---------------------------------------------------------------------------------


class Observation(NamedTuple):
    """What all agents see. Agent i sees own[i] and, of each other agent j that mask() says it sees,
    entities()[i, j]. In delivery own and others have other features: see delivery_observation().

    Worlds may be the fastest axis in memory: use reshape(), not view(). Do not write into it.
    """

    own: Tensor  # (B, N, Ds): v_i, p_i, landmarks relative to i
    others: Tensor  # (B, N, De): p_j, v_j, type of j if there are several, colour, j's landmarks
    alive: Tensor  # (B, N) bool
    seen: Tensor  # (B, N) bool: alive and of a type that others see

    def entities(self) -> Tensor:
        """(B, N, N, De): [b, i, j] is others[b, j] with p_j - p_i in the place of p_j."""
        N = self.own.shape[1]
        seen = self.others[:, None].expand(-1, N, -1, -1).clone()
        seen[..., :2] -= self.others[:, :, None, :2]
        return seen

    def mask(self) -> Tensor:
        """(B, N, N) bool: [b, i, j] is True if agent i sees j: j is seen and is not i."""
        itself = torch.eye(self.own.shape[1], dtype=torch.bool, device=self.own.device)
        return self.seen[:, None] & ~itself


def nearest(key: Tensor, values: list[Tensor], k: int) -> list[Tensor]:
    """The values (N, k, B) each, at the k smallest of key (N, L, B), the smallest first.

    Compiled code counts for each item how many are smaller, which is its place, and sums each
    place's items: L^2 comparisons, but all in one loop over worlds. Eager code sorts.
    """
    if not torch.compiler.is_compiling():
        order = key.topk(k, dim=1, largest=False).indices
        return [torch.gather(x.expand_as(key), 1, order) for x in values]
    number = torch.arange(key.shape[1], device=key.device)
    earlier = (number[:, None] > number)[..., None]  # of equal items the first comes first
    mine, other = key[:, :, None], key[:, None]
    smaller = (other < mine) | ((other == mine) & earlier)  # (N, L, L, B)
    place = torch.where(smaller, 1.0, 0.0).sum(2)  # (N, L, B)
    chosen = place[:, None] == torch.arange(k, device=key.device)[:, None, None]  # (N, k, L, B)
    return [torch.where(chosen, x.expand_as(key)[:, None], 0.0).sum(2) for x in values]


def observation(game: Game, bodies: Bodies) -> Observation:
    """The observation of all agents, in all tasks but delivery."""
    p, v = bodies.position, bodies.velocity
    between = bodies.landmarks[:, None] - p[:, :, None]  # (2, N, L, B)
    if game.in_order:
        marks = between.permute(2, 0, 1, 3).flatten(0, 1)  # (L x 2, N, B)
    else:
        radius = constant(game.landmark_radius, p.dtype, p.device)[:, None]
        edge = between.square().sum(0).sqrt() - radius  # (N, L, B)
        sizes = [2 * radius[None]] if game.sizes else []
        marks = torch.stack(nearest(edge, [*between, *sizes], game.nearest), 2)  # (N, k, 2 or 3, B)
        marks = marks.flatten(1, 2).transpose(0, 1)  # (k x 2 or 3, N, B)
    labels = [label.expand_as(p[:1]) for label in labels_of(game, p)]
    own, others = torch.cat((v, p, marks)), torch.cat((p, v, *labels, marks))
    seen = bodies.alive & seen_at_all(game, p)[:, None]
    views = (own.permute(2, 1, 0), others.permute(2, 1, 0))
    return Observation(*views, alive=bodies.alive.T, seen=seen.T)


def observation_of_rows(game: Game, states: Tensor) -> Observation:
    """What observation() gives for states (K, S), equal to the bit, by one loop on the CPU."""
    N, states = game.num_agents, states.contiguous()
    own = states.new_empty(len(states), N, game.own_features)
    others = states.new_empty(len(states), N, game.entity_features)
    radius = constant(game.landmark_radius, states.dtype, states.device)
    labels = [label.view(N, 1) for label in labels_of(game, states)]
    labels = torch.cat(labels, 1) if labels else states.new_empty(N, 0)
    arrays = states.numpy(), radius.numpy(), labels.contiguous().numpy()
    kernels.observe_states(*arrays, game.in_order, game.sizes, own.numpy(), others.numpy())
    alive = states[:, 4 * N : 5 * N] > 0.5
    return Observation(own, others, alive=alive, seen=alive & seen_at_all(game, states))


def seen_at_all(game: Game, like: Tensor) -> Tensor:
    """(N,) bool: agents that others see as long as they live."""
    unseen = game.num_agents - game.population[-1] if game.only_last_seen else 0
    return torch.arange(game.num_agents, device=like.device) >= unseen


def labels_of(game: Game, like: Tensor) -> list[Tensor]:
    """Features of agents that never change, (1, N, 1) each: columns of the one-hot type, if there
    are several types, and of the one-hot colour."""
    N = game.num_agents
    of_types = len(game.population) if len(game.population) > 1 else 0
    labels = [tuple(float(kind == own) for own in game.types) for kind in range(of_types)]
    colours = range(N - game.population[-1], N) if game.coloured else ()
    labels += [tuple(float(i == agent) for i in range(N)) for agent in colours]
    return [constant(label, like.dtype, like.device)[None, :, None] for label in labels]


def delivery_observation(game: Game, bodies: Bodies) -> Observation:
    """own: v_i, p_i, the kinds that i takes in and carries (one-hot of K each), and the nearest
    treasures: offset from i and kind (one-hot); 0 if there are fewer treasures. others: p_j, v_j,
    the kinds that j takes in and carries."""
    p, v = bodies.position, bodies.velocity
    (C, K), N, L = game.population, game.num_agents, game.num_landmarks
    number, kind = torch.arange(N, device=p.device)[:, None], kind_numbers(game, bodies)[:, None]
    takes = (number - C + 1 == kind).expand(-1, -1, p.shape[2])  # (K, N, B), of deposits
    carries = torch.nn.functional.pad(bodies.carried, (0, 0, 0, K)) == kind  # of collectors
    between = bodies.landmarks[:, None] - p[:, :, None]  # (2, N, L, B)
    far = between.square().sum(0).sqrt()
    order = torch.arange(L, device=p.device)[:, None] * (bodies.landmarks[0] == AWAY)  # for ties
    kinds = (bodies.kinds == kind).to(p.dtype)[:, None]  # (K, 1, L, B)
    shown = min(game.nearest, L)
    marks = torch.stack(nearest(far + order, [*between, *kinds], shown))  # (2 + K, N, k, B)
    marks = torch.nn.functional.pad(marks, (0, 0, 0, game.nearest - shown))
    marks = marks.permute(2, 0, 1, 3).flatten(0, 1)  # (k x (2 + K), N, B)
    own = torch.cat((v, p, takes, carries, marks)).permute(2, 1, 0)
    others = torch.cat((p, v, takes, carries)).permute(2, 1, 0)
    return Observation(own, others, alive=bodies.alive.T, seen=bodies.alive.T)


# --- Tasks ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A kind of world. Add your own to TASKS.

    outcome and observe must not return views of the bodies. others[..., :2] of an observation must
    be positions. An episode terminates when no agent of the first type is alive.
    """

    roles: tuple[str, ...]  # names of the types of agents
    fixed: Callable[[int], dict[str, Any]]  # fields of Game, for N agents
    outcome: Callable[[Game, Bodies], Outcome]
    observe: Callable[[Game, Bodies], Observation] = observation
    place: Callable[[Tensor], Tensor] = lambda places: places  # U[-1, 1)^2 (2, L, B) -> landmarks
    num_last: int = 0  # number of agents of the last type; 0: any number
    shaped: bool = False  # whether outcome reads game.shaping: others refuse --no-shaping
    players: Mapping[str, Callable] = types.MappingProxyType({})  # scripted, of a task of your own


def _bodies(radius: float, force: float, landmarks: tuple[float, ...], nearest: int) -> dict:
    """Fields of a Game with one type of agents, without a top speed."""
    own = dict(radius=(radius,), force=(force,), top_speed=(math.inf,))
    return own | dict(landmark_radius=landmarks, nearest=nearest)


def triangle(places: Tensor) -> Tensor:
    """Random numbers (2, 3, B) in [-1, 1) -> three posts (2, 3, B) at the corners of an equilateral
    triangle with sides from 1.2 to 1.5, turned and mirrored at random, its centre near 0."""
    centre = 0.13 * places[:, 0]  # (2, B)
    radius = 0.7 + 0.085 * (1 + places[0, 1])
    angle = math.pi * places[1, 1]
    turn = torch.where(places[0, 2] < 0, -1.0, 1.0) * (2 * math.pi / 3)
    corners = [angle + k * turn for k in range(3)]
    x = torch.stack([radius * corner.cos() for corner in corners])
    y = torch.stack([radius * corner.sin() for corner in corners])
    return torch.stack((x, y)) + centre[:, None]


TASKS = {
    "treasure": Task(
        ("agent",), lambda N: _bodies(0.05, 5.0, (0.025,) * 20, 5), treasure_outcome, shaped=True
    ),
    "resource": Task(
        ("agent",),
        lambda N: _bodies(0.05, 5.0, tuple(0.05 * k for k in range(1, 7)), 6) | dict(sizes=True),
        resource_outcome,
    ),
    "pacman": Task(
        ("pac_man", "ghost"),
        lambda N: dict(
            radius=(0.05, 0.075),
            force=(4.0, 2.0),
            top_speed=(3.0, 2.0),
            landmark_radius=(0.03,) * 20,
            nearest=5,
            walls=True,
            mortal=True,
        ),
        pacman_outcome,
        shaped=True,
    ),
    "signpost": Task(
        ("agent",),
        lambda N: _bodies(0.05, 5.0, (0.05,) * 3, 3) | dict(in_order=True, contact=False),
        signpost_outcome,
        place=triangle,
    ),
    "rooms": Task(
        ("follower", "leader"),
        lambda N: dict(
            radius=(0.05, 0.1),
            force=(5.0, 5.0),
            top_speed=(math.inf, 0.0),  # leaders cannot move
            landmark_radius=(),
            nearest=0,
            coloured=True,
            contact=False,
            only_last_seen=True,
        ),
        rooms_outcome,
        num_last=3,
    ),
    "delivery": Task(
        ("collector", "deposit"),
        lambda N: dict(
            radius=(0.05, 0.075),
            force=(2.25, 2.25),  # Iqbal's fork multiplies by 1.5 twice
            top_speed=(1.0, 1.0),
            mass=(1.0, 2.25),
            landmark_radius=(0.025,) * (N - 2),  # as many treasures as collectors
            nearest=VISIBLE,
            carrying=True,
        ),
        delivery_outcome,
        delivery_observation,
        place=lambda places: 0.95 * places,
        num_last=2,
        shaped=True,
    ),
}


# --- Random numbers -------------------------------------------------------------------------------


class Clocks(NamedTuple):
    """What a world's random numbers and the end of its episode depend on; (B,) int64 each."""

    key: Tensor  # of its random stream
    episode: Tensor  # number of episodes begun
    time: Tensor  # steps since the episode began


GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's output function, int64 -> int64. Products overflow on purpose."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # the mask: unsigned shift
    return x


def uniform(clocks: Clocks, slots: range, per_step: int, dtype: torch.dtype) -> Tensor:
    """(len(slots), B) in [-1, 1): those with the indices `slots` of the per_step random numbers of
    the present step. They depend on the clocks alone, so actions do not change later episodes."""
    slot = torch.arange(slots.start, slots.stop, device=clocks.key.device)[:, None]
    step = clocks.episode * LONGEST + clocks.time
    bits = mixed(clocks.key + GOLDEN * (step * per_step + slot))
    return ((bits >> 40) & 0xFFFFFF).to(dtype) * (2.0 / 2**24) - 1.0


def fresh(game: Game, clocks: Clocks, dtype: torch.dtype) -> Bodies:
    """New episodes: all agents and landmarks uniform in [-1, 1)^2 (or as Task.place), at rest."""
    N, L = game.num_agents, game.num_landmarks
    places = uniform(clocks, range(2 * (N + L)), 2 * (N + 2 * L), dtype)
    position, landmarks = places.split((2 * N, 2 * L))
    position = position.unflatten(0, (2, N))
    alive = torch.ones_like(position[0], dtype=torch.bool)
    landmarks = TASKS[game.task].place(landmarks.unflatten(0, (2, L)))
    bodies = Bodies(position, torch.zeros_like(position), alive, landmarks)
    if game.carrying:
        slots = range(2 * (N + L), 2 * (N + L) + L)
        kinds = draw_kinds(game, uniform(clocks, slots, 2 * (N + 2 * L), dtype))
        nothing = torch.zeros_like(position[0, : game.population[0]])
        bodies = bodies._replace(carried=nothing, kinds=kinds)
    return bodies


def draw_kinds(game: Game, draws: Tensor) -> Tensor:
    """Uniform kinds 1 ... K from uniform numbers in [-1, 1), of the same shape."""
    return 1 + ((draws + 1) * (game.num_kinds / 2)).floor()


def hand_over(game: Game, bodies: Bodies, clocks: Clocks) -> Bodies:
    """delivery: what touching in the last step leads to when a step begins. In their order, each
    treasure goes to the first empty-handed collector that touches it. Then collectors that touch
    the deposit of what they carry have nothing, and treasures taken one step earlier reappear."""
    C, N, L = game.population[0], game.num_agents, game.num_landmarks
    touched = landmark_distances(game, bodies)[:C] < game.radius[0] + game.landmark_radius[0]
    touched = touched & (clocks.time > 1)  # (C, L, B); nothing is taken before the first step
    number = torch.arange(C, device=touched.device)[:, None]
    carried, takers = bodies.carried, []
    for k in range(L):
        may = touched[:, k] & (carried == 0)
        takers.append(torch.where(may, number, C).amin(0))  # (B,); C: no collector
        carried = torch.where(number == takers[k], bodies.kinds[k], carried)
    brings = carried[:, None] == kind_numbers(game, bodies)  # (C, K, B)
    at_deposit = agent_distances(bodies)[:C, C:] < sum(game.radius)
    carried = torch.where((at_deposit & brings).any(1), 0.0, carried)
    draws = uniform(clocks, range(3 * L), 2 * (N + 2 * L), carried.dtype)
    places = TASKS[game.task].place(draws[: 2 * L].unflatten(0, (2, L)))
    away = bodies.landmarks[0] == AWAY
    kinds = torch.where(away, draw_kinds(game, draws[2 * L :]), bodies.kinds)
    landmarks = torch.where(torch.stack(takers) < C, AWAY, bodies.landmarks)
    landmarks = torch.where(away, places, landmarks)
    return bodies._replace(landmarks=landmarks, carried=carried, kinds=kinds)


def advance(game: Game, horizon: int, state: Tensor, actions: Tensor, clocks: Clocks) -> tuple:
    """One step of all worlds without new episodes: states (S, B) and actions (B, N) -> states after
    it, clocks, reward, terminated, truncated, alive, observation, states as rows (B, S)."""
    # Not _replace(): under PyTorch 2.11, what that makes leaves a compiled function without fields.
    clocks = Clocks(clocks.key, clocks.episode, clocks.time + 1)
    bodies = unpack(game, state)
    if game.carrying:
        bodies = hand_over(game, bodies, clocks)
    bodies = move(game, bodies, actions.T)
    reward, alive, taken = TASKS[game.task].outcome(game, bodies)
    reward = reward.to(state.dtype)
    N, L = game.num_agents, game.num_landmarks
    slots = range(2 * (N + L), 2 * (N + 2 * L))
    elsewhere = uniform(clocks, slots, slots.stop, state.dtype).unflatten(0, (2, L))
    landmarks = torch.where(taken, elsewhere, bodies.landmarks)
    velocity = bodies.velocity * alive
    bodies = bodies._replace(velocity=velocity, alive=alive, landmarks=landmarks)
    over = ~alive[: game.population[0]].any(0)
    late = (clocks.time >= horizon) & ~over
    state, obs = pack(bodies), TASKS[game.task].observe(game, bodies)
    return state, clocks, reward.T, over, late, alive.T, obs, state.T.contiguous()


def restart(game: Game, state: Tensor, clocks: Clocks, ended: Tensor, obs: Observation) -> tuple:
    """Begin new episodes in the worlds that have ended (B,) bool; returns states (S, B), clocks and
    observation. The other worlds keep theirs to the bit."""
    episode, time = clocks.episode + ended, torch.where(ended, 0, clocks.time)
    clocks = Clocks(clocks.key, episode, time)
    bodies = fresh(game, clocks, state.dtype)
    state = torch.where(ended, pack(bodies), state)
    new = TASKS[game.task].observe(game, bodies)
    here = [ended.view(-1, *[1] * (x.dim() - 1)) for x in new]
    return state, clocks, Observation(*map(torch.where, here, new, obs))


# --- The world ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What ParticleWorld.step() returns."""

    obs: Observation  # for the next action: of the new episode where one has ended
    reward: Tensor  # (B, N)
    terminated: Tensor  # (B,) bool: no agent of the first type is alive (pacman only)
    truncated: Tensor  # (B,) bool: the horizon is reached, and not terminated
    alive: Tensor  # (B, N) bool: at the end of the step, before a new episode
    final: Observation  # at the end of the step, before a new episode
    final_state: Tensor  # (B, S): state at the end of the step, before a new episode


class ParticleWorld:
    """num_worlds worlds of one task and population, on one device. ValueError as make_game(), or
    for a horizon that is not below LONGEST.

    task            one of TASKS
    population      number of agents; for pacman (Pac-Men, ghosts), for rooms (followers, 3), for
                    delivery (collectors, 2)
    compiled        use torch.compile() for steps and for new episodes; if that fails, the same
                    functions run eagerly
    first_world     number of the first world; seed and number determine a world's draws
    horizon         steps of an episode
    options         shaping, collision_penalty, nearest, integration: see Game
    """

    def __init__(
        self,
        task: str,
        population: int | tuple[int, ...],
        num_worlds: int,
        device: str | torch.device = "cpu",
        seed: int = 1,
        compiled: bool = False,
        first_world: int = 0,
        horizon: int = HORIZON,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ):
        self.game = make_game(task, population, **options)
        if not 1 <= horizon < LONGEST:  # uniform() keeps so many steps for each episode
            raise ValueError(f"An episode has from 1 to {LONGEST - 1} steps, not {horizon}.")
        self.num_worlds, self.horizon = num_worlds, horizon
        self.device, self.dtype = torch.device(device), dtype
        padded = -(-num_worlds // LANES) * LANES
        number = torch.arange(first_world, first_world + padded, device=self.device)
        self.numbers = number
        self.bodies = torch.zeros(self.game.state_size, padded, dtype=dtype, device=self.device)
        # (B, N) rewards of the last step, for players with memory; reset() does not change them
        self.last_reward = self.bodies.new_zeros(num_worlds, self.num_agents)
        self.seed(seed)
        what = f"the world ({self.game.task}, {_name(self.game.population)})"
        self._advance = functools.partial(advance, self.game, horizon)
        self._restart = functools.partial(restart, self.game)
        if compiled:
            # Inductor unrolls sums over fewer than 8 items, such as the landmarks in observation():
            # it would then compute every landmark again for each place.
            few = self.game.num_landmarks < 8 and TASKS[task].observe is observation
            options = {"unroll_reductions_threshold": 1} if few else {}
            self._advance = Compiled(self._advance, what, options=options)
            self._restart = Compiled(self._restart, f"new episodes of {what}", options=options)

    @property
    def num_agents(self) -> int:
        return self.game.num_agents

    @property
    def state(self) -> Tensor:
        """(B, S): the present states of the worlds; a copy."""
        return self.bodies[:, : self.num_worlds].T.contiguous()

    def seed(self, seed: int) -> None:
        """Restart the worlds' random streams with this seed. Call reset() next."""
        key = mixed(mixed(torch.full_like(self.numbers, seed)) + GOLDEN * (self.numbers + 1))
        self.clocks = Clocks(key, torch.zeros_like(key), torch.zeros_like(key))
        self.seen: Observation | None = None

    @property
    def obs(self) -> Observation:
        """The last observation of reset() or step(); RuntimeError before reset()."""
        if self.seen is None:
            raise RuntimeError("A world begins with reset().")
        return self._cut(self.seen)

    @torch.no_grad()
    def reset(self) -> Observation:
        """Begin new episodes in all worlds."""
        empty = TASKS[self.game.task].observe(self.game, unpack(self.game, self.bodies))
        everywhere = torch.ones_like(self.clocks.key, dtype=torch.bool)
        begun = self._restart(self.bodies, self.clocks, everywhere, empty)
        self.bodies, self.clocks, self.seen = begun
        return self.obs

    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Play a step with ints (B, N) in [0, 5): others are as 0. ValueError before reset(), for
        other shapes or for floats."""
        B, padded = self.num_worlds, self.bodies.shape[1]
        if isinstance(actions, np.ndarray):
            actions = torch.as_tensor(actions, device=self.device)
        if self.seen is None:
            raise ValueError("Before step() comes reset().")
        if actions.shape != (B, self.num_agents) or actions.is_floating_point():
            have = f"{tuple(actions.shape)} of {actions.dtype}"
            raise ValueError(f"Actions are ints {(B, self.num_agents)}, not {have}.")
        actions = actions.to(torch.int64)
        if padded > B:
            actions = torch.nn.functional.pad(actions, (0, 0, 0, padded - B))
        done = self._advance(self.bodies, actions, self.clocks)
        self.bodies, self.clocks, reward, over, late, alive, final, last = done
        obs, ended = final, over | late
        # On a GPU the question whether any has ended would wait for it: restart() always runs.
        if self.device.type != "cpu" or ended[:B].any():
            begun = self._restart(self.bodies, self.clocks, ended, final)
            self.bodies, self.clocks, obs = begun
        self.seen = obs
        results = reward, over, late, alive
        results = results if padded == B else [x[:B] for x in results]
        self.last_reward = results[0]
        return Step(self._cut(obs), *results, self._cut(final), last[:B])

    @torch.no_grad()
    def observe(self, states: Tensor) -> Observation:
        """The observations (K, ...) of states (K, S), equal to those that the worlds gave."""
        on_cpu = states.device.type == "cpu"
        if on_cpu and TASKS[self.game.task].observe is observation:
            return observation_of_rows(self.game, states)
        return TASKS[self.game.task].observe(self.game, unpack(self.game, states.T.contiguous()))

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, and the last observation; not last_reward."""
        own = {name: x[..., : self.num_worlds].clone() for name, x in self._arrays().items()}
        own |= {name: x.contiguous() for name, x in self.obs._asdict().items()}
        return own | {"game": f"{self.game.task} {_name(self.game.population)}"}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a state_dict(). ValueError (nothing is changed) for another task, population,
        number of worlds or type of numbers."""
        twin = copy.copy(self)  # self does not change if the state is refused
        twin.reset()
        mine, own = twin.state_dict(), twin._arrays()
        shapes = [
            {k: x if isinstance(x, str) else (x.shape, x.dtype) for k, x in one.items()}
            for one in (saved, mine)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"This state is not of {self.num_worlds} worlds of {mine['game']}.")
        for name, x in own.items():
            x[..., : self.num_worlds] = saved[name]
        self.bodies, self.clocks, self.seen = own.pop("bodies"), Clocks(**own), twin.seen
        for name, x in self.seen._asdict().items():
            x[: self.num_worlds] = saved[name]

    def _arrays(self) -> dict[str, Tensor]:
        """Copies of states and clocks by name, (..., padded number of worlds) each."""
        own = {"bodies": self.bodies, **self.clocks._asdict()}
        return {name: x.clone() for name, x in own.items()}

    def _cut(self, obs: Observation) -> Observation:
        """The observation without the worlds that pad their number to a multiple of LANES."""
        if self.num_worlds == self.bodies.shape[1]:
            return obs
        return Observation(*(x[: self.num_worlds] for x in obs))


class Compiled:
    """torch.compile(function), or the plain function if compilation fails. what: name in messages;
    dynamic: compile once for all sizes of tensors, not once for each size.

    A process killed while it compiles leaves a damaged library in the compiler's cache, and all
    later processes fail on it. So after a failure compilation is tried again with a new cache.
    """

    def __init__(
        self, function: Callable, what: str, dynamic: bool = False, options: dict | None = None
    ):
        self.plain, self.what = function, what
        self.how = {"dynamic": dynamic, "options": {"cpp.simdlen": vector_bits()} | (options or {})}
        self.call: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.call else self.first(*args)

    def first(self, *args: Any) -> Any:
        """Compile, call, and set self.call to what is called from now on. Returns the result."""
        print(f"Compiling {self.what}: some seconds.", flush=True)
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        for again in (False, True):
            self.call = torch.compile(_copy(self.plain), **self.how)
            try:
                return self.call(*args)
            except Exception as error:
                result = self.plain(*args)  # if this raises, too, the error is not the compiler's
                reason = " ".join(str(error).split())[:200]
                if again or "InvalidCxxCompiler" in reason:
                    break
            cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the compiler's cache")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor-")
            torch.compiler.reset()
            print(
                f"That failed. Trying without its cache; if it helps, delete {cache}.", flush=True
            )
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        warnings.warn(f"Not compiled, and slower: {self.what}: {reason}", stacklevel=3)
        self.call = self.plain
        return result


def vector_bits() -> int | None:
    """Bits of the CPU's vectors that this process may use (1: no vectors), or None if not known.

    Given to the compiler, they are part of a loop's key in its cache. Without them, a process with
    shorter vectors finds a loop that was written for longer ones, which PyTorch 2.13 compiles again
    for the shorter vectors; the loop then silently leaves numbers out."""
    kinds = {"DEFAULT": 1, "AVX2": 256, "AVX512": 512}
    return kinds.get(torch.backends.cpu.get_cpu_capability())


def _copy(function: Callable) -> Callable:
    """The function with its own code object: PyTorch compiles each code object at most 8 times, and
    then silently runs it eagerly, for all that share it."""

    def copy(*args: Any) -> Any:
        return function(*args)

    code = copy.__code__.replace(co_name=f"{copy.__name__}_{next(_NUMBERS)}")
    return types.FunctionType(code, copy.__globals__, closure=copy.__closure__)


_NUMBERS = itertools.count()


# --- Scripted players -----------------------------------------------------------------------------


def towards(offset: Tensor, velocity: Tensor, reach: float | Tensor = 0.0) -> Tensor:
    """The actions (N, B) that bring agents with velocity (2, N, B) to the end of offset (2, N, B),
    braking in time; 0 (none) for agents that are within `reach` of it and will stay there."""
    drift = velocity * DT * (1 - DAMPING) / DAMPING  # how far agents coast without a force
    left = offset - drift
    x, y = left.abs()
    along_x, along_y = torch.where(left[0] > 0, 2, 1), torch.where(left[1] > 0, 4, 3)
    action = torch.where(x > y, along_x, along_y)
    there = (offset.square().sum(0).sqrt() < reach) & (left.square().sum(0).sqrt() < reach)
    return torch.where(there, 0, action)


def closest(offsets: Tensor, key: Tensor) -> Tensor:
    """(2, N, B): of each agent's K offsets (2, N, K, B) the one with the smallest key (N, K, B)."""
    index = key.argmin(1, keepdim=True)
    return torch.gather(offsets, 2, index.expand(2, *index.shape)).squeeze(2)


@torch.no_grad()
def nearest_first(world: ParticleWorld) -> Tensor:
    """Actions (B, N): each agent goes to its nearest landmark, ghosts to their nearest Pac-Man."""
    game, bodies = world.game, unpack(world.game, world.bodies)
    p, v = bodies.position, bodies.velocity
    between = bodies.landmarks[:, None] - p[:, :, None]
    radius = constant(game.landmark_radius, p.dtype, p.device)[:, None]
    edge = between.square().sum(0).sqrt() - radius
    index = edge.argmin(1)
    reach = (radius[:, 0][index] if game.sizes else 0.0 * p[0]) * 0.9
    actions = towards(closest(between, edge), v, reach)
    if game.task == "pacman":
        P = game.population[0]
        prey = p[:, None, :P] - p[:, P:, None]  # (2, G, P, B)
        far = prey.square().sum(0).masked_fill(~bodies.alive[None, :P], math.inf)
        actions[P:] = towards(closest(prey, far), v[:, P:])
    return actions.T[: world.num_worlds].contiguous()


@torch.no_grad()
def flee(world: ParticleWorld, fear: float = 0.5) -> Tensor:
    """Actions (B, N): nearest_first(), but Pac-Men run from a ghost, and agents of other tasks from
    another agent, if its centre is within `fear`."""
    game, bodies = world.game, unpack(world.game, world.bodies)
    p, v = bodies.position, bodies.velocity
    actions = nearest_first(world)
    P = game.population[0]
    them = slice(P, None) if game.task == "pacman" else slice(None)
    away = p[:, :P, None] - p[:, None, them]  # (2, P, ., B)
    far = away.square().sum(0).sqrt()
    if game.task != "pacman":
        far = far + torch.eye(P, device=p.device)[..., None] * 1e9  # not from itself
    run = towards(closest(away, far), torch.zeros_like(v[:, :P]))
    near = (far.amin(1) < fear).T[: world.num_worlds]
    actions[:, :P] = torch.where(near, run.T[: world.num_worlds], actions[:, :P])
    return actions


def places_to_go(game: Game, bodies: Bodies) -> Tensor:
    """signpost, rooms: positions (2, 3, B) of the posts or leaders; one of them pays."""
    if game.task == "signpost":
        return bodies.landmarks
    return bodies.position[:, game.population[0] :]


def go_to(world: ParticleWorld, place: Tensor) -> Tensor:
    """Actions (B, N): all agents of a world go to its place (2, B)."""
    bodies = unpack(world.game, world.bodies)
    actions = towards(place[:, None] - bodies.position, bodies.velocity)
    return actions.T[: world.num_worlds].contiguous()


@torch.no_grad()
def knows_population(world: ParticleWorld) -> Tensor:
    """signpost, rooms: actions (B, N) to the post or leader that pays."""
    places = places_to_go(world.game, unpack(world.game, world.bodies))
    return go_to(world, places[:, wanted(world.game)])


@torch.no_grad()
def wrong_population(world: ParticleWorld) -> Tensor:
    """signpost, rooms: actions (B, N) to the post or leader that pays in another population."""
    places = places_to_go(world.game, unpack(world.game, world.bodies))
    return go_to(world, places[:, (wanted(world.game) + 1) % 3])


@torch.no_grad()
def blind(world: ParticleWorld) -> Tensor:
    """signpost, rooms: actions (B, N) to the point with the least sum of distances to the three
    places, by Weiszfeld's iterations: the best without knowing the population."""
    places = places_to_go(world.game, unpack(world.game, world.bodies))
    point = places.mean(1)
    for _ in range(50):
        x, y = places - point[:, None]
        weight = 1 / (x * x + y * y).sqrt().clamp_min(1e-6)  # (3, B)
        point = (weight * places).sum(1) / weight.sum(0)
    return go_to(world, point)


@torch.no_grad()
def deliver(world: ParticleWorld, fear: float = 0.0) -> Tensor:
    """delivery: actions (B, N). A collector goes to its nearest treasure or, if it carries one, to
    its deposit, but away from another collector within `fear`. A deposit goes to the nearest
    collector that brings it something, else to the mean of the nearest 7."""
    game, bodies = world.game, unpack(world.game, world.bodies)
    p, v, C = bodies.position, bodies.velocity, game.population[0]
    brings = bodies.carried[:, None] == kind_numbers(game, bodies)  # (C, K, B)
    to_treasures = bodies.landmarks[:, None] - p[:, :C, None]  # (2, C, L, B)
    to_deposits = p[:, None, C:] - p[:, :C, None]  # (2, C, K, B)
    treasure = closest(to_treasures, to_treasures.square().sum(0))
    far = to_deposits.square().sum(0).sqrt()
    own_far = far.masked_fill(~brings, math.inf)
    deposit = closest(to_deposits, own_far)
    collectors = towards(torch.where(bodies.carried == 0, treasure, deposit), v[:, :C])
    away = p[:, :C, None] - p[:, None, :C]  # (2, C, C, B)
    apart = away.square().sum(0).sqrt() + torch.eye(C, device=p.device)[..., None] * 1e9
    run = towards(closest(away, apart), torch.zeros_like(v[:, :C]))
    collectors = torch.where(apart.amin(1) < fear, run, collectors)
    bringer = closest(-to_deposits.transpose(1, 2), own_far.transpose(0, 1))
    middle = nearest_collectors(game, bodies, far)
    deposits = towards(torch.where(brings.any(0), bringer, middle), v[:, C:])
    return torch.cat((collectors, deposits)).T[: world.num_worlds].contiguous()


# --- Pictures -------------------------------------------------------------------------------------

WINDOW = 1.5  # pictures always show [-WINDOW, WINDOW]^2
COLOURS = ((31, 119, 180), (214, 39, 40))  # RGB of types; in delivery of kinds
OF_THREE = ((214, 39, 40), (44, 160, 44), (150, 75, 200))  # posts or leaders: red, green, violet
YELLOW, BROWN, GROUND, LINE = (250, 215, 120), (190, 140, 30), (255, 255, 255), (205, 205, 205)
GREY, BLACK = (150, 150, 150), (0, 0, 0)


def landmark_colours(game: Game, bodies: Bodies) -> list[tuple[int, ...]]:
    """RGB of each landmark of one world; in delivery the colour of its kind."""
    if game.carrying:
        return [COLOURS[int(kind) - 1] for kind in bodies.kinds[:, 0]]
    return [YELLOW] * game.num_landmarks


def agent_colours(game: Game, bodies: Bodies) -> list[tuple[tuple[int, ...], ...]]:
    """(RGB, RGB of the rim) of each agent of one world: by type. In delivery collectors have a grey
    rim and the colour of what they carry (or grey), deposits a black rim and their kind's."""
    if game.carrying:
        collectors = [((GREY, *COLOURS)[int(kind)], GREY) for kind in bodies.carried[:, 0]]
        return collectors + [(colour, BLACK) for colour in COLOURS]
    return [(COLOURS[kind % len(COLOURS)],) * 2 for kind in game.types]


def draw(game: Game, state: np.ndarray, size: int = 480) -> np.ndarray:
    """A picture (size, size, 3) uint8 of a state (S,): landmarks yellow, agents blue, ghosts red,
    dead agents as rings; posts and leaders red, green and violet, the one that pays with a black
    rim; in delivery treasures, their carriers and deposits in the colour of the kind. The square
    where things appear is outlined. Bodies outside the window are half-discs at its edge."""
    from PIL import Image, ImageDraw

    fine = 2 * size  # drawn at twice the size, for smooth edges
    image = Image.new("RGB", (fine, fine), GROUND)
    brush = ImageDraw.Draw(image)

    def box(x: float, y: float, radius: float) -> list[float]:
        x, y = (min(max(value, -WINDOW), WINDOW) for value in (x, y))
        corners = (x - radius, -y - radius, x + radius, -y + radius)
        return [(value + WINDOW) / (2 * WINDOW) * fine for value in corners]

    bodies = unpack(game, torch.as_tensor(state, dtype=torch.float64)[:, None])
    brush.rectangle(box(0, 0, 1), outline=LINE, width=3)
    places, colours = bodies.landmarks[..., 0].T.tolist(), landmark_colours(game, bodies)
    landmarks = zip(game.landmark_radius, places, colours)
    for radius, (x, y), colour in sorted(landmarks, reverse=True):  # small ones on top
        if x != AWAY:
            brush.ellipse(box(x, y, radius), fill=colour, outline=BROWN, width=2)
    if game.task in ("signpost", "rooms"):
        radius = (*game.landmark_radius, game.radius[-1])[0]
        for k, (x, y) in enumerate(places_to_go(game, bodies)[..., 0].T.tolist()):
            rim = BLACK if k == wanted(game) else OF_THREE[k]
            brush.ellipse(box(x, y, radius), fill=OF_THREE[k], outline=rim, width=6)
    places, colours = bodies.position[..., 0].T.tolist(), agent_colours(game, bodies)
    for kind, alive, (x, y), (colour, rim) in zip(game.types, bodies.alive[:, 0], places, colours):
        if game.task == "rooms" and kind == 1:
            continue  # leaders are already drawn as places
        place = box(x, y, game.radius[kind])
        brush.ellipse(place, fill=colour if alive else None, outline=rim, width=3)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
