"""envs/parallel.py: PettingZoo's own tests of every family of worlds, the worlds behind the views,
and what the views refuse."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from pettingzoo.test import (
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
    seed_test,
)
from pettingzoo.test.state_test import state_test

from envs.parallel import VIEWS, View, env, parallel_env
from envs.particle.worlds import ParticleWorld
from envs.smac import resource_collection as rc
from envs.smac.combat import Combat

ROOT = Path(__file__).resolve().parents[2]
CHICKEN = "chicken_in_the_matrix__repeated"
ARENA = "prisoners_dilemma_in_the_matrix__arena"

needs_melting_pot = pytest.mark.skipif(
    importlib.util.find_spec("dmlab2d") is None, reason="needs Melting Pot"
)
REPRODUCIBLE = [
    ("particle", "treasure", 3),
    ("particle", "resource", 6),
    ("particle", "pacman", (4, 2)),
    ("particle", "signpost", 4),
    ("particle", "rooms", (3, 3)),
    ("particle", "delivery", (6, 2)),
    ("battles", "sz", (3, 4, 5)),
    ("battles", "mmm", (8,)),
    ("battles", "csz", (6,)),
    ("battles", "zerg", (5, 8)),
    ("collection", (2, 3)),
]  # max_cycles_test asks for the steps of the median agent: more than half of a team must play
MELTING_POT = [
    *(pytest.param("meltingpot", name, marks=needs_melting_pot) for name in ("coins", CHICKEN)),
    pytest.param("meltingpot", "hidden_agenda", marks=[needs_melting_pot, pytest.mark.long]),
]
ONE_EACH = [
    pytest.param(("meltingpot", CHICKEN), marks=needs_melting_pot, id="meltingpot"),
    pytest.param(("particle", "pacman", (4, 2)), id="particle"),
    pytest.param(("battles", "sz", (3, 5)), id="battles"),
    pytest.param(("collection", (2, 3)), id="collection"),
]

WRONG = [
    999,
    -1,
    1.5,
    None,
    "left",
    np.array([1, 2]),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)
    matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def expected_warnings():
    """PettingZoo warns of what our worlds have on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*observation space.*")  # dictionaries; unbounded
        warnings.filterwarnings("ignore", "Environment's m.* state space value is")  # unbounded
        warnings.filterwarnings("ignore", ".*negative numbers and is in the shape of a graphical")
        warnings.filterwarnings("ignore", "Observation is not a NumPy array")  # a dictionary
        warnings.filterwarnings("ignore", "No agents present but not all")  # a smaller team
        warnings.filterwarnings("ignore", "We recommend agents to be named")  # pac_man_0
        warnings.filterwarnings("ignore", "Observation numpy array is all zeros")  # of the dead
        yield


def everybody(world: View, action: int = 1) -> dict[str, int]:
    """The same action of all who act now."""
    return dict.fromkeys(world.agents, action)


def name(which: tuple) -> str:
    return "-".join(map(str, which))


# --- PettingZoo's own tests -----------------------------------------------------------------------


@pytest.mark.parametrize("which", REPRODUCIBLE, ids=name)
def test_pettingzoo(which, capsys):
    def new(**options):
        return parallel_env(*which, **options)

    def turns(**options):
        return env(*which, **options)

    parallel_api_test(new(), 200)
    api_test(turns(), 60)
    assert capsys.readouterr().out.count("Passed") == 2
    parallel_seed_test(new)
    seed_test(turns, 40)
    max_cycles_test(types.SimpleNamespace(parallel_env=new, env=turns))
    render_test(turns)
    state_test(turns(), new())


@pytest.mark.parametrize("family, substrate", MELTING_POT)
def test_pettingzoo_on_melting_pot(family, substrate, capsys):
    """All but the seed tests: the engine is not reproducible."""

    def new(**options):
        return parallel_env(family, substrate, **options)

    def turns(**options):
        return env(family, substrate, **options)

    parallel_api_test(new(), 30)
    api_test(turns(), 10)
    assert capsys.readouterr().out.count("Passed") == 2
    max_cycles_test(types.SimpleNamespace(parallel_env=new, env=turns))
    render_test(turns)
    state_test(turns(), new(), 3)


@pytest.mark.parametrize("which", REPRODUCIBLE, ids=name)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original(which, copied):
    """Planners and vectorised environments copy worlds; one that was copied is not moved by it."""
    world = parallel_env(*which)
    world.reset(seed=1)
    world.step(everybody(world))
    other, third = copied(world), copied(world)
    paid = []
    for each in (world, other):
        rewards = []
        while each.agents and len(rewards) < 15:
            rewards.append(each.step(everybody(each, 2))[1])
        paid.append((rewards, each.state()))
    assert paid[0][0] == paid[1][0] and np.array_equal(paid[0][1], paid[1][1])
    assert not np.array_equal(third.state(), world.state())


