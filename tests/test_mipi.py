"""mipi_refil_smac.py: each loss against NumPy, who learns from what, masks, the parent's bits,
resuming, flags. The theory: test_mipi_theory.py; what is the parent's: test_refil.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import json
import math
import signal
import typing
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import test_refil
import torch
from runs import differences, exact, metrics, only_error, script, states
from test_refil import numpy_mix, saved_replay, weights_of
from toolbox import sharpen

mipi, refil = script("mipi_refil_smac"), script("baselines.refil_smac")
CPU = torch.device("cpu")


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
        for module in (mipi, refil):
            patch.setattr(module, "distributions", lambda: [])
        yield


def tiny(run_dir, steps, *flags):
    return test_refil.tiny(run_dir, steps, *flags)


def run(run_dir, steps, *flags):
    """A whole run; its last checkpoint."""
    assert mipi.main(tiny(run_dir, steps, *flags)) == 0
    return exact(run_dir)


def setting(flags="", rounds=3, double=False, noise=1.0):
    """A replay of random battles and an agent far from its beginning, targets away from it."""
    small = "--hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 --buffer-size 40"
    small += " --num-envs 4 --batch-size 6 --max-episode-steps 30 "
    args = mipi.parse((small + flags).split())
    battles = mipi.make_envs(args, args.team_sizes, args.num_envs, args.seed)
    agent = mipi.Agent(args, battles.family, CPU)
    nets = [part for part in agent.parts().values() if isinstance(part, torch.nn.Module)]
    for k, net in enumerate(nets):
        sharpen(net, noise, k)
    replay, rng = mipi.Replay(args, battles, CPU), torch.Generator().manual_seed(5)
    for _ in range(rounds):
        mipi.collect(agent, replay, 1.0, rng)
    if double:
        for net in nets:
            net.double()
    if not rounds:
        return SimpleNamespace(args=args, agent=agent, battles=battles, replay=replay, rng=rng)
    batch = replay.sample(torch.Generator().manual_seed(7), 6)
    if double:
        view = batch.view._replace(entities=batch.view.entities.double())
        batch = batch._replace(view=view, rewards=batch.rewards.double())
    groups = mipi.draw_groups(batch.view, rng) if args.imagine else None
    return SimpleNamespace(
        args=args, agent=agent, battles=battles, replay=replay, rng=rng, batch=batch, groups=groups
    )


def forward(s):
    """What learn() begins with: Seen, log pi (V, M, A, actions), log m (M, A, actions)."""
    view = s.batch.view
    seen, _ = mipi.see(s.agent, view, s.groups, torch.zeros(0, dtype=torch.long))
    log_pi = s.agent.log_policy(seen.q, seen.x, view.avail)
    return seen, log_pi, mipi.log_marginal(s.agent, seen.own, view.avail)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- Policies -------------------------------------------------------------------------------------


def test_unavailable_actions_have_no_probability_and_no_gradient():
    """In policy and marginal; in the losses, too."""
    s = setting(double=True)
    view = s.batch.view
    _, log_pi, log_m = forward(s)
    for log_p in (*log_pi, log_m):
        p = log_p.exp()
        assert (p[~view.avail] == 0).all() and torch.allclose(p.sum(-1), torch.tensor(1.0).double())
    logits = torch.randn(log_m.shape, dtype=torch.float64, requires_grad=True)
    other = torch.randn(log_m.shape, dtype=torch.float64, requires_grad=True)
    mine, theirs = (mipi.log_probabilities(x, view.avail) for x in (logits, other))
    q = torch.randn_like(mine)
    loss = mipi.policy_loss(mine, theirs, q, 0.3) + mipi.marginal_loss(mine, theirs)
    for gradient in torch.autograd.grad(loss.sum(), (logits, other)):
        assert (gradient[~view.avail] == 0).all() and (gradient[view.avail] != 0).any()


def test_the_marginal_sees_its_own_unit_only():
    """Whatever others are: the same bits, and no gradient. The policy does see them."""
    s = setting(double=True)
    view = s.batch.view
    x = view.entities.clone().requires_grad_()
    A = view.unseen.shape[1]
    for i in range(A):
        now = view._replace(entities=x)
        logits = s.agent.marginal(mipi.own_state(now))[0][0]
        (gradient,) = torch.autograd.grad(logits[:, i].square().sum(), x)
        others = [j for j in range(2 * A) if j != i]
        assert (gradient[:, others] == 0).all() and (gradient[:, i] != 0).any()
        changed = view.entities.clone()
        changed[:, others] = 5.0
        again = s.agent.marginal(mipi.own_state(view._replace(entities=changed)))[0][0]
        assert torch.equal(again[:, i], logits[:, i])
        seen = s.agent.utility(now)[1][0]
        (gradient,) = torch.autograd.grad(seen[:, i].square().sum(), x)
        assert (gradient[:, others] != 0).any()


def test_alpha_inf_sees_nobody_else():
    """Utilities and policy change with the own unit only; the mixer still sees all."""
    s = setting("--alpha inf", double=True)
    view = s.batch.view
    changed = view.entities.clone()
    changed[:, 1:] = 5.0
    other = view._replace(entities=changed)
    for a, b in zip(s.agent.utility(view, s.groups)[:2], s.agent.utility(other, s.groups)[:2]):
        assert torch.equal(a[:, :, 0], b[:, :, 0])
    assert s.agent.alpha == s.agent.alpha_i == 0 and not s.agent.informed
    zero = torch.zeros(1, *view.avail.shape[:2], dtype=torch.float64)
    assert not torch.equal(s.agent.mixer(zero, view)[0], s.agent.mixer(zero, other)[0])


def test_actions_are_drawn_from_policy_and_noise():
    """(1 - epsilon) pi + epsilon uniform; greedy in evaluation."""
    s = setting(rounds=0)
    s.battles.reset()
    obs, epsilon = s.battles.obs, 0.3
    view = mipi.look(s.args, obs, torch.full((4, 8), -1), torch.ones(1, 4, dtype=torch.bool), CPU)
    q, x, _ = s.agent.utility(view)
    pi = s.agent.log_policy(q[0], x[0], view.avail).exp()  # (4, A, actions)
    A = pi.shape[1]
    assert torch.equal(mipi.player(s.agent)(s.battles)[:, :A], pi.argmax(-1))
    drawn = [mipi.player(s.agent, epsilon, s.rng)(s.battles)[:, :A] for _ in range(3000)]
    share = torch.nn.functional.one_hot(torch.stack(drawn), pi.shape[-1]).float().mean(0)
    expected = (1 - epsilon) * pi + epsilon * view.avail / view.avail.sum(-1, keepdim=True)
    assert (share - expected).abs().max() < 5 * 0.5 / math.sqrt(3000)


# --- Losses against NumPy -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "--mask-empty-slots", "--sample-next-actions", "--no-imagine"])
def test_critic_is_that_of_numpy(how):
    """Eqs. (15), (16): policies, marginals and utilities as given; the rest by loops."""
    imagine = how != "--no-imagine"
    weight = "--imagine-weight .3" if imagine else ""
    s = setting(f"--gamma .9 --alpha .7 {weight} {how}", double=True)
    batch, view, alpha = s.batch, s.batch.view, 0.7
    seen, log_pi, log_m = (
        x if isinstance(x, mipi.Seen) else x.detach().numpy() for x in forward(s)
    )
    torch_pi, torch_m = torch.from_numpy(log_pi[0]), torch.from_numpy(log_m)
    s.agent.rng.manual_seed(11)
    y = mipi.find_targets(s.args, s.agent, batch, torch_pi, torch_m)
    loss, w, scalars = mipi.critic_loss(s.args, s.agent, batch, s.groups, seen.q, y)
    later_q = s.agent.target_utility(view)[0][0].detach().numpy()
    q, avail, A = seen.q.detach().numpy(), view.avail.numpy(), view.unseen.shape[1]
    args = SimpleNamespace(heads=2, mixer="linear", mask_empty_slots=s.args.mask_empty_slots)
    drawn = None
    if s.args.sample_next_actions:  # the same draws
        rng = torch.Generator().manual_seed(11)
        shape = (len(batch.later), A, avail.shape[-1])
        noise = -torch.empty(shape).exponential_(generator=rng).log().numpy()
        drawn = (log_pi[0][batch.later.numpy()] + noise).argmax(-1)

    def full(m):
        """entities (16, D), empty (16,), gone (8,) of a moment."""
        entities = np.zeros((16, view.entities.shape[-1]))
        empty, gone = np.ones(16, bool), np.ones(8, bool)
        for side in (0, 1):
            rows = slice(side * A, (side + 1) * A)
            entities[8 * side : 8 * side + A] = view.entities[m, rows].numpy()
            empty[8 * side : 8 * side + A] = view.empty[m, rows].numpy()
        gone[:A] = avail[m, :, 0]
        return {"entities": entities, "empty": empty, "gone": gone}

    p, target_p = weights_of(s.agent.mixer), weights_of(s.agent.target_mixer)
    td, imagined = [], []
    for k, (m, after) in enumerate(zip(batch.step.tolist(), batch.later.tolist())):
        value, cost, utilities = 0.0, 0.0, np.zeros(8)
        if not batch.terminated[k]:
            for i in range(A):
                may = avail[after, i]
                pi, ratio = np.exp(log_pi[0, after, i]), log_pi[0, after, i] - log_m[after, i]
                if drawn is not None:
                    pi = np.eye(len(may))[drawn[k, i]]
                utilities[i] = (pi * later_q[after, i])[may].sum()
                cost += (pi * ratio)[may].sum()
            value = numpy_mix(target_p, args, utilities, **full(after)) - alpha * cost
        target = float(batch.rewards[k]) + 0.9 * value
        assert np.isclose(y[k].item(), target, atol=1e-8)
        mine = np.zeros((len(q), 8))
        mine[:, :A] = [[x[m, i, batch.actions[k, i]] for i in range(A)] for x in q]
        td.append((numpy_mix(p, args, mine[0], **full(m)) - target) ** 2)
        if imagine:
            team = np.zeros(16, bool)
            team[:A], team[8 : 8 + A] = s.groups[m, :A], s.groups[m, A:]
            both = numpy_mix(p, args, mine[1:], groups=team, **full(m))
            imagined.append((both - target) ** 2)
        share = np.array(
            [
                numpy_mix(p, args, np.eye(8)[i], **full(m))
                - numpy_mix(p, args, np.zeros(8), **full(m))
                for i in range(A)
            ]
        )  # w_i, as the slope of Q_tot
        assert np.allclose(w[k], share, atol=1e-8)
    assert np.isclose(scalars["td_loss"].item(), np.mean(td), rtol=1e-8)
    parts = 0.7 * np.mean(td) + 0.3 * np.mean(imagined) if imagine else np.mean(td)
    assert len(q) == (3 if imagine else 1) and np.isclose(loss.item(), parts, rtol=1e-8)


@pytest.mark.parametrize("how", ["", "--no-imagine", "--literal-blahut-arimoto"])
def test_policy_and_marginal_losses_are_those_of_numpy(how):
    """Eqs. (17), (18) by loops over available actions, as learn() reports them with M = 1. The
    literal form: after a step of the critic, with utilities as they are then."""
    s, twin = (
        setting(f"--ba-iterations 1 --alpha .2 --alpha-i .6 {how}", double=True) for _ in range(2)
    )
    if "literal" in how:
        seen, log_pi, log_m = forward(twin)
        y = mipi.find_targets(s.args, twin.agent, s.batch, log_pi[0].detach(), log_m.detach())
        loss, *_ = mipi.critic_loss(s.args, twin.agent, s.batch, s.groups, seen.q, y)
        mipi.move_all(s.args, twin.agent, loss)
    seen, log_pi, log_m = forward(twin)
    step, avail = s.batch.step, s.batch.view.avail.numpy()
    star = np.exp(log_pi[-1 if how == "--no-imagine" else 1].detach().numpy())  # in imagined teams
    log_m = log_m.detach().numpy()
    q = seen.q[0].detach().numpy()
    likelihood = []
    there = [(m, i) for m in step.tolist() for i in range(avail.shape[1]) if not avail[m, i, 0]]
    for m, i in there:
        may = avail[m, i]
        likelihood.append(-(star[m, i] * log_m[m, i])[may].sum())
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    assert np.isclose(scalars["marginal_loss"].item(), np.mean(likelihood), rtol=1e-9)
    # Eq. (18) meets the marginal after its step, whose trunk's output is still the old one.
    moved = s.agent.marginal.last(seen.own.detach()).detach().numpy()
    pi = log_pi[0].detach().numpy()
    cost = []
    for m, i in there:
        may = avail[m, i]
        after = np.log(softmax(moved[m, i][may]))
        p = np.exp(pi[m, i][may])
        cost.append((p * (0.6 * (pi[m, i][may] - after) - q[m, i][may])).sum())
    assert np.isclose(scalars["policy_loss"].item(), np.mean(cost), rtol=1e-9)


def test_alpha_i_over_w():
    """Eq. (18) with alpha / w_i per agent and state."""
    s = setting("--ba-iterations 1 --alpha .2 --alpha-i-over-w", double=True)
    seen, log_pi, _ = forward(s)
    step, avail = s.batch.step, s.batch.view.avail[s.batch.step]
    chosen = mipi.pick(seen.q[:, step], s.batch.actions)
    _, w = s.agent.mixer(chosen, s.batch.view.rows(step), s.groups[step])
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    moved = mipi.log_probabilities(s.agent.marginal.last(seen.own), s.batch.view.avail)[step]
    log_pi, q, there = log_pi[0][step], seen.q[0][step], ~avail[..., 0]
    each = (log_pi.exp() * (0.2 / w[..., None] * (log_pi - moved) - q)).sum(-1)
    assert torch.isclose(scalars["policy_loss"], each[there].mean(), rtol=1e-9)
    assert torch.isclose(scalars["alpha_over_w"], (0.2 / w)[there].mean(), rtol=1e-9)
    assert torch.isclose(scalars["w"], w[there].mean(), rtol=1e-9)


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
    real = rng.dirichlet(np.ones(U - 1), size=units * teams)
    n = units * teams
    entities = torch.zeros(n, 2, s.batch.view.entities.shape[-1])
    entities[torch.arange(n), 0, torch.tensor(columns)[np.repeat(types, teams)]] = 1
    avail = torch.ones(n, 1, U, dtype=torch.bool)
    avail[..., 0] = False
    view = s.batch.view._replace(entities=entities, avail=avail)
    log = lambda p: torch.from_numpy(np.log(np.maximum(p, 1e-300))).float()  # noqa: E731
    s.agent.policy = s.agent.marginal.last = torch.nn.Identity()  # what they read is what they say
    star, own = log(pi.reshape(n, U)), log(np.repeat(mean[:, 0], teams, 0))
    x = log(np.concatenate((np.zeros((n, 1)), real), -1))
    living = mipi.Living(torch.zeros(n, U), x, star, own)
    found = mipi.measure(s.agent, view, torch.arange(n), living, torch.full((n,), 0.5))
    for k, name in enumerate(s.agent.types):
        assert np.isclose(found[f"mi/{name}"].item(), information[types == k].mean(), rtol=1e-5)
    assert np.isclose(found["mi"].item(), information.mean(), rtol=1e-5)
    assert np.isclose(found["entropy"].item(), -(real * np.log(real)).sum(-1).mean(), rtol=1e-5)
    ratio = np.log(real / np.repeat(mean[:, 0, 1:], teams, 0))
    assert np.isclose(found["kl"].item(), (real * ratio).sum(-1).mean(), rtol=1e-5)


# --- Who learns from what -------------------------------------------------------------------------


def moved(before, after):
    """Names of parameters that changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def snapshot(agent):
    """Parameters by name, but for one that nothing depends on: who sees one unit attends to it."""
    return {
        f"{part}.{name}": p.detach().clone()
        for part, net in agent.parts().items()
        if isinstance(net, torch.nn.Module)
        for name, p in net.named_parameters()
        if f"{part}.{name}" != "marginal.attention.query"
    }


