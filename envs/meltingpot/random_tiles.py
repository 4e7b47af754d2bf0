"""Look-up tables over tile ids for a CNN whose input passes a random convolution of its pixels.

The random convolution f_psi (3 x 3, padding 1, no bias) and conv1 after it are linear. conv1's
output at a tile is therefore a sum of nine terms, one for the tile and one for each neighbour. Each
term depends on one sprite: nine tables of P + 1 rows hold them; row P, zeros, is for tiles outside
the view. The sum is computed once per different 3 x 3 neighbourhood; TileTables does the rest, with
neighbourhoods in place of sprites. M images, H W tiles, P sprites, X neighbourhoods.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.meltingpot.tile_tensors import FEW, TileTables, Windows


class RandomTileTables(TileTables):
    """A fast form of the scripts' TileCNN with forward(ids, sprites, psi): the same parameters,
    outputs and gradients (but none for psi). WorldError if `cnn` computes anything different."""

    def forward(self, ids: Tensor, sprites: Tensor, psi: Tensor | None = None) -> Tensor:
        """ids (M, H, W), sprites (P, 3, 8, 8), psi (3, 3, 3, 3) or None: no f_psi -> (M, 64)."""
        if psi is None:
            return super().forward(ids, sprites)
        ids = F.pad(ids.long(), self.padding)
        outside = len(sprites)
        padded = F.pad(ids, (1, 1, 1, 1), value=outside)
        if len(ids) <= FEW:
            around = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)  # (M, H, W, 9)
            x = self._neighbourhoods(around.flatten(0, 2), sprites, psi)
            return self.from_images(x.view(*ids.shape, -1))
        # Forward and backward of 1280 views of coins (of chicken) by random play, milliseconds of
        # one thread: this code 43 (13), without f_psi 11 (2). With torch's operations only: this
        # code 78 (13), the same sums and then conv2 on images 1.5 times as long, nine looked-up
        # images and conv2 3 times as long.
        windows = Windows(padded, 3)
        x = self._neighbourhoods(windows.ids, sprites, psi)
        return self.from_tables(x, windows.window[windows.index].view_as(ids))

    def _neighbourhoods(self, around: Tensor, sprites: Tensor, psi: Tensor) -> Tensor:
        """f_psi, conv1, ReLU at tiles with neighbours `around` (X, 9), row by row -> (X, 16)."""
        # Each sprite with black neighbours; f_psi spreads it by one pixel into those neighbours.
        alone = F.conv2d(F.pad(sprites, (8, 8, 8, 8)), psi.to(sprites), padding=1)  # (P, 3, 24, 24)
        seen = F.conv2d(alone, self.conv1.weight, stride=8)  # (P, 16, 3, 3)
        # The tile below a sprite has that sprite as its upper neighbour: flip both axes.
        tables = seen.flip(2, 3).flatten(2).permute(2, 0, 1)  # (9, P, 16)
        tables = F.pad(tables, (0, 0, 0, 1))  # (9, P + 1, 16)
        rows = around + tables.shape[1] * torch.arange(9, device=around.device)
        sums = F.embedding_bag(rows, tables.flatten(0, 1), mode="sum")
        return F.relu(sums + self.conv1.bias)

    def _agrees_with(self, cnn: nn.Module, **options: Tensor) -> bool:
        psi = torch.linspace(-1, 1, 81).view(3, 3, 3, 3)
        return super()._agrees_with(cnn) and super()._agrees_with(cnn, psi=psi)
