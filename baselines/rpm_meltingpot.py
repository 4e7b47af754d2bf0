"""RPM: ranked policy memory (Qiu et al., "RPM: Generalizable Multi-Agent Policies for Multi-Agent
Reinforcement Learning", ICLR 2023): population play whose memory is ordered by return.

The memory Psi holds past actors in ranks, by the return that they reached. At the start of an
episode, each agent gets the current policy theta or, with probability p, a past actor: a rank is
drawn, then an actor of that rank, so that theta plays with actors of rare and of common returns
equally often. RPM is a baseline of BiDist (Feng et al., AAMAS 2025, Sec. 5.1 and App. B.1).

    kappa = floor(R / psi)     rank of theta;  R: return per 1,000 steps of agents that theta played
    Psi[kappa] <- Psi[kappa] + theta
    who_i = theta with 1 - p, else uniform from Psi[kappa'], kappa' uniform from the ranks of Psi;
            at least one theta per world
    J(theta) = E_{i: who_i = theta} min(r A_i, clip(r, 1 -+ eps) A_i),  r = pi_theta / pi_theta_old
    --use-history: all i, with r = pi_theta / pi_who_i,  clip(r, w (1 -+ eps)),
                   w = pi_theta_old / pi_who_i

    python baselines/rpm_meltingpot.py                                     the paper's settings
    python baselines/rpm_meltingpot.py --resume runs/RUN --total-timesteps 2000000
    python baselines/rpm_meltingpot.py --eval-only runs/RUN --background past runs/OTHER
    torchrun --nproc-per-node 2 baselines/rpm_meltingpot.py                16 worlds per process

Letters: T steps, B worlds, N agents, A actions, F features, H W tiles of a view (H' W' of the
global view), S units of a hidden state, L steps per chunk, C chunks per world and rollout, M of
them per minibatch. Decisions where the paper is silent: docs/baselines_meltingpot.md,
docs/bidist.md. A diff with baselines/pp_meltingpot.py shows the method only. Equations, tables:
BiDist's.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    read_args,
    restore,
    saved_args,
    send,
    tell,
)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.meltingpot.episodes import EpisodeLog, Player, in_turn, table
from envs.meltingpot.scenarios import background_rows, find_scenarios, scenario_rows
from envs.meltingpot.tile_tensors import Sprites, TileTables, ids_on
from envs.meltingpot.tiles import Episode, Observation, Spec, WorldError

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """RPM on MAPPO in Melting Pot. Defaults: BiDist's paper (App. B.1, Table B.1)."""

    # Environment
    substrate: str = "chicken_in_the_matrix__repeated"  # Melting Pot substrate, toy or module:Class
    num_envs: Positive = 16  # B, parallel worlds per process (Table B.1: rollout threads)
    num_workers: Count = 0  # processes that step Melting Pot's worlds; 0: one per CPU core
    worker_timeout: Above = 8.0  # seconds without a sign of life from a worker until the run ends
    max_episode_steps: Count = 0  # steps until training episodes (own worlds: all) end; 0: never
    team_reward: bool = False  # reward every agent with the sum of all agents' rewards
    # Method
    history_share: Share = 0.3  # p, probability that an agent acts with a past policy
    rank_width: Above | None = None  # psi, returns per 1,000 steps; default: makes 6 to 11 ranks
    per_rank: Positive = 20  # past actors that are kept per rank, a uniform sample of all
    policies_per_rollout: Positive = 4  # past actors drawn (again, too) for a rollout
    use_history: bool = False  # samples of past policies train theta, too
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
    background: tuple[str, ...] = ("random", "past")  # co-players: random, past, run directories
    num_focal: Count = 0  # seats of the trained policy beside --background; 0: N - 1
    eval_ids: Literal["random", "slot"] = "random"  # ids: drawn in each role (Eq. 2), or the seat's
    eval_scenarios: str = "all"  # all (of the paper's substrates: SC0 to SC4), none or SC0,SC3
    bots: Literal["auto", "official", "scripted"] = "auto"  # auto: official if found, else scripted


def validate(args: Args) -> list[tuple[Any, str]]:
    """(condition, error message) pairs: the flags are rejected if a condition is true."""
    chunks = args.rollout_steps // args.chunk_length * args.num_envs
    alone = not args.history_share
    narrow = args.rank_width is not None and args.rank_width < 1e-9  # a rank could be infinite
    return [
        (args.rollout_steps % args.chunk_length, "--chunk-length must divide --rollout-steps"),
        (args.minibatches > chunks, f"--minibatches exceeds the {chunks} chunks of a rollout"),
        (args.use_history and alone, "--use-history has no samples with --history-share 0"),
        (narrow, "--rank-width must be at least 1e-9"),
    ]


