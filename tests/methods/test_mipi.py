"""mipi_refil_smac.py: each loss against NumPy, who learns from what, masks, the parent's bits,
resuming, flags. The theory: test_mipi_theory.py; what is the parent's: test_refil.py.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

from harness import RunArgs, UsageError

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from battle_tools import (
    CPU,
    EFFECTS,
    SMALL,
    WeakEnemies,
    changed,
    check_effect,
    check_seeds_of_evaluations,
    elsewhere,
    finite,
    forward_view,
    initial,
    numpy_mix,
    read,
    resuming,
    run,
    saved_replay,
    shape,
    sharpen,
    softmax,
    stacked,
    stand_and_shoot,
    things_moved,
    tiny,
    watch_evaluations,
    weights_of,
)
from runs import differences, exact, index, metrics, only_error, script, some_long, states

from envs.smac import combat, worlds
from envs.smac.combat import Combat
from envs.smac.episodes import play, summarise

mipi, refil = script("mipi_refil_smac"), script("baselines.refil_smac")
__all__ = ["elsewhere"]  # a fixture of all tests here


def setting(flags="", rounds=3, double=False, noise=1.0):
    """A buffer of random battles and an agent far from its beginning, targets away from it."""
    args = read(mipi, f"{SMALL} --max-episode-steps 30 {flags}")
    battles = mipi.make_envs(args, args.team_sizes, args.num_envs, args.seed)
    agent = mipi.Agent(args, battles.family, CPU)
    nets = [part for part in agent.parts().values() if isinstance(part, torch.nn.Module)]
    for k, net in enumerate(nets):
        sharpen(net, noise, k)
    buffer, rng = mipi.ReplayBuffer(args, battles, CPU), torch.Generator().manual_seed(5)
    for _ in range(rounds):
        mipi.collect(battles, mipi.Player(agent, 1.0, rng), buffer)
    if double:
        for net in nets:
            net.double()
    s = SimpleNamespace(args=args, agent=agent, battles=battles, buffer=buffer, rng=rng)
    if rounds:
        s.batch = buffer.sample(torch.Generator().manual_seed(7), 6)
        if double:
            entities = s.batch.features.entities.double()
            features = s.batch.features._replace(entities=entities)
            s.batch = s.batch._replace(features=features, rewards=s.batch.rewards.double())
        s.groups = mipi.draw_groups(s.batch.features, rng) if args.imagine else None
    return s


def forward(s):
    """What learn() begins with: trunks, log pi (V, M, A, actions), log m (M, A, actions)."""
    features = s.batch.features
    trunks = mipi.run_trunks(s.agent, features, s.groups)
    avail = features.avail_actions
    log_m = s.agent.log_marginal(trunks.own_memory, avail)
    own = trunks.own_memory
    found = [s.agent.log_policy(team, avail, own) for team in trunks.teams.present()]
    return trunks, torch.stack(found), log_m


def alive(s):
    """(K, A) bool: who lives at the steps of the minibatch; the dead and empty have a no-op."""
    return ~s.batch.features.avail_actions[s.batch.now][..., 0]


def given(acting):
    """What log_policy() reads beside a team, for the living alone."""
    return acting.avail_actions, acting.own_memory, acting.living


# --- Policies -------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_unavailable_actions_have_no_probability_and_no_gradient():
    """In policy and marginal; in the losses, too."""
    s = setting(double=True)
    avail = s.batch.features.avail_actions
    _, log_pi, log_m = forward(s)
    for log_p in (*log_pi, log_m):
        p = log_p.exp()
        assert (p[~avail] == 0).all() and torch.allclose(p.sum(-1), torch.tensor(1.0).double())
    logits = torch.randn(log_m.shape, dtype=torch.float64, requires_grad=True)
    other = torch.randn(log_m.shape, dtype=torch.float64, requires_grad=True)
    mine, theirs = (mipi.log_probabilities(x, avail) for x in (logits, other))
    q = torch.randn_like(mine)
    loss = mipi.policy_loss(mine, theirs, q, 0.3) + mipi.marginal_loss(mine, theirs)
    for gradient in torch.autograd.grad(loss.sum(), (logits, other)):
        assert (gradient[~avail] == 0).all() and (gradient[avail] != 0).any()


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--no-recurrent --own-beside"])
def test_the_marginal_sees_its_own_unit_only(flags):
    """Whatever others are: the same bits, and no gradient. The policy does see them."""
    s = setting(flags, double=True)
    features = s.batch.features
    x = features.entities.clone().requires_grad_()
    A = features.unseen.shape[1]
    for i in range(A):
        now = features._replace(entities=x)
        logits = s.agent.marginal.head(s.agent.marginal(now)[0])
        (gradient,) = torch.autograd.grad(logits[:, i].square().sum(), x)
        others = [j for j in range(2 * A) if j != i]
        assert (gradient[:, others] == 0).all() and (gradient[:, i] != 0).any()
        changed = features.entities.clone()
        changed[:, others] = 5.0
        other = features._replace(entities=changed)
        again = s.agent.marginal.head(s.agent.marginal(other)[0])
        assert torch.equal(again[:, i], logits[:, i])
        memory = s.agent.utility(now)[0].full_view.memory
        (gradient,) = torch.autograd.grad(memory[:, i].square().sum(), x)
        assert (gradient[:, others] != 0).any()


@pytest.mark.numeric
def test_attention_to_one_entity_is_its_value():
    """A marginal with the weights of utilities whose agents see themselves only says the same, and
    its value projection has the same gradient; queries and keys have none."""
    s = setting(double=True)
    marginal, utility, features = s.agent.marginal, s.agent.utility, s.batch.features
    weights = utility.state_dict()
    del weights["attention.query"]
    weights["value"] = weights.pop("attention.key_value")[0, :, 8:]
    marginal.load_state_dict(weights)
    alone = features._replace(unseen=mipi.others(features.unseen) | features.unseen)
    memory = utility(alone)[0].full_view.memory
    own, _ = marginal(features)
    there = features.avail_actions[..., 0].logical_not()  # (M, A): the dead see nobody
    assert there.any() and torch.allclose(memory[there], own[there], atol=1e-12)
    query, key_value = torch.autograd.grad(
        memory[there].square().sum(),
        (utility.attention.query, utility.attention.key_value),
    )
    (value,) = torch.autograd.grad(own[there].square().sum(), marginal.value)
    assert (query == 0).all() and (key_value[..., :8] == 0).all()
    assert torch.allclose(key_value[0, :, 8:], value, atol=1e-10) and (value != 0).all()


def test_observe_self_only_sees_nobody_else():
    """Utilities and policy change with the own unit only, in targets, too; the mixer still sees
    all. Nothing is regularised."""
    s = setting("--observe-self-only", double=True)
    features = s.batch.features
    changed = features.entities.clone()
    changed[:, 1:] = 5.0
    other = features._replace(entities=changed)
    for net in (s.agent.utility, s.agent.target_utility):
        mine, theirs = (net(x, s.groups)[0] for x in (features, other))
        assert len(mine.present()) == 3
        for a, b in zip(mine, theirs):
            assert torch.equal(a.q[:, 0], b.q[:, 0])
            assert torch.equal(a.memory[:, 0], b.memory[:, 0])
    assert s.agent.alpha == s.agent.alpha_i == 0 and not s.agent.informed
    zero = mipi.Views(torch.zeros(features.avail_actions.shape[:2], dtype=torch.float64))
    q_total = [s.agent.mixer(zero, x).q_total for x in (features, other)]
    assert not torch.equal(*q_total)


@pytest.mark.parametrize("flags", ["", "--no-recurrent --own-beside", "--observe-self-only"])
def test_things_in_sight_are_no_part_of_the_own_state(flags):
    """An agent's own row can say where the nearest ones are: the marginal does not read that, nor
    does who sees only itself. Others do, and the mixer."""
    s = setting(f"--scenario resource --egocentric --num-envs 16 {flags}", rounds=0)
    now, then, sees = things_moved(mipi, s.battles)
    log_m = [s.agent.marginal.head(s.agent.marginal(x)[0]) for x in (now, then)]
    assert torch.equal(*log_m) and sees.sum() > 10
    for net in (s.agent.utility, s.agent.target_utility):
        a, b = (net(x)[0].full_view.q for x in (now, then))
        if s.args.observe_self_only:
            assert torch.equal(a, b)
        else:
            assert (a != b).any(-1)[sees].all()
    zero = mipi.Views(torch.zeros(now.avail_actions.shape[:2]))
    q_total = [s.agent.mixer(zero, x).q_total for x in (now, then)]
    assert not torch.equal(*q_total)


@pytest.mark.long
@pytest.mark.numeric
def test_actions_are_drawn_from_policy_and_noise():
    """(1 - epsilon) pi + epsilon uniform; greedy in evaluation."""
    s = setting(rounds=0)
    s.battles.reset()
    obs, epsilon = s.battles.obs, 0.3
    features = mipi.encode(obs, torch.full((4, 8), -1), torch.ones(1, 4, dtype=torch.bool), CPU)
    teams, _ = s.agent.utility(features)
    avail = features.avail_actions
    pi = s.agent.log_policy(teams.full_view, avail, None).exp()  # (4, A, actions)
    A = pi.shape[1]
    assert torch.equal(mipi.Player(s.agent)(s.battles)[:, :A], pi.argmax(-1))
    drawn = [mipi.Player(s.agent, epsilon, s.rng)(s.battles)[:, :A] for _ in range(3000)]
    share = torch.nn.functional.one_hot(torch.stack(drawn), pi.shape[-1]).float().mean(0)
    expected = (1 - epsilon) * pi + epsilon * avail / avail.sum(-1, keepdim=True)
    assert (share - expected).abs().max() < 5 * 0.5 / math.sqrt(3000)


# --- Losses against NumPy -------------------------------------------------------------------------


def all_slots(features, m):
    """entities (16, D), empty (16,), gone (8,) of a moment."""
    A = features.unseen.shape[1]
    entities = np.zeros((16, features.entities.shape[-1]))
    empty, gone = np.ones(16, bool), np.ones(8, bool)
    for side in (0, 1):
        rows = slice(side * A, (side + 1) * A)
        entities[8 * side : 8 * side + A] = features.entities[m, rows].numpy()
        empty[8 * side : 8 * side + A] = features.empty[m, rows].numpy()
    gone[:A] = features.avail_actions[m, :, 0].numpy()
    return {"entities": entities, "empty": empty, "gone": gone}


@pytest.mark.numeric
@pytest.mark.parametrize(
    "how",
    ["", "--no-imagine", "--mixer linear", "--mixer linear --no-imagine", "--policy exact"],
)
def test_critic_is_that_of_numpy(how):
    """Eqs. (15), (16): policies, marginals and utilities as given; the rest by loops."""
    imagine = "--no-imagine" not in how
    weight = "--imagine-weight .3" if imagine else ""
    s = setting(f"--gamma .9 --alpha .7 --alpha-i .3 {weight} {how}", double=True)
    batch, features, alpha = s.batch, s.batch.features, 0.7
    trunks, log_pi, log_m = forward(s)
    log_pi, log_m = log_pi.detach().numpy(), log_m.detach().numpy()
    y = mipi.find_targets(s.args, s.agent, batch, trunks)
    loss, w, scalars = mipi.critic_loss(s.args, s.agent, batch, s.groups, trunks.teams, y)
    later_q = s.agent.target_utility(features)[0].full_view.q.detach().numpy()
    q = stacked(team.q for team in trunks.teams.present()).detach().numpy()
    avail = features.avail_actions.numpy()
    A = avail.shape[1]
    p, target_p = weights_of(s.agent.mixer), weights_of(s.agent.target_mixer)
    mix = functools.partial(numpy_mix, heads=2, linear="linear" in how, elu=False)
    td, imagined = [], []
    for k, (m, after) in enumerate(zip(batch.now.tolist(), batch.later.tolist())):
        value, cost, utilities = 0.0, 0.0, np.zeros(8)
        if not batch.terminated[k]:
            for i in range(A):
                may = avail[after, i]
                pi, ratio = np.exp(log_pi[0, after, i]), log_pi[0, after, i] - log_m[after, i]
                utilities[i] = (pi * later_q[after, i])[may].sum()
                cost += (pi * ratio)[may].sum()
            value = mix(target_p, q=utilities, **all_slots(features, after)) - alpha * cost
        target = float(batch.rewards[k]) + 0.9 * value
        assert np.isclose(y[k].item(), target, atol=1e-8)
        mine, where = np.zeros((len(q), 8)), all_slots(features, m)
        mine[:, :A] = [[x[m, i, batch.actions[k, i]] for i in range(A)] for x in q]
        td.append((mix(p, q=mine[0], **where) - target) ** 2)
        if imagine:
            team = np.zeros(16, bool)
            team[:A], team[8 : 8 + A] = s.groups[m, :A], s.groups[m, A:]
            imagined.append((mix(p, q=mine[1:], groups=team, **where) - target) ** 2)
        nothing = mix(p, q=np.zeros(8), **where)
        slope = [mix(p, q=np.eye(8)[i], **where) - nothing for i in range(A)]
        there = ~where["empty"][:A]
        assert np.allclose(w[k][there], np.array(slope)[there], atol=1e-8)  # w_i: Q_tot's slope
    assert np.isclose(scalars["td_loss"].item(), np.mean(td), rtol=1e-8)
    parts = 0.7 * np.mean(td) + 0.3 * np.mean(imagined) if imagine else np.mean(td)
    assert len(q) == (3 if imagine else 1) and np.isclose(loss.item(), parts, rtol=1e-8)


@pytest.mark.numeric
@pytest.mark.parametrize("how", ["", "--mixer linear", "--returns lambda --td-lambda 0"])
def test_charge_times_w(how):
    """Of what an agent pays, the share by which its utility counts in Q_tot, by loops."""
    flags = "--gamma .9 --alpha .7 --alpha-i .3 --no-imagine --charge-times-w"
    s = setting(f"{flags} {how}", double=True)
    batch, features = s.batch, s.batch.features
    trunks, log_pi, log_m = forward(s)
    y = mipi.find_targets(s.args, s.agent, batch, trunks)
    plain = dataclasses.replace(s.args, charge_times_w=False)
    charged = mipi.find_targets(plain, s.agent, batch, trunks)
    pi = log_pi[0].exp().detach()
    cost = (pi * (log_pi[0] - log_m).detach()).sum(-1).numpy()
    p = weights_of(s.agent.target_mixer)
    mix = functools.partial(numpy_mix, heads=2, linear="linear" in how, elu=False)
    differ = 0
    for k, after in enumerate(batch.later.tolist()):
        where = all_slots(features, after)
        nothing = mix(p, q=np.zeros(8), **where)
        w = [mix(p, q=np.eye(8)[i], **where) - nothing for i in range(cost.shape[1])]
        saved = 0.9 * 0.7 * ((1 - np.array(w)) * cost[after]).sum()
        expected = charged[k].item() + (0 if batch.terminated[k] else saved)
        assert np.isclose(y[k].item(), expected, atol=1e-8)
        differ += abs(expected - charged[k].item()) > 1e-3
    assert differ > 10


@pytest.mark.numeric
@pytest.mark.parametrize("timeout", ["", "--no-timeout-terminates"])
def test_lambda_returns_are_sums_of_n_step_returns(timeout):
    """Of which each charges what policies pay on the way and, where it bootstraps, then."""
    flags = "--gamma .9 --alpha .7 --alpha-i .3 --returns lambda --td-lambda .6"
    s = setting(f"{flags} {timeout}", double=True)
    trunks, log_pi, log_m = forward(s)
    found = mipi.find_targets(s.args, s.agent, s.batch, trunks)
    args = dataclasses.replace(s.args, returns="one-step")
    one_step = mipi.find_targets(args, s.agent, s.batch, trunks)
    pi = log_pi[0].exp().detach()
    costs = 0.7 * (pi * (log_pi[0] - log_m).detach()).sum((1, 2))[s.batch.later]
    assert costs.min() > 0
    values = (one_step - s.batch.rewards) / 0.9
    expected = forward_view(s.batch, values, costs, 0.9, 0.6)
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not np.allclose(found, forward_view(s.batch, values, 0 * costs, 0.9, 0.6), atol=1e-3)


@pytest.mark.numeric
@pytest.mark.parametrize("how", ["", "--no-imagine"])
def test_policy_and_marginal_losses_are_those_of_numpy(how):
    """Eqs. (17), (18) by loops over available actions, as learn() reports them with M = 1."""
    flags = f"--ba-iterations 1 --alpha .2 --alpha-i .6 {how}"
    s, twin = (setting(flags, double=True) for _ in range(2))
    trunks, log_pi, log_m = forward(twin)
    now, avail = s.batch.now, s.batch.features.avail_actions.numpy()
    star = np.exp(log_pi[-1 if how else 1].detach().numpy())  # in imagined teams
    log_m = log_m.detach().numpy()
    q = trunks.teams.full_view.q.detach().numpy()
    likelihood = []
    there = [(m, i) for m in now.tolist() for i in range(avail.shape[1]) if not avail[m, i, 0]]
    for m, i in there:
        may = avail[m, i]
        likelihood.append(-(star[m, i] * log_m[m, i])[may].sum())
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    assert np.isclose(scalars["marginal_loss"].item(), np.mean(likelihood), rtol=1e-9)
    # Eq. (18) meets the marginal after its step, whose trunk's output is still the old one.
    moved = s.agent.marginal.head(trunks.own_memory.detach()).detach().numpy()
    pi = log_pi[0].detach().numpy()
    cost = []
    for m, i in there:
        may = avail[m, i]
        after = np.log(softmax(moved[m, i][may]))
        p = np.exp(pi[m, i][may])
        cost.append((p * (0.6 * (pi[m, i][may] - after) - q[m, i][may])).sum())
    assert np.isclose(scalars["policy_loss"].item(), np.mean(cost), rtol=1e-9)


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--regularizer entropy", "--target-head pointer"])
def test_the_exact_policy_solves_eq_18(flags):
    """It is Eq. (13)'s, by loops, in real and in imagined teams; Eq. (18) has no gradient there."""
    s = setting(f"--policy exact --alpha .2 --alpha-i .6 {flags}", double=True)
    trunks, log_pi, log_m = forward(s)
    features, now = s.batch.features, s.batch.now
    avail = features.avail_actions
    entropy = "entropy" in flags
    assert entropy == bool((log_m == 0).all())
    utilities = [team.q for team in trunks.teams.present()]
    for found, q in zip(log_pi.detach().numpy(), utilities):
        for m, i in (~avail[..., 0]).nonzero().tolist():
            may = avail[m, i].numpy()
            score = log_m[m, i].detach().numpy()[may] + q[m, i].detach().numpy()[may] / 0.6
            assert np.allclose(np.exp(found[m, i][may]), softmax(score), atol=1e-10)
            assert (np.exp(found[m, i][~may]) == 0).all()
    logits = log_pi[0].detach().requires_grad_()
    mine, q = mipi.log_probabilities(logits, avail), trunks.teams.full_view.q
    loss = mipi.policy_loss(mine, log_m, q, 0.6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().max() < 1e-10
    acting = mipi.find_acting(trunks, s.batch)
    for view, team in enumerate((acting.team, acting.imagined)):
        found = s.agent.log_policy(team, *given(acting))
        assert torch.allclose(found, log_pi[view][now][alive(s)], atol=1e-10)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", ["--recurrent", "--no-recurrent"])
def test_an_exact_policy_acts_as_it_learns(memory):
    """The player remembers what the marginal's network has seen, too."""
    s = setting(f"--policy exact --alpha 2 {memory}", rounds=0)
    sharpen(s.agent.marginal, 3.0, 9)
    mipi.collect(s.battles, mipi.Player(s.agent), s.buffer)
    s.batch = s.buffer.sample(s.rng, s.args.num_envs)
    s.groups = None
    _, (log_pi,), log_m = forward(s)
    alive = ~s.batch.features.avail_actions[s.batch.now][..., 0]
    greedy = log_pi.argmax(-1)[s.batch.now]
    assert torch.equal(greedy[alive], s.batch.actions[alive])
    of_q = (log_pi - log_m).argmax(-1)[s.batch.now]
    assert (of_q != greedy)[alive].any()  # the marginal matters


def test_an_exact_policys_player_forgets_what_was_before_an_episode():
    """The marginal's memory, too: a battle begins as it does for a new player."""
    s, begun = setting("--policy exact --alpha 2", rounds=0), []
    sharpen(s.agent.marginal, 1.0, 9)
    player = mipi.Player(s.agent)
    for each in (player, player, mipi.Player(s.agent)):
        s.battles.seed(3)
        s.battles.reset()
        actions = each(s.battles)
        begun.append((actions, each.hidden, each.own_hidden))
        for _ in range(3):
            s.battles.step(each(s.battles))
        assert not torch.allclose(each.own_hidden, begun[-1][2], atol=1e-3)
    for again in begun[1:]:
        assert all(torch.equal(x, y) for x, y in zip(begun[0], again))


@pytest.mark.numeric
def test_an_exact_policy_with_a_tiny_alpha():
    """Only actions that are available have a probability: Eq. (13)'s by NumPy."""
    s = setting("--policy exact")
    trunks, _, log_m = forward(s)
    avail = s.batch.features.avail_actions
    q = trunks.teams.full_view.q
    q = q - q.max() - 1.0  # all below 0: over a tiny alpha, below what masks
    for alpha in (1e-2, 1e-10, 1e-30, 1e-40):
        s.agent.alpha_i = alpha
        found = s.agent.log_policy(mipi.Team(q, None, None), avail, trunks.own_memory)
        assert found.isfinite().all()
        for m, i in (~avail[..., 0]).nonzero().tolist():
            may = avail[m, i].numpy()
            score, value = (x[m, i].detach().double().numpy()[may] for x in (log_m, q))
            score = score + (value - value.max()) / alpha
            p = found[m, i].exp().detach().numpy()
            assert np.allclose(p[may], softmax(score), atol=1e-4) and (p[~may] == 0).all()


@pytest.mark.parametrize("flags", ["--regularizer none", "--alpha 0", "--observe-self-only"])
def test_an_exact_policy_without_alpha_is_greedy(flags):
    s = setting(f"--policy exact {flags}")
    trunks, log_pi, _ = forward(s)
    best = trunks.teams.full_view.q.masked_fill(~s.batch.features.avail_actions, -np.inf).argmax(-1)
    assert torch.equal(log_pi[0].argmax(-1), best) and (log_pi[0].amax(-1) == 0).all()
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    assert all(x.isfinite() for x in scalars.values()) and "marginal_loss" not in scalars


def test_an_exact_policy_trains_no_head():
    """Only the marginal makes M steps."""
    s = setting("--policy exact --ba-iterations 3")
    before = copy.deepcopy(s.agent.policy.state_dict())
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    assert "policy_loss" not in scalars and {"mi", "marginal_loss"} <= scalars.keys()
    assert differences(before, s.agent.policy.state_dict()) == []
    steps = s.agent.marginal_optimiser.state_dict()["state"]
    assert steps[0]["step"] == 1 and max(x["step"] for x in steps.values()) == 3


@pytest.mark.numeric
def test_a_policys_pointer_reads_what_the_utilities_read():
    """At steps the same policies as at all moments, in real and in imagined teams; agents that do
    not see a unit attack all such ones with one probability."""
    s = setting("--target-head pointer", double=True)
    trunks, log_pi, _ = forward(s)
    acting = mipi.find_acting(trunks, s.batch)
    for view, team in enumerate((acting.team, acting.imagined)):
        found = s.agent.log_policy(team, *given(acting))
        assert torch.allclose(found, log_pi[view][s.batch.now][alive(s)], atol=1e-12)
    assert not torch.allclose(log_pi[0], log_pi[1], atol=1e-3)
    for team in trunks.teams:
        targets = s.agent.policy(team.memory, team.tagged)[..., 6:].detach()  # (M, A, 8)
        hidden = team.tagged.choices == 0
        low, high = targets.masked_fill(~hidden, np.inf), targets.masked_fill(~hidden, -np.inf)
        some = hidden.any(-1)
        assert some.any() and torch.equal(low.amin(-1)[some], high.amax(-1)[some])
        assert (targets.std(-1)[(~hidden).sum(-1) > 1] > 1e-6).all()


@pytest.mark.numeric
def test_alpha_i_over_w():
    """Eq. (18) with alpha_i / w_i per agent and state; logged: alpha_i / w_i."""
    s = setting("--ba-iterations 1 --alpha .2 --alpha-i .6 --alpha-i-over-w", double=True)
    trunks, log_pi, _ = forward(s)
    features, now = s.batch.features, s.batch.now
    chosen = trunks.teams.map(lambda team: mipi.pick(team.q[now], s.batch.actions))
    w = s.agent.mixer(chosen, features.at(now), s.groups[now]).w
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    logits = s.agent.marginal.head(trunks.own_memory)
    moved = mipi.log_probabilities(logits, features.avail_actions)[now]
    log_pi, q = log_pi[0][now], trunks.teams.full_view.q[now]
    there = ~features.avail_actions[now][..., 0]
    each = (log_pi.exp() * (0.6 / w[..., None] * (log_pi - moved) - q)).sum(-1)
    assert torch.isclose(scalars["policy_loss"], each[there].mean(), rtol=1e-9)
    assert torch.isclose(scalars["alpha_over_w"], (0.6 / w)[there].mean(), rtol=1e-9)
    assert torch.isclose(scalars["w"], w[there].mean(), rtol=1e-9)


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--alpha-i-over-w"])
def test_actor_loss_times_w(flags):
    """Eq. (18) times w_i, with both forms of alpha_i; by loops over living agents."""
    both = "--ba-iterations 1 --regularizer entropy --alpha .2 --alpha-i .6"
    s = setting(f"{both} --actor-loss-times-w {flags}", double=True)
    trunks, log_pi, _ = forward(s)
    features, now = s.batch.features, s.batch.now
    chosen = trunks.teams.map(lambda team: mipi.pick(team.q[now], s.batch.actions))
    w = s.agent.mixer(chosen, features.at(now), s.groups[now]).w.detach().numpy()
    found = mipi.learn(s.args, s.agent, s.batch, s.groups)["policy_loss"].item()
    log_pi, q = log_pi[0].detach().numpy(), trunks.teams.full_view.q.detach().numpy()
    each = []
    for k, i in np.ndindex(*w.shape):
        may = features.avail_actions[now[k], i].numpy()
        if may[0]:
            continue
        logs, values = log_pi[now[k], i][may], q[now[k], i][may]
        alpha = 0.6 / w[k, i] if flags else 0.6
        each.append(w[k, i] * (np.exp(logs) * (alpha * logs - values)).sum())
    assert np.isclose(found, np.mean(each), rtol=1e-9)


def test_who_acts_and_on_what():
    """The living have something to do; in imagined teams nothing has a gradient, nor in what is
    detached."""
    s = setting("--target-head pointer")
    trunks = mipi.run_trunks(s.agent, s.batch.features, s.groups)
    features, now = s.batch.features, s.batch.now
    acting = mipi.find_acting(trunks, s.batch)
    A, row = features.avail_actions.shape[1], 0
    for k, m in enumerate(now.tolist()):
        for i in range(A):
            if not features.avail_actions[m, i, 0]:
                assert acting.living[row] == k * A + i
                assert torch.equal(acting.avail_actions[row], features.avail_actions[m, i])
                assert torch.equal(acting.own_state[row], features.entities[m, i])
                assert torch.equal(acting.own_memory[row], trunks.own_memory[m, i])
                row += 1
            for view, team in enumerate((acting.team, acting.imagined)):
                whole = trunks.teams[view]
                assert torch.equal(team.q[k, i], whole.q[m, i])
                assert torch.equal(team.memory[k, i], whole.memory[m, i])
                assert torch.equal(team.tagged.units[k], whole.tagged.units[m])
                assert torch.equal(team.tagged.choices[k], whole.tagged.choices[m])
    assert 0 < row == len(acting.living) < len(now) * A
    assert not torch.equal(acting.team.tagged.choices, acting.imagined.tagged.choices)
    learns = [acting.team.memory, acting.team.tagged.units, acting.own_memory]
    assert all(x.requires_grad for x in learns)
    loss = mipi.actor_loss(s.args, s.agent, acting, torch.ones(row))
    of_q, of_memory = torch.autograd.grad(loss, acting.team[:2], allow_unused=True)
    assert of_q is None and (of_memory != 0).any(), "utilities get no gradient"
    fixed = mipi.detached(acting)
    for x in (*fixed.team[:2], fixed.team.tagged.units, *fixed.imagined[:2], fixed.own_memory):
        assert not x.requires_grad
    assert not any(x.requires_grad for x in (*acting.imagined[:2], *acting.imagined.tagged))


class Saying(torch.nn.Module):
    """What it reads is what it says."""

    def forward(self, x, tagged=None):
        return x


@pytest.mark.numeric
def test_mutual_information_is_exact_where_it_can_be_counted():
    """Units with four teams, each as likely, and the marginal that is the mean policy: what
    measure() reports is I(u; s* | s+) of the table, by type of unit."""
    s = setting()
    rng = np.random.default_rng(0)
    columns, types = list(s.agent.types.values()), np.array([0, 1, 1, 0, 0, 1])
    U, teams, units = s.battles.family.n_actions, 4, len(types)
    pi = rng.dirichlet(np.ones(U - 1), size=(units, teams))
    pi = np.concatenate((np.zeros((units, teams, 1)), pi), -1)  # no-op is for the dead
    mean = pi.mean(1, keepdims=True)
    information = (pi * np.log(np.where(pi > 0, pi / np.maximum(mean, 1e-9), 1))).sum(-1).mean(1)
    real = rng.dirichlet(np.ones(U - 1), size=(units, teams))
    own_state = torch.zeros(units, teams, s.batch.features.entities.shape[-1])
    own_state[torch.arange(units), :, torch.tensor(columns)[types]] = 1
    avail = torch.ones(units, teams, U, dtype=torch.bool)
    avail[..., 0] = False
    log = lambda p: torch.from_numpy(np.log(np.maximum(p, 1e-300))).float()  # noqa: E731
    s.agent.policy = s.agent.marginal.head = Saying()
    first = np.concatenate((np.zeros((units, teams, 1)), real), -1)

    def and_dead(x):
        """Another row, of others, who are dead and count nowhere."""
        return torch.cat((x, x[:1].flip(-1)))

    q = torch.zeros(units + 1, teams, U)
    acting = mipi.Acting(
        living=torch.arange(units * teams),
        avail_actions=avail.flatten(0, 1),
        own_state=own_state.flatten(0, 1),
        own_memory=log(np.repeat(mean, teams, 1)).flatten(0, 1),
        team=mipi.Team(q, and_dead(log(first)), None),
        imagined=mipi.Team(q, and_dead(log(pi)), None),
    )
    found = mipi.measure(s.agent, acting, torch.full((units * teams,), 0.5))
    for k, name in enumerate(s.agent.types):
        assert np.isclose(found[f"mi/{name}"].item(), information[types == k].mean(), rtol=1e-4)
    assert np.isclose(found["mi"].item(), information.mean(), rtol=1e-4)
    assert np.isclose(found["entropy"].item(), -(real * np.log(real)).sum(-1).mean(), rtol=1e-4)
    ratio = np.log(real / mean[..., 1:])
    assert np.isclose(found["kl"].item(), (real * ratio).sum(-1).mean(), rtol=1e-4)


# --- Who learns from what -------------------------------------------------------------------------


def moved(before, after):
    """Names of parameters that changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def snapshot(agent):
    """Parameters by name."""
    return {
        f"{part}.{name}": p.detach().clone()
        for part, net in agent.parts().items()
        if isinstance(net, torch.nn.Module)
        for name, p in net.named_parameters()
    }


HEADS = {
    "marginal": {"marginal.head.weight", "marginal.head.bias"},
    "policy": {"policy.weight", "policy.bias"},
}


def test_who_learns_in_each_alternation(monkeypatch):
    """Heads in all but the last; in the last also the marginal's trunk and, with the critic's step,
    utilities, mixer and the layers they share with the policy. Targets never."""
    s = setting("--ba-iterations 3")
    found, descend = [snapshot(s.agent)], mipi.descend

    def watched(*args):
        norm = descend(*args)
        found.append(snapshot(s.agent))
        return norm

    monkeypatch.setattr(mipi, "descend", watched)
    mipi.learn(s.args, s.agent, s.batch, s.groups)
    found.append(snapshot(s.agent))
    steps = [moved(a, b) for a, b in itertools.pairwise(found)]
    assert steps[:4] == [HEADS["marginal"], HEADS["policy"]] * 2
    assert steps[4] == {x for x in found[0] if x.startswith("marginal.")}
    critic = {x for x in found[0] if x.startswith(("utility.", "mixer."))}
    assert steps[5] == critic and steps[6:] == [HEADS["policy"]]


@pytest.mark.numeric
def test_alternations_on_cached_trunks_are_blahut_and_arimotos(monkeypatch):
    """Each step's loss is that of heads as they are then, on what the trunks gave before: written
    out for M = 3, with networks run in each alternation, whose trunks have not moved."""
    s, twin = (setting("--ba-iterations 3 --alpha-i .4", double=True) for _ in range(2))
    losses, descend = [], mipi.descend

    def watched(loss, *args):
        losses.append(float(loss.detach()))
        return descend(loss, *args)

    monkeypatch.setattr(mipi, "descend", watched)
    mipi.learn(s.args, s.agent, s.batch, s.groups)
    monkeypatch.undo()
    features, agent, args = twin.batch.features, twin.agent, twin.args
    alive = ~features.avail_actions[twin.batch.now][..., 0]
    avail = features.avail_actions[twin.batch.now][alive]
    clip = args.max_grad_norm
    for m in range(2):
        trunks = mipi.run_trunks(agent, features, twin.groups)
        full_view, own_group, _ = trunks.teams
        full, team, own = (
            x[twin.batch.now][alive].detach()
            for x in (full_view.memory, own_group.memory, trunks.own_memory)
        )
        q = trunks.teams.full_view.q[twin.batch.now][alive].detach()
        log_m = agent.marginal.head(own).masked_fill(~avail, -1e9).log_softmax(-1)
        pi = agent.policy(team).masked_fill(~avail, -1e9).softmax(-1).detach()
        likelihood = -(pi * log_m).sum(-1).mean()
        assert losses[2 * m] == pytest.approx(likelihood.item(), rel=1e-9)
        descend(likelihood, agent.marginal, agent.marginal_optimiser, clip)
        log_m = agent.marginal.head(own).masked_fill(~avail, -1e9).log_softmax(-1).detach()
        log_pi = agent.policy(full).masked_fill(~avail, -1e9).log_softmax(-1)
        loss = (log_pi.exp() * (0.4 * (log_pi - log_m) - q)).sum(-1).mean()
        assert losses[2 * m + 1] == pytest.approx(loss.item(), rel=1e-9)
        descend(loss, agent.policy, agent.policy_optimiser, clip)


@pytest.mark.numeric
@pytest.mark.parametrize("limit", [0.01, 1000.0])
def test_a_step_of_critic_and_policy_clips_each_by_its_own_norm(limit):
    """Of one loss with known slopes, by gradient descent; slopes of earlier steps are gone."""
    s = setting(f"--max-grad-norm {limit}", rounds=0, double=True)
    agent, loss, expected = s.agent, 0.0, {}
    agent.optimiser, agent.policy_optimiser = (
        torch.optim.SGD(net.parameters(), lr=1.0) for net in (agent.critic(), agent.policy)
    )
    rng = np.random.default_rng(1)
    for name, net, size in (("critic", agent.critic(), 0.1), ("policy", agent.policy, 0.5)):
        slopes = [size * rng.normal(size=p.shape) for p in net.parameters()]
        norm = np.sqrt(sum((x**2).sum() for x in slopes))
        assert 0.01 < norm < 1000
        share = min(1.0, limit / norm)
        expected[name] = [p.detach().numpy() - share * x for p, x in zip(net.parameters(), slopes)]
        for p, x in zip(net.parameters(), slopes):
            loss = loss + (p * torch.from_numpy(x)).sum()
            p.grad = torch.full_like(p, 0.3)
    mipi.step_together(s.args, agent, loss)
    for name, net in (("critic", agent.critic()), ("policy", agent.policy)):
        for p, x in zip(net.parameters(), expected[name]):
            assert np.allclose(p.detach(), x, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("flags", ["--alpha .2 --alpha-i 0", "--alpha 0 --alpha-i .5"])
def test_one_alpha_is_enough_for_a_marginal(flags):
    """It is charged in Eq. (16), or in Eq. (18), and learns in both cases."""
    s = setting(flags)
    _, _, log_m = forward(s)
    assert s.agent.informed and (log_m != 0).any()
    before = snapshot(s.agent)
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    assert {"mi", "marginal_loss"} <= scalars.keys()
    assert any(name.startswith("marginal.") for name in moved(before, snapshot(s.agent)))


def test_optimisers_are_of_one_kind():
    for flags, kind in (("--optimiser adam", "Adam"), ("--rmsprop-alpha .5", "RMSprop")):
        agent = setting(flags, rounds=0).agent
        optimisers = agent.optimiser, agent.policy_optimiser, agent.marginal_optimiser
        assert {type(x).__name__ for x in optimisers} == {kind}
        groups = [group for x in optimisers for group in x.param_groups]
        assert kind == "Adam" or {group["alpha"] for group in groups} == {0.5}


def test_the_row_without_a_name_is_the_greedy_policy(monkeypatch):
    """The run's, without exploration or draws; each size has a seed of its own, not the run's."""
    met = watch_evaluations(mipi, monkeypatch)
    run(mipi, "run", 16, "--final-episodes", 2)
    own = [policy for policy, *_ in met if isinstance(policy, mipi.Player)]
    assert len(own) == 3
    check_seeds_of_evaluations(met)
    for policy in own:
        assert policy.rng is None and policy.epsilon == 0
        utility = dict(policy.agent.utility.state_dict())
        assert differences(utility, exact("run")["agent"]["utility"]) == []


def test_a_learning_rate_is_that_of_all_optimisers():
    agent = setting(rounds=0).agent
    agent.set_learning_rate(0.25)
    optimisers = agent.optimiser, agent.policy_optimiser, agent.marginal_optimiser
    assert [group["lr"] for x in optimisers for group in x.param_groups] == [0.25] * 3


@pytest.mark.numeric
def test_the_policys_w_is_that_of_the_mixer(monkeypatch):
    """w_i as it is, small ones, too: it weighs the loss and divides alpha_i."""
    s, seen, actor_loss = setting("--alpha-i-over-w", noise=2.0), [], mipi.actor_loss
    trunks, _, _ = forward(s)
    y = mipi.find_targets(s.args, s.agent, s.batch, trunks)
    _, w, _ = mipi.critic_loss(s.args, s.agent, s.batch, s.groups, trunks.teams, y)

    def watched(args, agent, acting, w):
        seen.append(w)
        return actor_loss(args, agent, acting, w)

    monkeypatch.setattr(mipi, "actor_loss", watched)
    mipi.learn(s.args, s.agent, s.batch, s.groups)
    expected = w[alive(s)].clamp(min=1e-6)  # a softmax can underflow to 0
    assert (expected < 0.05).any() and len(seen) == s.agent.ba_iterations
    assert all(torch.equal(x, expected) for x in seen)


@pytest.mark.numeric
@pytest.mark.parametrize("head", ["tags", "pointer"])
@pytest.mark.parametrize("flags", ["", "--detach-actor-trunk"])
def test_what_the_policys_loss_moves(flags, head):
    """The shared trunk, unless that is switched off; never utilities' head, mixer or marginal."""
    unclipped = "--ba-iterations 1 --max-grad-norm 1e9"
    s = setting(f"{unclipped} --target-head {head} {flags}", double=True)
    trunks, _, _ = forward(s)
    y = mipi.find_targets(s.args, s.agent, s.batch, trunks)
    loss, w, _ = mipi.critic_loss(s.args, s.agent, s.batch, s.groups, trunks.teams, y)
    parameters = dict(s.agent.critic().named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    alone = dict(zip(parameters, found))
    acting = mipi.find_acting(trunks, s.batch)
    actor = mipi.actor_loss(s.args, s.agent, acting, w[alive(s)].clamp(min=1e-6))
    policy = {f"policy.{n}": p for n, p in s.agent.policy.named_parameters()}
    every = parameters | policy
    summed = torch.autograd.grad(loss + actor, list(every.values()))
    grads = {}

    def keep(loss, net, optimiser, clip):
        optimiser.zero_grad()
        loss.backward(inputs=list(net.parameters()))
        grads[net] = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        return loss.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mipi, "descend", keep)
        mipi.learn(s.args, s.agent, s.batch, s.groups)
    (both,) = (g for net, g in grads.items() if net is not s.agent.marginal)
    differ = {n for n in alone if not torch.allclose(alone[n], both[n], rtol=1e-9, atol=1e-12)}
    trunk = {n for n in alone if n.startswith("0.") and "head" not in n}
    assert differ == (set() if flags else trunk)
    # What is descended is the sum of both losses: neither's sign nor its size is another's.
    both |= {f"policy.{n}": p.grad for n, p in s.agent.policy.named_parameters()}
    for name, x in zip(every, summed):
        assert torch.allclose(both[name], x, rtol=1e-9, atol=1e-12), name
    assert any(summed[k].abs().max() > 1e-6 for k, n in enumerate(every) if "policy" in n)
    (own,) = (g for net, g in grads.items() if net is s.agent.marginal)
    assert len(own) == len(list(s.agent.marginal.parameters()))
    for net in (s.agent.target_utility, s.agent.target_mixer):
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.numeric
@pytest.mark.parametrize("regularizer", ["entropy", "none"])
def test_ablations(regularizer):
    """Entropy: E_pi log pi in the marginal's place; none: reward alone. No marginal learns."""
    alpha = 0.5 if regularizer == "entropy" else 0.0
    weight = f"--alpha {alpha}" if alpha else ""
    s = setting(f"--regularizer {regularizer} --ba-iterations 1 {weight}", double=True)
    trunks, log_pi, log_m = forward(s)
    assert (log_m == 0).all() and trunks.own_memory is None
    before = snapshot(s.agent)
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    now, q = s.batch.now, trunks.teams.full_view.q
    there = ~s.batch.features.avail_actions[now][..., 0]
    each = (log_pi[0].exp() * (alpha * log_pi[0] - q)).sum(-1)[now]
    assert torch.isclose(scalars["policy_loss"], each[there].mean(), rtol=1e-9)
    assert not any(x.startswith("marginal") for x in moved(before, snapshot(s.agent)))
    assert not {"kl", "marginal_loss"} & set(scalars)


# --- The parent -----------------------------------------------------------------------------------


REFILS = [  # the last: of windows, lambda-returns, pointers, Adam, no memory, own embedding, bf16
    *("", "--no-imagine --scenario mmm", "--scenario resource --no-imagine"),
    "--preset cpu --replay-window 3",
]


@pytest.mark.parametrize("flags", REFILS)
def test_without_the_method_it_is_refil_with_the_linear_mixer(flags):
    """--regularizer none and the policy read off the utilities: utilities, mixer, targets, their
    optimiser, battles, replay and generator of whole runs, bit for bit."""
    flags = [*flags.split(), "--target-every", "8", "--epsilon-steps", "64"]
    flags += ["--mixer", "linear"]
    mine = run(mipi, "mipi", 96, "--regularizer", "none", "--policy", "greedy", *flags)
    theirs = run(refil, "refil", 96, *flags)
    for part in theirs["agent"]:
        assert differences(theirs["agent"][part], mine["agent"][part]) == [], part
    for name in ("battles", "log", "rng"):
        assert differences(theirs["ranks"][0][name], mine["ranks"][0][name]) == [], name
    assert differences(saved_replay("refil"), saved_replay("mipi")) == []
    other = run(mipi, "head", 96, "--regularizer", "none", *flags)
    assert differences(mine["agent"]["utility"], other["agent"]["utility"])


def test_diff_of_the_two_files_is_the_method():
    parent, child = (Path(module.__file__).read_text().splitlines() for module in (refil, mipi))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.45 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


def blocks(module):
    """{name: text} of what is marked as shared."""
    found, lines = {}, None
    for line in Path(module.__file__).read_text().splitlines():
        mark = line.strip()
        if mark.startswith("# [shared: ") and mark.endswith(" begin"):
            found[mark.removesuffix(" begin")] = lines = []
        elif mark.startswith("# [shared: "):
            assert mark.removesuffix(" end") in found and lines is not None, mark
            lines = None
        elif lines is not None:
            lines.append(line)
    assert lines is None
    return found


def test_shared_blocks_are_the_same():
    mine, theirs = blocks(mipi), blocks(refil)
    assert mine.keys() == theirs.keys() and len(mine) >= 4
    for name in mine:
        assert mine[name] == theirs[name], name
    assert sum(map(len, mine.values())) > 300
    assert (mipi.RESUMABLE, mipi.LINE) == (refil.RESUMABLE, refil.LINE)
    assert mipi.PRESETS["cpu"] == refil.PRESETS["cpu"] | {"detach_actor_trunk": True}
    theirs = refil.PRESETS["cpu scenario resource"]
    ours = {"policy": "exact", "alpha_i_over_w": False}
    assert mipi.PRESETS["cpu scenario resource"] == theirs | ours


# --- Same seed, same bits -------------------------------------------------------------------------

MODES = {
    "mi": "",
    "entropy, csz, bf16": "--regularizer entropy --scenario csz --amp",
    "alone, mmm": "--observe-self-only --scenario mmm --no-imagine",
    "mi, windows, resource collection": "--scenario resource --egocentric --replay-window 3",
    "mi, pointer, mmm": "--target-head pointer --scenario mmm",
    "mi, lambda-returns, adam": "--returns lambda --optimiser adam",
}


@pytest.mark.parametrize("mode", some_long(MODES, "alone", "mi, pointer", "mi, lambda", "entropy"))
def test_half_and_resumed_is_whole(mode):
    flags = [*MODES[mode].split(), "--log-every", "48", "--batch-size", "4"]
    whole = run(mipi, "whole", 128, *flags)
    run(mipi, "cut", 10, *flags)
    for steps in (70, 128):
        assert mipi.main(resuming("cut", steps)) == 0
    cut, first = exact("cut"), initial("whole")
    assert whole["timesteps"] == 128 and differences(whole, cut) == []
    assert differences(saved_replay("whole"), saved_replay("cut")) == []
    assert metrics("whole") == metrics("cut") and len(metrics("cut")) == 2
    learned = {x for x in whole["agent"] if differences(first["agent"][x], whole["agent"][x])}
    informed = {"marginal", "marginal_optimiser"} if mode.startswith("mi") else set()
    expected = {"utility", "mixer", "policy", "optimiser", "policy_optimiser"} | informed
    assert learned - {"target_utility", "target_mixer"} == expected


def test_same_seed_same_bits():
    a, b, c = (
        run(mipi, d, 64, "--log-every", 32, "--seed", x) for d, x in (("a", 7), ("b", 7), ("c", 8))
    )
    assert differences(a, b) == [] and metrics("a") == metrics("b") != metrics("c")
    assert {x.split("/")[2] for x in differences(a, c) if x.startswith("/agent")} == set(a["agent"])
    assert {"/ranks/0/rng", "/ranks/0/method_rng"} <= set(differences(a, c))


def test_a_reward_that_is_not_finite(monkeypatch, capfd):
    """As in REFIL: named, in no checkpoint, and the run goes on from the newest."""
    calls, step = [], Combat.step

    def poisoned(battles, actions):
        result = step(battles, actions)
        calls.append(1)
        if len(calls) == 43:  # in the sixth round
            result.reward[0] = float("nan")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Combat, "step", poisoned)
        assert mipi.main(tiny("run", 400, "--save-every", 16, "--log-every", 48)) == 1
    assert "rewards is not finite" in only_error(capfd.readouterr().err)
    for entry, state in zip(index("run"), states("run")):
        assert finite(state) and finite(saved_replay("run", entry))
    assert mipi.main(resuming("run", 128)) == 0
    run(mipi, "whole", 128, "--save-every", 16, "--log-every", 48)
    assert differences(exact("run"), exact("whole")) == []


