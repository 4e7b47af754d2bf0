"""NaN and infinity end a run by name and never reach a checkpoint."""

from pathlib import Path

import harness

import numpy as np
import pytest
import torch
from runs import differences, exact, index, metrics, only_error, states

from tests.harness.tools import PULLS, flags, resume, run

pytestmark = pytest.mark.numeric


def all_finite(x):
    if isinstance(x, dict):
        return all(map(all_finite, x.values()))
    if isinstance(x, list):
        return all(map(all_finite, x))
    is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
    return not is_float or bool(x.isfinite().all())


@pytest.mark.parametrize("poison", ["nan", "inf"])
@pytest.mark.parametrize("use_replay", ["--use-replay", "--no-use-replay"])
def test_a_reward_that_is_not_finite(use_replay, poison, tmp_path, capfd):
    """Whether or not the update happens to draw it: weights, optimisers, replays and running
    means in all checkpoints are finite, and the run can go on from there."""
    more = ("--poison", poison, "--save-every", PULLS, use_replay, "--buffer-size", 10**4)
    assert run(*flags("run", 40, "--poison-at", 4, *more)) == 1
    error = only_error(capfd.readouterr().err)
    assert "rewards is not finite" in error
    for state in states("run"):
        assert all_finite(state)
        assert all_finite(torch.load(f"run/replay-{state['timesteps']}.pt"))
    assert not Path("run/summary.json").exists()
    reached = index("run")[0]["timesteps"] // PULLS
    assert reached >= 3
    assert run(*resume("run", 8, "--poison-at", 0)) == 0
    assert run(*flags("whole", 8, *more)) == 0
    assert differences(exact("run"), exact("whole")) == []
    assert metrics("run") == metrics("whole")


def test_weights_that_overflow(tmp_path, capfd):
    assert run(*flags("run", 40, "--learning-rate", 1e37, "--save-every", PULLS)) == 1
    assert "is not finite" in only_error(capfd.readouterr().err)
    assert all(all_finite(state) for state in states("run"))


def test_check_finite_names_all():
    """The first one may be a victim of another."""
    fine, wrong = torch.ones(3, 5), torch.ones(3, 5)
    harness.check_finite(a=fine, b=torch.tensor(1), c=torch.zeros(0))
    for value in (float("nan"), float("inf"), -float("inf")):
        wrong[1, 2] = value
        with pytest.raises(harness.RunError, match="b is not finite, nor c;"):
            harness.check_finite(a=fine, b=wrong, c=wrong)
        with pytest.raises(harness.RunError, match="b is not finite; the last"):
            harness.check_finite(a=fine, b=wrong, c=fine)
        many = dict.fromkeys("abcdefg", wrong)
        with pytest.raises(harness.RunError, match="a is not finite, nor b, c, d, e and 2 more;"):
            harness.check_finite(**many)
    large = torch.ones(2**22 + 3)
    large[-1] = float("nan")
    with pytest.raises(harness.RunError, match="large"):
        harness.check_finite(large=large)


def test_moments_are_numpys():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 100
    one, mean, square = harness.moments(x).tolist()
    values = x.numpy().astype("float64")
    assert one == 1
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert square == pytest.approx((values**2).mean(), rel=1e-12)


def test_descend_is_torchs_own_step():
    """Clipping and Adam by hand on the same gradients."""
    nets = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 2)
        adam = torch.optim.Adam(net.parameters(), lr=0.1)
        for step in range(5):
            x = torch.arange(8.0).view(2, 4) + step
            loss = (net(x) ** 2).mean()
            if ours:
                norm = harness.descend(loss, net, adam, 0.5)
            else:
                adam.zero_grad()
                loss.backward()
                gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
                scale = min(1.0, 0.5 / float(gradients.norm()))
                for p in net.parameters():
                    p.grad.mul_(scale)
                adam.step()
        nets.append((net, float(norm), float(gradients.norm()) if not ours else 0.0))
    (a, norm, _), (b, _, expected) = nets
    assert norm == pytest.approx(expected, rel=1e-4)
    assert all(torch.allclose(p, q, rtol=1e-4) for p, q in zip(a.parameters(), b.parameters()))


def test_descend_moves_its_network_alone():
    """The loss passes through another network, whose gradients stay what they were."""
    net, other = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    other(torch.ones(2)).sum().backward()
    before = [p.grad.clone() for p in other.parameters()]
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    harness.descend(other(net(torch.ones(3))).sum(), net, sgd, max_norm=10.0)
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    for p, grad in zip(other.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_line_has_the_means_of_what_was_noted():
    """Of all iterations since the line before, also where a checkpoint is between."""
    assert run(*flags("each", 6)) == 0
    assert run(*flags("few", 6, "--log-every", 3 * PULLS)) == 0
    each, few = metrics("each"), metrics("few")
    assert len(each) == 6 and len(few) == 2
    for name in ("loss", "grad_norm"):
        values = np.array([line[name] for line in each]).reshape(2, 3)
        assert [line[name] for line in few] == pytest.approx(values.mean(1), rel=1e-4, abs=1e-7)


@pytest.fixture
def _precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


AMD = {"cpu_name": "AMD EPYC", "avx512_f": True}
MULTIPLIES = [  # what torch says of the processor, --onednn, whether digits are lost; by oneDNN?
    (AMD, True, False, True),
    (AMD, False, False, False),
    (AMD, True, True, False),
    (AMD | {"avx512_f": False}, True, False, False),
    (AMD | {"cpu_name": "Intel(R) Xeon(R)"}, True, False, False),
    ({"architecture": "aarch64"}, True, False, False),
]


@pytest.mark.parametrize(("cpu", "wanted", "rounds", "used"), MULTIPLIES)
def test_who_multiplies(cpu, wanted, rounds, used, _precision, monkeypatch):
    """oneDNN where it is asked for, helps and loses no digits; it forgets what was set before."""
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    if rounds:  # as Intel's AMX does, to 8 bits
        multiply = torch.Tensor.__matmul__
        half = lambda x: x.bfloat16().float() if x.dtype == torch.float32 else x  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: multiply(half(x), half(y)))
    else:  # whatever this machine has
        monkeypatch.setattr(harness, "product_is_exact", lambda *shape: True)
    harness.start_processes(harness.RunArgs(device="cpu", onednn=wanted))
    assert torch.get_float32_matmul_precision() == ("medium" if used else "highest")


SHAPES = [((1, 64), (64, 64)), ((4096, 22), (22, 64)), ((9, 512, 128), (9, 128, 32))]


@pytest.mark.parametrize(("left", "right"), SHAPES)
@pytest.mark.parametrize("wanted", [True, False])
def test_products_have_all_digits(left, right, wanted, _precision):
    """On this machine, by oneDNN or not, there and back (by which gradients go)."""
    harness.choose_products(wanted)
    x = torch.randn(left, dtype=torch.float64, requires_grad=True)
    y = torch.randn(right, dtype=torch.float64, requires_grad=True)
    singles = [z.detach().float().requires_grad_() for z in (x, y)]
    exactly, ours = x @ y, singles[0] @ singles[1]
    d = torch.randn_like(exactly)
    gradients = torch.autograd.grad(exactly, (x, y), d)
    found = torch.autograd.grad(ours, singles, d.float())
    for a, b in zip((exactly, *gradients), (ours, *found), strict=True):
        assert (a - b).abs().max() < 3e-6 * a.abs().max()  # a product of bfloat16: some 4e-3
