"""RL2 (Duan et al., 2016) in the particle worlds: a policy that learns a game while it plays it.

Agents play trials: sequences of games, each in another population. A recurrent policy keeps its
hidden state from game to game, and PPO maximises the return of the whole trial. So the policy can
use in later games what actions and rewards showed in earlier ones, without gradient steps.

    h_t = GRU(x_t, h_t-1),  x_t = [c(o_t), a_t-1, r_t-1 / std, done_t-1], 0 at a trial's start (1)
    pi  = softmax(W h_t),  V = w . h_t                                                         (2)
    A_t = d_t + gamma lambda A_t+1,  d_t = r_t / std + gamma V_t+1 - V_t                       (3)
          where t + 1 may be the first step of the trial's next game
    L   = E [- min(rho A, clip(rho, 1 -+ eps) A) + c (V - y)^2 - beta entropy(pi)]             (4)
          y = V_old + A,  rho = pi(a_t) / pi_old(a_t),  A beside rho normalised

L moves the encoder c, the GRU, the policy and the value. Each type of agent has its own set.

    python baselines/rl2_particle.py --task resource --populations 6 9 12 15 --preset cpu
    python baselines/rl2_particle.py --adapt runs/RUN --population 24          or 2,8 for two types
    python baselines/rl2_particle.py --resume runs/RUN --total-timesteps 2000000
    python baselines/rl2_particle.py --eval-only runs/RUN --eval-populations 3 7 10 13 18 24
    torchrun --nproc-per-node 2 baselines/rl2_particle.py        two times 12 worlds per population

Letters: G games of a trial, T steps of a game, B worlds, N agents, A actions, M = T B, H hidden
units, R units of the GRU, K units of a key or steps in which agents act, S parameter sets, Ds and
De features of oneself and of another agent. Choices that the papers leave open:
docs/baselines_rl2.md. The worlds: docs/particle.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator
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
    leave,
    load_checkpoint,
    mean_and_deviation,
    moments,
    own_generator,
    process_rank,
    read_args,
    read_flags,
    read_kept,
    restore,
    saved_args,
    send,
    sum_over_processes,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.particle.episodes import (
    EpisodeReturns,
    Player,
    RewardScale,
    play_all,
    population_name,
    read_population,
    report_returns,
    scripted_players,
    table,
)
from envs.particle.pairs import FastPairs, grouped_linear, keep_freed_memory
from envs.particle.worlds import Game, Observation, ParticleWorld, Step, constant

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """RL2 in particle worlds."""

    # Run
    total_timesteps: Positive = 1_000_000  # environment steps, summed over all worlds and processes
    log_every: Positive = 10_000  # environment steps between lines of metrics.jsonl
    eval_every: Count = 100_000  # environment steps between evaluations in training; 0: none
    eval_episodes: Positive = 100  # episodes per row of the table in evaluations during training
    final_episodes: Count = 1000  # episodes per row, final evaluation or --eval-only; 0: none
    save_every: Count = 200_000  # environment steps between checkpoints (last two kept); 0: at end
    # Environment
    task: str = "treasure"  # world: treasure, resource, pacman, signpost, rooms or delivery
    populations: tuple[str, ...] = ("3", "6", "12", "24")  # m, training; pacman: 4,2 6,3 8,4
    adapt: str = ""  # run or checkpoint to adapt to --population
    population: str = ""  # new population, with --adapt
    eval_populations: tuple[str, ...] = ()  # unseen populations of the final evaluation
    shaping: bool = True  # treasure, pacman, delivery: also reward -.1 x distance to the goal
    collision_penalty: Amount = 0.0  # treasure: subtracted from rewards, per agent touched and step
    num_envs: Positive = 12  # B, worlds per population and process; B trials an order of games
    max_episode_steps: Positive = 20  # T, steps of a game
    # Method
    trial: Literal["cycle", "same"] = "cycle"  # games in all populations in turn, or all in one
    trial_games: Count = 0  # G, games of a trial; 0: the number of --populations
    memory: Literal["trial", "game", "step"] = "trial"  # how long the hidden state h is kept
    rnn_size: Positive = 256  # R, units of the GRU
    hidden_size: Positive = 64  # H, units of a hidden layer
    key_size: Positive = 16  # units of each query and key of phi
    head_gain: Above = 2.0  # Xavier gain of the initial weights of queries and keys
    plain: bool = False  # networks of agent pairs: literal and slow (class Pairs); off: equal, fast
    compile: bool = False  # on a GPU: compile worlds and sums over pairs; a CPU has kernels
    # Base algorithm
    learning_rate: Amount = 5e-4  # learning rate of Adam
    gamma: Share = 0.99  # discount factor
    gae_lambda: Share = 0.95  # lambda of generalised advantage estimation, Eq. (3)
    clip: Amount = 0.2  # eps of Eq. (4): the probability ratio is clipped to 1 -+ eps
    epochs: Positive = 10  # passes over the trials of an iteration
    minibatches: Positive = 4  # minibatches per epoch
    value_coef: Amount = 0.5  # c of Eq. (4), weight of the value loss
    value_norm: bool = True  # predict values in units of the returns' running mean and deviation
    entropy_coef: Amount = 0.01  # beta of Eq. (4), weight of the entropy
    scale_rewards: bool = True  # divide rewards by their running standard deviation
    max_grad_norm: Above = 0.5  # gradients are clipped to this norm


PRESETS = {
    "paper": {},
    "cpu": {
        "rnn_size": 64,
        "learning_rate": 2e-3,
        "gamma": 0.95,
        "gae_lambda": 0.8,
        "compile": True,
    },
}
LINE = ("return", "value_loss", "entropy", "sps")  # printed if there is no progress bar
RESUMABLE = ("eval_populations", "plain", "compile")  # flags that may change with --resume
# --adapt keeps these flags of the adapted run: its networks and units of values need them.
FIXED = ("task", "populations", "memory", "rnn_size", "hidden_size", "key_size", "value_norm")
FIXED += ("head_gain", "trial")


def validate(args: Args) -> list[tuple[Any, str]]:
    """Flag combinations to refuse, each as (whether args has it, error message)."""
    begins = not (args.resume or args.eval_only or args.adapt)
    one = 1 in (len(args.populations), args.trial_games)
    same = begins and one and args.trial == "same"
    return [
        (bool(args.adapt) != bool(args.population), "--adapt and --population need each other"),
        (len(set(args.populations)) < len(args.populations), "--populations has one twice"),
        (not args.populations, "--populations is empty"),
        (args.minibatches > args.num_envs, "--minibatches exceeds --num-envs"),
        (same, "--trial same needs several populations and games"),
    ]


def read(argv: list[str]) -> Args:
    """Read the command line on top of what --preset, --resume or --eval-only stand for; with
    --adapt on top of the adapted run's arguments. UsageError for flags that must not differ."""
    given = read_flags(Args, argv)
    if not given.adapt or given.resume or given.eval_only:
        return read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS)
    source, own = given.adapt, saved_args(given.adapt, Args, whole=True)
    new = {field.name: getattr(given, field.name) for field in dataclasses.fields(RunArgs)}
    new |= {"population": "", "eval_populations": ()}
    if any(word.partition("=")[0] == "--preset" for word in argv):
        preset = {name: getattr(Args, name) for name in PRESETS["cpu"]} | PRESETS[given.preset]
        new |= {name: x for name, x in preset.items() if name not in FIXED}
    else:
        new["preset"] = own.preset
    default = dataclasses.replace(own, **new)
    args = read_kept(Args, argv, default, FIXED, source)
    check(validate(args))
    return args


