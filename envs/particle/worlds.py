"""Particle worlds of MRA (TMLR) and MAAC, any number of agents, batched on the device.

    treasure    N agents collect 20 treasures, which reappear elsewhere when touched
    resource    N agents share 6 resources of different size
    pacman      P Pac-Men eat 20 dots, G ghosts eat Pac-Men; a touched Pac-Man is dead
    signpost    N agents go to one of three posts: N decides to which, and nobody says so
    rooms       F followers go to one of three leaders: F decides to which
    delivery    C collectors bring treasures of two kinds to the deposit of each, as in MAAC's code

    world = ParticleWorld("treasure", 6, num_worlds=64, device="cpu", seed=1)
    obs = world.reset()              # obs.own (B, N, Ds), obs.entities() (B, N, N, De), obs.mask()
    step = world.step(actions)       # actions (B, N): 0 none, 1 left, 2 right, 3 down, 4 up

Worlds that end begin anew by themselves; step.final then has the observation at the end. What a
world is at a moment is one row of world.state, (S,) floats, from which observe() makes observations
again: a replay keeps states. Each world has its own stream of random numbers, so the same seed
gives a world the same rollout whatever their number.

Physics as in OpenAI's multi-agent particle environment (mpe2 is its maintained version), numbers of
the tasks as decided in docs/particle.md, where the paper leaves most of them open.

Inside, worlds are the last axis: (..., N, B). Every operation then runs over neighbouring worlds,
whatever N is, and one compiled kernel does physics, reward and observation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
import os
import tempfile
import types
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from envs.particle import kernels

ACTIONS = ("none", "left", "right", "down", "up")  # PettingZoo's order
DT, DAMPING, CONTACT_FORCE, CONTACT_MARGIN = 0.1, 0.25, 100.0, 1e-3
HORIZON = 20  # steps of an episode
LONGEST = 2**20  # more steps than an episode can have
LANES = 32  # numbers of worlds are padded to multiples: the same bits for each, however many
VISIBLE = 7  # delivery: treasures that one sees at most, and collectors that a deposit looks at
AWAY = -999.0  # delivery: where a treasure is that has just been taken, x and y
Integration = Literal["velocity-first", "mpe2"]


@dataclasses.dataclass(frozen=True)
class Game:
    """A task at one population: everything that does not change while it is played."""

    task: str
    population: tuple[int, ...]  # agents of each type
    radius: tuple[float, ...]  # of each type
    force: tuple[float, ...]  # of an action, per type
    top_speed: tuple[float, ...]  # per type; inf: none
    landmark_radius: tuple[float, ...]  # of each landmark
    nearest: int  # landmarks that an agent sees, or is seen with
    sizes: bool = False  # whether it sees their sizes, too
    in_order: bool = False  # whether it sees them in their own order, not the nearest first
    coloured: bool = False  # whether agents of the last type are told apart, by a colour each
    contact: bool = True  # whether agents push each other
    mass: tuple[float, ...] = ()  # of each type, which counts in pushes only; empty: 1
    only_last_seen: bool = False  # whether others see agents of the last type alone
    walls: bool = False  # whether positions stay in [-1, 1]^2
    mortal: bool = False  # whether agents may die
    carrying: bool = False  # whether the first type brings landmarks to the last, a kind for each
    shaping: bool = True  # treasure, pacman, delivery: -.1 x distance to what one wants
    collision_penalty: float = 0.0  # treasure: per agent touched
    integration: Integration = "velocity-first"

    def __post_init__(self) -> None:
        """ValueError for options that cannot be meant."""
        kinds, landmarks = get_args(Integration), self.num_landmarks
        if self.integration not in kinds:
            raise ValueError(f"integration is {' or '.join(kinds)}, not {self.integration!r}.")
        fewest, most = min(1, landmarks), VISIBLE if self.carrying else landmarks
        if not fewest <= self.nearest <= most:
            raise ValueError(f"nearest is from {fewest} to {most}, not {self.nearest}.")
        if not 0 <= self.collision_penalty < math.inf:
            raise ValueError(f"collision_penalty is not negative: not {self.collision_penalty}.")
        if self.carrying and self.collision_penalty:
            raise ValueError(f"{self.task} has its own collision_penalty, 5: it takes no other.")

    @property
    def num_agents(self) -> int:
        return sum(self.population)

    @property
    def num_landmarks(self) -> int:
        return len(self.landmark_radius)

    @property
    def types(self) -> tuple[int, ...]:
        """(N,): the type of each agent; types come one after another."""
        return tuple(kind for kind, n in enumerate(self.population) for _ in range(n))

    @property
    def num_kinds(self) -> int:
        """K: kinds of landmarks, where agents carry them."""
        return self.population[-1] if self.carrying else 0

    @property
    def landmark_features(self) -> int:
        """Numbers by which the landmarks of an agent are described."""
        return self.nearest * (3 if self.sizes else 2 + self.num_kinds)

    @property
    def own_features(self) -> int:
        """Ds: velocity, position, what one takes in and carries, landmarks."""
        return 4 + 2 * self.num_kinds + self.landmark_features

    @property
    def entity_features(self) -> int:
        """De: relative position, velocity, one number per type if there are several, one per
        colour, landmarks; where agents carry them, instead of all these what one takes in and
        carries."""
        if self.carrying:
            return 4 + 2 * self.num_kinds
        types = len(self.population) if len(self.population) > 1 else 0
        colours = self.population[-1] if self.coloured else 0
        return 4 + types + colours + self.landmark_features

    @property
    def state_size(self) -> int:
        """S: positions, velocities, who lives, landmarks; what is carried, kinds of landmarks."""
        own = self.population[0] + self.num_landmarks if self.carrying else 0
        return 5 * self.num_agents + 2 * self.num_landmarks + own


def make_game(task: str, population: int | tuple[int, ...], **options: Any) -> Game:
    """A task of TASKS at a population; options are fields of Game (shaping, collision_penalty,
    nearest, integration). ValueError, one sentence, for what does not exist."""
    one = isinstance(population, numbers.Integral)
    population = (int(population),) if one else tuple(map(int, population))
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}: there are {', '.join(TASKS)}.")
    roles = TASKS[task].roles
    if len(population) != len(roles):
        wanted = f"{len(roles)} numbers ({', '.join(roles)})" if len(roles) > 1 else "one number"
        raise ValueError(f"A population of {task} is {wanted}: {_name(population)} is not.")
    if min(population) < 1:
        few = _name(population)
        raise ValueError(f"A population has at least one agent of each type: not {few}.")
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
    """Everything that moves or may be touched, of B worlds."""

    position: Tensor  # (2, N, B)
    velocity: Tensor  # (2, N, B)
    alive: Tensor  # (N, B) bool
    landmarks: Tensor  # (2, L, B)
    carried: Tensor | None = None  # (C, B): what each of the first type carries: 0 nothing, 1 ... K
    kinds: Tensor | None = None  # (L, B): of landmarks, 1 ... K


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
    """A tensor of these numbers, made once for each device, as whoever makes one there waits for
    it. Do not write into it."""
    if torch.compiler.is_compiling():  # becomes a part of the code
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


@functools.cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


# --- Physics --------------------------------------------------------------------------------------


def per_agent(game: Game, values: tuple[float, ...], like: Tensor) -> Tensor:
    """(N, 1): the number of each agent's type."""
    numbers = tuple(values[kind] for kind in game.types)
    return constant(numbers, like.dtype, like.device)[:, None]


