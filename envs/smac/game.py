"""One interface over the simulator and the real StarCraft II.

    battles = make_battles("sc2", "sz", (3, 4, 5), num_battles=4, seed=1)    # or "sim"
    obs = battles.reset()
    step = battles.step(actions)
    battles.close()

`RealBattles` is `Combat` (envs/smac/combat.py) with the game in the place of its rules. The
simulator's own code draws teams, places and tags, and computes rewards, ends, observations, masks
and available actions from a Snapshot that is read from the game. An episode follows REFIL (Iqbal et
al., 2021): kill all units, create the teams by debug commands, send the enemy once to where the
agents stand; then each step sends raw unit commands and plays 8 frames.

The game is not part of this project and was not available when this was written: docs/starcraft.md
says how to install it, what was tested without it, and what has never run. A game is reached
through a controller: an object with nine methods (create_game, join_game, game_info, data, debug,
actions, step, observe, close) and a version. `StarCraft` controls the real game;
tests/sc2_controller.py has a controller backed by the simulator. Both raise GameFailed.

A game that fails is started again. The episode in which it fails is lost: it ends at that step,
truncated, not won, with reward 0 for the step (as in SMAC), and is counted in `lost`. A game that
fails `FAILURES` times in a row without finishing an episode, and any fault that a new start cannot
repair, raises BattleError; its message is one sentence.
"""

from __future__ import annotations

import atexit
import math
import os
import platform
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from envs.smac.combat import (
    EPISODE_LIMIT,
    FIRST_TARGET,
    FRAMES,
    MAP,
    MEDIVAC,
    MOVE,
    MOVES,
    NAMES,
    NOBODY,
    SIDE,
    STOP,
    ZERGLING,
    Combat,
    Family,
    begin,
    begin_all,
    observe,
    outcome,
    stream,
    strength,
    uniform,
)

ABILITIES = {"move": 16, "attack": 23, "stop": 4, "heal": 386}
OWNERS = (1, 2)  # player numbers of the agents and of the enemy
WAIT, POLL = 100, 2  # look at most WAIT times, every POLL frames, whether units have come or gone
FAILURES = 3  # failures of one game in a row, without a finished episode, until BattleError
FOLLOWED = 0.1  # map units that at least one enemy moves in the first step if it got its order
HOMES = {
    "Linux": "~/StarCraftII",
    "Darwin": "/Applications/StarCraft II",
    "Windows": "C:/Program Files (x86)/StarCraft II",
}
INSTALL = "pip install --no-deps -r requirements-sc2.txt"
ELSE = "(docs/starcraft.md; without the game: --backend sim)"


class BattleError(RuntimeError):
    """StarCraft II cannot be played, or cannot go on; the message is one sentence."""


class GameFailed(Exception):
    """A controller's game gave no answer or a wrong one; starting it again may help."""


def make_battles(
    backend: Literal["sim", "sc2"] = "sc2",
    scenario: str = "sz",
    team_sizes: tuple[int, ...] = (3, 4, 5),
    num_battles: int = 1,
    seed: int = 1,
    **options: Any,
) -> Combat:
    """Combat (backend "sim") or RealBattles ("sc2"); options are further arguments of the class.

    ValueError for an unknown backend, scenario or team size, and for the simulator's options with
    "sc2"; BattleError if StarCraft II cannot be played."""
    kinds = {"sim": Combat, "sc2": RealBattles}
    if backend not in kinds:
        raise ValueError(f"There is no backend {backend!r}: there are {', '.join(kinds)}.")
    for name in ("enemy_ai", "weapon_delay", "threads"):
        if backend == "sc2" and name in options:
            raise ValueError(f"{name} is the simulator's: StarCraft II has its own.")
    return kinds[backend](scenario, team_sizes, num_battles, seed, **options)


# --- The game, through pysc2 ----------------------------------------------------------------------


def messages() -> SimpleNamespace:
    """The modules of s2clientprotocol that are used; BattleError if they cannot be imported."""
    try:
        from s2clientprotocol import common_pb2, debug_pb2, raw_pb2, sc2api_pb2
    except ImportError:
        raise BattleError(f"s2clientprotocol is not installed: {INSTALL} {ELSE}.") from None
    except TypeError:  # its files are from before protobuf 4
        name = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
        raise BattleError(
            f"s2clientprotocol needs the environment variable {name}=python, set before Python "
            "starts, with protobuf 4 or newer (docs/starcraft.md)."
        ) from None
    return SimpleNamespace(common=common_pb2, debug=debug_pb2, raw=raw_pb2, api=sc2api_pb2)


