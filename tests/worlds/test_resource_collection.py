"""envs/smac/resource_collection.py: each rule measured, whole episodes against plain Python written
from the specification, streams of random numbers.
"""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch

from envs.smac import resource_collection as rc

STAY, LEFT, RIGHT, DOWN, UP = 1, 2, 3, 4, 5
FAR = 0.9  # where nothing happens


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def world(size=1, B=1, seed=1, **options):
    new = rc.ResourceCollection((size,), B, seed, **options)
    new.reset()
    return new


def put(w, **fields):
    """Change the snapshot of all worlds."""
    now = w.snapshot._asdict()
    for name, x in fields.items():
        now[name] = torch.as_tensor(x, dtype=now[name].dtype).expand(now[name].shape).clone()
    w.snapshot = rc.Snapshot(**now)
    w.obs = rc.observe(w.snapshot)


def quiet(size=1, speed=0.5, value=0.5, **fields):
    """One world with agents in the middle of nowhere and everything else far off."""
    w = world(size)
    there = w.snapshot.present[..., None]
    place = torch.tensor([-0.5, -0.5]) + 0.2 * torch.arange(8)[:, None]
    defaults = {
        "position": place * there,
        "speed": speed * there[..., 0],
        "value": value * there,
        "resources": [[FAR, FAR - 0.11 * k] for k in range(6)],
        "invader": [-FAR, FAR],
        "pause": 100,
    }
    put(w, **(defaults | fields))
    return w


def act(w, *actions):
    chosen = torch.zeros(w.num_battles, 8, dtype=torch.long)
    chosen[:, : len(actions)] = torch.tensor(actions)
    return w.step(chosen)


# --- Movement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", rc.SPEEDS)
@pytest.mark.parametrize("action, way", [(2, (-1, 0)), (3, (1, 0)), (4, (0, -1)), (5, (0, 1))])
def test_walking(action, way, speed):
    """v <- .75 v + 5 s dt, at most s; x <- x + v dt: top speed in three steps, then a coast."""
    w = quiet(speed=speed, position=torch.tensor([0.3, 0.3]))
    v, x = 0.0, 0.0
    for k in range(8):
        act(w, action if k < 5 else STAY)
        v = min(0.75 * v + (0.1 * 5 * speed if k < 5 else 0.0), speed)
        x += 0.1 * v
        moved = (w.snapshot.position[0, 0] - 0.3).tolist()
        assert np.allclose(moved, [x * d for d in way], atol=1e-6)
        assert np.allclose(w.snapshot.velocity[0, 0].tolist(), [v * d for d in way], atol=1e-6)
        if k == 4:
            assert v == speed


def test_top_speed_is_of_both_directions_together():
    w = quiet(speed=0.7, position=torch.tensor([0.0, 0.5]))
    for k in range(20):
        act(w, (RIGHT, UP)[k % 2])
        assert w.snapshot.velocity[0, 0].norm() <= 0.7 + 1e-6


def test_walls_hold_and_push_back():
    """Inner edge at 1.4 - .5 less the agent's radius; nobody gets much beyond, and none is pushed
    before it."""
    for action, axis, sign in ((RIGHT, 0, 1), (LEFT, 0, -1), (UP, 1, 1), (DOWN, 1, -1)):
        w = quiet(speed=0.7, position=torch.tensor([0.2, 0.2]))
        reach = [
            act(w, action) and sign * float(w.snapshot.position[0, 0, axis]) for _ in range(60)
        ]
        assert 0.86 <= max(reach) < 0.95
    w = quiet(position=torch.tensor([0.84, 0.0]))
    act(w, STAY)
    assert abs(float(w.snapshot.position[0, 0, 0]) - 0.84) < 1e-6


def test_agents_walk_through_each_other():
    w = quiet(2, position=torch.tensor([[0.3, 0.3]] * 8))
    act(w, STAY, STAY)
    assert (w.snapshot.position[0, :2] == 0.3).all()


