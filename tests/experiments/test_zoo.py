"""The zoo: what is in it loads and plays, its cards say what its files do, and an entry that is
made of a run plays as that did, to the last bit."""

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import harness

import numpy as np
import pytest
import torch
from all_scripts import MELTINGPOT, OFF_POLICY, ON_POLICY, PARTICLE
from all_scripts import command as tiny_command
from made_up import command, experiment
from runs import MAPPO, ROOT, change_newest, only_error, script

zoo = experiment("zoo")
ENTRIES = zoo.read_entries(ROOT / "zoo")
SCRIPTS = [*MELTINGPOT, *PARTICLE, *ON_POLICY, *OFF_POLICY]
PAST = ("baselines.pp_meltingpot", "baselines.rpm_meltingpot")
QUICK = (MAPPO, "baselines.epc_particle", "mipi_refil_smac")


def files_of(folder):
    """Every file below it, and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True, scope="module")
def unchanged():
    """No test writes into the zoo."""
    before = files_of(ROOT / "zoo")
    yield
    assert files_of(ROOT / "zoo") == before


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """To list what is installed takes longer than a tiny run."""
    monkeypatch.setattr(harness, "distributions", lambda: [])


@pytest.fixture(scope="module")
def worlds_of():
    """Worlds of Melting Pot by their name, each built once."""
    with contextlib.ExitStack() as stack:
        built = {}

        def find(module, args):
            if args.substrate not in built:
                envs = stack.enter_context(module.make_envs(args, 2, 1))
                envs.reset()
                built[args.substrate] = envs
            return built[args.substrate]

        yield find


def players_and_actions(module, path, worlds_of, monkeypatch):
    """What load_player()'s policy does first: an array or tensor (B, N) and how many actions there
    are, None if each agent has its own."""
    args = harness.saved_args(path, module.Args)
    if hasattr(args, "substrate"):
        envs = worlds_of(module, args)
        monkeypatch.setattr(module, "make_envs", lambda *_: contextlib.nullcontext(envs))
        player = module.load_player(path, envs, seed=1)
        B, N = 2, envs.spec.num_agents
        ids = np.tile(np.arange(N), (B, 1))
        return player(envs.obs, np.ones(B, bool), ids), (B, N), envs.spec.num_actions
    if hasattr(args, "scenario"):
        with contextlib.closing(module.make_envs(args, (3,), 2, 1)) as battles:
            battles.reset()
            return module.load_player(path)(battles), (2, 8), None
    population = (getattr(args, "populations", ()) or (args.population,))[0]
    worlds = module.make_envs(args, population, 2, 1)
    worlds.reset()
    return module.load_player(path)(worlds), (2, worlds.game.num_agents), 5


# --- What is there --------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_loads_and_plays(entry, worlds_of, monkeypatch):
    """It is intact, of today's flags, and acts. Loading it draws from no generator of the caller's:
    whoever loads co-players while training would begin the same numbers again."""
    if "substrate" in entry.args:
        pytest.importorskip("dmlab2d")
    module = zoo.load_script(entry.args["script"])
    path = str(entry.path)
    before = torch.get_rng_state()
    actions, shape, count = players_and_actions(module, path, worlds_of, monkeypatch)
    assert torch.equal(torch.get_rng_state(), before)
    actions = np.asarray(actions)
    assert actions.shape == shape and np.issubdtype(actions.dtype, np.integer)
    assert (actions >= 0).all() and (count is None or (actions < count).all())


def leaves(x, where=""):
    """Names and values in a nested structure."""
    if isinstance(x, dict):
        return [leaf for name, part in x.items() for leaf in leaves(part, f"{where}/{name}")]
    if isinstance(x, (list, tuple)):
        return [leaf for k, part in enumerate(x) for leaf in leaves(part, f"{where}/{k}")]
    return [(where, x)]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_has_weights_alone(entry):
    """Four files, under a megabyte; numbers in full precision, no optimiser, no path of a machine;
    and steps and figures are of the same checkpoint."""
    index = zoo.index_of(entry)
    names = {index["name"], "args.json", "summary.json", "checkpoints.json"}
    assert {path.name for path in entry.path.iterdir()} == names
    assert (entry.path / index["name"]).stat().st_size <= 1_000_000
    state = torch.load(entry.path / index["name"], weights_only=True)
    assert state["weights_only"] and state["script"] == entry.args["script"]
    found = dict(leaves(state))
    assert not [name for name in found if "param_groups" in name or "exp_avg" in name]
    for name, x in found.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert x.dtype in (torch.float32, torch.float64) and x.isfinite().all(), name
    assert state["args"]["run_dir"] == entry.args["run_dir"] == ""
    assert state["timesteps"] == index["timesteps"] == entry.summary["timesteps"]
    assert next(zoo.figures_of(entry.summary["eval"]))


def test_the_zoo_is_small_and_all_that_there_is():
    """Weights are kept in the zoo alone; together they are under twenty-four megabytes."""
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    if tracked:  # in a repository
        assert {name.split("/")[0] for name in tracked if name.endswith(".pt")} <= {"zoo"}
    sizes = [path.stat().st_size for path in (ROOT / "zoo").rglob("*") if path.is_file()]
    assert sum(sizes) <= 24_000_000
    kinds = {entry.args["script"] for entry in ENTRIES}
    assert kinds == set(zoo.PLAYS), "every script has an entry"


def test_cards_say_what_files_say():
    text = (ROOT / "zoo/README.md").read_text()
    assert text == zoo.cards_of(ROOT / "zoo")
    for entry in ENTRIES:
        assert zoo.index_of(entry)["sha256"] in text
    assert max(len(x) for x in text.splitlines() if not x.startswith("|")) <= 100


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_command_of_a_card_is_the_runs(entry):
    """Read by its script it means the arguments of the run."""
    words = zoo.shlex.split(zoo.command_of(entry))
    module = zoo.load_script(entry.args["script"])
    args = harness.read_flags(module.Args, words[2:])
    if args.preset != "paper":
        default = module.Args(**harness.preset_flags(module.PRESETS, args), preset=args.preset)
        args = harness.read_flags(module.Args, words[2:], default)
    found = json.loads(json.dumps(vars(args)))
    own = {name: entry.args[name] for name in found if name in entry.args}
    assert {name: found[name] for name in own} == own
    assert "--seed" in words and {"--substrate", "--task", "--scenario"} & set(words)


# --- Making entries -------------------------------------------------------------------------------


@pytest.fixture
def no_trial(monkeypatch):
    """add() without the episode that it plays in a process of its own."""
    monkeypatch.setattr(zoo, "evaluate_again", lambda *_, **__: None)


def made(name, flags=(), more=()):
    """An entry zoo/x of a tiny run of a script."""
    assert script(name).main(tiny_command(name, "x", *flags)) == 0
    assert zoo.main(["add", "x", "zoo/x", *more]) == 0
    return Path("zoo/x")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.long] * (x not in QUICK)) for x in SCRIPTS]
)
def test_an_entry_plays_as_its_run(name, no_trial, worlds_of, monkeypatch):
    """--eval-only finds the figures of the run's end, bit for bit, writes where --run-dir says and
    leaves the entry as it is; its player plays, and does what the run's does."""
    # PP and RPM: past actors are not in an entry, and draw seeds.
    flags = ("--background", "random") if name in PAST else ()
    entry, module = made(name, flags), script(name)
    before = files_of(Path("zoo"))
    assert module.main(["--eval-only", "zoo/x"]) == 0
    assert module.main(["--eval-only", "zoo/x", "--run-dir", "again"]) == 0
    assert files_of(Path("zoo")) == before
    run, again = (json.loads(Path(x, "summary.json").read_text()) for x in ("x", "again"))
    assert again["eval"] == run["eval"] and again["timesteps"] == run["timesteps"]
    assert json.loads((entry / "summary.json").read_text()) == run
    found = [
        np.asarray(players_and_actions(module, path, worlds_of, monkeypatch)[0])
        for path in ("x", "zoo/x")
    ]
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--policy head", {"utility", "policy"}),
        ("--policy exact", {"utility", "marginal"}),
        ("--policy greedy --regularizer none", {"utility"}),
    ],
)
def test_an_entry_keeps_what_its_policy_reads(flags, kept, no_trial):
    """The head, the marginal or neither; with these it plays as its run, bit for bit."""
    entry, module = made("mipi_refil_smac", flags.split()), script("mipi_refil_smac")
    saved, _ = harness.load_checkpoint(str(entry))
    assert {name for name, part in saved["agent"].items() if part} == kept
    assert module.main(["--eval-only", "zoo/x", "--run-dir", "again"]) == 0
    run, again = (json.loads(Path(x, "summary.json").read_text()) for x in ("x", "again"))
    assert again["eval"] == run["eval"]