def test_resource_collection_has_defaults_of_its_own():
    """alpha .05, one alternation, no imagined groups: s* is s-."""
    run(mipi, "run", 64, "--scenario", "resource", "--log-every", 16)
    logged = set().union(*metrics("run"))
    assert {"mi", "kl", "policy_loss"} <= logged and not {"group_loss", "mi/zealot"} & logged
    state = exact("run")["agent"]
    steps = [state[f"{x}optimiser"]["state"][0]["step"] for x in ("policy_", "marginal_", "")]
    assert steps[0] == steps[1] == steps[2] > 0
    more = run(mipi, "more", 64, "--scenario", "resource", "--ba-iterations", 3)["agent"]
    assert more["policy_optimiser"]["state"][0]["step"] == 3 * steps[0]


def test_measures_are_taken_once_a_round(monkeypatch):
    """Of its last minibatch; all else that is learned and logged stays."""
    calls, measure = [], mipi.measure
    monkeypatch.setattr(mipi, "measure", lambda *args: calls.append(1) or measure(*args))
    s, twin = setting("--updates-per-iteration 3"), setting("--updates-per-iteration 3")
    found = mipi.update(s.args, s.agent, s.buffer, torch.Generator().manual_seed(1))
    assert len(calls) == 1
    rng, each = torch.Generator().manual_seed(1), []
    for _ in range(3):
        batch = twin.buffer.sample(rng, twin.args.batch_size)
        groups = mipi.draw_groups(batch.features, rng)
        each.append(mipi.learn(twin.args, twin.agent, batch, groups))
    assert found.keys() == each[0].keys()
    assert torch.equal(found["mi"], each[-1]["mi"]) and found["mi"] != each[0]["mi"]
    mean = torch.stack([x["td_loss"] for x in each]).mean()
    assert torch.isclose(found["td_loss"], mean, rtol=1e-6)
    assert differences(s.agent.utility.state_dict(), twin.agent.utility.state_dict()) == []


