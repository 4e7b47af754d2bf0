"""delivery: MAAC's treasure collection. Its rules in NumPy, one agent and treasure after the other,
written from docs/particle.md."""

import csv
import functools
import itertools
import math
import shutil
from pathlib import Path

import harness

import numpy as np
import pytest
import torch
from particle_tools import EPC, MAAC, MADDPG, MRA, initial, replays, run, script, tiny
from runs import some_long

from envs.particle.episodes import play, random_player, scripted_players
from envs.particle.worlds import (
    TASKS,
    Clocks,
    ParticleWorld,
    deliver,
    draw,
    fresh,
    hand_over,
    make_game,
    mixed,
    pack,
    unpack,
)

ROOT = Path(__file__).resolve().parents[2]
MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], float)
AWAY = np.array([-999.0, -999.0])


class Plain:
    """One world. Kinds count from 0 here; who carries nothing has None."""

    def __init__(self, bodies, b):
        self.p, self.v = bodies.position[..., b].numpy().T, bodies.velocity[..., b].numpy().T
        self.treasures = bodies.landmarks[..., b].numpy().T.copy()
        self.kinds = [int(kind) - 1 for kind in bodies.kinds[:, b]]
        self.carried = [int(kind) - 1 if kind else None for kind in bodies.carried[:, b]]
        self.C, self.N = len(self.carried), len(self.p)
        self.mass = [1.0] * self.C + [2.25] * 2
        self.radius = [0.05] * self.C + [0.075] * 2

    def far(self, i, j):
        return math.dist(self.p[i], self.p[j])

    def on_treasure(self, i, k):
        return math.dist(self.p[i], self.treasures[k]) < 0.075

    def at_deposit(self, i):
        return self.far(i, self.C + self.carried[i]) < 0.125

    def hand_over(self, places, kinds):
        """What touching has led to, where reappearing treasures come to `places`; how often what
        was taken, brought, and brought in the very moment it was taken."""
        taken = brought = at_once = 0
        before = list(self.carried)
        for k in range(len(self.treasures)):
            if (self.treasures[k] == AWAY).all():
                self.treasures[k], self.kinds[k] = places[k], kinds[k]
                continue
            for i in range(self.C):
                if self.carried[i] is None and self.on_treasure(i, k):
                    self.carried[i], self.treasures[k] = self.kinds[k], AWAY
                    taken += 1
                    break
        for i in range(self.C):
            if self.carried[i] is not None and self.at_deposit(i):
                brought, at_once = brought + 1, at_once + (before[i] is None)
                self.carried[i] = None
        return np.array([taken, brought, at_once])

    def move(self, actions):
        """A force of 2.25 per mass; the push f between i and j counts m_j / m_i times for i."""
        force = 2.25 * MOVES[actions]
        for i, j in itertools.permutations(range(self.N), 2):
            d = self.p[i] - self.p[j]
            gap = math.hypot(*d) - self.radius[i] - self.radius[j]
            push = 100 * d / math.hypot(*d) * 1e-3 * np.logaddexp(0, -gap / 1e-3)
            force[i] += self.mass[j] / self.mass[i] * push / self.mass[i]
        self.v = 0.75 * self.v + 0.1 * force
        for i in range(self.N):
            self.v[i] /= max(1.0, math.hypot(*self.v[i]))
        self.p = self.p + 0.1 * self.v

    def rewards(self, shaping):
        C, L = self.C, len(self.treasures)
        shared = 0
        for i in range(C):
            if self.carried[i] is None:
                shared += 5 * sum(self.on_treasure(i, k) for k in range(L))
            else:
                shared += 5 * self.at_deposit(i)
        reward = np.full(self.N, float(shared))
        for i in range(C):
            reward[i] -= 5 * sum(self.far(i, j) < 0.1 for j in range(C) if j != i)
            if shaping and self.carried[i] is None:
                reward[i] -= 0.1 * min(math.dist(self.p[i], x) for x in self.treasures)
            elif shaping:
                reward[i] -= 0.1 * self.far(i, C + self.carried[i])
        for d in range(2) if shaping else ():
            bring = [self.far(i, C + d) for i in range(C) if self.carried[i] == d]
            nearest = sorted(range(C), key=lambda i: self.far(i, C + d))[:7]
            middle = np.mean([self.p[i] - self.p[C + d] for i in nearest], 0)
            reward[C + d] -= 0.1 * (min(bring) if bring else math.hypot(*middle))
        return reward

    def label(self, i):
        """What i takes in, and what it carries."""
        takes = [float(i == self.C), float(i == self.C + 1)]
        return takes + [float(i < self.C and self.carried[i] == kind) for kind in (0, 1)]

    def observation(self, nearest):
        """own (N, Ds) and entities (N, N, De)."""
        own = []
        for i in range(self.N):
            far = [math.dist(self.p[i], x) for x in self.treasures]
            marks = np.zeros((nearest, 4))
            for row, k in zip(marks, np.argsort(far, kind="stable")):
                row[:2], row[2 + self.kinds[k]] = self.treasures[k] - self.p[i], 1
            own.append([*self.v[i], *self.p[i], *self.label(i), *marks.flatten()])
        entities = [
            [[*(self.p[j] - self.p[i]), *self.v[j], *self.label(j)] for j in range(self.N)]
            for i in range(self.N)
        ]
        return np.array(own), np.array(entities)


