"""mipi_mappo_smac.py: its term against NumPy and closed forms, what the marginal and its teacher
see, who learns from what, the parent's bits, the control, resuming, flags. What is the parent's:
test_mappo_smac.py, whose settings these are.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from types import SimpleNamespace

import harness
from harness import UsageError

import numpy as np
import pytest
import test_mappo_smac as of_parent
import torch
import torch.nn.functional as F
from battle_tools import (
    CPU,
    WeakEnemies,
    changed,
    check_effect,
    check_seeds_of_evaluations,
    elsewhere,
    initial,
    read,
    resuming,
    sharpen,
    stand_and_shoot,
    things_moved,
    watch_evaluations,
)
from runs import differences, exact, metrics, script, some_long

from envs.smac import combat, worlds
from envs.smac.combat import SIDE, Combat
from envs.smac.episodes import play, summarise

mipi, mappo = script("baselines.mipi_mappo_smac"), script("baselines.mappo_smac")
__all__ = ["elsewhere"]  # a fixture of all tests here
MODES = {
    "rounds": "--rnn-size 6",
    "windows": f"{of_parent.WINDOWS} --target-head pointer --normalise-advantages",
}
EACH_MODE = pytest.mark.parametrize("mode", MODES)
OWN = pytest.mark.parametrize("own", ["self", "self+enemies"])


# --- Settings -------------------------------------------------------------------------------------


def setting(flags="", noise=0.5, double=False):
    """A rollout of agents away from their beginning, and the features of its K steps."""
    args = read(mipi, f"{of_parent.SMALL} --returns lambda {flags}")
    once = args.rollout == "rounds"
    battles = mipi.make_envs(args, args.team_sizes, args.num_envs, args.seed, once=once)
    battles.reset()
    agent = mipi.Agent(args, battles.family, CPU)
    nets = (agent.actor, agent.critic, agent.target_critic, agent.marginal)
    for k, net in enumerate(nets):
        sharpen(net, noise, k)
    rng = torch.Generator().manual_seed(5)
    player = mipi.Player(agent, rng, args.drop_teammates)
    rollout, _ = mipi.collect(args, battles, player)
    if double:
        for net in nets:
            net.double()
        rollout = in_double(rollout)
    features = rollout.features.at(torch.arange(len(rollout.later)))
    return SimpleNamespace(
        args=args,
        agent=agent,
        battles=battles,
        player=player,
        rng=rng,
        rollout=rollout,
        features=features,
    )


def in_double(x):
    """A nested named tuple whose numbers are double."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    return x._make([in_double(y) for y in x])


def batch_of(s):
    """What the losses read, in double precision, of an agent that has moved on since it acted."""
    term, _ = mipi.find_term(s.args, s.agent, s.rollout)
    K = len(s.rollout.later)
    A = s.features.unseen.shape[1]
    rng = torch.Generator().manual_seed(2)
    steps = s.rollout.steps._make([x[s.rollout.steps.going] for x in s.rollout.steps])
    sharpen(s.agent.actor, 0.3, 8)
    return mipi.Batch(
        features=s.features,
        actions=steps.actions[:, :A],
        log_probs=steps.log_probs[:, :A],
        advantages=torch.randn(K, generator=rng, dtype=torch.float64),
        targets=torch.zeros(K),
        log_marginal=term.log_marginal,
        price=torch.full((K,), s.agent.alpha / 1.7, dtype=torch.float64),
    )


def numpy_kl(log_pi, log_m, avail):
    """sum_u pi (log pi - log m) over available actions, (U,) each."""
    pi, m = np.exp(log_pi[avail]), np.exp(log_m[avail])
    return sum(p * np.log(p / q) for p, q in zip(pi, m))


# --- The parent -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", some_long(of_parent.WHOLE, "windows within", "windows of"))
def test_without_its_term_it_is_mappo_bit_for_bit(mode):
    """--alpha 0: networks, optimisers, generator, battles, log and evaluations of whole runs, with
    rates that fall."""
    flags = [*of_parent.WHOLE[mode].split(), "--log-every", "64", "--final-episodes", "1"]
    flags += ["--final-share", ".2"]
    theirs = of_parent.run("theirs", 96, *flags)
    mine = run("mine", 96, *flags, "--alpha", 0)
    for part in theirs["agent"]:
        assert differences(theirs["agent"][part], mine["agent"][part]) == [], part
    names = ("battles", "log", "rng")
    own = [{name: state["ranks"][0][name] for name in names} for state in (theirs, mine)]
    assert differences(*own) == []
    assert metrics("theirs") == metrics("mine")
    with_it = run("with", 96, *flags, "--alpha", 1)
    assert differences(mine["agent"]["actor"], with_it["agent"]["actor"])


def test_diff_of_the_two_files_is_the_method():
    parent, child = (Path(module.__file__).read_text().splitlines() for module in (mappo, mipi))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.45 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


# --- The term against NumPy -----------------------------------------------------------------------


@pytest.mark.numeric
@EACH_MODE
def test_a_minibatch_of_lessons_has_its_own_teachers(mode):
    """Each step's policy stays beside its features, and each is there once."""
    s = setting(f"{MODES[mode]} --minibatches 4")
    features = mipi.own_states(s.features, "self")
    K, A, _ = features.entities.shape
    names = torch.arange(K, dtype=torch.float32)
    features.entities[:, 0, 0] = names
    log_pi = names[:, None, None].expand(K, A, 5)
    lesson, found = mipi.Lesson(features, log_pi), []
    for part in mipi.minibatches(s.args, lesson, s.rng):
        assert torch.equal(part.log_pi[:, 0, 0], part.features.entities[:, 0, 0])
        found.append(len(part.log_pi))
    assert len(found) == 4 and sum(found) == K


