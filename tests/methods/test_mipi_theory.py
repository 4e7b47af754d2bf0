"""The theory of MIPI in tables (Sec. 4, App. A), by NumPy, with the script's equations inside.

Agents with chains of their own and a reward that is their sum have a Q_jt that is exactly additive,
as Eq. (6) assumes; weights w_i of that sum are drawn, so alpha_i = alpha / w_i, as Lemma 2 needs.
Marginals are fixed. Truth is what value iteration over joint states and actions says.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from runs import script

pytestmark = pytest.mark.numeric

mipi = script("mipi_refil_smac")
AGENTS, STATES, ACTIONS, GAMMA, ALPHA = 2, 3, 3, 0.8, 0.4


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Chains:
    """Agents that move each in its own chain; r(s, u) = sum_i w_i r_i(s_i, u_i). Agent i's nats are
    charged ALPHA, or with `times_w` ALPHA w_i; alpha_i is the charge divided by w_i."""

    def __init__(self, seed, w=(0.5, 2.0), times_w=False):
        rng = np.random.default_rng(seed)
        self.w = np.array(w)
        self.r = rng.normal(size=(AGENTS, STATES, ACTIONS))
        self.P = rng.dirichlet(np.ones(STATES), size=(AGENTS, STATES, ACTIONS))
        # Marginals see the own state's parity only: part of what the policy sees.
        seen = rng.dirichlet(np.ones(ACTIONS), size=(AGENTS, 2))
        self.marginal = seen[:, np.arange(STATES) % 2]  # (AGENTS, STATES, ACTIONS)
        self.share = self.w if times_w else np.ones(AGENTS)
        self.alpha_i = ALPHA * self.share / self.w

    def evaluate(self, pi, sweeps=150):
        """Q_i (AGENTS, STATES, ACTIONS) of policies by Eq. (5), one agent at a time."""
        q = np.zeros_like(self.r)
        for _ in range(sweeps):
            cost = (pi * np.log(pi / self.marginal)).sum(-1)
            v = (pi * q).sum(-1) - self.alpha_i[:, None] * cost
            q = self.r + GAMMA * np.einsum("isut,it->isu", self.P, v)
        return q

    def improve(self, q):
        """Eq. (13) with fixed marginals, the solution of Eq. (7)."""
        return softmax(np.log(self.marginal) + q / self.alpha_i[:, None, None])


def joint(chains, q):
    """Q_jt (S, S, U, U) of Eq. (6)."""
    parts = chains.w[:, None, None] * q
    return parts[0][:, None, :, None] + parts[1][None, :, None, :]


def joint_backup(chains, pi, q_jt):
    """Eq. (5) on joint states and actions, the value by the script's own functions."""
    p = np.einsum("su,tv->stuv", *pi)
    total = torch.from_numpy((p * q_jt).sum((2, 3))).flatten()
    log_pi, log_m = (torch.from_numpy(np.log(x)) for x in (pi, chains.marginal))
    each = mipi.divergence(log_pi, log_m)  # (AGENTS, STATES)
    pairs = torch.stack([x.flatten() for x in torch.meshgrid(*each, indexing="ij")], -1)
    pairs = pairs * torch.from_numpy(chains.share)
    v = (total - mipi.charge(pairs, ALPHA)).view(STATES, STATES).numpy()
    reward = joint(chains, chains.r)
    return reward + GAMMA * np.einsum("sua,tvb,ab->stuv", *chains.P, v)