# --- Rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, kind", list(enumerate((1, 2, 3, 1, 2, 3))))
def test_picking_up(k, kind):
    """10 times the value for that type, within .04 + .05 + .01, with empty hands; then it is
    elsewhere and the hands are full."""
    value = torch.tensor([0.1, 0.5, 0.9])
    places = torch.tensor([[FAR, FAR - 0.11 * j] for j in range(6)])
    for distance, taken in ((0.099, True), (0.101, False)):
        places[k] = torch.tensor([-0.5 + distance, -0.5])
        w = quiet(value=value * torch.ones(8, 1), resources=places)
        assert int(act(w, STAY).reward[0] > 0) == taken
        assert int(w.snapshot.holding[0, 0]) == (kind if taken else 0)
        assert torch.equal(w.snapshot.resources[0, k], places[k]) != taken
        if taken:
            assert math.isclose(float(w.tally.reward[0]), 10 * value[kind - 1], rel_tol=1e-6)
            put(w, resources=places)
            assert act(w, STAY).reward[0] == 0, "hands are full"


def test_one_resource_goes_to_one_agent_and_hands_hold_one():
    places = torch.tensor([[FAR, FAR - 0.11 * j] for j in range(6)])
    places[0] = places[1] = torch.tensor([0.5, -0.5])
    w = quiet(3, resources=places, position=torch.tensor([[0.5, -0.5]] * 8))
    assert act(w, STAY, STAY, STAY).reward[0] == 2 * 10 * 0.5
    assert w.snapshot.holding[0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("distance, paid", [(0.129, 1.0), (0.131, 0.0)])
def test_delivery(distance, paid):
    """1 for what is held, within .04 + .08 + .01 of home."""
    w = quiet(2, position=torch.tensor([[distance, 0.0], [0.0, -0.5], *[[0.0, 0.0]] * 6]))
    holding = torch.tensor([2, 3, 0, 0, 0, 0, 0, 0])
    put(w, holding=holding)
    assert act(w, STAY, STAY).reward[0] == paid
    assert w.snapshot.holding[0, :2].tolist() == [0 if paid else 2, 3]


def test_the_invader_walks_home_and_costs_4():
    """.05 a step in a straight line; there, within .03 + .08 + .01, it costs 4 and pauses for 1 to
    10 steps, then another begins at the edge."""
    w = quiet(invader=[0.3, 0.4], pause=0, position=torch.tensor([0.8, -0.8]))
    for k in range(1, 8):
        step = act(w, STAY)
        assert np.allclose(
            w.snapshot.invader[0], [0.3 * (1 - 0.1 * k), 0.4 * (1 - 0.1 * k)], atol=1e-6
        )
        assert step.reward[0] == 0 and w.snapshot.pause[0] == 0
    assert act(w, STAY).reward[0] == -4, "at .10"
    assert 1 <= w.snapshot.pause[0] <= 10 and w.obs.entity_mask[0, rc.INVADER]
    wait = int(w.snapshot.pause[0])
    for _ in range(wait):
        assert act(w, STAY).reward[0] == 0
    assert w.snapshot.pause[0] == 0 and w.snapshot.invader[0].abs().max() > 0.9


@pytest.mark.parametrize("distance, paid", [(0.079, 4.0), (0.081, 0.0)])
def test_catching_the_invader(distance, paid):
    """4, within .04 + .03 + .01 after its step; and it does not arrive."""
    w = quiet(invader=[0.55, 0.0], pause=0, position=torch.tensor([0.5, distance]))
    assert act(w, STAY).reward[0] == paid
    assert (w.snapshot.pause[0] > 0) == bool(paid)
    both = quiet(invader=[0.14, 0.0], pause=0, position=torch.tensor([0.09, 0.0]))
    assert act(both, STAY).reward[0] == 4, "caught first, at home's edge"


# --- How episodes begin ---------------------------------------------------------------------------


def test_beginnings():
    """Agents evenly on a circle of .12; values and speeds from their three; resources at .4 to .95,
    .1 apart; the invader at the edge; team sizes drawn evenly."""
    w = rc.ResourceCollection((3, 5, 8), 3000, 1)
    w.reset()
    s, size = w.snapshot, w.snapshot.present.sum(1)
    assert np.allclose(np.bincount(size)[[3, 5, 8]] / 3000, 1 / 3, atol=0.04)
    assert torch.allclose(s.position.norm(dim=-1)[s.present], torch.tensor(0.12))
    for n in (3, 5, 8):
        place = s.position[size == n][:, :n]
        gap = (place - place.roll(1, 1)).norm(dim=-1)
        assert torch.allclose(gap, torch.tensor(2 * 0.12 * math.sin(math.pi / n)), atol=1e-5)
    for x, options in ((s.value[s.present], rc.VALUES), (s.speed[s.present], rc.SPEEDS)):
        for option in options:
            assert abs(float((x == option).float().mean()) - 1 / 3) < 0.02
    far = s.resources.norm(dim=-1)
    assert far.min() >= 0.4 - 1e-6 and far.max() <= 0.95 + 1e-6 and abs(far.mean() - 0.675) < 0.01
    apart = torch.cdist(s.resources, s.resources) + torch.eye(6)
    assert (apart >= 0.1 - 1e-6).all()
    assert ((s.invader.norm(dim=-1) >= 0.98) & (s.invader.abs().max(-1).values <= 0.99)).all()
    assert (s.holding == 0).all() and (s.velocity == 0).all() and (s.pause == 0).all()


def test_pauses_are_even():
    w = world(1, B=4000)
    put(w, invader=[0.1, 0.0], pause=0, position=torch.tensor([0.8, 0.8]))
    act(w, STAY)
    assert np.allclose(np.bincount(w.snapshot.pause)[1:] / 4000, 0.1, atol=0.02)


# --- A whole episode against plain Python ---------------------------------------------------------


def plain_step(s, actions, place_of, start_of, wait):
    """One world, lists and loops: the specification again. place_of(k), start_of(), wait: what the
    world draws."""
    reward, n = 0.0, len(s["speed"])
    for i in range(n):
        v = [0.75 * c for c in s["v"][i]]
        way = ((0, 0), (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))[actions[i]]
        for c in (0, 1):
            push = 5 * s["speed"][i] * way[c]
            for wall in (-1.4, 1.4):
                offset = s["x"][i][c] - wall
                depth = np.logaddexp(0, -(abs(offset) - 0.54) / 1e-3) * 1e-3
                push += 100 * np.sign(offset) * depth
            v[c] += 0.1 * push
        pace = math.hypot(*v)
        if pace > s["speed"][i]:
            v = [c * s["speed"][i] / pace for c in v]
        s["v"][i] = v
        s["x"][i] = [a + 0.1 * b for a, b in zip(s["x"][i], v)]
    near = lambda i, place, radius: math.dist(s["x"][i], place) <= 0.04 + radius + 0.01  # noqa: E731
    if s["pause"]:
        s["pause"] -= 1
        if not s["pause"]:
            s["invader"] = start_of()
    else:
        far = math.hypot(*s["invader"])
        s["invader"] = [c * (1 - 0.05 / max(far, 0.05)) for c in s["invader"]]
        if any(near(i, s["invader"], 0.03) for i in range(n)):
            reward, s["pause"] = reward + 4, wait
        elif math.hypot(*s["invader"]) <= 0.03 + 0.08 + 0.01:
            reward, s["pause"] = reward - 4, wait
    for k, kind in enumerate((1, 2, 3, 1, 2, 3)):
        for i in range(n):
            if not s["holding"][i] and near(i, s["resources"][k], 0.05):
                reward += 10 * s["value"][i][kind - 1]
                s["holding"][i] = kind
                s["resources"][k] = place_of(k)
                break
    for i in range(n):
        if s["holding"][i] and near(i, (0, 0), 0.08):
            reward, s["holding"][i] = reward + 1, 0
    return reward


@pytest.mark.parametrize("size", [1, 4, 8])
def test_episodes_are_those_of_plain_python(size):
    """The collector, with every third action drawn: rewards and everything else, step by step."""
    w, rng = world(size, B=3, seed=size), np.random.default_rng(size)
    own = []
    for b in range(3):
        s = {k: x[b].double().tolist() for k, x in w.snapshot._asdict().items()}
        new = {"x": s["position"][:size], "v": s["velocity"][:size], "speed": s["speed"][:size]}
        new |= {"value": s["value"][:size], "holding": [0] * size, "pause": 0}
        own.append(new | {"resources": s["resources"], "invader": s["invader"]})
    total = np.zeros(3)
    for _ in range(rc.EPISODE_LIMIT - 1):
        actions = rc.collector(w)
        drawn = torch.from_numpy(rng.integers(1, 6, size=(3, 8)))
        other = torch.from_numpy(rng.uniform(size=(3, 8)) < 1 / 3) & w.snapshot.present
        actions = torch.where(other, drawn, actions)
        step = w.step(actions)
        for b, s in enumerate(own):
            after = {k: x[b].double().tolist() for k, x in step.final._asdict().items()}
            reward = plain_step(
                s,
                actions[b].tolist(),
                lambda k, after=after: after["resources"][k],
                lambda after=after: after["invader"],
                int(after["pause"]),
            )
            total[b] += reward
            assert math.isclose(reward, float(step.reward[b]), abs_tol=1e-4)
            assert np.allclose(s["x"], after["position"][:size], atol=2e-5)
            assert s["holding"] == [int(x) for x in after["holding"][:size]]
            assert np.allclose(s["resources"], after["resources"], atol=1e-5)
            assert np.allclose(s["invader"], after["invader"], atol=1e-5)
            assert s["pause"] == int(after["pause"])
            # Rounding does not add up.
            s["x"], s["v"] = after["position"][:size], after["velocity"][:size]
    assert total.sum() > 20, "something has happened"


def test_resources_come_back_apart_and_within_the_ring():
    w = world(8, B=200, seed=5)
    for _ in range(100):
        step = w.step(rc.collector(w))
        far = step.final.resources.norm(dim=-1)
        assert far.min() >= 0.4 - 1e-5 and far.max() <= 0.95 + 1e-5
        apart = torch.cdist(step.final.resources, step.final.resources) + torch.eye(6)
        assert (apart < 0.1 - 1e-5).float().mean() < 1e-3
    assert w.tally.picked.sum() > 2000


# --- What agents see ------------------------------------------------------------------------------


def test_features():
    """Own: velocity, position, held (4), stood on (6), values and speed; things: position, kind."""
    places = torch.tensor([[FAR, FAR - 0.11 * j] for j in range(6)])
    w = quiet(
        2, speed=0.7, value=torch.tensor([0.1, 0.5, 0.9]) * torch.ones(8, 1), resources=places
    )
    put(w, velocity=torch.tensor([0.2, -0.1]) * w.snapshot.present[..., None])
    put(w, holding=torch.tensor([3, 0, 0, 0, 0, 0, 0, 0]), pause=0)
    row = w.obs.entities[0, 0].tolist()
    expected = [0.2, -0.1, -0.5, -0.5, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0.1, 0.5, 0.9, 0.7, *[0] * 5]
    assert np.allclose(row, expected) and len(row) == w.family.features == 23
    assert (w.obs.entities[0, 2:8] == 0).all()
    for k, kind in enumerate((1, 2, 3, 1, 2, 3)):
        row = w.obs.entities[0, 8 + k]
        assert (
            torch.equal(row[2:4], places[k]) and row[18:].tolist() == np.eye(5)[kind - 1].tolist()
        )
    assert w.obs.entities[0, rc.INVADER, 18:].tolist() == [0, 0, 0, 1, 0]
    assert w.obs.entities[0, rc.HOME].tolist() == [0] * 22 + [1]


@pytest.mark.parametrize(
    "where, fields, on",
    [
        ([0.5, -0.5], {}, 0),
        ([0.1, 0.0], {}, 1),
        ([FAR, FAR], {}, 2),
        ([FAR, FAR - 0.11], {}, 3),
        ([FAR, FAR - 0.22], {}, 4),
        ([-FAR, FAR], {"pause": 0}, 5),
        ([-FAR, FAR], {"pause": 3}, 0),
    ],
)
def test_what_one_stands_on(where, fields, on):
    w = quiet(position=torch.tensor(where), **fields)
    assert w.obs.entities[0, 0, 8:14].tolist() == np.eye(6)[on].tolist()


def test_masks():
    """Within .2 one sees, centre to centre; oneself always; nobody sees empty slots or an invader
    that has not come; available are all five actions, and no-op to those that are not there."""
    place = torch.tensor([[0.0, 0.5], [0.199, 0.5], [0.0, 0.701], *[[0.0, 0.0]] * 5])
    w = quiet(3, position=place, invader=[0.1, 0.5])
    seen = ~w.obs.obs_mask[0]
    assert seen[0, 1] and seen[1, 0] and not seen[0, 2] and seen[:3, :3].diagonal().all()
    assert not seen[3:8].any() and not seen[:, 3:8].any()
    assert w.obs.entity_mask[0].tolist() == [False] * 3 + [True] * 5 + [False] * 6 + [True, False]
    assert not seen[0, rc.INVADER]
    put(w, pause=0)
    assert not w.obs.obs_mask[0, 0, rc.INVADER] and w.obs.obs_mask[0, 2, rc.INVADER]
    assert w.obs.avail[0, :3].tolist() == [[False] + [True] * 5] * 3
    assert w.obs.avail[0, 3:].tolist() == [[True] + [False] * 5] * 5
    snapshot = rc.Snapshot(*(x.clone() for x in w.snapshot))
    assert all(torch.equal(a, b) for a, b in zip(w.observe(snapshot), w.obs))


# --- Episodes and streams -------------------------------------------------------------------------


def rollout(w, steps, policy=rc.collector):
    found = []
    for _ in range(steps):
        step = w.step(policy(w))
        found.append([x.clone() for x in (*step.final, step.reward, step.truncated)])
    return found


def test_a_seed_is_a_course_whatever_the_number_of_worlds():
    """Over ends of episodes; another seed is another one; worlds differ."""

    def course(seed, B, first, keep):
        w = rc.ResourceCollection((3, 4, 5), B, seed, first_battle=first, episode_limit=20)
        w.reset()
        return [[x[keep] for x in step] for step in rollout(w, 50)]

    def equal(a, b):
        return all(torch.equal(x, y) for s, t in zip(a, b) for x, y in zip(s, t))

    alone = course(7, 1, 3, slice(0, 1))
    assert equal(alone, course(7, 6, 0, slice(3, 4)))
    assert not equal(alone, course(8, 6, 0, slice(3, 4)))
    assert not equal(alone, course(7, 6, 0, slice(2, 3)))


@pytest.mark.parametrize("once", [False, True])
def test_saved_states_go_on_alike(once):
    w = rc.ResourceCollection((3, 5), 4, 1, episode_limit=30, once=once)
    w.reset()
    rollout(w, 20)
    saved = w.state_dict()
    other = rc.ResourceCollection((3, 5), 4, 9, episode_limit=30, once=once)
    other.load_state_dict(saved)
    a, b = rollout(w, 25), rollout(other, 25)
    assert all(torch.equal(x, y) for s, t in zip(a, b) for x, y in zip(s, t))
    assert all(torch.equal(x, y) for x, y in zip(w.reset(), other.reset()))
    with pytest.raises(ValueError, match="not of 4 worlds"):
        rc.ResourceCollection((3,), 4).load_state_dict(saved)
    fresh = rc.ResourceCollection((3, 5), 4, 5)
    other = rc.ResourceCollection((3, 5), 4, 6)
    other.load_state_dict(fresh.state_dict())  # before the first episode
    assert all(torch.equal(x, y) for x, y in zip(fresh.reset(), other.reset()))


def test_all_tensors_are_made_on_the_worlds_device():
    """torch's meta device has no values, but refuses what another device's tensors are mixed into:
    a GPU's stand-in. step() itself asks for values and is not tried."""
    zero = torch.zeros(4, dtype=torch.int64, device="meta")
    clocks = rc.Clocks(zero, zero, zero)
    snap = rc.fresh(clocks, torch.tensor([3, 5], device="meta"))
    actions = torch.ones(4, 8, dtype=torch.int64, device="meta")
    later, *rest = rc.advance(snap, actions, clocks)
    script = rc.collector(types.SimpleNamespace(snapshot=later))
    obs = rc.observe(later)
    short_sighted = rc.forager(types.SimpleNamespace(obs=obs))
    made = (*snap, *later, *obs, rest[0], *rest[1], script, short_sighted)
    assert {x.device.type for x in made} == {"meta"}


def test_episodes_end_and_say_what_happened():
    w = world(3, B=5, episode_limit=40, once=True)
    total, episodes = torch.zeros(5), []
    for k in range(45):
        step = w.step(rc.collector(w))
        total += step.reward
        episodes += step.episodes
        assert step.truncated.all() == (k == 39) and not step.terminated.any()
    assert [e.length for e in episodes] == [40] * 5 and [e.team for e in episodes] == [(3,)] * 5
    assert np.allclose([e.reward for e in episodes], total, atol=1e-3)
    assert sum(e.picked for e in episodes) > 5 and w.over.all()
    assert w.time.tolist() == [40] * 5
    told = []
    again = rc.play(w, rc.collector, told.append)
    assert len(again) == 5 and [e.battle for e in again] == list(range(5))
    assert told == [0] * 39 + [5]


def test_wrong_use():
    w = world(2)
    for actions, sentence in (
        ([[0] * 8], "World 0, agent 0: action 0"),
        ([[1, 6, 0, 0, 0, 0, 0, 0]], "World 0, agent 1: action 6"),
        ([[1, 1, 1, 0, 0, 0, 0, 0]], "World 0, agent 2: action 1"),
        ([[1, 1]], "not \\(1, 2\\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            w.step(torch.tensor(actions))
    for options, sentence in (
        ({"team_sizes": (9,)}, "1 to 8 agents: not 9"),
        ({"team_sizes": ()}, "At least one"),
        ({"num_battles": 0}, "num_battles is at least 1"),
        ({"seed": -1}, "seed is at least 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rc.ResourceCollection(**options)
    with pytest.raises(ValueError, match=r"Before step\(\) comes reset"):
        rc.ResourceCollection((2,), 1).step(torch.zeros(1, 8))


def test_scripts():
    """The collector earns far more than the forager, which sees no further than agents do, and that
    far more than random play; more with more agents (64 worlds: docs/mipi.md has more)."""
    earned = {}
    for n in (3, 8):
        w = rc.ResourceCollection((n,), 64, 1, once=True)
        for name, policy in rc.scripted_policies(1).items():
            earned[n, name] = rc.summarise(rc.play(w, policy))
    assert earned[3, "random"]["return"] < 20 and earned[8, "random"]["return"] < 40
    assert 45 < earned[3, "forager"]["return"] < 80 and 140 < earned[8, "forager"]["return"] < 190
    assert 90 < earned[3, "collector"]["return"] < 150
    assert 240 < earned[8, "collector"]["return"] < 340
    assert "| 3 collector" in rc.table({f"{n} {k}": x for (n, k), x in earned.items()})


TWO = [[-0.4, 0.0], [-0.6, 0.0], *[[FAR, 0.0]] * 4]  # of types 1 and 2


@pytest.mark.parametrize(
    "fields, action",
    [
        ({}, 4),  # the walk around home goes on, anticlockwise
        ({"position": [0.5, 0.0]}, 5),
        ({"position": [0.3, 0.0]}, 3),  # out first
        ({"resources": [[-0.4, 0.1 * k + 0.01] for k in range(6)]}, 3),  # the nearest
        ({"resources": [[-0.29, 0.0]] * 6}, 4),  # beyond sight
        ({"resources": TWO, "value": torch.tensor([0.9, 0.1, 0.9])}, 3),  # what pays more
        ({"resources": TWO, "value": torch.tensor([0.1, 0.9, 0.9])}, 2),
        ({"resources": [[-0.6, 0.0]] * 6, "holding": 1}, 3),  # home first
        ({"invader": [-0.5, 0.15], "pause": 0, "holding": 1}, 5),  # the invader before all
        ({"invader": [-0.5, 0.15], "pause": 3, "holding": 1}, 3),  # which has not come
    ],
)
def test_forager(fields, action):
    """What comes first, at (-.5, 0) if not told otherwise."""
    where = fields.pop("position", [-0.5, 0.0])
    w = quiet(position=torch.tensor(where), **fields)
    assert rc.forager(w).tolist() == [[action] + [0] * 7]


def test_the_forager_sees_what_agents_see():
    """Whatever is beyond everybody's sight may be anywhere."""
    w = rc.ResourceCollection((3, 4, 5), 64, 1)
    w.reset()
    acted = 0
    for _ in range(60):
        actions, snap = rc.forager(w), w.snapshot
        hidden = w.obs.obs_mask[:, :8, 8:].all(1)  # (B, 8)
        acted += int((~hidden[:, :7]).sum())
        moved = torch.where(hidden[:, :6, None], 5.0, snap.resources)
        invader = torch.where(hidden[:, 6:7], 7.0, snap.invader)
        obs = rc.observe(snap._replace(resources=moved, invader=invader))
        assert torch.equal(rc.forager(types.SimpleNamespace(obs=obs)), actions)
        w.step(actions)
    assert acted > 1000, "much was seen, too"


# --- Pictures -------------------------------------------------------------------------------------


def test_pictures(tmp_path):
    w = world(4, B=2, once=True)
    a = rc.draw(w.snapshot, 0)
    assert a.shape == (480, 480, 3) and a.dtype == np.uint8 and len(np.unique(a)) > 10
    w.step(rc.collector(w))
    assert not np.array_equal(a, rc.draw(w.snapshot, 0))
    small = world(2, once=True, episode_limit=6)
    rc.film(small, rc.collector, tmp_path / "videos" / "x.mp4")
    assert (tmp_path / "videos" / "x.mp4").stat().st_size > 1000
