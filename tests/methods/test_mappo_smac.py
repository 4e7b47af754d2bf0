"""mappo_smac.py against NumPy written from its equations, and as a whole: rollouts, masks, heads,
returns, losses, minibatches, resuming, flags, learning.

References take networks' outputs as given and go battle by battle, in loops; what was played is
recorded at the simulator.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import harness
from harness import RunArgs, UsageError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from battle_tools import (
    CPU,
    WeakEnemies,
    changed,
    check_effect,
    check_seeds_of_evaluations,
    elsewhere,
    finite,
    initial,
    read,
    resuming,
    rows,
    shape,
    sharpen,
    stand_and_shoot,
    watch_evaluations,
)
from runs import differences, exact, index, metrics, only_error, script, some_long, states

from envs.smac import combat, game, worlds
from envs.smac.combat import SIDE, Combat
from envs.smac.episodes import play, summarise

mappo = script("baselines.mappo_smac")
__all__ = ["elsewhere"]  # a fixture of all tests here
SMALL = "--hidden-size 8 --heads 2 --num-envs 6 --max-episode-steps 45"
WINDOWS = "--rollout windows --no-recurrent --window-steps 60"
MODES = {"rounds": "--rnn-size 6", "rounds, no GRU": "--no-recurrent", "windows": WINDOWS}
EACH_MODE = pytest.mark.parametrize("mode", MODES)


# --- Settings -------------------------------------------------------------------------------------


def setting(flags="", noise=0.5, small=SMALL):
    """Battles that have begun, and an agent away from its beginning, whose two critics differ."""
    args = read(mappo, f"{small} {flags}")
    once = args.rollout == "rounds"
    battles = mappo.make_envs(args, args.team_sizes, args.num_envs, args.seed, once=once)
    battles.reset()
    agent = mappo.Agent(args, battles.family, CPU)
    for k, net in enumerate((agent.actor, agent.critic, agent.target_critic)):
        sharpen(net, noise, k)
    rng = torch.Generator().manual_seed(5)
    player = mappo.Player(agent, rng)
    return SimpleNamespace(args=args, battles=battles, agent=agent, player=player, rng=rng)


def recorded(s, monkeypatch):
    """A rollout, and of each of its steps what the simulator says: [(moment before, over, actions,
    reward, terminated, truncated, moment after)], (B, ...) each."""
    told, step = [], s.battles.step

    def watched(actions):
        before, over = [x.clone() for x in s.battles.obs], s.battles.over
        result = step(actions)
        after = [x.clone() for x in s.battles.observe(result.final)]
        ends = [x.clone() for x in (result.reward, result.terminated, result.truncated)]
        told.append((before, over, actions.clone(), *ends, after))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(s.battles, "step", watched)
        rollout, _ = mappo.collect(s.args, s.battles, s.player)
    return rollout, told


def flat(rollout):
    """The K steps, (K, ...) each."""
    return mappo.Played(*(x[rollout.steps.going] for x in rollout.steps))


def places(rollout, told):
    """[(k, t, b)]: which step of which battle the K steps are, by their order."""
    length = [sum(not over[b] for _, over, *_ in told) for b in range(len(told[0][1]))]
    order = sorted(range(len(length)), key=lambda b: -length[b])
    where = [(t, b) for t in range(len(told)) for b in order if t < length[b]]
    assert len(where) == len(rollout.later)
    return [(k, t, b) for k, (t, b) in enumerate(where)]


def synthetic(seed=0, width=30, A=4, filled=(4, 3, 2), times=3, targets=4):
    """Features of random entities in double precision: times x 3 moments of teams of these sizes;
    the first columns are one-hot tags of enemies, as in battles."""
    rng = torch.Generator().manual_seed(seed)
    played = torch.ones(times, len(filled), dtype=torch.bool)
    M, slot = times * len(filled), torch.arange(A)
    side = slot >= torch.tensor(filled * times)[:, None]
    empty = torch.cat((side, side), 1)
    unseen = torch.rand(M, A, 2 * A, generator=rng) < 0.4
    unseen |= empty[:, None]
    unseen[:, slot, slot] = False
    avail = torch.rand(M, A, 6 + targets, generator=rng) < 0.6
    avail[..., 0], avail[..., 1] = side, ~side
    avail[..., 2:] &= ~side[..., None]
    entities = torch.randn(M, 2 * A, width, generator=rng, dtype=torch.float64)
    entities[..., :16] = 0
    entities[:, A:, :A] = torch.eye(A, dtype=torch.float64)
    entities *= ~empty[..., None]
    return mappo.Features(entities, unseen, empty, avail, played)


def networks(flags="", width=30, targets=4):
    """An actor and a critic for synthetic features, in double precision."""
    args = read(mappo, f"--hidden-size 8 --heads 2 {flags}")
    torch.manual_seed(1)
    family = SimpleNamespace(n_actions=6 + targets)
    actor, critic = mappo.Actor(width, family, args), mappo.Critic(width, args)
    for k, net in enumerate((actor, critic)):
        sharpen(net, 1.0, k)
        net.double()
    return actor, critic


HEADS = pytest.mark.parametrize("flags", ["", "--no-recurrent", "--target-head pointer"])


# --- Rollouts -------------------------------------------------------------------------------------


@EACH_MODE
def test_rollouts_are_what_was_seen_and_done(mode, monkeypatch):
    """Entities with last actions, masks, available actions, rewards, ends, before and after each
    step; two in a row, so that windows begin within battles."""
    s, past = setting(MODES[mode]), {}
    for _ in range(2):
        rollout, told = recorded(s, monkeypatch)
        features, A, steps = rollout.features, rollout.features.unseen.shape[1], flat(rollout)
        slots = [*range(A), *range(SIDE, SIDE + A)]
        ended = 0
        for k, t, b in places(rollout, told):
            before, over, actions, reward, terminated, truncated, after = told[t]
            assert not over[b]
            earlier = told[t - 1] if t else past.get("last")
            begins = earlier is None or bool(earlier[4][b] | earlier[5][b])
            begins |= t == 0 and mode != "windows"
            acted = torch.zeros(A, dtype=int) if begins else earlier[2][b, :A]
            for m, obs, last in ((k, before, acted), (rollout.later[k], after, actions[b, :A])):
                one_hot = F.one_hot(last, 14) * (m != k or not begins)
                extra = torch.cat((one_hot, torch.zeros(A, 14)))
                assert torch.equal(features.entities[m], torch.cat((obs[0][b, slots], extra), -1))
                assert torch.equal(features.unseen[m], obs[1][b, :A][:, slots])
                assert torch.equal(features.empty[m], obs[2][b, slots])
                assert torch.equal(features.avail_actions[m], obs[3][b, :A])
            assert torch.equal(steps.actions[k], actions[b])
            assert steps.rewards[k] == reward[b] and steps.terminated[k] == terminated[b]
            over = bool(terminated[b] | truncated[b])
            assert steps.ends[k] == (over or (mode == "windows" and t + 1 == len(told)))
            ended += over
        assert ended >= 6 and len(told) > 30
        past["last"] = told[-1]


@EACH_MODE
@pytest.mark.parametrize("amp", [False, True])
def test_who_learns_is_who_acted(mode, amp, monkeypatch):
    """Before the first step of learning all ratios are 1, over chunks of a GRU, windows that begin
    within battles, and teams that are gone."""
    monkeypatch.setattr(mappo, "has_bf16", lambda device: True)
    s = setting(f"{MODES[mode]} --returns lambda {'--amp' if amp else ''}")
    assert s.agent.amp == amp
    for _ in range(2):
        rollout, _ = mappo.collect(s.args, s.battles, s.player)
        batch = mappo.prepare(s.args, s.agent, rollout)
        _, scalars = mappo.policy_loss(s.args, s.agent, batch, 0.01)
        scalars = {name: x.detach() for name, x in scalars.items()}
        bound = 1e-2 if amp else 1e-6
        assert abs(float(scalars["kl"])) < bound and float(scalars["clipped"]) < bound
        with s.agent.autocast():
            log_probs, _ = s.agent.actor(batch.features)
        found = mappo.pick(log_probs, batch.actions)
        acts = mappo.choosing(batch.features)
        assert torch.allclose(found[acts], batch.log_probs[acts], atol=0.1 if amp else 1e-4)
        assert float(batch.log_probs[acts].std()) > 0.1


@pytest.mark.numeric
def test_acting_with_those_that_go_on_is_acting_with_all(monkeypatch):
    """Whoever has ended passes no network; the others draw the same from the same noise."""
    s = setting()
    rollout, told = recorded(s, monkeypatch)
    counts = [int((~over).sum()) for _, over, *_ in told]
    assert counts[0] == 6 > counts[-1], "some battles end before others"
    t = counts.index(next(n for n in counts if n < 6))
    args = dataclasses.replace(s.args, num_envs=6)
    battles = mappo.make_envs(args, args.team_sizes, 6, args.seed)
    monkeypatch.setattr(Combat, "over", property(lambda self: torch.zeros(6, dtype=torch.bool)))
    battles.reset(), battles.reset()
    player = mappo.Player(s.agent, torch.Generator().manual_seed(5))
    for _, over, actions, *_ in told[: t + 3]:
        found = player(battles)
        assert torch.equal(found[~over], actions[~over])
        battles.step(torch.where(over[:, None], 0, actions))
        player.last_actions = actions.clone()


def test_actions_are_drawn_from_the_policy():
    """Unavailable ones have probability 0 and never come; greedy players take the likeliest."""
    log_probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().clamp(min=-1e9)
    noise = torch.empty(100_000, 1, 4).exponential_(generator=torch.Generator().manual_seed(0))
    share = torch.bincount(mappo.sample(log_probs, noise)[:, 0], minlength=4) / 100_000
    assert share[1] == 0 and torch.allclose(share, log_probs.exp()[0], atol=0.01)
    s = setting(noise=1.0)
    rollout, _ = mappo.collect(s.args, s.battles, s.player)
    log_probs, _ = s.agent.actor(rollout.features.at(torch.arange(len(rollout.later))))
    avail = rollout.features.avail_actions[: len(rollout.later)]
    assert (log_probs.exp()[~avail] == 0).all() and (log_probs.exp()[avail] > 0).any()
    assert avail.gather(-1, flat(rollout).actions[:, : avail.shape[1], None]).all()
    s.battles.reset()
    features = mappo.encode(
        s.battles.obs, torch.full((6, 8), -1), torch.ones(1, 6, dtype=torch.bool), CPU
    )
    best = s.agent.actor(features)[0].argmax(-1)
    assert torch.equal(mappo.Player(s.agent)(s.battles)[:, : best.shape[1]], best)


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.numeric
@HEADS
def test_agents_know_what_they_see_and_the_critic_all(flags):
    """Who is never seen by agent 0 changes nothing of its policy, and gets no gradient of it; V
    depends on it. Empty slots change nothing at all."""
    features, (actor, critic) = synthetic(), networks(flags)
    j = 6
    features.unseen[:, 0, j] = True
    features.avail_actions[:, 0, 6 + j - 4] = False  # out of sight, out of reach
    tags, rest = features.entities[..., :16], features.entities[..., 16:]
    x = rest.clone().requires_grad_()  # a pointer puts logits where tags are, which are constant
    now = features._replace(entities=torch.cat((tags, x), -1))
    log_probs, _ = actor(now)
    may = features.avail_actions[:, 0]
    (gradient,) = torch.autograd.grad(log_probs[:, 0][may].square().sum(), x)
    assert (gradient[:, j] == 0).all() and (gradient[:, 0] != 0).any()
    assert (gradient[features.empty] == 0).all()
    (gradient,) = torch.autograd.grad(critic(now).sum(), x)
    assert (gradient[~features.empty[:, j], j] != 0).any()
    assert (gradient[features.empty] == 0).all() and (gradient[~features.empty] != 0).any()
    other = torch.where(features.empty[..., None], torch.tensor(7.0).double(), rest)
    again = features._replace(entities=torch.cat((tags, other), -1))
    there = ~features.empty[:, :4]
    assert torch.equal(actor(again)[0][there], log_probs[there])
    assert torch.equal(critic(again), critic(features))


@pytest.mark.numeric
@HEADS
def test_permuting_entities_permutes_policies(flags):
    """Agents among themselves and enemies among themselves; V stays. With pointers, what is drawn
    as a tag does not matter: other tags only move the logits."""
    features, (actor, critic) = synthetic(), networks(flags)
    mine, all_of = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1, 5, 7, 6, 4])
    moved = mappo.Features(
        features.entities[:, all_of],
        features.unseen[:, mine][:, :, all_of],
        features.empty[:, all_of],
        features.avail_actions[:, mine],
        features.played,
    )
    log_probs, values = actor(features)[0], critic(features)
    assert torch.allclose(log_probs[:, mine], actor(moved)[0], atol=1e-10)
    assert torch.allclose(values, critic(moved), atol=1e-12) and values.std() > 1e-3
    if "pointer" not in flags:
        return
    # Other tags: for networks that do not look at them, logits move with them.
    with torch.no_grad():
        actor.trunk.embed.weight[:, :16] = 0
    tags = torch.tensor([3, 1, 0, 2])
    entities = features.entities.clone()
    entities[..., :4] = features.entities[..., tags]
    actions = torch.cat((torch.arange(6), 6 + tags))
    other = features._replace(entities=entities, avail_actions=features.avail_actions[..., actions])
    assert torch.allclose(actor(features)[0][..., actions], actor(other)[0], atol=1e-10)


@pytest.mark.numeric
def test_a_pointer_is_the_product_of_agent_and_target():
    """Its logits in loops: <W_q x_i, W_k e_j> / sqrt(H) at the tag of j."""
    features, (actor, _) = synthetic(), networks("--target-head pointer --no-recurrent")
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(9, 4, 8, generator=rng, dtype=torch.float64)
    e = torch.randn(9, 8, 8, generator=rng, dtype=torch.float64)
    found = actor.point(x, e, features.entities).detach()
    q, k = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (actor.query, actor.key)
    )
    for m in range(9):
        for i in range(4):
            for tag in range(4):
                j = 4 + tag
                if features.empty[m, j]:
                    assert found[m, i, tag] == 0
                    continue
                score = (q[0] @ x[m, i].numpy() + q[1]) @ (k[0] @ e[m, j].numpy() + k[1])
                assert np.isclose(found[m, i, tag], score / np.sqrt(8))


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--no-recurrent --target-head pointer"])
def test_trimmed_slots_change_nothing(flags, monkeypatch):
    """Features end at the last slot in use; with all 8 of a side the outputs are the same."""
    s = setting(f"--team-sizes 3 {flags}")
    obs, last = s.battles.obs, torch.full((6, 8), -1)
    played = torch.ones(1, 6, dtype=torch.bool)
    short = mappo.encode(obs, last, played, CPU)
    monkeypatch.setattr(mappo, "slots_in_use", lambda empty: 8)
    full = mappo.encode(obs, last, played, CPU)
    assert short.unseen.shape[1:] == (3, 6) and full.unseen.shape[1:] == (8, 16)
    a, b = s.agent.actor(short)[0], s.agent.actor(full)[0]
    assert torch.allclose(a, b[:, :3], atol=1e-5)
    assert torch.allclose(s.agent.critic(short), s.agent.critic(full), atol=1e-5)


# --- Returns --------------------------------------------------------------------------------------


def numpy_returns(args, rewards, values, next_values, cut):
    """Of one battle's steps in a row, (n,) each. cut: the end has no value. From the sums over
    rewards (n-step) and over differences (GAE), not from the recursions."""
    n, gamma = len(rewards), args.gamma
    found = []
    for t in range(n):
        if args.returns == "n-step":
            last = min(t + args.n_steps, n)
            g = sum(gamma ** (k - t) * rewards[k] for k in range(t, last))
            if not (cut and last == n):
                g += gamma ** (last - t) * next_values[last - 1]
        else:
            g = values[t]
            for k in range(t, n):
                after = 0.0 if cut and k == n - 1 else next_values[k]
                delta = rewards[k] + gamma * after - values[k]
                g += (gamma * args.gae_lambda) ** (k - t) * delta
        found.append(g)
    return found


@pytest.mark.numeric
@EACH_MODE
@pytest.mark.parametrize(
    "flags",
    [
        "--returns lambda --gae-lambda .7",
        "--returns lambda --timeout-terminates --value-norm",
        "--n-steps 3",
        "--n-steps 1000000000000 --timeout-terminates --normalise-advantages",
    ],
)
def test_returns_and_advantages_are_those_of_numpy(mode, flags, monkeypatch):
    s = setting(f"{MODES[mode]} --gamma .9 {flags}", noise=1.0)
    s.agent.value_norm.update(torch.tensor([1.0, 3.0, 13.0]))  # mean 3, deviation 2
    rollout, told = recorded(s, monkeypatch)
    net = s.agent.target_critic if s.args.returns == "n-step" else s.agent.critic
    with torch.no_grad():
        values = s.agent.critic(rollout.features).double().numpy() * 2 + 3
        targets = net(rollout.features).double().numpy() * 2 + 3
    runs, kinds = {}, set()
    for k, t, b in places(rollout, told):
        runs.setdefault(b, [[]])[-1].append(k)
        terminated, truncated = bool(told[t][4][b]), bool(told[t][5][b])
        if terminated or truncated:
            kinds.add(terminated)
            runs[b].append([])
    assert kinds == {True, False}, "some battles are decided, some run out of time"
    expected = np.zeros(len(rollout.later))
    for parts in runs.values():
        for part in parts:
            if not part:
                continue
            *_, (t, b) = [(t, b) for k, t, b in places(rollout, told) if k == part[-1]]
            cut = bool(told[t][4][b]) or (s.args.timeout_terminates and bool(told[t][5][b]))
            later = rollout.later[part].numpy()
            rewards = flat(rollout).rewards[part].double().numpy()
            expected[part] = numpy_returns(s.args, rewards, values[part], targets[later], cut)
    batch = mappo.prepare(s.args, s.agent, rollout)
    K = len(expected)
    advantages = expected - values[:K]
    acts = mappo.choosing(batch.features).numpy()
    if s.args.normalise_advantages:
        each = np.repeat(advantages, acts.sum(1))
        advantages = (advantages - each.mean()) / (each.std() + 1e-5)
    assert np.allclose(batch.advantages, advantages, atol=2e-4)
    mean, std = 3.0, 2.0
    if s.args.value_norm:  # two updates, debiased
        first, second = 0.05 * 0.95, 0.05
        mean = (first * 3 + second * expected.mean()) / (first + second)
        square = (first * 13 + second * (expected**2).mean()) / (first + second)
        std = np.sqrt(square - mean**2)
    assert np.allclose(batch.targets, (expected - mean) / std, atol=2e-4)


# --- Losses ---------------------------------------------------------------------------------------


def learned_from(flags="", noise=0.3):
    """A batch, and an agent that has moved on since it acted."""
    s = setting(f"--returns lambda {flags}")
    rollout, _ = mappo.collect(s.args, s.battles, s.player)
    s.batch = mappo.prepare(s.args, s.agent, rollout)
    if noise:
        sharpen(s.agent.actor, noise, 8)
    return s


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--no-recurrent --target-head pointer"])
def test_losses_are_those_of_numpy(flags):
    """Policies and values as given; the rest by loops over moments and living agents."""
    s = learned_from(f"--clip .1 {flags}")
    batch = s.batch
    loss, scalars = mappo.policy_loss(s.args, s.agent, batch, 0.3)
    log_probs = s.agent.actor(batch.features)[0].detach().double().numpy()
    objective, entropy, clipped, kl = [], [], [], []
    for k in range(len(batch.actions)):
        for i in range(batch.actions.shape[1]):
            if batch.features.avail_actions[k, i, 0]:
                continue  # dead, or no one
            row, a = log_probs[k, i], float(batch.advantages[k])
            r = np.exp(row[batch.actions[k, i]] - float(batch.log_probs[k, i]))
            objective.append(min(r * a, min(max(r, 0.9), 1.1) * a))
            p = np.exp(row[batch.features.avail_actions[k, i].numpy()])
            entropy.append(-(p * np.log(p)).sum())
            clipped.append(abs(r - 1) > 0.1)
            kl.append(r - 1 - np.log(r))
    living = len(objective)
    assert 0 < np.mean(clipped) < 1 and living < batch.actions.numel()
    assert np.isclose(float(loss), -np.mean(objective) - 0.3 * np.mean(entropy), atol=1e-5)
    for name, x in (("entropy", entropy), ("clipped", clipped), ("kl", kl)):
        assert np.isclose(float(scalars[name]), np.mean(x), atol=1e-5), name
    values = s.agent.critic(batch.features).detach().double().numpy()
    expected = np.mean((values - batch.targets.double().numpy()) ** 2)
    assert np.isclose(float(mappo.value_loss(s.agent, batch)), expected, rtol=1e-5)


@pytest.mark.numeric
def test_the_first_gradient_is_that_of_the_policy_gradient():
    """Of -A log pi, averaged over the living; beyond the clip there is none."""
    s = learned_from(noise=0)
    parameters = list(s.agent.actor.parameters())
    loss, _ = mappo.policy_loss(s.args, s.agent, s.batch, 0.0)
    found = torch.autograd.grad(loss, parameters)
    log_prob = mappo.pick(s.agent.actor(s.batch.features)[0], s.batch.actions)
    acts = mappo.choosing(s.batch.features)
    plain = -(s.batch.advantages[:, None] * log_prob)[acts].mean()
    expected = torch.autograd.grad(plain, parameters)
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-4 * max(1.0, float(b.abs().max())))
    assert max(float(b.abs().max()) for b in expected) > 1e-3
    # Who acted found its actions e times as likely or unlikely, always on the side of the clip.
    side = torch.where(s.batch.advantages > 0, -1.0, 1.0)[:, None]
    gone = s.batch._replace(log_probs=s.batch.log_probs + side)
    loss, scalars = mappo.policy_loss(s.args, s.agent, gone, 0.0)
    assert float(scalars["clipped"]) == 1.0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, parameters))


def test_each_loss_moves_its_own_network():
    s = learned_from()
    mappo.policy_loss(s.args, s.agent, s.batch, 0.1)[0].backward()
    assert all((p.grad != 0).any() for p in s.agent.actor.parameters())
    assert all(p.grad is None for p in s.agent.critic.parameters())
    s.agent.actor.zero_grad()
    mappo.value_loss(s.agent, s.batch).backward()
    assert all((p.grad != 0).any() for p in s.agent.critic.parameters())
    assert all(p.grad is None for p in s.agent.actor.parameters())
    assert all(p.grad is None for p in s.agent.target_critic.parameters())


def test_the_dead_teach_nothing():
    """What they did, and what is said of it, changes no loss."""
    s = learned_from()
    dead = ~mappo.choosing(s.batch.features)
    assert dead.any() and not dead.all(1).any()
    loss, _ = mappo.policy_loss(s.args, s.agent, s.batch, 0.1)
    other = s.batch._replace(log_probs=torch.where(dead, -9.0, s.batch.log_probs))
    assert torch.equal(mappo.policy_loss(s.args, s.agent, other, 0.1)[0], loss)
    other = s.batch._replace(log_probs=torch.where(dead, s.batch.log_probs, -9.0))
    assert not torch.equal(mappo.policy_loss(s.args, s.agent, other, 0.1)[0], loss)


@pytest.mark.numeric
@EACH_MODE
def test_minibatches_are_all_steps_once(mode):
    """Shuffled; for a GRU whole battles, of which the policy is that of the whole batch."""
    s = setting(f"{MODES[mode]} --minibatches 4 --returns lambda")
    rollout, _ = mappo.collect(s.args, s.battles, s.player)
    batch = mappo.prepare(s.args, s.agent, rollout)
    batch = batch._replace(targets=torch.arange(len(batch.actions)).double())  # names
    log_probs = s.agent.actor(batch.features)[0]
    for _ in range(2):
        names = []
        for part in mappo.minibatches(s.args, batch, s.rng):
            at = part.targets.long()
            names += at.tolist()
            assert torch.equal(part.actions, batch.actions[at])
            assert torch.equal(part.advantages, batch.advantages[at])
            assert torch.allclose(s.agent.actor(part.features)[0], log_probs[at], atol=1e-4)
        assert sorted(names) == list(range(len(batch.actions))) and names != sorted(names)


@pytest.mark.numeric
@EACH_MODE
def test_an_update_is_adam_on_both_losses(mode):
    """Downhill, by torch's Adam, with gradients clipped; epoch after epoch, new minibatches."""
    s = setting(f"{MODES[mode]} --epochs 2 --minibatches 2 --max-grad-norm .05")
    batch = mappo.prepare(s.args, s.agent, mappo.collect(s.args, s.battles, s.player)[0])
    twin, rng = copy.deepcopy(s.agent), copy.deepcopy(s.rng)
    mappo.update(s.args, s.agent, batch, s.rng, 0.5)
    nets = (twin.actor, twin.critic)
    rate = 0.5 * s.args.learning_rate
    adams = [torch.optim.Adam(net.parameters(), lr=rate, eps=s.args.adam_eps) for net in nets]
    for _ in range(2):
        for part in mappo.minibatches(s.args, batch, rng):
            policy = mappo.policy_loss(s.args, twin, part, 0.5 * s.args.entropy_coef)[0]
            for net, adam, loss in zip(nets, adams, (policy, mappo.value_loss(twin, part))):
                adam.zero_grad()
                loss.backward()
                assert torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05
                adam.step()
    for net, own in zip(nets, (s.agent.actor, s.agent.critic)):
        for x, y in zip(net.parameters(), own.parameters(), strict=True):
            assert torch.allclose(x, y, atol=0.05 * rate)


