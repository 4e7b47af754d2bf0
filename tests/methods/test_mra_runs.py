"""maddpg_particle.py and mra_maddpg_particle.py as wholes: one from the other, flags, resuming,
adapting, evaluating, learning."""

import dataclasses
import difflib
import functools
import itertools
import json
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import harness

import numpy as np
import pytest
import torch
from particle_tools import (
    BOTH,
    EPC,
    MAAC,
    MADDPG,
    MRA,
    RL2,
    ROOT,
    collectors,
    differences,
    index,
    initial,
    metrics,
    nets,
    newest,
    parse,
    read,
    replays,
    resuming,
    run,
    script,
    tiny,
)
from runs import some_long

from envs.particle import episodes, kernels, pairs
from envs.particle.episodes import play

VISIT = 20 * 4  # environment steps of a tiny run's visit to a population


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Listing the installed packages for args.json takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "distributions", lambda: [])
        yield


def adapting(source, run_dir, steps, *flags):
    """The command line of an adaptation to four agents; most flags are the source's."""
    argv = ("--adapt", source, "--population", 4, "--final-episodes", 0, "--save-every", 0)
    argv += ("--eval-every", 0, "--eval-episodes", 2, "--log-every", 1000000)
    return [str(x) for x in (*argv, "--total-timesteps", steps, "--run-dir", run_dir, *flags)]


def contents(*folders):
    files = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.stat().st_mtime_ns for path in files if path.name != "lock"}


