"""Each equation against NumPy written from the paper, which imports nothing that it checks."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toolbox import (
    bidist,
    collect,
    distill,
    mappo,
    prepare,
    setting,
    sharpen,
    softmax,
    update,
    weights,
)

pytestmark = pytest.mark.numeric

# --- Eqs. (3)-(5): the fictitious population ------------------------------------------------------


def probability_of_v(v: tuple[int, ...], q: float) -> float:
    """P(v) after shuffling, by enumeration of Eqs. (3)-(5) over all orders of the agents.
    q: probability of being fictitious."""
    total, orders = 0.0, list(itertools.permutations(range(len(v))))
    for order in orders:
        p = 1.0
        for position, agent in enumerate(order):
            last = position == len(v) - 1
            if last and not any(v[earlier] for earlier in order[:position]):
                p *= v[agent]  # delta_N = 0: trained for certain
            else:
                p *= (1 - q) if v[agent] else q
        total += p
    return total / len(orders)


@pytest.mark.parametrize("num_agents", range(1, 9))
@pytest.mark.parametrize("p", [0.2, 0.4, 0.9])
def test_frequencies_of_v(num_agents, p):
    draws = 60_000
    args = bidist.parse(["--p", str(p)])
    v = bidist.draw_trained(args, (draws, num_agents), torch.Generator().manual_seed(0))
    assert v.shape == (draws, num_agents)
    assert v.any(1).all(), "the safeguard: somebody is always trained"
    if num_agents <= 6:  # orders of 8 agents are 40,320, times 256 patterns
        codes = v.numpy() @ (1 << np.arange(num_agents))
        for pattern in itertools.product((0, 1), repeat=num_agents):
            expected = probability_of_v(pattern, p)
            share = np.mean(codes == np.dot(pattern, 1 << np.arange(num_agents)))
            error = 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12
            assert abs(share - expected) <= error, (pattern, share, expected)
    trained = np.bincount(v.sum(1), minlength=num_agents + 1) / draws
    for k in range(1, num_agents + 1):  # binomial, but none trained counts as one
        expected = binomial(num_agents, k, 1 - p) + (k == 1) * p**num_agents
        error = 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12
        assert abs(trained[k] - expected) <= error, (k, trained[k], expected)


def binomial(n: int, k: int, p: float) -> float:
    ways = np.prod(np.arange(n - k + 1, n + 1) / np.arange(1, k + 1))
    return float(ways * p**k * (1 - p) ** (n - k))


def test_two_agents_at_the_papers_p():
    """docs: both trained .36, one .64."""
    args = bidist.parse([])
    v = bidist.draw_trained(args, (100_000, 2), torch.Generator().manual_seed(1)).sum(1).float()
    assert abs((v == 2).float().mean() - 0.36) < 0.008
    assert abs((v == 1).float().mean() - 0.64) < 0.008


def test_default_p_depends_on_the_number_of_agents():
    args = bidist.parse([])
    assert bidist.fictitious_probability(args, 2) == 0.4
    assert bidist.fictitious_probability(args, 8) == 0.2
    args = bidist.parse(["--p", "0.3"])
    assert bidist.fictitious_probability(args, 8) == 0.3


def test_each_world_has_its_own_v_and_v_zero():
    rng = torch.Generator().manual_seed(0)
    own = bidist.draw_trained(bidist.parse([]), (50, 8), rng)
    assert not (own == own[0]).all()
    assert not bidist.draw_trained(bidist.parse(["--all-fictitious"]), (50, 8), rng).any()


# --- Alg. 1, lines 9-13: when phi is distilled ----------------------------------------------------


@pytest.mark.parametrize("k_d", [1, 2, 3, 5, 10, 20, 40])
def test_schedule(k_d):
    odd = {m * k_d for m in range(1, 100, 2)}
    even = {m * k_d for m in range(2, 100, 2)}
    flags = {"": (1, 1), "--no-forward": (0, 1), "--no-reverse": (1, 0)}
    for flag, (forward, reverse) in flags.items():
        args = bidist.parse(["--k-d", str(k_d), *filter(None, [flag])])
        for k in range(1, 41):
            expected = None
            if k in odd and forward:
                expected = "forward"
            if k in even and reverse:
                expected = "reverse"
            assert bidist.distillation_phase(args, k) == expected, (k, flag)


# --- Eqs. (7), (8) and Prop. 4.1: distillation ----------------------------------------------------


def random_log_probs(shape, seed: int) -> np.ndarray:
    return np.log(softmax(2 * np.random.default_rng(seed).normal(size=shape)))


def test_kl_and_comparison():
    theta, phi = random_log_probs((7, 3, 5), 0), random_log_probs((7, 3, 5), 1)
    kl, shift, theta_prefers, phi_prefers, peak = [], [], [], [], []
    for index in np.ndindex(7, 3):
        a, b = np.exp(theta[index]), np.exp(phi[index])
        kl.append(sum(a[j] * np.log(a[j] / b[j]) for j in range(5)))  # Eq. (A.1)
        shift.append(a.argmax() != b.argmax())
        theta_prefers.append(a.max())
        phi_prefers.append(b[a.argmax()])
        peak.append(b.max())
    compared = bidist.compare(torch.from_numpy(theta), torch.from_numpy(phi))
    expected = {"kl": kl, "shift": shift, "theta_prefers": theta_prefers}
    expected |= {"phi_prefers": phi_prefers, "phi_peak": peak}
    for name, values in expected.items():
        assert float(compared[name]) == pytest.approx(np.mean(values), abs=1e-6), name


def test_sign_of_the_gradient_in_both_phases():
    """d KL(theta || phi) / d logits of phi = pi_phi - pi_theta: forward goes down, reverse up."""
    theta = torch.from_numpy(random_log_probs((4, 6), 0))
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 6))).requires_grad_()
    bidist.kl_divergence(theta, logits.log_softmax(-1)).backward()
    expected = (softmax(logits.detach().numpy()) - np.exp(theta.numpy())) / 4
    assert np.allclose(logits.grad, expected, atol=1e-12)
    before = bidist.kl_divergence(theta, logits.log_softmax(-1))
    for sign, phase in ((-1, "forward"), (1, "reverse")):
        moved = (logits + sign * 0.1 * logits.grad).log_softmax(-1)
        difference = bidist.kl_divergence(theta, moved) - before
        assert sign * difference > 0, phase


def test_proposition_4_1():
    """Tabular logits, plain gradient ascent, phi at the upper bound of its entropy: entropy ascent
    stays there; KL ascent lowers pi_phi(a*_theta) and phi comes to prefer another action."""
    theta = torch.from_numpy(np.log(np.array([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])))
    preferred = theta.argmax(-1)
    for mode in ("entropy", "kl"):
        logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        course = []
        for _ in range(50):
            log_probs = logits.log_softmax(-1)
            course.append(log_probs.exp().gather(-1, preferred[:, None])[:, 0].detach().numpy())
            if mode == "kl":
                objective = bidist.kl_divergence(theta, log_probs)
            else:
                objective = -(log_probs.exp() * log_probs).sum(-1).mean()
            (gradient,) = torch.autograd.grad(objective, logits)
            logits = (logits + 0.5 * gradient).detach().requires_grad_()
        course = np.array(course)
        if mode == "entropy":
            assert np.allclose(course, 0.25, atol=1e-12), "entropy ascent cannot leave the bound"
        else:
            assert (np.diff(course, axis=0) < 0).all(), "pi_phi(a*_theta) keeps falling"
            assert (logits.argmax(-1) != preferred).all(), "a preference shift"


@pytest.mark.parametrize("far", [False, True], ids=["phi near", "phi far"])
def test_phases_on_a_rollout(far):
    """Forward distillation lowers the KL on the rollout, reverse raises it, at rates that count."""
    s = setting("--forward-lr", "3e-3", "--reverse-lr", "3e-3")
    sharpen(s.agent.actor, seed=1)
    if far:
        sharpen(s.agent.distilled, seed=2)
    batch = collect(s)
    forward = {k: float(x) for k, x in distill(s, batch, "forward").items()}
    assert forward["forward/kl_after"] < 0.5 * forward["forward/kl_before"]
    reverse = {k: float(x) for k, x in distill(s, batch, "reverse").items()}
    assert reverse["reverse/kl_before"] == pytest.approx(forward["forward/kl_after"], rel=1e-5)
    assert reverse["reverse/kl_after"] > 1.5 * reverse["reverse/kl_before"]


def test_teacher_is_the_updated_theta_and_phi_carries_its_state():
    s = setting()
    sharpen(s.agent.actor, 0.5)
    batch = collect(s)
    old = weights(s.agent.actor)
    update(s, batch)
    assert not torch.equal(old, weights(s.agent.actor))
    scalars = distill(s, batch, "forward")
    # The plain form: both networks step through the rollout from its beginning.
    steps = zip(*batch.actor_views())
    states, logits = {}, {"actor": [], "distilled": []}
    for name in logits:
        states[name] = getattr(batch, f"{name}_hidden")[0]
    for step in steps:
        for name in logits:
            net = getattr(s.agent, name)
            acted = bidist.act(net, bidist.Views(*step), states[name], s.agent.sprites)
            logits[name].append(acted[0])
            states[name] = acted[1]
    kl = bidist.kl_divergence(*(torch.stack(logits[name]) for name in ("actor", "distilled")))
    assert float(scalars["forward/kl_after"]) == pytest.approx(float(kl), abs=1e-6)
    assert torch.allclose(s.state.distilled_hidden, states["distilled"], atol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "kl", "entropy"])
def test_what_phi_descends(mode, monkeypatch):
    """The loss of a phase's first step, against NumPy: KL(theta || phi) of Eq. (7), theta being the
    updated one; less it, Eq. (8); less phi's entropy. KL(phi || theta) is another figure, and so is
    the KL to the theta that acted."""
    phase = "forward" if mode == "forward" else "reverse"
    reverse = [] if mode == "forward" else ["--reverse-mode", mode]
    s = setting("--minibatches", "1", f"--{phase}-epochs", "1", f"--{phase}-lr", "0", *reverse)
    sharpen(s.agent.actor, 2, seed=1)
    sharpen(s.agent.distilled, 2, seed=2)
    batch = collect(s)
    sharpen(s.agent.actor, 2, seed=3)  # as an update would have changed it
    views, sprites = batch.actor_views(), s.agent.sprites
    logits, _, _ = bidist.replay(s.args, s.agent.actor, views, batch.actor_hidden[0], sprites)
    old, new, phi = (x.double().numpy() for x in (batch.theta, logits.log_softmax(-1), batch.phi))

    def kl(p, q):
        return (np.exp(p) * (p - q)).sum(-1).mean()

    losses = []
    monkeypatch.setattr(bidist, "descend", lambda loss, *_: losses.append(float(loss.detach())))
    distill(s, batch, phase)
    entropy = -(np.exp(phi) * phi).sum(-1).mean()
    expected = {"forward": kl(new, phi), "kl": -kl(new, phi), "entropy": -entropy}[mode]
    assert losses == [pytest.approx(expected, abs=1e-5)]
    others = (kl(phi, new), kl(old, phi), kl(phi, old))
    assert min(abs(kl(new, phi) - x) for x in others) > 1e-3


def test_reverse_modes_of_figure_6():
    def run(*flags):
        s = setting("--reverse-lr", "3e-3", *flags)
        sharpen(s.agent.actor, seed=1)
        sharpen(s.agent.distilled, seed=2)
        before = weights(s.agent.distilled)
        batch = collect(s)
        entropy = [-float((batch.phi.exp() * batch.phi).sum(-1).mean())]
        scalars = distill(s, batch, "reverse")
        net, hidden = s.agent.distilled, batch.distilled_hidden[0]
        views = batch.actor_views()
        logits, _, _ = bidist.replay(s.args, net, views, hidden, s.agent.sprites)
        log_probs = logits.log_softmax(-1)
        entropy.append(-float((log_probs.exp() * log_probs).sum(-1).mean()))
        return before, weights(s.agent.distilled), entropy, scalars

    _, _, (before, after), _ = run("--reverse-mode", "entropy")
    assert after > before + 0.05, "entropy ascent raises the entropy"
    old, new, _, scalars = run("--reverse-mode", "kl")
    assert scalars["reverse/kl_after"] > scalars["reverse/kl_before"]
    old, new, _, _ = run("--reverse-mode", "noise", "--noise-std", "0.3")
    assert float((new - old).std()) == pytest.approx(0.3, rel=0.05), "noise once, of this size"
    old, new, (_, entropy), _ = run("--reverse-mode", "random")
    assert not torch.equal(old, new)
    assert entropy == pytest.approx(np.log(3), abs=1e-3), "a new phi is almost uniform"
    old, new, _, scalars = run("--reverse-epochs", "0")
    assert torch.equal(old, new)
    assert scalars["reverse/kl_after"] == scalars["reverse/kl_before"]


def test_distillation_rates_and_epochs_matter():
    def moved(phase, *flags):
        s = setting(*flags)
        sharpen(s.agent.actor)
        batch = collect(s)
        before = weights(s.agent.distilled)
        distill(s, batch, phase)
        return float((weights(s.agent.distilled) - before).abs().mean())

    # Adam moves a weight by about its rate per step, whatever the gradient.
    for phase in ("forward", "reverse"):
        slow = moved(phase, f"--{phase}-lr", "1e-5")
        fast = moved(phase, f"--{phase}-lr", "1e-3")
        assert 20 < fast / slow < 500
        assert moved(phase, f"--{phase}-epochs", "1") < moved(phase, f"--{phase}-epochs", "6")


def test_each_epoch_begins_chunks_with_phis_new_memory(monkeypatch):
    """Hidden states before chunks are those of phi as it is then, stepping from the beginning."""
    s = setting("--forward-epochs", "3", "--forward-lr", "3e-3", "--chunk-length", "5")
    sharpen(s.agent.actor, 0.5)
    batch, given, expected = collect(s), [], []
    minibatches = bidist.minibatches

    def watched(args, chunks, rng):
        before, hidden = [], batch.distilled_hidden[0]
        for t, step in enumerate(zip(*batch.actor_views())):
            if t % 5 == 0:
                before.append(hidden)
            _, hidden = bidist.act(s.agent.distilled, bidist.Views(*step), hidden, s.agent.sprites)
        given.append(chunks.distilled_hidden)
        expected.append(torch.stack(before))
        return minibatches(args, chunks, rng)

    monkeypatch.setattr(bidist, "minibatches", watched)
    distill(s, batch, "forward")
    assert len(given) == 3
    for ours, theirs in zip(given, expected):
        assert torch.allclose(ours, theirs, atol=1e-6)
    for one, other in itertools.pairwise(expected):
        assert (one[1:] - other[1:]).abs().max() > 1e-4


# --- Eq. (9): the clip objective and whose samples it uses ----------------------------------------


def test_clip_objective():
    rng = np.random.default_rng(0)
    ratio, advantage = np.exp(rng.normal(size=(50, 3))), rng.normal(size=(50, 3))
    for clip in (0.1, 0.2):
        expected = np.empty_like(ratio)
        for i in np.ndindex(*ratio.shape):
            bounded = min(max(ratio[i], 1 - clip), 1 + clip)
            expected[i] = min(ratio[i] * advantage[i], bounded * advantage[i])
        tensors = map(torch.from_numpy, (ratio, advantage))
        ours = bidist.clip_objective(*tensors, clip, centre=1.0)
        assert np.allclose(ours, expected, atol=1e-15)


def ratios_of_the_first_minibatch(s, batch):
    """pi_theta over the stored probability, and over phi's, for a shuffled first minibatch."""
    part = next(iter(bidist.minibatches(s.args, batch, s.rng)))
    sprites = s.agent.sprites().to(part.theta.dtype)
    logits, _ = s.agent.actor(part.actor_views(), part.actor_hidden, sprites)
    log_probs = logits.log_softmax(-1)
    mine = log_probs.gather(-1, part.actions[..., None])[..., 0]
    ratio = (mine - part.log_probs).exp()
    to_phi = (part.theta - part.phi).gather(-1, part.actions[..., None])[..., 0].exp()
    return ratio.detach(), to_phi, part


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("redraw", ["iteration", "episode"])
def test_first_ratio_is_one_or_theta_over_phi(dtype, error, redraw):
    """Across episode starts, truncations and changes of v in mid-episode."""
    torch.set_default_dtype(dtype)
    try:
        s = setting("--v-redraw", redraw, "--max-episode-steps", "7")
        sharpen(s.agent.actor)
        sharpen(s.agent.distilled, seed=1)
        sprites = s.agent.sprites
        s.agent.sprites = lambda: sprites().to(dtype)
        for _ in range(3):
            batch = collect(s)
            ratio, to_phi, part = ratios_of_the_first_minibatch(s, batch)
            assert ratio.dtype == dtype
            assert (ratio[part.trained] - 1).abs().max() < error
            fictitious = ~part.trained
            assert (ratio[fictitious] / to_phi[fictitious] - 1).abs().max() < error
            assert (to_phi[fictitious] - 1).abs().max() > 0.1, "phi is another policy"
        assert batch.starts[1:].any() and batch.truncated.any()
    finally:
        torch.set_default_dtype(torch.float32)


