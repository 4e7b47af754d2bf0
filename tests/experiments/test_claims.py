"""Criteria of the papers' claims, and the verdicts that runs bring them."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

from harness import UsageError

import numpy as np
import pytest
import tyro
from made_up import ROOT, command, experiment, is_png, rows

claims, criteria, runs_module = (experiment(x) for x in ("claims", "criteria", "runs"))
DATA = ROOT / "docs/data"
TO_COME: set[str] = set()
IDS = [*(f"B{k}" for k in range(1, 8)), "B1-proxy", *(f"M{k}" for k in range(1, 9))]
IDS += [*(f"I{k}" for k in range(1, 7)), "I1-lemma", "I2-lemma", "I6-lemma"]


@functools.cache
def book():
    return criteria.read_claims(criteria.read_tables())


@functools.cache
def studies():
    return runs_module.read_runs(sorted(DATA.glob("study_*.csv")))


def all_cases():
    return [case for cases in book().values() for case in cases]


# --- The criteria ---------------------------------------------------------------------------------


def test_all_claims_have_criteria():
    assert sorted(book()) == sorted(IDS)
    for case in all_cases():
        assert case.least_seeds >= 3
        assert set(case.first).isdisjoint(case.others)


def test_confirmatory_seeds_are_fresh():
    """Nobody had run them, and who chose defaults by 11 to 15 takes others."""
    chosen_by = criteria.read_tables()["defaults"]
    for case in all_cases():
        default = {"B": "bidist_clip_centre", "M": "mra_ladder"}.get(case.id[0])
        assert min(case.seeds) > 10
        assert not default or set(case.seeds).isdisjoint(chosen_by[default]["seeds"])
        for arm, line in case.arms.items():
            if line.startswith("mipi_refil_smac.py") and case.world != "collection":
                assert set(case.seeds_of(arm)).isdisjoint(chosen_by["mipi_mixer"]["seeds"])


def test_arms_are_command_lines_of_the_scripts():
    """Each is parsed by its script as a whole; what it adapts is an arm's run."""
    tables = criteria.read_tables()
    for case in all_cases():
        for line in case.arms.values():
            if line.startswith("experiments/"):
                continue
            arm = criteria.read_arm(line)
            assert arm.wanted is not None or arm.script in TO_COME, line
            if source := re.search(r"--adapt runs/(\w+)-(\w+)-s\{seed\}", line):
                assert source[1] in tables["worlds"] and source[2] in tables["arms"], line


def test_arms_of_a_claim_differ():
    for case in all_cases():
        kinds = [criteria.read_arm(line) for line in case.arms.values()]
        known = [json.dumps(arm) for arm in kinds if arm.wanted is not None]
        assert len(set(known)) == len(known), case.id


def test_one_name_is_one_run():
    """Claims share runs by their names."""
    found = {}
    for case in all_cases():
        for arm, line in case.arms.items():
            own = (line, case.timesteps)
            assert found.setdefault(f"{case.run}-{arm}", own) == own


@pytest.mark.parametrize("name", ["from_theta", "cross_play", "matrix_game"])
def test_tables_commands_exist(name):
    """Each is parsed with the command's own options, numbers expanded as a shell does."""
    lines = {x.measure.command for x in all_cases() if isinstance(x.measure, criteria.Table)}
    named = {"from_theta": "fig5", "cross_play": "cross-play", "matrix_game": "matrix-game"}
    own = [line for line in lines if named[name] in line.split()]
    assert own
    for line in own:
        line = re.sub(r"\{(\d+)\.\.(\d+)\}", lambda x: " ".join(numbers(x)), line)
        file, *words = shlex.split(line)
        module = experiment(Path(file).stem)
        kinds = {x: runs_module.options_of(f) for x, f in module.COMMANDS.items()}
        tyro.extras.subcommand_cli_from_dict(kinds, args=words)


def numbers(found):
    return map(str, range(int(found[1]), int(found[2]) + 1))


FORMER = """--num-envs 32 --target-head tags --returns one-step --recurrent --no-own-beside
    --optimiser rmsprop --final-share 1 --batch-size 8 --buffer-size 512 --replay-window 0
    --updates-per-iteration 16 --epsilon-steps 100000"""


def as_packed(command: str) -> str:
    """An arm's command line as packed runs had it: MRA by Algorithm 4, value learners of battles
    with the former preset."""
    if "--preset cpu" in command and "--scenario" in command and "resource" not in command:
        mixer = "--mixer linear" if command.startswith("mipi_refil_smac.py") else ""
        return " ".join(f"{command} {FORMER} {mixer}".split())
    if not command.startswith("mra_maddpg_particle.py") or "--adapt" in command:
        return command
    phi = "" if "--phi-gradient" in command else "--phi-gradient mi"
    return f"{command} {phi} --no-psi-information"


def test_what_is_measured_is_in_runs():
    """In each world some run or table has what is asked for, but where nobody has run: beside
    official bots, by today's preset of Resource Collection, by Lemma 2's weights, and below."""
    for case in all_cases():
        if case.id in ("B1", "B4", "I5") or case.id.endswith("-lemma"):
            continue
        if case.id != "M5":  # its table is of today's runs, and is refused with other flags
            arms = {arm: as_packed(command) for arm, command in case.arms.items()}
            case = case.model_copy(update={"arms": arms})
        points = [
            x
            for arm in case.arms
            for x in criteria.read_points(case, arm, case.measure, studies(), DATA)
        ]
        assert points, (case.id, case.world)
        assert all(np.isfinite(x.value) for x in points)
        assert all(np.isfinite(x.zero) for x in points if case.measure.zero)
        if case.bar:
            (judged, *_) = case.bar.arms
            own = criteria.read_points(case, judged, case.bar.measure, studies(), DATA)
            assert own or case.id == "B2", (case.id, case.world)


def test_what_reverse_phases_add_is_logged_and_packed(trained, tmp_path):
    """B4's scalars, from a run of the toy and from its study; by hand from its log."""
    (measure,) = {case.measure for case in book()["B4"]}
    study = tmp_path / "study.csv"
    code, _, _ = command("runs", "pack", study, trained[0])
    assert code == 0
    log = [json.loads(x) for x in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    half = log[-1]["timesteps"] / 2
    own = [
        x["reverse/phi_peak_after"]
        - x["reverse/phi_prefers_after"]
        - x["reverse/phi_peak_before"]
        + x["reverse/phi_prefers_before"]
        for x in log
        if "reverse/phi_peak_after" in x and x["timesteps"] >= half
    ]
    assert len(own) >= 2
    for run in (runs_module.Run(trained[0]), *runs_module.read_study(study)):
        assert criteria.measure_run(run, measure)[""] == pytest.approx(np.mean(own), abs=1e-8)


def test_labels_of_joint_actions_are_fig5s():
    (case,) = book()["B2"]
    for arm, label in case.measure.labels.items():
        module = runs_module.load_script(Path(case.arms[arm].split()[0]).stem)
        args = runs_module.script_args(module, case.arms[arm].split()[1:])
        own = dataclasses.asdict(args) | {"script": Path(case.arms[arm].split()[0]).stem}
        assert runs_module.method_of(own) == label


# --- Made-up criteria and runs --------------------------------------------------------------------

TOML = """
[papers]
mra = {{ seeds = 4, steps = 1_600_000 }}
[worlds]
small = {{ task = "resource", game = "12", timesteps = 1000, hours = 2.0 }}
large = {{ task = "resource", game = "15", timesteps = 1000, hours = 2.0 }}
[arms]
a = "mra_maddpg_particle.py --task {{task}} --populations {{game}}"
b = "baselines/maddpg_particle.py --task {{task}} --population {{game}}"
c = "baselines/maac_particle.py --task {{task}} --population {{game}}"
[measures]
returns = {{ kind = "final", rows = "{{game}}", figure = "return", zero = "random" }}
both = {{ kind = "final", rows = "x y", figure = "return" }}
[claims.M1]
says = "The first is ahead of the second"
where = "Fig. 0"
quantity = "return per agent"
measure = "returns"
worlds = ["small"]
first = ["a"]
others = ["b"]
margin = 1.0
least_seeds = 3
seeds = [11, 12, 13, 14, 15]
rule = "ahead by 1"
pilots_seen = "none at all"
"""
FILES = {"a": "mra_maddpg_particle", "b": "maddpg_particle", "c": "maac_particle"}
GAME = {"a": "populations", "b": "population", "c": "population"}


def toml(path, **changes):
    """The criteria above, with other lines; None: without that line."""
    text = TOML.format()
    for name, value in changes.items():
        text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE)
        if value is not None:
            text += f"{name} = {value}\n"
    path.write_text(text)
    return path


