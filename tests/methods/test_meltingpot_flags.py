"""The command lines of both scripts: what is wrong gets one sentence and leaves nothing behind.
What every script refuses: tests/harness/test_command_line.py."""

import ast
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import typing

from harness import RunArgs

import pytest
from runs import (
    BIDIST,
    BOTH,
    MAPPO,
    OPRE,
    ROOT,
    change_newest,
    command,
    only_error,
    script,
    some_long,
    tiny,
)


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
        shutil.copytree(folder / name, folder / f"{name}-coins")
        change_newest(
            folder / f"{name}-coins", lambda state: state["args"].update(substrate="coins")
        )
    (folder / "empty").mkdir()
    return folder


def contents(*folders):
    return {
        path: path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))
    }


# Wrong in both scripts, with words that the sentence has to contain. {runs}/{name}: a finished run.
WRONG = {
    "--num-envs 0": "--num-envs",
    "--rollout-steps 0": "--rollout-steps",
    "--chunk-length 0": "--chunk-length",
    "--minibatches 0": "--minibatches",
    "--max-episode-steps -1": "--max-episode-steps",
    "--num-workers -1": "--num-workers",
    "--num-focal -1": "--num-focal",
    "--worker-timeout 0": "--worker-timeout",
    "--gamma nan": "--gamma nan",
    "--gae-lambda -0.5": "--gae-lambda",
    "--clip inf": "--clip inf",
    "--actor-lr -1e-3": "--actor-lr",
    "--critic-lr inf": "--critic-lr inf",
    "--adam-eps 0": "--adam-eps",
    "--huber-delta 0": "--huber-delta",
    "--max-grad-norm 0": "--max-grad-norm",
    # worlds
    "--substrate coin": "'coin' coins",
    "--substrate chicken_in_the_matrix": "chicken_in_the_matrix__repeated",
    "--substrate toys": "toy",
    "--substrate qqqqqq": "'qqqqqq'",
    "--substrate coins_0": "coins_0 is a scenario: --substrate coins --eval-scenarios SC0",
    "--substrate ''": "substrate",
    # combinations
    "--rollout-steps 25": "--rollout-steps --chunk-length",
    "--minibatches 321": "--minibatches 320",
    "{tiny} --num-focal 3": "--num-focal",
    # going on with a run, or evaluating one
    "--resume {runs}/{name} --gamma 0.5": "--gamma 0.99",
    "--resume {runs}/{name} --num-envs 3": "--num-envs 2",
    "--resume {runs}/{name} --substrate coins": "--substrate toy",
    "--eval-only {runs}/{name} --final-episodes 1 --team-reward": "--team-reward",
    "--eval-only {runs}/{name} --final-episodes 1 --num-focal 3": "--num-focal",
    "--eval-only {runs}/{name} --final-episodes 1 --background nobody": "nobody checkpoint",
    "--eval-only {runs}/{name} --final-episodes 1 --background {runs}/empty": "empty checkpoint",
    "--eval-only {runs}/{name} --final-episodes 1 --background {runs}/{name}-coins": "coins toy",
    "{tiny} --background nobody": "nobody checkpoint",
    "{tiny} --background random {runs}/{name}-coins": "coins toy",
}
WRONG_IN_BIDIST = {
    "--k-d 4 --total-timesteps 9600": "--k-d 12,800 9,600",
    "--no-forward --k-d 3 --total-timesteps 9999": "--k-d 19,200 9,999",
    "--reverse-mode noise --k-d 2 --total-timesteps 9600": "--k-d --reverse-mode 12,800 9,600",
    "--copy-every 4 --total-timesteps 9600": "--copy-every 12,800 9,600",
    "--copy-every 1 --reverse-mode noise": "--copy-every --reverse-mode",
    "--p 1.5": "--p 1.5",
    "--k-d 0": "--k-d",
    "--weight-cap 0": "--weight-cap",
    "--weight-cap 0.9 --advantages-per-population": "--weight-cap",
    "--distilled-width 0": "--distilled-width",
    "--distilled-width 9": "--distilled-width",
    "--forward-lr -1": "--forward-lr",
    "--noise-std nan": "--noise-std nan",
    "--mask-fictitious --all-fictitious": "--mask-fictitious",
    "--weight-cap 1 --clip-centre printed": "--weight-cap --clip-centre",
    "--weight-cap 1": "--weight-cap --advantages-per-population",
    "--copy-every 1 --distilled-width 0.5": "--copy-every --distilled-width",
    "--copy-every 1 --reverse-lr 1e-3 --no-forward": "--copy-every --reverse-lr --forward",
    "--copy-every 1 --noise-std 0.5": "--copy-every --noise-std",
    "--copy-every 1 --forward-epochs 9": "--copy-every --forward-epochs",
    "--all-fictitious --p 0.3": "--all-fictitious --p",
    "--p 0 --advantages-per-population --weight-cap 2": "--p --weight-cap --advantages-per",
    "--p 0 --v-redraw episode --mask-fictitious": "--p --v-redraw --mask-fictitious",
    "--all-fictitious --v-redraw episode": "--all-fictitious --v-redraw",
    "--all-fictitious --advantages-per-population": "--all-fictitious --advantages-per",
    "--copy-every 2 --k-d 3": "--copy-every --k-d",
    "--mask-fictitious --advantages-per-population --weight-cap 2": "--weight-cap",
    "--no-reverse --reverse-mode noise": "--no-reverse --reverse-mode",
    "--noise-std 0.5": "--reverse-mode --noise-std",
    "--resume {runs}/{name} --k-d 3": "--k-d 1",
    "--resume {runs}/{name} --no-forward": "--forward",
    "--eval-only {runs}/{name} --final-episodes 1 --distilled-width 0.5": "--distilled-width 1.0",
    # a run of the other script
    "--resume {runs}/baselines.mappo_meltingpot": "mappo_meltingpot",
    "--eval-only {runs}/baselines.mappo_meltingpot": "mappo_meltingpot",
}
WRONG_IN_MAPPO = {
    "--resume {runs}/bidist_mappo_meltingpot": "bidist_mappo_meltingpot",
    "--eval-only {runs}/bidist_mappo_meltingpot": "bidist_mappo_meltingpot",
}
OTHERS = ("randnet", "opre", "pp", "rpm")
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


