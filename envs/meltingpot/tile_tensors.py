"""Tile ids in torch: the palette as a tensor, and a CNN on tile ids that uses look-up tables.

A Melting Pot view has few different sprites, and at each position few different windows of 4 x 4
tiles. A layer whose output depends only on a window, or on a window and its position, is therefore
computed once per different input and then looked up. This is exact and takes an order of magnitude
less work than computing it at every position of every image. On a CPU tile_kernels.py does this,
elsewhere the torch operations below. Letters: M images, H W rows and columns of tiles, P sprites,
K = size * size tiles per window, Q positions, U different windows, D different (position, window)
pairs, C channels, O outputs of the linear layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.meltingpot.tile_kernels import conv2_and_linear
from envs.meltingpot.tiles import WorldError


def ids_on(device: torch.device, ids: np.ndarray) -> Tensor:
    """Tile ids (...) as a tensor: uint16 on a CPU, int32 on a GPU (CUDA cannot index uint16)."""
    if device.type == "cpu":
        return torch.from_numpy(ids)
    ids = torch.from_numpy(ids.astype(np.int32))
    return ids.pin_memory().to(device, non_blocking=True)  # the copy runs in the background


class Sprites:
    """The palette of `envs` as a float32 tensor; sprites() is (P, 3, 8, 8) in [0, 1], and includes
    the sprites that were appended since the last call."""

    def __init__(self, envs: Any, device: torch.device):
        self.palette, self.device = envs.palette, device
        self.tensor = torch.zeros(0)

    def __call__(self) -> Tensor:
        if len(self.tensor) < len(self.palette):
            pixels = torch.from_numpy(self.palette.pixels()).to(self.device)
            self.tensor = pixels.permute(0, 3, 1, 2).float() / 255
        return self.tensor


FEW = 64  # images; up to so many torch computes all windows faster than it finds different ones


class TileTables(nn.Module):
    """A fast form of the scripts' TileCNN `cnn`: it shares the parameters of cnn, and forward(ids,
    sprites) has the same outputs and gradients.

    It computes conv1, conv2 and linear, each with a ReLU, and nothing else. It raises WorldError if
    `cnn` computes anything different: a changed TileCNN must not be replaced by this form unseen.
    """

    def __init__(self, cnn: nn.Module):
        super().__init__()
        self.conv1 = cnn.conv1  # one output per sprite: 8 x 8 pixels, stride 8
        self.conv2 = cnn.conv2  # one output per window of size x size tiles, stride 1
        self.linear = cnn.linear  # input: conv2's outputs, position by position
        self.grid, self.padding = cnn.grid, cnn.padding
        if not self._agrees_with(cnn):
            raise WorldError("TileCNN is not what tables can compute: run it with --plain.")

    def forward(self, ids: Tensor, sprites: Tensor) -> Tensor:
        """ids (M, H, W) int, sprites (P, 3, 8, 8) in [0, 1] -> features (M, 64)."""
        ids = F.pad(ids.long(), self.padding)
        x = F.relu(self.conv1(sprites)).flatten(1)  # (P, 16), one row per sprite
        if len(ids) <= FEW and not self.use_kernels(x, ids):
            return self.from_images(x[ids])
        return self.from_tables(x, ids)

    def use_kernels(self, x: Tensor, ids: Tensor) -> bool:
        """True if tile_kernels.py is the faster way for x (P, 16) and ids (M, H, W): on a CPU, if
        there are at most as many sprites as windows."""
        images, rows, columns = ids.shape
        edge = self.conv2.kernel_size[0] - 1
        windows = images * (rows - edge) * (columns - edge)
        return ids.device.type == "cpu" and len(x) <= windows

    def from_images(self, x: Tensor) -> Tensor:
        """conv2 and linear as plain layers; x (M, H, W, 16): conv1's outputs -> (M, 64)."""
        x = x.permute(0, 3, 1, 2)  # (M, 16, H, W)
        x = F.relu(self.conv2(x)).flatten(2)
        x = x.transpose(1, 2).flatten(1)  # (M, Q * C), position by position
        return F.relu(self.linear(x))

    def from_tables(self, x: Tensor, ids: Tensor) -> Tensor:
        """conv2 and linear with tables; ids (M, H, W) int64: rows of x (., 16) -> (M, 64)."""
        if self.use_kernels(x, ids):
            return conv2_and_linear(x, ids, self.conv2, self.linear)
        windows = Windows(ids, self.conv2.kernel_size[0])
        x = x.index_select(0, windows.ids.flatten()).view(len(windows.ids), -1)
        kernel = self.conv2.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.relu(F.linear(x, kernel, self.conv2.bias))  # (U, 32), one row per window
        x = windows.linear(x, self.linear.weight)  # (D, 64), one row per pair
        return F.relu(windows.sum(x) + self.linear.bias)

    @torch.no_grad()
    def _agrees_with(self, cnn: nn.Module, **options: Tensor) -> bool:
        """True if this module and cnn agree on random images; options: more inputs of forward()."""
        layers = {"conv1", "conv2", "linear"}
        own = [name for name, _ in (*cnn.named_parameters(), *cnn.named_buffers())]
        if layers != dict(cnn.named_children()).keys() or layers != {x.split(".")[0] for x in own}:
            return False  # a parameter of its own may make no difference yet
        rng = torch.Generator().manual_seed(0)
        sprites = torch.rand(9, *self.conv1.weight.shape[1:], generator=rng)
        ids = torch.randint(0, 9, (FEW + 3, *self.grid), generator=rng)
        expected = cnn(ids, sprites, **options)
        found = [self(ids, sprites, **options)[:3], self(ids[:3], sprites, **options)]
        found = torch.stack(found)
        error = (found - expected[:3]).abs().max()
        return bool(error <= 1e-3 * expected.abs().max())


