"""conv2 and linear on tile ids, compiled for a CPU: a fifth of the time of torch's operations.

conv2's output at a window is a sum over its K tiles. Each term depends only on the tile's sprite
and on its place in the window, so all terms form a table (P, K, C), and a window costs K additions
of rows instead of a matrix product. The linear layer has its own weights at every position, so each
different (position, window) pair is computed once. Letters: M images, H W rows and columns of
tiles, P sprites, Q positions, D pairs, C channels of conv2, O outputs of the linear layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # rows per matrix product; for more rows BLAS would start its own threads


class Pairs(NamedTuple):
    """The different (position, window) pairs of a batch of images, sorted by position."""

    windows: np.ndarray  # (D, K) int64, tile ids of each pair's window
    begins: np.ndarray  # (Q + 1,) int64, first pair of each position; the last entry is D
    index: np.ndarray  # (M, Q) int64, the pair that an image shows at a position
    image: np.ndarray  # (M * Q,) int64, the images that show a pair, pair after pair
    offsets: np.ndarray  # (D,) int64, index in `image` where the images of a pair begin


def conv2_and_linear(x: Tensor, ids: Tensor, conv2: nn.Conv2d, linear: nn.Linear) -> Tensor:
    """conv2 and linear, each with its ReLU, on a CPU: x (P, C'), the output of conv1 and its ReLU
    per sprite; ids (M, H, W) int64, rows of x -> (M, O). Gradients flow to x and all weights."""
    size = conv2.kernel_size[0]
    weights = conv2.weight.permute(1, 2, 3, 0).flatten(1)  # (C', K * C)
    table = (x.to(weights.dtype) @ weights).view(len(x), size * size, -1)
    by_position = linear.weight.view(len(linear.weight), -1, table.shape[2])  # (O, Q, C)
    by_position = by_position.transpose(0, 1).contiguous()  # (Q, O, C)
    x = _Layers.apply(table, conv2.bias, by_position, ids, size)
    return F.relu(x + linear.bias)


class _Layers(torch.autograd.Function):
    """conv2 from its table (P, K, C), ReLU, and linear (Q, O, C) without its bias -> (M, O)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, table: Tensor, bias: Tensor, weight: Tensor, ids: Tensor, size: int
    ) -> Tensor:
        pairs = Pairs(*find_pairs(ids.numpy(), size))
        x = torch.empty(len(pairs.windows), table.shape[2], dtype=table.dtype)  # (D, C)
        _sum_tiles(table.numpy(), pairs.windows, bias.numpy(), x.numpy())
        x.relu_()
        y = torch.empty(len(x), weight.shape[1], dtype=table.dtype)  # (D, O)
        _multiply(x.numpy(), weight.numpy(), pairs.begins, y.numpy())
        ctx.save_for_backward(x, weight)
        ctx.pairs, ctx.num_sprites = pairs, len(table)
        return F.embedding_bag(torch.from_numpy(pairs.index), y, mode="sum")

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        pairs = ctx.pairs
        image, offsets = torch.from_numpy(pairs.image), torch.from_numpy(pairs.offsets)
        y_grad = F.embedding_bag(image, gradient.contiguous(), offsets, mode="sum")
        x_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
        _multiply_backward(
            y_grad.numpy(),
            x.numpy(),
            weight.numpy(),
            pairs.begins,
            x_grad.numpy(),
            weight_grad.numpy(),
        )
        x_grad.mul_(x > 0)
        table_grad = x.new_zeros(ctx.num_sprites, pairs.windows.shape[1], x.shape[1])
        _sum_tiles_backward(x_grad.numpy(), pairs.windows, table_grad.numpy())
        return table_grad, x_grad.sum(0), weight_grad, None, None


@numba.njit(cache=True)
def _hash_windows(ids: np.ndarray, size: int) -> np.ndarray:
    """64-bit hash of each size x size window of ids (M, H, W) -> (Q, M) uint64."""
    images, height, width = ids.shape
    rows, columns = height - size + 1, width - size + 1
    a, b = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
    codes = np.empty((rows * columns, images), np.uint64)
    lines = np.empty((height, columns), np.uint64)  # hashes of 1 x size windows
    for m in range(images):
        for i in range(height):
            for j in range(columns):
                code = np.uint64(0)
                for k in range(size):
                    code = code * a + np.uint64(ids[m, i, j + k])
                lines[i, j] = code ^ (code >> np.uint64(29))
        for i in range(rows):
            for j in range(columns):
                code = np.uint64(0)
                for k in range(size):
                    code = code * b + lines[i + k, j]
                codes[i * columns + j, m] = code ^ (code >> np.uint64(32))
    return codes


