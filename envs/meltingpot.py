"""Melting Pot for training: many worlds at once, observations as tile ids.

Every image that Melting Pot draws consists of 8x8 sprites on an 8x8 grid. `MeltingPot` therefore hands out
`tile_ids  # (B, N, H, W)` into one growing `palette` of sprites instead of pixels (about a hundredth of the
memory), and `ids_to_images` rebuilds the pixels exactly. B is parallel worlds, N players.

The engine (dmlab2d) is read directly: the official wrapper collects every observation through five layers of
Python, this file only those that are used. tests/test_meltingpot.py holds it against the official wrapper.

Worlds live in worker processes, several per worker, and write into shared memory. An engine serves one episode
and is then built anew, as the official wrapper does it. The next episode of every world is built ahead of time,
and when an episode ends, the world's slot switches to it, so that no world waits for another's rebuild. A build
blocks its process (engines hold the GIL), hence two places for it: short builds (chicken 0.04 s, coins 0.14 s)
are done by the world's own worker while the trainer learns (`check()`), long ones (coop_mining 1.5 s, chemistry
13 s) by standby processes that step nothing. Each episode has its own seed (seed, world, episode), from which
coins draws its colours and its map; the engine itself is not reproducible, whatever its seeds.

    envs = MeltingPot("coins", num_envs=16, seed=1)
    obs = envs.reset()                                 # Observation: tile_ids, world_ids, features
    step = envs.step(actions)                          # (B, N) ints -> Step: obs, reward, terminated, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np

from envs.tiles import (
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

ROOT = Path(__file__).resolve().parents[1]

# What counts as a pick-up: the engine's events, each with the key that names the player (1-based).
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


# --- Melting Pot without its heavy imports ---------------------------------------------------------------------


def import_meltingpot(bots: bool = False) -> types.ModuleType:
    """Import meltingpot; unless `bots`, without tensorflow and chex (0.2 s instead of 4 s and 100 MB).

    Only official bots use the two. Placeholders stand in for them while meltingpot is imported, and leave
    sys.modules afterwards, so that nothing else (TensorBoard looks for tensorflow) mistakes them for the real.
    Raises ModuleNotFoundError with a sentence if meltingpot, or with `bots` one of the two, is not installed.
    """
    if "meltingpot" in sys.modules:
        return sys.modules["meltingpot"]
    for name in ("meltingpot", "dmlab2d"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name} is not installed: run `make setup`, or use --substrate toy, which needs no engine."
            )
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
    """All substrate names, sorted."""
    import_meltingpot()
    from meltingpot.configs import substrates as configs

    return sorted(configs.SUBSTRATES)


@contextlib.contextmanager
def quiet():
    """Send file descriptors 1 and 2 to /dev/null: building an engine prints hundreds of harmless lines."""
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


# --- What a substrate looks like -------------------------------------------------------------------------------


def get_spec(name: str, roles: tuple[str, ...] | None = None) -> Spec:
    """Spec of a substrate, or of a scenario (its substrate with its roles and its focal/background split).

    Raises ValueError with one sentence for an unknown name.
    """
    import_meltingpot()
    from meltingpot import scenario
    from meltingpot.configs import substrates as configs

    is_focal = None
    substrate = name
    if name in scenario.SCENARIOS:
        config = scenario.get_config(name)
        substrate, roles, is_focal = config.substrate, tuple(config.roles), tuple(config.is_focal)
    if substrate not in configs.SUBSTRATES:
        near = difflib.get_close_matches(name, [*configs.SUBSTRATES, "toy"], n=4, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "see docs/meltingpot.md for the list."
        )
        raise ValueError(f"Unknown substrate '{name}': {hint}")
    config = configs.get_config(substrate)
    roles = tuple(roles or config.default_player_roles)
    seen = config.timestep_spec.observation
    # COLLECTIVE_REWARD is permitted too, but is a reward and not an observation of the player's own state.
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


# --- One engine ------------------------------------------------------------------------------------------------


class Engine:
    """One episode of a substrate on dmlab2d, read directly.

    `seed` is a tuple of integers, e.g. (seed, world, episode).
    """

    def __init__(self, spec: Spec, seed: tuple[int, ...]):
        rng = np.random.default_rng(seed)
        self.attach(spec, build_lab(spec, rng))
        with quiet():
            self.lab.start(0, seed=int(rng.integers(2**31)))

    def attach(self, spec: Spec, lab: Any) -> None:
        """Read `lab` (a dmlab2d.Lab2d) as an engine of `spec`."""
        from dmlab2d import RUNNING as running

        self.spec, self.lab, self.running = spec, lab, running
        players = range(1, spec.num_agents + 1)
        available = set(lab.observation_names())
        self.rgb = [f"{i}.RGB" for i in players]
        self.rewards = [f"{i}.REWARD" for i in players]
        self.feature_names, first = [], 0  # (player, first column, last column, observation's name)
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
        """Advance by one step with actions (N,); True if the episode goes on."""
        self.lab.act_discrete(self.action_table[actions[self.action_player], self.columns])
        status, _ = self.lab.advance()
        return status == self.running

    def read_rewards(self, reward: np.ndarray, pick_ups: np.ndarray) -> None:
        """Write the last step's rewards (N,) and pick-ups (N,)."""
        observe = self.lab.observation
        reward[:] = [observe(name) for name in self.rewards]
        pick_ups[:] = 0
        for name, items in self.lab.events():
            key = PICK_UPS.get(name)
            if key is not None:
                player = items[
                    2 + 2 * items[1::2].index(key)
                ]  # ["dict", key, value, key, value, ...]
                pick_ups[int(player) - 1] += 1

    def observe(
        self, palette: Palette, tile_ids: np.ndarray, world_ids: np.ndarray, features: np.ndarray
    ) -> None:
        """Write the players' views (N, H, W), the global view (H', W') and the features (N, F)."""
        observe = self.lab.observation
        for player, name in enumerate(self.rgb):
            palette.encode(observe(name), tile_ids[player])
        palette.encode(observe("WORLD.RGB"), world_ids)
        for player, first, last, name in self.feature_names:
            features[player, first:last] = np.ravel(observe(name))


