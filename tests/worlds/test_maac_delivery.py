"""delivery beside the code whose rules it has: MAAC's Cooperative Treasure Collection in its
authors' fork of the particle worlds, from clones of both repositories:

git clone https://github.com/shariqiqbal2810/MAAC && git -C MAAC checkout 6174a01
git clone https://github.com/shariqiqbal2810/multiagent-particle-envs MPE
git -C MPE checkout a3ccb43
MAAC_REPOSITORY=MAAC MAAC_WORLDS=MPE pytest tests/worlds/test_maac_delivery.py

gymnasium stands in for gym, and colours are left out.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from envs.particle.worlds import ParticleWorld, deliver, unpack

REPOSITORY, WORLDS = (os.environ.get(x, "") for x in ("MAAC_REPOSITORY", "MAAC_WORLDS"))
pytestmark = pytest.mark.skipif(
    not (REPOSITORY and WORLDS),
    reason="MAAC_REPOSITORY, MAAC_WORLDS name no clones of shariqiqbal2810/MAAC and its worlds",
)
THEIR_ACTIONS = np.eye(5)[[0, 2, 1, 4, 3]]  # of ours: theirs are right, left, up, down; one-hot
B, STEPS = 10, 100


@pytest.fixture
def their_world(monkeypatch):
    """A function that makes their world with some collectors; they have six, and two deposits."""
    for name, module in {
        "gym": gymnasium,
        "gym.envs": gymnasium.envs,
        "gym.envs.registration": types.SimpleNamespace(EnvSpec=None, register=lambda **_: None),
        "seaborn": types.SimpleNamespace(color_palette=lambda n_colors: [(0, 0, 0)] * n_colors),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(Path(WORLDS).resolve()))
    environment = importlib.import_module("multiagent.environment")
    source = (Path(REPOSITORY) / "envs/mpe_scenarios/fullobs_collect_treasure.py").read_text()

    def make(collectors):
        text = source
        for name, number, wanted in (("agents", 8, collectors + 2), ("collectors", 6, collectors)):
            assert text.count(f"num_{name} = {number}\n") == 1
            text = text.replace(f"num_{name} = {number}\n", f"num_{name} = {wanted}\n")
        module = {}
        exec(text, module)
        scenario = module["Scenario"]()
        return environment.MultiAgentEnv(  # as utils/make_env.py and main.py do
            scenario.make_world(),
            reset_callback=scenario.reset_world,
            reward_callback=scenario.reward,
            observation_callback=scenario.observation,
            post_step_callback=scenario.post_step,
            discrete_action=True,
        )

    yield make
    for name in [x for x in sys.modules if x.split(".")[0] == "multiagent"]:
        del sys.modules[name]


def put(env, before, after, b, come_back):
    """Their bodies to where ours are before a step: contacts magnify rounding. Treasures that have
    come back to where, and as what, ours have."""
    for i, agent in enumerate(env.world.agents):
        agent.state.p_pos = before.position[:, i, b].numpy().copy()
        agent.state.p_vel = before.velocity[:, i, b].numpy().copy()
    for k in come_back:
        treasure = env.world.landmarks[k]
        treasure.state.p_pos = after.landmarks[:, k, b].numpy().copy()
        treasure.type = int(after.kinds[k, b]) - 1
    env.world.calculate_distances()


def in_their_order(own, entities, i, collectors):
    """What agent i observes, from our own (Ds,) and entities (N, De)."""
    velocity, position, _, carries, treasures = np.split(own, [2, 4, 6, 8])
    others = [j for j in range(len(entities)) if j != i]
    nearest = sorted(others, key=lambda j: (np.hypot(*entities[j, :2]), j))[:7]
    parts = [position, velocity, *([carries] if i < collectors else [])]
    return np.concatenate([*parts, *entities[nearest], treasures[: 4 * min(collectors, 7)]])


def worst(found, truth):
    found, truth = np.asarray(found), np.asarray(truth, float)
    assert found.shape == truth.shape
    return float(np.abs(found - truth).max())


@pytest.mark.parametrize("collectors", [1, 3, 6, 12])
def test_steps_are_theirs(collectors, their_world):
    """Given actions and where treasures come back: who holds what and where treasures are, exactly;
    bodies, rewards and observations but for rounding."""
    how = {"seed": 5, "horizon": STEPS, "dtype": torch.float64}
    world = ParticleWorld("delivery", (collectors, 2), B, **how)
    world.reset()
    before, theirs = unpack(world.game, world.bodies), [their_world(collectors) for _ in range(B)]
    come_back = [range(collectors)] * B  # at first all
    taken = brought = 0
    off = dict.fromkeys(("bodies", "rewards", "observations"), 0.0)
    rng = np.random.default_rng(collectors)
    for _ in range(STEPS):
        actions = deliver(world)
        anything = torch.from_numpy(rng.integers(0, 5, actions.shape))
        actions = torch.where(torch.from_numpy(rng.random(actions.shape) < 0.2), anything, actions)
        step = world.step(actions)
        after = unpack(world.game, step.final_state.T)
        own, entities = step.final.own.numpy(), step.final.entities().numpy()
        for b, env in enumerate(theirs):
            put(env, before, after, b, come_back[b])
            treasures = env.world.landmarks
            held = [0 if x.holding is None else x.holding + 1 for x in env.world.agents]
            assert held == [*after.carried[:, b].tolist(), 0, 0]
            assert [x.type + 1 for x in treasures] == after.kinds[:, b].tolist()
            places = np.array([x.state.p_pos for x in treasures])
            assert np.array_equal(places, after.landmarks[..., b].T)
            come_back[b] = [k for k, x in enumerate(treasures) if not x.alive]
            obs, rewards, *_ = env._step(list(THEIR_ACTIONS[actions[b]]))
            now = [0 if x.holding is None else x.holding + 1 for x in env.world.agents]
            gone = sum(not x.alive for x in treasures)
            taken += gone
            brought += sum(map(bool, held)) + gone - sum(map(bool, now))
            for kind in ("position", "velocity"):
                name = {"position": "p_pos", "velocity": "p_vel"}[kind]
                bodies = [getattr(x.state, name) for x in env.world.agents]
                found = worst(getattr(after, kind)[..., b].T, bodies)
                off["bodies"] = max(off["bodies"], found)
            off["rewards"] = max(off["rewards"], worst(step.reward[b], rewards))
            for i, truth in enumerate(obs):
                found = worst(in_their_order(own[b, i], entities[b, i], i, collectors), truth)
                off["observations"] = max(off["observations"], found)
        before = after
    print(f"{collectors},2: {B * STEPS} steps, {taken} taken, {brought} brought; off by", off)
    assert max(off.values()) < 1e-12, off
    assert taken >= 20 and brought >= 10
