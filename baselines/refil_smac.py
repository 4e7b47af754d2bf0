"""REFIL (Iqbal et al., ICML 2021), parent of mipi_refil_smac.py; without imagined groups: AQMIX.

Agents and mixer attend to entities, so one set of networks serves teams of all compositions. In
every episode of a minibatch, entities are divided at random into two imagined groups. Each agent
gets two more utilities: one sees only its own group, one only the other group. These utilities of
all agents, mixed together, must predict the same return as those that see everything in sight.

    Q_tot    = w_final . ELU(sum_i Q_i w_i + b) + V,  w_i, w_final softmax: >= 0     --mixer flex
    Q_tot    = sum_i w_i Q_i + V,  w softmax over 8 slots                            --mixer linear
    Q_groups = Q_tot of 2 A utilities: for each agent, Q_i of its group and Q_i of the other
    y        = r + gamma Q_tot'(argmax_u Q_i)                                   double Q-learning
    y_t      = r_t + gamma ((1 - l) Q_tot'(argmax_u Q_i) + l y_t+1)             --returns lambda
    L        = (1 - lambda) E (Q_tot - y)^2 + lambda E (Q_groups - y)^2

L trains utilities and mixer. Q_tot' is of target networks, copied every --target-every episodes.

    python baselines/refil_smac.py --scenario sz --team-sizes 3 4 5 --eval-team-sizes 6 7 8
    python baselines/refil_smac.py --scenario mmm --preset cpu               for CPUs
    python baselines/refil_smac.py --scenario csz --no-imagine               AQMIX
    python baselines/refil_smac.py --resume runs/RUN --total-timesteps 20000000
    python baselines/refil_smac.py --eval-only runs/RUN --backend sc2 --num-envs 4
    torchrun --nproc-per-node 2 baselines/refil_smac.py                      two times 8 battles

Letters: T steps, B battles, M moments (states of battles, without padding), K steps between them, A
agents, S entities (agents, then enemies), U actions, V views (all in sight; own group; other
group), D features of an entity, H hidden units, R of the GRU, h heads of size d, G hypernetworks, E
units of the mixer. What the paper leaves open follows the authors' code: docs/mipi.md; worlds:
docs/battles.md.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
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
    """REFIL in StarCraft micromanagement. Defaults are those of the paper."""

    # Environment
    backend: Literal["sim", "sc2"] = "sim"  # sim: the simulator in envs/smac; sc2: StarCraft II
    scenario: str = "sz"  # world: sz, csz, mmm, terran, protoss, zerg or resource
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # team sizes (numbers of agents) in training
    enemy_ai: Literal["sticky", "closest", "focus"] = "sticky"  # sim: enemies' AI; sticky: like SC2
    clip_regeneration: bool = False  # damage minus regeneration is rewarded as max(x, 0), not |x|
    rescale: bool = False  # resource: lengths divided by the sight radius, rewards divided by 10
    egocentric: bool = False  # resource: adds the relative places of the nearest things in sight
    num_envs: Positive = 8  # B, battles played in parallel, per process
    env_threads: Positive = 1  # sim: threads that simulate the battles of a process
    game_version: str = ""  # sc2: version, e.g. 4.10.0; default: the newest installed
    max_episode_steps: Positive = 150  # time is out after so many, at most 1000, resource 145
    # Method
    imagine: bool = True  # train on imagined groups, too; without: AQMIX
    imagine_weight: Share = 0.5  # lambda, weight of the loss of imagined groups
    mixer: Literal["flex", "linear"] = "flex"  # flex: two layers with an ELU; linear: weighted sum
    target_head: Literal["tags", "pointer"] = "tags"  # tells targets apart by tag or by features
    returns: Literal["one-step", "lambda"] = "one-step"  # targets y: one-step or lambda-returns
    td_lambda: Share = 0.8  # l of --returns lambda; 0: one-step, 1: all later rewards
    timeout_terminates: bool = True  # no bootstrap when time is out, as in REFIL's code
    hidden_size: Positive = 128  # H, units of embeddings and attention
    heads: Positive = 4  # h, attention heads
    recurrent: bool = True  # agents remember with a GRU; without: a linear layer, no memory
    own_beside: bool = False  # adds the agent's own embedding, projected, to attention's output
    rnn_size: Positive = 64  # R, units of the GRU, or of the linear layer in its place
    mixing_size: Positive = 32  # E, units of the mixer and outputs of each hypernetwork
    # Base algorithm
    optimiser: Literal["rmsprop", "adam"] = "rmsprop"  # adam has torch's default betas and eps
    rmsprop_alpha: Share = 0.99  # RMSprop's decay of the mean squared gradient
    rmsprop_eps: Above = 1e-5  # RMSprop's eps, added to the root of the mean squared gradient
    learning_rate: Amount = 5e-4  # learning rate at the start
    final_share: Share = 1.0  # share of the learning rate that is left at --total-timesteps
    anneal_from: Count = 0  # environment steps after which the learning rate falls linearly
    max_grad_norm: Above = 10.0  # largest gradient norm, of utilities and mixer together
    gamma: Share = 0.99  # discount factor per step
    batch_size: Positive = 32  # episodes (with --replay-window: windows) per minibatch
    buffer_size: Positive = 5000  # episodes in the replay buffer
    replay_window: Count = 0  # consecutive steps of each episode, a GRU begins at 0; 0: all steps
    windows: Literal["whole", "clipped"] = "whole"  # clipped: all steps of an episode alike
    updates_per_iteration: Positive = 8  # gradient steps after each round of num_envs episodes
    target_every: Positive = 200  # episodes between copies to target networks, one a round at most
    epsilon_start: Share = 1.0  # probability of a random action at the start
    epsilon_final: Share = 0.05  # probability of a random action after --epsilon-steps
    epsilon_steps: Positive = 500_000  # environment steps in which epsilon falls linearly
    amp: bool = False  # bf16 autocast where the hardware has it
    compile: bool = False  # torch.compile networks: more than five minutes on a GPU (docs/gpu.md)
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
        "total_timesteps": 1_000_000,
        "hidden_size": 64,
        "amp": True,
        "num_envs": 128,
        "recurrent": False,
        "own_beside": True,
        "target_head": "pointer",
        "returns": "lambda",
        "optimiser": "adam",
        "learning_rate": 1e-3,
        "final_share": 0.1,
        "replay_window": 8,
        "batch_size": 64,
        "buffer_size": 2000,
        "updates_per_iteration": 64,
        "epsilon_steps": 200_000,
        "eval_every": 100_000,
        "eval_episodes": 64,
    },
    "cpu scenario resource": {  # added to the values of "cpu"
        "rescale": True,
        "egocentric": True,
        "num_envs": 32,
        "mixer": "linear",
        "target_head": "tags",
        "timeout_terminates": False,
        "heads": 2,
        "gamma": 0.95,
        "buffer_size": 3000,
        "target_every": 64,
        "epsilon_final": 0.4,
        "epsilon_steps": 150_000,
        "eval_every": 250_000,
        "eval_episodes": 32,
    },
}
# With --resume, train() refuses another backend, version or number; --eval-only may change them.
RESUMABLE = ("backend", "env_threads", "game_version", "num_envs", "eval_team_sizes", "compile")
LINE = ("return", "win", "td_loss", "sps")  # scalars of lines printed where there is no terminal


def validate(args: Args) -> list[tuple[Any, str]]:
    """(whether it is wrong, message) for combinations of flags that would not do what they say."""
    lambdas = args.returns == "lambda"
    too_many = args.num_envs > args.buffer_size and not args.eval_only
    rmsprop = ("rmsprop_alpha", "rmsprop_eps")
    own_rmsprop = any(getattr(args, x) != getattr(Args, x) for x in rmsprop)
    return [
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (too_many, "--num-envs exceeds --buffer-size"),
        (args.hidden_size % args.heads, "--hidden-size is no multiple of --heads"),
        (
            not args.imagine and args.imagine_weight != Args.imagine_weight,
            "--imagine-weight needs --imagine",
        ),
        (
            args.windows != "whole" and args.replay_window < 2,
            "--windows needs --replay-window 2 or more",
        ),
        (not lambdas and args.td_lambda != Args.td_lambda, "--td-lambda needs --returns lambda"),
        (lambdas and args.replay_window == 1, "--returns lambda needs --replay-window 2 or more"),
        (
            args.optimiser != "rmsprop" and own_rmsprop,
            "--rmsprop-alpha and --rmsprop-eps need --optimiser rmsprop",
        ),
        (args.anneal_from and args.final_share == 1, "--anneal-from needs --final-share below 1"),
        (
            args.anneal_from >= args.total_timesteps,
            "--anneal-from is not before --total-timesteps",
        ),
        (
            args.target_head == "pointer" and args.scenario == "resource",
            "--scenario resource has nobody to attack: it needs --target-head tags",
        ),
        *worlds.wrong_flags(args),
    ]


# --- 3. Worlds ------------------------------------------------------------------------------------
# [shared: battles] begin


def make_envs(
    args: Args,
    sizes: tuple[int, ...],
    num_envs: int,
    seed: int,
    first_battle: int = 0,
) -> Any:
    """num_envs battles of teams of these sizes. A battle that has ended does not start again.
    Random numbers of a battle depend on the seed and its number, counted from first_battle. All
    worlds are on the CPU. UsageError where there are no such teams or no game.
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
            rescale=args.rescale,
            egocentric=args.egocentric,
        )
    except (ValueError, BattleError) as error:
        raise UsageError(str(error)) from None