def lines_of(arm, seed, figures, steps=1000, game="12", episodes=None, **flags):
    """A run of an arm as a study has it; figures: {row: return}. episodes: of each row of the final
    evaluation; default: what its flags say."""
    module = runs_module.load_script(FILES[arm])
    size = (game,) if arm == "a" else game
    flags = {"total_timesteps": steps, GAME[arm]: size} | flags
    resumed = {"resumed": flags.pop("resumed")} if "resumed" in flags else {}
    own = module.Args(seed=seed, task="resource", **flags)
    episodes = episodes or own.final_episodes
    args = json.loads(json.dumps(dataclasses.asdict(own))) | {"script": FILES[arm]} | resumed
    name = f"{game}-{arm}-s{seed}-{steps}"
    for figure, value in args.items():
        yield (name, "argument", "", "", figure, json.dumps(value))
    for row, value in ({f"{game} random": 1.0} | figures).items():
        yield (name, "final", steps, row, "return", value)
        yield (name, "final", steps, row, "episodes", episodes)


def study(path, **arms):
    """A study of returns by arm: {seed: return}, or a list of lines."""
    found = []
    for arm, own in arms.items():
        for seed, value in own.items():
            found += lines_of(arm, seed, {"12": value})
    return write_study(path, found)


def write_study(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(runs_module.COLUMNS)
        writer.writerows(lines)
    return path


def seeds(*returns):
    return dict(zip(range(11, 30), returns))


@pytest.fixture
def judge(tmp_path):
    """What becomes of M1: judge(study, margin = ...)."""

    def judged(path, **changes):
        tables = criteria.read_tables(toml(tmp_path / "criteria.toml", **changes))
        cases = criteria.read_claims(tables)["M1"]
        return claims.judge(cases, runs_module.read_runs([path]), tmp_path)

    return judged


AHEAD, BEHIND = seeds(5.0, 5.5, 6.0), seeds(2.0, 2.5, 3.0)


def test_holds_or_not_by_the_interval(judge, tmp_path):
    """Below five seeds it is Student's: here both have a deviation of .5, so four degrees of
    freedom, of which 95 % lie within 2.776 (any table of t)."""
    outcome = judge(study(tmp_path / "x.csv", a=AHEAD, b=BEHIND))
    (part,) = outcome.parts
    half = 2.776 * math.sqrt(2 * 0.5**2 / 3)
    assert (part.found.low, part.found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert part.found.mean == pytest.approx(3.0) and part.found.p == pytest.approx(0.1)
    assert 3 - half > 1 and outcome.verdict == "holds"
    back = judge(study(tmp_path / "y.csv", a=BEHIND, b=AHEAD))
    assert back.verdict == "does not hold"
    level = judge(study(tmp_path / "z.csv", a=AHEAD, b=seeds(5.2, 5.7, 6.2)))
    assert level.verdict == "does not hold"  # no better is not better by 1


def test_a_margin_changes_the_verdict(judge, tmp_path):
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND)
    verdicts = {margin: judge(path, margin=margin).verdict for margin in (1.0, 3.0, 5.0)}
    assert verdicts == {1.0: "holds", 3.0: "undecided", 5.0: "does not hold"}


@pytest.mark.parametrize(
    "kind, margin", [("mean", 0.5 * 2.5), ("gain", 0.5 * (2.5 - 1.0)), ("unit", 0.5)]
)
def test_margins_are_shares_of_the_others_figures(judge, tmp_path, kind, margin):
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND)
    (part,) = judge(path, margin=0.5, margin_of=f'"{kind}"').parts
    assert part.margin == pytest.approx(margin)


def test_a_share_of_a_loss_asks_for_more_not_less(judge, tmp_path):
    """Where the other loses 2.5 a margin of a half is 1.25, and who loses as much is no better."""
    own = seeds(-2.0, -2.5, -3.0)
    path = study(tmp_path / "x.csv", a=own, b=own)
    (part,) = judge(path, margin=0.5, margin_of='"mean"').parts
    assert part.margin == pytest.approx(1.25) and part.found.high < 1.25
    assert part.verdict == "does not hold"


def test_too_few_seeds_decide_nothing(judge, tmp_path):
    outcome = judge(study(tmp_path / "x.csv", a=seeds(5.0, 5.5), b=BEHIND))
    assert outcome.verdict == "undecided" and outcome.parts[0].why == "a: 2 of 3 seeds in small"
    outcome = judge(study(tmp_path / "y.csv", a=AHEAD))
    assert outcome.verdict == "undecided" and outcome.parts[0].why == "b has not run in small"


def test_a_figure_that_is_no_number_decides_nothing(judge, tmp_path):
    """Neither as a figure nor where it should pass a bar."""
    path = study(tmp_path / "x.csv", a=seeds(5.0, math.nan, 6.0), b=BEHIND)
    for more in ({}, {"bar": '{ arms = ["a"], measure = "returns", at_least = 1 }'}):
        outcome = judge(path, **more)
        assert outcome.verdict == "undecided"
        assert outcome.parts[0].why == "a: a figure in small is not a number"
    said = claims.below_bar(outcome.cases[0], "a", outcome.parts[0].mine[0])
    assert said.startswith("a has not learned in small: nan")


def test_no_seed_is_left_out(judge, tmp_path):
    """Neither by a gap, nor by its outcome: the mean of five sees the fifth in the interval."""
    outcome = judge(study(tmp_path / "x.csv", a={11: 5.0, 13: 5.5, 14: 6.0}, b=BEHIND))
    assert outcome.verdict == "undecided"
    assert outcome.parts[0].why == "a: seed 12 is left out in small"
    path = study(tmp_path / "y.csv", a=seeds(5.0, 5.5, 6.0, -20.0), b=BEHIND)
    assert len(judge(path).parts[0].mine[0]) == 4 and judge(path).verdict == "undecided"


def test_two_runs_of_a_seed_are_refused(tmp_path):
    both = [*lines_of("a", 11, {"12": 1.0}), *lines_of("a", 11, {"12": 2.0}, steps=1001)]
    path = write_study(tmp_path / "x.csv", both)
    words = (path, "--criteria", toml(tmp_path / "criteria.toml"))
    code, _, stderr = command("claims", *words)
    assert (code, stderr.count("\n")) == (2, 1) and "the same arm and seed" in stderr


def test_what_has_not_learned_decides_nothing(judge, tmp_path):
    """The bar is for the mean over all seeds: neither the best nor most of them pass it alone."""
    path = study(tmp_path / "x.csv", a=seeds(9.0, 9.5, -8.0), b=seeds(-9.0, -9.5, -9.0))
    bar = '{ arms = ["a"], measure = "returns", at_least = %s }'
    outcome = judge(path, bar=bar % 3.6)
    assert outcome.verdict == "undecided"
    sentence = "a has not learned in small: 3.5, 0.1 below the bar of 3.6"
    assert outcome.parts[0].why == sentence
    below = judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND), bar=bar % 7)
    assert below.verdict == "undecided" and below.parts[0].found.low > 1
    said = "by its interval alone small holds"
    assert below.parts[0].beside_bar == said and said in claims.effect_row(below.parts[0])["what"]
    assert said in claims.summary_row(below)["comparisons"]
    near = judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND), bar=bar % 7, margin=3.0)
    assert "has not learned" in near.parts[0].why and not near.parts[0].beside_bar
    assert judge(study(tmp_path / "z.csv", a=AHEAD, b=BEHIND), bar=bar % 5).verdict == "holds"


def test_a_bar_is_for_the_mean_of_five_seeds_too(judge, tmp_path):
    """Not for the middle ones, of which the one that failed is none."""
    path = study(tmp_path / "x.csv", a=seeds(9.0, 9.1, 9.2, 9.3, -30.0), b=seeds(*[2.0] * 5))
    (part,) = judge(path, bar='{ arms = ["a"], measure = "returns", at_least = 5 }').parts
    assert part.why == "a has not learned in small: 1.32, 4 below the bar of 5"


