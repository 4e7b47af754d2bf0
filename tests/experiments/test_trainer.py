"""Training many runs: what is started, resumed, kept and stopped, with real processes."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from made_up import ROOT, experiment

runs = experiment("runs")

SCRIPT = """
import json, pathlib, sys, time
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
run = pathlib.Path(value("--resume" if "--resume" in words else "--run-dir"))
run.mkdir(exist_ok=True)
with (run / "calls").open("a") as file:
    file.write(json.dumps(words) + "\\n")
print("hello", file=sys.stderr)
if "--fail" in words:
    raise SystemExit(3)
(run / "checkpoints.json").write_text("[]")
(run / "args.json").write_text(json.dumps({"script": "script"}))
if "--stop" in words and "--resume" not in words:
    raise SystemExit(75)
steps = int(value("--total-timesteps"))
(run / "summary.json").write_text(json.dumps({"timesteps": steps, "eval": {}}))
if "--linger" in words:
    (run / "ended").touch()
    time.sleep(600)
class Args:
    pass
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """jobs(timesteps, name=flags, ...), with a script that only notes how it was called."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    for name in ("check_same", "check_flags"):
        monkeypatch.setattr(runs.Job, name, lambda *found: None)

    def make(timesteps, **commands):
        return [
            runs.Job(tmp_path / "my runs" / f"{name}-s{seed}", "script.py", flags, seed, timesteps)
            for seed in (1, 2)
            for name, flags in commands.items()
        ]

    return make


def calls(job):
    return [json.loads(line) for line in (job.run / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "found", "sentence"),
    [
        ("runs/mra-s1 --population 48", {}, None),
        ("runs/other-s1 --population 48", {}, "its adapt is mra-s1, not other-s1."),
        ("runs/mra-s1 --population 6", {}, "its population is 48, not 6."),
        ("runs/mra-s1 --population 48", {"seed": 5}, "its seed is 5, not 1."),
        ("runs/mra-s1 --population 48 --no-shaping", {}, "its shaping is True, not False."),
    ],
)
@pytest.mark.parametrize("joined", [False, True])  # --adapt RUN, --adapt=RUN
def test_an_adaptation_of_another_run_is_refused(tmp_path, flags, found, sentence, joined):
    """What the command says must be so; what it leaves open comes from the adapted run."""
    source, *rest = flags.split()
    words = (f"--adapt={source}" if joined else "--adapt", *([] if joined else [source]), *rest)
    job = runs.Job(tmp_path / "run", "mra_maddpg_particle.py", words, 1, 30_000)
    job.check_flags()
    own = {"script": "mra_maddpg_particle", "adapt": "elsewhere/mra-s1", "population": "48"}
    own |= {"seed": 1, "task": "pacman", "shaping": True} | found
    if sentence is None:
        job.check_same(own)
    else:
        with pytest.raises(runs.UsageError, match=f"{job.run} holds another run: {sentence}"):
            job.check_same(own)


def test_a_run_from_before_a_flag_is_no_other_run(tmp_path):
    """It has the flag's default, which JSON writes as a list where it is a tuple."""
    job = runs.Job(tmp_path / "run", "mra_maddpg_particle.py", (), 1, 30_000)
    script = importlib.import_module("mra_maddpg_particle")
    own = dataclasses.asdict(script.Args(seed=1)) | {"script": "mra_maddpg_particle"}
    own = json.loads(json.dumps(own))
    assert isinstance(own.pop("populations"), list)
    job.check_same(own)


@pytest.mark.parametrize(("flag", "theirs"), [("num_envs", 4), ("backend", "sc2")])
def test_a_run_in_other_battles_is_another_run(tmp_path, flag, theirs):
    """Though an evaluation may change these flags, and RESUMABLE names them for that."""
    job = runs.Job(tmp_path / "run", "mipi_refil_smac.py", (), 1, 30_000)
    script = importlib.import_module("mipi_refil_smac")
    own = dataclasses.asdict(script.Args(seed=1)) | {"script": "mipi_refil_smac"}
    job.check_same(json.loads(json.dumps(own)))
    with pytest.raises(runs.UsageError, match=f"its {flag} is {theirs}, not"):
        job.check_same(json.loads(json.dumps(own)) | {flag: theirs})


