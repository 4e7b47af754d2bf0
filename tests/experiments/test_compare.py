"""Curves and final figures side by side, of directories and of studies."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from made_up import ROOT, command, experiment, fake_evaluation, fake_run, is_png, rows
from runs import BIDIST, STEPS, script, tiny

GATE = f"{ROOT}/experiments/studies/mra_gate.toml"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two seeds of one group, eight iterations each."""
    paths = [tmp_path_factory.mktemp("runs") / f"toy-s{seed}" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        argv = tiny(BIDIST, path, 8, "--seed", seed, "--final-episodes", 3)
        assert script(BIDIST).main(argv) == 0
    return paths


def test_curves_and_tables(two, tmp_path):
    every, names = 3 * STEPS, ("entropy", "kl")
    argv = [*two, "--curves", *names, "--every", every, "--means", "reverse/kl_after"]
    code, printed, _ = command("compare", *argv, "--out", tmp_path / "new/x")
    assert code == 0 and (tmp_path / "new/x.md").read_text() in printed
    assert is_png(tmp_path / "new/x.png")
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


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--curves", "--curves entorpy: no run has a scalar of that name."),
        ("--means", "--means entorpy: no run has a scalar of that name."),
        ("--rows", "--rows entorpy: no run has a row of that name."),
    ],
)
def test_a_misspelt_name_writes_nothing(tmp_path, flag, sentence):
    """Not an empty table in the place of the one that is there."""
    run = toy_run(tmp_path / "a-s1", 1)
    right = {"--curves": "entropy", "--means": "entropy", "--rows": "v random"}[flag]
    (run / "metrics.jsonl").write_text('{"timesteps": 40000, "entropy": 1.0}\n')
    code, _, err = command("compare", run, flag, right, "--out", tmp_path / "x")
    assert code == 0, err
    before = (tmp_path / "x.md").read_bytes()
    code, _, err = command("compare", run, flag, right, "entorpy", "--out", tmp_path / "x")
    assert (code, err) == (2, f"error: {sentence}\n")
    assert (tmp_path / "x.md").read_bytes() == before


def test_differences_from_a_parent(two, tmp_path):
    """Groups of seeds, a line per row and figure; what has one seed has no interval."""
    copies = [("mine-s1", two[0], 10), ("mine-s2", two[1], 10), ("one-s1", two[0], 5)]
    for name, path, gain in copies:
        shutil.copytree(path, tmp_path / name)
        summary = tmp_path / name / "summary.json"
        found = json.loads(summary.read_text())
        found["eval"]["v random"]["return_per_1000"] += gain
        summary.write_text(json.dumps(found))
    runs = [*two, *(tmp_path / name for name in ("mine-s1", "mine-s2", "one-s1"))]
    argv = [*runs, "--rows", "v random", "--out", tmp_path / "x"]
    code, printed, _ = command("compare", *argv, "--against", "toy")
    assert code == 0 and printed.count("difference from toy") == 1
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if "| return per 1,000 steps |" in " ".join(line.split()) and " v 2 " in line
    ]
    (mine, one) = lines
    assert mine[:3] == ["mine", "v random", "return per 1,000 steps"]
    assert mine[3].startswith("+10.00 [") and mine[5] == "2 v 2" and 0.3 <= float(mine[4]) <= 1
    assert "[" not in one[3] and one[4] == "" and one[5] == "1 v 2"
    code, _, err = command("compare", *argv, "--against", "nobody")
    assert code == 2 and "--against nobody: no run is called so" in err


def toy_run(path, seed, steps=40_000, mean=1.0, **flags):
    """A finished run of BiDist, made up."""
    run = fake_run(path, seed=seed, **{"substrate": "toy"} | flags)
    row = {"return": mean, "return_low": mean, "return_high": mean, "episodes": 9}
    summary = {"timesteps": steps, "eval": {"v random": row}}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"substrate": "coins"}, "their substrate differs (toy, coins)"),
        ({"name": "baselines.mappo_meltingpot"}, "their script differs "),
        ({"k_d": 7}, "their k_d differs (its default, 7)"),
        ({"seed": 1}, "both have seed 1"),
        ({"steps": 400_000}, "their steps differ (40,000, 400,000)"),
    ],
)
def test_what_is_no_other_seed_is_in_no_group(tmp_path, second, reason):
    """Directories and packed runs; other arms of the same make are compared."""
    runs = [toy_run(tmp_path / "its-s1", 1), toy_run(tmp_path / "its-s2", **{"seed": 2} | second)]
    out = ("--out", tmp_path / "x")
    code, _, err = command("compare", *runs, *out)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "x.md").exists()
    assert f"its-s1 and {runs[1]} would count as two seeds of one group, but {reason}" in err
    command("runs", "pack", tmp_path / "study.csv", *runs)
    code, _, err = command("compare", tmp_path / "study.csv", *out)
    assert code == 2 and reason in err
    assert command("compare", tmp_path / "study.csv", "--only", "*-s2", *out)[0] == 0


