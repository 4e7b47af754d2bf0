"""envs/smac/matrix_game.py and `mipi.py matrix-game`: what the paper's text says of the
payoffs, optima against closed forms and other enumerations, what five seeds of each learner end at.
"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.smac.matrix_game import (
    OBJECTIVES,
    PAYOFFS,
    TRAINED,
    UNSEEN,
    bonus,
    optima,
    optimum,
    reward,
    unseen_reward,
)
from experiments import mipi as study

SETS = list(PAYOFFS)
TEAMS = (*TRAINED, UNSEEN)


def logistic(x):
    return 1 / (1 + np.exp(-x))


# --- The game -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_what_the_text_says_of_the_payoffs(name):
    """(0,0) pays the same in every team and is the best in none; trained teams have other best
    joint actions, in "coordinated" all three have."""
    game = PAYOFFS[name]
    assert len({game[team][0, 0] for team in TEAMS}) == 1
    best = [tuple(np.argwhere(game[team] == game[team].max())[0]) for team in TEAMS]
    assert all((game[team] == game[team].max()).sum() == 1 for team in TEAMS)
    assert (0, 0) not in best and best[0] != best[1]
    assert len(set(best)) == (3 if name == "coordinated" else 2), "docs/mipi.md says so"


def test_additive_payoffs_are_sums():
    """r = .8 + .2 a_B - a_A in the trained teams, what a linear mixer can represent."""
    for a1, a2 in itertools.product((0, 1), repeat=2):
        assert np.isclose(PAYOFFS["additive"]["AB"][a1, a2], 0.8 + 0.2 * a2 - a1)
        assert np.isclose(PAYOFFS["additive"]["BA"][a1, a2], 0.8 + 0.2 * a1 - a2)


@pytest.mark.parametrize("name", SETS)
def test_objectives_by_counting(name):
    """Reward, entropies and mutual information of random policies, by sums over teams and joint
    actions."""
    rng, game = np.random.default_rng(0), PAYOFFS[name]
    for _ in range(20):
        p = rng.uniform(size=(2, 2))
        of = lambda i, t, a: p[i, "AB".index(t)] if a else 1 - p[i, "AB".index(t)]  # noqa: E731,B023
        earned, entropy, information = 0.0, 0.0, 0.0
        for team in TRAINED:
            for a in itertools.product((0, 1), repeat=2):
                both = of(0, team[0], a[0]) * of(1, team[1], a[1])
                earned += 0.5 * both * game[team][a]
            for i, a in itertools.product((0, 1), repeat=2):
                mine = of(i, team[i], a)
                mean = (of(i, "A", a) + of(i, "B", a)) / 2
                entropy -= 0.5 * mine * np.log(mine)
                information += 0.5 * mine * np.log(mine / mean)
        assert np.isclose(reward(game, p), earned)
        assert np.isclose(bonus("entropy", p), entropy)
        assert np.isclose(bonus("mi", p), -information)
        assert bonus("none", p) == 0


# --- Optima ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_best_policy_for_reward_alone(name):
    """The best of the 16 deterministic ones: reward is linear in each probability."""
    game = PAYOFFS[name]
    all_of = [np.array(p, float).reshape(2, 2) for p in itertools.product((0, 1), repeat=4)]
    best = max(float(reward(game, p)) for p in all_of)
    assert np.isclose(optimum(game, "none", 0.5).value, best)


def check_optimum(objective, alpha, exact):
    """Both agents have the exact policy: no point of the grid is better, the best is as good and,
    where the top is not too flat, close by."""
    game, p = PAYOFFS["additive"], np.array([exact, exact])
    value = reward(game, p) + alpha * bonus(objective, p)
    found = optimum(game, objective, alpha)
    assert 0 <= value + 1e-12 - found.value < 2e-3
    assert np.abs(found.policies - p).max() < 0.05


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_best_policy_with_entropy_of_additive_payoffs(alpha):
    """Each agent for itself: a logistic function of what action 1 adds, over alpha."""
    check_optimum("entropy", alpha, [logistic(-1 / alpha), logistic(0.2 / alpha)])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.25, 0.5])
def test_best_policy_with_mutual_information_of_additive_payoffs(alpha):
    """Each agent for itself, by Blahut and Arimoto's alternation, which finds the optimum there."""
    gain, m = np.array([-1.0, 0.2]), 0.5  # of action 1, as A and as B
    for _ in range(3000):
        p = m * np.exp(gain / alpha) / (m * np.exp(gain / alpha) + 1 - m)
        m = p.mean()
    check_optimum("mi", alpha, p)


