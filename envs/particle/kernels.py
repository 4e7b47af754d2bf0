"""Layers and networks of pairs compiled for a CPU: what pairs.py does with torch's operations.

An update makes many tensors of a few MB, and as torch has it each operation reads one and writes
another, which takes longer than computing them. Here blocks of rows that stay in a processor's
cache go through all that can be done at once: product, bias; pairs, sum over j, product.

Letters as in the scripts: M transitions, N agents, H hidden units, S parameter sets; I inputs, O
outputs of a layer; A first layers of pairs, one for each set or for each agent. Agents of a set
come one after another: begins (S + 1,) says where, and N.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

SMALL = 64**3  # multiplications of a product; BLAS would start threads of its own for more
ROWS = 64  # of a block, at most


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels are for x and for products with weight (..., I, O)."""
    inputs, outputs = weight.shape[-2:]
    known = x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
    return x.device.type == "cpu" and known and inputs * outputs <= SMALL // 16


@functools.cache
def begins_of(counts: tuple[int, ...]) -> np.ndarray:
    """(S + 1,) int64: where each set's agents begin, and their number."""
    return np.cumsum((0, *counts))


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [x.contiguous().numpy() for x in tensors]


class GroupedLinear(torch.autograd.Function):
    """x (M, N, I) by weight (S, I, O) of each agent's set, plus bias (S, O) -> (M, N, O)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.begins = begins_of(counts)
        out = x.new_empty(*x.shape[:2], weight.shape[2])
        _linear(*arrays(x, weight, bias), ctx.begins, out.numpy())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            zero = d.new_zeros(len(weight), d.shape[2])
            _linear(*arrays(d, weight.mT, zero[:, :1].expand(-1, x.shape[2])), ctx.begins, of_x.numpy())
        if any(ctx.needs_input_grad[1:3]):
            of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            of_bias = weight.new_empty(len(weight), weight.shape[2])
            _linear_weights(*arrays(d, x), ctx.begins, of_weight.numpy(), of_bias.numpy())
        return of_x, of_weight, of_bias, None


class PairScores(torch.autograd.Function):
    """u_i . relu(a_j - b_i) (M, N, N), u_i = key query_i: query (M, N, K), key (S, H, K), a
    (M, N, A, H) of each agent j, b (M, N, H)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, a: Tensor, b: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(query, key, a, b)
        ctx.begins = begins_of(counts)
        out = query.new_empty(*b.shape[:2], a.shape[1])
        _scores(*arrays(query, key.mT, a, b), ctx.begins, out.numpy())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        query, key, a, b = arrays(*ctx.saved_tensors)
        of_query, of_key, of_a, of_b = (np.empty_like(x) for x in (query, key, a, b))
        of_layer, of_ab = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        transposed = np.ascontiguousarray(key.transpose(0, 2, 1))
        _scores_backward(
            *arrays(d),
            query,
            key,
            transposed,
            a,
            b,
            ctx.begins,
            of_layer,
            of_ab,
            of_query,
            of_key,
            of_a,
            of_b,
        )
        return *chosen(ctx, of_query, of_key, of_a, of_b), None


