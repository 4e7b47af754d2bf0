"""OPRE: OPtions as REsponses (Vezhnevets et al., ICML 2020) on MAPPO, a baseline of BiDist's paper.

The policy mixes K options eta. In training, a posterior q, which sees the world and all players,
weights the options by what the others do; a prior p learns to predict q from an agent's history.

    mu(a|o) = sum_z p(z|o) eta(a|o, z)       acts, in training and evaluation
    pi(a|o, s) = sum_z q(z|s) eta(a|o, z)    is trained;  r = pi / mu_old, w = pi_old / mu_old
    J = E min(r A, clip(r, w (1 -+ eps)) A) + c_H H(pi)                 trains eta and q
        - KL(q || p)                              trains p (weight 1) and q (weight .01)
    V(s) = sum_z q(z|s) c(s, z)              the value loss trains c

    python baselines/opre_meltingpot.py                                      the paper's settings
    torchrun --nproc-per-node 2 baselines/opre_meltingpot.py                 16 worlds per process

Letters: T steps, B worlds, N agents, A actions, K options, F features, H W tiles of a view (H' W'
of the global view), S units of a hidden state, L steps per chunk, C chunks per world and rollout, M
of them per minibatch; o an agent's history, s the world, old: before this update. Eq. (9) and
tables are BiDist's (AAMAS 2025). Decisions: docs/baselines_meltingpot.md, for MAPPO docs/bidist.md.
Worlds: docs/meltingpot.md.
"""

from __future__ import annotations

import collections
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
)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.meltingpot.episodes import EpisodeLog, Player, table
from envs.meltingpot.scenarios import background_rows, find_scenarios, scenario_rows
from envs.meltingpot.tile_tensors import Sprites, TileTables, ids_on
from envs.meltingpot.tiles import Episode, Observation, Spec, WorldError

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """OPRE on MAPPO in Melting Pot. Defaults are those of BiDist's paper (Table B.1)."""

    # Environment
    substrate: str = "chicken_in_the_matrix__repeated"  # Melting Pot substrate, toy or module:Class
    num_envs: Positive = 16  # B, parallel worlds per process (Table B.1: rollout threads)
    num_workers: Count = 0  # processes that step Melting Pot's worlds; 0: one per CPU core
    worker_timeout: Above = 8.0  # seconds without a sign of life from a worker until the run ends
    max_episode_steps: Count = 0  # steps until training episodes (own worlds: all) end; 0: never
    team_reward: bool = False  # reward every agent with the sum of all agents' rewards
    # Method
    num_options: Positive = 16  # K, number of options (App. B.1)
    prior_coef: Amount = 1.0  # weight of KL(q || p) in the loss of the prior p
    posterior_coef: Amount = 0.01  # weight of KL(q || p) in the loss of the posterior q
    critic_form: Literal["options", "plain"] = "options"  # K values, mixed by q, or one value
    share_critic: bool = False  # q uses the critic's CNN and does not train it
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
    background: tuple[str, ...] = ("random",)  # co-players in evaluation: random, run directories
    num_focal: Count = 0  # seats of the trained policy beside --background; 0: N - 1
    eval_ids: Literal["random", "slot"] = "random"  # ids: drawn in each role (Eq. 2), or the seat's
    eval_scenarios: str = "all"  # all (of the paper's substrates: SC0 to SC4), none or SC0,SC3
    bots: Literal["auto", "official", "scripted"] = "auto"  # auto: official if found, else scripted


