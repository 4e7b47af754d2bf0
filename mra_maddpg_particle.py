"""MRA (TMLR): meta representations that generalise to populations never met in training.

A latent z picks one of six graphs g = phi(o, z) of whom an agent attends to. One policy theta
learns to act well with all of them, in all populations; phi is moved to make graphs matter for
actions, p_psi(z|m) to make them tell populations apart. An unseen population gets a mixture.

    L(zeta)    = E (Q(o, a, g) - y)^2,  y = r + gamma Q'(o', a', g'),  a' ~ pi'           Eq. (8)
    dJ(theta)  = E grad log pi(a_i | o_i, g_i) Q(o, a, g)                                 Eq. (9)
    I(g; a|o)  >= E log pi'(a | o, g) / p(a | o),  p(a | o) = E_z pi'(a | o, phi(o, z))   Eq. (11)
    L(psi, xi) = E_z~p_psi(z|m) [- log p_xi(m | o, phi(o, z))]                            Eq. (13)

    python mra_maddpg_particle.py --task resource --populations 6 9 12 --preset fast
    python mra_maddpg_particle.py --adapt runs/RUN --population 24            or 2,8 for two types
    python mra_maddpg_particle.py --resume runs/RUN --total-timesteps 2000000
    python mra_maddpg_particle.py --eval-only runs/RUN --eval-populations 3 7 10 13 18 24

Letters: B worlds, N agents, A actions, M transitions of a minibatch, H hidden units, S parameter
sets, Z latents, Ds De features of oneself and of others. What the paper leaves open is decided in
docs/mra.md; the worlds: docs/particle.md. The parent is baselines/maddpg_particle.py.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import ctypes
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

from envs.particle.episodes import Player, play, read_population, scripted_players, summarise, table
from envs.particle.worlds import Compiled, Game, Observation, ParticleWorld, Step

Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Count = Annotated[int, Interval(ge=0)]
Positive = Annotated[int, Interval(ge=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
Above = Annotated[float, Interval(gt=0, lt=math.inf)]


# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """MRA in particle worlds. Defaults are the paper's."""

    # Run
    seed: Seed = 1  # fixes everything that is drawn
    total_timesteps: Positive = 1_000_000  # environment steps of all worlds
    run_dir: str = ""  # default: runs/{world}__{script}__s{seed}__{UTC time}__{4 hex}
    resume: str = ""  # run directory to go on with; its own arguments hold
    eval_only: str = ""  # run directory or checkpoint to evaluate, without training
    preset: Literal["paper", "fast"] = "paper"  # fast: for CPUs; other flags override it
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "unseen"  # project there
    wandb_mode: Literal["online", "offline"] = "online"  # offline: `wandb sync` later
    wandb_timeout: Above = 10.0  # seconds until an unreachable server is given up
    capture_video: bool = False  # an MP4 with every evaluation
    # Environment
    task: str = "treasure"  # treasure, resource or pacman
    populations: tuple[str, ...] = ("3", "6", "12", "24")  # m; in pacman 4,2 6,3 8,4
    adapt: str = ""  # run directory or checkpoint to adapt to --population (Algorithm 5)
    population: str = ""  # that population
    shaping: bool = True  # treasure, pacman: -.1 x distance to what one wants
    collision_penalty: Amount = 0.0  # treasure: per agent touched
    num_envs: Positive = 12  # B, worlds
    max_episode_steps: Positive = 20  # horizon
    # Method
    latent_size: Positive = 6  # Z
    representation: Literal["option", "concat", "bilinear"] = "option"  # how phi reads z
    latent_prior: Literal["learned", "uniform"] = "learned"  # p(z|m); uniform: uni-MRA
    prior_floor: Share = 0.0  # of p(z|m), shared by all z; not in the paper, see docs/mra.md
    mi_samples: Count = 0  # z' of Eq. (11), with sampled actions; 0: exact expectations
    latent_gradient: Literal["exact", "gumbel"] = "exact"  # of psi in Eq. (13)
    reptile_step: Share = 1.0  # alpha
    parallel_populations: bool = False  # Reptile over all populations at once, instead of in turn
    share_parameters: bool = True  # one parameter set per type instead of per agent
    actor_gradient: Literal["gumbel", "expectation"] = "expectation"  # of Eq. (9): how
    phi_gradient: Literal["actor", "mi"] = "mi"  # phi learns by Eq. (10) / Eq. (11)
    target: Literal["polyak", "hard"] = "hard"  # how delayed networks follow
    polyak: Share = 0.01  # their step, with --target polyak
    inner_steps: Positive = 10  # K, minibatches per update
    hidden_size: Positive = 64  # H
    key_size: Positive = 16  # of queries and keys
    head_gain: Above = 2.0  # of the weights that queries and keys begin with (Xavier)
    # Base algorithm
    learning_rate: Amount = 3e-4  # Adam
    phi_learning_rate: Amount = 3e-4  # phi's
    gamma: Share = 0.95  # discount
    batch_size: Positive = 1024  # M, transitions of a minibatch
    buffer_size: Positive = 1_000_000  # transitions of a replay
    update_every: Positive = 100  # environment steps between updates
    entropy_coef: Amount = 1 / 30  # of targets and actor
    scale_rewards: bool = True  # divide by their running standard deviation
    max_grad_norm: Above = 10.0  # of each loss's networks together
    # Evaluation and checkpoints (every: environment steps, 0 for never)
    log_every: Positive = 10_000  # lines of metrics.jsonl
    eval_every: Count = 100_000  # evaluations on the way
    eval_episodes: Positive = 100  # in those
    eval_populations: tuple[str, ...] = ()  # unseen ones, zero-shot, in the final evaluation
    final_episodes: Count = 1000  # at the end and with --eval-only
    save_every: Count = 200_000  # checkpoints; the last two are kept
    # System
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    num_threads: Positive = 1  # torch's; on a busy machine more is slower
    compile: bool = False  # compile pair kernels (once, some 20 s) and, on a GPU, worlds


PRESETS = {  # flags that come before those of the command line
    "paper": "",
    "fast": "--num-envs 64 --learning-rate 1e-3 --batch-size 512 --update-every 256 "
    "--target polyak --polyak .02 --inner-steps 4 --compile",
}


