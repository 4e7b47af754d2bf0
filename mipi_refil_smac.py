"""MIPI (Wang, Ye and Lu, NeurIPS 2023) on REFIL; its parent is baselines/refil_smac.py.

An agent that relies on its teammates fails when the team changes. So each agent has utilities, a
policy pi_i, and a marginal policy m_i that sees only the agent's own unit, s+. The policy pays for
its divergence from the marginal. If m_i is the mean of pi_i over s-, all else in sight, the mean
divergence is the mutual information of the agent's actions and s-, given s+.

    J        = E sum_t gamma^t (r - alpha sum_i log pi_i(u|s) / m_i(u|s+))              (3), (8)
    Q_tot    = sum_i w_i Q_i + w_final . b + V,  w_i = w_final . softmax(W_i)         (14), (15)
    Q_tot    = sum_i w_i Q_i + V,  w softmax over 8 slots                        --mixer linear
    y        = r + gamma E_pi (Q_tot' - alpha sum_i log pi_i / m_i),  L = E (Q_tot - y)^2   (16)
    y_t      = r_t + gamma (E_pi ((1 - l) Q_tot' - alpha sum_i ..) + l y_t+1)   --returns lambda
    m_i      = E_s* pi_i(u|s+, s*):  maximum likelihood on imagined teams s*          (12), (17)
    pi_i     ~ m_i exp(Q_i / alpha):  minimise E_pi (alpha log pi_i / m_i - Q_i)      (13), (18)

(12) and (13) alternate --ba-iterations times per step of the critic (Blahut-Arimoto algorithm).
(16), with REFIL's loss of imagined groups, trains utilities and mixer. (17) trains the marginal's
network. (18) trains the policy's head and, unless --detach-actor-trunk, the layers that the policy
shares with the utilities; --policy exact has no head and plays (13) itself.

    python mipi_refil_smac.py --scenario sz --team-sizes 3 4 5 --eval-team-sizes 6 7 8
    python mipi_refil_smac.py --scenario mmm --preset cpu                    for CPUs
    python mipi_refil_smac.py --scenario sz --regularizer entropy            or none: ablations
    python mipi_refil_smac.py --resume runs/RUN --total-timesteps 20000000
    python mipi_refil_smac.py --eval-only runs/RUN --backend sc2 --num-envs 4
    torchrun --nproc-per-node 2 mipi_refil_smac.py                           two times 8 battles

Letters: T steps, B battles, M moments (states of battles, without padding), K steps between them, A
agents, S entities (agents, then enemies), U actions, V views (all in sight; own group; other
group), D features of an entity, H hidden units, R of the GRU, h heads of size d, G hypernetworks, E
units of the mixer. What the paper leaves open: docs/mipi.md; worlds: docs/battles.md.
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
from typing import Any, Literal, NamedTuple

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
    average_gradients,
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

import numpy as np
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
    """MIPI in StarCraft micromanagement. Defaults are those of the paper."""

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
    regularizer: Literal["mi", "entropy", "none"] = "mi"  # mi: as in Eq. (3); none: only rewards
    alpha: Amount | None = None  # per nat: .03, mmm .1, resource .05 (rescaled .005); less over w_i
    alpha_i: Amount | None = None  # alpha_i, the policy's alpha in Eq. (18); default: alpha
    alpha_i_over_w: bool = False  # alpha_i / w_i in (18), Lemma 2; alpha's default / 30 (linear: 8)
    charge_times_w: bool = False  # (16) charges alpha w_i: that ratio too, by the critic's side
    observe_self_only: bool = False  # agents see only s+, nothing is charged: Table 3, row infinity
    ba_iterations: Positive | None = None  # M, alternations of (12), (13); default 4, resource 1
    actor_loss_times_w: bool = False  # (18) times w_i, so that Q_i's part is E_pi Q_tot's gradient
    detach_actor_trunk: bool = False  # (18) moves no shared layer; no effect without --policy head
    policy: Literal["head", "exact", "greedy"] = "head"  # exact: Eq. (13); greedy: max utility
    imagine: bool = True  # imagined groups, for Eq. (17) and REFIL's loss; not in resource
    imagine_weight: Share = 0.5  # lambda, weight of REFIL's loss of imagined groups
    target_head: Literal["tags", "pointer"] = "tags"  # tells targets apart by tag or by features
    returns: Literal["one-step", "lambda"] = "one-step"  # targets y: one-step or lambda-returns
    td_lambda: Share = 0.8  # l of --returns lambda; 0: one-step, 1: all later rewards
    timeout_terminates: bool = True  # no bootstrap when time is out, as in REFIL's code
    hidden_size: Positive = 128  # H, units of embeddings and attention
    heads: Positive = 4  # h, attention heads
    recurrent: bool = True  # agents remember with a GRU; without: a linear layer, no memory
    own_beside: bool = False  # adds the agent's own embedding, projected, to attention's output
    rnn_size: Positive = 64  # R, units of the GRU, or of the linear layer in its place
    mixer: Literal["two-layer", "linear"] = "two-layer"  # REFIL's flexible one, no ELU; or linear
    mixing_size: Positive = 32  # E, units of the mixer and outputs of each hypernetwork
    # Base algorithm
    optimiser: Literal["rmsprop", "adam"] = "rmsprop"  # adam has torch's default betas and eps
    rmsprop_alpha: Share = 0.99  # RMSprop's decay of the mean squared gradient
    rmsprop_eps: Above = 1e-5  # RMSprop's eps, added to the root of the mean squared gradient
    learning_rate: Amount = 5e-4  # learning rate at the start
    final_share: Share = 1.0  # share of the learning rate that is left at --total-timesteps
    anneal_from: Count = 0  # environment steps after which the learning rate falls linearly
    max_grad_norm: Above = 10.0  # largest gradient norm, of critic, policy head and marginal each
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
        "detach_actor_trunk": True,
    },
    # Keys "PRESET FLAG VALUE" add to the values of PRESET where the command line, or FLAG's default
    # without a preset, has this VALUE; later keys replace earlier ones.
    "cpu regularizer mi": {"alpha_i_over_w": True},
    "cpu regularizer entropy": {"alpha_i_over_w": True},
    "cpu policy exact": {"alpha_i_over_w": False},  # so alpha's default is not divided, either
    "cpu observe_self_only True": {"alpha_i_over_w": False},
    "cpu scenario resource": {
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
        "policy": "exact",  # the head of Eq. (18) learns much more slowly here
        "alpha_i_over_w": False,
    },
}
# With --resume, train() refuses another backend, version or number; --eval-only may change them.
RESUMABLE = ("backend", "env_threads", "game_version", "num_envs", "eval_team_sizes", "compile")
LINE = ("return", "win", "td_loss", "sps")  # scalars of lines printed where there is no terminal


def alphas_of(args: Args) -> tuple[float, float]:
    """Eq. (16)'s alpha and Eq. (18)'s alpha_i, by default the paper's for each world."""
    if args.regularizer == "none" or args.observe_self_only:
        return 0.0, 0.0
    collecting = 0.005 if args.rescale else 0.05  # rescaled rewards are a tenth
    usual = {"mmm": 0.1, "resource": collecting}.get(args.scenario, 0.03)
    if args.alpha_i_over_w:  # as w_i at first, so that alpha_i / w_i is near the paper's
        usual /= 8 if args.mixer == "linear" else 30
    alpha = usual if args.alpha is None else args.alpha
    return alpha, alpha if args.alpha_i is None else args.alpha_i


