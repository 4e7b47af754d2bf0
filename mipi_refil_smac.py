"""MIPI (Wang, Ye and Lu, NeurIPS 2023) on REFIL, baselines/refil_smac.py, as its parent.

Who relies on the team around it errs when the team is another. Each agent has a policy beside its
utilities, and a marginal policy that sees its own unit only; the policy pays for differing from the
marginal, which is the mutual information of its actions and the team, given its own state.

    J        = E sum_t gamma^t (r - alpha sum_i log pi_i(u|s) / m_i(u|s+))              (3), (8)
    Q_tot    = sum_i w_i Q_i + V,  w softmax over agents                              (14), (15)
    y        = r + gamma E_pi (Q_tot' - alpha sum_i log pi_i / m_i),  L = E (Q_tot - y)^2   (16)
    m_i      = E_s* pi_i(u|s+, s*):  maximum likelihood on imagined teams s*          (12), (17)
    pi_i     ~ m_i exp(Q_i / alpha):  minimise E_pi (alpha log pi_i / m_i - Q_i)      (13), (18)

(12) and (13) alternate --ba-iterations times for every step of the critic (Blahut and Arimoto).

    python mipi_refil_smac.py --scenario sz --team-sizes 3 4 5 --eval-team-sizes 6 7 8
    python mipi_refil_smac.py --scenario mmm --preset cpu                    for CPUs
    python mipi_refil_smac.py --scenario sz --regularizer entropy            or none: the ablations
    python mipi_refil_smac.py --resume runs/RUN --total-timesteps 20000000
    python mipi_refil_smac.py --eval-only runs/RUN --backend sc2             in StarCraft II

Letters: T steps, B battles, M moments (of all battles, without padding), K steps between them, A
agents, S entities (agents, then enemies), V views (all one sees; of it one's own group; of it the
other group), D features of an entity, H hidden units, R of the GRU, h heads of size d, G
hypernetworks, E units of the mixer. What the paper leaves open: docs/mipi.md; worlds:
docs/combat.md.
"""

from __future__ import annotations

import collections
import contextlib
import copy
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
from typing import Annotated, Any, Literal, NamedTuple

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

