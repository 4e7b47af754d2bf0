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

Facts are those of COPA's code where MIPI is silent; ours: agents begin evenly spaced around home,
the first at a random angle; agents do not collide; a resource that finds no free place among 16
draws takes the last; of several agents at a resource the first has it; however many touch the
invader, it is caught once; it cannot be caught in the step in which it comes; what is beyond sight
is hidden, home too; who is seen shows all its features; of several things one stands on, the last
of home, types 1 to 3, invader is seen. Time is not.
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
WALL, WALL_WIDTH, WALL_FORCE, WALL_MARGIN = 1.4, 1.0, 100.0, 1e-3
AGENT, RESOURCE, INVADING, HOMING = 0.04, 0.05, 0.03, 0.08  # radii
TOUCH = 0.01  # contact: distance <= both radii + this
SIGHT = 0.2
VALUES, SPEEDS = (0.1, 0.5, 0.9), (0.3, 0.5, 0.7)
START = 0.12  # radius of the circle on which agents begin
NEAR, FAR, APART, TRIES = 0.4, 0.55, 0.1, 16  # resources: radius NEAR + FAR U, so far apart
INVADER_START, INVADER_EDGE, INVADER_STEP = 1.42, 0.99, 0.05
PAUSE = 10  # steps until the next invader, at most
PICK_UP, DELIVERY, CATCH, ARRIVAL = 10.0, 1.0, 4.0, -4.0  # rewards
ROUND, AHEAD = 0.75, 0.06  # radius of the forager's walk; how far it aims ahead, in turns


class Snapshot(NamedTuple):
    """All that observations depend on, and, with clocks, all that comes."""

    present: Tensor  # (B, A) bool
    value: Tensor  # (B, A, 3) float32: of the three types of resources
    speed: Tensor  # (B, A) float32
    position: Tensor  # (B, A, 2) float32
    velocity: Tensor  # (B, A, 2) float32
    holding: Tensor  # (B, A) int8: type of resource, 0 for none
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
    # Velocity, position, what one holds (4) and stands on (6), values and speed, kind of other (5).
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


def place_resource(clocks: Clocks, k: int, resources: Tensor) -> Tensor:
    """(B, 2) a place for resource k, the first of TRIES that is no nearer than APART to others;
    those that are not there yet stand far away."""
    draws = uniform(clocks, 64 + 2 * TRIES * k, TRIES, 2)
    places = around(draws[..., 0], NEAR + FAR * draws[..., 1])  # (B, TRIES, 2)
    others = torch.cat((resources[:, :k], resources[:, k + 1 :]), 1)
    free = (torch.cdist(places, others) >= APART).all(-1)
    free[:, -1] = True
    first = free.float().argmax(-1)  # of the True ones
    return places[torch.arange(len(places), device=places.device), first]


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
    angle = uniform(clocks, 2, 1) + slot / size[:, None]
    resources = torch.full((B, len(KINDS), 2), 9.0, device=device)
    for k in range(len(KINDS)):
        resources[:, k] = place_resource(clocks, k, resources)
    there = present[..., None]
    return Snapshot(
        present,
        pick(8, VALUES, SIDE, 3) * there,
        pick(40, SPEEDS, SIDE) * present,
        around(angle, START) * there,
        torch.zeros(B, SIDE, 2, device=device),
        torch.zeros(B, SIDE, dtype=torch.int8, device=device),
        resources,
        place_invader(clocks),
        torch.zeros(B, dtype=torch.int8, device=device),
    )


def walls(position: Tensor) -> Tensor:
    """Force on agents, each coordinate by itself: soft walls at +-WALL."""
    force = torch.zeros_like(position)
    for wall in (-WALL, WALL):
        offset = position - wall
        depth = WALL_WIDTH / 2 + AGENT - offset.abs()
        depth = torch.nn.functional.softplus(depth / WALL_MARGIN) * WALL_MARGIN
        force = force + WALL_FORCE * offset.sign() * depth
    return force