def test_seeds_may_differ_in_what_does_not_train(tmp_path):
    """Machine, logging, evaluation, a preset's name; lengths by a battle; the run adapted."""
    first = toy_run(tmp_path / "a-s1", 1)
    free = {"device": "cpu", "num_threads": 2, "plain": True, "log_every": 9, "final_episodes": 3}
    second = toy_run(tmp_path / "a-s2", 2, 40_900, **free, preset="cpu")
    third = fake_run(tmp_path / "a-s3", seed=3, substrate="toy", total_timesteps=99)  # in training
    name = "mra_maddpg_particle"
    adapted = [
        fake_run(tmp_path / f"b-s{s}", name, s, substrate=None, adapt=f"runs/mra-s{s}")
        for s in (1, 2)
    ]
    code, _, err = command("compare", first, second, third, *adapted, "--out", tmp_path / "x")
    assert code == 0, err


@pytest.mark.long
def test_groups_of_packed_studies_are_arms():
    """But for two: MIPI by a former mixer, and one run with its head. --only parts them."""
    runs = experiment("runs")
    mixed = []
    for path in sorted((ROOT / "docs/data").glob("study_*.csv")):
        try:
            runs.check_groups(runs.read_study(path))
        except runs.UsageError:
            mixed.append(path.stem)
    assert mixed == ["study_collection_claims", "study_sz_claims"]


def test_runs_of_a_script_that_is_gone_are_compared(tmp_path):
    runs = [toy_run(tmp_path / f"gone-s{s}", s) for s in (1, 2)]
    for run in runs:
        args = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps(args | {"script": "gone"}))
    code, printed, err = command("compare", *runs, "--by-seed", "--out", tmp_path / "x")
    assert code == 0 and "1.00 (1.00, 1.00)" in printed, err


def test_by_seed_is_in_the_order_of_seeds(tmp_path):
    runs = [toy_run(tmp_path / f"its-s{s}", s, mean=float(s)) for s in (10, 3, 21)]
    code, printed, err = command("compare", *runs, "--by-seed", "--out", tmp_path / "x")
    assert code == 0 and "11.33 (3.00, 10.00, 21.00)" in printed, err


def test_a_difference_is_of_one_world_and_tells_of_lengths(tmp_path):
    ours = [toy_run(tmp_path / f"mine-s{s}", s) for s in (1, 2)]
    its = [toy_run(tmp_path / f"its-s{s}", s, 6400) for s in (1, 2)]
    far = toy_run(tmp_path / "far-s1", 1, substrate="coins")
    argv = ("--out", tmp_path / "x", "--against")
    code, printed, _ = command("compare", *ours, *its, *argv, "its")
    note = "Note: not all runs were trained for the same number of steps: mine: 40,000; its: 6,400."
    assert code == 0 and printed.count("Note: ") == 1
    assert note in printed.splitlines() and note in (tmp_path / "x.md").read_text()
    sparse = toy_run(tmp_path / "sparse-s1", 1)
    for run, shaping in ((ours[0], True), (sparse, False)):  # as of particle worlds
        args = json.loads((run / "args.json").read_text())
        named = {"script": "maddpg_particle", "task": "treasure", "shaping": shaping}
        args = {k: x for k, x in args.items() if k != "substrate"} | named
        folder = tmp_path / f"in-{run.name}"
        shutil.copytree(run, folder)
        (folder / "args.json").write_text(json.dumps(args))
    both = (tmp_path / "in-mine-s1", tmp_path / "in-sparse-s1")
    code, _, err = command("compare", *both, *argv, "in-mine")
    assert code == 2 and "differ in --shaping, so they are of different worlds." in err
    code, _, err = command("compare", *ours, far, *argv, "mine")
    assert code == 2 and err == (
        f"error: --against mine: {ours[0]} (toy) and {far} (coins) are of different worlds.\n"
    )
    same = [toy_run(tmp_path / f"same-s{s}", s, 40_900) for s in (1, 2)]
    code, printed, _ = command("compare", *ours, *same, *argv, "mine")
    assert code == 0 and "Note" not in printed


