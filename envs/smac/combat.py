"""StarCraft micromanagement without StarCraft II: two small armies fight by the game's own data.

    battles = Combat("sz", (3, 4, 5), num_battles=64, seed=1)
    obs = battles.reset()            # obs.entities (B, A+E, D), obs.avail (B, A, actions), ...
    step = battles.step(actions)     # actions (B, A), one for each ally; a script plays the enemy

Unit data are those of the maps that SMAC and REFIL use (Wings of Liberty, not today's multiplayer
balance); docs/battles.md has the table, its sources and what is guessed. Lengths are in map units,
times in frames: a second of the data has 16 frames, a step of the agents has 8. Times are fractions
of frames and are never rounded: an event that is due within a frame happens in that frame, and the
rest of the frame counts towards what follows.

The rules of a battle are plain loops (`frame` lists them in order), compiled by Numba. Units are
records: units[b] has those of battle b, allies in slots 0..7, enemies in slots 8..15. Observations,
available actions and rewards are computed from a Snapshot alone. envs/smac/game.py makes Snapshots
of the real game, and a replay buffer stores Snapshots.

A battle that ends begins a new episode at once (with `once` it stands still until reset()), and
Step.final has the snapshot at its end. (seed, battle, episode) determine an episode's random
numbers: with the same seed and actions it is the same for any number of battles and threads.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numba import njit
from torch import Tensor

SIDE = 8  # slots of each side: A = E
SLOTS = 2 * SIDE
FRAMES = 8  # frames of one step
SECOND = 16.0  # frames in a second of the data
MAP = 32.0  # width and height of the map
EDGE = MAP - 1e-3  # largest x and y of a unit: one on the border would be in no cell of the map
SIGHT, SHOOT = 9.0, 6.0  # centre to centre: how far agents see, how far they may order attacks
MOVE = 2.0  # distance from a unit to the goal of its move order
STOP, FIRST_MOVE, FIRST_TARGET = 1, 2, 6  # actions; 0: no-op, 6 + tag: attack or heal that unit
MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))  # actions 2..5: north, south, east, west
EPISODE_LIMIT = 150  # steps
KILL, WIN = 10.0, 200.0  # rewards, before they are divided by reward_scale
EnemyAI = Literal["sticky", "closest", "focus"]

# --- Units ----------------------------------------------------------------------------------------

COLOSSUS, STALKER, ZEALOT, MARAUDER, MARINE, MEDIVAC = range(6)  # the order of allies' slots
BANELING, HYDRALISK, ZERGLING = range(6, 9)
NAMES = (
    *("Colossus", "Stalker", "Zealot", "Marauder", "Marine", "Medivac"),
    *("Baneling", "Hydralisk", "Zergling"),
)


def _of(*values) -> np.ndarray:
    """An array of what each type has, in the order of NAMES."""
    assert len(values) == len(NAMES)
    return np.array(values)


HEALTH = _of(200.0, 80.0, 100.0, 125.0, 45.0, 150.0, 30.0, 80.0, 35.0)
SHIELD = _of(150.0, 80.0, 50.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
ARMOUR = _of(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)  # reduces hits on hit points only
ARMOURED = _of(True, True, False, True, False, True, False, False, False)
LIGHT = _of(False, False, True, False, True, False, False, True, True)
BIOLOGICAL = _of(False, False, True, True, True, False, True, True, True)
FLYING = _of(False, False, False, False, False, True, False, False, False)
LAYER = _of(1, 0, 0, 0, 0, 2, 0, 0, 0)  # only units of one layer collide: Colossi step over others
DAMAGE = _of(20.0, 10.0, 8.0, 10.0, 6.0, 0.0, 20.0, 12.0, 5.0)  # of one hit
BONUS = _of(0.0, 4.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # added against armoured units
LIGHT_BONUS = _of(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 15.0, 0.0, 0.0)  # added against light units
# From one attack to the next; the wind-up, from its start to the hit; standing still after the hit.
PERIOD = SECOND * _of(2.2, 1.44, 1.2, 1.5, 0.8608, 0.0, 0.833, 0.83, 0.696)
DAMAGE_POINT = SECOND * _of(0.0832, 0.167, 0.0, 0.0, 0.05, 0.0, 0.0, 0.208, 0.167)
BACKSWING = SECOND * _of(0.5, 0.5, 0.5, 0.0, 0.75, 0.0, 0.5, 0.5, 0.5)
RANGE = _of(6.0, 6.0, 0.1, 6.0, 5.0, 4.0, 0.25, 5.0, 0.1)  # edge to edge
SLACK = _of(0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0)  # a target may leave by it in a wind-up
SPEED = _of(2.25, 2.9531, 2.25, 2.25, 2.25, 2.75, 2.5, 2.25, 2.9531) / SECOND  # per frame
ACCELERATION = 2.3125 / SECOND**2  # of the Medivac; all other units reach full speed at once
RADIUS = _of(1.0, 0.625, 0.5, 0.5625, 0.375, 0.75, 0.375, 0.625, 0.375)
SEPARATION = _of(0.75, 0.625, 0.375, 0.5, 0.375, 0.75, 0.375, 0.5, 0.375)  # radius in collisions
HITS_AIR = _of(False, True, False, False, True, False, False, True, False)  # all hit the ground
HAS_MISSILE = _of(False, True, False, True, False, False, False, True, False)
# Per frame. A guess for Stalkers and Marauders, the game's number for Hydralisks.
MISSILE_SPEED = _of(0.0, 15.0, 0.0, 15.0, 0.0, 0.0, 0.0, 40.0, 0.0) / SECOND
LIFE_RATE = _of(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2734, 0.2734, 0.2734) / SECOND  # points per frame

DELAY = SECOND * np.array([-0.0625, 0.125])  # frames added to a period, uniform
ACQUISITION = 5.0  # edge to edge: enemies look for targets within this or their weapon's range
HELP = 4.0  # centre to centre: enemies help a friend that is hit within this distance
LEASH = 21.0  # an enemy gives up a target when it has moved this far from where it chose it
SHIELD_DELAY, SHIELD_RATE = 10 * SECOND, 2.0 / SECOND  # frames without damage; points per frame
ENERGY, MAX_ENERGY, ENERGY_RATE = 50.0, 200.0, 0.5625 / SECOND  # Medivac: first, most, per frame
HEAL_RATE, HEAL_COST = 9.0 / SECOND, 0.33  # hit points per frame, energy per hit point
HEAL_FROM = 5.0  # energy that an enemy Medivac needs to begin to heal a friend
HEAL_SIGHT = 6.0  # edge to edge: how far an enemy Medivac looks for hurt friends
SECOND_HIT, SECOND_SLACK = 0.28 * SECOND, 1.0  # Zealot: frames after the first hit; extra range
BEAM_HIT = 0.375 * SECOND  # Colossus: from the shot to the two hits on its target
BEAM_POINTS, BEAM_STEP, BEAM_HALF = 11, 0.25, 1.25  # each of its two sweeps: half its length last
BEAM_TICK, BEAM_DELAY, BEAM_WIDTH = 0.0312 * SECOND, 0.25 * SECOND, 0.15  # see sweep()
BURST = 2.2  # Baneling: from its centre to the edges of the units that it hits when it dies
COOLDOWN_SCALE = _of(24.0, 35.0, 22.0, 25.0, 15.0, 200.0, 1.0, 10.0, 11.0)  # frames; SMAC's divisor


@dataclass(frozen=True)
class Family:
    """The unit types of a scenario and the teams made of them; both sides have the same team."""

    name: str
    types: tuple[int, ...]  # in the order of the game's ids, as one-hot columns and enemies' slots
    base: range  # how many units a team may have that are not of the special type
    extra: int  # how many units of the special type at most
    special: int  # type; -1: none
    reward_scale: float  # rewards are divided by it
    weights: tuple[float, ...] = ()  # how likely a unit is of each type; (): teams equally likely

    @property
    def n_actions(self) -> int:
        return FIRST_TARGET + (SLOTS if MEDIVAC in self.types else SIDE)

    @property
    def has_shields(self) -> bool:
        return SHIELD[list(self.types)].any()

    @property
    def features(self) -> int:
        """D: tag, actions from 2 on, type, health, shield if any, energy, cooldown, two places."""
        return SLOTS + self.n_actions - 2 + len(self.types) + 1 + self.has_shields + 2 + 4

    @property
    def type_columns(self) -> dict[str, int]:
        """{lower-case name of a unit type: its one-hot column among the D features}."""
        first = SLOTS + self.n_actions - 2
        return {NAMES[t].lower(): first + k for k, t in enumerate(self.types)}

    @property
    def things(self) -> slice:
        """Columns of an agent's row that say where things are: none, see Resource Collection's."""
        return slice(0)

    def teams(self, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """All teams of these sizes, each as the number of units of each of `types`.

        A team has base units in any mixture, 0 to `extra` special ones, and 3 to 8 units in all.
        ValueError if there is no team of one of the sizes, or if `sizes` is empty."""
        common = [t for t in self.types if t != self.special]
        found = []
        for n, k in product(self.base, range(self.extra + 1)):
            for first in range(n + 1):
                count = {common[0]: first, common[1]: n - first, self.special: k}
                if 3 <= n + k <= SIDE:
                    found.append(tuple(count[t] for t in self.types))
        possible = sorted({sum(team) for team in found})
        for size in sizes:
            if size not in possible:
                span = f"{possible[0]} to {possible[-1]}"
                raise ValueError(f"Teams of {self.name} have {span} units: not {size}.")
        if not sizes:
            raise ValueError("At least one team size is needed.")
        return [team for team in found if sum(team) in sizes]

    def shares(self, teams: list[tuple[int, ...]]) -> np.ndarray:
        """(K,) float64: in which share of battles each of K teams is drawn. With `weights`, sizes
        are equally likely; each unit's type is drawn by itself, until the team is one of `teams`.
        """
        if not self.weights:
            return np.full(len(teams), 1 / len(teams))
        share, size = np.ones(len(teams)), np.array([sum(team) for team in teams])
        for k, team in enumerate(teams):
            for number, weight in zip(team, self.weights):
                share[k] *= weight**number / math.factorial(number)
        for n in set(size.tolist()):
            share[size == n] /= share[size == n].sum()
        return share / share.sum()


# reward_scale = (sum of hit points and shields + 10 per unit + 200) / 20 for one team of eight: 7
# Stalkers and a Zealot; 2 Colossi, 5 Stalkers, a Zealot; 5 Marines, a Marauder, 2 Medivacs; in
# SMACv2's families (the last three, with its weights) 1 special unit, 4 of the type with more hit
# points, and 3 others. SMACv2 has no team of Medivacs or Banelings alone: their base is at least 1.
FAMILIES = {
    "sz": Family("sz", (ZEALOT, STALKER), range(3, 9), 0, -1, 77.5),
    "csz": Family("csz", (COLOSSUS, ZEALOT, STALKER), range(3, 7), 2, COLOSSUS, 96.5),
    "mmm": Family("mmm", (MARINE, MARAUDER, MEDIVAC), range(3, 7), 2, MEDIVAC, 46.5),
    "terran": Family(
        "terran", (MARINE, MARAUDER, MEDIVAC), range(1, 9), 8, MEDIVAC, 53.25, (0.45, 0.45, 0.1)
    ),
    "protoss": Family(
        "protoss", (COLOSSUS, ZEALOT, STALKER), range(9), 8, COLOSSUS, 86.0, (0.1, 0.45, 0.45)
    ),
    "zerg": Family(
        "zerg", (BANELING, ZERGLING, HYDRALISK), range(1, 9), 8, BANELING, 36.75, (0.1, 0.45, 0.45)
    ),
}

IDLE, GO, ENGAGE = range(3)  # orders: none, to a point, onto a unit (attack or heal)
NOBODY = -1  # instead of a slot or a type: there is none
NEVER = -1.0  # instead of the time since an event: it has not happened

UNIT = np.dtype(
    [
        ("type", "i1"),  # NOBODY: the slot is empty
        ("tag", "i1"),  # 0..7 of enemies, 8..15 of allies
        ("alive", "?"),
        ("order", "i1"),
        ("target", "i1"),  # slot; used if the order is ENGAGE
        ("winding_at", "i1"),  # slot of the target of its wind-up
        ("second_at", "i1"),  # slot of the target of a Zealot's second hit
        ("attacker", "i1"),  # slot of a unit that hit it in the last frame
        ("x", "f4"),
        ("y", "f4"),
        ("vx", "f4"),  # per frame; Medivacs only
        ("vy", "f4"),
        ("push_x", "f4"),  # by how much shift() moves it
        ("push_y", "f4"),
        ("goal_x", "f4"),  # used if the order is GO
        ("goal_y", "f4"),
        ("chase_x", "f4"),  # where an enemy was when it chose its target
        ("chase_y", "f4"),
        ("health", "f4"),
        ("shield", "f4"),
        ("energy", "f4"),
        ("calm", "f4"),  # frames since it was last damaged
        ("cooldown", "f4"),  # frames until it may attack; below 0: minus frames ready, -1 at least
        ("winding", "f4"),  # frames since its wind-up began, or NEVER
        ("backswing", "f4"),  # frames that it still stands after a hit; below 0: it may walk
        ("second_in", "f4"),  # frames until the second hit, if second_at is a slot
        ("missile_at", "i1"),  # slot of the target of its missile
        ("beam_at", "i1"),  # slot of the target of its beam
        ("missile_x", "f4"),
        ("missile_y", "f4"),
        ("beam_next", "i1"),  # index of the next point of its sweeps
        ("beam_age", "f4"),  # frames since the beam began, or NEVER
        ("beam_x", "f4"),  # middle of its sweeps
        ("beam_y", "f4"),
        ("beam_dx", "f4"),  # direction of its sweeps
        ("beam_dy", "f4"),
        ("beam_in", "f4", (2, SIDE)),  # frames to each sweep's hit on a unit; 0: none, NEVER: done
    ],
    align=True,
)
BATTLE = np.dtype(
    [
        ("random", "u8"),  # state of its random number generator
        ("episode", "i8"),  # number of episodes begun
        ("goal_x", "f4"),  # where the enemy's one order sends it
        ("goal_y", "f4"),
        ("team", "i4"),  # index in Setup.teams
        ("time", "i4"),  # steps since the episode began
        ("reward", "f8"),  # sum over the episode
        ("over", "?"),  # whether it has ended and stands still; only with `once`
    ],
    align=True,
)


class Rules(NamedTuple):
    """Options that change the rules; all battles have the same. Combat explains them."""

    enemy_ai: int  # index in EnemyAI
    weapon_delay: bool
    clip_regeneration: bool
    limit: int  # steps of an episode at most
    reward_scale: float
    once: bool
    bursts: bool  # whether there may be Banelings


class Snapshot(NamedTuple):
    """What can be seen of all units of B battles: tensors or arrays (B, A+E), allies first."""

    type: Any  # int8, NOBODY for an empty slot
    tag: Any  # int8: enemies 0..7, allies 8..15
    alive: Any  # bool
    x: Any  # float32, map units
    y: Any  # float32
    health: Any  # float32, hit points
    shield: Any  # float32
    energy: Any  # float32
    cooldown: Any  # float32, frames


class Observation(NamedTuple):
    """What agents see and which actions they may take: tensors or arrays."""

    entities: Any  # (B, A+E, D) float32: Family.features says what the columns are
    obs_mask: Any  # (B, A+E, A+E) bool: [b, i, j] is True if j is hidden from i
    entity_mask: Any  # (B, A+E) bool: True if the slot is empty
    avail: Any  # (B, A, n_actions) bool: True if the action may be taken


class Episode(NamedTuple):
    """Summary of one episode that has ended."""

    battle: int  # index of the battle
    team: tuple[int, ...]  # number of units of each of the family's types
    length: int  # steps
    reward: float  # sum over the steps
    won: bool
    allies: int  # alive at the end
    enemies: int  # alive at the end


class Step(NamedTuple):
    """What Combat.step() returns. The next step overwrites the tensors."""

    obs: Observation  # after the step; of the new episode where one has ended
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: a side has nobody left who can fight
    truncated: Tensor  # (B,) bool: the episode limit is reached, and not terminated
    final: Snapshot  # at the end of the step, before a new episode begins
    episodes: list[Episode]  # those that this step has ended


# --- Random numbers -------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def mixed(x):
    """SplitMix64's output function, uint64 -> uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def uniform(battle):
    """The next random number of a battle's stream, in [0, 1). Changes battle.random."""
    battle.random += np.uint64(0x9E3779B97F4A7C15)
    return (mixed(battle.random) >> np.uint64(11)) * (1.0 / 2**53)


