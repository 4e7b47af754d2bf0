"""rl2_particle.py: memory, advantages and losses against a plain form written from the equations,
agent by agent and step by step; a bandit that only memory solves; and as a whole: flags, resuming,
adapting, playing.

Weights are read off the modules. Networks run in double where numbers are compared."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import harness

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from particle_tools import (
    MADDPG,
    MRA,
    RL2,
    collectors,
    differences,
    index,
    initial,
    metrics,
    nets,
    newest,
    parse,
    read,
    resuming,
    run,
    script,
    sharpen,
    tiny,
    weights,
)
from runs import some_long

from envs.particle.episodes import play
from envs.particle.worlds import Observation

pytestmark = pytest.mark.numeric

rl2 = script(RL2)
SMALL = "--hidden-size 6 --rnn-size 5 --key-size 4 --num-envs 4 --minibatches 2 --device cpu"
TRIALS = {  # task, the populations of a trial's games
    "alike": ("resource", ("3", "3")),
    "N changes": ("treasure", ("3", "5", "2", "4")),
    "two types": ("pacman", ("2,3", "4,2", "3,5")),
    "alone": ("resource", ("1", "2")),
    "chased": ("pacman", ("1,5", "2,4", "1,3")),
}
NUMERIC = [name for name in TRIALS if name != "chased"]


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


@pytest.fixture
def double():
    """What is made is made of 64 bits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- Settings -------------------------------------------------------------------------------------


def setting(name: str = "N changes", flags: str = "") -> SimpleNamespace:
    """An agent of one of TRIALS, weights far from what they begin with."""
    task, populations = TRIALS[name]
    own = ["--task", task, "--populations", *dict.fromkeys(populations)]
    args = parse(rl2, [*own, *SMALL.split(), *flags.split()])
    games = [rl2.make_envs(args, population, 1, 1).game for population in populations]
    agent = rl2.Agent(args, games[0], torch.device("cpu"))
    sharpen(agent.policy)
    return SimpleNamespace(args=args, agent=agent, games=games)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_trial(s: SimpleNamespace, T: int = 4, B: int = 4, seed: int = 0) -> list:
    """Games of any numbers, in which some agents stop acting, never all at the first step."""
    rng = np.random.default_rng(seed)
    trial = []
    for game in s.games:
        N = game.num_agents
        shape = (T, B, N)
        until = rng.integers(1, 2 * T, size=(B, N))
        acts = np.arange(T)[:, None, None] < until
        seen = rng.random(shape) < 0.7
        make = lambda *size, rng=rng: torch.tensor(rng.normal(size=size))  # noqa: E731
        obs = Observation(
            own=make(*shape, game.own_features),
            others=make(*shape, game.entity_features),
            alive=torch.tensor(acts),
            seen=torch.tensor(seen),
        )
        played = rl2.Played(
            game=game,
            obs=obs,
            previous=make(*shape, 7),
            acts=torch.tensor(acts),
            actions=torch.tensor(rng.integers(5, size=shape)),
            log_probs=-1.6 + 0.5 * make(*shape),
            rewards=make(*shape) * torch.tensor(acts),
            values=make(T + 1, B, N),
            advantages=make(*shape),
            targets=make(*shape),
        )
        played.values[-1] *= torch.tensor(until > T) * torch.tensor(rng.random((B, 1)) < 0.8)
        trial.append(played)
    return trial


# --- The truth ------------------------------------------------------------------------------------


def linear(layer, x: torch.Tensor, s: int) -> torch.Tensor:
    return F.linear(x, layer.weight[s].T, layer.bias[s])


def encode(encoder, obs: Observation, i: int, s: int) -> torch.Tensor:
    """c_i of what one world shows (N, ...)."""
    graph, own = encoder.graph, obs.own[i]
    query = linear(graph.query, F.relu(linear(graph.own, own, s)), s)
    scores, values = [], []
    for j in range(len(obs.own)):
        if j == i or not obs.seen[j]:
            continue
        position, rest = obs.others[j, :2] - obs.others[i, :2], obs.others[j, 2:]
        o = torch.cat((position, rest))
        key = F.relu(linear(graph.entity, o, s)) @ graph.key.weight[s]
        scores.append(query @ key / len(query) ** 0.5)
        values.append(linear(encoder.value, F.relu(linear(encoder.entity, o, s)), s))
    x = linear(encoder.own.last, F.relu(linear(encoder.own.first, own, s)), s)
    if scores:
        g = torch.stack(scores).softmax(0)
        x = x + sum(g[k] * values[k] for k in range(len(values)))
    return F.relu(x)


