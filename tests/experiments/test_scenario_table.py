"""The table of returns beside scenarios' co-players, against plain NumPy on made-up evaluations."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up import HEADER, command, experiment, fake_evaluation, fake_run, rows
from runs import BIDIST, MAPPO, ROOT
from scipy import stats

tables, runs = experiment("scenario_table"), experiment("runs")


def make(out, *argv):
    """Run the script; the exit code."""
    return tables.main(["--out", str(out), *map(str, argv)])


def figures(path):
    """The CSV: {(scenario, method, run, quantity): row}."""
    return {(r["scenario"], r["method"], r["run"], r["quantity"]): r for r in rows(path)}


def bounds(row):
    return float(row["low"]), float(row["high"])


def test_figures_of_few_runs(tmp_path, capsys):
    """Each run has its line, with an interval over episodes; the method has the mean and none."""
    rng = np.random.default_rng(0)
    data, paths = {}, []
    for seed, level in ((1, 10), (2, 14)):
        run = fake_run(tmp_path / f"a-s{seed}", seed=seed)
        returns, lengths = level + 3 * rng.normal(size=400), rng.integers(300, 900, 400)
        fake_evaluation(run, "SC0", [float(x) for x in returns], lengths)
        data[run.name] = (returns, lengths)
        paths.append(run)
    assert make(tmp_path / "new/x", *paths) == 0
    found, means = figures(tmp_path / "new/x.csv"), {"return": [], "return_per_1000": []}
    for name, (returns, lengths) in data.items():
        spread = 1.96 * returns.std() / 20
        row = found["SC0", "bidist_mappo", name, "return"]
        assert float(row["mean"]) == pytest.approx(returns.mean(), rel=1e-5)
        assert bounds(row) == pytest.approx(
            (returns.mean() - spread, returns.mean() + spread), abs=0.1 * spread
        )
        ratio = 1000 * returns.sum() / lengths.sum()
        # The delta method: a ratio's deviation is that of its residuals over the mean length.
        spread = 1.96 * (1000 * returns - ratio * lengths).std() / lengths.mean() / 20
        row = found["SC0", "bidist_mappo", name, "return_per_1000"]
        assert float(row["mean"]) == pytest.approx(ratio, rel=1e-5)
        assert bounds(row) == pytest.approx((ratio - spread, ratio + spread), abs=0.1 * spread)
        assert (row["over"], row["episodes"], row["timesteps"]) == ("episodes", "400", "1,000")
        means["return"].append(returns.mean())
        means["return_per_1000"].append(ratio)
    text = (tmp_path / "new/x.md").read_text()
    assert text in capsys.readouterr().out
    for quantity, own in means.items():
        row = found["SC0", "bidist_mappo", "", quantity]
        assert float(row["mean"]) == pytest.approx(np.mean(own), rel=1e-5)
        assert (row["low"], row["high"], row["over"], row["normalised"]) == ("",) * 4
        # One method alone has no normalised figure, and four of the paper's scenarios were not run.
        line = f"| **bidist_mappo**, 2 runs | 1,000 | 800 | {np.mean(own):.1f} |"
        assert line + " not run |" * 4 in text
    row = found["SC0", "bidist_mappo", "a-s1", "return"]
    cell = "{:.1f} [{:.1f}, {:.1f}]".format(*(float(row[k]) for k in ("mean", "low", "high")))
    assert f"| seed 1 (a-s1) | 1,000 | 400 | {cell} | not run |" in text
    assert tables.RELATIVE in text and "Note:" not in text
    assert (tmp_path / "new/x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_evaluation_of_a_runs_end_counts(tmp_path):
    """Not the file of steps that it no longer has, as it was resumed from an older checkpoint."""
    run = fake_run(tmp_path / "a-s1")
    fake_evaluation(run, "SC0", [1.0] * 3, timesteps=3000)
    fake_evaluation(run, "SC0", [2.0] * 3, timesteps=2000)
    (run / "summary.json").write_text(json.dumps({"timesteps": 2000, "eval": {}}))
    assert [cell.timesteps for cell in tables.read_cells(tables.Run(run), "a")] == [2000]
    (run / "summary.json").unlink()
    assert [cell.timesteps for cell in tables.read_cells(tables.Run(run), "a")] == [3000]


def test_normalised_by_hand(tmp_path):
    """Constant returns 2, 5, 11 are 0, 1/3, 1; equal ones have no normalised figure."""
    paths = []
    for name, flags, x in (
        (BIDIST, {}, 5.0),
        (BIDIST, {"k_d": 10, "reverse": False}, 11.0),
        (MAPPO, {}, 2.0),
    ):
        run = fake_run(tmp_path / f"run{len(paths)}-s1", name, **flags)
        fake_evaluation(run, "SC0", [x] * 3)
        fake_evaluation(run, "SC1", [4.0] * 3)
        paths.append(run)
    fake_evaluation(paths[0], "SC2", [6.0] * 3)
    fake_evaluation(paths[1], "SC2", [-2.0] * 3)
    assert make(tmp_path / "x", *paths) == 0
    found = figures(tmp_path / "x.csv")
    methods = ("bidist_mappo", "bidist_mappo --k-d 10 --no-reverse", "mappo")
    for quantity in ("return", "return_per_1000"):
        scores = [found["SC0", m, "", quantity]["normalised"] for m in methods]
        assert [float(x) for x in scores] == pytest.approx([1 / 3, 1, 0], abs=1e-5)
        assert {found["SC1", m, "", quantity]["normalised"] for m in methods} == {""}
        assert [found["SC2", m, "", quantity]["normalised"] for m in methods[:2]] == ["1", "0"]
    assert float(found["SC0", "mappo", "", "return_per_1000"]["mean"]) == 4  # 2 in 500 steps
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert (
        "| **mappo**, 1 run | 1,000 | 3 | 2.0 **0.00** | 4.0 | not run | not run | not run |"
        in lines
    )
    assert sum("5.0 **0.33** | 4.0 | 6.0 **1.00** |" in line for line in lines) == 1


def many(tmp_path, name, runs, between, rng, episodes=30):
    """Runs of one method whose levels deviate by `between`; their returns (R, E)."""
    returns = 10 + between * rng.normal(size=(runs, 1)) + 2 * rng.normal(size=(runs, episodes))
    paths = []
    for seed, own in enumerate(returns, 1):
        paths.append(fake_run(tmp_path / f"{name}-s{seed}", seed=seed))
        fake_evaluation(paths[-1], "SC0", [float(x) for x in own])
    return paths, returns


def test_from_five_runs_on_intervals_are_over_runs(tmp_path):
    rng, widths = np.random.default_rng(3), []
    for between in (0, 4):
        paths, returns = many(tmp_path / str(between), "a", 40, between, rng)
        out = tmp_path / f"x{between}"
        assert make(out, *paths) == 0
        row = figures(out.with_suffix(".csv"))["SC0", "bidist_mappo", "", "return"]
        expected = stats.ttest_1samp(returns.mean(1), 0).confidence_interval()
        assert bounds(row) == pytest.approx(expected, rel=1e-4)
        assert (row["over"], row["runs"]) == ("runs", "40")
        widths.append(bounds(row)[1] - bounds(row)[0])
    assert widths[1] > 4 * widths[0]
    text = (tmp_path / "x4.md").read_text()
    assert "**bidist_mappo**, 40 runs" in text and "seed" not in text.partition("##")[2]


@pytest.mark.parametrize("runs", [4, 5])
def test_seeds_are_listed_below_five(tmp_path, runs):
    paths, _ = many(tmp_path, "a", runs, 1, np.random.default_rng(1))
    assert make(tmp_path / "x", *paths) == 0
    text, found = (tmp_path / "x.md").read_text(), figures(tmp_path / "x.csv")
    assert ("| seed 2 (a-s2) |" in text) == (runs < 5)
    assert found["SC0", "bidist_mappo", "a-s2", "return"]["low"]
    assert bool(found["SC0", "bidist_mappo", "", "return"]["low"]) == (runs == 5)


def test_official_and_scripted_bots_share_no_table(tmp_path):
    paths = []
    for name, x in ((BIDIST, 1.0), (MAPPO, 3.0)):
        paths.append(fake_run(tmp_path / name, name))
        fake_evaluation(paths[-1], "SC0", [x] * 2)
    fake_evaluation(paths[0], "SC0", [100.0] * 2, bots="official", timesteps=3000)
    assert make(tmp_path / "x", *paths) == 0
    assert not (tmp_path / "x.csv").exists() and not (tmp_path / "x.md").exists()
    official, scripted = (figures(tmp_path / f"x-{k}.csv") for k in ("official", "scripted"))
    assert {row["bots"] for row in official.values()} == {"official"}
    assert {row["bots"] for row in scripted.values()} == {"scripted"}
    assert {key[1] for key in official} == {"bidist_mappo"}
    assert float(official["SC0", "bidist_mappo", "", "return"]["mean"]) == 100
    # Normalised among scripted bots alone.
    assert scripted["SC0", "bidist_mappo", "", "return"]["normalised"] == "0"
    assert scripted["SC0", "mappo", "", "return"]["normalised"] == "1"
    for kind in ("official", "scripted"):
        assert (tmp_path / f"x-{kind}.png").exists()
        assert f"{kind} bots" in (tmp_path / f"x-{kind}.md").read_text()


def test_last_evaluation_or_another(tmp_path):
    run, other = fake_run(tmp_path / "a-s1"), fake_run(tmp_path / "b-s1", MAPPO)
    for steps, x in ((900, 1.0), (2000, 2.0), (10_000, 3.0)):
        fake_evaluation(run, "SC0", [x], timesteps=steps)
    fake_evaluation(run, "SC1", [1.0], timesteps=2000)  # not of the last
    (run / "evaluation/eval-99999-SC0-scripted.csv").write_text("")  # on the way: not ours
    fake_evaluation(other, "SC0", [7.0], timesteps=2000)
    assert make(tmp_path / "x", run, other) == 0
    found, text = figures(tmp_path / "x.csv"), (tmp_path / "x.md").read_text()
    assert found["SC0", "bidist_mappo", "", "return"]["mean"] == "3"
    assert ("SC1", "bidist_mappo", "", "return") not in found
    assert (
        "Note: not all runs were trained for the same number of steps: bidist_mappo: 10,000; "
        in text
    )
    assert make(tmp_path / "x", run, other, "--timesteps", 2000) == 0
    found = figures(tmp_path / "x.csv")
    assert found["SC0", "bidist_mappo", "", "return"]["mean"] == "2"
    assert found["SC1", "bidist_mappo", "", "return"]["mean"] == "1"
    assert "Note:" not in (tmp_path / "x.md").read_text()


def test_methods(tmp_path):
    """Named by script and flags, or by the directory."""
    flags = {"reverse_lr": 1e-4, "team_reward": True, "final_episodes": 7, "background": ()}
    run = fake_run(tmp_path / "name-s1", total_timesteps=5, num_threads=2, **flags)
    expected = "bidist_mappo --team-reward --reverse-lr 0.0001"
    assert runs.method_of(runs.Run(run).args) == expected
    fake_evaluation(run, "SC0", [1.0])
    assert make(tmp_path / "x", run, "--group-by", "name") == 0
    assert ("SC0", "name", "", "return") in figures(tmp_path / "x.csv")


def test_a_seed_counts_once(tmp_path, capsys):
    """Two runs of one method and seed are one seed, also where one of them is longer."""
    paths = [finished(tmp_path / name, seed=1, steps=20) for name in ("a", "b")]
    assert make(tmp_path / "x", *paths) == 2
    assert "would count as two seeds of mappo, but both have seed 1" in capsys.readouterr().err
    longer = finished(tmp_path / "longer", seed=1, steps=40)
    assert make(tmp_path / "x", paths[0], longer) == 2
    assert "would count as two seeds of mappo, but both have seed 1" in capsys.readouterr().err
    assert make(tmp_path / "x", paths[0], finished(tmp_path / "c", seed=2, steps=20)) == 0


def test_names_are_of_one_method(tmp_path, capfd):
    """--group-by name refuses what is no seed of one method, and lengths unless they are chosen."""
    paths = [fake_run(tmp_path / f"a-s{s}", seed=s) for s in (1, 2, 3)]
    paths.append(fake_run(tmp_path / "a-s4", seed=4, k_d=7))
    for path, steps in zip(paths, (1000, 1000, 2000, 1000)):
        fake_evaluation(path, "SC0", [1.0], timesteps=1000)
        (path / "summary.json").write_text(json.dumps({"timesteps": steps, "eval": {}}))
    out, by_name = tmp_path / "x", ("--group-by", "name")
    assert make(out, *paths[:2], *by_name) == 0
    assert make(out, *paths[:3], *by_name, "--timesteps", 1000) == 0
    for others, reason in (
        (paths[:3], "their steps differ (1,000, 2,000)"),
        (paths[::3], "their k_d"),
    ):
        assert make(out, *others, *by_name) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "would count as two seeds" in err and reason in err
    assert make(out, *paths) == 0, "by flags"


def test_a_study_says_what_its_runs_say(tmp_path):
    """The files of runs and of the CSV they were packed into are the same."""
    rng, paths = np.random.default_rng(2), []
    for name, script in (("a-s1", BIDIST), ("a-s2", BIDIST), ("b-s1", MAPPO)):
        paths.append(fake_run(tmp_path / name, script, seed=int(name[-1]), team_reward=True))
        for scenario in ("SC0", "SC2"):
            lengths = rng.integers(300, 900, 40)
            returns = [float(x) for x in rng.normal(size=40)]
            fake_evaluation(paths[-1], scenario, returns, lengths)
            fake_evaluation(paths[-1], scenario, returns[:5], timesteps=500)
    study = tmp_path / "study.csv"
    assert runs.main(["pack", str(study), *map(str, paths)]) == 0
    for steps in ((), ("--timesteps", 500)):
        assert make(tmp_path / "x", *paths, *steps) == 0
        assert make(tmp_path / "y", study, *steps) == 0
        for ending in ("md", "csv", "png"):
            files = [(tmp_path / f"{name}.{ending}").read_bytes() for name in "xy"]
            assert files[0] == files[1], ending
    only = ("--only", "b-*", "a-s2")
    assert make(tmp_path / "y", study, *only) == 0
    assert list(dict.fromkeys(r["run"] for r in rows(tmp_path / "y.csv") if r["run"])) == [
        "b-s1",
        "a-s2",
    ]


def finished(path, seed, steps, **flags):
    """A run with a log, and a summary after so many steps; 0: without one."""
    run = fake_run(path, MAPPO, seed=seed, **flags)
    log = [{"timesteps": at, "entropy": at / 7, "episode/return": 0.1} for at in (10, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    if steps:
        summary = {"timesteps": steps, "eval": {"v random": {"return": 1 / 3, "episodes": 9}}}
        (run / "summary.json").write_text(json.dumps(summary))
    fake_evaluation(run, "SC0", [float(seed)], timesteps=20)
    return run


def pack(study, *words):
    return command("runs", "pack", study, *words)


def test_packing_into_a_study_keeps_its_runs(tmp_path):
    """Runs whose directories have gone stay to the byte, with curves that are not asked for now;
    one that is named again is replaced in its place; OUT among the runs chooses what stays."""
    a, b, c = (finished(tmp_path / f"x-s{s}", s, 20) for s in (1, 2, 3))
    study = tmp_path / "study.csv"
    assert pack(study, a, b, "--curves", "*")[0] == 0
    lines = study.read_text().splitlines()
    shutil.rmtree(a)
    fake_evaluation(b, "SC0", [7.0], timesteps=20)
    code, said, _ = pack(study, b, c, "--curves", "episode/*")
    assert code == 0 and said.startswith(f"{study}: 3 runs, 1 of them from before, ")
    found = study.read_text().splitlines()
    own = [[x for x in every if x.startswith("x-s1,")] for every in (lines, found)]
    assert own[0] == own[1] and any(",curve,10,,entropy," in x for x in own[1])
    assert list(dict.fromkeys(x.partition(",")[0] for x in found[1:])) == ["x-s1", "x-s2", "x-s3"]
    assert [run.evaluations[0].returns[0] for run in runs.read_study(study)] == [1, 7, 3]
    assert pack(study, study, "--only", "x-s3")[0] == 0
    assert [run.name for run in runs.read_study(study)] == ["x-s3"]


@pytest.mark.parametrize(
    "seed, steps, flags, sentence",
    [
        (1, 0, {}, "has finished 0 steps, and 20 in {study}: leave it out, or name another file."),
        (
            1,
            10,
            {},
            "has finished 10 steps, and 20 in {study}: leave it out, or name another file.",
        ),
        (2, 20, {}, "{study} has another run called x-s1: name another file."),
        (1, 20, {"substrate": "toy"}, "{study} has another run called x-s1: name another file."),
        (1, 20, {"entropy_coef": 0.5}, "{study} has another run called x-s1: name another file."),
    ],
)
def test_packing_replaces_no_other_run(tmp_path, seed, steps, flags, sentence):
    study = tmp_path / "study.csv"
    assert pack(study, finished(tmp_path / "one/x-s1", 1, 20))[0] == 0
    before = study.read_bytes()
    code, _, error = pack(study, finished(tmp_path / "two/x-s1", seed, steps, **flags))
    assert (code, error.count("\n")) == (2, 1) and error.endswith(
        sentence.format(study=study) + "\n"
    )
    assert study.read_bytes() == before


def test_packing_into_what_is_no_study(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    code, _, error = pack(tmp_path / "x.csv", finished(tmp_path / "x-s1", 1, 20))
    assert code == 2 and error.endswith("x.csv is no study: runs.py pack makes one.\n")
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,2\n"


def test_several_substrates(tmp_path):
    """A part of OUT.md for each; beyond the paper's only what was run is a column."""
    paths = []
    for substrate in ("coins", "boat_race__eight_races"):
        paths.append(fake_run(tmp_path / substrate, substrate=substrate))
        fake_evaluation(paths[-1], "SC6", [1.0, 2.0])
    assert make(tmp_path / "x", *paths, "--draw", "return_per_1000") == 0
    coins, boats = (tmp_path / "x.md").read_text().split("## ")[1:]
    assert coins.startswith("coins\n") and "| SC0 | SC1 | SC2 | SC3 | SC4 | SC6 |" in coins
    assert boats.startswith("boat_race") and "| episodes | SC6 |" in boats


