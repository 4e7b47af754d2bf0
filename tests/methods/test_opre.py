"""OPRE: its equations against NumPy, against MAPPO where K = 1, and its runs on the toy."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import MAPPO, OPRE, differences, exact, metrics, only_error, resume, script, tiny
from toolbox import (
    UNLIKE_DEFAULTS,
    collect,
    mappo,
    opre,
    prepare,
    setting,
    sharpen,
    softmax,
    update,
)

from envs.meltingpot.toy import TileGame

pytestmark = pytest.mark.numeric


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 2


def log(x):
    return torch.from_numpy(np.log(x))


# --- Equations ------------------------------------------------------------------------------------


def test_mixtures_are_sums():
    """pi and mu by loops over options; also where one of them knows no doubt."""
    weights, options = softmax(normal(5, 16)), softmax(normal(5, 16, 8, seed=1))
    ours = opre.mixture(log(weights), log(options)).exp().numpy()
    expected = sum(weights[:, z, None] * options[:, z] for z in range(16))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    sure = torch.full((2, 3), -1e4)
    sure[:, 1] = 0
    assert torch.equal(
        opre.mixture(sure, log(options[:2, :3]).float()), log(options[:2, 1]).float()
    )


def test_the_clip_is_centred():
    """min(r A, clip(r, w (1 -+ eps)) A), in both signs of A and on all sides of the clip."""
    w, r = np.exp(normal(400)), np.exp(normal(400) + normal(400, seed=1) / 4)
    advantage = normal(400, seed=2)
    expected = np.minimum(r * advantage, np.clip(r, 0.8 * w, 1.2 * w) * advantage)
    ours = opre.clip_objective(*map(torch.from_numpy, (r, advantage)), 0.2, torch.from_numpy(w))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_the_loss_that_trains():
    """A step without a learning rate: no clip cuts the weight of a sample of mu, as one around 1
    would. (Against NumPy.)"""
    rates = "--epochs 1 --minibatches 1 --actor-lr 0 --critic-lr 0 --num-envs 32"
    s = setting(*rates.split(), script=opre)
    sharpen(s.agent.actor.out, 8)
    sharpen(s.agent.critic.posterior, 4)
    batch = prepare(s, collect(s))
    w, A = (batch.old_log_probs - batch.log_probs).exp().numpy(), batch.advantages.numpy()
    around_one = np.minimum(w * A, np.clip(w, 0.8, 1.2) * A)
    assert abs((around_one - w * A).mean()) > 0.02
    found = opre.update(s.args, s.agent, batch, s.rng)["policy_loss"].item()
    assert found == pytest.approx(-(w * A).mean(), abs=1e-3)


def test_kl_divergence_is_numpys():
    q, p = softmax(normal(7, 4)), softmax(normal(7, 4, seed=1))
    expected = (q * np.log(q / p)).sum(-1).mean()
    assert float(opre.kl_divergence(log(q), log(p))) == pytest.approx(expected, rel=1e-12)


def test_what_options_are_for():
    q, p, eta = softmax(normal(90, 4)), softmax(normal(90, 4, seed=1)), softmax(normal(90, 4, 3))

    def entropy(x):
        return -(x * np.log(x)).sum(-1)

    found = opre.describe(log(q), log(p), log(eta))
    mu = np.einsum("mz,mza->ma", p, eta)
    expected = {
        "kl": (q * np.log(q / p)).sum(-1).mean(),
        "prior_entropy": entropy(p).mean(),
        "posterior_entropy": entropy(q).mean(),
        "options_used": np.exp(entropy(q.mean(0))),
        "option_information": (entropy(mu) - (p * entropy(eta)).sum(-1)).mean(),
    }
    assert {name: pytest.approx(x, rel=1e-9) for name, x in expected.items()} == found
    alike = opre.describe(log(q), log(p), log(eta)[:, :1].expand(-1, 4, -1))
    assert float(alike["option_information"]) == pytest.approx(0, abs=1e-12)


# --- Acting, values, what an update has -----------------------------------------------------------


def sharp(*flags, scale=2.0):
    """A setting whose options, prior and posterior differ much."""
    s = setting("--num-options", "5", *flags, script=opre)
    sharpen(s.agent.actor, scale)
    sharpen(s.agent.critic, scale, seed=1)
    return s


def run_networks(s, batch, hidden):
    """p, eta, q and c over a rollout, NumPy float64; hidden: the critic's before it."""
    sprites, half = s.agent.sprites(), 128
    with torch.no_grad():
        views = batch.actor_views()
        p, eta, _ = s.agent.actor.options(views, batch.actor_hidden[0], sprites)
        views, net = batch.critic_views(), s.agent.critic
        q, _ = net.posterior(views, hidden[..., half:], sprites)
        c, _ = net.values(views, hidden[..., :half], sprites)
    p, eta, q, c = (x.double().numpy() for x in (p, eta, q, c))
    return np.exp(p), np.exp(eta), softmax(q), c