@njit(cache=True, nogil=True)
def stream(seed, number, episode):
    """The state with which the random numbers of a battle's episode begin, uint64."""
    x = mixed(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15))
    x = mixed(x ^ mixed(np.uint64(number) + np.uint64(0xD1B54A32D192ED03)))
    return mixed(x ^ mixed(np.uint64(episode) + np.uint64(0x8CB92BA72F3D8DD7)))


# --- Rules ----------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def distance(a, b):
    return math.sqrt((a.x - b.x) ** 2 + (a.y - b.y) ** 2)


@njit(cache=True, nogil=True)
def gap(a, b):
    """Distance between the edges of units a and b; negative if they overlap."""
    return distance(a, b) - RADIUS[a.type] - RADIUS[b.type]


@njit(cache=True, nogil=True)
def serves(a, b):
    """Whether a's weapon can hit units of b's type or, if a is a Medivac, whether it heals them."""
    if a.type == MEDIVAC:
        return BIOLOGICAL[b.type]
    return HITS_AIR[a.type] or not FLYING[b.type]


@njit(cache=True, nogil=True)
def give_orders(units, actions):
    """1. Give the agents the orders of their actions (A,). Orders last for the whole step."""
    for i in range(SIDE):
        me, action = units[i], actions[i]
        if not me.alive:
            continue
        if action >= FIRST_TARGET:
            me.target = NOBODY
            for j in range(SLOTS):
                if units[j].type != NOBODY and units[j].tag == action - FIRST_TARGET:
                    me.target = j
            me.order = ENGAGE if me.target != NOBODY else IDLE
            continue  # keeps wind-up and backswing: repeating an attack order changes nothing
        me.order, me.target, me.backswing = IDLE, NOBODY, -1.0
        if action >= FIRST_MOVE:
            dx, dy = MOVES[action - FIRST_MOVE]
            me.order, me.goal_x, me.goal_y = GO, me.x + MOVE * dx, me.y + MOVE * dy


