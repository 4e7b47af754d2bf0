"""Tables over tile ids for a CNN whose input goes through a random convolution over pixels.

A convolution f_psi (3 x 3, padding 1, no bias) is linear, and so is conv1 behind it: what conv1
finds at a tile is a sum over the tile and its eight neighbours of something that depends on one
sprite. These somethings are nine tables of P + 1 rows; row P, zeros, is what lies outside of a
view. Their sums are taken once per different neighbourhood of 3 x 3 tiles. From there on it is
TileTables' work, with neighbourhoods for sprites. Letters as in tile_tensors.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.meltingpot.tile_tensors import FEW, TileTables, Windows


class RandomTileTables(TileTables):
    """The scripts' TileCNN with forward(ids, sprites, psi), computed with tables: the same
    parameters, outputs and gradients (none for psi), faster."""

    def forward(self, ids: Tensor, sprites: Tensor, psi: Tensor | None = None) -> Tensor:
        """ids (M, H, W) into sprites (P, 3, 8, 8), psi (3, 3, 3, 3), None: no f_psi -> (M, 64)."""
        if psi is None:
            return super().forward(ids, sprites)
        ids = F.pad(ids.long(), self.padding)
        outside = len(sprites)
        padded = F.pad(ids, (1, 1, 1, 1), value=outside)
        if len(ids) <= FEW:
            around = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)  # (M, H, W, 9)
            x = self._neighbourhoods(around.flatten(0, 2), sprites, psi)
            return self.from_images(x.view(*ids.shape, -1))
        # In milliseconds of one thread, there and back, 1280 views of coins by random play (of
        # chicken): this 43 (13), without f_psi 11 (2). With torch's operations alone 78 (13), the
        # sums once per neighbourhood and then conv2 on images half as much again, nine looked-up
        # images and conv2 three times as much.
        windows = Windows(padded, 3)
        x = self._neighbourhoods(windows.ids, sprites, psi)
        return self.from_tables(x, windows.window[windows.index].view_as(ids))

    def _neighbourhoods(self, around: Tensor, sprites: Tensor, psi: Tensor) -> Tensor:
        """conv1 at tiles with these neighbours (X, 9), row by row -> (X, 16)."""
        # A sprite alone among black ones; conv1 sees it from its own tile and the eight around.
        alone = F.conv2d(F.pad(sprites, (8, 8, 8, 8)), psi.to(sprites), padding=1)  # (P, 3, 24, 24)
        seen = F.conv2d(alone, self.conv1.weight, stride=8)  # (P, 16, 3, 3)
        # Who looks from below has the sprite above: both axes turn round.
        tables = seen.flip(2, 3).flatten(2).permute(2, 0, 1)  # (9, P, 16)
        tables = F.pad(tables, (0, 0, 0, 1))  # (9, P + 1, 16)
        rows = around + tables.shape[1] * torch.arange(9, device=around.device)
        sums = F.embedding_bag(rows, tables.flatten(0, 1), mode="sum")
        return F.relu(sums + self.conv1.bias)

    def _agrees_with(self, cnn: nn.Module, **options: Tensor) -> bool:
        psi = torch.linspace(-1, 1, 81).view(3, 3, 3, 3)
        return super()._agrees_with(cnn) and super()._agrees_with(cnn, psi=psi)