def find_game() -> Path:
    """The folder of StarCraft II, SC2PATH or the usual one; BattleError if no game is there."""
    home = Path(os.environ.get("SC2PATH") or HOMES.get(platform.system(), HOMES["Linux"]))
    home = home.expanduser()
    if not any((home / "Versions").glob("Base*")):
        raise BattleError(
            f"StarCraft II is not at {home}: get it at github.com/Blizzard/s2client-proto"
            f"#downloads and set SC2PATH to where it is {ELSE}."
        )
    return home


def find_map(home: Path, name: str) -> Path:
    """The file of the map `name` in the game's folder; BattleError if there is none."""
    folder = home / "Maps"
    found = sorted(folder.rglob(f"{name}.SC2Map"))
    if not found:
        raise BattleError(
            f"There is no {name}.SC2Map in {folder}: put the files of SMAC_Maps there, which REFIL "
            "has at github.com/shariqiqbal2810/REFIL, src/envs/starcraft2/maps (docs/starcraft.md)."
        )
    return found[0]


def import_pysc2() -> Any:
    """pysc2.run_configs; BattleError if it is not installed."""
    messages()
    try:
        from absl import flags
        from pysc2 import run_configs
    except ImportError as error:
        raise BattleError(
            f"pysc2 cannot be imported ({error}): {INSTALL}; `smac` on PyPI is something else "
            "and not needed (docs/starcraft.md)."
        ) from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # pysc2 reads its default options from absl's flags
    return run_configs