def test_the_best_z_of_each_seed_is_one_row(tmp_path):
    """Else a difference would be of the seeds whose best z it is: chosen by their outcome."""
    for name, best in (("mra", [5.0, 1.0, 6.0]), ("uni", [7.0, 6.0, 6.0])):
        for s, x in enumerate(best):
            path = fake_run(tmp_path / f"{name}-s{s}", "mra_maddpg_particle", s, substrate=None)
            row = {"return": x, "return_low": x, "return_high": x, "episodes": 9}
            summary = {"timesteps": 9, "eval": {f"6 best z={s % 2}": row}}
            (path / "summary.json").write_text(json.dumps(summary))
    runs = sorted(tmp_path.glob("*-s?"))
    code, printed, _ = command("compare", *runs, "--against", "uni", "--out", tmp_path / "x")
    (line,) = (x for x in printed.splitlines() if "3 v 3" in x)
    assert code == 0 and [x.strip() for x in line.split("|")][2:4] == ["6 best z", "return"]
    assert "-2.33 [" in line


def test_worlds_of_different_kinds_have_a_table_each(two, tmp_path):
    path = fake_run(tmp_path / "mra-s1", "mra_maddpg_particle", 1, substrate=None)
    row = {"return": 1.0, "return_low": 0.0, "return_high": 2.0, "episodes": 9}
    (path / "summary.json").write_text(json.dumps({"timesteps": 9, "eval": {"6": row}}))
    code, printed, _ = command("compare", two[0], path, "--out", tmp_path / "x")
    assert code == 0
    for table in printed.strip().split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert printed.count("| run |") == 2


def test_a_drawn_mean_is_of_all_seeds():
    """It ends where the first of them ends: behind that it would be of those that are left."""
    compare = experiment("compare")
    curves = {"a-s1": {"x": [(1000, 1.0), (2000, 9.0)]}, "a-s2": {"x": [(1000, 3.0)]}}
    figure = compare.draw(curves, ("x",))
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    compare.plt.close(figure)
    assert drawn == [[[1.0, 1.0], [2.0, 9.0]], [[1.0, 3.0]], [[1.0, 2.0]]]


def test_a_link_has_its_own_name(two, tmp_path):
    for name, path in zip(("mine-s1", "its-s1"), two, strict=True):
        (tmp_path / name).symlink_to(path)
    links = [tmp_path / "mine-s1", tmp_path / "its-s1"]
    code, printed, _ = command("compare", *links, "--against", "its", "--out", tmp_path / "x")
    assert code == 0 and "| mine-s1 |" in printed and "difference from its" in printed


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux and unshare")
def test_a_study_on_a_full_disk_stays(two, tmp_path):
    """Packed in place where there is no room for it: one sentence, and the study is as it was."""
    study = tmp_path / "disk/study.csv"
    study.parent.mkdir()
    command("runs", "pack", tmp_path / "study.csv", two[0])
    shell = """mount -t tmpfs -o size=32k none disk || exit 77; cp study.csv disk; "$@"
        code=$?; cmp study.csv disk/study.csv && ls disk; exit $code"""
    line = ["unshare", "-rm", "sh", "-c", shell, "sh", sys.executable, "-m", "experiments.runs"]
    line += ["pack", str(study), str(study), str(two[1]), "--curves", *["*"] * 3]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    done = subprocess.run(line, **options)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    assert done.returncode == 1 and done.stdout == "study.csv\n"
    assert done.stderr == f"error: {study} cannot be written: No space left on device.\n"


def test_a_study_says_what_its_runs_say(two, tmp_path):
    """Curves, the last, unfilled window included, and tables are those of the directories."""
    study = tmp_path / "study.csv"
    code, printed, _ = command("runs", "pack", study, *two, "--curves", "entropy", "k?")
    assert code == 0 and "2 runs" in printed
    options = ("--curves", "entropy", "kl", "--every", 3 * STEPS, "--means", "kl")
    for flags in ((), ("--by-seed",)):
        for name, source in (("x", two), ("y", [study])):
            command("compare", *source, *options, *flags, "--out", tmp_path / name)
        for ending in ("md", "csv"):
            files = [(tmp_path / f"{name}.{ending}").read_bytes() for name in "xy"]
            assert files[0] == files[1], (flags, ending)
    code, printed, _ = command("runs", "show", study, two[0])
    assert code == 0 and printed.count(f"| toy-s1 | {BIDIST} | 1 | {8 * STEPS} | ") == 2


