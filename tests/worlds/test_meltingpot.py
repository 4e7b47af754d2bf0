"""envs/meltingpot/worlds.py on the real engine: what it reads, how worlds end and begin again, what
happens when processes die, and how it gets along without Melting Pot's dependencies.

The engine is not reproducible, so readings are compared with the official wrapper's of the same
engine at the same step.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import envs.meltingpot.worlds as ours
from envs.meltingpot.tiles import Observation, Palette, WorldError, ids_to_images
from envs.meltingpot.worlds import Engine, MeltingPot, get_spec, import_meltingpot, quiet

import_meltingpot()

import dmlab2d  # noqa: E402
from meltingpot import scenario, substrate  # noqa: E402
from meltingpot.configs import substrates as configs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHICKEN = "chicken_in_the_matrix__repeated"
PAPER = {  # the paper's five substrates: players, actions, view, global view, features
    "pure_coordination_in_the_matrix__repeated": (2, 8, (5, 5), (15, 23), 4),
    "coop_mining": (6, 8, (11, 11), (27, 27), 1),
    CHICKEN: (2, 8, (5, 5), (15, 23), 3),
    "coins": (2, 7, (11, 11), (17, 17), 0),
    "prisoners_dilemma_in_the_matrix__arena": (8, 8, (11, 11), (24, 25), 3),
}
SLOWEST = ("coop_mining", "prisoners_dilemma_in_the_matrix__arena")
PAPERS = [pytest.param(name, marks=[pytest.mark.long] * (name in SLOWEST)) for name in PAPER]


def blank(spec):
    """Memory for what the players of one world see."""
    return Observation(
        np.zeros((spec.num_agents, *spec.grid), np.uint16),
        np.zeros(spec.world_grid, np.uint16),
        np.full((spec.num_agents, spec.num_features), -1, np.float32),
    )


def draw(rng, envs):
    """Random actions (B, N)."""
    return rng.integers(0, envs.spec.num_actions, (envs.num_envs, envs.spec.num_agents))


def wait_for(condition, seconds=60.0, between=lambda: None):
    """Until condition() holds; called in between: `between`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        between()
        time.sleep(0.01)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def pids(envs):
    return [worker.process.pid for worker in envs.workers]


# --- The reading, against the official wrapper ---------------------------------------------------


class SameStep:
    """A Lab2d with two readers that both advance: the second gets what the first has got."""

    def __init__(self, lab):
        self.lab, self.status, self.vectors = lab, None, []

    def __getattr__(self, name):
        return getattr(self.lab, name)

    def act_discrete(self, vector):
        self.vectors.append(np.array(vector))
        if self.status is None:
            self.lab.act_discrete(vector)

    def advance(self):
        if self.status is None:
            self.status = self.lab.advance()
            return self.status
        status, self.status = self.status, None
        return status


class Both:
    """The official substrate and our Engine on the same Lab2d, and our palette."""

    def __init__(self, name, frames=None):
        config = substrate.get_config(name)
        if frames:  # episodes end there
            build = config.lab2d_settings_builder

            def settings(**kwargs):
                return {**build(**kwargs), "maxEpisodeLengthFrames": frames}

            with config.unlocked():
                config.lab2d_settings_builder = settings
        roles = config.default_player_roles
        self.spec, self.palette = get_spec(name), Palette.private()
        self.seen = blank(self.spec)  # goes on from step to step, as in a worker
        with quiet():
            self.official = substrate.build_from_config(config, roles=roles)

    def reset(self):
        with quiet():
            self.timestep = self.official.reset()
        env = self.official
        while type(env) is not dmlab2d.Environment:
            env = env._env
        self.lab = env._env = SameStep(env._env)
        self.engine = Engine.__new__(Engine)
        self.engine.attach(self.spec, self.lab)

    def step(self, actions, official_first):
        if official_first:
            self.timestep = self.official.step(actions.tolist())
        goes_on = self.engine.step(actions)
        if not official_first:
            self.timestep = self.official.step(actions.tolist())
        return goes_on

    def compare_observations(self):
        views = self.timestep.observation
        self.engine.observe(self.palette, self.seen)
        images = ids_to_images(self.seen.tile_ids, self.palette.pixels())
        world = ids_to_images(self.seen.world_ids, self.palette.pixels())
        for i, view in enumerate(views):
            assert np.array_equal(images[i], view["RGB"]), f"player {i}'s RGB differs"
            assert np.array_equal(world, view["WORLD.RGB"]), "WORLD.RGB differs"
            column = 0
            for name, length in self.spec.features:
                expected = np.zeros(length) if name not in view else np.ravel(view[name])
                mine = self.seen.features[i, column : column + length]
                assert np.array_equal(mine, expected.astype(np.float32)), (i, name)
                column += length
            assert column == self.seen.features.shape[1]


