"""What a run leaves when it is killed, damaged, out of disk, resumed, or started twice."""

import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import harness

import pytest
import torch
from runs import (
    ROOT,
    differences,
    exact,
    finish,
    index,
    metrics,
    only_error,
    sentences,
    start,
    states,
    until,
)

from tests.harness.tools import FOREVER, NAME, PULLS, flags, learner, resume, run


def test_half_and_resumed_is_whole():
    """Networks, optimisers, generators, replays, running means and the log."""
    more = ("--log-every", 3 * PULLS, "--save-every", 0)
    assert run(*flags("whole", 10, *more)) == 0
    for cut in range(1, 10):
        assert run(*flags(f"half{cut}", cut, *more)) == 0
        assert run(*resume(f"half{cut}", 10)) == 0
        assert differences(exact("whole"), exact(f"half{cut}")) == []
        assert metrics("whole") == metrics(f"half{cut}")
        replays = [torch.load(f"{name}/replay-40.pt") for name in ("whole", f"half{cut}")]
        assert differences(*replays) == []


def test_times_in_the_log(monkeypatch):
    """By a clock that collecting, learning, saving and evaluating move: of these sps has the first
    two, and wall_s, which goes on in a resumed run, all four."""
    clock = SimpleNamespace(now=0.0)
    update, save = learner.update, harness.Run.save

    def pass_by(seconds):
        clock.now += seconds

    def slow_update(*given):
        pass_by(0.25)
        return update(*given)

    def slow_save(run):
        pass_by(100.0)
        save(run)

    times = vars(time) | {"monotonic": lambda: clock.now, "sleep": pass_by}
    for module in (harness, learner):
        monkeypatch.setattr(module, "time", SimpleNamespace(**times))
    monkeypatch.setattr(learner, "update", slow_update)
    monkeypatch.setattr(harness.Run, "save", slow_save)
    more = ("--log-every", 2 * PULLS, "--eval-every", 2 * PULLS, "--pause", 0.5)
    assert run(*flags("run", 4, *more)) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    pass_by(1e6)  # nobody trains
    assert run(*resume("run", 6)) == 0
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if "sps" in line]
    for line in lines:
        assert line["sps"] == pytest.approx(2 * PULLS / 1.5)
        assert (line["collect_s"], line["learn_s"]) == pytest.approx((1.0, 0.5))
    # The first save; two iterations; a save and four episodes; two iterations.
    assert [line["wall_s"] for line in lines[:2]] == pytest.approx([101.5, 101.5 + 102 + 1.5])
    saved = lines[1]["wall_s"] + 100
    assert lines[2]["wall_s"] == pytest.approx(saved + 1.5)
    assert summary["wall_s"] == pytest.approx(saved + 2 + 100)  # it asks to save at its end, too


def test_another_seed_is_another_run():
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*flags(name, 4, "--seed", seed)) == 0
    assert differences(exact("a"), exact("b")) == []
    changed = differences(exact("a"), exact("c"))
    assert {"/agent/actor/weight", "/ranks/0/rng"} <= set(changed)


def parts(run_dir):
    return [path.name for path in Path(run_dir).glob("*.part")]


@pytest.mark.long
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, tmp_path):
    """Half of the kills come at any moment, half while a file is being written. The run then ends
    where one ends that nobody killed, bit for bit, with each line of the log once."""
    rng, reached = random.Random(1), 0
    argv = flags("run", FOREVER, "--save-every", PULLS, "--log-every", PULLS)
    for kill in range(kills):
        before = index("run")
        with start(NAME, argv, tmp_path) as process:
            until(lambda: index("run") != before, process)  # noqa: B023
            if kill % 2:
                until(lambda: parts("run"), process, pause=0)
                time.sleep(rng.uniform(0, 0.005))
            else:
                time.sleep(rng.uniform(0, 0.3))
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert states("run")[0]["timesteps"] >= reached  # and all that are listed are intact
        reached = index("run")[0]["timesteps"]
        argv = resume("run", FOREVER)
    iterations = reached // PULLS + 2
    assert run(*resume("run", iterations)) == 0
    assert run(*flags("whole", iterations, "--save-every", 0)) == 0
    assert differences(exact("run"), exact("whole")) == []
    assert metrics("run") == metrics("whole")
    assert len(list(Path("run").glob("checkpoint-*"))) == 2 and parts("run") == []
    assert len(list(Path("run").glob("replay-*"))) == 2