def build_lab(spec: Spec, rng: np.random.Generator) -> Any:
    """A dmlab2d.Lab2d for one episode: settings drawn anew (coins: colours and map), not yet started."""
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
    flat = builder.parse_python_settings_for_dmlab2d(settings)
    flat["env_seed"] = str(int(rng.integers(1, 2**32 - 1)))
    with quiet():
        return dmlab2d.Lab2d(runfiles_helper.find(), flat)


# --- Shared memory ---------------------------------------------------------------------------------------------


class SharedArrays:
    """Named arrays in one anonymous piece of memory that child processes inherit by file descriptor."""

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], str]], fd: int | None = None):
        sizes = {
            name: int(np.prod(shape)) * np.dtype(kind).itemsize
            for name, (shape, kind) in fields.items()
        }
        total = sum((size + 63) // 64 * 64 for size in sizes.values())
        if fd is None:
            if hasattr(os, "memfd_create"):
                fd = os.memfd_create("unseen")
            else:  # macOS
                with tempfile.TemporaryFile() as file:
                    fd = os.dup(file.fileno())
            os.ftruncate(fd, total)
        self.fields, self.fd, self.memory = fields, fd, mmap.mmap(fd, total)
        start = 0
        for name, (shape, kind) in fields.items():
            setattr(self, name, np.ndarray(shape, kind, self.memory, start))
            start += (sizes[name] + 63) // 64 * 64

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1  # the number may soon be another file's


def _fields(spec: Spec, num_envs: int) -> dict[str, tuple[tuple[int, ...], str]]:
    b, n = num_envs, spec.num_agents
    observation = {
        "tile_ids": ((b, n, *spec.grid), "uint16"),
        "world_ids": ((b, *spec.world_grid), "uint16"),
        "features": ((b, n, spec.num_features), "float32"),
    }
    return {
        **observation,
        **{f"final_{name}": field for name, field in observation.items()},
        "actions": ((b, n), "int64"),
        "reward": ((b, n), "float64"),
        "pick_ups": ((b, n), "int64"),
        "ended": ((b,), "int64"),  # RUNNING, TERMINATED or TRUNCATED
        "sprites": ((CAPACITY, WORDS), "uint64"),
        "num_sprites": ((1,), "int64"),
    }


RUNNING, TERMINATED, TRUNCATED = 0, 1, 2
SHORT_BUILD = 0.5  # seconds


# --- The worker process ----------------------------------------------------------------------------------------
# Messages to a worker are a letter and two numbers; it answers each, in order, with the seconds that it took, or
# with a text if it failed.
#   B world episode   build and start the engine of that episode, and keep it ready
#   G world           serve that world from its ready engine; write its first observation
#   S                 step the worlds it serves
#   D world           drop that world's episode
#   P                 answer (is it alive?)


class _WorkerState:
    def __init__(self, spec, seed, max_episode_steps, shared, palette):
        self.spec, self.seed, self.max_episode_steps = spec, seed, max_episode_steps
        self.shared, self.palette = shared, palette
        self.ready: dict[int, Engine] = {}
        self.serving: dict[int, Engine] = {}
        self.steps: dict[int, int] = {}

    def build(self, world: int, episode: int) -> None:
        seed, first_world = self.seed
        self.ready[world] = Engine(self.spec, (seed, first_world + world, episode))

    def go(self, world: int, _: int) -> None:
        arrays = self.shared
        engine = self.serving[world] = self.ready.pop(world)
        self.steps[world] = 0
        engine.observe(
            self.palette, arrays.tile_ids[world], arrays.world_ids[world], arrays.features[world]
        )

    def step(self, _: int, __: int) -> None:
        a = self.shared
        for world, engine in list(self.serving.items()):
            goes_on = engine.step(a.actions[world])
            self.steps[world] += 1
            engine.read_rewards(a.reward[world], a.pick_ups[world])
            cut = self.max_episode_steps and self.steps[world] >= self.max_episode_steps
            a.ended[world] = (
                RUNNING if goes_on and not cut else TRUNCATED if goes_on else TERMINATED
            )
            if a.ended[world] == RUNNING:
                engine.observe(
                    self.palette, a.tile_ids[world], a.world_ids[world], a.features[world]
                )
            else:
                engine.observe(
                    self.palette,
                    a.final_tile_ids[world],
                    a.final_world_ids[world],
                    a.final_features[world],
                )
                del self.serving[world]

    def drop(self, world: int, _: int) -> None:
        self.serving.pop(world, None)
        self.ready.pop(world, None)


def worker_main(socket_fd: int, memory_fd: int) -> None:
    """The life of a worker: answer messages until the other end of the socket is closed."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the trainer ends us
    connection = Connection(socket_fd)
    try:
        spec, num_envs, seed, first_world, max_episode_steps = pickle.loads(connection.recv_bytes())
        shared = SharedArrays(_fields(spec, num_envs), memory_fd)
        palette = Palette(shared.sprites, shared.num_sprites, memory_fd)
        state = _WorkerState(spec, (seed, first_world), max_episode_steps, shared, palette)
        actions = {b"B": state.build, b"G": state.go, b"S": state.step, b"D": state.drop}
        while True:
            message = connection.recv_bytes()
            began = time.monotonic()
            try:
                if message[:1] in actions:
                    actions[message[:1]](*np.frombuffer(message[1:], np.int32).tolist())
                answer = struct.pack("d", time.monotonic() - began)
            except Exception as error:  # whatever the engine raises becomes the trainer's sentence
                answer = f"failed with {type(error).__name__}: {error}".encode()
            connection.send_bytes(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer is gone


class _Worker:
    """The trainer's side of one worker process."""

    def __init__(self, number: int, init: tuple, memory_fd: int):
        self.number = number
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "envs.meltingpot", str(theirs.fileno()), str(memory_fd)],
            cwd=ROOT,
            pass_fds=(theirs.fileno(), memory_fd),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.connection.send_bytes(pickle.dumps(init))
        self.serving: set[int] = set()
        self.reserved: dict[
            int, bool
        ] = {}  # worlds whose next episode it holds; True once it is built
        self.pending: deque[bytes] = deque()  # messages not yet answered
        self.since = time.monotonic()  # when the oldest of them began to be waited for

    def send(self, kind: bytes, world: int = 0, episode: int = 0) -> None:
        if not self.pending:
            self.since = time.monotonic()
        message = kind + np.array([world, episode], np.int32).tobytes()
        self.pending.append(message)
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # receive() tells what happened
            self.connection.send_bytes(message)