def test_what_is_logged():
    run(mipi, "run", 64, "--log-every", 16, "--final-episodes", 2)
    logged = metrics("run")
    names = {"mi", "mi/zealot", "mi/stalker", "entropy", "kl", "w", "alpha_over_w", "td_loss"}
    names |= {"group_loss", "policy_loss", "marginal_loss", "grad_norm", "q_total"}
    assert any(names <= set(line) for line in logged)
    assert {"final/3/win", "final/5/return"} <= set(logged[-1])


# --- The command line -----------------------------------------------------------------------------

WRONG = {
    "--policy greedy": "--policy greedy --regularizer none",
    "--regularizer none --policy greedy --actor-loss-times-w": "--policy --actor-loss-times-w",
    "--regularizer none --policy greedy --ba-iterations 2": "--policy greedy --ba-iterations",
    "--policy exact --actor-loss-times-w": "--policy head --actor-loss-times-w",
    "--policy exact --alpha-i 0": "--policy exact --alpha-i 0",
    "--policy exact --alpha-i-over-w": "--policy exact --alpha-i-over-w --charge-times-w",
    "--policy exact --regularizer none --ba-iterations 2": "--policy exact --ba-iterations",
    "--policy exact --regularizer entropy --ba-iterations 2": "--policy exact --ba-iterations",
    "--policy exact --alpha 0 --ba-iterations 2": "--policy exact --ba-iterations",
    "--policy exact --observe-self-only --ba-iterations 2": "--policy exact --ba-iterations",
    "--observe-self-only --alpha-i .1": "--alpha-i regulariser",
    "--observe-self-only --alpha .1": "--alpha regulariser",
    "--observe-self-only --regularizer entropy": "--observe-self-only --regularizer",
    "--observe-self-only --charge-times-w": "--charge-times-w regulariser",
    "--regularizer none --charge-times-w": "--charge-times-w regulariser",
    "--alpha 0 --charge-times-w": "--charge-times-w 0",
    "--preset cpu --charge-times-w": "--alpha-i-over-w --charge-times-w --no-alpha-i-over-w",
    "--alpha-i-over-w --alpha-i 0": "alpha_i --no-alpha-i-over-w",
    "--alpha-i-over-w --alpha 0": "alpha_i --no-alpha-i-over-w",
    "--alpha-i-over-w --observe-self-only": "alpha_i --no-alpha-i-over-w",
    "--regularizer none --alpha .1": "--alpha regulariser",
    "--regularizer none --alpha-i-over-w": "--alpha-i-over-w regulariser",
    "--no-imagine --imagine-weight .3": "--imagine-weight --imagine",
    "--scenario resource --imagine-weight .3": "--scenario resource --imagine-weight",
    "--scenario resource --enemy-ai focus": "--enemy-ai battles",
    "--hidden-size 10": "--hidden-size --heads",
    "--batch-size 33 --buffer-size 32": "--batch-size --buffer-size",
    "--num-envs 50 --buffer-size 40": "--num-envs --buffer-size",
    "--td-lambda .5": "--td-lambda --returns lambda",
    "--returns lambda --replay-window 1": "--returns lambda --replay-window",
    "--scenario resource --target-head pointer": "--target-head tags",
    "--observe-self-only --target-head pointer": "--observe-self-only --target-head",
    "--optimiser adam --rmsprop-alpha .1": "--rmsprop-alpha --optimiser rmsprop",
    "--anneal-from 10": "--anneal-from --final-share",
    "--final-share .5 --anneal-from 10 --total-timesteps 10": "--anneal-from --total-timesteps",
    "--team-sizes 2": "3 to 8 2",
    "--max-episode-steps 1001": "--max-episode-steps 1000",
    "--alpha -1": "--alpha",
    "--alpha nan": "--alpha",
    "--alpha inf": "--alpha",
    "--ba-iterations 0": "--ba-iterations 0",
}


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_what_would_do_something_else_than_it_says(line, words):
    with pytest.raises(UsageError) as error:
        read(mipi, line)
    assert [word for word in words.split() if word not in str(error.value)] == []