def crowd(world, seed, spread=0.5):
    """Let the episode begin with everything near the middle, and thrown."""
    bodies = unpack(world.game, world.bodies)
    velocity = np.random.default_rng(seed).normal(0, 1, bodies.velocity.shape)
    world.bodies = pack(
        bodies._replace(
            position=spread * bodies.position,
            velocity=torch.from_numpy(velocity),
            landmarks=spread * bodies.landmarks,
        )
    )


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("population", "shaping", "nearest"),
    [((6, 2), True, 7), ((12, 2), True, 7), ((6, 2), False, 3), ((1, 2), True, 7)],
)
def test_an_episode_is_the_plain_one(population, shaping, nearest):
    """Physics, rewards, who carries what, where treasures are and what is seen, step by step."""
    world = ParticleWorld(
        "delivery", population, 8, seed=3, dtype=torch.float64, shaping=shaping, nearest=nearest
    )
    world.reset()
    if population != (1, 2):
        crowd(world, 7)
    before, events = unpack(world.game, world.bodies), np.zeros(3, int)
    rng = np.random.default_rng(1)
    for t in range(20):
        actions = deliver(world)
        for_fun = torch.from_numpy(rng.random(actions.shape) < 0.2)
        actions = torch.where(for_fun, torch.from_numpy(rng.integers(0, 5, actions.shape)), actions)
        step = world.step(actions)
        after = unpack(world.game, step.final_state.T)
        for b in range(8):
            plain = Plain(before, b)
            if t:
                places = after.landmarks[..., b].numpy().T
                events += plain.hand_over(places, [int(kind) - 1 for kind in after.kinds[:, b]])
            plain.move(actions[b].numpy())
            assert np.allclose(after.position[..., b].T, plain.p, atol=1e-9)
            assert np.allclose(after.velocity[..., b].T, plain.v, atol=1e-9)
            assert np.array_equal(after.landmarks[..., b].T, plain.treasures)
            assert [int(kind) - 1 for kind in after.kinds[:, b]] == plain.kinds
            carried = [0 if kind is None else kind + 1 for kind in plain.carried]
            assert after.carried[:, b].tolist() == carried
            assert np.allclose(step.reward[b], plain.rewards(shaping), atol=1e-9)
            for ours, truth in zip(
                (step.final.own, step.final.entities()), plain.observation(nearest)
            ):
                assert np.allclose(ours[b], truth, atol=1e-9)
            mask = step.final.mask()[b]
            assert torch.equal(mask, ~torch.eye(plain.N, dtype=torch.bool))
        again = world.observe(step.final_state)
        assert all(torch.equal(x, y) for x, y in zip(again, step.final))
        assert step.alive.all() and not step.terminated.any()
        assert bool(step.truncated.all()) == (t == 19)
        before = after
    assert events[0] >= 2 and (events[1] >= 2 or population == (1, 2))