# --- Many worlds -----------------------------------------------------------------------------------------------


class MeltingPot:
    """num_envs worlds of one substrate (or scenario: its roles and focal split), stepped together.

    seed, first_world: episode e of world b is built from the seed (seed, first_world + b, e).
    num_workers: processes that step worlds at the same time (default: the cores this process may use).
    max_episode_steps: truncate there; 0 plays episodes to their natural end.
    timeout: seconds after which a worker that does not answer ends the run with a WorldError.
    standby: start standby processes for long builds; without them such a build is done when it is needed.
    """

    reproducible = False  # the engine drifts even with all seeds equal

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
        self.spec = get_spec(substrate)
        self.num_envs, self.seed, self.timeout, self.standby = num_envs, seed, timeout, standby
        self.first_world, self.max_episode_steps = first_world, max_episode_steps
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        self.num_workers = min(num_workers or cores, num_envs)
        self.shared = SharedArrays(_fields(self.spec, num_envs))
        self.palette = Palette(self.shared.sprites, self.shared.num_sprites, self.shared.fd)
        self.workers: list[_Worker] = []
        self.counter = EpisodeCounter(num_envs, self.spec.num_agents)
        self.place: list[_Worker | None] = [None] * num_envs  # who serves a world
        self.next: list[_Worker | None] = [None] * num_envs  # who holds its next episode
        self.episode = np.zeros(num_envs, np.int64)  # number of each world's next episode
        self.build_s = 0.0  # the slowest build so far
        self.waited_s = 0.0  # time spent switching worlds to their next episodes, builds included
        self.checked = 0.0  # when check() last ran
        self.per_worker = -(-num_envs // self.num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """The meaning of the ids so far, and which episodes have been played."""
        return {"palette": self.palette.pixels(), "episode": self.episode.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        """Number sprites as the saved run did and begin new episodes: the engine cannot be restored."""
        self.palette.load(np.asarray(state["palette"], np.uint8))
        self.episode[:] = np.asarray(state["episode"])
        return self.reset()

    def images(self, ids: np.ndarray) -> np.ndarray:
        """The exact images (..., 8H, 8W, 3) uint8 behind ids (..., H, W)."""
        return ids_to_images(ids, self.palette.pixels())

    def reset(self) -> Observation:
        """Begin a new episode in every world."""
        if not self.workers:
            for _ in range(self.num_workers):
                self._spawn()
            for world in range(self.num_envs):
                self._reserve(world, self.workers[world // self.per_worker])
        else:
            for world, worker in enumerate(self.place):
                if worker is not None:
                    worker.serving.discard(world)
                    worker.send(b"D", world)
        self.counter.clear()
        self._start(range(self.num_envs))
        return self._observation("")

    def step(self, actions: np.ndarray) -> Step:
        """Step every world with actions (B, N); worlds that end begin their next episode at once."""
        arrays = self.shared
        arrays.actions[:] = actions
        busy = [worker for worker in self.workers if worker.serving]
        for worker in busy:
            worker.send(b"S")
        for worker in busy:
            self._finish(worker)
        ended = arrays.ended.copy()
        done = np.flatnonzero(ended)
        reward = arrays.reward.copy()
        final = self._observation("final_") if len(done) else None
        if len(done):
            for world in done:
                self.place[world].serving.discard(int(world))
            began = time.monotonic()
            self._start(done.tolist())
            self.waited_s += time.monotonic() - began
        elif time.monotonic() > self.checked + 2.0:
            self.check(learning=False)
        episodes = self.counter.add(arrays.reward, arrays.pick_ups, ended != RUNNING)
        terminated, truncated = ended == TERMINATED, ended == TRUNCATED
        return Step(self._observation(""), reward, terminated, truncated, final, episodes)

    def check(self, learning: bool = True) -> None:
        """Raise WorldError if a worker has died or does not answer.

        Cheap. To be called now and then while no world is stepped: that is also when short builds are done.
        """
        self.checked = time.monotonic()
        for worker in self.workers:
            self._receive(worker, block=False)
        if self.place[0] is not None:
            self._plan(learning)
        for worker in self.workers:
            if not worker.pending:
                worker.send(b"P")

    def close(self) -> None:
        """End all workers; no process is left behind."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in workers:
            try:
                worker.process.wait(0.5)
            except subprocess.TimeoutExpired:  # stopped, or in a long build
                worker.process.kill()
                worker.process.wait()
        self.shared.close()

    # --- private ---

    def _observation(self, prefix: str) -> Observation:
        return Observation(
            *(getattr(self.shared, prefix + name).copy() for name in Observation._fields)
        )

    def _spawn(self) -> _Worker:
        init = (self.spec, self.num_envs, self.seed, self.first_world, self.max_episode_steps)
        worker = _Worker(len(self.workers), init, self.shared.fd)
        self.workers.append(worker)
        return worker

    def _reserve(self, world: int, worker: _Worker) -> None:
        worker.reserved[world] = False
        self.next[world] = worker

    def _plan(self, learning: bool = False) -> None:
        """Have every world's next episode built where it delays no step."""
        short = self.build_s <= SHORT_BUILD
        for world in range(self.num_envs):
            if self.next[world] is None:
                worker = self.place[world] if short else self._standby() if self.standby else None
                if worker is None:
                    break
                self._reserve(world, worker)
        for worker in self.workers:
            if not worker.serving or (short and learning):
                self._receive(worker, block=False)
                unbuilt = [world for world, built in worker.reserved.items() if not built]
                if unbuilt and not worker.pending:
                    self._build(worker, unbuilt[0])

    def _standby(self) -> _Worker | None:
        """A worker that steps no world and has room for one more long build, started if need be."""
        room = int(np.clip(10.0 / self.build_s, 1, self.per_worker))  # ten seconds' work at most
        idle = [w for w in self.workers if not w.serving and len(w.reserved) < room]
        # With num_envs + num_workers processes one is always idle.
        if not idle and len(self.workers) < self.num_envs + self.num_workers:
            idle = [self._spawn()]
        return max(idle, key=lambda worker: len(worker.reserved), default=None)

    def _build(self, worker: _Worker, world: int) -> None:
        worker.send(b"B", world, int(self.episode[world]))
        self.episode[world] += 1

    def _start(self, worlds) -> None:
        """Switch each world's slot to its next episode, and wait for the first observations."""
        for world in worlds:
            if self.next[world] is None:  # no standby has room: build where the world was served
                self._reserve(world, self.place[world])
        owners = {id(self.next[world]): self.next[world] for world in worlds}.values()
        for worker in owners:
            mine = [world for world in worlds if self.next[world] is worker]
            building = {message[1:5] for message in worker.pending if message[:1] == b"B"}
            for world in mine:
                if not worker.reserved[world] and np.int32(world).tobytes() not in building:
                    self._build(worker, world)
                worker.send(b"G", world)
            for world in mine:
                del worker.reserved[world]
                worker.serving.add(world)
                self.place[world], self.next[world] = worker, None
            # It has worlds to step now: long builds that it has not begun are for another worker.
            for world, built in list(worker.reserved.items()):
                if not built and np.int32(world).tobytes() not in building:
                    del worker.reserved[world]
                    self.next[world] = None
        for worker in owners:
            self._finish(worker)
        self._plan()

    def _finish(self, worker: _Worker) -> None:
        while worker.pending:
            self._receive(worker, block=True)

    def _limit(self, message: bytes) -> float:
        """Seconds that a worker may take to answer. Builds take longer (chemistry: 25 s)."""
        if message[:1] != b"B":
            return self.timeout
        return max(self.timeout, 5 * self.build_s) if self.build_s else max(self.timeout, 120.0)

    def _receive(self, worker: _Worker, block: bool) -> None:
        """Take a worker's answers: one at least with `block`, else those that are there."""
        while worker.pending:
            left = worker.since + self._limit(worker.pending[0]) - time.monotonic()
            try:
                if not worker.connection.poll(max(0.0, left) if block else 0.0):
                    if left <= 0:
                        raise WorldError(
                            self._sentence(worker, f"gave no sign for {self.timeout:.0f} s")
                        )
                    return
                answer = worker.connection.recv_bytes()
            except (EOFError, OSError):
                raise WorldError(self._sentence(worker, self._death(worker))) from None
            message = worker.pending.popleft()
            now = time.monotonic()
            if len(answer) != 8:
                raise WorldError(self._sentence(worker, answer.decode()))
            if message[:1] == b"B":
                self.build_s = max(self.build_s, struct.unpack("d", answer)[0])
                world = int(np.frombuffer(message[1:5], np.int32)[0])
                if world in worker.reserved:
                    worker.reserved[world] = True
            worker.since = now
            if block:
                return

    @staticmethod
    def _death(worker: _Worker) -> str:
        try:
            code = worker.process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with code {code}"
        )

    def _sentence(self, worker: _Worker, what: str) -> str:
        worlds = ",".join(map(str, sorted(worker.serving))) or "none yet"
        return (
            f"Melting Pot worker {worker.number} (process {worker.process.pid}, {self.spec.substrate}, "
            f"worlds {worlds}) {what}."
        )


if __name__ == "__main__":
    from envs.meltingpot import worker_main as main  # under its own name, so that pickles agree

    main(int(sys.argv[1]), int(sys.argv[2]))