def watch(s, monkeypatch):
    """learn(), with the parameters after each gradient step."""
    found, descend = [snapshot(s.agent)], mipi.descend

    def watched(*args):
        norm = descend(*args)
        found.append(snapshot(s.agent))
        return norm

    monkeypatch.setattr(mipi, "descend", watched)
    mipi.learn(s.args, s.agent, s.batch, s.groups)
    found.append(snapshot(s.agent))
    return [moved(a, b) for a, b in itertools.pairwise(found)]


HEADS = {
    "marginal": {"marginal.last.weight", "marginal.last.bias"},
    "policy": {"policy.weight", "policy.bias"},
}


def test_who_learns_in_each_alternation(monkeypatch):
    """Heads in all but the last; in the last also the marginal's trunk and, with the critic's step,
    utilities, mixer and the layers they share with the policy. Targets never."""
    s = setting("--ba-iterations 3")
    names = set(snapshot(s.agent))
    steps = watch(s, monkeypatch)
    assert steps[:4] == [HEADS["marginal"], HEADS["policy"]] * 2
    assert steps[4] == {x for x in names if x.startswith("marginal.")}
    critic = {x for x in names if x.startswith(("utility.", "mixer."))}
    assert steps[5] == critic and steps[6:] == [HEADS["policy"]]


