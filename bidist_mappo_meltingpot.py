"""BiDist: Bidirectional Distillation (Feng et al., AAMAS 2025) on MAPPO, for unseen co-players.

In every iteration, a random part of the agents (the fictitious population) acts with a distilled
network phi, the others with the learning network theta. Every k_d iterations, phi is trained on the
last rollout: alternately towards theta (forward distillation, an implicit self-play with the past)
and away from theta (reverse, novel partners). This prepares theta for co-players it has never met.

    v_i = 0 (fictitious) with probability p (in Eq. (4) 1 - p), else 1; never all 0   Eqs. (3)-(5)
    tau ~ (pi_theta where v_i = 1, pi_phi where v_i = 0)                                Eq. (6)
    phi <- phi - eta_f grad L(phi),  L = 1/N sum_i E KL(pi_theta(.|o_i) || pi_phi(.|o_i))  Eq. (7)
    phi <- phi + eta_r grad L(phi)                                                      Eq. (8)
    J(theta) = 1/N sum_i E min(r A, clip(r, c (1 -+ eps)) A),  r = pi_theta / pi_acted  Eq. (9)
    c = pi_theta_old / pi_acted, but 1 in the paper and with --clip-centre printed

    python bidist_mappo_meltingpot.py --k-d 5       the paper's settings, except c and what p counts
    python bidist_mappo_meltingpot.py --resume runs/RUN --total-timesteps 2000000
    python bidist_mappo_meltingpot.py --eval-only runs/RUN --background random runs/OTHER
    torchrun --nproc-per-node 2 bidist_mappo_meltingpot.py                   16 worlds per process

Letters: theta_old theta before the update; pi_acted pi_theta_old or pi_phi, as v says (Eq. (9)'s
pi^old); T steps, B worlds, N agents, A actions, F features, H W tiles of a view (H' W' of the
global view), S units of a hidden state, L steps per chunk, C chunks per world and rollout, M of
them per minibatch. A diff with baselines/mappo_meltingpot.py shows the method. Where the paper is
silent: docs/bidist.md. Worlds: docs/meltingpot.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from harness import (
    Above,
    Amount,
    Count,
    Evaluation,
    Parts,
    Positive,
    Run,
    RunArgs,
    Share,
    UsageError,
    call,
    check_finite,
    descend,
    gather,
    has_bf16,
    leave,
    load_checkpoint,
    moments,
    process_count,
    read_args,
    restore,
    saved_args,
    send,
    sum_over_processes,
)

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from envs.meltingpot.episodes import EpisodeLog, Player, table
from envs.meltingpot.scenarios import background_rows, find_scenarios, scenario_rows
from envs.meltingpot.tile_tensors import Sprites, TileTables, ids_on
from envs.meltingpot.tiles import Episode, Observation, Spec, WorldError

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """BiDist on MAPPO in Melting Pot. Defaults: paper (Tables B.1, B.2), but --clip-centre, --p."""

    # Environment
    substrate: str = "chicken_in_the_matrix__repeated"  # Melting Pot substrate, toy or module:Class
    num_envs: Positive = 16  # B, parallel worlds per process (Table B.1: rollout threads)
    num_workers: Count = 0  # processes that step Melting Pot's worlds; 0: one per CPU core
    worker_timeout: Above = 8.0  # seconds without a sign of life from a worker until the run ends
    max_episode_steps: Count = 0  # steps until training episodes (own worlds: all) end; 0: never
    team_reward: bool = False  # reward every agent with the sum of all agents' rewards
    # Method
    p: Share | None = None  # P(fictitious) = 1 - p of Eq. (4); default .4, for N > 2 agents .2
    v_redraw: Literal["iteration", "episode"] = "iteration"  # when v is redrawn (Alg. 1: iteration)
    all_fictitious: bool = False  # ablation v = 0: phi acts for all agents
    mask_fictitious: bool = False  # drop fictitious samples from PPO losses (Eq. 9 keeps them)
    clip_centre: Literal["printed", "old"] = "old"  # printed: 1; old: theta before update / acted
    weight_cap: Above | None = None  # 1 or more: bound of w = pi_theta_old / pi_acted in the loss
    advantages_per_population: bool = False  # normalise theta's and phi's advantages separately
    copy_every: Count = 0  # control: copy theta to phi every N iterations, no distillation; 0: off
    k_d: Positive = 5  # distillation interval, in iterations
    forward: bool = True  # forward distillation at odd multiples of k_d; off: ablation -F
    forward_lr: Amount = 1e-3  # eta_f of Eq. (7), learning rate of forward distillation
    forward_epochs: Count = 5  # epochs over the rollout in a forward phase
    reverse: bool = True  # reverse distillation at even multiples of k_d; off: ablation -R
    reverse_lr: Amount = 1e-5  # eta_r of Eq. (8), learning rate of reverse distillation
    reverse_epochs: Count = 5  # epochs over the rollout in a reverse phase
    reverse_mode: Literal["kl", "entropy", "random", "noise"] = "kl"  # kl: Eq. (8); others: Fig. 6
    noise_std: Amount = 0.1  # std of the noise on the weights of phi in --reverse-mode noise
    distilled_width: Annotated[float, Interval(gt=0, le=4)] = 1.0  # relative, of phi (Fig. C.1)
    # Base algorithm: MAPPO
    rollout_steps: Positive = 200  # T, steps per rollout; worlds are not reset between rollouts
    chunk_length: Positive = 10  # L, steps per chunk for backpropagation through time
    epochs: Positive = 5  # PPO epochs over each rollout
    minibatches: Positive = 5  # minibatches per epoch
    actor_lr: Amount = 5e-4  # learning rate of the actor (Adam)
    critic_lr: Amount = 5e-4  # learning rate of the critic (Adam)
    adam_eps: Above = 1e-5  # epsilon of Adam
    gamma: Share = 0.99  # discount factor
    gae_lambda: Share = 0.95  # lambda of generalised advantage estimation (GAE)
    clip: Amount = 0.2  # eps of Eq. (9), clip range of the policy ratio
    value_clip: Amount = 0.2  # clip range of the values, in units of normalised returns
    huber_delta: Above = 10.0  # delta of the Huber value loss, in units of normalised returns
    entropy_coef: Amount = 0.01  # weight of the entropy bonus
    max_grad_norm: Above = 10.0  # gradients of each optimiser are clipped to this norm
    plain: bool = False  # run the CNN on images instead of lookup tables: same results, slower
    amp: bool = False  # critic in bfloat16 up to its GRU, where the hardware supports it
    # Evaluation
    background: tuple[str, ...] = ("random", "distilled")  # co-players: random, distilled, run dirs
    num_focal: Count = 0  # seats of the trained policy beside --background; 0: N - 1
    eval_ids: Literal["random", "slot"] = "random"  # ids: drawn in each role (Eq. 2), or the seat's
    eval_scenarios: str = "all"  # all (of the paper's substrates: SC0 to SC4), none or SC0,SC3
    bots: Literal["auto", "official", "scripted"] = "auto"  # auto: official if found, else scripted


def without_effect(args: Args) -> Iterator[tuple[bool, str]]:
    """Yield (whether one makes others that were given idle, error message) of some flags. A
    phase that is off or takes no steps (random, noise) may have its rate, epochs and k_d: studies
    give them to all their arms. So may --mask-fictitious and --p 0 have a --clip-centre: w is 1."""
    forward, reverse = ("forward_lr", "forward_epochs"), ("reverse_lr", "reverse_epochs")
    phases = ("k_d", "forward", *forward, "reverse", *reverse, "reverse_mode", "noise_std")
    one_population = ("advantages_per_population",)  # but for a cap, which needs the flag
    populations = ("v_redraw", "mask_fictitious", "weight_cap", "advantages_per_population")
    rows = [
        (args.copy_every, "--copy-every", (*phases, "distilled_width")),
        (not args.reverse, "--no-reverse", ("reverse_mode",)),
        (args.reverse_mode != "noise", f"--reverse-mode {args.reverse_mode}", ("noise_std",)),
        (args.all_fictitious, "--all-fictitious", ("p", "v_redraw")),
        (args.all_fictitious and not args.weight_cap, "--all-fictitious", one_population),
        (args.p == 0, "--p 0", populations),  # there is but one
        (args.mask_fictitious, "--mask-fictitious", ("weight_cap", "advantages_per_population")),
    ]
    for applies, flag, names in rows:
        given = [name for name in names if getattr(args, name) != getattr(Args, name)]
        listed = " ".join(f"--{name.replace('_', '-')}" for name in given)
        yield bool(applies and given), f"{flag} leaves no use for {listed}"


def first_change(args: Args) -> tuple[int, str]:
    """Iteration after which phi first changes (0: never), and the flags that say so. With another
    --reverse-mode than kl that of the first reverse phase; rates and epochs ask for none."""
    if args.copy_every:
        return args.copy_every, f"--copy-every {args.copy_every}"
    if not (args.forward or args.reverse):
        return 0, ""
    if args.reverse and args.reverse_mode != Args.reverse_mode:
        return 2 * args.k_d, f"--k-d {args.k_d} --reverse-mode {args.reverse_mode}"
    return args.k_d if args.forward else 2 * args.k_d, f"--k-d {args.k_d}"


def validate(args: Args) -> list[tuple[Any, str]]:
    """(condition, error message) pairs: the flags are rejected if a condition is true."""
    chunks = args.rollout_steps // args.chunk_length * args.num_envs
    old = args.clip_centre == "old"
    capped = args.weight_cap is not None
    apart = args.advantages_per_population
    first, flags = first_change(args)
    steps = args.rollout_steps * args.num_envs * process_count()  # of an iteration
    iterations = math.ceil(args.total_timesteps / steps)  # a run ends its last one
    too_rare = f"{flags} needs {first * steps:,} steps, and the run has {args.total_timesteps:,}"
    wrong = [
        (args.rollout_steps % args.chunk_length, "--chunk-length must divide --rollout-steps"),
        (args.minibatches > chunks, f"--minibatches exceeds the {chunks} chunks of a rollout"),
        (args.mask_fictitious and args.all_fictitious, "--mask-fictitious leaves no samples"),
        (capped and not old, "--weight-cap bounds weights of --clip-centre old"),
        # Where theta acts w is 1: a cap below 1 would scale its clip, too.
        (capped and args.weight_cap < 1, "--weight-cap must be 1 or more"),
        # With capped w, E_phi[w grad log pi_theta] is not 0: a constant added to A adds a gradient.
        (capped and not apart, "--weight-cap needs --advantages-per-population"),
        (first > iterations and not (args.resume or args.eval_only), too_rare),
    ]
    if args.resume or args.eval_only:  # a run that was begun with idle flags goes on
        return wrong
    return [*wrong, *without_effect(args)]


LINE = ("episode/return", "entropy", "kl", "sps")  # scalars to print where there is no terminal
RESUMABLE = (  # flags of this script that may change with --resume and --eval-only
    "num_workers",
    "worker_timeout",
    "plain",
    "amp",
    "background",
    "num_focal",
    "eval_ids",
    "eval_scenarios",
    "bots",
)
# As many samples from more worlds and shorter rollouts: 1.3 times as fast on two idle cores. So
# v is drawn anew every 50 steps, not every 200, but for --v-redraw episode.
PRESETS = {"cpu": {"num_envs": 64, "rollout_steps": 50, "num_threads": 2}}


# --- 3. Worlds ------------------------------------------------------------------------------------


# [shared: meltingpot_worlds] begin
def make_envs(args: Args, num_envs: int, seed: int, first_world: int = 0) -> Any:
    """Create num_envs parallel worlds; UsageError if args.substrate is unknown or not installed."""
    from envs.meltingpot.make import make_worlds

    try:
        return make_worlds(
            args.substrate,
            num_envs,
            seed,
            first_world=first_world,
            max_episode_steps=args.max_episode_steps,
            num_workers=args.num_workers,
            timeout=args.worker_timeout,
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from None


# [shared: meltingpot_worlds] end

# --- 4. Networks ----------------------------------------------------------------------------------

KERNEL = 4  # size of the second convolution's kernel, in tiles
RELU = math.sqrt(2)  # gain of the initial weights of layers before a ReLU


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """Give a layer orthogonal weights and zero biases, in place; returns the layer."""
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.orthogonal_(parameter, gain)
    return layer


def scale(units: int, width: float) -> int:
    """Units of a layer at a relative width, at least 1. Shapes in comments are for width 1."""
    return max(1, round(units * width))


class TileCNN(nn.Module):
    """The paper's two convolutions and the linear layer after them, each with ReLU (App. B.2).

    The input is tile ids, because every image is a grid of sprites of 8 x 8 pixels. By default,
    lookup tables compute the same function faster. A changed TileCNN must be run with --plain.
    """

    def __init__(self, grid: tuple[int, int], width: float = 1.0):
        super().__init__()
        self.grid = grid
        rows, columns = (max(size, KERNEL) for size in grid)
        # Views smaller than the kernel are padded with black tiles (id 0) below and to the right.
        self.padding = (0, columns - grid[1], 0, rows - grid[0])
        c1, c2 = scale(16, width), scale(32, width)
        inputs = c2 * (rows - KERNEL + 1) * (columns - KERNEL + 1)
        self.conv1 = orthogonal(nn.Conv2d(3, c1, 8, stride=8), RELU)
        self.conv2 = orthogonal(nn.Conv2d(c1, c2, KERNEL), RELU)
        self.linear = orthogonal(nn.Linear(inputs, scale(64, width)), RELU)

    def forward(self, ids: Tensor, sprites: Tensor) -> Tensor:
        """Tile ids of M images (M, H, W), rows of the sprites (P, 3, 8, 8) in [0, 1] -> (M, 64)."""
        tiles = sprites[F.pad(ids.long(), self.padding)]  # (M, H, W, 3, 8, 8)
        images = tiles.permute(0, 3, 1, 4, 2, 5)  # (M, 3, H, 8, W, 8)
        images = images.flatten(4, 5).flatten(2, 3)
        x = F.relu(self.conv1(images))  # (M, 16, H, W)
        x = F.relu(self.conv2(x))  # (M, 32, H - 3, W - 3)
        x = x.flatten(2).transpose(1, 2).flatten(1)  # (M, positions * 32), the order of the tables
        return F.relu(self.linear(x))


class Actor(nn.Module):
    """CNN -> MLP of 2 x 64 -> GRU of 128 -> MLP of 64 -> logits of the actions (App. B.2). The GRU
    also gets the agent's features and its one-hot id."""

    def __init__(self, spec: Spec, plain: bool, width: float = 1.0):
        super().__init__()
        units = scale(64, width)
        self.num_ids, self.hidden_size = spec.num_agents, scale(128, width)
        features = spec.num_features + self.num_ids
        cnn = TileCNN(spec.grid, width)
        self.cnn = cnn if plain else TileTables(cnn)
        self.mlp = orthogonal(nn.Linear(units, units), RELU)
        self.norm = nn.LayerNorm(features)  # observation normalisation (App. B.1)
        self.gru = orthogonal(nn.GRU(units + features, self.hidden_size), 1.0)
        self.head = orthogonal(nn.Linear(self.hidden_size, units), RELU)
        self.out = orthogonal(nn.Linear(units, spec.num_actions), 0.01)

    def forward(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, Tensor]:
        """Run T steps from hidden (B, N, S). Returns logits (T, B, N, A) and the hidden states
        after each step (T, B, N, S)."""
        x = self.cnn(views.ids.flatten(0, 2), sprites)
        x = F.relu(self.mlp(x))
        x = x.unflatten(0, views.ids.shape[:3])
        x = torch.cat([x, self.norm(views.features)], -1)
        states = run_gru(self.gru, x, views.starts, hidden)
        return self.out(F.relu(self.head(states))), states