def test_behaviour_is_theta_where_trained_and_phi_elsewhere():
    """Eq. (6), by the stored log-probabilities."""
    s = setting()
    sharpen(s.agent.actor)
    sharpen(s.agent.distilled, seed=1)
    batch = collect(s)
    for t, b, n in np.ndindex(*batch.actions.shape):
        acting = batch.theta if batch.trained[t, b, n] else batch.phi
        assert batch.log_probs[t, b, n] == acting[t, b, n, batch.actions[t, b, n]]
    assert batch.trained.any() and not batch.trained.all()


def test_when_v_is_drawn():
    s = setting("--v-redraw", "iteration", "--num-envs", "16")
    one, two = collect(s), collect(s)
    assert (one.trained == one.trained[0]).all(), "one v per rollout and world"
    assert not (one.trained[0] == two.trained[0]).all()
    s = setting("--v-redraw", "episode", "--num-envs", "16")
    one, two = collect(s), collect(s)
    assert not one.trained[0].all(), "also for the first episodes"
    changes = (one.trained[1:] != one.trained[:-1]).any(-1)
    assert changes.any()
    assert not (changes & ~one.starts[1:-1]).any(), "only where an episode begins"
    goes_on = ~two.starts[0]
    assert (two.trained[0] == one.trained[-1])[goes_on].all(), "kept across rollouts"


