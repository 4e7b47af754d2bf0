"""Networks: tables over tile ids against torch's own convolutions, and recurrent state."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toolbox import bidist, collect, mappo, setting, sharpen, softmax

from envs.meltingpot.tile_tensors import FEW, TileTables
from envs.meltingpot.tiles import Observation, WorldError, ids_to_images

pytestmark = pytest.mark.numeric

GRIDS = [(5, 5), (11, 11), (15, 23), (4, 4), (3, 5), (9, 2), (1, 1)]


def random_views(grid, images: int, sprites: int, seed: int):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (sprites, 8, 8, 3), dtype=np.uint8)
    pixels[0] = 0  # id 0 is the black sprite
    return rng.integers(0, sprites, (images, *grid)).astype(np.uint16), pixels


def convolutions_on_pixels(net, ids: np.ndarray, pixels: np.ndarray, psi=None):
    """The same layers as torch's Conv2d and Linear on real images; returns output and layers. psi:
    of a convolution before them."""
    height, width = (max(4, size) for size in ids.shape[1:])
    padded = np.zeros((len(ids), height, width), ids.dtype)  # black tiles below and to the right
    padded[:, : ids.shape[1], : ids.shape[2]] = ids
    images = torch.from_numpy(ids_to_images(padded, pixels)).permute(0, 3, 1, 2)
    dtype = net.conv1.weight.dtype
    conv1 = torch.nn.Conv2d(3, net.conv1.out_channels, 8, stride=8, dtype=dtype)
    conv2 = torch.nn.Conv2d(net.conv1.out_channels, net.conv2.out_channels, 4, dtype=dtype)
    linear = torch.nn.Linear(net.linear.in_features, net.linear.out_features, dtype=dtype)
    conv1.load_state_dict(net.conv1.state_dict())
    conv2.load_state_dict(net.conv2.state_dict())
    # Our layer reads (position, channel), torch's flatten gives (channel, position).
    positions = linear.in_features // conv2.out_channels
    weight = net.linear.weight.detach().view(-1, positions, conv2.out_channels).transpose(1, 2)
    linear.load_state_dict({"weight": weight.reshape(len(weight), -1), "bias": net.linear.bias})
    images = images.to(dtype) / 255
    if psi is not None:
        images = F.conv2d(images, psi.to(dtype), padding=1)
    x = F.relu(conv2(F.relu(conv1(images))))
    return F.relu(linear(x.flatten(1))), (conv1, conv2, linear), positions


FORMS = pytest.mark.parametrize(
    ("form", "images"),
    [("torch", FEW), ("torch", FEW + 1), ("kernels", FEW), ("kernels", FEW + 1), ("plain", 30)],
    ids=["few by convolution", "many by tables", "few by kernels", "many by kernels", "plain"],
)


def choose(form: str, monkeypatch) -> None:
    """What tables run by: torch's operations, as on a GPU, or the kernels for a CPU."""
    monkeypatch.setattr(TileTables, "use_kernels", lambda self, x, ids: form == "kernels")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