def test_what_would_reach_a_bar(judge, tmp_path):
    """Both arms' reasons are told, and what seeds to come would have to be; its data is written."""
    bar = '{ arms = ["a", "b"], measure = "returns", at_least = 7 }'
    outcome = judge(study(tmp_path / "x.csv", a=AHEAD, b=BEHIND), bar=bar)
    (part,) = outcome.parts
    assert part.why == (
        "a has not learned in small: 5.5, 2 below the bar of 7; "
        "b has not learned in small: 2.5, 4 below the bar of 7"
    )
    wanted = [(7 * 5 - 3 * level) / 2 for level in (5.5, 2.5)]
    said = claims.what_decides(outcome, [])
    assert said == (
        f"bars: a in small (5.5 of 7, 2 left need {wanted[0]:.2g}), "
        f"b in small (2.5 of 7, 2 left need {wanted[1]:.2g})"
    )
    five = seeds(5.0, 5.5, 6.0, 5.0, 6.0)
    whole = judge(study(tmp_path / "y.csv", a=five, b=five), bar=bar)
    assert "a in small (5.5 of 7: all its seeds have run)" in claims.what_decides(whole, [])
    kinds = [(x["counts"], x["arm"], x["random"]) for x in claims.rows_of(outcome)]
    assert [*dict.fromkeys(kinds)] == [
        (kind, arm, 1.0) for kind in ("yes", "bar") for arm in ("a", "b")
    ]


def test_other_seeds_lengths_and_flags_do_not_count(judge, tmp_path):
    """Other seeds and lengths are pilots; other flags are another method."""
    lines = [x for s, y in BEHIND.items() for x in lines_of("b", s, {"12": y})]
    own = [x for s, y in AHEAD.items() for x in lines_of("a", s, {"12": y}, steps=1040)]
    assert judge(write_study(tmp_path / "x.csv", lines + own)).verdict == "holds"
    longer = [x for s, y in AHEAD.items() for x in lines_of("a", s, {"12": y}, steps=1060)]
    outcome = judge(write_study(tmp_path / "y.csv", lines + longer))
    assert outcome.parts[0].why == "a has not run in small"
    assert not outcome.pilots  # no length in common
    seen = [x for s in (1, 2) for arm in "ab" for x in lines_of(arm, s, {"12": s + 3.0})]
    outcome = judge(write_study(tmp_path / "z.csv", seen))
    (pilot,) = outcome.pilots
    assert outcome.verdict == pilot.verdict == "undecided" and pilot.found.mean == 0
    assert [x.seed for x in pilot.mine[0]] == [1, 2] and not outcome.parts[0].mine[0]
    lengths = {1: 500, 2: 500, 3: 2000, 4: 2000}
    seen = [x for s, n in lengths.items() for y in "ab" for x in lines_of(y, s, {"12": 3.0}, n)]
    (pilot,) = judge(write_study(tmp_path / "v.csv", seen)).pilots
    assert [x.seed for x in pilot.mine[0]] == [3, 4], "the longest that both have"
    changed = [x for s, y in AHEAD.items() for x in lines_of("a", s, {"12": y}, gamma=0.9)]
    outcome = judge(write_study(tmp_path / "w.csv", lines + changed))
    assert outcome.parts[0].why == "a has not run in small"


OWN = "{ a = [14, 15, 16] }"


def test_an_arm_with_its_own_seeds(judge, tmp_path):
    """Only those count, and only of that arm; a gap among them is one of its own list."""
    fresh = dict(zip((14, 15, 16), AHEAD.values()))
    path = study(tmp_path / "x.csv", a=fresh, b=BEHIND)
    assert judge(path).parts[0].why == "a: seed 11 is left out in small"
    assert judge(path, own_seeds=OWN).verdict == "holds"
    outcome = judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND), own_seeds=OWN)
    assert outcome.parts[0].why == "a has not run in small"
    outcome = judge(study(tmp_path / "z.csv", a={14: 5.0, 16: 5.5}, b=BEHIND), own_seeds=OWN)
    assert outcome.parts[0].why == "a: seed 15 is left out in small"


def test_an_arm_with_its_own_seeds_has_its_own_study(tmp_path):
    path = study(tmp_path / "x.csv", a={14: 5.0}, b=BEHIND)
    words = ("--criteria", toml(tmp_path / "c.toml", own_seeds=OWN))
    code, text, _ = command("claims", path, *words, "--data", tmp_path, "--commands", "M1")
    assert code == 0 and "for s in 15 16; do python mra_maddpg_particle.py" in text
    assert command("claims", *words, "--studies", tmp_path / "studies")[0] == 0
    names = {"claims_small.toml": ("b", [11, 12, 13]), "claims_small_s14.toml": ("a", [14, 15, 16])}
    assert {x.name for x in (tmp_path / "studies").iterdir()} == {*names}
    for name, (arm, own) in names.items():
        written = tomllib.loads((tmp_path / "studies" / name).read_text())
        assert ([*written["runs"]], written["seeds"]) == ([f"small-{arm}"], own)
    code, text, _ = command("claims", path, *words, "--data", tmp_path)
    assert code == 0 and "| 11 to 15, a 14 to 16; none at all |" in text


def test_a_claim_is_all_of_its_comparisons(judge, tmp_path):
    """One that fails refutes it, though another has not run; one that is open leaves it open."""
    others = {"others": '["b", "c"]'}
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND, c=BEHIND)
    assert judge(path, **others).verdict == "holds"
    assert judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND), **others).verdict == "undecided"
    assert judge(study(tmp_path / "z.csv", a=BEHIND, c=AHEAD), **others).verdict == "does not hold"


def test_one_arm_from_zero(judge, tmp_path):
    """All signs are tried: with three seeds p is no less than a quarter."""
    path = study(tmp_path / "x.csv", a=AHEAD)
    outcome = judge(path, others=None, compare='"level"')
    (part,) = outcome.parts
    assert outcome.verdict == "holds" and part.found.mean == pytest.approx(5.5)
    half = 4.303 * 0.5 / math.sqrt(3)  # t of two degrees of freedom
    assert (part.found.low, part.found.high) == pytest.approx((5.5 - half, 5.5 + half), abs=1e-3)
    assert part.found.p == pytest.approx(0.25)
    assert judge(path, others=None, compare='"level"', margin=7).verdict == "does not hold"


def test_from_five_seeds_on_the_middle_counts(judge, tmp_path):
    """Of five the three in the middle, if the other arm has five, too; the interval, of resamples,
    sees the fifth. Beside three the mean counts, on both sides."""
    mine = seeds(5.0, 5.5, 6.0, 6.5, 1000.0)
    five = judge(study(tmp_path / "x.csv", a=mine, b=seeds(2.0, 2.5, 3.0, 2.0, 3.0))).parts[0]
    assert five.found.mean == pytest.approx(6.0 - 2.5)
    assert 2 < five.found.low < five.found.high and five.found.high > 100
    three = judge(study(tmp_path / "y.csv", a=mine, b=BEHIND)).parts[0]
    assert three.found.mean == pytest.approx(1023 / 5 - 2.5)


def test_what_means_would_say_is_told(judge, tmp_path):
    """One of fifteen that fails is not in the middle half, and seldom in that of a resample."""
    path = study(tmp_path / "x.csv", a=seeds(*[5.0] * 14, -40.0), b=seeds(*[2.0] * 15))
    outcome = judge(path, seeds=[*range(11, 26)])
    (part,) = outcome.parts
    assert outcome.verdict == "holds" and part.found.mean == 3.0
    assert part.plain.mean == pytest.approx(0.0) and part.by_means.startswith("by means undecided")
    assert not judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND)).parts[0].by_means


def test_ranks_over_worlds(judge, tmp_path):
    """Two worlds of one cell: b is ahead in one, a in the other and on the whole, where c is last.
    Without c ranks would be others, so there are none."""
    lines = []
    for game, own in (("12", {"a": 9.0, "b": 3.0, "c": 1.0}), ("15", {"a": 4.0, "b": 5.0, "c": 1})):
        for arm, s in itertools.product(own, (11, 12, 13)):
            lines += lines_of(arm, s, {game: own[arm] + s / 100}, game=game)
    ranked = {"compare": '"rank"', "worlds": '["small", "large"]', "others": '["b", "c"]'}
    outcome = judge(write_study(tmp_path / "x.csv", lines), margin=0.5, **ranked)
    found = {part.other: part for part in outcome.parts}
    assert found["b"].found.mean == 0 and found["c"].found.mean == 1.5
    assert found["b"].note == "first in 1 of 2, mean rank 1.50 of 3"
    assert (found["b"].verdict, found["c"].verdict) == ("does not hold", "holds")
    assert outcome.verdict == "does not hold"
    fewer = [x for x in lines if not x[0].startswith("15-c")]
    outcome = judge(write_study(tmp_path / "y.csv", fewer), margin=0.5, **ranked)
    found = {part.other: part for part in outcome.parts}
    assert found["c"].why == "c has not run in large" and found["b"].note == ""
    assert found["b"].why == "ranks need all arms; c has not run in large"
    assert all(np.isnan(part.found).all() for part in outcome.parts)
    assert {part.verdict for part in outcome.parts} == {outcome.verdict} == {"undecided"}


