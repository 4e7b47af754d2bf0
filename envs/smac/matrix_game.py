"""MIPI's matrix game (Fig. 2): two agents of two types, one step, a team that was never trained.

Agents have types A and B and take action 0 or 1. Teams (A,B) and (B,A) are trained, each half of
the time; (B,B) is what comes after. (0,0) pays the same in every team and is the best in none. The
paper's payoffs are pictures; the two sets here are ours and have what its text says of them.

    game = PAYOFFS["additive"]
    game["BB"][1, 1]                                 what (1,1) pays in team (B,B)
    optimum(game, "mi", alpha=0.5)                   the best policies there are, by enumeration

A policy sees its agent's index and own type, a marginal policy the index alone: policies p
(2 agents, 2 types) are probabilities of action 1. What an agent can know of the team is its own
type, so the mutual information of an agent's action and the team is that of action and type.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.special import entr

Objective = Literal["none", "entropy", "mi"]
OBJECTIVES: tuple[Objective, ...] = ("none", "entropy", "mi")
TYPES = "AB"
TRAINED, UNSEEN = ("AB", "BA"), "BB"
PAYOFFS = {  # {team: r[action of agent 1, action of agent 2]}
    # r = .8 + .2 a2 - a1, .8 + .2 a1 - a2: sums of what each agent does, as a linear mixer has it.
    "additive": {
        "AB": np.array([[0.8, 1.0], [-0.2, 0.0]]),
        "BA": np.array([[0.8, -0.2], [1.0, 0.0]]),
        "BB": np.array([[0.8, 1.0], [0.0, -1.0]]),
    },
    # Another joint action is the best in each team.
    "coordinated": {
        "AB": np.array([[0.8, 0.0], [0.0, 1.0]]),
        "BA": np.array([[0.8, 0.0], [1.0, 0.0]]),
        "BB": np.array([[0.8, 1.0], [0.0, 0.0]]),
    },
}
Payoffs = dict[str, np.ndarray]


class Optimum(NamedTuple):
    """Policies that no other ones nearby exceed."""

    value: float  # of the objective
    reward: float  # in training
    policies: np.ndarray  # (2 agents, 2 types), probabilities of action 1
    unseen: float  # what their greedy actions earn in (B,B)


def entropy(p: np.ndarray) -> np.ndarray:
    """Nats, of two actions with probabilities p and 1 - p."""
    return entr(p) + entr(1 - p)


def expected(payoff: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """E r of probabilities of action 1; arrays of one shape."""
    a, b = (1 - first, first), (1 - second, second)
    return sum(payoff[i, j] * a[i] * b[j] for i, j in itertools.product((0, 1), repeat=2))


def reward(game: Payoffs, p: Any) -> np.ndarray:
    """E r in the trained teams, of policies p[agent][type], probabilities of action 1."""
    found = [expected(game[t], *(p[i][TYPES.index(t[i])] for i in (0, 1))) for t in TRAINED]
    return sum(found) / len(found)


def bonus(objective: Objective, p: Any) -> np.ndarray:
    """What alpha multiplies, summed over agents, of policies p[agent][type]: entropies, or minus
    mutual information of action and type."""
    if objective == "none":
        return np.zeros(())
    found = 0.0
    for as_a, as_b in p:
        found = found + (entropy(as_a) + entropy(as_b)) / 2
        if objective == "mi":
            found = found - entropy((as_a + as_b) / 2)
    return found


def unseen_reward(game: Payoffs, p: np.ndarray) -> float:
    """Of the greedy actions of p (2, 2) in (B,B); action 0 where both are as good."""
    first, second = ((p[i, TYPES.index(UNSEEN[i])] > 0.5) * 1 for i in (0, 1))
    return float(game[UNSEEN][first, second])


def optima(game: Payoffs, objective: Objective, alpha: float, steps: int = 40) -> list[Optimum]:
    """Maxima of the objective, the best first, by enumeration of all policies whose probabilities
    are multiples of 1 / steps: points that none of the 80 around them exceeds."""
    axis = np.linspace(0, 1, steps + 1)
    one, two, three, four = np.meshgrid(*(axis,) * 4, indexing="ij", sparse=True)
    p = (one, two), (three, four)
    earned = reward(game, p)
    value = earned + alpha * bonus(objective, p)
    top = np.argwhere(value >= maximum_filter(value, 3, mode="nearest") - 1e-12)
    found = []
    for place in map(tuple, top):
        at = axis[list(place)].reshape(2, 2)
        found.append(Optimum(value[place], earned[place], at, unseen_reward(game, at)))
    return sorted(found, key=lambda x: -x.value)


def optimum(game: Payoffs, objective: Objective, alpha: float, steps: int = 40) -> Optimum:
    """The best of optima()."""
    return optima(game, objective, alpha, steps)[0]