def test_what_is_left_out_cannot_be_used(no_trial):
    """A network without weights is an error, not a random one."""
    made(MAPPO)
    module = script(MAPPO)
    args = module.parse(["--eval-only", "zoo/x"])
    with module.make_envs(args, 1, 1) as envs:
        agent = module.Agent(args, envs, torch.device("cpu"))
        saved, _ = harness.load_checkpoint("zoo/x")
        harness.restore(agent, saved["agent"], "zoo/x")
        assert all(p.is_meta for p in agent.critic.parameters())
        assert not any(p.is_meta for p in agent.actor.parameters())
        with pytest.raises((RuntimeError, NotImplementedError)):
            agent.critic.out(torch.zeros(1, 64))


def test_networks_can_be_left_out(no_trial, capsys):
    """--without distilled: smaller, and without the rows beside it."""
    name = "bidist_mappo_meltingpot"
    entry = made(name, more=["--without", "distilled", "--note", "A note."])
    rows = zoo.Run(entry).summary["eval"]
    assert "v random" in rows and "v distilled" not in rows
    assert script(name).main(["--eval-only", "zoo/x", "--run-dir", "again"]) == 0
    again = json.loads(Path("again/summary.json").read_text())["eval"]
    assert list(again) == list(rows)  # other episodes: distilled players draw their seeds, too
    capsys.readouterr()
    line = ["--eval-only", "zoo/x", "--run-dir", "third", "--background", "random", "distilled"]
    assert script(name).main(line) == 2
    assert "zoo/x holds no distilled policy." in only_error(capsys.readouterr().err)
    with script(name).make_envs(script(name).parse(["--substrate", "toy"]), 1, 0) as envs:
        script(name).load_player("zoo/x", envs)
        with pytest.raises(harness.UsageError, match="zoo/x holds no distilled"):
            script(name).load_player("zoo/x", envs, network="distilled")
    small = (entry / zoo.index_of(zoo.Run(entry))["name"]).stat().st_size
    shutil.rmtree(entry)
    assert zoo.main(["add", "x", "zoo/x"]) == 0
    assert (entry / zoo.index_of(zoo.Run(entry))["name"]).stat().st_size > 1.5 * small
    assert "A note." not in Path("zoo/README.md").read_text()