@pytest.mark.numeric
def test_the_order_of_events():
    """A step pays for what is touched when it ends; the next one begins with who takes and who
    brings it; a treasure is away for one observation, then anywhere, of any kind."""
    game = make_game("delivery", (6, 2), shaping=False)
    world = ParticleWorld("delivery", (6, 2), 1, seed=1, shaping=False)
    world.reset()
    bodies = unpack(game, torch.zeros(game.state_size, 32))
    bodies.alive[:] = True
    # 0 and 1 at treasure 0; 2 at treasures 1 and 2; 3 comes to its deposit and a treasure there;
    # 4 brings one to deposit 0, where it is not taken in, 5 does nothing.
    place = [[-0.07, 0], [0.07, 0], [0.5, 0], [0.2, 0.8], [-0.8, -0.19], [-0.8, 0.8]]
    place += [[-0.8, -0.3], [0, 0.8]]
    treasures = [[0, 0], [0.5, 0.05], [0.5, -0.05], [0.1, 0.8], [0.8, -0.8], [0.8, -0.7]]
    bodies.position[..., 0] = torch.tensor(place).T
    bodies.velocity[0, 3, 0] = -1.2
    bodies.landmarks[..., 0] = torch.tensor(treasures).T
    bodies.kinds[:, 0] = torch.tensor([1.0, 2, 1, 2, 1, 1])
    bodies.carried[4, 0] = 2
    world.bodies = pack(bodies)
    nothing = torch.zeros(1, 8, dtype=torch.int64)

    def after():
        step = world.step(nothing)
        state = unpack(game, step.final_state.T)
        return step, state.carried[:, 0].tolist(), state.landmarks[..., 0].T, state.kinds[:, 0]

    step, carried, landmarks, _ = after()
    assert step.reward[0].tolist() == [5.0 * (2 + 2 + 1)] * 8
    assert carried == [0, 0, 0, 0, 2, 0] and torch.equal(landmarks, torch.tensor(treasures))
    step, carried, landmarks, kinds = after()
    assert step.reward[0].tolist() == [0.0] * 8
    assert carried == [1, 0, 2, 0, 2, 0]
    away = [k for k in range(6) if landmarks[k].tolist() == [-999, -999]]
    assert away == [0, 1, 3] and kinds.tolist() == [1, 2, 1, 2, 1, 1]
    seen = step.final.own[0, 5, 8:].unflatten(0, (7, 4))
    assert (seen[:3, 0] > 0).all() and (seen[3:6, 0] < -998).all() and not seen[6].any()
    assert seen[3:6, 2:].tolist() == [[1, 0], [0, 1], [0, 1]]  # treasures 0, 1, 3
    _, _, landmarks, kinds = after()
    assert landmarks.abs().max() <= 0.95
    assert torch.equal(landmarks[[2, 4, 5]], torch.tensor(treasures)[[2, 4, 5]])
    assert kinds[[2, 4, 5]].tolist() == [1, 1, 1]


def clocks(worlds, time):
    key = mixed(torch.arange(worlds))
    return Clocks(key, torch.zeros_like(key), torch.full_like(key, time))