def validate(args: Args) -> None:
    """Raise UsageError for combinations that cannot be meant."""
    for wrong, sentence in (
        (args.resume and args.eval_only, "--resume and --eval-only exclude each other"),
        (args.resume and args.run_dir, "--resume goes on in its own directory, without --run-dir"),
        (args.eval_only and not args.final_episodes, "--eval-only needs --final-episodes"),
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (bool(args.adapt) != bool(args.population), "--adapt and --population need each other"),
        (len(set(args.populations)) < len(args.populations), "--populations has one twice"),
        (not args.populations, "--populations is empty"),
        (
            args.parallel_populations and (args.phi_gradient != "mi" or len(args.populations) < 2),
            "--parallel-populations needs several populations and --phi-gradient mi",
        ),
        (
            not args.share_parameters and len(args.populations) + len(args.eval_populations) > 1,
            "Several populations need --share-parameters",
        ),
        (
            args.phi_gradient == "actor" and args.mi_samples,
            "--mi-samples is for --phi-gradient mi",
        ),
        ("WORLD_SIZE" in os.environ, "This script is one process: worlds are batched instead"),
    ):
        if wrong:
            raise UsageError(f"{sentence}.")


LINE = ("return", "critic_loss", "entropy", "sps")  # scalars on standard output, without a terminal
RESUMABLE = (  # what may differ from the run's own arguments with --resume and --eval-only
    *("total_timesteps", "run_dir", "resume", "eval_only", "track", "wandb_project", "wandb_mode"),
    *("wandb_timeout", "capture_video", "log_every", "eval_every", "eval_episodes"),
    *("final_episodes", "eval_populations", "save_every", "device", "num_threads", "compile"),
)


def with_preset(argv: list[str]) -> list[str]:
    """The flags of --preset, then argv, whose flags override them."""
    name = re.search(r"--preset[= ](\w+)", " ".join(argv))
    return PRESETS.get(name[1] if name else "paper", "").split() + argv


def inherit(args: Args, argv: list[str]) -> Args:
    """With --adapt, the flags of the run that is adapted hold where nothing else is typed."""
    if not args.adapt or args.resume or args.eval_only:
        return args
    saved = load_checkpoint(args.adapt, quiet=True)[0]
    own, script = saved["args"], Path(__file__).stem
    if saved["script"] != script:
        raise UsageError(f"{args.adapt} is a run of {saved['script']}.py, not of {script}.py.")
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv}
    if "task" in typed and args.task != own["task"]:
        raise UsageError(f"{args.adapt} is a run of {own['task']}, not of {args.task}.")
    if not own["share_parameters"]:
        raise UsageError(f"{args.adapt} has parameters per agent, which fit no other population.")
    fixed = {"populations", "latent_size", "representation", "latent_prior", "hidden_size"}
    fixed |= {"key_size", "share_parameters"}
    typed |= {"no_" + name for name in typed} | {name.removeprefix("no_") for name in typed}
    for name in typed & fixed:
        given = getattr(args, name)
        if given not in (own[name], tuple(own[name]) if name == "populations" else None):
            raise UsageError(f"--{name.replace('_', '-')} is {own[name]} in {args.adapt}.")
    idle = {"phi_gradient", "mi_samples", "latent_gradient", "reptile_step"}
    for name in typed & (idle | {"parallel_populations"}):
        raise UsageError(f"--{name.replace('_', '-')} has no part in --adapt.")
    other = {*RESUMABLE, *typed, "seed", "adapt", "population", "preset", "phi_gradient"}
    kept = {k: tuple(x) if isinstance(x, list) else x for k, x in own.items() if k not in other}
    kept |= {"phi_gradient": "actor", "mi_samples": 0, "parallel_populations": False}
    kept["compile"] = args.compile or own["compile"]
    args = dataclasses.replace(args, **kept)
    validate(args)
    return args


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


def make_envs(args: Args, population: str, num_envs: int, seed: int) -> ParticleWorld:
    """num_envs worlds of args.task at a population; UsageError if it cannot have that."""
    options = {"shaping": args.shaping, "collision_penalty": args.collision_penalty}
    options |= {"horizon": args.max_episode_steps, "seed": seed}
    cuda = args.device != "cpu" and torch.cuda.is_available()  # on a CPU updates take the time
    options |= {"device": "cuda" if cuda else "cpu", "compiled": args.compile and cuda}
    try:
        return ParticleWorld(args.task, read_population(population), num_envs, **options)
    except ValueError as error:
        raise UsageError(str(error)) from None


# --- 4. Networks ----------------------------------------------------------------------------------

RELU = math.sqrt(2)  # gain of layers before a ReLU


class View(NamedTuple):
    """What M x N agents observe."""

    own: Tensor  # (M, N, Ds) o_s
    others: Tensor  # (M, N, De) of each agent j; o_ij is that with p_j - p_i in the place of p_j
    alive: Tensor  # (M, N) bool
    mask: Tensor  # (M, N, N) bool: j lives and is not i
    counts: tuple[int, ...]  # agents of each parameter set, in order
    z: Tensor  # (M, N, Z) latents, one-hot

    @property
    def position(self) -> Tensor:
        return self.others[..., :2]


def apply(weight: Tensor, bias: Tensor | None, x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """x (..., N, I) by the matrix of each agent's parameter set, weight (S, I, O)."""
    bias = x.new_zeros(len(weight), 1) if bias is None else bias
    if len(weight) == 1:
        return x @ weight[0] + bias[0]
    if len(weight) == x.shape[-2]:
        return torch.einsum("...ni,nio->...no", x, weight) + bias
    parts = zip(x.split(counts, -2), weight, bias)
    return torch.cat([part @ w + b for part, w, b in parts], -2)


class Linear(nn.Module):
    """A linear layer per parameter set."""

    def __init__(self, sets: int, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sets, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(sets, outputs))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight, gain)

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:  # (..., N, I) -> (..., N, O)
        return apply(self.weight, self.bias, x, counts)