def test_slow_critic_learning_rate_and_entropy():
    """V' goes its part of the way; what is left of rates falls linearly."""
    s = setting("--target-tau .25")
    before = [p.clone() for p in s.agent.target_critic.parameters()]
    s.agent.move_target()
    for old, slow, fast in zip(
        before, s.agent.target_critic.parameters(), s.agent.critic.parameters()
    ):
        assert torch.allclose(slow, 0.75 * old + 0.25 * fast, atol=1e-6)
    args = mappo.Args(final_share=0.2, total_timesteps=100)
    assert np.allclose([mappo.share_left(args, t) for t in (0, 50, 100, 110)], [1, 0.6, 0.2, 0.2])


def test_the_slow_critic_moves_once_a_rollout():
    """After all epochs and minibatches, towards what V has become."""
    s = setting("--target-tau .25 --epochs 2 --minibatches 2")
    batch = mappo.prepare(s.args, s.agent, mappo.collect(s.args, s.battles, s.player)[0])
    before = [p.clone() for p in s.agent.target_critic.parameters()]
    first = [p.detach().clone() for p in s.agent.critic.parameters()]
    mappo.update(s.args, s.agent, batch, s.rng, 1.0)
    slow, fast = (list(x.parameters()) for x in (s.agent.target_critic, s.agent.critic))
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(first, fast))
    for old, x, y in zip(before, slow, fast):
        assert torch.allclose(x, 0.75 * old + 0.25 * y, atol=1e-6)


