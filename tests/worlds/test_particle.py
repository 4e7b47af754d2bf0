"""envs/particle/worlds.py against mpe2's physics, and against plain loops over agents written here
from docs/particle.md; its random numbers against SplitMix64 in NumPy."""

import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mpe2._mpe_utils.core import Agent, World
from particle_tools import EPC, MAAC, MADDPG, MRA, RL2, script, tiny

from envs.particle import worlds
from envs.particle.episodes import (
    EpisodeReturns,
    RewardScale,
    population_name,
    report_returns,
    scripted_players,
    summarise,
)
from envs.particle.worlds import (
    LONGEST,
    TASKS,
    Bodies,
    Clocks,
    ParticleWorld,
    draw,
    flee,
    fresh,
    make_game,
    mixed,
    move,
    nearest_first,
    pack,
    pushes,
    uniform,
    unpack,
)

ROOT = Path(__file__).resolve().parents[2]
GAMES = (
    ("treasure", 3),
    ("treasure", 12),
    ("resource", 6),
    ("resource", 15),
    ("pacman", (4, 2)),
    ("pacman", (2, 8)),
)
MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], float)


def crowded(game, worlds, seed, spread=0.4):
    """States in which many bodies touch, in float64; some Pac-Men are dead."""
    rng = np.random.default_rng(seed)
    N, L = game.num_agents, game.num_landmarks
    alive = np.ones((N, worlds), bool)
    if game.task == "pacman":
        alive[: game.population[0]] = rng.random((game.population[0], worlds)) < 0.7
    velocity = rng.normal(0, 1, (2, N, worlds)) * alive
    places = (
        rng.uniform(-spread, spread, (2, N, worlds)),
        rng.uniform(-spread, spread, (2, L, worlds)),
    )
    position, velocity, alive, landmarks = map(
        torch.from_numpy, (places[0], velocity, alive, places[1])
    )
    return Bodies(position, velocity, alive, landmarks)


# --- Physics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [3, 6, 12, 24])
def test_physics_is_mpe2s(N):
    game, worlds = make_game("treasure", N, integration="mpe2"), 50
    bodies, rng = crowded(game, worlds, N, 0.3), np.random.default_rng(N)
    actions = rng.integers(0, 5, (N, worlds))
    moved, pushed = move(game, bodies, torch.from_numpy(actions)), 0
    for b in range(worlds):
        world = World()
        world.dim_p = 2
        for i in range(N):
            agent = Agent()
            agent.size, agent.collide, agent.silent = 0.05, True, True
            agent.state.p_pos = bodies.position[:, i, b].numpy().copy()
            agent.state.p_vel = bodies.velocity[:, i, b].numpy().copy()
            agent.action.u = 5.0 * MOVES[actions[i, b]]
            world.agents.append(agent)
        free = [0.75 * a.state.p_vel + 0.1 * a.action.u for a in world.agents]
        world.step()
        for i, agent in enumerate(world.agents):
            assert np.abs(moved.position[:, i, b].numpy() - agent.state.p_pos).max() < 1e-9
            assert np.abs(moved.velocity[:, i, b].numpy() - agent.state.p_vel).max() < 1e-9
            pushed += np.abs(agent.state.p_vel - free[i]).max() > 1e-3
    assert pushed > N  # there were contacts


def plain_move(game, p, v, alive, actions):
    """One agent after the other; velocities first."""
    N, kinds = len(p), game.types
    force = np.array([game.force[kinds[i]] * MOVES[actions[i]] for i in range(N)])
    for i in range(N):
        for j in range(N):
            d = p[i] - p[j]
            far = math.hypot(*d)
            if i != j and far > 0 and alive[i] and alive[j]:
                gap = far - game.radius[kinds[i]] - game.radius[kinds[j]]
                force[i] += 100 * d / far * 1e-3 * np.logaddexp(0, -gap / 1e-3)
    new_p, new_v = p.copy(), v.copy()
    for i in range(N):
        new_v[i] = (0.75 * v[i] + 0.1 * force[i]) if alive[i] else 0.0
        speed, top = math.hypot(*new_v[i]), game.top_speed[kinds[i]]
        if speed > top:
            new_v[i] *= top / speed
        new_p[i] = p[i] + 0.1 * new_v[i]
        if game.walls:
            new_p[i] = np.clip(new_p[i], -1, 1)
    return new_p, new_v


