"""Images as tile ids: what worlds hand out, and the palette that gives ids their meaning.

Melting Pot draws all its images from 8x8 sprites on an 8x8 grid. A world hands out one number per
tile instead of 192 bytes; `ids_to_images` rebuilds the pixels exactly. Dimension letters: B worlds,
N players, H W tiles, F features, P sprites.
"""

from __future__ import annotations

import dataclasses
import fcntl
from typing import NamedTuple

import numba
import numpy as np

SPRITE = 8  # pixels: a sprite is SPRITE x SPRITE x 3 bytes
WORDS = SPRITE * SPRITE * 3 // 8  # the same in 64-bit words
CAPACITY = 2**16  # ids are uint16; id 0 is the black sprite


class WorldError(RuntimeError):
    """A world cannot go on (a dead worker, too many sprites); the message is one sentence."""


class NoWorldError(WorldError):
    """What was asked for cannot be had here; the message is one sentence."""

    code = 2  # of a script that ends with it: wrong usage


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and names of a world."""

    substrate: str
    roles: tuple[str, ...]  # one per player
    is_focal: tuple[bool, ...]  # whom a scenario evaluates; everyone where there is no scenario
    actions: tuple[dict[str, int], ...]  # what each of the A discrete actions sends to the engine
    grid: tuple[int, int]  # H, W of a player's view, in tiles
    world_grid: tuple[int, int]  # H', W' of the global view, in tiles
    features: tuple[tuple[str, int], ...]  # permitted observations besides RGB: names, lengths
    num_bots: int = 0  # further players, whom the world itself plays

    @property
    def num_agents(self) -> int:
        return len(self.roles)

    @property
    def num_actions(self) -> int:
        return len(self.actions)

    @property
    def num_features(self) -> int:
        return sum(length for _, length in self.features)


class Observation(NamedTuple):
    """What all players of all worlds see."""

    tile_ids: np.ndarray  # (B, N, H, W) uint16, each player's RGB
    world_ids: np.ndarray  # (B, H', W') uint16, WORLD.RGB, the global view: for critics
    features: np.ndarray  # (B, N, F) float32, permitted observations in Spec.features' order


class Episode(NamedTuple):
    """A finished episode."""

    world: int
    length: int  # steps
    returns: np.ndarray  # (N,) undiscounted
    pick_ups: np.ndarray  # (N,) coins, resources, ores, ... collected by each player
    bot_returns: np.ndarray = np.zeros(0)  # (num_bots,)
    bot_pick_ups: np.ndarray = np.zeros(0)


class Step(NamedTuple):
    """One step of all worlds. Where a world ended, `obs` is the first of its next episode."""

    obs: Observation
    reward: np.ndarray  # (B, N) float64, each player's own
    terminated: np.ndarray  # (B,) bool, the game ended the episode
    truncated: np.ndarray  # (B,) bool, max_episode_steps did
    final: Observation | None  # where a world ended, its last observation (other rows: stale)
    episodes: list[Episode]  # those that ended in this step


class EpisodeCounter:
    """Adds up rewards, pick-ups and steps of the running episodes."""

    def __init__(self, num_envs: int, num_agents: int, num_bots: int = 0):
        self.num_agents = num_agents
        self.returns = np.zeros((num_envs, num_agents + num_bots))
        self.pick_ups = np.zeros((num_envs, num_agents + num_bots), np.int64)
        self.length = np.zeros(num_envs, np.int64)

    def add(self, reward: np.ndarray, pick_ups: np.ndarray, done: np.ndarray) -> list[Episode]:
        """Count one step: reward, pick_ups (B, N + num_bots), done (B,); returns the episodes that
        it ended."""
        self.returns += reward
        self.pick_ups += pick_ups
        self.length += 1
        ours, ended = self.num_agents, []
        for b in np.flatnonzero(done).tolist():
            returns, pick_ups = self.returns[b].copy(), self.pick_ups[b].copy()
            figures = (returns[:ours], pick_ups[:ours], returns[ours:], pick_ups[ours:])
            ended.append(Episode(b, int(self.length[b]), *figures))
        self.clear(done)
        return ended

    def clear(self, worlds: np.ndarray | slice = slice(None)) -> None:
        """Forget the running episodes of these worlds."""
        for array in (self.returns, self.pick_ups, self.length):
            array[worlds] = 0


@numba.njit(cache=True)
def _hash(image: np.ndarray, i: int, j: int) -> np.uint64:
    """A 64-bit number from the 24 words of tile (i, j); three lanes, as one chain would wait."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    a = b = c = np.uint64(0)
    for r in range(8):
        a = (a ^ image[8 * i + r, 3 * j]) * odd
        b = (b ^ image[8 * i + r, 3 * j + 1]) * odd
        c = (c ^ image[8 * i + r, 3 * j + 2]) * odd
        a ^= a >> np.uint64(29)
        b ^= b >> np.uint64(29)
        c ^= c >> np.uint64(29)
    code = ((a * odd + b) * odd + c) * odd
    return code ^ (code >> np.uint64(29))


@numba.njit(inline="always")
def _differs(image: np.ndarray, i: int, j: int, sprite: np.ndarray) -> np.uint64:
    """Zero if tile (i, j) shows this sprite."""
    bits = np.uint64(0)
    for r in range(8):
        for c in range(3):
            bits |= image[8 * i + r, 3 * j + c] ^ sprite[3 * r + c]
    return bits


