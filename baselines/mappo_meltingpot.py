"""MAPPO (Yu et al., 2022) in Melting Pot, the parent of bidist_mappo_meltingpot.py.

All agents share one recurrent actor; in training one critic sees the world and all their features.

    J(theta) = 1/N sum_i E min(r A, clip(r, 1 -+ eps) A),  r = pi_theta / who acted     Eq. (9)

    python baselines/mappo_meltingpot.py                                     the paper's settings
    python baselines/mappo_meltingpot.py --resume runs/RUN --total-timesteps 2000000
    python baselines/mappo_meltingpot.py --eval-only runs/RUN --background random runs/OTHER
    torchrun --nproc-per-node 2 baselines/mappo_meltingpot.py                two times 16 worlds

Letters: T steps, B worlds, N agents, A actions, F features, H W tiles of a view (H' W' of the
global one), S units of a recurrent state, L steps per chunk, C chunks per rollout, M minibatch.
What the paper leaves open is decided in docs/bidist.md; the worlds: docs/meltingpot.md. Equations
and tables are those of BiDist (Feng et al., AAMAS 2025).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
import wandb
from annotated_types import Interval
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.meltingpot.episodes import (
    Player,
    count_episodes,
    play_pairs,
    random_player,
    summarise,
    table,
)
from envs.meltingpot.tile_tensors import Sprites, Windows
from envs.meltingpot.tiles import WorldError

Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Count = Annotated[int, Interval(ge=0)]
Positive = Annotated[int, Interval(ge=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
Above = Annotated[float, Interval(gt=0, lt=math.inf)]


# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """MAPPO in Melting Pot. Defaults are the paper's (Table B.1)."""

    # Run
    seed: Seed = 1  # fixes all that is drawn on our side (the engine drifts all the same)
    total_timesteps: Positive = 10_000_000  # environment steps of all worlds and processes
    run_dir: str = ""  # default: runs/{world}__{script}__s{seed}__{UTC time}__{4 hex}
    resume: str = ""  # run directory to go on with; its own arguments hold
    eval_only: str = ""  # run directory or checkpoint to evaluate, without training
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "unseen"  # project there
    wandb_mode: Literal["online", "offline"] = "online"  # offline: `wandb sync` later
    wandb_timeout: Above = 10.0  # seconds until an unreachable server is given up
    capture_video: bool = False  # an MP4 with every evaluation
    # Environment
    substrate: str = "chicken_in_the_matrix__repeated"  # of Melting Pot, or toy
    num_envs: Positive = 16  # B, worlds per process (rollout threads)
    num_workers: Count = 0  # processes that step worlds; 0: one per core
    worker_timeout: Above = 8.0  # seconds until a worker that gives no sign ends the run
    max_episode_steps: Count = 0  # truncate episodes there; 0: they end naturally
    team_reward: bool = False  # everyone gets the sum of all rewards
    # Method
    rollout_steps: Positive = 200  # T; a rollout does not reset the worlds
    chunk_length: Positive = 10  # L, steps of backpropagation through time
    epochs: Positive = 5  # PPO epochs
    minibatches: Positive = 5  # per epoch
    actor_lr: Amount = 5e-4  # Adam
    critic_lr: Amount = 5e-4  # Adam
    adam_eps: Above = 1e-5  # Adam
    gamma: Share = 0.99  # discount
    gae_lambda: Share = 0.95  # GAE
    clip: Amount = 0.2  # eps of Eq. (9)
    value_clip: Amount = 0.2  # the same for values, in normalised units
    huber_delta: Above = 10.0  # of the value loss
    entropy_coef: Amount = 0.01  # entropy bonus
    max_grad_norm: Above = 10.0  # of each network
    # Evaluation and checkpoints (every: environment steps, 0 for never)
    eval_every: Count = 160_000  # evaluations on the way
    eval_episodes: Positive = 2  # per co-player, in those
    final_episodes: Count = 50  # per co-player, at the end and with --eval-only
    background: tuple[str, ...] = ("random",)  # co-players; also run directories
    num_focal: Count = 0  # seats that we take beside them; 0: N - 1
    eval_ids: Literal["random", "slot"] = "random"  # agent ids of a seat (Eq. 2: random)
    eval_scenarios: str = "all"  # Melting Pot's, beside bots: all, none or e.g. SC0,SC3
    bots: Literal["auto", "official", "scripted"] = "auto"  # auto: official where they can be had
    save_every: Count = 160_000  # checkpoints; the last two are kept
    # System
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    num_threads: Positive = 1  # torch's; on a busy machine more is slower
    pixels: bool = False  # plain convolutions on images: the same results, slower
    amp: bool = False  # critic in bf16


def validate(args: Args) -> None:
    """Raise UsageError for combinations that cannot be meant."""
    chunks = args.rollout_steps // args.chunk_length * args.num_envs
    for wrong, sentence in (
        (args.resume and args.eval_only, "--resume and --eval-only exclude each other"),
        (args.resume and args.run_dir, "--resume goes on in its own directory, without --run-dir"),
        (args.eval_only and not args.final_episodes, "--eval-only needs --final-episodes"),
        (args.rollout_steps % args.chunk_length, "--chunk-length must divide --rollout-steps"),
        (args.minibatches > chunks, f"--minibatches exceeds the {chunks} chunks of a rollout"),
    ):
        if wrong:
            raise UsageError(f"{sentence}.")


LINE = ("episode/return", "entropy", "sps")  # scalars on standard output, without a terminal
RESUMABLE = (  # what may differ from the run's own arguments with --resume and --eval-only
    *("total_timesteps", "run_dir", "resume", "eval_only", "track", "wandb_project", "wandb_mode"),
    *("wandb_timeout", "capture_video", "num_workers", "worker_timeout", "eval_every"),
    *("eval_episodes", "final_episodes", "background", "num_focal", "eval_ids", "eval_scenarios"),
    *("bots", "save_every", "device", "num_threads", "pixels", "amp"),
)

# [shared] begin


