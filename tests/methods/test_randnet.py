"""RandNet on Melting Pot: f_psi on tile ids against pixels, the equations, the run as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import harness

import numpy as np
import pytest
import test_meltingpot_flags as flags_of_all
import torch
import torch.nn.functional as F
from runs import MAPPO as PARENT
from runs import differences, exact, metrics, only_error, resume, script, tiny
from test_networks import FORMS, choose, convolutions_on_pixels, random_views
from test_training import shared_blocks
from toolbox import (
    MAPPO,
    ROOT,
    UNLIKE_DEFAULTS,
    collect,
    load_script,
    mappo,
    prepare,
    setting,
    sharpen,
    update,
)

from envs.meltingpot.random_tiles import RandomTileTables
from envs.meltingpot.tile_tensors import FEW
from envs.meltingpot.tiles import WorldError

RANDNET = ROOT / "baselines" / "randnet_meltingpot.py"
NAME = "baselines.randnet_meltingpot"
randnet = load_script(RANDNET)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def psi_of(*flags: str, seed: int = 0) -> torch.Tensor:
    """A draw that is not the identity."""
    args = randnet.parse(["--clean-share", "0", *flags])
    return randnet.draw_psi(args, torch.Generator().manual_seed(seed))


def randomised(*flags: str) -> SimpleNamespace:
    """A setting in an iteration that is not clean, whose policy is not uniform."""
    s = setting("--clean-share", "0", *flags, script=randnet)
    s.agent.psi = psi_of()
    sharpen(s.agent.actor)
    return s


# --- f_psi ----------------------------------------------------------------------------------------

GRIDS = [(5, 5), (11, 11), (4, 4), (3, 5), (9, 2), (1, 1)]


@pytest.mark.numeric
@pytest.mark.parametrize("grid", GRIDS)
@FORMS
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["double", "float"]
)
def test_both_forms_equal_torchs_layers_on_pixels(grid, form, images, dtype, error, monkeypatch):
    """Outputs and gradients; f_psi is a Conv2d on whole images, black tiles of narrow views
    included, which are pixels like others."""
    ids, pixels = random_views(grid, images, sprites=40, seed=sum(grid))
    net = randnet.TileCNN(grid)
    choose(form, monkeypatch)
    net = (net if form == "plain" else RandomTileTables(net)).to(dtype)
    sharpen(net, 0.3)
    sprites = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(dtype) / 255
    psi = psi_of("--randnet-fan", "channels")
    expected, layers, positions = convolutions_on_pixels(net, ids, pixels, psi)
    output = net(torch.from_numpy(ids), sprites, psi)
    assert (output - expected).abs().max() <= error * expected.abs().max()
    clean = net(torch.from_numpy(ids), sprites)
    assert (output - clean).abs().max() > 0.1 * expected.abs().max(), "f_psi matters"
    slope = torch.linspace(-1, 1, expected.numel(), dtype=dtype).view_as(expected)
    (output * slope).sum().backward()
    (expected * slope).sum().backward()
    for ours, theirs in zip((net.conv1, net.conv2, net.linear), layers):
        for name in ("weight", "bias"):
            mine, reference = getattr(ours, name).grad, getattr(theirs, name).grad
            if ours is net.linear and name == "weight":
                mine = mine.view(len(mine), positions, -1).transpose(1, 2).reshape_as(reference)
            if dtype == torch.float64:
                assert (mine - reference).abs().max() <= error * reference.abs().max(), name
            else:  # rounding may switch a ReLU on, whose whole gradient is then one side's alone
                assert (mine - reference).norm() <= 0.05 * reference.norm(), name


@pytest.mark.numeric
def test_a_convolution_of_ten_by_ten():
    """conv1 behind f_psi, composed by loops: 10 x 10 pixels, stride 8, padding 1."""
    net, psi = randnet.TileCNN((5, 5)).double(), psi_of().double()
    kernel = torch.zeros(16, 3, 10, 10, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            weight = net.conv1.weight[:, :, i, j].detach()
            part = torch.einsum("om,mcuv->ocuv", weight, psi)
            kernel[:, :, i : i + 3, j : j + 3] += part
    images = torch.rand(2, 3, 40, 40, dtype=torch.float64)
    once = F.conv2d(images, kernel, net.conv1.bias, stride=8, padding=1)
    assert torch.allclose(once, net.conv1(F.conv2d(images, psi, padding=1)), atol=1e-12)


def test_the_identity_is_no_psi():
    net = RandomTileTables(randnet.TileCNN((5, 5))).double()
    ids, pixels = random_views((5, 5), FEW + 1, sprites=9, seed=0)
    sprites = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    identity = torch.nn.init.dirac_(torch.empty(3, 3, 3, 3))
    one, other = (net(torch.from_numpy(ids), sprites, psi) for psi in (identity, None))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_tables_refuse_another_f_psi():
    class Changed(randnet.TileCNN):
        def forward(self, ids, sprites, psi=None):
            return super().forward(ids, sprites, None if psi is None else psi.flip(0))

    with pytest.raises(WorldError, match="--plain"):
        RandomTileTables(Changed((5, 5)))


def test_plain_flag_gives_the_same():
    """Policies and gradients of a randomised rollout; either form reads the other's weights."""
    tables, plain = randomised(), randomised("--plain")
    assert type(tables.agent.actor.cnn) is RandomTileTables
    assert type(plain.agent.actor.cnn) is randnet.TileCNN
    plain.agent.actor.load_state_dict(tables.agent.actor.state_dict())
    views, found = collect(tables).actor_views(), []
    for s in (tables, plain):
        logits, _ = s.agent.actor(views, torch.zeros(4, 2, 128), s.agent.sprites(), s.agent.psi)
        logits.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in s.agent.actor.parameters()])
        found.append((logits, gradient))
    (one, slope), (other, reference) = found
    assert torch.allclose(one, other, rtol=0, atol=1e-4)
    assert (slope - reference).norm() < 1e-3 * reference.norm()


