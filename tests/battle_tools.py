"""What tests of scripts in battles share: small runs, replays, made-up moments, mixing in NumPy,
what flags are measured by, weak enemies."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import harness

import numpy as np
import pytest
import torch
from runs import differences, exact, index, metrics

from envs.smac import worlds
from envs.smac.combat import SIDE, Combat
from envs.smac.resource_collection import forager

CPU = torch.device("cpu")
SMALL = "--hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 --buffer-size 40 --num-envs 4"
SMALL += " --batch-size 6"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were; one thread; no list of installed
    packages, which takes longer than a tiny run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "distributions", lambda: [])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read(module, flags):
    """The arguments of a command line."""
    argv = flags.split()
    return harness.read_args(module.Args, argv, module.validate, module.RESUMABLE, module.PRESETS)


def tiny(run_dir, steps, *flags):
    """The command line of a run of some environment steps, at most 16 an iteration."""
    argv = "--num-envs 2 --batch-size 2 --buffer-size 6 --updates-per-iteration 1 --hidden-size 8"
    argv += " --heads 2 --rnn-size 4 --mixing-size 3 --max-episode-steps 8 --team-sizes 3 4"
    argv += " --eval-team-sizes 5 --eval-every 0 --eval-episodes 2 --final-episodes 0"
    argv += " --save-every 0 --log-every 1000000"
    own = ("--total-timesteps", steps, "--run-dir", run_dir, *flags)
    return [str(x) for x in (*argv.split(), *own)]


def resuming(run_dir, steps, *flags):
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", steps, *flags)]


def run(module, run_dir, steps, *flags):
    """A whole run; its last checkpoint."""
    assert module.main(tiny(run_dir, steps, *flags)) == 0
    return exact(run_dir)


def watch_evaluations(module, monkeypatch):
    """What a script's evaluations meet, as they go on: [(policy, sizes, seed of its battles)]."""
    battles_of, met = [], []
    make_envs, score = module.make_envs, worlds.score

    def made(args, sizes, num_envs, seed, **where):
        battles_of.append((sizes, seed))
        return make_envs(args, sizes, num_envs, seed, **where)

    def scored(scenario, battles, policy, *rest):
        met.append((policy, *battles_of[-1]))
        return score(scenario, battles, policy, *rest)

    monkeypatch.setattr(module, "make_envs", made)
    monkeypatch.setattr(worlds, "score", scored)
    return met


def check_seeds_of_evaluations(met, run_seed=1):
    """All policies of an evaluation meet a size in battles of one seed; other sizes have others."""
    seeds = {}
    for _, sizes, seed in met:
        seeds.setdefault(sizes, set()).add(seed)
    assert len(seeds) > 1 and {len(sizes) for sizes in seeds} == {1}
    assert {len(found) for found in seeds.values()} == {1}
    assert len(set.union(*seeds.values(), {run_seed})) == len(seeds) + 1


def initial(run_dir):
    return torch.load(Path(run_dir) / "checkpoint-0.pt", weights_only=True)