@FORMS
@pytest.mark.parametrize(
    ("dtype", "output_error", "gradient_error"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
)
def test_both_forms_equal_torchs_layers_on_pixels(
    script, grid, form, images, dtype, output_error, gradient_error, monkeypatch
):
    """Outputs and gradients of the script's network and of the tables that run by default. Pixels
    are 0 or 255 and weights multiples of 1/64, so that convolutions are exact in float32, too, in
    any order of addition: else a ReLU at its kink opens in one form and not in the other."""
    ids, pixels = random_views(grid, images, sprites=40, seed=sum(grid))
    pixels = (255 * (pixels > 127)).astype(pixels.dtype)
    net = script.TileCNN(grid)
    choose(form, monkeypatch)
    net = (net if form == "plain" else TileTables(net)).to(dtype)
    sharpen(net, 0.3)
    with torch.no_grad():
        for weights in (*net.conv1.parameters(), *net.conv2.parameters()):
            weights.copy_((weights * 64).round() / 64)
    sprites = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(dtype) / 255
    expected, layers, positions = convolutions_on_pixels(net, ids, pixels)
    output = net(torch.from_numpy(ids), sprites)
    assert (output - expected).abs().max() <= output_error * expected.abs().max()
    slope = torch.linspace(-1, 1, expected.numel(), dtype=dtype).view_as(expected)
    (output * slope).sum().backward()
    (expected * slope).sum().backward()
    for ours, theirs in zip((net.conv1, net.conv2, net.linear), layers):
        for name in ("weight", "bias"):
            mine, reference = getattr(ours, name).grad, getattr(theirs, name).grad
            if ours is net.linear and name == "weight":
                mine = mine.view(len(mine), positions, -1).transpose(1, 2).reshape_as(reference)
            assert (mine - reference).norm() <= gradient_error * reference.norm(), name


@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
def test_plain_flag_gives_the_same(script):
    """The same names of parameters, so that either form reads the other's checkpoints, and the same
    policies and values on what a rollout shows."""
    tables, plain = (setting(*flags, script=script) for flags in ([], ["--plain"]))
    for name in ("actor", "critic"):
        one, other = getattr(tables.agent, name), getattr(plain.agent, name)
        assert type(one.cnn) is TileTables and type(other.cnn) is script.TileCNN
        sharpen(one)
        other.load_state_dict(one.state_dict())
    batch = collect(tables)
    for name, views in (("actor", batch.actor_views()), ("critic", batch.critic_views())):
        nets = [getattr(s.agent, name) for s in (tables, plain)]
        hidden = torch.zeros(4, 2, 128)
        one, other = (net(views, hidden, tables.agent.sprites())[0] for net in nets)
        assert torch.allclose(one, other, rtol=0, atol=1e-4)
        gradients = []
        for net, output in zip(nets, (one, other)):
            output.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_kernels_run_where_they_are_faster():
    """On a CPU, unless most windows have sprites of their own, as RandNet's neighbourhoods may."""
    net, ids = TileTables(bidist.TileCNN((5, 5))), torch.zeros(10, 5, 5, dtype=torch.int64)
    assert net.use_kernels(torch.zeros(40, 16), ids)
    assert not net.use_kernels(torch.zeros(41, 16), ids)
    assert not net.use_kernels(torch.zeros(1, 16), ids.to("meta"))


def test_kernels_under_autocast():
    """--amp: they compute in float32 and return it."""
    net = TileTables(bidist.TileCNN((5, 5)))
    ids, pixels = random_views((5, 5), 70, sprites=9, seed=0)
    sprites = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    expected = net(torch.from_numpy(ids), sprites)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(torch.from_numpy(ids), sprites)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    found.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def changed(change):
    """TileCNN of a fork."""

    class Changed(bidist.TileCNN):
        def __init__(self, grid):
            super().__init__(grid)
            if change == "a layer":
                self.conv3 = torch.nn.Conv2d(32, 32, 1)
            if change == "a gate":  # as in ReZero: it begins at 0
                self.gate = torch.nn.Parameter(torch.zeros(64))

        def forward(self, ids, sprites):
            x = super().forward(ids, sprites) * (2 if change == "the function" else 1)
            return x + self.gate * x.sin() if change == "a gate" else x

    return Changed((7, 7))


@pytest.mark.parametrize("change", ["a layer", "the function", "a gate"])
def test_tables_refuse_another_network(change):
    """Whoever changes TileCNN is told that --plain is needed; else the change would never run."""
    TileTables(changed("nothing"))
    with pytest.raises(WorldError, match="--plain"):
        TileTables(changed(change))


def test_equality_on_real_views():
    from envs.meltingpot.tiles import Palette
    from envs.meltingpot.worlds import Engine, get_spec

    spec, palette, rng = get_spec("coins"), Palette.private(), np.random.default_rng(0)
    engine, views = Engine(spec, (1, 0, 0)), []
    out = Observation(
        np.zeros((2, *spec.grid), np.uint16), np.zeros(spec.world_grid, np.uint16), np.zeros((2, 0))
    )
    for _ in range(40):
        engine.step(rng.integers(0, spec.num_actions, 2))
        engine.observe(palette, out)
        views.append(out.tile_ids.copy())
    views = np.concatenate(views)
    net = TileTables(bidist.TileCNN(spec.grid)).double()
    sprites = torch.from_numpy(palette.pixels()).permute(0, 3, 1, 2).double() / 255
    expected, _, _ = convolutions_on_pixels(net, views, palette.pixels())
    assert torch.allclose(net(torch.from_numpy(views), sprites), expected, rtol=0, atol=1e-9)


def test_sizes_are_the_papers():
    from envs.meltingpot.worlds import get_spec

    args = bidist.parse([])
    envs = SimpleNamespace(spec=get_spec(args.substrate), palette=None)
    agent = bidist.Agent(args, envs, torch.device("cpu"))
    for net, grid in ((agent.actor, (5, 5)), (agent.critic, (15, 23))):
        positions = (grid[0] - 3) * (grid[1] - 3)
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        assert shapes["cnn.conv1.weight"] == (16, 3, 8, 8)
        assert shapes["cnn.conv2.weight"] == (32, 16, 4, 4)
        assert shapes["cnn.linear.weight"] == (64, 32 * positions)
        assert shapes["mlp.weight"] == (64, 64)
        assert shapes["gru.weight_hh_l0"] == (3 * 128, 128)
    assert agent.actor.out.weight.shape[0] == 8, "chicken has 8 actions"
    assert agent.actor.norm.normalized_shape == (2 + 1 + 2,), "inventory, readiness, agent id"
    assert agent.critic.norm.normalized_shape == (2 * (3 + 8),), "features, actions of both"


@pytest.mark.parametrize("width", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_distilled_width_scales_hidden_layers(width):
    s = setting("--distilled-width", str(width))
    phi = s.agent.distilled
    assert phi.cnn.conv1.out_channels == max(1, round(16 * width))
    assert phi.cnn.conv2.out_channels == max(1, round(32 * width))
    assert phi.mlp.out_features == round(64 * width)
    assert phi.gru.hidden_size == round(128 * width)
    assert s.agent.actor.gru.hidden_size == 128


def test_initialisation_is_orthogonal_with_the_papers_gain():
    s = setting()
    head = s.agent.actor.out.weight
    assert torch.allclose(head @ head.T, 1e-4 * torch.eye(len(head)), atol=1e-9), "gain .01"
    mlp = s.agent.critic.mlp.weight
    assert torch.allclose(mlp @ mlp.T, 2 * torch.eye(len(mlp)), atol=1e-4), "gain sqrt(2)"
    for net in (s.agent.actor, s.agent.critic, s.agent.distilled):
        for name, p in net.named_parameters():
            if "bias" in name:
                assert not p.any(), name


def random_sequence(net, steps, worlds, agents, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    views = (worlds,) if isinstance(net, bidist.Critic) else (worlds, agents)
    features = torch.randn(steps, *views, net.norm.normalized_shape[0], generator=rng, dtype=dtype)
    starts = torch.rand(steps, worlds, generator=rng) < 0.15
    hidden = torch.randn(worlds, agents, net.hidden_size, generator=rng, dtype=dtype)
    return views, features, starts, hidden


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_stepping_and_replaying_agree(which):
    """One step at a time, the whole sequence at once and chunks give the same, across resets."""
    s = setting()
    net = getattr(s.agent, which).double()
    sharpen(net)
    steps, worlds, agents = 23, 5, 2
    views, features, starts, hidden = random_sequence(net, steps, worlds, agents, torch.float64)
    grid = s.envs.spec.grid if which == "actor" else s.envs.spec.world_grid
    ids = torch.randint(0, 7, (steps, *views, *grid), generator=torch.Generator().manual_seed(3))
    sprites = s.agent.sprites().double()
    outputs, states = net(bidist.Views(ids, features, starts), hidden, sprites)
    assert outputs.shape[:3] == states.shape[:3] == (steps, worlds, agents)
    state = hidden
    for t in range(steps):
        # The plain form: a state is dropped where an episode begins, then one step of the GRU.
        state = torch.where(starts[t, :, None, None], torch.zeros_like(state), state)
        never = torch.zeros_like(starts[:1])
        view = bidist.Views(ids[t : t + 1], features[t : t + 1], never)
        output, after = net(view, state, sprites)
        state = after[0]
        assert torch.allclose(output[0], outputs[t], rtol=0, atol=1e-12)
        assert torch.allclose(state, states[t], rtol=0, atol=1e-12)
    views = bidist.Views(ids, features, starts)
    replayed = bidist.replay(s.args, net, views, hidden, lambda: sprites)
    assert s.args.chunk_length == 10
    assert torch.allclose(replayed[0], outputs, rtol=0, atol=1e-12)
    assert torch.equal(replayed[1][0], hidden)
    assert torch.allclose(replayed[1][1:], states[[9, 19]], rtol=0, atol=1e-12)
    assert torch.allclose(replayed[2], states, rtol=0, atol=1e-12)
    assert starts.any(), "the sequence must hold episode starts"


def test_an_episode_start_forgets_everything_before():
    s = setting()
    net, sprites = s.agent.actor, s.agent.sprites()
    ids = torch.randint(0, 7, (3, 4, 2, *s.envs.spec.grid))
    features = torch.randn(3, 4, 2, 3)
    starts = torch.tensor([[False] * 4, [True, False, True, False], [False] * 4])
    one, two = torch.randn(4, 2, 128), torch.randn(4, 2, 128)
    views = bidist.Views(ids, features, starts)
    a, _ = net(views, one, sprites)
    b, _ = net(views, two, sprites)
    begun = starts[1]
    assert torch.equal(a[1:, begun], b[1:, begun]), "worlds that began a new episode"
    assert not torch.equal(a[1:, ~begun], b[1:, ~begun]), "worlds that went on"
    assert not torch.equal(a[0], b[0])


def test_critic_sees_the_world_once_and_tells_agents_by_their_id():
    s = setting()
    critic, sprites = s.agent.critic, s.agent.sprites()
    sharpen(critic)
    ids = torch.randint(0, 7, (2, 4, *s.envs.spec.world_grid))
    features = torch.randn(2, 4, critic.norm.normalized_shape[0])
    never, hidden = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(4, 2, 128)
    views = bidist.Views(ids, features, never)
    values, _ = critic(views, hidden, sprites)
    assert values.shape == (2, 4, 2)
    assert not torch.equal(values[:, :, 0], values[:, :, 1]), "agents have values of their own"
    units = critic.gru.weight_ih_l0
    units.data[:, -2:] = 0  # the columns that read the agent id
    values, _ = critic(views, hidden, sprites)
    assert torch.equal(values[:, :, 0], values[:, :, 1]), "nothing else tells them apart"


def test_inputs_against_loops():
    rng = np.random.default_rng(0)
    B, N, F_, A = 3, 4, 2, 5
    features = rng.normal(size=(B, N, F_)).astype(np.float32)
    previous = rng.integers(-1, A, (B, N))
    ids = np.stack([rng.permutation(N) for _ in range(B)])
    joint = bidist.joint_features(torch.from_numpy(features), torch.from_numpy(previous), A)
    obs = Observation(np.zeros((B, N, 3, 3), np.uint16), np.zeros((B, 4, 4), np.uint16), features)
    seen = bidist.observe(obs, torch.device("cpu"), torch.from_numpy(ids))[1]
    seated = bidist.observe(obs, torch.device("cpu"))[1]
    for b in range(B):
        row = []
        for n in range(N):
            action = [0.0] * A
            if previous[b, n] >= 0:
                action[previous[b, n]] = 1.0
            row += [*features[b, n], *action]
            for who, x in ((ids[b, n], seen), (n, seated)):
                one_hot = [float(i == who) for i in range(N)]
                assert np.allclose(x[b, n], [*features[b, n], *one_hot])
        assert np.allclose(joint[b], row)


def test_samples_follow_the_policy_and_share_their_noise():
    logits = np.array([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 3.0, -2.0]])
    draws = 40_000
    log_probs = torch.tensor(np.log(softmax(logits))).expand(draws, 2, 4)
    actions = bidist.sample(log_probs, torch.Generator().manual_seed(0)).numpy()
    for agent in range(2):
        p = softmax(logits)[agent]
        frequency = np.bincount(actions[:, agent], minlength=4) / draws
        assert (abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / draws)).all(), (frequency, p)
    other = log_probs.flip(-1)
    again = bidist.sample(
        torch.where(torch.tensor([True, False])[:, None], log_probs, other),
        torch.Generator().manual_seed(0),
    ).numpy()
    assert (again[:, 0] == actions[:, 0]).all(), "one agent's policy does not touch another's noise"


def test_amp_is_the_critics_only(monkeypatch):
    monkeypatch.setattr(bidist, "has_bf16", lambda device: True)
    plain, half = setting(), setting("--amp")
    for s in (plain, half):
        s.batch = collect(s)
    assert torch.equal(plain.batch.log_probs, half.batch.log_probs)
    estimates = [
        bidist.estimate(s.args, s.agent, s.batch, torch.zeros(4, 2, 128))[0] for s in (plain, half)
    ]
    assert not torch.equal(*estimates)
    assert torch.allclose(*estimates, atol=2e-2), "bf16 keeps about three digits"
