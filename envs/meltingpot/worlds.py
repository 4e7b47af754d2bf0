"""Melting Pot for training: many worlds at once, with observations as tile ids.

Every image that Melting Pot draws is a grid of sprites of 8 x 8 pixels. `MeltingPot` returns
`tile_ids  # (B, N, H, W)`, row numbers of one growing palette of sprites, instead of pixels: a
hundredth of the memory. `images()` rebuilds the pixels exactly. Letters: B worlds, N players, H W
rows and columns of tiles, F features, A actions; H' W' for the global view.

The engine is dmlab2d. The official wrapper reads all of its observations through five layers of
Python; this file reads only those that are used, directly. tests/worlds/test_meltingpot.py compares
this file with the official wrapper on the same engine.

Worlds live in worker processes, several per worker, and write into shared memory. An engine serves
one episode and is then replaced by a new one, as in the official wrapper. Every world's next engine
is built ahead of time, so that no world has to wait for it when an episode ends. A build blocks its
process, as engines hold the GIL. Short builds (chicken 0.04 s, coins 0.14 s) are therefore done by
the world's own worker while the trainer learns; the trainer calls `check()` once before it learns.
Long builds (coop_mining 1.5 s, chemistry 13 s) are done by standby processes, which step no world.
Each episode has its own seed (seed, world, episode); coins, e.g., draws its colours and its map
from it. The engine itself is not reproducible, even with equal seeds.

WorldError ends the run if a worker dies that serves worlds, or if an answer that the trainer waits
for does not come. A worker that serves no world may be slow; it is replaced if it dies.

    envs = MeltingPot("coins", num_envs=16, seed=1)
    obs = envs.reset() # tiles.Observation: tile_ids, world_ids, features
    step = envs.step(actions) # (B, N) ints -> tiles.Step: obs, reward, terminated, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import importlib
import importlib.util
import math
import mmap
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np

from envs.meltingpot.tiles import (
    CAPACITY,
    SPRITE,
    WORDS,
    EpisodeCounter,
    Observation,
    Palette,
    Spec,
    Step,
    WorldError,
    ids_to_images,
)

ROOT = Path(__file__).resolve().parents[2]

# The engine's events that count as pick-ups; each with the key of the player's number (from 1).
PICK_UPS = {
    "acorn_collected": b"player_index",
    "apple_consumed": b"player_index",
    "claimed_resource": b"player_index",
    "coin_consumed": b"player_index",
    "collected_resource": b"player_index",
    "eating": b"player_index",
    "eating_mushroom": b"player_index",
    "edible_consumed": b"player_index",
    "extraction": b"player",
    "flag_picked_up": b"player_index",
    "fruit_eaten": b"player_index",
    "gem": b"player_index",
    "receiver_accepted_item": b"player_index",
}


# --- Melting Pot without its heavy imports -------------------------------------------------------


def import_meltingpot(bots: bool = False) -> types.ModuleType:
    """Import and return meltingpot; unless `bots`, without tensorflow and chex (0.2 s, not 4 s).

    Only official bots use these two packages. While meltingpot is imported, placeholders replace
    them in sys.modules. They are removed afterwards, because TensorBoard, e.g., looks for
    tensorflow. ModuleNotFoundError, with one sentence, names the package that is not installed.
    """
    if "meltingpot" in sys.modules:
        return sys.modules["meltingpot"]
    for name in ("meltingpot", "dmlab2d"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed: `make setup`, or --substrate toy.")
    needs = "is needed by the official bots only: pip install -r requirements-bots.txt"
    if bots:
        for name in ("tensorflow", "chex"):
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"{name} {needs}")
        return importlib.import_module("meltingpot")

    def placeholder(name: str, **members: Any) -> types.ModuleType:
        module = types.ModuleType(name, f"Placeholder: {name} {needs}")

        def missing(attribute: str) -> Any:
            raise ModuleNotFoundError(f"{name}.{attribute}: {name} {needs}")

        module.__dict__.update(members, __getattr__=missing)
        return module

    fakes = {
        "chex": placeholder("chex", dataclass=dataclasses.dataclass),
        "tensorflow": placeholder("tensorflow", Tensor=object, executing_eagerly=lambda: True),
    }
    saved = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        return importlib.import_module("meltingpot")
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def substrates() -> list[str]:
    """Names of all substrates of Melting Pot, sorted; ModuleNotFoundError without meltingpot."""
    import_meltingpot()
    from meltingpot.configs import substrates as configs

    return sorted(configs.SUBSTRATES)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send descriptors 1 and 2 to /dev/null: building an engine prints hundreds of lines."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1), os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for fd in (*saved, null):
            os.close(fd)


# --- What a substrate looks like -----------------------------------------------------------------


def get_spec(
    name: str, roles: tuple[str, ...] | None = None, others: tuple[str, ...] = ("toy",)
) -> Spec:
    """Spec of a substrate with these roles (default: its own), or of a scenario with its own roles
    and focal players. ValueError: unknown name, with names like it, also of `others`, which the
    caller knows besides; ModuleNotFoundError: no meltingpot."""
    import_meltingpot()
    from meltingpot import scenario
    from meltingpot.configs import substrates as configs

    is_focal = None
    substrate = name
    if name in scenario.SCENARIOS:
        config = scenario.get_config(name)
        substrate, roles, is_focal = config.substrate, tuple(config.roles), tuple(config.is_focal)
    if substrate not in configs.SUBSTRATES:
        known = [*configs.SUBSTRATES, *others]
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        near = [x for x in known if name and x.startswith(name)] or near
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "see docs/meltingpot.md for the list."
        )
        raise ValueError(f"Unknown substrate '{name}': {hint}")
    config = configs.get_config(substrate)
    roles = tuple(roles or config.default_player_roles)
    seen = config.timestep_spec.observation
    # COLLECTIVE_REWARD is permitted, too, but it is a reward, not an observation of the player.
    permitted = sorted(scenario.PERMITTED_OBSERVATIONS - {"RGB", "COLLECTIVE_REWARD"})
    return Spec(
        substrate=substrate,
        roles=roles,
        is_focal=is_focal or (True,) * len(roles),
        actions=tuple(dict(action) for action in config.action_set),
        grid=tuple(size // SPRITE for size in seen["RGB"].shape[:2]),
        world_grid=tuple(size // SPRITE for size in seen["WORLD.RGB"].shape[:2]),
        features=tuple(
            (key, int(np.prod(seen[key].shape)))
            for key in permitted
            if key in config.individual_observation_names
        ),
    )


# --- One engine ----------------------------------------------------------------------------------


class Engine:
    """One episode of a substrate in a dmlab2d engine, which is read directly.

    seed: integers, e.g. (seed, world, episode). ValueError if images have not the size in `spec`.
    """

    def __init__(self, spec: Spec, seed: tuple[int, ...]):
        rng = np.random.default_rng(seed)
        self.attach(spec, build_lab(spec, rng))
        with quiet():
            self.lab.start(0, seed=int(rng.integers(2**31)))

    def attach(self, spec: Spec, lab: Any) -> None:
        """Look up what is read from `lab`, a dmlab2d.Lab2d; ValueError if it contradicts `spec`."""
        from dmlab2d import RUNNING as running

        self.spec, self.lab, self.running = spec, lab, running
        players = range(1, spec.num_agents + 1)
        available = set(lab.observation_names())
        for name, grid in (("1.RGB", spec.grid), ("WORLD.RGB", spec.world_grid)):
            shape = tuple(int(size) for size in lab.observation_spec(name)["shape"])
            if shape != (SPRITE * grid[0], SPRITE * grid[1], 3):
                raise ValueError(f"{spec.substrate}: {name} is {shape}, not {grid} sprites.")
        self.rgb = [f"{i}.RGB" for i in players]
        self.rewards = [f"{i}.REWARD" for i in players]
        self.feature_names, first = [], 0  # (player, first column, end column, observation name)
        for name, length in spec.features:
            for i in players:
                if f"{i}.{name}" in available:
                    self.feature_names.append((i - 1, first, first + length, f"{i}.{name}"))
            first += length
        # The engine lists its action names in no particular order ("4.move" may come first).
        names = [name.split(".", 1) for name in lab.action_discrete_names()]
        self.action_player = np.array([int(player) - 1 for player, _ in names])
        table = [[action[key] for _, key in names] for action in spec.actions]
        self.action_table = np.array(table, np.int32)  # (A, action names)
        self.columns = np.arange(len(names))

    def step(self, actions: np.ndarray) -> bool:
        """Advance by one step with actions (N,) int in 0..A - 1; True if the episode goes on."""
        self.lab.act_discrete(self.action_table[actions[self.action_player], self.columns])
        status, _ = self.lab.advance()
        return status == self.running

    def read_rewards(self, reward: np.ndarray, pick_ups: np.ndarray) -> None:
        """Write the last step's rewards (N,) float64 and numbers of pick-ups (N,) int64."""
        observe = self.lab.observation
        reward[:] = [observe(name) for name in self.rewards]
        pick_ups[:] = 0
        for name, items in self.lab.events():
            key = PICK_UPS.get(name)
            if key is not None:
                names = items[1::2]  # items: "dict", name, value, name, value, ...
                pick_ups[int(items[2 + 2 * names.index(key)]) - 1] += 1

    def observe(self, palette: Palette, out: Observation) -> None:
        """Write tile_ids (N, H, W), world_ids (H', W') and features (N, F) to `out`."""
        tile_ids, world_ids, features = out
        observe = self.lab.observation
        for player, name in enumerate(self.rgb):
            palette.encode(observe(name), tile_ids[player])
        palette.encode(observe("WORLD.RGB"), world_ids)
        for player, first, last, name in self.feature_names:
            features[player, first:last] = observe(name).ravel()

    def locate(self, places: np.ndarray) -> None:
        """Write row and column of each player (N, 2); here -1: the engine does not report them."""
        places[:] = -1


