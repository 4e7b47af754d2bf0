"""Figures 6, 8, C.1 and C.2, on runs of the toy world and on made-up evaluations."""

import dataclasses
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from made_up import experiment, fake_evaluation, fake_run, is_png, rows
from runs import BIDIST, ROOT, STEPS, Run, differences, exact, script, start, until
from scipy import stats

bidist, runs = experiment("bidist"), experiment("runs")

EXTRA = "--num-envs 2 --rollout-steps 20 --minibatches 2 --epochs 1 --k-d 1 --forward-epochs 1"
EXTRA = (*EXTRA.split(), "--reverse-epochs", "1", "--final-episodes", "2")


def processes(kind):
    """In the place of the module subprocess, for experiments alone."""
    return types.SimpleNamespace(Popen=kind, DEVNULL=-3, STDOUT=-2)


class Hosted:
    """What training wants of subprocess.Popen, forked from a host that has all imported."""

    started = ()

    def __init__(self, command, **options):
        assert command[:2] == [sys.executable, str(ROOT / f"{BIDIST}.py")]
        type(self).started = (*self.started, command[2:])
        folder = Path(options["stdout"].name).with_suffix("")
        folder.mkdir(exist_ok=True)
        self.run = Run(BIDIST, command[2:], folder)

    def wait(self):
        return self.run.wait()

    def poll(self):
        return self.run.poll()


def fig6(tmp_path, *argv, iterations=2, extra=EXTRA):
    argv = [*map(str, argv), "--substrate", "toy", "--runs-dir", str(tmp_path / "runs")]
    argv += ["--total-timesteps", str(iterations * STEPS), "--out", str(tmp_path / "x")]
    return bidist.main(["fig6", *argv, "--extra", *extra])


@pytest.mark.long
def test_variants_are_trained_skipped_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "subprocess", processes(Hosted))
    monkeypatch.setattr(Hosted, "started", ())
    extra, seeds = (*EXTRA, "--eval-every", str(STEPS)), ("--seeds", 1, 2)
    assert fig6(tmp_path, "--seeds", 1, "--only", "kl", "noise", extra=extra) == 0
    assert len(Hosted.started) == 2
    capsys.readouterr()
    assert fig6(tmp_path, *seeds, "--only", "kl", "noise", extra=extra) == 0
    assert len(Hosted.started) == 4
    text = capsys.readouterr().out
    assert text.count("finished already") == 2
    assert "none of these runs was evaluated beside scenarios (toy), so this is self-play" in text
    found = {(r["variant"], r["run"]): r for r in rows(tmp_path / "x.csv")}
    assert text.count("| not run |") == 2  # entropy, random
    assert len(found) == 2 * 3 and {r["row"] for r in found.values()} == {"self-play"}
    for mode in ("kl", "noise"):
        own = []
        for seed in (1, 2):
            run = tmp_path / f"runs/{mode}-s{seed}"
            args = json.loads((run / "args.json").read_text())
            assert (args["reverse_mode"], args["seed"], args["substrate"]) == (mode, seed, "toy")
            result = json.loads((run / "summary.json").read_text())["eval"]["self-play"]
            row = found[mode, run.name]
            assert float(row["mean"]) == pytest.approx(result["return_per_1000"], rel=1e-5)
            assert float(row["low"]) == pytest.approx(result["return_per_1000_low"], rel=1e-5)
            own.append(result["return_per_1000"])
            points = bidist.read_progress(runs.Run(run), "self-play", "return_per_1000")
            assert [steps for steps, _ in points] == [STEPS, 2 * STEPS]
        assert float(found[mode, ""]["mean"]) == pytest.approx(np.mean(own), rel=1e-5)
        assert found[mode, ""]["low"] == ""  # fewer than five runs
        assert f"| {mode} | {mode}-s1 | {2 * STEPS} |" in text
    assert is_png(tmp_path / "x.png")
    # The same from the runs alone.
    paths = sorted(map(str, (tmp_path / "runs").glob("*-s?")))
    assert bidist.main(["fig6", "--out", str(tmp_path / "y"), "--runs", *paths]) == 0
    again = rows(tmp_path / "y.csv")
    assert sorted(map(str, again)) == sorted(map(str, found.values()))
    # A longer figure goes on with the same runs.
    assert fig6(tmp_path, "--seeds", 1, "--only", "kl", iterations=3, extra=extra) == 0
    assert Hosted.started[4][:2] == ["--resume", str(tmp_path / "runs/kl-s1")]
    assert json.loads((tmp_path / "runs/kl-s1/summary.json").read_text())["timesteps"] == 3 * STEPS


