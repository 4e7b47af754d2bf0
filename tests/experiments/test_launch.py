"""experiments/launch.py, with real processes that are really killed. What they train is a script
that counts: it locks its directory, saves, is stopped and goes on as the real ones do."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness

import pytest
from made_up import ROOT, command, experiment
from runs import some_long

launch, runs = experiment("launch"), experiment("runs")

COUNTER = """
import fcntl, json, os, pathlib, signal, sys, time

words = sys.argv[1:]
value = lambda flag, default="0": words[words.index(flag) + 1] if flag in words else default
run = pathlib.Path(value("--resume" if "--resume" in words else "--run-dir"))
run.mkdir(parents=True, exist_ok=True)
lock = (run / "lock").open("a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    raise SystemExit(2)
with (run / "calls").open("a") as file:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    about = {"words": words, "pid": os.getpid(), "gpu": gpu, "cwd": os.getcwd()}
    about["patience"] = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    file.write(json.dumps(about) + "\\n")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
saved = run / "checkpoints.json"
steps = json.loads(saved.read_text())[0] if saved.exists() else 0
(run / "args.json").write_text(json.dumps({"script": "counter"}))
fails = run / "failures"
total = int(value("--total-timesteps"))
while steps < total:
    time.sleep(float(value("--pause", "0.01")))
    steps += 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"timesteps": steps}) + "\\n")
    (run / "part").write_text(json.dumps([steps]))
    (run / "part").replace(saved)
    if stopped:
        raise SystemExit(75)
    if steps == 3 and fails.exists() is False and "--fail-once" in words:
        fails.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "--fail" in words:
        raise SystemExit(1)
    if "--fill" in words:
        (run / "large").write_bytes(bytes(10**6))
(run / "summary.json").write_text(json.dumps({"timesteps": steps, "eval": {}}))
"""
LAUNCHER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from experiments import launch, runs
launch.ROOT = runs.ROOT = Path({folder!r})
runs.Job.check_same = runs.Job.check_flags = lambda *found: None
launch.LOOK_EVERY = 0.2
launch.leave(launch.main(sys.argv[1:]))
"""


@pytest.fixture
def study(tmp_path):
    """study(name=command, ...), a file; a script and a launcher beside it."""
    (tmp_path / "counter.py").write_text(COUNTER)
    (tmp_path / "launcher.py").write_text(LAUNCHER.format(root=str(ROOT), folder=str(tmp_path)))

    def write(timesteps=5, seeds=(1, 2), flags="", **commands):
        lines = ['dir = "my runs"', f"seeds = {list(seeds)}", f"timesteps = {timesteps}"]
        lines += [f'flags = "{flags}"', "[runs]"]
        lines += [f'{name} = "counter.py {flags}"' for name, flags in commands.items()]
        (tmp_path / "study.toml").write_text("\n".join(lines))
        return tmp_path / "study.toml"

    return write


