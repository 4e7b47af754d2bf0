"""Build the website's sources: the pages of docs/, and pages made from code and packed studies.

    python experiments/website.py lay-out site/source
    make docs                                  # the same, then Sphinx writes HTML into site/html
    python experiments/website.py gif runs/RUN/videos/FILM.mp4 docs/images/FILM.gif --every 2

Copies README.md (the start page), CONTRIBUTING.md, CHANGELOG.md and docs/, and the files that they
offer for download. Writes a page for every script (its idea, its equations, the flags of its
method, and final figures and curves of the studies in docs/data), a gallery of the films in
docs/site/films.toml with a table of what is filmed, and the navigation.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
import shutil
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

from harness import Count, Positive, UsageError, as_flag, first_line

import numpy as np
import tyro
from annotated_types import Interval

from envs.statistics import markdown_table, student_interval, with_interval
from experiments.compare import draw, read_curves
from experiments.plots import save_figure
from experiments.runs import (
    ROOT,
    Run,
    load_script,
    read_study,
    run_subcommand,
    script_file,
    training_flags,
    without_seed,
)

# {heading of the navigation: its pages}. Pages in scripts/, gallery and data are made in this file.
NAVIGATION = {
    "Start": """README docs/first_runs docs/running docs/IDEA docs/forks docs/scripts docs/zoo
        zoo/README gallery""",
    "Claims and results": """docs/CLAIMS docs/results_bidist docs/cross_play docs/reverse_phases
        docs/pure_coordination docs/results_mra docs/results_mra_printed docs/results_mipi""",
    "Methods": """docs/bidist docs/mra docs/mra_ladder docs/mra_signpost
        docs/mra_networks docs/mra_unseen docs/mipi
        docs/mipi_lemma docs/mipi_mappo docs/mipi_strengths docs/mipi_controls""",
    "Baselines": """docs/baselines_meltingpot docs/baselines_particle docs/baselines_rl2
        docs/baselines_smac docs/value_learners""",
    "Scripts and their benchmarks": "scripts/index",
    "Worlds": """docs/meltingpot docs/scenarios docs/particle docs/battles docs/starcraft
        docs/resource_collection docs/own_world""",
    "On many machines": "docs/studies docs/slurm docs/ray docs/torchrun docs/gpu",
    "Project": "CONTRIBUTING CHANGELOG data",
}
# {family: {script: page on how its paper was read}}.
FAMILIES = {
    "Melting Pot": {
        "bidist_mappo_meltingpot": "docs/bidist.md",
        "mappo_meltingpot": "docs/bidist.md",
        "randnet_meltingpot": "docs/baselines_meltingpot.md",
        "opre_meltingpot": "docs/baselines_meltingpot.md",
        "pp_meltingpot": "docs/baselines_meltingpot.md",
        "rpm_meltingpot": "docs/baselines_meltingpot.md",
    },
    "Particle worlds": {
        "mra_maddpg_particle": "docs/mra.md",
        "maddpg_particle": "docs/mra.md",
        "maac_particle": "docs/baselines_particle.md",
        "rl2_particle": "docs/baselines_rl2.md",
        "epc_particle": "docs/baselines_particle.md",
    },
    "Battles": {
        "mipi_refil_smac": "docs/mipi.md",
        "refil_smac": "docs/mipi.md",
        "mappo_smac": "docs/baselines_smac.md",
        "collaq_smac": "docs/baselines_smac.md",
        "mipi_mappo_smac": "docs/mipi_mappo.md",
    },
}
DECIDED = {script: page for family in FAMILIES.values() for script, page in family.items()}
METHODS = {  # {family: {method: its script}}, columns of the gallery's tables
    "Melting Pot": {
        "BiDist": "bidist_mappo_meltingpot",
        "MAPPO": "mappo_meltingpot",
        "RandNet": "randnet_meltingpot",
        "OPRE": "opre_meltingpot",
        "PP": "pp_meltingpot",
        "RPM": "rpm_meltingpot",
    },
    "Particle worlds": {
        "MRA": "mra_maddpg_particle",
        "MADDPG": "maddpg_particle",
        "MAAC": "maac_particle",
        "RL2": "rl2_particle",
        "EPC": "epc_particle",
    },
    "Battles": {
        "MIPI": "mipi_refil_smac",
        "REFIL": "refil_smac",
        "AQMIX": "refil_smac",
        "MAPPO": "mappo_smac",
        "CollaQ": "collaq_smac",
        "MIPI's term on MAPPO": "mipi_mappo_smac",
    },
}
PLACES = {  # {family: the papers' worlds, and ours}, lines of the gallery's tables
    "Melting Pot": [
        "chicken in the matrix",
        "coins",
        "pure coordination in the matrix",
        "prisoner's dilemma in the matrix",
        "cooperative mining",
    ],
    "Particle worlds": ["treasure", "resource", "Pacman", "signpost", "rooms", "delivery"],
    "Battles": ["SZ", "CSZ", "MMM", "Resource Collection"],
}
CURVES = {  # {end of a script's name, its kind of world: scalars to draw if they were logged}
    "meltingpot": ("episode/return", "episode/pick_ups_per_1000", "entropy"),
    "particle": ("return", "entropy"),
    "smac": ("return", "eval/5/win", "eval/8/win"),
}
FIGURES = {  # {figure of the final evaluation: (its title, number of decimals)}
    "return_per_1000": ("focal return per 1,000 steps", 1),
    "win": ("share of battles won", 2),
    "return": ("return", 2),
    "return_pac_man": ("return of Pac-Men", 2),
    "return_ghost": ("return of ghosts", 2),
}


# --- Text -----------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Plain text with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_<>\[\]$#|])", r"\\\1", text)


def linked(text: str) -> str:
    """Escaped text for scripts/NAME.md in which names of pages and scripts are links to them."""
    text = re.sub(r"docs/((?:\w|\\_)+)\.md", link_to_page, text)
    return re.sub(r"(?:baselines/)?(\w[\w\\]*)\.py", link_to_script, text)


def link_to_page(found: re.Match) -> str:
    name = found[1].replace("\\", "")
    return f"[{found[0]}](../docs/{name}.md)"


def link_to_script(found: re.Match) -> str:
    name = found[1].replace("\\", "")
    return f"[{found[0]}]({name}.md)" if name in DECIDED else found[0]


def as_markdown(docstring: str) -> str:
    """A docstring as Markdown: paragraphs are escaped and linked, indented blocks stay code."""
    parts = []
    for part in re.split(r"\n\n", docstring.strip("\n")):
        is_code = part.startswith("    ")
        parts.append(part if is_code else linked(escaped(part)))
    return "\n\n".join(parts)


def code_cell(text: str) -> str:
    """Code in backticks for a cell of a table; "" stays ""."""
    return "`" + text.replace("|", r"\|") + "`" if text else ""


# --- What a script says of itself -----------------------------------------------------------------


class Equation(NamedTuple):
    """A comment of a script that names an equation."""

    line: int  # line of the file, from 1
    function: str  # function or class that it stands in, as "Agent · loss"
    text: str


def equations_of(source: str) -> list[Equation]:
    """All comments with "Eq." or "Eqs." in functions and classes except Args, in file order."""
    functions = [
        (node.lineno, node.end_lineno, node.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    found = []
    lines = source.splitlines()
    for number, line in enumerate(lines, 1):
        comment = re.search(r"# ((?:.*\W)?Eqs?\. .*)", line)
        around = [name for first, last, name in functions if first <= number <= last]
        if comment and around and around[0] != "Args":
            text = " ".join([comment[1], *continuation(line, lines[number:])])
            found.append(Equation(number, " · ".join(around), text))
    return found


def continuation(line: str, below: list[str]) -> list[str]:
    """The further lines of a comment that stands alone, up to the next equation."""
    if not line.lstrip().startswith("#"):
        return []
    more = itertools.takewhile(lambda x: re.match(r"\s*# (?!.*\bEqs?\. )", x), below)
    return [x.strip()[2:] for x in more]


class Flag(NamedTuple):
    """A flag of a script with its default and help text."""

    name: str
    default: str
    text: str


def method_flags(source: str) -> list[Flag]:
    """The flags below "# Method" in a script's Args; empty if it has no such band."""
    flags, inside = [], False
    for line in source.splitlines():
        if heading := re.fullmatch(r"    # ([A-Z][\w :]*)", line):
            inside = heading[1] == "Method"
        elif inside and (flag := re.match(r"    (\w+): .* = (.*?)(?:,|)  # (.*)", line)):
            flags.append(Flag(as_flag(flag[1]), flag[2], flag[3]))
        elif re.match(r"\S", line):
            inside = False
    return flags


