"""--max-grad-norm bounds the gradients of every network, in every script that has it: what an
optimiser steps on. maac_particle.py has bounds of its own (test_maac.py); the joint step of MIPI's
critic and policy is in test_mipi.py."""

import pytest
import torch
from all_scripts import command
from runs import script

LIMIT = 1e-7  # less than any gradient of a new network here
NETWORKS = {  # how many of them a run trains
    "bidist_mappo_meltingpot": 3,  # theta, the critic, phi of another size
    "baselines.mappo_meltingpot": 2,
    "baselines.randnet_meltingpot": 2,
    "baselines.opre_meltingpot": 2,
    "baselines.pp_meltingpot": 2,
    "baselines.rpm_meltingpot": 2,
    "mra_maddpg_particle": 4,  # theta with phi, the critic, phi by information, psi with xi
    "baselines.maddpg_particle": 2,
    "baselines.epc_particle": 4,  # two in each of two stages, as agents have weights of their own
    "baselines.rl2_particle": 1,
    "mipi_refil_smac": 3,  # utilities with mixer, the policy's head, the marginal
    "baselines.refil_smac": 1,
    "baselines.collaq_smac": 1,
    "baselines.mappo_smac": 2,
    "baselines.mipi_mappo_smac": 3,  # actor, critic, marginal
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_all_networks_are_clipped(name, tmp_path, monkeypatch):
    module, before, after = script(name), {}, {}
    descend = module.descend

    def watched(loss, net, *rest):
        norm = descend(loss, net, *rest)
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        kind = (type(net).__name__, sum(p.numel() for p in net.parameters()))
        before.setdefault(kind, []).append(float(norm))
        after.setdefault(kind, []).append(float(torch.cat(gradients).norm()))
        return norm

    monkeypatch.setattr(module, "descend", watched)
    monkeypatch.chdir(tmp_path)
    flags = ["--final-episodes", 0, "--max-grad-norm", LIMIT]
    flags += ["--distilled-width", 0.5] if name.startswith("bidist") else []
    assert module.main(command(name, tmp_path / "run", *flags)) == 0
    assert len(after) == NETWORKS[name], list(after)
    for kind, norms in after.items():
        assert max(before[kind]) > 2 * LIMIT and max(norms) < 1.01 * LIMIT, kind
