"""MRA and its parent against NumPy written from the equations: networks of o_ij with loops over i
and j, expectations by enumeration, gradients by finite differences or by autograd of a plain form.

Weights are read off the modules; everything else here is written anew. Networks run in double.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from particle_tools import MADDPG, MRA, parse, script, sharpen, softmax, weights

from envs.particle import pairs
from envs.particle.episodes import first_unclear, number_of
from envs.particle.worlds import make_game

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.numeric

mra, maddpg = script(MRA), script(MADDPG)
REPRESENTATIONS = ("option", "concat", "bilinear")
SMALL = "--hidden-size 8 --key-size 4 --buffer-size 64 --batch-size 16 --num-envs 4 --device cpu"
GAMES = {  # task, population, one parameter set per type
    "one set": ("resource", "4", True),
    "per type": ("pacman", "2,1", True),
    "per agent": ("resource", "3", False),
    "per agent of two types": ("pacman", "2,2", False),
}
NETS = ("attention", "actor", "critic", "target_actor", "target_critic")
NETS += ("latent_prior", "population_classifier")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- Settings -------------------------------------------------------------------------------------


def setting(
    task: str = "resource",
    *populations: str,
    script: ModuleType = mra,
    share: bool = True,
    flags: str = "",
    double: bool = True,
) -> SimpleNamespace:
    """Agent, worlds with replays and generators of a script, all weights and biases far from what
    they begin with, target networks away from the others."""
    populations = populations or ("3",)
    if script is mra:
        own = ["--populations", *populations, *([] if share else ["--no-share-parameters"])]
    else:
        own = ["--population", *populations, *(["--share-parameters"] if share else [])]
    args = parse(script, ["--task", task, *SMALL.split(), *own, *flags.split()])
    collectors = [script.Collector(args, name, torch.device("cpu")) for name in populations]
    agent = script.Agent(args, collectors[0].game, torch.device("cpu"))
    for seed, name in enumerate(NETS):
        if net := getattr(agent, name, None):
            sharpen(net, 0.6, seed)
            net.double() if double else None
    agent.attention.query.weight.data *= 0.5  # graphs that neither are uniform nor choose one
    agent.attention.query.bias.data *= 0.5
    rngs = {"rng": torch.Generator().manual_seed(3)}
    rngs |= {"latent_rng": torch.Generator().manual_seed(4)} if script is mra else {}
    return SimpleNamespace(
        script=script,
        args=args,
        agent=agent,
        collectors=collectors,
        game=collectors[0].game,
        dtype=torch.float64 if double else torch.float32,
        rngs=rngs,
    )


def games(script: ModuleType, name: str, flags: str = "", double: bool = True) -> SimpleNamespace:
    task, population, share = GAMES[name]
    return setting(task, population, script=script, share=share, flags=flags, double=double)


def random_view(s: SimpleNamespace, M: int, seed: int = 0, dead: float = 0.0):
    """Any features, latents and, with dead > 0, any who live; in the first row only agent 0."""
    rng, game = np.random.default_rng(seed), s.game
    N = game.num_agents
    alive = rng.random((M, N)) >= dead
    if dead:
        alive[0] = np.arange(N) == 0
    mask = alive[:, None] & ~np.eye(N, dtype=bool)
    own, others = (rng.normal(size=(M, N, d)) for d in (game.own_features, game.entity_features))
    counts = game.population if s.args.share_parameters else (1,) * N
    fields = [torch.tensor(x, dtype=s.dtype) for x in (own, others)]
    fields += [torch.tensor(alive), torch.tensor(mask), counts]
    if s.script is mra:
        z = rng.integers(s.args.latent_size, size=(M, N))
        fields.append(torch.tensor(np.eye(s.args.latent_size)[z], dtype=s.dtype))
        fields.append(int(rng.integers(len(s.args.populations))))
    return s.script.View(*fields)


def eq_11(agent: Any, view: Any, log_prior: torch.Tensor) -> torch.Tensor:
    return mra.graph_information(agent, view, agent.attention.all(view), log_prior)


def eq_13(agent: Any, view: Any, log_prior: torch.Tensor, label: int) -> torch.Tensor:
    return mra.population_loss(agent, view, agent.attention.all(view), log_prior, label)


def random_batch(s: SimpleNamespace, M: int, seed: int = 0, dead: float = 0.0):
    rng, N = np.random.default_rng((seed, 1)), s.game.num_agents
    view, later = random_view(s, M, seed, dead), random_view(s, M, seed + 1000, dead)
    if s.script is mra:
        later = later._replace(z=view.z)
    actions = torch.tensor(rng.integers(5, size=(M, N)))
    rewards = torch.tensor(rng.normal(size=(M, N)), dtype=s.dtype)
    return s.script.Batch(view, later, actions, rewards, torch.tensor(rng.random(M) < 0.3))


def random_graph(view, seed: int = 9) -> torch.Tensor:
    noise = torch.randn(view.mask.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(view.own.dtype).masked_fill(~view.mask, -1e9).softmax(-1) * view.mask


def random_prior(N: int, Z: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.log(softmax(np.random.default_rng(seed).normal(size=(N, Z)))))


def gumbel_noise(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """What a generator with this seed gives: Gumbel noise of these shapes, one after another."""
    rng = torch.Generator().manual_seed(seed)
    return [-torch.empty(s).exponential_(generator=rng).log().double().numpy() for s in shapes]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- The truth, in NumPy --------------------------------------------------------------------------


def arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: x.detach().double().numpy().copy() for name, x in net.state_dict().items()}


def set_of(view) -> np.ndarray:
    """(N,): the parameter set of each agent."""
    return np.repeat(np.arange(len(view.counts)), view.counts)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return np.log(softmax(x))


def numbers(x) -> np.ndarray:
    return x.detach().double().numpy()


def scalar(x: torch.Tensor) -> float:
    return x.detach().item()


def entity(others: np.ndarray, i: int, j: int) -> np.ndarray:
    """o_ij = [p_j - p_i, v_j, ...]."""
    return np.concatenate((others[j, :2] - others[i, :2], others[j, 2:]))


def score(w: dict, how: str, s: int, own: np.ndarray, o: np.ndarray, z: np.ndarray) -> float:
    """sum_h z_h q_h . k_h of the heads of one pair; concat and bilinear have a single head."""
    Z, hidden = len(z), w["own.weight"].shape[-1]
    first, bias = w["entity.weight"], w["entity.bias"]
    if how == "concat":
        own, o = np.concatenate((own, z)), np.concatenate((o, z))
        first, bias = np.concatenate((first[s], w["entity_z.weight"][s])), bias[s]
        bias = bias + w["entity_z.bias"][s]
    elif how == "bilinear":  # inputs [o, 1] x z: each z has its own matrix and its own bias
        own, o = np.outer(own, z).ravel(), np.outer(np.append(o, 1), z).ravel()
        stacked = np.concatenate((first, bias[:, None]), 1)[s * Z : s * Z + Z]  # (Z, De + 1, H)
        first, bias = stacked.transpose(1, 0, 2).reshape(-1, hidden), 0
    else:
        first, bias = first[s], bias[s]
    x, y = relu(own @ w["own.weight"][s] + w["own.bias"][s]), relu(o @ first + bias)
    total, heads = 0.0, Z if how == "option" else 1
    for h in range(heads):
        q = x @ w["query.weight"][s * heads + h] + w["query.bias"][s * heads + h]
        k = y @ w["key.weight"][s * heads + h] + w["key.bias"][s * heads + h]
        total += (z[h] if how == "option" else 1.0) * (q @ k)
    return total


def graph(w: dict, view, how: str, z: np.ndarray | None = None) -> np.ndarray:
    """Eq. (1) with loops: g_ij = softmax over living j != i of q_i . k_ij / sqrt(key)."""
    own, others, alive = numbers(view.own), numbers(view.others), view.alive.numpy()
    if z is None:
        z = numbers(view.z) if hasattr(view, "z") else np.ones((*alive.shape, 1))
    (M, N), sets = alive.shape, set_of(view)
    g, scale = np.zeros((M, N, N)), np.sqrt(w["query.weight"].shape[-1])
    for m, i in itertools.product(range(M), range(N)):
        seen = [j for j in range(N) if alive[m, j] and j != i]
        if seen:
            pairs = [entity(others[m], i, j) for j in seen]
            scores = [score(w, how, sets[i], own[m, i], o, z[m, i]) / scale for o in pairs]
            g[m, i, seen] = softmax(np.array(scores))
    return g


def graphs(w: dict, view, how: str) -> np.ndarray:
    """Those with each z for everybody (Z, M, N, N)."""
    eye = np.eye(view.z.shape[-1])
    return np.stack([graph(w, view, how, np.broadcast_to(z, view.z.shape)) for z in eye])


def read(
    w: dict, view, g: np.ndarray, actions: np.ndarray | None = None, z: int | None = None
) -> np.ndarray:
    """out(relu(two layers of o_s + sum_j g_ij V(o_ij))), V two layers, with loops. With z there is
    a row of weights for this z beside the sum."""
    own, others, alive = numbers(view.own), numbers(view.others), view.alive.numpy()
    (M, N), sets = alive.shape, set_of(view)
    if actions is not None:
        others = np.concatenate((others, np.eye(5)[actions]), -1)
    rows = np.zeros((M, N, w["out.bias"].shape[-1]))
    for m, i in itertools.product(range(M), range(N)):
        s, e = sets[i], 0.0
        for j in range(N):
            if alive[m, j] and j != i:
                y = entity(others[m], i, j) @ w["entity.weight"][s] + w["entity.bias"][s]
                e = e + g[m, i, j] * (relu(y) @ w["value.weight"][s] + w["value.bias"][s])
        x = relu(own[m, i] @ w["own.first.weight"][s] + w["own.first.bias"][s])
        x = x @ w["own.last.weight"][s] + w["own.last.bias"][s]
        if z is not None:
            x = x + w["of_z"][s, z]
        rows[m, i] = relu(x + e) @ w["out.weight"][s] + w["out.bias"][s]
    return rows


def average(x: np.ndarray, alive: np.ndarray) -> float:
    """Over the living."""
    return x[alive].sum() / alive.sum()


def at(x: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, actions[..., None], -1)[..., 0]


def check_slopes(value, w: dict, gradients: dict, each: int = 2, tolerance: float = 1e-7) -> None:
    """Central differences of value(w) for the weights of each name with the largest gradients, and
    for one more."""
    for name, gradient in gradients.items():
        flat = np.abs(gradient).ravel()
        for place in {*np.argsort(flat)[-each:], len(flat) // 2}:
            index, values = np.unravel_index(place, gradient.shape), []
            for step in (1e-6, -1e-6):
                moved = w | {name: w[name].copy()}
                moved[name][index] += step
                values.append(value(moved))
            slope = (values[0] - values[1]) / 2e-6
            assert abs(slope - gradient[index]) < tolerance, (name, index, slope, gradient[index])


def gradients_of(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: numbers(p.grad) for name, p in net.named_parameters() if p.grad is not None}


# --- The plain form in torch, for gradients -------------------------------------------------------


def plain_entities(others: torch.Tensor) -> torch.Tensor:
    """o_ij (M, N, N, De)."""
    N = others.shape[1]
    relative = others[:, None, :, :2] - others[:, :, None, :2]
    return torch.cat((relative, others[:, None, :, 2:].expand(-1, N, -1, -1)), -1)


def plain_graph(phi, view, how: str) -> torch.Tensor:
    """Eq. (1) as it stands, with N^2 H numbers; view.z may be a mixture."""
    sets, z = torch.tensor(set_of(view)), getattr(view, "z", None)
    own, o, w = view.own, plain_entities(view.others), dict(phi.named_parameters())
    first, bias = w["entity.weight"], w["entity.bias"]
    if how == "bilinear":
        own = torch.einsum("mnd,mnz->mndz", own, z).flatten(2)
        first, bias = (x.unflatten(0, (-1, z.shape[-1]))[sets] for x in (first, bias))
        y = torch.einsum("mijd,miz,izdh->mijh", o, z, first)
        y = y + torch.einsum("miz,izh->mih", z, bias)[:, :, None]
    else:
        if how == "concat":
            own = torch.cat((own, z), -1)
            o = torch.cat((o, z[:, :, None].expand(-1, -1, o.shape[2], -1)), -1)
            first = torch.cat((first, w["entity_z.weight"]), 1)
            bias = bias + w["entity_z.bias"]
        y = torch.einsum("mijd,idh->mijh", o, first[sets]) + bias[sets][:, None]
    x = F.relu(torch.einsum("mnd,ndh->mnh", own, w["own.weight"][sets]) + w["own.bias"][sets])
    heads = len(w["query.weight"]) // len(view.counts)
    split = [w[name].unflatten(0, (-1, heads))[sets] for name in ("query.weight", "query.bias")]
    q = torch.einsum("mnh,nxhk->mnxk", x, split[0]) + split[1]
    k = torch.einsum("mijh,ixhk->mijxk", y.relu(), w["key.weight"].unflatten(0, (-1, heads))[sets])
    if heads > 1:
        q = q * z[..., None]
    scores = torch.einsum("mixk,mijxk->mij", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(~view.mask, -1e9).softmax(-1) * view.mask


def plain_graphs(phi, view, how: str) -> torch.Tensor:
    eye = torch.eye(view.z.shape[-1], dtype=view.z.dtype)
    seen = [view._replace(z=z.expand_as(view.z)) for z in eye]
    return torch.stack([plain_graph(phi, each, how) for each in seen])


def plain_read(net, view, g: torch.Tensor, actions: torch.Tensor | None = None) -> torch.Tensor:
    """A readout as it stands, with N^2 H numbers; g may have more dimensions in front."""
    if g.dim() > 3:
        return torch.stack([plain_read(net, view, each, actions) for each in g])
    sets, w, others = torch.tensor(set_of(view)), dict(net.named_parameters()), view.others
    if actions is not None:
        others = torch.cat((others, torch.eye(5, dtype=others.dtype)[actions]), -1)

    def layer(x: torch.Tensor, name: str, letters: str) -> torch.Tensor:
        bias = w[f"{name}.bias"][sets]
        weighted = torch.einsum(f"{letters}d,idh->{letters}h", x, w[f"{name}.weight"][sets])
        return weighted + (bias[:, None] if letters == "mij" else bias)

    y = layer(layer(plain_entities(others), "entity", "mij").relu(), "value", "mij")
    e = torch.einsum("mij,mijh->mih", g, y)
    x = layer(layer(view.own, "own.first", "mi").relu(), "own.last", "mi")
    return layer((x + e).relu(), "out", "mi")


def assert_same_gradients(ours, theirs, net, tolerance: float) -> None:
    """Of two losses for the weights of a network, which both reach."""
    names, parameters = zip(*net.named_parameters())
    mine, reference = (
        torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, theirs)
    )
    for name, a, b in zip(names, mine, reference):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max()), name


def small_latents(how: str) -> str:
    return f"--representation {how} --latent-size 3"


# --- 1. phi ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("how", [*REPRESENTATIONS, "parent"])
@pytest.mark.parametrize(("double", "error"), [(True, 1e-9), (False, 1e-5)])
def test_graph_is_eq_1_with_loops(name, how, double, error):
    script = maddpg if how == "parent" else mra
    s = games(script, name, "" if how == "parent" else small_latents(how), double)
    for dead in (0.0, 0.4):
        view, phi = random_view(s, 4, dead=dead), s.agent.attention
        g, expected = numbers(phi(view)), graph(arrays(phi), view, how)
        assert np.abs(g - expected).max() < error
        assert (g[~view.mask.numpy()] == 0).all(), "oneself and the dead"
        lonely = ~view.mask.any(-1).numpy()
        assert lonely.any() == (dead > 0)
        assert (g[lonely] == 0).all(), "no living other"
        assert np.abs(g[~lonely].sum(-1) - 1).max() < error
        assert np.ptp(expected[~lonely].max(-1)) > 0.1, "the test sees more than uniform graphs"
        if script is mra:
            every = numbers(phi.all(view))
            assert np.abs(every - graphs(arrays(phi), view, how)).max() < error
            assert np.abs(every - every[0]).max() > 0.01, "z matters"


@pytest.mark.parametrize("how", REPRESENTATIONS)
@pytest.mark.parametrize("name", ["one set", "per type"])
def test_mixtures_of_latents_mix_scores_of_heads(how, name):
    """What straight-through latents need: the same equation with any z."""
    s = games(mra, name, small_latents(how))
    view = random_view(s, 3)
    view = view._replace(z=torch.randn(view.z.shape, generator=seeded(1)).double().softmax(-1))
    ours, expected = s.agent.attention(view), graph(arrays(s.agent.attention), view, how)
    assert np.abs(numbers(ours) - expected).max() < 1e-9


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
def test_views_are_the_worlds_observations(script):
    """o_s, living others and o_ij as envs.particle.worlds gives them; z one-hot."""
    s = setting("pacman", "2,2", script=script, double=False)
    world = s.collectors[0].worlds
    for _ in range(12):
        world.step(torch.randint(0, 5, (4, 4), generator=s.rngs["rng"]))
    z = torch.tensor([[0, 5, 2, 1]] * 4)
    view = s.agent.view(s.game, world.obs, *([z] if script is mra else []))
    assert torch.equal(view.own, world.obs.own)
    assert torch.equal(view.alive, world.obs.alive)
    assert torch.equal(view.mask, world.obs.alive[:, None] & ~torch.eye(4, dtype=torch.bool))
    assert torch.allclose(plain_entities(view.others), world.obs.entities(), atol=1e-7)
    assert view.counts == (2, 2)
    if script is mra:
        assert np.array_equal(view.z, np.eye(6)[z])


# --- 2., 3. Readouts and pair kernels -------------------------------------------------------------


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize(("double", "error"), [(True, 1e-9), (False, 1e-5)])
def test_readouts_are_sums_over_pairs(script, name, double, error):
    """Actor and critic, the latter with the others' actions in o_ij."""
    s = games(script, name, double=double)
    for dead in (0.0, 0.4):
        batch = random_batch(s, 4, dead=dead)
        view, g = batch.view, random_graph(batch.view)
        for net, actions in ((s.agent.actor, None), (s.agent.critic, batch.actions)):
            expected = read(arrays(net), view, numbers(g), actions)
            assert np.abs(numbers(net(view, g, actions)) - expected).max() < error
            if script is mra:
                two = torch.stack((g, random_graph(view, 1)))
                both = numbers(net(view, two, actions))
                other = read(arrays(net), view, numbers(two[1]), actions)
                assert np.abs(both - np.stack((expected, other))).max() < error


