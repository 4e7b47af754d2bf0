"""What a run leaves behind when it is killed, stopped, damaged, out of disk or out of numbers."""

import json
import os
import random
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
    command,
    differences,
    exact,
    finish,
    index,
    metrics,
    not_finite,
    only_error,
    resume,
    script,
    sentences,
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


def parts(run_dir):
    return [path.name for path in Path(run_dir).glob("*.part")]


# Killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, tmp_path):
    """Half of the kills come at any moment, half while a file is being written. The run then ends
    where one ends that nobody killed, bit for bit."""
    rng, run_dir, reached = random.Random(1), tmp_path / "run", 0
    argv = tiny(BIDIST, run_dir, FOREVER, "--save-every", 1)
    for kill in range(kills):
        before = index(run_dir)
        with start(BIDIST, argv, tmp_path) as run:
            until(lambda: index(run_dir) != before, run)  # noqa: B023
            if kill % 2:
                until(lambda: parts(run_dir), run, pause=0)
                time.sleep(rng.uniform(0, 0.01))
            else:
                time.sleep(rng.uniform(0, 0.4))
            assert run.poll() is None, run.stderr()
            run.send(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        assert states(run_dir)[0]["timesteps"] >= reached  # and all that are listed are intact
        saved, folder = script(BIDIST).load_checkpoint(str(run_dir))
        assert folder == run_dir and saved["timesteps"] == index(run_dir)[0]["timesteps"]
        reached = saved["timesteps"]
        argv = resume(run_dir, FOREVER)
    iterations = reached // STEPS + 2
    assert reached >= kills * STEPS
    assert script(BIDIST).main(resume(run_dir, iterations)) == 0
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "whole", iterations)) == 0
    assert differences(exact(run_dir), exact(tmp_path / "whole")) == []
    assert len(list(run_dir.glob("checkpoint-*"))) == 2 and parts(run_dir) == []
    assert metrics(run_dir) == metrics(tmp_path / "whole")  # each iteration once


# Damaged ----------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


