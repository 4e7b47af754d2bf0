"""The commands that train for MIPI's tables and print them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from runs import script
from toolbox import ROOT, sharpen

from envs.smac import resource_collection
from envs.smac.resource_collection import collector

sys.path.insert(0, str(ROOT / "experiments"))

mipi, refil = script("mipi_refil_smac"), script("baselines.refil_smac")
TINY = "--scenario sz --preset cpu --hidden-size 8 --heads 2 --rnn-size 6 --mixing-size 5 "
TINY += (
    "--num-envs 4 --batch-size 4 --max-episode-steps 4 --updates-per-iteration 1 --save-every 0 "
)
TINY += "--team-sizes 3 4 --eval-team-sizes 6 --eval-every 32 --eval-episodes 4 --final-episodes 4 "
TINY += "--total-timesteps 96 --log-every 32"

RANDOM = ("/return", "/win")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Real runs of some updates, with made-up returns: untrained networks earn nothing."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("runs")
    for name, module, flags in (
        ("sz-mipi-s1", mipi, ""),
        ("sz-mipi-s2", mipi, "--seed 2"),
        ("sz-inf-s1", mipi, "--alpha inf"),
        ("sz-same-s1", mipi, "--alpha .03"),
        ("sz-warm-s1", mipi, "--regularizer entropy --alpha .5 --learning-rate 5e-4"),
        ("sz-value-s1", mipi, "--regularizer none"),
        ("sz-refil-s1", refil, ""),
        ("sz-aqmix-s1", refil, "--no-imagine"),
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            assert module.main(f"{TINY} {flags} --run-dir {folder / name}".split()) == 0
        log, lines = folder / name / "metrics.jsonl", []
        for line in map(json.loads, log.read_text().splitlines()):
            names = [key for key in line if key.startswith("eval/") and key.endswith(RANDOM)]
            lines.append(json.dumps(line | {key: rng.uniform() for key in names}))
        log.write_text("\n".join(lines) + "\n")
    return folder


def command(name, kind, *words):
    """An experiment's command line, in this process: exit code, standard output and error."""
    module, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    argv = [str(word) for word in words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main = lambda: module.main(tyro.cli(getattr(module, kind), args=argv))  # noqa: E731
        code = module.one_line_errors(main)
    return code, out.getvalue(), err.getvalue()


def logged(run, size, measure):
    """A figure of every evaluation, read from the log."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [x[f"eval/{size}/{measure}"] for x in lines if f"eval/{size}/{measure}" in x]


def rows_below(text, title):
    """{second cell: cells} of the table under a title."""
    lines = text.split(title)[1].strip().split("\n\n")[0].splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {row[1]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_tables(runs, tmp_path):
    """Means over the last evaluations and over seeds, worked out here from the logs; rows that were
    not run; the paper's figures as printed; names of rows."""
    names = ("mipi-s1", "mipi-s2", "inf-s1", "warm-s1", "value-s1", "refil-s1", "aqmix-s1")
    paths = [runs / f"sz-{name}" for name in names]
    code, text, stderr = command(
        "mipi_tables", "Tables", *paths, "--last", 2, "--out", tmp_path / "t"
    )
    assert code == 0, stderr
    assert (tmp_path / "t.md").read_text().strip() == text.strip()
    returns = rows_below(text, "SZ: return per episode")
    own = {"MIPI", "alpha inf", "Value", "REFIL", "AQMIX"}
    own.add("Entropy, alpha 0.5 --learning-rate 0.0005")  # the preset has another
    scripts = {name for name in returns if name.endswith("(script)")}
    assert set(returns) - scripts == own and len(scripts) >= 4
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
    assert first["CollaQ"]["3-4"] == "not run" and first["CollaQ"]["paper 8"] == ".198±.097"
    assert set(rows_below(text, "Table 2: share of battles won")) == {
        "MIPI, alpha 0.03",
        "Value",
        "Entropy",
    }
    policies = rows_below(text, "SZ: policies, in training, nats")
    assert set(policies) == own - {"REFIL", "AQMIX"} and policies["Value"]["mi/zealot"] == ""
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
    assert (tmp_path / "t.csv").read_text().count("\n") > 50


def test_tables_until(runs, tmp_path):
    """Later evaluations do not count; rows of unequal length are named."""
    one, short = runs / "sz-mipi-s1", tmp_path / "sz-value-s1"
    shutil.copytree(runs / "sz-value-s1", short)
    log = short / "metrics.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:3]) + "\n")
    steps = [json.loads(x)["timesteps"] for x in log.read_text().splitlines() if "eval/" in x]
    words = (one, short, "--last", 1, "--out", tmp_path / "t")
    code, text, stderr = command("mipi_tables", "Tables", *words)
    assert code == 0, stderr
    assert f"Not equally long: {steps[-1]:,} to " in text
    cut = command("mipi_tables", "Tables", *words, "--until", steps[-1])[1]
    assert "Not equally long" not in cut
    row = rows_below(cut, "SZ: return per episode")["MIPI"]
    wanted = logged(one, 6, "return")[len(steps) - 1]
    assert row["6"] == f"{wanted:.2f}" != f"{logged(one, 6, 'return')[-1]:.2f}"
    code, _, stderr = command("mipi_tables", "Tables", one, "--last", 1, "--until", 1)
    assert code == 2 and "0 evaluations until 1 steps, fewer than --last 1" in stderr


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
    code, text, stderr = command("mipi_tables", "Tables", *words)
    assert code == 0, stderr
    assert rows_below(text, "SZ: return per episode")["Value"]["6"] == "2.00"  # of 1 and 3


def test_refused(runs, tmp_path):
    """One sentence and exit code 2."""
    shutil.copytree(runs / "sz-mipi-s1", tmp_path / "again-s1")
    other = tmp_path / "world"
    other.mkdir()
    for words, sentence in (
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
        code, _, stderr = command("mipi_tables", "Tables", *words)
        assert code == 2 and stderr.count("\n") == 1 and sentence in stderr, (words, stderr)


def test_runs_of_the_tables(tmp_path):
    """--dry-run names a command for every row of the tables that is one of these methods."""
    words = ["--seeds", "1", "2", "--dir", tmp_path / "runs", "--dry-run"]
    tables = ["table1", "table2", "table3", "d3", "collection"]
    code, text, stderr = command("mipi_runs", "Study", *tables, *words)
    assert code == 0, stderr
    lines = text.splitlines()
    module = importlib.import_module("mipi_tables")
    wanted = {("resource", name) for name in ("MIPI", "REFIL", "AQMIX")}
    for table in module.TABLES.values():
        for task, rows in table.items():
            wanted |= {(task, name) for name in rows if name not in ("CollaQ", "MAPPO")}
    found = []
    for line in lines:
        path, *argv = line.split()[1:]
        parent = refil if path.startswith("baselines") else mipi
        args = parent.parse(parent.with_preset(argv))
        assert args.eval_every * 10 == args.total_timesteps == 500_000 and args.num_envs == 32
        plain = json.loads(json.dumps(vars(args))) | {"script": parent.__name__.split(".")[-1]}
        found.append((args.scenario, module.method_of(plain), args.seed))
    assert sorted(found) == sorted((*pair, seed) for pair in wanted for seed in (1, 2))


def test_rows_are_named_by_the_flags_in_which_runs_differ():
    """Where all runs of a script have a flag that its preset has not, no row's name tells it; of
    another script's runs, which do not know it, nothing follows."""
    module = importlib.import_module("mipi_tables")

    def run(method, seed, **flags):
        known = frozenset({"gamma"} if method == "REFIL" else {"gamma", "detach", "rounds"})
        return module.Run("x", "sz", method, flags, known, seed, 1, {"3": (3,)}, [], [], {})

    refil = run("REFIL", 1)
    names = lambda *runs: {k: len(x) for k, x in module.group([refil, *runs])["sz"].items()}  # noqa: E731
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


SCRIPT = """
import json, pathlib, sys
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
run = pathlib.Path(value("--resume" if "--resume" in words else "--run-dir"))
run.mkdir(exist_ok=True)
with (run / "calls").open("a") as file:
    file.write(" ".join(words) + "\\n")
print("hello", file=sys.stderr)
if "--fail" in words:
    raise SystemExit(3)
(run / "checkpoints.json").write_text("[]")
if "--stop" not in words:
    (run / "summary.json").write_text("{}")
"""


def test_a_study_starts_resumes_and_keeps(tmp_path, monkeypatch, capsys):
    """New runs start, one that was stopped goes on, a finished one is kept, a failing one is named
    with its log; a script that only notes how it was called stands in for training."""
    figures = importlib.import_module("figures")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    study = types.SimpleNamespace(seeds=(1, 2), jobs=2, dir=tmp_path / "runs", dry_run=True)
    commands = {"a": "script.py --from SEED", "b": "script.py --stop"}
    figures.train_all(commands, study, 70)
    assert not study.dir.exists()
    assert capsys.readouterr().out.count("python script.py") == 4
    study.dry_run = False
    figures.train_all(commands, study, 70)
    figures.train_all(commands, study, 90)
    called = {path.parent.name: path.read_text().splitlines() for path in study.dir.rglob("calls")}
    assert set(called) == {"a-s1", "a-s2", "b-s1", "b-s2"}
    for seed in (1, 2):
        own = f"--seed {seed} --total-timesteps 70 --run-dir {study.dir}"
        assert called[f"a-s{seed}"] == [f"--from {seed} {own}/a-s{seed}"]
        run = study.dir / f"b-s{seed}"
        assert called[run.name][0] == f"--stop {own}/{run.name}"
        assert called[run.name][1] == f"--resume {run} --total-timesteps 90"
        assert (study.dir / f"{run.name}.log").read_text() == "hello\n" * 2
    with pytest.raises(figures.UsageError, match=r"c-s1 ended with exit code 3; see .*c-s1\.log\."):
        figures.train_all({"c": "script.py --fail"}, study, 70)


# --- Reference points, speed ----------------------------------------------------------------------


def taught(*flags):
    """What is earned, {"3 taught": ...}, on the way, too, and what share of labels was met."""
    small = ("--minibatches", 4, "--show", 1, "--every", 1, "--round", 2, "--episodes", 4)
    flags = (*small, "--learning-rate", 5e-3, "--team-sizes", 3, "--eval-team-sizes", *flags)
    code, out, error = command("collection_imitation", "Study", *flags)
    assert code == 0, error
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")]
    found = {r[1].strip(): float(r[2].split("[")[0]) for r in rows if r[1].strip() != "who"}
    met = [float(line.split(":")[1]) for line in out.splitlines() if line.startswith("labels")]
    return found, met


def test_imitation_in_resource_collection(monkeypatch):
    """Beside the scripts' own figures; options change what is learned; bad ones are refused. In
    episodes of 20 steps, to be quick."""
    short = functools.partial(resource_collection.ResourceCollection, episode_limit=20)
    monkeypatch.setattr(
        importlib.import_module("collection_imitation"), "ResourceCollection", short
    )
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
        code, _, error = command("collection_imitation", "Study", *flags)
        assert code == 2 and flags[0] in error


@pytest.mark.slow
def test_the_network_learns_resource_collection_from_labels():
    """In a sixth of the minibatches of docs/mipi.md; random play earns 2."""
    flags = ("--every", 50, "--round", 64, "--show", 500, "--episodes", 32)
    rows, _ = taught("--minibatches", 500, "--learning-rate", 5e-4, *flags)
    assert rows["3 taught"] > 3 * max(rows["3 random"], 3)


def test_scripts_of_resource_collection():
    """Figures of the environment's own functions; bad sizes are refused."""
    code, table, _ = command("collection_scripts", "Scripts", "--team-sizes", 3, "--episodes", 8)
    worlds = resource_collection.ResourceCollection((3,), 8, 1, once=True)
    earned = np.mean([e.reward for e in resource_collection.play(worlds, collector)])
    row = next(line for line in table.splitlines() if "3 collector" in line)
    assert code == 0 and f"| {earned:.1f} [" in row and row.rstrip(" |").endswith(" 8")
    still = next(line for line in table.splitlines() if "3 still" in line).split("|")
    assert float(still[3]) == 0 < float(still[4])  # nothing is picked up, invaders are caught
    assert command("collection_scripts", "Scripts", "--team-sizes", 9)[::2] == (
        2,
        "error: Teams of resource have 1 to 8 agents: not 9.\n",
    )


@pytest.mark.parametrize(
    "name, tables, lines",
    [
        ("bench_mipi", "--limits 2 --widths 8 --alternations 2", ["REFIL, linear", "MIPI, M = 2"]),
        ("bench_refil", "--limits 2 --widths 8", ["fp32"]),
    ],
)
def test_benchmarks_run(name, tables, lines):
    """On episodes of two steps: what is asked for is printed. Speed is not judged."""
    code, text, _ = command(name, "Bench", *tables.split(), "--repeats", 1, "--presets")
    assert code == 0 and all(line in text for line in lines), text
    code, _, error = command(name, "Bench", "--repeats", 0)
    assert code == 2 and "--repeats 0" in error


# --- Dependence on the team -----------------------------------------------------------------------


def dependence(*words):
    code, text, stderr = command("team_dependence", "Study", *words)
    assert code == 0, stderr
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(lines[0], row)) for row in lines[2:]}