def spoil(text):
    """Replace the file of SC0 by what `text` makes of it."""

    def change(run):
        path = fake_evaluation(run, "SC0", [1.0, 2.0])
        path.write_text(text(path.read_text()))

    return change


gone = shutil.rmtree


def rewrite(**new):
    def change(run):
        args = json.loads((run / "args.json").read_text()) | new
        (run / "args.json").write_text(json.dumps(args))
        fake_evaluation(run, "SC0", [1.0])

    return change


def in_world(substrate):
    def change(run):
        args = json.loads((run / "args.json").read_text()) | {"substrate": substrate}
        (run / "args.json").write_text(json.dumps(args))

    return change


ERRORS = {
    "no directory": (gone, (), "a-s1 is no run directory."),
    "no run": (lambda run: (run / "args.json").unlink(), (), "a-s1 is no run directory."),
    "no script's name": (
        lambda run: (run / "args.json").write_text("{}"),
        (),
        "it has no args.json with a script.",
    ),
    "no script": (rewrite(script="mine"), (), "mine.py is not in this repository: use --group-by"),
    "no evaluation": (
        lambda run: None,
        (),
        "python bidist_mappo_meltingpot.py --eval-only {run} --eval-scenarios all makes it.",
    ),
    "no scenarios": (in_world("toy"), (), "scenarios yet: toy has no scenarios."),
    "a world of one's own": (in_world("my:World"), (), "yet: my:World has no scenarios."),
    "no episodes": (spoil(lambda text: HEADER), (), "SC0-scripted.csv holds no episodes."),
    "no column": (spoil(lambda text: text.replace("length", "size")), (), "has no column length."),
    "other bots": (
        spoil(lambda text: text.replace("scripted", "official")),
        (),
        "holds coins_0 with official bots, not coins_0 with scripted bots.",
    ),
    "other scenario": (
        spoil(lambda text: text.replace("coins_0", "coins_4")),
        (),
        "holds coins_4 with scripted bots, not coins_0 with scripted bots.",
    ),
    "no number": (spoil(lambda text: text.replace(",2.0,1.0", ",x,1.0")), (), "is no number."),
    "no text": (
        lambda run: fake_evaluation(run, "SC0", [1.0]).write_bytes(b"\xff\xfe"),
        (),
        "SC0-scripted.csv is damaged.",
    ),
    "nan": (spoil(lambda text: text.replace(",2.0,1.0", ",nan,1.0")), (), "that cannot be."),
    "steps": (
        spoil(lambda text: text),
        ("--timesteps", "77"),
        "has no evaluation after 77 steps, but after 1,000.",
    ),
    "twice": (spoil(lambda text: text), ("{run}",), "A run directory is named twice."),
    "no study": (
        spoil(lambda text: text),
        ("{run}/no.csv",),
        "no.csv cannot be read: No such file",
    ),
    "another CSV": (
        spoil(lambda text: text),
        ("{run}/evaluation/final-1000-SC0-scripted.csv",),
        "scripted.csv is no study: runs.py pack makes one.",
    ),
    "only": (spoil(lambda text: text), ("--only", "b*"), "--only b*: no run has such a name."),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence(tmp_path, capsys, case):
    change, argv, sentence = ERRORS[case]
    run = fake_run(tmp_path / "a-s1")
    change(run)
    assert make(tmp_path / "x", run, *(x.format(run=run) for x in argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence.format(run=run) in line
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--resamples 0", "--resamples 0: input should be greater than or equal to 1."),
        ("--seed -1", "--seed -1: input should be greater than or equal to 0."),
        ("--timesteps -1", "--timesteps -1: input should be greater than or equal to 0."),
        ("--out {tmp}/file/x", "--out {tmp}/file/x cannot be written: File exists."),
        ("--out {tmp}/file/new/x", "--out {tmp}/file/new/x cannot be written: Not a directory."),
        ("--out {tmp}/taken", "--out {tmp}/taken cannot be written: Is a directory."),
        ("--out .", "--out . names a directory, not the files' common beginning."),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, capsys, flags, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "taken.md").mkdir()
    run = fake_run(tmp_path / "a-s1")
    fake_evaluation(run, "SC0", [1.0, 2.0])
    assert make(tmp_path / "x", run, *flags.format(tmp=tmp_path).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {sentence.format(tmp=tmp_path)}"


def test_advice_that_works(tmp_path, capsys):
    """An entry of the zoo stays as it is; a packed study names no run to evaluate."""
    run = fake_run(tmp_path / "a-s1", MAPPO)
    study = tmp_path / "study.csv"
    assert runs.main(["pack", str(study), str(run)]) == 0
    assert make(tmp_path / "x", study) == 2
    begin = "has no evaluation beside scenarios yet"
    sentence = f"a-s1 in {study} {begin}: pack it again from runs that have one."
    assert capsys.readouterr().err == f"error: {sentence}\n"
    entry = ROOT / "zoo/coins-mappo-s21"
    bare = tmp_path / "coins-mappo-s21"
    shutil.copytree(entry, bare, ignore=lambda *_: ["evaluation"])
    assert make(tmp_path / "x", bare) == 2
    command = f"python baselines/mappo_meltingpot.py --eval-only {bare} --eval-scenarios all"
    sentence = f"{bare} {begin}: {command} --run-dir runs/{bare.name} makes one there."
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_parent_is_found_in_baselines(tmp_path, capsys):
    run = fake_run(tmp_path / "a-s1", MAPPO)
    assert make(tmp_path / "x", run) == 2
    assert "python baselines/mappo_meltingpot.py --eval-only" in capsys.readouterr().err
    assert Path(ROOT / runs.script_file("mappo_meltingpot")).exists()
