"""Worker processes of envs/meltingpot/worlds.py that die, hang or are slow, while somebody waits
for them and while nobody does; real signals to real processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sleepy_engines
from sleepy_engines import SPEC, Sleepy, SleepyEngines

import envs.meltingpot.worlds as ours
from envs.meltingpot.tiles import WorldError

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


@pytest.fixture(autouse=True)
def workers_find_the_engines(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(sleepy_engines.__file__).parent))


@pytest.fixture
def long_builds(monkeypatch):
    """All builds count as long: standby processes do them."""
    monkeypatch.setattr(ours, "SHORT_BUILD", -1.0)


def worlds(
    num_envs: int, prepare_s=0.0, build_s=0.0, step_s=0.0, busy=False, log="", **options
) -> Sleepy:
    """Worlds whose engines take so many seconds; one worker unless told."""
    engines = SleepyEngines(SPEC, prepare_s, build_s, step_s, busy, str(log))
    return Sleepy(num_envs, engines, **{"num_workers": 1} | options)


def step(envs: Sleepy) -> ours.Step:
    return envs.step(np.zeros((envs.num_envs, 1), int))


def episodes(envs: Sleepy) -> list[int]:
    """Numbers of the episodes that the worlds play now."""
    return envs.obs.features[:, 0, 2].astype(int).tolist()


def processes(envs: Sleepy) -> list[int]:
    """Who serves the worlds, as the worlds themselves say."""
    return envs.obs.features[:, 0, 3].astype(int).tolist()


def wait_for(condition, seconds=120.0, between=lambda: None):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        between()
        time.sleep(0.01)


def all_built(envs: Sleepy) -> bool:
    return all(worker and worker.reserved.get(b) for b, worker in enumerate(envs.next))


def send(worker: ours.Worker, number: signal.Signals) -> None:
    os.kill(worker.process.pid, number)


def name(worker: ours.Worker, worlds: str) -> str:
    number, pid = worker.number, worker.process.pid
    return rf"Melting Pot worker {number} \(process {pid}, sleepy, worlds: {worlds}\)"


# --- Whose answer is waited for -------------------------------------------------------------------


def test_a_stopped_worker_is_found_when_it_is_waited_for():
    with worlds(2, num_workers=2, timeout=1.0) as envs:
        envs.reset()
        send(envs.workers[1], signal.SIGSTOP)
        began = time.monotonic()
        sentence = rf"^{name(envs.workers[1], '1')} gave no sign for 1 s\.$"
        with pytest.raises(WorldError, match=sentence):
            step(envs)
        assert 0.8 < time.monotonic() - began < 6


def test_a_sleeping_worker_is_found_too():
    """It hangs, but nobody has stopped it."""
    with worlds(1, step_s=1000.0, timeout=1.0) as envs:
        envs.reset()
        with pytest.raises(WorldError, match=r"worlds: 0\) gave no sign for 1 s\.$"):
            step(envs)


def test_a_worker_that_is_stopped_for_a_while():
    with worlds(1, timeout=5.0) as envs:
        envs.reset()
        (worker,) = envs.workers
        send(worker, signal.SIGSTOP)
        timer = threading.Timer(1.5, send, (worker, signal.SIGCONT))
        timer.start()
        began = time.monotonic()
        assert step(envs).reward.tolist() == [[1.0]]
        assert time.monotonic() - began > 1.2
        timer.join()


def test_nobody_waits_for_a_stopped_worker_while_the_trainer_learns():
    with worlds(2, num_workers=2, timeout=0.5) as envs:
        envs.reset()
        send(envs.workers[1], signal.SIGSTOP)
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            envs.check()
            time.sleep(0.05)
        send(envs.workers[1], signal.SIGCONT)
        assert step(envs).reward.tolist() == [[1.0], [1.0]]


@needs_proc
def test_a_worker_that_works_is_slow_and_not_dead():
    """Three times the time-out, all of it at work."""
    with worlds(1, step_s=1.5, busy=True, timeout=0.5) as envs:
        envs.reset()
        began = time.monotonic()
        assert step(envs).reward.tolist() == [[1.0]]
        assert time.monotonic() - began > 1.4


@needs_proc
def test_a_worker_that_works_for_ever_is_found():
    with worlds(1, step_s=1e6, busy=True, timeout=0.2) as envs:
        envs.reset()
        with pytest.raises(WorldError, match=r"0\) has worked for 2 s without an answer\.$"):
            step(envs)


@pytest.mark.long
@needs_proc
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinities")
def test_a_worker_on_a_crowded_core_is_slow_and_not_dead():
    """Four busy processes beside it, to which the kernel gives two hundred times as much each."""
    hog = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    core = min(os.sched_getaffinity(0))
    with worlds(1, step_s=0.03, busy=True, timeout=0.5) as envs:
        envs.reset()
        pid = envs.workers[0].process.pid
        os.sched_setaffinity(pid, {core})
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                process = subprocess.Popen([sys.executable, "-c", hog, str(core)])
                stack.callback(process.wait)
                stack.callback(process.kill)
            time.sleep(1.0)
            began = time.monotonic()
            assert step(envs).reward.tolist() == [[1.0]]
            took = time.monotonic() - began
    assert took > 0.5, "the worker has had all it wanted: this test shows nothing"


@pytest.mark.parametrize("found_by", ["step", "check"])
def test_a_dead_worker_that_served_worlds(found_by):
    with worlds(3, num_workers=2) as envs:
        envs.reset()
        worker = envs.workers[1]
        send(worker, signal.SIGKILL)
        worker.process.wait()
        began = time.monotonic()
        with pytest.raises(WorldError, match=rf"^{name(worker, '2')} was killed by SIGKILL\.$"):
            envs.check() if found_by == "check" else step(envs)
        assert time.monotonic() - began < 2


def test_a_worker_dies_while_another_one_is_waited_for():
    with worlds(2, num_workers=2, timeout=60.0) as envs:
        envs.reset()
        slow, dead = envs.workers
        send(slow, signal.SIGSTOP)
        timer = threading.Timer(1.0, send, (dead, signal.SIGKILL))
        timer.start()
        began = time.monotonic()
        with pytest.raises(WorldError, match=rf"^{name(dead, '1')} was killed by SIGKILL\.$"):
            step(envs)
        assert time.monotonic() - began < 10
        timer.join()


@pytest.mark.parametrize("after", ["reset", "rest"])
def test_a_worker_that_dies_while_its_worlds_rest(after, capfd):
    """As all of them do at the end of an evaluation; the next one begins with another worker."""
    with worlds(2, num_workers=2) as envs:
        envs.reset()
        envs.rest(1)
        step(envs)
        worker = envs.workers[1]
        send(worker, signal.SIGKILL)
        worker.process.wait()
        envs.check()
        if after == "rest":
            envs.rest(1)
        envs.reset()
        assert step(envs).reward.tolist() == [[1.0], [1.0]]
        sentence = rf"{name(worker, 'none')} was killed by SIGKILL\. It is replaced\."
        assert re.search(sentence, capfd.readouterr().err)


# --- Standby processes ----------------------------------------------------------------------------


def test_a_start_may_take_a_minute(long_builds):
    """Also if it is known that builds are short."""
    with worlds(1, prepare_s=2.0, timeout=0.5, max_episode_steps=1) as envs:
        envs.reset()
        step(envs)
        assert episodes(envs) == [1]


@pytest.mark.long
@pytest.mark.parametrize("holds", ["a build under way", "an episode"])
def test_a_slow_standby_delays_nobody(holds, long_builds):
    """Far beyond the time-out, as long as its world goes on; then it is used as if nothing had
    happened."""
    with worlds(2, build_s=1.0, timeout=0.5, max_episode_steps=60) as envs:
        envs.reset()
        if holds == "an episode":
            wait_for(lambda: all_built(envs), between=envs.check)
        else:
            wait_for(lambda: envs.next[1] and envs.next[1].started, between=envs.check)
        standby = envs.next[1]
        send(standby, signal.SIGSTOP)
        for _ in range(59):
            assert not step(envs).episodes
            envs.check()
            time.sleep(0.05)
        assert standby in envs.workers and envs.next[1] is standby
        send(standby, signal.SIGCONT)
        assert len(step(envs).episodes) == 2
        assert episodes(envs) == [1, 1] and processes(envs)[1] == standby.process.pid


def test_a_stopped_standby_is_fatal_when_it_is_needed(long_builds):
    with worlds(2, timeout=1.0, max_episode_steps=5) as envs:
        envs.reset()
        wait_for(lambda: all_built(envs), between=envs.check)
        standby = envs.next[1]
        send(standby, signal.SIGSTOP)
        for _ in range(4):
            step(envs)
        with pytest.raises(WorldError, match=rf"^{name(standby, '1')} gave no sign for 1 s\.$"):
            step(envs)


@pytest.mark.parametrize(
    "holds, found_by",
    [
        pytest.param("nothing yet", "check", marks=pytest.mark.long),
        ("a build under way", "check"),
        pytest.param("an episode", "check", marks=pytest.mark.long),
        pytest.param("an episode", "need", marks=pytest.mark.long),
    ],
)
def test_a_dead_standby_is_replaced(holds, found_by, long_builds, capfd):
    """No episode is lost: another process builds the one that it held."""
    with worlds(2, build_s=0.5, max_episode_steps=5) as envs:
        envs.reset()
        if holds == "an episode":
            wait_for(lambda: all_built(envs), between=envs.check)
        elif holds == "a build under way":
            wait_for(lambda: envs.next[1] and envs.next[1].building(), between=envs.check)
        standby = envs.next[1]
        send(standby, signal.SIGKILL)
        standby.process.wait()
        if found_by == "check":
            envs.check()
            assert standby not in envs.workers
            wait_for(lambda: all_built(envs), between=envs.check)
            assert envs.next[1].process.pid != standby.process.pid
        for episode in range(1, 4):
            for t in range(5):
                assert episodes(envs) == [episode - 1] * 2
                assert len(step(envs).episodes) == 2 * (t == 4)
        sentence = rf"{name(standby, 'none')} was killed by SIGKILL\. It is replaced\."
        assert len(re.findall(sentence, capfd.readouterr().err)) == 1


def test_standbys_that_die_again_and_again(long_builds, capfd):
    """Worlds go on without them, and no more are started than can be of use."""
    with worlds(2, max_episode_steps=4) as envs:
        envs.reset()
        for episode in range(8):
            assert episodes(envs) == [episode] * 2
            for _ in range(4):
                envs.check()
                for worker in envs.workers:
                    if not worker.serving:
                        send(worker, signal.SIGKILL)
                        worker.process.wait()
                step(envs)
        assert 3 < envs.started <= 2 * (2 + 1) + 2
        assert "worlds: none) was killed by SIGKILL" in capfd.readouterr().err


# --- Building ahead -------------------------------------------------------------------------------


@pytest.mark.long
def test_one_check_is_enough_for_long_builds(tmp_path, long_builds):
    """All next episodes are built while the trainer learns, two at a time as there are two workers,
    without another call."""
    log = tmp_path / "log"
    with worlds(6, build_s=0.2, num_workers=2, log=log) as envs:
        envs.reset()
        envs.check()
        wait_for(lambda: log.exists() and log.read_text().count("-") == 12)
        envs.check()
        wait_for(lambda: all_built(envs), between=envs.check)
        changes = [1 if line[0] == "+" else -1 for line in log.read_text().splitlines()]
        assert len(changes) == 24 and np.cumsum(changes).max() == 2
        assert envs.episode.tolist() == [2] * 6


def test_one_check_is_enough_for_short_builds(tmp_path):
    log = tmp_path / "log"
    with worlds(6, num_workers=2, log=log, max_episode_steps=3) as envs:
        envs.reset()
        step(envs)
        assert log.read_text().count("+") == 6, "built while worlds are stepped"
        envs.check()
        wait_for(lambda: log.read_text().count("-") == 12)
        step(envs), step(envs)
        assert episodes(envs) == [1] * 6 and len(envs.workers) == 2
        assert log.read_text().count("+") == 12, "built twice"


def test_a_build_that_is_waited_for_takes_no_turn(tmp_path, long_builds):
    """All turns are taken, here by this process; a world ends nevertheless."""
    log = tmp_path / "log"
    with worlds(2, log=log, max_episode_steps=5) as envs:
        fcntl.lockf(envs.arrays.fd, fcntl.LOCK_EX, 1, 1)
        envs.reset()
        for _ in range(4):
            step(envs)
            envs.check()
        standbys = [worker for worker in envs.workers if not worker.serving]
        assert len(standbys) == 2 and log.read_text().count("+") == 2
        step(envs)
        assert episodes(envs) == [1, 1]


@pytest.mark.long
def test_the_dead_keep_no_turn(tmp_path, long_builds):
    """A standby is killed while it builds; the other one has waited for its turn."""
    log = tmp_path / "log"
    with worlds(2, build_s=2.0, log=log) as envs:
        envs.reset()
        envs.check()
        wait_for(lambda: log.read_text().count("+") == 3)
        pid = int(log.read_text().splitlines()[-1].split()[1])
        (builds,) = [worker for worker in envs.workers if worker.process.pid == pid]
        send(builds, signal.SIGKILL)
        wait_for(lambda: log.read_text().count("+") == 4, seconds=20)
        assert log.read_text().count("-") == 2, "it has ended its build: this test shows nothing"