def start(file, *words, **environment):
    command = [sys.executable, str(file.parent / "launcher.py"), str(file), *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    clean = {name: x for name, x in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(command, env=clean | environment, cwd="/", **options)


@pytest.fixture
def launched(monkeypatch, capsys):
    """launched(file, *words, **environment): exit code and output, in this process."""
    for name in ("check_same", "check_flags"):
        monkeypatch.setattr(runs.Job, name, lambda *found: None)
    monkeypatch.setattr(launch, "LOOK_EVERY", 0.2)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)

    def call(file, *words, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(launch, "ROOT", file.parent)
            patch.setattr(runs, "ROOT", file.parent)
            for name, x in environment.items():
                patch.setenv(name, x)
            code = launch.main([str(file), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def calls(file, run):
    path = file.parent / "my runs" / run / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def records(file):
    return json.loads((file.parent / "my runs" / "study.json").read_text())


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_first_seed_of_everything_comes_first(study, launched):
    file = study(a="--words 'two words'", b="", flags="--pause 0")
    code, output = launched(file, "--dry-run")
    assert code == 0
    *lines, last = output.splitlines()
    assert last == "# runs 0 to 3, in this order: --index, --array=0-3"
    names = [line.split("my runs/")[1].split("'")[0] for line in lines]
    assert names == ["a-s1", "b-s1", "a-s2", "b-s2"]
    assert not (file.parent / "my runs").exists()
    code, output = launched(file, "--extra=--more 1")
    assert code == 0, output
    for name in names:
        (call,) = calls(file, name)
        own = ["--words", "two words"] if name.startswith("a") else []
        wanted = ["--run-dir", str(file.parent / "my runs" / name), *own, "--pause", "0"]
        wanted += ["--more", "1", "--seed", name[-1], "--total-timesteps", "5"]
        assert call["words"] == wanted and call["gpu"] is None
        assert f"| {name} | finished | 5 |" in output
        assert records(file)[name]["starts"] == 1
    began = [(file.parent / "my runs" / name / "calls").stat().st_mtime for name in names]
    assert began == sorted(began)
    code, output = launched(file)
    assert code == 0 and [len(calls(file, name)) for name in names] == [1] * 4
    assert "| b-s2 | finished | 5 |" in output


def test_parts_of_a_study(study, launched):
    file = study(a="", b="")
    assert launched(file, "--only", "b", "--seeds", "7", "8")[0] == 0
    assert {x.name for x in (file.parent / "my runs").iterdir() if x.is_dir()} == {"b-s7", "b-s8"}


def test_only_takes_patterns(study, launched):
    file = study(k_1="", k_10="", width="")
    code, output = launched(file, "--dry-run", "--seeds", 1, "--only", "k_*", "wid*", "k_1")
    assert code == 0 and [x in output for x in ("k_1-s1", "k_10-s1", "width-s1")] == [True] * 3
    code, output = launched(file, "--dry-run", "--seeds", 1, "--only", "k_*")
    assert code == 0 and "width" not in output and output.count("-s1") == 2
    code, output = launched(file, "--dry-run", "--only", "k_*", "x*")
    assert code == 2 and f"--only x* is not in {file}, which has k_1, k_10, width." in output


def test_a_command_may_name_its_seed(study, launched):
    """And paths, which are seen from the repository."""
    assert launched(study(a="--words 'of {seed}, {seed}'"))[0] == 0
    for seed in "12":
        (call,) = calls(study(a=""), f"a-s{seed}")
        assert call["words"][2:4] == ["--words", f"of {seed}, {seed}"]
        assert call["cwd"] == str(study(a="").parent)


def test_a_longer_study_goes_on(study, launched):
    assert launched(study(timesteps=4, seeds=[1], a=""))[0] == 0
    file = study(timesteps=6, seeds=[1], a="")
    assert launched(file)[0] == 0
    assert [x["words"][0] for x in calls(file, "a-s1")] == ["--run-dir", "--resume"]
    assert records(file)["a-s1"]["starts"] == 2 and records(file)["a-s1"]["timesteps"] == 6


def test_what_a_run_took_adds_up(tmp_path):
    """Starts and minutes of all attempts; code, steps and host are of the last one."""
    first = launch.Record("x", "here", "monday", starts=1, code=1, minutes=2.5, timesteps=5)
    last = launch.Record("x", "there", "tuesday", starts=2, code=0, minutes=1.25, timesteps=9)
    for record in (first, last):
        launch.save_record(tmp_path, "a-s1", record)
    total = dataclasses.replace(last, began="monday", starts=3, minutes=3.75)
    assert launch.read_records(tmp_path) == {"a-s1": total}


def test_a_killed_run_goes_on(study, launched):
    file = study(seeds=[1], a="--fail-once")
    code, output = launched(file)
    assert code == 0 and "a-s1 ended with code -9, once more" in output
    assert [x["words"][0] for x in calls(file, "a-s1")] == ["--run-dir", "--resume"]
    log = (file.parent / "my runs" / "a-s1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["timesteps"] for x in log] == [1, 2, 3, 4, 5]


def test_a_run_of_another_state_of_the_script_is_noted(study, launched):
    """Whether it is kept or goes on."""
    file = study(seeds=[1], a="")
    assert launched(file)[0] == 0
    args = file.parent / "my runs/a-s1/args.json"
    about = json.loads(args.read_text())
    today = harness.sha256_of(file.parent / "counter.py")
    resumed = {"script_sha256": "another", "resumed": [{"script_sha256": today}]}
    for more, noted in (({}, False), ({"script_sha256": "another"}, True), (resumed, False)):
        args.write_text(json.dumps(about | more))
        code, output = launched(file)
        assert code == 0 and ("note: a-s1 is kept, though" in output) == noted


@pytest.mark.parametrize("attempts", [1, 3])
def test_what_fails_is_reported_at_the_end(study, launched, attempts):
    """After so many attempts, and after all others have had their turn."""
    file = study(seeds=[1], timesteps=50, a="--fail", b="--pause 0")
    code, output = launched(file, "--attempts", attempts)
    assert code == 2 and len(calls(file, "a-s1")) == attempts
    assert "| a-s1 | failed with code 1 |" in output and "| b-s1 | finished |" in output
    assert "a-s1 ended with code 1: see" in output.splitlines()[-1]


def test_what_was_finished_by_hand_is_finished(study, launched):
    """Whatever study.json has kept of the launcher's own attempts."""
    file = study(seeds=[1], timesteps=2, a="--fail")
    assert launched(file, "--attempts", 1)[0] == 2 and records(file)["a-s1"]["code"] == 1
    known = records(file)["a-s1"] | {"host": "elsewhere"}
    (file.parent / "my runs/study.json").write_text(json.dumps({"a-s1": known}))
    run = ["--resume", str(file.parent / "my runs/a-s1"), "--total-timesteps", "2"]
    subprocess.run([sys.executable, str(file.parent / "counter.py"), *run], check=True)
    for _ in range(2):
        code, output = launched(file)
        assert code == 0 and "| a-s1 | finished | 2 " in output
    found = records(file)["a-s1"]
    assert (found["code"], found["starts"], found["host"]) == (0, 1, "elsewhere")


@pytest.mark.parametrize("text", ["{", "[]", '{"a-s1": {"wish": 1}}', '{"a-s1": null}'])
def test_a_damaged_study_json_is_found_first(study, launched, text):
    file = study(seeds=[1], a="--pause 0")
    (file.parent / "my runs").mkdir()
    (file.parent / "my runs/study.json").write_text(text)
    code, output = launched(file)
    assert code == 2 and output == f"error: {file.parent}/my runs/study.json is damaged.\n"
    assert not calls(file, "a-s1")


def test_a_run_that_cannot_begin_leaves_the_others_their_turns(study, launched):
    """As where the file system has no room for its log."""
    file = study(seeds=[1], timesteps=2, a="--pause 0", b="--pause 0")
    (file.parent / "my runs/a-s1.log").mkdir(parents=True)
    code, output = launched(file)
    assert code == 2 and "a-s1 cannot be made: Is a directory" in output
    assert "| b-s1 | finished |" in output


def test_the_evaluation_of_a_run_is_no_run(study, launched):
    file = study(seeds=[1], timesteps=2, a="--pause 0")
    assert launched(file)[0] == 0
    path = file.parent / "my runs/a-s1/args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_only": "other"}))
    code, output = launched(file)
    assert code == 2 and "a-s1 holds an evaluation of other, no run." in output


def test_a_study_json_that_is_lost_meanwhile_changes_no_code(study, launched):
    """A run that was stopped is requeued then, too."""
    file = study(seeds=[1], timesteps=400, a="--pause 0.05")
    with start(file) as process:
        wait_for(lambda: calls(file, "a-s1"))
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:  # the launcher may write it once more
            (file.parent / "my runs/study.json").write_text("{")
            time.sleep(0.02)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "study.json is damaged" in output


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_launcher_stops_its_runs_saved(study, launched, number):
    file = study(seeds=[1, 2], timesteps=400, a="--pause 0.05")
    with start(file, "--jobs", 2) as process:
        wait_for(lambda: calls(file, "a-s1") and calls(file, "a-s2"))
        time.sleep(0.3)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command goes on" in output
    assert "| a-s1 | stopped |" in output
    for seed in (1, 2):
        assert not is_alive(calls(file, f"a-s{seed}")[0]["pid"])
    done = study(seeds=[1, 2], timesteps=30, a="--pause 0")
    assert launched(done)[0] == 0
    assert [x["words"][0] for x in calls(file, "a-s2")] == ["--run-dir", "--resume"]


@pytest.mark.long
def test_nohup(study, launched):
    """A launcher that ignores SIGHUP when it starts, as under nohup, outlives its terminal."""
    file = study(seeds=[1], timesteps=40, a="--pause 0.05")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(file)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        wait_for(lambda: calls(file, "a-s1"))
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "| a-s1 | finished |" in output


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.long
def test_an_orphan_is_waited_for(study, launched):
    """The launcher is killed, its run goes on; the next launcher does not start it again."""
    file = study(seeds=[1], timesteps=600, a="--pause 0.05")
    with start(file) as process:
        wait_for(lambda: calls(file, "a-s1"))
        process.kill()
    code, output = launched(file)
    assert code == 0 and "a-s1 is being trained by another process: waiting" in output
    assert len(calls(file, "a-s1")) == 1


def test_what_another_process_trains_holds_up_nothing(study, launched):
    """The one job at a time does not wait for a-s1 before it has done the others."""
    file = study(seeds=[1, 2], a="--pause 0", b="--pause 0")
    first = file.parent / "my runs/a-s1"
    first.mkdir(parents=True)
    others = [str(first.parent / name / "summary.json") for name in ("b-s1", "a-s2", "b-s2")]
    holder = "import fcntl, os, sys, time; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, 2); "
    holder += "print(flush=True)\nwhile not all(map(os.path.exists, sys.argv[2:])): time.sleep(0.1)"
    command = [sys.executable, "-c", holder, str(first / "lock"), *others]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, output = launched(file)
        assert other.poll() == 0
    assert code == 0 and output.count("a-s1 is being trained by another process: waiting") == 1
    assert "| a-s1 | finished | 5 |" in output and len(calls(file, "a-s1")) == 1


@pytest.mark.long
def test_a_killed_orphan_is_gone_on_with(study, launched):
    file = study(seeds=[1], timesteps=2000, a="--pause 0.05")
    with start(file) as process:
        wait_for(lambda: calls(file, "a-s1"))
        process.kill()
    file = study(seeds=[1], timesteps=2000, a="--pause 0")
    with start(file) as process:
        assert "waiting for it" in process.stdout.readline()
        os.kill(calls(file, "a-s1")[0]["pid"], signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [x["words"][0] for x in calls(file, "a-s1")] == ["--run-dir", "--resume"]


@pytest.mark.long
def test_two_launchers_share_a_study(study, launched):
    file = study(seeds=[1, 2, 3], a="--pause 0.05", b="--pause 0.05")
    with start(file) as one, start(file, "--jobs", 2) as other:
        outputs = [x.communicate(timeout=120)[0] for x in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0], outputs
    for name in ("a-s1", "b-s1", "a-s2", "b-s2", "a-s3", "b-s3"):
        log = (file.parent / "my runs" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(x)["timesteps"] for x in log] == [1, 2, 3, 4, 5]
        assert name in records(file)


def test_a_runs_own_seeds(study, launched):
    """They take the place of the study's; --seeds takes the place of both."""
    file = study(seeds=[1, 2], a="", b="")
    file.write_text(file.read_text().replace("[runs]", "own_seeds = { b = [4, 5, 6] }\n[runs]"))
    order = "a-s1 b-s4 a-s2 b-s5 b-s6"  # the first seed of each comes first
    code, output = launched(file, "--dry-run")
    assert code == 0 and re.findall(r"[ab]-s\d", output) == order.split()
    code, output = launched(file, "--dry-run", "--seeds", 2, 3, "--only", "b")
    assert code == 0 and re.findall(r"[ab]-s\d", output) == ["b-s2", "b-s3"]
    file.write_text(file.read_text().replace("{ b", "{ c"))
    code, output = launched(file)
    assert code == 2
    assert output == f"error: {file}: the entry: own_seeds names c, which is not in runs.\n"


def test_gpus_are_dealt_out(study, launched):
    file = study(seeds=[1, 2, 3], a="--pause 0.05", b="--pause 0.05")
    assert launched(file, "--jobs", 4, "--gpus", 2)[0] == 0
    found = [calls(file, f"{name}-s{seed}")[0] for name in "ab" for seed in (1, 2, 3)]
    assert {call["gpu"] for call in found} == {"0", "1"}  # which run has which is chance
    assert found[0]["words"][-6:-4] == ["--device", "cuda"]  # not in silence on the CPU
    file = study(seeds=[4], a="")
    assert launched(file, "--gpus", 1, CUDA_VISIBLE_DEVICES="5,7")[0] == 0
    assert calls(file, "a-s4")[0]["gpu"] == "5"
    code, output = launched(file, "--gpus", 3, CUDA_VISIBLE_DEVICES="5,7")
    assert code == 2 and output == "error: --gpus 3: CUDA_VISIBLE_DEVICES names 2.\n"
    code, output = launched(file, "--gpus", 1, CUDA_VISIBLE_DEVICES="")
    assert code == 2 and output == "error: --gpus 1: CUDA_VISIBLE_DEVICES names 0.\n"


@pytest.mark.parametrize("given", ["--device cpu", "--device=cpu"])
def test_a_runs_own_device_stays(study, launched, given):
    file = study(seeds=[1], a=given, b="")
    assert launched(file, "--gpus", 1)[0] == 0
    assert "cuda" not in calls(file, "a-s1")[0]["words"]
    assert "cuda" in calls(file, "b-s1")[0]["words"]
    file = study(seeds=[2], a="")
    assert launched(file, "--gpus", 1, f"--extra={given}")[0] == 0
    assert "cuda" not in calls(file, "a-s2")[0]["words"]


def test_ray_gives_each_process_a_gpu(study, launched):
    """Refused before Ray is looked for."""
    file = study(a="")
    file.write_text(f"processes = 2\n{file.read_text()}")
    code, output = launched(file, "--engine", "ray", "--gpu", 0.5)
    assert code == 2 and output == "error: --gpu 0.5: a run of this study has 2 processes.\n"


def test_each_process_of_a_run_has_a_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def sets(gpus, jobs, processes):
        options = launch.Launch(Path("study.toml"), gpus=gpus, jobs=jobs)
        return [x["CUDA_VISIBLE_DEVICES"] for x in launch.slots_of(options, processes)]

    assert sets(gpus=5, jobs=0, processes=2) == ["0,1", "2,3"]
    assert sets(gpus=4, jobs=3, processes=2) == ["0,1", "2,3", "0,1"]
    with pytest.raises(launch.UsageError, match="--gpus 1: a run of this study has 2 processes"):
        sets(gpus=1, jobs=0, processes=2)


def test_torchrun_waits_until_runs_have_saved(study, launched, monkeypatch):
    """By default it kills what is still busy 30 seconds after SIGTERM."""
    from torch.distributed.launcher.api import LaunchConfig

    def seconds():
        return LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2).shutdown_timeout

    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert seconds() == 30
    file = study(seeds=[1], a="")
    assert launched(file)[0] == 0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", calls(file, "a-s1")[0]["patience"])
    assert seconds() == 3600


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpu", 1), "--gpu is for --engine ray; --gpus gives GPUs to runs here."),
        (("--engine", "ray", "--gpus", 2), "--gpus is for this machine; --gpu is a run's share"),
        (("--engine", "ray", "--jobs", 2), "--jobs is for this machine; Ray runs as many"),
        (("--extra=--seed 3",), "--seed is the study's seeds."),
        (("--extra=--run-dir=x",), "--run-dir is the study's dir."),
        (("--extra=--total_timesteps 3",), "--total_timesteps is the study's timesteps."),
        (("--extra=--eval-only x",), "--eval-only is not for a study, which names runs to train."),
    ],
)
def test_options_that_would_do_nothing(study, launched, words, sentence):
    file = study(a="")
    code, output = launched(file, *words)
    assert code == 2 and sentence.replace("_", "-") in output.replace("_", "-")
    assert not calls(file, "a-s1")


