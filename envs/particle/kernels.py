"""Linear layers and networks of pairs (see pairs.py), compiled for a CPU by Numba.

An update makes many tensors of a few MB. With torch's operations, reading and writing them takes
longer than the arithmetic. Here a block of rows stays in the processor's cache and goes through all
operations that can follow each other: product and bias; or pairs, sum over j and product.

Letters as in the scripts: M transitions, N agents, H hidden units, S parameter sets; I inputs and O
outputs of a layer; A first layers of pairs (A = S, or A = N with one for each agent); R rows of a
block. Agents are ordered by set: begins (S + 1,) has the first agent of each set, and N.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

SMALL = 64**3  # multiplications in one product at most: for more BLAS would start threads
ROWS = 64  # rows of a block at most


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels multiply x by weight (..., I, O): on a CPU, with small weights."""
    inputs, outputs = weight.shape[-2:]
    known = x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
    narrow = max(inputs, outputs) * outputs <= SMALL // 16  # else blocks would have few rows
    return x.device.type == "cpu" and known and narrow and inputs > 0


@functools.cache
def begins_of(counts: tuple[int, ...]) -> np.ndarray:
    """(S + 1,) int64: the first agent of each set, and N. counts: agents of each set."""
    return np.cumsum((0, *counts))


def linear(x: Tensor, weight: Tensor, bias: Tensor, counts: tuple[int, ...]) -> Tensor:
    """x (M, N, I) times weight (S, I, O) plus bias (S, O) of each agent's set -> (M, N, O)."""
    if len(counts) > 1:
        return GroupedLinear.apply(x, weight, bias, counts)
    rows = x.reshape(-1, 1, x.shape[2])  # with one set a block may end between agents of a world
    return GroupedLinear.apply(rows, weight, bias, (1,)).view(*x.shape[:2], -1)


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [x.contiguous().numpy() for x in tensors]


class Block(NamedTuple):
    """The agents begin to end - 1, those of set s, in the worlds first to last - 1."""

    first: int
    last: int
    begin: int
    end: int
    s: int


class GroupedLinear(torch.autograd.Function):
    """linear() block by block, with gradients of x, weight and bias."""

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
            zero = d.new_zeros(len(weight), x.shape[2])
            _linear(*arrays(d, weight.mT, zero), ctx.begins, of_x.numpy())
        if any(ctx.needs_input_grad[1:3]):
            of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            of_bias = weight.new_empty(len(weight), weight.shape[2])
            _linear_weights(*arrays(d, x), ctx.begins, of_weight.numpy(), of_bias.numpy())
        return of_x, of_weight, of_bias, None


