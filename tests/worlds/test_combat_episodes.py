"""Battles from outside: fairness, scripted agents, pictures."""

from __future__ import annotations

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from envs.smac import combat
from envs.smac.combat import ENGAGE, FAMILIES, MEDIVAC, NEVER, SIDE, SLOTS, Combat
from envs.smac.episodes import (
    EpisodeLog,
    focus,
    nearest,
    play,
    random_policy,
    retreat,
    scripted_policies,
    summarise,
    table,
)
from envs.smac.views import draw, film

SLOT_FIELDS = ("target", "winding_at", "second_at", "attacker", "missile_at", "beam_at")
POLICIES = {"random": random_policy(7), "nearest": nearest, "focus": focus, "retreat": retreat}


# --- Fairness -------------------------------------------------------------------------------------


def other_side(units: np.ndarray) -> np.ndarray:
    """The same battle (A+E,) with allies as enemies."""
    seen = np.concatenate((units[SIDE:], units[:SIDE]))
    for name in SLOT_FIELDS:
        seen[name] = np.where(seen[name] < 0, seen[name], (seen[name] + SIDE) % SLOTS)
    return seen


def mirror_match(scenario: str, size: int, battles: int) -> list[int]:
    """Wins of allies and enemies, and draws, with the enemy's own AI on both sides."""
    c = Combat(scenario, (size,), battles, seed=3)
    c.reset()
    score = [0, 0, 0]
    for units, battle in zip(c.units, c.battles):
        goal = battle["goal_x"], battle["goal_y"]
        foes = units[SIDE:][units["alive"][SIDE:]]
        theirs = foes["x"].mean(), foes["y"].mean()
        for _ in range(150 * 8):
            battle["goal_x"], battle["goal_y"] = theirs
            seen = other_side(units)
            combat.command_enemies(seen, battle, 0)
            units[:] = other_side(seen)
            battle["goal_x"], battle["goal_y"] = goal
            combat.frame(units, battle, c.rules)
            fights = units["alive"] & (units["type"] != MEDIVAC)
            ours, left = fights[:SIDE].any(), fights[SIDE:].any()
            if not (ours and left):
                break
        score[0 if ours and not left else 1 if left and not ours else 2] += 1
    return score


@pytest.mark.long
@pytest.mark.parametrize(("scenario", "size"), [("sz", 8), ("csz", 7), ("mmm", 8), ("zerg", 8)])
def test_neither_side_is_favoured(scenario, size):
    """With the same AI on both sides each wins half: within 3.5 standard deviations of 1/2 (a fair
    game fails 1 in 2000). It has found enemies that were healed after they had been shot dead."""
    wins, losses, draws = mirror_match(scenario, size, 60)
    decided = wins + losses
    assert draws < 10
    assert abs(wins - decided / 2) < 3.5 * decided**0.5 / 2, (wins, losses, draws)


# --- Scripted agents ------------------------------------------------------------------------------

# experiments/scripted.py, 2048 battles each: win rates of random, nearest, focus, retreat.
BANDS = {
    ("sz", 3): (0.0, 0.364, 0.414, 0.134),
    ("sz", 4): (0.0, 0.345, 0.422, 0.21),
    ("sz", 5): (0.0, 0.343, 0.455, 0.245),
    ("sz", 6): (0.0, 0.359, 0.477, 0.278),
    ("sz", 7): (0.0, 0.394, 0.504, 0.299),
    ("sz", 8): (0.0, 0.38, 0.489, 0.308),
    ("csz", 3): (0.0, 0.369, 0.416, 0.137),
    ("csz", 4): (0.0, 0.342, 0.38, 0.166),
    ("csz", 5): (0.0, 0.288, 0.313, 0.149),
    ("csz", 6): (0.0, 0.312, 0.324, 0.161),
    ("csz", 7): (0.0, 0.239, 0.208, 0.099),
    ("csz", 8): (0.0, 0.184, 0.166, 0.083),
    ("mmm", 3): (0.0, 0.205, 0.214, 0.028),
    ("mmm", 4): (0.0, 0.244, 0.261, 0.151),
    ("mmm", 5): (0.0, 0.243, 0.254, 0.166),
    ("mmm", 6): (0.0, 0.235, 0.256, 0.197),
    ("mmm", 7): (0.0, 0.17, 0.231, 0.206),
    ("mmm", 8): (0.0, 0.163, 0.242, 0.267),
    ("terran", 3): (0.0, 0.252, 0.259, 0.071),
    ("terran", 4): (0.0, 0.267, 0.272, 0.139),
    ("terran", 5): (0.0, 0.224, 0.237, 0.106),
    ("terran", 6): (0.0, 0.212, 0.212, 0.11),
    ("terran", 7): (0.0, 0.19, 0.194, 0.127),
    ("terran", 8): (0.0, 0.167, 0.183, 0.116),
    ("protoss", 3): (0.0, 0.381, 0.408, 0.092),
    ("protoss", 4): (0.0, 0.383, 0.42, 0.166),
    ("protoss", 5): (0.0, 0.341, 0.376, 0.161),
    ("protoss", 6): (0.0, 0.32, 0.351, 0.167),
    ("protoss", 7): (0.0, 0.315, 0.343, 0.176),
    ("protoss", 8): (0.0, 0.313, 0.328, 0.166),
    ("zerg", 3): (0.051, 0.128, 0.153, 0.045),
    ("zerg", 4): (0.032, 0.123, 0.146, 0.049),
    ("zerg", 5): (0.021, 0.134, 0.146, 0.051),
    ("zerg", 6): (0.019, 0.134, 0.142, 0.053),
    ("zerg", 7): (0.013, 0.119, 0.127, 0.058),
    ("zerg", 8): (0.007, 0.122, 0.134, 0.059),
}