# --- What the views refuse ------------------------------------------------------------------------


@pytest.mark.parametrize("which", ONE_EACH)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_actions_that_do_not_exist(which, wrong):
    world = parallel_env(*which)
    world.reset(seed=1)
    last = world.agents[-1]
    actions = everybody(world)
    with pytest.raises(ValueError) as caught:
        world.step(actions | {last: wrong})
    top = world.action_space(last).n - 1
    assert str(caught.value) == f"{last} has no action {wrong}: 0 to {top} are allowed."
    assert set(world.step(actions)[1]) == set(actions), "a refusal has changed the world"


@pytest.mark.parametrize("which", ONE_EACH)
def test_actions_of_nobody_and_missing_ones(which):
    world = parallel_env(*which)
    world.reset(seed=1)
    actions = everybody(world)
    first = world.agents[0]
    with pytest.raises(ValueError, match=f"^nobody does not act now: {first}, .* do\\.$"):
        world.step(actions | {"nobody": 1})
    del actions[first]
    top = world.action_space(first).n - 1
    message = f"^The action of {first} is missing: 0 to {top} are allowed\\.$"
    for some in (actions, {}):
        with pytest.raises(ValueError, match=message):
            world.step(some)


def test_there_is_no_hint_at_the_toy():
    """It has no view here; scripts have it (test_meltingpot_flags.py)."""
    with pytest.raises(ValueError) as error:
        parallel_env("meltingpot", "toy")
    assert str(error.value) == "Unknown substrate 'toy': see docs/meltingpot.md for the list."


@needs_melting_pot
def test_no_picture_before_an_episode():
    env = parallel_env("meltingpot", "coins", render_mode="rgb_array")
    for look in (env.state, env.render):
        with pytest.raises(ValueError, match=r"call reset\(\) before state\(\) or render\(\)\.$"):
            look()


def test_scenarios_have_no_view():
    """All of coins_0's seats would be the caller's, also the bot's."""
    with pytest.raises(ValueError) as error:
        parallel_env("meltingpot", "coins_0")
    text = "coins_0 is a scenario, whose bots do not play here: try coins."
    assert str(error.value) == text


@pytest.mark.parametrize("which", ONE_EACH)
def test_no_step_before_a_reset_or_after_the_end(which):
    world = parallel_env(*which, max_cycles=2)
    message = r"^No episode is under way: call reset\(\) before step\(\)\.$"
    with pytest.raises(ValueError, match=message):
        world.step({})
    world.reset(seed=1)
    for _ in range(2):
        world.step(everybody(world))
    assert world.agents == []
    with pytest.raises(ValueError, match=message):
        world.step(dict.fromkeys(world.possible_agents, 1))
    world.reset()
    world.step(everybody(world))


def test_the_dead_do_not_act():
    """Pac-Men that have left, and slots that are empty in a small team."""
    world = parallel_env("particle", "pacman", (2, 8))
    for seed in range(20):
        world.reset(seed=seed)
        while len(world.agents) == 10:
            world.step(everybody(world))
        if world.agents:
            break
    (gone, *_) = [agent for agent in world.possible_agents if agent not in world.agents]
    with pytest.raises(ValueError, match=f"^{gone} does not act now: "):
        world.step(dict.fromkeys([*world.agents, gone], 1))
    battle = parallel_env("battles", "sz", (3, 5))
    collection = parallel_env("collection", (3, 5))
    for world in (battle, collection):
        sizes = set()
        for seed in range(20):
            world.reset(seed=seed)
            sizes.add(len(world.agents))
            absent = [agent for agent in world.possible_agents if agent not in world.agents]
            for agent in absent[:1]:
                with pytest.raises(ValueError, match=f"^{agent} does not act now: "):
                    world.step(dict.fromkeys([*world.agents, agent], 1))
        assert sizes == {3, 5}


@pytest.mark.parametrize("which", ONE_EACH)
def test_integers_of_all_kinds_are_actions(which):
    kinds = (int, np.int32, np.uint8, np.array, torch.tensor)
    world = parallel_env(*which)
    world.reset(seed=1)
    for kind in kinds:
        world.step({agent: kind(1) for agent in world.agents})


@pytest.mark.parametrize("which", ONE_EACH)
def test_render_modes_that_do_not_exist(which):
    with pytest.raises(ValueError, match=r"^render_mode is human or rgb_array, not 'ansi'\.$"):
        parallel_env(*which, render_mode="ansi")
    world = parallel_env(*which)
    world.reset()
    assert world.render() is None, "rendered without render_mode"


