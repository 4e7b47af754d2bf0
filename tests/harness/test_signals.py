"""Runs that are asked to stop, and how they say what they do meanwhile."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import harness

import pytest
from runs import differences, exact, index, metrics, opened, start, until

from tests.harness.tools import FOREVER, NAME, PULLS, flags, learner, resume, run

SIGNALS = [
    signal.SIGINT,
    pytest.param(signal.SIGTERM, marks=pytest.mark.long),
    pytest.param(signal.SIGHUP, marks=pytest.mark.long),
]


def lines(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    return metrics(run_dir) if path.exists() else []


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_says_so_saves_and_resumes(number, tmp_path):
    """Code 75 and no summary, so that nobody takes it for finished; a line at once."""
    argv = flags("run", FOREVER, "--pause", 1.5)
    with start(NAME, argv, tmp_path) as process:
        until(lambda: lines("run"), process)
        process.send(number)
        began = time.monotonic()
        until(lambda: "Stopping" in process.stderr(), process)
        assert time.monotonic() - began < 1.4, "not only after the iteration"
        assert process.wait() == 75
    assert "Traceback" not in process.stderr() and not Path("run/summary.json").exists()
    done = index("run")[0]["timesteps"]
    assert done == lines("run")[-1]["timesteps"] > 0
    iterations = done // PULLS + 2
    assert run(*resume("run", iterations, "--pause", 0)) == 0
    assert run(*flags("whole", iterations)) == 0
    assert differences(exact("run"), exact("whole")) == []
    assert metrics("run") == metrics("whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_it_at_once(number, tmp_path):
    """A service manager and a launcher may both send SIGTERM, so it is a second one only later."""
    with start(NAME, flags("run", FOREVER, "--pause", 300), tmp_path) as process:
        until(lambda: index("run"), process)
        time.sleep(0.5)
        process.send(number)
        until(lambda: "Stopping" in process.stderr(), process)
        assert process.poll() is None
        process.send(signal.SIGTERM)
        if number == signal.SIGTERM:
            time.sleep(harness.SAME_SIGNAL + 0.2)
        assert process.poll() is None
        process.send(number)
        assert process.wait() == (130 if number == signal.SIGINT else -number)
    assert index("run")[0]["timesteps"] == 0


@pytest.mark.parametrize(
    ("pause", "more"), [(2, ()), (0.3, ("--eval-every", 4, "--eval-episodes", 1000))]
)
def test_two_sigterms_are_one(pause, more, tmp_path):
    """In an iteration and, as the evaluation is left, there: the run is saved."""
    argv = flags("run", FOREVER, "--pause", pause, *more)
    with start(NAME, argv, tmp_path) as process:
        until(lambda: lines("run"), process)
        time.sleep(0.8)
        process.send(signal.SIGTERM)
        if not more:  # else it may end before a second one comes
            until(lambda: "Stopping" in process.stderr(), process)
        process.send(signal.SIGTERM)
        assert process.wait() == 75
    assert "Traceback" not in process.stderr()
    assert index("run")[0]["timesteps"] > 0


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", ["eval", pytest.param("final", marks=pytest.mark.long)])
def test_stop_in_an_evaluation(kind, number, tmp_path):
    """At once, not after its episodes; the weights are saved. Resumed, it is finished."""
    argv = flags("run", 2, "--final-episodes", 1000, "--pause", 0.3)
    argv += ["--eval-every", "4", "--eval-episodes", "1000" if kind == "eval" else "1"]
    with start(NAME, argv, tmp_path) as process:
        wanted = 1 if kind == "eval" else 4  # lines: 2 iterations, 2 evaluations
        until(lambda: len(lines("run")) == wanted, process)
        time.sleep(0.8)
        process.send(number)
        began = time.monotonic()
        assert process.wait() == 75
        assert time.monotonic() - began < 5
    assert "Traceback" not in process.stderr() and not Path("run/summary.json").exists()
    assert index("run")[0]["timesteps"] == (4 if kind == "eval" else 8)
    more = ("--pause", 0, "--final-episodes", 3, "--eval-episodes", 1)
    assert run(*resume("run", 2, *more)) == 0
    assert json.loads(Path("run/summary.json").read_text())["timesteps"] == 8
    finals = [line for line in lines("run") if any(name.startswith("final/") for name in line)]
    assert len(finals) == 1
    evaluated = [line["timesteps"] for line in lines("run") if "eval/greedy/return" in line]
    assert evaluated == [4, 8]  # what was stopped is made up, at its own step


def test_a_signal_that_comes_while_a_library_runs(tmp_path, monkeypatch):
    """Numba turns what a handler raises in one of its calls into a SystemError; others lose it. So
    no handler may raise, and the evaluation ends at its next step."""
    played = []

    def judge(args, agent, evaluation):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error
        for _ in range(3):
            evaluation.progress(1)
            played.append(1)

    monkeypatch.setattr(learner, "evaluate", judge)
    assert run(*flags("run", 1, "--final-episodes", 3)) == 75
    assert not played and not Path("run/summary.json").exists()


@pytest.mark.parametrize("iterations", [1, 3])
def test_an_evaluation_that_was_killed_is_made_up(iterations, tmp_path):
    """Saved at the same step, so that no iteration leads to it again; and once is enough."""
    more = ("--eval-every", PULLS * iterations, "--save-every", PULLS)
    argv = flags("run", FOREVER, *more, "--pause", 0.3, "--eval-episodes", 1000)
    reached = PULLS * iterations
    with start(NAME, argv, tmp_path) as process:
        until(lambda: index("run")[:1] and index("run")[0]["timesteps"] == reached, process)
        time.sleep(0.5)
        process.send(signal.SIGKILL)
        process.wait()
    for _ in range(2):
        assert run(*resume("run", 4, "--pause", 0, "--eval-episodes", 2)) == 0
    assert run(*flags("whole", 4, *more, "--eval-episodes", 2)) == 0
    assert metrics("run") == metrics("whole")
    assert any("eval/greedy/return" in line for line in metrics("run"))


def test_a_finished_run_has_a_summary_and_a_resumed_one_has_none_until_it_has_finished(tmp_path):
    assert run(*flags("run", 2)) == 0
    summary = Path("run/summary.json")
    assert json.loads(summary.read_text())["eval"] == {}
    assert run(*resume("run", 2, "--final-episodes", 2)) == 0  # evaluated once more
    assert run(*resume("run", 2, "--final-episodes", 3)) == 0
    assert json.loads(summary.read_text())["eval"]["greedy"]["episodes"] == 3
    assert len([line for line in lines("run") if "final/greedy/return" in line]) == 1
    with start(NAME, resume("run", FOREVER, "--pause", 0.1), tmp_path) as process:
        until(lambda: len(lines("run")) > 4, process)
        assert not summary.exists()
        process.send(signal.SIGTERM)
        assert process.wait() == 75
    assert not summary.exists()


def test_ctrl_c_while_importing(tmp_path):
    """No traceback of whatever torch was doing."""
    for delay in (0.1, 0.4, 0.8):
        with opened(
            [sys.executable, learner.__file__, *flags("run", FOREVER)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            # A shell's background jobs, which tests may be, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            until(lambda: "harness" in maps(process.pid), pause=0.005)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert "Traceback" not in err and process.returncode in (-signal.SIGINT, 130, 75), err


def maps(pid):
    """What says that a process has got as far as importing the harness: its SIGINT is no longer
    caught (a bit of SigCgt)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "harness"
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    started = Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    is_caught = int(caught.split()[1], 16) >> (signal.SIGINT - 1) & 1
    modules = Path(f"/proc/{pid}/maps").read_text()
    return "harness" if started and not is_caught and "pydantic_core" in modules else ""


