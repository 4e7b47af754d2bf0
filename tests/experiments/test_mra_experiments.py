"""The commands of MRA's figures and tables, on runs of some hundred steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up import command, experiment, rows
from particle_tools import sharpen
from PIL import Image

pytestmark = pytest.mark.long  # the runs that its tests read take a quarter of a minute
mra, runs_module, criteria = (experiment(name) for name in ("mra", "runs", "criteria"))
script, parent, epc = (
    runs_module.load_script(f"{name}_particle") for name in ("mra_maddpg", "maddpg", "epc")
)
TINY = "--num-envs 4 --batch-size 16 --update-every 20 --inner-steps 1 --total-timesteps 240 "
TINY += "--hidden-size 8 --key-size 4 --final-episodes 4 --eval-episodes 2 --log-every 80 "
TINY += "--save-every 0 --latent-size 3 --eval-every 120"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in resource of several and of one population, one that adapts, two in pacman, one of
    MADDPG and EPC."""
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
        assert script.main(argv) == 0
    argv = f"--adapt {folder / 'several-s1'} --population 4 --total-timesteps 40 --final-episodes 4"
    argv += " --eval-episodes 2 --eval-every 0"
    assert script.main(f"{argv} --run-dir {folder / 'adapted-s1'}".split()) == 0
    argv = TINY.replace("--latent-size 3", "--share-parameters").split()
    argv += f"--task pacman --population 3,2 --run-dir {folder / 'parent-s1'}".split()
    assert parent.main(argv) == 0
    argv = TINY.replace("--latent-size 3", "--sets 2 --tournament-episodes 2").split()
    argv += f"--task pacman --populations 2,1 3,2 --run-dir {folder / 'epc-s1'}".split()
    assert epc.main(argv) == 0
    return folder


def test_figures_9_10_and_11(runs, tmp_path):
    """All files are pictures, and the curves are what the run has logged."""
    names = ("several-s1", "single-s1", "single-s2")
    code, _, stderr = command("mra", "figures", *(runs / x for x in names), "--out", tmp_path / "f")
    assert code == 0, stderr
    for number in (9, 10, 11):
        picture = np.asarray(Image.open(tmp_path / f"f-{number}.png").convert("RGB"))
        assert picture.std() > 10, "blank"
    found_rows = rows(tmp_path / "f-9.csv")
    log = [json.loads(x) for x in (runs / "several-s1" / "metrics.jsonl").read_text().splitlines()]
    for figure, of in (("information", "3"), ("xi_loss", "4"), ("xi_accuracy", "3")):
        wanted = [x[f"{figure}/{of}"] for x in log if f"{figure}/{of}" in x]
        found = [float(r["value"]) for r in found_rows if (r["figure"], r["of"]) == (figure, of)]
        assert len(found) == len(wanted) >= 2
        assert np.allclose(found, wanted, rtol=1e-5)
    returns = {r["of"] for r in found_rows if r["figure"] == "return"}
    assert returns == {f"{m} z={z}" for m in (3, 4) for z in range(3)}


def test_ways_begin_alike_and_depend_on_the_run(runs):
    """Fig. 10: one beginning for all, and other agents go other ways."""
    study = mra.Figures(runs=(), seed=3)
    ways = [
        mra.walk(mra.load(runs_module.Run(runs / name)), study, "4", z)
        for name, z in (("several-s1", 0), ("several-s1", 0), ("single-s1", 0), ("single-s2", 0))
    ]
    for way in ways:
        assert way.shape == (21, 4, 2)
        assert np.array_equal(way[0], ways[0][0])
    assert np.array_equal(ways[0], ways[1])
    assert not np.array_equal(ways[2], ways[3])


def test_ways_and_graphs_are_of_each_z(runs):
    """Figs. 10, 11: with policies that z changes, other ways; and an edge for each weight."""
    trained, study = mra.load(runs_module.Run(runs / "several-s1")), mra.Figures(runs=(), seed=3)
    sharpen(trained.agent.attention, 3)
    sharpen(trained.agent.actor, 3, seed=1)
    ways = [mra.walk(trained, study, "4", z) for z in range(3)]
    assert not np.array_equal(ways[0], ways[1]) and not np.array_equal(ways[1], ways[2])
    seen, view = [], trained.agent.view

    def watched(game, obs, z):
        seen.append(z)
        return view(game, obs, z)

    trained.agent.view = watched
    figure = mra.draw_graphs(trained, study, "4")
    assert [x.unique().tolist() for x in seen] == [[0], [1], [2]]
    shown = [[line for line in x.lines if line.get_color() == "tab:red"] for x in figure.axes[:3]]
    assert all(shown) and len({tuple(x.get_linewidth() for x in own) for own in shown}) == 3