from envs.smac import episodes as combat_episodes
from envs.smac import resource_collection
from envs.smac.combat import EPISODE_LIMIT, FAMILIES, SIDE, EnemyAI, Family, Observation
from envs.smac.episodes import Policy
from envs.smac.game import BattleError
from envs.smac.views import film_battle

Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Count = Annotated[int, Interval(ge=0)]
Positive = Annotated[int, Interval(ge=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
Above = Annotated[float, Interval(gt=0, lt=math.inf)]
Alpha = Annotated[float, Interval(ge=0)]


# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """MIPI in StarCraft micromanagement. Defaults are the paper's."""

    # Run
    seed: Seed = 1  # fixes everything that is drawn
    total_timesteps: Positive = 10_000_000  # environment steps of all battles
    run_dir: str = ""  # default: runs/{world}__{script}__s{seed}__{UTC time}__{4 hex}
    resume: str = ""  # run directory to go on with; its own arguments hold
    eval_only: str = ""  # run directory or checkpoint to evaluate, without training
    preset: Literal["paper", "cpu"] = "paper"  # cpu: smaller and faster; other flags override it
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "unseen"  # project there
    wandb_mode: Literal["online", "offline"] = "online"  # offline: `wandb sync` later
    wandb_timeout: Above = 10.0  # seconds until an unreachable server is given up
    capture_video: bool = False  # an MP4 per team size with every evaluation
    # Environment
    backend: Literal["sim", "sc2"] = "sim"  # envs/smac/combat.py or StarCraft II
    scenario: Literal["sz", "csz", "mmm", "resource"] = "sz"  # units; Resource Collection
    team_sizes: tuple[Positive, ...] = (3, 4, 5)  # to train with
    enemy_ai: EnemyAI = "sticky"  # sim: as the game's, or whom its units attack
    clip_regeneration: bool = False  # what enemies regenerate earns nothing, instead of a reward
    num_envs: Positive = 8  # B, battles at a time
    env_threads: Positive = 1  # sim: over which they are spread
    game_version: str = ""  # sc2: as 4.10.0; default: the newest that is installed
    max_episode_steps: Positive = EPISODE_LIMIT  # of a battle; resource has 145
    # Method
    regularizer: Literal["mi", "entropy", "none"] = "mi"  # Eq. (3)'s; none: reward alone
    alpha: Alpha | None = None  # Eq. (16)'s; default .03, mmm .1, resource .05; inf: see oneself
    alpha_i: Alpha | None = None  # and in Eq. (18); default: alpha
    alpha_i_over_w: bool = False  # alpha_i / w_i in Eq. (18), as Lemma 2 needs
    ba_iterations: Positive | None = None  # M of Eqs. (12), (13); default: 4, in resource 1
    literal_blahut_arimoto: bool = False  # networks run in all of them, not only in the last
    detach_actor_trunk: bool = False  # Eq. (18) does not move the layers shared with utilities
    sample_next_actions: bool = False  # u' of Eq. (16) is drawn, as printed; else its expectation
    policy: Literal["head", "greedy"] = "head"  # greedy: the action with the largest utility
    imagine: bool = True  # imagined groups: of Eq. (17)'s teams, and REFIL's loss; not in resource
    imagine_weight: Share = 0.5  # lambda, of that
    mask_empty_slots: bool = False  # no weight for slots without a living agent
    timeout_terminates: bool = True  # no bootstrap when time is out, as in the authors' code
    hidden_size: Positive = 128  # H, of embeddings and attention
    heads: Positive = 4  # of attention
    rnn_size: Positive = 64  # R, of the agents' GRU
    mixing_size: Positive = 32  # E
    # Base algorithm
    learning_rate: Amount = 5e-4  # RMSprop's
    rmsprop_alpha: Share = 0.99  # decay of its mean square
    rmsprop_eps: Above = 1e-5  # added to its root
    max_grad_norm: Above = 10.0  # of critic, policy head and marginal, each
    gamma: Share = 0.99  # discount
    batch_size: Positive = 32  # episodes of a minibatch
    buffer_size: Positive = 5000  # episodes of the replay
    updates_per_iteration: Positive = 8  # after every num_envs episodes
    target_every: Positive = 200  # episodes between copies to the target networks
    epsilon_start: Share = 1.0  # probability of a random action, at first
    epsilon_final: Share = 0.05  # and later
    epsilon_steps: Positive = 500_000  # environment steps until then
    amp: bool = False  # bf16 autocast where the hardware has it
    # Evaluation and checkpoints (every: environment steps, 0 for never)
    log_every: Positive = 10_000  # lines of metrics.jsonl
    eval_every: Count = 50_000  # evaluations on the way
    eval_episodes: Positive = 160  # in those, of each team size
    eval_team_sizes: tuple[Positive, ...] = (6, 7, 8)  # unseen ones, evaluated beside team_sizes
    final_episodes: Count = 160  # of each size at the end and with --eval-only
    save_every: Count = 500_000  # checkpoints; the last two are kept
    # System
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    num_threads: Positive = 1  # torch's; on a busy machine more is slower
    compile: bool = False  # compile the networks; for GPUs, on a CPU it gains nothing


PRESETS = {  # flags that come before those of the command line
    "paper": "",
    "cpu": "--hidden-size 64 --amp --num-envs 32 --batch-size 8 --updates-per-iteration 16 "
    "--learning-rate 1e-3 --buffer-size 512 --epsilon-steps 100000 --eval-every 250000 "
    "--eval-episodes 32 --detach-actor-trunk",
}


def validate(args: Args) -> None:
    """Raise UsageError for combinations that cannot be meant."""
    resource, longest = args.scenario == "resource", resource_collection.EPISODE_LIMIT
    for wrong, sentence in (
        (args.resume and args.eval_only, "--resume and --eval-only exclude each other"),
        (args.resume and args.run_dir, "--resume goes on in its own directory, without --run-dir"),
        (args.eval_only and not args.final_episodes, "--eval-only needs --final-episodes"),
        (not args.team_sizes, "--team-sizes is empty"),
        (len(set(args.team_sizes)) < len(args.team_sizes), "--team-sizes has one twice"),
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size"),
        (args.hidden_size % args.heads, "--hidden-size is no multiple of --heads"),
        (
            args.policy == "greedy" and args.regularizer != "none",
            "--policy greedy is for --regularizer none: its logarithm is not finite",
        ),
        (args.alpha_i == math.inf, "--alpha-i is finite"),
        (
            args.alpha == math.inf and (args.alpha_i is not None or args.regularizer != "mi"),
            "--alpha inf is without --alpha-i and --regularizer: nothing is left to regularise",
        ),
        (
            args.regularizer == "none" and (args.alpha, args.alpha_i) != (None, None),
            "--regularizer none has no --alpha and no --alpha-i",
        ),
        (
            args.alpha_i_over_w and (args.regularizer == "none" or args.alpha == math.inf),
            "--alpha-i-over-w needs a regulariser",
        ),
        (
            args.alpha_i_over_w and (args.alpha if args.alpha_i is None else args.alpha_i) == 0,
            "--alpha-i-over-w divides --alpha-i, which is 0",
        ),
        (
            args.policy == "greedy" and (args.ba_iterations or args.literal_blahut_arimoto),
            "--policy greedy has no alternations, (12) and (13), to set",
        ),
        (
            args.imagine_weight != Args.imagine_weight and (resource or not args.imagine),
            "--imagine-weight: neither --no-imagine nor --scenario resource has groups to weigh",
        ),
        *(
            (
                resource and getattr(args, name) != getattr(Args, name),
                f"--{name.replace('_', '-')} is for battles, not for --scenario resource",
            )
            for name in ("clip_regeneration", "enemy_ai", "env_threads")
        ),
        (
            resource and longest < args.max_episode_steps != EPISODE_LIMIT,
            f"--max-episode-steps: an episode of --scenario resource has at most {longest}",
        ),
        (
            args.backend == "sc2" and args.scenario == "resource",
            "--scenario resource is no game of --backend sc2",
        ),
        (
            args.backend == "sc2" and args.enemy_ai != "sticky" and not args.eval_only,
            "--enemy-ai is for --backend sim, the game has its own",
        ),
        (
            args.game_version and args.backend != "sc2" and not (args.resume or args.eval_only),
            "--game-version is for --backend sc2",
        ),
        ("WORLD_SIZE" in os.environ, "This script is one process: battles are batched instead"),
    ):
        if wrong:
            raise UsageError(f"{sentence}.")
    try:
        family_of(args.scenario).teams((*args.team_sizes, *args.eval_team_sizes))
    except ValueError as error:
        raise UsageError(str(error)) from None


LINE = ("return", "win", "td_loss", "sps")  # scalars on standard output, without a terminal
RESUMABLE = (  # what may differ from the run's own arguments with --resume and --eval-only
    *("total_timesteps", "run_dir", "resume", "eval_only", "track", "wandb_project", "wandb_mode"),
    *("wandb_timeout", "capture_video", "backend", "env_threads", "game_version"),
    *("log_every", "eval_every", "eval_episodes", "final_episodes", "eval_team_sizes"),
    *("save_every", "device", "num_threads", "compile"),
)


def with_preset(argv: list[str]) -> list[str]:
    """The flags of --preset, then argv, whose flags override them."""
    name = re.search(r"--preset[= ](\w+)", " ".join(argv))
    return PRESETS.get(name[1] if name else "paper", "").split() + argv


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


def family_of(scenario: str) -> Family | resource_collection.Family:
    """What is known of a world before there is one."""
    return resource_collection.Family() if scenario == "resource" else FAMILIES[scenario]


def make_envs(
    args: Args, sizes: tuple[int, ...], num_envs: int, seed: int, device: str | torch.device = "cpu"
) -> Any:
    """num_envs battles of teams of these sizes, which stand still when they have ended; UsageError
    if there are no such teams. Only Resource Collection can be on a GPU."""
    options = {"team_sizes": sizes, "num_battles": num_envs, "seed": seed, "once": True}
    options |= {"episode_limit": args.max_episode_steps}
    try:
        if args.scenario == "resource":
            limit = min(args.max_episode_steps, resource_collection.EPISODE_LIMIT)
            options |= {"episode_limit": limit, "device": device}
            return resource_collection.ResourceCollection(**options)
        options |= {"scenario": args.scenario, "clip_regeneration": args.clip_regeneration}
        if args.backend == "sc2":
            from envs.smac.game import make_battles

            return make_battles(**options, game_version=args.game_version or None)
        from envs.smac.combat import Combat

        return Combat(**options, enemy_ai=args.enemy_ai, threads=args.env_threads)
    except (ValueError, BattleError) as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def opened(battles: Any) -> Iterator[Any]:
    """Battles that are closed in the end, if they are of a kind that has to be; RunError if the
    game cannot be played on."""
    try:
        yield battles
    except BattleError as error:
        raise RunError(str(error)) from None
    finally:
        getattr(battles, "close", lambda: None)()


# --- 4. Networks ----------------------------------------------------------------------------------

MASKED = -1e9  # in the place of a score or a utility: not to be chosen
CHUNK = 25  # times that the GRU is given at once


class View(NamedTuple):
    """What networks read: M moments, those of T times and B battles that were played, in order of
    time, then battle. A and S are the slots that any of the battles fills: empty ones after them
    would change nothing."""

    entities: Tensor  # (M, S, D + actions) float32: features; of agents also the last action
    unseen: Tensor  # (M, A, S) bool: agent i does not see entity j
    empty: Tensor  # (M, S) bool: no unit has this slot
    avail: Tensor  # (M, A, actions) bool
    played: Tensor  # (T, B) bool, on the CPU; the longest battles come first

    def rows(self, index: Tensor) -> View:
        """Some of the moments, for a mixer."""
        return View(*(x[index] for x in self[:4]), self.played)


def look(args: Args, obs: Observation, last: Tensor, played: Tensor, device: torch.device) -> View:
    """Observations (M, ...) as networks read them; last (M, 8): the last actions, -1 where there
    was none; played (T, B) bool: which the M moments are. --alpha inf: nobody sees others."""
    filled = (~obs.entity_mask).any(0).unflatten(0, (2, SIDE))
    A, E = (int(x.nonzero().max()) + 1 for x in filled)
    slots = torch.cat((torch.arange(A), SIDE + torch.arange(E))).to(filled.device)
    acted = F.one_hot(last[:, :A] + 1, obs.avail.shape[-1] + 1)[..., 1:].float()
    acted = F.pad(acted, (0, 0, 0, E))  # others' are unknown
    entities = torch.cat((obs.entities[:, slots], acted), -1)
    unseen = obs.obs_mask[:, :A].index_select(-1, slots)
    if args.alpha == math.inf:
        unseen = unseen | ~torch.eye(A, A + E, dtype=torch.bool, device=unseen.device)
    parts = entities, unseen, obs.entity_mask[:, slots], obs.avail[:, :A]
    return View(*(x.to(device) for x in parts), played)


def own_state(view: View) -> View:
    """s+: agents, each of which sees itself only: entities (M, A, D), unseen (M, A, A)."""
    A = view.unseen.shape[1]
    others = ~torch.eye(A, dtype=torch.bool, device=view.unseen.device)
    unseen = view.unseen[..., :A] | others  # (M, A, A)
    return view._replace(entities=view.entities[:, :A], unseen=unseen, empty=view.empty[:, :A])


def in_views(mask: Tensor, groups: Tensor | None) -> Tensor:
    """mask (M, A, S), of what is not seen, in V views (M, V, A, S): V = 1, or, with groups (M, S)
    bool, 3: that alone; with the other group; with one's own."""
    if groups is None:
        return mask[:, None]
    apart = groups[:, : mask.shape[1], None] != groups[:, None]  # (M, A, S)
    return torch.stack((mask, mask | apart, mask | ~apart), 1)


def uniform_parameter(inputs: int, *shape: int) -> nn.Parameter:
    """Weights or biases of several linear layers side by side, as nn.Linear begins."""
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Attention(nn.Module):
    """G attention layers side by side, from agents to entities."""

    def __init__(self, G: int, H: int, heads: int):
        super().__init__()
        self.query, self.heads = uniform_parameter(H, G, H, H), heads
        self.pair = uniform_parameter(H, G, H, 2 * H)  # keys and values

    def forward(self, x: Tensor, agents: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (G, M, h, A, d), keys and values (G, M, h, S, d) of x (M, S, G, H)."""
        M, S, G, H = x.shape
        query = x[:, :agents].flatten(0, 1).transpose(0, 1) @ self.query
        key, value = (x.flatten(0, 1).transpose(0, 1) @ self.pair).chunk(2, -1)
        split = lambda y: y.view(G, M, -1, self.heads, H // self.heads).transpose(2, 3)  # noqa: E731
        return split(query / math.sqrt(H // self.heads)), split(key), split(value)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Weighted values (G, M, V, A, H) in views with mask (M, V, A, S); 0 where all is masked.

    Scores are the same in all views; views are rows of one product with the values.
    """
    mask = mask[:, None]  # (M, 1, V, A, S)
    scores = (query @ key.mT)[:, :, :, None].masked_fill(mask, MASKED)  # (G, M, h, V, A, S)
    weights = scores.softmax(-1).masked_fill(mask, 0.0)
    out = (weights.flatten(3, 4) @ value).unflatten(3, mask.shape[2:4])  # (G, M, h, V, A, d)
    return out.permute(0, 1, 3, 4, 2, 5).flatten(-2)


class Utility(nn.Module):
    """Q_i(u) of every agent from what it sees and has seen; also the marginal policy, from s+."""

    def __init__(self, inputs: int, actions: int, args: Args):
        super().__init__()
        H = args.hidden_size
        self.first, self.attention = nn.Linear(inputs, H), Attention(1, H, args.heads)
        self.out, self.second = nn.Linear(H, H), nn.Linear(H, args.rnn_size)
        self.gru = nn.GRU(args.rnn_size, args.rnn_size)
        self.last = nn.Linear(args.rnn_size, actions)

    def forward(
        self, view: View, groups: Tensor | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Utilities (V, M, A, actions), x (V, M, A, R) that they are read off, and the hidden state
        after them (1, B V A, R)."""
        A, mask = view.unseen.shape[1], in_views(view.unseen, groups)  # (M, V, A, S)
        x = F.relu(self.first(view.entities))[:, :, None]  # (M, S, 1, H)
        x = attend(*self.attention(x, A), mask)[0]  # (M, V, A, H)
        with torch.autocast(x.device.type, enabled=False):  # utilities need their digits
            # Two linear layers with nothing between them are one.
            weight = self.second.weight @ self.out.weight
            bias = self.second.weight @ self.out.bias + self.second.bias
            x = F.relu(F.linear(x.to(weight.dtype), weight, bias))
            x, hidden = self.remember(x, view.played, hidden)  # (M, V, A, R)
            q = self.last(x).masked_fill(view.empty[:, None, :A, None], 0.0)
        return q.movedim(1, 0), x.movedim(1, 0), hidden

    def remember(self, x: Tensor, played: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The GRU over moments (M, V, A, R): chunks of time without the battles that ended before
        them. After one that ends within a chunk comes 0, which nobody reads."""
        chunks, found = played.split(CHUNK), []
        for part, chunk in zip(x.split([int(chunk.sum()) for chunk in chunks]), chunks):
            T, B = len(chunk), int(chunk[0].sum())  # that go on
            place = chunk[:, :B].flatten().nonzero()[:, 0].to(x.device)
            part = x.new_zeros(T * B, *x.shape[1:]).index_copy(0, place, part)
            part = part.view(T, -1, x.shape[-1])  # (T, B V A, R)
            hidden = hidden if hidden is None else hidden[:, : part.shape[1]].contiguous()
            part, hidden = self.gru(part, hidden)
            found.append(part.reshape(T * B, *x.shape[1:])[place])
        return torch.cat(found), hidden


class Mixer(nn.Module):
    """Q_tot of chosen utilities. Two hypernetworks attend to all units: of w and of V."""

    def __init__(self, inputs: int, args: Args):
        super().__init__()
        G, H = 2, args.hidden_size
        self.empty_score = MASKED if args.mask_empty_slots else 0.0
        self.first, self.attention = nn.Linear(inputs, G * H), Attention(G, H, args.heads)
        self.out, self.out_bias = uniform_parameter(H, G, H, H), uniform_parameter(H, G, H)
        self.last, self.last_bias = (
            uniform_parameter(H, G, H, args.mixing_size),
            uniform_parameter(H, G, args.mixing_size),
        )

    def forward(self, q: Tensor, view: View, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Q_tot (1, M) of q (1, M, A); with groups and q (3, M, A) also Q_groups (2, M). And w
        (M, A), of Q_tot."""
        A, G = view.unseen.shape[1], len(self.out)
        x = F.relu(self.first(view.entities)).unflatten(-1, (G, -1))  # (M, S, G, H)
        parts = self.attention(x, A)
        mask = in_views(view.empty[:, :A, None] | view.empty[:, None], groups)  # (M, V, A, S)
        own = attend(*(x[:1] for x in parts), mask)[0]  # (M, V, A, H)
        rest = attend(*(x[1:] for x in parts), mask[:, :1])[:, :, 0]  # (G - 1, M, A, H)
        filled = ~view.empty[:, :A]
        with torch.autocast(q.device.type, enabled=False):
            weight = self.out @ self.last  # (G, H, E), as in Utility
            bias = (self.out_bias[:, None] @ self.last)[:, 0] + self.last_bias  # (G, E)
            w = own.to(weight.dtype) @ weight[0] + bias[0]  # (M, V, A, E)
            # All but w are means over the 8 slots of agents, where empty ones count as 0.
            rest = (rest.to(weight.dtype) * filled[..., None]).sum(2) / SIDE  # (G - 1, M, H)
            share = filled.sum(-1, keepdim=True) / SIDE  # (M, 1)
            v = (rest @ weight[1:] + share * bias[1:, None])[0]  # (M, E)
            total, w = self.mix(q.movedim(0, 1), w, view)  # (M, 1 or 2)
            return (total + v.mean(-1, keepdim=True)).T, w

    def mix(self, q: Tensor, w: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """sum_i w_i Q_i with a softmax over all 8 slots, or 16 of groups; and w_i (M, A)."""
        # paper and code differ: in REFIL's code only empty slots score 0, the dead do not
        A, gone = q.shape[-1], view.avail[:, None, :, 0]  # (M, 1, A): who is not there has a no-op
        score = w.mean(-1).masked_fill(gone, self.empty_score)
        score = F.pad(score, (0, SIDE - q.shape[-1]), value=self.empty_score)  # (M, V, 8)
        q = F.pad(q, (0, SIDE - q.shape[-1]))
        kinds = ((score[:, :1], q[:, :1]), (score[:, 1:], q[:, 1:]))[: 1 if q.shape[1] == 1 else 2]
        # Eq. (15)
        w, *_ = weights = [s.flatten(1).softmax(-1) for s, _ in kinds]
        total = torch.stack([(w * x.flatten(1)).sum(-1) for w, (_, x) in zip(weights, kinds)], 1)
        return total, w[:, :A]


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is fast there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Agent:
    """The networks and their optimisers."""

    def __init__(self, args: Args, family: Family, device: torch.device):
        self.args, self.device, self.amp = args, device, args.amp and has_bf16(device)
        inputs = family.features + family.n_actions
        torch.manual_seed(args.seed)
        self.utility = Utility(inputs, family.n_actions, args).to(device)
        self.mixer = Mixer(inputs, args).to(device)
        self.target_utility, self.target_mixer = copy.deepcopy((self.utility, self.mixer))
        options = {"alpha": args.rmsprop_alpha, "eps": args.rmsprop_eps, "foreach": True}
        parameters = self.learning().parameters()
        self.optimiser = torch.optim.RMSprop(parameters, args.learning_rate, **options)
        self.policy = nn.Linear(args.rnn_size, family.n_actions).to(device)
        self.marginal = Utility(inputs, family.n_actions, args).to(device)
        new = functools.partial(torch.optim.RMSprop, lr=args.learning_rate, **options)
        self.policy_optimiser = new(self.policy.parameters())
        self.marginal_optimiser = new(self.marginal.parameters())
        own_seed = int(np.random.default_rng((args.seed, 1)).integers(2**31))
        self.rng = torch.Generator().manual_seed(own_seed)  # of what the parent does not draw
        # Eq. (16)'s alpha and Eq. (18)'s
        default = {"mmm": 0.1, "resource": 0.05}.get(args.scenario, 0.03)
        self.alpha = default if args.alpha is None else args.alpha
        self.alpha_i = self.alpha if args.alpha_i is None else args.alpha_i
        if args.regularizer == "none" or self.alpha == math.inf:
            self.alpha = self.alpha_i = 0.0
        self.alternations = args.ba_iterations or (1 if args.scenario == "resource" else 4)
        # Whether there is a marginal to learn and to differ from.
        self.informed = args.regularizer == "mi" and self.alpha + self.alpha_i > 0
        self.types = family.type_columns  # {name: feature that says so}
        if args.compile:
            nets = self.utility, self.mixer, self.target_utility, self.target_mixer, self.marginal
            for net in nets:
                net.compile(dynamic=True)

    def learning(self) -> nn.ModuleList:
        return nn.ModuleList((self.utility, self.mixer))

    def log_policy(self, q: Tensor, x: Tensor, avail: Tensor) -> Tensor:
        """log pi (..., actions) of utilities q (..., actions), which are read off x (..., R)."""
        if self.args.policy == "greedy":
            best = q.masked_fill(~avail, MASKED).argmax(-1, keepdim=True)
            return torch.full_like(q, MASKED).scatter(-1, best, 0.0)
        with torch.autocast(x.device.type, enabled=False):
            return log_probabilities(self.policy(x), avail)

    def copy_to_targets(self) -> None:
        self.target_utility.load_state_dict(self.utility.state_dict())
        self.target_mixer.load_state_dict(self.mixer.state_dict())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}


# --- 5. The paper ---------------------------------------------------------------------------------


def log_probabilities(logits: Tensor, avail: Tensor) -> Tensor:
    """Of actions (..., actions); those that are not available have probability 0."""
    return logits.masked_fill(~avail, MASKED).log_softmax(-1)


def divergence(log_pi: Tensor, log_marginal: Tensor) -> Tensor:
    """E_pi log pi(u|s) / m(u|s+), (...), of (..., actions); of log_marginal 0 minus the entropy."""
    return (log_pi.exp() * (log_pi - log_marginal)).sum(-1)


def value_of(total: Tensor, cost: Tensor, alpha: float) -> Tensor:
    """V (K,) of Q_tot (K,) and log ratios, or what is expected of them, cost (K, A)."""
    # Eq. (16): E_pi (Q_tot' - alpha sum_i log pi_i / m_i)
    return total - alpha * cost.sum(-1)


def marginal_loss(log_pi: Tensor, log_marginal: Tensor) -> Tensor:
    """(...), of (..., actions); policies, in imagined teams, are given."""
    # Eq. (17), exact over actions: its minimum is Eq. (12), the mean of pi over s*
    return -(log_pi.detach().exp() * log_marginal).sum(-1)


def policy_loss(log_pi: Tensor, log_marginal: Tensor, q: Tensor, alpha: Tensor | float) -> Tensor:
    """(...), of (..., actions); marginal and utilities are given; alpha: a number or (...)."""
    # Eq. (18), exact over actions: its minimum is Eq. (13)
    cost = divergence(log_pi, log_marginal.detach())
    return alpha * cost - (log_pi.exp() * q.detach()).sum(-1)


# --- 6. Data --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B episodes: the K steps of all, between M = K + B moments."""

    view: View  # of M moments
    step: Tensor  # (K,) int64: of which moment it is
    later: Tensor  # (K,) int64: which one it led to
    actions: Tensor  # (K, A) int64
    rewards: Tensor  # (K,) float32
    terminated: Tensor  # (K,) bool: no value comes after


class Replay:
    """The last episodes: what units were like, from which all else is made again."""

    def __init__(self, args: Args, battles: Any, device: torch.device):
        self.args, self.battles, self.device, self.episodes = args, battles, device, 0
        N, T, new = args.buffer_size, args.max_episode_steps, torch.empty
        self.fixed, self.states = {"length": new(N, dtype=torch.int64)}, {}
        for name, x in battles.snapshot._asdict().items():
            if name in battles.fixed:
                self.fixed[name] = new(N, *x.shape[1:], dtype=x.dtype)
            else:
                self.states[name] = new(N, T + 1, *x.shape[1:], dtype=x.dtype)
        self.steps = {
            "actions": new(N, T, SIDE, dtype=torch.int8),
            "rewards": new(N, T),
            "terminated": new(N, T, dtype=torch.bool),
        }

    @property
    def size(self) -> int:
        return min(self.episodes, self.args.buffer_size)

    def add(self, snapshots: list, steps: list[tuple], episodes: list) -> None:
        """Store an episode of every battle: T + 1 snapshots, T steps; 0 after a battle's end."""
        place = torch.arange(self.episodes, self.episodes + len(episodes)) % self.args.buffer_size
        lengths = [e.length for e in sorted(episodes, key=lambda e: e.battle)]
        length = self.fixed["length"][place] = torch.tensor(lengths)
        for name in self.battles.fixed:
            self.fixed[name][place] = getattr(snapshots[0], name)
        moving = self.states
        states = {name: torch.stack([getattr(s, name) for s in snapshots], 1) for name in moving}
        played = dict(zip(self.steps, (torch.stack(x, 1) for x in zip(*steps))))
        after = torch.arange(len(snapshots)) > length[:, None]  # (B, T + 1)
        for store, new, end in ((self.states, states, after), (self.steps, played, after[:, 1:])):
            for name, x in new.items():
                x[end] = 0
                store[name][place] = 0
                store[name][place, : x.shape[1]] = x.to(store[name].dtype)
        self.episodes += len(episodes)

    def sample(self, rng: torch.Generator, size: int) -> Batch:
        """size episodes, each at most once."""
        index = torch.randperm(self.size, generator=rng)[:size]
        index = index[self.fixed["length"][index].argsort(descending=True, stable=True)]
        fixed = {name: x[index] for name, x in self.fixed.items()}
        length = fixed.pop("length")  # (B,)
        T = int(length[0])
        time = torch.arange(T + 1)[:, None]
        played = time <= length  # (T + 1, B)
        row = {name: x[index, : T + 1].transpose(0, 1)[played] for name, x in self.states.items()}
        row |= {k: x.expand(T + 1, *x.shape)[played] for k, x in fixed.items()}
        obs = self.battles.observe(type(self.battles.snapshot)(**row))  # (M, ...)
        actions, rewards, over = (x[index, :T].transpose(0, 1) for x in self.steps.values())
        if self.args.timeout_terminates:
            over = over | (time[:-1] == length - 1)
        last = F.pad(actions, (0, 0, 0, 0, 1, 0), value=-1)[played].long()  # (M, 8)
        view = look(self.args, obs, last, played, self.device)
        goes_on = played[1:]  # (T, B): a step follows
        number = played.flatten().cumsum(0).view_as(played) - 1  # (T + 1, B): of moments
        actions = actions[goes_on][:, : view.avail.shape[1]].long()
        parts = number[:-1][goes_on], number[1:][goes_on], actions, rewards[goes_on], over[goes_on]
        return Batch(view, *(x.to(self.device) for x in parts))

    def state_dict(self) -> dict[str, Tensor]:
        """What was played, without padding."""
        n, real = self.size, self._real()
        saved = {name: x[:n].clone() for name, x in self.fixed.items()}
        saved |= {name: x[:n][real] for name, x in self.states.items()}
        return saved | {name: x[:n][real[:, 1:]] for name, x in self.steps.items()}

    def load_state_dict(self, saved: dict[str, Tensor], episodes: int) -> None:
        self.episodes = episodes
        n = self.size
        for name, x in self.fixed.items():
            x[:n] = saved[name]
        real = self._real()
        for store, where in ((self.states, real), (self.steps, real[:, 1:])):
            for name, x in store.items():
                x[:n] = 0
                x[:n][where] = saved[name]

    def _real(self) -> Tensor:
        """(size, T + 1) bool: observations that are no padding."""
        time = torch.arange(self.args.max_episode_steps + 1)
        return time <= self.fixed["length"][: self.size, None]


def player(agent: Agent, epsilon: float = 0.0, rng: torch.Generator | None = None) -> Policy:
    """Recurrent agents, for one episode of each battle. With rng they draw from their policy, or
    with probability epsilon any action; without they take what is most probable."""
    hidden, last = None, None

    @torch.no_grad()
    def act(battles: Any) -> Tensor:
        nonlocal hidden, last
        obs = battles.obs
        if last is None:
            last = torch.full(obs.avail.shape[:2], -1, device=obs.avail.device)
        played = torch.ones(1, len(last), dtype=torch.bool)
        view = look(agent.args, obs, last, played, agent.device)
        q, x, hidden = agent.utility(view, None, hidden)
        log_pi = agent.log_policy(q[0], x[0], view.avail).cpu()
        if rng and agent.args.policy == "head":
            log_pi -= torch.empty_like(log_pi).exponential_(generator=agent.rng).log()
        actions = log_pi.argmax(-1)
        if rng:
            avail = view.avail.cpu()
            any_of = torch.rand(avail.shape, generator=rng).masked_fill(~avail, -1.0).argmax(-1)
            explore = torch.rand(actions.shape, generator=rng) < epsilon
            actions = torch.where(explore, any_of, actions)
        actions = F.pad(actions, (0, SIDE - actions.shape[1]))  # empty slots: no-op
        last = actions.to(last.device)
        return last

    return act


def collect(agent: Agent, replay: Replay, epsilon: float, rng: torch.Generator) -> list:
    """Play one episode of every battle into the replay. Returns them (battles.Episode)."""
    battles = replay.battles
    battles.reset()
    policy, episodes = player(agent, epsilon, rng), []
    kept = functools.partial(torch.Tensor.to, device="cpu", copy=True)
    copy_of = lambda snapshot: type(snapshot)(*map(kept, snapshot))  # noqa: E731
    snapshots, steps = [copy_of(battles.snapshot)], []
    while len(episodes) < battles.num_battles:
        actions = policy(battles)
        step = battles.step(actions)
        steps.append(tuple(map(kept, (actions, step.reward, step.terminated))))
        snapshots.append(copy_of(step.final))
        episodes += step.episodes
    replay.add(snapshots, steps, episodes)
    return episodes


def epsilon_at(args: Args, timesteps: int) -> float:
    """Falls linearly, then stays."""
    done = min(timesteps / args.epsilon_steps, 1.0)
    return args.epsilon_start + done * (args.epsilon_final - args.epsilon_start)


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


def pick(q: Tensor, actions: Tensor) -> Tensor:  # (V, K, A, actions), (K, A) -> (V, K, A)
    return q.gather(-1, actions.expand(len(q), -1, -1)[..., None])[..., 0]


def draw_groups(view: View, rng: torch.Generator) -> Tensor:
    """(M, S) bool: the group of every entity, with an own p ~ U(0, 1) for each episode."""
    B, S = view.played.shape[1], view.empty.shape[1]
    p = torch.rand(B, 1, generator=rng)
    groups = torch.rand(B, S, generator=rng) < p
    return groups[view.played.nonzero()[:, 1]].to(view.empty.device)


@torch.no_grad()
def find_targets(args: Args, agent: Agent, batch: Batch, log_pi: Tensor, log_m: Tensor) -> Tensor:
    """y (K,); log_pi, log_m (M, A, actions): the present policy and its marginal."""
    view, later = batch.view, batch.later
    with agent.autocast():
        next_q = agent.target_utility(view)[0][:, later]  # (1, K, A, actions)
    log_pi, log_m = log_pi[later], log_m[later]
    if args.sample_next_actions:
        noise = torch.empty(log_pi.shape).exponential_(generator=agent.rng).log()
        u = (log_pi - noise.to(log_pi.device)).argmax(-1)
        next_q, cost = pick(next_q, u), pick((log_pi - log_m)[None], u)[0]
    else:  # the mixer is linear: the expectation of Q_tot is Q_tot of expectations
        next_q, cost = (log_pi.exp() * next_q).sum(-1), divergence(log_pi, log_m)
    with agent.autocast():
        total = agent.target_mixer(next_q, view.rows(later))[0][0]
    value = value_of(total, cost, agent.alpha) if agent.alpha else total
    return batch.rewards + args.gamma * value * ~batch.terminated


def critic_loss(
    args: Args, agent: Agent, batch: Batch, groups: Tensor | None, q: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, w (K, A), and what the loss is made of; q (V, M, A, actions), groups (M, S)."""
    step = batch.step
    chosen = pick(q[:, step], batch.actions)  # (V, K, A)
    groups = None if groups is None else groups[step]
    with agent.autocast():
        totals, w = agent.mixer(chosen, batch.view.rows(step), groups)
    # Eq. (16)
    td_loss = (totals[0] - y).square().mean()
    scalars = {"td_loss": td_loss, "q_total": totals[0].mean()}
    if groups is None:
        return td_loss, w.detach(), scalars
    # E (Q_groups - y)^2
    group_loss = (totals[1] - y).square().mean()
    weight = args.imagine_weight
    loss = (1 - weight) * td_loss + weight * group_loss
    return loss, w.detach(), scalars | {"group_loss": group_loss}


class Seen(NamedTuple):
    """What the trunks make of a minibatch."""

    q: Tensor  # (V, M, A, actions), utilities
    x: Tensor  # (V, M, A, R), what utilities and policy are read off
    own: Tensor | None  # (M, A, R), what the marginal is read off


class Living(NamedTuple):
    """The part of it that policy and marginal learn from: n agents, alive at a step of a battle."""

    q: Tensor  # (n, actions), given
    x: Tensor  # (n, R)
    star: Tensor  # (n, R), in imagined teams, given
    own: Tensor | None  # (n, R)

    def given(self) -> Living:
        """The same, for the heads to learn from alone."""
        return Living(*(x if x is None else x.detach() for x in self))


def see(agent: Agent, view: View, groups: Tensor | None, rows: Tensor) -> tuple[Seen, Living]:
    """Run the trunks; rows (n,): of (M, A), flattened."""
    star = 0 if groups is None else 1  # s*: the view of one's own group
    with agent.autocast():
        q, x, _ = agent.utility(view, groups)
        own = agent.marginal(own_state(view))[1][0] if agent.informed else None  # [0]: its one view
    of = lambda x: None if x is None else x.flatten(0, 1)[rows]  # noqa: E731
    return Seen(q, x, own), Living(of(q[0].detach()), of(x[0]), of(x[star].detach()), of(own))


def log_marginal(agent: Agent, own: Tensor | None, avail: Tensor) -> Tensor:
    """log m (..., actions) of own (..., R); 0 without a marginal."""
    if own is None:
        return torch.zeros_like(avail, dtype=torch.float32)
    return log_probabilities(agent.marginal.last(own), avail)


def move_all(args: Args, agent: Agent, loss: Tensor) -> Tensor:
    """Step utilities with the layers they share, mixer and policy; returns the first two's norm."""
    agent.policy_optimiser.zero_grad()
    norm = descend(loss, agent.learning(), agent.optimiser, args.max_grad_norm)
    nn.utils.clip_grad_norm_(agent.policy.parameters(), args.max_grad_norm)
    agent.policy_optimiser.step()
    return norm


def learn(args: Args, agent: Agent, batch: Batch, groups: Tensor | None) -> dict[str, Tensor]:
    """A step of the critic, M of marginal and policy. Returns scalars.

    Alternations but the last move the two heads, on what the trunks gave once; the last moves the
    marginal's trunk, and its policy loss goes with the critic's loss through the trunk they share.
    """
    view, literal, clip = batch.view, args.literal_blahut_arimoto, args.max_grad_norm
    present = ~view.avail[batch.step][..., 0]  # (K, A): agents that are alive
    slot = torch.arange(present.shape[1], device=present.device)
    rows = (batch.step[:, None] * len(slot) + slot)[present]  # (n,)
    avail = view.avail.flatten(0, 1)[rows]  # (n, actions)
    seen, living = see(agent, view, groups, rows)
    with torch.no_grad():
        log_pi = agent.log_policy(seen.q[0], seen.x[0], view.avail)  # (M, A, actions)
        log_m = log_marginal(agent, seen.own, view.avail)
    y = find_targets(args, agent, batch, log_pi, log_m)
    loss, w, scalars = critic_loss(args, agent, batch, groups, seen.q, y)
    w = w[present].clamp(min=1e-6)  # (n,); a softmax can underflow
    scalars |= measure(agent, view, rows, living, w)
    alpha = agent.alpha_i / w if args.alpha_i_over_w else agent.alpha_i
    if literal or args.policy == "greedy":
        scalars["grad_norm"], loss = move_all(args, agent, loss), 0.0  # the critic's
    for m in range(agent.alternations if args.policy == "head" else 0):
        whole = literal or m == agent.alternations - 1
        if literal:
            seen, living = see(agent, view, groups, rows)
        now = living if whole else living.given()
        if agent.informed:
            # Eq. (12)
            with torch.no_grad():
                log_pi = log_probabilities(agent.policy(now.star), avail)
            likelihood = marginal_loss(log_pi, log_marginal(agent, now.own, avail)).mean()
            descend(likelihood, agent.marginal, agent.marginal_optimiser, clip)
            scalars["marginal_loss"] = likelihood
        # Eq. (13)
        log_m = log_marginal(agent, now.given().own, avail)
        log_pi = log_probabilities(
            agent.policy(now.x.detach() if args.detach_actor_trunk else now.x), avail
        )
        scalars["policy_loss"] = policy_loss(log_pi, log_m, now.q, alpha).mean()
        if whole:
            norm = move_all(args, agent, loss + scalars["policy_loss"])
            scalars.setdefault("grad_norm", norm)
        else:
            descend(scalars["policy_loss"], agent.policy, agent.policy_optimiser, clip)
    return scalars


@torch.no_grad()
def measure(agent: Agent, view: View, rows: Tensor, living: Living, w: Tensor) -> dict[str, Tensor]:
    """What the method is about, over living agents: mutual information in imagined teams, also by
    type of unit, the policy's divergence from its marginal, its entropy, w and alpha / w."""
    avail = view.avail.flatten(0, 1)[rows]
    log_pi = agent.log_policy(living.q, living.x, avail)
    entropy = -divergence(log_pi, torch.zeros_like(log_pi))
    scalars = {"entropy": entropy.mean(), "w": w.mean(), "alpha_over_w": (agent.alpha / w).mean()}
    if agent.informed:
        log_m = log_marginal(agent, living.own, avail)
        scalars["kl"] = divergence(log_pi, log_m).mean()
        information = divergence(log_probabilities(agent.policy(living.star), avail), log_m)
        scalars["mi"] = information.mean()
        entities = view.entities[:, : view.avail.shape[1]].flatten(0, 1)[rows]
        for name, column in agent.types.items():
            if (of := entities[:, column] > 0).any():
                scalars[f"mi/{name}"] = information[of].mean()
    return scalars


def update(args: Args, agent: Agent, replay: Replay, rng: torch.Generator) -> dict[str, Tensor]:
    """Gradient steps on as many minibatches as follow a round of battles. Returns scalars."""
    found = collections.defaultdict(list)
    for _ in range(args.updates_per_iteration):
        batch = replay.sample(rng, args.batch_size)
        imagine = args.imagine and args.scenario != "resource"
        groups = draw_groups(batch.view, rng) if imagine else None
        for name, x in learn(args, agent, batch, groups).items():
            found[name].append(x.detach())
    return {name: torch.stack(x).mean() for name, x in found.items()}


# --- 8. Evaluate ----------------------------------------------------------------------------------


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: one line per row name."""
    battles = "win" in next(iter(results.values()))
    return (combat_episodes if battles else resource_collection).table(results)


def evaluate(
    args: Args, agent: Agent, alive: Callable, kind: str, timesteps: int, run_dir: Path
) -> dict[str, dict[str, float]]:
    """Greedy episodes of every team size; at the end, unless in the game, those of scripted
    policies in the same battles beside them.

    kind: "eval" on the way or "final", which plays other episodes; alive() is called now and then.
    Prints a table and returns {"size policy": what summarise() makes of episodes}.
    """
    world = resource_collection if args.scenario == "resource" else combat_episodes
    number = args.final_episodes if kind == "final" else args.eval_episodes
    rng = np.random.default_rng((args.seed, timesteps, ("eval", "final").index(kind)))
    seeds, results = rng.integers(2**31, size=2).tolist(), {}
    together = number if args.backend == "sim" else min(number, args.num_envs)
    policies: dict[str, Callable[[], Policy]] = {"": lambda: player(agent)}
    if kind == "final" and args.backend == "sim":
        for name, policy in world.scripted_policies(seeds[1]).items():
            policies[name] = lambda policy=policy: policy
    for size in dict.fromkeys((*args.team_sizes, *args.eval_team_sizes)):
        for name, new_policy in policies.items():
            with opened(make_envs(args, (size,), together, seeds[0], agent.device)) as battles:
                episodes = []
                while len(episodes) < number:
                    alive()
                    episodes += world.play(battles, new_policy())
                row = results[f"{size} {name}".rstrip()] = world.summarise(episodes[:number])
                if args.backend == "sc2":  # those that a failing game cut short count as not won
                    row["lost_to_failures"] = sum(battles.lost)
                    tqdm.write(f"{battles.game_version}: {sum(battles.lost)} episodes lost")
        if args.capture_video:
            film = world.film if world is resource_collection else film_battle
            with opened(make_envs(args, (size,), 1, seeds[0], agent.device)) as battles:
                battles.reset()
                path = run_dir / "videos" / f"{kind}-{timesteps}-{size}.mp4"
                film(battles, player(agent), path)
    tqdm.write(f"{args.scenario}, seed {args.seed}, step {timesteps}\n{table(results)}")
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


def save_run(run_dir: Path, state: dict[str, Any], replay: Replay) -> None:
    """Write the replay, then the checkpoint that names it; replays whose checkpoint is gone go,
    too."""
    buffer, name = io.BytesIO(), f"replay-{state['timesteps']}.pt"
    torch.save(replay.state_dict(), buffer)
    write(run_dir / name, buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    save_checkpoint(run_dir, state | {"replay": {"name": name, "sha256": sha256}})
    for path in run_dir.glob("replay-*.pt"):
        if not (run_dir / path.name.replace("replay", "checkpoint")).exists():
            path.unlink()


def load_replay(run_dir: Path, entry: dict[str, str], replay: Replay, episodes: int) -> None:
    """Put back what save_run() wrote."""
    if not (data := read_intact(run_dir, entry)):
        what = f"{run_dir / entry['name']} is damaged or missing"
        raise UsageError(f"{what}: --resume the older one of {run_dir}/checkpoint-*.pt instead.")
    replay.load_state_dict(torch.load(io.BytesIO(data), weights_only=True), episodes)


def pack(args: Args, agent: Agent, replay: Replay, ended: list, rng: torch.Generator) -> dict:
    """What a checkpoint holds but for the replay; RunError if a weight is not finite."""
    for name, part in agent.parts().items():
        if isinstance(part, nn.Module):
            check_finite(**{f"{name}.{key}": x for key, x in part.state_dict().items()})
    parts = {name: part.state_dict() for name, part in agent.parts().items()}
    about = {"script": Path(__file__).stem, "args": dataclasses.asdict(args), "agent": parts}
    rngs = {"rng": rng.get_state(), "method": agent.rng.get_state()}
    about |= {"rngs": rngs, "episodes": replay.episodes}
    return about | {"battles": replay.battles.state_dict(), "ended": [tuple(e) for e in ended]}


def unpack(
    saved: dict[str, Any], agent: Agent, replay: Replay, ended: list, rng: torch.Generator
) -> None:
    """Put battles, generators and episodes where the checkpoint left them."""
    rng.set_state(saved["rngs"]["rng"])
    agent.rng.set_state(saved["rngs"]["method"])
    replay.battles.load_state_dict(saved["battles"])
    ended += [replay.battles.Episode(*e) for e in saved["ended"]]


def report(scalars: dict[str, list], ended: list, seconds: float, steps: int) -> dict:
    """What a line of metrics.jsonl holds, from here back to the last."""
    figures = {name: float(torch.stack(x).mean()) for name, x in scalars.items()}
    check_finite(**{name: torch.tensor(x) for name, x in figures.items()})
    by_size = collections.defaultdict(list)
    for episode in ended:
        by_size[""].append(episode)
        by_size[f"/{sum(episode.team)}"].append(episode)
    for size, played in sorted(by_size.items()):
        figures[f"return{size}"] = sum(e.reward for e in played) / len(played)
        if hasattr(played[0], "won"):
            figures[f"win{size}"] = sum(e.won for e in played) / len(played)
    if ended:
        figures["length"] = sum(e.length for e in ended) / len(ended)
    figures |= {"episodes": len(ended), "sps": steps / seconds}
    scalars.clear()
    ended.clear()
    return figures


def load_source(args: Args, source: str) -> tuple[dict[str, Any], Path | None]:
    """The checkpoint and directory of --resume or --eval-only; UsageError if it is of another
    backend, or version of the game, and to be gone on with."""
    saved, run_dir = load_checkpoint(source) if source else ({}, None)
    for name in ("backend", "game_version") if args.resume else ():
        if getattr(args, name) != (own := saved["args"].get(name, "")):
            raise UsageError(f"{source} is a run with --{name.replace('_', '-')} {own or 'unset'}.")
    return saved, run_dir


def conclude(run_dir: Path, about: dict[str, float], results: dict[str, dict]) -> None:
    """summary.json."""
    write(run_dir / "summary.json", json.dumps(about | {"eval": results}, indent=1).encode())


def train(args: Args) -> dict[str, dict[str, float]]:
    """The run, with --resume from its checkpoint on; returns the last evaluation."""
    (_, _, device), source = start_processes(args), args.resume or args.eval_only
    saved, run_dir = load_source(args, source)
    iteration, timesteps = saved.get("iteration", 0), saved.get("timesteps", 0)
    began = time.monotonic() - saved.get("wall_s", 0)
    with contextlib.ExitStack() as stack:
        new = make_envs(args, args.team_sizes, args.num_envs, args.seed, device)
        battles = stack.enter_context(opened(new))
        agent, ended = Agent(args, battles.family, device), []
        if saved:
            restore(agent.parts(), saved["agent"], source)
        stop: list[int] = []  # signals that asked for it

        def alive() -> None:
            if stop:
                raise KeyboardInterrupt

        judge = functools.partial(evaluate, args, agent, alive)
        if args.eval_only:
            return judge("final", timesteps, run_dir)
        replay, rng = Replay(args, battles, device), torch.Generator().manual_seed(args.seed)
        if saved:
            unpack(saved, agent, replay, ended, rng)
            load_replay(run_dir, saved["replay"], replay, saved["episodes"])
        about = {"amp": agent.amp, "game_version": getattr(battles, "game_version", None)}
        about |= {"alpha": agent.alpha, "alpha_i": agent.alpha_i}
        about |= {"ba_iterations": agent.alternations}
        run_dir = run_dir or new_run_dir(args, args.scenario, device=str(device), **about)
        logger = stack.enter_context(contextlib.closing(Logger(args, run_dir, timesteps)))
        scalars, clock = collections.defaultdict(list), (time.monotonic(), timesteps)
        saved_at = timesteps if saved else -1

        def save() -> None:
            nonlocal saved_at
            if timesteps != saved_at:
                state = pack(args, agent, replay, ended, rng)
                state |= {"iteration": iteration, "timesteps": timesteps}
                save_run(run_dir, state | {"wall_s": time.monotonic() - began}, replay)
            saved_at = timesteps

        if not saved:
            save()
        bar = progress_bar(timesteps, args.total_timesteps, 0)
        signals = stack.enter_context(stop_signals(stop))
        while timesteps < args.total_timesteps and not stop:
            epsilon, episodes = epsilon_at(args, timesteps), replay.episodes
            try:
                played = collect(agent, replay, epsilon, rng)
            except BattleError:  # the game; what has been learned is kept
                save()
                raise
            ended += played
            if replay.size >= args.batch_size:
                for name, x in update(args, agent, replay, rng).items():
                    scalars[name].append(x)
            if is_due(args.target_every, episodes, replay.episodes):
                agent.copy_to_targets()
            iteration, before = iteration + 1, timesteps
            timesteps += sum(episode.length for episode in played)
            bar.update(timesteps - before)
            if is_due(args.log_every, before, timesteps):
                now = time.monotonic()
                figures = report(scalars, ended, now - clock[0], timesteps - clock[1])
                logger.log(timesteps, figures | {"epsilon": epsilon, "wall_s": now - began})
                clock = now, timesteps
            if is_due(args.save_every, before, timesteps):
                save()
            if is_due(args.eval_every, before, timesteps):
                if args.backend == "sc2":  # evaluations have games of their own
                    save()
                    battles.close()
                with contextlib.suppress(KeyboardInterrupt):
                    logger.log_results(timesteps, "eval", judge("eval", timesteps, run_dir))
        save()
        if stop or not args.final_episodes:
            return {}
        signals()  # from here on Ctrl-C ends the run at once
        if args.backend == "sc2":
            battles.close()
        results = judge("final", timesteps, run_dir)
        logger.log_results(timesteps, "final", results)
        conclude(run_dir, {"timesteps": timesteps, "wall_s": time.monotonic() - began}, results)
        return results


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        train(read_args(with_preset(sys.argv[1:] if argv is None else argv)))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