def test_one_of_an_array(study, launched):
    file = study(a="", b="")
    assert launched(file, "--index", 1)[0] == 0
    assert launched(file, SLURM_ARRAY_TASK_ID="2")[0] == 0
    assert {x.name for x in (file.parent / "my runs").iterdir() if x.is_dir()} == {"b-s1", "a-s2"}
    code, output = launched(file, "--index", 4)
    assert code == 2 and output == "error: --index 4: the study has runs 0 to 3.\n"
    code, output = launched(file, SLURM_ARRAY_TASK_ID="two")
    sentence = "SLURM_ARRAY_TASK_ID is two, which is no number of a run."
    assert code == 2 and output == f"error: {sentence}\n"
    code, output = launched(file, "--extra", "'")
    assert code == 2 and output == "error: --extra: ': no closing quotation.\n"


@pytest.mark.long
def test_runs_of_two_processes(study):
    """Stopped under torchrun, whose own code tells nothing, then gone on with to the end, then
    kept. The script is a real one."""
    file = study(seeds=[1], timesteps=1600, a="--pause 0.05 --save-every 80")
    file.write_text(file.read_text().replace("[runs]", "processes = 2\n[runs]"))
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    lines = [path, "from tests.harness import learner", "learner.leave(learner.main())"]
    (file.parent / "counter.py").write_text("\n".join(lines))
    run = file.parent / "my runs" / "a-s1"
    with start(file) as process:
        log = run / "metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"), seconds=120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    saved = json.loads((run / "checkpoints.json").read_text())[0]["timesteps"]
    assert 8 <= saved < 1600 and not (run / "summary.json").exists()
    for starts in (2, 2):  # the third launcher has nothing to start
        with start(file) as process:
            output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
        assert "| a-s1 | finished | 1,600 |" in output
        assert records(file)["a-s1"]["starts"] == starts
    steps = [json.loads(line)["timesteps"] for line in (run / "metrics.jsonl").open()]
    assert steps == [*range(8, 1601, 8), 1600]  # at last the final evaluation


