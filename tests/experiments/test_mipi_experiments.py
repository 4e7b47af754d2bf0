"""The commands that train for MIPI's tables and print them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import re
import shlex
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up import ROOT, command, experiment
from PIL import Image
from runs import change_newest, index, some_long
from scipy import stats
from toolbox import sharpen

from envs.smac import resource_collection

study, runs_module = experiment("mipi"), experiment("runs")
mipi, refil = (runs_module.load_script(name) for name in ("mipi_refil_smac", "refil_smac"))
collaq, mappo = (runs_module.load_script(name) for name in ("collaq_smac", "mappo_smac"))
mipi_mappo = runs_module.load_script("mipi_mappo_smac")
TINY = "--scenario sz --preset cpu --hidden-size 8 --heads 2 --num-envs 4 --max-episode-steps 4 "
TINY += "--team-sizes 3 4 --eval-team-sizes 6 --eval-every 32 --eval-episodes 4 --final-episodes 4 "
TINY += "--total-timesteps 96 --log-every 32 --save-every 0 "
QUICK = f"{TINY} --total-timesteps 32 --eval-every 0 --final-episodes 0"
OFF_POLICY = "--mixing-size 5 --batch-size 4 --updates-per-iteration 1"
ON_POLICY = "--window-steps 4 --minibatches 2"

RANDOM = ("/return", "/win")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Real runs of some updates, with made-up returns, as untrained networks earn nothing, and
    times, as they are over at once."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("runs")
    for name, module, flags in (
        ("sz-mipi-s1", mipi, ""),
        ("sz-mipi-s2", mipi, "--seed 2"),
        ("sz-inf-s1", mipi, "--observe-self-only --target-head tags"),
        ("sz-same-s1", mipi, "--alpha .03"),
        ("sz-lemma-s1", mipi, "--alpha-i-over-w"),
        ("sz-warm-s1", mipi, "--regularizer entropy --alpha .5 --learning-rate 5e-4"),
        ("sz-value-s1", mipi, "--regularizer none"),
        ("sz-refil-s1", refil, ""),
        ("sz-aqmix-s1", refil, "--no-imagine"),
        ("sz-collaq-s1", collaq, ""),
        ("sz-mappo-s1", mappo, ""),
        ("sz-mappo-mi-0.1-s1", mipi_mappo, "--alpha .1"),
        ("sz-mappo-mi-0.3-s1", mipi_mappo, "--alpha .3 --recurrent --rollout rounds"),
        ("sz-mappo-entropy-0.1-s1", mipi_mappo, "--alpha .1 --regularizer entropy"),
    ):
        of_ppo = module in (mappo, mipi_mappo)
        in_rounds = "--minibatches 2" if "rounds" in flags else ON_POLICY
        flags += f" {in_rounds if of_ppo else OFF_POLICY}"
        if module is mipi and "none" not in flags and "over-w" not in flags:
            flags += " --no-alpha-i-over-w"
        with contextlib.redirect_stdout(io.StringIO()):
            assert module.main(f"{TINY} {flags} --run-dir {folder / name}".split()) == 0
        log, lines = folder / name / "metrics.jsonl", []
        for line in map(json.loads, log.read_text().splitlines()):
            names = [key for key in line if key.startswith("eval/") and key.endswith(RANDOM)]
            line |= {"learn_s": 600 * rng.uniform()} if "learn_s" in line else {}
            lines.append(json.dumps(line | {key: rng.uniform() for key in names}))
        log.write_text("\n".join(lines) + "\n")
    return folder


def logged(run, size, measure):
    """A figure of every evaluation, read from the log."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [x[f"eval/{size}/{measure}"] for x in lines if f"eval/{size}/{measure}" in x]