def test_what_is_left_is_of_both_rates():
    """A quarter of both is an update with both at a quarter, bit for bit."""
    found = []
    for c, rate, share in ((0.4, 1e-3, 0.25), (0.1, 2.5e-4, 1.0), (0.4, 2.5e-4, 1.0)):
        s = learned_from(f"--entropy-coef {c} --learning-rate {rate} --epochs 2", noise=0)
        mappo.update(s.args, s.agent, s.batch, s.rng, share)
        nets = {name: getattr(s.agent, name) for name in ("actor", "critic")}
        found.append({name: dict(net.state_dict()) for name, net in nets.items()})
    assert differences(found[0], found[1]) == []
    assert differences(found[0]["actor"], found[2]["actor"]), "c matters"


# --- Same seed, same bits -------------------------------------------------------------------------


def tiny(run_dir, steps, *flags):
    """The command line of a run of some environment steps, 16 an iteration."""
    argv = "--num-envs 2 --hidden-size 8 --heads 2 --max-episode-steps 8 --team-sizes 3 4"
    argv += " --eval-team-sizes 5 --eval-every 0 --eval-episodes 2 --final-episodes 0"
    argv += " --save-every 0 --log-every 1000000"
    own = ("--total-timesteps", steps, "--run-dir", run_dir, *flags)
    return [str(x) for x in (*argv.split(), *own)]