class StarCraft:
    """A controller of the game in its own process. An answer may take at most `timeout` seconds."""

    def __init__(self, config: Any, version: str, timeout: int):
        self.version, self.timeout, self.process = version, timeout, None
        self.process = self._ask(config.start, want_rgb=False, timeout_seconds=timeout)
        self.remote = self.process.controller

    def create_game(self, request: Any) -> Any:
        return self._ask(self.remote.create_game, request)

    def join_game(self, request: Any) -> Any:
        return self._ask(self.remote.join_game, request)

    def game_info(self) -> Any:
        return self._ask(self.remote.game_info)

    def data(self) -> Any:
        only = dict(ability_id=False, upgrade_id=False, buff_id=False, effect_id=False)
        return self._ask(self.remote.data_raw, **only)

    def debug(self, commands: list) -> Any:
        return self._ask(self.remote.debug, commands)

    def actions(self, request: Any) -> Any:
        return self._ask(self.remote.actions, request)

    def step(self, frames: int) -> Any:
        return self._ask(self.remote.step, frames)

    def observe(self) -> Any:
        return self._ask(self.remote.observe)

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            try:
                process.close()  # asks it to quit, then ends it within about three seconds
            except Exception as error:
                warnings.warn(f"StarCraft II did not close properly: {error}", stacklevel=2)

    def _ask(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """call()'s answer. Raises GameFailed for any exception, as pysc2's have no common class."""
        try:
            answer = call(*args, **kwargs)
        except Exception as error:
            text = " ".join((str(error) or type(error).__name__).split())[:300].rstrip(".")
            if "timed out" in text:
                text = f"no answer within {self.timeout} s"
            elif "already closed" in text or "Socket error" in text or "empty response" in text:
                text = "it has quit"
            raise GameFailed(text) from None
        if answer is None:  # pysc2 caught the exception "Game has already ended"
            raise GameFailed("the game has ended by itself")
        return answer


# --- One game and the battle in it ----------------------------------------------------------------


def draw(units: Any, battle: Any, number: int, setup: Any) -> np.ndarray:
    """Begin the next episode of a battle in units (A+E,) and battle, as the simulator draws it.
    Returns (2, T, 2) float64: at which point each side's groups are created, in order of slots."""
    points, episode = np.zeros((2, len(setup.types), 2)), battle["episode"]
    begin(units, battle, number, setup)
    battle["random"] = stream(setup.seed, setup.first_battle + number, episode)  # draw again
    uniform(battle)  # skips the number that has drawn the team
    angle = 2 * math.pi * uniform(battle)
    for side, t in np.ndindex(points.shape[:2]):
        out = 7.0 - 14.0 * side
        x, y = MAP / 2 + out * math.cos(angle), MAP / 2 + out * math.sin(angle)
        points[side, t] = x + (2 * uniform(battle) - 1), y + (2 * uniform(battle) - 1)
    return points


def unit_ids(data: Any, family: Family, map_name: str) -> tuple[dict[int, int], dict[int, int]]:
    """{type: game's number} of the agents' passive units and of the enemy's. They are found by name
    in ResponseData: the numbers differ between versions. BattleError if a name is missing."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "").replace(" ", "")

    ids: dict[str, int] = {}
    for unit in sorted(data.units, key=lambda unit: unit.unit_id):
        ids.setdefault(plain(unit.name), unit.unit_id)
    if "colosusrl" in ids:  # REFIL's and SMAC's maps spell it so
        ids.setdefault("colossusrl", ids["colosusrl"])
    names = [NAMES[kind] for kind in family.types]
    missing = [f"{name}_RL" for name in names if plain(f"{name}_RL") not in ids]
    missing += [name for name in names if plain(name) not in ids]
    if missing:
        last = ", ".join(unit.name for unit in data.units[-9:])
        raise BattleError(
            f"The map {map_name} has no unit types {', '.join(missing)}: its last are {last}."
        )
    passive = {kind: ids[plain(f"{NAMES[kind]}_RL")] for kind in family.types}
    return passive, {kind: ids[plain(NAMES[kind])] for kind in family.types}


class Game:
    """One game. Raises GameFailed; BattleError if its map is too small or lacks a unit type."""

    def __init__(self, controller: Any, family: Family, map_path: Path, map_data: bytes, seed: int):
        self.controller, self.family, self.pb = controller, family, messages()
        self.episodes, self.slots, self.tags = 0, {}, {}  # {tag: slot} and {slot: tag} of units
        api, common = self.pb.api, self.pb.common
        race = common.Terran if MEDIVAC in family.types else common.Protoss
        race = common.Zerg if ZERGLING in family.types else race
        path = f"{map_path.parent.name}/{map_path.name}"
        create = api.RequestCreateGame(
            local_map=api.LocalMap(map_path=path, map_data=map_data),
            realtime=False,
            random_seed=seed,
        )
        create.player_setup.add(type=api.Participant)
        create.player_setup.add(type=api.Computer, race=race, difficulty=api.VeryHard)
        controller.create_game(create)
        options = api.InterfaceOptions(raw=True, score=False)
        controller.join_game(api.RequestJoinGame(race=race, options=options))
        size = controller.game_info().start_raw.map_size
        if min(size.x, size.y) < MAP:
            raise BattleError(
                f"The map {map_path.stem} is {size.x} x {size.y}: 32 x 32 are needed."
            )
        self.shift = (size.x - MAP) / 2, (size.y - MAP) / 2  # game's places less simulator's
        self.ids = unit_ids(controller.data(), family, map_path.stem)
        # Sent once per game: sending control_enemy again may take the control away.
        controlled = self.pb.debug.DebugCommand(game_state=self.pb.debug.control_enemy)
        controller.debug([controlled])

    def create(self, drawn: np.ndarray, team: np.ndarray, points: np.ndarray, setup: Any) -> None:
        """Kill all units and create teams: drawn (A+E,) UNIT has the type of each slot, team (T,)
        the number of units of each type, points (2, T, 2) the place of each side's groups."""
        debug = self.pb.debug
        if tags := [unit.tag for unit in self.units()]:
            killed = debug.DebugKillUnit(tag=tags)
            self.controller.debug([debug.DebugCommand(kill_unit=killed)])
        self.wait_for(0)
        commands = []
        for side, t in np.ndindex(2, len(setup.types)):
            group = setup.allies[t] if side == 0 else t
            if team[group]:
                unit = debug.DebugCreateUnit(
                    unit_type=self.ids[side][setup.types[group]],
                    owner=OWNERS[side],
                    pos=self.point(*points[side, t]),
                    quantity=int(team[group]),
                )
                commands.append(debug.DebugCommand(create_unit=unit))
        self.controller.debug(commands)
        self.seat(drawn, self.wait_for(2 * int(team.sum())))
        self.episodes += 1

    def seat(self, drawn: np.ndarray, units: list) -> None:
        """Give the game's units the slots of their side and type, in order of x, then y."""
        self.slots, seats = {}, np.arange(2 * SIDE)
        for side in range(2):
            for kind, number in self.ids[side].items():
                mine = [u for u in units if (u.owner, u.unit_type) == (OWNERS[side], number)]
                mine.sort(key=lambda u: (u.pos.x, u.pos.y))
                wanted = seats[(drawn["type"] == kind) & (seats // SIDE == side)].tolist()
                if len(mine) != len(wanted):
                    raise GameFailed(f"there are {len(mine)} {NAMES[kind]}s, not {len(wanted)}")
                self.slots |= {u.tag: slot for u, slot in zip(mine, wanted)}
        self.tags = {slot: tag for tag, slot in self.slots.items()}

    def send_enemy(self, snap: Any, b: int) -> None:
        """Give the enemy its one order: attack-move to the mean place of the agents of battle b."""
        x = y = np.float32(0)
        allies = [slot for slot in self.tags if slot < SIDE]
        for i in sorted(allies):  # in the simulator's order and precision, for equal bits
            x = np.float32(float(x) + float(snap.x[b, i]) / len(allies))
            y = np.float32(float(y) + float(snap.y[b, i]) / len(allies))
        enemies = [tag for slot, tag in sorted(self.tags.items()) if slot >= SIDE]
        self.act([self.command("attack", enemies, target_world_space_pos=self.point(x, y))])

    def order(self, actions: np.ndarray, snap: Any, b: int) -> None:
        """Send the agents' actions (A,) to the game, one command for each living agent."""
        commands = []
        for i, action in enumerate(actions.tolist()):
            if not snap.alive[b, i]:
                continue
            if action >= FIRST_TARGET:
                heals = snap.type[b, i] == MEDIVAC
                known = (snap.tag[b] == action - FIRST_TARGET) & (snap.type[b] != NOBODY)
                target = self.tags[int(known.argmax())]
                about = "heal" if heals else "attack", {"target_unit_tag": target}
            elif action == STOP:
                about = "stop", {}
            else:
                dx, dy = MOVES[action - STOP - 1]
                place = self.point(snap.x[b, i] + MOVE * dx, snap.y[b, i] + MOVE * dy)
                about = "move", {"target_world_space_pos": place}
            commands.append(self.command(about[0], [self.tags[i]], **about[1]))
        self.act(commands)

    def read(self, snap: Any, b: int) -> None:
        """Write the game's state to snap[b]. A unit that is not seen is dead; its place is kept."""
        units = self.units()
        for field in (snap.alive, snap.health, snap.shield, snap.energy, snap.cooldown):
            field[b] = 0
        for unit in units:
            i = self.slots.get(unit.tag, NOBODY)
            if i == NOBODY:
                continue
            snap.alive[b, i] = True
            snap.x[b, i], snap.y[b, i] = unit.pos.x - self.shift[0], unit.pos.y - self.shift[1]
            snap.health[b, i], snap.shield[b, i] = unit.health, unit.shield
            snap.energy[b, i], snap.cooldown[b, i] = unit.energy, unit.weapon_cooldown  # in frames

    def units(self) -> list:
        answer = self.controller.observe()
        if answer.player_result:
            raise GameFailed("the game has ended by itself")
        return list(answer.observation.raw_data.units)

    def wait_for(self, number: int) -> list:
        """All units, once there are `number` of them; GameFailed after WAIT looks without that."""
        for _ in range(WAIT):
            units = self.units()
            if len(units) == number:
                return units
            self.controller.step(POLL)
        raise GameFailed(f"{len(units)} units are there after {WAIT * POLL} frames, not {number}")

    def act(self, commands: list) -> None:
        api, raw = self.pb.api, self.pb.raw
        actions = [api.Action(action_raw=raw.ActionRaw(unit_command=c)) for c in commands]
        self.controller.actions(api.RequestAction(actions=actions))

    def command(self, name: str, tags: list[int], **target: Any) -> Any:
        return self.pb.raw.ActionRawUnitCommand(
            ability_id=ABILITIES[name], unit_tags=tags, queue_command=False, **target
        )

    def point(self, x: float, y: float) -> Any:
        return self.pb.common.Point2D(x=float(x) + self.shift[0], y=float(y) + self.shift[1])


# --- Battles --------------------------------------------------------------------------------------


class RealBattles(Combat):
    """num_battles battles of one scenario in StarCraft II, each in its own game and thread.

    Other arguments are as in Combat. ValueError for arguments that are not allowed, BattleError for
    what is not installed or fails for good. reset() starts the games. The attribute `lost` counts,
    for each battle, the episodes that a failing game has cut short.

    map_name       a map of at least 32 x 32, open, empty, without fog, with passive unit types
    game_version   as pysc2 names it ("4.10.0"); default: the newest installed version
    timeout        seconds that a game may take to start or to answer
    restart_every  episodes after which a game is replaced by a new one, as its memory grows
    launch         makes a controller that is used instead of the real game's

    Teams, tags and the groups' places are those that the simulator draws for the same seed, battle
    and episode; the game itself is not reproducible.
    """

    def __init__(
        self,
        scenario: str = "sz",
        team_sizes: tuple[int, ...] = (3, 4, 5),
        num_battles: int = 1,
        seed: int = 1,
        first_battle: int = 0,
        clip_regeneration: bool = False,
        episode_limit: int = EPISODE_LIMIT,
        once: bool = False,
        map_name: str = "empty_passive",
        game_version: str | None = None,
        timeout: int = 120,
        restart_every: int = 500,
        launch: Callable[[], Any] | None = None,
    ):
        rules = dict(clip_regeneration=clip_regeneration, episode_limit=episode_limit, once=once)
        super().__init__(scenario, team_sizes, num_battles, seed, first_battle, **rules)
        for name, x in (("timeout", timeout), ("restart_every", restart_every)):
            if x < 1 or x != int(x):
                raise ValueError(f"{name} is a whole number of at least 1: not {x}.")
        self.launch, self.restart_every = launch, restart_every
        self.map_path, self.map_data, self.game_version = Path(f"{map_name}.SC2Map"), b"", "none"
        if launch is None:
            self._find(map_name, game_version, int(timeout))
        self.games: list[Game | None] = [None] * num_battles
        self.failures, self.starts = [0] * num_battles, [0] * num_battles
        self.lost, self.closed = [0] * num_battles, False
        self.pool = ThreadPoolExecutor(num_battles) if num_battles > 1 else None

    def _find(self, map_name: str, version: str | None, timeout: int) -> None:
        run_configs, home = import_pysc2(), find_game()
        self.map_path = find_map(home, map_name)
        self.map_data = self.map_path.read_bytes()
        try:
            config = run_configs.get(version=version)
        except Exception as error:
            raise BattleError(f"pysc2 finds no game at {home}: {error}") from None
        build = config.version.build_version
        known = run_configs.lib.VERSIONS.values()
        names = [v.game_version for v in known if v.build_version == build]
        self.game_version = f"{version or (names or ['unknown'])[0]} (build {build})"
        self.launch = lambda: StarCraft(config, self.game_version, timeout)

    def close(self) -> None:
        """End all games. reset() starts them again."""
        self.closed = True
        atexit.unregister(self.close)
        for b in range(self.num_battles):
            self._end_game(b)

    def state_dict(self) -> dict[str, Any]:
        """How many episodes each battle has begun, (B,). A battle in the game cannot be saved: call
        reset() after load_state_dict(); it begins the next episodes."""
        episodes = torch.from_numpy(self.battles["episode"].copy())
        return {"episodes": episodes, "teams": f"{self.family.name} {self.teams}"}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a state_dict(); ValueError if it has other teams or another number of battles."""
        mine = self.state_dict()
        same = saved["teams"] == mine["teams"] and "episodes" in saved
        if not same or saved["episodes"].shape != mine["episodes"].shape:
            raise ValueError(f"This state is not of {self.num_battles} battles of {mine['teams']}.")
        self.battles["episode"] = saved["episodes"].numpy()
        for game in filter(None, self.games):
            game.slots = {}

    def _run(self, kernel: Any, *args: Any) -> None:
        """Do in the games what the kernel (begin_all or advance) of reset() or step() simulates."""
        if kernel is begin_all:
            self.closed = False
            jobs = [(self._begin, b) for b in range(self.num_battles)]
        else:
            busy = [b for b in range(self.num_battles) if not self.battles["over"][b]]
            if not all(self.games[b] and self.games[b].slots for b in busy):
                raise ValueError("After load_state_dict() or close() comes reset().")
            jobs = [(self._advance, b, args[2][b]) for b in range(self.num_battles)]
        if self.pool is None:
            for job, *given in jobs:
                job(*given)
            return
        running = [self.pool.submit(*job) for job in jobs]
        wait(running)
        for job in running:
            job.result()

    def _begin(self, b: int) -> None:
        """Begin a new episode of battle b; start or restart its game if necessary."""
        snap, drawn = self._snap, self.units[b]
        points = draw(drawn, self.battles[b], b, self.setup)
        self.battles["over"][b] = False
        team = self.setup.teams[self.battles["team"][b]]
        while True:
            try:
                game = self._game(b)
                game.create(drawn, team, points, self.setup)
                snap.type[b], snap.tag[b] = drawn["type"], drawn["tag"]
                snap.x[b] = snap.y[b] = 0.0
                game.read(snap, b)
                game.send_enemy(snap, b)
                break
            except GameFailed as failure:
                self._fail(b, failure)
        observe(snap, b, self.setup, self._obs)

    def _advance(self, b: int, actions: np.ndarray) -> None:
        """Play a step of battle b; write to results and final what Combat's `advance` writes."""
        snap, results, battle = self._snap, self._results, self.battles[b]
        results.reward[b], results.won[b] = 0.0, False
        results.terminated[b] = results.truncated[b] = False
        if battle["over"]:
            return
        battle["time"] += 1
        try:
            done = self._play(b, actions)
            if done[1] or done[2]:
                self.failures[b] = 0
        except GameFailed as failure:
            self._fail(b, failure)
            self.lost[b] += 1
            done = 0.0, False, True, False
        for mine, last in zip(snap, self._final):
            last[b] = mine[b]
        results.reward[b], results.terminated[b], results.truncated[b], results.won[b] = done
        battle["reward"] += done[0]
        if done[1] or done[2]:
            results.length[b], results.sum[b] = battle["time"], battle["reward"]
            results.team[b] = battle["team"]
            if not self.rules.once:
                self._begin(b)
            battle["over"] = self.rules.once
        observe(snap, b, self.setup, self._obs)

    def _play(self, b: int, actions: np.ndarray) -> tuple[float, bool, bool, bool]:
        """Play FRAMES frames of battle b; returns reward, terminated, truncated, won."""
        game, snap, battle = self.games[b], self._snap, self.battles[b]
        before, x, y = strength(snap, b), snap.x[b].copy(), snap.y[b].copy()
        game.order(actions, snap, b)
        game.controller.step(FRAMES)
        game.read(snap, b)
        if battle["time"] == 1 and np.hypot(snap.x[b] - x, snap.y[b] - y)[SIDE:].max() < FOLLOWED:
            raise GameFailed("the enemy does not follow its order")
        return outcome(before, strength(snap, b), battle["time"], self.rules)

    def _game(self, b: int) -> Game:
        """The game of battle b; a new one if there is none or after `restart_every` episodes."""
        if self.games[b] is not None and self.games[b].episodes >= self.restart_every:
            self._end_game(b)
        if self.games[b] is None:
            number = self.setup.first_battle + b, self.starts[b]
            seed = np.random.SeedSequence((self.setup.seed, *number)).generate_state(1)
            self.starts[b] += 1
            atexit.register(self.close)
            controller = self.launch()
            try:
                about = self.map_path, self.map_data, int(seed[0])
                self.games[b] = Game(controller, self.family, *about)
            except BaseException:
                controller.close()
                raise
            self.game_version = controller.version
        if self.closed:  # by another thread, while the game was starting
            self._end_game(b)
            raise BattleError("The battles were closed while they were played.")
        return self.games[b]

    def _fail(self, b: int, failure: GameFailed) -> None:
        """End the game of battle b after a failure; BattleError at the FAILURES-th in a row."""
        self._end_game(b)
        self.failures[b] += 1
        if self.failures[b] >= FAILURES:
            raise BattleError(
                f"StarCraft II (battle {b}) failed {FAILURES} times in a row, the last time with: "
                f"{failure} (docs/starcraft.md)."
            ) from None
        warnings.warn(f"StarCraft II (battle {b}) is started again: {failure}.", stacklevel=2)

    def _end_game(self, b: int) -> None:
        game, self.games[b] = self.games[b], None
        if game is not None:
            game.controller.close()
