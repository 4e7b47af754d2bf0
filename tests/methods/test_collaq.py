"""collaq_smac.py: its terms, losses and targets against NumPy, what each term sees, who learns from
what, AQMIX as what is left without teammates' part, memories, flags. What holds of REFIL's runs,
too (same bits, resuming, evaluation), is asked of both in test_refil.py.

numpy_mix() takes utilities as given and mixes them with loops, as the losses here are loops.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
from pathlib import Path

from harness import RunArgs

import numpy as np
import pytest
import torch
from battle_tools import (
    EFFECTS,
    WeakEnemies,
    as_double,
    changed,
    check_effect,
    elsewhere,
    numpy_mix,
    permuted,
    read,
    run,
    sample,
    saved_replay,
    setting,
    shape,
    sharpen,
    stand_and_shoot,
    synthetic,
    weights_of,
)
from runs import differences, metrics, only_error, script

from envs.smac import combat
from envs.smac.episodes import play, summarise

collaq, refil = script("baselines.collaq_smac"), script("baselines.refil_smac")
MIXERS = pytest.mark.parametrize("flags", ["", "--mixer linear"])
TERMS = collaq.Terms._fields
__all__ = ["elsewhere"]  # a fixture of all tests here


def networks(flags="", width=9, actions=5):
    """Both utilities and a mixer for synthetic features, in double precision."""
    args = read(collaq, f"--hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 {flags}")
    torch.manual_seed(1)
    utility = collaq.CollaborativeUtility(width, actions, args)
    mixer = collaq.Mixer(width, args)
    for net in (utility, mixer):
        sharpen(net)
        net.double()
    return utility, mixer


def made_up(**options):
    """Features of random entities."""
    return as_double(synthetic(collaq, **options))


def all_of(utility, features):
    """{name: (M, A, actions)} of Q_i and its terms."""
    q, terms, _ = utility(features)
    return {"q": q} | terms._asdict()


def minibatch(s, seed=7, size=4):
    """In double precision, as the networks are with setting(double=True)."""
    batch = sample(s, seed, size)
    return batch._replace(features=as_double(batch.features))


# --- The terms ------------------------------------------------------------------------------------


def test_teammates_are_all_other_agents():
    """Oneself, enemies and things stay; what was unseen stays so. Enemies may be fewer or more."""
    for A, S in ((4, 8), (3, 6), (5, 13), (1, 2), (3, 3)):
        unseen = torch.rand(6, A, S, generator=torch.Generator().manual_seed(S)) < 0.4
        found = collaq.without_teammates(unseen)
        for m, i, j in itertools.product(range(6), range(A), range(S)):
            assert found[m, i, j] == (unseen[m, i, j] or (j < A and j != i))


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--no-subtract-alone"])
def test_utilities_are_the_sum_of_their_terms(flags):
    """In loops; without the difference they are what two networks of their own add up to."""
    features, (utility, _) = made_up(), networks(flags)
    q, terms, _ = utility(features)
    q, terms = q.detach(), collaq.Terms(*[x.detach() for x in terms])
    for m, i, u in itertools.product(*map(range, q.shape)):
        alone, collab, collab_alone = (float(x[m, i, u]) for x in terms)
        expected = alone + collab - (0.0 if flags else collab_alone)
        assert abs(float(q[m, i, u]) - expected) < 1e-10
    alone, _ = utility.alone(features, collaq.without_teammates(features.unseen)[:, None])
    collab, _ = utility.collab(features, features.unseen[:, None])
    assert torch.allclose(terms.alone, alone[0], atol=1e-12)
    assert torch.allclose(terms.collab, collab[0], atol=1e-12)
    assert torch.allclose(q, alone[0] + collab[0], atol=1e-12) == bool(flags)


@pytest.mark.numeric
def test_what_each_term_sees():
    """Q_alone and Q_collab(o_i-) of one's own unit and of enemies, not of other agents; Q_collab of
    all that are seen. Never of whom agent 0 does not see."""
    features, (utility, _) = made_up(filled=(4, 4, 4)), networks()
    features.unseen[:] = False
    features.unseen[:, 0, [2, 6]] = True
    for name in ("q", *TERMS):
        x = features.entities.clone().requires_grad_()
        term = all_of(utility, features._replace(entities=x))[name]
        (gradient,) = torch.autograd.grad(term[:, 0].square().sum(), x)
        seen = {j for j in range(8) if (gradient[:, j] != 0).any()}
        assert seen == ({0, 1, 3, 4, 5, 7} if name in ("q", "collab") else {0, 4, 5, 7}), name
        other = features.entities.clone()
        for j in set(range(8)) - seen:
            other[:, j] = 9.0
        again = all_of(utility, features._replace(entities=other))[name]
        assert torch.equal(again[:, 0], term[:, 0])


@pytest.mark.numeric
def test_alone_until_a_teammate_is_seen():
    """Q_i is Q_alone as long as nobody has been seen; from then on it is not, also when they are
    out of sight again: the memories differ."""
    features, (utility, _) = made_up(played=((1, 1, 1),) * 3, filled=(4, 4, 4)), networks()
    features.unseen[:] = collaq.without_teammates(features.unseen)
    features.unseen[3 * 1 + 0, 0, 1] = False  # time 1, battle 0: agent 0 sees agent 1
    q, terms, _ = utility(features)
    apart = (q - terms.alone).abs().amax(-1).view(3, 3, 4)  # (T, B, A)
    met = torch.zeros(3, 3, 4, dtype=torch.bool)
    met[1:, 0, 0] = True
    assert apart[~met].max() < 1e-12 and apart[met].min() > 1e-4
    assert float(terms.collab_alone.detach().abs().max()) > 0.1, "which is not 0 by itself"


@pytest.mark.numeric
@MIXERS
def test_empty_slots_change_nothing(flags):
    """Whatever stands there: no term, no Q_tot, no MARA, no gradient; and their terms are 0."""
    features, (utility, mixer) = made_up(), networks(flags)
    filled = ~features.empty[:, :4]

    def outputs(entities):
        now = features._replace(entities=entities)
        q, terms, _ = utility(now)
        mara = collaq.mara_loss(terms.collab_alone, features.avail_actions, filled)
        assert all((x[~filled] == 0).all() for x in (q, *terms))
        return torch.cat((mixer(q[..., 1], now), mara[None]))

    x = features.entities.clone().requires_grad_()
    found = outputs(x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert (gradient[features.empty] == 0).all() and (gradient[~features.empty] != 0).any()
    other = torch.where(features.empty[..., None], torch.tensor(7.0).double(), features.entities)
    assert torch.equal(outputs(other), found)


@pytest.mark.numeric
@MIXERS
def test_permuting_entities_permutes_outputs(flags):
    """Agents among themselves and enemies among themselves; Q_tot and MARA stay."""
    features, (utility, mixer) = made_up(), networks(flags)
    moved, mine, _ = permuted(features)
    a, b = (all_of(utility, x) for x in (features, moved))
    for name in a:
        assert torch.allclose(a[name][:, mine], b[name], atol=1e-12)
        assert not torch.allclose(a[name], b[name], atol=1e-3)
    totals = [mixer(x["q"][..., 1], y) for x, y in ((a, features), (b, moved))]
    assert torch.allclose(*totals, atol=1e-12)
    mara = [
        collaq.mara_loss(x["collab_alone"], y.avail_actions, ~y.empty[:, :4])
        for x, y in ((a, features), (b, moved))
    ]
    assert torch.isclose(*mara, atol=1e-12)


@pytest.mark.numeric
@MIXERS
def test_mixing_is_monotonic(flags):
    """dQ_tot / dQ_i >= 0 everywhere; of some, > 0."""
    features, (_, mixer) = made_up(), networks(flags)
    rng = torch.Generator().manual_seed(0)
    for scale in (0.1, 10.0):
        q = scale * torch.randn(8, 4, generator=rng, dtype=torch.float64)
        q.requires_grad_()
        (gradient,) = torch.autograd.grad(mixer(q, features).sum(), q)
        assert (gradient >= 0).all() and (gradient > 0).any()


@pytest.mark.numeric
@MIXERS
def test_trimmed_slots_change_nothing(flags, monkeypatch):
    """Features end at the last slot in use; with all 8 of a side the losses are the same."""
    s = setting(collaq, f"--team-sizes 3 {flags}", rounds=2, double=True)
    found = []
    for A in (3, 8):
        batch = minibatch(s)
        assert batch.features.unseen.shape[1:] == (A, 2 * A)
        loss, scalars = collaq.critic_loss(s.args, s.agent, batch)
        found.append(torch.stack([loss, *scalars.values()]))
        monkeypatch.setattr(collaq, "slots_in_use", lambda empty: 8)
    assert torch.allclose(*found, rtol=1e-10)


@pytest.mark.numeric
@pytest.mark.parametrize("name", TERMS)
def test_pointers_of_terms_mean_whom_they_see(name):
    """With --target-head pointer whom to heal is known to Q_collab(o_i) alone, whom to attack to
    all: agents have the tags 0 to 3 here, enemies 4 to 7."""
    features, (utility, _) = made_up(filled=(4, 4, 4)), networks("--target-head pointer", 9, 14)
    features.unseen[:] = False
    features.entities[..., :8] = torch.eye(8, dtype=torch.float64)
    avail = torch.ones(8, 4, 14, dtype=torch.bool)
    term = all_of(utility, features._replace(avail_actions=avail))[name][:, 0, 6:]  # of agent 0
    for m in range(8):
        values = term[m].unique().numel()
        assert values == (8 if name == "collab" else 1 + 1 + 4)  # itself, teammates, enemies


# --- Losses ---------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("flags", ["", "--mixer linear", "--no-subtract-alone"])
def test_losses_and_targets_are_those_of_numpy(flags, bootstrap):
    """Terms as given; Q_i, mixing, targets and both losses by loops over steps, agents, actions.
    The dead count in MARA with their no-op, empty slots and last moments do not."""
    timeout = " --no-timeout-terminates" if bootstrap else ""
    flags += " --mara-weight .3 --gamma .9 --max-episode-steps 30"
    s = setting(collaq, flags + timeout, rounds=2, double=True)
    batch = minibatch(s)
    features, A = batch.features, batch.features.unseen.shape[1]
    with torch.no_grad():
        terms = [x.numpy() for x in s.agent.utility(features)[1]]
        target = [x.numpy() for x in s.agent.target_utility(features)[1]]
        loss, scalars = collaq.critic_loss(s.args, s.agent, batch)
        found_y = collaq.find_targets(s.args, s.agent, batch, s.agent.utility(features)[0])
    entities = np.zeros((len(features.entities), 16, features.entities.shape[-1]))
    empty, avail = np.ones((len(entities), 16), bool), features.avail_actions.numpy()
    for side in (0, 1):
        places = slice(8 * side, 8 * side + A), slice(A * side, A * side + A)
        entities[:, places[0]] = features.entities[:, places[1]]
        empty[:, places[0]] = features.empty[:, places[1]]
    subtracts, linear = s.args.subtract_alone, s.args.mixer == "linear"

    def q_i(parts, m, i, u):
        alone, collab, collab_alone = (x[m, i, u] for x in parts)
        return alone + collab - (collab_alone if subtracts else 0.0)

    def q_total(net, parts, m, actions):
        q, gone = np.zeros(8), np.ones(8, bool)
        q[:A] = [q_i(parts, m, i, u) for i, u in enumerate(actions)]
        gone[:A] = avail[m, :, 0]
        where = {"entities": entities[m], "empty": empty[m], "gone": gone}
        return numpy_mix(weights_of(net), heads=2, linear=linear, q=q, **where)

    td, squares, changes, ys, dead = [], [], [], [], 0
    for k, (m, after) in enumerate(zip(batch.now.tolist(), batch.later.tolist())):
        best = []
        for i in range(A):
            may = [u for u in range(avail.shape[-1]) if avail[after, i, u]]
            best.append(max(may, key=lambda u: q_i(terms, after, i, u)))
        later = q_total(s.agent.target_mixer, target, after, best)
        over = bool(batch.terminated[k])
        ys.append(float(batch.rewards[k]) + (0.0 if over else 0.9 * later))
        actions = batch.actions[k].tolist()
        td.append((q_total(s.agent.mixer, terms, m, actions) - ys[-1]) ** 2)
        for i in (i for i in range(A) if not empty[m, i]):
            dead += avail[m, i, 0]
            squares += [terms[2][m, i, u] ** 2 for u in range(avail.shape[-1]) if avail[m, i, u]]
            if not avail[m, i, 0]:
                changes.append(abs(terms[1][m, i, actions[i]] - terms[2][m, i, actions[i]]))
    assert dead > 0 and empty[:, :A].any(), "both are there"
    assert np.allclose(found_y, ys, rtol=1e-10, atol=1e-10)
    assert np.isclose(scalars["td_loss"], np.mean(td), rtol=1e-10)
    assert np.isclose(scalars["mara_loss"], np.mean(squares), rtol=1e-10)
    assert np.isclose(scalars["q_collab"], np.mean(changes), rtol=1e-10)
    assert np.isclose(loss, np.mean(td) + 0.3 * np.mean(squares), rtol=1e-10)


def gradients(loss, net):
    """Of a network's weights; None where the loss does not reach."""
    return torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)