@numba.njit(cache=True)
def find_pairs(ids: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """The arrays of Pairs for the size x size windows of ids (M, H, W) int64. Windows are compared
    by a 64-bit hash: two of 10,000 different ones collide with a probability of 3e-12."""
    codes = _hash_windows(ids, size)
    positions, images = codes.shape
    columns = ids.shape[2] - size + 1
    slots = 2
    while slots < 2 * images:
        slots *= 2
    mask = np.uint64(slots - 1)
    keys = np.empty(slots, np.uint64)
    numbers = np.empty(slots, np.int64)
    begins = np.empty(positions + 1, np.int64)
    index = np.empty((images, positions), np.int64)
    example = np.empty(images * positions, np.int64)  # (D,) an image that shows the pair
    counts = np.zeros(images * positions, np.int64)
    found = 0
    for q in range(positions):
        begins[q] = found
        numbers[:] = -1
        for m in range(images):
            code = codes[q, m]
            slot = code & mask
            while numbers[slot] >= 0 and keys[slot] != code:
                slot = (slot + np.uint64(1)) & mask
            if numbers[slot] < 0:
                keys[slot] = code
                numbers[slot] = found
                example[found] = m
                found += 1
            index[m, q] = numbers[slot]
            counts[numbers[slot]] += 1
    begins[positions] = found

    windows = np.empty((found, size * size), np.int64)
    for q in range(positions):
        i, j = q // columns, q % columns
        for d in range(begins[q], begins[q + 1]):
            for k in range(size * size):
                windows[d, k] = ids[example[d], i + k // size, j + k % size]

    offsets = np.cumsum(counts[:found]) - counts[:found]
    free = offsets.copy()
    image = np.empty(images * positions, np.int64)
    for m in range(images):
        for q in range(positions):
            d = index[m, q]
            image[free[d]] = m
            free[d] += 1
    return windows, begins, index, image, offsets


@numba.njit(cache=True)
def _sum_tiles(table: np.ndarray, windows: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """Write to out (D, C): bias (C,) plus the sum of table[windows[d, k], k] over k; table is
    (P, K, C), windows (D, K)."""
    for d in range(len(windows)):
        for c in range(len(bias)):
            out[d, c] = bias[c]
        for k in range(windows.shape[1]):
            p = windows[d, k]
            for c in range(len(bias)):
                out[d, c] += table[p, k, c]


@numba.njit(cache=True)
def _sum_tiles_backward(grad: np.ndarray, windows: np.ndarray, out: np.ndarray) -> None:
    """Add the table's gradient to out (P, K, C); grad (D, C): gradient of _sum_tiles' output."""
    for d in range(len(windows)):
        for k in range(windows.shape[1]):
            p = windows[d, k]
            for c in range(grad.shape[1]):
                out[p, k, c] += grad[d, c]


@numba.njit(cache=True)
def _multiply(x: np.ndarray, weight: np.ndarray, begins: np.ndarray, out: np.ndarray) -> None:
    """Write to out (D, O): x (D, C) times weight (Q, O, C) at the position of each row."""
    for q in range(len(weight)):
        w = weight[q].T  # (C, O)
        for first in range(begins[q], begins[q + 1], BLOCK):
            rows = slice(first, min(first + BLOCK, begins[q + 1]))
            np.dot(x[rows], w, out[rows])


@numba.njit(cache=True)
def _multiply_backward(
    grad: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    begins: np.ndarray,
    x_grad: np.ndarray,
    weight_grad: np.ndarray,
) -> None:
    """Write x_grad (D, C) and weight_grad (Q, O, C); grad (D, O): that of _multiply's output."""
    weight_grad[:] = 0
    for q in range(len(weight)):
        for first in range(begins[q], begins[q + 1], BLOCK):
            rows = slice(first, min(first + BLOCK, begins[q + 1]))
            np.dot(grad[rows], weight[q], x_grad[rows])
            weight_grad[q] += np.dot(grad[rows].T, x[rows])