@njit(cache=True, nogil=True)
def choose_target(units, i, enemy_ai):
    """(slot, gap) of the unit that enemy i would attack: of those that it can hit within reach the
    closest (focus: the weakest), Medivacs last; (NOBODY, inf) if there is none."""
    me, best, best_key, best_gap = units[i], NOBODY, np.inf, np.inf
    for j in range(SIDE):
        you = units[j]
        if not you.alive or not serves(me, you):
            continue
        apart = gap(me, you)
        if apart > max(RANGE[me.type], ACQUISITION):
            continue
        key = you.health + you.shield if enemy_ai == 2 else apart
        key += 1e6 * (you.type == MEDIVAC)
        if key < best_key:
            best, best_key, best_gap = j, key, apart
    return best, best_gap


@njit(cache=True, nogil=True)
def called_for_help(units, i):
    """Slot of the nearest unit that hit enemy i or a friend within HELP of it, or NOBODY."""
    me, best, best_gap = units[i], NOBODY, np.inf
    for k in range(SIDE, SLOTS):
        friend = units[k]
        if not friend.alive or friend.attacker == NOBODY or distance(me, friend) > HELP:
            continue
        attacker = units[friend.attacker]
        if attacker.alive and serves(me, attacker) and gap(me, attacker) < best_gap:
            best, best_gap = friend.attacker, gap(me, attacker)
    return best


@njit(cache=True, nogil=True)
def choose_patient(units, i):
    """Slot of the unit that enemy Medivac i heals: its present patient as long as that one is hurt,
    then the one with the smallest share of its hit points left; or NOBODY."""
    me, best, least = units[i], NOBODY, 1.0
    if me.target != NOBODY:
        you = units[me.target]
        needed = you.alive and you.health < HEALTH[you.type]
        needed = needed and me.energy >= HEAL_RATE * HEAL_COST
        if needed and gap(me, you) <= HEAL_SIGHT:
            return me.target
    if me.energy < HEAL_FROM:
        return NOBODY
    for j in range(SIDE, SLOTS):
        you = units[j]
        if you.alive and BIOLOGICAL[you.type] and gap(me, you) <= HEAL_SIGHT:
            part = you.health / HEALTH[you.type]
            if part < least:
                best, least = j, part
    return best


