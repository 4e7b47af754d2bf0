"""PP and RPM: the memory's laws, who acts, what trains, and the scripts as a whole on the toy."""

import ast
import dataclasses
import difflib
import os
import shlex
import signal
import subprocess
from pathlib import Path

from harness import Evaluation, RunArgs

import numpy as np
import pytest
import torch
from runs import (
    change_newest,
    command,
    differences,
    exact,
    metrics,
    only_error,
    resume,
    states,
    tiny,
)
from toolbox import MAPPO, ROOT, UNLIKE_DEFAULTS, load_script, mappo, setting, sharpen

from envs.meltingpot.episodes import in_turn

PP, RPM = "baselines.pp_meltingpot", "baselines.rpm_meltingpot"
PATHS = {name: ROOT / f"{name.replace('.', '/')}.py" for name in (PP, RPM)}
pp, rpm = (load_script(path) for path in PATHS.values())
SCRIPTS = {PP: pp, RPM: rpm}
NAMES = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Numbered(torch.nn.Module):
    """An actor that is nothing but its number."""

    def __init__(self, number):
        super().__init__()
        self.register_buffer("number", torch.tensor(number))


def numbers(actors):
    return [int(weights["number"]) for weights in actors]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close_to(counts, draws, share):
    """Whether binomial counts lie within 4.5 deviations of their expectation."""
    deviation = (draws * share * (1 - share)) ** 0.5
    return (np.abs(np.asarray(counts) - draws * share) < 4.5 * deviation + 1e-9).all()


def crowd(script, *flags, actors=3, share="0.6"):
    """A setting with a memory of actors that differ from the current one and from each other."""
    s = setting("--history-share", share, *flags, script=script)
    s.memory = script.new_memory(s.args)
    for seed in range(actors):
        net = s.agent.past_actor(s.agent.actor.state_dict())
        sharpen(net, seed=seed)
        s.memory.append(net, *([float(seed)] if script is rpm else []))
    sharpen(s.agent.actor, seed=99)
    return s


def collect(s):
    batch, s.state = s.script.collect(
        s.args, s.envs, s.agent, s.memory, s.state, rng=s.rng, method_rng=s.method_rng
    )
    return batch


def prepare(s):
    batch, s.state = s.script.prepare(s.args, s.agent, collect(s), s.state)
    return batch


# --- The memory -----------------------------------------------------------------------------------


def test_reservoir_is_uniform_over_the_past():
    """4 of 12 actors: each is kept in a third of the runs, early or late."""
    runs, kept = 1500, np.zeros(12)
    actors = [Numbered(k) for k in range(12)]
    for seed in range(runs):
        memory = pp.Memory(4, generator(seed))
        for actor in actors:
            memory.append(actor)
        found = numbers(memory.actors)
        assert len(found) == len(set(found)) == 4
        kept[found] += 1
    assert close_to(kept, runs, 4 / 12)
    everything = pp.Memory(0, generator())
    for actor in actors:
        everything.append(actor)
    assert numbers(everything.actors) == list(range(12))


def test_what_is_remembered_does_not_learn_on():
    actor, memory = Numbered(1), pp.Memory(0, generator())
    memory.append(actor)
    actor.number += 1
    assert numbers(memory.actors) == [1]


def test_pp_draws_different_actors_uniformly():
    memory, rng, count = pp.Memory(0, generator()), generator(), np.zeros(6)
    assert memory.draw(4, rng) == []
    for k in range(6):
        memory.append(Numbered(k))
    for _ in range(2000):
        drawn = numbers(memory.draw(4, rng))
        assert len(set(drawn)) == 4
        count[drawn] += 1
    assert close_to(count, 2000, 4 / 6)
    assert sorted(numbers(memory.draw(9, rng))) == list(range(6))


def test_key_is_the_floor():
    """Also of negative returns, and of those on a border."""
    memory = rpm.Memory(0.75, 20, generator())
    values = [*np.random.default_rng(0).normal(0, 3, 200), -0.75, 0.0, 0.75, 2.25]
    for k, value in enumerate(values):
        memory.append(Numbered(k), value)
        assert memory.rank(value) == np.floor(value / 0.75)
    for rank, places in memory.ranks().items():
        found = [values[k] for k in numbers(memory.actors[place] for place in places)]
        assert len(found) <= 20 and (np.floor(np.array(found) / 0.75) == rank).all()
        assert found == [memory.returns[place] for place in places]