def plain_rewards(game, p, landmarks, alive, shaping=True, penalty=0.0):
    """(rewards, who lives, which landmarks reappear), agent by agent."""
    N, L = len(p), len(landmarks)
    far = np.array([[math.dist(p[i], landmarks[k]) for k in range(L)] for i in range(N)])
    reward, lives, taken = np.zeros(N), alive.copy(), np.zeros(L, bool)
    if game.task == "treasure":
        for i in range(N):
            found = far[i] < 0.05 + 0.025
            taken |= found
            reward[i] = 5 * found.sum() - (0.1 * far[i].min() if shaping else 0)
            for j in range(N):
                reward[i] -= penalty * (i != j and math.dist(p[i], p[j]) < 0.1)
    elif game.task == "resource":
        for k in range(L):
            radius = 0.05 * (k + 1)
            on_it = [i for i in range(N) if far[i, k] < radius + 0.05]
            for i in on_it:
                reward[i] += 10 * radius / len(on_it)
    else:
        P = game.population[0]
        for i in range(P):
            if not alive[i]:
                continue
            eaten = far[i] < 0.05 + 0.03
            taken |= eaten
            reward[i] += 2 * eaten.sum() - (0.1 * far[i].min() if shaping else 0)
            for g in range(P, N):
                if math.dist(p[i], p[g]) < 0.125:
                    reward[i] -= 5
                    reward[g] += 5
                    lives[i] = False
        prey = [i for i in range(P) if alive[i]]
        for g in range(P, N):
            if shaping and prey:
                reward[g] -= 0.1 * min(math.dist(p[g], p[i]) for i in prey)
    return reward, lives, taken


def plain_observation(game, p, v, landmarks, alive):
    """(own, entities, mask) of one world."""
    N = len(p)
    radii = np.array(game.landmark_radius)

    def around(j):
        edge = [math.dist(p[j], x) - r for x, r in zip(landmarks, radii)]
        rows = []
        for k in np.argsort(edge)[: 6 if game.task == "resource" else 5]:
            rows += [*(landmarks[k] - p[j])]
            rows += [2 * radii[k]] if game.task == "resource" else []
        return rows

    own = [[*v[i], *p[i], *around(i)] for i in range(N)]
    kinds = np.eye(2)[list(game.types)].tolist() if game.task == "pacman" else [[]] * N
    entities = [
        [[*(p[j] - p[i]), *v[j], *kinds[j], *around(j)] for j in range(N)] for i in range(N)
    ]
    mask = [[i != j and bool(alive[j]) for j in range(N)] for i in range(N)]
    return np.array(own), np.array(entities), np.array(mask)


@pytest.mark.parametrize(
    ("task", "population", "shaping", "penalty"),
    [(*game, True, 0.0) for game in GAMES]
    + [(*game, False, 0.0) for game in GAMES if worlds.TASKS[game[0]].shaped]
    + [("treasure", 12, True, 5.0)],
)
def test_a_step_is_the_plain_one(task, population, shaping, penalty):
    """Physics, reward, who lives, what reappears and what is seen, from crowded states."""
    how = dict(shaping=shaping, collision_penalty=penalty)
    world = ParticleWorld(task, population, 40, seed=3, dtype=torch.float64, **how)
    game = world.game
    world.reset()
    bodies = crowded(game, world.bodies.shape[1], 7)
    world.bodies = pack(bodies)
    actions = np.random.default_rng(1).integers(0, 5, (40, game.num_agents))
    step = world.step(torch.from_numpy(actions))
    after, events = unpack(game, step.final_state.T), 0
    for b in range(40):
        p, v = bodies.position[..., b].numpy().T, bodies.velocity[..., b].numpy().T
        alive, landmarks = bodies.alive[:, b].numpy(), bodies.landmarks[..., b].numpy().T
        p, v = plain_move(game, p, v, alive, actions[b])
        reward, lives, taken = plain_rewards(game, p, landmarks, alive, shaping, penalty)
        assert np.allclose(step.reward[b], reward, atol=1e-9)
        assert np.array_equal(step.alive[b], lives)
        assert np.allclose(after.position[..., b].T, p, atol=1e-9)
        assert np.allclose(after.velocity[..., b].T, v * lives[:, None], atol=1e-9)
        assert after.landmarks[..., b].abs().max() <= 1 or not taken.any()
        stays = landmarks == after.landmarks[..., b].numpy().T
        assert np.array_equal(stays.all(1), ~taken) and np.array_equal(stays.any(1), ~taken)
        gone = not lives[: game.population[0]].any()
        assert bool(step.terminated[b]) == gone and not step.truncated[b]
        seen = plain_observation(
            game, p, v * lives[:, None], after.landmarks[..., b].numpy().T, lives
        )
        for ours, truth in zip((step.final.own, step.final.entities(), step.final.mask()), seen):
            assert np.allclose(ours[b], truth, atol=1e-9)
        events += taken.sum() + (lives != alive).sum() + (reward > 1).sum()
    assert events > 20