# [shared: battles] end

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
# [shared: refil] begin


class Views(NamedTuple):
    """One quantity, computed with three masks: agents see all that is in sight; of that, only
    their own group; only the other group. Without imagined groups only full_view is present."""

    full_view: Any  # a tensor, or a named tuple of tensors
    own_group: Any = None
    other_group: Any = None

    def map(self, function: Callable[[Any], Any]) -> Views:
        """Apply function to each view that is present."""
        return Views(*[function(x) for x in self.present()])

    def present(self) -> list[Any]:
        return [x for x in self if x is not None]


def mask_views(hidden: Tensor, groups: Tensor | None) -> Tensor:
    """Masks (M, V, A, S), True: hidden, of V views in the order of Views, from hidden (M, A, S).
    V = 1 or, with groups (M, S) bool, 3. All views at once are faster than one by one."""
    if groups is None:
        return hidden[:, None]
    A = hidden.shape[1]
    apart = groups[:, :A, None] != groups[:, None]  # (M, A, S)
    return torch.stack((hidden, hidden | apart, hidden | ~apart), dim=1)


# [shared: refil] end
# [shared: product] begin


def apply_both(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    """second(first(x)), computed as one linear layer. REFIL's network has two linear layers here
    with nothing between them. Both get the same gradients as if computed one by one, and an
    update takes about a tenth less CPU time: 0.73 instead of 0.80 s at the paper's width, 0.26
    instead of 0.30 s at the width of --preset cpu (one thread)."""
    weight = second.weight @ first.weight
    bias = second.weight @ first.bias + second.bias
    return F.linear(x.to(weight.dtype), weight, bias)


# [shared: product] end
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
# [shared: heads] begin


class Tagged(NamedTuple):
    """Units sorted by tag, which is the order of the actions that attack or heal them."""

    units: Tensor  # (M, 1, U - 6, H): embeddings; 0 where no unit has the tag
    choices: Tensor  # (M, V, A, U - 6): 1 where agent i may choose it and sees it in the view


def by_tag(units: Tensor, features: Features, mask: Tensor) -> Tagged:
    """Embeddings units (M, S, H), sorted by tag; mask (M, V, A, S) is True for hidden units."""
    num_targets = features.avail_actions.shape[-1] - FIRST_TARGET
    tags = features.entities[:, None, :, :num_targets]  # (M, 1, S, U - 6): one-hot; 0: no target
    seen = (~mask).to(tags.dtype) @ tags  # (M, V, A, U - 6)
    choices = seen * features.avail_actions[:, None, :, FIRST_TARGET:]
    return Tagged(tags.mT @ units[:, None].to(tags.dtype), choices)


class TagHead(nn.Linear):
    """Outputs (..., U), one per action, from the memory (..., R). `tagged` is not read."""

    def forward(self, x: Tensor, tagged: Tagged | None = None) -> Tensor:
        return super().forward(x)


class PointerHead(nn.Module):
    """Outputs (..., A, U), one per action, from the memory (..., A, R) and the embeddings of
    targets. A target's output is what any attack is worth, and how much better this one suits the
    agent than those that it may choose from do on average; 0 better if it is hidden. Without that
    average Q_i learns first that strong targets are worth more: early in battles more is to come.
    """

    def __init__(self, R: int, H: int):
        super().__init__()
        self.own = nn.Linear(R, FIRST_TARGET + 1)  # the last: an attack, whoever the target is
        self.query = nn.Linear(R, H)
        self.key = nn.Linear(H, H)

    def forward(self, x: Tensor, tagged: Tagged) -> Tensor:
        own, key = self.own(x), self.key(tagged.units)
        # <W_q x_i, W_k e_j> / sqrt(H): how well target j suits agent i
        score = self.query(x) @ key.mT / math.sqrt(key.shape[-1])  # (..., A, U - 6)
        number = tagged.choices.sum(-1, keepdim=True).clamp(min=1)
        mean = (score * tagged.choices).sum(-1, keepdim=True) / number
        targets = own[..., FIRST_TARGET:] + (score - mean) * tagged.choices
        return torch.cat((own[..., :FIRST_TARGET], targets), dim=-1)


def new_head(actions: int, args: Args) -> TagHead | PointerHead:
    """The output layer that --target-head chooses, from R units to `actions` outputs."""
    if args.target_head == "tags":
        return TagHead(args.rnn_size, actions)
    return PointerHead(args.rnn_size, args.hidden_size)


# [shared: heads] end


class Utility(nn.Module):
    """Utilities Q_i(u) of every agent: attention to entities, GRU, one output per action."""

    def __init__(self, inputs: int, actions: int, args: Args):
        super().__init__()
        H = args.hidden_size
        self.embed = nn.Linear(inputs, H)
        self.attention = Attention(1, H, args.heads)
        self.project = nn.Linear(H, H)
        self.gru_input = nn.Linear(H, args.rnn_size)
        memory = nn.GRU if args.recurrent else nn.Linear
        self.gru = memory(args.rnn_size, args.rnn_size)
        self.points = args.target_head == "pointer"
        self.head = new_head(actions, args)
        self.own = nn.Linear(H, args.rnn_size, bias=False) if args.own_beside else None

    def forward(
        self, features: Features, groups: Tensor | None = None, hidden: Tensor | None = None
    ) -> tuple[Views, Tensor | None]:
        """Utilities (M, A, U) of each view, and the hidden state (1, B V A, R) after them."""
        A = features.unseen.shape[1]
        mask = mask_views(features.unseen, groups)  # (M, V, A, S)
        units = F.relu(self.embed(features.entities))  # (M, S, H)
        query, key, value = self.attention(units[:, :, None], A)
        x = attend(query, key, value, mask)[0]  # (M, V, A, H)
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for utilities
            x = apply_both(self.project, self.gru_input, x)
            if self.own is not None:
                x = x + self.own(units[:, None, :A].to(x.dtype))
            x, hidden = remember(self.gru, F.relu(x), features.played, hidden)  # (M, V, A, R)
            tagged = by_tag(units, features, mask) if self.points else None
            q = self.head(x, tagged).masked_fill(features.empty[:, None, :A, None], 0.0)
        return Views(*q.movedim(1, 0)), hidden


class Mixed(NamedTuple):
    """Outputs of the mixer at M moments."""

    q_total: Tensor  # (M,)
    q_groups: Tensor | None = None  # (M,); None without imagined groups


class Mixer(nn.Module):
    """Q_tot of chosen utilities; w, V, w_final, b come from hypernetworks, which see all units."""

    def __init__(self, inputs: int, args: Args):
        super().__init__()
        self.linear = args.mixer == "linear"
        # Hypernetworks, in this order: w, V and, of two layers, w_final, b
        G, H, E = 2 if self.linear else 4, args.hidden_size, args.mixing_size
        self.embed = nn.Linear(inputs, G * H)
        self.attention = Attention(G, H, args.heads)
        self.project = uniform_parameter(H, G, H, H)
        self.project_bias = uniform_parameter(H, G, H)
        self.out = uniform_parameter(H, G, H, E)
        self.out_bias = uniform_parameter(H, G, E)

    def forward(self, q: Views, features: Features, groups: Tensor | None = None) -> Mixed:
        """Q_tot of q (M, A); also Q_groups, if q has views of groups (M, S) bool."""
        A, G = features.unseen.shape[1], len(self.project)
        filled = ~features.empty[:, :A]
        no_unit = features.empty[:, :A, None] | features.empty[:, None]  # (M, A, S)
        mask = mask_views(no_unit, groups)  # (M, V, A, S)
        x = F.relu(self.embed(features.entities))  # (M, S, G H)
        x = x.unflatten(-1, (G, -1))  # (M, S, G, H)
        query, key, value = self.attention(x, A)
        # w is computed in each view, for that view's utilities; the rest only in the full view.
        w = attend(query[:1], key[:1], value[:1], mask)[0]  # (M, V, A, H)
        rest = attend(query[1:], key[1:], value[1:], mask[:, :1])
        rest = rest[:, :, 0]  # (G - 1, M, A, H)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.project @ self.out  # (G, H, E): two layers as one, see apply_both()
            bias = self.project_bias[:, None] @ self.out  # (G, 1, E)
            bias = bias[:, 0] + self.out_bias  # (G, E)
            w = w.to(weight.dtype) @ weight[0] + bias[0]  # (M, V, A, E)
            # The rest are means over the 8 slots of agents; empty slots count as 0.
            rest = rest.to(weight.dtype) * filled[..., None]
            rest = rest.sum(2) / SIDE  # (G - 1, M, H)
            share = filled.sum(-1, keepdim=True) / SIDE  # (M, 1)
            rest = rest @ weight[1:] + share * bias[1:, None]  # (G - 1, M, E)
            utilities = torch.stack(q.present()).movedim(0, 1)  # (M, V, A)
            if self.linear:
                totals = self.mix_linear(utilities, w, features)
            else:
                totals = self.mix_flex(utilities, w, w_final=rest[1], b=rest[2])
            v = rest[0].mean(-1, keepdim=True)  # (M, 1)
            totals = (totals + v).T  # (1 or 2, M)
        return Mixed(*totals)

    def mix_flex(self, q: Tensor, w: Tensor, w_final: Tensor, b: Tensor) -> Tensor:
        """w_final . ELU(sum_i Q_i w_i + b): (M, 1) or, with groups, (M, 2), the second of the
        2 A utilities in groups; q (M, V, A), w (M, V, A, E), w_final and b (M, E)."""
        x = (q[..., None] * w.softmax(-1)).sum(2)  # (M, V, E)
        if x.shape[1] > 1:
            full_view, own_group, other_group = x.unbind(1)
            x = torch.stack((full_view, own_group + other_group), dim=1)
        x = F.elu(x + b[:, None])
        return (x * w_final.softmax(-1)[:, None]).sum(-1)

    def mix_linear(self, q: Tensor, w: Tensor, features: Features) -> Tensor:
        """sum_i w_i Q_i, w a softmax over all 8 slots: (M, 1) or, with groups, (M, 2), the second
        of the utilities in groups, softmax over 2 x 8 slots; q (M, V, A), w (M, V, A, E)."""
        # paper and code differ: the dead score 0 here; in REFIL's code only empty slots do
        gone = features.avail_actions[:, None, :, 0]  # (M, 1, A): only dead and empty have a no-op
        padding = (0, SIDE - q.shape[-1])
        score = F.pad(w.mean(-1).masked_fill(gone, 0.0), padding)  # (M, V, 8)
        q = F.pad(q, padding)
        w = score[:, 0].softmax(-1)
        totals = [(w * q[:, 0]).sum(-1)]
        if q.shape[1] > 1:
            weights = score[:, 1:].flatten(1).softmax(-1)  # (M, 16)
            totals.append((weights * q[:, 1:].flatten(1)).sum(-1))
        return torch.stack(totals, dim=1)


# [shared: optimiser] begin


def new_optimiser(args: Args, net: nn.Module) -> torch.optim.Optimizer:
    """An optimiser: RMSprop as in REFIL's code, or Adam with torch's default betas and eps."""
    options = {"lr": args.learning_rate, "foreach": True}
    if args.optimiser == "adam":
        return torch.optim.Adam(net.parameters(), **options)
    options |= {"alpha": args.rmsprop_alpha, "eps": args.rmsprop_eps}
    return torch.optim.RMSprop(net.parameters(), **options)


def learning_rate_at(args: Args, timesteps: int) -> float:
    """The learning rate: constant until --anneal-from, then linear until --total-timesteps."""
    falling = args.total_timesteps - args.anneal_from
    done = min(max(timesteps - args.anneal_from, 0) / falling, 1.0)
    return args.learning_rate * (1 + done * (args.final_share - 1))


# [shared: optimiser] end


class Agent(Parts):
    """Utilities, mixer, their target networks and optimiser."""

    def __init__(self, args: Args, family: Family, device: torch.device):
        self.args, self.device = args, device
        self.amp = args.amp and has_bf16(device)
        inputs = family.features + family.n_actions
        torch.manual_seed(args.seed)
        self.utility = Utility(inputs, family.n_actions, args).to(device)
        self.mixer = Mixer(inputs, args).to(device)
        self.target_utility = copy.deepcopy(self.utility)
        self.target_mixer = copy.deepcopy(self.mixer)
        self.optimiser = new_optimiser(args, self.critic())
        if args.compile:
            for net in (self.utility, self.mixer, self.target_utility, self.target_mixer):
                net.compile(dynamic=True)

    def critic(self) -> nn.ModuleList:
        """The networks that the loss trains."""
        return nn.ModuleList((self.utility, self.mixer))

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of all optimisers."""
        for part in self.parts().values():
            for group in getattr(part, "param_groups", ()):
                group["lr"] = learning_rate

    def copy_to_targets(self) -> None:
        self.target_utility.load_state_dict(self.utility.state_dict())
        self.target_mixer.load_state_dict(self.mixer.state_dict())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


# --- 6. Data --------------------------------------------------------------------------------------


class Player:
    """A policy for battles that begin together: greedy or, with rng, epsilon-greedy."""

    def __init__(self, agent: Agent, epsilon: float = 0.0, rng: torch.Generator | None = None):
        """rng: generator of the exploration; None: no exploration."""
        self.agent, self.epsilon, self.rng = agent, epsilon, rng
        self.hidden: Tensor | None = None  # (1, B A, R)
        self.last_actions: Tensor | None = None  # (B, 8) int64; -1 at the start

    @torch.no_grad()
    def __call__(self, battles: Any) -> Tensor:
        """Actions (B, 8) int64; keeps the hidden state for the next call."""
        obs = battles.obs
        begins = battles.time == 0
        if begins.any() != begins.all():
            raise ValueError("This player is for battles that begin together: Combat(once=True).")
        if begins.any():
            self.hidden = None
            self.last_actions = torch.full(obs.avail.shape[:2], -1)
        played = torch.ones(1, len(obs.avail), dtype=torch.bool)
        features = encode(obs, self.last_actions, played, self.agent.device)
        q, self.hidden = self.agent.utility(features, hidden=self.hidden)
        q = q.full_view.masked_fill(~features.avail_actions, MASKED)
        actions = q.argmax(-1).cpu()
        if self.rng:
            avail = obs.avail[:, : actions.shape[1]]
            actions = explore(actions, avail, self.epsilon, self.rng)
        # Empty slots get the no-op.
        self.last_actions = F.pad(actions, (0, SIDE - actions.shape[1]))
        return self.last_actions


# [shared: replay] begin


def explore(actions: Tensor, avail: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """Actions (B, A), each replaced with probability epsilon by any of avail (B, A, U)."""
    noise = torch.rand(avail.shape, generator=rng)
    any_of = noise.masked_fill(~avail, -1.0).argmax(-1)
    explores = torch.rand(actions.shape, generator=rng) < epsilon
    return torch.where(explores, any_of, actions)


def epsilon_at(args: Args, timesteps: int) -> float:
    """Epsilon: falls linearly for --epsilon-steps, then stays at --epsilon-final."""
    done = min(timesteps / args.epsilon_steps, 1.0)
    return args.epsilon_start + done * (args.epsilon_final - args.epsilon_start)


class Played(NamedTuple):
    """One step of B battles, as the replay buffer stores it."""

    actions: Tensor  # (B, 8) int64
    rewards: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool


class Batch(NamedTuple):
    """A minibatch of B episodes or windows: K steps in all, between M = K + B moments."""

    features: Features  # of M moments
    now: Tensor  # (K,) int64: index of the moment at which the step begins
    later: Tensor  # (K,) int64: index of the moment at which the step ends
    actions: Tensor  # (K, A) int64
    rewards: Tensor  # (K,) float32
    terminated: Tensor  # (K,) bool: no bootstrap after this step


def draw_windows(args: Args, ends: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start and length (B,) of a window of --replay-window steps of each episode, ends (B,) steps
    long. Whole windows lie in the episode, so few of them have its first or its last step. Clipped
    ones may begin before it or end after it, where they are cut off: equally many have each step.
    """
    window, chance = args.replay_window, torch.rand(len(ends), generator=rng)
    if args.windows == "whole":
        length = ends.clamp(max=window)
        return (chance * (ends - length + 1)).long(), length
    start = (chance * (ends + window - 1)).long() - (window - 1)  # (B,): 1 - window to ends - 1
    stop = (start + window).minimum(ends)
    start = start.clamp(min=0)
    return start, stop - start


class ReplayBuffer:
    """The last --buffer-size episodes, as snapshots of units; sample() computes observations."""

    def __init__(self, args: Args, battles: Any, device: torch.device):
        """battles: any battles of the scenario; they give the stored shapes, and observe()."""
        self.args, self.battles, self.device = args, battles, device
        self.episodes = 0  # number ever added
        N, T = args.buffer_size, args.max_episode_steps
        self.fixed = {"length": torch.empty(N, dtype=torch.int64)}  # (N, ...), per episode
        self.states = {}  # (N, T + 1, ...), per moment
        for name, x in battles.snapshot._asdict().items():
            shape = x.shape[1:]
            if name in battles.fixed:
                self.fixed[name] = torch.empty(N, *shape, dtype=x.dtype)
            else:
                self.states[name] = torch.empty(N, T + 1, *shape, dtype=x.dtype)
        self.steps = {  # (N, T, ...), per step
            "actions": torch.empty(N, T, SIDE, dtype=torch.int8),
            "rewards": torch.empty(N, T),
            "terminated": torch.empty(N, T, dtype=torch.bool),
        }

    @property
    def size(self) -> int:
        return min(self.episodes, self.args.buffer_size)

    def add(self, snapshots: list[Any], steps: list[Played], lengths: Tensor) -> None:
        """Store one episode of each of B battles: T + 1 snapshots and the T steps between them. In
        battle b only the first lengths[b] steps are real; the rest is padding, never read."""
        place = torch.arange(self.episodes, self.episodes + len(lengths)) % self.args.buffer_size
        self.fixed["length"][place] = lengths
        for name in self.battles.fixed:
            self.fixed[name][place] = getattr(snapshots[0], name)
        for t, snapshot in enumerate(snapshots):
            for name, store in self.states.items():
                store[place, t] = getattr(snapshot, name)
        for t, step in enumerate(steps):
            for name, store in self.steps.items():
                store[place, t] = getattr(step, name).to(store.dtype)
        self.episodes += len(lengths)

    def sample(self, rng: torch.Generator, size: int) -> Batch:
        """A minibatch of `size` different episodes: all steps, or --replay-window in a row."""
        index = torch.randperm(self.size, generator=rng)[:size]
        ends = self.fixed["length"][index]
        start, length = torch.zeros_like(ends), ends
        if self.args.replay_window:
            start, length = draw_windows(self.args, ends, rng)
        order = length.argsort(descending=True, stable=True)
        index, ends, length, start = index[order], ends[order], length[order], start[order]
        T = int(length[0])
        step = torch.arange(T + 1)[:, None]
        played = step <= length  # (T + 1, B)
        time = (start + step).minimum(ends)  # (T + 1, B), in the episode; of padding any real one
        obs = self.observe(index, time, played)
        # At time 0 this reads the last slot, which is masked.
        last_actions = self.steps["actions"][index, time - 1]  # (T + 1, B, 8)
        last_actions = last_actions.masked_fill((time == 0)[..., None], -1)[played].long()
        acted = time[:-1].minimum(ends - 1)  # (T, B): when these steps began
        actions = self.steps["actions"][index, acted]  # (T, B, 8)
        rewards = self.steps["rewards"][index, acted]  # (T, B)
        terminated = self.steps["terminated"][index, acted]
        if self.args.timeout_terminates:
            terminated = terminated | (acted == ends - 1)
        features = encode(obs, last_actions, played, self.device)
        A = features.unseen.shape[1]
        moment = played.flatten().cumsum(0).view_as(played) - 1  # (T + 1, B)
        goes_on = played[1:]  # (T, B): the step was played
        return Batch(
            features=features,
            now=send(moment[:-1][goes_on], self.device),
            later=send(moment[1:][goes_on], self.device),
            actions=send(actions[goes_on][:, :A].long(), self.device),
            rewards=send(rewards[goes_on], self.device),
            terminated=send(terminated[goes_on], self.device),
        )

    def observe(self, index: Tensor, time: Tensor, played: Tensor) -> Observation:
        """Observations (M, ...) of episodes index (B,) at time (T + 1, B), where played."""
        snapshot = {name: x[index, time][played] for name, x in self.states.items()}
        for name in self.battles.fixed:
            x = self.fixed[name][index]
            snapshot[name] = x.expand(len(time), *x.shape)[played]
        return self.battles.observe(self.battles.snapshot._replace(**snapshot))

    def filled(self) -> dict[str, Tensor]:
        """All that is stored, without padding, for a checkpoint."""
        n, real = self.size, self.is_real()
        tensors = {"episodes": torch.tensor(self.episodes)}
        tensors |= {name: x[:n] for name, x in self.fixed.items()}
        tensors |= {name: x[:n][real] for name, x in self.states.items()}
        return tensors | {name: x[:n][real[:, 1:]] for name, x in self.steps.items()}

    def refill(self, tensors: dict[str, Tensor]) -> None:
        """Restore what filled() returned."""
        self.episodes = int(tensors["episodes"])
        n = self.size
        for name, x in self.fixed.items():
            x[:n] = tensors[name]
        real = self.is_real()
        for name, x in self.states.items():
            x[:n][real] = tensors[name]
        for name, x in self.steps.items():
            x[:n][real[:, 1:]] = tensors[name]

    def is_real(self) -> Tensor:
        """(size, T + 1) bool: True at moments that are not padding."""
        time = torch.arange(self.args.max_episode_steps + 1)
        return time <= self.fixed["length"][: self.size, None]


def copied(x: Any) -> Any:
    """A copy of a named tuple of tensors: worlds overwrite their tensors."""
    return x._make([tensor.clone() for tensor in x])


def collect(battles: Any, policy: Policy, buffer: ReplayBuffer) -> list[Any]:
    """Play one episode of every battle and add it to the buffer. Returns the episodes (a list of
    battles.Episode) in the order in which they ended."""
    battles.reset()
    snapshots = [copied(battles.snapshot)]
    steps, episodes = [], []
    while len(episodes) < battles.num_battles:
        actions = policy(battles)
        step = battles.step(actions)
        steps.append(copied(Played(actions, step.reward, step.terminated)))
        snapshots.append(copied(step.final))
        episodes += step.episodes
    check_finite(rewards=torch.stack([step.rewards for step in steps]))
    buffer.add(snapshots, steps, lengths=battles.time.long())
    return episodes


# [shared: replay] end

# --- 7. Update ------------------------------------------------------------------------------------


def pick(q: Tensor, actions: Tensor) -> Tensor:
    """Utilities (K, A) of the chosen actions (K, A), from q (K, A, U)."""
    return q.gather(-1, actions[..., None])[..., 0]


def draw_groups(features: Features, rng: torch.Generator) -> Tensor:
    """Random groups (M, S) bool, constant in an episode; P(True) = p ~ U(0, 1) of each episode."""
    B, S = features.played.shape[1], features.empty.shape[1]
    p = torch.rand(B, 1, generator=rng)
    groups = torch.rand(B, S, generator=rng) < p
    battle = features.played.nonzero()[:, 1]  # (M,)
    return send(groups[battle], features.empty.device)


# [shared: returns] begin


def lambda_returns(args: Args, batch: Batch, next_values: Tensor) -> Tensor:
    """Lambda-returns y (K,); next_values (K,): values V at the ends of steps. As in Peng's
    Q(lambda), there is no correction for later actions that are not those of V's policy."""
    # Steps are ordered by time, then battle; the longest battles come first.
    sizes = batch.features.played[1:].sum(1).tolist()
    steps = (batch.rewards, next_values, ~batch.terminated)
    times = list(zip(*(x.split(sizes) for x in steps)))
    found, later = [], next_values[:0]
    for rewards, values, goes_on in reversed(times):
        later = torch.cat((later, values[len(later) :]))  # y_t+1 = V_t+1 at a last step
        # y_t = r_t + gamma ((1 - l) V_t+1 + l y_t+1)
        mixed = (1 - args.td_lambda) * values + args.td_lambda * later
        later = rewards + args.gamma * mixed * goes_on
        found.append(later)
    return torch.cat(found[::-1])


# [shared: returns] end


@torch.no_grad()
def find_targets(args: Args, agent: Agent, batch: Batch, q: Tensor) -> Tensor:
    """Targets y (K,); q (M, A, U): utilities of the learning network, which choose the actions."""
    features, later = batch.features, batch.later
    best = q.masked_fill(~features.avail_actions, MASKED).argmax(-1)[later]  # (K, A)
    next_q, _ = agent.target_utility(features)
    chosen = Views(pick(next_q.full_view[later], best))
    # y = r + gamma Q_tot'(argmax_u Q_i)
    q_total = agent.target_mixer(chosen, features.at(later)).q_total
    if args.returns == "lambda":
        return lambda_returns(args, batch, q_total)
    return batch.rewards + args.gamma * q_total * ~batch.terminated


def critic_loss(
    args: Args, agent: Agent, batch: Batch, groups: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss L, and scalars for the log; groups (M, S), None without imagined groups."""
    features, now = batch.features, batch.now
    with agent.autocast():
        q, _ = agent.utility(features, groups)  # (M, A, U) each
        y = find_targets(args, agent, batch, q.full_view.detach())
        chosen = q.map(lambda x: pick(x[now], batch.actions))  # (K, A) each
        groups_now = None if groups is None else groups[now]
        mixed = agent.mixer(chosen, features.at(now), groups_now)
    # E (Q_tot - y)^2
    td_loss = (mixed.q_total - y).square().mean()
    scalars = {"td_loss": td_loss, "q_total": mixed.q_total.mean()}
    if groups is None:
        return td_loss, scalars
    # E (Q_groups - y)^2
    group_loss = (mixed.q_groups - y).square().mean()
    scalars["group_loss"] = group_loss
    weight = args.imagine_weight
    return (1 - weight) * td_loss + weight * group_loss, scalars


def update(
    args: Args, agent: Agent, buffer: ReplayBuffer, rng: torch.Generator
) -> dict[str, Tensor]:
    """--updates-per-iteration gradient steps, a minibatch each. Returns the means of scalars."""
    found = collections.defaultdict(list)
    for _ in range(args.updates_per_iteration):
        batch = buffer.sample(rng, args.batch_size)
        groups = draw_groups(batch.features, rng) if args.imagine else None
        loss, scalars = critic_loss(args, agent, batch, groups)
        norm = descend(loss, agent.critic(), agent.optimiser, args.max_grad_norm)
        scalars["grad_norm"] = norm
        for name, x in scalars.items():
            found[name].append(x.detach())
    return {name: torch.stack(x).mean() for name, x in found.items()}


# --- 8. Evaluate ----------------------------------------------------------------------------------
# [shared: evaluation] begin


def evaluate(args: Args, agent: Agent, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Greedy episodes of every team size. The final evaluation in the simulator also plays scripted
    policies, in the same battles. Returns {"SIZE" or "SIZE SCRIPT": the row of summarise()}."""
    battle_seed, policy_seed = evaluation.rng.integers(2**31, size=2).tolist()
    policies: dict[str, Policy] = {"": Player(agent)}
    if evaluation.final and args.backend == "sim":
        policies |= worlds.playing(args.scenario).scripted_policies(policy_seed)
    make = functools.partial(make_envs, args)
    return worlds.play_all(args, evaluation, policies, make, battle_seed)


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_player(path: str) -> Policy:
    """The greedy policy of a run or checkpoint, for battles of its scenario that begin together."""
    args = dataclasses.replace(saved_args(path, Args), compile=False)
    saved, _ = load_checkpoint(path)
    agent = Agent(args, worlds.family_of(args.scenario, args.egocentric), CPU)
    restore(agent, saved["agent"], path)
    return Player(agent)


# [shared: evaluation] end

# --- 9. Train -------------------------------------------------------------------------------------


def train(args: Args) -> int:
    """Train (--resume: continue a run) or, with --eval-only, evaluate; returns the exit code."""
    table = worlds.playing(args.scenario).table
    with Run(args, table, LINE) as run:
        if args.resume or args.eval_only:
            check(worlds.wrong_to_continue(args, run.saved["args"]))
        args = run.own_share(args, "batch_size", "buffer_size", "target_every")
        check(validate(args))  # again: a round must fit into this process's share of the buffer
        battles = make_envs(
            args,
            sizes=args.team_sizes,
            num_envs=args.num_envs,
            seed=args.seed,
            first_battle=run.rank * args.num_envs,
        )
        run.close_at_end(contextlib.closing(battles))
        agent = Agent(args, battles.family, run.device)
        run.restore(agent=agent)
        run.judge = functools.partial(evaluate, args, agent)
        if args.eval_only:
            return run.evaluate_only()
        buffer = ReplayBuffer(args, battles, run.device)
        rng = own_generator(args.seed)
        log = EpisodeLog(battles.Episode, gather)
        run.begin(
            args.scenario,
            parts={"agent": agent},
            own={"rng": rng, "battles": battles, "log": log},
            replays={"replay": buffer},
            amp=agent.amp,
            game_version=getattr(battles, "game_version", None),
        )
        while run.goes_on():
            epsilon = epsilon_at(args, run.timesteps)
            try:
                episodes = collect(battles, Player(agent, epsilon, rng), buffer)
            except BattleError:  # a game failed; save() would wait for other processes, if any
                if run.size == 1:
                    run.save()
                raise
            log.episodes += episodes
            run.lap("collect_s")
            learning_rate = learning_rate_at(args, run.timesteps)
            agent.set_learning_rate(learning_rate)
            scalars = {}
            if buffer.size >= args.batch_size:
                scalars = update(args, agent, buffer, rng)
            check_finite(**scalars)
            run.note(scalars)
            since_copy = buffer.episodes % args.target_every
            if since_copy < len(episodes):  # a multiple of target_every was reached
                agent.copy_to_targets()
            run.lap("learn_s")
            run.advance(total(sum(episode.length for episode in episodes)))
            if run.is_due(args.log_every):
                settings = {"epsilon": epsilon, "learning_rate": learning_rate}
                run.log(log.means() | settings)
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