@pytest.mark.parametrize(
    ("fan", "variance"), [("kernel", 2 / 54), ("channels", 2 / 6)], ids=["kernel", "channels"]
)
def test_deviation_and_share_of_clean_iterations(fan, variance):
    args = randnet.parse(["--randnet-fan", fan])
    rng = torch.Generator().manual_seed(0)
    draws = [randnet.draw_psi(args, rng) for _ in range(2000)]
    psis = torch.stack([x for x in draws if x is not None])
    clean = 1 - len(psis) / len(draws)
    assert args.clean_share == 0.1
    assert abs(clean - 0.1) < 4 * math.sqrt(0.1 * 0.9 / len(draws))
    assert abs(psis.std() / math.sqrt(variance) - 1) < 4 / math.sqrt(2 * psis.numel())
    assert abs(psis.mean()) < 4 * math.sqrt(variance / psis.numel())
    assert psis.shape[1:] == (3, 3, 3, 3)


# --- Losses ---------------------------------------------------------------------------------------


def test_feature_matching_against_numpy():
    """The mean over steps, agents and units, of layers computed by hand."""
    s = randomised()
    batch, actor = collect(s), s.agent.actor
    views, sprites, units = batch.actor_views(), s.agent.sprites(), []
    ids, pixels = batch.tile_ids.flatten(0, 2).numpy(), s.envs.palette.pixels()
    for psi in (s.agent.psi, None):
        x, _, _ = convolutions_on_pixels(actor.cnn, ids, pixels, psi)
        x = x.detach().numpy() @ actor.mlp.weight.detach().numpy().T
        units.append(np.maximum(x + actor.mlp.bias.detach().numpy(), 0))
    h = actor.encode(views, sprites, s.agent.psi)
    found = randnet.feature_matching(s.agent, h, views)
    assert h.shape == (20, 4, 2, 64)
    assert found.item() == pytest.approx(np.square(units[0] - units[1]).mean(), rel=1e-4)
    clean = actor.encode(views, sprites)
    assert randnet.feature_matching(s.agent, clean, views) == 0
    s.agent.psi = None  # h is h(o) itself
    assert randnet.feature_matching(s.agent, h, views) == 0