def gru(net, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Reset gate, update gate, new state, as in torch's documentation."""
    of_x = (net.weight_ih_l0 @ x + net.bias_ih_l0).chunk(3)
    of_h = (net.weight_hh_l0 @ h + net.bias_hh_l0).chunk(3)
    r = torch.sigmoid(of_x[0] + of_h[0])
    z = torch.sigmoid(of_x[1] + of_h[1])
    n = torch.tanh(of_x[2] + r * of_h[2])
    return (1 - z) * n + z * h


def agents_of(game) -> list[tuple[int, int]]:
    """Each agent's name in a trial: its type and its number among those."""
    return [(kind, k) for kind, n in enumerate(game.population) for k in range(n)]


def outputs(s: SimpleNamespace, trial: list) -> tuple[dict, dict]:
    """Log-probabilities (A,) and V of all steps (k, t, b, i) in which somebody acts."""
    policy, R = s.agent.policy, s.args.rnn_size
    log_probs, values = {}, {}
    for b in range(trial[0].acts.shape[1]):
        h: dict[tuple[int, int], torch.Tensor] = {}
        for k, played in enumerate(trial):
            names, before = agents_of(played.game), h
            h = {}
            for name in names:
                kin = [x for other, x in before.items() if other[0] == name[0]]
                mean = sum(kin) / len(kin) if kin else torch.zeros(R)
                h[name] = before.get(name, mean) if s.args.memory == "trial" else torch.zeros(R)
            for t, i in np.ndindex(len(played.acts), len(names)):
                name, kind = names[i], names[i][0]
                if not played.acts[t, b, i]:
                    continue
                obs = Observation(*(x[t, b] for x in played.obs))
                x = torch.cat((encode(policy.encoder, obs, i, kind), played.previous[t, b, i]))
                old = torch.zeros(R) if s.args.memory == "step" else h[name]
                h[name] = gru(policy.grus[kind], x, old)
                log_probs[k, t, b, i] = linear(policy.actor, h[name], kind).log_softmax(-1)
                values[k, t, b, i] = linear(policy.critic, h[name], kind)[0]
    return log_probs, values


def sequences(trial: list, b: int) -> list[list[tuple[int, int, int]]]:
    """The steps (k, t, i) in which each agent of a world acts; after a game away it is another."""
    found, going = [], {}
    for k, played in enumerate(trial):
        names = agents_of(played.game)
        going = {name: going.get(name, []) for name in names}
        for i, name in enumerate(names):
            if not going[name]:
                found.append(going[name])
            steps = [(k, t, i) for t in range(len(played.acts)) if played.acts[t, b, i]]
            going[name] += steps
    return found


def advantages(s: SimpleNamespace, trial: list) -> list[np.ndarray]:
    """Eq. (3) as the sum over all later steps of the agent."""
    gamma, decay = s.args.gamma, s.args.gamma * s.args.gae_lambda
    found = [np.zeros(played.acts.shape) for played in trial]
    for b in range(trial[0].acts.shape[1]):
        for steps in sequences(trial, b):
            V = [float(trial[k].values[t, b, i]) for k, t, i in steps]
            k, _, i = steps[-1]
            V.append(float(trial[k].values[-1, b, i]))
            rewards = [float(trial[k].rewards[t, b, i]) for k, t, i in steps]
            delta = [r + gamma * V[n + 1] - V[n] for n, r in enumerate(rewards)]
            for n, (k, t, i) in enumerate(steps):
                found[k][t, b, i] = sum(decay ** (m - n) * d for m, d in enumerate(delta) if m >= n)
    return found


def loss_of(s: SimpleNamespace, trials: list[list], outputs=outputs) -> torch.Tensor:
    """Eq. (4)."""
    terms = []
    for trial in trials:
        log_probs, values = outputs(s, trial)
        for (k, t, b, i), log_p in log_probs.items():
            played = trial[k]
            ratio = (log_p[played.actions[t, b, i]] - played.log_probs[t, b, i]).exp()
            A = played.advantages[t, b, i]
            clipped = min(max(ratio, 1 - s.args.clip), 1 + s.args.clip) * A
            square = (values[k, t, b, i] - played.targets[t, b, i]) ** 2
            entropy = -sum(p.exp() * p for p in log_p)
            term = -min(ratio * A, clipped) + s.args.value_coef * square
            terms.append(term - s.args.entropy_coef * entropy)
    return sum(terms) / len(terms)


def gradients(loss: torch.Tensor, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*net.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def close(a: torch.Tensor, b: torch.Tensor, error: float = 1e-9) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= error * max(1.0, b.abs().max()))


def replayed(agent, trial: list) -> list[torch.Tensor]:
    """log pi (K, A) and V (K,) where agents act."""
    games = zip(*rl2.replay(agent, trial))
    return [torch.cat([x[game.acts] for game, x in zip(trial, xs)]) for xs in games]


# --- Memory, policy, value ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("memory", ["trial", "game", "step"])
def test_policy_and_value_are_those_of_the_equations(name, memory, double):
    """With agents that come, go and stop acting; --plain the same."""
    s = setting(name, f"--memory {memory}")
    trial = random_trial(s)
    log_probs, values = replayed(s.agent, trial)
    expected, expected_values = outputs(s, trial)
    steps = [(k, t, b, i) for k, played in enumerate(trial) for t, b, i in played.acts.nonzero()]
    steps = [tuple(map(int, step)) for step in steps]
    assert len(steps) == len(log_probs) == len(expected)
    assert close(log_probs, torch.stack([expected[step] for step in steps]))
    assert close(values, torch.stack([expected_values[step] for step in steps]))
    assert log_probs.exp().std(0).min() > 0.01 and values.std() > 0.1
    plain = rl2.Agent(dataclasses.replace(s.args, plain=True), s.games[0], torch.device("cpu"))
    plain.policy.load_state_dict(s.agent.policy.state_dict())
    assert close(replayed(plain, trial)[0], log_probs)


def test_the_encoder_is_mras(double):
    """c_i is what the last layer of MRA's networks reads, with one head."""
    mra, s = script(MRA), setting("two types")
    own = {"task": "pacman", "populations": ("2,3",), "latent_size": 1}
    args = dataclasses.replace(mra.Args(), **own, hidden_size=6, key_size=4)
    game, encoder = s.games[0], s.agent.policy.encoder
    graph = mra.RelationGraph(2, game.own_features, game.entity_features, args)
    net = mra.GraphNet(2, game.own_features, game.entity_features, 6, 1.0, args)
    graph.load_state_dict(encoder.graph.state_dict())
    own = {k: x for k, x in encoder.state_dict().items() if not k.startswith("graph")}
    assert net.load_state_dict(own, strict=False).missing_keys == ["out.weight", "out.bias"]
    net.out.weight.data[:] = torch.eye(6)
    (played, *_) = random_trial(s)
    obs = Observation(*(x.flatten(0, 1) for x in played.obs))
    z = torch.zeros(obs.alive.shape, dtype=torch.long)
    own = mra.Agent(args, game, torch.device("cpu")).view(game, obs, z)
    assert close(encoder(s.agent.view(game, obs)), net(own, graph(own)))


def test_who_is_who_in_the_next_game():
    here, there = rl2.same_agents((2, 3), (3, 1), torch.device("cpu"))
    assert (here.tolist(), there.tolist()) == ([0, 1, 2], [0, 1, 3])
    hidden = torch.arange(5.0)[None, :, None].expand(2, 5, 3) + 1  # 1, 2; 3, 4, 5
    after = rl2.hand_over(hidden, (2, 3), (3, 1))
    assert after[0, :, 0].tolist() == [1, 2, 1.5, 3]
    assert rl2.hand_over(hidden, (2, 3), (1, 5))[1, :, 2].tolist() == [1, 3, 4, 5, 4, 4]
    assert torch.equal(rl2.hand_over(hidden, (2, 3), (2, 3)), hidden)


def test_memory_where_a_game_begins():
    """A trial begins with zeros; later what was last done and earned, and that a game has ended."""
    s = setting("two types")
    begin = rl2.begin_game(s.agent, s.games[0], 2, None)
    assert not begin.hidden.any() and not begin.previous.any()
    assert begin.hidden.shape == (2, 5, 5) and begin.previous.shape == (2, 5, 7)
    last = rl2.Memory((2, 3), torch.rand(2, 5, 5), torch.rand(2, 5, 7))
    last.previous[..., -1] = 0.0
    then = rl2.begin_game(s.agent, s.games[1], 2, last)
    assert torch.equal(then.hidden, rl2.hand_over(last.hidden, (2, 3), (4, 2)))
    assert torch.equal(then.previous[:, [0, 1, 4, 5], :6], last.previous[:, :4, :6])
    assert not then.previous[:, 2:4, :6].any() and (then.previous[..., 6] == 1).all()
    for memory in ("game", "step"):
        s = setting("two types", f"--memory {memory}")
        then = rl2.begin_game(s.agent, s.games[1], 2, last)
        assert not then.hidden.any() and not then.previous.any()


@pytest.mark.parametrize("name", NUMERIC)
def test_agents_of_a_type_change_places(name, double):
    """Everything goes with them: outputs, advantages, and no gradient changes."""
    s = setting(name)
    trial = random_trial(s)
    moved, orders = [], []
    always = [min(counts) for counts in zip(*(game.population for game in s.games))]
    swaps = [np.roll(range(n), 1) for n in always]  # of those who are in all games
    for played in trial:
        order, first = [], 0
        for n, swap in zip(played.game.population, swaps):
            order += [first + k for k in (*swap, *range(len(swap), n))]
            first += n
        orders.append(order)
        rows = {k: x[:, :, order] for k, x in vars(played).items() if isinstance(x, torch.Tensor)}
        obs = Observation(*(x[:, :, order] for x in played.obs))
        moved.append(dataclasses.replace(played, obs=obs, **rows))
    assert name == "alone" or all(order != sorted(order) for order in orders)
    for a, b, order in zip(rl2.gae(s.args, trial), rl2.gae(s.args, moved), orders):
        assert close(a[:, :, order], b)
    losses = [rl2.losses(s.args, s.agent, [x])[0] for x in (trial, moved)]
    assert close(*losses)
    a, b = (gradients(loss, s.agent.policy) for loss in losses)
    assert all(close(a[k], b[k]) for k in a)


# --- Advantages and losses ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMERIC)
def test_advantages_are_sums_through_games(name, double):
    s = setting(name, "--gamma .9 --gae-lambda .8")
    trial = random_trial(s)
    found = rl2.gae(s.args, trial)
    for ours, theirs in zip(found, advantages(s, trial), strict=True):
        assert close(ours, torch.tensor(theirs), 1e-12)
    assert any((~played.acts).any() for played in trial)


def test_a_later_game_pays_for_an_earlier_one(double):
    """A reward at the end of the trial reaches its first step, by (gamma lambda)^steps; not that of
    who was not there."""
    s = setting("N changes", "--gamma 1 --gae-lambda 1")
    trial = random_trial(s)
    for played in trial:
        played.acts[:] = True
        played.rewards[:] = played.values[:] = 0.0
    trial[-1].rewards[-1] = 1.0
    first = rl2.gae(s.args, trial)[0][0, 0]
    assert first.tolist() == [1.0, 1.0, 0.0], "agent 2 is away in the third game"
    args = dataclasses.replace(s.args, gamma=0.5, gae_lambda=0.9)
    assert rl2.gae(args, trial)[0][0, 0, 0] == pytest.approx(0.45 ** (4 * 4 - 1))


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("memory", ["trial", "step"])
def test_loss_and_gradients_are_those_of_the_equations(name, memory, double):
    s = setting(name, f"--memory {memory} --value-coef .3 --entropy-coef .2 --clip .1")
    trials = [random_trial(s, seed=seed, B=2) for seed in (0, 1)]
    ours, scalars = rl2.losses(s.args, s.agent, trials)
    theirs = loss_of(s, trials)
    assert close(ours, theirs)
    a, b = (gradients(loss, s.agent.policy) for loss in (ours, theirs))
    assert all(close(a[k], b[k]) for k in b)
    idle = {k for k in b if b[k].abs().max() < 1e-12}
    expected = {"encoder.graph.key.bias"}  # cancels in the softmax
    if name == "alone":  # of one other g is 1
        expected = {k for k in b if "graph" in k}
    if memory == "step":
        expected |= {k for k in b if k.endswith("weight_hh_l0")}
    assert idle == expected
    assert 0.05 < scalars["clipped"] < 0.95


def test_without_memory_it_is_feed_forward_ppo(double):
    """--memory step: two epochs of a policy of x_t, which gets every step of every agent by itself,
    with torch's Adam."""
    s = setting("two types", "--memory step --max-grad-norm .1 --epochs 2 --learning-rate .01")
    other = copy.deepcopy(s.agent.policy)
    adam = torch.optim.Adam(other.parameters(), lr=0.01)
    trial = random_trial(s)
    before = weights(other)

    def feed_forward(_, trial):
        log_probs, values = {}, {}
        for k, played in enumerate(trial):
            kinds = [kind for kind, _ in agents_of(played.game)]
            for t, b, i in played.acts.nonzero().tolist():
                obs = Observation(*(x[t, b] for x in played.obs))
                c = encode(other.encoder, obs, i, kinds[i])
                x = torch.cat((c, played.previous[t, b, i]))
                net = other.grus[kinds[i]]
                hidden = gru(net, x, torch.zeros(s.args.rnn_size))
                log_probs[k, t, b, i] = linear(other.actor, hidden, kinds[i]).log_softmax(-1)
                values[k, t, b, i] = linear(other.critic, hidden, kinds[i])[0]
        return log_probs, values

    found = rl2.update(s.args, s.agent, [trial], seeded(3))
    rng, norms = seeded(3), []
    for _ in range(2):
        for worlds in torch.randperm(4, generator=rng).tensor_split(2):
            part = [played.at(worlds) for played in trial]
            adam.zero_grad()
            loss_of(s, [part], feed_forward).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1))
            adam.step()
    assert close(weights(s.agent.policy), weights(other), 1e-8)
    assert close(found["grad_norm"], torch.stack(norms).mean()) and min(norms) > 0.1
    assert (weights(other) - before).abs().max() > 1e-3


