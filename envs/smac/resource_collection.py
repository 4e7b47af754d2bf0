"""Resource Collection (COPA; MIPI's App. D.1): agents of different abilities collect and defend.

    world = ResourceCollection((3, 4, 5), num_battles=64, seed=1)
    obs = world.reset()              # obs.entities (B, A+E, D), obs.avail (B, A, actions), ...
    step = world.step(actions)       # actions (B, A)

A square [-1, 1]^2 with a home in the middle, six resources of three types, and an invader that
walks home. Whoever touches a resource with empty hands picks it up, which pays the team 10 times
that agent's value for the type; to bring it home pays 1; to touch the invader pays 4, its arrival
costs 4. Agents differ in values and speed. An episode has 145 steps.

The interface is that of envs.smac.combat.Combat, so that the same scripts train here: what agents
see comes from a Snapshot alone, which a replay keeps. All worlds are batched in tensors on a
device. Lengths are those of the square, time is in steps. Each world has its own stream of random
numbers: a seed gives a world the same course whatever the number of worlds.

A step, as COPA's code has it: agents walk, and bounce off each other, home, resources and the
invader; an invader that is home costs 4, before anyone can catch it; then each agent in turn has at
most one event, the first of these: it catches the invader, picks up the first resource of the list
that is left, delivers; then resources that were taken come back, and the invader walks or, after
its pause, comes. Agents see their hands and their last event as they were before the step's events.

Ours: teams have 1 to 8 agents, their number drawn (COPA's 2 to 4 in turn, later 5 or 6); every
episode begins with an invader; a resource that finds no free place among 8 draws takes the last.
docs/resource_collection.md has all rules with their sources.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.particle.worlds import GOLDEN, mixed
from envs.smac.episodes import Policy, random_policy
from envs.smac.episodes import play as play  # as episodes.play
from envs.statistics import accelerated_interval, aligned_table, with_interval

SIDE = 8  # slots of agents
OTHERS = 8  # six resources, the invader, home
SLOTS = SIDE + OTHERS
INVADER, HOME = SIDE + 6, SIDE + 7  # slots
KINDS = (1, 2, 3, 1, 2, 3)  # of the resources
EPISODE_LIMIT = 145  # steps
NOOP, STAY = 0, 1  # actions; 2..5: -x, +x, -y, +y
MOVES = ((0, 0), (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
DT, DAMPING = 0.1, 0.25
ACCELERATION = 5.0  # times the agent's speed
WALL, WALL_WIDTH, WALL_END = 1.4, 1.0, 1.0  # where walls are, how thick, half their length
CONTACT_FORCE, CONTACT_MARGIN = 100.0, 1e-3
AGENT, RESOURCE, INVADING, HOMING = 0.04, 0.05, 0.03, 0.08  # radii
RADII = (*[AGENT] * SIDE, *[RESOURCE] * 6, INVADING, HOMING)  # of all slots
TOUCH = 0.01  # contact: distance <= both radii + this
SIGHT = 0.2  # how far one sees agents, centre to centre; things by their radius farther
VALUES, SPEEDS = (0.1, 0.5, 0.9), (0.3, 0.5, 0.7)
MIDDLE = 0.5  # what features have of values and speeds is less this
START = 0.12  # radius of the circle on which agents begin
NEAR, FAR, APART, TRIES = 0.4, 0.55, 0.1, 8  # resources: radius NEAR + FAR U, so far apart
INVADER_START, INVADER_EDGE, INVADER_STEP = 1.42, 0.99, 0.05
PAUSE = 10  # steps until the next invader, at most
PICK_UP, DELIVERY, CATCH, ARRIVAL = 10.0, 1.0, 4.0, -4.0  # rewards
DELIVERED, PICKED, CAUGHT = 1, 2, 5  # events; PICKED, 3 and 4 are of types 1 to 3, 0 is none
NOWHERE = 9.0  # coordinate of resources that are not there
PLACE_SCALE, REWARD_SCALE = 1 / SIGHT, 0.1  # of worlds that are rescaled
ROUND, AHEAD = 0.75, 0.06  # radius of the forager's walk; how far it aims ahead, in turns


class Snapshot(NamedTuple):
    """All that observations depend on, and, with clocks, all that comes."""

    present: Tensor  # (B, A) bool
    value: Tensor  # (B, A, 3) float32: of the three types of resources
    speed: Tensor  # (B, A) float32
    position: Tensor  # (B, A, 2) float32
    velocity: Tensor  # (B, A, 2) float32
    holding: Tensor  # (B, A) int8: type of resource, 0 for none
    event: Tensor  # (B, A) int8: what the last step brought
    shown_holding: Tensor  # (B, A) int8: what agents see, both as they were a step before
    shown_event: Tensor  # (B, A) int8
    resources: Tensor  # (B, 6, 2) float32
    invader: Tensor  # (B, 2) float32
    pause: Tensor  # (B,) int8: steps until the invader comes, 0 while it is there


class Observation(NamedTuple):
    """What agents see and may do."""

    entities: Tensor  # (B, A+E, D) float32
    obs_mask: Tensor  # (B, A+E, A+E) bool: j is hidden from i
    entity_mask: Tensor  # (B, A+E) bool: the slot is empty
    avail: Tensor  # (B, A, actions) bool


class Episode(NamedTuple):
    """An episode that has ended."""

    battle: int
    team: tuple[int, ...]  # (number of agents,)
    length: int
    reward: float
    picked: int  # resources picked up
    caught: int  # invaders
    arrived: int  # invaders that reached home


class Step(NamedTuple):
    """What a step led to."""

    obs: Observation  # of the next episode where one has ended
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: never
    truncated: Tensor  # (B,) bool: out of time
    final: Snapshot  # at the end of the step, before a next episode
    episodes: list[Episode]


class Family(NamedTuple):
    """What networks need to know of the world."""

    name: str = "resource"
    n_actions: int = len(MOVES)
    # Velocity, position, what one holds (4), event (6), values and speed, kind of thing (5).
    features: int = 2 + 2 + 4 + 6 + 4 + 5

    @property
    def type_columns(self) -> dict[str, int]:
        return {}

    def teams(self, sizes: tuple[int, ...]) -> list[tuple[int]]:
        """ValueError if there are no teams of these sizes."""
        for size in sizes:
            if not 1 <= size <= SIDE:
                raise ValueError(f"Teams of resource have 1 to {SIDE} agents: not {size}.")
        if not sizes:
            raise ValueError("At least one team size is needed.")
        return [(size,) for size in dict.fromkeys(sizes)]


def new_family(egocentric: bool = False) -> Family:
    """As agents are told about the world: egocentric features are 12 more."""
    return Family(features=Family().features + 12 * egocentric)


class Clocks(NamedTuple):
    """What a world's random numbers and the end of its episode depend on; (B,) int64 each."""

    key: Tensor  # its stream
    episode: Tensor  # episodes begun
    time: Tensor  # steps in the episode


