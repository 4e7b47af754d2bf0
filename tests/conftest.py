"""Runs that several tests read and none changes."""

import signal

import pytest
import torch
from runs import BIDIST, MAPPO, script, tiny

from envs.statistics import aligned_table

torch.set_num_threads(1)  # as runs do; on a busy machine two wait for each other
# A shell's background jobs ignore Ctrl-C, those under nohup a closed terminal, and so would every
# process that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Two seeds of BiDist and one of MAPPO, eight iterations each."""
    paths = []
    for name, seed in ((BIDIST, 1), (BIDIST, 2), (MAPPO, 1)):
        path = tmp_path_factory.mktemp("runs") / f"{name.rpartition('.')[2]}-s{seed}"
        argv = tiny(name, path, 8, "--seed", seed, "--final-episodes", 2)
        assert script(name).main(argv) == 0
        paths.append(path)
    return paths


def pytest_terminal_summary(terminalreporter):
    """The waits for a GPU that test_elsewhere.py counted here or in pytest-xdist's workers."""
    reports = [x for how in ("passed", "failed") for x in terminalreporter.stats.get(how, [])]
    found = [x for report in reports for x in getattr(report, "user_properties", [])]
    rows = [counts for name, counts in found if name == "waits"]
    if rows:
        terminalreporter.section("waits for a GPU, as counted with a pretended one")
        lines = [[case, f"{step:.2f}", f"{minibatch:.2f}"] for case, step, minibatch in rows]
        header = ["script", "a step", "a minibatch"]
        terminalreporter.write_line(aligned_table([header, *sorted(lines)]))