class MLP(nn.Module):
    """Two layers per parameter set."""

    def __init__(self, sets: int, inputs: int, hidden: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.first = Linear(sets, inputs, hidden, RELU)
        self.last = Linear(sets, hidden, outputs, gain)

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        return self.last(F.relu(self.first(x, counts)), counts)


# A network of o_ij = [p_j - p_i, v_j, ...] has N^2 inputs. But its first layer is linear and gives
# a_j - b_i, with a_j = W [p_j, v_j, ...] + c and b_i = W_p p_i: N of each. And its second is given
# to the query (of keys) or comes after the sum over j (of values, as sum_j g_ij = 1). What is left
# for pairs are two sums, which --compile makes single loops.


def pair_scores(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """u_i . relu(a_j - b_i): u, b (M, n, H), a (M, 1 or n, N, H) -> (M, n, N)."""
    return (u[:, :, None] * F.relu(a - b[:, :, None])).sum(-1)


def pair_sums(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_j g_ij relu(a_j - b_i): g (M, n, N), a (M, 1 or n, N, H), b (M, n, H) -> (M, n, H)."""
    return (g[..., None] * F.relu(a - b[:, :, None])).sum(2)


def pair_gradients(g: Tensor, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of sum_ij g_ij u_i . relu(a_j - b_i) for a and b."""
    x = torch.where(a > b[:, :, None], g[..., None] * u[:, :, None], 0.0)
    return x.sum(1, keepdim=True) if a.shape[1] == 1 else x, -x.sum(2)


class Pairs(torch.autograd.Function):
    """pair_scores or pair_sums of x, without keeping N^2 H numbers for the gradient. Each is the
    other's gradient for x."""

    @staticmethod
    def forward(ctx, function: Callable, compiled: bool, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scores, ctx.compiled = function is pair_scores, compiled
        return kernel(function, compiled)(x, a, b)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, b), d, of_x, of_ab = ctx.saved_tensors, d.contiguous(), None, (None, None)
        if ctx.needs_input_grad[2]:
            of_x = kernel(pair_sums if ctx.scores else pair_scores, ctx.compiled)(d, a, b)
        if any(ctx.needs_input_grad[3:]):
            g, u = (d, x) if ctx.scores else (x, d)
            of_ab = kernel(pair_gradients, ctx.compiled)(g, u, a, b)
        return None, None, of_x, *of_ab


@functools.cache
def kernel(function: Callable, compiled: bool) -> Callable:
    """The function itself or a compiled form for all sizes."""
    if not compiled:
        return function
    return Compiled(function, function.__name__, dynamic=True)


class PairLayer(nn.Module):
    """First layer of a network of o_ij, and how its second is summed up."""

    def __init__(self, sets: int, inputs: int, hidden: int, compiled: bool):
        super().__init__()
        self.linear, self.compiled = Linear(sets, inputs, hidden, RELU), compiled

    def terms(self, others: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """a (M, S, N, H) and b (M, N, H) of others (M, N, De), seen from view.position."""
        weight = self.linear.weight
        a = torch.einsum("mjd,sdh->msjh", others, weight) + self.linear.bias[:, None]
        return a, apply(weight[:, :2], None, view.position, view.counts)

    def forward(self, function: Callable, x: Tensor, a: Tensor, b: Tensor, view: View) -> Tensor:
        """pair_scores or pair_sums of x (M, N, .), with a and b from terms()."""
        if a.shape[1] in (1, x.shape[1]):
            return Pairs.apply(function, self.compiled, x, a, b)
        parts = zip(x.split(view.counts, 1), a.split(1, 1), b.split(view.counts, 1))
        return torch.cat([Pairs.apply(function, self.compiled, *part) for part in parts], 1)


class LatentPairLayer(PairLayer):
    """The same of o_ij with z_i appended (concat) or of their outer product (bilinear)."""

    def __init__(self, sets: int, inputs: int, hidden: int, args: Args):
        super().__init__(sets, inputs, hidden, args.compile)
        self.how, self.latents = args.representation, args.latent_size
        if self.how == "concat":
            self.of_z = Linear(sets, self.latents, hidden, RELU)
        if self.how == "bilinear":  # W_z instead of W
            self.linear = Linear(sets * self.latents, inputs, hidden, RELU)

    def terms(self, others: Tensor, view: View) -> tuple[Tensor, Tensor]:
        if self.how == "bilinear":
            repeats = torch.tensor(view.counts, device=others.device)
            weight = self.linear.weight.unflatten(0, (-1, self.latents))
            weight = weight.repeat_interleave(repeats, 0)  # (N, Z, De, H)
            weight = torch.einsum("mnz,nzdh->mndh", view.z, weight)
            bias = self.linear.bias.unflatten(0, (-1, self.latents)).repeat_interleave(repeats, 0)
            a = torch.einsum("mjd,mndh->mnjh", others, weight)
            b = torch.einsum("mnd,mndh->mnh", view.position, weight[:, :, :2])
            return a, b - torch.einsum("mnz,nzh->mnh", view.z, bias)
        a, b = super().terms(others, view)
        return a, b - self.of_z(view.z, view.counts) if self.how == "concat" else b


class Relations(nn.Module):
    """phi: whom an agent attends to. With --representation option z picks a head (Sec. 4.2)."""

    def __init__(self, sets: int, own: int, entity: int, args: Args):
        super().__init__()
        hidden, self.key_size, self.how = args.hidden_size, args.key_size, args.representation
        Z = args.latent_size
        own = {"option": own, "concat": own + Z, "bilinear": own * Z}[self.how]
        self.heads = Z if self.how == "option" else 1
        self.own = Linear(sets, own, hidden, RELU)
        self.query = Linear(sets * self.heads, hidden, args.key_size, args.head_gain)
        self.pair = LatentPairLayer(sets, entity, hidden, args)
        self.key = Linear(sets * self.heads, hidden, args.key_size, args.head_gain)

    def queries(self, view: View) -> Tensor:
        """q of each head (M, N, heads, key)."""
        own, latents = view.own, view.z
        if self.how == "concat":
            own = torch.cat((own, latents), -1)
        if self.how == "bilinear":
            own = (own[..., None] * latents[..., None, :]).flatten(-2)
        weight = self.query.weight.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        bias = self.query.bias.unflatten(0, (-1, self.heads)).flatten(1)
        query = apply(weight, bias, F.relu(self.own(own, view.counts)), view.counts)
        return query.unflatten(-1, (self.heads, -1))

    def graph(self, u: Tensor, a: Tensor, b: Tensor, view: View) -> Tensor:
        """Row i (M, N, N) sums to 1, to 0 where nobody else lives."""
        # Eq. (1)
        scores = self.pair(pair_scores, u, a, b, view) / math.sqrt(self.key_size)
        return scores.masked_fill(~view.mask, -1e9).softmax(-1) * view.mask

    def forward(self, view: View) -> Tensor:
        """The graph g (M, N, N) of view.z."""
        query = self.queries(view)
        if self.heads > 1:  # what is not of one's head is 0; mixtures of heads mix their scores
            query = query * view.z[..., None]
        weight = self.key.weight.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        u = apply(weight.mT, None, query.flatten(-2), view.counts)  # (M, N, H)
        return self.graph(u, *self.pair.terms(view.others, view), view)

    def all(self, view: View) -> Tensor:
        """The graphs (Z, M, N, N) that there are with each z for everybody."""
        if self.heads == 1:
            eye = torch.eye(view.z.shape[-1], device=view.z.device, dtype=view.z.dtype)
            return torch.stack([self(view._replace(z=z.expand_as(view.z))) for z in eye])
        keys = self.key.weight.unflatten(0, (-1, self.heads)).unbind(1)
        pairs, queries = self.pair.terms(view.others, view), self.queries(view).unbind(2)
        us = (apply(w.mT, None, q, view.counts) for w, q in zip(keys, queries))
        return torch.stack([self.graph(u, *pairs, view) for u in us])


class Readout(nn.Module):
    """theta, zeta or xi: layers above o_s and e_i = sum_j g_ij V(o_ij), 0 without others."""

    def __init__(self, sets: int, own: int, entity: int, outputs: int, gain: float, args: Args):
        super().__init__()
        hidden = args.hidden_size
        self.own = MLP(sets, own, hidden, hidden)
        self.pair = PairLayer(sets, entity, hidden, args.compile)
        self.value = Linear(sets, hidden, hidden)
        self.out = Linear(sets, hidden, outputs, gain)

    def forward(self, view: View, g: Tensor, actions: Tensor | None = None) -> Tensor:
        """Outputs (..., M, N, .) for graphs g (..., M, N, N); a critic reads the others' actions
        (M, N)."""
        others = view.others
        if actions is not None:  # agent i's own are not in any o_ij, as g_ii = 0
            others = torch.cat((others, F.one_hot(actions, NUM_ACTIONS).to(others.dtype)), -1)
        x, (a, b) = self.own(view.own, view.counts), self.pair.terms(others, view)

        def read(g: Tensor) -> Tensor:
            e = self.value(self.pair(pair_sums, g, a, b, view), view.counts)
            e = e * view.mask.any(-1, keepdim=True)
            return self.out(F.relu(x + e), view.counts)

        return read(g) if g.dim() == 3 else torch.stack([read(each) for each in g])


NUM_ACTIONS = 5  # A


def sample(log_probs: Tensor, rng: torch.Generator) -> Tensor:
    """Actions (...) from log-probabilities (..., A): the largest after adding Gumbel noise."""
    return (log_probs + gumbel(log_probs, rng)).argmax(-1)


def gumbel(like: Tensor, rng: torch.Generator) -> Tensor:
    return -torch.empty(like.shape).exponential_(generator=rng).log().to(like.device)


class Prior(nn.Module):
    """psi: p(z|m) for each type of agent, from numbers of agents only, so for every population."""

    def __init__(self, types: int, latents: int):
        super().__init__()
        self.types = types
        self.net = nn.Sequential(nn.Linear(types, 32), nn.ReLU(), nn.Linear(32, types * latents))

    def forward(self, population: tuple[int, ...]) -> Tensor:
        """log p(z|m) (types, Z)."""
        counts = self.net[0].weight.new_tensor(population) / 10
        return self.net(counts).unflatten(0, (self.types, -1)).log_softmax(-1)


class Agent:
    """The networks and their optimisers."""

    def __init__(self, args: Args, game: Game, device: torch.device):
        self.args, self.device = args, device
        self.sets = len(game.population) if args.share_parameters else game.num_agents
        own, entity = game.own_features, game.entity_features
        torch.manual_seed(args.seed)
        self.phi = Relations(self.sets, own, entity, args).to(device)
        # Small first logits: all actions are tried.
        self.theta = Readout(self.sets, own, entity, NUM_ACTIONS, 0.1, args).to(device)
        critic = (self.sets, own, entity + NUM_ACTIONS, NUM_ACTIONS, 1.0, args)
        self.zeta = Readout(*critic).to(device)
        self.delayed_theta, self.delayed_zeta = copy.deepcopy((self.theta, self.zeta))
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        phi = {"params": self.phi.parameters(), "lr": args.phi_learning_rate}
        self.actor_optimiser = adam([{"params": self.theta.parameters()}, phi])
        self.critic_optimiser = adam(self.zeta.parameters())
        types, number = len(game.population), len(args.populations)
        if number > 1 and args.latent_prior == "learned":
            self.psi = Prior(types, args.latent_size).to(device)
            self.xi = Readout(self.sets, own, entity, number, 1.0, args).to(device)
            self.latent_optimiser = adam([*self.psi.parameters(), *self.xi.parameters()])
        if args.parallel_populations:
            self.copies = nn.ModuleList(copy.deepcopy(self.theta) for _ in range(number))
            self.copies_optimiser = adam(self.copies.parameters())

    def log_prior(self, game: Game) -> Tensor:
        """log p(z|m) (N, Z)."""
        uniform = torch.zeros(len(game.population), self.args.latent_size, device=self.device)
        log_p = self.psi(game.population) if hasattr(self, "psi") else uniform.log_softmax(-1)
        if floor := self.args.prior_floor:
            log_p = ((1 - floor) * log_p.exp() + floor / self.args.latent_size).log()
        return log_p.repeat_interleave(torch.tensor(game.population, device=self.device), 0)

    def look(self, game: Game, obs: Observation, z: Tensor) -> View:
        """An observation, and latents (M, N), as networks read them."""
        counts = game.population if self.args.share_parameters else (1,) * game.num_agents
        own, others = (x.to(torch.float32).contiguous() for x in obs[:2])
        z = F.one_hot(z.long(), self.args.latent_size).to(own.dtype)
        return View(own, others, obs.alive.contiguous(), obs.mask(), counts, z)

    def follow(self) -> None:
        """Delayed networks take a step, or jump, towards the others."""
        step = self.args.polyak if self.args.target == "polyak" else 1.0
        for slow, fast in ((self.delayed_theta, self.theta), (self.delayed_zeta, self.zeta)):
            with torch.no_grad():
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), step)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}


# --- 5. The paper ---------------------------------------------------------------------------------


def draw_latents(agent: Agent, game: Game, shape: tuple[int, ...], rng) -> Tensor:
    """z ~ p_psi(z|m) for each agent: shape (..., N)."""
    log_p = agent.log_prior(game).detach()
    return sample(log_p.expand(*shape, *log_p.shape), rng)


@contextlib.contextmanager
def frozen(*nets: nn.Module) -> Iterator[None]:
    """Gradients pass through these networks without reaching their weights."""
    parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def graph_information(agent: Agent, view: View, log_prior: Tensor) -> Tensor:
    """The bound on I(g; a|o) in nats (M, N), all expectations exact; log_prior (N, Z)."""
    g = agent.phi.all(view)  # (Z, M, N, N)
    log_pi = agent.theta(view, g).log_softmax(-1)  # (Z, M, N, A)
    log_bar = agent.delayed_theta(view, g).log_softmax(-1)
    log_prior = log_prior.T[:, None, :, None]
    log_p = (log_bar + log_prior).logsumexp(0)  # p(a|o)
    # Eq. (11)
    return (log_prior.exp() * log_pi.exp() * (log_bar - log_p)).sum((0, -1))


def sampled_graph_information(agent: Agent, view: View, log_prior: Tensor, rng) -> Tensor:
    """The same (M, N) with one z, one action and --mi-samples z' drawn; for its gradient."""

    def draw() -> View:
        z = sample(log_prior.expand(*view.alive.shape, -1), rng)
        return view._replace(z=F.one_hot(z, log_prior.shape[-1]).to(view.z.dtype))

    bars = []
    for _ in range(agent.args.mi_samples):
        seen = draw()
        bars.append(agent.delayed_theta(seen, agent.phi(seen)).log_softmax(-1))
    log_p = torch.stack(bars).logsumexp(0) - math.log(len(bars))
    seen = draw()
    g = agent.phi(seen)
    log_pi = agent.theta(seen, g).log_softmax(-1)
    actions = sample(log_pi.detach(), rng)
    # Eq. (11)
    gain = pick(agent.delayed_theta(seen, g).log_softmax(-1) - log_p, actions)
    # paper and code differ: the code lacks the score function, without which the mean is wrong
    log_prob = pick(log_pi, actions)
    return gain + gain.detach() * (log_prob - log_prob.detach())


def phi_loss(args: Args, agent: Agent, view: View, log_prior: Tensor, rng) -> tuple[Tensor, ...]:
    """Minus Eq. (11) and the bound's value."""
    if args.mi_samples:
        information = sampled_graph_information(agent, view, log_prior, rng)
    else:
        information = graph_information(agent, view, log_prior)
    information = mean(information, view.alive)
    return -information, information


def population_loss(args: Args, agent: Agent, view: View, log_prior, label: int, rng) -> Tensor:
    """Cross-entropy of xi's guess of the population, of which label is the index; phi is given."""
    if args.latent_gradient == "gumbel":  # straight through
        soft = (log_prior + gumbel(view.z, rng)).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1])
        g, weight = agent.phi(view._replace(z=hard + soft - soft.detach()))[None], 1.0
    else:
        g, weight = agent.phi.all(view), log_prior.exp().T[:, None]
    surprise = -agent.xi(view, g).log_softmax(-1)[..., label]  # (1 or Z, M, N)
    loss = (weight * surprise).sum(0)
    # Eq. (13)
    return mean(loss, view.alive)


