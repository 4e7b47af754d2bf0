"""MAAC, Multi-Actor-Attention-Critic (Iqbal and Sha, ICML 2019), in the particle worlds.

Soft actor-critic for several agents. In training, each agent's critic attends to the observations
and actions of the others, by heads that all agents share. A policy reads its own observation only.

    e_i     = sum_j w_ij v_j,       w_ij = softmax_j (W_q s_i) . (W_k x_j) / sqrt(D)       Eq. (6)
    Q_i     = f_i(s_i, e_i),        s_i of o_i,  x_j of o_j and a_j,  v_j = h(W_v x_j)     Eq. (5)
    L(psi)  = sum_i E (Q_i(o, a) - y_i)^2                                                  Eq. (7)
              y_i = r_i + gamma (Q'_i(o', a') - alpha log pi'(a'_i | o'_i)),  a' ~ pi'
    dJ_i    = E grad log pi_i(a_i | o_i) (A_i - alpha log pi_i(a_i | o_i)),  a ~ pi        Eq. (8)
    A_i     = Q_i(o, a) - sum_b pi_i(b | o_i) Q_i(o, (b, a_-i))                            Eq. (9)

L(psi) moves the critics of all agents together, dJ_i the policy of agent i. Targets Q', pi' follow.

    python baselines/maac_particle.py --task treasure --population 6        the paper's settings
    python baselines/maac_particle.py --task pacman --population 8,4 --preset cpu
    python baselines/maac_particle.py --resume runs/RUN --total-timesteps 2000000
    python baselines/maac_particle.py --eval-only runs/RUN
    torchrun --nproc-per-node 2 baselines/maac_particle.py                   two times 12 worlds

Letters: B worlds, N agents, A actions, M transitions of a minibatch, H hidden units, X heads, D =
H / X units of a head, S parameter sets, I inputs, O features of an observation. Choices that paper
and authors' code leave open: docs/baselines_particle.md. The worlds: docs/particle.md.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
    average_gradients,
    call,
    check,
    check_finite,
    leave,
    load_checkpoint,
    own_generator,
    process_rank,
    read_args,
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
    read_population,
    report_returns,
    scripted_players,
    table,
)
from envs.particle.pairs import grouped_linear, keep_freed_memory
from envs.particle.worlds import Game, Observation, ParticleWorld, constant

# --- 2. Args --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """MAAC in particle worlds."""

    # Run
    total_timesteps: Positive = 1_000_000  # environment steps, summed over all worlds and processes
    log_every: Positive = 10_000  # environment steps between lines of metrics.jsonl
    eval_every: Count = 100_000  # environment steps between evaluations in training; 0: none
    eval_episodes: Positive = 100  # episodes per row of the table in evaluations during training
    final_episodes: Count = 1000  # episodes per row, final evaluation or --eval-only; 0: none
    save_every: Count = 200_000  # environment steps between checkpoints (last two kept); 0: at end
    # Environment
    task: str = "treasure"  # world: treasure, resource, pacman, signpost, rooms or delivery
    population: str = "6"  # number of agents; per type in pacman (8,4), rooms (6,3), delivery (6,2)
    shaping: bool = True  # treasure, pacman, delivery: also reward -.1 x distance to the goal
    collision_penalty: Amount = 0.0  # treasure: subtracted from rewards, per agent touched and step
    num_envs: Positive = 12  # B, parallel worlds in each process
    max_episode_steps: Positive = 20  # steps after which an episode is truncated
    # Method
    share_parameters: bool = False  # one parameter set per type of agent, not one per agent
    heads: Positive = 4  # X, attention heads of the critic
    entropy_coef: Amount = 0.01  # alpha, entropy's weight, Eqs. (7), (8); code: 1 / reward_scale
    discount_entropy: bool = True  # discount the target's entropy, Eq. (7); off: not, as the code
    logit_penalty: Amount = 1e-3  # weight of the mean squared logits of attention and of policies
    polyak: Share = 0.001  # share of the way that target networks go after each update
    # Base algorithm
    hidden_size: Positive = 128  # H, units of a hidden layer
    learning_rate: Amount = 1e-3  # learning rate of Adam
    weight_decay: Amount = 1e-3  # weight decay of the critic
    gamma: Share = 0.99  # discount factor
    batch_size: Positive = 1024  # M, transitions in a minibatch, over all processes
    buffer_size: Positive = 1_000_000  # transitions that a replay holds, over all processes
    update_every: Positive = 100  # environment steps that a replay gets between updates
    num_updates: Positive = 4  # updates in a row, each with a minibatch of its own
    scale_rewards: bool = True  # divide rewards by their running standard deviation
    critic_grad_norm: Above = 10.0  # the critic's gradients are clipped to N times this norm
    actor_grad_norm: Above = 0.5  # each policy's gradients are clipped to this norm
    compile: bool = False  # on a GPU: compile the worlds


PRESETS = {
    "paper": {},
    "cpu": {
        "num_envs": 64,
        "batch_size": 512,
        "update_every": 256,
        "polyak": 0.005,
    },
}
LINE = ("return", "critic_loss", "entropy", "sps")  # printed if there is no progress bar
RESUMABLE = ("compile",)  # flags that may change with --resume


def validate(args: Args) -> list[tuple[Any, str]]:
    """Flag combinations to refuse, each as (whether args has it, error message)."""
    without = args.entropy_coef == 0 and not args.discount_entropy
    return [
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size"),
        (args.batch_size < 2, "--batch-size 1 has no variance for batch norm"),
        (args.hidden_size % args.heads, "--hidden-size is no multiple of --heads"),
        (without, "--no-discount-entropy has no effect with --entropy-coef 0"),
    ]


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


class View(NamedTuple):
    """Observations of N agents at M moments, as the networks read them."""

    obs: Tensor  # (M, N, O) own features, then those of the others; 0 for the dead and the unseen
    alive: Tensor  # (M, N) bool
    counts: tuple[int, ...]  # agents of each parameter set, in order


def flat_observation(obs: Observation) -> Tensor:
    """Observations (M, N, O), O = Ds + (N - 1) De: own features, then the others' in order."""
    N, device = obs.own.shape[1], obs.own.device
    entities = obs.entities() * obs.mask()[..., None]  # (M, N, N, De)
    pairs = tuple(N * i + j for i in range(N) for j in range(N) if i != j)
    pairs = constant(pairs, torch.int64, device)
    others = entities.flatten(1, 2).index_select(1, pairs).unflatten(1, (N, N - 1))
    flat = torch.cat((obs.own, others.flatten(2)), -1)
    return flat * obs.alive[..., None]


