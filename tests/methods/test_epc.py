"""epc_particle.py: who is copied from whom, tournaments, and the run as a whole: stages, resuming
anywhere, evaluation, other populations, flags.

Agents are told apart by marks: all weights of an agent are one number."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import harness

import numpy as np
import pytest
import torch
from particle_tools import (
    EPC,
    MADDPG,
    ROOT,
    differences,
    index,
    initial,
    metrics,
    newest,
    parse,
    read,
    resuming,
    run,
    script,
    sharpen,
    tiny,
    weights,
)

from envs.particle import pairs
from envs.particle.episodes import play

epc, maddpg = script(EPC), script(MADDPG)
CPU = torch.device("cpu")
SMALL = "--hidden-size 8 --key-size 4 --num-envs 2 --batch-size 4 --buffer-size 16 --device cpu"
SMALL += " --max-episode-steps 8"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, one thread, signal handlers as they were; and no list of the
    installed packages, which takes longer than a tiny run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "distributions", lambda: [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- Settings -------------------------------------------------------------------------------------


def args_of(task: str, *populations: str, flags: str = ""):
    argv = ["--task", task, "--populations", *populations, *SMALL.split(), *flags.split()]
    return parse(epc, argv)


def new_agent(args, population: str, number: int = 0, marked: bool = True):
    """A set of agents; marked: all weights of agent i are 100 number + i + 1, those of each network
    a thousandth more than the network's before."""
    game = epc.make_envs(args, population, 1, 1).game
    agent = epc.Agent(args, game, CPU)
    for k, name in enumerate(epc.NETWORKS):
        for p in getattr(agent, name).parameters():
            for i in range(game.num_agents) if marked else ():
                p.data[i] = 100 * number + i + 1 + k / 1000
        if not marked:
            sharpen(getattr(agent, name), seed=10 * number + k)
    return agent


def marks(agent, network: str = "actor") -> list[int]:
    """The mark of each agent, held against all weights of that network."""
    k = epc.NETWORKS.index(network)
    found = next(getattr(agent, network).parameters())
    found = (found.detach().flatten(1)[:, 0] - k / 1000).round()
    for p in getattr(agent, network).parameters():
        expected = (found + k / 1000).view(-1, *[1] * (p.dim() - 1)).expand_as(p)
        assert torch.equal(p.detach(), expected)
    return [int(x) for x in found]