def test_the_marginals_loss_is_that_of_the_living():
    """Eq. (17) by loops, as it is logged of one minibatch."""
    s = setting("--marginal real --marginal-epochs 1 --minibatches 1", double=True)
    log_pi = s.agent.say(s.agent.actor, s.features).detach().numpy()
    own = mipi.own_states(s.features, "self")
    log_m = s.agent.say(s.agent.marginal, own).detach().numpy()
    avail, each = s.features.avail_actions.numpy(), []
    for k, i in np.ndindex(*avail.shape[:2]):
        may = avail[k, i]
        if not may[0]:  # who may do nothing else is dead, or no agent
            each.append(-(np.exp(log_pi[k, i]) * log_m[k, i])[may].sum())
    _, told = mipi.find_term(s.args, s.agent, s.rollout)
    assert 0 < len(each) < avail[..., 0].size
    assert told["marginal_loss"].item() == pytest.approx(np.mean(each), rel=1e-6)


@EACH_MODE
@pytest.mark.parametrize("regularizer", ["mi", "entropy"])
def test_rewards_are_those_of_numpy(mode, regularizer):
    """r - alpha sum_i KL(pi_i || m), by loops over battles, steps and living agents; the policy is
    the one that acted, the marginal the one after its epochs."""
    s = setting(f"{MODES[mode]} --alpha .3 --regularizer {regularizer}", double=True)
    before = [p.clone() for p in s.agent.marginal.parameters()]
    term, told = mipi.find_term(s.args, s.agent, s.rollout)
    moved = any(not torch.equal(a, b) for a, b in zip(before, s.agent.marginal.parameters()))
    assert moved == (regularizer == "mi")
    avail = s.features.avail_actions.numpy()
    with torch.no_grad():
        log_pi = s.agent.actor(s.features)[0].numpy()
        log_m, _ = s.agent.marginal(mipi.own_states(s.features, "self"))
    if regularizer == "entropy":
        log_m = term.log_marginal.double()
        assert np.allclose(log_m.exp(), avail / avail.sum(-1, keepdims=True), atol=1e-7)
    log_m = log_m.numpy()
    steps = s.rollout.steps
    charged = mipi.charged(steps, term.nats, s.args.alpha)
    each, k, rewards = [], 0, []
    for t, b in np.ndindex(*steps.going.shape):
        if not steps.going[t, b]:
            assert charged.rewards[t, b] == steps.rewards[t, b]
            continue
        living = [i for i in range(avail.shape[1]) if not avail[k, i, 0]]
        nats = [numpy_kl(log_pi[k, i], log_m[k, i], avail[k, i]) for i in living]
        rewards.append(float(steps.rewards[t, b]) - 0.3 * sum(nats))
        assert abs(rewards[-1] - float(charged.rewards[t, b])) < 1e-10
        each += nats
        k += 1
    assert k == len(s.rollout.later) and np.mean(each) > 0.01
    assert abs(float(told["marginal_kl"]) - np.mean(each)) < 1e-10
    assert abs(float(told["regularised_reward"]) - np.mean(rewards)) < 1e-10
    assert abs(float(told["reward"]) - float(steps.rewards[steps.going].mean())) < 1e-10
    assert charged._replace(rewards=0) == steps._replace(rewards=0)


@pytest.mark.numeric
@EACH_MODE
@pytest.mark.parametrize("penalise", ["both", "loss", "return"])
def test_the_policy_loss_is_that_of_numpy(mode, penalise):
    """PPO's, and alpha / sigma times the mean KL(pi_i || m) of who learns, by loops."""
    s = setting(f"{MODES[mode]} --alpha .4 --penalise {penalise} --clip .1", double=True)
    batch = batch_of(s)
    loss, scalars = mipi.policy_loss(s.args, s.agent, batch, 0.3)
    scalars = {name: x.detach() for name, x in scalars.items()}
    loss = loss.detach()
    with torch.no_grad():
        log_pi = s.agent.actor(batch.features)[0].numpy()
    avail, log_m = batch.features.avail_actions.numpy(), batch.log_marginal.numpy()
    objective, entropy, nats = [], [], []
    for k, i in np.ndindex(*avail.shape[:2]):
        if avail[k, i, 0]:
            continue  # dead, or no one
        row, a = log_pi[k, i], float(batch.advantages[k])
        r = np.exp(row[batch.actions[k, i]] - float(batch.log_probs[k, i]))
        objective.append(min(r * a, min(max(r, 0.9), 1.1) * a))
        p = np.exp(row[avail[k, i]])
        entropy.append(-(p * np.log(p)).sum())
        nats.append(numpy_kl(row, log_m[k, i], avail[k, i]))
    expected = -np.mean(objective) - 0.3 * np.mean(entropy)
    if penalise != "return":
        expected += 0.4 / 1.7 * np.mean(nats)
        assert abs(float(scalars["penalty"]) - 0.4 / 1.7 * np.mean(nats)) < 1e-10
    assert abs(float(loss) - expected) < 1e-10 and 0.4 * np.mean(nats) > 0.01
    assert ("penalty" in scalars) == (penalise != "return")


