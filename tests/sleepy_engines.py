"""Engines for tests of worker processes: they need nothing but time, and say who made them."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np

from envs.meltingpot.tiles import Observation, Palette, Spec
from envs.meltingpot.worlds import MeltingPot, PlainEngines

SPEC = Spec(
    substrate="sleepy",
    roles=("default",),
    is_focal=(True,),
    actions=({},),
    grid=(1, 1),
    world_grid=(1, 1),
    features=(("SEED", 3), ("PROCESS", 1)),
)


def spend(seconds: float, busy: bool) -> None:
    """Pass time asleep, or with as many seconds of work."""
    if not busy:
        time.sleep(seconds)
        return
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class SleepyEngine:
    """An episode without end; its features are the seed that it was built from and its process."""

    def __init__(self, seed: tuple[int, ...], step_s: float, busy: bool):
        self.seed, self.step_s, self.busy = seed, step_s, busy

    def step(self, actions: np.ndarray) -> bool:
        spend(self.step_s, self.busy)
        return True

    def read_rewards(self, reward: np.ndarray, pick_ups: np.ndarray) -> None:
        reward[:], pick_ups[:] = 1, 0

    def observe(self, palette: Palette, out: Observation) -> None:
        out.features[:] = [*self.seed, os.getpid()]

    def locate(self, places: np.ndarray) -> None:
        places[:] = -1


@dataclasses.dataclass(frozen=True)
class SleepyEngines(PlainEngines):
    """Makes engines whose builds and steps take so many seconds, after so many of preparation."""

    prepare_s: float = 0.0
    build_s: float = 0.0
    step_s: float = 0.0
    busy: bool = False
    log: str = ""  # a file for a line "+ process" when a build begins, "- process" when it ends

    def prepare(self) -> None:
        spend(self.prepare_s, self.busy)

    def note(self, sign: str) -> None:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{sign} {os.getpid()}\n")

    def __call__(self, world: int, seed: tuple[int, ...], palette: Palette) -> SleepyEngine:
        self.note("+")
        spend(self.build_s, self.busy)
        self.note("-")
        return SleepyEngine(seed, self.step_s, self.busy)


class Sleepy(MeltingPot):
    """Worlds of sleepy engines; further arguments are MeltingPot's."""

    def __init__(self, num_envs: int, engines: SleepyEngines, **options):
        self.engines = engines
        super().__init__("sleepy", num_envs, **options)

    def plan(self, substrate: str) -> tuple[Spec, PlainEngines]:
        return SPEC, self.engines
