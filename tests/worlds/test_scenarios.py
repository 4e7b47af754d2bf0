"""envs/meltingpot/scenarios.py, envs/meltingpot/bots.py, envs/meltingpot/sprite_names.py on the
real engine: what scripted puppets see against the engine's own layers, where their beams hit
against the beams that it draws, whether they reach their goals, whether Melting Pot's puppeteers
switch those as configured, and what gets through to the focal side."""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import harness

import numpy as np
import pytest
import scipy.sparse.csgraph
import torch
from runs import BOTH, MAPPO, script, some_long

from envs.meltingpot import bots, episodes, scenarios
from envs.meltingpot.episodes import (
    BOT_COLOUR,
    FOCAL_COLOUR,
    Result,
    mark,
    play_all,
    random_player,
    seat_ids,
)
from envs.meltingpot.scenarios import (
    PAPER,
    RANDOM,
    Plan,
    ScenarioEngine,
    Scenarios,
    background_rows,
    choose_bots,
    choose_scenarios,
    find_kept,
    focal_seats,
    get_plan,
    play_scenarios,
    save_results,
    scenario_names,
    scenario_rows,
    unscripted,
)
from envs.meltingpot.tiles import NoWorldError, Palette, ids_to_images
from envs.meltingpot.toy import TileGame
from envs.meltingpot.worlds import MeltingPot, get_spec, import_meltingpot

import_meltingpot()

from meltingpot import scenario  # noqa: E402
from meltingpot.configs import bots as configs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHICKEN, COINS, MINING = "chicken_in_the_matrix__repeated", "coins", "coop_mining"
ARENA = "prisoners_dilemma_in_the_matrix__arena"
BIG = (MINING, ARENA)
FINAL = types.SimpleNamespace(kind="final", timesteps=100)


def new_engine(substrate, *names, seed=1):
    """An engine whose seats are taken by bots (names without the substrate's), or focal (None)."""
    full = [name and (name if name == RANDOM else f"{substrate}__{name}") for name in names]
    plan = Plan("", get_spec(substrate), tuple((name,) if name else () for name in full))
    return ScenarioEngine(plan, "scripted", (seed,), Palette.private())


def play(engine, steps, focal=lambda: np.zeros(0, int), after=lambda: None):
    """Returns (focal seats first) and pick-ups of an episode of at most `steps` steps."""
    returns, reward = np.zeros(len(engine.order)), np.zeros(len(engine.order))
    pick_ups, now = np.zeros(len(engine.order), int), np.zeros(len(engine.order), int)
    for t in range(1, steps + 1):  # noqa: B007
        goes_on = engine.step(focal())
        engine.read_rewards(reward, now)
        returns, pick_ups = returns + reward, pick_ups + now
        after()
        if not goes_on:
            break
    return 1000 * returns / t, 1000 * pick_ups / t


def goals_of(engine, seat):
    """A list that grows by the goal's number whenever the puppet on a seat is asked for an action
    (also while it waits to enter the map again)."""
    bot = next(bot for bot in engine.bots if bot.seat == seat)
    puppet, goals = bot.policy._puppet, []
    step = puppet.step

    def noting(timestep, memory):
        goals.append(int(np.argmax(timestep.observation["GOAL"])))
        return step(timestep, memory)

    puppet.step = noting
    return goals


# --- What puppets see -----------------------------------------------------------------------------


@pytest.mark.parametrize("substrate", some_long([CHICKEN, COINS, MINING, ARENA], MINING, ARENA))
def test_kinds_are_those_of_the_engines_layers(substrate):
    """LAYER lists the engine's own numbers of all that it draws on a cell, for a window that does
    not turn with the player. What we read off the pixels of a cell must depend on them alone, and
    different things must have different numbers."""
    spec = get_spec(substrate)
    engine = new_engine(substrate, *[RANDOM] * spec.num_agents)
    puppet = engine.new_puppet(0)
    kinds_of, ids, compared = {}, np.zeros(spec.grid, np.uint16), 0
    seen = set()  # so far: the engine cannot be reproduced, and ores take their time to appear
    for t in range(5000):
        if t >= 200 and len(seen) >= 2:
            break
        for seat in range(min(3, spec.num_agents)):
            see = lambda key, seat=seat: engine.lab.observation(f"{seat + 1}.{key}")  # noqa: E731
            puppet.palette.encode(see("RGB"), ids)
            kinds = puppet.sight.read(ids, puppet.palette)
            x, y, facing = *see("POSITION"), int(see("ORIENTATION"))
            layers, own = see("LAYER"), (puppet.sight.ahead, puppet.sight.left)
            for i, j in np.ndindex(kinds.shape):
                cx, cy = bots.place(i, j, x, y, facing, *own)
                row, column = own[0] + cy - y, own[1] + cx - x
                if 0 <= row < kinds.shape[0] and 0 <= column < kinds.shape[1]:
                    numbers = tuple(layers[row, column].tolist())
                    kinds_of.setdefault(numbers, set()).add(int(kinds[i, j]))
                    compared += 1
                    if kinds[i, j] >= bots.THING and not puppet.player[kinds[i, j]]:
                        seen.add(int(kinds[i, j]))
        if not engine.step(np.zeros(0, int)):
            break
    assert compared > 1000
    things = {}
    for numbers, kinds in kinds_of.items():
        assert len(kinds) == 1, f"{numbers} is read as {kinds}"
        (kind,) = kinds
        # The number on the thing's own layer; players stand on what lies there, and hide it.
        if kind >= bots.THING and kind not in np.flatnonzero(puppet.player):
            things.setdefault(kind, set()).add(max(numbers))
    names = [puppet.sight.things[kind - bots.THING] for kind in things]
    assert len(names) >= 2, names
    for a, b in itertools.combinations(things.values(), 2):
        assert not a & b