def pushes(game: Game, bodies: Bodies) -> tuple[Tensor, Tensor, Tensor]:
    """d = p_i - p_j, x and y apart, (N, N, B) each, and what to multiply it by for the force of j
    on i: f = 100 (d / |d|) k log(1 + exp(-(|d| - r_i - r_j) / k)).

    Two bodies at the same point push nowhere (the original divides by zero there), the dead do not
    push. f_ij = -f_ji to the bit.
    """
    x, y = (p[:, None] - p for p in bodies.position)
    distance = (x * x + y * y).sqrt()
    radius = per_agent(game, game.radius, distance)
    touching = radius[:, None] + radius[None]  # (N, N, 1)
    overlap = (touching - distance) / CONTACT_MARGIN
    # log(1 + exp(x)) without overflow, nor numbers so small that processors take long over them.
    depth = overlap.clamp_min(0) + torch.log(1 + torch.exp(-overlap.abs().clamp_max(80.0)))
    push = CONTACT_FORCE * CONTACT_MARGIN * depth / distance.clamp_min(1e-30)
    if game.mortal:
        push = push * (bodies.alive[:, None] & bodies.alive)
    return x, y, push


def move(game: Game, bodies: Bodies, actions: Tensor) -> Bodies:
    """One step of physics; actions (N, B) ints."""
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
    moved = v * (1 - DAMPING) + force * DT  # a force is meant per mass
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
    """What a step's new positions lead to."""

    reward: Tensor  # (N, B)
    alive: Tensor  # (N, B) bool, from now on
    taken: Tensor  # (L, B) bool: landmarks that reappear elsewhere