# --- 3. Worlds ------------------------------------------------------------------------------------


# [shared: make_envs] begin
def make_envs(
    args: Args, population: str, num_envs: int, seed: int, first_world: int = 0
) -> ParticleWorld:
    """Make worlds of args.task with a population like "6" or "8,4"; UsageError if that cannot be.
    The random numbers of a world follow from the seed and its number, first_world + 0, 1, ..."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    try:
        return ParticleWorld(
            args.task,
            read_population(population),
            num_envs,
            device="cuda" if cuda else "cpu",
            seed=seed,
            compiled=args.compile and cuda,  # on a CPU most time is spent in updates
            first_world=first_world,
            horizon=args.max_episode_steps,
            shaping=args.shaping,
            collision_penalty=args.collision_penalty,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


# [shared: make_envs] end

# --- 4. Networks ----------------------------------------------------------------------------------

NUM_ACTIONS = 5  # A
RELU = math.sqrt(2)  # gain of layers before a ReLU
Population = tuple[int, ...]  # agents of each type


class View(NamedTuple):
    """Observations of N agents at M moments, as the networks read them."""

    own: Tensor  # (M, N, Ds) o_s, an agent's own features
    others: Tensor  # (M, N, De) features of each agent j; o_ij has p_j - p_i in place of p_j
    mask: Tensor  # (M, N, N) bool: i sees j
    counts: tuple[int, ...]  # agents of each parameter set, in order


# [shared: layers] begin
def per_agent(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Copy rows of parameter sets to their agents, (S, ...) -> (N, ...); counts: agents per set."""
    numbers = constant(counts, torch.int64, x.device)
    return x.repeat_interleave(numbers, 0, output_size=sum(counts))


class Linear(nn.Module):
    """A linear layer with S parameter sets; each agent uses one of them."""

    def __init__(self, sets: int, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sets, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(sets, outputs))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight, gain)

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:  # (M, N, I) -> (M, N, O)
        return grouped_linear(x, self.weight, self.bias, counts)