def test_ranks_count_each_row_and_the_middle_of_five_seeds(judge, tmp_path):
    """Of two rows a is first in one; by means over seeds, or over rows, it would be another one."""
    figures = {"a": (20.0, 1.0), "b": (9.0, 2.0), "c": (0.0, 0.0)}
    lines = []
    for arm, s in itertools.product(figures, range(11, 16)):
        x, y = figures[arm]
        own = {"x": -1000.0 if (arm, s) == ("a", 15) else x, "y": y}
        lines += lines_of(arm, s, own)
    ranked = {"compare": '"rank"', "measure": '"both"', "others": '["b", "c"]'}
    outcome = judge(write_study(tmp_path / "x.csv", lines), margin=0.5, **ranked)
    found = {part.other: part for part in outcome.parts}
    assert (found["b"].found.mean, found["c"].found.mean) == (0.0, 1.5)
    assert (found["b"].plain.mean, found["c"].plain.mean) == (-1.5, 0.0)
    assert found["b"].note == "first in 1 of 2, mean rank 1.50 of 3"


def test_what_would_decide(judge, tmp_path):
    """An interval three times as wide as its distance needs nine times the seeds."""
    outcome = judge(study(tmp_path / "x.csv", a=AHEAD, b=BEHIND), margin=2.9)
    (part,) = outcome.parts
    half, distance = (part.found.high - part.found.low) / 2, part.found.mean - 2.9
    assert 3 * (half / distance) ** 2 > 30
    assert "too near the margin" in claims.what_decides(outcome, [])
    outcome = judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND), margin=2.5)
    (part,) = outcome.parts
    half = (part.found.high - part.found.low) / 2
    wanted = max(4, int(np.ceil(3 * (half / 0.5) ** 2)))
    assert wanted > len(outcome.cases[0].seeds)
    assert f"about {wanted} fresh seeds an arm" in claims.what_decides(outcome, [])
    fresh = claims.fresh_runs(outcome, {})
    assert claims.total_of(fresh)[0] == 2 * wanted and all(x.hours == 0.002 for x in fresh)
    page = claims.page([outcome], [[]], {"slower": {}})
    assert f"are {2 * wanted} more runs, {claims.hours_text(0.004 * wanted)} hours" in " ".join(
        page.split()
    )


def test_one_arm_that_needs_fresh_seeds(judge, tmp_path):
    """From zero there is no other arm. Half the interval is 1.242, 2.484 times the distance of .5:
    three seeds times its square are 18.5."""
    path = study(tmp_path / "x.csv", a=AHEAD)
    outcome = judge(path, others=None, compare='"level"', margin=5)
    (fresh,) = claims.fresh_runs(outcome, {})
    assert outcome.verdict == "undecided" and (fresh.name, len(fresh.seeds)) == ("small-a", 19)


def test_studies_of_two_worlds_may_use_the_same_names(tmp_path):
    """In one world a name is one run, which in two studies would be two pilots."""
    own = [("x-s1", *line[1:]) for line in lines_of("a", 1, {"12": 1.0})]
    other = [(*line[:5], '"treasure"' if line[4] == "task" else line[5]) for line in own]
    paths = [write_study(tmp_path / f"{i}.csv", x) for i, x in enumerate((own, other, own))]
    words = ("--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path)
    assert command("claims", *paths[:2], *words)[0] == 0
    code, _, stderr = command("claims", *paths, *words)
    assert (code, stderr.count("\n")) == (2, 1) and "Two runs have one name: x-s1 in" in stderr


def test_a_directory_without_studies_is_none_of_results(tmp_path):
    """A slip like docs for docs/data does not make a page on which nothing has run."""
    words = ("--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path)
    code, text, stderr = command("claims", *words)
    assert (code, text) == (2, "") and stderr == f"error: --data {tmp_path} has no study_*.csv.\n"


def test_a_measure_that_cannot_tell_gives_no_verdict(tmp_path):
    """Whatever its figures say; the page says why, and asks for no run of it."""
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND)
    criteria_file = toml(tmp_path / "c.toml")
    words = (path, "--criteria", criteria_file, "--data", tmp_path)
    assert "| holds | hold: 1 |" in command("claims", *words)[1]
    text = criteria_file.read_text().replace("margin = ", 'unfit = "it cannot tell"\nmargin = ', 1)
    criteria_file.write_text(text)
    code, printed, stderr = command("claims", *words)
    assert code == 0, stderr
    assert "| undecided | undecided: 1 (it cannot tell) |" in printed
    assert printed.rstrip().splitlines()[-1].endswith("| it cannot tell |")


# --- The command ----------------------------------------------------------------------------------


def test_what_is_printed_and_written(tmp_path):
    """Statement, criterion, effect, every seed, p, budget, verdict; the same twice, to the byte."""
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND)
    found = []
    for name in ("one", "two"):
        words = (path, "--criteria", toml(tmp_path / "c.toml"), "--out", tmp_path / name)
        code, text, stderr = command("claims", *words, "--data", tmp_path)
        assert code == 0, stderr
        files = sorted(x for x in (tmp_path / name).rglob("*") if x.is_file())
        found.append([text, *(x.read_bytes() for x in files)])
    assert found[0] == found[1]
    text = found[0][0]
    page = (tmp_path / "one" / "CLAIMS.md").read_text()
    assert text == page + "\n"
    for said in (
        "| M1 | The first is ahead of the second | holds | hold: 1 | 3 of 3 (paper: 4) | 0.062 %",
        "return per agent",
        "ahead by 1",
        "5, 5.5, 6 | 2, 2.5, 3 | holds |",
        "| 0.1 |",
        "+3 [",
    ):
        assert said in page, said
    assert "What would decide" not in page
    assert is_png(tmp_path / "one/data/claims.png")
    lines = rows(tmp_path / "one/data/claims/M1.csv")
    assert [(x["arm"], x["seed"], float(x["value"])) for x in lines] == [
        *(("a", str(s), y) for s, y in AHEAD.items()),
        *(("b", str(s), y) for s, y in BEHIND.items()),
    ]


@pytest.mark.parametrize("pair", [("--commands", "--out"), ("--out", "--studies")])
def test_one_thing_at_a_time(pair, tmp_path):
    """Not one of them in silence."""
    values = {"--commands": ["I1"], "--out": [tmp_path / "a"], "--studies": [tmp_path / "b"]}
    code, _, stderr = command("claims", *(x for name in pair for x in (name, *values[name])))
    assert code == 2 and "exclude each other" in stderr and not list(tmp_path.iterdir())