def test_who_interrupts_add_leaves_no_entry(monkeypatch):
    """Ctrl-C or SIGTERM during the episode that checks it: the next add() finds nothing there."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    assert script(MAPPO).main(tiny_command(MAPPO, "x")) == 0
    monkeypatch.setattr(zoo, "evaluate_again", interrupted)
    assert zoo.main(["add", "x", "zoo/x"]) == harness.INTERRUPTED
    assert not Path("zoo/x").exists()
    monkeypatch.setattr(zoo, "evaluate_again", lambda *_, **__: None)
    assert zoo.main(["add", "x", "zoo/x"]) == 0


def test_add_refuses(no_trial, monkeypatch, capsys):
    """What is there, what has no final evaluation, what is no run or too large; nothing is
    written."""
    made(MAPPO)
    before = files_of(Path("zoo"))
    shutil.copytree("x", "older")
    change_newest("older", lambda state: state["args"].update(gone=1))
    shutil.copytree("x", "unfinished")
    Path("unfinished/summary.json").unlink()
    lines = {
        ("x", "zoo/x"): "zoo/x is there already.",
        ("unfinished", "zoo/y"): "unfinished has no final evaluation of its last checkpoint.",
        ("older", "zoo/y"): "older is of a version that has gone, too.",
        ("zoo/x", "zoo/y"): "has the weights alone that play",
        ("nowhere", "zoo/y"): "nowhere is no run directory.",
    }
    for (run, out), sentence in lines.items():
        capsys.readouterr()
        assert zoo.main(["add", run, out]) == 2
        assert sentence in only_error(capsys.readouterr().err)
    assert zoo.main(["add", "x", "zoo/y", "--without", "critic"]) == 2
    assert "--without critic: mappo_meltingpot.py's" in only_error(capsys.readouterr().err)
    monkeypatch.setattr(zoo, "LARGEST", 1000)
    assert zoo.main(["add", "x", "zoo/y"]) == 2
    assert "more than 1,000: name networks --without" in only_error(capsys.readouterr().err)
    monkeypatch.setattr(zoo, "LARGEST", 1_000_000)
    monkeypatch.setattr(zoo, "ALL_TOGETHER", 1000)
    assert zoo.main(["add", "x", "zoo/y"]) == 2
    sentence = only_error(capsys.readouterr().err)
    assert re.search(r"zoo would have [\d,]+ bytes, of 1,000: name another", sentence.strip())
    assert files_of(Path("zoo")) == before


@pytest.mark.long
def test_an_entry_that_cannot_play_is_not_kept(monkeypatch, capfd):
    """add() plays an episode in a process of its own."""
    monkeypatch.setitem(zoo.PLAYS, "mappo_meltingpot", ("agent.critic",))
    assert script(MAPPO).main(tiny_command(MAPPO, "x")) == 0
    capfd.readouterr()
    assert zoo.main(["add", "x", "zoo/x"]) == 2
    assert "zoo/x" in only_error(capfd.readouterr().err)
    assert not Path("zoo/x").exists()
    monkeypatch.setitem(zoo.PLAYS, "mappo_meltingpot", ("agent.actor",))
    assert zoo.main(["add", "x", "zoo/x"]) == 0


# --- What an entry refuses ------------------------------------------------------------------------


def test_refusals(no_trial, capfd):
    """Each in one sentence with code 2, and nothing is written."""
    made(MAPPO)
    shutil.copytree("zoo/x", "zoo/broken")
    weights = next(Path("zoo/broken").glob("*.pt"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    before = files_of(Path("zoo"))
    module, other = script(MAPPO), script("baselines.opre_meltingpot")
    toy = ["--substrate", "toy", "--total-timesteps", "40", "--run-dir", "new"]
    lines = [
        (module, ["--resume", "zoo/x"], "zoo/x has the weights alone that play"),
        (module, ["--eval-only", "zoo/broken"], "zoo/broken holds no intact checkpoint"),
        (other, ["--eval-only", "zoo/x"], "a run of mappo_meltingpot.py, not of opre"),
        (module, ["--eval-only", "zoo/x", "--capture-video"], "name a --run-dir, too"),
        (module, ["--eval-only", "zoo/x", "--run-dir", "x"], "x holds a run already"),
        (module, ["--eval-only", "zoo/x", "--gamma", "0.5"], "--gamma is 0.99 in zoo/x"),
        (other, [*toy, "--background", "zoo/x"], "zoo/x does not fit"),
    ]
    for each, argv, sentence in lines:
        capfd.readouterr()
        assert each.main(argv) == 2
        assert sentence in only_error(capfd.readouterr().err)
    assert files_of(Path("zoo")) == before and not Path("new").exists()


@pytest.mark.parametrize("name", ["baselines.rl2_particle", "baselines.epc_particle"])
def test_nothing_adapts_an_entry(name, no_trial, capfd):
    """Adaptation learns on, and so needs critics."""
    made(name)
    flags = ["--adapt", "zoo/x", "--total-timesteps", "40", "--run-dir", "new"]
    flags += ["--populations", "5"] if "epc" in name else ["--population", "5"]
    capfd.readouterr()
    assert script(name).main(flags) == 2
    assert "zoo/x has the weights alone that play" in only_error(capfd.readouterr().err)


def test_an_entry_as_a_co_player(no_trial, capfd):
    """--background takes it like a run: the same row."""
    made(MAPPO)
    rows = []
    for path in ("x", "zoo/x"):
        capfd.readouterr()
        argv = ["--eval-only", "x", "--final-episodes", "2", "--background", path]
        assert script(MAPPO).main(argv) == 0
        (row,) = (x for x in capfd.readouterr().out.splitlines() if x.startswith(f"| v {path}"))
        rows.append(row.split("|")[2:])
    assert rows[0] == rows[1]


def test_younger_flags_have_their_defaults(no_trial, capfd):
    """Runs and entries outlive new flags of their script, except to train on; none outlives flags
    that go."""
    made(MAPPO)
    module = script(MAPPO)
    change_newest("x", lambda state: state["args"].pop("amp"))
    shutil.rmtree("zoo/x")
    assert zoo.main(["add", "x", "zoo/x"]) == 0
    assert module.main(["--resume", "x", "--total-timesteps", "99999"]) == 2
    assert "had no --amp: give a value" in only_error(capfd.readouterr().err)
    folders = ("x", "run", "entry")
    for path, folder in (("x", "run"), ("zoo/x", "entry")):
        assert module.main(["--eval-only", path, "--run-dir", folder]) == 0
    results = [json.loads(Path(x, "summary.json").read_text())["eval"] for x in folders]
    assert results[0] == results[1] == results[2]
    change_newest("zoo/x", lambda state: state["args"].update(gone=1))
    capfd.readouterr()
    assert module.main(["--eval-only", "zoo/x"]) == 2
    assert "had --gone, too" in only_error(capfd.readouterr().err)


# --- Evaluating again -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "new, expected",
    [
        ((5.0, 4.0, 6.0, 16), "equal"),
        ((5.0, 4.0, 6.1, 16), "within"),
        ((7.8, 6.8, 8.8, 16), "within"),
        ((8.0, 7.0, 9.0, 16), "outside"),
        ((2.0, 1.0, 3.0, 16), "outside"),
        ((8.0, 6.0, 10.0, 16), "within"),
        ((9.5, 9.0, 10.0, 4), "within"),
        ((9.6, 9.1, 10.1, 4), "outside"),
    ],
)
def test_verdicts(new, expected):
    """Half-widths of 1 are standard errors of .51, of a difference .722: four of them are 2.89. Of
    an episode that is 2.04; of 4 beside 16 it is 1.14, four times 4.56."""
    old = zoo.Figure("row", "win", 5.0, 4.0, 6.0, 16)
    assert zoo.verdict(old, zoo.Figure("row", "win", *new)) == expected


@pytest.mark.parametrize(("x", "expected"), [(3.0000001, "within"), (3.001, "outside")])
def test_rounding_is_within(x, expected):
    """Where all episodes are alike, so that the standard error is 0."""
    old = zoo.Figure("row", "return", 3.0, 3.0, 3.0, 16)
    assert zoo.verdict(old, zoo.Figure("row", "return", x, x, x, 16)) == expected


def test_bench_zoo(no_trial, monkeypatch, tmp_path, capsys):
    """A line for each figure; code 1 if one is not the card's, or if today's evaluation lacks it
    and no flags may have left it out; a name that is not there, code 2."""
    entry = made("baselines.maddpg_particle")
    found = zoo.Run(entry).summary["eval"]
    asked = []

    def play(entry, episodes, flags):
        asked.append((entry.name, episodes, flags))
        return found

    bench = experiment("bench")
    monkeypatch.setattr(zoo, "evaluate_again", play)
    assert bench.zoo is zoo
    argv = ["zoo", "x", "--zoo", str(entry.parent), "--episodes", "3", "--flags=--device cpu"]
    assert bench.main(argv) == 0
    assert asked == [("x", 3, "--device cpu")]
    first = next(iter(found.values()))
    wide = 10 * (first["return_high"] - first["return_low"]) + 10
    first |= {name: first[name] + wide for name in ("return", "return_low", "return_high")}
    assert bench.main(["zoo", "--zoo", str(entry.parent)]) == 1
    assert bench.main(["zoo", "nobody", "--zoo", str(entry.parent)]) == 2
    row = next(iter(found))
    first |= {name: first[name] - wide for name in ("return", "return_low", "return_high")}
    capsys.readouterr()
    assert bench.main(["zoo", "--zoo", str(entry.parent)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if f"| {row} | return |" in x)
    del found[row]
    for flags, code in (("", 1), ("--eval-scenarios none", 0)):
        assert bench.main(["zoo", "--zoo", str(entry.parent), f"--flags={flags}"]) == code
        printed = capsys.readouterr().out
        lost = line.split(" | ")[3]  # the card's figure
        assert f"| x | {row} | return | {lost} |  | gone |" in printed
        assert re.search(r"0 outside, [1-9]\d* gone, 0 refused", printed)
    shutil.copytree(entry, entry.parent / "a")

    def refuse_a(run, *_, **__):
        if run.name == "a":
            raise harness.UsageError("a differs in gone.")
        return found

    monkeypatch.setattr(zoo, "evaluate_again", refuse_a)
    assert bench.main(["zoo", "--zoo", str(entry.parent), "--flags=--amp"]) == 1
    printed = capsys.readouterr().out
    assert "| a | | | | a differs in gone. | refused |" in printed and "1 refused" in printed
    assert "| x |" in printed  # the next entry has its turn


def without_figures(entry):
    found = json.loads((entry / "summary.json").read_text())
    (entry / "summary.json").write_text(json.dumps(found | {"eval": {}}))


def without_note(entry):
    found = json.loads((entry / "args.json").read_text())
    (entry / "args.json").write_text(json.dumps({k: x for k, x in found.items() if k != "note"}))


NO_INDEX = "zoo/x has no checkpoints.json that names its weights."
DAMAGED = {
    "no entry": (lambda x: shutil.rmtree(x), "zoo has no entries."),
    "no index": (lambda x: (x / "checkpoints.json").unlink(), NO_INDEX),
    "empty index": (lambda x: (x / "checkpoints.json").write_text("[]"), NO_INDEX),
    "torn index": (lambda x: (x / "checkpoints.json").write_text("[{"), NO_INDEX),
    "no item": (lambda x: (x / "checkpoints.json").write_text('[{"name": 1}]'), NO_INDEX),
    "no weights": (lambda x: next(x.glob("*.pt")).unlink(), NO_INDEX),
    "no arguments": (lambda x: (x / "args.json").unlink(), "zoo/x is no run directory."),
    "no figures": (without_figures, "zoo/x has no final evaluation."),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_entry_is_told_first(name, no_trial, capsys):
    """By both commands that read all entries, before anything is printed or written."""
    damage, sentence = DAMAGED[name]
    damage(made("baselines.maddpg_particle"))
    Path("zoo").mkdir(exist_ok=True)
    before = files_of(Path("zoo"))
    for argv in (["zoo", "--zoo", "zoo"], ["cards", "zoo"]):
        capsys.readouterr()
        assert (experiment("bench") if argv[0] == "zoo" else zoo).main(argv) == 2
        assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert files_of(Path("zoo")) == before


def test_a_card_needs_what_add_writes(no_trial, capsys):
    without_note(made("baselines.maddpg_particle"))
    capsys.readouterr()
    assert zoo.main(["cards", "zoo"]) == 2
    assert "zoo/x/args.json has no note: `zoo.py add` writes" in only_error(capsys.readouterr().err)


def test_what_a_script_refuses_is_its_last_line(monkeypatch):
    """Not a warning before it."""
    text = "a warning\nerror: --amp is not for this device.\n"
    done = subprocess.CompletedProcess([], 2, stderr=text)
    monkeypatch.setattr(zoo, "run_child", lambda *_: done)
    with pytest.raises(harness.UsageError, match=f"^{ENTRIES[0].path}: --amp is not for this dev"):
        zoo.evaluate_again(ENTRIES[0], 1, "")
    with pytest.raises(harness.UsageError, match="--flags: ': no closing quotation"):
        zoo.evaluate_again(ENTRIES[0], 1, "'")


@pytest.mark.long
def test_bench_zoo_plays():
    """In a process of its own: all figures are equal."""
    entry = made("baselines.maddpg_particle")
    code, printed, _ = command("bench", "zoo", "--zoo", str(entry.parent.resolve()))
    assert code == 0 and "0 within, 0 outside" in printed and " equal |" in printed


def test_scenarios_without_a_place_write_nothing(monkeypatch):
    """What an entry finds beside bots is printed alone; a run's goes to its directory."""
    scenarios = pytest.importorskip("envs.meltingpot.scenarios")
    saved = []
    monkeypatch.setattr(scenarios, "find_scenarios", lambda args: (["SC0"], "scripted"))
    monkeypatch.setattr(scenarios, "play_scenarios", lambda *_, **__: {"SC0 scripted": []})
    monkeypatch.setattr(scenarios, "summarise", lambda results: {"return": 1.0})
    monkeypatch.setattr(
        scenarios, "save_results", lambda folder, *_, **__: saved.append(folder) or []
    )
    args = script(MAPPO).Args()
    for place in (None, Path("here")):
        evaluation = harness.Evaluation(args, "final", 1, place)
        rows = scenarios.scenario_rows(args, evaluation, None, id_roles=("default",) * 2)
        assert rows == {"SC0 scripted": {"return": 1.0}}
    assert saved == [Path("here/evaluation")]