def coefficients(flags):
    args = read(mipi, flags)
    agent = mipi.Agent(args, worlds.family_of(args.scenario), CPU)
    return agent.alpha, agent.alpha_i


def test_alphas():
    """The paper's, one from the other, none."""
    assert coefficients("") == coefficients("--scenario csz") == (0.03, 0.03)
    assert coefficients("--scenario mmm --team-sizes 4") == (0.1, 0.1)
    assert coefficients("--scenario resource") == (0.05, 0.05)
    assert coefficients("--scenario resource --rescale") == (0.005, 0.005)
    cpu = "--preset cpu"
    assert coefficients("--alpha-i-over-w") == coefficients(cpu) == (0.03 / 30, 0.03 / 30)
    assert coefficients(f"{cpu} --mixer linear") == (0.03 / 8, 0.03 / 8), "w_i begins there"
    assert coefficients(f"{cpu} --scenario mmm --regularizer entropy") == (0.1 / 30, 0.1 / 30)
    assert coefficients(f"{cpu} --no-alpha-i-over-w") == (0.03, 0.03)
    assert coefficients(f"{cpu} --policy exact") == (0.03, 0.03), "it has no Eq. (18)"
    assert coefficients(f"{cpu} --scenario resource --policy head") == (0.005, 0.005)
    assert coefficients(f"{cpu} --observe-self-only --target-head tags") == (0, 0)
    assert coefficients(f"{cpu} --regularizer none") == (0, 0)
    assert coefficients(f"{cpu} --alpha 0 --no-alpha-i-over-w") == (0, 0)
    assert coefficients(f"{cpu} --alpha .2") == (0.2, 0.2)
    assert coefficients("--alpha .2") == (0.2, 0.2)
    assert coefficients("--alpha .2 --alpha-i 0") == (0.2, 0)
    assert coefficients("--alpha .2 --policy exact --charge-times-w") == (0.2, 0.2)
    assert coefficients("--alpha-i .5") == (0.03, 0.5)
    assert coefficients("--observe-self-only") == coefficients("--regularizer none") == (0, 0)
    run(mipi, "run", 4)
    resolved = json.loads(Path("run/args.json").read_text())["resolved"]
    assert (resolved["alpha"], resolved["alpha_i"], resolved["ba_iterations"]) == (0.03, 0.03, 4)


