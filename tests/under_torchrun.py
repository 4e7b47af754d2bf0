"""Runs of scripts, one after another, in the processes that torchrun starts, or in this one.

    torchrun --nproc-per-node 2 tests/under_torchrun.py '[["baselines.SCRIPT", ["--seed", "1"], 0]]'

The number is after how many environment steps the last process gets a signal to stop; 0: never.
Each process notes what it has behind its last iteration, and with which gradients its optimisers
take their first step: of run k in k-RANK.pt. With "greedy" behind the runs agents draw nothing, so
that what worlds do depends on who they are and on the networks alone.
"""

import importlib
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Notes:
    """What a process has in a run."""

    def __init__(self):
        self.parts, self.own, self.gradients, self.iterations = {}, {}, [], 0
        self.optimisers = []  # that have taken a step

    def add_gradients(self, optimiser, *rest):
        weights = [p for group in optimiser.param_groups for p in group["params"]]
        found = [p.grad.flatten() for p in weights if p.grad is not None]
        if found and optimiser not in self.optimisers:
            self.optimisers.append(optimiser)
            self.gradients.append(torch.cat(found).clone())

    def add_parts(self, run):
        self.iterations += 1
        self.parts, self.own = harness.pack(run.parts), harness.pack(run.own)


def note(name, argv, stop_at, greedy):
    """The exit code of a script, and Notes."""
    script, notes, advance = importlib.import_module(name), Notes(), harness.Run.advance
    sample = getattr(script, "sample", None)

    def noted(run, steps):
        advance(run, steps)
        notes.add_parts(run)
        if 0 < stop_at <= run.timesteps and run.rank == run.size - 1:
            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(notes.add_gradients)
    harness.Run.advance = noted
    if greedy:
        script.sample = lambda log_probs, noise: log_probs.argmax(-1)
    try:
        return script.main(argv), notes
    finally:
        harness.Run.advance, script.sample = advance, sample
        hook.remove()


def drive(lines, greedy=False):
    """The scripts' exit codes; after one that is neither 0 nor 75 nothing is run."""
    codes = []
    for number, (name, argv, stop_at) in enumerate(lines):
        code, notes = note(name, argv, stop_at, greedy)
        noted = {name: x for name, x in vars(notes).items() if name != "optimisers"}
        torch.save(noted, f"{number}-{harness.process_rank()}.pt")
        codes.append(code)
        if code not in (harness.FINISHED, harness.STOPPED):
            break
    return codes


if __name__ == "__main__":
    harness.leave(drive(json.loads(sys.argv[1]), greedy="greedy" in sys.argv[2:])[-1])