@pytest.mark.long
def test_a_closed_terminal_stops_and_saves(tmp_path):
    """The system sends SIGHUP then, and there is nobody left to write to."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, learner.__file__, *flags("run", FOREVER, "--pause", 0.05)],
        stdin=terminal,
        stderr=terminal,
        stdout=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    until(lambda: len(index("run")) > 1)
    os.close(main)
    assert process.wait(60) == 75
    assert index("run")[0]["timesteps"] == lines("run")[-1]["timesteps"]


@pytest.mark.long
def test_the_end_of_a_pipe_ends_no_run(tmp_path):
    """`| head`, or `| tee` after a Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, learner.__file__, *flags("run", 40, "--pause", 0.02)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert json.loads(Path("run/summary.json").read_text())["timesteps"] == 40 * PULLS


@pytest.mark.long
def test_nohup(tmp_path):
    """What is ignored stays ignored."""
    process = subprocess.Popen(
        [sys.executable, learner.__file__, *flags("run", FOREVER, "--pause", 0.02)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    until(lambda: len(lines("run")) > 2)
    process.send_signal(signal.SIGHUP)
    reached = len(lines("run"))
    until(lambda: len(lines("run")) > reached + 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


# Progress -----------------------------------------------------------------------------------------


def test_an_evaluation_says_how_far_it_is(tmp_path, monkeypatch, capfd):
    """Without a terminal: a line now and then."""
    monkeypatch.setattr(harness.Evaluation, "INTERVAL", 0.2)
    assert run(*flags("run", 1, "--final-episodes", 10, "--pause", 0.05)) == 0
    out = [x for x in capfd.readouterr().out.splitlines() if x.startswith("final evaluation: ")]
    assert 3 <= len(out) <= 6 and all(line.endswith("of 20 episodes") for line in out)
    played = [int(line.split()[2]) for line in out]
    assert played == sorted(set(played))


@pytest.mark.long
def test_bars_on_a_terminal(tmp_path):
    """One of environment steps, one of episodes."""
    main, terminal = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    argv = flags("run", 20, "--final-episodes", 10, "--pause", 0.05)
    process = subprocess.Popen(
        [sys.executable, learner.__file__, *argv], stderr=terminal, stdout=terminal
    )
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(main, 4096)
        except OSError:  # it has ended
            break
    assert process.wait() == 0
    text = said.decode()
    assert "80/80" in text and " steps/s" in text
    assert "final evaluation" in text and "/20 [" in text and " episodes/s" in text
    assert "step 4 " not in text, "the bar is enough"