def taken(probs, batch):
    return np.take_along_axis(probs, batch.actions.numpy()[..., None], -1)[..., 0]


@pytest.mark.parametrize("form", ["options", "plain"])
def test_what_is_recorded(form):
    """The behaviour is mu, pi_old is the posterior's mixture, values are, too."""
    s = sharp("--critic-form", form, "--max-episode-steps", "7")
    for _ in range(2):
        hidden = s.state.critic_hidden
        batch = collect(s)
        mean, std = s.agent.value_norm.mean_std()
        values, _, _ = opre.estimate(s.args, s.agent, batch, hidden)
        batch = prepare(s, batch)
        p, eta, q, c = run_networks(s, batch, hidden)
        mu = np.einsum("tbnz,tbnza->tbna", p, eta)
        pi = np.einsum("tbnz,tbnza->tbna", q[:-1], eta)
        np.testing.assert_allclose(batch.log_probs, np.log(taken(mu, batch)), atol=1e-4)
        np.testing.assert_allclose(batch.old_log_probs, np.log(taken(pi, batch)), atol=1e-4)
        assert (batch.log_probs - batch.old_log_probs).abs().max() > 0.1, "they must differ"
        expected = (q * c).sum(-1) if form == "options" else c[..., 0]
        expected = expected[:-1] * float(std) + float(mean)
        np.testing.assert_allclose(values, expected, atol=1e-4)
    assert batch.finals and batch.critic_hidden.abs().sum() > 0


def test_figures_of_the_weights():
    s = sharp()
    batch = prepare(s, collect(s))
    found = opre.report(batch, {})
    w = np.exp((batch.old_log_probs - batch.log_probs).double().numpy())
    assert float(found["weight_max"]) == pytest.approx(w.max(), rel=1e-3)
    effective = w.sum() ** 2 / (w**2).sum() / w.size
    assert float(found["effective_samples"]) == pytest.approx(effective, rel=1e-3)


def gradients(monkeypatch, *flags, advantages=0.0):
    """Of an update's first policy loss: {name of a weight of actor or posterior: its gradient}."""
    s = sharp("--epochs", "1", "--minibatches", "2", "--entropy-coef", "0", *flags)
    batch = prepare(s, collect(s))
    batch = replace(batch, advantages=advantages * batch.advantages)
    found = []

    def descend(loss, net, optimiser, max_norm):
        net.zero_grad()
        loss.backward()
        names = ("actor", "posterior") if isinstance(net, torch.nn.ModuleList) else ("values",)
        nets = net if len(names) == 2 else [net]
        own = {f"{n}.{k}": p.grad for n, x in zip(names, nets) for k, p in x.named_parameters()}
        found.append({name: g.clone() for name, g in own.items() if g is not None and g.any()})
        return loss.detach()

    monkeypatch.setattr(opre, "descend", descend)
    opre.update(s.args, s.agent, batch, s.rng)
    return found[0], found[1], s


def parts(gradient):
    return {".".join(name.split(".")[:2]) for name in gradient}