class Tally(NamedTuple):
    """Sums over the episode, (B,) float64 each."""

    reward: Tensor
    picked: Tensor
    caught: Tensor
    arrived: Tensor


# --- Random numbers -------------------------------------------------------------------------------

PER_STEP = 512  # numbers that a world has for each step of an episode
LONGEST = 2**20  # steps


def uniform(clocks: Clocks, first: int, *shape: int) -> Tensor:
    """(B, *shape) float32 in [0, 1): numbers `first` and on of the worlds' present step."""
    number = torch.arange(first, first + math.prod(shape), device=clocks.key.device)
    step = (clocks.episode * LONGEST + clocks.time)[:, None]
    bits = mixed(clocks.key[:, None] + GOLDEN * (step * PER_STEP + number))
    return (((bits >> 40) & 0xFFFFFF).float() / 2**24).view(-1, *shape)


def around(angle: Tensor, radius: Any) -> Tensor:
    """(..., 2) at angle (in turns) and radius from home."""
    turn = 2 * math.pi * angle
    radius = torch.as_tensor(radius, device=angle.device).unsqueeze(-1)
    return torch.stack((turn.cos(), turn.sin()), -1) * radius


# --- Rules ----------------------------------------------------------------------------------------


def resource_draws(clocks: Clocks) -> Tensor:
    """(B, 6, TRIES, 2) where each resource would stand, in the order in which it tries."""
    draws = uniform(clocks, 64, len(KINDS), TRIES, 2)
    return around(draws[..., 0], NEAR + FAR * draws[..., 1])


