"""The command line of both scripts: what is wrong gets one sentence and leaves nothing behind."""

import ast
import dataclasses
import functools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import typing

import pytest
import torch
from runs import BIDIST, BOTH, MAPPO, ROOT, STEPS, command, metrics, only_error, script, tiny


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished toy runs of both scripts, and one that claims to be of another substrate."""
    folder = tmp_path_factory.mktemp("runs")
    for name in BOTH:
        assert script(name).main(tiny(name, folder / name, 1)) == 0
        state, _ = script(name).load_checkpoint(str(folder / name))
        state["args"]["substrate"] = "coins"
        (folder / f"{name}-coins").mkdir()
        script(name).save_checkpoint(folder / f"{name}-coins", state)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


def contents(*folders):
    return {
        path: path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))
    }


# Wrong in both scripts, with words that the sentence has to contain. {runs}/{name}: a finished run.
WRONG = {
    # one flag
    "--num-envs -1": "--num-envs",
    "--num-envs 0": "--num-envs",
    "--num-envs x": "--num-envs 'x'",
    "--num-envs 1.5": "--num-envs '1.5'",
    "--num-envs": "value --num-envs",
    "--seed -1": "--seed",
    "--seed 99999999999999999999999": "--seed",
    "--total-timesteps 0": "--total-timesteps",
    "--rollout-steps 0": "--rollout-steps",
    "--chunk-length 0": "--chunk-length",
    "--minibatches 0": "--minibatches",
    "--save-every -5": "--save-every",
    "--max-episode-steps -1": "--max-episode-steps",
    "--num-threads 0": "--num-threads",
    "--num-workers -1": "--num-workers",
    "--num-focal -1": "--num-focal",
    "--worker-timeout inf": "--worker-timeout inf",
    "--worker-timeout 0": "--worker-timeout",
    "--wandb-timeout nan": "--wandb-timeout nan",
    "--gamma nan": "--gamma nan",
    "--gamma 1.01": "--gamma 1.01",
    "--gamma point-nine": "--gamma 'point-nine'",
    "--gae-lambda -0.5": "--gae-lambda",
    "--clip -0.1": "--clip -0.1",
    "--clip inf": "--clip inf",
    "--actor-lr nan": "--actor-lr nan",
    "--actor-lr -1e-3": "--actor-lr",
    "--critic-lr inf": "--critic-lr inf",
    "--adam-eps 0": "--adam-eps",
    "--huber-delta 0": "--huber-delta",
    "--max-grad-norm 0": "--max-grad-norm",
    "--wandb-mode both": "--wandb-mode 'both' online offline",
    "--device tpu": "--device 'tpu' auto cpu cuda",
    "--eval-ids": "--eval-ids",
    "--num-envz 3": "--num-envz --num-envs?",
    "--gama 0.9": "--gama --gamma?",
    "--nonsense": "--nonsense",
    "stray": "stray",
    "--track yes": "yes",
    # worlds
    "--substrate coin": "'coin' coins",
    "--substrate chicken_in_the_matrix": "chicken_in_the_matrix__repeated",
    "--substrate toys": "toy",
    "--substrate qqqqqq": "'qqqqqq'",
    "--substrate ''": "substrate",
    # combinations
    "--rollout-steps 25": "--rollout-steps --chunk-length",
    "--minibatches 321": "--minibatches 320",
    "{tiny} --num-focal 3": "--num-focal",
    # going on with a run
    "--resume nowhere": "nowhere checkpoint",
    "--resume {runs}/empty": "empty checkpoint",
    "--resume {runs}/file": "file checkpoint",
    "--resume {runs}/{name} --run-dir other": "--resume --run-dir",
    "--resume {runs}/{name} --eval-only {runs}/{name}": "--resume --eval-only",
    "--resume {runs}/{name} --gamma 0.5": "--gamma 0.99",
    "--resume {runs}/{name} --seed 2": "--seed 1",
    "--resume {runs}/{name} --num-envs 3": "--num-envs 2",
    "--resume {runs}/{name} --substrate coins": "--substrate toy",
    "--resume {runs}/{name} --total-timesteps -1": "--total-timesteps",
    # evaluating one
    "--eval-only nowhere": "nowhere checkpoint",
    "--eval-only {runs}/empty": "empty checkpoint",
    "--eval-only {runs}/{name}/checkpoint-7.pt": "checkpoint-7.pt",
    "--eval-only {runs}/{name}/args.json": "args.json checkpoint",
    "--eval-only {runs}/{name} --final-episodes 0": "--final-episodes",
    "--eval-only {runs}/{name} --final-episodes 1 --team-reward": "--team-reward",
    "--eval-only {runs}/{name} --final-episodes 1 --num-focal 3": "--num-focal",
    "--eval-only {runs}/{name} --final-episodes 1 --background nobody": "nobody checkpoint",
    "--eval-only {runs}/{name} --final-episodes 1 --background {runs}/empty": "empty checkpoint",
    "--eval-only {runs}/{name} --final-episodes 1 --background {runs}/{name}-coins": "coins toy",
    # where a run is written, and what it plays with in the end
    "{tiny} --run-dir {runs}/{name}": "already --resume",
    "{tiny} --run-dir {runs}/file": "file",
    "{tiny} --run-dir {runs}/file/below": "file/below",
    "{tiny} --background nobody": "nobody checkpoint",
    "{tiny} --background random {runs}/{name}-coins": "coins toy",
}
WRONG_IN_BIDIST = {
    "--p 1.5": "--p 1.5",
    "--p nan": "--p nan",
    "--p word": "--p 'word'",
    "--p-means both": "--p-means 'both'",
    "--k-d -3": "--k-d -3",
    "--k-d 0": "--k-d",
    "--k-d 1e3": "--k-d '1e3'",
    "--kd 5": "--kd --k-d?",
    "--no-revers": "--no-revers --no-reverse?",
    "--dual-clip 1": "--dual-clip",
    "--dual-clip nan": "--dual-clip nan",
    "--distilled-width 0": "--distilled-width",
    "--distilled-width 9": "--distilled-width",
    "--forward-lr -1": "--forward-lr",
    "--noise-std nan": "--noise-std nan",
    "--reverse-mode KL": "--reverse-mode 'KL' kl entropy random noise",
    "--mask-fictitious --all-fictitious": "--mask-fictitious",
    "--mask-fictitious --dual-clip 3": "--mask-fictitious --dual-clip",
    "--mask-fictitious --clip-centre old": "--mask-fictitious --clip-centre",
    "--weight-cap 1 --advantages-per-population": "--weight-cap --clip-centre",
    "--weight-cap 1 --clip-centre old": "--weight-cap --advantages-per-population",
    "--copy-every 1 --distilled-width 0.5": "--copy-every --distilled-width",
    "--all-fictitious --p 0.3": "--all-fictitious --p",
    "--no-reverse --reverse-mode noise": "--no-reverse --reverse-mode",
    "--v-shared --v-redraw episode": "--v-shared --v-redraw",
    "--resume {runs}/{name} --k-d 3": "--k-d 1",
    "--resume {runs}/{name} --no-forward": "--no-forward",
    "--eval-only {runs}/{name} --final-episodes 1 --distilled-width 0.5": "--distilled-width 1.0",
    # a run of the other script
    "--resume {runs}/baselines.mappo_meltingpot": "mappo_meltingpot",
    "--eval-only {runs}/baselines.mappo_meltingpot": "mappo_meltingpot",
}
WRONG_IN_MAPPO = {
    "--k-d 5": "--k-d",
    "--resume {runs}/bidist_mappo_meltingpot": "bidist_mappo_meltingpot",
    "--eval-only {runs}/bidist_mappo_meltingpot": "bidist_mappo_meltingpot",
}
CASES = [(name, line, words) for name in BOTH for line, words in WRONG.items()]
CASES += [(BIDIST, *case) for case in WRONG_IN_BIDIST.items()]
CASES += [(MAPPO, *case) for case in WRONG_IN_MAPPO.items()]


@pytest.mark.parametrize("name, line, words", CASES, ids=[f"{c[0][:6]}:{c[1]}" for c in CASES])
def test_wrong_command_line(name, line, words, runs, tmp_path, capfd):
    check_wrong(name, line, words, runs, tmp_path, capfd)


def check_wrong(name, line, words, runs, tmp_path, capfd):
    few = shlex.join(tiny(name, "run", 1, "--final-episodes", 1))
    argv = shlex.split(line.format(runs=runs, name=name, tiny=few))
    before = contents(tmp_path, runs)
    code = script(name).main(argv)
    out, err = capfd.readouterr()
    sentence = only_error(err)
    assert (code, out) == (2, "")
    assert len(sentence) < 400 and "Error" not in sentence
    assert [word for word in words.split() if word not in sentence] == [], sentence
    assert contents(tmp_path, runs) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("name", BOTH)
def test_cuda_without_cuda(name, runs, tmp_path, capfd):
    check_wrong(name, "{tiny} --device cuda", "--device cuda", runs, tmp_path, capfd)


@pytest.mark.parametrize("name", BOTH)
def test_directory_without_permission(name, runs, tmp_path, capfd):
    """A read-only directory, or for root, whom modes do not stop, one of the kernel's."""
    (tmp_path / "closed").mkdir(mode=0o555)
    try:
        (tmp_path / "closed/probe").touch()
        (tmp_path / "closed/probe").unlink()
        closed = "/proc"
    except PermissionError:
        closed = str(tmp_path / "closed")
    check_wrong(name, f"{{tiny}} --run-dir {closed}/run", f"{closed}/run", runs, tmp_path, capfd)


