"""Every script on a GPU that is not there (elsewhere.py): nothing mixes devices or does there what
CUDA cannot, the CPU goes on with what was trained there, and waits are counted and bounded."""

import importlib

import particle_tools
import pytest
import torch
from battle_tools import tiny as off_policy_battles
from elsewhere import Elsewhere, pretended_gpu
from runs import BIDIST, MAPPO, states, tiny

MELTINGPOT = [
    *(BIDIST, MAPPO, "baselines.randnet_meltingpot", "baselines.opre_meltingpot"),
    *("baselines.pp_meltingpot", "baselines.rpm_meltingpot"),
]
PARTICLE = [
    *("baselines.maddpg_particle", "mra_maddpg_particle", "baselines.maac_particle"),
    *("baselines.rl2_particle", "baselines.epc_particle"),
]
ON_POLICY = ["baselines.mappo_smac", "baselines.mipi_mappo_smac"]
OFF_POLICY = ["baselines.refil_smac", "baselines.collaq_smac", "mipi_refil_smac"]
QUICK = {MAPPO}


# --- The pretence ---------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(monkeypatch):
    with pretended_gpu(monkeypatch):
        there = torch.arange(4.0, device="cuda")
        assert isinstance(there, Elsewhere) and there.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="tensors of the CPU"):
            there + torch.ones(4)
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        ids = torch.zeros(4, dtype=torch.uint16).to("cuda")
        assert ids[1:].view(3, 1).cpu().shape == (3, 1)
        for operation in (lambda: ids[torch.tensor([0, 1])], lambda: torch.stack([ids, ids])):
            with pytest.raises(NotImplementedError, match="not implemented"):
                operation()


def test_it_computes_what_the_cpu_computes(monkeypatch):
    """Layers, a recurrent one too, gradients, views, in-place writes, and an optimiser."""
    torch.manual_seed(0)
    nets = [torch.nn.GRU(3, 4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(5, 2, 3)

    def learn(net, x):
        optimiser = torch.optim.Adam(net.parameters(), 0.1, fused=True)
        for _ in range(3):
            y = net(x)[0].clone()
            y[:, 1] *= 2
            y[y < 0] = 0
            optimiser.zero_grad()
            y.square().sum().backward()
            optimiser.step()
        return [p.detach().cpu() for p in net.parameters()]

    expected = learn(nets[0], x)
    with pretended_gpu(monkeypatch):
        found = learn(nets[1].to("cuda"), x.to("cuda"))
    for one, other in zip(found, expected):
        assert not isinstance(one, Elsewhere) and torch.allclose(one, other, atol=1e-5)


def test_it_indexes_as_the_cpu_does(monkeypatch):
    """By tensors of either device, lists and masks, read and written."""
    here = torch.arange(12.0).view(3, 4)
    rows, mask = torch.tensor([0, 2]), torch.tensor([True, False, True])
    with pretended_gpu(monkeypatch):
        there = here.to("cuda")
        for index in (
            rows,
            [0, 2],
            mask,
            (slice(None), rows),
            (rows, [1, 3]),
            (rows[:, None], rows),
        ):
            assert torch.equal(there[index].cpu(), here[index])
            one, other = there.clone(), here.clone()
            one[index] = other[index] = -1.0
            assert torch.equal(one.cpu(), other)
        assert torch.equal(there[rows.to("cuda")].cpu(), here[rows])


def test_it_counts_waits(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        x = torch.arange(4.0, device="cuda")
        x.add_(1).view(2, 2)[0] = 5.0
        x = x[torch.tensor([0, 1])]  # from the CPU: no wait
        assert gpu.waits.total() == 0
        for look in (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 1], x.tolist):
            before = gpu.waits.total()
            look()
            assert gpu.waits.total() == before + 1
        assert float(x[0]) == 5


# --- The scripts ----------------------------------------------------------------------------------


def command(name, run_dir, *flags):
    """The words of a tiny run with a final evaluation."""
    flags = (*flags, "--final-episodes", 2)
    if name in MELTINGPOT:
        return tiny(name, run_dir, 2, *flags)
    if name in PARTICLE:
        return particle_tools.tiny(name, run_dir, 60, *flags)
    if name in OFF_POLICY:
        return off_policy_battles(run_dir, 60, *flags)
    words = "--num-envs 2 --hidden-size 8 --heads 2 --max-episode-steps 8 --team-sizes 3 4"
    words += " --eval-team-sizes 5 --eval-every 0 --eval-episodes 2 --save-every 0"
    return [*words.split(), *map(str, ("--total-timesteps", 32, "--run-dir", run_dir, *flags))]


def longer(run_dir):
    """Twice the steps that a run has."""
    steps = 2 * states(run_dir)[0]["timesteps"]
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", steps, "--device", "cpu")]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
        for name in (*MELTINGPOT, *PARTICLE, *ON_POLICY, *OFF_POLICY)
    ],
)
def test_a_script_trains_there_and_here(name, tmp_path, monkeypatch):
    """Trains, evaluates, saves; a CPU resumes it. The first steps are those of a CPU, but for
    rounding (in Melting Pot a CPU has kernels of its own)."""
    script = importlib.import_module(name)
    with monkeypatch.context() as patch, pretended_gpu(patch) as gpu:
        assert script.main(command(name, tmp_path / "there", "--device", "cuda")) == 0
    print(f"{name}: waits {dict(gpu.waits)}")
    assert gpu.waits.total() > 0
    assert script.main(command(name, tmp_path / "here", "--device", "cpu")) == 0
    for one, other in zip(weights(tmp_path / "there"), weights(tmp_path / "here"), strict=True):
        assert one.shape == other.shape and (one - other).abs().mean() < 1e-3
    assert script.main(longer(tmp_path / "there")) == 0


