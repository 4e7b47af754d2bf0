"""Table 1's runs, and runs beside each other's actors."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from made_up import experiment, fake_run, is_png, rows
from runs import change_newest

bidist = experiment("bidist")


def test_the_tables_runs(tmp_path, monkeypatch, capsys):
    """Seven rows a substrate, each with a script that takes its command line; equal steps."""
    monkeypatch.chdir(tmp_path)
    argv = ["table1", "--total-timesteps", "64000", "--seeds", "1", "2", "--dry-run"]
    assert bidist.main([*argv, "--extra", "--num-workers", "1"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 * 5 * 7
    for command in commands:
        assert "--total-timesteps 64000" in command and "--num-workers 1" in command
    assert sum("--clip-centre printed" in command for command in commands) == 2 * 5
    scripts = {command.split()[1] for command in commands}
    names = ("mappo", "randnet", "opre", "pp", "rpm")
    own = {f"baselines/{name}_meltingpot.py" for name in names}
    assert scripts == own | {"bidist_mappo_meltingpot.py"}
    assert bidist.main([*argv, "--only", "mappo", "pp", "--substrates", "coins"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 2
    twice = ["--substrates", "coins", "coins", "--seeds", "3", "3", "--only", "mappo", "--dry-run"]
    assert bidist.main(["table1", *twice]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


OWN = "is the table's own: not after --extra."
NOWHERE = "would be evaluated in no scenario"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--only", "reinforce"], "--only reinforce: there are bidist, "),
        (["--seeds"], "--seeds"),
        (["--extra", "--k-d", "3"], "--k-d"),  # not all scripts have it
        (["--only", "bidist-printed", "--extra", "--clip-centre", "old"], f"--clip-centre {OWN}"),
        (["--only", "bidist", "--extra", "--clip-centre=printed"], f"--clip-centre {OWN}"),
        (["--extra", "--substrate", "toy"], f"--substrate {OWN}"),
        (["--extra", "--run-dir", "x"], f"--run-dir {OWN}"),
        (["--extra", "--run_dir=x"], f"--run-dir {OWN}"),
        (["--extra", "--seed", "1"], f"--seed {OWN}"),
        (["--extra", "--total-timesteps", "10000000"], f"--total-timesteps {OWN}"),
        (["--substrates", "toy"], f"toy-bidist-s1 {NOWHERE}"),
        (["--substrates", "coins", "--extra", "--eval-scenarios", "none"], NOWHERE),
        (["--extra", "--final-episodes", "0"], "--final-episodes 0 leaves nothing for the table."),
        (
            ["--substrates", "coinz"],
            "error: Unknown substrate 'coinz': did you mean coins or coop_mining?\n",
        ),
    ],
)
def test_what_no_table_has(argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bidist.main(["table1", "--dry-run", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_cross_play(trained, tmp_path, capsys):
    """Each run beside each; self-play in brackets; methods' means over seeds, beside others."""
    argv = ["cross-play", *map(str, trained), "--episodes", "30", "--out", str(tmp_path / "x")]
    assert bidist.main(argv) == 0
    found = rows(tmp_path / "x.csv")
    assert len(found) == 9 and {int(row["episodes"]) for row in found} == {30}
    text = (tmp_path / "x.md").read_text()
    for name in (path.name for path in trained):
        mine = [row for row in found if row["focal"] == name]
        (alone,) = (row for row in mine if row["background"] == name)
        assert f"({float(alone['return_per_1000']):.1f})" in text
    others = [row for row in found if row["focal"] != row["background"]]
    (method,) = {r["focal_method"] for r in others if r["focal"] == trained[2].name}
    mappo = [float(r["return_per_1000"]) for r in others if r["focal_method"] == method]
    assert len(mappo) == 2 and f"| {method} | {np.mean(mappo):.1f} | 1 |" in text
    theirs = [float(r["return_per_1000"]) for r in others if r["focal_method"] != method]
    assert f"| {np.mean(theirs):.1f} | 2 | {trained[0].name}: " in text  # two seeds, one by one


def test_intervals_of_cross_play():
    """From five seeds on, over seeds; fewer are listed with each run's own mean."""
    value = {f"a-s{seed}": 10.0 * seed for seed in range(1, 6)} | {"b-s1": 7.0, "b-s2": 9.0}
    table = [
        {
            "focal": focal,
            "focal_method": focal[0],
            "background": background,
            "return_per_1000": x if focal != background else 1000.0,
        }
        for focal, x in value.items()
        for background in value
    ]
    text = bidist.text_of_cross_play(table)
    assert "| a | 30.0 [" in text and "| 5 |  |" in text
    assert "| b | 8.0 | 2 | b-s1: 7.0; b-s2: 9.0 |" in text


def test_who_plays_the_focal_seat(trained, tmp_path):
    """The toy: who always chooses the first colour is right in a third of the episodes, then beside
    itself always rewarded in full; hardly trained actors beside it agree by chance."""
    copies = []
    for name in ("new-s1", "first-s1"):
        shutil.copytree(trained[2], tmp_path / name)
        copies.append(str(tmp_path / name))

    def always_the_first(state):
        state["agent"]["actor"]["out.bias"][0] += 30.0

    change_newest(tmp_path / "first-s1", always_the_first)
    argv = ["cross-play", *copies, "--episodes", "300", "--out", str(tmp_path / "x")]
    assert bidist.main(argv) == 0
    found = rows(tmp_path / "x.csv")
    mean = {(r["focal"], r["background"]): float(r["return_per_1000"]) for r in found}
    assert mean["first-s1", "first-s1"] == pytest.approx(1000 / 3, abs=90)
    assert mean["new-s1", "first-s1"] == pytest.approx(1000 / 3 * (1 / 2 + 1 / 6), abs=70)