def test_team_dependence(runs, tmp_path):
    """Nobody depends on a team that is never seen; utilities say no probabilities; all runs are
    asked about the same episodes, or each about its own."""
    names = [runs / f"sz-{name}-s1" for name in ("mipi", "inf", "refil", "aqmix")]
    own = dependence(*names, "--draws", 3)
    same = dependence(*names, "--draws", 3, "--states", runs / "sz-refil-s1")
    for rows in (own, same):
        assert set(rows) == {path.name for path in names}
        assert [rows["sz-inf-s1"][k].split()[0] for k in ("mates", "groups")] == ["0.000", "0.000"]
        assert abs(float(rows["sz-inf-s1"]["nats"].split()[0])) < 1e-6
        assert rows["sz-refil-s1"]["nats"] == rows["sz-aqmix-s1"]["nats"] == ""
        assert float(rows["sz-mipi-s1"]["nats"].split()[0]) >= 0
    assert own["sz-refil-s1"] == same["sz-refil-s1"]
    study, seed_2 = importlib.import_module("team_dependence"), runs / "sz-mipi-s2"
    mine, theirs, other = (
        study.open_checkpoint(*pair).replay.steps["actions"][:8]
        for pair in ((names[0], names[0]), (seed_2, seed_2), (names[0], seed_2))
    )
    assert torch.equal(other, theirs) and not torch.equal(other, mine)
    made = {"scenario": "csz", "backend": "sc2"}
    for name, x in made.items():
        shutil.copytree(runs / "sz-mipi-s1", tmp_path / x)
        args = json.loads((tmp_path / x / "args.json").read_text()) | {name: x}
        (tmp_path / x / "args.json").write_text(json.dumps(args))
    for words, sentence in (
        ((tmp_path / "sc2",), "is of the game itself"),
        ((names[0], "--states", tmp_path / "csz"), "is of sz"),
        ((names[0], "--states", tmp_path / "sc2"), "is of the game itself"),
        ((runs,), "is no run directory"),
        ((runs / "sz-mipi-s1", "--states", runs / "nothing"), "is no run directory"),
        ((runs / "sz-mipi-s1", "--draws", 0), "--draws 0"),
    ):
        code, _, stderr = command("team_dependence", "Study", *words)
        assert code == 2 and stderr.count("\n") == 1 and sentence in stderr


