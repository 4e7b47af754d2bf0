"""MIPI's matrix game (Fig. 2): two agents of two types play one step; one team is never trained.

Agents have type A or B and take action 0 or 1. The teams (A,B) and (B,A) are trained, each half of
the time; team (B,B) is only evaluated. Joint action (0,0) pays the same in every team and is best
in none. The paper's payoffs are pictures; the two sets here are ours and have what its text says,
except that in "additive" (B,B) and (A,B) have the same best joint action.

    game = PAYOFFS["additive"]
    game["BB"][1, 1]                                 reward of joint action (1,1) in team (B,B)
    optimum(game, "mi", alpha=0.5)                   the best policies, by enumeration

A policy observes its agent's index and type, a marginal policy only the index. Policies p (2
agents, 2 types) are probabilities of action 1. Of the team an agent knows only its own type, so the
mutual information of its action and the team equals that of its action and its type.
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
PAYOFFS = {  # {name: {team: r[action of agent 1, action of agent 2]}}
    # r = .8 + .2 a2 - a1 in (A,B), .8 + .2 a1 - a2 in (B,A): a linear mixer can represent both.
    "additive": {
        "AB": np.array([[0.8, 1.0], [-0.2, 0.0]]),
        "BA": np.array([[0.8, -0.2], [1.0, 0.0]]),
        "BB": np.array([[0.8, 1.0], [0.0, -1.0]]),
    },
    # The best joint action differs from team to team.
    "coordinated": {
        "AB": np.array([[0.8, 0.0], [0.0, 1.0]]),
        "BA": np.array([[0.8, 0.0], [1.0, 0.0]]),
        "BB": np.array([[0.8, 1.0], [0.0, 0.0]]),
    },
}
Payoffs = dict[str, np.ndarray]


class Optimum(NamedTuple):
    """A local maximum of an objective."""

    value: float  # of the objective: reward + alpha * bonus
    reward: float  # expected reward in the trained teams
    policies: np.ndarray  # (2 agents, 2 types), probabilities of action 1
    unseen: float  # reward of their greedy actions in team (B,B)


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats of two actions with probabilities p and 1 - p; p of any shape."""
    return entr(p) + entr(1 - p)


def expected(payoff: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Expected reward for the agents' probabilities of action 1, arrays that broadcast."""
    a, b = (1 - first, first), (1 - second, second)
    return sum(payoff[i, j] * a[i] * b[j] for i, j in itertools.product((0, 1), repeat=2))


def reward(game: Payoffs, p: Any) -> np.ndarray:
    """Expected reward, averaged over the trained teams; p[agent][type]: probability of action 1."""
    found = [expected(game[t], *(p[i][TYPES.index(t[i])] for i in (0, 1))) for t in TRAINED]
    return sum(found) / len(found)


def bonus(objective: Objective, p: Any) -> np.ndarray:
    """The term of the objective that alpha multiplies, summed over agents: 0 ("none"), the entropy
    ("entropy") or minus the mutual information of action and type ("mi"), nats."""
    if objective == "none":
        return np.zeros(())
    found = 0.0
    for as_a, as_b in p:
        found = found + (entropy(as_a) + entropy(as_b)) / 2
        if objective == "mi":
            found = found - entropy((as_a + as_b) / 2)
    return found


def unseen_reward(game: Payoffs, p: np.ndarray) -> float:
    """Reward of the greedy actions of p (2, 2) in team (B,B); action 0 if p is .5."""
    first, second = ((p[i, TYPES.index(UNSEEN[i])] > 0.5) * 1 for i in (0, 1))
    return float(game[UNSEEN][first, second])


def optima(game: Payoffs, objective: Objective, alpha: float, steps: int = 40) -> list[Optimum]:
    """Local maxima of the objective, best first, among all policies whose probabilities are
    multiples of 1 / steps: points that none of their 80 neighbours on this grid exceeds."""
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
    """The global maximum among the policies that optima() enumerates."""
    return optima(game, objective, alpha, steps)[0]