def test_memory_of_walls_is_the_map():
    """After some exploring, what a puppet remembers as walls are walls of the substrate's map, and
    together two know most of them; positions, directions and views therefore fit together."""
    engine = new_engine(CHICKEN, "puppet_dove_margin_0", "puppet_hawk_margin_0")
    text = engine.settings["simulation"]["map"].strip("\n").split("\n")
    walls = np.array([[char == "W" for char in row] for row in text])
    known = np.zeros_like(walls)
    for _ in range(1000):
        if not engine.step(np.zeros(0, int)):
            break
    for bot in engine.bots:
        memory = bot.state[1]
        assert memory.grid.shape == walls.shape
        found = memory.grid == bots.WALL
        assert not (found & ~walls).any()
        known |= found
    assert known.sum() > 0.5 * walls.sum()


def test_distances_and_first_steps_are_shortest():
    rng = np.random.default_rng(0)
    for _ in range(20):
        passable = rng.random((9, 13)) < 0.7
        x, y = 4, 3
        passable[y, x] = True
        cells = np.arange(passable.size).reshape(passable.shape)
        graph = np.zeros((passable.size,) * 2)
        for a, b in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])):
            both = passable.flat[a] & passable.flat[b]
            graph[a[both], b[both]] = graph[b[both], a[both]] = 1
        truth = scipy.sparse.csgraph.shortest_path(graph, indices=cells[y, x]).reshape(9, 13)
        far = bots.distances(passable, x, y)
        assert np.array_equal(np.where(far < 0, np.inf, far), truth)
        for cy, cx in zip(*np.nonzero(far > 0)):
            d = bots.first_step(far, cx, cy)
            nx, ny = x + bots.DX[d], y + bots.DY[d]
            back = bots.distances(passable, nx, ny)
            assert passable[ny, nx] and back[cy, cx] == far[cy, cx] - 1
        assert bots.first_step(far, x, y) == -1


def test_aims_are_the_engines_beams():
    """Fires in chicken and compares the cells that the engine draws the beam on with those of which
    aims() says that a target there would be hit."""
    engine = new_engine(CHICKEN, None, None)
    walls = engine.settings["simulation"]["map"].strip("\n").split("\n")
    walls = np.array([[char == "W" for char in row] for row in walls])
    rng, fired = np.random.default_rng(0), 0
    reach, side = engine.new_puppet(0).reach, engine.new_puppet(0).side
    while fired < 40:
        x, y = engine.lab.observation("1.POSITION")
        facing = int(engine.lab.observation("1.ORIENTATION"))
        ready = engine.lab.observation("1.READY_TO_SHOOT") >= 1
        action = 7 if ready and rng.random() < 0.4 else rng.integers(1, 7)
        before = engine.lab.observation("WORLD.RGB").copy()
        drawn_on = tiles(before).any((2, 3, 4))  # whatever is there may stop the beam
        if not engine.step(np.array([action, 0])):
            engine = new_engine(CHICKEN, None, None, seed=fired + 2)
            continue
        struck = [name for name, _ in engine.lab.events()]
        if action != 7 or "destroyed_resource" in struck:  # a beam goes on where it destroys one
            continue
        beam = np.array([252, 252, 106])  # GameInteractionZapper's default beamColor
        after = tiles(engine.lab.observation("WORLD.RGB"))
        drawn = (after == beam).all(-1).mean((2, 3)) > 0.5
        grown = after.any((2, 3, 4)) & ~drawn  # a resource may come back in this step
        free = ~walls & ~drawn_on & ~grown
        for cy, cx in zip(*np.nonzero(abs(np.indices(walls.shape) - [[[y]], [[x]]]).sum(0) <= 5)):
            target = np.zeros_like(walls)
            target[cy, cx] = True
            if free[cy, cx] and (cx, cy) != (x, y):
                hit = bots.aims(target, ~free, reach, side)[facing, y, x]
                assert hit == drawn[cy, cx], (fired, (x, y), facing, (cx, cy))
        fired += 1