class RunError(Exception):
    """The run cannot go on; the message is one sentence."""

    code = 1  # the script's exit code


class UsageError(RunError):
    """The command line asks for what cannot be done."""

    code = 2


def parse(argv: list[str]) -> Any:
    """tyro, then pydantic for the bounds in annotations; their errors as one sentence."""
    box, flags = io.StringIO(), (tyro.conf.FlagCreatePairsOff,)
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(Args, args=argv, config=flags)
        pydantic.TypeAdapter(Args).validate_python(dataclasses.asdict(args))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        flag = str(wrong["loc"][0]).replace("_", "-")
        raise UsageError(f"--{flag} {wrong['input']}: {wrong['msg'].lower()}.") from None
    except SystemExit as error:
        if not error.code:
            raise
        lines = " ".join(line.strip("│ ") for line in box.getvalue().splitlines()[1:])
        sentence, _, rest = lines.partition(" ──")
        near = re.search(r"--[a-z-]+", rest) if "Unrecognized" in sentence else None
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(sentence.removeprefix("Error parsing ").rstrip(".") + hint) from None
    validate(args)
    return args


def read_args(argv: list[str]) -> Any:
    """The command line; with --resume or --eval-only on top of the run's own arguments."""
    args = parse(argv)
    if source := args.resume or args.eval_only:
        saved, script = load_checkpoint(source, quiet=True)[0], Path(__file__).stem
        if saved["script"] != script:
            raise UsageError(f"{source} is a run of {saved['script']}.py, not of {script}.py.")
        own, given = saved["args"], vars(args)
        if changed := (own.keys() ^ given.keys()) - set(RESUMABLE):
            raise UsageError(f"{source} is of a version that differs in {', '.join(changed)}.")
        names = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv}
        names |= {name.removeprefix("no_") for name in names}
        for name in names & set(own) - set(RESUMABLE):
            if given[name] != own[name]:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is {own[name]} in {source} and stays so.")
        own = {k: tuple(x) if isinstance(x, list) else x for k, x in own.items() if k in given}
        typed = {name: given[name] for name in names & set(own)}
        fresh = {"run_dir": "", "resume": "", "eval_only": ""}
        args = dataclasses.replace(args, **own | fresh | typed)
        validate(args)
    return args


# [shared] end


# --- 3. Worlds ------------------------------------------------------------------------------------


def make_envs(args: Args, num_envs: int, seed: int, first_world: int = 0) -> Any:
    """num_envs worlds of args.substrate; UsageError if it cannot be had here."""
    options = {"first_world": first_world, "max_episode_steps": args.max_episode_steps}
    if args.substrate == "toy":
        from envs.meltingpot.toy import TileGame

        return TileGame(num_envs, seed, **options)
    from envs.meltingpot.worlds import MeltingPot

    options |= {"num_workers": args.num_workers, "timeout": args.worker_timeout}
    try:
        return MeltingPot(args.substrate, num_envs, seed, **options)
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from None


# --- 4. Networks ----------------------------------------------------------------------------------

KERNEL = 4  # of the second convolution, in tiles
RELU = math.sqrt(2)  # gain of layers before a ReLU


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """Orthogonal weights and zero biases."""
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.orthogonal_(parameter, gain)
    return layer


class TileCNN(nn.Module):
    """The paper's CNN and the layer after it (App. B.2), with ReLU: convolutions of 16 channels,
    kernel 8, stride 8 and of 32 channels, kernel 4, stride 1, and a linear layer of 64 units.

    It reads tile ids. As all images consist of 8x8 sprites, each layer has few different inputs
    and becomes a table: computed once, then looked up (envs/meltingpot/tile_tensors.py). Weights,
    outputs and gradients are those of convolutions on the pixels (--pixels).
    """

    def __init__(self, grid: tuple[int, int], pixels: bool):
        super().__init__()
        h, w = (max(size, KERNEL) for size in grid)  # black tiles beside views narrower than KERNEL
        self.padding, self.pixels = (0, w - grid[1], 0, h - grid[0]), pixels
        positions = (h - KERNEL + 1) * (w - KERNEL + 1)
        self.conv1 = orthogonal(nn.Conv2d(3, 16, 8, stride=8), RELU)
        self.conv2 = orthogonal(nn.Conv2d(16, 32, KERNEL), RELU)
        self.linear = orthogonal(nn.Linear(positions * 32, 64), RELU)  # position by position

    def forward(self, ids: Tensor, sprites: Tensor) -> Tensor:  # (M, H, W), (P, 3, 8, 8) -> (M, 64)
        ids = F.pad(ids.long(), self.padding)
        if self.pixels:
            images = (
                sprites[ids].permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            )  # (M, 3, 8H, 8W)
            x = F.relu(self.conv2(F.relu(self.conv1(images))))
            return F.relu(self.linear(x.flatten(2).transpose(1, 2).flatten(1)))
        windows = Windows(ids, KERNEL)
        x = F.relu(self.conv1(sprites)).flatten(1)  # (P, 16), a row per sprite
        x = x.index_select(0, windows.ids.flatten()).view(len(windows.ids), -1)
        kernel = self.conv2.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.relu(F.linear(x, kernel, self.conv2.bias))  # (U, 32), a row per window
        x = windows.linear(x, self.linear.weight)  # (D, 64), a row per position and window
        return F.relu(windows.sum(x) + self.linear.bias)


