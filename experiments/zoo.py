"""The zoo: weights of finished runs that are small enough for the repository, to play with.

    python experiments/zoo.py add runs/chicken-mappo-s11 zoo/chicken-mappo-s11
    python experiments/zoo.py cards                           writes zoo/README.md for all entries
    python experiments/bench.py zoo                           evaluates all entries again

An entry is a run directory whose checkpoint holds only the networks that choose actions, in float32
(no optimisers, critics or replays). It also has args.json, summary.json with the final evaluation
and checkpoints.json with the sha256. It is read like any run, by --eval-only, --background,
load_player() and the commands of experiments/, but training cannot resume from it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

import harness
from harness import UsageError, as_flag

import torch
import tyro

from envs.statistics import markdown_table
from experiments.runs import (
    ROOT,
    Run,
    check_out,
    kind_of,
    load_script,
    run_child,
    run_subcommand,
    script_file,
    split_words,
)

ZOO = ROOT / "zoo"
LARGEST, ALL_TOGETHER = 1_000_000, 24_000_000  # most bytes: an entry's weights, a whole zoo
# The parts of a checkpoint that evaluation and load_player() read, as shell patterns of their
# names. "own" is the part that belongs to the first process alone.
PLAYS = {
    "bidist_mappo_meltingpot": ("agent.actor", "agent.distilled"),
    "mappo_meltingpot": ("agent.actor",),
    "randnet_meltingpot": ("agent.actor",),
    "opre_meltingpot": ("agent.actor",),
    "pp_meltingpot": ("agent.actor",),
    "rpm_meltingpot": ("agent.actor",),
    "mra_maddpg_particle": ("agent.attention", "agent.actor", "agent.latent_prior"),
    "maddpg_particle": ("agent.attention", "agent.actor"),
    "maac_particle": ("agent.actor",),
    "rl2_particle": ("agent.policy", "agent.value_norm", "own.collectors"),
    "epc_particle": (
        "agent.best.*.attention",
        "agent.best.*.actor",
        "agent.ends",
        "agent.finished",
    ),
    "mipi_refil_smac": ("agent.utility", "agent.policy"),
    "refil_smac": ("agent.utility",),
    "collaq_smac": ("agent.utility",),
    "mappo_smac": ("agent.actor",),
    "mipi_mappo_smac": ("agent.actor",),
}
MIPI_PLAYS = {  # of mipi_refil_smac.py, by --policy: greedy agents read utilities alone
    "head": PLAYS["mipi_refil_smac"],
    "exact": ("agent.utility", "agent.marginal"),
    "greedy": ("agent.utility",),
}
# Flags that a card's command always names: worlds, and what had another default at its commit.
SHOWN = ("seed", "substrate", "task", "scenario", "clip_centre")
PACKAGES = ("torch", "numpy", "dm-meltingpot", "dmlab2d")  # an entry records their versions


# --- Making an entry ------------------------------------------------------------------------------


def played_parts(args: dict[str, Any], script: str, without: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns (see PLAYS) of the parts that an entry keeps of a run, without some networks."""
    parts = PLAYS[script]
    if script == "mipi_refil_smac":
        parts = MIPI_PLAYS[args.get("policy", "head")]
    kept = [name for name in parts if name.removeprefix("agent.") not in without]
    if script == "mra_maddpg_particle" and args["adapt"]:
        kept.append("own.collectors")  # after --adapt, the population's latents are in here
    return tuple(kept)


def only(x: Any, where: str, kept: tuple[str, ...]) -> Any:
    """x with only those parts whose names match `kept`; the others are None. where: x's name."""
    if any(fnmatch.fnmatchcase(where, pattern) for pattern in kept):
        return x
    parts = {}
    if isinstance(x, dict):
        parts = {name: only(part, f"{where}.{name}", kept) for name, part in x.items()}
    return parts if any(part is not None for part in parts.values()) else None


def weights_alone(saved: dict[str, Any], kept: tuple[str, ...]) -> dict[str, Any]:
    """A checkpoint's state with only the parts `kept`, marked as weights_only; others are None."""
    state = {name: saved[name] for name in ("format", "script", "args", "timesteps")}
    for name, part in saved.items():
        if isinstance(part, dict) and name != "args":
            state[name] = only(part, name, kept)
    state["ranks"] = [only(saved["ranks"][0], "own", kept)]
    return state | {"weights_only": True}


def known_co_players(args: dict[str, Any], kept: tuple[str, ...]) -> dict[str, Any]:
    """{"background": the co-players that an entry contains}: no past actors, no other runs."""
    if "background" not in args:
        return {}
    names = [name for name in args["background"] if name == "random" or f"agent.{name}" in kept]
    return {"background": tuple(names)}