class MLP(nn.Module):
    """Two linear layers with a ReLU between them and S parameter sets."""

    def __init__(self, sets: int, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.first = Linear(sets, inputs, hidden, gain=RELU)
        self.last = Linear(sets, hidden, outputs)

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        hidden = F.relu(self.first(x, counts), inplace=True)
        return self.last(hidden, counts)


# [shared: layers] end


# [shared: relation_graph] begin
class Pairs:
    """The first layer above all o_ij = [p_j - p_i, v_j, ...]; scores() and sums() apply the second.
    This literal form stores M N^2 H numbers. The default, FastPairs, gives equal results and stores
    M N H for each set of weights."""

    def __init__(self, others: Tensor, weight: Tensor, bias: Tensor, counts: tuple[int, ...]):
        """Compute relu(o_ij W + b): others (M, N, De), weight W (S, De, H), bias b (S, H)."""
        N = others.shape[1]
        relative = others[:, None, :, :2] - others[:, :, None, :2]
        rest = others[:, None, :, 2:].expand(-1, N, -1, -1)
        o = torch.cat((relative, rest), -1)  # o_ij (M, N, N, De)
        hidden = torch.einsum("mijd,idh->mijh", o, per_agent(weight, counts))
        hidden = hidden + per_agent(bias, counts)[:, None]
        self.hidden, self.counts = F.relu(hidden), counts  # (M, N, N, H)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return q_i . k_ij (M, N, N): query (M, N, K), key (S, H, K) the weights of keys."""
        key = per_agent(key, self.counts)
        keys = torch.einsum("mijh,ihk->mijk", self.hidden, key)
        return torch.einsum("mik,mijk->mij", query, keys)

    def sums(self, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return sum_j g_ij V(o_ij) (M, N, O): g (M, N, N), weight (S, H, O), bias (S, O)."""
        weight, bias = per_agent(weight, self.counts), per_agent(bias, self.counts)
        values = torch.einsum("mijh,iho->mijo", self.hidden, weight) + bias[:, None]
        return torch.einsum("mij,mijo->mio", g, values)


class RelationGraph(nn.Module):
    """phi: the attention network, which decides whom each agent attends to."""

    def __init__(self, sets: int, own_size: int, entity_size: int, args: Args):
        super().__init__()
        H, K = args.hidden_size, args.key_size
        self.pairs = Pairs if args.plain else functools.partial(FastPairs, compiled=args.compile)
        self.key_size = K
        self.own = Linear(sets, own_size, H, gain=RELU)
        self.query = Linear(sets, H, K, gain=args.head_gain)
        self.entity = Linear(sets, entity_size, H, gain=RELU)
        self.key = Linear(sets, H, K, gain=args.head_gain)  # bias unused: it cancels in the softmax

    def forward(self, view: View) -> Tensor:
        """The graph g (M, N, N). Row i sums to 1, or to 0 if agent i sees nobody."""
        hidden = F.relu(self.own(view.own, view.counts), inplace=True)
        query = self.query(hidden, view.counts)  # (M, N, K)
        entity = self.entity
        pairs = self.pairs(view.others, entity.weight, entity.bias, view.counts)
        scores = pairs.scores(query, self.key.weight)
        # MRA, Eq. (1)
        scores = scores / math.sqrt(self.key_size)
        scores = scores.masked_fill(~view.mask, -1e9)
        return scores.softmax(-1) * view.mask


# [shared: relation_graph] end


class Encoder(nn.Module):
    """c_i = relu(own(o_s) + e_i) with e_i = sum_j g_ij V(o_ij), which is 0 if i sees nobody."""

    def __init__(self, sets: int, own_size: int, entity_size: int, args: Args):
        super().__init__()
        H = args.hidden_size
        self.pairs = Pairs if args.plain else functools.partial(FastPairs, compiled=args.compile)
        self.graph = RelationGraph(sets, own_size, entity_size, args)
        self.own = MLP(sets, own_size, H, H)
        self.entity = Linear(sets, entity_size, H, gain=RELU)
        self.value = Linear(sets, H, H)

    def forward(self, view: View) -> Tensor:  # (M, N, H)
        g = self.graph(view)
        pairs = self.pairs(view.others, self.entity.weight, self.entity.bias, view.counts)
        e = pairs.sums(g, self.value.weight, self.value.bias)
        return F.relu(self.own(view.own, view.counts) + e, inplace=True)


class RecurrentPolicy(nn.Module):
    """Policy and value on top of a GRU; each type of agent has its own parameters."""

    def __init__(self, game: Game, args: Args):
        super().__init__()
        S, R = len(game.population), args.rnn_size
        inputs = args.hidden_size + NUM_ACTIONS + 2
        self.forgets = args.memory == "step"
        self.encoder = Encoder(S, game.own_features, game.entity_features, args)
        self.grus = nn.ModuleList(nn.GRU(inputs, R) for _ in range(S))
        self.actor = Linear(S, R, NUM_ACTIONS, gain=0.1)  # small: all actions are tried
        self.critic = Linear(S, R, 1)

    def forward(
        self, view: View, previous: Tensor, hidden: Tensor, acts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run T steps of a game; return log pi (T, B, N, A), V (T, B, N) and the last h (B, N, R).

        previous  (T, B, N, A + 2): the rest of x_t, behind c
        hidden    (B, N, R): h before the first step
        acts      (T, B, N) bool: whether an agent acts; after its last action it keeps h
        """
        shape, counts = acts.shape, view.counts
        c = self.encoder(view).unflatten(0, shape[:2])  # (T, B, N, H)
        x = torch.cat((c, previous), -1)
        states = self.remember(x, hidden, counts)
        rows = states.flatten(0, 1)  # (M, N, R)
        # Eq. (2)
        log_probs = self.actor(rows, counts).log_softmax(-1)
        values = self.critic(rows, counts)
        # h after each agent's last action: acts is True first and False later
        states = torch.cat((hidden[None], states))  # (T + 1, B, N, R)
        number = acts.sum(0)[..., None].expand_as(hidden)  # (B, N, R)
        after = states.gather(0, number[None])[0]
        return log_probs.unflatten(0, shape[:2]), values.view(shape), after

    def remember(self, x: Tensor, hidden: Tensor, counts: Population) -> Tensor:
        """Return h (T, B, N, R) after each step of x (T, B, N, .); hidden: the h before."""
        T, B, N = x.shape[:3]
        if self.forgets:  # each step begins with h = 0
            x = x.view(1, T * B, N, -1)
            hidden = torch.zeros_like(hidden).repeat(T, 1, 1)
        parts = []
        inputs = x.split(counts, 2), hidden.split(counts, 1)
        for gru, rows, h in zip(self.grus, *inputs):
            # Eq. (1)
            states, _ = gru(rows.flatten(1, 2), h.flatten(0, 1)[None])
            parts.append(states.unflatten(1, h.shape[:2]))
        return torch.cat(parts, 2).view(T, B, N, -1)


# [shared: sample] begin
def gumbel(like: Tensor, rng: torch.Generator) -> Tensor:
    """Gumbel noise with the shape and device of a tensor, drawn on the CPU by rng."""
    noise = torch.empty(like.shape).exponential_(generator=rng)
    return send(-noise.log(), like.device)


def sample(log_probs: Tensor, rng: torch.Generator) -> Tensor:
    """Draw actions (...) from log_probs (..., A): the argmax after adding Gumbel noise."""
    return (log_probs + gumbel(log_probs, rng)).argmax(-1)


# [shared: sample] end


class ValueNorm(nn.Module):
    """Running mean and deviation of returns: exponential averages over iterations, debiased."""

    DECAY = 0.8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of 1, x, x^2

    def update(self, new: Tensor) -> None:
        """Take in an iteration's returns; new (3,): 1, their mean, their mean square."""
        self.sums.lerp_(new.to(self.sums), 1 - self.DECAY)

    def mean_std(self) -> tuple[float, float]:
        """Mean and standard deviation; 0 and 1 before the first update."""
        weight, mean, square = self.sums.tolist()
        if weight == 0:
            return 0.0, 1.0
        variance = square / weight - (mean / weight) ** 2
        return mean / weight, math.sqrt(max(variance, 1e-2))


class Memory(NamedTuple):
    """What the agents of B worlds carry from step to step and from game to game."""

    population: Population  # of the present game
    hidden: Tensor  # (B, N, R) h
    previous: Tensor  # (B, N, A + 2) a_t-1 one-hot, r_t-1 / std, done_t-1


class Agent(Parts):
    """The policy, its optimiser, and the running scales of values and rewards."""

    def __init__(self, args: Args, game: Game, device: torch.device):
        self.args, self.device = args, device
        torch.manual_seed(args.seed)
        self.policy = RecurrentPolicy(game, args).to(device)
        self.value_norm = ValueNorm()  # on the CPU: each step reads it
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.optimiser = adam(self.policy.parameters())
        self.reward_scales: dict[str, RewardScale] = {}  # by training population

    def view(self, game: Game, obs: Observation) -> View:
        """The networks' input for observations of a game."""
        return View(
            own=obs.own.contiguous(),
            others=obs.others.contiguous(),
            mask=obs.mask(),
            counts=game.population,
        )

    def act(
        self, game: Game, obs: Observation, memory: Memory, acts: Tensor
    ) -> tuple[Tensor, Tensor, Memory]:
        """Run one step; return log pi (B, N, A), V (B, N) and the memory with acting agents' h."""
        view, previous = self.view(game, obs), memory.previous[None]
        log_probs, values, hidden = self.policy(view, previous, memory.hidden, acts[None])
        mean, std = self.value_norm.mean_std()
        return log_probs[0], values[0] * std + mean, memory._replace(hidden=hidden)

    def deviation(self, worlds: ParticleWorld) -> Tensor:
        """Return what each agent's rewards are divided by (N,). A population outside training uses
        the average sums of the training populations."""
        scale = self.reward_scales.get(population_name(worlds.game))
        if scale is None:
            scale = RewardScale(worlds)
            sums = [each.sums for each in self.reward_scales.values()]
            scale.sums += torch.stack(sums).mean(0)
        none = torch.ones(worlds.num_agents, device=self.device)
        if not self.args.scale_rewards:
            return none
        return torch.where(scale.sums.any(), scale.deviation(), none)


# --- 5. The paper ---------------------------------------------------------------------------------


def same_agents(
    before: Population, after: Population, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the agents that are in both populations, as their indices in `before` and in `after`.
    Of each type these are the first agents."""
    here, there = [], []
    for kind, counts in enumerate(zip(before, after)):
        both = range(min(counts))
        here += [sum(before[:kind]) + k for k in both]
        there += [sum(after[:kind]) + k for k in both]
    here = constant(tuple(here), torch.int64, device)
    there = constant(tuple(there), torch.int64, device)
    return here, there


def hand_over(hidden: Tensor, before: Population, after: Population) -> Tensor:
    """Turn h (B, N, R) of one population into h (B, N', R) of the next. An agent of both keeps its
    h; a new agent gets the mean h of its type."""
    # papers are silent: who remembers what when N changes
    means = [part.mean(1) for part in hidden.split(before, 1)]
    new = per_agent(torch.stack(means), after).transpose(0, 1)  # (B, N', R)
    here, there = same_agents(before, after, hidden.device)
    new[:, there] = hidden[:, here]
    return new


def begin_game(agent: Agent, game: Game, num_worlds: int, last: Memory | None) -> Memory:
    """Return the memory at the start of a game. last: the memory at the end of the trial's previous
    game, or None in the first game of a trial."""
    N, inputs = game.num_agents, NUM_ACTIONS + 2
    hidden = torch.zeros(num_worlds, N, agent.args.rnn_size, device=agent.device)
    previous = torch.zeros(num_worlds, N, inputs, device=agent.device)
    if last is not None and agent.args.memory == "trial":
        hidden = hand_over(last.hidden, last.population, game.population)
        here, there = same_agents(last.population, game.population, agent.device)
        previous[:, there] = last.previous[:, here]
        previous[..., -1] = 1.0  # done
    return Memory(game.population, hidden, previous)


def gae(args: Args, trial: Trial) -> list[Tensor]:
    """Advantages (T, B, N) for each game of a trial, 0 where an agent does not act. For an agent
    that is also in the next game, Eq. (3) goes on there. For others, and at the trial's end, it
    bootstraps from the value of the game's final observation."""
    results: list[Tensor] = []
    following: Played | None = None
    for played in reversed(trial):
        next_value = played.values[-1].clone()  # (B, N)
        running = torch.zeros_like(next_value)
        if following:  # all agents act in its first step
            before, after = played.game.population, following.game.population
            here, there = same_agents(before, after, running.device)
            next_value[:, here] = following.values[0][:, there]
            running[:, here] = results[-1][0][:, there]
        advantages = torch.zeros_like(played.rewards)
        for t in reversed(range(len(advantages))):
            acts, value = played.acts[t], played.values[t]
            # Eq. (3)
            delta = played.rewards[t] + args.gamma * next_value - value
            advantage = delta + args.gamma * args.gae_lambda * running
            advantages[t] = advantage * acts
            # an agent that does not act passes on what the next game gave
            running = torch.where(acts, advantage, running)
            next_value = torch.where(acts, value, next_value)
        results.append(advantages)
        following = played
    return results[::-1]


def clip_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (K,) of ratio, rho in Eq. (4), and advantage, both (K,)."""
    # Eq. (4)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.min(ratio * advantage, clipped * advantage)


# --- 6. Data --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Played:
    """One game of a trial, as recorded in B worlds."""

    game: Game
    obs: Observation  # (T, B, N, ...)
    previous: Tensor  # (T, B, N, A + 2) the rest of x_t, behind c
    acts: Tensor  # (T, B, N) bool: the agent lives, and the game has not ended
    actions: Tensor  # (T, B, N) int64
    log_probs: Tensor  # (T, B, N) float32, of the actions under the policy that acted
    rewards: Tensor  # (T, B, N) float32, divided by their running standard deviation
    values: Tensor  # (T + 1, B, N) float32, the last of the final observation or 0 at an end
    advantages: Tensor | None = None  # (T, B, N) float32, normalised; prepare() sets it
    targets: Tensor | None = None  # (T, B, N) float32; prepare() sets it

    def at(self, worlds: Tensor) -> Played:
        """The same game in some of its worlds, which are given by their indices."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        rows = {name: x[:, worlds] for name, x in tensors.items()}
        obs = Observation(*(x[:, worlds] for x in self.obs))
        return dataclasses.replace(self, obs=obs, **rows)


Trial = list[Played]  # its games, in order


def acting_steps(games: list[Played]) -> Tensor:
    """The steps in which agents act (K,), as indices into all steps (T, B, N) of all games."""
    acts = torch.cat([played.acts.flatten() for played in games])
    return acts.nonzero()[:, 0]  # on a GPU the CPU waits for K, so do it once


def at_steps(xs: Iterable[Tensor], steps: Tensor) -> Tensor:
    """Select these steps (K,) from one tensor (T, B, N, ...) a game -> (K, ...)."""
    return torch.cat([x.flatten(0, 2) for x in xs])[steps]


class Collector:
    """The worlds of one population, and the running standard deviation of its rewards."""

    def __init__(self, args: Args, population: str):
        self.name = population
        first_world = process_rank() * args.num_envs
        self.worlds = make_envs(args, population, args.num_envs, args.seed, first_world)
        self.game = self.worlds.game
        self.reward_scale = RewardScale(self.worlds, sum_over_processes)
        self.returns = EpisodeReturns(self.worlds, sum_over_processes)
        self.worlds.reset()

    def add(self, step: Step, acts: Tensor) -> None:
        """Count a step's rewards and ends; acts (B, N): if nobody acts, a world ended earlier."""
        going = acts.any(1)
        self.reward_scale.add(step.reward, acts)
        self.returns.add(
            step._replace(
                reward=step.reward * acts,
                terminated=step.terminated & going,
                truncated=step.truncated & going,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {
            "worlds": self.worlds.state_dict(),
            "rewards": self.reward_scale.sums,
            **self.returns.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what state_dict() returned."""
        self.worlds.load_state_dict(saved["worlds"])
        self.reward_scale.sums = saved["rewards"].to(self.worlds.device)
        self.returns.load_state_dict(saved)


class TrialPlayer:
    """The policy in B worlds, with its agents' memory; actions are sampled, not greedy.

    It is also a player for envs.particle.episodes, called once a step: a trial has `games` games of
    worlds.horizon calls each. With games=1, a world's memory begins anew with each episode."""

    def __init__(self, agent: Agent, rng: torch.Generator, games: int = 1):
        self.agent, self.rng, self.games = agent, rng, games
        self.worlds: ParticleWorld | None = None
        self.calls = 0  # so far, in these worlds

    def begin(self, worlds: ParticleWorld, first: bool) -> None:
        """Begin a game in all worlds; first: whether it is the first game of a trial."""
        B = worlds.num_worlds
        last = None if first else self.memory
        self.worlds = worlds
        self.memory = begin_game(self.agent, worlds.game, B, last)
        self.playing = torch.ones(B, 1, dtype=torch.bool, device=self.agent.device)

    @torch.no_grad()
    def act(self) -> tuple[Tensor, Tensor]:
        """Draw self.actions (B, N); return their log-probabilities and V, both (B, N)."""
        game, obs = self.worlds.game, self.worlds.obs
        self.acts = obs.alive & self.playing
        log_probs, values, self.memory = self.agent.act(game, obs, self.memory, self.acts)
        self.actions = sample(log_probs, self.rng)
        return pick(log_probs, self.actions), values

    def see(self, reward: Tensor) -> Tensor:
        """Put the last actions and their reward (B, N) into the memory. Returns the reward divided
        by its standard deviation, 0 for agents that did not act."""
        reward = reward * self.acts / self.agent.deviation(self.worlds)
        one_hot = F.one_hot(self.actions, NUM_ACTIONS).to(reward.dtype)
        done = torch.zeros_like(reward)
        new = torch.cat((one_hot, reward[..., None], done[..., None]), -1)
        previous = torch.where(self.acts[..., None], new, self.memory.previous)
        self.memory = self.memory._replace(previous=previous)
        return reward

    def __call__(self, worlds: ParticleWorld) -> Tensor:
        """Draw actions (B, N) for the present observations of the worlds."""
        goes_on = worlds.clocks.time[: worlds.num_worlds, None] > 0  # (B, 1): not at its start
        is_new = worlds is not self.worlds
        if is_new:
            self.calls = 0
        else:
            self.see(worlds.last_reward)
        game, step = divmod(self.calls, worlds.horizon)
        if is_new or (step == 0 and self.games > 1):
            self.begin(worlds, first=game % self.games == 0)
        elif self.games > 1:  # worlds that ended early wait for the others
            self.playing = self.playing & goes_on
        else:
            keeps = goes_on[..., None]
            self.memory = self.memory._replace(
                hidden=self.memory.hidden * keeps, previous=self.memory.previous * keeps
            )
        self.calls += 1
        self.act()
        return self.actions


def play_game(player: TrialPlayer, collector: Collector) -> Played:
    """Play and record one game in all worlds of a population; call player.begin() before."""
    record, seen = collections.defaultdict(list), []
    worlds = collector.worlds
    for _ in range(worlds.horizon):
        seen.append(worlds.obs)
        record["previous"].append(player.memory.previous)
        log_probs, values = player.act()
        step = worlds.step(player.actions)
        collector.add(step, player.acts)
        record["acts"].append(player.acts)
        record["actions"].append(player.actions)
        record["log_probs"].append(log_probs)
        record["values"].append(values)
        record["rewards"].append(player.see(step.reward))
        player.playing = player.playing & ~step.terminated[:, None]
    goes_on = step.alive & player.playing
    _, values, _ = player.agent.act(worlds.game, step.final, player.memory, goes_on)
    record["values"].append(values * goes_on)
    obs = Observation(*(torch.stack(x) for x in zip(*seen)))
    tensors = {name: torch.stack(x) for name, x in record.items()}
    return Played(game=worlds.game, obs=obs, **tensors)


def num_games(args: Args) -> int:
    """G, the number of games of a trial."""
    return args.trial_games or len(args.populations)


def draw_orders(args: Args, number: int, rng: torch.Generator) -> list[list[int]]:
    """Return `number` orders, each with the indices of the populations of a trial's games. --trial
    cycle: one random order, begun at each population; same: one population an order."""
    order = torch.randperm(number, generator=rng).tolist()
    order = gather(order)[0]  # processes play the same populations together
    step = 1 if args.trial == "cycle" else 0
    places = [step * place for place in range(num_games(args))]
    return [[order[(first + place) % number] for place in places] for first in range(number)]


@torch.no_grad()
def collect(
    args: Args, agent: Agent, collectors: list[Collector], rng: torch.Generator
) -> list[Trial]:
    """Play B trials for each order of populations, game by game; return a Trial an order."""
    player, trials = TrialPlayer(agent, rng), []
    for order in draw_orders(args, len(collectors), rng):
        trial: Trial = []
        for number in order:
            collector = collectors[number]
            collector.worlds.reset()
            player.begin(collector.worlds, first=not trial)
            trial.append(play_game(player, collector))
        trials.append(trial)
    return trials


def prepare(args: Args, agent: Agent, trials: list[Trial]) -> None:
    """Set advantages and targets of all games of these trials, in place; update agent.value_norm
    with their returns."""
    games = [played for trial in trials for played in trial]
    steps = acting_steps(games)
    advantages = [x for trial in trials for x in gae(args, trial)]
    returns = [played.values[:-1] + x for played, x in zip(games, advantages)]
    if args.value_norm:
        agent.value_norm.update(moments(at_steps(returns, steps)))
    mean, std = agent.value_norm.mean_std()
    centre, deviation = mean_and_deviation(at_steps(advantages, steps))
    for played, advantage, target in zip(games, advantages, returns):
        played.advantages = (advantage - centre) / (deviation + 1e-5)
        played.targets = (target - mean) / std


def minibatches(args: Args, trials: list[Trial], rng: torch.Generator) -> Iterator[list[Trial]]:
    """Yield an epoch's minibatches: of each order some shuffled worlds, with all their agents."""
    device = trials[0][0].acts.device
    shuffled = [torch.randperm(args.num_envs, generator=rng) for _ in trials]
    dealt = [send(worlds, device).tensor_split(args.minibatches) for worlds in shuffled]
    for part in zip(*dealt):
        yield [[played.at(worlds) for played in trial] for trial, worlds in zip(trials, part)]


# --- 7. Update ------------------------------------------------------------------------------------


def pick(x: Tensor, actions: Tensor) -> Tensor:  # (..., A), (...) -> (...)
    return x.gather(-1, actions[..., None])[..., 0]


def replay(agent: Agent, trial: Trial) -> list[tuple[Tensor, Tensor]]:
    """log pi (T, B, N, A) and V (T, B, N) of the present policy, for each game of a trial."""
    results, memory = [], None
    for played in trial:
        T, B, N = played.acts.shape
        memory = begin_game(agent, played.game, B, memory)
        obs = Observation(*(x.flatten(0, 1) for x in played.obs))
        view = agent.view(played.game, obs)
        log_probs, values, hidden = agent.policy(view, played.previous, memory.hidden, played.acts)
        results.append((log_probs, values))
        memory = memory._replace(hidden=hidden)
    return results


def losses(args: Args, agent: Agent, trials: list[Trial]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss L of Eq. (4) on these trials, and its terms as scalars for the log."""
    games = [played for trial in trials for played in trial]
    steps = acting_steps(games)
    outputs = [output for trial in trials for output in replay(agent, trial)]
    log_probs, values = (at_steps(xs, steps) for xs in zip(*outputs))  # (K, A), (K,)

    def recorded(name: str) -> Tensor:  # (K,)
        return at_steps([getattr(played, name) for played in games], steps)

    difference = pick(log_probs, recorded("actions")) - recorded("log_probs")
    ratio = difference.exp()  # rho
    # Eq. (4)
    objective = clip_objective(ratio, recorded("advantages"), args.clip).mean()
    value_loss = (values - recorded("targets")).square().mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = -objective + args.value_coef * value_loss - args.entropy_coef * entropy
    scalars = {
        "policy_loss": -objective,
        "value_loss": value_loss,
        "entropy": entropy,
        "kl": (ratio - 1 - difference).mean(),  # an estimate of KL(pi_old, pi)
        "clipped": ((ratio - 1).abs() > args.clip).float().mean(),
    }
    return loss, scalars


def update(
    args: Args, agent: Agent, trials: list[Trial], rng: torch.Generator
) -> dict[str, Tensor]:
    """Run PPO's epochs over an iteration's trials. Returns scalars for the log; RunError if one of
    them or a reward is not finite."""
    found, returns = collections.defaultdict(list), {}
    for place, games in enumerate(zip(*trials), start=1):
        scaled = [played.rewards.sum(0).mean() for played in games]
        returns[f"scaled_return/game {place}"] = torch.stack(scaled).mean()
    for _ in range(args.epochs):
        for part in minibatches(args, trials, rng):
            loss, scalars = losses(args, agent, part)
            norm = descend(loss, agent.policy, agent.optimiser, args.max_grad_norm)
            scalars |= {"grad_norm": norm}
            for name, x in scalars.items():
                found[name].append(x.detach())
    means = {name: torch.stack(x).mean() for name, x in found.items()}
    check_finite(rewards=torch.stack(list(returns.values())), **means)
    return means | returns


# --- 8. Evaluate ----------------------------------------------------------------------------------


def evaluate(
    args: Args, agent: Agent, names: list[str], evaluation: Evaluation
) -> dict[str, dict[str, float]]:
    """Play trials with all games in one population; return {row: {figure: value}}. The first game
    is zero-shot; later games show whether memory adapts. The final evaluation adds scripted players
    and unseen populations. names: training populations."""
    world_seed, player_seed, scripted_seed = evaluation.rng.integers(2**31, size=3).tolist()
    unseen = args.eval_populations if evaluation.final else ()
    results = {}
    for population in dict.fromkeys((*names, *unseen)):
        worlds = make_envs(args, population, evaluation.episodes, world_seed)
        rng = torch.Generator().manual_seed(player_seed)
        player = TrialPlayer(agent, rng, num_games(args))
        rows = ["", *(f"game {place}" for place in range(2, num_games(args) + 1))]
        for place, row in enumerate(rows):
            filmed = ("", rows[-1])
            results |= play_all(evaluation, worlds, {row: player}, world_seed + place, filmed)
        if evaluation.final:
            scripted = scripted_players(args.task, scripted_seed)
            results |= play_all(evaluation, worlds, scripted, world_seed)
    return results


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_agent(path: str) -> tuple[Args, Agent]:
    """Load arguments and policy of a run or checkpoint, on the CPU; UsageError if another script
    wrote it."""
    args = saved_args(path, Args)
    args = dataclasses.replace(args, device="cpu", compile=False, num_envs=1)
    saved, _ = load_checkpoint(path)
    own = saved["ranks"][0]["collectors"]
    collectors = [Collector(args, name) for name in own]
    agent = Agent(args, collectors[0].game, torch.device("cpu"))
    restore(agent, saved["agent"], path)
    for collector in collectors:
        collector.reward_scale.sums += own[collector.name]["rewards"]
        agent.reward_scales[collector.name] = collector.reward_scale
    return args, agent


def load_player(path: str, seed: int = 1, games: int = 1) -> Player:
    """The policy of a run or checkpoint as a player for envs.particle.episodes. It plays in every
    population; its memory lasts for this many games."""
    _, agent = load_agent(path)
    return TrialPlayer(agent, torch.Generator().manual_seed(seed), games)


# --- 9. Train -------------------------------------------------------------------------------------


def adapt(args: Args, agent: Agent, collector: Collector) -> None:
    """Copy policy, value norm and average reward scale of the adapted run, in place."""
    saved, _ = load_checkpoint(args.adapt, alike=True)
    nets = {"policy": agent.policy, "value_norm": agent.value_norm}
    restore(nets, saved["agent"], args.adapt)
    sums = [each["rewards"] for each in saved["ranks"][0]["collectors"].values()]
    collector.reward_scale.sums += torch.stack(sums).mean(0).to(agent.device)


def train(args: Args) -> int:
    """Train, or only evaluate with --eval-only; return the exit code."""
    keep_freed_memory()
    with Run(args, table, LINE) as run:
        for name in args.eval_populations:
            make_envs(args, name, num_envs=1, seed=args.seed)  # UsageError now, not after training
        names = [args.population] if args.adapt else list(args.populations)
        collectors = [Collector(args, name) for name in names]
        agent = Agent(args, collectors[0].game, run.device)
        agent.reward_scales = {each.name: each.reward_scale for each in collectors}
        rng = own_generator(args.seed)
        own = {"rng": rng, "collectors": {each.name: each for each in collectors}}
        run.restore(agent=agent)
        run.judge = functools.partial(evaluate, args, agent, names)
        if args.eval_only:
            run.restore_own(own)  # the reward scales
            return run.evaluate_only()
        if args.adapt and not args.resume:
            adapt(args, agent, collectors[0])
        run.begin(args.task, parts={"agent": agent}, own=own)
        while run.goes_on():
            trials = collect(args, agent, collectors, rng)
            run.lap("collect_s")
            prepare(args, agent, trials)
            run.note(update(args, agent, trials, rng))
            run.lap("learn_s")
            games = len(trials) * num_games(args)
            run.advance(games * args.max_episode_steps * args.num_envs * run.size)
            if run.is_due(args.log_every):
                run.log(report_returns([each.returns for each in collectors]))
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                run.evaluate("eval")
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return call(lambda: train(read(argv)))


if __name__ == "__main__":
    leave(main())
