"""Short runs of the particle scripts, and what several of their tests need."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import harness

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
MRA, MADDPG = "mra_maddpg_particle", "baselines.maddpg_particle"
MAAC, RL2, EPC = (f"baselines.{name}_particle" for name in ("maac", "rl2", "epc"))
BOTH = (MRA, MADDPG)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def parse(module: ModuleType, argv: list) -> Any:
    """The arguments that a script would train with."""
    argv = [str(word) for word in argv]
    if hasattr(module, "read"):
        return module.read(argv)
    return harness.read_args(
        module.Args, argv, module.validate, resumable=module.RESUMABLE, presets=module.PRESETS
    )


def tiny(name: str, run_dir: Path | str, steps: int, *flags: object) -> list[str]:
    """The command line of a run of some environment steps, without evaluation."""
    argv = "--num-envs 4 --hidden-size 8"
    if name == RL2:
        argv += " --max-episode-steps 5 --rnn-size 6 --key-size 4 --epochs 1 --minibatches 2"
    else:
        argv += " --batch-size 16 --buffer-size 500 --update-every 20"
    argv += " --eval-episodes 2 --final-episodes 0 --eval-every 0"
    argv += " --save-every 0 --log-every 1000000"
    if name == MAAC:
        argv += " --num-updates 1"
    elif name != RL2:
        argv += " --inner-steps 1 --key-size 4"
    own = ("--populations", 3, 5) if name in (MRA, RL2, EPC) else ("--population", 3)
    if name == EPC:
        own += ("--sets", 2, "--tournament-episodes", 2, "--max-episode-steps", 5)
    where = ("--total-timesteps", steps, "--run-dir", run_dir)
    return [str(word) for word in (*argv.split(), *own, *where, *flags)]


def resuming(run_dir: Path | str, steps: int, *flags: object) -> list[str]:
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", steps, *flags)]


def run(name: str, run_dir: Path | str, steps: int, *flags: object) -> dict[str, Any]:
    """A whole run; its last checkpoint."""
    assert script(name).main(tiny(name, run_dir, steps, *flags)) == 0
    return newest(run_dir)


# --- What a run leaves ----------------------------------------------------------------------------


def index(run_dir: Path | str) -> list[dict[str, Any]]:
    return json.loads((Path(run_dir) / "checkpoints.json").read_text())


def read(path: Path | str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def newest(run_dir: Path | str) -> dict[str, Any]:
    """All of the newest checkpoint that is the same in a run that repeats it."""
    state = read(Path(run_dir) / index(run_dir)[0]["name"])
    return {k: x for k, x in state.items() if k not in ("args", "wall_s", "replays")}


def initial(run_dir: Path | str) -> dict[str, Any]:
    """The checkpoint from before the first update."""
    return read(Path(run_dir) / "checkpoint-0.pt")


def collectors(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint says of each population."""
    (own,) = state["ranks"]
    return list(own["collectors"].values()) if "collectors" in own else [own["collector"]]


def replays(run_dir: Path | str, timesteps: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The replays beside the newest checkpoint or another one."""
    timesteps = index(run_dir)[0]["timesteps"] if timesteps is None else timesteps
    return list(read(Path(run_dir) / f"replay-{timesteps}.pt").values())


def metrics(run_dir: Path | str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without times and speeds."""
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [{k: x for k, x in m.items() if not k.endswith("_s") and k != "sps"} for m in lines]


def nets(state: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in state["agent"].items() if "optimiser" not in name}


def leaves(x: Any, where: str = "") -> dict[str, Any]:
    """A nested structure of tensors and numbers as {where: exactly what is there}."""
    if isinstance(x, (dict, list, tuple)):
        parts = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: leaf for name, y in parts for k, leaf in leaves(y, f"{where}/{name}").items()}
    if isinstance(x, torch.Tensor):
        return {where: (x.dtype, x.shape, x.detach().contiguous().numpy().tobytes())}
    return {where: repr(x)}


def differences(a: Any, b: Any) -> list[str]:
    """Where two structures are not the same, bit for bit."""
    a, b = leaves(a), leaves(b)
    assert a and b
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


# --- Networks -------------------------------------------------------------------------------------


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