@dataclasses.dataclass(frozen=True)
class Add:
    """Make a zoo entry from a finished run and write zoo/README.md again."""

    run: Annotated[Path, tyro.conf.Positional]  # directory of the finished run
    out: Annotated[Path, tyro.conf.Positional]  # directory of the new entry, as zoo/NAME
    without: tuple[str, ...] = ()  # networks to leave out with their rows, as --without distilled
    note: str = ""  # a remark for readers of the entry's card


def add(study: Add) -> None:
    """Write an entry, check it with an episode per row, write the cards; UsageError on failure."""
    run = Run(study.run)
    script = run.args["script"]
    if (kind := kind_of(script)) not in PLAYS:
        way = "give it a line there, or FORK_OF = its parent's name in the script"
        raise UsageError(f"{script}.py is not in PLAYS of experiments/zoo.py: {way}.")
    if study.out.exists():
        raise UsageError(f"{study.out} is there already.")
    for name in study.without:
        if f"agent.{name}" not in PLAYS[kind]:
            raise UsageError(f"--without {name}: {script}.py's entries have no such network.")
    saved, _ = harness.load_checkpoint(str(run.path))
    if saved.get("weights_only"):
        raise UsageError(f"{run.path} has the weights alone that play.")
    # Flags that are newer than the run get their defaults; flags that no longer exist are an error.
    names = {field.name for field in dataclasses.fields(load_script(script).Args)}
    if gone := sorted(saved["args"].keys() - names):
        raise UsageError(f"{run.path} is of a version that has {', '.join(gone)}, too.")
    if run.summary["timesteps"] != saved["timesteps"] or not run.summary["eval"]:
        raise UsageError(f"{run.path} has no final evaluation of its last checkpoint.")
    kept = played_parts(saved["args"], kind, study.without)
    ours = known_co_players(saved["args"], kept)
    absent = set(saved["args"].get("background", ())) - set(ours.get("background", ()))
    no_paths = {"run_dir": "", "resume": "", "eval_only": ""}
    data = as_bytes(weights_alone(saved | {"args": saved["args"] | no_paths | ours}, kept))
    if len(data) > LARGEST:
        sentence = f"takes {len(data):,} bytes, more than {LARGEST:,}: name networks --without"
        raise UsageError(f"{study.out} {sentence}.")
    files = [path for path in study.out.parent.rglob("*") if path.is_file()]
    total = len(data) + sum(path.stat().st_size for path in files)
    if total > ALL_TOGETHER:
        sentence = f"would have {total:,} bytes, of {ALL_TOGETHER:,}: name another directory."
        raise UsageError(f"{study.out.parent} {sentence}")
    packages = {name: run.args["packages"].get(name) for name in PACKAGES}
    args = run.args | no_paths | {"packages": packages, "note": study.note}
    rows = {row: x for row, x in run.summary["eval"].items() if row[2:] not in absent}
    check_out(study.out)
    study.out.mkdir()
    try:
        write_entry(study.out, args, run.summary | {"eval": rows}, data)
        flags = "--eval-scenarios none" if "eval_scenarios" in args else ""
        evaluate_again(Run(study.out), episodes=1, flags=flags)
    except BaseException:  # Ctrl-C, too: no entry that nobody has checked
        shutil.rmtree(study.out)
        raise
    write_cards(study.out.parent)
    print(f"{study.out}: {len(data) / 1000:,.0f} kB")


def as_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_entry(out: Path, args: dict[str, Any], summary: dict[str, Any], data: bytes) -> None:
    """Write an entry: its checkpoint, checkpoints.json, args.json and summary.json."""
    weights = out / f"checkpoint-{summary['timesteps']}.pt"
    harness.write(weights, data)
    index = {"name": weights.name, "timesteps": summary["timesteps"]}
    index |= {"sha256": harness.sha256_of(weights), "replays": []}
    for name, x in (("checkpoints", [index]), ("args", args), ("summary", summary)):
        harness.write(out / f"{name}.json", (json.dumps(x, indent=1) + "\n").encode())


# --- Cards ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cards:
    """Write README.md of a folder of entries."""

    zoo: Annotated[Path, tyro.conf.Positional] = ZOO  # the folder


def read_entries(zoo: Path) -> list[Run]:
    """All entries of a folder, by name; UsageError if there are none."""
    entries = [Run(path) for path in sorted({path.parent for path in zoo.glob("*/*.json")})]
    if not entries:
        raise UsageError(f"{zoo} has no entries.")
    return entries


def index_of(entry: Run) -> dict[str, Any]:
    """The entry's item in checkpoints.json: file name, steps and sha256 of its weights. UsageError
    if the item or the weights are not there."""
    index = harness.read_index(entry.path)
    if not index or not (entry.path / str(index[0]["name"])).is_file():
        raise UsageError(f"{entry.path} has no checkpoints.json that names its weights.")
    return index[0]


