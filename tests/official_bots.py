# ruff: noqa: E402
"""Official bots whose SavedModels are made here, in a folder that the argument names. Run by
tests/worlds/test_scenarios.py in a process of its own, as it needs tensorflow."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs.meltingpot.worlds import import_meltingpot

import_meltingpot(bots=True)

import dm_env
import numpy as np
import tensorflow as tf
from meltingpot.configs import bots as configs

from envs.meltingpot.scenarios import ScenarioEngine, choose_bots, get_plan, missing_assets
from envs.meltingpot.tiles import Palette

SUBSTRATE = "chicken_in_the_matrix__repeated"
SEEN = {
    "RGB": tf.TensorSpec([40, 40, 3], tf.uint8),
    "GOAL": tf.TensorSpec([4], tf.int32),
    "INVENTORY": tf.TensorSpec([2], tf.float32),
}
TIMESTEP = dm_env.TimeStep(
    step_type=tf.TensorSpec([], tf.int32),
    reward=tf.TensorSpec([], tf.float32),
    discount=tf.TensorSpec([], tf.float32),
    observation=SEEN,
)
KEY, STATE = tf.TensorSpec([2], tf.uint32), tf.TensorSpec([], tf.int32)


class Model(tf.Module):
    """As much of a puppet as meltingpot asks for (utils/policies/permissive_model.py)."""

    @tf.function(input_signature=[])
    def function_tables(self):
        return {}

    @tf.function(input_signature=[])
    def function_signatures(self):
        arguments = {"step": ("key", "timestep", "prev_state"), "initial_state": ("key",)}
        kind = 1  # inspect.Parameter.POSITIONAL_OR_KEYWORD
        return {
            name: [(tf.constant(one.encode()), tf.constant(kind)) for one in names]
            for name, names in arguments.items()
        }

    @tf.function(input_signature=[KEY])
    def initial_state(self, key):
        return key, tf.zeros([], tf.int32)

    @tf.function(input_signature=[KEY, TIMESTEP, STATE])
    def step(self, key, timestep, prev_state):
        action = 1 + tf.argmax(timestep.observation["GOAL"], output_type=tf.int32)
        return key, ((action, tf.zeros([])), prev_state + 1)


def main(folder: Path) -> None:
    for config in configs.BOT_CONFIGS.values():
        if config.substrate == SUBSTRATE:
            path = folder / SUBSTRATE / Path(config.model_path).name
            if not path.exists():
                tf.saved_model.save(Model(), str(path))
            object.__setattr__(config, "model_path", str(path))
    configs.MODELS_ROOT = str(folder)
    assert missing_assets() == ""
    plan = get_plan(f"{SUBSTRATE}_3")
    assert choose_bots([plan], "auto") == choose_bots([plan], "official") == "official"
    engine = ScenarioEngine(plan, "official", (1,), Palette.private())
    (bot,) = engine.bots
    actions, act = [], bot.act

    def noting(first, reward):
        actions.append(act(first, reward))
        return actions[-1]

    bot.act = noting
    for _ in range(40):
        engine.step(np.array([0]))
    assert actions == [1] * 40, actions  # grim, not struck yet: collect dove, goal 0
    print("goals arrive, and actions come back")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