@pytest.mark.numeric
def test_who_learns_from_what():
    """MARA moves Q_collab and nothing else; TD all but the targets, Q_collab(o_i-), too."""
    s = setting(collaq, rounds=2, double=True)
    _, scalars = collaq.critic_loss(s.args, s.agent, minibatch(s))
    mara, td = scalars["mara_loss"], scalars["td_loss"]
    agent = s.agent
    for net in (agent.utility.alone, agent.mixer, agent.target_utility, agent.target_mixer):
        assert all(x is None for x in gradients(mara, net))
    assert all((x != 0).any() for x in gradients(mara, agent.utility.collab))
    for net in (agent.target_utility, agent.target_mixer):
        assert all(x is None for x in gradients(td, net))
    for net in (agent.utility.alone, agent.utility.collab, agent.mixer):
        for (name, _), x in zip(net.named_parameters(), gradients(td, net)):
            # The bias of its head is in Q_collab(o_i) and in Q_collab(o_i-).
            cancels = net is agent.utility.collab and name == "head.bias"
            assert (x.abs().max() < 1e-9) == cancels, name


@pytest.mark.numeric
def test_mara_knows_no_teammates():
    """Of agent 0 alone: gradients to what it sees, none to other agents; Q_i has them."""
    features, (utility, _) = made_up(filled=(4, 4, 4)), networks()
    features.unseen[:] = False
    x = features.entities.clone().requires_grad_()
    q, terms, _ = utility(features._replace(entities=x))
    first = torch.arange(4) == 0
    mara = collaq.mara_loss(terms.collab_alone, features.avail_actions, first.expand(8, 4))
    (gradient,) = torch.autograd.grad(mara, x, retain_graph=True)
    assert (gradient[:, 1:4] == 0).all() and (gradient[:, [0, 4]] != 0).any(-1).any(0).all()
    (gradient,) = torch.autograd.grad(q[:, 0].square().sum(), x)
    assert (gradient[:, 1:4] != 0).any()