# --- 6. Data --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A minibatch."""

    view: View  # o
    next_view: View  # o', at the end of the step
    actions: Tensor  # (M, N) int64
    rewards: Tensor  # (M, N) float32, divided by their running deviation
    terminated: Tensor  # (M,) bool


class Arena:
    """A population: its worlds, its replay, and how large its rewards are.

    The replay keeps states of worlds; observations, graphs and all that follows are made again."""

    def __init__(self, args: Args, population: str, device: torch.device):
        self.args, self.name, self.device = args, population, device
        self.world = make_envs(args, population, args.num_envs, args.seed)
        self.game, self.steps = self.world.game, 0  # environment steps
        N, S = self.game.num_agents, self.game.state_size
        rows = {
            "state": ((S,), torch.float32),
            "final_state": ((S,), torch.float32),  # at the end of the step
            "actions": ((N,), torch.int8),
            "rewards": ((N,), torch.float32),  # raw
            "terminated": ((), torch.bool),
            "z": ((N,), torch.int8),
        }
        self.replay = {
            name: torch.empty(args.buffer_size, *shape, dtype=kind, device=device)
            for name, (shape, kind) in rows.items()
        }
        kinds = len(self.game.population)
        self.numbers = {
            # 1, r, r^2, summed over living agents of each type:
            "rewards": torch.zeros(3, kinds, dtype=torch.float64, device=device),
            "returns": torch.zeros(args.num_envs, N, device=device),  # of running episodes
            "ended": torch.zeros(1 + kinds, device=device),  # episodes, their returns by type
            "z": torch.zeros(args.num_envs, N, dtype=torch.int64, device=device),
        }
        self.world.reset()

    @property
    def size(self) -> int:
        return min(self.steps, self.args.buffer_size)

    def by_type(self, x: Tensor) -> Tensor:  # (..., N) -> (types,) sums
        return torch.stack([part.sum() for part in x.split(self.game.population, -1)])

    def add(self, state: Tensor, alive: Tensor, actions: Tensor, step: Step) -> None:
        """Store a step of all worlds."""
        z = self.numbers["z"]
        row = (state, step.final_state, actions, step.reward, step.terminated, z)
        first = self.steps % self.args.buffer_size
        place = torch.arange(first, first + len(state), device=self.device) % self.args.buffer_size
        for x, new in zip(self.replay.values(), row):
            x[place] = new.to(x.dtype)
        numbers, r = self.numbers, (step.reward * alive).double()
        numbers["rewards"] += torch.stack([self.by_type(x) for x in (alive.double(), r, r * r)])
        ended = step.terminated | step.truncated
        returns = numbers["returns"] + step.reward
        numbers["ended"][0] += ended.sum()
        numbers["ended"][1:] += self.by_type(returns * ended[:, None])
        numbers["returns"] = returns * ~ended[:, None]
        self.steps += len(state)

    def deviation(self) -> Tensor:
        """(N,): what the rewards of each agent are divided by, at least .01."""
        # paper is silent: no mean is taken off, games that end early would change
        count, total, square = self.numbers["rewards"]
        std = (square / count - (total / count) ** 2).clamp(min=0).sqrt().clamp(min=0.01)
        std = std.float() if self.args.scale_rewards else torch.ones_like(std).float()
        return torch.cat([x.expand(n) for x, n in zip(std, self.game.population)])

    def sample(self, agent: Agent, rng: torch.Generator, size: int) -> Batch:
        """size transitions of the replay, with replacement."""
        index = torch.randint(0, self.size, (size,), generator=rng).to(self.device)
        row = {name: x[index] for name, x in self.replay.items()}
        look = lambda x: agent.look(self.game, self.world.observe(x), row["z"])  # noqa: E731
        rewards = row["rewards"] / self.deviation()
        states = look(row["state"]), look(row["final_state"])
        return Batch(*states, row["actions"].long(), rewards, row["terminated"])

    def count(self) -> dict[str, float]:
        """Returns of the episodes that ended since the last call, per agent."""
        episodes, *sums = self.numbers["ended"].tolist()
        self.numbers["ended"].zero_()
        if not episodes:
            return {}
        means = [x / episodes / n for x, n in zip(sums, self.game.population)]
        figures = {f"return/{self.name}": sum(means) / len(means), "episodes": episodes}
        if len(means) > 1:
            figures |= {f"return/{self.name}/{k}": x for k, x in enumerate(means)}
        return figures


