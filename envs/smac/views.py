"""Pictures of battles, and films."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from envs.smac.combat import (
    BEAM_HALF,
    COLOSSUS,
    ENGAGE,
    FIRST_TARGET,
    HEALTH,
    MAP,
    MARAUDER,
    MARINE,
    MEDIVAC,
    NEVER,
    NOBODY,
    RADIUS,
    SHIELD,
    SIDE,
    STALKER,
    ZEALOT,
    Snapshot,
)

WINDOW = 0.75 * MAP  # pictures show so much of the map, around its middle; all of it if need be
COLOURS = ((31, 119, 180), (214, 39, 40))  # allies, enemies
GROUND, GRID, DEAD = (255, 255, 255), (236, 236, 236), (190, 190, 190)
SHOT, BEAM = (120, 120, 120), (250, 150, 40)
FULL, EMPTY, SHIELDED = (60, 160, 60), (225, 225, 225), (90, 150, 240)
CORNERS = {COLOSSUS: 4, STALKER: 3, ZEALOT: 4, MARAUDER: 6, MARINE: 20, MEDIVAC: 20}
TURN = {COLOSSUS: 0.0, STALKER: -math.pi / 2, ZEALOT: math.pi / 4}  # of the first corner


def draw(snap: Snapshot, b: int, units: Any = None, actions: Any = None, size: int = 480):
    """A picture (size, size, 3) uint8 of snapshot b: allies blue, enemies red; Stalkers triangles,
    Zealots squares, Colossi diamonds, Marines discs, Marauders hexagons, Medivacs discs with a
    cross; bars of hit points (green) and shields (blue); crosses where units died.

    units (A+E,): the simulator's, for shots on their way. actions (A,): dotted lines to the targets
    that agents have chosen.
    """
    from PIL import Image, ImageDraw

    fine = 2 * size  # drawn at twice the size, for smooth edges
    image = Image.new("RGB", (fine, fine), GROUND)
    brush = ImageDraw.Draw(image)
    present = np.flatnonzero(np.asarray(snap.type[b]) != NOBODY).tolist()
    x, y = (np.asarray(v[b], float) - MAP / 2 for v in (snap.x, snap.y))
    living = np.asarray(snap.alive[b])
    out = max([abs(v[i]) + 1.5 for v in (x, y) for i in present if living[i]], default=0.0)
    window = max(WINDOW, min(2 * out, MAP))
    scale = fine / window

    def place(px: float, py: float) -> tuple[float, float]:
        return (px + window / 2) * scale, (window / 2 - py) * scale

    for k in range(-int(MAP / 2), int(MAP / 2) + 1, 2):
        brush.line([*place(k, -MAP / 2), *place(k, MAP / 2)], fill=GRID, width=2)
        brush.line([*place(-MAP / 2, k), *place(MAP / 2, k)], fill=GRID, width=2)
    for i in sorted(present, key=lambda i: (living[i], snap.type[b][i] == MEDIVAC)):
        _draw_unit(brush, snap, b, i, place(x[i], y[i]), scale)
    slot_of = {int(snap.tag[b][i]): i for i in present}
    for i in present[: 0 if actions is None else None]:
        j = slot_of.get(int(actions[i]) - FIRST_TARGET) if i < SIDE and living[i] else None
        if j is not None and living[j]:
            _dots(brush, place(x[i], y[i]), place(x[j], y[j]), COLOURS[0])
    for i in present[: 0 if units is None else None]:
        _draw_shots(brush, units, i, lambda px, py: place(px - MAP / 2, py - MAP / 2), scale)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _draw_unit(brush: Any, snap: Snapshot, b: int, i: int, at: tuple, scale: float) -> None:
    kind, (px, py) = int(snap.type[b][i]), at
    if not snap.alive[b][i]:
        r = 0.25 * scale
        brush.line([px - r, py - r, px + r, py + r], fill=DEAD, width=4)
        brush.line([px - r, py + r, px + r, py - r], fill=DEAD, width=4)
        return
    r, n = RADIUS[kind] * scale, CORNERS[kind]
    corners = [TURN.get(kind, 0.0) + 2 * math.pi * k / n for k in range(n)]
    points = [(px + r * math.cos(a), py + r * math.sin(a)) for a in corners]
    brush.polygon(points, fill=COLOURS[i // SIDE], outline=(30, 30, 30))
    if kind == MEDIVAC:
        brush.line([px - r / 2, py, px + r / 2, py], fill=GROUND, width=int(r / 3))
        brush.line([px, py - r / 2, px, py + r / 2], fill=GROUND, width=int(r / 3))
    bars = [(snap.health[b][i] / HEALTH[kind], FULL)]
    if SHIELD[kind]:
        bars.append((snap.shield[b][i] / SHIELD[kind], SHIELDED))
    for row, (share, colour) in enumerate(bars):
        top, left, wide = py - r - 10 - 10 * row, px - 0.5 * scale, scale
        brush.rectangle([left, top, left + wide, top + 7], fill=EMPTY)
        brush.rectangle([left, top, left + wide * float(share), top + 7], fill=colour)


def _draw_shots(brush: Any, units: Any, i: int, place: Callable, scale: float) -> None:
    """Missiles as dots, beams as bars across their targets, other attacks and healing as lines."""
    me = units[i]
    if me["missile_at"] != NOBODY:
        px, py = place(me["missile_x"], me["missile_y"])
        brush.ellipse([px - 7, py - 7, px + 7, py + 7], fill=COLOURS[i // SIDE])
    if me["beam_age"] != NEVER:
        dx, dy = BEAM_HALF * me["beam_dx"], BEAM_HALF * me["beam_dy"]
        ends = [place(me["beam_x"] + k * dx, me["beam_y"] + k * dy) for k in (-1, 1)]
        brush.line([*ends[0], *ends[1]], fill=BEAM, width=8)
        brush.line([*place(me["x"], me["y"]), *place(me["beam_x"], me["beam_y"])], fill=SHOT)
    if me["alive"] and me["order"] == ENGAGE and me["target"] != NOBODY:
        you = units[me["target"]]
        if me["type"] == MEDIVAC or me["winding"] != NEVER or me["backswing"] > 0.0:
            colour = FULL if me["type"] == MEDIVAC else SHOT
            brush.line([*place(me["x"], me["y"]), *place(you["x"], you["y"])], fill=colour, width=3)


def _dots(brush: Any, a: tuple, b: tuple, colour: tuple) -> None:
    n = max(int(math.dist(a, b) / 16), 1)
    for k in range(1, n):
        px, py = (p + (q - p) * k / n for p, q in zip(a, b))
        brush.ellipse([px - 2, py - 2, px + 2, py + 2], fill=colour)


def film(battles: Any, policy: Callable[[Any], Any], path: Path, fps: int = 6) -> None:
    """An MP4 of an episode of the first battle, a picture a step."""
    import imageio.v2 as imageio

    battles.reset()
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=6) as writer:
        writer.append_data(draw(battles.snapshot, 0))
        while True:
            actions = policy(battles)
            step = battles.step(actions)
            over = bool(step.terminated[0] | step.truncated[0])
            units = getattr(battles, "units", None)  # of the next episode, if this is over
            units = None if units is None or over else units[0]
            frame = draw(step.final, 0, units, None if over else np.asarray(actions)[0])
            for _ in range(fps if over else 1):
                writer.append_data(frame)
            if over:
                return