def tiles(image):
    """(8H, 8W, 3) -> (H, W, 8, 8, 3)"""
    return image.reshape(image.shape[0] // 8, 8, image.shape[1] // 8, 8, 3).swapaxes(1, 2)


# --- Puppets reach their goals --------------------------------------------------------------------


def mean_returns(substrate, names, steps, episodes=2):
    """Per 1,000 steps and seat, over some episodes."""
    return np.mean(
        [play(new_engine(substrate, *names, seed=k), steps)[0] for k in range(episodes)], 0
    )


def test_coins_puppets_keep_to_their_colours():
    """The order that the scenarios promise; docs/scenarios.md has the figures of 20 episodes."""
    c, d = "puppet_cooperator_0", "puppet_defector_0"
    both = mean_returns(COINS, (c, c), 800)
    assert (both > 15).all()  # each coin pays 1, and nobody takes the other's
    exploited, defector = mean_returns(COINS, (c, d), 800)
    assert defector > 20 and exploited < both.mean() - 10
    assert mean_returns(COINS, (d, RANDOM), 800)[0] > 30
    engine, own = new_engine(COINS, c, c), []

    def watch():
        for _, items in engine.lab.events():
            event = dict(zip(items[1::2], items[2::2]))
            own.append(event[b"player_coin_type"] == event[b"coin_type"])

    play(engine, 800, after=watch)
    # Now and then a coin grows under a bot's feet, of either colour.
    assert len(own) > 10 and np.mean(own) > 0.9


def test_coins_puppets_go_to_what_their_goal_names():
    """Which of two coins, one of them nearer, a puppet walks to: its own when it cooperates, the
    nearer when it defects, the other player's when it spites."""
    engine, goals = new_engine(COINS, RANDOM, RANDOM), configs._PUPPET_GOALS[COINS]
    east, west = 2, 4  # values of "move" that lead there, as the puppet looks north
    for seat, (to_own, to_theirs) in itertools.product((0, 1), ((2, 4), (4, 2))):
        puppet = engine.new_puppet(seat)
        (theirs,) = set(puppet.coins) - {puppet.own}
        memory = bots.Memory(puppet.sight, 0)
        memory.grid[:] = bots.FREE
        memory.y, memory.x = (size // 2 for size in memory.grid.shape)
        memory.grid[memory.y, memory.x + to_own] = puppet.own
        memory.grid[memory.y, memory.x - to_theirs] = theirs
        nearer = east if to_own < to_theirs else west
        for goal, move in (("COOPERATE", east), ("DEFECT", nearer), ("SPITE", west)):
            number = int(np.argmax(goals[goal]))
            assert puppet.act(number, {}, memory) == puppet.action(move=move), goal


def test_matrix_puppets_collect_and_meet():
    dove, hawk = "puppet_dove_margin_0", "puppet_hawk_margin_0"
    doves = mean_returns(CHICKEN, (dove, dove), 1000)
    hawks = mean_returns(CHICKEN, (hawk, hawk), 1000)
    mixed = mean_returns(CHICKEN, (hawk, dove), 1000)
    assert (doves > 20).all()  # an interaction of two doves pays 3: seven of them
    assert (hawks < 0.6 * doves).all()
    assert mixed[0] > doves.mean() > mixed[1] > hawks.mean()


def test_matrix_puppets_bring_what_they_intend():
    """Share of interactions with the intended resource ahead in the own inventory."""
    engine = new_engine(CHICKEN, "puppet_dove_margin_1", "puppet_hawk_margin_1")
    brought = []

    def watch():
        for name, items in engine.lab.events():
            if name == "interaction":
                event = dict(zip(items[1::2], items[2::2]))
                for side in (b"row", b"col"):
                    seat = int(event[side + b"_player_idx"]) - 1
                    brought.append(int(np.argmax(event[side + b"_inventory"])) == seat)

    play(engine, 1500, after=watch)
    assert len(brought) >= 10 and np.mean(brought) > 0.9


@pytest.mark.long
def test_miners_extract_what_they_are_told():
    spec = get_spec(MINING)
    for name, ore in (("cooperator_0", 2), ("defector_0", 1)):
        engine, ores = new_engine(MINING, *[name] * spec.num_agents), []

        def watch(engine=engine, ores=ores):
            for kind, items in engine.lab.events():
                if kind == "extraction":
                    ores.append(int(dict(zip(items[1::2], items[2::2]))[b"ore_type"]))

        for _ in range(1000):  # ores take their time to appear
            if not engine.step(np.zeros(0, int)) or len(ores) >= 10:
                break
            watch()
        assert len(ores) >= 3 and np.mean(np.array(ores) == ore) >= 0.9, (name, ores)


# --- Puppeteers switch goals ----------------------------------------------------------------------


def test_grim_trigger_turns_after_its_threshold_and_never_back():
    for name, threshold in (
        ("puppet_grim_one_strike_margin_0", 1),
        ("puppet_grim_two_strikes_margin_0", 2),
    ):
        engine, defections = new_engine(CHICKEN, name, "puppet_hawk_margin_0"), []
        goals = goals_of(engine, 0)

        def watch(engine=engine, defections=defections):
            _, partner = engine.lab.observation("1.INTERACTION_INVENTORIES")
            defections.append(bool((partner >= 0).all() and partner[1] > partner[0]))

        play(engine, 600, after=watch)
        struck = np.append(0, np.cumsum(defections)[:-1])  # seen before each choice of a goal
        assert struck[-1] > threshold
        assert [goal % 2 for goal in goals] == [int(n >= threshold) for n in struck]


def test_scheduled_flip_changes_its_resource_after_so_many_interactions():
    name = "flip_a2b_0"
    puppeteer = configs.BOT_CONFIGS[f"{PAPER[0]}__{name}"].puppeteer_builder()
    engine, met = new_engine(PAPER[0], name, "pure_a_margin_0"), []
    goals = goals_of(engine, 0)

    def watch():
        _, partner = engine.lab.observation("1.INTERACTION_INVENTORIES")
        met.append(bool((partner >= 0).any()))

    watch()  # the engine begins with inventories of 0, which the puppeteer takes for an interaction
    play(engine, 1200, after=watch)
    count = np.cumsum(met)[: len(goals)]
    assert count[-1] > puppeteer._threshold, "too few interactions to flip"
    first, then = puppeteer._initial_target.index, puppeteer._final_target.index
    expected = [first if n < puppeteer._threshold else then for n in count]
    assert [goal % 3 for goal in goals] == expected and first != then


@pytest.mark.parametrize("name", ["one_strike_strong", "three_strikes"])
def test_reciprocator_punishes_as_long_as_configured(name):
    """Its goals in a game with a defector against a NumPy version of its rule."""
    name = f"puppet_{name}_reciprocator_0"
    puppeteer = configs.BOT_CONFIGS[f"{COINS}__{name}"].puppeteer_builder()
    key, met = "1.MISMATCHED_COIN_COLLECTED_BY_PARTNER", set()
    for seed in range(20):  # few coins in some episodes: until each of its goals has been seen
        engine, signals = new_engine(COINS, name, "puppet_defector_0", seed=seed), [0]
        goals = goals_of(engine, 0)
        play(engine, 700, after=lambda e=engine, s=signals: s.append(int(e.lab.observation(key))))
        window, expected, since = [], [], None
        for t, signal in enumerate(signals[: len(goals)]):
            window = (window + [signal])[-puppeteer._recency_window :]
            if sum(window) >= puppeteer._threshold:
                since, window = t, []
            age = np.inf if since is None else t - since
            spite = age < puppeteer._spiteful_punishment_window
            expected.append(2 if spite else 1 if age < puppeteer._frames_to_punish else 0)
        assert goals == expected
        met |= set(goals)
        if len(met) == 3:
            break
        if len(met) == 2 and not puppeteer._spiteful_punishment_window:
            break
    assert met == ({0, 1, 2} if puppeteer._spiteful_punishment_window else {0, 1})


# --- What gets through to the focal side ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "chicken_in_the_matrix__repeated_3",
        pytest.param("coop_mining_3", marks=pytest.mark.long),
        "coins_1",
    ],
)
def test_the_focal_side_sees_permitted_observations_only(name):
    """Official filter: meltingpot's own, applied to the same substrate's observation names."""
    from meltingpot.configs import substrates
    from meltingpot.utils.scenarios.scenario import _restrict_observation

    with Scenarios([name], 1, bots="scripted", num_workers=1) as envs:
        obs = envs.reset()
        plan = get_plan(name)
        config = substrates.get_config(plan.spec.substrate)
        own = dict.fromkeys([*config.individual_observation_names, "COLLECTIVE_REWARD"])
        official = set(_restrict_observation(own, scenario.PERMITTED_OBSERVATIONS))
        ours = {"RGB", *(key for key, _ in envs.spec.features)}
        assert ours == official - {"COLLECTIVE_REWARD"}
        assert obs.tile_ids.shape[1] == obs.features.shape[1] == sum(plan.spec.is_focal)
        assert obs.features.shape[2] == sum(length for _, length in envs.spec.features)


