"""SMACv2's families in envs/smac/combat.py: how teams are drawn, and what only Zerg do. The numbers
are typed again from the game's data files (docs/battles.md names them)."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from envs.smac.combat import (
    BANELING,
    ENGAGE,
    FAMILIES,
    HYDRALISK,
    MARAUDER,
    MARINE,
    MEDIVAC,
    STALKER,
    ZEALOT,
    ZERGLING,
    Combat,
    burst_banelings,
    clear,
    enlist,
    push_apart,
    regenerate_and_bury,
    use_weapons,
)
from envs.smac.combat import move as walk

HEALTH = {BANELING: 30, ZERGLING: 35, HYDRALISK: 80, ZEALOT: 100, MARINE: 45, MARAUDER: 125}
RADIUS = {BANELING: 0.375, ZERGLING: 0.375, HYDRALISK: 0.625, ZEALOT: 0.5, MARINE: 0.375}
RADIUS |= {MARAUDER: 0.5625, STALKER: 0.625, MEDIVAC: 0.75}
# {type: weight} as in the configurations sc2_gen_*.yaml, and who cannot be a team alone.
WEIGHTS = {
    "terran": ((0.45, 0.45, 0.1), 2),  # Marines, Marauders, Medivacs
    "protoss": ((0.1, 0.45, 0.45), None),  # Colossi, Zealots, Stalkers
    "zerg": ((0.1, 0.45, 0.45), 0),  # Banelings, Zerglings, Hydralisks
}


def field(*placed, **options):
    """A battle between nobody but these: (slot, type, x, y); tags as in test_combat.py."""
    c = Combat("zerg", (3,), 1, seed=1, weapon_delay=False, **options)
    c.reset()
    for i in range(16):
        clear(c.units[0, i])
    for slot, kind, x, y in placed:
        enlist(c.units[0, slot], kind, x, y)
        c.units[0, slot]["tag"] = (slot + 8) % 16
    c.battles[0]["goal_x"] = c.battles[0]["goal_y"] = 28.0
    c.load_state_dict(c.state_dict())
    return c


def tick(c, frames=1):
    for _ in range(frames):
        use_weapons(c.units[0], c.battles[0], False)
        walk(c.units[0])
        push_apart(c.units[0])
        burst_banelings(c.units[0])
        regenerate_and_bury(c.units[0])


def attack(c, i, j):
    c.units[0, i]["order"], c.units[0, i]["target"] = ENGAGE, j


# --- Teams ----------------------------------------------------------------------------------------


def shares(family, sizes):
    """{team: probability}, by going through every sequence of units."""
    weights, alone = WEIGHTS[family]
    found = {}
    for size in sizes:
        row = {}
        for units in itertools.product(range(3), repeat=size):
            if set(units) != {alone}:
                team = tuple(units.count(t) for t in range(3))
                row[team] = row.get(team, 0) + math.prod(weights[t] for t in units)
        total = sum(row.values())
        found |= {team: p / total / len(sizes) for team, p in row.items()}
    return found


@pytest.mark.parametrize("family", WEIGHTS)
def test_teams_are_drawn_by_weights(family):
    for sizes in ((3, 4, 5), (6, 8)):
        wanted = shares(family, sizes)
        c = Combat(family, sizes, 4000, seed=3)
        assert sorted(c.teams) == sorted(wanted)
        shown = FAMILIES[family].shares(c.teams)
        assert np.allclose(shown, [wanted[team] for team in c.teams], atol=1e-12)
        c.reset()
        kinds = np.asarray(c.snapshot.type)
        types = np.array(FAMILIES[family].types)
        both = [(kinds[:, s, None] == types).sum(1) for s in np.s_[:8, 8:]]
        assert (both[0] == both[1]).all()
        drawn = [tuple(team) for team in both[0].tolist()]
        often = [team for team in c.teams if wanted[team] * 4000 > 5]
        number = [drawn.count(team) for team in often]
        number.append(4000 - sum(number))
        expected = [wanted[team] * 4000 for team in often]
        expected.append(4000 - sum(expected))
        assert stats.chisquare(number, expected).pvalue > 1e-3


def test_teams_have_three_to_eight_units():
    for family, size in itertools.product(WEIGHTS, (2, 9)):
        with pytest.raises(ValueError, match="3 to 8 units"):
            Combat(family, (size,))


@pytest.mark.parametrize("family", ["sz", "csz", "mmm"])
def test_the_other_families_are_drawn_uniformly(family):
    assert Combat(family, (3, 4, 5)).setup.shares.size == 0


@pytest.mark.parametrize(
    "family, points", [("terran", 150 + 500 + 135), ("protoss", 350 + 640 + 450), ("zerg", 455)]
)
def test_reward_scale(family, points):
    """Of one special unit, four of the type with more hit points and shields, three others."""
    assert FAMILIES[family].reward_scale == (points + 8 * 10 + 200) / 20


# --- Regeneration and missiles --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BANELING, ZERGLING, HYDRALISK])
def test_zerg_regenerate(kind):
    """.2734 hit points a second, also right after a hit, up to what they had."""
    c = field((0, kind, 10, 10), (8, ZERGLING, 28, 28))
    unit = c.units[0, 0]
    unit["health"], unit["calm"] = 20, 0
    tick(c, 160)
    assert np.isclose(unit["health"], 20 + 10 * 0.2734, atol=1e-3)
    unit["health"] = HEALTH[kind] - 0.1
    tick(c, 160)
    assert unit["health"] == HEALTH[kind]


def test_others_do_not_regenerate_hit_points():
    c = field((0, MARINE, 10, 10), (1, ZEALOT, 14, 10), (8, ZERGLING, 28, 28))
    c.units[0]["health"][:2] = 20
    tick(c, 320)
    assert (c.units[0]["health"][:2] == 20).all()


def test_needles_fly_at_forty():
    """6.3 between centres instead of 1.8: 4.5 / 40 of a second later."""
    hit = []
    for far in (1.8, 6.3):
        found = []
        for part in np.arange(0.005, 1, 0.01):
            c = field((0, HYDRALISK, 10, 16), (8, MEDIVAC, 10 + far, 16))
            attack(c, 0, 8)
            c.units[0, 0]["cooldown"] = part
            n = 0
            while c.units[0, 8]["health"] == 150 and n < 40:
                tick(c)
                n += 1
            found.append(n)
        hit.append(np.mean(found))
    assert abs(hit[1] - hit[0] - 4.5 / 40 * 16) < 0.05


# --- Banelings ------------------------------------------------------------------------------------


def blast(kind, far, slot=9):
    """How many hit points (of 500) a unit of the other side loses to a Baneling that attacks a
    Marauder; its centre is `far` from the Baneling's."""
    near = 0.375 + 0.5625 + 0.2
    c = field((0, BANELING, 10, 16), (8, MARAUDER, 10 + near, 16), (slot, kind, 10, 16 + far))
    c.units[0]["health"][[8, slot]], c.units[0]["shield"] = 500, 0
    attack(c, 0, 8)
    tick(c)
    assert not c.units[0, 0]["alive"] and c.units[0, 8]["health"] == 500 - (20 - 1)
    return 500 - c.units[0, slot]["health"].item()


