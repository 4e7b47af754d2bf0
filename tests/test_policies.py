"""Figures 5 and 7, on runs of the toy world."""

import csv
import dataclasses
import importlib
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from runs import BIDIST, ROOT, script, tiny

sys.path.insert(0, str(ROOT / "experiments"))
policies = importlib.import_module("policies")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


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
    study = policies.Fig7(trained[0], num_envs=3, reverse_lr=0.01, noise_std=0.5)
    about, theta, phis, scalars = policies.reverse_phases(study)
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

    assert policies.main(["fig7", *argv, "--out", str(tmp_path / "x")]) == 0
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

    assert policies.main(["fig7", *argv, "--observation", "120"]) == 2
    assert "error: --observation 120: the rollout has 0 to 119." in capsys.readouterr().err
    assert policies.main(["fig7", str(trained[2])]) == 2
    assert "is not a run of bidist_mappo_meltingpot.py, and has no phi." in capsys.readouterr().err


# Figure 5 ---------------------------------------------------------------------------------------


def test_distributions(trained, tmp_path, capsys):
    argv = ["--samples", "30", "--num-envs", "4", "--rollouts", "2", "--perplexity", "5"]
    argv = ["fig5", *map(str, trained), *argv]
    assert policies.main([*argv, "--out", str(tmp_path / "x")]) == 0
    text, found = capsys.readouterr().out, rows(tmp_path / "x.csv")
    assert [sum(r["run"] == p.name for r in found) for p in trained] == [30] * 3
    mixed = [int(r["fictitious"]) for r in found]
    assert set(mixed[:60]) == {0, 1} and set(mixed[60:]) == {0}  # never both of two
    study = policies.Fig5(tuple(trained), samples=30, rollouts=2, num_envs=4)
    for path in trained:
        sample = policies.sample_population(path, study)
        assert sample.points.shape == (30, 2 * 3) and sample.agents == 2
        assert np.allclose(sample.points.reshape(30, 2, 3).sum(-1), 1, atol=1e-5)
        pairs = list(itertools.combinations(sample.points, 2))
        distance = np.mean([np.sqrt(((a - b) ** 2).sum()) for a, b in pairs])
        total = np.mean([np.abs(a - b).sum() / 2 / 2 for a, b in pairs])
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {path.name} |")]
        assert f"| 30 | {distance:.4f} | {total:.4f} |" in line
    assert is_png(tmp_path / "x.png")
    # The same seed draws the same samples and places.
    assert policies.main([*argv, "--out", str(tmp_path / "y")]) == 0
    assert rows(tmp_path / "y.csv") == found


def test_samples_are_of_who_acted(trained):
    """With all agents trained the samples are theta's, with all fictitious phi's."""
    bidist = script(BIDIST)
    study = policies.Fig5((trained[0],), samples=80, rollouts=1, num_envs=2, warm_up=0)
    with policies.loaded(trained[0], 2, 1) as (_, args, envs, agent, *rest):
        batch = policies.play(bidist, args, envs, agent, *rest)
    points = policies.sample_population(trained[0], dataclasses.replace(study, samples=40))
    acting = torch.where(batch.trained[..., None], batch.theta, batch.phi).exp()
    expected = {tuple(np.round(x, 5)) for x in acting.flatten(2).flatten(0, 1).double().numpy()}
    assert {tuple(np.round(x, 5)) for x in points.points} == expected
    with pytest.raises(policies.UsageError, match=r"^--samples 80: the rollouts"):
        policies.sample_population(trained[0], study)


def test_errors_of_distributions(trained, tmp_path, capsys):
    other = shutil.copytree(trained[0], tmp_path / "other-s1")
    args = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(args | {"substrate": "coins"}))
    assert policies.main(["fig5", str(trained[0]), str(other)]) == 2
    assert "fig5 compares runs on one substrate, and these are on sev" in capsys.readouterr().err
    assert policies.main(["fig5", str(trained[0]), "--samples", "10"]) == 2
    assert "--perplexity 30 is not less than 10 samples." in capsys.readouterr().err
    assert policies.main(["fig5", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no run directory." in capsys.readouterr().err


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
    ("fig5", "--samples 1", "--samples 1: input should be greater than or equal to 2."),
    ("fig5", "--perplexity 0", "--perplexity 0.0: input should be greater than 0."),
    ("fig5", "--perplexity nan", "--perplexity nan: input should be less than inf."),
    ("fig5", "--samples 999", "--samples 999: the rollouts of "),
]


@pytest.mark.parametrize(("figure", "flags", "sentence"), WRONG)
def test_wrong_options_are_one_sentence(trained, tmp_path, capsys, figure, flags, sentence):
    argv = [figure, str(trained[0]), "--out", str(tmp_path / "x"), "--num-envs", "2"]
    assert policies.main([*argv, *flags.split()]) == 2
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
        assert policies.main([figure, str(trained[0]), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: --out {out} {sentence}"


def test_minibatches_without_a_chunk(tmp_path, capsys):
    """One world has two chunks, too few for the run's four minibatches: their loss would be NaN."""
    assert script(BIDIST).main(tiny(BIDIST, tmp_path / "run", 1, "--minibatches", 4)) == 0
    argv = ["fig7", str(tmp_path / "run"), "--num-envs", "1", "--out", str(tmp_path / "x")]
    assert policies.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --minibatches exceeds the 2 chunks of a rollout."