@pytest.mark.parametrize("population", [("resource", "3", "4"), ("pacman", "2,1", "1,1")])
def test_xi_is_a_readout_with_one_output_per_population(population):
    s = setting(*population)
    view = random_view(s, 4, dead=0.3)
    g = random_graph(view)
    net = s.agent.population_classifier
    ours, expected = net(view, g), read(arrays(net), view, numbers(g))
    assert expected.shape[-1] == 2
    assert np.abs(numbers(ours) - expected).max() < 1e-9


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("how", [*REPRESENTATIONS, "parent"])
@pytest.mark.parametrize("form", ["", "--plain"])
def test_gradients_are_those_of_the_plain_pair_form(name, how, form):
    """phi by way of actor and critic, and these themselves; float64 1e-9."""
    script = maddpg if how == "parent" else mra
    s = games(script, name, form + ("" if how == "parent" else " " + small_latents(how)))
    batch, agent = random_batch(s, 4, dead=0.2), s.agent
    view, slope = batch.view, torch.linspace(-1, 1, 5, dtype=torch.float64)
    for net, actions in ((agent.actor, None), (agent.critic, batch.actions)):
        ours = (net(view, agent.attention(view), actions).sin() * slope).sum()
        plain = plain_read(net, view, plain_graph(agent.attention, view, how), actions)
        theirs = (plain.sin() * slope).sum()
        assert abs(scalar(ours - theirs)) < 1e-9
        assert_same_gradients(ours, theirs, torch.nn.ModuleList((net, agent.attention)), 1e-9)


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("how", [*REPRESENTATIONS, "parent"])
def test_plain_and_fast_networks_are_equal(name, how):
    """The class Pairs of a script and FastPairs: outputs and gradients of all networks for all
    weights and for what is observed; float64 1e-9. The graphs of all z, too."""
    script = maddpg if how == "parent" else mra
    flags = "" if how == "parent" else small_latents(how)
    found = []
    for form in ("--plain", "--no-plain"):
        s = games(script, name, f"{form} {flags}")
        batch, agent = random_batch(s, 4, dead=0.2), s.agent
        own, others = (x.clone().requires_grad_() for x in batch.view[:2])
        view = batch.view._replace(own=own, others=others)
        g = agent.attention(view)
        out = [g, agent.actor(view, g), agent.critic(view, g, batch.actions)]
        if script is mra:
            every = agent.attention.all(view)
            out += [every, agent.actor(view, every)]
        slopes = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in out]
        loss = sum((x.sin() * slope).sum() for x, slope in zip(out, slopes))
        nets = torch.nn.ModuleList((agent.attention, agent.actor, agent.critic))
        gradients = torch.autograd.grad(loss, [own, others, *nets.parameters()], allow_unused=True)
        used = {type(net.pairs) is type for net in nets}  # a class, or a partial
        assert used == {form == "--plain"}
        found.append([x.detach() for x in (*out, *gradients) if x is not None])
    plain, fast = found
    assert len(plain) == len(fast) > 20
    for a, b in zip(plain, fast):
        assert (a - b).abs().max() < 1e-9


def pair_inputs(function, rows: int, n: int, N: int, dtype=torch.float64, seed: int = 0):
    rng = seeded(seed)
    shapes = (2, n, 8 if function.__name__ == "score_kernel" else N), (2, rows, N, 8), (2, n, 8)
    return [torch.randn(s, generator=rng, dtype=dtype).requires_grad_() for s in shapes]


def looped_pairs(function, x, a, b) -> torch.Tensor:
    """Both sums with loops over i and j."""
    rows = []
    for i in range(b.shape[1]):
        y = [torch.relu(a[:, i if a.shape[1] > 1 else 0, j] - b[:, i]) for j in range(a.shape[2])]
        if function.__name__ == "score_kernel":
            rows.append(torch.stack([(x[:, i] * each).sum(-1) for each in y], -1))
        else:
            rows.append(sum(x[:, i, j, None] * each for j, each in enumerate(y)))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("kind", ["score_kernel", "sum_kernel"])
