"""Runs of a script, one after another, in the processes that torchrun starts, or in this one.

    torchrun --nproc-per-node 2 tests/under_torchrun.py SCRIPT '[["--seed", "1"], ...]' [greedy]

Each process notes what it has behind its last iteration, and the first gradients that it uses:
after run k in k-RANK.pt. greedy: agents draw nothing, so that what worlds do depends on who they
are and on the networks alone.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Notes:
    """What a process had in a run."""

    def __init__(self):
        self.parts, self.gradients, self.iterations = {}, [], 0

    def add_gradients(self, optimiser, *rest):
        weights = [p for group in optimiser.param_groups for p in group["params"]]
        if len(self.gradients) < 2:
            grads = [p.grad.flatten() for p in weights if p.grad is not None]
            self.gradients.append(torch.cat(grads).clone())

    def add_parts(self, run):
        self.iterations += 1
        self.parts = harness.pack(run.parts)
        self.own = harness.pack(run.own)


def drive(name, lines, greedy=False):
    """The scripts' exit codes; stops at the first that is not 0."""
    script, codes = importlib.import_module(name), []
    sample, advance = getattr(script, "sample", None), harness.Run.advance
    if greedy:
        script.sample = lambda log_probs, noise: log_probs.argmax(-1)
    try:
        for number, argv in enumerate(lines):
            notes = Notes()

            def noted(run, steps, notes=notes):
                advance(run, steps)
                notes.add_parts(run)

            harness.Run.advance = noted
            hook = register_optimizer_step_pre_hook(notes.add_gradients)
            codes.append(script.main(argv))
            hook.remove()
            torch.save(vars(notes), f"{number}-{harness.process_rank()}.pt")
            if codes[-1]:
                break
    finally:
        script.sample, harness.Run.advance = sample, advance
    return codes


if __name__ == "__main__":
    name, lines, *greedy = sys.argv[1:]
    harness.leave(max(drive(name, json.loads(lines), bool(greedy))))