def test_returns_are_less_their_mean_over_z():
    """Fig. 9: a line per z of the population, about 0."""
    rows = [
        {"figure": "return", "of": f"{m} z={z}", "timesteps": 1000 * t, "value": 10.0 * m + z * t}
        for m in (3, 4)
        for z in (0, 1)
        for t in (1, 2)
    ]
    figure, axis = mra.plt.subplots()
    mra.draw_returns(axis, rows, "return", "3", "C0")
    assert [line.get_ydata().tolist() for line in axis.lines] == [[-0.5, -1.0], [0.5, 1.0]]
    assert [list(line.get_xdata()) for line in axis.lines] == [[1, 2], [1, 2]]
    mra.plt.close(figure)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["{runs}/single-s1"], "None of these runs has several populations"),
        (["{runs}/parent-s1"], "without latents"),
        (["{runs}/several-s1", "{runs}/chase-s1"], "is a run of pacman"),
        (["{runs}/several-s1", "{runs}/adapted-s1"], "adapted-s1 is an adapted run"),
        (["{runs}/several-s1", "--population", "x"], "A population is"),
        (["{runs}/several-s1", "--agent", "9"], "has fewer"),
        (["{runs}/several-s1", "--edge", "2"], "--edge 2"),
        (["{runs}/none"], "is no run directory"),
    ],
)
def test_figures_refuse(runs, tmp_path, words, sentence):
    words = [word.format(runs=runs) for word in words]
    code, _, stderr = command("mra", "figures", *words, "--out", tmp_path / "f")
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert sentence in stderr
    assert not list(tmp_path.iterdir())


def test_cross_play(runs, tmp_path):
    """Against oneself it is the run's own play; the table's means are the rows'."""
    names = ("chase-s1", "chase-s2", "parent-s1")
    words = [*(runs / x for x in names), "--population", "3,2", "--episodes", 6]
    code, text, stderr = command("mra", "cross-play", *words, "--out", tmp_path / "x")
    assert code == 0, stderr
    found_rows = rows(tmp_path / "x.csv")
    assert len(found_rows) == 9
    group = [float(r["pac_man"]) for r in found_rows if r["pac_men"] == r["ghosts"] == "chase"]
    assert len(group) == 4
    assert f"| chase | chase | {np.mean(group):.2f} | {min(group):.2f}, {max(group):.2f}" in text
    # By hand: pac-men of one, ghosts of another.
    a, b = (mra.load(runs_module.Run(runs / x)) for x in ("chase-s1", "parent-s1"))
    world = mra.make_world(a, "3,2", 6, 1)
    players = [x.script.load_player(str(x.run.path), 1 + k) for k, x in enumerate((a, b))]
    world.reset()
    total = torch.zeros(6, 5)
    alive = torch.ones(6, 1, dtype=torch.bool)
    for _ in range(20):
        first, second = (p(world) for p in players)
        step = world.step(torch.cat((first[:, :3], second[:, 3:]), 1))
        total += step.reward * alive
        alive &= ~step.terminated[:, None]
    (row,) = (
        r for r in found_rows if (r["pac_men_run"], r["ghosts_run"]) == ("chase-s1", "parent-s1")
    )
    assert float(row["pac_man"]) == pytest.approx(float(total[:, :3].mean()), rel=1e-5)
    assert float(row["ghost"]) == pytest.approx(float(total[:, 3:].mean()), rel=1e-5)
    # Length and flags of both, as claims.py compares them with an arm's command line.
    assert (row["pac_men_steps"], row["ghosts_steps"]) == ("240", "240")
    line = f"mra_maddpg_particle.py --task pacman --populations 2,1 3,2 {TINY}"
    wanted = criteria.read_arm(line).wanted | {"script": "mra_maddpg_particle"}
    assert row["pac_men_flags"] == criteria.flags_text(wanted)
    assert row["ghosts_flags"].startswith("maddpg_particle --task pacman --population 3,2 ")


def test_tables_of_cross_play():
    """Means over pairs of runs divided by the largest mean, not by the best pair; none below 0."""
    earned = {"aa": (4.0, 8.0), "ab": (3.0, 3.0), "ba": (1.0, 2.0), "bb": (2.4, 2.4)}
    found = [
        {"pac_men": a, "ghosts": b, "pac_man": x, "ghost": -x}
        for (a, b), each in earned.items()
        for x in each
    ]
    pac_men, ghosts = mra.tables(found).split("Return per ghost and episode")
    assert "| a | a | 6.00 | 4.00, 8.00 | 2 | 1.00 |" in pac_men
    assert "| a | b | 3.00 | 3.00, 3.00 | 2 | 0.50 |" in pac_men
    assert "| b | a | 1.50 | 1.00, 2.00 | 2 | 0.25 |" in pac_men
    assert "| b | a | -1.50 | -2.00, -1.00 | 2 | - |" in ghosts