@pytest.mark.parametrize("name", BOTH)
def test_actors_do_not_read_the_global_view(name):
    """A NetPlayer's actions are the same whatever world_ids hold."""
    one = script(name)
    worlds = TileGame(3, 1)
    agent = one.Agent(one.Args(substrate="toy"), worlds, torch.device("cpu"))
    obs, starts = worlds.reset(), np.ones(3, bool)
    ids = np.tile(np.arange(2), (3, 1))
    players = [one.NetPlayer(agent.actor, agent.sprites, seed=5) for _ in range(2)]
    for _ in range(8):
        other = obs._replace(world_ids=(obs.world_ids + 1) % 7)
        actions = [player(x, starts, ids) for player, x in zip(players, (obs, other))]
        assert np.array_equal(*actions)
        step = worlds.step(actions[0])
        obs, starts = step.obs, step.terminated | step.truncated


def test_focal_views_features_rewards_and_places_are_the_focal_seats():
    """Seats 2 and 5 of six are focal; everything is read from the engine once more."""
    engine = new_engine(MINING, RANDOM, None, RANDOM, RANDOM, None, RANDOM)
    spec, rng = engine.spec, np.random.default_rng(0)
    assert engine.focal == [1, 4] and engine.order == [1, 4, 0, 2, 3, 5]
    ids = np.zeros((2, *spec.grid), np.uint16)
    out = (ids, np.zeros(spec.world_grid, np.uint16), np.zeros((2, 1), np.float32))
    places, reward = np.zeros((6, 2), int), np.zeros(6)
    earned = np.zeros(6)
    for _ in range(2000):
        if earned.any() or not engine.step(rng.integers(0, 8, 2)):
            break
        engine.read_rewards(reward, np.zeros(6, int))
        engine.observe(engine.palette, out)
        engine.locate(places)
        observe = engine.lab.observation
        for k, seat in enumerate(engine.order):
            assert reward[k] == observe(f"{seat + 1}.REWARD")
            assert places[k].tolist() == observe(f"{seat + 1}.POSITION")[::-1].tolist()
        for k, seat in enumerate((1, 4)):
            image = ids_to_images(ids[k], engine.palette.pixels())
            assert np.array_equal(image, observe(f"{seat + 1}.RGB"))
            assert out[2][k, 0] == np.float32(observe(f"{seat + 1}.READY_TO_SHOOT"))
        earned += reward
    assert earned.any()


def test_focal_returns_exclude_bots():
    """An idle focal player beside a defector, which collects coins of both colours. A coin pays
    its collector 1 and costs the other 2 if it has the other's colour, so what either earns is told
    by who collected what. (To the idle player a coin comes when one grows under its feet.)"""
    (rough,) = (n for n in scenario_names(COINS)[5:] if "defector" in get_plan(n).bots[1][0])
    with Scenarios([rough], 4, 1, "scripted", max_episode_steps=500) as envs:
        still = lambda obs, starts, ids: np.zeros(ids.shape, int)  # noqa: E731
        results = play_all(envs, still, None, 0, 4, np.random.default_rng(0))[rough]
    for result in results:
        ours, theirs = result.focal_pick_ups, result.background_pick_ups
        assert (ours - result.focal_return) / 2 in range(int(theirs) + 1)
        assert (theirs - result.background_return) / 2 in range(int(ours) + 1)
    ours, theirs, idle, bot = (
        sum(getattr(result, name) for result in results)
        for name in ("focal_pick_ups", "background_pick_ups", "focal_return", "background_return")
    )
    assert theirs > 20 and theirs > 4 * ours
    assert idle < 0 < bot


# --- Every scenario, and what does not exist ------------------------------------------------------


@pytest.mark.parametrize(
    "substrate",
    [pytest.param(name, marks=[pytest.mark.long] * (name == MINING)) for name in PAPER],
)
def test_the_papers_scenarios_run(substrate):
    """SC0-SC4, some steps each, random focal players; whole episodes are the next test."""
    rng = np.random.default_rng(0)
    names = choose_scenarios(substrate, "all")
    assert names == [f"{substrate}_{k}" for k in range(5)]
    for name in names:
        config = scenario.get_config(name)
        engine = ScenarioEngine(get_plan(name), "scripted", (1,), Palette.private())
        assert engine.focal == np.flatnonzero(config.is_focal).tolist()
        returns, _ = play(engine, 40, lambda engine=engine: rng.integers(0, 7, len(engine.focal)))
        assert np.isfinite(returns).all()
        for bot in engine.bots:
            assert bot.name in config.bots_by_role[config.roles[bot.seat]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "substrate",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in PAPER if name not in BIG),
        *(pytest.param(name, marks=pytest.mark.slow) for name in BIG),
    ],
)
def test_the_papers_scenarios_run_to_their_end(substrate):
    """In worker processes, several at once where they have the same seats."""
    names, rng = choose_scenarios(substrate, "all"), np.random.default_rng(0)
    player = lambda envs: random_player(envs.spec.num_actions, rng)  # noqa: E731
    results = play_scenarios(names, "scripted", player, 1, 5, rng, ("default",) * 8)
    assert list(results) == [f"SC{k} scripted" for k in range(5)]
    for (result,) in results.values():
        assert result.length > 200 and np.isfinite(result).all()