LINE = ("episode/return", "entropy", "sps")  # scalars to print where there is no terminal
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
# As many samples from more worlds and shorter rollouts: 1.3 times as fast on two idle cores.
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


class TileCNN(nn.Module):
    """The paper's two convolutions and the linear layer after them, each with ReLU (App. B.2).

    The input is tile ids, because every image is a grid of sprites of 8 x 8 pixels. By default,
    lookup tables compute the same function faster. A changed TileCNN must be run with --plain.
    """

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        rows, columns = (max(size, KERNEL) for size in grid)
        # Views smaller than the kernel are padded with black tiles (id 0) below and to the right.
        self.padding = (0, columns - grid[1], 0, rows - grid[0])
        inputs = 32 * (rows - KERNEL + 1) * (columns - KERNEL + 1)
        self.conv1 = orthogonal(nn.Conv2d(3, 16, 8, stride=8), RELU)
        self.conv2 = orthogonal(nn.Conv2d(16, 32, KERNEL), RELU)
        self.linear = orthogonal(nn.Linear(inputs, 64), RELU)

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

    def __init__(self, spec: Spec, plain: bool):
        super().__init__()
        self.num_ids, self.hidden_size = spec.num_agents, 128
        features = spec.num_features + self.num_ids
        cnn = TileCNN(spec.grid)
        self.cnn = cnn if plain else TileTables(cnn)
        self.mlp = orthogonal(nn.Linear(64, 64), RELU)
        self.norm = nn.LayerNorm(features)  # observation normalisation (App. B.1)
        self.gru = orthogonal(nn.GRU(64 + features, self.hidden_size), 1.0)
        self.head = orthogonal(nn.Linear(self.hidden_size, 64), RELU)
        self.out = orthogonal(nn.Linear(64, spec.num_actions), 0.01)

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

    def new_actor(self) -> Actor:
        return Actor(self.spec, self.args.plain).to(self.device)

    def past_actor(self, weights: Weights) -> Actor:
        net = copy.deepcopy(self.actor)
        net.load_state_dict(weights)
        return net

    def new_optimiser(self, net: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr, eps=self.args.adam_eps, fused=True)

    def autocast(self) -> torch.autocast:
        """--amp: bfloat16 in the critic. Actors stay in float32, for the ratio of Eq. (9)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# --- 5. The paper ---------------------------------------------------------------------------------

CURRENT = -1  # in `players`: theta acts
MOST_WIDTHS = 10  # number of ranks' widths that may span all returns, where psi is the default
Weights = dict[str, Tensor]  # the state_dict of an actor, on the CPU


def weights_of(actor: Actor) -> Weights:
    """A copy of an actor's weights, on the CPU."""
    weights = {}
    for name, x in actor.state_dict().items():
        weights[name] = x.cpu().clone()
    return weights