def validate(args: Args) -> list[tuple[Any, str]]:
    """(condition, error message) pairs: the flags are rejected if a condition is true."""
    chunks = args.rollout_steps // args.chunk_length * args.num_envs
    # With one option p and q are 1, so both KL divergences are 0.
    single = args.num_options == 1 and not args.resume and not args.eval_only
    no_p = single and args.prior_coef != Args.prior_coef
    no_q = single and args.posterior_coef != Args.posterior_coef
    return [
        (args.rollout_steps % args.chunk_length, "--chunk-length must divide --rollout-steps"),
        (args.minibatches > chunks, f"--minibatches exceeds the {chunks} chunks of a rollout"),
        (no_p, "--num-options 1 leaves no use for --prior-coef"),
        (no_q, "--num-options 1 leaves no use for --posterior-coef"),
        (single and args.share_critic, "--num-options 1 leaves no use for --share-critic"),
    ]


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
    """CNN -> MLP of 2 x 64 -> GRU of 128 -> MLP of 64 -> logits of the actions (App. B.2) for every
    option, and the prior. The GRU also gets the agent's features and its one-hot id."""

    def __init__(self, args: Args, spec: Spec):
        super().__init__()
        self.num_ids, self.hidden_size = spec.num_agents, 128
        features = spec.num_features + self.num_ids
        cnn = TileCNN(spec.grid)
        self.cnn = cnn if args.plain else TileTables(cnn)
        self.mlp = orthogonal(nn.Linear(64, 64), RELU)
        self.norm = nn.LayerNorm(features)  # observation normalisation (App. B.1)
        self.gru = orthogonal(nn.GRU(64 + features, self.hidden_size), 1.0)
        self.head = orthogonal(nn.Linear(self.hidden_size, 64), RELU)
        self.out = orthogonal(nn.Linear(64, args.num_options * spec.num_actions), 0.01)
        self.prior = orthogonal(nn.Linear(64, args.num_options), 0.01)

    def options(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, ...]:
        """hidden (B, N, S) -> log p (T, B, N, K), log eta (T, B, N, K, A), states (T, B, N, S)."""
        x = self.cnn(views.ids.flatten(0, 2), sprites)
        x = F.relu(self.mlp(x))
        x = x.unflatten(0, views.ids.shape[:3])
        x = torch.cat([x, self.norm(views.features)], -1)
        states = run_gru(self.gru, x, views.starts, hidden)
        x = F.relu(self.head(states))
        prior = self.prior(x).log_softmax(-1)
        logits = self.out(x)  # (T, B, N, K * A)
        options = logits.unflatten(-1, (prior.shape[-1], -1))
        return prior, options.log_softmax(-1), states

    def forward(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, Tensor]:
        prior, options, states = self.options(views, hidden, sprites)
        return mixture(prior, options), states  # log mu (T, B, N, A): mu acts


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


class OptionHead(nn.Linear):
    """A last layer with K outputs (..., K, 1) for Critic, which removes the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., None]


class MixtureCritic(nn.Module):
    """V = sum_z q(z|s) c(s, z). The hidden states of c and q are concatenated (S = 2 * 128)."""

    def __init__(self, args: Args, spec: Spec):
        super().__init__()
        outputs = args.num_options if args.critic_form == "options" else 1
        # papers and code differ: their c sees the agent's own history; here the world, as MAPPO's
        self.values = Critic(spec, args.plain)  # c
        self.values.out = orthogonal(OptionHead(64, outputs), 1.0)
        self.posterior = Critic(spec, args.plain)  # paper is silent: q has the critic's layers
        # Gain 1, not .01: under a nearly uniform q, options that start alike would stay alike.
        self.posterior.out = orthogonal(OptionHead(64, args.num_options), 1.0)
        if args.share_critic:
            del self.posterior.cnn  # a method takes its place: no parameters for the optimiser
            self.posterior.cnn = self.borrowed_cnn
        self.hidden_size = 256

    @torch.no_grad()
    def borrowed_cnn(self, ids: Tensor, sprites: Tensor) -> Tensor:
        """The output of c's CNN, without gradients: q uses it and does not train it."""
        return self.values.cnn(ids, sprites)

    def options(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, ...]:
        """hidden (B, N, S) -> log q (T, B, N, K), values (T, B, N), states (T, B, N, S)."""
        ours, theirs = hidden.chunk(2, -1)
        values, ours = self.values(views, ours, sprites)
        with torch.autocast(hidden.device.type, enabled=False):  # float32: q is part of pi
            logits, theirs = self.posterior(views, theirs, sprites)
        posterior = logits.log_softmax(-1)
        weights = posterior.detach().exp()  # paper is silent: V does not train q
        values = (weights * values).sum(-1)
        return posterior, values, torch.cat([ours, theirs], -1)

    def forward(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, Tensor]:
        _, values, states = self.options(views, hidden, sprites)
        return values, states