@pytest.mark.numeric
def test_bf16_is_close():
    """Autocast changes the loss a little; utilities and targets stay fp32."""
    s = setting(collaq, rounds=2, noise=0.3)
    batch = sample(s, 7, 6)
    exactly, _ = collaq.critic_loss(s.args, s.agent, batch)
    s.agent.amp = True
    rounded, scalars = collaq.critic_loss(s.args, s.agent, batch)
    assert {x.dtype for x in (rounded, *scalars.values())} == {torch.float32}
    assert not torch.equal(exactly, rounded) and abs(rounded - exactly) < 0.05 * exactly


# --- The parent -----------------------------------------------------------------------------------


def hide_teammates(monkeypatch):
    """REFIL's agents see no other agent; its mixer, as CollaQ's, sees all."""
    encode = refil.encode

    def hiding(*args):
        features = encode(*args)
        return features._replace(unseen=collaq.without_teammates(features.unseen))

    monkeypatch.setattr(refil, "encode", hiding)


class Alone(collaq.CollaborativeUtility):
    """Q_collab is 0 and stays so; weights of all else are drawn as in REFIL."""

    def __init__(self, inputs, actions, args):
        super().__init__(inputs, actions, args)
        torch.manual_seed(args.seed)
        self.alone = collaq.Utility(inputs, actions, args)
        torch.nn.init.zeros_(self.collab.head.weight)
        torch.nn.init.zeros_(self.collab.head.bias)
        self.collab.requires_grad_(False)


