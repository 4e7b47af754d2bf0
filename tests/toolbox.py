"""What several tests need: the scripts as modules, and small rollouts with them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
BIDIST = ROOT / "bidist_mappo_meltingpot.py"
MAPPO = ROOT / "baselines" / "mappo_meltingpot.py"
OPRE = ROOT / "baselines" / "opre_meltingpot.py"
TINY = ["--substrate", "toy", "--num-envs", "4", "--rollout-steps", "20"]
# MAPPO's flags away from their defaults: a child that does not read one of them has other bits.
UNLIKE_DEFAULTS = [
    *("--clip", "0.05", "--entropy-coef", "0.3", "--value-clip", "0.01", "--huber-delta", "0.05"),
    *("--gamma", "0.8", "--gae-lambda", "0.5", "--actor-lr", "2e-3", "--critic-lr", "3e-3"),
    *("--adam-eps", "1e-3", "--max-grad-norm", "0.5", "--chunk-length", "5"),
    *("--max-episode-steps", "7", "--team-reward"),
]


def load_script(path: Path) -> ModuleType:
    """A script as a module, loaded once."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


bidist = load_script(BIDIST)
mappo = load_script(MAPPO)
opre = load_script(OPRE)


def setting(*flags: str, script: ModuleType = bidist, seed: int = 0) -> SimpleNamespace:
    """Worlds, networks and generators as train() makes them, ready to collect."""
    args = script.parse([*TINY, *flags])
    envs = script.make_envs(args, args.num_envs, args.seed)
    agent = script.Agent(args, envs, torch.device("cpu"))
    envs.reset()
    return SimpleNamespace(
        script=script,
        args=args,
        envs=envs,
        agent=agent,
        state=script.new_state(agent, args.num_envs),
        rng=torch.Generator().manual_seed(seed),
        method_rng=torch.Generator().manual_seed(seed + 1),
    )


def collect(s: SimpleNamespace):
    """One rollout of a setting, whose state goes on."""
    method = {"method_rng": s.method_rng} if s.script is bidist else {}
    batch, s.state = s.script.collect(s.args, s.envs, s.agent, s.state, rng=s.rng, **method)
    return batch


def prepare(s: SimpleNamespace, batch):
    """The rollout with what the losses need."""
    batch, s.state = s.script.prepare(s.args, s.agent, batch, s.state)
    return batch


def update(s: SimpleNamespace, batch) -> dict[str, torch.Tensor]:
    """One update of a setting; s.batch is what it was trained on."""
    s.batch = prepare(s, batch)
    return s.script.update(s.args, s.agent, s.batch, s.rng)


def distill(s: SimpleNamespace, batch, phase: str) -> dict[str, torch.Tensor]:
    """A phase of distillation on a rollout of a setting, whose state goes on."""
    found, s.state = bidist.distill(s.args, s.agent, batch, s.state, phase=phase, rng=s.method_rng)
    return found


def weights(net: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def sharpen(net: torch.nn.Module, scale: float = 1.0, seed: int = 0) -> None:
    """Perturb all weights: new policies are almost uniform and new values almost flat."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        noise = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        p.data += scale * noise / p.shape[-1] ** 0.5


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