def test_who_learns_in_the_literal_form(monkeypatch):
    """The critic first; then trunks in every alternation. Its head and the mixer once."""
    s = setting("--ba-iterations 2 --literal-blahut-arimoto")
    names = set(snapshot(s.agent))
    steps = watch(s, monkeypatch)
    critic = {x for x in names if x.startswith(("utility.", "mixer."))}
    trunk = {x for x in critic if x.startswith("utility.") and "last" not in x}
    marginal = {x for x in names if x.startswith("marginal.")}
    # A step's policy head moves after what `descend` shows of it: it shows with the next one.
    assert steps[0] == critic and steps[1] == marginal
    assert steps[2] == trunk and steps[3] == marginal | HEADS["policy"]
    assert steps[4] == trunk and steps[5] == HEADS["policy"]


@pytest.mark.parametrize("flags", ["", "--detach-actor-trunk"])
def test_what_the_policys_loss_moves(flags):
    """The shared trunk, unless that is switched off; never utilities' head, mixer or marginal."""
    s = setting(f"--ba-iterations 1 {flags}", double=True)
    seen, log_pi, log_m = forward(s)
    y = mipi.find_targets(s.args, s.agent, s.batch, log_pi[0].detach(), log_m.detach())
    loss, *_ = mipi.critic_loss(s.args, s.agent, s.batch, s.groups, seen.q, y)
    parameters = dict(s.agent.learning().named_parameters())
    alone = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    grads = {}

    def keep(loss, net, optimiser, clip):
        optimiser.zero_grad()
        loss.backward()
        grads[net] = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        return loss.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mipi, "descend", keep)
        mipi.learn(s.args, s.agent, s.batch, s.groups)
    (both,) = (g for net, g in grads.items() if net is not s.agent.marginal)
    differ = {n for n in alone if not torch.allclose(alone[n], both[n], rtol=1e-9, atol=1e-12)}
    trunk = {n for n in alone if n.startswith("0.") and "last" not in n}
    assert differ == (set() if flags else trunk)
    (own,) = (g for net, g in grads.items() if net is s.agent.marginal)
    assert len(own) == len(list(s.agent.marginal.parameters()))
    for net in (s.agent.target_utility, s.agent.target_mixer):
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("regularizer", ["entropy", "none"])
def test_ablations(regularizer):
    """Entropy: E_pi log pi in the marginal's place; none: reward alone. No marginal learns."""
    alpha = 0.5 if regularizer == "entropy" else 0.0
    weight = f"--alpha {alpha}" if alpha else ""
    s = setting(f"--regularizer {regularizer} --ba-iterations 1 {weight}", double=True)
    seen, log_pi, log_m = forward(s)
    assert (log_m == 0).all() and seen.own is None
    before = snapshot(s.agent)
    scalars = mipi.learn(s.args, s.agent, s.batch, s.groups)
    step, q = s.batch.step, seen.q[0]
    there = ~s.batch.view.avail[step][..., 0]
    each = (log_pi[0].exp() * (alpha * log_pi[0] - q)).sum(-1)[step]
    assert torch.isclose(scalars["policy_loss"], each[there].mean(), rtol=1e-9)
    assert not any(x.startswith("marginal") for x in moved(before, snapshot(s.agent)))
    assert not {"kl", "marginal_loss"} & set(scalars)


