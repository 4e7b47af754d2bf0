"""refil_smac.py against plain versions written from the specification, and as a whole: masks,
groups, mixers, targets, replay, resuming, flags, learning.

`Plain` is REFIL step by step in torch: all 16 slots, padded time, one mask and one hypernetwork at
a time. The NumPy part takes utilities as given and mixes them with loops. Both read weights off the
modules; everything else in them is written anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import io
import json
import math
import os
import re
import shlex
import signal
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ROOT, differences, exact, index, metrics, not_finite, only_error, script, states
from toolbox import sharpen

from envs.smac.combat import SIDE, Combat, Snapshot
from envs.smac.episodes import focus, play, summarise

NAME = "baselines.refil_smac"
refil = script(NAME)
CPU = torch.device("cpu")
MIXERS = ("", "--mixer linear", "--mixer linear --mask-empty-slots")
EPISODE = 100_000  # bytes that one may take in a replay


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were; one thread."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Listing the installed packages for args.json takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refil, "distributions", lambda: [])
        yield


def tiny(run_dir, steps, *flags):
    """The command line of a run of some environment steps, at most 16 an iteration."""
    argv = "--num-envs 2 --batch-size 2 --buffer-size 6 --updates-per-iteration 1 --hidden-size 8"
    argv += " --heads 2 --rnn-size 4 --mixing-size 3 --max-episode-steps 8 --team-sizes 3 4"
    argv += " --eval-team-sizes 5 --eval-every 0 --eval-episodes 2 --final-episodes 0"
    argv += " --save-every 0 --log-every 1000000"
    own = ("--total-timesteps", steps, "--run-dir", run_dir, *flags)
    return [str(x) for x in (*argv.split(), *own)]


def resuming(run_dir, steps, *flags):
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", steps, *flags)]


def run(run_dir, steps, *flags):
    """A whole run; its last checkpoint."""
    assert refil.main(tiny(run_dir, steps, *flags)) == 0
    return exact(run_dir)


def initial(run_dir):
    return torch.load(Path(run_dir) / "checkpoint-0.pt", weights_only=True)


def saved_replay(run_dir, state=None):
    """The replay beside the newest checkpoint or another one, held against its sha256."""
    entry = (state or states(run_dir)[0])["replay"]
    data = (Path(run_dir) / entry["name"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return torch.load(io.BytesIO(data), weights_only=True)


# --- Settings -------------------------------------------------------------------------------------


def setting(flags="", rounds=4, double=False, epsilon=1.0, noise=1.0):
    """A replay of random battles and an agent far from its beginning, targets away from it."""
    small = "--hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 --buffer-size 40"
    small += " --num-envs 4 --batch-size 6 --max-episode-steps 60 "
    args = refil.parse((small + flags).split())
    battles = refil.make_envs(args, args.team_sizes, args.num_envs, args.seed)
    agent = refil.Agent(args, battles.family, CPU)
    for k, net in enumerate((agent.utility, agent.mixer, agent.target_utility, agent.target_mixer)):
        sharpen(net, noise, k)
    replay, rng = refil.Replay(args, battles, CPU), torch.Generator().manual_seed(5)
    for _ in range(rounds):
        refil.collect(agent, replay, epsilon, rng)
    if double:
        for part in agent.parts().values():
            if isinstance(part, torch.nn.Module):
                part.double()
    return SimpleNamespace(args=args, battles=battles, agent=agent, replay=replay, rng=rng)


def as_double(view):
    return view._replace(entities=view.entities.double())


def synthetic(seed=0, played=((1, 1, 1), (1, 1, 1), (1, 1, 0)), A=4, filled=(4, 3, 2), features=9):
    """A view of random entities: T x 3 moments of battles with so many units a side."""
    rng = torch.Generator().manual_seed(seed)
    played = torch.tensor(played, dtype=torch.bool)
    battle = played.nonzero()[:, 1]
    M, slot = len(battle), torch.arange(A)
    side = slot >= torch.tensor(filled)[battle][:, None]
    empty = torch.cat((side, side), 1)
    unseen = torch.rand(M, A, 2 * A, generator=rng) < 0.4
    unseen |= empty[:, None]
    unseen[:, slot, slot] = False
    avail = torch.rand(M, A, 5, generator=rng) < 0.6
    avail[..., 0] = side
    avail[..., 1] = ~side
    entities = torch.randn(M, 2 * A, features, generator=rng)
    return refil.View(entities, unseen, empty, avail, played)


def networks(flags="", features=9, actions=5, double=True):
    """A utility network and a mixer for synthetic views."""
    args = refil.parse(f"--hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 {flags}".split())
    torch.manual_seed(1)
    utility, mixer = refil.Utility(features, actions, args), refil.Mixer(features, args)
    for net in (utility, mixer):
        sharpen(net)
        net.double() if double else None
    return utility, mixer


def groups_of(view, seed=3):
    return refil.draw_groups(view, torch.Generator().manual_seed(seed))


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("imagine", [False, True])
def test_a_hidden_entity_changes_no_utility_and_gets_no_gradient(imagine):
    """At no time seen by agent 0, directly or in a group."""
    view, (utility, _) = as_double(synthetic()), networks()
    groups = groups_of(view) if imagine else None
    j = 6
    view.unseen[:, 0, j] = True
    x = view.entities.clone().requires_grad_()
    q, _ = utility(view._replace(entities=x), groups)
    (gradient,) = torch.autograd.grad(q[:, :, 0].square().sum(), x)
    assert (gradient[:, j] == 0).all() and (gradient[:, 0] != 0).any()
    other = view.entities.clone()
    other[:, j] = 9.0
    changed, _ = utility(view._replace(entities=other), groups)
    assert torch.equal(changed[:, :, 0], q[:, :, 0]) and not torch.equal(changed, q)


@pytest.mark.parametrize("flags", MIXERS)
@pytest.mark.parametrize("imagine", [False, True])
def test_empty_slots_change_nothing(flags, imagine):
    """Whatever stands there: no utility, no Q_tot, no gradient; and their utilities are 0."""
    view, (utility, mixer) = as_double(synthetic()), networks(flags)
    groups = groups_of(view) if imagine else None
    x = view.entities.clone().requires_grad_()
    now = view._replace(entities=x)
    q, _ = utility(now, groups)
    assert (q.movedim(1, 0)[:, :, :, 0].movedim(1, 2)[view.empty[:, :4]] == 0).all()
    total = mixer(q[..., 1], now, groups)
    (gradient,) = torch.autograd.grad(total.square().sum(), x)
    assert (gradient[view.empty] == 0).all() and (gradient[~view.empty] != 0).any()
    other = torch.where(view.empty[..., None], torch.tensor(7.0), view.entities)
    again = view._replace(entities=other)
    assert torch.equal(mixer(utility(again, groups)[0][..., 1], again, groups), total)


@pytest.mark.parametrize("flags", MIXERS)
@pytest.mark.parametrize("imagine", [False, True])
def test_permuting_entities_permutes_outputs(flags, imagine):
    """Agents among themselves and enemies among themselves; Q_tot stays."""
    view, (utility, mixer) = as_double(synthetic()), networks(flags)
    groups = groups_of(view) if imagine else None
    mine, all_of = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1, 5, 7, 6, 4])
    moved = refil.View(
        view.entities[:, all_of],
        view.unseen[:, mine][:, :, all_of],
        view.empty[:, all_of],
        view.avail[:, mine],
        view.played,
    )
    other = groups[:, all_of] if imagine else None
    q, p = utility(view, groups)[0], utility(moved, other)[0]
    assert torch.allclose(q[:, :, mine], p, atol=1e-12)
    assert not torch.allclose(q, p, atol=1e-3)
    total = mixer(q[..., 1], view, groups)
    assert torch.allclose(total, mixer(p[..., 1], moved, other), atol=1e-12)


def test_trimmed_slots_change_nothing():
    """Views end at the last slot in use; with all 8 of a side the outputs are the same."""
    s = setting("--team-sizes 3")
    batch = s.replay.sample(torch.Generator().manual_seed(1), 4)
    assert batch.view.unseen.shape[1:] == (3, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refil.Tensor, "max", lambda x: torch.tensor(7), raising=True)
        full = s.replay.sample(torch.Generator().manual_seed(1), 4)
    assert full.view.unseen.shape[1:] == (8, 16)
    q, _ = s.agent.utility(batch.view)
    p, _ = s.agent.utility(full.view)
    assert torch.allclose(q, p[:, :, :3], atol=1e-6)
    for flags in MIXERS:
        _, mixer = networks(flags, batch.view.entities.shape[-1], 14, double=False)
        a, b = mixer(q[..., 1], batch.view), mixer(p[..., 1], full.view)
        assert torch.allclose(a, b, atol=1e-5)


# --- Imagined groups ------------------------------------------------------------------------------


def test_groups_partition_entities():
    """Each pair of entities is in one group or is not: within and across show all of them, once.
    Groups last for an episode; their size has a p of its own."""
    view = synthetic(played=((1,) * 3,) * 5)
    groups = groups_of(view)
    every = groups.view(5, 3, 8)
    assert (every == every[:1]).all() and not (every[:, 0] == every[:, 1]).all()
    nothing = torch.zeros_like(view.unseen)
    full, within, across = refil.in_views(nothing, groups).unbind(1)
    assert not full.any() and (within ^ across).all()
    slot = torch.arange(4)
    assert not within[:, slot, slot].any(), "one is in one's own group"
    mask = refil.in_views(view.unseen, groups)
    assert torch.equal(mask[:, 1], view.unseen | within)
    assert torch.equal(mask[:, 2], view.unseen | across)
    many = refil.View(*synthetic()[:4], torch.ones(1, 4000, dtype=torch.bool))
    share = groups_of(many).float().mean(1)
    assert abs(share.mean() - 0.5) < 0.02
    assert abs(share.var() - (1 / 12 + 1 / 6 / 8)) < 0.005, "Var(p) + E p (1 - p) / S"


@pytest.mark.parametrize("which, sees_own", [(1, True), (2, False)])
def test_utilities_of_a_group_depend_on_that_group_only(which, sees_own):
    """Who looks at the other group still asks with its own features, as in REFIL."""
    view, (utility, _) = as_double(synthetic()), networks()
    groups = groups_of(view, 4)
    groups[:, 0], groups[:, 1] = True, False  # someone is in each
    for i in (0, 1):
        x = view.entities.clone().requires_grad_()
        q, _ = utility(view._replace(entities=x), groups)
        (gradient,) = torch.autograd.grad(q[which][:, i].square().sum(), x)
        visible = (groups == groups[:, i : i + 1]) == sees_own
        visible[:, i] = True
        assert (gradient[~visible] == 0).all() and (gradient[visible] != 0).any()


# --- Mixers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", MIXERS)
def test_mixing_is_monotonic(flags):
    """dQ_tot / dQ_i >= 0 everywhere; of some, > 0."""
    view, (_, mixer) = as_double(synthetic()), networks(flags)
    groups, rng = groups_of(view), torch.Generator().manual_seed(0)
    for scale in (0.1, 10.0):
        for _ in range(20):
            q = scale * torch.randn(3, 8, 4, generator=rng, dtype=torch.float64)
            q.requires_grad_()
            for total in mixer(q, view, groups):
                (gradient,) = torch.autograd.grad(total.sum(), q, retain_graph=True)
                assert (gradient >= 0).all() and (gradient > 0).any()


def numpy_softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def weights_of(net):
    return {name: p.detach().double().numpy() for name, p in net.named_parameters()}


def numpy_hyper(p, g, heads, entities, empty, mask):
    """One hypernetwork for one moment: entities (16, D), mask (8, 16) -> (8, E), 0 if empty."""
    H = p["out"].shape[-1]
    rows = slice(g * H, (g + 1) * H)
    x = np.maximum(entities @ p["first.weight"][rows].T + p["first.bias"][rows], 0)
    found = np.zeros((8, p["last"].shape[-1]))
    d = H // heads
    for i in range(8):
        if empty[i]:
            continue
        parts = []
        for h in range(heads):
            of = slice(h * d, (h + 1) * d)
            query = x[i] @ p["attention.query"][g][:, of]
            seen = [j for j in range(16) if not mask[i, j]]
            keys = x[seen] @ p["attention.pair"][g][:, of]
            values = x[seen] @ p["attention.pair"][g][:, H:][:, of]
            share = numpy_softmax(keys @ query / np.sqrt(d)) if seen else np.zeros(0)
            parts.append(share @ values if seen else np.zeros(d))
        y = np.concatenate(parts) @ p["out"][g] + p["out_bias"][g]
        found[i] = y @ p["last"][g] + p["last_bias"][g]
    return found


def numpy_mix(p, args, q, entities, empty, gone, groups=None):
    """Q_tot of q (8,), or of (2, 8) with groups (16,): own group, other group."""
    full = empty[:8, None] | empty[None]
    masks = [full]
    if groups is not None:
        apart = groups[:8, None] != groups[None]
        masks = [full | apart, full | ~apart]
    hyper = functools.partial(numpy_hyper, p, heads=args.heads, entities=entities, empty=empty)
    w = np.concatenate([hyper(0, mask=m) for m in masks])  # (8 or 16, E)
    v = hyper(1, mask=full).mean()
    q = q.reshape(-1)
    if args.mixer == "linear":
        score, out = w.mean(-1), np.tile(gone, len(masks))
        score[out] = 0.0
        if args.mask_empty_slots:
            score = np.where(out & ~out.all(), -np.inf, score)
        return numpy_softmax(score) @ q + v
    final, b = hyper(2, mask=full).mean(0), hyper(3, mask=full).mean(0)
    x = q @ numpy_softmax(w) + b
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) @ numpy_softmax(final) + v


class Episodes(typing.NamedTuple):
    """What a minibatch is made of, padded, with all slots: (T + 1 or T, B, ...)."""

    entities: torch.Tensor  # with the last actions
    unseen: torch.Tensor  # (T + 1, B, 8, 16)
    empty: torch.Tensor  # (B, 16)
    avail: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor  # raw
    length: torch.Tensor

    @property
    def filled(self):
        return torch.arange(len(self.rewards))[:, None] < self.length


def episodes_of(s, seed, size):
    """The minibatch that Replay.sample() takes for a seed, from what the replay stores."""
    chosen = torch.randperm(s.replay.size, generator=torch.Generator().manual_seed(seed))[:size]
    length = s.replay.fixed["length"][chosen]
    chosen = chosen[torch.sort(length, descending=True, stable=True).indices]
    length = s.replay.fixed["length"][chosen]
    T, n = int(length.max()), s.battles.family.n_actions
    times = []
    for t in range(T + 1):
        now = {k: x[chosen, t].contiguous() for k, x in s.replay.states.items()}
        fixed = {k: s.replay.fixed[k][chosen] for k in ("type", "tag")}
        obs = s.battles.observe(Snapshot(**now, **fixed))
        last = torch.zeros(size, 16, n)
        if t:
            acted = s.replay.steps["actions"][chosen, t - 1].long()
            last[:, :8] = torch.eye(n)[acted]
        entities = torch.cat((obs.entities, last), -1)
        times.append((entities, obs.obs_mask[:, :8], obs.entity_mask, obs.avail))
    entities, unseen, empty, avail = (torch.stack(x) for x in zip(*times))
    steps = [x[chosen, :T].transpose(0, 1) for x in s.replay.steps.values()]
    return Episodes(entities, unseen, empty[0], avail, steps[0].long(), *steps[1:], length)


def spread(x, filled):
    """(K, ...) of a Batch -> (T, B, ...), 0 where nothing was played."""
    full = torch.zeros(*filled.shape, *x.shape[1:], dtype=x.dtype)
    full[filled] = x
    return full


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("flags", MIXERS)
def test_losses_and_targets_are_those_of_numpy(flags, bootstrap):
    """Utilities as given; mixing, targets and both losses by loops over moments."""
    timeout = " --no-timeout-terminates" if bootstrap else ""
    flags += " --imagine-weight .3 --gamma .9 --max-episode-steps 30"
    s = setting(flags + timeout, rounds=2, double=True)
    e, batch = episodes_of(s, 7, 4), s.replay.sample(torch.Generator().manual_seed(7), 4)
    view = as_double(batch.view)
    batch = batch._replace(view=view)
    groups, A = groups_of(view), view.unseen.shape[1]
    q = s.agent.utility(view, groups)[0].detach()
    next_q = s.agent.target_utility(view)[0][0].detach()
    loss, scalars = refil.losses(s.args, s.agent, batch, groups)
    found_y = refil.find_targets(s.args, s.agent, batch, q[0])
    p, target_p = weights_of(s.agent.mixer), weights_of(s.agent.target_mixer)
    moment = {tuple(tb): m for m, tb in enumerate(view.played.nonzero().tolist())}
    entities, empty = e.entities.double().numpy(), e.empty.numpy()
    gone = e.avail[..., 0].numpy()
    mixed = functools.partial(numpy_mix, args=s.args)
    td, imagined, ys, cut = [], [], [], 0
    for t, b in e.filled.nonzero().tolist():
        m, after = moment[t, b], moment[t + 1, b]
        best = [
            int(np.where(e.avail[t + 1, b, i], q[0, after, i], -np.inf).argmax()) for i in range(A)
        ]
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
    plain = refil.losses(s.args, s.agent, batch, None)[0]
    assert np.isclose(plain.item(), np.mean(td), rtol=1e-8), "AQMIX"


# --- The learner against a plain one --------------------------------------------------------------


class Plain:
    """REFIL's loss as one would write it first: a step at a time, a mask at a time."""

    def __init__(self, args, agent):
        self.args, self.agent = args, agent

    def attention(self, x, query, pair, mask):
        """x (B, 16, H), mask (B, 8, 16) -> (B, 8, H)."""
        H, heads = x.shape[-1], self.args.heads
        parts = (x[:, :8] @ query, *(x @ pair).chunk(2, -1))
        query, key, value = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in parts)
        scores = query @ key.transpose(-1, -2) / math.sqrt(H // heads)
        weights = scores.masked_fill(mask[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ value).transpose(1, 2).flatten(2)

    def utilities(self, net, e, mask):
        """(T + 1, B, 8, actions) for mask (T + 1, B, 8, 16)."""
        B, agents = len(e.empty), e.empty[:, :8, None]
        hidden, found = torch.zeros(B * 8, net.gru.hidden_size), []
        cell = (net.gru.weight_ih_l0, net.gru.weight_hh_l0, net.gru.bias_ih_l0, net.gru.bias_hh_l0)
        for t in range(len(e.entities)):
            x = F.relu(net.first(e.entities[t]))
            query, pair = net.attention.query[0], net.attention.pair[0]
            x = net.out(self.attention(x, query, pair, mask[t])).masked_fill(agents, 0.0)
            x = F.relu(net.second(x)).flatten(0, 1)
            hidden = torch.gru_cell(x, hidden, *cell)
            found.append(net.last(hidden).view(B, 8, -1).masked_fill(agents, 0.0))
        return torch.stack(found)

    def hyper(self, net, g, entities, empty, mask):
        H = self.args.hidden_size
        rows = slice(g * H, (g + 1) * H)
        x = F.relu(F.linear(entities, net.first.weight[rows], net.first.bias[rows]))
        x = self.attention(x, net.attention.query[g], net.attention.pair[g], mask)
        x = (x @ net.out[g] + net.out_bias[g]).masked_fill(empty[:, :8, None], 0.0)
        return (x @ net.last[g] + net.last_bias[g]).masked_fill(empty[:, :8, None], 0.0)

    def mix(self, net, q, e, t, groups=None):
        """Q_tot (B,) of q (B, 8), or with groups (B, 16) of (B, 16)."""
        full = e.empty[:, :8, None] | e.empty[:, None]
        masks = [full]
        if groups is not None:
            apart = groups[:, :8, None] != groups[:, None]
            masks = [full | apart, full | ~apart]
        hyper = lambda g, mask: self.hyper(net, g, e.entities[t], e.empty, mask)  # noqa: E731
        w, v = torch.cat([hyper(0, mask) for mask in masks], 1), hyper(1, full).mean((1, 2))
        if self.args.mixer == "linear":
            gone = e.avail[t, :, :, 0].repeat(1, len(masks))
            weights = w.mean(-1).masked_fill(gone, net.empty_score).softmax(-1)
            return (weights * q).sum(-1) + v
        final, b = hyper(2, full).mean(1), hyper(3, full).mean(1)
        x = F.elu((q[..., None] * w.softmax(-1)).sum(1) + b)
        return (x * final.softmax(-1)).sum(-1) + v

    def loss(self, e, groups):
        """groups (B, 16) or None."""
        agent, args, masks = self.agent, self.args, [e.unseen]
        if groups is not None:
            apart = groups[:, :8, None] != groups[:, None]
            masks += [e.unseen | apart, e.unseen | ~apart]
        qs = [self.utilities(agent.utility, e, mask) for mask in masks]
        target_q = self.utilities(agent.target_utility, e, e.unseen)
        best = qs[0].detach().masked_fill(~e.avail, -math.inf).argmax(-1, keepdim=True)
        chosen = [q[:-1].gather(-1, e.actions[..., None])[..., 0] for q in qs]
        td, imagined, T = [], [], len(e.rewards)
        for t in range(T):
            next_q = target_q[t + 1].gather(-1, best[t + 1])[..., 0]
            later = self.mix(agent.target_mixer, next_q, e, t + 1)
            over = e.terminated[t]
            if args.timeout_terminates:
                over = over | (t + 1 == e.length)
            y = (e.rewards[t] + args.gamma * later * ~over).detach()
            td.append(self.mix(agent.mixer, chosen[0][t], e, t) - y)
            if groups is not None:
                both = torch.cat((chosen[1][t], chosen[2][t]), -1)
                imagined.append(self.mix(agent.mixer, both, e, t, groups) - y)
        mean = lambda x: (torch.stack(x).square() * e.filled).sum() / e.filled.sum()  # noqa: E731
        if groups is None:
            return mean(td)
        weight = args.imagine_weight
        return (1 - weight) * mean(td) + weight * mean(imagined)


def gradients(loss, agent):
    return torch.autograd.grad(loss, list(agent.learning().parameters()))


def all_slots(groups, view, size):
    """(M, S) of a view -> (B, 16); who is not there: anything."""
    first, A = groups[: view.played.shape[1]], view.unseen.shape[1]
    full = torch.zeros(size, 16, dtype=torch.bool)
    full[:, :A], full[:, 8 : 8 + A] = first[:, :A], first[:, A:]
    return full


@pytest.mark.parametrize("imagine", [True, False])
@pytest.mark.parametrize("flags", MIXERS)
@pytest.mark.parametrize("scenario", ["sz", "mmm"])
def test_learner_equals_a_plain_one(flags, imagine, scenario):
    """Loss and gradients in fp32, over chunks of time and teams of several sizes."""
    s = setting(f"--scenario {scenario} --team-sizes 4 5 6 {flags}", rounds=3, noise=0.5)
    e, batch = episodes_of(s, 3, 6), s.replay.sample(torch.Generator().manual_seed(3), 6)
    assert len(batch.view.played) > 30 and len(set(e.length.tolist())) > 2
    assert batch.view.unseen.shape[1] == 6 and len(set(e.empty.sum(1).tolist())) > 1
    groups = groups_of(batch.view) if imagine else None
    loss, _ = refil.losses(s.args, s.agent, batch, groups)
    full = all_slots(groups, batch.view, 6) if imagine else None
    plain = Plain(s.args, s.agent).loss(e, full)
    assert torch.allclose(loss, plain, rtol=1e-5, atol=1e-6)
    mine, theirs = gradients(loss, s.agent), gradients(plain, s.agent)
    for (name, _), a, b in zip(s.agent.learning().named_parameters(), mine, theirs):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max()))), name
        assert (a != 0).any(), name