def test_each_loss_moves_what_it_should(monkeypatch):
    """c_p's KL: the prior alone; c_q's: the posterior alone; the objective: options and posterior,
    not the prior; values: not the posterior."""
    off = ["--prior-coef", "0", "--posterior-coef", "0"]
    trunk = {f"actor.{x}" for x in ("cnn", "mlp", "norm", "gru", "head")}
    posterior = {f"posterior.{x}" for x in ("cnn", "mlp", "norm", "gru", "head", "out")}
    found, values, _ = gradients(monkeypatch, "--posterior-coef", "0")
    assert parts(found) == trunk | {"actor.prior"}
    assert parts(values) == {x.replace("posterior", "values") for x in posterior}
    found, _, _ = gradients(monkeypatch, "--prior-coef", "0")
    assert parts(found) == posterior
    found, _, _ = gradients(monkeypatch, *off, advantages=1.0)
    assert parts(found) == trunk | {"actor.out"} | posterior
    found, values, s = gradients(monkeypatch, *off, "--share-critic", advantages=1.0)
    assert parts(found) == trunk | {"actor.out"} | posterior - {"posterior.cnn"}
    assert "values.cnn" in parts(values)
    names = {name for name, _ in s.agent.critic.named_parameters()}
    assert not [x for x in names if x.startswith("posterior.cnn")]


@pytest.mark.parametrize(
    ("trained", "coefficient"),
    [("prior", 1.0), ("prior", 0.3), ("posterior", 0.01), ("posterior", 2.0)],
)
def test_divergences_have_their_sign_and_weight(trained, coefficient, monkeypatch):
    """The gradient of the last layer's bias, by NumPy: c_p (p - q) and c_q q (log q/p - KL), means
    over samples; the other's coefficient and all advantages are 0."""
    other = {"prior": "posterior", "posterior": "prior"}[trained]
    flags = [f"--{trained}-coef", str(coefficient), f"--{other}-coef", "0"]
    s = sharp("--epochs", "1", "--minibatches", "1", "--entropy-coef", "0", *flags)
    batch = prepare(s, collect(s))
    batch = replace(batch, advantages=0 * batch.advantages)
    p, _, q, _ = run_networks(s, batch, batch.critic_hidden[0])
    q = q[:-1]
    ratio = np.log(q / p)
    expected = p - q if trained == "prior" else q * (ratio - (q * ratio).sum(-1, keepdims=True))
    found = []

    def descend(loss, net, optimiser, max_norm):
        bias = s.agent.actor.prior.bias if trained == "prior" else s.agent.critic.posterior.out.bias
        if not found:  # the policy's loss comes first
            loss.backward()
            found.append(bias.grad.numpy())
        return loss.detach()

    monkeypatch.setattr(opre, "descend", descend)
    opre.update(s.args, s.agent, batch, s.rng)
    mean = coefficient * expected.mean((0, 1, 2))
    np.testing.assert_allclose(found[0], mean, rtol=1e-3, atol=1e-5 * coefficient)
    assert np.abs(mean).max() > 1e-3 * coefficient


def test_the_gradient_of_kl_is_numpys():
    """Into p: softmax(p) - q. Into q: q (log q/p - KL)."""
    a, b = normal(6, 4), normal(6, 4, seed=1)
    q, p = softmax(a), softmax(b)
    for_q, for_p = (torch.from_numpy(x).requires_grad_() for x in (a, b))
    log_q, log_p = for_q.log_softmax(-1), for_p.log_softmax(-1)
    opre.kl_divergence(log_q.detach(), log_p).backward()
    np.testing.assert_allclose(for_p.grad, (p - q) / 6, rtol=1e-9)
    assert for_q.grad is None
    opre.kl_divergence(log_q, log_p.detach()).backward()
    ratio = np.log(q / p)
    np.testing.assert_allclose(
        for_q.grad, q * (ratio - (q * ratio).sum(-1, keepdims=True)) / 6, rtol=1e-9
    )