@torch.no_grad()
def collect(agent: Agent, arena: Arena, rng: torch.Generator, latent_rng) -> None:
    """One step in all worlds."""
    obs, state, z = arena.world.obs, arena.world.state, arena.numbers["z"]
    view = agent.look(arena.game, obs, z)
    actions = sample(agent.theta(view, agent.phi(view)).log_softmax(-1), rng)
    step = arena.world.step(actions)
    arena.add(state, view.alive, actions, step)
    if not agent.args.adapt:  # a new episode, new latents
        ended = (step.terminated | step.truncated)[:, None]
        new = draw_latents(agent, arena.game, z.shape[:1], latent_rng)
        arena.numbers["z"] = torch.where(ended, new, z)


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


def mean(x: Tensor, alive: Tensor) -> Tensor:
    """Of (..., N) over the living."""
    return (x * alive).sum() / alive.sum().clamp(min=1)


def pick(x: Tensor, actions: Tensor) -> Tensor:  # (M, N, A), (M, N) -> (M, N)
    return x.gather(-1, actions[..., None])[..., 0]


def critic_loss(args: Args, agent: Agent, batch: Batch, g, next_g, rng) -> Tensor:
    """Eq. (8), with the entropy of a' in the target as in the authors' code."""
    view, later = batch.view, batch.next_view
    with torch.no_grad():
        log_probs = agent.delayed_theta(later, next_g).log_softmax(-1)
        actions = sample(log_probs, rng)  # paper and code differ: at o', not at o
        q = pick(agent.delayed_zeta(later, next_g, actions), actions)
        q = q - args.entropy_coef * pick(log_probs, actions)
        target = batch.rewards + args.gamma * q * later.alive * ~batch.terminated[:, None]
    # Eq. (8)
    q = pick(agent.zeta(view, g, batch.actions), batch.actions)
    return mean((q - target).square(), view.alive)


