"""Images as tile ids: the data that worlds return, and the palette that maps ids to sprites.

Melting Pot draws every image as a grid of sprites of 8 x 8 pixels. A world therefore returns one
uint16 id per tile instead of 192 bytes, and `ids_to_images` rebuilds the pixels exactly. Dimension
letters: B worlds, N players, H W rows and columns of tiles, F features, P sprites.
"""

from __future__ import annotations

import dataclasses
import fcntl
from typing import NamedTuple

import numba
import numpy as np

SPRITE = 8  # pixels per side: a sprite is SPRITE x SPRITE x 3 bytes
WORDS = SPRITE * SPRITE * 3 // 8  # 64-bit words per sprite: 24
CAPACITY = 2**16  # most sprites that a palette can hold: ids are uint16; id 0 is black


class WorldError(RuntimeError):
    """The worlds cannot continue, e.g. because a worker died; the message is one sentence."""


class NoWorldError(WorldError):
    """The requested world, scenario or bot is not available; the message is one sentence."""

    code = 2  # exit code of a script that this error ends: wrong command line


@dataclasses.dataclass(frozen=True)
class Spec:
    """What does not change in a world: its players, its actions and the sizes of observations."""

    substrate: str
    roles: tuple[str, ...]  # (N,) the role of each player
    is_focal: tuple[bool, ...]  # (N,) players that a scenario evaluates; all without a scenario
    actions: tuple[dict[str, int], ...]  # (A,) values that a discrete action sends to the engine
    grid: tuple[int, int]  # H, W of a player's view, in tiles
    world_grid: tuple[int, int]  # H', W' of the global view, in tiles
    features: tuple[tuple[str, int], ...]  # name, length of permitted observations, no images
    num_bots: int = 0  # players besides these N whose actions the world itself chooses

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
    """The observations of all players in all worlds at one time step."""

    tile_ids: np.ndarray  # (B, N, H, W) uint16, each player's own view (RGB)
    world_ids: np.ndarray  # (B, H', W') uint16, the global view (WORLD.RGB), for critics and films
    features: np.ndarray  # (B, N, F) float32, columns in the order of Spec.features


class Episode(NamedTuple):
    """Totals of one finished episode."""

    world: int  # its index, 0 to B - 1
    length: int  # steps
    returns: np.ndarray  # (N,) float64, undiscounted sum of each player's rewards
    pick_ups: np.ndarray  # (N,) int64, coins, resources, ores, ... that each player collected
    bot_returns: np.ndarray = np.zeros(0)  # (num_bots,) as returns
    bot_pick_ups: np.ndarray = np.zeros(0)  # (num_bots,) as pick_ups


class Step(NamedTuple):
    """One step of all worlds. Where an episode ended, `obs` is the first of the next one."""

    obs: Observation
    reward: np.ndarray  # (B, N) float64, each player's own reward
    terminated: np.ndarray  # (B,) bool, True where the game itself ended the episode
    truncated: np.ndarray  # (B,) bool, True where a limit of steps ended it (max_episode_steps)
    final: Observation | None  # last observations where episodes ended (other rows: stale)
    episodes: list[Episode]  # the episodes that ended in this step


class EpisodeCounter:
    """Sums rewards, pick-ups and steps of the running episodes; columns: players, then bots."""

    def __init__(self, num_envs: int, num_agents: int, num_bots: int = 0):
        self.num_agents = num_agents
        self.returns = np.zeros((num_envs, num_agents + num_bots))
        self.pick_ups = np.zeros((num_envs, num_agents + num_bots), np.int64)
        self.length = np.zeros(num_envs, np.int64)

    def add(self, reward: np.ndarray, pick_ups: np.ndarray, done: np.ndarray) -> list[Episode]:
        """Add a step: reward, pick_ups (B, N + num_bots), done (B,) bool -> the ended episodes."""
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
        """Set the sums of these worlds to 0; worlds: indices, a mask (B,) bool, by default all."""
        for array in (self.returns, self.pick_ups, self.length):
            array[worlds] = 0


