"""MAPPO (Yu et al., 2022) in StarCraft micromanagement, with REFIL's attention to entities.

All agents share one actor, which sees only what the agent sees. One critic, used only in training,
sees all units and predicts the team's return. The actor plays a rollout of battles, both networks
learn from it for some epochs, and it is thrown away. i: living agents, as only they have a choice.

    r_i  = pi(u_i | tau_i) / pi_old(u_i | tau_i)                                          ratio
    L_pi = - mean_i min(r_i A, clip(r_i, 1 -+ eps) A) - c mean_i H(pi(. | tau_i))         actor
    L_V  = mean (V(s) - G)^2                                                              critic
    A    = G - V(s)                                          the team's, the same for all agents
    G_t  = R_t + gamma ((1 - l) V(s_t+1) + l G_t+1)                           --returns lambda
    G_t  = R_t + .. + gamma^n V'(s_t+n)            V': a slow copy of V        --returns n-step

L_pi trains the actor, L_V the critic. G ends where a battle terminates; when time is out, it
bootstraps from V (n-step: V'). An agent's death does not end G: its actions may lead to later
rewards, too.

    python baselines/mappo_smac.py --scenario sz --preset cpu                for CPUs
    python baselines/mappo_smac.py --scenario mmm                            as in MIPI's paper
    python baselines/mappo_smac.py --scenario resource --team-sizes 3 4 5    Resource Collection
    python baselines/mappo_smac.py --resume runs/RUN --total-timesteps 20000000
    python baselines/mappo_smac.py --eval-only runs/RUN --backend sc2 --num-envs 4
    torchrun --nproc-per-node 2 baselines/mappo_smac.py                      two times 10 battles

Letters: T steps, B battles, K steps of all battles, M moments (K in which a step begins, then those
after last steps), A agents, S entities (agents, then enemies), U actions, D features of an entity,
H hidden units, R of the GRU, h heads of size d; in losses M steps of a minibatch. In equations R
is a reward, A an advantage, G a return, H an entropy, V a value. What the paper leaves open:
docs/baselines_smac.md; worlds: docs/battles.md.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
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
    check,
    check_finite,
    descend,
    gather,
    has_bf16,
    leave,
    load_checkpoint,
    mean_and_deviation,
    moments,
    own_generator,
    read_args,
    restore,
    saved_args,
    send,
    total,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.smac import worlds
from envs.smac.combat import FIRST_TARGET, SIDE, Family, Observation
from envs.smac.episodes import EpisodeLog, Policy
from envs.smac.game import BattleError

CPU = torch.device("cpu")

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """MAPPO in StarCraft micromanagement. Defaults: EPyMARL's, MIPI's rate."""

    # Environment
    backend: Literal["sim", "sc2"] = "sim"  # sim: the simulator in envs/smac; sc2: StarCraft II
    scenario: str = "sz"  # world: sz, csz, mmm, terran, protoss, zerg or resource
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # team sizes (numbers of agents) in training
    enemy_ai: Literal["sticky", "closest", "focus"] = "sticky"  # sim: enemies' AI; sticky: like SC2
    clip_regeneration: bool = False  # damage minus regeneration is rewarded as max(x, 0), not |x|
    rescale: bool = False  # resource: lengths divided by the sight radius, rewards divided by 10
    egocentric: bool = False  # resource: adds the relative places of the nearest things in sight
    num_envs: Positive = 10  # B, battles played in parallel, per process
    env_threads: Positive = 1  # sim: threads that simulate the battles of a process
    game_version: str = ""  # sc2: version, e.g. 4.10.0; default: the newest installed
    max_episode_steps: Positive = 150  # time is out after so many, at most 1000, resource 145
    # Method
    rollout: Literal["rounds", "windows"] = "rounds"  # rounds: whole battles; windows: T steps
    window_steps: Positive = 32  # T, steps of each battle in a rollout of --rollout windows
    recurrent: bool = True  # actors remember with a GRU; without: a linear layer, no memory
    target_head: Literal["tags", "pointer"] = "tags"  # tells targets apart by tag or by features
    hidden_size: Positive = 128  # H, units of embeddings and attention
    heads: Positive = 4  # h, attention heads
    rnn_size: Positive = 64  # R, units of the GRU
    returns: Literal["n-step", "lambda"] = "n-step"  # G: n-step returns or lambda-returns
    n_steps: Positive = 5  # n, rewards in an n-step return; in a window at most --window-steps
    target_tau: Share = 0.01  # n-step: share by which V' moves to V after each rollout
    gae_lambda: Share = 0.95  # l of --returns lambda; 0: one-step, 1: all later rewards
    timeout_terminates: bool = False  # no bootstrap when time is out, as in REFIL's code
    value_norm: bool = False  # V predicts returns normalised by their mean and deviation
    normalise_advantages: bool = False  # scale A of a rollout to mean 0 and standard deviation 1
    # Base algorithm
    learning_rate: Amount = 5e-4  # Adam's learning rate at the start
    entropy_coef: Amount = 0.001  # c, weight of the entropy bonus at the start
    final_share: Share = 1.0  # share of learning rate and c left at --total-timesteps (linearly)
    adam_eps: Above = 1e-5  # Adam's eps, added to the root of the mean squared gradient
    epochs: Positive = 4  # passes over each rollout
    minibatches: Positive = 1  # minibatches per epoch
    clip: Amount = 0.2  # eps, clip range of the ratio r_i
    gamma: Share = 0.99  # discount factor per step
    max_grad_norm: Above = 10.0  # largest gradient norm, of each network
    amp: bool = False  # bf16 embeddings and attention where the hardware has bf16
    # Evaluation and checkpoints
    eval_team_sizes: tuple[Positive, ...] = (6, 7, 8)  # unseen sizes, evaluated with --team-sizes
    eval_every: Count = 50_000  # environment steps between evaluations; 0: only at the end
    eval_episodes: Positive = 160  # episodes per team size in an evaluation during training
    final_episodes: Count = 160  # episodes per team size at the end and with --eval-only
    log_every: Positive = 10_000  # environment steps between lines of metrics.jsonl
    save_every: Count = 500_000  # steps between checkpoints (last two kept); 0: only at the end


PRESETS = {
    "paper": {},
    "cpu": {
        "total_timesteps": 2_000_000,
        "num_envs": 256,
        "rollout": "windows",
        "recurrent": False,
        "target_head": "pointer",
        "hidden_size": 64,
        "returns": "lambda",
        "value_norm": True,
        "normalise_advantages": True,
        "learning_rate": 1e-3,
        "entropy_coef": 0.01,
        "final_share": 0.1,
        "epochs": 3,
        "minibatches": 8,
        "max_grad_norm": 0.5,
        "amp": True,
        "eval_every": 250_000,
        "eval_episodes": 64,
    },
    "cpu scenario resource": {  # added to the values of "cpu"
        "rescale": True,
        "egocentric": True,
        "target_head": "tags",
        "gamma": 0.97,
    },
}
# With --resume, train() refuses another backend, version or number; --eval-only may change them.
RESUMABLE = ("backend", "env_threads", "game_version", "num_envs", "eval_team_sizes")
LINE = ("return", "win", "entropy", "sps")  # scalars of lines printed where there is no terminal


def validate(args: Args) -> list[tuple[Any, str]]:
    """(whether it is wrong, message) for combinations of flags that would not do what they say."""
    windows, n_step = args.rollout == "windows", args.returns == "n-step"
    given = {name for name, x in vars(Args()).items() if getattr(args, name) != x}
    steps = args.num_envs * (args.window_steps if windows else 1)
    in_game = args.backend == "sc2" and not args.eval_only
    pointer = args.target_head == "pointer"
    return [
        (args.hidden_size % args.heads, "--hidden-size is no multiple of --heads"),
        (
            windows and args.recurrent,
            "--rollout windows has no memory: --no-recurrent, or --rollout rounds",
        ),
        (windows and in_game, "--rollout windows needs --backend sim: no game can be saved"),
        (not windows and "window_steps" in given, "--window-steps needs --rollout windows"),
        (not args.recurrent and "rnn_size" in given, "--rnn-size needs --recurrent"),
        (not n_step and "n_steps" in given, "--n-steps needs --returns n-step"),
        (not n_step and "target_tau" in given, "--target-tau needs --returns n-step"),
        (n_step and "gae_lambda" in given, "--gae-lambda needs --returns lambda"),
        (
            args.minibatches > steps and not args.eval_only,
            f"--minibatches exceeds {steps}, the least that a rollout has",
        ),
        (
            pointer and args.scenario == "resource",
            "--scenario resource has nobody to attack: it needs --target-head tags",
        ),
        *worlds.wrong_flags(args),
    ]


# --- 3. Worlds ------------------------------------------------------------------------------------
# [shared: ppo_battles] begin


def make_envs(
    args: Args,
    sizes: tuple[int, ...],
    num_envs: int,
    seed: int,
    once: bool = True,
    first_battle: int = 0,
) -> Any:
    """num_envs battles of teams of these sizes. once: a battle that has ended does not start again,
    else a new one begins. Random numbers of a battle depend on the seed and its number, counted
    from first_battle. All worlds are on the CPU. UsageError where there are no such teams or no
    game.
    """
    try:
        return worlds.make_worlds(
            args.backend,
            args.scenario,
            team_sizes=sizes,
            num_battles=num_envs,
            seed=seed,
            first_battle=first_battle,
            episode_limit=args.max_episode_steps,
            clip_regeneration=args.clip_regeneration,
            enemy_ai=args.enemy_ai,
            threads=args.env_threads,
            game_version=args.game_version,
            once=once,
            rescale=args.rescale,
            egocentric=args.egocentric,
        )
    except (ValueError, BattleError) as error:
        raise UsageError(str(error)) from None


# [shared: ppo_battles] end

# --- 4. Networks ----------------------------------------------------------------------------------
# [shared: features] begin

MASKED = -1e9  # replaces scores, logits and utilities of what must not be chosen
CHUNK = 25  # time steps that the GRU gets in one call


class Features(NamedTuple):
    """Input of the networks at M moments: the states of battles, without padding, in order of
    time, then battle. In rollouts the moments after last steps come after the K in which a step
    begins. A and S count only the slots up to the last one that any moment uses."""

    entities: Tensor  # (M, S, D) float32: features; of agents also the last action, one-hot
    unseen: Tensor  # (M, A, S) bool: agent i does not see entity j
    empty: Tensor  # (M, S) bool: the slot has no unit
    avail_actions: Tensor  # (M, A, U) bool
    # Which moments a GRU reads (times, B) bool, on the CPU, longest battles first: in replays all M
    # (T + 1 times), in rollouts the first K (T times).
    played: Tensor

    def at(self, index: Tensor) -> Features:
        """Features of moments index (n,); `played`, which only a GRU needs, stays as it is."""
        return self._replace(
            entities=self.entities[index],
            unseen=self.unseen[index],
            empty=self.empty[index],
            avail_actions=self.avail_actions[index],
        )


def slots_in_use(empty: Tensor) -> int:
    """Number of slots up to the last one that any moment uses; empty (M, 8) bool."""
    return int((~empty).any(0).nonzero().max()) + 1


def encode(
    obs: Observation, last_actions: Tensor, played: Tensor, device: torch.device
) -> Features:
    """Features of observations (M, ...), on `device`; last_actions (M, 8), -1 at the start of an
    episode; played (times, B): see Features."""
    A = slots_in_use(obs.entity_mask[:, :SIDE])
    enemies = slots_in_use(obs.entity_mask[:, SIDE:])
    slots = torch.tensor([*range(A), *range(SIDE, SIDE + enemies)])
    num_actions = obs.avail.shape[-1]
    # Column 0 of the one-hot code stands for -1, no last action. It is dropped.
    acted = F.one_hot(last_actions[:, :A] + 1, num_actions + 1)[..., 1:].float()
    acted = F.pad(acted, (0, 0, 0, enemies))  # enemies' actions are unknown: 0
    entities = torch.cat((obs.entities[:, slots], acted), dim=-1)
    return Features(
        entities=send(entities, device),
        unseen=send(obs.obs_mask[:, :A].index_select(-1, slots), device),
        empty=send(obs.entity_mask[:, slots], device),
        avail_actions=send(obs.avail[:, :A], device),
        played=played,
    )


# [shared: features] end
# [shared: attention] begin


def uniform_parameter(inputs: int, *shape: int) -> nn.Parameter:
    """Weights or biases of several linear layers, with nn.Linear's initial distribution."""
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Attention(nn.Module):
    """G attention layers, computed together: agents (queries) attend to entities (keys, values)."""

    def __init__(self, G: int, H: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = uniform_parameter(H, G, H, H)
        self.key_value = uniform_parameter(H, G, H, 2 * H)

    def forward(self, x: Tensor, agents: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (G, M, h, A, d), keys and values (G, M, h, S, d) of x (M, S, G, H); agents: A."""
        M, S, G, H = x.shape
        query = x[:, :agents].flatten(0, 1).transpose(0, 1) @ self.query  # (G, M A, H)
        key_value = x.flatten(0, 1).transpose(0, 1) @ self.key_value  # (G, M S, 2 H)
        key, value = key_value.chunk(2, dim=-1)
        query = query / math.sqrt(H // self.heads)
        return self.split(query, M), self.split(key, M), self.split(value, M)

    def split(self, x: Tensor, M: int) -> Tensor:
        """Split x (G, M n, H) into heads: (G, M, h, n, d)."""
        G, _, H = x.shape
        return x.view(G, M, -1, self.heads, H // self.heads).transpose(2, 3)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Output of attention (G, M, V, A, H) in V views with mask (M, V, A, S), True: hidden; an agent
    from which all is hidden gets 0. The scores are the same in all views, so they are computed
    once. The weights of all views are multiplied with the values in one product."""
    mask = mask[:, None]  # (M, 1, V, A, S)
    scores = query @ key.mT  # (G, M, h, A, S)
    scores = scores[:, :, :, None].masked_fill(mask, MASKED)  # (G, M, h, V, A, S)
    weights = scores.softmax(-1).masked_fill(mask, 0.0)
    out = weights.flatten(3, 4) @ value  # (G, M, h, V A, d)
    out = out.unflatten(3, mask.shape[2:4])  # (G, M, h, V, A, d)
    return out.permute(0, 1, 3, 4, 2, 5).flatten(-2)


def remember(
    layer: nn.GRU | nn.Linear, x: Tensor, played: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Outputs (M, V, A, R) for x (M, V, A, R), and the hidden state (1, B V A, R) after them.
    A GRU runs over chunks of time, without battles that ended before a chunk; those that end within
    it are padded with 0, and outputs there are dropped. A linear layer has no memory."""
    if isinstance(layer, nn.Linear):
        return F.relu(layer(x)), hidden
    chunks = played.split(CHUNK)
    sizes = [int(chunk.sum()) for chunk in chunks]
    outputs = []
    for part, chunk in zip(x.split(sizes), chunks):
        T, B = len(chunk), int(chunk[0].sum())  # B battles have not ended before this chunk
        place = send(chunk[:, :B].flatten().nonzero()[:, 0], x.device)
        padded = x.new_zeros(T * B, *x.shape[1:]).index_copy(0, place, part)
        padded = padded.view(T, -1, x.shape[-1])  # (T, B V A, R)
        if hidden is not None:
            hidden = hidden[:, : padded.shape[1]].contiguous()
        padded, hidden = layer(padded, hidden)
        outputs.append(padded.reshape(T * B, *x.shape[1:])[place])
    return torch.cat(outputs), hidden


# [shared: attention] end
# [shared: ppo_trunk] begin

RELU = math.sqrt(2)  # gain of layers before a ReLU


def orthogonal(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A layer with orthogonal weights and zero biases."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Trunk(nn.Module):
    """Embeddings of entities, and the attention of every agent to them."""

    def __init__(self, inputs: int, args: Args):
        super().__init__()
        self.embed = orthogonal(inputs, args.hidden_size, RELU)
        self.attention = Attention(1, args.hidden_size, args.heads)

    def forward(self, entities: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (M, S, H) of entities (M, S, D), and for every agent its embedding beside its
        attention's output (M, A, 2 H); mask (M, A, S), True: hidden."""
        A = mask.shape[1]
        x = F.relu(self.embed(entities))  # (M, S, H)
        query, key, value = self.attention(x[:, :, None], A)
        found = attend(query, key, value, mask[:, None])[0, :, 0]  # (M, A, H)
        agents = torch.cat((x[:, :A], found), dim=-1)
        # With --amp only the above is bf16, which is too coarse for ratios and values.
        dtype = self.embed.weight.dtype
        return x.to(dtype), agents.to(dtype)


# [shared: ppo_trunk] end


class Actor(nn.Module):
    """log pi(u | tau_i) of every agent; tau_i: what it sees and, with a GRU, has seen."""

    def __init__(self, inputs: int, family: Family, args: Args):
        super().__init__()
        H = args.hidden_size
        size = args.rnn_size if args.recurrent else H
        self.pointer = args.target_head == "pointer"
        self.num_targets = family.n_actions - FIRST_TARGET
        self.trunk = Trunk(inputs, args)
        self.project = orthogonal(2 * H, size, RELU)
        self.layer = nn.GRU(size, size) if args.recurrent else orthogonal(size, size, RELU)
        if self.pointer:
            self.query = orthogonal(size, H, 0.1)
            self.key = orthogonal(H, H, 1.0)
        self.head = orthogonal(size, FIRST_TARGET if self.pointer else family.n_actions, 0.01)

    def forward(
        self, features: Features, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (M, A, U), and the hidden state (1, B A, R) after them."""
        entities, agents = self.trunk(features.entities, features.unseen)
        with torch.autocast(agents.device.type, enabled=False):
            x = F.relu(self.project(agents))  # (M, A, R or H)
            x, hidden = remember(self.layer, x[:, None], features.played, hidden)
            x = x[:, 0]
            logits = self.head(x)
            if self.pointer:
                targets = self.point(x, entities, features.entities)
                logits = torch.cat((logits, targets), dim=-1)
            logits = logits.masked_fill(~features.avail_actions, MASKED)
        return logits.log_softmax(-1), hidden

    def point(self, x: Tensor, entities: Tensor, features: Tensor) -> Tensor:
        """Logits (M, A, U - 6) of attacking or healing; x (M, A, R or H), embeddings (M, S, H)."""
        # <W_q x_i, W_k e_j> / sqrt(H): how well target j suits agent i
        scores = self.query(x) @ self.key(entities).mT / math.sqrt(entities.shape[-1])  # (M, A, S)
        tags = features[..., : self.num_targets]  # (M, S, U - 6), one-hot; 0 of empty slots
        return scores @ tags


# [shared: ppo_critic] begin


class Critic(nn.Module):
    """V(s) of the team, computed from all units; with --value-norm in units of the norm."""

    def __init__(self, inputs: int, args: Args):
        super().__init__()
        H = args.hidden_size
        self.trunk = Trunk(inputs, args)
        self.project = orthogonal(2 * H, H, RELU)
        self.layer = orthogonal(H, H, RELU)
        self.head = orthogonal(H, 1, 1.0)

    def forward(self, features: Features) -> Tensor:
        """Values (M,), in units of the value norm."""
        A = features.unseen.shape[1]
        filled = ~features.empty[:, :A]
        no_unit = features.empty[:, :A, None] | features.empty[:, None]  # (M, A, S)
        _, agents = self.trunk(features.entities, no_unit)
        with torch.autocast(agents.device.type, enabled=False):
            x = F.relu(self.project(agents)) * filled[..., None]
            # A mean over the 8 slots: a mean over agents would hide how many there are.
            x = x.sum(1) / SIDE  # (M, H)
            return self.head(F.relu(self.layer(x)))[:, 0]


class ValueNorm(nn.Module):
    """Mean and standard deviation of returns: exponential averages over rollouts, debiased."""

    DECAY = 0.95

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # means of 1, x, x^2

    def update(self, new: Tensor) -> None:
        """Take in new (3,): 1, mean and mean square of the returns of a rollout."""
        self.sums.lerp_(new.to(self.sums), 1 - self.DECAY)

    def mean_std(self) -> tuple[float, float]:
        """Mean and standard deviation of returns; 0 and 1 before the first update."""
        weight, mean, square = self.sums.tolist()
        if weight == 0:
            return 0.0, 1.0
        variance = square / weight - (mean / weight) ** 2
        return mean / weight, math.sqrt(max(variance, 1e-2))


# [shared: ppo_critic] end


class Agent(Parts):
    """Actor, critic, the critic's slow copy, value norm, optimisers."""

    def __init__(self, args: Args, family: Family, device: torch.device):
        self.args, self.device = args, device
        self.amp = args.amp and has_bf16(device)
        inputs = family.features + family.n_actions
        torch.manual_seed(args.seed)
        self.actor = Actor(inputs, family, args).to(device)
        self.critic = Critic(inputs, args).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.value_norm = ValueNorm()
        self.actor_optimiser = self.new_optimiser(self.actor)
        self.critic_optimiser = self.new_optimiser(self.critic)

    def new_optimiser(self, net: nn.Module) -> torch.optim.Adam:
        options = {"lr": self.args.learning_rate, "eps": self.args.adam_eps}
        return torch.optim.Adam(net.parameters(), **options, foreach=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        for optimiser in (self.actor_optimiser, self.critic_optimiser):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate

    @torch.no_grad()
    def move_target(self) -> None:
        """Move V', the slow copy of the critic, towards V by the share --target-tau."""
        for slow, fast in zip(self.target_critic.parameters(), self.critic.parameters()):
            slow.lerp_(fast, self.args.target_tau)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# --- 5. The method --------------------------------------------------------------------------------
# [shared: ppo_returns] begin


def clip_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, element by element; ratio: pi / pi_old."""
    # min(r A, clip(r, 1 -+ eps) A)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.min(ratio * advantage, clipped * advantage)


def lambda_returns(steps: Played, next_values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Lambda-returns G (T, B); G - V is GAE. next_values (T, B): V at the end of each step."""
    returns = torch.zeros_like(next_values)
    goes_on = ~steps.terminated
    G = torch.zeros_like(next_values[0])  # no step reads it: the last one of each battle `ends`
    for t in reversed(range(len(returns))):
        G = torch.where(steps.ends[t], next_values[t], G)  # G_t+1
        # G_t = R_t + gamma ((1 - l) V(s_t+1) + l G_t+1)
        mixed = (1 - gae_lambda) * next_values[t] + gae_lambda * G
        G = steps.rewards[t] + gamma * mixed * goes_on[t]
        returns[t] = G
    return returns


def n_step_returns(steps: Played, next_values: Tensor, gamma: float, n: int) -> Tensor:
    """n-step returns G (T, B), shorter before `ends`; next_values (T, B): V' after each step."""
    goes_on = ~steps.terminated
    later = next_values  # G^(0)_t+1 = V'(s_t+1)
    for _ in range(min(n, len(next_values))):  # no return has more than T rewards
        # G^(k)_t = R_t + gamma G^(k-1)_t+1, k = 1, 2, ..
        returns = steps.rewards + gamma * later * goes_on
        later = F.pad(returns[1:], (0, 0, 0, 1))
        later = torch.where(steps.ends, next_values, later)
    return returns


# [shared: ppo_returns] end

# --- 6. Data --------------------------------------------------------------------------------------
# [shared: ppo_draws] begin


def pick(x: Tensor, actions: Tensor) -> Tensor:
    """Entries (..., A) of x (..., A, U) at the chosen actions (..., A)."""
    return x.gather(-1, actions[..., None])[..., 0]


def sample(log_probs: Tensor, noise: Tensor) -> Tensor:
    """Draw actions (B, A): the largest of log pi (B, A, U) + Gumbel noise. noise (B, A, U) is
    exponentially distributed, so -log noise is Gumbel noise."""
    return (log_probs - noise.log()).argmax(-1)


# [shared: ppo_draws] end


class Player:
    """A policy for battles: with rng it draws actions, without it takes the most probable ones."""

    def __init__(self, agent: Agent, rng: torch.Generator | None = None):
        self.agent, self.rng = agent, rng
        self.last_actions = torch.empty(0)  # (B, 8) int64; -1 where there was none
        self.hidden = torch.empty(0)  # (B, 8, R)

    def state_dict(self) -> dict[str, Tensor]:
        """State for battles that run on: only windows have them, and no GRU, so no hidden state."""
        return {"last_actions": self.last_actions}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        self.last_actions = saved["last_actions"]

    def begin(self, battles: Any) -> None:
        """Reset the memory of battles that begin now, or of all if their number is another one."""
        B, device = battles.num_battles, self.agent.device
        if len(self.last_actions) != B:
            self.last_actions = torch.full((B, SIDE), -1)
        if len(self.hidden) != B:
            self.hidden = torch.zeros(B, SIDE, self.agent.args.rnn_size, device=device)
        begins = battles.time == 0
        self.last_actions[begins] = -1
        self.hidden.masked_fill_(send(begins, device)[:, None, None], 0.0)

    def __call__(self, battles: Any) -> Tensor:
        """Actions (B, 8) int64; keeps the memory for the next call."""
        self.begin(battles)
        self.last_actions, _ = self.act(battles)
        return self.last_actions

    @torch.no_grad()
    def act(self, battles: Any) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities (B, 8). The network runs only for battles not yet over."""
        going = (~battles.over).nonzero()[:, 0]  # (n,)
        obs = Observation(*(x[going] for x in battles.obs))
        played = torch.ones(1, len(going), dtype=torch.bool)
        features = encode(obs, self.last_actions[going], played, self.agent.device)
        A, U = features.avail_actions.shape[1:]
        place = send(going, self.agent.device)
        hidden = self.hidden[place, :A]  # (n, A, R)
        with self.agent.autocast():
            log_probs, after = self.agent.actor(features, hidden.flatten(0, 1)[None])
        self.hidden[place, :A] = after.view_as(hidden)
        chosen = log_probs.argmax(-1)  # (n, A)
        if self.rng:
            # Drawn for all slots and battles, so that draws do not depend on who is left.
            noise = torch.empty(len(self.hidden), SIDE, U).exponential_(generator=self.rng)
            chosen = sample(log_probs, send(noise[going, :A], log_probs.device))
        actions = torch.zeros_like(self.last_actions)  # empty slots get the no-op
        log_prob = torch.zeros(actions.shape)
        actions[going, :A] = chosen.cpu()
        log_prob[going, :A] = pick(log_probs, chosen).cpu()
        return actions, log_prob


# [shared: ppo_steps] begin


class Played(NamedTuple):
    """One step of B battles, or T steps of them: (T, B, ...)."""

    going: Tensor  # (B,) bool: the battle was not over before the step
    last_actions: Tensor  # (B, 8) int64: of the step before, -1 where there was none
    actions: Tensor  # (B, 8) int64
    log_probs: Tensor  # (B, 8) float32
    rewards: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: no bootstrap after the step
    ends: Tensor  # (B,) bool: the last step of this battle in this rollout


class Rollout(NamedTuple):
    """T steps of B battles, the longest battles first: K steps in all, between M moments."""

    steps: Played  # (T, B, ...)
    features: Features  # of M moments: K in which a step begins, then those after last steps
    later: Tensor  # (K,) int64: index of the moment at which the step ends


def copied(x: Any) -> Any:
    """A copy of a named tuple of tensors: worlds overwrite their tensors."""
    return x._make([tensor.clone() for tensor in x])


def stacked(times: list[Any]) -> Any:
    """T named tuples of tensors (B, ...), stacked to one of tensors (T, B, ...)."""
    return times[0]._make([torch.stack(x) for x in zip(*times)])


# [shared: ppo_steps] end


def collect(args: Args, battles: Any, player: Player) -> tuple[Rollout, list[Any]]:
    """Play a whole episode of every battle or, with windows, its next T steps. Returns the rollout
    and the episodes that ended (a list of battles.Episode)."""
    rounds = args.rollout == "rounds"
    if rounds:
        battles.reset()
    steps, seen, after, episodes = [], [], [], []
    is_last = False
    while not is_last:
        player.begin(battles)
        seen.append(copied(battles.obs))
        going, before = ~battles.over, player.last_actions
        player.last_actions, log_probs = player.act(battles)
        step = battles.step(player.last_actions)
        over = step.terminated | step.truncated
        is_last = bool(battles.over.all()) if rounds else len(steps) + 1 == args.window_steps
        ends = going & (over | is_last)
        if ends.any():
            final = step.final._make([x[ends] for x in step.final])
            after.append(copied(battles.observe(final)))
        played = Played(
            going=going,
            last_actions=before,
            actions=player.last_actions,
            log_probs=log_probs,
            rewards=step.reward,
            terminated=over if args.timeout_terminates else step.terminated,
            ends=ends,
        )
        steps.append(copied(played))
        episodes += step.episodes
    steps = stacked(steps)
    check_finite(rewards=steps.rewards)
    finals = Observation(*(torch.cat(x) for x in zip(*after)))
    return assemble(steps, stacked(seen), finals, player.agent.device), episodes


# [shared: ppo_moments] begin


def numbered(there: Tensor) -> Tensor:
    """(T, B) int64: index of each True entry of there (T, B), in order of time, then battle."""
    return there.flatten().cumsum(0).view_as(there) - 1


def assemble(
    steps: Played, seen: Observation, finals: Observation, device: torch.device
) -> Rollout:
    """The rollout of these steps. seen (T, B, ...): observations before each; finals (n, ...):
    observations after last steps (`ends`), in order of time, then battle."""
    # The first K moments begin steps; those after last steps follow, in the order of finals.
    K = steps.going.sum()
    after_last = K + numbered(steps.ends)  # (T, B) int64: read where `ends`
    acted_last = steps.actions[steps.ends]  # (M - K, 8)
    longest_first = steps.going.sum(0).argsort(descending=True, stable=True)
    steps = steps._make([x[:, longest_first] for x in steps])
    seen = seen._make([x[:, longest_first] for x in seen])
    after_last = after_last[:, longest_first]
    played = steps.going
    next_step = F.pad(numbered(played)[1:], (0, 0, 0, 1))  # (T, B) int64: read where not `ends`
    later = torch.where(steps.ends, after_last, next_step)[played]
    obs = Observation(*(torch.cat((x[played], y)) for x, y in zip(seen, finals)))
    last_actions = torch.cat((steps.last_actions[played], acted_last))
    return Rollout(steps, encode(obs, last_actions, played, device), later)


# [shared: ppo_moments] end


class Batch(NamedTuple):
    """What the losses read: K steps, in order of time, then battle."""

    features: Features  # (K, ...)
    actions: Tensor  # (K, A) int64
    log_probs: Tensor  # (K, A) float32: log pi_old of the actions
    advantages: Tensor  # (K,) float32
    targets: Tensor  # (K,) float32: G in units of the value norm

    def at(self, index: Tensor, played: Tensor) -> Batch:
        """The steps index (n,); played (T, B): where they are, for a GRU."""
        features = self.features.at(index)._replace(played=played)
        return Batch(features, *(x[index] for x in self[1:]))


ROWS = 4096  # moments that a critic gets in one call, without gradients


@torch.no_grad()
def all_values(agent: Agent, critic: Critic, features: Features) -> Tensor:
    """V (M,) of all moments, in units of rewards, on the CPU."""
    mean, std = agent.value_norm.mean_std()
    parts = torch.arange(len(features.entities), device=agent.device).split(ROWS)
    with agent.autocast():
        values = torch.cat([critic(features.at(part)) for part in parts])
    return values.cpu() * std + mean


def choosing(features: Features) -> Tensor:
    """(M, A) bool: agents that have a choice. Dead agents and empty slots have only the no-op."""
    return ~features.avail_actions[..., 0]


def prepare(args: Args, agent: Agent, rollout: Rollout) -> Batch:
    """The Batch of a rollout, with returns and advantages; updates agent.value_norm."""
    steps, device = rollout.steps, agent.device
    played = steps.going
    K = len(rollout.later)
    values = all_values(agent, agent.critic, rollout.features)  # (M,)
    next_values = torch.zeros(played.shape)  # (T, B)
    if args.returns == "n-step":
        slow = all_values(agent, agent.target_critic, rollout.features)
        next_values[played] = slow[rollout.later]
        returns = n_step_returns(steps, next_values, args.gamma, args.n_steps)
    else:
        next_values[played] = values[rollout.later]
        returns = lambda_returns(steps, next_values, args.gamma, args.gae_lambda)
    returns = returns[played]  # (K,)
    # A = G - V(s)
    advantages = returns - values[:K]
    if args.value_norm:
        agent.value_norm.update(moments(returns))
    mean, std = agent.value_norm.mean_std()
    features = rollout.features.at(torch.arange(K, device=device))
    acts = choosing(features)  # (K, A)
    if args.normalise_advantages:
        each = advantages.repeat_interleave(acts.sum(-1).cpu())  # once per living agent
        centre, deviation = mean_and_deviation(each)
        advantages = (advantages - centre) / (deviation + 1e-5)
    A = acts.shape[1]
    return Batch(
        features=features,
        actions=send(steps.actions[played][:, :A], device),
        log_probs=send(steps.log_probs[played][:, :A], device),
        advantages=send(advantages, device),
        targets=send((returns - mean) / std, device),
    )


def minibatches(args: Args, batch: Batch, rng: torch.Generator) -> Iterator[Batch]:
    """One epoch: battles, shuffled and divided into minibatches; without a GRU, steps instead."""
    played = batch.features.played  # (T, B)
    if not args.recurrent:
        played = torch.ones(1, len(batch.actions), dtype=torch.bool)
    number = numbered(played)
    # A column is a battle, which stays whole, or a single step.
    for columns in torch.randperm(played.shape[1], generator=rng).tensor_split(args.minibatches):
        columns = columns.sort().values  # the longest battles first
        part = played[:, columns]
        part = part[part.any(1)]  # times until the longest of them ends
        index = number[: len(part), columns][part]
        yield batch.at(send(index, batch.actions.device), part)


# --- 7. Update ------------------------------------------------------------------------------------


def mean_of(x: Tensor, where: Tensor) -> Tensor:
    """Mean of x (M, A) where `where` (M, A) is True; 0 if it is nowhere."""
    return (x * where).sum() / where.sum().clamp(min=1)


def policy_loss(
    args: Args, agent: Agent, part: Batch, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_pi, and scalars for the log."""
    acts = choosing(part.features)  # (M, A)
    with agent.autocast():
        log_probs, _ = agent.actor(part.features)  # (M, A, U)
    difference = pick(log_probs, part.actions) - part.log_probs
    ratio = difference.exp()  # (M, A)
    # min(r A, clip(r, 1 -+ eps) A)
    objective = mean_of(clip_objective(ratio, part.advantages[:, None], args.clip), acts)
    # H(pi) = - sum_u pi log pi
    entropy = mean_of(-(log_probs.exp() * log_probs).sum(-1), acts)
    scalars = {
        "policy_loss": -objective,
        "entropy": entropy,
        "kl": mean_of(ratio - 1 - difference, acts),  # an estimate of KL(pi_old, pi)
        "clipped": mean_of(((ratio - 1).abs() > args.clip).float(), acts),
    }
    return -objective - entropy_coef * entropy, scalars


# [shared: ppo_update] begin


def value_loss(agent: Agent, part: Batch) -> Tensor:
    """L_V = mean (V(s) - G)^2."""
    with agent.autocast():
        values = agent.critic(part.features)  # (M,)
    return (values - part.targets).square().mean()


def share_left(args: Args, timesteps: int) -> float:
    """Factor of learning rate and c at this time: falls linearly from 1 to --final-share."""
    done = min(timesteps / args.total_timesteps, 1.0)
    return 1 + done * (args.final_share - 1)


def update(
    args: Args, agent: Agent, batch: Batch, rng: torch.Generator, share: float
) -> dict[str, Tensor]:
    """All epochs over a rollout; share: see share_left(). Returns the means of scalars."""
    found = collections.defaultdict(list)
    agent.set_learning_rate(share * args.learning_rate)
    for _ in range(args.epochs):
        for part in minibatches(args, batch, rng):
            loss, scalars = policy_loss(args, agent, part, share * args.entropy_coef)
            norm = descend(loss, agent.actor, agent.actor_optimiser, args.max_grad_norm)
            scalars["actor_grad_norm"] = norm

            loss = value_loss(agent, part)
            norm = descend(loss, agent.critic, agent.critic_optimiser, args.max_grad_norm)
            scalars |= {"value_loss": loss, "critic_grad_norm": norm}

            for name, x in scalars.items():
                found[name].append(x.detach())
    agent.move_target()
    return {name: torch.stack(x).mean() for name, x in found.items()}


# [shared: ppo_update] end

# --- 8. Evaluate ----------------------------------------------------------------------------------
# [shared: ppo_evaluation] begin


def evaluate(args: Args, agent: Agent, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Greedy episodes of every team size. The final evaluation plays the same battles with drawn
    actions ("sampled"), too, and in the simulator with scripted policies. Returns {"SIZE" or
    "SIZE POLICY": the row of summarise()}."""
    battle_seed, policy_seed = evaluation.rng.integers(2**31, size=2).tolist()
    policies: dict[str, Policy] = {"": Player(agent)}
    if evaluation.final:
        rng = torch.Generator().manual_seed(policy_seed)
        policies["sampled"] = Player(agent, rng)
    if evaluation.final and args.backend == "sim":
        policies |= worlds.playing(args.scenario).scripted_policies(policy_seed)
    make = functools.partial(make_envs, args)
    return worlds.play_all(args, evaluation, policies, make, battle_seed)


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_player(path: str) -> Policy:
    """The greedy policy of a run or checkpoint, for battles of its scenario."""
    args = saved_args(path, Args)
    saved, _ = load_checkpoint(path)
    agent = Agent(args, worlds.family_of(args.scenario, args.egocentric), CPU)
    restore(agent, saved["agent"], path)
    return Player(agent)


# [shared: ppo_evaluation] end

# --- 9. Train -------------------------------------------------------------------------------------


def train(args: Args) -> int:
    """Train (--resume: continue a run) or, with --eval-only, evaluate; returns the exit code."""
    table = worlds.playing(args.scenario).table
    with Run(args, table, LINE) as run:
        if args.resume or args.eval_only:
            check(worlds.wrong_to_continue(args, run.saved["args"]))
        battles = make_envs(
            args,
            sizes=args.team_sizes,
            num_envs=args.num_envs,
            seed=args.seed,
            once=args.rollout == "rounds",
            first_battle=run.rank * args.num_envs,
        )
        run.close_at_end(contextlib.closing(battles))
        agent = Agent(args, battles.family, run.device)
        run.restore(agent=agent)
        run.judge = functools.partial(evaluate, args, agent)
        if args.eval_only:
            return run.evaluate_only()
        rng = own_generator(args.seed)
        player = Player(agent, rng)
        log = EpisodeLog(battles.Episode, gather)
        if args.rollout == "windows" and not args.resume:
            battles.reset()
        run.begin(
            args.scenario,
            parts={"agent": agent},
            own={"rng": rng, "battles": battles, "player": player, "log": log},
            amp=agent.amp,
            game_version=getattr(battles, "game_version", None),
        )
        while run.goes_on():
            try:
                rollout, episodes = collect(args, battles, player)
            except BattleError:  # a game failed; save() would wait for other processes, if any
                if run.size == 1:
                    run.save()
                raise
            log.episodes += episodes
            run.lap("collect_s")
            batch = prepare(args, agent, rollout)
            share = share_left(args, run.timesteps)
            scalars = update(args, agent, batch, rng, share)
            check_finite(**scalars)
            run.note(scalars)
            run.lap("learn_s")
            run.advance(total(len(rollout.later)))
            if run.is_due(args.log_every):
                run.log(log.means() | {"learning_rate": share * args.learning_rate})
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                if args.backend == "sc2":  # an evaluation starts its own games
                    run.save()
                    battles.close()
                run.evaluate("eval")
        battles.close()
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Run the script with argv, by default the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    read = functools.partial(read_args, Args, argv, validate, RESUMABLE, PRESETS)
    return call(lambda: train(read()), BattleError)


if __name__ == "__main__":
    leave(main())