@dataclasses.dataclass
class Memory:
    """Psi, past actors by rank, equal in all processes and saved in checkpoints."""

    width: float | None  # psi; None: by the range of the returns met so far
    per_rank: int  # largest number of actors in a rank
    rng: torch.Generator
    actors: list[Weights] = dataclasses.field(default_factory=list)
    returns: list[float] = dataclasses.field(default_factory=list)  # R of each actor
    keys: list[float] = dataclasses.field(default_factory=list)  # a random number of each actor
    met: list[float] = dataclasses.field(default_factory=list)  # R of all actors so far

    def psi(self) -> float:
        """The width of a rank, in returns per 1,000 steps."""
        if self.width is not None:
            return self.width
        # paper is silent: psi; here the smallest power of 2 of which MOST_WIDTHS span all returns
        # met so far. As it grows, ranks merge in pairs; none is ever split.
        spread = max(self.met) - min(self.met)
        return 2.0 ** math.ceil(math.log2(max(spread, 1e-9) / MOST_WIDTHS))

    def rank(self, mean_return: float) -> int:
        """The rank kappa of a return."""
        return math.floor(mean_return / self.psi())

    def ranks(self) -> dict[int, list[int]]:
        """{rank: indices of its actors in self.actors, the oldest first}."""
        ranks = collections.defaultdict(list)
        for place, mean_return in enumerate(self.returns):
            ranks[self.rank(mean_return)].append(place)
        return ranks

    def append(self, actor: Actor, mean_return: float) -> None:
        """Add an actor; a rank that has become too large loses one, or several if ranks merged."""
        self.met.append(mean_return)
        self.actors.append(weights_of(actor))
        self.returns.append(mean_return)
        self.keys.append(float(torch.rand((), generator=self.rng)))
        # paper and code differ: the paper keeps all. Here a rank keeps the actors with the smallest
        # keys: a uniform sample of all that ever had this rank, also after ranks have merged.
        kept = []
        for places in self.ranks().values():
            kept += sorted(places, key=self.keys.__getitem__)[: self.per_rank]
        kept.sort()
        self.actors = [self.actors[place] for place in kept]
        self.returns = [self.returns[place] for place in kept]
        self.keys = [self.keys[place] for place in kept]

    def draw(self, count: int, rng: torch.Generator) -> list[Weights]:
        """Draw `count` actors, each from a uniformly drawn rank; an actor may be drawn twice."""
        ranks, drawn = list(self.ranks().values()), []
        for _ in range(count if ranks else 0):
            rank = int(torch.randint(len(ranks), (), generator=rng))
            choice = int(torch.randint(len(ranks[rank]), (), generator=rng))
            place = ranks[rank][choice]
            drawn.append(self.actors[place])
        return drawn


def new_memory(args: Args) -> Memory:
    rng = torch.Generator().manual_seed(args.seed)
    return Memory(args.rank_width, args.per_rank, rng)


def remember(memory: Memory, actor: Actor, batch: Batch) -> None:
    """Append an actor with R of the episodes that ended in a rollout, over all processes."""
    check_finite(rewards=batch.rewards)
    device = batch.rewards.device
    returns = torch.tensor(batch.returns, dtype=torch.float64, device=device)
    _, mean_return, _ = moments(returns).tolist()
    # paper is silent: rollouts are shorter than most episodes. If no episode ended in this one, its
    # actor has no return (NaN) and so no rank: it is not kept.
    if not math.isnan(mean_return):
        memory.append(actor, mean_return)


def draw_players(args: Args, shape: torch.Size, drawn: int, rng: torch.Generator) -> Tensor:
    """Draw who acts, for shape (B, N) -> (B, N) int64: one of `drawn` past actors, or CURRENT."""
    past = torch.rand(shape, generator=rng) < args.history_share
    # paper is silent: at least one agent, drawn at random, is current in each world
    spared = torch.rand(shape, generator=rng).argmax(1)
    everyone = past.all(1)
    past[everyone, spared[everyone]] = False
    players = torch.randint(max(1, drawn), shape, generator=rng)
    return torch.where(past & (drawn > 0), players, CURRENT)


def recruit(state: RolloutState, drawn: list[Weights]) -> RolloutState:
    """The state with a new crew: the actors drawn, then those whose episodes are under way."""
    players, crew = torch.full_like(state.players, CURRENT), list(drawn)
    staying = state.players.masked_fill(state.starts[:, None], CURRENT)
    for place in staying.unique().tolist():
        if place != CURRENT:
            players[staying == place] = len(crew)  # the place in the new crew
            crew.append(state.crew[place])
    return dataclasses.replace(state, players=players, crew=crew)


def act_past(
    nets: list[Actor], views: Views, state: RolloutState, theta: Tensor, sprites: Sprites
) -> tuple[Tensor, Tensor]:
    """Run the past actors for one step; views without axis T, theta: log-probabilities (B, N, A).
    Returns those of the policies that act (B, N, A), and the past actors' next hidden (B, N, S)."""
    acting, after = theta.clone(), state.past_hidden.clone()
    for place, net in enumerate(nets):
        b, n = (state.players == place).nonzero(as_tuple=True)
        if len(b):  # len(b) worlds with one agent each
            ids, features = views.ids[b, n, None], views.features[b, n, None]
            rows = Views(ids, features, views.starts[b])
            hidden = state.past_hidden[b, n, None]
            log_probs, hidden = act(net, rows, hidden, sprites)
            acting[b, n] = log_probs[:, 0]
            after[b, n] = hidden[:, 0]
    return acting, after