@pytest.mark.parametrize(("rows", "n", "N"), [(1, 3, 3), (3, 3, 3), (1, 2, 5), (2, 2, 5)])
def test_gradients_of_pairs_by_hand(kind, rows, n, N):
    """Against autograd of loops, a with a row for all and with one for each i."""
    function = getattr(pairs, kind)
    inputs = pair_inputs(function, rows, n, N)
    ours = pairs.PairReduction.apply(function, False, *inputs)
    theirs = looped_pairs(function, *inputs)
    assert (ours - theirs).abs().max() < 1e-12
    slope = torch.randn(ours.shape, generator=seeded(5), dtype=torch.float64)
    mine, reference = (torch.autograd.grad((x * slope).sum(), inputs) for x in (ours, theirs))
    for a, b in zip(mine, reference):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["score_kernel", "sum_kernel"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("wanted", ["xab", "x", "ab", "a", "b"])
def test_gradcheck_of_pairs(kind, rows, wanted):
    """With any of the inputs given, as where phi learns by way of the policies."""
    inputs = pair_inputs(getattr(pairs, kind), rows, 3, 4)
    for name, x in zip("xab", inputs):
        x.requires_grad_(name in wanted)
    assert torch.autograd.gradcheck(
        lambda *x: pairs.PairReduction.apply(getattr(pairs, kind), False, *x), inputs
    )


@pytest.mark.filterwarnings("error:Not compiled")
@pytest.mark.parametrize(
    "rows",
    [pytest.param("one", marks=pytest.mark.long), pytest.param("all", marks=pytest.mark.slow)],
)
def test_compiled_kernels_equal_eager_ones(rows):
    """a with a row for all, or (per agent, bilinear) with one for each i, which compiles again."""
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    for N, kind in itertools.product((3, 5), ("score_kernel", "sum_kernel")):
        function, results = getattr(pairs, kind), []
        inputs = pair_inputs(function, 1 if rows == "one" else N, N, N, torch.float32, N)
        for compiled in (True, False):
            out = pairs.PairReduction.apply(function, compiled, *inputs)
            slope = torch.linspace(-1, 1, out.numel()).view_as(out)
            results.append((out, *torch.autograd.grad((out * slope).sum(), inputs)))
        for a, b in zip(*results):
            assert (a - b).abs().max() < 1e-5, (N, kind)
    for function in (pairs.score_kernel, pairs.sum_kernel, pairs.gradient_kernel):
        ours = pairs.kernel(function, True)
        assert ours.call is not None and ours.call is not ours.plain, "it was compiled"


@pytest.mark.long
def test_kinds_of_processor_share_a_compilers_cache(tmp_path):
    """A loop that was kept for longer vectors once left out half of its numbers, without a word."""
    code = (
        "import torch\n"
        "from envs.particle import pairs\n"
        "u, a, b = torch.randn(3, 4, 5, 24, generator=torch.Generator().manual_seed(1))\n"
        "score = pairs.kernel(pairs.score_kernel, True)(u, a[:, None], b)\n"
        "print((score - pairs.score_kernel(u, a[:, None], b)).abs().max().item() < 1e-5)\n"
    )
    for kind in ("avx512", "avx2", "default"):
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": kind}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.stdout.endswith("True\n"), (kind, done.stdout, done.stderr[-2000:])


# --- 4. Eq. (8) -----------------------------------------------------------------------------------


def bellman(s, batch, g, next_g, seed: int, entropy: float, gamma: float) -> tuple:
    """Eq. (8) in NumPy: targets and loss."""
    nets = arrays(s.agent.target_actor), arrays(s.agent.target_critic)
    log_pi = log_softmax(read(nets[0], batch.next_view, next_g))
    later = (log_pi + gumbel_noise(seed, log_pi.shape)[0]).argmax(-1)  # a' ~ pi' at o'
    q = at(read(nets[1], batch.next_view, next_g, later), later) - entropy * at(log_pi, later)
    target = numbers(batch.rewards).copy()
    for m, i in itertools.product(*map(range, target.shape)):
        if batch.next_view.alive[m, i] and not batch.terminated[m]:
            target[m, i] += gamma * q[m, i]
    actions = batch.actions.numpy()
    q = at(read(arrays(s.agent.critic), batch.view, g, actions), actions)
    return target, average((q - target) ** 2, batch.view.alive.numpy())


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
@pytest.mark.parametrize("name", ["per type", "per agent"])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_critic_loss_is_eq_8(script, name, entropy):
    s = games(script, name, f"--entropy-coef {entropy} --gamma .9")
    batch = random_batch(s, 6, dead=0.3)
    assert batch.terminated.any() and not batch.terminated.all()
    g, next_g = random_graph(batch.view), random_graph(batch.next_view, 2)
    given = batch, numbers(g), numbers(next_g), 7
    _, expected = bellman(s, *given, entropy, 0.9)
    loss = script.critic_loss(s.args, s.agent, batch, g, next_g, seeded(7))
    assert abs(scalar(loss) - expected) < 1e-9
    for wrong in ((entropy + 0.1, 0.9), (entropy, 0.8)):
        assert abs(bellman(s, *given, *wrong)[1] - expected) > 1e-3, "the test sees both"


def test_gradient_of_eq_8():
    """Of the critic, against finite differences of NumPy's loss: the target stands still."""
    s = games(mra, "per type")
    batch = random_batch(s, 4, dead=0.3)
    g, next_g = random_graph(batch.view), random_graph(batch.next_view, 2)
    target, _ = bellman(s, batch, numbers(g), numbers(next_g), 7, s.args.entropy_coef, 0.95)
    mra.critic_loss(s.args, s.agent, batch, g, next_g, seeded(7)).backward()
    actions, alive = batch.actions.numpy(), batch.view.alive.numpy()

    def value(w: dict) -> float:
        q = at(read(w, batch.view, numbers(g), actions), actions)
        return average((q - target) ** 2, alive)

    check_slopes(value, arrays(s.agent.critic), gradients_of(s.agent.critic), each=1)


def test_next_actions_are_drawn_at_the_next_observation(monkeypatch):
    """From pi'(o', g') whatever o and g are (the authors' code draws at o)."""
    s, seen, true = games(mra, "one set"), [], mra.sample
    monkeypatch.setattr(mra, "sample", lambda x, rng: seen.append(x) or true(x, rng))
    batch, other = random_batch(s, 5, seed=0), random_batch(s, 5, seed=1)
    g = {id(view): random_graph(view) for view in (*batch[:2], *other[:2])}
    for view, later in itertools.product((batch.view, other.view), (batch[1], other[1])):
        mixed = batch._replace(view=view, next_view=later)
        mra.critic_loss(s.args, s.agent, mixed, g[id(view)], g[id(later)], seeded(0))
    expected = [
        log_softmax(read(arrays(s.agent.target_actor), x, numbers(g[id(x)])))
        for x in (batch.next_view, other.next_view)
    ]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    assert len(seen) == 4, "one draw for each loss"
    for x, k in zip(seen, (0, 1, 0, 1)):
        assert np.abs(numbers(x) - expected[k]).max() < 1e-9


def test_no_bootstrap_after_the_end_or_death_and_no_loss_of_the_dead():
    """Where nothing is bootstrapped the target is r; those dead at o have no part in the loss."""
    s = setting("pacman", "2,2", flags="--entropy-coef .5")
    batch, agent = random_batch(s, 6), s.agent
    g, next_g = random_graph(batch.view), random_graph(batch.next_view)
    q = agent.critic(batch.view, g, batch.actions).gather(-1, batch.actions[..., None])[..., 0]

    def loss(batch) -> float:
        return scalar(mra.critic_loss(s.args, agent, batch, g, next_g, seeded(0)))

    without = scalar((q - batch.rewards).square().mean())
    assert abs(loss(batch) - without) > 0.05
    assert abs(loss(batch._replace(terminated=torch.ones(6) > 0)) - without) < 1e-12
    none = torch.zeros_like(batch.view.alive)
    running = batch._replace(terminated=torch.zeros(6) > 0)
    dead = running._replace(next_view=batch.next_view._replace(alive=none))
    assert abs(loss(dead) - without) < 1e-12
    one = none.clone()
    one[2, 1] = True
    only = batch._replace(view=batch.view._replace(alive=one), terminated=torch.ones(6) > 0)
    assert abs(loss(only) - scalar((q - batch.rewards).square()[2, 1])) < 1e-12


# --- 5. Eqs. (9), (10) ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
@pytest.mark.parametrize("name", ["per type", "per agent"])
def test_actor_loss_is_eq_9(script, name):
    """Own actions in closed form, the others' drawn from pi at o; value, and slope of the actor."""
    s = games(script, name, "--actor-gradient expectation --entropy-coef .2")
    batch, actor = random_batch(s, 4, dead=0.3), s.agent.actor
    view, g = batch.view, random_graph(batch.view)
    loss, entropy = script.actor_loss(s.args, s.agent, batch, g, seeded(8))
    log_pi = log_softmax(read(arrays(actor), view, numbers(g)))
    drawn = (log_pi + gumbel_noise(8, log_pi.shape)[0]).argmax(-1)
    q, alive = read(arrays(s.agent.critic), view, numbers(g), drawn), view.alive.numpy()
    assert (drawn != batch.actions.numpy()).any()

    def value(w: dict) -> float:
        log_pi = log_softmax(read(w, view, numbers(g)))
        return -average((np.exp(log_pi) * (q - 0.2 * log_pi)).sum(-1), alive)

    assert abs(scalar(loss) - value(arrays(actor))) < 1e-9
    assert abs(scalar(entropy) - average(-(np.exp(log_pi) * log_pi).sum(-1), alive)) < 1e-9
    loss.backward()
    check_slopes(value, arrays(actor), gradients_of(actor), each=1)
    assert not gradients_of(s.agent.critic)


@pytest.mark.parametrize("how", ["option", "parent"])
def test_eq_10_is_eq_9_with_a_graph_that_learns(how):
    """omega = {theta, phi}: phi by way of log pi only, Q is what the return is said to be."""
    script = maddpg if how == "parent" else mra
    flags = "--actor-gradient expectation --entropy-coef .2"
    flags += " --phi-gradient actor --latent-size 3" if script is mra else ""
    s = games(script, "per type", flags)
    batch, agent = random_batch(s, 3, dead=0.2), s.agent
    view = batch.view
    g = agent.attention(view)
    loss, _ = script.actor_loss(s.args, agent, batch, g, seeded(8))
    loss.backward()
    w, actor = arrays(agent.attention), arrays(agent.actor)
    g = graph(w, view, how)
    log_pi = log_softmax(read(actor, view, g))
    drawn = (log_pi + gumbel_noise(8, log_pi.shape)[0]).argmax(-1)
    q = read(arrays(agent.critic), view, g, drawn)

    def value(w: dict) -> float:
        log_pi = log_softmax(read(actor, view, graph(w, view, how)))
        return -average((np.exp(log_pi) * (q - 0.2 * log_pi)).sum(-1), view.alive.numpy())

    assert abs(scalar(loss) - value(w)) < 1e-9
    check_slopes(value, w, gradients_of(agent.attention), each=1)


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
def test_gumbel_form_is_lowes_straight_through(script):
    """Lowe et al.: a_i = softmax(logits + noise), made one-hot forwards, goes into Q(o, a) with the
    others' actions from the replay; Q as a function of the vector a_i is q . a_i. And the analytic
    gradient for logits: y_k (q_k - q . y), with the entropy's beside it."""
    s = games(script, "per type", "--actor-gradient gumbel --entropy-coef .2")
    batch, actor = random_batch(s, 5, dead=0.3), s.agent.actor
    view, g, alive = batch.view, random_graph(batch.view), batch.view.alive
    loss, _ = script.actor_loss(s.args, s.agent, batch, g, seeded(8))
    q = torch.tensor(read(arrays(s.agent.critic), view, numbers(g), batch.actions.numpy()))
    noise = torch.tensor(gumbel_noise(8, q.shape)[0])

    def lowe(logits: torch.Tensor) -> torch.Tensor:
        soft = (logits + noise).softmax(-1)
        hard = (soft == soft.amax(-1, keepdim=True)).double()
        action = (hard - soft).detach() + soft
        pi = torch.distributions.Categorical(logits=logits)
        gain = torch.einsum("mna,mna->mn", action, q) + 0.2 * pi.entropy()
        return -gain[alive].sum() / alive.sum()

    logits = plain_read(actor, view, g)
    assert abs(scalar(loss - lowe(logits))) < 1e-9
    assert_same_gradients(loss, lowe(logits), actor, 1e-9)

    free = logits.detach().requires_grad_()
    fixed = SimpleNamespace(actor=lambda *_: free, critic=lambda *_: q)
    script.actor_loss(s.args, fixed, batch, g, seeded(8))[0].backward()
    y, log_pi, pi = softmax(numbers(free + noise)), log_softmax(numbers(free)), 0
    pi, values = np.exp(log_pi), q.numpy()
    slope = y * (values - (y * values).sum(-1, keepdims=True))
    slope += 0.2 * -pi * (log_pi - (pi * log_pi).sum(-1, keepdims=True))
    slope = -slope * alive.numpy()[..., None] / alive.sum().item()
    assert np.abs(numbers(free.grad) - slope).max() < 1e-12


# --- 6. Eq. (11) ----------------------------------------------------------------------------------


def information(s, w: dict, view, prior: np.ndarray, how: str) -> np.ndarray:
    """Eq. (11) for each agent (M, N): sum over z and a, each of the three pi's at phi's graph."""
    g, value = graphs(w, view, how), np.zeros(view.alive.shape)
    pi = np.stack([softmax(read(arrays(s.agent.actor), view, x)) for x in g])
    bar = np.stack([softmax(read(arrays(s.agent.target_actor), view, x)) for x in g])
    for i in range(s.game.num_agents):
        marginal = sum(prior[i, k] * bar[k, :, i] for k in range(len(g)))  # p(a|o)
        for k, a in itertools.product(range(len(g)), range(5)):
            ratio = np.log(bar[k, :, i, a]) - np.log(marginal[:, a])
            value[:, i] += prior[i, k] * pi[k, :, i, a] * ratio
    return value


@pytest.mark.parametrize("how", REPRESENTATIONS)
@pytest.mark.parametrize("name", ["one set", "per type"])
def test_information_is_eq_11_by_enumeration(how, name):
    """Value, and exact gradient of phi: finite differences move phi in all three pi's."""
    s = games(mra, name, small_latents(how))
    view, w = random_view(s, 4, dead=0.2), arrays(s.agent.attention)
    log_prior = random_prior(s.game.num_agents, 3)
    prior, alive = np.exp(log_prior.numpy()), view.alive.numpy()
    expected = information(s, w, view, prior, how)
    ours = eq_11(s.agent, view, log_prior)
    assert np.abs(numbers(ours) - expected).max() < 1e-9
    value = mra.mean(ours, view.alive)
    assert abs(scalar(value) - average(expected, alive)) < 1e-9
    value.backward()
    slopes = gradients_of(s.agent.attention)
    assert max(np.abs(x).max() for x in slopes.values()) > 1e-3
    check_slopes(lambda w: average(information(s, w, view, prior, how), alive), w, slopes, each=1)


@pytest.mark.parametrize("how", REPRESENTATIONS)
def test_information_lies_between_zero_and_log_z(how):
    """When the target policy is the policy, it is the mutual information of z and a."""
    s = setting("resource", "4", flags=small_latents(how))
    s.agent.target_actor.load_state_dict(s.agent.actor.state_dict())
    for scale in (1.0, 30.0):
        for part in (s.agent.attention.query, s.agent.actor.value, s.agent.target_actor.value):
            part.weight.data *= scale
        view = random_view(s, 50, seed=int(scale))
        ours = eq_11(s.agent, view, random_prior(4, 3, 1))
        assert ours.min() >= -1e-9 and ours.max() <= np.log(3)
        assert ours.max() > 0.01 * scale, "the test sees some"
    same = s.agent.attention.all
    s.agent.attention.all = lambda view: same(view)[:1].expand(3, -1, -1, -1)
    assert eq_11(s.agent, view, random_prior(4, 3, 1)).abs().max() < 1e-12


def repeated(view, times: int):
    """One observation many times."""
    fields = {"own", "others", "alive", "mask", "z"}
    rows = {k: x for k, x in view._asdict().items() if k in fields}
    return view._replace(**{k: x.expand(times, *x.shape[1:]) for k, x in rows.items()})


def sampled_information(agent, view, log_prior: torch.Tensor, rng) -> torch.Tensor:
    """Eq. (11) with a drawn z and a drawn action, p(a|o) exact (M, N): what the authors' code
    samples. Its gradient needs the score function, log pi of the action times its gain."""
    g = agent.attention.all(view)
    bars = agent.target_actor(view, g).log_softmax(-1)  # (Z, M, N, A)
    marginal = (bars + log_prior.T[:, None, :, None]).logsumexp(0)
    z = mra.sample(log_prior.expand(*view.alive.shape, -1), rng)  # (M, N)

    def of_z(x: torch.Tensor) -> torch.Tensor:  # (Z, M, N, A) -> (M, N, A)
        return x.gather(0, z[None, ..., None].expand(1, *x.shape[1:]))[0]

    log_pi = of_z(agent.actor(view, g).log_softmax(-1))
    actions = mra.sample(log_pi.detach(), rng)
    gain = mra.pick(of_z(bars) - marginal, actions)
    log_prob = mra.pick(log_pi, actions)
    return gain + gain.detach() * (log_prob - log_prob.detach())


def vector(loss: torch.Tensor, net) -> torch.Tensor:
    """Gradients of all weights of a network, 0 where there is none."""
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat(
        [(0 * p if x is None else x).flatten() for p, x in zip(net.parameters(), found)]
    )


@pytest.mark.parametrize("targets", ["apart", "the same"])
def test_sampled_information_has_the_exact_value_and_gradient_in_the_mean(targets):
    """40 means of 1000 draws: value and every gradient within 5 standard errors of the exact
    form's. (z of an agent is drawn for it alone: all see the graph of their own z.)"""
    draws, times = 1000, 40
    s = setting("resource", "3", flags="--latent-size 3")
    if targets == "the same":
        s.agent.target_actor.load_state_dict(s.agent.actor.state_dict())
    phi, log_prior, rng = s.agent.attention, random_prior(3, 3), seeded(11)
    view = random_view(s, 1)
    exact = eq_11(s.agent, view, log_prior).mean()
    slope, many = vector(exact, phi), repeated(view, draws)
    values, slopes = [], []
    for _ in range(times):
        drawn = sampled_information(s.agent, many, log_prior, rng).mean()
        values.append(scalar(drawn))
        slopes.append(vector(drawn, phi).detach())
    values, slopes = np.array(values), torch.stack(slopes)
    error = values.std() / times**0.5
    assert abs(values.mean() - scalar(exact)) < 5 * error < 0.5 * abs(scalar(exact))
    error = slopes.std(0) / times**0.5
    assert ((slopes.mean(0) - slope).abs() <= 5 * error + 1e-12).all()
    assert error.norm() < 0.2 * slope.norm(), "and that says something"


def test_exact_gradient_is_zero_without_the_actions_probability():
    """Why Eq. (11) needs it: with pi = pi' and a given, the rest of the gradient vanishes."""
    s = setting("resource", "4", flags="--latent-size 3")
    s.agent.target_actor.load_state_dict(s.agent.actor.state_dict())
    view, log_prior, actor = random_view(s, 4), random_prior(4, 3), s.agent.actor
    whole = vector(eq_11(s.agent, view, log_prior).mean(), s.agent.attention)
    s.agent.actor = lambda view, g: actor(view, g).detach()
    rest = vector(eq_11(s.agent, view, log_prior).mean(), s.agent.attention)
    assert whole.norm() > 1e-2
    assert rest.norm() < 1e-12


# --- 7. Eq. (13) ----------------------------------------------------------------------------------


def surprise(s, view, how: str, label: int) -> np.ndarray:
    """- log p_xi(m | o, phi(o, z)) for each z (Z, M, N)."""
    g, w = graphs(arrays(s.agent.attention), view, how), arrays(s.agent.population_classifier)
    of_z = [z if s.args.xi_reads_z else None for z in range(len(g))]
    logits = [read(w, view, x, z=z) for x, z in zip(g, of_z)]
    return np.stack([-log_softmax(x)[..., label] for x in logits])


@pytest.mark.parametrize("population", [("resource", "3", "4"), ("pacman", "2,1", "2,2")])
def test_xi_reads_z_as_eq_13_of_the_authors_code(population):
    """Value with z among xi's inputs. With a uniform graph for all z only z is left to be read."""
    s = setting(*population, flags="--latent-size 3 --xi-reads-z")
    view, agent, label = random_view(s, 3, dead=0.2), s.agent, 1
    log_prior = agent.log_prior(s.game)
    prior, lost = np.exp(numbers(log_prior)), surprise(s, view, "option", label)
    expected = sum(prior[:, k] * lost[k] for k in range(3))
    loss = eq_13(agent, view, log_prior, label)
    assert abs(scalar(loss) - average(expected, view.alive.numpy())) < 1e-9
    loss.backward()
    assert agent.population_classifier.of_z.grad.abs().amax(-1).min() > 1e-6, "each type and z"
    alike = mra.uniform_graph(view).double().expand(3, -1, -1, -1)
    guess = numbers(agent.population_classifier(view, alike))
    assert np.ptp(guess, axis=0)[view.alive.numpy()].max() > 1e-3
    blind = setting(*population, flags="--latent-size 3")
    guess = numbers(blind.agent.population_classifier(view, alike))
    assert np.ptp(guess, axis=0).max() == 0


@pytest.mark.parametrize("how", REPRESENTATIONS)
@pytest.mark.parametrize("population", [("resource", "3", "4"), ("pacman", "2,1", "2,2")])
def test_population_loss_is_eq_13(how, population):
    """Value; gradients of prior and classifier against those of the plain form."""
    s = setting(*population, flags=small_latents(how))
    view, agent, label = random_view(s, 3, dead=0.2), s.agent, 1
    log_prior = agent.log_prior(s.game)
    prior, lost = np.exp(numbers(log_prior)), surprise(s, view, how, label)
    expected = sum(prior[:, k] * lost[k] for k in range(3))
    loss = eq_13(agent, view, log_prior, label)
    assert abs(scalar(loss) - average(expected, view.alive.numpy())) < 1e-9
    g = plain_graphs(agent.attention, view, how).detach()
    plain = -plain_read(agent.population_classifier, view, g).log_softmax(-1)[..., label]
    plain = (agent.log_prior(s.game).exp().T[:, None] * plain).sum(0)[view.alive].mean()
    both = torch.nn.ModuleList((agent.latent_prior, agent.population_classifier))
    assert_same_gradients(loss, plain, both, 1e-9)
    eq_13(agent, view, agent.log_prior(s.game), label).backward()
    for name, p in both.named_parameters():
        assert p.grad.abs().max() > 1e-6, name


def straight_through_loss(agent, view, log_prior: torch.Tensor, label: int, rng) -> torch.Tensor:
    """Eq. (13) with a drawn z, one-hot forwards: its relaxation's gradient reaches p(z|m)."""
    soft = (log_prior + mra.gumbel(view.z, rng)).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1])
    g = agent.attention(view._replace(z=hard + soft - soft.detach()))
    guess = agent.population_classifier(view, g).log_softmax(-1)
    return mra.mean(-guess[..., label], view.alive)


