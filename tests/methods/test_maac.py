"""maac_particle.py: its networks, losses and steps against a plain form written from the equations
with loops over agents and heads and torch's own layers; and as a whole: flags, resuming, playing.

Weights are read off the modules. Networks run in double."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import harness

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from particle_tools import (
    MAAC,
    MADDPG,
    collectors,
    differences,
    index,
    initial,
    metrics,
    nets,
    newest,
    parse,
    replays,
    resuming,
    run,
    script,
    sharpen,
    tiny,
    weights,
)
from runs import some_long
from torch import nn

from envs.particle.episodes import play

pytestmark = pytest.mark.numeric

maac = script(MAAC)
NETS = ("actor", "critic", "target_actor", "target_critic")
SMALL = "--hidden-size 8 --heads 2 --buffer-size 64 --batch-size 16 --num-envs 4 --device cpu"
GAMES = {  # task, population, one parameter set per type
    "one set": ("resource", "4", True),
    "per type": ("pacman", "2,3", True),
    "per agent": ("resource", "3", False),
    "per agent of two types": ("pacman", "2,2", False),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, one thread, signal handlers as they were; and no list of the
    installed packages, which takes longer than a tiny run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "distributions", lambda: [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- Settings -------------------------------------------------------------------------------------


def setting(name: str = "per agent", flags: str = "") -> SimpleNamespace:
    """An agent of one of GAMES, weights far from what they begin with, targets away from them."""
    task, population, share = GAMES[name]
    own = ["--task", task, "--population", population, *(["--share-parameters"] if share else [])]
    args = parse(maac, [*own, *SMALL.split(), *flags.split()])
    collector = maac.Collector(args, population, torch.device("cpu"))
    agent = maac.Agent(args, collector.game, torch.device("cpu"))
    for seed, net in enumerate(NETS):
        sharpen(getattr(agent, net), 1.0, seed)
        getattr(agent, net).double()
    agent.actor.train()  # as in updates
    return SimpleNamespace(args=args, agent=agent, collector=collector, game=collector.game)


def random_batch(s: SimpleNamespace, M: int = 12, seed: int = 0, dead: float = 0.0):
    """Any features and actions; with dead > 0 any who live, in the first row only agent 0."""
    rng, N = np.random.default_rng(seed), s.game.num_agents
    O = s.agent.actor.norm.mean.shape[1]
    counts = s.game.population if s.args.share_parameters else (1,) * N
    views = []
    for _ in range(2):
        alive = rng.random((M, N)) >= dead
        if dead:
            alive[0] = np.arange(N) == 0
        obs = torch.tensor(rng.normal(loc=0.5, scale=2, size=(M, N, O)))
        views.append(maac.View(obs, torch.tensor(alive), counts))
    return maac.Batch(
        view=views[0],
        next_view=views[1],
        actions=torch.tensor(rng.integers(5, size=(M, N))),
        rewards=torch.tensor(rng.normal(size=(M, N))),
        terminated=torch.tensor(rng.random(M) < 0.3),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def actions_of(log_probs: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Drawn by Gumbel noise, which makes the script's draws comparable."""
    noise = torch.empty(log_probs.shape).exponential_(generator=rng)
    return (log_probs - noise.log()).argmax(-1)


# --- The truth ------------------------------------------------------------------------------------


def set_of(view) -> list[int]:
    """The parameter set of each agent."""
    return [s for s, n in enumerate(view.counts) for _ in range(n)]


def normed(x: torch.Tensor, view) -> torch.Tensor:
    """Inputs (M, N, I), for each parameter set by torch's batch norm of the rows of who lives; the
    dead get what a living agent with that input would."""
    out = torch.zeros_like(x)
    for _, members in itertools.groupby(range(x.shape[1]), lambda i: set_of(view)[i]):
        members = list(members)
        rows = torch.cat([x[:, i][view.alive[:, i]] for i in members])
        if not len(rows):
            continue
        layer = nn.BatchNorm1d(x.shape[2], affine=False, momentum=1.0).double()
        layer.train()
        layer(rows)
        biased = layer.running_var * (len(rows) - 1) / len(rows)
        for i in members:
            out[:, i] = (x[:, i] - layer.running_mean) / (biased + 1e-5).sqrt()
    return out


def linear(layer, x: torch.Tensor, s: int) -> torch.Tensor:
    return F.linear(x, layer.weight[s].T, layer.bias[s])


def policy(actor, view) -> torch.Tensor:
    """Logits (M, N, A)."""
    x, logits = normed(view.obs, view), []
    for i, s in enumerate(set_of(view)):
        h = F.leaky_relu(linear(actor.first, x[:, i], s), 0.01)
        h = F.leaky_relu(linear(actor.second, h, s), 0.01)
        logits.append(linear(actor.out, h, s))
    return torch.stack(logits, 1)