@njit(cache=True, nogil=True)
def command_enemies(units, battle, enemy_ai):
    """2. Orders of the enemy's AI: attack units that come near, else walk to the goal and idle."""
    for i in range(SIDE, SLOTS):
        me = units[i]
        if not me.alive:
            continue
        before = me.target
        if me.type == MEDIVAC:
            me.target = choose_patient(units, i)
        else:
            if me.target != NOBODY:
                gone = math.sqrt((me.x - me.chase_x) ** 2 + (me.y - me.chase_y) ** 2)
                if not units[me.target].alive or gone > LEASH:
                    me.target = before = NOBODY
            if me.target == NOBODY or (enemy_ai != 0 and me.winding == NEVER):
                best, _ = choose_target(units, i, enemy_ai)
                me.target = best if best != NOBODY else me.target
            elif gap(me, units[me.target]) > RANGE[me.type] + 1.0:
                best, apart = choose_target(units, i, enemy_ai)
                if best != NOBODY and apart < gap(me, units[me.target]):
                    me.target = best
            if me.target == NOBODY:
                me.target = called_for_help(units, i)
        if me.target != NOBODY:
            me.order = ENGAGE
            if me.target != before:
                me.chase_x, me.chase_y = me.x, me.y
        else:
            me.goal_x, me.goal_y = battle.goal_x, battle.goal_y
            there = math.sqrt((me.x - me.goal_x) ** 2 + (me.y - me.goal_y) ** 2)
            me.order = GO if there > SPEED[me.type] else IDLE


@njit(cache=True, nogil=True)
def hurt(you, by_slot, by_type):
    """Apply one hit to `you`: shields first; armour reduces what gets through, to .5 at least."""
    amount = DAMAGE[by_type] + BONUS[by_type] * ARMOURED[you.type]
    amount += LIGHT_BONUS[by_type] * LIGHT[you.type]
    you.calm, you.attacker = 0.0, by_slot
    through = amount - you.shield
    you.shield = max(you.shield - amount, 0.0)
    if through > 0.0:
        you.health = max(you.health - max(through - ARMOUR[you.type], 0.5), 0.0)


@njit(cache=True, nogil=True)
def fire(units, i, j, late):
    """Unit i's weapon fires at unit j, `late` frames before the end of this frame."""
    me, you = units[i], units[j]
    if HAS_MISSILE[me.type]:
        me.missile_at, me.missile_x, me.missile_y = j, me.x, me.y
        fly(units, i, late)
    elif me.type == COLOSSUS:
        far = max(distance(me, you), 1e-6)
        me.beam_at, me.beam_age, me.beam_next, me.beam_in[:] = j, late, 0, 0.0
        me.beam_x, me.beam_y = you.x, you.y
        me.beam_dx, me.beam_dy = -(you.y - me.y) / far, (you.x - me.x) / far
        sweep(units, i, late)
    elif me.type == BANELING:
        me.health = 0.0  # it dies, and so bursts, at the end of the frame
    else:
        hurt(you, i, me.type)
        if me.type == ZEALOT:
            me.second_at, me.second_in = j, SECOND_HIT - late


@njit(cache=True, nogil=True)
def fly(units, i, frames):
    """Move unit i's missile towards its target; it is lost if the target dies before it arrives."""
    me = units[i]
    you, reach = units[me.missile_at], MISSILE_SPEED[me.type] * frames
    dx, dy = you.x - me.missile_x, you.y - me.missile_y
    far = math.sqrt(dx * dx + dy * dy)
    if not you.alive:
        me.missile_at = NOBODY
    elif far <= reach:
        hurt(you, i, me.type)
        me.missile_at = NOBODY
    else:
        me.missile_x += dx / far * reach
        me.missile_y += dy / far * reach


@njit(cache=True, nogil=True)
def sweep(units, i, frames):
    """Advance a Colossus's beam by `frames`: two hits on its target, and two mirrored rows with a
    point every BEAM_TICK. A ground unit whose edge is within BEAM_WIDTH of a point when the row
    reaches it is hit BEAM_DELAY later, once per row."""
    me = units[i]
    now, before = me.beam_age, me.beam_age - frames
    foes = SIDE if i < SIDE else 0  # first slot of the other side
    if before < BEAM_HIT <= now and units[me.beam_at].alive:
        hurt(units[me.beam_at], i, me.type)
        hurt(units[me.beam_at], i, me.type)
    for row in range(2):
        for k in range(SIDE):
            if me.beam_in[row, k] > 0.0:
                me.beam_in[row, k] -= frames
                if me.beam_in[row, k] <= 0.0:
                    me.beam_in[row, k] = NEVER  # this row does not hit it again
                    if units[foes + k].alive:
                        hurt(units[foes + k], i, me.type)
    while me.beam_next < BEAM_POINTS and me.beam_next * BEAM_TICK <= now:
        for row in range(2):
            along = (me.beam_next * BEAM_STEP - BEAM_HALF) * (1 - 2 * row)
            x, y = me.beam_x + along * me.beam_dx, me.beam_y + along * me.beam_dy
            for k in range(SIDE):
                you = units[foes + k]
                if you.alive and foes + k != me.beam_at and not FLYING[you.type]:
                    edge = math.sqrt((you.x - x) ** 2 + (you.y - y) ** 2) - RADIUS[you.type]
                    if edge <= BEAM_WIDTH and me.beam_in[row, k] == 0.0:
                        me.beam_in[row, k] = BEAM_DELAY - (now - me.beam_next * BEAM_TICK)
        me.beam_next += 1
    if now > BEAM_POINTS * BEAM_TICK + BEAM_DELAY + 1.0:
        me.beam_age = NEVER


@njit(cache=True, nogil=True)
def heal(units, i):
    me = units[i]
    if me.order != ENGAGE:
        return
    you = units[me.target]
    if serves(me, you) and gap(me, you) <= RANGE[me.type]:
        points = min(HEAL_RATE, HEALTH[you.type] - you.health, me.energy / HEAL_COST)
        you.health += points
        me.energy = max(me.energy - points * HEAL_COST, 0.0)


