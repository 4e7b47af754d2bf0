"""Benchmarks: their tables, with the numbers that can be known. Speed is not judged."""

import functools
import importlib.util
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from all_scripts import SCRIPTS
from made_up import command, experiment

from envs.particle.worlds import TASKS, Bodies, ParticleWorld, make_game

WITH_DEVICE = [
    "meltingpot",
    "particle",
    "refil",
    "mipi",
    "collaq",
    "trainings",
    "scale",
    "kernels",
    "all",
]


def test_memory_of_a_rollout(capsys):
    """Ids need 2 bytes a tile, pixels 8 * 8 * 3: 96 times as much."""
    pytest.importorskip("dmlab2d")
    bench = experiment("bench")
    bench.bench_memory(bench.MeltingPot(substrates=("coins",)))
    line = capsys.readouterr().out.splitlines()[-1]
    views = 16 * 200 * 2 * 88 * 88 * 3 / 1e6  # two views of 11x11 tiles, in MB
    assert [x.strip() for x in line.strip("| ").split("|")][1:4] == [
        f"{views / 96:.1f} MB",
        f"{views:,.0f} MB",
        "96",
    ]


def test_turns_longer_than_an_episode(monkeypatch):
    """Coins may end after 299 steps. The next episode begins, and its reset is not timed."""
    bench = experiment("bench")
    clock, done = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now), []

    class World:
        over, left = False, 3

        def step(self, action):
            assert self.left, "a step after the end"
            self.left, clock.now = self.left - 1, clock.now + 0.25
            self.over = not self.left
            done.append(action)

        def reset(self):
            self.left, clock.now = 3, clock.now + 100

    monkeypatch.setattr(bench, "time", clock)
    assert bench.steps_per_second(World(), range(8)) == 4
    assert done == list(range(8)) and clock.now == 202


@pytest.mark.long
def test_speed_of_scenarios():
    flags = "--substrates coins --scenarios SC0 --episodes 0 --steps 5 --num-envs 1"
    code, printed, _ = command("bench", "scenarios", *flags.split(), "--num-workers", 1)
    line = printed.splitlines()[-1]
    name, seats, ours, bare, ratio = (x.strip() for x in line.strip("| ").split("|"))
    assert code == 0 and (name, seats) == ("coins SC0", "1 / 1")
    assert abs(float(ratio) - float(ours) / float(bare)) < 0.02


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--substrates nowhere", r"Unknown substrate 'nowhere': .*"),
        ("--substrates coins --scenarios SC9", r"coins has no scenario SC9: .*"),
        ("--substrates daycare", r"daycare has no scenarios with scripted .*"),
        ("--num-envs 0", r"--num-envs 0: .*"),
        ("--num-workers -1", r"--num-workers -1: .*"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence):
    code, _, stderr = command("bench", "scenarios", *flags.split())
    (line,) = stderr.splitlines()
    assert code == 2 and re.fullmatch("error: " + sentence, line), line


@pytest.mark.parametrize("script", ["mappo", "bidist", "randnet", "opre", "pp", "rpm"])
def test_training_of_melting_pot(script):
    """Worlds, acting and learning add up to the speed of an iteration, with ids and without."""
    words = ["toy", "--parts", "training", "--rounds", 1, "--num-envs", 2]
    words += ["--plain-rounds", 1, "--script", script]
    flags = "--rollout-steps 20 --minibatches 2 --epochs 1"
    flags += " --k-d 1 --forward-epochs 1 --reverse-epochs 1" if script == "bidist" else ""
    code, printed, stderr = command("bench", "meltingpot", *words, f"--flags={flags}")
    assert code == 0, stderr
    lines = [[x.strip() for x in x.strip("|").split("|")] for x in printed.splitlines()]
    found = {row[1]: row for row in lines if row[0] == "toy"}
    assert set(found) == {"ids", "plain"}
    for row in found.values():
        seconds = sum(float(x.split()[0]) for x in row[3:6])
        steps = float(row[2].replace(",", ""))
        assert abs(40 / steps - seconds) < 0.02 + 0.02 * seconds


@pytest.mark.parametrize("script", ["pp", "rpm"])
def test_past_actors_act_in_benchmarks(script, monkeypatch):
    """From the first iteration on as many as a rollout can have, though no episode has ended."""
    bench = experiment("bench")
    flags = "--rollout-steps 20 --minibatches 2 --epochs 1"
    pot = bench.MeltingPot(script=script, num_envs=2, flags=flags)
    module, args = bench.training_args(pot, "toy", "ids")
    recruit, drawn = module.recruit, []

    def watched(*given):
        drawn.append(len(given[-1]))
        return recruit(*given)

    monkeypatch.setattr(module, "recruit", watched)
    bench.training_seconds(module, args, pot, rounds=1)
    assert set(drawn) == {args.policies_per_rollout}