@pytest.mark.numeric
@EACH_MODE
@pytest.mark.parametrize("penalise", ["both", "loss", "return"])
def test_advantages_are_the_parents_of_the_charged_rewards(mode, penalise):
    """What prepare() makes of r~, bit for bit what MAPPO makes of a world with these rewards; a
    nat's price is alpha over the deviation that advantages were divided by."""
    more = "--value-norm --gae-lambda .6 --gamma .9"
    s = setting(f"{MODES[mode]} --alpha .4 --penalise {penalise} {more}")
    term, _ = mipi.find_term(s.args, s.agent, s.rollout)
    batch = mipi.prepare(s.args, s.agent, s.rollout, term)
    steps = s.rollout.steps
    if penalise != "loss":
        steps = mipi.charged(steps, term.nats, 0.4)
        assert not torch.equal(steps.rewards, s.rollout.steps.rewards)
    s.agent.value_norm = mipi.ValueNorm()
    theirs = mappo.prepare(s.args, s.agent, s.rollout._replace(steps=steps))
    for name in ("actions", "log_probs", "advantages", "targets"):
        assert torch.equal(getattr(batch, name), getattr(theirs, name)), name
    assert torch.equal(batch.log_marginal, term.log_marginal)
    plain = dataclasses.replace(s.args, normalise_advantages=False)
    s.agent.value_norm = mipi.ValueNorm()
    raw = mappo.prepare(plain, s.agent, s.rollout._replace(steps=steps)).advantages
    living = mipi.choosing(batch.features).sum(-1)
    sigma = raw.repeat_interleave(living).double().numpy().std()
    price = 0.4 / (sigma + 1e-5) if s.args.normalise_advantages else 0.4
    assert np.allclose(batch.price, price, rtol=1e-4) and sigma != 1


@pytest.mark.numeric
@pytest.mark.parametrize("mode", ["rounds", "windows"])
def test_the_marginals_gradient_is_that_of_cross_entropy(mode):
    """Of torch's own, with the teacher's probabilities as labels; and by finite differences."""
    s = setting(MODES[mode], double=True)
    log_pi = s.agent.say(s.agent.actor, s.features)
    own = mipi.own_states(s.features, "self")
    acts, avail = mipi.choosing(s.features), s.features.avail_actions
    parameters = [p for p in s.agent.marginal.parameters()]

    def loss():
        log_m, _ = s.agent.marginal(own)
        return mipi.mean_of(mipi.marginal_loss(log_pi, log_m), acts)

    found = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    log_m, _ = s.agent.marginal(own)
    rows = log_m[acts].masked_fill(~avail[acts], -1e9)
    expected = F.cross_entropy(rows, log_pi[acts].exp())
    assert torch.allclose(loss().detach(), expected.detach(), rtol=1e-10)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, theirs):
        assert torch.allclose(a, b, atol=1e-10)
    head = s.agent.marginal.head.bias
    (gradient,) = (a for a, p in zip(found, parameters) if p is head)
    for u in (1, 3):
        sides = []
        for change in (1e-6, -2e-6):
            head.data[u] += change
            sides.append(float(loss().detach()))
        head.data[u] += 1e-6
        assert abs((sides[0] - sides[1]) / 2e-6 - float(gradient[u])) < 1e-7
        assert abs(float(gradient[u])) > 1e-4


@pytest.mark.numeric
def test_a_uniform_marginal_is_entropy_regularisation():
    """KL(pi || uniform) = log n - H(pi): what is charged, and the gradient of the loss."""
    s = setting("--alpha .4 --regularizer entropy", double=True)
    batch = batch_of(s)
    n = batch.features.avail_actions.sum(-1)  # (K, A)
    acts = mipi.choosing(batch.features)
    assert torch.allclose(batch.log_marginal.exp().sum(-1), torch.ones(()), atol=1e-6)
    parameters = list(s.agent.actor.parameters())
    found = torch.autograd.grad(mipi.policy_loss(s.args, s.agent, batch, 0.0)[0], parameters)
    s.agent.alpha = 0.0
    # alpha / sigma as the base bonus has it
    same = torch.autograd.grad(mipi.policy_loss(s.args, s.agent, batch, 0.4 / 1.7)[0], parameters)
    plain = torch.autograd.grad(mipi.policy_loss(s.args, s.agent, batch, 0.0)[0], parameters)
    for a, b in zip(found, same):
        assert torch.allclose(a, b, atol=1e-7)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, plain))
    log_pi = s.agent.say(s.agent.actor, batch.features)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    nats = mipi.divergence(log_pi, batch.log_marginal)
    assert torch.allclose(nats[acts], (n.log() - entropy)[acts], atol=1e-6)


# --- A bandit whose optimum is known --------------------------------------------------------------


class Table(torch.nn.Module):
    """An actor of one state: logits."""

    def __init__(self, log_pi):
        super().__init__()
        self.logits = torch.nn.Parameter(log_pi.clone())

    def forward(self, features):
        log_probs = self.logits.log_softmax(-1)
        return log_probs.expand(*features.avail_actions.shape), None


