"""EPC (Long et al., ICLR 2020): an evolutionary population curriculum, a baseline of MRA (TMLR).

Parallel sets of agents learn by MADDPG, first in a small population. Each later stage has a larger
population: sets play a tournament, and copies of the best sets' agents form the sets of the next
stage, which learn on.

    fitness    of the agents of a role in a set: their return, averaged over all sets from which the
               agents of the other roles can be; with one role, just their return
    selection  for each role, the fittest sets are parents
    children   for each role a pair of parents, (1,1), (1,2) or (2,2); with several roles, as many
               of all combinations of pairs are drawn as there are sets
    crossover  of N agents of a role, ceil(N/2) are copies from one parent, the rest from the other

    g_ij     = softmax_j q_i . k_ij,   k_ij = K(o_ij),  o_ij = [p_j - p_i, v_j, ...]       Eq. (1)
    e_i      = sum_j g_ij V(o_ij),     pi and Q read o_i and e_i
    L(zeta)  = E (Q(o, a) - y)^2,      y = r + gamma Q'(o', a'),  a' ~ pi'                 Eq. (8)
    dJ       = E grad log pi(a_i | o_i, g_i) Q(o, a), of theta                             Eq. (9)
    dJ       = the same gradient, of omega = {theta, phi}, as g_i = phi(o_i)               Eq. (10)

L(zeta) moves the critic. dJ moves the actor and, through g, phi. The targets Q' and pi' follow.
Each set has --total-timesteps, split equally over stages. The result: each role's fittest agents.

    python baselines/epc_particle.py --task resource --populations 6 9 12 15 --preset cpu
    python baselines/epc_particle.py --task pacman --populations 4,2 6,3 8,4 --preset cpu
    python baselines/epc_particle.py --adapt runs/RUN --populations 48 --preset cpu
    python baselines/epc_particle.py --resume runs/RUN
    python baselines/epc_particle.py --eval-only runs/RUN --eval-populations 48
    torchrun --nproc-per-node 2 baselines/epc_particle.py                    two times 12 worlds

Letters: B worlds, N agents, A actions, M transitions of a minibatch, H hidden units, K units of a
key, S = N parameter sets, Ds and De features of oneself and of another agent. Equations have the
numbers of MRA (TMLR). Choices that the papers leave open: docs/baselines_particle.md. The worlds:
docs/particle.md. The parent: baselines/maddpg_particle.py.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
    leave,
    load_checkpoint,
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

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from envs.particle.episodes import (
    EpisodeReturns,
    Player,
    RewardScale,
    play,
    play_all,
    population_name,
    read_population,
    report_returns,
    scripted_players,
    table,
)
from envs.particle.pairs import FastPairs, grouped_linear, keep_freed_memory
from envs.particle.worlds import Game, Observation, ParticleWorld, constant

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """EPC in particle worlds."""

    # Run
    total_timesteps: Positive = 1_000_000  # environment steps of each set, all worlds and processes
    log_every: Positive = 10_000  # environment steps between lines of metrics.jsonl
    eval_every: Count = 100_000  # environment steps between evaluations in training; 0: none
    eval_episodes: Positive = 100  # episodes per row of the table in evaluations during training
    final_episodes: Count = 1000  # episodes per row, final evaluation or --eval-only; 0: none
    save_every: Count = 200_000  # environment steps between checkpoints (last two kept); 0: at end
    # Environment
    task: str = "treasure"  # world: treasure, resource, pacman, signpost, rooms or delivery
    populations: tuple[str, ...] = ("3", "6", "12", "24")  # one a stage; pacman: 4,2 6,3 8,4
    eval_populations: tuple[str, ...] = ()  # unseen populations of the final evaluation
    adapt: str = ""  # run or checkpoint whose best agents the first stage begins with
    shaping: bool = True  # treasure, pacman, delivery: also reward -.1 x distance to the goal
    collision_penalty: Amount = 0.0  # treasure: subtracted from rewards, per agent touched and step
    num_envs: Positive = 12  # B, parallel worlds in each process
    max_episode_steps: Positive = 20  # steps after which an episode is truncated
    # Method
    sets: Positive = 3  # parallel sets of agents in every stage
    parents: Positive = 2  # number of the fittest sets, whose agents are copied into the next stage
    tournament_episodes: Positive = 200  # episodes of each set; with two roles of each pair of sets
    actor_gradient: Literal["gumbel", "expectation"] = "gumbel"  # Eq. (9): biased, or exact
    target: Literal["polyak", "hard"] = "polyak"  # target networks move by --polyak, or are copied
    polyak: Share = 0.01  # share of the way that target networks go per update (--target polyak)
    inner_steps: Positive = 10  # minibatches per update, as many as in MRA
    hidden_size: Positive = 64  # H, units of a hidden layer
    value_layers: Annotated[int, Interval(ge=1, le=2)] = 2  # layers of V in e_i; MRA prints 1
    own_beside: bool = True  # the actor reads its own features o_s, too; off: e_i alone
    key_size: Positive = 16  # units of each query and key of phi
    head_gain: Above = 2.0  # Xavier gain of the initial weights of queries and keys
    plain: bool = False  # networks of agent pairs: literal and slow (class Pairs); off: equal, fast
    compile: bool = False  # on a GPU: compile worlds and sums over pairs; a CPU has kernels
    # Base algorithm
    learning_rate: Amount = 3e-4  # learning rate of Adam for all networks but phi
    phi_learning_rate: Amount = 3e-4  # learning rate of Adam for phi, the attention network
    gamma: Share = 0.95  # discount factor
    batch_size: Positive = 1024  # M, transitions in a minibatch, over all processes
    buffer_size: Positive = 1_000_000  # transitions that a replay holds, over all processes
    update_every: Positive = 100  # environment steps that a replay gets between updates
    entropy_coef: Amount = 1 / 30  # entropy's weight in the critic's targets and the actor's loss
    scale_rewards: bool = True  # divide rewards by their running standard deviation
    max_grad_norm: Above = 10.0  # gradients of each loss are clipped to this norm


PRESETS = {
    "paper": {},
    "cpu": {
        "num_envs": 64,
        "learning_rate": 1e-3,
        "batch_size": 512,
        "update_every": 256,
        "target": "polyak",
        "polyak": 0.02,
        "inner_steps": 4,
        "compile": True,
    },
}
LINE = ("stage", "return", "critic_loss", "entropy", "sps")  # printed if there is no progress bar
RESUMABLE = ("eval_populations", "plain", "compile")  # flags that may change with --resume
# --adapt keeps these flags of the adapted run, as its agents are copied. It takes no others but
FIXED = ("task", "hidden_size", "value_layers", "own_beside", "key_size", "head_gain")
# the rules of its world, which may be given anew.
WORLD = ("shaping", "collision_penalty", "max_episode_steps")


def validate(args: Args) -> list[tuple[Any, str]]:
    """Flag combinations to refuse, each as (whether args has it, error message)."""
    usual = PRESETS[args.preset].get("polyak", Args.polyak)
    begins = not (args.resume or args.eval_only)
    idle = begins and args.target == "hard" and args.polyak != usual
    names = args.populations
    length = args.total_timesteps // max(len(names), 1)  # of a stage
    return [
        (not names, "--populations is empty"),
        (len(set(names)) < len(names), "--populations has one twice"),
        (args.parents > args.sets, "--parents exceeds --sets"),
        (length < args.num_envs, "--total-timesteps: some stage has no step of its --num-envs"),
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size"),
        (idle, "--polyak needs --target polyak"),
    ]


def read(argv: list[str]) -> Args:
    """Read the command line on top of what --preset, --resume or --eval-only stand for; with
    --adapt also on top of FIXED and WORLD of the adapted run. UsageError for flags that must not
    differ."""
    given = read_flags(Args, argv)
    if not given.adapt or given.resume or given.eval_only:
        return read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS)
    source, own = given.adapt, saved_args(given.adapt, Args, whole=True)
    default = Args(preset=given.preset, **PRESETS[given.preset])
    default = dataclasses.replace(default, **{name: getattr(own, name) for name in FIXED + WORLD})
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


class View(NamedTuple):
    """Observations of N agents at M moments, as the networks read them."""

    own: Tensor  # (M, N, Ds) o_s, an agent's own features
    others: Tensor  # (M, N, De) features of each agent j; o_ij has p_j - p_i in place of p_j
    alive: Tensor  # (M, N) bool
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


# [shared: mean_entity] begin
def mean_entity(others: Tensor, g: Tensor) -> Tensor:
    """Return sum_j g_ij o_ij (M, N, De) for others (M, N, De) and graphs g (M, N, N)."""
    position = others[..., :2] * g.sum(-1, keepdim=True)
    mean = g @ others
    return torch.cat((mean[..., :2] - position, mean[..., 2:]), -1)


# [shared: mean_entity] end


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


class GraphNet(nn.Module):
    """Actor (theta) or critic (zeta): layers above o_s and e_i = sum_j g_ij V(o_ij). e_i is 0
    for an agent that sees nobody."""

    def __init__(
        self, sets: int, own_size: int, entity_size: int, outputs: int, gain: float, args: Args
    ):
        super().__init__()
        H = args.hidden_size
        self.pairs = Pairs if args.plain else functools.partial(FastPairs, compiled=args.compile)
        self.own_size = own_size
        self.own = MLP(sets, own_size, H, H)
        self.linear = args.value_layers == 1
        self.entity = None if self.linear else Linear(sets, entity_size, H, gain=RELU)
        self.value = Linear(sets, entity_size if self.linear else H, H)
        self.out = Linear(sets, H, outputs, gain)

    def forward(self, view: View, g: Tensor, actions: Tensor | None = None) -> Tensor:
        """Logits or Q (M, N, A) with graphs g (M, N, N); a critic also reads actions (M, N)."""
        others = view.others
        if actions is not None:  # of the others: g_ii = 0 leaves out agent i's own
            actions = F.one_hot(actions, NUM_ACTIONS).to(others.dtype)
            others = torch.cat((others, actions), -1)
        x = self.own(view.own[..., : self.own_size], view.counts)
        if self.linear:  # V is linear: V of the mean is the mean of V
            e = self.value(mean_entity(others, g), view.counts)
            e = e * view.mask.any(-1, keepdim=True)  # no bias if nobody is seen
        else:
            pairs = self.pairs(others, self.entity.weight, self.entity.bias, view.counts)
            e = pairs.sums(g, self.value.weight, self.value.bias)
        return self.out(F.relu(x + e, inplace=True), view.counts)


# [shared: sample] begin
def gumbel(like: Tensor, rng: torch.Generator) -> Tensor:
    """Gumbel noise with the shape and device of a tensor, drawn on the CPU by rng."""
    noise = torch.empty(like.shape).exponential_(generator=rng)
    return send(-noise.log(), like.device)


def sample(log_probs: Tensor, rng: torch.Generator) -> Tensor:
    """Draw actions (...) from log_probs (..., A): the argmax after adding Gumbel noise."""
    return (log_probs + gumbel(log_probs, rng)).argmax(-1)


# [shared: sample] end


class Agent(Parts):
    """The networks and their optimisers."""

    def __init__(self, args: Args, game: Game, device: torch.device):
        self.args, self.game, self.device = args, game, device
        own, entity, N = game.own_features, game.entity_features, game.num_agents
        torch.manual_seed(args.seed)
        self.attention = RelationGraph(N, own, entity, args).to(device)
        net = functools.partial(GraphNet, N, args=args)
        # A small last layer: the first policy tries all actions about equally.
        beside = own if args.own_beside else 0
        actor = net(beside, entity, NUM_ACTIONS, gain=0.1)
        self.actor = actor.to(device)
        # The critic also reads the others' actions.
        critic = net(own, entity + NUM_ACTIONS, NUM_ACTIONS, gain=1.0)
        self.critic = critic.to(device)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic = copy.deepcopy(self.critic)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        attention = {"params": self.attention.parameters(), "lr": args.phi_learning_rate}
        actor = {"params": self.actor.parameters()}
        self.actor_optimiser = adam([actor, attention])
        self.critic_optimiser = adam(self.critic.parameters())

    def view(self, game: Game, obs: Observation) -> View:
        """The networks' input for observations of a game."""
        return View(
            own=obs.own.contiguous(),
            others=obs.others.contiguous(),
            alive=obs.alive.contiguous(),
            mask=obs.mask(),
            counts=(1,) * game.num_agents,
        )

    @torch.no_grad()
    def follow(self) -> None:
        """Move target networks by --polyak towards actor and critic, or copy these into them."""
        step = self.args.polyak if self.args.target == "polyak" else 1.0
        pairs = (self.target_actor, self.actor), (self.target_critic, self.critic)
        for target, net in pairs:
            torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), step)


