"""A StarCraft II that is envs/smac/combat.py in disguise: it speaks the game's own messages.

`SimulatedGame` has the nine methods that envs/smac/game.py uses. It knows of battles only what it
is told in messages, as the game does: which units to create where, and what they are ordered. Run
as a program it is a game's executable, with a websocket that speaks to pysc2:

    python tests/sc2_controller.py -listen 127.0.0.1 -port PORT
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
from numba import njit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from s2clientprotocol import data_pb2, debug_pb2, raw_pb2
from s2clientprotocol import sc2api_pb2 as api

from envs.smac.combat import (
    BANELING,
    BATTLE,
    COLOSSUS,
    FIRST_MOVE,
    FIRST_TARGET,
    FLYING,
    HYDRALISK,
    MARAUDER,
    MARINE,
    MEDIVAC,
    MOVE,
    MOVES,
    NAMES,
    SHIELD,
    SIDE,
    SLOTS,
    STALKER,
    STOP,
    UNIT,
    ZEALOT,
    ZERGLING,
    Rules,
    arrange,
    clear,
    enlist,
    frame,
    give_orders,
    push_apart,
)
from envs.smac.game import GameFailed

IDS = {COLOSSUS: 4, MARINE: 48, MARAUDER: 51, MEDIVAC: 54, ZEALOT: 73, STALKER: 74}
IDS |= {BANELING: 9, ZERGLING: 105, HYDRALISK: 107}
CUSTOM = sorted(NAMES)  # as the map has them
# No random delays: as predictable as the tests.
RULES = Rules(0, False, False, 10**9, 1.0, once=False, bursts=True)


@njit  # not cached: Numba would not notice changes in combat.py
def line_up(units, types, sides, xs, ys):
    """Groups become units, as in the simulator's `begin`."""
    slots = [0, SIDE]
    for i in range(SLOTS):
        clear(units[i])
    for k in range(len(types)):
        enlist(units[slots[sides[k]]], types[k], xs[k], ys[k])
        slots[sides[k]] += 1
    for _ in range(200):
        if push_apart(units) < 0.01:
            break
    arrange(units)
    for i in range(SLOTS):
        units[i].tag = i % SIDE + SIDE * (i < SIDE)


@njit
def run(units, battles, frames, rules):
    for _ in range(frames):
        frame(units, battles[0], rules)


@njit
def clear_all(units):
    for i in range(SLOTS):
        clear(units[i])


