"""Sums over pairs of agents (see pairs.py) and observations, compiled for a CPU by Numba.

Torch's operations write a number for each pair and hidden unit to memory, and read it again, which
takes longer than the arithmetic. Here a pair's hidden units stay in the processor's registers.

Letters as in the scripts: M transitions, N agents, H hidden units, S parameter sets; A first layers
of pairs: A = S, or A = N with one for each agent. rows (N,): the first layer of each agent.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor


def fits(x: Tensor) -> bool:
    """Whether these kernels take x: on a CPU, with numbers that they know."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


@functools.cache
def rows_of(counts: tuple[int, ...], layers: int) -> np.ndarray:
    """(N,) int64: which of the first layers each agent has. counts: agents of each set."""
    sets = np.repeat(np.arange(len(counts)), counts)
    return sets if layers == len(counts) else np.arange(len(sets))


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [x.contiguous().numpy() for x in tensors]


class PairScores(torch.autograd.Function):
    """u_i . relu(a_j - b_i) (M, N, N): u, b (M, N, H) of agents i, a (M, N, A, H) of agents j."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, a: Tensor, b: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(u, a, b)
        ctx.rows = rows_of(counts, a.shape[2])
        out = u.new_empty(*b.shape[:2], a.shape[1])
        _dot_with_others(*arrays(u, a, b), ctx.rows, out.numpy())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        u, a, b = ctx.saved_tensors
        of_u = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_u = new(u)
            _sum_over_others(*arrays(d, a, b), ctx.rows, of_u.numpy())
        if any(ctx.needs_input_grad[1:3]):
            of_a, of_b = new(a).zero_(), new(b)
            _gradients_of_others(*arrays(d, u, a, b), ctx.rows, of_a.numpy(), of_b.numpy())
        return of_u, of_a, of_b, None


class PairSums(torch.autograd.Function):
    """sum_j g_ij [relu(a_j - b_i), 1] (M, N, H + 1): g (M, N, N), a (M, N, A, H) of agents j, b
    (M, N, H) of agents i."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor, b: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(g, a, b)
        ctx.rows = rows_of(counts, a.shape[2])
        out = b.new_empty(*b.shape[:2], b.shape[2] + 1)
        _sum_over_others(*arrays(g, a, b), ctx.rows, out.numpy())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        g, a, b = ctx.saved_tensors
        of_g = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_g = new(g)
            _dot_with_others(*arrays(d, a, b), ctx.rows, of_g.numpy())
        if any(ctx.needs_input_grad[1:3]):
            of_a, of_b = new(a).zero_(), new(b)
            _gradients_of_others(*arrays(g, d, a, b), ctx.rows, of_a.numpy(), of_b.numpy())
        return of_g, of_a, of_b, None


def new(x: Tensor) -> Tensor:
    """A tensor like x, without gaps."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
# Whole tiles of hidden units go to the functions above; the loops beside them compute the same for
# the H % TILE hidden units that are left. out and u may have one more, which is always 1.


@numba.njit(cache=True)
def _sum_over_others(
    g: np.ndarray, a: np.ndarray, b: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> None:
    """Write sum_j g_ij relu(a_j - b_i) to out (M, N, H or H + 1)."""
    zero = a.dtype.type(0)
    M, N, A, H = a.shape
    W = out.shape[2]
    tiled = H - H % TILE
    flat_g, flat_a, flat_b, flat_out = g.ravel(), a.ravel(), b.ravel(), out.ravel()
    for m in range(M):
        for i in range(N):
            agent, first = m * N + i, (m * N * A + rows[i]) * H
            for h in range(0, tiled, TILE):
                _sum_tile(
                    flat_g,
                    agent * N,
                    flat_a,
                    first + h,
                    flat_b,
                    agent * H + h,
                    flat_out,
                    agent * W + h,
                    N,
                    A * H,
                )
            for h in range(tiled, H):
                total = zero
                for j in range(N):
                    x = a[m, j, rows[i], h] - b[m, i, h]
                    total += g[m, i, j] * (zero if x < zero else x)
                out[m, i, h] = total
            if W > H:
                total = zero
                for j in range(N):
                    total += g[m, i, j]
                out[m, i, H] = total


@numba.njit(cache=True)
def _dot_with_others(
    u: np.ndarray, a: np.ndarray, b: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> None:
    """Write u_i . relu(a_j - b_i) to out (M, N, N), for u (M, N, H or H + 1)."""
    zero = a.dtype.type(0)
    M, N, A, H = a.shape
    W = u.shape[2]
    tiled = H - H % TILE
    flat_u, flat_a, flat_b, flat_out = u.ravel(), a.ravel(), b.ravel(), out.ravel()
    for m in range(M):
        for i in range(N):
            agent, first = m * N + i, (m * N * A + rows[i]) * H
            _dot_tiles(
                flat_u,
                agent * W,
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
                    x = a[m, j, rows[i], h] - b[m, i, h]
                    out[m, i, j] += u[m, i, h] * (zero if x < zero else x)
                if W > H:
                    out[m, i, j] += u[m, i, H]


@numba.njit(cache=True)
def _gradients_of_others(
    g: np.ndarray,
    u: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    rows: np.ndarray,
    of_a: np.ndarray,
    of_b: np.ndarray,
) -> None:
    """The gradients of sum_ij g_ij u_i . relu(a_j - b_i), u (M, N, H or H + 1): that of a is added
    to of_a, that of b written to of_b."""
    zero = a.dtype.type(0)
    M, N, A, H = a.shape
    W = u.shape[2]
    tiled = H - H % TILE
    flat_g, flat_u, flat_a, flat_b = g.ravel(), u.ravel(), a.ravel(), b.ravel()
    flat_of_a, flat_of_b = of_a.ravel(), of_b.ravel()
    for m in range(M):
        for i in range(N):
            agent, first = m * N + i, (m * N * A + rows[i]) * H
            for h in range(0, tiled, TILE):
                _gradient_tile(
                    flat_g,
                    agent * N,
                    flat_u,
                    agent * W + h,
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
                    is_open = a[m, j, rows[i], h] > b[m, i, h]
                    x = g[m, i, j] * u[m, i, h] if is_open else zero
                    of_a[m, j, rows[i], h] += x
                    total -= x
                of_b[m, i, h] = total


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