@pytest.mark.parametrize("how", REPRESENTATIONS)
def test_straight_through_form_has_the_mean_of_the_exact_one(how):
    """40 means of 2000 draws, within 5 standard errors. With several agents and a z for each."""
    s = setting("resource", "3", "4", flags=small_latents(how))
    s.agent.population_classifier.out.weight.data *= 4
    view, log_prior = random_view(s, 1), s.agent.log_prior(s.game).detach()
    many, rng = repeated(view, 2000), seeded(12)
    with torch.no_grad():
        exact = eq_13(s.agent, view, log_prior, 0)
        found = [straight_through_loss(s.agent, many, log_prior, 0, rng) for _ in range(40)]
    found = torch.stack(found)
    error = scalar(found.std() / 40**0.5)
    assert abs(scalar(found.mean() - exact)) < 5 * error
    flat = surprise(s, view, how, 0).mean()  # what a uniform z would give
    assert abs(flat - scalar(exact)) > 10 * error, "the test sees p(z|m)"


# --- 8. Who learns from what ----------------------------------------------------------------------


def parts_of(agent) -> dict[str, torch.nn.Module]:
    return {k: x for k, x in agent.parts().items() if isinstance(x, torch.nn.Module)}


def routes(s: SimpleNamespace, monkeypatch) -> list[tuple[set, set]]:
    """For each step of update(): the networks whose weights its loss reaches (all of their tensors
    but for the keys' bias, which cancels), and those that it is to step."""
    script, agent, found = s.script, s.agent, []
    nets = parts_of(agent)

    def descend(loss, net, optimiser, max_norm):
        for part in nets.values():
            part.zero_grad(set_to_none=True)
        loss.backward(inputs=list(net.parameters()))  # as harness.descend()
        reached = set()
        for name, part in nets.items():
            has = {k: p.grad is not None for k, p in part.named_parameters() if k != "key.bias"}
            assert len(set(has.values())) == 1, f"only some weights of {name} are reached: {has}"
            if all(has.values()):
                reached.add(name)
                zero = [k for k, p in part.named_parameters() if has.get(k) and not p.grad.any()]
                assert not zero, f"gradients of {name} are zero: {zero}"
        inside = {id(p) for p in net.parameters()}
        stepped = {id(p) for group in optimiser.param_groups for p in group["params"]}
        found.append(
            (
                reached,
                {k for k, x in nets.items() if {*map(id, x.parameters())} <= inside & stepped},
            )
        )
        return torch.zeros(())

    monkeypatch.setattr(script, "descend", descend)
    run_update(s, 8)
    assert all(p.requires_grad for net in nets.values() for p in net.parameters())
    return found