def test_commands_are_what_is_missing(tmp_path):
    """Seeds that have run are not named, and runs of these commands count."""
    path = study(tmp_path / "x.csv", a=seeds(1.0), b=BEHIND)
    words = (path, "--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path)
    code, text, _ = command("claims", *words, "--commands", "M1")
    assert code == 0
    _, line, pack = text.splitlines()
    assert line.startswith("for s in 12 13; do python mra_maddpg_particle.py ")
    assert line.endswith(" --seed $s --total-timesteps 1000 --run-dir runs/small-a-s$s; done")
    assert pack.endswith("pack docs/data/study_small_claims.csv runs/small-a-s{12,13}")
    flags = shlex.split(line.split("; ")[1].replace("$s", "12"))[3:]
    args = runs_module.script_args(runs_module.load_script("mra_maddpg_particle"), flags)
    assert (args.seed, args.total_timesteps, args.populations) == (12, 1000, ("12",))
    assert command("claims", *words, "--commands")[:2] == (0, text), "of all that are undecided"
    code, text, _ = command("claims", *words)
    assert code == 0
    assert "| M1 | 2 | 0.004 | two shared cores | these runs |" in text  # 2 x .001 million x 2 h
    path = study(tmp_path / "whole.csv", a=AHEAD, b=BEHIND)
    words = (path, "--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path)
    text = command("claims", *words, "--commands", "M1")[1]
    assert text.splitlines()[1:] == ["# Decided: it holds."]
    assert command("claims", *words, "--commands")[1].strip() == ""


def test_a_shorter_run_of_a_seed_is_still_missing(tmp_path):
    """A pilot with one of the claim's seeds does not count, so the command trains that seed."""
    lines = lines_of("a", 12, {"12": 1.0}, steps=500)
    words = ("--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path, "--commands", "M1")
    code, text, _ = command("claims", write_study(tmp_path / "x.csv", lines), *words)
    assert code == 0 and "for s in 11 12 13; do python mra_maddpg_particle.py" in text


def test_commands_can_be_followed(tmp_path):
    """What another study of the world holds is not packed again, whether or not it is on disk."""
    (tmp_path / "docs/data").mkdir(parents=True)
    study(tmp_path / "docs/data/study_small_claims.csv", a=seeds(5.0))
    study(tmp_path / "docs/data/study_small_m6.csv", b=BEHIND)
    words = ("--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path / "docs/data")
    code, text, _ = command("claims", *words, "--commands", "M1")
    pack = text.splitlines()[-1]
    for arm, own in (("a", AHEAD), ("b", BEHIND)):
        for s, x in own.items():
            as_directory(tmp_path / f"runs/small-{arm}-s{s}", lines_of(arm, s, {"12": x}))
    shell = f'printf "%s\\n" {pack}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    _, script, *flags = done.stdout.split()
    assert script == "experiments/runs.py"
    code, _, stderr = command("runs", *(x if x == "pack" else tmp_path / x for x in flags))
    assert code == 0, stderr
    code, text, stderr = command("claims", *words)
    assert code == 0 and "| M1 | The first is ahead of the second | holds |" in text, stderr


def as_directory(path, lines):
    """A run directory with the arguments and figures in lines of a study."""
    path.mkdir(parents=True)
    args, results, ended = {}, {}, 0
    for _, kind, steps, row, figure, value in lines:
        if kind == "argument":
            args[figure] = json.loads(value)
        else:
            results.setdefault(row, {})[figure], ended = value, steps
    (path / "args.json").write_text(json.dumps(args))
    summary = {"timesteps": ended, "eval": results}
    (path / "summary.json").write_text(json.dumps(summary))


def test_seeds_in_a_shell():
    found = [claims.seeds_in_shell(x) for x in ((21,), (21, 22), (21, 22, 23), (21, 23, 24))]
    assert found == ["21", "{21,22}", "{21..23}", "{21,23,24}"]


def test_budgets_and_seeds_are_of_what_decides(tmp_path):
    """One world refutes the claim; the other one, with another budget, has not run."""
    text = toml(tmp_path / "c.toml", worlds='["large", "small"]').read_text()
    text = re.sub('game = "15", ', 'game = "15", paper_steps = 10_000, ', text)
    text = re.sub('game = "12", ', 'game = "12", paper_steps = 4_000, ', text)
    (tmp_path / "c.toml").write_text(text)
    words = ("--criteria", tmp_path / "c.toml", "--data", tmp_path)
    path = study(tmp_path / "x.csv", a=BEHIND, b=AHEAD)
    code, text, stderr = command("claims", path, *words)
    assert code == 0, stderr
    row = "does not hold | do not: 1, undecided: 1 (a has not run in large) | 3 of 3 (paper: 4)"
    assert f"{row} | 25 % of the authors' code |" in text
    own = "25 % of the authors' code (the paper states none)"
    assert f"| MRA, TMLR | unseen population sizes |  | M1 |  | {own} |" in text
    assert "What would decide" not in text  # it is decided, though runs are missing
    rest = text.partition("## Decided without these")[2]
    assert "| M1 | 6 | 0.012 | large: a 3, b 3 |" in rest
    code, text, _ = command("claims", study(tmp_path / "y.csv", a=AHEAD, b=BEHIND), *words)
    assert code == 0 and "| 0 of 3 (paper: 4) | 10 to 25 % of the authors' code |" in text


def test_what_means_say_stands_in_the_papers_table(judge, tmp_path):
    path = study(tmp_path / "x.csv", a=seeds(*[5.0] * 14, -40.0), b=seeds(*[2.0] * 15))
    outcome = judge(path, seeds=[*range(11, 26)])
    assert (outcome.verdict, outcome.verdict_by_means) == ("holds", "undecided")
    assert "| M1 (undecided by means) |" in claims.papers_table([outcome])
    outcome = judge(study(tmp_path / "y.csv", a=AHEAD, b=BEHIND))
    assert "| M1 |" in claims.papers_table([outcome])


def test_shares_of_steps_that_a_paper_does_not_state():
    """BiDist's text has none, so its shares are of our default."""
    (case,) = book()["B2"]
    paper = claims.PAPERS["B"]
    assert claims.budget_text([case.share_of("bidist")], paper) == "20 % of our default"
    none = dict.fromkeys(case.arms, "has not run")
    parts = claims.compare_in(case, {arm: [] for arm in case.arms}, none, pilot=False)
    table = claims.papers_table([claims.Outcome((case,), parts, [], "does not hold")])
    assert "| 20 % of our default (the paper states none) |" in table


def test_shares_are_of_the_games_that_an_arm_learns():
    """80,000 episodes of 20 steps a game in the code of MRA's authors; two, three, four games."""
    (case,) = book()["M7"]
    shares = [case.share_of(arm) for arm in ("two_games", "three_games", "mra")]
    assert shares == [160_000 / (games * 80_000 * 20) for games in (2, 3, 4)]
    assert claims.budget_text(shares[1:], claims.PAPERS["M"]) == "2.5 to 3.3 % of the authors' code"
    for name in ("M3", "I4"):
        assert all(math.isnan(x.share_of(x.first[0])) for x in book()[name])
    unknown = claims.budget_text([math.nan], claims.PAPERS["M"])
    assert unknown == "not stated"


def test_a_claim_whose_steps_nobody_states_is_named(judge, tmp_path):
    """Beside a paper's others, in the table of the README."""
    known = judge(study(tmp_path / "x.csv", a=AHEAD, b=BEHIND))
    other = [x.model_copy(update={"id": "M2", "paper_steps": 0}) for x in known.cases]
    parts = [x._replace(case=other[0]) for x in known.parts]
    unknown = known._replace(cases=(*other,), parts=parts)
    assert "% of the authors' code (the paper states none); M2 not stated |" in claims.papers_table(
        [known, unknown]
    )


def test_what_is_undecided_needs_its_sources_too():
    """M3 adapts runs of treasure and Pacman, five seeds of three arms each; M5 shares one arm."""
    tables = criteria.read_tables()
    found = {}
    for name in ("M3", "M5"):
        outcome = claims.Outcome(book()[name], [], [], "undecided")
        own = claims.missing_runs(outcome, [], tables["slower"])
        found[name] = (own, claims.sources_of(own, tables))
    own, sources = found["M3"]
    named = {f"{world}-{arm}" for world in ("treasure", "pacman") for arm in ("mra", "epc", "rl2")}
    assert {x.name for x in sources} == named and claims.total_of(sources)[0] == 30
    assert claims.total_of(own)[0] == 75 and not found["M5"][1]
    hours = {x.name: x.hours for x in sources}
    assert hours["treasure-mra"] == pytest.approx(0.16 * 0.6)
    assert hours["pacman-epc"] == pytest.approx(0.16 * 1.3 * 3)  # sets
    every = claims.each_once([*own, *sources, *found["M5"][0]])
    assert claims.total_of(every)[0] == 75 + 30 + 5  # pacman-mra is in both
    two = [own[0]._replace(name="x", seeds=seeds, hours=1.0) for seeds in ((21, 22), (22, 23))]
    assert claims.total_of(claims.each_once(two)) == (3, 3.0)
    text = claims.what_all_needs(every, [])
    assert text.startswith("Undecided claims need 110 different runs") and "own bots" not in text


def test_own_bots_are_told(tmp_path):
    outcome = claims.Outcome(book()["B1"], [], [], "undecided")
    own = claims.missing_runs(outcome, [], {})
    assert claims.needed_row(outcome, own, "these runs")["on"] == claims.OWN_BOTS
    assert "90 of them, " in " ".join(claims.what_all_needs(own, []).split())


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"margin": '"wide"'}, "M1 in small: margin: input should be a valid number"),
        ({"seeds": "[11, 12]"}, "least_seeds exceeds"),
        ({"seeds": "[11, 11, 12]"}, "there twice"),
        ({"own_seeds": "{ a = [11, 11, 12] }"}, "there twice"),
        ({"own_seeds": "{ a = [11, 12] }"}, "least_seeds exceeds"),
        ({"own_seeds": "{ c = [11, 12, 13] }"}, "own_seeds names an arm"),
        ({"seeds": "[1, 2, 3]"}, "seeds.0: input should be greater than or equal to 10"),
        ({"first": '["d"]'}, "[arms] has no d"),
        ({"others": None}, "level has no others"),
        ({"compare": '"rank"', "first": '["a", "c"]'}, "one arm that is first"),
        ({"measure": '"wins"'}, "[measures] has no wins"),
        ({"measure": '"both"', "margin_of": '"gain"'}, "needs a zero"),
        ({"worlds": '["tiny"]'}, "[worlds] has no tiny"),
        ({"worlds": None}, "claims.M1.worlds: field required"),
        ({"worlds": "[]"}, "claims.M1.worlds: list should have at least 1 item"),
        ({"worlds": "[3]"}, "claims.M1.worlds.0: input should be a valid string"),
        ({"first": None}, "claims.M1.first: field required"),
        ({"first": '"ab"'}, "claims.M1.first: input should be a valid list"),
        ({"others": '[["b"]]'}, "claims.M1.others.0: input should be a valid string"),
        ({"measure": None}, "claims.M1.measure: field required"),
        ({"measure": '["returns"]'}, "claims.M1.measure: input should be a valid string"),
        ({"bar": "3"}, "claims.M1.bar: input should be a valid dictionary"),
        ({"bar": '{ arms = ["a"], at_least = 1 }'}, "claims.M1.bar.measure: field required"),
        ({"rule": None}, "rule: field required"),
        ({"wish": '"more"'}, "wish: extra inputs are not permitted"),
        ({"says": '"First in {place}"'}, "the world has no place"),
        ({"bar": '{ arms = ["c"], measure = "returns", at_least = 1 }'}, "bar names an arm"),
        ({"a": '"mra_maddpg_particle.py --task {task} --populations"'}, "populations"),
        ({"a": '"mra_maddpg_particle.py --polyak 3"'}, "--polyak 3"),
    ],
)
def test_bad_criteria_end_in_a_sentence(tmp_path, changes, sentence):
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND)
    if "a" in changes:
        own = toml(tmp_path / "c.toml").read_text()
        own = re.sub(r"^a = .*", lambda _: f"a = {changes['a']}", own, flags=re.MULTILINE)
        (tmp_path / "c.toml").write_text(own)
    else:
        toml(tmp_path / "c.toml", **changes)
    words = (path, "--criteria", tmp_path / "c.toml", "--out", tmp_path / "out")
    code, _, stderr = command("claims", *words)
    assert code == 2 and sentence in stderr.lower().replace("m1", "M1"), stderr
    assert not (tmp_path / "out").exists()