class PairScores(torch.autograd.Function):
    """Scores u_i . relu(a_j - b_i) (M, N, N), u_i = key query_i: query (M, N, K), key (S, H, K), a
    (M, N, A, H) of agents j, b (M, N, H) of agents i."""

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
    (S, H, O), bias (S, O), a (M, N, A, H) of agents j, b (M, N, H) of agents i."""

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
        # Stored only for the gradients of weight and bias; else one block at a time is enough.
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
    """The gradients as tensors, None for inputs that need none."""
    needed = zip(gradients, ctx.needs_input_grad)
    return [torch.from_numpy(x) if wanted else None for x, wanted in needed]


# --- Blocks of rows -------------------------------------------------------------------------------


@numba.njit(cache=True)
def _worlds(inputs: int, outputs: int, agents: int) -> int:
    """Number of worlds in a block, for `agents` of a set and products (inputs, outputs)."""
    rows = min(ROWS, SMALL // (inputs * outputs))
    return max(1, rows // agents)


@numba.njit(cache=True)
def _multiply(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Write x (R, I) times weight (I, O) to out (R, O)."""
    rows = max(1, min(ROWS, SMALL // weight.size))
    for first in range(0, len(x), rows):
        last = min(first + rows, len(x))
        np.dot(x[first:last], weight, out[first:last])


@numba.njit(cache=True)
def _add_products(x: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
    """Add x^T d, for x (R, I) and d (R, O), to out (I, O)."""
    rows = max(1, min(ROWS, SMALL // out.size))
    for first in range(0, len(x), rows):
        last = min(first + rows, len(x))
        out += np.dot(x[first:last].T, d[first:last])


@numba.njit(cache=True)
def _take(x: np.ndarray, block: Block, out: np.ndarray) -> np.ndarray:
    """A block's rows (R, O) of x (M, N, O): a view if they are contiguous, else copied to out."""
    N = x.shape[1]
    if block.end - block.begin == N:
        return x.reshape(-1, x.shape[2])[block.first * N : block.last * N]
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            for k in range(x.shape[2]):
                out[row, k] = x[m, i, k]
            row += 1
    return out[:row]


@numba.njit(cache=True)
def _put(rows: np.ndarray, block: Block, out: np.ndarray) -> None:
    """Copy the rows (R, O) of a block to their places in out (M, N, O)."""
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            for k in range(out.shape[2]):
                out[m, i, k] = rows[row, k]
            row += 1


# --- Layers ---------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, begins: np.ndarray, out: np.ndarray
) -> None:
    """The forward pass of GroupedLinear, written to out (M, N, O)."""
    M, N, I = x.shape
    O = weight.shape[2]
    for s in range(len(weight)):
        size = begins[s + 1] - begins[s]
        step = _worlds(I, O, size)
        taken = np.empty((step * size, I), x.dtype)
        product = np.empty((step * size, O), x.dtype)
        for first in range(0, M, step):
            block = Block(first, min(first + step, M), begins[s], begins[s + 1], s)
            rows = _take(x, block, taken)
            y = product[: len(rows)]
            if size == N:
                y = out.reshape(-1, O)[first * N : block.last * N]
            _multiply(rows, weight[s], y)
            for row in range(len(y)):
                for k in range(O):
                    y[row, k] += bias[s, k]
            if size < N:
                _put(y, block, out)


@numba.njit(cache=True)
def _linear_weights(
    d: np.ndarray, x: np.ndarray, begins: np.ndarray, of_weight: np.ndarray, of_bias: np.ndarray
) -> None:
    """Write the gradients of weight (S, I, O) and bias (S, O); d (M, N, O): that of the result."""
    M, _, I = x.shape
    O = d.shape[2]
    of_weight[:] = 0
    of_bias[:] = 0
    for s in range(len(of_weight)):
        size = begins[s + 1] - begins[s]
        step = _worlds(I, O, size)
        taken_x = np.empty((step * size, I), x.dtype)
        taken_d = np.empty((step * size, O), x.dtype)
        for first in range(0, M, step):
            block = Block(first, min(first + step, M), begins[s], begins[s + 1], s)
            rows = _take(d, block, taken_d)
            _add_products(_take(x, block, taken_x), rows, of_weight[s])
            for row in range(len(rows)):
                for k in range(O):
                    of_bias[s, k] += rows[row, k]


# --- Tiles ----------------------------------------------------------------------------------------
# The innermost loops over the other agents j, for TILE hidden units at once, written in LLVM's
# intermediate language. From plain loops over hidden units the compiler makes code that is two to
# four times as slow, because sums over j then go through memory. The next section has those loops.

TILE = 32
INDEX = ir.IntType(64)


class TileCode:
    """Emits LLVM code for one tile. Arrays are flat, and each is followed by its first index."""

    def __init__(self, context: Any, builder: Any, signature: Any, values: Any):
        self.builder, self.values = builder, values
        flat = signature.args[0]
        self.kind = context.get_data_type(flat.dtype)
        self.tile = ir.VectorType(self.kind, TILE)
        self.zero = ir.Constant(self.tile, [0.0] * TILE)
        arrays = [k for k, each in enumerate(signature.args) if each == flat]
        make = context.make_array(flat)
        starts = [make(context, builder, values[k]).data for k in arrays]
        self.pointers = [builder.gep(p, [values[k + 1]]) for p, k in zip(starts, arrays)]

    def load(self, pointer: Any, offset: Any = None) -> Any:
        """TILE numbers from pointer + offset, a vector."""
        if offset is not None:
            pointer = self.builder.gep(pointer, [offset])
        pointer = self.builder.bitcast(pointer, self.tile.as_pointer())
        return self.builder.load(pointer, align=self.align())

    def store(self, tile: Any, pointer: Any, offset: Any = None) -> None:
        if offset is not None:
            pointer = self.builder.gep(pointer, [offset])
        pointer = self.builder.bitcast(pointer, self.tile.as_pointer())
        self.builder.store(tile, pointer, align=self.align())

    def align(self) -> int:
        return 8 if isinstance(self.kind, ir.DoubleType) else 4

    def repeat(self, pointer: Any, offset: Any) -> Any:
        """A vector with TILE times the number at pointer + offset."""
        number = self.builder.load(self.builder.gep(pointer, [offset]))
        empty = ir.Constant(self.tile, ir.Undefined)
        first = self.builder.insert_element(empty, number, INDEX(0))
        places = ir.Constant(ir.VectorType(ir.IntType(32), TILE), [0] * TILE)
        return self.builder.shuffle_vector(first, empty, places)

    def relu(self, x: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered("<", x, self.zero), self.zero, x)

    def add_product(self, total: Any, x: Any, y: Any) -> Any:
        product = self.builder.fmul(x, y, flags=["contract"])
        return self.builder.fadd(total, product, flags=["contract"])

    def sum(self, tile: Any) -> Any:
        """The sum of a vector's TILE numbers."""
        kind = ir.FunctionType(self.kind, [self.kind, self.tile])
        name = f"llvm.vector.reduce.fadd.v{TILE}f{8 * self.align()}"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [self.kind(0.0), tile], fastmath=["reassoc"])


def signature_of(flat: Any, arrays: int, numbers: int) -> Any:
    """Signature of a function with so many flat arrays, each with its first index, and numbers."""
    arguments = [flat, types.int64] * arrays + [types.int64] * numbers
    return types.void(*arguments)


@intrinsic
def _sum_tile(
    typing: Any, g: Any, g_at: Any, a: Any, a_at: Any, b: Any, b_at: Any, out: Any, out_at: Any,
    count: Any, step: Any,
) -> Any:  # fmt: skip
    """out = sum_j g_j relu(a_j - b) over `count` j, for one tile; a_j are `step` numbers apart."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        c = TileCode(context, builder, signature, values)
        g, a, b, out = c.pointers
        count, step = values[-2:]
        y = c.load(b)
        total = cgutils.alloca_once_value(builder, c.zero)
        with cgutils.for_range(builder, count) as loop:
            x = c.load(a, builder.mul(loop.index, step))
            x = c.relu(builder.fsub(x, y))
            w = c.repeat(g, loop.index)
            builder.store(c.add_product(builder.load(total), w, x), total)
        c.store(builder.load(total), out)
        return context.get_dummy_value()

    return signature_of(g, 4, 2), code


@intrinsic
def _dot_tiles(
    typing: Any, u: Any, u_at: Any, a: Any, a_at: Any, b: Any, b_at: Any, out: Any, out_at: Any,
    count: Any, step: Any, size: Any,
) -> Any:  # fmt: skip
    """out_j = u . relu(a_j - b) for `count` j, `step` apart; `size` of u: a multiple of TILE."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        c = TileCode(context, builder, signature, values)
        u, a, b, out = c.pointers
        count, step, size = values[-3:]
        tiles = builder.udiv(size, INDEX(TILE))
        total = cgutils.alloca_once_value(builder, c.zero)
        with cgutils.for_range(builder, count) as others:
            builder.store(c.zero, total)
            row = builder.mul(others.index, step)
            with cgutils.for_range(builder, tiles) as loop:
                h = builder.mul(loop.index, INDEX(TILE))
                x = c.load(a, builder.add(row, h))
                x = c.relu(builder.fsub(x, c.load(b, h)))
                builder.store(c.add_product(builder.load(total), c.load(u, h), x), total)
            builder.store(c.sum(builder.load(total)), builder.gep(out, [others.index]))
        return context.get_dummy_value()

    return signature_of(u, 4, 3), code


@intrinsic
def _gradient_tile(
    typing: Any, g: Any, g_at: Any, u: Any, u_at: Any, a: Any, a_at: Any, b: Any, b_at: Any,
    of_a: Any, of_a_at: Any, of_b: Any, of_b_at: Any, count: Any, step: Any,
) -> Any:  # fmt: skip
    """of_a_j += x_j and of_b = -sum_j x_j for one tile, with x_j = g_j u where a_j > b, else 0."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        c = TileCode(context, builder, signature, values)
        g, u, a, b, of_a, of_b = c.pointers
        count, step = values[-2:]
        y, v = c.load(b), c.load(u)
        total = cgutils.alloca_once_value(builder, c.zero)
        with cgutils.for_range(builder, count) as loop:
            row = builder.mul(loop.index, step)
            x = builder.fmul(c.repeat(g, loop.index), v)
            open_ = builder.fcmp_ordered(">", c.load(a, row), y)
            x = builder.select(open_, x, c.zero)
            c.store(builder.fadd(c.load(of_a, row), x), of_a, row)
            builder.store(builder.fsub(builder.load(total), x), total)
        c.store(builder.load(total), of_b)
        return context.get_dummy_value()

    return signature_of(g, 6, 2), code


# --- Pairs ----------------------------------------------------------------------------------------
# Each function goes through the rows of a block. Whole tiles of hidden units go to the functions
# above; the loops beside them compute the same for the H % TILE hidden units that are left.


@numba.njit(cache=True)
def _sum_over_others(
    g: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    block: Block,
    out: np.ndarray,
    totals: np.ndarray,
) -> None:
    """Write sum_j g_ij relu(a_j - b_i) to out (R, H), and sum_j g_ij to totals (R,)."""
    zero = a.dtype.type(0)
    _, N, A, H = a.shape
    tiled = H - H % TILE
    flat_g, flat_a, flat_b, flat_out = g.ravel(), a.ravel(), b.ravel(), out.ravel()
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            s = i if A == N else block.s
            agent, first = m * N + i, (m * N * A + s) * H
            for h in range(0, tiled, TILE):
                _sum_tile(
                    flat_g,
                    agent * N,
                    flat_a,
                    first + h,
                    flat_b,
                    agent * H + h,
                    flat_out,
                    row * H + h,
                    N,
                    A * H,
                )
            total = zero
            for j in range(N):
                total += g[m, i, j]
            totals[row] = total
            for h in range(tiled, H):
                total = zero
                for j in range(N):
                    x = a[m, j, s, h] - b[m, i, h]
                    total += g[m, i, j] * (zero if x < zero else x)
                out[row, h] = total
            row += 1


@numba.njit(cache=True)
def _dot_with_others(
    u: np.ndarray, a: np.ndarray, b: np.ndarray, block: Block, out: np.ndarray
) -> None:
    """Write u_i . relu(a_j - b_i), for u (R, H), to the block's rows of out (M, N, N)."""
    zero = a.dtype.type(0)
    _, N, A, H = a.shape
    tiled = H - H % TILE
    flat_u, flat_a, flat_b, flat_out = u.ravel(), a.ravel(), b.ravel(), out.ravel()
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            s = i if A == N else block.s
            agent, first = m * N + i, (m * N * A + s) * H
            _dot_tiles(
                flat_u,
                row * H,
                flat_a,
                first,
                flat_b,
                agent * H,
                flat_out,
                agent * N,
                N,
                A * H,
                tiled,
            )
            for j in range(N):
                for h in range(tiled, H):
                    x = a[m, j, s, h] - b[m, i, h]
                    out[m, i, j] += u[row, h] * (zero if x < zero else x)
            row += 1


@numba.njit(cache=True)
def _gradients_of_others(
    g: np.ndarray,
    u: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    block: Block,
    of_a: np.ndarray,
    of_b: np.ndarray,
) -> None:
    """The gradients of sum_ij g_ij u_i . relu(a_j - b_i), for u (R, H): that of a is added to of_a,
    that of b written to of_b."""
    zero = a.dtype.type(0)
    _, N, A, H = a.shape
    tiled = H - H % TILE
    flat_g, flat_u, flat_a, flat_b = g.ravel(), u.ravel(), a.ravel(), b.ravel()
    flat_of_a, flat_of_b = of_a.ravel(), of_b.ravel()
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            s = i if A == N else block.s
            agent, first = m * N + i, (m * N * A + s) * H
            for h in range(0, tiled, TILE):
                _gradient_tile(
                    flat_g,
                    agent * N,
                    flat_u,
                    row * H + h,
                    flat_a,
                    first + h,
                    flat_b,
                    agent * H + h,
                    flat_of_a,
                    first + h,
                    flat_of_b,
                    agent * H + h,
                    N,
                    A * H,
                )
            for h in range(tiled, H):
                total = zero
                for j in range(N):
                    x = g[m, i, j] * u[row, h] if a[m, j, s, h] > b[m, i, h] else zero
                    of_a[m, j, s, h] += x
                    total -= x
                of_b[m, i, h] = total
            row += 1


@numba.njit(cache=True)
def _scores(
    query: np.ndarray,
    key: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    begins: np.ndarray,
    out: np.ndarray,
) -> None:
    """The forward pass of PairScores, written to out (M, N, N); key is transposed: (S, K, H)."""
    M, N, K = query.shape
    H = b.shape[2]
    for s in range(len(key)):
        size = begins[s + 1] - begins[s]
        step = _worlds(K, H, size)
        taken = np.empty((step * size, K), b.dtype)
        u = np.empty((step * size, H), b.dtype)
        for first in range(0, M, step):
            block = Block(first, min(first + step, M), begins[s], begins[s + 1], s)
            rows = _take(query, block, taken)
            _multiply(rows, key[s], u[: len(rows)])
            _dot_with_others(u, a, b, block, out)


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
    """The needed gradients of PairScores; d (M, N, N): that of the scores; transposed (S, K, H)."""
    M, N, K = query.shape
    H = b.shape[2]
    of_key[:] = 0
    if ab_needed:
        of_a[:] = 0
    for s in range(len(key)):
        size = begins[s + 1] - begins[s]
        step = _worlds(K, H, size)
        taken = np.empty((step * size, K), b.dtype)
        product = np.empty((step * size, K), b.dtype)
        u = np.empty((step * size, H), b.dtype)
        totals = np.empty(step * size, b.dtype)
        for first in range(0, M, step):
            block = Block(first, min(first + step, M), begins[s], begins[s + 1], s)
            rows = _take(query, block, taken)
            count = len(rows)
            if ab_needed:
                _multiply(rows, transposed[s], u[:count])
                _gradients_of_others(d, u, a, b, block, of_a, of_b)
            if layer_needed:
                _sum_over_others(d, a, b, block, u, totals)
                _multiply(u[:count], key[s], product[:count])
                _put(product, block, of_query)
                _add_products(u[:count], rows, of_key[s])


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
    """The forward pass of PairSums; fills hidden (M, N, H), sums of hidden units, unless empty."""
    M, N, H = b.shape
    O = weight.shape[2]
    for s in range(len(weight)):
        size = begins[s + 1] - begins[s]
        step = _worlds(H, O, size)
        x = np.empty((step * size, H), b.dtype)
        product = np.empty((step * size, O), b.dtype)
        totals = np.empty(step * size, b.dtype)
        for first in range(0, M, step):
            block = Block(first, min(first + step, M), begins[s], begins[s + 1], s)
            count = (block.last - first) * size
            _sum_over_others(g, a, b, block, x, totals)
            _multiply(x[:count], weight[s], product[:count])
            if len(hidden):
                _put(x, block, hidden)
            row = 0
            for m in range(block.first, block.last):
                for i in range(block.begin, block.end):
                    for k in range(O):
                        out[m, i, k] = product[row, k] + totals[row] * bias[s, k]
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
    """The needed gradients of PairSums; d (M, N, O): that of the sums; transposed (S, O, H)."""
    M, N, H = b.shape
    O = transposed.shape[1]
    of_weight[:] = 0
    of_bias[:] = 0
    if ab_needed:
        of_a[:] = 0
    for s in range(len(transposed)):
        size = begins[s + 1] - begins[s]
        step = _worlds(H, O, size)
        taken = np.empty((step * size, O), b.dtype)
        taken_hidden = np.empty((step * size, H), b.dtype)
        u = np.empty((step * size, H), b.dtype)
        for first in range(0, M, step):
            block = Block(first, min(first + step, M), begins[s], begins[s + 1], s)
            rows = _take(d, block, taken)
            if layer_needed:
                _add_products(_take(hidden, block, taken_hidden), rows, of_weight[s])
                _add_weighted(g, rows, block, of_bias[s])
            if g_needed or ab_needed:
                _multiply(rows, transposed[s], u[: len(rows)])
            if g_needed:
                _dot_with_others(u, a, b, block, of_g)
                _add_constants(rows, bias[s], block, of_g)
            if ab_needed:
                _gradients_of_others(g, u, a, b, block, of_a, of_b)


@numba.njit(cache=True)
def _add_weighted(g: np.ndarray, d: np.ndarray, block: Block, out: np.ndarray) -> None:
    """Add to out (O,) the rows of d (R, O), each times the sum of its agent's graph g[m, i]."""
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            total = g[m, i].sum()
            for k in range(len(out)):
                out[k] += total * d[row, k]
            row += 1


@numba.njit(cache=True)
def _add_constants(d: np.ndarray, bias: np.ndarray, block: Block, out: np.ndarray) -> None:
    """Add d_i . bias, for the rows d_i of d (R, O) and bias (O,), to out[m, i, :] of (M, N, N)."""
    row = 0
    for m in range(block.first, block.last):
        for i in range(block.begin, block.end):
            x = np.dot(d[row], bias)
            for j in range(out.shape[2]):
                out[m, i, j] += x
            row += 1


# --- Observations ---------------------------------------------------------------------------------


@numba.njit(cache=True)
def observe_states(
    states: np.ndarray,
    radius: np.ndarray,
    labels: np.ndarray,
    in_order: bool,
    sizes: bool,
    own: np.ndarray,
    others: np.ndarray,
) -> None:
    """Write what worlds.observation() gives for states (M, S) to own (M, N, Ds), others (M, N, De).
    radius (L,): of landmarks; labels (N, T): features of agents that never change."""
    N, L = own.shape[1], len(radius)
    fields = 3 if sizes else 2
    first = 4 + labels.shape[1]  # first feature of landmarks in others
    shown = (own.shape[2] - 4) // fields
    edge = np.empty(L, states.dtype)
    order = np.empty(L, np.int64)
    for m in range(len(states)):
        position, velocity = states[m, : 2 * N], states[m, 2 * N : 4 * N]
        landmarks = states[m, 5 * N : 5 * N + 2 * L]
        for i in range(N):
            for axis in range(2):
                own[m, i, axis] = velocity[axis * N + i]
                own[m, i, 2 + axis] = position[axis * N + i]
                others[m, i, axis] = position[axis * N + i]
                others[m, i, 2 + axis] = velocity[axis * N + i]
            for label in range(labels.shape[1]):
                others[m, i, 4 + label] = labels[i, label]
            for l in range(L):
                x = landmarks[l] - position[i]
                y = landmarks[L + l] - position[N + i]
                edge[l] = np.sqrt(x * x + y * y) - radius[l]
                place = l
                while place > 0 and not in_order and edge[l] < edge[order[place - 1]]:
                    order[place] = order[place - 1]
                    place -= 1
                order[place] = l
            for k in range(shown):
                l = order[k]
                at = fields * k
                x = landmarks[l] - position[i]
                y = landmarks[L + l] - position[N + i]
                own[m, i, 4 + at], own[m, i, 5 + at] = x, y
                others[m, i, first + at], others[m, i, first + at + 1] = x, y
                if sizes:
                    own[m, i, 6 + at] = others[m, i, first + at + 2] = 2 * radius[l]
