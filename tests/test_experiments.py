"""The studies in experiments/, on runs of the toy world."""

import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
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