def landmark_distances(game: Game, bodies: Bodies) -> Tensor:
    """(N, L, B) between centres."""
    x, y = (l - p[:, None] for l, p in zip(bodies.landmarks, bodies.position))
    return (x * x + y * y).sqrt()


def agent_distances(bodies: Bodies) -> Tensor:
    """(N, N, B) between centres."""
    x, y = (p[:, None] - p for p in bodies.position)
    return (x * x + y * y).sqrt()


def treasure_outcome(game: Game, bodies: Bodies) -> Outcome:
    """+5 for each treasure that one touches, whoever else does; -.1 x distance to the nearest."""
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
    """The resources that one touches, 10 x radius each, divided by the number of agents on it."""
    distance = landmark_distances(game, bodies)
    radius = constant(game.landmark_radius, distance.dtype, distance.device)
    touched = distance < (radius + game.radius[0])[:, None]
    share = 10.0 * radius[:, None] / touched.sum(0).clamp_min(1)  # (L, B)
    reward = (touched * share).sum(1)
    return Outcome(reward, bodies.alive, torch.zeros_like(touched[0]))


def pacman_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Dot +2 for a Pac-Man, who dies when touched: -5 for it and +5 for the ghost, per ghost that
    touches it. Those who lived when the step began count, also in the distances of shaping."""
    P = game.population[0]
    living = bodies.alive[:P]  # (P, B); ghosts live for ever
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
    """signpost, rooms: the number of the post or leader that pays, by how many agents there are."""
    return sum(game.population[0] > bound for bound in (3, 6))


def signpost_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Minus the distance to the post that pays in this population."""
    distance = landmark_distances(game, bodies)  # (N, L, B)
    nothing = torch.zeros_like(distance[0], dtype=torch.bool)
    return Outcome(-distance[:, wanted(game)], bodies.alive, nothing)


