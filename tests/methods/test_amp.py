"""--amp in every script that has it: what agents remember stays fp32, and so does what comes of it;
bf16 is where layers are large."""

import dataclasses
import importlib
from collections import Counter

import harness

import pytest
import torch
from all_scripts import MELTINGPOT, OFF_POLICY, ON_POLICY, command, weights
from runs import MAPPO
from torch import nn

QUICK = {MAPPO, "baselines.mappo_smac"}
WITH_AMP = [*MELTINGPOT, *ON_POLICY, *OFF_POLICY]


@pytest.fixture
def layers():
    """How often layers of each kind were called inside autocast, and with which inputs."""
    seen = Counter()

    def look(module, inputs):
        inside = torch.is_autocast_enabled("cpu")
        dtype = inputs[0].dtype if isinstance(inputs[0], torch.Tensor) else None
        seen[type(module), inside, dtype] += 1

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.long] * (x not in QUICK)) for x in WITH_AMP]
)
def test_memory_stays_fp32(name, layers, tmp_path, monkeypatch):
    """On CUDA, autocast would give cuDNN's RNNs 16-bit weights, gradients and states."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "has_bf16", lambda device: True)
    monkeypatch.setattr(harness, "distributions", lambda: [])
    argv = command(name, tmp_path / "run", "--device", "cpu", "--amp", "--final-episodes", 0)
    if name in ON_POLICY:
        argv += ["--rnn-size", "8", *["--recurrent"] * has(script, "recurrent")]
    assert script.main(argv) == 0
    remembered = {key: n for key, n in layers.items() if issubclass(key[0], nn.RNNBase)}
    assert remembered and remembered.keys() <= {(nn.GRU, False, torch.float32)}, layers
    assert any(inside for _, inside, _ in layers), "--amp did nothing"
    assert {x.dtype for x in weights(tmp_path / "run")} <= {torch.float32, torch.float64}


def has(script, flag):
    return flag in {field.name for field in dataclasses.fields(script.Args)}


@pytest.mark.parametrize("name", [MAPPO])
def test_it_is_nothing_where_bf16_is_slow(name, tmp_path, monkeypatch):
    """The same bits as without, and args.json says so."""
    script = importlib.import_module(name)
    monkeypatch.setattr(harness, "distributions", lambda: [])
    monkeypatch.setattr(script, "has_bf16", lambda device: False)
    for flags in ((), ("--amp",)):
        run_dir = tmp_path / "".join(flags or "plain")
        assert script.main(command(name, run_dir, "--device", "cpu", *flags)) == 0
    pairs = zip(weights(tmp_path / "plain"), weights(tmp_path / "--amp"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert '"amp": false' in (tmp_path / "--amp/args.json").read_text().partition("resolved")[2]