def test_contact_forces_are_equal_and_opposite():
    for task, population in GAMES:
        game = make_game(task, population)
        *between, push = pushes(game, crowded(game, 50, 5, 0.1))
        for d in between:
            force = d * push  # (N, N, B)
            assert torch.equal(force, -force.transpose(0, 1)) and force.abs().max() > 1


def test_bodies_at_one_point_push_nowhere():
    game = make_game("treasure", 2)
    zeros = torch.zeros(2, 2, 1)
    bodies = Bodies(zeros, zeros, torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 20, 1))
    assert torch.equal(move(game, bodies, torch.zeros(2, 1, dtype=torch.int64)).position, zeros)


def test_top_speeds():
    """They do not bind in free flight (.8 and 1.6): thrown bodies are slowed to them."""
    game = make_game("pacman", (1, 1))
    velocity = torch.tensor([[30.0, 0.0], [0.0, 40.0]])[..., None]
    apart = torch.tensor([[-0.5, 0.5], [0.0, 0.0]])[..., None]
    alive = torch.ones(2, 1, dtype=torch.bool)
    moved = move(game, Bodies(apart, velocity, alive, torch.ones(2, 20, 1)), alive.long() * 0)
    assert torch.allclose(moved.velocity.square().sum(0).sqrt()[:, 0], torch.tensor([3.0, 2.0]))


def test_the_dead_do_nothing():
    """A dead Pac-Man neither moves, pushes, eats, is caught again nor is seen."""
    world = ParticleWorld("pacman", (2, 1), 1, seed=1)
    world.reset()
    bodies = unpack(world.game, world.bodies)
    place = torch.tensor([[0.0, 0.9, 0.05], [0.0, 0.9, 0.0]])[..., None].expand(-1, -1, 32)
    alive = torch.tensor([[False], [True], [True]]).expand(-1, 32)
    dots = bodies.landmarks.clone()
    dots[:, 0] = 0.0  # a dot and a ghost on the dead one
    velocity = torch.zeros_like(place)
    world.bodies = pack(Bodies(place, velocity, alive, dots))
    step = world.step(torch.tensor([[2, 0, 0]]))
    after = unpack(world.game, step.final_state.T)
    assert torch.equal(after.position[:, :, 0], place[:, :, 0])  # the ghost is not pushed, either
    assert torch.equal(after.landmarks[:, 0, 0], torch.zeros(2))
    assert step.reward[0, 0] == 0 and step.alive[0].tolist() == [False, True, True]
    assert not step.final.mask()[0, :, 0].any() and not step.terminated.any()


# --- Random numbers, seeds, episodes --------------------------------------------------------------


def clocks(worlds):
    zeros = torch.zeros(worlds, dtype=torch.int64)
    return Clocks(mixed(torch.arange(worlds)), zeros, zeros)


def test_random_numbers_are_splitmix64():
    """Against its definition in unsigned arithmetic, and their distribution."""
    keys = np.array([0, 1, 2**63, 2**64 - 1, 12345678901234567890], np.uint64)
    with np.errstate(over="ignore"):
        z = keys.copy()
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    assert np.array_equal(mixed(torch.from_numpy(keys.view(np.int64))).numpy().view(np.uint64), z)
    ticks = (clocks(1000)._replace(time=torch.full((1000,), t)) for t in range(10))
    draws = torch.cat([uniform(one, range(50), 50, torch.float64) for one in ticks])
    assert draws.min() >= -1 and draws.max() < 1
    counts = np.histogram(draws, 100, (-1, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 149  # chi-squared, 99 degrees: one in 1,000
    assert abs(np.corrcoef(draws[:, :-1].flatten(), draws[:, 1:].flatten())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:-1].flatten(), draws[1:].flatten())[0, 1]) < 0.01


def rollout(world, steps, seed=0):
    """Everything that comes out of a rollout with random actions, drawn per world."""
    rngs = [np.random.default_rng((seed, b)) for b in range(world.num_worlds)]
    found = [(*world.reset(),)]
    for _ in range(steps):
        actions = np.stack([rng.integers(0, 5, world.num_agents) for rng in rngs])
        step = world.step(torch.from_numpy(actions))
        found.append(
            (*step.obs, step.reward, step.terminated, step.truncated, step.alive, *step.final)
        )
    return found


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