# --- The parent -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    ["", "--no-imagine", "--mask-empty-slots --scenario mmm", "--scenario resource --no-imagine"],
)
def test_without_the_method_it_is_refil_with_the_linear_mixer(flags):
    """--regularizer none and the policy read off the utilities: utilities, mixer, targets, their
    optimiser, battles, replay and generator of whole runs, bit for bit."""
    flags = [*flags.split(), "--target-every", "8", "--epsilon-steps", "64"]
    mine = run("mipi", 96, "--regularizer", "none", "--policy", "greedy", *flags)
    assert refil.main(tiny("refil", 96, "--mixer", "linear", *flags)) == 0
    theirs = exact("refil")
    for part in theirs["agent"]:
        assert differences(theirs["agent"][part], mine["agent"][part]) == [], part
    for name in ("battles", "ended", "episodes"):
        assert differences({"": theirs[name]}, {"": mine[name]}) == []
    assert differences(theirs["rngs"]["rng"], mine["rngs"]["rng"]) == []
    assert differences(saved_replay("refil"), saved_replay("mipi")) == []
    other = run("head", 96, "--regularizer", "none", *flags)
    assert differences(mine["agent"]["utility"], other["agent"]["utility"])


def test_diff_of_the_two_files_is_the_method():
    parent, child = (Path(module.__file__).read_text().splitlines() for module in (refil, mipi))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.45 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


