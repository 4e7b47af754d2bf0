"""envs/smac/combat.py against shared/specs/combat.md, by measuring: its numbers are typed again
here, in seconds of the data, and its geometry is done again in NumPy. Nothing is read from the
simulator's own tables."""

import itertools
import math
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from envs.smac.combat import (
    BANELING,
    COLOSSUS,
    ENGAGE,
    GO,
    HYDRALISK,
    IDLE,
    MARAUDER,
    MARINE,
    MEDIVAC,
    STALKER,
    ZEALOT,
    ZERGLING,
    Combat,
    Snapshot,
    burst_banelings,
    clear,
    enlist,
    frame,
    give_orders,
    push_apart,
    regenerate_and_bury,
    use_weapons,
)
from envs.smac.combat import move as walk


class Kind(NamedTuple):
    """A column of the specification's table."""

    health: float
    shield: float
    armour: float
    armoured: bool
    biological: bool
    damage: float  # of one hit
    bonus: float  # against the armoured
    hits: int  # on the target, of one attack
    period: float
    point: float
    range: float
    speed: float
    radius: float
    separation: float
    backswing: float
    hits_air: bool


F, T = False, True
TABLE = {
    STALKER: Kind(80, 80, 1, T, F, 10, 4, 1, 1.44, 0.167, 6, 2.9531, 0.625, 0.625, 0.5, T),
    ZEALOT: Kind(100, 50, 1, F, T, 8, 0, 2, 1.2, 0, 0.1, 2.25, 0.5, 0.375, 0.5, F),
    COLOSSUS: Kind(200, 150, 1, T, F, 20, 0, 2, 2.2, 0.0832, 6, 2.25, 1, 0.75, 0.5, F),
    MARINE: Kind(45, 0, 0, F, T, 6, 0, 1, 0.8608, 0.05, 5, 2.25, 0.375, 0.375, 0.75, T),
    MARAUDER: Kind(125, 0, 1, T, T, 10, 10, 1, 1.5, 0, 6, 2.25, 0.5625, 0.5, 0, F),
    MEDIVAC: Kind(150, 0, 1, T, F, 0, 0, 0, 0, 0, 4, 2.75, 0.75, 0.75, 0, F),
    BANELING: Kind(30, 0, 0, F, T, 20, 0, 1, 0.833, 0, 0.25, 2.5, 0.375, 0.375, 0.5, F),
    HYDRALISK: Kind(80, 0, 0, F, T, 12, 0, 1, 0.83, 0.208, 5, 2.25, 0.625, 0.5, 0.5, T),
    ZERGLING: Kind(35, 0, 0, F, T, 5, 0, 1, 0.696, 0.167, 0.1, 2.9531, 0.375, 0.375, 0.5, F),
}
SECOND = 16  # frames
ZERG = {BANELING, HYDRALISK, ZERGLING}  # what only they do: test_combat_zerg.py
FIGHTERS = tuple(kind for kind in TABLE if kind not in (MEDIVAC, BANELING))
GROUND = {ZEALOT, STALKER, MARINE, MARAUDER} | ZERG  # one layer; Colossi, Medivacs have their own
STOP, NORTH, SOUTH, EAST, WEST = 1, 2, 3, 4, 5
SIZES = (3, 4, 5, 6, 7, 8)
ONE_HOT = {"sz": (ZEALOT, STALKER), "csz": (COLOSSUS, ZEALOT, STALKER)}
ONE_HOT["mmm"] = (MARINE, MARAUDER, MEDIVAC)  # also the order of enemies' slots
ONE_HOT |= {"terran": ONE_HOT["mmm"], "protoss": ONE_HOT["csz"]}
ONE_HOT["zerg"] = (BANELING, ZERGLING, HYDRALISK)
ALLIES = {"sz": (STALKER, ZEALOT), "csz": (COLOSSUS, STALKER, ZEALOT)}
ALLIES["mmm"] = (MARAUDER, MARINE, MEDIVAC)
ALLIES |= {"terran": ALLIES["mmm"], "protoss": ALLIES["csz"]}
ALLIES["zerg"] = (BANELING, HYDRALISK, ZERGLING)
FAMILIES = tuple(ONE_HOT)
SCALE = {"sz": 77.5, "csz": 96.5, "mmm": 46.5, "terran": 53.25, "protoss": 86.0, "zerg": 36.75}
COOLDOWN = {MARINE: 15, MARAUDER: 25, MEDIVAC: 200, STALKER: 35, ZEALOT: 22, COLOSSUS: 24}
COOLDOWN |= {BANELING: 1, HYDRALISK: 10, ZERGLING: 11}
MISSILES = {STALKER: 15, MARAUDER: 15, HYDRALISK: 40}  # units per second


def field(*placed, family="mmm", goal=(16.0, 16.0), **options):
    """A battle between nobody but these: (slot, type, x, y). Tags are as slots: of enemies
    slot - 8, of allies slot + 8. `goal`: where the enemy is ordered to."""
    options = {"seed": 1, "weapon_delay": False} | options
    c = Combat(family, (3,), 1, **options)
    c.reset()
    for i in range(16):
        clear(c.units[0, i])
    for slot, kind, x, y in placed:
        enlist(c.units[0, slot], kind, x, y)
        c.units[0, slot]["tag"] = slot + 8 if slot < 8 else slot - 8
    c.battles[0]["goal_x"], c.battles[0]["goal_y"] = goal
    return seen(c)


def seen(c):
    """Snapshots and observations anew, after units have been changed by hand."""
    c.load_state_dict(c.state_dict())
    return c


def tick(c, frames=1, ai=False):
    """Frames; enemies keep the orders they have unless `ai`."""
    units, battle = c.units[0], c.battles[0]
    for _ in range(frames):
        if ai:
            frame(units, battle, c.rules)
        else:
            use_weapons(units, battle, c.rules.weapon_delay)
            walk(units)
            push_apart(units)
            burst_banelings(units)
            regenerate_and_bury(units)


def attack(c, i, j):
    """Or heal."""
    c.units[0, i]["order"], c.units[0, i]["target"] = ENGAGE, j


def tell(c, **actions):
    """a0=EAST, ...: actions of allies; those not named get stop."""
    row = np.full(8, STOP)
    for name, action in actions.items():
        row[int(name[1:])] = action
    give_orders(c.units[0], row)


def at(c, slot):
    return np.array([c.units[0, slot]["x"], c.units[0, slot]["y"]], float)


def duel(attacker, target, gap, side=0, **options):
    """Two units whose edges are `gap` apart, and the first is ordered onto the second. Returns the
    battle and their slots."""
    far = gap + TABLE[attacker].radius + TABLE[target].radius
    i, j = (0, 8) if side == 0 else (8, 0)
    c = field((i, attacker, 12.0, 16.0), (j, target, 12.0 + far, 16.0), **options)
    attack(c, i, j)
    return c, i, j


def losses(c, slot, frames, fixed=True, ai=False):
    """[(frame, hit points, shield)] that a unit loses; each loss is made good at once, and nobody
    moves it if `fixed`."""
    me, found = c.units[0, slot], []
    full = [me[k].item() for k in ("health", "shield", "x", "y")]
    for n in range(1, frames + 1):
        tick(c, ai=ai)
        lost = full[0] - me["health"].item(), full[1] - me["shield"].item()
        if max(lost) > 0:
            found.append((n, *lost))
        me["health"], me["shield"] = full[:2]
        if fixed:
            me["x"], me["y"] = full[2:]
    return found


def can_hit(attacker, target):
    return target != MEDIVAC or TABLE[attacker].hits_air


def choose(avail, rng, eager=1.0):
    """Random available actions; attacks `eager` times as likely."""
    chance = np.where(np.arange(avail.shape[-1]) >= 6, eager, 1.0)
    return (avail * chance * (0.01 + rng.random(avail.shape))).argmax(-1)


def copied(x):
    """A snapshot, or observations, as NumPy arrays of their own."""
    return type(x)(*(np.array(y.numpy()) for y in x))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


# --- Weapons --------------------------------------------------------------------------------------


@pytest.mark.long
def test_frames_a_marine_needs_to_kill_a_zealot():
    """Hits fall .05 s + k * .8608 s after the order: frames .8 + 13.7728 k. 8 of 6 leave 2 of 50
    shield; the ninth takes those and 6 - 2 - 1 = 3 hit points of 100; then 5 each: 20 more for 97.
    The 29th hit falls at .8 + 28 * 13.7728 = 386.4: in the 387th frame."""
    for side in (0, 1):
        c, _, j = duel(MARINE, ZEALOT, 4.0, side)
        tick(c, 386)
        zealot = c.units[0, j]
        assert zealot["alive"] and zealot["health"] == 100 - 3 - 19 * 5 and zealot["shield"] == 0
        tick(c)
        assert not zealot["alive"]


@pytest.mark.long
def test_frames_a_zealot_needs_to_kill_a_marine():
    """45 hit points, 8 a hit: the sixth, the second of the third attack: 2 * 19.2 + 4.48 = 42.9."""
    c, _, j = duel(ZEALOT, MARINE, 0.05)
    tick(c, 42)
    assert c.units[0, j]["health"] == 45 - 5 * 8
    tick(c)
    assert not c.units[0, j]["alive"]


@pytest.mark.parametrize("target", [kind for kind in TABLE if kind not in ZERG])
@pytest.mark.parametrize("attacker", FIGHTERS)
def test_damage_bonus_and_armour(attacker, target):
    """One attack, on shields alone and on hit points alone, from either side."""
    me, you = TABLE[attacker], TABLE[target]
    one = me.damage + me.bonus * you.armoured
    for side, shield in itertools.product((0, 1), sorted({0, you.shield})):
        c, _, j = duel(attacker, target, 0.05, side)
        unit = c.units[0, j]
        assert (unit["health"], unit["shield"]) == (you.health, you.shield)
        unit["shield"] = shield
        lost = losses(c, j, math.ceil(me.period * SECOND) - 2)
        total = np.sum([x[1:] for x in lost] or [(0, 0)], 0)
        wanted = (0, me.hits * one) if shield else (me.hits * (one - you.armour), 0)
        assert np.allclose(total, wanted if can_hit(attacker, target) else 0), (side, shield)


@pytest.mark.parametrize(
    "shield, health",
    [(6, 100), (4, 99), (5, 99.5), (5.75, 99.5), (6.5, 100)],
)
def test_shields_go_first_and_armour_takes_from_what_comes_through(shield, health):
    """6 of a Marine on a Zealot with little shield left: what comes through less 1, at least .5."""
    c, _, j = duel(MARINE, ZEALOT, 4.0)
    c.units[0, j]["shield"] = shield
    tick(c)
    assert np.isclose(c.units[0, j]["health"], health)
    assert np.isclose(c.units[0, j]["shield"], max(shield - 6, 0))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("attacker", FIGHTERS)