def weights(run_dir):
    """All floating tensors of the newest checkpoint's networks."""

    def walk(x):
        if isinstance(x, dict):
            for part in x.values():
                yield from walk(part)
        elif isinstance(x, torch.Tensor) and x.is_floating_point():
            yield x

    found = [*walk(states(run_dir)[0]["agent"])]
    assert len(found) > 5
    return found


def waits(name, run_dir, monkeypatch, rollout_steps=20, epochs=1, more=()):
    script = importlib.import_module(name)
    steps = 2 * 2 * rollout_steps  # two worlds, two iterations
    words = ["--substrate", "toy", "--num-envs", 2, "--rollout-steps", rollout_steps]
    words += ["--minibatches", 2, "--epochs", epochs, "--final-episodes", 0, "--device", "cuda"]
    words += ["--total-timesteps", steps, "--run-dir", run_dir, *more]
    with monkeypatch.context() as patch, pretended_gpu(patch) as gpu:
        assert script.main([str(x) for x in words]) == 0
    return gpu.waits.total()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more", "a_step", "a_minibatch"),
    [(MAPPO, (), 2, 2), (BIDIST, ("--k-d", 1, "--no-forward", "--no-reverse"), 3, 9)],
    ids=["mappo", "bidist"],
)
def test_waits_are_bounded(name, more, a_step, a_minibatch, tmp_path, monkeypatch):
    """Of a step of the worlds, and of a minibatch."""
    base = waits(name, tmp_path / "base", monkeypatch, more=more)
    longer = waits(name, tmp_path / "longer", monkeypatch, rollout_steps=40, more=more)
    more_epochs = waits(name, tmp_path / "epochs", monkeypatch, epochs=3, more=more)
    step, minibatch = (longer - base) / 40, (more_epochs - base) / 8
    print(f"{name}: {step:.1f} waits a step of the worlds, {minibatch:.1f} a minibatch")
    assert 1 <= step <= a_step and 1 <= minibatch <= a_minibatch