def test_default_width_follows_the_range_of_returns():
    """It is a power of 2 of which 6 to 10 span all returns; ranks merge, none is split."""
    memory, together = rpm.Memory(None, 20, generator()), set()
    for k in range(200):
        value = 0.1 * (k % 2 - 0.5) * k * (k < 100) + 5.0 * (k >= 100)
        memory.append(Numbered(k), value)
        psi, spread = memory.psi(), max(memory.met) - min(memory.met)
        assert np.log2(psi) % 1 == 0 and len(memory.ranks()) <= 11
        assert spread <= 10 * psi and (k == 0 or spread > 5 * psi)
        ranks = [memory.rank(value) for value in memory.met]
        pairs = {(i, j) for i in range(k + 1) for j in range(i) if ranks[i] == ranks[j]}
        assert together <= pairs, "a rank was split"
        together = pairs
    assert psi == 1.0 and len(set(memory.met)) > 50
    flat = rpm.Memory(None, 20, generator())
    for k in range(30):
        flat.append(Numbered(k), 2.0)
    assert len(flat.ranks()) == 1 and len(flat.actors) == 20


def test_a_rank_keeps_a_uniform_sample():
    """3 of 9 actors of rank 0; the 4 of rank 1, in between, do not touch it."""
    runs, kept = 1500, np.zeros(9)
    for seed in range(runs):
        memory = rpm.Memory(1.0, 3, generator(seed))
        for k in range(9):
            memory.append(Numbered(k), 0.5)
            if k % 2:
                memory.append(Numbered(100 + k), 1.5)
        kept[[k for k in numbers(memory.actors) if k < 100]] += 1
    assert kept.sum() == 3 * runs and close_to(kept, runs, 3 / 9)


def test_merged_ranks_keep_a_uniform_sample():
    """Ranks of 2, 9 and 9 actors, 2 kept in each; with the last return they become one rank."""
    runs, kept = 1500, np.zeros(20)
    for seed in range(runs):
        memory = rpm.Memory(None, 2, generator(seed))
        for k, value in enumerate([0.3] * 2 + [0.7] * 9 + [1.2] * 9):
            memory.append(Numbered(k), value)
        assert sorted(map(len, memory.ranks().values())) == [2, 2, 2]
        memory.append(Numbered(20), 30.0)
        assert sorted(map(len, memory.ranks().values())) == [1, 2]
        kept[[k for k in numbers(memory.actors) if k < 20]] += 1
    assert close_to(kept, runs, 2 / 20)