def test_mask_fictitious_leaves_theirs_out():
    """With the mask, what fictitious players earn changes nothing; without, it does."""
    for flags, same in ((["--mask-fictitious"], True), ([], False)):
        results = []
        for extra in (0.0, 5.0):
            s = setting(*flags)
            batch = collect(s)
            batch.rewards = batch.rewards + extra * ~batch.trained
            update(s, batch)
            results.append((weights(s.agent.actor), weights(s.agent.critic)))
        assert all(torch.equal(a, b) for a, b in zip(*results)) == same


@pytest.mark.parametrize("flags", [[], ["--mask-fictitious"]], ids=["all", "masked"])
def test_whose_entropy_trains(flags):
    """theta's, on all samples or on its own, by NumPy."""
    s = setting("--epochs", "1", "--minibatches", "1", *flags)
    sharpen(s.agent.actor, 2)
    sharpen(s.agent.distilled, 2, seed=1)
    scalars, batch = update_without_step(s, collect(s))
    theta = batch.theta.double().numpy()
    entropy = -(np.exp(theta) * theta).sum(-1)
    own = entropy[batch.trained.numpy()].mean()
    assert abs(own - entropy.mean()) > 5e-3
    expected = own if flags else entropy.mean()
    assert scalars["entropy"].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("centre", ["printed", "old"])