def rows_below(text, title):
    """{second cell: cells} of the table under a title."""
    lines = text.split(title)[1].strip().split("\n\n")[0].splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {row[1]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_a_row_that_a_flag_has_renamed():
    """Beside a run of a script that knows the flag; its figures are the table's all the same."""
    one = {"MIPI --mixer linear": ["its"], "MIPI, Lemma 2 --mixer linear": ["other"], "REFIL": []}
    assert study.row_for(one, "MIPI") == ("MIPI --mixer linear", ["its"], "")
    assert study.row_for(one | {"MIPI": ["own"]}, "MIPI") == ("MIPI", ["own"], "")
    assert study.row_for(one, "Value") == ("Value", [], "not run")
    two = one | {"MIPI --mixer two-layer": ["third"]}
    assert study.row_for(two, "MIPI") == ("MIPI", [], "several, below")


def test_a_flatter_policy_seems_to_depend_less(runs):
    """Greedy actions, and so mates and groups, stay; figures of drawn ones fall."""
    run = runs_module.Run(runs / "sz-mappo-s1")
    options = study.Dependence((), episodes=6, draws=3, fit=3)
    opened = study.open_checkpoint(run, run)
    sharpen(opened.agent.actor)
    found = {
        T: {k: x.mean() for k, x in study.measure(opened._replace(temperature=T), options).items()}
        for T in (1.0, 8.0)
    }
    assert all(found[8.0][name] == found[1.0][name] for name in ("mates", "groups"))
    names = ("nats", "out", "swap", "kl self", "kl self+enemies")
    assert all(found[8.0][name] < found[1.0][name] for name in names), found
    code, text, stderr = command("mipi", "dependence", run.path, "--temperature", "-1")
    assert code == 2 and "--temperature -1.0: input should be greater than 0" in stderr


def test_the_matrix_game_shows_its_last_step():
    """Also where it is no multiple of --every: the table is of the policies at the end."""
    options = study.MatrixGame(steps=25, every=10, seeds=(1,))
    assert study.shown_steps(options) == [0, 10, 20, 25]
    points = study.learn_game(options, "none")
    assert len(points) == 4 and not np.array_equal(points[-1], points[-2])


@pytest.mark.long
def test_tables(runs, tmp_path):
    """Means over the last evaluations and over seeds, worked out here from the logs; rows that were
    not run; the paper's figures as printed; names of rows."""
    names = ("mipi-s1", "mipi-s2", "inf-s1", "warm-s1", "value-s1", "refil-s1", "aqmix-s1")
    names += ("collaq-s1", "mappo-s1", "mappo-mi-0.1-s1", "lemma-s1")
    paths = [runs / f"sz-{name}" for name in names]
    code, text, stderr = command("mipi", "tables", *paths, "--last", 2, "--out", tmp_path / "t")
    assert code == 0, stderr
    assert (tmp_path / "t.md").read_text().strip() == text.strip()
    returns = rows_below(text, "SZ: return per episode")
    own = {"MIPI", "MIPI, Lemma 2", "alpha inf", "Value", "REFIL", "AQMIX", "CollaQ", "MAPPO"}
    own.add("MAPPO + MI, alpha 0.1")
    own.add("Entropy, alpha 0.5 --learning-rate 0.0005")  # the preset has another
    scripts = {name for name in returns if name.endswith("(script)")}
    assert set(returns) - scripts == own and len(scripts) == 4, "MAPPO's samples are no script"
    for column, sizes in {"3-4": (3, 4), "6": (6,)}.items():
        each = []
        for run in (runs / "sz-mipi-s1", runs / "sz-mipi-s2"):
            assert len(logged(run, 3, "return")) >= 3  # more than --last takes
            each.append(np.mean([logged(run, size, "return")[-2:] for size in sizes]))
        expected = f"{np.mean(each):.2f} ({each[0]:.2f}, {each[1]:.2f})"
        assert returns["MIPI"][column] == expected and each[0] != each[1]
    summary = [json.loads((path / "summary.json").read_text())["eval"] for path in paths]
    focus = np.mean([[x[f"{size} focus"]["return"] for size in (3, 4)] for x in summary])
    assert returns["focus (script)"]["3-4"] == f"{focus:.2f}"
    third = rows_below(text, "Table 3: share of battles won")
    assert third["alpha 0.05"]["6"] == "not run" and third["alpha inf"]["6"] != "not run"
    assert third["alpha 0.5"]["paper 3-5"] == ".175±.053"  # some figures of the paper's
    assert third["alpha inf"]["paper 8"] == ".221±.004"
    first = rows_below(text, "Table 1: share of battles won")
    assert first["CollaQ"]["3-4"] != "not run" and first["CollaQ"]["paper 8"] == ".198±.097"
    for name, run in (("CollaQ", "sz-collaq-s1"), ("MAPPO", "sz-mappo-s1")):
        lines = [json.loads(x) for x in (runs / run / "metrics.jsonl").read_text().splitlines()]
        seconds = [x["collect_s"] + x["learn_s"] for x in lines if "learn_s" in x]
        assert first[name]["minutes"] == f"{sum(seconds) / 60:.1f}" != "0.0"
        assert first[name]["steps"] == f"{lines[-2]['timesteps']:,}"
    lemma = rows_below(text, "SZ: share of battles won")["MIPI, Lemma 2"]
    assert first["MIPI, Lemma 2"] == lemma | dict.fromkeys(set(first["CollaQ"]) - set(lemma), "")
    assert set(rows_below(text, "Table 2: share of battles won")) == {
        "MIPI, alpha 0.03",
        "MIPI, Lemma 2",
        "Value",
        "Entropy",
    }
    policies = rows_below(text, "SZ: policies, in training, nats")
    assert set(policies) == own - {"REFIL", "AQMIX", "CollaQ"}
    assert policies["Value"]["mi/zealot"] == policies["MAPPO"]["mi"] == ""
    assert policies["MAPPO"]["kl"] == "", "what PPO calls so is something else"
    lines = (runs / "sz-mappo-mi-0.1-s1/metrics.jsonl").read_text().splitlines()
    lines = [x for x in map(json.loads, lines) if "marginal_kl" in x][-2:]
    nats = np.mean([x["marginal_kl"] for x in lines])
    assert policies["MAPPO + MI, alpha 0.1"]["kl"] == f"{nats:.3f}"
    each = []
    for run in (runs / "sz-mipi-s1", runs / "sz-mipi-s2"):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        start, end = [x["timesteps"] for x in lines if "eval/6/win" in x][-2:]
        each.append(
            np.mean([x["mi"] for x in lines if "mi" in x and start <= x["timesteps"] <= end])
        )
    assert policies["MIPI"]["mi"] == f"{np.mean(each):.3f}" != "0.000"
    with Image.open(tmp_path / "t.png") as image:
        assert min(image.size) > 300
        height = image.size[1]
    words = (*paths, "--last", 2, "--measures", "win", "--out", tmp_path / "win")
    one = command("mipi", "tables", *words)[1]
    assert one == text.replace(text[text.index("SZ: return") : text.index("SZ: policies")], "")
    with Image.open(tmp_path / "win.png") as image:
        assert image.size[1] < 0.6 * height
    assert (tmp_path / "t.csv").read_text().count("\n") > 50


def test_policies_of_runs_that_lack_a_scalar():
    """A study may have dropped it: a mean is of those that have it, and no cell is nan."""

    def runs(*values):
        return [
            SimpleNamespace(learning=[{"entropy": x}], logged=lambda name, last, x=x: x)
            for x in values
        ]

    found = {"sz": {"MAPPO": runs(0.5, math.nan, 0.7), "MIPI": runs(math.nan)}}
    text = study.dependence_in_training(found, last=5)
    assert "| SZ | MAPPO | 0.600 (2 of 3 runs) |" in text and "MIPI" not in text
    assert study.dependence_in_training({"sz": {"MIPI": runs(math.nan)}}, last=5) == ""


def test_tables_against(tmp_path):
    """Differences from one row: figures of every seed in trained and in unseen sizes, from packed
    logs; intervals and p are SciPy's."""
    data = ROOT / "docs/data"
    paths = [data / f"study_{name}.csv" for name in ("sz_claims", "sz_value", "csz_claims")]
    only = ("--only", "sz-refil-s1[1-3]", "sz-aqmix-s11", "sz-value-s1[4-6]", "csz-*")
    words = (*paths, *only, "--against", "REFIL", "--measures", "win", "--out", tmp_path / "t")
    code, text, stderr = command("mipi", "tables", *words)
    assert code == 0, stderr
    rows = rows_below(text, "\nSZ: share of battles won, difference from REFIL")
    assert "CSZ: share of battles won, difference from REFIL" in text
    figures = {}
    for name, seeds in (("refil", (11, 12, 13)), ("value", (14, 15, 16)), ("aqmix", (11,))):
        study = data / f"study_sz_{'value' if name == 'value' else 'claims'}.csv"
        with study.open() as file:
            lines = [x for x in csv.DictReader(file) if x["kind"] == "curve"]
        for title, sizes in {"3-5": "345", "6-8": "678"}.items():
            each = []
            for seed in seeds:
                mine = [x for x in lines if x["run"] == f"sz-{name}-s{seed}"]
                last = [
                    [float(x["value"]) for x in mine if x["figure"] == f"eval/{size}/win"][-5:]
                    for size in sizes
                ]
                each.append(np.mean(last))
            figures[name, title] = each
    for title in ("3-5", "6-8"):
        ours, theirs, one = (figures[name, title] for name in ("value", "refil", "aqmix"))
        row = rows["Value"]
        assert [float(x) for x in row[f"{title}, seeds"].split(", ")] == pytest.approx(
            ours, abs=6e-4
        )
        interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
        means = [float(x) for x in re.findall(r"[+-][.\d]+", row[f"{title}, difference"])]
        assert means == pytest.approx([np.mean(ours) - np.mean(theirs), *interval], abs=6e-4)
        test = stats.permutation_test((ours, theirs), lambda x, y: np.mean(x) - np.mean(y))
        assert float(row[f"{title}, p"]) == pytest.approx(test.pvalue, abs=0.06)
        difference = float(rows["AQMIX"][f"{title}, difference"])  # one seed: no interval
        assert difference == pytest.approx(one[0] - np.mean(theirs), abs=6e-4)
        assert rows["AQMIX"][f"{title}, p"] == rows["REFIL"][f"{title}, difference"] == ""
    code, _, stderr = command("mipi", "tables", *paths, *only, "--against", "refil")
    assert code == 2 and "--against refil: the rows are REFIL; AQMIX; Value" in stderr


def test_longer_runs_have_a_row_of_their_own(runs, tmp_path):
    """They are no seeds of the shorter ones; the paper's table has the shorter ones."""
    for seed, times in ((1, 1), (2, 1), (3, 2)):
        path = tmp_path / f"sz-refil-s{seed}"
        shutil.copytree(runs / "sz-refil-s1", path)
        args = json.loads((path / "args.json").read_text())
        (path / "args.json").write_text(json.dumps(args | {"seed": seed}))
        log = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        log = [x | {"timesteps": times * x["timesteps"]} for x in log]
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in log))
    paths = sorted(tmp_path.glob("sz-refil-s?"))
    words = (*paths, "--last", 1, "--against", "REFIL", "--out", tmp_path / "t")
    code, text, stderr = command("mipi", "tables", *words)
    assert code == 0, stderr
    found = rows_below(text, "SZ: share of battles won")
    assert found["REFIL"]["seeds"] == "2" and found["REFIL, 0.0M steps"]["seeds"] == "1"
    assert rows_below(text, "Table 1: share of battles won")["REFIL"]["seeds"] == "2"


def test_tables_until(runs, tmp_path):
    """Later evaluations do not count; rows of unequal length are named."""
    one, short = runs / "sz-mipi-s1", tmp_path / "sz-value-s1"
    shutil.copytree(runs / "sz-value-s1", short)
    log = short / "metrics.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:3]) + "\n")
    steps = [json.loads(x)["timesteps"] for x in log.read_text().splitlines() if "eval/" in x]
    words = (one, short, "--last", 1, "--out", tmp_path / "t")
    code, text, stderr = command("mipi", "tables", *words)
    assert code == 0, stderr
    assert f"Not equally long: {steps[-1]:,} to " in text
    cut = command("mipi", "tables", *words, "--until", steps[-1])[1]
    assert "Not equally long" not in cut
    row = rows_below(cut, "SZ: return per episode")["MIPI"]
    wanted = logged(one, 6, "return")[len(steps) - 1]
    assert row["6"] == f"{wanted:.2f}" != f"{logged(one, 6, 'return')[-1]:.2f}"
    code, _, stderr = command("mipi", "tables", one, "--last", 1, "--until", 1)
    assert code == 2 and "0 evaluations until 1 steps, fewer than --last 1" in stderr


def test_a_flag_that_is_newer_than_a_run(runs, tmp_path):
    """The run from before counts as one by the preset: another row than the flag's."""
    paths = []
    for name, change in (("old", {}), ("new", {"windows": "clipped"})):
        paths.append(tmp_path / f"sz-refil-{name}")
        shutil.copytree(runs / "sz-refil-s1", paths[-1])
        args = json.loads((paths[-1] / "args.json").read_text())
        del args["windows"]
        (paths[-1] / "args.json").write_text(json.dumps(args | change))
    code, text, stderr = command("mipi", "tables", *paths, "--last", 1, "--out", tmp_path / "t")
    assert code == 0, stderr
    found = rows_below(text, "SZ: share of battles won")
    assert {"REFIL", "REFIL --windows clipped"} <= set(found)