@pytest.mark.numeric
@MIXERS
@pytest.mark.parametrize("scenario", ["mmm", "resource"])
def test_without_the_method_it_is_aqmix_whose_agents_see_no_other(flags, scenario, monkeypatch):
    """With Q_collab at 0: Q_i is Q_alone; networks, targets, battles, replay and generator of whole
    runs, bit for bit."""
    hide_teammates(monkeypatch)
    flags = [*flags.split(), "--scenario", scenario, "--target-every", "8", "--epsilon-steps", "64"]
    flags.append("--no-onednn")  # whose last bits depend on how many rows a product has
    theirs = run(refil, "aqmix", 96, "--no-imagine", *flags)
    other = run(collaq, "collaq", 96, *flags)
    monkeypatch.setattr(collaq, "CollaborativeUtility", Alone)
    mine = run(collaq, "alone", 96, *flags)
    for name in ("mixer", "target_mixer"):
        assert differences(theirs["agent"][name], mine["agent"][name]) == [], name
    for name in ("utility", "target_utility"):
        for key, x in theirs["agent"][name].items():
            assert torch.equal(x, mine["agent"][name][f"alone.{key}"]), key
    for name in ("battles", "log", "rng"):
        assert differences(theirs["ranks"][0][name], mine["ranks"][0][name]) == [], name
    assert differences(saved_replay("aqmix"), saved_replay("alone")) == []
    assert differences(mine["agent"]["utility"], other["agent"]["utility"])