def test_a_file_system_without_locks(study, launched, monkeypatch):
    """As of many clusters: flock fails there. Records are written all the same."""

    def no_locks(*found):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(launch.fcntl, "flock", no_locks)
    file = study(seeds=[1], a="")
    code, output = launched(file)
    assert code == 0, output
    assert records(file)["a-s1"]["code"] == 0


@pytest.mark.long
def test_slurm_starts_a_stopped_run_again(study, launched):
    """As SLURM does it, with `scontrol` and a queue of our own: TERM before the time is out, the
    run is saved, the job asks to be queued again, and goes on where it was."""
    file = study(seeds=[1], timesteps=100, a="--pause 0.05")
    tool = file.parent / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tool.parent}/asked\n')
    tool.chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "99", "SLURM_JOB_ID": "99"}
    slurm["PATH"] = f"{tool.parent}:{os.environ['PATH']}"
    with start(file, **slurm) as process:
        wait_for(lambda: calls(file, "a-s1"))
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert (tool.parent / "asked").read_text() == "requeue 99_0\n"
    assert launched(file, **slurm)[0] == 0
    assert (tool.parent / "asked").read_text() == "requeue 99_0\n"
    assert [x["words"][0] for x in calls(file, "a-s1")] == ["--run-dir", "--resume"]


