"""REFIL (Iqbal et al., ICML 2021), the parent of mipi_refil_smac.py; without imagined groups AQMIX.

Agents and mixer attend to entities, so one set of networks serves teams of all compositions. In
every episode of a minibatch the entities are split at random in two groups: utilities that see
one's own group only, and those that see the other one only, must together explain the same return.

    Q_tot    = w_final . ELU(sum_i Q_i w_i + b) + V,  w_i, w_final softmax: >= 0            mixer
    Q_tot    = sum_i w_i Q_i + V,  w softmax over agents                             --mixer linear
    Q_groups = the same of 2 A utilities, Q_i of i's group and Q_i of the other group
    y        = r + gamma Q_tot'(argmax_u Q_i)                                   double Q-learning
    y_t      = r_t + gamma ((1 - l) Q_tot'(argmax_u Q_i) + l y_t+1)             --returns lambda
    L        = (1 - lambda) E (Q_tot - y)^2 + lambda E (Q_groups - y)^2

L moves utilities and mixer; Q_tot' is of copies of both, made every --target-every episodes.

    python baselines/refil_smac.py --scenario sz --team-sizes 3 4 5 --eval-team-sizes 6 7 8
    python baselines/refil_smac.py --scenario mmm --preset cpu               for CPUs
    python baselines/refil_smac.py --scenario csz --no-imagine               AQMIX
    python baselines/refil_smac.py --resume runs/RUN --total-timesteps 20000000
    python baselines/refil_smac.py --eval-only runs/RUN --backend sc2        in StarCraft II
    torchrun --nproc-per-node 2 baselines/refil_smac.py                      two times 8 battles

Letters: T steps, B battles, M moments (of all battles, without padding), K steps between them, A
agents, S entities (agents, then enemies), V views (all one sees; of it one's own group; of it the
other group), D features of an entity, H hidden units, R of the GRU, h heads of size d, G
hypernetworks, E units of the mixer. What the paper leaves open follows the authors' code:
docs/mipi.md; worlds: docs/battles.md.
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
    """REFIL in StarCraft micromanagement. Defaults are the paper's."""

    # Environment
    backend: Literal["sim", "sc2"] = "sim"  # envs/smac/combat.py or StarCraft II
    scenario: Literal["sz", "csz", "mmm", "resource"] = "sz"  # units; Resource Collection
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # to train with
    enemy_ai: Literal["sticky", "closest", "focus"] = "sticky"  # sim: as the game's, or others
    clip_regeneration: bool = False  # what enemies regenerate earns nothing, instead of a reward
    rescale: bool = False  # resource: lengths in units of sight, rewards a tenth
    egocentric: bool = False  # resource: also where the nearest things one sees are from oneself
    num_envs: Positive = 8  # B, battles at a time, per process
    env_threads: Positive = 1  # sim: over which they are spread
    game_version: str = ""  # sc2: as 4.10.0; default: the newest that is installed
    max_episode_steps: Positive = 150  # of a battle; resource has at most 145
    # Method
    imagine: bool = True  # imagined groups; without: AQMIX
    imagine_weight: Share = 0.5  # lambda, of their loss
    mixer: Literal["flex", "linear"] = "flex"  # of utilities
    target_head: Literal["tags", "pointer"] = "tags"  # whom to attack: by its tag, or what it is
    returns: Literal["one-step", "lambda"] = "one-step"  # y, of a step or of all that follow
    td_lambda: Share = 0.8  # l, of lambda-returns
    timeout_terminates: bool = True  # no bootstrap when time is out, as in the authors' code
    hidden_size: Positive = 128  # H, of embeddings and attention
    heads: Positive = 4  # h, of attention
    recurrent: bool = True  # agents with a GRU; without: a layer that sees the present alone
    own_beside: bool = False  # agents read what they are beside what they attend to
    rnn_size: Positive = 64  # R, of the GRU or of the layer in its place
    mixing_size: Positive = 32  # E
    # Base algorithm
    optimiser: Literal["rmsprop", "adam"] = "rmsprop"  # adam: with torch's settings
    rmsprop_alpha: Share = 0.99  # decay of RMSprop's mean square
    rmsprop_eps: Above = 1e-5  # added to its root
    learning_rate: Amount = 5e-4  # at first
    final_share: Share = 1.0  # of the learning rate that is left at --total-timesteps
    anneal_from: Count = 0  # steps after which the learning rate falls, linearly
    max_grad_norm: Above = 10.0  # of all networks together
    gamma: Share = 0.99  # discount
    batch_size: Positive = 32  # episodes of a minibatch, or windows of so many
    buffer_size: Positive = 5000  # episodes of the replay
    replay_window: Count = 0  # of each episode of a minibatch, at random; 0: all
    updates_per_iteration: Positive = 8  # after every num_envs episodes
    target_every: Positive = 200  # episodes between copies to the target networks
    epsilon_start: Share = 1.0  # probability of a random action, at first
    epsilon_final: Share = 0.05  # and later
    epsilon_steps: Positive = 500_000  # environment steps until then
    amp: bool = False  # bf16 autocast where the hardware has it
    compile: bool = False  # compile the networks; for GPUs, on a CPU it gains nothing
    # Evaluation and checkpoints (every: environment steps)
    eval_team_sizes: tuple[Positive, ...] = (6, 7, 8)  # unseen ones, evaluated beside team_sizes
    eval_every: Count = 50_000  # evaluations on the way; 0: never
    eval_episodes: Positive = 160  # in those, of each team size
    final_episodes: Count = 160  # of each size at the end and with --eval-only
    log_every: Positive = 10_000  # lines of metrics.jsonl
    save_every: Count = 500_000  # checkpoints, of which the last two are kept; 0: at the end