@njit(cache=True, nogil=True)
def use_weapons(units, battle, weapon_delay):
    """3. Healing; missiles, beams and second hits that are due; wind-ups; new attacks. Units that
    are alive at the start of the frame act, even if they lose their last hit point in it."""
    for i in range(SLOTS):  # healing first: it must not revive a unit that is killed in this frame
        me = units[i]
        me.attacker = NOBODY
        if me.order == ENGAGE and not units[me.target].alive:
            me.order = IDLE
        if me.alive and me.type == MEDIVAC:
            heal(units, i)
    for i in range(SLOTS):
        me = units[i]
        if me.type == NOBODY:
            continue
        if me.missile_at != NOBODY:
            fly(units, i, 1.0)
        if me.beam_age != NEVER:
            me.beam_age += 1.0
            sweep(units, i, 1.0)
        if not me.alive or me.type == MEDIVAC:
            continue
        me.cooldown = max(me.cooldown - 1.0, -1.0)
        me.backswing = max(me.backswing - 1.0, -1.0)
        if me.second_at != NOBODY:
            me.second_in -= 1.0
            if me.second_in <= 0.0:
                you = units[me.second_at]
                if you.alive and gap(me, you) <= RANGE[me.type] + SECOND_SLACK:
                    hurt(you, i, me.type)
                me.second_at = NOBODY
        if me.winding != NEVER:
            me.winding += 1.0
            lost = me.order != ENGAGE or me.target != me.winding_at
            if lost or gap(me, units[me.target]) > RANGE[me.type] + SLACK[me.type]:
                me.winding = NEVER  # cancelled; the cooldown has not begun
        if me.winding == NEVER and me.order == ENGAGE and me.cooldown <= 0.0:
            you = units[me.target]
            if serves(me, you) and gap(me, you) <= RANGE[me.type]:
                me.winding, me.winding_at = -me.cooldown, me.target
        if me.winding != NEVER and me.winding >= DAMAGE_POINT[me.type]:
            late = me.winding - DAMAGE_POINT[me.type]
            me.cooldown = PERIOD[me.type] - me.winding
            if weapon_delay:
                me.cooldown += DELAY[0] + (DELAY[1] - DELAY[0]) * uniform(battle)
            me.backswing, me.winding = BACKSWING[me.type] - late, NEVER
            fire(units, i, me.target, late)


@njit(cache=True, nogil=True)
def shift(units):
    """Move all living units by (push_x, push_y) at once, and keep them inside the map."""
    for i in range(SLOTS):
        me = units[i]
        if me.alive:
            me.x = min(max(me.x + me.push_x, 0.0), EDGE)
            me.y = min(max(me.y + me.push_y, 0.0), EDGE)


@njit(cache=True, nogil=True)
def move(units):
    """4. Units walk straight at full speed, unless they attack or have their target in range."""
    for i in range(SLOTS):
        me = units[i]
        if not me.alive:
            continue
        dx, dy = 0.0, 0.0  # offset of the point that it walks to
        if me.order == GO:
            dx, dy = me.goal_x - me.x, me.goal_y - me.y
        elif me.order == ENGAGE and me.winding == NEVER:
            you = units[me.target]
            if gap(me, you) > RANGE[me.type] or not serves(me, you):
                dx, dy = you.x - me.x, you.y - me.y
        far = math.sqrt(dx * dx + dy * dy) if me.backswing < 0.0 else 0.0
        pace = min(SPEED[me.type], far) / max(far, 1e-9)
        dx, dy = dx * pace, dy * pace
        if FLYING[me.type]:  # a Medivac speeds up and slows down gradually
            ax, ay = dx - me.vx, dy - me.vy
            change = math.sqrt(ax * ax + ay * ay)
            if change > ACCELERATION:
                ax, ay = ax * ACCELERATION / change, ay * ACCELERATION / change
            me.vx, me.vy = me.vx + ax, me.vy + ay
            dx, dy = me.vx, me.vy
        me.push_x, me.push_y = dx, dy
    shift(units)


@njit(cache=True, nogil=True)
def push_apart(units):
    """5. Overlapping units of a layer move apart by half the overlap each; if one of two friends is
    idle, it alone moves. Two passes from the places at their start. Returns the largest overlap."""
    worst = 0.0
    for _ in range(2):
        for i in range(SLOTS):
            units[i].push_x = units[i].push_y = 0.0
        for i in range(SLOTS):
            a = units[i]
            if not a.alive:
                continue
            for j in range(i + 1, SLOTS):
                b = units[j]
                if not b.alive or LAYER[a.type] != LAYER[b.type]:
                    continue
                touching = SEPARATION[a.type] + SEPARATION[b.type]
                dx, dy = a.x - b.x, a.y - b.y
                if dx * dx + dy * dy >= touching * touching:
                    continue
                far = math.sqrt(dx * dx + dy * dy)
                if far > 1e-6:
                    dx, dy = dx / far, dy / far
                else:  # both at one point: any direction that differs from pair to pair
                    angle = 2.399963 * (i * SLOTS + j)
                    dx, dy = math.cos(angle), math.sin(angle)
                overlap = touching - far
                worst = max(worst, overlap)
                part = 0.5  # share of the overlap by which a moves
                if (i < SIDE) == (j < SIDE) and (a.order == IDLE) != (b.order == IDLE):
                    part = 1.0 if a.order == IDLE else 0.0
                a.push_x += dx * overlap * part
                a.push_y += dy * overlap * part
                b.push_x -= dx * overlap * (1.0 - part)
                b.push_y -= dy * overlap * (1.0 - part)
        shift(units)
        if worst == 0.0:
            break
    return worst


@njit(cache=True, nogil=True)
def bury(me):
    me.alive, me.order, me.target, me.second_at = False, IDLE, NOBODY, NOBODY
    me.health, me.shield, me.winding = 0.0, 0.0, NEVER


@njit(cache=True, nogil=True)
def burst_banelings(units):
    """Banelings without hit points die and hit all enemies on the ground whose edge is within BURST
    of their centre; enemy Banelings that this kills burst in turn, in the same frame."""
    again = True
    while again:
        again = False
        for i in range(SLOTS):
            me = units[i]
            if me.type != BANELING or not me.alive or me.health > 0.0:
                continue
            bury(me)
            again = True
            foes = SIDE if i < SIDE else 0  # first slot of the other side
            for j in range(foes, foes + SIDE):
                you = units[j]
                near = you.alive and distance(me, you) - RADIUS[you.type] <= BURST
                if near and not FLYING[you.type]:
                    hurt(you, i, BANELING)


@njit(cache=True, nogil=True)
def regenerate_and_bury(units):
    """6. Units without hit points die; Zerg's hit points, shields and Medivacs' energy grow."""
    for i in range(SLOTS):
        me = units[i]
        if not me.alive:
            continue
        if me.health <= 0.0:
            bury(me)
            continue
        if LIFE_RATE[me.type] > 0.0:
            me.health = min(me.health + LIFE_RATE[me.type], HEALTH[me.type])
        me.calm += 1.0
        if me.calm > SHIELD_DELAY:
            me.shield = min(me.shield + SHIELD_RATE, SHIELD[me.type])
        if me.type == MEDIVAC:
            me.energy = min(me.energy + ENERGY_RATE, MAX_ENERGY)


@njit(cache=True, nogil=True)
def frame(units, battle, rules):
    """Rules 2 to 6 for one frame, all units at once; rule 1 is applied once per step."""
    command_enemies(units, battle, rules.enemy_ai)
    use_weapons(units, battle, rules.weapon_delay)
    move(units)
    push_apart(units)
    if rules.bursts:
        burst_banelings(units)
    regenerate_and_bury(units)


# --- Battles --------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What episodes are drawn from, and how units are ordered and described."""

    seed: int
    first_battle: int
    teams: np.ndarray  # (K, T) int8: of K teams the number of units of each of `types`
    shares: np.ndarray  # (K,) float64: how likely the first, first two, ... are; (0,): all equally
    types: np.ndarray  # (T,) int8, in the order of teams, one-hot columns and enemies' slots
    allies: np.ndarray  # (T,) int8: indices in `types`, in the order of allies' slots
    place: np.ndarray  # (9,) int8: index in `types` of each type, NOBODY if it is not there
    n_actions: int
    has_shields: bool