def count_pick_ups(before, after):
    """Each player's pick-ups in a step of the paper's substrates, from rewards and observations."""
    counts = []
    for then, now, reward in zip(before.observation, after.observation, after.reward):
        if "INVENTORY" in now:  # matrix games: resources; a lost encounter empties it
            counts.append(max(0, int(now["INVENTORY"].sum() - then["INVENTORY"].sum())))
        elif "MISMATCHED_COIN_COLLECTED_BY_PARTNER" in now:  # coins: 1 each, 2 lost to a mismatch
            counts.append(int(reward + 2 * now["MISMATCHED_COIN_COLLECTED_BY_PARTNER"]))
        else:  # coop_mining: only ore pays
            counts.append(int(reward > 0))
    return counts


@pytest.mark.parametrize("name", PAPERS)
def test_reading_equals_the_official_wrappers_at_the_same_step(name):
    frames = 280  # before any of the five can end by itself
    both, rng = Both(name, frames), np.random.default_rng(0)
    spec = both.spec
    weights = np.ones(spec.num_actions)
    weights[1] = weights[-1] = 3  # forward and interact, so that more happens
    picked = earned = ends = 0
    both.reset()
    both.compare_observations()
    for t in range(3_000):
        if t >= frames + 50 and picked > 0:  # most find something early
            break
        before = both.timestep
        actions = rng.choice(spec.num_actions, spec.num_agents, p=weights / weights.sum())
        goes_on = both.step(actions, official_first=t % 2 == 0)
        # The one vector has moved the engine in even steps, the other in odd ones.
        one, other = both.lab.vectors[-2:]
        assert np.array_equal(one, other) and one.dtype == other.dtype == np.int32, (one, other)
        both.compare_observations()
        reward, pick_ups = np.zeros(spec.num_agents), np.full(spec.num_agents, -1)
        both.engine.read_rewards(reward, pick_ups)
        assert reward.tolist() == [float(r) for r in both.timestep.reward], f"step {t}"
        assert pick_ups.tolist() == count_pick_ups(before, both.timestep), f"step {t}"
        events = [kind for kind, _ in both.official.events() if kind in ours.PICK_UPS]
        assert len(events) == pick_ups.sum(), f"step {t}: {events}"
        picked, earned = picked + pick_ups.sum(), earned + np.abs(reward).sum()
        assert goes_on == (not both.timestep.last()), f"step {t}: only one of us says it is over"
        if not goes_on:
            ends += 1
            assert t + 1 == ends * frames
            both.reset()
            both.compare_observations()
    assert ends >= 1 and picked > 0, (ends, picked)
    if name in ("coins", "coop_mining"):
        assert earned > 0, "no reward was ever seen"
    both.official.close()


@pytest.mark.parametrize("name", PAPER)
def test_spec_says_what_the_official_configuration_says(name):
    spec, config = get_spec(name), substrate.get_config(name)
    sizes = (spec.num_agents, spec.num_actions, spec.grid, spec.world_grid, spec.num_features)
    assert sizes == PAPER[name]
    assert [dict(action) for action in config.action_set] == list(spec.actions)
    assert spec.roles == tuple(config.default_player_roles)
    assert spec.is_focal == (True,) * spec.num_agents
    names = {name for name, _ in spec.features}
    seen = set(config.individual_observation_names) & scenario.PERMITTED_OBSERVATIONS
    assert names == seen - {"RGB", "COLLECTIVE_REWARD"}


# --- Many worlds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_shapes_and_types(name):
    rng = np.random.default_rng(0)
    players, _, grid, world_grid, features = PAPER[name]
    worlds = 1 if name == "coop_mining" else 3  # coop_mining takes long to build
    workers = 2 if name == "coins" else 1
    shapes = ((worlds, players, *grid), (worlds, *world_grid), (worlds, players, features))
    with MeltingPot(name, worlds, num_workers=workers, standby=False) as envs:
        obs = envs.reset()
        assert len(set(envs.place)) == len(pids(envs)) == workers
        first = Observation(*(x.copy() for x in obs))
        for _ in range(12):
            step = envs.step(draw(rng, envs))
            for array, shape, kind in zip(step.obs, shapes, (np.uint16, np.uint16, np.float32)):
                assert array.shape == shape and array.dtype == kind
            assert step.reward.shape == (worlds, players) and step.reward.dtype == np.float64
            assert step.terminated.shape == step.truncated.shape == (worlds,)
            assert step.terminated.dtype == step.truncated.dtype == bool
            assert step.final is None and step.episodes == []
        assert all(np.array_equal(a, b) for a, b in zip(obs, first)), "an old observation changed"
        assert not np.array_equal(obs.tile_ids, step.obs.tile_ids), "nothing ever moves"
        top = max(step.obs.tile_ids.max(), step.obs.world_ids.max())
        assert 0 < top < len(envs.palette)
        images = envs.images(step.obs.tile_ids)
        assert images.shape == (worlds, players, 8 * grid[0], 8 * grid[1], 3)
        assert envs.images(step.obs.world_ids).shape[1:3] == tuple(8 * n for n in world_grid)