def rooms_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Followers: minus the distance to the leader that pays in this population; leaders nothing."""
    F = game.population[0]
    to_leader = agent_distances(bodies)[:, F + wanted(game)]  # (N, B)
    is_follower = torch.arange(game.num_agents, device=to_leader.device)[:, None] < F
    nothing = torch.zeros_like(landmark_distances(game, bodies)[0], dtype=torch.bool)
    return Outcome(-to_leader * is_follower, bodies.alive, nothing)


def delivery_outcome(game: Game, bodies: Bodies) -> Outcome:
    """Everybody: 5 for each treasure that a collector with nothing touches, and for each collector
    that touches the deposit of what it carries. Collectors: -5 for each collector that one touches;
    -.1 x distance to the nearest treasure or, laden, to its deposit. Deposits: -.1 x distance to
    the nearest collector that brings something or, if none does, to the mean of the nearest 7."""
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
    nothing = torch.zeros_like(to_treasures[0], dtype=torch.bool)  # hand_over() moves them
    return Outcome(torch.cat((collectors, deposits)), bodies.alive, nothing)


def nearest_collectors(game: Game, bodies: Bodies, to_deposits: Tensor) -> Tensor:
    """(2, K, B): the mean of the 7 collectors nearest to each deposit, relative to it; of all, if
    there are fewer. to_deposits: distances (C, K, B)."""
    C = game.population[0]
    offset = bodies.position[:, None, :C] - bodies.position[:, C:, None]  # (2, K, C, B)
    if C > VISIBLE:
        offset = torch.stack(nearest(to_deposits.transpose(0, 1), [*offset], VISIBLE))
    return offset.mean(2)


def kind_numbers(game: Game, bodies: Bodies) -> Tensor:
    """(K, 1): 1 ... K."""
    numbers = torch.arange(1, game.num_kinds + 1, device=bodies.kinds.device)
    return numbers[:, None].to(bodies.kinds.dtype)


# --- Observations ---------------------------------------------------------------------------------


class Observation(NamedTuple):
    """What everybody sees. Agent i sees own[i], and of each other agent j entities[i, j]; in
    delivery other numbers than these: delivery_observation().

    In memory worlds lie next to each other: use reshape(), not view(). Do not write into it.
    """

    own: Tensor  # (B, N, Ds) v_i, p_i, its landmarks relative to it
    others: Tensor  # (B, N, De) p_j, v_j, type of j if there are several, its colour, j's landmarks
    alive: Tensor  # (B, N) bool
    seen: Tensor  # (B, N) bool, who lives and is seen by others

    def entities(self) -> Tensor:
        """(B, N, N, De): of i and j, as others[j], but with p_j - p_i."""
        N = self.own.shape[1]
        seen = self.others[:, None].expand(-1, N, -1, -1).clone()
        seen[..., :2] -= self.others[:, :, None, :2]
        return seen

    def mask(self) -> Tensor:
        """(B, N, N) bool: j is seen, and is not i."""
        itself = torch.eye(self.own.shape[1], dtype=torch.bool, device=self.own.device)
        return self.seen[:, None] & ~itself


def nearest(key: Tensor, values: list[Tensor], k: int) -> list[Tensor]:
    """The k smallest of key (N, L, B), in order, and the values that go with them: (N, k, B) each.

    Compiled, an item's place is the number of smaller ones, and each place adds up what is on it:
    L^2 comparisons, but all in one loop over worlds. Eager code sorts.
    """
    if not torch.compiler.is_compiling():
        order = key.topk(k, dim=1, largest=False).indices
        return [torch.gather(x.expand_as(key), 1, order) for x in values]
    number = torch.arange(key.shape[1], device=key.device)
    earlier = (number[:, None] > number)[..., None]  # of two alike the first comes first
    mine, other = key[:, :, None], key[:, None]
    smaller = (other < mine) | ((other == mine) & earlier)  # (N, L, L, B)
    place = torch.where(smaller, 1.0, 0.0).sum(2)  # (N, L, B)
    chosen = place[:, None] == torch.arange(k, device=key.device)[:, None, None]  # (N, k, L, B)
    return [torch.where(chosen, x.expand_as(key)[:, None], 0.0).sum(2) for x in values]


def observation(game: Game, bodies: Bodies) -> Observation:
    """What everybody sees."""
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
    """What observation() gives of states (K, S), bit for bit, in one loop on a CPU."""
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
    """(N,) bool: whom others see while they live."""
    unseen = game.num_agents - game.population[-1] if game.only_last_seen else 0
    return torch.arange(game.num_agents, device=like.device) >= unseen


def labels_of(game: Game, like: Tensor) -> list[Tensor]:
    """What never changes of each agent, (1, N, 1) each: its type, if there are several, and its
    colour, one-hot."""
    N = game.num_agents
    of_types = len(game.population) if len(game.population) > 1 else 0
    labels = [tuple(float(kind == own) for own in game.types) for kind in range(of_types)]
    colours = range(N - game.population[-1], N) if game.coloured else ()
    labels += [tuple(float(i == agent) for i in range(N)) for agent in colours]
    return [constant(label, like.dtype, like.device)[None, :, None] for label in labels]


def delivery_observation(game: Game, bodies: Bodies) -> Observation:
    """own: v_i, p_i, what i takes in, what it carries (one-hot of K kinds each), and the nearest
    treasures, relative to it, each with its kind, one-hot; 0 where there are fewer. others: p_j,
    v_j, what j takes in, what it carries."""
    p, v = bodies.position, bodies.velocity
    (C, K), N, L = game.population, game.num_agents, game.num_landmarks
    number, kind = torch.arange(N, device=p.device)[:, None], kind_numbers(game, bodies)[:, None]
    takes = (number - C + 1 == kind).expand(-1, -1, p.shape[2])  # (K, N, B), of deposits
    carries = torch.nn.functional.pad(bodies.carried, (0, 0, 0, K)) == kind  # of collectors
    between = bodies.landmarks[:, None] - p[:, :, None]  # (2, N, L, B)
    far = between.square().sum(0).sqrt()
    order = torch.arange(L, device=p.device)[:, None] * (bodies.landmarks[0] == AWAY)
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

    outcome and observe must not return views of the bodies; others[..., :2] of an observation are
    positions. An episode terminates when nobody of the first type lives.
    """

    roles: tuple[str, ...]  # names of the types of agents
    fixed: Callable[[int], dict[str, Any]]  # fields of Game, for N agents
    outcome: Callable[[Game, Bodies], Outcome]
    observe: Callable[[Game, Bodies], Observation] = observation
    place: Callable[[Tensor], Tensor] = lambda places: places  # landmarks (2, L, B) from [-1, 1)^2
    num_last: int = 0  # agents of the last type; 0: any number


def _bodies(radius: float, force: float, landmarks: tuple[float, ...], nearest: int) -> dict:
    """Agents of one type, without top speed."""
    own = dict(radius=(radius,), force=(force,), top_speed=(math.inf,))
    return own | dict(landmark_radius=landmarks, nearest=nearest)