def test_the_method_draws_from_a_stream_of_its_own():
    """Which is not the run's, and another with another seed."""
    seeds = [mipi.Agent(mipi.Args(seed=k), worlds.family_of("sz"), CPU).rng for k in (1, 2)]
    draws = [torch.rand(50, generator=rng) for rng in (*seeds, torch.Generator().manual_seed(1))]
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.6 and not torch.isin(a, b).any()


# --- Flags ----------------------------------------------------------------------------------------


def policy_steps(state, run_dir):
    return float(state["agent"]["policy_optimiser"]["state"][0]["step"])


OWN = {  # of the method, or measured otherwise
    "regularizer": ("--regularizer entropy", changed("policy"), None),
    "alpha": ("--alpha .5", changed("utility"), None),
    "alpha_i": ("--alpha-i .5", changed("policy"), None),
    "alpha_i_over_w": ("--alpha-i-over-w", changed("policy"), None),
    "charge_times_w": ("--charge-times-w", changed("utility"), None),
    "observe_self_only": ("--observe-self-only", changed("utility"), None),
    "ba_iterations": ("--ba-iterations 2", policy_steps, (16.0, 8.0)),
    "actor_loss_times_w": ("--actor-loss-times-w", changed("utility"), None),
    "detach_actor_trunk": ("--detach-actor-trunk", changed("utility"), None),
    "hidden_size": ("--hidden-size 12", shape("mixer", "project"), ((4, 8, 8), (4, 12, 12))),
    "mixer": ("--mixer linear", shape("mixer", "project"), ((4, 8, 8), (2, 8, 8))),
    "mixing_size": ("--mixing-size 6", shape("mixer", "out_bias"), ((4, 3), (4, 6))),
}
ELSEWHERE = {
    "td_lambda": "test_lambda_returns_are_sums_of_n_step_returns",
    "policy": "test_without_the_method_it_is_refil_with_the_linear_mixer",
    "amp": "test_amp_and_compile",
    "compile": "test_amp_and_compile",
    "rescale": "test_refil.py::test_rescaled_worlds",
    "egocentric": "test_refil.py::test_rescaled_worlds",
    # The same lines as the parent's (test_shared_blocks_are_the_same):
    "windows": "test_refil.py::test_how_often_a_step_is_drawn",
    **dict.fromkeys(
        ("backend", "game_version", "enemy_ai", "clip_regeneration", "env_threads"),
        "test_refil.py",
    ),
}


