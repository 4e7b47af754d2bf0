"""Flags, presets, what a resumed run inherits, and what is refused in one sentence."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import harness

import pytest
import torch
from runs import ROOT, change_newest, index, only_error, states

from tests.harness.tools import PULLS, flags, learner, resume, run


def stored(run_dir):
    return json.loads((Path(run_dir) / "args.json").read_text())


def test_every_flag_arrives():
    typed = {
        "seed": "3",
        "total_timesteps": "8",
        "run_dir": "run",
        "log_every": "4",
        "eval_every": "4",
        "eval_episodes": "1",
        "final_episodes": "1",
        "save_every": "4",
        "wandb_project": "elsewhere",
        "wandb_timeout": "3.5",
        "device": "cpu",
        "num_threads": "2",
        "learning_rate": "0.5",
    }
    argv = []
    for name, value in typed.items():
        argv += [f"--{name.replace('_', '-')}", value]
    assert (
        run(*argv, "--capture-video", "--arms", "a", "b", "c", "--no-use-replay", "--no-onednn")
        == 0
    )
    found = stored("run")
    assert {name: str(found[name]) for name in typed} == typed
    assert found["capture_video"] is True and found["use_replay"] is False
    assert found["arms"] == ["a", "b", "c"] and found["track"] is found["onednn"] is False
    assert found["resolved"] == {"device": "cpu", "processes": 1, "arms": 3}
    assert found["script"] == "learner" and "torch" in found["packages"]


def test_commit_of_a_run(monkeypatch):
    """By git; where it finds none, as in an image, what the image says."""
    monkeypatch.setenv("UNSEEN_COMMIT", "abc1234")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert run(*flags("here", 1)) == 0 and stored("here")["commit"] == (found or "abc1234")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert run(*flags("image", 1)) == 0 and stored("image")["commit"] == "abc1234"
    monkeypatch.delenv("UNSEEN_COMMIT")
    assert run(*flags("neither", 1)) == 0 and stored("neither")["commit"] == ""


def test_preset_and_what_overrides_it():
    for name, more in (("a", ()), ("b", ("--preset", "cpu")), ("c", ("--num-envs", 2))):
        preset = () if name == "a" else ("--preset", "cpu")
        assert run(*flags(name, 4, *preset, *(more if name == "c" else ()))) == 0
    values = [(stored(x)["num_envs"], stored(x)["learning_rate"]) for x in "abc"]
    assert values == [(4, 0.1), (8, 0.2), (2, 0.2)]
    # What it sets where a flag has some value, and what overrides that.
    assert run(*flags("d", 4, "--preset", "cpu", "--poison", "inf")) == 0
    assert run(*flags("e", 4, "--preset", "cpu", "--poison", "inf", "--num-envs", 3)) == 0
    assert run(*flags("f", 4, "--poison", "inf")) == 0
    names = ("num_envs", "learning_rate", "buffer_size")
    found = [tuple(stored(x)[name] for name in names) for x in "def"]
    assert found == [(6, 0.2, 50), (3, 0.2, 50), (4, 0.1, 1000)]


def test_a_resumed_run_keeps_its_own():
    assert run(*flags("run", 2, "--preset", "cpu", "--no-use-replay", "--arms", "x", "y")) == 0
    assert run(*resume("run", 6)) == 0
    assert index("run")[0]["timesteps"] == 24
    # Typed once more, as it is, and what may differ.
    again = ("--num-envs", 8, "--no-use-replay", "--arms", "x", "y", "--preset", "cpu")
    assert run(*resume("run", 8, *again, "--pause", 0.001, "--log-every", 16)) == 0


def test_a_resumed_run_tells_what_changed():
    """In args.json, once for each time that something did; the flags it began with stay there."""
    assert run(*flags("run", 2, "--final-episodes", 4)) == 0
    began = json.loads(Path("run/args.json").read_text())
    assert run(*resume("run", 6, "--final-episodes", 3)) == 0
    assert run(*resume("run", 6)) == 0  # with the flags of the checkpoint: nothing changed
    assert run(*resume("run", 8, "--final-episodes", 2, "--log-every", 16)) == 0
    found = json.loads(Path("run/args.json").read_text())
    third = {"timesteps": 24, "total_timesteps": 32, "final_episodes": 2, "log_every": 16}
    second = {"timesteps": 8, "total_timesteps": 24, "final_episodes": 3}
    assert found.pop("resumed") == [second, third] and found == began
    latest = harness.latest_args(began | {"resumed": [second, third]})
    assert (latest["final_episodes"], latest["seed"]) == (2, began["seed"])


def test_a_resumed_run_tells_of_another_machine():
    """The same flags, but the device that auto stands for, a package and the commit are others."""
    assert run(*flags("run", 2)) == 0
    path = Path("run/args.json")
    here = json.loads(path.read_text())
    there = {"resolved": here["resolved"] | {"device": "cuda:0"}, "commit": "0123456"}
    there["packages"] = here["packages"] | {"numpy": "1.0"}
    path.write_text(json.dumps(here | there))
    assert run(*resume("run", 4)) == 0
    found = json.loads(path.read_text())
    changed = {name: here[name] for name in there} | {"timesteps": 8, "total_timesteps": 16}
    assert found.pop("resumed") == [changed]
    assert found == here | there, "what it began with stays"


def test_a_run_goes_on_without_its_args():
    """A file that is damaged tells no more, and is left as it is."""
    assert run(*flags("run", 2)) == 0
    Path("run/args.json").write_text("{")
    assert run(*resume("run", 4)) == 0
    assert Path("run/args.json").read_text() == "{"


REFUSED = {  # what is typed with --resume: what the sentence names
    "--seed 2": "--seed is 1",
    "--num-envs 8": "--num-envs is 4",
    "--use-replay": "--use-replay is False",
    "--arms num_envs": "--arms is not set",
    "--preset cpu": "--preset is paper",
    "--run-dir elsewhere": "--run-dir",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_may_not_differ(typed, capfd):
    assert run(*flags("run", 2, "--no-use-replay", "--arms")) == 0
    capfd.readouterr()
    assert run(*resume("run", 4, *typed.split())) == 2
    error = only_error(capfd.readouterr().err)
    assert REFUSED[typed] in error
    assert not Path("elsewhere").exists()


def test_a_value_that_is_also_a_flags_name():
    """It is a value: nothing else changes by it."""
    assert run(*flags("run", 2, "--arms", "pause", "scale", "--scale", 2)) == 0
    assert run(*resume("run", 4, "--wandb-project", "scale")) == 0
    assert index("run")[0]["timesteps"] == 4 * PULLS


WRONG = {  # what is typed: what the message names; in one sentence unless tyro says it
    "--num-envs 0": "--num-envs 0",
    "--num-envs -1": "--num-envs -1",
    "--num-envs 1.5": "--num-envs",
    "--num-envs 99999999999999999999999": "--num-envs",
    "--buffer-size 999999999999": "memory",
    "--buffer-size 99999999999999999": "--buffer-size",
    "--learning-rate nan": "--learning-rate nan",
    "--learning-rate inf": "--learning-rate inf",
    "--seed 4294967296": "--seed",
    "--device gpu": "--device gpu",
    "--device cuda:x": "--device cuda:x",
    "--num-env 3": "--num-envs",
    "--num-envs 8 --buffer-size 4": "--num-envs exceeds --buffer-size",
    "--resume=": "--resume has an empty value",
    "--eval-only=": "--eval-only has an empty value",
    "--run-dir=": "--run-dir has an empty value",
    "--wandb-mode offline": "--wandb-mode needs --track",
    "--wandb_mode=offline": "--wandb-mode needs --track",
    "--run-dir run.pt/": "--run-dir is a directory",
    "--resume nowhere": "There is no nowhere: it should be a run directory",
    "--eval-only nowhere": "There is no nowhere: it should be a run directory",
    "--resume a --eval-only b": "exclude each other",
    "--wandb-mode later": "--wandb-mode",
    "--no-pause": "--no-pause",
    "word": "word",
    "--run-dir /proc/nobody/run": "cannot be made",
    "--preset gpu": "--preset",
}


@pytest.mark.parametrize("typed", WRONG)
def test_wrong(typed, tmp_path, capfd):
    code = run(*typed.split())
    _, err = capfd.readouterr()
    assert code == (1 if "memory" in WRONG[typed] else 2)
    assert WRONG[typed] in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    if "╭" not in err:
        only_error(err)


def test_an_evaluation_plays_its_own_number_of_episodes(capfd):
    assert run(*flags("run", 1, "--final-episodes", 1)) == 0
    capfd.readouterr()
    for words in (["--eval-episodes=3"], ["--eval_episodes", "3"]):
        assert run("--eval-only", "run", *words) == 2
        assert "--eval-only plays --final-episodes" in only_error(capfd.readouterr().err)


def test_tracking_is_of_training(capfd):
    """An evaluation alone logs nothing there; a tracked run can be evaluated."""
    assert run(*flags("run", 1, "--final-episodes", 1)) == 0
    assert run("--eval-only", "run", "--track") == 2
    assert "--track logs training" in only_error(capfd.readouterr().err)
    change_newest("run", lambda state: state["args"].update(track=True))
    assert run("--eval-only", "run") == 0


def test_tracking_without_its_package(tmp_path, monkeypatch, capfd):
    """requirements.txt alone trains, and does not have it."""
    monkeypatch.setattr(harness, "has_wandb", lambda: False)
    assert run(*flags("run", 1, "--track")) == 2
    assert "--track needs requirements-wandb.txt" in only_error(capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_several_processes_that_nobody_brings_together(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert run(*flags("run", 1)) == 2
    assert "WORLD_SIZE is set, but not by torchrun" in only_error(capfd.readouterr().err)


def test_a_rank_alone_is_one_process(monkeypatch):
    """Some schedulers set RANK: without WORLD_SIZE it must not keep the run from saving."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run(*flags("run", 1)) == 0
    assert Path("run/summary.json").exists() and index("run")


