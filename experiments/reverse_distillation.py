"""When does reverse distillation shift preferences? Phases applied to copies of phi, offline.

    python experiments/reverse_distillation.py runs/RUN [runs/RUN ...] --out docs/data/reverse

Each run (of bidist_mappo_meltingpot.py) gives theta and, from fresh worlds, a rollout. Then phi is
put at several distances from theta and one reverse phase (Eq. 8) is applied at several rates and
lengths:

    initial    a new phi, close to uniform: where Prop. 4.1 begins
    lagged     the run's own phi, as training left it
    near       that phi after a forward phase (Eq. 7) on this rollout: where Alg. 1 begins

Columns: KL(theta || phi), the share of observations where phi prefers another action than theta,
pi_phi(a*_theta), and pi_phi(a*_phi), before and after. If KL grows while the share stays and phi's
own favourite grows likelier, phi has only become sharper on the same action.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bidist_mappo_meltingpot as bidist

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Study:
    """Reverse phases on saved runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # run directories
    rates: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3)  # eta_r
    epochs: tuple[int, ...] = (5, 25)  # of a phase, 5 minibatches each
    num_envs: int = 16  # worlds of the rollout, 200 steps
    warm_up: int = 1  # rollouts before the one that is used, so that worlds are not at their starts
    seed: int = 1  # of worlds, actions and shuffling
    out: Path = Path("reverse_distillation")  # writes OUT.csv and OUT.png


def study_run(path: str, study: Study) -> list[dict]:
    """All phases on one run: a row for each distance, rate and length."""
    saved, _ = bidist.load_checkpoint(path)
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["args"].items()}
    args = dataclasses.replace(bidist.Args(**own), num_envs=study.num_envs, device="cpu")
    rows = []
    with bidist.make_envs(args, args.num_envs, study.seed + 10**6) as envs:
        agent = bidist.Agent(args, envs.spec, torch.device("cpu"))
        bidist.restore(agent.parts(), saved["agent"], path)
        sprites, carry = bidist.Sprites(envs, agent.device), bidist.new_carry(agent, args.num_envs)
        rngs = [torch.Generator().manual_seed(study.seed + k) for k in (0, 1)]
        envs.reset()
        for _ in range(study.warm_up + 1):
            batch = bidist.collect(args, envs, agent, carry, sprites, *rngs)
    lagged = agent.distilled
    starts = {
        "initial": agent.new_distilled(study.seed + 2**31),
        "lagged": lagged,
        "near": copy.deepcopy(lagged),
    }
    agent.distilled = starts["near"]
    bidist.distill(args, "forward", agent, batch, carry, sprites, rngs[1], lambda: None)
    for start, rate, epochs in itertools.product(starts, study.rates, study.epochs):
        agent.distilled = copy.deepcopy(starts[start])
        phase = dataclasses.replace(args, reverse_lr=rate, reverse_epochs=epochs, reverse_mode="kl")
        rng = torch.Generator().manual_seed(study.seed)
        # phi's state before the rollout is zero for every start: none has lived through the past.
        fresh = dataclasses.replace(
            batch, distilled_hidden=torch.zeros_like(batch.distilled_hidden)
        )
        scalars = bidist.distill(phase, "reverse", agent, fresh, carry, sprites, rng, lambda: None)
        row = {"run": Path(path).name, "step": saved["timesteps"], "phi": start}
        row |= {"rate": rate, "epochs": epochs}
        rows.append(row | {k.removeprefix("reverse/"): float(v) for k, v in scalars.items()})
    return rows


def draw(rows: list[dict], study: Study) -> None:
    """Shift and KL against the rate, a panel for each distance, a line for each run."""
    starts = list(dict.fromkeys(row["phi"] for row in rows))
    figure, axes = plt.subplots(2, len(starts), figsize=(3.6 * len(starts), 5.2), sharex=True)
    for column, start in enumerate(starts):
        for run in dict.fromkeys(row["run"] for row in rows):
            for epochs in study.epochs:
                chosen = [
                    row
                    for row in rows
                    if (row["run"], row["phi"], row["epochs"]) == (run, start, epochs)
                ]
                label = f"{run}, {epochs} epochs"
                rates = [row["rate"] for row in chosen]
                for line, name in enumerate(("shift", "kl")):
                    axis = axes[line, column]
                    axis.plot(rates, [row[f"{name}_after"] for row in chosen], "o-", label=label)
                    axis.axhline(chosen[0][f"{name}_before"], color="grey", lw=0.6)
        axes[0, column].set(title=f"phi {start}", ylim=(-0.02, 1.02), xscale="log")
        axes[1, column].set(xlabel="reverse rate", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("preference shift after")
    axes[1, 0].set_ylabel("KL(theta || phi) after")
    axes[0, -1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(study.out.with_suffix(".png"), dpi=110)


def main() -> None:
    study = tyro.cli(Study)
    torch.set_num_threads(1)
    rows = [row for path in study.runs for row in study_run(path, study)]
    study.out.parent.mkdir(parents=True, exist_ok=True)
    with study.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    draw(rows, study)
    names = ("kl", "shift", "phi_prefers", "phi_peak")
    print(
        "| phi | rate | epochs | " + " | ".join(f"{name} before -> after" for name in names) + " |"
    )
    print("|---|---|---|" + "---|" * len(names))
    groups = defaultdict(list)
    for row in rows:
        groups[row["phi"], row["rate"], row["epochs"]].append(row)
    for key, cells in groups.items():  # means over runs
        means = [
            [np.mean([row[f"{n}_{when}"] for row in cells]) for when in ("before", "after")]
            for n in names
        ]
        print(
            f"| {key[0]} | {key[1]:g} | {key[2]} | "
            + " | ".join(f"{a:.3f} -> {b:.3f}" for a, b in means)
            + " |"
        )


if __name__ == "__main__":
    main()