def test_every_flag_is_tested():
    own = {x.name for x in dataclasses.fields(mipi.Args)}
    own -= {x.name for x in dataclasses.fields(RunArgs)}  # tests/harness
    assert own == set(EFFECTS) | set(OWN) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(mipi, run_dir, 64, "--final-episodes", 1), run_dir


# The parent's flags are the parent's lines here, too: they are tried again in slow tests.
FIELDS = [*OWN, *(pytest.param(x, marks=pytest.mark.slow) for x in EFFECTS)]


@pytest.mark.parametrize("field", FIELDS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    run_script = functools.partial(run, mipi)
    check_effect((EFFECTS | OWN)[field], plain, tmp_path / "run", run_script)


def test_amp_and_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, dynamic: compiled.append(type(net).__name__)
    )
    plain = run(mipi, "plain", 32)
    assert compiled == []
    assert differences(plain["agent"], run(mipi, "compiled", 32, "--compile")["agent"]) == []
    assert sorted(compiled) == ["Marginal", "Mixer", "Mixer", "Utility", "Utility"]
    monkeypatch.setattr(mipi, "has_bf16", lambda device: True)
    amp = run(mipi, "amp", 32, "--amp")
    assert differences(plain["agent"], amp["agent"])
    assert json.loads(Path("amp/args.json").read_text())["resolved"]["amp"]