def first_free(places: Tensor, others: Tensor) -> Tensor:
    """(B, 2) the first of places (B, TRIES, 2) that is no nearer than APART to others (B, n, 2)."""
    free = (torch.cdist(places, others) >= APART).all(-1)
    free[:, -1] = True
    first = free.float().argmax(-1)  # of the True ones
    return places[torch.arange(len(places), device=places.device), first]


def replace_taken(resources: Tensor, taken: Tensor, clocks: Clocks) -> Tensor:
    """(B, 6, 2) resources, those that were taken (B, 6) elsewhere: one after the other, apart from
    all that stand and from where it was taken."""
    draws = resource_draws(clocks)
    standing = torch.where(taken[..., None], NOWHERE, resources)
    for k in range(len(KINDS)):
        others = torch.cat((standing, resources[:, k : k + 1]), 1)
        place = first_free(draws[:, k], others)
        standing[:, k] = torch.where(taken[:, k, None], place, standing[:, k])
    return standing


def place_invader(clocks: Clocks) -> Tensor:
    """(B, 2) where an invader begins."""
    start = around(uniform(clocks, 0, 1)[:, 0], INVADER_START)
    return start.clamp(-INVADER_EDGE, INVADER_EDGE)


def fresh(clocks: Clocks, sizes: Tensor) -> Snapshot:
    """How episodes begin; sizes (n,): of teams, one of which is drawn."""
    B, device = len(clocks.key), clocks.key.device
    size = sizes[(uniform(clocks, 1, 1)[:, 0] * len(sizes)).long()]  # (B,)
    slot = torch.arange(SIDE, device=device)
    present = slot < size[:, None]
    pick = lambda first, options, *shape: torch.tensor(options, device=device)[  # noqa: E731
        (uniform(clocks, first, *shape) * len(options)).long()
    ]
    draws = resource_draws(clocks)
    resources = torch.full((B, len(KINDS), 2), NOWHERE, device=device)
    for k in range(len(KINDS)):
        before = resources[:, : max(k - 1, 0)]  # COPA's code leaves out the last one
        resources[:, k] = first_free(draws[:, k], before)
    there = present[..., None]
    nothing = torch.zeros(B, SIDE, dtype=torch.int8, device=device)
    return Snapshot(
        present,
        pick(8, VALUES, SIDE, 3) * there,
        pick(40, SPEEDS, SIDE) * present,
        around(slot / size[:, None], START) * there,
        torch.zeros(B, SIDE, 2, device=device),
        nothing,
        nothing,
        nothing,
        nothing,
        resources,
        place_invader(clocks),
        torch.zeros(B, dtype=torch.int8, device=device),
    )


def overlap(depth: Tensor) -> Tensor:
    """How deep two bodies are in each other, rounded off where they only just touch."""
    return torch.nn.functional.softplus(depth / CONTACT_MARGIN) * CONTACT_MARGIN


def walls(position: Tensor) -> Tensor:
    """(B, A, 2) force of the four walls on agents. Column c is about the two walls across axis c:
    they push along it and, who is past a wall's end, around its corner."""
    along = position.flip(-1)  # where along those walls the agent is
    past = (along.abs() - WALL_END).clamp(min=0) / AGENT
    meets = past <= 1  # else it is beyond the wall's end altogether
    sine = past.clamp(max=1) * along.sign()
    cosine = (1 - sine.square()).sqrt()
    force = torch.zeros_like(position)
    for wall in (-WALL, WALL):
        offset = position - wall
        depth = WALL_WIDTH / 2 + cosine * AGENT - offset.abs()
        push = CONTACT_FORCE * overlap(depth) * meets
        force = force + push * cosine * offset.sign() + (push * sine).flip(-1)
    return force


def bodies(snap: Snapshot) -> tuple[Tensor, Tensor]:
    """Of all slots where they are (B, A+E, 2) and whether they are there (B, A+E)."""
    home = torch.zeros_like(snap.invader)[:, None]
    places = torch.cat((snap.position, snap.resources, snap.invader[:, None], home), 1)
    there = torch.ones(places.shape[:2], dtype=torch.bool, device=places.device)
    there[:, :SIDE], there[:, INVADER] = snap.present, snap.pause == 0
    return places, there