@pytest.mark.numeric
def test_where_and_as_what_treasures_come():
    """At first and again: anywhere within .95, each kind half of the time, whatever it was."""
    game = make_game("delivery", (3, 2))
    begun = fresh(game, clocks(4000, 0), torch.float64)
    away = begun._replace(landmarks=0 * begun.landmarks - 999)
    again = hand_over(game, away, clocks(4000, 5))
    assert begun.position.abs().max() > 0.99 and not begun.carried.any()
    for bodies in (begun, again):
        places = bodies.landmarks
        assert 0.945 < places.abs().max() <= 0.95
        assert abs(float(places.mean())) < 0.02 and abs(float(places.std()) - 0.5485) < 0.01
        assert set(bodies.kinds.unique().tolist()) == {1, 2}
        assert abs(float(bodies.kinds.mean()) - 1.5) < 0.02
    assert abs(float((begun.kinds == again.kinds).double().mean()) - 0.5) < 0.02
    corner = np.corrcoef(torch.cat((*again.landmarks, again.kinds)))
    assert np.abs(corner - np.eye(9)).max() < 0.08  # x, y and kind of each draw a number of its own


@pytest.mark.parametrize(("population", "shown"), [((1, 2), 1), ((6, 2), 6), ((12, 2), 7)])
def test_populations_have_observations_of_one_size(population, shown):
    """One network fits them all: places of treasures that do not exist are 0."""
    world = ParticleWorld("delivery", population, 5, seed=2)
    obs, N = world.reset(), sum(population)
    assert obs.own.shape == (5, N, 36) and obs.others.shape == (5, N, 8)
    assert world.state.shape == (5, 5 * N + 4 * population[0])
    marks = obs.own[..., 8:].unflatten(-1, (7, 4))
    assert (marks[:, :, :shown, 2:].sum(-1) == 1).all() and not marks[:, :, shown:].any()


