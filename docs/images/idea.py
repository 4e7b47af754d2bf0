"""Draws docs/images/idea.png: what the three methods generalise to.

python docs/images/idea.py
"""

from pathlib import Path

import matplotlib.pyplot as plt

OURS, OTHERS, UNSEEN, ENEMY = "#3b7dd8", "#9aa5b1", "#f2a900", "#c0392b"
PANELS = {  # title: what is trained with, what is met
    "BiDist: unseen co-players": (
        [(0, 1, OURS), (1, 1, OURS), (0, 0, OTHERS), (1, 0, OTHERS)],
        [(0, 1, OURS), (1, 1, OURS), (0, 0, UNSEEN), (1, 0, UNSEEN)],
    ),
    "MRA: unseen population sizes": (
        [(x, y, OURS) for x in (0, 1) for y in (0, 1)],
        [(x / 2, y / 2, OURS) for x in range(4) for y in range(4)],
    ),
    "MIPI: unseen team compositions": (
        [(0, 1, OURS), (0, 0, OURS), (1, 1, ENEMY), (1, 0, ENEMY)],
        [
            *[(0, y / 2, OURS if y % 2 else UNSEEN) for y in range(4)],
            *[(1, y / 2, ENEMY) for y in range(4)],
        ],
    ),
}

figure, axes = plt.subplots(1, 6, figsize=(11, 2.1), dpi=120)
for number, (title, sides) in enumerate(PANELS.items()):
    for side, places in enumerate(sides):
        ax = axes[2 * number + side]
        xs, ys, colours = zip(*places)
        xs = [x + 0.75 - (min(xs) + max(xs)) / 2 for x in xs]
        ys = [y + 0.75 - (min(ys) + max(ys)) / 2 for y in ys]
        ax.scatter(xs, ys, s=170, c=colours, edgecolors="white", linewidths=1.5)
        ax.set(xlim=(-0.6, 2.1), ylim=(-0.6, 2.1), xticks=[], yticks=[])
        ax.set_xlabel(("in training", "in evaluation")[side], fontsize=10)
        ax.set_aspect("equal")
        for spine in ax.spines.values():
            spine.set_color("#d0d5db")
    axes[2 * number].set_title(title, fontsize=11, loc="left")
figure.tight_layout(w_pad=0.6)
figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", pad_inches=0.08)