def test_a_directory_that_looks_like_a_checkpoint(tmp_path, capfd):
    assert run(*flags("run.pt", 1)) == 2
    assert "--run-dir is a directory: .pt is for chec" in only_error(capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed(closed):
    """As a daemon starts programs: the run says nothing there, and ends as it should."""
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, learner.__file__]
    done = subprocess.run([*line, *flags("run", 2)], capture_output=True, text=True)
    assert done.returncode == 0 and Path("run/summary.json").exists()
    assert done.stderr == "" or "2>&-" not in closed
    assert "Traceback" not in done.stderr


def test_a_directory_has_one_runs_evaluation(capfd):
    """Else tables would read the episodes of two runs as those of the one named last."""
    for name in ("run", "other"):
        assert run(*flags(name, 1, "--final-episodes", 1)) == 0
    for _ in range(2):  # the same evaluation may be repeated
        assert run("--eval-only", "run", "--final-episodes", 1, "--run-dir", "again") == 0
    before = Path("again/args.json").read_bytes()
    sentence = "again holds an evaluation of run: name another directory."
    for argv in (["--eval-only", "other", "--run-dir", "again"], flags("again", 1)):
        capfd.readouterr()
        assert run(*argv) == 2
        assert sentence in only_error(capfd.readouterr().err)
    assert Path("again/args.json").read_bytes() == before