@pytest.mark.slow  # ten seconds; test_faults.py kills runs, too
def test_a_killed_run_goes_on(tmp_path, capsys):
    """Killed, then resumed by a real process, it ends at the weights of a run left alone."""
    whole = tmp_path / "whole"
    extra = (*EXTRA, "--save-every", str(STEPS))
    argv = ["--substrate", "toy", "--seed", "1", "--total-timesteps", str(6 * STEPS), *extra]
    assert script(BIDIST).main([*argv, "--run-dir", str(whole)]) == 0
    run = tmp_path / "runs/kl-s1"
    (tmp_path / "runs").mkdir()
    with start(BIDIST, [*argv, "--run-dir", str(run)], tmp_path) as process:
        log = run / "metrics.jsonl"
        until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3, process)
        process.stop()
    assert not (run / "summary.json").exists()
    code = fig6(tmp_path, "--seeds", 1, "--only", "kl", iterations=6, extra=extra)
    assert code == 0, (tmp_path / "runs/kl-s1.log").read_text()
    assert f"--resume {run} " in capsys.readouterr().out
    assert exact(run)["timesteps"] == 6 * STEPS
    assert differences(exact(run), exact(whole)) == []


@pytest.mark.long
def test_another_run_is_not_taken(tmp_path, monkeypatch, capsys):
    """A run with other --extra flags is refused, finished or not; how it was evaluated and how long
    it is may differ, and then nothing is trained or only the rest."""
    monkeypatch.setattr(runs, "subprocess", processes(Hosted))
    monkeypatch.setattr(Hosted, "started", ())
    run = tmp_path / "runs/kl-s1"

    def fig(*flags, **options):
        return fig6(tmp_path, "--seeds", 1, "--only", "kl", extra=(*EXTRA, *flags), **options)

    def refused(*flags, **options):
        assert fig(*flags, **options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    first = ("--gamma", "0.9", "--team-reward")
    assert fig(*first) == 0 and len(Hosted.started) == 1
    args = json.loads((run / "args.json").read_text())
    assert (args["gamma"], args["team_reward"]) == (0.9, True)
    assert fig(*first, "--eval-episodes", "1", "--final-episodes", "3") == 0
    assert fig(*first, iterations=1) == 0
    assert len(Hosted.started) == 1 and "finished already" in capsys.readouterr().out
    # Both what the command no longer says and what it says anew.
    where = f"error: {run} holds another run: its"
    assert refused("--gamma", "0.9") == f"{where} team_reward is True, not False."
    assert refused("--team-reward") == f"{where} gamma is 0.9, not 0.99."
    assert refused(*first, "--p", "0.5") == f"{where} p is None, not 0.5."
    assert fig6(tmp_path, "--dry-run", "--seeds", 1, extra=EXTRA) == 2
    assert "team_reward is True, not False." in capsys.readouterr().err
    # Not finished, because it is too short or was stopped: it does not go on as another run.
    assert refused("--gamma", "0.9", iterations=3) == f"{where} team_reward is True, not False."
    (run / "summary.json").unlink()
    assert refused("--team-reward") == f"{where} gamma is 0.9, not 0.99."
    assert len(Hosted.started) == 1
    # Before anything else of the figure is trained, too.
    assert fig6(tmp_path, "--seeds", 2, 1, "--only", "kl", extra=EXTRA) == 2
    assert len(Hosted.started) == 1 and "team_reward" in capsys.readouterr().err
    assert fig(*first, iterations=3) == 0
    assert Hosted.started[1][:2] == ["--resume", str(run)]
    assert json.loads((run / "summary.json").read_text())["timesteps"] == 3 * STEPS
    # A flag that the run's version of the script did not have was at its default.
    del args["weight_cap"], args["adam_eps"]
    (run / "args.json").write_text(json.dumps(args))
    assert fig(*first) == 0
    other = ("--adam-eps", "0.1")
    assert refused(*first, *other) == f"{where} adam_eps is 1e-05, not 0.1."


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("--k-d -3", "--k-d -3: input should be greater than or equal to 1."),
        ("--chunk-length 7", "--chunk-length must divide --rollout-steps."),
        ("--seed 9", "--seed is the figure's own: not after --extra."),
        ("--seed 1", "--seed is the figure's own: not after --extra."),
        ("--no-reverse", "--reverse is the figure's own: not after --extra."),
        ("--run-dir x", "--run-dir is the figure's own: not after --extra."),
        ("--reverse-mode noise", "--reverse-mode is the figure's own: not after --extra."),
    ],
)
def test_wrong_extra_flags_are_refused_before_training(tmp_path, capsys, extra, sentence):
    assert fig6(tmp_path, "--only", "kl", extra=extra.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--jobs 0", "--jobs 0: input should be greater than or equal to 1."),
        ("--total-timesteps 0", "--total-timesteps 0: input should be greater than or equal to 1."),
        ("--seeds 1 -1", "--seeds -1: input should be greater than or equal to 0."),
        ("--seeds", "--seeds names none."),
        ("--runs", "--runs names none."),
        ("--substrate coinz", "Unknown substrate 'coinz': did you mean coins or coop_mining?"),
        ("--out {tmp}/file/x", "--out {tmp}/file/x cannot be written: File exists."),
        ("--runs-dir {tmp}/file/x", "{tmp}/file/x/kl-s1 cannot be made: Not a directory."),
        ("--runs {tmp}/file", "{tmp}/file is no run directory."),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, capsys, flags, sentence):
    (tmp_path / "file").touch()
    argv = ["--substrate", "toy", "--only", "kl", "--out", str(tmp_path / "x")]
    argv += ["--runs-dir", str(tmp_path / "runs"), *flags.format(tmp=tmp_path).split()]
    assert bidist.main(["fig6", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {sentence.format(tmp=tmp_path)}"
    assert not (tmp_path / "runs").exists()


def test_unknown_extra_flags_are_refused_before_training(tmp_path, capsys):
    assert fig6(tmp_path, "--only", "kl", extra=("--gama", "0.9")) == 2
    assert "Unrecognized options: --gama" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def failing(code):
    class Process:
        def __init__(self, command, **options):
            pass

        def wait(self):
            return code

    return Process


def test_errors_of_variants(tmp_path, monkeypatch, capsys, trained):
    def error():
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setattr(runs, "subprocess", processes(failing(1)))
    assert fig6(tmp_path, "--seeds", 1, 2, "--only", "kl") == 2
    sentence = error()
    assert "runs/kl-s1 ended with code 1: see" in sentence and "runs/kl-s2 ended" in sentence
    assert fig6(tmp_path, "--only", "louder") == 2
    assert "fig6 trains no variant louder: there are kl, entropy, random, noise." in error()
    monkeypatch.setattr(runs, "subprocess", processes(failing(75)))
    assert fig6(tmp_path, "--seeds", 1, 2, "--only", "kl") == 75
    assert error() == "error: 2 of 2 runs were stopped; the same command goes on."
    shutil.copytree(trained[0], tmp_path / "runs/noise-s1")
    assert fig6(tmp_path, "--seeds", 1, "--only", "noise") == 2
    assert "noise-s1 holds another run: its reverse_mode is kl, not noise." in error()
    assert bidist.main(["fig6", "--runs", str(trained[2])]) == 2
    assert "mappo_meltingpot-s1 is mappo --num-envs 2" in (sentence := error())
    assert sentence.endswith(", no variant of fig6.")
    assert bidist.main(["fig6", "--runs", str(trained[0]), "--extra", "--p", "1"]) == 2
    assert "--extra is for runs to train, and --runs names finished ones." in error()


def test_dry_run(tmp_path, capsys):
    assert fig6(tmp_path, "--dry-run", "--seeds", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "runs").exists()
    for line, mode in zip(lines, ("kl", "entropy", "random", "noise")):
        assert line.startswith("python bidist_mappo_meltingpot.py --run-dir ")
        assert " ".join(EXTRA) in line and " --seed 3 " in line
        assert (f"--reverse-mode {mode} " in line) == (mode != "kl")


@pytest.mark.parametrize("name, kind", [(k.__name__.lower(), k) for k in bidist.FIGURES])
def test_commands_make_their_variants(tmp_path, name, kind):
    """What a command line means to the script is what the figure takes for the variant."""
    study = kind(substrate="toy", seeds=(1,), runs_dir=tmp_path)
    jobs = bidist.jobs_of(study)
    assert len(jobs) == {"fig6": 4, "fig8": 5, "c1": 5, "c2": 6}[name]
    for job in jobs:
        name = Path(job.script).stem
        args = dataclasses.asdict(runs.load_script(name).parse(job.command()[1:]))
        variant = bidist.variant_of(args | {"script": name}, study, "")
        assert job.run.name == f"{variant}-s1"
        assert args["run_dir"] == str(job.run) and args["total_timesteps"] == 10_000_000


def test_bars_beside_scenarios(tmp_path, capsys):
    """Five runs of one variant: an interval over runs; RPM is a variant; kinds apart."""
    rng, paths, returns = np.random.default_rng(0), [], {}
    for seed in range(1, 6):
        paths.append(fake_run(tmp_path / f"full-s{seed}", seed=seed))
    paths.append(fake_run(tmp_path / "v0-s1", all_fictitious=True, team_reward=True))
    paths.append(fake_run(tmp_path / "rpm-s1", "baselines.rpm_meltingpot"))
    for run in paths:
        for scenario, bots in itertools.product(("SC0", "SC1"), ("scripted", "official")):
            x = rng.normal(size=20) * 3 + 10
            fake_evaluation(run, scenario, [float(y) for y in x], None, bots)
            returns[run.name, scenario, bots] = x.mean()
    argv = ["fig8", "--quantity", "return", "--out", str(tmp_path / "x"), "--runs"]
    others = {"entropy-s7": {"reverse_mode": "entropy"}, "again-s2": {}}
    for name, flags in others.items():  # no seeds of "full"
        path = fake_run(tmp_path / name, seed=int(name[-1]), **flags)
        fake_evaluation(path, "SC0", [1.0, 2.0], None, "scripted")
        assert bidist.main([*argv, *map(str, [*paths, path])]) == 2
        stderr = capsys.readouterr().err
        assert "would count as two seeds of full, but" in stderr and stderr.count("\n") == 1
    chosen = ("--only", "full-*", "v0-*", "rpm-*")
    assert bidist.main([*argv, *map(str, paths), str(path), *chosen]) == 0
    text = capsys.readouterr().out
    assert text.count("| RPM | rpm-s1 |") == 4 and text.count("| +F, -R |  |  | not run |") == 4
    assert "Note: the runs differ in more than what is compared here: --team-reward." in text
    for bots in ("scripted", "official"):
        found = {(r["row"], r["variant"], r["run"]): r for r in rows(tmp_path / f"x-{bots}.csv")}
        assert len(found) == 2 * (6 + 2 + 2) and {r["bots"] for r in found.values()} == {bots}
        for scenario in ("SC0", "SC1"):
            own = [returns[f"full-s{seed}", scenario, bots] for seed in range(1, 6)]
            bar = found[scenario, "full", ""]
            assert float(bar["mean"]) == pytest.approx(np.mean(own), rel=1e-5)
            expected = stats.ttest_1samp(own, 0).confidence_interval()
            assert [float(bar["low"]), float(bar["high"])] == pytest.approx(expected, rel=1e-4)
            assert found[scenario, "v0", ""]["low"] == ""
            assert f"{np.mean(own):.1f} [" in (tmp_path / f"x-{bots}.md").read_text()
        assert is_png(tmp_path / f"x-{bots}.png")


def test_extra():
    assert bidist.split_extra(["fig6", "--jobs", "2"]) == (["fig6", "--jobs", "2"], [])
    assert bidist.split_extra(["fig6", "--extra"]) == (["fig6"], [])
    argv = ["fig6", "--extra", "--p", "0", "--extra"]
    assert bidist.split_extra(argv) == (["fig6"], ["--p", "0", "--extra"])
