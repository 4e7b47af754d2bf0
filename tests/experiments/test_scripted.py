"""What scripted players earn, against figures made here."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_up import ROOT, command, experiment, rows

from envs.particle import episodes as particle_episodes
from envs.particle.worlds import ParticleWorld, nearest_first
from envs.smac import resource_collection
from envs.smac.resource_collection import collector


@pytest.mark.long
def test_returns_of_bots(tmp_path):
    """Both tables against figures made here from the lines of the CSV."""
    names = {"visitors": ("puppet_cooperator_0", "random"), "residents": ("puppet_defector_0",)}
    words = ["--episodes", 2, "--steps", 120, "--jobs", 1, "--out", tmp_path / "x"]
    for name, players in names.items():
        words += [f"--{name}", *players]
    code, printed, _ = command("scripted", "meltingpot", "coins", *words)
    found, text = rows(tmp_path / "x.csv"), (tmp_path / "x.md").read_text()
    assert code == 0 and text in printed and len(found) == 4
    total = lambda key, chosen: sum(float(row[key]) for row in chosen)  # noqa: E731
    for visitor in names["visitors"]:
        chosen = [row for row in found if row["visitor"] == visitor]
        steps = total("length", chosen)
        means = [1000 * total(f"{who}_return", chosen) / steps for who in ("visitor", "resident")]
        (line,) = (x for x in text.splitlines() if x.startswith(f"| {visitor} |") and "/" in x)
        cells = line.split("|")[2].split("/")
        for cell, mean in zip(cells, means):
            assert abs(float(cell.split("[")[0]) - mean) < 0.051
    share = 100 * total("resident_fitting", found) / total("resident_acts", found)
    speed = 100 * total("resident_fitting", found) / total("length", found)
    line, events = (x for x in text.splitlines() if x.startswith("| puppet_defector_0 |"))
    coins = 1000 * total("resident_acts", found) / total("length", found)
    assert f" {coins:.1f} " in events.split("|")  # all that an event tells here
    assert line.split("|")[2].startswith(f" {share:.1f} [")
    assert line.split("|")[3].startswith(f" {speed:.2f} [")
    assert share == 100  # for a defector all coins are right


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are read from /proc")
def test_players_end_with_a_killed_parent(tmp_path):
    def state(pid: str) -> str:  # "" or "Z" if the process has ended
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return ""

    words = ["meltingpot", "coins", "--episodes", 5000, "--steps", 20, "--jobs", 1, "--out"]
    line = [sys.executable, ROOT / "experiments/scripted.py", *words, tmp_path / "x"]
    with subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE) as parent:
        shown = b""
        while not re.search(rb"\| [1-9]\d*/", shown):  # the bar: an episode has been played
            more = os.read(parent.stderr.fileno(), 4096)
            assert more, shown
            shown += more
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        players = [pid for pid in children if b"spawn_main" in words[pid]]
        parent.kill()
    end = time.monotonic() + 60
    assert players
    while any(state(pid) not in ("", "Z") for pid in players):
        assert time.monotonic() < end, "a player goes on without its parent"
        time.sleep(0.1)


def test_a_bot_beside_itself_is_one_episode():
    """Its two seats' acts depend on each other: they are no two draws for the interval."""
    study = experiment("scripted")
    row = {"visitor": "a", "resident": "a", "length": 100}
    row |= {"visitor_acts": 3, "visitor_fitting": 2, "resident_acts": 5, "resident_fitting": 5}
    assert study.of_bot(row, "a") == (8, 7, 200)
    assert study.of_bot(row | {"visitor": "b"}, "a") == (5, 5, 100)
    assert study.of_bot(row | {"visitor": "b"}, "b") == (3, 2, 100)
    assert study.of_bot(row, "b") is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("nowhere", r"Unknown substrate 'nowhere': .*"),
        ("daycare", r"daycare has no scripted bots: see docs/scenarios\.md\."),
        ("coins --visitors nobody", r"coins has no puppet nobody: see .*\."),
        ("coins --residents goal:NAP", r"coins has no goal goal:NAP: it has .*\."),
        ("coins --episodes 0", r"--episodes 0: .*"),
        ("coins --steps 0", r"--steps 0: .*"),
        ("coins --jobs -1", r"--jobs -1: .*"),
        ("coins --seed -1", r"--seed -1: .*"),
        ("coins --out {file}/below/x", r".*Not a directory.*"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, tmp_path):
    (tmp_path / "file").touch()
    words = flags.format(file=tmp_path / "file").split()
    code, _, stderr = command("scripted", "meltingpot", *words)
    (line,) = stderr.splitlines()
    assert code == 2 and re.fullmatch("error: " + sentence, line), line


def test_particle_players(tmp_path, monkeypatch):
    """Means in the table are those of episodes played here, in the same worlds."""
    monkeypatch.setattr(experiment("scripted"), "POPULATIONS", {"treasure": ("3",)})
    words = ["--tasks", "treasure", "--episodes", 64, "--seed", 11, "--out", tmp_path / "x"]
    code, printed, _ = command("scripted", "particle", *words)
    found = {row["player"]: row for row in rows(tmp_path / "x.csv")}
    world = ParticleWorld("treasure", 3, 64, seed=11)
    mean = particle_episodes.play(world, nearest_first).mean()
    assert code == 0 and abs(float(found["nearest-first"]["mean"]) - mean) < 1e-4
    assert float(found["random"]["high"]) < float(found["nearest-first"]["low"])
    assert (tmp_path / "x.md").read_text() in printed
    assert f"| treasure | 3 | agent | {float(found['random']['mean']):.2f} [" in printed


def test_combat():
    """Figures of the environment's own functions; what cannot be had is refused."""
    words = ["--scenarios", "sz", "--episodes", 16]
    code, printed, _ = command("scripted", "combat", *words, "--team-sizes", 3)
    module = experiment("scripted")
    battles = module.make_battles("sim", "sz", (3,), 16, 1, once=True)
    won = np.mean(
        [e.won for e in module.combat_episodes.play(battles, module.combat_episodes.focus)]
    )
    assert code == 0 and re.search(rf"\| sz 3 focus +\| {won:.3f} \[", printed)
    for flags, sentence in (
        ("--team-sizes 9", "not 9"),
        ("--backend sc2 --enemy-ai focus", "--enemy-ai"),
        ("--game-version 4.10.0", "--backend sc2"),
    ):
        code, _, stderr = command("scripted", "combat", *words, *flags.split())
        assert code == 2 and sentence in stderr and stderr.count("\n") == 1


def test_scripts_of_resource_collection():
    """Figures of the environment's own functions; bad sizes are refused."""
    code, table, _ = command("scripted", "collection", "--team-sizes", 3, "--episodes", 8)
    worlds = resource_collection.ResourceCollection((3,), 8, 1, once=True)
    earned = np.mean([e.reward for e in resource_collection.play(worlds, collector)])
    row = next(line for line in table.splitlines() if "3 collector" in line)
    assert code == 0 and f"| {earned:.1f} [" in row and row.rstrip(" |").endswith(" 8")
    still = next(line for line in table.splitlines() if "3 still" in line).split("|")
    assert float(still[3]) == 0 < float(still[4])  # nothing is picked up, invaders are caught
    assert command("scripted", "collection", "--team-sizes", 9)[::2] == (
        2,
        "error: Teams of resource have 1 to 8 agents: not 9.\n",
    )