def look(image):
    """What a seed decides of a world of coins: its height and width, and its colours."""
    lit = image.any(-1)
    colours = np.unique(image.reshape(-1, 3), axis=0).tolist()
    return int(lit.any(1).sum()), int(lit.any(0).sum()), frozenset(map(tuple, colours))


def expected_look(*seed):
    """Of an engine built here from (seed, world, episode)."""
    return look(Engine(get_spec("coins"), seed).lab.observation("WORLD.RGB"))


def looks(envs, obs):
    return [look(image) for image in envs.images(obs.world_ids)]


def test_where_a_world_ends_final_is_its_last_observation_and_obs_the_next_first():
    rng = np.random.default_rng(1)
    with MeltingPot("coins", 3, seed=4, num_workers=2, max_episode_steps=20) as envs:
        begin = looks(envs, envs.reset())
        assert begin == [expected_look(4, b, 0) for b in range(3)]
        for episode in range(1, 3):
            for t in range(20):
                step = envs.step(draw(rng, envs))
                assert not step.terminated.any()
                assert step.truncated.tolist() == [t == 19] * 3, f"step {t}"
                assert (step.final is not None) == (t == 19)
                assert [e.length for e in step.episodes] == [20] * (3 * (t == 19))
            old, begin = begin, looks(envs, step.obs)
            sizes, next_sizes = ([size for *size, _ in which] for which in (old, begin))
            assert [size for *size, _ in looks(envs, step.final)] == sizes != next_sizes
            assert begin == [expected_look(4, b, episode) for b in range(3)]


def test_final_and_first_observations_are_those_of_the_engines():
    """A worker's half of the work, in this process: what it writes, tile by tile, is what its
    engines show when episodes end and begin."""
    spec = get_spec(CHICKEN)
    arrays = ours.SharedArrays(spec, 2)
    new_engine = ours.PlainEngines(spec)
    host = ours.Host(
        new_engine, spec, num_envs=2, seed=1, first_world=0, max_steps=15, fd=arrays.fd
    )

    def tell(letter, world=0, episode=0):
        host.handle(letter + np.array([world, episode], np.int32).tobytes())

    def check(world, engine, final):
        seen, pixels = arrays.observation(world, final), host.palette.pixels()
        for i in range(2):
            image = engine.lab.observation(f"{i + 1}.RGB")
            assert np.array_equal(ids_to_images(seen.tile_ids[i], pixels), image)
        assert np.array_equal(
            ids_to_images(seen.world_ids, pixels), engine.lab.observation("WORLD.RGB")
        )

    rng = np.random.default_rng(2)
    for world in range(2):
        tell(b"B", world), tell(b"G", world)
    for episode in range(1, 3):
        for world in range(2):
            tell(b"B", world, episode)
        old, new = dict(host.serving), dict(host.ready)
        for t in range(15):
            for world in range(2):
                check(world, old[world], final=False)
            arrays.actions[:] = rng.integers(0, 8, (2, 2))
            tell(b"S")
            assert (arrays.ended == (ours.TRUNCATED if t == 14 else ours.RUNNING)).all()
        for world in range(2):
            check(world, old[world], final=True)
            tell(b"G", world)
            check(world, old[world], final=True)
            check(world, new[world], final=False)
    arrays.close()


def test_natural_ends_terminate_and_returns_are_summed_rewards():
    """Coins end after about 300 steps or more, at a random moment."""
    rng, worlds = np.random.default_rng(3), 4
    returns, steps = np.zeros((worlds, 2)), np.zeros(worlds, int)
    ended = []
    with MeltingPot("coins", worlds, num_workers=2) as envs:
        envs.reset()
        while len(ended) < 2:
            step = envs.step(draw(rng, envs))
            returns, steps = returns + step.reward, steps + 1
            assert not step.truncated.any()
            assert [e.world for e in step.episodes] == np.flatnonzero(step.terminated).tolist()
            for episode in step.episodes:
                b = episode.world
                assert episode.length == steps[b] >= 299
                assert np.array_equal(episode.returns, returns[b]) and returns[b].any()
                # Whoever picks up gets 1; a mismatch costs the other player 2.
                assert (episode.pick_ups >= episode.returns).all() and episode.pick_ups.sum() > 0
                mismatches = episode.pick_ups.sum() - episode.returns.sum()
                assert mismatches % 2 == 0 and 0 <= mismatches <= 2 * episode.pick_ups.sum()
                returns[b], steps[b] = 0, 0
                ended.append(episode.length)
    # As the substrate's StochasticIntervalEpisodeEnding has it, which counts frames from 1.
    assert all((length + 1) % 100 == 0 for length in ended), f"not the engine's own ends: {ended}"