def move(snap: Snapshot, actions: Tensor) -> Snapshot:
    """Agents walk: damping, then forces, then the top speed, then the new position."""
    direction = torch.tensor(MOVES, dtype=torch.float32, device=actions.device)[actions]
    force = ACCELERATION * snap.speed[..., None] * direction + walls(snap.position)
    velocity = (1 - DAMPING) * snap.velocity + DT * force
    pace = velocity.norm(dim=-1, keepdim=True)
    velocity = velocity * (snap.speed[..., None] / pace.clamp(min=1e-9)).clamp(max=1.0)
    velocity = velocity * snap.present[..., None]
    return snap._replace(velocity=velocity, position=snap.position + DT * velocity)


def touches(snap: Snapshot, places: Tensor, radius: float) -> Tensor:
    """(B, A, n) bool: agents in contact with things at places (B, n, 2)."""
    near = torch.cdist(snap.position, places) <= AGENT + radius + TOUCH
    return near & snap.present[..., None]


def advance(snap: Snapshot, actions: Tensor, clocks: Clocks) -> tuple[Snapshot, Tensor, Tally]:
    """A step: snapshots, reward (B,), and what it adds to the tally. First the invader, then
    resources, then home."""
    snap = move(snap, actions)
    # The invader walks; one that pauses comes.
    there = snap.pause == 0
    distance = snap.invader.norm(dim=-1, keepdim=True)
    nearer = snap.invader * (1 - INVADER_STEP / distance.clamp(min=INVADER_STEP))
    pause = (snap.pause - 1).clamp(min=0)
    comes = (snap.pause == 1)[:, None]
    invader = torch.where(there[:, None], nearer, snap.invader)
    invader = torch.where(comes, place_invader(clocks), invader)
    caught = touches(snap, invader[:, None], INVADING)[..., 0].any(1) & there
    home = invader.norm(dim=-1) <= INVADING + HOMING + TOUCH
    arrived = home & there & ~caught
    wait = 1 + (uniform(clocks, 1, 1)[:, 0] * PAUSE).to(torch.int8)
    pause = torch.where(caught | arrived, wait, pause)
    reward = CATCH * caught + ARRIVAL * arrived
    # Resources: the first of those with empty hands that touch one has it.
    resources, holding, picked = snap.resources, snap.holding, torch.zeros_like(reward)
    touched = touches(snap, resources, RESOURCE)  # (B, A, 6)
    for k, kind in enumerate(KINDS):
        able = touched[..., k] & (holding == 0)
        first = able & (able.cumsum(1) == 1)
        taken = first.any(1)
        reward = reward + PICK_UP * (snap.value[..., kind - 1] * first).sum(1)
        holding = torch.where(first, kind, holding).to(torch.int8)
        place = torch.where(taken[:, None], place_resource(clocks, k, resources), resources[:, k])
        resources = torch.cat((resources[:, :k], place[:, None], resources[:, k + 1 :]), 1)
        picked = picked + taken
    # Home
    delivered = touches(snap, torch.zeros_like(invader)[:, None], HOMING)[..., 0] & (holding > 0)
    reward = reward + DELIVERY * delivered.sum(1)
    holding = torch.where(delivered, 0, holding).to(torch.int8)
    snap = snap._replace(holding=holding, resources=resources, invader=invader, pause=pause)
    return snap, reward, Tally(*(x.double() for x in (reward, picked, caught, arrived)))