def puppet_substrates():
    """Substrates with scenarios that scripted bots can play."""
    names = {scenario.get_config(name).substrate for name in scenario.SCENARIOS}
    return [one for one in sorted(names) if bots.puppet_kind(one)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("substrate", puppet_substrates())
def test_every_scenario_of_puppets_runs(substrate):
    """All whose bots are puppets, some steps each."""
    rng, own = np.random.default_rng(0), scenario_names(substrate)
    puppets = [name for name in own if not unscripted(get_plan(name))]
    for name in own:  # meltingpot's word on who is a puppet
        drawn = {bot for seat in get_plan(name).bots for bot in seat}
        found = [configs.BOT_CONFIGS.get(bot) for bot in drawn]  # noop_bot has no configuration
        assert (name in puppets) == all(bot and bot.puppeteer_builder for bot in found)
    for name in puppets:
        engine = ScenarioEngine(get_plan(name), "scripted", (1,), Palette.private())
        returns, _ = play(engine, 60, lambda engine=engine: rng.integers(0, 7, len(engine.focal)))
        assert np.isfinite(returns).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_official_bots_with_models_made_here(tmp_path):
    """The official path but for the official weights: SavedModels with the signatures that
    meltingpot expects, whose action is the goal's number plus one."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs tensorflow: pip install -r requirements-bots.txt")
    command = [sys.executable, str(ROOT / "tests/official_bots.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "goals arrive, and actions come back"


def test_bots_are_drawn_from_the_scenarios_list():
    """Chicken's SC0 draws among four bots; over 30 episodes each must have come."""
    plan, drawn = get_plan(f"{CHICKEN}_0"), set()
    assert len(plan.bots[1]) == 4
    for seed in range(30):
        engine = ScenarioEngine(plan, "scripted", (seed,), Palette.private())
        drawn.add(engine.bots[0].name)
        del engine
    assert drawn == set(plan.bots[1])


def test_what_is_chosen():
    assert choose_scenarios(COINS, "none") == []
    assert choose_scenarios(COINS, "SC0,SC3") == ["coins_0", "coins_3"]
    assert choose_scenarios(COINS, "sc6, 2, SC6") == ["coins_6", "coins_2"]
    assert len(choose_scenarios("stag_hunt_in_the_matrix__repeated", "all", "scripted")) == 10
    assert choose_scenarios("daycare", "all", "scripted") == []
    assert choose_bots([get_plan("coins_0")], "scripted") == "scripted"


def test_one_missing_model_leaves_auto_with_scripted_bots(monkeypatch, tmp_path):
    """Of all bots' models but one, in a substrate some of whose bots are no puppets."""
    name = "clean_up"
    drawn = {bot for one in scenario_names(name) for seat in get_plan(one).bots for bot in seat}
    lost = next(bot for bot in sorted(drawn) if not configs.BOT_CONFIGS[bot].puppeteer_builder)
    made_here = {
        bot: dataclasses.replace(
            configs.BOT_CONFIGS[bot], model_path=str(tmp_path / ("lost" * (bot == lost)))
        )
        for bot in drawn
    }
    monkeypatch.setattr(configs, "MODELS_ROOT", str(tmp_path))
    monkeypatch.setattr(configs, "BOT_CONFIGS", configs.BOT_CONFIGS | made_here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "installed")
    own = scenario_names(name)
    assert choose_scenarios(name, "all", "official") == own
    with pytest.raises(ValueError, match=r"lost is not there"):
        choose_bots([get_plan(one) for one in own], "official")
    some = choose_scenarios(name, "all", "auto")
    assert some == choose_scenarios(name, "all", "scripted") != own
    assert choose_bots([get_plan(one) for one in some], "auto") == "official"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--eval-scenarios", "SC9"), r"coins has no scenario SC9: it has SC0, .*SC6\."),
        (("--eval-scenarios", "some"), r"coins has no scenario some: it has SC0, .*SC6\."),
        (
            ("--bots", "official"),
            r"Official bots need Melting Pot's assets, and .* is not there: .*",
        ),
        (
            ("--substrate", "toy", "--eval-scenarios", "SC0"),
            r"--eval-scenarios: toy has none\.",
        ),
        (
            ("--substrate", "daycare", "--eval-scenarios", "SC0", "--bots", "scripted"),
            r"daycare_0 has no scripted bots: daycare__.* is .*",
        ),
    ],
)
def test_what_cannot_be_played_is_one_sentence(flags, sentence, tmp_path, capsys, monkeypatch):
    """Before anything is trained, and with exit code 2; where the assets are installed, too."""
    monkeypatch.setattr(configs, "MODELS_ROOT", str(tmp_path / "saved_models"))
    argv = ["--substrate", COINS, "--run-dir", str(tmp_path / "run"), *flags]
    argv = argv[2:] if "--substrate" in flags else argv
    code = script(MAPPO).main([*argv, "--num-envs", "1", "--num-workers", "1"])
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and re.fullmatch("error: " + sentence, last), last
    assert not (tmp_path / "run").exists()