@pytest.mark.parametrize("times_w", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_evaluation_contracts_to_one_value(seed, times_w):
    """Lemma 1: by gamma at every step, from anywhere, to the sum of the agents' own values."""
    chains, rng = Chains(seed, times_w=times_w), np.random.default_rng(seed)
    pi = rng.dirichlet(np.ones(ACTIONS), size=(AGENTS, STATES))
    shape = (STATES, STATES, ACTIONS, ACTIONS)
    a, b = (rng.normal(size=shape) * 10 for _ in range(2))
    for _ in range(120):
        gap = np.abs(a - b).max()
        a, b = joint_backup(chains, pi, a), joint_backup(chains, pi, b)
        assert np.abs(a - b).max() <= GAMMA * gap + 1e-12
    assert np.allclose(a, joint(chains, chains.evaluate(pi)), atol=1e-8)


@pytest.mark.parametrize("times_w", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_improvement_never_lowers_any_value(seed, times_w):
    """Lemma 2, for all joint states and actions; the new policy minimises the script's loss."""
    chains, rng = Chains(seed, times_w=times_w), np.random.default_rng(seed)
    pi = rng.dirichlet(np.ones(ACTIONS), size=(AGENTS, STATES))
    log_m = torch.from_numpy(np.log(chains.marginal))
    for _ in range(6):
        q = chains.evaluate(pi)
        better = chains.improve(q)
        alpha = torch.from_numpy(chains.alpha_i)[:, None]
        loss = functools.partial(mipi.policy_loss, q=torch.tensor(q), alpha=alpha)
        least = loss(torch.from_numpy(np.log(better)), log_m)
        for _ in range(20):
            other = rng.dirichlet(np.ones(ACTIONS), size=(AGENTS, STATES))
            assert (loss(torch.from_numpy(np.log(other)), log_m) >= least - 1e-12).all()
        gain = joint(chains, chains.evaluate(better)) - joint(chains, q)
        assert gain.min() > -1e-9
        pi = better
    assert gain.max() < 1e-3, "it has nearly converged"


def test_alpha_instead_of_alpha_over_w_can_lower_values():
    """What the lemma needs: with alpha_i = alpha and weights that are not 1 a step can cost."""
    worst = 0.0
    for seed in range(10):
        chains, rng = Chains(seed), np.random.default_rng(seed)
        pi = rng.dirichlet(np.ones(ACTIONS), size=(AGENTS, STATES))
        for _ in range(4):
            q = chains.evaluate(pi)
            before = joint(chains, q)
            pi = softmax(np.log(chains.marginal) + q / ALPHA)
            worst = min(worst, (joint(chains, chains.evaluate(pi)) - before).min())
    assert worst < -1e-3


@pytest.mark.parametrize("seed", range(3))
def test_policy_iteration_ends_at_the_optimum(seed):
    """Theorem 1: at joint soft value iteration's V = alpha log sum_u prod m_i exp(Q / alpha)."""
    chains, rng = Chains(seed), np.random.default_rng(seed)
    pi = rng.dirichlet(np.ones(ACTIONS), size=(AGENTS, STATES))
    for _ in range(60):
        pi = chains.improve(chains.evaluate(pi))
    reward, q = joint(chains, chains.r), np.zeros((STATES, STATES, ACTIONS, ACTIONS))
    both = np.einsum("su,tv->stuv", *chains.marginal)
    for _ in range(150):
        v = ALPHA * np.log((both * np.exp(q / ALPHA)).sum((2, 3)))
        q = reward + GAMMA * np.einsum("sua,tvb,ab->stuv", *chains.P, v)
    assert np.allclose(joint(chains, chains.evaluate(pi)), q, atol=1e-6)


def test_without_additivity_it_can_stop_before_the_optimum():
    """Theorem 1 needs Eq. (6). One state, two actions, r = 1 for (1,1), .5 for (0,0), else 0: with
    each agent's utility the mean over the other's policy both (0,0) and (1,1) are fixed."""
    r, alpha = np.array([[0.5, 0.0], [0.0, 1.0]]), 0.05
    ends = []
    for start in (0.1, 0.9):
        pi = np.array([[1 - start, start]] * 2)
        for _ in range(200):
            q = np.stack((r @ pi[1], r.T @ pi[0]))
            pi = softmax(np.log(0.5) + q / alpha)
        cost = (pi * np.log(pi / 0.5)).sum()
        ends.append((pi[0] @ r @ pi[1] - alpha * cost, pi[:, 1].round(3).tolist()))
    (low, first), (high, second) = ends
    assert first == [0, 0] and second == [1, 1] and high > low + 0.4


@pytest.mark.parametrize("seed", range(5))
def test_blahut_arimoto_converges_as_its_bound_says(seed):
    """Theorem 2: after M alternations of Eqs. (12), (13) the objective is within
    alpha KL(m* || m_0) / M of its optimum, which is the same from anywhere."""
    rng, alpha, S, U = np.random.default_rng(seed), 0.3, 5, 4
    q, rho = rng.normal(size=(S, U)), rng.dirichlet(np.ones(S))

    def objective(pi):
        m = np.maximum(rho @ pi, 1e-300)
        return rho @ (pi * (q - alpha * np.log(np.maximum(pi, 1e-300) / m))).sum(-1)

    def alternate(m, times):
        found = []
        for _ in range(times):
            pi = softmax(np.log(m) + q / alpha)  # Eq. (13)
            found.append(objective(pi))
            m = np.maximum(rho @ pi, 1e-300)  # Eq. (12)
        return m, found

    starts = rng.dirichlet(np.ones(U), size=3)
    ends = [alternate(start, 4000) for start in starts]
    best = max(found[-1] for _, found in ends)
    assert all(np.isclose(found[-1], best, atol=1e-5) for _, found in ends)
    for start, (end, found) in zip(starts, ends):
        assert (np.diff(found) > -1e-12).all(), "it never falls"
        gap = alpha * (end * np.log(end / start)).sum()
        for M, value in enumerate(found[:200], 1):
            assert best - value <= gap / M + 1e-9


def test_both_steps_minimise_the_scripts_losses():
    """The script's losses (17), (18): their gradients vanish at Eqs. (12) and (13), and minimising
    them from elsewhere ends there."""
    rng = np.random.default_rng(0)
    S, U, alpha = 4, 5, 0.5
    pi, rho = rng.dirichlet(np.ones(U), size=S), np.full(S, 1 / S)
    q, avail = torch.from_numpy(rng.normal(size=(S, U))), torch.ones(S, U, dtype=torch.bool)
    avail[:, 3] = False
    pi[:, 3] = 0
    pi /= pi.sum(-1, keepdims=True)
    log_pi = torch.from_numpy(np.log(np.maximum(pi, 1e-300)))

    def minimise(loss, *shape):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [x], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def closure():
            optimiser.zero_grad()
            value = loss(x)
            value.backward()
            return value

        optimiser.step(closure)
        return x.detach()

    def slope(loss, p):
        """The largest part of the gradient where the softmax of x is p."""
        x = torch.from_numpy(np.log(np.maximum(p, 1e-300))).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
        return gradient.abs().max()

    of = lambda x: mipi.log_probabilities(x.expand(S, U), avail)  # noqa: E731
    loss = lambda x: mipi.marginal_loss(log_pi, of(x)).mean()  # noqa: E731
    found = of(minimise(loss, U))[0].exp().numpy()
    assert np.allclose(found, rho @ pi, atol=1e-4) and found[3] == 0
    assert slope(loss, rho @ pi) < 1e-12 < slope(loss, pi[0])
    log_m = torch.from_numpy(np.log(np.maximum(rho @ pi, 1e-300))).expand(S, U)
    loss = lambda x: mipi.policy_loss(of(x), log_m, q, alpha).mean()  # noqa: E731
    expected = (rho @ pi) * np.exp(q.numpy() / alpha)
    expected /= expected.sum(-1, keepdims=True)
    assert np.allclose(of(minimise(loss, S, U)).exp().numpy(), expected, atol=1e-4)
    assert slope(loss, expected) < 1e-12 < slope(loss, pi)


@pytest.mark.parametrize("seed", range(3))
def test_eq_18_times_w_is_the_gradient_of_the_joint_objective(seed):
    """With alpha / w_i: of E_pi (Q_tot - alpha sum_i log pi_i / m_i), by enumeration of joint
    actions. Without w_i each agent's gradient is 1 / w_i as large."""
    rng = np.random.default_rng(seed)
    q, m = torch.from_numpy(rng.normal(size=(2, 3))), rng.dirichlet(np.ones(3), size=2)
    w, log_m = torch.tensor([0.125, 0.3]).double(), torch.from_numpy(np.log(m))
    logits = torch.from_numpy(rng.normal(size=(2, 3))).requires_grad_()
    log_pi = logits.log_softmax(-1)
    objective = torch.zeros(()).double()
    for u in itertools.product(range(3), repeat=2):
        chosen = [(i, u[i]) for i in (0, 1)]
        p = torch.stack([log_pi[x].exp() for x in chosen]).prod()
        ratio = sum(log_pi[x] - log_m[x] for x in chosen)
        objective = objective + p * (sum(w[i] * q[i, a] for i, a in chosen) - ALPHA * ratio)
    loss = mipi.policy_loss(log_pi, log_m, q, ALPHA / w)
    (truth,) = torch.autograd.grad(-objective, logits, retain_graph=True)
    (weighted,) = torch.autograd.grad((w * loss).sum(), logits, retain_graph=True)
    (plain,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.allclose(weighted, truth, atol=1e-12) and truth.abs().max() > 1e-3
    assert torch.allclose(plain, truth / w[:, None], atol=1e-12)


def test_expectation_of_a_linear_mixer_is_exact():
    """Eq. (16)'s expectation over joint actions: of Q_tot and of log ratios, by enumeration."""
    rng = np.random.default_rng(1)
    pi, m = rng.dirichlet(np.ones(3), size=(2, 2))
    q, w, b = rng.normal(size=(2, 3)), np.array([0.3, 0.6]), 0.2
    truth = 0.0
    for u in itertools.product(range(3), repeat=2):
        p = pi[0, u[0]] * pi[1, u[1]]
        ratio = sum(np.log(pi[i, u[i]] / m[i, u[i]]) for i in (0, 1))
        truth += p * (sum(w[i] * q[i, u[i]] for i in (0, 1)) + b - ALPHA * ratio)
    log_pi, log_m = torch.from_numpy(np.log(pi)), torch.from_numpy(np.log(m))
    total = torch.tensor([(w * (pi * q).sum(-1)).sum() + b])
    found = total - mipi.charge(mipi.divergence(log_pi, log_m)[None], ALPHA)
    assert np.isclose(found.item(), truth)