def test_diff_of_the_two_files_is_the_method():
    parent, child = (Path(module.__file__).read_text().splitlines() for module in (refil, collaq))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.45 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"
    assert (collaq.RESUMABLE, collaq.LINE) == (refil.RESUMABLE, refil.LINE)
    assert collaq.PRESETS == refil.PRESETS
    shared = [{x for x in text if x.startswith("# [shared: ")} for text in (parent, child)]
    assert shared[0] - shared[1] == {"# [shared: refil] begin", "# [shared: refil] end"}


# --- Replay ---------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("flags", ["", "--no-recurrent --own-beside"])
def test_replay_equals_stepping(flags, monkeypatch):
    """The terms that a battle was played by, step by step, are those of the learner: all three
    memories go on through chunks of time, and in players."""
    s, seen = setting(collaq, flags, rounds=0, noise=0.5), []
    forward = s.agent.utility.forward

    def watched(features, hidden):
        q, terms, hidden = forward(features, hidden)
        seen.append(torch.stack((q, *terms)))  # (4, B, A, actions)
        return q, terms, hidden

    monkeypatch.setattr(s.agent.utility, "forward", watched)
    collaq.collect(s.battles, collaq.Player(s.agent, 0.3, s.rng), s.buffer)
    monkeypatch.undo()
    order = s.buffer.fixed["length"][:4].argsort(descending=True, stable=True)
    monkeypatch.setattr(collaq.torch, "randperm", lambda n, generator: torch.arange(4))
    batch = s.buffer.sample(s.rng, 4)
    monkeypatch.undo()
    q, terms, _ = s.agent.utility(batch.features)
    found = torch.stack((q, *terms))
    assert len(seen) > 30, "longer than a chunk of time"
    for m, (t, b) in enumerate(batch.features.played.nonzero().tolist()):
        if t < len(seen):
            assert torch.allclose(found[:, m], seen[t][:, order[b]], atol=1e-4)


