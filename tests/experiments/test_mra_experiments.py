"""The commands of MRA's figures and tables, on runs of some hundred steps."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import sys

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from toolbox import ROOT, load_script

sys.path.insert(0, str(ROOT / "experiments"))

mra = load_script(ROOT / "mra_maddpg_particle.py")
maddpg = load_script(ROOT / "baselines" / "maddpg_particle.py")
TINY = "--num-envs 4 --batch-size 16 --update-every 20 --inner-steps 1 --total-timesteps 240 "
TINY += "--hidden-size 8 --key-size 4 --final-episodes 4 --eval-episodes 2 --log-every 80 "
TINY += "--save-every 0 --latent-size 3 --eval-every 120"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in resource of several and of one population, two in pacman, one of MADDPG."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        "several-s1": "--task resource --populations 3 4",
        "single-s1": "--task resource --populations 4",
        "single-s2": "--task resource --populations 4 --seed 2",
        "chase-s1": "--task pacman --populations 2,1 3,2",
        "chase-s2": "--task pacman --populations 2,1 3,2 --seed 2",
    }
    for name, own in flags.items():
        argv = f"{TINY} {own} --run-dir {folder / name}".split()
        assert mra.main(argv) == 0
    argv = TINY.replace("--latent-size 3", "--share-parameters").split()
    argv += f"--task pacman --population 3,2 --run-dir {folder / 'parent-s1'}".split()
    assert maddpg.main(argv) == 0
    return folder


def command(name, *words):
    """An experiment's command line, in this process: exit code, standard output and error."""
    module, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    argv = [str(word) for word in words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = module.one_line_errors(lambda: module.main(tyro.cli(module.Study, args=argv)))
    return code, out.getvalue(), err.getvalue()


def test_figures_9_10_and_11(runs, tmp_path):
    """All files are pictures, and the curves are what the run has logged."""
    names = ("several-s1", "single-s1", "single-s2")
    code, _, stderr = command("mra_figures", *(runs / x for x in names), "--out", tmp_path / "f")
    assert code == 0, stderr
    for number in (9, 10, 11):
        picture = np.asarray(Image.open(tmp_path / f"f-{number}.png").convert("RGB"))
        assert picture.std() > 10, "blank"
    rows = list(csv.DictReader((tmp_path / "f-9.csv").open()))
    log = [json.loads(x) for x in (runs / "several-s1" / "metrics.jsonl").read_text().splitlines()]
    for figure, of in (("information", "3"), ("xi_loss", "4"), ("xi_accuracy", "3")):
        wanted = [x[f"{figure}/{of}"] for x in log if f"{figure}/{of}" in x]
        found = [float(r["value"]) for r in rows if (r["figure"], r["of"]) == (figure, of)]
        assert len(found) == len(wanted) >= 2
        assert np.allclose(found, wanted, rtol=1e-5)
    returns = {r["of"] for r in rows if r["figure"] == "return"}
    assert returns == {f"{m} z={z}" for m in (3, 4) for z in range(3)}


def test_ways_begin_alike_and_depend_on_the_run(runs):
    """Fig. 10: one beginning for all, and other agents go other ways."""
    figures, agents = map(importlib.import_module, ("mra_figures", "particle_agents"))
    study = figures.Study(runs=(), seed=3)
    ways = [
        figures.walk(agents.load(runs / name), study, "4", z)
        for name, z in (("several-s1", 0), ("several-s1", 0), ("single-s1", 0), ("single-s2", 0))
    ]
    for way in ways:
        assert way.shape == (21, 4, 2)
        assert np.array_equal(way[0], ways[0][0])
    assert np.array_equal(ways[0], ways[1])
    assert not np.array_equal(ways[2], ways[3])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["{runs}/single-s1"], "None of these runs has several populations"),
        (["{runs}/parent-s1"], "without latents"),
        (["{runs}/several-s1", "{runs}/chase-s1"], "is a run of pacman"),
        (["{runs}/several-s1", "--population", "x"], "A population is"),
        (["{runs}/several-s1", "--agent", "9"], "has fewer"),
        (["{runs}/several-s1", "--edge", "2"], "--edge 2"),
        (["{runs}/none"], "is no run directory"),
    ],
)
def test_figures_refuse(runs, tmp_path, words, sentence):
    words = [word.format(runs=runs) for word in words]
    code, _, stderr = command("mra_figures", *words, "--out", tmp_path / "f")
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert sentence in stderr
    assert not list(tmp_path.iterdir())