@pytest.mark.parametrize("population", ["3,2", "2,4"])
def test_cross_play_of_epc(population, runs, tmp_path):
    """Its best sets, in a population that it has not met with copies."""
    names = ("chase-s1", "epc-s1")
    words = [*(runs / x for x in names), "--population", population, "--episodes", 6]
    code, text, stderr = command("mra", "cross-play", *words, "--out", tmp_path / "x")
    assert code == 0 and "| epc | chase |" in text, stderr
    assert mra.load(runs_module.Run(runs / "epc-s1")).populations == ("2,1", "3,2")
    world = epc.make_envs(epc.load_agent(str(runs / "epc-s1"))[0], population, 6, 1)
    ours, theirs = (
        epc.load_player(str(runs / "epc-s1"), 1),
        script.load_player(str(runs / names[0]), 2),
    )
    returns = mra.play(world, mra.together(ours, theirs)).mean(0)
    (row,) = (
        r for r in rows(tmp_path / "x.csv") if (r["pac_men"], r["ghosts"]) == ("epc", "chase")
    )
    assert float(row["pac_man"]) == pytest.approx(float(returns[0]), rel=1e-5)
    assert float(row["ghost"]) == pytest.approx(float(returns[1]), rel=1e-5)


def test_cross_play_of_rl2(tmp_path):
    """Its policy plays by its memory, beside any other's."""
    rl2 = runs_module.load_script("rl2_particle")
    argv = "--task pacman --populations 2,1 3,2 --num-envs 4 --rnn-size 6 --hidden-size 8 "
    argv += f"--total-timesteps 4 --epochs 1 --final-episodes 0 --run-dir {tmp_path / 'rl2-s1'}"
    assert rl2.main(argv.split()) == 0
    words = [tmp_path / "rl2-s1", "--population", "3,2", "--episodes", 6, "--out", tmp_path / "x"]
    code, _, stderr = command("mra", "cross-play", *words)
    assert code == 0, stderr
    (row,) = rows(tmp_path / "x.csv")
    trained = mra.load(runs_module.Run(tmp_path / "rl2-s1"))
    assert trained.populations == ("2,1", "3,2")
    players = [rl2.load_player(str(tmp_path / "rl2-s1"), seed) for seed in (1, 2)]
    returns = mra.play(mra.make_world(trained, "3,2", 6, 1), mra.together(*players)).mean(0)
    found = [float(row["pac_man"]), float(row["ghost"])]  # six digits
    assert found == pytest.approx(returns.tolist(), rel=1e-5)


@pytest.mark.parametrize("flags", ["", "--share-parameters"])
def test_cross_play_of_maac(flags, runs, tmp_path):
    """Its policies beside any other's; they read places of 3 + 2 agents, and play no others."""
    maac = runs_module.load_script("maac_particle")
    argv = "--task pacman --population 3,2 --num-envs 4 --batch-size 16 --hidden-size 8 --heads 2 "
    argv += f"--total-timesteps 240 --final-episodes 0 --run-dir {tmp_path / 'maac-s1'} {flags}"
    assert maac.main(argv.split()) == 0
    words = [tmp_path / "maac-s1", runs / "chase-s1", "--out", tmp_path / "x", "--episodes", 6]
    code, _, stderr = command("mra", "cross-play", *words, "--population", "3,2")
    assert code == 0, stderr
    found_rows = rows(tmp_path / "x.csv")
    assert len(found_rows) == 4
    world = maac.make_envs(maac.load_agent(str(tmp_path / "maac-s1"))[0], "3,2", 6, 1)
    players = [maac.load_player(str(tmp_path / "maac-s1"), 1)]
    players += [script.load_player(str(runs / "chase-s1"), 2)]
    returns = mra.play(world, mra.together(*players)).mean(0)
    (row,) = (r for r in found_rows if (r["pac_men"], r["ghosts"]) == ("maac", "chase"))
    found = [float(row["pac_man"]), float(row["ghost"])]
    assert found == pytest.approx(returns.tolist(), rel=1e-5)
    code, _, stderr = command("mra", "cross-play", *words, "--population", "2,4")
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert f"{tmp_path / 'maac-s1'} " in stderr and "it plays 3,2 only" in stderr