def test_minutes_end_with_the_last_evaluation_that_counts():
    """What came after --until is not in them; a log without times has none."""
    log = [{"timesteps": 10 * k, "collect_s": 20.0 * k, "learn_s": 10.0 * k} for k in (1, 2, 3)]
    log.insert(2, {"timesteps": 20, "eval/3/win": 0.5})
    assert study.minutes_of(log, until=20) == 1.5
    assert np.isnan(study.minutes_of(log[2:3], until=20))


def test_tables_every(runs, tmp_path):
    """Of evaluations that came too often, the first after each multiple counts."""
    often = tmp_path / "often"
    shutil.copytree(runs / "sz-value-s1", often)
    line = next(x for x in (often / "metrics.jsonl").read_text().splitlines() if "eval/6/win" in x)
    lines = [
        json.dumps(json.loads(line) | {"timesteps": t, "eval/6/return": float(k)})
        for k, t in enumerate((31, 62, 95, 121, 151))
    ]
    (often / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    words = (often, "--last", 2, "--every", 60, "--out", tmp_path / "t")
    code, text, stderr = command("mipi", "tables", *words)
    assert code == 0, stderr
    assert rows_below(text, "SZ: return per episode")["Value"]["6"] == "2.00"  # of 1 and 3


def test_refused(runs, tmp_path):
    """One sentence and exit code 2."""
    shutil.copytree(runs / "sz-mipi-s1", tmp_path / "again-s1")
    other = tmp_path / "world"
    other.mkdir()
    sizes = tmp_path / "sz-collaq-s2"
    shutil.copytree(runs / "sz-mipi-s1", sizes)
    args = json.loads((sizes / "args.json").read_text())
    (sizes / "args.json").write_text(json.dumps(args | {"eval_team_sizes": [7]}))
    for words, sentence in (
        ((runs / "sz-refil-s1", sizes, "--last", 1), "have other team sizes"),
        ((sizes, runs / "sz-refil-s1", "--last", 1), "have other team sizes"),
        ((runs / "sz-mipi-s1", "--last", 50), "fewer than --last 50"),
        ((runs / "sz-mipi-s1", tmp_path / "again-s1", "--last", 1), "same run: one seed"),
        ((runs / "sz-mipi-s1", runs / "sz-same-s1", "--last", 1), "same run: one seed"),
        ((tmp_path / "nothing",), "is no run directory"),
        ((other,), "is no run directory"),
        ((runs / "sz-mipi-s1", "--last", 0), "--last 0"),
        ((runs / "sz-mipi-s1", "--last", 1, "--out", "/proc/x/y"), "cannot be written"),
    ):
        if "--out" not in words:
            words = (*words, "--out", tmp_path / "t")
        code, _, stderr = command("mipi", "tables", *words)
        assert code == 2 and stderr.count("\n") == 1 and sentence in stderr, (words, stderr)


SCENARIOS = ("sz", "csz", "mmm", "terran", "protoss", "zerg", "resource", "resource --rescale")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rows_of_the_default_alpha(scenario):
    """It is the script's, in every world; a run that names it is in the same row, no other is."""
    words = f"--scenario {scenario} --hidden-size 8 --heads 2"
    args = runs_module.script_args(mipi, words.split())
    family = study.worlds.family_of(args.scenario)
    alpha = mipi.Agent(args, family, mipi.CPU).alpha
    told = vars(args) | {"script": "mipi_refil_smac"}
    assert study.default_alpha(told) == alpha
    for given, name in ((None, "MIPI"), (alpha, "MIPI"), (0.07, "alpha 0.07")):
        assert study.row_name(told | {"alpha": given}) == name
    warm = {"regularizer": "entropy", "alpha": 0.07}
    assert study.row_name(told | warm) == "Entropy, alpha 0.07"
    lemma = runs_module.script_args(mipi, [*words.split(), "--alpha-i-over-w"])
    by_lemma = vars(lemma) | {"script": "mipi_refil_smac"}
    thirtieth = mipi.Agent(lemma, family, mipi.CPU).alpha
    assert study.default_alpha(by_lemma) == thirtieth < alpha
    linear = dataclasses.replace(lemma, mixer="linear")
    eighth = mipi.Agent(linear, family, mipi.CPU).alpha
    assert study.default_alpha(by_lemma | {"mixer": "linear"}) == eighth == alpha / 8
    for given in (None, thirtieth):
        assert study.row_name(by_lemma | {"alpha": given}) == "MIPI, Lemma 2"
    assert study.row_name(by_lemma | {"alpha": 0.07}) == "MIPI, Lemma 2, alpha 0.07"
    assert study.row_name(by_lemma | {"policy": "exact"}) == "MIPI", "it has no Eq. (18)"
    assert study.row_name(told | {"charge_times_w": True}) == "MIPI, charge times w"
    told = vars(runs_module.script_args(mipi_mappo, words.split())) | {"script": "mipi_mappo_smac"}
    for given, shown in ((None, alpha), (alpha, alpha), (0.07, 0.07)):
        assert study.row_name(told | {"alpha": given}) == f"MAPPO + MI, alpha {shown:g}"
    assert study.row_name(told | {"alpha": 0.0}) == "MAPPO"


@pytest.mark.long
def test_runs_of_the_tables(tmp_path):
    """--dry-run names a command for every row of the tables that is one of these methods."""
    words = ["--seeds", "1", "2", "--dir", tmp_path / "runs", "--dry-run"]
    tables = ["table1", "table2", "table3", "d3", "collection", "ppo"]
    code, text, stderr = command("mipi", "train", *tables, *words)
    assert code == 0, stderr
    wanted = {("resource", name) for name in ("MIPI", "REFIL", "AQMIX", "CollaQ", "MAPPO")}
    for table in study.TABLES.values():
        for task, rows in table.items():
            wanted |= {(task, name) for name in rows}
            wanted |= {(task, f"{name}, Lemma 2") for name in ("MIPI", "Entropy")}
    for term in ("MI", "entropy"):  # as many alphas of each
        wanted |= {("sz", f"MAPPO + {term}, alpha {x}") for x in (0.1, 0.3)}
        pairs = [(x, y) for x in ("sz", "csz", "mmm") for y in (0.01, 0.03)]
        wanted |= {(x, f"MAPPO + {term}, alpha {y}") for x, y in pairs}
    found, modules = [], (mipi, refil, collaq, mappo, mipi_mappo)
    for line in text.splitlines():
        path, *argv = shlex.split(line)[1:]
        (module,) = (x for x in modules if x.__file__.endswith(path))
        args = runs_module.script_args(module, argv)
        assert args.eval_every * 10 == args.total_timesteps == 500_000 and args.preset == "cpu"
        preset = module.PRESETS["cpu"] | module.PRESETS.get(f"cpu scenario {args.scenario}", {})
        assert args.num_envs == preset["num_envs"]
        plain = json.loads(json.dumps(vars(args))) | {"script": module.__name__.split(".")[-1]}
        found.append((args.scenario, study.row_name(plain), args.seed))
    assert sorted(found) == sorted((*pair, seed) for pair in wanted for seed in (1, 2))
    code, text, stderr = command("mipi", "train", *tables, *words, "--only", "*-collaq", "mmm-m*o")
    assert code == 0, stderr
    folders = [words[words.index("--run-dir") + 1] for words in map(str.split, text.splitlines())]
    names = [folder.rsplit("/", 1)[-1] for folder in folders]
    tasks = ("sz", "csz", "mmm", "resource")
    some = [*(f"{task}-collaq" for task in tasks), "mmm-mappo"]
    assert sorted(names) == sorted(f"{name}-s{seed}" for name in some for seed in (1, 2))
    code, _, stderr = command("mipi", "train", *tables, *words, "--only", "sz-nobody")
    assert code == 2 and "--only sz-nobody" in stderr


OPEN = {  # flags with an open quotation: what the shell's rules say of them
    '--lr "1': '--lr "1: no closing quotation.',
    '"--lr 1': '"--lr 1: no closing quotation.',
    "--lr 1'": "--lr 1': no closing quotation.",
    "--lr 1\\": "--lr 1\\: no escaped character.",
}


@pytest.mark.parametrize(("flags", "sentence"), OPEN.items())
def test_flags_with_an_open_quotation_are_refused(flags, sentence, tmp_path):
    """In one sentence, before anything is trained or written."""
    words = ("table1", "--dir", tmp_path / "runs", f"--flags={flags}")
    code, text, stderr = command("mipi", "train", *words)
    assert (code, text, stderr) == (2, "", f"error: --flags: {sentence}\n")
    assert not (tmp_path / "runs").exists()


def test_seeds_and_tasks_of_training(tmp_path):
    """At least one of each; what is named twice is trained once."""
    words = ("table2", "--dir", tmp_path / "runs", "--dry-run")
    for flags, name in ((("--seeds",), "--seeds"), (("--tasks",), "--tasks")):
        code, text, stderr = command("mipi", "train", *words, *flags)
        assert (code, text) == (2, "") and name in stderr
    once = command("mipi", "train", *words, "--seeds", 2, 1, "--tasks", "sz")
    twice = command("mipi", "train", *words, "--seeds", 2, 1, 2, "--tasks", "sz", "sz")
    assert once == twice and once[0] == 0 and len(once[1].splitlines()) == 10


def test_controls_of_mipi_on_ppo(tmp_path):
    """Each is alpha .03 with one flag more, or MAPPO with teammates dropped or larger teams."""
    words = ("ppo-controls", "--tasks", "sz", "--seeds", 11, "--dir", tmp_path, "--dry-run")
    code, text, stderr = command("mipi", "train", *words)
    assert code == 0, stderr
    usual = runs_module.script_args(mipi_mappo, ["--preset", "cpu"])
    names = ("own", "marginal", "penalise", "alpha", "drop_teammates", "team_sizes")
    changes = []
    for line in text.splitlines():
        path, *argv = shlex.split(line)[1:]
        script = runs_module.load_script(Path(path).stem)
        args = runs_module.script_args(script, argv)
        assert args.seed == 11 and args.scenario == "sz"
        own = [x for x in names if getattr(args, x, getattr(usual, x)) != getattr(usual, x)]
        changes.append([script.__name__.split(".")[-1], *own])
    terms = [["own"], ["marginal"], ["penalise"], ["penalise"], ["alpha", "drop_teammates"]]
    terms = [["mipi_mappo_smac", *x] for x in terms]
    wide = [["mappo_smac", "team_sizes"], ["mipi_mappo_smac", "team_sizes"]]
    assert changes == terms + wide and args.team_sizes == (3, 4, 5, 6, 7, 8)


def test_regret_is_read_in_the_same_columns():
    """Of runs that train with all sizes, whatever the order; other sizes stay as they are."""
    usual = {"3-5": (3, 4, 5), "6": (6,), "7": (7,), "8": (8,)}
    columns = {
        "usual": usual,
        "wide": {"3-8": (3, 4, 5, 6, 7, 8)},
        "other": {"3-6": (3, 4, 5, 6), "8": (8,)},
    }
    runs = []
    for name in ("wide", "usual", "other"):
        flags = {} if name == "usual" else {"team_sizes": next(iter(columns[name].values()))}
        run = study.Evaluated(
            name=name,
            where=name,
            task="sz",
            method="MAPPO + MI, alpha 0.03",
            flags=flags,
            known=frozenset({"team_sizes"}),
            seed=1,
            steps=1,
            minutes=0.0,
            columns=columns[name],
            evaluations=[],
            learning=[],
            scripts={},
        )
        runs.append(run)
    found = {run.name: run.columns for run in study.in_same_columns(runs)}
    assert found == {"usual": usual, "wide": usual, "other": columns["other"]}
    (names,) = study.group(study.in_same_columns(runs)).values()
    assert f"MAPPO + MI, alpha 0.03 {study.ALL_SIZES}" in names
    arms = ("MAPPO", 0.0, 0.3), (f"MAPPO {study.ALL_SIZES}", 0.0, 0.55), ("MAPPO + MI", 0.03, 0.4)
    arms += (f"MAPPO + MI {study.ALL_SIZES}", 0.1, 0.5), ("MAPPO + MI", 0.1, 0.6)
    arms += ("MAPPO --recurrent", 0.0, 0.25), ("MAPPO --gamma 0.9 --epochs 2", 0.0, 0.1)
    arms += ((f"MAPPO {study.ALL_SIZES} --recurrent", 0.0, 0.5),)
    arms += ((f"MAPPO --gamma 0.9 {study.ALL_SIZES} --epochs 2", 0.0, 0.7),)
    means = [{"arm": arm, "alpha": alpha, study.UP: x} for arm, alpha, x in arms]
    assert [study.regret(row, means) for row in means] == [
        *("+0.250", "", "", "", "-0.100"),
        *("+0.250", "+0.600", "", ""),
    ]


STUDIES = {  # {study: what trains the same}
    "mipi_ppo_sz": "ppo --tasks sz --total-timesteps 2000000",
    "mipi_ppo_csz": "ppo --tasks csz --total-timesteps 2000000",
    "mipi_ppo_mmm": "ppo --tasks mmm --total-timesteps 2000000",
    "mipi_ppo_controls_sz": "ppo-controls --tasks sz --total-timesteps 2000000",
    "mipi_table1": "table1 --total-timesteps 1000000",
    "mipi_table3": "table3 d3 --total-timesteps 1000000",
    "mipi_fig4": "collection --total-timesteps 1000000",
}


@pytest.mark.parametrize("name", some_long(STUDIES, "mipi_table1", "mipi_table3"))
def test_studies_are_what_train_trains(name, tmp_path):
    """The same names and arguments. The largest alpha of Table 3 and Resource Collection have their
    names in claims.toml; long runs of MAPPO one that tells them from mipi_ppo_sz's."""
    words = (*STUDIES[name].split(), "--seeds", 11, "--dir", tmp_path, "--dry-run")
    code, text, stderr = command("mipi", "train", *words)
    assert code == 0, stderr
    trained = {}
    for line in text.splitlines():
        path, *argv = shlex.split(line)[1:]
        at = argv.index("--run-dir")
        run = argv[at + 1].rsplit("/", 1)[-1]
        script = runs_module.load_script(Path(path).stem)
        trained[run] = path, runs_module.script_args(script, argv[:at] + argv[at + 2 :])
    launch, file = experiment("launch"), ROOT / f"experiments/studies/{name}.toml"
    options = launch.Launch(study=file, seeds=(11,))
    highest = {task: f"mipi-alpha-{alphas[-1]}" for task, alphas in study.ALPHAS.items()}
    found = {}
    for job in launch.jobs_of(launch.read_study_file(file), options):
        task = job.run.name.split("-")[0]
        run = job.run.name.replace("high_alpha", highest.get(task, ""))
        run = run.replace("_long-", "-").replace("collection-", "resource-")
        script = runs_module.load_script(Path(job.script).stem)
        found[run] = job.script, runs_module.script_args(script, job.argv())
    assert found == trained


def test_rows_are_named_by_the_flags_in_which_runs_differ():
    """Where all runs of a script have a flag that its preset has not, no row's name tells it; of
    another script's runs, which do not know it, nothing follows."""

    def run(method, seed, **flags):
        known = frozenset({"gamma"} if method == "REFIL" else {"gamma", "detach", "rounds"})
        return study.Evaluated(
            name="x",
            where="x",
            task="sz",
            method=method,
            flags=flags,
            known=known,
            seed=seed,
            steps=1,
            minutes=1.0,
            columns={"3": (3,)},
            evaluations=[],
            learning=[],
            scripts={},
        )

    refil = run("REFIL", 1)
    names = lambda *runs: {k: len(x) for k, x in study.group([refil, *runs])["sz"].items()}  # noqa: E731
    assert names(run("MIPI", 1, detach=False), run("MIPI", 2, detach=False)) == {
        "REFIL": 1,
        "MIPI": 2,
    }
    assert names(run("MIPI", 1, detach=False), run("MIPI", 1)) == {
        "REFIL": 1,
        "MIPI": 1,
        "MIPI --no-detach": 1,
    }
    assert set(names(run("MIPI", 1, gamma=0.9))) == {"REFIL", "MIPI --gamma 0.9"}
    assert set(names(run("MIPI", 1, rounds=2), run("Value", 1, rounds=3))) == {
        "REFIL",
        "MIPI --rounds 2",
        "Value --rounds 3",
    }


def test_a_study_of_runs_makes_the_same_tables(runs, tmp_path):
    """From directories and from the CSV they were packed into."""
    paths = sorted(runs.glob("sz-mipi-s?")) + [runs / "sz-refil-s1"]
    assert command("runs", "pack", tmp_path / "sz.csv", *paths)[0] == 0
    texts = [
        command("mipi", "tables", *source, "--last", 2, "--out", tmp_path / "t")[1]
        for source in (paths, [tmp_path / "sz.csv"])
    ]
    assert texts[0] == texts[1] and "AQMIX" in texts[0]


# --- Reference points, speed ----------------------------------------------------------------------


def taught(*flags):
    """What is earned, {"3 taught": ...}, on the way, too, and what share of labels was met."""
    small = ("--minibatches", 4, "--show", 1, "--every", 1, "--round", 2, "--episodes", 4)
    flags = (*small, "--learning-rate", 5e-3, "--team-sizes", 3, "--eval-team-sizes", *flags)
    code, out, error = command("mipi", "imitation", *flags)
    assert code == 0, error
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")]
    found = {r[1].strip(): float(r[2].split("[")[0]) for r in rows if r[1].strip() != "who"}
    met = [float(line.split(":")[1]) for line in out.splitlines() if line.startswith("labels")]
    return found, met


@pytest.mark.long
def test_imitation_in_resource_collection(monkeypatch):
    """Beside the scripts' own figures; options change what is learned; bad ones are refused. In
    episodes of 20 steps, to be quick."""
    short = functools.partial(resource_collection.ResourceCollection, episode_limit=20)
    monkeypatch.setattr(study, "ResourceCollection", short)
    rows, met = taught(6)
    assert list(rows) == [f"after {n}" for n in (1, 2, 3, 4)] + [
        f"{n} {who}" for n in (3, 6) for who in ("taught", "random", "forager", "collector")
    ]
    worlds = short((6,), 4, 2, once=True)
    earned = [e.reward for e in resource_collection.play(worlds, resource_collection.forager)]
    assert rows["6 forager"] == pytest.approx(np.mean(earned), abs=0.051)
    changes = ("--teacher", "collector"), ("--learning-rate", 5e-4), ("--seed", 2)
    for flags in (
        *changes,
        ("--preset", "paper"),
        ("--round", 4),
        ("--team-sizes", 2),
        ("--every", 2),
    ):
        assert taught(*flags)[1] != met, flags
    assert next(iter(taught("--show", 4, "--minibatches", 3)[0])) == "after 3"
    for flags in (("--team-sizes", 9), ("--team-sizes",), ("--minibatches", 0)):
        code, _, error = command("mipi", "imitation", *flags)
        assert code == 2 and flags[0] in error


@pytest.mark.slow
def test_the_network_learns_resource_collection_from_labels():
    """In a sixth of the minibatches of docs/mipi.md; random play earns 2."""
    flags = ("--every", 50, "--round", 64, "--show", 500, "--episodes", 32)
    rows, _ = taught("--minibatches", 500, "--learning-rate", 5e-4, *flags)
    assert rows["3 taught"] > 3 * max(rows["3 random"], 3)


@pytest.mark.parametrize("module", [mipi, refil, collaq], ids=lambda module: module.__name__)
def test_flags_of_the_preset_are_those_of_the_docs(module):
    """docs/resource_collection.md: what changes in Resource Collection, and what battles have."""
    text = (ROOT / "docs/resource_collection.md").read_text()
    text = text.split("these flags of the preset for battles")[1]
    changed, kept = text.split("The preset for battles has these, too")
    kept = kept.split("Measured beside")[0]
    rows = ("| `", "| MIPI alone: `") if module is mipi else "| `"
    first_cells = (
        "\n".join(line.split("|")[1] for line in part.splitlines() if line.startswith(rows))
        for part in (changed, kept)
    )
    changed, kept = (" ".join(re.findall("`([^`]+)`", cells)).split() for cells in first_cells)
    names = {x.removeprefix("--").removeprefix("no-") for x in changed if x.startswith("--")}
    own = module.PRESETS["cpu scenario resource"].keys()
    assert {name.replace("-", "_") for name in names} == own
    for scenario, flags in (("resource", changed), ("resource", kept), ("sz", kept)):
        words = ["--preset", "cpu", "--scenario", scenario]
        usual = runs_module.script_args(module, words)
        assert runs_module.script_args(module, [*words, *flags]) == usual


# --- Dependence on the team -----------------------------------------------------------------------


def dependence(*words):
    code, text, stderr = command("mipi", "dependence", *words)
    assert code == 0, stderr
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(lines[0], row)) for row in lines[2:]}