def test_population_diagnostics(centre):
    """Of all samples, whatever the minibatches. Before the first step nothing lies outside a clip
    that is centred at the old policy."""
    s = setting("--epochs", "1", "--minibatches", "3", "--clip-centre", centre)
    sharpen(s.agent.actor)
    sharpen(s.agent.distilled, seed=1)
    batch = collect(s)
    scalars, batch = update_without_step(s, batch)
    log_probs = torch.cat([theta_again(s, batch, c) for c in range(len(batch.actor_hidden))])
    for name, who in (("trained", batch.trained), ("fictitious", ~batch.trained)):
        mine = log_probs.gather(-1, batch.actions[..., None])[..., 0]
        ratio = (mine - batch.log_probs).exp()
        largest = float(ratio[who].max())
        assert float(scalars[f"ratio_max/{name}"]) == pytest.approx(largest, rel=1e-4)
        clipped = float(((ratio[who] - 1).abs() > 0.2).float().mean())
        clipped = clipped if centre == "printed" else 0.0
        assert float(scalars[f"clipped/{name}"]) == pytest.approx(clipped, abs=1e-6)


def update_without_step(s, batch):
    """Scalars of one update whose steps are too small to move anything, and its batch."""
    args = dataclasses.replace(s.args, actor_lr=0.0, critic_lr=0.0)
    for optimiser in (s.agent.actor_optimiser, s.agent.critic_optimiser):
        for group in optimiser.param_groups:
            group["lr"] = 0.0
    batch = prepare(s, batch)
    return bidist.update(args, s.agent, batch, s.rng), batch