@pytest.mark.long
def test_the_documented_array(study):
    """The command of docs/slurm.md, word for word but for the study and its number of runs, given
    to a stand-in for sbatch. The first task's time is up midway: it is saved, asks to be queued
    again, and goes on behind the others."""
    page = (ROOT / "docs/slurm.md").read_text()
    (command,) = re.findall(r"^    (sbatch .*\\\n +--wrap .*)$", page, re.M)
    folder = study(a="").parent
    file = study(seeds=[1], timesteps=30, a="--pause 0.1", b="--pause 0", c="--pause 0")
    for asked, ours in (("0-24", "0-2"), ("STUDY.toml", file.name)):
        assert asked in command
        command = command.replace(asked, ours)
    (folder / "experiments").mkdir()
    (folder / "launcher.py").rename(folder / "experiments/launch.py")
    stand_in = Path(__file__).with_name("stand_in_slurm.py")
    python, bin_ = sys.executable, folder / "bin"
    tools = {bin_ / name: f"{python} {stand_in} {name}" for name in ("sbatch", "scontrol")}
    tools[folder / ".venv/bin/python"] = python
    for tool, what in tools.items():
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(f'#!/bin/sh\nexec {what} "$@"\n')
        tool.chmod(0o755)
    books = folder / "books"
    books.mkdir()
    clean = {name: x for name, x in os.environ.items() if not name.startswith("SLURM")}
    clean |= {"PATH": f"{bin_}:{os.environ['PATH']}", "BOOKS": str(books)}
    clean["TIME_IS_UP_AT"] = str(folder / "my runs/a-s1/checkpoints.json")
    done = subprocess.run(
        command, shell=True, cwd=folder, env=clean, capture_output=True, text=True, timeout=280
    )
    printed = {x.name: x.read_text() for x in books.glob("*.out")}
    assert done.returncode == 0, (done.stderr, printed)
    ended = [(x["job"], x["code"], x["again"]) for x in json.loads((books / "ended").read_text())]
    assert ended == [(100, 75, True), (101, 0, False), (102, 0, False), (100, 0, False)], printed
    assert [x["words"][0] for x in calls(file, "a-s1")] == ["--run-dir", "--resume"]
    for run in ("a-s1", "b-s1", "c-s1"):
        log = (folder / "my runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(x)["timesteps"] for x in log] == [*range(1, 31)]
    assert [len(calls(file, x)) for x in ("b-s1", "c-s1")] == [1, 1]


def test_nobody_reads_the_launcher(study):
    """As with `| head -1`: all runs are trained, and nothing is said of the pipe."""
    file = study(seeds=[1, 2, 3], timesteps=2, a="")
    with start(file) as process:
        process.stdout.close()
    assert process.returncode == 0
    assert all(len(calls(file, f"a-s{seed}")) == 1 for seed in (1, 2, 3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_launcher_that_cannot_write(study):
    file = study(seeds=[1, 2], timesteps=2, a="")
    command = [sys.executable, str(file.parent / "launcher.py"), str(file)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd="/")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert all(len(calls(file, f"a-s{seed}")) == 1 for seed in (1, 2))


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux and unshare")
def test_a_full_disk(study):
    """A run that fills the disk has failed, in a sentence; the others have their turns, too."""
    file = study(seeds=[1, 2], timesteps=3, big="--fill", small="")
    (file.parent / "my runs").mkdir()
    shell = 'mount -t tmpfs -o size=256k none "my runs" || exit 77; "$@"; code=$?; ls "my runs"'
    line = ["unshare", "-rm", "sh", "-c", f"{shell}; exit $code", "sh"]
    line += [sys.executable, "launcher.py", str(file), "--attempts", "1"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=file.parent)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "| big-s1 | failed with code 1 |" in done.stdout
    assert "big-s2 ended with code" in done.stderr and "small-s2" in done.stdout.split()
    assert "not begun" not in done.stdout and ".part" not in done.stdout


def test_a_record_that_cannot_be_written(study, launched):
    """The run has ended as it has, whatever study.json says."""
    file = study(seeds=[1], a="")
    (file.parent / "my runs" / "study.lock").mkdir(parents=True)
    code, output = launched(file)
    assert code == 0 and "a-s1 is not in study.json: " in output
    assert "| a-s1 | finished | 5 |" in output


def test_without_scontrol(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    launch.requeue()
    assert capsys.readouterr().out.startswith("scontrol cannot be started, queue job 123 again:")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dir = ", "is no TOML: "),
        ('dir = "x"\nseeds = []\ntimesteps = 1\n[runs]\na = "counter.py"', "seeds: "),
        ('dir = "x"\nseeds = [1]\ntimesteps = 0\n[runs]\na = "counter.py"', "timesteps: "),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1', "runs: field required"),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1\nx = 1\n[runs]\na = "counter.py"', "x: extra"),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1\n[runs]\na = "no.py"', "a: there is no no.py."),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1\n[runs]\na = ""', "a: names no script."),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1\n[runs]\na = "x.py \'"', "a: x.py ': no closing"),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1\nflags = "\'"\n[runs]\na = "x.py"', "flags: ': no"),
        ('dir = "x"\nseeds = [1]\ntimesteps = 1\n[runs]\n"x/a" = "counter.py"', "runs.x/a."),
        (None, "cannot be read: No such file"),
    ],
)
def test_wrong_studies(text, sentence, study, launched):
    file = study(a="")
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    code, output = launched(file)
    assert code == 2 and sentence in output and output.count("\n") == 1