def test_what_team_dependence_measures(runs, monkeypatch):
    """By loops: sharp agents, whose actions do change; teammates' features matter to nobody when
    they are not seen, enemies' do."""
    study = importlib.import_module("team_dependence")
    opened = study.open_checkpoint(runs / "sz-mipi-s1", runs / "sz-mipi-s1")
    for k, net in enumerate((opened.agent.utility, opened.agent.policy)):
        sharpen(net, 1.0, k)
    args = study.Study((), episodes=6, draws=3)
    found = study.measure(opened, args)
    rng = torch.Generator().manual_seed(1)
    batch = opened.replay.sample(rng, 6)
    view, A = batch.view, batch.view.unseen.shape[1]

    def policy(view, groups=None):
        with torch.no_grad():
            q, x, _ = opened.agent.utility(view, groups)
            seen = 0 if groups is None else 1
            return opened.agent.log_policy(q[seen], x[seen], view.avail).exp().numpy()

    alone = view._replace(unseen=view.unseen.clone())
    for i in range(A):
        for j in range(A):
            alone.unseen[:, i, j] |= i != j
    draws = [policy(view, mipi.draw_groups(view, rng)) for _ in range(3)]
    real, hidden = policy(view), policy(alone)
    battles, acts = view.played.nonzero()[:, 1].tolist(), set(batch.step.tolist())
    each = {name: [[] for _ in range(6)] for name in found}
    for m, b in enumerate(battles):
        for i in range(A) if m in acts else ():
            if view.avail[m, i, 0]:
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