def actor_loss(args: Args, theta, zeta, batch: Batch, g, rng) -> tuple[Tensor, Tensor]:
    """Eq. (9), or (10) if g can be differentiated; and the policy's entropy."""
    log_probs = theta(batch.view, g).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    if args.actor_gradient == "gumbel":  # as Lowe et al.: the others' actions are the replay's
        others, noise = batch.actions, gumbel(log_probs, rng)
        soft = (log_probs + noise).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), NUM_ACTIONS)
        probs = hard + soft - soft.detach()  # straight through
    else:  # the exact expectation over one's own actions
        others, probs = sample(log_probs, rng), log_probs.exp()
    with torch.no_grad():
        q = zeta(batch.view, g, others)  # (M, N, A), of all own actions
    # Eq. (9)
    objective = (probs * q).sum(-1) + args.entropy_coef * entropy
    return -mean(objective, batch.view.alive), mean(entropy, batch.view.alive)


def fast_weights(args: Args, agent: Agent, now: list[Arena]) -> list[tuple]:
    """What the inner steps move for each population, and the optimiser of that."""
    if not args.parallel_populations:
        return [(agent.theta, agent.actor_optimiser)]
    for theta in agent.copies:
        theta.load_state_dict(agent.theta.state_dict())
    return [(theta, agent.copies_optimiser) for theta in agent.copies]


@torch.no_grad()
def reptile(args: Args, agent: Agent, start: list[Tensor], thetas: list[Readout]) -> None:
    """theta <- theta + alpha (theta_K - theta), of several populations the mean."""
    ends = zip(*(theta.parameters() for theta in thetas))
    for p, first, last in zip(agent.theta.parameters(), start, ends):
        # Eq. (5), Algorithm 4
        p.copy_(first.lerp(torch.stack(last).mean(0), args.reptile_step))