def triangle(places: Tensor) -> Tensor:
    """Three posts (2, 3, B) at the corners of an equilateral triangle, from numbers in [-1, 1) of
    the same shape: sides from 1.2 to 1.5, turned and mirrored anyhow, its centre near 0."""
    centre = 0.13 * places[:, 0]  # (2, B)
    radius = 0.7 + 0.085 * (1 + places[0, 1])
    angle = math.pi * places[1, 1]
    turn = torch.where(places[0, 2] < 0, -1.0, 1.0) * (2 * math.pi / 3)
    corners = [angle + k * turn for k in range(3)]
    x = torch.stack([radius * corner.cos() for corner in corners])
    y = torch.stack([radius * corner.sin() for corner in corners])
    return torch.stack((x, y)) + centre[:, None]


TASKS = {
    "treasure": Task(("agent",), lambda N: _bodies(0.05, 5.0, (0.025,) * 20, 5), treasure_outcome),
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
            top_speed=(math.inf, 0.0),  # leaders stay where they are
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
            landmark_radius=(0.025,) * (N - 2),  # a treasure per collector
            nearest=VISIBLE,
            carrying=True,
        ),
        delivery_outcome,
        delivery_observation,
        place=lambda places: 0.95 * places,
        num_last=2,
    ),
}


# --- Random numbers -------------------------------------------------------------------------------


class Clocks(NamedTuple):
    """What a world's random numbers and the end of its episode depend on; (B,) int64 each."""

    key: Tensor  # its stream
    episode: Tensor  # episodes begun
    time: Tensor  # steps in the episode


GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's output function: int64 -> int64. Products wrap around, as they should."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # shifts in zeros
    return x


def uniform(clocks: Clocks, slots: range, per_step: int, dtype: torch.dtype) -> Tensor:
    """(len(slots), B) in [-1, 1): number `slots` of the per_step that each world has in a step of
    an episode. What an episode begins with depends on nothing that was done before."""
    slot = torch.arange(slots.start, slots.stop, device=clocks.key.device)[:, None]
    step = clocks.episode * LONGEST + clocks.time
    bits = mixed(clocks.key + GOLDEN * (step * per_step + slot))
    return ((bits >> 40) & 0xFFFFFF).to(dtype) * (2.0 / 2**24) - 1.0


def fresh(game: Game, clocks: Clocks, dtype: torch.dtype) -> Bodies:
    """Everything anywhere in the square, at rest."""
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
    """1 ... K, of numbers in [-1, 1)."""
    return 1 + ((draws + 1) * (game.num_kinds / 2)).floor()


def hand_over(game: Game, bodies: Bodies, clocks: Clocks) -> Bodies:
    """delivery: what follows, when a step begins, from where the last one has led. Who has nothing
    takes a treasure that it touches (treasures in order, each by the first collector), who touches
    the deposit of what it carries has nothing, and treasures taken a step ago reappear."""
    C, N, L = game.population[0], game.num_agents, game.num_landmarks
    touched = landmark_distances(game, bodies)[:C] < game.radius[0] + game.landmark_radius[0]
    touched = touched & (clocks.time > 1)  # (C, L, B); before the first step nothing is taken
    number = torch.arange(C, device=touched.device)[:, None]
    carried, takers = bodies.carried, []
    for k in range(L):
        may = touched[:, k] & (carried == 0)
        takers.append(torch.where(may, number, C).amin(0))  # (B,), C: nobody
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
    """One step of all worlds, states (S, B) and actions (B, N) -> the states after it, clocks, and
    Step's fields without a new episode: reward, terminated, truncated, alive, observation, rows."""
    clocks = clocks._replace(time=clocks.time + 1)
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
    """New episodes in the worlds that have ended (B,): states, clocks, observation. Nothing of the
    others changes, not even by a bit."""
    episode, time = clocks.episode + ended, torch.where(ended, 0, clocks.time)
    clocks = Clocks(clocks.key, episode, time)
    bodies = fresh(game, clocks, state.dtype)
    state = torch.where(ended, pack(bodies), state)
    new = TASKS[game.task].observe(game, bodies)
    here = [ended.view(-1, *[1] * (x.dim() - 1)) for x in new]
    return state, clocks, Observation(*map(torch.where, here, new, obs))


# --- The world ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What step() returns."""

    obs: Observation  # to act on next: of the new episode where one has ended
    reward: Tensor  # (B, N)
    terminated: Tensor  # (B,) bool: no Pac-Man lives
    truncated: Tensor  # (B,) bool: the horizon is reached
    alive: Tensor  # (B, N) bool, after the step, before a new episode
    final: Observation  # at the end of the step, before a new episode
    final_state: Tensor  # (B, S) the same