@torch.no_grad()
def theta_again(s, batch, c):
    """theta's log-probabilities in a chunk, from the stored state."""
    steps = slice(10 * c, 10 * c + 10)
    views = bidist.Views(*(x[steps] for x in batch.actor_views()))
    logits, _ = s.agent.actor(views, batch.actor_hidden[c], s.agent.sprites())
    return logits.log_softmax(-1)


# --- MAPPO: advantages, values, normalisation -----------------------------------------------------


@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
def test_gae_with_terminations_and_truncations(script):
    rng = np.random.default_rng(0)
    T, B, N, gamma, lam = 30, 4, 2, 0.97, 0.9
    rewards, values, following = (rng.normal(size=(T, B, N)) for _ in range(3))
    terminated = rng.random((T, B)) < 0.1
    truncated = ~terminated & (rng.random((T, B)) < 0.1)
    expected = np.zeros((T, B, N))
    for t, b, n in np.ndindex(T, B, N):
        # The definition: a discounted sum of errors up to the episode's or the rollout's end.
        for k in range(t, T):
            bootstrap = 0.0 if terminated[k, b] else following[k, b, n]
            error = rewards[k, b, n] + gamma * bootstrap - values[k, b, n]
            expected[t, b, n] += (gamma * lam) ** (k - t) * error
            if terminated[k, b] or truncated[k, b]:
                break
    args = SimpleNamespace(gamma=gamma, gae_lambda=lam)
    batch = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
    batch = SimpleNamespace(**{name: torch.from_numpy(x) for name, x in batch.items()})
    tensors = (torch.from_numpy(x) for x in (values, following))
    assert np.allclose(script.gae(args, batch, *tensors), expected, atol=1e-12)
    assert terminated.any() and truncated.any()