def test_team_dependence(runs, tmp_path):
    """Nobody depends on a team that is never seen; utilities say no probabilities; all runs are
    asked about the same episodes, or each about its own."""
    names = [runs / f"sz-{name}-s1" for name in ("mipi", "inf", "refil", "aqmix")]
    quick = ("--draws", 3, "--fit", 2)
    own = dependence(*names, *quick)
    same = dependence(*names, *quick, "--states", runs / "sz-refil-s1")
    for rows in (own, same):
        assert set(rows) == {path.name for path in names}
        assert [rows["sz-inf-s1"][k].split()[0] for k in ("mates", "groups")] == ["0.000", "0.000"]
        assert abs(float(rows["sz-inf-s1"]["nats"].split()[0])) < 1e-6
        assert rows["sz-refil-s1"]["nats"] == rows["sz-aqmix-s1"]["nats"] == ""
        assert float(rows["sz-mipi-s1"]["nats"].split()[0]) >= 0
    assert own["sz-refil-s1"] == same["sz-refil-s1"]
    seed_2 = runs / "sz-mipi-s2"
    mine, theirs, other = (
        study.open_checkpoint(*map(runs_module.Run, pair)).buffer.steps["actions"][:8]
        for pair in ((names[0], names[0]), (seed_2, seed_2), (names[0], seed_2))
    )
    assert torch.equal(other, theirs) and not torch.equal(other, mine)
    made = {"scenario": "csz", "backend": "sc2", "rescale": True, "egocentric": True}
    for name, x in made.items():
        x = name if x is True else x
        shutil.copytree(runs / "sz-mipi-s1", tmp_path / x)
        args = json.loads((tmp_path / x / "args.json").read_text()) | {name: made[name]}
        (tmp_path / x / "args.json").write_text(json.dumps(args))
    for words, sentence in (
        ((tmp_path / "sc2",), "is of the game itself"),
        ((names[0], "--states", tmp_path / "csz"), "is of sz"),
        ((names[0], "--states", tmp_path / "rescale"), "is of --rescale False"),
        ((names[0], "--states", tmp_path / "egocentric"), "is of --egocentric False"),
        ((names[0], "--states", tmp_path / "sc2"), "is of the game itself"),
        ((tmp_path / "nowhere",), "is no run directory"),
        ((runs / "sz-mipi-s1", "--states", runs / "nothing"), "is no run directory"),
        ((runs / "sz-mipi-s1", "--draws", 0), "--draws 0"),
    ):
        code, _, stderr = command("mipi", "dependence", *words)
        assert code == 2 and stderr.count("\n") == 1 and sentence in stderr