def test_families_that_do_not_exist():
    message = "^There is no family of worlds 'chess': meltingpot, particle, battles, collection.$"
    with pytest.raises(ValueError, match=message):
        parallel_env("chess")
    with pytest.raises(ValueError, match=message):
        env("chess")
    assert all(issubclass(view, View) for view in VIEWS.values())


def test_worlds_are_imported_where_they_are_used():
    """A view of one family needs nothing that only others need."""
    code = """if True:
        import sys
        from envs.parallel import parallel_env
        others = ("envs.smac.combat", "envs.smac.resource_collection", "meltingpot", "dmlab2d")
        print([name for name in ("torch", "numba", *others) if name in sys.modules])
        parallel_env("particle", "treasure", 3).reset(seed=1)
        print([name for name in others if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n[]\n", done.stderr


# --- Melting Pot ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family, substrate", MELTING_POT)
def test_melting_pot_shows_pixels_and_counts_pick_ups(family, substrate):
    world = parallel_env(family, substrate, render_mode="rgb_array")
    obs, _ = world.reset(seed=2)
    spec = world.spec
    assert world.agents == world.possible_agents and len(world.agents) == spec.num_agents
    for agent in world.agents:
        assert world.observation_space(agent).contains(obs[agent]), obs[agent]
        assert world.action_space(agent).n == spec.num_actions
    for image in (world.state(), world.render()):
        assert image.shape == (*(8 * n for n in spec.world_grid), 3)
        assert image.any()
        assert world.state_space.contains(image)
    before, moved = world.state(), False
    for _ in range(40):
        actions = {agent: world.action_space(agent).sample() for agent in world.agents}
        obs, reward, terminated, truncated, info = world.step(actions)
        moved |= not np.array_equal(before, world.state())
    assert all(world.observation_space(agent).contains(obs[agent]) for agent in world.agents)
    assert all(isinstance(reward[agent], float) for agent in world.agents)
    assert not any(terminated.values()) and not any(truncated.values())
    assert all(isinstance(info[agent]["pick_ups"], int) for agent in world.agents)
    assert moved
    world.close()


@needs_melting_pot
def test_melting_pot_seeds_and_ends():
    from test_meltingpot import expected_look, look

    def begin(**options):
        world.reset(**options)
        return look(world.state())

    world = parallel_env("meltingpot", "coins", max_cycles=3)
    first, second = begin(seed=11), begin()
    assert first == expected_look(11, 0, 0), "a seed gives other worlds than MeltingPot's"
    assert second == expected_look(11, 0, 1)
    assert begin(seed=11) == first and begin() == second
    assert begin(seed=12) not in (first, second)
    for t in range(3):
        _, _, terminated, truncated, _ = world.step(everybody(world, 0))
        assert list(truncated.values()) == [t == 2] * 2
        assert not any(terminated.values())
    assert world.agents == []


@needs_melting_pot
def test_melting_pot_views_without_a_seed_differ():
    """Two random worlds of coins look alike in 2 of 1,000 pairs; four next to never."""
    from test_meltingpot import look

    seen = set()
    for _ in range(4):
        world = parallel_env("meltingpot", "coins")
        world.reset()
        seen.add(look(world.state()))
        world.close()
    assert len(seen) > 1, "unseeded views are all alike"


@needs_melting_pot
def test_melting_pot_shows_what_the_official_wrapper_shows():
    from test_meltingpot import Both

    both = Both(ARENA)
    both.reset()
    world = parallel_env("meltingpot", ARENA)
    world.engine, world.agents = both.engine, list(world.possible_agents)
    rng = np.random.default_rng(12)
    for t in range(50):
        actions = rng.integers(0, both.spec.num_actions, both.spec.num_agents)
        if t % 2:
            both.timestep = both.official.step(actions.tolist())
        chosen = dict(zip(world.agents, actions.tolist()))
        obs, reward, terminated, _, _ = world.step(chosen)
        if t % 2 == 0:
            both.timestep = both.official.step(actions.tolist())
        assert not any(terminated.values())
        for i, agent in enumerate(world.agents):
            official = both.timestep.observation[i]
            assert set(obs[agent]) < set(official)
            for key, value in obs[agent].items():
                assert np.array_equal(value, np.reshape(official[key], value.shape)), key
            assert reward[agent] == both.timestep.reward[i]
        assert np.array_equal(world.state(), official["WORLD.RGB"])


# --- Particle worlds ------------------------------------------------------------------------------


def test_particle_shows_the_worlds_own():
    """Observations, rewards and state against a world with the same seed."""
    view = parallel_env("particle", "pacman", (4, 2))
    world = ParticleWorld("pacman", (4, 2), 1, seed=5)
    seen, _ = view.reset(seed=5)
    obs, rng = world.reset(), np.random.default_rng(0)
    while True:
        for i, agent in enumerate(view.possible_agents):
            if agent in seen:
                others = (obs.entities() * obs.mask()[..., None])[0, i]
                others = torch.cat((others[:i], others[i + 1 :]))
                flat = torch.cat((obs.own[0, i], others.flatten()))
                assert np.array_equal(seen[agent], flat.numpy())
        if not view.agents:
            break
        actions = rng.integers(0, 5, 6)
        acted = [view.possible_agents.index(agent) for agent in view.agents]
        still = [i for i in range(6) if i not in acted]
        chosen = {view.possible_agents[i]: actions[i] for i in acted}
        seen, reward, *_ = view.step(chosen)
        actions[still] = 0
        step = world.step(torch.from_numpy(actions)[None])
        obs = step.final
        assert list(reward.values()) == step.reward[0, acted].tolist()
        assert np.array_equal(view.state(), step.final_state[0].numpy())


def test_dead_pac_men_leave():
    world = parallel_env("particle", "pacman", (2, 8))
    left, zeros = 0, 0
    for seed in range(10):
        world.reset(seed=seed)
        while world.agents:
            before = list(world.agents)
            obs, reward, terminated, truncated, _ = world.step(dict.fromkeys(before, 1))
            assert list(obs) == list(reward) == before
            dead = [agent for agent in before if terminated[agent] and agent.startswith("pac")]
            left += len(dead)
            assert not any(truncated[agent] for agent in dead)
            if world.agents:
                assert world.agents == [agent for agent in before if agent not in dead]
                game = world.world.game
                others = obs["ghost_0"][game.own_features :].reshape(-1, game.entity_features)
                gone = [f"pac_man_{k}" not in world.agents for k in (0, 1)]
                assert [not row.any() for row in others[:2]] == gone
                zeros += sum(gone)
    assert left > 3 and zeros > 3


# --- Battles and Resource Collection --------------------------------------------------------------


def first_row_own(obs, i):
    """What slot i sees of all entities, its own row first."""
    hidden = obs.obs_mask[0, i].numpy()
    rows = np.where(hidden[:, None], 0, obs.entities[0].numpy())
    return np.concatenate((rows[i : i + 1], np.delete(rows, i, 0)))


def test_battles_show_their_own():
    """Observations, rewards and ends against a battle with the same seed; what is not available
    becomes stop."""
    view = parallel_env("battles", "csz", (5,))
    battle = Combat("csz", (5,), 1, seed=9, once=True)
    seen, _ = view.reset(seed=9)
    obs, info = battle.reset(), {}
    rng = np.random.default_rng(0)
    while True:
        for i, agent in enumerate(view.possible_agents):
            assert np.array_equal(seen[agent]["observation"], first_row_own(obs, i))
            assert np.array_equal(seen[agent]["action_mask"], obs.avail[0, i].numpy())
        if not view.agents:
            break
        wild = rng.integers(0, 14, 5)  # many of them not available
        may = obs.avail[0].numpy()
        fine = [a if may[i, a] else int(not may[i, 0]) for i, a in enumerate(wild)]
        step = battle.step(np.array([[*fine, 0, 0, 0]]))
        chosen = dict(zip(view.agents, wild))
        seen, reward, over, late, info = view.step(chosen)
        obs = step.obs
        assert set(reward.values()) == {float(step.reward[0])}
        assert set(over.values()) == {bool(step.terminated[0])}
        assert set(late.values()) == {bool(step.truncated[0])}
    assert list(info.values()) == [{"won": step.episodes[0].won}] * 5


def test_resource_collection_shows_its_own():
    """Observations, rewards and ends against a world with the same seed; 0 means stay."""
    view = parallel_env("collection", (3,), max_cycles=40)
    world = rc.ResourceCollection((3,), 1, seed=9, episode_limit=40, once=True)
    seen, _ = view.reset(seed=9)
    world.reset()
    rng, earned = np.random.default_rng(0), 0.0
    while True:
        for i, agent in enumerate(view.possible_agents):
            assert np.array_equal(seen[agent]["observation"], first_row_own(world.obs, i))
            assert np.array_equal(seen[agent]["action_mask"], world.obs.avail[0, i].numpy())
        if not view.agents:
            break
        wild = rng.integers(0, 6, 3)
        fine = [action or rc.STAY for action in wild.tolist()]
        step = world.step(torch.tensor([[*fine, 0, 0, 0, 0, 0]]))
        chosen = dict(zip(view.agents, wild))
        seen, reward, over, late, _ = view.step(chosen)
        earned += abs(float(step.reward[0]))
        assert set(reward.values()) == {float(step.reward[0])}
        assert not any(over.values())
        assert set(late.values()) == {bool(step.truncated[0])}
    assert earned > 0