def bandit(alpha, sigma, entropy_coef, log_m, advantages):
    """The policy (U,) that minimises policy_loss() on one step per action of a uniform policy."""
    U = len(advantages)
    avail = torch.ones(U, 1, U, dtype=torch.bool)
    avail[..., 0] = False
    avail = torch.cat((avail[..., :1], avail), -1)  # the no-op in front, then U actions
    avail[..., 1] = True
    log_m = torch.cat((torch.tensor([-1e9]), log_m)).double()
    features = mipi.Features(None, None, None, avail, None)
    batch = mipi.Batch(
        features=features,
        actions=torch.arange(1, U + 1)[:, None],
        log_probs=torch.full((U, 1), -np.log(U)).double(),
        advantages=advantages / sigma,
        targets=torch.zeros(U),
        log_marginal=log_m.expand(U, 1, U + 1),
        price=torch.full((U,), alpha / sigma).double(),
    )
    args = read(mipi, f"--alpha {alpha} --clip 1e9")
    start = torch.zeros(U + 1, dtype=torch.float64)
    start[0] = -1e9
    agent = mipi.Agent.__new__(mipi.Agent)
    agent.actor, agent.device, agent.amp = Table(start), CPU, False
    agent.alpha = mipi.alpha_of(args)
    optimiser = torch.optim.LBFGS(
        agent.actor.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss, _ = mipi.policy_loss(args, agent, batch, entropy_coef)
        loss.backward()
        return loss

    optimiser.step(closure)
    return agent.actor.logits.detach().softmax(-1)[1:]


@pytest.mark.numeric
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("alpha, sigma", [(0.5, 1.0), (0.5, 2.5), (2.0, 2.5)])
def test_the_optimum_is_the_marginal_times_what_actions_are_worth(alpha, sigma, entropy_coef):
    """m exp(A / alpha) whatever sigma; the base bonus c turns it to m^(alpha / b) exp(A / b) with
    b = alpha + c sigma: it is c sigma in units of reward."""
    advantages = torch.tensor([0.7, -0.4, 0.1, 0.9], dtype=torch.float64)
    log_m = torch.tensor([0.2, 0.5, 0.25, 0.05]).double().log()
    b = alpha + entropy_coef * sigma
    expected = ((alpha * log_m + advantages) / b).softmax(-1)
    found = bandit(alpha, sigma, entropy_coef, log_m, advantages)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.numeric
def test_a_large_price_takes_policies_to_their_marginal():
    """Rounds of the same battles: their KL falls to less than a half where it costs much, and does
    not where it costs nothing to speak of."""
    found = {}
    for alpha in (10.0, 1e-6):
        flags = f"--alpha {alpha} --marginal real --learning-rate 5e-3 --epochs 5"
        s = setting(f"{MODES['windows']} {flags} --marginal-epochs 5 --marginal-learning-rate 5e-3")
        nats = []
        for _ in range(6):
            term, told = mipi.find_term(s.args, s.agent, s.rollout)
            batch = mipi.prepare(s.args, s.agent, s.rollout, term)
            mipi.update(s.args, s.agent, batch, s.rng, 1.0)
            nats.append(float(told["marginal_kl"]))
        found[alpha] = nats
    assert found[10.0][-1] < 0.5 * found[10.0][0]
    assert found[1e-6][-1] > 2 * found[10.0][-1]


# --- What the marginal and its teacher see --------------------------------------------------------


def heads(own):
    """Actors and marginals for synthetic features, in double precision, with either head."""
    for flags in ("--target-head tags", "--target-head pointer", "--no-recurrent"):
        args = read(mipi, f"--hidden-size 8 --heads 2 --own {own} {flags}")
        torch.manual_seed(1)
        family = SimpleNamespace(n_actions=10)
        nets = mipi.Actor(30, family, args), mipi.Marginal(30, family, args)
        for k, net in enumerate(nets):
            sharpen(net, 1.0, k)
            net.double()
        yield nets


def synthetic():
    """Random features with tags of enemies, as MAPPO's tests have them, as this script's own."""
    return mipi.Features(*of_parent.synthetic())


@OWN
def test_the_marginal_sees_its_own_state_only(own):
    """Whatever teammates are, and enemies unless they belong to s+, or who stands where: the same
    bits and no gradient. The own unit, and enemies in sight that belong to s+, do matter."""
    features = synthetic()
    A, S = features.unseen.shape[1:]
    features.unseen[:, :, A:] = features.empty[:, None, A:]  # all enemies are in sight
    for _, net in heads(own):
        x = features.entities.clone().requires_grad_()
        log_m, _ = net(mipi.own_states(features._replace(entities=x), own))
        for i in range(A):
            there = ~features.empty[:, i]
            hidden = [j for j in range(A) if j != i]
            hidden += list(range(A, S)) if own == "self" else []
            may = features.avail_actions[:, i] & there[:, None]
            score = log_m[:, i][may].square().sum()
            (gradient,) = torch.autograd.grad(score, x, retain_graph=True)
            assert (gradient[:, hidden] == 0).all() and (gradient[there, i] != 0).any()
            enemies = gradient[:, A:][~features.empty[:, A:] & there[:, None]]
            assert (enemies != 0).any() == (own == "self+enemies")
            other = features.entities.clone()
            other[:, hidden] = 5.0
            moved = mipi.own_states(features._replace(entities=other), own)
            assert torch.equal(net(moved)[0][:, i][there], log_m[:, i][there])
            other[:, hidden] = features.entities[:, hidden[::-1]]
            moved = mipi.own_states(features._replace(entities=other), own)
            assert torch.equal(net(moved)[0][:, i][there], log_m[:, i][there])


def test_enemies_out_of_sight_are_no_part_of_the_own_state():
    features = synthetic()
    features.unseen[:, 0, 5] = True
    features.avail_actions[:, 0, 6 + 1] = False  # out of sight, out of reach
    for _, net in heads("self+enemies"):
        other = features.entities.clone()
        other[:, 5, 16:] = 5.0
        states = [features, features._replace(entities=other)]
        a, b = (net(mipi.own_states(x, "self+enemies"))[0] for x in states)
        assert torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a, b)


@EACH_MODE
def test_things_in_sight_are_no_part_of_the_own_state(mode):
    """An agent's own row can say where the nearest ones are: a marginal of `self` neither learns
    from that nor reads it. Actors do, and marginals of `self+enemies`, who see things."""
    flags = MODES[mode].replace("pointer", "tags")
    s = setting(f"--scenario resource --egocentric --num-envs 16 {flags}")
    things = s.battles.family.things
    term, _ = mipi.find_term(s.args, s.agent, s.rollout)
    log_m, other = (
        s.agent.say(s.agent.marginal, mipi.own_states(s.features, "self", x))
        for x in (things, slice(0))
    )
    assert torch.equal(term.log_marginal, log_m) and not torch.equal(log_m, other)
    now, then, sees = things_moved(mipi, s.battles)
    for net, own in ((s.agent.actor, ""), (s.agent.marginal, "self+enemies")):
        states = [mipi.own_states(x, own, things) if own else x for x in (now, then)]
        a, b = (s.agent.say(net, x) for x in states)
        assert (a != b).any(-1)[sees].all() and sees.sum() > 10
    states = [mipi.own_states(x, "self", things) for x in (now, then)]
    assert torch.equal(*(s.agent.say(s.agent.marginal, x) for x in states))