@pytest.mark.long
def test_reset_in_mid_episode():
    rng = np.random.default_rng(4)

    def play(steps):
        return [len(envs.step(draw(rng, envs)).episodes) for _ in range(steps)]

    with MeltingPot("coins", 2, seed=9, num_workers=1, max_episode_steps=10) as envs:
        assert looks(envs, envs.reset()) == [expected_look(9, b, 0) for b in range(2)]
        assert sum(play(4)) == 0
        # The next episodes are not built yet.
        assert looks(envs, envs.reset()) == [expected_look(9, b, 1) for b in range(2)]
        assert play(10) == [0] * 9 + [2], "the episode counter has not been reset"
        # They are.
        built = lambda: all(w and w.reserved.get(b) for b, w in enumerate(envs.next))  # noqa: E731
        wait_for(built, between=envs.check)
        play(3)
        assert looks(envs, envs.reset()) == [expected_look(9, b, 3) for b in range(2)]
        # One is, the other is being built.
        wait_for(lambda: any(w.reserved.get(b) for b, w in enumerate(envs.next)), 60, envs.check)
        assert looks(envs, envs.reset()) == [expected_look(9, b, 4) for b in range(2)]
        assert looks(envs, envs.reset()) == [expected_look(9, b, 5) for b in range(2)]
        assert play(20) == ([0] * 9 + [2]) * 2
        assert len(envs.workers) == 1 and len(pids(envs)) == 1


@pytest.mark.long
def test_seed_world_and_episode_decide_colours_and_maps():
    """Whatever the number of workers, and whether episodes are built ahead of time or not."""

    def watch(worlds, seed, first_world=0, workers=1, learn=False):
        rng, seen = np.random.default_rng(), []
        with MeltingPot(
            "coins", worlds, seed, first_world, num_workers=workers, max_episode_steps=2
        ) as envs:
            seen.append(looks(envs, envs.reset()))
            while len(seen) < 3:
                step = envs.step(draw(rng, envs))
                for _ in range(20 * learn):
                    envs.check()
                    time.sleep(0.01)
                if step.episodes:
                    seen.append(looks(envs, step.obs))
        return list(zip(*seen))  # [world][episode]

    a = watch(2, seed=5)
    assert watch(2, seed=5, workers=2, learn=True) == a
    assert watch(1, seed=5, first_world=1) == a[1:]
    everything = {x for world in a for x in world}
    assert len(everything) == 6, "two worlds or episodes look alike"
    assert expected_look(6, 0, 0) not in everything, "another seed, the same world"


SCENARIOS = {  # focal players / background, from the papers' tables
    "pure_coordination_in_the_matrix__repeated": ["1/1"] * 5,
    "coop_mining": ["1/5", "1/5", "1/5", "5/1", "5/1"],
    CHICKEN: ["1/1"] * 5,
    "coins": ["1/1"] * 5,
    "prisoners_dilemma_in_the_matrix__arena": ["1/7", "7/1", "6/2", "1/7", "1/7"],
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_gives_its_roles_and_focal_seats(name):
    for i, expected in enumerate(SCENARIOS[name]):
        spec, config = get_spec(f"{name}_{i}"), scenario.get_config(f"{name}_{i}")
        focal = sum(spec.is_focal)
        assert f"{focal}/{spec.num_agents - focal}" == expected, i
        assert spec.is_focal == tuple(config.is_focal) and spec.roles == tuple(config.roles)
        assert spec.substrate == name


def test_a_scenario_can_be_played():
    rng = np.random.default_rng(5)
    with MeltingPot(f"{CHICKEN}_1", 1) as envs:
        envs.reset()
        assert sorted(envs.spec.is_focal) == [False, True]
        assert envs.step(draw(rng, envs)).reward.shape == (1, 2)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("coin", "coins"),
        ("chicken_in_the_matrix", CHICKEN),
        ("coop_minning", "coop_mining"),
        ("toys", "toy"),
        ("xyz", "docs/meltingpot.md"),
        ("", "docs/meltingpot.md"),
    ],
)
def test_an_unknown_substrate_is_one_sentence_with_near_names(wrong, near):
    with pytest.raises(ValueError, match=r"^Unknown substrate ") as caught:
        MeltingPot(wrong, 1)
    assert near in str(caught.value) and f"'{wrong}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_state_is_saved_and_taken_up_again(tmp_path):
    """Ids keep their meaning; episodes go on being new ones."""
    rng = np.random.default_rng(6)

    def play(envs, first):
        views, seen = [], [looks(envs, first)]
        while len(seen) < 3:
            step = envs.step(draw(rng, envs))
            views.append((step.obs.tile_ids, envs.images(step.obs.tile_ids)))
            if step.episodes:
                seen.append(looks(envs, step.obs))
        return views, {x for episode in seen for x in episode}

    def worlds():
        return MeltingPot("coins", 2, seed=3, num_workers=1, max_episode_steps=15)

    with worlds() as envs:
        old_views, old_looks = play(envs, envs.reset())
        torch.save(envs.state_dict(), tmp_path / "state.pt")
        pixels = envs.palette.pixels()
        built = envs.episode.copy()
    assert (built >= 3).all()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with worlds() as envs:
        first = envs.load_state_dict(state)
        assert looks(envs, first) == [expected_look(3, b, built[b]) for b in range(2)]
        new_views, new_looks = play(envs, first)
        assert not old_looks & new_looks, "an episode has been repeated"
        assert np.array_equal(envs.palette.pixels()[: len(pixels)], pixels)
        assert len(envs.palette) > len(pixels), "no new sprites: this test shows nothing"
        for ids, images in old_views + new_views:
            assert np.array_equal(envs.images(ids), images), "an id has changed its meaning"
        # Sprites that both have met have one number: no sprite is there twice.
        flat = envs.palette.pixels().reshape(len(envs.palette), -1)
        assert len(np.unique(flat, axis=0)) == len(flat)


