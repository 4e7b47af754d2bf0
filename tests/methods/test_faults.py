"""What a run in Melting Pot leaves behind when it is stopped, loses its workers or runs out of
numbers. Damage, full disks and signals in general: tests/harness."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from runs import (
    BIDIST,
    BOTH,
    MAPPO,
    STEPS,
    children,
    command,
    differences,
    exact,
    index,
    metrics,
    not_finite,
    only_error,
    opened,
    resume,
    script,
    start,
    states,
    tiny,
    until,
)

import envs.meltingpot.toy

FOREVER = 10**6  # iterations


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Out of room -------------------------------------------------------------------------------------


def test_a_film_that_cannot_be_written(capfd):
    """What ffmpeg cannot do ends in a sentence, after its own words; the checkpoints stay."""
    looks = ("--eval-every", STEPS, "--eval-episodes", 1, "--capture-video")
    assert script(MAPPO).main(tiny(MAPPO, "whole", 2, *looks)) == 0
    films = sorted(Path("whole/videos").glob(f"eval-{2 * STEPS}-*.mp4"))
    for film in films:  # a directory in its place
        (Path("cut/videos") / film.name).mkdir(parents=True)
    assert films and script(MAPPO).main(tiny(MAPPO, "cut", 1, *looks)) == 0
    capfd.readouterr()
    assert script(MAPPO).main(resume("cut", 2)) == 1
    err = capfd.readouterr().err
    error = err.splitlines()[-1]
    assert error.startswith("error: cut/videos/eval-80-") and "ffmpeg cannot write this" in error
    assert "Traceback" not in err
    assert states("cut")[0]["timesteps"] >= STEPS


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux and unshare")
def test_a_disk_with_no_room_for_a_film(tmp_path):
    """A file system for the films alone: some frames fit and the end does not."""
    folder = tmp_path / "run/videos"
    folder.mkdir(parents=True)
    shell = (
        'mount -t tmpfs -o size=8k none run/videos || exit 77; "$@"; c=$?; ls run/videos; exit $c'
    )
    looks = ("--eval-every", STEPS, "--eval-episodes", 1, "--capture-video")
    line = ["unshare", "-rm", "sh", "-c", shell, "sh", *command(MAPPO)]
    done = subprocess.run([*line, *tiny(MAPPO, "run", 2, *looks)], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: run/videos/eval-40-") and "ffmpeg cannot write this" in last
    assert last.split(":")[1].strip() not in done.stdout, "no part of it is left"


# Out of numbers ---------------------------------------------------------------------------------


def check_finite(run_dir, code, stderr, tensor):
    assert code == 1
    assert f"{tensor} is not finite" in only_error(stderr)
    for state in states(run_dir):
        assert not_finite(state) == []


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_reward_is_not_finite(name, poison, tmp_path, monkeypatch, capfd):
    """From the third iteration on one player of one world is paid with what is no number."""

    class Poisoned(envs.meltingpot.toy.TileGame):
        steps = 0

        def step(self, actions):
            self.steps += 1
            step = super().step(actions)
            step.reward[-1, 0] = poison if self.steps > 45 else step.reward[-1, 0]
            return step

    monkeypatch.setattr(envs.meltingpot.toy, "TileGame", Poisoned)
    before = signal.getsignal(signal.SIGINT)
    code = script(name).main(tiny(name, tmp_path / "run", 6, "--save-every", 1))
    check_finite(tmp_path / "run", code, capfd.readouterr().err, "rewards")
    assert index(tmp_path / "run")[0]["timesteps"] == 2 * STEPS
    assert metrics(tmp_path / "run")[-1]["timesteps"] == 2 * STEPS
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", BOTH)
def test_feature_is_not_finite(name, tmp_path, monkeypatch, capfd):
    class Poisoned(envs.meltingpot.toy.TileGame):
        def _observe(self):
            obs = super()._observe()
            features = np.where(obs.features > 0.4, np.float32(np.nan), obs.features)
            return obs._replace(features=features)

    monkeypatch.setattr(envs.meltingpot.toy, "TileGame", Poisoned)
    code = script(name).main(tiny(name, tmp_path / "run", 3, "--save-every", 1))
    check_finite(tmp_path / "run", code, capfd.readouterr().err, "features")


DIVERGED = [
    (BIDIST, "--actor-lr 1e30", "policy_loss"),
    (MAPPO, "--critic-lr 1e30", "value_loss"),
    # With one step per iteration no loss of that iteration has seen what it did to the weights.
    (MAPPO, "--actor-lr 1e37 --minibatches 1", ""),
    (BIDIST, "--forward-lr 1e30", ""),
    (BIDIST, "--reverse-lr 1e30", ""),
    (BIDIST, "--noise-std 1e38 --reverse-mode noise", ""),
]


@pytest.mark.parametrize("name, flags, tensor", DIVERGED)
def test_diverged(name, flags, tensor, tmp_path, capfd):
    """Learning rates that overflow: no checkpoint is written of what has become of the weights."""
    argv = tiny(name, tmp_path / "run", 6, "--save-every", 1, *flags.split())
    code = script(name).main(argv)
    check_finite(tmp_path / "run", code, capfd.readouterr().err, tensor)


# Asked to stop ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name, number", [(BIDIST, signal.SIGTERM), (MAPPO, signal.SIGINT)])
def test_stop_saves_and_resumes(name, number, tmp_path):
    run_dir = tmp_path / "run"
    with start(name, tiny(name, run_dir, FOREVER, "--final-episodes", 10**6), tmp_path) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) > 1, run)
        run.send(number)
        assert run.wait() == 75
    assert "Traceback" not in run.stderr() and not (run_dir / "summary.json").exists()
    done = index(run_dir)[0]["timesteps"]
    assert done == metrics(run_dir)[-1]["timesteps"] > 0
    iterations = done // STEPS + 2
    assert script(name).main(resume(run_dir, iterations, "--final-episodes", 0)) == 0
    assert script(name).main(tiny(name, tmp_path / "whole", iterations)) == 0
    assert differences(exact(run_dir), exact(tmp_path / "whole")) == []
    assert metrics(run_dir) == metrics(tmp_path / "whole")


@pytest.mark.long
def test_stop_in_an_evaluation(tmp_path):
    """It ends at once, while episodes are played and filmed."""
    run_dir = tmp_path / "run"
    flags = ("--eval-every", STEPS, "--eval-episodes", 10**6, "--capture-video")
    with start(BIDIST, tiny(BIDIST, run_dir, FOREVER, *flags), tmp_path) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists() and metrics(run_dir), run)
        time.sleep(1)
        run.send(signal.SIGTERM)
        assert run.wait() == 75
    assert states(run_dir)[0]["timesteps"] == STEPS and "Traceback" not in run.stderr()


# Without its workers ----------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
@pytest.mark.parametrize(
    "name, number",
    [(BIDIST, signal.SIGKILL), pytest.param(MAPPO, signal.SIGSTOP, marks=pytest.mark.long)],
)
def test_worker_dies_or_hangs(name, number, tmp_path):
    pytest.importorskip("dmlab2d")
    run_dir = tmp_path / "run"
    argv = tiny(name, run_dir, FOREVER, "--save-every", 1, "--worker-timeout", 5)
    argv[argv.index("toy")] = "chicken_in_the_matrix__repeated"
    argv += ["--num-workers", "2"]
    with start(name, argv, tmp_path) as run:
        until(lambda: index(run_dir) and index(run_dir)[0]["timesteps"], run, pause=0.1)
        below = children(run.pid)
        workers = sorted(pid for pid, line in below.items() if "envs.meltingpot.worlds" in line)
        assert len(workers) >= 2
        os.kill(workers[1], number)
        began = time.monotonic()
        assert run.wait() == 1
        assert time.monotonic() - began < 10
    sentence = only_error(run.stderr())
    assert f"process {workers[1]}," in sentence
    assert ("SIGKILL" if number == signal.SIGKILL else "no sign") in sentence
    assert [line for pid, line in below.items() if Path(f"/proc/{pid}").exists()] == []
    newest = states(run_dir)[0]  # intact
    assert newest["timesteps"] > 0 and not_finite(newest) == []


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_sigterm_to_the_whole_group_saves(tmp_path):
    """As batch systems, `timeout` and torchrun send it: to the workers, too."""
    pytest.importorskip("dmlab2d")
    run_dir = tmp_path / "run"
    argv = tiny(BIDIST, run_dir, FOREVER)
    argv[argv.index("toy")] = "chicken_in_the_matrix__repeated"
    with opened([*command(BIDIST), *argv], stderr=subprocess.PIPE, text=True) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists() and metrics(run_dir), pause=0.1)
        below = children(run.pid)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(60) == 75
        assert "error" not in run.stderr.read()
        assert [line for pid, line in below.items() if Path(f"/proc/{pid}").exists()] == []
    assert index(run_dir)[0]["timesteps"] > 0
