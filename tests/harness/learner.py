"""A script on the harness that is small and quick: a bandit of three arms, a policy of three
logits, a replay of what was earned. What concerns the harness is tested on it.

    python tests/harness/learner.py --total-timesteps 80
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import (
    Amount,
    Evaluation,
    Parts,
    Positive,
    Run,
    RunArgs,
    call,
    check_finite,
    descend,
    leave,
    read_args,
)

import numpy as np
import torch
from torch import Tensor, nn

ARMS = 3


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """A bandit."""

    total_timesteps: Positive = 160  # pulls of all worlds
    final_episodes: Positive | Literal[0] = 4  # at the end
    eval_every: Positive | Literal[0] = 0  # never
    save_every: Positive | Literal[0] = 80  # pulls
    num_envs: Positive = 4  # B, pulls of an iteration, ten times
    arms: tuple[str, ...] = ("low", "middle", "high")  # their names
    learning_rate: Amount = 0.1  # Adam
    scale: Amount = 1.0  # of rewards
    use_replay: bool = True  # learn from earlier pulls, too
    buffer_size: Positive = 1000  # pulls that the replay keeps
    poison_at: Amount = 0.0  # a reward is not finite from this iteration on; 0: never
    poison: Literal["nan", "inf"] = "nan"  # what it is then
    pause: Amount = 0.0  # seconds that an iteration, and an episode of evaluation, takes longer


PRESETS = {
    "paper": {},
    "cpu": {"num_envs": 8, "learning_rate": 0.2},
    "cpu poison inf": {"num_envs": 6, "buffer_size": 50},
}
LINE = ("reward", "sps")
RESUMABLE = ("pause", "poison_at")


def validate(args: Args) -> list[tuple[Any, str]]:
    """Combinations that make no sense."""
    return [(args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size")]


class Replay:
    """Actions and rewards of the last pulls."""

    def __init__(self, args: Args):
        self.actions = torch.empty(args.buffer_size, dtype=torch.int8)
        self.rewards = torch.empty(args.buffer_size)
        self.numbers = {"count": 0}  # pulls so far

    def add(self, actions: Tensor, rewards: Tensor) -> None:
        """Pulls (B,)."""
        first = self.numbers["count"]
        place = torch.arange(first, first + len(actions)) % len(self.rewards)
        self.actions[place], self.rewards[place] = actions.to(torch.int8), rewards
        self.numbers["count"] += len(actions)

    def filled(self) -> dict[str, Tensor]:
        """What has been written."""
        size = min(self.numbers["count"], len(self.rewards))
        return {"actions": self.actions[:size], "rewards": self.rewards[:size]}

    def refill(self, tensors: dict[str, Tensor]) -> None:
        """Put back what filled() gave."""
        for name, x in tensors.items():
            getattr(self, name)[: len(x)] = x

    def parts(self) -> dict[str, Any]:
        """What a checkpoint keeps beside that."""
        return {"numbers": self.numbers}


class Agent(Parts):
    """The policy and its optimiser."""

    def __init__(self, args: Args, device: torch.device):
        torch.manual_seed(args.seed)
        self.actor = nn.Linear(1, ARMS, bias=False).to(device)
        self.optimiser = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate)

    def log_probs(self) -> Tensor:
        """(A,)"""
        return self.actor.weight[:, 0].log_softmax(-1)


def evaluate(args: Args, agent: Agent, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Mean reward of the greedy arm, and of a random one."""
    evaluation.expect(2 * evaluation.episodes)
    best, results = int(agent.log_probs().argmax()), {}
    for row in ("greedy", "random"):
        total = 0.0
        for _ in range(evaluation.episodes):
            time.sleep(args.pause)
            arm = best if row == "greedy" else int(evaluation.rng.integers(ARMS))
            total += arm * args.scale
            evaluation.progress(1)
        results[row] = {"return": total / evaluation.episodes, "episodes": evaluation.episodes}
        if evaluation.videos:
            save_video(evaluation.videos / f"{evaluation.stem}-{row}.mp4")
    return results


def save_video(path: Path) -> None:
    """Ten frames of noise."""
    import imageio.v2 as imageio

    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    with imageio.get_writer(path, fps=5, codec="libx264") as writer:
        for _ in range(10):
            writer.append_data(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    return "\n".join(f"| {row} | {figures['return']:.3f} |" for row, figures in results.items())


def update(args: Args, agent: Agent, replay: Replay, rng: torch.Generator) -> dict[str, Tensor]:
    """A step of REINFORCE on pulls of the replay."""
    pulls = replay.filled()
    size = min(len(pulls["rewards"]), args.num_envs)
    index = torch.arange(-size, 0) % len(pulls["rewards"])
    if args.use_replay:
        index = torch.randint(len(pulls["rewards"]), (size,), generator=rng)
    rewards = pulls["rewards"][index]
    log_prob = agent.log_probs()[pulls["actions"][index].long()]
    loss = -(log_prob * (rewards - rewards.mean())).mean()
    norm = descend(loss=loss, net=agent.actor, optimiser=agent.optimiser, max_norm=1.0)
    check_finite(rewards=rewards, loss=loss)
    return {"loss": loss, "grad_norm": norm}


def train(args: Args) -> int:
    """The run; returns its exit code."""
    with Run(args, table, LINE) as run:
        agent, replay = Agent(args, run.device), Replay(args)
        rng = torch.Generator().manual_seed(args.seed + run.rank)
        run.restore(agent=agent)

        def judge(evaluation: Evaluation) -> dict[str, dict[str, float]]:
            return evaluate(args, agent, evaluation)

        run.judge = judge
        if args.eval_only:
            return run.evaluate_only()
        own = {"rng": rng, "replay": replay}
        run.begin("bandit", parts={"agent": agent}, own=own, replays={"pulls": replay}, arms=ARMS)
        run.say(f"{args.num_envs} pulls at a time")
        while run.goes_on():
            time.sleep(args.pause)
            probs = agent.log_probs().detach().exp()
            actions = probs.multinomial(args.num_envs, replacement=True, generator=rng)
            rewards = args.scale * actions.float()
            if args.poison_at and run.iteration + 1 >= args.poison_at:
                rewards[-1] = float(args.poison)
            replay.add(actions, rewards)
            run.lap("collect_s")
            run.note(update(args, agent, replay, rng))
            run.lap("learn_s")
            run.advance(args.num_envs * run.size)
            if run.is_due(args.log_every):
                run.log({"reward": rewards.mean()})
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                run.evaluate("eval")
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    read = lambda: read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS)  # noqa: E731
    return call(lambda: train(read()))


if __name__ == "__main__":
    leave(main())