def test_empty_word(tmp_path, capfd):
    """As a shell hands over an unset variable in quotes."""
    assert run("--resume", "") == 2
    assert "--resume has an empty value" in only_error(capfd.readouterr().err)
    assert run(*flags("run", 2), "--seed", "1", "") == 2
    assert "An argument has an empty value" in only_error(capfd.readouterr().err)


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is one here")
def test_no_cuda_device(capfd):
    for device in ("cuda", "cuda:1"):
        assert run("--device", device) == 2
        assert f"--device {device}" in only_error(capfd.readouterr().err)


def test_a_fork_that_no_commit_has_is_dirty(tmp_path, monkeypatch):
    """The usual fork is a copy that git does not track."""
    mine = tmp_path / "mine.py"
    for text in ("import harness\n", "class Args(harness.RunArgs):\n    pass\n"):
        with mine.open("a") as file:
            file.write(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "begin"]):
        subprocess.run([*git, *words], check=True)
    spec = importlib.util.spec_from_file_location("mine", mine)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    spec.loader.exec_module(module)
    about = harness.describe_run(module.Args(), {})
    assert about["commit"].endswith("-dirty")
    assert about["script_sha256"] == harness.sha256_of(mine)
    for words in (["add", "mine.py"], ["commit", "-q", "-m", "mine"]):
        subprocess.run([*git, *words], check=True)
    commit = harness.describe_run(module.Args(), {})["commit"]
    assert commit and not commit.endswith("-dirty")


def test_a_script_that_has_changed_is_noted(capfd):
    """When a run goes on; both states of the script are in args.json."""
    assert run(*flags("run", 2)) == 0
    about = stored("run")
    assert about["script_sha256"] == harness.sha256_of(Path(learner.__file__))
    Path("run/args.json").write_text(json.dumps(about | {"script_sha256": "another"}))
    capfd.readouterr()
    assert run(*resume("run", 4)) == 0
    assert f"note: {learner.__file__} has changed since this run" in capfd.readouterr().out
    assert stored("run")["resumed"][0]["script_sha256"] == about["script_sha256"]
    assert run(*resume("run", 6)) == 0
    assert "has changed" not in capfd.readouterr().out


def test_where_a_run_is_and_how_it_goes_on(capfd):
    assert run(*flags("run", 2)) == 0
    assert capfd.readouterr().out.startswith("run, step 0: training begins\n")
    assert run(*resume("run", 4)) == 0
    assert capfd.readouterr().out.startswith("run, step 8: training goes on\n")


