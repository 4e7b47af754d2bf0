"""Layers of sets of agents, and a CPU's kernels of pairs and observations, against torch's."""

from __future__ import annotations

import pytest
import torch

from envs.particle import kernels, pairs, worlds

pytestmark = pytest.mark.numeric

M, K, O = 7, 6, 9
COUNTS = [(5,), (2, 3), (1, 1, 1, 1), (70,)]  # one set, types, per agent, many
WIDTHS = [8, 32, 40]  # no tile, one, and one with something left


def exact(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/8 from -1 to 1: sums of their products are exact in any order."""
    return (torch.randint(-8, 9, shape) / 8).to(dtype).requires_grad_()


def assert_same(plain: torch.Tensor, ours: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and all gradients, to the bit; then those of each input alone."""
    assert torch.equal(plain, ours)
    d = (torch.randint(-4, 5, plain.shape) / 4).to(plain.dtype)
    theirs = torch.autograd.grad(plain, inputs, d, retain_graph=True)
    mine = torch.autograd.grad(ours, inputs, d, retain_graph=True)
    for a, b in zip(theirs, mine, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@DTYPES
@pytest.mark.parametrize("counts", COUNTS)
def test_layers(counts, dtype):
    N, S = sum(counts), len(counts)
    agents = pairs_of_sets(counts)
    x, weight, bias = (exact(*s, dtype=dtype) for s in ((M, N, K), (S, K, O), (S, O)))
    plain = torch.einsum("mni,nio->mno", x, weight[agents]) + bias[agents]
    ours = pairs.grouped_linear(x, weight, bias, counts)
    assert_same(plain, ours, [x, weight, bias])
    assert torch.equal(pairs.grouped_linear(x, weight, None, counts), ours - bias[agents])


def pairs_of_sets(counts: tuple[int, ...]) -> torch.Tensor:
    """The set of each agent."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


@DTYPES
@pytest.mark.parametrize("per_agent", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("H", WIDTHS)
def test_pairs(H, counts, per_agent, dtype):
    """Scores and sums; first layers one for each set, or one for each agent (bilinear)."""
    N, S = sum(counts), len(counts)
    if per_agent and N > 10:
        pytest.skip("the same loops")
    agents = pairs_of_sets(counts)
    a = exact(M, N, N if per_agent else S, H, dtype=dtype)
    b, g = exact(M, N, H, dtype=dtype), exact(M, N, N, dtype=dtype)
    row = torch.arange(N) if per_agent else agents
    hidden = torch.relu(a.transpose(1, 2)[:, row] - b[:, :, None])  # (M, N, N, H)
    plain = torch.einsum("mij,mijh->mih", g, hidden)
    plain = torch.cat((plain, g.sum(-1, keepdim=True)), -1)
    assert_same(plain, kernels.PairSums.apply(g, a, b, counts), [g, a, b])
    u = exact(M, N, H, dtype=dtype)
    plain = torch.einsum("mih,mijh->mij", u, hidden)
    assert_same(plain, kernels.PairScores.apply(u, a, b, counts), [u, a, b])


@pytest.mark.parametrize("function", [kernels.PairSums, kernels.PairScores])
@pytest.mark.parametrize("wanted", ["x", "ab", "a"])
def test_gradients_of_some(wanted, function):
    """What is given or frozen gets none, and the rest is what it was."""
    first = (M, 5, 5) if function is kernels.PairSums else (M, 5, 40)
    shapes = dict(x=first, a=(M, 5, 1, 40), b=(M, 5, 40))
    inputs = {name: exact(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    every = function.apply(*inputs.values(), (5,)).sum()
    whole = dict(zip(inputs, torch.autograd.grad(every, list(inputs.values()))))
    some = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    function.apply(*some.values(), (5,)).sum().backward()
    for name, x in some.items():
        assert (x.grad is None) == (name not in wanted)
        assert name not in wanted or torch.equal(x.grad, whole[name])


def test_nan_is_seen():
    """A ReLU hides no NaN."""
    a = torch.full((1, 3, 1, 40), torch.nan)
    b, g = torch.zeros(1, 3, 40), torch.full((1, 3, 3), 1 / 3)
    assert kernels.PairSums.apply(g, a, b, (3,))[..., :40].isnan().all()
    assert kernels.PairScores.apply(torch.ones(1, 3, 40), a, b, (3,)).isnan().all()


def test_where_kernels_are_used():
    x = torch.zeros(2, 3, 64)
    assert kernels.fits(x) and kernels.fits(x.double())
    assert not kernels.fits(x.half()) and not kernels.fits(x.to("meta"))


GAMES = [("treasure", 5), ("resource", 7), ("pacman", (4, 2)), ("signpost", 5), ("rooms", (3, 3))]


@DTYPES
@pytest.mark.parametrize("game", GAMES)
def test_observations_of_states(game, dtype):
    """To the bit what the worlds show, made by torch's operations."""
    world = worlds.ParticleWorld(*game, num_worlds=96, dtype=dtype)
    world.reset()
    for _ in range(7):
        world.step(torch.randint(0, 5, (96, world.num_agents)))
    for one, other in zip(world.observe(world.state), world.obs, strict=True):
        assert torch.equal(one, other) and one.is_contiguous()