def newest_of(run_dir):
    """The newest checkpoint, with its arguments."""
    return read(run_dir / index(run_dir)[0]["name"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of both scripts, in which nothing changes, and what is none."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--no-shaping", "--max-grad-norm", 5, "--seed", 3]
    run(MRA, folder / "mra", 2 * VISIT + 20, *flags, "--save-every", VISIT)
    run(MRA, folder / "agents", 40, "--no-share-parameters", "--populations", 3)
    run(MRA, folder / "pacman", 80, "--task", "pacman", "--populations", "2,1", "1,2")
    told = ["--task", "pacman", "--populations", "4,2", "2,4", "--tell-population", "critic"]
    run(MRA, folder / "told", 4, *told)
    run(MADDPG, folder / "maddpg", 40)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


# --- The diff is the paper ------------------------------------------------------------------------


def lines(name):
    return (ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()


def test_diff_of_the_two_files_is_the_method():
    """45 % elsewhere. MRA keeps each form beyond Algorithm 4 of docs/mra_ladder.md as a flag, also
    those that lost, so that every row of that page can be run again."""
    parent, child, added, gone = lines(MADDPG), lines(MRA), 0, 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.50 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


def blocks(path):
    """What stands between `# [shared: NAME] begin` and `end`: {name: text}."""
    pattern = r"# \[shared: (\w+)\] begin\n(.*?)# \[shared: \1\] end"
    return dict(re.findall(pattern, path.read_text(), re.DOTALL))


def test_shared_blocks_are_alike():
    """Byte for byte, but that MRA's graph has several heads."""
    child, parent = (blocks(ROOT / f"{name.replace('.', '/')}.py") for name in BOTH)
    assert parent.pop("relation_graph")
    assert child == parent and set(child) >= {"make_envs", "layers", "sample", "losses"}


ALIKE = [  # of --actor-gradient and --share-parameters all pairs
    ("gumbel", True, "--target polyak --polyak .1 --inner-steps 2", "treasure", "3"),
    ("gumbel", False, "--target hard --inner-steps 1 --plain", "treasure", "3"),
    ("expectation", False, "--target hard --inner-steps 3", "pacman", "2,1"),
    ("expectation", True, "--target polyak --no-scale-rewards", "pacman", "2,1"),
]


@pytest.mark.parametrize("actor, shared, flags, task, population", ALIKE)
def test_without_its_method_mra_is_maddpg(actor, shared, flags, task, population):
    """One population, one z, shared flags alike: the same bits after six updates."""
    flags = [*flags.split(), "--actor-gradient", actor, "--task", task]
    share = "--share-parameters" if shared else "--no-share-parameters"
    parent = run(MADDPG, "parent", 120, *flags, share, "--population", population)
    child = [*flags, share, "--populations", population]
    off = run(MRA, "off", 120, *child, "--latent-size", 1, "--phi-gradient", "actor")
    steps = parent["agent"]["critic_optimiser"]["state"][0]["step"]
    assert steps >= 3 and steps % 6 == 0
    assert set(parent["agent"]) == set(off["agent"])
    expected = {"attention", "actor", "critic", "target_actor", "target_critic"}
    assert set(nets(parent)) == expected
    assert differences(parent["agent"], off["agent"]) == []
    assert differences(parent["ranks"][0]["rng"], off["ranks"][0]["rng"]) == []
    (theirs,), (mine,) = collectors(parent), collectors(off)
    assert differences({k: mine[k] for k in theirs}, theirs) == []
    (mine,), (theirs,) = replays("off"), replays("parent")
    assert differences({k: mine[k] for k in theirs}, theirs) == [] and len(mine["z"]) == 120
    # Equal bits would mean little if nothing had moved.
    moved = differences(nets(initial("parent")), nets(parent))
    assert {name.split("/")[1] for name in moved} == expected
    # And with the method they differ: a latent, and a phi that moves by what tells graphs apart.
    on = run(MRA, "on", 120, *child, "--latent-size", 6)
    for name in expected:
        assert differences(on["agent"][name], parent["agent"][name])
    assert differences(initial("on")["agent"]["attention"], on["agent"]["attention"])
    assert (replays("on")[0]["z"] > 0).any() and not (mine["z"] > 0).any()


# --- Same seed, same bits -------------------------------------------------------------------------


@pytest.mark.parametrize("name, flags", [(MADDPG, ()), (MRA, ("--latent-size", 2))])
def test_same_seed_same_bits(name, flags):
    """Another seed changes every weight matrix, every generator, and what is logged."""
    a, b, c = (
        run(name, run_dir, 80, *flags, "--log-every", 40, "--eval-every", 80, "--seed", seed)
        for run_dir, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert differences(a, b) == []
    assert metrics("a") == metrics("b") != metrics("c") and len(metrics("a")) == 3
    changed = differences(a, c)
    rngs = {name for name in a["ranks"][0] if name.endswith("rng")}
    assert {f"/ranks/0/{rng}" for rng in rngs} < set(changed) and "rng" in rngs
    for net, part in nets(a).items():
        weights = {k for k in part if k.endswith("weight")}
        assert weights and {k for k in weights if f"/agent/{net}/{k}" not in changed} == set()


MODES = {
    "maddpg": (MADDPG, ""),
    "maddpg, pacman": (MADDPG, "--task pacman --population 2,1 --target hard --buffer-size 30"),
    "two populations": (MRA, ""),
    "three, replay wraps": (MRA, "--task resource --populations 2 3 4 --buffer-size 30"),
    "pacman, bilinear": (
        MRA,
        "--task pacman --populations 1,2 2,1 --representation bilinear --latent-prior uniform",
    ),
    "adapt": (MRA, "--inner-steps 2"),
}


@pytest.mark.parametrize("mode", some_long(MODES, "maddpg", "three", "pacman"))
def test_resumed_equals_uninterrupted(mode, runs):
    """Stopped twice, within a visit, between two updates and between two lines of the log."""
    name, flags = MODES[mode]
    flags = [*flags.split(), "--log-every", "80"]
    argv = functools.partial(tiny, name)
    if mode == "adapt":
        shutil.copytree(runs / "mra", "source")
        argv = functools.partial(adapting, "source")
    module = script(name)
    assert module.main(argv("whole", 240, *flags)) == 0
    assert module.main(argv("cut", 52, *flags)) == 0
    assert 52 <= newest("cut")["timesteps"] < 60 and 52 % VISIT and 52 % 20
    if mode == "adapt":
        shutil.rmtree("source")  # a run that is resumed needs it no more
    assert module.main(resuming("cut", 164)) == 0
    assert module.main(resuming("cut", 240)) == 0
    whole, cut = newest("whole"), newest("cut")
    assert cut["timesteps"] == 240
    assert differences(whole, cut) == []
    assert differences(replays("whole"), replays("cut")) == []
    assert differences(nets(initial("whole")), nets(whole))
    assert metrics("whole") == metrics("cut") and len(metrics("cut")) == 3
    assert any("episodes" in m for m in metrics("cut"))


@pytest.mark.parametrize("name", BOTH)
def test_looking_at_a_run_changes_nothing(name):
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generators."""
    looks = ("--log-every", 20, "--save-every", 20, "--eval-every", 60, "--final-episodes", 1)
    a, b = run(name, "plain", 120), run(name, "looks", 120, *looks)
    assert len(metrics("looks")) == 6 + 2 + 1
    for state in (a, b):  # since the last line
        state["ranks"][0].pop("noted")
        for collector in collectors(state):
            collector.pop("ended")
    assert differences(a, b) == []
    assert differences(replays("plain"), replays("looks")) == []


# --- Replays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_what_replays_hold(name):
    """Of each population what has been filled, in small rows."""
    run(name, "run", 140, "--save-every", 20, "--buffer-size", 48)
    for entry in index("run"):
        state = read(Path("run") / entry["name"])
        steps = [collector["steps"] for collector in collectors(state)]
        assert sum(steps) == state["timesteps"] in (120, 140)
        for filled, n in zip(replays("run", state["timesteps"]), steps, strict=True):
            columns = {"state", "final_state", "actions", "rewards", "terminated"}
            assert set(filled) - {"z"} == columns and ("z" in filled) == (name == MRA)
            assert {len(x) for x in filled.values()} == {min(n, 48)}
            size = sum(x[0].numel() * x.element_size() for x in filled.values())
            assert size < 1024, "rows are to be small"


def test_a_damaged_replay_is_not_needed_to_evaluate_or_adapt(runs, tmp_path):
    run_dir = Path(shutil.copytree(runs / "mra", tmp_path / "run"))
    for path in run_dir.glob("replay-*.pt"):
        path.unlink()
    assert script(MRA).main(resuming("run", 2000)) == 2
    assert script(MRA).main(["--eval-only", "run", "--final-episodes", "1"]) == 0
    assert script(MRA).main(adapting("run", "adapted", 4)) == 0


@pytest.mark.parametrize("flag", ["--phi-gradient mi", "--reptile-step .5"])
def test_flags_without_a_part_in_adapting(flag, runs, capfd):
    argv = ["--adapt", str(runs / "mra"), "--population", "4", *flag.split()]
    assert script(MRA).main(argv) == 2
    assert flag.split()[0] in only_error(capfd.readouterr().err)


def test_a_value_is_not_taken_for_a_flag(monkeypatch):
    """--target polyak says nothing about --polyak, which stays the source's (or the run's)."""
    run(MRA, "source", 4, "--polyak", 0.05, "--target", "polyak")
    few = ["--adapt", "source", "--population", 4, "--target", "polyak"]
    assert given(MRA, few, monkeypatch).polyak == 0.05
    assert given(MRA, ["--resume", "source", "--target", "polyak"], monkeypatch).polyak == 0.05


def test_adapting_with_another_target(monkeypatch, capfd):
    """--target hard has no use for the source's --polyak, but a typed one would be idle."""
    run(MRA, "source", 4, "--polyak", 0.05, "--target", "polyak")
    few = ["--adapt", "source", "--population", "4", "--target", "hard"]
    assert given(MRA, few, monkeypatch).target == "hard"
    capfd.readouterr()
    assert script(MRA).main([*few, "--polyak", ".3"]) == 2
    assert "--polyak needs --target polyak" in only_error(capfd.readouterr().err)


def test_adapting_compiles_what_its_source_did(monkeypatch):
    """--compile is inherited; it can be typed for a source without it, and taken back."""
    monkeypatch.setattr(pairs, "Compiled", lambda function, *args, **options: function)
    pairs.kernel.cache_clear()
    for source, flag in (("with", "--compile"), ("without", "--no-compile")):
        assert script(MRA).main(tiny(MRA, source, 4, flag)) == 0
        for typed in ("", "--compile", "--no-compile"):
            argv = ["--adapt", source, "--population", 4, *typed.split()]
            assert parse(script(MRA), argv).compile == ((typed or flag) == "--compile")
    pairs.kernel.cache_clear()


@pytest.mark.parametrize("name", BOTH)
def test_freed_memory_is_kept(name):
    """With glibc: pages that the system hands out while tensors of 64 MB come and go, after some
    for which the heap had to grow."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc: nothing is kept there")
    script(name).keep_freed_memory()
    for _ in range(16):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 16,384 pages
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000


# --- Numbers that are none ------------------------------------------------------------------------


def all_finite(x):
    if isinstance(x, dict):
        return all(map(all_finite, x.values()))
    if isinstance(x, (list, tuple)):
        return all(map(all_finite, x))
    return not isinstance(x, torch.Tensor) or bool(torch.isfinite(x).all())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BOTH)
def test_a_poisoned_world(name, wrong, capfd, monkeypatch):
    """A reward that is no number, in the 17th step: the update that comes next ends the run and
    names rewards, no checkpoint holds any of it, and the run can be resumed."""
    module, calls = script(name), []
    world, step = module.ParticleWorld, module.ParticleWorld.step

    def poisoned(self, actions):
        calls.append(1)
        result = step(self, actions)
        if len(calls) == 17:
            result.reward[0, 0] = wrong
        return result

    flags = ("--save-every", 20, "--log-every", 20)
    with monkeypatch.context() as patch:
        patch.setattr(world, "step", poisoned)
        assert module.main(tiny(name, "run", 1000, *flags)) == 1
    assert "rewards" in only_error(capfd.readouterr().err)
    assert len(calls) == 20, "the next update is after the 20th step"
    for entry in index("run"):
        assert all_finite(read(Path("run") / entry["name"]))
        assert all_finite(read(f"run/replay-{entry['timesteps']}.pt"))
    assert index("run")[0]["timesteps"] == 60
    assert module.main(resuming("run", 120)) == 0
    assert differences(newest("run"), run(name, "whole", 120, *flags)) == []


@pytest.mark.parametrize("name", BOTH)
def test_a_poisoned_world_without_updates(name, capfd, monkeypatch):
    """Before there is a minibatch nothing looks at rewards but what is to be saved."""
    module, step = script(name), script(name).ParticleWorld.step

    def poisoned(self, actions):
        result = step(self, actions)
        result.reward[0, 0] = float("nan")
        return result

    monkeypatch.setattr(module.ParticleWorld, "step", poisoned)
    assert module.main(tiny(name, "run", 40, "--batch-size", 500)) == 1
    assert "rewards" in only_error(capfd.readouterr().err)
    assert [entry["timesteps"] for entry in index("run")] == [0]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("flags", ["--log-every 20", "--save-every 20", ""])
def test_diverged(name, flags, capfd):
    """A learning rate that overflows: one sentence, and no checkpoint of what has become."""
    argv = tiny(name, "run", 120, "--learning-rate", 1e37, *flags.split())
    assert script(name).main(argv) == 1
    assert "is not finite" in only_error(capfd.readouterr().err)
    for entry in index("run"):
        assert all_finite(read(Path("run") / entry["name"]))


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # in both scripts, with words that the sentence has to contain
    "--task pirates": "'pirates' treasure resource pacman",
    "--{populations} x": "x",
    "--{populations} 0": "0",
    "--{populations} 3,": "3,",
    "--{populations} 4,2": "treasure 4,2",
    "--task resource --{populations} 4,2": "resource 4,2",
    "--task pacman --{populations} 6": "pacman 6",
    "--task pacman --{populations} 4,0": "4,0",
    "--task pacman --{populations} 4,2,1": "4,2,1",
    "--batch-size 1025 --buffer-size 1024": "--batch-size --buffer-size",
    "--num-envs 65 --buffer-size 64 --batch-size 64": "--num-envs --buffer-size",
    "--target hard --polyak .5": "--polyak --target",
    "--resume {own} --gamma .5": "--gamma 0.95",
    "--resume {own} --task resource": "--task treasure",
    "--resume {other}": "is a run of not of",
    "--eval-only {other}": "is a run of not of",
}
WRONG_IN_MADDPG = {
    "--resume {own} --population 4": "--population 3",
}
WRONG_IN_MRA = {
    "--latent-size 129": "--latent-size 129 128",
    "--latent-size 0": "--latent-size 0",
    "--populations 3 6 3": "--populations twice",
    "--populations 3 03": "population 03",
    "--populations 3 4,2": "treasure 4,2",
    "--task pacman --populations 4,2 6": "pacman 6",
    "--population 4": "--adapt --population",
    "--adapt {runs}/mra": "--adapt --population",
    "--adapt {runs}/mra --population 4 --task resource": "--task treasure",
    "--adapt {runs}/pacman --population 4": "pacman 4",
    "--adapt {runs}/mra --population 4,2": "treasure 4,2",
    "--adapt {runs}/mra --population 0": "0",
    "--adapt {runs}/mra --population x": "x",
    "--adapt {runs}/maddpg --population 4": "is a run of maddpg_particle not of",
    "--adapt {runs}/agents --population 4": "agents parameters per agent",
    "--adapt {runs}/empty --population 4": "empty checkpoint",
    "--adapt nowhere --population 4": "nowhere checkpoint",
    "--adapt {runs}/mra --population 4 --hidden-size 16": "--hidden-size 8",
    "--adapt {runs}/mra --population 4 --key-size 16": "--key-size 4",
    "--adapt {runs}/mra --population 4 --latent-size 2": "--latent-size 6",
    "--adapt {runs}/mra --population 4 --populations 3 6": "--populations",
    "--adapt {runs}/mra --population 4 --representation concat": "--representation option",
    "--adapt {runs}/mra --population 4 --latent-prior uniform": "--latent-prior learned",
    "--adapt {runs}/mra --population 4 --no-share-parameters": "share-parameters",
    "--adapt {runs}/mra --population 4 --buffer-size 10": "--batch-size --buffer-size",
    "--adapt {runs}/mra --population 4 --eval-populations 4,2": "treasure 4,2",
    "--adapt {runs}/mra --population 4 --run-dir {runs}/mra": "holds a run already",
    "--adapt {runs}/mra --population 4 --run-dir {runs}/x.pt": "--run-dir is a directory: .pt is",
    "--resume {own} --adapt {own} --population 4": "stays so; --plain, --compile",
    "--eval-only {own} --adapt {own} --population 4": "stays so",
    "--no-share-parameters": "populations --share-parameters",
    "--no-share-parameters --populations 3 --eval-populations 4": "populations --share-parameters",
    "--resume {runs}/agents --eval-populations 4": "populations --share-parameters",
    "--eval-populations 4,2": "treasure 4,2",
    "--eval-populations 3 x": "x",
    "--eval-only {own} --final-episodes 1 --eval-populations 4,2": "treasure 4,2",
    "--resume {own} --eval-populations 4,2": "treasure 4,2",
    "--resume {own} --populations 3 5 4": "--populations",
    "--resume {own} --latent-size 2": "--latent-size 6",
    "--resume {own} --value-layers 1": "--value-layers 2",
    "--adapt {runs}/mra --population 4 --tell-population all": "--tell-population nobody",
    "--adapt {runs}/mra --population 4 --value-layers 1": "--value-layers 2",
    "--adapt {runs}/mra --population 4 --no-own-beside": "--own-beside True",
    "--adapt {runs}/mra --population 4 --no-psi-information": "--psi-information True",
    "--adapt {runs}/mra --population 4 --phi-gradient both+actor": "--adapt takes actor",
    "--adapt {runs}/mra --population 4 --xi-reads-z": "--xi-reads-z False",
    "--adapt {runs}/mra --population 4 --redraw-z": "--redraw-z False",
    "--adapt {runs}/mra --population 4 --critic-reads-z": "--critic-reads-z False",
    "--adapt {runs}/mra --population 4 --psi-input standardised": "--psi-input tenth",
    "--critic-reads-z --tell-population critic": "--critic-reads-z --tell-population nobody",
    "--adapt {runs}/mra --population 4 --polyak .5": "--polyak --target",
    "--value-layers 3": "--value-layers 3",
    "--latent-prior told --populations 3 4 5 --latent-size 2": "--latent-prior told --latent-size",
    "--latent-prior uniform --psi-input standardised": "--psi-input learned",
    "--latent-prior uniform --psi-entropy 9": "--psi-entropy learned",
    "--adapt {runs}/mra --population 4 --psi-entropy 9": "--psi-entropy 0",
    "--populations 3 --psi-input standardised": "--psi-input learned",
    "--latent-size 1 --psi-input standardised": "--psi-input learned",
    "--latent-prior uniform --phi-gradient mi --xi-reads-z": "--xi-reads-z classifier",
    "--populations 3 --xi-reads-z": "--xi-reads-z classifier",
    "--latent-prior told --redraw-z": "--redraw-z told",
    "--latent-size 1 --redraw-z": "--redraw-z several z",
    "--latent-size 1 --critic-reads-z --phi-gradient actor": "--critic-reads-z several z",
    "--populations 3 --tell-population critic": "--tell-population several --populations",
    "--populations 3 --tell-population all": "--tell-population several --populations",
    "--populations 3 --learn-from all": "--learn-from all needs several",
    "--adapt {runs}/mra --population 4 --learn-from all": "--learn-from turn",
    "--adapt {runs}/mra --population 4 --head-gain 9": "--head-gain 2.0",
    "--latent-size 1 --phi-gradient mi": "one z --phi-gradient actor both+actor phi never learns",
    "--latent-size 1 --phi-gradient both --populations 3": "one z phi never learns",
    "--latent-prior told --populations 3": "--latent-prior told --latent-size",
    "--preset relation --populations 3": "--preset relation needs several --populations",
    "--adapt {runs}/mra --population 4 --wandb-mode offline": "--wandb-mode needs --track",
    "--task pacman --populations 4,2 2,4 --eval-populations 8,4 --tell-population critic": "8,4",
    "--task pacman --populations 4,2 2,4 --eval-populations 4,2 3,3 --latent-prior told": "3,3",
    "--adapt {runs}/told --population 3,3": "3,3 cannot be told --populations",
    "--populations --eval-populations 4 --tell-population all": "--populations is empty",
    "--task rooms --populations 3": "rooms 3",
    "--task rooms --populations 3,2": "rooms 3 leader 3,2",
}
CASES = [(name, line, words) for name in BOTH for line, words in WRONG.items()]
CASES += [(MADDPG, *case) for case in WRONG_IN_MADDPG.items()]
CASES += [(MRA, *case) for case in WRONG_IN_MRA.items()]


def only_error(stderr):
    """The one sentence that says why a run ended; fails if there is anything else."""
    text = re.sub(r"[^\n\r]*\d+%\|[^\n\r]*", "", stderr)  # bars
    lines = [line.strip() for line in re.split(r"[\n\r]", text) if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].endswith("."), stderr
    return lines[0]


@pytest.fixture
def untrained(monkeypatch):
    """A run that gets so far as to begin fails at once, instead of going on for hours."""

    def collect(*args, **kwargs):
        raise AssertionError("the run has begun")

    for name in BOTH:
        monkeypatch.setattr(script(name), "collect", collect)


@pytest.mark.parametrize("name, line, words", CASES, ids=[f"{c[0][:3]}:{c[1]}" for c in CASES])
def test_wrong_command_line(name, line, words, runs, tmp_path, capfd, untrained):
    check_wrong(name, line, words, runs, tmp_path, capfd)


def check_wrong(name, line, words, runs, tmp_path, capfd):
    """One sentence with these words; exit code 2; nothing left behind."""
    own, other = ("mra", "maddpg") if name == MRA else ("maddpg", "mra")
    populations = "populations" if name == MRA else "population"
    names = {"own": runs / own, "other": runs / other, "populations": populations}
    before = contents(tmp_path, runs)  # a lock is no harm
    code = script(name).main(shlex.split(line.format(runs=runs, **names)))
    out, err = capfd.readouterr()
    sentence = only_error(err)
    assert (code, out) == (2, "")
    assert len(sentence) < 400 and "Error" not in sentence
    assert [word for word in words.split() if word not in sentence] == [], sentence
    assert contents(tmp_path, runs) == before


def given(name, argv, monkeypatch):
    """The arguments that main() trains with."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(script(name), "train", lambda args: seen.append(args) or 0)
        assert script(name).main([str(x) for x in argv]) == 0
    return seen[0]


ALLOWED = [
    "--latent-size 1 --phi-gradient mi --phi-learning-rate 0",
    "--latent-size 1",
    "--latent-size 1 --phi-gradient actor --reptile-step .1",
    "--task pacman --populations 4,2 2,4 --tell-population all",
    "--task pacman --populations 4,2 2,4 --eval-populations 3,3",
    "--task pacman --populations 4,2 2,4 8,4 --eval-populations 2,8 --latent-prior told",
]


@pytest.mark.parametrize("line", ALLOWED)
def test_what_is_not_refused(line, monkeypatch):
    """Near what is: phi stands still by its rate, a population has its own number."""
    assert given(MRA, line.split(), monkeypatch)


def test_an_old_run_whose_phi_stands_still_can_be_looked_at(monkeypatch):
    """--resume and --eval-only take what --latent-size 1 once trained."""
    with monkeypatch.context() as patch:
        patch.setattr(script(MRA), "validate", lambda args: [])
        run(MRA, "old", 4, "--latent-size", 1, "--phi-gradient", "mi")
    for flags in ("--resume old", "--eval-only old --final-episodes 1"):
        assert given(MRA, flags.split(), monkeypatch).phi_gradient == "mi"


def test_a_minibatch_of_fewer_transitions_than_populations():
    """Each population gives one, rather than none."""
    flags = ("--learn-from", "all", "--populations", 3, 4, 5, "--batch-size", 2)
    run(MRA, "run", 3 * VISIT + 20, *flags, "--update-every", 8, "--log-every", 20)
    assert any("critic_loss" in row for row in metrics("run"))


@pytest.mark.parametrize("name", BOTH)
def test_presets(name, monkeypatch):
    """The one for CPUs sets its flags, others override it wherever they stand."""
    module = script(name)
    plain = given(name, [], monkeypatch)
    assert plain == module.Args() == given(name, ["--preset", "paper"], monkeypatch)
    fast = given(name, ["--preset", "cpu"], monkeypatch)
    flags = module.PRESETS["cpu"]
    assert fast == dataclasses.replace(plain, preset="cpu", **flags) and len(flags) > 6
    assert fast.compile and fast.num_envs > plain.num_envs and fast.learning_rate == 1e-3
    for argv in (["--num-envs", 7, "--preset", "cpu"], ["--preset", "cpu", "--num-envs", 7]):
        assert given(name, argv, monkeypatch) == dataclasses.replace(fast, num_envs=7)
    copied = given(name, ["--preset", "cpu", "--target", "hard"], monkeypatch)
    assert copied == dataclasses.replace(fast, target="hard"), "the preset's --polyak is not typed"


def test_preset_of_the_form_in_which_z_matters(monkeypatch):
    """It is --preset cpu with the flags of the study that found it; an adapted run takes of it what
    adapting may change."""
    with (ROOT / "experiments/studies/mra_untold_rooms.toml").open("rb") as file:
        study = tomllib.load(file)
    flags = study["runs"]["rooms-layer_per_z_standardised_own"].split()[1:]
    typed = given(MRA, ["--preset", "cpu", *study.get("flags", "").split(), *flags], monkeypatch)
    world = ["--task", "rooms", "--populations", *typed.populations]
    world += ["--eval-populations", *typed.eval_populations]
    short = given(MRA, [*world, "--preset", "relation"], monkeypatch)
    assert short == dataclasses.replace(typed, preset="relation")
    run(MRA, "source", 4)
    few = ["--adapt", "source", "--population", 4]
    source, adapted = (given(MRA, [*few, *x], monkeypatch) for x in ([], ["--preset", "relation"]))
    changed = {k for k, x in vars(adapted).items() if x != vars(source)[k]}
    assert {"preset", "batch_size", "entropy_coef", "inner_steps"} <= changed
    assert not changed & set(script(MRA).FIXED) and adapted.phi_gradient == "actor"


# --- Flags ----------------------------------------------------------------------------------------
# Every flag changes the quantity that it names. Each entry: flags, what to measure on a run with
# and one without them, and how the two must relate.


def changed(part):
    return lambda state, run_dir: state["agent"][part]


def moved(*names):
    """Which networks are not as they began."""
    return lambda state, run_dir: [
        bool(differences(state["agent"][x], initial(run_dir)["agent"][x])) for x in names
    ]


def shape(part, weight):
    return lambda state, run_dir: tuple(state["agent"][part][weight].shape)


def steps_of(part):
    return lambda state, run_dir: float(state["agent"][part]["state"][0]["step"])


def rewards(judge):
    return lambda state, run_dir: bool(judge(replays(run_dir)[0]["rewards"]))


def rows(column):
    """How many lines of the log have it."""
    return lambda state, run_dir: (
        sum(column in m for m in metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
    )


def result(*keys):
    """A figure of the final evaluation."""

    def measure(state, run_dir):
        path = run_dir / "summary.json"
        value = json.loads(path.read_text())["eval"] if path.exists() else {}
        for key in keys:
            value = (value or {}).get(key)
        return value

    return measure


def first_eval(state, run_dir):
    key = "eval/3/episodes"
    return rows(key)(state, run_dir) and next(m[key] for m in metrics(run_dir) if key in m)


def moments(state, run_dir):
    parts = state["agent"]["critic_optimiser"]["state"].values()
    return sum(float(x["exp_avg_sq"].sum()) for x in parts)


def slow_is_fast(state, run_dir):
    return not differences(state["agent"]["actor"], state["agent"]["target_actor"])


NETWORKS = ("attention", "actor", "critic")
LATENT = ("latent_prior", "population_classifier", "latent_optimiser")
COMMON = {  # of both scripts, on a run with one population of three and, in MRA, one z
    "seed": ("--seed 7", changed("actor"), None),
    "total_timesteps": ("--total-timesteps 160", lambda s, d: s["timesteps"], (120, 160)),
    "capture_video": (
        "--capture-video --final-episodes 1",
        lambda s, d: [x.name for x in d.glob("videos/*")],
        ([], ["final-120-3.mp4"]),
    ),
    "task": (
        "--task resource",
        lambda s, d: collectors(s)[0]["worlds"]["game"],
        ("treasure 3", "resource 3"),
    ),
    "shaping": ("--no-shaping", rewards(lambda x: (x % 5 == 0).all()), (False, True)),
    "collision_penalty": (
        "--{populations} 12 --collision-penalty 3",
        rewards(lambda x: (x < -2).any()),
        (False, True),
    ),
    "num_envs": ("--num-envs 8", lambda s, d: s["iteration"], (30, 15)),
    "max_episode_steps": (
        "--max-episode-steps 5",
        lambda s, d: float(collectors(s)[0]["ended"][0]),
        (4.0, 24.0),
    ),
    "actor_gradient": ("--actor-gradient expectation", changed("actor"), None),
    "target": ("--target hard", slow_is_fast, (False, True)),
    "polyak": (
        "--polyak 0",
        moved("target_actor", "target_critic"),
        ([True, True], [False, False]),
    ),
    "inner_steps": ("--inner-steps 3", steps_of("critic_optimiser"), (6.0, 18.0)),
    "hidden_size": (
        "--hidden-size 16",
        lambda s, d: [shape(x, "entity.weight")(s, d)[-1] for x in NETWORKS],
        ([8, 8, 8], [16, 16, 16]),
    ),
    "key_size": (
        "--key-size 6",
        lambda s, d: [shape("attention", f"{x}.weight")(s, d)[-1] for x in ("query", "key")],
        ([4, 4], [6, 6]),
    ),
    "value_layers": (
        "--value-layers 1",
        lambda s, d: ["entity.weight" in s["agent"][x] for x in ("actor", "critic")],
        ([True, True], [False, False]),
    ),
    "own_beside": (
        "--no-own-beside",
        lambda s, d: [shape(x, "own.first.weight")(s, d)[1] for x in ("actor", "critic")],
        ([14, 14], [0, 14]),
    ),
    "head_gain": (
        "--head-gain 20",
        lambda s, d: float(initial(d)["agent"]["attention"]["query.weight"].abs().max()),
        "up",
    ),
    "learning_rate": (
        "--learning-rate 0",
        moved("actor", "critic", "attention"),
        ([True, True, True], [False, False, True]),
    ),
    "phi_learning_rate": (
        "--phi-learning-rate 0",
        moved("actor", "critic", "attention"),
        ([True, True, True], [True, True, False]),
    ),
    "gamma": ("--gamma .5", changed("critic"), None),
    "batch_size": ("--batch-size 60", steps_of("critic_optimiser"), (6.0, 4.0)),
    "buffer_size": ("--buffer-size 30", lambda s, d: len(replays(d)[0]["state"]), (120, 30)),
    "update_every": ("--update-every 40", steps_of("critic_optimiser"), (6.0, 3.0)),
    "entropy_coef": ("--entropy-coef 5", changed("actor"), None),
    "scale_rewards": ("--no-scale-rewards", changed("critic"), None),
    "max_grad_norm": ("--max-grad-norm .00001", moments, "down"),
    "log_every": ("--log-every 40", rows("entropy"), (0, 3)),
    "eval_every": ("--eval-every 40", rows("eval/3/return"), (0, 3)),
    "eval_episodes": ("--eval-every 60 --eval-episodes 3", first_eval, (0, 3)),
    "final_episodes": ("--final-episodes 5", result("3", "episodes"), (None, 5)),
    "save_every": (
        "--save-every 100",
        lambda s, d: [entry["timesteps"] for entry in index(d)],
        ([120, 0], [120, 100]),
    ),
}
PARENT = {
    "population": (
        "--population 5",
        lambda s, d: collectors(s)[0]["worlds"]["game"],
        ("treasure 3", "treasure 5"),
    ),
    "share_parameters": ("--share-parameters", shape("actor", "out.bias"), ((3, 5), (1, 5))),
}
METHOD = {  # of MRA, on a run with populations of 3 and 5
    "populations": (
        "--populations 4 2 5",
        lambda s, d: [x["worlds"]["game"] for x in collectors(s)],
        (["treasure 3", "treasure 5"], ["treasure 4", "treasure 2", "treasure 5"]),
    ),
    "share_parameters": (
        "--no-share-parameters --populations 3",
        shape("actor", "out.bias"),
        ((1, 5), (3, 5)),
    ),
    "latent_size": (
        "--latent-size 2",
        lambda s, d: (len(s["agent"]["attention"]["query.weight"]), int(replays(d)[0]["z"].max())),
        ((6, 5), (2, 1)),
    ),
    "learning_rate of psi and xi": (
        "--learning-rate 0",
        moved("actor", "latent_prior", "population_classifier", "attention"),
        ([True] * 4, [False, False, False, True]),
    ),
    "representation": (
        "--representation concat",
        lambda s, d: ("entity_z.weight" in str(s["agent"]["attention"].keys()), len_of_query(s)),
        ((False, 6), (True, 1)),
    ),
    "representation of a product": (
        "--representation bilinear",
        lambda s, d: (len(s["agent"]["attention"]["entity.weight"]), len_of_query(s)),
        ((1, 6), (6, 1)),
    ),
    "latent_prior": (
        "--latent-prior uniform",
        lambda s, d: [x in s["agent"] for x in LATENT],
        ([True] * 3, [False, True, True]),
    ),
    "phi_gradient": (
        "--phi-gradient actor --latent-prior uniform",
        lambda s, d: any(k.startswith("mi/") for k in s["ranks"][0]["noted"]),
        (True, False),
    ),
    "phi_gradient mi": (
        "--phi-gradient mi --latent-prior uniform",
        lambda s, d: [x in s["agent"] for x in LATENT],
        ([True] * 3, [False] * 3),
    ),
    "psi_information": ("--no-psi-information", changed("latent_prior"), None),
    "redraw_z": ("--redraw-z", changed("actor"), None),
    "xi_reads_z": (
        "--xi-reads-z",
        lambda s, d: ["of_z" in s["agent"][x] for x in (*NETWORKS, "population_classifier")],
        ([False] * 4, [False] * 3 + [True]),
    ),
    "critic_reads_z": (
        "--critic-reads-z",
        lambda s, d: [shape(x, "entity.weight")(s, d)[0] for x in ("actor", "critic")],
        ([1, 1], [1, 6]),
    ),
    "critic_graph": ("--critic-graph uniform", changed("critic"), None),
    "psi_input": ("--psi-input standardised", changed("latent_prior"), None),
    "psi_entropy": ("--psi-entropy 1000", changed("latent_prior"), None),
    "learn_from": ("--learn-from all", changed("critic"), None),
    "tell_population": (
        "--tell-population critic",
        lambda s, d: [shape(x, "entity.weight")(s, d)[0] for x in ("actor", "critic")],
        ([1, 1], [1, 2]),
    ),
    "latent_prior told": (
        "--latent-prior told",
        lambda s, d: sorted(set(replays(d)[1]["z"].flatten().tolist())),
        ([0, 1, 2, 3, 4, 5], [1]),
    ),
    "reptile_step": (
        "--reptile-step 0",
        moved("actor", "critic", "attention"),
        ([True, True, True], [False, True, True]),
    ),
    "eval_populations": (
        "--final-episodes 2 --latent-size 1 --eval-populations 4",
        result("4", "episodes"),
        (None, 2),
    ),
    "final_episodes": (
        "--final-episodes 3 --latent-size 1",
        lambda s, d: [result(m, "episodes")(s, d) for m in ("3", "5")],
        ([None, None], [3, 3]),
    ),
    "capture_video": (
        "--capture-video --final-episodes 1 --latent-size 2 --populations 3",
        lambda s, d: sorted(x.name for x in d.glob("videos/*")),
        (
            [],
            [f"final-160-3{z}.mp4" for z in ("-z=0", "-z=1", "")],
        ),
    ),
}
# Measured elsewhere.
ELSEWHERE = {
    "run_dir": "every test here",
    "resume": "test_resumed_equals_uninterrupted",
    "eval_only": "test_evaluation_alone_repeats",
    "preset": "test_presets",
    "plain": "test_device_threads_plain_and_compile",
    "adapt": "the tests of adaptation",
    "population": "the same",
    "device": "test_device_threads_plain_and_compile",
    **dict.fromkeys(("tf32", "onednn"), "tests/harness"),
    "num_threads": "test_device_threads_plain_and_compile",
    "compile": "test_device_threads_plain_and_compile",
    **dict.fromkeys(("track", "wandb_project", "wandb_mode", "wandb_timeout"), "tests/harness"),
}


def len_of_query(state):
    return len(state["agent"]["attention"]["query.weight"])


def test_every_flag_is_tested():
    fields = [{x.name for x in dataclasses.fields(script(name).Args)} for name in BOTH]
    method = {name.split()[0] for name in METHOD}
    assert fields[0] == set(COMMON) | method | set(ELSEWHERE)
    elsewhere = set(ELSEWHERE) - {"adapt", "population"}
    assert fields[1] == set(COMMON) | set(PARENT) | elsewhere
    assert fields[1] < fields[0]


ONE = "--target polyak --actor-gradient gumbel"
ONE = {MRA: f"{ONE} --populations 3 --latent-size 1 --phi-gradient actor", MADDPG: ONE}
BASES = {  # name of the plain run: script, flags, steps
    MRA: (MRA, ONE[MRA], 120),
    MADDPG: (MADDPG, ONE[MADDPG], 120),
    "method": (MRA, "", 160),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The runs without further flags."""
    found = {}
    for base, (name, flags, steps) in BASES.items():
        run_dir = tmp_path_factory.mktemp("plain") / "run"
        found[base] = run(name, run_dir, steps, *flags.split()), run_dir
    return found


ENTRIES = [(base, field) for base in BOTH for field in COMMON]
ENTRIES += [(MADDPG, field) for field in PARENT] + [("method", field) for field in METHOD]


@pytest.mark.parametrize("base, field", ENTRIES, ids=[f"{x[0][:6]}:{x[1]}" for x in ENTRIES])
def test_flag_changes_what_it_names(base, field, plain, tmp_path):
    name, own, steps = BASES[base]
    table = METHOD if base == "method" else COMMON | (PARENT if name == MADDPG else {})
    flags, measure, relation = table[field]
    flags = flags.format(populations="populations" if name == MRA else "population")
    state = run(name, tmp_path / "run", steps, *own.split(), *flags.split())
    without, with_flag = measure(*plain[base]), measure(state, tmp_path / "run")
    if relation is None:
        assert differences({"": without}, {"": with_flag})
    elif relation in ("up", "down"):
        assert with_flag > without if relation == "up" else with_flag < without
    else:
        assert (without, with_flag) == relation


@pytest.mark.parametrize("name", BOTH)
def test_device_threads_plain_and_compile(name, monkeypatch):
    """--compile is for a GPU: what it compiles of the networks is shown here by leaving out the
    kernels for a CPU, which need no compiler. On a CPU worlds are left as they are; the plain form
    has no kernels."""
    module, seen, made = script(name), {}, []

    class Compiled:
        def __init__(self, function, what, dynamic=False):
            seen[what] = dynamic
            self.function = function

        def __call__(self, *args):
            return self.function(*args)

    class World(module.ParticleWorld):
        def __init__(self, *args, **options):
            made.append((options["device"], options["compiled"]))
            super().__init__(*args, **options | {"device": "cpu", "compiled": False})

    monkeypatch.setattr(pairs, "Compiled", Compiled)
    run(name, "kernels", 20, "--num-threads", 1, "--compile")
    assert torch.get_num_threads() == 1 and seen == {}
    monkeypatch.setattr(pairs.kernels, "fits", lambda *tensors: False)  # as on a GPU
    fast = run(name, "fast", 20, "--num-threads", 1)
    assert seen == {}
    pairs.kernel.cache_clear()
    monkeypatch.setattr(module, "ParticleWorld", World)
    run(name, "plain", 20, "--plain", "--compile")
    assert seen == {}
    compiled = run(name, "compiled", 20, "--device", "cpu", "--num-threads", 2, "--compile")
    pairs.kernel.cache_clear()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert seen == dict.fromkeys(("score_kernel", "sum_kernel", "gradient_kernel"), True)
    assert differences(fast["agent"], compiled["agent"]) == []
    assert set(made) == {("cpu", False)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags in ("", "--compile", "--device cpu --compile"):
        module.make_envs(parse(module, flags.split()), "3", 2, 1)
    assert made[-3:] == [("cuda", False), ("cuda", True), ("cpu", False)]


@pytest.mark.parametrize("name", [MRA, MADDPG, EPC, RL2])
def test_what_is_compiled_on_a_cpu(name, monkeypatch):
    """Nothing: kernels.py has the sums over pairs, however wide. Elsewhere they are."""
    seen = []
    monkeypatch.setattr(pairs, "Compiled", lambda function, *_, **__: seen.append(1) or function)
    for width in (8, 129):
        pairs.kernel.cache_clear()
        run(name, f"run-{width}", 8, "--compile", "--device", "cpu", "--hidden-size", width)
    assert not seen
    monkeypatch.setattr(kernels, "fits", lambda x: False)
    run(name, "elsewhere", 8, "--compile", "--device", "cpu")
    assert seen
    pairs.kernel.cache_clear()


# --- Several populations --------------------------------------------------------------------------


def watch(module, patch):
    """Collecting and updating as they come: [("collect" or "update", population)]."""
    events, collect, update = [], module.collect, module.update

    def watched_collect(agent, collector, *rest):
        events.append(("collect", collector.name))
        return collect(agent, collector, *rest)

    def watched_update(args, agent, collector, *rest):
        events.append(("update", collector.name))
        return update(args, agent, collector, *rest)

    patch.setattr(module, "collect", watched_collect)
    patch.setattr(module, "update", watched_update)
    return events


VISITS = [(20, 20, 16, 4), (7, 25, 40, 6), (2, 3, 16, 8)]


@pytest.mark.parametrize("visit, every, batch, envs", VISITS)
def test_populations_in_turn(visit, every, batch, envs, monkeypatch):
    """Visits of an episode's length; each population counts its own steps and updates for each
    multiple of --update-every that they pass, once there is a minibatch."""
    events = watch(script(MRA), monkeypatch)
    names, steps, expected = ("2", "4", "3"), dict.fromkeys(("2", "4", "3"), 0), []
    for k in range(6 * visit - 1):
        name = names[k // visit % 3]
        expected.append(("collect", name))
        before, steps[name] = steps[name], steps[name] + envs
        if steps[name] >= batch:
            passed = [n for n in range(before + 1, steps[name] + 1) if n % every == 0]
            expected += [("update", name) for n in passed]
    flags = ("--max-episode-steps", visit, "--update-every", every, "--batch-size", batch)
    flags += ("--num-envs", envs, "--latent-size", 1, "--populations", *names)
    state = run(MRA, "run", (6 * visit - 1) * envs, *flags)
    assert events == expected
    assert {("update", name) for name in names} < set(events)
    assert [x["steps"] for x in collectors(state)] == [steps[name] for name in names]


@pytest.mark.parametrize("name", [MRA, MADDPG, MAAC, EPC])
def test_more_worlds_than_steps_between_updates(name, monkeypatch):
    """A step of 64 worlds passes four multiples of 16; each of EPC's two sets counts its own."""
    updates = []
    monkeypatch.setattr(script(name), "update", lambda *given: updates.append(given) or {})
    run(name, "run", 1280, "--num-envs", 64, "--update-every", 16)
    assert len(updates) == 1280 // 16 * (2 if name == EPC else 1)


@pytest.mark.parametrize("flags", ["", "--phi-gradient actor"])
def test_a_step_clips_what_it_moves(flags, monkeypatch):
    """The norm of a step's gradients is of weights that the step's optimiser moves."""
    module, calls = script(MRA), []
    descend = module.descend

    def watched(loss, net, optimiser, *rest):
        norm = descend(loss, net, optimiser, *rest)
        own = {id(p) for group in optimiser.param_groups for p in group["params"]}
        calls.append([p.grad is not None and id(p) not in own for p in net.parameters()])
        return norm

    monkeypatch.setattr(module, "descend", watched)
    run(MRA, "run", 160, *flags.split())
    assert len(calls) > 8 and not any(any(call) for call in calls)


def episodes_of(filled, worlds):
    """For each row but the last of a world: whether the next is of the same episode; rows by step
    and world."""
    states, finals = (filled[x].unflatten(0, (-1, worlds)) for x in ("state", "final_state"))
    return (states[1:] == finals[:-1]).all(-1), filled["z"].unflatten(0, (-1, worlds))


def test_new_latents_in_new_episodes_only():
    """Whether an episode ends by itself or at its horizon, and across visits."""
    flags = ["--task", "pacman", "--populations", "1,4", "2,5", "--update-every", 100000]
    run(MRA, "run", 6 * 60 * 2, *flags, "--num-envs", 6)
    assert sum(bool(x["terminated"].any()) for x in replays("run")) > 0
    for filled, n in zip(replays("run"), (5, 7)):
        goes_on, z = episodes_of(filled, 6)
        assert z.shape == (60, 6, n)
        ended = filled["terminated"].unflatten(0, (-1, 6))[:-1]
        assert not (ended & goes_on).any() and (~goes_on & ~ended).any()
        new = (z[1:] != z[:-1]).any(-1)
        assert not (new & goes_on).any()
        assert (new & ~goes_on).sum() > 0.9 * (~goes_on).sum(), "six to the fifth for each"
        for now in (z[0], z[-1]):  # for each world and agent
            assert (now != now[:1]).any() and (now != now[:, :1]).any()
        assert set(z.unique().tolist()) == set(range(6))


# --- Zero-shot evaluation -------------------------------------------------------------------------


class Watched:
    """Evaluation with games that are not played: what they would have been, and who the players."""

    def __init__(self, patch, value=lambda world, z: 0.0):
        self.games, self.value = [], value
        patch.setattr(script(MRA), "net_player", self.player)
        patch.setattr(episodes, "play", self.play)

    def player(self, agent, z, seed, uniform=False):
        return {"z": z, "seed": seed, "uniform": uniform}

    def play(self, world, player, film=None, progress=None):
        world.reset()
        own = dict(player) if isinstance(player, dict) else {}
        if own:
            z, counts = own["z"], torch.tensor(world.game.population)
            z = torch.tensor(z).repeat_interleave(counts) if isinstance(z, tuple) else z
            own["z"] = z.expand(world.num_worlds, -1).clone()
        game = {"population": world.game.population, "state": world.state.clone(), **own}
        self.games.append(game)
        returns = np.zeros((world.num_worlds, len(world.game.population)))
        return returns + (self.value(world, game["z"]) if own else 0.0)

    def of(self, population, episodes):
        """Games of a population with so many episodes, in their order."""
        return [
            x for x in self.games if x["population"] == population and len(x["state"]) == episodes
        ]


ROWS = ("", "z=0", "z=1", "z=2", "z=3", "z=4", "z=5", "best", "uniform g")
ROWS += ("random", "nearest-first", "flee")


def test_rows_of_the_table(tmp_path, capfd):
    """In training and unseen populations; on the way only in the former, without scripts."""
    flags = ("--task", "pacman", "--populations", "2,1", "1,2", "--latent-size", 2)
    flags += ("--eval-populations", "2,2", "--eval-every", 40, "--final-episodes", 3)
    run(MRA, "run", 40, *flags)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    out = capfd.readouterr().out
    expected = []
    for population in ("2,1", "1,2", "2,2"):
        best = [name for name in results if name.startswith(f"{population} best z=")]
        assert len(best) == 1 and re.fullmatch(r".* best z=[01],[01]", best[0])
        expected += [population, f"{population} z=0", f"{population} z=1", *best]
        expected += [f"{population} {x}" for x in ("uniform g", "random", "nearest-first", "flee")]
    assert list(results) == expected
    for name, row in results.items():
        assert row["episodes"] == 3 and {"return_pac_man", "return_ghost"} < set(row)
        assert f"| {name} " in out
        assert row["return_ghost_low"] <= row["return_ghost"] <= row["return_ghost_high"]
    (on_the_way,) = (m for m in metrics("run") if any(k.startswith("eval/") for k in m))
    own = {f"{m}{x}" for m in ("2,1", "1,2") for x in ("", " z=0", " z=1", " uniform g")}
    assert {k.split("/")[1] for k in on_the_way if k.startswith("eval/")} == own


def test_everybody_meets_the_same_episodes(runs, monkeypatch):
    """The latents of each row, and where its episodes begin."""
    watched = Watched(monkeypatch)
    argv = ["--eval-only", runs / "mra", "--eval-populations", 4, 3, "--final-episodes", 7]
    assert script(MRA).main([str(x) for x in argv]) == 0
    assert list(dict.fromkeys(x["population"] for x in watched.games)) == [(3,), (5,), (4,)]
    for population in ((3,), (5,), (4,)):
        search, games = watched.of(population, 2), watched.of(population, 7)
        assert len(search) == 6 and len(games) == len(ROWS)
        assert len(watched.of(population, 2) + games) == sum(
            x["population"] == population for x in watched.games
        )
        named = dict(zip(ROWS, games))
        for name, game in named.items():
            assert torch.equal(game["state"], games[0]["state"]), name
        assert len({game["seed"] for game in games[:9]}) == 1
        shape = (7, *population)
        assert named[""]["z"].shape == shape
        assert torch.equal(named["uniform g"]["z"], named[""]["z"])
        assert [name for name in ROWS[:9] if named[name]["uniform"]] == ["uniform g"]
        for k in range(6):
            assert torch.equal(named[f"z={k}"]["z"], torch.full(shape, k))
        # Drawn for each agent and episode.
        z = named[""]["z"]
        assert (z != z[:1]).any() and (z != z[:, :1]).any()


def test_best_latent_is_chosen_on_other_episodes(runs, monkeypatch, capfd):
    """In pacman a pair, of which the mean return of all agents is largest."""
    scores = np.random.default_rng(1).normal(size=(6, 6, 2))
    assert len({tuple(scores[..., k].ravel().argsort()) for k in (0, 1)}) == 2

    def value(world, z):
        kinds = [part[:, 0] for part in z.split(world.game.population, 1)]
        return scores[kinds[0], kinds[1]]

    watched = Watched(monkeypatch, value)
    argv = ["--eval-only", runs / "pacman", "--eval-populations", "2,2", "--final-episodes", 7]
    assert script(MRA).main([str(x) for x in argv]) == 0
    table = capfd.readouterr().out
    for population in ((2, 1), (1, 2), (2, 2)):
        mean = np.average(scores, axis=-1, weights=population)
        best = np.unravel_index(mean.argmax(), (6, 6))
        search, games = watched.of(population, 2), watched.of(population, 7)
        name = ",".join(map(str, population))
        assert f"| {name} best z={best[0]},{best[1]} " in table
        tried = [tuple(x["z"][0, [0, -1]].tolist()) for x in search]
        assert sorted(tried) == list(itertools.product(range(6), repeat=2))
        assert all((x["z"] == x["z"][:1]).all() for x in search)
        reported = games[ROWS.index("best")]
        own = torch.tensor([best[kind] for kind, n in enumerate(population) for _ in range(n)])
        assert torch.equal(reported["z"], own.expand(7, -1))
        # All pairs were tried in the same episodes, which are none of those reported.
        assert all(torch.equal(x["state"], search[0]["state"]) for x in search)
        seen = {tuple(row) for row in games[0]["state"].tolist()}
        assert seen.isdisjoint(map(tuple, search[0]["state"].tolist()))
        assert {x["seed"] for x in search}.isdisjoint({games[0]["seed"]})


def doctored(source, run_dir, change):
    """A copy of a run with another last checkpoint."""
    state, _ = harness.load_checkpoint(str(source))
    change(state)
    path = Path(run_dir) / f"checkpoint-{state['timesteps']}.pt"
    path.parent.mkdir()
    torch.save(state, path)
    entry = {"name": path.name, "timesteps": state["timesteps"], "replays": []}
    entry["sha256"] = harness.sha256_of(path)
    (path.parent / "checkpoints.json").write_text(json.dumps([entry]))
    return run_dir


def prefers(z):
    """A prior that gives every population, of each type, this z."""

    def change(state):
        bias = state["agent"]["latent_prior"]["net.2.bias"]
        bias[[6 * kind + z for kind in range(len(bias) // 6)]] += 50.0

    return change


def test_latents_are_drawn_from_psi(runs, monkeypatch):
    """For populations that it has been trained with, and others."""
    for source in ("mra", "pacman"):
        doctored(runs / source, source, prefers(4))
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            unseen = {"mra": "9", "pacman": "4,3"}[source]
            argv = ["--eval-only", source, "--eval-populations", unseen, "--final-episodes", "7"]
            assert script(MRA).main(argv) == 0
        drawn = [x for x in watched.games if len(x["state"]) == 7][:: len(ROWS)]
        assert len(drawn) == 3 and all((x["z"] == 4).all() for x in drawn)


def test_final_evaluation_plays_other_episodes_than_those_on_the_way(monkeypatch):
    """Each evaluation has its own."""
    watched = Watched(monkeypatch)
    flags = ("--eval-every", 40, "--eval-episodes", 3, "--final-episodes", 3, "--populations", 3)
    run(MRA, "run", 80, *flags, "--latent-size", 1)
    begun = [x["state"] for x in watched.games if "seed" in x and not x["uniform"]]
    assert len(begun) == 3
    for a, b in itertools.combinations(begun, 2):
        assert not (a == b).all(-1).any()


def test_latent_and_graph_reach_the_players(runs, capfd):
    """With weights that are large enough to see it: each z plays in its own way, and in another
    than with a uniform graph."""

    def sharpen(state):
        state["args"]["shaping"] = True  # finer returns
        rng = torch.Generator().manual_seed(1)
        for part, scale in (("attention", 2), ("actor", 1)):
            for weight in state["agent"][part].values():
                weight += torch.randn(weight.shape, generator=rng) * scale

    doctored(runs / "mra", "run", sharpen)
    argv = ["--eval-only", "run", "--eval-populations", "4", "--final-episodes", "40"]
    assert script(MRA).main(argv) == 0
    found = dict(
        (cells[1].strip(), cells[2])
        for line in capfd.readouterr().out.splitlines()
        if len(cells := line.split("|")) == 5
    )
    for population in ("3", "4", "5"):
        own = [x for x in found if x.split()[0] == population]
        best = next(x for x in own if "best" in x)
        same = found[f"{population} {best[7:]}"]
        assert found[best] == same, "the same players in the same episodes"
        others = {found[x] for x in own if x != best}
        assert len(others) == len(ROWS) - 1


@pytest.mark.parametrize("name", BOTH)
def test_evaluation_alone_repeats(name, capfd):
    """The table at the end of training."""
    flags = ("--latent-size", 2, "--populations", 3) if name == MRA else ()
    run(name, "run", 40, "--final-episodes", 5, *flags)

    def table():
        return [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]

    trained, before, module = table(), contents(Path("run")), script(name)
    assert len(trained) == 2 + (8 if name == MRA else 4)
    assert module.main(["--eval-only", "run/checkpoint-40.pt"]) == 0
    assert table() == trained
    assert module.main(["--eval-only", "run/checkpoint-0.pt"]) == 0
    assert table() != trained
    more = ("--eval-populations", "4") if name == MRA else ()
    assert module.main(["--eval-only", "run", *more]) == 0
    again = [re.sub(" +", " ", line) for line in table()[2:]]
    # Unseen populations come behind, and change nothing of the others.
    assert again[: len(trained) - 2] == [re.sub(" +", " ", line) for line in trained[2:]]
    assert len(again) == (16 if name == MRA else 4)
    assert contents(Path("run")) == before


def test_episodes_are_expected_and_told(monkeypatch):
    """As many as are played, in the search for the best z, too; none is told twice."""
    found = []

    class Evaluation(harness.Evaluation):
        def close(self):
            found.append((self.kind, self.expected, self.played))
            super().close()

    monkeypatch.setattr(harness, "Evaluation", Evaluation)
    flags = ("--eval-every", 40, "--final-episodes", 7, "--latent-size", 3)
    run(MRA, "mra", 40, *flags, "--task", "pacman", "--populations", "2,1")
    run(MADDPG, "maddpg", 40, "--final-episodes", 7)
    search, rows = 2 * 3**2, 1 + 3 + 1 + 1 + 3
    expected = [("eval", 2 * 5, 2 * 5), ("final", search + 7 * rows, search + 7 * rows)]
    assert found == [*expected, ("final", 28, 28)]
    flags = ("--final-episodes", 1, "--latent-size", 17, "--task", "pacman", "--populations", "2,1")
    run(MRA, "many", 40, *flags)  # 289 pairs are too many to search
    assert found[-1] == ("final", 22, 22)


@pytest.mark.parametrize("name, source", [(MRA, "mra"), (MRA, "pacman"), (MADDPG, "maddpg")])
def test_a_run_as_a_player(name, source, runs):
    """load_player() gives the policy, which plays in the run's worlds; MRA's in other populations,
    with latents that change where an episode begins and only there."""
    module, path = script(name), str(runs / source)
    args, agent = module.load_agent(path)
    assert differences(agent.actor.state_dict(), newest(path)["agent"]["actor"]) == []
    population = {"mra": "4", "pacman": "2,2", "maddpg": "3"}[source]
    worlds = module.make_envs(args, population, 5, 1)
    returns = []
    for seed in (1, 1, 2):
        worlds.seed(1)
        returns.append(play(worlds, module.load_player(path, seed)))
    assert (returns[0] == returns[1]).all() and (returns[0] != returns[2]).any()
    if name == MRA:
        seen, view = [], module.Agent.view
        player = module.load_player(path)

        def watched(self, game, obs, z):
            seen.append(z)
            return view(self, game, obs, z)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.Agent, "view", watched)
            play(worlds, player)
            first, last = seen[0], seen[-1]
            play(worlds, player)
        if source == "mra":
            assert torch.equal(first, last), "nobody's episode ended"
        assert not torch.equal(seen[len(seen) // 2], first)


# --- Adaptation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(runs, tmp_path_factory):
    """The run of runs/mra adapted to four agents: before the first update, and after some."""
    folder = tmp_path_factory.mktemp("adapted")
    argv = adapting(runs / "mra", folder / "begun", 4)
    assert script(MRA).main(argv) == 0
    argv = adapting(runs / "mra", folder / "run", 120, "--save-every", 100, "--log-every", 40)
    assert script(MRA).main(argv) == 0
    return folder


def test_adaptation_begins_with_the_sources_networks(adapted, runs):
    source = newest_of(runs / "mra")
    begun, after_a_step = initial(adapted / "begun"), newest(adapted / "begun")
    assert set(nets(begun)) == set(nets(source)) > {*LATENT[:2], "target_critic"}
    assert differences(nets(begun), nets(source)) == []
    assert differences(nets(after_a_step), nets(source)) == []
    assert {"actor_optimiser", "critic_optimiser"} < set(begun["agent"])
    for name, part in begun["agent"].items():
        if "optimiser" in name:
            assert part["state"] == {} != source["agent"][name]["state"]
    # Worlds of four agents, with an empty replay; rewards as large as they were.
    (own,) = collectors(begun)
    assert own["worlds"]["game"] == "treasure 4" and own["steps"] == 0
    assert begun["timesteps"] == begun["iteration"] == 0
    sums = torch.stack([x["rewards"] for x in collectors(source)]).mean(0)
    assert torch.equal(own["rewards"], sums) and (sums != 0).all()
    assert not own["returns"].any() and not own["ended"].any()


def test_adaptation_moves_omega_and_the_critic(adapted, runs):
    """Algorithm 5: phi learns, psi and xi do not, there is no bound on I(g; a|o)."""
    source, end = newest_of(runs / "mra"), newest(adapted / "run")
    for name, part in nets(end).items():
        assert bool(differences(part, source["agent"][name])) == (name not in LATENT), name
    for name in ("critic_optimiser", "actor_optimiser"):
        steps = {float(x["step"]) for x in end["agent"][name]["state"].values()}
        assert steps == {6.0}, "fresh moments, and for phi as many steps as for theta"
    assert end["agent"]["latent_optimiser"]["state"] == {}
    logged = [m for m in metrics(adapted / "run") if "entropy" in m]
    assert len(logged) == 3 and "critic_loss" in logged[-1] and "return/4" in logged[1]
    assert [k for m in logged for k in m if k.startswith(("mi/", "xi_loss"))] == []


def test_adaptation_has_no_reptile_step():
    """theta moves, though in training of the source it moved not at all."""
    run(MRA, "source", 120, "--reptile-step", 0)
    assert not differences(newest("source")["agent"]["actor"], initial("source")["agent"]["actor"])
    assert script(MRA).main(adapting("source", "run", 40)) == 0
    assert differences(newest("run")["agent"]["actor"], initial("run")["agent"]["actor"])


def test_adaptation_keeps_its_latents(adapted, runs, monkeypatch):
    """The same in all worlds and episodes, and in evaluations of that population."""
    begun, end = initial(adapted / "begun"), newest(adapted / "run")
    z = collectors(begun)[0]["z"]
    assert z.shape == (4, 4) and (z == z[:1]).all()
    assert torch.equal(collectors(end)[0]["z"], z)
    (filled,) = replays(adapted / "run")
    assert len(filled["z"]) == 120 > 20 * 4 and (filled["z"] == z[:1]).all()
    watched = Watched(monkeypatch)
    argv = ["--eval-only", adapted / "run", "--eval-populations", 6, "--final-episodes", 7]
    assert script(MRA).main([str(x) for x in argv]) == 0
    own, other = watched.of((4,), 7), watched.of((6,), 7)
    assert torch.equal(own[0]["z"], z[:1].expand(7, -1))
    assert torch.equal(own[ROWS.index("uniform g")]["z"], z[:1].expand(7, -1))
    assert (other[0]["z"] != other[0]["z"][:1]).any()


def test_an_adapted_run_plays_as_it_is_evaluated(adapted, monkeypatch):
    """load_player() keeps the latents of the run's population, in all episodes; in others it draws
    them for each."""
    module, path = script(MRA), str(adapted / "run")
    args, agent = module.load_agent(path)
    saved = collectors(newest(path))[0]
    collector = module.Collector(args, "4", torch.device("cpu"))
    collector.load_state_dict(saved)
    args = dataclasses.replace(args, eval_episodes=30)
    evaluation = harness.Evaluation(args, "eval", 120, None)
    wanted = module.evaluate(args, agent, {"4": collector}, evaluation)["4"]["return"]
    again = harness.Evaluation(args, "eval", 120, None)
    world_seed, player_seed, *_ = again.rng.integers(2**31, size=6).tolist()
    player, seen, view = module.load_player(path, player_seed), [], module.Agent.view

    def watched(self, game, obs, z):
        seen.append(z)
        return view(self, game, obs, z)

    monkeypatch.setattr(module.Agent, "view", watched)
    worlds = module.make_envs(args, "4", 30, world_seed)
    assert play(worlds, player).mean() == pytest.approx(wanted, rel=1e-5)
    play(worlds, player)
    assert len(seen) == 40 and all((z == saved["z"][0]).all() for z in seen)
    seen.clear()
    play(module.make_envs(args, "6", 30, world_seed), player)
    assert (seen[0] != seen[0][:1]).any(), "another population"


def test_the_classifier_in_an_adaptation(adapted, runs):
    """Its accuracy is that of finding the population, the second of 3 and 5; there is none in a
    population that it does not know."""

    def guesses_the_second(state):
        state["agent"]["population_classifier"]["out.bias"][:, 1] += 100.0

    assert not [k for m in metrics(adapted / "run") for k in m if k.startswith("xi_")]
    doctored(runs / "mra", "source", guesses_the_second)
    for population, right in (("3", 0.0), ("5", 1.0)):
        argv = adapting("source", f"to-{population}", 40, "--population", population)
        assert script(MRA).main([*argv, "--log-every", "40"]) == 0
        (m,) = metrics(f"to-{population}")
        for name in ("xi_accuracy", "xi_accuracy_uniform_g"):
            assert m[f"{name}/{population}"] == pytest.approx(right, abs=1e-6)


def test_adaptation_draws_from_the_sources_psi(runs):
    """One z for each agent, by its type."""
    doctored(runs / "mra", "one", prefers(4))
    found = []
    for source, seed in (("one", 1), (runs / "mra", 1), (runs / "mra", 2)):
        run_dir = f"adapted-{len(found)}"
        assert script(MRA).main(adapting(source, run_dir, 4, "--seed", seed)) == 0
        found.append(collectors(initial(run_dir))[0]["z"][0].tolist())
    assert found[0] == [4] * 4
    assert len(set(found[1])) > 1 and found[1] != found[2]


def test_flags_of_the_source_hold(runs, monkeypatch):
    """Unless typed; what is about this run alone is not the source's."""
    own, module = newest_of(runs / "mra")["args"], script(MRA)
    few = ["--adapt", runs / "mra", "--population", 4]
    args = vars(given(MRA, few, monkeypatch))
    about = {field.name for field in dataclasses.fields(harness.RunArgs)}
    about |= {"adapt", "population", "phi_gradient"}
    same = lambda x: tuple(x) if isinstance(x, list) else x  # noqa: E731
    assert {k for k in args if k not in about and args[k] != same(own[k])} == set()
    assert not args["shaping"] and args["hidden_size"] == 8 and args["max_grad_norm"] == 5
    assert {k: args[k] for k in ("total_timesteps", "eval_every", "save_every", "seed")} == {
        k: getattr(module.Args(), k)
        for k in ("total_timesteps", "eval_every", "save_every", "seed")
    }
    assert args["phi_gradient"] == "actor" and args["population"] == "4"
    typed = "--learning-rate .5 --max-grad-norm=7 --inner-steps 3 --num-envs 4 --seed 9"
    typed += " --max-episode-steps 20 --no-scale-rewards --target polyak"
    changed = vars(given(MRA, [*few, *typed.split()], monkeypatch))
    expected = {"learning_rate": 0.5, "max_grad_norm": 7.0, "inner_steps": 3, "seed": 9}
    expected |= {"scale_rewards": False, "target": "polyak"}
    assert {k: x for k, x in changed.items() if x != args[k]} == expected


def test_presets_of_adaptations(monkeypatch):
    """Without --preset it is the source's, as are its flags; with it flags are the preset's."""
    run(MRA, "source", 4, "--preset", "cpu", "--no-compile", "--buffer-size", 2000)
    few, module = ["--adapt", "source", "--population", 4], script(MRA)
    args = given(MRA, few, monkeypatch)
    assert (args.preset, args.num_envs, args.learning_rate) == ("cpu", 4, 1e-3)
    assert args.target == "polyak" and not args.compile
    usual = {name: getattr(module.Args, name) for name in module.PRESETS["cpu"]}
    for preset, flags in (("cpu", module.PRESETS["cpu"]), ("paper", usual)):
        typed = given(MRA, [*few, f"--preset={preset}", "--num-envs", 7], monkeypatch)
        flags = flags | {"preset": preset, "num_envs": 7}
        assert typed == dataclasses.replace(args, **flags)


def test_shaping_of_an_adaptation(runs, monkeypatch):
    """The paper's sparse game for a run that was trained with shaping."""
    run(MRA, "dense", 40)
    few = ["--adapt", "dense", "--population", 4]
    assert given(MRA, few, monkeypatch).shaping
    assert not given(MRA, [*few, "--no-shaping"], monkeypatch).shaping
    assert script(MRA).main(adapting("dense", "run", 40, "--no-shaping")) == 0
    assert (replays("run")[0]["rewards"] % 5 == 0).all()


def test_typing_what_the_source_has_is_no_contradiction(runs, monkeypatch):
    """Flags that cannot differ from the source's may be repeated."""
    few = ["--adapt", runs / "mra", "--population", 4]
    same = "--populations 3 5 --hidden-size 8 --latent-size 6 --task treasure --key-size 4"
    same += " --representation option --latent-prior learned --no-shaping"
    assert given(MRA, [*few, *same.split()], monkeypatch) == given(MRA, few, monkeypatch)


def test_adaptation_of_one_checkpoint(runs):
    """A file names an older state."""
    path = runs / "mra" / index(runs / "mra")[1]["name"]
    assert script(MRA).main(adapting(path, "run", 4)) == 0
    assert differences(nets(initial("run")), nets(read(path))) == []
    assert differences(nets(read(path)), nets(newest(runs / "mra")))


SOURCES = {
    "one population": "--populations 3 --latent-size 1",
    "uniform": "--latent-prior uniform --representation concat",
    "actor": "--phi-gradient actor --representation bilinear",
}


@pytest.mark.parametrize("flags", SOURCES.values(), ids=SOURCES)
def test_runs_of_all_kinds_can_be_adapted(flags):
    source = run(MRA, "source", 40, *flags.split())
    assert script(MRA).main(adapting("source", "run", 40)) == 0
    begun, end = nets(initial("run")), nets(newest("run"))
    left = nets(source).keys() - begun.keys()  # without p(z|m) xi has nothing to do afterwards
    assert left == ({"population_classifier"} if "uniform" in flags else set())
    assert differences({name: nets(source)[name] for name in begun}, begun) == []
    for name in NETWORKS:
        assert differences(begun[name], end[name]), name


# --- The log --------------------------------------------------------------------------------------

PARENTS = {"timesteps", "critic_loss", "actor_loss", "entropy", "critic_grad_norm"}
PARENTS |= {"actor_grad_norm", "return", "episodes"}


def test_log_of_the_latent():
    """Its names and, where a checkpoint tells, its numbers."""
    state = run(MRA, "run", 2 * VISIT, "--log-every", 2 * VISIT, "--learning-rate", 0.05)
    (m,) = metrics("run")
    kinds = ("information", "xi_accuracy", "xi_accuracy_uniform_g", "mi", "xi_loss", "return")
    kinds += ("phi_grad_norm",)
    names = {f"{kind}/{population}" for kind in kinds for population in (3, 5)}
    names.add("latent_grad_norm")
    names |= {f"prior/{population}/0/{z}" for population in (3, 5) for z in range(6)}
    assert set(m) == PARENTS | names | {"prior_distance"}
    psi = script(MRA).LatentPrior(1, script(MRA).Args())
    psi.load_state_dict(state["agent"]["latent_prior"])
    with torch.no_grad():
        priors = [psi((n,)).exp()[0] for n in (3, 5)]
    for n, prior in zip((3, 5), priors):
        assert [m[f"prior/{n}/0/{z}"] for z in range(6)] == pytest.approx(prior.tolist(), abs=1e-6)
        assert 0 < m[f"information/{n}"] < np.log(6) and abs(m[f"mi/{n}"]) < np.log(6)
        for kind in ("xi_accuracy", "xi_accuracy_uniform_g"):
            assert 0 <= m[f"{kind}/{n}"] < 1 + 1e-6
        assert m[f"xi_loss/{n}"] > 0
    distance = float((priors[0] - priors[1]).abs().sum() / 2)
    assert m["prior_distance"] == pytest.approx(distance, abs=1e-6) and distance > 1e-4
    assert m["return"] == pytest.approx((m["return/3"] + m["return/5"]) / 2)
    returns = [float(x["rewards"].sum()) / n / 4 for x, n in zip(replays("run"), (3, 5))]
    assert [m["return/3"], m["return/5"]] == pytest.approx(returns, rel=1e-4)
    assert m["episodes"] == 8, "four of each population"


@pytest.mark.parametrize("apart", [False, True])
def test_distance_of_priors_is_of_types(apart, monkeypatch):
    """In rooms types have other shares in each population: with a z for each type, the same in all
    populations, the distance is 0; it is 1 if no type has the same z in two of them."""
    names = ("1,3", "3,3", "6,3")
    z = {name: (k, (k + 1) % 3) if apart else (0, 1) for k, name in enumerate(names)}

    def forward(psi, population):
        chosen = torch.tensor(z[",".join(map(str, population))])
        return torch.nn.functional.one_hot(chosen, 6).float().log().clamp(min=-99)

    monkeypatch.setattr(script(MRA).LatentPrior, "forward", forward)
    monkeypatch.setattr(script(MRA), "update", lambda *given: {})
    flags = ("--task", "rooms", "--populations", *names, "--log-every", 3 * VISIT)
    run(MRA, "run", 3 * VISIT, *flags)
    assert metrics("run")[-1]["prior_distance"] == pytest.approx(float(apart), abs=1e-6)


def test_log_of_the_latent_in_pacman():
    run(MRA, "run", 160, "--task", "pacman", "--populations", "2,1", "1,2", "--log-every", 160)
    (m,) = metrics("run")
    for population in ("2,1", "1,2"):
        for kind in (0, 1):
            assert sum(m[f"prior/{population}/{kind}/{z}"] for z in range(6)) == pytest.approx(1)
            assert f"return/{population}/{kind}" in m
        assert f"return/{population}" in m


@pytest.mark.parametrize(
    "name, flags, more",
    [
        (MADDPG, "", set()),
        (MRA, "--populations 3", {"information/3", "mi/3", "phi_grad_norm/3"}),
        (MRA, "--populations 3 --latent-size 1", {"information/3"}),
        (MRA, "--populations 3 --phi-gradient actor", {"information/3"}),
    ],
)
def test_log_without_populations_to_tell_apart(name, flags, more):
    run(name, "run", 80, *flags.split(), "--log-every", 80)
    (m,) = metrics("run")
    assert set(m) == PARENTS | {"return/3"} | more
    if "--latent-size 1" in flags:
        assert abs(m["information/3"]) < 1e-6


def test_xi_is_measured(monkeypatch):
    """xi's accuracy is that of its guesses: an xi that always says the second population is right
    in that one alone; the line itself changes nothing."""
    module = script(MRA)

    class Says(module.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            for p in self.population_classifier.parameters():
                p.data.zero_()
            self.population_classifier.out.bias.data[..., 1] = 1.0

    monkeypatch.setattr(module, "Agent", Says)
    run(MRA, "run", 2 * VISIT, "--log-every", 2 * VISIT, "--learning-rate", 0)
    (m,) = metrics("run")
    for kind in ("xi_accuracy", "xi_accuracy_uniform_g"):
        assert [m[f"{kind}/{n}"] for n in (3, 5)] == pytest.approx([0, 1], abs=1e-6)
    losses = [m[f"xi_loss/{n}"] for n in (3, 5)]
    assert losses == pytest.approx([np.log(1 + np.e), np.log(1 + np.e) - 1], abs=1e-5)


def test_xi_is_measured_with_both_graphs(monkeypatch):
    """An xi that says the second population where the graph is uniform, and else the first."""
    module = script(MRA)
    diagnose = module.diagnose

    def watched(agent, collectors, rng):
        def forward(view, graphs):
            uniform = (graphs == module.uniform_graph(view)).all(-1)  # (Z, M, N)
            return torch.stack([~uniform, uniform], -1).float()

        agent.population_classifier.forward = forward
        found = diagnose(agent, collectors, rng)
        del agent.population_classifier.forward
        return found

    monkeypatch.setattr(module, "diagnose", watched)
    run(MRA, "run", 2 * VISIT, "--log-every", 2 * VISIT)
    (m,) = metrics("run")
    assert [m[f"xi_accuracy/{n}"] for n in (3, 5)] == pytest.approx([1, 0], abs=1e-6)
    assert [m[f"xi_accuracy_uniform_g/{n}"] for n in (3, 5)] == pytest.approx([0, 1], abs=1e-6)


# --- Learning -------------------------------------------------------------------------------------


QUICK = "--learning-rate 3e-3 --phi-learning-rate 3e-4 --polyak .05 --gamma .9 --eval-every 0"
QUICK += " --save-every 0 --log-every 1000000 --final-episodes 300"


def learned(name, steps, *flags):
    """The final evaluation of a run with the preset for CPUs, not compiled, and rates at which
    these small games are learnt sooner."""
    argv = ["--preset", "cpu", "--no-compile"]
    argv += [*QUICK.split(), "--total-timesteps", steps, "--run-dir", "run", *flags]
    assert script(name).main([str(x) for x in argv]) == 0
    return json.loads(Path("run/summary.json").read_text())["eval"]


@pytest.mark.long
def test_maddpg_learns():
    """250 updates of four minibatches. Random players earn 2.4."""
    flags = ("--share-parameters", "--actor-gradient", "expectation", "--population", 3)
    results = learned(MADDPG, 16000, *flags)
    assert results["3 random"]["return"] < 3
    assert results["3"]["return_low"] > 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mra_learns(seed):
    """Better than players who go to the nearest treasure, who earn 13.7; with each z."""
    results = learned(MRA, 48000, "--populations", 3, "--seed", seed)
    bound = results["3 nearest-first"]["return_high"]
    assert 13 < bound < 15
    for player in ("", *(f" z={k}" for k in range(6))):
        assert results[f"3{player}"]["return_low"] > bound


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mra_learns_in_several_populations():
    """In each, and in one that it never met, about as good as players who go to the nearest
    resource. Random players earn half of that."""
    flags = ("--task", "resource", "--populations", 6, 9, 12, "--eval-populations", 10)
    results = learned(MRA, 38400, *flags)
    for m in (6, 9, 12, 10):
        random, scripted = (results[f"{m} {who}"]["return"] for who in ("random", "nearest-first"))
        assert random < 0.6 * scripted
        assert results[f"{m}"]["return"] > 0.9 * scripted, m


@pytest.mark.long
def test_compiled_kernels_stay_compiled(tmp_path):
    """PyTorch gives a kernel eight compiled forms and then runs it eagerly: two types of agents in
    three populations, of which some learn by the actor, need fewer."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no C++ compiler")
    code = (
        "import sys, torch, mra_maddpg_particle as mra\n"
        "from envs.particle import kernels\n"
        "kernels.fits = lambda *tensors: False\n"  # as on a GPU
        "torch._dynamo.config.fail_on_recompile_limit_hit = True\n"
        "sys.exit(mra.main(sys.argv[1:]))\n"
    )
    flags = "--preset cpu --task rooms --populations 3,3 6,3 9,3 --num-envs 8 --hidden-size 8"
    flags += " --latent-size 1 --phi-gradient actor --batch-size 24 --update-every 40"
    flags += f" --total-timesteps 1000 --final-episodes 5 --run-dir {tmp_path / 'run'}"
    command = [sys.executable, "-c", code, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", [MRA, MADDPG, MAAC, EPC])
def test_a_replay_refuses_what_it_would_round(name, tmp_path, monkeypatch):
    """A fork's latent or action that is no integer, say."""
    module = script(name)
    add = module.ReplayBuffer.add

    def with_fractions(self, row, alive):
        add(self, row | {"actions": row["actions"] + 0.5}, alive)

    monkeypatch.setattr(module.ReplayBuffer, "add", with_fractions)
    with pytest.raises(AssertionError, match="the replay has actions as"):
        module.main(tiny(name, tmp_path / "run", 60))


def test_gradients_of_phi_and_psi_are_logged_and_checked(tmp_path, capfd, monkeypatch):
    """A loss may be finite where its gradient is not."""
    module = script(MRA)
    argv = tiny(MRA, tmp_path / "run", 120, "--populations", "3", "4", "--log-every", "60")
    assert module.main(argv) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    assert {"phi_grad_norm/3", "phi_grad_norm/4", "latent_grad_norm"} <= logged
    whole = module.population_loss

    def broken(agent, view, g, log_prior, label):
        loss = whole(agent, view, g, log_prior, label)
        return loss + (0.0 * log_prior.sum()).sqrt()  # 0, with an infinite gradient

    monkeypatch.setattr(module, "population_loss", broken)
    capfd.readouterr()
    assert module.main([*argv[:-2], "--run-dir", str(tmp_path / "other")]) == 1
    assert "latent_grad_norm is not finite" in capfd.readouterr().err