class Windows:
    """The different (position, window) pairs among the size x size windows of ids (M, H, W) int64.
    Windows are compared by a 64-bit hash: two of 10,000 collide with a probability of 3e-12."""

    def __init__(self, ids: Tensor, size: int):
        rows, columns = ids.shape[1] - size + 1, ids.shape[2] - size + 1
        self.images, self.positions = len(ids), rows * columns
        factors = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size * size) | 1
        code = torch.zeros_like(ids[:, :rows, :columns])
        for k, factor in enumerate(factors.tolist()):
            i, j = divmod(k, size)
            # int64 sums overflow and wrap around, which a hash allows.
            code.add_(ids[:, i : i + rows, j : j + columns], alpha=factor)
        # In each position's row of (Q, M), sorting makes equal windows neighbours.
        code, order = code.flatten(1).t().contiguous().sort(1)
        first = torch.ones_like(code, dtype=torch.bool)
        first[:, 1:] = code[:, 1:] != code[:, :-1]
        number = first.flatten().cumsum(0).view_as(code) - 1  # (Q, M) pair of each window
        self.index = torch.empty_like(number).scatter_(1, order, number).t()  # (M, Q) pair
        self.image = order.flatten()  # (M * Q,) the images that show a pair, pair after pair
        self.offsets = first.flatten().nonzero()[:, 0]  # (D,) where the images of a pair begin
        self.position = self.offsets // self.images  # (D,) position of a pair, ascending
        codes, self.window = torch.unique(code.flatten()[self.offsets], return_inverse=True)  # (D,)
        pairs = torch.arange(len(self.window), device=ids.device)
        some = torch.empty_like(codes).scatter_(0, self.window, pairs)  # (U,) a pair per window
        image = self.image[self.offsets[some]]
        i, j = self.position[some] // columns, self.position[some] % columns
        self.ids = ids.unfold(1, size, 1).unfold(2, size, 1)[image, i, j].flatten(1)  # (U, K)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """What each pair adds to a linear layer's output: x (U, C) of the windows, weight
        (O, Q * C), position by position -> (D, O)."""
        x = x.index_select(0, self.window)
        edges = torch.arange(self.positions + 1, device=x.device)
        begins = torch.searchsorted(self.position, edges)  # (Q + 1,) first pair of each position; D
        slot = torch.arange(len(x), device=x.device) - begins[self.position]
        padded = x.new_zeros(self.positions, int(begins.diff().max()), x.shape[1])
        padded = padded.index_put((self.position, slot), x)
        blocks = weight.view(len(weight), self.positions, -1).permute(1, 2, 0)  # (Q, C, O)
        return torch.bmm(padded, blocks.to(x.dtype))[self.position, slot]

    def sum(self, x: Tensor) -> Tensor:
        """Sum a value per pair over all positions of each image: x (D, O) -> (M, O)."""
        return _SumOverPositions.apply(x, self.index, self.image, self.offsets)


class _SumOverPositions(torch.autograd.Function):
    """forward sums over the Q pairs of each image; backward sums over the images that show a pair.
    Both are an embedding bag."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, image: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(image, offsets)
        return F.embedding_bag(index, x, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        image, offsets = ctx.saved_tensors
        return F.embedding_bag(image, gradient.contiguous(), offsets, mode="sum"), None, None, None