@pytest.mark.parametrize(
    ("task", "population"),
    [
        ("treasure", 5),
        ("resource", 6),
        ("pacman", (4, 2)),
        ("signpost", 4),
        ("rooms", (3, 3)),
        ("delivery", (6, 2)),
    ],
)
def test_a_worlds_rollout_does_not_depend_on_the_others(task, population):
    many = rollout(ParticleWorld(task, population, 70, seed=4), 45)
    for number in (1, 3, 33):
        few = rollout(ParticleWorld(task, population, number, seed=4), 45)
        assert same(few, [[x[:number] for x in row] for row in many])
    last = rollout(ParticleWorld(task, population, 70, seed=5), 3)
    assert not same(last, many[:4])
    shifted = ParticleWorld(task, population, 1, seed=4, first_world=2).reset()
    assert torch.equal(shifted.own[0], many[0][0][2])


def test_many_worlds_on_several_threads():
    few = rollout(ParticleWorld("treasure", 12, 40, seed=4), 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        many = rollout(ParticleWorld("treasure", 12, 1024, seed=4), 3)
    finally:
        torch.set_num_threads(threads)
    assert same(few, [[x[:40] for x in row] for row in many])


@pytest.mark.parametrize(
    ("task", "population"),
    [
        ("treasure", 5),
        ("resource", 6),
        ("pacman", (4, 2)),
        ("signpost", 4),
        ("rooms", (3, 3)),
        ("delivery", (6, 2)),
    ],
)
def test_a_saved_world_goes_on_as_it_was(task, population, tmp_path):
    world = ParticleWorld(task, population, 9, seed=4)
    rollout(world, 13)
    torch.save(world.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = ParticleWorld(task, population, 9, seed=99)
    other.load_state_dict(saved)
    assert same([world.obs], [other.obs])
    actions = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (30, 9, world.num_agents)))
    for act in actions:
        a, b = world.step(act), other.step(act)
        for x, y in zip(a, b):
            assert same([x], [y]) if isinstance(x, tuple) else torch.equal(x, y)
    assert torch.equal(world.state, other.state)
    for wrong in (
        ParticleWorld(task, population, 8),
        ParticleWorld("treasure", 6, 9),  # as large as pacman (4, 2)
        ParticleWorld(task, population, 9, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="This state is not of"):
            wrong.load_state_dict(saved)
        with pytest.raises(RuntimeError, match="begins with reset"):
            wrong.state_dict()  # as before
    state = other.state_dict()
    for refused in ({}, saved | {"time": saved["time"][:8]}):
        with pytest.raises(ValueError, match="This state is not of"):
            other.load_state_dict(refused)
        kept = other.state_dict()
        assert all(torch.equal(x, kept[k]) for k, x in state.items() if k != "game")
    for act in actions[:9]:
        assert same([world.step(act).obs], [other.step(act).obs])


def test_what_an_episode_begins_with_does_not_depend_on_what_was_done():
    """The third episode of each world, with players that die early and players that do not."""
    starts = []
    for player in (nearest_first, flee):
        world = ParticleWorld("pacman", (2, 8), 50, seed=6)
        world.reset()
        begun, third = torch.ones(50, dtype=torch.int64), torch.zeros(50, world.game.state_size)
        while (begun < 3).any():
            step = world.step(player(world))
            begun += step.terminated | step.truncated
            now = (begun == 3) & (step.terminated | step.truncated)
            third[now] = world.state[now]
        starts.append(third)
    assert torch.equal(*starts) and starts[0].any(1).all()


def test_steps_before_reset_and_wrong_actions_are_one_sentence():
    world = ParticleWorld("treasure", 3, 32)
    with pytest.raises(ValueError, match=r"Before step\(\) comes reset\(\)\."):
        world.step(torch.zeros(32, 3, dtype=torch.int64))
    world.reset()
    for shape in ((32, 1), (1, 3), (32, 4)):
        with pytest.raises(ValueError, match=r"Actions are ints \(32, 3\), not"):
            world.step(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"not \(32, 3\) of torch.float32\."):
        world.step(torch.ones(32, 3))
    reward = world.step(torch.ones(32, 3, dtype=torch.uint8)).reward
    again = ParticleWorld("treasure", 3, 32)
    again.reset()
    assert torch.equal(again.step(torch.ones(32, 3, dtype=torch.int64)).reward, reward)


def crowd_observation(game, bodies):
    """What others see, and beside it how far each agent is from the middle."""
    obs = worlds.observation(game, bodies)
    far = bodies.position.square().sum(0).sqrt().T[..., None]  # (B, N, 1)
    return obs._replace(own=torch.cat((obs.own, far), -1), others=torch.cat((obs.others, far), -1))


@pytest.fixture
def crowd(monkeypatch):
    """A task of one's own: treasure with other observations, shaping and a player."""
    task = worlds.TASKS["treasure"]._replace(observe=crowd_observation, players={"flee": flee})
    monkeypatch.setitem(worlds.TASKS, "crowd", task)
    return task


def test_players_beside_a_task_of_ones_own(crowd, monkeypatch):
    """Those that it names; scripts for our six tasks may need what it has not."""
    assert scripted_players("crowd", 1).keys() == {"random", "flee"}
    monkeypatch.setitem(worlds.TASKS, "mine", crowd._replace(players={}, shaped=False))
    assert scripted_players("mine", 1).keys() == {"random"}
    ParticleWorld("crowd", 3, 4, shaping=False)
    with pytest.raises(ValueError, match="mine has no shaping that it could do without"):
        ParticleWorld("mine", 3, 4, shaping=False)


@pytest.mark.parametrize("name", [MADDPG, MRA, MAAC, RL2, EPC])
def test_all_scripts_train_in_a_task_with_other_observations(name, crowd, tmp_path):
    """Networks are as wide as what it shows."""
    world = ParticleWorld("crowd", 3, 4)
    obs = world.reset()
    assert obs.own.shape[-1] == world.game.own_features == 4 + 2 * 5 + 1
    assert obs.others.shape[-1] == world.game.entity_features == 4 + 2 * 5 + 1
    assert script(name).main(tiny(name, tmp_path / "run", 60, "--task", "crowd")) == 0
    assert script(name).main(["--eval-only", str(tmp_path / "run"), "--final-episodes", "4"]) == 0


def test_a_saved_count_of_returns_is_a_copy():
    world = ParticleWorld("treasure", 2, 4, horizon=3)
    world.reset()
    returns = EpisodeReturns(world)
    for _ in range(3):
        returns.add(world.step(torch.ones(4, 2, dtype=torch.int64)))
    saved = returns.state_dict()
    kept = {name: x.clone() for name, x in saved.items()}
    returns.report()
    assert kept["ended"].any() and all(torch.equal(saved[name], x) for name, x in kept.items())
    again = EpisodeReturns(world)
    again.load_state_dict(saved)
    again.report()
    assert torch.equal(saved["ended"], kept["ended"])


def test_a_reward_scale_without_rewards():
    scale = RewardScale(ParticleWorld("pacman", (2, 3), 5))
    assert torch.equal(scale.deviation(), torch.full((5,), 0.01))


def test_the_last_reward_can_be_read():
    """Of the worlds that there are, also when the next episodes have begun."""
    world = ParticleWorld("pacman", (2, 3), 5, seed=1)
    assert torch.equal(world.last_reward, torch.zeros(5, 5))
    world.reset()
    for _ in range(21):
        step = world.step(nearest_first(world))
        assert torch.equal(world.last_reward, step.reward) and step.reward.any()
    world.reset()
    assert torch.equal(world.last_reward, step.reward)


def test_episodes_end_and_begin_anew():
    world = ParticleWorld("treasure", 3, 4, seed=1)
    world.reset()
    still = torch.zeros(4, 3, dtype=torch.int64)
    for t in range(1, 41):
        before = world.state
        step = world.step(still)
        assert bool(step.truncated.all()) == bool(step.truncated.any()) == (t % 20 == 0)
        assert not step.terminated.any()
        new = (world.observe(step.final_state).own != step.obs.own).any()
        assert bool(new) == (t % 20 == 0)
        assert same([world.observe(step.final_state)], [step.final])
        assert same([world.observe(world.state)], [step.obs])
        assert torch.equal(step.final_state[:, :6], before[:, :6] + 0.1 * step.final_state[:, 6:12])


def test_pacman_ends_when_no_pac_man_lives():
    """And each world counts its own 12 steps from there; who dies in the last one terminates."""
    world, ends = ParticleWorld("pacman", (1, 8), 200, seed=1, horizon=12), [0, 0, 0]
    world.reset()
    time = np.zeros(200, int)
    for _ in range(50):
        step = world.step(nearest_first(world))
        time += 1
        assert torch.equal(step.terminated, ~step.alive[:, 0])
        late = (time == 12) & ~step.terminated.numpy()
        assert np.array_equal(step.truncated.numpy(), late)
        ends = np.add(
            ends,
            [step.terminated.sum(), late.sum(), (step.terminated.numpy() & (time == 12)).sum()],
        )
        time[(step.terminated | step.truncated).numpy()] = 0
        assert unpack(world.game, world.bodies).alive.all()  # who has died plays a new episode
    assert (np.array(ends) > 0).all()


def test_spawning():
    """Anywhere in the square; a hundred agents, too; at (2, 8) a Pac-Man touches a ghost 9 % of the
    time (8 discs of radius .125 in a square of side 2, less at its edges)."""
    for population in (100, 3):
        state = fresh(make_game("treasure", population), clocks(99), torch.float64)
        assert state.position.abs().max() <= 1 and abs(float(state.position.mean())) < 0.05
        assert state.landmarks.abs().max() <= 1 and not state.velocity.any() and state.alive.all()
    game = make_game("pacman", (2, 8))
    bodies = fresh(game, clocks(20000), torch.float64)
    gap = (bodies.position[:, :2, None] - bodies.position[:, None, 2:]).square().sum(0).sqrt()
    share = float((gap < 0.125).any(1).double().mean())
    assert 0.08 < share < 0.10


# --- Compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "population"),
    [
        pytest.param("treasure", 4, marks=pytest.mark.long),
        pytest.param("resource", 6, marks=pytest.mark.long),
        pytest.param("pacman", (4, 2), marks=pytest.mark.long),
        pytest.param("pacman", (2, 8), marks=pytest.mark.long),
        pytest.param("signpost", 4, marks=pytest.mark.long),
        pytest.param("rooms", (3, 3), marks=pytest.mark.long),
    ],
)
def test_compiled_steps_are_the_eager_ones(task, population):
    """From the same states, away from thresholds, where a last bit decides who touches what, or
    which of two landmarks is nearer. So are the first observations of episodes that begin with it:
    in step 20 in all worlds, in Pacman with eight ghosts in some worlds at any time."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    eager = ParticleWorld(task, population, 64, seed=2)
    fast = ParticleWorld(task, population, 64, seed=2, compiled=True)
    eager.reset()
    fast.reset()
    rng, compared, begun = np.random.default_rng(0), 0, []
    for _ in range(25):
        fast.load_state_dict(eager.state_dict())
        actions = torch.from_numpy(rng.integers(0, 5, (64, eager.num_agents)))
        a, b = eager.step(actions), fast.step(actions)
        clear = distinct(eager.game, a.final_state)
        assert (a.reward - b.reward).abs().amax(1)[clear].le(1e-4).float().mean() > 0.95
        alike = ((a.reward - b.reward).abs().amax(1) < 1e-4) & clear
        assert alike.float().mean() > 0.8
        numbers = [(*s.final, *s.obs, s.reward, s.final_state) for s in (a, b)]
        for x, y in zip(*numbers):
            assert (x.float() - y.float())[alike].abs().max() < 1e-5
        compared += int(alike.sum())
        begun.append(int((a.terminated | a.truncated)[alike].sum()))
    assert compared > 1200
    assert sum(begun) > 40
    assert population != (2, 8) or sum(begun[:19]) > 0  # some die early
    for part in (fast._advance, fast._restart):
        assert part.call is not part.plain


def distinct(game, states):
    """(B,): no agent has two landmarks whose edges are equally far, within 1e-5."""
    bodies = unpack(game, states.T.double())
    between = bodies.landmarks[:, None] - bodies.position[:, :, None]
    radius = torch.tensor(game.landmark_radius, dtype=torch.float64)[:, None]
    edge = (between.square().sum(0).sqrt() - radius).sort(1).values
    return (edge.diff(dim=1) > 1e-5).all(1).all(0)


@pytest.mark.long
def test_without_a_compiler_the_world_is_eager(tmp_path):
    """In a process that finds no C++ compiler, and an empty cache."""
    code = (
        "import torch\n"
        "from envs.particle.worlds import ParticleWorld\n"
        "world = ParticleWorld('treasure', 3, 4, compiled=True)\n"
        "world.reset()\n"
        "print(world.step(torch.zeros(4, 3, dtype=torch.int64)).reward.shape)\n"
    )
    env = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0 and "torch.Size([4, 3])" in done.stdout, done.stderr[-2000:]
    assert "Not compiled, and slower: the world" in done.stderr


# --- Who uses it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("chess", 3),
            "There is no task 'chess': there are treasure, resource, pacman, signpost, rooms, "
            "delivery.",
        ),
        (("treasure", (3, 2)), "A population of treasure is one number: 3,2 is not."),
        (
            ("pacman", 3),
            "A population of pacman is 2 numbers with commas (pac_man,ghost): 3 is not.",
        ),
        (("pacman", (0, 2)), "A population has at least one agent of each type: not 0,2."),
        (("pacman", (997, 4)), "A population has at most 1000 agents: not 997,4."),
        (("treasure", 3, {"nearest": 25}), "nearest is from 1 to 20, not 25."),
        (
            ("treasure", 3, {"integration": "MPE2"}),
            "integration is velocity-first or mpe2, not 'MPE2'.",
        ),
        (
            ("treasure", 3, {"collision_penalty": -1.0}),
            "collision_penalty is not negative: not -1.0.",
        ),
        (("treasure", 3, {"shapping": True}), "A world has no option shapping."),
    ],
)
def test_what_does_not_exist_is_one_sentence(arguments, sentence):
    task, population, options = (*arguments, {})[:3]
    with pytest.raises(ValueError) as error:
        make_game(task, population, **options)
    assert str(error.value) == sentence


@pytest.mark.parametrize("steps", [0, LONGEST])
def test_an_episode_fits_its_random_numbers(steps):
    """uniform() counts LONGEST steps for each, its beginning among them."""
    with pytest.raises(ValueError) as error:
        ParticleWorld("treasure", 3, 1, horizon=steps)
    assert str(error.value) == f"An episode has from 1 to {LONGEST - 1} steps, not {steps}."
    assert ParticleWorld("treasure", 1000, 1, horizon=LONGEST - 1).num_agents == 1000


@pytest.mark.parametrize("name", [MRA, MADDPG, MAAC, RL2, EPC])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"{{flag}} {'9' * 20}", f"A population has at most 1000 agents: not {'9' * 20}."),
        ("{flag} 8,1001 --task pacman", "A population has at most 1000 agents: not 8,1001."),
        ("--max-episode-steps 1048576", "An episode has from 1 to 1048575 steps, not 1048576."),
    ],
)
def test_scripts_refuse_worlds_that_are_too_large(
    name, words, sentence, tmp_path, monkeypatch, capfd
):
    """One sentence, code 2, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    flag = "--populations" if name in (MRA, RL2, EPC) else "--population"
    assert script(name).main(words.format(flag=flag).split()) == 2
    assert capfd.readouterr() == ("", f"error: {sentence}\n")
    assert not [*tmp_path.iterdir()]


