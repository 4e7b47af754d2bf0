"""Scripts of particle worlds and battles under torchrun: two processes are one with twice the
worlds, and agree on everything that they share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from runs import PATIENCE, ROOT, differences, exact, metrics, only_error, script
from under_torchrun import drive

DRIVER = ROOT / "tests" / "under_torchrun.py"
ALWAYS = "--final-episodes 0 --eval-every 0 --log-every 1 --save-every 0"
BATTLES = "--hidden-size 8 --heads 2 --max-episode-steps 12"
SMALL = {
    "mappo_smac": f"{BATTLES} --num-envs 3",
    "mipi_mappo_smac": f"{BATTLES} --num-envs 3 --value-norm --normalise-advantages",
}
LONG = 60  # steps of a run of one iteration or more

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def line(name, run_dir, steps, flags=""):
    """A command line, as a list."""
    more = f"--run-dir {run_dir} --total-timesteps {steps}"
    return f"{SMALL[name]} {ALWAYS} {more} {flags}".split()


def resume(run_dir, steps):
    return ["--resume", run_dir, "--total-timesteps", str(steps)]


def launch(name, lines, *greedy):
    """These runs, one after another, in two processes under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = [*torchrun, "--nproc-per-node", "2", str(DRIVER), module(name), json.dumps(lines)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*argv, *greedy], env=env, capture_output=True, text=True, timeout=4 * PATIENCE
    )


def module(name):
    is_main = name in ("mra_maddpg_particle", "mipi_refil_smac")
    return name if is_main else f"baselines.{name}"


def notes(number, rank=0):
    """What a process had behind run `number`."""
    return torch.load(f"{number}-{rank}.pt", weights_only=False)


def check_alike(number, iterations=None):
    """What both processes share is the same in both, what they have of their own is not."""
    ours, theirs = notes(number, 0), notes(number, 1)
    assert differences(ours["parts"], theirs["parts"]) == []
    assert ours["iterations"] == theirs["iterations"] > 0
    assert iterations is None or ours["iterations"] == iterations
    for a, b in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert torch.equal(a, b) and a.norm() > 0
    assert "/rng" in "".join(differences(ours["own"], theirs["own"]))


def beside_one_process(name, flags, worlds, steps):
    """A run of two processes with so many worlds each, and one of one process with twice as many;
    agents draw nothing. Returns the first gradients of both."""
    lines = [line(name, "two", steps, f"{flags} --num-envs {worlds}")]
    done = launch(name, lines, "greedy")
    assert done.returncode == 0, done.stderr[-3000:]
    check_alike(0)
    two = notes(0)
    one_line = line(name, "one", steps, f"{flags} --num-envs {2 * worlds}")
    assert drive(module(name), [one_line], greedy=True) == [0]
    return two, notes(0)


# --- Two processes, one run -----------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_two_processes(name, capfd):
    """Half and half is whole, to the last bit. Only the first process speaks; both have the same
    weights, and draw their own actions in their own worlds. One process cannot go on."""
    steps = 4 * LONG
    lines = [line(name, "whole", steps), line(name, "cut", steps // 2), resume("cut", steps)]
    done = launch(name, lines)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(3):
        check_alike(number)
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    assert exact("whole")["timesteps"] >= steps
    assert notes(1)["iterations"] + notes(2)["iterations"] == notes(0)["iterations"] > 1
    spoken = [text for text in done.stdout.splitlines() if text.startswith("step ")]
    assert len(spoken) == 2 * len(metrics("whole"))
    first, second = exact("whole")["ranks"]
    assert "/rng" in "".join(differences(first, second))
    assert script(module(name)).main(resume("cut", 2 * steps)) == 2
    assert "2 processes began this run; 1 cannot go on" in only_error(capfd.readouterr().err)


def test_battles_of_two_processes_are_those_of_one():
    """Resource Collection with one team size: everybody lives, so that means over a process's steps
    count the same. The first gradients of actor and critic, returns and their statistics, and what
    is counted are those of one process with all the worlds."""
    flags = "--scenario resource --team-sizes 3 --eval-team-sizes 3 --rollout windows "
    flags += "--no-recurrent --window-steps 12 --returns lambda --value-norm --epochs 1 "
    flags += "--normalise-advantages --max-grad-norm 1e9"
    two, one = beside_one_process("mappo_smac", flags, worlds=2, steps=96)
    assert two["iterations"] == one["iterations"] == 2
    for a, b in zip(two["gradients"], one["gradients"], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(b.abs().max()))
    first, same = metrics("two")[0], metrics("one")[0]
    assert first["timesteps"] == same["timesteps"] == 48
    assert first["episodes"] == same["episodes"] == 4
    for name in ("return", "return/3", "length"):
        assert first[name] == pytest.approx(same[name], rel=1e-6)
