"""The studies in experiments/, on runs of the toy world."""

import csv
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from runs import BIDIST, ROOT, STEPS, script, tiny

sys.path.insert(0, str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two seeds of one group, eight iterations each."""
    paths = [tmp_path_factory.mktemp("runs") / f"toy-s{seed}" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        argv = tiny(BIDIST, path, 8, "--seed", seed, "--final-episodes", 3)
        assert script(BIDIST).main(argv) == 0
    return paths


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_compare_runs(two, tmp_path, capsys):
    compare = importlib.import_module("compare_runs")
    every, names = 3 * STEPS, ("entropy", "kl")
    study = compare.Comparison(
        tuple(two), tmp_path / "new/x", names, every, means=("reverse/kl_after",)
    )
    compare.main(study)
    printed = capsys.readouterr().out
    assert (tmp_path / "new/x.md").read_text() in printed
    assert (tmp_path / "new/x.png").read_bytes()[:4] == b"\x89PNG"
    found = rows(tmp_path / "new/x.csv")
    for path in two:
        log = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        for name in names:
            values = [m[name] for m in log if name in m]
            expected = [np.mean(values[:3]), np.mean(values[3:6])]  # the third window is not full
            points = [r for r in found if (r["run"], r["scalar"]) == (path.name, name)]
            assert [int(r["timesteps"]) for r in points] == [every, 2 * every]
            assert np.allclose([float(r["mean"]) for r in points], expected, rtol=1e-4)
        phases = [m["reverse/kl_after"] for m in log if "reverse/kl_after" in m]
        assert len(phases) == 4 and f"| {path.name} | {np.mean(phases):.3g} |" in printed
        result = json.loads((path / "summary.json").read_text())["eval"]["v random"]
        assert f"| {path.name} | v random | {result['return_per_1000']:.1f} [" in printed


def test_a_run_that_has_not_ended_has_no_row(two, tmp_path, capsys):
    compare = importlib.import_module("compare_runs")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_text("")
    compare.main(compare.Comparison((two[0], tmp_path / "begun"), tmp_path / "x"))
    printed = capsys.readouterr().out
    assert "| toy-s1 |" in printed and "begun" not in printed


def test_reverse_distillation(two, tmp_path, monkeypatch, capsys):
    study = importlib.import_module("reverse_distillation")
    argv = ["x", *map(str, two), "--rates", "1e-5", "1e-2", "--epochs", "2", "--num-envs", "4"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "new/reverse")])
    study.main()
    found = rows(tmp_path / "new/reverse.csv")
    assert len(found) == 2 * 3 * 2  # runs, distances, rates
    for slow, fast in zip(found[::2], found[1::2]):
        assert slow["kl_before"] == fast["kl_before"]
        assert float(fast["kl_after"]) > float(slow["kl_after"]) > 0
    assert Path(tmp_path / "new/reverse.png").exists()
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| initial")]
    assert len(table) == 2  # a line per rate: the mean over runs
    mean = np.mean([float(r["kl_after"]) for r in found if r["phi"] == "initial"][1::2])
    assert f"-> {mean:.3f} |" in table[1]


def test_memory_of_a_rollout(capsys):
    """Ids need 2 bytes a tile, pixels 8 * 8 * 3: 96 times as much."""
    pytest.importorskip("dmlab2d")
    bench = importlib.import_module("bench_meltingpot")
    bench.bench_memory(bench.Bench(substrates=("coins",)))
    line = capsys.readouterr().out.splitlines()[-1]
    views = 16 * 200 * 2 * 88 * 88 * 3 / 1e6  # two views of 11x11 tiles, in MB
    assert [x.strip() for x in line.strip("| ").split("|")][1:4] == [
        f"{views / 96:.1f} MB",
        f"{views:,.0f} MB",
        "96",
    ]


def test_returns_of_bots(tmp_path, capsys):
    """Both tables against figures made here from the lines of the CSV."""
    study = importlib.import_module("bot_returns")
    names = {"visitors": ("puppet_cooperator_0", "random"), "residents": ("puppet_defector_0",)}
    study.main(study.Study("coins", **names, episodes=2, steps=120, jobs=1, out=tmp_path / "x"))
    found, text = rows(tmp_path / "x.csv"), (tmp_path / "x.md").read_text()
    assert text in capsys.readouterr().out and len(found) == 4
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


def test_a_bot_beside_itself_is_one_episode():
    """Its two seats' acts depend on each other: they are no two draws for the interval."""
    study = importlib.import_module("bot_returns")
    row = {"visitor": "a", "resident": "a", "length": 100}
    row |= {"visitor_acts": 3, "visitor_fitting": 2, "resident_acts": 5, "resident_fitting": 5}
    assert study.of_bot(row, "a") == (8, 7, 200)
    assert study.of_bot(row | {"visitor": "b"}, "a") == (5, 5, 100)
    assert study.of_bot(row | {"visitor": "b"}, "b") == (3, 2, 100)
    assert study.of_bot(row, "b") is None


@pytest.mark.parametrize(
    ("module", "flags", "sentence"),
    [
        ("bot_returns", "nowhere", r"Unknown substrate 'nowhere': .*"),
        ("bot_returns", "daycare", r"daycare has no scripted bots: see docs/scenarios\.md\."),
        ("bot_returns", "coins --visitors nobody", r"coins has no puppet nobody: see .*\."),
        ("bot_returns", "coins --residents goal:NAP", r"coins has no goal goal:NAP: it has .*\."),
        ("bot_returns", "coins --episodes 0", r"--episodes 0 is not positive\."),
        ("bot_returns", "coins --steps 0", r"--steps 0 is not positive\."),
        ("bot_returns", "coins --jobs -1", r"--jobs -1 is negative\."),
        ("bot_returns", "coins --seed -1", r"--seed -1 is negative\."),
        ("bot_returns", "coins --out {file}/below/x", r".*Not a directory.*"),
        ("bench_scenarios", "--substrates nowhere", r"Unknown substrate 'nowhere': .*"),
        ("bench_scenarios", "--substrates coins --scenarios SC9", r"coins has no scenario SC9: .*"),
        ("bench_scenarios", "--substrates daycare", r"daycare has no scenarios with scripted .*"),
        ("bench_scenarios", "--num-envs 0", r"--num-envs 0 is not positive\."),
        ("bench_scenarios", "--num-workers -1", r"--num-workers -1 is negative\."),
    ],
)
def test_bad_input_is_one_sentence(module, flags, sentence, tmp_path, capsys):
    study = importlib.import_module(module)
    (tmp_path / "file").touch()
    kind = study.Study if module == "bot_returns" else study.Bench
    options = tyro.cli(kind, args=flags.format(file=tmp_path / "file").split())
    with pytest.raises(SystemExit) as end:
        study.main(options)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch("error: " + sentence, line), line


def test_speed_of_scenarios(capsys):
    bench = importlib.import_module("bench_scenarios")
    few = {"substrates": ("coins",), "scenarios": "SC0", "episodes": 0, "steps": 5, "num_envs": 1}
    bench.main(bench.Bench(**few, num_workers=1))
    line = capsys.readouterr().out.splitlines()[-1]
    name, seats, ours, bare, ratio = (x.strip() for x in line.strip("| ").split("|"))
    assert (name, seats) == ("coins SC0", "1 / 1")
    assert abs(float(ratio) - float(ours) / float(bare)) < 0.02
