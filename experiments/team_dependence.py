"""How much agents depend on the team around them: what they would do if part of it was not there.

    python experiments/team_dependence.py runs/sz-mipi-s1 runs/sz-refil-s1
    python experiments/team_dependence.py runs/sz-* --states runs/sz-refil-s1 --episodes 128

Agents of refil_smac.py or mipi_refil_smac.py read episodes of a replay, which checkpoints keep:
once as they were played, once without seeing their teammates, and --draws times in REFIL's random
groups, of which they see their own only (teammates and enemies). Means over the steps of living
agents, over episodes, with 95 % bootstrap intervals:

    mates    share of greedy actions that are others when teammates are not seen, ever
    groups   the same in random groups
    nats     I(u; group | what was seen): the mean divergence of the policy in a group from its
             mean over the draws. With few draws it is too small; it is at most their logarithm.
             Of runs with a policy that draws, only.

--states: whose replay all read, so that all are asked about the same battles; else each its own.
Prints Markdown.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from figures import (
    Positive,
    Runs,
    Seed,
    UsageError,
    check_bounds,
    load_script,
    markdown_table,
    one_line_errors,
    read_args,
)
from replace_orders import SCRIPTS
from scipy.stats import bootstrap
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Study:
    """Whose agents, and in which states."""

    runs: Runs
    states: str = ""  # the run whose replay is read; default: each run's own
    episodes: Positive = 64  # of it, at most
    draws: Positive = 8  # of groups
    seed: Seed = 1


class Opened(NamedTuple):
    """A run's last checkpoint."""

    script: Any
    agent: Any
    replay: Any


def open_checkpoint(run: Path, states: Path) -> Opened:
    """The agents of a run with the replay of another, or the same; UsageError for what is no run of
    these scripts, and for a replay of another world."""
    name = read_args(run)["script"]
    if name not in SCRIPTS:
        raise UsageError(f"{run} is a run of {name}.py, not of {' or '.join(SCRIPTS)}.")
    script, own, other = load_script(name), read_args(run), read_args(states)
    if own["scenario"] != other["scenario"]:
        raise UsageError(f"{run} is of {own['scenario']}, {states} of {other['scenario']}.")
    for path, args in ((run, own), (states, other)):
        if args["backend"] != "sim":
            raise UsageError(f"{path} is of the game itself: only the simulator's runs are read.")
    try:
        saved, _ = script.load_checkpoint(str(run))
        source, folder = script.load_checkpoint(str(states))
        args = script.read_args(["--eval-only", str(run), "--final-episodes", "1"])
        sizes = {k: source["args"][k] for k in ("buffer_size", "max_episode_steps")}
        args = dataclasses.replace(args, **sizes)
        battles = script.make_envs(args, args.team_sizes, 1, args.seed)
        agent = script.Agent(args, battles.family, torch.device("cpu"))
        script.restore(agent.parts(), saved["agent"], str(run))
        replay = script.Replay(args, battles, agent.device)
        script.load_replay(folder, source["replay"], replay, source["episodes"])
    except script.RunError as error:
        raise UsageError(str(error)) from None
    return Opened(script, agent, replay)


def without_mates(view: Any) -> Any:
    """The same moments; nobody sees other agents."""
    A = view.unseen.shape[1]
    mates = torch.nn.functional.pad(~torch.eye(A, dtype=torch.bool), (0, view.unseen.shape[2] - A))
    return view._replace(unseen=view.unseen | mates)


def says(opened: Opened, view: Any, groups: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Greedy actions (M, A), and log pi (M, A, actions) where policies draw; with groups (M, S)
    in view of one's own."""
    script, agent, seen = opened.script, opened.agent, 0 if groups is None else 1
    q, *rest = agent.utility(view, groups)
    if hasattr(agent, "policy") and agent.args.policy == "head":
        log_pi = agent.log_policy(q[seen], rest[0][seen], view.avail)
        return log_pi.argmax(-1), log_pi
    return q[seen].masked_fill(~view.avail, script.MASKED).argmax(-1), None


@torch.no_grad()
def measure(opened: Opened, study: Study) -> dict[str, np.ndarray]:
    """{name: mean of each episode}."""
    rng = torch.Generator().manual_seed(study.seed)
    batch = opened.replay.sample(rng, study.episodes)
    view, living = batch.view, ~batch.view.avail[..., 0]  # (M, A)
    last = torch.ones(len(living), dtype=torch.bool)
    last[batch.step] = False
    living &= ~last[:, None]  # nobody acts at an episode's end
    episode = view.played.nonzero()[:, 1]  # (M,)
    B = view.played.shape[1]

    def per_episode(x: Tensor) -> np.ndarray:
        sums = torch.zeros(B).index_add(0, episode, (x * living).sum(1).float())
        counts = torch.zeros(B).index_add(0, episode, living.sum(1).float())
        return (sums / counts).numpy()

    real, _ = says(opened, view)
    found = {"mates": per_episode(says(opened, without_mates(view))[0] != real)}
    changed, each = torch.zeros_like(real, dtype=torch.float32), []
    for _ in range(study.draws):
        action, log_pi = says(opened, view, opened.script.draw_groups(view, rng))
        changed += (action != real) / study.draws
        each += [] if log_pi is None else [log_pi]
    found["groups"] = per_episode(changed)
    if each:
        log_pi = torch.stack(each)  # (draws, M, A, actions)
        mean = log_pi.exp().mean(0)
        ratio = log_pi - mean.clamp(min=1e-30).log()
        found["nats"] = per_episode((log_pi.exp() * ratio).sum(-1).mean(0))
    return found


def cell(x: np.ndarray) -> str:
    """Mean and interval."""
    low = high = x.mean()
    if len(x) > 1 and x.std() > 0:
        rng = np.random.default_rng(0)
        low, high = bootstrap((x,), np.mean, n_resamples=2000, rng=rng).confidence_interval
    return f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"


def main(study: Study) -> None:
    """Print the table."""
    check_bounds(study)
    torch.set_num_threads(1)
    rows = []
    for run in study.runs:
        opened = open_checkpoint(run, Path(study.states or run))
        found = measure(opened, study)
        rows.append({"run": run.name, "mates": "", "groups": "", "nats": ""})
        rows[-1] |= {name: cell(x) for name, x in found.items()}
    print(markdown_table(rows), end="")


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