@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
def test_values_bootstrap_from_the_final_observation(script):
    """estimate() against the critic stepped plainly, with the ended episode's own last view."""
    s = setting("--max-episode-steps", "4", script=script)
    sharpen(s.agent.critic)
    finals, step = {}, s.envs.step

    def remember(actions):
        result = step(actions)
        if result.final is not None:
            finals[len(finals_at)] = (result.final, actions)
        finals_at.append(0)
        return result

    finals_at: list[int] = []
    s.envs.step = remember
    start = s.state.critic_hidden
    batch = collect(s)
    values, advantages, hidden = script.estimate(s.args, s.agent, batch, start)
    T, B, N = batch.actions.shape
    state, critic, sprites = start, s.agent.critic, s.agent.sprites()
    V, following = np.zeros((T + 1, B, N)), np.zeros((T, B, N))
    with torch.no_grad():
        for t in range(T + 1):
            view = script.Views(*(x[t : t + 1] for x in batch.critic_views()))
            output, states = critic(view, state, sprites)
            V[t], state = output[0], states[0]
            if t < T and batch.truncated[t].any():
                final, actions = finals[t]
                previous = torch.from_numpy(actions)
                joint = script.joint_features(torch.from_numpy(final.features), previous, 3)
                never = torch.zeros(1, B, dtype=torch.bool)
                world_ids = torch.from_numpy(final.world_ids)[None]
                view = script.Views(world_ids, joint[None], never)
                output, _ = critic(view, state, sprites)
                following[t] = output[0]
    for t, b in np.ndindex(T, B):
        if not batch.truncated[t, b]:
            following[t, b] = V[t + 1, b]
    assert np.allclose(values, V[:-1], atol=1e-5)
    expected = script.gae(s.args, batch, values, torch.from_numpy(following).float())
    assert torch.allclose(advantages, expected, atol=1e-4)
    assert batch.truncated.any()
    assert torch.allclose(hidden[-1], pre_last(s, batch, start), atol=1e-5)
    assert torch.equal(prepare(s, batch).critic_hidden, hidden[:-1])
    assert torch.equal(s.state.critic_hidden, hidden[-1]), "the next rollout goes on from there"


def pre_last(s, batch, start):
    """The critic's state before the step that follows the rollout."""
    views = s.script.Views(*(x[:-1] for x in batch.critic_views()))
    with torch.no_grad():
        return s.agent.critic(views, start, s.agent.sprites())[1][-1]


