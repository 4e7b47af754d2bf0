"""README.md, its neighbours, docs/*.md: links, commands, flags, names exist; lengths are kept."""

import ast
import functools
import glob
import importlib.util
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import harness

import pytest
import tracked

ROOT = Path(__file__).resolve().parents[1]
FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*FIRST, *sorted((ROOT / "docs").glob("*.md"))]
METHODS = ("bidist.md", "mra.md", "mipi.md")
SCRIPTS = {str(path.relative_to(ROOT)): path for path in tracked.files("*_*.py", "baselines/*.py")}
LENGTHS = {"README.md": 70, "running.md": 120}  # lines; below: the other pages
METHOD, RESULTS, WORLD = 150, 120, 220
# Flags that pages name as gone, of other programs, and of scripts that a reader writes.
FOREIGN = {
    *("--dual-clip", "--literal-blahut-arimoto", "--sample-next-actions"),
    *("--mask-empty-slots", "--mi-samples", "--latent-gradient", "--parallel-populations"),
    "--prior-floor",
    *("--help", "--no-deps", "--nproc-per-node", "--logdir", "--x", "--no-x"),
    "--extra-index-url",  # pip's
    *("--array", "--signal", "--requeue", "--time", "--gres"),  # SLURM's
}


# Files that a page tells its reader to save, and the script whose flags they take.
WRITTEN = {"meet.py": "mra_maddpg_particle.py", "mm.py": "baselines/mappo_smac.py"}


def code_blocks(text: str) -> list[list[str]]:
    """Lines of each indented or fenced block."""
    blocks, block, fenced = [], [], False
    for line in [*text.splitlines(), "end"]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            block.append(line)
            continue
        if block and (line.strip() or not fenced):
            blocks.append(block)
            block = []
    return blocks


def prose(text: str) -> str:
    """A page without its blocks of code."""
    fenced, lines = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            lines.append(line)
    return "\n".join(lines)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> list[str]:
    """Command lines of a page; two spaces or a # begin a comment, a backslash goes on."""
    found = []
    for block in code_blocks(text):
        begun = ""
        for line in block:
            stripped = re.split(r"\s{2,}|\s#", line.strip())[0]
            begun += " " + stripped.removesuffix("\\")
            if not stripped.endswith("\\"):
                found.append(begun.strip())
                begun = ""
    return found + inline_code(text)


def words_of(command: str) -> list[str]:
    try:
        return [word for word in shlex.split(command) if word != "..."]
    except ValueError:  # not a command
        return []


def started(command: str) -> tuple[str, list[str]] | None:
    """The Python file that a command line starts, and its arguments."""
    words = words_of(command.removeprefix(".venv/bin/").removeprefix("$ "))
    if words[:2] == ["make", "train"]:
        given = [word.removeprefix("ARGS=") for word in words[2:] if word.startswith("ARGS=")]
        return "bidist_mappo_meltingpot.py", shlex.split(" ".join(given))
    if words and words[0] == "torchrun":
        words = ["python", *words[words.index("--nproc-per-node") + 2 :]]
    if len(words) < 2 or not words[0].startswith("python") or not words[1].endswith(".py"):
        return None
    return words[1], words[2:]


def examples() -> list[pytest.param]:
    """Every command line of every page that starts a Python file, and what `cp` made before."""
    found = []
    for page in PAGES:
        copies = dict(WRITTEN)
        for command in commands(page.read_text()):
            words = words_of(command)
            if words[:1] == ["cp"] and len(words) >= 3:
                copies[words[2]] = words[1]
            if start := started(command):
                path, argv = start
                name = f"{page.name}: {command[:90]}"
                found.append(pytest.param(copies.get(path, path), argv, id=name))
    return found


@functools.cache
def args_class(path: str) -> type:
    """The class Args of a script."""
    name = "docs_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS[path])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Args


@functools.cache
def names_in(path: Path) -> set[str]:
    """Fields, parameters, one-word strings and definitions of a file, with dashes."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(--)?[a-z][a-z0-9_-]*", node.value):
                names.add(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.update((node.name, node.name.lower()))
    return {name.removeprefix("--").replace("_", "-") for name in names}


def has_flag(names: set[str], word: str) -> bool:
    flag = word.split("=")[0].removeprefix("--")
    return flag in names or flag.removeprefix("no-") in names


@pytest.mark.parametrize(("path", "argv"), examples())
def test_commands_have_files_and_flags_that_exist(path, argv, capsys):
    """Of scripts the whole line is parsed; of other files each flag has to be named there."""
    assert (ROOT / path).is_file(), f"{path} is missing"
    if path in SCRIPTS:
        try:
            harness.read_flags(args_class(path), argv)
        except SystemExit as leaving:
            assert not leaving.code, capsys.readouterr().err
        return
    names = names_in(ROOT / path)
    if path.startswith("experiments/"):
        names = names.union(*(names_in(other) for other in (ROOT / "experiments").glob("runs.py")))
        kind = argv[0] if argv and re.fullmatch(r"[a-z][a-z0-9-]*", argv[0]) else None
        assert kind is None or kind in names, f"{path} has no {kind}"
    for word in argv:
        if re.match(r"--[a-z]", word):
            assert has_flag(names, word), f"{path} has no {word}"


def all_flags() -> set[str]:
    names = set(names_in(ROOT / "envs/meltingpot/install.py"))
    for path in (*SCRIPTS.values(), ROOT / "harness.py", *(ROOT / "experiments").glob("*.py")):
        names |= names_in(path)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_in_the_text_exist(page):
    names = all_flags()
    for code in inline_code(page.read_text()):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
            assert flag in FOREIGN or has_flag(names, flag), flag


START = ("README.md", "CONTRIBUTING.md", "IDEA.md", "running.md", "studies.md")
PROGRAMS = ("cp", "for", "git", "make", "pip", "python", "source", "torchrun")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_work_in_zsh(page):
    """It splits no unquoted variable, and takes # for a word where commands are typed."""
    text = page.read_text()
    assert not re.search(r"^ +[A-Za-z]+=([\"']).* .*\1$", text, re.MULTILINE)
    for line in (line for block in code_blocks(text) for line in block):
        if page.name in START and line.split()[:1] and line.split()[0] in PROGRAMS:
            assert not re.search(r"\s#", line), line


