"""pyplot without windows, and small PNGs: for the commands in experiments/ that draw figures.
Launching a study needs neither, and no matplotlib.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import harness

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save_figure(figure: Any, path: Path) -> None:
    """Save a PNG with at most 256 colours, a third of the size of a full-colour one."""
    box = io.BytesIO()
    figure.savefig(box, dpi=90)
    plt.close(figure)
    image = Image.open(box).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "png", optimize=True)
    harness.write(path, small.getvalue())