def values(critic, view, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q_i(o, (., a_-i)) (M, N, A), and the mean squares of logits of each agent, summed over heads,
    (N,)."""
    M, N = view.alive.shape
    sets, heads = set_of(view), critic.heads
    D = critic.query.weight.shape[0] // heads
    state = normed(view.obs, view)
    pair = normed(torch.cat((view.obs, torch.eye(5).double()[actions]), -1), view)
    s = [F.leaky_relu(linear(critic.state_encoder, state[:, i], sets[i])) for i in range(N)]
    x = [F.leaky_relu(linear(critic.action_encoder, pair[:, i], sets[i])) for i in range(N)]
    q, penalties = [], []
    for i in range(N):
        rows, penalty = [], 0.0
        for h in range(heads):
            part = slice(h * D, h * D + D)
            W_q, W_k, W_v = (net.weight[part] for net in (critic.query, critic.key, critic.value))
            squares, pairs, own = 0.0, 0, []
            for m in range(M):
                seen = [j for j in range(N) if view.alive[m, j] and j != i]
                logits = [(W_q @ s[i][m]) @ (W_k @ x[j][m]) for j in seen]
                v = [F.leaky_relu(W_v @ x[j][m] + critic.value.bias[part]) for j in seen]
                e = torch.zeros(D).double()
                if seen:
                    w = torch.stack(logits).div(D**0.5).softmax(0)
                    e = sum(w[k] * v[k] for k in range(len(seen)))
                own.append(e)
                if view.alive[m, i]:
                    squares = squares + sum(logit**2 for logit in logits)
                    pairs += len(seen)
            rows.append(torch.stack(own))
            penalty = penalty + squares / max(pairs, 1)
        hidden = F.leaky_relu(linear(critic.first, torch.cat((s[i], *rows), -1), sets[i]))
        q.append(linear(critic.out, hidden, sets[i]))
        penalties.append(torch.as_tensor(penalty))
    return torch.stack(q, 1), torch.stack(penalties)


def at(x: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, actions[..., None])[..., 0]


def average(x: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """(M,) over the rows in which an agent lives; 0 if there are none."""
    return x[alive].mean() if alive.any() else x.sum() * 0


def target(s: SimpleNamespace, batch, rng: torch.Generator) -> torch.Tensor:
    """y of Eq. (7), or with entropies as in the authors' code."""
    with torch.no_grad():
        log_probs = policy(s.agent.target_actor, batch.next_view).log_softmax(-1)
        actions = actions_of(log_probs, rng)
        q, _ = values(s.agent.target_critic, batch.next_view, actions)
    y = torch.zeros_like(batch.rewards)
    for m, i in np.ndindex(*y.shape):
        done = bool(batch.terminated[m]) or not batch.next_view.alive[m, i]
        a = actions[m, i]
        entropy = -s.args.entropy_coef * log_probs[m, i, a]
        y[m, i] = batch.rewards[m, i]
        if s.args.discount_entropy:
            y[m, i] += 0.0 if done else s.args.gamma * (q[m, i, a] + entropy)
        else:
            y[m, i] += entropy + (0.0 if done else s.args.gamma * q[m, i, a])
    return y


def critic_loss(s: SimpleNamespace, batch, rng: torch.Generator) -> torch.Tensor:
    y = target(s, batch, rng)
    q, penalties = values(s.agent.critic, batch.view, batch.actions)
    loss, alive = s.args.logit_penalty * penalties.sum(), batch.view.alive
    for i in range(alive.shape[1]):
        loss = loss + average((at(q, batch.actions) - y)[:, i] ** 2, alive[:, i])
    return loss


def actor_losses(s: SimpleNamespace, batch, rng: torch.Generator) -> torch.Tensor:
    """(N,): Eqs. (8) and (9) as written, with the sampled action's log pi."""
    view, losses = batch.view, []
    logits = policy(s.agent.actor, view)
    log_probs = logits.log_softmax(-1)
    actions = actions_of(log_probs.detach(), rng)
    q, _ = values(s.agent.critic, view, actions)
    baseline = (log_probs.exp() * q).sum(-1)
    log_pi = at(log_probs, actions)
    weight = s.args.entropy_coef * log_pi - (at(q, actions) - baseline)
    for i in range(view.alive.shape[1]):
        loss = average(log_pi[:, i] * weight[:, i].detach(), view.alive[:, i])
        size = average((logits[:, i] ** 2).mean(-1), view.alive[:, i])
        losses.append(loss + s.args.logit_penalty * size)
    return torch.stack(losses)


def gradients(loss: torch.Tensor, net: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*net.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def close(a: torch.Tensor, b: torch.Tensor, error: float = 1e-9) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= error * max(1.0, b.abs().max()))


# --- Networks and losses --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("dead", [0.0, 0.4])
def test_networks_are_those_of_the_equations(name, dead):
    s = setting(name)
    batch = random_batch(s, dead=dead)
    view, alive = batch.view, batch.view.alive
    assert close(s.agent.actor(view)[alive], policy(s.agent.actor, view)[alive])
    q, logits = s.agent.critic(view, batch.actions)
    expected, penalties = values(s.agent.critic, view, batch.actions)
    assert close(q[alive], expected[alive]) and q.std() > 0.1
    assert close(maac.attention_penalty(logits, view), penalties) and (penalties > 0.01).all()


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("flags", ["", "--no-discount-entropy --entropy-coef .7"])
@pytest.mark.parametrize("dead", [0.0, 0.4])
def test_losses_and_gradients_are_those_of_the_equations(name, flags, dead):
    """With penalties that show."""
    s = setting(name, f"--logit-penalty .3 {flags}")
    batch = random_batch(s, M=6, dead=dead)
    ours = maac.critic_loss(s.args, s.agent, batch, seeded(1))
    theirs = critic_loss(s, batch, seeded(1))
    assert close(ours, theirs)
    mine, reference = (gradients(loss, s.agent.critic) for loss in (ours, theirs))
    assert all(close(mine[k], reference[k]) and (mine[k] != 0).any() for k in reference)
    ours, _ = maac.actor_loss(s.args, s.agent, batch, seeded(2))
    theirs = actor_losses(s, batch, seeded(2))
    assert close(ours, theirs)
    mine, reference = (gradients(loss.sum(), s.agent.actor) for loss in (ours, theirs))
    assert all(close(mine[k], reference[k]) and (mine[k] != 0).any() for k in reference)


@pytest.mark.parametrize("name", GAMES)
def test_updates_are_those_of_the_equations(name):
    """Two whole updates by torch's Adam of each agent: weight decay, scaled gradients, bounds of
    norms, targets."""
    flags = "--polyak .1 --critic-grad-norm .4 --actor-grad-norm .05 --weight-decay .1"
    s = setting(name, flags + " --logit-penalty .01")
    other = SimpleNamespace(args=s.args, agent=copy.deepcopy(s.agent))
    N, agent = s.game.num_agents, other.agent
    sets = range(agent.sets)
    critic = torch.optim.Adam(agent.critic.parameters(), lr=1e-3, weight_decay=0.1)
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in agent.actor.parameters()]
    before = weights(s.agent.critic), weights(s.agent.actor)
    for k in range(2):
        batch = random_batch(s, M=6, seed=k)
        rng = seeded(k)
        found = maac.update_critic(s.args, s.agent, batch, rng)
        found |= maac.update_actors(s.args, s.agent, batch, rng)
        s.agent.follow()
        rng = seeded(k)
        slopes = gradients(critic_loss(other, batch, rng), agent.critic)
        for key, p in agent.critic.named_parameters():
            shared = key.split(".")[0] in ("action_encoder", "query", "key", "value")
            p.grad = slopes[key] / N if shared else slopes[key]
        norm = torch.cat([p.grad.flatten() for p in agent.critic.parameters()]).norm()
        assert close(found["critic_grad_norm"], norm) and norm > 0.4 * N, "the bound binds"
        for p in agent.critic.parameters():
            p.grad *= 0.4 * N / (norm + 1e-6)
        critic.step()
        losses = actor_losses(other, batch, rng)
        owner = torch.tensor(set_of(batch.view))
        slopes = gradients(sum(losses[owner == x].mean() for x in sets), agent.actor)
        norms = [torch.cat([g[x].flatten() for g in slopes.values()]).norm() for x in sets]
        assert close(found["actor_grad_norm"], torch.stack(norms).mean()) and min(norms) > 0.05
        for p, (m, v), g in zip(agent.actor.parameters(), moments, slopes.values()):
            g = torch.stack([g[x] * 0.05 / (norms[x] + 1e-6) for x in sets])
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            step = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
            p.data -= 1e-3 * step
        for net, slow in (("actor", "target_actor"), ("critic", "target_critic")):
            for p, q in zip(getattr(agent, net).parameters(), getattr(agent, slow).parameters()):
                q.data = 0.9 * q.data + 0.1 * p.data
    for net in NETS:
        assert close(weights(getattr(s.agent, net)), weights(getattr(agent, net)), 1e-8), net
    for old, net in zip(before, (s.agent.critic, s.agent.actor)):
        assert (weights(net) - old).abs().max() > 1e-3