@numba.njit(cache=True)
def _encode(
    image: np.ndarray,
    sprites: np.ndarray,
    slots: np.ndarray,
    hashes: np.ndarray,
    ids: np.ndarray,
    start: int,
) -> tuple[int, int]:
    """Write the ids of the tiles of image (8H, 3W words) into ids (H, W), from row `start` on.

    A tile that still shows what it showed before (ids holds the last frame) costs one comparison;
    any other is hashed, looked up and compared pixel by pixel, so a hash that collides costs time,
    never a wrong id. Returns (-1, -1), or the place of the first tile that is not in the table.
    """
    mask = np.uint64(len(slots) - 1)
    height, width = ids.shape
    for i in range(start, height):
        for j in range(width):
            if not _differs(image, i, j, sprites[ids[i, j]]):
                continue
            code = _hash(image, i, j)
            slot = code & mask
            while slots[slot] >= 0:
                known = slots[slot]
                if hashes[slot] == code and not _differs(image, i, j, sprites[known]):
                    ids[i, j] = known
                    break
                slot = (slot + np.uint64(1)) & mask
            else:
                return i, j
    return -1, -1


@numba.njit(cache=True)
def _insert(
    sprites: np.ndarray, slots: np.ndarray, hashes: np.ndarray, first: int, last: int
) -> None:
    """Enter sprites [first, last) into the hash table."""
    mask = np.uint64(len(slots) - 1)
    for number in range(first, last):
        code = _hash(sprites[number].reshape(8, 3), 0, 0)
        slot = code & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = number
        hashes[slot] = code


class Palette:
    """A growing table of sprites in shared memory, and this process's hash table over it.

    Sprites are only ever appended, under a file lock that the kernel releases if its holder dies.
    So an id keeps its meaning, and processes that meet a new sprite at once agree on its number.
    """

    def __init__(self, sprites: np.ndarray, count: np.ndarray, lock_fd: int | None = None):
        self.sprites = sprites  # (CAPACITY, 24) uint64
        self.count = count  # (1,) int64
        self.lock_fd = lock_fd  # of the shared memory; None if only this process uses the palette
        if self.count[0] == 0:
            self.count[0] = 1  # id 0 is black: all bytes zero, as the memory starts out
        self.slots = np.full(2 * CAPACITY, -1, np.int32)
        self.hashes = np.zeros(2 * CAPACITY, np.uint64)
        self.known = 0  # sprites in this process's hash table
        self._catch_up()

    @classmethod
    def private(cls) -> Palette:
        """A palette of this process alone."""
        return cls(np.zeros((CAPACITY, WORDS), np.uint64), np.zeros(1, np.int64))

    def __len__(self) -> int:
        return int(self.count[0])

    def _catch_up(self) -> None:
        last = int(self.count[0])
        _insert(self.sprites, self.slots, self.hashes, self.known, last)
        self.known = last

    def encode(self, image: np.ndarray, ids: np.ndarray) -> None:
        """Write the ids of image (8H, 8W, 3) uint8 into ids (H, W) uint16; learn new sprites."""
        words = image.reshape(len(image), -1).view(np.uint64)
        i, j = _encode(words, self.sprites, self.slots, self.hashes, ids, 0)
        while i >= 0:
            self._learn(words[8 * i : 8 * i + 8, 3 * j : 3 * j + 3].reshape(WORDS))
            i, j = _encode(words, self.sprites, self.slots, self.hashes, ids, i)

    def _learn(self, sprite: np.ndarray) -> None:
        if self.lock_fd is not None:
            fcntl.lockf(self.lock_fd, fcntl.LOCK_EX, 1)  # byte 0: others are locks, too
        try:
            fresh = self.known
            self._catch_up()  # another process may have been first
            if not (self.sprites[fresh : self.known] == sprite).all(1).any():
                if self.known == CAPACITY:
                    raise WorldError(f"More than {CAPACITY} different sprites: ids do not suffice.")
                self.sprites[self.known] = sprite
                self.count[0] = self.known + 1
                self._catch_up()
        finally:
            if self.lock_fd is not None:
                fcntl.lockf(self.lock_fd, fcntl.LOCK_UN, 1)

    def pixels(self) -> np.ndarray:
        """All sprites so far, (P, 8, 8, 3) uint8; row number = id."""
        last = int(self.count[0])
        return self.sprites[:last].copy().view(np.uint8).reshape(last, SPRITE, SPRITE, 3)

    def load(self, pixels: np.ndarray) -> None:
        """Start from saved pixels(); ValueError if sprites here are numbered otherwise already."""
        words = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint64)
        both = min(len(words), int(self.count[0]))
        if (words[:both] != self.sprites[:both]).any():
            raise ValueError("The saved palette contradicts sprites that are already numbered.")
        if len(words) > self.count[0]:
            self.sprites[: len(words)] = words
            self.count[0] = len(words)
            self._catch_up()


def ids_to_images(ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """ids (..., H, W) and palette (P, 8, 8, 3) -> the exact images (..., 8H, 8W, 3) uint8."""
    tiles = np.moveaxis(pixels[ids], -3, -4)  # (..., H, 8, W, 8, 3)
    *batch, height, _, width, _, _ = tiles.shape
    return tiles.reshape(*batch, height * SPRITE, width * SPRITE, 3)