@OWN
def test_teachers_in_imagined_teams_see_their_group(own):
    """Who is in the other group changes nothing of a policy, not even as a target; enemies that
    belong to s+ are always there."""
    features = synthetic()
    A, S = features.unseen.shape[1:]
    groups = mipi.draw_groups(features.played, S, torch.Generator().manual_seed(0))
    assert groups.shape == (9, S) and groups.any() and not groups.all()
    now = mipi.imagined_teams(features, groups, own)
    for m, i, j in np.ndindex(9, A, S):
        apart = groups[m, i] != groups[m, j] and not (own == "self+enemies" and j >= A)
        assert now.unseen[m, i, j] == (features.unseen[m, i, j] or apart)
    assert not now.unseen[:, range(A), range(A)].any()
    assert now._replace(unseen=0) == features._replace(unseen=0)
    # Memories: of these battles agents are in the same groups all the time.
    for actor, _ in heads(own):
        said, _ = actor(now)
        for b in range(3):
            m = torch.arange(b, 9, 3)
            for i in range(A - b):  # A - b are there
                hidden = now.unseen[m, i].all(0).nonzero()[:, 0].tolist()
                other = features.entities.clone()
                for j in hidden:
                    other[m, j, 16:] = 5.0
                again, _ = actor(now._replace(entities=other))
                assert torch.equal(again[m, i], said[m, i])


@pytest.mark.numeric
def test_groups_are_refils():
    """The same in all steps of a battle; with p ~ U(0, 1) all numbers of members are as likely."""
    played = torch.ones(3, 20_000, dtype=torch.bool)
    played[2, 500:] = False
    groups = mipi.draw_groups(played, 4, torch.Generator().manual_seed(0))
    number = played.nonzero()[:, 1]
    first = groups[:20_000]
    assert torch.equal(groups, first[number])
    count = torch.bincount(first.sum(1), minlength=5) / 20_000
    assert torch.allclose(count, torch.full((5,), 0.2), atol=0.015)  # as p is uniform


@EACH_MODE
@OWN
@pytest.mark.parametrize("marginal", ["imagined", "real"])
def test_the_marginals_teacher(mode, marginal, own, monkeypatch):
    """The old policy in random groups, of a battle where it remembers, of a step where not, or as
    it acted; the marginal's own pass is of s+, and what is charged is always of the real team."""
    s = setting(f"{MODES[mode]} --marginal {marginal} --own {own}")
    seen, say = [], mipi.Agent.say

    def watched(agent, net, features):
        seen.append((net, features))
        return say(agent, net, features)

    monkeypatch.setattr(mipi.Agent, "say", watched)
    term, told = mipi.find_term(s.args, s.agent, s.rollout)
    real, *imagined, alone = seen
    assert torch.equal(real[1].unseen, s.features.unseen)
    A, S = s.features.unseen.shape[1:]
    enemies = slice(A, None)
    assert alone[0] is s.agent.marginal
    assert alone[1].unseen.shape[-1] == (S if own == "self+enemies" else A)
    assert alone[1].unseen[..., :A].sum() == len(s.features.empty) * A * (A - 1)  # all but oneself
    assert torch.equal(alone[1].unseen[..., A:], s.features.unseen[..., A : len(alone[1].empty[0])])
    assert len(imagined) == (marginal == "imagined")
    log_pi = say(s.agent, s.agent.actor, s.features)
    nats = mipi.divergence(log_pi, term.log_marginal)[mipi.choosing(s.features)].mean()
    assert torch.isclose(told["marginal_kl"], nats)
    if marginal == "real":
        assert torch.equal(told["mi"], told["marginal_kl"])
        return
    assert imagined[0][0] is s.agent.actor and not torch.equal(told["mi"], told["marginal_kl"])
    more = imagined[0][1].unseen & ~s.features.unseen
    assert more.any() and (imagined[0][1].unseen | ~s.features.unseen).all()
    assert more[..., enemies].any() == (own == "self")  # enemies that belong to s+ are always there
    battle = s.features.played.nonzero()[:, 1]
    together = ~imagined[0][1].unseen  # (K, A, S): same group, and in sight
    constant = True
    for b in range(s.args.num_envs):
        # Of pairs in sight throughout some steps, is it always the same ones that are apart?
        at = battle == b
        always = (~s.features.unseen[at]).float()
        share = (together[at] * always).sum(0) / always.sum(0).clamp(min=1)
        constant &= bool(((share == 0) | (share == 1)).all())
    assert constant == (mode == "rounds")


# --- Who learns from what -------------------------------------------------------------------------


@EACH_MODE
def test_each_loss_moves_its_own_network(mode):
    """The policy's loss gives the marginal no gradient, (17) gives the policy none; rounds move
    all three."""
    s = setting(f"{MODES[mode]} --alpha .5")
    term, _ = mipi.find_term(s.args, s.agent, s.rollout)
    batch = mipi.prepare(s.args, s.agent, s.rollout, term)
    nets = {"actor": s.agent.actor, "critic": s.agent.critic, "marginal": s.agent.marginal}
    for net in nets.values():
        net.zero_grad()
    mipi.policy_loss(s.args, s.agent, batch, 0.1)[0].backward()
    assert all((p.grad != 0).any() for p in s.agent.actor.parameters())
    for name in ("critic", "marginal"):
        assert all(p.grad is None for p in nets[name].parameters())
    assert not term.log_marginal.requires_grad and not term.nats.requires_grad
    s.agent.actor.zero_grad()
    weights = {name: [p.clone() for p in net.parameters()] for name, net in nets.items()}
    mipi.find_term(s.args, s.agent, s.rollout)
    assert all(p.grad is None for p in s.agent.actor.parameters())
    for name, net in nets.items():
        same = all(torch.equal(a, b) for a, b in zip(weights[name], net.parameters()))
        assert same == (name != "marginal")
    weights = {name: [p.clone() for p in net.parameters()] for name, net in nets.items()}
    mipi.update(s.args, s.agent, batch, s.rng, 1.0)
    for name, net in nets.items():
        same = all(torch.equal(a, b) for a, b in zip(weights[name], net.parameters()))
        assert same == (name == "marginal"), "in the policy's epochs it stands still"