def wins(scenario: str, size: int, name: str, battles: int, seed: int = 5) -> float:
    return summarise(play(Combat(scenario, (size,), battles, seed, once=True), POLICIES[name]))[
        "win"
    ]


@pytest.mark.parametrize("scenario", FAMILIES)
def test_scripted_agents(scenario):
    """Random hardly ever wins, focus at least .1 more often. Banelings burst whoever sends them."""
    most, more = (0.08, 0.05) if scenario == "zerg" else (0.02, 0.1)
    chance = wins(scenario, 4, "random", 256)
    assert chance < most
    assert wins(scenario, 4, "focus", 256) > chance + more


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "size"), list(BANDS))
def test_win_rates_of_scripted_agents(scenario, size):
    """Within 4 standard deviations of docs/battles.md's table, other battles."""
    for name, expected in zip(POLICIES, BANDS[scenario, size], strict=True):
        p = min(max(expected, 0.002), 0.998)
        error = (p * (1 - p) * (1 / 512 + 1 / 2048)) ** 0.5
        assert abs(wins(scenario, size, name, 512) - expected) < 4 * error, name


def test_scripted_agents_choose_what_they_say():
    """focus the weakest within its weapon's range, nearest the nearest; Medivacs who is hurt most;
    retreat walks away when hurt; all of it available."""
    c = Combat("mmm", (8,), 64, seed=2)
    c.reset()
    checked = dict.fromkeys(("focus", "nearest", "heal", "run"), 0)
    for _ in range(25):
        snap, avail = c.snapshot, c.obs.avail
        chosen = {name: POLICIES[name](c) for name in ("nearest", "focus", "retreat")}
        for actions in chosen.values():
            assert avail.gather(-1, actions[..., None]).all()
        for b in range(0, 64, 7):
            for i in range(SIDE):
                if not snap.alive[b, i]:
                    continue
                x, y = (v[b].numpy().astype(float) for v in (snap.x, snap.y))
                far = np.hypot(x - x[i], y - y[i])
                kind = int(snap.type[b, i])
                if kind == MEDIVAC:
                    part = snap.health[b].numpy() / combat.HEALTH[snap.type[b].numpy()]
                    able = [j for j in range(SIDE) if avail[b, i, 6 + int(snap.tag[b, j])]]
                    hurt = [j for j in able if snap.alive[b, j] and part[j] < 1]
                    if hurt:
                        wanted = 6 + int(snap.tag[b, min(hurt, key=lambda j: part[j])])
                        assert int(chosen["focus"][b, i]) == wanted
                        checked["heal"] += 1
                    continue
                foes = [
                    j
                    for j in range(SIDE, SLOTS)
                    if snap.alive[b, j]
                    and avail[b, i, 6 + int(snap.tag[b, j])]
                    # Medivacs last, and none of a Marauder
                    and int(snap.type[b, j]) != MEDIVAC
                ]
                if not foes:
                    continue
                at = {j: 6 + int(snap.tag[b, j]) for j in foes}
                assert int(chosen["nearest"][b, i]) == at[min(foes, key=lambda j: far[j])]
                checked["nearest"] += 1
                radius = combat.RADIUS[snap.type[b].numpy()]
                within = [j for j in foes if far[j] - radius[i] - radius[j] <= combat.RANGE[kind]]
                if within:
                    weakest = min(float(snap.health[b, j]) for j in within)
                    target = [j for j in foes if at[j] == int(chosen["focus"][b, i])]
                    assert target[0] in within and float(snap.health[b, target[0]]) == weakest
                    checked["focus"] += 1
                if float(snap.health[b, i]) < 0.35 * combat.HEALTH[kind] and min(far[foes]) < 6:
                    move = int(chosen["retreat"][b, i])
                    assert move in range(1, 6)
                    checked["run"] += move > 1
        c.step(chosen["focus"])
    assert min(checked.values()) > 10, checked