def run(run_dir, steps, *flags):
    """A whole run; its last checkpoint."""
    assert mappo.main(tiny(run_dir, steps, *flags)) == 0
    return exact(run_dir)


def test_rows_of_the_greedy_policy_and_of_draws(monkeypatch):
    """The run's actor, in battles of a seed of their size's own, not the run's."""
    met = watch_evaluations(mappo, monkeypatch)
    run("run", 64, "--final-episodes", 2)
    own = [policy for policy, *_ in met if isinstance(policy, mappo.Player)]
    assert len(own) % 2 == 0
    check_seeds_of_evaluations(met)
    assert [policy.rng is None for policy in own] == [True, False] * (len(own) // 2)
    for policy in own:
        actor = dict(policy.agent.actor.state_dict())
        assert differences(actor, exact("run")["agent"]["actor"]) == []


def test_same_seed_same_bits():
    """Another seed changes every network, the generator, and what is logged."""
    flags = ("--log-every", 32, "--eval-every", 64, "--value-norm")
    a, b, c = (run(d, 64, *flags, "--seed", seed) for d, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert differences(a, b) == []
    assert metrics("a") == metrics("b") != metrics("c") and len(metrics("a")) == 3
    names = {name.split("/")[2] for name in differences(a, c) if name.startswith("/agent")}
    assert names == set(a["agent"]) and "/ranks/0/rng" in differences(a, c)


WHOLE = {
    "rounds": "",
    "windows within battles": "--rollout windows --no-recurrent --window-steps 3 --minibatches 2",
    "lambda, bf16, mmm": "--returns lambda --amp --scenario mmm --target-head pointer --value-norm",
    "windows of resource collection": (
        "--scenario resource --rescale --egocentric --rollout windows --no-recurrent"
    ),
}


@pytest.mark.parametrize("mode", some_long(WHOLE, "windows of", "lambda", "rounds"))
def test_half_and_resumed_is_whole(mode):
    """Stopped twice, between lines of the log, which are the same, too."""
    flags = [*WHOLE[mode].split(), "--log-every", "48"]
    whole = run("whole", 128, *flags)
    run("cut", 10, *flags)
    assert mappo.main(resuming("cut", 70)) == 0
    assert mappo.main(resuming("cut", 128)) == 0
    cut = exact("cut")
    assert whole["timesteps"] >= 128 and differences(whole, cut) == []
    logged = metrics("whole")
    assert logged == metrics("cut") and len(logged) >= 2
    first = initial("whole")["agent"]
    for net in ("actor", "critic", "target_critic"):
        assert differences(first[net], whole["agent"][net])


def test_rates_fall_on_where_they_were():
    """From a checkpoint on the way: the course is that of --total-timesteps."""
    run("whole", 128, "--final-share", 0.1, "--save-every", 64)
    shutil.copytree("whole", "cut")
    assert mappo.main(resuming("cut/checkpoint-64.pt", 128)) == 0
    assert differences(exact("whole"), exact("cut")) == []


def test_looking_at_a_run_changes_nothing():
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generator."""
    looks = ("--log-every", 16, "--save-every", 16, "--eval-every", 48, "--final-episodes", 1)
    a, b = run("plain", 64), run("looks", 64, *looks)
    assert len(metrics("looks")) == 4 + 1 + 1
    for state in (a, b):  # since the last line
        del state["ranks"][0]["log"], state["ranks"][0]["noted"]
    assert differences(a, b) == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite(poison, monkeypatch, capfd):
    """The run ends and names it; all checkpoints are finite, and it goes on from the newest."""
    calls, step = [], Combat.step

    def poisoned(battles, actions):
        result = step(battles, actions)
        calls.append(1)
        if len(calls) == 43:  # in the sixth round
            result.reward[0] = poison
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Combat, "step", poisoned)
        assert mappo.main(tiny("run", 400, "--save-every", 16)) == 1
    assert "rewards is not finite" in only_error(capfd.readouterr().err)
    assert [entry["timesteps"] for entry in index("run")] == [80, 64]
    assert all(finite(state) for state in states("run"))
    assert mappo.main(resuming("run", 128)) == 0
    assert differences(exact("run")["agent"], run("whole", 128)["agent"]) == []


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # with words that the sentence has to contain
    "--team-sizes 2": "3 to 8 2",
    "--max-episode-steps 1000000000000": "--max-episode-steps 1000",
    "--scenario resource --max-episode-steps 1001": "--max-episode-steps 1000",
    "--hidden-size 10": "--hidden-size --heads",
    "--rollout windows": "--rollout windows --no-recurrent, --rollout rounds",
    "--preset cpu --recurrent": "--rollout windows --no-recurrent, --rollout rounds",
    "--rollout windows --no-recurrent --backend sc2": "--rollout windows --backend sim",
    "--window-steps 8": "--window-steps --rollout windows",
    "--no-recurrent --rnn-size 8": "--rnn-size --recurrent",
    "--returns lambda --n-steps 3": "--n-steps --returns n-step",
    "--returns lambda --target-tau 1": "--target-tau --returns n-step",
    "--gae-lambda .9": "--gae-lambda --returns lambda",
    "--minibatches 11": "--minibatches 10",
    "--preset cpu --minibatches 9000": "--minibatches 8192",
    "--scenario resource --target-head pointer": "--scenario resource --target-head tags",
    "--egocentric": "--egocentric --scenario resource",
    "--rescale": "--rescale --scenario resource",
    "--backend sc2 --enemy-ai focus": "--enemy-ai --backend sim",
    "--scenario resource --clip-regeneration": "--clip-regeneration battles",
    "--scenario resource --env-threads 2": "--env-threads --backend sim",
    "--backend sc2 --env-threads 2": "--env-threads --backend sim",
}


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_what_would_do_something_else_than_it_says(line, words):
    with pytest.raises(UsageError) as error:
        read(mappo, line)
    assert [word for word in words.split() if word not in str(error.value)] == []


def test_a_run_in_many_battles_is_evaluated_in_a_few_games():
    """As docs/starcraft.md has it; so few that they could not be divided into minibatches."""
    source = Path(mappo.__file__).parents[1] / "zoo" / "sz-mappo-s1"
    args = read(mappo, f"--eval-only {source} --backend sc2 --game-version 4.10.0 --num-envs 4")
    assert harness.saved_args(str(source), mappo.Args).num_envs == 256 and args.num_envs == 4
    rounds = {"rollout": "rounds", "minibatches": 8, "eval_only": "run"}
    assert not any(wrong for wrong, _ in mappo.validate(dataclasses.replace(args, **rounds)))


def test_presets():
    """The one for CPUs sets its flags, others override it wherever they stand."""
    assert read(mappo, "") == mappo.Args() == read(mappo, "--preset paper")
    cpu = read(mappo, "--preset cpu")
    assert cpu == dataclasses.replace(mappo.Args(), preset="cpu", **mappo.PRESETS["cpu"])
    assert read(mappo, "--hidden-size 32 --preset cpu") == dataclasses.replace(cpu, hidden_size=32)
    flags = mappo.PRESETS["cpu"] | mappo.PRESETS["cpu scenario resource"]
    collects = dataclasses.replace(mappo.Args(), preset="cpu", scenario="resource", **flags)
    assert read(mappo, "--preset cpu --scenario resource") == collects
    assert collects.egocentric and collects.target_head == "tags"
    read(mappo, "--preset cpu --rollout rounds --recurrent --returns n-step")


# --- Flags ----------------------------------------------------------------------------------------


def option(name):
    return lambda s, d: s["agent"]["actor_optimiser"]["param_groups"][0][name]


def updates(state, run_dir):
    return [
        float(state["agent"][f"{x}_optimiser"]["state"][0]["step"]) for x in ("actor", "critic")
    ]


def iterations(state, run_dir):
    return state["iteration"]


def follows(state, run_dir):
    return not differences(state["agent"]["critic"], state["agent"]["target_critic"])


IN_WINDOWS = "--rollout windows --no-recurrent"
EFFECTS = {  # flags; what to measure; without and with them, or None: the two must differ
    "scenario": ("--scenario csz", shape("actor", "trunk.embed.weight"), ((8, 52), (8, 53))),
    "team_sizes": (
        "--team-sizes 5 --eval-team-sizes 4",
        lambda s, d: s["ranks"][0]["battles"]["teams"].count("("),
        None,
    ),
    "num_envs": ("--num-envs 4", iterations, (4, 2)),
    "max_episode_steps": ("--max-episode-steps 4", iterations, (4, 8)),
    "rollout": (IN_WINDOWS, iterations, (4, 1)),
    "window_steps": (f"{IN_WINDOWS} --window-steps 16", iterations, (4, 2)),
    "recurrent": ("--no-recurrent", lambda s, d: "layer.weight" in s["agent"]["actor"], (0, 1)),
    "target_head": ("--target-head pointer", shape("actor", "head.weight"), ((14, 64), (6, 64))),
    "hidden_size": ("--hidden-size 12", shape("critic", "layer.weight"), ((8, 8), (12, 12))),
    "heads": ("--heads 4", changed("actor"), None),
    "rnn_size": ("--rnn-size 7", shape("actor", "head.weight"), ((14, 64), (14, 7))),
    "returns": ("--returns lambda", changed("critic"), None),
    "n_steps": ("--n-steps 1", changed("critic"), None),
    "target_tau": ("--target-tau 1", follows, (False, True)),
    "timeout_terminates": ("--timeout-terminates", changed("critic"), None),
    "value_norm": (
        "--value-norm",
        lambda s, d: bool(s["agent"]["value_norm"]["sums"].any()),
        (0, 1),
    ),
    "normalise_advantages": ("--normalise-advantages", changed("actor"), None),
    "learning_rate": ("--learning-rate .01", option("lr"), (5e-4, 0.01)),
    "entropy_coef": ("--entropy-coef 5", changed("actor"), None),
    "final_share": ("--final-share .6", option("lr"), (5e-4, 5e-4 * (1 - 48 / 64 * 0.4))),
    "adam_eps": ("--adam-eps .1", option("eps"), (1e-5, 0.1)),
    "epochs": ("--epochs 3", updates, ([16, 16], [12, 12])),
    "minibatches": ("--minibatches 2", updates, ([16, 16], [32, 32])),
    "clip": ("--clip 0", changed("actor"), None),
    "gamma": ("--gamma .5", changed("critic"), None),
    "max_grad_norm": ("--max-grad-norm .00001", changed("actor"), None),
    "eval_team_sizes": (
        "--final-episodes 2 --eval-team-sizes 6 7",
        rows("5", "6", "7"),
        (["5"], ["6", "7"]),
    ),
}
ELSEWHERE = {
    "amp": "test_amp",
    "gae_lambda": "test_gae_lambda",
    "rescale": "test_rescaled_worlds",
    "egocentric": "test_rescaled_worlds",
    **dict.fromkeys(
        ("backend", "game_version", "enemy_ai", "clip_regeneration", "env_threads"),
        "test_flags_of_battles",
    ),
}


def test_every_flag_is_tested():
    own = {x.name for x in dataclasses.fields(mappo.Args)}
    own -= {x.name for x in dataclasses.fields(RunArgs)}  # tests/harness
    assert own == set(EFFECTS) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(run_dir, 64, "--final-episodes", 1), run_dir


@pytest.mark.parametrize("field", EFFECTS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    check_effect(EFFECTS[field], plain, tmp_path / "run", run)


def test_rescaled_worlds():
    """--rescale and --egocentric reach worlds, rollouts and networks."""
    flags = ["--scenario", "resource", "--rollout", "windows", "--no-recurrent"]
    plain = run("plain", 64, *flags)
    rescaled = run("rescaled", 64, *flags, "--rescale")
    assert differences(plain["agent"]["actor"], rescaled["agent"]["actor"])
    seen = run("seen", 64, *flags, "--egocentric")
    weights = [state["agent"]["actor"]["trunk.embed.weight"] for state in (plain, seen)]
    assert [weight.shape[1] for weight in weights] == [23 + 6, 35 + 6]
    args = read(mappo, "--scenario resource --egocentric")
    worlds = mappo.make_envs(args, sizes=(3,), num_envs=2, seed=1)
    assert mappo.load_player("seen")(worlds).shape == (2, 8)


def test_gae_lambda():
    a = run("plain", 32, "--returns", "lambda")
    b = run("less", 32, "--returns", "lambda", "--gae-lambda", 0.5)
    assert differences(a["agent"]["critic"], b["agent"]["critic"])


@pytest.mark.parametrize("fast", [True, False])
def test_amp(fast, monkeypatch):
    """bf16 where the hardware has it, else nothing; args.json says which."""
    plain = run("plain", 32)
    monkeypatch.setattr(mappo, "has_bf16", lambda device: fast)
    amp = run("amp", 32, "--amp")
    assert bool(differences(plain["agent"], amp["agent"])) == fast
    assert json.loads(Path("amp/args.json").read_text())["resolved"]["amp"] == fast


def test_flags_of_battles(monkeypatch):
    """They reach the simulator, or the adapter of the real game."""
    args = read(mappo, "--enemy-ai focus --clip-regeneration --env-threads 2")
    battles = mappo.make_envs(args, (3,), 4, 9)
    assert battles.rules.enemy_ai == 2 and battles.rules.clip_regeneration and battles.rules.once
    assert len(battles.spans) == 2 and battles.setup.seed == 9 and battles.rules.limit == 150
    assert not mappo.make_envs(args, (3,), 4, 9, once=False).rules.once
    made = {}
    monkeypatch.setattr(game, "make_battles", lambda **options: made.update(options) or battles)
    args = read(mappo, "--backend sc2 --game-version 4.6.2 --scenario mmm --clip-regeneration")
    assert mappo.make_envs(args, (3,), 2, 9) is battles and made["game_version"] == "4.6.2"
    assert (made["scenario"], made["team_sizes"], made["clip_regeneration"]) == ("mmm", (3,), True)
    assert (made["num_battles"], made["once"]) == (2, True) and "enemy_ai" not in made


def test_a_game_that_fails_ends_the_run(monkeypatch, capfd):
    """One sentence; what was learned is kept."""
    calls, collect = [], mappo.collect

    def collect_three(*args):
        calls.append(1)
        if len(calls) == 4:
            raise mappo.BattleError("The game is gone.")
        return collect(*args)

    monkeypatch.setattr(mappo, "collect", collect_three)
    assert mappo.main(tiny("run", 320)) == 1
    assert only_error(capfd.readouterr().err) == "error: The game is gone."
    assert index("run")[0]["timesteps"] == 48


# --- Evaluation -----------------------------------------------------------------------------------


def test_rows_of_the_table_and_films(capfd, monkeypatch):
    """A row per size, at the end also drawn actions and scripted policies in the same battles, and
    so many episodes as are expected are told; --eval-only says the same."""
    told = {}

    class Watched(harness.Evaluation):
        def close(self):
            told.update(expected=self.expected, played=self.played)
            super().close()

    monkeypatch.setattr(harness, "Evaluation", Watched)
    looks = ("--eval-every", 16, "--final-episodes", 3, "--capture-video", "--team-sizes", 3)
    run("run", 32, *looks)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    players = ("", " sampled", " random", " nearest", " focus", " retreat")
    assert list(results) == [f"{size}{player}" for size in (3, 5) for player in players]
    assert {row["episodes"] for row in results.values()} == {3}
    assert told == {"expected": 3 * 6 * 2 + 2, "played": 3 * 6 * 2 + 2}
    evals = [m for m in metrics("run") if "eval/3/win" in m]
    assert len(evals) == 2 and not any("random" in k or "sampled" in k for k in evals[0])
    names = {path.name for path in Path("run/videos").iterdir()}
    assert {"final-32-3.mp4", "final-32-5.mp4"} < names
    out = capfd.readouterr().out
    table = out[out.rindex("| who") :].strip()
    before = sorted(Path("run").rglob("*"))
    assert mappo.main(["--eval-only", "run", "--no-capture-video"]) == 0
    assert capfd.readouterr().out.strip().endswith(table)
    assert sorted(Path("run").rglob("*")) == before


def test_a_loaded_player_plays_as_the_run_does():
    """From a directory or a checkpoint, in battles of another size."""
    state = run("run", 64)
    agent = mappo.Agent(harness.saved_args("run", mappo.Args), worlds.family_of("sz"), CPU)
    harness.restore(agent, state["agent"], "run")
    earned = []
    players = [mappo.load_player(path) for path in ("run", "run/checkpoint-64.pt")]
    for policy in (mappo.Player(agent), *players):
        battles = Combat("sz", (5,), 8, seed=9, once=True)
        earned.append([episode.reward for episode in play(battles, policy)])
    assert earned[0] == earned[1] == earned[2]
    with pytest.raises(UsageError, match="There is no nowhere"):
        mappo.load_player("nowhere")


def test_players_forget_what_was_before_an_episode():
    """The same agents in the same battles do the same, whatever they played before."""
    s = setting()
    player, played = mappo.Player(s.agent), []
    for _ in range(2):
        s.battles.seed(3)
        played.append(play(s.battles, player))
    s.battles.seed(3)
    played.append(play(s.battles, mappo.Player(s.agent)))
    assert played[0] == played[1] == played[2] and float(player.hidden.abs().max()) > 0


@pytest.mark.long
def test_resource_collection(capfd):
    """The other world: its agents, things, table and scripts; 145 steps at most."""
    flags = ("--scenario", "resource", "--max-episode-steps", 150, "--final-episodes", 2)
    assert run("run", 290, *flags, "--log-every", 16)["timesteps"] == 290
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    players = ("", " sampled", " random", " forager", " collector")
    assert list(results) == [f"{size}{player}" for size in (3, 4, 5) for player in players]
    assert "picked up" in capfd.readouterr().out
    logged = set().union(*metrics("run"))
    assert "return" in logged and "win" not in logged


# --- Learning -------------------------------------------------------------------------------------


QUICK = "--preset cpu --rollout rounds --num-envs 64 --hidden-size 32"
QUICK += " --eval-team-sizes --max-episode-steps 60 --eval-every 0 --final-episodes 400"
QUICK += " --gamma .95 --minibatches 4 --total-timesteps 60000 --run-dir run --seed"


class OfTwo(combat.Family):
    """SZ with teams of two, smaller ones than its own."""

    def teams(self, sizes):
        return [(2, 0), (1, 1), (0, 2)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed, size", [(1, 3), (2, 3), (1, 2)])
def test_mappo_learns(seed, size, monkeypatch):
    """Against as many weak ones, 60,000 steps, some 20 CPU seconds: greedy agents (1.0, .97, 1.0)
    win more than those that only stand and shoot (.67, .67, .64), and than random ones."""
    if size == 2:
        monkeypatch.setitem(combat.FAMILIES, "sz", OfTwo(**vars(combat.FAMILIES["sz"])))
    monkeypatch.setattr(combat, "Combat", WeakEnemies)
    battles = WeakEnemies("sz", (size,), 400, seed=5, once=True, episode_limit=60)
    bar = summarise(play(battles, stand_and_shoot))["win"]
    assert mappo.main([*QUICK.split(), str(seed), "--team-sizes", str(size)]) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results[f"{size} random"]["win"] < 0.4 < 0.6 < bar < 0.75
    assert results[f"{size}"]["win_low"] > bar
