"""MIPI's tables and figures: train the runs that they need, and compute them from runs.

    python experiments/mipi.py train table1 --tasks sz --seeds 1 2 3 --total-timesteps 500000
    python experiments/mipi.py tables runs/sz-* runs/csz-* runs/mmm-* --out docs/data/mipi
    python experiments/mipi.py tables docs/data/study_sz.csv --only "sz-mipi-s?" "sz-refil-s?"
    python experiments/mipi.py dependence runs/sz-mipi-s1 runs/sz-refil-s1
    python experiments/mipi.py frontier runs/sz-ma* --states runs/sz-mappo-s11    MIPI on PPO
    python experiments/mipi.py teammates runs/sz-mappo-s1 --teammates focus runs/sz-mappo-s2
    python experiments/mipi.py mixes runs/csz-ma*                   mixes of types never met
    python experiments/mipi.py matrix-game --payoffs coordinated    Fig. 2 (d)
    python experiments/mipi.py imitation                            Resource Collection from labels

`train` trains every run that a table needs. `tables` prints Tables 1 to 3 from runs or packed
studies. `dependence` measures how much agents depend on their team. `frontier` draws the share of
battles won in unseen teams over that dependence and over what is won in trained teams. `SUBCOMMAND
--help` has the options and explains each command's figures.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import Above, Amount, Positive, Seed, Share, UsageError

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from annotated_types import Interval, MinLen
from torch import Tensor, nn

from envs.smac import episodes, worlds
from envs.smac.combat import SIDE, Family, make_setup
from envs.smac.episodes import Policy
from envs.smac.matrix_game import (
    OBJECTIVES,
    PAYOFFS,
    TRAINED,
    TYPES,
    UNSEEN,
    Objective,
    expected,
    optima,
    optimum,
    unseen_reward,
)
from envs.smac.resource_collection import (
    ResourceCollection,
    collector,
    forager,
    play,
    scripted_policies,
    summarise,
)
from envs.smac.resource_collection import table as resource_table
from envs.statistics import accelerated_interval, markdown_table, seed_difference, with_interval
from experiments.plots import plt
from experiments.runs import (
    Job,
    Run,
    Runs,
    as_words,
    check_kind,
    check_out,
    differ,
    finish,
    free_flags,
    kind_of,
    load_script,
    name_in_world,
    read_runs,
    run_subcommand,
    script_args,
    split_words,
    train_all,
)

# --- Training -------------------------------------------------------------------------------------

SCRIPT, REFIL = "mipi_refil_smac.py", "baselines/refil_smac.py"
MIPI = f"{SCRIPT} --no-alpha-i-over-w"  # as printed; --preset cpu has Lemma 2's weights
COLLAQ, MAPPO = "baselines/collaq_smac.py", "baselines/mappo_smac.py"
MIPI_MAPPO = "baselines/mipi_mappo_smac.py"
METHODS = {  # {method: command without --scenario}
    "mipi": MIPI,
    "mipi_lemma": f"{SCRIPT} --alpha-i-over-w",
    "refil": REFIL,
    "aqmix": f"{REFIL} --no-imagine",
    "collaq": COLLAQ,
    "mappo": MAPPO,
    "value": f"{MIPI} --regularizer none",
    "entropy": f"{MIPI} --regularizer entropy",
    "entropy_lemma": f"{SCRIPT} --regularizer entropy --alpha-i-over-w",
}
ALPHAS = {  # of Table 3, without the default, 0 (Value) and infinity (--observe-self-only)
    "sz": ("0.01", "0.05", "0.1", "0.5"),
    "csz": ("0.01", "0.05", "0.1"),
    "mmm": ("0.05", "0.5"),
}
ALPHAS_D3 = {"sz": "0.01", "csz": "0.015", "mmm": "0.05"}
# Grid for MIPI on PPO, the same for mutual information and entropy: factors of about 3 around the
# paper's .03. Where one is chosen (`frontier --choose-on`), no method has more to choose from.
PPO_ALPHAS = {
    "sz": ("0.01", "0.03", "0.1", "0.3"),
    "csz": ("0.01", "0.03"),  # .1 won a third as much in SZ
    "mmm": ("0.01", "0.03"),
}
ALL_SIZES = "--team-sizes 3 4 5 6 7 8"  # nothing is unseen: what a learner could win
PPO_CONTROLS = {  # variants of MIPI on PPO with its default alpha, and of MAPPO
    "mappo-mi-enemies": f"{MIPI_MAPPO} --own self+enemies",
    "mappo-mi-real": f"{MIPI_MAPPO} --marginal real",
    "mappo-mi-loss": f"{MIPI_MAPPO} --penalise loss",
    "mappo-mi-return": f"{MIPI_MAPPO} --penalise return",
    "mappo-drop-0.5": f"{MIPI_MAPPO} --alpha 0 --drop-teammates 0.5",
    "mappo-3-8": f"{MAPPO} {ALL_SIZES}",
    "mappo-mi-3-8": f"{MIPI_MAPPO} {ALL_SIZES}",
}
Table = Literal["table1", "table2", "table3", "d3", "collection", "ppo", "ppo-controls"]
Task = Literal["sz", "csz", "mmm"]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train all runs that some of MIPI's tables need.

    Runs are written to DIR/{task}-{method}-s{seed}. Finished runs are kept and stopped ones are
    resumed. Tables, trained with teams of 3 to 5 and evaluated with teams of 3 to 8:

    table1: MIPI, as printed and with Lemma 2's weights, REFIL, AQMIX, CollaQ and MAPPO;
    table2: Value (no regulariser), MIPI and Entropy, both with the two weights, too;
    table3: MIPI with each alpha of the paper's table;
    d3: MIPI, also with the alpha that appendix D.3 mentions;
    collection: the methods of table1 in Resource Collection;
    ppo: MAPPO (alpha 0), MIPI on PPO with a grid of alphas, for mutual information and entropy;
    ppo-controls: MIPI on PPO with other marginals and ablations, MAPPO with teammates dropped, and
    both trained with teams of 3 to 8.

    A run has ten evaluations, as the tables average the last five. With as many environment steps,
    MAPPO takes far fewer gradient steps, and fewer minutes, than the others.
    """

    tables: Annotated[tuple[Table, ...], tyro.conf.Positional, MinLen(1)]  # tables to train for
    tasks: Annotated[tuple[Task, ...], MinLen(1)] = ("sz", "csz", "mmm")  # scenarios of the battles
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (1, 2, 3)  # seeds of each method
    total_timesteps: Positive = 500_000  # environment steps of each run
    preset: Literal["cpu", "paper"] = "cpu"  # the scripts' --preset
    eval_episodes: Positive = 160  # episodes per team size in each of the ten evaluations
    only: tuple[str, ...] = ()  # train only runs whose names (as sz-collaq) match these patterns
    jobs: Positive = 1  # runs to train at the same time
    dir: Path = Path("runs")  # parent directory of the runs
    flags: str = ""  # more flags for every run, as --flags="--save-every 100000"
    dry_run: bool = False  # print the commands and train nothing


def methods_of(table: str, task: str) -> dict[str, str]:
    """{method: command without --scenario} of a table's runs in one scenario."""
    if table == "table2":
        names = ("mipi", "mipi_lemma", "value", "entropy", "entropy_lemma")
        return {name: METHODS[name] for name in names}
    names = ("mipi", "refil", "aqmix", "collaq", "mappo")
    if table == "table1":
        return {name: METHODS[name] for name in (*names, "mipi_lemma")}
    if table == "collection":  # actions target no units here, so MAPPO has no pointer head
        methods = {name: METHODS[name] for name in names}
        return methods | {"mappo": f"{MAPPO} --target-head tags"}
    if table == "ppo-controls":
        return PPO_CONTROLS
    if table == "ppo":
        methods = {"mappo": MAPPO}
        for x in PPO_ALPHAS[task]:
            methods[f"mappo-mi-{x}"] = f"{MIPI_MAPPO} --alpha {x}"
        for x in PPO_ALPHAS[task]:
            methods[f"mappo-entropy-{x}"] = f"{MIPI_MAPPO} --regularizer entropy --alpha {x}"
        return methods
    if table == "d3":
        alphas, methods = (ALPHAS_D3[task],), {"mipi": METHODS["mipi"]}
    else:
        alphas, methods = ALPHAS[task], {name: METHODS[name] for name in ("mipi", "value")}
        methods["mipi-alpha-inf"] = f"{MIPI} --observe-self-only --target-head tags"
    return methods | {f"mipi-alpha-{x}": f"{MIPI} --alpha {x}" for x in alphas}


def commands(table: str, study: Train) -> dict[str, str]:
    """{name of the run without its seed: command} of a table's runs."""
    tasks = ("resource",) if table == "collection" else study.tasks
    found = {}
    for task in tasks:
        for name, command in methods_of(table, task).items():
            found[f"{task}-{name}"] = f"{command} --scenario {task}"
    return found