def one_hot(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(x.long(), n).float()


def observe(snap: Snapshot) -> Observation:
    """What agents see: agents and things within SIGHT, and themselves."""
    B, device = len(snap.present), snap.present.device
    home = torch.zeros_like(snap.invader)[:, None]
    others = torch.cat((snap.resources, snap.invader[:, None], home), 1)  # (B, E, 2)
    places = torch.cat((snap.position, others), 1)
    invader_away = snap.pause > 0
    empty = torch.zeros(B, SLOTS, dtype=torch.bool, device=device)
    empty[:, :SIDE], empty[:, INVADER] = ~snap.present, invader_away
    # What one stands on: nothing, home, types 1 to 3, the invader; of several the last of these.
    on = touches(snap, home, HOMING)[..., 0].long()
    near = touches(snap, snap.resources, RESOURCE)
    for k, kind in enumerate(KINDS):
        on = torch.where(near[..., k], 1 + kind, on)
    invaded = touches(snap, snap.invader[:, None], INVADING)[..., 0] & ~invader_away[:, None]
    on = torch.where(invaded, 5, on)
    abilities = torch.cat((snap.value, snap.speed[..., None]), -1)
    own = snap.velocity, snap.position, one_hot(snap.holding, 4), one_hot(on, 6), abilities
    agents = torch.nn.functional.pad(torch.cat(own, -1), (0, 5)) * snap.present[..., None]
    things = torch.zeros(B, OTHERS, agents.shape[-1], device=device)
    things[..., 2:4] = others
    things[..., 18:] = one_hot(torch.tensor([*(k - 1 for k in KINDS), 3, 4], device=device), 5)
    things[:, INVADER - SIDE] *= ~invader_away[:, None]
    itself = torch.eye(SLOTS, dtype=torch.bool, device=device)
    seen = (torch.cdist(places, places) <= SIGHT) | itself
    unseen = ~seen | empty[:, None] | empty[..., None]
    avail = torch.ones(B, SIDE, len(MOVES), dtype=torch.bool, device=device)
    avail &= snap.present[..., None]
    avail[..., NOOP] = ~snap.present
    return Observation(torch.cat((agents, things), 1), unseen, empty, avail)


# --- Worlds ---------------------------------------------------------------------------------------


class ResourceCollection:
    """num_battles worlds.

    team_sizes      one of them is drawn for each episode
    first_battle    number of the first: worlds with the same seed and number are the same
    episode_limit   steps
    once            worlds that have ended stand still until reset()
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
    ):
        for name, least, x in (
            ("num_battles", 1, num_battles),
            ("episode_limit", 1, episode_limit),
            ("seed", 0, seed),
            ("first_battle", 0, first_battle),
        ):
            if x < least:
                raise ValueError(f"{name} is at least {least}: not {x}.")
        self.family, self.num_battles = Family(), num_battles
        self.teams = self.family.teams(tuple(team_sizes))
        self.limit, self.once, self.device = episode_limit, once, torch.device(device)
        self.sizes = torch.tensor([size for (size,) in self.teams], device=self.device)
        self.numbers = torch.arange(first_battle, first_battle + num_battles, device=self.device)
        self.over = torch.zeros(num_battles, dtype=torch.bool, device=self.device)
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
        self.obs = observe(self.snapshot)
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
        self.obs = observe(self.snapshot)
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
        self.obs = observe(self.snapshot)
        return Step(self.obs, reward, torch.zeros_like(late), late, final, episodes)

    @torch.no_grad()
    def observe(self, snapshot: Snapshot) -> Observation:
        """The observations in snapshots (K, ...), as the worlds would have given them."""
        return observe(snapshot)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps and episodes depend on, but for the rules."""
        parts = self.snapshot, self.clocks, self.tally
        rows = {f"{type(x).__name__}.{k}": v.clone() for x in parts for k, v in x._asdict().items()}
        about = {"begun": self.begun, "teams": str(self.teams)}
        return rows | {"over": self.over.clone(), "numbers": self.numbers.clone()} | about

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where state_dict() was taken; ValueError if that was of other worlds."""
        mine = self.state_dict()
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
        self.obs = observe(self.snapshot)

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
    place, holds, speed = own[..., 2:4], own[..., 5:8].any(-1), own[..., 17:18]
    seen = ~obs.obs_mask[:, :SIDE, SIDE:]  # (B, A, E)
    turn = torch.atan2(place[..., 1], place[..., 0]) / (2 * math.pi)
    target = around(turn + AHEAD, torch.full_like(turn, ROUND))
    way = torch.cdist(place, things[:, :6, 2:4]) / speed.clamp(min=0.1)
    kinds = torch.tensor(KINDS, device=way.device) - 1
    gain = (PICK_UP * own[..., 14:17][..., kinds] + DELIVERY) / (way + 1.0)  # (B, A, 6)
    gain, k = gain.masked_fill(~seen[..., :6], -torch.inf).max(-1)
    chosen = things[..., 2:4].gather(1, k[..., None].expand(-1, -1, 2))
    target = torch.where((gain > 0)[..., None], chosen, target)
    target = torch.where(holds[..., None], 0.0, target)
    invader = things[:, INVADER - SIDE, None, 2:4]
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