def test_means_of_a_thinned_curve_are_refused(tmp_path):
    """Its points are windows of more or fewer lines."""
    run = toy_run(tmp_path / "a-s1", 1)
    lines = [{"timesteps": 40 * k, "entropy": float(k), "learn_s": 1.0} for k in range(1, 151)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    study = tmp_path / "study.csv"
    assert command("runs", "pack", study, run, "--curves", "entropy", "learn_s")[0] == 0
    argv = ("--curves", "entropy", "--means", "learn_s", "--out", tmp_path / "x")
    assert "| a-s1 | 1 |" in command("compare", run, *argv)[1]
    code, _, err = command("compare", study, *argv)
    assert code == 2 and "has it thinned; name run directories." in err


def test_the_last_steps_of_training(tmp_path):
    """Means of lines that begin in them, by seed; differences of these, too; studies say the same.
    The run of seed 2 has a line fewer, which ends earlier."""
    paths, expected = [], {}
    for group, gain in (("mine", 5.0), ("its", 0.0)):
        for seed, lines in ((2, 9), (1, 10)):
            run = toy_run(tmp_path / f"{group}-s{seed}", seed)
            values = gain + np.random.default_rng(seed).normal(size=lines)
            log = [{"timesteps": 100 * k + 7, "entropy": x} for k, x in enumerate(values, 1)]
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in log))
            paths.append(run)
            expected[run.name] = values[-3:].mean()  # 350 steps: a fourth line begins earlier
    study = tmp_path / "study.csv"
    command("runs", "pack", study, *paths, "--curves", "entropy")
    argv = ("--curves", "entropy", "--out", tmp_path / "x")
    for source in (paths, [study]):
        code, printed, _ = command("compare", *source, *argv, "--last", 350, "--against", "its")
        assert code == 0 and "| last 350 steps | mine | its |" in printed
        cells = re.search(r"^\| entropy \| (\S+) \((.*)\) \| (\S+) \((.*)\) \|$", printed, re.M)
        mine = [expected["mine-s1"], expected["mine-s2"]]
        assert np.allclose([float(x) for x in cells[2].split(", ")], mine, atol=0.005)
        assert np.isclose(float(cells[1]), np.mean(mine), atol=0.005)
        (line,) = (x for x in printed.splitlines() if x.startswith("| mine") and "last 350" in x)
        assert "entropy" in line and "+5.00 [" in line and "2 v 2" in line
    code, _, err = command("compare", *paths, *argv, "--last", 50)
    assert code == 2 and "--last 50: no line" in err