# [shared: meltingpot_networks] begin
class Views(NamedTuple):
    """Inputs of a network: the actor gets a view per agent, the critic a global view per world."""

    ids: Tensor  # tile ids; actor: (T, B, N, H, W), critic: (T, B, H', W')
    features: Tensor  # actor: (T, B, N, F + N), critic: (T, B, N * (F + A)), float32
    starts: Tensor  # (T, B) bool, True at the first step of an episode


class Critic(nn.Module):
    """The actor's layers, for the global view and the features of all agents. The CNN runs once per
    world; the agent id, an input of the GRU, makes the value specific to an agent."""

    def __init__(self, spec: Spec, plain: bool):
        super().__init__()
        self.num_ids, self.hidden_size = spec.num_agents, 128
        features = spec.num_agents * (spec.num_features + spec.num_actions)
        cnn = TileCNN(spec.world_grid)
        self.cnn = cnn if plain else TileTables(cnn)
        self.mlp = orthogonal(nn.Linear(64, 64), RELU)
        self.norm = nn.LayerNorm(features)
        self.gru = orthogonal(nn.GRU(64 + features + self.num_ids, self.hidden_size), 1.0)
        self.head = orthogonal(nn.Linear(self.hidden_size, 64), RELU)
        self.out = orthogonal(nn.Linear(64, 1), 1.0)

    def forward(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, Tensor]:
        """Run T steps from hidden (B, N, S). Returns normalised values (T, B, N) and the hidden
        states after each step (T, B, N, S)."""
        steps, worlds = views.starts.shape
        x = self.cnn(views.ids.flatten(0, 1), sprites)
        x = F.relu(self.mlp(x))
        x = x.unflatten(0, (steps, worlds))
        features = self.norm(views.features).to(x.dtype)
        x = torch.cat([x, features], -1)[:, :, None]  # (T, B, 1, .)
        ids = torch.eye(self.num_ids, dtype=x.dtype, device=x.device)
        ids = ids.expand(steps, worlds, -1, -1)
        x = x.expand(-1, -1, self.num_ids, -1)
        x = torch.cat([x, ids], -1)  # (T, B, N, .)
        with torch.autocast(x.device.type, enabled=False):  # hidden states need float32
            x = x.to(self.out.weight.dtype)
            states = run_gru(self.gru, x, views.starts, hidden)
            values = self.out(F.relu(self.head(states)))[..., 0]
        return values, states


