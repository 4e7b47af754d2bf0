"""Pictures and films of battles, made from Snapshots (envs/smac/combat.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from envs import films
from envs.smac.combat import (
    BANELING,
    BEAM_HALF,
    COLOSSUS,
    ENGAGE,
    FIRST_TARGET,
    HEALTH,
    HYDRALISK,
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
    ZERGLING,
    Snapshot,
)

WINDOW = 0.75 * MAP  # side of the square that a picture shows, map units; larger if necessary
GROUND, GRID = "#ffffff", "#ececec"
ALLY, ENEMY = "#1f77b4", "#d62728"
DEAD, OUTLINE = "#bebebe", "#1e1e1e"
SHOT, BEAM = "#787878", "#fa9628"
FULL, SHIELDED = "#3ca03c", "#5a96f0"  # bars of hit points and shields
EMPTY = "#e1e1e1"
CORNERS = {  # of the polygon that shows a unit
    COLOSSUS: 4,
    STALKER: 3,
    ZEALOT: 4,
    MARAUDER: 6,
    MARINE: 20,
    MEDIVAC: 20,
    BANELING: 8,
    HYDRALISK: 5,
    ZERGLING: 3,
}
TURN = {  # angle of the first corner, radians; 0 for others
    COLOSSUS: 0.0,
    STALKER: -math.pi / 2,
    ZEALOT: math.pi / 4,
    HYDRALISK: -math.pi / 2,
    ZERGLING: math.pi / 2,
}
Point = tuple[float, float]  # pixels


def draw(
    snap: Snapshot, b: int, units: Any = None, actions: Any = None, size: int = 480
) -> np.ndarray:
    """A picture (size, size, 3) uint8 of battle b of a Snapshot: allies blue, enemies red; Stalkers
    triangles, Zealots squares, Colossi diamonds, Marines discs, Marauders hexagons, Medivacs discs
    with a cross, Zerglings triangles on a corner, Hydralisks pentagons, Banelings octagons; bars
    for hit points (green) and shields (blue); crosses where units died.

    units (A+E,) UNIT: the simulator's units; attacks, missiles and beams are drawn, too.
    actions (A,): the agents' actions; dotted lines show their targets."""
    from PIL import Image, ImageDraw

    fine = 2 * size  # drawn at twice the size, for smooth edges
    image = Image.new("RGB", (fine, fine), GROUND)
    types = np.asarray(snap.type[b])
    living = np.asarray(snap.alive[b])
    present = np.flatnonzero(types != NOBODY).tolist()
    canvas = Canvas(ImageDraw.Draw(image), fine, find_window(snap, b))
    canvas.draw_grid()
    # Drawing order: the dead, living ground units, living Medivacs on top.
    for i in sorted(present, key=lambda i: (living[i], types[i] == MEDIVAC)):
        canvas.draw_unit(snap, b, i)
    if actions is not None:
        slot_of = {int(snap.tag[b][i]): i for i in present}
        for i in present:
            if i < SIDE and living[i]:
                j = slot_of.get(int(actions[i]) - FIRST_TARGET)
                if j is not None and living[j]:
                    canvas.draw_choice(snap, b, i, j)
    if units is not None:
        for i in present:
            canvas.draw_shots(units, i)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def find_window(snap: Snapshot, b: int) -> float:
    """Side of the square to show, map units: WINDOW, or more if a living unit is outside."""
    alive = np.asarray(snap.alive[b])
    out = 0.0
    for x in (snap.x[b], snap.y[b]):
        from_middle = np.abs(np.asarray(x, float) - MAP / 2)
        out = max(out, *(from_middle[alive] + 1.5), 0.0)  # 0: all may have died at once
    return max(WINDOW, min(2 * out, MAP))