def test_team_dependence_of_an_older_run(runs, tmp_path):
    """A run from before a flag has the flag's default; a zoo's weights have no episodes."""
    quick = ("--draws", 3, "--fit", 2)
    old = tmp_path / "sz-mipi-s1"
    shutil.copytree(runs / "sz-mipi-s1", old)
    expected = dependence(old, *quick)
    change_newest(old, lambda state: state["args"].pop("windows"))
    assert dependence(old, *quick) == expected
    change_newest(old, lambda state: state.update(weights_only=True))
    code, _, stderr = command("mipi", "dependence", old, *quick)
    assert code == 2 and "has no replay: name a run that has one, by --states" in stderr
    assert dependence(old, "--states", runs / "sz-mipi-s1", *quick)
    assert dependence(old, "--states", runs / "sz-mipi-s1", *quick) == expected


@pytest.mark.parametrize("module", [mipi, refil], ids=lambda module: module.__name__)
def test_whole_episodes_are_read(module, tmp_path):
    """From the first step on, also of runs that learn from windows of them."""
    words = f"{QUICK} {OFF_POLICY} --replay-window 2 --run-dir {tmp_path / 'x'}"
    with contextlib.redirect_stdout(io.StringIO()):
        assert module.main(words.split()) == 0
    buffer = study.open_states(runs_module.Run(tmp_path / "x"))
    batch = buffer.sample(torch.Generator().manual_seed(1), 1000)
    steps = batch.features.played.sum(0) - 1
    ends = buffer.fixed["length"][: buffer.size]
    assert sorted(steps.tolist()) == sorted(ends.tolist()) and min(ends) > 2
    as_of_two_processes(tmp_path / "x")
    theirs = study.open_states(runs_module.Run(tmp_path / "x"))
    assert torch.equal(theirs.fixed["length"][: theirs.size], ends)