class RecurrentNet(nn.Module):
    """CNN -> MLP 2 x 64 -> GRU 128 over the MLP's output and features -> MLP 64 (App. B.2).

    An actor has one row per view, and its agent id among the features. The critic sees a world
    once and has a row for each of its agents, whose ids it adds itself.
    """

    def __init__(self, grid, features: int, outputs: int, gain: float, rows=1, pixels=False):
        super().__init__()
        units, self.hidden_size = 64, 128
        self.rows = rows  # of the critic: N
        self.cnn = TileCNN(grid, pixels)
        self.mlp = orthogonal(nn.Linear(units, units), RELU)
        self.norm = nn.LayerNorm(features)  # observation normalisation (App. B.1)
        inputs = units + features + (rows if rows > 1 else 0)
        self.gru = orthogonal(nn.GRU(inputs, self.hidden_size), 1.0)
        self.head = orthogonal(nn.Linear(self.hidden_size, units), RELU)
        self.out = orthogonal(nn.Linear(units, outputs), gain)

    def forward(self, ids, features, starts, hidden, sprites) -> tuple[Tensor, Tensor]:
        """Views ids (T, B, N, H, W), features (T, B, N, F), starts (T, B) bool: an episode begins,
        hidden (B, N, S) before the first step; critic: ids (T, B, H', W'), features (T, B, F)
        -> outputs (T, B, N, .) and the states after each step (T, B, N, S)."""
        x = F.relu(self.mlp(self.cnn(ids.flatten(0, -3), sprites)))
        x = torch.cat([x.view(*features.shape[:-1], -1), self.norm(features).to(x.dtype)], -1)
        steps, worlds, agents = len(x), *hidden.shape[:2]
        if self.rows > 1:
            one_hot = torch.eye(agents, dtype=x.dtype, device=x.device)
            one_hot = one_hot.expand(steps, worlds, -1, -1)
            x = torch.cat([x[:, :, None].expand(-1, -1, agents, -1), one_hot], -1)
        # The GRU runs without a break between steps at which some world begins an episode.
        cuts, states = sorted({0, steps, *starts.any(1).nonzero()[:, 0].tolist()}), []
        for first, last in itertools.pairwise(cuts):
            hidden = (hidden * ~starts[first, :, None, None]).to(x.dtype)
            part, _ = self.gru(x[first:last].flatten(1, 2), hidden.flatten(0, 1)[None])
            states.append(part.unflatten(1, (worlds, agents)))
            hidden = states[-1][-1]
        states = torch.cat(states)
        outputs = self.out(F.relu(self.head(states)))
        return outputs.to(self.out.weight.dtype), states.to(self.out.weight.dtype)


def sample(log_probs: Tensor, rng: torch.Generator) -> Tensor:
    """Actions (B, N) from log-probabilities (B, N, A): the largest after adding Gumbel noise, drawn
    once per agent and action whatever the policy."""
    gumbel = -torch.empty(log_probs.shape).exponential_(generator=rng).log()
    return (log_probs + gumbel.to(log_probs.device)).argmax(-1)


# paper is silent: value normalisation, orthogonal weights, ReLU; as in MAPPO
class ValueNorm(nn.Module):
    """Mean and deviation of returns by exponential averages, beta .99999, debiased, as in MAPPO."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of 1, x, x^2

    def update(self, new: Tensor) -> None:  # (3,): 1, mean and mean square of new returns
        self.sums.lerp_(new, 1 - 0.99999)

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """0 and 1 before the first update."""
        weight, mean, square = self.sums if self.sums[0] > 0 else self.sums.new_tensor([1, 0, 1])
        variance = square / weight - (mean / weight) ** 2
        return (mean / weight).float(), variance.clamp(min=1e-2).sqrt().float()


class Agent:
    """The networks and their optimisers."""

    def __init__(self, args: Args, spec, device: torch.device):
        self.args, self.spec, self.device = args, spec, device
        torch.manual_seed(args.seed)
        self.actor = self.new_actor()
        joint = spec.num_agents * (spec.num_features + spec.num_actions)
        shape = (spec.world_grid, joint, 1, 1.0, spec.num_agents)
        self.critic = RecurrentNet(*shape, pixels=args.pixels).to(device)
        self.value_norm = ValueNorm().to(device)
        adam, eps = torch.optim.Adam, args.adam_eps
        self.actor_optimiser = adam(self.actor.parameters(), args.actor_lr, eps=eps)
        self.critic_optimiser = adam(self.critic.parameters(), args.critic_lr, eps=eps)

    def new_actor(self) -> RecurrentNet:
        spec, features = self.spec, self.spec.num_features + self.spec.num_agents
        net = RecurrentNet(spec.grid, features, spec.num_actions, 0.01, 1, self.args.pixels)
        return net.to(self.device)

    def autocast(self) -> torch.autocast:
        """--amp is for the critic: in policies bf16 would blur the ratio of Eq. (9)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}


# --- 6. Data --------------------------------------------------------------------------------------


def new_carry(agent: Agent, num_envs: int) -> dict[str, Tensor]:
    """What passes from one rollout to the next: here, the beginning of episodes in all worlds."""
    shape = (num_envs, agent.spec.num_agents)
    carry = {
        "starts": torch.ones(num_envs, dtype=torch.bool),  # (B,), an episode is about to begin
        "previous": torch.full(shape, -1),  # (B, N), last actions; -1: none yet
        # (B, N, S):
        "actor_hidden": torch.zeros(*shape, agent.actor.hidden_size),
        "critic_hidden": torch.zeros(*shape, agent.critic.hidden_size),
    }
    return {name: x.to(agent.device) for name, x in carry.items()}


@dataclasses.dataclass
class Batch:
    """One rollout. T + 1: with the step after it, for bootstrapping."""

    tile_ids: Tensor  # (T, B, N, H, W) uint16, the views
    actor_features: Tensor  # (T, B, N, F + N) float32, with agent ids
    world_ids: Tensor  # (T + 1, B, H', W') uint16, the global views
    critic_features: Tensor  # (T + 1, B, N * (F + A)) float32, of all agents
    starts: Tensor  # (T + 1, B) bool, an episode's first step
    actions: Tensor  # (T, B, N) int64
    log_probs: Tensor  # (T, B, N) float32, of the actions under the policy that acted
    rewards: Tensor  # (T, B, N) float32
    terminated: Tensor  # (T, B) bool
    truncated: Tensor  # (T, B) bool
    actor_hidden: Tensor  # (C, B, N, S) before each chunk
    finals: list  # where truncated: t, b, last world_ids (H', W') and critic_features (N * (F + A))
    episodes: list  # envs.meltingpot.tiles.Episode, those that ended
    critic_hidden: Tensor | None = None  # (C, B, N, S); this and the rest is set by update()
    values: Tensor | None = None  # (T, B, N) float32
    advantages: Tensor | None = None  # (T, B, N) float32
    targets: Tensor | None = None  # (T, B, N) float32, returns