# --- Same seed, same bits -------------------------------------------------------------------------

MODES = {
    "mi": "",
    "literal": "--literal-blahut-arimoto --ba-iterations 2",
    "sampled, mmm": "--sample-next-actions --scenario mmm --no-imagine",
    "entropy, csz, bf16": "--regularizer entropy --scenario csz --amp",
    "alone": "--alpha inf",
    "mi, resource collection": "--scenario resource",
}


@pytest.mark.parametrize("mode", MODES)
def test_resumed_equals_uninterrupted(mode):
    flags = [*MODES[mode].split(), "--log-every", "48", "--batch-size", "4"]
    whole = run("whole", 128, *flags)
    run("cut", 10, *flags)
    for steps in (70, 128):
        assert mipi.main(test_refil.resuming("cut", steps)) == 0
    cut = exact("cut")
    assert whole["timesteps"] == 128 and differences(whole, cut) == []
    assert differences(saved_replay("whole"), saved_replay("cut")) == []
    first = torch.load("whole/checkpoint-0.pt", weights_only=True)
    learned = {x for x in whole["agent"] if differences(first["agent"][x], whole["agent"][x])}
    informed = {"marginal", "marginal_optimiser"} if "mi" in mode or mode == "literal" else set()
    informed |= {"marginal", "marginal_optimiser"} if mode == "sampled, mmm" else set()
    expected = {"utility", "mixer", "policy", "optimiser", "policy_optimiser"} | informed
    assert learned - {"target_utility", "target_mixer"} == expected