def test_curves_over_thetas_samples(trained, tmp_path):
    """Two agents, p = .4: nobody is trained in none of the worlds, so theta plays .68 of the seats,
    and all of them in .36 of the worlds; by the draws themselves."""
    script, (child, _, parent) = bidist.load_script(bidist.SCRIPT), trained
    args = script.parse([])
    v = script.draw_trained(args, (200_000, 2), bidist.torch.Generator().manual_seed(0))
    argv = ["curves", str(child), str(parent), "--scalar", "entropy", "--every", "40"]
    assert bidist.main([*argv, "--out", str(tmp_path / "x")]) == 0
    found = rows(tmp_path / "x.csv")
    for row in found:
        steps, theta = int(row["timesteps"]), int(row["theta_samples"])
        everybody = int(row["all_theta_samples"])
        if row["run"] == parent.name:
            assert steps == theta == everybody
        else:
            assert theta / steps == pytest.approx(v.float().mean().item(), abs=0.02)
            assert everybody / steps == pytest.approx(v.all(1).float().mean().item(), abs=0.02)
    assert is_png(tmp_path / "x.png")
    # Values are the log's (a window is an iteration); the page has each run's last.
    text = (tmp_path / "x.md").read_text()
    for run in (child, parent):
        log = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        wanted = {x["timesteps"]: x["entropy"] for x in log if "entropy" in x}
        own = {int(r["timesteps"]): float(r["value"]) for r in found if r["run"] == run.name}
        assert own.keys() == wanted.keys() and len(own) > 1
        assert [own[x] for x in own] == pytest.approx([wanted[x] for x in own], rel=1e-4)
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {run.name} | {max(own)} |")]
        assert line.endswith(f"| {own[max(own)]:.1f} |")
    every = [{k: float(x) if k != "run" else x for k, x in row.items()} for row in found]
    figure = bidist.draw_samples_axes(every, "entropy")
    for axis, count in zip(figure.axes, ("timesteps", "theta_samples", "all_theta_samples")):
        drawn = [x for line in axis.lines for x in line.get_xdata()]
        assert drawn == pytest.approx([row[count] / 1000 for row in every]), count
    bidist.plt.close(figure)


def test_shares_of_past_actors_and_of_nobody():
    """Two seats, q = .3: both past in .09 of the worlds, where one of them is spared; by hand."""
    about = {"substrate": "toy", "seed": 1}
    for script in ("pp_meltingpot", "rpm_meltingpot"):
        shares = bidist.theta_shares(about | {"script": script, "history_share": 0.3})
        assert shares == pytest.approx((0.49 + 0.42 / 2 + 0.09 / 2, 0.49))
    assert bidist.theta_shares(about | {"script": "mappo_meltingpot"}) == (1, 1)
    nobody = about | {"script": bidist.SCRIPT, "all_fictitious": True}
    assert bidist.theta_shares(nobody) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--scalar win", "--scalar win: {} has none of that name."),
        ("--scalar entropy --every 999", "--every 999 is more than {} has trained."),
    ],
)
def test_what_has_no_curve(trained, tmp_path, capsys, flags, sentence):
    argv = ["curves", str(trained[0]), "--out", str(tmp_path / "x"), *flags.split()]
    assert bidist.main(argv) == 2
    assert capsys.readouterr().err == f"error: {sentence.format(trained[0])}\n"


def test_a_world_of_ones_own_has_no_curves(tmp_path, capsys):
    run = str(fake_run(tmp_path / "own-s1", substrate="my_world:MyWorld"))
    assert bidist.main(["curves", run, "--out", str(tmp_path / "x")]) == 2
    sentence = f"{run} is in a world of your own, whose seats are not known."
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize("command", ["curves", "cross-play", "fig5"])
def test_runs_of_other_papers(tmp_path, capsys, command):
    run = tmp_path / "other-s1"
    run.mkdir()
    (run / "args.json").write_text('{"script": "mra_maddpg_particle", "seed": 1}')
    assert bidist.main([command, str(run), "--out", str(tmp_path / "x")]) == 2
    sentence = f"{run} is of mra_maddpg_particle.py, which has no substrate."
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_focal_seats_leave_one(trained, tmp_path, capsys):
    argv = ["cross-play", *map(str, trained), "--num-focal", "2", "--out", str(tmp_path / "x")]
    assert bidist.main(argv) == 2
    sentence = "--num-focal 2 of 2 seats leaves none to a co-player."
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(("seats", "asked", "focal"), [(6, 0, 5), (6, 2, 2), (1, 0, 1)])
def test_all_seats_but_one_are_focal(seats, asked, focal, tmp_path, monkeypatch):
    """Unless another number is asked for; a world of one seat has it."""
    given = []

    def play_pairs(envs, pairs, num_focal, **options):
        given.append(num_focal)
        return {name: {} for name in pairs}

    script = SimpleNamespace(load_player=lambda *_, **__: None)
    monkeypatch.setattr(bidist, "load_script", lambda name: script)
    monkeypatch.setattr(bidist, "play_pairs", play_pairs)
    runs = [bidist.Run(fake_run(tmp_path / f"a-s{s}", seed=s)) for s in (1, 2)]
    envs = SimpleNamespace(spec=SimpleNamespace(num_agents=seats))
    study = bidist.CrossPlay((), num_focal=asked)
    bidist.play_pair(*runs, envs, study, np.random.default_rng(1))
    assert given == [focal]


def test_one_run_or_two_worlds_are_no_cross_play(trained, capsys):
    assert bidist.main(["cross-play", str(trained[0])]) == 2
    assert "two runs or more, all on one substrate" in capsys.readouterr().err
