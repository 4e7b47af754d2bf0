"""Scripted puppets, which replace the SavedModels of Melting Pot's bots.

An official bot has two parts: a puppeteer (Python code in meltingpot), which sets a goal in every
step, e.g. "COLLECT_DOVE", and a puppet (a SavedModel), which pursues it. The SavedModels are assets
that may be missing. The puppets of this file pursue the same goals by rules. A puppet uses its own
view (RGB, read through envs.meltingpot.sprite_names), the other observations of its player
(INVENTORY, READY_TO_SHOOT, ...), its position and orientation, and its memory of the map. It does
not see the global view. Puppeteers read more: inventories of both who interacted, for example.

`puppet_kind` gives the puppet of a substrate. A puppet has the methods of meltingpot's Policy, so
meltingpot's PuppetPolicy can join it with a puppeteer. docs/scenarios.md says how well each reaches
its goals. Coordinates: x grows to the east, y to the south; directions 0-3: N, E, S, W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np

from envs.meltingpot.sprite_names import Sprite, SpriteNames, components
from envs.meltingpot.tiles import CAPACITY, SPRITE, Palette, Spec

# Kinds of cells; THING + k is the kind of Sight.things[k].
FREE, WALL, AVATAR, UNKNOWN, THING = 0, 1, 2, 3, 4
UNREAD = 255  # a tile that no puppet has seen yet
DX, DY = np.array([0, 1, 0, -1]), np.array([-1, 0, 1, 0])  # a step in each direction
PATIENCE = 200  # a cell not seen for so many steps counts as never seen


# --- Seeing ---------------------------------------------------------------------------------------


class Sight:
    """Maps the tiles of a substrate's views to kinds of cells, from the substrate's settings.

    things   the sprite names that have kinds of their own; other tiles: FREE, WALL, AVATAR, UNKNOWN
    """

    def __init__(self, spec: Spec, settings: Any, sprites: list[Sprite], things: Sequence[str]):
        self.spec, self.things, self.names = spec, tuple(things), SpriteNames(sprites)
        objects = settings["simulation"]["gameObjects"]
        avatars = [o for o in objects if any(True for _ in components(o, "Avatar"))]
        view = next(components(avatars[0], "Avatar"))["view"]
        self.ahead, self.left = int(view["forward"]), int(view["left"])  # its own view cell (i, j)
        # Sprites of players, and of marks that are drawn on players (e.g. "Ready").
        self.bodies = {
            name
            for o in objects
            if any(True for _ in components(o, "Avatar", "AvatarConnector"))
            for kwargs in components(o, "Appearance", "AdditionalSprites")
            for name in (*kwargs.get("spriteNames", ()), *kwargs.get("customSpriteNames", ()))
        }
        alive = next(components(avatars[0], "Avatar"))["aliveState"]
        states = next(components(avatars[0], "StateManager"))["stateConfigs"]
        self.layer = next(state["layer"] for state in states if state["state"] == alive)
        self.kinds = np.full(CAPACITY, UNREAD, np.uint8)  # by tile id

    def kind(self, tile: np.ndarray) -> int:
        """The kind of a tile (8, 8, 3) uint8."""
        seen = self.names.look(tile)
        for one in seen:
            if one.name in self.things:
                return THING + self.things.index(one.name)
        if any(one.name in self.bodies for one in seen):
            return AVATAR
        if any(one.layer == self.layer for one in seen):  # it blocks the layer of avatars
            return WALL
        return FREE if seen or not tile.any() else UNKNOWN

    def read(self, ids: np.ndarray, palette: Palette) -> np.ndarray:
        """Kinds (H, W) uint8 of tile ids (H, W) uint16 of `palette`; each id is analysed once."""
        kinds = self.kinds[ids]
        if (kinds == UNREAD).any():
            for number in np.unique(ids[kinds == UNREAD]):
                tile = palette.sprites[number].view(np.uint8).reshape(SPRITE, SPRITE, 3)
                self.kinds[number] = self.kind(tile)
            kinds = self.kinds[ids]
        return kinds


# --- Finding one's way ----------------------------------------------------------------------------


@numba.njit(cache=True)
def place(i, j, x, y, facing, ahead, left):
    """Map cell (x, y) of view cell (i, j); the avatar at (x, y) is view cell (ahead, left)."""
    forward, right = ahead - i, j - left
    if facing == 0:
        return x + right, y - forward
    if facing == 1:
        return x + forward, y + right
    if facing == 2:
        return x - right, y + forward
    return x - forward, y - right


@numba.njit(cache=True)
def remember(kinds, x, y, facing, ahead, left, step, player, grid, seen):
    """Write a view's kinds (H, W) to grid, and step to seen, (rows, columns) each. Return the other
    players in view, rows x, y, kind. player (256,) bool: kinds of players, whose cell is FREE."""
    others = np.empty((kinds.size, 3), np.int64)
    count = 0
    for i in range(kinds.shape[0]):
        for j in range(kinds.shape[1]):
            kind = kinds[i, j]
            cx, cy = place(i, j, x, y, facing, ahead, left)
            if kind == 3 or not (0 <= cy < grid.shape[0] and 0 <= cx < grid.shape[1]):
                continue
            seen[cy, cx] = step
            if player[kind]:
                grid[cy, cx] = 0
                if cx != x or cy != y:
                    others[count, 0], others[count, 1], others[count, 2] = cx, cy, kind
                    count += 1
            else:
                grid[cy, cx] = kind
    return others[:count]


@numba.njit(cache=True)
def distances(passable, x, y):
    """Steps from (x, y) to every cell of passable (rows, columns) bool; -1: cannot be reached."""
    rows, columns = passable.shape
    far = np.full((rows, columns), -1, np.int32)
    queue = np.empty((rows * columns, 2), np.int32)
    far[y, x] = 0
    queue[0, 0], queue[0, 1] = x, y
    first, last = 0, 1
    while first < last:
        cx, cy = queue[first, 0], queue[first, 1]
        first += 1
        for d in range(4):
            nx, ny = cx + (0, 1, 0, -1)[d], cy + (-1, 0, 1, 0)[d]
            if 0 <= ny < rows and 0 <= nx < columns and far[ny, nx] < 0 and passable[ny, nx]:
                far[ny, nx] = far[cy, cx] + 1
                queue[last, 0], queue[last, 1] = nx, ny
                last += 1
    return far


@numba.njit(cache=True)
def first_step(far, x, y):
    """Direction of the first step on a shortest path to (x, y); far: distances(); -1: none."""
    if far[y, x] <= 0:
        return -1
    while True:
        for d in range(4):
            nx, ny = x - (0, 1, 0, -1)[d], y - (-1, 0, 1, 0)[d]
            inside = 0 <= ny < far.shape[0] and 0 <= nx < far.shape[1]
            if inside and far[ny, nx] == far[y, x] - 1:
                if far[ny, nx] == 0:
                    return d
                x, y = nx, ny
                break


@numba.njit(cache=True)
def _along(x, y, dx, dy, reach, target, stop):
    """End of a ray over `reach` cells from (x, y) on: 1 a target, 0 stopped, -1 nothing."""
    for _ in range(reach):
        if not (0 <= y < target.shape[0] and 0 <= x < target.shape[1]):
            return 0
        if target[y, x]:
            return 1
        if stop[y, x]:
            return 0
        x, y = x + dx, y + dy
    return -1


@numba.njit(cache=True)
def aims(target, stop, reach, side):
    """Own cells and directions from which a beam hits a target: (4, rows, columns) bool.

    The engine's beam is a ray over the `reach` cells ahead, and rays in up to `side` lanes on each
    side; a lane k cells away reaches k cells less far. A target or a cell of `stop` ends a ray, and
    ends the lanes further out if it is beside the own cell. target, stop (rows, columns) bool.
    """
    rows, columns = target.shape
    hits = np.zeros((4, rows, columns), np.bool_)
    for d in range(4):
        dx, dy = (0, 1, 0, -1)[d], (-1, 0, 1, 0)[d]
        for y in range(rows):
            for x in range(columns):
                hit = _along(x + dx, y + dy, dx, dy, reach, target, stop) == 1
                for hand in (-1, 1):
                    sx, sy = -dy * hand, dx * hand
                    for lane in range(1, side + 1):
                        cx, cy = x + sx * lane, y + sy * lane
                        end = _along(cx, cy, dx, dy, 1, target, stop)
                        if end == -1:
                            far = _along(cx + dx, cy + dy, dx, dy, reach - lane, target, stop)
                            hit = hit or far == 1
                        else:
                            hit = hit or end == 1
                            break
                hits[d, y, x] = hit
    return hits


def compile_kernels() -> None:
    """Compile the functions above, unless they are cached: in a game this would delay a step."""
    small = np.zeros((2, 2), np.uint8)
    off = small.astype(bool)
    remember(small, 0, 0, 0, 1, 0, 0, np.zeros(256, bool), small, np.zeros((2, 2), np.int32))
    first_step(distances(~off, 0, 0), 1, 1)
    aims(off, off, 1, 1)


# --- Remembering and moving -----------------------------------------------------------------------


class Memory:
    """What a puppet remembers within an episode; maps are (rows, columns)."""

    def __init__(self, sight: Sight, seed: int):
        self.rng = np.random.default_rng(seed)
        self.grid = np.full(sight.spec.world_grid, UNREAD, np.uint8)  # kinds; UNREAD: never seen
        self.seen = np.full(sight.spec.world_grid, -PATIENCE, np.int32)  # step of the last view
        self.step = 0
        self.others = np.zeros((0, 3), np.int64)  # players in view: x, y, kind
        self.last: tuple[int, int, int] | None = None  # x, y, step: another player last in view
        self.goal: tuple[int, int] | None = None  # the cell x, y that it explores
        self.x = self.y = self.facing = 0
        self.before = (-1, -1, -1)  # x, y, facing one step ago
        self.stuck = 0  # steps in a row in which it acted but did not move or turn
        self.extra: dict[str, Any] = {}  # further state of a subclass of Puppet

    def shows(self, kinds: Sequence[int]) -> np.ndarray:
        """Cells that were of these kinds when last seen: (rows, columns) bool."""
        wanted = np.zeros(256, bool)
        wanted[list(kinds)] = True
        return wanted[self.grid]


class Puppet:
    """Rules for all goals of one substrate; subclasses define them in act()."""

    things: tuple[str, ...] = ()  # sprite names with kinds of their own
    players: tuple[str, ...] = ()  # further names that lie on players

    def __init__(self, spec: Spec, settings: Any, sight: Sight, palette: Palette, seat: int):
        """seat: the number of its player, from 0; settings: of the substrate, in lab2d's format."""
        self.spec, self.settings, self.sight, self.palette = spec, settings, sight, palette
        self.seat = seat
        self.number = {tuple(sorted(a.items())): i for i, a in enumerate(spec.actions)}
        self.player = np.zeros(256, bool)
        self.player[[AVATAR, *(self.code(name) for name in self.players)]] = True
        self.ids = np.zeros(spec.grid, np.uint16)
        rows, columns = np.indices(spec.world_grid)
        middle = (len(rows) - 1) / 2, (rows.shape[1] - 1) / 2
        self.outwards = abs(rows - middle[0]) + abs(columns - middle[1])  # distance from the middle

    def code(self, name: str) -> int:
        """The kind of the sprite `name`; 254, which no cell has, if there is none."""
        return THING + self.sight.things.index(name) if name in self.sight.things else 254

    # Methods of meltingpot's Policy

    def initial_state(self) -> Memory | None:
        return None  # step() makes it in the first step

    def step(self, timestep: Any, memory: Memory | None) -> tuple[int, Memory]:
        """Action and Memory for a dm_env.TimeStep with GOAL (one-hot), POSITION and ORIENTATION."""
        seen = timestep.observation
        if memory is None or timestep.first():
            memory = Memory(self.sight, int(seen["SEED"]))
        m = memory
        m.x, m.y = (int(n) for n in seen["POSITION"])
        m.facing = int(seen["ORIENTATION"])
        inside = 0 <= m.y < m.grid.shape[0] and 0 <= m.x < m.grid.shape[1]
        # A player that waits to enter again sees nothing; its POSITION may be outside the map.
        if not inside or not seen["RGB"].any():
            m.step += 1
            return 0, m
        self.palette.encode(seen["RGB"], self.ids)
        kinds = self.sight.read(self.ids, self.palette)
        own = (m.x, m.y, m.facing, self.sight.ahead, self.sight.left)
        m.others = remember(kinds, *own, m.step, self.player, m.grid, m.seen)
        if len(m.others):
            x, y, _ = m.others[np.abs(m.others[:, :2] - (m.x, m.y)).sum(1).argmin()]
            m.last = (int(x), int(y), m.step)
        action = self.act(int(np.argmax(seen["GOAL"])), seen, m)
        here = (m.x, m.y, m.facing)
        # Being frozen after an interaction counts, too, so the step after it is random. It is kept,
        # as all tables have these bots (docs/scenarios.md).
        m.stuck = m.stuck + 1 if here == m.before and action != 0 else 0
        m.before = here
        m.step += 1
        return action, m

    def close(self) -> None:
        pass

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        raise NotImplementedError

    # Building blocks of rules; cells are (x, y), each returned action is a number 0..A - 1

    def action(self, **parts: int) -> int:
        """The number of the action with these parts, all others 0; e.g. move=1."""
        names = self.spec.actions[0]
        return self.number[tuple(sorted(({name: 0 for name in names} | parts).items()))]

    def turn(self, facing: int, m: Memory) -> int:
        """The action that turns towards a direction."""
        return self.action(turn=-1 if (facing - m.facing) % 4 == 3 else 1)

    def walk(self, direction: int, m: Memory, look: bool = False) -> int:
        """The action that steps in a direction (from 0 to 3); with look, turn there first."""
        if m.stuck > 3:  # probably a player blocks the way: try any step
            return self.action(move=int(m.rng.integers(1, 5)))
        if look and direction != m.facing:
            return self.turn(direction, m)
        return self.action(move=(direction - m.facing) % 4 + 1)

    def ways(self, m: Memory, avoid: Sequence[int] = (), crowd: bool = True) -> np.ndarray:
        """Steps to every cell (rows, columns), -1: none, on paths without walls, kinds to avoid and
        players in view (crowd=False: through these players)."""
        passable = ~m.shows((WALL, *avoid))
        if crowd:
            passable[m.others[:, 1], m.others[:, 0]] = False
        return distances(passable, m.x, m.y)

    def nearest(self, wanted: np.ndarray, far: np.ndarray) -> tuple[int, int] | None:
        """The nearest reachable cell (x, y) in wanted (rows, columns) bool; None without one."""
        cells = np.flatnonzero(wanted & (far > 0))
        if not len(cells):
            return None
        best = cells[far.ravel()[cells].argmin()]
        return int(best % far.shape[1]), int(best // far.shape[1])

    def go(self, cell: tuple[int, int], far: np.ndarray, m: Memory, look: bool = False) -> int:
        """The action of a step towards a reachable cell (x, y), along the distances `far`."""
        direction = first_step(far, *cell)
        return self.walk(direction, m, look) if direction >= 0 else 0

    def fetch(self, kinds: Sequence[int], far: np.ndarray, m: Memory) -> int | None:
        """The action towards the nearest remembered cell of these kinds; None if there is none."""
        cell = self.nearest(m.shows(kinds), far)
        return None if cell is None else self.go(cell, far, m)

    def explore(self, far: np.ndarray, m: Memory, pull: float = 0.0) -> int:
        """The action towards a near cell that has not been seen for long; pull > 0 prefers cells in
        the middle of the map, where other players are most likely."""
        interest = np.minimum(m.step - m.seen, PATIENCE) - 4.0 * far - pull * self.outwards
        interest[far <= 0] = -np.inf
        old = m.goal
        stale = old is None or far[old[1], old[0]] <= 0 or m.step - m.seen[old[1], old[0]] < 20
        if stale:
            best = int(interest.argmax())
            m.goal = (best % far.shape[1], best // far.shape[1])
            if not np.isfinite(interest.flat[best]):
                m.goal = None
                return self.action(turn=1)
        return self.go(m.goal, far, m, look=far[m.goal[1], m.goal[0]] > 2)

    def shoot(
        self,
        target: np.ndarray,
        far: np.ndarray,
        m: Memory,
        reach: int,
        side: int,
        fire: int,
        ready: bool,
        stop: Sequence[int] = (WALL,),
    ) -> int | None:
        """The action to go where a beam hits a cell of target (rows, columns) bool, turn there, and
        fire (the action `fire`) when ready; None if no such place can be reached."""
        hits = aims(target, m.shows(stop), reach, side)
        if hits[m.facing, m.y, m.x]:
            return fire if ready else 0
        turned = [d for d in (1, 3, 2) if hits[(m.facing + d) % 4, m.y, m.x]]
        if turned:
            return self.turn((m.facing + turned[0]) % 4, m)
        cell = self.nearest(hits.any(0), far)
        return None if cell is None else self.go(cell, far, m)


# --- *_in_the_matrix ------------------------------------------------------------------------------


class MatrixPuppet(Puppet):
    """Goals: collect resource 1, ..., R; interact while playing resource 1, ..., R; and, in some
    substrates, collect resource 1, ..., R ignoring other considerations.

    The engine ignores a beam at a player that has collected nothing, so the puppet aims only at
    players that carry the mark "Ready".
    """

    players = ("Ready",)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.resources = [
            k for k, name in enumerate(self.sight.things) if name.startswith("resource")
        ]
        self.resources = [THING + k for k in self.resources]
        objects = self.settings["simulation"]["gameObjects"]
        zappers = [k for o in objects for k in components(o, "GameInteractionZapper")]
        self.reach, self.side = int(zappers[0]["beamLength"]), int(zappers[0]["beamRadius"])

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        count = len(self.resources)
        wanted = self.resources[goal % count]
        unwanted = [kind for kind in self.resources if kind != wanted]
        far = self.ways(m, unwanted)
        if goal // count == 1:
            return self.interact(far, seen, m, unwanted)
        action = self.fetch([wanted], far, m)
        return self.explore(far, m) if action is None else action

    def interact(self, far: np.ndarray, seen: Any, m: Memory, unwanted: list[int]) -> int:
        marked = m.others[m.others[:, 2] == self.code("Ready")]
        if len(marked):
            target = np.zeros(m.grid.shape, bool)
            target[marked[:, 1], marked[:, 0]] = True
            fire, ready = self.action(interact=1), float(seen["READY_TO_SHOOT"]) >= 1
            stop = (WALL, *self.resources)  # resources stop beams, too
            action = self.shoot(target, far, m, self.reach, self.side, fire, ready, stop)
            if action is not None:
                return action
        if m.last is not None and m.step - m.last[2] < 15 and far[m.last[1], m.last[0]] > 3:
            return self.go(m.last[:2], far, m, look=True)
        return self.explore(far, m, pull=16.0)


# --- coins ----------------------------------------------------------------------------------------


class CoinsPuppet(Puppet):
    """Goals: cooperate (own coins only), defect (all coins), spite (the other player's only)."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        avatars = [
            (next(components(o, "Avatar"))["index"], kwargs["coinType"])
            for o in self.settings["simulation"]["gameObjects"]
            for kwargs in components(o, "PlayerCoinType")
        ]
        self.own = self.code(dict(avatars)[self.seat + 1])
        self.coins = [THING + k for k in range(len(self.sight.things))]

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        wanted = [kind for kind in self.coins if goal == 1 or (kind == self.own) == (goal == 0)]
        far = self.ways(m, [kind for kind in self.coins if kind not in wanted])
        coins = m.shows(wanted)
        if len(m.others):  # prefer coins that the other player does not reach first
            x, y, _ = m.others[0]
            rows, columns = np.indices(m.grid.shape)
            theirs = abs(rows - y) + abs(columns - x)
            cell = self.nearest(coins & (far <= theirs), far) or self.nearest(coins, far)
        else:
            cell = self.nearest(coins, far)
        return self.explore(far, m) if cell is None else self.go(cell, far, m)


# --- coop_mining ----------------------------------------------------------------------------------


class MiningPuppet(Puppet):
    """Goals: extract iron, mine gold, extract gold, extract all.

    Two miners must strike gold within three frames. To extract gold, the puppet prefers gold that
    was just struck, then gold near other players. It strikes one ore for up to 40 steps.
    """

    things = ("ironRaw", "goldRaw", "goldPartial")

    def __init__(self, *args: Any):
        super().__init__(*args)
        beams = [
            k for o in self.settings["simulation"]["gameObjects"] for k in components(o, "MineBeam")
        ]
        self.reach, self.side = int(beams[0]["beamLength"]), int(beams[0]["beamRadius"])

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        iron, gold, struck = (self.code(name) for name in self.things)
        far, ores = self.ways(m), (iron, gold, struck)
        fire, ready = self.action(mine=1), float(seen["READY_TO_SHOOT"]) >= 1
        golden = m.shows((gold, struck))
        if goal == 0:
            target = m.grid == iron
        elif goal == 1:
            target = golden
        else:
            target = self.choose(golden, m, struck)
            if target is None:
                target = (m.grid == iron) if goal == 3 else golden
        action = self.shoot(target, far, m, self.reach, self.side, fire, ready, (WALL, *ores))
        return self.explore(far, m) if action is None else action

    def choose(self, golden: np.ndarray, m: Memory, struck: int) -> np.ndarray | None:
        """A gold ore to extract with others, (rows, columns) bool, kept for up to 40 steps."""
        rows, columns = np.nonzero(golden)
        if not len(rows):
            return None
        cost = abs(columns - m.x) + abs(rows - m.y) * 1.0
        fresh = m.step - m.seen[rows, columns] < 5
        cost -= 20 * ((m.grid[rows, columns] == struck) & fresh)
        if len(m.others):
            gaps = abs(columns[:, None] - m.others[:, 0]) + abs(rows[:, None] - m.others[:, 1])
            cost += gaps.min(1)
        else:
            cost += 10
        kept, since = m.extra.get("ore"), m.extra.get("since", 0)
        avoid = m.extra.setdefault("tried", {})
        for k, cell in enumerate(zip(columns, rows)):
            cost[k] += 15 * (m.step - avoid.get(cell, -1000) < 100)
            cost[k] -= 6 * (cell == kept)
        best = int(cost.argmin())
        cell = (columns[best], rows[best])
        if cell != kept:
            m.extra["ore"], m.extra["since"] = cell, m.step
        elif m.step - since > 40:  # nobody has come
            avoid[cell] = m.step
        target = np.zeros(golden.shape, bool)
        target[cell[1], cell[0]] = True
        return target


# --- Which puppet a substrate has -----------------------------------------------------------------


class Kind(NamedTuple):
    """A class of puppets and the sprite names that it needs from the settings."""

    puppet: type[Puppet]
    pattern: str = ""  # prefix of these names; "": none


def puppet_kind(substrate: str) -> Kind | None:
    """The Kind of puppet for a substrate's goals; None if there is none."""
    if "_in_the_matrix__" in substrate:
        return Kind(MatrixPuppet, "resource_class")
    from envs.meltingpot.bots_other import OTHERS  # imported here, as it imports this module

    kinds = {"coins": Kind(CoinsPuppet, "coin_"), "coop_mining": Kind(MiningPuppet)}
    return (kinds | OTHERS).get(substrate)


def new_sight(spec: Spec, settings: Any, sprites: list[Sprite]) -> Sight:
    """The Sight of a substrate's puppets; the substrate must have a puppet_kind()."""
    kind = puppet_kind(spec.substrate)
    names = sorted({s.name for s in sprites if kind.pattern and s.name.startswith(kind.pattern)})
    return Sight(spec, settings, sprites, (*names, *kind.puppet.things, *kind.puppet.players))