@dataclasses.dataclass(frozen=True)
class PlainEngines:
    """A factory that runs in worker processes: it makes the engine of a world's next episode."""

    spec: Spec

    def prepare(self) -> None:
        """Import or compile what all engines need, so that it does not count as part of a build."""
        import_meltingpot()

    def __call__(self, world: int, seed: tuple[int, ...], palette: Palette) -> Engine:
        return Engine(self.spec, seed)


def build_lab(
    spec: Spec, rng: np.random.Generator, change: Callable[[Any], None] = lambda settings: None
) -> Any:
    """A dmlab2d.Lab2d for one episode, not yet started. Its settings are drawn from rng as in the
    official builder; change(settings) may modify them before the engine is built."""
    import_meltingpot()
    import dmlab2d
    from dmlab2d import runfiles_helper
    from meltingpot.configs import substrates as configs
    from meltingpot.utils.substrates import builder
    from ml_collections import config_dict

    config = configs.get_config(spec.substrate)
    state = random.getstate()
    random.seed(int(rng.integers(2**63)))  # coins draws from Python's own generator
    try:
        settings = config.lab2d_settings_builder(roles=spec.roles, config=config)
    finally:
        random.setstate(state)
    settings = config_dict.ConfigDict(settings).unlock()
    builder.apply_prefab_overrides(settings, None)
    builder.maybe_build_and_add_avatar_objects(settings)
    builder.locate_and_overwrite_level_directory(settings)
    change(settings)
    flat = builder.parse_python_settings_for_dmlab2d(settings)
    flat["env_seed"] = str(int(rng.integers(1, 2**32 - 1)))
    with quiet():
        return dmlab2d.Lab2d(runfiles_helper.find(), flat)