def test_official_bots_without_tensorflow_are_one_sentence(monkeypatch, tmp_path):
    plan = get_plan("coins_0")
    monkeypatch.setattr(configs, "MODELS_ROOT", str(tmp_path))
    made_here = {
        name: types.SimpleNamespace(model_path=str(tmp_path), puppeteer_builder=lambda: None)
        for name in plan.bots[1]
    }
    monkeypatch.setattr(configs, "BOT_CONFIGS", configs.BOT_CONFIGS | made_here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^Official bots need tensorflow: pip install -r [^ ]+$"):
        choose_bots([plan], "official")


def test_unknown_scenarios_are_one_sentence():
    with pytest.raises(ValueError, match=r"Unknown scenario 'coins_77': there are coins_0, .*"):
        get_plan("coins_77")
    with pytest.raises(ValueError, match=r"Unknown scenario 'zzz': see docs"):
        get_plan("zzz")
    with pytest.raises(ValueError, match="must have the same seats"):
        Scenarios([f"{ARENA}_0", f"{ARENA}_1"], 2, bots="scripted")


# --- Evaluation -----------------------------------------------------------------------------------


class Labelled(TileGame):
    """The toy with two labels and a bot's return in each episode."""

    labels = ("a", "b", "a")


FIVE = ("default",) * 5


def test_play_is_of_worlds_with_one_label():
    """Whatever it is called; of several play_all() has results of each."""

    def still(obs, starts, ids):
        return np.zeros(ids.shape, int)

    for labels in (("mine", "mine"), ("", "")):
        envs = TileGame(2, 1)
        envs.labels = labels
        assert len(episodes.play(envs, still, None, 0, 3, np.random.default_rng(0))) == 3
    envs.labels = ("mine", "its")
    with pytest.raises(ValueError, match="several labels"):
        episodes.play(envs, still, None, 0, 3, np.random.default_rng(0))


def test_play_all_counts_by_label_and_draws_ids_without_replacement():
    seen = []

    def player(obs, starts, ids):
        seen.append(ids.copy())
        return np.zeros(ids.shape, int)

    results = play_all(Labelled(3, 1), player, None, 0, 7, np.random.default_rng(0), id_roles=FIVE)
    assert {label: len(x) for label, x in results.items()} == {"a": 7, "b": 7}
    seen = np.stack(seen)
    assert (seen[..., 0] != seen[..., 1]).all() and set(np.unique(seen)) == set(range(5))


@pytest.mark.long
def test_ids_by_slot_are_the_numbers_of_the_focal_seats():
    """Seats 2 and 5 of six in one world, 1 and 4 in the other."""
    spec, seen = get_spec(MINING), []
    plans = [
        Plan(name, spec, tuple(() if seat in ours else (RANDOM,) for seat in range(6)))
        for name, ours in (("a", (1, 4)), ("b", (0, 3)))
    ]
    still = lambda obs, starts, ids: seen.append(ids.copy()) or np.zeros(ids.shape, int)  # noqa: E731
    with Scenarios(plans, 2, bots="scripted", num_workers=1, max_episode_steps=5) as envs:
        rng, roles = np.random.default_rng(0), spec.roles
        play_all(envs, still, None, 0, 1, rng, shuffle_ids=False, id_roles=roles)
    assert len(seen) == 5 and all(ids.tolist() == [[1, 4], [0, 3]] for ids in seen)


PREY = ("predator",) * 3 + ("prey",) * 10  # predator_prey__open, in training


def test_worlds_of_other_roles_share_a_game_and_keep_their_ids():
    """Two focal seats of five: the first a prey and the fifth a predator in one world, the fourth a
    prey and the first a predator in the other."""

    class Mixed(Labelled):
        labels = ("a", "b")
        seats = np.array([[0, 4], [3, 0]])
        seat_roles = (("prey", "prey", *PREY[:3]), PREY[2:7])

    def ids_of(shuffle):
        seen, rng = [], np.random.default_rng(0)
        player = lambda obs, starts, ids: seen.append(ids.copy()) or 0 * ids  # noqa: E731
        play_all(Mixed(2, 1), player, None, 0, 200, rng, shuffle_ids=shuffle, id_roles=PREY)
        return np.stack(seen)  # (T, B, F)

    drawn, slots = ids_of(True), ids_of(False)
    assert (slots == [[3, 2], [5, 0]]).all()
    prey, predators = set(range(3, 13)), set(range(3))
    found = [set(x) for x in drawn.transpose(1, 2, 0).reshape(4, -1).tolist()]
    assert found == [prey, predators, prey, predators]


def shared_roles():
    """(name, training's roles) of all scenarios of the substrates that have several roles."""
    for substrate in sorted(scenario.SCENARIOS_BY_SUBSTRATE):
        trained = get_spec(substrate).roles
        if len(set(trained)) > 1:
            yield from ((name, trained) for name in scenario_names(substrate))


def test_focal_seats_have_ids_of_their_roles_in_every_scenario():
    """As drawn, and by slot, where in 12 scenarios a seat's number had another role in training."""
    rng, moved = np.random.default_rng(0), []
    for name, trained in shared_roles():
        plan = get_plan(name)
        focal, own = focal_seats(plan), plan.spec.roles
        roles = [own[seat] for seat in focal]
        for _ in range(5):
            ids = seat_ids(rng.permutation(len(trained)), trained, roles)
            assert [trained[x] for x in ids] == roles and len({*ids}) == len(ids)
        slots = seat_ids(range(len(trained)), trained, own)[focal]
        assert [trained[x] for x in slots] == roles
        if [trained[seat] for seat in focal] != roles:
            moved.append(name)
        else:
            assert slots.tolist() == focal
    assert len(moved) == 12 and "bach_or_stravinsky_in_the_matrix__repeated_0" in moved


def test_players_are_framed():
    image = np.full((24, 32, 3), 9, np.uint8)
    framed = mark(image, np.array([[0, 1], [2, 3], [-1, -1]]), 1)
    assert (image == 9).all()
    for (row, column), colour in (((0, 1), FOCAL_COLOUR), ((2, 3), BOT_COLOUR)):
        cell = framed[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        edge = np.ones((8, 8), bool)
        edge[1:-1, 1:-1] = False
        assert (cell[edge] == colour).all() and (cell[~edge] == 9).all()
        framed[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 9
    assert (framed == 9).all()


def test_results_are_written_whole(tmp_path):
    results = {"SC3 scripted": [Result(1.5, 2.0, 3.0, 4.0, 5), Result(0.0, 1.0, 0.0, 2.0, 7)]}
    save_results(tmp_path / "evaluation", FINAL, COINS, 4, results)
    (path,) = (tmp_path / "evaluation").iterdir()
    assert path.name == "final-100-SC3-scripted.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scenario"] for row in rows] == ["coins_3"] * 2
    assert [row["bots"] for row in rows] == ["scripted"] * 2
    assert [float(row["focal_return"]) for row in rows] == [1.5, 0.0]
    assert [(row["seed"], row["timesteps"], row["episode"]) for row in rows] == [
        ("4", "100", "0"),
        ("4", "100", "1"),
    ]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"final_episodes": 1}, "2 episodes"),
        ({"randnet_test": "mc"}, "--randnet-test clean"),
        ({"eval_ids": "slot", "final_episodes": 1}, "--eval-ids random and 2 episodes"),
    ],
)
def test_a_look_at_a_run_keeps_its_final_evaluation(flags, reason, tmp_path):
    """--eval-only in the run's own directory; refused before anything is played."""
    args = script("baselines.randnet_meltingpot").Args(substrate=COINS, final_episodes=2)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    results = {"SC3 scripted": [Result(1.5, 2.0, 3.0, 4.0, 5), Result(0.0, 1.0, 0.0, 2.0, 7)]}
    save_results(tmp_path / "evaluation", FINAL, COINS, 1, results)
    path = tmp_path / "evaluation/final-100-SC3-scripted.csv"
    options = {"eval_only": str(tmp_path), "eval_scenarios": "SC3", "bots": "scripted"}
    again = dataclasses.replace(args, **options)
    look = dataclasses.replace(again, **flags)
    evaluation = harness.Evaluation(look, "final", 100, tmp_path)
    sentence = f"{path} has {reason} and stays as it is: name another directory by --run-dir."
    with pytest.raises(NoWorldError) as error:
        scenario_rows(look, evaluation, None, id_roles=FIVE[:2])
    assert str(error.value) == sentence
    with pytest.raises(NoWorldError) as error:  # which scripts play first
        background_rows(look, evaluation, None, None, {})
    assert str(error.value) == sentence
    # The same evaluation again, one elsewhere and one after other steps are free to be written.
    find_kept(again, harness.Evaluation(again, "final", 100, tmp_path), ["coins_3"], "scripted")
    elsewhere = dataclasses.replace(look, run_dir="elsewhere")
    find_kept(elsewhere, evaluation, ["coins_3"], "scripted")
    find_kept(look, harness.Evaluation(look, "final", 200, tmp_path), ["coins_3"], "scripted")