def test_an_update_with_memory(double):
    """The same with memory, and two orders: a minibatch has worlds of each."""
    s = setting("alone", "--epochs 1")
    other = SimpleNamespace(args=s.args, agent=copy.deepcopy(s.agent))
    adam = torch.optim.Adam(other.agent.policy.parameters(), lr=s.args.learning_rate)
    trials = [random_trial(s, seed=seed) for seed in (0, 1)]
    rl2.update(s.args, s.agent, trials, seeded(3))
    rng = seeded(3)
    dealt = [torch.randperm(4, generator=rng).tensor_split(2) for _ in trials]
    for worlds in zip(*dealt):
        parts = [[game.at(rows) for game in trial] for trial, rows in zip(trials, worlds)]
        adam.zero_grad()
        loss_of(other, parts).backward()
        torch.nn.utils.clip_grad_norm_(other.agent.policy.parameters(), s.args.max_grad_norm)
        adam.step()
    assert close(weights(s.agent.policy), weights(other.agent.policy), 1e-8)


@pytest.mark.parametrize("flags", ["", "--no-value-norm"])
def test_what_losses_are_given(flags, double):
    """Advantages of all acting agents have mean 0 and deviation 1; targets V + A, in the units in
    which the network's values are, or raw."""
    s = setting("two types", flags)
    trials = [random_trial(s, seed=seed) for seed in (0, 1)]
    raw = [advantages(s, trial) for trial in trials]
    returns = [
        [played.values[:-1] + torch.tensor(A) for played, A in zip(trial, found)]
        for trial, found in zip(trials, raw)
    ]
    rl2.prepare(s.args, s.agent, trials)

    def of_all(games):
        return torch.cat([x[game.acts] for x, game in games])

    games = [played for trial in trials for played in trial]
    A = of_all([(torch.tensor(x), g) for found, t in zip(raw, trials) for x, g in zip(found, t)])
    G = of_all([(x, g) for found, trial in zip(returns, trials) for x, g in zip(found, trial)])
    expected = (A - A.mean()) / (A.std(correction=0) + 1e-5)
    assert close(of_all([(g.advantages, g) for g in games]), expected)
    mean, std = s.agent.value_norm.mean_std()
    assert close(of_all([(g.targets, g) for g in games]), (G - mean) / std)
    if flags:
        assert (mean, std) == (0.0, 1.0)
    else:
        assert (mean, std) == pytest.approx((float(G.mean()), float(G.std(correction=0))))


