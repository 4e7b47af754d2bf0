"""Scripted puppets of five more substrates; envs/meltingpot/bots.py has what they are made of.

What a goal asks for is nowhere written down but in its name ("CLAIM_FAR"), in what the bots that
use it are called and in the rules of the substrate; the docstrings say what we made of it. The maps
of allelopathic_harvest and territory have no edges: one comes out on the other side. To puppets
they end there.
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
    """A puppet with beams. beams: the action that fires one, and the component that defines it."""

    beams: ClassVar[dict[str, str]] = {"fireZap": "Zapper"}

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.range: dict[str, tuple[int, int]] = {}
        for one in self.settings["simulation"]["gameObjects"]:
            for action, name in self.beams.items():
                for kwargs in components(one, name):
                    self.range[action] = int(kwargs["beamLength"]), int(kwargs["beamRadius"])

    def codes(self, *starts: str) -> list[int]:
        """The kinds of things whose names start so."""
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
        """shoot() with one of the beams; cells of the kinds `stop` stop it, as walls do."""
        beam = (*self.range[action], self.action(**{action: 1}))
        return self.shoot(target, far, m, *beam, ready, (WALL, *stop))

    def hunt(
        self, action: str, far: np.ndarray, seen: Any, m: Memory, stop: Sequence[int] = ()
    ) -> int | None:
        """Fire at a player in view, or go where one was; None if we remember none."""
        target = np.zeros(m.grid.shape, bool)
        target[m.others[:, 1], m.others[:, 0]] = True
        done = self.fire(action, target, far, m, float(seen["READY_TO_SHOOT"]) >= 1, stop)
        if done is not None or m.last is None or m.step - m.last[2] >= 15:
            return done
        return self.go(m.last[:2], far, m, look=True) if far[m.last[1], m.last[0]] > 1 else None

    def patrol(self, places: np.ndarray, far: np.ndarray, m: Memory) -> int:
        """Look at those of places (rows, columns) bool that we have not seen for longest, near ones
        first; explore if none can be reached."""
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
    """Goals: eat (apples, which grow on grass while the river is clean), clean (the river, of dirt)
    and, of puppet_3_goals, sanction (zap others out of the game for a while)."""

    things = ("Apple", "Dirt", "Grass", "GrassEdge", "water_1", "water_2", "water_3", "water_4")
    beams: ClassVar = {"fireZap": "Zapper", "fireClean": "Cleaner"}

    def act(self, goal: int, seen: Any, m: Memory) -> int:
        far = self.ways(m)
        if goal == 0:
            action = self.fetch([self.code("Apple")], far, m)
            return self.patrol(m.shows(self.codes("Grass")), far, m) if action is None else action
        if goal == 1:
            # It fires as soon as its beam has cooled down, which no observation tells.
            action = self.fire("fireClean", m.shows([self.code("Dirt")]), far, m)
            return self.patrol(m.shows(self.codes("water")), far, m) if action is None else action
        action = self.hunt("fireZap", far, seen, m)
        return self.explore(far, m) if action is None else action


# --- allelopathic_harvest -------------------------------------------------------------------------


class HarvestPuppet(Shooter):
    """Goals: consume any berries; prefer red, prefer green (eat ripe ones of that colour that are
    near, and else recolour unripe ones); freeride red, freeride green (eat that colour, or any if
    there is none); zap others."""

    things = tuple(f"{state}Berry_{k}" for state in ("Ripe", "Unripe") for k in (1, 2, 3))
    players = ("sprite_for_level_2", "sprite_for_level_3")  # who has been zapped wears one
    beams: ClassVar = {"fireZap": "Zapper"} | {f"fire_{k}": "ColorZapper" for k in (1, 2, 3)}
    detour = 8  # steps that it goes for a berry before it would rather plant

    def __init__(self, *args: Any):
        super().__init__(*args)
        looks = {one.name: one.rgba for one in self.sight.names.sprites}
        ripe = [looks[f"RipeBerry_{k}"].reshape(-1, 4).sum(0, dtype=int) for k in (1, 2, 3)]
        # Which of the numbers is the reddest, and which the greenest.
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
    """Goals: collect mushrooms that are good for oneself and others by halves (HIHE), for oneself
    (FIZE), for others (ZIFE), bad for all (NINE); destroy one of the first three (zap it)."""

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
        # Whoever walks over a mushroom eats it.
        far = self.ways(m, [kind for kind in kinds if kind != wanted or goal > 3])
        if goal < 4:
            action = self.fetch([wanted], far, m)
            if action is None:  # perhaps only through others
                action = self.fetch([wanted], self.ways(m), m)
        else:
            ready = float(seen["READY_TO_SHOOT"]) >= 1
            action = self.fire("fireZap", m.grid == wanted, far, m, ready)
        return self.explore(far, m) if action is None else action

    def walk(self, direction: int, m: Memory, look: bool = False) -> int:
        m.stuck = 0  # by digesting; to step aside would end on other mushrooms
        return super().walk(direction, m, look)


# --- gift_refinements -----------------------------------------------------------------------------


class GiftPuppet(Shooter):
    """Goals: collect tokens; gift (one gives up the most refined token one has, and who is hit gets
    several that are more refined); consume simple tokens, consume tokens, forage.

    Consuming takes all tokens at once. "Simple" asks for raw ones among them, "forage" for what one
    has collected oneself; both collect when there is nothing to consume.
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
    """Goals: claim near (the walls of one's own room, no others), claim far (those of other rooms:
    through one's wall, then by breaking through walls); destroy resources (others' first); zap
    others (breaking through walls, too).

    Walls are resources. To face one from the next cell claims it, as does the claiming beam, which
    goes through; two zaps destroy it.
    """

    things = ("UnclaimedResourceSprite",)  # and by Kind.pattern, those with a player's colour
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
                target[m.last[1], m.last[0]] = True  # where we have not looked since
        return self.dig(target, ready, resources, m) if action is None else action

    def claim(
        self, target: np.ndarray, walls: np.ndarray, far: np.ndarray, m: Memory
    ) -> int | None:
        """Fire at a wall of target; what the beam goes through counts as ours, as the beam hides
        it for a step."""
        action = self.fire("fireClaim", target, far, m)
        if action == self.action(fireClaim=1):
            for step in range(1, self.range["fireClaim"][0] + 1):
                x, y = m.x + DX[m.facing] * step, m.y + DY[m.facing] * step
                if 0 <= y < len(walls) and 0 <= x < walls.shape[1] and walls[y, x]:
                    m.grid[y, x] = self.code(f"Color{self.seat + 1}ResourceSprite")
        return action

    def home(self, far: np.ndarray, m: Memory) -> tuple[np.ndarray, np.ndarray]:
        """Cells of the room where we began, and what is next to it: (rows, columns) bool each;
        fixed as soon as all of the rim has been seen, so that broken walls do not enlarge it."""
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
        """Go to the nearest of target (rows, columns) bool, or where we have not looked for
        longest, breaking through walls that are resources."""
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