def clip_centre(batch: Batch) -> Tensor:
    """w = pi_theta_old / pi_who of the actions, (T, B, N) or (L, M, N); 1 where theta acted."""
    # The ratio of a past policy's sample starts at w. Outside a clip around 1, only gradients that
    # pull theta to that policy would pass. A clip around w bounds the step from theta_old.
    return (batch.theta - batch.log_probs).exp()


def training_samples(args: Args, x: Tensor, current: Tensor) -> Tensor:
    """Select from x (..., N) what trains theta: its own samples, or all with --use-history."""
    # paper is silent: which samples train theta; those of past policies are off-policy
    return x if args.use_history or current.all() else x[current]


def importance_weights(batch: Batch) -> dict[str, Tensor]:
    """For past policies' samples before the update: the largest weight w = pi_theta / pi_past, and
    the effective sample size (sum w)^2 / sum w^2 as a share of the number of samples."""
    past = ~batch.current
    if not past.any():
        return {}
    weight = clip_centre(batch)[past]
    effective = weight.sum() ** 2 / (weight**2).sum()
    return {
        "weight_max": weight.max(),
        "effective_samples": effective / weight.numel(),
    }


# --- 6. Data --------------------------------------------------------------------------------------


@dataclasses.dataclass
class RolloutState:
    """What a rollout needs from the one before it."""

    starts: Tensor  # (B,) bool, the next step is the first of an episode
    previous: Tensor  # (B, N) int64, previous actions; -1: none yet in this episode
    actor_hidden: Tensor  # (B, N, S)
    critic_hidden: Tensor  # (B, N, S)
    past_hidden: Tensor  # (B, N, S) of past actors; not used where theta acts
    players: Tensor  # (B, N) int64, who acts: a place in the crew, or CURRENT
    crew: list[Weights]  # the past actors of a rollout


def new_state(agent: Agent, num_envs: int) -> RolloutState:
    """The state at which all worlds begin an episode."""
    shape, device = (num_envs, agent.spec.num_agents), agent.device
    return RolloutState(
        starts=torch.ones(num_envs, dtype=torch.bool, device=device),
        previous=torch.full(shape, -1, device=device),
        actor_hidden=torch.zeros(*shape, agent.actor.hidden_size, device=device),
        critic_hidden=torch.zeros(*shape, agent.critic.hidden_size, device=device),
        past_hidden=torch.zeros(*shape, agent.actor.hidden_size, device=device),
        players=torch.full(shape, CURRENT, device=device),
        crew=[],
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
    current: Tensor  # (T, B, N) bool, True where theta acted
    theta: Tensor  # (T, B, N) float32, log-probabilities of the actions under theta
    actor_hidden: Tensor  # (C, B, N, S), hidden states of theta before each chunk
    finals: list[tuple[int, int, Views]]  # t, b, final critic view (1, 1, ...) of each truncation
    episodes: list[Episode]  # those that ended in this rollout
    returns: list[float]  # per 1,000 steps in them, of each agent that theta played
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
    memory: Memory,
    state: RolloutState,
    rng: torch.Generator,
    method_rng: torch.Generator,
) -> tuple[Batch, RolloutState]:
    """Play T steps in every world from `state` on; returns the rollout and the state after it."""
    device, shape = agent.device, state.previous.shape
    num_actions = envs.spec.num_actions
    record = collections.defaultdict(list)
    finals, episodes, returns = [], [], []

    def add(**tensors: Tensor) -> None:
        for name, x in tensors.items():
            record[name].append(x)

    drawn = memory.draw(args.policies_per_rollout, method_rng)
    state = recruit(state, drawn)
    nets = [agent.past_actor(weights) for weights in state.crew]
    for t in range(args.rollout_steps + 1):
        tile_ids, actor_features, world_ids, features = observe(envs.obs, device)
        joint = joint_features(features, state.previous, num_actions)
        add(world_ids=world_ids, critic_features=joint, starts=state.starts)
        if t == args.rollout_steps:  # the step after the rollout is for the critic alone
            break
        if state.starts.any():
            players = draw_players(args, shape, len(drawn), method_rng)
            players = send(players, device)
            players = torch.where(state.starts[:, None], players, state.players)
            state = dataclasses.replace(state, players=players)
        if t % args.chunk_length == 0:
            add(actor_hidden=state.actor_hidden)
        views = Views(tile_ids, actor_features, state.starts)
        theta, actor_hidden = act(agent.actor, views, state.actor_hidden, agent.sprites)
        acting, past_hidden = act_past(nets, views, state, theta, agent.sprites)
        actions = sample(acting, rng)
        add(tile_ids=tile_ids, actor_features=actor_features)
        add(actions=actions, log_probs=chosen(acting, actions))
        add(current=state.players == CURRENT, theta=chosen(theta, actions))

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
        for episode in step.episodes:
            ours = state.players[episode.world] == CURRENT
            # paper and code differ: there R is the whole return. In chicken and coins episodes end
            # at random, and their length, 400 steps (coins) to thousands, would decide the rank.
            rates = 1000 * episode.returns / episode.length
            if args.team_reward:  # theta learns from the sum of all agents' rewards
                rates = np.full_like(rates, rates.sum())
            returns += rates[ours.cpu().numpy()].tolist()
        ended = terminated | truncated
        state = dataclasses.replace(
            state,
            starts=ended,
            previous=actions.masked_fill(ended[:, None], -1),
            actor_hidden=actor_hidden,
            past_hidden=past_hidden,
        )
    tensors = {name: torch.stack(x) for name, x in record.items()}
    batch = Batch(**tensors, finals=finals, episodes=episodes, returns=returns)
    return batch, state


