"""MRA (TMLR): meta representations that generalise to populations never met in training.

A latent z picks one of six graphs g = phi(o, z), and g weights the agents that an agent attends to.
One policy theta learns to act well with the graphs that it meets in all populations m. phi learns
graphs that make a difference to the actions. The prior p_psi(z|m) learns to draw z whose graphs
tell the populations apart; it reads numbers of agents only, so it also serves unseen populations.

    g_ij       = softmax_j q_i . k_ij,  e_i = sum_j g_ij V(o_ij),  o_ij = [p_j - p_i, ...]  Eq. (1)
    L(zeta)    = E (Q(o, a, g) - y)^2,  y = r + gamma Q'(o', a', g'),  a' ~ pi'             Eq. (8)
    dJ(theta)  = E grad log pi(a_i | o_i, g_i) Q(o, a, g)                                   Eq. (9)
    I(g; a|o)  >= E log pi'(a | o, g) / p(a | o),  p(a | o) = E_z pi'(a | o, phi(o, z))     Eq. (11)
    L(psi, xi) = E_z~p_psi(z|m) [- log p_xi(m | o, phi(o, z))]                              Eq. (13)

L(zeta) moves the critic; dJ the actor and, as Eq. (10), by which the paper only adapts, phi, with
Reptile's step (Sec. 4.4); L(psi, xi) the population classifier xi. phi and the latent prior psi
learn by I(g; a|o) and L(psi, xi), as in Eqs. (5), (7). Targets Q', pi' follow. In Algorithm 4 dJ
moves the actor alone, I(g; a|o) phi, L(psi, xi) psi and xi: --phi-gradient mi --no-psi-information.

    python mra_maddpg_particle.py --task resource --populations 6 9 12 --preset cpu
    python mra_maddpg_particle.py --adapt runs/RUN --population 24            or 2,8 for two types
    python mra_maddpg_particle.py --resume runs/RUN --total-timesteps 2000000
    python mra_maddpg_particle.py --eval-only runs/RUN --eval-populations 3 7 10 13 18 24
    torchrun --nproc-per-node 2 mra_maddpg_particle.py          two times 12 worlds a population

Letters: B worlds, N agents, A actions, M transitions of a minibatch, H hidden units, K units of a
key or minibatches per update, S parameter sets, Z latents, P populations, Ds and De features of
oneself and of another agent. Choices that the paper leaves open: docs/mra.md. The worlds:
docs/particle.md. The parent, without the method: baselines/maddpg_particle.py.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import math
import sys
import weakref
from typing import Annotated, Any, Literal, NamedTuple

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
from annotated_types import Interval
from torch import Tensor, nn

from envs.particle.episodes import (
    EpisodeReturns,
    Player,
    RewardScale,
    best_of,
    first_unclear,
    number_of,
    play_all,
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
    """MRA in particle worlds. Most sizes and rates are the paper's or its code's (docs/mra.md)."""

    # Run
    preset: Literal["paper", "cpu", "relation"] = "paper"  # named values of flags (docs/mra.md)
    total_timesteps: Positive = 1_000_000  # environment steps, summed over all worlds and processes
    log_every: Positive = 10_000  # environment steps between lines of metrics.jsonl
    eval_every: Count = 100_000  # environment steps between evaluations in training; 0: none
    eval_episodes: Positive = 100  # per row, evaluations in training; in the final one per z tried
    final_episodes: Count = 1000  # episodes per row, final evaluation or --eval-only; 0: none
    save_every: Count = 200_000  # environment steps between checkpoints (last two kept); 0: at end
    # Environment
    task: str = "treasure"  # world: treasure, resource, pacman, signpost, rooms or delivery
    populations: tuple[str, ...] = ("3", "6", "12", "24")  # m, training; pacman: 4,2 6,3 8,4
    adapt: str = ""  # run or checkpoint to adapt to --population (Algorithm 5)
    population: str = ""  # new population, with --adapt
    eval_populations: tuple[str, ...] = ()  # unseen populations of the final evaluation
    shaping: bool = True  # treasure, pacman, delivery: also reward -.1 x distance to the goal
    collision_penalty: Amount = 0.0  # treasure: subtracted from rewards, per agent touched and step
    num_envs: Positive = 12  # B, parallel worlds of each population in each process
    max_episode_steps: Positive = 20  # steps after which an episode is truncated
    # Method
    latent_size: Annotated[int, Interval(ge=1, le=128)] = 6  # Z, number of z; with 1 Eq. (11) is 0
    representation: Literal["option", "concat", "bilinear"] = "option"  # how phi reads z (Fig. 7)
    latent_prior: Literal["learned", "uniform", "told"] = "learned"  # p(z|m); told: z is m's number
    reptile_step: Share = 1.0  # alpha, share of the K inner steps that Reptile keeps
    share_parameters: bool = True  # one parameter set per type of agent, not one per agent
    actor_gradient: Literal["gumbel", "expectation"] = "expectation"  # Eq. (9): biased, or exact
    # phi learns by: Eq. (10) (actor), (11) (mi), (11) and (13) (both), or all three (both+actor)
    phi_gradient: Literal["actor", "mi", "both", "both+actor"] = "both+actor"
    psi_information: bool = True  # psi by Eqs. (11) and (13); off: by (13) alone
    redraw_z: bool = False  # minibatches draw z anew from p(z|m); off: they have those that acted
    xi_reads_z: bool = False  # the population classifier xi reads z, too, as in the authors' code
    critic_reads_z: bool = False  # the critic's V has a first layer for each z
    critic_graph: Literal["policy", "own", "uniform"] = "policy"  # by which it attends; own: by (8)
    psi_input: Literal["tenth", "standardised"] = "tenth"  # how psi reads numbers of agents
    psi_entropy: Count = 0  # environment steps in which the weight of psi's entropy falls to 0
    tell_population: Literal["nobody", "critic", "all"] = "nobody"  # who reads m; all: actor too
    target: Literal["polyak", "hard"] = "hard"  # target networks move by --polyak, or are copied
    polyak: Share = 0.01  # share of the way that target networks go per update (--target polyak)
    inner_steps: Positive = 10  # K, minibatches per update
    hidden_size: Positive = 64  # H, units of a hidden layer
    value_layers: Annotated[int, Interval(ge=1, le=2)] = 2  # layers of V in e_i; the paper prints 1
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
    buffer_size: Positive = 1_000_000  # transitions of each population's replay, all processes
    update_every: Positive = 100  # environment steps that a replay gets between updates
    learn_from: Literal["turn", "all"] = "turn"  # minibatches: of who acts, or a share of each m
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
RELATION = {"phi_gradient": "actor", "psi_information": False, "psi_input": "standardised"}
RELATION |= {"redraw_z": True, "xi_reads_z": True, "critic_reads_z": True}
RELATION |= {"critic_graph": "own", "batch_size": 256, "update_every": 64, "entropy_coef": 0.01}
PRESETS["relation"] = PRESETS["cpu"] | RELATION  # with which z matters in rooms and signpost
LINE = ("return", "critic_loss", "entropy", "sps")  # printed if there is no progress bar
RESUMABLE = ("eval_populations", "plain", "compile")  # flags that may change with --resume
# --adapt keeps these flags of the adapted run: its networks need them, or adapting ignores them.
FIXED = ("task", "populations", "latent_size", "representation", "latent_prior", "share_parameters")
FIXED += ("psi_input", "hidden_size", "key_size", "value_layers", "reptile_step", "psi_information")
FIXED += ("own_beside", "redraw_z", "xi_reads_z", "critic_reads_z", "tell_population", "head_gain")
FIXED += ("psi_entropy", "learn_from", "critic_graph")


def who_learns(args: Args) -> tuple[bool, bool]:
    """Whether psi learns, and xi. With one z, or in one population, z can tell nothing of m."""
    several = len(args.populations) > 1 and args.latent_size > 1
    psi = several and args.latent_prior == "learned"
    return psi, psi or (several and "both" in args.phi_gradient)


def validate(args: Args) -> list[tuple[Any, str]]:
    """Flag combinations to refuse, each as (whether args has it, error message)."""
    usual = PRESETS[args.preset].get("polyak", Args.polyak)
    begins = not (args.resume or args.eval_only or args.adapt)
    idle = begins and args.target == "hard" and args.polyak != usual
    several = len(args.populations + args.eval_populations) > 1
    Z, P = args.latent_size, len(args.populations)
    by_hand, named = args.latent_prior == "told", args.tell_population != "nobody"
    told = by_hand or named
    unclear = told and first_unclear((*args.eval_populations, args.population), args.populations)
    still = Z == 1 and "actor" not in args.phi_gradient and args.phi_learning_rate
    psi, xi = who_learns(args)
    return [
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size"),
        (idle, "--polyak needs --target polyak"),
        (bool(args.adapt) != bool(args.population), "--adapt and --population need each other"),
        (len(set(args.populations)) < len(args.populations), "--populations has one twice"),
        (not args.populations, "--populations is empty"),
        (several and not args.share_parameters, "Several populations need --share-parameters"),
        (begins and by_hand and not 1 < P <= Z, "--latent-prior told needs 2 to --latent-size m"),
        (unclear, f"{unclear} cannot be told its number: two of --populations are next in size"),
        (args.critic_reads_z and named, "--critic-reads-z needs --tell-population nobody"),
        (P == 1 and args.preset == "relation", "--preset relation needs several --populations"),
        (begins and not psi and args.psi_input != "tenth", "--psi-input needs a learned p(z|m)"),
        (begins and not psi and args.psi_entropy, "--psi-entropy needs a learned p(z|m)"),
        (begins and not xi and args.xi_reads_z, "--xi-reads-z needs a classifier that learns"),
        (begins and args.redraw_z and (Z == 1 or by_hand), "--redraw-z needs several z, none told"),
        (begins and Z == 1 and args.critic_reads_z, "--critic-reads-z needs several z"),
        (begins and P == 1 and named, "--tell-population needs several --populations"),
        (begins and P == 1 and args.learn_from == "all", "--learn-from all needs several"),
        (begins and still, "With one z phi never learns but by --phi-gradient actor, both+actor"),
    ]


def read(argv: list[str]) -> Args:
    """Read the command line on top of what --preset, --resume or --eval-only stand for; with
    --adapt on top of the adapted run's arguments. UsageError for flags that must not differ."""
    given = read_flags(Args, argv)
    if not given.adapt or given.resume or given.eval_only:
        return read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS)
    source, own = given.adapt, saved_args(given.adapt, Args, whole=True)
    if not own.share_parameters:
        raise UsageError(f"{source} has parameters per agent, which fit no other population.")
    new = {field.name: getattr(given, field.name) for field in dataclasses.fields(RunArgs)}
    new |= {"preset": own.preset, "population": "", "eval_populations": (), "phi_gradient": "actor"}
    if any(word.partition("=")[0] == "--preset" for word in argv):  # typed
        values = {name: getattr(Args, name) for name in PRESETS["relation"]}
        values |= PRESETS[given.preset] | {"preset": given.preset}
        new |= {name: x for name, x in values.items() if name not in (*FIXED, "phi_gradient")}
    default = dataclasses.replace(own, **new)
    args = read_kept(Args, argv, default, FIXED, source)
    idle = args.target == "hard" and args.polyak != default.polyak  # typed, not the source's
    other = args.phi_gradient != "actor"  # adapting takes no step of Eq. (11) or (13)
    check([(idle, "--polyak needs --target polyak"), (other, "--adapt takes --phi-gradient actor")])
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
    z: Tensor  # (M, N, Z) latents, one-hot
    population: int  # the number of m, for networks that --tell-population names


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