# --- No world waits for another ------------------------------------------------------------------


@pytest.mark.long
def test_short_builds_are_done_while_the_trainer_learns():
    """With check(), switching four worlds costs far less than one build; without, four of them."""
    rng = np.random.default_rng(7)
    with MeltingPot("coins", 4, num_workers=1, max_episode_steps=5) as envs:
        envs.reset()
        first = envs.fastest_build

        def cost():
            before = envs.waited_s
            steps = [envs.step(draw(rng, envs)) for _ in range(5)]
            assert len(steps[-1].episodes) == 4
            return envs.waited_s - before

        assert cost() > 2 * first, "builds cost nothing: this test shows nothing"
        costs = []
        for _ in range(3):  # the best of three: the machine may be busy
            wait_for(
                lambda: all(w and w.reserved.get(b) for b, w in enumerate(envs.next)),
                between=envs.check,
            )
            costs.append(cost())
        assert min(costs) < 0.3 * envs.fastest_build, (costs, envs.fastest_build)
        assert len(envs.workers) == 1, "a standby process for a short build"


@pytest.mark.long
def test_long_builds_are_done_by_standby_processes():
    rng = np.random.default_rng(8)
    with MeltingPot("coop_mining", 1, max_episode_steps=150) as envs:
        envs.reset()
        serving, build = envs.place[0], envs.fastest_build
        assert build > ours.SHORT_BUILD, f"a build of {build:.2f} s is not a long one"
        durations = []
        while not (envs.next[0] and envs.next[0].reserved.get(0)):
            began = time.monotonic()
            assert not envs.step(draw(rng, envs)).episodes, "over before the next one is built"
            durations.append(time.monotonic() - began)
            time.sleep(build / 10)  # what a network might take
            envs.check()
        # Steps went on while the next episode was being built.
        assert np.median(durations) < 0.1 * build, (durations, build)
        standby = envs.next[0]
        assert standby is not serving and standby.process.pid != serving.process.pid
        assert len(envs.workers) == 2
        before = envs.waited_s
        while not envs.step(draw(rng, envs)).episodes:
            assert envs.place[0] is serving
        assert envs.waited_s - before < 0.3 * build, "the world has waited for a build"
        assert envs.place[0] is standby and standby.serving == {0} and not serving.serving
        ids = envs.step(draw(rng, envs)).obs.world_ids  # from another process, the same palette
        assert 0 < ids.max() < len(envs.palette)
        # The process that has stepped it so far builds now.
        wait_for(lambda: envs.next[0] is serving and serving.reserved.get(0), 60, envs.check)
        assert len(envs.workers) == 2