def mean_return(task, population, player, worlds=512):
    """Per agent of each type, over one episode of each world."""
    world = ParticleWorld(task, population, worlds, seed=11)
    world.reset()
    rng, total = np.random.default_rng(0), torch.zeros(worlds, world.num_agents)
    playing = torch.ones(worlds, 1, dtype=torch.bool)
    for _ in range(20):
        actions = player(world) if player else rng.integers(0, 5, (worlds, world.num_agents))
        step = world.step(torch.as_tensor(actions))
        total += step.reward * playing
        playing &= ~step.terminated[:, None]
    return [float(x.mean()) for x in total.split(world.game.population, 1)]


def test_scripted_players():
    """What docs/data/particle_players.csv says of them, with other seeds: within five of its
    standard errors (its intervals are four wide, of twice as many episodes)."""
    with (ROOT / "docs/data/particle_players.csv").open() as file:
        rows = {
            (x["task"], x["population"], x["role"], x["player"]): x for x in csv.DictReader(file)
        }
    players = {"random": None, "nearest-first": nearest_first, "flee": flee}
    for task, population in GAMES:
        name = ",".join(map(str, np.atleast_1d(population)))
        for player, function in players.items():
            found = mean_return(task, population, function)
            for role, mean in zip(TASKS[task].roles, found):
                row = rows[task, name, role, player]
                width = float(row["high"]) - float(row["low"])
                assert abs(mean - float(row["mean"])) < 5 * width / 4 * 1.8, (task, name, role)
    pac_men, ghosts = mean_return("pacman", (4, 2), nearest_first)
    fleeing, hunting = mean_return("pacman", (4, 2), flee)
    assert fleeing > pac_men and hunting < ghosts
    assert ghosts > mean_return("pacman", (4, 2), None)[1] + 2