@pytest.mark.parametrize(
    "form, flags, rounding",
    [
        ("options", [], 0),
        ("plain", [], 0),
        ("options", [*UNLIKE_DEFAULTS, "--max-grad-norm", "1e6"], 0),
        ("options", UNLIKE_DEFAULTS, 1e-5),
    ],
    ids=["options", "plain", "others", "clipped"],
)
def test_one_option_is_mappo_bit_for_bit(form, flags, rounding):
    """From the same weights: rollouts, losses, networks of three iterations. What MAPPO lacks has
    no gradient. A norm over more tensors is summed in another order, so gradients that are clipped
    by it differ by rounding."""

    def same(x, y, rounding=rounding):
        return torch.allclose(x, y, rtol=rounding, atol=rounding)

    short = ["--epochs", "2", "--minibatches", "2", *flags]
    parent = setting(*short, script=mappo)
    child = setting("--num-options", "1", "--critic-form", form, *short, script=opre)
    extra = child.agent.actor.load_state_dict(parent.agent.actor.state_dict(), strict=False)
    assert extra.missing_keys == ["prior.weight", "prior.bias"] and not extra.unexpected_keys
    child.agent.critic.values.load_state_dict(parent.agent.critic.state_dict())
    apart = [child.agent.actor.prior, child.agent.critic.posterior]
    apart = [(net, {k: x.clone() for k, x in net.state_dict().items()}) for net in apart]
    for _ in range(3):
        scalars = [update(s, collect(s)) for s in (parent, child)]
        for name in ("actions", "log_probs", "values", "advantages", "targets"):
            assert same(getattr(parent.batch, name), getattr(child.batch, name)), name
        for name, x in scalars[0].items():
            assert same(x, scalars[1][name], max(rounding, 1e-6 * ("norm" in name))), name
    ours = child.agent.actor.state_dict()
    for name, x in parent.agent.actor.state_dict().items():
        assert same(x, ours[name]), name
    ours = child.agent.critic.values.state_dict()
    assert all(same(x, ours[k]) for k, x in parent.agent.critic.state_dict().items())
    assert all(torch.equal(x, net.state_dict()[k]) for net, own in apart for k, x in own.items())


class BlindGame(TileGame):
    """The toy, whose colour the critic and the posterior see, and a player never does."""

    def _observe(self):
        obs = super()._observe()
        obs.tile_ids[:, :, 0, 0] = 0
        return obs