def test_players_are_greedy_in_the_sum(monkeypatch):
    """In all of a battle; which is not always greedy in one of its terms."""
    s = setting(collaq, rounds=0)
    with torch.no_grad():
        s.agent.utility.collab.head.weight *= 20  # so that teammates matter
    forward, greedy = s.agent.utility.forward, {name: [] for name in ("q", *TERMS)}

    def watched(features, hidden):
        q, terms, hidden = forward(features, hidden)
        for name, x in {"q": q, **terms._asdict()}.items():
            best = x.masked_fill(~features.avail_actions, -np.inf).argmax(-1)
            greedy[name].append(best)
        return q, terms, hidden

    monkeypatch.setattr(s.agent.utility, "forward", watched)
    collaq.collect(s.battles, collaq.Player(s.agent), s.buffer)
    A = greedy["q"][0].shape[1]
    done = s.buffer.steps["actions"][:4, : len(greedy["q"]), :A].transpose(0, 1)
    length = s.buffer.fixed["length"][:4]
    played = torch.arange(len(done))[:, None] < length
    same = {name: torch.equal(torch.stack(x)[played], done[played]) for name, x in greedy.items()}
    assert same == {"q": True} | dict.fromkeys(TERMS, False)


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # with words that the sentence has to contain
    "--mara-weight -1": "--mara-weight",
    "--mara-weight nan": "--mara-weight",
    "--team-sizes 2": "3 to 8 2",
    "--max-episode-steps 1001": "--max-episode-steps 1000",
    "--hidden-size 10": "--hidden-size --heads",
    "--batch-size 33 --buffer-size 32": "--batch-size --buffer-size",
    "--num-envs 50 --buffer-size 40": "--num-envs --buffer-size",
    "--td-lambda .5": "--td-lambda --returns lambda",
    "--returns lambda --replay-window 1": "--returns lambda --replay-window",
    "--scenario resource --target-head pointer": "--target-head tags",
    "--optimiser adam --rmsprop-alpha .1": "--rmsprop-alpha --optimiser rmsprop",
    "--anneal-from 10": "--anneal-from --final-share",
    "--final-share .5 --anneal-from 10 --total-timesteps 10": "--anneal-from --total-timesteps",
    "--scenario resource --enemy-ai focus": "--enemy-ai battles",
}


@pytest.mark.parametrize("line, words", WRONG.items(), ids=WRONG)
def test_what_would_do_something_else_than_it_says(line, words, capfd):
    """One sentence, and nothing is written."""
    assert collaq.main(line.split()) == 2
    error = only_error(capfd.readouterr().err)
    assert [word for word in words.split() if word not in error] == []
    assert not Path("runs").exists()


# --- Flags ----------------------------------------------------------------------------------------