def saved_replay(run_dir, entry=None):
    """The replay beside the newest checkpoint or another one, held against its sha256."""
    (file,) = (entry or index(run_dir)[0])["replays"]
    path = Path(run_dir) / file["name"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
    return torch.load(path, weights_only=True)["replay"]


def nets(state):
    return {name: part for name, part in state["agent"].items() if "optimiser" not in name}


def finite(x):
    """Whether there is neither NaN nor infinity in a nested structure."""
    if isinstance(x, (dict, list, tuple)):
        return all(map(finite, x.values() if isinstance(x, dict) else x))
    if isinstance(x, torch.Tensor):
        return not x.is_floating_point() or bool(x.isfinite().all())
    return not isinstance(x, float) or np.isfinite(x)


def sharpen(net, scale=1.0, seed=0):
    """Perturb all weights: new policies are almost uniform and new values almost flat."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        noise = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        p.data += scale * noise / p.shape[-1] ** 0.5


def stacked(views):
    """(V, ...) of Views, or of what a mixer made of them."""
    return torch.stack([x for x in views if x is not None])


# --- Minibatches ----------------------------------------------------------------------------------


def setting(module, flags="", rounds=4, double=False, epsilon=1.0, noise=1.0):
    """A buffer of random battles and an agent far from its beginning, targets away from it."""
    args = read(module, f"{SMALL} --max-episode-steps 60 {flags}")
    battles = module.make_envs(args, args.team_sizes, args.num_envs, args.seed)
    agent = module.Agent(args, battles.family, CPU)
    networks = [part for part in agent.parts().values() if isinstance(part, torch.nn.Module)]
    for k, net in enumerate(networks):
        sharpen(net, noise, k)
    buffer, rng = module.ReplayBuffer(args, battles, CPU), torch.Generator().manual_seed(5)
    for _ in range(rounds):
        module.collect(battles, module.Player(agent, epsilon, rng), buffer)
    if double:
        for net in networks:
            net.double()
    return SimpleNamespace(args=args, battles=battles, agent=agent, buffer=buffer, rng=rng)


def sample(s, seed, size):
    return s.buffer.sample(torch.Generator().manual_seed(seed), size)


def as_double(features):
    return features._replace(entities=features.entities.double())


def synthetic(
    module, seed=0, played=((1, 1, 1), (1, 1, 1), (1, 1, 0)), A=4, filled=(4, 3, 2), width=9
):
    """Features of random entities: T x 3 moments of battles with so many units a side."""
    rng = torch.Generator().manual_seed(seed)
    played = torch.tensor(played, dtype=torch.bool)
    battle = played.nonzero()[:, 1]
    M, slot = len(battle), torch.arange(A)
    side = slot >= torch.tensor(filled)[battle][:, None]
    empty = torch.cat((side, side), 1)
    unseen = torch.rand(M, A, 2 * A, generator=rng) < 0.4
    unseen |= empty[:, None]
    unseen[:, slot, slot] = False
    avail = torch.rand(M, A, 5, generator=rng) < 0.6
    avail[..., 0] = side
    avail[..., 1] = ~side
    entities = torch.randn(M, 2 * A, width, generator=rng)
    return module.Features(entities, unseen, empty, avail, played)


def permuted(features):
    """Agents among themselves and enemies among themselves, four of each; the agents' order."""
    mine, all_of = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1, 5, 7, 6, 4])
    moved = features._replace(
        entities=features.entities[:, all_of],
        unseen=features.unseen[:, mine][:, :, all_of],
        empty=features.empty[:, all_of],
        avail_actions=features.avail_actions[:, mine],
    )
    return moved, mine, all_of


def forward_view(batch, values, costs, gamma, td_lambda):
    """lambda-returns (K,) as weighted sums of n-step returns, each written out. values (K,): those
    at the ends of steps, less costs (K,), which a longer return has to pay, too."""
    place = batch.features.played.nonzero().tolist()
    step = {tuple(place[m]): k for k, m in enumerate(batch.now.tolist())}
    found = np.zeros(len(step))
    for (t, b), k in step.items():
        earned, n_step = 0.0, []
        while (t + len(n_step), b) in step:
            n = len(n_step)
            j = step[t + n, b]
            goes_on = not batch.terminated[j]
            earned += gamma**n * float(batch.rewards[j])
            n_step.append(earned + goes_on * gamma ** (n + 1) * float(values[j]))
            earned -= goes_on * gamma ** (n + 1) * float(costs[j])
        weights = [(1 - td_lambda) * td_lambda**n for n in range(len(n_step))]
        weights[-1] = td_lambda ** (len(n_step) - 1)
        found[k] = np.dot(weights, n_step)
    return found


def things_moved(module, battles):
    """Features in Resource Collection with egocentric=True, then those after all resources and the
    invader have moved a little; whether each agent's own row says so (M, A)."""
    battles.reset()
    for _ in range(30):
        battles.step(forager(battles))
    snap = battles.snapshot
    moved = snap._replace(resources=snap.resources + 0.02, invader=snap.invader + 0.02)
    played = torch.ones(1, battles.num_battles, dtype=torch.bool)
    last_actions = torch.full((battles.num_battles, SIDE), -1)
    seen = [battles.observe(x) for x in (snap, moved)]
    now, then = (module.encode(obs, last_actions, played, CPU) for obs in seen)
    A = now.unseen.shape[1]
    differs = (now.entities != then.entities)[:, :A]
    assert differs[..., 23:35].any() and not differs[..., :23].any()
    return now, then, differs.any(-1)


# --- Mixing in NumPy ------------------------------------------------------------------------------


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def weights_of(net):
    return {name: p.detach().double().numpy() for name, p in net.named_parameters()}