def run_update(s: SimpleNamespace, steps: int) -> dict:
    """Some steps of all worlds, then one update in the first population."""
    for collector, _ in itertools.product(s.collectors, range(steps)):
        s.script.collect(s.agent, collector, **s.rngs)
    if s.script is maddpg:
        return maddpg.update(s.args, s.agent, s.collectors[0], s.rngs["rng"])
    return mra.update(s.args, s.agent, s.collectors[0], s.collectors, **s.rngs)


def test_phi_learns_to_tell_its_own_population(monkeypatch):
    """An update in the second of three populations: Eqs. (11) and (13) are of its game, its label
    and its last minibatch."""
    s = setting("resource", "3", "4", "5", double=False)
    run_update(s, 8)
    seen, batches = [], []
    step, sample = mra.information_update, s.collectors[1].buffer.sample

    def watched(agent, game, view, label):
        seen.append((game, view, label))
        return step(agent, game, view, label)

    monkeypatch.setattr(mra, "information_update", watched)
    monkeypatch.setattr(
        s.collectors[1].buffer, "sample", lambda *x: batches.append(sample(*x)) or batches[-1]
    )
    mra.update(s.args, s.agent, s.collectors[1], s.collectors, **s.rngs)
    ((game, view, label),) = seen
    trained = batches[s.args.inner_steps - 1]  # psi and xi draw further ones
    assert label == 1 and game is s.collectors[1].game and view is trained.view


PLAIN = [{"critic"}, {"actor"}] * 2
OMEGA = [{"critic"}, {"actor", "attention"}] * 2
PHI = [{"attention"}]
LATENT = [{"latent_prior", "population_classifier"}]
XI = [{"population_classifier"}]
ALGORITHM_4 = "--phi-gradient mi --no-psi-information"
STILL = "--latent-size 1 --phi-learning-rate 0"  # without the rate the script refuses it
ROUTES = {  # flags, wanted
    "MRA": ("", [*OMEGA, *PHI, *LATENT]),
    "gumbel actor": ("--actor-gradient gumbel", [*OMEGA, *PHI, *LATENT]),
    "uni-MRA": ("--latent-prior uniform", [*OMEGA, *PHI, *XI]),
    "z by hand": ("--latent-prior told", [*OMEGA, *PHI, *XI]),
    "one latent": ("--latent-size 1", OMEGA),
    "plain": ("--plain", [*OMEGA, *PHI, *LATENT]),
    "told, V linear": ("--tell-population all --value-layers 1", [*OMEGA, *PHI, *LATENT]),
    "Eq. (10)": ("--phi-gradient actor", [*OMEGA, *LATENT]),
    "z drawn anew": ("--redraw-z", [*OMEGA, *PHI, *LATENT]),
    "Eq. (10), xi reads z": ("--phi-gradient actor --xi-reads-z", [*OMEGA, *LATENT]),
    "the critic reads z": ("--critic-reads-z --redraw-z", [*OMEGA, *PHI, *LATENT]),
    "both": ("--phi-gradient both", [*PLAIN, *PHI, *LATENT]),
    "Algorithm 4": (ALGORITHM_4, [*PLAIN, *PHI, *LATENT]),
    "Algorithm 4, uniform": (f"{ALGORITHM_4} --latent-prior uniform", [*PLAIN, *PHI]),
    "Algorithm 4, one latent": (f"{ALGORITHM_4} {STILL}", PLAIN),
}


@pytest.mark.parametrize("task", ["resource", "pacman"])
@pytest.mark.parametrize("name", ROUTES)
def test_each_loss_reaches_the_networks_that_it_moves(task, name, monkeypatch):
    """The table of the specification, read off update()."""
    flags, wanted = ROUTES[name]
    populations = ("3", "5") if task == "resource" else ("2,1", "2,2")
    s = setting(task, *populations, flags=f"--inner-steps 2 {flags}", double=False)
    found = routes(s, monkeypatch)
    assert [reached for reached, _ in found] == wanted
    assert all(reached <= stepped for reached, stepped in found), "what it reaches is stepped"


@pytest.mark.parametrize("how", ["concat", "bilinear"])
def test_routes_of_other_representations(how, monkeypatch):
    flags = f"--inner-steps 2 --representation {how}"
    s = setting("resource", "3", "5", flags=flags, double=False)
    assert [reached for reached, _ in routes(s, monkeypatch)] == [*OMEGA, *PHI, *LATENT]


@pytest.mark.parametrize("form", ["gumbel", "expectation"])
def test_routes_of_the_parent(form, monkeypatch):
    flags = f"--inner-steps 2 --actor-gradient {form}"
    s = setting("pacman", "2,1", script=maddpg, flags=flags, double=False)
    assert [reached for reached, _ in routes(s, monkeypatch)] == OMEGA


@pytest.mark.parametrize(
    ("flags", "moved"),
    [
        ("", {"actor", "critic", "attention", "latent_prior", "population_classifier"}),
        ("--latent-prior uniform", {"actor", "critic", "attention", "population_classifier"}),
        (f"{ALGORITHM_4} {STILL}", {"actor", "critic"}),
        ("--phi-gradient actor --latent-prior uniform", {"actor", "critic", "attention"}),
        ("--reptile-step 0", {"critic", "attention", "latent_prior", "population_classifier"}),
    ],
)
def test_what_an_update_moves(flags, moved):
    """After two updates, so that optimisers have moments which could move more."""
    s = setting("resource", "3", "5", flags=f"--inner-steps 2 --target hard {flags}", double=False)
    run_update(s, 8)
    before = {name: weights(net) for name, net in parts_of(s.agent).items()}
    run_update(s, 1)
    after = {name: weights(net) for name, net in parts_of(s.agent).items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"target_actor", "target_critic"} == moved
    for name in ("actor", "critic"):
        assert torch.equal(after[f"target_{name}"], after[name])


# --- What is not Algorithm 4 ----------------------------------------------------------------------


@pytest.mark.parametrize("how", REPRESENTATIONS)
def test_phi_by_both_ascends_eq_11_and_descends_eq_13(how, monkeypatch):
    """Value and slope of the loss that moves phi, against NumPy; classifier and policies are
    given."""
    s = setting("resource", "3", "5", flags=f"--phi-gradient both {small_latents(how)}")
    view, agent, seen = random_view(s, 4, dead=0.2), s.agent, []

    def descend(loss, net, *_):
        seen.append(loss)
        loss.backward(inputs=list(net.parameters()))  # as the harness's

    monkeypatch.setattr(mra, "descend", descend)
    told, _ = mra.information_update(agent, s.collectors[0].game, view, label=1)
    prior = np.exp(numbers(agent.log_prior(s.game)))
    alive, w = view.alive.numpy(), arrays(agent.attention)

    def value(w: dict) -> float:
        xi = arrays(agent.population_classifier)
        guesses = np.stack([read(xi, view, g) for g in graphs(w, view, how)])
        surprise = -(prior.T[:, None] * log_softmax(guesses)[..., 1]).sum(0)
        return average(surprise - information(s, w, view, prior, how), alive)

    assert abs(scalar(seen[0]) - value(w)) < 1e-9
    assert abs(scalar(told) - average(information(s, w, view, prior, how), alive)) < 1e-9
    check_slopes(value, w, gradients_of(agent.attention), each=1)
    for net in (agent.population_classifier, agent.actor, agent.target_actor):
        assert not gradients_of(net) and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("form, learned", [("turn", [5]), ("all", [3, 5])])