class Canvas:
    """A square picture of the middle of the map; converts map units to pixels."""

    def __init__(self, brush: Any, pixels: int, window: float):
        """pixels: side of the picture; window: side of the shown square in map units."""
        self.brush = brush
        self.scale = pixels / window  # pixels per map unit
        self.margin = (MAP - window) / 2

    def place(self, x: float, y: float) -> Point:
        """The pixel of a place on the map. y points up on the map, down in the picture."""
        left = float(x) - self.margin
        top = MAP - self.margin - float(y)
        return left * self.scale, top * self.scale

    def line(self, a: Point, b: Point, colour: str, width: int) -> None:
        """Draw a line between two pixels."""
        self.brush.line([a, b], fill=colour, width=width)

    def dot(self, at: Point, radius: float, colour: str) -> None:
        """Draw a disc around a pixel; the radius is in pixels."""
        x, y = at
        box = [x - radius, y - radius, x + radius, y + radius]
        self.brush.ellipse(box, fill=colour)

    def draw_grid(self) -> None:
        """Draw lines two map units apart."""
        for k in range(0, int(MAP) + 1, 2):
            self.line(self.place(k, 0), self.place(k, MAP), GRID, width=2)
            self.line(self.place(0, k), self.place(MAP, k), GRID, width=2)

    def draw_unit(self, snap: Snapshot, b: int, i: int) -> None:
        """Draw unit i of battle b with its bars, or a cross if it is dead."""
        kind = int(snap.type[b][i])
        x, y = self.place(snap.x[b][i], snap.y[b][i])
        if not snap.alive[b][i]:
            r = 0.25 * self.scale
            self.line((x - r, y - r), (x + r, y + r), DEAD, width=4)
            self.line((x - r, y + r), (x + r, y - r), DEAD, width=4)
            return
        r = RADIUS[kind] * self.scale
        points = []
        for k in range(CORNERS[kind]):
            angle = TURN.get(kind, 0.0) + 2 * math.pi * k / CORNERS[kind]
            points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
        colour = ALLY if i < SIDE else ENEMY
        self.brush.polygon(points, fill=colour, outline=OUTLINE)
        if kind == MEDIVAC:
            width = int(r / 3)
            self.line((x - r / 2, y), (x + r / 2, y), GROUND, width)
            self.line((x, y - r / 2), (x, y + r / 2), GROUND, width)
        health = snap.health[b][i] / HEALTH[kind]
        self.draw_bar(x, y - r - 10, health, FULL)
        if SHIELD[kind]:
            shield = snap.shield[b][i] / SHIELD[kind]
            self.draw_bar(x, y - r - 20, shield, SHIELDED)

    def draw_bar(self, x: float, top: float, share: float, colour: str) -> None:
        """Draw a bar, one map unit long and centred at x, filled up to `share` (0 to 1)."""
        left = x - self.scale / 2
        right = left + self.scale
        filled = left + self.scale * float(share)
        self.brush.rectangle([left, top, right, top + 7], fill=EMPTY)
        self.brush.rectangle([left, top, filled, top + 7], fill=colour)

    def draw_choice(self, snap: Snapshot, b: int, i: int, j: int) -> None:
        """Draw a dotted line from unit i to unit j of battle b."""
        ax, ay = self.place(snap.x[b][i], snap.y[b][i])
        bx, by = self.place(snap.x[b][j], snap.y[b][j])
        n = int(math.dist((ax, ay), (bx, by)) / 16)
        for k in range(1, n):
            at = ax + (bx - ax) * k / n, ay + (by - ay) * k / n
            self.dot(at, 2, ALLY)

    def draw_shots(self, units: Any, i: int) -> None:
        """Draw what unit i does: its missile as a dot, its beam as a bar across the target, other
        attacks and healing as lines."""
        me = units[i]
        here = self.place(me["x"], me["y"])
        if me["missile_at"] != NOBODY:
            at = self.place(me["missile_x"], me["missile_y"])
            self.dot(at, 7, ALLY if i < SIDE else ENEMY)
        if me["beam_age"] != NEVER:
            x, y = me["beam_x"], me["beam_y"]
            dx = BEAM_HALF * me["beam_dx"]
            dy = BEAM_HALF * me["beam_dy"]
            first = self.place(x - dx, y - dy)
            last = self.place(x + dx, y + dy)
            self.line(first, last, BEAM, width=8)
            self.line(here, self.place(x, y), SHOT, width=1)
        if not me["alive"] or me["order"] != ENGAGE or me["target"] == NOBODY:
            return
        heals = me["type"] == MEDIVAC
        attacks = me["winding"] != NEVER or me["backswing"] > 0.0
        if heals or attacks:
            target = units[me["target"]]
            there = self.place(target["x"], target["y"])
            self.line(here, there, FULL if heals else SHOT, width=3)


def film(battles: Any, policy: Callable[[Any], Any], path: Path, fps: int = 6) -> None:
    """Play an episode of the first battle and write it to an MP4 file, one picture per step. fps:
    pictures per second. Resets the battles; makes the file's folder."""
    battles.reset()
    with films.writing(path, fps) as writer:
        writer.append_data(draw(battles.snapshot, 0))
        while True:
            actions = policy(battles)
            step = battles.step(actions)
            if step.terminated[0] or step.truncated[0]:
                break
            units = getattr(battles, "units", None)
            frame = draw(
                step.final,
                0,
                units=None if units is None else units[0],
                actions=np.asarray(actions)[0],
            )
            writer.append_data(frame)
        for _ in range(fps):  # a last second, without shots: `units` may be of a new episode
            writer.append_data(draw(step.final, 0))