@pytest.mark.parametrize("flags", [{"eval_ids": "slot"}, {"randnet_test": "mc"}])
def test_no_other_evaluation_comes_beside_a_runs_own(flags, tmp_path):
    """Tables would show both as one: of another scenario, too. Without scenarios all is free."""
    args = script("baselines.randnet_meltingpot").Args(substrate=COINS, eval_only=str(tmp_path))
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    look, folder = dataclasses.replace(args, **flags), tmp_path / "evaluation"
    evaluation = harness.Evaluation(look, "final", 100, tmp_path)
    assert find_kept(look, evaluation, ["coins_4"], "scripted") == []
    save_results(folder, FINAL, COINS, 1, {"SC3 scripted": []})
    with pytest.raises(NoWorldError, match=r"SC3-scripted.csv has --.* and stays as it is"):
        find_kept(look, evaluation, ["coins_4"], "scripted")
    assert find_kept(look, evaluation, [], "scripted") == []
    assert find_kept(args, evaluation, ["coins_4"], "scripted") == []


@pytest.mark.parametrize("options", [{"resume": "run"}, {"eval_only": "run", "run_dir": "copy"}])
@pytest.mark.parametrize("chosen", ["SC4", "none"])
def test_an_evaluation_replaces_one_of_other_scenarios(options, chosen, tmp_path, monkeypatch):
    """As summary.json is written anew, --resume and --run-dir leave no other scenario's file of
    these steps; those of other steps stay. --eval-only without --run-dir adds to a run's files."""
    monkeypatch.setattr(scenarios, "play_scenarios", lambda *_, **__: {"SC4 scripted": played})
    played = [Result(9.0, 9.0, 9.0, 9.0, 9)]
    for steps in (50, 100):
        before = types.SimpleNamespace(kind="final", timesteps=steps)
        save_results(tmp_path / "evaluation", before, COINS, 1, {"SC3 scripted": played})

    def files(**flags):
        args = script(MAPPO).Args(substrate=COINS, bots="scripted", eval_scenarios=chosen, **flags)
        evaluation = harness.Evaluation(args, "final", 100, tmp_path)
        scenario_rows(args, evaluation, None, id_roles=FIVE[:2])
        return sorted(path.name for path in (tmp_path / "evaluation").iterdir())

    earlier = "final-50-SC3-scripted.csv"
    new = ["final-100-SC4-scripted.csv"] if chosen == "SC4" else []
    assert files(eval_only="run") == sorted(["final-100-SC3-scripted.csv", *new, earlier])
    assert files(**options) == [*new, earlier]


def test_nobody_is_beside_a_single_agent(monkeypatch):
    monkeypatch.setattr(scenarios, "play_pairs", lambda envs, pairs, **_: pairs)
    args = script(MAPPO).Args(substrate="toy", background=("random", "other"))
    evaluation = harness.Evaluation(args, "final", 100, None)
    for agents, rows in ((1, set()), (2, {"v random", "v other"})):
        spec = types.SimpleNamespace(num_agents=agents, num_actions=3)
        envs = types.SimpleNamespace(spec=spec)
        found = background_rows(args, evaluation, envs, str, {"other": str})
        assert found.keys() == {"self-play", "random v random", *rows}