def test_minutes_of_runs(tmp_path):
    """A thinned curve of seconds has their sums, so minutes outlive the log; without, none."""
    run = toy_run(tmp_path / "a-s1", 1)
    lines = [{"timesteps": 40 * k, "collect_s": 3.0, "learn_s": 1.0} for k in range(1, 151)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    whole, bare = tmp_path / "whole.csv", tmp_path / "bare.csv"
    command("runs", "pack", whole, run)
    command("runs", "pack", bare, run, "--curves", "entropy")
    code, printed, _ = command("runs", "show", run, whole, bare)
    assert code == 0
    found = [line.split(" | ")[4:6] for line in printed.splitlines()[2:5]]
    assert found == [["10", "75 %"], ["10", "75 %"], ["", ""]]


def test_a_study_grows(two, tmp_path):
    """Packed again, beside further runs or without some, what it has stays the same."""
    one, both, grown, part = (tmp_path / f"{name}.csv" for name in ("one", "both", "grown", "part"))
    command("runs", "pack", one, two[0], "--curves", "entropy")
    command("runs", "pack", both, *two, "--curves", "entropy")
    command("runs", "pack", grown, one, two[1], "--curves", "entropy")
    assert grown.read_bytes() == both.read_bytes() != one.read_bytes()
    command("runs", "pack", part, both, "--only", "*-s1", "--curves", "entropy")
    assert part.read_bytes() == one.read_bytes()


def test_a_run_that_is_older_than_a_flag_keeps_its_method(two, tmp_path):
    """BiDist's clip was as printed before there was --clip-centre; so it is in study_coins.csv."""
    runs = experiment("runs")
    shutil.copytree(two[0], tmp_path / "older-s1")
    path = tmp_path / "older-s1/args.json"
    args = json.loads(path.read_text())
    assert args.pop("clip_centre") == "old"
    path.write_text(json.dumps(args))
    study = tmp_path / "study.csv"
    command("runs", "pack", study, path.parent)
    older = [runs.Run(path.parent), *runs.read_study(study)]
    older += [x for x in runs.read_study(ROOT / "docs/data/study_coins.csv") if "bidist" in x.name]
    assert len(older) == 5 and "--clip-centre" not in runs.method_of(runs.Run(two[0]).args)
    assert all("--clip-centre printed" in runs.method_of(run.args) for run in older)


def test_a_run_of_the_former_switches_is_its_ablation(two, tmp_path):
    """--no-reverse was a flag of its own; as in study_chicken.csv, from which fig8 takes BiDist."""
    runs = experiment("runs")
    shutil.copytree(two[0], tmp_path / "older-s1")
    path = tmp_path / "older-s1/args.json"
    args = json.loads(path.read_text())
    assert args.pop("forward") is args.pop("reverse") is True
    path.write_text(json.dumps(args | {"no_forward": False, "no_reverse": True}))
    found = runs.Run(path.parent).args
    assert found["forward"] is True and found["reverse"] is False and "no_reverse" not in found
    assert " --no-reverse " in runs.method_of(found)
    (packed, *_) = runs.read_study(ROOT / "docs/data/study_chicken.csv")
    assert packed.args["forward"] is packed.args["reverse"] is True


def test_a_run_that_has_not_ended_has_no_row(two, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_text('{"timesteps": 40, "entropy": 1.0}\n{"times')
    code, printed, _ = command("compare", two[0], tmp_path / "begun", "--out", tmp_path / "x")
    assert code == 0 and "| toy-s1 |" in printed and "| begun |" not in printed
    assert printed.count("Note: no final evaluation yet of begun.\n") == 1
    code, printed, _ = command("compare", tmp_path / "begun", "--out", tmp_path / "x")
    assert code == 0 and "no final" not in printed


def test_notes_without_a_parent(tmp_path):
    """Of other lengths, and of curves that have no window, with no --against, too."""
    runs = [toy_run(tmp_path / "mine-s1", 1), toy_run(tmp_path / "its-s1", 1, 6400)]
    for run in runs:
        (run / "metrics.jsonl").write_text('{"timesteps": 40, "entropy": 1.0}\n')
    argv = (*runs, "--curves", "entropy", "--every", 20_000, "--out", tmp_path / "x")
    code, printed, _ = command("compare", *argv)
    assert code == 0 and "steps: mine: 40,000; its: 6,400.\n" in printed
    assert "Note: no curves: --every 20,000 is longer than each run's log of them.\n" in printed
    code, printed, _ = command("compare", *argv, "--every", 40)
    assert code == 0 and "no curves" not in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare", "RUN", "--against", ""], "--against has an empty value"),
        (["compare", "RUN", "--out="], "--out has an empty value"),
        (["compare", "RUN", ""], "An argument has an empty value"),
        (["compare", "RUN", "--only"], "--only names nothing"),
        (["mipi", "tables", "RUN", "--against="], "--against has an empty value"),
        (["mipi", "tables", "RUN", "--only", "--last", "2"], "--only names nothing"),
        (["launch", GATE, "--seeds"], "--seeds names nothing"),
    ],
)
def test_an_unset_variable(tmp_path, words, sentence):
    """It does not stand for all runs, all seeds or the working directory."""
    run = toy_run(tmp_path / "mine-s1", 1)
    name, *argv = [str(run) if word == "RUN" else word for word in words]
    code, printed, err = command(name, *argv)
    assert (code, printed, err) == (2, "", f"error: {sentence} (an unset variable?).\n")


def test_more_flags_may_be_none(tmp_path):
    """--extra="$MORE", where nothing more is wanted."""
    for more in (["--extra", ""], ["--extra="]):
        code, printed, err = command("launch", GATE, *more, "--dry-run")
        assert code == 0 and printed.count("mra_maddpg_particle.py") == 10, err


