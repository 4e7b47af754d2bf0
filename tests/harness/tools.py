"""Short runs of the learner for tests of the harness."""

from __future__ import annotations

import importlib
from pathlib import Path

NAME = "tests.harness.learner"
PULLS = 4  # environment steps of an iteration
FOREVER = 10**9  # environment steps

learner = importlib.import_module(NAME)


def flags(run_dir: Path | str, iterations: int, *more: object) -> list[str]:
    """The command line of a new run, without a final evaluation."""
    argv = ["--run-dir", run_dir, "--total-timesteps", iterations * PULLS, "--final-episodes", 0]
    return [str(x) for x in (*argv, "--save-every", 2 * PULLS, *more)]


def resume(run_dir: Path | str, iterations: int, *more: object) -> list[str]:
    """The command line that goes on with it."""
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", iterations * PULLS, *more)]


def run(*argv: object) -> int:
    """A run in this process; returns its exit code."""
    return learner.main([str(x) for x in argv])
