"""Figs. 5 and 7, and what distillation does, on runs of the toy world."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from made_up import experiment, fake_run, is_png, rows
from runs import BIDIST, change_newest, differences, index, script, states, tiny

bidist, runs = experiment("bidist"), experiment("runs")
harness = bidist.harness


# Figure 7 ---------------------------------------------------------------------------------------


def probabilities(path, which, study):
    """A network's on the rollout, step by step, from the run's checkpoint: (T B N, A)."""
    module = script(BIDIST)
    saved, _ = harness.load_checkpoint(str(path))
    args = dataclasses.replace(harness.saved_args(str(path), module.Args), num_envs=study.num_envs)
    with module.make_envs(args, study.num_envs, study.seed + 10**6) as envs:
        agent = module.Agent(args, envs, torch.device("cpu"))
        harness.restore(agent, saved["agent"], "")
        state = module.new_state(agent, study.num_envs)
        rngs = [torch.Generator().manual_seed(study.seed + k) for k in (0, 1)]
        envs.reset()
        for _ in range(study.warm_up + 1):
            hidden = getattr(state, f"{which}_hidden")
            batch, state = module.collect(args, envs, agent, state, *rngs)
        net, views, found = getattr(agent, which), batch.actor_views(), []
        with torch.no_grad():
            for t in range(args.rollout_steps):
                now = module.Views(views.ids[t], views.features[t], views.starts[t])
                log_probs, hidden = module.act(net, now, hidden, agent.sprites)
                found.append(log_probs.exp().double().numpy())
    return np.stack(found).reshape(-1, envs.spec.num_actions)


@pytest.mark.long
def test_heat_maps(trained, tmp_path, capsys):
    argv = [str(trained[0]), "--num-envs", "3", "--reverse-lr", "0.01", "--noise-std", "0.5"]
    study = bidist.Fig7(trained[0], num_envs=3, reverse_lr=0.01, noise_std=0.5)
    about, theta, phis, scalars = bidist.reverse_phases(study)
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

    assert bidist.main(["fig7", *argv, "--out", str(tmp_path / "x")]) == 0
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

    # The table: what theta prefers, and phi's largest, each in its own column.
    text = (tmp_path / "x.md").read_text()
    for mode, phi in phis.items():
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {mode} |")]
        cells = [float(x) for x in line.split(" | ")[1:5]]
        kl = (theta * np.log(theta / phi)).sum(1).mean()
        preferred = phi[np.arange(len(phi)), theta.argmax(1)].mean()
        expected = [kl, (theta.argmax(1) != phi.argmax(1)).mean(), preferred, phi.max(1).mean()]
        assert cells == pytest.approx(expected, rel=2e-3, abs=1e-4)
    phases = bidist.Phases(about | {"actions": []}, theta, phis, scalars)
    maps = bidist.heat_maps(phases, surest)
    figure = bidist.draw_heat_maps(study, phases, maps, surest)
    for column, (mode, phi) in enumerate(phis.items()):
        drawn = [x.images[0].get_array() for x in figure.axes[column :: len(phis)][:2]]
        one, mean = np.outer(theta[surest], phi[surest]), bidist.joint(theta, phi)
        assert np.allclose(drawn[0], bidist.min_max(one)), mode
        assert np.allclose(drawn[1], bidist.min_max(mean)), mode
    bidist.plt.close(figure)
    # From near, a forward phase has come first: the same theta, another phi.
    near = bidist.reverse_phases(dataclasses.replace(study, start="near"))
    phi = near.phis["before"]
    assert np.allclose(near.theta, theta)
    assert not np.allclose(phi, phis["before"], rtol=0, atol=1e-5)
    kl = (theta * np.log(theta / phi)).sum(1).mean()
    assert near.scalars["kl"]["kl_before"] == pytest.approx(kl, rel=1e-3, abs=1e-6)

    assert bidist.main(["fig7", *argv, "--observation", "120"]) == 2
    assert "error: --observation 120: the rollout has 0 to 119." in capsys.readouterr().err
    assert bidist.main(["fig7", str(trained[2])]) == 2
    assert "mappo_meltingpot.py, not of bidist_mappo_meltingpot" in capsys.readouterr().err


LEFT_OUT = "it has not begun, or pack left it out (--curves)"

# Figure 5 ---------------------------------------------------------------------------------------


def test_distributions(trained, tmp_path, capsys):
    argv = ["--samples", "30", "--num-envs", "4", "--rollouts", "2", "--perplexity", "5"]
    argv = ["fig5", *map(str, trained), *argv]
    assert bidist.main([*argv, "--out", str(tmp_path / "x")]) == 0
    text, found = capsys.readouterr().out, rows(tmp_path / "x.csv")
    assert [sum(r["run"] == p.name for r in found) for p in trained] == [30] * 3
    mixed = [int(r["fictitious"]) for r in found]
    assert set(mixed[:60]) == {0, 1} and set(mixed[60:]) == {0}  # never both of two
    study = bidist.Fig5(tuple(trained), samples=30, rollouts=2, num_envs=4)
    for path in trained:
        sample = bidist.sample_population(runs.Run(path), study)
        assert sample.points.shape == (30, 2 * 3) and sample.agents == 2
        assert np.allclose(sample.points.reshape(30, 2, 3).sum(-1), 1, atol=1e-5)
        pairs = list(itertools.combinations(sample.points, 2))
        distance = np.mean([np.sqrt(((a - b) ** 2).sum()) for a, b in pairs])
        total = np.mean([np.abs(a - b).sum() / 2 / 2 for a, b in pairs])
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {path.name} |")]
        assert f"| 30 | {distance:.4f} | {total:.4f} | {sample.shift:.4f} |" in line
        alone = list(itertools.combinations(sample.points[sample.fictitious == 0], 2))
        trained_alone = np.mean([np.sqrt(((a - b) ** 2).sum()) for a, b in alone])
        assert line.endswith(f"| {trained_alone:.4f} |")
        assert (sample.shift > 0) == bool(sample.fictitious.any())
    assert is_png(tmp_path / "x.png")
    # The same seed draws the same samples and places.
    assert bidist.main([*argv, "--out", str(tmp_path / "y")]) == 0
    assert rows(tmp_path / "y.csv") == found


def test_spread_does_not_tell_how_many_policies_there_are():
    """Why B2 has no verdict: where a third of the agents prefer other actions in every view,
    samples are hardly further apart, and where these are flatter, they are nearer."""
    rng = np.random.default_rng(1)
    theta = rng.dirichlet(np.full(8, 0.1), (300, 2))  # (S, N, A), as views decide
    chosen = rng.random((300, 2, 1)) < 1 / 3
    others = {"same": theta, "other": np.roll(theta, 3, -1), "flat": np.full((300, 2, 8), 1 / 8)}
    found = {}
    for name, policy in others.items():
        points = np.where(chosen, policy, theta).reshape(300, 16)
        found[name] = bidist.spread(points, 2)["total_variation"]
    assert abs(found["other"] / found["same"] - 1) < 0.1
    assert found["flat"] < 0.95 * found["same"]


def test_samples_are_of_who_acted(trained):
    """With all agents trained the samples are theta's, with all fictitious phi's."""
    study = bidist.Fig5((trained[0],), samples=80, rollouts=1, num_envs=2, warm_up=0)
    with bidist.loaded(runs.Run(trained[0]), 2, 1) as found:
        batch, _ = found.last_of(1)
    points = bidist.sample_population(runs.Run(trained[0]), dataclasses.replace(study, samples=40))
    acting = torch.where(batch.trained[..., None], batch.theta, batch.phi).exp()
    expected = {tuple(np.round(x, 5)) for x in acting.flatten(2).flatten(0, 1).double().numpy()}
    assert {tuple(np.round(x, 5)) for x in points.points} == expected
    apart = (batch.phi.exp() - batch.theta.exp()).abs().sum(-1) / 2
    shift = (apart * ~batch.trained).mean()
    assert points.shift == pytest.approx(float(shift), rel=1e-3) and shift > 0
    with pytest.raises(bidist.UsageError, match=r"^--samples 80: the rollouts"):
        bidist.sample_population(runs.Run(trained[0]), study)


def test_samples_of_randnet_see_what_it_saw(tmp_path):
    """The points are the policies that acted in the rollout, on the views that psi changed."""
    name = "baselines.randnet_meltingpot"
    assert script(name).main(tiny(name, tmp_path / "run", 1, "--clean-share", "0")) == 0
    run = runs.Run(tmp_path / "run")
    study = bidist.Fig5((run.path,), samples=40, rollouts=1, num_envs=2, warm_up=0)
    points = bidist.sample_population(run, study).points.reshape(40, 2, 3)
    with bidist.loaded(run, 2, study.seed) as found:
        batch, _ = found.last_of(1)
        assert found.agent.psi is not None
        clean = found.policy(found.agent.actor, batch, batch.actor_hidden)
    order = np.random.default_rng(study.seed).permutation(40)
    actions = batch.actions.flatten(0, 1).numpy()[order]
    acted = np.take_along_axis(points, actions[..., None], -1)[..., 0]
    log_probs = batch.log_probs.flatten(0, 1).double().numpy()[order]
    assert np.allclose(acted, np.exp(log_probs), atol=1e-6)
    assert not np.allclose(points, clean.flatten(0, 1).numpy()[order], atol=1e-6)


def test_errors_of_distributions(trained, tmp_path, capsys):
    other = shutil.copytree(trained[0], tmp_path / "other-s1")
    args = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(args | {"substrate": "coins"}))
    assert bidist.main(["fig5", str(trained[0]), str(other)]) == 2
    assert "fig5 compares runs on one substrate, and these are on sev" in capsys.readouterr().err
    assert bidist.main(["fig5", str(trained[0]), "--samples", "10"]) == 2
    assert "--perplexity 30 is not less than 10 samples." in capsys.readouterr().err
    assert bidist.main(["fig5", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no run directory." in capsys.readouterr().err


def test_samples_of_the_last_two_checkpoints(tmp_path, capsys):
    """One is saved after a forward phase, one after a reverse: their samples, taken together."""
    more = ("--save-every", 1, "--actor-lr", "0.01", "--forward-lr", "0.01", "--reverse-lr", "0.01")
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "run-s1", 2, *more)) == 0
    run = runs.Run(tmp_path / "run-s1")
    study = bidist.Fig5((run.path,), samples=40, rollouts=1, num_envs=2, warm_up=0)
    both = dataclasses.replace(study, samples=80, checkpoints=2)
    newest, together = (bidist.sample_population(run, x) for x in (study, both))
    names = [entry["name"] for entry in index(run.path)]
    assert names == ["checkpoint-80.pt", "checkpoint-40.pt"]
    assert newest.timesteps == together.timesteps == 80
    (run.path / "checkpoints.json").write_text(json.dumps(index(run.path)[1:]))
    older = bidist.sample_population(run, study)
    assert older.timesteps == 40 and older.shift != pytest.approx(newest.shift, rel=0.01)
    assert together.shift == pytest.approx((newest.shift + older.shift) / 2)
    parts = {tuple(np.round(x, 5)) for x in np.concatenate((newest.points, older.points))}
    assert {tuple(np.round(x, 5)) for x in together.points} == parts
    argv = ["fig5", str(run.path), "--checkpoints", "2", "--out", str(tmp_path / "x")]
    assert bidist.main(argv) == 2
    assert capsys.readouterr().err == f"error: --checkpoints 2: {run.path} holds 1.\n"


@pytest.mark.parametrize("name", ["pp_meltingpot", "rpm_meltingpot"])
def test_samples_of_past_actors(tmp_path, name):
    """The points are the policies that acted, a past actor's where one played; the loaded actors
    are those of the run."""
    more = ("--history-share", "0.5", "--actor-lr", "0.01", "--max-episode-steps", "4")
    assert script(f"baselines.{name}").main(tiny("", tmp_path / "run-s1", 3, *more)) == 0
    run = runs.Run(tmp_path / "run-s1")
    study = bidist.Fig5((run.path,), samples=40, rollouts=1, num_envs=2, warm_up=0)
    sample = bidist.sample_population(run, study)
    with bidist.loaded(run, 2, study.seed) as found:
        batch, _ = found.last_of(1)
        assert found.memory.actors
        theta = found.policy(found.agent.actor, batch, batch.actor_hidden).flatten(0, 1).numpy()
    order = np.random.default_rng(study.seed).permutation(40)
    points, theta = sample.points.reshape(40, 2, 3), theta[order]
    actions = batch.actions.flatten(0, 1).numpy()[order]
    acted = np.take_along_axis(points, actions[..., None], -1)[..., 0]
    log_probs = batch.log_probs.flatten(0, 1).double().numpy()[order]
    assert np.allclose(acted, np.exp(log_probs), atol=1e-6)
    current = batch.current.flatten(0, 1).numpy()[order]
    assert (sample.fictitious == (~current).sum(-1)).all() and 0 < current.mean() < 1
    assert np.allclose(points[current], theta[current], atol=1e-6)
    assert not np.allclose(points[~current], theta[~current], atol=1e-3)
    assert sample.shift == pytest.approx(np.abs(points - theta).sum(-1).mean() / 2, abs=1e-6)


def test_without_past_actors_nothing_is_played(tmp_path, capsys, monkeypatch):
    """As entries of the zoo, which hold weights only."""
    assert script("baselines.pp_meltingpot").main(tiny("", tmp_path / "pp-s1", 1)) == 0
    load = bidist.harness.load_checkpoint

    def weights_only(path, **options):
        saved, where = load(path, **options)
        return {name: x for name, x in saved.items() if name != "memory"}, where

    monkeypatch.setattr(bidist.harness, "load_checkpoint", weights_only)
    capsys.readouterr()
    assert bidist.main(["fig5", str(tmp_path / "pp-s1"), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'pp-s1'} holds no past actors.\n"


# Options ----------------------------------------------------------------------------------------

WRONG = [
    ("fig7", "--warm-up -1", "--warm-up -1: input should be greater than or equal to 0."),
    ("fig7", "--seed -1", "--seed -1: input should be greater than or equal to 0."),
    ("fig7", "--seed 4294967296", "--seed 4294967296: input should be less than 4294967296."),
    ("fig7", "--num-envs 0", "--num-envs 0: input should be greater than or equal to 1."),
    ("fig7", "--reverse-lr 0", "--reverse-lr 0.0: input should be greater than 0."),
    ("fig7", "--reverse-lr nan", "--reverse-lr nan: input should be less than inf."),
    ("fig7", "--reverse-epochs -1", "--reverse-epochs -1: input should be greater than or "),
    ("fig7", "--noise-std -1", "--noise-std -1.0: input should be greater than or equal to 0."),
    ("fig7", "--observation -1", "--observation -1: the rollout has 0 to "),
    ("fig5", "--warm-up -1", "--warm-up -1: input should be greater than or equal to 0."),
    ("fig5", "--seed -1", "--seed -1: input should be greater than or equal to 0."),
    ("fig5", "--num-envs 0", "--num-envs 0: input should be greater than or equal to 1."),
    ("fig5", "--rollouts 0", "--rollouts 0: input should be greater than or equal to 1."),
    ("fig5", "--checkpoints 0", "--checkpoints 0: input should be greater than or equal to 1."),
    ("fig5", "--samples 1", "--samples 1: input should be greater than or equal to 2."),
    ("fig5", "--perplexity 0", "--perplexity 0.0: input should be greater than 0."),
    ("fig5", "--perplexity nan", "--perplexity nan: input should be less than inf."),
    ("fig5", "--samples 999", "--samples 999: the rollouts of "),
]


@pytest.mark.parametrize(("figure", "flags", "sentence"), WRONG)
def test_wrong_options_are_one_sentence(trained, tmp_path, capsys, figure, flags, sentence):
    argv = [figure, str(trained[0]), "--out", str(tmp_path / "x"), "--num-envs", "2"]
    assert bidist.main([*argv, *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}") and line.endswith(".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("figure", ["fig5", "fig7"])
def test_out_that_cannot_be_written(trained, tmp_path, capsys, figure):
    (tmp_path / "file").touch()
    for out, sentence in (
        (tmp_path / "file/x", "cannot be written: File exists."),
        (".", "names a directory, not the files' common beginning."),
    ):
        assert bidist.main([figure, str(trained[0]), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: --out {out} {sentence}"


def test_minibatches_without_a_chunk(tmp_path, capsys):
    """One world has two chunks, too few for the run's four minibatches: their loss would be NaN."""
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "run", 1, "--minibatches", 4)) == 0
    argv = ["fig7", str(tmp_path / "run"), "--num-envs", "1", "--out", str(tmp_path / "x")]
    assert bidist.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --minibatches exceeds the 2 chunks of a rollout."