def test_profile_of_melting_pot(capsys):
    """Parts are within what contains them, and the outermost are the whole."""
    bench = experiment("bench")
    flags = "--rollout-steps 20 --minibatches 2 --epochs 1 --k-d 1"
    pot = bench.MeltingPot(("toy",), script="bidist", rounds=2, num_envs=2, flags=flags)
    bench.bench_profile(pot)
    rows = [x.strip("| ").split(" | ") for x in capsys.readouterr().out.splitlines()[2:]]
    share = {path: float(percent.rstrip("%")) for _, path, _, percent in rows}
    assert {"collect > worlds", "collect > acting > Actor > tables", "distill"} <= share.keys()
    assert {"update > Critic", "update > backward and Adam, Critic"} <= share.keys()
    assert abs(sum(x for path, x in share.items() if ">" not in path) - 100) < 2
    for path, x in share.items():
        inner = sum(y for p, y in share.items() if p.rpartition(" > ")[0] == path)
        assert inner <= x + 0.5, path


def crowded(game, worlds):
    """Bodies near each other, some of which touch."""
    rng = torch.Generator().manual_seed(3)
    N, L = game.num_agents, game.num_landmarks

    def draw(*shape):
        return 0.6 * (2 * torch.rand(shape, generator=rng, dtype=torch.float64) - 1)

    return Bodies(
        position=draw(2, N, worlds),
        velocity=draw(2, N, worlds),
        landmarks=draw(2, L, worlds),
        alive=torch.ones(N, worlds, dtype=torch.bool),
    )


def test_the_benchmarks_task_is_simple_spread(monkeypatch):
    """Rewards and observations of mpe2's scenario in the same crowded states."""
    from mpe2 import simple_spread_v3

    bench = experiment("bench")
    monkeypatch.setitem(TASKS, "spread", bench.SPREAD)
    N, worlds, hits = 4, 20, 0
    game = make_game("spread", N)
    bodies = crowded(game, worlds)
    ours, seen = bench.spread_outcome(game, bodies), bench.spread_observation(game, bodies)
    env = simple_spread_v3.parallel_env(N=N).unwrapped
    env.reset(seed=1)
    for b in range(worlds):
        for i, agent in enumerate(env.world.agents):
            agent.state.p_pos = bodies.position[:, i, b].numpy()
            agent.state.p_vel = bodies.velocity[:, i, b].numpy()
        for k, landmark in enumerate(env.world.landmarks):
            landmark.state.p_pos = bodies.landmarks[:, k, b].numpy()
        for i, agent in enumerate(env.world.agents):
            own, shared = (
                env.scenario.reward(agent, env.world),
                env.scenario.global_reward(env.world),
            )
            assert abs(float(ours.reward[i, b]) - 0.5 * (own + shared)) < 1e-9
            hits += own < 0
            theirs = env.scenario.observation(agent, env.world)  # v, p, landmarks, others, words
            x = seen.own[b, i].numpy()
            landmarks = x[4 : 4 + 2 * N].reshape(2, N).T.flatten()
            others = np.delete(x[4 + 2 * N :].reshape(2, N).T, i, 0).flatten()
            truth = theirs[: 4 + 2 * N + 2 * (N - 1)]
            assert np.allclose(np.concatenate((x[:4], landmarks, others)), truth, atol=1e-9)
    assert hits > 10


def test_benchmark_prints_both_tables(capsys, monkeypatch):
    bench = experiment("bench")
    monkeypatch.setitem(TASKS, "spread", bench.SPREAD)
    monkeypatch.setattr(bench, "OURS", (("pacman", ((4, 2),)),))
    fixed = dict(numbers=(3,), worlds=(32,), seconds=0.01)

    def new(*args, compiled):
        world = ParticleWorld(*args)
        step = functools.partial(world._advance)
        step.call, step.plain = 1, 2  # eager, but not as a failure to compile
        world._advance = step
        return world

    monkeypatch.setattr(bench, "ParticleWorld", new)
    bench.particle(bench.Particle(**fixed))
    lines = [x.split("|")[1:-1] for x in capsys.readouterr().out.splitlines() if "|" in x]
    row = next(x for x in lines if x[0].strip() == "3")
    slow, vmas, jaxmarl, eager, fast, ratio = (x.strip() for x in row[1:])
    peers = [float(x) for x in (slow, vmas, jaxmarl) if x != "not run"]
    assert min(float(eager), float(slow)) > 0
    assert abs(float(ratio) - float(fast) / max(peers)) < 0.02 * float(ratio)
    assert lines[-1][0].strip() == "pacman" and float(lines[-1][2]) > 0