def test_the_marginal_learns_its_teacher():
    """Cross-entropy falls with epochs, to less than at the beginning and more than the teacher's
    entropy."""
    s = setting(f"{MODES['windows']} --marginal real --marginal-epochs 1")
    losses, information = [], []
    for _ in range(12):
        _, told = mipi.find_term(s.args, s.agent, s.rollout)
        losses.append(float(told["marginal_loss"]))
        information.append(float(told["mi"]))
    assert losses[-1] < losses[0] and 0 < information[-1] < information[0]


def test_the_dead_pay_nothing():
    s = setting("--alpha .4")
    term, _ = mipi.find_term(s.args, s.agent, s.rollout)
    batch = mipi.prepare(s.args, s.agent, s.rollout, term)
    dead = ~mipi.choosing(batch.features)
    assert dead.any()
    other = torch.where(dead[..., None], -3.0, batch.log_marginal)
    loss, _ = mipi.policy_loss(s.args, s.agent, batch, 0.1)
    again, _ = mipi.policy_loss(s.args, s.agent, batch._replace(log_marginal=other), 0.1)
    assert torch.equal(loss, again)
    other = torch.where(dead[..., None], batch.log_marginal, -3.0)
    again, _ = mipi.policy_loss(s.args, s.agent, batch._replace(log_marginal=other), 0.1)
    assert not torch.equal(loss, again)


# --- The control ----------------------------------------------------------------------------------


@EACH_MODE
def test_dropped_teammates_are_out_of_sight_in_training(mode):
    """As often as --drop-teammates says; nobody else is hidden; who acted is who learns, and
    nothing is charged; evaluations see all."""
    s = setting(f"{MODES[mode]} --alpha 0 --drop-teammates .4 --num-envs 60")
    others = ~torch.eye(SIDE, dtype=torch.bool)
    assert s.player.dropped.shape == (60, SIDE, SIDE) and not s.player.dropped[:, ~others].any()
    assert abs(float(s.player.dropped[:, others].float().mean()) - 0.4) < 0.05
    plain, looked = s.battles.obs, s.player.look(s.battles.obs)
    expected = plain.obs_mask.clone()
    for b, i, j in s.player.dropped.nonzero().tolist():
        expected[b, i, j] = True
    assert torch.equal(looked.obs_mask, expected) and not torch.equal(expected, plain.obs_mask)
    for x, y in zip(looked._replace(obs_mask=0), plain._replace(obs_mask=0)):
        assert x is y
    term, _ = mipi.find_term(s.args, s.agent, s.rollout)
    batch = mipi.prepare(s.args, s.agent, s.rollout, term)
    _, scalars = mipi.policy_loss(s.args, s.agent, batch, 0.0)
    assert abs(float(scalars["kl"].detach())) < 1e-5
    assert (term.nats == 0).all() and (batch.price == 0).all()
    watching = mipi.Player(s.agent, s.rng)
    watching.begin(s.battles)
    assert watching.look(s.battles.obs) is s.battles.obs


def test_rollouts_have_what_was_looked_at(monkeypatch):
    """With dropped teammates out of sight, in windows, whose battles stay in their order."""
    seen, look = [], mipi.Player.look

    def watched(player, obs):
        found = look(player, obs)
        seen.append(found.obs_mask.clone())
        return found

    monkeypatch.setattr(mipi.Player, "look", watched)
    s = setting(f"{MODES['windows']} --alpha 0 --drop-teammates .4")
    T, B = s.features.played.shape
    assert len(seen) == 2 * T  # to act, to store
    A = s.features.unseen.shape[1]
    slots = [*range(A), *range(SIDE, SIDE + A)]
    unseen = s.features.unseen.view(T, B, A, -1)
    for t in range(T):
        assert torch.equal(seen[2 * t], seen[2 * t + 1])
        assert torch.equal(unseen[t], seen[2 * t][:, :A][:, :, slots])


def test_dropping_draws_from_a_generator_of_its_own():
    """Actions are drawn as MAPPO's are; new episodes of windows draw anew, running ones keep who is
    dropped."""
    s = setting(f"{MODES['windows']} --alpha 0 --drop-teammates .5")
    plain = setting(f"{MODES['windows']} --alpha 0")
    assert torch.equal(s.rng.get_state(), plain.rng.get_state())
    assert not torch.equal(s.agent.rng.get_state(), plain.agent.rng.get_state())
    for _ in range(50):
        before = s.player.dropped.clone()
        s.player.begin(s.battles)
        begins = s.battles.time.cpu() == 0
        assert torch.equal(before[~begins], s.player.dropped[~begins])
        if begins.any():
            assert not torch.equal(before[begins], s.player.dropped[begins])
            return
        s.player.last_actions, _ = s.player.act(s.battles)
        s.battles.step(s.player.last_actions)
    raise AssertionError("no episode began")


# --- Same seed, same bits -------------------------------------------------------------------------


def run(run_dir, steps, *flags):
    """A whole run; its last checkpoint."""
    assert mipi.main(of_parent.tiny(run_dir, steps, *flags)) == 0
    return exact(run_dir)


