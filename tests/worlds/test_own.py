"""Worlds of one's own: the page's code runs as it stands there, and is what training sees."""

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from pettingzoo.test import parallel_api_test
from runs import tiny

import bidist_mappo_meltingpot as bidist
from baselines import mappo_meltingpot as mappo
from baselines import opre_meltingpot as opre
from baselines import pp_meltingpot as pp
from baselines import randnet_meltingpot as randnet
from baselines import rpm_meltingpot as rpm
from envs.meltingpot.episodes import play
from envs.meltingpot.own import OwnWorlds, new_sprites
from envs.meltingpot.tiles import CAPACITY, WorldError
from experiments import bidist as figures

PAGE = Path(bidist.__file__).parent / "docs/own_world.md"
ALL = (bidist, mappo, randnet, opre, pp, rpm)


def code_with(words):
    """The page's only block of code with these words."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", PAGE.read_text(), re.M)
    (code,) = (block for block in blocks if words in block)
    return re.sub(r"^    ", "", code, flags=re.M)


@pytest.fixture
def my_world(tmp_path, monkeypatch):
    """The page's module, in the working directory."""
    (tmp_path / "my_world.py").write_text(code_with("class Berries"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_world", raising=False)
    yield tmp_path
    sys.modules.pop("my_world", None)


def add(folder, name, *lines):
    """Append to my_world.py the class NAME, a kind of Berries with these lines."""
    text = "\n".join(
        (
            "from gymnasium.spaces import MultiBinary, MultiDiscrete",
            f"class {name}(Berries):",
            *lines,
        )
    )
    with (folder / "my_world.py").open("a") as file:
        file.write(f"\n\n{text}\n")


def lines_of(path):
    return [x for x in path.read_text().splitlines() if x.strip()]


def test_the_page_plays_worlds_of_the_project():
    """A battle is played to its end, drawn, and its state read; Pacman takes turns."""
    names = {}
    exec(code_with("from envs.parallel import"), names)
    world, turns = names["world"], names["turns"]
    ended = [*names["terminations"].values(), *names["truncations"].values()]
    assert not world.agents and any(ended)
    assert names["picture"].dtype == np.uint8 and names["picture"].shape[-1] == 3
    assert world.state_space.contains(names["state"])
    turns.reset(seed=1)
    first = turns.agent_selection
    assert turns.last()[0] in turns.observation_space(first)
    turns.step(turns.action_space(first).sample())
    assert turns.agent_selection != first
    world.close()
    turns.close()


def test_the_page_says_30_lines_and_pettingzoo_agrees(my_world):
    code = lines_of(my_world / "my_world.py")
    body = code[next(k for k, x in enumerate(code) if x.startswith("class")) :]
    assert len(body) <= 30
    with OwnWorlds("my_world:Berries", 1) as envs:
        parallel_api_test(envs.worlds[0], num_cycles=200)


def test_a_world_need_not_have_close(my_world):
    add(my_world, "Open", "    close = property()  # as where there is none")
    with OwnWorlds("my_world:Open", 2) as envs:
        assert not hasattr(envs.worlds[0], "close")
        envs.reset()


def test_what_training_sees_is_what_the_world_says(my_world):
    """Two worlds beside two plain ones, over the ends of episodes."""
    rng = np.random.default_rng(0)
    with OwnWorlds("my_world:Berries", 2, seed=3) as envs:
        plain = [type(world)() for world in envs.worlds]
        obs, episode, total = envs.reset(), [0, 0], np.zeros((2, 2))

        def begin(b):
            key = np.random.SeedSequence((3, b, episode[b]))
            episode[b] += 1
            return plain[b].reset(seed=int(key.generate_state(1)[0]))[0]

        views = [begin(0), begin(1)]
        ended = 0
        for _ in range(120):
            for b in range(2):
                expected = np.stack([views[b]["player_0"], views[b]["player_1"]])
                assert np.array_equal(obs.tile_ids[b], expected)
                assert np.array_equal(obs.world_ids[b], expected.reshape(10, 5))
            actions = rng.integers(0, 5, (2, 2))
            step = envs.step(actions)
            obs = step.obs
            for b in range(2):
                chosen = {"player_0": actions[b, 0], "player_1": actions[b, 1]}
                views[b], rewards, _, cuts, _ = plain[b].step(chosen)
                assert step.reward[b].tolist() == [rewards["player_0"], rewards["player_1"]]
                total[b] += step.reward[b]
                assert step.truncated[b] == cuts["player_0"] and not step.terminated[b]
                if cuts["player_0"]:
                    assert np.array_equal(step.final.tile_ids[b, 0], views[b]["player_0"])
                    (mine,) = (x for x in step.episodes if x.world == b)
                    assert mine.length == 50 and mine.returns.tolist() == total[b].tolist()
                    views[b], total[b], ended = begin(b), 0, ended + 1
        assert ended == 4
        image = envs.images(obs.tile_ids[0, 0])
        (row, column) = np.argwhere(obs.tile_ids[0, 0] == 2)[0]
        assert image[8 * row, 8 * column].tolist() == [80, 120, 255]


def test_other_processes_have_other_worlds_and_resumed_runs_other_episodes(my_world):
    """World b from first_world on is world first_world + b, and a loaded state goes on with the
    episodes that would have come, whose returns have nothing of those that were cut short."""

    def episodes(envs, number):
        return [[x.copy() for x in envs.reset()[:2]] for _ in range(number)]

    with OwnWorlds("my_world:Berries", 3, seed=3) as envs:
        whole = episodes(envs, 4)
    with OwnWorlds("my_world:Berries", 1, seed=3, first_world=2) as envs:
        for mine, all_of_them in zip(episodes(envs, 4), whole):
            assert all(np.array_equal(x[0], y[2]) for x, y in zip(mine, all_of_them))
    with OwnWorlds("my_world:Berries", 3, seed=3) as first:
        episodes(first, 2)
        state = first.state_dict()
    with OwnWorlds("my_world:Berries", 3, seed=3) as second:
        obs = second.load_state_dict(state)
        assert all(np.array_equal(x, y) for x, y in zip(obs[:2], whole[2]))
        second.step(np.zeros((3, 2), int))
        second.reset()
        steps = [second.step(np.zeros((3, 2), int)) for _ in range(50)]
        assert [x.length for x in steps[-1].episodes] == [50] * 3
        returns = [x.returns.tolist() for x in steps[-1].episodes]
        assert returns == sum(x.reward for x in steps).tolist()


@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
def test_scripts_train_resume_and_evaluate(script, my_world, capsys):
    argv = tiny(script.__name__, "run", 2, "--substrate", "my_world:Berries")
    argv += ["--final-episodes", "2"]
    assert script.main(argv) == 0
    assert script.main(["--resume", "run", "--total-timesteps", "160"]) == 0
    assert "| v random" in capsys.readouterr().out
    assert script.main(["--eval-only", "run", "--capture-video"]) == 0
    assert list(Path("run/videos").glob("*.mp4"))
    with OwnWorlds("my_world:Berries", 3) as envs:
        player = script.load_player("run", envs)
        ids = np.tile(np.arange(2), (3, 1))
        assert player(envs.reset(), np.ones(3, bool), ids).shape == (3, 2)


def test_an_optional_limit_and_a_global_view(my_world):
    with (my_world / "my_world.py").open("a") as file:
        file.write(
            "\n\nclass Seen(Berries):\n"
            "    state_space = Box(0, 6, (2, 3), np.int8)\n"
            "    colours = [(0, 0, 0)] + [(9 * k, 9, 9) for k in range(6)]\n\n"
            "    def state(self):\n"
            "        return np.full((2, 3), 6, np.int8)\n"
        )
    with OwnWorlds("my_world:Seen", 1, max_episode_steps=7) as envs:
        assert envs.spec.world_grid == (2, 3) and (envs.reset().world_ids == 6).all()
        steps = [envs.step(np.zeros((1, 2), int)) for _ in range(14)]
        assert [bool(x.truncated[0]) for x in steps] == ([False] * 6 + [True]) * 2


def test_a_world_without_an_end_is_evaluated_up_to_the_limit(my_world):
    """Every script's evaluation would wait for the end of an episode for ever."""
    step = ["    def step(self, actions):", "        self.time = 0"]
    add(my_world, "Endless", *step, "        return super().step(actions)")
    for script in ALL:
        argv = tiny(script.__name__, script.__name__, 1, "--substrate", "my_world:Endless")
        argv += ["--final-episodes", "2", "--max-episode-steps", "10"]
        assert script.main(argv) == 0
        summary = json.loads(Path(script.__name__, "summary.json").read_text())
        assert summary["eval"]["self-play"]["length"] == 10
    pair = [mappo.__name__, opre.__name__, "--episodes", "2", "--out", "cross"]
    assert figures.main(["cross-play", *pair]) == 0
    with Path("cross.csv").open(newline="") as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["10"] * 4


def test_actions_that_do_not_start_at_0(my_world):
    """The world gets what is in its space; the scripts still count from 0."""
    add(
        my_world,
        "Late",
        "    def action_space(self, agent):",
        "        return Discrete(3, start=2)",
        "",
        "    def step(self, actions):",
        "        self.seen = actions",
        "        return super().step(actions)",
    )
    with OwnWorlds("my_world:Late", 1) as envs:
        envs.reset()
        envs.step(np.array([[0, 2]]))
        assert envs.worlds[0].seen == {"player_0": 2, "player_1": 4}
        assert envs.spec.actions == ({"action": 2}, {"action": 3}, {"action": 4})


def test_kinds_that_do_not_start_at_0(my_world):
    """Of a MultiDiscrete: its highest kind is start + nvec - 1."""
    space = "        return MultiDiscrete(np.full((5, 5), 3), start=np.full((5, 5), 2))"
    look = ["    def look(self):", "        views = super().look()"]
    look += ["        return {agent: view % 3 + 2 for agent, view in views.items()}"]
    colours = ["    colours = [(k, k, k) for k in range(5)]"]
    add(my_world, "Late", *colours, "    def observation_space(self, agent):", space, *look)
    with OwnWorlds("my_world:Late", 1) as envs:
        assert envs.kinds == [5, 5] and set(np.unique(envs.reset().tile_ids)) == {2, 3, 4}


def test_an_error_within_a_world_keeps_its_traceback(my_world):
    add(my_world, "Faulty", "    def __init__(self):", "        len(3)")
    with pytest.raises(TypeError, match="has no len"):
        OwnWorlds("my_world:Faulty", 1)
    (my_world / "their_world.py").write_text("import os\n\nos.nothing\n\n\nclass Berries: ...\n")
    with pytest.raises(AttributeError, match="'os' has no attribute 'nothing'"):
        OwnWorlds("their_world:Berries", 1)


def test_an_end_that_terminates_some_and_truncates_others_is_a_truncation(my_world):
    step = [
        "    def step(self, actions):",
        "        views, pay, ends, _, infos = super().step(actions)",
    ]
    step += [
        "        return views, pay, ends | {'player_0': True}, ends | {'player_1': True}, infos"
    ]
    add(my_world, "Both", *step)
    with OwnWorlds("my_world:Both", 1) as envs:
        envs.reset()
        step = envs.step(np.zeros((1, 2), int))
    assert step.truncated.all() and not step.terminated.any()


def test_colours_of_an_instance(my_world):
    """Also of a function that makes the world."""
    with (my_world / "my_world.py").open("a") as file:
        file.write("\n\ndef painted():\n    world = Berries()\n")
        file.write("    world.colours = [(0, 0, 0), (1, 2, 3), (4, 5, 6), (7, 8, 9)]\n")
        file.write("    return world\n")
    with OwnWorlds("my_world:painted", 1) as envs:
        assert envs.images(np.array([[3]], np.uint16))[0, 0].tolist() == [7, 8, 9]


def test_players_keep_the_ids_of_their_role(my_world):
    """A name without its number is a role, as PettingZoo names agents."""
    with OwnWorlds("my_world:Berries", 1) as envs:
        assert envs.spec.roles == ("player", "player")
    sys.modules.pop("my_world")
    paid = ["    NAMES[:] = ['cook', 'eater']"]
    paid += ["    def step(self, actions):", "        answer = super().step(actions)"]
    paid += ["        pay = {x: float(actions[x] == NAMES.index(x)) for x in NAMES}"]
    add(my_world, "Unlike", *paid, "        return (answer[0], pay, *answer[2:])")
    add(my_world, "Named", "    possible_agents = ['cook_0', 'cook_1', 'eater_0', 'guest']")
    obey = lambda obs, starts, ids: ids  # noqa: E731
    with OwnWorlds("my_world:Unlike", 3) as envs:
        results = play(envs, obey, None, 2, 9, np.random.default_rng(0))
    assert [x.focal_return for x in results] == [50.0] * 9
    with OwnWorlds("my_world:Named", 1) as envs:
        assert envs.spec.roles == ("cook", "cook", "eater", "guest")


def test_default_sprites_are_far_apart():
    """As many as ids can tell; the first are plain, and a kind looks alike in all worlds."""
    sprites = new_sprites(CAPACITY)
    assert sprites.shape == (CAPACITY, 8, 8, 3) and not sprites[0].any()
    flat = sprites.reshape(CAPACITY, -1)
    assert len(np.unique(flat, axis=0)) == CAPACITY
    assert np.array_equal(new_sprites(300), sprites[:300])
    assert (sprites[:22] == sprites[:22, :1, :1]).all()
    some = np.random.default_rng(0).integers(1, CAPACITY, 700)
    near = np.r_[0:300, 1500:1700, some]  # (M,), also those of one hue
    points = flat[np.unique(near)].astype(np.float32)
    squares = (points**2).sum(1)
    apart = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(apart, np.inf)
    assert np.sqrt(apart.min() / flat.shape[1]) > 20  # of 255, root mean square of a pixel


WRONG = {
    ".a:Berries": "--substrate .a:Berries: '.a' is no name of a module.",
    ":Berries": "--substrate :Berries: '' is no name of a module.",
    "os:path": "--substrate os:path: path is no class and no function.",
    "os:getcwd": "its possible_agents name no player",
    "my_world:Empty": "its possible_agents name no player",
    "my_world:Steered": "the action space Box(0.0, 1.0, (2,), float32) is no Discrete",
    "my_world:Switches": "the action space MultiBinary(3) is no Discrete",
    "my_world:Many": "2,147,483,648 kinds are more than 65,536",
    "my_world:Bright": "colours must be 4 rows",
    "my_world:Nobody": "my_world has no Nobody",
    "nowhere:Berries": "there is no module nowhere",
    "my_world:Flat": "is no grid of integers",
    "my_world:Apart": "views of one size and the same actions",
    "my_world:Pale": "colours must be 4 rows",
    "my_world:Below": "has kinds below 0",
    "my_world:Early": "has kinds below 0",
    "my_world:Sized": "missing 1 required positional argument: 'size'.",
    "json:loads": "loads() missing 1 required positional argument: 's'.",
    "numpy:array": "array() missing required argument 'object' (pos 0).",
    "my_world:again": "it returns one world several times.",
    "my_world:Bare": "it has no method observation_space()",
    "my_world:Alike": "kinds 1 and 3 have one colour, (0, 0, 9).",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_world_is_one_sentence(name, my_world, capsys):
    add(my_world, "Empty", "    possible_agents = []")
    add(my_world, "Steered", "    def action_space(self, agent):", "        return Box(0, 1, (2,))")
    add(
        my_world,
        "Switches",
        "    def action_space(self, agent):",
        "        return MultiBinary(3)",
    )
    add(
        my_world,
        "Many",
        "    def observation_space(self, agent):",
        "        return Box(0, 2**31 - 1, (5, 5), np.int32)",
    )
    early = "        return MultiDiscrete(np.full((5, 5), 4), start=np.full((5, 5), -1))"
    add(my_world, "Early", "    def observation_space(self, agent):", early)
    add(my_world, "Sized", "    def __init__(self, size):", "        self.size = size")
    add(my_world, "Alike", "    colours = [(0, 0, 0), (0, 0, 9), (1, 0, 9), (0, 0, 9)]")
    add(my_world, "Bright", "    colours = [(0, 0, 0)] + 3 * [(0, 0, 256)]")
    with (my_world / "my_world.py").open("a") as file:
        file.write(
            "\n\nclass Bare:\n    possible_agents = ['player_0', 'player_1']\n"
            "\n\nWORLD = Berries()\n\n\ndef again():\n    return WORLD\n"
            "\n\nclass Flat(Berries):\n"
            "    def observation_space(self, agent):\n        return Box(0, 1, (4,))\n"
            "\n\nclass Apart(Berries):\n"
            "    def action_space(self, agent):\n"
            "        return Discrete(5 if agent == 'player_0' else 4)\n"
            "\n\nclass Pale(Berries):\n    colours = [(0, 0, 0)]\n"
            "\n\nclass Below(Berries):\n"
            "    def observation_space(self, agent):\n"
            "        return Box(-1, 3, (5, 5), np.int8)\n"
        )
    assert bidist.main(tiny(bidist.__name__, "run", 1, "--substrate", name)) == 2
    err = capsys.readouterr().err
    assert WRONG[name] in err and err.count("\n") == 1
    assert not Path("run").exists()


def test_players_that_leave_end_the_run_in_one_sentence(my_world, capsys):
    with (my_world / "my_world.py").open("a") as file:
        file.write(
            "\n\nclass Leaves(Berries):\n"
            "    def step(self, actions):\n"
            "        views, rewards, ends, cuts, infos = super().step(actions)\n"
            "        return views, rewards, ends | {'player_0': True}, cuts, infos\n"
        )
    assert bidist.main(tiny(bidist.__name__, "run", 1, "--substrate", "my_world:Leaves")) == 1
    assert "an episode must end for all players at once" in capsys.readouterr().err


# What a world of the class NAME gives on reset() or step(), with what is wrong with it.
BROKEN = {
    "view['player_0'][0, 0] = 4": "a view holds kind 4, and its space has 0 to 3.",
    "view['player_1'][4, 4] = -1": "a view holds kind -1, and its space has 0 to 3.",
    "view['player_0'] = view['player_0'][0]": "a view has shape (5,), and its space (5, 5).",
    "view['player_1'] = view['player_1'][:4]": "a view has shape (4, 5), and its space (5, 5).",
    "view['player_0'] = view['player_0'] + .5": "a view has float64, where kinds are integers.",
    "del view['player_1']": "there is nothing for player_1 in its observations.",
}


@pytest.mark.parametrize("what", BROKEN)
def test_views_outside_their_space(what, my_world):
    """Unchecked, such ids read past the end of the networks' tables."""
    lines = ["    def look(self):", "        view = super().look()", f"        {what}"]
    add(my_world, "Broken", *lines, "        return view")
    with OwnWorlds("my_world:Broken", 1) as envs, pytest.raises(WorldError) as error:
        envs.reset()
    assert str(error.value) == f"my_world:Broken: {BROKEN[what]}"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("np.full((2, 3), 7)", "a state holds kind 7, and its space has 0 to 6."),
        ("np.full((1, 3), 6)", "a state has shape (1, 3), and its space (2, 3)."),
    ],
)
def test_a_state_outside_its_space(state, sentence, my_world):
    space = "    state_space = Box(0, 6, (2, 3), np.int8)"
    colours = "    colours = [(k, k, k) for k in range(7)]"
    add(my_world, "Seen", space, colours, "    def state(self):", f"        return {state}")
    with OwnWorlds("my_world:Seen", 1) as envs, pytest.raises(WorldError) as error:
        envs.reset()
    assert str(error.value) == f"my_world:Seen: {sentence}"


@pytest.mark.parametrize("number", range(1, 5))
def test_answers_without_a_player(number, my_world):
    """They end the run in one sentence, whichever of the dictionaries lacks one."""
    answer = ["    def step(self, actions):", "        answer = super().step(actions)"]
    add(
        my_world,
        "Short",
        *answer,
        f"        del answer[{number}]['player_1']",
        "        return answer",
    )
    names = ("observations", "rewards", "terminations", "truncations", "infos")
    with OwnWorlds("my_world:Short", 1) as envs:
        envs.reset()
        with pytest.raises(WorldError) as error:
            envs.step(np.zeros((1, 2), int))
    assert (
        str(error.value) == f"my_world:Short: there is nothing for player_1 in its {names[number]}."
    )


ROOT = PAGE.parents[1]


def code_of(page, word):
    """The indented block of a page that has this word."""
    blocks = re.split(r"\n(?=\S)", page.read_text())
    (block,) = (x for x in blocks if re.search(f"^    .*{re.escape(word)}", x, re.M))
    lines = block.splitlines()[1:]
    return textwrap.dedent("\n".join(x for x in lines if not x or x.startswith("    ")))


@pytest.mark.parametrize(
    ("word", "flags", "rows"),
    [
        ("mra.main(", "--task meet --populations 2 4 --num-envs 4", "| 2 nearest-first "),
        ("mappo_smac.main(", "--scenario mm --num-envs 2 --hidden-size 8 --heads 2", "| 3 focus "),
    ],
)
def test_worlds_of_ones_own_in_a_file(word, flags, rows, tmp_path):
    """A particle world and a family of battles, as the page has them."""
    (tmp_path / "own.py").write_text(code_of(PAGE, word))
    more = "--total-timesteps 400 --final-episodes 4 --eval-every 0 --run-dir run"
    line = [sys.executable, "own.py", *flags.split(), *more.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows in done.stdout


@pytest.mark.slow
def test_co_players_of_ones_own(tmp_path):
    """A function, and a puppet with one goal, beside a policy of the zoo."""
    line = [sys.executable, "-c", code_of(ROOT / "docs/forks.md", "coins_defector")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *alone, goals, results = done.stdout.splitlines()
    assert len(alone) == 2 and goals == "['COOPERATE', 'DEFECT', 'SPITE']"
    assert results.count("focal_return=") == 2