class SimulatedGame:
    """first_custom: number of the map's first own unit type. delay: polls until units appear.
    fail(name): called before every request; may raise GameFailed."""

    version = "simulator"

    def __init__(self, first_custom: int = 1935, delay: int = 1, size: int = 32, fail=None):
        self.size, self.delay, self.fail = size, delay, fail or (lambda name: None)
        self.custom = {NAMES.index(name): first_custom + k for k, name in enumerate(CUSTOM)}
        self.units, self.battles = np.zeros(SLOTS, UNIT), np.zeros(1, BATTLE)
        clear_all(self.units)
        self.coming, self.due, self.control, self.ordered = [], 0, False, False
        self.made, self.killed, self.loop, self.rng = 0, 0, 0, np.random.default_rng(0)
        self.closed, self.log, self.names = False, [], [0] * SLOTS
        self.extra = 0  # units that nobody can kill

    def _note(self, name: str) -> None:
        self.log.append(name)
        self.fail(name)

    def create_game(self, request):
        self._note("create_game")
        kinds = [setup.type for setup in request.player_setup]
        assert kinds == [api.Participant, api.Computer] and not request.realtime
        assert request.player_setup[1].difficulty == api.VeryHard
        return api.ResponseCreateGame()

    def join_game(self, request):
        self._note("join_game")
        assert request.options.raw and request.race in (1, 2, 3)  # Terran, Zerg, Protoss
        return api.ResponseJoinGame(player_id=1)

    def game_info(self):
        self._note("game_info")
        info = api.ResponseGameInfo(map_name="empty_passive")
        info.start_raw.map_size.x = info.start_raw.map_size.y = self.size
        return info

    def data(self):
        self._note("data")
        own = {number: f"{NAMES[kind]}_RL" for kind, number in self.custom.items()}
        own = {number: name.replace("Colossus", "Colosus") for number, name in own.items()}
        named = {number: NAMES[kind] for kind, number in IDS.items()} | own
        units = [data_pb2.UnitTypeData(unit_id=n, name=name) for n, name in sorted(named.items())]
        return api.ResponseData(units=units)

    def debug(self, commands):
        self._note("debug")
        for command in commands:
            if command.HasField("game_state"):
                assert command.game_state == debug_pb2.control_enemy
                self.control = not self.control  # a switch, as in the game
            elif command.HasField("kill_unit"):
                assert set(command.kill_unit.tag) >= {n for i, n in self._living()}
                clear_all(self.units)
                self.killed += 1
            else:
                unit = command.create_unit
                side = unit.owner - 1
                ids = (self.custom, IDS)[side]
                kind = next(kind for kind, number in ids.items() if number == unit.unit_type)
                place = unit.pos.x - self._shift(), unit.pos.y - self._shift()
                self.coming += [(kind, side, *place)] * unit.quantity
                self.due = self.delay
        return api.ResponseDebug()

    def actions(self, request):
        self._note("actions")
        slots = {tag: i for i, tag in self._living()}
        chosen = np.zeros(SIDE, np.int64)
        for action in request.actions:
            command = action.action_raw.unit_command
            who = [slots[tag] for tag in command.unit_tags]
            if min(who) >= SIDE:
                assert command.ability_id == 23 and set(who) == {
                    i for i in slots.values() if i >= SIDE
                }
                if self.control:
                    place = command.target_world_space_pos
                    self.battles["goal_x"], self.battles["goal_y"] = place.x, place.y
                    self.battles["goal_x"] -= self._shift()
                    self.battles["goal_y"] -= self._shift()
                    self.ordered = True
                continue
            assert chosen[who[0]] == 0 and len(who) == 1
            chosen[who[0]] = self._action(who[0], command, slots)
        allies = [i for i in slots.values() if i < SIDE]
        if chosen.any():
            assert (chosen[allies] > 0).all()  # everyone has got an order
            give_orders(self.units, chosen)
        results = [1] * len(request.actions)
        return api.ResponseAction(result=results)

    def _action(self, i: int, command, slots: dict) -> int:
        """What an agent's command is in the simulator."""
        if command.ability_id == 4:
            return STOP
        if command.ability_id == 16:
            me, to = self.units[i], command.target_world_space_pos
            for k, (dx, dy) in enumerate(MOVES):
                x, y = me["x"] + MOVE * dx + self._shift(), me["y"] + MOVE * dy + self._shift()
                if np.float32(x) == np.float32(to.x) and np.float32(y) == np.float32(to.y):
                    return FIRST_MOVE + k
            raise AssertionError(f"{me['x'], me['y']} to {to.x, to.y} is no move")
        assert command.ability_id == (386 if self.units[i]["type"] == MEDIVAC else 23)
        return FIRST_TARGET + int(self.units[slots[command.target_unit_tag]]["tag"])

    def step(self, frames):
        self._note("step")
        self.loop += frames
        self.due -= 1
        if self.coming and self.due <= 0:
            types, sides, xs, ys = (np.array(row) for row in zip(*self.coming))
            line_up(self.units, types, sides, xs, ys)
            names = self.rng.permutation(SLOTS).tolist()  # the game's tags say nothing of slots
            self.names = [(1 << 32) + (self.made << 8) + n for n in names]
            self.coming, self.ordered, self.made = [], False, self.made + 1
        elif self.ordered:
            run(self.units, self.battles, frames, RULES)
        return api.ResponseStep()

    def observe(self):
        self._note("observe")
        answer = api.ResponseObservation()
        answer.observation.game_loop = self.loop
        rows = self._living()
        for k in self.rng.permutation(len(rows)).tolist():
            answer.observation.raw_data.units.append(self._unit(*rows[k]))
        for k in range(self.extra):
            answer.observation.raw_data.units.add(tag=k + 1, owner=16)
        return answer

    def close(self):
        self.closed = True

    def _living(self) -> list[tuple[int, int]]:
        return [(i, self.names[i]) for i in range(SLOTS) if self.units[i]["alive"]]

    def _shift(self) -> float:
        return (self.size - 32) / 2

    def _unit(self, i: int, tag: int):
        me, ally = self.units[i], i < SIDE
        kind = int(me["type"])
        unit = raw_pb2.Unit(
            display_type=raw_pb2.Visible,
            alliance=raw_pb2.Self if ally else raw_pb2.Enemy,
            owner=1 if ally else 2,
            tag=tag,
            unit_type=(self.custom if ally else IDS)[kind],
            health=me["health"],
            energy=me["energy"],
            is_flying=bool(FLYING[kind]),
        )
        unit.pos.x, unit.pos.y = me["x"] + self._shift(), me["y"] + self._shift()
        if SHIELD[kind]:
            unit.shield = me["shield"]
        if ally:  # the game does not say it of the enemy
            unit.weapon_cooldown = max(me["cooldown"], 0.0)
        return unit