IN_TABLES = {
    "no text": ("mra = {", b"\xff{", "is no TOML: 'utf-8' codec can't decode"),
    "no TOML": ("mra = {", "mra {", "is no TOML: expected '=' after a key"),
    "no claims": ("[claims.M1]", "[slower]", "c.toml: claims: field required."),
    "a wrong name": ("[claims.M1]", "[claims.X1]", "claims.X1.[key]: string should match"),
    "no number": ("[claims.M1]", "[claims.M]", "claims.M.[key]: string should match"),
    "an unknown table": ("[arms]", "[arm]", "arm: extra inputs are not permitted"),
    "a paper's typo": ("steps = 1_6", "step = 1_6", "papers.mra.steps: field required"),
    "another paper": ("mra = {", "mipi = {", "M1 in small: [papers] has no mra"),
    "steps in words": ("1000, hours = 2.0 }\nl", '"9" }\nl', "worlds.small.timesteps: input"),
    "a list": ('"12"', '["12"]', "worlds.small.game.str: input should be a valid string"),
    "no steps": (", timesteps = 1000, hours = 2.0 }\nl", "}\nl", "the world has no timesteps."),
    "an arm's list": ('a = "', 'd = 3\na = "', "arms.d: input should be a valid string"),
    "a space": ("large =", '"la rge" =', "worlds.la rge.[key]: string should match"),
    "no such world": ("small = {", 'small = { run = "x",', "M1 in small: [worlds] has no x"),
    "a loop": (
        "small = {",
        'large = { run = "small" }\nsmall = { run = "large",',
        "M1 in small: small has the runs of large, which has those of small.",
    ),
    "itself": ("small = {", 'small = { run = "small",', "which has those of small."),
    "nested": ('"12"', '"{task}"', "M1 in small: game = {task}, which names another value."),
    "capitals": ("{game}", "{Game}", "M1 in small: the world has no Game."),
    "a quotation": ("{game}", "'{game}", "no closing quotation."),
    "no script": ('a = "mra_maddpg_particle.py', 'a = "harness.py', "harness.py is no script"),
    "a wrong factor": ("[arms]", '[slower]\nx = "2"\n[arms]', "slower.x: input should be a"),
}


@pytest.mark.parametrize("name", IN_TABLES)
def test_damaged_tables_end_in_a_sentence(tmp_path, name):
    """Whatever they lack, and whichever world refers to itself."""
    old, new, sentence = IN_TABLES[name]
    text = toml(tmp_path / "c.toml").read_bytes()
    new = new if isinstance(new, bytes) else new.encode()
    if name == "a loop":
        text = re.sub(rb"^large = .*\n", b"", text, flags=re.MULTILINE)
    assert old.encode() in text
    (tmp_path / "c.toml").write_bytes(text.replace(old.encode(), new))
    path = study(tmp_path / "x.csv", a=AHEAD, b=BEHIND)
    words = ("--criteria", tmp_path / "c.toml", "--data", tmp_path, "--out", tmp_path / "out")
    code, _, stderr = command("claims", path, *words)
    assert (code, stderr.count("\n")) == (2, 1) and sentence in stderr
    assert not (tmp_path / "out").exists()


def test_an_adapted_arm_that_is_not_there(tmp_path):
    """Its runs are not among the claim's, but among the commands."""
    path = toml(tmp_path / "c.toml")
    text = path.read_text()
    adapts = 'a = "mra_maddpg_particle.py --adapt runs/small-nobody-s{seed} --population 3"'
    path.write_text(re.sub("^a = .*", adapts, text, flags=re.MULTILINE))
    study(tmp_path / "study_other.csv", b=BEHIND)
    words = ("--criteria", path, "--data", tmp_path, "--commands", "M1")
    code, _, stderr = command("claims", *words)
    assert (code, stderr) == (2, "error: claims.toml: small-a: [arms] has no nobody.\n")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--data", "nowhere"], "--data nowhere is no directory."),
        (["--commands", "M9"], "--commands M9: there are M1."),
        (["nothing.csv"], "nothing.csv cannot be read"),
        (["--criteria", "none.toml"], "none.toml cannot be read"),
    ],
)
def test_bad_words_end_in_a_sentence(tmp_path, words, sentence):
    own = ["--criteria", str(toml(tmp_path / "c.toml"))] if "--criteria" not in words else []
    code, _, stderr = command("claims", *own, "--data", tmp_path, *words)
    assert (code, stderr.count("\n")) == (2, 1) and sentence in stderr


