"""Scripts of particle worlds and battles under torchrun: two processes are one with twice the
worlds, and agree on everything that they share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import harness

import pytest
import torch
from runs import (
    PATIENCE,
    ROOT,
    differences,
    exact,
    index,
    metrics,
    only_error,
    opened,
    script,
    until,
)
from two_processes import in_two
from under_torchrun import drive

DRIVER = ROOT / "tests" / "under_torchrun.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALWAYS = "--final-episodes 0 --eval-every 0 --log-every 1 --save-every 0"
BATTLES = "--hidden-size 8 --heads 2 --max-episode-steps 12 --num-envs 3"
PARTICLES = "--hidden-size 8 --max-episode-steps 5 --num-envs 3 --task resource"
REPLAY = "--batch-size 8 --buffer-size 48 --update-every 24"
EPISODES = "--rnn-size 8 --batch-size 4 --buffer-size 16 --target-every 12"
EPISODES += " --updates-per-iteration 2"
SMALL = {
    "mappo_smac": BATTLES,
    "mipi_mappo_smac": f"{BATTLES} --value-norm --normalise-advantages",
    "rl2_particle": f"{PARTICLES} --populations 2 3 --rnn-size 8 --minibatches 2",
    "maddpg_particle": f"{PARTICLES} --population 3 {REPLAY} --inner-steps 2",
    "mra_maddpg_particle": f"{PARTICLES} --populations 2 3 {REPLAY} --inner-steps 2",
    "maac_particle": f"{PARTICLES} --population 3 {REPLAY} --heads 2",
    "epc_particle": f"{PARTICLES} --populations 2 3 {REPLAY} --sets 2 --tournament-episodes 4 "
    "--inner-steps 2",
    "refil_smac": f"{BATTLES} {EPISODES} --mixing-size 8",
    "collaq_smac": f"{BATTLES} {EPISODES}",
    "mipi_refil_smac": f"{BATTLES} {EPISODES} --mixing-size 8",
}
STEPS = {name: 60 for name in SMALL}  # of a run of an iteration or more
STEPS["rl2_particle"] = 120


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def module(name):
    is_main = name in ("mra_maddpg_particle", "mipi_refil_smac")
    return name if is_main else f"baselines.{name}"


def line(name, run_dir, steps, flags="", stop_at=0):
    """A script, a command line, and the step at which it is stopped."""
    more = f"--run-dir {run_dir} --total-timesteps {steps}"
    return module(name), f"{SMALL[name]} {ALWAYS} {more} {flags}".split(), stop_at


def launch(lines, *greedy, cwd="."):
    """These runs, one after another, in two processes under torchrun."""
    argv = [*TORCHRUN, str(DRIVER), json.dumps(lines), *greedy]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 4 * PATIENCE}
    done = subprocess.run(argv, env=env, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def check_alike(ours, theirs):
    """What both processes share is the same in both, what they have of their own is not."""
    assert differences(ours["parts"], theirs["parts"]) == []
    assert ours["iterations"] == theirs["iterations"] > 0
    for a, b in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert torch.equal(a, b) and a.norm() > 0
    assert "/rng" in "".join(differences(ours["own"], theirs["own"]))


def notes(number, rank=0, folder="."):
    """What a process had behind run `number`."""
    return torch.load(f"{folder}/{number}-{rank}.pt", weights_only=False)


# --- Two processes are one with twice the worlds --------------------------------------------------

# Runs in which agents draw nothing: flags, worlds of each process, steps of all. In Resource
# Collection with one team size, and in resource, everybody lives, so that means over the steps of a
# process count the same. No gradient is clipped.
GREEDY = {
    "mappo_smac": (
        "--scenario resource --team-sizes 3 --eval-team-sizes 3 --rollout windows --no-recurrent "
        "--window-steps 12 --returns lambda --value-norm --epochs 1 --normalise-advantages "
        "--max-grad-norm 1e9",
        2,
        96,
    ),
    "rl2_particle": ("--epochs 1 --minibatches 1 --max-grad-norm 1e9", 2, 160),
    "maddpg_particle": ("--batch-size 40 --update-every 20", 2, 80),
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """All these runs in two processes: where they are."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = []
    for name, (flags, worlds, steps) in GREEDY.items():
        lines.append(line(name, name, steps, f"{flags} --num-envs {worlds}"))
    launch(lines, "greedy", cwd=folder)
    return folder