def test_who_is_hurt_retreats_from_the_nearest_enemy():
    """With less than .35 of hit points and shields left and an enemy within 6, an agent takes the
    available move that leads most away from the nearest; all others do as in focus."""
    c, runs = Combat("sz", (8,), 8, seed=2), 0
    c.reset()
    ways = np.array([[0, 1], [0, -1], [1, 0], [-1, 0]])  # of actions 2 to 5
    full = {combat.STALKER: 160, combat.ZEALOT: 150}
    for _ in range(20):
        snap, avail = c.snapshot, c.obs.avail.numpy()
        places = np.stack([snap.x, snap.y], -1).astype(float)
        chosen, focused = retreat(c), focus(c)
        for b, i in np.ndindex(8, SIDE):
            place = places[b] - places[b, i]
            left = float(snap.health[b, i] + snap.shield[b, i])
            foes = [j for j in range(SIDE, SLOTS) if snap.alive[b, j]]
            far, nearest_foe = min((np.hypot(*place[j]), j) for j in foes)
            hurt = snap.alive[b, i] and left / full[int(snap.type[b, i])] < 0.35
            if not hurt or far >= 6:
                assert chosen[b, i] == focused[b, i]
                continue
            moves = [k for k in range(2, 6) if avail[b, i, k]]
            nearer = {k: ways[k - 2] @ place[nearest_foe] for k in moves}
            assert nearer[int(chosen[b, i])] <= min(nearer.values()) + 1e-4
            runs += 1
        c.step(focused)
    assert runs > 20


def test_the_log_of_training_episodes():
    """Means of all processes' episodes and of those of each size, also when saved in between."""
    own = [
        combat.Episode(0, (2, 1), 30, 20.0, True, 2, 0),
        combat.Episode(1, (1, 2), 50, 4.0, False, 0, 1),
        combat.Episode(0, (0, 5), 70, 6.0, False, 0, 2),
    ]
    other = combat.Episode(1, (3, 0), 10, 0.0, False, 0, 3)
    log = EpisodeLog(combat.Episode, lambda mine: [mine, [other]])
    log.episodes += own
    again = EpisodeLog(combat.Episode, lambda mine: [mine, [other]])
    again.load_state_dict(log.state_dict())
    expected = {"episodes": 4, "return": 7.5, "win": 0.25, "length": 40.0}
    expected |= {"return/3": 8.0, "win/3": 1 / 3, "return/5": 6.0, "win/5": 0.0}
    assert log.means() == again.means() == pytest.approx(expected)
    assert log.episodes == []


def test_tables_of_results():
    episodes = play(Combat("sz", (3,), 8, once=True), focus)
    assert [e.battle for e in episodes] == list(range(8))
    row = summarise(episodes)
    assert row["win"] == np.mean([e.won for e in episodes]) and row["episodes"] == 8
    assert 0 <= row["win_low"] <= row["win"] <= row["win_high"] <= 1
    lines = table({"sz 3 focus": row}).splitlines()
    assert len(lines) == 3 and "sz 3 focus" in lines[2]
    assert list(scripted_policies(1)) == ["random", "nearest", "focus", "retreat"]


# --- Pictures -------------------------------------------------------------------------------------


def test_pictures_show_what_they_say():
    """Colours of both sides where units are, bars as long as what is left, a cross for the dead."""
    c = Combat("sz", (3,), 1, seed=4)
    c.reset()
    image = draw(c.snapshot, 0)
    assert image.shape == (480, 480, 3) and image.dtype == np.uint8
    scale = 480 / 24

    def at(i: int, picture: np.ndarray, dy: float = 0.0) -> tuple[int, ...]:
        x, y = float(c.snapshot.x[0, i]) - 16, float(c.snapshot.y[0, i]) - 16
        return tuple(picture[int((12 - y) * scale + dy), int((x + 12) * scale)].tolist())

    for i in (*range(3), *range(8, 11)):
        colour = at(i, image)
        assert (colour[2] > colour[0] + 50) if i < SIDE else (colour[0] > colour[2] + 50)
    green = lambda picture: (  # noqa: E731
        (picture[..., 1] > 140) & (picture[..., 0] < 90) & (picture[..., 2] < 90)
    ).sum()
    full = green(image)
    c.snapshot.health[0, :3] *= 0.5
    assert 0.6 * full < green(draw(c.snapshot, 0)) < 0.9 * full
    c.snapshot.alive[0, 8] = False
    colour = at(8, draw(c.snapshot, 0))
    assert max(colour) - min(colour) < 20  # grey
    target = np.full(SIDE, 6 + int(c.snapshot.tag[0, 9]))
    assert (draw(c.snapshot, 0, actions=target) != draw(c.snapshot, 0)).any()
    blue = lambda picture: (  # noqa: E731
        (abs(picture.astype(int) - (90, 150, 240)) < 40).all(-1).sum()
    )
    full = blue(draw(c.snapshot, 0))
    c.snapshot.shield[0] *= 0.5
    assert 0.3 * full < blue(draw(c.snapshot, 0)) < 0.7 * full
    c.units[0, 0]["missile_at"], c.units[0, 0]["missile_x"] = 9, 16.0
    c.units[0, 0]["missile_y"] = 16.0
    assert (draw(c.snapshot, 0, c.units[0]) != draw(c.snapshot, 0)).any()