PRESETS = {
    "paper": {},
    "cpu": {
        "hidden_size": 64,
        "amp": True,
        "num_envs": 32,
        "batch_size": 8,
        "updates_per_iteration": 16,
        "learning_rate": 1e-3,
        "buffer_size": 512,
        "epsilon_steps": 100_000,
        "eval_every": 250_000,
        "eval_episodes": 32,
    },
    "cpu scenario resource": {  # on top of those
        "rescale": True,
        "egocentric": True,
        "mixer": "linear",
        "returns": "lambda",
        "timeout_terminates": False,
        "heads": 2,
        "optimiser": "adam",
        "gamma": 0.95,
        "batch_size": 64,
        "buffer_size": 3000,
        "replay_window": 8,
        "updates_per_iteration": 64,
        "target_every": 64,
        "epsilon_final": 0.4,
        "epsilon_steps": 150_000,
        "final_share": 0.1,
        "total_timesteps": 1_000_000,
        "recurrent": False,
        "own_beside": True,
    },
}
# With --resume backend and version of the game stay as they were.
RESUMABLE = ("backend", "env_threads", "game_version", "eval_team_sizes", "compile")
LINE = ("return", "win", "td_loss", "sps")  # scalars on standard output, without a terminal


def validate(args: Args) -> list[tuple[Any, str]]:
    """Combinations that would do something else than they say."""
    return [
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size"),
        (args.hidden_size % args.heads, "--hidden-size is no multiple of --heads"),
        (not args.imagine and args.imagine_weight != 0.5, "--imagine-weight needs --imagine"),
        (args.returns != "lambda" and args.td_lambda != 0.8, "--td-lambda needs --returns lambda"),
        (
            args.optimiser != "rmsprop" and (args.rmsprop_alpha, args.rmsprop_eps) != (0.99, 1e-5),
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
    device: torch.device = CPU,
    first_battle: int = 0,
) -> Any:
    """num_envs battles of teams of these sizes, which stand still when they have ended.

    Only Resource Collection can be on a GPU. UsageError where there are no such teams or no game.
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
            device=device,
            rescale=args.rescale,
            egocentric=args.egocentric,
        )
    except (ValueError, BattleError) as error:
        raise UsageError(str(error)) from None


# [shared: battles] end

# --- 4. Networks ----------------------------------------------------------------------------------
# [shared: features] begin

MASKED = -1e9  # in the place of a score or a utility: not to be chosen
CHUNK = 25  # times that the GRU is given at once


class Features(NamedTuple):
    """What networks read of M moments: of those times and battles that were played, in order of
    time, then battle. A and S count the slots up to the last one that any battle fills."""

    entities: Tensor  # (M, S, D) float32: features; of agents also their last action
    unseen: Tensor  # (M, A, S) bool: agent i does not see entity j
    empty: Tensor  # (M, S) bool: no unit has this slot
    avail_actions: Tensor  # (M, A, actions) bool
    played: Tensor  # (T, B) bool, on the CPU: the M moments; the longest battles come first

    def at(self, index: Tensor) -> Features:
        """Some of the moments, for a mixer, which remembers nothing."""
        return self._replace(
            entities=self.entities[index],
            unseen=self.unseen[index],
            empty=self.empty[index],
            avail_actions=self.avail_actions[index],
        )


def slots_in_use(empty: Tensor) -> int:
    """How many slots, of empty (M, 8), there are up to the last that a unit has."""
    return int((~empty).any(0).nonzero().max()) + 1


def encode(
    obs: Observation, last_actions: Tensor, played: Tensor, device: torch.device
) -> Features:
    """Observations (M, ...) as networks read them; last_actions (M, 8): -1 where there was none;
    played (T, B): see Features."""
    A = slots_in_use(obs.entity_mask[:, :SIDE])
    E = slots_in_use(obs.entity_mask[:, SIDE:])
    slots = torch.tensor([*range(A), *range(SIDE, SIDE + E)], device=last_actions.device)
    num_actions = obs.avail.shape[-1]
    # One more kind of action, in front, is "none"; its column is left out.
    acted = F.one_hot(last_actions[:, :A] + 1, num_actions + 1)[..., 1:].float()
    acted = F.pad(acted, (0, 0, 0, E))  # others' actions are unknown
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
    """One quantity three times: of agents that see all they see, of them only their own group, and
    only the other group. Without imagined groups there is the first alone."""

    full_view: Tensor
    own_group: Tensor | None = None
    other_group: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Views:
        """function of each."""
        return Views(*[function(x) for x in self.present()])

    def present(self) -> list[Tensor]:
        return [x for x in self if x is not None]


def mask_views(hidden: Tensor, groups: Tensor | None) -> Tensor:
    """What is hidden (M, A, S) in V views (M, V, A, S), in the order of Views: V = 1 or, with
    groups (M, S) bool, 3. Networks run all views at once, which is faster than one by one."""
    if groups is None:
        return hidden[:, None]
    A = hidden.shape[1]
    apart = groups[:, :A, None] != groups[:, None]  # (M, A, S)
    return torch.stack((hidden, hidden | apart, hidden | ~apart), dim=1)


# [shared: refil] end
# [shared: product] begin


def apply_both(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    """second(first(x)), which are two layers in the authors' network without anything between them,
    as one product: both learn as they would apart, and an update takes about a tenth less CPU time
    (0.73 instead of 0.80 s at the paper's width, 0.26 instead of 0.30 s at --preset cpu's, on one
    thread)."""
    weight = second.weight @ first.weight
    bias = second.weight @ first.bias + second.bias
    return F.linear(x.to(weight.dtype), weight, bias)


# [shared: product] end
# [shared: attention] begin


def uniform_parameter(inputs: int, *shape: int) -> nn.Parameter:
    """Weights or biases of several linear layers side by side, as nn.Linear begins."""
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Attention(nn.Module):
    """G attention layers side by side, from agents to entities."""

    def __init__(self, G: int, H: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = uniform_parameter(H, G, H, H)
        self.key_value = uniform_parameter(H, G, H, 2 * H)

    def forward(self, x: Tensor, agents: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (G, M, h, A, d), keys and values (G, M, h, S, d) of x (M, S, G, H)."""
        M, S, G, H = x.shape
        query = x[:, :agents].flatten(0, 1).transpose(0, 1) @ self.query  # (G, M A, H)
        key_value = x.flatten(0, 1).transpose(0, 1) @ self.key_value  # (G, M S, 2 H)
        key, value = key_value.chunk(2, dim=-1)
        query = query / math.sqrt(H // self.heads)
        return self.split(query, M), self.split(key, M), self.split(value, M)

    def split(self, x: Tensor, M: int) -> Tensor:
        """(G, M n, H) -> (G, M, h, n, d)."""
        G, _, H = x.shape
        return x.view(G, M, -1, self.heads, H // self.heads).transpose(2, 3)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Weighted values (G, M, V, A, H) in views with mask (M, V, A, S); 0 where all is masked.

    Scores are the same in all views; views are rows of one product with the values.
    """
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
    """A GRU over moments (M, V, A, R): chunks of time without the battles that ended before them.
    After one that ends within a chunk comes 0, which nobody reads. A linear layer has no memory."""
    if isinstance(layer, nn.Linear):
        return F.relu(layer(x)), hidden
    chunks = played.split(CHUNK)
    sizes = [int(chunk.sum()) for chunk in chunks]
    outputs = []
    for part, chunk in zip(x.split(sizes), chunks):
        T, B = len(chunk), int(chunk[0].sum())  # B battles go on
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

KEY_GAIN = 16.0  # of a pointer's keys: units begin about as far apart as by tags


class Tagged(NamedTuple):
    """Units in the order of the actions that attack or heal them: by their tags."""

    units: Tensor  # (M, 1, U - 6, H): as they are embedded; 0 where there is none
    seen: Tensor  # (M, V, A, U - 6): 1 where agent i sees it in a view, else 0


def by_tag(units: Tensor, features: Features, mask: Tensor) -> Tagged:
    """units (M, S, H), of which mask (M, V, A, S) hides some."""
    num_targets = features.avail_actions.shape[-1] - FIRST_TARGET
    tags = features.entities[:, None, :, :num_targets]  # (M, 1, S, U - 6): one-hot, or 0
    return Tagged(tags.mT @ units[:, None].to(tags.dtype), (~mask).to(tags.dtype) @ tags)


class TagHead(nn.Linear):
    """Numbers (..., U) of actions, of memory (..., R) alone: whom it attacks, it knows by tags."""

    def forward(self, x: Tensor, tagged: Tagged | None = None) -> Tensor:
        return super().forward(x)


class PointerHead(nn.Module):
    """Numbers (..., A, U) of actions, of memory (..., A, R) and what units are. Attacking one that
    is hidden is worth the same whoever it is."""

    def __init__(self, R: int, H: int):
        super().__init__()
        self.own = nn.Linear(R, FIRST_TARGET + 1)  # the last: attacking anybody
        self.query = nn.Linear(R, H)
        self.key = nn.Linear(H, H)
        self.key.weight.data *= KEY_GAIN

    def forward(self, x: Tensor, tagged: Tagged) -> Tensor:
        own, key = self.own(x), self.key(tagged.units)
        # <W_q x_i, W_k e_j> / sqrt(H): whom, by what it is
        score = self.query(x) @ key.mT / math.sqrt(key.shape[-1])  # (..., A, U - 6)
        targets = own[..., FIRST_TARGET:] + score * tagged.seen
        return torch.cat((own[..., :FIRST_TARGET], targets), dim=-1)


def new_head(actions: int, args: Args) -> TagHead | PointerHead:
    """As --target-head says."""
    if args.target_head == "tags":
        return TagHead(args.rnn_size, actions)
    return PointerHead(args.rnn_size, args.hidden_size)


# [shared: heads] end


class Utility(nn.Module):
    """Q_i(u) of every agent from what it sees and has seen."""

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
    ) -> tuple[Views, Tensor]:
        """Utilities (M, A, actions) of each view, and the hidden state after them (1, B V A, R)."""
        A = features.unseen.shape[1]
        mask = mask_views(features.unseen, groups)  # (M, V, A, S)
        units = F.relu(self.embed(features.entities))  # (M, S, H)
        query, key, value = self.attention(units[:, :, None], A)
        x = attend(query, key, value, mask)[0]  # (M, V, A, H)
        with torch.autocast(x.device.type, enabled=False):  # utilities need their digits
            x = apply_both(self.project, self.gru_input, x)
            if self.own is not None:
                x = x + self.own(units[:, None, :A].to(x.dtype))
            x, hidden = remember(self.gru, F.relu(x), features.played, hidden)  # (M, V, A, R)
            tagged = by_tag(units, features, mask) if self.points else None
            q = self.head(x, tagged).masked_fill(features.empty[:, None, :A, None], 0.0)
        return Views(*q.movedim(1, 0)), hidden


class Mixed(NamedTuple):
    """What a mixer makes of utilities."""

    q_total: Tensor  # (M,)
    q_groups: Tensor | None = None  # (M,), with imagined groups


class Mixer(nn.Module):
    """Q_tot of chosen utilities. Hypernetworks attend to all units: of w, and of V, w_final, b."""

    def __init__(self, inputs: int, args: Args):
        super().__init__()
        self.linear = args.mixer == "linear"
        G, H, E = 2 if self.linear else 4, args.hidden_size, args.mixing_size
        self.embed = nn.Linear(inputs, G * H)
        self.attention = Attention(G, H, args.heads)
        self.project = uniform_parameter(H, G, H, H)
        self.project_bias = uniform_parameter(H, G, H)
        self.out = uniform_parameter(H, G, H, E)
        self.out_bias = uniform_parameter(H, G, E)

    def forward(self, q: Views, features: Features, groups: Tensor | None = None) -> Mixed:
        """Q_tot of q (M, A); with groups, which q has views of, also Q_groups."""
        A, G = features.unseen.shape[1], len(self.project)
        filled = ~features.empty[:, :A]
        nobody = features.empty[:, :A, None] | features.empty[:, None]  # (M, A, S)
        mask = mask_views(nobody, groups)  # (M, V, A, S)
        x = F.relu(self.embed(features.entities))  # (M, S, G H)
        x = x.unflatten(-1, (G, -1))  # (M, S, G, H)
        query, key, value = self.attention(x, A)
        # Weights of utilities are those of each view, all else is of the full one.
        w = attend(query[:1], key[:1], value[:1], mask)[0]  # (M, V, A, H)
        rest = attend(query[1:], key[1:], value[1:], mask[:, :1])
        rest = rest[:, :, 0]  # (G - 1, M, A, H)
        with torch.autocast(x.device.type, enabled=False):
            # Two linear layers with nothing between them as one product, as in Utility.
            weight = self.project @ self.out  # (G, H, E)
            bias = self.project_bias[:, None] @ self.out  # (G, 1, E)
            bias = bias[:, 0] + self.out_bias  # (G, E)
            w = w.to(weight.dtype) @ weight[0] + bias[0]  # (M, V, A, E)
            # All but w are means over the 8 slots of agents, where empty ones count as 0.
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
        """w_final . ELU(sum_i Q_i w_i + b) (M, 1); (M, 2) with that of the 2 A utilities of groups;
        q (M, V, A), w (M, V, A, E), w_final and b (M, E)."""
        x = (q[..., None] * w.softmax(-1)).sum(2)  # (M, V, E)
        if x.shape[1] > 1:
            full_view, own_group, other_group = x.unbind(1)
            x = torch.stack((full_view, own_group + other_group), dim=1)
        x = F.elu(x + b[:, None])
        return (x * w_final.softmax(-1)[:, None]).sum(-1)

    def mix_linear(self, q: Tensor, w: Tensor, features: Features) -> Tensor:
        """sum_i w_i Q_i (M, 1) with a softmax over all 8 slots; (M, 2) with that of groups, over
        16; q (M, V, A), w (M, V, A, E)."""
        # paper and code differ: in REFIL's code only empty slots score 0, the dead do not
        gone = features.avail_actions[:, None, :, 0]  # (M, 1, A): who is not there has a no-op
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
    """RMSprop as in REFIL's code, or Adam with torch's settings."""
    options = {"lr": args.learning_rate, "foreach": True}
    if args.optimiser == "adam":
        return torch.optim.Adam(net.parameters(), **options)
    options |= {"alpha": args.rmsprop_alpha, "eps": args.rmsprop_eps}
    return torch.optim.RMSprop(net.parameters(), **options)


def learning_rate_at(args: Args, timesteps: int) -> float:
    """Stays until --anneal-from, then falls linearly until --total-timesteps."""
    falling = args.total_timesteps - args.anneal_from
    done = min(max(timesteps - args.anneal_from, 0) / falling, 1.0)
    return args.learning_rate * (1 + done * (args.final_share - 1))


# [shared: optimiser] end


class Agent(Parts):
    """The networks and their optimiser."""

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
        """What the loss moves."""
        return nn.ModuleList((self.utility, self.mixer))

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of all optimisers."""
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
    """A policy for battles that begin together: recurrent agents, greedy but for epsilon."""

    def __init__(self, agent: Agent, epsilon: float = 0.0, rng: torch.Generator | None = None):
        """rng: of the exploration; without it there is none."""
        self.agent, self.epsilon, self.rng = agent, epsilon, rng
        self.hidden: Tensor | None = None  # (1, B A, R)
        self.last_actions: Tensor | None = None  # (B, 8)

    @torch.no_grad()
    def __call__(self, battles: Any) -> Tensor:
        """Actions (B, 8)."""
        obs = battles.obs
        if not battles.time.any():  # a new episode
            self.hidden = None
            self.last_actions = torch.full(obs.avail.shape[:2], -1, device=obs.avail.device)
        played = torch.ones(1, len(obs.avail), dtype=torch.bool)
        features = encode(obs, self.last_actions, played, self.agent.device)
        q, self.hidden = self.agent.utility(features, hidden=self.hidden)
        q = q.full_view.masked_fill(~features.avail_actions, MASKED)
        actions = q.argmax(-1).cpu()
        if self.rng:
            avail = obs.avail[:, : actions.shape[1]].cpu()
            actions = explore(actions, avail, self.epsilon, self.rng)
        actions = F.pad(actions, (0, SIDE - actions.shape[1]))  # empty slots: no-op
        self.last_actions = actions.to(obs.avail.device)
        return self.last_actions


# [shared: replay] begin


def explore(actions: Tensor, avail: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """Actions (B, A), each with probability epsilon replaced by any of avail (B, A, actions)."""
    noise = torch.rand(avail.shape, generator=rng)
    any_of = noise.masked_fill(~avail, -1.0).argmax(-1)
    explores = torch.rand(actions.shape, generator=rng) < epsilon
    return torch.where(explores, any_of, actions)


def epsilon_at(args: Args, timesteps: int) -> float:
    """Falls linearly, then stays."""
    done = min(timesteps / args.epsilon_steps, 1.0)
    return args.epsilon_start + done * (args.epsilon_final - args.epsilon_start)


class Played(NamedTuple):
    """A step of B battles, as it is stored."""

    actions: Tensor  # (B, 8) int64
    rewards: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool


class Batch(NamedTuple):
    """B episodes: the K steps of all, between M = K + B moments."""

    features: Features  # of M moments
    now: Tensor  # (K,) int64: at which moment a step begins
    later: Tensor  # (K,) int64: at which one it ends
    actions: Tensor  # (K, A) int64
    rewards: Tensor  # (K,) float32
    terminated: Tensor  # (K,) bool: no value comes after


class ReplayBuffer:
    """The last episodes: what units were like, from which all else is made again."""

    def __init__(self, args: Args, battles: Any, device: torch.device):
        """battles: those that are played, or others of the same scenario."""
        self.args, self.battles, self.device = args, battles, device
        self.episodes = 0  # that were ever added
        N, T = args.buffer_size, args.max_episode_steps
        self.fixed = {"length": torch.empty(N, dtype=torch.int64)}  # (N, ...), of an episode
        self.states = {}  # (N, T + 1, ...), of a moment
        for name, x in battles.snapshot._asdict().items():
            shape = x.shape[1:]
            if name in battles.fixed:
                self.fixed[name] = torch.empty(N, *shape, dtype=x.dtype)
            else:
                self.states[name] = torch.empty(N, T + 1, *shape, dtype=x.dtype)
        self.steps = {  # (N, T, ...)
            "actions": torch.empty(N, T, SIDE, dtype=torch.int8),
            "rewards": torch.empty(N, T),
            "terminated": torch.empty(N, T, dtype=torch.bool),
        }

    @property
    def size(self) -> int:
        return min(self.episodes, self.args.buffer_size)

    def add(self, snapshots: list[Any], steps: list[Played], lengths: Tensor) -> None:
        """Store an episode of each of B battles: T + 1 snapshots and the T steps between them, of
        which its first lengths (B,) are real; nobody reads the rest."""
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
        """Of size episodes, each at most once, all steps or --replay-window on end."""
        index = torch.randperm(self.size, generator=rng)[:size]
        ends = self.fixed["length"][index]
        length, start = ends, torch.zeros_like(ends)
        if window := self.args.replay_window:
            length = ends.clamp(max=window)
            start = (torch.rand(len(ends), generator=rng) * (ends - length + 1)).long()
        order = length.argsort(descending=True, stable=True)
        index, ends, length, start = index[order], ends[order], length[order], start[order]
        T = int(length[0])
        time = torch.arange(T + 1)[:, None]
        played = time <= length  # (T + 1, B)
        time = start + time  # (T + 1, B), in the episode
        obs = self.observe(index, time, played)
        last_actions = self.steps["actions"][index, time - 1]  # (T + 1, B, 8)
        last_actions = last_actions.masked_fill((time == 0)[..., None], -1)[played].long()
        time = time[:-1]
        actions = self.steps["actions"][index, time]  # (T, B, 8)
        rewards = self.steps["rewards"][index, time]  # (T, B)
        terminated = self.steps["terminated"][index, time]
        if self.args.timeout_terminates:
            terminated = terminated | (time == ends - 1)
        features = encode(obs, last_actions, played, self.device)
        A = features.unseen.shape[1]
        moment = played.flatten().cumsum(0).view_as(played) - 1  # (T + 1, B)
        goes_on = played[1:]  # (T, B): a step follows
        return Batch(
            features=features,
            now=send(moment[:-1][goes_on], self.device),
            later=send(moment[1:][goes_on], self.device),
            actions=send(actions[goes_on][:, :A].long(), self.device),
            rewards=send(rewards[goes_on], self.device),
            terminated=send(terminated[goes_on], self.device),
        )

    def observe(self, index: Tensor, time: Tensor, played: Tensor) -> Observation:
        """What was observed (M, ...) in episodes index (B,) at time (T + 1, B), where played."""
        snapshot = {name: x[index, time][played] for name, x in self.states.items()}
        for name in self.battles.fixed:
            x = self.fixed[name][index]
            snapshot[name] = x.expand(len(time), *x.shape)[played]
        return self.battles.observe(self.battles.snapshot._replace(**snapshot))

    def filled(self) -> dict[str, Tensor]:
        """What was played, without padding, for a checkpoint."""
        n, real = self.size, self.is_real()
        tensors = {"episodes": torch.tensor(self.episodes)}
        tensors |= {name: x[:n] for name, x in self.fixed.items()}
        tensors |= {name: x[:n][real] for name, x in self.states.items()}
        return tensors | {name: x[:n][real[:, 1:]] for name, x in self.steps.items()}

    def refill(self, tensors: dict[str, Tensor]) -> None:
        """Put back what filled() gave."""
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
        """(size, T + 1) bool: moments that are no padding."""
        time = torch.arange(self.args.max_episode_steps + 1)
        return time <= self.fixed["length"][: self.size, None]


def copied(x: Any) -> Any:
    """A named tuple on the CPU: worlds write into their own tensors."""
    return x._make([tensor.to("cpu", copy=True) for tensor in x])


def collect(battles: Any, policy: Policy, buffer: ReplayBuffer) -> list[Any]:
    """Play one episode of every battle into the buffer. Returns them (battles.Episode), in the
    order in which they ended."""
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
    buffer.add(snapshots, steps, lengths=battles.time.long().cpu())
    return episodes


# [shared: replay] end

# --- 7. Update ------------------------------------------------------------------------------------


def pick(q: Tensor, actions: Tensor) -> Tensor:
    """q (K, A, actions) of actions (K, A)."""
    return q.gather(-1, actions[..., None])[..., 0]


def draw_groups(features: Features, rng: torch.Generator) -> Tensor:
    """(M, S) bool: the group of every entity, with an own p ~ U(0, 1) for each episode."""
    B, S = features.played.shape[1], features.empty.shape[1]
    p = torch.rand(B, 1, generator=rng)
    groups = torch.rand(B, S, generator=rng) < p
    battle = features.played.nonzero()[:, 1]  # (M,)
    return send(groups[battle], features.empty.device)


# [shared: returns] begin


def lambda_returns(args: Args, batch: Batch, next_values: Tensor) -> Tensor:
    """y (K,) of next_values (K,), those at the ends of steps; as in Peng's Q(lambda), what was done
    later counts as if the values were of it."""
    # Steps are in order of time, then battle, and battles that go on come first.
    sizes = batch.features.played[1:].sum(1).tolist()
    steps = (batch.rewards, next_values, ~batch.terminated)
    times = list(zip(*(x.split(sizes) for x in steps)))
    found, later = [], next_values[:0]
    for rewards, values, goes_on in reversed(times):
        later = torch.cat((later, values[len(later) :]))  # where no step follows
        # y_t = r_t + gamma ((1 - l) V_t+1 + l y_t+1)
        mixed = (1 - args.td_lambda) * values + args.td_lambda * later
        later = rewards + args.gamma * mixed * goes_on
        found.append(later)
    return torch.cat(found[::-1])


# [shared: returns] end


@torch.no_grad()
def find_targets(args: Args, agent: Agent, batch: Batch, q: Tensor) -> Tensor:
    """y (K,); q (M, A, actions): the learning networks' utilities."""
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
    """The loss, and what it is made of; groups (M, S)."""
    features, now = batch.features, batch.now
    with agent.autocast():
        q, _ = agent.utility(features, groups)  # (M, A, actions) each
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
    """Gradient steps on as many minibatches as follow a round of battles. Returns scalars."""
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
    """Greedy episodes of every team size; at the end, unless in the game, those of scripted
    policies in the same battles beside them. Returns {"size policy": what summarise() says}."""
    world = worlds.playing(args.scenario)
    battle_seed, policy_seed = evaluation.rng.integers(2**31, size=2).tolist()
    new_battles = functools.partial(make_envs, args, seed=battle_seed, device=agent.device)
    number = together = evaluation.episodes
    if args.backend == "sc2":
        together = min(number, args.num_envs)
    policies: dict[str, Policy] = {"": Player(agent)}
    if evaluation.final and args.backend == "sim":
        policies |= world.scripted_policies(policy_seed)
    sizes = dict.fromkeys((*args.team_sizes, *args.eval_team_sizes))
    rounds = math.ceil(number / together)
    evaluation.expect(len(sizes) * len(policies) * rounds * together)
    results = {}
    for size in sizes:
        for name, policy in policies.items():
            with contextlib.closing(new_battles(sizes=(size,), num_envs=together)) as battles:
                row = worlds.score(args.scenario, battles, policy, number, evaluation.progress)
            results[f"{size} {name}".rstrip()] = row
        if evaluation.videos:
            with contextlib.closing(new_battles(sizes=(size,), num_envs=1)) as battles:
                path = evaluation.videos / f"{evaluation.stem}-{size}.mp4"
                evaluation.expect(1)
                world.film(battles, Player(agent), path)
                evaluation.progress(1)
    return results


def load_player(path: str) -> Policy:
    """The greedy policy of a run or checkpoint, for battles of its scenario that begin together."""
    args = saved_args(path, Args)
    saved, _ = load_checkpoint(path)
    agent = Agent(args, worlds.family_of(args.scenario, args.egocentric), CPU)
    restore(agent, saved["agent"], path)
    return Player(agent)


# [shared: evaluation] end

# --- 9. Train -------------------------------------------------------------------------------------


def train(args: Args) -> int:
    """The run, with --resume from its checkpoint on; returns the exit code."""
    table = worlds.playing(args.scenario).table
    with Run(args, table, LINE) as run:
        if args.resume:
            check(worlds.wrong_to_resume(args, run.saved["args"]))
        args = run.own_share(args, "batch_size", "buffer_size", "target_every")
        check(validate(args))  # a round of battles must fit into the share of a process, too
        battles = make_envs(
            args,
            sizes=args.team_sizes,
            num_envs=args.num_envs,
            seed=args.seed,
            device=run.device,
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
            except BattleError:  # the game; what has been learned is kept
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
            if since_copy < len(episodes):
                agent.copy_to_targets()
            run.lap("learn_s")
            run.advance(total(sum(episode.length for episode in episodes)))
            if run.is_due(args.log_every):
                settings = {"epsilon": epsilon, "learning_rate": learning_rate}
                run.log(log.means() | settings)
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                if args.backend == "sc2":  # evaluations have games of their own
                    run.save()
                    battles.close()
                run.evaluate("eval")
        battles.close()
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    read = functools.partial(read_args, Args, argv, validate, RESUMABLE, PRESETS)
    return call(lambda: train(read()), BattleError)


if __name__ == "__main__":
    leave(main())