def test_pictures_have_a_fixed_window():
    """Agents beyond it are drawn at its edge, what is inside in its place."""
    game = make_game("pacman", (2, 1))
    place = torch.tensor([[0.0, 50.0, -0.75], [0.0, 0.75, 0.0]])[..., None]
    alive = torch.tensor([[True], [True], [True]])
    dots = torch.full((2, 20, 1), 0.9)
    image = draw(game, pack(Bodies(place, place * 0, alive, dots))[:, 0].numpy(), 300)
    assert image.shape == (300, 300, 3) and image.dtype == np.uint8
    blue, red = (31, 119, 180), (214, 39, 40)
    assert tuple(image[150, 150]) == blue  # the middle
    assert tuple(image[75, 299]) == blue  # far to the right, half-way up
    assert tuple(image[150, 75]) == red
    dead = pack(Bodies(place, place * 0, ~alive, dots))[:, 0].numpy()
    assert tuple(draw(game, dead, 300)[150, 150]) == (255, 255, 255)


@pytest.mark.slow  # compiles three times
def test_half_a_library_in_the_compilers_cache(tmp_path):
    """As a process leaves it that is killed while it compiles."""
    code = (
        "import torch\n"
        "from envs.particle.worlds import ParticleWorld\n"
        "world = ParticleWorld('treasure', 3, 4, compiled=True)\n"
        "world.reset()\n"
        "world.step(torch.zeros(4, 3, dtype=torch.int64))\n"
        "print(world._advance.call is not world._advance.plain)\n"
    )
    cache = tmp_path / "cache"
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    for damaged in (False, True):
        for path in cache.rglob("*.so") if damaged else ():
            path.write_bytes(path.read_bytes()[:100])
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True", done.stderr[-2000:]
        assert (f"if it helps, delete {cache}" in done.stdout) == damaged