@pytest.mark.slow  # torch's compiler
@pytest.mark.timeout(900)
def test_compiled_networks_learn_the_same():
    a = run(mipi, "plain", 64)["agent"]
    b = run(mipi, "compiled", 64, "--compile")["agent"]
    for name in ("utility", "mixer", "policy", "marginal"):
        for key, x in b[name].items():
            torch.testing.assert_close(a[name][key], x, atol=1e-4, rtol=1e-3)


# --- Evaluation -----------------------------------------------------------------------------------


def test_evaluation_alone_repeats(capfd):
    """In Resource Collection: the figures of the run's end; nothing else is written."""
    run(mipi, "run", 32, "--scenario", "resource", "--final-episodes", 2)
    before, first = sorted(Path("run").rglob("*")), capfd.readouterr().out
    assert mipi.main(["--eval-only", "run"]) == 0
    again = capfd.readouterr().out.strip()
    assert again.endswith(first[first.index("| who") :].strip()) and "5 collector" in again
    assert sorted(Path("run").rglob("*")) == before


def test_films_of_resource_collection():
    """One of each size with an evaluation, as long as an episode."""
    flags = "--scenario resource --capture-video --final-episodes 1 --team-sizes 3"
    run(mipi, "run", 8, *flags.split(), "--eval-team-sizes", 6)
    films = sorted(Path("run/videos").iterdir())
    assert [x.name for x in films] == ["final-16-3.mp4", "final-16-6.mp4"]
    assert [sum(1 for _ in iio.imiter(x)) for x in films] == [9, 9]  # the beginning, and 8 steps