@pytest.mark.long
def test_peers_are_measured_or_named_as_missing():
    """Versions as they are installed; a figure for each library that is, and none for others."""
    words = ["--substrates", "coins", "--rounds", 1, "--steps", 5, "--seconds", 0.01]
    words += ["--numbers", 3, "--worlds", 8, "--battles", 2]
    code, printed, stderr = command("bench", "peers", *words)
    assert code == 0, stderr
    rows = [[x.strip() for x in x.strip("|").split("|")] for x in printed.splitlines() if "|" in x]
    table = {row[0]: row[1:] for row in rows}
    assert table["torch"] == [version("torch")] and table["mpe2"] == [version("mpe2")]
    if table["dm-meltingpot"] != ["not installed"]:
        assert float(table["coins"][1].replace(",", "")) > 0
    for name, column, row in (("vmas", 1, "3"), ("jaxmarl", 2, "3"), ("smaclite", 2, "2")):
        assert (table[name] == ["not installed"]) == (table[row][column][:3] == "not"), name


def test_peers_without_melting_pot(monkeypatch):
    """A sentence in place of its table; the other tables are still made."""
    bench, find, made = experiment("bench"), importlib.util.find_spec, []
    monkeypatch.delitem(sys.modules, "meltingpot", raising=False)
    missing = ("meltingpot", "dmlab2d")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in missing else find(name, *rest),
    )
    for name in ("particle", "combat"):
        monkeypatch.setattr(bench, name, lambda options, name=name: made.append(name))
    code, printed, stderr = command("bench", "peers")
    assert (code, stderr, made) == (0, "", ["particle", "combat"])
    sentences = [line for line in printed.splitlines() if "meltingpot is not installed" in line]
    assert len(sentences) == 1 and sentences[0].startswith("Not run")
    assert "| substrate" not in printed