def test_a_flag_that_is_newer_than_the_run():
    """--resume takes it if it is typed, and keeps it from then on."""
    assert run(*flags("run", 2)) == 0
    change_newest("run", lambda state: state["args"].pop("scale"))
    assert run(*resume("run", 4)) == 2
    assert run(*resume("run", 4, "--scale", "0.25")) == 0
    assert stored("run")["resumed"][0]["scale"] == 0.25
    assert run(*resume("run", 6)) == 0 and states("run")[0]["args"]["scale"] == 0.25
    assert run(*resume("run", 8, "--scale", "0.5")) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda net: {f"old.{name}": x for name, x in net.items()},
            'Missing key(s) in state_dict: "',
        ),
        (lambda net: {name: torch.cat((x, x)) for name, x in net.items()}, "size mismatch for "),
    ],
)
def test_what_does_not_fit_is_named(change, sentence, capfd):
    assert run(*flags("run", 2)) == 0

    def other(state):
        state["agent"]["actor"] = change(state["agent"]["actor"])

    change_newest("run", other)
    assert run(*resume("run", 4)) == 2
    error = only_error(capfd.readouterr().err)
    assert "run does not fit this script's networks: " in error and sentence in error


def test_another_scripts_run_and_another_versions(capfd):
    assert run(*flags("run", 2)) == 0
    import harness

    import torch

    for change, word in (
        ({"script": "other"}, "other.py"),
        ({"script": "learner", "args": {"seed": 1}}, "version of learner.py that had no --arms, "),
    ):
        path = Path("run/checkpoint-8.pt")
        torch.save(torch.load(path, weights_only=True) | change, path)
        entries = index("run")
        entries[0]["sha256"] = harness.sha256_of(path)
        Path("run/checkpoints.json").write_text(json.dumps(entries))
        capfd.readouterr()
        assert run(*resume("run", 4)) == 2
        assert word in only_error(capfd.readouterr().err)


def test_a_run_from_before_a_flag_of_all_scripts():
    """Goes on with the flag's default, and can change it."""
    assert run(*flags("run", 2)) == 0
    import harness

    import torch

    path = Path("run/checkpoint-8.pt")
    state = torch.load(path, weights_only=True)
    assert state["args"].pop("tf32") is False
    torch.save(state, path)
    entries = index("run")
    entries[0]["sha256"] = harness.sha256_of(path)
    Path("run/checkpoints.json").write_text(json.dumps(entries))
    assert run(*resume("run", 4)) == 0
    assert torch.load("run/checkpoint-16.pt", weights_only=True)["args"]["tf32"] is False
    assert run(*resume("run", 6), "--tf32") == 0
    assert torch.load("run/checkpoint-24.pt", weights_only=True)["args"]["tf32"] is True


def test_help_needs_no_torch():
    """It names every flag with its comment, before what is slow to import."""
    line = [sys.executable, "-X", "importtime", learner.__file__, "--help"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0
    imported = {x.split("|")[-1].strip() for x in done.stderr.splitlines() if "import time" in x}
    assert not imported & {"torch", "wandb", "numpy", "tensorboard"} and "tyro" in imported
    text = " ".join(word for word in done.stdout.split() if word != "│")
    for words in ("--total-timesteps", "pulls of all worlds", "fixes all that is drawn", "--seed"):
        assert words in text
    assert "--use-replay, --no-use-replay" in text and "learn from earlier pulls, too" in text


@pytest.mark.parametrize("path", ["mipi_refil_smac.py", "experiments/claims.py"])
def test_a_reader_of_help_that_leaves(path):
    """`--help | head -1` ends without a traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    line = [sys.executable, str(ROOT / path), "--help"]
    done = subprocess.run(line, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "command",
    ["mipi_refil_smac.py --help", "experiments/runs.py show docs/data/study_chicken_k_d.csv"],
)
def test_output_to_a_full_disk(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with open("/dev/full", "w") as full:
        line = [sys.executable, *command.split()]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    sentence = "error: what this command writes: no space left on device.\n"
    assert (done.returncode, done.stderr) == (1, sentence)


def test_help_in_process(capfd):
    assert run("--help") == 0
    assert "pulls of all worlds" in capfd.readouterr().out


def test_ctrl_c_in_a_call_of_numba(monkeypatch, capfd):
    """What numba makes of it; an error of numba's own stays one."""

    def stop(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error

    def fail(args):
        raise SystemError("bad argument") from ValueError()

    monkeypatch.setattr(learner, "train", stop)
    assert run() == 130 and not capfd.readouterr().err
    monkeypatch.setattr(learner, "train", fail)
    with pytest.raises(SystemError):
        run()