def test_a_resumed_run_keeps_what_its_last_flags_made(tmp_path):
    """--resume may change --eval-ids. Without an intact args.json the number of episodes counts."""
    args = script(MAPPO).Args(substrate=COINS, final_episodes=2)
    about = dataclasses.asdict(args) | {"resumed": [{"timesteps": 50, "eval_ids": "slot"}]}
    (tmp_path / "args.json").write_text(json.dumps(about))
    results = {"SC3 scripted": [Result(1.5, 2.0, 3.0, 4.0, 5), Result(0.0, 1.0, 0.0, 2.0, 7)]}
    save_results(tmp_path / "evaluation", FINAL, COINS, 1, results)

    def look(**flags):
        again = dataclasses.replace(args, eval_only=str(tmp_path), **flags)
        evaluation = harness.Evaluation(again, "final", 100, tmp_path)
        find_kept(again, evaluation, ["coins_3"], "scripted")

    look(eval_ids="slot")
    with pytest.raises(NoWorldError, match="has --eval-ids slot and stays"):
        look(eval_ids="random")
    (tmp_path / "args.json").write_text('{"a": ')
    look(eval_ids="random")
    with pytest.raises(NoWorldError, match="has 2 episodes and stays"):
        look(final_episodes=1)


def test_a_finished_run_keeps_its_final_evaluation(tmp_path, monkeypatch, capsys):
    """No later one takes its place, though it has as many episodes of the same policy, or more; it
    is played and its figures are returned."""
    args = script(MAPPO).Args(substrate=COINS, final_episodes=2)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    results = {"SC3 scripted": [Result(1.5, 2.0, 3.0, 4.0, 5), Result(0.0, 1.0, 0.0, 2.0, 7)]}
    save_results(tmp_path / "evaluation", FINAL, COINS, 1, results)
    (path,) = (tmp_path / "evaluation").iterdir()
    before = path.read_bytes()
    others = [Result(9.0, 9.0, 9.0, 9.0, 9)] * 2

    def play(names, bots, *_, **__):
        return {f"SC{name[-1]} {bots}": others for name in names}

    monkeypatch.setattr(scenarios, "play_scenarios", play)
    look = dataclasses.replace(args, eval_only=str(tmp_path), bots="scripted")

    def rows(**changes):
        changed = dataclasses.replace(look, **changes)
        folder = tmp_path / changed.run_dir if changed.run_dir else tmp_path
        evaluation = harness.Evaluation(changed, "final", 100, folder)
        return scenario_rows(changed, evaluation, None, id_roles=FIVE[:2])

    (tmp_path / "summary.json").write_text("{}")
    figures = rows(eval_scenarios="SC3,SC4")
    assert figures["SC3 scripted"] == figures["SC4 scripted"]
    assert path.read_bytes() == before and (path.parent / path.name.replace("3", "4")).exists()
    assert "keeps what it has of SC3 scripted: for a copy" in capsys.readouterr().out
    with pytest.raises(NoWorldError, match="has 2 episodes and stays as it is"):
        rows(eval_scenarios="SC3", final_episodes=1)
    rows(eval_scenarios="SC3", run_dir="copy")
    assert path.read_bytes() == before != (tmp_path / "copy/evaluation" / path.name).read_bytes()
    assert capsys.readouterr().out == ""
    (tmp_path / "summary.json").unlink()  # not finished: free to be written
    rows(eval_scenarios="SC3")
    assert path.read_bytes() != before


@contextlib.contextmanager
def cut_episodes(steps=60):
    """Evaluations play natural episodes, of up to thousands of steps; here they are cut."""
    whole = MeltingPot.__init__

    def init(self, *args, **options):
        whole(self, *args, **options | {"max_episode_steps": steps})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeltingPot, "__init__", init)
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one iteration in coins, evaluated beside the bots of two scenarios."""
    folder = tmp_path_factory.mktemp("short")
    argv = f"--substrate coins --num-envs 2 --rollout-steps 10 --minibatches 1 --epochs 1 --seed 3 \
        --total-timesteps 20 --final-episodes 1 --background random --eval-scenarios SC0,SC3 \
        --bots scripted --num-workers 2 --capture-video --run-dir {folder / 'run'}"
    with cut_episodes():
        assert script(MAPPO).main(argv.split()) == 0
    return folder / "run"


@pytest.mark.long
def test_a_run_is_evaluated_beside_bots_of_a_named_kind(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())["eval"]
    assert list(summary) == [
        "self-play",
        "random v random",
        "v random",
        "SC0 scripted",
        "SC3 scripted",
    ]
    about = json.loads((run_dir / "args.json").read_text())
    assert about["script"] == "mappo_meltingpot" and about["resolved"]["bots"] == "scripted"
    for number in (0, 3):
        with (run_dir / f"evaluation/final-20-SC{number}-scripted.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row["scenario"] == f"coins_{number}" and row["bots"] == "scripted"
        assert float(row["focal_return"]) == summary[f"SC{number} scripted"]["return"]
        assert (run_dir / f"videos/final-20-SC{number}-scripted.mp4").stat().st_size > 1000
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "final/SC3 scripted/return" in last


@pytest.mark.long
def test_a_checkpoint_for_other_actions_is_one_sentence(run_dir, tmp_path, capsys):
    """Coins has 7 actions; a checkpoint that says it is of coins and has 8 does not fit."""
    other = tmp_path / "run"
    shutil.copytree(run_dir, other)
    index = json.loads((other / "checkpoints.json").read_text())
    state = torch.load(other / index[0]["name"], weights_only=True)
    actor = state["agent"]["actor"]
    for key in ("out.weight", "out.bias"):
        actor[key] = torch.cat([actor[key], actor[key][:1]])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (other / index[0]["name"]).write_bytes(buffer.getvalue())
    index[0]["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (other / "checkpoints.json").write_text(json.dumps(index))
    code = script(MAPPO).main(["--eval-only", str(other), "--final-episodes", "1"])
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and last.startswith(
        f"error: {other} does not fit this script's networks: size"
    )
    assert "shape torch.Size([8, " in last and "model is torch.Size([7, " in last
    code = script(MAPPO).main(
        ["--eval-only", str(run_dir), "--final-episodes", "1", "--background", str(other)]
    )
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and last.startswith(
        f"error: {other} does not fit this script's networks: size"
    )
    assert "shape torch.Size([8, " in last and "model is torch.Size([7, " in last