# --- Shared memory -------------------------------------------------------------------------------

RUNNING, TERMINATED, TRUNCATED = 0, 1, 2


class SharedArrays:
    """The worlds' arrays in anonymous shared memory; workers inherit its file descriptor `fd`."""

    def __init__(self, spec: Spec, num_envs: int, fd: int | None = None):
        players = (num_envs, spec.num_agents)
        seats = (num_envs, spec.num_agents + spec.num_bots)
        self.shapes = {
            "tile_ids": ((*players, *spec.grid), np.uint16),
            "world_ids": ((num_envs, *spec.world_grid), np.uint16),
            "features": ((*players, spec.num_features), np.float32),
        }
        self.shapes |= {f"final_{name}": shape for name, shape in self.shapes.items()}
        self.shapes |= {
            "actions": (players, np.int64),
            "reward": (seats, np.float64),
            "pick_ups": (seats, np.int64),
            "places": ((*seats, 2), np.int64),  # row, column; -1: unknown
            "ended": ((num_envs,), np.int64),  # RUNNING, TERMINATED or TRUNCATED
            "sprites": ((CAPACITY, WORDS), np.uint64),
            "num_sprites": ((1,), np.int64),
        }
        sizes = [math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self.shapes.values()]
        starts = np.cumsum([0, *((size + 63) // 64 * 64 for size in sizes)]).tolist()
        if fd is None:
            if hasattr(os, "memfd_create"):
                fd = os.memfd_create("unseen")
            else:  # macOS
                with tempfile.TemporaryFile() as file:
                    fd = os.dup(file.fileno())
            os.ftruncate(fd, starts[-1])
        self.fd, memory = fd, mmap.mmap(fd, starts[-1])
        for (name, (shape, kind)), start in zip(self.shapes.items(), starts):
            setattr(self, name, np.ndarray(shape, kind, memory, start))

    def observation(self, where: Any, final: bool = False) -> Observation:
        """Views of one world's arrays (where: its index) or of all worlds' (where: ...)."""
        names = (f"final_{name}" if final else name for name in Observation._fields)
        return Observation(*(getattr(self, name)[where] for name in names))

    def close(self) -> None:
        """Close the file descriptor; the memory stays as long as a process maps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1  # the system may give the number to another file


# --- The worker process --------------------------------------------------------------------------
#
# A message to a worker is a letter and two numbers:
#   B world episode   build and start the engine of that episode, and keep it ready
#   G world           serve that world from its ready engine, and write its first observation
#   S                 step the worlds that this worker serves
#   D world           stop serving that world
# The worker answers each message, in order: with the seconds and processor seconds that it took, or
# with a text if it failed. Of all standby processes, at most num_workers build at the same time.

ANSWER = struct.Struct("dd")


class Host:
    """The state of a worker process: engines that serve worlds, and engines that are built."""

    def __init__(
        self,
        new_engine: PlainEngines,
        spec: Spec,
        num_envs: int,
        seed: int,
        first_world: int,
        max_steps: int,
        fd: int,
    ):
        new_engine.prepare()
        self.new_engine, self.seed = new_engine, seed
        self.first_world, self.max_steps = first_world, max_steps
        self.arrays = SharedArrays(spec, num_envs, fd)
        self.palette = Palette(self.arrays.sprites, self.arrays.num_sprites, fd)
        # Numba compiles here, not while the trainer waits for a first observation.
        self.palette.encode(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1), np.uint16))
        self.ready: dict[int, Engine] = {}
        self.serving: dict[int, Engine] = {}
        self.steps: dict[int, int] = {}

    def handle(self, message: bytes) -> None:
        """Execute one message: a letter and two int32 numbers, see the table above."""
        letter, (world, episode) = message[:1], np.frombuffer(message[1:], np.int32).tolist()
        if letter == b"S":
            self.step()
        elif letter == b"B":
            seed = (self.seed, self.first_world + world, episode)
            self.ready[world] = self.new_engine(world, seed, self.palette)
        elif letter == b"G":
            self.serving[world], self.steps[world] = self.ready.pop(world), 0
            self.serving[world].observe(self.palette, self.arrays.observation(world))
            self.serving[world].locate(self.arrays.places[world])
        elif letter == b"D":
            self.serving.pop(world, None)

    def step(self) -> None:
        """Step all worlds that this process serves; stop serving those whose episode ends."""
        arrays = self.arrays
        for world, engine in list(self.serving.items()):
            goes_on = engine.step(arrays.actions[world])
            engine.read_rewards(arrays.reward[world], arrays.pick_ups[world])
            self.steps[world] += 1
            cut = 0 < self.max_steps <= self.steps[world]
            arrays.ended[world] = TERMINATED if not goes_on else TRUNCATED if cut else RUNNING
            over = arrays.ended[world] != RUNNING
            engine.observe(self.palette, arrays.observation(world, final=over))
            engine.locate(arrays.places[world])
            if over:
                del self.serving[world]


def wait_for_turn(connection: Connection, memory_fd: int, turns: int) -> int:
    """Take one of `turns` locks, the right to build, and return its number (from 1). If a message
    arrives first, return 0 without a lock, because the trainer waits for an answer. The kernel
    frees the lock of a worker that dies."""
    while not connection.poll(0.0):
        for turn in range(1, turns + 1):
            with contextlib.suppress(OSError):  # another process has it
                fcntl.lockf(memory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, turn)
                return turn
        connection.poll(0.05)
    return 0


def worker_main(socket_fd: int, memory_fd: int) -> None:
    """Main loop of a worker process: answer messages until the trainer closes the socket."""
    # These are sent to the whole group: the trainer reacts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(socket_fd)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        turns, settings = pickle.loads(connection.recv_bytes())
        host = Host(**settings, fd=memory_fd)
        while True:
            message, turn = connection.recv_bytes(), 0
            if message[:1] == b"B" and not host.serving:
                turn = wait_for_turn(connection, memory_fd, turns)
            began, used = time.monotonic(), time.process_time()
            try:
                host.handle(message)
                answer = ANSWER.pack(time.monotonic() - began, time.process_time() - used)
            except Exception as error:  # of any kind: the trainer raises it as a WorldError
                answer = f"failed with {type(error).__name__}: {error}".encode()
            if turn:
                fcntl.lockf(memory_fd, fcntl.LOCK_UN, 1, turn)
            connection.send_bytes(answer)


class Worker:
    """The trainer's handle of a worker process; `number` counts the workers from 0."""

    def __init__(self, number: int, turns: int, settings: dict[str, Any], memory_fd: int):
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), memory_fd)
        # -P: do not import another package `envs` from the working directory.
        command = [sys.executable, "-P", "-m", "envs.meltingpot.worlds", *map(str, fds)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(command, env=env, pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()
        self.number, self.connection = number, Connection(ours.detach())
        self.connection.send_bytes(pickle.dumps((turns, settings)))
        self.serving: set[int] = set()  # worlds that it steps
        self.reserved: dict[int, bool] = {}  # worlds whose next episode it makes; True: built
        self.pending: deque[tuple[bytes, int]] = deque()  # letter, world; unanswered
        self.started = False  # True after its first answer

    def send(self, letter: bytes, world: int = 0, episode: int = 0) -> None:
        """Send a message; _read() takes its answer later."""
        self.pending.append((letter, world))
        with contextlib.suppress(OSError):  # _read() notices it, or it is buried already
            self.connection.send_bytes(letter + np.array([world, episode], np.int32).tobytes())

    def building(self) -> list[int]:
        """Worlds whose next episode it was told to build and has not yet reported as built."""
        return [world for letter, world in self.pending if letter == b"B"]

    def look(self) -> tuple[bool, float]:
        """True if the process runs or waits for a core, and the processor seconds that it has used;
        (False, 0.0) where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False, 0.0
        state, *fields = stat.rpartition(")")[2].split()
        ticks = int(fields[10]) + int(fields[11])
        return state == "R", ticks / os.sysconf("SC_CLK_TCK")

    def has_ended(self) -> bool:
        """True if the process has ended."""
        return self.process.poll() is not None

    def death(self) -> str:
        """How the process ended, as the end of a sentence: "exited with 1"."""
        try:
            code = self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


# --- Many worlds ---------------------------------------------------------------------------------

SHORT_BUILD = 0.5  # processor seconds; longer builds are done by standby processes
LOOK = 0.2  # seconds between checks of a process whose answer the trainer waits for
PATIENCE = 10  # a worker may use so many times its time limit in processor seconds


class MeltingPot:
    """num_envs worlds of a substrate, stepped together. A scenario's name gives its roles, no bots.

    seed, first_world   episode e of world b is built from the seed (seed, first_world + b, e)
    num_workers         processes that step worlds; 0: as many as this process may use cores
    max_episode_steps   truncate episodes after so many steps; 0: play them to their natural end
    timeout             seconds without a sign of life (PATIENCE times as many of processor time)
                        until a worker that owes an answer ends the run; builds have longer limits
    standby             start standby processes for long builds; False: build when needed
    ValueError: unknown name. ModuleNotFoundError: no meltingpot. WorldError: a worker failed.
    """

    reproducible = False  # the engine's episodes differ even if all seeds are equal

    def __init__(
        self,
        substrate: str,
        num_envs: int,
        seed: int = 1,
        first_world: int = 0,
        num_workers: int = 0,
        max_episode_steps: int = 0,
        timeout: float = 8.0,
        standby: bool = True,
    ):
        self.spec, new_engine = self.plan(substrate)
        self.num_envs, self.timeout, self.standby = num_envs, timeout, standby
        self.settings = {  # keyword arguments of Host
            "new_engine": new_engine,
            "spec": self.spec,
            "num_envs": num_envs,
            "seed": seed,
            "first_world": first_world,
            "max_steps": max_episode_steps,
        }
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        self.num_workers = min(num_workers or cores, num_envs)
        self.per_worker = -(-num_envs // self.num_workers)
        self.arrays = SharedArrays(self.spec, num_envs)
        self.palette = Palette(self.arrays.sprites, self.arrays.num_sprites, self.arrays.fd)
        self.counter = EpisodeCounter(num_envs, self.spec.num_agents, self.spec.num_bots)
        self.obs: Observation | None = None  # the latest observation
        self.workers: list[Worker] = []
        self.started = 0  # number of worker processes so far, dead ones included
        self.place: list[Worker | None] = [None] * num_envs  # the worker that serves a world
        self.next: list[Worker | None] = [None] * num_envs  # the worker that makes its next episode
        self.episode = np.zeros(num_envs, np.int64)  # number of each world's next build
        self.fastest_build = math.inf  # processor seconds: other processes do not change them
        self.slowest_build = 0.0  # seconds
        self.waited_s = 0.0  # spent switching worlds to their next episodes, builds included
        self.checked = 0.0  # when check() last ran

    def plan(self, substrate: str) -> tuple[Spec, PlainEngines]:
        """The Spec of the worlds and the factory of their engines; subclasses replace both."""
        spec = get_spec(substrate)
        return spec, PlainEngines(spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Tensors: palette (P, 8, 8, 3) uint8; episode (B,) int64, number of the next build."""
        import torch

        return {
            "palette": torch.tensor(self.palette.pixels()),
            "episode": torch.tensor(self.episode),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        """Restore the ids of sprites; begin new episodes, as engines' states cannot be saved."""
        self.palette.load(np.asarray(state["palette"]))
        self.episode[:] = np.asarray(state["episode"])
        return self.reset()

    def images(self, ids: np.ndarray) -> np.ndarray:
        """The exact images (..., 8H, 8W, 3) uint8 of tile ids (..., H, W)."""
        return ids_to_images(ids, self.palette.pixels())

    def places(self, world: int) -> np.ndarray:
        """Row and column of a world's players now, (N + num_bots, 2) int64; -1: unknown."""
        return self.arrays.places[world]

    def reset(self) -> Observation:
        """Begin a new episode in every world and return the first observations."""
        if not self.workers:
            for _ in range(self.num_workers):
                self._spawn()
            for world in range(self.num_envs):
                self._reserve(world, self.workers[world // self.per_worker])
        for world, worker in enumerate(self.place):
            if worker is not None:
                worker.serving.discard(world)
                worker.send(b"D", world)
        self.counter.clear()
        self._start(range(self.num_envs))
        self.obs = self._observation()
        return self.obs

    def step(self, actions: np.ndarray) -> Step:
        """Step every world with actions (B, N) int; where an episode ends, the next begins."""
        arrays = self.arrays
        arrays.actions[:] = actions
        busy = [worker for worker in self.workers if worker.serving]
        for worker in busy:
            worker.send(b"S")
        for worker in busy:
            self._finish(worker)
        reward, ended = arrays.reward.copy(), arrays.ended.copy()
        done = np.flatnonzero(ended).tolist()
        final = self._observation(final=True) if done else None
        if done:
            began = time.monotonic()
            for world in done:
                self.place[world].serving.discard(world)
            self._start(done)
            self.waited_s += time.monotonic() - began
        elif time.monotonic() > self.checked + 0.5:
            self.check(learning=False)
        episodes = self.counter.add(reward, arrays.pick_ups, ended != RUNNING)
        terminated, truncated = ended == TERMINATED, ended == TRUNCATED
        self.obs = self._observation()
        reward = reward[:, : self.spec.num_agents]
        return Step(self.obs, reward, terminated, truncated, final, episodes)

    def rest(self, world: int) -> None:
        """Do not step this world until reset(): its observation stays, its rewards are 0."""
        worker, arrays = self.place[world], self.arrays
        worker.serving.discard(world)
        worker.send(b"D", world)
        arrays.reward[world], arrays.pick_ups[world], arrays.ended[world] = 0, 0, RUNNING

    def check(self, learning: bool = True) -> None:
        """Raise WorldError if a worker that serves worlds has died; order builds of next episodes.

        Call it once before learning, while no world is stepped: workers then do the short builds,
        which would otherwise delay steps. The call itself returns at once.
        """
        self.checked = time.monotonic()
        self._bury()
        if self.place[0] is not None:
            self._plan(learning)

    def close(self) -> None:
        """Kill all workers and wait for their end."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.connection.close()
            worker.process.kill()  # it has nothing to save
        for worker in workers:
            worker.process.wait()
        self.arrays.close()

    def _observation(self, final: bool = False) -> Observation:
        return Observation(*(array.copy() for array in self.arrays.observation(..., final)))

    def _spawn(self) -> Worker:
        worker = Worker(self.started, self.num_workers, self.settings, self.arrays.fd)
        self.started += 1
        self.workers.append(worker)
        return worker

    def _bury(self) -> None:
        """Remove workers that have died; WorldError if one of them served worlds."""
        for worker in [worker for worker in self.workers if worker.has_ended()]:
            self._part_with(worker)

    def _part_with(self, worker: Worker) -> None:
        """Remove a dead worker and release its builds; WorldError if it served worlds."""
        sentence = self._sentence(worker, worker.death())
        if worker.serving:
            raise WorldError(sentence)
        print(f"{sentence} It is replaced.", file=sys.stderr, flush=True)
        for world, built in worker.reserved.items():
            if built or world in worker.building():
                self.episode[world] -= 1  # another worker will build the same episode
            self.next[world] = None
        self.workers.remove(worker)
        worker.pending.clear()
        worker.connection.close()
        worker.process.kill()  # perhaps only its connection is closed
        worker.process.wait()

    def _reserve(self, world: int, worker: Worker) -> None:
        worker.reserved[world] = False
        self.next[world] = worker

    def _build(self, worker: Worker, world: int) -> None:
        worker.send(b"B", world, int(self.episode[world]))
        self.episode[world] += 1

    def _plan(self, learning: bool = False) -> None:
        """Order the builds of next episodes from workers whose steps they do not delay."""
        for worker in list(self.workers):
            self._receive(worker)
        short = self.fastest_build <= SHORT_BUILD
        for world in range(self.num_envs):
            if self.next[world] is None:
                worker = self.place[world] if short else self._standby()
                if worker in self.workers:  # else nobody is free, or it died while the world rests
                    self._reserve(world, worker)
        for worker in self.workers:
            if worker.serving and not (short and learning):
                continue
            ordered = worker.building()
            for world, built in worker.reserved.items():
                if not built and world not in ordered:
                    self._build(worker, world)

    def _standby(self) -> Worker | None:
        """A worker without worlds and without builds, started if there is none: while a process
        builds a second engine, its first one could not begin to serve. None: not available."""
        if not self.standby:
            return None
        for worker in self.workers:
            if not worker.serving and not worker.reserved:
                return worker
        # num_envs + num_workers processes suffice for one to be free after every switch. If they
        # die repeatedly, no more are started, and builds are done when they are needed.
        enough = self.num_envs + self.num_workers
        if len(self.workers) < enough and self.started < 2 * enough:
            return self._spawn()
        return None

    def _holder(self, world: int) -> Worker:
        """The worker that will serve a world's next episode; if there is none yet, reserve one."""
        worker = self.next[world]
        if worker is None:
            worker = self.place[world]
            if worker not in self.workers:  # dead since the world's last step
                worker = self._spawn()
            self._reserve(world, worker)
        return worker

    def _start(self, worlds: Iterable[int]) -> None:
        """Switch each of these worlds to its next episode; wait for the first observations."""
        owners = []
        self._bury()
        for world in worlds:
            worker = self._holder(world)
            if not worker.reserved.pop(world) and world not in worker.building():
                self._build(worker, world)
            worker.send(b"G", world)
            worker.serving.add(world)
            self.place[world], self.next[world] = worker, None
            if worker not in owners:
                owners.append(worker)
        for worker in owners:
            # It must step worlds now: long builds that it has not begun go to another worker.
            for world in [w for w, built in worker.reserved.items() if not built]:
                if self.fastest_build > SHORT_BUILD and world not in worker.building():
                    del worker.reserved[world]
                    self.next[world] = None
            self._finish(worker)
        self._plan()

    def _finish(self, worker: Worker) -> None:
        """Wait until a worker has answered all messages; WorldError if it fails."""
        while worker.pending:
            if not worker.connection.poll(LOOK):
                self._wait(worker)
            self._read(worker)

    def _wait(self, worker: Worker) -> None:
        """Wait for a worker's next answer; WorldError if it does not come.

        A worker that uses processor time, or waits for a core, is slow but alive.
        """
        limit, silent = self._limit(worker), LOOK
        _, began = worker.look()
        used = began  # processor seconds
        # Count looks, not seconds: trainer and worker may be stopped for a while (Ctrl-Z).
        while not worker.connection.poll(LOOK):
            before = used
            runs, used = worker.look()
            silent = 0.0 if runs or used > before else silent + LOOK
            self._bury()
            if silent >= limit:
                raise WorldError(self._sentence(worker, f"gave no sign for {limit:.0f} s"))
            if used - began >= PATIENCE * limit:
                words = f"has worked for {used - began:.0f} s without an answer"
                raise WorldError(self._sentence(worker, words))

    def _limit(self, worker: Worker) -> float:
        """Seconds that a worker may give no sign of life before its next answer."""
        letter, _ = worker.pending[0]
        # At its start it imports and perhaps compiles, as many others do at the same time.
        expected = 0.0 if worker.started else 60.0
        if letter == b"B":  # chemistry: 13 s, on a busy machine several times as long
            expected = max(expected, 10 * self.slowest_build if self.slowest_build else 120.0)
        return max(self.timeout, expected)

    def _receive(self, worker: Worker) -> None:
        """Read the answers that have arrived from a worker."""
        while worker.pending and worker.connection.poll(0.0):
            self._read(worker)

    def _read(self, worker: Worker) -> None:
        """Read one answer that has arrived; WorldError if it reports a failure."""
        try:
            answer = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._part_with(worker)
            return
        if len(answer) != ANSWER.size:
            raise WorldError(self._sentence(worker, answer.decode()))
        letter, world = worker.pending.popleft()
        worker.started = True
        if letter == b"B":
            seconds, processor_seconds = ANSWER.unpack(answer)
            self.fastest_build = min(self.fastest_build, processor_seconds)
            self.slowest_build = max(self.slowest_build, seconds)
            if world in worker.reserved:
                worker.reserved[world] = True

    def _sentence(self, worker: Worker, what: str) -> str:
        worlds = ", ".join(map(str, sorted(worker.serving))) or "none"
        name = f"Melting Pot worker {worker.number} (process {worker.process.pid}"
        return f"{name}, {self.spec.substrate}, worlds: {worlds}) {what}."


if __name__ == "__main__":
    from envs.meltingpot.worlds import (
        worker_main as main,  # imported by its name: pickled classes must not be of __main__
    )

    main(int(sys.argv[1]), int(sys.argv[2]))
