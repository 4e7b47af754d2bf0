"""A tiny run of each of the sixteen scripts, for what all of them are tested for."""

import particle_tools
import torch
from battle_tools import tiny as off_policy_battles
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
SCRIPTS = [*MELTINGPOT, *PARTICLE, *ON_POLICY, *OFF_POLICY]


def command(name, run_dir, *flags):
    """The words of a tiny run with a final evaluation."""
    flags = ("--final-episodes", 2, *flags)
    if name in MELTINGPOT:
        return tiny(name, run_dir, 2, *flags)
    if name in PARTICLE:
        return particle_tools.tiny(name, run_dir, 60, *flags)
    if name in OFF_POLICY:
        return off_policy_battles(run_dir, 60, *flags)
    words = "--num-envs 2 --hidden-size 8 --heads 2 --max-episode-steps 8 --team-sizes 3 4"
    words += " --eval-team-sizes 5 --eval-every 0 --eval-episodes 2 --save-every 0"
    return [*words.split(), *map(str, ("--total-timesteps", 32, "--run-dir", run_dir, *flags))]


def longer(run_dir, device="cpu"):
    """Twice the steps that a run has."""
    steps = 2 * states(run_dir)[0]["timesteps"]
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", steps, "--device", device)]


def weights(run_dir):
    """All floating tensors of the newest checkpoint's networks, on the CPU."""

    def walk(x):
        if isinstance(x, dict):
            for part in x.values():
                yield from walk(part)
        elif isinstance(x, torch.Tensor) and x.is_floating_point():
            yield x.cpu()

    found = [*walk(states(run_dir)[0]["agent"])]
    assert len(found) > 5
    return found
