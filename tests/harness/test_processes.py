"""Two processes under torchrun: equal weights, replays of their own, one voice."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import harness

import numpy as np
import pytest
import torch
from runs import PATIENCE, differences, exact, index, metrics, only_error, opened, until
from two_processes import in_two

from tests.harness.tools import FOREVER, flags, learner, resume, run

LINE = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(argv):
    return [sys.executable, *LINE, learner.__file__, *map(str, argv)]


def torchrun(*argv):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(argv), env=env, capture_output=True, text=True, timeout=2 * PATIENCE
    )


@pytest.mark.long
def test_two_processes(capfd):
    """Six iterations are three and three; each has its replay; only the first one speaks."""
    for argv in (flags("whole", 12), flags("cut", 6), resume("cut", 12)):
        done = torchrun(*argv)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("4 pulls at a time") == 1
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    assert [line["timesteps"] for line in metrics("cut")] == [8, 16, 24, 32, 40, 48]
    first, second = exact("whole")["ranks"]
    assert "/rng" in differences(first, second)
    replays = [torch.load(f"whole/replay-48-{rank}.pt")["pulls"] for rank in (0, 1)]
    assert len(replays[0]["rewards"]) == len(replays[1]["rewards"]) == 24
    assert not torch.equal(replays[0]["actions"], replays[1]["actions"])
    assert len(list(Path("whole").glob("events.*"))) == 1
    # One process cannot go on with it, and alone does something else.
    assert run(*resume("cut", 14)) == 2
    assert "2 processes began this run; 1 cannot go on" in only_error(capfd.readouterr().err)
    assert run(*flags("alone", 6)) == 0
    assert "/actor/weight" in differences(exact("alone")["agent"], exact("whole")["agent"])


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux")
def test_sigterm_to_torchrun_saves_in_all(tmp_path):
    """Both stop behind the same iteration, and the run can go on."""
    argv = command(flags("run", FOREVER, "--pause", 0.05))
    with opened(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until(lambda: len(index("run")) > 1, pause=0.1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        process.wait(60)
        assert time.monotonic() - began < 45
    reached = index("run")[0]["timesteps"]
    assert reached == metrics("run")[-1]["timesteps"]
    done = torchrun(*resume("run", reached // 4 + 4, "--pause", 0))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_clean_exits():
    """gloo's threads have crashed short runs at their end now and then."""
    for number in range(10):
        done = torchrun(*flags(f"run-{number}", 1, "--final-episodes", 0))
        assert done.returncode == 0, done.stderr[-3000:]


# What is of all processes -------------------------------------------------------------------------


ROWS = np.random.default_rng(0).normal(3, 2, (2, 7)).astype(np.float32)  # of two processes


def test_sums_and_means_are_of_all(tmp_path):
    net = torch.nn.Linear(1, 1)

    def found(rank):
        mean, deviation = harness.mean_and_deviation(torch.from_numpy(ROWS[rank, : 4 + 3 * rank]))
        net.weight.grad = torch.full((1, 1), 1.0 + rank)
        parameters = harness.average_gradients(net)
        assert harness.average_gradients(torch.nn.Linear(1, 1)) == []  # none has a gradient
        total = harness.total(5 + rank)
        return float(mean), float(deviation), total, len(parameters), float(net.weight.grad)

    every = np.concatenate([ROWS[0, :4], ROWS[1]]).astype(float)
    for mean, deviation, total, number, gradient in in_two(found, tmp_path):
        assert mean == pytest.approx(every.mean(), rel=1e-6)
        assert deviation == pytest.approx(every.std(), rel=1e-6)
        assert (total, number, gradient) == (11, 1, 1.5)
    row = torch.from_numpy(ROWS[0])
    assert harness.mean_and_deviation(row) == (row.mean(), row.std(correction=0))
    assert harness.total(5) == 5


def test_what_is_not_finite_in_one_ends_all_even_where_they_look_at_other_things(tmp_path):
    def found(rank):
        both = {"a": torch.zeros(2), "b": torch.tensor([0.0, float("nan")])}
        harness.check_finite(**({} if rank else {"a": both["a"]}))
        with pytest.raises(harness.RunError) as error:
            harness.check_finite(**(both if rank else {}))
        return str(error.value)

    for text in in_two(found, tmp_path):
        assert text.startswith("b is not finite")