class PairSums(torch.autograd.Function):
    """sum_j g_ij v_ij (M, N, O), v_ij = relu(a_j - b_i) weight + bias: graphs g (M, N, N), weight
    (S, H, O), bias (S, O), a (M, N, A, H) of each agent j, b (M, N, H)."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        weight: Tensor,
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        counts: tuple[int, ...],
    ) -> Tensor:
        ctx.begins = begins_of(counts)
        out = g.new_empty(*b.shape[:2], weight.shape[2])
        # What weights' gradients need; without those a block at a time is enough.
        hidden = torch.empty_like(b) if any(ctx.needs_input_grad[1:3]) else b[:0]
        _sums(*arrays(g, weight, bias, a, b), ctx.begins, hidden.numpy(), out.numpy())
        ctx.save_for_backward(g, weight, bias, a, b, hidden)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        g, weight, bias, a, b, hidden = arrays(*ctx.saved_tensors)
        of_g, of_weight, of_bias, of_a, of_b = (np.empty_like(x) for x in (g, weight, bias, a, b))
        of_layer, of_ab = any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[3:5])
        transposed = np.ascontiguousarray(weight.transpose(0, 2, 1))
        _sums_backward(
            *arrays(d),
            g,
            transposed,
            bias,
            a,
            b,
            hidden,
            ctx.begins,
            ctx.needs_input_grad[0],
            of_layer,
            of_ab,
            of_g,
            of_weight,
            of_bias,
            of_a,
            of_b,
        )
        return *chosen(ctx, of_g, of_weight, of_bias, of_a, of_b), None


def chosen(ctx: Any, *gradients: np.ndarray) -> list[Tensor | None]:
    """Those that are needed."""
    needed = zip(gradients, ctx.needs_input_grad)
    return [torch.from_numpy(x) if wanted else None for x, wanted in needed]


# --- Blocks of rows -------------------------------------------------------------------------------


@numba.njit(cache=True)
def _worlds(inputs: int, outputs: int, agents: int) -> int:
    """How many worlds' agents make a block."""
    rows = min(ROWS, SMALL // (inputs * outputs))
    return max(1, rows // agents)


@numba.njit(cache=True)
def _multiply(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """x (R, I) times weight (I, O)."""
    rows = min(ROWS, SMALL // weight.size)
    for first in range(0, len(x), rows):
        last = min(first + rows, len(x))
        np.dot(x[first:last], weight, out[first:last])


@numba.njit(cache=True)
def _add_products(x: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
    """Add the sum over rows of x (R, I) times d (R, O) to out (I, O)."""
    rows = min(ROWS, SMALL // out.size)
    for first in range(0, len(x), rows):
        last = min(first + rows, len(x))
        out += np.dot(x[first:last].T, d[first:last])


@numba.njit(cache=True)
def _take(
    x: np.ndarray, worlds: tuple[int, int], agents: tuple[int, int], out: np.ndarray
) -> np.ndarray:
    """Rows of some worlds' agents of x (M, N, O), copied to out unless they lie together."""
    N, size = x.shape[1], agents[1] - agents[0]
    if size == N:
        return x.reshape(-1, x.shape[2])[worlds[0] * N : worlds[1] * N]
    row = 0
    for m in range(worlds[0], worlds[1]):
        for i in range(agents[0], agents[1]):
            for k in range(x.shape[2]):
                out[row, k] = x[m, i, k]
            row += 1
    return out[:row]


@numba.njit(cache=True)
def _put(
    rows: np.ndarray, worlds: tuple[int, int], agents: tuple[int, int], out: np.ndarray
) -> None:
    """The opposite: rows to their places in out (M, N, O)."""
    row = 0
    for m in range(worlds[0], worlds[1]):
        for i in range(agents[0], agents[1]):
            for k in range(out.shape[2]):
                out[m, i, k] = rows[row, k]
            row += 1


# --- Layers ---------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, begins: np.ndarray, out: np.ndarray
) -> None:
    """GroupedLinear."""
    M, N, I = x.shape
    O = weight.shape[2]
    for s in range(len(weight)):
        agents = (begins[s], begins[s + 1])
        size = agents[1] - agents[0]
        step = _worlds(I, O, size)
        taken = np.empty((step * size, I), x.dtype)
        product = np.empty((step * size, O), x.dtype)
        for m in range(0, M, step):
            worlds = (m, min(m + step, M))
            rows = _take(x, worlds, agents, taken)
            if size == N:
                y = out.reshape(-1, O)[worlds[0] * N : worlds[1] * N]
            else:
                y = product[: len(rows)]
            _multiply(rows, weight[s], y)
            for row in range(len(y)):
                for k in range(O):
                    y[row, k] += bias[s, k]
            if size < N:
                _put(y, worlds, agents, out)


@numba.njit(cache=True)
def _linear_weights(
    d: np.ndarray, x: np.ndarray, begins: np.ndarray, of_weight: np.ndarray, of_bias: np.ndarray
) -> None:
    """The gradients of weight (S, I, O) and bias (S, O), from that of the result (M, N, O)."""
    M, N, I = x.shape
    O = d.shape[2]
    of_weight[:] = 0
    of_bias[:] = 0
    for s in range(len(of_weight)):
        agents = (begins[s], begins[s + 1])
        size = agents[1] - agents[0]
        step = _worlds(I, O, size)
        taken_x = np.empty((step * size, I), x.dtype)
        taken_d = np.empty((step * size, O), x.dtype)
        for m in range(0, M, step):
            worlds = (m, min(m + step, M))
            rows = _take(x, worlds, agents, taken_x)
            y = _take(d, worlds, agents, taken_d)
            _add_products(rows, y, of_weight[s])
            for row in range(len(y)):
                for k in range(O):
                    of_bias[s, k] += y[row, k]


# --- Pairs ----------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _sum_over_others(
    g: np.ndarray, a: np.ndarray, b: np.ndarray, place: tuple[int, int, int], out: np.ndarray
) -> None:
    """sum_j g_ij relu(a_j - b_i) (H,) of the agent at place: its world m, i, and number in A."""
    m, i, layer = place
    zero = a.dtype.type(0)
    bi = b[m, i]
    H = len(bi)
    for h in range(H):
        out[h] = zero
    for j in range(g.shape[2]):
        w = g[m, i, j]
        if w != zero:
            aj = a[m, j, layer]
            for h in range(H):
                x = aj[h] - bi[h]
                out[h] += w * (zero if x <= zero else x)


@numba.njit(cache=True, fastmath={"reassoc", "contract"})
def _dot_with_others(
    u: np.ndarray, a: np.ndarray, b: np.ndarray, place: tuple[int, int, int], out: np.ndarray
) -> None:
    """u . relu(a_j - b_i) (N,) of all j, of the agent at place; u (H,)."""
    m, i, layer = place
    zero = a.dtype.type(0)
    bi = b[m, i]
    H = len(bi)
    for j in range(a.shape[1]):
        aj = a[m, j, layer]
        total = zero
        for h in range(H):
            x = aj[h] - bi[h]
            total += u[h] * (zero if x <= zero else x)
        out[j] = total


@numba.njit(cache=True)
def _gradients_of_others(
    g: np.ndarray,
    u: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    place: tuple[int, int, int],
    of_a: np.ndarray,
    of_b: np.ndarray,
) -> None:
    """The gradients of sum_j g_ij u . relu(a_j - b_i), of the agent at place: of_a is added to,
    of_b (M, N, H) is set; g (N,), u (H,)."""
    m, i, layer = place
    zero = a.dtype.type(0)
    bi, di = b[m, i], of_b[m, i]
    H = len(bi)
    for h in range(H):
        di[h] = zero
    for j in range(a.shape[1]):
        w = g[j]
        if w != zero:
            aj, dj = a[m, j, layer], of_a[m, j, layer]
            for h in range(H):
                x = w * u[h] if aj[h] > bi[h] else zero
                dj[h] += x
                di[h] -= x


@numba.njit(cache=True)
def _scores(
    query: np.ndarray,
    key: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    begins: np.ndarray,
    out: np.ndarray,
) -> None:
    """PairScores; key (S, K, H)."""
    M, N, K = query.shape
    H = b.shape[2]
    for s in range(len(key)):
        agents = (begins[s], begins[s + 1])
        size = agents[1] - agents[0]
        step = _worlds(K, H, size)
        taken = np.empty((step * size, K), b.dtype)
        u = np.empty((step * size, H), b.dtype)
        for first in range(0, M, step):
            worlds = (first, min(first + step, M))
            rows = _take(query, worlds, agents, taken)
            _multiply(rows, key[s], u[: len(rows)])
            row = 0
            for m in range(worlds[0], worlds[1]):
                for i in range(agents[0], agents[1]):
                    place = (m, i, i if a.shape[2] == N else s)
                    _dot_with_others(u[row], a, b, place, out[m, i])
                    row += 1


@numba.njit(cache=True)
def _scores_backward(
    d: np.ndarray,
    query: np.ndarray,
    key: np.ndarray,
    transposed: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    begins: np.ndarray,
    layer_needed: bool,
    ab_needed: bool,
    of_query: np.ndarray,
    of_key: np.ndarray,
    of_a: np.ndarray,
    of_b: np.ndarray,
) -> None:
    """All gradients, from that of the scores (M, N, N); key (S, H, K), transposed (S, K, H)."""
    M, N, K = query.shape
    H = b.shape[2]
    of_a[:] = 0
    of_key[:] = 0
    for s in range(len(key)):
        agents = (begins[s], begins[s + 1])
        size = agents[1] - agents[0]
        step = _worlds(K, H, size)
        taken = np.empty((step * size, K), b.dtype)
        product = np.empty((step * size, K), b.dtype)
        u = np.empty((step * size, H), b.dtype)
        of_u = np.empty((step * size, H), b.dtype)
        for first in range(0, M, step):
            worlds = (first, min(first + step, M))
            rows = _take(query, worlds, agents, taken)
            _multiply(rows, transposed[s], u[: len(rows)])
            row = 0
            for m in range(worlds[0], worlds[1]):
                for i in range(agents[0], agents[1]):
                    place = (m, i, i if a.shape[2] == N else s)
                    if layer_needed:
                        _sum_over_others(d, a, b, place, of_u[row])
                    if ab_needed:
                        _gradients_of_others(d[m, i], u[row], a, b, place, of_a, of_b)
                    row += 1
            if layer_needed:
                _multiply(of_u[:row], key[s], product[:row])
                _put(product, worlds, agents, of_query)
                _add_products(of_u[:row], rows, of_key[s])


@numba.njit(cache=True)
def _sums(
    g: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    begins: np.ndarray,
    hidden: np.ndarray,
    out: np.ndarray,
) -> None:
    """PairSums; hidden (M, N, H) is filled if it is not empty."""
    M, N, H = b.shape
    O = weight.shape[2]
    for s in range(len(weight)):
        agents = (begins[s], begins[s + 1])
        size = agents[1] - agents[0]
        step = _worlds(H, O, size)
        x = np.empty((step * size, H), b.dtype)
        product = np.empty((step * size, O), b.dtype)
        for first in range(0, M, step):
            worlds = (first, min(first + step, M))
            row = 0
            for m in range(worlds[0], worlds[1]):
                for i in range(agents[0], agents[1]):
                    place = (m, i, i if a.shape[2] == N else s)
                    _sum_over_others(g, a, b, place, x[row])
                    row += 1
            _multiply(x[:row], weight[s], product[:row])
            if len(hidden):
                _put(x, worlds, agents, hidden)
            row = 0
            for m in range(worlds[0], worlds[1]):
                for i in range(agents[0], agents[1]):
                    total = g[m, i].sum()
                    for k in range(O):
                        out[m, i, k] = product[row, k] + total * bias[s, k]
                    row += 1


@numba.njit(cache=True)
def _sums_backward(
    d: np.ndarray,
    g: np.ndarray,
    transposed: np.ndarray,
    bias: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    hidden: np.ndarray,
    begins: np.ndarray,
    g_needed: bool,
    layer_needed: bool,
    ab_needed: bool,
    of_g: np.ndarray,
    of_weight: np.ndarray,
    of_bias: np.ndarray,
    of_a: np.ndarray,
    of_b: np.ndarray,
) -> None:
    """All gradients, from that of the sums (M, N, O); transposed (S, O, H)."""
    M, N, H = b.shape
    O = transposed.shape[1]
    of_a[:] = 0
    of_weight[:] = 0
    of_bias[:] = 0
    for s in range(len(transposed)):
        agents = (begins[s], begins[s + 1])
        size = agents[1] - agents[0]
        step = _worlds(H, O, size)
        taken = np.empty((step * size, O), b.dtype)
        taken_hidden = np.empty((step * size, H), b.dtype)
        u = np.empty((step * size, H), b.dtype)
        for first in range(0, M, step):
            worlds = (first, min(first + step, M))
            rows = _take(d, worlds, agents, taken)
            if layer_needed:
                x = _take(hidden, worlds, agents, taken_hidden)
                _add_products(x, rows, of_weight[s])
            _multiply(rows, transposed[s], u[: len(rows)])
            row = 0
            for m in range(worlds[0], worlds[1]):
                for i in range(agents[0], agents[1]):
                    place = (m, i, i if a.shape[2] == N else s)
                    if layer_needed:
                        total = g[m, i].sum()
                        for k in range(O):
                            of_bias[s, k] += total * rows[row, k]
                    if g_needed:
                        _dot_with_others(u[row], a, b, place, of_g[m, i])
                        constant = np.dot(rows[row], bias[s])
                        for j in range(N):
                            of_g[m, i, j] += constant
                    if ab_needed:
                        _gradients_of_others(g[m, i], u[row], a, b, place, of_a, of_b)
                    row += 1