def test_learn_from(form, learned, monkeypatch):
    """Each minibatch has all its transitions of who acts, or as many of each population; losses are
    means over populations."""
    flags = f"--latent-size 3 --phi-gradient actor --learn-from {form} --batch-size 12"
    s = setting("resource", "3", "5", flags=f"{flags} --inner-steps 2", double=False)
    for collector, _ in itertools.product(s.collectors, range(15)):
        mra.collect(s.agent, collector, **s.rngs)
    parts, descended, real = [], [], (mra.critic_loss, mra.actor_loss, mra.descend)

    def critic_loss(args, agent, batch, *rest):
        loss = real[0](args, agent, batch, *rest)
        parts.append((*batch.actions.shape, loss))
        return loss

    def actor_loss(args, agent, batch, *rest):
        loss, entropy = real[1](args, agent, batch, *rest)
        parts.append((*batch.actions.shape, loss))
        return loss, entropy

    def descend(loss, *rest):
        descended.append(scalar(loss))
        return real[2](loss, *rest)

    for function in (critic_loss, actor_loss, descend):
        monkeypatch.setattr(mra, function.__name__, function)
    mra.update(s.args, s.agent, s.collectors[1], s.collectors, **s.rngs)
    P = len(learned)
    assert len(parts) == 4 * P and len(descended) == 4 + 1  # psi and xi have one step
    assert [part[:2] for part in parts] == [(12 // P, n) for n in learned] * 4
    losses = [np.mean([scalar(loss) for *_, loss in parts[k * P : (k + 1) * P]]) for k in range(4)]
    assert descended[:4] == pytest.approx(losses, rel=1e-6)


def test_psi_by_both_ascends_eq_11(monkeypatch):
    """Its slope is that of Eq. (13) minus that of Eq. (11), both with phi given."""
    slopes = {}
    for flags in ("--no-psi-information", "--psi-information"):
        s = setting("resource", "3", "5", flags=f"{small_latents('option')} {flags}")
        for collector, _ in itertools.product(s.collectors, range(3)):
            mra.collect(to_single(s.agent), collector, **s.rngs)
        sampled = []
        for collector in s.collectors:
            view = random_view_of(s, collector.game)
            monkeypatch.setattr(
                collector.buffer, "sample", lambda *_, v=view: SimpleNamespace(view=v)
            )
            sampled.append((view, collector.game))
        monkeypatch.setattr(mra, "descend", lambda loss, *_: loss.backward())
        to_double(s.agent)
        mra.latent_update(s.args, s.agent, s.collectors, seeded(1))
        slopes[flags] = gradients_of(s.agent.latent_prior)
    s.agent.latent_prior.zero_grad(set_to_none=True)
    terms = [
        mra.mean(eq_11(s.agent, view, s.agent.log_prior(game)), view.alive)
        for view, game in sampled
    ]
    torch.stack(terms).mean().backward()
    own = gradients_of(s.agent.latent_prior)
    for name, slope in slopes["--psi-information"].items():
        assert np.abs(slope - (slopes["--no-psi-information"][name] - own[name])).max() < 1e-9
    assert max(np.abs(x).max() for x in own.values()) > 1e-4


@pytest.mark.parametrize("steps, weight", [(0, 0.0), (24, 0.0), (96, 0.75), (240, 0.9)])
def test_entropy_of_the_prior_in_psis_loss(steps, weight, monkeypatch):
    """Less the entropy of p(z|m), mean over agents and populations, whose weight falls from 1 to 0
    in so many environment steps, of all populations together; 24 have been made."""
    losses, s = [], setting("resource", "3", "5", flags=f"--psi-entropy {steps}")
    for collector, _ in itertools.product(s.collectors, range(3)):
        mra.collect(to_single(s.agent), collector, **s.rngs)
    assert sum(collector.buffer.steps for collector in s.collectors) == 24
    monkeypatch.setattr(mra, "descend", lambda loss, *_: losses.append(loss.item()))
    for args in (s.args, dataclasses.replace(s.args, psi_entropy=0)):
        mra.latent_update(args, s.agent, s.collectors, seeded(1))
    entropies = []
    for collector in s.collectors:
        log_p = s.agent.log_prior(collector.game).detach().numpy()
        entropies.append(-(np.exp(log_p) * log_p).sum(-1).mean())
    assert abs(losses[0] - losses[1] + weight * np.mean(entropies)) < 1e-5
    assert np.mean(entropies) > 1


def to_single(agent):
    for net in parts_of(agent).values():
        net.float()
    return agent


def to_double(agent):
    for net in parts_of(agent).values():
        net.double()


def random_view_of(s: SimpleNamespace, game) -> Any:
    return random_view(SimpleNamespace(**vars(s) | {"game": game}), 4, dead=0.2)


@pytest.mark.parametrize("plain", ["", "--plain"])
@pytest.mark.parametrize("name", ["one set", "per type", "per agent"])
def test_values_with_one_layer_are_linear(name, plain):
    """e_i = sum_j g_ij (W o_ij + b), with loops, for actor and critic."""
    s = games(mra, name, f"--value-layers 1 {plain}")
    view = random_view(s, 4, dead=0.3)
    g, sets, alive = random_graph(view), set_of(view), view.alive.numpy()
    actions = torch.randint(0, 5, alive.shape, generator=seeded(2))
    for net, given in ((s.agent.actor, ()), (s.agent.critic, (actions,))):
        w, others = arrays(net), numbers(view.others)
        if given:
            others = np.concatenate((others, np.eye(5)[actions.numpy()]), -1)
        ours = numbers(net(view, g, *given))
        for m, i in itertools.product(*map(range, alive.shape)):
            k, e = sets[i], 0.0
            for j in range(alive.shape[1]):
                if alive[m, j] and j != i:
                    o = entity(others[m], i, j)
                    e = e + numbers(g)[m, i, j] * (o @ w["value.weight"][k] + w["value.bias"][k])
            x = relu(numbers(view.own)[m, i] @ w["own.first.weight"][k] + w["own.first.bias"][k])
            x = x @ w["own.last.weight"][k] + w["own.last.bias"][k]
            expected = relu(x + e) @ w["out.weight"][k] + w["out.bias"][k]
            assert np.abs(ours[m, i] - expected).max() < 1e-9
        assert "entity.weight" not in w


@pytest.mark.parametrize(
    ("flags", "actor", "critic"),
    [
        ("", False, False),
        ("--tell-population critic", False, True),
        ("--tell-population all", True, True),
        ("--tell-population all --no-own-beside", True, True),
    ],
)
def test_who_is_told_the_population(flags, actor, critic):
    s = setting("resource", "3", "5", flags=flags)
    view = random_view(s, 6)
    other = view._replace(population=1 - view.population)
    g, actions = random_graph(view), torch.zeros(6, 3, dtype=torch.int64)
    for net, given, told in ((s.agent.actor, (), actor), (s.agent.critic, (actions,), critic)):
        differ = (net(view, g, *given) - net(other, g, *given)).abs().amax((1, 2))
        assert (differ > 1e-6).all() if told else not differ.any()


@pytest.mark.parametrize("layers", [1, 2])
def test_who_is_told_m_has_a_layer_of_its_own_above_entities(layers):
    """In each population it is a network that is not told, with m's weights above o_ij."""
    flags = f"--value-layers {layers}"
    told = setting("pacman", "2,2", "3,2", flags=f"{flags} --tell-population all")
    plain = setting("pacman", "2,2", "3,2", flags=flags).agent.actor
    view, outputs = random_view(told, 6), []
    g = random_graph(view)
    for m in range(2):
        weights = dict(told.agent.actor.state_dict())
        name = "value" if layers == 1 else "entity"
        for part in (f"{name}.weight", f"{name}.bias"):
            weights[part] = weights[part].unflatten(0, (2, 2))[:, m]  # of each type, of each m
        plain.load_state_dict(weights)
        seen = view._replace(population=m)
        outputs.append(told.agent.actor(seen, g))
        torch.testing.assert_close(outputs[m], plain(seen, g), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("plain", ["", "--plain"])
def test_a_critic_that_reads_z_has_a_layer_of_each_z_above_entities(plain, layers):
    """Agent i's Q is that of a critic which does not read z, with the weights of z_i above o_ij."""
    flags, layer = f"--latent-size 3 --value-layers {layers}", "value" if layers == 1 else "entity"
    s = setting("pacman", "2,2", "3,2", flags=f"{flags} --critic-reads-z {plain}")
    plain = setting("pacman", "2,2", "3,2", flags=flags).agent.critic
    view, critic = random_view(s, 6, dead=0.2), s.agent.critic
    g, actions = random_graph(view), torch.randint(0, 5, (6, 4), generator=seeded(2))
    q, each = critic(view, g, actions), []
    for z in range(3):
        weights = dict(critic.state_dict())
        for part in (f"{layer}.weight", f"{layer}.bias"):
            weights[part] = weights[part].unflatten(0, (2, 3))[:, z]  # of each type, of each z
        plain.load_state_dict(weights)
        each.append(plain(view, g, actions))
        own = view.z[..., z] == 1
        assert 0 < own.sum() < own.numel()
        torch.testing.assert_close(q[own], each[z][own], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    assert torch.equal(s.agent.actor(view, g), s.agent.actor(view._replace(z=1 - view.z), g))
    q.square().sum().backward()
    assert getattr(critic, layer).weight.grad.flatten(1).abs().amax(-1).min() > 1e-6, (
        "all are trained"
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("plain", ["", "--plain"])
def test_a_critic_with_a_uniform_graph_attends_to_all_that_it_sees_alike(plain, layers):
    """Its Q is that of a critic which is given equal weights; the actor reads the policy's g."""
    flags = f"--value-layers {layers} {plain}"
    s = setting("pacman", "2,2", "3,2", flags=f"{flags} --critic-graph uniform")
    usual = setting("pacman", "2,2", "3,2", flags=flags)
    view = random_view(s, 6, dead=0.2)
    g, actions = random_graph(view), torch.randint(0, 5, (6, 4), generator=seeded(2))
    seen = numbers(view.mask)
    alike = torch.from_numpy(seen / np.maximum(seen.sum(-1, keepdims=True), 1))
    for name in ("critic", "target_critic"):
        net = getattr(usual.agent, name)
        net.load_state_dict(getattr(s.agent, name).state_dict())
        q = getattr(s.agent, name)(view, g, actions)
        torch.testing.assert_close(q, net(view, alike, actions), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(q, net(view, g, actions), atol=1e-3)
    assert not torch.allclose(s.agent.actor(view, g), s.agent.actor(view, alike), atol=1e-4)


@pytest.mark.parametrize("how", REPRESENTATIONS)
def test_a_critic_with_a_graph_of_its_own(how):
    """It begins as phi, reads by that graph whatever g it gets, and learns where phi does not."""
    flags = f"--critic-graph own --representation {how} --inner-steps 2"
    s = setting("pacman", "2,2", "3,2", flags=f"{flags} --phi-learning-rate 0", double=False)
    usual = setting("pacman", "2,2", "3,2", flags=f"--representation {how}", double=False)
    new = mra.Agent(s.args, s.collectors[0].game, torch.device("cpu"))
    assert torch.equal(weights(new.critic.graph), weights(new.attention))
    own, phi = s.agent.critic.graph, s.agent.attention
    sharpen(own, 3)
    view = random_view(s, 6, dead=0.2)
    view = view._replace(**{k: x.float() for k, x in view._asdict().items() if is_double(x)})
    g, actions = random_graph(view).float(), torch.randint(0, 5, (6, 4), generator=seeded(2))
    state = s.agent.critic.state_dict()
    usual.agent.critic.load_state_dict({k: x for k, x in state.items() if "graph." not in k})
    q = s.agent.critic(view, g, actions)
    torch.testing.assert_close(q, usual.agent.critic(view, own(view), actions))
    assert not torch.allclose(q, usual.agent.critic(view, g, actions), atol=1e-3)
    before = weights(own), weights(phi)
    run_update(s, 8)
    assert not torch.equal(weights(own), before[0]) and torch.equal(weights(phi), before[1])
    moved = [p.grad.abs().max() > 0 for name, p in own.named_parameters() if "key.bias" not in name]
    assert all(moved)


def is_double(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64


@pytest.mark.parametrize("population", [(2, 3), (3, 3), (7, 3), (24, 5)])
@pytest.mark.parametrize("form", ["tenth", "standardised"])
def test_psi_reads_numbers_of_agents(form, population):
    """Standardised: less their mean in 3, 6 and 9, by their deviation; 3 leaders do not deviate."""
    s = setting("rooms", "3,3", "6,3", "9,3", flags=f"--psi-input {form}")
    w, x = arrays(s.agent.latent_prior), np.array(population, dtype=float)
    x = x / 10 if form == "tenth" else (x - [6, 3]) / [np.sqrt(6), 1]
    hidden = relu(w["net.0.weight"] @ x + w["net.0.bias"])
    logits = (w["net.2.weight"] @ hidden + w["net.2.bias"]).reshape(2, 6)
    found = numbers(s.agent.latent_prior(population))
    assert np.abs(found - log_softmax(logits)).max() < 1e-6
    assert set(w) == {f"net.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def test_without_own_features_the_actor_reads_e_alone():
    s = setting("resource", "3", flags="--no-own-beside")
    view = random_view(s, 6)
    other, g = view._replace(own=view.own + 1), random_graph(view)
    assert torch.equal(s.agent.actor(view, g), s.agent.actor(other, g))
    actions = torch.zeros(6, 3, dtype=torch.int64)
    critic = s.agent.critic
    assert (critic(view, g, actions) != critic(other, g, actions)).any(), "the critic reads it"


def test_logged_information_is_of_the_living(monkeypatch):
    s = setting("pacman", "3,2", flags="--latent-size 3")
    view, buffer = random_view(s, 40, dead=0.4), s.collectors[0].buffer
    buffer.steps = 40
    monkeypatch.setattr(buffer, "sample", lambda agent, rng, size: SimpleNamespace(view=view))
    found = mra.diagnose(s.agent, s.collectors, seeded(1))["information/3,2"]
    with torch.no_grad():
        each = eq_11(s.agent, view, s.agent.log_prior(s.game))
    each, alive = numbers(each), view.alive.numpy()
    assert float(found) == pytest.approx(each[alive].mean(), rel=1e-6)
    assert abs(each[alive].mean() / each.mean() - 1) > 1e-3


def test_a_player_with_a_z_of_each_type():
    """Acts as one with this z of every agent, and not as others."""
    s, acted = setting("pacman", "3,2", flags="--latent-size 3", double=False), []
    s.agent.attention.query.weight.data *= 20  # z shows in actions
    for z in ((2, 0), torch.tensor([2, 2, 2, 0, 0]), (0, 2)):
        worlds = mra.make_envs(s.args, "3,2", 40, 1)
        worlds.reset()
        player = mra.net_player(s.agent, z, seed=5)
        acted.append(torch.stack([player(worlds) for _ in range(5)]))
    assert torch.equal(acted[0], acted[1]) and not torch.equal(acted[0], acted[2])


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 - 1])
def test_latents_are_not_drawn_from_the_noise_of_actions(seed):
    """With seed + 2**32 they once were: torch leaves out all but 32 bits."""
    rng = torch.Generator().manual_seed(seed)
    other = mra.own_generator(seed, stream=1)
    noise, latents = (mra.gumbel(torch.zeros(64), x) for x in (rng, other))
    assert not (noise == latents).any()


def test_told_latents_are_the_populations_numbers():
    """Of an unseen population that of the next larger one; it does not depend on psi."""
    s = setting("rooms", "3,3", "6,3", "9,3", flags="--latent-prior told")
    assert not hasattr(s.agent, "latent_prior")
    for followers, number in {2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2, 12: 2}.items():
        game = make_game("rooms", (followers, 3))
        assert number_of(game, s.args.populations) == number
        p = s.agent.log_prior(game).exp()
        assert p.shape == (followers + 3, 6) and (p == torch.eye(6)[number]).all()
        z = mra.draw_latents(s.agent, game, 50, seeded(1))
        assert (z == number).all()


@pytest.mark.parametrize("known", [("4,2", "2,4"), ("2,4", "4,2"), ("8,4", "2,4", "4,2")])
def test_a_population_has_its_own_number_whatever_others_have_its_size(known):
    """What the latents and the networks are told, in training populations."""
    flags = f"--latent-prior told --latent-size {len(known)} --tell-population critic"
    s = setting("pacman", *known, flags=flags)
    for number, collector in enumerate(s.collectors):
        game, z = collector.game, torch.zeros(4, 6, dtype=torch.int64)
        assert number_of(game, known) == number
        assert (s.agent.log_prior(game).exp().argmax(-1) == number).all()
        view = s.agent.view(game, collector.worlds.obs, z[:, :1].expand(4, game.num_agents))
        assert view.population == number


def test_which_unseen_populations_have_no_clear_number():
    known = ("4,2", "2,4", "8,4")
    for name in ("3,3", "2,2", "5,1"):
        assert first_unclear((name,), known) == name
    assert first_unclear(("8,2", "4,2", "", "3,3", "2,2"), known) == "3,3"
    for unseen in ((), ("8,2",), ("9,9",), ("4,2", "2,4"), ("",), ("x", "3,3")):
        assert first_unclear(unseen, known) == ""
    assert first_unclear(("9,9",), known[:2]) == "9,9" and first_unclear(("3,3",), ("4,2",)) == ""
    assert first_unclear(("3,3",), ()) == first_unclear(("3,3",), ("4,2", "x")) == ""


# --- 9. Permutations, and the dead ----------------------------------------------------------------


def outputs(s: SimpleNamespace, view, actions) -> dict[str, torch.Tensor]:
    """Of all networks, the agents second; the graph as (M, N, N)."""
    agent, g = s.agent, s.agent.attention(view)
    found = {"g": g, "actor": agent.actor(view, g), "critic": agent.critic(view, g, actions)}
    if hasattr(agent, "population_classifier"):
        found["population_classifier"] = agent.population_classifier(view, g)
    return found


@pytest.mark.parametrize("how", [*REPRESENTATIONS, "parent"])
@pytest.mark.parametrize("task", ["resource", "pacman"])
def test_permuting_agents_of_a_type_permutes_everything(how, task):
    one, two = ("4", "3") if task == "resource" else ("3,2", "2,1")
    if how == "parent":
        s = setting(task, one, script=maddpg)
    else:
        s = setting(task, one, two, flags=small_latents(how))
    order = torch.tensor([2, 0, 3, 1] if task == "resource" else [1, 2, 0, 4, 3])
    batch = random_batch(s, 5, dead=0.2)
    view = batch.view
    fields = {k: x[:, order] for k, x in view._asdict().items() if k in {"own", "others", "z"}}
    moved = view._replace(**fields, alive=view.alive[:, order])
    moved = moved._replace(mask=view.mask[:, order][:, :, order])
    before, after = outputs(s, view, batch.actions), outputs(s, moved, batch.actions[:, order])
    for name, x in before.items():
        x = x[:, order][:, :, order] if name == "g" else x[:, order]
        assert (after[name] - x).abs().max() < 1e-12, name
        assert (x - before[name]).abs().max() > 1e-2


@pytest.mark.parametrize("how", [*REPRESENTATIONS, "parent"])
def test_the_dead_change_nothing_for_the_living(how):
    """Whatever their features, latents and actions are: not a bit."""
    if how == "parent":
        s = setting("pacman", "3,2", script=maddpg)
    else:
        s = setting("pacman", "3,2", "2,1", flags=small_latents(how))
    batch, other = random_batch(s, 6, dead=0.4), random_batch(s, 6, seed=5)
    view, alive = batch.view, batch.view.alive
    assert alive.any() and not alive.all()
    fields = {
        k: torch.where(alive[..., None], x, getattr(other.view, k))
        for k, x in view._asdict().items()
        if k in {"own", "others", "z"}
    }
    actions = torch.where(alive, batch.actions, other.actions)
    before = outputs(s, view, batch.actions)
    after = outputs(s, view._replace(**fields), actions)
    for name, x in before.items():
        assert torch.equal(x[alive], after[name][alive]), name
        assert not torch.equal(x, after[name]), "their own rows may change"


DEAD = {  # loss: flags
    "critic": "",
    "expectation": "--phi-gradient actor",
    "gumbel": "--phi-gradient actor --actor-gradient gumbel",
    "Eq. (11)": "",
    "Eq. (13)": "",
}


@pytest.mark.parametrize("name", DEAD)
def test_the_dead_receive_no_gradient(name):
    """Neither their networks' outputs nor what is known of them: exactly 0. Where the losses are
    sums over agents, the living do."""
    s = setting("pacman", "3,2", "2,1", flags=f"--latent-size 3 {DEAD[name]}")
    batch, agent, seen = random_batch(s, 8, dead=0.4), s.agent, []
    view = batch.view._replace(
        own=batch.view.own.requires_grad_(), others=batch.view.others.requires_grad_()
    )
    batch, alive, log_prior = batch._replace(view=view), view.alive, random_prior(5, 3)

    def watched(net):
        def call(*inputs):
            out = net(*inputs)
            if out.requires_grad:
                out.retain_grad()
                seen.append(out)
            return out

        return call

    nets = SimpleNamespace(
        actor=watched(agent.actor),
        critic=watched(agent.critic),
        population_classifier=watched(agent.population_classifier),
        attention=agent.attention,
        target_actor=watched(agent.target_actor),
        target_critic=agent.target_critic,
        args=s.args,
    )
    g, next_g = agent.attention(view), agent.attention(batch.next_view)
    if name == "critic":
        loss = mra.critic_loss(s.args, nets, batch, g, next_g, seeded(0))
    elif name in ("expectation", "gumbel"):
        loss = mra.actor_loss(s.args, nets, batch, g, seeded(0))[0]
    elif name == "Eq. (11)":
        loss = -mra.mean(eq_11(nets, view, log_prior), alive)
    else:
        loss = eq_13(nets, view, log_prior, 0)
    loss.backward()
    # Whoever has less than two others alive has one graph for all z, hence no information to gain:
    # what is left of its gradient in Eq. (11) is rounding, and 0 on some processors.
    reached = alive & ((view.mask.sum(-1) > 1) | (name != "Eq. (11)"))
    assert seen and reached.sum() > 10
    for x in seen:
        x = x.grad if x.dim() == 4 else x.grad[None]  # (., M, N, outputs)
        assert not x[:, ~alive].any()
        assert x[:, reached].any(0).any(-1).all()
    for x in (view.own, view.others):
        assert not x.grad[~alive].any()
        assert x.grad[reached].any(-1).float().mean() > 0.8


# --- 10. The critic and one's own action ----------------------------------------------------------


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
@pytest.mark.parametrize("name", GAMES)
def test_the_critic_does_not_see_ones_own_action(script, name):
    """Another a_i changes what all others expect, and no bit of Q_i, whose 5 outputs are for it."""
    s = games(script, name)
    batch, N = random_batch(s, 4), s.game.num_agents
    view, g = batch.view, random_graph(batch.view)
    q = s.agent.critic(view, g, batch.actions)
    assert q.shape == (4, N, 5)
    for i in range(N):
        actions = batch.actions.clone()
        actions[:, i] = (actions[:, i] + 2) % 5
        other = s.agent.critic(view, g, actions)
        same = (q == other).all(-1)  # (M, N)
        rest = same[:, [j for j in range(N) if j != i]]
        assert same[:, i].all()
        assert not rest.all(0).any() and rest.float().mean() < 0.3, "all others see it"


# --- 11. Reptile and target networks --------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_reptile_step(alpha):
    """omega + alpha (omega_K - omega); theta alone moves, with Eq. (10) theta and phi."""
    for flags, moves in (("mi", {"actor"}), ("actor", {"actor", "attention"})):
        how = f"--reptile-step {alpha} --phi-gradient {flags} --latent-prior uniform"
        s = setting("resource", "3", "5", flags=f"{how} --inner-steps 3", double=False)
        before = {k: weights(net) for k, net in parts_of(s.agent).items()}
        seen = {}

        def watched(args, omega, start, s=s, seen=seen, true=mra.reptile):
            seen["last"] = {k: weights(net) for k, net in parts_of(s.agent).items()}
            true(args, omega, start)
            seen["after"] = {k: weights(net) for k, net in parts_of(s.agent).items()}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mra, "reptile", watched)
            run_update(s, 8)
        for name, first in before.items():
            first, last, ours = map(numbers, (first, seen["last"][name], seen["after"][name]))
            step = alpha if name in moves else 1.0
            assert np.abs(ours - (first + step * (last - first))).max() < 1e-6, name
            if name in moves:
                assert np.abs(last - first).max() > 1e-4, name
                assert alpha != 0 or (ours == first).all()
                assert alpha != 1 or (ours == last).all()


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
@pytest.mark.parametrize(("flags", "step"), [("polyak --polyak .2", 0.2), ("hard", 1.0)])
def test_target_networks_follow(script, flags, step):
    s = setting("pacman", "2,1", script=script, flags=f"--target {flags}")
    before = {name: numbers(weights(net)) for name, net in parts_of(s.agent).items()}
    s.agent.follow()
    after = {name: numbers(weights(net)) for name, net in parts_of(s.agent).items()}
    for name, x in before.items():
        fast = before[name.removeprefix("target_")]
        expected = x + step * (fast - x)
        assert np.abs(after[name] - expected).max() <= (1e-12 if step < 1 else 0), name
    assert (before["actor"] != before["target_actor"]).any()


# --- 12. Replay and sizes of rewards --------------------------------------------------------------


def record(s: SimpleNamespace, collector, steps: int) -> list[SimpleNamespace]:
    """What collect() saw and did, step by step."""
    rows, worlds, true = [], collector.worlds, collector.worlds.step

    def step(actions):
        seen, z = worlds.obs, collector.z.clone() if s.script is mra else None
        result = true(actions)
        own = {"obs": seen, "z": z, "actions": actions.clone()}
        rows.append(SimpleNamespace(**result._asdict() | own))
        return result

    worlds.step = step
    for _ in range(steps):
        s.script.collect(s.agent, collector, **s.rngs)
    worlds.step = true
    return rows


def short_pacman(script: ModuleType, flags: str = "") -> SimpleNamespace:
    """Pac-Men that die soon: crowded by ghosts; short episodes."""
    flags = f"--max-episode-steps 8 --num-envs 8 {flags}"
    return setting("pacman", "2,16", script=script, share=True, flags=flags, double=False)


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
def test_the_actor_acts_with_the_z_that_is_stored(script):
    """Actions drawn again from what was seen and stored; those of the target networks, and with
    other z, are other ones. So does the player of evaluations."""
    latents = "--latent-size 3" if script is mra else ""
    s = setting("pacman", "3,2", script=script, flags=latents, double=False)
    agent, collector = s.agent, s.collectors[0]
    agent.attention.query.weight.data *= 20  # z shows in actions
    if script is mra:
        new = mra.draw_latents(agent, s.game, len(collector.z), s.rngs["latent_rng"])
        collector.z = new

    def draw(obs, z, rng, target=False):
        view = agent.view(s.game, obs, *z)
        actor = agent.target_actor if target else agent.actor
        return script.sample(actor(view, agent.attention(view)).log_softmax(-1), rng)

    again, slow, mixed = (seeded(3) for _ in range(3))
    rows, others = record(s, collector, 20), [0, 0]
    for row in rows:
        z = (row.z,) if script is mra else ()
        assert torch.equal(row.actions, draw(row.obs, z, again))
        others[0] += (row.actions != draw(row.obs, z, slow, target=True)).sum()
        others[1] += (row.actions != draw(row.obs, [x.roll(1, 0) for x in z], mixed)).sum()
    assert others[0] > 5 and (others[1] > 5) == (script is mra)
    z = (rows[-1].z,) if script is mra else ()
    player = script.net_player(agent, *z, seed=5)
    assert torch.equal(player(collector.worlds), draw(collector.worlds.obs, z, seeded(5)))


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
def test_deviation_of_rewards_is_that_of_the_living(script):
    s = short_pacman(script)
    collector = s.collectors[0]
    rows = record(s, collector, 40)
    alive = np.stack([row.obs.alive.numpy() for row in rows])
    reward = np.stack([row.reward.double().numpy() for row in rows])
    assert not alive.all(), "somebody died"
    expected = []
    for part in (slice(0, 2), slice(2, 18)):
        living = reward[..., part][alive[..., part]]
        expected += [living.std()] * (part.stop - part.start)
    assert abs(expected[0] - reward[..., :2].std()) > 1e-3, "the dead would change it"
    assert np.abs(numbers(collector.buffer.reward_scale.deviation()) - expected).max() < 1e-6
    raw = short_pacman(script, "--no-scale-rewards")
    rows = record(raw, raw.collectors[0], 1)
    batch = raw.collectors[0].buffer.sample(raw.agent, seeded(0), 8)
    index = torch.randint(0, 8, (8,), generator=seeded(0))
    assert torch.equal(batch.rewards, rows[0].reward[index])


def test_deviation_has_a_floor():
    s = setting("resource", "3", double=False)
    buffer = s.collectors[0].buffer
    buffer.reward_scale.sums += torch.tensor([[15.0], [30.0], [60.0]])  # 15 times 2
    assert torch.allclose(buffer.reward_scale.deviation(), torch.full((3,), 0.01))


@pytest.mark.parametrize("script", [mra, maddpg], ids=["mra", "maddpg"])
def test_replay_gives_back_what_was_seen(script):
    """Bit for bit o, o', a, r / deviation, z and ends of the transitions that the seed picks,
    also when the oldest have been overwritten."""
    s = short_pacman(script, "--buffer-size 60 --batch-size 40")
    collector = s.collectors[0]
    buffer, world = collector.buffer, collector.worlds
    rows, checked = [], {"died": False, "terminated": False, "truncated": False}
    for steps in (5, 6, 14):  # 40, 88 and 200 transitions in 60 places
        rows += record(s, collector, steps)
        stored = 8 * len(rows)
        assert buffer.steps == stored and buffer.size == min(stored, 60)
        kept = {}  # what each place holds
        for t, row in enumerate(rows):
            for b in range(8):
                kept[(8 * t + b) % 60] = (row, b, 8 * t + b)
        assert min(number for *_, number in kept.values()) == max(0, stored - 60)
        batch = buffer.sample(s.agent, seeded(steps), 40)
        index = torch.randint(0, buffer.size, (40,), generator=seeded(steps)).tolist()
        assert len(set(index)) > 15
        for m, (row, b, _) in enumerate(kept[k] for k in index):
            latents = [row.z[b : b + 1]] if script is mra else []
            for ours, obs in ((batch.view, row.obs), (batch.next_view, row.final)):
                obs = type(obs)(*(x[b : b + 1] for x in obs))
                expected = s.agent.view(world.game, obs, *latents)
                for name, x in expected._asdict().items():
                    mine = getattr(ours, name)
                    alike = torch.equal(mine[m], x[0]) if isinstance(x, torch.Tensor) else mine == x
                    assert alike, name
            assert torch.equal(batch.actions[m], row.actions[b])
            assert torch.equal(batch.rewards[m], row.reward[b] / buffer.reward_scale.deviation())
            assert batch.terminated[m] == row.terminated[b]
            checked["died"] |= bool((batch.view.alive[m] != batch.next_view.alive[m]).any())
            checked["terminated"] |= bool(row.terminated[b])
            checked["truncated"] |= bool(row.truncated[b])
    assert all(checked.values()), checked


def test_latents_last_for_an_episode_and_are_drawn_anew_after_it():
    s = short_pacman(mra)
    rows = record(s, s.collectors[0], 30)
    for row, later in itertools.pairwise(rows):
        ended = row.terminated | row.truncated
        assert torch.equal(row.z[~ended], later.z[~ended])
        if ended.sum() >= 2:
            assert (row.z[ended] != later.z[ended]).any()
    assert any((row.terminated | row.truncated).sum() >= 2 for row in rows)
    assert any(row.terminated.any() for row in rows)


@pytest.mark.parametrize("task", ["treasure", "resource"])
def test_bytes_of_a_transition(task):
    s = setting(task, "24", double=False)
    rows = s.collectors[0].buffer.rows.values()
    size = sum(x[0].numel() * x.element_size() for x in rows)
    assert size < 1500
    world = s.collectors[0].worlds.obs
    plain = 2 * 4 * (world.own[0].numel() + world.entities()[0].numel())
    assert plain > 40 * size, "observations would be many times as large"


# --- 13. p(z|m) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "own", "unseen"),
    [
        ("resource", ("3", "6"), (24,)),
        ("resource", ("3", "6"), (1,)),
        ("pacman", ("2,1", "3,2"), (2, 8)),
    ],
)
def test_prior_of_populations_never_met(task, own, unseen):
    """psi in NumPy: a small network of counts / 10, a row for each type."""
    s = setting(task, *own)
    game, w = make_game(task, unseen), arrays(s.agent.latent_prior)
    hidden = relu(w["net.0.weight"] @ (np.array(unseen) / 10) + w["net.0.bias"])
    expected = (w["net.2.weight"] @ hidden + w["net.2.bias"]).reshape(len(unseen), 6)
    expected = np.repeat(log_softmax(expected), unseen, 0)
    ours = numbers(s.agent.log_prior(game))
    assert np.abs(ours - expected).max() < 1e-12
    assert np.abs(np.exp(ours).sum(-1) - 1).max() < 1e-12
    assert np.abs(np.exp(ours) - 1 / 6).max() > 0.05
    assert np.abs(numbers(s.agent.log_prior(s.game))[0] - ours[0]).max() > 1e-3, "m matters"


def test_uniform_prior():
    """With --latent-prior uniform, and where there is one population."""
    several = setting("pacman", "2,1", "2,2", flags="--latent-prior uniform")
    for s, classifies in ((several, True), (setting(), False)):
        assert not hasattr(s.agent, "latent_prior") and not s.agent.learns_prior
        assert hasattr(s.agent, "population_classifier") == classifies
        ours = numbers(s.agent.log_prior(s.game))
        assert ours.shape == (3, 6)
        assert np.abs(ours + np.log(6)).max() < 1e-6


def test_latents_are_drawn_from_the_prior():
    """Frequencies of each agent within 5 standard errors, agents independent of each other."""
    s = setting("pacman", "2,1", "3,2")
    z = mra.draw_latents(s.agent, s.game, 20_000, seeded(0)).numpy()
    assert z.shape == (20_000, 3)
    p = np.exp(numbers(s.agent.log_prior(s.game)))
    assert np.ptp(p) > 0.2, "far from uniform"
    for i in range(3):
        share = np.bincount(z[:, i], minlength=6) / len(z)
        assert (np.abs(share - p[i]) <= 5 * np.sqrt(p[i] * (1 - p[i]) / len(z))).all()
    both, alike = (z[:, 0] == z[:, 1]).mean(), (p[0] * p[1]).sum()
    assert abs(both - alike) <= 5 * np.sqrt(alike * (1 - alike) / len(z))


def test_minibatches_can_draw_z_anew():
    """With --redraw-z z has today's p(z|m), per agent, at o and o' alike, whatever acted; without,
    and while adapting, it is the z that acted. All else stays as it was."""
    s = setting("pacman", "2,1", "2,2", flags="--latent-size 3 --redraw-z", double=False)
    collector, buffer = s.collectors[0], s.collectors[0].buffer
    for _ in range(8):
        mra.collect(s.agent, collector, **s.rngs)
    buffer.rows["z"][:] = 0
    now = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])  # by type
    s.agent.latent_prior.net[2].weight.data[:] = 0
    s.agent.latent_prior.net[2].bias.data[:] = now.log().flatten()
    drawn = buffer.sample(s.agent, seeded(1), 4000)
    share, expected = drawn.view.z.mean(0), now[[0, 0, 1]]
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((share - expected).abs() < 4 * error).all()
    together = (drawn.view.z[:, 0].argmax(-1) == drawn.view.z[:, 1].argmax(-1)).float().mean()
    assert abs(scalar(together) - 0.54) < 0.04, "agents of a type draw by themselves"
    assert torch.equal(drawn.view.z, drawn.next_view.z)
    for flags in ({"redraw_z": False}, {"adapt": "a run"}):
        buffer.args = dataclasses.replace(s.args, **flags)
        kept = buffer.sample(s.agent, seeded(1), 4000)
        assert (kept.view.z[..., 0] == 1).all()
        assert torch.equal(kept.actions, drawn.actions)
        assert torch.equal(kept.view.others, drawn.view.others)
