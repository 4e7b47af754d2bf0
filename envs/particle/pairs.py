"""Two-layer networks of all pairs of agents, computed exactly from M N H numbers a set of weights.

A network of o_ij = [p_j - p_i, v_j, ...] has N^2 inputs for N agents. But its first layer is linear
and gives a_j - b_i with a_j = W [p_j, v_j, ...] + c and b_i = W_p p_i, N vectors each. For keys the
second layer moves to the query, as q . K h = (K^T q) . h; for values it comes after the sum over j.
Two sums over pairs remain. On a CPU kernels.py computes them; on a GPU torch's operations do,
compiled to single loops if `compiled` is set. There is an a_j for each set of weights: where each
agent i has weights of its own, a is M N^2 H numbers again.

FastPairs has the methods of the scripts' plain class Pairs; tests require equal results and
gradients. Both use grouped_linear(). M transitions, N agents, H hidden units, S parameter sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.particle import kernels
from envs.particle.worlds import Compiled


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: tuple[int, ...]
) -> Tensor:
    """A linear layer with one parameter set per group of agents: x (M, N, I), weight (S, I, O) and
    bias (S, O) or None -> (M, N, O). counts: agents of each set, in order. It is einsum("mni,nio->
    mno", x, w) + b with w and b repeated for each agent, in fewer and larger products. Or weight
    (M, N, I, O) and bias (M, N, O) of each agent."""
    if weight.dim() == 4:
        return torch.einsum("mni,mnio->mno", x, weight) + bias
    if len(weight) == 1:
        return F.linear(x, weight[0].mT, None if bias is None else bias[0])
    if len(weight) == x.shape[1]:
        y = torch.einsum("mni,nio->mno", x, weight)
        return y if bias is None else y + bias
    each = [None] * len(weight) if bias is None else bias
    parts = zip(x.split(counts, 1), weight, each)
    return torch.cat([F.linear(part, w.mT, b) for part, w, b in parts], 1)


class FastPairs:
    """Hidden layer relu(o_ij @ weight + bias) of all pairs (i, j), kept as b_i and, for each set of
    weights, a_j: M N^2 H numbers if each agent has its own weight, else M S N H.

    others    (M, N, De) of each agent j; o_ij is others_j with p_j - p_i in the place of p_j
    weight    (S, De, H): one for each parameter set, or (M, N, De, H): one for each agent i
    bias      (S, H) or (M, N, H) likewise; with a weight of each agent a bias of each, too
    counts    number of agents of each parameter set, in order
    compiled  compile the sums over pairs, where kernels.py is not used
    """

    def __init__(
        self,
        others: Tensor,
        weight: Tensor,
        bias: Tensor,
        counts: tuple[int, ...],
        compiled: bool = False,
    ):
        self.counts, self.compiled = counts, compiled
        own_bias = bias.dim() == 3  # of each agent i: b_i has it, in place of a_j
        shared = bias.new_zeros(len(weight), bias.shape[-1]) if own_bias else bias  # (S, H)
        position = others[..., :2]
        self.use_kernels = kernels.fits(others)
        if self.use_kernels:
            if weight.dim() == 4:
                self.a = torch.einsum("mjd,mndh->mjnh", others, weight)  # (M, N, N, H)
                self.b = torch.einsum("mnd,mndh->mnh", position, weight[:, :, :2])  # (M, N, H)
            else:
                joined = weight.transpose(0, 1).flatten(1)[None]  # (1, De, S x H)
                a = grouped_linear(others, joined, shared.flatten()[None], (others.shape[1],))
                self.a = a.unflatten(-1, (len(weight), -1))  # (M, N, S, H)
                self.b = grouped_linear(position, weight[:, :2], None, counts)
        elif weight.dim() == 4:
            self.a = torch.einsum("mjd,mndh->mnjh", others, weight)  # (M, N, N, H)
            self.b = torch.einsum("mnd,mndh->mnh", position, weight[:, :, :2])  # (M, N, H)
        else:
            self.a = torch.einsum("mjd,sdh->msjh", others, weight)  # (M, S, N, H)
            self.a = self.a + shared[:, None]
            self.b = grouped_linear(position, weight[:, :2], None, counts)
        if own_bias:
            self.b = self.b - bias

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores q_i . k_ij (M, N, N) of query (M, N, K) and keys without bias, key (S, H, K)."""
        u = grouped_linear(query, key.mT, None, self.counts)  # (M, N, H)
        if self.use_kernels:
            return kernels.PairScores.apply(u, self.a, self.b, self.counts)
        return self._reduce(score_kernel, u)

    def sums(self, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """sum_j g_ij v_ij (M, N, O) for graphs g (M, N, N); v by weight (S, H, O), bias (S, O)."""
        # sum_j g_ij (h_ij W + c) = [sum_j g_ij h_ij, sum_j g_ij] [W; c]
        if self.use_kernels:
            sums = kernels.PairSums.apply(g, self.a, self.b, self.counts)  # (M, N, H + 1)
        else:
            sums = torch.cat((self._reduce(sum_kernel, g), g.sum(-1, keepdim=True)), -1)
        return grouped_linear(sums, torch.cat((weight, bias[:, None]), 1), None, self.counts)

    def _reduce(self, function: Callable, x: Tensor) -> Tensor:
        """score_kernel or sum_kernel of x (M, N, .), one parameter set at a time."""
        if self.a.shape[1] in (1, x.shape[1]):
            return PairReduction.apply(function, self.compiled, x, self.a, self.b)
        counts = self.counts
        parts = zip(x.split(counts, 1), self.a.split(1, 1), self.b.split(counts, 1))
        results = [PairReduction.apply(function, self.compiled, u, a, b) for u, a, b in parts]
        return torch.cat(results, 1)


# --- Kernels --------------------------------------------------------------------------------------


def score_kernel(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """u_i . relu(a_j - b_i): u, b (M, n, H), a (M, 1 or n, N, H) -> (M, n, N)."""
    return (u[:, :, None] * F.relu(a - b[:, :, None])).sum(-1)


def sum_kernel(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_j g_ij relu(a_j - b_i): g (M, n, N), a (M, 1 or n, N, H), b (M, n, H) -> (M, n, H)."""
    return (g[..., None] * F.relu(a - b[:, :, None])).sum(2)


def gradient_kernel(g: Tensor, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum_ij g_ij u_i . relu(a_j - b_i) with respect to a and b; shapes as above."""
    x = torch.where(a > b[:, :, None], g[..., None] * u[:, :, None], 0.0)
    of_a = x.sum(1, keepdim=True) if a.shape[1] == 1 else x
    return of_a, -x.sum(2)


class PairReduction(torch.autograd.Function):
    """score_kernel or sum_kernel of x, a, b that stores no N^2 H numbers for its gradients."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable, compiled: bool, x: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scores, ctx.compiled = function is score_kernel, compiled
        # Detached: kernels are compiled for each pattern of requires_grad, at most 8 times.
        return kernel(function, compiled)(x.detach(), a.detach(), b.detach())

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = (saved.detach() for saved in ctx.saved_tensors)
        d = d.detach().contiguous()
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[2]:
            other = sum_kernel if ctx.scores else score_kernel  # each is the other's gradient
            of_x = kernel(other, ctx.compiled)(d, a, b)
        if any(ctx.needs_input_grad[3:]):
            g, u = (d, x) if ctx.scores else (x, d)
            of_a, of_b = kernel(gradient_kernel, ctx.compiled)(g, u, a, b)
        return None, None, of_x, of_a, of_b


@functools.cache
def kernel(function: Callable, compiled: bool) -> Callable:
    """The function itself, or its form compiled for all sizes of tensors."""
    if not compiled:
        return function
    return Compiled(function, function.__name__, dynamic=True)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the process; without glibc nothing happens. By default each
    tensor above 32 MB gets new pages from the system: with 48 agents half of the time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX = 0: no memory map of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give no memory back to the system
