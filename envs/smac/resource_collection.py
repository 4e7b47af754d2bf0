"""Resource Collection (COPA; MIPI's App. D.1): agents of different abilities collect and defend.

    world = ResourceCollection((3, 4, 5), num_battles=64, seed=1)
    obs = world.reset()              # obs.entities (B, A+E, D), obs.avail (B, A, actions), ...
    step = world.step(actions)       # actions (B, A)

The world is the square [-1, 1]^2 with a home in the middle, six resources of three types, and an
invader that walks home. Agents differ in speed and in their value for each type. The team earns 10
times an agent's value when the agent, with empty hands, touches a resource and picks it up; 1 when
it brings it home; 4 when it touches the invader; -4 when that is home. An episode has 145 steps.

The interface is that of envs.smac.combat.Combat, so the same scripts train here. Observations are
computed from a Snapshot alone, and a replay buffer stores Snapshots. All worlds are batched in
tensors on one device. Lengths are in units of the square, times in steps. Each world has its own
random stream: with the same seed and actions it is the same for any number of worlds.

A step, as in COPA's code: 1. agents walk, and bounce off each other, home, resources and the
invader; 2. an invader at home costs 4, and nobody can catch it any more; 3. each agent in turn has
at most one event, the first possible one of: catch the invader, pick up the first resource left in
the list, deliver; 4. resources that were taken reappear; 5. the invader walks or, after a pause,
a new one comes. Observations have agents' hands and last events as they were before the step.

Different from COPA: teams have 1 to 8 agents, the number is drawn (COPA: 2 to 4 in turn, later 5 or
6); every episode begins with an invader; a resource that finds no free place in 8 draws takes the
last. docs/resource_collection.md has all rules with their sources.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs import films
from envs.particle.worlds import GOLDEN, mixed
from envs.smac.episodes import Policy, random_policy
from envs.smac.episodes import play as play  # re-exported: worlds.playing() looks here, too
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
ACCELERATION = 5.0  # force of an action divided by the agent's speed
WALL, WALL_WIDTH, WALL_END = 1.4, 1.0, 1.0  # walls: x or y of the middle line, width, half length
CONTACT_FORCE, CONTACT_MARGIN = 100.0, 1e-3
AGENT, RESOURCE, INVADING, HOMING = 0.04, 0.05, 0.03, 0.08  # radii
RADII = (*[AGENT] * SIDE, *[RESOURCE] * 6, INVADING, HOMING)  # of all slots, (A+E,)
TOUCH = 0.01  # two bodies touch if their distance <= sum of radii + TOUCH
SIGHT = 0.2  # agents see agents whose centre, and things whose edge is within this distance
VALUES, SPEEDS = (0.1, 0.5, 0.9), (0.3, 0.5, 0.7)  # an agent's are drawn from these
MIDDLE = 0.5  # subtracted from values and speeds in observations
START = 0.12  # radius of the circle on which agents begin
NEAR, FAR, APART, TRIES = 0.4, 0.55, 0.1, 8  # resources: radius NEAR + FAR * U(0, 1), APART apart
INVADER_START, INVADER_EDGE, INVADER_STEP = 1.42, 0.99, 0.05  # radius, largest |x|, per step
PAUSE = 10  # steps until the next invader, at most
PICK_UP, DELIVERY, CATCH, ARRIVAL = 10.0, 1.0, 4.0, -4.0  # rewards
DELIVERED, PICKED, CAUGHT = 1, 2, 5  # events; 2, 3, 4: picked up type 1, 2, 3; 0: none
NOWHERE = 9.0  # x and y of resources that are not in the world for now
PLACE_SCALE, REWARD_SCALE = 1 / SIGHT, 0.1  # factors with rescale=True
ROUND, AHEAD = 0.75, 0.06  # forager: radius of its walk, how far ahead it aims (in full turns)


class Snapshot(NamedTuple):
    """The state of B worlds. Observations depend on it alone, the future on it and on Clocks."""

    present: Tensor  # (B, A) bool: the slot has an agent
    value: Tensor  # (B, A, 3) float32: of the three types of resources
    speed: Tensor  # (B, A) float32: the agent's top speed
    position: Tensor  # (B, A, 2) float32
    velocity: Tensor  # (B, A, 2) float32
    holding: Tensor  # (B, A) int8: type of resource, 0 for none
    event: Tensor  # (B, A) int8: the agent's event in the last step
    shown_holding: Tensor  # (B, A) int8: holding one step before, which observations have
    shown_event: Tensor  # (B, A) int8: event one step before, which observations have
    resources: Tensor  # (B, 6, 2) float32
    invader: Tensor  # (B, 2) float32
    pause: Tensor  # (B,) int8: steps until the invader comes, 0 while it is there


class Observation(NamedTuple):
    """What agents see and which actions they may take."""

    entities: Tensor  # (B, A+E, D) float32: Family.features says what the columns are
    obs_mask: Tensor  # (B, A+E, A+E) bool: [b, i, j] is True if j is hidden from i
    entity_mask: Tensor  # (B, A+E) bool: True if the slot is empty
    avail: Tensor  # (B, A, actions) bool: True if the action may be taken


class Episode(NamedTuple):
    """Summary of one episode that has ended."""

    battle: int  # index of the world
    team: tuple[int, ...]  # (number of agents,)
    length: int  # steps
    reward: float  # sum over the steps, never rescaled
    picked: int  # resources picked up
    caught: int  # invaders caught
    arrived: int  # invaders that reached home


class Step(NamedTuple):
    """What ResourceCollection.step() returns."""

    obs: Observation  # after the step; of the new episode where one has ended
    reward: Tensor  # (B,) float32: the team's
    terminated: Tensor  # (B,) bool: always False
    truncated: Tensor  # (B,) bool: the episode limit is reached
    final: Snapshot  # at the end of the step, before a new episode begins
    episodes: list[Episode]  # those that this step has ended


# Velocity, position, what an agent holds (4), event (6), values, speed, kind of thing (5).
FEATURES = 2 + 2 + 4 + 6 + 4 + 5


class Family(NamedTuple):
    """Sizes that networks need; as combat.Family."""

    name: str = "resource"
    n_actions: int = len(MOVES)
    features: int = FEATURES  # D

    @property
    def type_columns(self) -> dict[str, int]:
        return {}

    @property
    def things(self) -> slice:
        """Columns of an agent's row that say where things are, not what the agent is: those of
        nearest_seen(), if there are any."""
        return slice(FEATURES, self.features)

    def teams(self, sizes: tuple[int, ...]) -> list[tuple[int]]:
        """[(size,)] of the sizes; ValueError if one is not 1 to 8, or if there is none."""
        for size in sizes:
            if not 1 <= size <= SIDE:
                raise ValueError(f"Teams of resource have 1 to {SIDE} agents: not {size}.")
        if not sizes:
            raise ValueError("At least one team size is needed.")
        return [(size,) for size in dict.fromkeys(sizes)]


def new_family(egocentric: bool = False) -> Family:
    """The Family of a world; `egocentric` adds the 12 features of nearest_seen()."""
    return Family(features=FEATURES + 12 * egocentric)


class Clocks(NamedTuple):
    """What a world's random numbers and the end of its episode depend on; (B,) int64 each."""

    key: Tensor  # of its random stream
    episode: Tensor  # number of episodes begun
    time: Tensor  # steps since the episode began