@pytest.mark.long
@pytest.mark.parametrize("centre", ["w", "1"])
def test_the_posterior_answers_what_the_prior_cannot_see(centre, monkeypatch):
    """Whoever does not see the colour is right in a third of the steps; pi learns to be right
    always, though only mu ever acts, unless the clip is around 1. Options differ from the start, to
    make it short."""
    if centre == "1":
        clip = opre.clip_objective
        monkeypatch.setattr(
            opre, "clip_objective", lambda r, A, eps, w: clip(r, A, eps, torch.ones_like(w))
        )
    flags = "--num-envs 32 --epochs 4 --minibatches 2 --actor-lr 2e-3 --critic-lr 2e-3"
    s = setting(*flags.split(), script=opre)
    s.envs = BlindGame(32, seed=1)
    s.envs.reset()
    sharpen(s.agent.actor.out, 4)
    sharpen(s.agent.critic.posterior, 0.5)
    shares = []
    for _ in range(11):
        batch = prepare(s, collect(s))
        p, eta, q, _ = run_networks(s, batch, batch.critic_hidden[0])
        colour = batch.world_ids[:-1, :, 0, 0].long().numpy() - 1
        right = np.eye(3)[colour][:, :, None]  # (T, B, 1, A)
        mu = (np.einsum("tbnz,tbnza->tbna", p, eta) * right).sum(-1).mean()
        pi = (np.einsum("tbnz,tbnza->tbna", q[:-1], eta) * right).sum(-1).mean()
        shares.append((mu, pi))
        figures = opre.update(s.args, s.agent, batch, s.rng)
    assert max(mu for mu, _ in shares) < 0.5, shares
    if centre == "1":
        assert shares[-1][1] < 0.6, shares
        return
    assert shares[0][1] < 0.45 and shares[-1][1] > 0.8, shares
    assert figures["kl"] > 0.3 and figures["options_used"] > 2


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of OPRE and MAPPO."""
    folder = tmp_path_factory.mktemp("runs")
    for name in (OPRE, MAPPO):
        assert script(name).main(tiny(name, folder / name, 1)) == 0
    return folder


@pytest.mark.parametrize(
    "flags", ["", "--share-critic --max-episode-steps 7 --eval-every 40 --amp"]
)
def test_six_are_three_and_three(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_dir, iterations in (("whole", 6), ("cut", 3)):
        assert opre.main(tiny(OPRE, run_dir, iterations, *flags.split())) == 0
    assert opre.main(resume("cut", 6)) == 0
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    logged = {"kl", "prior_entropy", "posterior_entropy", "options_used", "option_information"}
    assert logged | {"weight_max", "effective_samples"} <= set(metrics("cut")[0])


def test_load_player_plays_mu(runs):
    s = setting("--num-envs", "6", script=opre)
    starts, ids = np.ones(6, bool), np.tile([1, 0], (6, 1))
    player = opre.load_player(str(runs / OPRE), s.envs, seed=3)
    again = opre.NetPlayer(player.net, s.agent.sprites, seed=3)
    sharpen(player.net, 2)
    for _ in range(3):
        before = again.hidden
        actions = player(s.envs.obs, starts, ids)
        assert (actions == again(s.envs.obs, starts, ids)).all()
        tile_ids, features, _, _ = opre.observe(s.envs.obs, torch.device("cpu"), torch.tensor(ids))
        views = opre.Views(tile_ids, features, torch.tensor(starts))
        hidden = torch.zeros(6, 2, 128) if before is None else before
        ours, _ = opre.act(player.net, views, hidden, s.agent.sprites)
        views = opre.Views(*(x[None] for x in views))
        with torch.no_grad():
            p, eta, _ = player.net.options(views, hidden, s.agent.sprites())
        mu = torch.einsum("bnz,bnza->bna", p[0].exp(), eta[0].exp())
        assert torch.allclose(ours.exp(), mu, atol=1e-6)
        s.envs.step(actions)
        starts = np.zeros(6, bool)


WRONG = {  # the script, its command line, words of the sentence
    "mappo's actor": (OPRE, "--background {runs}/{MAPPO}", "does not fit"),
    "opre's actor": (MAPPO, "--background {runs}/{OPRE}", "does not fit"),
    "other options": (OPRE, "--num-options 3 --background {runs}/{OPRE}", "does not fit"),
    "mappo's run": (OPRE, "--resume {runs}/{MAPPO}", "mappo_meltingpot"),
    "opre's run": (MAPPO, "--eval-only {runs}/{OPRE}", "opre_meltingpot"),
    "resumed": (OPRE, "--resume {runs}/{OPRE} --num-options 3", "--num-options is 16"),
    "no options": (OPRE, "--num-options 0", "--num-options"),
    "one prior": (OPRE, "--num-options 1 --prior-coef 0.5", "--num-options 1 leaves no use"),
    "one q": (OPRE, "--num-options 1 --share-critic", "no use for --share-critic"),
    "one posterior": (OPRE, "--num-options 1 --posterior-coef 0", "--posterior-coef"),
    "prior": (OPRE, "--prior-coef -1", "--prior-coef"),
    "posterior": (OPRE, "--posterior-coef nan", "--posterior-coef"),
    "chunks": (OPRE, "--rollout-steps 25", "--chunk-length"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_line(case, runs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, line, words = WRONG[case]
    argv = shlex.split(line.format(runs=runs, OPRE=OPRE, MAPPO=MAPPO))
    if "--background" in argv:
        argv = tiny(name, "run", 1, *argv)
    assert script(name).main(argv) == 2
    assert words in only_error(capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_run_beside_another_of_its_kind(runs, tmp_path, capfd):
    argv = tiny(OPRE, tmp_path / "run", 1, "--background", runs / OPRE, "--final-episodes", 2)
    assert opre.main(argv) == 0
    assert f"v {runs / OPRE}" in capfd.readouterr().out


def one_update(*flags):
    s = sharp("--epochs", "1", "--minibatches", "2", *flags)
    before = {k: x.clone() for k, x in s.agent.actor.state_dict().items()}
    scalars = update(s, collect(s))
    after = s.agent.actor.state_dict()
    return s, {k for k, x in before.items() if not torch.equal(x, after[k])}, scalars


def test_every_flag_changes_what_it_names():
    """Those of the method; the rest do what they do in MAPPO: test_one_option_..."""
    s, moved, scalars = one_update()
    assert s.agent.actor.prior.out_features == 5 and "prior.weight" in moved
    assert s.agent.critic.values.out.out_features == 5
    _, moved, _ = one_update("--prior-coef", "0")
    assert "prior.weight" not in moved and "out.weight" in moved
    _, _, strong = one_update("--posterior-coef", "30")
    assert strong["kl"] < scalars["kl"]
    s, _, _ = one_update("--critic-form", "plain", "--share-critic")
    assert s.agent.critic.values.out.out_features == 1
    assert {x for x, _ in s.agent.critic.posterior.named_children()}.isdisjoint({"cnn"})
    s = setting("--num-options", "3", script=opre)
    assert s.agent.actor.out.out_features == 3 * 3