# --- 5. The paper ---------------------------------------------------------------------------------

ACTING = ("attention", "actor")
NETWORKS = (*ACTING, "critic", "target_actor", "target_critic")
Source = tuple[Agent, int]  # an agent to copy: its set, its index in it
Family = tuple[tuple[int, int], ...]  # of a child: the indices of its two parents, for each role


def team(args: Args, agents: list[Agent], choice: Sequence[int]) -> Agent:
    """Return a new set, whose agents of role r are copies of those of agents[choice[r]]."""
    game = agents[0].game
    sources = [(agents[choice[role]], i) for i, role in enumerate(game.types)]
    return copy_agents(sources, Agent(args, game, agents[0].device))


def tournament(args: Args, agents: list[Agent], stage: int) -> np.ndarray:
    """Return the fitness of the sets (roles, sets). For every choice of one set per role, the
    agents of these sets play together, always in the same episodes."""
    game, episodes = agents[0].game, args.tournament_episodes
    roles, sets = len(game.population), len(agents)
    rng = np.random.default_rng((args.seed, stage, 2))
    world_seed, player_seed = rng.integers(2**31, size=2).tolist()
    worlds = make_envs(args, population_name(game), episodes, world_seed)
    returns = np.zeros((sets,) * roles + (roles,))
    with contextlib.closing(Evaluation(args, "tournament", stage, Path())) as evaluation:
        evaluation.expect(episodes * sets**roles)
        for choice in itertools.product(range(sets), repeat=roles):
            worlds.seed(world_seed)
            player = net_player(team(args, agents, choice), player_seed)
            returns[choice] = play(worlds, player, progress=evaluation.progress).mean(0)
    return fitness(returns)