def test_the_loss_that_trains_the_actor(monkeypatch):
    """-L_CLIP - c H + beta L_FM, of the steps' own figures, with beta and c of the flags."""
    beta, c = 0.01, 0.3
    flags = ("--feature-matching", f"{beta}", "--entropy-coef", f"{c}", "--epochs", "1")
    s = randomised(*flags, "--minibatches", "2", "--actor-lr", "0")
    descend, losses = randnet.descend, []

    def watched(loss, net, *more):
        losses.extend([loss.item()] * (net is s.agent.actor))
        return descend(loss, net, *more)

    monkeypatch.setattr(randnet, "descend", watched)
    s.batch = prepare(s, collect(s))
    s.batch.advantages += 1  # else their mean, the first loss, is 0
    found = randnet.update(s.args, s.agent, s.batch, s.rng)
    names = {"policy_loss": 1, "entropy": -c, "feature_matching": beta}
    parts = [factor * found[name].item() for name, factor in names.items()]
    assert np.mean(losses) == pytest.approx(sum(parts), rel=1e-5)
    assert len(losses) == 2 and min(map(abs, parts)) > 0.1


def test_no_gradient_flows_into_the_clean_side():
    s = randomised()
    actor, views, sprites = s.agent.actor, collect(s).actor_views(), s.agent.sprites()
    h = actor.encode(views, sprites, s.agent.psi)
    randnet.feature_matching(s.agent, h, views).backward()
    found = actor.mlp.weight.grad.clone()
    actor.zero_grad()
    constant = actor.encode(views, sprites).detach()
    h = actor.encode(views, sprites, s.agent.psi)
    (h - constant).square().mean().backward()
    assert torch.allclose(found, actor.mlp.weight.grad, rtol=1e-5, atol=0)
    actor.zero_grad()
    still = actor.encode(views, sprites, s.agent.psi).detach()
    randnet.feature_matching(s.agent, still.requires_grad_(), views).backward()
    assert actor.mlp.weight.grad is None
    assert still.grad.abs().sum() > 0


def test_rollout_and_update_have_one_psi():
    """The policy that acted is theta behind f_psi, so the first ratios are 1; the critic's views
    are clean."""
    s = randomised("--epochs", "1", "--minibatches", "1", "--feature-matching", "0")
    batch = collect(s)
    clean = setting("--clean-share", "1", script=randnet)
    sharpen(clean.agent.actor)
    assert torch.equal(clean.agent.actor.out.weight, s.agent.actor.out.weight)
    logits, _ = s.agent.actor(
        batch.actor_views(), batch.actor_hidden[0], s.agent.sprites(), s.agent.psi
    )
    found = randnet.chosen(logits.log_softmax(-1), batch.actions)
    assert torch.allclose(found, batch.log_probs, rtol=0, atol=1e-5)
    logits, _ = s.agent.actor(batch.actor_views(), batch.actor_hidden[0], s.agent.sprites())
    assert (randnet.chosen(logits.log_softmax(-1), batch.actions) - found).abs().max() > 1e-2
    scalars = update(s, batch)
    # With ratios of 1 the objective is the mean of normalised advantages.
    assert abs(scalars["policy_loss"]) < 1e-5
    values = s.batch.values
    s.agent.psi = None
    twin = setting("--clean-share", "0", script=randnet)
    assert torch.equal(prepare(twin, batch).values, values), "psi or no psi"


def test_update_makes_h_ignore_psi():
    """With a large beta and nothing else to gain, L_FM falls."""
    s = randomised("--feature-matching", "100", "--entropy-coef", "0", "--epochs", "10")
    batch = collect(s)
    views, sprites, found = batch.actor_views(), s.agent.sprites(), []
    for _ in range(2):
        h = s.agent.actor.encode(views, sprites, s.agent.psi)
        found.append(randnet.feature_matching(s.agent, h, views).item())
        if len(found) == 1:
            update(s, batch)
    assert found[1] < 0.7 * found[0]


# --- Evaluation -----------------------------------------------------------------------------------