@pytest.mark.parametrize("name", BOTH)
def test_palette_of_another_game(name, runs, tmp_path, capfd):
    """A checkpoint whose networks do not fit into what its arguments describe."""
    state, _ = script(name).load_checkpoint(str(runs / name))
    weight = state["agent"]["actor"]["out.weight"]
    state["agent"]["actor"]["out.weight"] = weight[:, :-1].clone()
    script(name).save_checkpoint(tmp_path, state)
    for line in (f"--resume {tmp_path}", f"--eval-only {tmp_path} --final-episodes 1"):
        check_wrong(name, line, tmp_path.name, runs, tmp_path, capfd)


WITHOUT_MELTING_POT = """
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name in ("meltingpot", "dmlab2d") else PathFinder.find_spec(name, *rest)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", BOTH)
def test_without_melting_pot(name, tmp_path):
    """--help needs no world; a substrate that is not installed gets the sentence that says how."""
    argv = [sys.executable, "-c", WITHOUT_MELTING_POT, *command(name)[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    run = functools.partial(subprocess.run, env=env, capture_output=True, text=True)
    if name == BIDIST:
        done = run([*argv, "--substrate", "coins"])
        assert done.returncode == 2 and "not installed" in only_error(done.stderr)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run([*argv, "--help"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: the wall's says little on a busy machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    entries = re.split(r"\n\W*(?=--)", done.stdout.replace("│", " "))
    told = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    for field, comment in comments(name).items():
        flag = "--" + field.replace("_", "-")
        assert comment and f" {comment} (default: " in told[flag], flag


def comments(name):
    """The comment behind each field of Args, which tyro shows as its help."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    tree = next(x for x in ast.parse(text).body if getattr(x, "name", "") == "Args")
    fields = [x for x in tree.body if isinstance(x, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(script(name).Args)) > 30
    lines = text.splitlines()
    return {x.target.id: lines[x.end_lineno - 1].partition("  # ")[2] for x in fields}


def another(kind, default):
    """A value that is not the default: what to type, and what is stored."""
    options = typing.get_args(kind)
    if kind is bool:
        return [], not default
    if typing.get_origin(kind) is typing.Literal:
        value = next(x for x in options if x != default)
        return [value], value
    if typing.get_origin(kind) is typing.Annotated:
        return another(options[0], default)
    if type(None) in options:
        return another(next(x for x in options if x is not type(None)), default)
    if kind is int:
        return [str(default + 1)], default + 1
    if kind is float:
        value = 0.5 if default is None else 0.5 * default
        return [str(value)], value
    raise TypeError(kind)


@pytest.mark.parametrize("name", BOTH)
def test_every_flag_arrives_in_args_json(name, tmp_path):
    kinds = typing.get_type_hints(script(name).Args, include_extras=True)
    special = {
        "num_envs": (["3"], 3),
        "total_timesteps": (["40"], 40),
        "run_dir": (["run"], "run"),
        "substrate": (["toy"], "toy"),
        "wandb_project": (["elsewhere"], "elsewhere"),
        "background": (["random", "random"], ["random", "random"]),
        "rollout_steps": (["22"], 22),
        "chunk_length": (["11"], 11),
        "minibatches": (["2"], 2),
        "eval_every": (["0"], 0),
        "final_episodes": (["1"], 1),
        "dual_clip": (["3"], 3.0),
        "clip_centre": (["old"], "old"),
        "weight_cap": (["1"], 1.0),
        "device": (["cpu"], "cpu"),
        "wandb_mode": (["offline"], "offline"),
        "eval_scenarios": (["none"], "none"),
        "bots": (["scripted"], "scripted"),
    }
    fields = [x for x in dataclasses.fields(script(name).Args)]
    typed = {
        x.name: special.get(x.name) or another(kinds[x.name], x.default)
        for x in fields
        if x.name not in ("resume", "eval_only", "track")
    }  # these three: in other tests
    # What goes together, run by run. Two threads on a busy machine are slow: few steps for them.
    fixed = {"run_dir", "substrate", "total_timesteps", "final_episodes", "minibatches"}
    fixed |= {"num_envs", "rollout_steps", "chunk_length"}
    alone = {"all_fictitious", "mask_fictitious", "no_reverse", "v_shared", "num_threads"}
    alone |= {"copy_every"}
    groups = [set(typed) - alone, fixed | {"num_threads"}]
    if name == BIDIST:
        groups += [
            fixed | {"all_fictitious", "no_reverse", "v_shared"},
            fixed | {"mask_fictitious", "copy_every"},
        ]
    for number, group in enumerate(groups):
        argv = []
        for field in sorted(group):
            argv += [f"--{field.replace('_', '-')}", *typed[field][0]]
        typed["run_dir"] = ([f"run{number}"], f"run{number}")
        argv[argv.index("--run-dir") + 1] = f"run{number}"
        assert script(name).main(argv) == 0
        stored = json.loads((tmp_path / f"run{number}/args.json").read_text())
        wrong = {x: stored.get(x) for x in group if stored.get(x) != typed[x][1]}
        assert wrong == {}
        others = [x for x in fields if x.name not in group]
        assert [x.name for x in others if json.dumps(stored[x.name]) != json.dumps(x.default)] == []
    assert set().union(*groups) == set(typed)
    assert {"python", "torch"} & {x.lower() for x in stored["packages"]}


@pytest.mark.parametrize("name", BOTH)
def test_default_run_directory(name, tmp_path):
    argv = tiny(name, "", 1)
    assert script(name).main(argv) == 0
    assert script(name).main(argv) == 0  # a name of its own, in the same second
    stem = name.split(".")[-1]
    for path in (found := list((tmp_path / "runs").iterdir())):
        assert re.fullmatch(rf"toy__{stem}__s1__\d{{8}}T\d{{6}}Z__[0-9a-f]{{4}}", path.name)
        assert metrics(path)[-1]["timesteps"] == STEPS
    assert len(found) == 2 and len(list(tmp_path.iterdir())) == 1
    shutil.rmtree(tmp_path / "runs")