class Tally(NamedTuple):
    """Sums of the present episodes, (B,) float64 each; reward is never rescaled."""

    reward: Tensor
    picked: Tensor
    caught: Tensor
    arrived: Tensor


# --- Random numbers -------------------------------------------------------------------------------

PER_STEP = 512  # random numbers reserved for each step of a world
LONGEST = 2**20  # steps reserved for an episode


def uniform(clocks: Clocks, first: int, *shape: int) -> Tensor:
    """(B, *shape) float32 in [0, 1): the random numbers from `first` on of the present step."""
    number = torch.arange(first, first + math.prod(shape), device=clocks.key.device)
    step = (clocks.episode * LONGEST + clocks.time)[:, None]
    bits = mixed(clocks.key[:, None] + GOLDEN * (step * PER_STEP + number))
    return (((bits >> 40) & 0xFFFFFF).float() / 2**24).view(-1, *shape)


def around(angle: Tensor, radius: Any) -> Tensor:
    """(..., 2): points at `angle` (in full turns) and `radius` around home."""
    turn = 2 * math.pi * angle
    radius = torch.as_tensor(radius, device=angle.device).unsqueeze(-1)
    return torch.stack((turn.cos(), turn.sin()), -1) * radius


# --- Rules ----------------------------------------------------------------------------------------