def numpy_hyper(p, g, heads, entities, empty, mask):
    """One hypernetwork for one moment: entities (16, D), mask (8, 16) -> (8, E), 0 if empty."""
    H = p["project"].shape[-1]
    rows = slice(g * H, (g + 1) * H)
    x = np.maximum(entities @ p["embed.weight"][rows].T + p["embed.bias"][rows], 0)
    found = np.zeros((8, p["out"].shape[-1]))
    d = H // heads
    for i in range(8):
        if empty[i]:
            continue
        parts = []
        for h in range(heads):
            of = slice(h * d, (h + 1) * d)
            query = x[i] @ p["attention.query"][g][:, of]
            seen = [j for j in range(16) if not mask[i, j]]
            keys = x[seen] @ p["attention.key_value"][g][:, of]
            values = x[seen] @ p["attention.key_value"][g][:, H:][:, of]
            share = softmax(keys @ query / np.sqrt(d)) if seen else np.zeros(0)
            parts.append(share @ values if seen else np.zeros(d))
        y = np.concatenate(parts) @ p["project"][g] + p["project_bias"][g]
        found[i] = y @ p["out"][g] + p["out_bias"][g]
    return found


def numpy_mix(p, heads, linear, q, entities, empty, gone, groups=None, elu=True):
    """Q_tot of q (8,), or of (2, 8) with groups (16,): own group, other group. elu: whether the
    mixer that is not linear has its ELU."""
    full = empty[:8, None] | empty[None]
    masks = [full]
    if groups is not None:
        apart = groups[:8, None] != groups[None]
        masks = [full | apart, full | ~apart]
    hyper = functools.partial(numpy_hyper, p, heads=heads, entities=entities, empty=empty)
    w = np.concatenate([hyper(0, mask=m) for m in masks])  # (8 or 16, E)
    v = hyper(1, mask=full).mean()
    q = q.reshape(-1)
    if linear:
        score = np.where(np.tile(gone, len(masks)), 0.0, w.mean(-1))
        return softmax(score) @ q + v
    final, b = hyper(2, mask=full).mean(0), hyper(3, mask=full).mean(0)
    x = q @ softmax(w) + b
    x = np.where(x > 0, x, np.expm1(np.minimum(x, 0))) if elu else x
    return x @ softmax(final) + v


# --- Flags ----------------------------------------------------------------------------------------
# What to measure on the state and directory of a run with and one without a flag.


def changed(*parts):
    return lambda state, run_dir: [state["agent"][part] for part in parts]


def shape(part, weight):
    return lambda state, run_dir: tuple(state["agent"][part][weight].shape)


def updates(state, run_dir):
    return float(state["agent"]["optimiser"]["state"].get(0, {}).get("step", 0))


def option(name):
    return lambda state, run_dir: state["agent"]["optimiser"]["param_groups"][0][name]


def moments_kept(state, run_dir):
    return sorted(state["agent"]["optimiser"]["state"][0])


def has_weight(of):
    return lambda state, run_dir: any(name.endswith(of) for name in state["agent"]["utility"])


def replayed(of):
    return lambda state, run_dir: of(saved_replay(run_dir))


