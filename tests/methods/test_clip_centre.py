"""The centre of Eq. (9)'s clip: against NumPy, and on bandits that one can solve on paper."""

import dataclasses

import numpy as np
import pytest
import torch
from runs import BIDIST, exact, metrics, tiny
from toolbox import bidist, collect, setting, sharpen, softmax, update

pytestmark = pytest.mark.numeric

ARMS, SAMPLES, FICTITIOUS = 8, 6400, 0.32


def bandit(kind, gap, preferred=0.0, offset=0.0, iterations=50, per_population=False):
    """pi_theta of each arm, (8,), after training beside a frozen uniform phi on a bandit whose
    first arm is better by gap deviations of the reward's noise and of whose samples a share is
    phi's; offset: what phi's samples earn less; preferred: theta's first logit at the start."""
    rng, cap = np.random.default_rng(0), {"capped": 1.0}.get(kind)
    logits = torch.zeros(ARMS, requires_grad=True)
    logits.data[0] = preferred
    adam = torch.optim.Adam([logits], lr=2e-3, eps=1e-5)
    for _ in range(iterations):
        old, phi = softmax(logits.detach().numpy()), np.full(ARMS, 1 / ARMS)
        trained = rng.random(SAMPLES) >= FICTITIOUS
        action = np.where(
            trained, rng.choice(ARMS, SAMPLES, p=old), rng.choice(ARMS, SAMPLES, p=phi)
        )
        acted = np.where(trained, old[action], phi[action])
        advantage = gap * (action == 0) + rng.standard_normal(SAMPLES) - offset * ~trained
        groups = [trained, ~trained] if per_population else [np.ones(SAMPLES, bool)]
        for group in groups:
            chosen = advantage[group]
            advantage[group] = (chosen - chosen.mean()) / chosen.std()
        weight = old[action] / acted
        weight = np.minimum(weight, cap) if cap else weight
        for _ in range(5):
            for index in np.array_split(rng.permutation(SAMPLES), 5):
                log_probs = logits.log_softmax(-1)
                chosen = log_probs[action[index]]
                if kind == "printed":
                    ratio, centre = chosen.exp() / torch.tensor(acted[index]), 1.0
                else:
                    centre = torch.tensor(weight[index])
                    ratio = centre * chosen.exp() / torch.tensor(old[action[index]])
                objective = bidist.clip_objective(
                    ratio, torch.tensor(advantage[index]), clip=0.2, centre=centre
                )
                entropy = -(log_probs.exp() * log_probs).sum()
                loss = -objective.mean() - 0.01 * entropy
                adam.zero_grad()
                loss.backward()
                adam.step()
    return softmax(logits.detach().numpy())


def test_the_printed_clip_walls_theta_in_and_the_centred_one_does_not():
    """Noise holds theta within a fifth of phi, 1/8; without that wall the better arm is found."""
    printed, centred = bandit("printed", gap=0.1), bandit("old", gap=0.1)
    assert printed[0] < 1.35 / ARMS
    assert centred[0] > 0.4


@pytest.mark.parametrize("per_population", [False, True])
def test_without_a_signal_an_offset_between_populations_moves_nothing(per_population):
    """The weight uncapped: E_phi[w grad log pi_theta] = 0, so that a constant is no gradient."""
    before = softmax(np.array([0.4, *[0.0] * 7]))
    after = bandit("old", gap=0, preferred=0.4, offset=1.0, per_population=per_population)
    assert np.abs(after - before).max() < 0.07


def test_a_capped_weight_needs_advantages_per_population():
    """Why the flags go together: capped, a constant offset becomes a gradient."""
    before = softmax(np.array([0.4, *[0.0] * 7]))
    apart = bandit("capped", gap=0, preferred=0.4, offset=1.0, per_population=True)
    together = bandit("capped", gap=0, preferred=0.4, offset=1.0)
    assert np.abs(apart - before).max() < 0.07
    assert together[0] - before[0] > 0.2


def rollout(*flags):
    """A setting and a batch in which theta and phi differ much."""
    s = setting(
        *("--epochs", "1", "--minibatches", "1", "--entropy-coef", "0", "--num-envs", "32"), *flags
    )
    sharpen(s.agent.actor, 3)
    sharpen(s.agent.distilled, 3, seed=1)
    return s, collect(s)


def gathered(log_probs, batch):
    return log_probs.gather(-1, batch.actions[..., None])[..., 0].numpy()


@pytest.mark.parametrize("cap", [None, 1.0])
def test_the_centred_objective_is_numpys(cap):
    """min(r A, clip(r, w (1 -+ eps)) A), w = pi_theta_old / who acted; at theta_old: w A."""
    flags = ["--weight-cap", str(cap)] if cap else []
    s, batch = rollout("--clip-centre", "old", "--advantages-per-population", *flags)
    moved = torch.randn(batch.theta.shape, generator=torch.Generator().manual_seed(3)) / 2
    now = (batch.theta + moved).log_softmax(-1)
    log_prob = now.gather(-1, batch.actions[..., None])[..., 0]
    ratio, centre = bidist.ratio_and_centre(s.args, log_prob, batch)
    w = np.exp(gathered(batch.theta, batch) - batch.log_probs.numpy())
    w = np.minimum(w, cap) if cap else w
    r = w * np.exp(log_prob.numpy() - gathered(batch.theta, batch))
    np.testing.assert_allclose(ratio.numpy(), r, rtol=1e-4)
    np.testing.assert_allclose(centre.numpy(), w, rtol=1e-4)
    assert (w[batch.trained.numpy()] == 1).all()
    A = np.random.default_rng(0).standard_normal(r.shape).astype(np.float32)
    ours = bidist.clip_objective(ratio, torch.from_numpy(A), 0.2, centre).numpy()
    theirs = np.minimum(r * A, np.clip(r, 0.8 * w, 1.2 * w) * A)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    if cap is None:
        expected = np.minimum(r, np.clip(r, 0.8 * w, 1.2 * w))[A > 0]
        np.testing.assert_allclose(ours[A > 0] / A[A > 0], expected, rtol=1e-3)