@pytest.mark.parametrize("kind", [MARINE, ZEALOT, MARAUDER, STALKER])
def test_a_burst_hits_edges_within_its_radius(kind):
    """20, 35 against light units, less armour; 2.2 from its centre to their edge."""
    wanted = {MARINE: 35, ZEALOT: 35 - 1, MARAUDER: 20 - 1, STALKER: 20 - 1}[kind]
    assert blast(kind, 2.2 + RADIUS[kind] - 0.02) == wanted
    assert blast(kind, 2.2 + RADIUS[kind] + 0.02) == 0


@pytest.mark.parametrize("kind, lost", [(ZERGLING, 35), (HYDRALISK, 35), (BANELING, 20)])
def test_a_burst_against_zerg(kind, lost):
    """Zerglings and Hydralisks are light, Banelings are not."""
    c = field((0, BANELING, 10, 16), (8, HYDRALISK, 11.1, 16), (9, kind, 10, 14.5))
    attack(c, 0, 8)
    tick(c)
    left = max(HEALTH[kind] - lost, 0)
    assert np.isclose(c.units[0, 9]["health"], left + 0.2734 / 16 * (left > 0), atol=1e-4)
    assert c.units[0, 9]["alive"] == (left > 0)


def test_a_burst_spares_friends_and_the_air():
    c = field(
        *((0, BANELING, 10, 16), (1, MARINE, 9, 16), (8, MARAUDER, 11.1, 16)),
        (9, MEDIVAC, 10, 15),
    )
    attack(c, 0, 8)
    tick(c)
    assert c.units[0, 1]["health"] == 45 and c.units[0, 9]["health"] == 150
    assert c.units[0, 8]["health"] == 125 - 19


@pytest.mark.parametrize("side", [0, 1])
def test_banelings_burst_when_they_are_killed(side):
    """By a Marine that is near enough to be hit, in either side's slots; once."""
    mine, theirs = (0, 8) if side == 0 else (8, 0)
    c = field((mine, BANELING, 10, 16), (theirs, MARINE, 12, 16))
    c.units[0, mine]["health"] = 1
    attack(c, theirs, mine)
    tick(c)
    assert not c.units[0, mine]["alive"] and c.units[0, theirs]["health"] == 45 - 35
    tick(c, 30)
    assert c.units[0, theirs]["health"] == 45 - 35


@pytest.mark.parametrize("slots", [(0, 8, 1, 9), (1, 9, 0, 8)])
def test_bursts_set_off_enemy_banelings_in_the_same_frame(slots):
    """A chain along a line: each reaches the next alone; the order of slots changes nothing."""
    c = field(*((slot, BANELING, 10 + 2 * k, 16) for k, slot in enumerate(slots)))
    c.units[0]["health"][[*slots]] = 15  # 20 kill
    c.units[0, slots[0]]["health"] = 0
    burst_banelings(c.units[0])
    assert not c.units[0]["alive"].any()


def test_two_banelings_that_meet_end_both():
    """Both attack, so both die: neither side wins; the enemy's suicide is paid as a kill."""
    c = field((0, BANELING, 16, 16), (8, BANELING, 17, 16))
    step = c.step(np.array([[6] + 7 * [0]]))
    assert step.terminated.all() and not step.episodes[0].won
    assert np.isclose(step.reward, (30 + 10) / 36.75, atol=1e-4)


def test_a_baneling_walks_to_a_quarter_and_bursts():
    """Edge to edge; out of range it walks at 2.5 a second."""
    c = field((0, BANELING, 10, 16), (8, ZEALOT, 14, 16))
    c.units[0]["shield"] = 0
    attack(c, 0, 8)
    way = 4 - 0.375 - 0.5 - 0.25
    tick(c, math.ceil(way / 2.5 * 16))
    assert c.units[0, 0]["alive"]
    tick(c)
    assert not c.units[0, 0]["alive"] and c.units[0, 8]["health"] == 100 - 34