def test_value_norm_is_an_average_over_iterations():
    norm, rng = rl2.ValueNorm(), np.random.default_rng(0)
    assert norm.mean_std() == (0.0, 1.0)
    seen, shares = [], []
    for k in range(3):
        x = rng.normal(k, 1 + k, size=50)
        norm.update(torch.tensor([1.0, x.mean(), (x * x).mean()], dtype=torch.float64))
        seen.append(x)
        shares = [share * rl2.ValueNorm.DECAY for share in shares] + [1.0]
        share = np.array(shares) / sum(shares)
        mean = sum(w * x.mean() for w, x in zip(share, seen))
        square = sum(w * (x * x).mean() for w, x in zip(share, seen))
        assert norm.mean_std() == pytest.approx((mean, (square - mean**2) ** 0.5))


# --- Trials ---------------------------------------------------------------------------------------


def playing(name: str, flags: str = "", seed: int = 1) -> SimpleNamespace:
    """An agent of one of TRIALS with worlds, as train() makes them."""
    s = setting(name, flags)
    s.collectors = [rl2.Collector(s.args, x) for x in s.args.populations]
    s.agent.reward_scales = {each.name: each.reward_scale for each in s.collectors}
    s.rng = seeded(seed)
    return s


def trial_of(s: SimpleNamespace, order: list[int]) -> list:
    """A trial in these populations."""
    player, trial = rl2.TrialPlayer(s.agent, s.rng), []
    for number in order:
        s.collectors[number].worlds.reset()
        player.begin(s.collectors[number].worlds, first=not trial)
        trial.append(rl2.play_game(player, s.collectors[number]))
    return trial


@pytest.mark.parametrize("name", ["N changes", "chased"])
@pytest.mark.parametrize("memory", ["trial", "game", "step"])
def test_what_is_learned_from_is_what_was_played(name, memory):
    """The policy gives each recorded action its recorded probability, each step its value; with
    what was done and earned before, agent by agent, also through deaths and early ends."""
    s = playing(name, f"--memory {memory} --num-envs 16")
    s.agent.value_norm.update(torch.tensor([1.0, 3.0, 13.0], dtype=torch.float64))
    trial = trial_of(s, [0, 1, 2])
    log_probs, values = replayed(s.agent, trial)
    acts = [played.acts for played in trial]
    actions = torch.cat([played.actions[where] for played, where in zip(trial, acts)])
    recorded = torch.cat([played.log_probs[where] for played, where in zip(trial, acts)])
    assert close(rl2.pick(log_probs, actions), recorded, 1e-4)
    recorded = torch.cat([played.values[:-1][where] for played, where in zip(trial, acts)])
    assert close(values * 2 + 3, recorded, 1e-4)
    for b in range(16):
        last: dict = {}
        for k, played in enumerate(trial):
            keeps = memory == "trial" and k > 0
            names = agents_of(played.game)
            last = {x: last.get(x, torch.zeros(7)) if keeps else torch.zeros(7) for x in names}
            for x in last.values():
                x[6] = float(keeps)
            for t, i in np.ndindex(*played.acts.shape[::2]):
                if not played.acts[t, b, i]:
                    continue
                assert torch.equal(played.previous[t, b, i], last[names[i]])
                done = torch.zeros(7)
                done[played.actions[t, b, i]] = 1.0
                done[5] = played.rewards[t, b, i]
                last[names[i]] = done


def test_the_dead_and_games_that_end():
    """Who dies acts no more until the next game, nor does anybody when the game is over, though the
    world begins another one; nothing of that counts. A death has V = 0 only where nothing comes."""
    s = playing("chased", "--num-envs 64")
    trial = trial_of(s, [0, 1, 2])
    early = 0
    for played in trial:
        acts, (men, _) = played.acts, played.game.population
        assert (acts[1:] <= acts[:-1]).all() and acts[0].all()
        assert not acts.all() and acts[:, :, men:].any()
        over = ~acts[:, :, :men].any(2)  # no Pac-Man acts
        assert (over[:, :, None] <= ~acts[:, :, men:]).all()
        assert not played.rewards[~acts].any() and played.rewards[acts].any()
        early += int(over[-1].sum())
        goes_on = acts[-1] & (played.values[-1] != 0)
        assert (played.values[-1] != 0).any() and (goes_on == (played.values[-1] != 0)).all()
    assert early > 5
    counted = sum(float(each.reward_scale.sums[0].sum()) for each in s.collectors)
    assert counted == sum(int(played.acts.sum()) for played in trial)
    for played, collector in zip(trial, s.collectors):
        report = collector.returns.report()
        assert report["episodes"] == 64 and not collector.returns.running.any()
        men = played.game.population[0]
        assert f"return/{collector.name}/1" in report and men


@pytest.mark.parametrize("name", ["N changes", "chased"])
def test_the_value_at_a_games_end_is_of_its_last_state(name, monkeypatch):
    """Of the state after the last step, not of the new game's first one, which the world shows
    already; with the memory of that step. Who died in that step, or whose world had ended, has
    none."""
    s = playing(name, "--num-envs 256")
    finals, beginnings, results = [], [], []
    collector = s.collectors[1]
    real = collector.worlds.step

    def step(actions):
        result = real(actions)
        finals.append(result.final)
        beginnings.append(collector.worlds.obs)
        results.append(result)
        return result

    monkeypatch.setattr(collector.worlds, "step", step)
    player = rl2.TrialPlayer(s.agent, s.rng)
    collector.worlds.reset()
    player.begin(collector.worlds, first=True)
    played = rl2.play_game(player, collector)
    goes_on = played.values[-1] != 0
    assert goes_on.any() and len(finals) == collector.worlds.horizon
    ended = torch.stack([x.terminated for x in results]).any(0)[:, None]
    assert torch.equal(goes_on, results[-1].alive & ~ended)
    assert name != "chased" or (played.acts[-1] & ~results[-1].alive).any()

    def values(obs):
        return s.agent.act(played.game, obs, player.memory, goes_on)[1][goes_on]

    assert torch.equal(values(finals[-1]), played.values[-1][goes_on])
    assert not close(values(beginnings[-1]), played.values[-1][goes_on], 1e-4)