def resource_draws(clocks: Clocks) -> Tensor:
    """(B, 6, TRIES, 2): the places that each resource tries in this step, in this order."""
    draws = uniform(clocks, 64, len(KINDS), TRIES, 2)
    return around(draws[..., 0], NEAR + FAR * draws[..., 1])


def first_free(places: Tensor, others: Tensor) -> Tensor:
    """(B, 2): first of places (B, TRIES, 2) that is APART from others (B, n, 2), else the last."""
    free = (torch.cdist(places, others) >= APART).all(-1)
    free[:, -1] = True
    first = free.float().argmax(-1)  # index of the first True
    return places[torch.arange(len(places), device=places.device), first]


def replace_taken(resources: Tensor, taken: Tensor, clocks: Clocks) -> Tensor:
    """Resources (B, 6, 2), with new places for those that were taken (B, 6) bool: one after the
    other, at least APART from all resources that stand and from its own old place."""
    draws = resource_draws(clocks)
    standing = torch.where(taken[..., None], NOWHERE, resources)
    for k in range(len(KINDS)):
        others = torch.cat((standing, resources[:, k : k + 1]), 1)
        place = first_free(draws[:, k], others)
        standing[:, k] = torch.where(taken[:, k, None], place, standing[:, k])
    return standing


def place_invader(clocks: Clocks) -> Tensor:
    """(B, 2): random places where invaders begin."""
    start = around(uniform(clocks, 0, 1)[:, 0], INVADER_START)
    return start.clamp(-INVADER_EDGE, INVADER_EDGE)


def fresh(clocks: Clocks, sizes: Tensor) -> Snapshot:
    """Draw the first states of new episodes; each world draws one of the team sizes (n,)."""
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
        before = resources[:, : max(k - 1, 0)]  # as COPA's code, which leaves out number k - 1
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
    """Softplus of the depth by which two bodies overlap: about depth, about 0 if it is negative."""
    x = depth / CONTACT_MARGIN
    # torch's softplus rounds by where a number stands in a batch, exp and log do not.
    return (x.clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))) * CONTACT_MARGIN


def walls(position: Tensor) -> Tensor:
    """(B, A, 2): force of the four walls on agents at position (B, A, 2). Column c of all terms is
    for the two walls across axis c: they push along c and, past their ends, around the corner."""
    along = position.flip(-1)  # coordinate along those walls
    past = (along.abs() - WALL_END).clamp(min=0) / AGENT
    meets = past <= 1  # else the agent is beyond the wall's end and does not touch it
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
    """Places of all slots (B, A+E, 2), and whether they are in the world now (B, A+E) bool."""
    home = torch.zeros_like(snap.invader)[:, None]
    places = torch.cat((snap.position, snap.resources, snap.invader[:, None], home), 1)
    there = torch.ones(places.shape[:2], dtype=torch.bool, device=places.device)
    there[:, :SIDE], there[:, INVADER] = snap.present, snap.pause == 0
    return places, there


def collisions(snap: Snapshot) -> Tensor:
    """(B, A, 2): force on agents, away from each other agent and thing that they overlap."""
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
    """Move the agents by actions (B, A): damping, forces, top speed, then the new position."""
    direction = torch.tensor(MOVES, dtype=torch.float32, device=actions.device)[actions]
    force = ACCELERATION * snap.speed[..., None] * direction
    force = force + walls(snap.position) + collisions(snap)
    velocity = (1 - DAMPING) * snap.velocity + DT * force
    pace = velocity.norm(dim=-1, keepdim=True)
    velocity = velocity * (snap.speed[..., None] / pace.clamp(min=1e-9)).clamp(max=1.0)
    velocity = velocity * snap.present[..., None]
    return snap._replace(velocity=velocity, position=snap.position + DT * velocity)


