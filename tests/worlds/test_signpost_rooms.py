"""signpost and rooms: worlds that need the population. Their rules agent by agent in NumPy."""

import math

import numpy as np
import pytest
import torch

from envs.particle.episodes import play, scripted_players
from envs.particle.worlds import ParticleWorld, draw, make_game, move, pack, unpack, wanted

GAMES = (("signpost", 3), ("signpost", 7), ("rooms", (2, 3)), ("rooms", (9, 3)))
MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], float)
PAYS = {2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2}


@pytest.mark.parametrize(("task", "population"), GAMES)
def test_a_step_is_the_plain_one(task, population):
    world = ParticleWorld(task, population, 40, seed=3, dtype=torch.float64)
    game = world.game
    N, first = game.num_agents, game.population[0]
    world.reset()
    rng = np.random.default_rng(1)
    for _ in range(3):
        before = unpack(game, world.bodies)
        actions = rng.integers(0, 5, (40, N))
        step = world.step(torch.from_numpy(actions))
        for b in range(40):
            p, v = before.position[..., b].numpy().T, before.velocity[..., b].numpy().T
            posts = before.landmarks[..., b].numpy().T
            v = 0.75 * v + 0.1 * 5 * MOVES[actions[b]]
            v[first:] = 0  # leaders stay
            p = p + 0.1 * v
            places = posts if task == "signpost" else p[first:]
            pays = places[PAYS[first]]
            reward = [-math.dist(p[i], pays) if i < first else 0.0 for i in range(N)]
            assert np.allclose(step.reward[b], reward, atol=1e-12)
            marks = [[*(posts - p[i]).flatten()] for i in range(N)]
            own = [[*v[i], *p[i], *marks[i]] for i in range(N)]
            kinds = [[] if task == "signpost" else [i < first, i >= first] for i in range(N)]
            colours = [[] if task == "signpost" else [i == first + k for k in range(3)]
                       for i in range(N)]  # fmt: skip
            entities = [
                [[*(p[j] - p[i]), *v[j], *kinds[j], *colours[j], *marks[j]] for j in range(N)]
                for i in range(N)
            ]
            mask = [[i != j and (task == "signpost" or j >= first) for j in range(N)]
                    for i in range(N)]  # fmt: skip
            seen = (step.final.own, step.final.entities(), step.final.mask())
            for ours, truth in zip(seen, (own, entities, mask)):
                assert np.allclose(ours[b], np.array(truth, float), atol=1e-12)
        assert not step.terminated.any()


@pytest.mark.parametrize("task", ["signpost", "rooms"])
def test_nobody_pushes(task):
    """Two agents almost at one point move as if alone; in treasure they fly apart."""
    game = make_game(task, 2 if task == "signpost" else (2, 3))
    bodies = unpack(game, torch.zeros(game.state_size, 1))
    bodies.position[0, 0] = 0.01
    moved = move(game, bodies, torch.zeros(game.num_agents, 1, dtype=torch.int64))
    assert torch.equal(moved.position, bodies.position)


def test_posts_are_an_equilateral_triangle_far_enough_apart_in_any_order():
    world = ParticleWorld("signpost", 3, 4000, seed=2)
    world.reset()
    posts = unpack(world.game, world.bodies).landmarks[..., :4000].double()
    sides = [(posts[:, k] - posts[:, k - 1]).norm(dim=0) for k in range(3)]
    assert torch.allclose(sides[0], sides[1], atol=1e-5)
    assert torch.allclose(sides[0], sides[2], atol=1e-5)
    assert float(sides[0].min()) > 1.2 and float(sides[0].max()) < 1.52
    assert float(posts.abs().max()) < 1.05
    # Neither a post's place nor the direction of turn tells its colour.
    assert (posts.mean(-1).abs() < 0.05).all()
    a, b = posts[:, 1] - posts[:, 0], posts[:, 2] - posts[:, 0]
    clockwise = (a[0] * b[1] - a[1] * b[0] < 0).double().mean()
    assert 0.46 < clockwise < 0.54


def test_leaders_never_move_and_which_pays():
    world = ParticleWorld("rooms", (6, 3), 30, seed=4)
    world.reset()
    before = unpack(world.game, world.bodies).position[:, 6:].clone()
    for _ in range(10):
        world.step(torch.full((30, 9), 2))
    assert torch.equal(unpack(world.game, world.bodies).position[:, 6:], before)
    for count, colour in PAYS.items():
        assert wanted(make_game("signpost", count)) == colour
        assert wanted(make_game("rooms", (count, 3))) == colour


@pytest.mark.parametrize(("task", "population"), GAMES)
def test_scripted_players_are_in_order(task, population):
    """Who knows the population earns most, then who does not and stays between, then who errs."""
    means = {}
    for name, player in scripted_players(task, 1).items():
        means[name] = play(ParticleWorld(task, population, 400, seed=5), player)[:, 0].mean()
    knows, blind, wrong = means["knows population"], means["blind"], means["wrong population"]
    assert knows > blind + 5 > wrong + 9 and blind > means["random"] + 4


def test_the_blind_player_is_the_best_constant_guess():
    """No other point has a smaller sum of distances: against a grid."""
    world = ParticleWorld("rooms", (3, 3), 1, seed=8, horizon=200)
    world.reset()
    blind = scripted_players("rooms", 1)["blind"]
    for _ in range(100):
        world.step(blind(world))
    bodies = unpack(world.game, world.bodies)
    leaders = bodies.position[:, 3:, 0].double().numpy().T
    stood = bodies.position[:, :3, 0].double().numpy().T
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 401)]), -1).reshape(-1, 2)
    cost = lambda at: sum(np.linalg.norm(at - x, axis=-1) for x in leaders)  # noqa: E731
    assert cost(stood).max() < cost(grid).min() + 0.1  # actions have one size: they swing about it


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("rooms", 3),
            "A population of rooms is 2 numbers with commas (follower,leader): 3 is not.",
        ),
        (("rooms", (3, 2)), "A population of rooms has 3 of type leader, not 3,2."),
        (("signpost", (3, 3)), "A population of signpost is one number: 3,3 is not."),
        (("rooms", (3, 3), {"nearest": 1}), "nearest is from 0 to 0, not 1."),
        (("signpost", 3, {"nearest": 1}), "in_order shows all landmarks, and not their sizes."),
        (("resource", 3, {"in_order": True}), "in_order shows all landmarks, and not their sizes."),
    ],
)
def test_what_does_not_exist_is_one_sentence(arguments, sentence):
    task, population, options = (*arguments, {})[:3]
    with pytest.raises(ValueError) as error:
        make_game(task, population, **options)
    assert str(error.value) == sentence


@pytest.mark.parametrize(("task", "population"), [("signpost", 6), ("rooms", (3, 3))])
def test_pictures_show_which_place_pays(task, population):
    """The three places in their colours; the one that pays with a black rim."""
    game = make_game(task, population)
    bodies = unpack(game, torch.zeros(game.state_size, 1))
    bodies.alive[:] = True
    places = bodies.landmarks if task == "signpost" else bodies.position[:, 3:]
    places[0, :, 0] = torch.tensor([-0.75, 0.0, 0.75])
    places[1] = 0.5
    image = draw(game, pack(bodies)[:, 0].numpy(), 600)
    centres = [tuple(image[200, x]) for x in (150, 300, 450)]
    assert centres == [(214, 39, 40), (44, 160, 44), (150, 75, 200)]
    black = [(image[170:230, x - 30 : x + 30] == 0).all(-1).any() for x in (150, 300, 450)]
    assert black == [k == wanted(game) for k in range(3)]