def test_rewards_are_divided_by_their_deviation():
    """Of all steps so far, by type, of who acted; elsewhere by the average of all populations; off:
    raw."""
    s = playing("two types", "--num-envs 16")
    seen: dict = {}
    real = rl2.Collector.add

    def watch(self, step, acts):
        real(self, step, acts)
        own = seen.setdefault(self.name, [])
        own.append((step.reward.clone(), acts.clone()))
        kinds = np.repeat(range(2), self.game.population)
        for kind in range(2):
            x = torch.cat([r[a & torch.tensor(kinds == kind)] for r, a in own]).double()
            found = s.agent.deviation(self.worlds)[kinds == kind]
            assert torch.allclose(found, x.std(correction=0).clamp(min=0.01).float(), rtol=1e-4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl2.Collector, "add", watch)
        played = trial_of(s, [0, 1, 2])[0]
    first, acts = seen["2,3"][0]
    assert (played.rewards[0][acts] != first[acts]).any()
    other = rl2.make_envs(s.args, "4,4", 2, 1)
    sums = torch.stack([each.reward_scale.sums for each in s.collectors]).mean(0)
    scale = rl2.RewardScale(other)
    scale.sums += sums
    assert torch.equal(s.agent.deviation(other), scale.deviation())
    s.agent.args = dataclasses.replace(s.args, scale_rewards=False)
    assert (s.agent.deviation(other) == 1).all()
    fresh = playing("two types")
    assert (fresh.agent.deviation(other) == 1).all(), "before any reward"


def test_each_population_is_as_often_first_and_last():
    s, orders = setting("N changes"), set()
    for seed in range(60):
        found = rl2.draw_orders(s.args, 4, seeded(seed))
        for place in range(4):
            assert sorted(order[place] for order in found) == [0, 1, 2, 3]
        assert all(sorted(order) == [0, 1, 2, 3] for order in found)
        orders |= {tuple(order) for order in found}
    assert len(orders) == 24
    args = dataclasses.replace(s.args, trial_games=3)
    assert [len(order) for order in rl2.draw_orders(args, 2, seeded(1))] == [3, 3]
    args = dataclasses.replace(args, trial="same")
    same = rl2.draw_orders(args, 4, seeded(1))
    assert sorted(same) == [[number] * 3 for number in range(4)], "each trial in one population"


def test_every_world_is_in_one_minibatch():
    s = playing("alone", "--num-envs 5")
    trials = rl2.collect(s.args, s.agent, s.collectors, s.rng)
    assert [[p.game.num_agents for p in trial] for trial in trials] in (
        [[1, 2], [2, 1]],
        [[2, 1], [1, 2]],
    )
    rl2.prepare(s.args, s.agent, trials)
    parts = list(rl2.minibatches(s.args, trials, s.rng))
    assert len(parts) == 2
    for k, trial in enumerate(trials):
        for g, played in enumerate(trial):
            rows = torch.cat([part[k][g].obs.own for part in parts], 1)
            same = (rows[:, :, None] == played.obs.own[:, None]).all(-1).all(-1).all(0)
            assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
            for part in parts:
                one = part[k][g]
                b = int((one.obs.own[0, 0] == played.obs.own[0]).all(-1).all(-1).nonzero()[0, 0])
                for name in ("previous", "acts", "actions", "rewards", "values", "targets"):
                    assert torch.equal(getattr(one, name)[:, 0], getattr(played, name)[:, b])


@pytest.mark.parametrize("name", ["N changes", "chased"])
def test_a_player_remembers_as_the_learner_does(name):
    """Three games of a trial by play() are those of play_game(), to the bit; then a new trial."""
    s = playing(name, "--no-scale-rewards --num-envs 8")
    collector, games = s.collectors[0], 3
    player, expected = rl2.TrialPlayer(s.agent, seeded(1)), []
    collector.worlds.seed(5)
    for game in range(2 * games):
        collector.worlds.reset()
        player.begin(collector.worlds, first=game % games == 0)
        played = rl2.play_game(player, collector)
        expected.append(sum(played.rewards * played.acts))  # in play()'s order
    worlds = rl2.make_envs(s.args, collector.name, 8, 1)
    worlds.seed(5)
    player = rl2.TrialPlayer(s.agent, seeded(1), games)
    for returns in expected:
        found = play(worlds, player)
        parts = returns.split(worlds.game.population, 1)
        assert np.array_equal(found, torch.stack([x.mean(1) for x in parts], 1).numpy())


def test_a_player_of_single_games_forgets():
    """Wherever an episode begins, also by itself in the middle of others."""
    s = playing("chased", "--num-envs 32")
    worlds = s.collectors[0].worlds
    worlds.reset()
    player, begun = rl2.TrialPlayer(s.agent, seeded(1)), 0
    for t in range(45):  # without reset()
        begins = worlds.clocks.time[:32] == 0
        worlds.step(player(worlds))
        fresh = (player.memory.previous == 0).all(-1).all(-1)
        assert torch.equal(fresh, begins)
        begun += int(begins.sum()) if t else 0
    assert begun > 2 * 32
    other = rl2.make_envs(s.args, "1,2", 4, 1)
    other.reset()
    assert player(other).shape == (4, 3), "other worlds, another population"


# --- A bandit that only memory solves -------------------------------------------------------------