def test_draws_are_ones_own_and_the_first_process_draws_as_alone(tmp_path):
    def seeds(rank):
        return [harness.own_generator(seed).initial_seed() for seed in range(3)]

    first, second = in_two(seeds, tmp_path)
    assert first == [0, 1, 2] == seeds(0)
    assert len({*first, *second}) == 6


def test_the_first_process_is_asked(tmp_path):
    def ask(rank):
        run = SimpleNamespace(rank=rank)
        return harness.Run.in_first(run, lambda: f"said by {rank}")

    assert in_two(ask, tmp_path) == ["said by 0"] * 2


def as_torchrun_does(rank, argv):
    """The learner's exit code, in one of two processes; where the run is when it leaves."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    code = learner.main([str(x) for x in argv])
    return code, index("run")[0]["timesteps"]


@pytest.mark.parametrize("struck", [{1}, {0, 1}])
def test_a_signal_while_they_ask_each_other_is_not_lost(struck, tmp_path, monkeypatch):
    """It comes after a process has told the others that it goes on, before it hears from them."""

    def found(rank):
        goes_on, plain = harness.Run.goes_on, harness.sum_over_processes

        def asked(x):
            summed = plain(x)
            signal.raise_signal(signal.SIGTERM)
            return summed

        def when_asked(run):
            is_hit = rank in struck and run.timesteps == 24
            with monkeypatch.context() as patch:
                patch.setattr(harness, "sum_over_processes", asked if is_hit else plain)
                return goes_on(run)

        monkeypatch.setattr(harness.Run, "goes_on", when_asked)
        return as_torchrun_does(rank, flags("run", 12))

    assert in_two(found, tmp_path) == [(75, 32)] * 2


def test_two_of_a_clusters_signals_are_one(tmp_path, monkeypatch):
    """torchrun and a cluster's manager may both send SIGTERM: the second one does not end a process
    before it has saved."""

    def found(rank):
        advance = harness.Run.advance

        def struck(run, steps):
            advance(run, steps)
            for _ in range(2 * (run.timesteps == 24)):
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(harness.Run, "advance", struck)
        return as_torchrun_does(rank, flags("run", 12))

    assert in_two(found, tmp_path) == [(75, 24)] * 2


def test_nobody_leaves_before_a_checkpoint_is_written(tmp_path, monkeypatch):
    def found(rank):
        save_state = harness.Run.save_state

        def slow(run, *rest):
            time.sleep(1)
            save_state(run, *rest)

        monkeypatch.setattr(harness.Run, "save_state", slow)
        return as_torchrun_does(rank, flags("run", 4, "--save-every", 0))

    assert in_two(found, tmp_path) == [(0, 16)] * 2


def test_processes_that_read_different_checkpoints(tmp_path, monkeypatch, capfd):
    """As on a file system of a cluster that shows one of them an older index; with --adapt, too,
    which loads by alike=True."""

    def found(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        codes = [learner.main([str(x) for x in flags("run", 4, "--save-every", 8)])]
        newest = "run/checkpoint-16.pt" if rank else "run/checkpoint-8.pt"
        codes.append(learner.main(["--resume", newest, "--total-timesteps", "64"]))
        with pytest.raises(harness.UsageError, match=r"of different steps: \[8, 16\]"):
            harness.load_checkpoint(newest, alike=True)
        harness.load_checkpoint("run", alike=True)
        return codes

    assert in_two(found, tmp_path) == [[0, 2]] * 2
    assert "Processes read checkpoints of different steps: [8, 16]." in capfd.readouterr().err


def test_shares_of_what_counts_over_all():
    args = learner.Args(num_envs=6, buffer_size=9)
    share = harness.Run.own_share(SimpleNamespace(size=3), args, "num_envs", "buffer_size")
    assert share == dataclasses.replace(args, num_envs=2, buffer_size=3)
    with pytest.raises(harness.UsageError, match="--num-envs 6 is no multiple of 4 processes"):
        harness.Run.own_share(SimpleNamespace(size=4), args, "num_envs")


@pytest.mark.parametrize("resumes, expected", [("run", 1), ("", 0)])
def test_who_only_evaluates_has_what_the_first_process_had(resumes, expected):
    ranks = [{"rng": torch.Generator().manual_seed(seed).get_state()} for seed in (0, 1)]
    args = SimpleNamespace(resume=resumes)
    run = SimpleNamespace(rank=1, args=args, source="run", saved={"ranks": ranks})
    own = {"rng": torch.Generator().manual_seed(5)}
    harness.Run.restore_own(run, own)
    assert torch.equal(own["rng"].get_state(), ranks[expected]["rng"])