def test_what_could_not_be_read_again_is_not_packed(tmp_path):
    """It would take the other runs of the study with it: here the episodes of a scenario are fewer
    than the summary says, as after an evaluation that was cut off."""
    study = tmp_path / "study.csv"
    for name in ("a-s1", "b-s1"):
        fake_run(tmp_path / name)
        summary = {"timesteps": 1000, "eval": {"SC0 scripted": {"episodes": 4, "return": 1.0}}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    assert command("runs", "pack", study, tmp_path / "a-s1")[0] == 0
    before = study.read_bytes()
    fake_evaluation(tmp_path / "b-s1", "SC0", [1.0, 2.0])
    code, _, error = command("runs", "pack", study, tmp_path / "b-s1")
    assert code == 2 and "b-s1 cannot be packed" in error and study.read_bytes() == before


def test_figures_have_the_digits_that_they_need():
    """Nine restore a float32; what is none has twelve."""
    as_text = experiment("runs").as_text
    assert as_text(0.1) == "0.1" and as_text(1 / 3) == "0.333333333333"
    assert as_text(float(np.float32(1 / 3))) == "0.333333343"


def test_a_study_is_packed_into_by_one_command_at_a_time(tmp_path):
    """A second one waits before it reads what is there: else the first one's runs would be lost."""
    runs, study = experiment("runs"), tmp_path / "study.csv"
    options = [runs.Pack(study, (toy_run(tmp_path / f"mine-s{s}", s),)) for s in (1, 2)]
    with runs.alone(study):
        second = threading.Thread(target=runs.pack, args=(options[1],))
        second.start()
        second.join(timeout=1)
        assert second.is_alive() and not study.exists()
        runs.add_to_study(options[0])
    second.join()
    assert [run.name for run in runs.read_study(study)] == ["mine-s1", "mine-s2"]


@pytest.mark.parametrize("name", ["compare", "runs pack", "mipi tables"])
def test_a_run_in_two_sources_is_no_two_seeds(two, tmp_path, name):
    """A directory and a study with the run, and two studies with it."""
    for study in ("one.csv", "two.csv"):
        command("runs", "pack", tmp_path / study, two[0])
    module, *words = name.split()
    words += [tmp_path / "out.csv"] if "pack" in words else ["--out", tmp_path / "out"]
    for first in (two[0], tmp_path / "one.csv"):
        code, _, stderr = command(module, *words, first, tmp_path / "two.csv")
        assert code == 2 and stderr.startswith("error: Two runs have one name: ")
        assert f" and toy-s1 in {tmp_path}/two.csv." in stderr and stderr.count("\n") == 1


def test_what_is_no_run_is_one_sentence(two, tmp_path):
    """No traceback for what is not there, or damaged."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/metrics.jsonl").write_bytes(b"\0\0\0\n")
    study = tmp_path / "study.csv"
    command("runs", "pack", study, *two)
    (tmp_path / "torn.csv").write_text(study.read_text().replace(",320,", ",32x,", 1))
    (tmp_path / "latin.csv").write_bytes(study.read_bytes() + "toy-s1,é".encode("latin-1"))
    (tmp_path / "nul.csv").write_bytes(study.read_bytes() + bytes(4096))
    (tmp_path / "long.csv").write_bytes(study.read_bytes() + b"x" * 200_000)  # for the csv module
    (tmp_path / "kind.csv").write_text(study.read_text() + "toy-s1,curves,1,,entropy,1\n")
    text = (two[0] / "summary.json").read_text()
    summaries = {"torn": text[:-9], "bare": "{}", "list": "[1]"}
    summaries |= {"steps": '{"timesteps": "9", "eval": {}}', "rows": text.replace(": {", ": [{")}
    summaries["figure"] = re.sub(r'"return": [-\d.]+', '"return": "x"', text)
    for name, damaged in summaries.items():
        shutil.copytree(two[0], tmp_path / name)
        (tmp_path / name / "summary.json").write_text(damaged)
    for source, sentence in (
        ("nowhere", "nowhere is no run directory."),
        (tmp_path / "empty", f"{tmp_path}/empty is no run directory."),
        (tmp_path / "bad", f"{tmp_path}/bad/metrics.jsonl is damaged."),
        *(
            (tmp_path / f"{x}.csv", f"{tmp_path}/{x}.csv is damaged.")
            for x in ("torn", "latin", "nul", "long", "kind")
        ),
        *((tmp_path / x, f"{tmp_path}/{x}/summary.json is damaged.") for x in summaries),
    ):
        code, _, stderr = command("compare", source, "--out", tmp_path / "x")
        assert (code, stderr) == (2, f"error: {sentence}\n")
    code, _, stderr = command("runs", "pack", tmp_path / "x.txt", two[0])
    assert code == 2 and "x.txt is no .csv." in stderr


def test_a_study_that_is_cut_off(tmp_path):
    """A packed run whose last episodes are missing is not read as a shorter one."""
    run = fake_run(tmp_path / "mine-s1")
    (run / "metrics.jsonl").write_text('{"timesteps": 1000, "entropy": 1.0}\n')
    cell = {"return": 2.0, "episodes": 3}
    summary = {"timesteps": 1000, "eval": {"SC0 scripted": cell}}
    (run / "summary.json").write_text(json.dumps(summary))
    fake_evaluation(run, "SC0", [1.0, 2.0, 3.0])
    study = tmp_path / "study.csv"
    assert command("runs", "pack", study, run)[0] == 0
    lines = study.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.csv"
    for text in ("".join(lines)[:-9], "".join(lines[:-1]), "".join(lines[:-4]), "".join(lines[:9])):
        cut.write_text(text)
        code, _, stderr = command("compare", cut)
        assert (
            code == 2 and stderr.startswith(f"error: {cut} is damaged") and stderr.count("\n") == 1
        )
    assert command("compare", study)[0] == 0


def test_a_study_that_is_cut_off_between_two_rows(tmp_path):
    """Its runs have their number of lines."""
    run = toy_run(tmp_path / "mine-s1", 1)
    summary = json.loads((run / "summary.json").read_text())
    summary["eval"]["self-play"] = summary["eval"]["v random"]
    (run / "summary.json").write_text(json.dumps(summary))
    study, cut = tmp_path / "study.csv", tmp_path / "cut.csv"
    assert command("runs", "pack", study, run)[0] == 0
    lines = study.read_text().splitlines(keepends=True)
    lines = [line for line in lines if ",self-play," not in line]
    cut.write_text("".join(lines))
    code, _, err = command("compare", cut, "--out", tmp_path / "x")
    assert (code, err) == (2, f"error: {cut} is damaged.\n")
    cut.write_text("".join(line for line in lines if ",lines," not in line))
    assert command("compare", cut, "--out", tmp_path / "x")[0] == 0  # as studies of former days


def test_long_curves_are_thinned():
    """At most 100 points: means over equal windows, each at its last point's step; of seconds
    sums, so that the whole stays what it was."""
    runs = experiment("runs")
    log = [{"timesteps": 10 * k, "x": float(k), "learn_s": float(k)} for k in range(1, 1001)]
    points = runs.thinned(log, "x")
    assert len(points) == 100 and points[0] == (100, 5.5) and points[-1] == (10_000, 995.5)
    seconds = runs.thinned(log, "learn_s")
    assert len(seconds) == 100 and seconds[0] == (100, 55.0)
    assert sum(x for _, x in seconds) == sum(range(1, 1001))
    assert runs.thinned(log[:100], "x") == [(10 * k, float(k)) for k in range(1, 101)]


def test_what_is_no_number_is_in_no_window():
    """Of a scalar that was NaN now and then, means are of what is left."""
    log = [{"timesteps": k, "x": float("nan") if k == 1 else float(k)} for k in range(1, 201)]
    points = experiment("runs").thinned(log, "x")
    assert points == [(2, 2.0), *((k, k - 0.5) for k in range(4, 201, 2))]


# What is compared without being asked -----------------------------------------------------------


def battle_run(path, seed, win, **flags):
    """A finished run of MAPPO in battles, made up: a network's row and two of scripts."""
    run = fake_run(path, "baselines.mappo_smac", seed, substrate="", **flags)
    lines = [{"timesteps": at, "return": at / 10, "win": win} for at in range(100, 1100, 100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"win": win, "win_low": win, "win_high": win, "episodes": 9}
    rows = {"3": row, "3 focus": row, "3 random": row}
    (run / "summary.json").write_text(json.dumps({"timesteps": 1000, "eval": rows}))
    return run


def test_curves_of_battles_without_a_flag(tmp_path):
    """Those that the runs log, with ten points of a short run."""
    run = battle_run(tmp_path / "mine-s1", 1, 0.5)
    assert command("compare", run, "--out", tmp_path / "x")[0] == 0
    points = rows(tmp_path / "x.csv")
    assert [x["scalar"] for x in points] == ["return"] * 10 + ["win"] * 10
    assert [int(x["timesteps"]) for x in points[:10]] == list(range(100, 1100, 100))


def test_scripts_rows_are_no_differences(tmp_path):
    """Unless --rows asks for them."""
    runs = [battle_run(tmp_path / f"{name}-s1", 1, win) for name, win in (("a", 0.5), ("b", 0.2))]
    argv = ("compare", *runs, "--against", "b", "--out", tmp_path / "x")
    _, printed, _ = command(*argv)
    assert re.findall(r"^\| a +\| (3[ a-z]*?) +\|", printed, re.M) == ["3"]
    _, printed, _ = command(*argv, "--rows", "3 focus")
    assert re.findall(r"^\| a +\| (3[ a-z]*?) +\|", printed, re.M) == ["3 focus"]


def test_flags_in_which_groups_differ_are_named(tmp_path):
    runs = [battle_run(tmp_path / "a-s1", 1, 0.5), battle_run(tmp_path / "b-s1", 1, 0.2, gamma=0.5)]
    runs += [battle_run(tmp_path / "b-s2", 2, 0.2, gamma=0.5, log_every=7)]
    _, printed, _ = command("compare", *runs, "--out", tmp_path / "x")
    assert "Note: groups differ in flags: --gamma 0.99 or --gamma 0.5.\n" in printed
    _, printed, _ = command("compare", *runs[1:], "--out", tmp_path / "x")
    assert "differ in flags" not in printed


def test_a_directory_of_runs_stands_for_them(tmp_path):
    """As the launcher has made it; its logs and study.json are no runs."""
    for seed in (1, 2):
        battle_run(tmp_path / f"many/a-s{seed}", seed, 0.5)
    (tmp_path / "many/a-s1.log").write_text("")
    (tmp_path / "many/study.json").write_text("{}")
    _, printed, _ = command("compare", tmp_path / "many", "--out", tmp_path / "x")
    assert "| a-s1 |" in printed and "| a-s2 |" in printed
    (tmp_path / "none").mkdir()
    code, _, stderr = command("compare", tmp_path / "none", "--out", tmp_path / "x")
    assert code == 2 and "is no run directory" in stderr


def test_what_pack_leaves_out_is_told(tmp_path):
    """Curves of all roles are kept, without the ends of their intervals."""
    run = toy_run(tmp_path / "mine-s1", 1)
    names = ("return_follower", "return_follower_low", "return_follower_high", "return_leader")
    line = {f"eval/3,3/{name}": 1.0 for name in names} | {"timesteps": 40, "my_own": 2.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    code, printed, _ = command("runs", "pack", tmp_path / "s.csv", run)
    assert code == 0 and "--curves does not name them: 1 scalars (my_own).\n" in printed
    found = {x["figure"] for x in rows(tmp_path / "s.csv") if x["kind"] == "curve"}
    assert found == {"eval/3,3/return_follower", "eval/3,3/return_leader"}
    curves = ("--curves", "my_*", "eval/*")
    _, printed, _ = command("runs", "pack", tmp_path / "t.csv", run, *curves)
    assert "Not packed" not in printed


def test_a_fork_that_names_its_parent_is_read_as_it(tmp_path, monkeypatch):
    """By the tools for one method; others are refused in one sentence."""
    runs = experiment("runs")
    run = runs.Run(battle_run(tmp_path / "mine-s1", 1, 0.5))
    monkeypatch.setattr(runs.load_script("mappo_smac"), "FORK_OF", "refil_smac", raising=False)
    assert runs.kind_of("mappo_smac") == runs.check_kind(run, "collaq_smac", "refil_smac")
    assert runs.kind_of("gone") == "gone" and runs.kind_of("refil_smac") == "refil_smac"
    with pytest.raises(runs.UsageError, match="not of collaq_smac, nor of a fork"):
        runs.check_kind(run, "collaq_smac")
    monkeypatch.undo()
    with pytest.raises(runs.UsageError, match="not of refil_smac"):
        runs.check_kind(run, "refil_smac")
