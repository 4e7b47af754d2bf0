"""Find the names of the sprites that a tile of 8 x 8 pixels shows, from a substrate's settings.

A substrate's settings define every sprite by a text and a palette, and by the layer on which it is
drawn. `read_sprites` converts them to RGBA as the engine does; `SpriteNames.look` finds the sprites
that lie on a tile. This file contains no colours. tests/worlds/test_scenarios.py compares the
results with the engine's own LAYER observation.

A half-transparent sprite shows what lies below it, so it looks different everywhere. The settings'
map says which sprites can lie on one cell: `overlaid` draws all combinations, and each drawing is
one more appearance of the sprites in it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from envs.meltingpot.tiles import SPRITE

# The order in which the engine draws (base_simulation.lua); a substrate's own layers come last.
LAYERS = ("logic", "alternateLogic", "background", "lowerPhysical", "upperPhysical", "overlay")
LAYERS += ("superOverlay",)
# Territory's topmost layers: small drawings (brushes, cracks) that cover only a part of a tile.
TOPMOST = ("directionIndicatorLayer", "superDirectionIndicatorLayer")
LEAST = 4  # visible pixels that a sprite needs to be found; fewer can agree by chance


class Sprite(NamedTuple):
    """A sprite in one of its orientations, by name."""

    name: str
    layer: str  # where it is drawn; objects block others on the same layer
    facing: int  # quarter turns clockwise from up, as drawn
    rgba: np.ndarray  # (8, 8, 4) uint8


class Seen(NamedTuple):
    """A sprite that was found on a tile; the fields are those of Sprite."""

    name: str
    layer: str
    facing: int


def components(game_object: Any, *names: str) -> Iterator[Any]:
    """The kwargs of all components of a game object whose names are among `names`."""
    for component in game_object["components"]:
        if component["component"] in names:
            yield component.get("kwargs", {})


def draw(text: str, palette: Any) -> np.ndarray:
    """Text and palette {char: (r, g, b[, a])} -> (8, 8, 4) uint8; larger art is averaged."""
    lines = [line for line in text.split("\n") if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    lines = [line.rstrip()[indent:] for line in lines]
    rgba = np.array([[(*palette[char], 255)[:4] for char in line] for line in lines], np.uint8)
    height, width = (size // SPRITE for size in rgba.shape[:2])
    blocks = rgba.reshape(SPRITE, height, SPRITE, width, 4).astype(np.int64)
    return (blocks.sum((1, 3)) // (height * width)).astype(np.uint8)


def read_sprites(settings: Any) -> list[Sprite]:
    """All Sprites of a substrate's settings, with avatars and overlays, each orientation once."""
    simulation = settings["simulation"]
    objects = [*simulation.get("prefabs", {}).values(), *simulation["gameObjects"]]
    sprites: dict[tuple, Sprite] = {}

    def add(name: str, layer: str, images: list[np.ndarray]) -> None:
        for facing, rgba in enumerate(images):
            key = (name, rgba.tobytes())
            sprites.setdefault(key, Sprite(name, layer, facing, np.ascontiguousarray(rgba)))

    for game_object in objects:
        layers = {
            state["sprite"]: state.get("layer", "")
            for kwargs in components(game_object, "StateManager")
            for state in kwargs["stateConfigs"]
            if state.get("sprite")
        }
        body = next(iter(layers.values()), "")
        for kwargs in components(game_object, "Appearance", "AdditionalSprites"):
            own = {key.removeprefix("custom").lower(): value for key, value in kwargs.items()}
            names, mode = own.get("spritenames", ()), own.get("rendermode", "colored_square")
            if mode == "ascii_shape":
                fixed = own.get("norotates") or [False] * len(names)
                every = map(turned, own["spriteshapes"], own["palettes"], fixed)
            elif mode == "colored_square":
                every = [
                    [np.full((SPRITE, SPRITE, 4), (*color, 255)[:4], np.uint8)]
                    for color in own.get("spritergbcolors", ())
                ]
                # An opaque square looks like a beam, so it does not identify anything.
                every = [[] if (images[0][..., 3] == 255).all() else images for images in every]
            else:
                continue
            for name, images in zip(names, every):
                add(name, layers.get(name, body), images)
        for kwargs in components(game_object, "Paintbrush"):  # a beam that looks like a brush
            images = turned(kwargs["shape"], kwargs["palette"], True)
            add(f"brush{kwargs['playerIndex']}", "directionIndicatorLayer", images)
    for sprite in overlaid(settings, list(sprites.values())):
        sprites.setdefault((sprite.name, sprite.rgba.tobytes()), sprite)
    return list(sprites.values())