def collisions(snap: Snapshot) -> Tensor:
    """(B, A, 2) force on agents, away from each agent and thing that they overlap."""
    places, there = bodies(snap)
    radii = torch.tensor(RADII, device=places.device)
    itself = torch.eye(SIDE, SLOTS, dtype=torch.bool, device=places.device)
    x = snap.position[:, :, None, 0] - places[:, None, :, 0]  # (B, A, A+E)
    y = snap.position[:, :, None, 1] - places[:, None, :, 1]
    distance = (x.square() + y.square()).sqrt()
    push = CONTACT_FORCE * overlap(AGENT + radii - distance) / distance.clamp(min=1e-9)
    push = push * (there[:, None] & ~itself)
    return torch.stack(((push * x).sum(-1), (push * y).sum(-1)), -1)


def move(snap: Snapshot, actions: Tensor) -> Snapshot:
    """Agents walk: damping, then forces, then the top speed, then the new position."""
    direction = torch.tensor(MOVES, dtype=torch.float32, device=actions.device)[actions]
    force = ACCELERATION * snap.speed[..., None] * direction
    force = force + walls(snap.position) + collisions(snap)
    velocity = (1 - DAMPING) * snap.velocity + DT * force
    pace = velocity.norm(dim=-1, keepdim=True)
    velocity = velocity * (snap.speed[..., None] / pace.clamp(min=1e-9)).clamp(max=1.0)
    velocity = velocity * snap.present[..., None]
    return snap._replace(velocity=velocity, position=snap.position + DT * velocity)


def touches(snap: Snapshot) -> Tensor:
    """(B, A, A+E) bool: which slots agents are in contact with."""
    places, there = bodies(snap)
    reach = AGENT + torch.tensor(RADII, device=places.device) + TOUCH
    near = torch.cdist(snap.position, places) <= reach
    return near & there[:, None] & snap.present[..., None]


def first_true(x: Tensor) -> Tensor:
    """Bool (B, n) with the first True of each row alone."""
    return x & (x.cumsum(1) == 1)


def pick_ups(able: Tensor) -> Tensor:
    """(B, A, 6) bool who takes which resource: agents in turn, each the first that is left of those
    that it is able to take (B, A, 6)."""
    left, taken = torch.ones_like(able[:, 0]), []
    for i in range(SIDE):
        taken.append(first_true(able[:, i] & left))
        left = left & ~taken[i]
    return torch.stack(taken, 1)


def advance(snap: Snapshot, actions: Tensor, clocks: Clocks) -> tuple[Snapshot, Tensor, Tally]:
    """A step: snapshots, reward (B,), and what it adds to the tally."""
    snap = move(snap, actions)
    touched, there = touches(snap), snap.pause == 0
    # The invader's arrival comes before all; nobody catches it at home.
    arrived = there & (snap.invader.norm(dim=-1) <= INVADING + HOMING + TOUCH)
    # One event for each agent: the invader, else a resource, else home.
    catches = first_true(touched[..., INVADER] & ~arrived[:, None])  # (B, A)
    caught = catches.any(1)
    able = ~catches & (snap.holding == 0)
    taken = pick_ups(touched[..., SIDE:INVADER] & able[..., None])  # (B, A, 6)
    delivers = touched[..., HOME] & ~catches & (snap.holding > 0)
    kinds = torch.tensor(KINDS, device=actions.device)
    kind = (taken * kinds).sum(-1)  # (B, A), 0 for none
    worth = (snap.value[..., kinds - 1] * taken).sum((1, 2))
    reward = ARRIVAL * arrived + CATCH * caught + PICK_UP * worth + DELIVERY * delivers.sum(1)
    event = CAUGHT * catches + DELIVERED * delivers + (kind > 0) * (PICKED - 1 + kind)
    holding = torch.where(delivers, 0, snap.holding + kind)
    resources = replace_taken(snap.resources, taken.any(1), clocks)
    # The invader walks, or begins its pause, or comes when that is over.
    distance = snap.invader.norm(dim=-1, keepdim=True)
    nearer = snap.invader * (1 - INVADER_STEP / distance.clamp(min=INVADER_STEP))
    comes = snap.pause == 1
    invader = torch.where((there & ~caught & ~arrived)[:, None], nearer, snap.invader)
    invader = torch.where(comes[:, None], place_invader(clocks), invader)
    wait = 1 + (uniform(clocks, 1, 1)[:, 0] * PAUSE).to(torch.int8)
    pause = torch.where(caught | arrived, wait, (snap.pause - 1).clamp(min=0))
    tally = Tally(*(x.double() for x in (reward, taken.sum((1, 2)), caught, arrived)))
    snap = snap._replace(
        holding=holding.to(torch.int8),
        event=event.to(torch.int8),
        shown_holding=snap.holding,
        shown_event=snap.event,
        resources=resources,
        invader=invader,
        pause=pause,
    )
    return snap, reward, tally