def as_of_two_processes(run_dir):
    """Replays of torchrun's processes have their ranks in their names; the first one's is read."""
    change_newest(run_dir, lambda state: state.update(ranks=2 * state["ranks"]))
    known = index(run_dir)
    (replay,) = known[0]["replays"]
    new = replay["name"].replace(".pt", "-0.pt")
    (run_dir / replay["name"]).rename(run_dir / new)
    replay["name"] = new
    (run_dir / "checkpoints.json").write_text(json.dumps(known))


def test_a_team_of_one(tmp_path):
    """It has no teammate to hide, so these cells are empty."""
    words = QUICK.replace("sz", "resource")
    words += f" {OFF_POLICY} --team-sizes 1 --eval-team-sizes 1 --run-dir {tmp_path / 'x'}"
    with contextlib.redirect_stdout(io.StringIO()):
        assert mipi.main(words.split()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (row,) = dependence(tmp_path / "x", "--draws", 2, "--fit", 2).values()
    assert row["out"] == row["swap"] == "" and row["mates"].startswith("0.000")
    assert "nan" not in " ".join(row.values())


@pytest.mark.parametrize("flags", ["--policy exact", "--policy exact --alpha 0", "--policy greedy"])
def test_a_greedy_policy_says_no_probabilities(flags):
    """It has no nats, which --policy exact has only with an alpha."""
    flags += "" if "--alpha" in flags else " --regularizer none"
    args = runs_module.script_args(mipi, f"{flags} --hidden-size 8 --heads 2".split())
    battles = mipi.make_envs(args, (3, 4), 6, seed=1)
    agent = mipi.Agent(args, battles.family, mipi.CPU)
    sharpen(agent.utility, 2.0, 1)
    battles.reset()
    none, played = torch.full((6, 8), -1), torch.ones(1, 6, dtype=torch.bool)
    features = mipi.encode(battles.obs, none, played, mipi.CPU)
    opened = study.Opened(mipi, agent, None)
    action, log_pi = study.says(opened, features)
    q = agent.utility(features)[0].full_view.q.masked_fill(~features.avail_actions, -np.inf)
    assert log_pi is None and torch.equal(action, q.argmax(-1))
    p = study.policy_of(opened, features)
    assert torch.equal(p.argmax(-1), action) and (p.amax(-1) == 1).all()


def test_an_exact_policy_is_read_with_its_marginal():
    args = mipi.Args(policy="exact", alpha=0.5, hidden_size=8, heads=2)
    battles = mipi.make_envs(args, (3, 4), 6, seed=1)
    agent = mipi.Agent(args, battles.family, mipi.CPU)
    for k, net in enumerate((agent.utility, agent.marginal)):
        sharpen(net, 2.0, k)
    battles.reset()
    none, played = torch.full((6, 8), -1), torch.ones(1, 6, dtype=torch.bool)
    features = mipi.encode(battles.obs, none, played, mipi.CPU)
    groups = mipi.draw_groups(features, torch.Generator().manual_seed(1))
    avail, opened = features.avail_actions, study.Opened(mipi, agent, None)
    log_m = agent.log_marginal(agent.marginal(features)[0], avail)
    teams, _ = agent.utility(features, groups)
    for seen, view in ((None, teams.full_view.q), (groups, teams.own_group.q)):
        _, log_pi = study.says(opened, features, seen)
        weights = (log_m + view / 0.5).exp() * avail
        assert torch.allclose(log_pi.exp(), weights / weights.sum(-1, keepdim=True), atol=1e-5)
    assert not torch.allclose(log_pi, mipi.log_probabilities(view / 0.5, avail), atol=1e-2)


def test_what_team_dependence_measures(runs, monkeypatch):
    """By loops: sharp agents, whose actions do change; teammates' features matter to nobody when
    they are not seen, enemies' do."""
    run = runs_module.Run(runs / "sz-mipi-s1")
    opened = study.open_checkpoint(run, run)
    for k, net in enumerate((opened.agent.utility, opened.agent.policy)):
        sharpen(net, 2.0, k)
    args = study.Dependence((), episodes=6, draws=3, fit=2)
    found = study.measure(opened, args)
    rng = torch.Generator().manual_seed(1)
    batch = opened.buffer.sample(rng, 6)
    view, A = batch.features, batch.features.unseen.shape[1]

    def policy(view, groups=None):
        with torch.no_grad():
            teams, _ = opened.agent.utility(view, groups)
            team = teams[0 if groups is None else 1]
            return opened.agent.log_policy(team, view.avail_actions, None).exp().numpy()

    alone = view._replace(unseen=view.unseen.clone())
    for i in range(A):
        for j in range(A):
            alone.unseen[:, i, j] |= i != j
    draws = [policy(view, mipi.draw_groups(view, rng)) for _ in range(3)]
    real, hidden = policy(view), policy(alone)
    battles, acts = view.played.nonzero()[:, 1].tolist(), set(batch.now.tolist())
    each = {name: [[] for _ in range(6)] for name in ("mates", "groups", "nats")}
    for m, b in enumerate(battles):
        for i in range(A) if m in acts else ():
            if view.avail_actions[m, i, 0]:
                continue  # dead, or nobody
            best = real[m, i].argmax()
            each["mates"][b].append(hidden[m, i].argmax() != best)
            each["groups"][b].append(np.mean([p[m, i].argmax() != best for p in draws]))
            mean = np.mean([p[m, i] for p in draws], 0)
            may = mean > 0
            ratios = [np.log(np.maximum(p[m, i], 1e-30)[may] / mean[may]) for p in draws]
            each["nats"][b].append(np.mean([p[m, i][may] @ r for p, r in zip(draws, ratios)]))
    for name, lists in each.items():
        np.testing.assert_allclose(found[name], [np.mean(x) for x in lists], atol=1e-4)
        assert found[name].mean() > 0.001, name
    changed = alone.entities.clone()
    changed[:, 1:A] = 3.0
    mates = policy(alone._replace(entities=changed))
    changed[:, A:] = 3.0
    enemies = policy(alone._replace(entities=changed))
    assert np.array_equal(mates[:, 0], hidden[:, 0]) and not np.allclose(
        enemies[:, 0], hidden[:, 0]
    )


PPO_RUNS = ("sz-mappo-s1", "sz-mappo-mi-0.1-s1", "sz-mappo-mi-0.3-s1")


def test_team_dependence_of_ppo(runs):
    """All PPO runs, REFIL's and MIPI's about the same battles or the same replay; a run of
    mappo_smac.py is read by its child's networks."""
    names = [runs / name for name in (*PPO_RUNS, "sz-mipi-s1", "sz-refil-s1")]
    quick = ("--draws", 2, "--fit", 2, "--episodes", 6)
    for states in (names[1], names[3]):
        rows = dependence(*names, *quick, "--states", states)
        assert set(rows) == {path.name for path in names}
        assert rows["sz-refil-s1"]["kl self"] == rows["sz-refil-s1"]["nats"] == ""
        for path in names[:4]:
            row = rows[path.name]
            assert all(float(row[x].split()[0]) >= 0 for x in ("nats", "out", "swap"))
            assert float(row["kl self"].split()[0]) >= 0
    for path in names[:2]:
        run = runs_module.Run(path)
        opened = study.open_checkpoint(run, run)
        assert opened.script is mipi_mappo
        saved = study.harness.load_checkpoint(str(path))[0]["agent"]["actor"]
        assert all(torch.equal(x, saved[k]) for k, x in opened.agent.actor.state_dict().items())
    code, _, stderr = command("mipi", "dependence", runs / "sz-collaq-s1")
    assert code == 2 and "collaq_smac.py, not of" in stderr


def test_one_teammate_is_changed(runs):
    """Of each episode one that is there: all others lose sight of it, or its type is the next one;
    nothing else, in sight of whom or of whatever, is another."""
    run = runs_module.Run(runs / "sz-mappo-mi-0.1-s1")
    opened = study.open_checkpoint(run, run)
    features = opened.buffer.sample(torch.Generator().manual_seed(1), 12).features
    A, S = features.unseen.shape[1:]
    columns = list(study.worlds.family_of("sz").type_columns.values())
    episode = features.played.nonzero()[:, 1].tolist()
    for of_types in (None, columns):
        rng = torch.Generator().manual_seed(2)
        other, others = study.change_one_mate(features, rng, of_types)
        hidden = other.unseen & ~features.unseen
        turned = (other.entities != features.entities).any(-1)
        assert hidden.any() == (of_types is None) and turned.any() == (of_types is not None)
        which = {}
        for m, b in enumerate(episode):
            found = {j for i, j in hidden[m].nonzero().tolist()} | set(
                turned[m].nonzero()[:, 0].tolist()
            )
            assert len(found) <= 1 and all(j < A for j in found)
            which.setdefault(b, set()).update(found)
            for i in range(A):
                for j in found if of_types is None else ():
                    assert other.unseen[m, i, j] == (i != j or features.unseen[m, i, j])
                if others[m, i]:
                    assert i not in found
        assert all(len(found) <= 1 for found in which.values())
        assert len({tuple(found) for found in which.values()}) > 1
        if of_types:
            kinds = features.entities[turned][:, columns]
            assert torch.equal(other.entities[turned][:, columns], kinds.roll(1, -1))
            same = other.entities.clone()
            same[..., columns] = features.entities[..., columns]
            assert torch.equal(same, features.entities)
    alive = ~features.avail_actions[..., 0]
    for m, b in enumerate(episode):
        (j,) = which[b] or {None}
        expected = torch.zeros(A, dtype=torch.bool)
        if j is not None and alive[m, j]:
            expected[:] = True
            expected[j] = False
        assert j is None or torch.equal(others[m], expected)


@pytest.mark.parametrize("name", PPO_RUNS[1:])
def test_what_dependence_measures_of_ppo(runs, name):
    """Total variation and the share of other actions by loops, of sharp agents with and without a
    memory."""
    run = runs_module.Run(runs / name)
    opened = study.open_checkpoint(run, run)
    sharpen(opened.agent.actor, 2.0, 0)
    args = study.Dependence((), episodes=6, draws=2, fit=1)
    found = study.measure(opened, args)
    rng = torch.Generator().manual_seed(1)
    features = opened.buffer.sample(rng, 6).features
    [refil.draw_groups(features, rng) for _ in range(2)]
    columns = list(study.worlds.family_of("sz").type_columns.values())
    out, swap = (study.change_one_mate(features, rng, x) for x in (None, columns))
    alive = ~features.avail_actions[..., 0]

    def policy(features):
        with torch.no_grad():
            return opened.agent.actor(features)[0].exp().double().numpy()

    real, alone = policy(features), policy(study.without_mates(features))
    episode = features.played.nonzero()[:, 1].tolist()
    each = {name: [[] for _ in range(6)] for name in ("mates", "out", "swap")}
    for changed, key in ((out, "out"), (swap, "swap")):
        pi = policy(changed.features)
        for m, b in enumerate(episode):
            for i in np.flatnonzero(alive[m] & changed.others[m]):
                each[key][b].append(sum(abs(p - q) for p, q in zip(pi[m, i], real[m, i])) / 2)
    for m, b in enumerate(episode):
        for i in np.flatnonzero(alive[m]):
            each["mates"][b].append(real[m, i].argmax() != alone[m, i].argmax())
    for key, lists in each.items():
        expected = [np.mean(x) for x in lists if x]
        np.testing.assert_allclose(found[key], expected, atol=1e-5)
        assert np.mean(expected) > 1e-3, key


def test_a_marginal_is_fitted_anew(runs):
    """To every second episode: a policy that is a marginal is met in the others, one that looks at
    others is not; labels of those others change nothing that is learned."""
    run = runs_module.Run(runs / "sz-mappo-mi-0.1-s1")
    opened = study.open_checkpoint(run, run)
    sharpen(opened.agent.actor, 2.0, 0)
    options = study.Dependence((), episodes=16, fit=150, seed=3)
    features = opened.buffer.sample(torch.Generator().manual_seed(1), 16).features
    odd = features.played.nonzero()[:, 1] % 2 == 1
    judged = ~features.avail_actions[..., 0] & odd[:, None]
    own = mipi_mappo.Marginal(
        features.entities.shape[-1], study.worlds.family_of("sz"), opened.agent.args
    )
    with torch.no_grad():
        log_pi = {
            "own": own(mipi_mappo.own_states(features, "self"))[0],
            "all": opened.agent.actor(features)[0],
        }
    nats = {}
    for name, x in log_pi.items():
        args = (opened, features, x, options, "self")
        nats[name] = float(study.divergence_from_marginal(*args)[judged].mean())
    assert 0 <= nats["own"] < 0.1 * nats["all"]
    other = torch.where(odd[:, None, None], log_pi["own"], log_pi["all"])
    options = study.Dependence((), episodes=16, fit=3, seed=3)
    a, b = (
        study.divergence_from_marginal(opened, features, x, options, "self")[~odd]
        for x in (log_pi["all"], other)
    )
    assert torch.equal(a, b)


def test_frontier(runs, tmp_path):
    """Means of the last evaluations, worked out here from the logs; arms by their alphas."""
    names = (*PPO_RUNS[:2], "sz-mappo-entropy-0.1-s1")
    paths = [runs / name for name in names]
    words = ("--states", paths[0], "--last", 2, "--fit", 2, "--episodes", 6)
    code, text, stderr = command("mipi", "frontier", *paths, *words, "--out", tmp_path / "f")
    assert code == 0, stderr
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.strip().splitlines()]
    rows = [dict(zip(lines[0], row)) for row in lines[2:]]
    assert [(x["arm"], x["alpha"]) for x in rows] == [
        ("MAPPO", "0"),
        ("MAPPO + MI", "0.1"),
        ("MAPPO + entropy", "0.1"),
    ]
    for row, path in zip(rows, paths, strict=True):
        unseen = np.mean(logged(path, 6, "win")[-2:])
        trained = np.mean([logged(path, size, "return")[-2:] for size in (3, 4)])
        assert row["win, unseen"] == f"{unseen:.3f}"
        assert row["return, trained"] == f"{trained:.3f}"
    told = dependence(*paths, *words[:2], "--fit", 2, "--episodes", 6, "--draws", 1)
    for row, path in zip(rows, paths):
        for name in ("kl self", "out"):
            assert row[name] == told[path.name][name].split()[0]
    with Image.open(tmp_path / "f.png") as image:
        assert min(image.size) > 200
    assert (tmp_path / "f.csv").read_text().count("\n") == 4
    for words, sentence in (
        ((paths[0], "--last", 1, "--states", runs / "nothing"), "is no run directory"),
        ((runs / "sz-collaq-s1", "--last", 1, "--states", paths[0]), "collaq_smac.py, not of"),
        ((runs / "sz-mipi-s1", "--last", 1, "--states", paths[0]), "refil_smac.py, not of mappo"),
        ((paths[0], "--last", 50, "--states", paths[0]), "fewer than --last 50"),
    ):
        code, _, stderr = command("mipi", "frontier", *words, "--out", tmp_path / "g")
        assert code == 2 and stderr.count("\n") == 1 and sentence in stderr, (words, stderr)


