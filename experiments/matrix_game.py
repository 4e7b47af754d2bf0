"""MIPI's matrix game (Fig. 2 d): three learners, what each earns in a team it never met.

    python experiments/matrix_game.py --out docs/data/matrix_game
    python experiments/matrix_game.py --payoffs coordinated --seeds 1 2 3 4 5
    python experiments/matrix_game.py --exact                   the optima only, as alpha varies

Reward alone, with entropy, with mutual information: the same learner, with the equations of
mipi_refil_smac.py and networks of one hidden layer (App. B.1). Q_tot = Q_1 + Q_2 + b(team); an
episode is one step. Writes OUT.png (greedy and expected reward in team (B,B), mean and range of the
seeds, the exact optima as dotted lines), OUT.csv and OUT.md with the optima over alpha.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from annotated_types import Interval, MinLen
from figures import (
    Above,
    Amount,
    Positive,
    Seed,
    check_bounds,
    check_out,
    finish,
    load_script,
    markdown_table,
    one_line_errors,
    plt,
)
from torch import Tensor, nn

from envs.smac.matrix_game import (
    OBJECTIVES,
    PAYOFFS,
    TRAINED,
    TYPES,
    UNSEEN,
    Objective,
    expected,
    optima,
    optimum,
    unseen_reward,
)

ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
LABELS = {"none": "reward", "entropy": "reward + entropy", "mi": "reward - mutual information"}


@dataclasses.dataclass(frozen=True)
class Study:
    """What to learn."""

    payoffs: Literal["additive", "coordinated"] = "additive"
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (1, 2, 3, 4, 5)
    steps: Positive = 2000  # of each learner
    alpha: Amount = 0.5
    batch_size: Positive = 64  # episodes of a step, all new
    learning_rate: Above = 3e-4
    hidden_size: Positive = 64
    ba_iterations: Positive = 1
    epsilon: Annotated[float, Interval(ge=0, le=1)] = 0.1  # share of random actions
    every: Positive = 50  # steps between points of the curves
    # Optima are among policies whose probabilities are multiples of 1 / grid.
    grid: Annotated[int, Interval(ge=1, le=60)] = 40
    exact: bool = False  # optima only
    out: Path = Path("matrix_game")  # .png, .csv and .md


class Nets(nn.Module):
    """One hidden layer with ELU for each of n seeds side by side."""

    def __init__(self, rngs: list[torch.Generator], inputs: int, hidden: int, outputs: int):
        super().__init__()

        def new(size: int, *shape: int) -> nn.Parameter:
            draws = [torch.rand(shape, generator=rng) * 2 - 1 for rng in rngs]
            return nn.Parameter(torch.stack(draws) / math.sqrt(size))

        self.first, self.bias = new(inputs, inputs, hidden), new(inputs, 1, hidden)
        self.last, self.last_bias = new(hidden, hidden, outputs), new(hidden, 1, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (n, B, inputs) -> (n, B, outputs)
        return F.elu(x @ self.first + self.bias) @ self.last + self.last_bias


def inputs_of(team: Tensor) -> Tensor:
    """Agents' index and own type, one-hot, (..., 2, 4), of types (..., 2)."""
    index = torch.eye(2).expand(*team.shape, 2)
    return torch.cat((index, F.one_hot(team, 2).float()), -1)


def policies_of(policy: Nets) -> np.ndarray:
    """(n, 2 agents, 2 types), probabilities of action 1."""
    team = torch.tensor([[0, 0], [1, 1]])  # types of both agents
    with torch.no_grad():
        p = policy(inputs_of(team).flatten(0, 1).expand(len(policy.first), -1, -1)).softmax(-1)
    return p[..., 1].view(-1, 2, 2).transpose(1, 2).double().numpy()