def one_hot(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(x.long(), n).float()


def nearest_seen(places: Tensor, seen: Tensor) -> Tensor:
    """(B, A, 12): of each type of resource and the invader, if the agent sees one, where the
    nearest is from it, in units of SIGHT, and how near: 1 where it stands, 0 at the edge of sight;
    places (B, A+E, 2), seen (B, A+E, A+E) bool."""
    sight = torch.tensor(RADII[SIDE:HOME], device=places.device) + SIGHT  # (7,)
    offset = places[:, None, SIDE:HOME] - places[:, :SIDE, None]  # (B, A, 7, 2)
    near = (1 - offset.norm(dim=-1) / sight) * seen[:, :SIDE, SIDE:HOME]  # (B, A, 7)
    offset = offset / SIGHT * seen[:, :SIDE, SIDE:HOME, None]
    shown = torch.cat((offset, near[..., None]), -1)  # (B, A, 7, 3)
    first, second, invader = shown.split((3, 3, 1), 2)  # KINDS come twice
    nearest = torch.where(first[..., 2:] >= second[..., 2:], first, second)
    return torch.cat((nearest, invader), 2).flatten(2)


def observe(snap: Snapshot, place_scale: float = 1.0, egocentric: bool = False) -> Observation:
    """What agents see: agents within SIGHT, things that reach into it, and themselves; velocities
    and places times place_scale; egocentric: agents' features end with nearest_seen()."""
    B, device = len(snap.present), snap.present.device
    places, there = bodies(snap)
    abilities = torch.cat((snap.value, snap.speed[..., None]), -1) - MIDDLE
    holding, event = one_hot(snap.shown_holding, 4), one_hot(snap.shown_event, 6)
    own = torch.cat((snap.velocity, snap.position, holding, event, abilities), -1)
    agents = torch.nn.functional.pad(own, (0, 5))
    things = torch.zeros(B, OTHERS, agents.shape[-1], device=device)
    things[..., 2:4] = places[:, SIDE:]
    things[..., 18:] = one_hot(torch.tensor([*(k - 1 for k in KINDS), 3, 4], device=device), 5)
    entities = torch.cat((agents, things), 1) * there[..., None]
    entities[..., :4] *= place_scale
    sight = torch.tensor([0.0] * SIDE + [*RADII[SIDE:]], device=device) + SIGHT
    itself = torch.eye(SLOTS, dtype=torch.bool, device=device)
    seen = (torch.cdist(places, places) <= sight) | itself
    unseen = ~seen | ~there[:, None] | ~there[..., None]
    if egocentric:
        more = torch.nn.functional.pad(nearest_seen(places, ~unseen), (0, 0, 0, OTHERS))
        entities = torch.cat((entities, more), -1)
    avail = torch.ones(B, SIDE, len(MOVES), dtype=torch.bool, device=device)
    avail &= snap.present[..., None]
    avail[..., NOOP] = ~snap.present
    return Observation(entities, unseen, ~there, avail)


# --- Worlds ---------------------------------------------------------------------------------------


class ResourceCollection:
    """num_battles worlds.

    team_sizes      one of them is drawn for each episode
    first_battle    number of the first: worlds with the same seed and number are the same
    episode_limit   steps
    once            worlds that have ended stand still until reset()
    rescale         velocities and places are seen in units of SIGHT, steps are paid a tenth;
                    what episodes are said to have earned stays
    egocentric      agents' features also say where the nearest things they see are from them; who
                    sees an agent sees those, too
    """

    Episode = Episode
    fixed = ("present", "value", "speed")  # fields of a Snapshot that last for an episode

    def __init__(
        self,
        team_sizes: tuple[int, ...] = (3, 4, 5),
        num_battles: int = 1,
        seed: int = 1,
        first_battle: int = 0,
        episode_limit: int = EPISODE_LIMIT,
        once: bool = False,
        device: str | torch.device = "cpu",
        rescale: bool = False,
        egocentric: bool = False,
    ):
        for name, least, x in (
            ("num_battles", 1, num_battles),
            ("episode_limit", 1, episode_limit),
            ("seed", 0, seed),
            ("first_battle", 0, first_battle),
        ):
            if x < least:
                raise ValueError(f"{name} is at least {least}: not {x}.")
        self.family, self.num_battles = new_family(egocentric), num_battles
        self.teams = self.family.teams(tuple(team_sizes))
        self.limit, self.once, self.device = episode_limit, once, torch.device(device)
        self.sizes = torch.tensor([size for (size,) in self.teams], device=self.device)
        self.numbers = torch.arange(first_battle, first_battle + num_battles, device=self.device)
        self.over = torch.zeros(num_battles, dtype=torch.bool, device=self.device)
        self.egocentric = egocentric
        self.place_scale = PLACE_SCALE if rescale else 1.0
        self.reward_scale = REWARD_SCALE if rescale else 1.0
        self.seed(seed)

    @property
    def time(self) -> Tensor:
        """(B,) steps since the present episodes began."""
        return self.clocks.time

    def close(self) -> None:
        """Nothing: as Combat has it, for games."""

    def seed(self, seed: int) -> None:
        """Begin the worlds' streams of random numbers; reset() comes next."""
        key = mixed(mixed(torch.full_like(self.numbers, seed)) + GOLDEN * (self.numbers + 1))
        self.clocks = Clocks(key, torch.zeros_like(key), torch.zeros_like(key))
        self.snapshot, self.begun = fresh(self.clocks, self.sizes), False
        self.obs = self.observe(self.snapshot)
        zero = torch.zeros_like(key, dtype=torch.float64)
        self.tally = Tally(zero, zero, zero, zero)

    @torch.no_grad()
    def reset(self) -> Observation:
        """A new episode in every world."""
        key, episode, time = self.clocks
        self.clocks = Clocks(key, episode + 1, torch.zeros_like(time))
        self.snapshot, self.begun = fresh(self.clocks, self.sizes), True
        self.over = torch.zeros_like(self.over)
        self.tally = Tally(*(torch.zeros_like(x) for x in self.tally))
        self.obs = self.observe(self.snapshot)
        return self.obs

    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> Step:
        """A step of all worlds; actions (B, A) ints. ValueError for one that is not available,
        before anything has moved; nobody looks at those of worlds that stand still."""
        actions = torch.as_tensor(actions, device=self.device).long()
        if not self.begun:
            raise ValueError("Before step() comes reset().")
        if actions.shape != (self.num_battles, SIDE):
            wanted = (self.num_battles, SIDE)
            raise ValueError(f"Actions are {wanted}, not {tuple(actions.shape)}.")
        legal = (actions >= 0) & (actions < len(MOVES))
        may = self.obs.avail.gather(-1, (actions * legal)[..., None])[..., 0] & legal
        if (wrong := ~may & ~self.over[:, None]).any():
            b, i = wrong.nonzero()[0].tolist()
            raise ValueError(f"World {b}, agent {i}: action {actions[b, i]} is not available.")
        goes_on = ~self.over
        key, episode, time = self.clocks
        self.clocks = clocks = Clocks(key, episode, time + goes_on)
        final, reward, more = advance(self.snapshot, actions * legal, clocks)
        final, reward = choose(goes_on, final, self.snapshot), reward * goes_on
        self.tally = Tally(*(x + y * goes_on for x, y in zip(self.tally, more)))
        late = goes_on & (clocks.time >= self.limit)
        episodes = [self._episode(b, final) for b in late.nonzero()[:, 0].tolist()]
        self.snapshot = final
        if self.once:
            self.over = self.over | late
        elif episodes:
            self.clocks = Clocks(key, episode + late, torch.where(late, 0, clocks.time))
            self.snapshot = choose(late, fresh(self.clocks, self.sizes), final)
            self.tally = Tally(*(torch.where(late, 0.0, x) for x in self.tally))
        self.obs = self.observe(self.snapshot)
        reward = reward * self.reward_scale
        return Step(self.obs, reward, torch.zeros_like(late), late, final, episodes)

    @torch.no_grad()
    def observe(self, snapshot: Snapshot) -> Observation:
        """The observations in snapshots (K, ...), as the worlds would have given them."""
        return observe(snapshot, self.place_scale, self.egocentric)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps and episodes depend on, but for the rules."""
        parts = self.snapshot, self.clocks, self.tally
        rows = {f"{type(x).__name__}.{k}": v.clone() for x in parts for k, v in x._asdict().items()}
        about = {"begun": self.begun, "teams": str(self.teams)}
        return rows | {"over": self.over.clone(), "numbers": self.numbers.clone()} | about

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where state_dict() was taken; ValueError if that was of other worlds."""
        mine = self.state_dict()
        if saved.keys() != mine.keys():
            raise ValueError("This state is of other rules of Resource Collection.")
        shapes = [
            {k: getattr(x, "shape", None) for k, x in one.items()} | {"teams": one["teams"]}
            for one in (saved, mine)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"This state is not of {self.num_battles} worlds of {self.teams}.")
        part = lambda kind: kind(  # noqa: E731
            *(saved[f"{kind.__name__}.{k}"].to(self.device) for k in kind._fields)
        )
        self.clocks, self.tally, self.snapshot = part(Clocks), part(Tally), part(Snapshot)
        self.begun = saved["begun"]
        self.over, self.numbers = (saved[k].to(self.device) for k in ("over", "numbers"))
        self.obs = self.observe(self.snapshot)

    def _episode(self, b: int, final: Snapshot) -> Episode:
        size, counts = int(final.present[b].sum()), [float(x[b]) for x in self.tally]
        return Episode(b, (size,), int(self.clocks.time[b]), counts[0], *map(int, counts[1:]))


def choose(where: Tensor, new: Snapshot, old: Snapshot) -> Snapshot:
    """new in the worlds where (B,) says so, old elsewhere."""
    return Snapshot(
        *(torch.where(where.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(new, old))
    )


# --- Playing --------------------------------------------------------------------------------------


def towards(offset: Tensor) -> Tensor:
    """The action (...) that goes along the longer side of offset (..., 2)."""
    along = offset.abs().argmax(-1)
    sign = offset.gather(-1, along[..., None])[..., 0] > 0
    return 2 + 2 * along + sign.long()


def collector(world: ResourceCollection) -> Tensor:
    """A script that sees everything: the agent that can be at the invader first goes for it,
    whatever it holds; others bring home what they hold, or take what pays most for the way, each
    something else (when nothing is left, the first resource of the list)."""
    snap = world.snapshot
    places = torch.cat((snap.resources, snap.invader[:, None]), 1)
    way = torch.cdist(snap.position, places) / snap.speed.clamp(min=0.1)[..., None]  # (B, A, 7)
    there, free = snap.present, snap.present & (snap.holding == 0)
    target = torch.zeros_like(snap.position)  # home
    hunt = torch.where(there, way[..., -1], torch.inf).argmin(-1)  # (B,)
    hunts = one_hot(hunt, SIDE).bool() & (snap.pause == 0)[:, None] & there
    kinds = torch.tensor(KINDS, device=way.device) - 1
    gain = (PICK_UP * snap.value[..., kinds] + DELIVERY) / (way[..., :-1] + 1.0)  # (B, A, 6)
    left = torch.ones_like(gain[:, 0], dtype=torch.bool)
    for i in range(SIDE):
        score = torch.where(left, gain[:, i], -torch.inf)
        k = score.argmax(-1)
        takes = free[:, i] & ~hunts[:, i]
        chosen = snap.resources[torch.arange(len(k), device=k.device), k]
        target[:, i] = torch.where(takes[:, None], chosen, target[:, i])
        left = left & ~(one_hot(k, left.shape[1]).bool() & takes[:, None])
    target = torch.where(hunts[..., None], snap.invader[:, None], target)
    return torch.where(there, towards(target - snap.position), NOOP)


def forager(world: ResourceCollection) -> Tensor:
    """A script that sees what agents see, and remembers nothing: a seen invader first, then home
    with what it holds, then of the seen resources the one that pays most for the way; with nothing
    to do it walks around home, where resources are."""
    obs = world.obs
    own, things = obs.entities[:, :SIDE], obs.entities[:, SIDE:]
    place, goals = own[..., 2:4] / world.place_scale, things[..., 2:4] / world.place_scale
    holds, abilities = own[..., 5:8].any(-1), own[..., 14:18] + MIDDLE
    seen = ~obs.obs_mask[:, :SIDE, SIDE:]  # (B, A, E)
    turn = torch.atan2(place[..., 1], place[..., 0]) / (2 * math.pi)
    target = around(turn + AHEAD, torch.full_like(turn, ROUND))
    way = torch.cdist(place, goals[:, :6]) / abilities[..., 3:].clamp(min=0.1)
    kinds = torch.tensor(KINDS, device=way.device) - 1
    gain = (PICK_UP * abilities[..., kinds] + DELIVERY) / (way + 1.0)  # (B, A, 6)
    gain, k = gain.masked_fill(~seen[..., :6], -torch.inf).max(-1)
    chosen = goals.gather(1, k[..., None].expand(-1, -1, 2))
    target = torch.where((gain > 0)[..., None], chosen, target)
    target = torch.where(holds[..., None], 0.0, target)
    invader = goals[:, INVADER - SIDE, None]
    target = torch.where(seen[..., INVADER - SIDE, None], invader, target)
    return torch.where(obs.avail[..., NOOP], NOOP, towards(target - place))


def scripted_policies(seed: int) -> dict[str, Policy]:
    """The reference points of every table."""
    return {"random": random_policy(seed), "forager": forager, "collector": collector}


def summarise(episodes: list[Episode]) -> dict[str, float]:
    """Mean return with a 95 % bootstrap interval; what was done, per episode."""
    returns = np.array([episode.reward for episode in episodes])
    low, high = accelerated_interval(returns)
    return {
        "episodes": len(episodes),
        "return": float(returns.mean()),
        "return_low": low,
        "return_high": high,
        "picked": float(np.mean([episode.picked for episode in episodes])),
        "caught": float(np.mean([episode.caught for episode in episodes])),
        "arrived": float(np.mean([episode.arrived for episode in episodes])),
        "length": float(np.mean([episode.length for episode in episodes])),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: one line per row name."""
    lines = [["who", "return", "picked up", "caught", "arrived", "episodes"]]
    for name, row in rows.items():
        earned = with_interval(row, "return", digits=1)
        counts = [f"{row[k]:.1f}" for k in ("picked", "caught", "arrived")]
        lines.append([name, earned, *counts, f"{int(row['episodes'])}"])
    return aligned_table(lines)


# --- Pictures -------------------------------------------------------------------------------------

COLOURS = {1: (214, 39, 40), 2: (44, 160, 44), 3: (148, 103, 189)}  # of resources
BLUE, HOUSE, DARK, GROUND = (31, 119, 180), (250, 215, 120), (40, 40, 40), (255, 255, 255)


def draw(snap: Snapshot, b: int, size: int = 480) -> np.ndarray:
    """A picture (size, size, 3) uint8 of snapshot b: home yellow, resources in three colours,
    agents blue with what they hold inside and a ring as far as they see, the invader black."""
    from PIL import Image, ImageDraw

    fine = 2 * size  # drawn at twice the size, for smooth edges
    image = Image.new("RGB", (fine, fine), GROUND)
    brush = ImageDraw.Draw(image)

    def disc(place: Any, radius: float, fill: Any, outline: Any = None) -> None:
        x, y = (float(v) for v in place)
        box = (x - radius, -y - radius, x + radius, -y + radius)
        brush.ellipse([(v + 1.05) / 2.1 * fine for v in box], fill, outline, 3)

    disc((0, 0), HOMING, HOUSE, DARK)
    for k, kind in enumerate(KINDS):
        disc(snap.resources[b, k], RESOURCE, COLOURS[kind])
    for i in range(SIDE):
        if snap.present[b, i]:
            disc(snap.position[b, i], SIGHT, None, (220, 220, 220))
            disc(snap.position[b, i], AGENT, BLUE)
            if held := int(snap.holding[b, i]):
                disc(snap.position[b, i], AGENT / 2, COLOURS[held])
    if not snap.pause[b]:
        disc(snap.invader[b], INVADING, DARK)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def film(world: ResourceCollection, policy: Policy, path: Path, fps: int = 12) -> None:
    """An MP4 of an episode of the first world."""
    import imageio.v2 as imageio

    world.reset()
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=6) as writer:
        writer.append_data(draw(world.snapshot, 0))
        over = False
        while not over:
            step = world.step(policy(world))
            writer.append_data(draw(step.final, 0))
            over = bool(step.truncated[0])