def test_killed_before_the_first_save_on_the_way(tmp_path):
    """Lines after checkpoint-0 are dropped, too: they happen again."""
    argv = flags("run", FOREVER, "--save-every", 0, "--pause", 0.01)
    with start(NAME, argv, tmp_path) as process:
        until(lambda: Path("run/metrics.jsonl").exists() and len(metrics("run")) > 2, process)
        process.send(signal.SIGKILL)
        process.wait()
    assert run(*resume("run", 5, "--pause", 0)) == 0
    assert [line["timesteps"] for line in metrics("run")] == [4, 8, 12, 16, 20]


# Damaged ------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def turn_into_a_directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": truncate,
    "flipped": flip,
    "empty": empty,
    "deleted": Path.unlink,
    "a directory": turn_into_a_directory,
}


@pytest.fixture
def run_dir(tmp_path):
    """A run of six iterations with its last two checkpoints."""
    assert run(*flags("run", 6)) == 0
    assert [entry["timesteps"] // PULLS for entry in index("run")] == [6, 4]
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["checkpoint", "replay"])
def test_newest_damaged(kind, damage, run_dir, capfd):
    """One sentence, and the run goes on from the older one to the same end."""
    path = run_dir / f"{kind}-24.pt"
    DAMAGES[damage](path)
    assert run(*resume(run_dir, 8, "--save-every", 0)) == 0
    (line,) = sentences(capfd.readouterr().err)
    assert path.name in line and line.endswith(".")
    assert run(*flags("whole", 8)) == 0
    assert differences(exact(run_dir), exact("whole")) == []
    assert metrics(run_dir) == metrics("whole")
    assert [entry["timesteps"] // PULLS for entry in index(run_dir)] == [8, 4]
    assert len(states(run_dir)) == 2


def test_damaged_checkpoint_takes_no_place(run_dir):
    """Of the two that are kept, none is known to be damaged."""
    flip(run_dir / index(run_dir)[0]["name"])
    assert run(*resume(run_dir, 9, "--save-every", 0)) == 0
    assert [state["timesteps"] // PULLS for state in states(run_dir)] == [9, 4]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_both_damaged(flag, damage, run_dir, capfd):
    for entry in index(run_dir):
        DAMAGES[damage](run_dir / entry["name"])
    before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    assert run(flag, run_dir, "--final-episodes", 1) == 2
    out, err = capfd.readouterr()
    *notes, last = sentences(err)
    assert last.startswith("error: ") and str(run_dir) in last and out == ""
    assert "Traceback" not in err and len(notes) <= 2
    assert {path: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("left", ["summary.json", "metrics.jsonl"])
def test_results_without_checkpoints_are_not_overwritten(left, run_dir, capfd):
    """As where somebody has deleted checkpoint*, index and all, to have room on the disk."""
    before = (run_dir / left).read_bytes()
    for path in run_dir.iterdir():
        if path.name not in (left, "args.json"):
            path.unlink()
    assert run(*flags(run_dir, 1)) == 2
    assert left in only_error(capfd.readouterr().err)
    assert run(*flags(run_dir.parent / "other", 1)) == 0
    capfd.readouterr()
    again = ("--final-episodes", 1, "--run-dir", run_dir)
    assert run("--eval-only", run_dir.parent / "other", *again) == 2
    assert left in only_error(capfd.readouterr().err)
    assert (run_dir / left).read_bytes() == before


def test_a_final_evaluation_is_replaced_by_another_one_only(run_dir, capfd):
    """--final-episodes 0 would leave none."""
    assert run("--resume", run_dir, "--final-episodes", 1) == 0
    before = (run_dir / "summary.json").read_bytes()
    assert json.loads(before)["eval"]
    assert run("--resume", run_dir, "--final-episodes", 0) == 2
    assert "has finished: --final-episodes 0 has" in only_error(capfd.readouterr().err)
    assert (run_dir / "summary.json").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
def test_what_cannot_be_read_is_not_damaged(run_dir, capfd):
    """The newest checkpoint may be whole, so nothing older takes its place, and nothing goes."""
    newest = run_dir / "checkpoint-24.pt"
    newest.rename(run_dir / "kept")
    newest.symlink_to("/proc/self/mem")  # opens, and reading fails: Input/output error
    for flag in ("--resume", "--eval-only"):
        assert run(flag, run_dir, "--final-episodes", 1) == 1
        assert "checkpoint-24.pt cannot be read" in only_error(capfd.readouterr().err)
    (run_dir / "kept").rename(newest)
    assert run(*resume(run_dir, 7)) == 0
    assert index(run_dir)[1]["timesteps"] == 24


def test_evaluation_needs_no_replay(run_dir):
    for path in run_dir.glob("replay-*"):
        path.unlink()
    assert run("--eval-only", run_dir, "--final-episodes", 1) == 0
    assert run("--eval-only", run_dir / index(run_dir)[1]["name"], "--final-episodes", 1) == 0


def test_who_names_a_file_does_not_want_another(run_dir, capfd):
    newest, oldest = (run_dir / entry["name"] for entry in index(run_dir))
    flip(newest)
    assert run("--eval-only", newest, "--final-episodes", 1) == 2
    assert sentences(capfd.readouterr().err)[-1].startswith("error: ")
    assert run("--eval-only", oldest, "--final-episodes", 1) == 0
    assert sentences(capfd.readouterr().err) == []


GARBLED = {
    "empty": b"",
    "cut": b'[{"name": "checkpo',
    "not text": bytes(range(128, 256)),
    "null": b"null",
    "no list": b"{}",
    "no entries": b"[1, 2]",
    "no names": b'[{"timesteps": 80}]',
    "no sha256": b'[{"name": "checkpoint-24.pt", "timesteps": 24}]',
}


@pytest.mark.parametrize("garbled", GARBLED)
def test_garbled_index(garbled, run_dir, capfd):
    (run_dir / "checkpoints.json").write_bytes(GARBLED[garbled])
    for flag in ("--resume", "--eval-only"):
        assert run(flag, run_dir, "--final-episodes", 1) == 2
        out, err = capfd.readouterr()
        assert str(run_dir) in only_error(err) and out == ""
    # Nor does a new run take the directory for an empty one.
    assert run(*flags(run_dir, 1)) == 2
    assert str(run_dir) in only_error(capfd.readouterr().err)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_with_other_content(run_dir, capfd):
    """Its sha256 fits, what it holds does not: one sentence, and no code of it is executed."""
    older = torch.load(run_dir / "checkpoint-24.pt", weights_only=True)
    contents = [
        [1, 2],
        {"args": {}},
        {**older, "format": 1},
        {k: x for k, x in older.items() if k != "format"},
        {k: x for k, x in older.items() if k != "args"},
        torch.zeros(3),
        Malicious(),
    ]
    for content in contents:
        path = run_dir / "checkpoint-24.pt"
        torch.save(content, path)
        if isinstance(content, Malicious):
            path.write_bytes(pickle.dumps(content))
        entries = index(run_dir)
        entries[0]["sha256"] = harness.sha256_of(path)
        (run_dir / "checkpoints.json").write_text(json.dumps(entries))
        for flag in ("--resume", "--eval-only"):
            assert run(flag, run_dir, "--final-episodes", 1) == 2
            assert "checkpoint-24.pt" in only_error(capfd.readouterr().err)
    assert not Path("executed").exists()


def test_lines_that_are_none(run_dir):
    """As a crash of the machine may leave them."""
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n[1]\n{}\n" + b'{"timesteps": 24, "cut": 1')
    assert run(*resume(run_dir, 8)) == 0
    assert run(*flags("whole", 8)) == 0
    assert metrics(run_dir) == metrics("whole")


# Resumed from the older one -----------------------------------------------------------------------


def test_resume_of_the_older_checkpoint(run_dir):
    """What was trained anew is kept, whatever came of the first attempt; newer files stay until
    the first save, and go with it."""
    older, newer = run_dir / "checkpoint-16.pt", run_dir / "checkpoint-24.pt"
    abandoned = harness.sha256_of(newer)
    more = ("--learning-rate", 0.1)  # as it was; another future comes from another replay
    (replay,) = (run_dir / "replay-16.pt",)
    kept = torch.load(replay, weights_only=True)
    kept["pulls"]["rewards"] += 1.0
    torch.save(kept, replay)
    entries = index(run_dir)
    entries[1]["replays"][0]["sha256"] = harness.sha256_of(replay)
    (run_dir / "checkpoints.json").write_text(json.dumps(entries))
    assert run(*resume(older, 6, *more)) == 0
    assert harness.sha256_of(newer) != abandoned
    assert [entry["timesteps"] for entry in index(run_dir)] == [24, 16]
    assert states(run_dir)[0]["iteration"] == 6
    assert [line["timesteps"] for line in metrics(run_dir)] == [4, 8, 12, 16, 20, 24]
    assert run(*resume(run_dir, 7)) == 0  # the newest fits its replay


def test_copies_that_a_user_makes_stay(run_dir, capfd):
    """Only files of the names that saving gives go."""
    names = ("checkpoint-best.pt", "checkpoint-keep-16.pt", "replay-of-mine.pt", "x.pt.part")
    for name in names:
        shutil.copy(run_dir / "checkpoint-16.pt", run_dir / name)
    for name in ("checkpoint-7.pt", "replay-7-1.pt", "checkpoint-9.pt.part"):
        (run_dir / name).touch()
    assert run(*resume(run_dir, 7)) == 0
    found = {path.name for path in run_dir.iterdir()}
    assert found >= set(names)
    assert run("--eval-only", run_dir / "checkpoint-best.pt", "--final-episodes", 1) == 2
    sentence = f"is not in {run_dir / 'checkpoints.json'}, which has its sha256."
    assert sentence in only_error(capfd.readouterr().err)
    assert not found & {"checkpoint-7.pt", "replay-7-1.pt", "checkpoint-9.pt.part"}


def test_an_abandoned_future_goes_with_the_first_save(run_dir):
    assert run(*resume(run_dir / "checkpoint-16.pt", 5)) == 0
    assert sorted(path.name for path in run_dir.glob("*.pt")) == [
        "checkpoint-16.pt",
        "checkpoint-20.pt",
        "replay-16.pt",
        "replay-20.pt",
    ]


def test_a_first_save_that_fails_leaves_the_newer_checkpoint(run_dir, capfd):
    """And its log, so that it can be resumed as if nobody had gone back."""
    before = metrics(run_dir)
    in_the_way = run_dir / "checkpoint-20.pt.part"
    in_the_way.mkdir()
    assert run(*resume(run_dir / "checkpoint-16.pt", 5)) == 1
    assert "Is a directory" in only_error(capfd.readouterr().err)
    assert [entry["timesteps"] for entry in index(run_dir)] == [24, 16]
    in_the_way.rmdir()
    assert run(*resume(run_dir, 7)) == 0
    assert metrics(run_dir)[:6] == before
    assert [entry["timesteps"] for entry in index(run_dir)] == [28, 24]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_the_log_is_on_the_disk_before_the_index(monkeypatch):
    """After a power failure no checkpoint is there without the lines before it."""
    synced, fsync = [], os.fsync

    def remember(number):
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", remember)
    assert run(*flags("run", 2)) == 0
    synced.reverse()
    assert synced.index("metrics.jsonl") > synced.index("checkpoints.json.part")


def test_curves_of_tensorboard_are_of_one_future(run_dir):
    """What a resumed run does again takes the place of what was there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*resume(run_dir / "checkpoint-16.pt", 6)) == 0
    found = EventAccumulator(str(run_dir)).Reload().Scalars("reward")
    assert [point.step for point in found] == [4, 8, 12, 16, 20, 24]


def test_killed_before_a_first_save_the_log_is_still_of_one_future(run_dir, tmp_path):
    """Then the newest checkpoint is resumed: lines of the other attempt, and of none, are not in
    its log, whichever checkpoint follows."""
    whole = metrics(run_dir)
    argv = resume(run_dir / "checkpoint-16.pt", FOREVER, "--save-every", 0, "--pause", 0.05)
    with start(NAME, argv, tmp_path) as process:
        until(lambda: metrics(run_dir)[-1]["timesteps"] > 24, process)
        process.send(signal.SIGKILL)
        process.wait()
    assert [entry["timesteps"] for entry in index(run_dir)] == [24, 16]
    shutil.copytree(run_dir, "again")
    assert run(*resume(run_dir, 6, "--final-episodes", 1, "--pause", 0)) == 0
    assert metrics(run_dir)[:6] == whole
    assert run(*resume(run_dir, 7)) == 0
    assert [line["timesteps"] for line in metrics(run_dir)] == [4, 8, 12, 16, 20, 24, 28]
    assert run(*resume("again/checkpoint-16.pt", 7, "--pause", 0)) == 0
    assert metrics("again") == metrics(run_dir)
    assert not list(Path("again").glob("metrics-*"))


# One writer ---------------------------------------------------------------------------------------


def test_one_writer(tmp_path, capfd):
    """A second start and a second --resume are refused; to evaluate is allowed."""
    with start(NAME, flags("run", FOREVER, "--pause", 0.05), tmp_path) as process:
        until(lambda: len(index("run")) > 1, process)
        for argv in (flags("run", 3), resume("run", FOREVER)):
            assert run(*argv) == 2
            assert "run" in only_error(capfd.readouterr().err)
        assert run("--eval-only", "run", "--final-episodes", 1, "--pause", 0) == 0
        process.send(signal.SIGKILL)
        process.wait()
    capfd.readouterr()
    steps = [line["timesteps"] for line in metrics("run")]
    assert steps == sorted(set(steps))
    assert run(*resume("run", steps[-1] // PULLS + 1, "--pause", 0)) == 0  # the lock went with it


def test_who_resumes_a_file_writes_its_run(run_dir, capfd):
    """It is refused like who names the directory, and changes nothing."""
    before = (run_dir / "metrics.jsonl").read_bytes()
    with (run_dir / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(*resume(run_dir / "checkpoint-16.pt", 8)) == 2
    assert "is being written by another process" in only_error(capfd.readouterr().err)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_look_at_the_lock_fails_no_start(tmp_path, monkeypatch):
    """A launcher that asks whether a run is locked shares its lock for an instant; who keeps it
    longer writes the run."""
    with (tmp_path / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(harness.UsageError, match="is being written by another process"):
            harness.lock(tmp_path)
        monkeypatch.setattr(harness.time, "sleep", lambda _: fcntl.flock(other, fcntl.LOCK_UN))
        harness.lock(tmp_path).close()


@pytest.mark.long
def test_two_starts_at_once(tmp_path):
    """One of them trains, the other one leaves with code 2 and has changed nothing."""
    processes = [
        subprocess.Popen(
            [sys.executable, learner.__file__, *flags("run", 40, "--pause", 0.05)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    steps = [line["timesteps"] for line in metrics("run")]
    assert steps == list(range(4, 164, 4))


# Out of disk --------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch):
    """Else a crash of the machine could leave neither of them."""
    path, seen, fsync = tmp_path / "x", [], os.fsync
    path.write_bytes(b"old")

    def watched(number):
        seen.append((os.fstat(number).st_size, path.read_bytes()))
        fsync(number)

    monkeypatch.setattr(harness.os, "fsync", watched)
    harness.write(path, b"newer")
    assert seen == [(len(b"newer"), b"old")] and path.read_bytes() == b"newer"


def check_full(run_dir, code, stderr, words):
    assert code == 1
    assert [word for word in words if word not in only_error(stderr)] == []
    assert parts(run_dir) == []
    assert states(run_dir)[0]["timesteps"] == index(run_dir)[0]["timesteps"]


def test_file_size_limit(tmp_path):
    """The replay grows until a file may not be as large."""
    argv = flags("run", FOREVER, "--num-envs", 64, "--buffer-size", 10**5, "--save-every", 640)
    process = finish(NAME, argv, tmp_path, file_size=100_000)
    check_full("run", process.code, process.stderr(), ["File too large"])
    iterations = index("run")[0]["timesteps"] // PULLS + 32
    assert run(*resume("run", iterations)) == 0  # with room again


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux and unshare")
def test_full_disk(tmp_path):
    """A file system with room for some checkpoints, in a namespace of its own."""
    (tmp_path / "disk").mkdir()
    argv = flags("disk/run", FOREVER, "--save-every", 640, "--num-envs", 64)
    argv += ["--buffer-size", "10000000"]
    shell = 'mount -t tmpfs -o size=400k none "$1" || exit 77; from=$1; to=$2; shift 2; "$@"'
    shell += '; code=$?; cp -a "$from/run" "$to"; exit $code'
    line = ["unshare", "-rm", "sh", "-c", shell, "sh", "disk", "."]
    line += [sys.executable, learner.__file__, *argv]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    check_full("run", done.returncode, done.stderr, ["No space left"])
    iterations = index("run")[0]["timesteps"] // PULLS + 16
    assert run(*resume("run", iterations, "--save-every", 0)) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_metrics(capfd):
    """The log is what a full disk meets first."""
    Path("run").mkdir()
    Path("run/metrics.jsonl").symlink_to("/dev/full")
    code = run(*flags("run", 2))
    check_full("run", code, capfd.readouterr().err, ["No space left"])


# Memory -------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import torch, harness, torch.utils.tensorboard
rows = {rows}

class Replay:
    def __init__(self):
        self.x = {{name: torch.full((rows, 16), 0.5) for name in "ab"}}
    def filled(self):
        return {{name: x[: rows - 1] for name, x in self.x.items()}}
    def refill(self, tensors):
        for name, x in tensors.items():
            self.x[name][: len(x)] = x

run = harness.Run(harness.RunArgs(total_timesteps=10, final_episodes=0, **{args}), str)
replay = Replay()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run.begin("memory", parts={{}}, own={{}}, replays={{"all": replay}})
while run.goes_on():
    run.advance(5)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) * 1024 / sum(4 * x.numel() for x in replay.x.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_checkpoint_that_cannot_be_read_now():
    """As when a network's file system fails: it may be whole, so starting again may help."""
    with pytest.raises(harness.RunError, match="mem cannot be read: Input/output error") as found:
        harness.read_state(Path("/proc/self/mem"))
    assert found.value.code == 1


@pytest.mark.parametrize("wrapped", [list, tuple, lambda nets: dict(enumerate(nets))])
def test_several_networks_that_no_checkpoint_would_hold(wrapped):
    agent = harness.Parts()
    agent.several = wrapped([torch.nn.Linear(1, 1)])
    with pytest.raises(harness.RunError, match="no checkpoint would hold several, a "):
        harness.pack(agent)
    agent.several = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    agent.sizes = wrapped([1])
    agent.again = wrapped([agent.several])  # stored as `several`
    assert list(harness.pack(agent)) == ["several"]
    agent.weights = wrapped([torch.zeros(2), torch.zeros(2, requires_grad=True)])
    with pytest.raises(harness.RunError, match="no checkpoint would hold weights, a "):
        harness.pack(agent)


def test_a_weight_that_no_checkpoint_would_hold():
    """A fork's temperature, say: it would begin anew with every --resume."""
    agent = harness.Parts()
    agent.scale = torch.ones(2)  # a constant
    agent.log_alpha = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(harness.RunError, match="no checkpoint would hold log_alpha, a Parameter"):
        harness.pack(agent)
    agent.log_alpha = torch.nn.ParameterList([torch.zeros(())])
    assert list(harness.pack(agent)) == ["log_alpha"]


@pytest.mark.long
def test_a_replay_is_saved_and_loaded_without_a_second_copy():
    """Peak memory while saving and resuming: at most a fifth of the replay above it."""
    for args in ({"run_dir": "run"}, {"resume": "run"}):
        code = MEASURE.format(root=str(ROOT), rows=2_000_000, args=args)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if args.get("run_dir"):  # pages of a mapped file count while loading, but can be dropped
            assert float(done.stdout.split()[-1]) < 0.2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