def test_what_the_optima_say():
    """At alpha = .5: with mutual information (0,0) in both sets, with the others what fails on
    (B,B); "coordinated" has a second maximum, where it would fail, too."""
    for name in SETS:
        ends = {kind: optimum(PAYOFFS[name], kind, 0.5).unseen for kind in OBJECTIVES}
        assert ends["mi"] == 0.8 and max(ends["none"], ends["entropy"]) <= 0
    assert optimum(PAYOFFS["additive"], "none", 0.5).unseen == -1
    assert len(optima(PAYOFFS["additive"], "mi", 0.5)) == 1
    first, second = optima(PAYOFFS["coordinated"], "mi", 0.5)
    assert (first.policies == 0).all() and second.unseen == 0 and second.value < first.value


# --- Learners -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "objective, action, earned",
    [
        ("mi", 0, 0.8),
        ("none", 1, -1.0),
        ("entropy", 1, -1.0),
    ],
)
def test_five_seeds_end_where_the_optimum_is(objective, action, earned):
    """Additive payoffs: greedy actions in (B,B), and policies near the exact ones everywhere."""
    torch.set_num_threads(1)
    points = study.learn_game(study.MatrixGame(steps=1200, every=1200), objective)
    assert points.shape == (2, 5, 2, 2)
    game = PAYOFFS["additive"]
    exact = optimum(game, objective, 0.5).policies
    for seed, p in enumerate(points[-1]):
        assert ((p[:, 1] > 0.5) == action).all() and unseen_reward(game, p) == earned, seed
        assert np.abs(p - exact).max() < 0.1, seed
    assert np.abs(points[0] - exact).max() > 0.3, "it began elsewhere"


def test_command(tmp_path, capsys, monkeypatch):
    """Three files and a table; --exact prints the optima alone; a wrong option is one sentence."""
    monkeypatch.chdir(tmp_path)
    words = ["matrix-game", "--steps", "20", "--every", "10", "--seeds", "1", "2", "--grid", "10"]
    assert study.main([*words, "--out", "x"]) == 0
    assert "reward - mutual information" in capsys.readouterr().out
    assert {x.name for x in tmp_path.iterdir()} == {"x.png", "x.csv", "x.md"}
    with Path("x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 * 3, "learners, actions, seeds, points"
    assert study.main([*words, "--exact", "--out", "y"]) == 0
    out = capsys.readouterr().out
    assert "seed" not in out and "0.800" in out and not list(tmp_path.glob("y*"))
    assert study.main([*words, "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err


def test_rows_of_the_command(tmp_path, monkeypatch):
    """I4 reads them: rewards in (B,B) of greedy and of drawn actions, by hand from p(1) = .2, .9
    of agents of type B at one point, .6, .3 at another; two seeds."""
    monkeypatch.chdir(tmp_path)
    points = np.full((2, 2, 2, 2), 0.5)  # points, seeds, agents, types
    points[..., 1] = [[[0.2, 0.9], [0.6, 0.3]], [[0.6, 0.3], [0.2, 0.9]]]
    monkeypatch.setattr(study, "learn_game", lambda *_: points)
    words = ["matrix-game", "--steps", "10", "--every", "10", "--seeds", "4", "7", "--grid", "2"]
    assert study.main([*words, "--out", "x"]) == 0
    payoff = PAYOFFS["additive"][UNSEEN]

    def drawn(p, q):
        return (1 - p) * ((1 - q) * payoff[0, 0] + q * payoff[0, 1]) + p * (
            (1 - q) * payoff[1, 0] + q * payoff[1, 1]
        )

    ways = {"greedy": (payoff[0, 1], payoff[1, 0]), "drawn": (drawn(0.2, 0.9), drawn(0.6, 0.3))}
    assert len({float(x) for own in ways.values() for x in own}) > 2
    with Path("x.csv").open() as file:
        rows = list(csv.DictReader(file))
    for objective, (way, (one, other)) in itertools.product(OBJECTIVES, ways.items()):
        own = [r for r in rows if (r["objective"], r["actions"]) == (objective, way)]
        found = {(r["seed"], r["step"]): float(r["reward"]) for r in own}
        wanted = {("4", "0"): one, ("7", "0"): other, ("4", "10"): other, ("7", "10"): one}
        assert found == pytest.approx(wanted)