def touches(snap: Snapshot) -> Tensor:
    """(B, A, A+E) bool: which slots each agent touches; agents touch themselves."""
    places, there = bodies(snap)
    reach = AGENT + torch.tensor(RADII, device=places.device) + TOUCH
    near = torch.cdist(snap.position, places) <= reach
    return near & there[:, None] & snap.present[..., None]


def first_true(x: Tensor) -> Tensor:
    """Bool (B, n): of each row of x only the first True stays True."""
    return x & (x.cumsum(1) == 1)


def pick_ups(able: Tensor) -> Tensor:
    """(B, A, 6) bool: which agent takes which resource. Agents choose in turn; each takes the first
    resource left among those that it can take, able (B, A, 6) bool."""
    left, taken = torch.ones_like(able[:, 0]), []
    for i in range(SIDE):
        taken.append(first_true(able[:, i] & left))
        left = left & ~taken[i]
    return torch.stack(taken, 1)


def advance(snap: Snapshot, actions: Tensor, clocks: Clocks) -> tuple[Snapshot, Tensor, Tally]:
    """Play a step with actions (B, A): snapshot after it, reward (B,), addition to the tally."""
    snap = move(snap, actions)
    touched, there = touches(snap), snap.pause == 0
    # Arrival comes before all other events: nobody catches an invader that is at home.
    arrived = there & (snap.invader.norm(dim=-1) <= INVADING + HOMING + TOUCH)
    # Each agent has at most one event: the invader, else a resource, else home.
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
    # The invader walks; caught or arrived, it begins a pause; a new one comes when that is over.
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
    """(B, A, 12): for each type of resource and the invader, the offset (2) of the nearest one that
    the agent sees, in units of SIGHT, and its nearness: 1 at the agent, 0 at the edge of sight. All
    three are 0 if the agent sees none. places (B, A+E, 2), seen (B, A+E, A+E) bool."""
    sight = torch.tensor(RADII[SIDE:HOME], device=places.device) + SIGHT  # (7,)
    offset = places[:, None, SIDE:HOME] - places[:, :SIDE, None]  # (B, A, 7, 2)
    near = (1 - offset.norm(dim=-1) / sight) * seen[:, :SIDE, SIDE:HOME]  # (B, A, 7)
    offset = offset / SIGHT * seen[:, :SIDE, SIDE:HOME, None]
    shown = torch.cat((offset, near[..., None]), -1)  # (B, A, 7, 3)
    first, second, invader = shown.split((3, 3, 1), 2)  # each type of resource comes twice
    nearest = torch.where(first[..., 2:] >= second[..., 2:], first, second)
    return torch.cat((nearest, invader), 2).flatten(2)