def test_a_study_starts_resumes_and_keeps(jobs, capsys):
    """New runs start, one that was stopped (75) goes on, a finished one is kept, one that is too
    short goes on; a failing one is named with its log."""
    commands = {"a": ("--words", "two words"), "b": ("--stop",)}
    first = jobs(70, **commands)
    runs.train_all(first, 2, dry_run=True)
    assert capsys.readouterr().out.count("python script.py") == 4
    assert not first[0].run.parent.exists()
    with pytest.raises(runs.StoppedError, match=r"^2 of 4 runs were stopped") as stopped:
        runs.train_all(first, 2)
    assert stopped.value.code == 75
    runs.train_all(first, 2)
    for job in first:
        name, flags = job.run.name, [*job.flags, "--seed", str(job.seed)]
        flags += ["--total-timesteps", "70"]
        wanted = [["--run-dir", str(job.run), *flags]]
        if name.startswith("b"):
            wanted.append(["--resume", str(job.run), *flags])
        assert calls(job) == wanted
        assert runs.beside(job.run, ".log").read_text() == "hello\n" * len(wanted)
    runs.train_all(jobs(90, **commands), 2)
    assert [len(calls(job)) for job in first] == [2, 3, 2, 3]
    assert calls(first[0])[1][0] == "--resume"
    with pytest.raises(runs.UsageError, match=r"c-s1 ended with code 3: see .*c-s1\.log"):
        runs.train_all(jobs(70, c=("--fail",), d=("--stop",)), 1)
    assert len(calls(jobs(70, d=())[0])) == 1  # who comes after a failure has its turn


def test_what_is_stopped_after_its_end_is_finished(jobs):
    """By a signal when it has written its summary, but not left; one that has not is stopped."""
    (job, *_) = jobs(70, a=("--linger",))
    trainer = runs.Trainer()
    done = []
    thread = threading.Thread(target=lambda: done.append(trainer.train(job)))
    thread.start()
    while thread.is_alive() and not (job.run / "ended").exists():
        time.sleep(0.05)
    trainer.stop(signal.SIGTERM, None)
    thread.join()
    assert done == [runs.FINISHED]
    (stopped,) = trainer.children
    assert stopped.returncode == -signal.SIGTERM
    (other, *_) = jobs(70, b=())
    assert trainer.train(other) == runs.STOPPED


LIMIT = 600  # seconds of each wait: only a hang lasts so long, on a busy machine, too


def wait_for(condition, process):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None or condition(), process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_ends_the_child_of_a_tool(tmp_path):
    """As bench.py zoo and bench.py ranks have: SIGTERM, e.g. of timeout, leaves nobody behind."""
    lines = [
        "import dataclasses, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from experiments import runs",
        "@dataclasses.dataclass(frozen=True)",
        "class Study: pass",
        "def wait(study: Study) -> None:",
        "    note = \"open('child', 'w').write(str(os.getpid()))\"",
        "    sleeps = f'import os, time; {note}; time.sleep(600)'",
        "    runs.run_child([sys.executable, '-c', sleeps])",
        "sys.exit(runs.run_command(wait, [], 'Waits.'))",
    ]
    (tmp_path / "tool.py").write_text("\n".join(lines))
    child = tmp_path / "child"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "tool.py"], cwd=tmp_path, **options) as process:
        wait_for(lambda: child.exists() and child.read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


TINY = "--task resource --populations 3 --num-envs 2 --batch-size 8 --update-every 20 "
TINY += "--inner-steps 1 --hidden-size 8 --key-size 4 --latent-size 2 --save-every 40 "
TINY += "--log-every 40 --eval-every 0 --eval-populations 3 --final-episodes 2 --no-compile"


@pytest.mark.long
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_what_is_trained(tmp_path, number):
    """The run saves and ends before the command does, with code 75; nobody goes on training; the
    same command goes on with it. From another directory, with a space in --dir."""
    folder = tmp_path / "my runs"
    flags = ["--preset", "paper", "--dir"]
    command = [sys.executable, str(ROOT / "experiments/mra.py"), "train", "fig7", *flags]
    command += [str(folder), "--seeds", "1", f"--flags={TINY}", "--total-timesteps"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = folder / "resource-3-option-s1"  # the first of three
    with subprocess.Popen([*command, "100000000"], cwd=tmp_path, **options) as process:
        try:
            log = run / "metrics.jsonl"
            wait_for(lambda: log.exists() and log.stat().st_size, process)
            process.send_signal(number)
            assert process.wait(LIMIT) == 75
        finally:
            if process.poll() is None:  # what it trains has a session of its own and would go on
                for pid in trainers_of(run):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
        output = process.stdout.read()
    assert "3 of 3 runs were stopped; the same command goes on." in output
    assert not (run / "summary.json").exists()
    (newest, *_) = json.loads((run / "checkpoints.json").read_text())
    steps = newest["timesteps"]
    assert not trainers_of(run), "somebody goes on training"
    done = subprocess.run([*command, str(steps + 40)], cwd=tmp_path, timeout=LIMIT, **options)
    assert done.returncode == 0, done.stdout
    assert f"--resume '{run}'" in done.stdout
    assert json.loads((run / "summary.json").read_text())["timesteps"] == steps + 40


def trainers_of(run):
    """The processes that have the run on their command lines."""
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and in_run(pid, run)]


def in_run(pid, run):
    """Whether a process has the run on its command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return str(run).encode() in file.read()
    except OSError:
        return False