def minibatches(args: Args, batch: Batch, rng: torch.Generator) -> Iterator[Batch]:
    """One epoch: all pairs of a chunk and a world with all its agents, shuffled and dealt out.
    (T, B, ...) becomes (L, M, ...), hidden (C, B, N, S) becomes (M, N, S)."""
    # paper is silent: how a rollout is cut for recurrent networks
    chunks, worlds, length = *batch.actor_hidden.shape[:2], args.chunk_length
    for pairs in torch.randperm(chunks * worlds, generator=rng).tensor_split(args.minibatches):
        chunk, world = pairs // worlds, pairs % worlds
        parts = {}
        for name, x in vars(batch).items():
            if name.endswith("hidden"):
                parts[name] = x[chunk, world] if x is not None else None
            elif isinstance(x, Tensor):
                x = x[: chunks * length].unflatten(0, (chunks, length))
                parts[name] = x[chunk, :, world].transpose(0, 1)
        yield dataclasses.replace(batch, **parts)


def observe(obs, device, ids=None, num_ids=None) -> tuple[Tensor, ...]:
    """Views, features with one-hot agent ids (B, N), by default the seats -> (B, N, F + N), global
    views and plain features. A scenario has fewer seats than there are ids."""
    tile_ids, world_ids, features = (torch.from_numpy(x).to(device) for x in obs)
    one_hot = torch.eye(num_ids or features.shape[1], device=device)
    ids = one_hot.expand(len(features), -1, -1) if ids is None else one_hot[ids]
    return tile_ids, torch.cat([features, ids], -1), world_ids, features


def joint_features(features: Tensor, previous: Tensor, num_actions: int) -> Tensor:
    """For the critic: all agents' features (B, N, F) and previous actions (B, N), -1 for none
    -> (B, N * (F + A))."""
    # paper is silent: which actions the critic sees
    actions = F.one_hot(previous + 1, num_actions + 1)[..., 1:]
    return torch.cat([features, actions.to(features.dtype)], -1).flatten(-2)


@torch.no_grad()
def act(net: RecurrentNet, tile_ids, features, starts, hidden, sprites) -> tuple[Tensor, Tensor]:
    """One step -> log-probabilities (B, N, A) and the next hidden (B, N, S)."""
    logits, states = net(tile_ids[None], features[None], starts[None], hidden, sprites())
    return logits[0].log_softmax(-1), states[0]


def collect(args: Args, envs, agent: Agent, carry, sprites, rng) -> Batch:
    """Play T steps in every world."""
    device, shape, num_actions = agent.device, carry["previous"].shape, envs.spec.num_actions
    record, finals, episodes = collections.defaultdict(list), [], []

    def add(**tensors: Tensor) -> None:
        for name, x in tensors.items():
            record[name].append(x)

    for t in range(args.rollout_steps + 1):
        starts = carry["starts"]
        tile_ids, seen, world_ids, features = observe(envs.obs, device)
        joint = joint_features(features, carry["previous"], num_actions)
        add(world_ids=world_ids, critic_features=joint, starts=starts)
        if t == args.rollout_steps:
            break
        if t % args.chunk_length == 0:
            add(actor_hidden=carry["actor_hidden"])
        view = (tile_ids, seen, starts)
        acting, carry["actor_hidden"] = act(agent.actor, *view, carry["actor_hidden"], sprites)
        actions = sample(acting, rng)
        log_probs = acting.gather(-1, actions[..., None])[..., 0]
        add(tile_ids=tile_ids, actor_features=seen, actions=actions, log_probs=log_probs)

        step = envs.step(actions.cpu().numpy())
        rewards, terminated, truncated = (torch.from_numpy(x).to(device) for x in step[1:4])
        rewards = rewards.sum(1, keepdim=True).expand(shape) if args.team_reward else rewards
        add(rewards=rewards.float(), terminated=terminated, truncated=truncated)
        if step.truncated.any():  # keep what the ended episodes would have gone on from
            _, _, world_ids, features = observe(step.final, device)
            joint = joint_features(features, actions, num_actions)
            finals += [(t, b, world_ids[b], joint[b]) for b in np.flatnonzero(step.truncated)]
        episodes += step.episodes
        carry["starts"] = ended = terminated | truncated
        carry["previous"] = actions.masked_fill(ended[:, None], -1)
    tensors = {name: torch.stack(x) for name, x in record.items()}
    return Batch(**tensors, finals=finals, episodes=episodes)


@torch.no_grad()
def replay(net: RecurrentNet, views, hidden: Tensor, length: int, sprites) -> tuple[Tensor, ...]:
    """Run net over a rollout, chunk by chunk -> outputs (T, B, N, .), states before each chunk
    (C, B, N, S) and after each step (T, B, N, S)."""
    outputs, before, after = [], [], []
    for chunk in zip(*(x.split(length) for x in views)):
        before.append(hidden)
        output, states = net(*chunk, hidden, sprites())
        outputs.append(output)
        after.append(states)
        hidden = states[-1]
    return torch.cat(outputs), torch.stack(before), torch.cat(after)


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda) -> Tensor:
    """Generalised advantages (T, B, N), in raw units. next_values: of the state after each step,
    which at a truncation is the ended episode's last, not the next one's first."""
    terminated, truncated = terminated[..., None], truncated[..., None]
    delta = rewards + gamma * next_values * ~terminated - values
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + gamma * gae_lambda * running * ~(terminated[t] | truncated[t])
        advantages[t] = running
    return advantages