def test_the_gradient_is_that_of_the_soft_value():
    """Eq. (8) in the mean over own actions is the slope of E_a [Q - alpha log pi], the others'
    given: by enumeration; neither the baseline nor alpha's part is out of place."""
    rng = seeded(0)
    logits = torch.randn(3, 2, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    q = torch.randn(3, 2, 5, generator=rng, dtype=torch.float64)
    alpha, log_probs = 0.4, logits.log_softmax(-1)
    probs = log_probs.exp()
    value = (probs * (q - alpha * log_probs)).sum()
    (expected,) = torch.autograd.grad(value, logits, retain_graph=True)
    surrogate = 0.0
    for a in range(5):
        actions = torch.full((3, 2), a)
        weight = maac.advantage(q, probs, actions) - alpha * at(log_probs, actions)
        log_pi = maac.pick(log_probs, actions)
        surrogate = surrogate + (at(probs, actions) * weight).detach().mul(log_pi).sum()
    (found,) = torch.autograd.grad(surrogate, logits)
    assert close(found, expected) and expected.abs().max() > 0.1
    mean_advantage = sum(
        at(probs, torch.full((3, 2), a)) * maac.advantage(q, probs, torch.full((3, 2), a))
        for a in range(5)
    )
    assert mean_advantage.abs().max() < 1e-12


# --- Who learns from what -------------------------------------------------------------------------


def test_losses_move_what_they_name():
    s = setting()
    batch, agent = random_batch(s), s.agent

    def reached(net):
        return [n for n, p in getattr(agent, net).named_parameters() if p.grad is not None]

    losses, _ = maac.actor_loss(s.args, agent, batch, seeded(1))
    losses.sum().backward()
    assert len(reached("actor")) == 6
    assert reached("critic") == reached("target_actor") == reached("target_critic") == []
    agent.actor.zero_grad()
    maac.critic_loss(s.args, agent, batch, seeded(1)).backward()
    assert len(reached("critic")) == len(list(agent.critic.parameters())) == 12
    assert reached("actor") == reached("target_actor") == reached("target_critic") == []
    before = {net: weights(getattr(agent, net)) for net in NETS}
    maac.update_critic(s.args, agent, batch, seeded(1))
    moved = [net for net in NETS if not torch.equal(before[net], weights(getattr(agent, net)))]
    assert moved == ["critic"]
    before["critic"] = weights(agent.critic)
    maac.update_actors(s.args, agent, batch, seeded(1))
    moved = [net for net in NETS if not torch.equal(before[net], weights(getattr(agent, net)))]
    assert moved == ["actor"]


def test_own_actions_are_no_input():
    """Q_i is of all own actions; the others' matter."""
    s = setting()
    batch = random_batch(s)
    s.agent.critic.eval()  # batch statistics would change with the actions
    q, _ = s.agent.critic(batch.view, batch.actions)
    actions = batch.actions.clone()
    actions[:, 1] = (actions[:, 1] + 1) % 5
    other, _ = s.agent.critic(batch.view, actions)
    assert torch.equal(q[:, 1], other[:, 1])
    assert ((q[:, [0, 2]] - other[:, [0, 2]]).abs().amax((1, 2)) > 1e-3).all()


def test_each_policy_has_its_own_bound():
    """One of them with a large gradient takes nothing from the others."""
    s = setting()
    actor = s.agent.actor
    for p in actor.parameters():
        p.grad = torch.randn(p.shape, generator=seeded(1), dtype=p.dtype)
        p.grad[1] *= 100
        p.grad[2] *= 1e-4
    before = [p.grad.clone() for p in actor.parameters()]

    def size(x):
        return torch.cat([p.grad[x].flatten() for p in actor.parameters()]).norm()

    expected = torch.stack([size(x) for x in range(3)])
    norms = maac.clip_each_policy(actor, 0.5)
    assert close(norms, expected)
    assert size(0) == pytest.approx(0.5, abs=1e-6) and size(1) == pytest.approx(0.5, abs=1e-6)
    assert all(torch.equal(p.grad[2], g[2]) for p, g in zip(actor.parameters(), before))


def test_replay_gives_back_what_was_seen(monkeypatch):
    """o, o', a, r / deviation and ends of the transitions that the seed picks. At a horizon o' is
    the last of the episode, not the first of the next, and no end."""
    s = setting("per type", "--max-episode-steps 5 --num-updates 1")
    for net in NETS:
        getattr(s.agent, net).float()
    worlds, buffer, rows = s.collector.worlds, s.collector.buffer, []
    step = worlds.step

    def watched(actions):
        state = worlds.state.clone()
        found = step(actions)
        rows.append((state, actions.clone(), found))
        return found

    monkeypatch.setattr(worlds, "step", watched)
    for _ in range(12):  # 48 transitions in 64 places
        maac.collect(s.agent, s.collector, seeded(1))
    batch = buffer.sample(s.agent, seeded(2), 40)
    places = torch.randint(0, 48, (40,), generator=seeded(2)).tolist()
    truncated = 0
    for m, place in enumerate(places):
        (state, actions, found), b = rows[place // 4], place % 4
        for mine, seen in ((batch.view, state), (batch.next_view, found.final_state)):
            expected = s.agent.view(s.game, worlds.observe(seen))
            assert torch.equal(mine.obs[m], expected.obs[b])
            assert torch.equal(mine.alive[m], expected.alive[b])
        assert torch.equal(batch.actions[m], actions[b])
        assert torch.equal(batch.rewards[m], found.reward[b] / buffer.reward_scale.deviation())
        assert batch.terminated[m] == found.terminated[b]
        if found.truncated[b]:
            truncated += 1
            assert not batch.terminated[m]
            next_one = rows[place // 4 + 1][0] if place // 4 < 11 else worlds.state
            assert not torch.equal(found.final_state[b], next_one[b])
    assert truncated > 3


def test_targets_follow_after_each_update(monkeypatch):
    """--num-updates times, each time from where they are towards what the networks have become."""
    s = setting(flags="--num-updates 3 --polyak .2 --learning-rate .05")
    for net in NETS:
        getattr(s.agent, net).float()
    for _ in range(4):
        maac.collect(s.agent, s.collector, seeded(1))
    pairs = {"target_actor": "actor", "target_critic": "critic"}
    slow = {target: weights(getattr(s.agent, target)).clone() for target in pairs}
    update_actors, calls = maac.update_actors, []

    def watched(*given):
        found = update_actors(*given)
        for target, net in pairs.items():
            slow[target] = 0.8 * slow[target] + 0.2 * weights(getattr(s.agent, net))
        calls.append(given)
        return found

    monkeypatch.setattr(maac, "update_actors", watched)
    maac.update(s.args, s.agent, s.collector, seeded(2))
    assert len(calls) == 3
    for target, expected in slow.items():
        assert close(weights(getattr(s.agent, target)), expected, 1e-5), target


# --- Batch norm -----------------------------------------------------------------------------------


def test_batch_norm_is_torchs():
    """A set per agent: outputs, running statistics of three minibatches, acting."""
    ours = maac.BatchNorm(3, 4).double()
    theirs = [nn.BatchNorm1d(4, affine=False).double() for _ in range(3)]
    rng = seeded(0)
    for k in range(4):
        x = 3 * torch.randn(7, 3, 4, generator=rng, dtype=torch.float64) + k
        view = maac.View(x, torch.ones(7, 3, dtype=torch.bool), (1, 1, 1))
        if k == 3:
            ours.eval(), [layer.eval() for layer in theirs]
        expected = torch.stack([layer(x[:, i]) for i, layer in enumerate(theirs)], 1)
        assert close(ours(x, view), expected, 1e-12)
    assert close(ours.mean, torch.stack([layer.running_mean for layer in theirs]), 1e-12)
    assert close(ours.variance, torch.stack([layer.running_var for layer in theirs]), 1e-12)
    shared = maac.BatchNorm(1, 4).double()
    view = view._replace(counts=(3,))
    flat = nn.BatchNorm1d(4, affine=False).double()(x.flatten(0, 1)).unflatten(0, (7, 3))
    assert close(shared(x, view), flat, 1e-12), "of all rows of a type"


def test_statistics_of_batches_and_running_ones():
    """Who acts depends on nobody else's world; updates do, and each network keeps its own."""
    s = setting()
    batch = random_batch(s)
    few = maac.View(batch.view.obs[:3], batch.view.alive[:3], batch.view.counts)
    assert not close(s.agent.actor(batch.view)[:3], s.agent.actor(few), 1e-3)
    s.agent.actor.eval()
    assert close(s.agent.actor(batch.view)[:3], s.agent.actor(few))
    old = copy.deepcopy([getattr(s.agent, net).state_dict() for net in NETS])
    s.agent.actor.train()
    batch = random_batch(s, seed=1)
    maac.update_critic(s.args, s.agent, batch, seeded(1))
    maac.update_actors(s.args, s.agent, batch, seeded(1))
    s.agent.follow()
    for name, a, norms in zip(NETS, old, (1, 2, 1, 2)):
        b = getattr(s.agent, name).state_dict()
        moved = [k for k in a if "norm" in k and not torch.equal(a[k], b[k])]
        assert len(moved) == 2 * norms, name
    own, slow = s.agent.actor.norm, s.agent.target_actor.norm
    assert not close(own.mean, slow.mean, 1e-3), "o and o' have statistics of their own"


def test_the_agent_acts_by_running_statistics(monkeypatch):
    """Also right after an update, which uses those of its minibatch, and from a checkpoint."""
    calls = []

    def watch(name):
        function = getattr(maac, name)

        def watched(*args):
            agent = next(x for x in args if isinstance(x, maac.Agent))
            calls.append((name, agent.actor.training))
            return function(*args)

        monkeypatch.setattr(maac, name, watched)

    watch("collect")
    watch("update_actors")
    run(MAAC, "run", 80)
    assert set(calls) == {("collect", False), ("update_actors", True)}
    args, agent = maac.load_agent("run")
    assert not agent.actor.training and agent.critic.training
    assert agent.target_actor.training and agent.target_critic.training
    assert (agent.actor.norm.variance != 1).any() and (agent.actor.norm.mean != 0).any()


def test_the_actor_acts():
    """Actions drawn again from what was seen; the target's are other ones. In evaluations, too."""
    s = setting()
    agent, worlds, actions = s.agent, s.collector.worlds, []
    for net in NETS:
        getattr(agent, net).float().eval()

    def draw(obs, rng, actor=agent.actor):
        return maac.sample(actor(agent.view(s.game, obs)).log_softmax(-1), rng)

    step, other = worlds.step, 0
    worlds.step = lambda x: (actions.append(x.clone()), step(x))[1]
    rng, again, slow = (seeded(3) for _ in range(3))
    for _ in range(6):
        seen = worlds.obs
        maac.collect(agent, s.collector, rng)
        assert torch.equal(actions[-1], draw(seen, again))
        other += (actions[-1] != draw(seen, slow, agent.target_actor)).sum()
    assert other > 5
    worlds.step = step
    assert torch.equal(maac.net_player(agent, seed=5)(worlds), draw(worlds.obs, seeded(5)))


# --- The dead -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
def test_the_dead_are_nowhere(name):
    """Neither features nor actions nor rewards of the dead change losses, gradients, values of the
    living, or running statistics."""
    found = []
    for junk in (0.0, 50.0):
        s = setting(name)
        batch = random_batch(s, dead=0.4)
        gone, later = ~batch.view.alive, ~batch.next_view.alive
        batch.view.obs[gone] += junk
        batch.next_view.obs[later] -= junk
        batch.actions[gone] = (batch.actions[gone] + int(junk)) % 4
        batch.rewards[gone] += junk
        loss = maac.critic_loss(s.args, s.agent, batch, seeded(1))
        slopes = gradients(loss, s.agent.critic)
        losses, entropy = maac.actor_loss(s.args, s.agent, batch, seeded(1))
        slopes |= gradients(losses.sum(), s.agent.actor)
        q, _ = s.agent.critic(batch.view, batch.actions)
        state = s.agent.actor.norm.state_dict() | s.agent.critic.action_norm.state_dict()
        found.append([loss, losses, entropy, q[~gone], *slopes.values(), *state.values()])
        assert gone.any() and later.any()
    for a, b in zip(*found):
        assert close(a, b, 1e-10)


def test_targets_end_with_death_and_with_the_game():
    """y is r there; entropies of the code's form do not end."""
    s = setting("per agent of two types")
    batch = random_batch(s, dead=0.3)
    ended = ~batch.next_view.alive | batch.terminated[:, None]
    y = maac.td_target(s.args, s.agent, batch, seeded(1))
    assert torch.equal(y[ended], batch.rewards[ended])
    assert (y[~ended] != batch.rewards[~ended]).all() and ended.any() and not ended.all()
    args = dataclasses.replace(s.args, discount_entropy=False, entropy_coef=0.5)
    y = maac.td_target(args, s.agent, batch, seeded(1))
    assert (y[ended] > batch.rewards[ended]).all(), "- alpha log pi is positive"


def test_nobody_of_a_set_lives():
    """No numbers that are none; statistics stay."""
    s = setting("per agent of two types")
    batch = random_batch(s)
    batch.view.alive[:, 1] = False
    batch.next_view.alive[:] = False
    maac.update_critic(s.args, s.agent, batch, seeded(1))
    maac.update_actors(s.args, s.agent, batch, seeded(1))
    assert all(bool(torch.isfinite(weights(getattr(s.agent, net))).all()) for net in NETS)
    mean = s.agent.actor.norm.mean
    assert (mean[1] == 0).all() and (mean[[0, 2, 3]] != 0).all()


# --- What is observed -----------------------------------------------------------------------------


@pytest.mark.parametrize("task, population", [("pacman", "3,2"), ("rooms", "3,3"), ("treasure", 1)])
def test_observations_are_the_worlds(task, population):
    """Own features, then those of the others in their order, 0 of who is dead or not seen."""
    args = parse(maac, ["--task", task, "--population", population, *SMALL.split()])
    worlds = maac.make_envs(args, str(population), 40, 1)
    agent = maac.Agent(args, worlds.game, torch.device("cpu"))
    rng, N = seeded(1), worlds.game.num_agents
    worlds.reset()
    for _ in range(12):
        worlds.step(torch.randint(0, 5, (40, N), generator=rng))
    obs = worlds.obs
    view, entities, seen = agent.view(worlds.game, obs), obs.entities(), obs.mask()
    for b, i in itertools.product(range(40), range(N)):
        parts = [obs.own[b, i]]
        for j in range(N):
            if j != i:
                parts.append(entities[b, i, j] if seen[b, i, j] else 0 * entities[b, i, j])
        expected = torch.cat(parts) * obs.alive[b, i]
        assert torch.equal(view.obs[b, i], expected)
    assert task != "pacman" or not view.alive.all()
    logits = agent.actor(view)
    q, _ = agent.critic(view, torch.zeros(40, N, dtype=torch.long))
    assert torch.isfinite(logits).all() and torch.isfinite(q).all()


@pytest.mark.parametrize("name", ["one set", "per type"])
def test_agents_of_a_type_change_places(name):
    """With shared parameters everything goes with them, also where some are dead."""
    s = setting(name)
    batch = random_batch(s, dead=0.3)
    view, order = batch.view, [1, 0, 4, 2, 3] if name == "per type" else [2, 0, 3, 1]
    places = maac.View(view.obs[:, order], view.alive[:, order], view.counts)
    alive = places.alive
    ours, theirs = s.agent.actor(places), s.agent.actor(view)[:, order]
    assert close(ours[alive], theirs[alive])
    q, logits = s.agent.critic(places, batch.actions[:, order])
    expected, own = s.agent.critic(view, batch.actions)
    assert close(q[alive], expected[:, order][alive])
    penalty, before = maac.attention_penalty(logits, places), maac.attention_penalty(own, view)
    assert close(penalty, before[order]) and not close(q[alive], expected[alive], 1e-2)


# --- Runs -----------------------------------------------------------------------------------------


def test_same_seed_same_bits():
    """Another seed changes every weight matrix and what is logged."""
    looks = ("--log-every", 40, "--eval-every", 80)
    a, b, c = (run(MAAC, name, 80, *looks, "--seed", seed) for name, seed in zip("abc", (7, 7, 8)))
    assert differences(a, b) == [] and differences(replays("a"), replays("b")) == []
    assert metrics("a") == metrics("b") != metrics("c") and len(metrics("a")) == 3
    changed = set(differences(a, c))
    for net, part in nets(a).items():
        assert {f"/agent/{net}/{k}" for k in part if k.endswith("weight")} < changed
    assert "/ranks/0/rng" in changed


MODES = {
    "treasure": "",
    "pacman, shared": "--task pacman --population 2,1 --share-parameters --buffer-size 30",
    "rooms": "--task rooms --population 2,3 --num-updates 2",
    "signpost": "--task signpost --population 3 --no-scale-rewards",
}


@pytest.mark.parametrize("mode", some_long(MODES, "rooms", "signpost"))
def test_resumed_equals_uninterrupted(mode):
    """Stopped twice, between two updates and between two lines of the log."""
    flags = [*MODES[mode].split(), "--log-every", "80"]
    assert maac.main(tiny(MAAC, "whole", 240, *flags)) == 0
    assert maac.main(tiny(MAAC, "cut", 52, *flags)) == 0
    assert maac.main(resuming("cut", 164)) == 0
    assert maac.main(resuming("cut", 240)) == 0
    whole, cut = newest("whole"), newest("cut")
    assert cut["timesteps"] == 240 and differences(whole, cut) == []
    assert differences(replays("whole"), replays("cut")) == []
    assert metrics("whole") == metrics("cut") and len(metrics("cut")) == 3
    moved = {k.split("/")[1] for k in differences(nets(initial("whole")), nets(whole))}
    assert moved == set(NETS)


def test_looking_at_a_run_changes_nothing():
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generator."""
    looks = ("--log-every", 20, "--save-every", 20, "--eval-every", 60, "--final-episodes", 1)
    a, b = run(MAAC, "plain", 120), run(MAAC, "looks", 120, *looks)
    for state in (a, b):  # since the last line
        state["ranks"][0].pop("noted")
        collectors(state)[0].pop("ended")
    assert differences(a, b) == [] and differences(replays("plain"), replays("looks")) == []
    assert len(metrics("looks")) == 6 + 2 + 1


def test_what_is_logged():
    run(MAAC, "run", 160, "--task", "pacman", "--population", "2,1", "--log-every", 160)
    (m,) = metrics("run")
    names = {"timesteps", "critic_loss", "actor_loss", "entropy", "critic_grad_norm", "episodes"}
    names |= {"actor_grad_norm", "return", "return/2,1", "return/2,1/0", "return/2,1/1"}
    assert set(m) == names
    assert 0 < m["entropy"] <= np.log(5) + 1e-6 and m["critic_loss"] > 0


def test_a_run_as_a_player(capfd):
    """load_player() gives the policy; evaluation alone repeats the run's."""
    run(MAAC, "run", 80, "--final-episodes", 5)
    args, agent = maac.load_agent("run")
    worlds = maac.make_envs(args, "3", 5, 1)
    returns = []
    for seed in (1, 1, 2):
        worlds.seed(1)
        returns.append(play(worlds, maac.load_player("run", seed)))
    assert (returns[0] == returns[1]).all() and (returns[0] != returns[2]).any()
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert list(results) == ["3", "3 random", "3 nearest-first", "3 flee"]
    lines, files = Path("run/metrics.jsonl").read_text(), sorted(Path("run").iterdir())
    table = lambda: [x for x in capfd.readouterr().out.splitlines() if x.startswith("|")]  # noqa: E731
    before = table()
    assert maac.main(["--eval-only", "run", "--final-episodes", "5"]) == 0
    assert table() == before and len(before) == 6
    assert Path("run/metrics.jsonl").read_text() == lines
    assert sorted(Path("run").iterdir()) == files


def test_a_world_with_rewards_that_are_none(capfd, monkeypatch):
    """The update that comes next ends the run, and no checkpoint holds any of it."""
    step = maac.ParticleWorld.step

    def poisoned(self, actions):
        result = step(self, actions)
        result.reward[0, 0] = float("nan")
        return result

    monkeypatch.setattr(maac.ParticleWorld, "step", poisoned)
    assert maac.main(tiny(MAAC, "run", 1000)) == 1
    assert "rewards is not finite" in capfd.readouterr().err
    assert [entry["timesteps"] for entry in index("run")] == [0]


@pytest.mark.long
def test_maac_learns():
    """250 updates of a small network, agents alike. Random players earn 2.4; after 375 it has 23,
    more than who goes to the nearest treasure."""
    flags = "--preset cpu --population 3 --num-threads 1 --share-parameters --hidden-size 64"
    flags += " --polyak .02 --gamma .9 --learning-rate 3e-3 --eval-every 0 --save-every 0"
    argv = [*flags.split(), "--total-timesteps", "16000", "--final-episodes", "300"]
    assert maac.main([*argv, "--run-dir", "run"]) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["3 random"]["return"] < 3
    assert results["3"]["return_low"] > 5


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # command line: words that the one sentence has to contain
    "--batch-size 1025 --buffer-size 1024": "--batch-size --buffer-size",
    "--num-envs 65 --buffer-size 64 --batch-size 64": "--num-envs --buffer-size",
    "--batch-size 1": "--batch-size variance",
    "--hidden-size 30 --heads 4": "--hidden-size --heads",
    "--no-discount-entropy --entropy-coef 0": "--no-discount-entropy --entropy-coef",
    "--task pirates": "'pirates' treasure resource pacman",
    "--task pacman --population 6": "pacman 6",
    "--population 3,": "3,",
    "--heads 0": "--heads 0",
    "--polyak 1.5": "--polyak 1.5",
    "--resume run --gamma .5": "--gamma 0.99",
    "--resume run --heads 2": "--heads 4",
    "--resume other": "maddpg_particle maac_particle",
    "--eval-only other": "maddpg_particle maac_particle",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_line(line, capfd, monkeypatch):
    if "run" in line.split():
        run(MAAC, "run", 4)
    if "other" in line:
        run(MADDPG, "other", 4)
    capfd.readouterr()
    monkeypatch.setattr(maac, "collect", lambda *_: pytest.fail("the run has begun"))
    before = sorted(Path().rglob("*"))
    assert maac.main(shlex.split(line)) == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("error: ") and err.endswith(".") and "\n" not in err
    assert [word for word in WRONG[line].split() if word not in err] == []
    assert sorted(Path().rglob("*")) == before


def test_presets():
    plain, fast = parse(maac, []), parse(maac, ["--preset", "cpu"])
    assert plain == maac.Args() == parse(maac, ["--preset", "paper"])
    assert fast == dataclasses.replace(plain, preset="cpu", **maac.PRESETS["cpu"])
    theirs = parse(script(MADDPG), ["--preset", "cpu"])
    same = ("num_envs", "batch_size", "update_every", "learning_rate")
    assert all(getattr(fast, name) == getattr(theirs, name) for name in same)
    assert fast.num_updates == theirs.inner_steps
    assert parse(maac, ["--preset", "cpu", "--num-envs", 7]).num_envs == 7


# --- Flags ----------------------------------------------------------------------------------------
# Each entry: flags, what to measure on a run with and one without them, how the two relate.


def changed(*parts):
    def measure(state, run_dir):
        return [state["agent"][part] for part in parts]

    return measure


def unchanged(*parts):
    """Which networks are as they began."""

    def measure(state, run_dir):
        old = initial(run_dir)["agent"]
        pairs = [(weights_in(old[part]), weights_in(state["agent"][part])) for part in parts]
        return [not differences(a, b) for a, b in pairs]

    return measure


def weights_in(part):
    return {name: x for name, x in part.items() if "norm" not in name}


def steps_of(state, run_dir):
    return float(state["agent"]["critic_optimiser"]["state"][0]["step"])


def shape(part, name):
    return lambda state, run_dir: tuple(state["agent"][part][name].shape)


def game(state, run_dir):
    return collectors(state)[0]["worlds"]["game"]


def rewards(judge):
    return lambda state, run_dir: bool(judge(replays(run_dir)[0]["rewards"]))


def moments(part):
    def measure(state, run_dir):
        return sum(float(x["exp_avg_sq"].sum()) for x in state["agent"][part]["state"].values())

    return measure


def logged(column):
    def measure(state, run_dir):
        path = run_dir / "metrics.jsonl"
        return sum(column in m for m in metrics(run_dir)) if path.exists() else 0

    return measure


def evaluated(key):
    def measure(state, run_dir):
        path = run_dir / "metrics.jsonl"
        lines = metrics(run_dir) if path.exists() else []
        return next((m[key] for m in lines if key in m), 0)

    return measure


FLAGS = {
    "seed": ("--seed 7", changed("actor"), None),
    "total_timesteps": ("--total-timesteps 160", lambda s, d: s["timesteps"], (120, 160)),
    "capture_video": (
        "--capture-video --final-episodes 1",
        lambda s, d: [x.name for x in d.glob("videos/*")],
        ([], ["final-120-3.mp4"]),
    ),
    "task": ("--task resource", game, ("treasure 3", "resource 3")),
    "population": ("--population 5", game, ("treasure 3", "treasure 5")),
    "shaping": ("--no-shaping", rewards(lambda x: (x % 5 == 0).all()), (False, True)),
    "collision_penalty": (
        "--population 12 --collision-penalty 3",
        rewards(lambda x: (x < -2).any()),
        (False, True),
    ),
    "num_envs": ("--num-envs 8", lambda s, d: s["iteration"], (30, 15)),
    "max_episode_steps": (
        "--max-episode-steps 5",
        lambda s, d: float(collectors(s)[0]["ended"][0]),
        (4.0, 24.0),
    ),
    "share_parameters": ("--share-parameters", shape("actor", "out.bias"), ((3, 5), (1, 5))),
    "heads": ("--heads 2", changed("critic"), None),
    "entropy_coef": ("--entropy-coef 5", changed("actor", "critic"), None),
    "discount_entropy": ("--no-discount-entropy", changed("critic"), None),
    "logit_penalty": ("--logit-penalty 3", changed("actor", "critic"), None),
    "polyak": (
        "--polyak 0",
        unchanged("target_actor", "target_critic"),
        ([False, False], [True, True]),
    ),
    "hidden_size": (
        "--hidden-size 16",
        lambda s, d: [shape("actor", "out.weight")(s, d)[1], shape("critic", "key.weight")(s, d)],
        ([8, (8, 8)], [16, (16, 16)]),
    ),
    "learning_rate": (
        "--learning-rate 0",
        unchanged("actor", "critic"),
        ([False, False], [True, True]),
    ),
    "weight_decay": (
        "--weight-decay 1",
        lambda s, d: moments("critic_optimiser")(s, d),
        "up",
    ),
    "gamma": ("--gamma .5", changed("critic"), None),
    "batch_size": ("--batch-size 60", steps_of, (6.0, 4.0)),
    "buffer_size": ("--buffer-size 30", lambda s, d: len(replays(d)[0]["state"]), (120, 30)),
    "update_every": ("--update-every 40", steps_of, (6.0, 3.0)),
    "num_updates": ("--num-updates 3", steps_of, (6.0, 18.0)),
    "scale_rewards": ("--no-scale-rewards", changed("critic"), None),
    "critic_grad_norm": ("--critic-grad-norm .00001", moments("critic_optimiser"), "down"),
    "actor_grad_norm": ("--actor-grad-norm .00001", moments("actor_optimiser"), "down"),
    "log_every": ("--log-every 40", logged("entropy"), (0, 3)),
    "eval_every": ("--eval-every 40", logged("eval/3/return"), (0, 3)),
    "eval_episodes": ("--eval-every 60 --eval-episodes 3", evaluated("eval/3/episodes"), (0, 3)),
    "final_episodes": ("--final-episodes 5", evaluated("final/3/episodes"), (0, 5)),
    "save_every": (
        "--save-every 100",
        lambda s, d: [entry["timesteps"] for entry in index(d)],
        ([120, 0], [120, 100]),
    ),
}
ELSEWHERE = {
    "run_dir": "every run here",
    "resume": "test_resumed_equals_uninterrupted",
    "eval_only": "test_a_run_as_a_player",
    "preset": "test_presets",
    **dict.fromkeys(("device", "compile", "num_threads"), "test_devices_and_threads"),
    **dict.fromkeys(("tf32", "onednn"), "tests/harness"),
    **dict.fromkeys(("track", "wandb_project", "wandb_mode", "wandb_timeout"), "tests/harness"),
}


def test_every_flag_is_tested():
    assert {x.name for x in dataclasses.fields(maac.Args)} == set(FLAGS) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run without further flags."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(MAAC, run_dir, 120), run_dir


@pytest.mark.parametrize("field", FLAGS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    flags, measure, relation = FLAGS[field]
    state = run(MAAC, tmp_path / "run", 120, *flags.split())
    without, with_flag = measure(*plain), measure(state, tmp_path / "run")
    if relation is None:
        for a, b in zip(without, with_flag, strict=True):
            assert differences(a, b)
    elif relation in ("up", "down"):
        assert with_flag > without if relation == "up" else with_flag < without
    else:
        assert (without, with_flag) == relation


def test_devices_and_threads(monkeypatch):
    made = []

    class World(maac.ParticleWorld):
        def __init__(self, *args, **options):
            made.append((options["device"], options["compiled"]))
            super().__init__(*args, **options | {"device": "cpu", "compiled": False})

    monkeypatch.setattr(maac, "ParticleWorld", World)
    run(MAAC, "two", 20, "--device", "cpu", "--num-threads", 2, "--compile")
    assert torch.get_num_threads() == 2 and set(made) == {("cpu", False)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags in ("", "--compile", "--device cpu --compile"):
        maac.make_envs(parse(maac, flags.split()), "3", 2, 1)
    assert made[-3:] == [("cuda", False), ("cuda", True), ("cpu", False)]