def test_mc_is_the_mean_over_draws():
    """Three steps with memories, against one actor a draw."""
    s = setting("--randnet-test", "mc", script=randnet)
    actor = s.agent.actor
    sharpen(actor)
    player = randnet.playing_actor(s.args, actor, np.random.default_rng(3))
    draws = torch.Generator().manual_seed(int(np.random.default_rng(3).integers(2**31)))
    psis = [randnet.draw_psi(s.args, draws) for _ in range(10)]
    memory = torch.zeros(4, 2, player.hidden_size)
    memories = [torch.zeros(4, 2, 128) for _ in psis]
    for step in range(3):
        obs = s.envs.obs
        ids, features, _, _ = randnet.observe(obs, s.agent.device)
        starts = torch.full((4,), step == 0)
        views = randnet.Views(ids, features, starts)
        found, memory = randnet.act(player, views, memory, s.agent.sprites)
        probs = 0
        for m, psi in enumerate(psis):
            view = randnet.Views(ids[None], features[None], starts[None])
            logits, states = actor(view, memories[m], s.agent.sprites(), psi)
            memories[m] = states[0].detach()
            probs = probs + logits[0].detach().softmax(-1) / 10
        assert torch.allclose(found.exp(), probs, rtol=0, atol=1e-6)
        assert (found.exp() - logits[0].softmax(-1)).abs().max() > 1e-3, "draws differ"
        s.envs.step(found.argmax(-1).numpy())
    clean = setting(script=randnet)
    assert randnet.playing_actor(clean.args, actor, None) is actor


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [[], UNLIKE_DEFAULTS], ids=["defaults", "others"])
def test_without_its_method_it_is_mappo_bit_for_bit(other):
    """alpha = 1, beta = 0: after three iterations, and the default beta is of no effect then."""
    few = ("--epochs", 2, "--final-episodes", 3, "--eval-scenarios", "none", *other)
    for beta in (0, 0.002):
        flags = ("--clean-share", 1, "--feature-matching", beta)
        assert script(NAME).main(tiny(NAME, f"child{beta}", 3, *few, *flags)) == 0
    assert script(PARENT).main(tiny(PARENT, "parent", 3, *few)) == 0
    for run in ("child0", "child0.002"):
        assert differences(exact("parent")["agent"], exact(run)["agent"]) == []
        assert exact(run)["ranks"][0]["psi"] is None
    scores = [json.loads(Path(x, "summary.json").read_text())["eval"] for x in ("child0", "parent")]
    assert scores[0] == scores[1]
    assert script(NAME).main(tiny(NAME, "on", 3, *few, "--clean-share", 0)) == 0
    apart = differences(exact("parent")["agent"], exact("on")["agent"])
    assert {x.split("/")[1] for x in apart} >= {"actor", "critic"}


@pytest.mark.parametrize("flags", ["--clean-share 0.5", "--plain --max-episode-steps 7"])
def test_six_are_three_and_three(flags):
    flags = flags.split()
    assert script(NAME).main(tiny(NAME, "whole", 6, *flags)) == 0
    assert script(NAME).main(tiny(NAME, "cut", 3, *flags)) == 0
    before = exact("cut")["ranks"][0]
    assert script(NAME).main(resume("cut", 6)) == 0
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    after = exact("cut")["ranks"][0]
    assert not torch.equal(before["method_rng"], after["method_rng"])
    assert after["psi"] is None or after["psi"].shape == (3, 3, 3, 3)
    assert differences({"psi": before["psi"]}, {"psi": after["psi"]}), "redrawn"


def test_every_process_draws_the_same_psis(monkeypatch):
    """One of rank 0 and one of rank 1, each alone: other worlds and actions, the same f_psi."""
    psis, draw, actions, sample = ([], []), randnet.draw_psi, ([], []), randnet.sample
    for rank in (0, 1):
        start = (rank, 1, torch.device("cpu"))

        def drawing(*given, rank=rank):
            psis[rank].append(draw(*given))
            return psis[rank][-1]

        def sampling(*given, rank=rank):
            actions[rank].append(sample(*given))
            return actions[rank][-1]

        with monkeypatch.context() as patch:
            patch.setattr(harness, "start_processes", lambda args, start=start: start)
            patch.setattr(randnet, "draw_psi", drawing)
            patch.setattr(randnet, "sample", sampling)
            argv = tiny(NAME, "run", 2, "--clean-share", 0)
            assert randnet.main([*argv, "--save-every", "0"]) == 0
    assert len(psis[0]) == 2 and differences({"psi": psis[0]}, {"psi": psis[1]}) == []
    assert differences({"actions": actions[0]}, {"actions": actions[1]})