def test_value_loss():
    rng = np.random.default_rng(0)
    value, old, target = (5 * rng.normal(size=(40, 2)) for _ in range(3))
    for clip, delta in ((0.2, 10.0), (1.0, 0.5)):
        expected = np.empty_like(value)
        for i in np.ndindex(*value.shape):
            clipped = old[i] + min(max(value[i] - old[i], -clip), clip)
            losses = []
            for v in (value[i], clipped):
                e = abs(v - target[i])
                losses.append(0.5 * e**2 if e <= delta else delta * (e - 0.5 * delta))
            expected[i] = max(losses)
        tensors = (torch.from_numpy(x) for x in (value, old, target))
        assert np.allclose(bidist.value_loss(*tensors, clip, delta), expected, atol=1e-12)


def test_value_norm():
    """Exponential averages of mean and square, divided by the same average of ones."""
    rng, norm = np.random.default_rng(0), bidist.ValueNorm()
    assert [float(x) for x in norm.mean_std()] == [0.0, 1.0]
    beta, weight, mean, square = 0.99999, 0.0, 0.0, 0.0
    for k in range(4):
        x = rng.normal(3 * k, 1 + k, size=500)
        weight = beta * weight + (1 - beta)
        mean = beta * mean + (1 - beta) * x.mean()
        square = beta * square + (1 - beta) * (x**2).mean()
        norm.update(bidist.moments(torch.from_numpy(x)))
        m = mean / weight
        std = np.sqrt(max(square / weight - m**2, 1e-2))
        assert [float(y) for y in norm.mean_std()] == pytest.approx([m, std], rel=1e-5)


def test_what_an_update_is_trained_on():
    """Advantages have mean 0 and deviation 1; targets are returns in the new statistics."""
    s = setting()
    batch = collect(s)
    values, advantages, _ = bidist.estimate(s.args, s.agent, batch, s.state.critic_hidden)
    batch = prepare(s, batch)
    assert float(batch.advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(batch.advantages.std(unbiased=False)) == pytest.approx(1, abs=1e-3)
    returns = (values + advantages).numpy()
    expected = (returns - returns.mean()) / max(returns.std(), 0.1)
    assert np.allclose(batch.targets, expected, atol=1e-4)
    assert np.allclose(batch.values, (values - returns.mean()) / max(returns.std(), 0.1), atol=1e-4)


def test_minibatches_are_chunks_with_all_their_agents_once_per_epoch():
    s = setting("--minibatches", "3")
    batch = collect(s)
    T, B, N = batch.actions.shape
    marks = torch.arange(T * B * N).view(T, B, N)
    batch.actions = marks
    seen = []
    for part in bidist.minibatches(s.args, batch, s.rng):
        assert len(part.actions) == s.args.chunk_length
        steps, world = part.actions // (B * N), part.actions // N % B
        assert (steps[1:] - steps[:-1] == 1).all(), "consecutive steps"
        assert (steps[0] % s.args.chunk_length == 0).all(), "from a chunk's beginning"
        assert (world == world[:1, :, :1]).all(), "of one world"
        chunk = steps[0, :, 0] // s.args.chunk_length
        assert torch.equal(part.actor_hidden, batch.actor_hidden[chunk, world[0, :, 0]])
        assert torch.equal(part.world_ids, batch.world_ids[steps[:, :, 0], world[:, :, 0]])
        seen.append(part.actions.flatten())
    assert torch.equal(torch.cat(seen).sort().values, marks.flatten())


@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
def test_the_critic_knows_previous_actions_of_an_episode(script):
    """One-hot, of every agent; zeros at an episode's first step, and none of the episode before."""
    s = setting("--max-episode-steps", "7", script=script)
    last = np.full((4, 2), -1)
    for _ in range(2):
        batch = collect(s)
        T, B, N = batch.actions.shape
        found = batch.critic_features.view(T + 1, B, N, -1)[..., -3:].numpy()
        actions, starts = batch.actions.numpy(), batch.starts.numpy()
        assert starts[1:].any() and (batch.truncated | batch.terminated).any()
        for t, b, n in np.ndindex(T + 1, B, N):
            before = actions[t - 1, b, n] if t else last[b, n]
            expected = np.zeros(3) if starts[t, b] else np.eye(3)[before]
            assert (found[t, b, n] == expected).all()
        last = actions[-1]


def test_team_reward_is_everyones_sum():
    own, team = setting(), setting("--team-reward")
    a, b = collect(own), collect(team)
    assert torch.equal(a.rewards.sum(-1, keepdim=True).expand_as(a.rewards), b.rewards)
    assert not torch.equal(a.rewards, b.rewards)
