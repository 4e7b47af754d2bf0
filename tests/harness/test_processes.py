"""Two processes under torchrun: equal weights, replays of their own, one voice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import PATIENCE, differences, exact, index, metrics, only_error, until

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
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until(lambda: len(index("run")) > 1, pause=0.1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        process.wait(60)
        assert time.monotonic() - began < 45
    reached = index("run")[0]["timesteps"]
    assert reached == metrics("run")[-1]["timesteps"]
    done = torchrun(*resume("run", reached // 4 + 4, "--pause", 0))
    assert done.returncode == 0, done.stderr[-3000:]