# --- Episodes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "population"), [("resource", 3), ("pacman", (1, 30))])
def test_returns_and_rewards_while_an_agent_learns(task, population):
    """EpisodeReturns and RewardScale against sums in Python, world by world; also gone on with from
    a state that was saved on the way."""
    world = ParticleWorld(task, population, 5, seed=2, horizon=8)
    world.reset()
    types = np.split(np.arange(world.num_agents), np.cumsum(world.game.population)[:-1])
    returns, scale = EpisodeReturns(world), RewardScale(world)
    running, ended = np.zeros((5, world.num_agents)), []
    rewards = [[] for _ in types]
    rng = torch.Generator().manual_seed(1)
    for t in range(30):
        alive = world.obs.alive
        step = world.step(torch.randint(0, 5, (5, world.num_agents), generator=rng))
        scale.add(step.reward, alive)
        returns.add(step)
        running += step.reward.double().numpy()
        for b in np.flatnonzero((step.terminated | step.truncated).numpy()):
            ended.append(running[b].copy())
            running[b] = 0
        for kind, agents in enumerate(types):
            rewards[kind] += step.reward[:, agents][alive[:, agents]].tolist()
        if t == 12:
            saved, returns = returns.state_dict(), EpisodeReturns(world)
            returns.load_state_dict(saved)
    means = [np.mean([each[agents].mean() for each in ended]) for agents in types]
    name = f"return/{population_name(world.game)}"
    expected = {"episodes": len(ended), name: np.mean(means), "return": np.mean(means)}
    if len(types) > 1:
        expected |= {f"{name}/{kind}": mean for kind, mean in enumerate(means)}
        assert len(ended) > 15, "some have ended early"
    assert report_returns([returns]) == pytest.approx(expected, rel=1e-4)
    assert report_returns([returns]) == {}, "of what has ended since"
    deviations = np.repeat([np.std(x) for x in rewards], world.game.population)
    assert scale.deviation().tolist() == pytest.approx(deviations, rel=1e-4)


def test_a_summary_has_the_means_of_each_type():
    """Pac-Men's returns are in the first column and ghosts' in the second, with the episodes'
    spread in their intervals."""
    returns = np.array([[-8.0, 20.0], [-6.0, 30.0], [-7.0, 40.0], [-7.0, 30.0]], np.float32)
    row = summarise("pacman", returns)
    assert (row["episodes"], row["return_pac_man"], row["return_ghost"]) == (4, -7, 30)
    assert -8 <= row["return_pac_man_low"] < -7 < row["return_pac_man_high"] <= -6
    assert 20 <= row["return_ghost_low"] < 30 < row["return_ghost_high"] <= 40
    alone = summarise("treasure", returns[:, 1:])
    assert set(alone) == {"episodes", "return", "return_low", "return_high"}
    assert alone["return"] == 30