def prepare(
    args: Args, agent: Agent, batch: Batch, state: RolloutState
) -> tuple[Batch, RolloutState]:
    """Update agent.value_norm and add to the rollout what the losses need (last fields of Batch).
    Returns the rollout, and the state with the critic's new hidden states."""
    values, advantages, hidden = estimate(args, agent, batch, state.critic_hidden)
    returns = values + advantages
    # paper is silent: returns and advantages are normalised once, before the epochs
    agent.value_norm.update(moments(training_samples(args, returns, batch.current)))
    mean, std = agent.value_norm.mean_std()
    ours = training_samples(args, advantages, batch.current)
    _, average, square = moments(ours)
    deviation = (square - average**2).clamp(min=0).sqrt()
    batch = dataclasses.replace(
        batch,
        critic_hidden=hidden[:-1],
        values=(values - mean) / std,
        targets=(returns - mean) / std,
        advantages=(advantages - average) / (deviation + 1e-5),
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


def clip_objective(ratio: Tensor, advantage: Tensor, clip: float, centre: Tensor) -> Tensor:
    """PPO's clipped objective of each sample; ratio: pi_theta / pi_who of its action; centre: the
    value around which the ratio is clipped, by a share `clip` of it."""
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
    scalars = collections.defaultdict(list)
    for _ in range(args.epochs):
        for part in minibatches(args, batch, rng):
            logits, _ = agent.actor(part.actor_views(), part.actor_hidden, agent.sprites())
            log_probs = logits.log_softmax(-1)  # (L, M, N, A)
            log_prob = chosen(log_probs, part.actions)
            ratio = (log_prob - part.log_probs).exp()
            objective = clip_objective(ratio, part.advantages, args.clip, clip_centre(part))
            policy_loss = -training_samples(args, objective, part.current).mean()
            entropies = -(log_probs.exp() * log_probs).sum(-1)
            entropy = training_samples(args, entropies, part.current).mean()
            loss = policy_loss - args.entropy_coef * entropy
            actor_norm = descend(loss, agent.actor, agent.actor_optimiser, args.max_grad_norm)

            with agent.autocast():
                views = part.critic_views()
                value, _ = agent.critic(views, part.critic_hidden, agent.sprites())
            losses = value_loss(
                value, part.values, part.targets, clip=args.value_clip, delta=args.huber_delta
            )
            loss = training_samples(args, losses, part.current).mean()
            critic_norm = descend(loss, agent.critic, agent.critic_optimiser, args.max_grad_norm)

            scalars["policy_loss"].append(policy_loss.detach())
            scalars["value_loss"].append(loss.detach())
            scalars["entropy"].append(entropy.detach())
            scalars["actor_grad_norm"].append(actor_norm)
            scalars["critic_grad_norm"].append(critic_norm)
    means = {name: torch.stack(x).mean() for name, x in scalars.items()}
    check_finite(rewards=batch.rewards, features=batch.critic_features, **means)
    return means


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
def load_player(path: str, envs: Any, seed: int = 0) -> Player:
    """Load the actor of a run directory or checkpoint as a player in the worlds `envs`."""
    args = saved_args(path, Args)
    saved, _ = load_checkpoint(path)
    with make_envs(args, 1, 1) as trained_in:
        agent = Agent(args, trained_in, torch.device("cpu"))
    restore(agent.actor, saved["agent"]["actor"], path)
    return NetPlayer(agent.actor, Sprites(envs, agent.device), seed)


def load_background(args: Args, agent: Agent) -> dict[str, Actor]:
    """{path: actor} for each path in --background; UsageError if an actor does not fit."""
    if args.background and args.num_focal >= agent.spec.num_agents > 1:
        seats = f"--num-focal {args.num_focal} of {agent.spec.num_agents} seats"
        raise UsageError(f"{seats} leaves none to a co-player.")
    others = {}
    for path in set(args.background) - {"random", "past"}:
        saved, _ = load_checkpoint(path)
        if saved["args"].get("substrate") != args.substrate:
            raise UsageError(f"{path} was not trained on {args.substrate}.")
        others[path] = agent.new_actor()
        restore(others[path], saved["agent"]["actor"], path)
    return others


def evaluate(
    args: Args,
    agent: Agent,
    memory: Memory,
    others: dict[str, Actor],
    evaluation: Evaluation,
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

    def past(envs: Any) -> Player:
        draws = torch.Generator().manual_seed(int(rng.integers(2**31)))
        drawn = memory.draw(args.policies_per_rollout, draws)
        return in_turn([player(agent.past_actor(x), envs) for x in drawn])

    if memory.actors:  # none before the first episode has ended
        partners["past"] = past
    elif evaluation.final and "past" in args.background:
        none = f"{args.eval_only} holds" if args.eval_only else "So far there are"
        tell(f"{none} no past actors, so no row is of them.")
    seed = int(rng.integers(2**31))
    with make_envs(args, min(args.num_envs, evaluation.episodes), seed) as envs:
        rows = background_rows(args, evaluation, envs, new_player, partners)
    return rows | scenario_rows(args, evaluation, new_player, id_roles=agent.spec.roles)


# --- 9. Train -------------------------------------------------------------------------------------


def report(batch: Batch, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the log has means of."""
    figures = scalars | importance_weights(batch)
    for name, who in (("current", batch.current), ("past", ~batch.current)):
        if who.any():
            figures[f"reward_per_1000/{name}"] = 1000 * batch.rewards[who].mean()
    figures["reward_per_1000/all"] = 1000 * batch.rewards.mean()
    figures["memory/share"] = (~batch.current).float().mean()
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
        memory = new_memory(args)
        run.restore(agent=agent, memory=memory)
        for weights in memory.actors[:1]:  # UsageError if they do not fit
            restore(copy.deepcopy(agent.actor), weights, run.source)
        others = load_background(args, agent)
        scenarios, bots = find_scenarios(args)
        if scenarios:
            run.say(f"{bots} bots will play in {', '.join(scenarios)}")
        run.judge = functools.partial(evaluate, args, agent, memory, others)
        if args.eval_only:
            typed = args.background != Args.background and "past" in args.background
            if typed and not memory.actors:
                raise UsageError(f"--background past: {args.eval_only} holds no past actors.")
            return run.evaluate_only()

        rng, method_rng = new_generators(args.seed, run.rank)
        state = new_state(agent, args.num_envs)
        if not args.resume:
            envs.reset()
        log = EpisodeLog(gather)
        own = {"rng": rng, "method_rng": method_rng, "envs": envs, "state": state, "log": log}
        parts = {"agent": agent, "memory": memory}
        run.begin(args.substrate, parts=parts, own=own, bots=bots, amp=agent.amp)
        if args.resume and not envs.reproducible:  # all worlds begin new episodes
            state = new_state(agent, args.num_envs)
        while run.goes_on():
            batch, state = collect(args, envs, agent, memory, state, rng=rng, method_rng=method_rng)
            run.lap("collect_s")
            envs.check()  # lets workers build the next episodes during the update
            batch, state = prepare(args, agent, batch, state)
            remember(memory, agent.actor, batch)  # the actor that has just acted, before its update
            scalars = update(args, agent, batch, rng)
            own["state"] = state
            log.episodes += batch.episodes
            run.note(report(batch, scalars))
            run.lap("learn_s")
            run.advance(args.rollout_steps * args.num_envs * run.size)
            if run.is_due(args.log_every):
                sizes = {"actors": len(memory.actors), "ranks": len(memory.ranks())}
                run.log(log.means() | {f"memory/{name}": x for name, x in sizes.items()})
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