def test_a_loaded_player_is_the_greedy_policy():
    run(mipi, "run", 64)
    earned = []
    for _ in range(2):
        battles = Combat("sz", (5,), 4, seed=9, once=True)
        earned.append(play(battles, mipi.load_player("run")))
    assert earned[0] == earned[1]
    player = mipi.load_player("run")
    assert player.rng is None and isinstance(player, mipi.Player)


# --- Learning -------------------------------------------------------------------------------------

LEARNS = "--team-sizes 3 --eval-team-sizes --hidden-size 32 --mixing-size 16 --num-envs 16"
LEARNS += " --no-recurrent --own-beside --target-head pointer --returns lambda --replay-window 8"
LEARNS += " --optimiser adam --learning-rate 1e-3 --final-share .1 --gamma .95 --batch-size 32"
LEARNS += " --buffer-size 2000 --updates-per-iteration 32 --target-every 100 --epsilon-steps 10000"
LEARNS += " --max-episode-steps 60 --eval-every 0 --final-episodes 400 --total-timesteps 39000"
LEARNS += " --detach-actor-trunk"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mipi_learns(seed, monkeypatch):
    """Three against three weak ones, small networks with what --preset cpu learns by, 39,000 steps,
    two CPU minutes: greedy agents (.82 at seed 1; with the linear mixer .84 at seeds 1, 2, 3) win
    more than those that only stand and shoot (.67), and than random ones. Policies differ from
    their marginals."""
    monkeypatch.setattr(combat, "Combat", WeakEnemies)
    battles = WeakEnemies("sz", (3,), 400, seed=5, once=True, episode_limit=60)
    bar = summarise(play(battles, stand_and_shoot))["win"]
    assert mipi.main([*LEARNS.split(), "--seed", str(seed), "--run-dir", "run"]) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["3 random"]["win"] < 0.4 < 0.6 < bar < 0.75
    assert results["3"]["win_low"] > bar
    last = [line for line in metrics("run") if "kl" in line][-1]
    assert last["kl"] > 0.05