def run_gru(gru: nn.GRU, x: Tensor, starts: Tensor, hidden: Tensor) -> Tensor:
    """Run the GRU over x (T, B, N, .) from hidden (B, N, S), which is reset to zero where starts
    (T, B) is True. Returns the hidden states after each step (T, B, N, S)."""
    # One call of the GRU for all steps up to the next one at which any world begins an episode.
    begins = []
    if len(x) > 1:  # a single step has no breaks, and tolist() waits for the GPU
        begins = starts[1:].any(1).tolist()
    breaks = (t for t, begun in enumerate(begins, 1) if begun)
    cuts = [0, *breaks, len(x)]
    states = []
    for first, last in itertools.pairwise(cuts):
        goes_on = ~starts[first, :, None, None]
        hidden = (hidden * goes_on).to(x.dtype)
        rows = x[first:last].flatten(1, 2)  # (., B * N, .)
        part, _ = gru(rows, hidden.flatten(0, 1)[None])
        states.append(part.unflatten(1, hidden.shape[:2]))
        hidden = states[-1][-1]
    return torch.cat(states)


def chosen(log_probs: Tensor, actions: Tensor) -> Tensor:
    """Pick the log-probabilities (...) of actions (...) from those of all actions (..., A)."""
    return log_probs.gather(-1, actions[..., None])[..., 0]


def sample(log_probs: Tensor, rng: torch.Generator) -> Tensor:
    """Sample actions (B, N) from log-probabilities (B, N, A) by the Gumbel-max trick. The noise is
    drawn independently of the policy, so every policy uses the same amount of random numbers."""
    gumbel = -torch.empty(log_probs.shape).exponential_(generator=rng).log()
    return (log_probs + send(gumbel, log_probs.device)).argmax(-1)