class Bandit(rl2.ParticleWorld):
    """Games of one step. Of two arms, left and right, one pays 1 and the other -1: which is drawn
    for every trial of four games."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.begun, self.draws = -1, seeded(7)  # a collector's own reset()

    def reset(self):
        if self.begun % 4 == 0 or self.begun < 0:
            self.sign = 2.0 * torch.randint(2, (self.num_worlds, 1), generator=self.draws) - 1
        self.begun += 1
        return super().reset()

    def step(self, actions):
        step = super().step(actions)
        self.last_reward = self.sign * ((actions == 1).float() - (actions == 2).float())
        return step._replace(reward=self.last_reward)


def pulls(s: SimpleNamespace) -> list[float]:
    """Mean reward in each game of a trial."""
    (trial,) = rl2.collect(s.args, s.agent, s.collectors, s.rng)
    deviation = s.agent.deviation(s.collectors[0].worlds)
    return [float((played.rewards * deviation).mean()) for played in trial]


@pytest.mark.long
@pytest.mark.parametrize("memory", ["trial", "game"])
def test_the_bandit_is_solved_from_the_second_game_on(memory, monkeypatch):
    """And not in the first one; without memory of games in none."""
    monkeypatch.setattr(rl2, "ParticleWorld", Bandit)
    flags = "--task resource --populations 2 --trial-games 4 --max-episode-steps 1 --num-envs 64"
    flags += " --rnn-size 16 --hidden-size 8 --key-size 4 --learning-rate 1e-2 --epochs 4"
    args = parse(rl2, [*flags.split(), "--memory", memory])
    collector = rl2.Collector(args, "2")
    agent = rl2.Agent(args, collector.game, torch.device("cpu"))
    agent.reward_scales = {"2": collector.reward_scale}
    s = SimpleNamespace(args=args, agent=agent, collectors=[collector], rng=seeded(1))
    for _ in range(30 if memory == "trial" else 15):
        trials = rl2.collect(args, agent, s.collectors, s.rng)
        rl2.prepare(args, agent, trials)
        rl2.update(args, agent, trials, s.rng)
    found = np.mean([pulls(s) for _ in range(8)], 0)  # of 1,024 pulls
    assert abs(found[0]) < 0.2
    if memory == "trial":
        assert min(found[1:]) > 0.8
        worlds = rl2.make_envs(args, "2", 256, 1)
        worlds.begun = 0
        player = rl2.TrialPlayer(agent, seeded(1), 4)
        played = [play(worlds, player).mean() for _ in range(8)]
        assert max(abs(played[0]), abs(played[4])) < 0.25
        assert min(played[1:4] + played[5:]) > 0.8
    else:
        assert max(abs(found)) < 0.2


# --- Runs -----------------------------------------------------------------------------------------

ITERATION = 2 * 2 * 5 * 4  # environment steps of a tiny run: orders, games, steps, worlds


def test_same_seed_same_bits():
    """Another seed changes every weight matrix and what is logged."""
    looks = ("--log-every", 80, "--eval-every", 160)
    a, b, c = (run(RL2, name, 240, *looks, "--seed", seed) for name, seed in zip("abc", (7, 7, 8)))
    assert differences(a, b) == [] and metrics("a") == metrics("b") != metrics("c")
    assert len(metrics("a")) == 3 + 1 and a["iteration"] == 3
    changed = set(differences(a, c))
    for net, part in nets(a).items():
        assert {f"/agent/{net}/{k}" for k in part if k.endswith("weight")} < changed
    assert "/ranks/0/rng" in changed


MODES = {
    "treasure": "",
    "pacman": "--task pacman --populations 2,1 1,3 3,2 --trial-games 2",
    "rooms": "--task rooms --populations 2,3 1,3 --trial same --no-value-norm",
    "signpost": "--task signpost --populations 3 --trial-games 2 --no-scale-rewards",
    "adapt": "",
}


@pytest.mark.parametrize("mode", some_long(MODES, "treasure", "rooms", "signpost"))
def test_resumed_equals_uninterrupted(mode):
    """Stopped twice, also between two lines of the log."""
    flags = [*MODES[mode].split(), "--log-every", "160"]
    argv = tiny
    if mode == "adapt":
        run(RL2, "source", 80)
        argv = lambda name, run_dir, steps, *flags: adapting(run_dir, steps, *flags)  # noqa: E731
    assert rl2.main(argv(RL2, "whole", 320, *flags)) == 0
    assert rl2.main(argv(RL2, "cut", 52, *flags)) == 0
    if mode == "adapt":
        shutil.rmtree("source")  # a run that is resumed needs it no more
    assert rl2.main(resuming("cut", 164)) == 0
    assert rl2.main(resuming("cut", 320)) == 0
    whole, cut = newest("whole"), newest("cut")
    assert cut["timesteps"] >= 320 and differences(whole, cut) == []
    assert metrics("whole") == metrics("cut") and len(metrics("cut")) == 2
    assert all("return" in m for m in metrics("cut"))
    assert differences(nets(initial("whole")), nets(whole))


def test_looking_at_a_run_changes_nothing():
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generator."""
    looks = ("--log-every", 80, "--save-every", 80, "--eval-every", 160, "--final-episodes", 1)
    a, b = run(RL2, "plain", 240), run(RL2, "looks", 240, *looks)
    for state in (a, b):  # since the last line
        state["ranks"][0].pop("noted")
        for collector in collectors(state):
            collector.pop("ended")
    assert differences(a, b) == [] and len(metrics("looks")) == 3 + 1 + 1


def test_what_is_logged():
    """Returns of all episodes; and divided by their deviation, in each game of a trial."""
    run(RL2, "run", 80, "--task", "pacman", "--populations", "2,1", "1,2", "--log-every", 80)
    (m,) = metrics("run")
    names = {"timesteps", "policy_loss", "value_loss", "entropy", "kl", "clipped", "grad_norm"}
    names |= {"scaled_return/game 1", "scaled_return/game 2", "episodes", "return"}
    names |= {f"return/{x}{kind}" for x in ("2,1", "1,2") for kind in ("", "/0", "/1")}
    assert set(m) == names and m["episodes"] == 16  # of two populations
    assert 0 < m["entropy"] <= np.log(5) + 1e-6 and m["value_loss"] > 0


def test_evaluations(capfd):
    """All games of a trial in each population, scripted players in the worlds of the first, unseen
    ones at the end; alone it repeats the run's."""
    flags = ("--final-episodes", 5, "--eval-every", 80, "--eval-populations", 4, "--trial-games", 3)
    run(RL2, "run", 100, *flags)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    scripted = ("", " game 2", " game 3", " random", " nearest-first", " flee")
    assert list(results) == [f"{x}{name}" for x in (3, 5, 4) for name in scripted]
    assert len({row["return"] for row in results.values()}) == 18
    lines = [m for m in metrics("run") if any(k.startswith("eval/") for k in m)]
    rows = {k.split("/")[1] for k in lines[0] if k.startswith("eval/")}
    assert rows == {f"{x}{name}" for x in (3, 5) for name in scripted[:3]}
    before = [x for x in capfd.readouterr().out.splitlines() if x.startswith("|")]
    files = sorted(Path("run").iterdir())
    assert rl2.main(["--eval-only", "run"]) == 0
    assert [x for x in capfd.readouterr().out.splitlines() if x.startswith("|")] == before[-20:]
    assert sorted(Path("run").iterdir()) == files


def test_an_evaluation_keeps_its_memory(monkeypatch):
    """Game k of a trial begins with what game k - 1 left; each population with nothing. Games are
    as many as --trial-games, in other episodes; scripts play those of the first."""
    begun, starts = [], []
    real, reset = rl2.begin_game, rl2.ParticleWorld.reset

    def watch(agent, game, num_worlds, last):
        begun.append((game.population, None if last is None else last.hidden.abs().sum() > 0))
        return real(agent, game, num_worlds, last)

    def watch_reset(self, *given):
        reset(self, *given)
        starts.append(self.state.clone())

    run(RL2, "run", 4, "--trial-games", 3)
    args, agent = rl2.load_agent("run")
    monkeypatch.setattr(rl2, "begin_game", watch)
    monkeypatch.setattr(rl2.ParticleWorld, "reset", watch_reset)
    evaluation = harness.Evaluation(args, "final", 0, Path())
    evaluation.episodes = 3
    rl2.evaluate(args, agent, ["3", "5"], evaluation)
    assert begun == [((n,), last) for n in (3, 5) for last in (None, True, True)]
    assert evaluation.played == evaluation.expected == 2 * (3 + 3) * 3
    assert len(starts) == 2 * (3 + 3)
    for own in (starts[:6], starts[6:]):
        assert not any(torch.equal(x, y) for x, y in itertools.combinations(own[:3], 2))
        assert all(torch.equal(x, own[0]) for x in own[3:])


def test_a_run_as_a_player():
    """load_player() gives the policy, with the sizes of rewards of its run."""
    state = run(RL2, "run", 80)
    args, agent = rl2.load_agent("run")
    assert differences(dict(agent.policy.state_dict()), state["agent"]["policy"]) == []
    for name, own in zip(("3", "5"), collectors(state)):
        assert torch.equal(agent.reward_scales[name].sums, own["rewards"])
    worlds = rl2.make_envs(args, "4", 5, 1)
    returns = []
    for seed in (1, 1, 2):
        worlds.seed(1)
        returns.append(play(worlds, rl2.load_player("run", seed)))
    assert (returns[0] == returns[1]).all() and (returns[0] != returns[2]).any()