def test_a_short_run_in_few_worlds(tmp_path):
    """Its one iteration is fewer steps than a rollout of the 16 worlds that play it here."""
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "run", 1)) == 0
    out = ["--warm-up", "0", "--out", str(tmp_path / "x")]
    assert bidist.main(["fig7", str(tmp_path / "run"), *out]) == 0
    few = ["--rates", "1e-3", "--epochs", "1"]
    assert bidist.main(["reverse", str(tmp_path / "run"), *few, *out]) == 0


def test_steps_are_those_of_the_checkpoint_that_is_read(tmp_path):
    """Where the newest is damaged, the one before it."""
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "run", 1)) == 0
    newest, *_, first = index(tmp_path / "run")
    out = ["--warm-up", "0", "--out", str(tmp_path / "x")]
    for entry in (newest, first):
        assert bidist.main(["fig7", str(tmp_path / "run"), *out]) == 0
        assert f" {entry['timesteps']:,} steps;" in (tmp_path / "x.md").read_text()
        (tmp_path / "run" / newest["name"]).write_bytes(b"damaged")


# Distillation over training ---------------------------------------------------------------------


def test_shift_is_what_was_logged(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "begun-s1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"timesteps": 99')  # being written
    paths = (trained[1], run)
    assert bidist.main(["shift", *map(str, paths), "--out", str(tmp_path / "x")]) == 0
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
    assert bidist.main(["shift", str(trained[2])]) == 2
    assert "mappo_meltingpot.py, not of bidist_mappo_meltingpot" in capsys.readouterr().err


def test_the_kl_of_other_methods_is_no_distillation(tmp_path, capsys):
    """OPRE logs `kl`, of its posterior and its prior, and none of the other scalars."""
    run = fake_run(tmp_path / "opre-s1", "baselines.opre_meltingpot")
    (run / "metrics.jsonl").write_text('{"timesteps": 40, "kl": 0.1}\n')
    assert bidist.main(["shift", str(run), "--out", str(tmp_path / "x")]) == 2
    fork = "nor of a fork with FORK_OF"
    sentence = f"{run} is a run of opre_meltingpot.py, not of {BIDIST}, {fork}."
    assert capsys.readouterr().err == f"error: {sentence}\n"
    new = fake_run(tmp_path / "new-s1")
    assert bidist.main(["shift", str(new), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"error: {new} has no scalar kl: {LEFT_OUT}.\n"


def test_the_last_third_of_phases():
    """Of five phases in 300 steps those after step 200, which are two."""
    rows = [dict(run="a", timesteps=300, scalar="kl", phase="", when="", value=7.0)]
    for steps, scalar in itertools.product((60, 120, 200, 240, 300), bidist.SCALARS):
        place = dict(run="a", timesteps=steps, scalar=scalar, phase="reverse")
        rows.append(place | dict(when="before", value=steps / 100))
        rows.append(place | dict(when="after", value=steps / 10))
    text = bidist.text_of_shift(rows)
    assert "| a | reverse, all | 5 | 1.84 -> 18.4 |" in text
    assert "| a | reverse, last third | 2 | 2.7 -> 27 |" in text


def test_errors_of_shift_are_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    for argv, sentence in (
        ([], "Name at least one run directory or study."),
        ([tmp_path / "nowhere"], f"{tmp_path}/nowhere is no run directory."),
        (
            [trained[0], "--out", tmp_path / "file/x"],
            f"--out {tmp_path}/file/x cannot be written: File exists.",
        ),
    ):
        assert bidist.main(["shift", "--out", str(tmp_path / "x"), *map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {sentence}"


# When reverse distillation shifts preferences ---------------------------------------------------


def test_reverse_distillation(trained, tmp_path, capsys):
    two = trained[:2]
    argv = ["reverse", *map(str, two), "--rates", "1e-5", "1e-2", "--epochs", "2"]
    argv += ["--num-envs", "4", "--out", str(tmp_path / "new/reverse")]
    assert bidist.main(argv) == 0
    found = rows(tmp_path / "new/reverse.csv")
    assert len(found) == 2 * 3 * 2  # runs, distances, rates
    for slow, fast in zip(found[::2], found[1::2]):
        assert slow["kl_before"] == fast["kl_before"]
        assert float(fast["kl_after"]) > float(slow["kl_after"]) > 0
    assert is_png(tmp_path / "new/reverse.png")
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| initial")]
    assert len(table) == 2  # a line per rate: the mean over runs
    mean = np.mean([float(r["kl_after"]) for r in found if r["phi"] == "initial"][1::2])
    assert f"-> {mean:.3f} |" in table[1]
    assert bidist.main(["reverse", str(trained[2])]) == 2
    assert "not of bidist_mappo_meltingpot, nor" in capsys.readouterr().err


def test_where_reverse_phases_begin(trained, monkeypatch):
    """Lagged is the checkpoint's phi, near what a forward phase made of it, initial neither."""
    module, seen, how = script(BIDIST), [], []
    distill = module.distill

    def watched(args, agent, *given, phase, **more):
        seen.append({name: x.clone() for name, x in agent.distilled.state_dict().items()})
        hidden = given[0].distilled_hidden.any().item()
        how.append((phase, args.reverse_lr, args.reverse_epochs, args.reverse_mode, hidden))
        found = distill(args, agent, *given, phase=phase, **more)
        if phase == "forward":
            seen.append(agent.distilled.state_dict())
        return found

    monkeypatch.setattr(module, "distill", watched)
    study = bidist.Reverse((), rates=(1e-3,), epochs=(1,), num_envs=2)
    bidist.reverse_run(runs.Run(trained[0]), study)
    begun, ended, initial, lagged, near = seen
    own = states(trained[0])[0]["agent"]["distilled"]
    assert differences(begun, own) == differences(lagged, own) == differences(near, ended) == []
    assert differences(near, own) and differences(initial, own) and differences(initial, near)
    assert how[0][0] == "forward" and how[0][-1], "the rollout's hidden states"
    assert how[1:] == [("reverse", 1e-3, 1, "kl", False)] * 3
    how.clear()
    bidist.reverse_run(runs.Run(trained[0]), dataclasses.replace(study, epochs=(2, 3)))
    assert [x[2] for x in how[1:]] == [2, 3] * 3


def test_an_older_run(trained, tmp_path, capsys):
    """A run from before a flag has the flag's default and the same table; a zoo's weights are
    refused."""
    argv = ["--rates", "1e-2", "--epochs", "1", "--num-envs", "2", "--out", str(tmp_path / "x")]
    old = tmp_path / trained[0].name
    shutil.copytree(trained[0], old)
    assert bidist.main(["reverse", str(old), *argv]) == 0
    expected = rows(tmp_path / "x.csv")
    change_newest(old, lambda state: state["args"].pop("clip_centre"))
    assert bidist.main(["reverse", str(old), *argv]) == 0
    assert rows(tmp_path / "x.csv") == expected
    change_newest(old, lambda state: state.update(weights_only=True))
    assert bidist.main(["reverse", str(old), *argv]) == 2
    assert "has the weights alone that play" in capsys.readouterr().err
