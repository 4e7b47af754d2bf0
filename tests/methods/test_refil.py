"""refil_smac.py against plain versions written from the specification, and as a whole: masks,
groups, mixers, targets, replay, resuming, flags, learning. What holds of any script that is built
so is also asked of its child collaq_smac.py, whose own tests are in test_collaq.py.

experiments/plain_refil.py is REFIL step by step in torch; numpy_mix() takes utilities as given and
mixes them with loops. Both read weights off the modules; everything else in them is written anew.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import harness
from harness import RunArgs, UsageError

import battle_tools as tools
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from battle_tools import (
    CPU,
    EFFECTS,
    QUICK,
    WeakEnemies,
    as_double,
    check_effect,
    check_seeds_of_evaluations,
    elsewhere,
    finite,
    forward_view,
    initial,
    nets,
    numpy_mix,
    permuted,
    read,
    resuming,
    run,
    sample,
    saved_replay,
    shape,
    sharpen,
    stacked,
    stand_and_shoot,
    tiny,
    watch_evaluations,
    weights_of,
)
from runs import ROOT, differences, exact, index, metrics, only_error, script, some_long, states

from envs.smac import combat, game, worlds
from envs.smac.combat import Combat
from envs.smac.episodes import play, summarise

sys.path.insert(0, str(ROOT / "experiments"))
from plain_refil import Folded, Plain, all_slots, episodes_of

refil, collaq = script("baselines.refil_smac"), script("baselines.collaq_smac")
EACH = pytest.mark.parametrize("module", [refil, collaq], ids=["refil", "collaq"])
MIXERS = ("", "--mixer linear")
MEMORIES = ("--own-beside", "--no-recurrent --own-beside")
EPISODE = 100_000  # bytes that one may take in a replay
__all__ = ["elsewhere"]  # a fixture of all tests here


# --- Settings -------------------------------------------------------------------------------------


setting = functools.partial(tools.setting, refil)
synthetic = functools.partial(tools.synthetic, refil)


def networks(flags="", width=9, actions=5, double=True):
    """A utility network and a mixer for synthetic features."""
    args = read(refil, f"--hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 {flags}")
    torch.manual_seed(1)
    utility, mixer = refil.Utility(width, actions, args), refil.Mixer(width, args)
    for net in (utility, mixer):
        sharpen(net)
        net.double() if double else None
    return utility, mixer


def groups_of(features, seed=3):
    return refil.draw_groups(features, torch.Generator().manual_seed(seed))


def q_of(utility, features, groups=None):
    """(V, M, A, actions)."""
    return stacked(utility(features, groups)[0])


def mix(mixer, q, features, groups=None):
    """(1 or 2, M) of q (V, M, A)."""
    return stacked(mixer(refil.Views(*q), features, groups))


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("imagine", [False, True])
def test_a_hidden_entity_changes_no_utility_and_gets_no_gradient(imagine):
    """At no time seen by agent 0, directly or in a group."""
    features, (utility, _) = as_double(synthetic()), networks()
    groups = groups_of(features) if imagine else None
    j = 6
    features.unseen[:, 0, j] = True
    x = features.entities.clone().requires_grad_()
    q = q_of(utility, features._replace(entities=x), groups)
    (gradient,) = torch.autograd.grad(q[:, :, 0].square().sum(), x)
    assert (gradient[:, j] == 0).all() and (gradient[:, 0] != 0).any()
    other = features.entities.clone()
    other[:, j] = 9.0
    changed = q_of(utility, features._replace(entities=other), groups)
    assert torch.equal(changed[:, :, 0], q[:, :, 0]) and not torch.equal(changed, q)


@pytest.mark.numeric
@pytest.mark.parametrize("flags", MIXERS)
@pytest.mark.parametrize("imagine", [False, True])
def test_empty_slots_change_nothing(flags, imagine):
    """Whatever stands there: no utility, no Q_tot, no gradient; and their utilities are 0."""
    features, (utility, mixer) = as_double(synthetic()), networks(flags)
    groups = groups_of(features) if imagine else None
    x = features.entities.clone().requires_grad_()
    now = features._replace(entities=x)
    q = q_of(utility, now, groups)
    assert (q[:, features.empty[:, :4]] == 0).all()
    total = mix(mixer, q[..., 1], now, groups)
    (gradient,) = torch.autograd.grad(total.square().sum(), x)
    assert (gradient[features.empty] == 0).all() and (gradient[~features.empty] != 0).any()
    other = torch.where(features.empty[..., None], torch.tensor(7.0), features.entities)
    again = features._replace(entities=other)
    assert torch.equal(mix(mixer, q_of(utility, again, groups)[..., 1], again, groups), total)


@pytest.mark.numeric
@pytest.mark.parametrize("flags", MIXERS)
@pytest.mark.parametrize("imagine", [False, True])
def test_permuting_entities_permutes_outputs(flags, imagine):
    """Agents among themselves and enemies among themselves; Q_tot stays."""
    features, (utility, mixer) = as_double(synthetic()), networks(flags)
    groups = groups_of(features) if imagine else None
    moved, mine, all_of = permuted(features)
    other = groups[:, all_of] if imagine else None
    q, p = q_of(utility, features, groups), q_of(utility, moved, other)
    assert torch.allclose(q[:, :, mine], p, atol=1e-12)
    assert not torch.allclose(q, p, atol=1e-3)
    total = mix(mixer, q[..., 1], features, groups)
    assert torch.allclose(total, mix(mixer, p[..., 1], moved, other), atol=1e-12)


@pytest.mark.numeric
def test_trimmed_slots_change_nothing(monkeypatch):
    """Features end at the last slot in use; with all 8 of a side the outputs are the same."""
    s = setting("--team-sizes 3")
    batch = sample(s, 1, 4)
    assert batch.features.unseen.shape[1:] == (3, 6)
    monkeypatch.setattr(refil, "slots_in_use", lambda empty: 8)
    full = sample(s, 1, 4)
    assert full.features.unseen.shape[1:] == (8, 16)
    q, p = q_of(s.agent.utility, batch.features), q_of(s.agent.utility, full.features)
    assert torch.allclose(q, p[:, :, :3], atol=1e-5)
    for flags in MIXERS:
        _, mixer = networks(flags, batch.features.entities.shape[-1], 14, double=False)
        a, b = mix(mixer, q[..., 1], batch.features), mix(mixer, p[..., 1], full.features)
        assert torch.allclose(a, b, atol=1e-4)


# --- Imagined groups ------------------------------------------------------------------------------


def test_groups_partition_entities():
    """Each pair of entities is in one group or is not: within and across show all of them, once.
    Groups last for an episode; their size has a p of its own."""
    features = synthetic(played=((1,) * 3,) * 5)
    groups = groups_of(features)
    every = groups.view(5, 3, 8)
    assert (every == every[:1]).all() and not (every[:, 0] == every[:, 1]).all()
    nothing = torch.zeros_like(features.unseen)
    full, across, within = refil.mask_views(nothing, groups).unbind(1)
    assert refil.Views._fields == ("full_view", "own_group", "other_group")
    assert not full.any() and (within ^ across).all()
    slot = torch.arange(4)
    assert not across[:, slot, slot].any(), "one is in one's own group"
    mask = refil.mask_views(features.unseen, groups)
    assert torch.equal(mask[:, 1], features.unseen | across)
    assert torch.equal(mask[:, 2], features.unseen | within)
    many = synthetic()._replace(played=torch.ones(1, 4000, dtype=torch.bool))
    share = groups_of(many).float().mean(1)
    assert abs(share.mean() - 0.5) < 0.02
    assert abs(share.var() - (1 / 12 + 1 / 6 / 8)) < 0.005, "Var(p) + E p (1 - p) / S"


@pytest.mark.numeric
@pytest.mark.parametrize("view, sees_own", [("own_group", True), ("other_group", False)])
def test_utilities_of_a_group_depend_on_that_group_only(view, sees_own):
    """Who looks at the other group still asks with its own features, as in REFIL."""
    features, (utility, _) = as_double(synthetic()), networks()
    groups = groups_of(features, 4)
    groups[:, 0], groups[:, 1] = True, False  # someone is in each
    for i in (0, 1):
        x = features.entities.clone().requires_grad_()
        q, _ = utility(features._replace(entities=x), groups)
        (gradient,) = torch.autograd.grad(getattr(q, view)[:, i].square().sum(), x)
        visible = (groups == groups[:, i : i + 1]) == sees_own
        visible[:, i] = True
        assert (gradient[~visible] == 0).all() and (gradient[visible] != 0).any()


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_a_product_of_two_layers_is_the_two_layers():
    """Of utilities and mixers: the same values and gradients one after the other."""
    _, (utility, mixer) = as_double(synthetic()), networks()
    x = torch.randn(5, 8, dtype=torch.float64)
    product = refil.apply_both(utility.project, utility.gru_input, x)
    both = (product, utility.gru_input(utility.project(x)))
    assert torch.allclose(*both, atol=1e-12)
    grads = [
        torch.autograd.grad(y.square().sum(), list(utility.project.parameters())) for y in both
    ]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads))
    assert mixer.project.shape[-1] == mixer.out.shape[1]  # numpy_hyper() takes them one by one


@pytest.mark.numeric
@pytest.mark.parametrize("flags", MIXERS)
def test_mixing_is_monotonic(flags):
    """dQ_tot / dQ_i >= 0 everywhere; of some, > 0."""
    features, (_, mixer) = as_double(synthetic()), networks(flags)
    groups, rng = groups_of(features), torch.Generator().manual_seed(0)
    for scale in (0.1, 10.0):
        for _ in range(20):
            q = scale * torch.randn(3, 8, 4, generator=rng, dtype=torch.float64)
            q.requires_grad_()
            for total in mix(mixer, q, features, groups):
                (gradient,) = torch.autograd.grad(total.sum(), q, retain_graph=True)
                assert (gradient >= 0).all() and (gradient > 0).any()


ACTIONS = 6 + 8  # of synthetic features with targets


def with_targets(seed=0):
    """Features of four agents and four enemies that have tags; enemies' are 0 to 7, agents' not."""
    features = as_double(synthetic(seed=seed, width=16 + 5))
    rng = torch.Generator().manual_seed(seed)
    features.entities[..., :16] = 0
    for m in range(len(features.entities)):
        for side, first in ((0, 8), (1, 0)):
            tags = torch.randperm(8, generator=rng)[:4] + first
            for j, tag in enumerate(tags):
                if not features.empty[m, 4 * side + j]:
                    features.entities[m, 4 * side + j, tag] = 1
    avail = torch.ones(*features.unseen.shape[:2], ACTIONS, dtype=torch.bool)
    return features._replace(avail_actions=avail)


@pytest.mark.numeric
def test_a_pointer_is_a_product_with_what_a_unit_is():
    """Utilities by loops over views, agents and units, of memory and embeddings as given: how much
    better a unit suits than those that the agent may choose and sees; not how well all suit."""
    features, (utility, _) = with_targets(), networks("--target-head pointer", 21, ACTIONS)
    may = torch.rand(features.avail_actions.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    features = features._replace(avail_actions=may)
    groups, seen, head = groups_of(features), [], utility.head
    head.register_forward_hook(lambda net, inputs, out: seen.append((inputs[0], out)))
    q = q_of(utility, features, groups).detach()
    ((memory, out),) = seen
    units = torch.relu(utility.embed(features.entities)).detach()
    mask = refil.mask_views(features.unseen, groups)
    tag = features.entities[..., :8]
    numbers = set()
    for m, v, i in np.ndindex(*memory.shape[:3]):
        x = memory[m, v, i].detach()
        expected = head.own(x).detach()
        expected = torch.cat((expected[:6], expected[6:].expand(8))).clone()
        scores = {}
        for j in range(8):
            action = 6 + int(tag[m, j].argmax())
            if tag[m, j].any() and not mask[m, v, i, j] and may[m, i, action]:
                score = head.query(x) @ head.key(units[m, j]) / 8**0.5
                scores[action] = score.detach()
        for action, score in scores.items():
            expected[action] += score - sum(scores.values()) / len(scores)
        numbers.add(len(scores))
        assert torch.allclose(out[m, v, i], expected, atol=1e-10)
        filled = not features.empty[m, i]
        assert torch.allclose(q[v, m, i], expected * filled, atol=1e-10)
    assert {0, 1, 2} < numbers


@pytest.mark.numeric
def test_attacking_a_hidden_unit_is_worth_the_same_whoever_it_is():
    """In groups' views, too: what a unit is like moves nothing that does not see it; and all hidden
    ones have one utility, as has one that is seen alone. Of several that are seen each has its own.
    """
    features, (utility, _) = with_targets(), networks("--target-head pointer", 21, ACTIONS)
    groups = groups_of(features)
    mask = refil.mask_views(features.unseen, groups)  # (M, V, A, S)
    q = q_of(utility, features, groups).movedim(0, 1)[..., 6:]  # (M, V, A, 8)
    seen = (~mask).double() @ features.entities[:, None, :, :8]
    assert ((seen > 0).sum(-1) > 1).any() and (seen == 0).any()
    for m, v, i in np.ndindex(*q.shape[:3]):
        if features.empty[m, i]:
            continue
        hidden, known = (q[m, v, i][seen[m, v, i] == x] for x in (0, 1))
        assert hidden.unique().numel() == 1
        own = len(known) if len(known) > 1 else 0  # utilities that are not those of hidden units
        assert torch.cat((known, hidden[:1])).unique().numel() == own + 1
    x = features.entities.clone().requires_grad_()
    q = utility(features._replace(entities=x), groups)[0].own_group
    for m, i, j in ((6, 0, 4), (6, 0, 5), (6, 1, 4)):  # the last moment: nobody remembers it
        u = 6 + int(features.entities[m, j, :8].argmax())
        (gradient,) = torch.autograd.grad(q[m, i, u], x, retain_graph=True)
        assert (gradient[m, j] == 0).all() == mask[m, 1, i, j]


# --- Losses in NumPy ------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("flags", MIXERS)
def test_losses_and_targets_are_those_of_numpy(flags, bootstrap):
    """Utilities as given; mixing, targets and both losses by loops over moments."""
    timeout = " --no-timeout-terminates" if bootstrap else ""
    flags += " --imagine-weight .3 --gamma .9 --max-episode-steps 30"
    s = setting(flags + timeout, rounds=2, double=True)
    e, batch = episodes_of(s, 7, 4), sample(s, 7, 4)
    features = as_double(batch.features)
    batch = batch._replace(features=features)
    groups, A = groups_of(features), features.unseen.shape[1]
    q = q_of(s.agent.utility, features, groups).detach()
    next_q = q_of(s.agent.target_utility, features)[0].detach()
    loss, scalars = refil.critic_loss(s.args, s.agent, batch, groups)
    found_y = refil.find_targets(s.args, s.agent, batch, q[0])
    p, target_p = weights_of(s.agent.mixer), weights_of(s.agent.target_mixer)
    moment = {tuple(tb): m for m, tb in enumerate(features.played.nonzero().tolist())}
    entities, empty = e.entities.double().numpy(), e.empty.numpy()
    gone = e.avail_actions[..., 0].numpy()
    mixed = functools.partial(numpy_mix, heads=2, linear=s.args.mixer == "linear")
    td, imagined, ys, cut = [], [], [], 0
    for t, b in e.played.nonzero().tolist():
        m, after = moment[t, b], moment[t + 1, b]
        may = e.avail_actions[t + 1, b]
        best = [int(np.where(may[i], q[0, after, i], -np.inf).argmax()) for i in range(A)]
        utilities = np.zeros(8)
        utilities[:A] = [next_q[after, i, best[i]] for i in range(A)]
        where = {"entities": entities[t + 1, b], "empty": empty[b], "gone": gone[t + 1, b]}
        later = mixed(target_p, q=utilities, **where)
        last = t + 1 == e.length[b]
        over = bool(e.terminated[t, b]) or (last and not bootstrap)
        cut += int(last and not e.terminated[t, b])
        ys.append(float(e.rewards[t, b]) + (0.0 if over else 0.9 * later))
        where = {"entities": entities[t, b], "empty": empty[b], "gone": gone[t, b]}
        mine = np.zeros((3, 8))
        mine[:, :A] = [[q[v, m, i, e.actions[t, b, i]] for i in range(A)] for v in range(3)]
        team = np.zeros(16, bool)
        team[:A], team[8 : 8 + A] = groups[m, :A], groups[m, A:]
        td.append((mixed(p, q=mine[0], **where) - ys[-1]) ** 2)
        imagined.append((mixed(p, q=mine[1:], groups=team, **where) - ys[-1]) ** 2)
    assert cut > 0, "some battles ran out of time"
    assert np.allclose(found_y, ys, atol=1e-9)
    assert np.isclose(scalars["td_loss"].item(), np.mean(td), rtol=1e-8)
    assert np.isclose(scalars["group_loss"].item(), np.mean(imagined), rtol=1e-8)
    assert np.isclose(loss.item(), 0.7 * np.mean(td) + 0.3 * np.mean(imagined), rtol=1e-8)
    alone = refil.critic_loss(s.args, s.agent, batch, None)[0]
    assert np.isclose(alone.item(), np.mean(td), rtol=1e-8), "AQMIX"


@pytest.mark.numeric
@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bootstrap", [False, True])
@EACH
def test_lambda_returns_are_sums_of_n_step_returns(module, bootstrap, td_lambda):
    """Of all lengths that a battle still has; with lambda 0 the bits of one-step returns."""
    flags = "--max-episode-steps 45 --team-sizes 5 --gamma .9"
    s = tools.setting(module, flags + " --no-timeout-terminates" * bootstrap, rounds=2)
    batch = sample(s, 7, 8)
    q = s.agent.utility(batch.features)[0]
    q = q if module is collaq else q.full_view
    one_step = module.find_targets(s.args, s.agent, batch, q)
    args = dataclasses.replace(s.args, returns="lambda", td_lambda=td_lambda)
    found = module.find_targets(args, s.agent, batch, q)
    values = (one_step - batch.rewards).double() / 0.9
    expected = forward_view(batch, values, torch.zeros_like(values), 0.9, td_lambda)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, one_step) == (td_lambda == 0)
    assert len(set(batch.features.played.sum(0).tolist())) > 2, "lengths differ"
    assert (batch.terminated.sum() < 8) == bootstrap


@EACH
def test_learning_rates_fall(module):
    """From --anneal-from on, linearly; as they are without --final-share."""
    args = read(module, "--final-share .2 --total-timesteps 1000 --learning-rate .01")
    later = dataclasses.replace(args, anneal_from=600)
    at = [0, 300, 600, 700, 1000, 1100]
    found = [[module.learning_rate_at(x, t) for t in at] for x in (args, later)]
    assert np.allclose(found[0], np.interp(at, [0, 1000], [0.01, 0.002]))
    assert np.allclose(found[1], np.interp(at, [600, 1000], [0.01, 0.002]))
    assert {module.learning_rate_at(module.Args(), t) for t in at} == {5e-4}


@pytest.mark.parametrize("flags", ["", "--optimiser adam"])
@EACH
def test_rates_fall_on_where_they_were(module, flags):
    """From a checkpoint on the way: the course is that of --total-timesteps."""
    flags = [*flags.split(), "--final-share", ".1", "--anneal-from", "20", "--returns", "lambda"]
    run(module, "whole", 96, *flags, "--save-every", 48, "--log-every", 16)
    shutil.copytree("whole", "cut")
    assert module.main(resuming("cut/checkpoint-48.pt", 96)) == 0
    assert differences(exact("whole"), exact("cut")) == [] and metrics("whole") == metrics("cut")
    rates = [line["learning_rate"] for line in metrics("whole")]
    expected = np.interp([0, 16, 32, 48, 64, 80], [20, 96], [5e-4, 5e-5])
    assert np.allclose(rates, expected)


LEARNERS = ["baselines.refil_smac", "baselines.collaq_smac", "mipi_refil_smac"]


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("every", [5, 6])
def test_targets_are_copied_once_at_each_multiple(name, every, monkeypatch):
    """Of --target-every episodes: both networks, behind the updates of the round, of two episodes,
    that reached it, and not again behind the next one."""
    module, rounds, copied = script(name), [], []
    update, copy = module.update, module.Agent.copy_to_targets

    def updating(args, agent, buffer, rng):
        rounds.append(buffer.episodes)
        return update(args, agent, buffer, rng)

    def copying(agent):
        copied.append(rounds[-1])
        copy(agent)
        for net in ("utility", "mixer"):
            ours, target = (getattr(agent, x).state_dict() for x in (net, f"target_{net}"))
            assert differences(dict(ours), dict(target)) == []

    monkeypatch.setattr(module, "update", updating)
    monkeypatch.setattr(module.Agent, "copy_to_targets", copying)
    run(module, "run", 144, "--target-every", every)
    assert rounds == list(range(2, 2 * len(rounds) + 1, 2)) and len(rounds) > 8
    assert copied == [n for n in rounds if n // every > (n - 2) // every]


# --- The learner against plain ones ---------------------------------------------------------------


def gradients(loss, agent):
    return torch.autograd.grad(loss, list(agent.critic().parameters()))


@pytest.mark.numeric
@pytest.mark.parametrize("imagine", [True, False])
@pytest.mark.parametrize("flags", [*MIXERS, *MEMORIES])
@pytest.mark.parametrize("scenario", ["sz", "mmm"])
def test_learner_equals_plain_ones(flags, imagine, scenario):
    """Loss and gradients in fp32, over chunks of time and teams of several sizes; the loss that is
    arranged as the authors' code is, too."""
    s = setting(f"--scenario {scenario} --team-sizes 4 5 6 {flags}", rounds=3, noise=0.5)
    e, batch = episodes_of(s, 3, 6), sample(s, 3, 6)
    features = batch.features
    assert len(features.played) > 30 and len(set(e.length.tolist())) > 2
    assert features.unseen.shape[1] == 6 and len(set(e.empty.sum(1).tolist())) > 1
    groups = groups_of(features) if imagine else None
    loss, _ = refil.critic_loss(s.args, s.agent, batch, groups)
    full = all_slots(groups, features, 6) if imagine else None
    plain = Plain(s.args, s.agent).loss(e, full)
    assert torch.allclose(loss, plain, rtol=1e-4, atol=1e-5)
    if imagine:
        assert torch.allclose(Folded(s.args, s.agent).loss(e, full), plain, rtol=1e-4, atol=1e-5)
    mine, theirs = gradients(loss, s.agent), gradients(plain, s.agent)
    for (name, _), a, b in zip(s.agent.critic().named_parameters(), mine, theirs):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max()))), name
        assert (a != 0).any(), name


