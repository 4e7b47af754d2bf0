"""The adapter to StarCraft II, without the game: against a simulator that speaks its messages.

These tests need s2clientprotocol and pysc2 (requirements-sc2.txt) and protobuf's Python
implementation, which has to be chosen before Python starts: where it is not, one test runs this
file again in a process where it is.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import index, script

from envs.smac import episodes as combat_episodes
from envs.smac import game as smac
from envs.smac.combat import FAMILIES, FIRST_TARGET, SIDE, SLOTS, Combat, Snapshot, begin
from envs.smac.game import FAILURES, BattleError, RealBattles, draw, make_battles

ROOT = Path(__file__).resolve().parents[2]
SIZES = (3, 4, 5, 6, 7, 8)
IMPLEMENTATION = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
INSTALLED = all(importlib.util.find_spec(name) for name in ("s2clientprotocol", "pysc2"))
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # protobuf's, about the age of s2clientprotocol's files
        from sc2_controller import IDS, SimulatedGame, failing

    SPEAKS = True
except (ImportError, TypeError):
    SPEAKS = False

spoken = pytest.mark.skipif(
    not SPEAKS,
    reason="test_in_a_process_of_its_own runs it"
    if INSTALLED
    else "s2clientprotocol and pysc2 are not installed: requirements-sc2.txt",
)
pytestmark = pytest.mark.filterwarnings("ignore:StarCraft II:UserWarning")


@pytest.mark.skipif(SPEAKS, reason="it runs here")
@pytest.mark.skipif(not INSTALLED, reason="pysc2 is not installed: requirements-sc2.txt")
@pytest.mark.parametrize(
    "which",
    [
        "not slow and not long",
        pytest.param("long and not slow", marks=pytest.mark.long),
        pytest.param("slow", marks=pytest.mark.slow),
    ],
)
def test_in_a_process_of_its_own(which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-m", which]
    env = os.environ | IMPLEMENTATION
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".") and len(text) < 500


def play(battles, rng: np.random.Generator) -> np.ndarray:
    """Available actions at random, attacks twenty times as often."""
    weight = battles.obs.avail.numpy().astype(float)
    weight[..., FIRST_TARGET:] *= 20
    part = weight.cumsum(-1) / weight.sum(-1, keepdims=True)
    return (part > rng.random(weight.shape[:2])[..., None]).argmax(-1)


def real(scenario="sz", sizes=(3,), num_battles=1, game=None, **options) -> RealBattles:
    make = game or SimulatedGame
    return RealBattles(scenario, sizes, num_battles, seed=3, launch=make, **options)


# --- The adapter and the simulator are the same world ---------------------------------------------


@spoken
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("scenario", FAMILIES)
def test_equals_the_simulator_step_by_step(scenario, once):
    """Bit by bit. Of the dead the game says nothing, so they stay where they were last seen."""
    limit = 45 if scenario == "protoss" else 70  # so that some battles reach it
    options = dict(episode_limit=limit, once=once, first_battle=5)
    mine = real(scenario, SIZES, 3, lambda: SimulatedGame(1935 + len(scenario)), **options)
    sim = Combat(scenario, SIZES, 3, seed=3, weapon_delay=False, **options)
    rng, episodes, losses = np.random.default_rng(0), [], 0
    for t in range(200):
        if t == 0 or (once and bool(sim.over.all())):
            assert mine.reset() and sim.reset()
        assert torch.equal(mine.over, sim.over)
        actions = play(sim, rng)
        step, expected = mine.step(actions), sim.step(actions)
        for name in ("reward", "terminated", "truncated"):
            assert torch.equal(getattr(step, name), getattr(expected, name)), (t, name)
        assert step.episodes == expected.episodes
        episodes += step.episodes
        check(step.final, expected.final)
        check(mine.snapshot, sim.snapshot)
        losses += int((~sim.snapshot.alive).any())
        for name in step.obs._fields:
            assert torch.equal(getattr(step.obs, name), getattr(sim.obs, name)), (t, name)
        again = mine.observe(mine.snapshot)
        assert all(torch.equal(x, y) for x, y in zip(again, step.obs))
    assert len(episodes) > 5 and losses > 30
    assert {e.length == limit for e in episodes} == {True, False}
    mine.close()


def check(mine: Snapshot, theirs: Snapshot) -> None:
    assert torch.equal(mine.type, theirs.type) and torch.equal(mine.alive, theirs.alive)
    assert torch.equal(mine.tag, theirs.tag)
    alive = mine.alive
    for name in ("x", "y", "health", "shield", "energy"):
        assert torch.equal(getattr(mine, name)[alive], getattr(theirs, name)[alive]), name
    ally = alive & (torch.arange(SLOTS) < SIDE)
    assert torch.equal(mine.cooldown[ally], theirs.cooldown[ally])


@spoken
@pytest.mark.parametrize("scenario", FAMILIES)
def test_a_win_pays_what_the_simulator_pays(scenario):
    """Units that fight win some battles, and lose some."""
    mine, found = real(scenario, (3,), 24, once=True), []
    sim = Combat(scenario, (3,), 24, seed=3, weapon_delay=False, once=True)
    for battles in (mine, sim):
        found.append(combat_episodes.play(battles, combat_episodes.focus))
    assert found[0] == found[1]
    wins = [e for e in found[0] if e.won]
    assert 1 < len(wins) < 20 and all(e.reward > 6 and e.allies for e in wins)
    medics = scenario == "terran"  # Medivacs may be left
    assert all(e.enemies == 0 or medics for e in wins)
    mine.close()


def test_draw_is_the_simulators():
    """Groups of one unit stand in the simulator where draw() puts them; tags and team are its
    own."""
    sim = Combat("mmm", SIZES, 64, seed=9)
    alone = 0
    for b in range(64):
        points = draw(sim.units[b], sim.battles[b], b, sim.setup)
        drawn, team = sim.units[b].copy(), sim.battles["team"][b]
        sim.battles["episode"][b] -= 1
        begin(sim.units[b], sim.battles[b], b, sim.setup)
        assert (drawn == sim.units[b]).all() and team == sim.battles["team"][b]
        for side in range(2):
            for t in range(3):
                group = sim.setup.allies[t] if side == 0 else t
                kind = sim.setup.types[group]
                units = drawn[SIDE * side : SIDE * (side + 1)]
                units = units[units["type"] == kind]
                assert len(units) == sim.setup.teams[team][group]
                if len(units):
                    middle = units["x"].mean(), units["y"].mean()
                    far = np.hypot(*(points[side, t] - middle))
                    assert far < 2.5
                    alone += len(units) == 1 and far < 1e-5
    assert alone > 20


@spoken
@pytest.mark.parametrize("size", [32, 48])
def test_maps_of_other_sizes_are_seen_from_their_centre(size):
    mine = real("sz", (3,), 1, lambda: SimulatedGame(size=size))
    sim = Combat("sz", (3,), 1, seed=3, weapon_delay=False)
    torch.testing.assert_close(mine.reset().entities, sim.reset().entities, atol=1e-5, rtol=0)
    actions = np.where(sim.obs.avail[..., 2], 2, sim.obs.avail.int().argmax(-1))
    a, b = mine.step(actions), sim.step(actions)
    torch.testing.assert_close(a.obs.entities, b.obs.entities, atol=1e-5, rtol=0)
    mine.close()


@spoken
def test_control_of_the_enemy_is_asked_for_once_per_game():
    """In the game it is a switch: a second time takes it away."""
    games = []
    mine = real("sz", (3,), 1, lambda: games.append(SimulatedGame()) or games[-1], episode_limit=3)
    mine.reset()
    for _ in range(12):
        mine.step(np.where(mine.obs.avail[..., 0], 0, 1))
    assert len(games) == 1 and games[0].made == 5 and games[0].control
    mine.close()
    assert games[0].closed


@spoken
def test_state_is_which_episodes_have_begun():
    def entities(battles):
        return battles.reset().entities.clone()

    first, second, sim = real(), real(), Combat("sz", (3,), 1, seed=3)
    for _ in range(3):
        entities(first)
        sim.reset()
    first.load_state_dict(first.state_dict())
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="comes reset"):
        first.step(np.where(first.obs.avail[..., 0], 0, 1))
    assert torch.equal(entities(second), entities(first))
    assert torch.equal(second.obs.entities, sim.reset().entities)
    first.seed(4)
    assert torch.equal(entities(first), Combat("sz", (3,), 1, seed=4).reset().entities)
    with pytest.raises(ValueError, match="not of 1 battles"):
        real("csz").load_state_dict(first.state_dict())
    for battles in (sim, real(num_battles=2)):
        with pytest.raises(ValueError, match="state is not of"):
            first.load_state_dict(battles.state_dict())
    first.close(), second.close()


@spoken
def test_unavailable_actions_do_not_reach_the_game():
    mine = real()
    mine.reset()
    asked = len(mine.games[0].controller.log)
    with pytest.raises(ValueError, match="is not available"):
        mine.step(np.zeros((1, SIDE), int))
    assert len(mine.games[0].controller.log) == asked
    mine.close()


# --- Failures -------------------------------------------------------------------------------------


@spoken
@pytest.mark.parametrize("once", [False, True])
def test_a_game_that_quits_loses_the_episode_and_is_started_again(once):
    games = []

    def launch():
        fail = failing("step", 20) if not games else None
        games.append(SimulatedGame(fail=fail))
        return games[-1]

    mine = real("sz", (3,), 1, launch, once=once)
    mine.reset()
    stay = lambda: np.where(mine.obs.avail[..., 0], 0, 1)  # noqa: E731
    with pytest.warns(UserWarning, match="started again: it has quit"):
        while not (step := mine.step(stay())).truncated.any():
            last = [x.clone() for x in mine.snapshot]
    episode = step.episodes[0]
    assert not episode.won and 10 < episode.length < 25 and mine.lost == [1]
    assert step.reward == 0 and not step.terminated.any()
    assert all(torch.equal(x, y) for x, y in zip(step.final, last))
    assert games[0].closed and len(games) == (1 if once else 2)
    if once:
        assert mine.over.all()
        mine.reset()
    sim = Combat("sz", (3,), 1, seed=3)
    sim.reset()
    assert torch.equal(mine.obs.entities, sim.reset().entities)
    mine.close()
    assert games[1].closed


@spoken
@pytest.mark.parametrize("request_name", ["create_game", "join_game", "data", "debug", "observe"])
def test_games_that_always_fail_end_in_one_sentence(request_name):
    games = []

    def launch():
        games.append(SimulatedGame(fail=failing(request_name, 0, "no answer within 120 s")))
        return games[-1]

    mine = real("sz", (3,), 1, launch)
    with pytest.raises(BattleError, match=r"3 times in a row.*no answer within 120 s") as error:
        mine.reset()
    assert sentence(str(error.value)) and len(games) == FAILURES
    assert all(game.closed for game in games)


@spoken
def test_one_of_many_games_fails_and_none_is_left():
    games = []

    def launch():
        fail = failing("step", 4) if games else None
        games.append(SimulatedGame(fail=fail))
        return games[-1]

    mine = real("sz", (3,), 3, launch)
    with pytest.raises(BattleError) as error:
        mine.reset()
        for _ in range(100):
            mine.step(np.where(mine.obs.avail[..., 0], 0, 1))
    mine.close()
    assert sentence(str(error.value)) and all(game.closed for game in games)


@spoken
def test_waits_are_bounded():
    """Units that never appear; units that nobody can kill, which made resets endless (smacv2 55);
    an enemy that ignores its order."""

    def never():
        return SimulatedGame(delay=10**9)

    def immortal():
        game = SimulatedGame()
        game.extra = 2
        return game

    def deaf():
        game = SimulatedGame()
        game.control = True  # asking for it now takes it away
        return game

    for launch, said in ((never, "0 units .* not 6"), (immortal, "2 units .* not 0")):
        with pytest.raises(BattleError, match=said) as error:
            real("sz", (3,), 1, launch).reset()
        assert sentence(str(error.value)) and "200 frames" in str(error.value)
    mine = real("sz", (3,), 1, deaf)
    mine.reset()
    with pytest.raises(BattleError, match="does not follow its order") as error:
        for _ in range(FAILURES):
            mine.step(np.where(mine.obs.avail[..., 0], 0, 1))
    assert sentence(str(error.value)) and mine.lost == [FAILURES - 1]


@spoken
def test_slow_units_are_waited_for():
    mine = real("sz", (3,), 1, lambda: SimulatedGame(delay=30))
    assert torch.equal(mine.reset().entities, Combat("sz", (3,), 1, seed=3).reset().entities)
    mine.close()


@spoken
def test_games_are_started_anew_every_n_episodes():
    games = []
    mine = real(
        game=lambda: games.append(SimulatedGame()) or games[-1], restart_every=2, episode_limit=1
    )
    mine.reset()
    for _ in range(6):
        mine.step(np.where(mine.obs.avail[..., 0], 0, 1))
    assert [game.made for game in games] == [2, 2, 2, 1] and mine.lost == [0]
    assert [game.closed for game in games] == [True, True, True, False]
    mine.close()


@spoken
def test_maps_without_passive_units_and_small_maps():
    def bare():
        game = SimulatedGame()
        game.custom = {}
        return game

    with pytest.raises(BattleError, match="no unit types Zealot_RL, Stalker_RL") as error:
        real(game=bare).reset()
    assert sentence(str(error.value))
    with pytest.raises(BattleError, match="is 24 x 24: 32 x 32") as error:
        real(game=lambda: SimulatedGame(size=24)).reset()
    assert sentence(str(error.value))
    assert sorted(IDS.values()) == [4, 9, 48, 51, 54, 73, 74, 105, 107]


def test_make_battles():
    sim = make_battles("sim", "csz", (3,), 2, 1, once=True, enemy_ai="focus")
    assert type(sim) is Combat and sim.num_battles == 2
    with pytest.raises(ValueError, match="no backend 'scii'"):
        make_battles("scii")
    for option in ("enemy_ai", "weapon_delay", "threads"):
        with pytest.raises(ValueError, match="StarCraft II has its own"):
            make_battles("sc2", **{option: 1})
    for option in ("timeout", "restart_every"):
        with pytest.raises(ValueError, match=f"{option} is a whole number"):
            make_battles("sc2", launch=lambda: None, **{option: 0})


def test_missing_packages(monkeypatch):
    for name in ("s2clientprotocol", "pysc2"):
        with monkeypatch.context() as patch:
            patch.setattr(smac, "messages", smac.messages if name != "pysc2" else lambda: None)
            patch.setitem(sys.modules, name, None)
            with pytest.raises(BattleError, match=r"requirements-sc2\.txt") as error:
                make_battles("sc2")
            assert sentence(str(error.value))


@pytest.mark.skipif(not INSTALLED, reason="pysc2 is not installed: requirements-sc2.txt")
def test_other_implementation_of_protobuf():
    code = "from envs.smac.game import make_battles; make_battles('sc2')"
    env = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "upb"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "BattleError" in last and "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python" in last
    assert sentence(last)


def test_no_game_and_no_map(tmp_path, monkeypatch):
    monkeypatch.setenv("SC2PATH", str(tmp_path / "nowhere"))
    with pytest.raises(BattleError, match=r"not at .*nowhere.*SC2PATH") as error:
        smac.find_game()
    assert sentence(str(error.value))
    (tmp_path / "Versions" / "Base75689").mkdir(parents=True)
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    assert smac.find_game() == tmp_path
    with pytest.raises(BattleError, match=r"no empty_passive.SC2Map in .*Maps") as error:
        smac.find_map(tmp_path, "empty_passive")
    assert sentence(str(error.value))


# --- Through pysc2, with a process that speaks the game's protocol --------------------------------


@pytest.fixture
def game_home(tmp_path, monkeypatch):
    """An installation whose game is tests/sc2_controller.py."""
    program = tmp_path / "Versions" / "Base75689" / "SC2_x64"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/sc2_controller.py "$@"\n')
    program.chmod(0o755)
    (tmp_path / "Maps" / "SMAC_Maps").mkdir(parents=True)
    (tmp_path / "Maps" / "SMAC_Maps" / "empty_passive.SC2Map").write_bytes(b"map")
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    return tmp_path


linux = pytest.mark.skipif(sys.platform != "linux", reason="pysc2 starts other programs elsewhere")


@spoken
@linux
def test_a_battle_through_pysc2(game_home):
    mine = make_battles("sc2", "mmm", (8,), 1, 3, timeout=60, once=True)
    assert mine.game_version == "4.10.0 (build 75689)"
    sim = Combat("mmm", (8,), 1, seed=3, weapon_delay=False, once=True)
    assert torch.equal(mine.reset().entities, sim.reset().entities)
    rng = np.random.default_rng(0)
    for _ in range(25):
        actions = play(sim, rng)
        step, expected = mine.step(actions), sim.step(actions)
        assert torch.equal(step.reward, expected.reward)
        assert torch.equal(step.obs.avail, expected.obs.avail)
    process = mine.games[0].controller.process
    mine.close()
    assert not process.running


@spoken
@linux
@pytest.mark.parametrize("how", ["crash", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_game_that_dies_or_hangs_through_pysc2(game_home, monkeypatch, how):
    monkeypatch.setenv("MISBEHAVE", how)
    mine = make_battles("sc2", "sz", (3,), 1, 3, timeout=60 if how == "crash" else 10, once=True)
    mine.reset()
    said = "it has quit" if how == "crash" else "no answer within 10 s"
    with pytest.warns(UserWarning, match=said):
        while not mine.step(np.where(mine.obs.avail[..., 0], 0, 1)).truncated.any():
            pass
    assert mine.lost == [1] and mine.games == [None]
    mine.close()


SILENT = """import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-port") + 1])))
connection = listener.accept()
time.sleep(60)"""


@spoken
@linux
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(f"#!{sys.executable}\n{SILENT}\n", marks=pytest.mark.long),
        "#!/bin/sh\nexit 1\n",
    ],
)
def test_a_game_that_never_answers_through_pysc2(game_home, monkeypatch, program):
    """A local port that takes the connection and says nothing; a program that ends at once."""
    (game_home / "Versions" / "Base75689" / "SC2_x64").write_text(program)
    monkeypatch.setattr(smac, "FAILURES", 2)
    mine, started = make_battles("sc2", "sz", (3,), 1, 3, timeout=4), time.monotonic()
    said = "no answer within 4 s" if SILENT in program else "websocket"
    with pytest.raises(BattleError, match=f"2 times in a row.*{said}") as error:
        mine.reset()
    assert sentence(str(error.value)) and time.monotonic() - started < 30


@spoken
@linux
def test_an_unknown_version(game_home):
    with pytest.raises(BattleError, match="Unknown game version") as error:
        make_battles("sc2", game_version="4.6.2")
    assert "\n" not in str(error.value)


# --- Scripts --------------------------------------------------------------------------------------


def tiny(run_dir: str, steps: int, *flags: str) -> list[str]:
    """The command line of a run of a script in the game."""
    argv = "--backend sc2 --num-envs 2 --batch-size 2 --buffer-size 6 --updates-per-iteration 1 "
    argv += "--hidden-size 8 --heads 2 --rnn-size 4 --mixing-size 3 --max-episode-steps 6 "
    argv += "--team-sizes 3 4 --eval-team-sizes 5 --eval-every 16 --eval-episodes 2 "
    argv += "--final-episodes 3 --save-every 0 --log-every 8 --device cpu "
    return [*argv.split(), "--total-timesteps", str(steps), "--run-dir", run_dir, *flags]


@pytest.fixture
def games(monkeypatch):
    """What a script starts; no more of them at a time than --num-envs says."""
    games, most = [], []

    def launch():
        games.append(SimulatedGame())
        most.append(sum(not game.closed for game in games))
        return games[-1]

    def start(*args, game_version=None, **options):
        assert game_version in (None, "4.10.0")
        return RealBattles(*args, launch=launch, **options)

    monkeypatch.setattr(smac, "make_battles", start)
    yield games
    assert max(most) <= 2 and all(game.closed for game in games)


@spoken
@pytest.mark.parametrize("name", ["baselines.refil_smac", "mipi_refil_smac"])
@pytest.mark.parametrize("every", ["16", "0"])
def test_a_script_plays_in_the_game(name, every, games, tmp_path, monkeypatch, capfd):
    """Training, evaluations and the final one, never with more games than asked for; a run is gone
    on with where its episodes were, in the same version, and can be evaluated."""
    monkeypatch.chdir(tmp_path)
    module = script(name)
    torch.set_num_threads(1)
    begun = tiny("run", 30, "--eval-every", every, "--game-version", "4.10.0")
    assert module.main(begun) == 0
    stored = json.loads(Path("run/args.json").read_text())
    assert stored["game_version"] == "4.10.0" and stored["resolved"]["game_version"] == "none"
    summary = json.loads(Path("run/summary.json").read_text())["eval"]
    assert list(summary) == ["3", "4", "5"]  # scripted policies are the simulator's
    assert {row["lost_to_failures"] for row in summary.values()} == {0}
    first = index("run")[0]["timesteps"], len(games)
    more = ["--resume", "run", "--total-timesteps", "60"]
    assert module.main([*more, "--game-version", "4.6.2"]) == 2
    assert "--game-version 4.10.0" in capfd.readouterr().err
    assert module.main([*more, "--backend", "sim"]) == 2 and len(games) == first[1]
    assert module.main([*more, "--num-envs", "1"]) == 2 and len(games) == first[1]
    assert "is a run with --num-envs 2" in capfd.readouterr().err
    assert module.main(more) == 0
    assert json.loads(Path("run/summary.json").read_text())["timesteps"] >= 60 > first[0]
    before = len(games)
    assert module.main(["--eval-only", "run", "--final-episodes", "2"]) == 0
    assert len(games) == before + 3 * 2
    one = ["--eval-only", "run", "--final-episodes", "2", "--num-envs", "1"]
    assert module.main(one) == 0  # a run in many simulated battles is evaluated in few games
    assert len(games) == before + 3 * 2 + 3 * 1


@spoken
def test_a_script_counts_what_a_failing_game_cuts_short(tmp_path, monkeypatch, capfd):
    """A game that quits loses its episode, and the run goes on; one that always does ends it, with
    what has been learned saved."""
    monkeypatch.chdir(tmp_path)
    module, made = script("baselines.refil_smac"), []

    def launch():
        name, after = ("step", 8) if len(made) == 1 else ("create_game", 0 if len(made) > 2 else 9)
        made.append(SimulatedGame(fail=failing(name, after)))
        return made[-1]

    start = lambda *args, game_version=None, **kw: RealBattles(*args, launch=launch, **kw)  # noqa: E731
    monkeypatch.setattr(smac, "make_battles", start)
    with pytest.warns(UserWarning, match="started again: it has quit"):
        assert module.main(tiny("run", 400, "--eval-every", "0")) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "3 times in a row" in error and sentence(error)
    assert index("run")[0]["timesteps"] > 12 and all(game.closed for game in made)


@spoken
def test_scripted_agents_in_the_game(monkeypatch, capsys):
    """`scripted.py combat`: the simulator's figures; a game that fails is a sentence."""
    scripts = importlib.import_module("experiments.scripted")
    plan = {"scenarios": ("sz",), "team_sizes": (3,), "episodes": 4, "seed": 3}
    make, fail = scripts.make_battles, [None]

    def start(backend, *args, game_version=None, **options):
        launch = lambda: SimulatedGame(fail=fail[0])  # noqa: E731
        return RealBattles(*args, launch=launch, **options)

    monkeypatch.setattr(scripts, "make_battles", start)
    scripts.combat(scripts.Battles(**plan, backend="sc2", num_envs=2))
    mine = capsys.readouterr()
    assert mine.err == "" and "sz 3 focus" in mine.out
    fail[0] = failing("observe", 30)
    with pytest.raises(scripts.UsageError, match=r"3 times in a row"):
        scripts.combat(scripts.Battles(**plan, backend="sc2", num_envs=2))
    monkeypatch.setattr(scripts, "make_battles", make)
    for wrong, said in (
        ({"team_sizes": (9,)}, "not 9"),
        ({"backend": "sc2", "enemy_ai": "focus"}, "--enemy-ai"),
        ({"game_version": "4.10.0"}, "--backend sc2"),
    ):
        with pytest.raises(scripts.UsageError, match=said):
            scripts.combat(scripts.Battles(**plan | wrong))