class Agent(Parts):
    """The networks, their optimisers, and the sprites of the training worlds."""

    def __init__(self, args: Args, envs: Any, device: torch.device):
        self.args, self.spec, self.device = args, envs.spec, device
        self.amp = args.amp and has_bf16(device)
        self.sprites = Sprites(envs, device)
        torch.manual_seed(args.seed)
        self.actor = self.new_actor()
        self.critic = MixtureCritic(args, self.spec).to(device)
        self.value_norm = ValueNorm().to(device)
        self.actor_optimiser = self.new_optimiser(self.policy(), args.actor_lr)
        self.critic_optimiser = self.new_optimiser(self.critic.values, args.critic_lr)

    def new_actor(self) -> Actor:
        return Actor(self.args, self.spec).to(self.device)

    def policy(self) -> nn.ModuleList:
        return nn.ModuleList([self.actor, self.critic.posterior])

    def new_optimiser(self, net: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr, eps=self.args.adam_eps, fused=True)

    def autocast(self) -> torch.autocast:
        """--amp: bfloat16 in the critic. Actors stay in float32, for the ratio of Eq. (9)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# --- 5. The paper ---------------------------------------------------------------------------------


def mixture(weights: Tensor, options: Tensor) -> Tensor:
    """log sum_z w(z) eta(a|z) from log w (..., K) and log eta (..., K, A) -> (..., A)."""
    joint = weights[..., None] + options  # (..., K, A)
    return joint.logsumexp(-2)


def kl_divergence(posterior: Tensor, prior: Tensor) -> Tensor:
    """Mean KL(q || p), exact over options, from log-probabilities (..., K)."""
    divergences = (posterior.exp() * (posterior - prior)).sum(-1)
    return divergences.mean()


@torch.no_grad()
def describe(posterior: Tensor, prior: Tensor, options: Tensor) -> dict[str, Tensor]:
    """Scalars on the use of options, from log q, log p (..., K) and log eta (..., K, A)."""

    def entropy(p: Tensor) -> Tensor:
        return torch.special.entr(p).sum(-1)  # -sum p log p

    shares = posterior.exp().flatten(0, -2).mean(0)  # (K,)
    mu = mixture(prior, options).exp()  # (..., A)
    of_options = entropy(options.exp())  # (..., K)
    expected = (prior.exp() * of_options).sum(-1)
    return {
        "kl": kl_divergence(posterior, prior),
        "prior_entropy": entropy(prior.exp()).mean(),
        "posterior_entropy": entropy(posterior.exp()).mean(),
        "options_used": entropy(shares).exp(),  # effective number by q, 1 to K
        "option_information": (entropy(mu) - expected).mean(),  # I(a; z | o) of mu; 0 if all alike
    }


# --- 6. Data --------------------------------------------------------------------------------------


@dataclasses.dataclass
class RolloutState:
    """What a rollout needs from the one before it."""

    starts: Tensor  # (B,) bool, the next step is the first of an episode
    previous: Tensor  # (B, N) int64, previous actions; -1: none yet in this episode
    actor_hidden: Tensor  # (B, N, S)
    critic_hidden: Tensor  # (B, N, S)


def new_state(agent: Agent, num_envs: int) -> RolloutState:
    """The state at which all worlds begin an episode."""
    shape, device = (num_envs, agent.spec.num_agents), agent.device
    return RolloutState(
        starts=torch.ones(num_envs, dtype=torch.bool, device=device),
        previous=torch.full(shape, -1, device=device),
        actor_hidden=torch.zeros(*shape, agent.actor.hidden_size, device=device),
        critic_hidden=torch.zeros(*shape, agent.critic.hidden_size, device=device),
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
    log_probs: Tensor  # (T, B, N) float32, of the actions under mu, the policy that acted
    options: Tensor  # (T, B, N, K) float32, log eta of the actions under each option
    rewards: Tensor  # (T, B, N) float32
    terminated: Tensor  # (T, B) bool
    truncated: Tensor  # (T, B) bool
    actor_hidden: Tensor  # (C, B, N, S), hidden states before each chunk
    finals: list[tuple[int, int, Views]]  # t, b, final critic view (1, 1, ...) of each truncation
    episodes: list[Episode]  # those that ended in this rollout
    critic_hidden: Tensor | None = None  # (C, B, N, S); prepare() fills this field and those below
    old_log_probs: Tensor | None = None  # (T, B, N) float32, of the actions under pi_old
    values: Tensor | None = None  # (T, B, N) float32, before the update, normalised
    targets: Tensor | None = None  # (T, B, N) float32, GAE returns, normalised
    advantages: Tensor | None = None  # (T, B, N) float32, normalised

    def actor_views(self) -> Views:
        starts = self.starts[: len(self.tile_ids)]
        return Views(self.tile_ids, self.actor_features, starts)

    def critic_views(self) -> Views:
        return Views(self.world_ids, self.critic_features, self.starts)


@torch.no_grad()
def collect(
    args: Args, envs: Any, agent: Agent, state: RolloutState, rng: torch.Generator
) -> tuple[Batch, RolloutState]:
    """Play T steps in every world from `state` on; returns the rollout and the state after it."""
    device, shape = agent.device, state.previous.shape
    num_actions = envs.spec.num_actions
    record = collections.defaultdict(list)
    finals, episodes = [], []

    def add(**tensors: Tensor) -> None:
        for name, x in tensors.items():
            record[name].append(x)

    for t in range(args.rollout_steps + 1):
        tile_ids, actor_features, world_ids, features = observe(envs.obs, device)
        joint = joint_features(features, state.previous, num_actions)
        add(world_ids=world_ids, critic_features=joint, starts=state.starts)
        if t == args.rollout_steps:  # the step after the rollout is for the critic alone
            break
        if t % args.chunk_length == 0:
            add(actor_hidden=state.actor_hidden)
        views = Views(tile_ids[None], actor_features[None], state.starts[None])
        outputs = agent.actor.options(views, state.actor_hidden, agent.sprites())
        prior, options, actor_hidden = (x[0] for x in outputs)
        acting = mixture(prior, options)  # mu
        actions = sample(acting, rng)
        add(tile_ids=tile_ids, actor_features=actor_features)
        add(actions=actions, log_probs=chosen(acting, actions))
        add(options=chosen(options, actions[..., None].expand(prior.shape)))

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
        )
    tensors = {name: torch.stack(x) for name, x in record.items()}
    return Batch(**tensors, finals=finals, episodes=episodes), state


def prepare(
    args: Args, agent: Agent, batch: Batch, state: RolloutState
) -> tuple[Batch, RolloutState]:
    """Update agent.value_norm and add to the rollout what the losses need (last fields of Batch).
    Returns the rollout, and the state with the critic's new hidden states."""
    views = batch.critic_views()
    # q's half: q did not act, but pi_old needs it. It runs once more in MAPPO's estimate().
    _, memory = state.critic_hidden.chunk(2, -1)
    logits, _, _ = replay(args, agent.critic.posterior, views, memory, agent.sprites)
    posterior = logits[:-1].log_softmax(-1)  # (T, B, N, K)
    old_log_probs = (posterior + batch.options).logsumexp(-1)  # (T, B, N)
    values, advantages, hidden = estimate(args, agent, batch, state.critic_hidden)
    returns = values + advantages
    # paper is silent: returns and advantages are normalised once, before the epochs
    agent.value_norm.update(moments(returns))
    mean, std = agent.value_norm.mean_std()
    _, average, square = moments(advantages)
    deviation = (square - average**2).clamp(min=0).sqrt()
    batch = dataclasses.replace(
        batch,
        critic_hidden=hidden[:-1],
        old_log_probs=old_log_probs,
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
    """PPO's clipped objective of each sample; ratio: pi / mu_old, centre: w = pi_old / mu_old."""
    # Eq. (9), but clipped around w, where the ratio starts: so the step from pi_old is bounded. The
    # paper is silent: as in Off-Policy PPO (OPRE's paper: V-trace). With a clip around 1, actions
    # 1.2 times as likely in pi as in mu learn from A < 0 only: noise would hold pi near mu.
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
            prior, options, _ = agent.actor.options(
                part.actor_views(),
                part.actor_hidden,
                agent.sprites(),
            )
            with agent.autocast():
                posterior, value, _ = agent.critic.options(
                    part.critic_views(),
                    part.critic_hidden,
                    agent.sprites(),
                )
            log_probs = mixture(posterior, options)  # of pi (L, M, N, A)
            log_prob = chosen(log_probs, part.actions)
            ratio = (log_prob - part.log_probs).exp()
            centre = (part.old_log_probs - part.log_probs).exp()  # w
            objective = clip_objective(ratio, part.advantages, args.clip, centre)
            policy_loss = -objective.mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            # paper is silent: App. B.1 trains p by KL(q || p); the original also regularises q
            loss = policy_loss - args.entropy_coef * entropy
            loss += args.prior_coef * kl_divergence(posterior.detach(), prior)
            loss += args.posterior_coef * kl_divergence(posterior, prior.detach())
            actor_norm = descend(loss, agent.policy(), agent.actor_optimiser, args.max_grad_norm)

            losses = value_loss(
                value, part.values, part.targets, clip=args.value_clip, delta=args.huber_delta
            )
            loss = losses.mean()
            net = agent.critic.values
            critic_norm = descend(loss, net, agent.critic_optimiser, args.max_grad_norm)

            scalars["policy_loss"].append(policy_loss.detach())
            scalars["value_loss"].append(loss.detach())
            scalars["entropy"].append(entropy.detach())
            scalars["actor_grad_norm"].append(actor_norm)
            scalars["critic_grad_norm"].append(critic_norm)
            for name, x in describe(posterior, prior, options).items():
                scalars[name].append(x)
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
    """Load mu, the actor of a run directory or checkpoint, as a player in the worlds `envs`."""
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
    for path in set(args.background) - {"random"}:
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
    seed = int(rng.integers(2**31))
    with make_envs(args, min(args.num_envs, evaluation.episodes), seed) as envs:
        rows = background_rows(args, evaluation, envs, new_player, partners)
    return rows | scenario_rows(args, evaluation, new_player, id_roles=agent.spec.roles)


# --- 9. Train -------------------------------------------------------------------------------------


def report(batch: Batch, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the log has means of."""
    figures = scalars | {"reward_per_1000/all": 1000 * batch.rewards.mean()}
    weight = (batch.old_log_probs - batch.log_probs).exp()  # w, before the update
    figures["weight_max"] = weight.max()
    square = (weight**2).mean()
    figures["effective_samples"] = weight.mean() ** 2 / square  # share of the samples
    return figures


def new_generator(seed: int, rank: int) -> torch.Generator:
    """A random number generator with a seed of its own for each process (rank)."""
    seeds = np.random.SeedSequence((seed, rank)).generate_state(1).tolist()
    return torch.Generator().manual_seed(seeds[0])


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
            return run.evaluate_only()

        rng = new_generator(args.seed, run.rank)
        state = new_state(agent, args.num_envs)
        if not args.resume:
            envs.reset()
        log = EpisodeLog(gather)
        own = {"rng": rng, "envs": envs, "state": state, "log": log}
        run.begin(args.substrate, parts={"agent": agent}, own=own, bots=bots, amp=agent.amp)
        if args.resume and not envs.reproducible:  # all worlds begin new episodes
            state = new_state(agent, args.num_envs)
        while run.goes_on():
            batch, state = collect(args, envs, agent, state, rng)
            run.lap("collect_s")
            envs.check()  # lets workers build the next episodes during the update
            batch, state = prepare(args, agent, batch, state)
            scalars = update(args, agent, batch, rng)
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
