"""Every script on a GPU: it trains, resumes, goes on with what the CPU has trained and gives it
back, with --amp, --compile and --tf32 too, and begins as on the CPU.

    pytest -m gpu                              some minutes; skipped where there is no CUDA device
    UNSEEN_TEST_DEVICE=cpu pytest -m gpu       the same on a CPU: are the tests themselves right?

Two of the scripts go through all of it on the CPU in `make test`.
"""

import dataclasses
import functools
import importlib
import json
import os
import shutil

import harness

import pytest
import torch
from all_scripts import MELTINGPOT, SCRIPTS, command, longer, weights
from runs import MAPPO, index, metrics, states

DEVICE = os.environ.get("UNSEEN_TEST_DEVICE", "cuda")
THERE = DEVICE == "cpu" or torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not THERE, reason="no CUDA device")]
SMALL = (MAPPO, "baselines.maddpg_particle")
CASES = [pytest.param(name, DEVICE, marks=GPU, id=f"{name}-{DEVICE}") for name in SCRIPTS]
CASES += [pytest.param(name, "cpu", id=f"{name}-in make test") for name in SMALL]
every_script = pytest.mark.parametrize(("name", "device"), CASES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(name, device, seed): the directory of a tiny run, trained once, and for reading only."""

    @functools.cache
    def trained(name, device, copy=1):
        run_dir = tmp_path_factory.mktemp("runs") / f"{name.rpartition('.')[2]}-{copy}"
        train(name, *command(name, run_dir, "--device", device, "--log-every", 1))
        return run_dir

    return trained


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """It takes longer than a tiny run."""
    monkeypatch.setattr(harness, "distributions", lambda: [])


def train(name, *argv):
    assert importlib.import_module(name).main([str(word) for word in argv]) == harness.FINISHED


def first_update(run_dir):
    """The first line of the log that has losses."""
    lines = [line for line in metrics(run_dir) if any("loss" in key for key in line)]
    return lines[0]


def assert_near(found, expected, much=1e-3):
    """Weights: on average they differ by less than optimisers move them in a step."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        assert (one - other).abs().mean() < much


@every_script
def test_it_runs_there(name, device, runs):
    """Where it says it does."""
    about = json.loads((runs(name, device) / "args.json").read_text())
    assert about["resolved"]["device"].partition(":")[0] == device.partition(":")[0]
    assert index(runs(name, device))[0]["timesteps"] > 0
    assert len([*weights(runs(name, device))]) > 5


@every_script
def test_two_runs_begin_alike(name, device, runs):
    """To the last bit on a CPU. On a GPU gradients that are scattered are added in any order: there
    the first update's losses are near, and how many tensors differ in the end is printed."""
    one, other = runs(name, device), runs(name, device, copy=2)
    expected = first_update(other)
    for key, x in first_update(one).items():
        assert x == pytest.approx(expected[key], rel=1e-4, abs=1e-6, nan_ok=True), key
    pairs = [*zip(weights(one), weights(other), strict=True)]
    unequal = sum(not torch.equal(a, b) for a, b in pairs)
    print(f"{name}: {unequal} of {len(pairs)} tensors differ between two runs")
    assert unequal == 0 or device != "cpu"
    assert_near(*zip(*pairs))


@every_script
def test_it_begins_as_on_a_cpu(name, device, runs):
    """Episodes and the first update's losses, but for rounding; weights after the run."""
    there, here = first_update(runs(name, device)), first_update(runs(name, "cpu"))
    assert there.keys() == here.keys() and len(here) > 2
    for key, x in here.items():
        assert there[key] == pytest.approx(x, rel=1e-2, abs=1e-4, nan_ok=True), key
    assert_near(weights(runs(name, device)), weights(runs(name, "cpu")))


@every_script
def test_half_and_resumed_is_the_whole(name, device, runs, tmp_path):
    """But for the order of sums on a GPU. (To the last bit on a CPU: each script's own tests.)"""
    steps = states(runs(name, device))[0]["timesteps"]
    half, whole = tmp_path / "half", tmp_path / "whole"
    # With more steps all of EPC's stages are longer: half of it is its older checkpoint.
    if name == "baselines.epc_particle":
        train(name, *command(name, whole, "--device", device, "--save-every", 1))
        shutil.copytree(whole, half)
        train(name, "--resume", half / index(half)[1]["name"], "--device", device)
        assert_near(weights(half), weights(whole))
        return
    train(name, *command(name, half, "--device", device))
    train(name, *longer(half, device))
    train(name, *command(name, whole, "--device", device, "--total-timesteps", 2 * steps))
    assert_near(weights(half), weights(whole))
    assert states(half)[0]["timesteps"] == states(whole)[0]["timesteps"] >= 2 * steps


@every_script
def test_from_the_cpu_there_and_back(name, device, runs, tmp_path):
    """A checkpoint of the CPU goes on there, and what came of it goes on on the CPU; replays, too.
    The same on the CPU alone gives the same weights, but for rounding."""
    found = []
    for second in (device, "cpu"):
        run_dir = tmp_path / second.replace(":", "")
        train(name, *command(name, run_dir, "--device", "cpu"))
        train(name, *longer(run_dir, second))
        train(name, *longer(run_dir, "cpu"))
        found.append(weights(run_dir))
        if device == "cpu":
            return
    assert_near(*found, much=3e-3)


@every_script
def test_evaluations_agree(name, device, runs, capsys):
    """The same checkpoint plays the same episodes on both."""
    run = runs(name, "cpu")  # it prints a table, too, if it is trained here
    found = []
    for where in (device, "cpu"):
        capsys.readouterr()
        train(name, "--eval-only", run, "--device", where)
        lines = capsys.readouterr().out.splitlines()
        found.append([line for line in lines if line.startswith("|")])
    assert len(found[0]) > 2 and found[0] == found[1]


@every_script
def test_flags_for_gpus(name, device, tmp_path):
    """--tf32, and --amp and --compile where there are such flags."""
    fields = {field.name for field in dataclasses.fields(importlib.import_module(name).Args)}
    flags = ["--tf32", *["--amp"] * ("amp" in fields)]
    if "compile" in fields and device != "cpu":
        flags.append("--compile")
    assert "amp" in fields or name not in MELTINGPOT
    train(name, *command(name, tmp_path / "run", "--device", device, *flags))
    assert all(x.isfinite().all() for x in weights(tmp_path / "run"))
    about = json.loads((tmp_path / "run/args.json").read_text())
    assert about["tf32"] and about["device"] == device
    if "amp" in fields:
        assert about["resolved"]["amp"] == harness.has_bf16(torch.device(device))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_the_second_gpu(tmp_path):
    train(MAPPO, *command(MAPPO, tmp_path / "run", "--device", "cuda:1"))
    about = json.loads((tmp_path / "run/args.json").read_text())
    assert about["resolved"]["device"] == "cuda:1"