def turned(shape: Any, palette: Any, fixed: bool) -> list[np.ndarray]:
    """(8, 8, 4) uint8 images of a sprite's orientations, clockwise; fixed: only one."""
    if not isinstance(shape, str):  # a text for each direction
        return [draw(text, palette) for text in shape]
    image = draw(shape, palette)
    return [np.rot90(image, -turn) for turn in range(1 if fixed else 4)]


def cover(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """One sprite drawn over another, all (8, 8, 4) uint8, rounded to the nearest as in the engine.
    A pixel where neither sprite is opaque becomes fully transparent."""
    alpha = above[..., 3:].astype(np.int64)
    rgb = (above[..., :3] * alpha + below[..., :3] * (255 - alpha) + 127) // 255
    opaque = (below[..., 3:] == 255) | (alpha == 255)
    return np.concatenate([rgb, opaque * 255], 2).astype(np.uint8)


def overlaid(settings: Any, sprites: list[Sprite]) -> list[Sprite]:
    """Drawings of sprites that can lie on one cell, with half-transparent ones among them: a Sprite
    per name in each drawing, upper sprites first."""
    simulation = settings["simulation"]
    looks: dict[str, list[Sprite]] = {}
    for sprite in sprites:
        looks.setdefault(sprite.name, []).append(sprite)
    glass = {s.name for s in sprites if ((s.rgba[..., 3] > 0) & (s.rgba[..., 3] < 255)).any()}

    def states(game_object: Any) -> list[str]:
        """Names of the sprites that an object can show; "" stands for no sprite."""
        own = [
            config
            for kw in components(game_object, "StateManager")
            for config in kw["stateConfigs"]
        ]
        return sorted({state.get("sprite", "") for state in own} & {"", *looks})

    cells = [  # per kind of map cell, per object in it: names
        [states(simulation["prefabs"][name]) for name in entry["list"]]
        for entry in simulation.get("charPrefabMap", {}).values()
        if not isinstance(entry, str) and entry["type"] == "all"
    ]
    # Players, and half-transparent marks on them.
    worn = {name for one in simulation["gameObjects"] for name in states(one)} - {""}
    cells += [[[body], [mark]] for mark in sorted(worn & glass) for body in sorted(worn - glass)]
    order = {layer: height for height, layer in enumerate(LAYERS)}
    drawn: list[Sprite] = []
    for cell in cells:
        if glass.isdisjoint(itertools.chain(*cell)):
            continue
        for names in itertools.product(*cell):
            for turn in range(4):  # all sprites have one orientation: only the viewer turns
                stack = [looks[name][turn % len(looks[name])] for name in names if name]
                stack.sort(key=lambda sprite: order.get(sprite.layer, len(order)))
                if len(stack) > 1:
                    rgba = functools.reduce(cover, [sprite.rgba for sprite in stack])
                    drawn += [sprite._replace(rgba=rgba) for sprite in reversed(stack)]
    return drawn


class SpriteNames:
    """Finds which of K `sprites` lie on a tile."""

    def __init__(self, sprites: list[Sprite]):
        self.sprites = sprites
        rgba = np.stack([sprite.rgba for sprite in sprites]).astype(np.int16)  # (K, 8, 8, 4)
        self.rgb, self.opaque = rgba[..., :3], rgba[..., 3] == 255
        self.size = self.opaque.sum((1, 2))
        self.whole: dict[bytes, list[int]] = {}  # opaque ones, by their pixels
        for k in np.flatnonzero(self.size == SPRITE * SPRITE):
            self.whole.setdefault(sprites[k].rgba[..., :3].tobytes(), []).append(k)
        self.holed = np.flatnonzero((self.size < SPRITE * SPRITE) & (self.size >= LEAST))

    def look(self, tile: np.ndarray) -> list[Seen]:
        """All sprites on tile (8, 8, 3) uint8 without covered opaque pixels, largest first, then
        upper ones first; and the sprites that only sprites on the topmost layers cover."""
        hidden = np.zeros((SPRITE, SPRITE), bool)
        found = self.whole.get(tile.tobytes(), []) + self.match(tile, self.holed, hidden)
        while found and all(self.sprites[k].layer in TOPMOST for k in found):
            before, hidden = hidden, self.opaque[found].any(0) | hidden
            if (hidden == before).all():
                return []  # what lies below cannot be told
            found = self.match(tile, np.arange(len(self.size)), hidden) or found
        return list(dict.fromkeys(Seen(*self.sprites[k][:3]) for k in found))

    def match(self, tile: np.ndarray, among: np.ndarray, hidden: np.ndarray) -> list[int]:
        """Indices from `among` of sprites that agree with tile outside `hidden` (8, 8) bool."""
        visible = self.opaque[among] & ~hidden
        same = (tile == self.rgb[among]).all(-1) | ~visible
        found = among[same.all((1, 2)) & (visible.sum((1, 2)) >= LEAST)]
        return sorted(found.tolist(), key=lambda k: -self.size[k])