class ParticleWorld:
    """num_worlds worlds of one task and population, on one device.

    task            one of TASKS
    population      agents; for pacman (Pac-Men, ghosts), for rooms (followers, 3), for delivery
                    (collectors, 2)
    compiled        torch.compile() of the step; without a compiler the same functions run eagerly
    first_world     number of the first world: worlds with the same seed and number are the same
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
        self.num_worlds, self.horizon = num_worlds, horizon
        self.device, self.dtype = torch.device(device), dtype
        padded = -(-num_worlds // LANES) * LANES
        number = torch.arange(first_world, first_world + padded, device=self.device)
        self.numbers = number
        self.bodies = torch.zeros(self.game.state_size, padded, dtype=dtype, device=self.device)
        # (B, N) of the last step, which reset() leaves as it is: for players with a memory
        self.last_reward = self.bodies.new_zeros(num_worlds, self.num_agents)
        self.seed(seed)
        what = f"the world ({self.game.task}, {_name(self.game.population)})"
        self._advance = functools.partial(advance, self.game, horizon)
        if compiled:
            # Inductor unrolls sums over fewer than 8: in observation() over the landmarks, each of
            # which would then be worked out anew in every place.
            few = self.game.num_landmarks < 8 and TASKS[task].observe is observation
            options = {"unroll_reductions_threshold": 1} if few else {}
            self._advance = Compiled(self._advance, what, options=options)

    @property
    def num_agents(self) -> int:
        return self.game.num_agents

    @property
    def state(self) -> Tensor:
        """(B, S) what the worlds are at this moment; a copy."""
        return self.bodies[:, : self.num_worlds].T.contiguous()

    def seed(self, seed: int) -> None:
        """Begin the worlds' streams of random numbers, far from each other; reset() comes next."""
        key = mixed(mixed(torch.full_like(self.numbers, seed)) + GOLDEN * (self.numbers + 1))
        self.clocks = Clocks(key, torch.zeros_like(key), torch.zeros_like(key))
        self.seen: Observation | None = None

    @property
    def obs(self) -> Observation:
        """What reset() or step() returned last."""
        if self.seen is None:
            raise RuntimeError("A world begins with reset().")
        return self._cut(self.seen)

    @torch.no_grad()
    def reset(self) -> Observation:
        """New episodes in all worlds."""
        empty = TASKS[self.game.task].observe(self.game, unpack(self.game, self.bodies))
        everywhere = torch.ones_like(self.clocks.key, dtype=torch.bool)
        all_of_them = self.game, self.bodies, self.clocks, everywhere, empty
        self.bodies, self.clocks, self.seen = restart(*all_of_them)
        return self.obs

    @torch.no_grad()
    def step(self, actions: Tensor) -> Step:
        """Advance all worlds by actions (B, N), ints in [0, 5)."""
        B, padded = self.num_worlds, self.bodies.shape[1]
        if actions.shape != (B, self.num_agents) or self.seen is None:
            have = tuple(actions.shape)
            raise ValueError(f"After reset(), actions are {(B, self.num_agents)}, not {have}.")
        actions = actions.to(torch.int64)
        if padded > B:
            actions = torch.nn.functional.pad(actions, (0, 0, 0, padded - B))
        done = self._advance(self.bodies, actions, self.clocks)
        self.bodies, self.clocks, reward, over, late, alive, final, last = done
        obs, ended = final, over | late
        # On a GPU asking whether any has ended would wait for it; there it is always worked out.
        if self.device.type != "cpu" or ended[:B].any():
            self.bodies, self.clocks, obs = restart(
                self.game, self.bodies, self.clocks, ended, final
            )
        self.seen = obs
        results = reward, over, late, alive
        results = results if padded == B else [x[:B] for x in results]
        self.last_reward = results[0]
        return Step(self._cut(obs), *results, self._cut(final), last[:B])

    @torch.no_grad()
    def observe(self, states: Tensor) -> Observation:
        """The observations in states (K, S), as the worlds would have given them."""
        on_cpu = states.device.type == "cpu"
        if on_cpu and TASKS[self.game.task].observe is observation:
            return observation_of_rows(self.game, states)
        return TASKS[self.game.task].observe(self.game, unpack(self.game, states.T.contiguous()))

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, the last observation included."""
        own = {name: x[..., : self.num_worlds].clone() for name, x in self._arrays().items()}
        own |= {name: x.contiguous() for name, x in self.obs._asdict().items()}
        return own | {"game": f"{self.game.task} {_name(self.game.population)}"}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where state_dict() was taken; ValueError if that was of other worlds."""
        self.reset()
        mine, own = self.state_dict(), self._arrays()
        shapes = [
            {k: x if isinstance(x, str) else (x.shape, x.dtype) for k, x in one.items()}
            for one in (saved, mine)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"This state is not of {self.num_worlds} worlds of {mine['game']}.")
        for name, x in own.items():
            x[..., : self.num_worlds] = saved[name]
        self.bodies, self.clocks = own.pop("bodies"), Clocks(**own)
        for name, x in self.seen._asdict().items():
            x[: self.num_worlds] = saved[name]

    def _arrays(self) -> dict[str, Tensor]:
        """Worlds last."""
        own = {"bodies": self.bodies, **self.clocks._asdict()}
        return {name: x.clone() for name, x in own.items()}

    def _cut(self, obs: Observation) -> Observation:
        """Without the worlds that fill up the lanes."""
        if self.num_worlds == self.bodies.shape[1]:
            return obs
        return Observation(*(x[: self.num_worlds] for x in obs))