def test_bench_of_mra(monkeypatch, capsys):
    """Tiny: cycles, the replay's table and that of returns."""
    bench = experiment("bench")
    small = {kind: f"{flags} --batch-size 8" for kind, flags in bench.KINDS.items()}
    monkeypatch.setattr(bench, "KINDS", small)
    bench.cycle_table(bench.load_script("mra_maddpg_particle"), bench.Mra(numbers=(3,), repeats=1))
    assert "| 3 | fast | " in (text := capsys.readouterr().out) and "N = 3: plain / fast" in text
    script = bench.load_script("mra_maddpg_particle")
    bench.replay_table(script)
    text = capsys.readouterr().out
    sizes = {tuple(x.split(" | ")[:2]): int(x.split(" | ")[2][:-2]) for x in text.splitlines()[3:]}
    # treasure 24: twice 5 x 24 + 2 x 20 floats, actions and z in bytes, rewards, one flag
    assert sizes["| treasure", "24"] == 2 * 4 * (5 * 24 + 40) + 24 * (1 + 1 + 4) + 1 < 1500
    study = bench.Mra(populations=("3", "4"), cpu_seconds=0.2, every=0.1, episodes=2)
    bench.learn_mra(script, "cpu", study, compiled=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 1 and all(line.startswith("| cpu | ") for line in lines)


def test_bench_of_battles():
    code, printed, _ = command("bench", "combat", "--battles", 2, "--seconds", 0.01, "--no-peers")
    assert code == 0 and printed.splitlines()[-1].startswith("| 2 | ")


@pytest.mark.parametrize(
    "name, tables, lines",
    [
        ("mipi", "--alternations 2 --presets", ["REFIL", "MIPI, M = 2"]),
        ("mipi", "--flags=--preset=cpu --alternations 4 --presets", ["REFIL", "MIPI, M = 4"]),
        ("refil", "--presets", ["fp32"]),
        ("collaq", "", ["REFIL", "AQMIX", "CollaQ"]),
    ],
)
def test_bench_of_battles_learners(name, tables, lines):
    """On episodes of two steps: what is asked for is printed."""
    small = ("--limits", 2, "--widths", 8, "--repeats", 1)
    code, text, stderr = command("bench", name, *small, *tables.split())
    assert code == 0 and all(line in text for line in lines), text + stderr
    code, _, error = command("bench", name, "--repeats", 0)
    assert code == 2 and "--repeats 0" in error


def test_bench_of_ranks(monkeypatch, capsys):
    """Medians over rounds, and the ratio to the faster of the ways with one process."""
    bench = experiment("bench")
    asked = []

    def rate(settings, script, processes, threads):
        asked.append((script, processes, threads))
        return 100.0 * threads + 260 * (processes - 1) + len(asked)

    monkeypatch.setattr(bench, "training_rate", rate)
    bench.ranks(bench.Ranks(scripts=("mappo_smac",), rounds=3))
    captured = capsys.readouterr()
    cells = captured.out.splitlines()[-1].strip("| ").split(" | ")
    assert cells == ["mappo_smac", "256", "204", "105", "366", "1.79"]
    told = captured.err.splitlines()
    assert len(told) == 9 and told[5].startswith("mappo_smac, two processes, round 2 of 3: 366 st")
    assert asked == [("mappo_smac", *way) for way in ((1, 2), (1, 1), (2, 1))] * 3


def test_the_rate_of_a_training(monkeypatch):
    """Steps behind the first tenth over their seconds: 20 in 1 and 40 in 4 are 12 a second."""
    bench = experiment("bench")

    def run(argv, **options):
        lines = [{"timesteps": t, "sps": x} for t, x in ((10, 1.0), (30, 20.0), (70, 10.0))]
        path = Path(argv[argv.index("--run-dir") + 1]) / "metrics.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench, "run_child", run)
    assert bench.training_rate(bench.Ranks(), "mappo_smac", 1, 1) == pytest.approx(12)


@pytest.mark.long
@pytest.mark.timeout(1200)  # two and a half minutes on two idle cores, far more beside other runs
def test_bench_of_ranks_runs():
    flags = "--scripts mra_maddpg_particle mappo_smac --rounds 1 --length 0.15"
    code, text, stderr = command("bench", "ranks", *flags.split())
    assert code == 0, stderr
    for line in text.splitlines()[-2:]:
        *_, two_threads, one, two, ratio = line.strip("| ").replace(",", "").split(" | ")
        assert float(ratio) == pytest.approx(float(two) / max(float(two_threads), float(one)), 0.02)


def test_bench_of_trainings(monkeypatch, capsys):
    """The median rate behind the first tenth, and collecting's share of the time there."""
    bench = experiment("bench")
    asked = []

    def logged(script, flags, steps):
        asked.append((script, flags, steps))
        slow = {"sps": 1.0, "collect_s": 50.0, "learn_s": 50.0}
        rates = ((30.0, 3.0), (10.0, 1.0), (20.0, 2.0))
        return [slow, *({"sps": x, "collect_s": s, "learn_s": 1.0} for x, s in rates)]

    monkeypatch.setattr(bench, "logged_training", logged)
    bench.trainings(bench.Trainings(scripts=("mappo_smac",), length=0.25, flags="--tf32"))
    flags, steps = bench.SPEEDS["mappo_smac"]
    assert asked == [("mappo_smac", f"{flags} --tf32 --device cpu", steps // 4)]
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "on cpu" in text
    cells = text.splitlines()[-1].strip("| ").split(" | ")
    assert cells == ["mappo_smac", f"{flags} --tf32", "20", "67%"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", WITH_DEVICE)
def test_a_missing_gpu_is_one_sentence(name):
    code, printed, stderr = command("bench", name, "--device", "cuda")
    assert (code, stderr) == (2, "error: --device cuda: there is no CUDA device here.\n"), printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trainings --scripts mappo_smac.py", "error: --scripts mappo_smac.py: there are bidist_"),
        ("kernels --device cpu --worlds", "error: --worlds names none."),
    ],
)
def test_benches_refuse(words, sentence):
    code, _, stderr = command("bench", *words.split())
    assert code == 2 and stderr.startswith(sentence) and stderr.count("\n") == 1


def test_bench_of_trainings_knows_every_script():
    """Names and flags."""
    bench = experiment("bench")
    assert {*bench.SPEEDS} == {name.rpartition(".")[2] for name in SCRIPTS}
    for script, (flags, steps) in bench.SPEEDS.items():
        args = bench.script_args(bench.load_script(script), flags.split())
        assert steps > 10 * args.num_envs
        assert 0 < bench.iteration_steps(script, flags) < steps / 2


def test_bench_of_all(monkeypatch, capsys):
    """The device is handed on, and what fails does not keep the rest from being measured."""
    bench = experiment("bench")
    done = []

    def measure(name):
        def part(options):
            done.append((name, options.device))
            if name == "scale":
                raise RuntimeError("no.")

        return part

    monkeypatch.setattr(bench, "COMMANDS", {name: measure(name) for name in bench.COMMANDS})
    with pytest.raises(bench.harness.RunError, match="Not measured: scale"):
        bench.everything(bench.All(device="cpu", skip=("mipi",)))
    names = ["trainings", "scale", "meltingpot", "particle", "refil", "collaq"]
    assert done == [(name, "cpu") for name in names]
    assert "scale failed: RuntimeError: no." in capsys.readouterr().out
    stopped = mock.Mock(side_effect=SystemExit(143))  # SIGTERM, by ending_by_signals()
    with mock.patch.dict(bench.COMMANDS, trainings=stopped), pytest.raises(SystemExit):
        bench.everything(bench.All(device="cpu"))
    assert stopped.call_count == 1 and len(done) == len(names)
    with pytest.raises(bench.harness.UsageError, match="--skip nosuch: there are trainings, "):
        bench.everything(bench.All(device="cpu", skip=("nosuch",)))


@pytest.mark.long
def test_bench_of_scale_runs(capfd):
    flags = "--worlds 1 2 --rounds 1 --rollout-steps 10 --numbers 1000 --flags=--minibatches=1"
    code, text, stderr = command("bench", "scale", *flags.split())
    assert code == 0, stderr
    lines = [line for line in text.splitlines() if line.startswith("| toy |")]
    assert [line.split(" | ")[1] for line in lines] == ["1", "2"]
    averages = capfd.readouterr().out.splitlines()[-1]  # the first of two processes says it
    gradients, milliseconds = averages.strip("| ").split(" | ")
    assert gradients == "1,000" and float(milliseconds) > 0


@pytest.mark.long
def test_bench_of_kernels_runs():
    """On a CPU, which runs no kernels: products of matrices are among what takes longest."""
    flags = "--device cpu --worlds 2 --rounds 1 --rollout-steps 10 --rows 3 --flags=--minibatches=1"
    code, text, stderr = command("bench", "kernels", *flags.split())
    assert code == 0, stderr
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    assert [row[0] for row in rows[:2]] == ["worlds", "2"] and len(rows) == 2 + 1 + 3
    assert rows[1][2:] == ["0.0", "0.0", "0.00", "0.0"] and float(rows[1][1]) > 0
    assert "aten::mm" in [row[0] for row in rows[3:]]


def test_bench_of_kernels_counts_what_a_gpu_runs(monkeypatch, capsys):
    """Not the CPU's calls, and not twice what stands under a name of the program's."""
    bench = experiment("bench")

    def event(key, count, took, where="CUDA", annotation=False):
        return SimpleNamespace(
            key=key,
            count=count,
            self_device_time_total=1000 * took,
            device_type=SimpleNamespace(name=where),
            is_user_annotation=annotation,
        )

    events = [
        event("gemm", 50, 20),
        event("add | mul", 25, 5),
        event("Memcpy HtoD", 75, 1),
        event("Adam.step", 10, 25, annotation=True),
        event("cudaLaunchKernel", 75, 0, "CPU"),
        event("cudaStreamSynchronize", 5, 0, "CPU"),
    ]
    monkeypatch.setattr(bench, "check_device", lambda bench: None)
    monkeypatch.setattr(bench, "machine", lambda device: device)
    monkeypatch.setattr(bench, "profiled_update", lambda *given: (0.5, events))
    # 5 epochs of 5 minibatches
    monkeypatch.setattr(
        bench, "training_args", lambda *given: (None, SimpleNamespace(epochs=5, minibatches=5))
    )
    bench.kernels(bench.Kernels(worlds=(16,), rows=2))
    lines = capsys.readouterr().out.splitlines()
    assert "| 16 | 20.0 | 3.0 | 3.0 | 1.00 | 0.2 |" in lines
    assert lines[-2:] == ["| gemm | 2.0 | 0.800 |", "| add   mul | 1.0 | 0.200 |"]


@pytest.mark.slow
def test_bench_of_all_runs():
    code, text, stderr = command("bench", "all", "--device", "cpu", "--size", 0.02)
    assert code == 0, stderr
    assert text.count("\n## ") == 7 and "failed" not in text