def fitness(returns: np.ndarray) -> np.ndarray:
    """Average returns over the sets of the other roles -> (roles, sets). returns (sets, ..., sets,
    roles): axis r is the set from which the agents of role r are; the last axis is the role."""
    means = []
    for role in range(returns.shape[-1]):
        own = np.moveaxis(returns[..., role], role, 0)  # (sets, ...)
        means.append(own.reshape(len(own), -1).mean(1))
    return np.stack(means)


def rank(scores: np.ndarray) -> np.ndarray:
    """Sort the sets of each role, the fittest first: indices (roles, sets) from scores."""
    return np.argsort(-scores, axis=1, kind="stable")


def draw(number: int, have: int, rng: np.random.Generator) -> list[int]:
    """Draw `number` of range(have), sorted; none comes again before all have been drawn."""
    rounds = [rng.permutation(have) for _ in range(number // have + 1)]
    return sorted(np.concatenate(rounds)[:number].tolist())


def families(parents: np.ndarray, children: int, rng: np.random.Generator) -> list[Family]:
    """Draw `children` of all combinations of a pair per role from parents (roles, parents)."""
    pairs = [itertools.combinations_with_replacement(best.tolist(), 2) for best in parents]
    every = list(itertools.product(*pairs))
    return [every[i] for i in draw(children, len(every), rng)]


def crossover(
    parents: list[tuple[Agent, ...]], population: tuple[int, ...], rng: np.random.Generator
) -> list[Source]:
    """Return the agents from which a child is copied. Each role takes equal numbers of agents from
    its parents, and one more from the first if its number is odd. A parent that comes twice counts
    as one: agents are copied twice only if it has too few."""
    sources = []
    for role, given in enumerate(parents):
        given = given[:1] if given[0] is given[-1] else given
        shares = np.array_split(range(population[role]), len(given))
        for parent, share in zip(given, shares):
            old = parent.game.population
            chosen = draw(len(share), old[role], rng)
            sources += [(parent, sum(old[:role]) + i) for i in chosen]
    return sources


@torch.no_grad()
def copy_agents(sources: list[Source], into: Agent, networks: tuple[str, ...] = NETWORKS) -> Agent:
    """Copy the named networks of each source i into agent i of the set `into`; return `into`."""
    for i, (parent, j) in enumerate(sources):
        for name in networks:
            theirs = getattr(parent, name).parameters()
            for own, other in zip(getattr(into, name).parameters(), theirs):
                own[i] = other[j]
    return into


def resized(args: Args, agent: Agent, game: Game, networks: tuple[str, ...] = NETWORKS) -> Agent:
    """Return a set for another population: copies of some agents, or of all and some twice."""
    parents = [(agent,)] * len(game.population)
    sources = crossover(parents, game.population, np.random.default_rng(args.seed))
    return copy_agents(sources, Agent(args, game, agent.device), networks)


# --- 6. Data --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A minibatch of M transitions."""

    view: View  # o
    next_view: View  # o', after the step and before a new episode begins
    actions: Tensor  # (M, N) int64
    rewards: Tensor  # (M, N) float32, divided by their running standard deviation
    terminated: Tensor  # (M,) bool


class ReplayBuffer:
    """Transitions of one population, and the running standard deviation of its rewards. States of
    worlds are stored; observations and graphs are computed again for each minibatch."""

    def __init__(self, args: Args, worlds: ParticleWorld, device: torch.device):
        self.args, self.worlds, self.device = args, worlds, device
        self.game, self.steps = worlds.game, 0  # environment steps stored so far
        size, N, S = args.buffer_size, self.game.num_agents, self.game.state_size
        self.reward_scale = RewardScale(worlds, sum_over_processes)
        self.rows = {
            "state": torch.empty(size, S, device=device),
            "final_state": torch.empty(size, S, device=device),  # before a new episode
            "actions": torch.empty(size, N, dtype=torch.int8, device=device),
            "rewards": torch.empty(size, N, device=device),  # not scaled
            "terminated": torch.empty(size, dtype=torch.bool, device=device),
        }

    @property
    def size(self) -> int:
        return min(self.steps, self.args.buffer_size)

    def add(self, row: dict[str, Tensor], alive: Tensor) -> None:
        """Store one step of all worlds: row has tensors (B, ...); alive (B, N) before the step."""
        end = self.steps + len(alive)
        place = torch.arange(self.steps, end, device=self.device) % self.args.buffer_size
        for name, x in row.items():
            kept = self.rows[name]
            assert torch.can_cast(x.dtype, kept.dtype), f"the replay has {name} as {kept.dtype}"
            kept[place] = x.to(kept.dtype)
        self.reward_scale.add(row["rewards"], alive)
        self.steps = end

    def sample(self, agent: Agent, rng: torch.Generator, size: int) -> Batch:
        """Draw a minibatch of `size` transitions, uniformly and with replacement."""
        index = torch.randint(0, self.size, (size,), generator=rng)
        index = send(index, self.device)
        row = {name: x[index] for name, x in self.rows.items()}
        obs = self.worlds.observe(row["state"])
        next_obs = self.worlds.observe(row["final_state"])
        rewards = row["rewards"]
        if self.args.scale_rewards:
            # paper is silent: the mean is not subtracted; that would change games that end early
            rewards = rewards / self.reward_scale.deviation()
        return Batch(
            view=agent.view(self.game, obs),
            next_view=agent.view(self.game, next_obs),
            actions=row["actions"].long(),
            rewards=rewards,
            terminated=row["terminated"],
        )

    def filled(self) -> dict[str, Tensor]:
        """The rows that hold transitions, for a checkpoint: {name: (size, ...)}."""
        return {name: x[: self.size] for name, x in self.rows.items()}

    def refill(self, rows: dict[str, Tensor]) -> None:
        """Restore the rows that filled() returned."""
        for name, x in rows.items():
            self.rows[name][: len(x)] = x


class Collector:
    """The worlds of one population, the episodes that run in them, and the replay they fill."""

    def __init__(self, args: Args, population: str, device: torch.device):
        self.name, self.device = population, device
        first_world = process_rank() * args.num_envs
        self.worlds = make_envs(args, population, args.num_envs, args.seed, first_world)
        self.game = self.worlds.game
        self.buffer = ReplayBuffer(args, self.worlds, device)
        self.returns = EpisodeReturns(self.worlds, sum_over_processes)
        self.worlds.reset()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores, except for the rows of the replay."""
        return {
            "worlds": self.worlds.state_dict(),
            "steps": self.buffer.steps,
            "rewards": self.buffer.reward_scale.sums,
            **self.returns.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what state_dict() returned."""
        self.worlds.load_state_dict(saved["worlds"])
        self.buffer.steps = saved["steps"]
        self.buffer.reward_scale.sums = saved["rewards"].to(self.device)
        self.returns.load_state_dict(saved)


class ParallelSet(NamedTuple):
    """One of the sets of a stage: agents with worlds, replay and random numbers of their own."""

    agent: Agent
    collector: Collector
    rng: torch.Generator

    def parts(self) -> dict[str, Any]:
        """What a checkpoint stores, except for the agents and the rows of the replay."""
        return {"rng": self.rng, "collector": self.collector}


class Evolution:
    """The parallel sets, the best set of each finished stage, and the ends of the stages."""

    def __init__(self, args: Args, device: torch.device, saved: dict[str, Any]):
        """saved: parts() of a checkpoint or {}; restore() puts back its networks afterwards."""
        self.args, self.device = args, device
        total, stages = args.total_timesteps, len(args.populations)
        equal = [total * s // stages for s in range(1, stages)]
        self.ends = saved.get("ends", equal)  # in steps of each set; the run ends the last stage
        self.finished = saved.get("finished", 0)  # number of finished stages
        self.best: dict[str, Agent] = {}  # by population
        for name in args.populations[: self.finished]:
            game = make_envs(args, name, num_envs=1, seed=args.seed).game
            self.best[name] = Agent(args, game, device)
        self.sets: dict[str, ParallelSet] = {}  # these two are filled anew in each stage
        self.replays: dict[str, ReplayBuffer] = {}
        self.begin([[]] * args.sets)

    @property
    def stage(self) -> int:
        return min(self.finished, len(self.ends))

    @property
    def population(self) -> str:
        return self.args.populations[self.stage]

    @property
    def agents(self) -> list[Agent]:
        return [each.agent for each in self.sets.values()]

    def parts(self) -> dict[str, Any]:
        """What a checkpoint stores as "agent"."""
        sets = {k: each.agent for k, each in self.sets.items()}
        return {"sets": sets, "best": self.best, "ends": self.ends, "finished": self.finished}

    def begin(self, children: list[list[Source]]) -> None:
        """Begin a stage with a set for each child: copies of its sources, or for [] new agents."""
        for k, sources in enumerate(children):
            number = self.stage * len(children) + k
            seed = (self.args.seed + 1_000_003 * number) % 2**32  # torch uses 32 bits
            args = dataclasses.replace(self.args, seed=seed)
            collector = Collector(args, self.population, self.device)
            agent = Agent(args, collector.game, self.device)
            if sources:
                copy_agents(sources, agent)
            rng = own_generator(seed)
            self.sets[str(k)] = ParallelSet(agent, collector, rng)
            self.replays[str(k)] = collector.buffer

    def is_over(self, timesteps: int) -> bool:
        """Whether the present stage is over after this many environment steps of each set."""
        return timesteps >= [*self.ends, self.args.total_timesteps][self.stage]

    def reopen(self) -> None:
        """Continue the last stage after its tournament, because the run has become longer."""
        self.best.pop(self.population, None)
        self.finished = self.stage

    def results(self) -> dict[str, Agent]:
        """The best set of each stage by population; of an unfinished stage, by a tournament now."""
        best, name = dict(self.best), self.population
        if name not in best:
            scores = tournament(self.args, self.agents, self.stage)
            best[name] = team(self.args, self.agents, rank(scores)[:, 0])
        return best

    def select(self, scores: np.ndarray) -> str:
        """End a stage with its fitness scores (roles, sets): keep the best set and, except after
        the last stage, begin the next one with children. Returns a text that describes this."""
        args, agents, stage = self.args, self.agents, self.stage
        ranks = rank(scores)
        order = "; ".join(" ".join(map(str, sets)) for sets in ranks)
        text = f"population {self.population}: sets, the fittest first: {order}"
        self.best[self.population] = team(args, agents, ranks[:, 0])
        self.finished = stage + 1
        if self.stage > stage:
            rng = np.random.default_rng((args.seed, stage, 3))
            population = read_population(self.population)
            children, chosen = [], families(ranks[:, : args.parents], args.sets, rng)
            for family in chosen:
                parents = [(agents[one], agents[other]) for one, other in family]
                children.append(crossover(parents, population, rng))
            self.begin(children)
            names = [" ".join(f"{a}x{b}" for a, b in family) for family in chosen]
            text += f"; population {self.population}: children {', '.join(names)}"
        return text


def adapt(args: Args, evolution: Evolution) -> None:
    """Begin all sets as copies of the adapted run's best agents."""
    load_checkpoint(args.adapt, alike=True)  # UsageError if agents would differ
    _, agent = load_agent(args.adapt)
    game = evolution.agents[0].game
    same = resized(args, agent, game)
    evolution.begin([[(same, i) for i in range(game.num_agents)]] * args.sets)


@torch.no_grad()
def collect(agent: Agent, collector: Collector, rng: torch.Generator) -> None:
    """Take one step in all worlds and store it in the replay."""
    worlds = collector.worlds
    state = worlds.state
    view = agent.view(collector.game, worlds.obs)
    logits = agent.actor(view, agent.attention(view))
    actions = sample(logits.log_softmax(-1), rng)  # (B, N)
    step = worlds.step(actions)
    row = {"state": state, "final_state": step.final_state, "actions": actions}
    row |= {"rewards": step.reward, "terminated": step.terminated}
    collector.buffer.add(row, view.alive)
    collector.returns.add(step)


# --- 7. Update ------------------------------------------------------------------------------------


# [shared: losses] begin
def mean(x: Tensor, alive: Tensor) -> Tensor:
    """Mean () of x (..., N) over living agents."""
    return (x * alive).sum() / alive.sum().clamp(min=1)


def pick(x: Tensor, actions: Tensor) -> Tensor:  # (M, N, A), (M, N) -> (M, N)
    return x.gather(-1, actions[..., None])[..., 0]


def critic_loss(
    args: Args, agent: Agent, batch: Batch, g: Tensor, next_g: Tensor, rng: torch.Generator
) -> Tensor:
    """Loss () of Eq. (8); g, next_g (M, N, N) are the graphs at o and o'. The target has an entropy
    bonus -log pi'(a') as in MRA's code, but discounted."""
    next_view = batch.next_view
    with torch.no_grad():
        log_probs = agent.target_actor(next_view, next_g).log_softmax(-1)
        actions = sample(log_probs, rng)  # MRA's paper and code differ: at o', in the code at o
        next_q = pick(agent.target_critic(next_view, next_g, actions), actions)
        next_q = next_q - args.entropy_coef * pick(log_probs, actions)
        goes_on = next_view.alive * ~batch.terminated[:, None]
        target = batch.rewards + args.gamma * next_q * goes_on
    # Eq. (8)
    q = agent.critic(batch.view, g, batch.actions)
    q = pick(q, batch.actions)
    return mean((q - target).square(), batch.view.alive)


def actor_loss(
    args: Args, agent: Agent, batch: Batch, g: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss () of Eq. (9), or of (10) if g (M, N, N) carries gradients; and the mean entropy ()."""
    log_probs = agent.actor(batch.view, g).log_softmax(-1)  # (M, N, A)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    if args.actor_gradient == "gumbel":  # as Lowe et al.: the others' actions are the replay's
        others = batch.actions
        soft = (log_probs + gumbel(log_probs, rng)).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), NUM_ACTIONS)
        probs = hard + soft - soft.detach()  # straight-through estimator
    else:  # the exact expectation over an agent's own actions, with the others' sampled
        others = sample(log_probs, rng)
        probs = log_probs.exp()
    with torch.no_grad():
        q = agent.critic(batch.view, g, others)  # (M, N, A): Q of each own action
    # Eq. (9)
    objective = (probs * q).sum(-1) + args.entropy_coef * entropy
    return -mean(objective, batch.view.alive), mean(entropy, batch.view.alive)


# [shared: losses] end


def update(
    args: Args, agent: Agent, collector: Collector, rng: torch.Generator
) -> dict[str, Tensor]:
    """Some minibatch steps of critic and actor, then one of the target networks. Returns scalars
    for the log; RunError if one of them or a reward is not finite."""
    scalars = collections.defaultdict(list)
    policy = nn.ModuleList((agent.actor, agent.attention))
    limit, buffer = args.max_grad_norm, collector.buffer
    for _ in range(args.inner_steps):
        batch = buffer.sample(agent, rng, args.batch_size)
        g = agent.attention(batch.view)
        with torch.no_grad():
            next_g = agent.attention(batch.next_view)
        loss = critic_loss(args, agent, batch, g.detach(), next_g, rng)
        scalars["critic_loss"].append(loss.detach())
        norm = descend(loss, agent.critic, agent.critic_optimiser, limit)
        scalars["critic_grad_norm"].append(norm)
        loss, entropy = actor_loss(args, agent, batch, g, rng)
        scalars["actor_loss"].append(loss.detach())
        scalars["entropy"].append(entropy.detach())
        norm = descend(loss, policy, agent.actor_optimiser, limit)
        scalars["actor_grad_norm"].append(norm)
    agent.follow()
    means = {name: torch.stack(x).mean() for name, x in scalars.items()}
    check_finite(rewards=buffer.reward_scale.sums, **means)
    return means


# --- 8. Evaluate ----------------------------------------------------------------------------------


def net_player(agent: Agent, seed: int) -> Player:
    """The agents as a player for envs.particle.episodes; actions are sampled, not greedy."""
    rng = torch.Generator().manual_seed(seed)

    def act(worlds: ParticleWorld) -> Tensor:  # (B, N)
        view = agent.view(worlds.game, worlds.obs)
        logits = agent.actor(view, agent.attention(view))
        return sample(logits.log_softmax(-1), rng)

    return act


def evaluate(
    args: Args, evolution: Evolution, evaluation: Evaluation
) -> dict[str, dict[str, float]]:
    """Play episodes; return {row: {figure: value}}. During training, all sets play in the stage's
    population. At the end, each stage's best set plays in its population, that of the last stage
    (resized) in all others, and so do scripted players."""
    world_seed, player_seed, scripted_seed = evaluation.rng.integers(2**31, size=3).tolist()
    if not evaluation.final:
        worlds = make_envs(args, evolution.population, evaluation.episodes, world_seed)
        players = {f"set={k}": net_player(x, player_seed) for k, x in enumerate(evolution.agents)}
        return play_all(evaluation, worlds, players, world_seed, filmed=players)
    best, results = evolution.results(), {}
    last = best[evolution.population]
    for name in dict.fromkeys((*best, *args.eval_populations)):
        worlds = make_envs(args, name, evaluation.episodes, world_seed)
        moved = net_player(resized(args, last, worlds.game, ACTING), player_seed)
        players = {"": net_player(best[name], player_seed) if name in best else moved}
        if best.get(name, last) is not last:
            players["last stage"] = moved
        players |= scripted_players(args.task, scripted_seed)
        results |= play_all(evaluation, worlds, players, world_seed)
    return results


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_agent(path: str) -> tuple[Args, Agent]:
    """Load arguments and the last stage's best set of a run or checkpoint, on the CPU; UsageError
    if another script wrote it. For a run that is not over sets play a tournament at every call."""
    args = saved_args(path, Args)
    args = dataclasses.replace(args, device="cpu", compile=False, num_envs=1, buffer_size=1)
    saved, _ = load_checkpoint(path)
    evolution = Evolution(args, torch.device("cpu"), saved["agent"])
    restore(evolution, saved["agent"], path)
    return args, evolution.results()[evolution.population]


def load_player(path: str, seed: int = 1) -> Player:
    """The best agents of a run or checkpoint as a player for envs.particle.episodes. It plays in
    every population; agents are copied or left out to fit it."""
    args, agent = load_agent(path)

    @functools.cache
    @torch.random.fork_rng(devices=[])
    def player(game: Game) -> Player:
        return net_player(resized(args, agent, game, ACTING), seed)

    return lambda worlds: player(worlds.game)(worlds)


# --- 9. Train -------------------------------------------------------------------------------------


def report(evolution: Evolution, scores: np.ndarray | None) -> dict[str, float]:
    """Scalars for the log: the stage; returns of episodes that ended since the last report, of each
    set and their means; and scores, the fitness (roles, sets), where a stage is over."""
    scalars, found = {"stage": evolution.stage + 1.0}, collections.defaultdict(list)
    for k, each in evolution.sets.items():
        for name, x in report_returns([each.collector.returns]).items():
            scalars[f"{name}/set={k}"] = x
            found[name].append(x)
    scalars |= {name: sum(x) / len(x) for name, x in found.items()}
    for role, row in enumerate([] if scores is None else scores.tolist()):
        name = f"fitness/{evolution.population}/{role}"
        scalars |= {f"{name}/set={k}": x for k, x in enumerate(row)}
    return scalars


def train(args: Args) -> int:
    """Train, or only evaluate with --eval-only; return the exit code."""
    keep_freed_memory()
    with Run(args, table, LINE) as run:
        args = run.own_share(args, "batch_size", "buffer_size", "update_every")
        check(validate(args))  # again: a step of its worlds must fit into a process's share
        too_short = args.total_timesteps // len(args.populations) < args.num_envs * run.size
        check([(too_short, "--total-timesteps: some stage has no step of all processes' worlds")])
        for name in (*args.populations, *args.eval_populations):
            make_envs(args, name, num_envs=1, seed=args.seed)  # UsageError now, not after training
        evolution = Evolution(args, run.device, run.saved.get("agent", {}))
        begins = max(evolution.ends, default=0)  # of the last stage, which may get longer
        early = args.resume and args.total_timesteps <= begins
        check([(early, f"--total-timesteps: the last stage of {args.resume} begins at {begins}")])
        run.restore(agent=evolution)
        run.judge = functools.partial(evaluate, args, evolution)
        if args.eval_only:
            return run.evaluate_only()
        if args.adapt and not args.resume:
            adapt(args, evolution)
        all_sets = args.sets * args.total_timesteps
        run.begin(
            args.task,
            parts={"agent": evolution},
            own={"sets": evolution.sets},
            replays=evolution.replays,
            stage_ends=[*evolution.ends, args.total_timesteps],
            all_sets_timesteps=all_sets,
        )
        run.say(f"{args.sets} sets, {args.total_timesteps} steps each, {all_sets} in all")
        if run.timesteps < args.total_timesteps:
            evolution.reopen()
        while run.goes_on():
            for each in evolution.sets.values():
                buffer = each.collector.buffer
                before = buffer.steps // args.update_every
                collect(each.agent, each.collector, each.rng)
                run.lap("collect_s")
                due = buffer.steps // args.update_every - before  # multiples that were passed
                for _ in range(due if buffer.size >= args.batch_size else 0):
                    run.note(update(args, each.agent, each.collector, each.rng))
                run.lap("learn_s")
            run.advance(args.num_envs * run.size)
            scores = None
            if evolution.is_over(run.timesteps):
                contest = functools.partial(tournament, args, evolution.agents, evolution.stage)
                scores = run.in_first(contest)
            if scores is not None or run.is_due(args.log_every):
                steps = {"all_sets_timesteps": args.sets * run.timesteps}
                run.log(report(evolution, scores) | steps)
            if scores is not None:
                run.say(evolution.select(scores))
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