def test_cross_play_refuses(runs, tmp_path):
    worlds = {"sparse": "--no-shaping", "short": "--max-episode-steps 5"}
    for name, flag in worlds.items():
        argv = f"{TINY} --task pacman --populations 2,1 --total-timesteps 4 --final-episodes 0"
        assert script.main(f"{argv} {flag} --run-dir {tmp_path / name}".split()) == 0
    for words, sentence in (
        ([runs / "several-s1"], "is a run of resource"),
        ([runs / "chase-s1", tmp_path / "sparse", "--population", "3,2"], "differ in --shaping"),
        ([tmp_path / "short", runs / "epc-s1", "--population", "3,2"], "differ in --max-episode"),
        ([runs / "chase-s1", "--population", "4"], "A population of pacman"),
        ([runs / "chase-s1", "--episodes", "1"], "--episodes 1"),
    ):
        code, _, stderr = command("mra", "cross-play", *words, "--out", tmp_path / "x")
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert sentence in stderr


def test_tables_by_seed(runs, tmp_path):
    """compare.py on particle runs: curves, a line per run, and a column per group."""
    both = (runs / "single-s1", runs / "single-s2")
    how = ("--curves", "return/4", "--every", 80, "--out", tmp_path / "c")
    command("compare", *both, *how, "--by-seed", "--rows", "4", "4 random")
    evals = [json.loads((run / "summary.json").read_text())["eval"] for run in both]
    x = [e["4"]["return"] for e in evals]
    text = (tmp_path / "c.md").read_text()
    assert "| | single, return |" in text
    assert f"| 4 | {np.mean(x):.2f} ({x[0]:.2f}, {x[1]:.2f}) |" in text
    best = [e[next(k for k in e if k.startswith("4 best z="))]["return"] for e in evals]
    command("compare", *both, *how, "--by-seed")  # which z is the seed's affair
    cell = f"{np.mean(best):.2f} ({best[0]:.2f}, {best[1]:.2f})"
    assert f"| 4 best z | {cell} |" in (tmp_path / "c.md").read_text()
    command("compare", *both, *how)
    row = evals[1]["4"]
    cell = f"{row['return']:.2f} [{row['return_low']:.2f}, {row['return_high']:.2f}]"
    assert f"| single-s2 | 4 | {cell} | 4 |" in (tmp_path / "c.md").read_text()


def train_source(run_dir):
    """A tiny run in the world and by the method that its name says."""
    task, method, _ = run_dir.name.split("-")
    module = {"mra": script, "epc": epc}.get(method) or runs_module.load_script("rl2_particle")
    small = {"treasure": "2 3", "pacman": "2,1 3,2"}[task]
    flags = "--sets 2 --tournament-episodes 2" if method == "epc" else "--latent-size 3"
    flags = TINY.replace("--latent-size 3", flags)
    if method == "rl2":
        flags = "--num-envs 4 --rnn-size 6 --hidden-size 8 --total-timesteps 4 --epochs 1"
    flags += f" --task {task} --populations {small} --eval-every 0 --final-episodes 0"
    assert module.main([*flags.split(), "--run-dir", str(run_dir)]) == 0


def test_runs_of_the_figures(tmp_path):
    """--dry-run names a command for every run, which the scripts take; and they take those of the
    second stage when the first is there. EPC's go on with its agents."""
    words = ["--seeds", "1", "2", "--dir", tmp_path / "my runs", "--dry-run"]
    figures = ["fig2", "fig3", "fig4", "fig5", "fig7", "fig8"]
    code, text, stderr = command("mra", "train", *figures, *words)
    assert code == 0, stderr
    lines, later, named = [shlex.split(line) for line in text.splitlines()], [], {}
    # in each world six of fig. 2, uni, Algorithm 4, EPC, RL2, five for each target; three of fig.
    # 7, one of 8
    assert len(lines) == len(set(map(tuple, lines))) == 2 * (3 * (6 + 4) + 3 * 5 + 3 + 1)
    for words in lines:
        path, *argv = words[1:]
        assert argv[1].startswith(str(tmp_path / "my runs"))
        if "--adapt" in argv:
            source = argv[argv.index("--adapt") + 1]
            method = Path(path).stem.partition("_")[0]
            assert source.endswith(f"-{method}-s{argv[argv.index('--seed') + 1]}")
            later.append((path, argv, Path(source)))
            continue
        module = runs_module.load_script(Path(path).stem)
        args = runs_module.script_args(module, argv)
        assert args.total_timesteps in (240_000, 120_000) and args.preset == "cpu"
        named[Path(args.run_dir).name] = args
    assert len(later) == 2 * 3 * 3
    assert named["resource-of-2-s1"].populations == ("6", "12")  # fig. 8
    for form in ("option", "concat", "bilinear"):
        assert named[f"resource-3-{form}-s2"].representation == form
        assert named[f"resource-3-{form}-s2"].populations == ("6", "9", "12")
    assert all(args.shaping != ("sparse" in name) for name, args in named.items())
    for _, argv, _ in later:
        assert ("--no-shaping" in argv) == ("sparse" in argv[1])
    assert not (tmp_path / "my runs").exists()
    for path, argv, source in later[:9]:  # of seed 1
        if not source.exists():
            train_source(source)
        module = runs_module.load_script(Path(path).stem)
        args = module.read(argv)
        assert args.task == source.name.partition("-")[0] and args.total_timesteps == 120_000
        if module is epc:
            short = "--total-timesteps 8 --num-envs 2 --batch-size 4 --update-every 4 --no-compile"
            short += " --inner-steps 1 --buffer-size 100 --tournament-episodes 2 --final-episodes 0"
            assert epc.main([*argv, *short.split()]) == 0
            assert epc.load_agent(args.run_dir)[0].populations == args.populations


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "at least one figure"),
        (("fig2", "--seeds"), "--seeds is empty"),
        (("fig2", "--tasks"), "--tasks is empty"),
        (("fig4", "--tasks", "resource"), "fig4 has no runs in --tasks resource."),
    ],
)
def test_nothing_to_train_is_refused(words, sentence):
    code, text, stderr = command("mra", "train", *words, "--dry-run")
    assert (code, text, stderr.count("\n")) == (2, "", 1) and sentence in stderr