@pytest.mark.parametrize("centre", ["printed", "old"])
def test_the_loss_that_trains(centre):
    """A step without a learning rate, against NumPy: a sample's ratio is then w = pi_theta / pi_phi
    where phi acted. Centred, no clip cuts w A; around 1, as printed, it does."""
    rates = ("--epochs", "1", "--minibatches", "1", "--actor-lr", "0", "--critic-lr", "0")
    s, batch = rollout("--clip-centre", centre, *rates)
    found = update(s, batch)["policy_loss"].item()
    theta = gathered(s.batch.theta, s.batch)
    acted = np.where(s.batch.trained.numpy(), theta, gathered(s.batch.phi, s.batch))
    w, A = np.exp(theta - acted), s.batch.advantages.numpy()
    around_one = np.minimum(w * A, np.clip(w, 0.8, 1.2) * A)
    losses = {"old": -(w * A).mean(), "printed": -around_one.mean()}
    assert abs(losses["old"] - losses["printed"]) > 0.05
    assert found == pytest.approx(losses[centre], abs=1e-3)


def test_the_centred_form_is_the_printed_one_where_all_are_trained():
    results = []
    for centre in ("printed", "old"):
        s = setting("--p", "0", "--clip-centre", centre)
        update(s, collect(s))
        results.append(s.agent.actor.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


def test_advantages_per_population():
    """Mean 0 and deviation 1 in each population; together, only over both."""
    for flags, apart in (([], False), (["--advantages-per-population"], True)):
        s, batch = rollout(*flags)
        batch.rewards = batch.rewards + 3.0 * ~batch.trained
        update(s, batch)
        advantages = s.batch.advantages
        for who in (batch.trained, ~batch.trained):
            mean, std = float(advantages[who].mean()), float(advantages[who].std())
            assert (abs(mean) < 1e-3 and abs(std - 1) < 1e-2) == apart
        assert abs(float(advantages.mean())) < 1e-3


def test_importance_weights():
    s, batch = rollout()
    found = bidist.importance_weights(batch)
    w = np.exp(gathered(batch.theta, batch) - gathered(batch.phi, batch))
    w = w[~batch.trained.numpy()]
    assert float(found["weight_max"]) == pytest.approx(w.max(), rel=1e-3)
    effective = w.sum() ** 2 / (w**2).sum() / len(w)
    assert float(found["effective_samples"]) == pytest.approx(effective, rel=1e-3)


@pytest.mark.parametrize("every", [1, 2])
def test_copy_every_makes_phi_a_copy_of_theta(every):
    """A control: phi plays as theta of at most N - 1 iterations ago, and is not distilled."""
    s = setting("--copy-every", str(every))
    batch = collect(s)
    assert torch.equal(batch.theta, batch.phi)
    update(s, batch)
    assert bidist.distillation_phase(s.args, 1) is None
    sharpen(s.agent.actor)
    lagging = collect(s)
    assert not torch.equal(lagging.theta, lagging.phi)
    s.agent.copy_actor()
    s.state = dataclasses.replace(s.state, distilled_hidden=s.state.actor_hidden)
    batch = collect(s)
    assert torch.equal(batch.theta, batch.phi)


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_with_copy_every_copies_after_the_update(every, tmp_path):
    """phi plays as theta, or as theta an update ago: KL(theta, phi) is 0 in iterations 1 and 2, 4,
    6 with N = 2, in all with N = 1; at the end phi is the theta that has been saved with it."""
    run_dir = tmp_path / "run"
    assert bidist.main(tiny(BIDIST, run_dir, 4, "--copy-every", every)) == 0
    apart = [m["kl"] > 0 for m in metrics(run_dir)]
    assert apart == ([False] * 4 if every == 1 else [False, True, False, True])
    saved = exact(run_dir)
    nets = saved["agent"]
    assert all(torch.equal(x, nets["distilled"][name]) for name, x in nets["actor"].items())
    state = saved["ranks"][0]["state"]
    assert torch.equal(state["actor_hidden"], state["distilled_hidden"])
    shorter = tmp_path / "shorter"
    assert bidist.main(tiny(BIDIST, shorter, 3, "--copy-every", every)) == 0
    nets = exact(shorter)["agent"]
    same = all(torch.equal(x, nets["distilled"][name]) for name, x in nets["actor"].items())
    assert same == (every == 1), "N = 2: the third update is not copied"


def test_advantages_far_from_zero_are_normalised():
    """A deviation of .01 about 300, where float32 loses mean square less squared mean."""
    noise = torch.randn(40, 16, 2, generator=torch.Generator().manual_seed(1))
    trained = torch.ones(40, 16, 2, dtype=torch.bool)
    for flags in ({}, {"advantages_per_population": True}):
        args = dataclasses.replace(bidist.Args(), **flags)
        found = bidist.normalise_advantages(args, 300 + 0.01 * noise, trained)
        assert found.dtype == torch.float32
        assert abs(found.mean()) < 0.05 and abs(found.std() - 1) < 0.05