# --- The same behind a websocket, for pysc2 -------------------------------------------------------


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            sys.exit(0)
        data += part
    return data


def read_frame(sock: socket.socket) -> bytes:
    """A client's message; RFC 6455, Sec. 5.2."""
    _, size = receive(sock, 2)
    size &= 127
    if size > 125:
        size = struct.unpack("!H" if size == 126 else "!Q", receive(sock, 2 if size == 126 else 8))[
            0
        ]
    mask, data = receive(sock, 4), receive(sock, size)
    return bytes(x ^ mask[k % 4] for k, x in enumerate(data))


def write_frame(sock: socket.socket, data: bytes) -> None:
    size = struct.pack("!B", len(data)) if len(data) < 126 else struct.pack("!BH", 126, len(data))
    sock.sendall(b"\x82" + size + data)


def serve(port: int, misbehave: str) -> None:
    """misbehave: crash, quits at its 40th step; hang, falls silent there."""
    listener = socket.create_server(("127.0.0.1", port))
    sock, _ = listener.accept()
    header = b""
    while b"\r\n\r\n" not in header:
        header += sock.recv(4096)
    lines = dict(x.split(": ", 1) for x in header.decode().split("\r\n")[1:] if ": " in x)
    key = lines["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    sock.sendall(f"{head}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())
    game, status = SimulatedGame(), api.launched
    while True:
        request = api.Request.FromString(read_frame(sock))
        name = request.WhichOneof("request")
        if name == "step" and game.log.count("step") == 40:
            if misbehave == "crash":
                os._exit(1)
            if misbehave == "hang":
                time.sleep(60)
        if name == "quit":
            sys.exit(0)
        answer = {
            "ping": lambda r: api.ResponsePing(game_version="4.10.0", base_build=75689),
            "create_game": game.create_game,
            "join_game": game.join_game,
            "game_info": lambda r: game.game_info(),
            "data": lambda r: game.data(),
            "debug": lambda r: game.debug(r.debug),
            "action": game.actions,
            "step": lambda r: game.step(r.count),
            "observation": lambda r: game.observe(),
        }[name](getattr(request, name))
        status = {"create_game": api.init_game, "join_game": api.in_game}.get(name, status)
        response = api.Response(id=request.id, status=status, **{name: answer})
        write_frame(sock, response.SerializeToString())


def failing(name: str, after: int, text: str = "it has quit"):
    """For `fail`: GameFailed at the request of this name that comes after so many others."""
    seen = [0]

    def fail(asked: str) -> None:
        if asked == name:
            seen[0] += 1
            if seen[0] > after:
                raise GameFailed(text)

    return fail


if __name__ == "__main__":
    arguments = sys.argv[1:]
    serve(int(arguments[arguments.index("-port") + 1]), os.environ.get("MISBEHAVE", ""))