def test_fig_4_trains_nothing_that_is_not_adapted(tmp_path):
    """Nobody adapts in resource, which is among the default --tasks."""
    code, text, _ = command("mra", "train", "fig4", "--seeds", 1, "--dir", tmp_path, "--dry-run")
    names = {shlex.split(line)[3].rpartition("/")[2] for line in text.splitlines()}
    sources = {shlex.split(x)[5].rpartition("/")[2] for x in text.splitlines() if "--adapt" in x}
    assert code == 0 and len(names) == 2 * 3 + 3 * 5
    assert not [name for name in names if name.startswith("resource")]
    assert sources == {f"{t}-{m}-s1" for t in ("treasure", "pacman") for m in ("mra", "epc", "rl2")}


def test_a_seed_that_is_named_twice_is_trained_once(tmp_path):
    words = ("train", "fig7", "--dir", tmp_path, "--dry-run", "--seeds")
    once = command("mra", *words, 1, 2)
    assert command("mra", *words, 1, 2, 1) == once and once[1].count("\n") == 2 * 3


@pytest.mark.parametrize("flags", ['--lr "1', '"--lr 1', "--lr 1'"])
@pytest.mark.parametrize("figure", ["fig2", "fig4"])
def test_flags_with_an_open_quotation_are_refused(figure, flags, tmp_path):
    """In one sentence, before anything is trained or written."""
    words = (figure, "--dir", tmp_path / "runs", f"--flags={flags}")
    code, text, stderr = command("mra", "train", *words)
    assert (code, text) == (2, "")
    assert stderr == f"error: --flags: {flags}: no closing quotation.\n"
    assert not (tmp_path / "runs").exists()


LADDERS = {  # {study: beginning of its runs' names}
    "mra_ladder_rooms": "rooms-",
    "mra_ladder_signpost": "signpost-",
    "mra_ladder_resource": "resource_ladder-",
}


@pytest.mark.parametrize("name", LADDERS)
def test_ladders_are_what_the_criterion_says(name):
    """In each world all arms, with its flags, seeds and populations. --psi-information does not
    count where no psi learns."""
    ladder = criteria.read_tables()["defaults"]["mra_ladder"]
    study = runs_module.read_toml(runs_module.ROOT / f"experiments/studies/{name}.toml")
    assert study["seeds"] == ladder["seeds"]
    task = name.removeprefix("mra_ladder_")
    populations = ladder["populations"].get(task) or mra.TRAINED[task]
    assert task in ladder["worlds"]

    def parsed(line, *more):
        args = runs_module.script_args(script, [*shlex.split(line)[1:], *map(str, more)])
        if args.latent_prior != "learned" or args.latent_size == 1:
            return dataclasses.replace(args, psi_information=True)
        return args

    found, wanted = {}, {}
    for run, line in study["runs"].items():
        assert run.startswith(LADDERS[name])
        args = parsed(f"{line} {study['flags']}", "--total-timesteps", study["timesteps"])
        unseen = args.eval_populations
        assert unseen and not set(unseen) & set(args.populations)
        arm = run.removeprefix(LADDERS[name])
        found[arm] = dataclasses.replace(args, eval_populations=())
    for arm, flags in ladder["arms"].items():
        line = f"{ladder['common']} {ladder['schedule']} {flags}"
        wanted[arm] = parsed(line, "--task", task, "--populations", *populations)
    assert found == wanted