def lines(column):
    """How many lines of the log have it."""
    return lambda state, run_dir: (
        sum(column in m for m in metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
    )


def rows(*keys):
    """Which of these rows the final evaluation has."""

    def measure(state, run_dir):
        results = json.loads((run_dir / "summary.json").read_text())["eval"]
        return [key for key in keys if key in results]

    return measure


def targets_follow(state, run_dir):
    return not differences(state["agent"]["utility"], state["agent"]["target_utility"])


def types(replay):
    return sorted(set(replay["type"].flatten().tolist()) - {-1})


EFFECTS = {  # flags; what to measure; without and with them, or None: the two must differ
    "scenario": ("--scenario mmm --team-sizes 5 --eval-team-sizes", replayed(types), None),
    "team_sizes": (
        "--team-sizes 5 --eval-team-sizes 4",
        replayed(lambda x: sorted(set((x["type"][:, :8] >= 0).sum(1).tolist()))),
        ([3, 4], [5]),
    ),
    "num_envs": ("--num-envs 4", lambda s, d: s["iteration"], (4, 2)),
    "max_episode_steps": (
        "--max-episode-steps 4",
        replayed(lambda x: int(x["length"].max())),
        (8, 4),
    ),
    "imagine": ("--no-imagine --log-every 16", lines("group_loss"), (0, 0)),
    "imagine_weight": ("--imagine-weight 0", changed("utility"), None),
    "target_head": ("--target-head pointer", has_weight("head.query.weight"), (False, True)),
    "returns": ("--returns lambda", changed("utility"), None),
    "timeout_terminates": ("--no-timeout-terminates", changed("utility"), None),
    "heads": ("--heads 4", changed("utility"), None),
    "recurrent": ("--no-recurrent", has_weight("gru.weight"), (False, True)),
    "own_beside": ("--own-beside", has_weight("own.weight"), (False, True)),
    "rnn_size": ("--rnn-size 7", shape("utility", "gru.weight_hh_l0"), ((12, 4), (21, 7))),
    "learning_rate": ("--learning-rate .01", option("lr"), (5e-4, 0.01)),
    "final_share": ("--final-share .6", option("lr"), (5e-4, 5e-4 * (1 + 48 / 64 * (0.6 - 1)))),
    "anneal_from": (
        "--final-share .6 --anneal-from 32",
        option("lr"),
        (5e-4, 5e-4 * (1 + 16 / 32 * (0.6 - 1))),
    ),
    "optimiser": (
        "--optimiser adam",
        moments_kept,
        (["square_avg", "step"], ["exp_avg", "exp_avg_sq", "step"]),
    ),
    "rmsprop_alpha": ("--rmsprop-alpha .5", option("alpha"), (0.99, 0.5)),
    "rmsprop_eps": ("--rmsprop-eps .1", option("eps"), (1e-5, 0.1)),
    "max_grad_norm": ("--max-grad-norm .00001", changed("utility"), None),
    "gamma": ("--gamma .5", changed("utility"), None),
    "batch_size": ("--batch-size 6", updates, (4.0, 2.0)),
    "buffer_size": ("--buffer-size 4", replayed(lambda x: len(x["length"])), (6, 4)),
    "replay_window": ("--replay-window 3", changed("utility"), None),
    "updates_per_iteration": ("--updates-per-iteration 3", updates, (4.0, 12.0)),
    "target_every": ("--target-every 8", targets_follow, (False, True)),
    "epsilon_start": ("--epsilon-start 0", replayed(lambda x: x["actions"]), None),
    "epsilon_final": ("--epsilon-final .9 --epsilon-steps 10", changed("utility"), None),
    "epsilon_steps": ("--epsilon-steps 16", replayed(lambda x: x["actions"]), None),
    "eval_team_sizes": (
        "--final-episodes 2 --eval-team-sizes 6 7",
        rows("5", "6", "7"),
        (["5"], ["6", "7"]),
    ),
}


def check_effect(effect, plain, run_dir, run_script):
    """A flag changes what it names. plain: state and directory of a run without it."""
    flags, measure, relation = effect
    state = run_script(run_dir, 64, *flags.split())
    without, with_flag = measure(*plain), measure(state, run_dir)
    if relation is None:
        assert differences({"": without}, {"": with_flag})
    else:
        assert (without, with_flag) == relation


# --- Learning -------------------------------------------------------------------------------------

QUICK = "--team-sizes 3 --eval-team-sizes --hidden-size 32 --rnn-size 32 --mixing-size 16"
QUICK += " --learning-rate 1e-3 --gamma .95 --batch-size 8 --updates-per-iteration 16"
QUICK += " --target-every 8 --epsilon-steps 8000 --max-episode-steps 60 --eval-every 0"
QUICK += " --final-episodes 400"


class WeakEnemies(Combat):
    """Of the enemies' hit points are 40 % left, and nothing of their shields; also in battles that
    begin within a step."""

    def reset(self):
        super().reset()
        self.weaken()
        return self.obs

    def step(self, actions):
        step = super().step(actions)
        self.weaken()
        return step

    def weaken(self):
        begins = self.battles["time"] == 0
        if begins.any():
            self.units["health"][begins, SIDE:] *= 0.4
            self.units["shield"][begins, SIDE:] = 0
            self.load_state_dict(self.state_dict())  # observations are computed anew


def stand_and_shoot(battles):
    """Nobody walks; who may attack, attacks the lowest tag."""
    avail = np.asarray(battles.obs.avail)
    targets = avail[..., 6:]
    still = np.where(avail[..., 0], 0, 1)
    return torch.from_numpy(np.where(targets.any(-1), 6 + targets.argmax(-1), still))
