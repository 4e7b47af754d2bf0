"""What REFIL's utilities can learn in Resource Collection when they are told what to do.

    python experiments/collection_imitation.py
    python experiments/collection_imitation.py --teacher collector --minibatches 1000

The network of refil_smac.py --scenario resource, its optimiser and minibatches learn a script's
actions as labels (cross-entropy, utilities as scores), in episodes that it plays itself (the first
ones are the script's): DAgger (Ross et al., 2011). If it earns what the script earns, sight,
features, network and number of gradient steps are not what keeps agents from learning the task.
--teacher forager sees what agents see, collector everything.

Prints what greedy agents earn after so many minibatches, in Markdown, and in the end beside the
scripts.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from annotated_types import Interval
from figures import Above, Positive, Seed, UsageError, check_bounds, load_script, one_line_errors
from torch import Tensor

from envs.smac.resource_collection import (
    ResourceCollection,
    collector,
    forager,
    play,
    scripted_policies,
    summarise,
    table,
)

TEACHERS = {"forager": forager, "collector": collector}
KEPT = 8  # rounds of episodes that minibatches are drawn from


@dataclasses.dataclass(frozen=True)
class Study:
    """Who teaches, and how long."""

    teacher: Literal["forager", "collector"] = "forager"
    minibatches: Positive = 3000
    learning_rate: Above = 5e-4  # of RMSprop: the paper's, half of preset cpu's
    preset: Literal["cpu", "paper"] = "cpu"  # of refil_smac.py: network and minibatches
    round: Positive = 64  # episodes that are played at a time
    every: Positive = 50  # minibatches between rounds
    show: Positive = 500  # minibatches between lines
    episodes: Positive = 160  # of each line
    team_sizes: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (3, 4, 5)
    eval_team_sizes: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (6, 7, 8)
    seed: Seed = 1


def watched(policy: Any, teacher: Any, kept: list[tuple]) -> Any:
    """policy, with what agents see, what they did last and what the teacher would do in kept."""
    last = None

    def act(world: ResourceCollection) -> Tensor:
        nonlocal last
        if last is None:
            last = torch.full(world.obs.avail.shape[:2], -1)
        kept.append((world.obs, last, teacher(world)))
        last = policy(world)
        return last

    return act


def learn(script: Any, agent: Any, steps: list[tuple], some: Tensor) -> float:
    """A gradient step on the episodes `some` of a round; the share of labels that were met."""
    chosen = ((type(o)(*(x[some] for x in o)), a[some], b[some]) for o, a, b in steps)
    obs, last, label = zip(*chosen)
    obs = type(obs[0])(*map(torch.cat, zip(*obs)))  # (M, ...), in order of time
    played = torch.ones(len(steps), len(some), dtype=torch.bool)
    view = script.look(obs, torch.cat(last), played, agent.device)
    with agent.autocast():
        scores = agent.utility(view)[0][0]  # (M, A, actions)
    there = ~view.avail[..., 0]  # (M, A)
    scores = scores.masked_fill(~view.avail, script.MASKED)[there]
    label = torch.cat(label)[:, : there.shape[1]][there]
    loss = F.cross_entropy(scores, label)
    script.descend(loss, agent.utility, agent.optimiser, agent.args.max_grad_norm)
    return float((scores.argmax(-1) == label).float().mean())


def main(study: Study) -> None:
    """Teach, and print tables."""
    check_bounds(study)
    if not study.team_sizes:
        raise UsageError("--team-sizes: at least one is needed.")
    script, teacher = load_script("refil_smac"), TEACHERS[study.teacher]
    flags = ["--scenario", "resource", "--no-imagine", "--preset", study.preset]
    flags += ["--learning-rate", str(study.learning_rate), "--seed", str(study.seed)]
    args = script.read_args(script.with_preset([*flags, "--device", "cpu"]))
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(study.seed)
    worlds = ResourceCollection(study.team_sizes, study.round, study.seed, once=True)
    agent = script.Agent(args, worlds.family, torch.device("cpu"))
    rounds: list[list[tuple]] = []
    for n in range(study.minibatches):
        if n % study.every == 0:
            rounds = [*rounds[1 - KEPT :], []]
            play(worlds, watched(script.player(agent) if n else teacher, teacher, rounds[-1]))
        steps = rounds[int(torch.randint(len(rounds), (), generator=rng))]
        some = torch.randperm(study.round, generator=rng)[: args.batch_size]
        right = learn(script, agent, steps, some)
        if (n + 1) % study.show == 0 or n + 1 == study.minibatches:
            mixed = ResourceCollection(study.team_sizes, study.episodes, study.seed + 1, once=True)
            row = {f"after {n + 1}": summarise(play(mixed, script.player(agent)))}
            print(f"labels met: {right:.3f}\n{table(row)}\n", flush=True)
    rows = {}
    for size in dict.fromkeys((*study.team_sizes, *study.eval_team_sizes)):
        world = ResourceCollection((size,), study.episodes, study.seed + 1, once=True)
        policies = {"taught": script.player(agent)} | scripted_policies(study.seed)
        for name, policy in policies.items():
            world.seed(study.seed + 1)  # all meet the same teams and places
            rows[f"{size} {name}"] = summarise(play(world, policy))
    print(table(rows))


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