def test_a_run_that_counts_must_have_what_is_measured(tmp_path):
    """A seed without it would be left out; a pilot is passed over."""
    lines = [x for s, y in BEHIND.items() for x in lines_of("b", s, {"12": y})]
    path = write_study(tmp_path / "x.csv", [*lines, *lines_of("a", 11, {"9": 1.0})])
    words = ("--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path)
    code, _, stderr = command("claims", path, *words)
    assert code == 2 and "has no 12, which M1 measures" in stderr
    path = write_study(tmp_path / "y.csv", [*lines, *lines_of("a", 1, {"9": 1.0})])
    assert command("claims", path, *words)[0] == 0


def test_tables_of_commands(tmp_path):
    """Of a CSV and of a page; the last step, other columns, names that end in seeds."""
    (tmp_path / "x.csv").write_text(
        "who,seed,step,kind,value\na,11,0,greedy,5\na,11,9,greedy,1\na,11,9,drawn,7\n"
        "a-s3,s12,9,greedy,2\na,12,9,greedy,4\nb,11,9,greedy,8\n"
    )
    (tmp_path / "y.md").write_text("# Title\n\n| who | n |\n| --- | --- |\n| a | 1,5 |\n\nEnd.\n")
    assert criteria.read_table(tmp_path / "y.md") == [{"who": "a", "n": "1,5"}]
    measure = criteria.Table(
        kind="table",
        files=("x.csv",),
        value="value",
        key="who",
        labels={"a": "a"},
        seed="seed",
        where={"kind": "greedy"},
        last="step",
        command="experiments/mipi.py matrix-game",
    )
    lines = criteria.lines_by_seed(tmp_path / "x.csv", measure, "a")
    found = {seed: [line["value"] for line in own] for seed, own in lines.items()}
    assert found == {11: ["1"], 12: ["2", "4"]}
    parts = measure.model_copy(update={"files": ("x.csv", "z.csv"), "pilots": ("p.csv", "no.csv")})
    head = "who,seed,step,kind,value\n"
    (tmp_path / "z.csv").write_text(head + "a,13,9,greedy,6\n")
    (tmp_path / "p.csv").write_text(head + "a,11,9,greedy,5\n")
    case = SimpleNamespace(id="B2", timesteps=100)
    points = criteria.table_points(case, "a", parts, tmp_path)
    shown = [(x.run, x.seed, x.steps, x.cells[""]) for x in points]
    assert shown == [
        ("x.csv s11", 11, 100, 1.0),
        ("x.csv s12", 12, 100, 3.0),
        ("z.csv s13", 13, 100, 6.0),
        ("p.csv s11", 11, 0, 5.0),
    ]
    (tmp_path / "z.csv").write_text(head + "a,12,9,greedy,6\n")
    with pytest.raises(UsageError, match="has a's seed 12 again"):
        criteria.table_points(case, "a", parts, tmp_path)


def test_a_run_is_no_opponent_of_itself(tmp_path):
    """M5, all four comparisons: what a run earns against itself, here 100, is in no mean."""
    runs = [f"pacman-{arm}-s{seed}" for arm in ("mra", "single") for seed in (21, 22)]
    returns = {(a, b): 100 if a == b else 5 for a, b in itertools.product(runs, runs)}
    write_cross_play(tmp_path, returns)
    for case in book()["M5"]:
        for arm in case.arms:
            points = criteria.table_points(case, arm, case.measure, tmp_path)
            assert [(x.seed, x.value) for x in points] == [(21, 5), (22, 5)]


def write_cross_play(folder, returns, steps=160_000, flags=None):
    """M5's table; returns: {(Pac-Men's run, ghosts' run): return of both}. steps: of the first run;
    flags: {run: its flags}, by default its arm's."""
    lines = []
    for (a, b), value in returns.items():
        line = {"pac_men": a[:-4], "ghosts": b[:-4], "pac_men_run": a, "ghosts_run": b}
        line |= {"pac_man": value, "ghost": value}
        for side, run in (("pac_men", a), ("ghosts", b)):
            line[f"{side}_steps"] = steps if run == next(iter(returns))[0] else 160_000
            line[f"{side}_flags"] = (flags or {}).get(run) or flags_of(run.split("-")[1])
        lines.append(line)
    runs_module.write_rows(folder / "cross_play_claims.csv", lines)


def flags_of(arm, *more):
    """M5's arm, with more flags, as tables of commands have it."""
    file, *words = book()["M5"][0].arms[arm].split()
    script = Path(file).stem
    args = runs_module.script_args(runs_module.load_script(script), [*words, *more])
    saved = json.loads(json.dumps(dataclasses.asdict(args)))
    return criteria.flags_text(saved | {"script": script})


def test_a_table_says_length_and_flags_of_its_runs(tmp_path):
    """M5: by a run that is shorter, be it an opponent, a point is a pilot's; one with other flags
    is refused."""
    study(tmp_path / "study_other.csv", b=BEHIND)
    both = ("pacman-mra-s21", "pacman-single-s21")
    returns = dict.fromkeys(itertools.permutations(both), 5)
    arms = [(case, arm) for case in book()["M5"] for arm in case.arms]
    for steps in (160_000, 150_000):
        write_cross_play(tmp_path, returns, steps)
        found = [criteria.table_points(case, arm, case.measure, tmp_path) for case, arm in arms]
        assert [x.steps for points in found for x in points] == [steps] * 4
        assert [case.counts(arm, 21, steps) for case, arm in arms] == [steps == 160_000] * 8
    for run in both:
        write_cross_play(tmp_path, returns, flags={run: "other"})
        code, _, stderr = command("claims", "--data", tmp_path, "--commands", "M5")
        sentence = "cross_play_claims.csv has a run with other flags than M5's: other.\n"
        assert code == 2 and stderr.endswith(sentence)
    write_cross_play(tmp_path, returns)
    assert command("claims", "--data", tmp_path, "--commands", "M5")[0] == 0


def test_flags_in_tables_are_those_that_affect_training():
    mra = flags_of("mra")
    assert flags_of("mra", "--seed", "3", "--eval-every", "0") == mra
    words = "--phi-gradient mi --no-psi-information"
    assert flags_of("mra", *words.split()).replace(f" {words}", "") == mra
    assert len({mra, flags_of("mra", "--preset", "paper"), flags_of("single")}) == 3


def test_pilots_of_tables_say_what_they_are():
    """Those of M5 are of Algorithm 4, as docs/results_mra.md says; they are in the figure alone."""
    for name, form in (
        ("M5", "pilot, Algorithm 4"),
        ("I4", "pilot"),
    ):
        outcome = claims.judge(book()[name], studies(), DATA)
        titles = [claims.name_in_figure(x) for x in outcome.pilots]
        assert titles and all(x.endswith(f" ({form})") for x in titles), titles
        assert not any("pilot" in claims.name_in_figure(x) for x in outcome.parts)
    assert "| pilot" not in (ROOT / "docs/CLAIMS.md").read_text()


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.csv", ""),
        ("x.csv", "arm,seed,value\n"),
        ("x.csv", "arm,seed\na,11\n"),
        ("x.csv", "arm,seed,value\na,11\n"),
        ("x.csv", "arm,seed,value\na,last,1\n"),
        ("x.csv", "arm,seed,value\na,11,nan\n"),
        ("x.csv", "arm,seed,value\na,11,\xff\n"),
        ("x.csv", None),
        ("x.md", "No table.\n"),
        ("x.md", "| arm | seed | value |\n|---|---|---|\n| a | 11 |\n"),
    ],
)
def test_damaged_tables_of_commands_end_in_a_sentence(tmp_path, name, text):
    if text is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    found = measured_by_table(tmp_path, name, labels='{ a = "a", b = "b" }')
    sentence = f"{tmp_path}/{name} is no table of `experiments/mipi.py matrix-game`."
    assert found == (2, f"error: {sentence}\n")


def test_an_arm_without_a_label_ends_in_a_sentence(tmp_path):
    (tmp_path / "x.csv").write_text("arm,seed,value\na,11,1\n")
    found = measured_by_table(tmp_path, "x.csv", labels='{ a = "a" }')
    assert found == (2, "error: claims.toml: M1: the measure's labels have no b.\n")


def measured_by_table(folder, name, labels):
    """What the command says of a claim that reads a table: code and error."""
    study(folder / "study_other.csv", b=BEHIND)
    measure = f'kind = "table", files = ["{name}"], value = "value", key = "arm", seed = "seed"'
    measure += f', labels = {labels}, command = "experiments/mipi.py matrix-game"'
    path = toml(folder / "c.toml", measure='"table"')
    text = path.read_text().replace("[measures]", f"[measures]\ntable = {{ {measure} }}")
    path.write_text(text)
    code, _, stderr = command("claims", "--criteria", path, "--data", folder)
    return code, stderr


def test_a_run_that_counts_is_evaluated_as_its_arm_says(tmp_path):
    """With other numbers of episodes it is refused, also if they changed when it was resumed; a
    pilot is not."""
    path = toml(tmp_path / "c.toml")
    asks = path.read_text().replace(
        "--populations {game}", "--populations {game} --final-episodes 9"
    )
    path.write_text(asks)
    for seed, expected in ((11, 2), (31, 0)):
        lines = lines_of("a", seed, {"12": 1.0}, final_episodes=20)
        study_path = write_study(tmp_path / "x.csv", lines)
        code, _, stderr = command("claims", study_path, "--criteria", path, "--data", tmp_path)
        assert code == expected, stderr
        assert not code or stderr.endswith("has --final-episodes 20, M1 asks for 9.\n")
        later = [{"timesteps": 500, "final_episodes": 20}]
        lines = lines_of("a", seed, {"12": 1.0}, final_episodes=9, resumed=later)
        study_path = write_study(tmp_path / "x.csv", lines)
        code, _, stderr = command("claims", study_path, "--criteria", path, "--data", tmp_path)
        assert code == expected, stderr
        assert not code or stderr.endswith("has --final-episodes 20, M1 asks for 9.\n")