@pytest.mark.long
@pytest.mark.parametrize("population", [(6, 2), (12, 2)])
def test_compiled_steps_are_the_eager_ones(population):
    """From the same states; but for where a last bit decides who touches what."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    eager = ParticleWorld("delivery", population, 64, seed=2)
    fast = ParticleWorld("delivery", population, 64, seed=2, compiled=True)
    eager.reset()
    fast.reset()
    rng = torch.Generator().manual_seed(1)
    compared = taken = 0
    for _ in range(40):
        fast.load_state_dict(eager.state_dict())
        actions = deliver(eager)
        anything = torch.randint(0, 5, actions.shape, generator=rng)
        some = torch.rand(actions.shape, generator=rng) < 0.3
        actions = torch.where(some, anything, actions)
        a, b = eager.step(actions), fast.step(actions)
        alike = (a.reward - b.reward).abs().amax(1) < 1e-3
        assert alike.float().mean() > 0.95
        for x, y in zip((*a.final, a.reward, a.final_state), (*b.final, b.reward, b.final_state)):
            x, y = x.float()[alike], y.float()[alike]
            close = (x - y).abs() <= 1e-5 + 1e-7 * y.abs()  # 1e-4 of what is 999 away
            assert close.flatten(1).all(1).float().mean() > 0.95
        compared += int(alike.sum())
        taken += int((a.final_state == -999).any(1).sum())
    assert compared > 2400 and taken > 200
    assert fast._advance.call is not fast._advance.plain


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((6,), "A population of delivery is 2 numbers with commas (collector,deposit): 6 is not."),
        (((6, 3),), "A population of delivery has 2 of type deposit, not 6,3."),
        (((0, 2),), "A population has at least one agent of each type: not 0,2."),
        (
            ((6, 2), {"collision_penalty": 1.0}),
            "delivery has its own collision_penalty, 5: it takes no other.",
        ),
        (((6, 2), {"nearest": 8}), "nearest is from 1 to 7, not 8."),
    ],
)
def test_what_does_not_exist_is_one_sentence(arguments, sentence):
    population, options = (*arguments, {})[:2]
    with pytest.raises(ValueError) as error:
        make_game("delivery", population, **options)
    assert str(error.value) == sentence


@pytest.mark.numeric
def test_scripted_players():
    """What docs/data/particle_players.csv says of them, with another seed: within five of its
    standard errors (its intervals are four wide, of twice as many episodes)."""
    with (ROOT / "docs/data/particle_players.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "delivery"]
    means = {(row["population"], row["role"], row["player"]): row for row in rows}
    for name, population in (("3,2", (3, 2)), ("12,2", (12, 2))):
        for player, function in scripted_players("delivery", 4).items():
            found = play(ParticleWorld("delivery", population, 512, seed=11), function).mean(0)
            for role, mean in zip(TASKS["delivery"].roles, found):
                row = means[name, role, player]
                width = float(row["high"]) - float(row["low"])
                assert abs(mean - float(row["mean"])) < 5 * width / 4 * 1.8, (name, role, player)


@pytest.mark.numeric
def test_who_delivers_earns_more_than_who_does_not():
    """And keeping apart saves collisions, at the price of treasures."""
    apart = functools.partial(deliver, fear=0.15)
    found = [
        play(ParticleWorld("delivery", (6, 2), 300, seed=4), player).mean(0)
        for player in (random_player(1), deliver, apart)
    ]
    collector, deposit = np.transpose(found)
    assert collector[0] + 20 < collector[1] < collector[2] - 3
    assert deposit[0] + 20 < deposit[2] < deposit[1] - 1


def test_pictures_show_what_is_carried():
    """Treasures, deposits and who carries one in the colour of the kind; others are grey; a
    treasure that is away is not to be seen."""
    game = make_game("delivery", (3, 2))
    bodies = unpack(game, torch.zeros(game.state_size, 1))
    bodies.alive[:] = True
    bodies.position[0, :, 0] = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    bodies.carried[:, 0] = torch.tensor([0.0, 1, 2])
    bodies.landmarks[:, :, 0] = torch.tensor([[-0.5, 0.5, -999], [-0.75, -0.75, -999]])
    bodies.kinds[:, 0] = torch.tensor([1.0, 2, 1])
    image = draw(game, pack(bodies)[:, 0].numpy(), 600)
    blue, red, grey = (31, 119, 180), (214, 39, 40), (150, 150, 150)
    agents = [tuple(image[300, x]) for x in (100, 200, 300, 400, 500)]
    assert agents == [grey, blue, red, blue, red]
    assert [tuple(image[450, x]) for x in (200, 400)] == [blue, red]
    black = [(image[280:320, x - 20 : x + 20] == 0).all(-1).any() for x in (300, 400, 500)]
    assert black == [False, True, True]
    assert (image[560:, :40] == 255).all()


@pytest.mark.parametrize("name", some_long([MRA, MADDPG, MAAC, EPC], MADDPG, MAAC))
def test_scripts_train_on_it(name, tmp_path, monkeypatch, capfd):
    """Their weights move and their replays hold what is carried; MRA and EPC have two populations.
    What the task does not have is one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "distributions", lambda: [])
    flags = ["--task", "delivery", "--num-threads", 1, "--max-episode-steps", 20]
    flags += ["--populations", "3,2", "6,2"] if name in (MRA, EPC) else ["--population", "6,2"]
    state = run(name, "run", 400, *flags)
    assert not torch.equal(*(next(weights(x["agent"])) for x in (initial("run"), state)))
    game = make_game("delivery", (6, 2))
    assert any(
        x.shape[-1] == game.state_size and (unpack(game, x.T).carried > 0).any()
        for replay in replays("run")
        for x in tensors(replay)
    )
    capfd.readouterr()
    assert script(name).main(tiny(name, "no", 400, *flags, "--collision-penalty", 1)) == 2
    assert "delivery has its own collision_penalty, 5" in capfd.readouterr().err


def weights(x):
    """Tensors of the first network of an agent's saved parts."""
    return (y for y in tensors(x) if y.is_floating_point() and y.dim() > 1)


def tensors(x):
    """All of a nested structure."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (dict, list, tuple)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors(part)