EFFECTS = {x: EFFECTS[x] for x in EFFECTS if not x.startswith("imagine")}
OWN = {
    "mara_weight": ("--mara-weight 0", changed("utility"), None),
    "subtract_alone": ("--no-subtract-alone", changed("utility"), None),
    "mixer": ("--mixer linear", shape("mixer", "out"), ((4, 8, 3), (2, 8, 3))),
    "hidden_size": ("--hidden-size 12", shape("mixer", "project"), ((4, 8, 8), (4, 12, 12))),
    "mixing_size": ("--mixing-size 6", shape("mixer", "out_bias"), ((4, 3), (4, 6))),
    "rnn_size": ("--rnn-size 7", shape("utility", "alone.gru.weight_hh_l0"), ((12, 4), (21, 7))),
}
ELSEWHERE = {
    "td_lambda": "test_refil.py::test_lambda_returns_are_sums_of_n_step_returns",
    "amp": "test_refil.py::test_amp",
    "compile": "test_refil.py::test_compile",
    "rescale": "test_refil.py::test_rescaled_worlds",
    "egocentric": "test_refil.py::test_rescaled_worlds",
    # The same lines as the parent's, in blocks that are the same:
    "windows": "test_refil.py::test_how_often_a_step_is_drawn",
    **dict.fromkeys(
        ("backend", "game_version", "enemy_ai", "clip_regeneration", "env_threads"),
        "test_refil.py::test_flags_of_battles",
    ),
}


def test_every_flag_is_tested():
    own = {x.name for x in dataclasses.fields(collaq.Args)}
    own -= {x.name for x in dataclasses.fields(RunArgs)}  # tests/harness
    assert own == set(EFFECTS) | set(OWN) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(collaq, run_dir, 64, "--final-episodes", 1), run_dir


@pytest.mark.parametrize("field", EFFECTS | OWN)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    run_script = functools.partial(run, collaq)
    check_effect((EFFECTS | OWN)[field], plain, tmp_path / "run", run_script)


def test_what_is_logged():
    run(collaq, "run", 64, "--log-every", 16, "--final-episodes", 2)
    logged = metrics("run")
    names = {"td_loss", "mara_loss", "q_total", "q_collab", "grad_norm", "return/3", "epsilon"}
    assert any(names <= set(line) for line in logged)
    assert {"final/3/win", "final/5/return"} <= set(logged[-1])


@pytest.mark.slow  # torch's compiler
@pytest.mark.timeout(900)
def test_compiled_networks_learn_the_same():
    a, b = run(collaq, "plain", 64), run(collaq, "compiled", 64, "--compile")
    for name in ("utility", "mixer"):
        for key, x in b["agent"][name].items():
            torch.testing.assert_close(a["agent"][name][key], x, atol=1e-4, rtol=1e-3)


# --- Learning -------------------------------------------------------------------------------------


LEARNS = "--team-sizes 3 --eval-team-sizes --hidden-size 32 --mixing-size 16 --num-envs 16"
LEARNS += " --no-recurrent --own-beside --target-head pointer --returns lambda --replay-window 8"
LEARNS += " --optimiser adam --learning-rate 1e-3 --final-share .1 --gamma .95 --batch-size 32"
LEARNS += " --buffer-size 2000 --updates-per-iteration 16 --target-every 100 --epsilon-steps 10000"
LEARNS += " --max-episode-steps 60 --eval-every 0 --final-episodes 400 --total-timesteps 39000"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_collaq_learns(seed, monkeypatch):
    """Three against three weak ones, small networks with what --preset cpu learns by, 39,000 steps,
    some 75 seconds: greedy agents (.81, .97, .87 at seeds 1, 2, 3) win more at the end than those
    that only stand and shoot (.67), and than random ones."""
    monkeypatch.setattr(combat, "Combat", WeakEnemies)
    battles = WeakEnemies("sz", (3,), 400, seed=5, once=True, episode_limit=60)
    bar = summarise(play(battles, stand_and_shoot))["win"]
    assert collaq.main([*LEARNS.split(), "--seed", str(seed), "--run-dir", "run"]) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["3 random"]["win"] < 0.4 < 0.6 < bar < 0.75
    assert results["3"]["win_low"] > bar