def test_every_hit_falls_when_it_is_due(attacker, side):
    """The k-th falls damage point + k periods after the order, in the frame that this lies in: no
    period is rounded, and no fraction lost, over some hundred attacks."""
    me, frames = TABLE[attacker], 3000
    c, i, j = duel(attacker, MARAUDER, 0.05, side)
    c.units[0, j]["health"] = 1000
    place = at(c, i)
    hit = np.array([n for n, _, _ in losses(c, j, frames)], float)
    assert np.allclose(at(c, i), place)
    period, delays = me.period * SECOND, [me.point * SECOND]
    if attacker == ZEALOT:
        delays.append(0.28 * SECOND)
    elif attacker == COLOSSUS:
        delays[0] += 0.375 * SECOND
    hit = hit[: len(hit) // len(delays) * len(delays)].reshape(-1, len(delays)).T
    assert abs(hit.shape[1] - frames / period) < 2
    for times, delay in zip(hit, delays):
        late = times - np.arange(len(times)) * period - delay
        if attacker in MISSILES:  # their flight: not less than edge to edge
            centres, speed = 0.05 + me.radius + TABLE[MARAUDER].radius, MISSILES[attacker]
            assert 0.05 / speed * SECOND - 0.02 < late.min() < centres / speed * SECOND + 1
            assert np.ptp(late) < 1.02
        else:
            assert late.min() > -0.02 and late.max() < 1.02
            assert late.min() < 0.22  # periods that leave fifths of a frame


def moment(attacker, far):
    """Frames from the start of an attack to its first hit, to within .01: from the frames in which
    it is seen when the weapon is ready some part of a frame later. Centres are `far` apart."""
    parts, found = np.arange(0.005, 1, 0.01), []
    for part in parts:
        c = field((0, attacker, 10, 16), (8, MARAUDER, 10 + far, 16))
        attack(c, 0, 8)
        c.units[0, 0]["cooldown"] = part
        full = c.units[0, 8]["health"].item()
        for n in range(1, 40):
            tick(c)
            if c.units[0, 8]["health"] < full:
                found.append(n)
                break
    found = np.array(found)
    first = found[0] - np.searchsorted(found, found[0], "right") / 100
    assert (np.diff(found) >= 0).all() and np.ptp(found) <= 1
    return first


@pytest.mark.parametrize("attacker, due", [(ZEALOT, 0), (MARINE, 0.05), (COLOSSUS, 0.0832 + 0.375)])
def test_moments_within_a_frame(attacker, due):
    """Damage points, and a beam's delay, to a hundredth of a frame."""
    first = moment(attacker, 1.1 if attacker == ZEALOT else 4.0)
    assert abs(first - due * SECOND) < 0.02


def test_moments_of_missiles():
    """The flight is from centre to centre or edge to edge: less than .07 between the two here."""
    late, soon = (moment(attacker, 4.0) for attacker in (STALKER, MARAUDER))
    assert abs(late - soon - 0.167 * SECOND) < 0.1
    assert abs(moment(MARAUDER, 7.0) - soon - 3 / 15 * SECOND) < 0.03


@pytest.mark.parametrize("attacker", FIGHTERS)
def test_damage_points(attacker):
    """A stop before it: nothing comes of the attack, and the next one begins at once. After it:
    the hit falls, and the next one has to wait for the period."""
    me = TABLE[attacker]
    due = max(math.ceil(me.point * SECOND), 1)  # frames
    again = []
    for wait in (due - 1, due):
        c, i, j = duel(attacker, MARAUDER, 0.05)
        lost = losses(c, j, wait)
        tell(c)
        lost += losses(c, j, 12)
        assert len(lost) == (me.hits if attacker == ZEALOT else 1) * (wait == due)
        attack(c, i, j)
        again.append(losses(c, j, 60)[0][0])
    c, i, j = duel(attacker, MARAUDER, 0.05)
    assert again[0] == losses(c, j, 30)[0][0]  # as if never stopped
    assert abs(again[1] - again[0] - max(me.period * SECOND - due - 12, 0)) <= 1


@pytest.mark.parametrize("action", [STOP, NORTH, WEST])
def test_a_wind_up_that_is_called_off_uses_no_cooldown(action):
    c, _, j = duel(STALKER, MARAUDER, 3.0)
    place = at(c, 0)
    tick(c, 2)  # of 2.67
    tell(c, a0=action)
    assert losses(c, j, 16) == []
    c.units[0, 0]["x"], c.units[0, 0]["y"] = place
    attack(c, 0, j)
    fresh, _, _ = duel(STALKER, MARAUDER, 3.0)
    first = losses(fresh, j, 30)[0][0]
    assert losses(c, j, 30)[0][0] == first


@pytest.mark.parametrize("attacker", FIGHTERS)
def test_the_same_attack_again_resets_nothing(attacker):
    once, i, j = duel(attacker, MARINE, 0.05)
    often, _, _ = duel(attacker, MARINE, 0.05)
    plain = losses(once, j, 200)
    repeated = []
    for n in range(200):
        tell(often, a0=6)
        repeated += [(n + 1, *x[1:]) for x in losses(often, j, 1)]
    assert plain == repeated and len(plain) > 4


def test_weapons_cool_down_whatever_their_owner_does():
    """A Marine that walks between two shots fires the second no later."""
    c, _, j = duel(MARINE, MARAUDER, 3.0)
    hit = [n for n, _, _ in losses(c, j, 20)]
    c, _, j = duel(MARINE, MARAUDER, 3.0)
    assert [n for n, _, _ in losses(c, j, 1)] == hit[:1]
    tell(c, a0=NORTH)
    assert losses(c, j, 8) == []
    tell(c, a0=6)
    assert losses(c, j, 20)[0][0] == hit[1] - 9


@pytest.mark.parametrize("attacker", TABLE)
def test_ranges_are_edge_to_edge(attacker):
    """Just inside it, a unit stands and acts; just outside it walks first."""
    me = TABLE[attacker]
    for target in TABLE:
        if attacker == MEDIVAC and not TABLE[target].biological:
            continue
        if not can_hit(attacker, target):
            continue
        for gap, inside in ((me.range - 0.01, True), (me.range + 0.01, False)):
            c, i, j = duel(attacker, target, gap)
            if attacker == MEDIVAC:
                c.units[0, j]["health"] -= 10
            health, shield = (c.units[0, j][k].item() for k in ("health", "shield"))
            start = at(c, i)
            tick(c)
            if attacker == MEDIVAC:
                grown = c.units[0, j]["health"] - health
                assert (grown > 0.1) == inside  # Zerg regenerate .017
            assert (np.abs(at(c, i) - start).max() < 1e-6) == inside, target
            tick(c, 23)
            if inside:
                assert (c.units[0, j]["health"], c.units[0, j]["shield"]) != (health, shield)


@pytest.mark.parametrize(
    "attacker, wait, drift, fires",
    [
        (STALKER, 2, 0.95, True),
        (STALKER, 2, 1.05, False),
        (COLOSSUS, 1, -0.05, True),
        (COLOSSUS, 1, 0.05, False),
        (MARINE, 14, 0.95, True),  # in its second wind-up: from 13.77 to 14.57
        (MARINE, 14, 1.05, False),
    ],
)
def test_a_target_may_drift_out_of_range_during_the_wind_up(attacker, wait, drift, fires):
    me = TABLE[attacker]
    c, i, j = duel(attacker, MARAUDER, me.range - 0.2)
    tick(c, wait)
    before = c.units[0, j]["health"].item()
    c.units[0, j]["x"] += drift + 0.2
    tick(c)
    if attacker == MARINE:
        assert (c.units[0, j]["health"] < before) == fires
    else:
        tell(c)  # no second chance
        tick(c, 20)
        assert (c.units[0, j]["health"] < before) == fires


@pytest.mark.parametrize("attacker", FIGHTERS)
def test_backswing(attacker):
    """After the hit a unit under an attack order stands for it, also under one on another target;
    a stop or a move ends it."""
    me = TABLE[attacker]
    fired = max(math.ceil(me.point * SECOND), 1)
    still = me.point * SECOND + me.backswing * SECOND  # frames since the order

    def fled():
        """The target is gone right after the attack."""
        c, i, j = duel(attacker, MARINE, 0.05)
        tick(c, fired)
        c.units[0, j]["x"] += 12
        return c, i, j, at(c, i)

    for tag in (0, 1):  # the same target, another one
        c, i, j, start = fled()
        enlist(c.units[0, 9], MARINE, 28.0, 16.0)
        c.units[0, 9]["tag"] = 1
        tell(c, a0=6 + tag)
        assert c.units[0, i]["target"] == 8 + tag
        n = fired
        while np.allclose(at(c, i), start):
            tick(c)
            n += 1
        # The frame in which it ends, or the next; a Zealot's counts from its first hit.
        assert max(math.floor(still), fired) < n <= max(math.ceil(still), fired) + 1
    for action in (STOP, WEST):
        c, i, j, start = fled()
        tell(c, a0=action)
        if action == STOP:
            tick(c)
            assert np.allclose(at(c, i), start)
            tell(c, a0=6)
        tick(c)
        step = me.speed / SECOND * (1 if action == STOP else -1)
        assert np.allclose(at(c, i) - start, (step, 0), atol=1e-4)


@pytest.mark.parametrize("attacker", [STALKER, MARAUDER])
def test_missiles_fly_15_a_second(attacker):
    """By the difference that 5 more make, over all phases of a period."""
    times = []
    for gap in (0.75, 5.75):
        c, _, j = duel(attacker, COLOSSUS, gap)
        times.append(np.mean([n for n, _, _ in losses(c, j, 2400)][:90]))
    assert abs(times[1] - times[0] - 5 / 15 * SECOND) < 0.7


@pytest.mark.parametrize("attacker", [STALKER, MARAUDER])
def test_missiles_home_and_outlive_their_shooter(attacker):
    c, i, j = duel(attacker, MARAUDER, 5.9)
    tick(c, 3)  # it is in the air
    full = c.units[0, j]["health"].item()
    c.units[0, i]["health"] = 0.0
    tick(c)
    assert not c.units[0, i]["alive"] and c.units[0, j]["health"] == full
    c.units[0, j]["y"] += 6  # far to the side
    tick(c, 12)
    assert c.units[0, j]["health"] == full - TABLE[attacker].damage - TABLE[attacker].bonus + 1


def test_a_missile_for_the_dead_hits_nobody():
    c = field((0, STALKER, 10, 16), (8, MARINE, 16, 16), (9, MARINE, 15, 16), (10, MARINE, 16, 17))
    attack(c, 0, 8)
    tick(c, 3)
    c.units[0, 8]["health"] = 0.0
    tick(c, 30)
    assert not c.units[0, 8]["alive"] and c.units[0, 8]["health"] == 0
    assert c.units[0, 9]["health"] == c.units[0, 10]["health"] == 45


def test_missiles_wait_for_no_one():
    """Two Stalkers on one Marine with 10 left: one missile is enough, the other is lost, and its
    cooldown with it."""
    c = field((0, STALKER, 12, 16), (1, STALKER, 12, 18), (8, MARINE, 16, 17), (9, MARINE, 16, 19))
    c.units[0, 8]["health"] = 10
    attack(c, 0, 8)
    attack(c, 1, 8)
    tick(c, 10)
    assert not c.units[0, 8]["alive"]
    attack(c, 0, 9)
    attack(c, 1, 9)
    lost = [n for n, _, _ in losses(c, 9, 40)]
    assert min(lost) >= 23 + 2 - 10


@pytest.mark.parametrize(
    "gap, alive, falls",
    [(0.05, True, True), (1.05, True, True), (1.15, True, False), (0.05, False, False)],
)
def test_second_hit_of_a_zealot(gap, alive, falls):
    """.28 s after the first, if the target lives and is within its range + 1: 1.1."""
    c, i, j = duel(ZEALOT, MARAUDER, 0.05)
    full = c.units[0, j]["health"].item()
    tick(c, 4)
    assert c.units[0, j]["health"] == full - 7
    c.units[0, j]["x"] += gap - 0.05
    c.units[0, i]["order"] = IDLE  # it does not follow
    if not alive:
        c.units[0, j]["health"] = 0
        full = 7
    tick(c)  # the first fell at 0, this one at 4.48
    assert c.units[0, j]["health"] == full - 7 - 7 * falls
    tick(c, 10)
    assert c.units[0, j]["health"] == full - 7 - 7 * falls


def test_a_unit_cannot_attack_what_its_weapon_does_not_reach():
    """A Zealot, Colossus or Marauder ordered onto a Medivac walks there and does nothing."""
    for attacker in (ZEALOT, COLOSSUS, MARAUDER):
        c, i, j = duel(attacker, MEDIVAC, 3.0)
        tick(c, 100)
        assert np.abs(at(c, i) - at(c, j)).max() < 0.2
        assert c.units[0, j]["health"] == 150 and c.units[0, i]["cooldown"] <= 0


def test_weapon_delay_is_uniform():
    """A Zealot's attack falls at once; the cooldown after a frame is 19.2 - 1 + 16 U."""
    found = []
    c = field(weapon_delay=True)
    for _ in range(300):
        for k in range(8):
            for slot, x in ((k, 10), (k + 8, 11.05)):
                clear(c.units[0, slot])
                enlist(c.units[0, slot], ZEALOT, x, 4.0 + 3 * k)
            attack(c, k, k + 8)
        tick(c)
        found += c.units[0]["cooldown"][:8].tolist()
    delay = (np.array(found) + 1) / SECOND - 1.2
    assert delay.min() >= -0.0625 - 1e-5 and delay.max() <= 0.125 + 1e-5
    assert stats.kstest(delay, "uniform", (-0.0625, 0.1875)).pvalue > 1e-3
    pairs = np.corrcoef(delay[:-1], delay[1:])[0, 1]
    assert abs(pairs) < 4 / math.sqrt(len(delay))


@pytest.mark.parametrize("attacker", FIGHTERS)
def test_mean_period_with_delay(attacker):
    """.03125 s longer on average; each delay's standard deviation is .1875 / sqrt(12) s."""
    c, i, j = duel(attacker, MARAUDER, 0.05, weapon_delay=True)
    c.units[0, j]["health"] = 1000
    hits = np.array([n for n, _, _ in losses(c, j, 12000)])
    hits = hits[:: 2 if attacker == ZEALOT else 1]
    gaps = np.diff(hits) / SECOND
    sigma = 0.1875 / math.sqrt(12 * len(gaps)) + 1 / SECOND / len(gaps)
    assert abs(gaps.mean() - TABLE[attacker].period - 0.03125) < 4 * sigma
    assert gaps.std() > 0.04


# --- Colossus -------------------------------------------------------------------------------------

SHOT = 0.0832 * SECOND  # frames since the order


@pytest.mark.parametrize("target", sorted((GROUND - ZERG) | {COLOSSUS}))
def test_two_hits_of_a_colossus_on_its_target(target):
    """Both .375 s after the shot: at 1.33 + 6 frames."""
    for side in (0, 1):
        c, _, j = duel(COLOSSUS, target, 5.0, side)
        c.units[0, j]["shield"] = 0
        c.units[0, j]["health"] = 500
        assert losses(c, j, 34) == [(8, 2 * (20 - TABLE[target].armour), 0)]


def plain_sweep(source, target, places, kinds):
    """Frames in which each is hit, from the specification."""
    d = (target - source) / np.linalg.norm(target - source)
    across = np.array([-d[1], d[0]])
    found, narrow = [], False
    for place, kind in zip(places, kinds):
        times = []
        for sign in (1, -1):
            for k in range(11):
                point = target + sign * (-1.25 + 0.25 * k) * across
                edge = np.linalg.norm(place - point) - TABLE[kind].radius
                narrow |= abs(edge - 0.15) < 1e-3
                if edge <= 0.15 and kind != MEDIVAC:
                    times.append(math.ceil(SHOT + (k * 0.0312 + 0.25) * SECOND))
                    break
        found.append(sorted(times))
    return found, narrow


def test_sweeps_of_a_colossus():
    """Random crowds around the target: who is hit, and in which frames, is as enumerated; not
    those in the air, nor friends, nor anybody twice in a sweep."""
    rng, numbers = np.random.default_rng(3), []
    for _ in range(150):
        side = int(rng.integers(2))
        ours, theirs = (0, 8) if side == 0 else (8, 0)
        source, angle = np.array([16.0, 16.0]), rng.uniform(0, 2 * math.pi)
        target = source + rng.uniform(3, 7) * np.array([math.cos(angle), math.sin(angle)])
        kinds = rng.choice([ZEALOT, STALKER, MARINE, MARAUDER, COLOSSUS, MEDIVAC], 7)
        places = (target + rng.uniform(-2.6, 2.6, (7, 2))).astype(np.float32)
        target = target.astype(np.float32)
        wanted, narrow = plain_sweep(source, target, places, kinds)
        if narrow:
            continue
        c = field((ours, COLOSSUS, *source), (theirs, ZEALOT, *target))
        for k in range(7):
            enlist(c.units[0, theirs + 1 + k], kinds[k], *places[k])
            enlist(c.units[0, ours + 1 + k], kinds[k], *places[k])
        c.units[0]["shield"], c.units[0]["health"] = 0, 500
        attack(c, ours, theirs)
        found = [[] for _ in range(7)]
        for n in range(1, 30):
            before = c.units[0]["health"].copy()
            use_weapons(c.units[0], c.battles[0], False)
            regenerate_and_bury(c.units[0])
            lost = before - c.units[0]["health"]
            assert (lost[ours : ours + 8] == 0).all()
            assert lost[theirs] == (38 if n == 8 else 0)
            for k in range(7):
                one = 20 - TABLE[kinds[k]].armour
                assert lost[theirs + 1 + k] in (0, one, 2 * one)
                found[k] += [n] * round(lost[theirs + 1 + k] / one)
        assert found == wanted
        numbers += map(len, wanted)
    assert numbers.count(2) > 100 and numbers.count(0) > 100 and set(numbers) == {0, 2}


def test_the_ends_of_a_sweep():
    """Points lie at most 1.25 to the side: a Marine's centre counts up to 1.25 + .15 + .375, and
    up to .15 + .375 before or behind the target."""
    for dx, dy, hurt in (
        (0, 1.77, True),
        (0, 1.78, False),
        (0.52, 0, True),
        (0.53, 0, False),
        (-0.52, 0, True),
        (-0.53, 0, False),
    ):
        c = field((0, COLOSSUS, 10, 16), (8, ZEALOT, 16, 16), (9, MARINE, 16 + dx, 16 + dy))
        attack(c, 0, 8)
        for _ in range(30):
            use_weapons(c.units[0], c.battles[0], False)
        assert (c.units[0, 9]["health"] < 45) == hurt


# --- Medivacs and shields -------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
def test_healing_costs_energy(side):
    """9 hit points a second, .33 energy each, while .5625 come back."""
    i, j = 8 * side, 8 * side + 1
    c = field((i, MEDIVAC, 16, 16), (j, MARAUDER, 17, 16))
    c.units[0, j]["health"] = 20
    assert c.units[0, i]["energy"] == 50
    attack(c, i, j)
    tick(c, 10 * SECOND)
    assert np.isclose(c.units[0, j]["health"], 110, atol=1e-2)
    assert np.isclose(c.units[0, i]["energy"], 50 - 90 * 0.33 + 5.625, atol=1e-2)
    tick(c, 10 * SECOND)  # full: no more is paid for
    assert c.units[0, j]["health"] == 125
    assert np.isclose(c.units[0, i]["energy"], 50 - 105 * 0.33 + 11.25, atol=2e-2)


def test_healing_ends_with_the_energy():
    c = field((0, MEDIVAC, 16, 16), (1, MARAUDER, 17, 16))
    c.units[0, 1]["health"], c.units[0, 0]["energy"] = 1, 3.3
    attack(c, 0, 1)
    tick(c, 2 * SECOND)
    assert abs(c.units[0, 1]["health"] - 1 - (3.3 + 2 * 0.5625) / 0.33) < 0.2
    assert 0 <= c.units[0, 0]["energy"] < 0.1


def test_energy_stops_at_200():
    c = field((0, MEDIVAC, 16, 16))
    tick(c, 10 * SECOND)
    assert np.isclose(c.units[0, 0]["energy"], 50 + 5.625, atol=1e-3)
    c.units[0, 0]["energy"] = 199
    tick(c, 3 * SECOND)
    assert c.units[0, 0]["energy"] == 200


@pytest.mark.parametrize("patient", [STALKER, COLOSSUS, MEDIVAC])
def test_only_the_biological_are_healed(patient):
    c = field((0, MEDIVAC, 14, 16), (1, patient, 16, 16))
    c.units[0, 1]["health"] = 10
    attack(c, 0, 1)
    tick(c, 50)
    assert c.units[0, 1]["health"] == 10 and c.units[0, 0]["energy"] > 50


def test_shields_come_back_after_ten_seconds():
    """Without damage; 2 a second; hit points do not."""
    c, _, j = duel(MARINE, ZEALOT, 4.0)
    tick(c)
    tell(c)
    zealot = c.units[0, j]
    tick(c, 10 * SECOND - 1)
    assert zealot["shield"] == 44
    tick(c, SECOND + 1)
    assert 45.7 < zealot["shield"] < 46.3
    tick(c, 30 * SECOND)
    assert zealot["shield"] == 50
    c, _, j = duel(MARINE, ZEALOT, 4.0)
    zealot = c.units[0, j]
    zealot["shield"] = 0
    tick(c)
    tell(c)
    tick(c, 9 * SECOND)
    tell(c, a0=6)
    tick(c)  # once more: the ten seconds begin again
    tell(c)
    tick(c, 9 * SECOND)
    assert zealot["shield"] == 0 and zealot["health"] == 90
    tick(c, 3 * SECOND)
    assert 3.5 < zealot["shield"] < 4.5 and zealot["health"] == 90


def test_damage_and_healing_do_not_know_sides():
    """All units at once: on both sides a Medivac heals a Marine that takes its last hit."""
    for health, last in ((6.0, True), (44.8, False)):
        c = field(
            *((0, MARINE, 14, 16), (1, MEDIVAC, 13, 16)),
            *((8, MARINE, 18, 16), (9, MEDIVAC, 19, 16)),
        )
        c.units[0, 0]["health"] = c.units[0, 8]["health"] = health
        for i, j in ((0, 8), (8, 0), (1, 0), (9, 8)):
            attack(c, i, j)
        tick(c)
        ours, theirs = c.units[0, 0], c.units[0, 8]
        assert ours["alive"] == theirs["alive"], last
        assert np.isclose(ours["health"], theirs["health"], atol=1e-3), last


# --- Movement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLE)
def test_distance_walked_in_a_step(kind):
    """Half a second at full speed in all four directions; those on the ground turn at once."""
    c = field((0, kind, 8, 8))
    for action, way in ((EAST, (1, 0)), (NORTH, (0, 1)), (WEST, (-1, 0)), (SOUTH, (0, -1))):
        for k in range(6):
            start = at(c, 0)
            tell(c, a0=action)
            tick(c, 8)
            if kind != MEDIVAC or k > 4:
                wanted = TABLE[kind].speed / 2 * np.array(way)
                assert np.allclose(at(c, 0) - start, wanted, atol=2e-3 if kind == MEDIVAC else 1e-4)


def test_steps_have_eight_frames():
    c = field((0, STALKER, 8, 8), (8, MARINE, 30, 30), goal=(30.0, 30.0))
    actions = np.zeros((1, 8), int)
    actions[0, 0] = EAST
    c.step(actions)
    assert np.allclose(at(c, 0), (8 + 1.47655, 8), atol=1e-4)


def test_a_move_goes_two_units():
    c = field((0, ZEALOT, 8, 8))
    tell(c, a0=NORTH)
    tick(c, 40)
    assert np.allclose(at(c, 0), (8, 10), atol=1e-4)
    tell(c, a0=STOP)
    tick(c, 10)
    assert np.allclose(at(c, 0), (8, 10), atol=1e-4)


@pytest.mark.parametrize("kind", FIGHTERS)
def test_chases_and_enemies_go_at_the_same_speed(kind):
    """In a straight line."""
    step = TABLE[kind].speed / 2 * np.array([0.6, 0.8])
    c = field((0, kind, 5, 5), (8, MARINE, 5 + 9, 5 + 12))
    attack(c, 0, 8)
    tick(c, 8)
    assert np.allclose(at(c, 0), 5 + step, atol=1e-4)
    c = field((8, kind, 5, 5), goal=(14.0, 17.0))
    tick(c, 8, ai=True)
    assert np.allclose(at(c, 8), 5 + step, atol=1e-4)


def test_acceleration_of_a_medivac():
    """2.3125: half of it times t squared, to within a frame, until 2.75 a second after 1.19 s."""
    c = field((0, MEDIVAC, 4, 16))
    c.units[0, 0]["order"], c.units[0, 0]["goal_x"], c.units[0, 0]["goal_y"] = GO, 30.0, 16.0
    for n in range(1, 40):
        x = at(c, 0)[0]
        tick(c)
        v = (at(c, 0)[0] - x) * SECOND
        if n < 19:
            assert 2.3125 * (n - 1) / SECOND - 1e-3 <= v <= 2.3125 * n / SECOND + 1e-3
        if n > 20:
            assert np.isclose(v, 2.75, atol=1e-3)


def test_nobody_leaves_the_map():
    for kind in TABLE:
        for action, end in ((EAST, (32, 31.5)), (NORTH, (31.5, 32))):
            c = field((0, kind, 31.5, 31.5))
            for _ in range(4):
                tell(c, a0=action)
                tick(c, 8)
            assert np.allclose(at(c, 0), end, atol=2e-3)  # in a cell of the map
    c = field((0, MARINE, 0.1, 5), (1, MARINE, 0.2, 5), (8, MARINE, 0, 5.1))
    tick(c, 5)
    assert c.units[0]["x"].min() >= 0


def test_units_walk_all_at_once():
    """Two that run at each other meet half-way, whichever slot is first."""
    for gap in np.linspace(1, 1.28, 8):
        c, _, _ = duel(ZEALOT, ZEALOT, gap)
        middle = (at(c, 0) + at(c, 8)) / 2
        attack(c, 8, 0)
        for _ in range(8):
            tick(c)
            assert np.allclose((at(c, 0) + at(c, 8)) / 2, middle, atol=1e-4), gap


def test_a_target_that_dies_leaves_its_attacker_idle():
    """For the rest of the step, though another one stands next to it."""
    c = field((0, MARINE, 10, 16), (8, MARINE, 14, 16), (9, MARINE, 10, 20), goal=(14.0, 16.0))
    c.units[0, 8]["health"] = 1
    tell(c, a0=6)
    tick(c, 60)
    assert not c.units[0, 8]["alive"] and c.units[0, 9]["health"] == 45
    assert np.allclose(at(c, 0), (10, 16))
    c = field((0, ZEALOT, 10, 16), (8, MARINE, 14, 16), (9, MARINE, 18, 16))
    tell(c, a0=6)
    tick(c, 3)
    c.units[0, 8]["health"] = 0
    tick(c)
    place = at(c, 0)
    tick(c, 20)
    assert np.allclose(at(c, 0), place, atol=0.15)


def test_agents_chase_without_a_leash():
    c = field((0, ZEALOT, 1, 16), (8, MARINE, 6, 16))
    tell(c, a0=6)
    for _ in range(220):
        c.units[0, 8]["x"] = min(at(c, 0)[0] + 5, 31.5)
        tick(c)
    assert at(c, 0)[0] > 29


# --- Collisions -----------------------------------------------------------------------------------


def plain_push(places, kinds, idle, passes=2):
    """Two passes, each from the positions at its start; units 0..7 against 8..15."""
    layer = [-1 if k in GROUND else k for k in kinds]
    for _ in range(passes):
        shift = np.zeros_like(places)
        for i, j in itertools.combinations(range(len(kinds)), 2):
            d = places[i] - places[j]
            far = np.linalg.norm(d)
            overlap = TABLE[kinds[i]].separation + TABLE[kinds[j]].separation - far
            if layer[i] != layer[j] or overlap <= 0:
                continue
            part = 0.5
            if i // 8 == j // 8 and idle[i] != idle[j]:
                part = float(idle[i])
            shift[i] += part * overlap * d / far
            shift[j] -= (1 - part) * overlap * d / far
        places = np.clip(places + shift, 0, 32)
    return places


def test_pushing_is_as_in_plain_numpy():
    rng, moved = np.random.default_rng(5), 0
    c = field()
    for _ in range(60):
        kinds, idle = rng.choice(list(TABLE), 16), rng.random(16) < 0.5
        centre = np.array([rng.choice([16.0, 1.0]), 16.0])  # or at the wall
        places = np.clip(centre + rng.uniform(-2, 2, (16, 2)), 0, 32).astype(np.float32)
        for i in range(16):
            clear(c.units[0, i])
            enlist(c.units[0, i], kinds[i], *places[i])
            c.units[0, i]["order"] = IDLE if idle[i] else GO
        push_apart(c.units[0])
        found = np.stack([at(c, i) for i in range(16)])
        wanted = plain_push(places.astype(float), kinds, idle)
        assert np.allclose(found, wanted, atol=1e-4)
        moved += (np.abs(found - places).max(1) > 1e-3).sum()
    assert moved > 300


@pytest.mark.parametrize("pair", [*itertools.combinations_with_replacement(TABLE, 2)], ids=str)
def test_separation_radii_and_layers(pair):
    """Two enemies that overlap by .2 part by half of it each, if they are of one layer."""
    a, b = pair
    together = a == b or {a, b} <= GROUND
    far = TABLE[a].separation + TABLE[b].separation - 0.2
    c = field((0, a, 16, 16), (8, b, 16, 16 + far))
    push_apart(c.units[0])
    part = 0.1 if together else 0.0
    assert np.allclose((at(c, 0), at(c, 8)), ((16, 16 - part), (16, 16 + far + part)), atol=1e-5)


@pytest.mark.parametrize(
    "slots, orders, parts",
    [
        ((0, 1), (IDLE, GO), (1, 0)),
        ((0, 1), (GO, IDLE), (0, 1)),
        ((0, 1), (ENGAGE, IDLE), (0, 1)),
        ((8, 9), (IDLE, GO), (1, 0)),
        ((0, 1), (IDLE, IDLE), (0.5, 0.5)),
        ((0, 1), (GO, GO), (0.5, 0.5)),
        ((0, 8), (IDLE, GO), (0.5, 0.5)),
        ((0, 8), (GO, IDLE), (0.5, 0.5)),
    ],
)
def test_an_idle_friend_gives_way(slots, orders, parts):
    c = field((slots[0], MARINE, 16, 16), (slots[1], MARINE, 16.45, 16))
    for slot, order in zip(slots, orders):
        c.units[0, slot]["order"] = order
    push_apart(c.units[0])
    xs = [at(c, slot)[0] for slot in slots]
    assert np.allclose(xs, (16 - 0.3 * parts[0], 16.45 + 0.3 * parts[1]), atol=1e-5)


def test_units_at_one_point_part():
    for slots in ((0, 1), (0, 8), (3, 12), (14, 15)):
        c = field(*((slot, MARINE, 16, 16) for slot in slots))
        push_apart(c.units[0])
        a, b = at(c, slots[0]), at(c, slots[1])
        assert np.isclose(np.linalg.norm(a - b), 0.75, atol=1e-4)
        assert np.allclose((a + b) / 2, 16, atol=1e-4)
    c = field(*((slot, ZEALOT, 16, 16) for slot in range(16)))
    for _ in range(300):
        push_apart(c.units[0])
    places = np.stack([at(c, i) for i in range(16)])
    far = np.linalg.norm(places[:, None] - places, axis=-1)[np.triu_indices(16, 1)]
    assert far.min() > 0.74


def test_the_dead_push_nobody():
    c = field((0, MARINE, 16, 16), (8, MARINE, 16.2, 16))
    c.units[0, 8]["alive"] = False
    push_apart(c.units[0])
    assert np.allclose(at(c, 0), 16)


# --- The enemy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIGHTERS)
def test_acquisition_radius(kind):
    """An idle enemy takes on who comes within 5 of its edge, or within its weapon's range."""
    radius = max(5, TABLE[kind].range)
    for gap, comes in ((radius - 0.05, True), (radius + 0.05, False)):
        far = gap + TABLE[kind].radius + 0.5
        c = field((8, kind, 10, 16), (0, ZEALOT, 10 + far, 16), goal=(10.0, 16.0))
        tick(c, 20, ai=True)
        zealot = c.units[0, 0]
        acted = zealot["shield"] < 50 or at(c, 8)[0] > 10.5
        assert acted == comes, gap


def first_target(c, kind=MARINE, frames=20):
    """Who loses anything first."""
    full = c.units[0]["health"] + c.units[0]["shield"]
    for _ in range(frames):
        tick(c, ai=True)
        lost = (full - c.units[0]["health"] - c.units[0]["shield"])[:8]
        if lost.max() > 0:
            return int(lost.argmax())
    return None


def test_the_closest_is_taken_and_medivacs_last():
    place = (8, MARINE, 10, 16)
    near, far, air = (0, MARAUDER, 13, 16), (1, MARAUDER, 14, 16), (2, MEDIVAC, 11, 17)
    goal = {"goal": (10.0, 16.0)}
    assert first_target(field(place, near, far, **goal)) == 0
    assert first_target(field(place, far, air, **goal)) == 1
    assert first_target(field(place, air, **goal)) == 2
    assert first_target(field((8, ZEALOT, 10, 16), air, **goal)) is None


@pytest.mark.parametrize(
    "gap, other, switches",
    [(4.5, 1.0, False), (5.9, 2.0, False), (6.1, 2.0, True), (6.1, None, False), (6.1, 6.5, False)],
)
def test_targets_are_sticky(gap, other, switches):
    """A Marine keeps its target until it is out of range (5 + 1) while another is closer."""
    c = field((8, MARINE, 10, 16), (0, MARINE, 14.5, 16), goal=(10.0, 16.0))
    tick(c, ai=True)
    assert c.units[0, 8]["target"] == 0
    c.units[0, 8]["x"] = 10
    c.units[0, 0]["x"] = 10 + 0.75 + gap
    if other is not None:
        enlist(c.units[0, 1], MARINE, 10.0, 16 + 0.75 + other)
    tick(c, ai=True)
    assert c.units[0, 8]["target"] == int(switches)


@pytest.mark.parametrize(
    ("enemy_ai", "comes", "turns"),
    [
        ("sticky", (2.0, 5), False),
        ("closest", (2.0, 45), True),
        ("closest", (4.8, 5), False),
        ("focus", (2.0, 45), False),
        ("focus", (4.8, 5), True),
        ("focus", (6.2, 5), False),  # beyond its reach
        ("focus", (4.8, 5, ZEALOT), False),  # 50 points of shield, too
    ],
)
def test_other_opponents_turn_to_others(enemy_ai, comes, turns):
    """Between attacks, not while it takes aim, "closest" turns to who is nearer and "focus" to who
    has fewer hit points left, while "sticky" keeps its target."""
    c = field((8, STALKER, 10, 16), (0, MARINE, 15, 16), goal=(10.0, 16.0), enemy_ai=enemy_ai)
    c.units[0, 0]["health"] = 20
    for _ in range(2):
        tick(c, ai=True)
        assert c.units[0, 8]["target"] == 0 and c.units[0, 8]["winding"] >= 0
        if not c.units[0, 1]["alive"]:
            gap, health, *kind = comes
            enlist(c.units[0, 1], *(kind or [MARINE]), 10.0, 16 + 1.0 + gap)
            c.units[0, 1]["health"] = health
    tick(c, 2, ai=True)
    assert c.units[0, 8]["winding"] < 0, "it has fired"
    tick(c, ai=True)
    assert c.units[0, 8]["target"] == int(turns)


def test_a_new_target_when_the_old_one_is_dead():
    c = field((8, MARINE, 10, 16), (0, MARINE, 13, 16), (1, MARINE, 10, 20), goal=(10.0, 16.0))
    c.units[0, 0]["health"] = 6
    tick(c, ai=True)
    assert not c.units[0, 0]["alive"]
    tick(c, 20, ai=True)
    assert c.units[0, 1]["health"] < 45


@pytest.mark.parametrize("far, comes", [(3.8, True), (4.2, False)])
def test_call_for_help(far, comes):
    """A Marine shoots a Zealot 5 away; another Zealot, out of its own radius, comes if its centre
    is within 4 of the first one."""
    c = field(
        *((0, MARINE, 20.8, 16), (8, ZEALOT, 15, 16), (9, ZEALOT, 15 - far, 16)),
        goal=(15.0 - far, 16.0),
    )
    tell(c, a0=6)
    tick(c, ai=True)
    assert c.units[0, 8]["shield"] == 44
    tick(c, 2, ai=True)
    assert (at(c, 9)[0] > 15 - far + 0.1) == comes


def test_who_is_hit_from_afar_goes_for_the_attacker():
    """A Stalker shoots 6 far, beyond the 5 at which an idle Zealot without friends looks around."""
    c = field((0, STALKER, 15 + 5.6 + 1.125, 16), (8, ZEALOT, 15, 16), goal=(15.0, 16.0))
    tick(c, 20, ai=True)
    assert c.units[0, 8]["target"] < 0 and at(c, 8)[0] == 15
    attack(c, 0, 8)
    tick(c, 20, ai=True)
    assert c.units[0, 8]["shield"] < 50 and c.units[0, 8]["target"] == 0


@pytest.mark.parametrize(("far", "alive", "target"), [
    ((7, 8), (T, T), 0), ((8, 7), (T, T), 1), ((7, 8), (F, T), 1), ((8, 7), (F, F), -1),
])  # fmt: skip
def test_of_several_attackers_the_nearest_is_taken(far, alive, target):
    """Two friends of an idle Zealot were hit in the last frame, by Marines `far` east of it."""
    friends = (9, ZEALOT, 15, 18), (10, ZEALOT, 15, 14)
    marines = [(k, MARINE, 15 + x, 16 + 2 * k) for k, x in enumerate(far)]
    c = field((8, ZEALOT, 15, 16), *friends, *marines, goal=(15.0, 16.0))
    c.units[0, 9]["attacker"], c.units[0, 10]["attacker"] = 0, 1
    c.units[0]["alive"][:2] = alive
    tick(c, ai=True)
    assert c.units[0, 8]["target"] == target


def test_nobody_is_called_away_from_its_target():
    c = field(
        *((0, MARINE, 20.8, 16), (1, MARINE, 9, 16)),
        *((8, ZEALOT, 15, 16), (9, ZEALOT, 13, 16)),
        goal=(13.0, 16.0),
    )
    tick(c, ai=True)
    assert c.units[0, 9]["target"] == 1
    tell(c, a0=6)
    tick(c, 5, ai=True)
    assert c.units[0, 9]["target"] == 1 and at(c, 9)[0] < 13


def test_a_chase_ends_after_21():
    """The quarry keeps 8 ahead, beyond the acquisition radius."""
    c = field((8, ZEALOT, 2, 16), (0, MARINE, 5, 16), goal=(2.0, 16.0))
    tick(c, ai=True)
    xs = []
    for _ in range(220):
        xs.append(at(c, 8)[0])
        c.units[0, 0]["x"] = max(min(xs[-1] + 8, 32), at(c, 0)[0])
        tick(c, ai=True)
    assert 23 <= max(xs) < 23.3
    assert xs[-1] < max(xs) - 3  # on its way back


def test_targets_are_sticky_after_a_long_chase_too():
    """The quarry stays within the acquisition radius: when the chase ends it is acquired anew, and
    then kept though another one comes nearer."""
    c = field((8, MARINE, 2, 16), (0, MARAUDER, 7, 16), goal=(2.0, 16.0))
    for _ in range(400):
        c.units[0, 0]["x"] = min(at(c, 8)[0] + 5.5, 31)  # 4.6 from edge to edge
        c.units[0, 8]["cooldown"] = c.units[0, 8]["backswing"] = 0
        if at(c, 8)[0] < 24:  # it is carried along, or its shots would take all the time
            c.units[0, 8]["x"] += 0.14
        c.units[0, 0]["health"] = 125
        tick(c, ai=True)
    assert at(c, 8)[0] > 23.2 and c.units[0, 8]["target"] == 0
    x, y = at(c, 8)
    enlist(c.units[0, 1], MARINE, x, y + 2)
    tick(c, 3, ai=True)
    assert c.units[0, 8]["target"] == 0


@pytest.mark.parametrize("kind", TABLE)
def test_enemies_walk_to_their_point_and_stay(kind):
    c = field((8, kind, 5, 5), goal=(14.0, 17.0))
    tick(c, 400, ai=True)  # a Medivac overshoots and comes back
    place = at(c, 8)
    assert np.abs(place - (14, 17)).max() < 0.25
    tick(c, 50, ai=True)
    assert np.allclose(at(c, 8), place, atol=0.05)


def test_enemies_attack_on_their_way_and_then_go_on():
    c = field((8, MARINE, 5, 16), (0, MARINE, 14, 20), goal=(25.0, 16.0))
    c.units[0, 0]["health"] = 12
    tick(c, 300, ai=True)
    assert not c.units[0, 0]["alive"]
    assert np.allclose(at(c, 8), (25, 16), atol=0.2)


def test_agents_units_never_act_by_themselves():
    """They are shot at and stand there; so do those whose order has come to its end."""
    c = field(
        *((0, MARINE, 15, 16), (1, MARAUDER, 16, 17), (2, MEDIVAC, 16, 15)),
        *((8, MARAUDER, 18, 16), (9, MARINE, 18, 18)),
    )
    c.units[0, 0]["health"] = 40
    start = np.stack([at(c, i) for i in range(3)])
    for _ in range(40):
        places, alive = np.stack([at(c, i) for i in range(3)]), c.units[0]["alive"][:3]
        step = c.step(np.where(c.units[0]["alive"][:8], STOP, 0)[None])
        if step.terminated.any():
            break
        assert np.allclose(places[alive], start[alive], atol=1e-5)
        theirs = step.final.health[0, 8:10]
        assert theirs.tolist() == [125, 45]
    assert step.terminated.all() and not step.episodes[0].won


def test_an_enemy_medivac_heals_the_worst_hurt_near_it():
    at_goal = {"goal": (16.0, 16.0)}
    medivac = (8, MEDIVAC, 16, 16)
    c = field(medivac, (9, MARINE, 18, 16), (10, MARINE, 16, 18), (11, MARINE, 28, 16), **at_goal)
    for slot, health in ((9, 30), (10, 10), (11, 1)):
        c.units[0, slot]["health"] = health
    tick(c, ai=True)
    assert np.isclose(c.units[0, 10]["health"], 10 + 9 / 16, atol=1e-3)
    assert (c.units[0, 9]["health"], c.units[0, 11]["health"]) == (30, 1)
    c = field(medivac, (9, MARINE, 22, 16), (10, STALKER, 16, 18), **at_goal)
    c.units[0, 9]["health"] = c.units[0, 10]["health"] = 20
    tick(c, 40, ai=True)  # it comes nearer
    assert c.units[0, 9]["health"] > 20 and c.units[0, 10]["health"] == 20
    c = field(medivac, (9, MARINE, 28, 16), (10, MEDIVAC, 16, 18), (0, MARINE, 14, 16), **at_goal)
    for slot in (9, 10, 0):
        c.units[0, slot]["health"] = 20
    tick(c, 1, ai=True)
    assert [c.units[0, slot]["health"] for slot in (9, 10, 0)] == [20, 20, 20]


def test_an_enemy_medivac_looks_6_around_itself():
    """Edge to edge: radii are .75 and .375."""
    for gap, moves in ((5.95, True), (6.05, False)):
        x = 10 + gap + TABLE[MEDIVAC].radius + TABLE[MARINE].radius
        c = field((8, MEDIVAC, 10, 16), (9, MARINE, x, 16), goal=(10.0, 16.0))
        c.units[0, 9]["health"] = 20
        tick(c, ai=True)  # in which the Marine comes nearer, too
        assert (at(c, 8)[0] > 10) == moves


def test_an_enemy_medivac_starts_at_5_energy():
    """From 2, .5625 a second: after 5.33 s, 85.3 frames. Then it goes on below 5."""
    c = field((8, MEDIVAC, 16, 16), (9, MARAUDER, 17, 16))
    c.units[0, 8]["energy"], c.units[0, 9]["health"] = 2, 20
    tick(c, 84, ai=True)
    assert c.units[0, 9]["health"] == 20
    tick(c, 4, ai=True)
    assert 20 < c.units[0, 9]["health"] < 22.3
    tick(c, SECOND, ai=True)  # 5 are worth 15 hit points
    assert c.units[0, 9]["health"] > 29


def test_agents_medivacs_have_no_threshold():
    c = field((0, MEDIVAC, 16, 16), (1, MARAUDER, 17, 16), (8, MARINE, 30, 30), goal=(30.0, 30.0))
    c.units[0, 0]["energy"], c.units[0, 1]["health"] = 2, 20
    attack(c, 0, 1)
    tick(c)
    assert c.units[0, 1]["health"] > 20.5


# --- Deaths, ends, rewards ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MARINE, ZEALOT])
def test_both_may_die_in_the_same_frame(kind):
    """Both sides lose all: nobody has won, and the kill is paid."""
    family = "mmm" if kind == MARINE else "sz"
    c, i, j = duel(kind, kind, 0.05, family=family)
    for slot in (i, j):
        c.units[0, slot]["health"], c.units[0, slot]["shield"] = 3, 0
    step = seen(c).step(np.array([[6] + 7 * [0]]))
    assert step.terminated.all() and not step.truncated.any()
    (ended,) = step.episodes
    assert (ended.won, ended.allies, ended.enemies, ended.length) == (False, 0, 0, 1)
    assert np.isclose(step.reward, (3 + 10) / SCALE[family])


@pytest.mark.parametrize("kind", [MARINE, ZEALOT, COLOSSUS, STALKER, MARAUDER])
def test_equals_that_shoot_at_each_other_fare_alike(kind):
    """A mirrored fight in range, without random delay."""
    placed = [(s * 8 + k, kind, 16 + (2 * s - 1) * 2.5, 14 + 2 * k) for s in (0, 1) for k in (0, 1)]
    if kind == ZEALOT:
        placed = [(slot, kind, 16 + (0.51 if slot > 7 else -0.51), y) for slot, _, _, y in placed]
    c = field(*placed)
    for k in (0, 1):
        attack(c, k, 8 + k)
        attack(c, 8 + k, k)
    while c.units[0]["alive"].any():
        tick(c)
        for name in ("health", "shield", "alive"):
            assert (c.units[0][name][:2] == c.units[0][name][8:10]).all()


def quick_win(sizes):
    """All of a battle against 3 Zealots, which 8 Stalkers win long before shields come back."""
    c = Combat("sz", sizes, 1, weapon_delay=False)
    c.reset()
    for i in range(16):
        clear(c.units[0, i])
    for k in range(8):
        enlist(c.units[0, k], STALKER, 8 + 1.3 * (k % 4), 14 + 1.3 * (k // 4))
        c.units[0, k]["tag"] = 8 + k
    for k in range(3):
        enlist(c.units[0, 8 + k], ZEALOT, 16, 14 + k)
        c.units[0, 8 + k]["tag"] = k
    c.battles[0]["goal_x"], c.battles[0]["goal_y"] = 10, 14
    seen(c)
    rewards = []
    for _ in range(150):
        avail = c.obs.avail[0].numpy()
        attacks = avail[:, 6:].any(-1)
        target = 6 + avail[:, 6:].argmax(-1)
        stays = np.where(avail[:, 0], 0, np.where(avail[:, EAST], EAST, STOP))
        step = c.step(np.where(attacks, target, stays)[None])
        rewards.append(step.reward.item())
        if step.terminated.any():
            break
    return rewards, step


@pytest.mark.parametrize("sizes", [(3,), (3, 4, 5), (8,)])
def test_a_win_over_three_zealots_returns_8774(sizes):
    """680 / 77.5: 3 of 150, 10 a kill, 200; whatever sizes are trained."""
    rewards, step = quick_win(sizes)
    (ended,) = step.episodes
    assert ended.won and ended.enemies == 0 and ended.length == len(rewards) < 25
    assert np.isclose(sum(rewards), 680 / 77.5, atol=1e-4)
    assert np.isclose(ended.reward, 8.774, atol=1e-3)


@pytest.mark.parametrize("family, kind", [("sz", STALKER), ("csz", COLOSSUS), ("mmm", MARINE)])
def test_reward_scales(family, kind):
    """One attack: damage without what armour takes; not what allies lose."""
    me = TABLE[kind]
    c, i, j = duel(kind, kind, 0.5, family=family, goal=(30.0, 30.0))
    enlist(c.units[0, 9], kind, 30.0, 30.0)
    c.units[0, 9]["tag"] = 1
    step = seen(c).step(np.array([[6] + 7 * [0]]))
    one = me.hits * (me.damage + me.bonus * me.armoured)
    assert np.isclose(step.reward, one / SCALE[family], atol=1e-5)
    assert not step.terminated.any()


@pytest.mark.parametrize("clip", [False, True])
def test_regeneration_and_the_absolute_value(clip):
    """1 of shield in half a second: paid for, unless clipped; and taken off damage."""
    c = field(
        *((0, MARINE, 4, 4), (8, ZEALOT, 28, 28), (9, MARINE, 4, 10)),
        goal=(28.0, 28.0),
        clip_regeneration=clip,
    )
    zealot = c.units[0, 8]
    zealot["shield"], zealot["calm"] = 10, 10_000
    c.units[0, 9]["x"], c.units[0, 9]["y"] = 28, 30
    stop, hit = np.array([[STOP] + 7 * [0]]), np.array([[7] + 7 * [0]])
    step = seen(c).step(stop)
    assert np.isclose(step.reward, 0 if clip else 1 / SCALE["mmm"], atol=1e-5)
    c.units[0, 9]["x"], c.units[0, 9]["y"] = 4, 9
    step = seen(c).step(hit)
    assert np.isclose(step.reward, (6 - 1) / SCALE["mmm"], atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_what_is_healed_counts_as_regenerated(clip):
    c = field(
        *((0, MARINE, 4, 4), (8, MARINE, 28, 28), (9, MEDIVAC, 27, 28)),
        goal=(28.0, 28.0),
        clip_regeneration=clip,
    )
    c.units[0, 8]["health"] = 10
    step = seen(c).step(np.array([[STOP] + 7 * [0]]))
    assert np.isclose(step.reward, 0 if clip else 4.5 / SCALE["mmm"], atol=1e-4)


@pytest.mark.parametrize("side", [0, 1])
def test_only_medivacs_left(side):
    """The side that has nobody else has lost."""
    placed = [(0, MARINE, 14, 16), (1, MEDIVAC, 10, 10), (8, MARINE, 17, 16), (9, MEDIVAC, 22, 22)]
    c = field(*placed)
    c.units[0, 8 * (1 - side)]["health"] = 2  # it dies first
    step = seen(c).step(np.array([[6, STOP] + 6 * [0]]))
    if side == 1:  # both shoot in the first frame: the one with 45 lives
        assert not step.episodes[0].won and step.episodes[0].enemies == 2
    else:
        assert step.episodes[0].won and step.episodes[0].enemies == 1
    assert step.terminated.all() and not step.truncated.any()
    damage = 2 + 10 + 200 if side == 0 else 6
    assert np.isclose(step.reward, damage / SCALE["mmm"], atol=1e-5)
    assert step.final.alive[0].sum() == 3


def test_only_medivacs_left_on_both_sides():
    c = field((0, MARINE, 14, 16), (1, MEDIVAC, 5, 5), (8, MARINE, 17, 16), (9, MEDIVAC, 28, 28))
    c.units[0, 0]["health"] = c.units[0, 8]["health"] = 2
    step = seen(c).step(np.array([[6, STOP] + 6 * [0]]))
    assert step.terminated.all() and not step.episodes[0].won
    assert np.isclose(step.reward, 12 / SCALE["mmm"], atol=1e-5)


def idle_field(**options):
    return field((0, MARINE, 4, 4), (8, MARINE, 28, 28), goal=(28.0, 28.0), **options)


@pytest.mark.parametrize("limit", [None, 7])
def test_out_of_time(limit):
    """150 steps: truncated, not terminated; a new episode follows."""
    c = idle_field(**({} if limit is None else {"episode_limit": limit}))
    stop = np.array([[STOP] + 7 * [0]])
    for n in range(1, 1 + (limit or 150)):
        step = c.step(stop)
        assert not step.terminated.any() and bool(step.truncated) == (n == (limit or 150))
        assert step.reward == 0
    (ended,) = step.episodes
    assert (ended.length, ended.won, ended.allies, ended.enemies) == (limit or 150, False, 1, 1)
    assert step.final.alive[0].sum() == 2
    assert (~step.obs.entity_mask[0]).sum() == 6


def test_an_end_in_the_last_step_is_no_truncation():
    c, i, j = duel(MARINE, MARINE, 3.0, episode_limit=1)
    c.units[0, j]["health"] = 1
    step = seen(c).step(np.array([[6] + 7 * [0]]))
    assert step.terminated.all() and not step.truncated.any() and step.episodes[0].won


# --- Teams and places -----------------------------------------------------------------------------


def plain_teams(family, size):
    """All multisets of `size` units, in the order of the one-hot."""
    found = []
    for special in range(1 if family == "sz" else 3):
        base = size - special
        if 3 <= base <= (8 if family == "sz" else 6):
            for k in range(base + 1):
                pair = [k, base - k]
                if family == "csz":
                    pair = [special, *pair]
                if family == "mmm":
                    pair = [*pair, special]
                found.append(tuple(pair))
    return found


@pytest.mark.parametrize("family", ["sz", "csz", "mmm"])
def test_teams(family):
    numbers = dict(zip(SIZES, (4, 5, 6, 7, 8, 9)))
    if family != "sz":
        assert len(Combat(family, (3, 4, 5)).teams) == 28
        numbers = {6: 18, 7: 13, 8: 7}
    for size in SIZES:
        teams = [tuple(int(n) for n in team) for team in Combat(family, (size,)).teams]
        assert sorted(teams) == sorted(plain_teams(family, size))
        assert len(teams) == numbers.get(size, len(teams))
    everything = [team for size in SIZES for team in plain_teams(family, size)]
    assert sorted(Combat(family, SIZES).teams) == sorted(everything)


def counts(snapshot, family):
    """(B, 2, T): numbers of each type of both sides."""
    kinds = np.asarray(snapshot.type)
    rows = [(kinds[:, s][..., None] == ONE_HOT[family]).sum(1) for s in np.s_[:8, 8:]]
    return np.stack(rows, 1)


@pytest.mark.parametrize("family, sizes", [("sz", (3, 4, 5)), ("csz", (3, 4, 5)), ("mmm", (6, 8))])
def test_teams_are_drawn_uniformly_and_the_same_for_both(family, sizes):
    c, found = Combat(family, sizes, 2000, seed=4), []
    for _ in range(3):
        c.reset()
        both = counts(c.snapshot, family)
        assert (both[:, 0] == both[:, 1]).all()
        found += map(tuple, both[:, 0].tolist())
    possible = [team for size in sizes for team in plain_teams(family, size)]
    number = [found.count(team) for team in possible]
    assert sum(number) == len(found) and stats.chisquare(number).pvalue > 1e-3


def test_next_episodes_are_drawn_uniformly_too():
    """Those that begin by themselves."""
    c = Combat("sz", (3,), 500, seed=2, episode_limit=1)
    c.reset()
    found = []
    for _ in range(8):
        c.step(np.where(c.obs.avail.numpy()[..., 1], STOP, 0))
        found += map(tuple, counts(c.snapshot, "sz")[:, 0].tolist())
    number = [found.count(team) for team in plain_teams("sz", 3)]
    assert sum(number) == 4000 and stats.chisquare(number).pvalue > 1e-3


def test_places_at_the_start():
    """Sides 14 apart in a random direction around the centre, each group with its own jitter. Teams
    of one type only: pushing keeps their mean."""
    c = Combat("sz", (3, 4, 5, 6, 7, 8), 12000, seed=3)
    c.reset()
    both = counts(c.snapshot, "sz")[:, 0]
    alone = (both == 0).any(1)
    snap = copied(c.snapshot)
    there = snap.alive[alone][..., None]
    places = np.stack([snap.x, snap.y], -1)[alone].astype(float) * there
    number = both[alone].sum(-1)[:, None]
    ours, theirs = places[:, :8].sum(1) / number, places[:, 8:].sum(1) / number
    jitter = ours + theirs - 32  # of two: triangular
    assert np.abs(jitter).max() < 2 and len(jitter) > 2000
    for axis in (0, 1):
        assert stats.kstest(jitter[:, axis], "triang", (0.5, -2, 4)).pvalue > 1e-3
    apart = ours - theirs  # 14 in a direction, plus the difference of two jitters
    assert abs((apart**2).sum(-1).mean() - 14**2 - 4 / 3) < 2
    assert 14 - math.sqrt(8) < np.linalg.norm(apart, axis=-1).min()
    assert np.linalg.norm(apart, axis=-1).max() < 14 + math.sqrt(8)
    angle = np.arctan2(apart[:, 1], apart[:, 0])
    assert stats.kstest(angle, "uniform", (-math.pi, 2 * math.pi)).pvalue > 1e-3


def test_each_group_has_one_jitter():
    """Medivacs are pushed by nobody else: their mean against that of Marines and Marauders. Each
    differs by a jitter: triangular where the others are of one type."""
    c = Combat("mmm", (4, 5, 6, 7, 8), 6000, seed=6)
    c.reset()
    both = counts(c.snapshot, "mmm")[:, 0]
    good = (both[:, 2] > 0) & ((both[:, 0] == 0) | (both[:, 1] == 0))
    snap = copied(c.snapshot)
    places = np.stack([snap.x, snap.y], -1)[good].astype(float)
    kinds, found = snap.type[good], []
    for row, kind in zip(places, kinds):
        for side in (slice(0, 8), slice(8, 16)):
            air = kind[side] == MEDIVAC
            ground = (kind[side] >= 0) & ~air
            found.append(row[side][air].mean(0) - row[side][ground].mean(0))
    found = np.array(found)
    assert np.abs(found).max() < 2 and len(found) > 500
    for axis in (0, 1):
        assert stats.kstest(found[:, axis], "triang", (0.5, -2, 4)).pvalue > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_tags_and_first_values(family):
    c = Combat(family, SIZES, 1500, seed=8)
    c.reset()
    snap = copied(c.snapshot)
    orders = ALLIES[family], ONE_HOT[family]
    tags = [[], []]
    for b in range(c.num_battles):
        for side, part in enumerate((slice(0, 8), slice(8, 16))):
            kind, alive, tag = snap.type[b, part], snap.alive[b, part], snap.tag[b, part]
            n = alive.sum()
            assert n >= 3 and alive[:n].all() and (kind[n:] < 0).all()
            rank = [orders[side].index(k) for k in kind[:n]]
            key = list(zip(rank, snap.x[b, part].tolist(), snap.y[b, part].tolist()))
            assert key == sorted(key)
            assert len(set(tag[:n])) == n
            assert (tag[:n] // 8 == 1 - side).all()
            tags[side].append(tag[0])
            for k, health, shield, energy in zip(
                kind[:n], snap.health[b, part], snap.shield[b, part], snap.energy[b, part]
            ):
                truth = (TABLE[k].health, TABLE[k].shield, 50 * (k == MEDIVAC))
                assert (health, shield, energy) == truth
        assert alive[:n].all() and (snap.cooldown[b] == 0).all()
    for side in (0, 1):  # the first slot has each of the 8 tags as often
        number = np.bincount(np.array(tags[side]) - 8 * (1 - side), minlength=8)
        assert len(number) == 8 and stats.chisquare(number).pvalue > 1e-3
    assert overlap(snap).max() < 0.02


def overlap(snap):
    """(B,): the deepest of two living units of a layer, as a share of their radii's sum: at 1 the
    one stands in the other."""
    kind = np.where(snap.type < 0, 0, snap.type)
    radius = np.array([TABLE[k].separation for k in range(len(TABLE))])[kind]
    layer = np.array([0 if k in GROUND else 1 + k for k in range(len(TABLE))])[kind]
    d = np.hypot(snap.x[:, :, None] - snap.x[:, None], snap.y[:, :, None] - snap.y[:, None])
    deep = 1 - d / (radius[:, :, None] + radius[:, None])
    both = snap.alive[:, :, None] & snap.alive[:, None] & (layer[:, :, None] == layer[:, None])
    both &= ~np.eye(16, dtype=bool)
    return np.where(both, deep, 0).max((1, 2))


def test_the_enemy_goes_where_the_allies_began():
    """To the mean of their places, if nobody is in the way."""
    for seed in range(1, 6):
        c = Combat("csz", (5,), 1, seed=seed)
        c.reset()
        n = c.units[0]["alive"][:8].sum()
        mean = np.mean([at(c, i) for i in range(n)], 0)
        for i in range(8):
            c.units[0, i]["alive"] = False
        for i in range(9, 16):
            c.units[0, i]["alive"] = False
        tick(c, 300, ai=True)
        assert np.linalg.norm(at(c, 8) - mean) < 0.25


# --- What agents see ------------------------------------------------------------------------------


def plain_observation(snap, b, family):
    """entities, obs_mask, entity_mask, avail of battle b; and whether no comparison was close."""
    kinds, shields = ONE_HOT[family], family in ("sz", "csz", "protoss")
    n_actions = 22 if MEDIVAC in kinds else 14
    D = {"sz": 38, "csz": 39, "mmm": 46, "terran": 46, "protoss": 39, "zerg": 38}[family]
    place = np.stack([snap.x[b], snap.y[b]], -1).astype(float)
    there, alive = snap.type[b] >= 0, snap.alive[b]
    far = np.linalg.norm(place[:, None] - place, axis=-1)
    avail = np.zeros((8, n_actions), bool)
    for i in range(8):
        if not alive[i]:
            avail[i, 0] = True
            continue
        avail[i, 1] = True
        for k, way in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
            cell = np.floor(place[i] + way)
            avail[i, 2 + k] = (cell >= 0).all() and (cell < 32).all()
        for j in range(16):
            if snap.type[b, i] == MEDIVAC:
                possible = j < 8 and snap.type[b, j] in GROUND
            else:
                possible = j >= 8
            if possible and alive[j] and far[i, j] <= 6:
                avail[i, 6 + snap.tag[b, j]] = True
    hidden = (far > 9) | ~alive[:, None] | ~alive
    hidden[range(16), range(16)] = False
    centre = place[there].mean(0)
    widest = np.linalg.norm(place[there] - centre, axis=-1).max()
    entities = np.zeros((16, D))
    for i in np.flatnonzero(there):
        kind = snap.type[b, i]
        truth = TABLE[kind]
        row = [np.eye(16)[snap.tag[b, i]]]
        row.append(avail[i, 2:] if i < 8 else np.zeros(n_actions - 2))
        row.append(np.eye(len(kinds))[kinds.index(kind)])
        rest = [snap.health[b, i] / truth.health]
        if shields:
            rest.append(snap.shield[b, i] / truth.shield)
        energy = snap.energy[b, i] / 200 if kind == MEDIVAC else 0
        rest += [energy, snap.cooldown[b, i] / COOLDOWN[kind]] if i < 8 else [0, 0]
        rest += [*((place[i] - 16) / 32), *((place[i] - centre) / widest)]
        row.append(np.array(rest) * alive[i])
        entities[i] = np.concatenate(row)
    sure = np.abs(far[:, :, None] - (6, 9)).min() > 1e-5
    sure &= np.abs(place - np.round(place))[(place > 0) & (place < 32)].min() > 1e-5
    return (entities, hidden, ~there, avail), sure


@pytest.mark.parametrize("family", FAMILIES)
def test_observations_are_as_in_plain_numpy(family):
    """Over random play, from the start of a battle to its end, crowds at the wall included."""
    rng = np.random.default_rng(1)
    c = Combat(family, SIZES, 6, seed=5)
    c.reset()
    checked = dead = 0
    for t in range(130):
        if t == 100:  # now all in a corner
            c.units["x"] *= 0.2
            c.units["y"] *= 0.2
            seen(c)
        for b in range(c.num_battles):
            wanted, sure = plain_observation(copied(c.snapshot), b, family)
            if not sure:
                continue
            entities, *masks = (x[b].numpy() for x in c.obs)
            assert np.allclose(entities, wanted[0], atol=2e-6)
            assert all(np.array_equal(x, y) for x, y in zip(masks, wanted[1:]))
            checked += 1
            dead += (~c.snapshot.alive[b] & ~c.obs.entity_mask[b]).sum()
        c.step(choose(c.obs.avail.numpy(), rng, 3.0))
    assert checked > 600 and dead > 100


def test_cooldowns_are_seen():
    """A Marine's after its first frame of a step: 13.7728 - 8 of 15."""
    c, _, _ = duel(MARINE, MARAUDER, 3.0, goal=(28.0, 16.0))
    step = c.step(np.array([[6] + 7 * [0]]))
    assert np.isclose(step.obs.entities[0, 0, 16 + 20 + 3 + 2], 5.7728 / 15, atol=1e-4)


def test_stored_snapshots_give_the_same_observations():
    for family in ONE_HOT:
        rng = np.random.default_rng(2)
        c = Combat(family, SIZES, 5, seed=6)
        c.reset()
        snaps, views = [], []
        for _ in range(90):
            snaps.append(Snapshot(*(x.clone() for x in c.snapshot)))
            views.append([x.clone() for x in c.obs])
            c.step(choose(c.obs.avail.numpy(), rng, 3.0))
        again = c.observe(Snapshot(*(torch.cat(x) for x in zip(*snaps))))
        for x, parts in zip(again, zip(*views)):
            assert torch.equal(x, torch.cat(parts))


def test_final_is_the_end_and_obs_the_next_beginning():
    rng, c = np.random.default_rng(3), Combat("sz", (3,), 40, seed=9, episode_limit=20)
    c.reset()
    ends = 0
    for _ in range(60):
        step = c.step(choose(c.obs.avail.numpy(), rng, 5.0))
        done = (step.terminated | step.truncated).numpy()
        assert sorted(e.battle for e in step.episodes) == np.flatnonzero(done).tolist()
        for x, y in zip(copied(step.final), copied(c.snapshot)):
            assert np.array_equal(x[~done], y[~done])
        whole = c.observe(c.snapshot)
        assert all(torch.equal(x, y) for x, y in zip(whole, step.obs))
        for e in step.episodes:
            alive = step.final.alive[e.battle].numpy()
            assert (e.allies, e.enemies) == (alive[:8].sum(), alive[8:].sum())
            assert tuple(counts(step.final, "sz")[e.battle, 0]) == e.team
            assert (c.snapshot.health[e.battle] > 0).sum() == 6
            ends += 1
    assert ends > 80


# --- Courses --------------------------------------------------------------------------------------


def course(c, steps, seed=0, start=True):
    """Snapshots, rewards and ends under actions that depend on what each battle shows alone."""
    if start:
        c.reset()
    rng, found = np.random.default_rng(seed), []
    for _ in range(steps):
        draw = 0.01 + rng.random((8, c.obs.avail.shape[-1]))
        step = c.step((c.obs.avail.numpy() * draw).argmax(-1))
        all_of_it = (*c.snapshot, *step.final, *step.obs, *step[1:4])
        found.append([np.array(x.numpy()) for x in all_of_it])
    return found


def rows(found, part):
    return [[x[part] for x in step] for step in found]


def equal(a, b):
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_a_battle_one_course(family):
    """Whatever the number of battles, where counting begins, and the threads."""
    made = {"seed": 7, "episode_limit": 60}
    whole = course(Combat(family, (3, 4, 5), 7, **made), 130)
    assert equal(whole, course(Combat(family, (3, 4, 5), 7, **made), 130))
    assert equal(whole, course(Combat(family, (3, 4, 5), 7, threads=3, **made), 130))
    part = course(Combat(family, (3, 4, 5), 3, first_battle=4, threads=2, **made), 130)
    assert equal(rows(whole, slice(4, 7)), part)
    other = course(Combat(family, (3, 4, 5), 7, **(made | {"seed": 8})), 1)
    assert not equal(whole[:1], other)
    first = [x[0] for x in whole[0]]
    assert not same(first, [x[1] for x in whole[0]])


def test_sizes_share_their_mixes_if_they_share_a_seed():
    """So evaluations give each size a seed of its own: else its luck is that of all."""

    def stalkers(size, seed):
        """Their share of a team in each battle."""
        battles = Combat("sz", (size,), 2000, seed=seed)
        battles.reset()
        return (battles.snapshot.type[:, :size] == STALKER).double().mean(dim=1)

    for a, b in ((3, 4), (5, 6), (3, 8)):
        one = np.corrcoef(stalkers(a, 5), stalkers(b, 5))[0, 1]
        own = np.corrcoef(stalkers(a, 5 + a), stalkers(b, 5 + b))[0, 1]
        assert one > 0.8 and abs(own) < 0.1  # 1 / 2000 ** .5 = .022


@pytest.mark.parametrize("family", FAMILIES)
def test_battles_go_on_exactly_where_they_were_saved(family):
    """In the middle of fights, wind-ups, beams and flights."""
    made = {"seed": 3, "episode_limit": 60}
    c = Combat(family, (6, 7, 8), 6, **made)
    course(c, 27)
    saved = c.state_dict()
    snap, obs = copied(c.snapshot), copied(c.obs)
    wanted = course(c, 70, 5, start=False)
    other = Combat(family, (6, 7, 8), 6, seed=8, first_battle=2, episode_limit=60)
    for fresh in (c, other):  # the state has the seed of episodes to come
        fresh.load_state_dict(saved)
        assert same(snap, copied(fresh.snapshot)) and same(obs, copied(fresh.obs))
        assert equal(wanted, course(fresh, 70, 5, start=False))
    with pytest.raises(ValueError):
        Combat(family, (6, 7, 8), 5, **made).load_state_dict(saved)
    with pytest.raises(ValueError):
        Combat(family, (6, 7), 6, **made).load_state_dict(saved)


def test_the_end_of_battles_that_are_over_is_restored():
    """`final` of battles that stand still is the same in a world that has loaded them."""
    c = Combat("sz", (3,), 8, seed=2, once=True, episode_limit=60)
    c.reset()
    for seed in itertools.count():
        course(c, 1, seed, start=False)
        if c.over.any():
            break
    assert not c.over.all()
    other = Combat("sz", (3,), 8, seed=2, once=True, episode_limit=60)
    other.load_state_dict(c.state_dict())
    over = c.over.numpy()
    assert same([x[over] for x in copied(c.final)], [x[over] for x in copied(other.final)])


def test_actions_are_ints():
    c = Combat("sz", (3,), 2)
    c.reset()
    with pytest.raises(ValueError, match="Actions are ints, not float64"):
        c.step(np.ones((2, 8)))


def test_a_saved_state_is_a_copy():
    c = Combat("mmm", (3,), 2)
    c.reset()
    saved = c.state_dict()
    kept = {k: x.clone() for k, x in saved.items() if isinstance(x, torch.Tensor)}
    course(c, 5, start=False)
    assert all(torch.equal(saved[k], x) for k, x in kept.items())


def test_once():
    """Battles that have ended stand still, whatever is said, until reset()."""
    c = Combat("sz", (3,), 20, seed=2, once=True, episode_limit=60)
    c.reset()
    rng, lengths = np.random.default_rng(1), {}
    for t in range(1, 62):
        over, before = c.over.numpy().copy(), copied(c.snapshot)
        actions = choose(c.obs.avail.numpy(), rng, 5.0)
        actions[over] = -7
        step = c.step(actions)
        for x, y in zip(before, copied(c.snapshot)):
            assert np.array_equal(x[over], y[over])
        assert not (step.terminated | step.truncated)[over].any()
        assert (step.reward.numpy()[over] == 0).all()
        for e in step.episodes:
            assert e.battle not in lengths and e.length == t
            lengths[e.battle] = t
        assert sorted(lengths) == np.flatnonzero(c.over.numpy()).tolist()
    assert len(lengths) == 20 and len(set(lengths.values())) > 3
    c.reset()
    assert not c.over.any() and c.snapshot.alive.sum() == 20 * 6


@pytest.mark.parametrize(
    "options",
    [
        {"scenario": "zs"},
        {"team_sizes": ()},
        {"team_sizes": (2, 3)},
        {"team_sizes": (9,)},
        {"num_battles": 0},
        {"threads": 0},
        {"seed": -1},
        {"first_battle": -1},
        {"episode_limit": 0},
        {"enemy_ai": "clever"},
    ],
    ids=str,
)
def test_bad_arguments(options):
    with pytest.raises(ValueError) as error:
        Combat(**options)
    one_sentence(error)


def one_sentence(error):
    text = str(error.value)
    assert text[0].isupper() or text.split()[0] in text
    assert text.endswith(".") and "\n" not in text and ". " not in text


def test_actions_that_are_not_available():
    """Nothing has moved then."""
    c = field((0, MARINE, 0.5, 16), (1, MARINE, 16, 16), (8, MARINE, 16, 22.1), (9, MARINE, 2, 16))
    c.units[0, 1]["alive"] = False
    seen(c)
    good = np.array([[7, 0] + 6 * [0]])
    before = c.state_dict()
    for agent, action in ((0, 0), (0, WEST), (0, 6), (0, 8), (0, 22), (0, -1), (1, STOP), (5, 6)):
        actions = good.copy()
        actions[0, agent] = action
        with pytest.raises(ValueError) as error:
            c.step(actions)
        one_sentence(error)
        after = c.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in ("units", "battles"))
    c.step(good)
    for shape in ((8,), (1, 7), (2, 8)):
        with pytest.raises(ValueError) as error:
            c.step(np.ones(shape, int))
        one_sentence(error)
    with pytest.raises(ValueError) as error:
        Combat("sz", (3,)).step(np.ones((1, 8), int))
    one_sentence(error)


def test_a_step_allocates_no_arrays():
    """What Python keeps during a step is a few small objects, whatever the number of battles."""
    peaks = []
    for battles in (16, 256):
        c = Combat("mmm", SIZES, battles, seed=1)
        c.reset()
        rng = np.random.default_rng(1)
        actions = [choose(c.obs.avail.numpy(), rng, 1.0)]
        for _ in range(5):
            c.step(actions[-1])
            actions.append(choose(c.obs.avail.numpy(), rng, 1.0))
        tracemalloc.start()
        c.step(actions[-1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 16_000 < c.units.nbytes


# --- Long random play -----------------------------------------------------------------------------

# Two passes a frame do not part a crowd that walks against one point. In a million random steps two
# of a layer overlapped by .75 of their radii's sum at most, and in 99 % of the snapshots by no more
# than .47; 4 to 8 % of the battles went on until time was out.
DEEP, DEEP_99, LATE = 0.95, 0.55, 0.2


def soak(family, steps, B, seed):
    """Random play: battles end, and nothing in them is impossible."""
    rng, c = np.random.default_rng(seed), Combat(family, SIZES, B, seed=seed)
    c.reset()
    top = {k: np.array([TABLE[kind][k] for kind in range(len(TABLE))]) for k in (0, 1)}
    deepest, ends, late, battle = [], 0, 0, np.zeros(B, int)
    for t in range(steps // B):
        if t % 50 == 0:  # from nearly all attacks to nearly all moves
            eager = 10.0 ** rng.uniform(-1, 1)
        step = c.step(choose(c.obs.avail.numpy(), rng, eager))
        snap, obs, reward = copied(step.final), copied(step.obs), step.reward.numpy()
        battle += 1  # all in NumPy: PyTorch's threads are slow on busy cores
        done = step.terminated.numpy() | step.truncated.numpy()
        assert battle.max() <= 150
        battle[done] = 0
        ends, late = ends + done.sum(), late + step.truncated.numpy().sum()
        there, kind = snap.type >= 0, np.maximum(snap.type, 0)
        for x in (snap.x, snap.y):
            assert np.isfinite(x).all() and x.min() >= 0 and x.max() <= 32
        assert ((snap.health > 0) == snap.alive).all() and (snap.health >= 0).all()
        assert (snap.health <= top[0][kind] + 1e-4)[there].all()
        assert (snap.shield >= 0).all() and (snap.shield <= top[1][kind] + 1e-4)[there].all()
        assert (snap.energy >= 0).all() and snap.energy.max() <= 200
        assert (snap.cooldown >= 0).all() and snap.cooldown.max() < (2.2 + 0.125) * SECOND
        assert np.isfinite(reward).all() and (reward >= 0).all()
        assert np.isfinite(obs.entities).all()
        assert (np.abs(obs.entities[..., -4:]) <= 1 + 1e-5).all()
        assert obs.avail.any(-1).all()
        if t % 4 == 0:
            deepest.append(overlap(snap))
    assert ends >= steps / 150 - B and late < LATE * ends
    assert np.max(deepest) < DEEP and np.quantile(deepest, 0.99) < DEEP_99


@pytest.mark.parametrize("family", FAMILIES)
def test_random_play(family):
    """A hundred thousand steps in all."""
    soak(family, 34_000, 200, seed=11)


@pytest.mark.slow  # ten million steps
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_long_random_play(family):
    soak(family, 3_400_000, 1000, seed=12)
