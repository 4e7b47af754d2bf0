"""The paper's figures, on runs of the toy world and on made-up evaluations."""

import csv
import dataclasses
import importlib
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import BIDIST, MAPPO, ROOT, STEPS, Run, differences, exact, script, start, tiny, until

sys.path.insert(0, str(ROOT / "experiments"))
paper = importlib.import_module("paper_figures")
made_up = importlib.import_module("test_scenario_table")

EXTRA = "--num-envs 2 --rollout-steps 20 --minibatches 2 --epochs 1 --k-d 1 --forward-epochs 1"
EXTRA = (*EXTRA.split(), "--reverse-epochs", "1", "--final-episodes", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of BiDist and one of MAPPO, eight iterations each."""
    paths = []
    for name, seed in ((BIDIST, 1), (BIDIST, 2), (MAPPO, 1)):
        path = tmp_path_factory.mktemp("runs") / f"{name.rpartition('.')[2]}-s{seed}"
        argv = tiny(name, path, 8, "--seed", seed, "--final-episodes", 2)
        assert script(name).main(argv) == 0
        paths.append(path)
    return paths


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


# Variants ---------------------------------------------------------------------------------------


def processes(kind):
    """In the place of the module subprocess, for paper_figures alone."""
    return types.SimpleNamespace(Popen=kind, DEVNULL=-3, STDOUT=-2)


class Hosted:
    """What paper_figures wants of subprocess.Popen, forked from a host that has all imported."""

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
    return paper.main(["fig6", *argv, "--extra", *extra])


def test_variants_are_trained_skipped_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "subprocess", processes(Hosted))
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
            points = paper.read_progress(run, "self-play", "return_per_1000")
            assert [steps for steps, _ in points] == [STEPS, 2 * STEPS]
        assert float(found[mode, ""]["mean"]) == pytest.approx(np.mean(own), rel=1e-5)
        assert found[mode, ""]["low"] == ""  # fewer than five runs
        assert f"| {mode} | {mode}-s1 | {2 * STEPS} |" in text
    assert is_png(tmp_path / "x.png")
    # The same from the runs alone.
    paths = sorted(map(str, (tmp_path / "runs").glob("*-s?")))
    assert paper.main(["fig6", "--out", str(tmp_path / "y"), "--runs", *paths]) == 0
    again = rows(tmp_path / "y.csv")
    assert sorted(map(str, again)) == sorted(map(str, found.values()))
    # A longer figure goes on with the same runs.
    assert fig6(tmp_path, "--seeds", 1, "--only", "kl", iterations=3, extra=extra) == 0
    assert Hosted.started[4][:2] == ["--resume", str(tmp_path / "runs/kl-s1")]
    assert json.loads((tmp_path / "runs/kl-s1/summary.json").read_text())["timesteps"] == 3 * STEPS


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

    monkeypatch.setattr(paper, "subprocess", processes(failing(1)))
    assert fig6(tmp_path, "--seeds", 1, 2, "--only", "kl") == 2
    sentence = error()
    assert "runs/kl-s1 ended with code 1: see" in sentence and "runs/kl-s2 ended" in sentence
    assert fig6(tmp_path, "--only", "louder") == 2
    assert "fig6 trains no variant louder: there are kl, entropy, random, noise." in error()
    with paper.alone((tmp_path / "runs/kl-s1").resolve()):
        assert fig6(tmp_path, "--seeds", 1, "--only", "kl") == 2
    assert "runs/kl-s1 is being trained by another process." in error()
    shutil.copytree(trained[0], tmp_path / "runs/noise-s1")
    assert fig6(tmp_path, "--seeds", 1, "--only", "noise") == 2
    assert "noise-s1 holds another run: its reverse_mode is kl." in error()
    assert paper.main(["fig6", "--runs", str(trained[2])]) == 2
    assert "mappo_meltingpot-s1 is mappo --num-envs 2" in (sentence := error())
    assert sentence.endswith(", no variant of fig6.")
    assert fig6(tmp_path, "--jobs", 0) == 2
    assert "--jobs 0 is not positive." in error()
    assert paper.main(["shift", str(trained[0]), "--extra", "x"]) == 2
    assert "--extra is for the figures that train runs." in error()


def test_dry_run(tmp_path, capsys):
    assert fig6(tmp_path, "--dry-run", "--seeds", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "runs").exists()
    for line, mode in zip(lines, ("kl", "entropy", "random", "noise")):
        assert f"--seed 3 --reverse-mode {mode} " in line and line.endswith(" ".join(EXTRA))


@pytest.mark.parametrize("name, kind", [(k.__name__.lower(), k) for k in paper.FIGURES])
def test_commands_make_their_variants(tmp_path, name, kind):
    """What a command line means to the script is what the figure takes for the variant."""
    study = kind(substrate="toy", seeds=(1,), runs_dir=tmp_path)
    jobs = paper.jobs_of(study)
    assert len(jobs) == {"fig6": 4, "fig8": 4, "c1": 5, "c2": 6}[name]
    for job in jobs:
        argv = paper.command_of(job, study)[2:]
        args = dataclasses.asdict(script(BIDIST).parse(argv))
        assert paper.variant_of(args | {"script": BIDIST}, study, tmp_path) == job.variant
        assert args["run_dir"] == str(job.run) and args["total_timesteps"] == 10_000_000


def test_bars_beside_scenarios(tmp_path, capsys):
    """Five runs of one variant: an interval over runs, too; RPM has no script; kinds apart."""
    rng, paths, returns = np.random.default_rng(0), [], {}
    for seed in range(1, 6):
        paths.append(made_up.fake_run(tmp_path / f"full-s{seed}", seed=seed))
    paths.append(made_up.fake_run(tmp_path / "v0-s1", all_fictitious=True, team_reward=True))
    for run in paths:
        for scenario, bots in itertools.product(("SC0", "SC1"), ("scripted", "official")):
            x = rng.normal(size=20) * 3 + 10
            made_up.fake_evaluation(run, scenario, [float(y) for y in x], None, bots)
            returns[run.name, scenario, bots] = x.mean()
    argv = ["fig8", "--quantity", "return", "--out", str(tmp_path / "x"), "--runs"]
    assert paper.main([*argv, *map(str, paths)]) == 0
    text = capsys.readouterr().out
    assert text.count("| RPM |  |  | not run: no script yet |") == 4
    assert "Note: the runs differ in more than what is compared here: --team-reward." in text
    for bots in ("scripted", "official"):
        found = {(r["row"], r["variant"], r["run"]): r for r in rows(tmp_path / f"x-{bots}.csv")}
        assert len(found) == 2 * (6 + 2) and {r["bots"] for r in found.values()} == {bots}
        for scenario in ("SC0", "SC1"):
            own = [returns[f"full-s{seed}", scenario, bots] for seed in range(1, 6)]
            bar = found[scenario, "full", ""]
            assert float(bar["mean"]) == pytest.approx(np.mean(own), rel=1e-5)
            assert float(bar["low"]) < np.mean(own) < float(bar["high"])
            assert found[scenario, "v0", ""]["low"] == ""
            assert f"{np.mean(own):.1f} [" in (tmp_path / f"x-{bots}.md").read_text()
        assert is_png(tmp_path / f"x-{bots}.png")


# Figure 7 ---------------------------------------------------------------------------------------


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def probabilities(path, which, study):
    """A network's on the rollout, step by step, from the run's checkpoint: (T B N, A)."""
    bidist = script(BIDIST)
    saved, _ = bidist.load_checkpoint(str(path))
    args = bidist.Args(
        **{k: tuple(x) if isinstance(x, list) else x for k, x in saved["args"].items()}
    )
    args = dataclasses.replace(args, num_envs=study.num_envs)
    envs = bidist.make_envs(args, study.num_envs, study.seed + 10**6)
    agent = bidist.Agent(args, envs.spec, torch.device("cpu"))
    bidist.restore(agent.parts(), saved["agent"], "")
    sprites, carry = bidist.Sprites(envs, agent.device), bidist.new_carry(agent, study.num_envs)
    rngs = [torch.Generator().manual_seed(study.seed + k) for k in (0, 1)]
    envs.reset()
    for _ in range(study.warm_up + 1):
        hidden = carry[f"{which}_hidden"]
        batch = bidist.collect(args, envs, agent, carry, sprites, *rngs)
    net, found = getattr(agent, which), []
    with torch.no_grad():
        for t in range(args.rollout_steps):
            view = (batch.tile_ids[t, None], batch.actor_features[t, None], batch.starts[t, None])
            logits, states = net(*view, hidden, sprites())
            hidden = states[-1]
            found.append(logits[0].double().numpy())
    return softmax(np.stack(found)).reshape(-1, envs.spec.num_actions)


def test_heat_maps(trained, tmp_path, capsys):
    argv = [str(trained[0]), "--num-envs", "3", "--reverse-lr", "0.01", "--noise-std", "0.5"]
    study = paper.Fig7(trained[0], num_envs=3, reverse_lr=0.01, noise_std=0.5)
    about, theta, phis, scalars = paper.reverse_phases(study)
    assert theta.shape == (20 * 3 * 2, 3) and about["reverse_epochs"] == 1
    for x in (theta, *phis.values()):
        assert np.allclose(x.sum(1), 1, atol=1e-6) and (x > 0).all()
    assert np.allclose(theta, probabilities(trained[0], "actor", study), atol=1e-6)
    assert np.allclose(phis["before"], probabilities(trained[0], "distilled", study), atol=1e-6)
    for mode, found in scalars.items():  # what the phase logged is what is drawn
        for when, phi in (("before", phis["before"]), ("after", phis[mode])):
            kl = (theta * np.log(theta / phi)).sum(1).mean()
            assert found[f"kl_{when}"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
            shift = (theta.argmax(1) != phi.argmax(1)).mean()
            assert found[f"shift_{when}"] == pytest.approx(shift, abs=1e-6)
    assert scalars["kl"]["kl_after"] > scalars["kl"]["kl_before"]
    entropy = {mode: -(x * np.log(x)).sum(1).mean() for mode, x in phis.items()}
    assert entropy["entropy"] > entropy["before"]

    assert paper.main(["fig7", *argv, "--out", str(tmp_path / "x")]) == 0
    found, surest = rows(tmp_path / "x.csv"), int(theta.max(1).argmax())
    assert f"in observation {surest} θ prefers" in capsys.readouterr().out
    assert len(found) == 5 * 2 * 3 * 3
    for mode, phi in phis.items():
        for of, expected in (
            (f"observation {surest}", np.outer(theta[surest], phi[surest])),
            ("mean", np.mean([np.outer(a, b) for a, b in zip(theta, phi)], 0)),
        ):
            own = [r for r in found if (r["phi"], r["of"]) == (mode, of)]
            places = [(int(r["theta_action"]) - 1, int(r["phi_action"]) - 1) for r in own]
            values = [float(r["probability"]) for r in own]
            assert values == pytest.approx([expected[place] for place in places], rel=1e-4)
            assert sum(values) == pytest.approx(1, abs=1e-4)
            scaled = (expected - expected.min()) / (expected.max() - expected.min())
            values = [float(r["normalised"]) for r in own]
            assert values == pytest.approx([scaled[place] for place in places], abs=1e-4)
    assert is_png(tmp_path / "x.png")

    assert paper.main(["fig7", *argv, "--observation", "120"]) == 2
    assert "error: --observation 120: the rollout has 0 to 119." in capsys.readouterr().err
    assert paper.main(["fig7", str(trained[2])]) == 2
    assert "is not a run of bidist_mappo_meltingpot.py, and has no phi." in capsys.readouterr().err


# Figure 5 ---------------------------------------------------------------------------------------


def test_distributions(trained, tmp_path, capsys):
    argv = ["--samples", "30", "--num-envs", "4", "--rollouts", "2", "--perplexity", "5"]
    argv = ["fig5", *map(str, trained), *argv]
    assert paper.main([*argv, "--out", str(tmp_path / "x")]) == 0
    text, found = capsys.readouterr().out, rows(tmp_path / "x.csv")
    assert [sum(r["run"] == p.name for r in found) for p in trained] == [30] * 3
    mixed = [int(r["fictitious"]) for r in found]
    assert set(mixed[:60]) == {0, 1} and set(mixed[60:]) == {0}  # never both of two
    study = paper.Fig5(tuple(trained), samples=30, rollouts=2, num_envs=4)
    for path in trained:
        sample = paper.sample_population(path, study)
        assert sample.points.shape == (30, 2 * 3) and sample.agents == 2
        assert np.allclose(sample.points.reshape(30, 2, 3).sum(-1), 1, atol=1e-5)
        pairs = list(itertools.combinations(sample.points, 2))
        distance = np.mean([np.sqrt(((a - b) ** 2).sum()) for a, b in pairs])
        total = np.mean([np.abs(a - b).sum() / 2 / 2 for a, b in pairs])
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {path.name} |")]
        assert f"| 30 | {distance:.4f} | {total:.4f} |" in line
    assert is_png(tmp_path / "x.png")
    # The same seed draws the same samples and places.
    assert paper.main([*argv, "--out", str(tmp_path / "y")]) == 0
    assert rows(tmp_path / "y.csv") == found


def test_samples_are_of_who_acted(trained):
    """With all agents trained the samples are theta's, with all fictitious phi's."""
    bidist = script(BIDIST)
    study = paper.Fig5((trained[0],), samples=80, rollouts=1, num_envs=2, warm_up=0)
    with paper.loaded(trained[0], 2, 1) as (_, args, envs, agent, *rest):
        batch = paper.play(bidist, args, envs, agent, *rest)
    points = paper.sample_population(trained[0], dataclasses.replace(study, samples=40))
    acting = torch.where(batch.trained[..., None], batch.theta, batch.phi).exp()
    expected = {tuple(np.round(x, 5)) for x in acting.flatten(2).flatten(0, 1).double().numpy()}
    assert {tuple(np.round(x, 5)) for x in points.points} == expected
    with pytest.raises(paper.UsageError, match=r"^--samples 80: the rollouts"):
        paper.sample_population(trained[0], study)


def test_errors_of_distributions(trained, tmp_path, capsys):
    other = shutil.copytree(trained[0], tmp_path / "other-s1")
    args = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(args | {"substrate": "coins"}))
    assert paper.main(["fig5", str(trained[0]), str(other)]) == 2
    assert "fig5 compares runs on one substrate, and these are on sev" in capsys.readouterr().err
    assert paper.main(["fig5", str(trained[0]), "--samples", "10"]) == 2
    assert "--perplexity 30 must lie between 0 and all samples." in capsys.readouterr().err
    assert paper.main(["fig5", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no run directory." in capsys.readouterr().err


# Over training ----------------------------------------------------------------------------------


def test_shift_is_what_was_logged(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "begun-s1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"timesteps": 99')  # being written
    paths = (trained[1], run)
    assert paper.main(["shift", *map(str, paths), "--out", str(tmp_path / "x")]) == 0
    text, found = capsys.readouterr().out, rows(tmp_path / "x.csv")
    count = 0
    for path, source in ((trained[1], trained[1]), (run, trained[0])):
        log = [json.loads(x) for x in (source / "metrics.jsonl").read_text().splitlines()]
        for name in ("kl", "shift", "theta_prefers", "phi_prefers"):
            for phase, when in (
                ("", ""),
                *itertools.product(("forward", "reverse"), ("before", "after")),
            ):
                key = f"{phase}/{name}_{when}" if phase else name
                expected = [(m["timesteps"], m[key]) for m in log if key in m]
                assert len(expected) == (4 if phase else 8)
                where = (path.name, name, phase, when)
                own = [r for r in found if (r["run"], r["scalar"], r["phase"], r["when"]) == where]
                assert [int(r["timesteps"]) for r in own] == [t for t, _ in expected]
                values = [float(r["value"]) for r in own]
                assert values == pytest.approx([x for _, x in expected], rel=1e-5)
                count += len(own)
        before = np.mean([m["reverse/kl_before"] for m in log if "reverse/kl_before" in m])
        after = np.mean([m["reverse/kl_after"] for m in log if "reverse/kl_after" in m])
        assert f"| {path.name} | reverse, all | 4 | {before:.3g} -> {after:.3g} |" in text
    assert count == len(found)
    assert is_png(tmp_path / "x.png")
    assert paper.main(["shift", str(trained[2])]) == 2
    assert "logs no KL: it is not a run of bidist_mappo_meltingpot.py" in capsys.readouterr().err