class Compiled:
    """torch.compile(function); where that fails, the function itself. dynamic: one form for tensors
    of all sizes, instead of one per size.

    A process that is killed while it compiles leaves half a library in the compiler's cache, which
    fails all who come after it: so a failure is tried again with a new cache.
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
        """Compile, and decide what is called from now on."""
        print(f"Compiling {self.what}: some seconds.", flush=True)
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        for again in (False, True):
            self.call = torch.compile(_copy(self.plain), **self.how)
            try:
                return self.call(*args)
            except Exception as error:
                result = self.plain(*args)  # if this fails, too, it is not the compiler's fault
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
    """Bits of the vectors this process may use (1: none), None where the compiler must know.

    Named to the compiler, they are part of the name under which its cache keeps a loop. Left out, a
    loop written for longer vectors is found by a process that has shorter ones, and in PyTorch 2.13
    is compiled again for those and leaves numbers out, without an error."""
    kinds = {"DEFAULT": 1, "AVX2": 256, "AVX512": 512}
    return kinds.get(torch.backends.cpu.get_cpu_capability())


def _copy(function: Callable) -> Callable:
    """The function with a code object of its own: PyTorch gives each code object 8 compiled forms
    and after those quietly runs it eagerly, for all who use it."""

    def copy(*args: Any) -> Any:
        return function(*args)

    code = copy.__code__.replace(co_name=f"{copy.__name__}_{next(_NUMBERS)}")
    return types.FunctionType(code, copy.__globals__, closure=copy.__closure__)


_NUMBERS = itertools.count()


# --- Scripted players -----------------------------------------------------------------------------


def towards(offset: Tensor, velocity: Tensor, reach: float | Tensor = 0.0) -> Tensor:
    """The action (N, B) that brings an agent to where offset (2, N, B) points, braking in time;
    nothing within reach."""
    drift = velocity * DT * (1 - DAMPING) / DAMPING  # how far it still goes by itself
    left = offset - drift
    x, y = left.abs()
    along_x, along_y = torch.where(left[0] > 0, 2, 1), torch.where(left[1] > 0, 4, 3)
    action = torch.where(x > y, along_x, along_y)
    there = (offset.square().sum(0).sqrt() < reach) & (left.square().sum(0).sqrt() < reach)
    return torch.where(there, 0, action)


def closest(offsets: Tensor, key: Tensor) -> Tensor:
    """Of offsets (2, N, K, B) those with the smallest key (N, K, B): (2, N, B)."""
    index = key.argmin(1, keepdim=True)
    return torch.gather(offsets, 2, index.expand(2, *index.shape)).squeeze(2)


@torch.no_grad()
def nearest_first(world: ParticleWorld) -> Tensor:
    """(B, N) actions: everyone to its nearest landmark, ghosts to their nearest Pac-Man."""
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
    """(B, N) actions: as nearest_first, but Pac-Men run from a ghost that is within `fear`, agents
    of the other tasks from another agent."""
    game, bodies = world.game, unpack(world.game, world.bodies)
    p, v = bodies.position, bodies.velocity
    actions = nearest_first(world)
    P = game.population[0]
    them = slice(P, None) if game.task == "pacman" else slice(None)
    away = p[:, :P, None] - p[:, None, them]  # (2, P, ., B)
    far = away.square().sum(0).sqrt()
    if game.task != "pacman":
        far = far + torch.eye(P, device=p.device)[..., None] * 1e9
    run = towards(closest(away, far), torch.zeros_like(v[:, :P]))
    near = (far.amin(1) < fear).T[: world.num_worlds]
    actions[:, :P] = torch.where(near, run.T[: world.num_worlds], actions[:, :P])
    return actions


def places_to_go(game: Game, bodies: Bodies) -> Tensor:
    """signpost, rooms: the posts or leaders (2, 3, B), of which one pays."""
    if game.task == "signpost":
        return bodies.landmarks
    return bodies.position[:, game.population[0] :]


def go_to(world: ParticleWorld, place: Tensor) -> Tensor:
    """(B, N) actions: everyone to its place (2, B)."""
    bodies = unpack(world.game, world.bodies)
    actions = towards(place[:, None] - bodies.position, bodies.velocity)
    return actions.T[: world.num_worlds].contiguous()


@torch.no_grad()
def knows_population(world: ParticleWorld) -> Tensor:
    """(B, N) actions: signpost, rooms: to the post or leader that pays."""
    places = places_to_go(world.game, unpack(world.game, world.bodies))
    return go_to(world, places[:, wanted(world.game)])


@torch.no_grad()
def wrong_population(world: ParticleWorld) -> Tensor:
    """(B, N) actions: signpost, rooms: to the post or leader of another population."""
    places = places_to_go(world.game, unpack(world.game, world.bodies))
    return go_to(world, places[:, (wanted(world.game) + 1) % 3])


@torch.no_grad()
def blind(world: ParticleWorld) -> Tensor:
    """(B, N) actions: signpost, rooms: to the point with the least sum of distances to the three,
    which is best for who does not know the population (Weiszfeld's iterations)."""
    places = places_to_go(world.game, unpack(world.game, world.bodies))
    point = places.mean(1)
    for _ in range(50):
        x, y = places - point[:, None]
        weight = 1 / (x * x + y * y).sqrt().clamp_min(1e-6)  # (3, B)
        point = (weight * places).sum(1) / weight.sum(0)
    return go_to(world, point)


@torch.no_grad()
def deliver(world: ParticleWorld, fear: float = 0.0) -> Tensor:
    """(B, N) actions: delivery: a collector to its nearest treasure or, laden, to its deposit, but
    away from another one that is within `fear`; a deposit to the nearest collector that brings it
    something, else to the mean of the nearest 7."""
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

WINDOW = 1.5  # pictures show [-WINDOW, WINDOW]^2, whatever happens
COLOURS = ((31, 119, 180), (214, 39, 40))  # of types; in delivery of kinds
OF_THREE = ((214, 39, 40), (44, 160, 44), (150, 75, 200))  # posts or leaders: red, green, violet
YELLOW, BROWN, GROUND, LINE = (250, 215, 120), (190, 140, 30), (255, 255, 255), (205, 205, 205)
GREY, BLACK = (150, 150, 150), (0, 0, 0)


def landmark_colours(game: Game, bodies: Bodies) -> list[tuple[int, ...]]:
    """Of each landmark of one world; in delivery that of its kind."""
    if game.carrying:
        return [COLOURS[int(kind) - 1] for kind in bodies.kinds[:, 0]]
    return [YELLOW] * game.num_landmarks


def agent_colours(game: Game, bodies: Bodies) -> list[tuple[tuple[int, ...], ...]]:
    """Of each agent of one world and of its rim: by type; in delivery collectors are grey, inside
    in the colour of what they carry, deposits in that of what they take in, with a black rim."""
    if game.carrying:
        collectors = [((GREY, *COLOURS)[int(kind)], GREY) for kind in bodies.carried[:, 0]]
        return collectors + [(colour, BLACK) for colour in COLOURS]
    return [(COLOURS[kind], COLOURS[kind]) for kind in game.types]


def draw(game: Game, state: np.ndarray, size: int = 480) -> np.ndarray:
    """A picture (size, size, 3) uint8 of a state (S,): landmarks yellow, agents blue, ghosts red,
    the dead as rings; posts and leaders red, green and violet, with a black rim where one pays; in
    delivery treasures, who carries them and deposits in the colour of the kind. The square where
    things appear is outlined. Whoever has left the window is seen as a half-disc at its edge."""
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
            continue  # leaders are drawn
        place = box(x, y, game.radius[kind])
        brush.ellipse(place, fill=colour if alive else None, outline=rim, width=3)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