def train(study: Train) -> None:
    """Train all runs of the tables, seed by seed. UsageError if --only matches none."""
    every = max(1, study.total_timesteps // 10)
    shared = f"--preset {study.preset} --eval-every {every} --eval-episodes {study.eval_episodes}"
    runs: dict[str, str] = {}
    for name in study.tables:
        runs |= commands(name, study)
    for pattern in study.only:
        if not fnmatch.filter(runs, pattern):
            raise UsageError(f"--only {pattern}: no run has such a name.")
    if study.only:
        names = {name for pattern in study.only for name in fnmatch.filter(runs, pattern)}
        runs = {name: command for name, command in runs.items() if name in names}
    more = split_words(study.flags, "--flags")
    jobs = []
    for seed, (name, command) in itertools.product(dict.fromkeys(study.seeds), runs.items()):
        script, *flags = shlex.split(f"{command} {shared}")
        jobs.append(
            Job(
                run=study.dir.resolve() / f"{name}-s{seed}",
                script=script,
                flags=(*flags, *more),
                seed=seed,
                timesteps=study.total_timesteps,
            )
        )
    train_all(jobs, study.jobs, study.dry_run)


# --- Tables 1 to 3 --------------------------------------------------------------------------------

# The paper's win rates with teams of 3-5, 6, 7 and 8.
TABLE_1 = {
    "sz": {
        "MIPI": ".659±.020 .453±.080 .404±.062 .276±.076",
        "REFIL": ".674±.038 .441±.103 .352±.078 .236±.103",
        "AQMIX": ".528±.044 .343±.105 .291±.084 .182±.058",
        "CollaQ": ".588±.030 .366±.086 .314±.076 .198±.097",
        "MAPPO": ".256±.010 .129±.019 .148±.031 .036±.015",
    },
    "csz": {
        "MIPI": ".548±.032 .420±.102 .297±.112 .261±.090",
        "REFIL": ".568±.027 .348±.057 .229±.053 .164±.060",
        "AQMIX": ".509±.054 .323±.096 .216±.101 .152±.071",
        "CollaQ": ".459±.061 .362±.130 .267±.099 .231±.095",
        "MAPPO": ".248±.037 .120±.029 .060±.028 .054±.013",
    },
    "mmm": {
        "MIPI": ".548±.023 .495±.054 .447±.041 .467±.067",
        "REFIL": ".605±.057 .437±.118 .329±.171 .224±.163",
        "AQMIX": ".501±.036 .447±.043 .344±.071 .251±.089",
        "CollaQ": ".589±.027 .513±.070 .423±.026 .286±.083",
        "MAPPO": ".289±.097 .320±.102 .250±.063 .275±.098",
    },
}
TABLE_2 = {
    "sz": {
        "MIPI": TABLE_1["sz"]["MIPI"],
        "Value": ".621±.042 .336±.075 .275±.114 .154±.052",
        "Entropy": ".105±.035 .024±.011 .015±.011 .010±.010",
    },
    "csz": {
        "MIPI": TABLE_1["csz"]["MIPI"],
        "Value": ".542±.059 .368±.083 .207±.076 .172±.112",
        "Entropy": ".316±.040 .237±.051 .076±.041 .066±.041",
    },
    "mmm": {
        "MIPI": TABLE_1["mmm"]["MIPI"],
        "Value": ".545±.048 .505±.058 .391±.083 .319±.105",
        "Entropy": ".265±.034 .200±.085 .160±.064 .075±.044",
    },
}
TABLE_3 = {  # with the alphas of appendix D.3, for which the paper has curves only
    "sz": {
        "Value": TABLE_2["sz"]["Value"],
        "alpha 0.01": ".672±.020 .394±.065 .365±.068 .261±.092",
        "MIPI": TABLE_1["sz"]["MIPI"],
        "alpha 0.05": ".643±.020 .447±.062 .408±.054 .313±.069",
        "alpha 0.1": ".475±.073 .277±.125 .260±.093 .146±.075",
        "alpha 0.5": ".175±.053 .056±.015 .129±.026 .043±.021",
        "alpha inf": ".546±.069 .429±.036 .389±.038 .221±.004",
    },
    "csz": {
        "Value": TABLE_2["csz"]["Value"],
        "alpha 0.01": ".592±.020 .378±.033 .364±.073 .304±.056",
        "alpha 0.015": "- - - -",
        "MIPI": TABLE_1["csz"]["MIPI"],
        "alpha 0.05": ".506±.046 .417±.092 .223±.094 .192±.091",
        "alpha 0.1": ".344±.050 .218±.160 .113±.079 .098±.086",
        "alpha inf": ".506±.076 .368±.064 .309±.056 .270±.070",
    },
    "mmm": {
        "Value": TABLE_2["mmm"]["Value"],
        "alpha 0.05": ".590±.008 .590±.053 .526±.055 .426±.152",
        "MIPI": TABLE_1["mmm"]["MIPI"],
        "alpha 0.5": ".277±.042 .158±.094 .180±.105 .139±.056",
        "alpha inf": ".396±.070 .432±.018 .383±.041 .315±.061",
    },
}
TABLES = {"Table 1": TABLE_1, "Table 2": TABLE_2, "Table 3": TABLE_3}
BASELINES = {"collaq_smac": "CollaQ", "mappo_smac": "MAPPO"}  # {script: row}
PPO = ("mappo_smac", "mipi_mappo_smac")
# Flags that row_name() reads, and flags that differ within a row: they are never listed beside it.
NAMED = ("seed", "scenario", "regularizer", "alpha", "observe_self_only", "imagine")
NAMED += ("alpha_i_over_w", "charge_times_w")


@dataclasses.dataclass(frozen=True)
class Tables:
    """MIPI's Tables 1 to 3 and learning curves, from runs of MIPI and its baselines.

    A run's figure is the mean of its last evaluations during training (greedy episodes); in the
    column of training sizes it is also the mean over these sizes. Runs that differ only in the seed
    make one row: the mean over seeds and, in brackets, each seed's figure. The paper's win rates
    (mean and deviation of five seeds, in StarCraft II) are shown beside ours; rows without runs are
    printed as not run. Runs trained with larger teams, too, have the columns of the others: how
    much more they win there is the others' regret. Scripted policies come from the runs' final
    evaluations. --against adds tables of differences between rows: in trained and in all unseen
    sizes each seed's figure, their mean less that of a row, Student's interval and the p of a
    permutation test (claims.py: of interquartile means from five seeds on, which differ from
    these). More tables show what training logged during the same evaluations: how much
    policies depend on their team (mi: in imagined teams, kl: in the real one). Differences in
    length are noted. Minutes are wall-clock minutes of collecting and learning until the last
    evaluation; MAPPO needs far fewer of them for as many steps. Writes OUT.md, OUT.csv (every
    evaluation) and OUT.png (curves).
    """

    runs: Runs  # run directories and packed studies to read
    only: tuple[str, ...] = ()  # keep runs whose names match these shell patterns, in this order
    out: Path = Path("mipi")  # common beginning of the names of the .md, .csv and .png files
    last: Positive = 5  # number of last evaluations that a figure averages
    until: Positive | None = None  # ignore evaluations after so many environment steps
    every: Positive = 1  # read one evaluation, the first, of each so many environment steps
    measures: tuple[Literal["win", "return"], ...] = ("win", "return")  # what to show
    against: str = ""  # add tables: every row minus this one ("REFIL"), with intervals over seeds


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One run and its evaluations."""

    name: str
    where: str  # name or path to show in errors
    task: str
    method: str  # row of the paper's tables, or a name in that form
    flags: dict[str, Any]  # other flags that differ from the preset's
    known: frozenset[str]  # names of its script's flags, also of those that are newer than the run
    seed: int
    steps: int  # environment steps until the last evaluation
    minutes: float  # minutes of collecting and learning until then; NaN if not logged
    columns: dict[str, tuple[int, ...]]  # {title: team sizes}; first the trained ones, "3-5"
    evaluations: list[dict[str, float]]  # lines of the log with evaluations
    learning: list[dict[str, float]]  # lines of the log
    scripts: dict[str, dict[str, float]]  # {"6 focus": figures} of scripts, if the run has ended

    def figure(self, measure: str, column: str, evaluation: dict[str, float]) -> float:
        """The mean of a measure over a column's sizes in one evaluation; NaN if it is missing."""
        names = [f"eval/{size}/{measure}" for size in self.columns[column]]
        return float(np.mean([evaluation.get(name, np.nan) for name in names]))

    def final(self, measure: str, column: str, last: int) -> float:
        each = [self.figure(measure, column, x) for x in self.evaluations[-last:]]
        return float(np.mean(each))

    def logged(self, name: str, last: int) -> float:
        """The mean of a scalar over the log during the last evaluations; NaN if it is missing."""
        first, end = (self.evaluations[k]["timesteps"] for k in (-last, -1))
        lines = [x for x in self.learning if first <= x["timesteps"] <= end]
        values = [x[name] for x in lines if name in x]
        return float(np.mean(values or [np.nan]))


Found = dict[str, dict[str, list[Evaluated]]]  # {task: {row of the tables: runs, one per seed}}


def default_alpha(args: dict[str, Any]) -> float:
    """The alpha of a run of mipi_refil_smac.py or mipi_mappo_smac.py without --alpha."""
    collecting = 0.005 if args.get("rescale") else 0.05  # rescaled rewards are a tenth
    alpha = {"mmm": 0.1, "resource": collecting}.get(args["scenario"], 0.03)
    if by_lemma(args):
        alpha /= 8 if args.get("mixer") == "linear" else 30
    return alpha


def by_lemma(args: dict[str, Any]) -> bool:
    """Whether a run's Eq. (18) has the weights of MIPI's Lemma 2."""
    return args.get("alpha_i_over_w", False) and args.get("policy", "head") == "head"


def row_name(args: dict[str, Any]) -> str:
    """The name of a run's row in the paper's tables, or a name in that form; of a fork's run, with
    the fork's name behind it."""
    if (kind := kind_of(args["script"])) != args["script"]:
        return f"{row_name(args | {'script': kind})} ({args['script']})"
    if args["script"] == "refil_smac":
        return "REFIL" if args["imagine"] else "AQMIX"
    if args["script"] in BASELINES:
        return BASELINES[args["script"]]
    if args["script"] in PPO:
        term = {"mi": "MI", "entropy": "entropy"}[args["regularizer"]]
        alpha = default_alpha(args) if args["alpha"] is None else args["alpha"]
        return f"MAPPO + {term}, alpha {alpha:g}" if alpha else "MAPPO"
    alpha = args["alpha"]
    name = {"none": "Value", "entropy": "Entropy", "mi": "MIPI"}[args["regularizer"]]
    if by_lemma(args):
        name += ", Lemma 2"
    if args.get("charge_times_w"):
        name += ", charge times w"
    if args.get("observe_self_only"):
        return "alpha inf"
    if alpha is None or float(alpha) == default_alpha(args):
        return name
    return f"alpha {float(alpha):g}" if name == "MIPI" else f"{name}, alpha {float(alpha):g}"


def other_flags(args: dict[str, Any]) -> dict[str, Any]:
    """{flag: value} where a run differs from its preset, without flags that its row's name tells
    and flags that do not affect training."""
    module = load_script(args["script"])
    flags = ["--preset", args["preset"], "--scenario", args["scenario"]]
    preset = script_args(module, flags)
    usual = json.loads(json.dumps(dataclasses.asdict(preset)))
    told = {"total_timesteps", *free_flags(module), *NAMED}
    if args.get("observe_self_only"):
        told.add("target_head")  # it has to be tags (docs/mipi.md: compare it with tags)
    names = [k for k in usual if k in args and k not in told]
    return {k: args[k] for k in names if args[k] != usual[k]}


def read_evaluations(run: Run, study: Tables) -> Evaluated:
    """Read a run's evaluations. UsageError for a run of another script, or too few evaluations."""
    args = run.args
    kind = check_kind(run, *SCRIPTS, *BASELINES, *PPO)
    evaluations = [x for x in run.log if any(k.startswith("eval/") for k in x)]
    periods = [0, *(x["timesteps"] // study.every for x in evaluations)]
    begun = itertools.pairwise(periods)
    evaluations = [x for x, (before, now) in zip(evaluations, begun) if before < now]
    if study.until:
        evaluations = [x for x in evaluations if x["timesteps"] <= study.until]
    if len(evaluations) < study.last:
        found = f"{len(evaluations)} evaluations"
        found += f" until {study.until:,} steps" if study.until else ""
        raise UsageError(f"{run.where} has {found}, fewer than --last {study.last}.")
    sizes = tuple(args["team_sizes"])
    columns = {f"{min(sizes)}-{max(sizes)}": sizes}
    columns |= {str(x): (x,) for x in args["eval_team_sizes"] if x not in sizes}
    results = run.summary["eval"]
    steps = evaluations[-1]["timesteps"]
    policies = {name: row for name, row in results.items() if " " in name}
    return Evaluated(
        name=run.name,
        where=run.where,
        task=args["scenario"],
        method=row_name(args),
        flags=other_flags(args),
        known=frozenset({*args, *vars(load_script(args["script"]).Args())}),
        seed=args["seed"],
        steps=steps,
        minutes=minutes_of(run.log, until=steps),
        columns=columns,
        evaluations=evaluations,
        learning=[as_mipi_logs(line) for line in run.log] if kind in PPO else run.log,
        scripts={name: row for name, row in policies.items() if not name.endswith(" sampled")},
    )


def in_same_columns(runs: list[Evaluated]) -> list[Evaluated]:
    """The runs, of which those that trained in more of the same sizes get the columns of those that
    trained in the fewest: a run trained with 3 to 8 also has the columns 3-5, 6, 7 and 8."""
    by_training = sorted(runs, key=lambda run: -len(next(iter(run.columns.values()))))
    narrowest = {run.task: run.columns for run in by_training}

    def sizes(columns: dict[str, tuple[int, ...]]) -> list[int]:
        return sorted(itertools.chain.from_iterable(columns.values()))

    return [
        dataclasses.replace(run, columns=narrowest[run.task])
        if sizes(run.columns) == sizes(narrowest[run.task])
        else run
        for run in runs
    ]


def as_mipi_logs(line: dict[str, float]) -> dict[str, float]:
    """A line of PPO's log with MIPI's names: "marginal_kl" becomes "kl"; PPO's own "kl" (between
    the policies before and after an update) is dropped."""
    renamed = {"marginal_kl": "kl"}
    return {renamed.get(name, name): x for name, x in line.items() if name != "kl"}


def minutes_of(log: list[dict[str, float]], until: int) -> float:
    """Wall-clock minutes of collecting and learning until a step; NaN if the log has no times."""
    seconds = [
        x["collect_s"] + x["learn_s"] for x in log if "learn_s" in x and x["timesteps"] <= until
    ]
    return sum(seconds) / 60 if seconds else math.nan


def short(x: float, measure: str) -> str:
    """A figure as cells show it; "-": not in the packed study."""
    if math.isnan(x):
        return "-"
    return f"{x:.3f}".lstrip("0") if measure == "win" and 0 <= x < 1 else f"{x:.2f}"


def row_of(
    task: str, method: str, runs: list[Evaluated], measure: str, last: int
) -> dict[str, str]:
    """A line of a table: the mean over seeds and each seed's figure in every column."""
    row = {"": task.upper(), "method": method}
    for column in runs[0].columns:
        each = [run.final(measure, column, last) for run in runs]
        cell = short(float(np.mean(each)), measure)
        if len(each) > 1:
            cell += f" ({', '.join(short(x, measure) for x in each)})"
        row[column] = cell
    minutes = float(np.mean([run.minutes for run in runs]))
    row |= {"seeds": str(len(runs)), "steps": f"{min(run.steps for run in runs):,}"}
    return row | {"minutes": "" if math.isnan(minutes) else f"{minutes:.1f}"}


def script_rows(task: str, runs: list[Evaluated], measure: str) -> list[dict[str, str]]:
    """Lines of a table for scripted policies: means over the final evaluations of all runs."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for name, row in run.scripts.items():
            size, script = name.split(" ", 1)
            found[script][int(size)].append(row[measure])
    rows = []
    for script, sizes in found.items():
        row = {"": task.upper(), "method": f"{script} (script)"}
        for column, members in runs[0].columns.items():
            means = [np.mean(sizes[size]) for size in members]
            row[column] = short(float(np.mean(means)), measure)
        rows.append(row | {"seeds": "", "steps": "", "minutes": ""})
    return rows


def group(runs: list[Evaluated]) -> Found:
    """{task: {method and flags in which the runs differ: runs, one per seed}}. Longer runs of a
    method have a row of their own, as "REFIL, 2.0M steps". UsageError if a row has a seed twice, or
    runs with different team sizes."""
    found: Found = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.seed):
        own = {}
        for name, value in run.flags.items():
            others = [x.flags.get(name) for x in runs if name in x.known]
            if any(value != other for other in others):
                own[name] = value
        row = " ".join([run.method, *as_words(own)])
        arm = (run.task, run.method, run.flags)
        alike = [x for x in runs if (x.task, x.method, x.flags) == arm]
        if differ([run.steps, min(x.steps for x in alike)]):
            row += f", {run.steps / 1e6:.1f}M steps"
        members = found[run.task][row]
        if any(run.seed == other.seed for other in members):
            raise UsageError(f"{run.where} and {members[-1].where} are the same run: one seed.")
        if members and members[0].columns != run.columns:
            raise UsageError(f"{run.where} and {members[-1].where} have other team sizes.")
        members.append(run)
    return found


def row_for(rows: dict[str, list[Evaluated]], method: str) -> tuple[str, list[Evaluated], str]:
    """Name and runs of the row that a table of the paper calls `method`, or the only one that has
    flags after this name; else no runs, and what to show in place of their figures."""
    named = [name for name in rows if name.startswith(f"{method} --")]
    if method in rows:
        return method, rows[method], ""
    if len(named) == 1:
        return named[0], rows[named[0]], ""
    return method, [], "several, below" if named else "not run"


def win_tables(found: Found, last: int) -> str:
    """Tables 1 to 3 with our win rates and the paper's; rows by Lemma 2, if run, are ours alone."""
    text = ""
    for title, table in TABLES.items():
        rows = []
        for task in (x for x in table if x in found):
            for method, theirs in table[task].items():
                name, runs, instead = row_for(found[task], method)
                columns = next(iter(found[task].values()))[0].columns
                row = {"": task.upper(), "method": method} | dict.fromkeys(columns, instead)
                row |= {"seeds": "", "steps": "", "minutes": ""}
                if runs:
                    row = row_of(task, name, runs, "win", last)
                if method == "MIPI":
                    alpha = f"MIPI, alpha {default_alpha({'scenario': task}):g}"
                    row["method"] = name.replace("MIPI", alpha, 1)
                names = ("paper 3-5", "paper 6", "paper 7", "paper 8")
                rows.append(row | dict(zip(names, theirs.split(), strict=True)))
                if runs := found[task].get(f"{method}, Lemma 2"):
                    row = row_of(task, f"{method}, Lemma 2", runs, "win", last)
                    rows.append(row | dict.fromkeys(names, ""))
        if rows:
            text += f"{title}: share of battles won\n\n{markdown_table(rows)}\n"
    return text


def all_rows(found: Found, measure: str, last: int) -> str:
    """A table per task of all methods and scripts, with notes on unequal lengths and flags."""
    text = ""
    for task, methods in found.items():
        rows = [row_of(task, method, runs, measure, last) for method, runs in methods.items()]
        rows += script_rows(task, [run for runs in methods.values() for run in runs], measure)
        title = "share of battles won" if measure == "win" else "return per episode"
        text += f"{task.upper()}: {title}\n\n{markdown_table(rows)}\n"
        steps = [run.steps for runs in methods.values() for run in runs]
        if max(steps) > 1.1 * min(steps):
            text += f"Not equally long: {min(steps):,} to {max(steps):,} steps.\n\n"
        for method, runs in methods.items():
            if untold := [x for x in as_words(runs[0].flags) if x not in method]:
                text += f"{method}: {', '.join(untold)}, not as its preset has it.\n\n"
    return text


def trained_and_unseen(run: Evaluated) -> dict[str, list[str]]:
    """{title: columns}: the trained sizes, and all others together, as "6-8"."""
    trained, *unseen = run.columns
    sizes = [int(column) for column in unseen]
    together = (
        {f"{min(sizes)}-{max(sizes)}": unseen} if len(sizes) > 1 else {x: [x] for x in unseen}
    )
    return {trained: [trained]} | together


def signed(x: float, measure: str) -> str:
    return f"{x:+.2f}" if measure == "return" else f"{x:+.3f}".replace("0.", ".", 1)


def difference_cells(
    title: str, each: np.ndarray, others: np.ndarray | None, measure: str
) -> dict[str, str]:
    """Cells of one row: a figure per seed (S,), and what it is less another row's (R,)."""
    seeds = ", ".join(short(x, measure) for x in each)
    cells = {title: short(float(np.mean(each)), measure), f"{title}, seeds": seeds}
    cells |= {f"{title}, difference": "", f"{title}, p": ""}
    if others is None:
        return cells
    mean, low, high, p = seed_difference(each, others)
    cells[f"{title}, difference"] = "" if math.isnan(mean) else signed(mean, measure)
    if not math.isnan(low):  # several seeds in both
        cells[f"{title}, difference"] += f" [{signed(low, measure)}, {signed(high, measure)}]"
        cells[f"{title}, p"] = f"{p:.2g}"
    return cells


def differences(found: Found, against: str, measure: str, last: int) -> str:
    """A table for every task that has the row `against`: all rows' figures less that row's."""
    text = ""
    for task, methods in found.items():
        if against not in methods:
            continue
        rows = []
        for method, runs in methods.items():
            row = {"": task.upper(), "method": method}
            for title, columns in trained_and_unseen(runs[0]).items():
                ours, theirs = (
                    np.array([np.mean([run.final(measure, x, last) for x in columns]) for run in x])
                    for x in (runs, methods[against])
                )
                others = None if method == against else theirs
                row |= difference_cells(title, ours, others, measure)
            rows.append(row)
        what = "share of battles won" if measure == "win" else "return per episode"
        text += f"{task.upper()}: {what}, difference from {against}\n\n{markdown_table(rows)}\n"
    return text


def dependence_in_training(found: Found, last: int) -> str:
    """Tables of what training logged about policies in nats: mi, kl, entropy."""
    text = ""
    for task, methods in found.items():
        rows = []
        for method, runs in methods.items():
            names = {k for run in runs for x in run.learning for k in x}
            names = sorted(names & {"mi", "kl", "entropy"} | {k for k in names if "mi/" in k})
            cells = {}
            for name in names:
                values = np.array([run.logged(name, last) for run in runs])
                known = values[np.isfinite(values)]  # studies may lack a scalar of some runs
                less = f" ({len(known)} of {len(runs)} runs)" if len(known) < len(runs) else ""
                if len(known):
                    cells[name] = f"{known.mean():.3f}{less}"
            if cells:
                rows.append({"": task.upper(), "method": method} | cells)
        if rows:
            rows = [dict.fromkeys(max(rows, key=len), "") | row for row in rows]
            text += f"{task.upper()}: policies, in training, nats\n\n{markdown_table(rows)}\n"
    return text


def draw_tables(found: Found, measures: tuple[str, ...]) -> Any:
    """A figure of the evaluations: a row per task and measure, a panel per column of team sizes."""
    lines = [(task, measure) for task in found for measure in measures]
    columns = next(iter(next(iter(found.values())).values()))[0].columns
    size = 3.2 * len(columns) + 1.2, 2.6 * len(lines)
    every = list(dict.fromkeys(method for methods in found.values() for method in methods))
    dark, bright = range(0, 20, 2), range(1, 20, 2)
    colours = plt.get_cmap("tab20")([*dark, *bright])
    figure, axes = plt.subplots(len(lines), len(columns), figsize=size, squeeze=False)
    for panels, (task, measure) in zip(axes, lines, strict=True):
        for axis, column in zip(panels, columns, strict=True):
            for method, runs in found[task].items():
                colour = colours[every.index(method) % 20]  # the same in all tasks
                times = [[x["timesteps"] / 1000 for x in run.evaluations] for run in runs]
                values = [[run.figure(measure, column, x) for x in run.evaluations] for run in runs]
                for xs, ys in zip(times, values):
                    axis.plot(xs, ys, color=colour, alpha=0.35, linewidth=0.8)
                end = 1.02 * min(xs[-1] for xs in times)  # 2 %: runs end with a whole battle
                grid = [x for x in min(times, key=len) if x <= end]
                curves = [np.interp(grid, xs, ys) for xs, ys in zip(times, values)]
                label = f"{method} ({len(runs)})"
                axis.plot(grid, np.mean(curves, 0), color=colour, label=label)
            axis.set_title(f"{task.upper()} {column}: {measure}", fontsize=9)
            axis.grid(alpha=0.3)
        panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.02))  # beside it
    for axis in axes[-1]:
        axis.set_xlabel("thousand environment steps", fontsize=8)
    figure.tight_layout()
    return figure


def tables(study: Tables) -> None:
    """Read all runs, then write OUT.md, OUT.csv and OUT.png."""
    check_out(study.out)
    chosen = read_runs(study.runs, study.only, same=name_in_world)
    runs = in_same_columns([read_evaluations(run, study) for run in chosen])
    for run in runs:
        if run.columns != runs[0].columns:  # a table has one set of columns
            both = f"{run.where} and {runs[0].where}"
            raise UsageError(f"{both} have other team sizes: choose with --only.")
    measures = {("return",) if run.task == "resource" else ("win", "return") for run in runs}
    if len(measures) != 1:
        raise UsageError("Battles and Resource Collection do not go into one table.")
    (measures,) = measures
    measures = tuple(x for x in measures if x in study.measures)
    if not measures:
        raise UsageError("--measures leaves nothing to show: Resource Collection has no wins.")
    found = group(runs)
    text = win_tables(found, study.last) if "win" in measures else ""
    text += "".join(all_rows(found, measure, study.last) for measure in measures)
    if study.against:
        if not any(study.against in methods for methods in found.values()):
            names = dict.fromkeys(name for methods in found.values() for name in methods)
            raise UsageError(f"--against {study.against}: the rows are {'; '.join(names)}.")
        for measure in measures:
            text += differences(found, study.against, measure, study.last)
    text += dependence_in_training(found, study.last)
    rows = [
        {
            "run": run.name,
            "timesteps": x["timesteps"],
            "size": column,
            "measure": measure,
            "mean": run.figure(measure, column, x),
        }
        for run in runs
        for x in run.evaluations
        for column in run.columns
        for measure in measures
    ]
    finish(study.out, text, rows, draw_tables(found, measures))


# --- How much agents depend on their team ---------------------------------------------------------

SCRIPTS = ("refil_smac", "mipi_refil_smac")
OWN = ("self", "self+enemies")


@dataclasses.dataclass(frozen=True)
class Dependence:
    """How much agents depend on their team: how their actions change if part of it is not seen.

    Agents of refil_smac.py, mipi_refil_smac.py, mappo_smac.py or mipi_mappo_smac.py read recorded
    episodes: from the replay in checkpoints of the first two, or from new battles in which the
    policy of the others samples its actions. They read each episode as it was played; without
    teammates; --draws times in REFIL's random groups, seeing only their own group; and with one
    random teammate hidden, or of another type. Figures are means over the steps of living agents
    and then over episodes, with 95 % bootstrap intervals:

    mates: share of greedy actions that change if no teammate is ever seen;
    groups: share of greedy actions that change in random groups;
    nats: I(u; group | observations), the mean divergence of the policy in a group from its mean
    over the draws; with few draws it is too small, as it is at most log(draws);
    out, swap: total variation of the policy if one teammate is hidden, or has another type;
    for greedy agents, the share of actions that change;
    kl self, kl self+enemies: the policy's mean divergence, in nats, from a marginal policy that
    sees only the own unit, or also the enemies. It is fitted on every second episode and compared
    on the others.

    Only runs with a stochastic policy have nats and kl. Their nats, out, swap and kl are less where
    a policy is merely flatter: --temperature 4 tells by how much.
    """

    runs: Runs  # run directories
    states: str = ""  # run whose episodes all runs read; default: each run reads its own
    episodes: Positive = 64  # most episodes to read
    draws: Positive = 8  # random groups per episode
    fit: Positive = 300  # gradient steps that fit a marginal policy, each on all its episodes
    fit_learning_rate: Above = 3e-3  # initial learning rate of the fit (Adam); falls linearly to 0
    temperature: Above = 1.0  # divides the logits of drawn policies; more: flatter ones
    seed: Seed = 1  # seed of episodes, groups, teammates and marginal policies


class Opened(NamedTuple):
    """A run's last checkpoint and episodes to read."""

    script: Any
    agent: Any
    buffer: Any  # episodes of this or another run: a ReplayBuffer or Battles
    temperature: float = 1.0  # of drawn policies


class Moments(NamedTuple):
    """Episodes as networks read them."""

    features: Any  # features of M moments (all steps of all episodes)
    now: Tensor  # (K,) int64: moments at which a step begins (not the episodes' ends)


class Battles:
    """Episodes that a PPO policy plays, with a replay's sample()."""

    def __init__(self, script: Any, args: Any, agent: Any):
        self.script, self.agent = script, agent
        self.args = dataclasses.replace(args, rollout="rounds", device="cpu")

    def sample(self, rng: torch.Generator, size: int) -> Moments:
        """Play `size` whole battles with sampled actions; rng draws battles and actions."""
        seed = int(torch.randint(2**31, (), generator=rng))
        battles = self.script.make_envs(self.args, self.args.team_sizes, size, seed)
        rollout, _ = self.script.collect(self.args, battles, self.script.Player(self.agent, rng))
        now = torch.arange(len(rollout.later))
        return Moments(rollout.features.at(now), now)


def check_readable(run: Run) -> None:
    """Raise UsageError for a run of another script, or in StarCraft II instead of the simulator."""
    name, kind = run.args["script"], check_kind(run, *SCRIPTS, *PPO)
    if kind == "mappo_smac" != name:
        sentence = "is of a fork of mappo_smac: those of mipi_mappo_smac are read (--alpha 0)"
        raise UsageError(f"{run.where} {sentence}.")
    if run.args["backend"] != "sim":
        raise UsageError(f"{run.where} is of the game itself: only the simulator's are read.")


def open_agent(run: Run) -> tuple[Any, Any, Any]:
    """Script, arguments and agent of a run. A run of mappo_smac.py is read by mipi_mappo_smac.py
    with alpha 0: the same network, but its pointers do not see hidden units."""
    script = load_script(run.args["script"])
    is_ppo = kind_of(run.args["script"]) in PPO  # only the actor is needed
    args = harness.saved_args(str(run.path), script.Args)
    saved, _ = harness.load_checkpoint(str(run.path))
    state = saved["agent"]
    if is_ppo:
        script = load_script("mipi_mappo_smac") if run.args["script"] in PPO else script
        own = {x.name: getattr(args, x.name) for x in dataclasses.fields(args)}
        args = script.Args(**({"alpha": 0.0} | own))
        state = {"actor": state["actor"]}
    family = worlds.family_of(args.scenario, getattr(args, "egocentric", False))
    agent = script.Agent(args, family, torch.device("cpu"))
    parts = {"actor": agent.actor} if is_ppo else agent
    harness.restore(parts, state, str(run.path))
    return script, args, agent


def open_states(states: Run) -> Any:
    """The episodes of a run: its replay, or Battles that its policy plays."""
    script, args, agent = open_agent(states)
    if kind_of(states.args["script"]) in PPO:
        return Battles(script, args, agent)
    source, folder = harness.load_checkpoint(str(states.path), with_replays=True)
    if source.get("weights_only"):
        raise UsageError(f"{states.where} has no replay: name a run that has one, by --states.")
    args = dataclasses.replace(args, device="cpu", replay_window=0)  # whole episodes
    battles = script.make_envs(args, args.team_sizes, 1, args.seed)
    buffer = script.ReplayBuffer(args, battles, torch.device("cpu"))
    rank = "-0" if len(source["ranks"]) > 1 else ""  # each process has a replay of its own
    path = folder / f"replay-{source['timesteps']}{rank}.pt"
    buffer.refill(torch.load(path, map_location="cpu", weights_only=True)["replay"])
    return buffer


def open_checkpoint(run: Run, states: Run) -> Opened:
    """A run's agent with the episodes of the run `states`. UsageError if one of them is not
    readable (see check_readable()) or if their scenarios, or how features tell places, differ."""
    check_readable(run)
    for name in ("scenario", "rescale", "egocentric"):
        own, other = run.args.get(name, False), states.args.get(name, False)
        if own != other:
            flag = "" if name == "scenario" else f"--{name} "
            raise UsageError(f"{run.where} is of {flag}{own}, {states.where} of {flag}{other}.")
    check_readable(states)
    script, _, agent = open_agent(run)
    return Opened(script, agent, open_states(states))


def without_mates(features: Any) -> Any:
    """The features with all other agents hidden from each agent."""
    A, S = features.unseen.shape[1:]
    mates = F.pad(~torch.eye(A, dtype=torch.bool), (0, S - A))
    return features._replace(unseen=features.unseen | mates)


def flatter(log_pi: Tensor, temperature: float) -> Tensor:
    return log_pi if temperature == 1 else (log_pi / temperature).log_softmax(-1)


def says(
    opened: Opened, features: Any, groups: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Greedy actions (M, A), and log pi (M, A, actions) or None if the policy is only greedy. With
    groups (M, S), an agent sees only its own group."""
    agent, view = opened.agent, "full_view" if groups is None else "own_group"
    if hasattr(agent, "actor"):
        if groups is not None:
            features = opened.script.imagined_teams(features, groups, "self")
        log_pi, _ = agent.actor(features)
        return log_pi.argmax(-1), flatter(log_pi, opened.temperature)
    avail = features.avail_actions
    views, _ = agent.utility(features, groups)
    seen = getattr(views, view)  # MIPI: what policies read; REFIL: utilities
    if not hasattr(agent, "policy"):
        return seen.masked_fill(~avail, opened.script.MASKED).argmax(-1), None
    reads_marginal = agent.informed and agent.args.policy == "exact"  # a zoo entry may lack it
    own_memory = agent.marginal(features)[0] if reads_marginal else None
    log_pi = agent.log_policy(seen, avail, own_memory)
    greedy = log_pi.argmax(-1)
    return greedy, None if agent.greedy else flatter(log_pi, opened.temperature)


def policy_of(opened: Opened, features: Any) -> Tensor:
    """Action probabilities (M, A, actions); one-hot for greedy agents."""
    greedy, log_pi = says(opened, features)
    if log_pi is None:
        return F.one_hot(greedy, features.avail_actions.shape[-1]).float()
    return log_pi.exp()


class Changed(NamedTuple):
    """Episodes in which one teammate, drawn for each episode, is hidden or has another type."""

    features: Any
    others: Tensor  # (M, A) bool: the agents other than this one, at moments when it is alive


def change_one_mate(features: Any, rng: torch.Generator, columns: list[int] | None) -> Changed:
    """Hide one teammate per episode, or, with the columns of unit types, change its type."""
    A, episode = features.unseen.shape[1], features.played.nonzero()[:, 1]  # (M,)
    B = features.played.shape[1]
    filled = ~features.empty[:B, :A]  # (B, A): the first B moments are the battles' first steps
    noise = torch.rand(B, A, generator=rng).masked_fill(~filled, -1.0)
    mate = F.one_hot(noise.argmax(-1), A).bool()[episode]  # (M, A)
    alive = ~features.avail_actions[..., 0]
    others = ~mate & (alive & mate).any(-1, keepdim=True)
    if columns is None:
        unseen = features.unseen.clone()
        unseen[..., :A] |= mate[:, None] & ~mate[..., None]
        return Changed(features._replace(unseen=unseen), others)
    entities = features.entities.clone()
    kinds = entities[..., columns]  # (M, S, types)
    changes = F.pad(mate, (0, entities.shape[1] - A))
    entities[..., columns] = torch.where(changes[..., None], kinds.roll(1, -1), kinds)
    return Changed(features._replace(entities=entities), others)


def some_episodes(features: Any, battles: Tensor) -> tuple[Any, Tensor]:
    """The moments of some battles, and their indices among all moments."""
    script = load_script("mipi_mappo_smac")
    part = features.played[:, battles]
    part = part[part.any(1)]
    index = script.numbered(features.played)[: len(part), battles][part]
    return features.at(index)._replace(played=part), index


def divergence_from_marginal(
    opened: Opened, features: Any, log_pi: Tensor, study: Dependence, own: str
) -> Tensor:
    """KL (M, A) of the policy from a marginal policy that is fitted to every second episode. own:
    what the marginal sees, one of OWN."""
    script, args = load_script("mipi_mappo_smac"), opened.agent.args
    args = script.Args(
        hidden_size=64,
        recurrent=getattr(args, "recurrent", True),
        target_head="tags" if args.scenario == "resource" else "pointer",
    )
    its = opened.agent.args
    family = worlds.family_of(its.scenario, getattr(its, "egocentric", False))
    with torch.random.fork_rng():
        torch.manual_seed(study.seed)
        net = script.Marginal(features.entities.shape[-1], family, args)
    states = script.own_states(features, own, family.things)
    some = torch.arange(0, features.played.shape[1], 2)
    given, index = some_episodes(states, some)
    labels, acts = log_pi[index], script.choosing(given)
    optimiser = torch.optim.Adam(net.parameters(), study.fit_learning_rate)
    with torch.enable_grad():
        for step in range(study.fit):
            left = 1 - step / study.fit
            optimiser.param_groups[0]["lr"] = left * study.fit_learning_rate
            loss = script.mean_of(script.marginal_loss(labels, net(given)[0]), acts)
            harness.descend(loss, net, optimiser, 10.0)
    return script.divergence(log_pi, net(states)[0])


@torch.no_grad()
def measure(opened: Opened, study: Dependence) -> dict[str, np.ndarray]:
    """{name of MEASURES: mean of each episode (B,)}, without those that no episode has; see
    Dependence."""
    rng = torch.Generator().manual_seed(study.seed)
    batch = opened.buffer.sample(rng, study.episodes)
    features = batch.features
    living = ~features.avail_actions[..., 0]  # (M, A)
    acts = torch.zeros(len(living), dtype=torch.bool)
    acts[batch.now] = True
    living &= acts[:, None]  # without the last moment of an episode, which has no action
    episode = features.played.nonzero()[:, 1]  # (M,)
    B = features.played.shape[1]

    def sum_of(x: Tensor) -> Tensor:  # (M,) -> (B,)
        return torch.zeros(B).index_add(0, episode, x.float())

    def per_episode(x: Tensor, where: Tensor = living) -> np.ndarray:
        sums, count = sum_of((x * where).sum(1)), sum_of(where.sum(1))
        return (sums / count)[count > 0].numpy()

    real, log_pi = says(opened, features)
    alone, _ = says(opened, without_mates(features))
    found = {"mates": per_episode(alone != real)}
    changed, each = torch.zeros_like(real, dtype=torch.float32), []
    for _ in range(study.draws):
        groups = load_script("refil_smac").draw_groups(features, rng)
        action, in_group = says(opened, features, groups)
        changed += (action != real) / study.draws
        each += [] if in_group is None else [in_group]
    found["groups"] = per_episode(changed)
    if each:
        in_groups = torch.stack(each)  # (draws, M, A, actions)
        mean = in_groups.exp().mean(0)
        ratio = in_groups - mean.clamp(min=1e-30).log()
        found["nats"] = per_episode((in_groups.exp() * ratio).sum(-1).mean(0))
    columns = list(worlds.family_of(opened.agent.args.scenario).type_columns.values())
    changes = {"out": None, "swap": columns} if columns else {"out": None}
    for name, of_types in changes.items():
        other = change_one_mate(features, rng, of_types)
        apart = policy_of(opened, other.features) - policy_of(opened, features)
        found[name] = per_episode(apart.abs().sum(-1) / 2, living & other.others)
    if log_pi is not None and B > 1:
        judged = living & (episode % 2 == 1)[:, None]
        for own in OWN:
            nats = divergence_from_marginal(opened, features, log_pi, study, own)
            found[f"kl {own}"] = per_episode(nats, judged)
    return {name: x for name, x in found.items() if len(x)}  # teams of one have nobody to hide


MEASURES = ("mates", "groups", "nats", "out", "swap", *(f"kl {own}" for own in OWN))


def dependence(study: Dependence) -> None:
    """Print a table of the figures that Dependence describes, a line per run."""
    rows, runs = [], read_runs(study.runs)
    for run in runs:
        check_readable(run)  # all of them before the first takes its minute
    for run in runs:
        states = Run(Path(study.states)) if study.states else run
        opened = open_checkpoint(run, states)._replace(temperature=study.temperature)
        harness.tell(f"measuring {run.name}", file=sys.stderr)
        found = measure(opened, study)
        row = {"run": run.name} | dict.fromkeys(MEASURES, "")
        for name, x in found.items():
            low, high = accelerated_interval(x)
            row[name] = f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"
        rows.append(row)
    print(markdown_table(rows), end="")


# --- MIPI on PPO: unseen teams against trained ones -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Generalisation to unseen team sizes over learning in trained ones, and over dependence.

    No single alpha makes two regularisers equally strong, so methods are compared as curves over
    alpha. A point is a run (mean of its last evaluations during training, greedy episodes); a line
    joins the means of a method by alpha. Vertical axis: share of battles won, mean over unseen
    sizes. Horizontal axes: return and share won in trained sizes, then `kl self` and `out` of the
    subcommand dependence on the same episodes for all runs. All runs must have one scenario.
    Regret: how much more the same method wins in the unseen sizes if trained with teams of 3 to 8.
    With --choose-on N, size N is for validation and the other unseen sizes are for the test: a
    second table has, of each method, the alpha that wins most with N.
    Runs are those of mappo_smac.py and mipi_mappo_smac.py; the episodes may be any run's.
    Writes OUT.md (means over seeds), OUT.csv (every run) and OUT.png.
    """

    runs: Runs  # run directories
    states: str  # run whose episodes are read to measure dependence
    out: Path = Path("frontier")  # common beginning of the names of the .md, .csv and .png files
    choose_on: Positive | None = None  # unseen size on which each method's alpha is chosen
    last: Positive = 5  # number of last evaluations that a figure averages
    episodes: Positive = 64  # episodes to measure dependence on
    fit: Positive = 300  # gradient steps that fit a marginal policy
    seed: Seed = 1  # seed of those episodes, hidden teammates and marginal policies


UP = "win, unseen"
ACROSS = ("return, trained", "win, trained", "kl self", "out")


def frontier_row(run: Run, evaluated: Evaluated, study: Frontier) -> dict[str, float]:
    """The coordinates of a run's point, by UP and ACROSS, and with --choose-on the share won in
    that size, which UP then leaves out. UsageError without unseen sizes for them."""
    trained, *unseen = evaluated.columns
    chosen = [column for column in unseen if column == str(study.choose_on)]
    unseen = [column for column in unseen if column not in chosen]
    if study.choose_on and not chosen:
        raise UsageError(f"{run.where} was not evaluated in the unseen size {study.choose_on}.")
    if not unseen:
        other = " other" if chosen else ""
        raise UsageError(f"{run.where} was evaluated in no{other} unseen size.")
    options = Dependence((), episodes=study.episodes, draws=1, fit=study.fit, seed=study.seed)
    opened = open_checkpoint(run, Run(Path(study.states)))
    harness.tell(f"measuring {run.name}", file=sys.stderr)
    found = measure(opened, options)
    wins = [evaluated.final("win", column, study.last) for column in unseen]
    row = {UP: float(np.mean(wins))}
    row |= {f"win, {size}": evaluated.final("win", size, study.last) for size in chosen}
    for name in ("return", "win"):
        row[f"{name}, trained"] = evaluated.final(name, trained, study.last)
    for name in ("kl self", "out"):
        row[name] = float(found[name].mean()) if name in found else math.nan
    return row


def frontier_rows(study: Frontier) -> list[dict[str, Any]]:
    """A row per run, sorted by method ("arm", its name without alpha), alpha and seed. UsageError
    unless all are of MAPPO or MIPI on PPO, whose names have their alpha."""
    runs = {run.where: run for run in read_runs(study.runs)}
    for run in runs.values():
        check_kind(run, *PPO)
    options = Tables(runs=(), last=study.last)
    evaluated = [read_evaluations(run, options) for run in runs.values()]
    found = group(in_same_columns(evaluated))
    if len(found) > 1 or "resource" in found:
        raise UsageError("These are not battles of one scenario.")
    rows = []
    for name, members in next(iter(found.values())).items():
        method, _, rest = name.partition(", alpha ")
        alpha = re.match("[^ ,]*", rest)[0]  # what follows are flags, or steps
        arm = method + rest.removeprefix(alpha)
        for x in members:
            row = {"run": x.name, "arm": arm, "alpha": float(alpha or 0)}
            row |= {"seed": x.seed, "steps": x.steps}
            rows.append(row | frontier_row(runs[x.where], x, study))
    return sorted(rows, key=lambda row: (row["arm"], row["alpha"], row["seed"]))


def mean_of_arms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm and alpha with the means over seeds, in the order of the rows."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["arm"], row["alpha"]].append(row)
    means = []
    for (arm, alpha), runs in found.items():
        names = [x for x in runs[0] if x in ACROSS or x.startswith("win, ")]
        mean = {x: float(np.mean([run[x] for run in runs])) for x in names}
        means.append({"arm": arm, "alpha": alpha, "seeds": len(runs)} | mean)
    return means


def chosen_alphas(
    rows: list[dict[str, Any]], means: list[dict[str, Any]], size: int
) -> list[dict[str, str]]:
    """A line per arm: the alpha, out of how many, that wins most with `size` (the smaller one if
    two win as much), and what its runs win in the other unseen sizes, also seed by seed."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in means):
        grid = [row for row in means if row["arm"] == arm]
        best = max(grid, key=lambda row: row[f"win, {size}"])
        runs = [row for row in rows if (row["arm"], row["alpha"]) == (arm, best["alpha"])]
        each = ", ".join(short(row[UP], "win") for row in runs)
        line = {"arm": arm, "alphas": str(len(grid)), "chosen": f"{best['alpha']:g}"}
        line |= {f"win, {size}": short(best[f"win, {size}"], "win")}
        lines.append(line | {UP: f"{short(best[UP], 'win')} ({each})"})
    return lines


def regret(row: dict[str, Any], means: list[dict[str, Any]]) -> str:
    """How much more the same arm wins in the unseen sizes if it trains with them, too; empty
    without such a run."""
    for other in means:
        parts = other["arm"].split(f" {ALL_SIZES}")  # two if it trains with all sizes
        if other["alpha"] == row["alpha"] and len(parts) == 2 and "".join(parts) == row["arm"]:
            return f"{other[UP] - row[UP]:+.3f}"
    return ""


def draw_frontier(rows: list[dict[str, Any]], means: list[dict[str, Any]]) -> Any:
    """A panel per horizontal axis. Lines of MAPPO with a regulariser start at MAPPO (alpha 0)."""
    figure, axes = plt.subplots(1, len(ACROSS), figsize=(13, 3.4), sharey=True)
    for k, arm in enumerate(dict.fromkeys(row["arm"] for row in means)):
        points = [row for row in rows if row["arm"] == arm]
        is_term = " + " in arm and ALL_SIZES not in arm
        begins = [row for row in means if row["arm"] == "MAPPO" and is_term]
        line = begins + [row for row in means if row["arm"] == arm]
        for axis, name in zip(axes, ACROSS, strict=True):
            style = {"color": f"C{k % 10}", "alpha": 0.5}
            axis.scatter([x[name] for x in points], [x[UP] for x in points], s=12, **style)
            xs, ys = [x[name] for x in line], [x[UP] for x in line]
            axis.plot(xs, ys, color=f"C{k % 10}", marker="o", label=arm)
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("share won in unseen sizes")
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.02))
    figure.tight_layout()
    return figure


def frontier(study: Frontier) -> None:
    """Read and measure all runs, then write OUT.md, OUT.csv and OUT.png."""
    check_out(study.out)
    rows = frontier_rows(study)
    means = mean_of_arms(rows)
    table = []
    for row in means:
        head = {"arm": row["arm"], "alpha": f"{row['alpha']:g}", "seeds": str(row["seeds"])}
        cells = {name: f"{x:.3f}" for name, x in row.items() if name not in head}
        table.append(head | cells | {"regret": regret(row, means)})
    text = markdown_table(table)
    if study.choose_on:
        title = f"Alphas chosen with teams of {study.choose_on}; {UP}: the other unseen sizes"
        text += f"\n{title}\n\n{markdown_table(chosen_alphas(rows, means, study.choose_on))}"
    finish(study.out, text, rows, draw_frontier(rows, means))


# --- Teammates and mixes that nobody has trained with ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class Teammates:
    """What runs win beside other teammates: another seed, another method, or a script.

    In every battle half of the team (rounded down), drawn for each battle, is played by the
    teammate and the rest by the run. Actions are greedy. "itself" is the run alone; the last lines
    are the teammates alone, to tell a strong teammate from one that fits. All play in the same
    battles, by the rules that the first run has trained with. Cells: share of battles won with a
    95 % Wilson interval; mean return.
    """

    runs: Runs  # run directories
    teammates: tuple[str, ...] = ("focus",)  # scripts' names or run directories
    team_sizes: Annotated[tuple[Positive, ...], MinLen(1)] = (3, 4, 5, 6, 7, 8)  # to play with
    episodes: Positive = 160  # battles per team size
    seed: Seed = 1  # seed of the halves; of a size's battles: this + the size


@dataclasses.dataclass(frozen=True)
class Mixes:
    """What runs win with mixes of unit types that no battle of the scenario has.

    Teams have the sizes that a run has trained with, so that only the mix is new: of 3 to 5 units
    in CSZ and MMM one or two are no Colossi or Medivacs. Both sides have the same team. SZ's
    battles have all mixes, so nothing is new there. "met" are mixes of training in the same sizes.
    Scripts play the same battles, as new mixes can be harder or easier. Actions are greedy. Cells:
    share of battles won with a 95 % Wilson interval; mean return.
    """

    runs: Runs  # run directories
    episodes: Positive = 160  # battles per team size
    seed: Seed = 1  # seed of battles; a size's own is this + the size


class Beside:
    """A policy for battles that begin together: `mate` plays half of each team, `own` the rest."""

    def __init__(self, own: Policy, mate: Policy, seed: int):
        self.policies = own, mate
        self.rng = torch.Generator().manual_seed(seed)
        self.of_mate = torch.empty(0)  # (B, 8) bool

    def __call__(self, battles: Any) -> Tensor:
        """Actions (B, 8) int64. Both policies see what all agents did."""
        if not battles.time.any():  # new battles
            types = np.asarray(battles.snapshot.type)[:, :SIDE]
            filled = torch.from_numpy(types >= 0)
            noise = torch.rand(filled.shape, generator=self.rng).masked_fill(~filled, 2.0)
            rank = noise.argsort(-1).argsort(-1)  # empty slots come last
            self.of_mate = rank < filled.sum(-1, keepdim=True) // 2
        own, mate = self.policies
        actions = own(battles)
        actions = torch.where(self.of_mate, mate(battles), actions)
        for policy in self.policies:
            if hasattr(policy, "last_actions"):
                policy.last_actions = actions
        return actions


def check_battles(runs: list[Run]) -> None:
    """Raise UsageError unless all are runs in battles of one scenario."""
    for run in runs:
        check_kind(run, *SCRIPTS, *BASELINES, *PPO)
    scenarios = {run.args["scenario"] for run in runs}
    if len(scenarios) > 1 or "resource" in scenarios:
        raise UsageError("These are not runs in battles of one scenario.")


def player_of(name: str, seed: int) -> Policy:
    """A script by its name, else the greedy policy of a run directory."""
    scripts = episodes.scripted_policies(seed)
    if name in scripts:
        return scripts[name]
    return load_script(Run(Path(name)).args["script"]).load_player(name)


def new_battles(run: Run, size: int, number: int, seed: int) -> Any:
    """Battles in the simulator by the rules of a run. UsageError where there is no such team."""
    script = load_script(run.args["script"])
    args = harness.saved_args(str(run.path), script.Args)
    args = dataclasses.replace(args, backend="sim", game_version="")
    return script.make_envs(args, sizes=(size,), num_envs=number, seed=seed)


def score(ended: list[Any]) -> str:
    """A cell: the share of episodes won with its interval; the mean return."""
    row = episodes.summarise(ended)
    return f"{with_interval(row, 'win', digits=3)}; {row['return']:.2f}"


def teammates(study: Teammates) -> None:
    """Print a table: a line per run and per teammate, a column per teammate."""
    runs = read_runs(study.runs)
    scripts = episodes.scripted_policies(study.seed)
    mates = {Path(name).name: name for name in study.teammates}
    names = {run.name for run in runs}
    if len(mates) < len(study.teammates) or len(names) < len(runs):
        raise UsageError("Two runs or two teammates have the same name.")
    learned = [Run(Path(name)) for name in study.teammates if name not in scripts]
    check_battles(runs + learned)

    def played(name: str, mate: str = "") -> str:
        ended = []
        for size in study.team_sizes:
            policy = player_of(name, study.seed)
            if mate:
                policy = Beside(policy, player_of(mate, study.seed), study.seed)
            battles = new_battles(runs[0], size, study.episodes, study.seed + size)
            ended += episodes.play(battles, policy)
        return score(ended)

    rows = []
    for run in runs:
        where = str(run.path)
        beside = {title: played(where, mate) for title, mate in mates.items()}
        rows.append({"run": run.name, "itself": played(where)} | beside)
    own = {run.path.resolve() for run in runs}
    for title, mate in mates.items():
        if Path(mate).resolve() not in own:
            row = dict.fromkeys(("run", "itself", *mates), "")
            row["run"] = title
            row["itself"] = played(mate)
            rows.append(row)
    print(markdown_table(rows), end="")


def new_mixes(family: Family, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Teams of these sizes with at least one unit that is not special, without the family's own."""
    if family.special < 0:
        return []
    wider = dataclasses.replace(family, base=range(1, max(sizes) + 1), extra=max(sizes))
    met = family.teams(sizes)
    return [team for team in wider.teams(sizes) if team not in met]


def mixes(study: Mixes) -> None:
    """Print a table: a line per run and per script of the first run's battles."""
    runs = read_runs(study.runs)
    check_battles(runs)
    sizes = {tuple(run.args["team_sizes"]) for run in runs}
    if len(sizes) > 1:
        raise UsageError("These runs have trained with different team sizes.")
    (sizes,) = sizes
    teams = new_mixes(worlds.family_of(runs[0].args["scenario"]), sizes)
    if not teams:
        raise UsageError(f"Battles of {runs[0].args['scenario']} have all mixes of these sizes.")

    def played(name: str, is_new: bool) -> str:
        ended = []
        for size in sizes:
            battles = new_battles(runs[0], size, study.episodes, study.seed + size)
            if is_new:
                battles.teams = [team for team in teams if sum(team) == size]
                battles.setup = make_setup(battles.family, battles.teams, study.seed + size, 0)
            ended += episodes.play(battles, player_of(name, study.seed))
        return score(ended)

    named = {run.name: str(run.path) for run in runs}
    named |= {f"{name} (script)": name for name in episodes.scripted_policies(study.seed)}
    rows = [
        {"run": title, "met": played(name, False), "new": played(name, True)}
        for title, name in named.items()
    ]
    print(markdown_table(rows), end="")


# --- The matrix game ------------------------------------------------------------------------------

GAME_ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
LABELS = {"none": "reward", "entropy": "reward + entropy", "mi": "reward - mutual information"}


@dataclasses.dataclass(frozen=True)
class MatrixGame:
    """MIPI's matrix game (Fig. 2 d): the reward of three learners in a team that they never met.

    One learner maximises the reward alone, plus entropy, or minus mutual information. It uses
    the equations of mipi_refil_smac.py and networks of one hidden layer (App. B.1). Q_tot = Q_1 +
    Q_2 + b(team), and an episode is one step. Writes OUT.png (greedy and expected reward in team
    (B,B), mean and range over seeds; dotted: exact optima), OUT.csv, and OUT.md with all optima.
    """

    payoffs: Literal["additive", "coordinated"] = "additive"  # payoff matrices of the game
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (1, 2, 3, 4, 5)  # seeds of each learner
    steps: Positive = 2000  # gradient steps of each learner
    alpha: Amount = 0.5  # weight of entropy or mutual information, alpha
    batch_size: Positive = 64  # new episodes per gradient step
    learning_rate: Above = 3e-4  # learning rate of all networks (RMSprop)
    hidden_size: Positive = 64  # width of the hidden layer
    ba_iterations: Positive = 1  # alternations of marginal and policy per step, M
    epsilon: Share = 0.1  # share of random actions
    every: Positive = 50  # steps between points of the curves
    # optima are searched among policies whose probabilities are multiples of 1 / grid
    grid: Annotated[int, Interval(ge=1, le=60)] = 40
    exact: bool = False  # only print the optima, without learning
    out: Path = Path("matrix_game")  # common beginning of the names of the .png, .csv, .md files


class Nets(nn.Module):
    """n separate networks, one per seed, computed together: one hidden layer with ELU."""

    def __init__(self, rngs: list[torch.Generator], inputs: int, hidden: int, outputs: int):
        super().__init__()

        def new(size: int, *shape: int) -> nn.Parameter:
            draws = [torch.rand(shape, generator=rng) * 2 - 1 for rng in rngs]
            return nn.Parameter(torch.stack(draws) / math.sqrt(size))

        self.first, self.bias = new(inputs, inputs, hidden), new(inputs, 1, hidden)
        self.last, self.last_bias = new(hidden, hidden, outputs), new(hidden, 1, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (n, B, inputs) -> (n, B, outputs)
        return F.elu(x @ self.first + self.bias) @ self.last + self.last_bias


def inputs_of(team: Tensor) -> Tensor:
    """Network inputs (..., 2, 4) from types (..., 2): each agent's index and own type, one-hot."""
    index = torch.eye(2).expand(*team.shape, 2)
    return torch.cat((index, F.one_hot(team, 2).float()), -1)


def policies_of(policy: Nets) -> np.ndarray:
    """The policy's probabilities of action 1: (n, 2 agents, 2 types)."""
    team = torch.tensor([[0, 0], [1, 1]])  # types of both agents
    with torch.no_grad():
        inputs = inputs_of(team).flatten(0, 1)
        inputs = inputs.expand(len(policy.first), -1, -1)
        p = policy(inputs).softmax(-1)[..., 1]
    p = p.view(-1, 2, 2).transpose(1, 2)
    return p.double().numpy()


def shown_steps(study: MatrixGame) -> list[int]:
    """Steps after which policies are shown: every study.every of them, from 0, and the last one."""
    return sorted({*range(0, study.steps, study.every), study.steps})


def learn_game(study: MatrixGame, objective: Objective) -> np.ndarray:
    """Train a learner; policies_of() at each of shown_steps(): (points, n, 2, 2)."""
    script, game = load_script("mipi_refil_smac"), PAYOFFS[study.payoffs]
    n, H, B = len(study.seeds), study.hidden_size, study.batch_size
    rngs = [torch.Generator().manual_seed(seed) for seed in study.seeds]
    critic, b = Nets(rngs, 4, H, 2), Nets(rngs, 2, H, 1)
    policy, marginal = Nets(rngs, 4, H, 2), Nets(rngs, 2, H, 2)
    options = {"lr": study.learning_rate, "alpha": 0.99, "eps": 1e-5}
    both = [*critic.parameters(), *b.parameters()]
    judge = torch.optim.RMSprop(both, **options)
    actor = torch.optim.RMSprop(policy.parameters(), **options)
    prior = torch.optim.RMSprop(marginal.parameters(), **options)
    types = torch.tensor([[TYPES.index(t) for t in team] for team in TRAINED])
    payoffs = torch.tensor(np.stack([game[team] for team in TRAINED]), dtype=torch.float32)
    all_actions = torch.ones(2, dtype=torch.bool)
    alpha = 0.0 if objective == "none" else study.alpha
    points, shown = [], shown_steps(study)

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=rng) for rng in rngs])

    def move(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        loss.sum(0).mean().backward()  # the sum over seeds keeps each seed's gradient separate
        optimiser.step()

    for step in range(study.steps + 1):
        if step in shown:
            points.append(policies_of(policy))
        team = (draw(B) < 0.5).long()  # (n, B): index of one of the two trained teams
        x = inputs_of(types[team])  # (n, B, 2, 4)
        flat = x.flatten(1, 2)
        with torch.no_grad():
            p = policy(flat).softmax(-1)[..., 1].view(n, B, 2)
        p = (1 - study.epsilon) * p + study.epsilon / 2
        u = (draw(B, 2) < p).long()
        r = payoffs[team, u[..., 0], u[..., 1]]
        q = critic(flat).view(n, B, 2, 2)
        chosen = q.gather(-1, u[..., None])
        offset = b(F.one_hot(team, 2).float())
        total = chosen.sum((2, 3)) + offset[..., 0]
        move((total - r).square(), judge)  # Eq. (16) of one step
        q = q.detach()
        for _ in range(study.ba_iterations):
            log_m = torch.zeros(n, B, 2, 2)
            if objective == "mi":
                log_pi = script.log_probabilities(policy(flat), all_actions).view(n, B, 2, 2)
                log_m = script.log_probabilities(marginal(x[..., :2].flatten(1, 2)), all_actions)
                move(script.marginal_loss(log_pi, log_m.view(n, B, 2, 2)).sum(-1), prior)
                log_m = script.log_probabilities(marginal(x[..., :2].flatten(1, 2)), all_actions)
                log_m = log_m.view(n, B, 2, 2)
            log_pi = script.log_probabilities(policy(flat), all_actions).view(n, B, 2, 2)
            move(script.policy_loss(log_pi, log_m, q, alpha).sum(-1), actor)
    return np.stack(points)


def exact_rows(study: MatrixGame) -> list[dict[str, str]]:
    """Table rows of the exact optima of the three objectives for each alpha of GAME_ALPHAS."""
    rows = []
    for objective in OBJECTIVES:
        for alpha in (0.0,) if objective == "none" else GAME_ALPHAS[1:]:
            found = optima(PAYOFFS[study.payoffs], objective, alpha, study.grid)
            best = found[0]
            each = [", ".join(f"{x:.3g}" for x in p) for p in best.policies]
            row = {"objective": LABELS[objective], "alpha": f"{alpha:g}"}
            row |= {"value": f"{best.value:.3f}", "reward in training": f"{best.reward:.3f}"}
            row |= {"p(1) of agent 1 as A, B": each[0], "of agent 2": each[1]}
            rows.append(row | {"greedy in (B,B)": f"{best.unseen:g}", "maxima": str(len(found))})
    return rows


def matrix_game(study: MatrixGame) -> None:
    """Train the three learners, then write OUT.md, OUT.csv and OUT.png; --exact: only optima."""
    text, game = markdown_table(exact_rows(study)), PAYOFFS[study.payoffs]
    if study.exact:
        print(text)
        return
    check_out(study.out)
    rows, (figure, axes) = [], plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    B, ends = TYPES.index("B"), []
    for k, objective in enumerate(OBJECTIVES):
        points = learn_game(study, objective)  # (points, n, 2, 2)
        best = optimum(game, objective, study.alpha, study.grid)
        at, first, second = np.array(shown_steps(study)), *best.policies[:, B]
        greedy = np.array([[unseen_reward(game, p) for p in now] for now in points])
        soft = expected(game[UNSEEN], points[..., 0, B], points[..., 1, B])
        exact = best.unseen, float(expected(game[UNSEEN], first, second))
        for axis, name, y, line in zip(axes, ("greedy", "drawn"), (greedy, soft), exact):
            axis.plot(at, y.mean(1), color=f"C{k}", label=LABELS[objective])
            axis.fill_between(at, y.min(1), y.max(1), color=f"C{k}", alpha=0.2, lw=0)
            axis.axhline(line, color=f"C{k}", ls=":", lw=1)
            axis.set(xlabel="steps", title=f"{name} actions in (B,B)")
            for seed, values in zip(study.seeds, y.T.tolist()):
                about = {"objective": objective, "actions": name, "seed": seed}
                rows += [about | {"step": s, "reward": v} for s, v in zip(at.tolist(), values)]
        end = {"learner": LABELS[objective], "exact optimum": f"{best.unseen:g}"}
        last = zip(study.seeds, greedy[-1].tolist())
        ends.append(end | {f"seed {seed}": f"{x:g}" for seed, x in last})
    axes[0].set_ylabel("reward")
    axes[0].legend()
    figure.tight_layout()
    title = f"Greedy actions in (B,B) after {study.steps} steps, alpha {study.alpha:g}:"
    finish(study.out, f"{title}\n\n{markdown_table(ends)}\n{text}", rows, figure)


# --- Resource Collection from labels --------------------------------------------------------------

TEACHERS = {"forager": forager, "collector": collector}
KEPT = 8  # number of last rounds of episodes from which minibatches are drawn


@dataclasses.dataclass(frozen=True)
class Imitation:
    """Train REFIL's utilities in Resource Collection by imitation of a script.

    The network of refil_smac.py --scenario resource learns a script's actions as labels (cross-
    entropy with utilities as logits) in episodes that it plays itself; in the first ones the script
    plays. This is DAgger (Ross et al., 2011). If it reaches the script's return, then sight,
    features, network and number of gradient steps do not keep agents from learning the task. The
    forager sees what agents see, the collector sees everything. Prints the returns of greedy agents
    during training and, at the end, next to those of scripts.
    """

    teacher: Literal["forager", "collector"] = "forager"  # script to imitate
    minibatches: Positive = 3000  # gradient steps
    learning_rate: Above = 5e-4  # learning rate of the preset's optimiser
    preset: Literal["cpu", "paper"] = "cpu"  # --preset of refil_smac.py: network, minibatch size
    round: Positive = 64  # episodes to play in a round
    every: Positive = 50  # gradient steps between rounds
    show: Positive = 500  # gradient steps between evaluations
    episodes: Positive = 160  # episodes of an evaluation
    team_sizes: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (3, 4, 5)  # sizes to train with
    # more sizes to evaluate at the end
    eval_team_sizes: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (6, 7, 8)
    seed: Seed = 1  # seed of worlds, network and minibatches


def watched(policy: Any, teacher: Any, kept: list[tuple]) -> Any:
    """policy, which also appends to `kept`: observation, last actions, the teacher's actions."""
    last = None

    def act(world: ResourceCollection) -> Tensor:
        nonlocal last
        if last is None:
            last = torch.full(world.obs.avail.shape[:2], -1)
        kept.append((world.obs, last, teacher(world)))
        last = policy(world)
        return last

    return act


def learn_labels(script: Any, agent: Any, steps: list[tuple], some: Tensor) -> float:
    """A gradient step on the episodes `some` of a round; returns the share of labels matched."""
    seen, last, label = zip(*steps)
    kind = type(seen[0])
    fields = zip(*seen)  # each field of the observations over all steps
    obs = kind(*[torch.cat([x[some] for x in field]) for field in fields])  # (M, ...)
    last, label = ([x[some] for x in actions] for actions in (last, label))
    played = torch.ones(len(steps), len(some), dtype=torch.bool)
    features = script.encode(obs, torch.cat(last), played, agent.device)
    with agent.autocast():
        scores = agent.utility(features)[0].full_view  # (M, A, actions)
    avail = features.avail_actions
    there = ~avail[..., 0]  # (M, A)
    scores = scores.masked_fill(~avail, script.MASKED)[there]
    label = torch.cat(label)[:, : there.shape[1]][there]
    loss = F.cross_entropy(scores, label)
    harness.descend(loss, agent.utility, agent.optimiser, agent.args.max_grad_norm)
    return float((scores.argmax(-1) == label).float().mean())


def imitation(study: Imitation) -> None:
    """Train the network on the teacher's labels and print tables of returns."""
    if not study.team_sizes:
        raise UsageError("--team-sizes: at least one is needed.")
    script, teacher = load_script("refil_smac"), TEACHERS[study.teacher]
    flags = ["--scenario", "resource", "--no-imagine", "--preset", study.preset]
    flags += ["--learning-rate", str(study.learning_rate), "--seed", str(study.seed)]
    args = script_args(script, [*flags, "--device", "cpu"])
    rng = torch.Generator().manual_seed(study.seed)
    options = {"rescale": args.rescale, "egocentric": args.egocentric}
    new_worlds = functools.partial(ResourceCollection, once=True, **options)
    worlds = new_worlds(study.team_sizes, study.round, study.seed)
    agent = script.Agent(args, worlds.family, torch.device("cpu"))
    rounds: list[list[tuple]] = []
    for n in range(study.minibatches):
        if n % study.every == 0:
            rounds = [*rounds[1 - KEPT :], []]
            play(worlds, watched(script.Player(agent) if n else teacher, teacher, rounds[-1]))
        steps = rounds[int(torch.randint(len(rounds), (), generator=rng))]
        some = torch.randperm(study.round, generator=rng)[: args.batch_size]
        right = learn_labels(script, agent, steps, some)
        if (n + 1) % study.show == 0 or n + 1 == study.minibatches:
            mixed = new_worlds(study.team_sizes, study.episodes, study.seed + 1)
            row = {f"after {n + 1}": summarise(play(mixed, script.Player(agent)))}
            print(f"labels met: {right:.3f}\n{resource_table(row)}\n", flush=True)
    rows = {}
    for size in dict.fromkeys((*study.team_sizes, *study.eval_team_sizes)):
        world = new_worlds((size,), study.episodes, study.seed + 1)
        policies = {"taught": script.Player(agent)} | scripted_policies(study.seed)
        for name, policy in policies.items():
            world.seed(study.seed + 1)  # all policies get the same teams and places
            rows[f"{size} {name}"] = summarise(play(world, policy))
    print(resource_table(rows))


# --- Main -----------------------------------------------------------------------------------------


COMMANDS = {
    "train": train,
    "tables": tables,
    "dependence": dependence,
    "frontier": frontier,
    "teammates": teammates,
    "mixes": mixes,
    "matrix-game": matrix_game,
    "imitation": imitation,
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    torch.set_num_threads(1)
    return run_subcommand(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