@pytest.mark.long
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_switching_to_and_fro_loses_no_world_and_no_episode(threshold, monkeypatch):
    """Many short episodes, with and without time to learn in between, with standby processes
    (threshold 0) and without: every world plays its episodes in order and is in one place."""
    monkeypatch.setattr(ours, "SHORT_BUILD", threshold)
    rng, worlds = np.random.default_rng(15), 4
    begun = []
    with MeltingPot(CHICKEN, worlds, num_workers=2, max_episode_steps=4) as envs:
        build = envs._build
        monkeypatch.setattr(envs, "_build", lambda w, b: (begun.append(b), build(w, b)))
        envs.reset()
        ended = np.zeros(worlds, int)
        for t in range(28):
            step = envs.step(draw(rng, envs))
            for episode in step.episodes:
                ended[episode.world] += 1
                assert episode.length == 4
            if t == 13:  # in mid-episode
                envs.reset()
                ended += 1
            while rng.random() < 0.5:
                time.sleep(rng.random() / 20)
                envs.check()
            for b in range(worlds):
                places = [w for w in envs.workers if b in w.serving]
                assert places == [envs.place[b]], f"world {b} is served in {len(places)} places"
                holders = [w for w in envs.workers if b in w.reserved]
                assert holders == ([envs.next[b]] if envs.next[b] else [])
            assert len(envs.workers) <= worlds + envs.num_workers
            built = np.bincount(begun, minlength=worlds)
            assert (built == envs.episode).all()
            # Of each world: the episodes that are over, the present one, perhaps the next one.
            assert set((built - ended).tolist()) <= {1, 2}, (built, ended)
        assert (ended == 12 // 4 + 1 + 14 // 4).all(), ended
        assert (len(envs.workers) > 2) == (threshold == 0)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_an_episode_built_unnoticed_is_not_built_twice(threshold, monkeypatch):
    """A build that ends between two looks at the worker: twice would skip an episode, and make a
    run depend on the machine's load."""
    monkeypatch.setattr(ours, "SHORT_BUILD", threshold)
    with MeltingPot(CHICKEN, 1, max_episode_steps=50) as envs:
        envs.reset()
        wait_for(lambda: envs.next[0] and 0 in envs.next[0].building(), 60, envs.check)
        wait_for(lambda: envs.next[0].connection.poll(0), 60)  # answered, not yet read
        envs._plan(learning=True)
        assert envs.next[0].reserved[0] and envs.episode.tolist() == [2]


# --- Processes that die or hang ------------------------------------------------------------------


def last_words(envs, use, seconds):
    """The WorldError that `use` ends with within so many seconds, called over and over."""
    began = time.monotonic()
    with pytest.raises(WorldError) as caught:
        while time.monotonic() < began + seconds + 20:
            use()
            time.sleep(0.01)
    took = time.monotonic() - began
    assert took < seconds, f"it took {took:.1f} s to say: {caught.value}"
    return str(caught.value), took


def close_and_look_for_orphans(envs):
    processes = pids(envs)
    began = time.monotonic()
    envs.close()
    assert time.monotonic() - began < 5, "close() takes long"
    assert processes and not any(map(is_alive, processes)), "a process is left behind"
    envs.close()  # again does no harm


@pytest.mark.parametrize(
    "what, found_by",
    [
        ("SIGKILL", "step"),
        ("SIGKILL", "check"),
        pytest.param("SIGSTOP", "step", marks=pytest.mark.long),
    ],
)
def test_a_serving_worker_that_dies_or_hangs(what, found_by):
    """Ends the run within ten seconds with a sentence that names it, with the default time-out;
    one that hangs when it is waited for (tests/worlds/test_workers.py has more of this)."""
    rng = np.random.default_rng(9)
    with MeltingPot(CHICKEN, 3, num_workers=2) as envs:
        envs.reset()
        envs.step(draw(rng, envs))
        victim = envs.workers[1]
        os.kill(victim.process.pid, getattr(signal, what))
        use = envs.check if found_by == "check" else lambda: envs.step(draw(rng, envs))
        sentence, took = last_words(envs, use, 10.0 if what == "SIGSTOP" else 5.0)
        name = rf"Melting Pot worker 1 \(process {victim.process.pid}, {CHICKEN}, worlds: 2\)"
        ending = "was killed by SIGKILL" if what == "SIGKILL" else "gave no sign for 8 s"
        assert re.fullmatch(rf"{name} {ending}\.", sentence), sentence
        assert what == "SIGKILL" or took >= 7.5, "a slow worker is not a dead one"
        close_and_look_for_orphans(envs)


@pytest.mark.long
def test_a_standby_worker_that_hangs_and_dies(capfd):
    """Ends nothing: steps go on past the time-out; once it is dead another process takes over."""
    rng = np.random.default_rng(10)
    with MeltingPot("coop_mining", 1, num_workers=1, timeout=1.0, max_episode_steps=60) as envs:
        envs.reset()
        wait_for(lambda: envs.next[0] and envs.next[0].building(), between=envs.check)
        victim = envs.next[0]
        os.kill(victim.process.pid, signal.SIGSTOP)
        for _ in range(40):
            envs.step(draw(rng, envs))
            envs.check()
            time.sleep(0.05)
        assert envs.next[0] is victim
        os.kill(victim.process.pid, signal.SIGKILL)
        wait_for(lambda: victim not in envs.workers, between=envs.check)
        number, pid = victim.number, victim.process.pid
        sentence = f"Melting Pot worker {number} (process {pid}, coop_mining, worlds: none) was "
        assert f"{sentence}killed by SIGKILL. It is replaced.\n" in capfd.readouterr().err
        wait_for(lambda: envs.next[0] and envs.next[0].reserved.get(0), 120, envs.check)
        assert envs.episode.tolist() == [2], "its episode has not been built anew"
        standby = envs.next[0]
        while not envs.step(draw(rng, envs)).episodes:
            pass
        assert envs.place[0] is standby
        close_and_look_for_orphans(envs)


def test_a_worker_that_fails_says_why():
    """An exception in a worker, here of an action that does not exist, is one sentence."""
    with MeltingPot(CHICKEN, 1) as envs:
        envs.reset()
        with pytest.raises(WorldError, match=r"^Melting Pot worker 0 .* failed with IndexError: "):
            envs.step(np.full((1, 2), 99))
        close_and_look_for_orphans(envs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_ignore_what_stops_the_trainer(number):
    """The terminal sends it to them, too; the trainer then saves, for which it may step on."""
    rng = np.random.default_rng(11)
    with MeltingPot(CHICKEN, 2, num_workers=2) as envs:
        envs.reset()
        for pid in pids(envs):
            os.kill(pid, number)
        for _ in range(20):
            envs.step(draw(rng, envs))
        assert all(map(is_alive, pids(envs)))


TRAINER = """
import sys, time
import numpy as np
from envs.meltingpot.worlds import MeltingPot, WorldError
envs = MeltingPot("chicken_in_the_matrix__repeated", 2, num_workers=2, timeout=float(sys.argv[1]))
envs.reset()
print(*(worker.process.pid for worker in envs.workers), flush=True)
while True:
    for _ in range(20):
        envs.step(np.zeros((2, 2), int))
    print("stepped", flush=True)
"""


@contextlib.contextmanager
def trainer(tmp_path, timeout):
    """A trainer in a process group of its own, and its workers' process ids."""
    (tmp_path / "script.py").write_text(TRAINER)
    # The working directory may have packages of the same name.
    (tmp_path / "cwd" / "envs").mkdir(parents=True)
    (tmp_path / "cwd" / "envs" / "__init__.py").write_text("raise SystemExit('the wrong envs')")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", str(timeout)],
        cwd=tmp_path / "cwd",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    workers = []
    try:
        workers += map(int, process.stdout.readline().split())
        assert len(workers) >= 2, process.communicate()[1]
        yield process, workers
    finally:
        process.kill()
        process.communicate()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_workers_end_when_the_trainer_is_killed(tmp_path):
    with trainer(tmp_path, 8) as (process, workers):
        assert all(map(is_alive, workers))
        process.kill()
        wait_for(lambda: not any(map(is_alive, workers)), 10)


@pytest.mark.long
def test_ctrl_z_does_not_end_the_run(tmp_path):
    """The terminal stops trainer and workers; when they go on, nobody has been silent for long."""
    with trainer(tmp_path, 2) as (process, _):
        for steps in (10, 10, 100):
            for _ in range(steps):
                line = process.stdout.readline()
                assert line == "stepped\n", process.stderr.read()
            if steps == 10:
                os.killpg(process.pid, signal.SIGSTOP)
                time.sleep(2.5)
                os.killpg(process.pid, signal.SIGCONT)


# --- Without tensorflow, chex, or Melting Pot ----------------------------------------------------


def python(code, *flags, path=ROOT):
    """(exit code, output, error output) of a new Python process in the repository."""
    command = [sys.executable, *flags, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def without(tmp_path, *packages):
    """A path with everything that is installed here but these packages; use it with -S."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(packages):
            (folder / entry.name).symlink_to(entry)
    return os.pathsep.join((str(ROOT), str(folder)))


def test_placeholders_leave_no_trace_and_say_what_to_install(tmp_path):
    code = """if True:
        import importlib.util, sys
        from envs.meltingpot.worlds import Engine, get_spec, import_meltingpot
        import_meltingpot()
        print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "chex")])
        from meltingpot.utils.policies import saved_model_policy
        from meltingpot.utils.substrates import substrate
        tf, chex = saved_model_policy.tf, substrate.chex
        for use in (lambda: tf.saved_model, lambda: chex.Array):
            try:
                use()
            except ModuleNotFoundError as error:
                print(error)
        print(importlib.util.find_spec("tensorflow"), importlib.util.find_spec("chex"))
        print(Engine(get_spec("chicken_in_the_matrix__repeated"), (1,)).step([0, 0]))
    """.replace("step([0, 0])", "step(__import__('numpy').zeros(2, int))")
    path = without(tmp_path, "tensorflow", "chex")
    code, output, error = python(code, "-S", path=path)
    assert code == 0, error
    left, tf, chex, specs, stepped = output.splitlines()
    assert left == "[]", f"placeholders are left in sys.modules: {left}"
    assert tf.startswith("tensorflow.saved_model: tensorflow is needed by the official bots only")
    assert chex.startswith("chex.Array: chex is needed by the official bots only")
    assert "pip install -r requirements-bots.txt" in tf and "requirements-bots.txt" in chex
    assert (specs, stepped) == ("None None", "True")


def test_modules_that_were_there_before_are_there_afterwards():
    code = """if True:
        import sys, types
        sys.modules["tensorflow"] = real = types.ModuleType("tensorflow")
        from envs.meltingpot.worlds import import_meltingpot
        import_meltingpot()
        print(sys.modules["tensorflow"] is real, "chex" in sys.modules)
    """
    assert python(code)[:2] == (0, "True False\n")


def test_asking_for_official_bots_without_tensorflow_is_one_sentence(tmp_path):
    code = "from envs.meltingpot.worlds import import_meltingpot; import_meltingpot(bots=True)"
    code, _, error = python(code, "-S", path=without(tmp_path, "tensorflow", "chex"))
    last = error.strip().splitlines()[-1]
    assert code == 1 and last.startswith("ModuleNotFoundError: tensorflow is needed by"), error
    assert last.endswith("pip install -r requirements-bots.txt")


@pytest.mark.long
def test_without_melting_pot_the_toy_runs_and_substrates_are_one_sentence(tmp_path):
    path = without(tmp_path, "meltingpot", "dm_meltingpot", "dmlab2d")
    code = f"""if True:
        import contextlib, io, sys
        from bidist_mappo_meltingpot import main
        short = "--num-envs 2 --rollout-steps 10 --minibatches 2 --total-timesteps 40"
        short = [*short.split(), "--final-episodes", "2", "--k-d", "1"]
        toy = main(["--substrate", "toy", *short, "--run-dir", {str(tmp_path / "toy")!r}])
        with contextlib.redirect_stderr(io.StringIO()) as words:
            real = main(["--substrate", "coins", *short, "--run-dir", {str(tmp_path / "real")!r}])
        print("\\n" + repr((toy, real, words.getvalue())))
    """
    code, output, error = python(code, "-S", path=path)
    assert code == 0, error
    toy, real, words = eval(output.splitlines()[-1])
    assert toy == 0 and (tmp_path / "toy" / "summary.json").exists()
    assert real == 2 and len(words.strip().splitlines()) == 1, words
    assert "meltingpot is not installed" in words and "--substrate toy" in words


# --- Every substrate -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_substrates_build_and_step(capsys):
    """Prints a table for docs/meltingpot.md."""
    names = ours.substrates()
    assert names == sorted(configs.SUBSTRATES) and len(names) == 49
    rng, wrong = np.random.default_rng(13), []
    with capsys.disabled():
        print("\n| substrate | N | A | view | global | features | build (s) | sprites | steps/s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name in names:
            try:
                with MeltingPot(name, num_envs=1, standby=False) as envs:
                    spec, obs = envs.spec, envs.reset()
                    began = time.monotonic()
                    for _ in range(300):
                        obs = envs.step(draw(rng, envs)).obs
                    speed = 300 / (time.monotonic() - began)
                    assert obs.tile_ids.shape == (1, spec.num_agents, *spec.grid)
                    assert 0 < obs.world_ids.max() < len(envs.palette) < 2**16
                    build, sprites = envs.fastest_build, len(envs.palette)
                view, world = ("x".join(map(str, size)) for size in (spec.grid, spec.world_grid))
                print(
                    f"| {name} | {spec.num_agents} | {spec.num_actions} | {view} | {world} "
                    f"| {spec.num_features} | {build:.2f} | {sprites} | {speed:.0f} |",
                    flush=True,
                )
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_substrates_read_as_the_official_wrapper_reads_them():
    """Also that discrete actions are all that the engine takes, and that sizes are the Spec's."""
    rng, wrong = np.random.default_rng(14), []
    for name in ours.substrates():
        try:
            both = Both(name)
            both.reset()
            spec = both.spec
            assert not both.lab.action_continuous_names() and not both.lab.action_text_names()
            view = both.timestep.observation[0]
            assert view["RGB"].shape == tuple(8 * n for n in spec.grid) + (3,)
            assert view["WORLD.RGB"].shape == tuple(8 * n for n in spec.world_grid) + (3,)
            reward, pick_ups = np.zeros(spec.num_agents), np.zeros(spec.num_agents, int)
            both.compare_observations()
            for t in range(20):
                both.step(rng.integers(0, spec.num_actions, spec.num_agents), t % 2 == 0)
                assert np.array_equal(*both.lab.vectors[-2:])
                both.compare_observations()
                both.engine.read_rewards(reward, pick_ups)
                assert reward.tolist() == [float(r) for r in both.timestep.reward]
            both.official.close()
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
