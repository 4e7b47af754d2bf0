"""The toy world: its rules, its optimum, its state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from envs.meltingpot.toy import MAX_LENGTH, MIN_LENGTH, OPTIMUM, TileGame


def test_rules():
    envs, rng = TileGame(6, seed=3), np.random.default_rng(0)
    obs, time = envs.reset(), np.zeros(6, int)
    colour = obs.world_ids[:, 0, 0].astype(int)  # the global view always shows it
    seen, lengths = set(), []
    for _ in range(300):
        shown = obs.tile_ids[:, :, 0, 0]
        assert (shown == np.where(time % 2 == 0, colour, 0)[:, None]).all(), "every second step"
        assert np.allclose(obs.features[..., 0], time[:, None] / MAX_LENGTH)
        actions = rng.integers(0, 3, (6, 2))
        step = envs.step(actions)
        for b in range(6):
            right = actions[b] + 1 == colour[b]
            for player in range(2):
                expected = 0.5 * right[player] + 0.5 * (right[0] and right[1])
                assert step.reward[b, player] == expected
        time += 1
        for b in np.flatnonzero(step.terminated):
            assert MIN_LENGTH <= time[b] <= MAX_LENGTH
            seen.add(int(colour[b]))
            lengths.append(int(time[b]))
            assert step.final.tile_ids[b, 0, 2, 1] == actions[b, 0] + 1, "the ended episode's view"
        time[step.terminated] = 0
        colour = step.obs.world_ids[:, 0, 0].astype(int)
        obs = step.obs
        last = np.where(step.terminated[:, None], 0, actions + 1)
        assert (obs.tile_ids[:, 0, 2, 1] == last[:, 0]).all()
        assert (obs.tile_ids[:, 0, 2, 3] == last[:, 1]).all()
        assert (obs.tile_ids[:, 1, 2, 1] == last[:, 1]).all(), "each sees itself first"
    assert seen == {1, 2, 3} and set(lengths) == set(range(MIN_LENGTH, MAX_LENGTH + 1))


def test_optimum_and_random_play():
    for knows, expected in ((True, OPTIMUM), (False, 2 / 9)):
        envs, rng, total = TileGame(32), np.random.default_rng(0), []
        envs.reset()
        for _ in range(500):
            right = np.repeat(envs.colour[:, None] - 1, 2, 1)
            step = envs.step(right if knows else rng.integers(0, 3, (32, 2)))
            total.append(step.reward.mean())
        assert np.mean(total) == pytest.approx(expected, abs=0 if knows else 0.01)


def test_truncation_keeps_the_ended_episode_apart():
    envs = TileGame(3, max_episode_steps=4)
    envs.reset()
    for t in range(1, 13):
        step = envs.step(np.zeros((3, 2), int))
        assert (step.truncated == (t % 4 == 0)).all() and not step.terminated.any()
    assert [episode.length for episode in step.episodes] == [4, 4, 4]


def test_an_episode_counts_from_its_reset():
    """What was earned before reset() is no part of the next episode's length and returns."""
    envs = TileGame(4, seed=2)
    envs.reset()
    for _ in range(4):
        envs.step(np.zeros((4, 2), int))
    envs.reset()
    earned, steps, lengths = np.zeros((4, 2)), 0, {}
    while len(lengths) < 4:
        step, steps = envs.step(np.ones((4, 2), int)), steps + 1
        earned += step.reward
        for episode in step.episodes:
            if lengths.setdefault(episode.world, steps) == steps:
                assert episode.length == steps
                assert episode.returns.tolist() == earned[episode.world].tolist()
    assert earned.any()


def test_same_rollout_whatever_the_number_of_worlds():
    one, many = TileGame(1, seed=5, first_world=2), TileGame(4, seed=5)
    a, b = one.reset(), many.reset()
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert all((x[0] == y[2]).all() for x, y in zip(a, b))
        actions = rng.integers(0, 3, (4, 2))
        a, b = one.step(actions[2:3]).obs, many.step(actions).obs


def test_state_is_everything():
    envs, rng = TileGame(5, seed=1), np.random.default_rng(0)
    envs.reset()
    actions = rng.integers(0, 3, (60, 5, 2))
    for t in range(23):
        envs.step(actions[t])
    state = {name: x.clone() for name, x in envs.state_dict().items()}
    other = TileGame(5, seed=1)
    assert all((x == y).all() for x, y in zip(other.load_state_dict(state), envs.obs))
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    for t in range(23, 60):
        mine, theirs = envs.step(actions[t]), other.step(actions[t])
        assert (mine.reward == theirs.reward).all()
        assert all((x == y).all() for x, y in zip(mine.obs, theirs.obs))
        assert [e.returns.tolist() for e in mine.episodes] == [
            e.returns.tolist() for e in theirs.episodes
        ]