def test_a_reverse_phase_that_diverges(tmp_path, capfd):
    """Eq. (8) has no bound: the phase itself ends the run, by name, and nothing of it is logged."""
    run = tmp_path / "run"
    diverges = ("--k-d", 1, "--reverse-lr", 1e30)
    assert script(BIDIST).main([str(x) for x in tiny(BIDIST, run, 3, *diverges)]) == 1
    assert "reverse/kl_after is not finite" in only_error(capfd.readouterr().err)
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_a_run_past_its_first_phase_may_end_at_once(tmp_path, monkeypatch):
    """--resume asks for no phase: the steps that it names may be over."""
    argv = tiny(BIDIST, tmp_path / "run", 2, "--k-d", 2, "--final-episodes", 0)
    assert script(BIDIST).main([str(x) for x in argv]) == 0
    seen = []
    monkeypatch.setattr(script(BIDIST), "train", lambda args: seen.append(args) or 0)
    again = ["--resume", str(tmp_path / "run"), "--total-timesteps", "1", "--final-episodes", "1"]
    assert script(BIDIST).main(again) == 0 and seen[0].total_timesteps == 1


def test_flags_of_the_method_are_the_childs_alone(capfd):
    """tyro's own message, and nothing else happens."""
    assert script(MAPPO).main(["--k-d", "5"]) == 2
    assert "--k-d" in capfd.readouterr().err


@pytest.mark.parametrize("name", BOTH)
def test_palette_of_another_game(name, runs, tmp_path, capfd):
    """A checkpoint whose networks do not fit into what its arguments describe."""

    def cut(state):
        actor = state["agent"]["actor"]
        actor["out.weight"] = actor["out.weight"][:, :-1].clone()

    shutil.copytree(runs / name, "other")
    change_newest("other", cut)
    for line in ("--resume other", "--eval-only other --final-episodes 1"):
        check_wrong(name, line, "other", runs, tmp_path, capfd)


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