def test_only_learning_networks_get_gradients():
    s = setting()
    batch = s.buffer.sample(s.rng, 4)
    loss, _ = refil.critic_loss(s.args, s.agent, batch, groups_of(batch.features))
    loss.backward()
    for net in (s.agent.utility, s.agent.mixer):
        assert all(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
    for net in (s.agent.target_utility, s.agent.target_mixer):
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.numeric
def test_bf16_is_close():
    """Autocast changes the loss a little; utilities and targets stay fp32."""
    s = setting(noise=0.3)
    batch = s.buffer.sample(s.rng, 6)
    groups = groups_of(batch.features)
    exactly, _ = refil.critic_loss(s.args, s.agent, batch, groups)
    s.agent.amp = True
    rounded, _ = refil.critic_loss(s.args, s.agent, batch, groups)
    assert rounded.dtype == torch.float32 and not torch.equal(exactly, rounded)
    assert abs(rounded - exactly) < 0.05 * exactly
    a, b = gradients(exactly, s.agent), gradients(rounded, s.agent)
    flat = [torch.cat([x.flatten() for x in y]) for y in (a, b)]
    assert F.cosine_similarity(*flat, dim=0) > 0.95


# --- Replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, ends", [("", True), ("--no-timeout-terminates", False)])
def test_no_bootstrap_at_time_out_by_default(flags, ends):
    s = setting(f"--max-episode-steps 5 {flags}", rounds=2)
    batch = sample(s, 1, 6)
    last = batch.features.played[2:].any(1).nonzero().shape[0] + 1
    assert last == 5, "nobody can win in five steps"
    assert batch.terminated.view(5, 6)[-1].all() == ends
    assert not batch.terminated.view(5, 6)[:-1].any()
    y = refil.find_targets(s.args, s.agent, batch, q_of(s.agent.utility, batch.features)[0])
    same = y == batch.rewards
    assert (same.view(5, 6)[-1] == ends).all() and not same.view(5, 6)[:-1].any()


def test_replay_gives_back_what_was_seen_and_done(monkeypatch):
    """Entities with last actions, masks, available actions, rewards, ends; where it wraps."""
    s, seen, done = setting("--buffer-size 10 --batch-size 4", rounds=0), [], []
    step = s.battles.step

    def watched(actions):
        now = [x.clone() for x in s.battles.obs]
        seen.append((now, s.battles.over, actions.clone()))
        result = step(actions)
        done.append((result.reward.clone(), result.terminated.clone()))
        return result

    monkeypatch.setattr(s.battles, "step", watched)
    for _ in range(4):  # 16 episodes in 10 places
        seen.clear(), done.clear()
        refil.collect(s.battles, refil.Player(s.agent, 1.0, s.rng), s.buffer)
    monkeypatch.undo()
    places = [(12 + b) % 10 for b in range(4)]
    monkeypatch.setattr(refil.torch, "randperm", lambda n, generator: torch.tensor(places))
    batch = s.buffer.sample(s.rng, 4)
    monkeypatch.undo()
    length = torch.tensor([int(sum(not over[b] for _, over, _ in seen)) for b in range(4)])
    order = torch.sort(length, descending=True, stable=True).indices.tolist()
    features, A = batch.features, batch.features.unseen.shape[1]
    slots = [*range(A), *range(8, 8 + A)]
    moments = features.played.nonzero().tolist()
    assert len(moments) == int(length.sum()) + 4 and len(batch.now) == int(length.sum())
    for k, m in enumerate(batch.now.tolist()):
        t, place = moments[m]
        b = order[place]
        assert moments[batch.later[k]] == [t + 1, place]
        (entities, obs_mask, entity_mask, avail), over, actions = seen[t]
        assert not over[b]
        before = seen[t - 1][2][b, :A] if t else None
        acted = F.one_hot(before, 14) if t else torch.zeros(A, 14)
        expected = torch.cat((entities[b, slots], torch.cat((acted, torch.zeros(A, 14)))), -1)
        assert torch.equal(features.entities[m], expected)
        assert torch.equal(features.unseen[m], obs_mask[b, :A][:, slots])
        assert torch.equal(features.empty[m], entity_mask[b, slots])
        assert torch.equal(features.avail_actions[m], avail[b, :A])
        assert torch.equal(batch.actions[k], actions[b, :A])
        assert batch.rewards[k] == done[t][0][b]
        last = t + 1 == length[b]
        assert batch.terminated[k] == (done[t][1][b] | last)


@pytest.mark.parametrize("windows", ["whole", "clipped"])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_windows_are_parts_of_episodes(bootstrap, windows):
    """Entities with last actions, actions, rewards and ends are those of the episode at that time;
    all windows of an episode are drawn, none longer, shorter only where the episode is or, if
    clipped, where it begins or ends."""
    flags = "--max-episode-steps 12 --replay-window 5" + " --no-timeout-terminates" * bootstrap
    s = setting(f"{flags} --windows {windows}", rounds=2)
    store, n = s.buffer, s.battles.family.n_actions
    store.fixed["length"][:2] = torch.tensor([3, 7])  # as if two had ended early
    when = torch.arange(store.steps["rewards"].numel())
    store.steps["rewards"][:] = when.view_as(store.steps["rewards"])  # says where and when it was
    ends, seen = store.fixed["length"][:8].tolist(), set()

    @functools.cache
    def observed(episode, time):
        snapshot = {name: x[episode, time][None] for name, x in store.states.items()}
        snapshot |= {name: store.fixed[name][episode][None] for name in s.battles.fixed}
        return s.battles.observe(s.battles.snapshot._replace(**snapshot))

    for seed in range(150):
        batch = sample(s, seed, 6)
        features, A = batch.features, batch.features.unseen.shape[1]
        places = features.played.nonzero().tolist()
        steps = features.played[1:].sum(0).tolist()
        of = {}  # place in the minibatch -> episodes
        for k, m in enumerate(batch.now.tolist()):
            t, b = places[m]
            assert places[batch.later[k]] == [t + 1, b]
            episode, time = divmod(int(batch.rewards[k]), 12)
            first = of.setdefault(b, (episode, time - t))
            assert first == (episode, time - t), "one episode, on end"
            assert torch.equal(batch.actions[k], store.steps["actions"][episode, time, :A].long())
            assert batch.terminated[k] == (not bootstrap and time == ends[episode] - 1)
            before = store.steps["actions"][episode, time - 1, :A].long()
            acted = F.one_hot(before, n) if time else torch.zeros(A, n)
            assert torch.equal(features.entities[m, :A, -n:], acted)
            obs = observed(episode, time)
            assert torch.equal(features.entities[m, :A, :-n], obs.entities[0, :A])
            assert torch.equal(features.unseen[m, :, :A], obs.obs_mask[0, :A, :A])
        assert len({episode for episode, _ in of.values()}) == 6
        seen |= {(*first, steps[b]) for b, first in of.items()}
    for episode, end in enumerate(ends):
        starts = range(max(end - 5, 0) + 1) if windows == "whole" else range(-4, end)
        spans = {(max(t, 0), min(t + 5, end)) for t in starts}
        found = {(t, t + n) for e, t, n in seen if e == episode}
        assert found == spans, episode


@pytest.mark.parametrize("windows", ["whole", "clipped"])
def test_how_often_a_step_is_drawn(windows):
    """By enumeration of the windows: clipped ones have each step equally often, whole ones the
    first and the last step a fifth as often as one that is five steps from both."""
    args = read(refil, f"--replay-window 5 --windows {windows}")
    for end in (1, 3, 5, 12):
        ends = torch.full((40_000,), end)
        rng = torch.Generator().manual_seed(end)
        start, length = refil.draw_windows(args, ends, rng)
        assert start.min() >= 0 and length.min() >= 1 and (start + length).max() == end
        time = torch.arange(end)[:, None]
        share = ((start <= time) & (time < start + length)).float().mean(1)  # (end,)
        starts = range(max(end - 5, 0) + 1) if windows == "whole" else range(-4, end)
        have = [sum(t <= step < t + 5 for t in starts) for step in range(end)]
        assert share.tolist() == pytest.approx([n / len(starts) for n in have], abs=0.015)
        assert (len(set(have)) == 1) == (windows == "clipped" or end < 6)


@pytest.mark.numeric
def test_lambda_returns_of_windows():
    """The window's last step bootstraps from the value that follows it: at the end of the episode,
    too, unless time out ends it."""
    flags = "--max-episode-steps 9 --replay-window 4 --gamma .9 --returns lambda --td-lambda .6"
    ends = 0
    for timeout in ("", " --no-timeout-terminates"):
        s = setting(flags + timeout, rounds=2)
        for seed in range(4):
            batch = sample(s, seed, 8)
            q = s.agent.utility(batch.features)[0].full_view
            y = refil.find_targets(s.args, s.agent, batch, q).view(4, 8)
            args = dataclasses.replace(s.args, returns="one-step")
            one_step = refil.find_targets(args, s.agent, batch, q).view(4, 8)
            rewards, last = batch.rewards.view(4, 8), batch.terminated.view(4, 8)
            assert torch.allclose(y[-1], one_step[-1], atol=1e-6)
            for t in (2, 1, 0):
                # y_t = r_t + gamma ((1 - l) V_t+1 + l y_t+1)
                mixed = rewards[t] + 0.4 * (one_step[t] - rewards[t]) + 0.6 * 0.9 * y[t + 1]
                assert torch.allclose(y[t], mixed, rtol=1e-4, atol=1e-4)
            assert torch.equal(one_step[-1] == rewards[-1], last[-1])
            ends += int(last.sum())
            assert not (timeout and last.any())
    assert ends > 0


@pytest.mark.numeric
def test_lambda_returns_of_clipped_windows():
    """Sums of n-step returns, in windows of different lengths."""
    flags = "--max-episode-steps 9 --replay-window 4 --windows clipped --gamma .9 --returns lambda"
    s = setting(flags + " --td-lambda .6", rounds=2)
    batch = sample(s, 3, 8)
    q = s.agent.utility(batch.features)[0].full_view
    found = refil.find_targets(s.args, s.agent, batch, q)
    one_step = refil.find_targets(
        dataclasses.replace(s.args, returns="one-step"), s.agent, batch, q
    )
    values = (one_step - batch.rewards).double() / 0.9
    expected = forward_view(batch, values, torch.zeros_like(values), 0.9, 0.6)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert len(set(batch.features.played.sum(0).tolist())) > 2, "lengths differ"


def test_a_refilled_replay_is_the_same():
    """Whatever was in it before, and where it goes on; nothing of padding is saved."""
    s, other = setting("--buffer-size 10"), setting("--buffer-size 10 --seed 3", rounds=1)
    filled = {name: x.clone() for name, x in s.buffer.filled().items()}
    assert len(filled["rewards"]) == int(filled["length"].sum()) < 10 * 60
    other.buffer.refill(filled)
    assert other.buffer.episodes == s.buffer.episodes == 16 and other.buffer.size == 10
    assert differences(filled, other.buffer.filled()) == []
    a, b = (x.sample(torch.Generator().manual_seed(4), 6) for x in (s.buffer, other.buffer))
    assert differences(a.features._asdict(), b.features._asdict()) == []
    assert differences(a._replace(features=0)._asdict(), b._replace(features=0)._asdict()) == []


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--target-head pointer", *MEMORIES])
def test_replay_equals_stepping(flags, monkeypatch):
    """The utilities that a battle was played by, step by step, are those of the learner."""
    s, seen = setting(flags, rounds=0, noise=0.5), []
    forward = s.agent.utility.forward

    def watched(features, groups=None, hidden=None):
        q, hidden = forward(features, groups, hidden)
        seen.append(q.full_view)
        return q, hidden

    monkeypatch.setattr(s.agent.utility, "forward", watched)
    refil.collect(s.battles, refil.Player(s.agent, 0.3, s.rng), s.buffer)
    monkeypatch.undo()
    order = s.buffer.fixed["length"][:4].argsort(descending=True, stable=True)
    monkeypatch.setattr(refil.torch, "randperm", lambda n, generator: torch.arange(4))
    batch = s.buffer.sample(s.rng, 4)
    monkeypatch.undo()
    q = q_of(s.agent.utility, batch.features)[0]
    assert len(seen) > 30, "longer than a chunk of time"
    for m, (t, b) in enumerate(batch.features.played.nonzero().tolist()):
        if t < len(seen):
            assert torch.allclose(q[m], seen[t][order[b]], atol=1e-4)


@EACH
def test_players_forget_what_was_before_an_episode(module):
    """The same agents in the same battles do the same, whatever they played before."""
    s = tools.setting(module, rounds=0)
    player, played = module.Player(s.agent), []
    for _ in range(2):
        s.battles.seed(3)
        played.append(play(s.battles, player))
    s.battles.seed(3)
    played.append(play(s.battles, module.Player(s.agent)))
    assert played[0] == played[1] == played[2]
    hidden = player.hidden if module is collaq else [player.hidden]
    assert all(float(x.abs().max()) > 0 for x in hidden)


@EACH
def test_memories_of_players_begin_with_an_episode(module):
    """All of them, behind its first moment, are those of players that have played nothing."""
    s = tools.setting(module, rounds=0)
    player, fresh = module.Player(s.agent), module.Player(s.agent)
    s.battles.seed(3)
    play(s.battles, player)
    before = player.hidden
    s.battles.seed(3)
    s.battles.reset()
    assert torch.equal(player(s.battles), fresh(s.battles))
    assert differences({"hidden": player.hidden}, {"hidden": fresh.hidden}) == []
    assert differences({"hidden": player.hidden}, {"hidden": before})


@EACH
def test_actions_are_greedy_but_for_epsilon(module):
    """Best available ones; random ones are available and spread evenly."""
    s = tools.setting(module, rounds=0)
    s.battles.reset()
    rng = torch.Generator().manual_seed(0)
    greedy = module.Player(s.agent)(s.battles)
    avail, there = s.battles.obs.avail, ~s.battles.obs.entity_mask[:, :8]
    tries = torch.stack([module.Player(s.agent, 0.5, rng)(s.battles) for _ in range(400)])
    assert avail.gather(-1, tries.movedim(0, -1)).all() and (tries[:, ~there] == 0).all()
    choices = avail.sum(-1)[there].double()
    expected = 0.5 + 0.5 / choices
    share = (tries == greedy)[:, there].double().mean(0)
    assert (share - expected).abs().max() < 0.12 and abs((share - expected).mean()) < 0.02


def test_bytes_of_an_episode():
    s = setting("--max-episode-steps 150 --buffer-size 16", rounds=1)
    stores = (s.buffer.fixed, s.buffer.states, s.buffer.steps)
    size = sum(x[0].numel() * x.element_size() for store in stores for x in store.values())
    assert size < EPISODE


def test_epsilon_falls_and_stays():
    args = refil.Args(epsilon_start=0.9, epsilon_final=0.1, epsilon_steps=100)
    found = [refil.epsilon_at(args, t) for t in (0, 50, 100, 1000)]
    assert np.allclose(found, [0.9, 0.5, 0.1, 0.1])


@EACH
def test_epsilon_falls_by_steps_of_the_environment(module):
    """The logged value is that of the last round: of the steps that were made before it."""
    flags = ("--log-every", 1, "--epsilon-start", 0.9, "--epsilon-final", 0.1)
    run(module, "run", 64, *flags, "--epsilon-steps", 100)
    lines = [x for x in metrics("run") if "epsilon" in x]
    before = [0, *(x["timesteps"] for x in lines)][: len(lines)]
    assert len(lines) > 2 and lines[-1]["timesteps"] > 40
    expected = [0.9 - 0.8 * min(t / 100, 1) for t in before]
    assert [x["epsilon"] for x in lines] == pytest.approx(expected, abs=1e-9)


# --- Same seed, same bits -------------------------------------------------------------------------


@EACH
def test_same_seed_same_bits(module):
    """Another seed changes every network, the generator, and what is logged."""
    a, b, c = (
        run(module, run_dir, 64, "--log-every", 32, "--eval-every", 64, "--seed", seed)
        for run_dir, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert differences(a, b) == [] and differences(saved_replay("a"), saved_replay("b")) == []
    assert metrics("a") == metrics("b") != metrics("c") and len(metrics("a")) == 3
    changed = {name.split("/")[2] for name in differences(a, c) if name.startswith("/agent")}
    assert changed == set(a["agent"]) and "/ranks/0/rng" in differences(a, c)


MODES = {
    "refil, replay wraps": "",
    "linear, another family": "--mixer linear --scenario mmm",
    "bootstrap, bf16": "--no-timeout-terminates --amp --scenario csz --target-every 4",
    "resource collection": "--scenario resource --no-imagine",
    "pointer": "--target-head pointer --scenario mmm",
    "windows": "--replay-window 3 --returns lambda --no-timeout-terminates",
    "clipped windows": "--replay-window 3 --windows clipped --returns lambda",
}
CHILD = {
    "collaq, replay wraps": "",
    "collaq, pointer": "--target-head pointer",
    "collaq, linear, bf16, another family": "--mixer linear --scenario mmm --amp",
    "collaq, windows, resource collection": "--replay-window 3 --scenario resource --egocentric",
    "collaq, sum of two, resource collection": "--no-subtract-alone --scenario resource",
}


@pytest.mark.parametrize(
    "mode",
    some_long(
        MODES | CHILD,
        "linear",
        "bootstrap",
        "resource",
        "pointer",
        "collaq, pointer",
        "collaq, sum",
        "collaq, linear",
    ),
)
def test_half_and_resumed_is_whole(mode):
    """Stopped twice, before the first update and later, between lines of the log, which are the
    same, too."""
    module = collaq if mode in CHILD else refil
    flags = [*(MODES | CHILD)[mode].split(), "--log-every", "48", "--batch-size", "4"]
    run(module, "whole", 128, *flags)
    run(module, "cut", 10, *flags)
    assert exact("cut")["timesteps"] == 16
    assert module.main(resuming("cut", 70)) == 0
    assert module.main(resuming("cut", 128)) == 0
    whole, cut = exact("whole"), exact("cut")
    assert whole["timesteps"] == 128 and int(saved_replay("whole")["episodes"]) == 16
    assert differences(whole, cut) == []
    assert differences(saved_replay("whole"), saved_replay("cut")) == []
    assert len(saved_replay("cut")["length"]) == 6
    assert differences(nets(initial("whole")), nets(whole))
    logged = metrics("whole")
    assert logged == metrics("cut") and len(logged) == 2
    assert {"return/3", "td_loss", "epsilon"} <= set(logged[1])


@EACH
def test_looking_at_a_run_changes_nothing(module):
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generator."""
    looks = ("--log-every", 16, "--save-every", 16, "--eval-every", 48, "--final-episodes", 1)
    a, b = run(module, "plain", 64), run(module, "looks", 64, *looks)
    assert len(metrics("looks")) == 4 + 1 + 1
    for state in (a, b):  # since the last line
        del state["ranks"][0]["log"], state["ranks"][0]["noted"]
    assert differences(a, b) == []
    assert differences(saved_replay("plain"), saved_replay("looks")) == []


@pytest.mark.parametrize(
    "module, poison",
    [(refil, float("nan")), (refil, float("inf")), (collaq, float("nan"))],
    ids=["refil-nan", "refil-inf", "collaq-nan"],
)
def test_a_reward_that_is_not_finite(module, poison, monkeypatch, capfd):
    """The run ends and names it; replays, statistics and weights of all checkpoints are finite, and
    it goes on from the newest one. Whether or not the update draws the episode."""
    calls, step = [], Combat.step

    def poisoned(battles, actions):
        result = step(battles, actions)
        calls.append(1)
        if len(calls) == 43:  # in the sixth round
            result.reward[0] = poison
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Combat, "step", poisoned)
        assert module.main(tiny("run", 400, "--save-every", 16, "--log-every", 48)) == 1
    assert "rewards is not finite" in only_error(capfd.readouterr().err)
    assert [entry["timesteps"] for entry in index("run")] == [80, 64]
    for entry, state in zip(index("run"), states("run")):
        assert finite(state) and finite(saved_replay("run", entry))
    assert module.main(resuming("run", 128)) == 0
    run(module, "whole", 128, "--save-every", 16, "--log-every", 48)
    assert differences(exact("run"), exact("whole")) == [] and metrics("run") == metrics("whole")


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # with words that the sentence has to contain
    "--team-sizes 2": "3 to 8 2",
    "--scenario zerg --team-sizes 4 9": "zerg 3 to 8 9",
    "--team-sizes 3 --eval-team-sizes 9": "9",
    "--team-sizes --eval-team-sizes 9": "9",
    "--team-sizes": "--team-sizes empty",
    "--hidden-size 10": "--hidden-size --heads",
    "--batch-size 33 --buffer-size 32": "--batch-size --buffer-size",
    "--num-envs 50 --buffer-size 40": "--num-envs --buffer-size",
    "--backend sc2 --enemy-ai focus": "--enemy-ai --backend sim",
    "--game-version 4.10.0": "--game-version --backend sc2",
    "--backend sc2 --scenario resource": "--scenario resource --backend sc2",
    "--scenario resource --team-sizes 9": "1 to 8 9",
    "--scenario resource --enemy-ai focus": "--enemy-ai battles --scenario resource",
    "--scenario resource --clip-regeneration": "--clip-regeneration battles",
    "--scenario resource --env-threads 2": "--env-threads --backend sim",
    "--backend sc2 --env-threads 2": "--env-threads --backend sim",
    "--rescale": "--rescale --scenario resource",
    "--egocentric": "--egocentric --scenario resource",
    "--replay-window -1": "--replay-window",
    "--windows clipped": "--windows --replay-window",
    "--windows clipped --replay-window 1": "--windows --replay-window",
    "--max-episode-steps 1001": "--max-episode-steps 1000",
    "--scenario resource --max-episode-steps 500": "--scenario resource 145 steps",
    "--no-imagine --imagine-weight .3": "--imagine-weight --imagine",
    "--td-lambda .5": "--td-lambda --returns lambda",
    "--returns lambda --replay-window 1": "--returns lambda --replay-window",
    "--scenario resource --target-head pointer": "--target-head tags",
    "--optimiser adam --rmsprop-eps .1": "--rmsprop-eps --optimiser rmsprop",
    "--anneal-from 10": "--anneal-from --final-share",
    "--final-share .5 --anneal-from 10 --total-timesteps 10": "--anneal-from --total-timesteps",
}


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_what_would_do_something_else_than_it_says(line, words):
    with pytest.raises(UsageError) as error:
        read(refil, line)
    assert [word for word in words.split() if word not in str(error.value)] == []


def test_threads_are_not_given_to_a_run_that_has_no_use_for_them():
    args = dataclasses.replace(refil.Args(), scenario="resource", resume="run", env_threads=4)
    own = dataclasses.asdict(refil.Args())
    for threads, wrong in ((1, True), (4, False)):  # 4: begun before they were refused
        found = worlds.wrong_to_continue(args, own | {"env_threads": threads})
        assert [text for bad, text in found if bad] == wrong * [
            "--env-threads is for battles of --backend sim"
        ]


def test_a_run_goes_on_with_as_many_battles():
    own = dataclasses.asdict(refil.Args())
    args = dataclasses.replace(refil.Args(), resume="run", num_envs=4)
    found = worlds.wrong_to_continue(args, own)
    assert [text for bad, text in found if bad] == ["run is a run with --num-envs 8"]


def test_an_evaluation_has_no_flags_that_its_world_ignores():
    """A version of the game in the simulator; a run in the game may be evaluated in either."""
    args = dataclasses.replace(refil.Args(), eval_only="run", num_envs=4)
    own = dataclasses.asdict(refil.Args())
    assert not any(bad for bad, _ in worlds.wrong_to_continue(args, own))
    found = worlds.wrong_to_continue(dataclasses.replace(args, game_version="4.10.0"), own)
    assert [text for bad, text in found if bad] == ["--game-version is for --backend sc2"]
    played = own | {"backend": "sc2", "game_version": "4.10.0"}
    for flags in ({}, {"backend": "sc2", "game_version": "4.6.2"}):
        later = dataclasses.replace(args, **({"game_version": "4.10.0"} | flags))
        assert not any(bad for bad, _ in worlds.wrong_to_continue(later, played))


def test_a_fork_may_have_other_defaults():
    """What is refused beside another flag is a value that was typed."""

    @dataclasses.dataclass(frozen=True)
    class Forked(refil.Args):
        td_lambda: float = 0.9
        imagine_weight: float = 0.3
        rmsprop_eps: float = 1e-6

    module = type(refil)("fork")
    module.__dict__.update(vars(refil) | {"Args": Forked})
    validate = types.FunctionType(refil.validate.__code__, vars(module))
    for flags in ({}, {"imagine": False}, {"optimiser": "adam"}):
        assert not any(bad for bad, _ in validate(Forked(**flags)))
    assert any(bad for bad, _ in validate(Forked(td_lambda=0.8)))


def test_an_evaluation_alone_needs_no_replay():
    args = refil.Args(num_envs=6000)
    assert "--num-envs exceeds --buffer-size" in [x for bad, x in refil.validate(args) if bad]
    args = dataclasses.replace(args, eval_only="run")
    assert not any(bad for bad, _ in refil.validate(args))


@pytest.mark.parametrize("source", ["resume", "eval_only"])
def test_threads_of_a_saved_run_are_no_error(source):
    """One begun before they were refused, or one that is evaluated in the game."""
    threads = {"env_threads": 2, source: "run"}
    args = dataclasses.replace(refil.Args(), scenario="resource", **threads)
    assert not any(wrong for wrong, _ in worlds.wrong_flags(args))
    args = dataclasses.replace(refil.Args(), backend="sc2", **threads)
    assert not any(wrong for wrong, _ in worlds.wrong_flags(args))


@EACH
def test_a_run_goes_on_in_its_own_backend(module, capfd):
    """Evaluated it may be elsewhere."""
    run(module, "run", 16)
    assert module.main(resuming("run", 32, "--backend", "sc2")) == 2
    assert "--backend sim" in only_error(capfd.readouterr().err)


def test_help_says_what_is_the_worlds():
    """Names stand in the script, so that --help needs no world."""
    assert refil.Args().max_episode_steps == combat.EPISODE_LIMIT
    most = read(refil, f"--max-episode-steps {worlds.LONGEST}").max_episode_steps
    assert f"at most {most}" in inspect.getsource(refil.Args)
    hints = {field.name: field.type for field in dataclasses.fields(refil.Args)}
    for kind in combat.EnemyAI.__args__:
        assert repr(kind) in hints["enemy_ai"]
    (line,) = re.findall("    scenario: .*", inspect.getsource(refil.Args))
    assert set(re.findall(r"\w+", line)) >= {*combat.FAMILIES, "resource"}


@EACH
def test_presets(module):
    """The one for CPUs sets its flags, others override it wherever they stand."""
    assert read(module, "") == module.Args() == read(module, "--preset paper")
    cpu = read(module, "--preset cpu")
    flags = module.PRESETS["cpu"] | module.PRESETS.get("cpu regularizer mi", {})
    assert cpu == dataclasses.replace(module.Args(), preset="cpu", **flags)
    assert read(module, "--hidden-size 32 --preset cpu") == dataclasses.replace(cpu, hidden_size=32)
    flags = module.PRESETS["cpu"] | module.PRESETS["cpu scenario resource"]
    collects = dataclasses.replace(module.Args(), preset="cpu", scenario="resource", **flags)
    assert read(module, "--preset cpu --scenario resource") == collects
    assert collects.rescale and not collects.timeout_terminates and collects.replay_window


# --- Flags ----------------------------------------------------------------------------------------

OWN = {
    "mixer": ("--mixer linear", shape("mixer", "out"), ((4, 8, 3), (2, 8, 3))),
    "hidden_size": ("--hidden-size 12", shape("mixer", "project"), ((4, 8, 8), (4, 12, 12))),
    "mixing_size": ("--mixing-size 6", shape("mixer", "out_bias"), ((4, 3), (4, 6))),
}
ELSEWHERE = {
    "td_lambda": "test_lambda_returns_are_sums_of_n_step_returns",
    "windows": "test_how_often_a_step_is_drawn",
    "amp": "test_amp",
    "compile": "test_compile",
    "rescale": "test_rescaled_worlds",
    "egocentric": "test_rescaled_worlds",
    **dict.fromkeys(
        ("backend", "game_version", "enemy_ai", "clip_regeneration", "env_threads"),
        "test_flags_of_battles",
    ),
}


def test_every_flag_is_tested():
    own = {x.name for x in dataclasses.fields(refil.Args)}
    own -= {x.name for x in dataclasses.fields(RunArgs)}  # tests/harness
    assert own == set(EFFECTS) | set(OWN) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(refil, run_dir, 64, "--final-episodes", 1), run_dir


@pytest.mark.parametrize("field", [*EFFECTS, *OWN])
def test_flag_changes_what_it_names(field, plain, tmp_path):
    run_script = functools.partial(run, refil)
    check_effect((EFFECTS | OWN)[field], plain, tmp_path / "run", run_script)


def test_imagined_groups_are_drawn_unless_switched_off():
    run(refil, "refil", 32, "--log-every", 16)
    run(refil, "aqmix", 32, "--log-every", 16, "--no-imagine")
    logged = [{k for m in metrics(x) for k in m} for x in ("refil", "aqmix")]
    assert logged[0] - logged[1] == {"group_loss"} and "td_loss" in logged[1]


@pytest.mark.parametrize("fast", [True, False])
@EACH
def test_amp(module, fast, monkeypatch):
    """bf16 where the hardware has it, else nothing; args.json says which."""
    plain = run(module, "plain", 32)
    monkeypatch.setattr(module, "has_bf16", lambda device: fast)
    amp = run(module, "amp", 32, "--amp")
    assert bool(differences(plain["agent"], amp["agent"])) == fast
    assert json.loads(Path("amp/args.json").read_text())["resolved"]["amp"] == fast


def test_flags_of_battles(monkeypatch):
    """They reach the simulator, or the adapter of the real game."""
    args = read(refil, "--enemy-ai focus --clip-regeneration --env-threads 2")
    battles = refil.make_envs(args, (3,), 4, 9)
    assert battles.rules.enemy_ai == 2 and battles.rules.clip_regeneration and battles.rules.once
    assert len(battles.spans) == 2 and battles.setup.seed == 9 and battles.rules.limit == 150
    plain = refil.make_envs(read(refil, ""), (3,), 4, 9)
    assert plain.rules.enemy_ai == 0 and not plain.rules.clip_regeneration
    assert len(plain.spans) == 1
    made = {}

    def make_battles(**options):
        made.update(options)
        return battles

    monkeypatch.setattr(game, "make_battles", make_battles)
    flags = "--backend sc2 --game-version 4.6.2 --scenario mmm --clip-regeneration"
    args = read(refil, flags)
    assert refil.make_envs(args, (3,), 2, 9) is battles and made["game_version"] == "4.6.2"
    assert (made["scenario"], made["team_sizes"], made["clip_regeneration"]) == ("mmm", (3,), True)
    assert (made["num_battles"], made["once"]) == (2, True) and "enemy_ai" not in made


def test_a_game_that_fails_ends_the_run(monkeypatch, capfd):
    """One sentence, where it cannot be begun or not be played on; what was learned is kept."""

    def fails(*args, **options):
        raise refil.BattleError("The game is gone.")

    with monkeypatch.context() as patch:
        patch.setattr(game, "make_battles", fails)
        assert refil.main(tiny("a", 32, "--backend", "sc2")) == 2
    assert only_error(capfd.readouterr().err) == "error: The game is gone."
    calls, collect = [], refil.collect

    def collect_three(*args):
        calls.append(1)
        return collect(*args) if len(calls) < 4 else fails()

    monkeypatch.setattr(refil, "collect", collect_three)
    assert refil.main(tiny("b", 320)) == 1
    assert only_error(capfd.readouterr().err) == "error: The game is gone."
    assert index("b")[0]["timesteps"] == 48


@EACH
def test_compile(module, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, dynamic: compiled.append(type(net).__name__)
    )
    a = run(module, "plain", 32)
    assert compiled == []
    b = run(module, "compiled", 32, "--compile")
    utility = "CollaborativeUtility" if module is collaq else "Utility"
    assert sorted(compiled) == sorted(["Mixer", "Mixer", utility, utility])
    assert differences(nets(a), nets(b)) == []


@pytest.mark.long
def test_no_compiler_is_told_in_a_sentence():
    """On a machine whose compiler does not start; torch asks for it when a network first acts."""
    command = [sys.executable, refil.__file__, *tiny("run", 32, "--compile", "--device", "cpu")]
    env = os.environ | {
        "CXX": "/no/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(Path("cache").resolve()),
    }
    found = subprocess.run(command, env=env, capture_output=True, text=True)
    sentence = "--compile needs a C++ compiler, and none works here ($CXX, or g++)."
    assert found.returncode == 1 and only_error(found.stderr) == f"error: {sentence}"


@pytest.mark.slow  # torch's compiler
@pytest.mark.timeout(900)
def test_compiled_networks_learn_the_same():
    a, b = run(refil, "plain", 64), run(refil, "compiled", 64, "--compile")
    for name, net in nets(b).items():
        for key, x in net.items():
            torch.testing.assert_close(a["agent"][name][key], x, atol=1e-4, rtol=1e-3)


# --- Evaluation -----------------------------------------------------------------------------------


@EACH
def test_rows_of_the_table(module, capfd):
    """A row per size, at the end also of scripted policies in the same battles."""
    run(module, "run", 32, "--eval-every", 16, "--eval-episodes", 2, "--final-episodes", 3)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    players = ("", " random", " nearest", " focus", " retreat")
    assert list(results) == [f"{size}{player}" for size in (3, 4, 5) for player in players]
    assert {row["episodes"] for row in results.values()} == {3}
    for row in results.values():
        assert 0 <= row["win_low"] <= row["win"] <= row["win_high"] <= 1
    out = capfd.readouterr().out
    assert "3 nearest" in out and "win rate" in out
    evals = [m for m in metrics("run") if "eval/3/win" in m]
    assert len(evals) == 2 and {"eval/4/return", "eval/5/win_low"} <= set(evals[0])
    assert not any("random" in k for k in evals[0])


def test_an_evaluation_says_how_far_it_is(monkeypatch):
    """So many episodes as are expected are told, one by one as they end."""
    told = {"expected": 0, "played": 0}

    class Watched(harness.Evaluation):
        def close(self):
            told.update(expected=self.expected, played=self.played)
            super().close()

    monkeypatch.setattr(harness, "Evaluation", Watched)
    run(refil, "run", 16, "--final-episodes", 3)
    assert told == {"expected": 3 * 5 * 3, "played": 3 * 5 * 3}


def test_films():
    """One of each size with an evaluation."""
    flags = ("--capture-video", "--final-episodes", 1, "--team-sizes", 3, "--eval-team-sizes", 4)
    run(refil, "run", 16, *flags)
    names = sorted(path.name for path in Path("run/videos").iterdir())
    assert names == ["final-16-3.mp4", "final-16-4.mp4"]


@pytest.mark.long
@EACH
def test_resource_collection(module, capfd):
    """The other world: its agents, things, table and scripts; 145 steps at most."""
    flags = ["--scenario", "resource", "--max-episode-steps", 150, "--final-episodes", 2]
    run(module, "run", 290, *flags, "--log-every", 16, "--batch-size", 2)
    replay = saved_replay("run")
    assert replay["length"].tolist() == [145, 145] and replay["resources"].shape[1:] == (6, 2)
    assert set(replay["present"].sum(1).tolist()) <= {3, 4}
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    players = ("", " random", " forager", " collector")
    assert list(results) == [f"{size}{player}" for size in (3, 4, 5) for player in players]
    assert "picked up" in capfd.readouterr().out
    logged = set().union(*metrics("run"))
    assert "return" in logged and "win" not in logged
    s = tools.setting(module, "--scenario resource")
    features = s.buffer.sample(s.rng, 6).features
    A = features.unseen.shape[1]
    assert features.entities.shape[1:] == (A + 8, 23 + 6)
    assert not features.empty[:, -1].any(), "home is last"


@EACH
def test_rescaled_worlds(module):
    """--rescale and --egocentric reach worlds, replay and networks."""
    for flags, width in (("", 23), ("--rescale", 23), ("--egocentric", 35)):
        s = tools.setting(module, f"--scenario resource --max-episode-steps 30 {flags}", rounds=2)
        entities = sample(s, 1, 4).features.entities
        assert entities.shape[-1] == width + 6
        assert (entities[..., 2:4].abs().amax() > 1.5) == (flags == "--rescale")
        earned = s.buffer.steps["rewards"][:8, :30].abs().max()
        assert earned > 0 and (earned < 1.5) == (flags == "--rescale")
        assert entities[..., 23:-6].any() == (flags == "--egocentric")
        embed = getattr(s.agent.utility, "alone", s.agent.utility).embed
        assert embed.in_features == width + 6


@EACH
def test_evaluation_alone_repeats(module, capfd):
    """The same figures as at the run's end, from its directory or its checkpoint; nothing else is
    written. Other sizes may be asked for."""
    run(module, "run", 32, "--final-episodes", 3)
    before, first = sorted(Path("run").rglob("*")), capfd.readouterr().out
    table = first[first.index("| who") :].strip()
    for source in ("run", "run/checkpoint-32.pt"):
        assert module.main(["--eval-only", source]) == 0
        assert capfd.readouterr().out.strip().endswith(table)
    other = ["--eval-team-sizes", "8", "--final-episodes", "2"]
    assert module.main(["--eval-only", "run", *other]) == 0
    assert "| 8 retreat" in capfd.readouterr().out
    assert sorted(Path("run").rglob("*")) == before


def test_everybody_meets_the_same_battles(monkeypatch):
    """One battle per episode, of one size, begun by the same seed for all, another for each size.
    One seed for all sizes would give them nearly the same mixes (test_combat)."""
    made, make_envs = [], refil.make_envs

    def watched(args, sizes, num_envs, seed, **where):
        made.append((sizes, num_envs, seed))
        return make_envs(args, sizes, num_envs, seed, **where)

    monkeypatch.setattr(refil, "make_envs", watched)
    run(refil, "run", 16, "--final-episodes", 3)
    assert made[0] == ((3, 4), 2, 1)
    assert [x[:2] for x in made[1:]] == [((size,), 3) for size in (3, 4, 5) for _ in range(5)]
    check_seeds_of_evaluations([(None, sizes, seed) for sizes, _, seed in made[1:]])


@EACH
def test_the_row_without_a_name_is_the_greedy_policy(module, monkeypatch):
    """The run's, without exploration, in battles of a seed of their size's own, not the run's."""
    met = watch_evaluations(module, monkeypatch)
    run(module, "run", 16, "--final-episodes", 2)
    own = [policy for policy, *_ in met if isinstance(policy, module.Player)]
    assert len(own) == 3
    check_seeds_of_evaluations(met)
    for policy in own:
        assert policy.rng is None and policy.epsilon == 0
        utility = dict(policy.agent.utility.state_dict())
        assert differences(utility, exact("run")["agent"]["utility"]) == []


@EACH
def test_a_loaded_player_plays_as_the_run_does(module):
    """From a directory or a checkpoint, in battles of another size."""
    state = run(module, "run", 64)
    args = harness.saved_args("run", module.Args)
    agent = module.Agent(args, worlds.family_of("sz"), CPU)
    harness.restore(agent, state["agent"], "run")
    earned = []
    for policy in (
        module.Player(agent),
        module.load_player("run"),
        module.load_player("run/checkpoint-64.pt"),
    ):
        battles = Combat("sz", (5,), 8, seed=9, once=True)
        earned.append([episode.reward for episode in play(battles, policy)])
    assert earned[0] == earned[1] == earned[2]
    with pytest.raises(UsageError, match="There is no nowhere"):
        module.load_player("nowhere")


@EACH
def test_a_loaded_player_is_not_compiled(module, monkeypatch):
    """--compile is for training: who loads a run on a CPU may have no compiler."""
    run(module, "run", 16)
    args = dataclasses.replace(harness.saved_args("run", module.Args), compile=True)
    monkeypatch.setattr(module, "saved_args", lambda path, cls: args)
    assert module.load_player("run").agent.utility._compiled_call_impl is None


# --- Learning -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_refil_learns(seed, monkeypatch):
    """Three against three weak ones, 18,000 steps, some 57 seconds: greedy agents (.85, .83, .74 at
    seeds 1, 2, 3) win more than those that only stand and shoot (.67), and than random ones."""
    monkeypatch.setattr(combat, "Combat", WeakEnemies)
    battles = WeakEnemies("sz", (3,), 400, seed=5, once=True, episode_limit=60)
    bar = summarise(play(battles, stand_and_shoot))["win"]
    argv = [*QUICK.split(), "--total-timesteps", "18000", "--seed", str(seed), "--run-dir", "run"]
    assert refil.main(argv) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["3 random"]["win"] < 0.4 < 0.6 < bar < 0.75
    assert results["3"]["win_low"] > bar


@pytest.mark.parametrize(
    "name", ["mipi_refil_smac", "baselines.refil_smac", "baselines.collaq_smac"]
)
def test_players_refuse_battles_that_begin_singly(name):
    """They would go on with the last actions, and the memory, of a battle that is over."""
    module = importlib.import_module(name)
    agent = module.Agent(module.Args(preset="cpu"), worlds.family_of("sz"), CPU)
    battles, player = Combat("sz", (3,), num_battles=2, seed=1), module.Player(agent)
    battles.reset()
    with pytest.raises(ValueError, match="begin together"):
        for _ in range(200):
            battles.step(player(battles))
    together = Combat("sz", (3,), num_battles=2, seed=1, once=True)
    for _ in range(2):
        assert len(play(together, player)) == 2