def test_a_world_with_rewards_that_are_none(capfd, monkeypatch):
    """The update that comes next ends the run, and no checkpoint holds any of it."""
    step = rl2.ParticleWorld.step

    def poisoned(self, actions):
        result = step(self, actions)
        result.reward[0, 0] = float("nan")
        return result

    monkeypatch.setattr(rl2.ParticleWorld, "step", poisoned)
    assert rl2.main(tiny(RL2, "run", 1000)) == 1
    assert "rewards is not finite" in capfd.readouterr().err
    assert [entry["timesteps"] for entry in index("run")] == [0]


# --- Adapting -------------------------------------------------------------------------------------


def adapting(run_dir, steps: int, *flags) -> list[str]:
    """The command line of an adaptation of the run `source` to four agents."""
    argv = ["--adapt", "source", "--population", 4, "--final-episodes", 0, "--eval-every", 0]
    argv += ["--save-every", 0, "--log-every", 1000000, "--total-timesteps", steps]
    return [str(x) for x in (*argv, "--run-dir", run_dir, *flags)]


def test_adapting():
    """Policy and sizes of values and rewards are the source's, the optimiser is new; trials are as
    long as the source's, all their games in the new population."""
    source = run(RL2, "source", 160, "--epochs", 3)
    assert rl2.main(adapting("run", 40, "--log-every", 40)) == 0
    begun, end = initial("run"), newest("run")
    assert differences(nets(begun), nets(source)) == []
    assert begun["agent"]["optimiser"]["state"] == {} != source["agent"]["optimiser"]["state"]
    (own,) = collectors(begun)
    assert own["worlds"]["game"] == "treasure 4"
    sums = torch.stack([x["rewards"] for x in collectors(source)]).mean(0)
    assert torch.equal(own["rewards"], sums) and sums.any()
    assert end["timesteps"] == 2 * 5 * 4 and end["iteration"] == 1
    (m,) = metrics("run")
    assert m["episodes"] == 8 and "return/4" in m
    changed = differences(nets(begun), nets(end))
    assert {k.split("/")[1] for k in changed} == {"policy", "value_norm"}
    steps = {float(x["step"]) for x in end["agent"]["optimiser"]["state"].values()}
    assert steps == {3.0 * 2}, "the source's epochs"


def test_flags_of_the_source_hold():
    """Unless typed; a preset changes no sizes of networks; what is about this run alone is new."""
    run(RL2, "source", 4, "--no-shaping", "--seed", 3)
    saved = read(Path("source") / index("source")[0]["name"])["args"]
    few = ["--adapt", "source", "--population", "4"]
    args = vars(rl2.read(few))
    about = {x.name for x in dataclasses.fields(harness.RunArgs)} | {"adapt", "population"}
    own = {k: tuple(x) if isinstance(x, list) else x for k, x in saved.items()}
    assert {k for k in args if k not in about and args[k] != own[k]} == set()
    assert not args["shaping"] and args["seed"] == 1 and args["rnn_size"] == 6
    typed = vars(rl2.read([*few, "--preset", "cpu", "--epochs", "7", "--trial-games", "5"]))
    changed = {k for k in typed if typed[k] != args[k]}
    preset = set(rl2.PRESETS["cpu"]) - {"rnn_size"}
    assert changed == preset | {"preset", "epochs", "trial_games"}


def test_presets_of_adaptations():
    """Without --preset it is the source's, as are its flags; with it flags are the preset's."""
    run(RL2, "source", 4, "--preset", "cpu", "--no-compile", "--gamma", 0.5)
    few = ["--adapt", "source", "--population", "4"]
    args = rl2.read(few)
    assert (args.preset, args.gamma, args.learning_rate) == ("cpu", 0.5, 2e-3)
    fast = dict(rl2.PRESETS["cpu"])
    usual = {name: getattr(rl2.Args, name) for name in fast}
    for preset, flags in (("cpu", fast), ("paper", usual)):
        flags = flags | {"preset": preset, "rnn_size": 6, "gae_lambda": 0.7}
        typed = rl2.read([*few, f"--preset={preset}", "--gae-lambda", "0.7"])
        assert typed == dataclasses.replace(args, **flags)


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # command line: words that the one sentence has to contain
    "--minibatches 5 --num-envs 4": "--minibatches --num-envs",
    "--populations 3 6 3": "--populations twice",
    "--population 4": "--adapt --population",
    "--adapt run": "--adapt --population",
    "--adapt run --population 4,2": "treasure 4,2",
    "--adapt run --population x": "x",
    "--adapt run --population 4 --rnn-size 64": "--rnn-size 6",
    "--adapt run --population 4 --memory step": "--memory trial",
    "--adapt run --population 4 --head-gain 7": "--head-gain 2.0",
    "--adapt run --population 4 --trial same": "--trial cycle",
    "--populations 3 --trial-games 2 --trial same": "--trial same populations",
    "--trial-games 1 --trial same": "--trial same games",
    "--adapt run --population 4 --populations 3 6": "--populations",
    "--adapt run --population 4 --no-value-norm": "--value-norm True",
    "--adapt run --population 4 --run-dir run": "holds a run already",
    "--adapt other --population 4": "maddpg_particle rl2_particle",
    "--adapt nowhere --population 4": "nowhere checkpoint",
    "--task pirates": "'pirates' treasure resource pacman",
    "--task pacman": "pacman 3",
    "--populations 3,": "3,",
    "--eval-populations 0": "0",
    "--clip -1": "--clip -1",
    "--rnn-size 0": "--rnn-size 0",
    "--resume run --gamma .5": "--gamma 0.99",
    "--resume run --trial-games 3": "--trial-games 0",
    "--resume other": "maddpg_particle rl2_particle",
    "--eval-only other": "maddpg_particle rl2_particle",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_line(line, capfd, monkeypatch):
    if "run" in line.split():
        run(RL2, "run", 4)
    if "other" in line:
        run(MADDPG, "other", 4)
    capfd.readouterr()
    monkeypatch.setattr(rl2, "collect", lambda *_: pytest.fail("the run has begun"))
    before = sorted(Path().rglob("*"))
    assert rl2.main(shlex.split(line)) == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("error: ") and err.endswith(".") and "\n" not in err
    assert [word for word in WRONG[line].split() if word not in err] == []
    assert sorted(Path().rglob("*")) == before


def test_presets():
    plain, fast = parse(rl2, []), parse(rl2, ["--preset", "cpu"])
    assert plain == rl2.Args() == parse(rl2, ["--preset", "paper"])
    assert fast == dataclasses.replace(plain, preset="cpu", **rl2.PRESETS["cpu"])
    assert parse(rl2, ["--preset", "cpu", "--rnn-size", 7]).rnn_size == 7


# --- Flags ----------------------------------------------------------------------------------------
# Each entry: flags, what to measure on a run with and one without them, how the two relate.


def policy(state, run_dir):
    return [state["agent"]["policy"]]