@njit(cache=True, nogil=True)
def draw_team(battle, setup):
    """The index in setup.teams of the team of a new episode."""
    number, team = uniform(battle), 0
    if len(setup.shares) == 0:
        return int(number * len(setup.teams))
    while number >= setup.shares[team]:
        team += 1
    return team


@njit(cache=True, nogil=True)
def begin(units, battle, number, setup):
    """Begin an episode of a battle: draw teams, places and tags, and set the enemy's goal."""
    battle.random = stream(setup.seed, setup.first_battle + number, battle.episode)
    battle.episode += 1
    battle.time, battle.reward = 0, 0.0
    battle.team = draw_team(battle, setup)
    team, angle = setup.teams[battle.team], 2 * math.pi * uniform(battle)
    for i in range(SLOTS):
        clear(units[i])
    for side in range(2):
        slot, out = SIDE * side, 7.0 - 14.0 * side
        x, y = MAP / 2 + out * math.cos(angle), MAP / 2 + out * math.sin(angle)
        for t in range(len(team)):
            group = setup.allies[t] if side == 0 else t
            dx, dy = 2 * uniform(battle) - 1, 2 * uniform(battle) - 1
            for _ in range(team[group]):
                enlist(units[slot], setup.types[group], x + dx, y + dy)
                slot += 1
    for _ in range(200):  # the units of a group were all put at one point
        if push_apart(units) < 0.01:
            break
    arrange(units)
    for side in range(2):
        for k in range(SIDE):
            units[SIDE * side + k].tag = k + SIDE * (1 - side)
        for k in range(SIDE - 1, 0, -1):
            j = int(uniform(battle) * (k + 1))
            a, b = units[SIDE * side + k], units[SIDE * side + j]
            a.tag, b.tag = b.tag, a.tag
    battle.goal_x = battle.goal_y = 0.0
    for i in range(sum(team)):
        battle.goal_x += units[i].x / sum(team)
        battle.goal_y += units[i].y / sum(team)


@njit(cache=True, nogil=True)
def clear(me):
    """Empty a slot: no unit, and the timers and targets with which a new unit begins."""
    me.type = me.target = me.winding_at = me.second_at = me.attacker = NOBODY
    me.missile_at = me.beam_at = NOBODY
    me.alive, me.order, me.tag = False, IDLE, 0
    me.x = me.y = me.vx = me.vy = me.health = me.shield = me.energy = 0.0
    me.winding = me.beam_age = NEVER
    me.cooldown, me.backswing, me.calm = -1.0, -1.0, 0.0


@njit(cache=True, nogil=True)
def enlist(me, kind, x, y):
    """Put a new unit of type `kind` at (x, y) into an empty slot."""
    me.type, me.alive, me.x, me.y = kind, True, x, y
    me.health, me.shield = HEALTH[kind], SHIELD[kind]
    me.energy = ENERGY if kind == MEDIVAC else 0.0