@torch.no_grad()
def estimate(args: Args, agent: Agent, batch: Batch, carry, sprites) -> tuple[Tensor, Tensor]:
    """Values and advantages (T, B, N) in raw units; batch and carry get the critic's states."""
    views, hidden = (batch.world_ids, batch.critic_features, batch.starts), carry["critic_hidden"]
    mean, std = agent.value_norm.mean_std()
    with agent.autocast():
        outputs, before, after = replay(agent.critic, views, hidden, args.chunk_length, sprites)
        values = outputs[..., 0] * std + mean  # (T + 1, B, N)
        next_values = values[1:].clone()
        goes_on = torch.zeros(1, 1, dtype=torch.bool, device=values.device)
        for t, b, world_ids, joint in batch.finals:
            view = (world_ids[None, None], joint[None, None], goes_on)
            output, _ = agent.critic(*view, after[t, b, None], sprites())
            next_values[t, b] = output[0, 0, :, 0] * std + mean
    batch.critic_hidden, carry["critic_hidden"] = before[:-1], before[-1]  # the last: before step T
    ends = (batch.terminated, batch.truncated, args.gamma, args.gae_lambda)
    return values[:-1], gae(batch.rewards, values[:-1], next_values, *ends)


# --- 7. Update ------------------------------------------------------------------------------------
# [shared] begin