def chosen(layer: Linear, choice: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Each agent's weight (M, N, I, O) and bias (M, N, O): of C layers that a parameter set has in
    `layer`, those that choice (M, N, C), one-hot, names."""
    each = [p.unflatten(0, (-1, choice.shape[-1])) for p in layer.parameters()]
    weight, bias = (per_agent(p, counts) for p in each)  # (N, C, I, O), (N, C, O)
    weight = torch.einsum("mnc,ncio->mnio", choice, weight)
    return weight, torch.einsum("mnc,nco->mno", choice, bias)


# [shared: mean_entity] begin
def mean_entity(others: Tensor, g: Tensor) -> Tensor:
    """Return sum_j g_ij o_ij (M, N, De) for others (M, N, De) and graphs g (M, N, N)."""
    position = others[..., :2] * g.sum(-1, keepdim=True)
    mean = g @ others
    return torch.cat((mean[..., :2] - position, mean[..., 2:]), -1)


# [shared: mean_entity] end


class Pairs:
    """The first layer above all o_ij = [p_j - p_i, v_j, ...]; scores() and sums() apply the second.
    This literal form stores M N^2 H numbers. The default, FastPairs, gives equal results and stores
    M N H for each set of weights."""

    def __init__(self, others: Tensor, weight: Tensor, bias: Tensor, counts: tuple[int, ...]):
        """Compute relu(o_ij W + b): others (M, N, De), weight W (S, De, H), bias b (S, H). b, or
        both, may be of each agent i instead: W (M, N, De, H), b (M, N, H)."""
        N = others.shape[1]
        relative = others[:, None, :, :2] - others[:, :, None, :2]
        rest = others[:, None, :, 2:].expand(-1, N, -1, -1)
        o = torch.cat((relative, rest), -1)  # o_ij (M, N, N, De)
        if weight.dim() == 4:
            hidden = torch.einsum("mijd,midh->mijh", o, weight)
        else:
            hidden = torch.einsum("mijd,idh->mijh", o, per_agent(weight, counts))
        bias = bias if bias.dim() == 3 else per_agent(bias, counts)
        hidden = hidden + bias[..., None, :]
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
    """phi: the attention network, which decides whom each agent attends to. With --representation
    option, z picks a head (Sec. 4.2). With the others (App. E.3), one head reads z."""

    def __init__(self, sets: int, own_size: int, entity_size: int, args: Args):
        super().__init__()
        H, K, Z = args.hidden_size, args.key_size, args.latent_size
        self.pairs = Pairs if args.plain else functools.partial(FastPairs, compiled=args.compile)
        self.key_size = K
        self.latents, self.representation = Z, args.representation
        self.heads = Z if args.representation == "option" else 1
        own_sizes = {"option": own_size, "concat": own_size + Z, "bilinear": own_size * Z}
        self.own = Linear(sets, own_sizes[args.representation], H, gain=RELU)
        self.query = Linear(sets * self.heads, H, K, gain=args.head_gain)
        self.entity = Linear(sets, entity_size, H, gain=RELU)
        if args.representation == "concat":
            self.entity_z = Linear(sets, Z, H, gain=RELU)
        if args.representation == "bilinear":  # a layer for each z, in place of the one above
            self.entity = Linear(sets * Z, entity_size, H, gain=RELU)
        self.key = Linear(sets * self.heads, H, K, gain=args.head_gain)  # its bias cancels

    def split_heads(self, x: Tensor) -> Tensor:  # (S x heads, ...) -> (S, heads, ...)
        return x.unflatten(0, (-1, self.heads))

    def join_heads(self, weight: Tensor) -> Tensor:  # (S x heads, H, K) -> (S, H, heads x K)
        return self.split_heads(weight).transpose(1, 2).flatten(2)

    def queries(self, view: View) -> Tensor:
        """Queries q_i of all heads (M, N, heads, K)."""
        own = view.own
        if self.representation == "concat":
            own = torch.cat((own, view.z), -1)
        if self.representation == "bilinear":
            own = (own[..., None] * view.z[..., None, :]).flatten(-2)
        hidden = F.relu(self.own(own, view.counts), inplace=True)
        weight = self.join_heads(self.query.weight)
        bias = self.split_heads(self.query.bias).flatten(1)
        query = grouped_linear(hidden, weight, bias, view.counts)
        return query.unflatten(-1, (self.heads, -1))

    def entities(self, view: View) -> Pairs:
        """The keys' first layer above o_ij, with z_i beside it (concat) or times z_i (bilinear)."""
        weight, bias = self.entity.parameters()
        if self.representation == "concat":
            bias = self.entity_z(view.z, view.counts) + per_agent(bias, view.counts)
        if self.representation == "bilinear":
            weight, bias = chosen(self.entity, view.z, view.counts)
        return self.pairs(view.others, weight, bias, view.counts)

    def normalise(self, scores: Tensor, view: View) -> Tensor:
        """The graph g (M, N, N). Row i sums to 1, or to 0 if agent i sees nobody."""
        # MRA, Eq. (1)
        scores = scores / math.sqrt(self.key_size)
        scores = scores.masked_fill(~view.mask, -1e9)
        return scores.softmax(-1) * view.mask

    def forward(self, view: View) -> Tensor:
        """The graph g (M, N, N) for the latents view.z."""
        query = self.queries(view)
        if self.heads > 1:  # other heads' queries become 0: scores are those of head z
            query = query * view.z[..., None]
        key = self.join_heads(self.key.weight)
        scores = self.entities(view).scores(query.flatten(-2), key)
        return self.normalise(scores, view)

    def all(self, view: View) -> Tensor:
        """Graphs (Z, M, N, N): with index z, those in which all agents have this latent."""
        if self.heads == 1:
            eye = torch.eye(self.latents, device=view.z.device, dtype=view.z.dtype)
            return torch.stack([self(view._replace(z=z.expand_as(view.z))) for z in eye])
        pairs, queries = self.entities(view), self.queries(view).unbind(2)
        keys = self.split_heads(self.key.weight).unbind(1)
        heads = [pairs.scores(query, key) for query, key in zip(queries, keys)]
        return self.normalise(torch.stack(heads), view)


class GraphNet(nn.Module):
    """Actor (theta), critic (zeta) or population classifier (xi): layers above o_s and e_i = sum_j
    g_ij V(o_ij), 0 for an agent that sees nobody. own_size: how many numbers of o_s it reads.
    knows: "population" (a softmax cannot count agents) or "z": V has a first layer for each.
    latents: Z if it reads z (--xi-reads-z), else 0. graph: makes g in place of the given one."""

    def __init__(
        self,
        sets: int,
        own_size: int,
        entity_size: int,
        outputs: int,
        gain: float,
        args: Args,
        knows: str = "",
        latents: int = 0,
        graph: Any = None,
    ):
        super().__init__()
        H = args.hidden_size
        self.pairs = Pairs if args.plain else functools.partial(FastPairs, compiled=args.compile)
        self.sets, self.own_size, self.graph = sets, own_size, graph
        self.knows, self.linear = knows, args.value_layers == 1
        self.own = MLP(sets, own_size, H, H)
        first = sets * {"": 1, "population": len(args.populations), "z": args.latent_size}[knows]
        self.entity = None if self.linear else Linear(first, entity_size, H, gain=RELU)
        self.value = Linear(first, entity_size, H) if self.linear else Linear(sets, H, H)
        self.out = Linear(sets, H, outputs, gain)
        self.of_z = nn.Parameter(0.2 * torch.randn(sets, latents, H)) if latents else None

    def forward(self, view: View, g: Tensor, actions: Tensor | None = None) -> Tensor:
        """Outputs (..., M, N, .) with graphs g (..., M, N, N), which for a network that reads z has
        one of each z, as RelationGraph.all(). Critics also read actions (M, N)."""
        others = view.others
        g = self.graph(view) if self.graph else g
        if actions is not None:  # of the others: g_ii = 0 leaves out agent i's own
            actions = F.one_hot(actions, NUM_ACTIONS).to(others.dtype)
            others = torch.cat((others, actions), -1)
        x = self.own(view.own[..., : self.own_size], view.counts)
        layer = self.value if self.linear else self.entity
        weight, bias = layer.weight, layer.bias
        if self.knows == "population":
            each = [p.unflatten(0, (self.sets, -1)) for p in (weight, bias)]
            weight, bias = (p[:, view.population].contiguous() for p in each)
        if self.knows == "z":
            weight, bias = chosen(layer, view.z, view.counts)
        if not self.linear:
            pairs = self.pairs(others, weight, bias, view.counts)

        def read(g: Tensor, z: int | None = None) -> Tensor:
            if self.linear:  # V is linear: V of the mean is the mean of V
                e = grouped_linear(mean_entity(others, g), weight, bias, view.counts)
                e = e * view.mask.any(-1, keepdim=True)  # no bias if nobody is seen
            else:
                e = pairs.sums(g, self.value.weight, self.value.bias)
            if self.of_z is not None:
                e = e + per_agent(self.of_z[:, z], view.counts)
            return self.out(F.relu(x + e, inplace=True), view.counts)

        if g.dim() == 3:
            assert self.of_z is None, "a network that reads z needs the graphs of all z"
            return read(g)
        return torch.stack([read(each, z) for z, each in enumerate(g)])


class LatentPrior(nn.Module):
    """psi: p(z|m) of each type of agent. It reads numbers of agents, so it fits any population: by
    --psi-input a tenth of them, or standardised by training populations."""

    def __init__(self, types: int, args: Args):
        super().__init__()
        self.types = types
        known = torch.tensor([read_population(m) for m in args.populations]).float()
        middle, scale = known.mean(0), known.std(0, correction=0)
        scale[scale == 0] = 1.0  # a type that is the same in all
        if args.psi_input == "tenth":
            middle, scale = torch.zeros(types), torch.full((types,), 10.0)
        self.register_buffer("middle", middle, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        outputs = types * args.latent_size
        self.net = nn.Sequential(nn.Linear(types, 32), nn.ReLU(), nn.Linear(32, outputs))

    def forward(self, population: tuple[int, ...]) -> Tensor:
        """log p(z|m) (types, Z); population: numbers of agents of each type."""
        weight = self.net[0].weight
        counts = (constant(population, weight.dtype, weight.device) - self.middle) / self.scale
        return self.net(counts).unflatten(0, (self.types, -1)).log_softmax(-1)


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
        self.args, self.device = args, device
        self.sets = len(game.population) if args.share_parameters else game.num_agents
        own, entity = game.own_features, game.entity_features
        torch.manual_seed(args.seed)
        self.attention = RelationGraph(self.sets, own, entity, args).to(device)
        net = functools.partial(GraphNet, self.sets, args=args)
        who = args.tell_population
        # A small last layer: the first policy tries all actions about equally.
        beside = own if args.own_beside else 0
        knows = "population" if who == "all" else ""
        self.actor = net(beside, entity, NUM_ACTIONS, gain=0.1, knows=knows).to(device)
        # The critic also reads the others' actions.
        knows = "z" if args.critic_reads_z else "population" if who != "nobody" else ""
        graphs = {"policy": None, "uniform": uniform_graph, "own": copy.deepcopy(self.attention)}
        graph = graphs[args.critic_graph]  # Sec. 4.2: phi's; App. E.1: as MAAC's, its own
        critic = net(own, entity + NUM_ACTIONS, NUM_ACTIONS, gain=1.0, knows=knows, graph=graph)
        self.critic = critic.to(device)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic = copy.deepcopy(self.critic)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        attention = {"params": self.attention.parameters(), "lr": args.phi_learning_rate}
        actor = {"params": self.actor.parameters()}
        self.actor_optimiser = adam([actor, attention])
        self.critic_optimiser = adam(self.critic.parameters())
        self.learns_prior, self.classifies = who_learns(args)
        self.latent_nets = []  # psi and xi, as far as they learn
        if self.learns_prior:
            self.latent_prior = LatentPrior(len(game.population), args).to(device)
            self.latent_nets.append(self.latent_prior)
        if self.classifies:
            P, latents = len(args.populations), args.latent_size if args.xi_reads_z else 0
            self.population_classifier = net(own, entity, P, gain=1.0, latents=latents).to(device)
            self.latent_nets.append(self.population_classifier)
            self.latent_optimiser = adam(nn.ModuleList(self.latent_nets).parameters())

    def log_prior(self, game: Game) -> Tensor:
        """log p(z|m) (N, Z): learned, uniform (uni-MRA) or told (z is the number of m)."""
        size = (len(game.population), self.args.latent_size)
        if self.learns_prior:
            log_p = self.latent_prior(game.population)
        elif self.args.latent_prior == "told":
            log_p = torch.full(size, -1e9, device=self.device)
            log_p[:, number_of(game, self.args.populations)] = 0.0
        else:
            log_p = torch.zeros(size, device=self.device).log_softmax(-1)
        return per_agent(log_p, game.population)

    def view(self, game: Game, obs: Observation, z: Tensor) -> View:
        """The networks' input for observations of a game and latents z (M, N)."""
        counts = game.population if self.args.share_parameters else (1,) * game.num_agents
        return View(
            own=obs.own.contiguous(),
            others=obs.others.contiguous(),
            alive=obs.alive.contiguous(),
            mask=obs.mask(),
            counts=counts,
            z=F.one_hot(z.long(), self.args.latent_size).float(),
            population=number_of(game, self.args.populations),
        )

    @torch.no_grad()
    def follow(self) -> None:
        """Move target networks by --polyak towards actor and critic, or copy these into them."""
        step = self.args.polyak if self.args.target == "polyak" else 1.0
        pairs = (self.target_actor, self.actor), (self.target_critic, self.critic)
        for target, net in pairs:
            torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), step)