DAMAGES = {"truncated": truncate, "flipped": flip, "empty": empty, "deleted": Path.unlink}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three iterations with its last two checkpoints, and the same one of four."""
    folder = tmp_path_factory.mktemp("whole")
    for iterations in (3, 4):
        run_dir = folder / str(iterations)
        argv = tiny(BIDIST, run_dir, iterations, "--save-every", 1, "--final-episodes", 2)
        assert script(BIDIST).main(argv) == 0
    assert [entry["timesteps"] // STEPS for entry in index(folder / "3")] == [3, 2]
    return folder


@pytest.fixture
def run_dir(whole, tmp_path):
    return shutil.copytree(whole / "3", tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_checkpoint_damaged(damage, whole, run_dir, capfd):
    name = index(run_dir)[0]["name"]
    DAMAGES[damage](run_dir / name)
    assert script(BIDIST).main(resume(run_dir, 4)) == 0
    (line,) = sentences(capfd.readouterr().err)
    assert name in line and line.endswith(".")
    assert differences(exact(run_dir), exact(whole / "4")) == []
    assert [entry["timesteps"] // STEPS for entry in index(run_dir)] == [4, 3]
    assert len(states(run_dir)) == 2  # both intact: the damaged one has been written anew


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_checkpoint_damaged_and_evaluated(damage, run_dir, capfd):
    newest, oldest = (entry["name"] for entry in index(run_dir))
    DAMAGES[damage](run_dir / newest)
    assert script(BIDIST).main(["--eval-only", str(run_dir)]) == 0
    out, err = capfd.readouterr()
    (line,) = sentences(err)
    assert newest in line and line.endswith(".")
    assert script(BIDIST).main(["--eval-only", str(run_dir / oldest)]) == 0
    assert capfd.readouterr().out == out and "self-play" in out


def test_damaged_checkpoint_takes_no_place(run_dir):
    """Of the two that are kept, none is known to be damaged."""
    flip(run_dir / index(run_dir)[0]["name"])
    assert script(BIDIST).main(resume(run_dir, 5, "--save-every", 0)) == 0
    assert [state["timesteps"] // STEPS for state in states(run_dir)] == [5, 2]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_both_checkpoints_damaged(flag, damage, run_dir, capfd):
    names = [entry["name"] for entry in index(run_dir)]
    for name in names:
        DAMAGES[damage](run_dir / name)
    before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    assert script(BIDIST).main([flag, str(run_dir)]) == 2
    out, err = capfd.readouterr()
    *notes, last = sentences(err)
    assert last.startswith("error: ") and str(run_dir) in last and out == ""
    assert "Error" not in err and len(notes) <= 2  # at most one for each file
    assert {path: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


def test_damaged_checkpoint_asked_for_by_name(run_dir, capfd):
    """Who names a file does not want another one."""
    newest, oldest = (run_dir / entry["name"] for entry in index(run_dir))
    flip(newest)
    assert script(BIDIST).main(["--eval-only", str(newest)]) == 2
    assert sentences(capfd.readouterr().err)[-1].startswith("error: ")
    assert script(BIDIST).main(["--eval-only", str(oldest)]) == 0
    assert sentences(capfd.readouterr().err) == []


GARBLED = {
    "empty": b"",
    "cut": b'[{"name": "checkpo',
    "not text": bytes(range(128, 256)),
    "null": b"null",
    "no list": b"{}",
    "no entries": b"[1, 2]",
    "no names": b'[{"timesteps": 80}]',
    "no sha256": b'[{"name": "checkpoint-120.pt", "timesteps": 120}]',
}


@pytest.mark.parametrize("garbled", GARBLED)
def test_garbled_index(garbled, run_dir, capfd):
    (run_dir / "checkpoints.json").write_bytes(GARBLED[garbled])
    for argv in (["--resume"], ["--eval-only"]):
        assert script(BIDIST).main([*argv, str(run_dir)]) == 2
        out, err = capfd.readouterr()
        assert str(run_dir) in only_error(err) and out == ""
    # Nor does a new run take the directory for an empty one.
    assert script(BIDIST).main(tiny(BIDIST, run_dir, 1)) == 2
    assert str(run_dir) in only_error(capfd.readouterr().err)


# Out of disk ------------------------------------------------------------------------------------


def check_full(run_dir, code, stderr, words):
    assert code == 1
    assert [word for word in words if word not in only_error(stderr)] == []
    assert parts(run_dir) == []
    assert states(run_dir)[0]["timesteps"] == index(run_dir)[0]["timesteps"]


def test_file_size_limit(tmp_path):
    """The first checkpoint, without the optimisers' moments, is less than half of the second."""
    run_dir = tmp_path / "run"
    argv = tiny(BIDIST, run_dir, 3, "--save-every", 1)
    run = finish(BIDIST, argv, tmp_path, file_size=2_000_000)
    check_full(run_dir, run.code, run.stderr(), ["checkpoint-40", "File too large"])
    assert states(run_dir)[0]["timesteps"] == 0
    # With room again it goes on to the same end.
    assert script(BIDIST).main(resume(run_dir, 3)) == 0
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "whole", 3)) == 0
    assert differences(exact(run_dir), exact(tmp_path / "whole")) == []


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux and unshare")
def test_full_disk(tmp_path):
    """A file system with room for two checkpoints, not for three, in a namespace of its own."""
    (tmp_path / "disk").mkdir()
    argv = tiny(BIDIST, tmp_path / "disk/run", FOREVER, "--save-every", 1)
    shell = 'mount -t tmpfs -o size=8m none "$1" || exit 77; from=$1; to=$2; shift 2; "$@"; code=$?'
    shell += '; cp -a "$from/run" "$to"; exit $code'
    line = ["unshare", "-rm", "sh", "-c", shell, "sh", tmp_path / "disk", tmp_path]
    done = subprocess.run([*line, *command(BIDIST), *argv], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    check_full(tmp_path / "run", done.returncode, done.stderr, ["No space left"])
    assert len(states(tmp_path / "run")) == 2
    iterations = index(tmp_path / "run")[0]["timesteps"] // STEPS + 1
    assert script(BIDIST).main(resume(tmp_path / "run", iterations)) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", BOTH)
def test_full_disk_under_metrics(name, tmp_path, capfd):
    """The log is what a full disk meets first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    code = script(name).main(tiny(name, tmp_path / "run", 2))
    check_full(tmp_path / "run", code, capfd.readouterr().err, ["No space left"])


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
    *((name, "--actor-lr 1e30", "policy_loss") for name in BOTH),
    *((name, "--critic-lr 1e30", "value_loss") for name in BOTH),
    # With one step per iteration no loss of that iteration has seen what it did to the weights.
    *((name, "--actor-lr 1e37 --minibatches 1", "") for name in BOTH),
    *((name, "--critic-lr 1e37 --minibatches 1", "") for name in BOTH),
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


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_and_resumes(name, number, tmp_path):
    run_dir = tmp_path / "run"
    with start(name, tiny(name, run_dir, FOREVER, "--final-episodes", 10**6), tmp_path) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) > 1, run)
        run.send(number)
        began = time.monotonic()
        assert run.wait() == 0
        assert time.monotonic() - began < 20  # an iteration takes tenths of a second
    assert "Traceback" not in run.stderr() and not (run_dir / "summary.json").exists()
    done = index(run_dir)[0]["timesteps"]
    assert done == metrics(run_dir)[-1]["timesteps"] > 0
    iterations = done // STEPS + 2
    assert script(name).main(resume(run_dir, iterations, "--final-episodes", 0)) == 0
    assert script(name).main(tiny(name, tmp_path / "whole", iterations)) == 0
    assert differences(exact(run_dir), exact(tmp_path / "whole")) == []
    assert metrics(run_dir) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_it_at_once(name, number, tmp_path):
    """In an update that would take hours."""
    argv = tiny(name, tmp_path / "run", FOREVER, "--epochs", 10**5)
    with start(name, argv, tmp_path) as run:
        until(lambda: index(tmp_path / "run"), run)
        time.sleep(1)
        run.send(number)
        time.sleep(1)
        assert run.poll() is None
        run.send(number)
        began = time.monotonic()
        assert run.wait() != 0
        assert time.monotonic() - began < 10
    assert states(tmp_path / "run")[0]["timesteps"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_in_the_final_evaluation(number, tmp_path):
    """The weights are saved by then; nobody wants to wait for hundreds of episodes."""
    run_dir = tmp_path / "run"
    with start(BIDIST, tiny(BIDIST, run_dir, 2, "--final-episodes", 10**6), tmp_path) as run:
        until(lambda: index(run_dir) and index(run_dir)[0]["timesteps"] == 2 * STEPS, run)
        time.sleep(0.5)
        run.send(number)
        began = time.monotonic()
        until(lambda: run.poll() is not None or time.monotonic() > began + 20)
        assert run.poll() is not None and "Traceback" not in run.stderr()
    assert states(run_dir)[0]["timesteps"] == 2 * STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_in_an_evaluation_on_the_way(number, tmp_path):
    run_dir = tmp_path / "run"
    flags = ("--eval-every", STEPS, "--eval-episodes", 10**6, "--capture-video")
    with start(BIDIST, tiny(BIDIST, run_dir, FOREVER, *flags), tmp_path) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists() and metrics(run_dir), run)
        time.sleep(1)
        run.send(number)
        began = time.monotonic()
        assert run.wait() == 0
        assert time.monotonic() - began < 10
    assert states(run_dir)[0]["timesteps"] == STEPS and "Traceback" not in run.stderr()


# Without its workers ----------------------------------------------------------------------------


def children(pid):
    """Processes below `pid`: {their ids: their command lines}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            line = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent == pid:
            found |= {int(path.parent.name): line} | children(int(path.parent.name))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
@pytest.mark.parametrize("name, number", [(BIDIST, signal.SIGKILL), (MAPPO, signal.SIGSTOP)])
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
    saved, _ = script(name).load_checkpoint(str(run_dir))
    assert (
        saved["timesteps"] == json.loads((run_dir / "checkpoints.json").read_text())[0]["timesteps"]
    )
    assert not_finite(saved) == [] and parts(run_dir) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_sigterm_to_the_whole_group_saves(tmp_path):
    """As batch systems, `timeout` and torchrun send it: to the workers, too."""
    pytest.importorskip("dmlab2d")
    run_dir = tmp_path / "run"
    argv = tiny(BIDIST, run_dir, FOREVER)
    argv[argv.index("toy")] = "chicken_in_the_matrix__repeated"
    with subprocess.Popen(
        [*command(BIDIST), *argv], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists() and metrics(run_dir), pause=0.1)
        below = children(run.pid)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(60) == 0
        assert "error" not in run.stderr.read()
    assert index(run_dir)[0]["timesteps"] > 0
    assert [line for pid, line in below.items() if Path(f"/proc/{pid}").exists()] == []