def test_bars_show_what_is_trained(tmp_path):
    """Steps of the log's last whole line."""
    run = tmp_path / "a-s1"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"timesteps": 3}\n{"timesteps": 4}\n{"times')
    launcher = launch.Launcher(tmp_path, 1, [{}])
    launcher.running[run] = runs.Job(run, "counter.py", (), 1, 10)
    bars = launch.Bars(launcher)
    bars.look()
    (bar,) = bars.bars.values()
    assert (bar.n, bar.total, bar.desc) == (4, 10, "a-s1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('teps": 6}\n')
    bars.look()
    assert bar.n == 6
    launcher.running.clear()
    bars.look()
    assert not bars.bars


@pytest.fixture
def on_ray(tmp_path):
    """A real script on Ray, as tasks import the real launcher: the run, a context with the launcher
    while the run trains. Skipped without requirements-ray.txt."""
    pytest.importorskip("ray")
    flags = "--task resource --populations 3 --num-envs 2 --batch-size 8 --update-every 20 "
    flags += "--inner-steps 1 --hidden-size 8 --key-size 4 --latent-size 2 --log-every 40 "
    flags += "--eval-every 0 --final-episodes 2 --no-compile"
    lines = [f'dir = "{tmp_path}/runs"', "seeds = [1]", f'flags = "{flags}"']
    file = tmp_path / "study.toml"
    run = tmp_path / "runs" / "a-s1"
    command = [sys.executable, str(ROOT / "experiments/launch.py"), str(file), "--engine", "ray"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    clean = {name: x for name, x in os.environ.items() if not name.startswith(("RAY", "SLURM"))}

    @contextlib.contextmanager
    def launched(timesteps):
        study = [*lines, f"timesteps = {timesteps}", "[runs]", 'a = "mra_maddpg_particle.py"']
        file.write_text("\n".join(study))
        with subprocess.Popen(command, env=clean, **options) as process:
            try:
                wait_for(lambda: (run / "metrics.jsonl").exists() or process.poll(), 240)
                yield process
            finally:
                process.kill()  # where something has failed; Ray's processes end with it

    return run, launched


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_worker_of_ray_is_killed(on_ray):
    """Ray starts its task again, which waits for the run that the dead worker's process still
    trains."""
    run, launched = on_ray
    with launched(6_000) as process:
        os.kill(parent_of(trainer_of(run)), signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "waiting for it" in output and "| a-s1 | finished | 6,000 |" in output
    log = [json.loads(line)["timesteps"] for line in (run / "metrics.jsonl").open()]
    assert log == sorted(log), "two have trained it"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_launcher_on_ray_stops_its_runs_saved(on_ray):
    run, launched = on_ray
    with launched(100_000_000) as process:
        trainer = trainer_of(run)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "| a-s1 | stopped |" in output and not is_alive(trainer)
    assert json.loads((run / "checkpoints.json").read_text())
    assert not (run / "summary.json").exists()


def trainer_of(run):
    (trainer,) = (int(x) for x in os.listdir("/proc") if x.isdigit() and trains(x, run))
    return trainer


def trains(pid, run):
    """Whether a process is the script's, with this run on its command line."""
    try:
        return str(run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_without_ray(study, launched, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, output = launched(study(a=""), "--engine", "ray")
    assert code == 2 and output == "error: --engine ray needs requirements-ray.txt.\n"


STUDIES = sorted(path.stem for path in (ROOT / "experiments/studies").glob("*.toml"))
PAGE = (ROOT / "docs/studies.md").read_text()
MANY = [f"claims_{world}" for world in ("resource", "treasure", "sz", "csz", "pacman", "chicken")]
MANY += ["mipi_table1", "mipi_table3", "mipi_ppo_sz", "mipi_ppo_controls_sz"]
MANY += ["mra_fig2", "mra_fig3", "mra_ladder_signpost", "mra_ladder_resource", "bidist_pure"]


@pytest.mark.parametrize("name", some_long(STUDIES, *MANY))
def test_studies_are_ones_that_scripts_take(name):
    file = ROOT / f"experiments/studies/{name}.toml"
    options = launch.Launch(study=file)
    jobs = launch.jobs_of(launch.read_study_file(file), options)
    assert len({job.run for job in jobs}) == len(jobs)
    for job in jobs:
        runs.script_args(runs.load_script(Path(job.script).stem), job.argv())


def test_the_page_names_studies_that_exist():
    """In its tables and text, and every study but those for single worlds of a table."""
    words = set(
        re.findall(r"`((?:bidist|claims|mra|mipi|mappo|chicken|replay|value)_[\w*]+)`", PAGE)
    )
    single = {name for name in STUDIES if name.startswith("claims_")}
    assert words - {"claims_WORLD"} <= {*STUDIES}
    assert {*STUDIES} - single <= words


def test_studies_that_name_the_same_run_mean_the_same():
    """Of all studies; else the second one would be refused."""
    named = {}
    for name in STUDIES:
        options = launch.Launch(study=ROOT / f"experiments/studies/{name}.toml")
        found = launch.read_study_file(options.study)
        for job in launch.jobs_of(found, dataclasses.replace(options, seeds=found.seeds[:1])):
            named.setdefault(job.run, []).append(job)
    shared = [jobs for jobs in named.values() if len(jobs) > 1]
    assert shared
    for first, *others in shared:
        args = [
            runs.script_args(runs.load_script(Path(job.script).stem), job.argv())
            for job in (first, *others)
        ]
        assert all(x == args[0] for x in args), first.run.name


FIGURES = {  # {study: what trains the same, under other names}
    "mra_fig2": ["mra train fig2 --total-timesteps 160000"],
    "mra_fig3": ["mra train fig3 --total-timesteps 160000"],
    "bidist_pure": [f"bidist {figure}" for figure in ("fig6", "fig8", "c1", "c2")],
}


@pytest.mark.long
@pytest.mark.parametrize("name", FIGURES)
def test_studies_of_figures_are_what_their_commands_train(name):
    """As a set."""
    wanted, found = {}, {}
    for words in FIGURES[name]:
        tool, *words = words.split()
        bots = ["--extra", "--bots", "official"] if tool == "bidist" else []
        code, text, stderr = command(tool, *words, "--seeds", "21", "--dry-run", *bots)
        assert code == 0, stderr
        for line in text.splitlines():
            path, *argv = shlex.split(line)[1:]
            wanted[str(args_of(path, argv))] = line
    file = ROOT / f"experiments/studies/{name}.toml"
    options = launch.Launch(study=file, seeds=(21,))
    for job in launch.jobs_of(launch.read_study_file(file), options):
        found[str(args_of(job.script, job.argv()))] = job.run.name
    assert set(found) == set(wanted)


def args_of(path, argv):
    args = runs.script_args(runs.load_script(Path(path).stem), argv)
    return path, dataclasses.replace(args, run_dir=None)


@pytest.mark.parametrize("name", ["bidist_table1", "mipi_table1", "mipi_table2", "mipi_table3"])
def test_tables_of_several_worlds_are_the_runs_of_their_claims(name):
    """Commands, names, seeds and lengths, but of runs that no claim needs."""
    wanted = {}
    for part in TABLES[name.partition("_")[0]]:
        wanted |= jobs_of(part)
    found = jobs_of(name)
    assert {run: args for run, args in found.items() if run in wanted}.items() <= wanted.items()
    others = {run.rpartition("-s")[0] for run in found if run not in wanted}
    if name == "bidist_table1":
        assert len(found) == len(wanted) == 5 * 6 * 3
    assert {re.sub("^(sz|csz|mmm)", "WORLD", run) for run in others} == NO_CLAIMS[name]


WORLDS = ("chicken", "coins", "mining", "prisoners", "pure")
TABLES = {
    "bidist": [f"claims_official_{world}" for world in WORLDS],
    "mipi": [f"claims_{x}{y}" for x in ("sz", "csz", "mmm") for y in ("", "_s14", "_s17")],
}
ALPHAS = ("0.01", "0.015", "0.05", "0.1", "inf")
NO_CLAIMS = {  # what a table has beside the runs of claims
    "bidist_table1": set(),
    "mipi_table1": {"WORLD_long-mappo"},
    "mipi_table2": set(),
    "mipi_table3": {f"WORLD-mipi-alpha-{alpha}" for alpha in ALPHAS},
}


def read_named(name):
    return launch.read_study_file(ROOT / f"experiments/studies/{name}.toml")


def jobs_of(name):
    """{run: arguments} of a study in the repository."""
    jobs = launch.jobs_of(read_named(name), launch.Launch(study=Path(name)))
    return {job.run.name: str(args_of(job.script, job.argv())) for job in jobs}


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "last, sentence",
    [
        ("mra_maddpg_particle.py --polyak 3", "--polyak 3.0: input should be less than"),
        ("mra_maddpg_particle.py --no-such 3", "mra_maddpg_particle.py refuses its flags."),
        ("mra_maddpg_particle.py --adapt x --polyak 3", "--polyak 3.0: input should be less than"),
        ("mra_maddpg_particle.py --batch-size 99 --buffer-size 9", "--batch-size exceeds"),
        ("harness.py", "harness.py is no script that trains."),
        ("experiments/compare.py", "experiments/compare.py is no script that trains."),
    ],
)
def test_all_flags_are_checked_first(tmp_path, capsys, monkeypatch, last, sentence, flags):
    monkeypatch.setattr(runs.Trainer, "try_once", lambda *_: pytest.fail("something has started"))
    lines = [f'dir = "{tmp_path}/runs"', "seeds = [1]", "timesteps = 9", "[runs]"]
    lines += ['first = "mra_maddpg_particle.py"', f'last = "{last}"']
    (tmp_path / "study.toml").write_text("\n".join(lines))
    assert launch.main([str(tmp_path / "study.toml"), *flags]) == 2
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith(f"error: last-s1: {sentence}")


def test_runs_of_a_study_are_read_without_their_logs(study, launched):
    """RUNS/*-s* names the launcher's logs, too."""
    file = study(a="--pause 0", seeds=[1])
    assert launched(file)[0] == 0
    named = sorted((file.parent / "my runs").glob("*-s*"))
    assert [x.name for x in named] == ["a-s1", "a-s1.log"]
    assert [x.name for x in runs.read_runs(named)] == ["a-s1"]
