"""RandNet (Lee et al., "Network Randomization", ICLR 2020) on MAPPO in Melting Pot.

A random convolution f_psi, drawn in every iteration, distorts the views of the actor, which learns
not to rely on colours and textures. A loss L_FM makes h, its layers before the GRU, ignore f_psi.

    P(psi) = alpha [psi = identity] + (1 - alpha) N(0, 2 / (n_in + n_out))     BiDist, App. B.1
    L_FM = mean over samples and units of (h(f_psi(o)) - h(o))^2,              App. B.1; netrand
           no gradient through h(o)
    J(theta) = J of MAPPO with pi_theta(.|f_psi(o)), in rollout and update, - beta L_FM
    evaluation: pi_theta(.|o), or with --randnet-test mc 1/M sum_m pi_theta(.|f_psi_m(o)), M = 10

    python baselines/randnet_meltingpot.py                                   the papers' settings
    python baselines/randnet_meltingpot.py --resume runs/RUN --total-timesteps 2000000
    python baselines/randnet_meltingpot.py --eval-only runs/RUN --randnet-test mc --run-dir runs/MC
    torchrun --nproc-per-node 2 baselines/randnet_meltingpot.py              16 worlds per process

Letters: T steps, B worlds, N agents, A actions, F features, H W tiles of a view (H' W' of the
global view), S units of a hidden state, L steps per chunk, C chunks per world and rollout, M of
them per minibatch; netrand: the authors' code. Eq. (9), tables and appendices are those of BiDist
(Feng et al., AAMAS 2025). Decisions: docs/baselines_meltingpot.md; those of MAPPO: docs/bidist.md.
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
from envs.meltingpot.random_tiles import RandomTileTables
from envs.meltingpot.scenarios import background_rows, find_scenarios, scenario_rows
from envs.meltingpot.tile_tensors import Sprites, TileTables, ids_on
from envs.meltingpot.tiles import Episode, Observation, Spec, WorldError

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """RandNet on MAPPO in Melting Pot. Defaults: BiDist's paper (Table B.1), netrand's code."""

    # Environment
    substrate: str = "chicken_in_the_matrix__repeated"  # Melting Pot substrate, toy or module:Class
    num_envs: Positive = 16  # B, parallel worlds per process (Table B.1: rollout threads)
    num_workers: Count = 0  # processes that step Melting Pot's worlds; 0: one per CPU core
    worker_timeout: Above = 8.0  # seconds without a sign of life from a worker until the run ends
    max_episode_steps: Count = 0  # steps until training episodes (own worlds: all) end; 0: never
    team_reward: bool = False  # reward every agent with the sum of all agents' rewards
    # Method
    clean_share: Share = 0.1  # alpha, probability that psi is the identity in an iteration
    randnet_fan: Literal["kernel", "channels"] = "kernel"  # n_in = n_out of P(psi): 3 x 9, or 3
    feature_matching: Amount = 0.002  # beta, weight of the feature-matching loss L_FM
    # Base algorithm
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
    randnet_test: Literal["clean", "mc"] = "clean"  # evaluate clean views, or average over ten psi
    background: tuple[str, ...] = ("random",)  # co-players in evaluation: random, run directories
    num_focal: Count = 0  # seats of the trained policy beside --background; 0: N - 1
    eval_ids: Literal["random", "slot"] = "random"  # ids: drawn in each role (Eq. 2), or the seat's
    eval_scenarios: str = "all"  # all (of the paper's substrates: SC0 to SC4), none or SC0,SC3
    bots: Literal["auto", "official", "scripted"] = "auto"  # auto: official if found, else scripted


def validate(args: Args) -> list[tuple[Any, str]]:
    """(condition, error message) pairs: the flags are rejected if a condition is true."""
    chunks = args.rollout_steps // args.chunk_length * args.num_envs
    never = args.clean_share == 1
    begins = never and not (args.resume or args.eval_only)  # a run with idle flags goes on
    matched = args.feature_matching not in (0, Args.feature_matching)
    return [
        (args.rollout_steps % args.chunk_length, "--chunk-length must divide --rollout-steps"),
        (args.minibatches > chunks, f"--minibatches exceeds the {chunks} chunks of a rollout"),
        (begins and args.randnet_fan == "channels", "--clean-share 1 has no psi for --randnet-fan"),
        (begins and matched, "--clean-share 1 has no psi for --feature-matching"),
        (never and args.randnet_test == "mc", "--clean-share 1 has no psi for --randnet-test mc"),
    ]


LINE = ("episode/return", "entropy", "sps")  # scalars to print where there is no terminal
RESUMABLE = (  # flags of this script that may change with --resume and --eval-only
    "num_workers",
    "worker_timeout",
    "plain",
    "amp",
    "randnet_test",
    "background",
    "num_focal",
    "eval_ids",
    "eval_scenarios",
    "bots",
)
# As many samples from more worlds and shorter rollouts: 1.3 times as fast on two idle cores. So
# psi is drawn anew every 50 steps, not every 200, beside hidden states of the psi before it.
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

    def forward(self, ids: Tensor, sprites: Tensor, psi: Tensor | None = None) -> Tensor:
        """Tile ids of M images (M, H, W), sprites (P, 3, 8, 8) in [0, 1], kernel psi -> (M, 64)."""
        tiles = sprites[F.pad(ids.long(), self.padding)]  # (M, H, W, 3, 8, 8)
        images = tiles.permute(0, 3, 1, 4, 2, 5)  # (M, 3, H, 8, W, 8)
        images = images.flatten(4, 5).flatten(2, 3)
        if psi is not None:
            images = F.conv2d(images, psi.to(images), padding=1)  # f_psi, with a black border
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
        self.cnn = cnn if plain else RandomTileTables(cnn)
        self.mlp = orthogonal(nn.Linear(64, 64), RELU)
        self.norm = nn.LayerNorm(features)  # observation normalisation (App. B.1)
        self.gru = orthogonal(nn.GRU(64 + features, self.hidden_size), 1.0)
        self.head = orthogonal(nn.Linear(self.hidden_size, 64), RELU)
        self.out = orthogonal(nn.Linear(64, spec.num_actions), 0.01)

    def encode(self, views: Views, sprites: Tensor, psi: Tensor | None = None) -> Tensor:
        """h(o), or h(f_psi(o)) if psi is given -> (T, B, N, 64)."""
        x = self.cnn(views.ids.flatten(0, 2), sprites, psi)
        x = F.relu(self.mlp(x))
        return x.unflatten(0, views.ids.shape[:3])

    def decide(self, h: Tensor, views: Views, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layers from the GRU on: T steps from hidden (B, N, S), of h (T, B, N, 64). Returns
        logits (T, B, N, A) and the hidden states after each step (T, B, N, S)."""
        x = torch.cat([h, self.norm(views.features)], -1)
        states = run_gru(self.gru, x, views.starts, hidden)
        return self.out(F.relu(self.head(states))), states

    def forward(
        self, views: Views, hidden: Tensor, sprites: Tensor, psi: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.decide(self.encode(views, sprites, psi), views, hidden)


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
        self.psi: Tensor | None = None  # (3, 3, 3, 3), of this iteration; None: no f_psi
        self.actor_optimiser = self.new_optimiser(self.actor, args.actor_lr)
        self.critic_optimiser = self.new_optimiser(self.critic, args.critic_lr)

    def new_actor(self) -> Actor:
        return Actor(self.spec, self.args.plain).to(self.device)

    def new_optimiser(self, net: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr, eps=self.args.adam_eps, fused=True)

    def autocast(self) -> torch.autocast:
        """--amp: bfloat16 in the critic. Actors stay in float32, for the ratio of Eq. (9)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# --- 5. The paper ---------------------------------------------------------------------------------

DRAWS = 10  # M of --randnet-test mc


def draw_psi(args: Args, rng: torch.Generator) -> Tensor | None:
    """Draw the weights (3, 3, 3, 3) of f_psi, which has no bias; None stands for the identity."""
    is_clean = torch.rand((), generator=rng) < args.clean_share
    n_in = n_out = 3
    if args.randnet_fan == "kernel":  # paper and code differ: netrand counts channels x 9
        n_in = n_out = 3 * 9
    std = math.sqrt(2 / (n_in + n_out))  # P(psi), App. B.1
    psi = std * torch.randn(3, 3, 3, 3, generator=rng)
    return None if is_clean else psi


def feature_matching(agent: Agent, h: Tensor, views: Views) -> Tensor:
    """L_FM: mean squared difference of h = h(f_psi(o)) (T, B, N, 64) and h(o) -> ()."""
    # paper and code differ: 0 in iterations without f_psi; netrand uses a random psi in them, too
    with torch.no_grad():
        clean = h.detach() if agent.psi is None else agent.actor.encode(views, agent.sprites())
    return F.mse_loss(h, clean)


class AveragedActor:
    """An actor's mean policy over DRAWS draws of psi, each with its own hidden state."""

    def __init__(self, args: Args, actor: Actor, seed: int):
        self.actor = actor
        self.num_ids = actor.num_ids
        self.hidden_size = DRAWS * actor.hidden_size
        # paper is silent: drawn once per evaluation, as psi is drawn once per rollout
        rng = torch.Generator().manual_seed(seed)
        self.psis = [draw_psi(args, rng) for _ in range(DRAWS)]

    def __call__(self, views: Views, hidden: Tensor, sprites: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, N, DRAWS * S) -> log pi (T, B, N, A), states (T, B, N, DRAWS * S)."""
        probs, states = [], []
        for psi, memory in zip(self.psis, hidden.chunk(DRAWS, -1)):
            logits, after = self.actor(views, memory, sprites, psi)
            probs.append(logits.softmax(-1))
            states.append(after)
        mean = torch.stack(probs).mean(0)
        return mean.log(), torch.cat(states, -1)


def playing_actor(args: Args, actor: Actor, rng: np.random.Generator) -> Actor | AveragedActor:
    """The actor that --randnet-test evaluates: without f_psi ("clean") or averaged ("mc")."""
    if args.randnet_test == "clean":
        return actor
    return AveragedActor(args, actor, seed=int(rng.integers(2**31)))


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
    log_probs: Tensor  # (T, B, N) float32, of the actions under the policy that acted
    rewards: Tensor  # (T, B, N) float32
    terminated: Tensor  # (T, B) bool
    truncated: Tensor  # (T, B) bool
    actor_hidden: Tensor  # (C, B, N, S), hidden states before each chunk
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
    args: Args, envs: Any, agent: Agent, state: RolloutState, rng: torch.Generator
) -> tuple[Batch, RolloutState]:
    """Play T steps in every world from `state` on; returns the rollout and the state after it."""
    device, shape = agent.device, state.previous.shape
    num_actions = envs.spec.num_actions
    acting_net = functools.partial(agent.actor, psi=agent.psi)
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
        views = Views(tile_ids, actor_features, state.starts)
        acting, actor_hidden = act(acting_net, views, state.actor_hidden, agent.sprites)
        actions = sample(acting, rng)
        add(tile_ids=tile_ids, actor_features=actor_features)
        add(actions=actions, log_probs=chosen(acting, actions))

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


def clip_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective of each sample; ratio: pi_theta / pi_old of its action."""
    # Eq. (9), Sec. 4.5
    clipped = ratio.clamp(1 - clip, 1 + clip)
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
            views, sprites = part.actor_views(), agent.sprites()
            h = agent.actor.encode(views, sprites, agent.psi)  # (L, M, N, 64)
            logits, _ = agent.actor.decide(h, views, part.actor_hidden)
            log_probs = logits.log_softmax(-1)  # (L, M, N, A)
            log_prob = chosen(log_probs, part.actions)
            ratio = (log_prob - part.log_probs).exp()
            objective = clip_objective(ratio, part.advantages, args.clip)
            policy_loss = -objective.mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            loss = policy_loss - args.entropy_coef * entropy
            matching = feature_matching(agent, h, views)
            loss = loss + args.feature_matching * matching
            actor_norm = descend(loss, agent.actor, agent.actor_optimiser, args.max_grad_norm)

            with agent.autocast():
                views = part.critic_views()
                value, _ = agent.critic(views, part.critic_hidden, agent.sprites())
            losses = value_loss(
                value, part.values, part.targets, clip=args.value_clip, delta=args.huber_delta
            )
            loss = losses.mean()
            critic_norm = descend(loss, agent.critic, agent.critic_optimiser, args.max_grad_norm)

            scalars["policy_loss"].append(policy_loss.detach())
            scalars["value_loss"].append(loss.detach())
            scalars["entropy"].append(entropy.detach())
            scalars["feature_matching"].append(matching.detach())
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
    actor = playing_actor(args, agent.actor, np.random.default_rng(seed))
    return NetPlayer(actor, Sprites(envs, agent.device), seed)


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
    ours = playing_actor(args, agent.actor, rng)

    def player(net: Actor, envs: Any) -> NetPlayer:
        sprites = Sprites(envs, agent.device)
        return NetPlayer(net, sprites, seed=int(rng.integers(2**31)))

    new_player = functools.partial(player, ours)
    partners = {name: functools.partial(player, net) for name, net in others.items()}
    seed = int(rng.integers(2**31))
    with make_envs(args, min(args.num_envs, evaluation.episodes), seed) as envs:
        rows = background_rows(args, evaluation, envs, new_player, partners)
    return rows | scenario_rows(args, evaluation, new_player, id_roles=agent.spec.roles)


# --- 9. Train -------------------------------------------------------------------------------------


def report(batch: Batch, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the log has means of."""
    return scalars | {"reward_per_1000/all": 1000 * batch.rewards.mean()}


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
        method_rng = new_generator(args.seed, 2**31)  # rank of no process: all draw the same psi
        state = new_state(agent, args.num_envs)
        if not args.resume:
            envs.reset()
        log = EpisodeLog(gather)
        own = {
            "rng": rng,
            "method_rng": method_rng,
            "psi": None,
            "envs": envs,
            "state": state,
            "log": log,
        }
        run.begin(args.substrate, parts={"agent": agent}, own=own, bots=bots, amp=agent.amp)
        agent.psi = own["psi"]
        if args.resume and not envs.reproducible:  # all worlds begin new episodes
            state = new_state(agent, args.num_envs)
        while run.goes_on():
            own["psi"] = agent.psi = draw_psi(args, method_rng)
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