def test_players_and_background():
    """load_player() in either mode; a run beside another one; an evaluation by draws."""
    assert script(NAME).main(tiny(NAME, "run", 2)) == 0
    s = setting(script=randnet)
    starts, ids = np.ones(4, bool), np.tile([1, 0], (4, 1))
    clean = randnet.load_player("run", s.envs, seed=3)
    saved = exact("run")["agent"]["actor"]
    assert differences(dict(clean.net.state_dict()), dict(saved)) == []
    assert clean(s.envs.obs, starts, ids).shape == (4, 2)
    flags = ["--eval-only", "run", "--final-episodes", "2", "--eval-scenarios", "none"]
    flags += ["--randnet-test", "mc", "--background", "run"]
    assert script(NAME).main(flags) == 0
    assert script(NAME).main(tiny(NAME, "mc", 1, "--randnet-test", "mc")) == 0
    player = randnet.load_player("mc", s.envs, seed=3)
    assert len(player.net.psis) == 10
    one, other = (randnet.load_player("mc", s.envs, seed=3) for _ in range(2))
    for _ in range(2):
        assert (one(s.envs.obs, starts, ids) == other(s.envs.obs, starts, ids)).all()


# --- Flags ----------------------------------------------------------------------------------------

WRONG = {
    "--clean-share 1.5": "--clean-share 1.5",
    "--clean-share nan": "--clean-share nan",
    "--feature-matching -1": "--feature-matching",
    "--feature-matching inf": "--feature-matching",
    "--clean-share 1 --randnet-test mc": "--clean-share --randnet-test",
    "--clean-share 1 --feature-matching 50": "--clean-share --feature-matching",
    "--clean-share 1 --randnet-fan channels": "--clean-share --randnet-fan",
    "--rollout-steps 25": "--rollout-steps --chunk-length",
    "--minibatches 321": "--minibatches 320",
    "--resume run --clean-share 0.2": "--clean-share 0.1",
    "--resume run --feature-matching 1": "--feature-matching 0.002",
    "--resume parent": "mappo_meltingpot",
}


def test_wrong_command_lines(tmp_path, capfd):
    for name, run_dir in ((NAME, "run"), (PARENT, "parent")):
        assert script(name).main(tiny(name, run_dir, 1)) == 0
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    for line, words in WRONG.items():
        code = script(NAME).main(line.split())
        out, err = capfd.readouterr()
        assert (code, out) == (2, ""), line
        sentence = only_error(err)
        assert [word for word in words.split() if word not in sentence] == [], sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_was_begun_with_idle_flags_goes_on():
    """Only the evaluation that needs psi is refused then."""
    module = script(NAME)
    args = module.Args(clean_share=1.0, randnet_fan="channels", feature_matching=1.0)
    assert len([text for wrong, text in module.validate(args) if wrong]) == 2
    later = dataclasses.replace(args, eval_only="run")
    assert not any(wrong for wrong, _ in module.validate(later))
    later = dataclasses.replace(later, randnet_test="mc")
    assert len([text for wrong, text in module.validate(later) if wrong]) == 1


def test_help_and_args_json(tmp_path):
    flags_of_all.test_without_melting_pot(NAME, tmp_path)
    flags_of_all.test_every_flag_arrives_in_args_json(NAME, tmp_path)


def test_every_flag_changes_what_it_names():
    """Those that MAPPO does not have; the others: test_training.py and test_meltingpot_flags.py."""
    own = {x.name for x in dataclasses.fields(randnet.Args)}
    own -= {x.name for x in dataclasses.fields(mappo.Args)}
    base = ("--clean-share", 0)
    changes = {
        "clean_share": ("--clean-share", 0.9),
        "randnet_fan": (*base, "--randnet-fan", "channels"),
        "feature_matching": (*base, "--feature-matching", 50),
    }
    assert own == changes.keys() | {"randnet_test"}  # test_mc_is_the_mean_over_draws
    assert script(NAME).main(tiny(NAME, "base", 2, *base)) == 0
    for flag, flags in changes.items():
        assert script(NAME).main(tiny(NAME, flag, 2, *flags)) == 0
    for flag in changes:
        apart = differences(exact("base")["agent"]["actor"], exact(flag)["agent"]["actor"])
        assert apart, flag
    logged = {run: [m["feature_matching"] for m in metrics(run)] for run in ("base", *changes)}
    assert min(logged["base"]) > 0 and logged["clean_share"] == [0, 0]
    assert logged["randnet_fan"][0] > logged["base"][0], "a wider psi moves h further"
    assert exact("feature_matching")["ranks"][0]["psi"] is not None


# --- The diff is the paper ------------------------------------------------------------------------


def test_diff_with_mappo_is_the_method():
    parent, child = (path.read_text().splitlines() for path in (MAPPO, RANDNET))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.20 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.05 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"
    assert shared_blocks(RANDNET) == shared_blocks(MAPPO)