def test_the_gate_is_what_the_criterion_says():
    """In rooms and signpost an oracle with a flat graph, by the ladder's schedule."""
    ladder = criteria.read_tables()["defaults"]["mra_ladder"]
    study = runs_module.read_toml(runs_module.ROOT / "experiments/studies/mra_gate.toml")
    assert study["seeds"] == ladder["seeds"]
    oracle = re.search(r"\((--tell-population all [^:]*):", ladder["gate"])[1]
    assert {*study["runs"]} == {f"{task}-oracle" for task in ("rooms", "signpost")}
    for run, line in study["runs"].items():
        words = shlex.split(f"{line} {study['flags']} --total-timesteps {study['timesteps']}")
        task = run.removesuffix("-oracle")
        common = ladder["common"].replace("--tell-population critic", oracle)
        how = f"{common} {ladder['schedule']} --phi-gradient mi --no-psi-information --task {task}"
        wanted = [*shlex.split(how), "--populations", *ladder["populations"][task]]
        both = [runs_module.script_args(script, own[1:]) for own in (words, wanted)]
        assert both[0] == both[1]


def write_ladder_run(folder, name, returns, unseen, bests, leader=0.0):
    """A run in rooms that has finished: arguments, a log of ten lines, final returns."""
    folder = folder / name
    folder.mkdir()
    args = {"script": "mra_maddpg_particle", "task": "rooms", "populations": ["3,3", "6,3"]}
    args |= {"eval_populations": ["4,3"], "seed": int(name[-1])}
    (folder / "args.json").write_text(json.dumps(args))
    log = [
        {"timesteps": 10 * k, "information/3,3": 0.1 * k, "xi_accuracy/6,3": 0.5} for k in range(11)
    ]
    if name.startswith("ours"):  # two of three heads, then one; leaders use all, and do not count
        shares = {"3,3/0": (0.5, 0.5, 0.0), "6,3/0": (0.0, 0.0, 1.0), "3,3/1": (0.2, 0.2, 0.6)}
        log[-1] |= {f"prior/{m}/{z}": x for m, p in shares.items() for z, x in enumerate(p)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    evals = {"4,3": unseen, "4,3 best z=1,0": unseen + 1}
    for population, drawn, best in zip(args["populations"], returns, bests):
        evals |= {population: drawn, f"{population} best z=2,0": best}
        evals |= {f"{population} blind": -14.0, f"{population} knows population": -7.0}
    row = {"return_leader": leader, "episodes": 10}
    results = {name: row | {"return_follower": x} for name, x in evals.items()}
    summary = {"timesteps": 100, "eval": results}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_ladder(tmp_path):
    """Means over populations and seeds, the gap closed, and differences as SciPy's own test."""
    runs = [
        write_ladder_run(tmp_path, "ours-s1", (-7.0, -8.0), -9.0, (-6.0, -7.0)),
        write_ladder_run(tmp_path, "ours-s2", (-7.0, -10.0), -11.0, (-6.0, -7.0)),
        write_ladder_run(tmp_path, "uni-s1", (-13.0, -14.0), -15.0, (-12.0, -13.0)),
        write_ladder_run(tmp_path, "uni-s2", (-12.0, -14.0), -16.0, (-12.0, -13.0)),
    ]
    out = tmp_path / "l"
    code, text, stderr = command("mra", "ladder", *runs, "--against", "uni", "--out", out)
    assert code == 0, stderr
    first, _, third, _ = rows(f"{out}.csv")
    figures = {name: float(x) for name, x in first.items() if x and name not in ("form", "run")}
    wanted = {"return": -7.5, "3,3": -7.0, "6,3": -8.0, "gap closed": 6.5 / 7, "unseen": -9.0}
    wanted |= {"best z": -6.5, "best z, unseen": -8.0}
    wanted |= {"information": 0.95, "xi right": 0.5, "heads used": 1.5}
    assert figures == pytest.approx(figures | wanted, rel=1e-5)
    assert first["uniform g"] == first["priors apart"] == third["heads used"] == "", "there is none"
    head = [x.strip() for x in text.splitlines()[0].strip("|").split("|")]
    assert "heads used" in head and "uniform g" not in head, "the table is without what no run has"
    assert float(third["gap closed"]) == pytest.approx(0.5 / 7, rel=1e-5)
    assert "-8.00 (-7.50, -8.50)" in text
    # Welch's intervals of seeds -7.5, -8.5 and -13.5, -13, unseen -9, -11 and -15, -16: variances
    # of means .25 and .0625, 1 and .25, so both have 25/17 degrees of freedom, whose t is 6.19
    line = next(line for line in text.splitlines() if "ours - uni" in line)
    assert "| +5.25 [+1.79, +8.71] | 0.33 | +5.50 [-1.42, +12.42] | 0.33 |" in line
    code, text, _ = command("mra", "ladder", *runs[::2], "--against", "uni", "--out", out)
    assert code == 0 and "| ours - uni | +6.00 | – | +6.00 | – |" in text, "of one seed each"
    assert Image.open(f"{out}.png").width > 500


def test_the_ladders_figure(tmp_path):
    """A dot per seed at its return, the best form first; scripts' returns where there are some."""
    table = [
        {"form": form, "run": f"{form}-s{k}", "return": x + k, "unseen": x - k}
        for form, x in {"low": -9.0, "high": -7.0}.items()
        for k in (1, 2)
    ]
    (axis,) = mra.draw_ladder(table, {"blind": -12.0, "knows population": np.nan}).axes
    assert [x.get_text() for x in axis.get_yticklabels()] == ["high", "low"]
    dots = [tuple(dots.get_offsets()[:, 0]) for dots in axis.collections]
    assert dots == [(-6.0, -5.0), (-8.0, -7.0), (-8.0, -9.0), (-10.0, -11.0)]
    assert [x.get_text() for x in axis.texts] == ["blind"]


def test_columns_of_the_ladder_are_of_their_players():
    """Trained populations are 3 and 4, unseen is 6; each row of the evaluation has its figure."""
    players = ("", " random", " best z=1", " uniform g", " blind", " knows population")
    names = [f"{m}{player}" for player in players for m in (3, 4, 6)]
    results = {name: {"return": float(2**k)} for k, name in enumerate(names)}
    args = {"task": "resource", "populations": ["3", "4"], "eval_populations": ["6"]}
    run = SimpleNamespace(name="x-s1", args=args, log=[], steps=0, summary={"eval": results})
    row = mra.ladder_row(run, all_agents=False)
    wanted = {"return": 1.5, "unseen": 4, "random": 12, "random, unseen": 32}
    wanted |= {"best z": 96, "best z, unseen": 256, "uniform g": 768}
    wanted |= {"gap closed": (1.5 - 6144) / (49152 - 6144)}
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)