def test_rpm_draws_ranks_uniformly_then_actors():
    """Lists of 1, 3 and 12: each rank a third of the draws, its actors alike."""
    memory, rng, sizes = rpm.Memory(1.0, 20, generator()), generator(), (1, 3, 12)
    assert memory.draw(4, rng) == []
    for rank, size in enumerate(sizes):
        for k in range(size):
            memory.append(Numbered(100 * rank + k), rank + 0.5)
    drawn = np.array(numbers(memory.draw(6000, rng)))
    for rank, size in enumerate(sizes):
        assert close_to((drawn // 100 == rank).sum(), 6000, 1 / 3)
        counts = [(drawn == 100 * rank + k).sum() for k in range(size)]
        assert close_to(counts, 6000, 1 / 3 / size)


# --- Who acts -------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("agents", [1, 2, 8])
def test_share_of_history(name, agents):
    """q, less what the safeguard spares: all N are past with q^N, and then one of them is not."""
    script, worlds = SCRIPTS[name], 20_000
    args = script.parse(["--substrate", "toy"])
    players = script.draw_players(args, (worlds, agents), 3, generator())
    past = players != script.CURRENT
    assert not past.all(1).any(), "at least one agent is current in each world"
    share = 0.3 - 0.3**agents / agents
    assert past.float().mean().item() == pytest.approx(share, abs=4.5 * (0.25 / worlds) ** 0.5)
    assert agents < 8 or share == pytest.approx(0.3, abs=1e-4)
    spread = past.float().mean(0)
    assert (spread - share).abs().max() < 0.02, "no seat is favoured"
    if past.any():
        counts = [(players == place).sum().item() for place in range(3)]
        assert close_to(counts, int(past.sum()), 1 / 3)
    nobody = script.draw_players(args, (worlds, agents), 0, generator())
    assert (nobody == script.CURRENT).all(), "the memory is empty"


CASES = [(pp, "--redraw", "iteration"), (pp, "--redraw", "episode"), (rpm, "--rank-width", "1")]


@pytest.mark.parametrize("script, flag, value", CASES)
def test_past_policies_act(script, flag, value, monkeypatch):
    """Actions' probabilities are those of the actors in memory, each with its own recurrent state,
    which is recomputed here agent by agent over two rollouts; theta's are right, too."""
    s, act_past = crowd(script, flag, value), script.act_past
    for rollout in range(2):
        before = s.state
        seen = []

        def watch(nets, views, state, *rest, seen=seen):
            seen.append((state.players, [net.state_dict() for net in nets]))
            return act_past(nets, views, state, *rest)

        monkeypatch.setattr(script, "act_past", watch)
        batch = collect(s)
        logits, _, _ = script.replay(
            s.args, s.agent.actor, batch.actor_views(), before.actor_hidden, s.agent.sprites
        )
        theta = script.chosen(logits.log_softmax(-1), batch.actions)
        assert torch.allclose(theta, batch.theta, atol=1e-4)
        assert torch.equal(batch.log_probs[batch.current], batch.theta[batch.current])
        assert 0.1 < (~batch.current).float().mean() < 0.7
        redrawn = value == "iteration"
        hidden = torch.zeros_like(before.past_hidden) if redrawn else before.past_hidden.clone()
        for t, (players, crew) in enumerate(seen):
            assert torch.equal(batch.current[t], players == script.CURRENT)
            changed = players != (seen[t - 1][0] if t else players)
            assert not (changed & ~batch.starts[t, :, None]).any() or (redrawn and t == 0)
            for b, n in (players != script.CURRENT).nonzero().tolist():
                weights = crew[players[b, n]]
                is_kept = [
                    all(torch.equal(weights[k], x) for k, x in kept.items())
                    for kept in s.memory.actors
                ]
                assert sum(is_kept) == 1
                if t == 0 and not redrawn and not batch.starts[0, b]:  # plays on
                    place = before.players[b, n]
                    assert torch.equal(before.crew[place]["out.weight"], weights["out.weight"])
                net = s.agent.past_actor(weights)
                views = pp.Views(
                    batch.tile_ids[t, b, n][None, None],
                    batch.actor_features[t, b, n][None, None],
                    batch.starts[t, b, None],
                )
                log_probs, new = script.act(net, views, hidden[b, n][None, None], s.agent.sprites)
                hidden[b, n] = new[0, 0]
                expected = log_probs[0, 0, batch.actions[t, b, n]]
                assert expected.item() == pytest.approx(batch.log_probs[t, b, n].item(), abs=1e-4)
        assert rollout or (batch.log_probs - batch.theta)[~batch.current].abs().max() > 0.1


@pytest.mark.parametrize("flags", [(), ("--team-reward",)])
def test_returns_are_those_of_current_agents(flags):
    """R: only of agents that theta played in the episode, per 1,000 steps; of what it learns from,
    so the sum over all agents with --team-reward."""
    s = crowd(rpm, *flags)
    s.envs.counter.clear()
    batch = collect(s)
    expected, returns, lengths = [], np.zeros((4, 2)), np.zeros(4)
    for t in range(20):
        returns += batch.rewards[t].numpy()
        lengths += 1
        for b in torch.nonzero(batch.terminated[t])[:, 0].tolist():
            rates = 1000 * returns[b] / lengths[b]
            expected += rates[batch.current[t, b].numpy()].tolist()
            returns[b] = lengths[b] = 0
    assert batch.returns == pytest.approx(expected) and 0 < len(expected) < 2 * len(batch.episodes)
    before = len(s.memory.met)
    rpm.remember(s.memory, s.agent.actor, batch)
    assert s.memory.met[before:] == pytest.approx([np.mean(expected)])
    rpm.remember(s.memory, s.agent.actor, dataclasses.replace(batch, returns=[]))
    assert len(s.memory.met) == before + 1, "no episode ended: nobody is kept"


# --- What trains ----------------------------------------------------------------------------------


@NAMES
def test_centred_clip_and_weights_against_numpy(name):
    script = SCRIPTS[name]
    s = crowd(script, "--use-history")
    batch = prepare(s)
    weight = np.exp(batch.theta.numpy() - batch.log_probs.numpy())
    current = batch.current.numpy()
    assert np.allclose(script.clip_centre(batch).numpy(), weight) and (weight[current] == 1).all()
    rng = np.random.default_rng(0)
    ratio = weight * np.exp(rng.normal(0, 0.3, weight.shape).astype(np.float32))
    advantage = batch.advantages.numpy()
    expected = np.minimum(ratio * advantage, np.clip(ratio, 0.8 * weight, 1.2 * weight) * advantage)
    found = script.clip_objective(
        torch.from_numpy(ratio), batch.advantages, 0.2, torch.from_numpy(weight)
    )
    assert np.allclose(found.numpy(), expected, atol=1e-6)
    logged = script.importance_weights(batch)
    past = weight[~current].astype(np.float64)
    assert logged["weight_max"].item() == pytest.approx(past.max(), rel=1e-5)
    effective = past.sum() ** 2 / (past**2).sum() / past.size
    assert logged["effective_samples"].item() == pytest.approx(effective, rel=1e-4)
    assert advantage.mean() == pytest.approx(0, abs=1e-5)


@NAMES
@pytest.mark.parametrize("use", [True, False])
def test_samples_that_train(name, use):
    """Losses and statistics of one step without a learning rate, against NumPy. No clip cuts the
    weight of a past policy's sample, as a clip around 1 would."""
    script = SCRIPTS[name]
    flags = ["--epochs", "1", "--minibatches", "1", "--actor-lr", "0", "--critic-lr", "0"]
    s = crowd(script, *flags, *["--use-history"] * use)
    batch = prepare(s)
    who = np.ones(batch.current.shape, bool) if use else batch.current.numpy()
    advantage, values, targets = (
        x.numpy()[who] for x in (batch.advantages, batch.values, batch.targets)
    )
    assert advantage.mean() == pytest.approx(0, abs=1e-5)
    assert advantage.std() == pytest.approx(1, abs=1e-3)
    assert targets.mean() == pytest.approx(0, abs=1e-4)
    scalars = script.update(s.args, s.agent, batch, s.rng)
    weight = np.exp((batch.theta - batch.log_probs).numpy())[who]
    around_one = np.minimum(weight * advantage, np.clip(weight, 0.8, 1.2) * advantage)
    assert not use or abs((around_one - weight * advantage).mean()) > 0.01
    # In float32, by chunks instead of step by step
    assert scalars["policy_loss"].item() == pytest.approx(-(weight * advantage).mean(), abs=1e-4)
    theta, _, _ = script.replay(
        s.args, s.agent.actor, batch.actor_views(), batch.actor_hidden[0], s.agent.sprites
    )
    theta = theta.log_softmax(-1).double().numpy()
    entropy = -(np.exp(theta) * theta).sum(-1)
    assert abs(entropy[batch.current.numpy()].mean() - entropy.mean()) > 1e-3
    assert scalars["entropy"].item() == pytest.approx(entropy[who].mean(), abs=1e-4)
    # Units of the critic's outputs are still those of before the first rollout, 0 and 1.
    mean, std = (x.item() for x in s.agent.value_norm.mean_std())
    clipped = values + np.clip(values * std + mean - values, -0.2, 0.2)
    errors = np.stack([np.abs(x - targets) for x in (values * std + mean, clipped)])
    huber = np.where(errors < 10, errors**2 / 2, 10 * (errors - 5)).max(0)
    assert scalars["value_loss"].item() == pytest.approx(huber.mean(), rel=1e-3)


# --- The scripts as a whole -----------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("flags", [[], UNLIKE_DEFAULTS], ids=["defaults", "others"])
def test_without_history_it_is_mappo_bit_for_bit(name, flags):
    for script, run_dir, own in (
        (mappo, "parent", ()),
        (SCRIPTS[name], "child", ("--history-share", 0)),
        (SCRIPTS[name], "on", ()),
    ):
        assert script.main(tiny(name, run_dir, 4, *own, *flags)) == 0
    parent, child, on = (exact(x)["agent"] for x in ("parent", "child", "on"))
    assert differences(parent, child) == []
    assert any(x.startswith("/actor/") for x in differences(on, parent))


@pytest.mark.parametrize("child, parent", [(PATHS[PP], MAPPO), (PATHS[RPM], PATHS[PP])])
def test_diff_is_the_method(child, parent):
    parent, child = (path.read_text().splitlines() for path in (parent, child))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.45 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


@NAMES
def test_past_actors_play_the_row_of_the_past(name, monkeypatch):
    """Each player beside us has the weights of a remembered actor, and none the current ones. PP
    draws different ones."""
    s, script = crowd(SCRIPTS[name], "--background", "past"), SCRIPTS[name]
    crew, seen = [], {}

    def watch_crew(players):
        crew.extend(player.net.state_dict() for player in players)
        return in_turn(players)

    def watch_rows(envs, pairs, **rest):
        seen.update(pairs)
        return {}

    monkeypatch.setattr(script, "in_turn", watch_crew)
    monkeypatch.setattr("envs.meltingpot.scenarios.play_pairs", watch_rows)
    evaluation = Evaluation(s.args, "eval", 0, Path())
    script.evaluate(s.args, s.agent, memory=s.memory, others={}, evaluation=evaluation)
    assert seen.keys() == {"self-play", "v past"} and seen["v past"][0].net is s.agent.actor
    who = [[differences(x, dict(past)) == [] for past in s.memory.actors] for x in crew]
    assert crew and (np.sum(who, 1) == 1).all()
    assert script is rpm or np.sum(who, 0).max() == 1
    assert all(differences(x, s.agent.actor.state_dict()) for x in crew)


@NAMES
def test_who_acted_is_remembered_and_not_who_learned(name):
    """Behind its first iteration, a run remembers the actor that it began with."""
    assert SCRIPTS[name].main(tiny(name, "run", 1)) == 0
    saved, begun = states("run")
    assert begun["timesteps"] == 0
    (remembered,) = saved["memory"]["actors"]
    assert differences(dict(begun["agent"]["actor"]), dict(remembered)) == []
    assert differences(dict(saved["agent"]["actor"]), dict(remembered))


CUTS = [
    (PP, "--memory 4 --policies-per-rollout 3 --use-history"),
    pytest.param(PP, "--redraw episode --max-episode-steps 7", marks=pytest.mark.long),
    (RPM, "--rank-width 10"),
]


@pytest.mark.parametrize("name, flags", CUTS)
def test_six_are_three_and_three(name, flags):
    flags = ["--history-share", "0.7", *flags.split()]
    assert SCRIPTS[name].main(tiny(name, "whole", 6, *flags)) == 0
    assert SCRIPTS[name].main(tiny(name, "cut", 3, *flags)) == 0
    assert SCRIPTS[name].main(resume("cut", 6)) == 0
    assert differences(exact("whole"), exact("cut")) == []
    assert metrics("whole") == metrics("cut")
    memory = exact("cut")["memory"]
    count = 4 if "--memory" in flags else 6
    assert len(memory["actors"]) == count and len(exact("cut")["ranks"][0]["state"]["crew"]) > 0
    newest = memory["actors"][-1]["out.weight"]
    assert not torch.equal(newest, exact("cut")["agent"]["actor"]["out.weight"])


def actor_of(run_dir):
    return exact(run_dir)["agent"]["actor"]


def logged(key):
    return lambda run_dir: [m[key] for m in metrics(run_dir) if key in m]


def rows(run_dir):
    return sorted({k.split("/")[1] for k in metrics(run_dir)[-1] if k.startswith("final/")})


FLAGS = [
    (PP, "--history-share 0.9", logged("memory/share"), None),
    (PP, "--memory 2 --policies-per-rollout 2", logged("memory/actors"), [1, 2, 2, 2]),
    (PP, "--memory 0", logged("memory/actors"), [1, 2, 3, 4]),
    (PP, "--policies-per-rollout 1", lambda d: len(exact(d)["ranks"][0]["state"]["crew"]), 1),
    (PP, "--redraw episode", actor_of, None),
    (PP, "--use-history", actor_of, None),
    (PP, "--background past --final-episodes 2", rows, ["self-play", "v past"]),
    (RPM, "--rank-width 1", logged("memory/ranks"), None),
    (RPM, "--per-rank 1 --rank-width 10000", logged("memory/actors"), [1, 1, 1, 1]),
    (RPM, "--history-share 0.9", logged("memory/share"), None),
    (RPM, "--use-history", actor_of, None),
    (RPM, "--policies-per-rollout 1", actor_of, None),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of each script with its defaults but a higher share."""
    folder = tmp_path_factory.mktemp("plain")
    for name, script in SCRIPTS.items():
        assert script.main(tiny(name, folder / name, 4, "--history-share", 0.6)) == 0
    return folder


@pytest.mark.parametrize("name, flags, measure, expected", FLAGS)
def test_flag_changes_what_it_names(name, flags, measure, expected, plain):
    share = () if "--history-share" in flags else ("--history-share", 0.6)
    assert SCRIPTS[name].main(tiny(name, "run", 4, *share, *flags.split())) == 0
    if expected is None:
        assert differences([measure("run")], [measure(plain / name)]) != []
    else:
        assert measure("run") == expected
    if "--history-share" in flags:
        assert sum(measure("run")) > sum(measure(plain / name))


def test_every_flag_is_tested():
    """Those that the parent has change what they do in MAPPO: test_without_history_..."""
    known = {field.name for cls in (RunArgs, mappo.Args) for field in dataclasses.fields(cls)}
    for name, script in SCRIPTS.items():
        own = {field.name for field in dataclasses.fields(script.Args)} - known
        lines = " ".join(flags for other, flags, *_ in FLAGS if other == name)
        assert {x for x in own if "--" + x.replace("_", "-") not in lines} == set()


WRONG = {
    "--history-share 1.5": "--history-share",
    "--memory -1": "--memory",
    "--policies-per-rollout 0": "--policies-per-rollout",
    "--use-history --history-share 0": "--use-history --history-share",
    "--memory 3": "--policies-per-rollout --memory 3",
    "--redraw episode --history-share 0": "",
    "--redraw episode": "",  # tyro's own words in RPM
    "--per-rank 0": "--per-rank",
    "--rank-width 0": "--rank-width",
    "--rank-width inf": "--rank-width",
    "--rank-width nan": "--rank-width",
    "--rank-width 1e-320": "--rank-width must be at least 1e-9",
    "--resume {run} --history-share 0.5": "--history-share 0.6",
    "--eval-only {run} --final-episodes 1 --background nobody": "nobody",
}
IN_PP = ("--memory", "--redraw")
IN_RPM = ("--per-rank", "--rank-width")


@NAMES
@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_line(name, line, plain, tmp_path, capfd):
    other = IN_RPM if name == PP else IN_PP
    argv = shlex.split(line.format(run=plain / name))
    if line == "--redraw episode" and name == PP:
        pytest.skip("a flag of PP")
    assert SCRIPTS[name].main(argv) == 2
    error = capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    if not line.startswith(other):
        sentence = only_error(error)
        assert [word for word in WRONG[line].split() if word not in sentence] == []


def test_a_run_that_was_begun_with_idle_flags_goes_on():
    """Such a run may be from before they were refused."""
    line = ["--substrate", "toy", "--redraw", "episode", "--history-share", "0"]
    args = SCRIPTS[PP].Args(history_share=0.0, redraw="episode")
    idle = [text for wrong, text in SCRIPTS[PP].validate(args) if wrong]
    assert idle == ["--history-share 0 leaves no use for --redraw"]
    assert SCRIPTS[PP].main(line) == 2
    for flag in ("resume", "eval_only"):
        later = dataclasses.replace(args, **{flag: "run"})
        assert not any(wrong for wrong, _ in SCRIPTS[PP].validate(later))


@NAMES
def test_another_substrates_memory_is_refused(name, plain, capfd):
    """Whose actors have other shapes; and a run of another substrate beside us."""
    script = SCRIPTS[name]
    assert script.main(tiny(name, "run", 2)) == 0

    def widen(state):
        for weights in state["memory"]["actors"]:
            weights["out.weight"] = torch.zeros(8, 64)

    change_newest("run", widen)
    capfd.readouterr()
    for flags in (["--resume", "run"], ["--eval-only", "run", "--final-episodes", "1"]):
        assert script.main(flags) == 2
        assert "does not fit" in only_error(capfd.readouterr().err)
    change_newest("run", lambda state: state["args"].update(substrate="coins"))
    argv = ["--eval-only", str(plain / name), "--final-episodes", "1", "--background", "run"]
    assert script.main(argv) == 2
    assert "run was not trained on toy" in only_error(capfd.readouterr().err)


@NAMES
def test_load_player_and_evaluations(name, plain, capfd):
    """The current actor plays; beside a run of the parent and beside the memory."""
    script = SCRIPTS[name]
    s = setting(script=script)
    player = script.load_player(str(plain / name), s.envs, 3)
    saved = states(plain / name)[0]["agent"]["actor"]
    assert differences(dict(player.net.state_dict()), saved) == []
    assert mappo.main(tiny(name, "parent", 1)) == 0
    argv = ["--eval-only", str(plain / name), "--final-episodes", "5", "--background"]
    tables = []
    for _ in range(2):
        capfd.readouterr()
        assert script.main([*argv, "past", "parent"]) == 0
        tables.append(capfd.readouterr().out)
    assert tables[0] == tables[1] and "| v past " in tables[0] and "| v parent " in tables[0]


def test_before_the_first_iteration_there_is_no_past(capfd):
    s = setting("--eval-episodes", "1", script=pp)
    evaluation = pp.Evaluation(s.args, "eval", 0, ROOT)
    found = pp.evaluate(s.args, s.agent, pp.new_memory(s.args), {}, evaluation)
    assert "v past" not in found and "v random" in found


def test_a_memory_of_former_ranks_is_refused(plain, tmp_path, capfd):
    """RPM's checkpoints of before 0487f50 have no keys, and a length in place of a rank."""
    assert rpm.main(tiny(RPM, "run", 2)) == 0
    change_newest("run", lambda state: state["memory"].pop("keys"))
    capfd.readouterr()
    assert rpm.main(resume("run", 3)) == 2
    assert "run does not fit: it has no part 'keys'." in only_error(capfd.readouterr().err)


@NAMES
def test_a_past_that_is_not_there_is_refused(name, plain, tmp_path, capfd):
    """Evaluation alone is asked for its row; by the default's co-players it is left out, which is
    said, as by the final evaluation of a run that has none yet."""
    script = SCRIPTS[name]
    assert script.main(tiny(name, "run", 2)) == 0
    change_newest("run", lambda state: state["memory"].update(actors=[]))
    line = ["--eval-only", "run", "--final-episodes", "1", "--background"]
    capfd.readouterr()
    assert script.main([*line, "random", "past"]) == 0  # the default
    out = capfd.readouterr().out
    assert (
        "run holds no past actors, so no row is of them." in out
        and "v past" not in out
        and "v random" in out
    )
    assert script.main([*line, "past"]) == 2
    sentence = "error: --background past: run holds no past actors."
    assert only_error(capfd.readouterr().err).startswith(sentence)
    assert script.main([*line, "random"]) == 0


def test_worlds_take_past_players_in_turn():
    players = [lambda obs, starts, ids, k=k: np.full((5, 2), k) for k in range(3)]
    actions = in_turn(players)(None, np.ones(5, bool), None)
    assert actions[:, 0].tolist() == [0, 1, 2, 0, 1]


@NAMES
def test_not_finite_rewards_end_the_run(name, monkeypatch, capfd):
    from envs.meltingpot.toy import TileGame

    plain_step = TileGame.step

    def step(self, actions):
        found = plain_step(self, actions)
        return found._replace(reward=found.reward * np.nan)

    monkeypatch.setattr(TileGame, "step", step)
    assert SCRIPTS[name].main(tiny(name, "run", 2)) == 1
    assert "rewards is not finite" in only_error(capfd.readouterr().err)


@NAMES
def test_help(name):
    """In seconds, without torch; each flag has its comment."""
    env = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run([*command(name), "--help"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    text = PATHS[name].read_text()
    tree = next(x for x in ast.parse(text).body if getattr(x, "name", "") == "Args")
    told = " ".join(done.stdout.replace("│", " ").split())
    for field in (x for x in tree.body if isinstance(x, ast.AnnAssign)):
        comment = text.splitlines()[field.end_lineno - 1].partition("  # ")[2]
        assert comment and f" {comment} (default: " in told, field.target.id