def run_dirs(page: Path) -> set[str]:
    """The run directories that a page's code names, without seeds."""
    code = "\n".join(line for block in code_blocks(page.read_text()) for line in block)
    return {re.sub(r"-s[^-]*$", "", x) for x in re.findall(r"\bruns/[\w-]+-s\$?\w+", code)}


def test_pages_that_begin_with_a_fork_share_no_run_directories():
    """A reader of both would compare runs of two worlds."""
    readme, running = run_dirs(ROOT / "README.md"), run_dirs(ROOT / "docs/running.md")
    assert readme == {"runs/mine", "runs/its"} and len(running) == 2
    assert not readme & running


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_first_runs_are_what_the_zoo_holds():
    """Steps, minutes and figures of a line are of the entry that it names."""
    lines = (ROOT / "docs/first_runs.md").read_text().splitlines()
    rows = [line for line in lines if "](../zoo/README.md#" in line and line.startswith("|")]
    assert len(rows) > 10
    for line in rows:
        _, entry, steps, minutes, figure, learned, random, script = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        name = re.match(r"\[(.*?)\]", entry)[1]
        summary = json.loads((ROOT / "zoo" / name / "summary.json").read_text())
        found = summary["eval"]
        key, row = re.fullmatch(r"`(\w+)`, (.*)", figure).groups()
        chance = found["random v random"] if "v" in row or "self" in row else found[f"{row} random"]
        expected = [(learned, found[row][key]), (random, chance[key])]
        if script:
            player, _, x = script.rpartition(" ")
            expected.append((x, found[f"{row} {player}"][key]))
        for shown, x in expected:
            assert float(shown) == pytest.approx(x, rel=0.005), (name, shown, x)
        assert steps == f"{summary['timesteps']:,}"
        assert minutes == f"{summary['wall_s'] / 60:.0f}"


def test_lengths_of_scripts_are_todays():
    """The table of docs/scripts.md has each script, with its lines."""
    rows = re.findall(
        r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", (ROOT / "docs/scripts.md").read_text(), re.MULTILINE
    )
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in map(str, SCRIPTS)}
    assert {name: int(length.replace(",", "")) for name, length in rows} == lengths


def test_pages_named_in_other_files_exist():
    """In docstrings, the Makefile, requirements and the like."""
    names = [ROOT / "Makefile", ROOT / "harness.py", *ROOT.glob("requirements*.txt")]
    for folder in ("baselines", "envs", "experiments", "tests"):
        names += (ROOT / folder).rglob("*.py")
    names += ROOT.glob("*_*.py")
    missing = set()
    for path in names:
        for page in re.findall(r"docs/\w+\.md", path.read_text()):
            if not (ROOT / page).exists():
                missing.add(f"{path.relative_to(ROOT)}: {page}")
    assert not missing


PATH = r"(?:envs|tests|experiments|baselines|docs|\.ci)/[\w/.*{},-]*\.(?:py|md|csv|toml|png|gif)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_tests_and_functions_named_in_the_text_exist(page):
    """`path`, `path::test`; on method pages also `name()` and `Name`."""
    sources = [*SCRIPTS.values(), ROOT / "harness.py", *(ROOT / "envs").rglob("*.py")]
    sources += (ROOT / "experiments").glob("*.py")
    defined = "\n".join(path.read_text() for path in sources)
    for code in inline_code(page.read_text()):
        if found := re.fullmatch(rf"({PATH})(?:::(\w+))?", code):
            paths = glob.glob(str(ROOT / found[1]))
            assert paths, code
            assert not found[2] or f"def {found[2]}(" in Path(paths[0]).read_text(), code
        elif page.name in METHODS and (found := re.fullmatch(r"(?:\w+\.)?(\w+)\(\)", code)):
            assert f"def {found[1]}(" in defined, code
        elif page.name in METHODS and re.fullmatch(r"[A-Z]+[a-z]\w*", code):
            assert f"class {code}" in defined, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_can_be_read(page):
    """Lengths, 100 columns but for tables (commands: 105), no cell of more than 200 characters,
    a blank line above code, no paths of a machine."""
    text, name = page.read_text(), page.name
    lines = text.splitlines()
    kind = METHOD if name in METHODS else RESULTS if name.startswith("results_") else WORLD
    assert len(lines) <= LENGTHS.get(name, kind)
    for line in lines:
        if line.startswith("|"):
            shown = re.sub(r"\]\([^)]*\)", "", line)
            assert max(len(cell.strip()) for cell in shown.split("|")) <= 200, line
        elif name != "README.md" and "](" not in line and "http" not in line:
            is_code = line.startswith("    ")
            assert len(line) <= (105 if is_code else 100), line
    for above, line in itertools.pairwise(lines):
        begins = line.startswith("    ") and above and not above.startswith(("  ", "- "))
        assert not begins, f"code needs a blank line above it: {line}"
    assert not re.search(r"(?<![\w.~])/(?:work|root|home|tmp|Users)/", text)