def test_ladder_of_all_agents_and_of_interquartile_means(tmp_path):
    """Five seeds, one of them far away: a mean without both ends. Leaders are 3 of 6 and of 9."""
    drawn, runs = (-7.0, -7.2, -7.4, -7.6, -30.0), []
    for k, x in enumerate(drawn, 1):
        runs.append(write_ladder_run(tmp_path, f"ours-s{k}", (x, x), x, (x, x), leader=2.0))
        runs.append(
            write_ladder_run(tmp_path, f"uni-s{k}", (-14, -14), -15, (-14, -14), leader=1.0)
        )
    means, middle = np.mean(drawn), np.mean(sorted(drawn)[1:-1])
    cases = {(): means + 14, ("--interquartile",): middle + 14}
    followers, leaders = (3 / 6 + 6 / 9) / 2, (3 / 6 + 3 / 9) / 2  # shares of a population
    for words, x in list(cases.items()):
        cases["--all-agents", *words] = followers * x + leaders * 1
    for words, expected in cases.items():
        out = tmp_path / "l"
        code, text, _ = command("mra", "ladder", *runs, "--against", "uni", *words, "--out", out)
        line = next(line for line in text.splitlines() if "ours - uni" in line)
        assert code == 0 and float(line.split("|")[2].split()[0]) == pytest.approx(
            expected, abs=0.01
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("runs/parent-s1",), "maddpg_particle.py"),
        (("runs/several-s1", "runs/chase-s1"), "differ in --task"),
        (("made/told-s1", "made/sparse-s1"), "differ in --shaping"),
        (("runs/several-s1", "runs/single-s1"), "differ in --populations"),
        (("runs/several-s1", "--against", "other"), "--against other"),
        (("runs/several-s1", "--against", "several"), "--against several"),
        (("runs/adapted-s1",), "adapted-s1 is an adapted run"),
        (("made/short-s1",), "no final evaluation in 6,3"),
        (("made/its-s1", "made/its-s2"), "but their latent_size differs (its default, 9)"),
    ],
)
def test_ladder_refuses(words, sentence, runs, tmp_path):
    """One sentence, and nothing is written."""
    (tmp_path / "made").mkdir()
    write_ladder_run(tmp_path / "made", "short-s1", (-7.0,), -9.0, (-6.0,))  # of two populations
    for name in ("its-s1", "its-s2", "told-s1", "sparse-s1"):
        write_ladder_run(tmp_path / "made", name, (-7.0, -8.0), -9.0, (-6.0, -7.0))
    args = tmp_path / "made/its-s2/args.json"
    args.write_text(json.dumps(json.loads(args.read_text()) | {"latent_size": 9}))
    args = tmp_path / "made/sparse-s1/args.json"
    args.write_text(json.dumps(json.loads(args.read_text()) | {"shaping": False}))
    words = [x.replace("runs/", f"{runs}/").replace("made/", f"{tmp_path}/made/") for x in words]
    code, _, stderr = command("mra", "ladder", *words, "--out", tmp_path / "l")
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert sentence in stderr
    assert not list(tmp_path.glob("l*"))