def learn(study: Study, objective: Objective) -> np.ndarray:
    """Policies (points, n, 2, 2) every so many steps, from the first."""
    script, game = load_script("mipi_refil_smac"), PAYOFFS[study.payoffs]
    n, H, B = len(study.seeds), study.hidden_size, study.batch_size
    rngs = [torch.Generator().manual_seed(seed) for seed in study.seeds]
    critic, b = Nets(rngs, 4, H, 2), Nets(rngs, 2, H, 1)
    policy, marginal = Nets(rngs, 4, H, 2), Nets(rngs, 2, H, 2)
    options = {"lr": study.learning_rate, "alpha": 0.99, "eps": 1e-5}
    new = lambda *nets: torch.optim.RMSprop([p for x in nets for p in x.parameters()], **options)  # noqa: E731
    judge, actor, prior = new(critic, b), new(policy), new(marginal)
    types = torch.tensor([[TYPES.index(t) for t in team] for team in TRAINED])
    payoffs = torch.tensor(np.stack([game[team] for team in TRAINED]), dtype=torch.float32)
    all_actions = torch.ones(2, dtype=torch.bool)
    alpha = 0.0 if objective == "none" else study.alpha
    points = []

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=rng) for rng in rngs])

    def move(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        loss.sum(0).mean().backward()  # a seed's gradient does not depend on the others
        optimiser.step()

    for step in range(study.steps + 1):
        if step % study.every == 0:
            points.append(policies_of(policy))
        team = (draw(B) < 0.5).long()  # (n, B): which of the trained ones
        x = inputs_of(types[team])  # (n, B, 2, 4)
        flat = x.flatten(1, 2)
        with torch.no_grad():
            p = policy(flat).softmax(-1)[..., 1].view(n, B, 2)
        p = (1 - study.epsilon) * p + study.epsilon / 2
        u = (draw(B, 2) < p).long()
        r = payoffs[team, u[..., 0], u[..., 1]]
        q = critic(flat).view(n, B, 2, 2)
        total = q.gather(-1, u[..., None]).sum((2, 3)) + b(F.one_hot(team, 2).float())[..., 0]
        move((total - r).square(), judge)  # Eq. (16) of one step
        q = q.detach()
        for _ in range(study.ba_iterations):
            log_m = torch.zeros(n, B, 2, 2)
            if objective == "mi":
                log_pi = script.log_probabilities(policy(flat), all_actions).view(n, B, 2, 2)
                log_m = script.log_probabilities(marginal(x[..., :2].flatten(1, 2)), all_actions)
                move(script.marginal_loss(log_pi, log_m.view(n, B, 2, 2)).sum(-1), prior)
                log_m = script.log_probabilities(marginal(x[..., :2].flatten(1, 2)), all_actions)
                log_m = log_m.view(n, B, 2, 2)
            log_pi = script.log_probabilities(policy(flat), all_actions).view(n, B, 2, 2)
            move(script.policy_loss(log_pi, log_m, q, alpha).sum(-1), actor)
    return np.stack(points)


def exact_rows(study: Study) -> list[dict[str, str]]:
    """The optima of the three objectives as alpha varies."""
    rows = []
    for objective in OBJECTIVES:
        for alpha in (0.0,) if objective == "none" else ALPHAS[1:]:
            found = optima(PAYOFFS[study.payoffs], objective, alpha, study.grid)
            best, each = found[0], [", ".join(f"{x:.3g}" for x in p) for p in found[0].policies]
            row = {"objective": LABELS[objective], "alpha": f"{alpha:g}"}
            row |= {"value": f"{best.value:.3f}", "reward in training": f"{best.reward:.3f}"}
            row |= {"p(1) of agent 1 as A, B": each[0], "of agent 2": each[1]}
            rows.append(row | {"greedy in (B,B)": f"{best.unseen:g}", "maxima": str(len(found))})
    return rows


def main(study: Study) -> None:
    """Print the optima; learn, draw and write the curves."""
    check_bounds(study)
    torch.set_num_threads(1)
    text, game = markdown_table(exact_rows(study)), PAYOFFS[study.payoffs]
    if study.exact:
        print(text)
        return
    check_out(study.out)
    rows, (figure, axes) = [], plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    B, ends = TYPES.index("B"), []
    for k, objective in enumerate(OBJECTIVES):
        points = learn(study, objective)  # (points, n, 2, 2)
        best = optimum(game, objective, study.alpha, study.grid)
        at, first, second = np.arange(len(points)) * study.every, *best.policies[:, B]
        greedy = np.array([[unseen_reward(game, p) for p in now] for now in points])
        soft = expected(game[UNSEEN], points[..., 0, B], points[..., 1, B])
        exact = best.unseen, float(expected(game[UNSEEN], first, second))
        for axis, name, y, line in zip(axes, ("greedy", "drawn"), (greedy, soft), exact):
            axis.plot(at, y.mean(1), color=f"C{k}", label=LABELS[objective])
            axis.fill_between(at, y.min(1), y.max(1), color=f"C{k}", alpha=0.2, lw=0)
            axis.axhline(line, color=f"C{k}", ls=":", lw=1)
            axis.set(xlabel="steps", title=f"{name} actions in (B,B)")
            for seed, values in zip(study.seeds, y.T.tolist()):
                about = {"objective": objective, "actions": name, "seed": seed}
                rows += [about | {"step": s, "reward": v} for s, v in zip(at.tolist(), values)]
        end = {"learner": LABELS[objective], "exact optimum": f"{best.unseen:g}"}
        last = zip(study.seeds, greedy[-1].tolist())
        ends.append(end | {f"seed {seed}": f"{x:g}" for seed, x in last})
    axes[0].set_ylabel("reward")
    axes[0].legend()
    figure.tight_layout()
    title = f"Greedy actions in (B,B) after {study.steps} steps, alpha {study.alpha:g}:"
    finish(study.out, f"{title}\n\n{markdown_table(ends)}\n{text}", rows, figure)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