def test_a_run_that_counts_has_all_its_episodes(tmp_path):
    """Whatever its flags say: an evaluation with fewer is refused; a pilot's is not."""
    path = toml(tmp_path / "c.toml")
    for seed, expected in ((11, 2), (31, 0)):
        study_path = write_study(tmp_path / "x.csv", lines_of("a", seed, {"12": 1.0}, episodes=2))
        code, _, stderr = command("claims", study_path, "--criteria", path, "--data", tmp_path)
        assert code == expected, stderr
        sentence = "has 2 episodes of '12 random' in its final evaluation, M1 asks for 1000.\n"
        assert not code or stderr.endswith(sentence)


@pytest.mark.parametrize(("seed", "begun", "code"), [(11, 500, 2), (31, 500, 0), (11, 1000, 0)])
def test_a_run_that_counts_was_begun_for_its_length(tmp_path, seed, begun, code):
    """A shorter one that was resumed is refused, as learning rates fell sooner; a pilot is not."""
    lines = lines_of("a", seed, {"12": 1.0}, total_timesteps=begun)
    study_path = write_study(tmp_path / "x.csv", lines)
    argv = (study_path, "--criteria", toml(tmp_path / "c.toml"), "--data", tmp_path)
    found, _, stderr = command("claims", *argv)
    assert found == code, stderr
    sentence = "begun for 500 steps and resumed for 1,000: M1 asks for runs begun for their length."
    assert not code or stderr.endswith(f"was {sentence}\n")


def test_bots_of_an_earlier_evaluation_do_not_count():
    """A run that went on without meeting them again has nothing to show at its end."""
    run = runs_module.read_study(DATA / "study_chicken_claims.csv")[0]
    measure = book()["B3"][0].measure
    assert [*criteria.measure_run(run, measure)] == measure.rows.split()
    run.summary = run.summary | {"timesteps": 2 * run.summary["timesteps"]}
    assert criteria.measure_run(run, measure) == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"scalar": "x"}, {"": [1, 4, 9, 16, 25, 36, 49, 64, 81, 100]}),
        ({"scalar": "x", "last": 3}, {"": [64, 81, 100]}),
        ({"scalar": "x", "last": 2, "part": (0.0, 0.5)}, {"": [16, 25]}),
        ({"scalar": "x + y"}, {"": [11, 14, 19, 35, 46, 59, 74, 91, 110]}),  # a line has no y
        ({"scalar": "x/{row}", "rows": "3 6", "last": 1}, {"3": [30], "6": [60]}),
    ],
)
def test_means_over_parts_of_training(fields, expected):
    """By hand from a log of ten lines, k^2 in line k. What a part is less another: the same less
    the first fifth's mean, 2.5 of x, 12.5 of x + y, 4.5 and 9 of x in rows."""
    log = [{"timesteps": 10 * k, "x": float(k**2), "y": 10.0} for k in range(1, 11)]
    del log[3]["y"]
    for k, line in enumerate(log, 1):
        line |= {"x/3": 3.0 * k, "x/6": 6.0 * k}
    run = SimpleNamespace(log=log, steps=100, summary={"eval": {}})
    means = {row: np.mean(x) for row, x in expected.items()}
    measure = criteria.Curve(kind="curve", **fields)
    assert criteria.measure_run(run, measure) == pytest.approx(means)
    begun = {"x": {"": 2.5}, "x + y": {"": 12.5}, "x/{row}": {"3": 4.5, "6": 9.0}}
    rise = {row: x - begun[fields["scalar"]][row] for row, x in means.items()}
    less = measure.model_copy(update={"minus": (0.0, 0.2)})
    assert criteria.measure_run(run, less) == pytest.approx(rise)
    with pytest.raises(KeyError):
        criteria.measure_run(run, measure.model_copy(update={"last": 11}))


def test_sums_have_factors():
    assert criteria.sum_of({"a": 2.0, "b/x,y/0": 3.0}, "0.5*a - b/x,y/0 + 2*b/x,y/0") == 4.0
    assert criteria.sum_of({"a": 2.0}, "- a") == -2.0


def test_who_gains_nothing_sets_no_margin(judge, tmp_path):
    path = study(tmp_path / "x.csv", a=AHEAD, b=seeds(0.0, 0.5, 0.7))  # random play: 1
    assert judge(path, margin=0.5, margin_of='"gain"').parts[0].margin == 0


def test_a_run_without_a_seed_ends_in_a_sentence(tmp_path):
    lines = [x for x in lines_of("a", 11, {"12": 1.0}) if x[4] != "seed"]
    path = write_study(tmp_path / "x.csv", lines)
    code, _, stderr = command("claims", path, "--criteria", toml(tmp_path / "c.toml"))
    assert code == 2 and stderr.endswith("x.csv is damaged: it has no seed.\n")


def test_a_flag_that_has_gone_still_tells_runs_apart():
    """Runs of study_pacman.csv with half of p(z|m) uniform are none of MRA's."""
    found = {x.name: x for x in runs_module.read_study(ROOT / "docs/data/study_pacman.csv")}
    ours, theirs = found["pacman-mra-s1"], found["pacman-floor-s1"]
    command = "mra_maddpg_particle.py --task pacman --populations 4,2 6,3 8,4 "
    command = as_packed(command + "--eval-populations 2,8 --preset cpu")
    assert criteria.is_of(ours, command) and not criteria.is_of(theirs, command)


def test_studies_are_what_the_command_writes(tmp_path):
    """All runs of all claims, no arm left out, with the first seeds that a claim needs."""
    code, _, stderr = command("claims", "--studies", str(tmp_path))
    assert code == 0, stderr
    written = {x.name: x.read_text() for x in tmp_path.iterdir()}
    kept = {x.name: x.read_text() for x in (ROOT / "experiments/studies").glob("claims_*.toml")}
    assert written == kept, "python experiments/claims.py --studies experiments/studies"
    found = {name: tomllib.loads(text) for name, text in written.items()}
    for case in all_cases():
        for arm, line in case.arms.items():
            if line.startswith("experiments/"):
                continue
            own = f"{case.run}-{arm}"
            kinds = [x for x in found.values() if own in x["runs"] and x["dir"] == "runs"]
            wanted = list(case.seeds_of(arm)[: case.least_seeds])
            assert any(
                (x["runs"][own], x["timesteps"], x["seeds"][: case.least_seeds])
                == (line, case.timesteps, wanted)
                for x in kinds
            ), (case.id, own)
            for world, source in re.findall(r"--adapt runs/(\w+)-(\w+)-s", line):
                runs = found[f"claims_{world}.toml"]["runs"]
                assert f"{world}-{source}" in runs, "nothing trains what is adapted"


@pytest.mark.long
def test_the_page_is_what_the_command_prints():
    code, text, stderr = command("claims")
    assert code == 0, stderr
    page = (ROOT / "docs/CLAIMS.md").read_text()
    assert text == page + "\n", "python experiments/claims.py --out docs writes it anew"


def test_the_readme_shows_the_verdicts():
    table = []
    for page in ("docs/CLAIMS.md", "README.md"):
        lines = (ROOT / page).read_text().splitlines()
        first = next(k for k, line in enumerate(lines) if line.startswith("| method | general"))
        table.append(["".join(line.split()) for line in lines[first : first + 5]])
    page, readme = table
    assert page[2:] == readme[2:] and page[0] == readme[0]
    holds = [row.split("|")[3] for row in page[2:] if row.split("|")[3]]
    text = (ROOT / "README.md").read_text()
    assert holds == ["I4(undecidedbymeans)"]  # else README's "State" says more
    assert f"Of {sum('-' not in name for name in IDS)} claims one holds" in text


def test_claims_in_short():
    """Three on end are told by their ends, two are not."""
    assert claims.in_short([]) == ""
    assert claims.in_short(["B2", "B3"]) == "B2, B3"
    assert claims.in_short(["I1", "I2", "I3", "I5", "I6"]) == "I1 to I3, I5, I6"
    named = claims.in_short(["I1", "I2", "I3", "I4", "I5", "I6"], {"I3": "not so"})
    assert named == "I1, I2, I3 (not so), I4 to I6"


def test_the_cheapest_verdict_stands_first():
    """Hours rise in the table of docs; claims that no asked-for run decides stand last."""
    page = (ROOT / "docs/CLAIMS.md").read_text().partition("## What would decide")[2]
    page = page.partition("## Decided without these")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    hours = [float(row[2].replace(",", "") or "inf") for row in rows]
    assert hours == sorted(hours) and hours[0] < hours[-1]
    assert all(
        bool(row[1].strip()) == (cost < math.inf) for row, cost in zip(rows, hours, strict=True)
    )