def test_frontier_of_runs_of_two_lengths(runs, tmp_path, monkeypatch):
    """Alpha is a number, whatever stands behind it in a row's name."""
    longer = shutil.copytree(runs / PPO_RUNS[1], tmp_path / "longer-s1")
    log = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(x | {"timesteps": 2 * x["timesteps"]}) + "\n" for x in log)
    (longer / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(study, "frontier_row", lambda *found: {})
    paths = (*(runs / name for name in PPO_RUNS[:2]), longer)
    rows = study.frontier_rows(study.Frontier(paths, states=paths[0], last=1))
    found = {x["run"]: (x["arm"].partition(", ")[0], x["alpha"]) for x in rows}
    assert found == {
        PPO_RUNS[0]: ("MAPPO", 0),
        PPO_RUNS[1]: ("MAPPO + MI", 0.1),
        "longer-s1": ("MAPPO + MI", 0.1),
    }
    assert len({x["arm"] for x in rows}) == 3  # the longer one is an arm of its own


def test_alphas_are_chosen_in_one_size_and_judged_in_others(runs, tmp_path):
    """By the mean over seeds, in each arm out of its own; the size that chose is not in what is
    reported, of any arm."""
    won = {  # {run: share won with 6, with 7}
        "mappo-s1": (0.7, 0.1),
        "mi-0.05-s1": (0.4, 0.9),  # best in the test, but not in validation
        "mi-0.1-s1": (0.3, 0.2),
        "mi-0.1-s2": (0.8, 0.3),
    }
    for name, (six, seven) in won.items():
        source = "sz-mappo-s1" if name == "mappo-s1" else "sz-mappo-mi-0.1-s1"
        shutil.copytree(runs / source, tmp_path / name)
        args = json.loads((tmp_path / name / "args.json").read_text())
        args |= {"eval_team_sizes": [6, 7], "seed": int(name[-1])}
        args |= {"alpha": float(name.split("-")[1])} if "mi" in name else {}
        (tmp_path / name / "args.json").write_text(json.dumps(args))
        log, lines = tmp_path / name / "metrics.jsonl", []
        for line in map(json.loads, log.read_text().splitlines()):
            wins = {"eval/6/win": six, "eval/7/win": seven}
            lines.append(json.dumps(line | (wins if "eval/6/win" in line else {})))
        log.write_text("\n".join(lines) + "\n")
    paths = [tmp_path / name for name in won]
    words = ("--states", paths[0], "--last", 1, "--fit", 1, "--episodes", 4)
    words += ("--out", tmp_path / "f")
    code, text, stderr = command("mipi", "frontier", *paths, *words, "--choose-on", 6)
    assert code == 0, stderr
    every, chosen = text.strip().split("\n\nAlphas chosen with teams of 6;")
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in every.splitlines()]
    rows = [dict(zip(lines[0], row)) for row in lines[2:]]
    found = [(x["alpha"], x["win, 6"], x["win, unseen"]) for x in rows]
    assert found == [("0", "0.700", "0.100"), ("0.05", "0.400", "0.900"), ("0.1", "0.550", "0.250")]
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in chosen.splitlines()[2:]]
    assert lines[0] == ["arm", "alphas", "chosen", "win, 6", "win, unseen"]
    assert lines[2:] == [
        ["MAPPO", "1", "0", ".700", ".100 (.100)"],
        ["MAPPO + MI", "2", "0.1", ".550", ".250 (.200, .300)"],
    ]
    plain = command("mipi", "frontier", *paths, *words)[1]
    assert "Alphas chosen" not in plain and "| 0.650 |" in plain  # .4 and .9
    for path, size, sentence in (
        (paths[0], 8, "was not evaluated in the unseen size 8"),
        (paths[0], 3, "was not evaluated in the unseen size 3"),
        (runs / "sz-mappo-s1", 6, "was evaluated in no other unseen size"),
    ):
        code, _, stderr = command("mipi", "frontier", path, *words, "--choose-on", size)
        assert code == 2 and stderr.count("\n") == 1 and sentence in stderr, (size, stderr)