# --- 5. The paper ---------------------------------------------------------------------------------


def draw_latents(agent: Agent, game: Game, num_worlds: int, rng: torch.Generator) -> Tensor:
    """Draw latents z ~ p_psi(z|m), one for each agent of each world -> (B, N)."""
    return sample(agent.log_prior(game).detach().expand(num_worlds, -1, -1), rng)  # p: (N, Z)


def graph_information(agent: Agent, view: View, g: Tensor, log_prior: Tensor) -> Tensor:
    """The lower bound on I(g; a|o) in nats (M, N), exact over z and a: g (Z, M, N, N), those of all
    z; log_prior (N, Z)."""
    log_pi = agent.actor(view, g).log_softmax(-1)  # (Z, M, N, A)
    log_bar = agent.target_actor(view, g).log_softmax(-1)  # log pi' (Z, M, N, A)
    log_prior = log_prior.T[:, None, :, None]  # (Z, 1, N, 1)
    log_p = (log_bar + log_prior).logsumexp(0)  # log p(a|o) (M, N, A)
    # Eq. (11)
    return (log_prior.exp() * log_pi.exp() * (log_bar - log_p)).sum((0, -1))


def population_loss(agent: Agent, view: View, g: Tensor, log_prior: Tensor, label: int) -> Tensor:
    """Cross-entropy () of xi, exact over z: g (Z, M, N, N), those of all z; log_prior (N, Z);
    label: the number of the population."""
    surprise = -agent.population_classifier(view, g).log_softmax(-1)[..., label]  # (Z, M, N)
    prior = log_prior.exp().T[:, None]  # p(z|m) (Z, 1, N)
    # Eq. (13)
    return mean((prior * surprise).sum(0), view.alive)