def start_processes(args: Any) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device; joins torchrun's process group where there is one."""
    torch.set_num_threads(args.num_threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here.")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # The others wait while the first evaluates; who is dead, torchrun finds out.
        patience = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    return rank, size, device


def sum_over_processes(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def moments(x: Tensor) -> Tensor:
    """1, mean and mean square over all processes -> (3,) float64."""
    x = x.double()
    sums = sum_over_processes(torch.stack([torch.ones_like(x).sum(), x.sum(), (x * x).sum()]))
    return sums / sums[0]


def descend(loss: Tensor, net: nn.Module, optimiser, max_norm: float) -> Tensor:
    """A step on gradients averaged over processes, then clipped; returns their norm before that."""
    optimiser.zero_grad()
    loss.backward()
    parameters = [p for p in net.parameters() if p.grad is not None]
    if dist.is_initialized():  # one flat all-reduce
        flat = sum_over_processes(torch.cat([p.grad.flatten() for p in parameters]))
        parts = (flat / dist.get_world_size()).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts):
            p.grad.copy_(part.view_as(p))
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    optimiser.step()
    return norm


# [shared] end


def clip_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Element by element; ratio: of pi_theta to the policy that acted."""
    # Eq. (9), Sec. 4.5
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_loss(value: Tensor, old: Tensor, target: Tensor, clip: float, delta: float) -> Tensor:
    """Clipped Huber loss, element by element, in normalised units."""
    clipped = old + (value - old).clamp(-clip, clip)  # paper is silent: clipped as in MAPPO
    losses = (F.huber_loss(x, target, reduction="none", delta=delta) for x in (value, clipped))
    return torch.max(*losses)


def update(args: Args, agent: Agent, batch: Batch, carry, sprites, rng, alive) -> dict[str, Tensor]:
    """PPO epochs over one rollout; alive() is called before each minibatch. Returns scalars."""
    values, advantages = estimate(args, agent, batch, carry, sprites)
    # paper is silent: statistics of returns and advantages, once before the epochs
    agent.value_norm.update(moments(values + advantages))
    mean, std = agent.value_norm.mean_std()
    batch.values, batch.targets = (values - mean) / std, (values + advantages - mean) / std
    _, mean, square = moments(advantages).float()
    batch.advantages = (advantages - mean) / ((square - mean**2).clamp(min=0).sqrt() + 1e-5)
    check_finite(rewards=batch.rewards, features=batch.critic_features, advantages=advantages)
    scalars = collections.defaultdict(list)
    epochs = (minibatches(args, batch, rng) for _ in range(args.epochs))
    for part in itertools.chain.from_iterable(epochs):
        alive()
        view = (part.tile_ids, part.actor_features, part.starts, part.actor_hidden)
        log_probs = agent.actor(*view, sprites())[0].log_softmax(-1)
        log_prob = log_probs.gather(-1, part.actions[..., None])[..., 0]
        ratio = (log_prob - part.log_probs).exp()
        objective = clip_objective(ratio, part.advantages, args.clip)
        policy_loss = -objective.mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        loss = policy_loss - args.entropy_coef * entropy
        actor_norm = descend(loss, agent.actor, agent.actor_optimiser, args.max_grad_norm)

        with agent.autocast():
            view = (part.world_ids, part.critic_features, part.starts, part.critic_hidden)
            value = agent.critic(*view, sprites())[0][..., 0]
        losses = value_loss(value, part.values, part.targets, args.value_clip, args.huber_delta)
        loss = losses.mean()
        critic_norm = descend(loss, agent.critic, agent.critic_optimiser, args.max_grad_norm)

        now = {"policy_loss": policy_loss, "value_loss": loss, "entropy": entropy}
        now |= {"actor_grad_norm": actor_norm, "critic_grad_norm": critic_norm}
        for name, x in now.items():
            scalars[name].append(x.detach())
    scalars = {name: torch.stack(x).mean() for name, x in scalars.items()}
    check_finite(**{name: scalars[name] for name in ("policy_loss", "value_loss", "entropy")})
    return scalars


# --- 8. Evaluate ----------------------------------------------------------------------------------


def net_player(net: RecurrentNet, sprites: Sprites, num_ids: int, seed: int) -> Player:
    """A network as a player for envs.meltingpot.episodes: sampled actions, a memory of its own."""
    rng, hidden = torch.Generator().manual_seed(seed), None

    def play(obs, starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        nonlocal hidden
        starts, ids = (torch.from_numpy(x).to(sprites.device) for x in (starts, ids))
        if hidden is None:
            hidden = torch.zeros(*ids.shape, net.hidden_size, device=sprites.device)
        tile_ids, features, _, _ = observe(obs, sprites.device, ids, num_ids)
        log_probs, hidden = act(net, tile_ids, features, starts, hidden, sprites)
        return sample(log_probs, rng).cpu().numpy()

    return play


def load_background(args: Args, agent: Agent) -> dict[str, RecurrentNet]:
    """The networks of the run directories and checkpoints among --background."""
    if args.num_focal >= agent.spec.num_agents > 1:
        seats = f"--num-focal {args.num_focal} of {agent.spec.num_agents} seats"
        raise UsageError(f"{seats} leaves none to a co-player.")
    others = {}
    for path in set(args.background) - {"random"}:
        saved, _ = load_checkpoint(path)
        if saved["args"]["substrate"] != args.substrate:
            raise UsageError(f"{path} was not trained on {args.substrate}.")
        others[path] = agent.new_actor()
        restore({"actor": others[path]}, saved["agent"], path)
    return others


# [shared: meltingpot] begin


def find_scenarios(args: Any) -> tuple[list[str], Any]:
    """The scenarios of --eval-scenarios and the kind of bots in them; UsageError if there are none
    of that name, or no such bots."""
    if args.eval_scenarios == "none" or args.substrate == "toy":
        if args.eval_scenarios not in ("all", "none"):
            raise UsageError("--eval-scenarios: the toy has none.")
        return [], None
    from envs.meltingpot.scenarios import choose_bots, choose_scenarios, get_plan

    try:
        names = choose_scenarios(args.substrate, args.eval_scenarios, args.bots)
        return names, choose_bots([get_plan(name) for name in names], args.bots) if names else None
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from None


def announce_scenarios(args: Any, rank: int) -> Any:
    """Print in which scenarios which kind of bots will play; returns the kind."""
    names, bots = find_scenarios(args)
    if names and rank == 0:
        tqdm.write(f"{bots} bots will play in {', '.join(names)}")
    return bots


def play_scenarios(args: Any, agent: Any, alive, kind: str, timesteps: int, run_dir: Path, rng):
    """Our actor beside the bots of each scenario -> {"SC0 scripted":
    envs.meltingpot.episodes.summarise()}; every episode goes to RUN_DIR/evaluation."""
    names, bots = find_scenarios(args)
    if not names:
        return {}
    from envs.meltingpot.scenarios import play_scenarios, save_results

    def new_player(envs) -> Player:
        sprites, seed = Sprites(envs, agent.device), int(rng.integers(2**31))
        return net_player(agent.actor, sprites, agent.spec.num_agents, seed)

    episodes = args.final_episodes if kind == "final" else args.eval_episodes
    options = {"num_workers": args.num_workers, "timeout": args.worker_timeout, "alive": alive}
    options |= {"videos": run_dir / "videos" if args.capture_video else None}
    options |= {"stem": f"{kind}-{timesteps}", "shuffle_ids": args.eval_ids == "random"}
    how = (episodes, args.num_envs, rng, agent.spec.num_agents)
    played = play_scenarios(names, bots, new_player, *how, **options)
    about = (kind, args.substrate, args.seed, timesteps)
    with writing(run_dir / "evaluation"):
        save_results(run_dir / "evaluation", *about, played)
    return {row: summarise(results) for row, results in played.items()}


# [shared: meltingpot] end


def evaluate(
    args: Args, agent: Agent, others: dict, alive, kind: str, timesteps: int, run_dir: Path
) -> dict[str, dict[str, float]]:
    """Full natural episodes without learning: everyone ours, then beside each of --background,
    then beside the bots of each of --eval-scenarios.

    kind: "eval" on the way or "final", which plays other episodes; alive() is called now and then.
    Prints a table and returns {"v co-player": envs.meltingpot.episodes.summarise(...)}.
    """
    args = dataclasses.replace(args, max_episode_steps=0)
    episodes = args.final_episodes if kind == "final" else args.eval_episodes
    rng = np.random.default_rng((args.seed, timesteps, ("eval", "final").index(kind)))
    with make_envs(args, min(args.num_envs, episodes), int(rng.integers(2**31))) as envs:
        sprites = Sprites(envs, agent.device)
        ids = agent.spec.num_agents
        player = lambda net: net_player(net, sprites, ids, int(rng.integers(2**31)))  # noqa: E731
        pairs = {"self-play": (player(agent.actor), None)}
        for name in args.background:
            if name == "random":
                them = random_player(envs.spec.num_actions, rng)
                pairs["random v random"] = (them, them)
            else:
                them = player(others[name])
            pairs[f"v {name}"] = (player(agent.actor), them)
        seats = args.num_focal or max(1, envs.spec.num_agents - 1)
        shuffle = args.eval_ids == "random"
        videos = run_dir / "videos" if args.capture_video else None
        film = (videos, f"{kind}-{timesteps}")
        results = play_pairs(envs, pairs, seats, episodes, rng, shuffle, *film, alive)
    results |= play_scenarios(args, agent, alive, kind, timesteps, run_dir, rng)
    tqdm.write(f"{args.substrate}, seed {args.seed}, step {timesteps}\n{table(results)}")
    return results


# --- 9. Plumbing ----------------------------------------------------------------------------------
# [shared] begin


def check_finite(**tensors: Tensor) -> None:
    """End the run, in all processes, at the first tensor with NaN or infinity, and name it."""
    for name, x in tensors.items():
        if sum_over_processes((~torch.isfinite(x)).sum()):
            raise RunError(f"{name} is not finite; the last checkpoint is from before.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """End the run with one sentence if this cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from None


def write(path: Path, data: bytes) -> None:
    """Replace a file by one that is whole, or leave it as it was."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def read_intact(run_dir: Path, entry: dict[str, Any]) -> bytes:
    """A checkpoint of the index; nothing if it is not what was written."""
    path = run_dir / entry["name"]
    data = path.read_bytes() if path.exists() else b""
    return data if hashlib.sha256(data).hexdigest() == entry["sha256"] else b""


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, then the index that names the last two intact, then delete the rest."""
    buffer, index = io.BytesIO(), run_dir / "checkpoints.json"
    torch.save(state, buffer)
    name, sha256 = f"checkpoint-{state['timesteps']}.pt", hashlib.sha256(buffer.getvalue())
    entry = {"name": name, "timesteps": state["timesteps"], "sha256": sha256.hexdigest()}
    known = json.loads(index.read_text()) if index.exists() else []
    if known and known[0]["name"] == name and read_intact(run_dir, known[0]):
        return  # saved already
    others = (old for old in known if old["name"] != name and read_intact(run_dir, old))
    known = [entry, *itertools.islice(others, 1)]
    write(run_dir / name, buffer.getvalue())
    write(index, json.dumps(known, indent=1).encode())
    for path in set(run_dir.glob("checkpoint-*.pt")) - {run_dir / old["name"] for old in known}:
        path.unlink()


def load_checkpoint(path: str, quiet: bool = False) -> tuple[dict[str, Any], Path]:
    """The newest intact state of a run directory, or that of one file, and the directory."""
    file = Path(path)
    run_dir = file if file.is_dir() else file.parent
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        for entry in json.loads((run_dir / "checkpoints.json").read_text()):
            part = run_dir / entry["name"]
            if file in (run_dir, part):
                if data := read_intact(run_dir, entry):
                    return torch.load(io.BytesIO(data), "cpu", weights_only=True), run_dir
                if not quiet:
                    print(f"{part} is damaged: its sha256 differs.", file=sys.stderr)
    raise UsageError(f"{path} holds no intact checkpoint.")


def restore(parts: dict[str, Any], states: dict[str, Any], source: str) -> None:
    """Give networks and optimisers their states; UsageError if these do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (KeyError, ValueError, RuntimeError):
        raise UsageError(f"{source} does not fit: its networks have other shapes.") from None


class Logger:
    """Scalars to metrics.jsonl, TensorBoard and, with --track, Weights & Biases."""

    def __init__(self, args: Any, run_dir: Path, timesteps: int):
        self.dir, self.wandb = run_dir, start_wandb(args, run_dir) if args.track else None
        self.path, self.terminal = run_dir / "metrics.jsonl", sys.stderr.isatty()
        if timesteps and self.path.exists():  # what came after the checkpoint happens again
            kept = (line for line in self.path.read_bytes().splitlines(True) if line[-1:] == b"\n")
            kept = [line for line in kept if json.loads(line)["timesteps"] <= timesteps]
            write(self.path, b"".join(kept))
        self.board = SummaryWriter(run_dir, purge_step=timesteps + 1)

    def log(self, timesteps: int, scalars: dict[str, float], media: Any = None) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"timesteps": timesteps, **scalars}) + "\n")
        line = [f"{name} {scalars[name]:.4g}" for name in LINE if name in scalars]
        if line and not self.terminal:
            print(f"step {timesteps}  " + "  ".join(line), flush=True)
        with writing(self.dir):
            for name, x in scalars.items():
                self.board.add_scalar(name, x, timesteps)
        if self.wandb:
            self.wandb.log({"timesteps": timesteps, **scalars, **(media or {})})

    def log_results(self, timesteps: int, kind: str, results: dict[str, dict]) -> None:
        """An evaluation, kind "eval" or "final": its figures; to wandb table and videos, too."""
        media = {}
        if self.wandb:  # no wandb.Table: to log one asks the server, and waits
            media[f"{kind}/table"] = wandb.Html(f"<pre>{table(results)}</pre>")
            for path in (self.dir / "videos").glob(f"{kind}-{timesteps}-*.mp4"):
                media[f"video/{path.stem}"] = wandb.Video(str(path), format="mp4")
        flat = {f"{kind}/{k}/{name}": x for k, row in results.items() for name, x in row.items()}
        self.log(timesteps, flat, media)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(args: Any, run_dir: Path) -> Any:
    """A wandb run; offline if its server does not answer in time."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry outwaits every timeout
    limit, url = args.wandb_timeout, os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    settings = {"console": "off", "silent": True, "init_timeout": limit, "finish_timeout": limit}
    options = {"project": args.wandb_project, "name": run_dir.name, "id": run_dir.name}
    options |= {"config": dataclasses.asdict(args), "dir": run_dir, "settings": settings}
    try:
        if args.wandb_mode == "online":
            with contextlib.suppress(urllib.error.HTTPError):  # an error, too, is an answer
                urllib.request.urlopen(url, timeout=limit).close()
        run = wandb.init(mode=args.wandb_mode, resume="allow", **options)
    except (OSError, ValueError, http.client.HTTPException, wandb.Error) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        print(f"wandb at {url}: {reason}; logging offline, for `wandb sync`.", file=sys.stderr)
        wandb.teardown()  # the service holds the run's name
        run = wandb.init(mode="offline", **options)
    run.define_metric("*", step_metric="timesteps")
    return run


def new_run_dir(args: Any, world: str, **resolved: Any) -> Path:
    """The run's directory with its args.json; resolved: what defaults have come to mean."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{world}__{Path(__file__).stem}__s{args.seed}__{when}__{secrets.token_hex(2)}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir} cannot be made: {error.strerror}.") from None
    if (run_dir / "checkpoints.json").exists():
        raise UsageError(f"{run_dir} holds a run already: --resume it, or name another.")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    about = {"script": Path(__file__).stem, "resolved": resolved, "commit": ""}
    with contextlib.suppress(OSError):  # no git
        about["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about["packages"] = {d.metadata["Name"]: d.version for d in distributions()}
    write(run_dir / "args.json", json.dumps(dataclasses.asdict(args) | about, indent=1).encode())
    return run_dir


def leave(code: int) -> None:
    """Exit; at once under torchrun, where gloo's threads sometimes crash the interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        if code == 0:  # else others may still be waiting for us
            dist.destroy_process_group()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def stop_signals(wanted: list[int]) -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM append to the list; a second one of them does what it always does, and
    after a call of what this yields the first does, too."""

    def handler(number: int, frame: Any) -> None:
        wanted.append(number)
        signal.signal(number, old[number])

    def restore() -> None:
        for number in old:
            signal.signal(number, old[number])

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield restore
    finally:
        restore()


def progress_bar(timesteps: int, total: int, rank: int) -> tqdm:
    """A bar of environment steps, of the first process and only on a terminal."""
    return tqdm(total=total, initial=timesteps, unit=" steps", disable=True if rank else None)


def is_due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies between two numbers of environment steps; never if 0."""
    return every > 0 and now // every > before // every


# [shared] end


# --- 10. Train ------------------------------------------------------------------------------------


def report(batch: Batch, scalars: dict[str, Tensor], times: list[float], size: int) -> dict:
    """What an iteration logs; times: when the run and it began, had collected, had learnt."""
    scalars["reward_per_1000/all"] = 1000 * batch.rewards.mean()
    start, began, collected, learnt = times
    seconds = {"collect_s": collected - began, "learn_s": learnt - collected}
    seconds["wall_s"] = learnt - start
    floats = {name: float(x) for name, x in scalars.items()} | count_episodes(batch.episodes)
    return floats | seconds | {"sps": size * batch.terminated.numel() / (learnt - began)}


def new_generators(seed: int, rank: int) -> dict[str, torch.Generator]:
    """A process's own."""
    seed = np.random.SeedSequence((seed, rank)).generate_state(2).tolist()[0]
    return {"rng": torch.Generator().manual_seed(seed)}


def pack(args: Args, agent: Agent, envs, carry, rngs, size: int) -> dict[str, Any]:
    """What a checkpoint holds of all processes; RunError if a weight is not finite."""
    for name, part in agent.parts().items():
        if isinstance(part, nn.Module):
            check_finite(**{f"{name}.{key}": x for key, x in part.state_dict().items()})
    own = {name: rng.get_state() for name, rng in rngs.items()}
    own |= {"carry": {name: x.cpu() for name, x in carry.items()}, "envs": envs.state_dict()}
    ranks = [own] * size
    if size > 1:
        dist.all_gather_object(ranks, own)
    parts = {name: part.state_dict() for name, part in agent.parts().items()}
    about = {"script": Path(__file__).stem, "args": dataclasses.asdict(args)}
    return about | {"agent": parts, "ranks": ranks}


def unpack(ranks: list, rank: int, size: int, envs, carry, rngs) -> dict[str, Tensor]:
    """Put worlds and generators where a process's checkpoint left them; returns its carry."""
    if len(ranks) != size:
        raise UsageError(f"{len(ranks)} processes began this run; {size} cannot go on with it.")
    own = ranks[rank]
    for name, rng in rngs.items():
        rng.set_state(own[name])
    envs.load_state_dict(own["envs"])
    if not envs.reproducible:  # all worlds have begun new episodes, as carry says
        return carry
    return {name: own["carry"][name].to(x.device) for name, x in carry.items()}


def train(args: Args) -> dict[str, dict[str, float]]:
    """The run, with --resume from its checkpoint on; returns the last evaluation."""
    rank, size, device = start_processes(args)
    source = args.resume or args.eval_only
    saved, run_dir = load_checkpoint(source) if source else ({}, None)
    iteration, timesteps = saved.get("iteration", 0), saved.get("timesteps", 0)
    began = time.monotonic() - saved.get("wall_s", 0)
    with contextlib.ExitStack() as stack:
        envs = stack.enter_context(make_envs(args, args.num_envs, args.seed, rank * args.num_envs))
        agent, sprites = Agent(args, envs.spec, device), Sprites(envs, device)
        if saved:
            restore(agent.parts(), saved["agent"], source)
        others, bots = load_background(args, agent), announce_scenarios(args, rank)

        stop: list[int] = []  # signals that asked for it

        def alive() -> None:
            envs.check()
            if stop:
                raise KeyboardInterrupt

        judge = functools.partial(evaluate, args, agent, others, alive)
        if args.eval_only:
            return judge("final", timesteps, run_dir) if rank == 0 else {}
        carry = new_carry(agent, args.num_envs)
        rngs = new_generators(args.seed, rank)
        if saved:
            carry = unpack(saved["ranks"], rank, size, envs, carry, rngs)
        else:
            envs.reset()
        if rank == 0:
            run_dir = run_dir or new_run_dir(args, args.substrate, device=str(device), bots=bots)
            logger = stack.enter_context(contextlib.closing(Logger(args, run_dir, timesteps)))

        def save() -> None:
            state = pack(args, agent, envs, carry, rngs, size)
            state |= {"iteration": iteration, "timesteps": timesteps}
            if rank == 0:
                save_checkpoint(run_dir, state | {"wall_s": time.monotonic() - began})

        if not saved:
            save()
        bar = progress_bar(timesteps, args.total_timesteps, rank)
        signals = stack.enter_context(stop_signals(stop))
        while timesteps < args.total_timesteps and (size > 1 or not stop):
            times = [began, time.monotonic()]
            batch = collect(args, envs, agent, carry, sprites, **rngs)
            times.append(time.monotonic())
            scalars = update(args, agent, batch, carry, sprites, rngs["rng"], envs.check)
            iteration += 1
            times.append(time.monotonic())
            before, timesteps = timesteps, timesteps + args.rollout_steps * args.num_envs * size
            if rank == 0:
                logger.log(timesteps, report(batch, scalars, times, size))
                bar.update(timesteps - before)
            if is_due(args.save_every, before, timesteps):
                save()
            if is_due(args.eval_every, before, timesteps) and rank == 0:
                with contextlib.suppress(KeyboardInterrupt):
                    logger.log_results(timesteps, "eval", judge("eval", timesteps, run_dir))
            if size > 1 and sum_over_processes(torch.tensor(len(stop), device=device)):
                break  # all processes at the same iteration
        save()
        if rank > 0 or stop or not args.final_episodes:
            return {}
        signals()  # from here on Ctrl-C ends the run at once
        results = judge("final", timesteps, run_dir)
        logger.log_results(timesteps, "final", results)
        summary = {"timesteps": timesteps, "wall_s": time.monotonic() - began, "eval": results}
        write(run_dir / "summary.json", json.dumps(summary, indent=1).encode())
        return results


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        train(read_args(sys.argv[1:] if argv is None else argv))
    except (RunError, WorldError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 1)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