def validate(args: Args) -> list[tuple[Any, str]]:
    """(whether it is wrong, message) for combinations of flags that would not do what they say."""
    lambdas = args.returns == "lambda"
    too_many = args.num_envs > args.buffer_size and not args.eval_only
    rmsprop = ("rmsprop_alpha", "rmsprop_eps")
    own_rmsprop = any(getattr(args, x) != getattr(Args, x) for x in rmsprop)
    imagines = args.imagine and args.scenario != "resource"
    return [
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (too_many, "--num-envs exceeds --buffer-size"),
        (args.hidden_size % args.heads, "--hidden-size is no multiple of --heads"),
        (
            not imagines and args.imagine_weight != Args.imagine_weight,
            "--imagine-weight needs --imagine, and --scenario resource has no groups",
        ),
        *wrong_terms(args),
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
            args.target_head == "pointer" and args.observe_self_only,
            "--observe-self-only sees nobody to attack: it needs --target-head tags",
        ),
        (
            args.target_head == "pointer" and args.scenario == "resource",
            "--scenario resource has nobody to attack: it needs --target-head tags",
        ),
        *worlds.wrong_flags(args),
    ]


def wrong_terms(args: Args) -> list[tuple[Any, str]]:
    """(whether it is wrong, message) for flags of regulariser and policy, as in validate()."""
    greedy, head, exact = (args.policy == name for name in ("greedy", "head", "exact"))
    alone, over_w, charged = args.observe_self_only, args.alpha_i_over_w, args.charge_times_w
    alpha, alpha_i = alphas_of(args)
    given, times = (args.alpha, args.alpha_i) != (None, None), args.ba_iterations
    no_term = args.regularizer == "none" or alone
    no_marginal = args.regularizer != "mi" or alpha + alpha_i == 0
    return [
        (greedy and not no_term, "--policy greedy needs --regularizer none"),
        (greedy and times, "--policy greedy alternates nothing: no --ba-iterations"),
        (not head and args.actor_loss_times_w, "--actor-loss-times-w needs --policy head"),
        (exact and over_w, "--policy exact sees no w_i: --charge-times-w, not --alpha-i-over-w"),
        (exact and alpha > alpha_i == 0, "--policy exact needs an --alpha-i above 0, or --alpha 0"),
        (exact and no_marginal and times, "--policy exact has no marginal: no --ba-iterations"),
        (alone and args.regularizer == "entropy", "--observe-self-only has no --regularizer"),
        (given and no_term, "--alpha and --alpha-i need a regulariser, which this run has not"),
        (charged and alpha == 0, "--charge-times-w needs a regulariser and an --alpha above 0"),
        (charged and over_w, "--charge-times-w is --alpha-i-over-w's ratio: --no-alpha-i-over-w"),
        (over_w and args.regularizer == "none", "--alpha-i-over-w needs a regulariser"),
        (over_w and alpha_i == 0, "an alpha_i of 0 is not divided: add --no-alpha-i-over-w"),
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


def others(unseen: Tensor) -> Tensor:
    """(A, S) bool: entity j is not agent i itself; unseen (M, A, S) gives A, S and the device."""
    A, S = unseen.shape[1:]
    return ~torch.eye(A, S, dtype=torch.bool, device=unseen.device)


class Team(NamedTuple):
    """What policies read in one view, at all M moments or those of at()."""

    q: Tensor  # (M, A, U): utilities
    memory: Tensor  # (M, A, R): input of the heads of utilities and policy
    tagged: Tagged | None  # units (M, U - 6, H), choices (M, A, U - 6); None without pointers

    def at(self, index: Tensor) -> Team:
        """The team at moments index (n,)."""
        tagged = None if self.tagged is None else Tagged(*[x[index] for x in self.tagged])
        return Team(self.q[index], self.memory[index], tagged)


def split_views(q: Tensor, memory: Tensor, tagged: Tagged | None) -> Views:
    """A Team per view, of q (M, V, A, U), memory (M, V, A, R) and what by_tag() gives."""
    parts = [None] * q.shape[1]
    if tagged is not None:
        parts = [Tagged(tagged.units[:, 0], choices) for choices in tagged.choices.unbind(1)]
    return Views(*map(Team, q.unbind(1), memory.unbind(1), parts))


def without(entities: Tensor, things: slice) -> Tensor:
    """Entities (M, S, D) with zeros in the columns `things`: in Resource Collection an agent's own
    row can say where things are (--egocentric), which is no part of s+."""
    entities = entities.clone()
    entities[..., things] = 0.0
    return entities


class Utility(nn.Module):
    """Utilities Q_i(u) of every agent: attention to entities, GRU, one output per action."""

    def __init__(self, inputs: int, actions: int, args: Args, things: slice):
        super().__init__()
        H = args.hidden_size
        self.observe_self_only, self.things = args.observe_self_only, things
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
        """A Team of each view, and the hidden state (1, B V A, R) after them."""
        A, unseen, entities = features.unseen.shape[1], features.unseen, features.entities
        if self.observe_self_only:
            unseen = unseen | others(unseen)
            entities = without(entities, self.things)
        mask = mask_views(unseen, groups)  # (M, V, A, S)
        units = F.relu(self.embed(entities))  # (M, S, H)
        query, key, value = self.attention(units[:, :, None], A)
        x = attend(query, key, value, mask)[0]  # (M, V, A, H)
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for utilities
            x = apply_both(self.project, self.gru_input, x)
            if self.own is not None:
                x = x + self.own(units[:, None, :A].to(x.dtype))
            x, hidden = remember(self.gru, F.relu(x), features.played, hidden)  # (M, V, A, R)
            tagged = by_tag(units, features, mask) if self.points else None
            q = self.head(x, tagged).masked_fill(features.empty[:, None, :A, None], 0.0)
        return split_views(q, x, tagged), hidden


class Marginal(nn.Module):
    """The marginal policy's network. It reads s+: an agent's own unit, now and earlier. Attention
    to a single entity gives this entity's value, so there are no queries and keys."""

    def __init__(self, inputs: int, actions: int, args: Args, things: slice):
        super().__init__()
        H = args.hidden_size
        self.things = things
        self.embed = nn.Linear(inputs, H)
        attention = Attention(1, H, args.heads)  # initialised as in Utility; only values are kept
        self.value = nn.Parameter(attention.key_value.data[0, :, H:].clone())
        self.project = nn.Linear(H, H)
        self.gru_input = nn.Linear(H, args.rnn_size)
        memory = nn.GRU if args.recurrent else nn.Linear
        self.gru = memory(args.rnn_size, args.rnn_size)
        self.head = nn.Linear(args.rnn_size, actions)

    def forward(
        self, features: Features, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The input of the head (M, A, R); the hidden state (1, B A, R) after it."""
        A = features.unseen.shape[1]
        own = without(features.entities[:, :A], self.things)  # (M, A, D)
        x = F.relu(self.embed(own)) @ self.value  # (M, A, H)
        with torch.autocast(x.device.type, enabled=False):
            x = F.relu(apply_both(self.project, self.gru_input, x[:, None]))
            x, hidden = remember(self.gru, x, features.played, hidden)  # (M, 1, A, R)
        return x[:, 0], hidden


class Mixed(NamedTuple):
    """Outputs of the mixer at M moments."""

    w: Tensor  # (M, A): weights w_i of Q_tot
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
        """Q_tot of q (M, A), and its w; also Q_groups, if q has views of groups (M, S) bool."""
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
                totals, w = self.mix_linear(utilities, w, features)
            else:
                totals, w = self.mix_layers(utilities, w, w_final=rest[1], b=rest[2])
            v = rest[0].mean(-1, keepdim=True)  # (M, 1)
            totals = (totals + v).T  # (1 or 2, M)
        return Mixed(w, *totals)

    def mix_linear(self, q: Tensor, w: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """sum_i w_i Q_i of the full view, w a softmax over all 8 slots, and, with groups, of both
        groups together, over 2 x 8 slots: (M, 1 or 2). Also w (M, A), of the full view.
        q (M, V, A), w (M, V, A, E)."""
        # paper and code differ: the dead score 0 here; in REFIL's code only empty slots do
        gone = features.avail_actions[:, None, :, 0]  # (M, 1, A): only dead and empty have a no-op
        padding = (0, SIDE - q.shape[-1])
        score = F.pad(w.mean(-1).masked_fill(gone, 0.0), padding)  # (M, V, 8)
        q = F.pad(q, padding)
        # Eq. (15)
        w = score[:, 0].softmax(-1)
        totals = [(w * q[:, 0]).sum(-1)]
        if q.shape[1] > 1:
            weights = score[:, 1:].flatten(1).softmax(-1)  # (M, 16)
            totals.append((weights * q[:, 1:].flatten(1)).sum(-1))
        return torch.stack(totals, dim=1), w[:, : gone.shape[-1]]

    def mix_layers(self, q: Tensor, w: Tensor, w_final: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """w_final . (sum_i Q_i w_i + b) of the full view and, with groups, of both groups' agents
        together: (M, 1 or 2). Also Eq. (15)'s w (M, A), of the full view. q (M, V, A),
        w (M, V, A, E), w_final and b (M, E)."""
        w_final = w_final.softmax(-1)
        # Eq. (15); its b(s) is `shift`, below, and v, which forward() adds
        w = (w.softmax(-1) * w_final[:, None, None]).sum(-1)  # (M, V, A)
        totals = [(w[:, 0] * q[:, 0]).sum(-1)]
        if q.shape[1] > 1:
            totals.append((w[:, 1:] * q[:, 1:]).sum((1, 2)))
        shift = (w_final * b).sum(-1, keepdim=True)  # (M, 1)
        return torch.stack(totals, dim=1) + shift, w[:, 0]


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
    """Utilities, mixer, their target networks; policy head, marginal; all optimisers."""

    def __init__(self, args: Args, family: Family, device: torch.device):
        self.args, self.device = args, device
        self.amp = args.amp and has_bf16(device)
        inputs, things = family.features + family.n_actions, family.things
        torch.manual_seed(args.seed)
        self.utility = Utility(inputs, family.n_actions, args, things).to(device)
        self.mixer = Mixer(inputs, args).to(device)
        self.target_utility = copy.deepcopy(self.utility)
        self.target_mixer = copy.deepcopy(self.mixer)
        self.optimiser = new_optimiser(args, self.critic())
        self.policy = new_head(family.n_actions, args).to(device)
        self.marginal = Marginal(inputs, family.n_actions, args, things).to(device)
        self.policy_optimiser = new_optimiser(args, self.policy)
        self.marginal_optimiser = new_optimiser(args, self.marginal)
        own_seed = int(np.random.default_rng((args.seed, 1)).integers(2**31))
        self.rng = own_generator(own_seed)  # for draws that the parent does not make
        self.alpha, self.alpha_i = alphas_of(args)
        self.ba_iterations = args.ba_iterations or (1 if args.scenario == "resource" else 4)
        # Without this a marginal is neither trained nor read.
        self.informed = args.regularizer == "mi" and self.alpha + self.alpha_i > 0
        # With alpha = 0, Eq. (13) is greedy.
        exact = args.policy == "exact"
        self.greedy = args.policy == "greedy" or (exact and self.alpha_i == 0)
        self.types = family.type_columns  # {unit type: its column in the features}
        if args.compile:
            nets = self.utility, self.mixer, self.target_utility, self.target_mixer, self.marginal
            for net in nets:
                net.compile(dynamic=True)

    def critic(self) -> nn.ModuleList:
        """The networks that the critic's loss trains."""
        return nn.ModuleList((self.utility, self.mixer))

    def log_policy(
        self,
        team: Team,
        avail: Tensor,
        own_memory: Tensor | None,
        living: Tensor | None = None,
    ) -> Tensor:
        """log pi (M, A, U): of the head, which reads the team's memory; without a head of its
        utilities and, for --policy exact, of the marginal, which reads own_memory (M, A, R). With
        living (L,), for rows() of agents only, (L, U); avail and own_memory are then theirs."""
        q = rows(team.q, living)
        if self.greedy:
            best = q.masked_fill(~avail, MASKED).argmax(-1, keepdim=True)
            return torch.full_like(q, MASKED).scatter(-1, best, 0.0)
        if self.args.policy == "exact":
            # Eq. (13): pi ~ m exp(Q / alpha), the same for Q minus its largest value. So the best
            # available action scores 0 for any alpha, however far others sink towards MASKED.
            best = q.masked_fill(~avail, MASKED).amax(-1, keepdim=True)
            score = ((q - best) / self.alpha_i).clamp(min=MASKED)
            return log_probabilities(self.log_marginal(own_memory, avail) + score, avail)
        with torch.autocast(q.device.type, enabled=False):
            logits = self.policy(team.memory, team.tagged)
        return log_probabilities(rows(logits, living), avail)

    def log_marginal(self, own_memory: Tensor | None, avail: Tensor) -> Tensor:
        """log m (..., U) from own_memory (..., R), to which policies are held. Without a marginal
        it is 0, so that the divergence from it is minus the entropy."""
        if own_memory is None:
            return torch.zeros_like(avail, dtype=torch.float32)
        return log_probabilities(self.marginal.head(own_memory), avail)

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


# --- 5. The paper ---------------------------------------------------------------------------------


def log_probabilities(logits: Tensor, avail: Tensor) -> Tensor:
    """Log-softmax of logits (..., U); actions that are not available get probability 0."""
    return logits.masked_fill(~avail, MASKED).log_softmax(-1)


def rows(x: Tensor, living: Tensor | None) -> Tensor:
    """Rows living (L,) of x (K, A, ...), with K and A as one axis: (L, ...). None: x itself."""
    return x if living is None else x.flatten(0, 1).index_select(0, living)


def divergence(log_pi: Tensor, log_m: Tensor) -> Tensor:
    """KL divergence E_pi log pi(u|s) / m(u|s+), (...), of (..., U); log_m = 0: minus entropy."""
    return (log_pi.exp() * (log_pi - log_m)).sum(-1)


def charge(nats: Tensor, alpha: float) -> Tensor:
    """What the agents' divergences (..., A) from their marginals cost the team, (...)."""
    # Eqs. (3), (16): alpha sum_i log(pi_i / m_i); 0 of the dead and empty, who have one action
    return alpha * nats.sum(-1)


def marginal_loss(log_pi: Tensor, log_m: Tensor) -> Tensor:
    """Cross-entropy (...) of m and pi (..., U); pi, in imagined teams, gets no gradient."""
    # Eq. (17), printed without its minus, exact over actions: smallest at Eq. (12), where m is the
    # mean of pi over s*
    return -(log_pi.detach().exp() * log_m).sum(-1)


def policy_loss(log_pi: Tensor, log_m: Tensor, q: Tensor, alpha: Tensor | float) -> Tensor:
    """Loss (...) from (..., U); log_m and q get no gradient; alpha: a number or (...)."""
    # Eq. (18), exact over actions: smallest at Eq. (13), where pi is m exp(q / alpha), normalised
    nats = divergence(log_pi, log_m.detach())
    return alpha * nats - (log_pi.exp() * q.detach()).sum(-1)


# --- 6. Data --------------------------------------------------------------------------------------


class Player:
    """A policy for battles that begin together. With rng, agents draw actions from pi or, with
    probability epsilon, at random; without rng, they take the most probable action."""

    def __init__(self, agent: Agent, epsilon: float = 0.0, rng: torch.Generator | None = None):
        """rng: generator of random actions (epsilon); draws from pi use agent.rng."""
        self.agent, self.epsilon, self.rng = agent, epsilon, rng
        self.hidden: Tensor | None = None  # (1, B A, R)
        self.own_hidden: Tensor | None = None  # (1, B A, R), of the marginal
        self.last_actions: Tensor | None = None  # (B, 8) int64; -1 at the start

    @torch.no_grad()
    def __call__(self, battles: Any) -> Tensor:
        """Actions (B, 8) int64; keeps the hidden state for the next call."""
        obs = battles.obs
        begins = battles.time == 0
        if begins.any() != begins.all():
            raise ValueError("This player is for battles that begin together: Combat(once=True).")
        if begins.any():
            self.hidden = self.own_hidden = None
            self.last_actions = torch.full(obs.avail.shape[:2], -1)
        played = torch.ones(1, len(obs.avail), dtype=torch.bool)
        features = encode(obs, self.last_actions, played, self.agent.device)
        teams, self.hidden = self.agent.utility(features, hidden=self.hidden)
        avail, own_memory = features.avail_actions, None
        if self.agent.informed and self.agent.args.policy == "exact":
            own_memory, self.own_hidden = self.agent.marginal(features, self.own_hidden)
        log_pi = self.agent.log_policy(teams.full_view, avail, own_memory).cpu()
        if self.rng:  # draw: the largest of log pi + Gumbel noise
            log_pi -= torch.empty_like(log_pi).exponential_(generator=self.agent.rng).log()
        actions = log_pi.argmax(-1)
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


class Trunks(NamedTuple):
    """Outputs of the recurrent networks at the M moments of a minibatch."""

    teams: Views  # a Team each
    own_memory: Tensor | None  # (M, A, R): input of the marginal's head


class Acting(NamedTuple):
    """What policy and marginal learn from: the L living agents at the K steps of a minibatch."""

    living: Tensor  # (L,) int64: which of the K A agents these are
    avail_actions: Tensor  # (L, U) bool
    own_state: Tensor  # (L, D)
    own_memory: Tensor | None  # (L, R): input of the marginal's head
    team: Team  # the real team, of K moments
    imagined: Team  # s*: the units in the agent's group, without gradient


def detached(x: Any) -> Any:
    """The same tensor, None or named tuple of such, through which no gradient passes."""
    if x is None or isinstance(x, Tensor):
        return x if x is None else x.detach()
    return x._make(detached(part) for part in x)


def run_trunks(agent: Agent, features: Features, groups: Tensor | None) -> Trunks:
    """Run the utilities in all views and, if needed, the marginal's network; groups (M, S)."""
    with agent.autocast():
        teams, _ = agent.utility(features, groups)
        own_memory = agent.marginal(features)[0] if agent.informed else None
    return Trunks(teams, own_memory)


def find_acting(trunks: Trunks, batch: Batch) -> Acting:
    """Data of the agents at the steps of a minibatch."""
    now, teams = batch.now, trunks.teams
    avail = batch.features.avail_actions[now]  # (K, A, U)
    own_state = batch.features.entities[now, : avail.shape[1]]  # (K, A, D)
    imagined = teams.own_group or teams.full_view  # without groups s* is s-
    living = (~avail[..., 0]).flatten().nonzero()[:, 0]  # dead and empty have a no-op
    own_memory = trunks.own_memory
    return Acting(
        living=living,
        avail_actions=rows(avail, living),
        own_state=rows(own_state, living),
        own_memory=None if own_memory is None else rows(own_memory[now], living),
        team=teams.full_view.at(now),
        imagined=detached(imagined.at(now)),
    )


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
def find_targets(args: Args, agent: Agent, batch: Batch, trunks: Trunks) -> Tensor:
    """Targets y (K,), with the present policy and marginal, and with target networks for Q."""
    features, later = batch.features, batch.later
    avail = features.avail_actions
    log_m = agent.log_marginal(trunks.own_memory, avail)[later]  # (K, A, U)
    log_pi = agent.log_policy(trunks.teams.full_view, avail, trunks.own_memory)[later]
    with agent.autocast():
        next_teams, _ = agent.target_utility(features)
        # The mixer is linear in utilities: E Q_tot is Q_tot of their expectations. Another mixer
        # needs drawn actions here, and another w_i in Eq. (18).
        expected = Views((log_pi.exp() * next_teams.full_view.q[later]).sum(-1))
        w, q_total, _ = agent.target_mixer(expected, features.at(later))
    nats = divergence(log_pi, log_m)  # (K, A)
    if args.charge_times_w:
        nats = w * nats
    # Eq. (16): y = r + gamma (E_pi Q_tot' - charge). The reward pays it, as no y_t+1 has it.
    paid = args.gamma * charge(nats, agent.alpha) * ~batch.terminated
    rewards = batch.rewards - paid
    if args.returns == "lambda":
        return lambda_returns(args, batch._replace(rewards=rewards), q_total)
    return rewards + args.gamma * q_total * ~batch.terminated


def critic_loss(
    args: Args, agent: Agent, batch: Batch, groups: Tensor | None, teams: Views, y: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The critic's loss, w (K, A), scalars for the log; groups (M, S), y (K,)."""
    features, now = batch.features, batch.now
    chosen = teams.map(lambda team: pick(team.q[now], batch.actions))  # (K, A) each
    groups_now = None if groups is None else groups[now]
    with agent.autocast():
        mixed = agent.mixer(chosen, features.at(now), groups_now)
    w = mixed.w.detach()
    # Eq. (16), which is printed without its square
    td_loss = (mixed.q_total - y).square().mean()
    scalars = {"td_loss": td_loss, "q_total": mixed.q_total.mean()}
    if groups is None:
        return td_loss, w, scalars
    # E (Q_groups - y)^2
    group_loss = (mixed.q_groups - y).square().mean()
    scalars["group_loss"] = group_loss
    weight = args.imagine_weight
    return (1 - weight) * td_loss + weight * group_loss, w, scalars


def learn_marginal(args: Args, agent: Agent, acting: Acting) -> dict[str, Tensor]:
    """Eq. (12): a gradient step of the marginal, if it is needed, on Eq. (17). Returns scalars."""
    if not agent.informed:
        return {}
    living = acting.living
    with torch.no_grad():
        log_pi = agent.log_policy(acting.imagined, acting.avail_actions, acting.own_memory, living)
    log_m = agent.log_marginal(acting.own_memory, acting.avail_actions)  # (L, U)
    loss = marginal_loss(log_pi, log_m).mean()
    descend(loss, agent.marginal, agent.marginal_optimiser, args.max_grad_norm)
    return {"marginal_loss": loss}


def actor_loss(args: Args, agent: Agent, acting: Acting, w: Tensor) -> Tensor:
    """Eq. (13): the mean loss of the policy, Eq. (18), over living agents; w (L,)."""
    # paper is silent: Eq. (20) follows from (19) only with alpha / w_i
    alpha = agent.alpha_i / w if args.alpha_i_over_w else agent.alpha_i
    if args.detach_actor_trunk:
        acting = detached(acting)
    team, living = acting.team, acting.living
    log_pi = agent.log_policy(team, acting.avail_actions, acting.own_memory, living)  # (L, U)
    with torch.no_grad():
        log_m = agent.log_marginal(acting.own_memory, acting.avail_actions)
    loss = policy_loss(log_pi, log_m, rows(team.q, living), alpha)  # (L,)
    return (w * loss if args.actor_loss_times_w else loss).mean()


def step_together(args: Args, agent: Agent, loss: Tensor) -> Tensor:
    """A gradient step of critic and policy on one loss; returns the critic's gradient norm."""
    agent.policy_optimiser.zero_grad()
    loss.backward(inputs=list(agent.policy.parameters()), retain_graph=True)
    # The head steps last, as the critic's backward pass reads its weights. No head: nothing.
    norm = descend(loss, agent.critic(), agent.optimiser, args.max_grad_norm)
    nn.utils.clip_grad_norm_(average_gradients(agent.policy), args.max_grad_norm)
    agent.policy_optimiser.step()
    return norm


def learn(
    args: Args, agent: Agent, batch: Batch, groups: Tensor | None, measures: bool = True
) -> dict[str, Tensor]:
    """A gradient step of the critic, --ba-iterations alternations of marginal and policy. Returns
    scalars for the log, with `measures` also those of measure().

    The trunks run once. Alternations but the last train only the two heads on their outputs. The
    last one also trains the marginal's trunk, and its policy loss is added to the critic's loss, as
    policy and utilities share a trunk.
    """
    trunks = run_trunks(agent, batch.features, groups)
    y = find_targets(args, agent, batch, trunks)
    loss, w, scalars = critic_loss(args, agent, batch, groups, trunks.teams, y)
    acting = find_acting(trunks, batch)
    w = rows(w, acting.living).clamp(min=1e-6)  # (L,); a softmax can underflow to 0
    if measures:
        scalars |= measure(agent, acting, w)
    has_head = args.policy == "head"
    fixed = detached(acting)  # no gradient reaches the trunks
    for _ in range(agent.ba_iterations - 1):
        learn_marginal(args, agent, fixed)
        if has_head:
            actor = actor_loss(args, agent, fixed, w)
            descend(actor, agent.policy, agent.policy_optimiser, args.max_grad_norm)
    scalars |= learn_marginal(args, agent, acting)
    if has_head:
        scalars["policy_loss"] = actor_loss(args, agent, acting, w)
        loss = loss + scalars["policy_loss"]
    scalars["grad_norm"] = step_together(args, agent, loss)
    return scalars


@torch.no_grad()
def measure(agent: Agent, acting: Acting, w: Tensor) -> dict[str, Tensor]:
    """Means over living agents, for the log: divergence of policy and marginal in imagined teams
    (mi, also by type of unit) and in the real team (kl), entropy, w (L,) and alpha_i / w."""
    given = acting.avail_actions, acting.own_memory, acting.living
    log_pi = agent.log_policy(acting.team, *given)  # (L, U)
    entropy = -divergence(log_pi, torch.zeros_like(log_pi))
    figures = {"entropy": entropy, "w": w, "alpha_over_w": agent.alpha_i / w}
    scalars = {name: x.mean() for name, x in figures.items()}
    if not agent.informed:
        return scalars
    log_m = agent.log_marginal(acting.own_memory, acting.avail_actions)
    scalars["kl"] = divergence(log_pi, log_m).mean()
    information = divergence(agent.log_policy(acting.imagined, *given), log_m)  # (L,)
    scalars["mi"] = information.mean()
    for name, column in agent.types.items():
        is_type = acting.own_state[:, column] > 0
        if is_type.any():
            scalars[f"mi/{name}"] = information[is_type].mean()
    return scalars


def update(
    args: Args, agent: Agent, buffer: ReplayBuffer, rng: torch.Generator
) -> dict[str, Tensor]:
    """--updates-per-iteration gradient steps, a minibatch each. Returns the means of scalars."""
    found = collections.defaultdict(list)
    imagine = args.imagine and args.scenario != "resource"
    for left in reversed(range(args.updates_per_iteration)):  # minibatches to come
        batch = buffer.sample(rng, args.batch_size)
        groups = draw_groups(batch.features, rng) if imagine else None
        scalars = learn(args, agent, batch, groups, measures=left == 0)
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
            own={"rng": rng, "method_rng": agent.rng, "battles": battles, "log": log},
            replays={"replay": buffer},
            amp=agent.amp,
            alpha=agent.alpha,
            alpha_i=agent.alpha_i,
            ba_iterations=agent.ba_iterations,
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