def test_same_seed_same_bits():
    a, b, c = (
        run(d, 64, "--log-every", 32, "--seed", x) for d, x in (("a", 7), ("b", 7), ("c", 8))
    )
    assert differences(a, b) == [] and metrics("a") == metrics("b") != metrics("c")
    assert {x.split("/")[2] for x in differences(a, c) if x.startswith("/agent")} == set(a["agent"])


def test_resource_collection_has_defaults_of_its_own():
    """alpha .05, one alternation, no imagined groups: s* is s-."""
    run("run", 64, "--scenario", "resource", "--log-every", 16)
    logged = set().union(*metrics("run"))
    assert {"mi", "kl", "policy_loss"} <= logged and not {"group_loss", "mi/zealot"} & logged
    state = exact("run")["agent"]
    steps = [state[f"{x}optimiser"]["state"][0]["step"] for x in ("policy_", "marginal_", "")]
    assert steps[0] == steps[1] == steps[2] > 0
    more = run("more", 64, "--scenario", "resource", "--ba-iterations", 3)["agent"]
    assert more["policy_optimiser"]["state"][0]["step"] == 3 * steps[0]


def test_what_is_logged():
    run("run", 64, "--log-every", 16, "--final-episodes", 2)
    logged = metrics("run")
    names = {"mi", "mi/zealot", "mi/stalker", "entropy", "kl", "w", "alpha_over_w", "td_loss"}
    names |= {"group_loss", "policy_loss", "marginal_loss", "grad_norm", "q_total"}
    assert any(names <= set(line) for line in logged)
    assert {"final/3/win", "final/5/return"} <= set(logged[-1])


# --- The command line -----------------------------------------------------------------------------