@njit(cache=True, nogil=True)
def arrange(units):
    """Order units of one side and type by x, then y. Only places are swapped: all else is equal."""
    for i in range(SLOTS):
        for j in range(i + 1, SIDE * (i // SIDE + 1)):
            a, b = units[i], units[j]
            if a.type != NOBODY and a.type == b.type and (b.x, b.y) < (a.x, a.y):
                a.x, b.x = b.x, a.x
                a.y, b.y = b.y, a.y


# --- From a snapshot alone: reward, end, observations ---------------------------------------------


@njit(cache=True, nogil=True)
def strength(snap, b):
    """Of living units: (enemies' hit points and shields, enemies, our fighters, their fighters)."""
    total, living, ours, theirs = 0.0, 0, 0, 0
    for i in range(SLOTS):
        if snap.alive[b, i]:
            fights = snap.type[b, i] != MEDIVAC
            if i < SIDE:
                ours += fights
            else:
                theirs += fights
                living += 1
                total += snap.health[b, i] + snap.shield[b, i]
    return total, living, ours, theirs


@njit(cache=True, nogil=True)
def outcome(before, after, time, rules):
    """Reward, terminated, truncated, won of the time-th step, by strength() before and after it."""
    damage = before[0] - after[0]  # less what enemies regenerated or healed
    damage = max(damage, 0.0) if rules.clip_regeneration else abs(damage)
    ours, theirs = after[2], after[3]
    won = theirs == 0 and ours > 0
    reward = (damage + KILL * (before[1] - after[1]) + WIN * won) / rules.reward_scale
    over = ours == 0 or theirs == 0
    return reward, over, not over and time >= rules.limit, won


@njit(cache=True, nogil=True)
def apart(snap, b, i, j):
    """Distance between the centres of units i and j of battle b."""
    dx, dy = snap.x[b, i] - snap.x[b, j], snap.y[b, i] - snap.y[b, j]
    return math.sqrt(dx * dx + dy * dy)


@njit(cache=True, nogil=True)
def find_available(snap, b, avail):
    """Write the available actions of battle b to avail[b] (A, n_actions) bool."""
    for i in range(SIDE):
        mine = avail[b, i]
        mine[:] = False
        if not snap.alive[b, i]:
            mine[0] = True
            continue
        mine[STOP] = True
        for k in range(len(MOVES)):
            x = math.floor(snap.x[b, i] + MOVES[k][0])
            y = math.floor(snap.y[b, i] + MOVES[k][1])
            mine[FIRST_MOVE + k] = 0 <= x < MAP and 0 <= y < MAP
        heals = snap.type[b, i] == MEDIVAC
        for j in range(0 if heals else SIDE, SIDE if heals else SLOTS):
            near = snap.alive[b, j] and apart(snap, b, i, j) <= SHOOT
            if near and not (heals and FLYING[snap.type[b, j]]):
                mine[FIRST_TARGET + snap.tag[b, j]] = True


@njit(cache=True, nogil=True)
def observe(snap, b, setup, obs):
    """Write the observation of battle b, computed from snap[b], to obs[b]."""
    find_available(snap, b, obs.avail)
    number, x, y = 0, 0.0, 0.0
    for i in range(SLOTS):
        obs.entity_mask[b, i] = snap.type[b, i] == NOBODY
        if snap.type[b, i] != NOBODY:
            number, x, y = number + 1, x + snap.x[b, i], y + snap.y[b, i]
    x, y, far = x / max(number, 1), y / max(number, 1), 1e-6  # the centre of mass
    for i in range(SLOTS):
        if snap.type[b, i] != NOBODY:
            far = max(far, math.sqrt((snap.x[b, i] - x) ** 2 + (snap.y[b, i] - y) ** 2))
        for j in range(SLOTS):
            seen = snap.alive[b, i] and snap.alive[b, j] and apart(snap, b, i, j) <= SIGHT
            obs.obs_mask[b, i, j] = not seen and i != j
    actions, kinds = setup.n_actions - STOP - 1, len(setup.types)
    for i in range(SLOTS):
        row, kind = obs.entities[b, i], snap.type[b, i]
        row[:] = 0.0
        if kind == NOBODY:
            continue
        row[snap.tag[b, i]] = 1.0
        if i < SIDE:
            for k in range(actions):
                row[SLOTS + k] = obs.avail[b, i, k + STOP + 1]
        at = SLOTS + actions
        row[at + setup.place[kind]] = 1.0
        at += kinds
        if not snap.alive[b, i]:
            continue
        row[at] = snap.health[b, i] / HEALTH[kind]
        at += 1
        if setup.has_shields:
            row[at] = snap.shield[b, i] / max(SHIELD[kind], 1.0)
            at += 1
        if i < SIDE:
            row[at] = snap.energy[b, i] / MAX_ENERGY
            row[at + 1] = snap.cooldown[b, i] / COOLDOWN_SCALE[kind]
        row[at + 2] = (snap.x[b, i] - MAP / 2) / MAP
        row[at + 3] = (snap.y[b, i] - MAP / 2) / MAP
        row[at + 4] = (snap.x[b, i] - x) / far
        row[at + 5] = (snap.y[b, i] - y) / far


# --- Kernels: battles lo to hi ------------------------------------------------------------------


@njit(cache=True, nogil=True)
def take(units, snap, b):
    """Copy what can be seen of the units (A+E,) of battle b to snap[b]."""
    for i in range(SLOTS):
        me = units[i]
        snap.type[b, i], snap.tag[b, i], snap.alive[b, i] = me.type, me.tag, me.alive
        snap.x[b, i], snap.y[b, i] = me.x, me.y
        snap.health[b, i], snap.shield[b, i] = me.health, me.shield
        snap.energy[b, i], snap.cooldown[b, i] = me.energy, max(me.cooldown, 0.0)


@njit(cache=True, nogil=True)
def begin_all(lo, hi, units, battles, setup, snap, obs):
    for b in range(lo, hi):
        battles[b].over = False
        begin(units[b], battles[b], b, setup)
        take(units[b], snap, b)
        observe(snap, b, setup, obs)


@njit(cache=True, nogil=True)
def observe_all(snap, setup, obs):
    for b in range(len(snap.type)):
        observe(snap, b, setup, obs)


@njit(cache=True, nogil=True)
def find_unavailable(actions, avail, battles):
    """(battle, agent) of the first action that is not available; agent is SIDE if all are."""
    for b in range(len(actions)):
        for i in range(SIDE):
            u = actions[b, i]
            if not battles[b].over and not (0 <= u < avail.shape[2] and avail[b, i, u]):
                return b, i
    return 0, SIDE


@njit(cache=True, nogil=True)
def advance(lo, hi, units, battles, actions, rules, setup, snap, final, obs, results):
    """Play one step of battles lo to hi - 1; write to snap, final, obs and results (Results)."""
    for b in range(lo, hi):
        battle = battles[b]
        results.reward[b], results.won[b] = 0.0, False
        results.terminated[b] = results.truncated[b] = False
        if battle.over:
            continue
        before = strength(snap, b)
        give_orders(units[b], actions[b])
        for _ in range(FRAMES):
            frame(units[b], battle, rules)
        for i in range(SLOTS):  # the dead stay where they were last seen, as RealBattles has them
            if snap.alive[b, i] and not units[b, i].alive:
                units[b, i].x, units[b, i].y = snap.x[b, i], snap.y[b, i]
        take(units[b], snap, b)
        take(units[b], final, b)
        battle.time += 1
        done = outcome(before, strength(snap, b), battle.time, rules)
        results.reward[b], results.terminated[b], results.truncated[b], results.won[b] = done
        battle.reward += done[0]
        if done[1] or done[2]:
            results.length[b], results.sum[b] = battle.time, battle.reward
            results.team[b] = battle.team
            if rules.once:
                battle.over = True
            else:
                begin(units[b], battle, b, setup)
                take(units[b], snap, b)
        observe(snap, b, setup, obs)


class Results(NamedTuple):
    """What advance() writes, (B,) each; length, sum and team only where an episode has ended."""

    reward: Any
    terminated: Any
    truncated: Any
    won: Any
    length: Any
    sum: Any
    team: Any


# NumPy views of Combat, and the tensors whose memory they share.
VIEWS = {"_snap": "snapshot", "_final": "final", "_obs": "obs", "_results": "results"}


def shared(cls: Any, B: int, **fields: tuple) -> tuple[Any, Any]:
    """cls of zero tensors (B, *shape) and cls of their NumPy views; fields: name=(shape, dtype)."""
    tensors = cls(*(torch.zeros(B, *shape, dtype=kind) for shape, kind in fields.values()))
    assert cls._fields == tuple(fields)
    return tensors, cls(*(x.numpy() for x in tensors))


def new_snapshots(B: int) -> tuple[Snapshot, Snapshot]:
    f4, i1, flag = torch.float32, torch.int8, torch.bool
    kinds = dict(zip(Snapshot._fields, (i1, i1, flag, f4, f4, f4, f4, f4, f4)))
    return shared(Snapshot, B, **{name: ((SLOTS,), kind) for name, kind in kinds.items()})


def new_observations(family: Family, B: int) -> tuple[Observation, Observation]:
    return shared(
        Observation,
        B,
        entities=((SLOTS, family.features), torch.float32),
        obs_mask=((SLOTS, SLOTS), torch.bool),
        entity_mask=((SLOTS,), torch.bool),
        avail=((SIDE, family.n_actions), torch.bool),
    )


def make_setup(family: Family, teams: list[tuple[int, ...]], seed: int, first: int) -> Setup:
    place = np.full(len(NAMES), NOBODY, np.int8)
    place[list(family.types)] = range(len(family.types))
    types = np.array(family.types, np.int8)
    order = np.argsort(types).astype(np.int8)
    shares = np.cumsum(family.shares(teams)) if family.weights else np.zeros(0)
    shares[-1:] = 1.0  # whatever the sum's rounding
    return Setup(
        seed=seed,
        first_battle=first,
        teams=np.array(teams, np.int8).reshape(len(teams), -1),
        shares=shares,
        types=types,
        allies=order,
        place=place,
        n_actions=family.n_actions,
        has_shields=family.has_shields,
    )


class Combat:
    """num_battles simulated battles of one scenario. ValueError for arguments that are not allowed.

    scenario           a name in FAMILIES
    team_sizes         each episode draws one of all teams of these sizes, for both sides
    first_battle       number of the first battle; seed and number determine a battle's draws
    threads            how many threads share the battles; only the speed depends on it
    enemy_ai           sticky: keeps a target, as in the game; closest; focus: the weakest in reach
    weapon_delay       whether weapons' periods vary at random
    clip_regeneration  damage less what enemies regenerate counts as 0 if it is negative; without
                       this its absolute value counts, as in SMAC
    episode_limit      steps
    once               a battle that has ended stands still until reset()
    """

    Episode = Episode
    fixed = ("type", "tag")  # fields of a Snapshot that do not change within an episode

    def __init__(
        self,
        scenario: str = "sz",
        team_sizes: tuple[int, ...] = (3, 4, 5),
        num_battles: int = 1,
        seed: int = 1,
        first_battle: int = 0,
        threads: int = 1,
        enemy_ai: EnemyAI = "sticky",
        weapon_delay: bool = True,
        clip_regeneration: bool = False,
        episode_limit: int = EPISODE_LIMIT,
        once: bool = False,
    ):
        if scenario not in FAMILIES:
            raise ValueError(f"There is no scenario {scenario!r}: there are {', '.join(FAMILIES)}.")
        if enemy_ai not in get_args(EnemyAI):
            kinds = ", ".join(get_args(EnemyAI))
            raise ValueError(f"enemy_ai is one of {kinds}, not {enemy_ai!r}.")
        for name, least, x in (
            ("num_battles", 1, num_battles),
            ("threads", 1, threads),
            ("episode_limit", 1, episode_limit),
            ("seed", 0, seed),
            ("first_battle", 0, first_battle),
        ):
            if x < least:
                raise ValueError(f"{name} is at least {least}: not {x}.")
        self.family, self.num_battles = FAMILIES[scenario], num_battles
        self.teams = self.family.teams(tuple(team_sizes))
        self.setup = make_setup(self.family, self.teams, seed, first_battle)
        ai = get_args(EnemyAI).index(enemy_ai)
        scale = self.family.reward_scale
        self.rules = Rules(
            enemy_ai=ai,
            weapon_delay=weapon_delay,
            clip_regeneration=clip_regeneration,
            limit=episode_limit,
            reward_scale=scale,
            once=once,
            bursts=BANELING in self.family.types,
        )
        self.units = np.zeros((num_battles, SLOTS), UNIT)
        self.battles = np.zeros(num_battles, BATTLE)
        self.snapshot, self._snap = new_snapshots(num_battles)
        self.final, self._final = new_snapshots(num_battles)
        self.obs, self._obs = new_observations(self.family, num_battles)
        f4, f8, i8, flag = torch.float32, torch.float64, torch.int64, torch.bool
        kinds = dict(zip(Results._fields, (f4, flag, flag, flag, i8, f8, i8)))
        rows = {name: ((), kind) for name, kind in kinds.items()}
        self.results, self._results = shared(Results, num_battles, **rows)
        bounds = np.linspace(0, num_battles, min(threads, num_battles) + 1).astype(int).tolist()
        self.spans = list(pairwise(bounds))
        self.pool = ThreadPoolExecutor(len(self.spans)) if len(self.spans) > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in (*VIEWS, "pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, whose tensors and arrays share memory as this object's do."""
        vars(self).update(state)
        for view, name in VIEWS.items():
            tensors = getattr(self, name)
            setattr(self, view, type(tensors)(*(x.numpy() for x in tensors)))
        self.pool = ThreadPoolExecutor(len(self.spans)) if len(self.spans) > 1 else None

    @property
    def over(self) -> Tensor:
        """(B,) bool: which battles have ended and stand still; all False without `once`."""
        return torch.from_numpy(self.battles["over"].copy())

    @property
    def time(self) -> Tensor:
        """(B,) int32: steps since the present episodes began."""
        return torch.from_numpy(self.battles["time"].copy())

    def close(self) -> None:
        """Does nothing. RealBattles (envs/smac/game.py) ends its games here."""

    def seed(self, seed: int) -> None:
        """Restart the battles' random streams with this seed. Call reset() next."""
        self.setup = self.setup._replace(seed=seed)
        self.battles["episode"] = 0

    def reset(self) -> Observation:
        """Begin a new episode in every battle. The next step overwrites the tensors returned."""
        arrays = self.units, self.battles, self.setup, self._snap, self._obs
        self._run(begin_all, *arrays)
        return self.obs

    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Play one step with actions (B, A), ints. ValueError (nothing is changed) before reset(),
        for another shape, or for an unavailable action in a battle that does not stand still."""
        actions = np.asarray(actions)
        if not self.battles["episode"].all():
            raise ValueError("Before step() comes reset().")
        if actions.dtype.kind not in "iu":
            raise ValueError(f"Actions are ints, not {actions.dtype}.")
        actions = actions.astype(np.int64, copy=False)
        if actions.shape != (self.num_battles, SIDE):
            wanted = (self.num_battles, SIDE)
            raise ValueError(f"Actions are {wanted}, not {actions.shape}.")
        b, i = find_unavailable(actions, self._obs.avail, self.battles)
        if i < SIDE:
            raise ValueError(f"Battle {b}, agent {i}: action {actions[b, i]} is not available.")
        arrays = self.units, self.battles, actions, self.rules, self.setup
        self._run(advance, *arrays, self._snap, self._final, self._obs, self._results)
        ended = self._results.terminated | self._results.truncated
        episodes = [self._episode(b) for b in np.flatnonzero(ended).tolist()] if ended.any() else []
        r = self.results
        return Step(self.obs, r.reward, r.terminated, r.truncated, self.final, episodes)

    def observe(self, snapshot: Snapshot) -> Observation:
        """The observations (K, ...) of a Snapshot of CPU tensors (K, A+E), in new tensors; equal to
        those that the battles gave."""
        fields = Snapshot(*(x.contiguous().numpy() for x in snapshot))
        obs, arrays = new_observations(self.family, len(fields.type))
        observe_all(fields, self.setup, arrays)
        return obs

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps and episodes depend on, except for the rules."""
        raw = {"units": self.units, "battles": self.battles}
        rows = {name: torch.from_numpy(x.view(np.uint8).copy()) for name, x in raw.items()}
        drawn_from = {"seed": self.setup.seed, "first_battle": self.setup.first_battle}
        return rows | drawn_from | {"teams": f"{self.family.name} {self.teams}"}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a state_dict(). ValueError if it has other teams or another number of battles."""
        mine = self.state_dict()
        raw = ("units", "battles")
        if saved["teams"] != mine["teams"] or any(saved[k].shape != mine[k].shape for k in raw):
            raise ValueError(f"This state is not of {self.num_battles} battles of {mine['teams']}.")
        for name in raw:
            getattr(self, name).view(np.uint8)[:] = saved[name].numpy()
        drawn_from = {name: saved[name] for name in ("seed", "first_battle")}
        self.setup = self.setup._replace(**drawn_from)
        for b in range(self.num_battles):
            take(self.units[b], self._snap, b)
            if self.battles["over"][b]:
                take(self.units[b], self._final, b)
        observe_all(self._snap, self.setup, self._obs)

    def _run(self, kernel: Any, *args: Any) -> None:
        if self.pool is None:
            kernel(0, self.num_battles, *args)
            return
        for job in [self.pool.submit(kernel, lo, hi, *args) for lo, hi in self.spans]:
            job.result()

    def _episode(self, b: int) -> Episode:
        r, alive = self._results, self._final.alive[b]
        team, left = self.teams[r.team[b]], (int(alive[:SIDE].sum()), int(alive[SIDE:].sum()))
        return Episode(b, team, int(r.length[b]), float(r.sum[b]), bool(r.won[b]), *left)