def test_cross_play(runs, tmp_path):
    """Against oneself it is the run's own play; the table's means are the rows'."""
    play, agents = map(importlib.import_module, ("cross_play_particle", "particle_agents"))
    names = ("chase-s1", "chase-s2", "parent-s1")
    words = [*(runs / x for x in names), "--population", "3,2", "--episodes", 6]
    code, text, stderr = command("cross_play_particle", *words, "--out", tmp_path / "x")
    assert code == 0, stderr
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert len(rows) == 9
    group = [float(r["pac_man"]) for r in rows if r["pac_men"] == r["ghosts"] == "chase"]
    assert len(group) == 4
    assert f"| chase | chase | {np.mean(group):.2f} | {min(group):.2f}, {max(group):.2f}" in text
    # By hand: pac-men of one, ghosts of another.
    study = play.Study(runs=(), population="3,2", episodes=6)
    a, b = (agents.load(runs / x) for x in ("chase-s1", "parent-s1"))
    world = agents.make_world(a, "3,2", 6, study.seed)
    players = a.player(world.game, 6, study.seed), b.player(world.game, 6, study.seed + 1)
    world.reset()
    total = torch.zeros(6, 5)
    alive = torch.ones(6, 1, dtype=torch.bool)
    for _ in range(20):
        first, second = (p(world) for p in players)
        step = world.step(torch.cat((first[:, :3], second[:, 3:]), 1))
        total += step.reward * alive
        alive &= ~step.terminated[:, None]
    (row,) = (r for r in rows if (r["pac_men_run"], r["ghosts_run"]) == ("chase-s1", "parent-s1"))
    assert float(row["pac_man"]) == pytest.approx(float(total[:, :3].mean()), rel=1e-5)
    assert float(row["ghost"]) == pytest.approx(float(total[:, 3:].mean()), rel=1e-5)


def test_cross_play_refuses(runs, tmp_path):
    for words, sentence in (
        ([runs / "several-s1"], "is a run of resource"),
        ([runs / "chase-s1", "--population", "4"], "A population of pacman"),
        ([runs / "chase-s1", "--episodes", "1"], "--episodes 1"),
    ):
        code, _, stderr = command("cross_play_particle", *words, "--out", tmp_path / "x")
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert sentence in stderr


def test_tables_by_seed(runs, tmp_path, capsys):
    """compare_runs on particle runs: curves, a line per run, and a column per group."""
    compare = importlib.import_module("compare_runs")
    both = (runs / "single-s1", runs / "single-s2")
    how = dict(out=tmp_path / "c", curves=("return/4",), every=80)
    compare.main(compare.Comparison(both, by_seed=True, rows=("4", "4 random"), **how))
    evals = [json.loads((run / "summary.json").read_text())["eval"] for run in both]
    x = [e["4"]["return"] for e in evals]
    text = (tmp_path / "c.md").read_text()
    assert "| | single, return |" in text
    assert f"| 4 | {np.mean(x):.2f} ({x[0]:.2f}, {x[1]:.2f}) |" in text
    best = [e[next(k for k in e if k.startswith("4 best z="))]["return"] for e in evals]
    compare.main(compare.Comparison(both, by_seed=True, **how))  # which z is the seed's affair
    cell = f"{np.mean(best):.2f} ({best[0]:.2f}, {best[1]:.2f})"
    assert f"| 4 best z | {cell} |" in (tmp_path / "c.md").read_text()
    compare.main(compare.Comparison(both, **how))
    row = evals[1]["4"]
    cell = f"{row['return']:.2f} [{row['return_low']:.2f}, {row['return_high']:.2f}]"
    assert f"| single-s2 | 4 | {cell} | 4 |" in (tmp_path / "c.md").read_text()


def test_runs_of_the_figures(tmp_path):
    """--dry-run names a command for every run; run for real, a finished one is kept."""
    words = ["--seeds", "1", "2", "--dir", tmp_path / "runs"]
    figures = ["fig2", "fig3", "fig4", "fig5", "fig7", "fig8"]
    code, text, stderr = command("mra_runs", *figures, *words, "--dry-run")
    assert code == 0, stderr
    lines = text.splitlines()
    assert len(lines) == len(set(lines)) == 2 * (3 * 5 + 3 + 3 + 4)
    for line in lines:  # every one is a command that the scripts take
        script, *argv = line.split()[1:]
        if "--adapt" in argv:
            continue
        module = mra if script.startswith("mra") else maddpg
        args = module.parse(module.with_preset(argv))
        assert args.total_timesteps in (240_000, 120_000) and args.num_envs == 64
    adapt = [line for line in lines if "--adapt" in line]
    assert len(adapt) == 6 and all("mra-s1 " in x for x in adapt if "--seed 1 " in x)
    assert not (tmp_path / "runs").exists()


def test_bench_prints_all_tables(capsys):
    """Tiny: the three tables, with the numbers that can be known."""
    bench = importlib.import_module("bench_mra")
    script = load_script(ROOT / "mra_maddpg_particle.py")
    bench.replay_table(script)
    text = capsys.readouterr().out
    sizes = {tuple(x.split(" | ")[:2]): int(x.split(" | ")[2][:-2]) for x in text.splitlines()[3:]}
    # treasure 24: twice 5 x 24 + 2 x 20 floats, actions and z in bytes, rewards, one flag
    assert sizes["| treasure", "24"] == 2 * 4 * (5 * 24 + 40) + 24 * (1 + 1 + 4) + 1 < 1500
    study = bench.Bench(populations=("3", "4"), cpu_seconds=0.2, every=0.1, episodes=2)
    bench.learn(Eager(script), "fast", study)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 1 and all(line.startswith("| fast | ") for line in lines)


class Eager:
    """The script, without --compile."""

    def __init__(self, script):
        self.script = script

    def __getattr__(self, name):
        return getattr(self.script, name)

    def with_preset(self, argv):
        return [x for x in self.script.with_preset(argv) if x != "--compile"]