# --- Teammates and mixes --------------------------------------------------------------------------


def printed(*words):
    """{first cell: cells} of a table that a subcommand prints."""
    code, text, stderr = command("mipi", *words)
    assert code == 0, stderr
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(lines[0], row)) for row in lines[2:]}


class Says:
    """A policy that acts by one action where that is available, and keeps what all did."""

    def __init__(self, action):
        self.action, self.last_actions, self.seen = action, None, []

    def __call__(self, battles):
        self.seen.append(self.last_actions)
        can = battles.obs.avail[..., self.action]
        return torch.where(can, self.action, battles.obs.avail.int().argmax(-1))


def test_half_of_each_team_is_the_teammates():
    """Rounded down, drawn for each battle, the same all along, never an empty slot; both policies
    are told what everybody did."""
    own, mate = Says(2), Says(3)
    policy = study.Beside(own, mate, 5)
    battles = study.worlds.make_worlds("sim", "sz", (3, 4, 5), num_battles=40, seed=1)
    drawn = []
    for _ in range(2):
        battles.reset()
        for step in range(3):
            avail = battles.obs.avail.clone()
            actions = policy(battles)
            if step == 0:
                drawn.append(policy.of_mate.clone())
            assert torch.equal(policy.of_mate, drawn[-1])
            walks = avail[..., 2] & avail[..., 3]
            assert walks.any()
            wanted = torch.where(policy.of_mate, 3, 2)
            assert torch.equal(actions[walks], wanted[walks])
            assert own.last_actions is actions and mate.last_actions is actions
            battles.step(actions)
        there = torch.from_numpy(np.asarray(battles.snapshot.type)[:, :8] >= 0)
        assert not (drawn[-1] & ~there).any()
        assert torch.equal(drawn[-1].sum(1), there.sum(1) // 2)
    assert not torch.equal(*drawn)
    of_five = drawn[0][there.sum(1) == 5]
    assert of_five.float().mean(0)[:5].min() > 0


def test_teammates(runs, monkeypatch):
    """A run beside itself is itself, beside a script it earns something else; the script's own
    figures are those of its battles."""
    make_worlds = study.worlds.make_worlds
    longer = functools.partial(make_worlds, "sim", "sz", num_battles=24, episode_limit=60)

    def new_battles(run, size, number, seed):
        assert (number, seed) == (24, 1 + size), "sizes share no mixes"
        args = runs_module.Run(runs / "sz-mappo-s1").args
        assert first(run, size, number, seed).rules.limit == args["max_episode_steps"]
        return longer(team_sizes=(size,), seed=seed)

    first = study.new_battles
    monkeypatch.setattr(study, "new_battles", new_battles)
    names = [runs / name for name in ("sz-mappo-s1", "sz-mipi-s1", "sz-collaq-s1")]
    quick = ("--team-sizes", 3, 6, "--episodes", 24)
    rows = printed("teammates", *names, "--teammates", "focus", names[1], *quick)
    assert list(rows) == [*(path.name for path in names), "focus"]
    assert rows["sz-mipi-s1"]["sz-mipi-s1"] == rows["sz-mipi-s1"]["itself"]
    assert all(row["focus"] != row["itself"] for row in rows.values())
    assert len({row["focus"] for row in rows.values()}) == 4
    ended = []
    for size in (3, 6):
        battles = longer(team_sizes=(size,), seed=1 + size)
        ended += study.episodes.play(battles, study.episodes.focus)
    assert rows["focus"]["itself"] == study.score(ended)
    for words, sentence in (
        ((names[0], "--teammates", runs / "nothing"), "is no run directory"),
        ((runs / "nothing",), "is no run directory"),
        ((names[0], "--team-sizes"), "--team-sizes"),
        ((names[0], "--teammates", names[1], names[1]), "have the same name"),
    ):
        code, _, stderr = command("mipi", "teammates", *words)
        assert code == 2 and sentence in stderr, (words, stderr)


def test_new_mixes(runs, tmp_path, monkeypatch):
    """Of the sizes that were trained with, and none that a battle of the scenario has."""
    for task, sizes in (("csz", (3, 4, 5)), ("mmm", (4, 7))):
        family = study.worlds.family_of(task)
        met, new = set(family.teams(sizes)), study.new_mixes(family, sizes)
        special = family.types.index(family.special)
        assert new and len(set(new)) == len(new) and not met & set(new)
        assert {sum(team) for team in new} == set(sizes)
        assert all(sum(team) > team[special] for team in new)
        # all mixes: those met, these, and those of special units only
        every = [n * (n + 1) // 2 + n for n in sizes]
        assert len(met) + len(new) == sum(every)
    code, _, stderr = command("mipi", "mixes", runs / "sz-mappo-s1")
    assert code == 2 and "Battles of sz have all mixes" in stderr
    with contextlib.redirect_stdout(io.StringIO()):
        words = f"{TINY.replace('sz', 'csz')} {ON_POLICY} --run-dir {tmp_path / 'csz'}"
        assert mappo.main(words.split()) == 0
    teams, play = [], study.episodes.play

    def watched(battles, policy):
        ended = play(battles, policy)
        teams.append({episode.team for episode in ended})
        return ended

    monkeypatch.setattr(study.episodes, "play", watched)
    rows = printed("mixes", tmp_path / "csz", "--episodes", 8)
    assert list(rows) == ["csz"] + [
        f"{x} (script)" for x in ("random", "nearest", "focus", "retreat")
    ]
    family = study.worlds.family_of("csz")
    new = set(study.new_mixes(family, (3, 4)))
    for n, played in enumerate(teams):  # met with 3 and 4, new with 3 and 4
        assert played <= (new if n % 4 > 1 else set(family.teams((3, 4))))
        assert {sum(team) for team in played} == {3 + n % 2}