def test_attention(runs, tmp_path):
    """Weights are those of the graphs that the run's network makes, and sum to 1."""
    run = tmp_path / "rooms-s1"
    argv = f"{TINY} --task rooms --populations 3,3 7,3 --head-gain 20 --run-dir {run}".split()
    assert script.main(argv) == 0
    out = tmp_path / "a"
    code, _, stderr = command("mra", "attention", run, "--least", 0, "--episodes", 3, "--out", out)
    assert code == 0, stderr
    found = rows(f"{out}.csv")
    assert [(r["population"], r["z"]) for r in found] == [
        (p, z) for p in ("3,3", "7,3") for z in "012"
    ]
    assert [r["pays"] for r in found] == ["red"] * 3 + ["blue"] * 3
    args, agent = script.load_agent(str(run))
    world = script.make_envs(args, "7,3", 3, 1)
    world.reset()
    with torch.no_grad():
        g = agent.attention(agent.view(world.game, world.obs, torch.full((3, 10), 2)))
    assert float(g[:, :7, 7:].sum(-1).std()) < 1e-5
    wanted = g[:, :7, 7:].mean((0, 1)).tolist()
    assert [float(found[-1][name]) for name in ("red", "green", "blue")] == pytest.approx(
        wanted, rel=1e-4
    )
    assert max(wanted) - min(wanted) > 0.01, "a graph that attends to all alike tests nothing"
    words = (run, "--least", 1, "--episodes", 3, "--out", tmp_path / "b")
    code, _, stderr = command("mra", "attention", *words)
    assert (code, stderr.count("\n")) == (2, 1) and "--least 1.0: no z" in stderr
    code, _, stderr = command("mra", "attention", runs / "several-s1", "--out", tmp_path / "b")
    assert (code, stderr.count("\n")) == (2, 1) and "in rooms" in stderr


def test_critics(runs, tmp_path):
    """The critic alone learns, and by an attention without preferences both graphs are the same."""
    study = mra.Critics(runs=(), timesteps=80, minibatches=60, every=20)

    def losses(graph, change, own=False):
        trained = mra.load(runs_module.Run(runs / "several-s1"))
        change(trained.agent.attention)
        if own:  # as of a run with --critic-graph own, whose graph is not measured here
            for critic in (trained.agent.critic, trained.agent.target_critic):
                critic.graph = copy.deepcopy(trained.agent.attention)
                sharpen(critic.graph, 5)
        before = {name: copy.deepcopy(part.state_dict()) for name, part in nets(trained)}
        found = mra.critic_rows(trained, study, graph)
        for name, part in nets(trained):
            same = all(torch.equal(x, part.state_dict()[key]) for key, x in before[name].items())
            assert same == (name not in ("critic", "target_critic")), name
        assert [row["minibatches"] for row in found] == [20, 40, 60]
        return np.array([[row["3"], row["4"]] for row in found])

    def nets(trained):
        return [(k, x) for k, x in trained.agent.parts().items() if isinstance(x, torch.nn.Module)]

    def flatten(attention):
        with torch.no_grad():
            [parameter.zero_() for parameter in attention.parameters()]

    flat = [losses(graph, flatten) for graph in ("policy", "uniform")]
    assert np.allclose(*flat, rtol=1e-3)
    policy, uniform = (losses(x, lambda attention: sharpen(attention, 3)) for x in mra.GRAPHS)
    assert (policy[-1] < policy[0]).all() and (uniform[-1] < uniform[0]).all(), "nothing is learned"
    assert (abs(policy - uniform) > 0.01 * uniform).all()
    for graph, expected in zip(mra.GRAPHS, (policy, uniform)):
        found = losses(graph, lambda attention: sharpen(attention, 3), own=True)
        assert (found == expected).all()
    words = ("--timesteps", 40, "--minibatches", 4, "--every", 2, "--out", tmp_path / "c")
    code, _, stderr = command("mra", "critics", runs / "several-s1", *words)
    assert code == 0, stderr
    graphs = [row["critic's graph"] for row in rows(tmp_path / "c.csv")]
    assert graphs == ["policy", "policy", "uniform", "uniform"]
    assert (tmp_path / "c.md").read_text().count("several-s1") == 2


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("parent-s1", (), "maddpg_particle.py, not of mra_maddpg_particle, nor of a fork"),
        ("adapted-s1", (), "trained by itself"),
        ("several-s1", ("--every", 3000), "--every exceeds --minibatches"),
    ],
)
def test_critics_refuses(runs, tmp_path, name, more, sentence):
    words = ("mra", "critics", runs / name, "--out", tmp_path / "c", *more)
    code, _, stderr = command(*words)
    assert (code, stderr.count("\n")) == (2, 1) and sentence in stderr