def beside_one_process(name, folder):
    """What of a run the first of two processes had, and one process with all the worlds; and
    their logs."""
    flags, worlds, steps = GREEDY[name]
    number = list(GREEDY).index(name)
    ours = notes(number, 0, folder)
    check_alike(ours, notes(number, 1, folder))
    one = line(name, "one", steps, f"{flags} --num-envs {2 * worlds}")
    assert drive([one], greedy=True) == [0]
    alone = notes(0)
    assert ours["iterations"] == alone["iterations"] > 1
    logs = metrics(folder / name), metrics("one")
    assert [m["timesteps"] for m in logs[0]] == [m["timesteps"] for m in logs[1]]
    first = [next(m for m in log if m.get("episodes")) for log in logs]
    return SimpleNamespace(two=ours, one=alone, logs=first)


def check_gradients(both):
    """The first that are used are those of one process, but for rounding."""
    for a, b in zip(both.two["gradients"], both.one["gradients"], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def check_logged(both, *names):
    for name in names:
        two, one = (log[name] for log in both.logs)
        assert two == pytest.approx(one, rel=1e-5), name


@pytest.mark.long
@pytest.mark.numeric
def test_battles_of_two_processes(of_two):
    """The first gradients of actor and critic, with statistics of returns and advantages, and what
    is counted and logged of episodes."""
    both = beside_one_process("mappo_smac", of_two)
    check_gradients(both)
    check_logged(both, "episodes", "return", "return/3", "length")
    assert both.logs[0]["episodes"] == 4


@pytest.mark.long
@pytest.mark.numeric
def test_trials_of_two_processes(of_two):
    """The same of games in which rewards are divided by their deviation up to then."""
    both = beside_one_process("rl2_particle", of_two)
    check_gradients(both)
    check_logged(both, "episodes", "return/2", "return/3", "return")
    assert both.logs[0]["episodes"] == 16  # two trials in each world of two populations


@pytest.mark.long
@pytest.mark.numeric
def test_a_replay_of_two_processes(of_two):
    """Episodes, updates and steps count over both, and so does how large rewards are."""
    both = beside_one_process("maddpg_particle", of_two)
    check_logged(both, "episodes", "return/3")
    two, one = (run["parts"]["agent"]["actor_optimiser"]["state"] for run in (both.two, both.one))
    assert two[0]["step"] == one[0]["step"] == 3 * 2  # two steps each at 40, 60 and 80
    collectors = [notes(2, rank, of_two)["own"]["collector"] for rank in (0, 1)]
    for collector in collectors:
        assert collector["steps"] == 40
        assert collector["rewards"][0] == 80 * 3  # of three agents, who all live
        assert torch.equal(collector["rewards"], collectors[0]["rewards"])


@pytest.mark.numeric
def test_batch_norm_of_two_processes(tmp_path):
    """MAAC's: rows of a process are normalised, and running statistics moved, by those of both."""
    maac = script("baselines.maac_particle")
    draw = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(10, 3, 4, generator=draw) + 1  # (M, N, I), of two parameter sets
    alive = torch.rand(10, 3, generator=draw) < 0.7
    share = slice(0, 4), slice(4, 10)

    def normalised(rows):
        norm = maac.BatchNorm(2, 4)
        view = maac.View(obs=x[rows], alive=alive[rows], counts=(1, 2))
        out = norm(x[rows], view)
        return [tensor.tolist() for tensor in (out, norm.mean, norm.variance)]

    whole = [torch.tensor(part) for part in normalised(slice(None))]
    for rank, results in enumerate(in_two(lambda rank: normalised(share[rank]), tmp_path)):
        out, mean, variance = map(torch.tensor, results)
        torch.testing.assert_close(out, whole[0][share[rank]])
        torch.testing.assert_close(mean, whole[1])
        torch.testing.assert_close(variance, whole[2])


# --- Whole runs -----------------------------------------------------------------------------------


OTHER_FLAGS = [("mipi_refil_smac", "--policy exact")]  # no head, so nobody trains its weights


@pytest.mark.long
@pytest.mark.parametrize(("name", "flags"), [(name, "") for name in SMALL] + OTHER_FLAGS)
def test_two_processes(name, flags, capfd):
    """Both have the same weights, and draw their own actions in their own worlds; only the first
    one speaks. A run that one of them is told to stop is stopped in both, and goes on to be the
    whole, to the last bit; but not in one process."""
    steps = 4 * STEPS[name]
    lines = [line(name, "whole", steps, flags), line(name, "cut", steps, flags, steps // 2)]
    lines += [(module(name), ["--resume", "cut"], 0)]
    done = launch(lines)
    for number in range(3):
        check_alike(notes(number), notes(number, 1))
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    assert exact("whole")["timesteps"] >= steps
    assert notes(1)["iterations"] + notes(2)["iterations"] == notes(0)["iterations"]
    spoken = [text for text in done.stdout.splitlines() if text.startswith("step ")]
    assert len(spoken) == 2 * len(metrics("whole"))
    assert script(module(name)).main(["--resume", "cut", "--total-timesteps", str(2 * steps)]) == 2
    assert "2 processes began this run; 1 cannot go on" in only_error(capfd.readouterr().err)


@pytest.mark.long
@pytest.mark.parametrize("name", ["mra_maddpg_particle", "rl2_particle"])
def test_two_processes_adapt(name):
    """A run that adapts another one to a population: in MRA all agents keep the same latents."""
    steps = STEPS[name]
    flags = f"--adapt source --population 4 --run-dir adapted --total-timesteps {2 * steps}"
    adapts = module(name), f"{flags} {ALWAYS}".split(), 0
    launch([line(name, "source", steps), adapts])
    ours, theirs = notes(1), notes(1, 1)
    check_alike(ours, theirs)
    collectors = [own["own"]["collectors"]["4"] for own in (ours, theirs)]
    assert torch.equal(collectors[0]["rewards"], collectors[1]["rewards"])
    if name == "mra_maddpg_particle":
        first, second = (collector["z"] for collector in collectors)
        assert torch.equal(first, second) and (first == first[0]).all()


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux")
@pytest.mark.parametrize("name", ["mappo_smac", "maddpg_particle"])
def test_sigterm_to_torchrun_saves_in_both(name):
    """They stop behind the same iteration: a checkpoint, no summary; the run can go on."""
    _, argv, _ = line(name, "run", 10**9, "--save-every 1")
    path = ROOT / f"{module(name).replace('.', '/')}.py"
    command = [*TORCHRUN, str(path), *argv]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with opened(command, **quiet) as process:
        until(lambda: len(index("run")) > 1, pause=0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    reached = index("run")[0]["timesteps"]
    assert reached == metrics("run")[-1]["timesteps"] > 0
    assert not os.path.exists("run/summary.json")
    more = ["--resume", "run", "--total-timesteps", str(reached + STEPS[name])]
    launch([(module(name), more, 0)])
    check_alike(notes(0), notes(0, 1))
    assert os.path.exists("run/summary.json")


def test_what_cannot_be_shared(capfd, monkeypatch):
    """One sentence, exit code 2, nothing written."""
    monkeypatch.setattr(harness, "start_processes", lambda args: (0, 3, torch.device("cpu")))
    for name, flags in (("maddpg_particle", "--batch-size 8"), ("refil_smac", "--batch-size 4")):
        name, argv, _ = line(name, "run", 100, flags)
        assert script(name).main(argv) == 2
        assert "is no multiple of 3 processes" in only_error(capfd.readouterr().err)
    shares = "--batch-size 3 --buffer-size 6"  # 2 rows of a process, which has 3 worlds
    of_replays = {REPLAY: f"{shares} --update-every 3", EPISODES: shares}
    learners = [(x, more) for kind, more in of_replays.items() for x in SMALL if kind in SMALL[x]]
    assert len(learners) == 7
    for name, flags in learners:
        name, argv, _ = line(name, "run", 100, flags)
        assert script(name).main(argv) == 2
        assert "--num-envs exceeds --buffer-size" in only_error(capfd.readouterr().err)
    name, argv, _ = line("epc_particle", "run", 16, "--batch-size 6")
    assert script(name).main(argv) == 2
    assert "some stage has no step" in only_error(capfd.readouterr().err)
    assert not os.path.exists("run")