def test_only_learning_networks_get_gradients():
    s = setting()
    batch = s.replay.sample(s.rng, 4)
    loss, _ = refil.losses(s.args, s.agent, batch, groups_of(batch.view))
    loss.backward()
    for net in (s.agent.utility, s.agent.mixer):
        assert all(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
    for net in (s.agent.target_utility, s.agent.target_mixer):
        assert all(p.grad is None for p in net.parameters())


def test_bf16_is_close():
    """Autocast changes the loss a little; utilities and targets stay fp32."""
    s = setting(noise=0.3)
    batch = s.replay.sample(s.rng, 6)
    groups = groups_of(batch.view)
    exactly, _ = refil.losses(s.args, s.agent, batch, groups)
    s.agent.amp = True
    rounded, _ = refil.losses(s.args, s.agent, batch, groups)
    assert rounded.dtype == torch.float32 and not torch.equal(exactly, rounded)
    assert abs(rounded - exactly) < 0.05 * exactly
    a, b = gradients(exactly, s.agent), gradients(rounded, s.agent)
    flat = [torch.cat([x.flatten() for x in y]) for y in (a, b)]
    assert F.cosine_similarity(*flat, dim=0) > 0.98


# --- Replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, ends", [("", True), ("--no-timeout-terminates", False)])
def test_no_bootstrap_at_time_out_by_default(flags, ends):
    s = setting(f"--max-episode-steps 5 {flags}", rounds=2)
    batch = s.replay.sample(torch.Generator().manual_seed(1), 6)
    last = batch.view.played[2:].any(1).nonzero().shape[0] + 1
    assert last == 5, "nobody can win in five steps"
    assert batch.terminated.view(5, 6)[-1].all() == ends
    assert not batch.terminated.view(5, 6)[:-1].any()
    y = refil.find_targets(s.args, s.agent, batch, s.agent.utility(batch.view)[0][0])
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
        refil.collect(s.agent, s.replay, 1.0, s.rng)
    monkeypatch.undo()
    places = [(12 + b) % 10 for b in range(4)]
    monkeypatch.setattr(refil.torch, "randperm", lambda n, generator: torch.tensor(places))
    batch = s.replay.sample(s.rng, 4)
    monkeypatch.undo()
    length = torch.tensor([int(sum(not over[b] for _, over, _ in seen)) for b in range(4)])
    order = torch.sort(length, descending=True, stable=True).indices.tolist()
    view, A = batch.view, batch.view.unseen.shape[1]
    slots = [*range(A), *range(8, 8 + A)]
    moments = view.played.nonzero().tolist()
    assert len(moments) == int(length.sum()) + 4 and len(batch.step) == int(length.sum())
    for k, m in enumerate(batch.step.tolist()):
        t, place = moments[m]
        b = order[place]
        assert moments[batch.later[k]] == [t + 1, place]
        (entities, obs_mask, entity_mask, avail), over, actions = seen[t]
        assert not over[b]
        before = seen[t - 1][2][b, :A] if t else None
        acted = F.one_hot(before, 14) if t else torch.zeros(A, 14)
        expected = torch.cat((entities[b, slots], torch.cat((acted, torch.zeros(A, 14)))), -1)
        assert torch.equal(view.entities[m], expected)
        assert torch.equal(view.unseen[m], obs_mask[b, :A][:, slots])
        assert torch.equal(view.empty[m], entity_mask[b, slots])
        assert torch.equal(view.avail[m], avail[b, :A])
        assert torch.equal(batch.actions[k], actions[b, :A])
        assert batch.rewards[k] == done[t][0][b]
        last = t + 1 == length[b]
        assert batch.terminated[k] == (done[t][1][b] | last)


def test_recurrent_replay_equals_stepping(monkeypatch):
    """The utilities that a battle was played by, step by step, are those of the learner."""
    s, seen = setting(rounds=0, noise=0.5), []
    forward = s.agent.utility.forward

    def watched(view, groups=None, hidden=None):
        q, hidden = forward(view, groups, hidden)
        seen.append(q[0])
        return q, hidden

    monkeypatch.setattr(s.agent.utility, "forward", watched)
    refil.collect(s.agent, s.replay, 0.3, s.rng)
    monkeypatch.undo()
    order = s.replay.fixed["length"][:4].argsort(descending=True, stable=True)
    monkeypatch.setattr(refil.torch, "randperm", lambda n, generator: torch.arange(4))
    batch = s.replay.sample(s.rng, 4)
    monkeypatch.undo()
    q = s.agent.utility(batch.view)[0][0]
    assert len(seen) > 30, "longer than a chunk of time"
    for m, (t, b) in enumerate(batch.view.played.nonzero().tolist()):
        if t < len(seen):
            assert torch.allclose(q[m], seen[t][order[b]], atol=1e-5)


def test_actions_are_greedy_but_for_epsilon():
    """Best available ones; random ones are available and spread evenly."""
    s = setting(rounds=0)
    s.battles.reset()
    rng = torch.Generator().manual_seed(0)
    greedy = refil.player(s.agent)(s.battles)
    avail, there = s.battles.obs.avail, ~s.battles.obs.entity_mask[:, :8]
    tries = torch.stack([refil.player(s.agent, 0.5, rng)(s.battles) for _ in range(400)])
    assert avail.gather(-1, tries.movedim(0, -1)).all() and (tries[:, ~there] == 0).all()
    choices = avail.sum(-1)[there].double()
    expected = 0.5 + 0.5 / choices
    share = (tries == greedy)[:, there].double().mean(0)
    assert (share - expected).abs().max() < 0.12 and abs((share - expected).mean()) < 0.02


def test_bytes_of_an_episode():
    s = setting("--max-episode-steps 150 --buffer-size 16", rounds=1)
    stores = (s.replay.fixed, s.replay.states, s.replay.steps)
    size = sum(x[0].numel() * x.element_size() for store in stores for x in store.values())
    assert size < EPISODE


def test_epsilon_falls_and_stays():
    args = refil.Args(epsilon_start=0.9, epsilon_final=0.1, epsilon_steps=100)
    found = [refil.epsilon_at(args, t) for t in (0, 50, 100, 1000)]
    assert np.allclose(found, [0.9, 0.5, 0.1, 0.1])


# --- Same seed, same bits -------------------------------------------------------------------------


def nets(state):
    return {name: part for name, part in state["agent"].items() if "optimiser" not in name}


def test_same_seed_same_bits():
    """Another seed changes every network, the generator, and what is logged."""
    a, b, c = (
        run(run_dir, 64, "--log-every", 32, "--eval-every", 64, "--seed", seed)
        for run_dir, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert differences(a, b) == [] and differences(saved_replay("a"), saved_replay("b")) == []
    assert metrics("a") == metrics("b") != metrics("c") and len(metrics("a")) == 3
    changed = {name.split("/")[2] for name in differences(a, c) if name.startswith("/agent")}
    assert changed == set(a["agent"]) and "/rngs/rng" in differences(a, c)


MODES = {
    "refil, replay wraps": "",
    "aqmix": "--no-imagine --target-every 4",
    "linear, other families": "--mixer linear --mask-empty-slots --scenario mmm",
    "bootstrap, bf16": "--no-timeout-terminates --amp --scenario csz",
    "resource collection": "--scenario resource",
}
MEANS = r"(td_loss|group_loss|q_total|grad_norm)"


@pytest.mark.parametrize("mode", MODES)
def test_resumed_equals_uninterrupted(mode):
    """Stopped twice, before the first update and later, between lines of the log."""
    flags = [*MODES[mode].split(), "--log-every", "48", "--batch-size", "4"]
    run("whole", 128, *flags)
    run("cut", 10, *flags)
    assert exact("cut")["timesteps"] == 16
    assert refil.main(resuming("cut", 70)) == 0
    assert refil.main(resuming("cut", 128)) == 0
    whole, cut = exact("whole"), exact("cut")
    assert whole["timesteps"] == 128 and whole["episodes"] == 16
    assert differences(whole, cut) == []
    assert differences(saved_replay("whole"), saved_replay("cut")) == []
    assert len(saved_replay("cut")["length"]) == 6
    assert differences(nets(initial("whole")), nets(whole))
    pick = [
        [{k: x for k, x in m.items() if not re.fullmatch(MEANS, k)} for m in metrics(run_dir)]
        for run_dir in ("whole", "cut")
    ]
    assert pick[0] == pick[1] and len(pick[0]) == 2 and "return/3" in pick[0][0]


def test_looking_at_a_run_changes_nothing():
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generator."""
    looks = ("--log-every", 16, "--save-every", 16, "--eval-every", 48, "--final-episodes", 1)
    a, b = run("plain", 64), run("looks", 64, *looks)
    assert len(metrics("looks")) == 4 + 1 + 1
    del a["ended"], b["ended"]  # since the last line
    assert differences(a, b) == []
    assert differences(saved_replay("plain"), saved_replay("looks")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_saves_and_resumes(number, monkeypatch):
    """Asked to stop in the third round of battles: its updates are the last."""
    calls, collect = [], refil.collect

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return collect(*args)

    with monkeypatch.context() as patch:
        patch.setattr(refil, "collect", interrupted)
        assert refil.main(tiny("run", 10**9, "--final-episodes", 2)) == 0
    assert len(calls) == 3 and exact("run")["iteration"] == 3
    assert not Path("run/summary.json").exists()
    assert refil.main(resuming("run", 64, "--final-episodes", 0)) == 0
    run("whole", 64)
    assert differences(exact("run"), exact("whole")) == []


def test_replays_lie_beside_their_checkpoints():
    run("run", 80, "--save-every", 16)
    names = [entry["name"] for entry in index("run")]
    found = sorted(path.name for path in Path("run").glob("replay-*"))
    assert found == sorted(name.replace("checkpoint", "replay") for name in names)
    assert [entry["timesteps"] for entry in index("run")] == [80, 64]
    for state in states("run"):
        steps = int(saved_replay("run", state)["length"].sum())
        assert steps == len(saved_replay("run", state)["rewards"]) == 48


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_replay_damaged(damage, capfd):
    run("run", 32)
    path = Path("run/replay-32.pt")
    if damage == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    capfd.readouterr()
    assert refil.main(resuming("run", 64)) == 2
    assert "replay-32.pt is damaged or missing" in only_error(capfd.readouterr().err)


def test_diverged(capfd):
    """A learning rate that overflows: one sentence, and no checkpoint of what has become."""
    assert refil.main(tiny("run", 200, "--learning-rate", 1e37, "--save-every", 16)) == 1
    assert "is not finite" in only_error(capfd.readouterr().err)
    for state in states("run"):
        assert not_finite(state) == [] and saved_replay("run", state)


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # with words that the sentence has to contain
    "--scenario zs": "'zs' sz csz mmm resource",
    "--backend game": "'game' sim sc2",
    "--team-sizes": "--team-sizes",
    "--team-sizes 0": "--team-sizes 0",
    "--team-sizes 2": "3 to 8 2",
    "--team-sizes 3 3": "--team-sizes twice",
    "--team-sizes 3 9 --eval-team-sizes 4": "9",
    "--team-sizes x": "x",
    "--eval-team-sizes 9": "9",
    "--scenario csz --eval-team-sizes 12": "12",
    "--mixer qmix": "'qmix' flex linear",
    "--mask-empty-slots": "--mask-empty-slots --mixer linear",
    "--hidden-size 10": "--hidden-size --heads",
    "--batch-size 33 --buffer-size 32": "--batch-size --buffer-size",
    "--num-envs 50 --buffer-size 40": "--num-envs --buffer-size",
    "--enemy-ai smart": "'smart' sticky closest focus",
    "--backend sc2 --enemy-ai focus": "--enemy-ai --backend sim",
    "--game-version 4.10.0": "--game-version --backend sc2",
    "--backend sc2 --scenario resource": "--scenario resource --backend sc2",
    "--scenario resource --team-sizes 9": "1 to 8 9",
    "--scenario resource --enemy-ai focus": "--enemy-ai battles --scenario resource",
    "--scenario resource --clip-regeneration": "--clip-regeneration battles",
    "--scenario resource --env-threads 2": "--env-threads battles",
    "--scenario resource --max-episode-steps 146": "--max-episode-steps 145",
    "--no-imagine --imagine-weight .3": "--no-imagine --imagine-weight",
    "--imagine": "--imagine",
    "--imagine-weight 1.5": "--imagine-weight 1.5",
    "--epsilon-final -.1": "--epsilon-final",
    "--preset gpu": "'gpu' paper cpu",
    "--num-env 3": "--num-env --num-envs?",
    "stray": "stray",
    "--resume {own} --eval-only {own}": "--resume --eval-only",
    "--resume {own} --run-dir other": "--resume --run-dir",
    "--resume {own} --gamma .5": "--gamma 0.99",
    "--resume {own} --team-sizes 3": "--team-sizes",
    "--resume {own} --no-imagine": "--imagine True stays",
    "--resume {own} --backend sc2": "--backend sim",
    "--resume {runs}/empty": "empty checkpoint",
    "--eval-only {own} --final-episodes 0": "--eval-only --final-episodes",
    "--eval-only {own} --final-episodes 1 --eval-team-sizes 9": "9",
    "--eval-only nowhere": "nowhere checkpoint",
    "--run-dir {own}": "holds a run already --resume",
    "--run-dir {runs}/file/below": "file/below",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run and what is none."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "refil", 32)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


def check_wrong(line, words, runs, tmp_path, capfd, monkeypatch):
    """One sentence with these words; exit code 2; nothing left behind."""
    monkeypatch.setattr(refil, "collect", lambda *args: 1 / 0)
    before = [sorted(folder.rglob("*")) for folder in (tmp_path, runs)]
    code = refil.main(shlex.split(line.format(runs=runs, own=runs / "refil")))
    out, err = capfd.readouterr()
    sentence = only_error(err)
    assert (code, out) == (2, "")
    assert len(sentence) < 400 and "Error" not in sentence
    assert [word for word in words.split() if word not in sentence] == [], sentence
    assert [sorted(folder.rglob("*")) for folder in (tmp_path, runs)] == before


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_wrong_command_line(line, words, runs, tmp_path, capfd, monkeypatch):
    check_wrong(line, words, runs, tmp_path, capfd, monkeypatch)


def test_several_processes(runs, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_wrong("", "one process", runs, tmp_path, capfd, monkeypatch)


def test_numbers_out_of_bounds():
    """No field takes a negative number; none takes NaN."""
    checked = 0
    for field, kind in typing.get_type_hints(refil.Args, include_extras=True).items():
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        for wrong in {int: ("-1",), float: ("-1e-3", "nan")}.get(kind, ()):
            flag = "--" + field.replace("_", "-")
            with pytest.raises(refil.UsageError, match=f"^{flag}[ :].*\\.$"):
                refil.parse([flag, wrong])
            checked += 1
    assert checked > 35


def test_default_run_directory_and_args_json():
    argv = tiny("", 4)
    assert refil.main(argv) == 0
    (found,) = Path("runs").iterdir()
    assert re.fullmatch(r"sz__refil_smac__s1__\d{8}T\d{6}Z__[0-9a-f]{4}", found.name)
    stored = json.loads((found / "args.json").read_text())
    args = dataclasses.asdict(refil.parse(argv))
    assert {k: stored[k] for k in args} == json.loads(json.dumps(args))
    assert stored["resolved"] == {"device": "cpu", "amp": False, "game_version": None}


def given(argv, monkeypatch):
    """The arguments that main() trains with."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(refil, "train", seen.append)
        assert refil.main([str(x) for x in argv]) == 0
    return seen[0]


def test_presets(monkeypatch):
    """The one for CPUs sets its flags, others override it wherever they stand."""
    plain = given([], monkeypatch)
    assert plain == refil.Args() == given(["--preset", "paper"], monkeypatch)
    cpu = given(["--preset", "cpu"], monkeypatch)
    differ = {k for k, x in vars(cpu).items() if getattr(plain, k) != x}
    flags = {x[2:].replace("-", "_") for x in refil.PRESETS["cpu"].split() if x[:2] == "--"}
    assert differ == flags | {"preset"} and cpu.hidden_size == 64 and cpu.amp
    for argv in (["--hidden-size", 32, "--preset=cpu"], ["--preset", "cpu", "--hidden-size", 32]):
        assert given(argv, monkeypatch) == dataclasses.replace(cpu, hidden_size=32)


# --- Flags ----------------------------------------------------------------------------------------
# Every flag changes the quantity that it names. Each entry: flags, what to measure on a run with
# and one without them, and how the two must relate.


def changed(*parts):
    return lambda state, run_dir: [state["agent"][part] for part in parts]


def shape(part, weight):
    return lambda state, run_dir: tuple(state["agent"][part][weight].shape)


def updates(state, run_dir):
    return float(state["agent"]["optimiser"]["state"].get(0, {}).get("step", 0))


def option(name):
    return lambda state, run_dir: state["agent"]["optimiser"]["param_groups"][0][name]


def replayed(judge):
    return lambda state, run_dir: judge(saved_replay(run_dir))


def lines(column):
    """How many lines of the log have it."""
    return lambda state, run_dir: (
        sum(column in m for m in metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
    )


def result(*keys):
    """A figure of the final evaluation."""

    def measure(state, run_dir):
        path = run_dir / "summary.json"
        value = json.loads(path.read_text())["eval"] if path.exists() else {}
        for key in keys:
            value = (value or {}).get(key)
        return value

    return measure


def first_eval(state, run_dir):
    key = "eval/3/episodes"
    return lines(key)(state, run_dir) and next(m[key] for m in metrics(run_dir) if key in m)


def targets_follow(state, run_dir):
    return not differences(state["agent"]["utility"], state["agent"]["target_utility"])


def types(replay):
    return sorted(set(replay["type"].flatten().tolist()) - {-1})


EFFECTS = {
    "seed": ("--seed 7", changed("utility"), None),
    "total_timesteps": ("--total-timesteps 80", lambda s, d: s["timesteps"], (64, 80)),
    "capture_video": (
        "--capture-video --final-episodes 1 --team-sizes 3 --eval-team-sizes 4",
        lambda s, d: sorted(x.name for x in d.glob("videos/*")),
        ([], ["final-64-3.mp4", "final-64-4.mp4"]),
    ),
    "scenario": ("--scenario mmm --team-sizes 5 --eval-team-sizes", replayed(types), None),
    "team_sizes": (
        "--team-sizes 5 --eval-team-sizes 4",
        replayed(lambda x: sorted(set((x["type"][:, :8] >= 0).sum(1).tolist()))),
        ([3, 4], [5]),
    ),
    "num_envs": ("--num-envs 4", lambda s, d: s["iteration"], (4, 2)),
    "max_episode_steps": (
        "--max-episode-steps 4",
        replayed(lambda x: int(x["length"].max())),
        (8, 4),
    ),
    "imagine": ("--no-imagine --log-every 16", lines("group_loss"), (0, 0)),
    "imagine_weight": ("--imagine-weight 0", changed("utility"), None),
    "mixer": ("--mixer linear", shape("mixer", "out"), ((4, 8, 8), (2, 8, 8))),
    "mask_empty_slots": ("--mixer linear --mask-empty-slots", changed("utility"), None),
    "timeout_terminates": ("--no-timeout-terminates", changed("utility"), None),
    "hidden_size": ("--hidden-size 12", shape("mixer", "out"), ((4, 8, 8), (4, 12, 12))),
    "heads": ("--heads 4", changed("utility"), None),
    "rnn_size": ("--rnn-size 7", shape("utility", "gru.weight_hh_l0"), ((12, 4), (21, 7))),
    "mixing_size": ("--mixing-size 6", shape("mixer", "last_bias"), ((4, 3), (4, 6))),
    "learning_rate": ("--learning-rate .01", option("lr"), (5e-4, 0.01)),
    "rmsprop_alpha": ("--rmsprop-alpha .5", option("alpha"), (0.99, 0.5)),
    "rmsprop_eps": ("--rmsprop-eps .1", option("eps"), (1e-5, 0.1)),
    "max_grad_norm": ("--max-grad-norm .00001", changed("utility"), None),
    "gamma": ("--gamma .5", changed("utility"), None),
    "batch_size": ("--batch-size 6", updates, (4.0, 2.0)),
    "buffer_size": ("--buffer-size 4", replayed(lambda x: len(x["length"])), (6, 4)),
    "updates_per_iteration": ("--updates-per-iteration 3", updates, (4.0, 12.0)),
    "target_every": ("--target-every 8", targets_follow, (False, True)),
    "epsilon_start": ("--epsilon-start 0", replayed(lambda x: x["actions"]), None),
    "epsilon_final": ("--epsilon-final .9 --epsilon-steps 10", changed("utility"), None),
    "epsilon_steps": ("--epsilon-steps 16", replayed(lambda x: x["actions"]), None),
    "log_every": ("--log-every 32", lines("td_loss"), (0, 2)),
    "eval_every": ("--eval-every 32", lines("eval/3/win"), (0, 2)),
    "eval_episodes": ("--eval-every 60 --eval-episodes 3", first_eval, (0, 3)),
    "eval_team_sizes": (
        "--final-episodes 2 --eval-team-sizes 6 7",
        lambda s, d: [result(x, "episodes")(s, d) for x in ("5", "6", "7")],
        ([None, None, None], [None, 2, 2]),
    ),
    "final_episodes": ("--final-episodes 5", result("5", "episodes"), (None, 5)),
    "save_every": (
        "--save-every 48",
        lambda s, d: [entry["timesteps"] for entry in index(d)],
        ([64, 0], [64, 48]),
    ),
}
ELSEWHERE = {
    "run_dir": "every test here",
    "resume": "test_resumed_equals_uninterrupted",
    "eval_only": "test_evaluation_alone_repeats",
    "game_version": "test_flags_of_battles",
    "preset": "test_presets",
    "amp": "test_amp",
    **dict.fromkeys(("enemy_ai", "clip_regeneration", "env_threads"), "test_flags_of_battles"),
    "backend": "test_flags_of_battles",
    **dict.fromkeys(("device", "num_threads", "compile"), "test_device_threads_and_compile"),
    # Of a block that all scripts share:
    **dict.fromkeys(("track", "wandb_project", "wandb_mode", "wandb_timeout"), "test_wandb.py"),
}


def test_every_flag_is_tested():
    assert {x.name for x in dataclasses.fields(refil.Args)} == set(EFFECTS) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(run_dir, 64), run_dir


@pytest.mark.parametrize("field", EFFECTS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    flags, measure, relation = EFFECTS[field]
    state = run(tmp_path / "run", 64, *flags.split())
    without, with_flag = measure(*plain), measure(state, tmp_path / "run")
    if relation is None:
        assert differences({"": without}, {"": with_flag})
    else:
        assert (without, with_flag) == relation


def test_imagined_groups_are_drawn_unless_switched_off():
    run("refil", 32, "--log-every", 16)
    run("aqmix", 32, "--log-every", 16, "--no-imagine")
    logged = [{k for m in metrics(x) for k in m} for x in ("refil", "aqmix")]
    assert logged[0] - logged[1] == {"group_loss"} and "td_loss" in logged[1]


@pytest.mark.parametrize("fast", [True, False])
def test_amp(fast, monkeypatch):
    """bf16 where the hardware has it, else nothing; args.json says which."""
    plain = run("plain", 32)
    monkeypatch.setattr(refil, "has_bf16", lambda device: fast)
    amp = run("amp", 32, "--amp")
    assert bool(differences(plain["agent"], amp["agent"])) == fast
    assert json.loads(Path("amp/args.json").read_text())["resolved"]["amp"] == fast


def test_flags_of_battles(monkeypatch):
    """They reach the simulator, or the adapter of the real game."""
    args = refil.parse(["--enemy-ai", "focus", "--clip-regeneration", "--env-threads", "2"])
    battles = refil.make_envs(args, (3,), 4, 9)
    assert battles.rules.enemy_ai == 2 and battles.rules.clip_regeneration and battles.rules.once
    assert len(battles.parts) == 2 and battles.setup.seed == 9 and battles.rules.limit == 150
    plain = refil.make_envs(refil.parse([]), (3,), 4, 9)
    assert plain.rules.enemy_ai == 0 and not plain.rules.clip_regeneration and len(plain.parts) == 1
    made = {}
    adapter = SimpleNamespace(make_battles=lambda **options: made.update(options) or battles)
    monkeypatch.setitem(refil.sys.modules, "envs.smac.game", adapter)
    game = ["--backend", "sc2", "--game-version", "4.6.2"]
    args = refil.parse([*game, "--scenario", "mmm", "--clip-regeneration"])
    assert refil.make_envs(args, (3,), 2, 9) is battles and made["game_version"] == "4.6.2"
    assert (made["scenario"], made["team_sizes"], made["clip_regeneration"]) == ("mmm", (3,), True)
    assert (made["num_battles"], made["once"]) == (2, True) and "enemy_ai" not in made


def test_a_game_that_fails_ends_the_run(monkeypatch, capfd):
    """One sentence, where it cannot be begun or not be played on."""

    def fails(*args, **options):
        raise refil.BattleError("The game is gone.")

    adapter = SimpleNamespace(make_battles=fails)
    with monkeypatch.context() as patch:
        patch.setitem(refil.sys.modules, "envs.smac.game", adapter)
        assert refil.main(tiny("a", 32, "--backend", "sc2")) == 2
    assert only_error(capfd.readouterr().err) == "error: The game is gone."
    monkeypatch.setattr(refil, "collect", fails)
    assert refil.main(tiny("b", 32)) == 1
    assert only_error(capfd.readouterr().err) == "error: The game is gone."


def test_device_threads_and_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, dynamic: compiled.append(type(net).__name__)
    )
    a = run("plain", 32)
    assert compiled == []
    b = run("compiled", 32, "--compile", "--num-threads", 2, "--device", "cpu")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert sorted(compiled) == ["Mixer", "Mixer", "Utility", "Utility"]
    assert (
        differences(nets(a), nets(b)) == []
        or max(
            float((a["agent"][k][n] - x).abs().max())
            for k, net in nets(b).items()
            for n, x in net.items()
        )
        < 1e-5
    ), "two threads may add in another order"
    if not torch.cuda.is_available():
        assert refil.main(tiny("cuda", 32, "--device", "cuda")) == 2


@pytest.mark.slow  # torch's compiler
@pytest.mark.timeout(900)
def test_compiled_networks_learn_the_same():
    a, b = run("plain", 64), run("compiled", 64, "--compile")
    for name, net in nets(b).items():
        for key, x in net.items():
            torch.testing.assert_close(a["agent"][name][key], x, atol=1e-4, rtol=1e-3)


# --- Evaluation -----------------------------------------------------------------------------------


def test_rows_of_the_table(capfd):
    """A row per size, at the end also of scripted policies in the same battles."""
    run("run", 32, "--eval-every", 16, "--eval-episodes", 2, "--final-episodes", 3)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    players = ("", " random", " nearest", " focus", " retreat")
    assert list(results) == [f"{size}{player}" for size in (3, 4, 5) for player in players]
    assert {row["episodes"] for row in results.values()} == {3}
    assert all(
        0 <= row["win_low"] <= row["win"] <= row["win_high"] <= 1 for row in results.values()
    )
    out = capfd.readouterr().out
    assert "3 nearest" in out and "win rate" in out
    evals = [m for m in metrics("run") if "eval/3/win" in m]
    assert len(evals) == 2 and {"eval/4/return", "eval/5/win_low"} <= set(evals[0])
    assert not any("random" in k for k in evals[0])


def test_resource_collection(capfd):
    """The other world: its agents, things, table and scripts; 145 steps at most."""
    flags = ["--scenario", "resource", "--max-episode-steps", 150, "--final-episodes", 2]
    run("run", 290, *flags, "--log-every", 16, "--batch-size", 2)
    replay = saved_replay("run")
    assert replay["length"].tolist() == [145, 145] and replay["resources"].shape[1:] == (6, 2)
    assert set(replay["present"].sum(1).tolist()) <= {3, 4}
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert list(results) == [
        f"{n}{who}" for n in (3, 4, 5) for who in ("", " random", " forager", " collector")
    ]
    assert "picked up" in capfd.readouterr().out
    logged = set().union(*metrics("run"))
    assert "return" in logged and "win" not in logged
    s = setting("--scenario resource")
    view = s.replay.sample(s.rng, 6).view
    A = view.unseen.shape[1]
    assert view.entities.shape[1:] == (A + 8, 23 + 6) and not view.empty[:, -1].any(), (
        "home is last"
    )


def test_evaluation_alone_repeats(capfd):
    """The same figures as at the run's end, from its directory or its checkpoint; nothing else is
    written. Other sizes may be asked for."""
    run("run", 32, "--final-episodes", 3)
    before, first = sorted(Path("run").rglob("*")), capfd.readouterr().out
    for source in ("run", "run/checkpoint-32.pt"):
        assert refil.main(["--eval-only", source]) == 0
        assert capfd.readouterr().out.strip() == first[first.index("sz, seed") :].strip()
    assert (
        refil.main(["--eval-only", "run", "--eval-team-sizes", "8", "--final-episodes", "2"]) == 0
    )
    assert "| 8 retreat" in capfd.readouterr().out
    assert sorted(Path("run").rglob("*")) == before


def test_everybody_meets_the_same_battles(monkeypatch):
    """One battle per episode, of one size, begun by the same seed for all."""
    made, make_envs = [], refil.make_envs

    def watched(args, sizes, number, seed, device):
        made.append((sizes, number, seed))
        return make_envs(args, sizes, number, seed, device)

    monkeypatch.setattr(refil, "make_envs", watched)
    run("run", 16, "--final-episodes", 3)
    assert made[0] == ((3, 4), 2, 1)
    assert [x[:2] for x in made[1:]] == [((size,), 3) for size in (3, 4, 5) for _ in range(5)]
    assert len({x[2] for x in made[1:]}) == 1 != made[1][2]


# --- Learning -------------------------------------------------------------------------------------

QUICK = "--team-sizes 3 --eval-team-sizes --hidden-size 32 --rnn-size 32 --mixing-size 16"
QUICK += (
    " --learning-rate 1e-3 --gamma .95 --batch-size 8 --updates-per-iteration 16 --target-every 8"
)
QUICK += " --epsilon-steps 8000 --max-episode-steps 60 --eval-every 0 --final-episodes 400"


class WeakEnemies(Combat):
    """Of the enemies' hit points are 40 % left, and nothing of their shields."""

    def reset(self):
        super().reset()
        self.units["health"][:, SIDE:] *= 0.4
        self.units["shield"][:, SIDE:] = 0
        self.load_state_dict(self.state_dict())
        return self.obs


def stand_and_shoot(battles):
    """Nobody walks; who may attack, attacks the lowest tag."""
    avail = np.asarray(battles.obs.avail)
    targets = avail[..., 6:]
    still = np.where(avail[..., 0], 0, 1)
    return torch.from_numpy(np.where(targets.any(-1), 6 + targets.argmax(-1), still))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_refil_learns(seed, monkeypatch):
    """Three against three weak ones, 18,000 steps, some 57 seconds: greedy agents (.85, .83, .74 at
    seeds 1, 2, 3) win more than those that only stand and shoot (.67), and than random ones."""
    monkeypatch.setattr("envs.smac.combat.Combat", WeakEnemies)
    battles = WeakEnemies("sz", (3,), 400, seed=5, once=True, episode_limit=60)
    bar = summarise(play(battles, stand_and_shoot))["win"]
    argv = [*QUICK.split(), "--total-timesteps", "18000", "--seed", str(seed), "--run-dir", "run"]
    assert refil.main(argv) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["3 random"]["win"] < 0.4 < 0.6 < bar < 0.75
    assert results["3"]["win_low"] > bar


# --- Whose orders cost battles --------------------------------------------------------------------


def test_replaced_orders(capsys, monkeypatch):
    """experiments/replace_orders.py: which orders are whose; with all replaced it is the script;
    runs of other scripts are refused."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    study = importlib.import_module("replace_orders")
    own = torch.tensor([[0, 1, 3, 6, 8, 6]])
    other = torch.tensor([[0, 7, 7, 7, 2, 6]])
    assert study.is_stop(own, other).tolist() == [[False, True, False, False, False, False]]
    assert study.is_stop_or_move(own, other).tolist() == [[False, True, True, False, False, False]]
    assert study.is_target(own, other).tolist() == [[False, False, False, True, False, True]]
    battles = refil.make_envs(refil.parse([]), (3,), 4, 1)
    battles.reset()
    everything = study.replaced(lambda b: torch.ones(4, 8), lambda own, other: own >= 0)
    assert torch.equal(everything(battles).long(), study.nearest(battles))
    run("run", 16)
    study.main(study.Study(Path("run"), team_sizes=(3,), episodes=4))
    out = capsys.readouterr().out
    rows = ("as it is", "stops replaced", "stops and moves replaced", "targets replaced", "focus")
    assert all(f"| 3 {row} " in out for row in rows)
    args = json.loads(Path("run/args.json").read_text())
    Path("run/args.json").write_text(json.dumps(args | {"script": "maddpg_particle"}))
    with pytest.raises(study.UsageError, match=r"maddpg_particle\.py"):
        study.main(study.Study(Path("run")))


def test_battle_progress(capsys, monkeypatch):
    """experiments/battle_progress.py: figures of a moment against plain Python; a row every so
    many steps until the last battle is over; the agents' memory begins anew with every episode."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    study = importlib.import_module("battle_progress")
    battles = refil.make_envs(refil.parse([]), (4,), 16, 3)
    rows, seen = study.progress(battles, focus, 10), {}
    battles.seed(3)
    step, going = 0, []
    mean, median = ((lambda x, f=f: f(x) if x else math.nan) for f in (np.mean, np.median))

    def watch(battles):
        nonlocal step
        actions = focus(battles)
        if step % 10 == 0:
            snap, lasting = battles.snapshot, 0
            near, edge, able, fight, team = [], [], [], [], []
            for b in range(16):
                own, foes = ([i for i in r if snap.alive[b, i]] for r in (range(8), range(8, 16)))
                lasting += bool(own and foes)
                team += [(len(own), len(foes))] if own and foes else []
                for i in own if foes else ():
                    at = np.array([snap.x[b, i], snap.y[b, i]])
                    ways = [np.array([snap.x[b, j], snap.y[b, j]]) - at for j in foes]
                    near.append(min(np.linalg.norm(way) for way in ways))
                    edge.append(min(*at, *(32 - at)))
                    able.append(bool(battles.obs.avail[b, i, 6:].any()))
                    fight += [int(actions[b, i]) >= 6] if able[-1] else []
            seen[step] = {
                "lasting": lasting / 16,
                "own": mean([own for own, _ in team]),
                "enemies": mean([foes for _, foes in team]),
                "sees": mean([x <= 9 for x in near]),
                "able": mean(able),
                "attacks": mean(fight),
                "nearest": median(near),
                "edge": median(edge),
            }
            going.append(len(near))
        step += 1
        return actions

    play(battles, watch)
    assert list(rows) == list(seen) and len(rows) > 3 and going[0] == 64
    for step, row in seen.items():
        assert rows[step] == pytest.approx(row, abs=1e-4, nan_ok=True)
    run("run", 16)
    own = study.open_run(Path("run"), 3, 4, 1)
    capsys.readouterr()
    twice = []
    for _ in range(2):
        own[0].seed(1)
        twice.append(study.progress(own[0], own[1](), 15))
    assert str(twice[0]) == str(twice[1])
    study.main(study.Study(Path("run"), team_sizes=(3,), episodes=4))
    assert "| 3 agents | 0 | 1.00 | 3.00 | 3.00 |" in capsys.readouterr().out