def test_every_type_has_a_shape_of_its_own():
    c, shapes = Combat("csz", (3,), 1, seed=4), {}
    c.reset()
    for kind in range(6):
        c.snapshot.type[0, :3] = kind
        c.snapshot.alive[0, 1:] = False
        c.snapshot.x[0], c.snapshot.y[0] = 16.0, 16.0
        picture = draw(c.snapshot, 0)
        shapes[kind] = (abs(picture.astype(int) - (31, 119, 180)) < 30).all(-1)
        assert shapes[kind].sum() > 50
    assert len({x.tobytes() for x in shapes.values()}) == 6


def test_shots_are_drawn():
    """Beams orange, across their target; attacks that wind up grey; healing green."""
    c = Combat("csz", (3,), 1, seed=4)
    c.reset()
    plain = draw(c.snapshot, 0, c.units[0]).astype(int)
    near = lambda colour: (  # noqa: E731
        (abs(draw(c.snapshot, 0, c.units[0]).astype(int) - colour) < 40).all(-1)
        & (abs(plain - colour) >= 40).any(-1)
    ).sum()
    me = c.units[0, 0]
    assert near((250, 150, 40)) == near((120, 120, 120)) == near((60, 160, 60)) == 0
    me["beam_age"], me["beam_x"], me["beam_y"] = 0, 16.0, 16.0
    me["beam_dx"], me["beam_dy"] = 1.0, 0.0
    assert near((250, 150, 40)) > 20
    me["beam_age"] = NEVER
    me["order"], me["target"], me["winding"] = ENGAGE, 8, 0
    assert near((120, 120, 120)) > 20 and near((250, 150, 40)) == 0
    me["type"] = MEDIVAC
    assert near((60, 160, 60)) > 20


def test_a_picture_of_the_dead_alone():
    """The last of both sides may die in one step: crosses are left, nothing is coloured."""
    c = Combat("sz", (3,), 1, seed=4)
    c.reset()
    empty = draw(c.snapshot._replace(type=torch.full_like(c.snapshot.type, combat.NOBODY)), 0)
    c.snapshot.alive[:] = False
    image = draw(c.snapshot, 0)
    changed = image[(image != empty).any(-1)].astype(int)
    assert len(changed) > 50 and (np.ptp(changed, axis=-1) < 30).all()


def test_film(tmp_path):
    c = Combat("mmm", (4,), 2, seed=1)
    film(c, focus, tmp_path / "a" / "film.mp4")
    d = Combat("mmm", (4,), 2, seed=1, once=True)
    steps = play(d, focus)[0].length
    frames = imageio.mimread(tmp_path / "a" / "film.mp4", memtest=False)
    assert len(frames) == steps + 6 and frames[0].shape == (480, 480, 3)
    assert (tmp_path / "a" / "film.mp4").stat().st_size < 1e6


def test_policies_leave_torch_types():
    c = Combat("csz", (8,), 3, seed=1)
    c.reset()
    for policy in POLICIES.values():
        actions = policy(c)
        assert isinstance(actions, torch.Tensor) and actions.shape == (3, SIDE)


def test_play_tells_how_many_have_ended():
    """One call a step; also how long the battles have lasted, by which players know a beginning."""
    c, told, times = Combat("sz", (3,), 6, seed=2, once=True, episode_limit=40), [], []

    def watched(battles):
        times.append(battles.time.tolist())
        return focus(battles)

    episodes = play(c, watched, told.append)
    assert sum(told) == len(episodes) == 6 and len(told) == len(times)
    assert len({n for n in told if n}) and told[0] == 0, "not all at once"
    lengths = [episode.length for episode in episodes]
    for step, time in enumerate(times):
        assert time == [min(step, length) for length in lengths]
    c.close()  # does nothing
    assert play(c, focus)[0].length > 0