# --- Studies --------------------------------------------------------------------------------------


@functools.cache
def read_studies(folder: Path) -> dict[str, list[Run]]:
    """{name: runs} of the packed studies study_NAME.csv in a folder."""
    paths = sorted(folder.glob("study_*.csv"))
    return {path.stem.removeprefix("study_"): read_study(path) for path in paths}


def groups_of(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """{name without -s1, -s2, ...: runs}: the seeds of each group."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[without_seed(run.name)].append(run)
    return dict(groups)


def command_of(run: Run) -> str:
    """The command that trains a run like this, in today's flags and with seed S. The flags of a
    preset are written out; a run that was resumed has its final number of steps."""
    args = run.args
    words = ["python", script_file(args["script"])]
    flags = {"substrate": args["substrate"]} if "substrate" in args else {}
    flags |= training_flags(args)
    flags.pop("preset", None)
    asked, made = args["total_timesteps"], steps_of(run)
    flags["total_timesteps"] = made if made > 1.1 * asked else asked
    for name, x in flags.items():
        if isinstance(x, bool):
            words.append(as_flag(name if x else f"no_{name}"))
        elif isinstance(x, list):
            words += [as_flag(name), *map(str, x)]
        elif x is not None:
            words += [as_flag(name), str(x)]
    return " ".join([*words, "--seed", "S"])


def steps_of(run: Run) -> int:
    return run.summary["timesteps"] or run.steps


def seeds_of(runs: list[Run]) -> str:
    return ", ".join(str(run.args["seed"]) for run in runs)


def overview(groups: dict[str, list[Run]]) -> str:
    """A Markdown table with a line per group: its seeds, steps and commits."""
    rows = []
    for name, runs in groups.items():
        steps = sorted({f"{steps_of(run):,}" for run in runs})
        commits = sorted({run.args.get("commit", "") for run in runs})
        row = {"runs": code_cell(name), "seeds": seeds_of(runs), "steps": ", ".join(steps)}
        rows.append(row | {"commit": ", ".join(commits)})
    return markdown_table(rows)


def gone_arguments(run: Run) -> str:
    """Text: arguments of a run that its script no longer has, except switches that were off."""
    known = {field.name for field in dataclasses.fields(load_script(run.args["script"]).Args)}
    gone = {name: x for name, x in run.args.items() if name not in {*known, "script", "commit"}}
    return ", ".join(f"{name} {x}" for name, x in gone.items() if x)


def commands(groups: dict[str, list[Run]]) -> str:
    """A code block with a command per group, below its name and the arguments that are gone."""
    lines = []
    for name, runs in groups.items():
        gone = gone_arguments(runs[0])
        lines.append(f"# {name}" + (f"; gone since: {gone}" if gone else ""))
        lines.append(command_of(runs[0]))
    return "".join(f"    {line}\n" for line in lines)


def final_rows(runs: list[Run]) -> list[str]:
    """Names of the final evaluations' rows to show: only team sizes or populations, if there are
    any (the others are scripted players); else all rows (co-players)."""
    names = list(dict.fromkeys(name for run in runs for name in run.summary["eval"]))
    numbers = [name for name in names if re.fullmatch(r"[\d,]+", name)]
    return sorted(numbers, key=numbers_in) or names


def numbers_in(name: str) -> list[int]:
    return [int(x) for x in name.split(",")]


def final_tables(groups: dict[str, list[Run]]) -> str:
    """A Markdown table per figure with a line per run, and a line above it for its group's mean.
    Runs have intervals over episodes; means have intervals over seeds, from five seeds on."""
    runs = [run for members in groups.values() for run in members]
    rows = final_rows(runs)
    tables = []
    for figure in figures_of(runs, rows):
        title, digits = FIGURES[figure]
        shown = [row for row in rows if any(has_figure(run, row, figure) for run in runs)]
        lines = []
        for name, members in groups.items():
            own = [run for run in members if any(has_figure(run, row, figure) for row in shown)]
            if len(own) > 1:
                lines.append(mean_line(name, own, shown, figure, digits))
            lines += [seed_line(run, shown, figure, digits) for run in own]
        tables.append(f"Final evaluations: {title}.\n\n{markdown_table(lines)}")
    return "\n".join(tables)


def has_figure(run: Run, row: str, figure: str) -> bool:
    return f"{figure}_low" in run.summary["eval"].get(row, {})


def figures_of(runs: list[Run], rows: list[str]) -> list[str]:
    """The figures to show: returns per 1,000 steps or win rates alone if known, else returns."""
    known = [
        name for name in FIGURES if any(has_figure(run, row, name) for run in runs for row in rows)
    ]
    return known[:1] if known[:1] in (["return_per_1000"], ["win"]) else known


def seed_line(run: Run, rows: list[str], figure: str, digits: int) -> dict[str, str]:
    """The table line of one run: each row's figure with its interval."""
    line = {"": code_cell(run.name)}
    for row in rows:
        found = run.summary["eval"].get(row, {})
        cell = with_interval(found, figure, digits) if has_figure(run, row, figure) else ""
        line[row] = cell.replace(", ", ",\N{NO-BREAK SPACE}")
    return line


def mean_line(
    name: str, runs: list[Run], rows: list[str], figure: str, digits: int
) -> dict[str, str]:
    """The table line of a group: means over its seeds, with intervals from five seeds on."""
    line = {"": f"**{escaped(name)}, mean of {len(runs)}**"}
    for row in rows:
        found = [run.summary["eval"].get(row, {}) for run in runs]
        x = np.array([values[figure] for values in found if figure in values])
        cell = f"{x.mean():.{digits}f}" if len(x) else ""
        if len(x) >= 5:
            low, high = student_interval(x)
            cell = f"{cell} [{low:.{digits}f}, {high:.{digits}f}]"
        line[row] = f"**{cell}**" if cell else ""
    return line


def draw_curves(groups: dict[str, list[Run]], path: Path) -> bool:
    """Save a picture of a study's curves; False if the study has no curve of CURVES."""
    runs = [run for members in groups.values() for run in members if run.log]
    logged = {name for run in runs for scalars in run.log for name in scalars}
    world = next(iter(groups.values()))[0].args["script"].rsplit("_", 1)[1]
    names = tuple(name for name in CURVES[world] if name in logged)
    if not names:
        return False
    every = max(1, max(run.steps for run in runs) // 40)
    if any("win" in name for name in names):
        every = max(1, max(run.steps for run in runs) // 15)  # evaluations are few: wider windows
    curves = {run.name: read_curves(run, names, every) for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw(curves, names), path)
    return True


def benchmark(script: str, studies: dict[str, list[Run]], pictures: Path) -> str:
    """The benchmark section of a script's page, and its pictures; "" without a study."""
    text = []
    for name, runs in studies.items():
        groups = groups_of(run for run in runs if run.args["script"] == script)
        if not groups:
            continue
        text += [f"### Study {escaped(name)}", overview(groups), "Commands:", commands(groups)]
        if any(run.summary["eval"] for members in groups.values() for run in members):
            text.append(final_tables(groups))
        picture = pictures / f"{script}-{name}.png"
        if draw_curves(groups, picture):
            title = f"Curves of {script} in study {name}: thin lines are seeds, thick ones means"
            text.append(f"![{title}]({pictures.name}/{picture.name})")
        else:
            text.append("The study kept no curves.")
    return "\n\n".join(text)


# --- Pages ----------------------------------------------------------------------------------------


def script_page(
    script: str, studies: dict[str, list[Run]], films: list[dict[str, Any]], pictures: Path
) -> str:
    """The text of scripts/NAME.md, a script's page; saves its pictures of curves."""
    path = script_file(script)
    source = (ROOT / path).read_text()
    decided = DECIDED[script]
    text = [
        f"# `{Path(path).name}`",
        as_markdown(ast.get_docstring(ast.parse(source)) or ""),
        f"The file: [{path}](../{path}). What the paper leaves open and how it was decided: "
        f"[{decided}](../{decided}). All flags: `python {path} --help`.",
    ]
    if equations := equations_of(source):
        rows = [
            {"line": x.line, "in": code_cell(x.function), "": escaped(x.text)} for x in equations
        ]
        text += ["## Where its equations are", markdown_table(rows)]
    if flags := method_flags(source):
        rows = [
            {"flag": code_cell(x.name), "default": code_cell(x.default), "": escaped(x.text)}
            for x in flags
        ]
        text += ["## Flags of the method", markdown_table(rows)]
    text.append("## Benchmarks")
    if found := benchmark(script, studies, pictures):
        intervals = (
            "From the studies in `docs/data`, which `experiments/runs.py` packed. Each run's cells "
            "have 95 % intervals over its episodes, means of five seeds and more over seeds. "
            "Commands are in flags of today, runs as old as their commits."
        )
        text += [intervals, found]
    else:
        text.append(
            f"No study of this script is in `docs/data`; what shorter runs gave is in "
            f"[{decided}](../{decided})."
        )
    if own := [film for film in films if film["script"] == script]:
        text += ["## Films", *(film_text(film, "..") for film in own)]
    return "\n\n".join(text) + "\n"


def film_text(film: dict[str, Any], root: str) -> str:
    """Markdown for a film: the picture, its caption and the commands that make it."""
    shown = film["caption"]
    text = f"![{shown}]({root}/docs/images/{film['file']})\n\n{shown}."
    made = "".join(f"\n    {command}" for command in film["commands"])
    return f"{text} Such a film is made by\n{made}" if made else text


def gallery_page(films: list[dict[str, Any]]) -> str:
    """The text of gallery.md: per family a table of what is filmed and what is not, and films."""
    text = [
        "# Films",
        "In Melting Pot focal players, who are evaluated, have a blue frame and background players "
        "a yellow one, as in BiDist's Fig. 1. In battles our team is blue, the enemies, who are "
        "part of the world, are red (SZ: Stalkers and Zealots; CSZ: Colossi, too; MMM: Marines, "
        "Marauders and Medivacs). In particle worlds and Resource Collection all agents are played "
        "by the method, and colours are types. Budgets are small: most films show beginners.",
        "A dash in a table: not filmed, as there is no such run, or its weights were not kept.",
    ]
    for family in METHODS:
        own = [film for film in films if film["world"] == family]
        text += [f"## {family}", filmed(family, own)]
        for film in own:
            title = f"({target(film)})=\n### {film['method']}: {film['where']}"
            page = f"[{Path(script_file(film['script'])).name}](scripts/{film['script']}.md)"
            text += [title, film_text(film, "."), f"Its script: {page}."]
    return "\n\n".join(text) + "\n"


def filmed(family: str, films: list[dict[str, Any]]) -> str:
    """A Markdown table: links to a family's films by world and method, dashes for none."""
    rows = []
    for place in PLACES[family]:
        row = {"": place}
        for method in METHODS[family]:
            own = [film for film in films if (place_of(film), film["method"]) == (place, method)]
            row[method] = " ".join(f"[film](#{target(film)})" for film in own) or "–"
        rows.append(row)
    return markdown_table(rows)


def place_of(film: dict[str, Any]) -> str:
    """The world of PLACES that a film shows."""
    return film["where"].split(",")[0]


def target(film: dict[str, Any]) -> str:
    """The target of links to a film."""
    return Path(film["file"]).stem


def index_of_scripts(studies: dict[str, list[Run]]) -> str:
    """The text of scripts/index.md: a table of scripts per family."""
    text = [
        "# Scripts and their benchmarks",
        "A page for each script: what it implements, where its equations are in the file, the "
        "flags that are its method's, and what studies of it have given.",
    ]
    for family, scripts in FAMILIES.items():
        rows = []
        for script in scripts:
            docstring = ast.get_docstring(ast.parse((ROOT / script_file(script)).read_text()))
            idea = " ".join(docstring.split("\n\n")[0].split())
            own = [name for name, runs in studies.items() if uses(runs, script)]
            link = f"[{script_file(script)}]({script}.md)"
            rows.append({"script": link, "": linked(escaped(idea)), "studies": ", ".join(own)})
        text += [f"## {family}", markdown_table(rows)]
    text.append(toctree("", [f"{script}" for script in DECIDED]))
    return "\n\n".join(text) + "\n"


def uses(runs: list[Run], script: str) -> bool:
    return any(run.args["script"] == script for run in runs)


def data_page(names: list[str]) -> str:
    """The text of data.md: the list of the tables that pages link to."""
    text = "# Data\n\nTables that commands wrote, as pages quote them."
    return f"{text}\n\n{toctree('', [f'docs/data/{name}' for name in names])}\n"


def toctree(caption: str, pages: Iterable[str], hidden: bool = False) -> str:
    """A toctree, Sphinx's list of pages, in Markdown."""
    options = [":maxdepth: 1", f":caption: {caption}" if caption else "", ":hidden:" * hidden]
    lines = ["```{toctree}", *filter(None, options), "", *pages, "```"]
    return "\n".join(lines)


# --- Laying out -----------------------------------------------------------------------------------


MARKER = ".website"  # a file in each folder that lay-out wrote; others are never removed


@dataclasses.dataclass(frozen=True)
class LayOut:
    """Write the website's sources."""

    out: Annotated[Path, tyro.conf.Positional]  # folder to write; an older website is replaced
    studies: Path = ROOT / "docs/data"  # folder of study_*.csv, the packed studies


def lay_out(site: LayOut) -> None:
    """Write all that Sphinx needs; UsageError if the folder exists and holds no website, or cannot
    be written."""
    if not site.studies.is_dir():
        raise UsageError(f"--studies {site.studies} is no directory.")
    try:
        make_room(site.out)
        write_pages(site)
    except OSError as error:
        raise UsageError(f"{site.out} cannot be written: {error.strerror or error}.") from None
    print(f"{site.out}: {len(list(site.out.rglob('*.md')))} pages")


def make_room(out: Path) -> None:
    """Make the folder anew with MARKER in it; UsageError if one is there without."""
    if out.exists():
        if not (out / MARKER).exists():
            raise UsageError(f"{out} is there and holds none of our websites: remove it.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("experiments/website.py replaces this folder.\n")


def write_pages(site: LayOut) -> None:
    """Copy and write all pages."""
    copy_pages(site.out)
    films = read_films()
    studies = read_studies(site.studies)
    pages = {"gallery": gallery_page(films), "scripts/index": index_of_scripts(studies)}
    for script in DECIDED:
        pictures = site.out / "scripts/curves"
        pages[f"scripts/{script}"] = script_page(script, studies, films, pictures)
    tables = sorted(path.stem for path in (site.out / "docs/data").glob("*.md"))
    pages["data"] = data_page(tables)
    for name, text in pages.items():
        path = site.out / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read_films() -> list[dict[str, Any]]:
    """The films that docs/site/films.toml names, with their scripts."""
    films = tomllib.loads((ROOT / "docs/site/films.toml").read_text())["film"]
    return [film | {"script": METHODS[film["world"]][film["method"]]} for film in films]


def copy_pages(out: Path) -> None:
    """Copy the repository's pages, pictures and downloads; README.md becomes the start page."""
    kept = shutil.ignore_patterns("site", "study_*.csv", "*.py")
    shutil.copytree(ROOT / "docs", out / "docs", ignore=kept)
    for name in ("conf.py", "style.css"):
        shutil.copy(ROOT / "docs/site" / name, out)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, out)
    for path in ["experiments/claims.toml", "zoo/README.md", *map(script_file, DECIDED)]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, out / path)
    trees = [toctree(caption, names.split(), hidden=True) for caption, names in navigation()]
    (out / "index.md").write_text("\n\n".join([(ROOT / "README.md").read_text(), *trees]) + "\n")
    for path in (out / "docs/data").glob("*.md"):
        path.write_text(f"# {escaped(path.stem)}\n\n{path.read_text()}")
    changes = out / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("(docs)", "(docs/CLAIMS.md)"))


def navigation() -> list[tuple[str, str]]:
    """(caption, pages) of each part; README is left out, as the start page holds these lists."""
    return [(caption, names.removeprefix("README ")) for caption, names in NAVIGATION.items()]


# --- Films ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gif:
    """Make a small GIF of a part of a film."""

    film: Annotated[Path, tyro.conf.Positional]  # an MP4 that --capture-video made
    out: Annotated[Path, tyro.conf.Positional]  # the .gif to write
    every: Positive = 1  # keep one frame of every so many
    first: Count = 0  # number of the first frame to keep
    pictures: Positive = 80  # most frames to keep
    width: Positive = 320  # width of the GIF in pixels
    zoom: Annotated[float, Interval(ge=1)] = 1.0  # enlargement of the middle of the frames
    per_second: Positive = 8  # frames per second of the GIF


def gif(cut: Gif) -> None:
    """Make a GIF of a film with one palette for all frames; UsageError for a film too short."""
    import imageio.v2 as imageio
    from PIL import Image

    if cut.out.suffix != ".gif":
        raise UsageError(f"{cut.out} should end with .gif.")
    last = cut.first + cut.every * cut.pictures
    try:
        with imageio.get_reader(cut.film) as reader:
            frames = [x for i, x in enumerate(reader) if cut.first <= i < last]
    except (OSError, ValueError) as error:
        raise UsageError(f"{cut.film} is no film: {first_line(error)}.") from None
    frames = frames[:: cut.every]
    if not frames:
        raise UsageError(f"--first {cut.first}: {cut.film} is shorter.")
    rows, columns = frames[0].shape[:2]
    top, left = (round(x * (1 - 1 / cut.zoom) / 2) for x in (rows, columns))
    box = (left, top, columns - left, rows - top)
    size = (cut.width, round(cut.width * rows / columns))
    small = [Image.fromarray(x).resize(size, box=box) for x in frames]
    some = Image.fromarray(np.concatenate(small[:: max(1, len(small) // 8)]))
    palette = some.quantize(128, method=Image.Quantize.MAXCOVERAGE)  # keeps rare colours as well
    plain = [x.quantize(palette=palette, dither=Image.Dither.NONE) for x in small]
    pause = 1000 // cut.per_second
    plain[0].save(cut.out, save_all=True, append_images=plain[1:], duration=pause, loop=0)
    print(f"{cut.out}: {len(plain)} pictures, {cut.out.stat().st_size / 1000:,.0f} kB")


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_subcommand({"lay-out": lay_out, "gif": gif}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