@torch.no_grad()
def reptile(args: Args, omega: nn.Module, start: list[Tensor]) -> None:
    """omega <- omega + alpha (omega_K - omega), in place; start: omega before the K steps."""
    for p, first in zip(omega.parameters(), start):
        # Sec. 4.4, Algorithm 1 line 6; Algorithm 4
        p.copy_(first.lerp(p, args.reptile_step))


def uniform_graph(view: View) -> Tensor:
    """A graph g (M, N, N) that attends to all visible agents alike."""
    return view.mask.to(view.own.dtype) / view.mask.sum(-1, keepdim=True).clamp(min=1)


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
            "z": torch.empty(size, N, dtype=torch.int8, device=device),
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
        if self.args.redraw_z and not self.args.adapt:  # Eqs. (8)-(10) hold for any z
            row["z"] = draw_latents(agent, self.game, size, rng)
        obs = self.worlds.observe(row["state"])
        next_obs = self.worlds.observe(row["final_state"])
        rewards = row["rewards"]
        if self.args.scale_rewards:
            # paper is silent: the mean is not subtracted; that would change games that end early
            rewards = rewards / self.reward_scale.deviation()
        return Batch(
            view=agent.view(self.game, obs, row["z"]),
            next_view=agent.view(self.game, next_obs, row["z"]),
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
        self.z = torch.zeros(args.num_envs, self.game.num_agents, dtype=torch.int64, device=device)
        self.worlds.reset()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores, except for the rows of the replay."""
        return {
            "worlds": self.worlds.state_dict(),
            "steps": self.buffer.steps,
            "rewards": self.buffer.reward_scale.sums,
            **self.returns.state_dict(),
            "z": self.z,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what state_dict() returned."""
        self.worlds.load_state_dict(saved["worlds"])
        self.buffer.steps = saved["steps"]
        self.buffer.reward_scale.sums = saved["rewards"].to(self.device)
        self.returns.load_state_dict(saved)
        self.z = saved["z"].to(self.device)


@torch.no_grad()
def collect(
    agent: Agent, collector: Collector, rng: torch.Generator, latent_rng: torch.Generator
) -> None:
    """Take one step in all worlds and store it in the replay."""
    worlds = collector.worlds
    state = worlds.state
    view = agent.view(collector.game, worlds.obs, collector.z)
    logits = agent.actor(view, agent.attention(view))
    actions = sample(logits.log_softmax(-1), rng)  # (B, N)
    step = worlds.step(actions)
    row = {"state": state, "final_state": step.final_state, "actions": actions}
    row |= {"rewards": step.reward, "terminated": step.terminated}
    row |= {"z": collector.z}
    collector.buffer.add(row, view.alive)
    collector.returns.add(step)
    if not agent.args.adapt:  # the agents of a new episode draw new latents
        ended = (step.terminated | step.truncated)[:, None]
        new = draw_latents(agent, collector.game, worlds.num_worlds, latent_rng)
        collector.z = torch.where(ended, new, collector.z)


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


def information_update(agent: Agent, game: Game, view: View, label: int) -> tuple[Tensor, Tensor]:
    """One step of phi that raises the bound on I(g; a|o) and, unless --phi-gradient mi, lowers the
    loss of xi, if that learns. label: the number of the population. Returns the bound before () and
    the norm of the gradient ()."""
    log_prior = agent.log_prior(game).detach()
    g = agent.attention.all(view)
    information = mean(graph_information(agent, view, g, log_prior), view.alive)
    loss = -information
    if agent.classifies and "both" in agent.args.phi_gradient:
        loss = loss + population_loss(agent, view, g, log_prior, label)
    norm = descend(loss, agent.attention, agent.actor_optimiser, agent.args.max_grad_norm)
    return information.detach(), norm


def latent_update(
    args: Args, agent: Agent, collectors: list[Collector], rng: torch.Generator
) -> dict[str, Tensor]:
    """One step of psi, by Eqs. (13), (11) (--psi-information) and --psi-entropy (ours), and of xi,
    by (13). Returns scalars to log."""
    losses, scalars = [], {}
    size = math.ceil(args.batch_size / len(collectors))
    steps = sum(collector.buffer.steps for collector in collectors)
    entropy_weight = max(0, 1 - steps / max(1, args.psi_entropy))
    for label, collector in enumerate(collectors):
        if collector.buffer.size:
            view = collector.buffer.sample(agent, rng, size).view
            log_prior = agent.log_prior(collector.game)
            g = agent.attention.all(view).detach()
            loss = population_loss(agent, view, g, log_prior, label)
            scalars[f"xi_loss/{collector.name}"] = loss.detach()
            if args.psi_information and agent.learns_prior:
                loss = loss - mean(graph_information(agent, view, g, log_prior), view.alive)
            entropy = -(log_prior.exp() * log_prior).sum(-1).mean()
            losses.append(loss - entropy_weight * entropy)
    loss = torch.stack(losses).mean()
    nets = nn.ModuleList(agent.latent_nets)
    norm = descend(loss, nets, agent.latent_optimiser, args.max_grad_norm)
    return scalars | {"latent_grad_norm": norm}


def update(
    args: Args,
    agent: Agent,
    collector: Collector,
    collectors: list[Collector],
    rng: torch.Generator,
    latent_rng: torch.Generator,
) -> dict[str, Tensor]:
    """K minibatch steps of critic and actor, then (but for --adapt) Reptile's, phi's by Eqs. (11),
    (13), one of psi and xi; at last one of the targets. collector: whose turn it is. Returns
    scalars for the log; RunError if one or a reward is not finite."""
    scalars = collections.defaultdict(list)
    policy = nn.ModuleList((agent.actor, agent.attention))
    limit = args.max_grad_norm
    filled = [each for each in collectors if each.buffer.size]
    learned = filled if args.learn_from == "all" else [collector]
    omega = policy if "actor" in args.phi_gradient else agent.actor  # what Eq. (10) or (9) moves
    start = [p.detach().clone() for p in omega.parameters()]
    size = max(1, args.batch_size // len(learned))
    for _ in range(args.inner_steps):
        batches = [each.buffer.sample(agent, rng, size) for each in learned]
        with torch.set_grad_enabled("actor" in args.phi_gradient):  # Eq. (10)
            graphs = [agent.attention(batch.view) for batch in batches]
        losses = []
        for batch, g in zip(batches, graphs):
            with torch.no_grad():
                next_g = agent.attention(batch.next_view)
            losses.append(critic_loss(args, agent, batch, g.detach(), next_g, rng))
        loss = torch.stack(losses).mean()
        scalars["critic_loss"].append(loss.detach())
        norm = descend(loss, agent.critic, agent.critic_optimiser, limit)
        scalars["critic_grad_norm"].append(norm)
        losses = [actor_loss(args, agent, batch, g, rng) for batch, g in zip(batches, graphs)]
        loss, entropy = (torch.stack(x).mean() for x in zip(*losses))
        scalars["actor_loss"].append(loss.detach())
        scalars["entropy"].append(entropy.detach())
        norm = descend(loss, policy, agent.actor_optimiser, limit)
        scalars["actor_grad_norm"].append(norm)
    means = {name: torch.stack(x).mean() for name, x in scalars.items()}
    if not args.adapt:
        reptile(args, omega, start)
        if args.phi_gradient != "actor" and args.latent_size > 1:
            for each, batch in zip(learned, batches):
                label = collectors.index(each)
                found = information_update(agent, each.game, batch.view, label)
                means[f"mi/{each.name}"], means[f"phi_grad_norm/{each.name}"] = found
        if agent.classifies:
            means |= latent_update(args, agent, collectors, latent_rng)
    agent.follow()
    rewards = torch.stack([each.buffer.reward_scale.sums for each in collectors])
    check_finite(rewards=rewards, **means)
    return means


@torch.no_grad()
def diagnose(agent: Agent, collectors: list[Collector], rng: torch.Generator) -> dict[str, Tensor]:
    """Scalars for the log that show whether the latent works: the bound on I(g; a|o), p(z|m), and,
    in populations that it knows, the classifier's accuracy with phi's graphs and a uniform one."""
    scalars, priors = {}, []
    for collector in (each for each in collectors if each.buffer.size):
        name, game, known = collector.name, collector.game, agent.args.populations
        view = collector.buffer.sample(agent, rng, 256).view
        g = agent.attention.all(view)  # (Z, M, N, N)
        log_prior = agent.log_prior(game)
        information = graph_information(agent, view, g, log_prior)
        scalars[f"information/{name}"] = mean(information, view.alive)
        prior = log_prior.exp()  # p(z|m) (N, Z)
        of_types = torch.stack([each[0] for each in prior.split(game.population)])  # (types, Z)
        priors.append(of_types)
        if agent.classifies and name in known:
            for kind, graphs in (("", g), ("_uniform_g", uniform_graph(view).expand_as(g))):
                guess = agent.population_classifier(view, graphs).argmax(-1)  # (Z, M, N)
                right = (prior.T[:, None] * (guess == known.index(name))).sum(0)  # (M, N)
                scalars[f"xi_accuracy{kind}/{name}"] = mean(right, view.alive)
        if agent.learns_prior:
            for kind, row in enumerate(of_types):
                scalars |= {f"prior/{name}/{kind}/{z}": x for z, x in enumerate(row)}
    if len(priors) > 1:
        distances = [(p - q).abs().sum(-1) / 2 for p, q in itertools.combinations(priors, 2)]
        scalars["prior_distance"] = torch.stack(distances).mean()
    check_finite(**scalars)
    return scalars


# --- 8. Evaluate ----------------------------------------------------------------------------------


def net_player(
    agent: Agent, z: Tensor | tuple[int, ...] | None, seed: int, uniform: bool = False
) -> Player:
    """The agents as a player for envs.particle.episodes; actions are sampled, not greedy. z:
    latents (B, N), or (N,) for all worlds, or one of each type, or None: then p(z|m) draws them
    when an episode begins. uniform: play with the uniform graph instead of phi's."""
    rng = torch.Generator().manual_seed(seed)
    latent_rng = own_generator(seed, stream=1)
    drawn = weakref.WeakKeyDictionary()  # worlds -> latents drawn for them (B, N)

    def latents(worlds: ParticleWorld) -> Tensor:
        if isinstance(z, tuple):
            each = constant(z, torch.int64, agent.device)
            return per_agent(each, worlds.game.population).expand(worlds.num_worlds, -1)
        if z is not None:
            return z.expand(worlds.num_worlds, -1)
        new = draw_latents(agent, worlds.game, worlds.num_worlds, latent_rng)
        begins = worlds.clocks.time[: worlds.num_worlds, None] == 0
        drawn[worlds] = torch.where(begins, new, drawn.get(worlds, new))
        return drawn[worlds]

    def act(worlds: ParticleWorld) -> Tensor:  # (B, N)
        view = agent.view(worlds.game, worlds.obs, latents(worlds))
        g = uniform_graph(view) if uniform else agent.attention(view)
        return sample(agent.actor(view, g).log_softmax(-1), rng)

    return act


def evaluate(
    args: Args, agent: Agent, own: dict[str, Collector], evaluation: Evaluation
) -> dict[str, dict[str, float]]:
    """Play with z drawn, with each z for all agents and with a uniform graph; return {row: {figure:
    value}}. The final evaluation adds best z, scripts, unseen populations. own: by population."""
    Z, results = args.latent_size, {}
    seeds = evaluation.rng.integers(2**31, size=6).tolist()
    world_seed, player_seed, scripted_seed, trial_seed, choice_seed, latent_seed = seeds
    latent_rng = torch.Generator().manual_seed(latent_seed)
    unseen = args.eval_populations if evaluation.final else ()
    for population in dict.fromkeys((*own, *unseen)):
        worlds = make_envs(args, population, evaluation.episodes, world_seed)
        counts = worlds.game.population
        z = draw_latents(agent, worlds.game, evaluation.episodes, latent_rng)
        if args.adapt and population in own:
            z = own[population].z[0]  # drawn once, when adapting began
        players = {"": net_player(agent, z, player_seed)}
        same = {f"z={k}": (k,) * len(counts) for k in range(Z) if Z > 1}  # of all agents of a type
        filmed = ("", *same)
        if evaluation.final and 1 < Z ** len(counts) <= 256:  # else too many to try
            trial = make_envs(args, population, args.eval_episodes, trial_seed)  # not the table's
            choices = itertools.product(range(Z), repeat=len(counts))
            drawn = {choice: net_player(agent, choice, choice_seed) for choice in choices}
            best = best_of(evaluation, trial, drawn, trial_seed)
            same[f"best z={','.join(map(str, best))}"] = best
        players |= {name: net_player(agent, x, player_seed) for name, x in same.items()}
        players["uniform g"] = net_player(agent, z, player_seed, uniform=True)
        if evaluation.final:
            players |= scripted_players(args.task, scripted_seed)
        results |= play_all(evaluation, worlds, players, world_seed, filmed)
    return results


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_agent(path: str) -> tuple[Args, Agent]:
    """Load arguments and networks of a run or checkpoint, on the CPU; UsageError if another script
    wrote it."""
    args = saved_args(path, Args)
    args = dataclasses.replace(args, device="cpu", compile=False)
    game = make_envs(args, args.populations[0], num_envs=1, seed=1).game
    agent = Agent(args, game, torch.device("cpu"))
    saved, _ = load_checkpoint(path)
    restore(agent, saved["agent"], path)
    return args, agent


def load_player(path: str, seed: int = 1) -> Player:
    """The policy of a run or checkpoint as a player for envs.particle.episodes. It plays in every
    population; in one that it was adapted to, with the latents of that adaptation."""
    (args, agent), (saved, _) = load_agent(path), load_checkpoint(path, quiet=True)
    own = saved["ranks"][0]["collectors"] if args.adapt else {}
    players = {read_population(m): net_player(agent, x["z"][0], seed) for m, x in own.items()}
    drawing = net_player(agent, None, seed)
    return lambda worlds: players.get(worlds.game.population, drawing)(worlds)


# --- 9. Train -------------------------------------------------------------------------------------


def begin(args: Args, agent: Agent, collectors: list[Collector], rng: torch.Generator) -> None:
    """Draw the first latents. With --adapt (Algorithm 5) these stay for all episodes, and networks
    and reward scale begin as those of the adapted run."""
    if not args.adapt:
        for collector in collectors:
            collector.z[:] = draw_latents(agent, collector.game, args.num_envs, rng)
        return
    (collector,), (saved, _) = collectors, load_checkpoint(args.adapt, alike=True)
    nets = {name: part for name, part in agent.parts().items() if isinstance(part, nn.Module)}
    restore(nets, saved["agent"], args.adapt)
    sums = [each["rewards"] for each in saved["ranks"][0]["collectors"].values()]
    collector.buffer.reward_scale.sums += torch.stack(sums).mean(0).to(agent.device)
    z = draw_latents(agent, collector.game, 1, rng).cpu()
    collector.z[:] = gather(z)[0]  # the same in all processes


def train(args: Args) -> int:
    """Train, or only evaluate with --eval-only; return the exit code."""
    keep_freed_memory()
    with Run(args, table, LINE) as run:
        args = run.own_share(args, "batch_size", "buffer_size", "update_every", "psi_entropy")
        check(validate(args))  # again: a step of its worlds must fit into a process's share
        for name in args.eval_populations:
            make_envs(args, name, num_envs=1, seed=args.seed)  # UsageError now, not after training
        names = (args.population,) if args.adapt else args.populations
        collectors = [Collector(args, name, run.device) for name in names]
        agent = Agent(args, collectors[0].game, run.device)
        rng = own_generator(args.seed)
        latent_rng = own_generator(args.seed, stream=1)
        by_name = {collector.name: collector for collector in collectors}
        own = {"rng": rng, "latent_rng": latent_rng, "collectors": by_name}
        run.restore(agent=agent)
        run.judge = functools.partial(evaluate, args, agent, by_name)
        if args.eval_only:
            run.restore_own(own)  # an adapted population keeps its latents
            return run.evaluate_only()
        if not args.resume:
            begin(args, agent, collectors, latent_rng)
        run.begin(
            args.task,
            parts={"agent": agent},
            own=own,
            replays={name: collector.buffer for name, collector in by_name.items()},
        )
        while run.goes_on():
            collector = collectors[run.iteration // args.max_episode_steps % len(collectors)]
            buffer = collector.buffer
            before = buffer.steps // args.update_every
            collect(agent, collector, rng, latent_rng)
            run.lap("collect_s")
            due = buffer.steps // args.update_every - before  # multiples that were passed
            for _ in range(due if buffer.size >= args.batch_size else 0):
                run.note(update(args, agent, collector, collectors, rng, latent_rng))
            run.lap("learn_s")
            run.advance(args.num_envs * run.size)
            if run.is_due(args.log_every):
                look_rng = torch.Generator().manual_seed(run.timesteps)
                returns = report_returns([each.returns for each in collectors])
                run.log(diagnose(agent, collectors, look_rng) | returns)
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