def observe(snap: Snapshot, place_scale: float = 1.0, egocentric: bool = False) -> Observation:
    """What agents see: agents within SIGHT, things whose edge is within SIGHT, and themselves.
    Velocities and places are times place_scale. egocentric: agents' rows end by nearest_seen(), in
    the columns Family.things."""
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
    """num_battles worlds. ValueError for arguments that are not allowed.

    team_sizes      each episode draws one of these numbers of agents, 1 to 8
    first_battle    number of the first world; seed and number determine a world's draws
    episode_limit   steps
    once            a world that has ended stands still until reset()
    rescale         observed velocities and places are divided by SIGHT and step rewards by 10;
                    Episode.reward is not changed
    egocentric      agents have 12 more features, those of nearest_seen(); whoever sees an agent
                    sees these features, too
    """

    Episode = Episode
    fixed = ("present", "value", "speed")  # fields of a Snapshot that do not change in an episode

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
        """(B,) int64: steps since the present episodes began."""
        return self.clocks.time

    def close(self) -> None:
        """Does nothing; StarCraft II's battles have the same method and end their games."""

    def seed(self, seed: int) -> None:
        """Restart the worlds' random streams with this seed. Call reset() next."""
        key = mixed(mixed(torch.full_like(self.numbers, seed)) + GOLDEN * (self.numbers + 1))
        self.clocks = Clocks(key, torch.zeros_like(key), torch.zeros_like(key))
        self.snapshot, self.begun = fresh(self.clocks, self.sizes), False
        self.obs = self.observe(self.snapshot)
        zero = torch.zeros_like(key, dtype=torch.float64)
        self.tally = Tally(zero, zero, zero, zero)

    @torch.no_grad()
    def reset(self) -> Observation:
        """Begin a new episode in every world."""
        key, episode, time = self.clocks
        self.clocks = Clocks(key, episode + 1, torch.zeros_like(time))
        self.snapshot, self.begun = fresh(self.clocks, self.sizes), True
        self.over = torch.zeros_like(self.over)
        self.tally = Tally(*(torch.zeros_like(x) for x in self.tally))
        self.obs = self.observe(self.snapshot)
        return self.obs

    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Play one step with actions (B, A), ints. ValueError (nothing is changed) before reset(),
        for another shape, or for an unavailable action in a world that does not stand still."""
        actions = torch.as_tensor(actions, device=self.device)
        if not self.begun:
            raise ValueError("Before step() comes reset().")
        if actions.is_floating_point():
            raise ValueError(f"Actions are ints, not {actions.dtype}.")
        actions = actions.long()
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
        """The observations (K, ...) of a Snapshot (K, ...), equal to those that the worlds gave."""
        return observe(snapshot, self.place_scale, self.egocentric)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps and episodes depend on, except for the rules. rescale and
        egocentric are not in it: the same course is then seen and paid as the loading world's are.
        """
        parts = self.snapshot, self.clocks, self.tally
        rows = {f"{type(x).__name__}.{k}": v.clone() for x in parts for k, v in x._asdict().items()}
        about = {"begun": self.begun, "teams": str(self.teams)}
        return rows | {"over": self.over.clone(), "numbers": self.numbers.clone()} | about

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a state_dict(). ValueError if it has other fields, teams or numbers of worlds."""
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
    """`new` in the worlds where `where` (B,) bool is True, `old` in the others."""
    return Snapshot(
        *(torch.where(where.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(new, old))
    )


# --- Playing --------------------------------------------------------------------------------------


def towards(offset: Tensor) -> Tensor:
    """The action (...) that moves along the longer side of offset (..., 2), int64."""
    along = offset.abs().argmax(-1)
    sign = offset.gather(-1, along[..., None])[..., 0] > 0
    return 2 + 2 * along + sign.long()


def collector(world: ResourceCollection) -> Tensor:
    """A scripted policy that sees everything. The agent that can reach the invader first goes to
    it. Others bring home what they hold or, in turn, go to the resource that pays most per time, a
    different one each (when none is left, the first of the list)."""
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
    """A scripted policy that sees what agents see and has no memory, (B, A) actions. It goes to an
    invader that it sees, else home if it holds something, else to the seen resource that pays most
    per time, else it walks around home on a circle where resources are."""
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
    """{name: policy} with which tables compare learned policies; seed: of the random one."""
    return {"random": random_policy(seed), "forager": forager, "collector": collector}


def summarise(episodes: list[Episode]) -> dict[str, float]:
    """Mean return with its 95 % bootstrap interval (BCa); means of the episodes' counts."""
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
    """A Markdown table of summarise()'s results: one line for each {name: result}."""
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
    """A picture (size, size, 3) uint8 of world b of a Snapshot: home yellow, resources in three
    colours, agents blue with what they hold inside and a ring at SIGHT, the invader black."""
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
    """Play an episode of the first world and write it to an MP4 file, fps steps per second."""
    world.reset()
    with films.writing(path, fps) as writer:
        writer.append_data(draw(world.snapshot, 0))
        over = False
        while not over:
            step = world.step(policy(world))
            writer.append_data(draw(step.final, 0))
            over = bool(step.truncated[0])