def test_rows_of_the_greedy_policy_and_of_draws(monkeypatch):
    """The run's actor, in battles of a seed of their size's own, not the run's."""
    met = watch_evaluations(mipi, monkeypatch)
    run("run", 64, "--final-episodes", 2)
    own = [policy for policy, *_ in met if isinstance(policy, mipi.Player)]
    assert len(own) % 2 == 0
    check_seeds_of_evaluations(met)
    assert [policy.rng is None for policy in own] == [True, False] * (len(own) // 2)
    for policy in own:
        actor = dict(policy.agent.actor.state_dict())
        assert differences(actor, exact("run")["agent"]["actor"]) == []


def test_same_seed_same_bits():
    """Another seed changes every network, the generators, and what is logged."""
    flags = ("--log-every", 32, "--value-norm")
    a, b, c = (run(d, 64, *flags, "--seed", seed) for d, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert differences(a, b) == []
    assert metrics("a") == metrics("b") != metrics("c")
    found = differences(a, c)
    names = {name.split("/")[2] for name in found if name.startswith("/agent")}
    assert names == set(a["agent"])
    assert {"/ranks/0/rng", "/ranks/0/method_rng"} <= set(found)


WHOLE = {
    "rounds": "",
    "windows within battles": f"{of_parent.WHOLE['windows within battles']} --own self+enemies",
    "dropped": f"{of_parent.WHOLE['windows within battles']} --alpha 0 --drop-teammates .5",
    "entropy, bf16, mmm": of_parent.WHOLE["lambda, bf16, mmm"] + " --regularizer entropy",
    "real, mmm": "--scenario mmm --marginal real --target-head pointer --own self+enemies",
}


@pytest.mark.parametrize("mode", some_long(WHOLE, "rounds", "windows", "entropy", "real"))
def test_half_and_resumed_is_whole(mode):
    """Stopped twice, between lines of the log, which are the same, too."""
    flags = [*WHOLE[mode].split(), "--log-every", "48"]
    whole = run("whole", 128, *flags)
    run("cut", 10, *flags)
    assert mipi.main(resuming("cut", 70)) == 0
    assert mipi.main(resuming("cut", 128)) == 0
    assert differences(whole, exact("cut")) == []
    logged = metrics("whole")
    assert logged == metrics("cut") and len(logged) >= 2
    learns = "--alpha 0" not in WHOLE[mode] and "entropy" not in WHOLE[mode]
    first = initial("whole")["agent"]["marginal"]
    assert bool(differences(first, whole["agent"]["marginal"])) == learns


def test_what_is_logged():
    """Divergences in nats with a term, none without, mutual information with a marginal."""
    names = {"marginal_kl", "reward", "regularised_reward", "penalty"}
    own = {"mi", "marginal_loss"}
    for flags, expected in (
        ("", names | own),
        ("--regularizer entropy", names),
        ("--penalise return", names - {"penalty"} | own),
        ("--alpha 0", set()),
    ):
        run_dir = f"run{len(flags)}"
        run(run_dir, 32, "--log-every", 16, *flags.split())
        (line, *_) = metrics(run_dir)
        assert set(line) & (names | own) == expected
        assert {"return", "win", "entropy", "kl"} <= set(line)


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # with words that the sentence has to contain
    "--alpha 0 --regularizer entropy": "--regularizer --alpha",
    "--alpha 0 --penalise loss": "--penalise --alpha",
    "--alpha 0 --own self+enemies --marginal real": "--marginal --own --alpha",
    "--regularizer entropy --marginal real": "--marginal --regularizer mi",
    "--regularizer entropy --own self+enemies": "--own --regularizer mi",
    "--preset cpu --regularizer entropy --marginal-epochs 1": "--marginal-epochs --regularizer mi",
    "--drop-teammates .5": "--drop-teammates --alpha 0",
    "--alpha .1 --drop-teammates .5": "--drop-teammates --alpha 0",
    "--max-episode-steps 1001": "--max-episode-steps 1000",
    "--alpha -1": "--alpha",
    "--drop-teammates 2 --alpha 0": "--drop-teammates",
    "--preset cpu --recurrent": "--rollout windows --no-recurrent, --rollout rounds",
}


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_what_would_do_something_else_than_it_says(line, words):
    with pytest.raises(UsageError) as error:
        read(mipi, line)
    assert [word for word in words.split() if word not in str(error.value)] == []


ALPHAS = {  # MIPI's: the paper's of each world, a tenth where rewards are one
    "": 0.03,
    "--scenario csz": 0.03,
    "--scenario mmm": 0.1,
    "--scenario resource": 0.05,
    "--scenario resource --preset cpu": 0.005,
    "--scenario mmm --alpha .03": 0.03,
}


@pytest.mark.parametrize(("flags", "alpha"), ALPHAS.items())
def test_alpha_of_each_world(flags, alpha):
    """Of what is charged, of a nat's price, in args.json; the default's results are those of the
    number itself."""
    assert mipi.alpha_of(read(mipi, flags)) == alpha
    s = setting(flags)
    assert s.agent.alpha == alpha
    term, told = mipi.find_term(s.args, s.agent, s.rollout)
    batch = mipi.prepare(s.args, s.agent, s.rollout, term)
    assert float(told["regularised_reward"]) == pytest.approx(
        float(told["reward"]) - alpha * float(term.nats.mean()), rel=1e-4
    )
    if not s.args.normalise_advantages:
        assert torch.allclose(batch.price, torch.tensor(alpha))
    assert float(mipi.policy_loss(s.args, s.agent, batch, 0.0)[1]["penalty"].detach()) > 0


def test_the_default_alpha_is_that_number():
    """Also of a run whose args.json names it; what it is stands there."""
    runs = {x: run(f"run{len(x)}", 32, *x.split()) for x in ("", "--alpha .03")}
    assert differences(*(state["agent"] for state in runs.values())) == []
    saved = [json.loads(Path(f"run{len(x)}/args.json").read_text()) for x in runs]
    assert [x["alpha"] for x in saved] == [None, 0.03]
    assert [x["resolved"]["alpha"] for x in saved] == [0.03, 0.03]


def test_presets():
    """The parent's; a term of any kind goes with either."""
    assert mipi.PRESETS == mappo.PRESETS and read(mipi, "") == mipi.Args()
    cpu = read(mipi, "--preset cpu")
    assert cpu == dataclasses.replace(mipi.Args(), preset="cpu", **mipi.PRESETS["cpu"])
    read(mipi, "--preset cpu --regularizer entropy --penalise loss")
    read(mipi, "--preset cpu --marginal real --own self+enemies")
    read(mipi, "--preset cpu --alpha 0 --drop-teammates .5")


# --- Flags ----------------------------------------------------------------------------------------


def marginal_option(name):
    return lambda s, d: s["agent"]["marginal_optimiser"]["param_groups"][0][name]


def marginal_steps(state, run_dir):
    return float(state["agent"]["marginal_optimiser"]["state"].get(0, {}).get("step", 0))


EFFECTS = {  # flags; what to measure; without and with them, or None: the two must differ
    "alpha": ("--alpha 3", changed("actor"), None),
    "regularizer": ("--regularizer entropy", marginal_steps, (8.0, 0.0)),
    "penalise": ("--alpha 3 --penalise loss", changed("critic"), None),
    "marginal": ("--marginal real", changed("marginal"), None),
    "own": ("--own self+enemies", changed("marginal"), None),
    "marginal_epochs": ("--marginal-epochs 5", marginal_steps, (8.0, 20.0)),
    "marginal_learning_rate": ("--marginal-learning-rate .01", marginal_option("lr"), (1e-3, 0.01)),
    "drop_teammates": ("--alpha 0 --drop-teammates .9", changed("actor"), None),
}


def test_every_flag_is_tested():
    """Those of the term here; the parent's by the same measures, below."""
    own = {x.name for x in dataclasses.fields(mipi.Args)}
    parent = {x.name for x in dataclasses.fields(mappo.Args)}
    assert own - parent == set(EFFECTS) and parent < own


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(run_dir, 64, "--final-episodes", 1), run_dir


@pytest.mark.parametrize("field", EFFECTS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    check_effect(EFFECTS[field], plain, tmp_path / "run", run)


@pytest.mark.long
@pytest.mark.parametrize("field", of_parent.EFFECTS)
def test_flag_of_the_parent_changes_what_it_names(field, plain, tmp_path):
    check_effect(of_parent.EFFECTS[field], plain, tmp_path / "run", run)


def test_the_loss_alone_and_the_return_alone():
    """Each is other than both; the first critic's targets tell whether the return is charged."""
    states = {x: run(x, 32, "--alpha", 3, "--penalise", x) for x in ("both", "loss", "return")}
    for a, b in (("both", "loss"), ("both", "return"), ("loss", "return")):
        assert differences(states[a]["agent"]["actor"], states[b]["agent"]["actor"]), (a, b)
    free = run("free", 16, "--alpha", 0)["agent"]["critic"]
    first = {x: run(f"{x}1", 16, "--alpha", 3, "--penalise", x) for x in states}
    assert differences(first["loss"]["agent"]["critic"], free) == []
    assert differences(first["return"]["agent"]["critic"], free)
    assert not differences(first["return"]["agent"]["critic"], first["both"]["agent"]["critic"])


# --- Evaluation -----------------------------------------------------------------------------------


def test_a_loaded_player_plays_as_the_run_does():
    """From a directory or a checkpoint, in battles of another size; the table has the parent's
    rows."""
    state = run("run", 64, "--final-episodes", 2)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    players = ("", " sampled", " random", " nearest", " focus", " retreat")
    assert list(results) == [f"{size}{player}" for size in (3, 4, 5) for player in players]
    agent = mipi.Agent(harness.saved_args("run", mipi.Args), worlds.family_of("sz"), CPU)
    harness.restore(agent, state["agent"], "run")
    earned = []
    players = [mipi.load_player(path) for path in ("run", "run/checkpoint-64.pt")]
    for policy in (mipi.Player(agent), *players):
        battles = Combat("sz", (5,), 8, seed=9, once=True)
        earned.append([episode.reward for episode in play(battles, policy)])
    assert earned[0] == earned[1] == earned[2]


# --- Learning -------------------------------------------------------------------------------------

QUICK = "--preset cpu --num-envs 64 --hidden-size 32 --team-sizes 3 --eval-team-sizes"
QUICK += " --max-episode-steps 60 --eval-every 0 --final-episodes 400 --gamma .95 --minibatches 4"
QUICK += " --total-timesteps 60000 --run-dir run --seed"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mipi_on_mappo_learns(seed, monkeypatch):
    """Three against three weak ones, 60,000 steps in the preset's windows, some 22 CPU seconds:
    greedy agents (.85, .87, .98 at seeds 1, 2, 3) win more than those that only stand and shoot
    (.67), and than random ones; agents that draw their actions (.99, 1.0, 1.0) win nearly always.
    The term is there: policies differ from their marginals, and are charged for it."""
    monkeypatch.setattr(combat, "Combat", WeakEnemies)
    battles = WeakEnemies("sz", (3,), 400, seed=5, once=True, episode_limit=60)
    bar = summarise(play(battles, stand_and_shoot))["win"]
    assert mipi.main([*QUICK.split(), str(seed)]) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["3 random"]["win"] < 0.4 < 0.6 < bar < 0.75
    assert results["3"]["win_low"] > bar and results["3 sampled"]["win"] > 0.9
    last = [line for line in metrics("run") if "marginal_kl" in line][-1]
    assert last["marginal_kl"] > 0.01 and last["regularised_reward"] < last["reward"]
