"""Same seed, same bits, on the toy world: whether a run goes through, or is stopped and resumed;
in one process or in two."""

import json
import os
import signal
import subprocess
import sys

import pytest
import test_ranks as ranks
import torch
from all_scripts import MELTINGPOT
from runs import (
    BIDIST,
    BOTH,
    MAPPO,
    PATIENCE,
    ROOT,
    STEPS,
    command,
    differences,
    exact,
    metrics,
    resume,
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


# One process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_same_seed_same_bits(name, tmp_path):
    flags = ("--eval-every", 2 * STEPS, "--final-episodes", 3)
    for run_dir, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert script(name).main(tiny(name, run_dir, 4, "--seed", seed, *flags)) == 0
    a, b, c = (tmp_path / run_dir for run_dir in "abc")
    assert differences(exact(a), exact(b)) == []
    assert metrics(a) == metrics(b) and len(metrics(a)) == 4 + 2 + 1
    assert (
        json.loads((a / "summary.json").read_text())["eval"]
        == (json.loads((b / "summary.json").read_text())["eval"])
    )
    # Another seed changes every weight matrix, every generator, and what is logged.
    changed = differences(exact(a), exact(c))
    weights = {k for k in exact(a)["agent"]["actor"] if k.endswith(("weight", "_l0"))}
    weights = {k for k in weights if "bias" not in k and "norm" not in k}
    assert len(weights) >= 7
    for net in ("actor", "critic", "distilled")[: 3 if name == BIDIST else 2]:
        assert {k for k in weights if f"/agent/{net}/{k}" not in changed} == set()
    assert "/ranks/0/rng" in changed and metrics(a) != metrics(c)


@pytest.mark.parametrize("name", BOTH)
def test_every_iteration_learns(name):
    """Without this, equal bits would mean little: networks, moments and generators go on."""
    for iterations in (1, 2):
        assert script(name).main(tiny(name, str(iterations), iterations)) == 0
    changed = differences(exact("1"), exact("2"))
    nets = ["actor", "critic", "actor_optimiser", "critic_optimiser", "value_norm"]
    for part in nets + ["distilled"] * (name == BIDIST):
        assert [x for x in changed if x.startswith(f"/agent/{part}/")], part
    for parts in (["/rng"], ["/state", "actor"], ["/state", "critic"], ["/envs/episode"]):
        own = [x for x in changed if x.startswith("/ranks/0") and all(part in x for part in parts)]
        assert own, parts
    assert {"/iteration", "/timesteps"} < set(changed)


VARIANTS = {
    "plain": "",
    "episode, team": "--v-redraw episode --team-reward",
    "printed": "--clip-centre printed --p 0.5",
    "random": "--reverse-mode random",
    "noise": "--reverse-mode noise --noise-std 0.5",
    "entropy": "--reverse-mode entropy",
    "truncated": "--max-episode-steps 7",
    "plain, mask": "--plain --mask-fictitious --max-episode-steps 7 --v-redraw episode",
    "narrow, k_d": "--distilled-width 0.5 --k-d 2",
    "evaluated": "--eval-every 40 --eval-episodes 2",
    "copied": "--copy-every 2",
    "amp": "--amp",
}


LONG = ("plain", "random", "noise", "entropy", "truncated", "evaluated", "copied", "amp")


@pytest.mark.parametrize("variant", some_long(VARIANTS, *LONG))
def test_six_are_three_and_three(variant, monkeypatch):
    """A distillation after each iteration: forward before the cut, reverse behind it."""
    monkeypatch.setattr(script(BIDIST), "has_bf16", lambda device: True)
    check_cut(BIDIST, VARIANTS[variant].split())


@pytest.mark.parametrize("flags", ["", "--max-episode-steps 7 --team-reward --eval-every 40"])
def test_six_are_three_and_three_mappo(flags):
    check_cut(MAPPO, flags.split())


@pytest.mark.parametrize("name", MELTINGPOT)
def test_a_line_tells_of_all_iterations_since_the_last(name):
    """--log-every two iterations: means of what their two lines have, over all of their episodes;
    both of BiDist's phases. So, too, in a run that is cut between two lines."""
    few = ("--max-episode-steps", 7)
    assert script(name).main(tiny(name, "each", 4, *few)) == 0
    assert script(name).main(tiny(name, "two", 4, *few, "--log-every", 2 * STEPS)) == 0
    each, two = (
        [line for line in metrics(run) if "reward_per_1000/all" in line] for run in ("each", "two")
    )
    assert len(each) == 4 and len(two) == 2
    for pair, line in zip((each[:2], each[2:]), two):
        assert line.keys() == pair[0].keys() | pair[1].keys()
        assert name != BIDIST or {"forward/kl_before", "reverse/kl_before"} <= line.keys()
        for key in line.keys() - {"timesteps", "memory/actors", "memory/ranks"}:
            parts = [each_line[key] for each_line in pair if key in each_line]
            if key.startswith("episode/"):  # the iterations differ in their numbers of episodes
                assert min(parts) <= line[key] <= max(parts), key
            else:
                mean = sum(parts) / len(parts)
                assert line[key] == pytest.approx(mean, rel=1e-5, abs=1e-6), key
    assert script(name).main(tiny(name, "cut", 3, *few, "--log-every", 2 * STEPS)) == 0
    assert script(name).main(resume("cut", 4)) == 0
    assert metrics("cut") == metrics("two")


def check_cut(name, flags):
    assert script(name).main(tiny(name, "whole", 6, *flags)) == 0
    assert script(name).main(tiny(name, "cut", 3, *flags)) == 0
    before = len(metrics("cut"))
    assert script(name).main(resume("cut", 6)) == 0
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    assert exact("cut")["timesteps"] == 6 * STEPS
    if name == BIDIST and "--copy-every" not in flags:
        phases = [{k.split("/")[0] for k in m} & {"forward", "reverse"} for m in metrics("cut")]
        assert set().union(*phases[:before]) and set().union(*phases[before:])


def test_saving_and_evaluating_change_nothing():
    """What looks at a run must not draw from its generators."""
    assert script(BIDIST).main(tiny(BIDIST, "a", 4)) == 0
    looks = ("--save-every", 1, "--eval-every", STEPS, "--eval-episodes", 2, "--final-episodes", 2)
    assert script(BIDIST).main(tiny(BIDIST, "b", 4, *looks)) == 0
    assert differences(exact("a"), exact("b")) == []
    assert metrics("a") == [
        m for m in metrics("b") if not any(k.startswith(("eval/", "final/")) for k in m)
    ]


@pytest.mark.parametrize("name", BOTH)
def test_evaluation_alone_repeats(name, capfd):
    """Twice the same table, which is also the one at the end of training."""
    argv = tiny(name, "run", 2, "--final-episodes", 5)
    assert script(name).main(argv) == 0
    trained = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    for path in ("run", "run", f"run/checkpoint-{2 * STEPS}.pt"):
        assert script(name).main(["--eval-only", path]) == 0
        out = capfd.readouterr().out
        assert [line for line in out.splitlines() if line.startswith("|")] == trained
    assert len(trained) > 4 and "self-play" in trained[2]
    assert script(name).main(["--eval-only", "run", "--final-episodes", "6"]) == 0
    assert capfd.readouterr().out != out
    # A population beside itself, and beside another script's.
    assert script(name).main(["--eval-only", "run", "--background", "run"]) == 0
    assert "v run " in capfd.readouterr().out


# Two processes ----------------------------------------------------------------------------------

FLAGS = {
    "baselines.randnet_meltingpot": "--clean-share 0.5",
    "baselines.pp_meltingpot": "--history-share 0.7 --memory 4",
    "baselines.rpm_meltingpot": "--history-share 0.7 --rank-width 10",
}


@pytest.mark.long
@pytest.mark.parametrize("name", MELTINGPOT)
def test_two_processes(name):
    """Every script: weights, moments and memories of past actors are the same in both, which draw
    their own actions in their own worlds. Six iterations are three, after which one process is told
    to stop, and three."""
    flags = FLAGS.get(name, "").split()
    whole, cut = (tiny(name, run_dir, 12, *flags) for run_dir in ("whole", "cut"))
    ranks.launch([(name, whole, 0), (name, cut, 6 * STEPS), (name, ["--resume", "cut"], 0)])
    for number, iterations in enumerate((6, 3, 3)):
        ours, theirs = (ranks.notes(number, rank) for rank in (0, 1))
        ranks.check_alike(ours, theirs)
        assert ours["iterations"] == iterations
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    assert exact("whole")["timesteps"] == 12 * STEPS

    assert ("memory" in ours["parts"]) == ("history" in FLAGS.get(name, ""))

    # Who plays, and v, are each process's own; psi is one for both.
    apart = {x.split("/")[1] for x in differences(*exact("whole")["ranks"])}
    assert {"rng", "envs", "state"} <= apart
    own = {BIDIST, "baselines.pp_meltingpot", "baselines.rpm_meltingpot"}
    assert ("method_rng" in apart) == (name in own) and "psi" not in apart


# Runs a script as the command line does, and notes what Adam does with gradients in this process:
# hashes of the local gradients, of those used, and of the weights after each step; the first
# steps' gradients themselves, too.
WATCH = """
import hashlib, json, os, runpy, sys
import torch

rank, folder, script = os.environ["RANK"], *sys.argv[1:3]
file = open(f"{folder}/rank-{rank}.jsonl", "a", buffering=1)
local, steps = {}, 0

def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])

def sha(x):
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()

class Watched(torch.optim.Adam):
    def __init__(self, params, *args, **kwargs):
        self.weights = list(params)
        super().__init__(self.weights, *args, **kwargs)
        for x in self.weights:  # called when backward() has added up a gradient
            x.register_post_accumulate_grad_hook(lambda x: local.update({x: x.grad.clone()}))

    def step(self):
        global steps
        own, used = flat(local[x] for x in self.weights), flat(x.grad for x in self.weights)
        if steps < 6:
            torch.save((own, used), f"{folder}/rank-{rank}-step-{steps}.pt")
        steps += 1
        super().step()
        line = {"local": sha(own), "used": sha(used), "weights": sha(flat(self.weights))}
        file.write(json.dumps(line) + "\\n")

torch.optim.Adam = Watched
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def launch(*argv):
    """Two processes under torchrun, in the current directory."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [str(x) for x in (*line, *argv)]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=2 * PATIENCE)


def notes(rank):
    with open(f"rank-{rank}.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.long
def test_two_processes_step_alike(tmp_path):
    """Every step of BiDist's six iterations. No gradient is clipped here, so that what is used can
    be held against what each process had."""
    (tmp_path / "watch.py").write_text(WATCH)
    flags = ("--max-grad-norm", 1e9)
    done = launch("watch.py", ".", command(BIDIST)[-1], *tiny(BIDIST, "whole", 12, *flags))
    assert done.returncode == 0, done.stderr[-3000:]

    assert [m["timesteps"] for m in metrics("whole")] == [2 * STEPS * n for n in range(1, 7)]
    first, second = exact("whole")["ranks"]
    apart = differences(first, second)
    for parts in (["/rng"], ["/method_rng"], ["/envs/colour"], ["/state", "actor"]):
        assert [x for x in apart if all(part in x for part in parts)], parts

    # Both took the same steps to the same weights, with gradients of different data.
    ours, theirs = notes(0), notes(1)
    assert len(ours) == len(theirs) == 6 * (2 + 2 + 2)  # actor, critic and distilled
    for a, b in zip(ours, theirs):
        assert a["weights"] == b["weights"] and a["used"] == b["used"]
        assert a["local"] != b["local"] and a["local"] != a["used"]
    for step in range(6):
        (a, used), (b, _) = (torch.load(f"rank-{rank}-step-{step}.pt") for rank in (0, 1))
        assert torch.allclose((a + b) / 2, used, rtol=1e-4, atol=1e-8) and used.norm() > 0

    # One process alone does something else; only the first of two writes.
    assert script(BIDIST).main(tiny(BIDIST, "alone", 6, *flags)) == 0
    apart = differences(exact("alone")["agent"], exact("whole")["agent"])
    assert {"actor", "critic", "distilled"} <= {x.split("/")[1] for x in apart}
    assert len(list((tmp_path / "whole").glob("events.*"))) == 1
    kinds = {path.name.split("-")[0].split(".")[0] for path in (tmp_path / "whole").iterdir()}
    assert kinds == {"args", "metrics", "checkpoint", "checkpoints", "events", "lock", "summary"}
    expected = {"alone", "whole", "watch.py"}
    assert {x.name for x in tmp_path.iterdir() if not x.name.startswith("rank-")} == expected


@pytest.mark.long
@pytest.mark.parametrize("mode", ["random", "noise"])
def test_two_processes_perturb_phi_alike(mode, tmp_path):
    (tmp_path / "watch.py").write_text(WATCH)
    argv = tiny(BIDIST, "run", 8, "--reverse-mode", mode)
    done = launch("watch.py", ".", command(BIDIST)[-1], *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [x["weights"] for x in notes(0)] == [x["weights"] for x in notes(1)] != []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", BOTH)
def test_ten_launches_ten_clean_exits(name):
    """gloo used to die now and then in the interpreter's exit."""
    done = [launch(command(name)[-1], *tiny(name, f"run{i}", 4)) for i in range(10)]
    assert [x.returncode for x in done] == [0] * 10, [x.stderr[-500:] for x in done]
    assert all(differences(exact("run0"), exact(f"run{i}")) == [] for i in range(1, 10))