@pytest.mark.parametrize("name", some_long([*BOTH, OPRE], *BOTH))
def test_without_melting_pot(name, tmp_path):
    """--help needs no world; a substrate that is not installed gets the sentence that says how."""
    argv = [sys.executable, "-c", WITHOUT_MELTING_POT, *command(name)[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    run = functools.partial(subprocess.run, env=env, capture_output=True, text=True)
    if name == BIDIST:
        done = run([*argv, "--substrate", "coins"])
        assert done.returncode == 2 and "not installed" in only_error(done.stderr)

    done = run([*argv, "--help"])
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    entries = re.split(r"\n\W*(?=--)", done.stdout.replace("│", " "))
    told = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}
    for field, comment in comments(name).items():
        flag = "--" + field.replace("_", "-")
        assert comment and f" {comment} (default: " in told[flag], flag


def comments(name):
    """The comment behind each of the script's own flags, which tyro shows as its help."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    tree = next(x for x in ast.parse(text).body if getattr(x, "name", "") == "Args")
    fields = [x for x in tree.body if isinstance(x, ast.AnnAssign)]
    assert len(fields) > 20
    lines = text.splitlines()
    return {x.target.id: lines[x.end_lineno - 1].partition("  # ")[2] for x in fields}


def another(kind, default):
    """A value that is not the default: what to type, and what is stored."""
    options = typing.get_args(kind)
    if kind is bool:
        return "no" if default else "", not default
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


@pytest.mark.parametrize("name", some_long([*BOTH, OPRE], *BOTH))
def test_every_flag_arrives_in_args_json(name, tmp_path):
    kinds = typing.get_type_hints(script(name).Args, include_extras=True)
    special = {
        "num_envs": (["3"], 3),
        "substrate": (["toy"], "toy"),
        "background": (["random", "random"], ["random", "random"]),
        "rollout_steps": (["22"], 22),
        "chunk_length": (["11"], 11),
        "minibatches": (["2"], 2),
        "k_d": (["1"], 1),
        "clip_centre": (["printed"], "printed"),
        "reverse_mode": (["noise"], "noise"),
        "weight_cap": (["1"], 1.0),
        "eval_scenarios": (["none"], "none"),
        "bots": (["scripted"], "scripted"),
    }
    own = dataclasses.fields(script(name).Args)[len(dataclasses.fields(RunArgs)) :]
    typed = {x.name: special.get(x.name) or another(kinds[x.name], x.default) for x in own}
    # What goes together, run by run.
    fixed = {"substrate", "minibatches", "num_envs", "rollout_steps", "chunk_length", "k_d"}
    alone = {"all_fictitious", "mask_fictitious", "copy_every", "clip_centre"}
    alone |= {"forward", "reverse", "reverse_mode", "noise_std"}
    groups = [set(typed) - alone]
    if name == BIDIST:
        groups += [
            fixed | {"all_fictitious", "reverse"},
            fixed - {"k_d"} | {"mask_fictitious", "copy_every", "clip_centre"},
            fixed | {"forward", "reverse_mode", "noise_std"},
        ]
    for number, group in enumerate(groups):
        argv = ["--run-dir", f"run{number}", "--total-timesteps", "132", "--final-episodes", "1"]
        for field in sorted(group):
            words, _ = typed[field]
            flag = field.replace("_", "-")
            argv += (
                [f"--{words}-{flag}".replace("---", "--")]
                if isinstance(words, str)
                else [f"--{flag}", *words]
            )
        assert script(name).main(argv) == 0
        stored = json.loads((tmp_path / f"run{number}/args.json").read_text())
        wrong = {x: stored.get(x) for x in group if stored.get(x) != typed[x][1]}
        assert wrong == {}
        others = [x for x in own if x.name not in group]
        assert [x.name for x in others if json.dumps(stored[x.name]) != json.dumps(x.default)] == []
    assert set().union(*groups) == set(typed)


@pytest.mark.parametrize("name", (*BOTH, *(f"baselines.{x}_meltingpot" for x in OTHERS)))
def test_the_preset_for_two_cores(name):
    """The paper's batch from more worlds; other flags override it."""
    paper, cpu = script(name).parse([]), script(name).parse(["--preset", "cpu"])
    assert (cpu.num_envs, cpu.rollout_steps, cpu.num_threads) == (64, 50, 2)
    assert cpu.num_envs * cpu.rollout_steps == paper.num_envs * paper.rollout_steps
    same = ("preset", "num_envs", "rollout_steps", "num_threads")
    for field in dataclasses.fields(paper):
        if field.name not in same:
            assert getattr(cpu, field.name) == getattr(paper, field.name), field.name
    assert script(name).parse(["--preset", "cpu", "--num-envs", "8"]).num_envs == 8