# paper is silent: value normalisation, orthogonal weights, ReLU of the head; as in MAPPO
class ValueNorm(nn.Module):
    """Mean and standard deviation of returns, as debiased exponential averages (MAPPO)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # averages of 1, x, x^2

    def update(self, new: Tensor) -> None:
        """Update the averages with new (3,): 1, mean and mean square of returns; beta is .99999."""
        self.sums.lerp_(new, 1 - 0.99999)

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean () and standard deviation (); 0 and 1 before the first update()."""
        weight, mean, square = self.sums
        if weight == 0:
            return torch.zeros_like(mean).float(), torch.ones_like(mean).float()
        variance = square / weight - (mean / weight) ** 2
        std = variance.clamp(min=1e-2).sqrt()
        return (mean / weight).float(), std.float()


# [shared: meltingpot_networks] end


class Agent(Parts):
    """The networks, their optimisers, and the sprites of the training worlds."""

    def __init__(self, args: Args, envs: Any, device: torch.device):
        self.args, self.spec, self.device = args, envs.spec, device
        self.amp = args.amp and has_bf16(device)
        self.sprites = Sprites(envs, device)
        torch.manual_seed(args.seed)
        self.actor = self.new_actor()
        self.critic = Critic(self.spec, args.plain).to(device)
        self.value_norm = ValueNorm().to(device)
        self.actor_optimiser = self.new_optimiser(self.actor, args.actor_lr)
        self.critic_optimiser = self.new_optimiser(self.critic, args.critic_lr)
        self.distilled = self.new_distilled(args.seed + 2**30)
        if args.copy_every:
            self.copy_actor()

    def new_actor(self, width: float = 1.0) -> Actor:
        return Actor(self.spec, self.args.plain, width).to(self.device)

    def new_optimiser(self, net: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr, eps=self.args.adam_eps, fused=True)

    def new_distilled(self, seed: int) -> Actor:
        """A new phi, initialised independently of theta."""
        torch.manual_seed(seed)  # paper is silent: phi's initial weights
        return self.new_actor(self.args.distilled_width)

    def perturb_distilled(self, seed: int) -> None:
        """Add Gaussian noise with standard deviation --noise-std to every weight of phi."""
        torch.manual_seed(seed)
        for weight in self.distilled.parameters():
            noise = self.args.noise_std * torch.randn(weight.shape)
            weight.data.add_(noise.to(weight.device))

    def copy_actor(self) -> None:
        """Copy theta to phi (the control --copy-every)."""
        self.distilled.load_state_dict(self.actor.state_dict())

    def autocast(self) -> torch.autocast:
        """--amp: bfloat16 in the critic. Actors stay in float32, for the ratio of Eq. (9)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# --- 5. The paper ---------------------------------------------------------------------------------


def fictitious_probability(args: Args, num_agents: int) -> float:
    """P(v_i = 0) where delta_i = 1, 1 - p of Eq. (4): --p, or its default."""
    # paper and paper differ: p is P(v_i = 1) in Eq. (4); App. B.3's text fits P(v_i = 0)
    if args.p is not None:
        return args.p
    return 0.4 if num_agents <= 2 else 0.2


def fictitious_share(args: Args, num_agents: int) -> float:
    """Expected share of fictitious agents; below q, as Eq. (5) trains one if all would be."""
    q = fictitious_probability(args, num_agents)
    return 1.0 if args.all_fictitious else q - q**num_agents / num_agents


def draw_trained(args: Args, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Draw v for shape (B, N) -> (B, N) bool, True where an agent is trained."""
    # Eqs. (3)-(5), Alg. 1 lines 2-6; paper is silent: one v per world (here) or for all
    place = torch.rand(shape, generator=rng).argsort(1)  # each agent's in a random order (line 2)
    v = torch.rand(shape, generator=rng) >= fictitious_probability(args, shape[1])
    v[:, -1] |= ~v[:, :-1].any(1)  # delta_N = 0: the last is trained if all others are fictitious
    return torch.zeros_like(v) if args.all_fictitious else v.gather(1, place)


def distillation_phase(args: Args, iteration: int) -> str | None:
    """The phase after the update of iteration 1, 2, ...: "forward", "reverse" or None."""
    # Alg. 1 lines 9-13
    if args.copy_every or iteration % args.k_d:
        return None
    if iteration // args.k_d % 2:
        return "forward" if args.forward else None
    return "reverse" if args.reverse else None


def kl_divergence(theta: Tensor, phi: Tensor) -> Tensor:
    """Mean KL(pi_theta || pi_phi), exact over actions, from log-probabilities (..., A) -> ()."""
    # Eq. (7), Sec. 4.2
    divergences = (theta.exp() * (theta - phi)).sum(-1)
    return divergences.mean()


def compare(theta: Tensor, phi: Tensor) -> dict[str, Tensor]:
    """Scalars on how phi differs from theta, from log-probabilities (..., A) on the same views."""
    preferred = theta.argmax(-1, keepdim=True)  # a*_theta
    others = phi.argmax(-1, keepdim=True)  # a*_phi
    return {
        "kl": kl_divergence(theta, phi),
        "shift": (preferred != others).float().mean(),  # share of samples, Prop. 4.1
        "theta_prefers": theta.gather(-1, preferred).exp().mean(),  # pi_theta(a*_theta)
        "phi_prefers": phi.gather(-1, preferred).exp().mean(),  # pi_phi(a*_theta)
        "phi_peak": phi.amax(-1).exp().mean(),  # pi_phi(a*_phi), rises if phi gets sharper
    }


def distillation_loss(mode: str, theta: Tensor, phi: Tensor) -> Tensor:
    """The loss () that phi minimises, from log-probabilities (..., A)."""
    if mode == "forward":
        return kl_divergence(theta, phi)  # Eq. (7)
    if mode == "kl":
        return -kl_divergence(theta, phi)  # Eq. (8)
    if mode == "entropy":
        return (phi.exp() * phi).sum(-1).mean()  # Fig. 6: maximise the entropy
    raise ValueError(f"no loss for the mode {mode}")


