"""Scripted puppets of five more substrates; envs/meltingpot/bots.py has their building blocks.

No document defines the goals. Their meaning is taken from a goal's name (e.g. "CLAIM_FAR"), from
the names of the bots that use it and from the rules of the substrate; the docstrings below state
it. The maps of allelopathic_harvest and territory wrap around; puppets treat the edges as walls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from envs.meltingpot.bots import (
    DX,
    DY,
    PATIENCE,
    THING,
    UNREAD,
    WALL,
    Kind,
    Memory,
    Puppet,
    first_step,
)
from envs.meltingpot.sprite_names import components


class Shooter(Puppet):
    """A puppet with beams. beams: {action that fires: component that defines the beam}."""

    beams: ClassVar[dict[str, str]] = {"fireZap": "Zapper"}

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.range: dict[str, tuple[int, int]] = {}
        for one in self.settings["simulation"]["gameObjects"]:
            for action, name in self.beams.items():
                for kwargs in components(one, name):
                    self.range[action] = int(kwargs["beamLength"]), int(kwargs["beamRadius"])

    def codes(self, *starts: str) -> list[int]:
        """The kinds of all things whose names start with one of `starts`."""
        return [THING + k for k, name in enumerate(self.sight.things) if name.startswith(starts)]

    def fire(
        self,
        action: str,
        target: np.ndarray,
        far: np.ndarray,
        m: Memory,
        ready: bool = True,
        stop: Sequence[int] = (),
    ) -> int | None:
        """shoot() with the beam of `action`; walls and cells of the kinds `stop` end it."""
        beam = (*self.range[action], self.action(**{action: 1}))
        return self.shoot(target, far, m, *beam, ready, (WALL, *stop))

    def hunt(
        self, action: str, far: np.ndarray, seen: Any, m: Memory, stop: Sequence[int] = ()
    ) -> int | None:
        """The action to fire at a player in view or to go where one was; None without one."""
        target = np.zeros(m.grid.shape, bool)
        target[m.others[:, 1], m.others[:, 0]] = True
        done = self.fire(action, target, far, m, float(seen["READY_TO_SHOOT"]) >= 1, stop)
        if done is not None or m.last is None or m.step - m.last[2] >= 15:
            return done
        return self.go(m.last[:2], far, m, look=True) if far[m.last[1], m.last[0]] > 1 else None

    def patrol(self, places: np.ndarray, far: np.ndarray, m: Memory) -> int:
        """The action towards a near cell of places (rows, columns) bool that has not been seen for
        long; explore() if none can be reached."""
        interest = np.minimum(m.step - m.seen, PATIENCE) - 2.0 * far
        interest[~places | (far <= 0)] = -np.inf
        best = int(interest.argmax())
        if not np.isfinite(interest.flat[best]):
            return self.explore(far, m)
        m.goal = None
        cell = best % far.shape[1], best // far.shape[1]
        return self.go(cell, far, m, look=far[cell[1], cell[0]] > 2)


# --- clean_up -------------------------------------------------------------------------------------


class CleanUpPuppet(Shooter):
    """Goals: 0 eat apples, which grow on grass while the river is clean; 1 clean the river of dirt;
    2 (in the set of 3 goals) sanction: zap other players, who then leave the game for a while."""

    things = ("Apple", "Dirt", "Grass", "GrassEdge", "water_1", "water_2", "water_3", "water_4")
    beams: ClassVar = {"fireZap": "Zapper", "fireClean": "Cleaner"}

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        far = self.ways(m)
        if goal == 0:
            action = self.fetch([self.code("Apple")], far, m)
            return self.patrol(m.shows(self.codes("Grass")), far, m) if action is None else action
        if goal == 1:
            # No observation tells when the beam has cooled down, so it fires in every step.
            action = self.fire("fireClean", m.shows([self.code("Dirt")]), far, m)
            return self.patrol(m.shows(self.codes("water")), far, m) if action is None else action
        action = self.hunt("fireZap", far, seen, m)
        return self.explore(far, m) if action is None else action


# --- allelopathic_harvest -------------------------------------------------------------------------


class HarvestPuppet(Shooter):
    """Goals: 0 consume any berries; 1 prefer red, 2 prefer green: eat near ripe berries of that
    colour, otherwise recolour unripe ones; 3 freeride red, 4 freeride green: eat that colour, or
    any berries if there is none; 5 zap others."""

    things = tuple(f"{state}Berry_{k}" for state in ("Ripe", "Unripe") for k in (1, 2, 3))
    players = ("sprite_for_level_2", "sprite_for_level_3")  # marks on players that were zapped
    beams: ClassVar = {"fireZap": "Zapper"} | {f"fire_{k}": "ColorZapper" for k in (1, 2, 3)}
    detour = 8  # steps: a ripe berry up to this far away comes before recolouring

    def __init__(self, *args: Any):
        super().__init__(*args)
        looks = {one.name: one.rgba for one in self.sight.names.sprites}
        ripe = [looks[f"RipeBerry_{k}"].reshape(-1, 4).sum(0, dtype=int) for k in (1, 2, 3)]
        # The number of the reddest berry and of the greenest berry.
        self.red, self.green = (1 + int(np.argmax([one[c] for one in ripe])) for c in (0, 1))

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        ripe, berries = self.codes("RipeBerry"), self.codes("RipeBerry", "UnripeBerry")
        if goal == 5:
            far = self.ways(m)
            action = self.hunt("fireZap", far, seen, m)
            return self.explore(far, m, pull=4.0) if action is None else action
        if goal == 0:
            far = self.ways(m)
            action = self.fetch(ripe, far, m)
            return self.explore(far, m) if action is None else action
        colour = self.red if goal % 2 else self.green
        liked = [self.code(f"RipeBerry_{colour}")]
        far = self.ways(m, [kind for kind in ripe if kind not in liked])
        action = None
        if goal < 3:
            near = np.where(far <= self.detour, far, -1)
            cell = self.nearest(m.shows(liked), near)
            action = None if cell is None else self.go(cell, far, m)
            if action is None:
                others = [f"UnripeBerry_{k}" for k in (1, 2, 3) if k != colour]
                target = m.shows([self.code(name) for name in others])
                action = self.fire(f"fire_{colour}", target, far, m, stop=berries)
        if action is None:
            action = self.fetch(liked, far, m)
        if action is None and goal > 2:
            far = self.ways(m)
            action = self.fetch(ripe, far, m)
        return self.explore(far, m) if action is None else action


# --- externality_mushrooms ------------------------------------------------------------------------


class MushroomPuppet(Shooter):
    """Goals 0 to 3: collect mushrooms that are half good for oneself, half for others (HIHE), good
    for oneself (FIZE), good for others (ZIFE), bad for all (NINE); 4-6: zap one of kinds 0-2."""

    things = (  # in the order of the goals
        "HalfInternalityHalfExternality",
        "FullInternalityZeroExternality",
        "ZeroInternalityFullExternality",
        "NegativeInternalityNegativeExternality",
    )
    players = ("sprite_for_level_2",)

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        kinds = [self.code(name) for name in self.things]
        wanted = kinds[goal % 4]
        # A player that walks over a mushroom eats it, so paths avoid all other kinds.
        far = self.ways(m, [kind for kind in kinds if kind != wanted or goal > 3])
        if goal < 4:
            action = self.fetch([wanted], far, m)
            if action is None:  # perhaps other mushrooms block all paths
                action = self.fetch([wanted], self.ways(m), m)
        else:
            ready = float(seen["READY_TO_SHOOT"]) >= 1
            action = self.fire("fireZap", m.grid == wanted, far, m, ready)
        return self.explore(far, m) if action is None else action

    def walk(self, direction: int, m: Memory, look: bool = False) -> int:
        m.stuck = 0  # digesting, not blocked: a random step could end on another mushroom
        return super().walk(direction, m, look)


# --- gift_refinements -----------------------------------------------------------------------------


class GiftPuppet(Shooter):
    """Goals: 0 collect tokens; 1 gift: give up the most refined token, and the player that is hit
    gets several that are more refined; 2 consume simple tokens; 3 consume tokens; 4 forage.

    Consuming takes all tokens at once. Goals 2 and 4 consume if raw tokens are among them: raw
    tokens are simple, and the puppet has collected them itself. Without tokens it collects.
    """

    things = ("coin",)
    beams: ClassVar = {"refineAndGift": "GiftBeam"}

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        far, tokens = self.ways(m), seen["INVENTORY"]
        if goal == 1 and tokens.any():
            action = self.hunt("refineAndGift", far, seen, m)
            return self.explore(far, m, pull=4.0) if action is None else action
        if (goal == 3 and tokens.any()) or (goal in (2, 4) and tokens[0] > 0):
            return self.action(consumeTokens=1)
        action = self.fetch([self.code("coin")], far, m)
        return self.explore(far, m) if action is None else action


# --- territory ------------------------------------------------------------------------------------


class TerritoryPuppet(Shooter):
    """Goals: 0 claim near: only the walls of the own room; 1 claim far: walls of other rooms, with
    the beam through the own wall, then by breaking through walls; 2 destroy resources, others'
    first; 3 zap others, also by breaking through walls.

    Walls are resources. A player claims a wall by facing it from the next cell or by the claiming
    beam, which passes through walls. Two zaps destroy a wall.
    """

    things = ("UnclaimedResourceSprite",)  # and Kind.pattern: those in a player's colour
    players = ("sprite_for_level_2",)
    beams: ClassVar = {"fireZap": "Zapper", "fireClaim": "ResourceClaimer"}

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        own = f"Color{self.seat + 1}ResourceSprite", f"Color{self.seat + 1}DryPaintSprite"
        resources = self.codes("Unclaimed", "Color")
        far = self.ways(m, resources)
        ready = float(seen["READY_TO_SHOOT"]) >= 1
        walls, mine = m.shows(resources), m.shows(self.codes(*own))
        home, rim = self.home(far, m)
        if goal == 0:
            action = self.claim(walls & rim & ~mine, walls, far, m)
            return self.patrol(home, far, m) if action is None else action
        if goal == 1:
            target = walls & ~rim & ~mine
            action = self.claim(target, walls, far, m)
        elif goal == 2:
            target = walls & ~mine if (walls & ~mine).any() else walls
            action = self.fire("fireZap", target, far, m, ready)
        else:
            action = self.hunt("fireZap", far, seen, m, resources)
            target = np.zeros(walls.shape, bool)
            if m.last is not None and m.seen[m.last[1], m.last[0]] <= m.last[2]:
                target[m.last[1], m.last[0]] = True  # not seen since the player was there
        return self.dig(target, ready, resources, m) if action is None else action

    def claim(
        self, target: np.ndarray, walls: np.ndarray, far: np.ndarray, m: Memory
    ) -> int | None:
        """The action to reach and claim a wall of target (rows, columns) bool. Walls in the beam
        are noted as claimed at once, because the beam hides them for a step."""
        action = self.fire("fireClaim", target, far, m)
        if action == self.action(fireClaim=1):
            for step in range(1, self.range["fireClaim"][0] + 1):
                x, y = m.x + DX[m.facing] * step, m.y + DY[m.facing] * step
                if 0 <= y < len(walls) and 0 <= x < walls.shape[1] and walls[y, x]:
                    m.grid[y, x] = self.code(f"Color{self.seat + 1}ResourceSprite")
        return action

    def home(self, far: np.ndarray, m: Memory) -> tuple[np.ndarray, np.ndarray]:
        """The cells of the room where the puppet began, and their rim: (rows, columns) bool each.
        Both are fixed once the whole rim has been seen, so that broken walls add nothing."""
        if "home" not in m.extra:
            home = (far >= 0) & (m.grid != UNREAD)
            rim = np.zeros_like(home)
            rim[1:] |= home[:-1]
            rim[:-1] |= home[1:]
            rim[:, 1:] |= home[:, :-1]
            rim[:, :-1] |= home[:, 1:]
            rim &= ~home
            if (m.grid[rim] == UNREAD).any():
                return home, rim
            m.extra["home"] = home, rim
        return m.extra["home"]

    def dig(self, target: np.ndarray, ready: bool, resources: list[int], m: Memory) -> int:
        """The action towards the nearest cell of target (rows, columns) bool, or towards a cell not
        seen for long if there is none; zaps walls that are in the way."""
        far = self.ways(m, crowd=False)  # as if resources could be entered
        cell = self.nearest(target, far)
        if cell is None:
            interest = np.minimum(m.step - m.seen, PATIENCE) - 4.0 * far
            interest[far <= 0] = -np.inf
            best = int(interest.argmax())
            cell = best % far.shape[1], best // far.shape[1]
        direction = first_step(far, *cell)
        if direction < 0:
            return self.action(turn=1)
        x, y = m.x + DX[direction], m.y + DY[direction]
        if m.grid[y, x] not in resources:
            return self.walk(direction, m, look=True)
        if direction != m.facing:
            return self.turn(direction, m)
        return self.action(fireZap=1) if ready else 0


OTHERS = {
    "allelopathic_harvest__open": Kind(HarvestPuppet),
    "clean_up": Kind(CleanUpPuppet),
    "externality_mushrooms__dense": Kind(MushroomPuppet),
    "gift_refinements": Kind(GiftPuppet),
    "territory__rooms": Kind(TerritoryPuppet, "Color"),
}