def per_agent(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Copy rows of parameter sets to their agents, (S, ...) -> (N, ...); counts: agents per set."""
    numbers = constant(counts, torch.int64, x.device)
    return x.repeat_interleave(numbers, 0, output_size=sum(counts))


def per_set(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Sum rows over each parameter set's agents, (N, ...) -> (S, ...); counts: agents per set."""
    return torch.stack([part.sum(0) for part in x.split(counts)])


class BatchNorm(nn.Module):
    """Batch norm without weights, for each parameter set, over its living agents. Training uses the
    batch's statistics and updates the running ones, which evaluation mode uses. With a parameter
    set per agent, all alive, it equals torch's BatchNorm1d(affine=False)."""

    MOMENTUM, EPSILON = 0.1, 1e-5

    def __init__(self, sets: int, inputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(sets, inputs))
        self.register_buffer("variance", torch.ones(sets, inputs))

    def forward(self, x: Tensor, view: View) -> Tensor:  # (M, N, I) -> (M, N, I)
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = self.batch_statistics(x, view)
        deviation = (variance + self.EPSILON).sqrt()
        return (x - per_agent(mean, view.counts)) / per_agent(deviation, view.counts)

    @torch.no_grad()
    def batch_statistics(self, x: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return mean and variance (S, I) over all processes; update the running ones by them."""
        alive = view.alive[..., None].to(x.dtype)  # (M, N, 1)
        rows = sum_over_processes(per_set(alive.sum(0), view.counts))  # (S, 1)
        sums = sum_over_processes(per_set((x * alive).sum(0), view.counts))
        mean = sums / rows.clamp(min=1)
        centred = (x - per_agent(mean, view.counts)) * alive
        squares = sum_over_processes(per_set(centred.square().sum(0), view.counts))
        step = self.MOMENTUM * (rows > 1).to(x.dtype)  # one row has no variance
        self.mean.lerp_(mean, step)
        self.variance.lerp_(squares / (rows - 1).clamp(min=1), step)  # unbiased, as in torch
        return mean, squares / rows.clamp(min=1)


class Linear(nn.Module):
    """A linear layer with S parameter sets; each begins with the weights of torch's nn.Linear."""

    def __init__(self, sets: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(sets, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(sets, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, view: View) -> Tensor:  # (M, N, I) -> (M, N, outputs)
        return grouped_linear(x, self.weight, self.bias, view.counts)


class Actor(nn.Module):
    """pi_i: the policies of all agents. Each reads its agent's own observation."""

    def __init__(self, sets: int, obs_size: int, args: Args):
        super().__init__()
        H = args.hidden_size
        self.norm = BatchNorm(sets, obs_size)
        self.first = Linear(sets, obs_size, H)
        self.second = Linear(sets, H, H)
        self.out = Linear(sets, H, NUM_ACTIONS)

    def forward(self, view: View) -> Tensor:
        """Logits (M, N, A)."""
        x = self.norm(view.obs, view)
        x = F.leaky_relu(self.first(x, view))
        x = F.leaky_relu(self.second(x, view))
        return self.out(x, view)


class AttentionCritic(nn.Module):
    """Q_1 ... Q_N. Encoders and f_i are per parameter set; queries, keys, values are for all."""

    def __init__(self, sets: int, obs_size: int, args: Args):
        super().__init__()
        H, A = args.hidden_size, NUM_ACTIONS
        self.heads = args.heads
        self.state_norm = BatchNorm(sets, obs_size)
        self.state_encoder = Linear(sets, obs_size, H)
        self.action_norm = BatchNorm(sets, obs_size + A)
        self.action_encoder = Linear(sets, obs_size + A, H)
        self.query = nn.Linear(H, H, bias=False)
        self.key = nn.Linear(H, H, bias=False)
        self.value = nn.Linear(H, H)
        self.first = Linear(sets, 2 * H, H)
        self.out = Linear(sets, H, A)

    def forward(self, view: View, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q_i(o, (b, a_-i)) (M, N, A) for all own actions b, and the logits of attention
        (M, X, N, N). Of actions (M, N), Q_i reads the others' only."""
        one_hot = F.one_hot(actions, NUM_ACTIONS).to(view.obs.dtype)
        pair = torch.cat((view.obs, one_hot), -1)  # o_j, a_j
        pair = self.action_norm(pair, view)
        x = F.leaky_relu(self.action_encoder(pair, view))  # x_j (M, N, H)
        s = self.state_norm(view.obs, view)
        s = F.leaky_relu(self.state_encoder(s, view))  # s_i (M, N, H)
        split = (self.heads, -1)
        e, logits = attend(
            query=self.query(s).unflatten(-1, split),  # (M, N, X, D)
            key=self.key(x).unflatten(-1, split),
            value=F.leaky_relu(self.value(x)).unflatten(-1, split),
            mask=others_alive(view),
        )
        # Eq. (5), with s_i of o_i alone, as in the code: so Q_i has an output for every action
        hidden = torch.cat((s, e.flatten(2)), -1)  # (M, N, 2 H)
        hidden = F.leaky_relu(self.first(hidden, view))
        return self.out(hidden, view), logits

    def shared_parts(self) -> nn.ModuleList:
        """Layers that all agents' losses reach; as in the code, encoders of (o_j, a_j), too."""
        return nn.ModuleList((self.action_encoder, self.query, self.key, self.value))


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
        N = game.num_agents
        self.sets = len(game.population) if args.share_parameters else N
        obs_size = game.own_features + (N - 1) * game.entity_features
        torch.manual_seed(args.seed)
        self.actor = Actor(self.sets, obs_size, args).to(device)
        self.critic = AttentionCritic(self.sets, obs_size, args).to(device)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic = copy.deepcopy(self.critic)
        self.actor.eval()  # acting uses running statistics, update() those of minibatches
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.actor_optimiser = adam(self.actor.parameters())
        self.critic_optimiser = adam(self.critic.parameters(), weight_decay=args.weight_decay)

    def view(self, game: Game, obs: Observation) -> View:
        """The networks' input for observations of a game."""
        counts = game.population if self.args.share_parameters else (1,) * game.num_agents
        return View(obs=flat_observation(obs), alive=obs.alive.contiguous(), counts=counts)

    @torch.no_grad()
    def follow(self) -> None:
        """Move target networks by --polyak towards the others; they keep their own batch norm."""
        pairs = (self.target_actor, self.actor), (self.target_critic, self.critic)
        for target, net in pairs:
            parameters = list(target.parameters()), list(net.parameters())
            torch._foreach_lerp_(*parameters, self.args.polyak)


# --- 5. The paper ---------------------------------------------------------------------------------


def others_alive(view: View) -> Tensor:
    """Return (M, N, N) bool: whether agent j lives and is not i."""
    itself = torch.eye(view.alive.shape[1], dtype=torch.bool, device=view.alive.device)
    return view.alive[:, None] & ~itself


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with query, key, value (M, N, X, D) and mask (M, N, N). Returns e (M, N, X, D), 0
    if nobody else lives, and logits before the scaling (M, X, N, N), 0 where mask is False."""
    mask = mask[:, None]
    logits = torch.einsum("mixd,mjxd->mxij", query, key) * mask
    # Eq. (6)
    scores = logits / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1) * mask
    return torch.einsum("mxij,mjxd->mixd", weights, value), logits


def attention_penalty(logits: Tensor, view: View) -> Tensor:
    """Mean square of each agent's logits (M, X, N, N), added up over heads -> (N,)."""
    pairs = others_alive(view) & view.alive[..., None]  # (M, N, N)
    squares = (logits.square().sum(1) * pairs).sum((0, 2))
    return squares / pairs.sum((0, 2)).clamp(min=1)


def td_target(args: Args, agent: Agent, batch: Batch, rng: torch.Generator) -> Tensor:
    """The targets y_i of Eq. (7) (M, N)."""
    next_view = batch.next_view
    log_probs = agent.target_actor(next_view).log_softmax(-1)
    actions = sample(log_probs, rng)  # a'
    q, _ = agent.target_critic(next_view, actions)
    next_value = pick(q, actions)
    entropy_bonus = -args.entropy_coef * pick(log_probs, actions)
    goes_on = next_view.alive * ~batch.terminated[:, None]
    # Eq. (7)
    if args.discount_entropy:
        return batch.rewards + args.gamma * (next_value + entropy_bonus) * goes_on
    return batch.rewards + args.gamma * next_value * goes_on + entropy_bonus  # code: at ends, too


def critic_loss(args: Args, agent: Agent, batch: Batch, rng: torch.Generator) -> Tensor:
    """Loss () of Eq. (7) with the penalty on attention's logits, summed over agents."""
    with torch.no_grad():
        target = td_target(args, agent, batch, rng)
    q, logits = agent.critic(batch.view, batch.actions)
    q = pick(q, batch.actions)
    # Eq. (7)
    squares = mean((q - target).square(), batch.view.alive)
    penalty = attention_penalty(logits, batch.view)
    return (squares + args.logit_penalty * penalty).sum()


def advantage(q: Tensor, probs: Tensor, actions: Tensor) -> Tensor:
    """Advantages A_i (M, N) from q and probs (M, N, A) and actions (M, N)."""
    # Eq. (9): the baseline is the mean Q over own actions, with the others' fixed
    baseline = (probs * q).sum(-1)
    return pick(q, actions) - baseline


def actor_loss(
    args: Args, agent: Agent, batch: Batch, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss of Eq. (8) and policy entropy of each agent, both (N,)."""
    view = batch.view
    logits = agent.actor(view)
    log_probs = logits.log_softmax(-1)  # (M, N, A)
    probs = log_probs.exp()
    with torch.no_grad():  # the critic does not learn from this
        actions = sample(log_probs, rng)  # of all agents, from the present policies
        q, _ = agent.critic(view, actions)
        log_prob = pick(log_probs, actions)
        weight = advantage(q, probs, actions) - args.entropy_coef * log_prob
    # Eq. (8)
    loss = -mean(pick(log_probs, actions) * weight, view.alive)
    penalty = mean(logits.square().mean(-1), view.alive)
    entropy = mean(-(probs * log_probs).sum(-1), view.alive)
    return loss + args.logit_penalty * penalty, entropy.detach()


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
    worlds are stored; observations are computed again for each minibatch."""

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
            # paper is silent; code subtracts the mean, too: that would change games that end early
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


@torch.no_grad()
def collect(agent: Agent, collector: Collector, rng: torch.Generator) -> None:
    """Take one step in all worlds and store it in the replay."""
    worlds = collector.worlds
    state = worlds.state
    view = agent.view(collector.game, worlds.obs)
    actions = sample(agent.actor(view).log_softmax(-1), rng)  # (B, N)
    step = worlds.step(actions)
    row = {"state": state, "final_state": step.final_state, "actions": actions}
    row |= {"rewards": step.reward, "terminated": step.terminated}
    collector.buffer.add(row, view.alive)
    collector.returns.add(step)


# --- 7. Update ------------------------------------------------------------------------------------


def mean(x: Tensor, alive: Tensor) -> Tensor:
    """Mean (N,) of x (M, N) over the moments at which an agent lives."""
    return (x * alive).sum(0) / alive.sum(0).clamp(min=1)


def pick(x: Tensor, actions: Tensor) -> Tensor:  # (M, N, A), (M, N) -> (M, N)
    return x.gather(-1, actions[..., None])[..., 0]


def update_critic(
    args: Args, agent: Agent, batch: Batch, rng: torch.Generator
) -> dict[str, Tensor]:
    """One step of the critic; returns scalars for the log."""
    N = batch.actions.shape[1]
    loss = critic_loss(args, agent, batch, rng)
    agent.critic_optimiser.zero_grad()
    loss.backward()
    average_gradients(agent.critic)
    for p in agent.critic.shared_parts().parameters():  # as in the code
        p.grad /= N
    norm = nn.utils.clip_grad_norm_(agent.critic.parameters(), args.critic_grad_norm * N)
    agent.critic_optimiser.step()
    return {"critic_loss": loss.detach(), "critic_grad_norm": norm}


def clip_each_policy(actor: Actor, limit: float) -> Tensor:
    """Clip gradients of each parameter set to norm `limit`; return the norms (S,) before that."""
    gradients = [p.grad for p in actor.parameters()]  # (S, ...)
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
    norm = torch.stack(squares).sum(0).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient *= scale.view(-1, *[1] * (gradient.dim() - 1))
    return norm


def update_actors(
    args: Args, agent: Agent, batch: Batch, rng: torch.Generator
) -> dict[str, Tensor]:
    """One step of all policies; returns scalars for the log."""
    losses, entropy = actor_loss(args, agent, batch, rng)
    counts = constant(batch.view.counts, torch.int64, losses.device)
    # ours: the loss of a policy that several agents share is the mean of theirs
    policy_losses = per_set(losses, batch.view.counts) / counts
    agent.actor_optimiser.zero_grad()
    policy_losses.sum().backward()
    average_gradients(agent.actor)
    norm = clip_each_policy(agent.actor, args.actor_grad_norm)
    agent.actor_optimiser.step()
    return {
        "actor_loss": losses.detach().mean(),
        "actor_grad_norm": norm.mean(),
        "entropy": entropy.mean(),
    }


def update(
    args: Args, agent: Agent, collector: Collector, rng: torch.Generator
) -> dict[str, Tensor]:
    """Take num_updates steps of critic, policies and target networks. Returns scalars for the log;
    RunError if one of them or a reward is not finite."""
    scalars = collections.defaultdict(list)
    buffer = collector.buffer
    agent.actor.train()
    for _ in range(args.num_updates):
        batch = buffer.sample(agent, rng, args.batch_size)
        found = update_critic(args, agent, batch, rng)
        found |= update_actors(args, agent, batch, rng)
        agent.follow()
        for name, x in found.items():
            scalars[name].append(x)
    agent.actor.eval()
    means = {name: torch.stack(x).mean() for name, x in scalars.items()}
    check_finite(rewards=buffer.reward_scale.sums, **means)
    return means


# --- 8. Evaluate ----------------------------------------------------------------------------------


def net_player(agent: Agent, seed: int) -> Player:
    """The agents as a player for envs.particle.episodes; actions are sampled, not greedy."""
    rng = torch.Generator().manual_seed(seed)

    def act(worlds: ParticleWorld) -> Tensor:  # (B, N)
        view = agent.view(worlds.game, worlds.obs)
        return sample(agent.actor(view).log_softmax(-1), rng)

    return act


def evaluate(args: Args, agent: Agent, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Play episodes, return {row: {figure: value}}; the final evaluation adds scripted players."""
    world_seed, player_seed, scripted_seed = evaluation.rng.integers(2**31, size=3).tolist()
    worlds = make_envs(args, args.population, evaluation.episodes, world_seed)
    players = {"": net_player(agent, player_seed)}
    if evaluation.final:
        players |= scripted_players(args.task, scripted_seed)
    return play_all(evaluation, worlds, players, world_seed)


@torch.random.fork_rng(devices=[])  # a new network draws its weights: the caller's generator stays
def load_agent(path: str) -> tuple[Args, Agent]:
    """Load arguments and networks of a run or checkpoint, on the CPU; UsageError if another script
    wrote it."""
    args = saved_args(path, Args)
    args = dataclasses.replace(args, device="cpu", compile=False)
    game = make_envs(args, args.population, num_envs=1, seed=1).game
    agent = Agent(args, game, torch.device("cpu"))
    saved, _ = load_checkpoint(path)
    restore(agent, saved["agent"], path)
    return args, agent


def load_player(path: str, seed: int = 1) -> Player:
    """The policy of a run or checkpoint as a player for envs.particle.episodes."""
    _, agent = load_agent(path)
    return net_player(agent, seed)


# --- 9. Train -------------------------------------------------------------------------------------


def train(args: Args) -> int:
    """Train, or only evaluate with --eval-only; return the exit code."""
    keep_freed_memory()
    with Run(args, table, LINE) as run:
        args = run.own_share(args, "batch_size", "buffer_size", "update_every")
        check(validate(args))  # again: a step of its worlds must fit into a process's share
        collector = Collector(args, args.population, run.device)
        agent = Agent(args, collector.game, run.device)
        buffer = collector.buffer
        rng = own_generator(args.seed)
        run.restore(agent=agent)
        run.judge = functools.partial(evaluate, args, agent)
        if args.eval_only:
            return run.evaluate_only()
        run.begin(
            args.task,
            parts={"agent": agent},
            own={"rng": rng, "collector": collector},
            replays={args.population: buffer},
        )
        while run.goes_on():
            before = buffer.steps // args.update_every
            collect(agent, collector, rng)
            run.lap("collect_s")
            due = buffer.steps // args.update_every - before  # multiples that were passed
            for _ in range(due if buffer.size >= args.batch_size else 0):
                run.note(update(args, agent, collector, rng))
            run.lap("learn_s")
            run.advance(args.num_envs * run.size)
            if run.is_due(args.log_every):
                run.log(report_returns([collector.returns]))
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                run.evaluate("eval")
        return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return call(
        lambda: train(read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS))
    )


if __name__ == "__main__":
    leave(main())