def distill(
    args: Args, agent: Agent, batch: Batch, state: RolloutState, phase: str, rng: torch.Generator
) -> tuple[dict[str, Tensor], RolloutState]:
    """Run a forward or reverse phase on the last rollout. Returns the scalars of compare() before
    and after it, and the state with phi's new hidden states."""
    mode = "forward" if phase == "forward" else args.reverse_mode

    def play_through(net: Actor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi (T, B, N, A), hidden before each chunk (C, B, N, S), last hidden (B, N, S)."""
        views = batch.actor_views()
        logits, before, after = replay(args, net, views, hidden[0], agent.sprites)
        return logits.log_softmax(-1), before, after[-1]

    theta, _, _ = play_through(agent.actor, batch.actor_hidden)  # the teacher: the updated theta
    phi, hidden, last = play_through(agent.distilled, batch.distilled_hidden)
    scalars = {f"{phase}/{name}_before": x for name, x in compare(theta, phi).items()}
    if mode in ("random", "noise"):
        replace_distilled(agent, mode, rng)
        phi, hidden, last = play_through(agent.distilled, batch.distilled_hidden)
    else:
        lr = args.forward_lr if mode == "forward" else args.reverse_lr
        epochs = args.forward_epochs if mode == "forward" else args.reverse_epochs
        # paper is silent: every phase starts with a new Adam optimiser
        optimiser = agent.new_optimiser(agent.distilled, lr)
        for _ in range(epochs):
            # theta: no longer log pi when it acted, but the teacher's
            chunks = dataclasses.replace(batch, theta=theta, distilled_hidden=hidden)
            for part in minibatches(args, chunks, rng):
                views = part.actor_views()
                logits, _ = agent.distilled(views, part.distilled_hidden, agent.sprites())
                loss = distillation_loss(mode, part.theta, logits.log_softmax(-1))
                descend(loss, agent.distilled, optimiser, args.max_grad_norm)
            # phi's hidden states before each chunk are recomputed with its new weights
            phi, hidden, last = play_through(agent.distilled, batch.distilled_hidden)
    scalars |= {f"{phase}/{name}_after": x for name, x in compare(theta, phi).items()}
    check_finite(**scalars)  # Eq. (8) has no bound
    return scalars, dataclasses.replace(state, distilled_hidden=last)


def replace_distilled(agent: Agent, mode: str, rng: torch.Generator) -> None:
    """Reverse modes of Fig. 6: initialise phi anew ("random") or add noise ("noise")."""
    seed = torch.randint(2**31, (), generator=rng)
    seed = int(sum_over_processes(seed.to(agent.device)))  # the same in all processes
    if mode == "random":
        agent.distilled = agent.new_distilled(seed)
    else:
        agent.perturb_distilled(seed)


def ratio_and_centre(args: Args, log_prob: Tensor, part: Batch) -> tuple[Tensor, Tensor]:
    """The ratio pi_theta / pi_acted and its clip's centre, (L, M, N); --weight-cap lowers both."""
    if args.clip_centre == "printed":
        ratio = (log_prob - part.log_probs).exp()
        return ratio, torch.ones_like(ratio)
    # A fictitious sample's ratio starts at w = pi_theta_old / pi_phi: around 1, only gradients that
    # pull theta to phi pass outside the clip; around w, the clip bounds the step from theta_old.
    old = chosen(part.theta, part.actions)
    weight = (old - part.log_probs).exp()  # w; 1 where theta acted
    if args.weight_cap is not None:
        weight = weight.clamp(max=args.weight_cap)
    return weight * (log_prob - old).exp(), weight


def training_samples(args: Args, x: Tensor, trained: Tensor) -> Tensor:
    """Select from x (..., N) what trains theta: all samples, or its own with --mask-fictitious."""
    return x[trained] if args.mask_fictitious else x


def diagnose(args: Args, ratios: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Per population, the largest ratio and the share of samples whose ratio is outside the clip,
    which limits large ratios where A > 0 alone, small ones where A < 0. ratios: (ratio, centre, v),
    (L, M, N) each, of all minibatches."""
    ratio, centre, trained = (torch.cat(x, dim=1) for x in zip(*ratios))
    outside = (ratio / centre - 1).abs() > args.clip
    figures = {}
    for name, who in (("trained", trained), ("fictitious", ~trained)):
        if who.any():
            figures[f"ratio_max/{name}"] = ratio[who].max()
            figures[f"clipped/{name}"] = outside[who].float().mean()
    return figures


def importance_weights(batch: Batch) -> dict[str, Tensor]:
    """For fictitious samples before the update: the largest weight w = pi_theta / pi_phi, and the
    effective sample size (sum w)^2 / sum w^2 as a share of the number of samples."""
    fictitious = ~batch.trained
    if not fictitious.any():
        return {}
    theta = chosen(batch.theta, batch.actions)
    weight = (theta - batch.log_probs)[fictitious].exp()
    effective = weight.sum() ** 2 / (weight**2).sum()
    return {"weight_max": weight.max(), "effective_samples": effective / weight.numel()}


# --- 6. Data --------------------------------------------------------------------------------------


@dataclasses.dataclass
class RolloutState:
    """What a rollout needs from the one before it."""

    starts: Tensor  # (B,) bool, the next step is the first of an episode
    previous: Tensor  # (B, N) int64, previous actions; -1: none yet in this episode
    actor_hidden: Tensor  # (B, N, S)
    critic_hidden: Tensor  # (B, N, S)
    distilled_hidden: Tensor  # (B, N, S), phi's hidden states
    trained: Tensor  # (B, N) bool, v: True where theta acts


def new_state(agent: Agent, num_envs: int) -> RolloutState:
    """The state at which all worlds begin an episode."""
    shape, device = (num_envs, agent.spec.num_agents), agent.device
    return RolloutState(
        starts=torch.ones(num_envs, dtype=torch.bool, device=device),
        previous=torch.full(shape, -1, device=device),
        actor_hidden=torch.zeros(*shape, agent.actor.hidden_size, device=device),
        critic_hidden=torch.zeros(*shape, agent.critic.hidden_size, device=device),
        distilled_hidden=torch.zeros(*shape, agent.distilled.hidden_size, device=device),
        trained=torch.ones(shape, dtype=torch.bool, device=device),
    )


@dataclasses.dataclass
class Batch:
    """One rollout. Fields of length T + 1 include the step after it, for bootstrapping."""

    tile_ids: Tensor  # (T, B, N, H, W) uint16, on a GPU int32; the agents' views
    actor_features: Tensor  # (T, B, N, F + N) float32, with one-hot agent ids
    world_ids: Tensor  # (T + 1, B, H', W'), the global views, dtype of tile_ids
    critic_features: Tensor  # (T + 1, B, N * (F + A)) float32, see joint_features()
    starts: Tensor  # (T + 1, B) bool, True at the first step of an episode
    actions: Tensor  # (T, B, N) int64
    log_probs: Tensor  # (T, B, N) float32, of the actions under the policy that acted
    rewards: Tensor  # (T, B, N) float32
    terminated: Tensor  # (T, B) bool
    truncated: Tensor  # (T, B) bool
    trained: Tensor  # (T, B, N) bool, v: True where theta acted
    theta: Tensor  # (T, B, N, A) float32, log-probabilities under theta
    phi: Tensor  # (T, B, N, A) float32, log-probabilities under phi
    actor_hidden: Tensor  # (C, B, N, S), hidden states before each chunk
    distilled_hidden: Tensor  # (C, B, N, S), phi's hidden states before each chunk
    finals: list[tuple[int, int, Views]]  # t, b, final critic view (1, 1, ...) of each truncation
    episodes: list[Episode]  # those that ended in this rollout
    critic_hidden: Tensor | None = None  # (C, B, N, S); prepare() fills this field and those below
    values: Tensor | None = None  # (T, B, N) float32, before the update, normalised
    targets: Tensor | None = None  # (T, B, N) float32, GAE returns, normalised
    advantages: Tensor | None = None  # (T, B, N) float32, normalised

    def actor_views(self) -> Views:
        starts = self.starts[: len(self.tile_ids)]
        return Views(self.tile_ids, self.actor_features, starts)

    def critic_views(self) -> Views:
        return Views(self.world_ids, self.critic_features, self.starts)


def collect(
    args: Args,
    envs: Any,
    agent: Agent,
    state: RolloutState,
    rng: torch.Generator,
    method_rng: torch.Generator,
) -> tuple[Batch, RolloutState]:
    """Play T steps in every world from `state` on; returns the rollout and the state after it."""
    device, shape = agent.device, state.previous.shape
    num_actions = envs.spec.num_actions
    record = collections.defaultdict(list)
    finals, episodes = [], []

    def add(**tensors: Tensor) -> None:
        for name, x in tensors.items():
            record[name].append(x)

    if args.v_redraw == "iteration":
        drawn = send(draw_trained(args, shape, method_rng), device)
        state = dataclasses.replace(state, trained=drawn)
    for t in range(args.rollout_steps + 1):
        tile_ids, actor_features, world_ids, features = observe(envs.obs, device)
        joint = joint_features(features, state.previous, num_actions)
        add(world_ids=world_ids, critic_features=joint, starts=state.starts)
        if t == args.rollout_steps:  # the step after the rollout is for the critic alone
            break
        if args.v_redraw == "episode" and state.starts.any():
            drawn = send(draw_trained(args, shape, method_rng), device)
            trained = torch.where(state.starts[:, None], drawn, state.trained)
            state = dataclasses.replace(state, trained=trained)
        if t % args.chunk_length == 0:
            add(actor_hidden=state.actor_hidden, distilled_hidden=state.distilled_hidden)
        views = Views(tile_ids, actor_features, state.starts)
        theta, actor_hidden = act(agent.actor, views, state.actor_hidden, agent.sprites)
        hidden = state.distilled_hidden
        phi, distilled_hidden = act(agent.distilled, views, hidden, agent.sprites)
        acting = torch.where(state.trained[..., None], theta, phi)  # Eq. (6)
        actions = sample(acting, rng)
        add(tile_ids=tile_ids, actor_features=actor_features)
        add(actions=actions, log_probs=chosen(acting, actions))
        add(trained=state.trained, theta=theta, phi=phi)

        step = envs.step(actions.cpu().numpy())
        rewards = send(torch.from_numpy(step.reward), device)
        terminated = send(torch.from_numpy(step.terminated), device)
        truncated = send(torch.from_numpy(step.truncated), device)
        if args.team_reward:
            rewards = rewards.sum(1, keepdim=True).expand(shape)
        add(rewards=rewards.float(), terminated=terminated, truncated=truncated)
        if step.truncated.any():
            _, _, world_ids, features = observe(step.final, device)
            joint = joint_features(features, actions, num_actions)
            no_start = torch.zeros(1, 1, dtype=torch.bool, device=device)
            for b in np.flatnonzero(step.truncated):
                view = Views(world_ids[b, None, None], joint[b, None, None], no_start)
                finals.append((t, b, view))
        episodes += step.episodes
        ended = terminated | truncated
        state = dataclasses.replace(
            state,
            starts=ended,
            previous=actions.masked_fill(ended[:, None], -1),
            actor_hidden=actor_hidden,
            distilled_hidden=distilled_hidden,
        )
    tensors = {name: torch.stack(x) for name, x in record.items()}
    return Batch(**tensors, finals=finals, episodes=episodes), state


def normalise_advantages(args: Args, advantages: Tensor, trained: Tensor) -> Tensor:
    """Advantages (T, B, N), normalised over the samples that train theta, or in each population."""
    if args.advantages_per_population:
        groups = [trained, ~trained]
    elif args.mask_fictitious:
        groups = [trained]
    else:
        groups = [torch.ones_like(trained)]
    normalised = advantages
    for group in groups:
        _, mean, square = moments(advantages[group])  # NaN if the group is empty: not used
        std = (square - mean**2).clamp(min=0).sqrt()
        normalised = torch.where(group, (advantages - mean) / (std + 1e-5), normalised)
    return normalised


def prepare(
    args: Args, agent: Agent, batch: Batch, state: RolloutState
) -> tuple[Batch, RolloutState]:
    """Update agent.value_norm and add to the rollout what the losses need (last fields of Batch).
    Returns the rollout, and the state with the critic's new hidden states."""
    values, advantages, hidden = estimate(args, agent, batch, state.critic_hidden)
    returns = values + advantages
    # paper is silent: returns and advantages are normalised once, before the epochs
    agent.value_norm.update(moments(training_samples(args, returns, batch.trained)))
    mean, std = agent.value_norm.mean_std()
    batch = dataclasses.replace(
        batch,
        critic_hidden=hidden[:-1],
        values=(values - mean) / std,
        targets=(returns - mean) / std,
        advantages=normalise_advantages(args, advantages, batch.trained),
    )
    return batch, dataclasses.replace(state, critic_hidden=hidden[-1])


# [shared: meltingpot_data] begin
def minibatches(args: Args, batch: Batch, rng: torch.Generator) -> Iterator[Batch]:
    """Yield the minibatches of one epoch: shuffled (chunk, world) pairs, each with all agents.
    (T or T + 1, B, ...) becomes (L, M, ...), what is called ...hidden (C, B, N, S): (M, N, S)."""
    # paper is silent: how a rollout is cut into chunks and minibatches for recurrent networks
    chunks, worlds = batch.actor_hidden.shape[:2]
    length = args.chunk_length
    order = torch.randperm(chunks * worlds, generator=rng)
    for pairs in send(order, batch.actions.device).tensor_split(args.minibatches):
        chunk, world = pairs // worlds, pairs % worlds
        parts = {}
        for name, x in vars(batch).items():
            if not isinstance(x, Tensor):
                continue
            if name.endswith("hidden"):
                parts[name] = x[chunk, world]
            else:
                x = x[: chunks * length].unflatten(0, (chunks, length))  # without step T + 1
                parts[name] = x[chunk, :, world].transpose(0, 1)
        yield dataclasses.replace(batch, **parts)


def observe(
    obs: Observation,
    device: torch.device,
    ids: Tensor | None = None,
    num_ids: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move obs to the device. Returns tile ids (B, N, H, W), features with one-hot agent ids
    (B, N, F + N), tile ids of the global views (B, H', W') and features without ids (B, N, F).

    ids (B, N): default seat numbers. num_ids: default one per seat; a scenario has fewer seats.
    """
    tile_ids = ids_on(device, obs.tile_ids)
    world_ids = ids_on(device, obs.world_ids)
    features = send(torch.from_numpy(obs.features), device)
    one_hot = torch.eye(num_ids or features.shape[1], device=device)
    if ids is None:
        ids = one_hot.expand(len(features), -1, -1)
    else:
        ids = one_hot[ids]
    return tile_ids, torch.cat([features, ids], -1), world_ids, features


def joint_features(features: Tensor, previous: Tensor, num_actions: int) -> Tensor:
    """Join features (B, N, F) and one-hot previous actions (B, N; -1 becomes zeros) of all agents,
    for the critic -> (B, N * (F + A))."""
    # paper is silent: which actions the critic gets
    actions = F.one_hot(previous + 1, num_actions + 1)[..., 1:]
    rows = torch.cat([features, actions.to(features.dtype)], -1)
    return rows.flatten(-2)


@torch.no_grad()
def act(net: Actor, views: Views, hidden: Tensor, sprites: Sprites) -> tuple[Tensor, Tensor]:
    """One step; views without axis T -> log-probabilities (B, N, A), next hidden (B, N, S)."""
    views = Views(views.ids[None], views.features[None], views.starts[None])
    logits, states = net(views, hidden, sprites())
    return logits[0].log_softmax(-1), states[0]


@torch.no_grad()
def replay(
    args: Args, net: nn.Module, views: Views, hidden: Tensor, sprites: Sprites
) -> tuple[Tensor, Tensor, Tensor]:
    """Run net over a rollout, chunk by chunk, from hidden (B, N, S). Returns outputs (T, B, N, .),
    hidden states before each chunk (C, B, N, S) and after each step (T, B, N, S)."""
    outputs, before, after = [], [], []
    for first in range(0, len(views.starts), args.chunk_length):
        steps = slice(first, first + args.chunk_length)
        chunk = Views(views.ids[steps], views.features[steps], views.starts[steps])
        output, states = net(chunk, hidden, sprites())
        outputs.append(output)
        before.append(hidden)
        after.append(states)
        hidden = states[-1]
    return torch.cat(outputs), torch.stack(before), torch.cat(after)


def gae(args: Args, batch: Batch, values: Tensor, next_values: Tensor) -> Tensor:
    """Advantages (T, B, N) by GAE, in units of rewards. next_values (T, B, N): of the state after
    each step; at a truncation, of the final state, not of the next episode's first state."""
    goes_on = ~(batch.terminated | batch.truncated)[..., None]
    delta = batch.rewards + args.gamma * next_values * ~batch.terminated[..., None] - values
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + args.gamma * args.gae_lambda * running * goes_on[t]
        advantages[t] = running
    return advantages


@torch.no_grad()
def estimate(
    args: Args, agent: Agent, batch: Batch, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the critic from hidden (B, N, S). Returns values and advantages (T, B, N) in units of
    rewards, and hidden states before each chunk and before the next rollout (C + 1, B, N, S)."""
    views = batch.critic_views()
    mean, std = agent.value_norm.mean_std()
    with agent.autocast():
        outputs, before, after = replay(args, agent.critic, views, hidden, agent.sprites)
        values = outputs * std + mean  # (T + 1, B, N)
        next_values = values[1:].clone()
        for t, b, view in batch.finals:
            output, _ = agent.critic(view, after[t, b, None], agent.sprites())
            next_values[t, b] = output[0, 0] * std + mean
    advantages = gae(args, batch, values[:-1], next_values)
    return values[:-1], advantages, before


# [shared: meltingpot_data] end

# --- 7. Update ------------------------------------------------------------------------------------


def clip_objective(ratio: Tensor, advantage: Tensor, clip: float, centre: Tensor | float) -> Tensor:
    """PPO's clipped objective of each sample; ratio: pi_theta / pi_acted of its action; centre: the
    value around which the ratio is clipped, by a share `clip` of it; 1 in the paper."""
    # Eq. (9), Sec. 4.5
    clipped = ratio.clamp(centre * (1 - clip), centre * (1 + clip))
    return torch.min(ratio * advantage, clipped * advantage)


def value_loss(value: Tensor, old: Tensor, target: Tensor, clip: float, delta: float) -> Tensor:
    """Clipped Huber loss of each value; value, old value and target are normalised."""
    clipped = old + (value - old).clamp(-clip, clip)  # paper is silent: clipped as in MAPPO
    return torch.max(
        F.huber_loss(value, target, reduction="none", delta=delta),
        F.huber_loss(clipped, target, reduction="none", delta=delta),
    )


def update(args: Args, agent: Agent, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
    """Train for args.epochs on a rollout from prepare(); returns mean scalars."""
    scalars, ratios = collections.defaultdict(list), []
    for _ in range(args.epochs):
        for part in minibatches(args, batch, rng):
            logits, _ = agent.actor(part.actor_views(), part.actor_hidden, agent.sprites())
            log_probs = logits.log_softmax(-1)  # (L, M, N, A)
            log_prob = chosen(log_probs, part.actions)
            ratio, centre = ratio_and_centre(args, log_prob, part)
            objective = clip_objective(ratio, part.advantages, args.clip, centre)
            policy_loss = -training_samples(args, objective, part.trained).mean()
            entropies = -(log_probs.exp() * log_probs).sum(-1)
            entropy = training_samples(args, entropies, part.trained).mean()
            loss = policy_loss - args.entropy_coef * entropy
            actor_norm = descend(loss, agent.actor, agent.actor_optimiser, args.max_grad_norm)

            with agent.autocast():
                views = part.critic_views()
                value, _ = agent.critic(views, part.critic_hidden, agent.sprites())
            losses = value_loss(
                value, part.values, part.targets, clip=args.value_clip, delta=args.huber_delta
            )
            loss = training_samples(args, losses, part.trained).mean()
            critic_norm = descend(loss, agent.critic, agent.critic_optimiser, args.max_grad_norm)

            scalars["policy_loss"].append(policy_loss.detach())
            scalars["value_loss"].append(loss.detach())
            scalars["entropy"].append(entropy.detach())
            scalars["actor_grad_norm"].append(actor_norm)
            scalars["critic_grad_norm"].append(critic_norm)
            ratios.append((ratio.detach(), centre, part.trained))
    means = {name: torch.stack(x).mean() for name, x in scalars.items()}
    check_finite(rewards=batch.rewards, features=batch.critic_features, **means)
    return means | diagnose(args, ratios)


# --- 8. Evaluate ----------------------------------------------------------------------------------


# [shared: meltingpot_players] begin
class NetPlayer:
    """A network as a Player of envs.meltingpot.episodes; samples actions, keeps hidden states."""

    def __init__(self, net: Actor, sprites: Sprites, seed: int):
        self.net, self.sprites = net, sprites
        self.rng = torch.Generator().manual_seed(seed)
        self.hidden: Tensor | None = None  # (B, N, S)

    def __call__(self, obs: Observation, starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        device = self.sprites.device
        ids = send(torch.from_numpy(ids), device)
        if self.hidden is None:
            self.hidden = torch.zeros(*ids.shape, self.net.hidden_size, device=device)
        tile_ids, features, _, _ = observe(obs, device, ids, self.net.num_ids)
        starts = send(torch.from_numpy(starts), device)
        views = Views(tile_ids, features, starts)
        log_probs, self.hidden = act(self.net, views, self.hidden, self.sprites)
        return sample(log_probs, self.rng).cpu().numpy()


# [shared: meltingpot_players] end


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_player(path: str, envs: Any, seed: int = 0, network: str = "actor") -> Player:
    """Load the actor ("distilled": phi) of a run or checkpoint as a player in the worlds `envs`."""
    args = saved_args(path, Args)
    saved, _ = load_checkpoint(path)
    with make_envs(args, 1, 1) as trained_in:
        agent = Agent(args, trained_in, torch.device("cpu"))
    restore(agent.parts()[network], saved["agent"][network], path)
    if network == "distilled":
        check_kept(agent, path)
    return NetPlayer(agent.parts()[network], Sprites(envs, agent.device), seed)


def check_kept(agent: Agent, source: str) -> None:
    """UsageError if phi, restored from `source`, was left out of it (experiments/zoo.py)."""
    if any(weight.is_meta for weight in agent.distilled.parameters()):
        raise UsageError(f"{source} holds no distilled policy.")


def load_background(args: Args, agent: Agent) -> dict[str, Actor]:
    """{path: actor} for each path in --background; UsageError if an actor does not fit."""
    if args.background and args.num_focal >= agent.spec.num_agents > 1:
        seats = f"--num-focal {args.num_focal} of {agent.spec.num_agents} seats"
        raise UsageError(f"{seats} leaves none to a co-player.")
    others = {}
    for path in set(args.background) - {"random", "distilled"}:
        saved, _ = load_checkpoint(path)
        if saved["args"].get("substrate") != args.substrate:
            raise UsageError(f"{path} was not trained on {args.substrate}.")
        others[path] = agent.new_actor()
        restore(others[path], saved["agent"]["actor"], path)
    return others


def evaluate(
    args: Args, agent: Agent, others: dict[str, Actor], evaluation: Evaluation
) -> dict[str, dict[str, float]]:
    """Play full episodes without learning: self-play, then beside each co-player of --background,
    then beside the bots of each scenario of --eval-scenarios. Returns {name of the row: figures},
    as envs.meltingpot.episodes.summarise() computes them."""
    if ":" not in args.substrate:  # a world of your own may have no end but this one
        args = dataclasses.replace(args, max_episode_steps=0)
    rng = evaluation.rng

    def player(net: Actor, envs: Any) -> NetPlayer:
        sprites = Sprites(envs, agent.device)
        return NetPlayer(net, sprites, seed=int(rng.integers(2**31)))

    new_player = functools.partial(player, agent.actor)
    partners = {name: functools.partial(player, net) for name, net in others.items()}
    partners["distilled"] = functools.partial(player, agent.distilled)
    seed = int(rng.integers(2**31))
    with make_envs(args, min(args.num_envs, evaluation.episodes), seed) as envs:
        rows = background_rows(args, evaluation, envs, new_player, partners)
    return rows | scenario_rows(args, evaluation, new_player, id_roles=agent.spec.roles)


# --- 9. Train -------------------------------------------------------------------------------------


def report(batch: Batch, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the log has means of."""
    figures = scalars | importance_weights(batch) | compare(batch.theta, batch.phi)
    for name, who in (("trained", batch.trained), ("fictitious", ~batch.trained)):
        if who.any():
            figures[f"reward_per_1000/{name}"] = 1000 * batch.rewards[who].mean()
    figures["reward_per_1000/all"] = 1000 * batch.rewards.mean()
    return figures


def new_generators(seed: int, rank: int) -> list[torch.Generator]:
    """Two generators for each process (rank): one as in the parent script, one for the method."""
    seeds = np.random.SeedSequence((seed, rank)).generate_state(2).tolist()
    return [torch.Generator().manual_seed(x) for x in seeds]


def train(args: Args) -> int:
    """Train, or resume a run (--resume), or evaluate (--eval-only); returns the exit code."""
    with Run(args, table, LINE) as run:
        first_world = run.rank * args.num_envs
        envs = run.close_at_end(make_envs(args, args.num_envs, args.seed, first_world))
        agent = Agent(args, envs, run.device)
        run.restore(agent=agent)
        others = load_background(args, agent)
        scenarios, bots = find_scenarios(args)
        if scenarios:
            run.say(f"{bots} bots will play in {', '.join(scenarios)}")
        run.judge = functools.partial(evaluate, args, agent, others)
        if args.eval_only:
            if "distilled" in args.background:
                check_kept(agent, args.eval_only)
            return run.evaluate_only()

        rng, method_rng = new_generators(args.seed, run.rank)
        state = new_state(agent, args.num_envs)
        if not args.resume:
            envs.reset()
        log = EpisodeLog(gather)
        own = {"rng": rng, "method_rng": method_rng, "envs": envs, "state": state, "log": log}
        share = fictitious_share(args, envs.spec.num_agents)
        run.begin(
            args.substrate,
            parts={"agent": agent},
            own=own,
            bots=bots,
            amp=agent.amp,
            fictitious_share=share,
        )
        if args.resume and not envs.reproducible:  # all worlds begin new episodes
            state = new_state(agent, args.num_envs)
        run.say(f"{run.dir}: {share:.0%} of all agents will be fictitious")
        while run.goes_on():
            batch, state = collect(args, envs, agent, state, rng=rng, method_rng=method_rng)
            run.lap("collect_s")
            envs.check()  # lets workers build the next episodes during the update
            batch, state = prepare(args, agent, batch, state)
            scalars = update(args, agent, batch, rng)
            if args.copy_every and (run.iteration + 1) % args.copy_every == 0:
                agent.copy_actor()
                state = dataclasses.replace(state, distilled_hidden=state.actor_hidden)
            if phase := distillation_phase(args, run.iteration + 1):
                found, state = distill(args, agent, batch, state, phase=phase, rng=method_rng)
                scalars |= found
                before, after = found[f"{phase}/kl_before"], found[f"{phase}/kl_after"]
                run.say(f"{phase} distillation: KL {before:.3g} -> {after:.3g}")
            own["state"] = state
            log.episodes += batch.episodes
            run.note(report(batch, scalars))
            run.lap("learn_s")
            run.advance(args.rollout_steps * args.num_envs * run.size)
            if run.is_due(args.log_every):
                run.log(log.means())
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                run.evaluate("eval")
        return run.finish()


def parse(argv: list[str]) -> Args:
    return read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS)


def main(argv: list[str] | None = None) -> int:
    """Run the script with arguments argv, default sys.argv[1:]; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    return call(lambda: train(parse(given)), WorldError)


if __name__ == "__main__":
    leave(main())