def seeded(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def nets_in(agent_state) -> dict:
    return {name: agent_state[name] for name in epc.NETWORKS}


# --- The diff is the paper ------------------------------------------------------------------------


def lines(name):
    return (ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()


def test_diff_of_the_two_files_is_the_method():
    parent, child, added, gone = lines(MADDPG), lines(EPC), 0, 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.40 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.10 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


def test_shared_blocks_are_the_parents():
    pattern = r"# \[shared: (\w+)\] begin\n(.*?)# \[shared: \1\] end"
    theirs, ours = (
        dict(re.findall(pattern, "\n".join(lines(name)), re.DOTALL)) for name in (MADDPG, EPC)
    )
    assert theirs == ours and set(ours) >= {"make_envs", "layers", "sample", "losses"}


ALIKE = [
    ("--actor-gradient gumbel --inner-steps 2", "treasure", "3"),
    ("--actor-gradient expectation --target hard --plain", "resource", "4"),
    ("--no-scale-rewards --value-layers 1", "pacman", "2,1"),
]


@pytest.mark.numeric
@pytest.mark.parametrize("flags, task, population", ALIKE)
def test_one_set_and_one_stage_are_maddpg(flags, task, population):
    """The same bits after three updates: networks, moments, worlds, replay, what is evaluated."""
    flags = [*flags.split(), "--task", task, "--final-episodes", 4, "--max-episode-steps", 5]
    parent = run(MADDPG, "parent", 60, *flags, "--population", population)
    own = ("--populations", population, "--sets", 1, "--parents", 1)
    child = run(EPC, "child", 60, *flags, *own)
    (agent,), (own,) = child["agent"]["sets"].values(), child["ranks"][0]["sets"].values()
    assert parent["agent"]["critic_optimiser"]["state"][0]["step"] >= 3
    assert differences(parent["agent"], agent) == []
    ranks = parent["ranks"][0]
    assert differences(ranks["rng"], own["rng"]) == []
    theirs = ranks["collector"] | {"ended": 0}  # since the last line, which ours has in the end
    assert differences(theirs, own["collector"] | {"ended": 0}) == []
    (theirs,), (ours,) = (read(f"{x}/replay-60.pt").values() for x in ("parent", "child"))
    assert differences(theirs, ours) == []
    results = [json.loads(Path(x, "summary.json").read_text())["eval"] for x in ("parent", "child")]
    assert results[0] == results[1] and population in results[0]
    (best,) = child["agent"]["best"].values()
    assert differences(nets_in(best), nets_in(parent["agent"])) == []
    moved = differences(nets_in(initial("parent")["agent"]), nets_in(parent["agent"]))
    assert {name.split("/")[1] for name in moved} == set(epc.NETWORKS)


# --- Crossover ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("have", range(1, 5))
def test_draw(number, have):
    """Everybody as often as everybody else, or once more; in order; all such choices come."""
    found = set()
    for seed in range(200):
        drawn = epc.draw(number, have, seeded(seed))
        assert len(drawn) == number and drawn == sorted(drawn)
        counts = [drawn.count(i) for i in range(have)]
        assert sum(counts) == number and max(counts) - min(counts) <= 1
        found.add(tuple(drawn))
    once, more = divmod(number, have)
    rest = itertools.combinations(range(have), more)
    expected = {tuple(sorted([*range(have)] * once + list(x))) for x in rest}
    assert found == expected


GROWTH = [  # from, to, how many agents of each role each of two parents gives
    ("resource", "6", "9", [(5, 4)]),
    ("resource", "6", "12", [(6, 6)]),
    ("resource", "3", "12", [(6, 6)]),
    ("treasure", "12", "6", [(3, 3)]),
    ("treasure", "3", "1", [(1, 0)]),
    ("pacman", "4,2", "6,3", [(3, 3), (2, 1)]),
    ("pacman", "4,2", "8,4", [(4, 4), (2, 2)]),
    ("rooms", "3,3", "6,3", [(3, 3), (2, 1)]),
]


@pytest.mark.parametrize("task, old, new, shares", GROWTH)
def test_crossover(task, old, new, shares):
    """Of each role ceil(N / 2) agents of the first parent, the rest of the second, none twice
    before all; the roles' parents are different sets."""
    args = args_of(task, old, new)
    roles = epc.read_population(old)
    agents = [
        SimpleNamespace(game=epc.make_envs(args, old, 1, 1).game) for _ in range(2 * len(roles))
    ]
    parents = [(agents[2 * role], agents[2 * role + 1]) for role in range(len(roles))]
    for seed in range(20):
        sources = epc.crossover(parents, epc.read_population(new), seeded(seed))
        assert len(sources) == sum(epc.read_population(new))
        place = 0
        for role, (given, numbers) in enumerate(zip(parents, shares)):
            first = sum(roles[:role])
            for parent, number in zip(given, numbers):
                part = sources[place : place + number]
                place += number
                assert all(who is parent for who, _ in part)
                counts = collections.Counter(i for _, i in part)
                assert set(counts) <= set(range(first, first + roles[role]))
                assert len(counts) == min(number, roles[role])
                assert max(counts.values(), default=0) <= -(-number // roles[role])


@pytest.mark.parametrize("task, old, new", [case[:3] for case in GROWTH])
def test_crossover_of_one_set_with_itself(task, old, new):
    """No agent is left out or copied twice for want of others: a child of (1,1), 6 -> 9, has all
    six, and three of them twice."""
    args = args_of(task, old, new)
    parent = SimpleNamespace(game=epc.make_envs(args, old, 1, 1).game)
    have, wanted = epc.read_population(old), epc.read_population(new)
    for seed in range(20):
        sources = epc.crossover([(parent, parent)] * len(have), wanted, seeded(seed))
        assert all(who is parent for who, _ in sources)
        counts = collections.Counter(i for _, i in sources)
        for role, (few, many) in enumerate(zip(have, wanted)):
            first, before = sum(have[:role]), sum(wanted[:role])
            own = {i for _, i in sources[before : before + many]}
            assert own <= set(range(first, first + few)) and len(own) == min(few, many)
            assert max(counts[i] for i in own) - min(counts[i] for i in own) <= 1


@pytest.mark.parametrize("task, old, new", [("resource", "2", "5"), ("pacman", "3,2", "4,3")])
def test_copies_are_copies(task, old, new):
    """Each agent of a child has all networks of one of its parents', in memory of its own; no
    optimiser has moments."""
    args = args_of(task, old, new, flags="--value-layers 2")
    agents = [new_agent(args, old, number) for number in (1, 2, 3)]
    parents = [(agents[0], agents[1]), (agents[2], agents[2])][: len(agents[0].game.population)]
    game = epc.make_envs(args, new, 1, 1).game
    sources = epc.crossover(parents, game.population, seeded())
    child = epc.copy_agents(sources, epc.Agent(args, game, CPU))
    expected = [marks(parent)[i] for parent, i in sources]
    assert len(set(expected)) < len(expected), "somebody is there twice"
    assert [marks(child, name) for name in epc.NETWORKS] == [expected] * 5
    assert not child.actor_optimiser.state and not child.critic_optimiser.state
    places = [
        p.untyped_storage().data_ptr()
        for agent in (child, *agents)
        for name in epc.NETWORKS
        for p in getattr(agent, name).parameters()
    ]
    assert len(set(places)) == len(places)
    for name in epc.NETWORKS:
        for p in getattr(child, name).parameters():
            p.data.zero_()
    for number, agent in enumerate(agents, start=1):
        assert {x // 100 for x in marks(agent)} == {number}


@pytest.mark.numeric
def test_a_copied_agent_does_what_it_did():
    """Among the same others a child's agent has its parent's policy, values and graph."""
    args = args_of("pacman", "2,2")
    one, other = (new_agent(args, "2,2", number, marked=False) for number in (1, 2))
    worlds = epc.make_envs(args, "2,2", 6, 1)
    worlds.reset()
    child = epc.team(args, [one, other], [1, 0])
    actions = torch.randint(0, 5, (6, 4))

    def answers(agent):
        view = agent.view(worlds.game, worlds.obs)
        g = agent.attention(view)
        return [g, agent.actor(view, g), agent.critic(view, g, actions)]

    for ours, first, second in zip(answers(child), answers(one), answers(other)):
        assert torch.allclose(ours[:, :2], second[:, :2], atol=1e-5)
        assert torch.allclose(ours[:, 2:], first[:, 2:], atol=1e-5)
        assert not torch.allclose(first, second, atol=1e-2)


def test_twins_part_by_what_they_draw():
    """A child of one parent alone has each agent twice; twins that stand at one place have the same
    policy, and their actions are drawn apart."""
    args = args_of("resource", "2", "4")
    parent = new_agent(args, "2", marked=False)
    game = epc.make_envs(args, "4", 1, 1).game
    sources = epc.crossover([(parent, parent)], game.population, seeded())
    child = epc.copy_agents(sources, epc.Agent(args, game, CPU))
    for name in epc.NETWORKS:
        for p in getattr(child, name).parameters():
            assert torch.equal(p[::2], p[1::2])
    worlds = epc.make_envs(args, "4", 50, 1)
    worlds.reset()
    actions = epc.net_player(child, 1)(worlds)
    assert (actions[:, ::2] != actions[:, 1::2]).any()


# --- Families, fitness, ranks ---------------------------------------------------------------------


def test_families_of_one_role():
    """With three sets and two parents all pairs; else so many are drawn of them, or all and some
    again."""
    one = np.array([[5, 2]])
    assert epc.families(one, 3, seeded()) == [((5, 5),), ((5, 2),), ((2, 2),)]
    drawn = [tuple(epc.families(one, 2, seeded(s))) for s in range(50)]
    every = [((5, 5),), ((5, 2),), ((2, 2),)]
    assert set(drawn) == set(itertools.combinations(every, 2))
    five = epc.families(one, 5, seeded())
    assert len(five) == 5 and {five.count(x) for x in every} == {1, 2}
    assert epc.families(np.array([[1]]), 2, seeded()) == [((1, 1),), ((1, 1),)]


def test_families_of_two_roles():
    """Each role has pairs of its own parents: 3 x 3, of which three are drawn, all as often."""
    two = np.array([[5, 2], [0, 1]])
    every = itertools.product([(5, 5), (5, 2), (2, 2)], [(0, 0), (0, 1), (1, 1)])
    every = list(every)
    assert epc.families(two, 9, seeded()) == every
    counts = collections.Counter()
    for seed in range(300):
        three = epc.families(two, 3, seeded(seed))
        assert len(set(three)) == 3
        counts.update(three)
    assert set(counts) == set(every)
    assert max(counts.values()) < 150, "100 each"


@pytest.mark.numeric
def test_fitness_by_hand():
    assert epc.fitness(np.array([[3.0], [1.0], [2.0]])).tolist() == [[3, 1, 2]]
    # Pac-Men of set a beside ghosts of set b: [a][b] = (per Pac-Man, per ghost).
    two = [[(1, 10), (3, 20)], [(5, 30), (9, 60)]]
    assert epc.fitness(np.array(two)).tolist() == [[2, 7], [20, 40]]
    three = seeded().normal(size=(3, 3, 3, 3))
    for role, k in itertools.product(range(3), range(3)):
        own = [three[x][role] for x in itertools.product(range(3), repeat=3) if x[role] == k]
        assert epc.fitness(three)[role, k] == pytest.approx(np.mean(own))


def test_rank_by_hand():
    """Roles apart; who is as fit as another keeps his place."""
    scores = np.array([[1.0, 3.0, 2.0, 3.0], [-1.0, -5.0, -1.0, 0.0]])
    assert epc.rank(scores).tolist() == [[1, 3, 2, 0], [3, 0, 2, 1]]


@pytest.mark.numeric
@pytest.mark.parametrize("task, population", [("resource", "3"), ("pacman", "2,2")])
def test_tournament_is_everybody_beside_everybody(task, population):
    """Played again by hand: of each role the agents of each set, all in the same episodes."""
    args = args_of(task, population, flags="--tournament-episodes 5 --sets 3")
    agents = [new_agent(args, population, number, marked=False) for number in range(3)]
    roles = len(agents[0].game.population)
    rng = np.random.default_rng((args.seed, 7, 2))
    world_seed, player_seed = rng.integers(2**31, size=2).tolist()
    worlds = epc.make_envs(args, population, 5, world_seed)

    def player(choice):
        rng = torch.Generator().manual_seed(player_seed)

        def act(world):
            logits = []
            for agent in agents:
                view = agent.view(world.game, world.obs)
                logits.append(agent.actor(view, agent.attention(view)))
            parts = [logits[choice[role]][:, i] for i, role in enumerate(world.game.types)]
            return epc.sample(torch.stack(parts, 1).log_softmax(-1), rng)

        return act

    expected = np.zeros((roles, 3))
    for choice in itertools.product(range(3), repeat=roles):
        worlds.seed(world_seed)
        returns = play(worlds, player(choice)).mean(0)
        for role, k in enumerate(choice):
            expected[role, k] += returns[role] / 3 ** (roles - 1)
    before = [weights(agent.actor) for agent in agents]
    found = epc.tournament(args, agents, 7)
    assert found.shape == (roles, 3) and np.allclose(found, expected, atol=1e-4)
    assert (np.ptp(found, axis=1) > 0).all()
    assert (epc.tournament(args, agents, 7) == found).all()
    assert (epc.tournament(args, agents, 8) != found).any(), "another stage, other episodes"
    assert all(torch.equal(a, weights(b.actor)) for a, b in zip(before, agents))


def test_progress_in_tournaments(monkeypatch, capsys):
    """Without a terminal a line now and then."""
    monkeypatch.setattr(harness.Evaluation, "INTERVAL", 0.0)
    args = args_of("pacman", "2,1", flags="--tournament-episodes 4 --sets 2")
    epc.tournament(args, [new_agent(args, "2,1", k) for k in range(2)], 0)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("tournament")]
    assert lines[-1] == "tournament evaluation: 16 of 16 episodes" and len(lines) > 4


# --- Selection ------------------------------------------------------------------------------------

SELECTED = {  # task, populations, fitness, marks of the best set
    "one role": ("resource", ("2", "4"), [[5.0, 1.0, 7.0]], [201, 202]),
    "two roles": ("pacman", ("2,1", "4,2"), [[5.0, 1.0, 7.0], [3.0, 9.0, 2.0]], [201, 202, 103]),
}


@pytest.mark.parametrize("name", SELECTED)
def test_selection(name):
    """The best set is kept, of each role the fittest; the two best of each role are the parents of
    the next stage's agents, whose replays are empty and worlds new."""
    task, populations, scores, best = SELECTED[name]
    args = args_of(task, *populations, flags="--total-timesteps 100")
    evolution = epc.Evolution(args, CPU, {})
    for number, each in evolution.sets.items():
        marked = new_agent(args, populations[0], int(number))
        everyone = [(marked, i) for i in range(marked.game.num_agents)]
        epc.copy_agents(everyone, each.agent)
        epc.collect(each.agent, each.collector, each.rng)
    old = dict(evolution.sets)
    text = evolution.select(np.array(scores))
    assert marks(evolution.best[populations[0]]) == best
    assert (evolution.stage, evolution.finished, evolution.population) == (1, 1, populations[1])
    order = [np.argsort(-np.array(row)).tolist() for row in scores]
    for row in order:
        assert " ".join(map(str, row)) in text
    assert list(evolution.sets) == ["0", "1", "2"]
    families = set()
    for number, each in evolution.sets.items():
        assert each.collector.buffer.steps == 0 and each.collector.game.population[0] == 4
        assert evolution.replays[number] is each.collector.buffer
        assert not each.agent.critic_optimiser.state
        assert all(each.agent is not x.agent for x in old.values())
        parents, place = [], 0
        for role, count in enumerate(each.collector.game.population):
            part = marks(each.agent)[place : place + count]
            place += count
            halves = part[: count // 2], part[count // 2 :]
            for half in halves:
                assert len({x // 100 for x in half}) == 1
                assert half[0] // 100 in order[role][:2]
                kinds = {1, 2} if role == 0 else {3}
                assert {x % 100 for x in half} <= kinds
            parents.append(tuple(half[0] // 100 for half in halves))
        families.add(tuple(parents))
    assert len(families) == 3
    if name == "one role":
        assert families == {((2, 2),), ((2, 0),), ((0, 0),)}
    # After the last stage its best set is kept, and nothing begins.
    sets = dict(evolution.sets)
    evolution.select(np.array(scores))
    assert evolution.sets == sets and evolution.stage == 1 and evolution.finished == 2
    assert list(evolution.best) == list(populations)


def test_stages_end_where_they_are_to(monkeypatch):
    """Equal shares of the steps of each set; each stage has a tournament, with its population; each
    set takes each step."""
    events, collect, tournament = [], epc.collect, epc.tournament

    def watched(agent, collector, rng):
        events.append((collector.name, id(collector)))
        collect(agent, collector, rng)

    def watched_tournament(args, agents, stage):
        events.append(("tournament", stage))
        return tournament(args, agents, stage)

    monkeypatch.setattr(epc, "collect", watched)
    monkeypatch.setattr(epc, "tournament", watched_tournament)
    run(EPC, "run", 100, "--populations", 2, 4, 3, "--num-envs", 6)
    names = [name for name, _ in events]
    # Stages end behind steps 33 and 66 of each set, the run behind step 100, six at a time.
    steps = {"2": 36, "4": 30, "3": 36}
    expected = []
    for name, count in steps.items():
        expected += [name] * (count // 6 * 2) + ["tournament"]
    assert names == expected
    assert [x for name, x in events if name == "tournament"] == [0, 1, 2]
    for name, count in steps.items():
        counts = collections.Counter(x for own, x in events if own == name)
        assert list(counts.values()) == [count // 6] * 2


@pytest.mark.parametrize("parents, pairs", [(1, {"1x1"}), (2, {"1x1", "1x0", "0x0"})])
def test_parents(parents, pairs, capfd, monkeypatch):
    """How many sets have children, as the run says and as its weights are when a stage begins."""
    monkeypatch.setattr(epc, "tournament", lambda *_: np.array([[1.0, 2.0]]))
    flags = ("--populations", 2, 4, "--save-every", 40, "--parents", parents)
    run(EPC, "run", 80, *flags)
    said = capfd.readouterr().out
    assert "population 2: sets, the fittest first: 1 0; population 4: children " in said
    families = re.search("children (.*)\n", said)[1].split(", ")
    assert len(families) == 2 and set(families) <= pairs
    sets = read("run/checkpoint-40.pt")["agent"]["sets"].values()
    found = {str(x.tolist()) for own in sets for x in own["actor"]["out.weight"]}
    assert len(found) == 2 * parents


def test_sets_begin_and_go_on_apart():
    """Other weights, other worlds, other draws, in the second stage, too."""
    run(EPC, "run", 40, "--save-every", 20, "--sets", 3)
    start = run(EPC, "start", 4, "--populations", 3, "--sets", 3)["agent"]["sets"]
    for x, y in itertools.combinations(start.values(), 2):
        same = set(x["actor"]) - {k.split("/")[-1] for k in differences(x["actor"], y["actor"])}
        assert all(name.endswith("bias") for name in same)
    for timesteps in (20, 40):
        own = read(f"run/checkpoint-{timesteps}.pt")["ranks"][0]["sets"]
        drawn = [torch.rand(4, generator=restored(x["rng"])).tolist() for x in own.values()]
        assert len({x for four in drawn for x in four}) == 12
        for x, y in itertools.combinations(own.values(), 2):
            assert differences(x["collector"]["worlds"], y["collector"]["worlds"])


def test_no_stage_repeats_the_draws_of_another():
    """Random numbers of all sets of three stages differ."""
    args = args_of("resource", "2", "3", "4", flags="--total-timesteps 100")
    evolution, drawn = epc.Evolution(args, CPU, {}), []
    for stage in range(3):
        assert evolution.stage == stage
        for each in evolution.sets.values():
            drawn += torch.rand(4, generator=each.rng).tolist()
        evolution.select(np.zeros((1, args.sets)))
    assert len(set(drawn)) == len(drawn) == 12 * args.sets


def restored(state: torch.Tensor) -> torch.Generator:
    rng = torch.Generator()
    rng.set_state(state)
    return rng


# --- Resuming -------------------------------------------------------------------------------------


def stopped_at(call: int, monkeypatch, argv: list[str], what: str = "collect") -> int:
    """The exit code of a run that gets SIGTERM in a call of collect() or tournament()."""
    function, calls = getattr(epc, what), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    handlers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with monkeypatch.context() as patch:
        patch.setattr(epc, what, interrupted)
        code = epc.main(argv)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert len(calls) >= call
    return code


MODES = {  # flags of a run of 60 steps, with stages that end at 20 and 40 or at 30
    "three": "--populations 2 4 3",
    "pacman": "--task pacman --populations 2,1 3,2 --buffer-size 18",
}
FLAGS_OF_ALL = "--update-every 8 --log-every 12 --eval-every 20 --eval-episodes 1"


@functools.cache
def whole(mode: str, folder: Path) -> tuple[list[str], Path]:
    """The flags of a run that nobody stops, and its directory."""
    flags = [*MODES[mode].split(), *FLAGS_OF_ALL.split()]
    assert epc.main(tiny(EPC, folder / mode, 60, *flags)) == 0
    return flags, folder / mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def same_run(a: Path | str, b: Path | str) -> None:
    """Checkpoint, replays and log, bit for bit."""
    one, other = newest(a), newest(b)
    assert differences(one, other) == [] and one["timesteps"] == 60
    first, second = (read(f"{x}/replay-60.pt") for x in (a, b))
    assert differences(first, second) == []
    assert metrics(a) == metrics(b) and len(metrics(a)) > 8


LONG = [  # in each stage, and more of the last steps of stages, in one set or the other
    *[("three", "collect", call) for call in (1, 4, 7, 9, 10, 20, 21, 25, 30)],
    *[("pacman", "collect", call) for call in (3, 15, 16, 18, 30)],
    *[("three", "tournament", 1), ("pacman", "tournament", 2)],
]
STOPS = [
    ("three", "collect", 11),  # the first step of the next stage
    ("three", "tournament", 2),
    ("pacman", "tournament", 1),
    *[pytest.param(*stop, marks=pytest.mark.long) for stop in LONG],
]


@pytest.mark.parametrize("mode, what, call", STOPS)
def test_resumed_equals_uninterrupted(mode, what, call, folder, monkeypatch):
    """Stopped at any stage, set and step, and in a tournament, which it plays to its end."""
    flags, run_dir = whole(mode, folder)
    assert stopped_at(call, monkeypatch, tiny(EPC, "cut", 60, *flags), what) == 75
    done = newest("cut")
    assert done["agent"]["finished"] >= (call if what == "tournament" else 0)
    assert epc.main(["--resume", "cut"]) == 0
    same_run(run_dir, "cut")


def test_stopped_twice(folder, monkeypatch):
    flags, run_dir = whole("three", folder)
    assert stopped_at(13, monkeypatch, tiny(EPC, "cut", 60, *flags)) == 75
    assert stopped_at(5, monkeypatch, ["--resume", "cut"]) == 75
    assert newest("cut")["timesteps"] == 40
    assert epc.main(["--resume", "cut"]) == 0
    same_run(run_dir, "cut")


@pytest.mark.parametrize("mode, number", [("three", 1), ("pacman", 2)])
def test_killed_in_a_tournament(mode, number, folder):
    """SIGKILL while a tournament is played: it is repeated from the last checkpoint on."""
    flags, run_dir = whole(mode, folder)
    argv = tiny(EPC, "cut", 60, *flags, "--save-every", 15)
    if not (pid := os.fork()):
        function, calls = epc.tournament, []

        def deadly(*args):
            calls.append(1)
            if len(calls) == number:
                epc.play = lambda *rest, **options: os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        epc.tournament = deadly
        epc.main(argv)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    ends = [*newest(run_dir)["agent"]["ends"], 60]
    assert 0 < index("cut")[0]["timesteps"] < ends[number - 1]
    assert not Path("cut/summary.json").exists()
    assert epc.main(["--resume", "cut"]) == 0
    same_run(run_dir, "cut")


def test_a_longer_run_has_a_longer_last_stage():
    """Stages end where they were to when the run began; the last one goes on, and its sets have
    another tournament at its end."""
    flags = ("--populations", 2, 3, "--save-every", 20)
    short = run(EPC, "run", 80, *flags)
    assert short["agent"]["ends"] == [40] and short["agent"]["finished"] == 2
    assert epc.main(resuming("run", 120)) == 0
    longer = newest("run")
    assert longer["agent"]["ends"] == [40] and longer["agent"]["finished"] == 2
    for k in "01":
        assert longer["ranks"][0]["sets"][k]["collector"]["steps"] == 80
    assert sum("fitness/3/0/set=0" in m for m in metrics("run")) == 2
    assert differences(short["agent"]["best"]["2"], longer["agent"]["best"]["2"]) == []
    assert differences(short["agent"]["best"]["3"], longer["agent"]["best"]["3"])
    # Between the two the old result is none: the sets have learned since.
    assert read("run/checkpoint-100.pt")["agent"]["finished"] == 1


def test_a_shorter_run_has_no_last_stage(capfd, monkeypatch):
    assert stopped_at(5, monkeypatch, tiny(EPC, "run", 80, "--populations", 2, 3)) == 75
    capfd.readouterr()
    assert epc.main(resuming("run", 40)) == 2
    assert "last stage of run begins at 40." in capfd.readouterr().err
    assert epc.main(resuming("run", 60)) == 0
    assert newest("run")["agent"]["finished"] == 2


def test_same_seed_same_bits():
    looks = ("--log-every", 20, "--eval-every", 40)
    a, b, c = (run(EPC, name, 40, *looks, "--seed", seed) for name, seed in zip("abc", (7, 7, 8)))
    assert differences(a, b) == [] and metrics("a") == metrics("b") != metrics("c")
    changed = set(differences(a, c))
    for k, net in itertools.product("01", epc.NETWORKS):
        own = a["agent"]["sets"][k][net]
        assert {f"/agent/sets/{k}/{net}/{x}" for x in own if x.endswith("weight")} < changed


def test_looking_at_a_run_changes_nothing():
    """Lines of the log, checkpoints and evaluations draw nothing from the run's generators."""
    looks = ("--log-every", 8, "--save-every", 8, "--eval-every", 8, "--final-episodes", 1)
    a, b = run(EPC, "plain", 48), run(EPC, "looks", 48, *looks)
    for state in (a, b):  # since the last line
        state["ranks"][0].pop("noted")
    assert differences(a, b) == []
    first, second = (read(f"{x}/replay-48.pt") for x in ("plain", "looks"))
    assert differences(first, second) == []


# --- Log and evaluation ---------------------------------------------------------------------------


def test_what_is_logged(capfd):
    """The stage, both totals, and of each set its returns; fitness where a stage ends."""
    flags = ("--task", "pacman", "--populations", "2,1", "3,2", "--log-every", 40)
    run(EPC, "run", 160, *flags)
    (first, end, third, last) = metrics("run")
    assert [m["stage"] for m in metrics("run")] == [1, 1, 2, 2]
    assert [m["timesteps"] for m in metrics("run")] == [40, 80, 120, 160]
    assert [m["all_sets_timesteps"] for m in metrics("run")] == [80, 160, 240, 320]
    names = {"timesteps", "all_sets_timesteps", "stage", "critic_loss", "actor_loss", "entropy"}
    names |= {"critic_grad_norm", "actor_grad_norm"}
    returned = {"episodes", "return", "return/3,2", "return/3,2/0", "return/3,2/1"}
    sets = {f"{name}/set={k}" for name in returned for k in range(2)}
    fitness = {f"fitness/3,2/{role}/set={k}" for role in range(2) for k in range(2)}
    assert set(last) == names | returned | sets | fitness
    assert any(name.startswith("fitness/2,1") for name in end)
    for m in (first, third):
        assert not any(name.startswith("fitness") for name in m)
    for name in ("return", "return/3,2/0", "episodes"):
        both = [last[f"{name}/set={k}"] for k in range(2)]
        assert last[name] == pytest.approx(sum(both) / 2)
    out = capfd.readouterr().out
    assert "2 sets, 160 steps each, 320 in all" in out
    assert "population 2,1: sets, the fittest first: " in out
    assert "population 3,2: children " in out
    resolved = json.loads(Path("run/args.json").read_text())["resolved"]
    assert resolved["stage_ends"] == [80, 160] and resolved["all_sets_timesteps"] == 320


def table_of(capfd) -> list[str]:
    return [x for x in capfd.readouterr().out.splitlines() if x.startswith("|")]


def test_final_evaluation(capfd):
    """Each stage's best set in its population, the last one's in all, also in those never met."""
    argv = ("--populations", 2, 3, "--final-episodes", 5, "--eval-populations", 3, 5)
    run(EPC, "run", 16, *argv)
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    scripted = ("random", "nearest-first", "flee")
    rows = ["", "last stage", *scripted], ["", *scripted], ["", *scripted]
    names = [f"{m} {x}".rstrip() for m, own in zip((2, 3, 5), rows) for x in own]
    assert list(results) == names
    assert all(row["episodes"] == 5 for row in results.values())
    # The same by hand, of the best set of the first stage and of two agents of the last one's.
    args, last = epc.load_agent("run")
    state = newest("run")["agent"]
    first = epc.Agent(args, epc.make_envs(args, "2", 1, 1).game, CPU)
    harness.restore(first, state["best"]["2"], "run")
    seeds = np.random.default_rng((1, 16, 1)).integers(2**31, size=3).tolist()
    of_five = epc.resized(args, last, epc.make_envs(args, "5", 1, 1).game, epc.ACTING)
    for row, agent in (
        ("2", first),
        ("2 last stage", epc.resized(args, last, first.game)),
        ("5", of_five),
    ):
        worlds = epc.make_envs(args, row[0], 5, seeds[0])
        returns = play(worlds, epc.net_player(agent, seeds[1]))
        assert results[row]["return"] == pytest.approx(returns.mean())
    capfd.readouterr()
    files = sorted(Path("run").iterdir())
    assert epc.main(["--eval-only", "run", "--final-episodes", "5"]) == 0
    assert len(table_of(capfd)) == 2 + len(names)
    assert epc.main(["--eval-only", "run", "--eval-populations", "7", "--final-episodes", "1"]) == 0
    assert "| 7 " in "".join(table_of(capfd)) and sorted(Path("run").iterdir()) == files


def test_evaluation_on_the_way():
    """Of each set in the population where it learns."""
    run(EPC, "run", 40, "--populations", 2, 3, "--eval-every", 10)
    rows = [{k.split("/")[1] for k in m if k.startswith("eval")} for m in metrics("run")]
    rows = [own for own in rows if own]
    assert rows == [{"2 set=0", "2 set=1"}] + [{"3 set=0", "3 set=1"}] * 3
    # The last one by hand, from the checkpoint's sets.
    state, args = newest("run")["agent"], epc.load_agent("run")[0]
    seeds = np.random.default_rng((1, 40, 0)).integers(2**31, size=3).tolist()
    last = [m for m in metrics("run") if "eval/3 set=0/return" in m][-1]
    for k, saved in enumerate(state["sets"].values()):
        worlds = epc.make_envs(args, "3", args.eval_episodes, seeds[0])
        agent = epc.Agent(args, worlds.game, CPU)
        harness.restore(agent, saved, "run")
        returns = play(worlds, epc.net_player(agent, seeds[1]))
        assert last[f"eval/3 set={k}/return"] == pytest.approx(returns.mean())


def test_figures_of_sets_are_their_own():
    """Returns and fitness of each set under its own number."""
    game = epc.make_envs(args_of("resource", "2"), "2", 1, 1).game
    sets = {}
    for k in range(2):
        returns = SimpleNamespace(game=game)
        sets[k] = SimpleNamespace(collector=SimpleNamespace(returns=returns))
        returns.report = lambda k=k: {"episodes": 3.0, "return/2": 10.0 + k}
    evolution = SimpleNamespace(sets=sets, stage=0, population="2")
    found = epc.report(evolution, np.array([[5.0, 1.0]]))
    assert [found[f"fitness/2/0/set={k}"] for k in range(2)] == [5.0, 1.0]
    assert [found[f"return/2/set={k}"] for k in range(2)] == [10.0, 11.0]


def test_a_stage_that_is_not_over(monkeypatch, capfd):
    """Evaluated or played alone, a tournament tells its best set."""
    argv = tiny(EPC, "run", 48, "--populations", 2, 4, 3, "--final-episodes", 3)
    assert stopped_at(12, monkeypatch, argv) == 75
    state = newest("run")["agent"]
    assert state["finished"] == 1 and list(state["best"]) == ["2"]
    capfd.readouterr()
    assert epc.main(["--eval-only", "run"]) == 0
    names = [x.split("|")[1].strip() for x in table_of(capfd)[2:]]
    assert names[:2] == ["2", "2 last stage"] and names[5] == "4" and len(names) == 9
    args, agent = epc.load_agent("run")
    assert agent.game.num_agents == 4
    sets = [epc.Agent(args, agent.game, CPU) for _ in range(2)]
    for own, saved in zip(sets, state["sets"].values()):
        harness.restore(own, saved, "run")
    best = sets[int(epc.tournament(args, sets, 1)[0].argmax())]
    assert torch.equal(weights(agent.actor), weights(best.actor))


@pytest.mark.parametrize(
    "task, old, others",
    [("resource", "4", ("4", "2", "9")), ("pacman", "2,2", ("2,2", "1,3", "5,1"))],
)
def test_other_populations(task, old, others):
    """Agents of the same role are copied or left out; all are there before one comes twice."""
    args = args_of(task, old)
    agent = new_agent(args, old)
    assert marks(epc.resized(args, agent, agent.game)) == marks(agent)
    for other in others:
        game = epc.make_envs(args, other, 1, 1).game
        found, first, place = marks(epc.resized(args, agent, game)), 0, 0
        for have, number in zip(agent.game.population, game.population):
            own = found[place : place + number]
            place += number
            assert set(own) <= set(range(first + 1, first + have + 1))
            assert len(set(own)) == min(have, number)
            assert max(map(own.count, own)) == -(-number // have)
            first += have


def test_a_run_as_a_player():
    """load_player() gives the best of the last stage, in all populations."""
    run(EPC, "run", 16, "--populations", 2, 3)
    args, agent = epc.load_agent("run")
    assert agent.game.population == (3,)
    best = newest("run")["agent"]["best"]["3"]
    assert torch.equal(agent.actor.out.weight, best["actor"]["out.weight"])
    for population in ("3", "2", "7"):
        worlds, returns = epc.make_envs(args, population, 5, 1), []
        for seed in (1, 1, 2):
            worlds.seed(1)
            returns.append(play(worlds, epc.load_player("run", seed)))
        assert (returns[0] == returns[1]).all() and (returns[0] != returns[2]).any()
        worlds.seed(1)
        moved = epc.net_player(epc.resized(args, agent, worlds.game), 1)
        assert (play(worlds, moved) == returns[0]).all()


def test_a_world_with_rewards_that_are_none(capfd, monkeypatch):
    """The update that comes next ends the run, and no checkpoint holds any of it."""
    step = epc.ParticleWorld.step

    def poisoned(self, actions):
        result = step(self, actions)
        result.reward[0, 0] = float("nan")
        return result

    monkeypatch.setattr(epc.ParticleWorld, "step", poisoned)
    assert epc.main(tiny(EPC, "run", 1000)) == 1
    assert "rewards is not finite" in capfd.readouterr().err
    assert [entry["timesteps"] for entry in index("run")] == [0]


# --- Adapting -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run in 2 and 4 agents, and one of MADDPG."""
    folder = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "distributions", lambda: [])
        run(EPC, folder / "run", 80, "--populations", 2, 4)  # the second from step 40 on
        run(MADDPG, folder / "other", 4)
    return folder


@pytest.mark.parametrize("population", ["4", "3", "9"])
def test_adapting(population, source):
    """All sets begin as copies of the best set, and go on as others do; the run that they are from
    is needed no more."""
    shutil.copytree(source / "run", "source")
    flags = ("--adapt", "source", "--populations", population)
    whole = run(EPC, "whole", 24, *flags)
    args, agent = epc.load_agent("source")
    game = epc.make_envs(args, population, 1, 1).game
    expected = epc.resized(args, agent, game)
    start = initial("whole")["agent"]["sets"]
    for k, net in itertools.product("01", epc.NETWORKS):
        assert differences(dict(getattr(expected, net).state_dict()), dict(start[k][net])) == []
    best = newest("source")["agent"]["best"]["4"]
    if population == "4":
        assert differences(nets_in(best), nets_in(start["0"])) == []
    sets = whole["agent"]["sets"]
    assert differences(sets["0"]["actor"], sets["1"]["actor"])
    assert not start["0"]["critic_optimiser"]["state"] and whole["agent"]["ends"] == []
    if population == "3":
        assert epc.main(tiny(EPC, "cut", 12, *flags)) == 0
        shutil.rmtree("source")
        assert epc.main(resuming("cut", 24)) == 0
        assert differences(sets, newest("cut")["agent"]["sets"]) == []


@pytest.mark.parametrize(
    "task, games, rules",
    [
        ("pacman", "2,1 2,2 2,3", {"max_episode_steps": 7, "shaping": False}),
        ("resource", "2 3 4", {"max_episode_steps": 7}),
        ("treasure", "2 3 4", {"max_episode_steps": 7, "collision_penalty": 1.0}),
    ],
)
def test_adapting_takes_what_copies_need_from_the_source(task, games, rules):
    """The world with its rules and the networks' sizes, in every world; other flags are the command
    line's, as are rules that it has."""
    *known, new = games.split()
    flags = [
        ["--no-shaping"] if x is False else ["--" + name.replace("_", "-"), x]
        for name, x in rules.items()
    ]
    flags = itertools.chain(["--task", task, "--populations", *known, "--gamma", 0.5], *flags)
    run(EPC, "source", 40, *flags)
    few = ["--adapt", "source", "--populations", new, "--sets", 1, "--parents", 1]
    args = parse(epc, few)
    own = {"adapt": "source", "populations": (new,), "sets": 1, "parents": 1}
    needed = {"task": task, "hidden_size": 8, "key_size": 4} | rules
    changed = parse(epc, [*few, "--max-episode-steps", 9])
    assert changed == dataclasses.replace(args, max_episode_steps=9)
    assert args == dataclasses.replace(epc.Args(), **own, **needed)
    fast = dataclasses.replace(args, preset="cpu", **epc.PRESETS["cpu"])
    assert parse(epc, [*few, "--preset", "cpu", "--task", task, "--key-size", 4]) == fast
    rest = "--num-envs 4 --batch-size 8 --update-every 4 --final-episodes 0 --run-dir run"
    rest += " --total-timesteps 8 --tournament-episodes 2 --num-threads 1"
    assert epc.main([str(x) for x in (*few, *rest.split())]) == 0
    assert set(newest("run")["agent"]["best"]) == {new}
    assert epc.main(resuming("run", 12)) == 0 and epc.load_agent("run")[0].task == task


# --- Learning -------------------------------------------------------------------------------------


@pytest.mark.long
def test_epc_learns():
    """Two stages of a small network, the second with agents copied from the first. Random players
    earn 9, it 22, who goes to the nearest resource 27."""
    flags = "--task resource --preset cpu --no-compile --num-threads 1 --populations 2 4 --sets 2"
    flags += " --hidden-size 32 --learning-rate 2e-3 --update-every 64 --batch-size 256"
    flags += " --total-timesteps 20000 --final-episodes 300 --eval-every 0 --save-every 0"
    assert epc.main([*flags.split(), "--run-dir", "run"]) == 0
    results = json.loads(Path("run/summary.json").read_text())["eval"]
    assert results["4 random"]["return"] < 10.5
    assert results["4"]["return_low"] > 13


# --- The command line -----------------------------------------------------------------------------

WRONG = {  # command line: words that the one sentence has to contain
    "--populations 3 6 3": "--populations twice",
    "--populations 3 4,2": "treasure 4,2",
    "--populations 3 x": "x",
    "--task pacman --populations 4,2 6": "pacman 6",
    "--task rooms --populations 3,3 6,2": "rooms 3",
    "--task pirates": "'pirates' treasure resource pacman",
    "--eval-populations 4,2": "treasure 4,2",
    "--sets 2 --parents 3": "--parents --sets",
    "--sets 0": "--sets 0",
    "--parents 0": "--parents 0",
    "--tournament-episodes 0": "--tournament-episodes 0",
    "--total-timesteps 47": "--total-timesteps stage --num-envs",
    "--batch-size 1025 --buffer-size 1024": "--batch-size --buffer-size",
    "--num-envs 65 --buffer-size 64 --batch-size 64": "--num-envs --buffer-size",
    "--target hard --polyak .5": "--polyak --target",
    "--adapt nowhere --populations 4": "nowhere checkpoint",
    "--adapt {0}/other --populations 4": "maddpg_particle epc_particle",
    "--adapt {0}/run --populations 4 --key-size 16": "--key-size 4",
    "--adapt {0}/run --populations 4 --hidden-size 64": "--hidden-size 8",
    "--adapt {0}/run --task resource": "--task treasure",
    "--adapt {0}/run --head-gain 7": "--head-gain 2.0",
    "--adapt {0}/run --value-layers 1": "--value-layers 2",
    "--adapt {0}/run --no-own-beside": "--own-beside True",
    "--adapt {0}/run --populations 4,2": "treasure 4,2",
    "--adapt {0}/run --sets 2 --parents 3": "--parents --sets",
    "--adapt {0}/run --run-dir {0}/run": "holds a run already",
    "--resume {0}/run --adapt {0}/run": "--adapt stays so",
    "--resume {0}/run --populations 2 3": "--populations ('2', '4')",
    "--resume {0}/run --sets 3": "--sets 2",
    "--resume {0}/run --gamma .5": "--gamma 0.95",
    "--resume {0}/run --eval-populations 4,2": "treasure 4,2",
    "--resume {0}/run --total-timesteps 40": "--total-timesteps last stage 40",
    "--resume {0}/other": "maddpg_particle epc_particle",
    "--eval-only {0}/other": "maddpg_particle epc_particle",
}


def contents(*folders) -> dict:
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
    return {path: path.stat().st_mtime_ns for path in files if path.name != "lock"}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_line(line, source, capfd, monkeypatch):
    """One sentence, exit code 2, nothing written."""
    monkeypatch.setattr(epc, "collect", lambda *_: pytest.fail("the run has begun"))
    before = contents(".", source)
    capfd.readouterr()
    assert epc.main(shlex.split(line.format(source))) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.endswith(".\n") and err.count("\n") == 1
    assert [word for word in WRONG[line].split() if word not in err] == [] and not out
    assert contents(".", source) == before


def test_presets():
    """The parent's."""
    plain, fast = parse(epc, []), parse(epc, ["--preset", "cpu"])
    assert plain == epc.Args() == parse(epc, ["--preset", "paper"])
    assert epc.PRESETS == maddpg.PRESETS
    assert fast == dataclasses.replace(plain, preset="cpu", **epc.PRESETS["cpu"])
    ours, theirs = ({x.name: x.default for x in dataclasses.fields(y.Args)} for y in (epc, maddpg))
    assert {name for name in ours if ours[name] != theirs.get(name)} == set(ours) - set(theirs)
    assert set(theirs) - set(ours) == {"population", "share_parameters"}


# --- Flags ----------------------------------------------------------------------------------------
# Each entry: flags, what to measure on a run with and one without them, how the two relate.


def first_set(state):
    return state["agent"]["sets"]["0"]


def changed(part):
    return lambda state, run_dir: first_set(state)[part]


def moved(*parts):
    """Which networks are not as they began."""

    def measure(state, run_dir):
        old = first_set(initial(run_dir))
        return [bool(differences(old[part], first_set(state)[part])) for part in parts]

    return measure


def shape(part, name):
    return lambda state, run_dir: tuple(first_set(state)[part][name].shape)


def games(state, run_dir):
    return [x["collector"]["worlds"]["game"] for x in state["ranks"][0]["sets"].values()]


def replay(run_dir):
    return read(run_dir / f"replay-{index(run_dir)[0]['timesteps']}.pt")["0"]


def rewards(judge):
    return lambda state, run_dir: bool(judge(replay(run_dir)["rewards"]))


def steps_of(state, run_dir):
    return float(first_set(state)["critic_optimiser"]["state"][0]["step"])


def moments(state, run_dir):
    parts = first_set(state)["critic_optimiser"]["state"].values()
    return sum(float(x["exp_avg_sq"].sum()) for x in parts)


def logged(column):
    def measure(state, run_dir):
        return sum(column in m for m in metrics(run_dir))

    return measure


def evaluated(key):
    return lambda state, run_dir: next((m[key] for m in metrics(run_dir) if key in m), 0)


STAGES = {  # on a run of two sets and two stages, of 3 and 5 agents
    "seed": ("--seed 7", changed("actor"), None),
    "total_timesteps": ("--total-timesteps 48", lambda s, d: s["agent"]["ends"], ([16], [24])),
    "capture_video": (
        "--capture-video --final-episodes 1",
        lambda s, d: sorted(x.name for x in d.glob("videos/*")),
        ([], ["final-32-3.mp4", "final-32-5.mp4"]),
    ),
    "task": ("--task resource", games, (["treasure 5"] * 2, ["resource 5"] * 2)),
    "populations": ("--populations 3 4", games, (["treasure 5"] * 2, ["treasure 4"] * 2)),
    "eval_populations": (
        "--final-episodes 2 --eval-populations 4",
        evaluated("final/4/episodes"),
        (0, 2),
    ),
    "sets": ("--sets 3", lambda s, d: len(s["agent"]["sets"]), (2, 3)),
    "tournament_episodes": (
        "--tournament-episodes 9",
        lambda s, d: [evaluated(f"fitness/3/0/set={k}")(s, d) for k in range(2)],
        None,
    ),
    "log_every": ("--log-every 8", logged("stage"), (2, 4)),
    "eval_every": ("--eval-every 8", logged("eval/3 set=0/return"), (0, 1)),
    "eval_episodes": (
        "--eval-every 8 --eval-episodes 3",
        evaluated("eval/3 set=0/episodes"),
        (0, 3),
    ),
    "final_episodes": ("--final-episodes 5", evaluated("final/5/episodes"), (0, 5)),
    "save_every": (
        "--save-every 24",
        lambda s, d: [entry["timesteps"] for entry in index(d)],
        ([32, 0], [32, 24]),
    ),
}
COMMON = {  # on a run of one set and one stage, of 3 agents
    "shaping": ("--no-shaping", rewards(lambda x: (x % 5 == 0).all()), (False, True)),
    "collision_penalty": (
        "--populations 30 --collision-penalty 3",
        rewards(lambda x: (x < -2).any()),
        (False, True),
    ),
    "num_envs": ("--num-envs 8", lambda s, d: s["iteration"], (8, 4)),
    "max_episode_steps": ("--max-episode-steps 2", evaluated("episodes"), (4.0, 16.0)),
    "actor_gradient": ("--actor-gradient expectation", changed("actor"), None),
    "target": (
        "--target hard",
        lambda s, d: not differences(first_set(s)["actor"], first_set(s)["target_actor"]),
        (False, True),
    ),
    "polyak": (
        "--polyak 0",
        moved("target_actor", "target_critic"),
        ([True, True], [False, False]),
    ),
    "inner_steps": ("--inner-steps 3", steps_of, (3.0, 9.0)),
    "hidden_size": ("--hidden-size 16", shape("actor", "out.weight"), ((3, 8, 5), (3, 16, 5))),
    "key_size": ("--key-size 6", shape("attention", "key.weight"), ((3, 8, 4), (3, 8, 6))),
    "value_layers": (
        "--value-layers 1",
        lambda s, d: "entity.weight" in first_set(s)["actor"],
        (True, False),
    ),
    "own_beside": ("--no-own-beside", shape("actor", "own.first.weight"), ((3, 14, 8), (3, 0, 8))),
    "head_gain": (
        "--head-gain 20",
        lambda s, d: float(first_set(initial(d))["attention"]["query.weight"].abs().max()),
        "up",
    ),
    "learning_rate": (
        "--learning-rate 0",
        moved("actor", "critic", "attention"),
        ([True] * 3, [False, False, True]),
    ),
    "phi_learning_rate": (
        "--phi-learning-rate 0",
        moved("actor", "critic", "attention"),
        ([True] * 3, [True, True, False]),
    ),
    "gamma": ("--gamma .5", changed("critic"), None),
    "batch_size": ("--batch-size 20", steps_of, (3.0, 2.0)),
    "buffer_size": ("--buffer-size 20", lambda s, d: len(replay(d)["state"]), (32, 20)),
    "update_every": ("--update-every 16", steps_of, (3.0, 2.0)),
    "entropy_coef": ("--entropy-coef 5", changed("actor"), None),
    "scale_rewards": ("--no-scale-rewards", changed("critic"), None),
    "max_grad_norm": ("--max-grad-norm .00001", moments, "down"),
}
ELSEWHERE = {
    "run_dir": "every run here",
    "resume": "test_resumed_equals_uninterrupted",
    "eval_only": "test_final_evaluation",
    "adapt": "test_adapting",
    "parents": "test_parents",
    "preset": "test_presets",
    **dict.fromkeys(("device", "compile", "num_threads", "plain"), "test_devices_and_threads"),
    **dict.fromkeys(("tf32", "onednn"), "tests/harness"),
    **dict.fromkeys(("track", "wandb_project", "wandb_mode", "wandb_timeout"), "tests/harness"),
}
BASES = {
    "stages": ("--update-every", 8),
    "common": ("--update-every", 8, "--populations", 3, "--sets", 1, "--parents", 1),
}


def test_every_flag_is_tested():
    known = set(STAGES) | set(COMMON) | set(ELSEWHERE)
    assert {x.name for x in dataclasses.fields(epc.Args)} == known


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs without further flags."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "distributions", lambda: [])
        for base, flags in BASES.items():
            run_dir = tmp_path_factory.mktemp("plain") / "run"
            found[base] = run(EPC, run_dir, 32, *flags), run_dir
    return found


CASES = [("stages", field) for field in STAGES] + [("common", field) for field in COMMON]


@pytest.mark.parametrize("base, field", CASES)
def test_flag_changes_what_it_names(base, field, plain, tmp_path):
    flags, measure, relation = (STAGES | COMMON)[field]
    state = run(EPC, tmp_path / "run", 32, *BASES[base], *flags.split())
    without, with_flag = measure(*plain[base]), measure(state, tmp_path / "run")
    if relation is None:
        assert differences({"": without}, {"": with_flag})
    elif relation in ("up", "down"):
        assert with_flag > without if relation == "up" else with_flag < without
    else:
        assert (without, with_flag) == relation


def test_devices_and_threads(monkeypatch):
    """--compile is for a GPU: pairs are compiled where the kernels for a CPU are left out. On a CPU
    worlds are left as they are, and so are those of tournaments. The plain form has no kernels."""
    seen, made = set(), []

    class Compiled:
        def __init__(self, function, what, dynamic=False):
            seen.add(what)
            self.function = function

        def __call__(self, *args):
            return self.function(*args)

    class World(epc.ParticleWorld):
        def __init__(self, *args, **options):
            made.append((options["device"], options["compiled"]))
            super().__init__(*args, **options | {"device": "cpu", "compiled": False})

    small = ("--populations", 3, "--update-every", 4, "--batch-size", 4)
    monkeypatch.setattr(pairs, "Compiled", Compiled)
    run(EPC, "kernels", 8, *small, "--compile")
    assert seen == set()
    monkeypatch.setattr(pairs.kernels, "fits", lambda *tensors: False)  # as on a GPU
    fast = run(EPC, "fast", 8, *small)
    pairs.kernel.cache_clear()
    monkeypatch.setattr(epc, "ParticleWorld", World)
    run(EPC, "plain", 4, *small, "--plain", "--compile")
    assert seen == set()
    threads = ("--device", "cpu", "--num-threads", 2, "--compile")
    compiled = run(EPC, "compiled", 8, *small, *threads)
    pairs.kernel.cache_clear()
    assert torch.get_num_threads() == 2 and set(made) == {("cpu", False)}
    assert seen == {"score_kernel", "sum_kernel", "gradient_kernel"}
    assert differences(fast["agent"], compiled["agent"]) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags in ("", "--compile", "--device cpu --compile"):
        epc.make_envs(parse(epc, flags.split()), "3", 2, 1)
    assert made[-3:] == [("cuda", False), ("cuda", True), ("cpu", False)]