WRONG = {
    "--regularizer kl": "'kl' mi entropy none",
    "--policy greedy": "--policy greedy --regularizer none",
    "--alpha -1": "--alpha",
    "--alpha nan": "--alpha",
    "--alpha-i inf": "--alpha-i finite",
    "--ba-iterations 0": "--ba-iterations 0",
    "--alpha inf --alpha-i .1": "--alpha inf --alpha-i",
    "--alpha inf --regularizer entropy": "--alpha inf --regularizer",
    "--regularizer none --alpha .1": "--regularizer none --alpha",
    "--regularizer none --alpha-i-over-w": "--alpha-i-over-w",
    "--alpha 0 --alpha-i-over-w": "--alpha-i-over-w --alpha-i 0",
    "--alpha-i 0 --alpha-i-over-w": "--alpha-i-over-w --alpha-i 0",
    "--no-imagine --imagine-weight .3": "--no-imagine --imagine-weight",
    "--scenario resource --imagine-weight .3": "--scenario resource --imagine-weight",
    "--scenario resource --env-threads 2": "--env-threads battles",
    "--regularizer none --policy greedy --ba-iterations 2": "--policy greedy (13)",
    "--team-sizes 2": "3 to 8 2",
    "--mixer flex": "--mixer",
    "--resume {own} --alpha .5": "--alpha None stays",
    "--resume {refil}": "refil_smac.py mipi_refil_smac.py",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "mipi", 32)
    assert refil.main(tiny(folder / "refil", 16)) == 0
    return folder


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_wrong_command_line(line, words, runs, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(mipi, "collect", lambda *args: 1 / 0)
    line = line.format(own=runs / "mipi", refil=runs / "refil")
    before = sorted(tmp_path.rglob("*"))
    assert mipi.main(line.split()) == 2
    out, err = capfd.readouterr()
    sentence = only_error(err)
    assert not out and [word for word in words.split() if word not in sentence] == [], sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_out_of_bounds():
    """No field takes a negative number; none takes NaN."""
    checked = 0
    for field, kind in typing.get_type_hints(mipi.Args, include_extras=True).items():
        while typing.get_args(kind) and typing.get_origin(kind) is not typing.Literal:
            kind = typing.get_args(kind)[0]  # of Annotated, of a union with None, of a tuple
        for wrong in {int: ("-1",), float: ("-1e-3", "nan")}.get(kind, ()):
            flag = "--" + field.replace("_", "-")
            with pytest.raises(mipi.UsageError, match=f"^{flag}[ :].*\\.$"):
                mipi.parse([flag, wrong])
            checked += 1
    assert checked == 45


def coefficients(flags):
    args = mipi.parse(flags.split())
    agent = mipi.Agent(args, mipi.family_of(args.scenario), CPU)
    return agent.alpha, agent.alpha_i


def test_alphas():
    """The paper's, one from the other, none."""
    assert coefficients("") == coefficients("--scenario csz") == (0.03, 0.03)
    assert coefficients("--scenario mmm --team-sizes 4") == (0.1, 0.1)
    assert coefficients("--scenario resource") == (0.05, 0.05)
    assert coefficients("--alpha .2") == (0.2, 0.2)
    assert coefficients("--alpha .2 --alpha-i 0") == (0.2, 0)
    assert coefficients("--alpha-i .5") == (0.03, 0.5)
    assert coefficients("--alpha inf") == coefficients("--regularizer none") == (0, 0)
    run("run", 4)
    resolved = json.loads(Path("run/args.json").read_text())["resolved"]
    assert (resolved["alpha"], resolved["alpha_i"], resolved["ba_iterations"]) == (0.03, 0.03, 4)


def test_the_method_draws_from_a_stream_of_its_own():
    """Which is not the run's, and another with another seed."""
    seeds = [mipi.Agent(mipi.Args(seed=k), mipi.family_of("sz"), CPU).rng for k in (1, 2)]
    draws = [torch.rand(50, generator=rng) for rng in (*seeds, torch.Generator().manual_seed(1))]
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.6 and not torch.isin(a, b).any()


def resized(part, weight):
    return test_refil.shape(part, weight)


def policy_steps(state, run_dir):
    return float(state["agent"]["policy_optimiser"]["state"][0]["step"])


changed = test_refil.changed
OWN = {  # of the method; None: the two must differ
    "regularizer": ("--regularizer entropy", changed("policy"), None),
    "alpha": ("--alpha .5", changed("utility"), None),
    "alpha_i": ("--alpha-i .5", changed("policy"), None),
    "alpha_i_over_w": ("--alpha-i-over-w", changed("policy"), None),
    "ba_iterations": ("--ba-iterations 2", policy_steps, (16.0, 8.0)),
    "literal_blahut_arimoto": ("--literal-blahut-arimoto", changed("marginal"), None),
    "detach_actor_trunk": ("--detach-actor-trunk", changed("utility"), None),
    "sample_next_actions": ("--sample-next-actions", changed("utility"), None),
    "mask_empty_slots": ("--mask-empty-slots", changed("utility"), None),
    "hidden_size": ("--hidden-size 12", resized("mixer", "out"), ((2, 8, 8), (2, 12, 12))),
    "mixing_size": ("--mixing-size 6", resized("mixer", "last_bias"), ((2, 3), (2, 6))),
}
EFFECTS = {k: x for k, x in test_refil.EFFECTS.items() if k != "mixer"} | OWN


ELSEWHERE = {**test_refil.ELSEWHERE, "policy": "test_without_the_method_it_is_refil..."}


def test_every_flag_is_tested():
    assert {x.name for x in dataclasses.fields(mipi.Args)} == set(EFFECTS) | set(ELSEWHERE)


SAME = """with_preset family_of make_envs opened in_views Attention attend collect Replay epsilon_at
has_bf16 descend pick draw_groups table evaluate save_run load_replay report load_source conclude
main"""


@pytest.mark.parametrize("name", SAME.split())
def test_what_is_the_parents_is_tested_there(name):
    """Presets, evaluation, replay, plumbing: the same text as in refil_smac.py, but for look()."""
    mine, theirs = (inspect.getsource(getattr(x, name)) for x in (mipi, refil))
    assert mine.replace("look(self.args, ", "look(") == theirs
    assert (mipi.RESUMABLE, mipi.LINE) == (refil.RESUMABLE, refil.LINE)
    assert {**refil.PRESETS, "cpu": refil.PRESETS["cpu"] + " --detach-actor-trunk"} == mipi.PRESETS


def test_evaluation_alone_repeats(capfd):
    """In Resource Collection: the figures of the run's end; nothing else is written."""
    run("run", 32, "--scenario", "resource", "--final-episodes", 2)
    before, first = sorted(Path("run").rglob("*")), capfd.readouterr().out
    assert mipi.main(["--eval-only", "run"]) == 0
    again = capfd.readouterr().out.strip()
    assert again == first[first.index("resource, seed") :].strip() and "5 collector" in again
    assert sorted(Path("run").rglob("*")) == before


def test_films_of_resource_collection():
    """One of each size with an evaluation, as long as an episode."""
    flags = "--scenario resource --capture-video --final-episodes 1 --team-sizes 3"
    run("run", 8, *flags.split(), "--eval-team-sizes", 6)
    films = sorted(Path("run/videos").iterdir())
    assert [x.name for x in films] == ["final-16-3.mp4", "final-16-6.mp4"]
    assert [sum(1 for _ in iio.imiter(x)) for x in films] == [9, 9]  # the beginning, and 8 steps


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(run_dir, 64), run_dir


# The parent's flags are the parent's lines here, too: they are tried again in slow tests.
FIELDS = [x if x in OWN else pytest.param(x, marks=pytest.mark.slow) for x in EFFECTS]


@pytest.mark.parametrize("field", FIELDS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    flags, measure, relation = EFFECTS[field]
    state = run(tmp_path / "run", 64, *flags.split())
    without, with_flag = measure(*plain), measure(state, tmp_path / "run")
    if relation is None:
        assert differences({"": without}, {"": with_flag})
    else:
        assert (without, with_flag) == relation


def test_amp_and_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, dynamic: compiled.append(type(net).__name__)
    )
    plain = run("plain", 32)
    assert compiled == []
    assert differences(plain["agent"], run("compiled", 32, "--compile")["agent"]) == []
    assert sorted(compiled) == ["Mixer", "Mixer", "Utility", "Utility", "Utility"]
    monkeypatch.setattr(mipi, "has_bf16", lambda device: True)
    amp = run("amp", 32, "--amp")
    assert differences(plain["agent"], amp["agent"])
    assert json.loads(Path("amp/args.json").read_text())["resolved"]["amp"]


@pytest.mark.slow  # torch's compiler
@pytest.mark.timeout(900)
def test_compiled_networks_learn_the_same():
    a, b = run("plain", 64)["agent"], run("compiled", 64, "--compile")["agent"]
    for name in ("utility", "mixer", "policy", "marginal"):
        for key, x in b[name].items():
            torch.testing.assert_close(a[name][key], x, atol=1e-4, rtol=1e-3)


def test_diverged(capfd):
    """One sentence, and no checkpoint of what has become."""
    assert mipi.main(tiny("run", 200, "--learning-rate", 1e37, "--save-every", 16)) == 1
    assert "is not finite" in only_error(capfd.readouterr().err)
    for state in states("run"):
        nets = {k: x for k, x in state["agent"].items() if "optim" not in k}
        assert all(p.isfinite().all() for net in nets.values() for p in net.values())