@numba.njit(cache=True)
def _hash(image: np.ndarray, i: int, j: int) -> np.uint64:
    """64-bit hash of tile (i, j) of image (8H, 3W) uint64, in 3 chains that a CPU overlaps."""
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
    """0 if tile (i, j) of image (8H, 3W) uint64 equals sprite (24,) uint64, else not 0."""
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
    """Write the tile ids of image (8H, 3W) uint64 into ids (H, W) uint16, from row `start` on.

    On entry ids holds the previous frame, so an unchanged tile costs one comparison. A changed tile
    is looked up by its hash and compared pixel by pixel: a hash collision costs time, but it never
    gives a wrong id. Returns (-1, -1), or (i, j) of the first tile that is not in the table.
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
    """Insert sprites first, ..., last - 1 into the hash table (open addressing)."""
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

    The row of a sprite is its tile id. Sprites are only appended, so an id never changes its
    meaning. A file lock makes processes agree on new ids; the kernel frees it if its holder dies.
    """

    def __init__(self, sprites: np.ndarray, count: np.ndarray, lock_fd: int | None = None):
        self.sprites = sprites  # (CAPACITY, 24) uint64
        self.count = count  # (1,) int64
        self.lock_fd = lock_fd  # file to lock: the shared memory; None if no other process uses it
        if self.count[0] == 0:
            self.count[0] = 1  # id 0 is black: all bytes zero, as the memory starts out
        self.slots = np.full(2 * CAPACITY, -1, np.int32)
        self.hashes = np.zeros(2 * CAPACITY, np.uint64)
        self.known = 0  # number of sprites in this process's hash table
        self._catch_up()

    @classmethod
    def private(cls) -> Palette:
        """A palette in this process's own memory, with the black sprite only."""
        return cls(np.zeros((CAPACITY, WORDS), np.uint64), np.zeros(1, np.int64))

    def __len__(self) -> int:
        return int(self.count[0])

    def _catch_up(self) -> None:
        last = int(self.count[0])
        _insert(self.sprites, self.slots, self.hashes, self.known, last)
        self.known = last

    def encode(self, image: np.ndarray, ids: np.ndarray) -> None:
        """Write the tile ids of image (8H, 8W, 3) uint8 into ids (H, W) uint16, which holds any
        valid ids (best the last frame's). Appends new sprites; WorldError if the table is full."""
        words = image.reshape(len(image), -1).view(np.uint64)
        i, j = _encode(words, self.sprites, self.slots, self.hashes, ids, 0)
        while i >= 0:
            self._learn(words[8 * i : 8 * i + 8, 3 * j : 3 * j + 3].reshape(WORDS))
            i, j = _encode(words, self.sprites, self.slots, self.hashes, ids, i)

    def _learn(self, sprite: np.ndarray) -> None:
        if self.lock_fd is not None:
            fcntl.lockf(self.lock_fd, fcntl.LOCK_EX, 1)  # byte 0: builds lock the other bytes
        try:
            fresh = self.known
            self._catch_up()  # another process may have appended this sprite already
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
        """A copy of all sprites so far, (P, 8, 8, 3) uint8; the row of a sprite is its tile id."""
        last = int(self.count[0])
        return self.sprites[:last].copy().view(np.uint8).reshape(last, SPRITE, SPRITE, 3)

    def load(self, pixels: np.ndarray) -> None:
        """Take over the sprites and ids of saved pixels(); ValueError if ids contradict them."""
        words = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint64)
        both = min(len(words), int(self.count[0]))
        if (words[:both] != self.sprites[:both]).any():
            raise ValueError("The saved palette contradicts sprites that are already numbered.")
        if len(words) > self.count[0]:
            self.sprites[: len(words)] = words
            self.count[0] = len(words)
            self._catch_up()


def ids_to_images(ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """ids (..., H, W), Palette.pixels() (P, 8, 8, 3) -> the exact images (..., 8H, 8W, 3) uint8."""
    tiles = np.moveaxis(pixels[ids], -3, -4)  # (..., H, 8, W, 8, 3)
    *batch, height, _, width, _, _ = tiles.shape
    return tiles.reshape(*batch, height * SPRITE, width * SPRITE, 3)