def latent_update(args: Args, agent: Agent, views: dict, arenas: list[Arena], rng) -> dict:
    """A step of phi on the observations of {population: view}, one of psi and xi on observations
    of all populations. Returns scalars."""
    scalars, games = {}, {arena.name: arena.game for arena in arenas}
    if args.phi_gradient == "mi" and args.latent_size > 1:
        losses = []
        with frozen(agent.theta, agent.delayed_theta):
            for name, view in views.items():
                log_prior = agent.log_prior(games[name]).detach()
                loss, scalars[f"mi/{name}"] = phi_loss(args, agent, view, log_prior, rng)
                losses.append(loss)
            loss = torch.stack(losses).mean()
            descend(loss, agent.phi, agent.actor_optimiser, args.max_grad_norm)
    if hasattr(agent, "psi"):
        losses, filled = [], [arena for arena in arenas if arena.size]
        with frozen(agent.phi):
            for arena in filled:
                view = arena.sample(agent, rng, -(-args.batch_size // len(arenas))).view
                label, log_prior = arenas.index(arena), agent.log_prior(arena.game)
                losses.append(population_loss(args, agent, view, log_prior, label, rng))
                scalars[f"xi_loss/{arena.name}"] = losses[-1]
            loss, both = torch.stack(losses).mean(), nn.ModuleList((agent.psi, agent.xi))
            descend(loss, both, agent.latent_optimiser, args.max_grad_norm)
    return scalars


@torch.no_grad()
def diagnose(agent: Agent, arenas: list[Arena], rng: torch.Generator) -> dict[str, Tensor]:
    """Whether the latent works: the bound on I(g; a|o), p(z|m), and how often xi is right beside
    how often it is with a uniform g."""
    scalars, priors = {}, []
    for label, arena in enumerate(arenas):
        if not arena.size:
            continue
        view = arena.sample(agent, rng, 256).view
        log_prior = agent.log_prior(arena.game)
        information = graph_information(agent, view, log_prior)
        scalars[f"information/{arena.name}"] = mean(information, view.alive)
        priors.append(log_prior.exp())
        if hasattr(agent, "psi"):
            right = agent.xi(view, agent.phi.all(view)).argmax(-1) == label  # (Z, M, N)
            right = (log_prior.exp().T[:, None] * right).sum(0)
            scalars[f"xi_accuracy/{arena.name}"] = mean(right, view.alive)
            right = (agent.xi(view, uniform_graph(view)).argmax(-1) == label).float()
            scalars[f"xi_accuracy_uniform_g/{arena.name}"] = mean(right, view.alive)
            for kind, p in enumerate(agent.psi(arena.game.population).exp()):
                for z, x in enumerate(p):  # psi's own, without --prior-floor
                    scalars[f"prior/{arena.name}/{kind}/{z}"] = x
    means = [p.mean(0) for p in priors]
    distances = [(p - q).abs().sum() / 2 for p, q in itertools.combinations(means, 2)]
    return scalars | ({"prior_distance": torch.stack(distances).mean()} if distances else {})


def uniform_graph(view: View) -> Tensor:
    """The g that knows nothing (M, N, N)."""
    return view.mask / view.mask.sum(-1, keepdim=True).clamp(min=1)


def update(args, agent: Agent, now: list[Arena], arenas: list[Arena], rng, latent_rng) -> dict:
    """K steps of critic and actor in the populations `now`, then of everything else. Returns
    scalars."""
    scalars = collections.defaultdict(list)
    start = [p.detach().clone() for p in agent.theta.parameters()]
    thetas = fast_weights(args, agent, now)
    for _ in range(args.inner_steps):
        batches = [arena.sample(agent, rng, args.batch_size) for arena in now]
        graphs, losses = [], []
        for batch in batches:
            with torch.set_grad_enabled(args.phi_gradient == "actor"):
                graphs.append(g := agent.phi(batch.view))
            with torch.no_grad():
                next_g = agent.phi(batch.next_view)
            losses.append(critic_loss(args, agent, batch, g.detach(), next_g, rng))
        loss = torch.stack(losses).mean()
        optimiser = agent.critic_optimiser
        critic_norm = descend(loss, agent.zeta, optimiser, args.max_grad_norm)
        for batch, g, (theta, optimiser) in zip(batches, graphs, thetas):
            policy_loss, entropy = actor_loss(args, theta, agent.zeta, batch, g, rng)
            actor = nn.ModuleList((theta, agent.phi) if args.phi_gradient == "actor" else (theta,))
            actor_norm = descend(policy_loss, actor, optimiser, args.max_grad_norm)
        figures = {"critic_loss": loss, "actor_loss": policy_loss, "entropy": entropy}
        figures |= {"critic_grad_norm": critic_norm, "actor_grad_norm": actor_norm}
        for name, x in figures.items():
            scalars[name].append(x.detach())
    if not args.adapt:
        reptile(args, agent, start, [theta for theta, _ in thetas])
        views = {arena.name: batch.view for arena, batch in zip(now, batches)}
        for name, x in latent_update(args, agent, views, arenas, latent_rng).items():
            scalars[name].append(x.detach())
    agent.follow()
    return {name: torch.stack(x).mean() for name, x in scalars.items()}


# --- 8. Evaluate ----------------------------------------------------------------------------------


def net_player(agent: Agent, z: Tensor, seed: int, uniform: bool = False) -> Player:
    """Our agents with latents z (B, N) as a player for envs.particle.episodes: sampled actions.
    uniform: with a graph that knows nothing."""
    rng = torch.Generator().manual_seed(seed)

    def act(world: ParticleWorld) -> Tensor:
        view = agent.look(world.game, world.obs, z)
        g = uniform_graph(view) if uniform else agent.phi(view)
        return sample(agent.theta(view, g).log_softmax(-1), rng)

    return act


def same_latents(game: Game, episodes: int, z: tuple[int, ...], device) -> Tensor:
    """(episodes, N): everybody of a type has the same, z has one for each type."""
    latents = torch.tensor([z[kind] for kind in game.types], device=device)
    return latents.expand(episodes, -1)


def best_latents(args: Args, agent: Agent, population: str, seeds: list[int]) -> tuple[int, ...]:
    """The z, one for each type, with the largest return (mean of types) in other episodes."""
    world, found = make_envs(args, population, args.eval_episodes, seeds[0]), {}
    for z in itertools.product(range(args.latent_size), repeat=len(world.game.population)):
        world.seed(seeds[0])
        latents = same_latents(world.game, args.eval_episodes, z, agent.device)
        found[z] = play(world, net_player(agent, latents, seeds[1])).mean()
    return max(found, key=found.get)


def evaluate(
    args: Args,
    agent: Agent,
    arenas: list,
    alive: Callable,
    kind: str,
    timesteps: int,
    run_dir: Path,
) -> dict[str, dict[str, float]]:
    """Episodes without learning: with z drawn, with each z for everybody, with a uniform graph; at
    the end also with the best z, beside scripted players, and in populations never met.

    kind: "eval" on the way or "final", which plays other episodes; alive() is called now and then.
    Prints a table and returns {"population player": envs.particle.episodes.summarise(...)}.
    """
    final = kind == "final"
    episodes = args.final_episodes if final else args.eval_episodes
    rng = np.random.default_rng((args.seed, timesteps, ("eval", "final").index(kind)))
    seeds, results = rng.integers(2**31, size=6).tolist(), {}
    latent_rng = torch.Generator().manual_seed(seeds[5])
    own = {arena.name: arena for arena in arenas}
    for population in dict.fromkeys((*own, *(args.eval_populations if final else ()))):
        world = make_envs(args, population, episodes, seeds[0])
        game, Z = world.game, args.latent_size
        z = draw_latents(agent, game, (episodes,), latent_rng)
        if args.adapt and population in own:  # theirs for good
            z = own[population].numbers["z"][:1].expand(episodes, -1)
        players = {"": net_player(agent, z, seeds[1])}
        same = {f"z={k}": (k,) * len(game.population) for k in range(Z if Z > 1 else 0)}
        if final and Z > 1:
            best = best_latents(args, agent, population, seeds[3:5])
            same |= {f"best z={','.join(map(str, best))}": best}
        for name, latents in same.items():
            latents = same_latents(game, episodes, latents, agent.device)
            players[name] = net_player(agent, latents, seeds[1])
        players["uniform g"] = net_player(agent, z, seeds[1], uniform=True)
        players |= scripted_players(seeds[2]) if final else {}
        for name, player in players.items():
            alive()
            world.seed(seeds[0])  # all meet the same episodes
            film = run_dir / "videos" / f"{kind}-{timesteps}-{population}-{name.replace(' ', '-')}"
            film = film.with_name(film.name.rstrip("-") + ".mp4") if args.capture_video else None
            film = film if not name or name.startswith("z=") else None
            row = f"{population} {name}".rstrip()
            results[row] = summarise(args.task, play(world, player, film))
    tqdm.write(f"{args.task}, seed {args.seed}, step {timesteps}\n{table(results)}")
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


def save_run(run_dir: Path, state: dict[str, Any], arenas: list[Arena]) -> None:
    """Write the filled part of the replays, then the checkpoint that names them; replays whose
    checkpoint is gone go, too."""
    filled = [{k: x[: arena.size].clone() for k, x in arena.replay.items()} for arena in arenas]
    buffer, name = io.BytesIO(), f"replay-{state['timesteps']}.pt"
    torch.save(filled, buffer)
    write(run_dir / name, buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    save_checkpoint(run_dir, state | {"replay": {"name": name, "sha256": sha256}})
    for path in run_dir.glob("replay-*.pt"):
        if not (run_dir / path.name.replace("replay", "checkpoint")).exists():
            path.unlink()


def load_replay(run_dir: Path, entry: dict[str, str], arenas: list[Arena]) -> None:
    """Put back what save_run() wrote."""
    if not (data := read_intact(run_dir, entry)):
        what = f"{run_dir / entry['name']} is damaged or missing"
        raise UsageError(f"{what}: --resume the older one of {run_dir}/checkpoint-*.pt instead.")
    for arena, filled in zip(arenas, torch.load(io.BytesIO(data), weights_only=True)):
        for name, x in filled.items():
            arena.replay[name][: len(x)] = x.to(arena.device)


def pack(args: Args, agent: Agent, arenas: list[Arena], rngs: dict) -> dict[str, Any]:
    """What a checkpoint holds but for the replays; RunError if a weight is not finite."""
    for name, part in agent.parts().items():
        if isinstance(part, nn.Module):
            check_finite(**{f"{name}.{key}": x for key, x in part.state_dict().items()})
    parts = {name: part.state_dict() for name, part in agent.parts().items()}
    about = {"script": Path(__file__).stem, "args": dataclasses.asdict(args), "agent": parts}
    about["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
    return about | {
        "arenas": [
            {"world": arena.world.state_dict(), "steps": arena.steps, "numbers": arena.numbers}
            for arena in arenas
        ]
    }


def unpack(saved: dict[str, Any], arenas: list[Arena], rngs: dict) -> None:
    """Put worlds and generators where the checkpoint left them."""
    for name, rng in rngs.items():
        rng.set_state(saved["rngs"][name])
    for arena, own in zip(arenas, saved["arenas"]):
        arena.world.load_state_dict(own["world"])
        arena.steps = own["steps"]
        arena.numbers = {name: x.to(arena.device) for name, x in own["numbers"].items()}


def report(arenas: list[Arena], scalars: dict[str, list], now: dict, seconds, steps: int) -> dict:
    """What a line of metrics.jsonl holds, from here back to the last; now: of this moment."""
    figures = {name: float(torch.stack(x).mean()) for name, x in scalars.items()}
    figures |= {name: float(x) for name, x in now.items()}
    scalars.clear()
    check_finite(**{name: torch.tensor(x) for name, x in figures.items()})
    for arena in arenas:
        figures |= arena.count()
    returns = [figures[f"return/{x.name}"] for x in arenas if f"return/{x.name}" in figures]
    if returns:
        figures["return"] = sum(returns) / len(returns)
    return figures | {"sps": steps / seconds}


def new_arenas(args: Args, device: torch.device) -> list[Arena]:
    """One for each population to train in; UsageError also for one to evaluate that cannot be."""
    for name in args.eval_populations:
        make_envs(args, name, 1, args.seed)
    names = (args.population,) if args.adapt else args.populations
    return [Arena(args, name, device) for name in names]


def begin(args: Args, agent: Agent, arenas: list[Arena], latent_rng: torch.Generator) -> None:
    """The first latents; with --adapt networks and sizes of rewards of the run that is adapted."""
    if args.adapt:
        source, _ = load_checkpoint(args.adapt)
        nets = {k: x for k, x in agent.parts().items() if isinstance(x, nn.Module)}
        restore(nets, source["agent"], args.adapt)
        sums = [own["numbers"]["rewards"] for own in source["arenas"]]
        arenas[0].numbers["rewards"] += torch.stack(sums).mean(0).to(agent.device)
    for arena in arenas:
        shape = arena.numbers["z"].shape
        z = draw_latents(agent, arena.game, (1,) if args.adapt else shape[:1], latent_rng)
        arena.numbers["z"] = z.expand(shape).clone()  # Algorithm 5: the same in all episodes


def keep_freed_memory() -> None:
    """glibc takes every tensor above 32 MB from the system anew, page by page, which with 48 agents
    is half of the time: let it keep them. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no maps of their own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def train(args: Args) -> dict[str, dict[str, float]]:
    """The run, with --resume from its checkpoint on; returns the last evaluation."""
    keep_freed_memory()
    _, _, device = start_processes(args)
    source = args.resume or args.eval_only
    saved, run_dir = load_checkpoint(source) if source else ({}, None)
    iteration, timesteps = saved.get("iteration", 0), saved.get("timesteps", 0)
    began = time.monotonic() - saved.get("wall_s", 0)
    with contextlib.ExitStack() as stack:
        arenas = new_arenas(args, device)
        agent = Agent(args, arenas[0].game, device)
        if saved:
            restore(agent.parts(), saved["agent"], source)
        stop: list[int] = []  # signals that asked for it

        def alive() -> None:
            if stop:
                raise KeyboardInterrupt

        judge = functools.partial(evaluate, args, agent, arenas, alive)
        rngs = {"rng": torch.Generator().manual_seed(args.seed)}
        rngs["latent_rng"] = torch.Generator().manual_seed(args.seed + 2**32)
        if saved:
            unpack(saved, arenas, rngs)
        if args.eval_only:
            return judge("final", timesteps, run_dir)
        if saved:
            load_replay(run_dir, saved["replay"], arenas)
        else:
            begin(args, agent, arenas, rngs["latent_rng"])
        run_dir = run_dir or new_run_dir(args, args.task, device=str(device))
        logger = stack.enter_context(contextlib.closing(Logger(args, run_dir, timesteps)))
        scalars, clock = collections.defaultdict(list), (time.monotonic(), timesteps)

        saved_at = timesteps if saved else -1

        def save() -> None:
            nonlocal saved_at
            if timesteps != saved_at:
                state = pack(args, agent, arenas, rngs)
                state |= {"iteration": iteration, "timesteps": timesteps}
                save_run(run_dir, state | {"wall_s": time.monotonic() - began}, arenas)
            saved_at = timesteps

        if not saved:
            save()
        bar = progress_bar(timesteps, args.total_timesteps, 0)
        signals = stack.enter_context(stop_signals(stop))
        while timesteps < args.total_timesteps and not stop:
            turn = iteration // args.max_episode_steps % len(arenas)
            now = arenas if args.parallel_populations else [arenas[turn]]
            before, size = now[0].steps, args.batch_size
            for arena in now:
                collect(agent, arena, **rngs)
            if is_due(args.update_every, before, arena.steps) and arena.size >= size:
                for name, x in update(args, agent, now, arenas, **rngs).items():
                    scalars[name].append(x)
            iteration += 1
            before, timesteps = timesteps, timesteps + args.num_envs * len(now)
            bar.update(args.num_envs * len(now))
            if is_due(args.log_every, before, timesteps):
                state = diagnose(agent, arenas, torch.Generator().manual_seed(timesteps))
                now = time.monotonic()
                figures = report(arenas, scalars, state, now - clock[0], timesteps - clock[1])
                logger.log(timesteps, figures | {"wall_s": now - began})
                clock = now, timesteps
            if is_due(args.save_every, before, timesteps):
                save()
            if is_due(args.eval_every, before, timesteps):
                with contextlib.suppress(KeyboardInterrupt):
                    logger.log_results(timesteps, "eval", judge("eval", timesteps, run_dir))
        save()
        if stop or not args.final_episodes:
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
        argv = with_preset(sys.argv[1:] if argv is None else argv)
        train(inherit(read_args(argv), argv))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