def first_weights(state, run_dir):
    return [initial(run_dir)["agent"]["policy"]]


def moved(state, run_dir):
    return bool(differences(first_weights(state, run_dir), policy(state, run_dir)))


def steps_of(state, run_dir):
    return float(state["agent"]["optimiser"]["state"][0]["step"])


def shape(name):
    return lambda state, run_dir: tuple(state["agent"]["policy"][name].shape)


def games(state, run_dir):
    return [x["worlds"]["game"] for x in collectors(state)]


def moments(state, run_dir):
    return sum(float(x["exp_avg_sq"].sum()) for x in state["agent"]["optimiser"]["state"].values())


def rewards(state, run_dir):
    """Mean and deviation of what the first population's agents earned."""
    count, total, square = collectors(state)[0]["rewards"][:, 0].tolist()
    return [torch.tensor([total / count, square / count])]


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
    "seed": ("--seed 7", policy, None),
    "total_timesteps": ("--total-timesteps 161", lambda s, d: s["timesteps"], (160, 240)),
    "capture_video": (
        "--capture-video --final-episodes 1",
        lambda s, d: sorted(x.name for x in d.glob("videos/*")),
        ([], [f"final-160-{x}{k}.mp4" for x in (3, 5) for k in ("-game 2", "")]),
    ),
    "task": (
        "--task resource",
        games,
        (["treasure 3", "treasure 5"], ["resource 3", "resource 5"]),
    ),
    "populations": ("--populations 4", games, (["treasure 3", "treasure 5"], ["treasure 4"])),
    "eval_populations": (
        "--eval-populations 4 --final-episodes 2",
        evaluated("final/4/episodes"),
        (0, 2),
    ),
    "shaping": ("--no-shaping", rewards, None),
    "collision_penalty": ("--collision-penalty 300", rewards, None),
    "num_envs": ("--num-envs 8", lambda s, d: s["iteration"], (2, 1)),
    "max_episode_steps": (
        "--max-episode-steps 10",
        lambda s, d: [float(x["ended"][0]) for x in collectors(s)],
        ([16.0, 16.0], [8.0, 8.0]),
    ),
    "trial": ("--trial same", policy, None),
    "trial_games": (
        "--trial-games 4",
        lambda s, d: [float(x["ended"][0]) for x in collectors(s)] + [s["iteration"]],
        ([16.0, 16.0, 2], [16.0, 16.0, 1]),
    ),
    "memory": ("--memory step", policy, None),
    "rnn_size": ("--rnn-size 9", shape("grus.0.weight_hh_l0"), ((18, 6), (27, 9))),
    "hidden_size": ("--hidden-size 9", shape("encoder.value.weight"), ((1, 8, 8), (1, 9, 9))),
    "key_size": ("--key-size 3", shape("encoder.graph.key.weight"), ((1, 8, 4), (1, 8, 3))),
    "head_gain": ("--head-gain 4", first_weights, None),
    "learning_rate": ("--learning-rate 0", moved, (True, False)),
    "gamma": ("--gamma .5", policy, None),
    "gae_lambda": ("--gae-lambda .5", policy, None),
    "clip": ("--clip 0 --epochs 3", lambda s, d: noted(s, "clipped"), "up"),
    "epochs": ("--epochs 3", steps_of, (4.0, 12.0)),
    "minibatches": ("--minibatches 4", steps_of, (4.0, 8.0)),
    "value_coef": ("--value-coef 5", policy, None),
    "value_norm": (
        "--no-value-norm",
        lambda s, d: bool(s["agent"]["value_norm"]["sums"].any()),
        (True, False),
    ),
    "entropy_coef": ("--entropy-coef 5", policy, None),
    "scale_rewards": ("--no-scale-rewards", policy, None),
    "max_grad_norm": ("--max-grad-norm .00001", moments, "down"),
    "log_every": ("--log-every 80", logged("entropy"), (0, 2)),
    "eval_every": ("--eval-every 80", logged("eval/3/return"), (0, 2)),
    "eval_episodes": ("--eval-every 80 --eval-episodes 3", evaluated("eval/3/episodes"), (0, 3)),
    "final_episodes": ("--final-episodes 5", evaluated("final/3/episodes"), (0, 5)),
    "save_every": (
        "--save-every 80",
        lambda s, d: [entry["timesteps"] for entry in index(d)],
        ([160, 0], [160, 80]),
    ),
}
ELSEWHERE = {
    "run_dir": "every run here",
    "resume": "test_resumed_equals_uninterrupted",
    "eval_only": "test_evaluations",
    "preset": "test_presets",
    **dict.fromkeys(("adapt", "population"), "test_adapting"),
    "plain": "test_policy_and_value_are_those_of_the_equations",
    **dict.fromkeys(("device", "compile", "num_threads"), "test_devices_and_threads"),
    **dict.fromkeys(("tf32", "onednn"), "tests/harness"),
    **dict.fromkeys(("track", "wandb_project", "wandb_mode", "wandb_timeout"), "tests/harness"),
}


def noted(state, name):
    """Of what the next line of the log would have."""
    return float(state["ranks"][0]["noted"][name].mean())


def test_every_flag_is_tested():
    assert {x.name for x in dataclasses.fields(rl2.Args)} == set(FLAGS) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run without further flags."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(RL2, run_dir, 2 * ITERATION), run_dir


@pytest.mark.parametrize("field", FLAGS)
def test_flag_changes_what_it_names(field, plain, tmp_path):
    flags, measure, relation = FLAGS[field]
    state = run(RL2, tmp_path / "run", 2 * ITERATION, *flags.split())
    without, with_flag = measure(*plain), measure(state, tmp_path / "run")
    if relation is None:
        for a, b in zip(without, with_flag, strict=True):
            assert differences(a, b)
    elif relation in ("up", "down"):
        assert with_flag > without if relation == "up" else with_flag < without
    else:
        assert (without, with_flag) == relation


def test_devices_and_threads(monkeypatch):
    """On a CPU --compile is for the pair kernels alone."""
    made, asked = [], []

    class World(rl2.ParticleWorld):
        def __init__(self, *args, **options):
            made.append((options["device"], options["compiled"]))
            super().__init__(*args, **options | {"device": "cpu", "compiled": False})

    class Pairs(rl2.FastPairs):
        def __init__(self, *args, compiled):
            asked.append(compiled)
            super().__init__(*args)

    monkeypatch.setattr(rl2, "ParticleWorld", World)
    monkeypatch.setattr(rl2, "FastPairs", Pairs)
    run(RL2, "one", 4)
    assert set(asked) == {False} and torch.get_num_threads() == 1
    asked.clear()
    run(RL2, "two", 4, "--populations", 3, "--device", "cpu", "--num-threads", 2, "--compile")
    assert set(asked) == {True} and torch.get_num_threads() == 2
    assert set(made) == {("cpu", False)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags in ("", "--compile", "--device cpu --compile"):
        rl2.make_envs(parse(rl2, flags.split()), "3", 2, 1)
    assert made[-3:] == [("cuda", False), ("cuda", True), ("cpu", False)]