def command_of(entry: Run) -> str:
    """The command that started the run: flags of SHOWN, and those that differ from its preset."""
    args = dict(entry.args)
    script = load_script(args["script"])
    own = script.Args(**{x.name: value(args, x) for x in dataclasses.fields(script.Args)})
    presets = getattr(script, "PRESETS", {})
    default = script.Args(**harness.preset_flags(presets, own), preset=own.preset)
    words = ["--preset", own.preset] if own.preset != script.Args.preset else []
    for name, x in vars(own).items():
        if x != getattr(default, name) or name in SHOWN:
            words += flag_words(name, x)
    return shlex.join(["python", script_file(args["script"]), *words])


def value(args: dict[str, Any], field: dataclasses.Field) -> Any:
    """A run's value of a flag, lists as tuples; the default if the flag is newer than the run."""
    x = args.get(field.name, field.default)
    return tuple(x) if isinstance(x, list) else x


def flag_words(name: str, x: Any) -> list[str]:
    """An argument as the words of a command line: ["--k-d", "10"], ["--no-imagine"]."""
    if isinstance(x, bool):
        return [as_flag(name if x else f"no_{name}")]
    return [as_flag(name), *map(str, x if isinstance(x, tuple) else [x])]


class Figure(NamedTuple):
    """A mean of an evaluation with its 95 % interval."""

    row: str  # row of the evaluation, as a co-player or population
    name: str  # quantity, as "return"
    mean: float
    low: float
    high: float
    episodes: int

    def text(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def figures_of(results: dict[str, dict[str, float]]) -> Iterator[Figure]:
    """The returns and win rates of an evaluation {row: {name: x}} that have an interval."""
    for row, x in results.items():
        for name in x:
            if name.split("_")[0] in ("win", "return") and f"{name}_low" in x:
                low, high = x[f"{name}_low"], x[f"{name}_high"]
                yield Figure(row, name, x[name], low, high, x["episodes"])


def card_figures(entry: Run) -> list[Figure]:
    """The figures on an entry's card; UsageError if there are none."""
    figures = list(figures_of(entry.summary["eval"]))
    if not figures:
        raise UsageError(f"{entry.path} has no final evaluation.")
    return figures


HEAD = """# The zoo

Weights of runs behind this repository's tables, and of short runs where a method has none. How to
play with them, add one, and evaluate all of them again: [docs/zoo.md](../docs/zoo.md). This page is
made from their files by `python experiments/zoo.py cards`.

"""


def card(entry: Run) -> str:
    """An entry's section of README.md: its origin, its command and its final evaluation."""
    args, index = entry.args, index_of(entry)
    if missing := {"seed", "commit", "packages", "resolved", "note"} - args.keys():
        raise UsageError(f"{entry.path}/args.json has no {min(missing)}: `zoo.py add` writes it.")
    size = (entry.path / index["name"]).stat().st_size
    where = f"commit {args['commit']}, torch {args['packages']['torch']}"
    about = f"{index['timesteps']:,} steps, seed {args['seed']}, {where}, {size / 1000:,.0f} kB, "
    about += f"on {args['resolved']['device']}. {args['note']}"
    lines = [f"## {entry.name}", "", *wrapped(about.strip()), ""]
    lines += wrapped(command_of(entry), "    ", " \\") + [""]
    lines += [f"sha256 {index['sha256']}", "", markdown_table(table_of(entry))]
    return "\n".join(lines)


def table_of(entry: Run) -> list[dict[str, Any]]:
    """Table lines of the final evaluation: one for each row that has figures with intervals."""
    results = entry.summary["eval"]
    rows: dict[str, dict[str, Any]] = {}
    for figure in card_figures(entry):
        row = rows.setdefault(figure.row, {"": figure.row})
        row[figure.name] = figure.text()
    return [row | {"episodes": results[name]["episodes"]} for name, row in rows.items()]


def wrapped(text: str, indent: str = "", goes_on: str = "") -> list[str]:
    """The text in lines of at most 100 columns; all but the last end in `goes_on`."""
    later = indent + "    " * bool(goes_on)
    lines = textwrap.wrap(
        text,
        width=98,
        initial_indent=indent,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line + goes_on for line in lines[:-1]] + lines[-1:]


def cards_of(zoo: Path) -> str:
    """The text of README.md for a folder of entries."""
    entries, rows = read_entries(zoo), []
    sections = "\n".join(card(entry) for entry in entries)
    for entry in entries:
        first = card_figures(entry)[0]
        anchor = entry.name.replace(".", "")  # as GitHub makes it of a heading
        row = {"entry": f"[{entry.name}](#{anchor})", "script": entry.args["script"]}
        row |= {"steps": f"{entry.summary['timesteps']:,}", "commit": entry.args["commit"]}
        rows.append(row | {"first figure": f"{first.row}: {first.name} {first.text()}"})
    return HEAD + markdown_table(rows) + "\n" + sections


def write_cards(zoo: Path) -> None:
    harness.write(zoo / "README.md", cards_of(zoo).encode())


def cards(study: Cards) -> None:
    """Write README.md of a folder of entries; UsageError if there are none."""
    write_cards(study.zoo)


# --- Evaluating again -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Again:
    """Evaluate the zoo's entries again, as at the end of their runs, and compare with their cards.

    Worlds that can be repeated play the same episodes; Melting Pot cannot, and other processors
    round differently. A new figure is "equal" if all bits are those of the card, "within" if the
    difference is less than four standard errors, else "outside". The standard error comes from the
    wider of the two 95 % intervals. A card's figure that today's evaluation lacks is "gone";
    an entry that its script refuses is "refused". Exit code 1 for those and for figures outside;
    for gone ones unless there are --flags, which may leave rows out.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # entries in zoo/; default: all
    zoo: Path = ZOO  # the folder of entries
    episodes: harness.Count = 0  # episodes per row; 0: as many as the run played
    flags: str = ""  # more flags for all scripts, as --flags="--eval-scenarios none"


STANDARD_ERRORS = 4.0  # by chance alone, one difference in 16,000 is larger


def verdict(old: Figure, new: Figure) -> str:
    """Compare a card's figure with a new one: "equal", "within" or "outside" (see Again)."""
    if old == new:
        return "equal"
    # Standard deviation of one episode: the larger of both, as few episodes underestimate it.
    errors = [(x.high - x.low) / (2 * 1.96) for x in (old, new)]
    deviation = max(error * x.episodes**0.5 for error, x in zip(errors, (old, new)))
    error = deviation * (1 / old.episodes + 1 / new.episodes) ** 0.5
    # Where all episodes are alike, the error is 0, and another processor rounds otherwise.
    rounding = 1e-6 * max(abs(old.mean), abs(new.mean))
    allowed = STANDARD_ERRORS * error + rounding
    return "within" if abs(old.mean - new.mean) < allowed else "outside"


def evaluate_again(entry: Run, episodes: int, flags: str) -> dict[str, dict[str, float]]:
    """Evaluate an entry with its script: {row: {name: x}}. UsageError if the script fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(ROOT / script_file(entry.args["script"]))]
        command += ["--eval-only", str(entry.path), "--run-dir", str(out)]
        command += split_words(flags, "--flags")
        command += ["--final-episodes", str(episodes)] if episodes else []
        done = run_child(command)
        if done.returncode:
            *_, last = done.stderr.splitlines() or [f"code {done.returncode}"]
            raise UsageError(f"{entry.path}: {last.removeprefix('error: ').rstrip('.')}.")
        return Run(out).summary["eval"]


VERDICTS = ("equal", "within", "outside", "gone", "refused")


def again(study: Again) -> None:
    """Print each figure of the cards beside today's; RunError if one is not there or outside."""
    entries = read_entries(study.zoo)
    if unknown := set(study.names) - {entry.name for entry in entries}:
        raise UsageError(f"{study.zoo} has no {min(unknown)}.")
    old_figures = {}
    for entry in entries:
        if not study.names or entry.name in study.names:
            index_of(entry)
            old_figures[entry] = card_figures(entry)
    found: list[str] = []
    print("| entry | row | figure | card | today | |\n|---|---|---|---|---|---|", flush=True)
    for entry, figures in old_figures.items():
        try:
            results = evaluate_again(entry, study.episodes, study.flags)
        except UsageError as error:  # of this entry alone
            print(f"| {entry.name} | | | | {error} | refused |", flush=True)
            found.append("refused")
            continue
        new = {(x.row, x.name): x for x in figures_of(results)}
        for old in figures:
            now = new.get((old.row, old.name))
            found.append(verdict(old, now) if now else "gone")
            today = now.text() if now else ""
            cells = [entry.name, old.row, old.name, old.text(), today, found[-1]]
            print(f"| {' | '.join(cells)} |", flush=True)
    counts = {word: found.count(word) for word in VERDICTS}
    print("\n" + ", ".join(f"{number} {word}" for word, number in counts.items()))
    failed = counts["outside"] + counts["refused"]
    if failed or (counts["gone"] and not study.flags):
        raise harness.RunError("Some of today's figures are not those of the cards.")


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_subcommand({"add": add, "cards": cards}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
